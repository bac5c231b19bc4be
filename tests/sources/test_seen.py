"""What a run has seen, as its folder tells."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from sources.seen import prompts_seen_by, seen_by


def run_that_saw(folder: Path, config: str = "{}", **folds: str) -> Path:
    """A run folder whose images, by content, were in these folds."""
    (folder / "best").mkdir(parents=True)
    rows = [(f"old{digest}", fold, digest) for fold, digests in folds.items() for digest in digests.split()]
    pd.DataFrame(rows, columns=["name", "split", "digest"]).to_csv(folder / "splits.csv", index=False)
    (folder / "config.json").write_text(config)
    return folder


def test_a_checkpoint_has_seen_what_its_run_has(tmp_path):
    run = run_that_saw(tmp_path / "run", train="3 5", val="7", test="8")
    (run / "best" / "scorer.json").write_text("{}")
    assert seen_by(run) == seen_by(run / "best") == {"3", "5", "7"}


def test_what_an_earlier_stage_has_seen_is_seen_too(tmp_path):
    first = run_that_saw(tmp_path / "first", train="1 2", val="3")
    second = run_that_saw(tmp_path / "second", json.dumps({"init_from": str(first / "best")}), train="4")
    assert seen_by(second / "best") == {"1", "2", "3", "4"}
    (first / "splits.csv").unlink()
    assert seen_by(second / "best") is None


def test_prompts_are_seen_in_training_and_validation_whatever_their_spelling(tmp_path):
    run = run_that_saw(tmp_path / "run")
    prompts = pd.DataFrame({"prompt": ["Thing  0", "thing 1", ""], "split": ["train", "test", "val"]})
    prompts.to_csv(run / "predictions.csv", index=False)
    assert prompts_seen_by(run / "best") == {"thing 0"}
