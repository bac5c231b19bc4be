"""Small things on the way to the device: pinned memory, pieces of rows, work done ahead in another thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

Rows = np.ndarray  # (n,) int64 row numbers of a data set


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor from which a GPU can copy without being waited for."""
    return tensor if device.type == "cpu" else tensor.pin_memory()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A small array on the device."""
    return pinned(torch.from_numpy(array), device).to(device, non_blocking=True)


def run_ahead(function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """`map(function, items)`, computed in another thread up to `depth` items ahead (0: here, when asked for)."""
    if depth == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def trimmed(words: np.ndarray) -> np.ndarray:
    """Rows of numbers of words, 0 being none, without the columns that are padding in every row, but for one."""
    used = np.flatnonzero((words > 0).any(axis=0))
    return words[:, : used[-1] + 1 if len(used) else 1]


def chunks(items: Rows, size: int) -> Iterator[Rows]:
    """Pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
