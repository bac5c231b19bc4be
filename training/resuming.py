"""How far a run has come, and what it needs to go on from there as if nothing had happened.

A state is taken between two optimiser steps: weights, their average, optimiser, schedule, loss scaler, the generators
of random numbers of every process, the record of the epoch so far, the history of the epochs before it and what is best
of them and of the untrained model. Which batches are left in the epoch follows from the number of its steps.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage import tensors
from training import checkpoints, devices, loop, micro_batches, optim, signals

FAILURES = (OSError, loop.NonFiniteLoss, micro_batches.OutOfMemory, torch.OutOfMemoryError)
NOTHING, SAVE, STOP = range(3)  # what a process wishes for; the highest wish counts
CHECK_EVERY = 10  # calls, where several processes have to agree on whether to save


def should_stop(scores: Sequence[float], *, patience: int, min_delta: float) -> bool:
    """Whether the last `patience` epochs brought no gain on the best before them; 0 never stops.

    The scores are those of `Progress.selection`.

    A gain is a rise, and of no less than `min_delta`.
    """
    if patience == 0 or len(scores) <= patience:
        return False
    rise = max(scores[-patience:]) - max(scores[:-patience])
    return rise <= 0 or rise < min_delta


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 1  # that is being trained, or comes next
    lr: float = 0.0  # at its first step
    history: list[dict[str, float]] = field(default_factory=list)  # a row for each finished epoch
    selection: list[float] = field(default_factory=list)  # the score to choose by: untrained, then after each epoch
    best_scores: dict[str, np.ndarray] = field(default_factory=dict)  # of the best epoch on the validation fold
    seconds: float = 0.0  # that the run took before this process
    resumed: list[dict[str, int]] = field(default_factory=list)  # where it was gone on with
    record: loop.EpochRecord = field(default_factory=loop.EpochRecord)

    @property
    def best_epoch(self) -> int | None:
        """The epoch to keep, the first of those with the highest score; 0: none has beaten the untrained model.

        None before `begin`.
        """
        return int(np.argmax(self.selection)) if self.selection else None

    def begin(self, score: float, scores: dict[str, np.ndarray]) -> None:
        """Take in the untrained model, which is what to keep until an epoch is better, as `close_epoch` does those."""
        self.selection.append(score)
        self.best_scores = scores

    def close_epoch(self, row: dict[str, float], score: float, scores: dict[str, np.ndarray]) -> None:
        """Take in the finished epoch: its row, the score to select by, and the scores of the validation fold."""
        self.history.append(row)
        self.selection.append(score)
        if self.best_epoch == self.epoch:
            self.best_scores = scores
        self.epoch += 1
        self.record = loop.EpochRecord()

    def would_be_best(self, score: float) -> bool:
        """Whether the present epoch would be the one to keep with this score to select by."""
        return score > max(self.selection)

    def state_dict(self) -> dict[str, Any]:
        """All of it. Raises NonFiniteLoss for a step that has not been looked at yet."""
        return {**vars(self), "record": self.record.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the progress whose `state_dict` this is."""
        vars(self).update({**state, "record": self.record})
        self.record.load_state_dict(state["record"])


def failure(
    error: loop.NonFiniteLoss, progress: Progress, samples: Mapping[str, Sequence[str]], program: str, folder: Path
) -> dict[str, Any]:
    """What failure.json holds: what broke training, and how to see it again.

    Args:
        samples: what they are called -> names of those of the step.
        program: the command that is run again.
    """
    return {
        "error": str(error),
        "metric": error.metric,
        "value": str(error.value),
        "epoch": progress.epoch,
        "step": error.step,
        **samples,
        "repeat": f"{program} --resume {shlex.quote(str(folder))}",
    }


@dataclass
class TrainState:
    """What training changes.

    `constant` names the parameters that it does not: they are told by their digest only.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    average: optim.WeightAverage
    micro: micro_batches.MicroBatches
    scaler: torch.amp.GradScaler
    constant: Collection[str]

    @property
    def lr_factor(self) -> float:
        """The learning rate now, as a share of its peak."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group["initial_lr"]

    def changing(self, module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """The weights of the model, or of its average, that may change."""
        constant = {prefix + name for name in self.constant}
        return {name: value for name, value in module.state_dict().items() if name not in constant}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights that never change."""
        state = self.model.state_dict()
        return tensors.digest_of({name: state[name].cpu().contiguous() for name in self.constant})

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        average = self.average.averaged
        return {
            "model": self.changing(self.model),
            "constant": self.digest,
            "average": None if average is None else self.changing(average, "module."),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "micro": [self.micro.size, self.micro.probed],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as what this is the `state_dict` of. Raises ValueError if it belongs to other weights."""
        if state["constant"] != self.digest:
            raise ValueError("--resume: the weights that training starts from have changed since; restore them")
        load_into(self.model, state["model"])
        if self.average.averaged is not None:
            load_into(self.average.averaged, state["average"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.schedule.load_state_dict(dict(state["schedule"]))
        self.scaler.load_state_dict(dict(state["scaler"]))
        self.micro.size, self.micro.probed = state["micro"]


def load_into(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set some of a module's weights. Raises ValueError if it has others."""
    try:
        unknown = module.load_state_dict(dict(weights), strict=False).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"--resume: the saved state is of another model ({str(error).splitlines()[-1]})") from error
    if unknown:
        raise ValueError(f"--resume: the saved state is of another model ({unknown[0]} is not in this one)")


class Saver:
    """Saves a run's state now and then, and when a signal asks the run to stop.

    Args:
        states: where to.
        steps_per_epoch: optimiser steps.
        every_seconds: the time between two states; 0 saves only when asked to stop, or on an error.
        stop_signals: the signals.
        before: is called before each state, to write the best weights.
        dropped: rows that are left out since their images were lost.
        tell: is called with an error after whose state is saved.
        started: the clock (`time.perf_counter`) when this process's part of the run began.
    """

    def __init__(
        self,
        states: checkpoints.StateFolder,
        progress: Progress,
        train_state: TrainState,
        runtime: devices.Runtime,
        *,
        steps_per_epoch: int,
        every_seconds: float,
        stop_signals: signals.Signals,
        before: Callable[[], object],
        dropped: set[int],
        tell: Callable[[Exception], object],
        started: float,
    ) -> None:
        self.states = states
        self.progress = progress
        self.train_state = train_state
        self.runtime = runtime
        self.steps_per_epoch = steps_per_epoch
        self.every_seconds = every_seconds
        self.stop_signals = stop_signals
        self.before = before
        self.dropped = dropped
        self.tell = tell
        self.started = started
        self.since = time.perf_counter()
        self.num_checks = 0
        self.is_over = False  # training is, and the weights may be others now

    def load(self) -> bool:
        """Go on from the newest state, if there is one. Raises ValueError if it is of something else."""
        state = self.states.load(self.runtime.say, active=self.runtime.is_main)
        if state is None:
            return False
        if len(state["random"]) != self.runtime.world:
            raise ValueError(f"--resume: was saved by {len(state['random'])} process(es), go on with as many")
        try:
            self.progress.load_state_dict(state["course"])
            self.dropped.update(state["dropped"])
            if state["trained"] is not None:
                self.train_state.load_state_dict(state["trained"])
            devices.set_random_state(state["random"][self.runtime.rank], self.runtime)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"--resume: the saved state is of another version of this program ({error!r})") from error
        self.progress.resumed.append({"epoch": self.progress.epoch, "step": self.progress.record.step})
        return True

    def go_on(self) -> None:
        """Go on from the newest state, and say from where. Raises ValueError if it is of something else."""
        has_state = self.load()
        where = f"epoch {self.progress.epoch} after {self.progress.record.step} of {self.steps_per_epoch} steps"
        self.runtime.say(f"resume    {where if has_state else 'no state was saved: from the start'}")

    def check(self) -> None:
        """Save if it is time to. To be called between two optimiser steps.

        Raises:
            Stopped: a signal has asked for it, and all is saved.
        """
        self.num_checks += 1
        if self.runtime.world > 1 and self.num_checks % CHECK_EVERY:
            return
        is_due = self.every_seconds and time.perf_counter() - self.since >= self.every_seconds
        wish = max(self.runtime.of_all(STOP if self.stop_signals.asked else SAVE if is_due else NOTHING))
        if wish != NOTHING:
            self.save()
        if wish == STOP:
            raise self.stopped()

    def save(self, random: devices.RandomState | None = None) -> None:
        """Save the state now, by the process that writes.

        Args:
            random: this process's generators; None: as they are.
        """
        states = self.runtime.of_all(random or devices.random_state(self.runtime))
        if self.runtime.is_main:
            self.before()
            seconds = self.progress.seconds + time.perf_counter() - self.started
            course = {**self.progress.state_dict(), "seconds": seconds}
            trained = None if self.is_over else self.train_state.state_dict()
            found = {"course": course, "trained": trained, "random": states, "dropped": sorted(self.dropped)}
            step = (self.progress.epoch - 1) * self.steps_per_epoch + self.progress.record.step
            self.states.save(step, self.progress.best_epoch, found)
        self.runtime.of_main(lambda: None)  # wait for it
        self.since = time.perf_counter()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal stop the run anywhere in a block that changes nothing of its state, which is saved then.

        With several processes only `check` can stop it, as one of them must not leave the others alone.
        """
        try:
            with self.stop_signals.deferred(self.runtime.world > 1):
                yield
        except signals.Stopped:
            self.save()
            raise self.stopped() from None

    def stopped(self) -> signals.Stopped:
        """What ends a run whose state is saved."""
        return signals.Stopped(f"stopped and saved: --resume {self.states.run} goes on from there")

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Let signals stop the run where `check` is called only, and save the state from before an error.

        With several processes no error's state is saved: the others may not have seen it.
        """
        try:
            with self.stop_signals.deferred():
                yield
        except FAILURES as error:
            if self.runtime.world == 1:
                try:
                    self.save(self.progress.record.random or None)
                    self.tell(error)
                except FAILURES as another:
                    self.runtime.say(f"note      the state could not be saved ({another})")
            raise
