"""`vqa/gqa_metrics.py` on questions small enough to be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from vqa_records import gqa_record as question

from vqa import gqa_metrics as gqa

VERIFY = {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}
QUESTIONS = {
    "q1": question("cup", entailed=["q1", "q2", "q3"]),
    "q2": question("yes", types=VERIFY, groups={"global": None, "local": "y"}, question="Is it red?"),
    "q3": question("no", types=VERIFY, groups={"global": None, "local": "y"}, entailed=["q1"]),
    "q4": question("plate"),
    "q5": question("fork", isBalanced=False),  # counts for nothing
    "q6": question("color", types={"structural": "compare", "semantic": "attr", "detailed": "twoCommon"}),
}
PREDICTIONS = {"q1": "cup", "q2": "yes", "q3": "yes", "q4": "cup", "q5": "fork", "q6": "shape"}
CHOICES = {name: {"valid": ["cup", "plate", "yes"], "plausible": ["cup"]} for name in QUESTIONS}


def test_measures_are_those_worked_out_by_hand():
    found = gqa.measures(QUESTIONS, PREDICTIONS, CHOICES)
    assert found == pytest.approx(
        {
            "accuracy": 2 / 5,  # q1, q2 of q1, q2, q3, q4, q6
            "binary": 1 / 3,  # q2 of q2, q3, q6
            "open": 1 / 2,
            "consistency": 1 / 2,  # q1 entails q2 (right) and q3 (wrong); q2 entails nothing, q3 is wrong itself
            "validity": 1.0,  # of q6 by what can be in common
            "plausibility": 3 / 5,
            # "thing": gold cup 1, plate 1, color 1; given cup 2, shape 1
            "distribution": ((2 - 1) ** 2 + 1 + 1) / 100,
        }
    )


def test_groups_weigh_by_their_size():
    questions = {
        "a": question("x", groups={"global": "one", "local": ""}),
        "b": question("y", groups={"global": "two", "local": ""}),
        "c": question("y", groups={"global": "two", "local": ""}),
    }
    given = {"a": "z", "b": "z", "c": "z"}
    assert gqa.distribution(questions, given) == pytest.approx((1 * 1 + 2 * 2) / 3 / 100)
    assert gqa.distribution(questions, {name: record["answer"] for name, record in questions.items()}) == 0


def test_what_cannot_be_measured_is_nan_and_left_out():
    only = {"q2": QUESTIONS["q2"]}
    found = gqa.measures(only, PREDICTIONS)
    assert math.isnan(found["open"]) and math.isnan(found["consistency"]) and math.isnan(found["distribution"])
    assert "validity" not in found and found["binary"] == 1
    with pytest.raises(KeyError, match="q2"):
        gqa.measures(only, {})


def test_accuracy_is_told_by_every_kind():
    found = gqa.accuracy_by_kind(QUESTIONS, PREDICTIONS)
    assert found["structural"] == {"compare": (0.0, 1), "query": (0.5, 2), "verify": (0.5, 2)}
    assert found["answer"] == {"binary": (pytest.approx(1 / 3), 3), "open": (0.5, 2)}
    assert found["steps"] == {"2": (pytest.approx(0.4), 5)}  # asking for the name is none
    assert found["words"] == {"3": (1.0, 1), "5": (0.25, 4)}


def grounding(weights: list[float], regions: list[list[float]], boxes: list[list[float]]) -> float:
    return float(np.array(weights) @ gqa.covered(np.array(regions), np.array(boxes).reshape(-1, 4)))


WHOLE, LEFT, TOP_LEFT = [0, 0, 1, 1], [0, 0, 0.5, 1], [0, 0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("weights", "regions", "boxes", "expected"),
    [
        ([1], [TOP_LEFT], [TOP_LEFT], 1),  # the very box
        ([1], [TOP_LEFT], [LEFT], 1),  # which lies in the box
        ([1], [LEFT], [TOP_LEFT], 0.5),  # half of which lies there
        ([1], [[0.5, 0, 1, 1]], [LEFT], 0),  # beside it
        ([1], [WHOLE], [TOP_LEFT, LEFT], 0.5),  # where two boxes overlap, once
        ([1], [WHOLE], [TOP_LEFT, [0.5, 0.5, 1, 1]], 0.5),
        ([0.75, 0.25], [TOP_LEFT, [0.6, 0.6, 1, 1]], [LEFT], 0.75),
        ([0.5, 0.25, 0.25], [WHOLE, LEFT, [0.5, 0, 1, 1]], [TOP_LEFT], 0.5 / 4 + 0.25 / 2),
        ([1], [[0.2, 0.2, 0.2, 0.4]], [WHOLE], 0),  # without area
        ([1], [WHOLE], [], 0),
        ([1], [WHOLE], [[0.3, 0.3, 0.3, 0.3]], 0),
        ([], [], [WHOLE], 0),
    ],
)
def test_grounding_is_the_attention_on_what_is_named(weights, regions, boxes, expected):
    assert grounding(weights, regions, boxes) == pytest.approx(expected)


def test_shares_are_those_of_counted_pixels():
    rng, side = np.random.default_rng(0), 12

    def corners(count: int) -> np.ndarray:
        return np.sort(rng.integers(0, side + 1, (count, 2, 2)), axis=1).reshape(count, 4)

    for _ in range(200):
        regions, boxes = corners(6), corners(int(rng.integers(0, 6)))
        painted = np.zeros((side, side), dtype=bool)
        for x1, y1, x2, y2 in boxes:
            painted[y1:y2, x1:x2] = True
        pixels = [painted[y1:y2, x1:x2] for x1, y1, x2, y2 in regions]
        expected = [part.mean() if part.size else 0.0 for part in pixels]
        np.testing.assert_allclose(gqa.covered(regions / side, boxes / side), expected, atol=1e-9)


def test_objects_are_those_that_question_and_full_answer_name_each_once():
    told = {"answer": {"0": "9"}, "question": {"1": "3", "4:6": "2"}, "fullAnswer": {"1": "2", "5": "7"}}
    assert gqa.named_objects({"annotations": told}) == ["3", "2", "7"]
    for hostile in ({}, {"annotations": None}, {"annotations": [1]}, {"annotations": {"question": [3]}}):
        assert gqa.named_objects(hostile) == []
    assert gqa.named_objects({"annotations": {"question": {"1": 3, "2": None}, "fullAnswer": {"x": "5"}}}) == ["5"]


def test_official_records_are_read(vqa_dir: Path):
    (name, record), *_ = json.loads((vqa_dir / "gqa" / "questions1.json").read_text()).items()
    questions = {name: {**record, "isBalanced": True}}
    kinds = gqa.accuracy_by_kind(questions, {name: record["answer"]})
    assert kinds["structural"] == {record["types"]["structural"]: (1.0, 1)}
    assert kinds["steps"] == {"5": (1.0, 1)}
    assert gqa.named_objects(record) == ["11", "4"]
