"""Agreement of runs on other data sets, on images that they have not seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import cross_dataset, metrics
from sources.scores import MEASURES
from sources.seen import seen_by

SIZE = 24
MOS = np.random.default_rng(0).uniform(1, 5, SIZE)


def labelled_set(**columns: Any) -> cross_dataset.LabelledSet:
    """A set of 24 images of 8 prompts by 3 generators; the content of image i is "i"."""
    usual = {
        "name": [f"{i}.png" for i in range(SIZE)],
        "prompt": [f"thing {i // 3}" for i in range(SIZE)],
        "reference": "",
        "group": [f"gen{i % 3}" for i in range(SIZE)],
        "q": MOS,
        "c": 6 - MOS,
    }
    return cross_dataset.LabelledSet("things", pd.DataFrame({**usual, **columns}), [str(i) for i in range(SIZE)])


class Model:
    """Scores with an error that the name decides, and keeps what it was given."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns  # instead of the usual scores
        self.names: list[str] = []

    def __call__(self, table: pd.DataFrame) -> pd.DataFrame:
        self.names = table["name"].tolist()
        numbers = [int(Path(name).stem) for name in self.names]
        error = np.random.default_rng(1).normal(size=SIZE)[numbers]
        usual = {"pred_quality": MOS[numbers] + error, "pred_align": 6 - MOS[numbers] - error}
        own = {name: np.asarray(values)[numbers] for name, values in self.columns.items()}
        return pd.DataFrame({**usual, **own})


@pytest.fixture
def run_that_saw(tmp_path) -> Callable[..., str]:
    """A function that makes a run folder whose images, by content, were in these folds."""

    def make(**folds: str) -> str:
        (tmp_path / "run" / "best").mkdir(parents=True)
        rows = [(f"old{digest}", fold, digest) for fold, digests in folds.items() for digest in digests.split()]
        pd.DataFrame(rows, columns=["name", "split", "digest"]).to_csv(tmp_path / "run" / "splits.csv", index=False)
        (tmp_path / "run" / "config.json").write_text("{}")
        return str(tmp_path / "run")

    return make


# -- what was seen


def test_images_of_the_training_and_validation_folds_are_left_out_by_their_content(run_that_saw):
    run = run_that_saw(train="3 5 99", val="7", test="8 9")
    model = Model()
    rows, lines = cross_dataset.evaluate(run, ["q"], labelled_set(), model)
    assert model.names == [f"{i}.png" for i in range(SIZE) if i not in (3, 5, 7)]
    assert [row["images"] for row in rows] == [SIZE - 3]
    assert lines[0] == f"note: 3 of {SIZE} images of things left out: {run} has seen them"


@pytest.mark.parametrize("change", ["absent", "without digests"])
def test_a_run_that_does_not_tell_what_it_has_seen_is_said_to(run_that_saw, change):
    run = Path(run_that_saw(train="3 5"))
    if change == "absent":
        (run / "splits.csv").unlink()
    else:
        pd.read_csv(run / "splits.csv")[["name", "split"]].to_csv(run / "splits.csv", index=False)
    assert seen_by(run) is None
    rows, lines = cross_dataset.evaluate(str(run), ["q"], labelled_set(), Model())
    assert rows[0]["images"] == SIZE
    assert lines[0].startswith(f"note: {run} does not tell which images it was trained on")


def test_where_nothing_was_seen_nothing_is_said(run_that_saw):
    _, lines = cross_dataset.evaluate(run_that_saw(train="99", test="1"), ["q"], labelled_set(), Model())
    assert not any(line.startswith("note") for line in lines)


def test_prompts_that_a_run_has_seen_are_counted(run_that_saw):
    run = run_that_saw()
    prompts = pd.DataFrame({"prompt": ["Thing  0", "thing 1", ""], "split": ["train", "test", "val"]})
    prompts.to_csv(Path(run) / "predictions.csv", index=False)
    _, lines = cross_dataset.evaluate(run, ["q"], labelled_set(), Model())
    (said,) = [line for line in lines if "share their prompt" in line]
    assert said.startswith(f"note: 3 of the {SIZE} others")


# -- what is measured


def test_a_row_for_each_score_holds_the_agreement_on_the_scores_given(run_that_saw):
    run = run_that_saw(train="0 1 2")
    rows, _ = cross_dataset.evaluate(run, ["q", "c"], labelled_set(), Model())
    assert [(row["run"], row["set"], row["score"], row["images"]) for row in rows] == (
        [(run, "things", "quality", SIZE - 3), (run, "things", "consistency", SIZE - 3)]
    )
    assert all(list(row) == cross_dataset.COLUMNS for row in rows)
    predicted = Model()(labelled_set().table)[3:]
    for row, mos, pred in zip(rows, (MOS[3:], 6 - MOS[3:]), predicted.to_numpy().T, strict=True):
        assert {name: row[name] for name in MEASURES} == pytest.approx(metrics.agreement(pred, mos))
        clusters = [i // 3 for i in range(3, SIZE)]
        assert (row["srocc_low"], row["srocc_high"]) == metrics.cluster_bootstrap(pred, mos, clusters)["srocc"]


def test_images_without_a_human_or_a_predicted_score_are_left_out_of_that_score(run_that_saw):
    human = np.where(np.arange(SIZE) < 4, np.nan, MOS)
    pred = np.where(np.arange(SIZE) % 5 == 0, np.nan, np.arange(SIZE))
    rows, _ = cross_dataset.evaluate(run_that_saw(), ["q", "c"], labelled_set(q=human), Model(pred_quality=pred))
    keep = (np.arange(SIZE) >= 4) & (np.arange(SIZE) % 5 != 0)
    assert [row["images"] for row in rows] == [keep.sum(), SIZE]
    assert {name: rows[0][name] for name in MEASURES} == pytest.approx(metrics.agreement(pred[keep], MOS[keep]))


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["gen a", "gen b", "gen c"]), min_size=SIZE, max_size=SIZE))
def test_the_generator_column_is_what_knowing_the_generator_alone_gives(tmp_path_factory, makers):
    run = str(tmp_path_factory.getbasetemp())
    rows, _ = cross_dataset.evaluate(run, ["q"], labelled_set(group=makers), Model())
    means = pd.Series(MOS).groupby(makers).transform("mean")
    assert rows[0]["generator_mean_srocc"] == pytest.approx(metrics.srocc(means, MOS), abs=1e-9)


def test_generators_that_decide_the_score_are_seen_to(run_that_saw):
    rows, lines = cross_dataset.evaluate(
        run_that_saw(), ["q"], labelled_set(q=[float(i % 3) for i in range(SIZE)]), Model(pred_quality=MOS)
    )
    assert rows[0]["generator_mean_srocc"] == pytest.approx(1)
    assert sum(line.startswith("gen") for line in lines) == 3 and lines[-1].startswith("SROCC of the generators' means")


def test_generators_of_few_images_are_no_floor():
    mos = np.arange(16.0)
    assert np.isnan(cross_dataset.generator_floor(mos, np.arange(16)))
    assert cross_dataset.generator_floor(mos, np.repeat(["a", "b"], 8)) > 0.8


def test_further_scores_go_by_their_column(run_that_saw):
    labelled = labelled_set(authenticity=MOS)
    rows, _ = cross_dataset.evaluate(run_that_saw(), ["q", "authenticity"], labelled, Model(pred_authenticity=-MOS))
    assert [row["score"] for row in rows] == ["quality", "authenticity"]
    assert rows[1]["srocc"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("columns", "seen"), [({"q": np.nan}, ""), ({"q": [1.0] + [np.nan] * 23}, ""), ({}, " ".join(map(str, range(24))))]
)
def test_a_set_without_unseen_scores_of_the_run_has_no_row_and_a_line_that_says_so(run_that_saw, columns, seen):
    run = run_that_saw(train=seen)
    rows, lines = cross_dataset.evaluate(run, ["q", "authenticity"], labelled_set(**columns), Model())
    assert rows == []
    assert lines[-1] == f"note: no unseen images of things with scores that {run} predicts (quality, authenticity)"


def test_the_table_has_a_line_for_each_row_with_its_numbers(run_that_saw):
    rows, _ = cross_dataset.evaluate(run_that_saw(), ["q", "c"], labelled_set(), Model())
    rows[1] |= {"srocc_low": np.nan, "srocc_high": np.nan}
    head, first, second, note = cross_dataset.table_lines(rows)
    assert head.split()[:5] == ["run", "set", "score", "images", "SROCC"] and note.startswith("generator: ")
    cells = first.split()
    numbers = [rows[0][name] for name in (*MEASURES, "srocc_low", "srocc_high", "generator_mean_srocc")]
    assert cells[1:4] == ["things", "quality", str(SIZE)]
    assert [float(cell) for cell in cells[4:] if cell != ".."] == pytest.approx(numbers, abs=6e-4)
    assert len(second.split()) == len(cells) - 3 and len(second) == len(first) == len(head)


def test_titles_stand_apart_over_short_names(run_that_saw):
    rows, _ = cross_dataset.evaluate(run_that_saw(), ["q"], labelled_set(), Model())
    head, line, _ = cross_dataset.table_lines([{**rows[0], "run": "r", "set": "s"}])
    assert head.split()[:4] == ["run", "set", "score", "images"]
    assert [head.index(title) for title in ("set", "score")] == [line.index(cell) for cell in ("s ", "quality")]
