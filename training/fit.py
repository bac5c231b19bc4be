"""The epochs of a run: train, validate, keep what is best, go on; and again where it was stopped.

What is trained, on what and by which measure is the program's: it comes as a `Task`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from training import checkpoints, devices, loop, resuming, run_folder, tracking


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How long and by which steps to train.

    Args:
        lr: peak learning rate, of which the history tells.
        accumulation: batches per optimiser step.
        select_by: the validation measure whose highest value picks the epoch to keep.
        patience, min_delta: see `resuming.should_stop`.
    """

    epochs: int
    lr: float
    select_by: str
    accumulation: int = 1
    max_grad_norm: float = 0.0
    patience: int = 0
    min_delta: float = 0.0


class Task(Protocol):
    """What a program trains, as `fit` asks for it."""

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""

    @property
    def may_leave_unused(self) -> bool:
        """Whether some trained parameters may get no gradient."""

    def enter_epoch(self, epoch: int, saver: resuming.Saver) -> bool:
        """Freeze and cache what is due in this epoch (from 1); whether other parameters are trained than before."""

    def batches(self, epoch: int, num_done: int) -> Iterable[Any]:
        """The batches of an epoch, without the first `num_done`."""

    def compute_losses(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Named losses of a whole batch, "loss" among them."""

    def validate(
        self, model: Any, before_batch: Callable[[], object]
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Scores of the validation fold, and named measures of them."""

    def weights(self, model: Any) -> Mapping[str, Tensor]:
        """What to keep of a model that is the best so far."""

    def epoch_line(self, row: Mapping[str, float]) -> str:
        """A row of the history in words."""


def fit(
    task: Task,
    options: FitOptions,
    saver: resuming.Saver,
    writer: run_folder.RunFolder,
    best_weights: checkpoints.DeferredWeights,
    trackers: tracking.Trackers,
    *,
    after_epoch: Callable[[Mapping[str, float]], object] = lambda row: None,
) -> None:
    """Train from where `saver.progress` stands to the last epoch, or until validation no longer rises.

    Args:
        saver, writer: hold what is trained and how far that is; take metrics.csv.
        best_weights: takes the weights of each epoch that is the best so far, from the untrained model on.
        after_epoch: is given each row of the history, in every process; what it raises stops the run.

    Raises:
        loop.NonFiniteLoss, micro_batches.OutOfMemory: see `loop.train_epoch`.
        signals.Stopped: a signal has stopped the run; its state is saved.
    """
    progress, state, runtime, trainee = saver.progress, saver.train_state, saver.runtime, None
    if progress.best_epoch is None:
        validate_untrained(task, options, saver, best_weights)
    while progress.epoch <= options.epochs and not stops_early(options, progress, runtime):
        if task.enter_epoch(progress.epoch, saver) or trainee is None:
            trainee = runtime.distribute(state.model, may_be_unused=task.may_leave_unused)
        with EpochBar(progress, task.num_samples, runtime, saver.check) as bar:
            progress.lr = progress.lr if progress.record.step else options.lr * state.lr_factor
            losses = loop.train_epoch(
                trainee,
                task.batches(progress.epoch, progress.record.step * options.accumulation),
                task.compute_losses,
                optimizer=state.optimizer,
                schedule=state.schedule,
                runtime=runtime,
                average=state.average,
                micro=state.micro,
                accumulation=options.accumulation,
                max_grad_norm=options.max_grad_norm,
                record=progress.record,
                samples_of=lambda batch: batch.rows,
                after_step=bar.after_step,
            )
        scores, measured = task.validate(state.average.weights, saver.check)
        measured = runtime.agree(measured)  # or processes might stop apart
        validated = {f"val_{name}": value for name, value in measured.items()}
        row = {"epoch": progress.epoch, **losses, **validated, "lr": progress.lr, **bar.timing()}
        writer.csv(run_folder.METRICS_FILE, pd.DataFrame([*progress.history, row]))  # without it, it is not over
        if progress.would_be_best(score := measured[options.select_by]) and runtime.is_main:
            best_weights.keep(task.weights(state.average.weights))
        progress.close_epoch(row, score, scores)
        trackers.log(row, len(progress.history))
        runtime.say(task.epoch_line(row))
        best_weights.flush_if_due()
        after_epoch(row)
        saver.check()
    task.enter_epoch(progress.epoch - 1, saver)  # where a run is gone on with behind its last epoch
    best_weights.flush()
    saver.is_over = True


def validate_untrained(
    task: Task, options: FitOptions, saver: resuming.Saver, best_weights: checkpoints.DeferredWeights
) -> None:
    """Take the model in as it is, as epoch 0: where no epoch beats it on validation, it is what is kept."""
    model = saver.train_state.average.weights
    with saver.interruptible():
        scores, measured = task.validate(model, lambda: None)
    if saver.runtime.is_main:
        best_weights.keep(task.weights(model))
    saver.progress.begin(saver.runtime.agree(measured)[options.select_by], scores)


def stops_early(options: FitOptions, progress: resuming.Progress, runtime: devices.Runtime) -> bool:
    """Whether the validation scores have stopped rising for as long as is allowed."""
    is_over = resuming.should_stop(progress.selection, patience=options.patience, min_delta=options.min_delta)
    if is_over:
        runtime.say(f"no gain in {options.patience} epochs: stopped early")
    return is_over


class EpochBar:
    """A bar on a terminal (nothing elsewhere) and the time of one epoch; `check` is called after every step."""

    def __init__(
        self, progress: resuming.Progress, num_samples: int, runtime: devices.Runtime, check: Callable[[], object]
    ) -> None:
        self.record = progress.record
        self.runtime = runtime
        self.check = check
        self.started = time.perf_counter() - self.record.seconds
        self.bar = tqdm(
            total=num_samples,
            initial=self.record.num_samples,
            unit="img",
            leave=False,
            disable=runtime.hide_progress,
        )

    def __enter__(self) -> EpochBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def after_step(self, num_samples: int) -> None:
        """Count the samples of a step."""
        self.bar.update(num_samples)
        self.check()

    def timing(self) -> dict[str, float]:
        """Training speed, seconds since the epoch began and, on a GPU, the most memory that the run has taken."""
        peak = self.runtime.peak_memory()
        return {
            "images_per_s": self.record.num_samples / max(self.record.seconds, 1e-9),
            "seconds": time.perf_counter() - self.started,
            **({"gpu_memory_gb": peak / 1e9} if peak else {}),
        }
