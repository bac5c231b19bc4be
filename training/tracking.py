"""Trackers: where the scalars of each epoch go beside metrics.csv. TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from storage.messages import one_line

TENSORBOARD_DIR = "tensorboard"
OF_SPEED = ("images_per_s", "data_wait", "seconds", "gpu_memory_gb")


class Tracker(Protocol):
    """One place that scalars go to."""

    failures: tuple[type[Exception], ...]  # what it raises when it cannot go on

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Take the scalars (by tag) of a step."""

    def close(self, *, failed: bool) -> None:
        """Finish."""


class TensorBoard:
    """Event files in the run folder."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        shutil.rmtree(folder / TENSORBOARD_DIR, ignore_errors=True)  # a run that goes on tells its epochs anew
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder / TENSORBOARD_DIR)
        rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        self.writer.add_text("settings", f"| option | value |\n|---|---|\n{rows}")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()  # a run that is being watched is why this is here

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self.writer.close()


class WeightsAndBiases:
    """A run at W&B, in the project of WANDB_PROJECT; offline if WANDB_MODE says so."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        self.failures: tuple[type[Exception], ...] = (wandb.Error,)
        try:
            self.run = wandb.init(name=folder.name, dir=str(folder), config=dict(settings))
        except self.failures as error:  # nobody is logged in, nobody answers
            raise ValueError(f"--tracker wandb: {one_line(error)}") from error

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self.run.log(dict(scalars), step=step)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run at MLFLOW_TRACKING_URI, in the experiment of MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.mlflow: Any = importlib.import_module("mlflow")
        self.failures: tuple[type[Exception], ...] = (self.mlflow.MlflowException,)
        try:
            self.mlflow.start_run(run_name=folder.name)
            self.mlflow.log_params(dict(settings))
        except self.failures as error:
            raise ValueError(f"--tracker mlflow: {one_line(error)}") from error

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self.mlflow.log_metrics({tag: float(value) for tag, value in scalars.items()}, step=step)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


KINDS: dict[str, type[TensorBoard] | type[WeightsAndBiases] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def check_installed(names: list[str]) -> None:
    """Raise ValueError for a tracker (of KINDS) that is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name, as W&B leaves, is no package
            flag = "--tensorboard" if name == "tensorboard" else f"--tracker {name}"
            raise ValueError(f"{flag}: {name} is not installed; pip install {name}, or drop the flag")


def names_of(tensorboard: bool, tracker: str | None) -> list[str]:
    """The trackers that --tensorboard and --tracker ask for."""
    return ["tensorboard"] * tensorboard + ([tracker] if tracker else [])


class Trackers:
    """All trackers that were asked for, which may be none, closed when the block is left.

    One that cannot go on is given up, aloud: a tracker must not cost a long training.

    Args:
        say: prints a line.
        history: rows of the epochs that are finished already, which are sent at once.

    Raises:
        ValueError: a tracker cannot be opened.
    """

    def __init__(
        self,
        names: list[str],
        folder: Path,
        settings: Mapping[str, Any],
        say: Callable[[str], object] = print,
        history: Iterable[Mapping[str, float]] = (),
    ) -> None:
        self.say = say
        self.trackers: list[Tracker] = []
        for name in names:
            try:
                self.trackers.append(KINDS[name](folder, settings))
            except ValueError:
                self.close(failed=True)
                raise
        for row in history:
            self.log(row, int(row["epoch"]))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Send a row of metrics.csv, or "test_..." scores, as the scalars of an epoch."""
        scalars = {tag_of(name): value for name, value in row.items() if name != "epoch"}
        self.each(lambda tracker: tracker.log(scalars, step))

    def close(self, *, failed: bool) -> None:
        """Close all."""
        self.each(lambda tracker: tracker.close(failed=failed))
        self.trackers.clear()

    def each(self, act: Callable[[Tracker], object]) -> None:
        """Do something with every tracker; those that fail are given up."""
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except tracker.failures as error:
                self.trackers.remove(tracker)
                self.say(f"note      {type(tracker).__name__} gets nothing more: {one_line(error)}")


def tag_of(name: str) -> str:
    """The column of a row as a tag in its section: "val_main" -> "val/main", "lr" -> "train/lr"."""
    for fold in ("val", "test"):
        if name.startswith(f"{fold}_"):
            return f"{fold}/{name.removeprefix(f'{fold}_')}"
    return f"{'speed' if name in OF_SPEED else 'train'}/{name}"
