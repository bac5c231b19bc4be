"""Comparisons of runs on predictions written by hand, of which it is known how far they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from scipy import stats

from evaluation import metrics
from multirun import comparison
from sources.scores import MEASURES

NUM_IMAGES = 60
PER_PROMPT = 3
MOS = np.random.default_rng(0).uniform(1, 5, NUM_IMAGES)
NAMES = [f"{i:03}.png" for i in range(NUM_IMAGES)]
PROMPTS = [i // PER_PROMPT for i in range(NUM_IMAGES)]


def noisy(spread: float, seed: int) -> np.ndarray:
    """Predictions with errors of this standard deviation, half of which an image shares with its prompt."""
    rng = np.random.default_rng(seed)
    of_prompt = np.repeat(rng.normal(size=NUM_IMAGES // PER_PROMPT), PER_PROMPT)
    return MOS + spread * (of_prompt + rng.normal(size=NUM_IMAGES)) / np.sqrt(2)


def table_of(pred: Sequence[float] | np.ndarray, **columns: Any) -> pd.DataFrame:
    """The test fold's part of a predictions.csv with quality only, as a run without prompts has it."""
    usual = {
        "name": NAMES,
        "set": "csv",
        "split": "test",
        "prompt": "",
        "generator": "",
        "cluster": PROMPTS,
        "mos_quality": MOS,
    }
    empty = {"mos_align": np.nan, "pred_align": np.nan}
    return pd.DataFrame({**usual, "pred_quality": pred, **empty, **columns})


@pytest.fixture
def run(tmp_path) -> Callable[..., str]:
    """A function that writes the folder of a finished run and returns its name."""

    def write(name: str, table: pd.DataFrame) -> str:
        # Images of the other folds, with scores that would ruin any comparison.
        trained = table.assign(split=["train", "val"] * (len(table) // 2) + ["train"] * (len(table) % 2))
        for column in table.columns[table.columns.str.startswith("pred_")]:
            trained[column] = -100 * trained[column]
        trained["name"] = "seen_" + trained["name"]
        (tmp_path / name).mkdir()
        pd.concat([trained, table]).to_csv(tmp_path / name / "predictions.csv", index=False, float_format="%.9g")
        (tmp_path / name / "config.json").write_text("{}")
        return str(tmp_path / name)

    return write


def compared(*runs: str) -> pd.DataFrame:
    return comparison.compare_runs([Path(run) for run in runs])


def row_of(found: pd.DataFrame, run: str, score: str = "quality") -> pd.Series:
    """The one row of a run and a score."""
    rows = found[(found["run"] == run) & (found["score"] == score)]
    assert len(rows) == 1
    return rows.iloc[0]


def expect(row: pd.Series, difference: dict[str, tuple[float, float, float]]) -> None:
    """The row's differences are those of `metrics.paired_bootstrap`."""
    for name, values in difference.items():
        assert row[[f"d_{name}", f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(values, abs=1e-6)


# -- single runs


def test_known_predictions_get_known_scores_and_the_sign_of_their_difference(run):
    right, wrong = run("right", table_of(MOS)), run("wrong", table_of(10 - MOS))
    found = compared(wrong, right)
    assert list(found.columns) == comparison.COLUMNS
    assert found[["srocc", "plcc"]].to_numpy() == pytest.approx(np.array([[-1, -1], [1, 1]]))
    assert found["images"].tolist() == [NUM_IMAGES] * 2
    assert row_of(found, wrong)[["d_srocc", "srocc_low", "plcc_high"]].isna().all()
    expect(row_of(found, right), {"srocc": (2, 2, 2), "plcc": (2, 2, 2)})
    assert comparison.table_lines(found)[2].endswith("1.000   1.000   +2.000 (+2.000 .. +2.000)  better")
    found = compared(right, wrong)
    expect(row_of(found, wrong), {"srocc": (-2, -2, -2), "plcc": (-2, -2, -2)})
    assert comparison.table_lines(found)[2].endswith("worse")


def test_spearmans_formula_gives_the_srocc(run):
    """1 - 6 * (1 + 1 + 1 + 1) / (5 * 24)."""
    small = table_of(np.zeros(NUM_IMAGES)).head(5).assign(mos_quality=[1, 2, 3, 4, 5])
    swapped = run("swapped", small.assign(pred_quality=[2.0, 1.0, 3.0, 5.0, 4.0]))
    found = compared(swapped, run("right", small.assign(pred_quality=[1.0, 2.0, 3.0, 4.0, 5.0])))
    assert row_of(found, swapped)["srocc"] == pytest.approx(0.8)


def test_better_worse_and_equal_runs_are_told_apart(run):
    first, same = run("first", table_of(noisy(0.8, 1))), run("same", table_of(noisy(0.8, 1)))
    better, worse = run("better", table_of(noisy(0.2, 2))), run("worse", table_of(noisy(4, 3)))
    alike = run("alike", table_of(2 * MOS - noisy(0.8, 1)))  # errors of the same sizes
    found = compared(first, better, worse, same, alike)
    assert found["run"].tolist() == [first, better, worse, same, alike]
    said = [re.split("  +", line)[-1] for line in comparison.table_lines(found)[2:]]
    assert said == ["better", "worse", "not told apart", "not told apart"]
    expect(row_of(found, same), {"srocc": (0, 0, 0), "plcc": (0, 0, 0)})
    assert row_of(found, alike)["srocc_low"] < 0 < row_of(found, alike)["srocc_high"]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.2, "better"),
        (-0.2, -0.1, "worse"),
        *((a, b, "not told apart") for a, b in [(-0.1, 0.1), (0, 1), (-1, 0)]),
    ],
)
def test_an_interval_tells_apart_unless_it_holds_0(low, high, said):
    assert comparison.verdict(low, high) == said


def test_intervals_are_those_of_the_paired_bootstrap_over_prompts(run):
    one, other = noisy(1.0, 1), noisy(0.8, 2)
    found = compared(run("one", table_of(one)), run("other", table_of(other)))
    expect(found.iloc[1], metrics.paired_bootstrap(one, other, MOS, PROMPTS))
    by_image = metrics.paired_bootstrap(one, other, MOS, range(NUM_IMAGES))
    assert found.iloc[1][["srocc_low", "srocc_high"]].tolist() != pytest.approx(by_image["srocc"][1:], abs=0.005)


def test_only_test_images_that_all_runs_share_are_compared(run):
    one, other, third = noisy(1.0, 1), noisy(0.8, 2), noisy(0.6, 3)
    names = [
        run("one", table_of(one)[:40]),
        run("other", table_of(other)[10:].iloc[::-1]),  # in another order
        run("third", table_of(third)[6:30]),
    ]
    found = compared(*names)
    assert found["images"].tolist() == [20, 20, 20]
    for name, pred in zip(names, (one, other, third), strict=True):
        row = row_of(found, name)
        assert row["srocc"] == pytest.approx(stats.spearmanr(pred[10:30], MOS[10:30])[0])
        assert row["plcc"] == pytest.approx(stats.pearsonr(pred[10:30], MOS[10:30])[0])
        if name != names[0]:
            expect(row, metrics.paired_bootstrap(one[10:30], pred[10:30], MOS[10:30], PROMPTS[10:30]))


def test_images_without_a_score_on_either_side_are_left_out_of_that_score_alone(run):
    one, other = noisy(1.0, 1), noisy(0.8, 2)
    human = np.where(np.arange(NUM_IMAGES) < 9, np.nan, MOS)
    align = {"mos_align": 6 - MOS, "pred_align": np.where(np.arange(NUM_IMAGES) % 7 == 0, np.nan, 6 - other)}
    found = compared(
        run("one", table_of(one, mos_quality=human, mos_align=6 - MOS, pred_align=6 - one)),
        run("other", table_of(other, mos_quality=human, **align)),
    )
    assert found["score"].tolist() == ["quality", "quality", "align", "align"]
    assert found["images"].tolist() == [51, 51, 51, 51]
    expect(found.iloc[1], metrics.paired_bootstrap(one[9:], other[9:], MOS[9:], PROMPTS[9:]))
    keep = np.arange(NUM_IMAGES) % 7 != 0
    expect(found.iloc[3], metrics.paired_bootstrap(one[keep], other[keep], MOS[keep], np.array(PROMPTS)[keep].tolist()))


def test_further_scores_are_compared_where_all_runs_have_them(run):
    further = {"mos_authenticity": MOS, "pred_authenticity": noisy(0.1, 5)}
    one, other = run("one", table_of(MOS, **further)), run("other", table_of(MOS, **further))
    found = compared(one, other)
    assert found["score"].tolist() == ["quality"] * 2 + ["authenticity"] * 2
    assert any(re.match(rf"authenticity +{one} ", line) for line in comparison.table_lines(found))
    without = run("without", table_of(MOS))
    assert set(compared(one, other, without)["score"]) == {"quality"}
    no_human = run("no human", table_of(MOS, pred_authenticity=MOS))
    assert set(compared(one, no_human)["score"]) == {"quality"}


def test_names_that_look_like_numbers_or_missing_values_are_names(run):
    table = table_of(MOS).head(4).assign(name=["001", "1", "NA", "null"])
    found = compared(run("one", table), run("other", table.iloc[:3]))
    assert found["images"].tolist() == [3, 3]


def test_images_of_a_single_prompt_are_scored_but_have_no_interval(run):
    found = compared(*(run(name, table_of(MOS, cluster=0)) for name in ("one", "other")))
    assert found["srocc"].tolist() == pytest.approx([1, 1]) and found["srocc_low"].isna().all()
    assert "told apart" not in "".join(comparison.table_lines(found))


@settings(max_examples=20)
@given(st.lists(st.tuples(*[st.integers(1, 50)] * 3), min_size=6, max_size=20))
def test_exchanging_two_runs_mirrors_the_difference(rows):
    mos, one, other = np.array(rows, dtype=float).T
    there, back = (metrics.paired_bootstrap(*pair, mos, range(len(mos))) for pair in ((one, other), (other, one)))
    forward, backward = comparison.differences(there), comparison.differences(back)
    for name in ("srocc", "plcc"):
        ends = backward[f"d_{name}"], backward[f"{name}_high"], backward[f"{name}_low"]
        assert [forward[f"d_{name}"], forward[f"{name}_low"], forward[f"{name}_high"]] == (
            pytest.approx([-end for end in ends], abs=1e-12)
        )


def test_the_lines_hold_the_numbers(run):
    found = compared(run("one", table_of(noisy(1, 1))), run("other", table_of(noisy(0.5, 2))))
    lines = comparison.table_lines(found)
    for line, (_, row) in zip(lines[1:], found.iterrows(), strict=True):
        shown = [float(text) for text in re.findall(r"[+-]?\d\.\d{3}", line)]
        expected = row[["srocc", "plcc", "d_srocc", "srocc_low", "srocc_high"]].dropna().tolist()
        assert shown == pytest.approx(expected, abs=6e-4) and f" {NUM_IMAGES} " in line


def test_joined_sets_are_compared_each_by_itself(run):
    """Together they would show a difference that neither has: the sets' means differ."""
    table = table_of(MOS)
    half = len(table) // 2
    joined = table.assign(set=["x"] * half + ["y"] * (len(table) - half))
    found = compared(run("one", joined), run("other", joined))
    assert found["set"].tolist() == ["x", "x", "y", "y"] and found["images"].sum() == 2 * len(table)
    for title, part in joined.groupby("set"):
        expected = metrics.srocc(part["pred_quality"], part["mos_quality"])
        assert found[found["set"] == title]["srocc"].tolist() == pytest.approx([expected] * 2)
    assert any(line.startswith("x quality") for line in comparison.table_lines(found))


# -- what cannot be compared


def test_other_human_scores_are_refused(run):
    moved = np.where(np.arange(NUM_IMAGES) == 7, 3.33, MOS)
    one, other = run("one", table_of(MOS)), run("other", table_of(MOS, mos_quality=moved))
    assert f"{other}: its human scores of quality are not those of {one}" in refusal(compared, one, other)


def test_runs_without_common_test_images_or_scores_are_refused(run):
    one, other = run("one", table_of(MOS)[:30]), run("other", table_of(MOS)[29:])
    assert "share 1 test image(s)" in refusal(compared, one, other)
    align = table_of(MOS).assign(mos_align=MOS, pred_align=MOS, mos_quality=np.nan, pred_quality=np.nan)
    assert "share 30 test image(s) and 0 score(s)" in refusal(compared, one, run("align", align))


def test_a_run_that_left_its_test_fold_unread_is_refused_by_name(run, tmp_path):
    scored, unread = run("scored", table_of(MOS)), run("unread", table_of(MOS))
    table = pd.read_csv(tmp_path / "unread" / "predictions.csv")
    table[table["split"] != "test"].to_csv(tmp_path / "unread" / "predictions.csv", index=False)
    for folders in ((scored, unread), (unread, scored), (unread, unread)):
        message = f"{unread}: has no test scores, being a run with --no_test; run it again without"
        assert refusal(compared, *folders) == message


def test_unfinished_runs_and_other_folders_are_refused_by_name(run, tmp_path):
    one = run("one", table_of(MOS))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    assert f"{tmp_path / 'begun'}: an unfinished run, predictions.csv is missing" in refusal(
        compared, one, str(tmp_path / "begun")
    )
    assert f"{tmp_path}: no run folder, predictions.csv is missing" in refusal(compared, one, str(tmp_path))
    assert "no such: no run folder" in refusal(compared, one, str(tmp_path / "no such"))


@pytest.mark.parametrize("column", ["name", "set", "split", "cluster"])
def test_a_table_of_an_older_version_is_refused_with_what_it_lacks(run, column):
    one = run("one", table_of(MOS))
    path = Path(run("old", table_of(MOS))) / "predictions.csv"
    pd.read_csv(path).drop(columns=column).to_csv(path, index=False)
    assert f"{path}: no column {column!r}; run it again" in refusal(compared, one, str(path.parent))


@pytest.mark.parametrize("content", [b"", b'name,split\n"', b"\xff\xfe\x00"])
def test_a_damaged_table_is_refused_by_name(run, content):
    one = run("one", table_of(MOS))
    path = Path(run("damaged", table_of(MOS))) / "predictions.csv"
    path.write_bytes(content)
    assert str(path) in refusal(compared, one, str(path.parent))


# -- repeated runs

IMAGES = {"train": 48, "val": 4, "test": 12}  # a quarter


@pytest.fixture
def repeated(tmp_path) -> Callable[..., str]:
    """A function that writes the folder of repeated runs with these SROCC; every PLCC is 0.1 below."""

    def write(name: str, *, runs: Sequence[str] = ("seed1", "seed2", "seed3"), images: Any = IMAGES, **of_task) -> str:
        of_all = {"mean": 0.0, "sd": 0.0, "median": 0.0, "interval": None}
        test = {}
        for task, values in of_task.items():
            own = [*values][: len(runs)]
            test |= {f"{name}_{task}": {**of_all, "values": own} for name in MEASURES}
            test[f"plcc_{task}"] = {**of_all, "values": [value - 0.1 for value in own]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "protocol.json").write_text("{}")
        summary = {
            "runs": list(runs),
            "images": images,
            "tests": [f"{run} {images}" for run in runs],
            "share": images["test"] / images["train"],
            "test": {**test, "main": {**of_all, "values": [0.0] * len(runs)}},
            "floors": {},
            "over": {},
        }
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        return str(tmp_path / name)

    return write


def repeats_compared(*folders: str) -> pd.DataFrame:
    return comparison.compare_protocols([Path(folder) for folder in folders])


def test_repeated_runs_are_paired_by_split(repeated):
    """Splits differ far more than the runs on one split do."""
    one = repeated("one", q=[0.2, 0.5, 0.8])
    other = repeated("other", q=[0.21, 0.52, 0.83])
    found = repeats_compared(one, other)
    half = stats.t.ppf(0.975, 2) * 0.01 * np.sqrt(1 / 3 + 1 / 4)
    row = row_of(found, other)
    assert row[["srocc", "plcc", "images"]].tolist() == pytest.approx([0.52, 0.42, 12])
    expect(row, dict.fromkeys(("srocc", "plcc"), (0.02, 0.02 - half, 0.02 + half)))
    assert comparison.table_lines(found)[-1].endswith("not told apart")
    by_a_hair, mixed_up = repeated("by a hair", q=[0.21, 0.51, 0.811]), repeated("mixed up", q=[0.52, 0.83, 0.21])
    for pair, said in ((one, by_a_hair), "better"), ((by_a_hair, one), "worse"), ((one, mixed_up), "not told apart"):
        assert comparison.table_lines(repeats_compared(*pair))[-1].endswith(said)


def test_repeated_runs_are_compared_on_the_scores_that_all_have(repeated):
    both, quality = repeated("both", q=[0.1, 0.2, 0.3], c=[0.4, 0.5, 0.6]), repeated("quality", q=[0.1, 0.2, 0.3])
    assert repeats_compared(both, both)["score"].tolist() == ["quality", "quality", "align", "align"]
    for pair in (both, quality), (quality, both):
        assert repeats_compared(*pair)["score"].tolist() == ["quality", "quality"]
    consistency = repeated("consistency", c=[0.1, 0.2, 0.3])
    assert "share no score" in refusal(repeats_compared, quality, consistency)


@pytest.mark.parametrize(
    "change",
    [{"runs": ["seed1", "seed2", "seed4"]}, {"runs": ["seed1", "seed2"]}, {"images": {**IMAGES, "test": 16}}],
)
def test_repeated_runs_on_other_splits_are_refused(repeated, change):
    one = repeated("one", q=[0.1, 0.2, 0.3])
    other = repeated("other", q=[0.1, 0.2, 0.3], **change)
    said = refusal(repeats_compared, one, other)
    assert f"{other}: has other seeds, folds, images or scores than {one}" in said


def test_unfinished_repeated_runs_are_refused(repeated):
    one, other = repeated("one", q=[0.1, 0.2, 0.3]), repeated("other", q=[0.1, 0.2, 0.3])
    (Path(other) / "summary.json").write_text("{")
    assert f"{Path(other) / 'summary.json'}: cannot be read" in refusal(repeats_compared, one, other)
    (Path(other) / "summary.json").unlink()
    assert f"{other}: no finished repeated runs" in refusal(repeats_compared, one, other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runs": []}, "'runs' is no list of any"),
        ({"test": {"srocc_q": 1}}, "'test.srocc_q' is no object"),
        ({"images": {"train": 48}}, "'images' has no 'test'"),
        ({"share": "a quarter"}, "'share' is no number"),
        ({"runs": ["seed1"], "tests": ["x"]}, "'test.srocc_q.values' are not as many as the runs"),
    ],
)
def test_a_summary_of_another_shape_is_refused_by_name(repeated, change, said):
    one, other = repeated("one", q=[0.1, 0.2, 0.3]), repeated("other", q=[0.1, 0.2, 0.3])
    path = Path(other) / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert f"{path}: {said}: it was made by another version" in refusal(repeats_compared, one, other)
    path.write_text("1")
    assert f"{path}: cannot be read (is not a JSON object)" in refusal(repeats_compared, one, other)
