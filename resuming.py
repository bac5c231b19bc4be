"""How far a run has come, and what it needs to go on from there as if nothing had happened.

A state is taken between two optimiser steps: weights, their average, optimiser, schedule, loss scaler, the generators
of random numbers of every process, the record of the epoch so far, the history of the epochs before it and what is best
of them. Which batches are left in the epoch follows from the number of its steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import checkpoint
import engine
import signals

FAILURES = (OSError, engine.NonFiniteLoss, engine.OutOfMemory, torch.OutOfMemoryError)
NOTHING, SAVE, STOP = range(3)  # what a process wishes for; the highest wish counts
CHECK_EVERY = 10  # calls, where several processes have to agree on whether to save


@dataclass
class Course:
    """How far a run has come."""

    epoch: int = 1  # that is being trained, or comes next
    lr: float = 0.0  # at its first step
    history: list[dict[str, float]] = field(default_factory=list)  # a row for each finished epoch
    selection: list[float] = field(default_factory=list)  # the score by which the best of them is chosen
    best_scores: dict[str, np.ndarray] = field(default_factory=dict)  # of the best epoch on the validation fold
    seconds: float = 0.0  # that the run took before this process
    resumed: list[dict[str, int]] = field(default_factory=list)  # where it was gone on with
    record: engine.EpochRecord = field(default_factory=engine.EpochRecord)

    @property
    def best_epoch(self) -> int:
        """The epoch to keep; 0 while none is finished."""
        return engine.best_epoch(self.selection) if self.selection else 0

    def close_epoch(self, row: dict[str, float], score: float, scores: dict[str, np.ndarray]) -> None:
        """Take in the finished epoch: its row, the score to select by, and the scores of the validation fold."""
        self.history.append(row)
        self.selection.append(score)
        if self.best_epoch == self.epoch:
            self.best_scores = scores
        self.epoch += 1
        self.record = engine.EpochRecord()

    def would_be_best(self, score: float) -> bool:
        """Whether the present epoch would be the one to keep with this score to select by."""
        return engine.best_epoch([*self.selection, score]) == self.epoch

    def state(self) -> dict[str, Any]:
        """All of it. Raises NonFiniteLoss for a step that has not been looked at yet."""
        return {**vars(self), "record": self.record.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on as the course whose `state` this is."""
        vars(self).update({**state, "record": self.record})
        self.record.load(state["record"])


@dataclass
class Trained:
    """What training changes.

    `constant` names the parameters that it does not: they are told by their digest only.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    average: engine.WeightAverage
    micro: engine.MicroBatches
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
        return checkpoint.digest_of({name: state[name].cpu().contiguous() for name in self.constant})

    def state(self) -> dict[str, Any]:
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

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on as what this is the `state` of. Raises ValueError if it belongs to other weights."""
        if state["constant"] != self.digest:
            raise ValueError("--resume: the weights that CLIP starts from have changed since; restore them")
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
        step: tells the number of optimiser steps so far.
        every_seconds: the time between two states; 0 saves only when asked to stop, or on an error.
        listening: the signals.
        before: is called before each state, to write the best weights.
        dropped: rows that are left out since their images were lost.
        tell: is called with an error after whose state is saved.
        started: the clock (`time.perf_counter`) when this process's part of the run began.
    """

    def __init__(
        self,
        states: checkpoint.StateFolder,
        course: Course,
        trained: Trained,
        runtime: engine.Runtime,
        *,
        step: Callable[[], int],
        every_seconds: float,
        listening: signals.Signals,
        before: Callable[[], object],
        dropped: set[int],
        tell: Callable[[Exception], object],
        started: float,
    ) -> None:
        self.states = states
        self.course = course
        self.trained = trained
        self.runtime = runtime
        self.step = step
        self.every_seconds = every_seconds
        self.listening = listening
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
            self.course.load(state["course"])
            self.dropped.update(state["dropped"])
            if state["trained"] is not None:
                self.trained.load(state["trained"])
            engine.set_random_state(state["random"][self.runtime.rank], self.runtime)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"--resume: the saved state is of another version of this program ({error!r})") from error
        self.course.resumed.append({"epoch": self.course.epoch, "step": self.course.record.step})
        return True

    def check(self) -> None:
        """Save if it is time to. To be called between two optimiser steps.

        Raises:
            Stopped: a signal has asked for it, and all is saved.
        """
        self.num_checks += 1
        if self.runtime.world > 1 and self.num_checks % CHECK_EVERY:
            return
        is_due = self.every_seconds and time.perf_counter() - self.since >= self.every_seconds
        wish = max(self.runtime.of_all(STOP if self.listening.asked else SAVE if is_due else NOTHING))
        if wish != NOTHING:
            self.save()
        if wish == STOP:
            raise self.stopped()

    def save(self, random: engine.RandomState | None = None) -> None:
        """Save the state now, by the process that writes.

        Args:
            random: this process's generators; None: as they are.
        """
        states = self.runtime.of_all(random or engine.random_state(self.runtime))
        if self.runtime.is_main:
            self.before()
            seconds = self.course.seconds + time.perf_counter() - self.started
            course = {**self.course.state(), "seconds": seconds}
            trained = None if self.is_over else self.trained.state()
            found = {"course": course, "trained": trained, "random": states, "dropped": sorted(self.dropped)}
            self.states.save(self.step(), self.course.best_epoch, found)
        self.runtime.of_main(lambda: None)  # wait for it
        self.since = time.perf_counter()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal stop the run anywhere in a block that changes nothing of its state, which is saved then.

        With several processes only `check` can stop it, as one of them must not leave the others alone.
        """
        try:
            with self.listening.held_back(self.runtime.world > 1):
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
            with self.listening.held_back():
                yield
        except FAILURES as error:
            if self.runtime.world == 1:
                try:
                    self.save(self.course.record.random or None)
                    self.tell(error)
                except FAILURES as another:
                    self.runtime.say(f"note      the state could not be saved ({another})")
            raise
