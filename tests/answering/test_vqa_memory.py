"""What trades time for memory changes nothing else: batches cut where memory runs out, layers computed again."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from both_vqa import without_dropout
from small_vqa import NUM_TRAIN, ONE_GRAPH, tiny_flags, trained_weights_kept
from small_xvlm import xvlm_flags
from stopped_runs import OF_TIME

import main
from answering.configs import parse_args
from answering.task import AnswerTask
from training import checkpoints

ALL = ["--branches", "fine,coarse,graph", "--sg_source", "gt", *ONE_GRAPH, "--sampler_type", "soft"]
ALL += [*xvlm_flags("--xvlm_lr", "1e-3"), "--epochs", "1", "--lr", "3e-3", "--clip_norm", "0.25"]
ROOM = 5  # questions


def train(folder: Path, *flags: str) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    """Weights and history of a run in which nothing is left to chance."""
    with without_dropout(), trained_weights_kept():
        main.run(parse_args([*tiny_flags(*ALL, *flags), "--output", str(folder)]))
    return checkpoints.load_weights(folder)[1], pd.read_csv(folder / "metrics.csv").drop(columns=OF_TIME)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("memory") / "whole")


def assert_alike(found, expected) -> None:
    """But for rounding, of which Adam makes whole steps where a gradient is nothing else."""
    pd.testing.assert_frame_equal(found[1], expected[1], rtol=1e-3)
    assert found[0].keys() == expected[0].keys()
    differences = torch.cat([(found[0][name] - value).abs().flatten() for name, value in expected[0].items()])
    assert (differences > 1e-4).float().mean() < 0.01 and differences.max() < 3e-3


def test_batches_that_do_not_fit_are_cut_and_train_as_whole_ones(whole, tmp_path, monkeypatch, capsys):
    compute, sizes = AnswerTask.compute_losses, []

    def forgetful(self, model, batch):
        if len(batch) > ROOM:
            raise torch.OutOfMemoryError(f"{len(batch)} questions")
        sizes.append(len(batch))
        return compute(self, model, batch)

    monkeypatch.setattr(AnswerTask, "compute_losses", forgetful)
    found = train(tmp_path / "cut", "--dynamic_batch_size")
    assert "note      out of memory: from here on 4 samples at once, steps stay as large" in capsys.readouterr().out
    assert sum(sizes) >= NUM_TRAIN and max(sizes) <= ROOM
    assert_alike(found, whole)


def test_layers_that_are_computed_again_train_as_those_that_are_kept(whole, tmp_path):
    assert_alike(train(tmp_path / "again", "--memory_efficient_attention"), whole)
