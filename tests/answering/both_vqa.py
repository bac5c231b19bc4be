"""Runs of main.py in two processes; a program of its own, since it forks.

    PYTHONPATH=.:tests:tests/finetune python tests/answering/both_vqa.py FOLDER JOB.json

It forks both, with the variables that torchrun would set, once all libraries are loaded. JOB.json names the command
lines: `runs` are run without dropout, of which each process would have its own; `whole` is run as it is, `stopped` is
stopped and gone on with; `main` is run last, as a user runs it. What each process printed of that lies in FOLDER in the
end.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from small_vqa import trained_weights_kept
from stopped_runs import StopsAt
from torch import nn

import main
from answering import experiment
from answering.configs import parse_args
from branches.fine import FineBranch
from training import signals


@contextmanager
def without_dropout() -> Iterator[None]:
    """Let models be built that drop nothing out."""

    def build(**arguments: Any) -> FineBranch:
        model = FineBranch(**arguments)
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        return model

    experiment.FineBranch = build  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        experiment.FineBranch = FineBranch  # type: ignore[misc]


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


def fork_both(folder: Path, job: dict[str, Any]) -> int:
    """Run all of it in two processes; the exit code of the first one that has failed, or 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(2):
        if pid := os.fork():
            started.append(pid)
            continue
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
        code = 1
        try:
            run_all(rank, folder, job)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    return next(filter(None, (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started)), 0)


if __name__ == "__main__":
    raise SystemExit(fork_both(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())))
