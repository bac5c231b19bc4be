"""Where what enters the image tower comes from: pixels, or cached activations of its frozen stages.

F statistics of an image's stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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

    def finish(self, prepared: Any, rows: Rows, view: View) -> dict[str, Tensor]:
        """Bring it to the device: "image" (B, ...) and, with an entry stage, "statistics" of the stages before it."""


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

    def finish(self, prepared: list[Tensor], rows: Rows, view: View) -> dict[str, Tensor]:
        """ "image": (B, 3, S, S) normalised pixels; (B, V, 3, S, S) of several views."""
        return {"image": self.views(prepared, [self.store.files[row].digest for row in rows], view)}


class Layout(NamedTuple):
    """How activations and the statistics of the stages before them lie in one cached row.

    Statistics are float32 whatever the activations are, whose type their bits are stored as.
    """

    image: tuple[int, ...]  # the shape of an image's activations
    statistics: tuple[int, ...]  # that of its statistics; the last number is 0 if there are none

    def pack(self, image: Tensor, statistics: Tensor) -> Tensor:
        """(B, ...) activations and (B, ..., F) statistics -> (B, D) of the activations' type."""
        return torch.cat([image.flatten(1), statistics.float().flatten(1).contiguous().view(image.dtype)], dim=1)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """As `ImageSource.finish`, from rows (B, D); activations are given as `dtype`."""
        size = math.prod(self.image)
        found = {"image": rows[:, :size].unflatten(1, self.image).to(dtype)}
        if self.statistics[-1]:
            found["statistics"] = rows[:, size:].contiguous().view(torch.float32).unflatten(1, self.statistics)
        return found


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
        layouts: tuple[Layout, Layout],
        counts: tuple[int, int] = (1, 1),
        is_embedding: bool = False,
    ) -> None:
        """How the activations are given.

        Args:
            rows_of: the rows of each view (None, 0..V-1) that will be asked for.
            dtype: what to give them as.
            layouts: of the rows of the evaluation view, and of those of training views.
            counts: how many views of an image the evaluation view and a training view consist of.
        """
        self.evaluation, self.training = sets
        self.digests = digests
        self.rows_of = rows_of
        self.num_views = len(rows_of) - 1
        self.stage = stage
        self.device = device
        self.dtype = dtype
        self.layouts = layouts
        self.counts = counts
        self.is_embedding = is_embedding
        self.resident: dict[View, Tensor] = {}  # view -> all rows, in the device's memory
        self.place_of: dict[View, np.ndarray] = {}  # view -> where each row of the data set lies in `resident`

    def describe(self) -> str:
        """What is cached, in words."""
        where = "in GPU memory" if self.resident else "memory-mapped"
        size = self.size(self.rows_of) / 1e9
        what = "embeddings" if self.is_embedding else f"activations after {self.stage} blocks"
        what += " and statistics" * bool(self.layouts[0].statistics[-1])
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

    def finish(self, prepared: Tensor, rows: Rows, view: View) -> dict[str, Tensor]:
        """ "image" (B, ...) and, if there are any, "statistics" (B, ..., F)."""
        prepared = prepared.to(self.device, non_blocking=True)
        found = self.resident[self.which(view)][prepared] if self.which(view) in self.resident else prepared
        return self.layouts[self.which(view) is not None].unpack(found, self.dtype)
