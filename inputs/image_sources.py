"""Where what enters the image tower comes from: pixels, or cached activations of its frozen stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from inputs.image_store import ImageStore
from inputs.transfer import Rows, pinned
from inputs.views import Views
from storage.feature_cache import FeatureSet, key_of

View = int | None  # number of a training view; None: the evaluation view


class ImageSource(Protocol):
    """Where what enters the image tower comes from."""

    @property
    def stage(self) -> int:
        """The stage of the tower that it enters; 0 for pixels."""

    def count(self, view: View) -> int:
        """How many views of an image are given, in a dimension of their own if it is not one."""

    def prepare(self, rows: Rows, view: View) -> Any:
        """Do what the host has to do; may run in another thread."""

    def finish(self, prepared: Any, rows: Rows, view: View) -> Tensor:
        """Bring it to the device."""


class PixelSource:
    """Views of decoded images."""

    stage = 0

    def __init__(self, store: ImageStore, views: Views) -> None:
        self.store = store
        self.views = views

    def count(self, view: View) -> int:
        """How many views of an image are given."""
        return self.views.count(view)

    def prepare(self, rows: Rows, view: View) -> list[Tensor]:
        """Decoded images, pinned where a GPU waits for them."""
        return [pinned(image, self.views.device) for image in self.store.load(rows)]

    def finish(self, prepared: list[Tensor], rows: Rows, view: View) -> Tensor:
        """(B, 3, S, S) normalised pixels; (B, V, 3, S, S) of several views."""
        return self.views(prepared, [self.store.files[row].digest for row in rows], view)


class CachedSource:
    """Cached activations: evaluation views of all rows that will be asked for, and V views of the training rows.

    Training pass e sees view e mod V; with V = 0, the evaluation view.
    """

    def __init__(
        self,
        sets: tuple[FeatureSet, FeatureSet],
        digests: Sequence[str],
        *,
        rows_of: Mapping[View, Rows],
        stage: int,
        device: torch.device,
        dtype: torch.dtype,
        counts: tuple[int, int] = (1, 1),
    ) -> None:
        """How the activations are given.

        Args:
            rows_of: the rows of each view (None, 0..V-1) that will be asked for.
            dtype: what to give them as.
            counts: how many views of an image the evaluation view and a training view consist of.
        """
        self.evaluation, self.training = sets
        self.digests = digests
        self.rows_of = rows_of
        self.num_views = len(rows_of) - 1
        self.stage = stage
        self.device = device
        self.dtype = dtype
        self.counts = counts
        self.resident: dict[View, Tensor] = {}  # view -> all rows, in the device's memory
        self.place_of: dict[View, np.ndarray] = {}  # view -> where each row of the data set lies in `resident`

    def describe(self) -> str:
        """What is cached, in words."""
        where = "in GPU memory" if self.resident else "memory-mapped"
        size = self.size(self.rows_of) / 1e9
        is_embedding = len(self.evaluation.shape) - (self.counts[0] > 1) == 1
        what = "embeddings" if is_embedding else f"activations after {self.stage} blocks"
        return f"{what}, {self.num_views} training view(s), {size:.2f} GB {where}"

    def size(self, rows_of: Mapping[View, Rows]) -> int:
        """Bytes that the rows of some views take."""
        return sum(len(rows) * self.keys(rows[:0], view)[0].row_bytes for view, rows in rows_of.items())

    def count(self, view: View) -> int:
        """How many views of an image are given."""
        return self.counts[self.which(view) is not None]

    def which(self, view: View) -> View:
        """The cached view that stands for a training pass."""
        return None if view is None or not self.num_views else view % self.num_views

    def keys(self, rows: Rows, view: View) -> tuple[FeatureSet, list[str]]:
        """Where the given rows of a cached view are, and under which keys."""
        if view is None:
            return self.evaluation, [self.digests[row] for row in rows]
        return self.training, [key_of(self.digests[row], view) for row in rows]

    def missing(self, view: View) -> Rows:
        """The rows of a view that are not in the cache yet."""
        features, keys = self.keys(self.rows_of[view], view)
        return self.rows_of[view][features.missing(keys)]

    def move_to_device(self) -> None:
        """Keep all in the device's memory."""
        for view, rows in self.rows_of.items():
            features, keys = self.keys(rows, view)
            held = torch.empty((len(rows), *features.shape), dtype=features.dtype, device=self.device)
            for start in range(0, len(rows), 256):
                held[start : start + 256] = features.stack(keys[start : start + 256]).to(self.device)
            places = np.full(len(self.digests), -1)
            places[rows] = np.arange(len(rows))
            self.resident[view], self.place_of[view] = held, places

    def prepare(self, rows: Rows, view: View) -> Tensor:
        """Rows from the cache, or their places in the device's memory."""
        view = self.which(view)
        if view in self.resident:
            places = self.place_of[view][rows]
            assert (places >= 0).all(), "rows that were not announced"
            return pinned(torch.from_numpy(places), self.device)
        features, keys = self.keys(rows, view)
        return pinned(features.stack(keys), self.device)

    def finish(self, prepared: Tensor, rows: Rows, view: View) -> Tensor:
        """(B, ...) activations."""
        prepared = prepared.to(self.device, non_blocking=True)
        found = self.resident[self.which(view)][prepared] if self.which(view) in self.resident else prepared
        return found.to(self.dtype)
