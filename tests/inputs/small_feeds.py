"""Feeds of row numbers in the place of images, and texts for them. No tests: these import it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inputs import image_sources, image_store, transfer
from inputs.batches import Feed
from inputs.texts import TextTable
from inputs.views import Views
from storage import image_files

CPU = torch.device("cpu")
LENGTH = 8  # of the token rows that `letters` makes
END = 999


def letters(texts: Sequence[str], length: int = LENGTH) -> Tensor:
    """A tokenizer for tests: codes of letters, 0 for "!" as CLIP has it, then an end token, padded with 0."""
    rows = [[0 if letter == "!" else ord(letter) for letter in text] + [END] for text in texts]
    return torch.tensor([(row + [0] * length)[:length] for row in rows]).reshape(len(rows), length)


def table_of(texts: Sequence[str], **options: Any) -> TextTable:
    return TextTable(texts, letters, CPU, **options)


class RowNumbers:
    """A source for tests whose activations tell which row and view they are of; it notes what it was asked for.

    Where a view consists of several, the third number tells which of them. Statistics are the activations and a half.
    """

    stage = 2

    def __init__(self, counts: tuple[int, int] = (1, 1), *, with_statistics: bool = False) -> None:
        """`counts`: how many the evaluation view and a training view consist of."""
        self.counts = counts
        self.with_statistics = with_statistics
        self.asked: list[tuple[image_sources.View, list[int]]] = []

    def count(self, view: image_sources.View) -> int:
        return self.counts[view is not None]

    def prepare(self, rows: transfer.Rows, view: image_sources.View) -> Tensor:
        self.asked.append((view, rows.tolist()))
        return torch.from_numpy(rows)

    def finish(self, prepared: Tensor, rows: transfer.Rows, view: image_sources.View) -> dict[str, Tensor]:
        assert prepared.tolist() == rows.tolist()
        found = torch.stack([prepared, torch.full_like(prepared, -1 if view is None else view)], dim=1)
        if self.count(view) > 1:
            several = torch.arange(self.count(view)).expand(len(rows), -1)[..., None]
            found = torch.cat([found[:, None].expand(-1, self.count(view), -1), several], dim=2)
        return {"image": found, "statistics": found + 0.5} if self.with_statistics else {"image": found}


def feed_of(source: image_sources.ImageSource, **options: Any) -> Feed:
    return Feed(**{"pixels": source, "device": CPU, "targets": {}, "prompts": None, **options})


def store_of(demo_set: tuple[Path, Path]) -> image_store.ImageStore:
    """Ten pictures of the demo set."""
    files = image_files.check_images(sorted(demo_set[1].iterdir())[:10])
    return image_store.ImageStore(files, image_size=32, num_threads=2, max_memory=1e9)


@pytest.fixture(scope="module")
def store(demo_set) -> image_store.ImageStore:
    return store_of(demo_set)


def views_of(**options: Any) -> Views:
    usual = {"image_size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5), "device": CPU, "seed": 1}
    return Views(**{**usual, "crop_scale_min": 0.5, "flip": True, **options})


def digests(store: image_store.ImageStore, rows: Sequence[int] | np.ndarray) -> list[str]:
    return [store.files[row].digest for row in rows]
