"""Batches on the device: which rows come when, which are left out, and what a step is given of them.

Everything that decides a shape is known to the host, so that a GPU is never waited for. Under several processes each
takes its share of a batch's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from inputs.image_sources import ImageSource, View
from inputs.image_store import Unreadable
from inputs.texts import TextTable
from inputs.transfer import R, Rows, run_ahead, to_device


class BatchOrder:
    """(view, rows) of every batch: in order as evaluation views, or shuffled anew in each pass, which is the view."""

    def __init__(self, rows: Rows, *, batch_size: int, shuffle: bool = False, seed: int = 0) -> None:
        self.rows = np.asarray(rows)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[View, Rows]]:
        yield from self.of_pass(self.passes)
        self.passes += 1

    def of_pass(self, number: int) -> Iterator[tuple[View, Rows]]:
        """A pass by its number, from 0."""
        rows = np.random.default_rng((self.seed, number)).permutation(self.rows) if self.shuffle else self.rows
        for start in range(0, len(rows), self.batch_size):
            yield number if self.shuffle else None, rows[start : start + self.batch_size]


@dataclass(frozen=True)
class Batch:
    """A step's inputs for this process, and its labels for all processes."""

    rows: Rows  # of the whole batch
    inputs: dict[str, Any]  # arguments of the model, for this process's share of the rows
    targets: dict[str, Tensor]  # task -> (B,) label units of the whole batch, NaN where missing
    labelled: dict[str, Tensor | None]  # task -> places in the batch that have a label; None: all
    rationales: dict[str, Any] | None = None  # as `TextTable.select` gives them; None: no row has one
    with_rationale: Tensor | None = None  # places in the whole batch that they belong to

    def __len__(self) -> int:
        return len(self.rows)


class DroppedRows:
    """Which rows have been dropped because their images can no longer be used, and which may be.

    Whoever reads images in mid-run does it through `load`. A row that was dropped stays out, also if its file comes
    back: what is trained on would otherwise depend on when somebody looked.
    """

    def __init__(self, droppable: Iterable[int] = (), *, otherwise: str = "") -> None:
        """`droppable`: rows that may be dropped; `otherwise`: ends the error of all others."""
        self.rows: set[int] = set()
        self.droppable = {int(row) for row in droppable}
        self.otherwise = otherwise
        self.tell: Callable[[Mapping[int, str]], None] = lambda reasons: None  # is told of each row once, and why

    def left(self, rows: Rows) -> Rows:
        """Those of the rows that have not been dropped."""
        return rows[self.is_remaining(rows)]

    def is_remaining(self, rows: Rows) -> np.ndarray:
        """(n,) whether each of the rows has not been dropped."""
        return ~np.isin(rows, list(self.rows))

    def load(self, rows: Rows, load: Callable[[Rows], R]) -> tuple[Rows, R | None]:
        """The rows that are left and what `load` makes of them; None if none is left.

        Raises:
            OSError: the image of a row that may not be dropped cannot be used, or no row that may be is left.
        """
        while len(rows := self.left(rows)):
            try:
                return rows, load(rows)
            except Unreadable as error:
                if not error.reasons.keys() <= self.droppable:
                    raise OSError(f"{error}{self.otherwise}") from error
                self.rows.update(error.reasons)  # in place: others hold this set
                self.tell(error.reasons)
                if self.droppable <= self.rows:
                    raise OSError(f"{error}; no training image is left") from error
        return rows, None

    def whole(self, rows: Rows, values: np.ndarray) -> np.ndarray:
        """What was computed of the rows that are left, (m, ...), as (n, ...) of all: NaN for those dropped."""
        found = np.full((len(rows), *values.shape[1:]), np.nan)
        found[self.is_remaining(rows)] = values
        return found


P = TypeVar("P", bound=ImageSource)


class Feed(Generic[P]):
    """Turns orders of rows into Batches: fetches images, adds prompts and labels."""

    def __init__(
        self,
        *,
        pixels: P,
        device: torch.device,
        targets: Mapping[str, np.ndarray],
        prompts: TextTable | None,
        rationales: tuple[TextTable, np.ndarray] | None = None,
        share: Callable[[Rows], Rows] = lambda rows: rows,
        num_ahead: int = 0,
        dropping: DroppedRows | None = None,
    ) -> None:
        """`share` picks this process's part of a batch's rows, at least one; `num_ahead` batches are prepared early.

        `dropping`: which rows may be left out; None: none.
        """
        self.pixels = pixels
        self.source: ImageSource = pixels  # or cached activations in its place
        self.device = device
        self.targets = {task: values.astype(np.float32) for task, values in targets.items()}
        self.prompts = prompts
        self.rationales = rationales
        self.share = share
        self.num_ahead = num_ahead
        self.dropping = dropping or DroppedRows()

    @property
    def dropped(self) -> set[int]:
        """The rows that have been left out since the run began; may be added to, to leave out more."""
        return self.dropping.rows

    def batches(self, order: Iterable[tuple[View, Rows]], *, num_done: int = 0) -> Iterator[Batch]:
        """One Batch for each (view, rows), without rows that have been dropped; none where all of them have been.

        `num_done`: so many batches are left out that the order has begun with, not counting those without rows.

        Raises:
            OSError: images can no longer be used, see `DroppedRows`.
        """

        def prepare(item: tuple[View, Rows]) -> tuple[View, Rows, Any]:
            view, rows = item
            return view, *self.dropping.load(rows, lambda left: self.source.prepare(self.share(left), view))

        some_left = (item for item in order if len(self.dropping.left(item[1])))
        for view, rows, prepared in run_ahead(prepare, islice(some_left, num_done, None), self.num_ahead):
            if not len(rows):
                continue
            images = self.source.finish(prepared, self.share(rows), view)
            yield self.assemble(rows, images, self.source.count(view))

    def assemble(self, rows: Rows, images: Mapping[str, Tensor], num_views: int) -> Batch:
        """The Batch of these rows, whose share of images is given as a source does, each with so many views."""
        texts = self.prompts.select(self.share(rows)) if self.prompts else {}
        known = {task: ~np.isnan(values[rows]) for task, values in self.targets.items()}
        rationales = places = None
        if self.rationales:
            table, present = self.rationales
            if present[rows].any():
                rationales = table.select(rows[present[rows]])
                places = to_device(np.flatnonzero(present[rows]), self.device)
        return Batch(
            rows=rows,
            inputs={**images, "image_stage": self.source.stage, "num_views": num_views, **texts},
            targets={task: to_device(values[rows], self.device) for task, values in self.targets.items()},
            labelled={
                task: None if mask.all() else to_device(np.flatnonzero(mask), self.device)
                for task, mask in known.items()
            },
            rationales=rationales,
            with_rationale=places,
        )

    def split(self, batch: Batch, size: int) -> list[Batch]:
        """The same batch in parts of at most `size` rows, for one process."""
        if len(batch) <= size:
            return [batch]
        starts = range(0, len(batch), size)
        images = {name: batch.inputs[name] for name in ("image", "statistics") if name in batch.inputs}
        return [
            self.assemble(
                batch.rows[s : s + size],
                {name: values[s : s + size] for name, values in images.items()},
                batch.inputs["num_views"],
            )
            for s in starts
        ]
