"""`cli/memo.py`: what several runs of a process share is computed once, and told apart by what decides it."""

from __future__ import annotations

import pytest
from small_program import Baking

from cli.memo import NO_MEMO, DecidedBy, Memo


def test_a_value_is_computed_once_for_each_kind_and_key():
    memo, computed = Memo(), []

    def compute() -> list[str]:
        computed.append(1)
        return ["value"]

    first = memo.value("dough", (1, "a"), compute)
    assert memo.value("dough", (1, "a"), compute) is first
    assert memo.value("oven", (1, "a"), compute) is not first
    assert memo.value("dough", (2, "a"), compute) is not first
    assert len(computed) == 3


@pytest.mark.parametrize(("most", "expected"), [(1, [1, 2, 1, 3, 1, 2]), (2, [1, 2, 3, 2]), (3, [1, 2, 3])])
def test_the_values_that_were_asked_for_last_stay(most, expected):
    memo, computed = Memo(), []
    for key in (1, 2, 1, 3, 1, 2):
        memo.value("dough", key, lambda key=key: computed.append(key), most=most)
    assert computed == expected


def test_room_is_made_before_a_new_value_is_computed():
    memo = Memo()
    memo.value("dough", 1, lambda: "old")
    held = memo.value("dough", 2, lambda: dict(memo.kinds["dough"]))
    assert held == {}


def test_a_value_that_could_not_be_computed_is_not_kept():
    memo = Memo()
    with pytest.raises(ZeroDivisionError):
        memo.value("dough", 1, lambda: 1 / 0)
    assert memo.value("dough", 1, lambda: "now") == "now"


def test_a_run_by_itself_computes_everything_and_holds_on_to_nothing():
    first = NO_MEMO.value("dough", 1, object)
    assert NO_MEMO.value("dough", 1, object) is not first
    assert NO_MEMO.kinds == {}


def test_values_are_told_apart_by_the_options_that_decide_them():
    decided = DecidedBy(groups=("dough",), without=("loaf",), others=("minutes",))
    assert decided.names(Baking) == ["flour", "grams", "salt", "seeds", "minutes"]
    plain = decided.values(Baking())
    assert plain == ("wheat", 500, 0.02, False, None) == decided.values(Baking(loaf="a", fan=False))
    assert plain != decided.values(Baking(minutes=3)) and plain != decided.values(Baking(seeds=True))
