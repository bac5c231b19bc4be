"""`scores.py`: one name for each score, however it is asked for."""

from __future__ import annotations

import pytest

from evaluation import metrics
from sources import scores


def test_the_measures_are_those_that_are_computed():
    assert list(scores.MEASURES) == list(metrics.agreement([1.0, 2.0, 4.0, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]))


@pytest.mark.parametrize(
    ("task", "title", "columns", "stem", "stem_title"),
    [
        ("q", "quality", ("mos_quality", "pred_quality"), "quality", "quality"),
        ("c", "consistency", ("mos_align", "pred_align"), "align", "consistency"),
        ("beauty", "beauty", ("mos_beauty", "pred_beauty"), "beauty", "beauty"),
        ("mos_beauty", "mos_beauty", ("mos_beauty", "pred_beauty"), "beauty", "beauty"),
    ],
)
def test_every_score_has_its_names(task, title, columns, stem, stem_title):
    assert scores.title_of(task) == title and scores.columns_of(task) == columns
    assert scores.stem_of(task) == stem and scores.title_of_stem(stem) == stem_title


def test_scores_are_found_in_measures_the_two_first():
    assert scores.tasks_of(["loss", "srocc_b", "plcc_x", "srocc_c", "srocc_q", "main", "srocc_a"]) == list("qcba")
