"""Runs of main.py in two processes: they compute what one process computes, and one of them speaks and writes."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from both_vqa import without_dropout
from conftest import ROOT
from small_vqa import NUM_TRAIN, ONE_GRAPH, differences, error_of, read, table, tiny_flags, trained_weights_kept
from small_xvlm import xvlm_flags
from stopped_runs import OF_TIME
from torch import Tensor
from two_processes import session

import main
from answering.configs import parse_args
from training import checkpoints, devices

pytestmark = pytest.mark.slow

LR = 3e-3
GRAPH = ["--branches", "fine,graph", "--sg_source", "gt", *ONE_GRAPH]
# Batches that leave a last one of a single question: one process has no share of it.
CASES = {
    "GQA": ("GQA", ["--use_counter", "--branches", "fine", "--sg_source", "gt", "--batch_size", str(NUM_TRAIN - 1)]),
    "VQA": ("VQA", ["--batch_size", "7", "--update_freq", "2", "--ema_decay", "0.5", "--loss", "ce"]),
    "graph": (
        "GQA",
        [*ONE_GRAPH, "--branches", "fine,graph", "--sg_source", "gt", "--sampler_type", "soft"],
    ),  # whose samples are no noise
    "clip": ("VQA", ["--features", "clip", "--clip_model", "tiny", "--shuffle_images", "--epochs", "1"]),
    "xvlm": ("GQA", ["--branches", "fine,coarse", *xvlm_flags("--xvlm_lr", "1e-3")]),
    "frozen": ("VQA", ["--branches", "fine,coarse", *xvlm_flags("--xvlm_lr", "0")]),
    "questions": ("GQA", ["--question_only", "--memory_efficient_attention"]),
}


@dataclass(frozen=True)
class Runs:
    """Runs of the same cases by one process and by two, and what was printed of one that each made as a user does."""

    folder: Path  # with "one-NAME" and "two-NAME"
    user: Path  # where that one was made
    said: tuple[str, str]  # of it, by both processes
    alone: str  # the same, by one process


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """All runs: two processes start once. Read them, do not change them."""
    place = tmp_path_factory.mktemp("distributed")
    lines = {name: tiny_flags("--lr", str(LR), *flags, form=form) for name, (form, flags) in CASES.items()}
    for name, argv in lines.items():
        with without_dropout(), trained_weights_kept():
            main.run(parse_args([*argv, "--output", str(place / f"one-{name}")]))
    as_user = [*lines["GQA"], "--use_report", "--epochs", "1"]
    with contextlib.redirect_stdout(io.StringIO()) as alone:
        main.run(parse_args([*as_user, "--output", str(place / "alone")]))
    job = {
        "runs": [[*argv, "--output", str(place / f"two-{name}")] for name, argv in lines.items()],
        "whole": tiny_flags("--output", str(place / "whole")),
        "stopped": tiny_flags("--output", str(place / "stopped")),
        "main": as_user,
    }
    (place / "job.json").write_text(json.dumps(job))
    (place / "user").mkdir()
    program = str(Path(__file__).with_name("both_vqa.py"))
    path = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'finetune'}"
    command = [sys.executable, program, str(place), str(place / "job.json")]
    with session(command, place / "user", PYTHONPATH=path) as started:
        _, err = started.communicate(timeout=300)
    assert started.returncode == 0, err
    said = [(place / f"said{rank}.txt").read_text() for rank in range(2)]
    return Runs(place, place / "user", (said[0], said[1]), alone.getvalue())


def told_by_gradients(folder: Path) -> dict[str, Tensor]:
    """A run's weights without the biases of attention, which softmax ignores: their gradients are rounding alone."""
    weights = checkpoints.load_weights(folder)[1]
    return {name: value for name, value in weights.items() if not name.endswith("attend.bias")}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_with_the_weights_of_one(name, runs):
    one, two = (told_by_gradients(runs.folder / f"{number}-{name}") for number in ("one", "two"))
    assert one.keys() == two.keys() and read(runs.folder / f"one-{name}" / "results.json")["best_epoch"] > 0
    difference = torch.cat([(two[key] - value).abs().flatten() for key, value in one.items()])
    # Adam makes a whole step of a gradient that is rounding: of a thousand weights a few differ by a part of one.
    assert (difference > LR / 100).float().mean() < 0.005 and difference.max() < LR


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_answer_as_one_does(name, runs):
    one, two = (runs.folder / f"{number}-{name}" for number in ("one", "two"))
    own, other = (pd.read_csv(folder / "metrics.csv").drop(columns=OF_TIME) for folder in (one, two))
    pd.testing.assert_frame_equal(other, own, rtol=1e-4)
    own, other = (table(folder / "predictions.csv") for folder in (one, two))
    assert other.drop(columns="probability").equals(own.drop(columns="probability"))
    chances = [found["probability"].astype(float) for found in (own, other)]
    np.testing.assert_allclose(chances[1], chances[0], rtol=1e-3)
    first, second = (read(folder / "results.json") for folder in (one, two))
    assert second["best_epoch"] == first["best_epoch"]
    assert second["measures"] == pytest.approx(first["measures"], rel=1e-4)
    assert (second["floors"], second["by_kind"]) == (first["floors"], first["by_kind"])
    examples = [[found["id"] for found in read(folder / "examples.json")] for folder in (one, two)]
    assert set(examples[0]) == set(examples[1])


def test_two_processes_that_are_stopped_go_on_as_if_they_had_not_been(runs):
    assert {path.name for path in runs.folder.glob("stopped?")} == {"stopped0", "stopped1"}
    assert len(read(runs.folder / "stopped" / "results.json")["resumed"]) == 1
    assert differences(runs.folder / "whole", runs.folder / "stopped") == []


def test_one_process_of_the_two_speaks_and_writes(runs):
    first_words = [[line.split()[0] for line in text.splitlines() if line] for text in (runs.said[0], runs.alone)]
    # Dropout is drawn anew by every process, so what is to be said of the results may differ.
    told = [[word for word in words if word != "diagnosis"] for words in first_words]
    assert told[0] == told[1]
    assert {"data", "machine", "epoch", "accuracy,", "run"} <= set(first_words[0])
    assert "machine   2 processes, " in runs.said[0] and runs.said[1] == ""
    (own,) = runs.user.iterdir()
    (folder,) = own.iterdir()
    assert own.name == "runs" and read(folder / "config.json")["provenance"]["resolved"]["processes"] == 2
    assert {path.name for path in folder.rglob("*")} == {path.name for path in (runs.folder / "alone").rglob("*")}


def test_batches_are_not_cut_in_several_processes(tmp_path, monkeypatch, capsys):
    argv = tiny_flags("--dynamic_batch_size", "--output", str(tmp_path / "run"))
    alone = devices.start_runtime("cpu", "off")
    monkeypatch.setattr(devices, "start_runtime", lambda *_: replace(alone, world=2))
    assert error_of(*argv, capsys=capsys).startswith("error: --dynamic_batch_size: works in one process only")
    assert not (tmp_path / "run").exists()
