"""A model's description held against the weights that are there, before memory is taken for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from storage.messages import quoted

MOST_NUMBER = 4096  # that a description may hold whatever the weights: pixels, mostly
MOST_LAYERS = 1000  # of a model without weights
SPARE_BYTES = 256 * 2**20  # for what a model holds beside its weights, such as masks


def refuse_larger(
    description: Any, shapes: Mapping[str, tuple[int, ...]] | None, build: Callable[[], nn.Module]
) -> None:
    """Raise ValueError if what `build` makes of a description is far larger than its weights are.

    Args:
        description: nested JSON values, with all the numbers that `build` uses.
        shapes: of the weights; None where there are none: then a model may be as large as this machine's memory.
        build: is called with nothing but shapes in the place of tensors.
    """
    layers = MOST_LAYERS if shapes is None else len(shapes)
    largest = max([MOST_NUMBER, *chain.from_iterable(shapes.values())]) if shapes is not None else 10**6
    for name, value in numbers_in(description):
        if "layers" in name and not isinstance(value, float) and value > layers:
            raise ValueError(f"{quoted(name)} is {value}, the weights are {layers}")
        if abs(value) > largest:
            raise ValueError(f"{quoted(name)} is {value:g}, no weight has more than {largest} of anything")
    with torch.device("meta"):
        model = build()
    size = sum(tensor.numel() * tensor.itemsize for tensor in chain(model.parameters(), model.buffers()))
    # Weights can be stored in a quarter of the bytes that they are built with.
    room = memory_bytes() if shapes is None else 4 * sum(map(num_values, shapes.values())) * 4 + SPARE_BYTES
    if size > room:
        raise ValueError(f"a model of {size / 1e9:.1f} GB is described, there is room for {room / 1e9:.1f} GB")


def num_values(shape: tuple[int, ...]) -> int:
    """Values in a tensor."""
    return torch.Size(shape).numel()


def numbers_in(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in nested JSON values with the key that it stands under; a list's length counts as its layers."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers_in(item, str(key))
    elif isinstance(value, list | tuple):
        yield f"{name} (layers in a list)", len(value)
        for item in value:
            yield from numbers_in(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def memory_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
