"""`vqa/floors.py`: simple predictors find what they can find."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from vqa.floors import bag_of_words, most_frequent, ridge_answers

TARGETS = scipy.sparse.csr_array(np.array([[1, 0, 0], [0, 0.9, 0], [0, 0.9, 0]], dtype=np.float32))


def test_the_answer_that_is_right_most_often():
    assert most_frequent(TARGETS) == 1


def test_a_bag_of_words_knows_which_words_there_are_and_the_first():
    found = bag_of_words(np.array([[3, 1, 1, 0], [1, 0, 0, 0]], dtype=np.int32), 4).toarray()
    # columns: words 1 to 3, then no first word, then first words 1 to 3
    np.testing.assert_array_equal(found, [[1, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0, 0]])


def test_ridge_finds_the_word_that_decides():
    draw = np.random.default_rng(0)
    words = draw.integers(1, 40, size=(600, 6)).astype(np.int32)
    words[:, 2] = np.where(draw.random(600) < 0.5, 50, 51)
    answers = words[:, 2] - 50
    targets = scipy.sparse.csr_array(np.eye(2, dtype=np.float32)[answers])
    bags = bag_of_words(words, 60)
    found = ridge_answers(bags[:400], targets[:400], bags[400:])
    assert (found == answers[400:]).all()
    blind = ridge_answers(bag_of_words(words[:, :2], 60)[:400], targets[:400], bag_of_words(words[:, :2], 60)[400:])
    assert 0.35 < (blind == answers[400:]).mean() < 0.65  # there is nothing to find
