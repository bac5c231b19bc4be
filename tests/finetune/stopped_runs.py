"""Runs that are stopped wherever a test wants, and what differs between two finished ones; tests import it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import baseline
from guidance.arguments import parse_args
from training import checkpoints, signals

OF_TIME = ["images_per_s", "data_wait", "seconds"]
SMALL = ["--clip_model", "tiny", "--clip_pretrained", "none", "--image_size", "56", "--batch_size", "8", "--lr", "1e-3"]


def flags_of(demo_set: tuple[Path, Path], *flags: str) -> list[str]:
    """The command line of a small run, but for its folder; --use_test lets it look at the test fold."""
    data = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    return [*data, *SMALL, "--epochs", "3", "--no_report", "--no_test", *flags]


def unequal(a: Any, b: Any, name: str) -> list[str]:
    """Names of the JSON values that are not the same.

    What comes after the fitted logistic may differ in the seventh digit: LAPACK rounds by where arrays lie in memory.
    """
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in unequal(a[key], b[key], f"{name} {key}")]
    is_fitted = "plcc_fit" in name or "rmse" in name
    return [] if a == b or (is_fitted and a == pytest.approx(b, rel=1e-6)) else [name]


def differences(a: Path, b: Path) -> list[str]:
    """What is not the same to the bit in two finished runs, but for times; see `unequal`."""
    found = []
    weights = [checkpoints.load_weights(folder)[1] for folder in (a, b)]
    if weights[0].keys() != weights[1].keys():
        found.append("names of weights")
    found += [name for name in weights[0] if not torch.equal(weights[0][name], weights[1].get(name))]
    found += [] if (a / "splits.csv").read_bytes() == (b / "splits.csv").read_bytes() else ["splits.csv"]
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns=OF_TIME).to_dict() for folder in (a, b)]
    found += unequal(*tables, "metrics.csv")
    found += [] if (a / "predictions.csv").read_bytes() == (b / "predictions.csv").read_bytes() else ["predictions.csv"]
    results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    for of_process in ("seconds", "seconds_from_first_batch", "resumed", "diagnosis"):
        results[0].pop(of_process), results[1].pop(of_process)
    return found + unequal(*results, "results.json")


class StopsAt(signals.Signals):
    """Asks a run to stop when it looks for the n-th time whether it should; counts the looks."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.number = number
        self.looks = 0

    @property
    def asked(self) -> str:  # type: ignore[override]
        self.looks += 1
        return "SIGTERM" if self.looks == self.number else ""

    @asked.setter
    def asked(self, name: str) -> None:
        pass


def run_until(argv: list[str], folder: Path, number: int | None) -> int:
    """Run until the n-th look, or to the end; returns the number of looks."""
    stop_signals = StopsAt(number)
    config = parse_args([*argv, "--output_dir", str(folder)])
    if number is None:
        baseline.run(config, stop_signals=stop_signals)
    else:
        with pytest.raises(signals.Stopped, match=r"stopped and saved: --resume "):
            baseline.run(config, stop_signals=stop_signals)
    return stop_signals.looks


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until that is so, for at most so long."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
