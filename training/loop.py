"""One epoch of training, step by step, and prediction."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from training.devices import RandomState, Runtime, T, random_state
from training.micro_batches import B, MicroBatches
from training.optim import M, WeightAverage

CHECK_EVERY_STEPS = 50  # losses are looked at this often where each look makes a GPU wait
MOST_SKIPPED_STEPS = 30  # in a row under fp16: halved so often, a loss scale of 65,536 is at its end


class NonFiniteLoss(RuntimeError):
    """Training broke down: a loss or a gradient is NaN or infinite.

    Attributes:
        metric, value, step: what it was, and at which optimiser step of the epoch, from 1.
        samples: the samples of that step.
    """

    def __init__(self, metric: str, value: float, *, step: int, samples: Sequence[int] = ()) -> None:
        ways = "lower --lr, clip the gradient, or train without mixed precision"
        super().__init__(f"{metric} is {value} at step {step} of this epoch: {ways}")
        self.metric, self.value, self.step, self.samples = metric, value, step, list(samples)


def batched(batches: Iterable[B], size: int) -> Iterator[list[B]]:
    """Lists of `size` batches, the last perhaps shorter."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


class Stopwatch:
    """Adds up the time that is spent waiting for items."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, unchanged."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item


def train_epoch(
    model: nn.Module,
    batches: Iterable[B],
    compute_losses: Callable[[nn.Module, B], Mapping[str, Tensor]],
    *,
    optimizer: Optimizer,
    schedule: LambdaLR,
    runtime: Runtime,
    average: WeightAverage,
    micro: MicroBatches[B],
    accumulation: int = 1,
    max_grad_norm: float = 0.0,
    record: EpochRecord | None = None,
    samples_of: Callable[[B], Sequence[int]] = lambda batch: (),
    after_step: Callable[[int], None] = lambda num_samples: None,
) -> dict[str, float]:
    """Train over all batches once.

    Args:
        model: as `Runtime.distribute` returns it.
        compute_losses: (model, batch) -> named scalar tensors of the whole batch, "loss" among them.
        micro: how batches are cut where memory is short.
        accumulation: batches per optimiser step; each counts by its number of samples.
        record: takes in every step; with steps in it, the epoch is gone on with, and `batches` are those left.
        samples_of: numbers of a batch's samples, to be named if they break training.
        after_step: called with the number of samples of each optimiser step, when it is in the record.

    Returns:
        Mean of every named loss per sample, "grad_norm" (before clipping; mean over the steps taken), and
        "data_wait", the share of the time in which this process waited for the next batch.

    Raises:
        NonFiniteLoss: names the loss (or "grad_norm") and the step, with the weights as they were before it.
        OutOfMemory: says what to change.
    """
    model.train()
    record = EpochRecord() if record is None else record
    watch, began = Stopwatch(), (time.perf_counter() - record.seconds, record.waited)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    record.random = random_state(runtime)
    for group in batched(watch.over(batches), accumulation):
        losses = gradients(model, group, compute_losses, optimizer=optimizer, runtime=runtime, micro=micro)
        runtime.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        is_broken = record.is_broken_by(losses, norm)
        is_taken = take_step(optimizer, runtime.scaler, is_broken)
        if is_taken:
            schedule.step()
            average.update()
        optimizer.zero_grad(set_to_none=True)
        samples = [row for batch in group for row in samples_of(batch)]
        record.add(Step(losses, norm, is_taken, samples, record.random), is_broken)
        record.seconds, record.waited = time.perf_counter() - began[0], began[1] + watch.seconds
        record.random = random_state(runtime)
        after_step(sum(len(batch) for batch in group))
    return {**record.means(), "data_wait": record.waited / max(record.seconds, 1e-9)}


@dataclass
class Step:
    """An optimiser step that the record has not taken in yet: its losses may be on their way from a GPU."""

    losses: Sequence[tuple[int, dict[str, Tensor]]]  # (samples, losses) of its parts
    norm: Tensor
    is_taken: bool  # fp16 scaling did not skip it
    samples: Sequence[int]
    random: RandomState  # before it

    def first_non_finite(self) -> tuple[str, float] | None:
        """Name and value of the first loss or norm that is not finite."""
        values = [(name, float(value)) for _, terms in self.losses for name, value in terms.items()]
        return next((item for item in (*values, ("grad_norm", float(self.norm))) if not math.isfinite(item[1])), None)


class EpochRecord:
    """Losses and gradient norms of an epoch's steps; they are fetched from a GPU now and then only.

    Until they are, no step is taken after one whose values are not finite: see `is_broken_by`.
    """

    KEPT = (
        *("step", "num_samples", "num_measured", "num_skipped", "num_taken"),
        *("sums", "norm_sum", "seconds", "waited"),
    )

    def __init__(self) -> None:
        self.step = 0  # how many it has taken in
        self.num_samples = 0
        self.num_measured = 0  # without those whose losses an overflow in fp16 has spoilt
        self.num_skipped = 0  # steps in a row that fp16 scaling has skipped
        self.num_taken = 0
        self.sums: dict[str, Tensor] = {}  # from a state they lie on the CPU, where any device adds to them
        self.norm_sum: Tensor | float = 0.0  # over the steps taken
        self.seconds = 0.0  # of training, and those of them that went into waiting for batches
        self.waited = 0.0
        self.pending: list[Step] = []
        self.is_broken: Tensor | None = None  # 1.0 from the first step on whose values are not finite
        self.random: RandomState = {}  # before the step that comes next

    def state_dict(self) -> dict[str, Any]:
        """What a new record needs to go on as this one. Raises NonFiniteLoss, see `settle`."""
        self.settle()
        return {name: getattr(self, name) for name in self.KEPT}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the record whose `state_dict` this is."""
        vars(self).update(state)

    def is_broken_by(self, losses: Sequence[tuple[int, dict[str, Tensor]]], norm: Tensor) -> Tensor:
        """1.0 if a step of these values must not be taken: it or one before it is not finite. Stays on the device."""
        values = [value.float() for _, terms in losses for value in terms.values()]
        broken = 1 - torch.stack([*values, norm.float()]).isfinite().all().float()
        return broken if self.is_broken is None else torch.maximum(self.is_broken, broken)

    def add(self, step: Step, is_broken: Tensor) -> None:
        """Take in an optimiser step, or hold it until the next look at the device."""
        self.num_skipped = 0 if step.is_taken else self.num_skipped + 1
        if step.is_taken:
            self.is_broken = is_broken
        elif self.num_skipped == MOST_SKIPPED_STEPS:
            self.is_broken = torch.ones_like(is_broken)
        self.pending.append(step)
        if step.norm.device.type == "cpu" or len(self.pending) >= CHECK_EVERY_STEPS:
            self.settle()

    def settle(self) -> None:
        """Take in all steps, with one look, for which a GPU is waited for once.

        Raises:
            NonFiniteLoss: for the first one that is not finite; the record, and `random`, are as before that step.
        """
        pending, self.pending = self.pending, []
        is_broken = self.is_broken is not None and bool(self.is_broken)
        for step in pending:
            found = step.first_non_finite() if is_broken and (step.is_taken or step is pending[-1]) else None
            if found:
                self.random, self.is_broken = step.random, None
                raise NonFiniteLoss(*found, step=self.step + 1, samples=step.samples)
            self.accumulate(step)

    def accumulate(self, step: Step) -> None:
        """Add a step's values up."""
        self.step += 1
        if step.is_taken:
            self.num_taken += 1
            self.norm_sum = self.norm_sum + step.norm.double()
        for size, terms in step.losses:
            self.num_samples += size
            if step.is_taken or bool(torch.stack([value.float() for value in terms.values()]).isfinite().all()):
                self.num_measured += size
                for name, value in terms.items():
                    # In float64: a loss may be bf16 under autocast, and a long sum in bf16 stands still.
                    self.sums[name] = self.sums.get(name, 0.0) + value.double() * size

    def means(self) -> dict[str, float]:
        """Mean of every loss per sample, and of the gradient norm over the steps taken. Raises NonFiniteLoss."""
        self.settle()
        means = {name: float(total) / self.num_measured for name, total in self.sums.items()}
        return {**means, "grad_norm": float(self.norm_sum) / self.num_taken if self.num_taken else math.nan}


def gradients(
    model: nn.Module,
    group: Sequence[B],
    compute_losses: Callable[[nn.Module, B], Mapping[str, Tensor]],
    *,
    optimizer: Optimizer,
    runtime: Runtime,
    micro: MicroBatches[B],
) -> list[tuple[int, dict[str, Tensor]]]:
    """Compute the gradients of one optimiser step, in smaller parts if memory runs out.

    Returns:
        (samples, losses) of each part.
    """
    size = sum(len(batch) for batch in group)

    def run(parts: list[B]) -> list[tuple[int, dict[str, Tensor]]]:
        return backward(model, parts, compute_losses, size=size, runtime=runtime)

    if not micro.probed:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        micro.probe(group[0], run, runtime, reserve=8 * trained)  # AdamW's two moments come with the first step
    while True:
        optimizer.zero_grad(set_to_none=True)  # what the probe or a failed attempt has left
        parts = [part for batch in group for part in micro.parts(batch)]
        try:
            return run(parts)
        except torch.OutOfMemoryError:
            pass
        micro.halve(max(len(part) for part in parts))  # outside of `except`, whose traceback holds on to memory


def backward(
    model: nn.Module,
    parts: Sequence[B],
    compute_losses: Callable[[nn.Module, B], Mapping[str, Tensor]],
    *,
    size: int,
    runtime: Runtime,
) -> list[tuple[int, dict[str, Tensor]]]:
    """Add up the gradients of one optimiser step of `size` samples; returns (samples, losses) of each part."""
    found = []
    for number, part in enumerate(parts, start=1):
        # Gradients are averaged over processes once, with the last part.
        is_last = number == len(parts)
        with nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            with runtime.autocast():
                losses = compute_losses(model, part)
            # Each process holds its own rows' part of the gradient, and averaging divides by their number.
            loss = losses["loss"] * (runtime.world * len(part) / size)
            runtime.scaler.scale(loss).backward()
        found.append((len(part), {name: value.detach() for name, value in losses.items()}))
    return found


def take_step(optimizer: Optimizer, scaler: torch.amp.GradScaler, is_broken: Tensor) -> bool:
    """Step through the scaler; False if it skipped the step because of an overflow in fp16.

    Without scaling a step that `is_broken` (1.0) changes nothing; nobody waits for a GPU to say so.
    """
    if not scaler.is_enabled():
        optimizer.found_inf = is_broken  # type: ignore[attr-defined]  # the fused kernel looks at it
        optimizer.step()
        return True
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale


@torch.inference_mode()
def predict(
    model: M,
    batches: Iterable[B],
    compute_scores: Callable[[M, B], Mapping[str, Tensor]],
    *,
    runtime: Runtime,
    before_batch: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """Score every batch in eval mode, in order: named (n,) arrays. Every sample counts, the last batch's too."""
    model.eval()
    collected: dict[str, list[Tensor]] = {}
    for batch in batches:
        before_batch()
        with runtime.autocast():
            scores = compute_scores(model, batch)
        for name, value in scores.items():
            collected.setdefault(name, []).append(runtime.gather(value.float(), len(batch)))
    return {name: torch.cat(parts).cpu().numpy().astype(np.float64) for name, parts in collected.items()}
