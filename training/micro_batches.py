"""Batches cut into parts where memory is short, while the optimiser still sees them whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from training.devices import Runtime


class OutOfMemory(RuntimeError):
    """The memory does not suffice, and nothing smaller is left to try."""


class SizedBatch(Protocol):
    """What training needs of a batch: its number of samples, over all processes."""

    def __len__(self) -> int: ...


B = TypeVar("B", bound=SizedBatch)


class MicroBatches(Generic[B]):
    """Cuts batches into as many parts as memory demands; the optimiser still sees whole ones.

    Args:
        split: (batch, size) -> the batch in parts of at most `size` samples.
        enabled: False never cuts: too little memory is then the user's to solve.
        max_usage: share of a GPU's memory that the first size may plan for.
        remedies: what else saves memory, for the message where nothing is left to cut.
    """

    def __init__(
        self,
        split: Callable[[B, int], list[B]],
        *,
        enabled: bool,
        max_usage: float = 0.9,
        remedies: str = "use a smaller model",
    ) -> None:
        self.split = split
        self.enabled = enabled
        self.max_usage = max_usage
        self.remedies = remedies
        self.size: int | None = None  # None: whole batches
        self.probed = False

    def parts(self, batch: B) -> list[B]:
        """The batch, in parts if it is too large."""
        return [batch] if self.size is None else self.split(batch, self.size)

    def halve(self, largest: int) -> None:
        """Memory ran out with parts of up to `largest` samples. Raises OutOfMemory if nothing smaller is left."""
        if not self.enabled:
            raise OutOfMemory(
                f"out of memory with {largest} samples at once: lower --batch_size, use --dynamic_batch_size (in one "
                f"process), {self.remedies}"
            )
        if largest == 1:
            raise OutOfMemory(f"out of memory with a single sample at once: {self.remedies}")
        self.size = (largest + 1) // 2
        print(f"note      out of memory: from here on {self.size} samples at once, steps stay as large", flush=True)

    def probe(self, batch: B, run: Callable[[list[B]], object], runtime: Runtime, reserve: float = 0) -> None:
        """Choose the first size on a GPU: the batch halved until the memory it should take fits, beside `reserve`."""
        if self.probed:
            return
        self.probed = True
        if not self.enabled or runtime.device.type == "cpu" or len(batch) < 4:
            return
        gpu = torch.get_device_module(runtime.device)

        def peak(size: int) -> float:
            gpu.reset_peak_memory_stats(runtime.device)
            try:
                with torch.random.fork_rng(devices=[runtime.device], device_type=runtime.device.type):
                    run([self.split(batch, size)[0]])
            except torch.OutOfMemoryError:
                return math.inf
            return gpu.max_memory_allocated(runtime.device)

        budget = self.max_usage * gpu.mem_get_info(runtime.device)[1] - reserve
        peak(1)  # leaves gradients behind, which from then on take their place in both measurements
        size = fitting_size(len(batch), peak(1), peak(2), budget)
        if size < len(batch):
            self.size = size
            print(f"note      {size} samples at once fit into {self.max_usage:.0%} of the memory, steps stay as large")


def fitting_size(batch_size: int, bytes_of_1: float, bytes_of_2: float, budget: float) -> int:
    """`batch_size` halved until memory, which grows linearly with it, stays within the budget; at least 1."""
    size = batch_size
    while size > 1 and not bytes_of_1 + (size - 1) * (bytes_of_2 - bytes_of_1) <= budget:  # NaN if both are infinite
        size = (size + 1) // 2
    return size
