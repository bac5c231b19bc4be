"""`vqa/targets.py`: the list of answers, and how right each is."""

from __future__ import annotations

import numpy as np
import pytest

from vqa.answers import accuracy
from vqa.targets import AnswerList, build_answer_list, ceiling, dense, target_matrix

SAID = [
    ["yes"] * 6 + ["no"] * 4,
    ["Two"] * 9 + ["3"],
    ["no"] * 10,
    ["a cat"] * 5 + ["dog"] * 5,
    (),
]


def test_the_list_has_what_most_people_said_often_enough():
    assert build_answer_list(SAID, least=1).answers == ("2", "cat", "no", "yes")
    assert build_answer_list([*SAID, ["No."]], least=2).answers == ("no",)
    with pytest.raises(ValueError, match="no answer was given to 9 questions"):
        build_answer_list(SAID, least=9)


def test_targets_are_the_accuracies_of_answers():
    known = AnswerList(("yes", "no", "2", "dog"))
    found = target_matrix(SAID, known)
    assert found.shape == (5, 4) and found.dtype == np.float32
    for row, said in enumerate(SAID[:4]):
        expected = [accuracy(answer, said) for answer in known.answers]
        assert dense(found, np.array([row]))[0].tolist() == pytest.approx(expected)
    assert not dense(found, np.array([4])).any()  # nobody has answered
    assert ceiling(found) == pytest.approx((1 + 1 + 1 + 1 + 0) / 5)
    assert ceiling(target_matrix(SAID, AnswerList(("3",)))) == pytest.approx(0.3 / 5)
