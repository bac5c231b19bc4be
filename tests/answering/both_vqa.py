"""Runs of main.py in two processes; a program of its own, since it forks.

    PYTHONPATH=.:tests:tests/finetune python tests/answering/both_vqa.py FOLDER JOB.json

It forks both, with the variables that torchrun would set, once all libraries are loaded. JOB.json names the command
lines: `runs` are run without dropout, of which each process would have its own; `whole` is run as it is, `stopped` is
stopped and gone on with; `main` is run last, as a user runs it. What each process printed of that lies in FOLDER in the
end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from small_vqa import trained_weights_kept
from stopped_runs import StopsAt
from timm.layers import DropPath
from torch import nn
from two_processes import fork_both

import main
from answering.configs import parse_args
from branches.bert import Heads
from branches.fusion import AnswerModel
from training import signals


@contextmanager
def without_dropout() -> Iterator[None]:
    """Let models be built that drop nothing out."""

    real = AnswerModel.build

    def build(**arguments: Any) -> AnswerModel:
        model = real(**arguments)
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
            if isinstance(layer, nn.MultiheadAttention | Heads):
                layer.dropout = 0.0
            if isinstance(layer, DropPath):
                layer.drop_prob = 0.0
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerModel, "build", build)
        yield


def run_all(rank: int, folder: Path, job: dict[str, Any]) -> None:
    """See above."""
    with trained_weights_kept():
        with without_dropout():
            for argv in job["runs"]:
                main.run(parse_args(argv))
        main.run(parse_args(job["whole"]))
        # Every tenth look both take together, so that 2 is a stop at the twentieth.
        resumed = ["--resume", job["stopped"][-1]]
        for stop_signals, argv in ((StopsAt(2), job["stopped"]), (signals.NONE, resumed)):
            try:
                main.run(parse_args(argv), stop_signals=stop_signals)
            except signals.Stopped:
                (folder / f"stopped{rank}").touch()
    with (folder / f"said{rank}.txt").open("w") as said, redirect_stdout(said):
        main.main(job["main"])


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[2]).read_text())
    raise SystemExit(fork_both(lambda rank: run_all(rank, Path(sys.argv[1]), job)))
