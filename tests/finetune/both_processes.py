"""What two processes do together: the functions that bring them together, then whole runs; a program of its own.

    PYTHONPATH=.:tests python tests/finetune/both_processes.py FOLDER JOB.json

It forks both, with the variables that torchrun would set, once all libraries are loaded: torchrun's own start takes
longer than all the rest. JOB.json names the command lines: `runs` are run in both processes, `stopped` is stopped and
gone on with, `main` is run last, as a user runs it. What each process found lies in FOLDER in the end, and what it
printed of `main`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from stopped_runs import StopsAt
from torch import Tensor, nn
from two_processes import fork_both

import baseline
from guidance.arguments import parse_args
from training import devices, signals

SIZES = [1, 2, 3, 6, 7]  # of batches to gather; of the first the second process has no share


def coupled(size: int) -> tuple[Tensor, Callable[[Any], Tensor], Callable[[Tensor], Tensor]]:
    """A weight, predictions (b, 2) of some rows that depend on it, and a loss that is no sum over rows."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    factors = torch.randn(size, 2, generator=generator, dtype=torch.float64)
    return weight, lambda rows: torch.tanh(x[rows] @ weight), lambda whole: ((factors * whole).sum() + 1) ** 3


def module(seed: int) -> nn.Module:
    """Weights that depend on the seed, and buffers of two types that do too."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1).requires_grad_(False))
    model[1].running_mean.normal_()
    model[1].num_batches_tracked.fill_(7 + seed)
    return model


def bring_together(runtime: devices.Runtime, folder: Path) -> dict[str, Any]:
    """What this process gets of each function that processes meet in."""
    found: dict[str, Any] = {"rank": runtime.rank, "world": runtime.world, "gathered": [], "gradients": []}
    for size in SIZES:
        weight, predict, loss = coupled(size)
        whole = runtime.gather(predict(runtime.share(torch.arange(size).numpy())), size)
        loss(whole).backward()
        found["gathered"].append(whole.detach().clone())
        found["gradients"].append(weight.grad)
    found["agreed"] = runtime.agree({"rank": runtime.rank, "words": ["a"] * (1 + runtime.rank)})
    model = module(runtime.rank)
    runtime.copy_weights(model)
    found["copied"] = model.state_dict()
    with runtime.main_first():
        if runtime.is_main:
            time.sleep(0.5)
            (folder / "made").touch()
        found["found_it_made"] = (folder / "made").exists()
    return found


def main(folder: Path, job: dict[str, Any]) -> None:
    """See above."""
    runtime = devices.start_runtime("cpu", "off")
    torch.save(bring_together(runtime, folder), folder / f"rank{runtime.rank}.pt")
    for argv in job["runs"]:
        baseline.run(parse_args(argv))
    # Every tenth look both take together, so that 2 is a stop at the twentieth.
    for stop_signals, flags in ((StopsAt(2), []), (signals.NONE, ["--resume", "auto"])):
        try:
            baseline.run(parse_args([*job["stopped"], *flags]), stop_signals=stop_signals)
        except signals.Stopped:
            (folder / f"stopped{runtime.rank}").touch()
    with (folder / f"said{runtime.rank}.txt").open("w") as said, redirect_stdout(said):
        baseline.main(job["main"])


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[2]).read_text())
    raise SystemExit(fork_both(lambda rank: main(Path(sys.argv[1]), job)))
