"""Split files: folds that runs share."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tiny_run import TINY, data_flags

import baseline
import data
from finetune import run_files
from guidance.arguments import parse_args
from storage import tables


def test_runs_that_share_a_new_split_file_have_its_folds_or_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "folds.csv"
    mine = pd.DataFrame({"name": ["NA", "01"], "split": ["train", "test"]})
    monkeypatch.setattr(Path, "exists", lambda self: False)  # it comes after that was asked
    for _ in range(2):
        run_files.keep_splits(path, mine, is_drawn=True)
    others = mine.assign(split=["test", "train"])
    run_files.keep_splits(path, others, is_drawn=False)  # as the data set says, whatever it holds
    with pytest.raises(ValueError, match="another run has just written other folds there"):
        run_files.keep_splits(path, others, is_drawn=True)
    assert tables.read_csv(path, dtype=str, keep_default_na=False).equals(mine)
    assert [file.name for file in tmp_path.iterdir()] == ["folds.csv"]


def test_a_split_file_that_one_run_writes_gives_another_seed_the_same_folds(demo_set, tmp_path):
    path = tmp_path / "splits" / "fixed.csv"
    path.parent.mkdir()
    argv = [*data_flags(demo_set), *TINY, "--no_report", "--split_file", str(path)]
    for seed in (5, 6):
        baseline.main([*argv, "--seed", str(seed), "--output_dir", str(tmp_path / str(seed))])
    first, second = (pd.read_csv(tmp_path / seed / "splits.csv") for seed in ("5", "6"))
    assert first.equals(second)
    assert pd.read_csv(path).equals(first[["name", "split"]])
    drawn = data.read_examples(parse_args([*data_flags(demo_set), "--seed", "6"])).folds
    assert drawn.tolist() != second["split"].tolist()
