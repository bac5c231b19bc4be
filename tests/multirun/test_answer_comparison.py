"""Pairs of runs of main.py: differences that are known, and what is refused. Run folders are written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import compare
from multirun import comparison
from multirun.answer_comparison import MIN_IMAGES

KINDS = ["query", "verify", "verify"]  # of the three questions about each image


def write_answers(folder: Path, *, images: int = 40, rate: float = 0.5, seed: int = 0, fold: str = "test") -> Path:
    """A finished run that answers so many of its questions rightly, those about one image mostly alike."""
    count, draw = 3 * images, np.random.default_rng(seed)
    right = np.repeat(draw.random(images) < rate, 3) ^ (draw.random(count) < 0.1)
    folder.mkdir(parents=True)
    table = pd.DataFrame(
        {
            "id": [f"{number:04}" for number in range(count)],
            "image": [f"{number // 3:03}" for number in range(count)],
            "question": [f"Is it {number}?" for number in range(count)],
            "answer": ["yes"] * count,
            "prediction": np.where(right, "yes", "no"),
            "probability": 0.5,
            "accuracy": right.astype(float),
            "structural_type": KINDS * images,
        }
    )
    table.to_csv(folder / "predictions.csv", index=False)
    (folder / "config.json").write_text("{}")
    (folder / "results.json").write_text(json.dumps({"program": "vqa", "fold": fold}))
    return folder


def edit(folder: Path, **columns: object) -> Path:
    """The same run with other columns."""
    path = folder / "predictions.csv"
    pd.read_csv(path, dtype={"id": str, "image": str}).assign(**columns).to_csv(path, index=False)
    return folder


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    """Two runs."""
    return [write_answers(tmp_path / "a", rate=0.4, seed=1), write_answers(tmp_path / "b", rate=0.7, seed=2)]


def refusal(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that compare.py refuses folders with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        compare.main([str(folder) for folder in folders])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said.removeprefix("error: ")


def naive_interval(apart: np.ndarray, images: np.ndarray, draws: int = 2000) -> np.ndarray:
    """By whole images, one draw after the other."""
    draw, names = np.random.default_rng(5), np.unique(images)
    parts = [apart[images == name] for name in names]
    means = [
        np.concatenate([parts[place] for place in draw.integers(len(parts), size=len(parts))]).mean()
        for _ in range(draws)
    ]
    return np.quantile(means, [0.025, 0.975])


def test_differences_are_paired_by_question_and_their_intervals_by_image(pair):
    found = comparison.compare_runs(pair)
    assert found["by"].tolist() == ["", "", *["structural"] * 4]
    assert found["kind"].tolist() == ["", "", "verify", "verify", "query", "query"]
    tables = [pd.read_csv(folder / "predictions.csv") for folder in pair]
    for start, chosen in ((0, slice(None)), (2, tables[0]["structural_type"] == "verify")):
        own = [table["accuracy"][chosen].to_numpy() for table in tables]
        row = found.iloc[start + 1]
        assert found["accuracy"][start : start + 2].tolist() == pytest.approx([values.mean() for values in own])
        assert row["questions"] == len(own[0]) and row["images"] == 40
        assert row["d_accuracy"] == pytest.approx((own[1] - own[0]).mean())
        ends = naive_interval(own[1] - own[0], tables[0]["image"][chosen].to_numpy())
        assert row[["accuracy_low", "accuracy_high"]].tolist() == pytest.approx(ends, abs=0.02)
    assert found["d_accuracy"][::2].isna().all()


def test_the_table_says_what_is_better(pair, capsys, tmp_path):
    compare.main([*map(str, pair), "--out", str(tmp_path / "table.csv")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["questions", "accuracy", "difference,", "95", "%", "interval"]
    assert lines[1].startswith("all questions") and lines[2].split()[0] == str(pair[1])
    assert lines[2].endswith(")  better") and lines[3].startswith("structural: verify")
    assert len(pd.read_csv(tmp_path / "table.csv")) == 6


def test_the_order_of_questions_does_not_matter_and_only_shared_ones_count(pair, capsys):
    whole = comparison.compare_runs(pair)
    path = pair[1] / "predictions.csv"
    table = pd.read_csv(path, dtype=str)
    table[::-1].to_csv(path, index=False)
    pd.testing.assert_frame_equal(comparison.compare_runs(pair), whole)
    table[:60].to_csv(path, index=False)
    assert comparison.compare_runs(pair)["questions"][0] == 60
    assert "compared on the 60 test questions that all have, of 120, 60" in capsys.readouterr().err


def test_few_images_are_said(tmp_path, capsys):
    for images in (MIN_IMAGES, MIN_IMAGES - 1):
        runs = [
            write_answers(tmp_path / f"{name}{images}", images=images, seed=number) for number, name in enumerate("ab")
        ]
        comparison.compare_runs(runs)
        assert ("too narrow" in capsys.readouterr().err) == (images < MIN_IMAGES)


def test_what_cannot_be_compared_is_refused_in_one_line(pair, tmp_path, capsys):
    other = edit(write_answers(tmp_path / "other"), id=[f"x{number}" for number in range(120)])
    assert "share no test question: they are of other data" in refusal([pair[0], other], capsys)
    changed = edit(write_answers(tmp_path / "changed"), answer="no")
    assert f"{changed}: its questions and answers are not those of {pair[0]}" in refusal([pair[0], changed], capsys)
    held = write_answers(tmp_path / "held", fold="val")
    assert "has no test answers, being a run with --no_test" in refusal([pair[0], held], capsys)
    scorer = tmp_path / "scorer"
    scorer.mkdir()
    (scorer / "predictions.csv").write_text("name,set,split,cluster\na.png,csv,test,1\n")
    for folders in ([pair[0], scorer], [scorer, pair[0]]):
        assert f"{pair[0]} is of main.py, {scorer} of baseline.py" in refusal(folders, capsys)
    (held / "results.json").unlink()
    assert "an unfinished run, results.json is missing" in refusal([pair[0], held], capsys)
    twice = edit(write_answers(tmp_path / "twice"), id="0001")
    assert "has a question twice" in refusal([pair[0], twice], capsys)
    bare = edit(write_answers(tmp_path / "bare"), accuracy="half")
    assert "an accuracy that is no number" in refusal([pair[0], bare], capsys)
