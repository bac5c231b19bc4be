"""Questions as batches: those of like length together, each image's regions read once, padded to the longest there is.

Shapes: Q questions, I images, B questions of a batch, N words, E entities, W describing words, M regions, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inputs.transfer import Rows, run_ahead, to_device
from regions.features import RegionFiles
from vqa.preprocess import QuestionTable
from vqa.targets import dense

CHUNK = 50  # batches that are sorted by length together: enough to pad little, few enough to stay shuffled
AHEAD = 2  # batches


@dataclass(frozen=True)
class QuestionBatch:
    """A step's inputs for this process, and the targets of all processes."""

    rows: Rows  # of the whole batch
    inputs: dict[str, Tensor]  # arguments of the model, for this process's share of the rows
    targets_BA: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)


def batch_rows(sizes_Q: NDArray[np.int64], batch_size: int, *, seed: int | None = None, number: int = 0) -> list[Rows]:
    """Rows of every batch, each row once: questions of like size together.

    Args:
        seed: shuffles, anew in every pass by its `number`; None: the shortest first.
    """
    if seed is None:
        order = np.argsort(sizes_Q, kind="stable")
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    draw = np.random.default_rng((seed, number))
    order, found = draw.permutation(len(sizes_Q)), []
    for start in range(0, len(order), CHUNK * batch_size):
        chunk = order[start : start + CHUNK * batch_size]
        chunk = chunk[np.argsort(sizes_Q[chunk], kind="stable")]
        found += [chunk[place : place + batch_size] for place in range(0, len(chunk), batch_size)]
    return [found[place] for place in draw.permutation(len(found))]


class QuestionFeed:
    """Turns rows of a table into batches.

    Args:
        regions: what is known of images; None: they are not looked at.
        max_boxes: regions of an image that are read, the first.
        share: picks this process's part of a batch's rows, at least one.
    """

    def __init__(
        self,
        table: QuestionTable,
        regions: RegionFiles | None,
        *,
        max_boxes: int,
        device: torch.device,
        share: Callable[[Rows], Rows] = lambda rows: rows,
    ) -> None:
        self.table = table
        self.regions = regions
        self.max_boxes = max_boxes
        self.device = device
        self.share = share

    def batches(self, parts: Sequence[Rows]) -> Iterator[QuestionBatch]:
        """A batch for each part of the rows, read while the one before it is computed with."""
        return run_ahead(self.assemble, parts, AHEAD)

    def assemble(self, rows: Rows) -> QuestionBatch:
        """The batch of these rows. Raises ValueError if regions are damaged, KeyError if an image has none."""
        own, table = self.share(rows), self.table
        words, entities = (trimmed(part[own]) for part in (table.words_QN, table.entities_QE))
        inputs: dict[str, Any] = {"words_BN": words, "entities_BE": entities}
        if self.regions is not None:
            inputs |= self.look(self.regions, [table.images[row] for row in own])
        targets = None if table.targets_QA is None else to_device(dense(table.targets_QA, rows), self.device)
        return QuestionBatch(rows, {name: to_device(value, self.device) for name, value in inputs.items()}, targets)

    @cached_property
    def sizes_Q(self) -> NDArray[np.int64]:
        """What questions are sorted by, so that little is padded: words, then regions of the image."""
        lengths_Q = self.table.lengths_Q
        if self.regions is None:
            return lengths_Q
        distinct, place_of = np.unique(self.table.images, return_inverse=True)
        counts = np.array([min(self.regions.count(str(image)), self.max_boxes) for image in distinct])
        return lengths_Q * (self.max_boxes + 1) + counts[place_of]

    def look(self, files: RegionFiles, images: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Regions and describing words of each question's image."""
        known = {image: files.read(image) for image in dict.fromkeys(images)}
        found = [known[image] for image in images]
        most = max(1, min(self.max_boxes, max(len(each.boxes) for each in found)))
        features = np.zeros((len(images), most, files.width), dtype=np.float32)
        boxes = np.zeros((len(images), most, 4), dtype=np.float32)
        for row, each in enumerate(found):
            count = min(most, len(each.boxes))
            features[row, :count], boxes[row, :count] = each.features[:count], each.boxes[:count]
        none = np.zeros(1, dtype=np.int32)
        described = padded([self.table.descriptions.get(image, none) for image in images])
        return {"features_BMF": features, "boxes_BM4": boxes, "description_BW": trimmed(described)}

    def split(self, batch: QuestionBatch, size: int) -> list[QuestionBatch]:
        """The same batch in parts of at most `size` rows, for one process."""
        return [
            QuestionBatch(
                batch.rows[part],
                {name: value[part] for name, value in batch.inputs.items()},
                None if batch.targets_BA is None else batch.targets_BA[part],
            )
            for part in (slice(start, start + size) for start in range(0, len(batch), size))
        ]


def trimmed(words: NDArray[np.int32]) -> NDArray[np.int32]:
    """Without the columns that are padding in every row, but for one."""
    used = np.flatnonzero((words > 0).any(axis=0))
    return words[:, : used[-1] + 1 if len(used) else 1]


def padded(rows: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Rows of different lengths as one array, 0 where they end."""
    found = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found
