"""`vqa/answers.py`: the form in which answers are compared, and their accuracy."""

from __future__ import annotations

import itertools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqa import answers

# Each worked out by hand from the rules of the evaluation.
NORMALISED = {
    "Two": "2",
    "none": "0",
    "a dog": "dog",
    "The  Cat\n": "cat",
    "dont know": "don't know",
    "couldnt've": "couldn't've",
    "yall'd've": "y'all'd've",
    "'ows'at": "'ow's'at",
    "somebody'd": "somebodyd",
    "wed": "wed",  # a word of its own
    "let's": "let's",
    "black/white": "black white",  # between letters a mark becomes a space ...
    "black, white": "black white",  # ... and vanishes beside one
    "t-shirt": "t shirt",
    "1,000": "1000",
    "1,000 t-shirts": "1000 tshirts",  # a comma between digits makes all marks vanish
    "3.5": "3.5",
    "st. louis": "st louis",
    "5.": "5",
    ".5": ".5",
    "yes!": "yes",
    "what?": "what",
    "": "",
}


@pytest.mark.parametrize(("raw", "expected"), NORMALISED.items())
def test_answers_are_compared_in_one_form(raw, expected):
    assert answers.normalise(raw) == expected


def test_each_contraction_is_told_by_any_one_missing_apostrophe():
    for word in answers.CONTRACTIONS.split():
        assert answers.normalise(word) == word
        for place in (place for place, letter in enumerate(word) if letter == "'"):
            assert answers.normalise(word[:place] + word[place + 1 :]) == word


@given(st.text(string.printable, max_size=30))
def test_a_normalised_answer_has_no_mark_article_capital_or_double_space(raw):
    found = answers.normalise(raw)
    words = found.split(" ") if found else []
    assert not set(found) & (set(answers.PUNCTUATION) | set(string.ascii_uppercase))
    assert not set(words) & (answers.ARTICLES | set(answers.DIGITS) | {""})


def naive_accuracy(answer: str, people: list[str]) -> float:
    """The mean over all subsets that lack one person of min(matches / 3, 1)."""
    subsets = list(itertools.combinations(people, len(people) - 1))
    return sum(min(subset.count(answer) / 3, 1) for subset in subsets) / len(subsets)


@given(st.lists(st.sampled_from(["red", "blue", "2", "dark green"]), min_size=10, max_size=10))
def test_accuracy_is_the_mean_over_ten_subsets_of_nine(people):
    for answer in ("red", "blue", "2", "dark green", "never said"):
        assert answers.accuracy(answer, people) == pytest.approx(naive_accuracy(answer, people))
    targets = answers.soft_targets(people)
    assert set(targets) == set(people)
    for answer, target in targets.items():
        assert target == pytest.approx(naive_accuracy(answer, people))


def test_ten_people_give_the_known_steps():
    assert [answers.agreement(count, 10) for count in (0, 1, 2, 3, 4, 10)] == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])
    assert [answers.agreement(count, 1) for count in (0, 1)] == [0, 1]


def test_both_sides_are_normalised_unless_all_people_agree():
    assert answers.accuracy("A dog!", ["dog"] * 9 + ["cat"]) == 1
    assert answers.accuracy("dog", ["The dog"] * 2 + ["dogs"] * 8) == pytest.approx(0.6)
    assert answers.accuracy("two", ["2"] * 10) == 0  # as the evaluation has it
    assert answers.accuracy(" 2\n", ["2"] * 10) == 1
