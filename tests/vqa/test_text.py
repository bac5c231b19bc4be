"""`vqa/text.py`: words, their numbers and vectors, against plain loops."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqa.text import PADDING, SPECIAL, UNKNOWN, Vocabulary, build_vocabulary, cooccurrence, read_glove, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What is the man's hat?", ["what", "is", "the", "man", "'s", "hat"]),
        ("Isn't it 10:30, or so?", ["is", "n't", "it", "10", "30", "or", "so"]),
        ("T-shirt/jeans", ["t", "shirt", "jeans"]),
        ("Où est l'école?", ["où", "est", "l", "école"]),
        ("cant", ["cant"]),
        ("?!", []),
    ],
)
def test_texts_fall_into_words(text, words):
    assert words_of(text) == words


def test_a_vocabulary_numbers_frequent_words_first_and_knows_padding_and_unknown():
    found = build_vocabulary(["a cat a dog", "a cat", "bird"])
    assert found.words == (*SPECIAL, "a", "cat", "bird", "dog")
    rows = found.encode(["a dog and a cat", "", "cat"], length=4)
    assert rows.tolist() == [[2, 5, UNKNOWN, 2], [PADDING] * 4, [3, PADDING, PADDING, PADDING]]
    assert build_vocabulary(["a cat a dog", "a cat", "bird"], least=2).words == (*SPECIAL, "a", "cat")
    for wrong in (("a", "b"), (*SPECIAL, "a", "a")):
        with pytest.raises(ValueError, match="begins with"):
            Vocabulary(wrong)


@given(st.lists(st.text("abc 's?", max_size=20), max_size=6), st.integers(1, 5))
def test_texts_of_known_words_are_read_back(texts, length):
    vocabulary = build_vocabulary(texts)
    for text, row in zip(texts, vocabulary.encode(texts, length), strict=True):
        assert [vocabulary.words[number] for number in row if number != PADDING] == words_of(text)[:length]


def naive_cooccurrence(rows, num_words):
    counts, places = defaultdict(float), Counter(word for row in rows for word in row)
    for row in rows:
        for first, second in itertools.combinations([word for word in row if word > UNKNOWN], 2):
            counts[first, second] += 1 / places[second]
            counts[second, first] += 1 / places[first]
    found = np.zeros((num_words, num_words))
    for place, value in counts.items():
        found[place] = value
    sums = found.sum(axis=1, keepdims=True)
    return found / np.where(sums > 0, sums, 1)


@given(st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=1, max_size=8))
def test_cooccurrence_is_that_of_a_plain_loop(rows):
    found = cooccurrence(np.array(rows, dtype=np.int32), 7).toarray()
    np.testing.assert_allclose(found, naive_cooccurrence(rows, 7), atol=1e-12)
    assert not found[:2].any() and not found[:, :2].any()  # neither padding nor unknown words


def test_vectors_are_read_for_the_words_that_are_there(tmp_path):
    vocabulary = build_vocabulary(["cat dog bird"])
    path = tmp_path / "glove.txt"
    path.write_text("the .1 .2\ncat 1 2\nelse 1 2 3\ndog 3 -4\ncat 9 9\n")
    vectors, count = read_glove(path, vocabulary)
    assert count == 2 and vectors.dtype == np.float32
    expected = {"<pad>": [0, 0], "<unk>": [0, 0], "cat": [1, 2], "dog": [3, -4], "bird": [0, 0]}
    assert {word: vectors[number].tolist() for word, number in vocabulary.number_of.items()} == expected
    path.write_text("2 2\ncat 1 2\n")  # with word2vec's header
    assert read_glove(path, vocabulary)[1] == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file; GloVe is at"),
        ("", "has none of the 3 words"),
        ("dog 1 2\n", "has none of the 3 words"),
        ("the 1 2\ncat 1 2 3\n", "line 2 has 3 numbers where the first has 2"),
        ("cat 1 x\n", "could not convert"),
        ("cat 1 nan\n", "line 1: the vector of 'cat' is not finite"),
    ],
)
def test_a_wrong_file_of_vectors_is_refused(content, says, tmp_path):
    path = tmp_path / "glove.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_glove(path, build_vocabulary(["cat"]))
    assert str(caught.value).startswith(f"--glove {path}: ") and "\n" not in str(caught.value)
