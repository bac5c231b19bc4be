"""What stands for Weights & Biases and MLflow in tests. No tests: these import it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from training.tracking import TENSORBOARD_DIR

OUTCOMES = {"wandb": {True: 1, False: 0}, "mlflow": {True: "FAILED", False: "FINISHED"}}


class Service:
    """Stands for W&B and MLflow alike, and writes down what it is told."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[Any] = []
        self.refusal: Exception | None = None

    def start(self, **given: Any) -> Any:
        if self.refusal:
            raise self.refusal
        self.started.append(given)
        return SimpleNamespace(log=self.log, finish=lambda exit_code: self.ended.append(exit_code))

    def log(self, scalars: dict[str, float], step: int) -> None:
        assert all(isinstance(value, float) for value in scalars.values())
        self.logged.append((step, scalars))


class RefusedError(Exception):
    """What the services raise."""


def put_in_place(name: str, patch: pytest.MonkeyPatch) -> Service:
    """What stands for a tracker as long as the patch lasts."""
    told, module = Service(), ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="here")
    if name == "wandb":
        module.init, module.Error = told.start, RefusedError  # type: ignore[attr-defined]
    else:
        module.start_run, module.log_metrics = told.start, told.log  # type: ignore[attr-defined]
        module.log_params = lambda given: told.started[-1].update(config=given)  # type: ignore[attr-defined]
        module.end_run = told.ended.append  # type: ignore[attr-defined]
        module.MlflowException = RefusedError  # type: ignore[attr-defined]
    patch.setitem(sys.modules, name, module)
    return told


def events(folder: Path) -> Any:
    """What TensorBoard reads of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / TENSORBOARD_DIR))
    found.Reload()
    return found
