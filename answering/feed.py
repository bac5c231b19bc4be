"""Questions as batches: those of an image together, and those of like size, padded to the longest there is.

Shapes: Q questions, B of a batch, I images of these, N words, E entities, W describing words, M regions, F features.
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

from inputs.transfer import Rows, chunks, run_ahead, to_device, trimmed
from regions.features import RegionFiles
from regions.whole_images import CoarseInputs
from vqa.preprocess import QuestionTable
from vqa.scene_graph import number_graph, pack
from vqa.targets import dense
from vqa.text import SPECIAL, Vocabulary

CHUNK = 200  # batches that are sorted by size together: enough to pad little, few enough to stay shuffled
TOGETHER = 8  # questions of an image in one batch: its regions are read, and seen, once for all of them
LIKE_LENGTH = 2  # words by which the questions of an image are taken in another order than that of their lengths
AHEAD = 2  # batches
NO_GRAPH = number_graph({"objects": {}}, Vocabulary(SPECIAL))


@dataclass(frozen=True)
class QuestionBatch:
    """A step's inputs for this process, and the targets of all processes."""

    rows: Rows  # of the whole batch
    inputs: dict[str, Tensor]  # arguments of the model, for this process's share of the rows
    targets_BA: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)


def batch_rows(
    lengths_Q: NDArray[np.int64],
    images_Q: NDArray[np.int64],
    regions_Q: NDArray[np.int64],
    batch_size: int,
    *,
    seed: int | None = None,
    number: int = 0,
) -> list[Rows]:
    """Rows of every batch, each row once: questions of an image together, then those of like size.

    Args:
        images_Q: the number of each question's image.
        regions_Q: how many regions that has.
        seed: shuffles, anew in every pass by its `number`; None: the smallest first, an image after the other.
    """
    if seed is None:
        return list(chunks(np.lexsort((lengths_Q, images_Q, regions_Q)), batch_size))
    draw = np.random.default_rng((seed, number))
    groups_Q = draw_groups(lengths_Q, images_Q, draw)
    longest_G = np.zeros(groups_Q.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(longest_G, groups_Q, lengths_Q)
    order = np.argsort(draw.permutation(len(longest_G))[groups_Q], kind="stable")
    found: list[Rows] = []
    for rows in chunks(order, CHUNK * batch_size):
        groups = groups_Q[rows]
        found += chunks(rows[np.lexsort((groups, longest_G[groups], regions_Q[rows]))], batch_size)
    return [found[place] for place in draw.permutation(len(found))]


def draw_groups(
    lengths_Q: NDArray[np.int64], images_Q: NDArray[np.int64], draw: np.random.Generator
) -> NDArray[np.int64]:
    """The number of the group of each question: up to TOGETHER on the same image, of about the same length."""
    order = np.lexsort((lengths_Q + LIKE_LENGTH * draw.random(len(lengths_Q)), images_Q))
    ordered = images_Q[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # among the questions about the image
    groups_Q = np.empty(len(order), dtype=np.int64)
    groups_Q[order] = np.cumsum(rank % TOGETHER == 0) - 1
    return groups_Q


class QuestionFeed:
    """Turns rows of a table into batches.

    Args:
        regions: what is known of images; None: they are not looked at.
        max_boxes: regions of an image that are read, the first.
        share: picks this process's part of a batch's rows, at least one.
        coarse: what the coarse branch reads; None: there is none.
    """

    def __init__(
        self,
        table: QuestionTable,
        regions: RegionFiles | None,
        *,
        max_boxes: int,
        device: torch.device,
        share: Callable[[Rows], Rows] = lambda rows: rows,
        coarse: CoarseInputs | None = None,
    ) -> None:
        self.table = table
        self.regions = regions
        self.max_boxes = max_boxes
        self.device = device
        self.share = share
        self.coarse = coarse

    def batches(self, parts: Sequence[Rows]) -> Iterator[QuestionBatch]:
        """A batch for each part of the rows, read while the one before it is computed with."""
        return run_ahead(self.assemble, parts, AHEAD)

    def assemble(self, rows: Rows) -> QuestionBatch:
        """The batch of these rows. Raises ValueError if regions are damaged, KeyError if an image has none."""
        own, table = self.share(rows), self.table
        words, entities = (trimmed(part[own]) for part in (table.words_QN, table.entities_QE))
        inputs: dict[str, Any] = {"words_BN": words, "entities_BE": entities}
        images = [table.images[row] for row in own]
        place_of = {image: place for place, image in enumerate(dict.fromkeys(images))}
        if self.regions is not None or self.coarse is not None:
            inputs["images_B"] = np.array([place_of[image] for image in images])
        if self.regions is not None:
            inputs |= self.look(self.regions, list(place_of))
        if self.coarse is not None:
            inputs |= self.coarse.read(own, list(place_of))
        if table.graphs is not None:
            inputs |= pack([table.graphs.get(image, NO_GRAPH) for image in images])
        targets = None if table.targets_QA is None else to_device(dense(table.targets_QA, rows), self.device)
        return QuestionBatch(rows, {name: self.moved(value) for name, value in inputs.items()}, targets)

    def moved(self, value: Any) -> Tensor:
        """An input on the device, where pixels already are."""
        return value if isinstance(value, Tensor) else to_device(value, self.device)

    def parts(self, batch_size: int, *, seed: int | None = None, number: int = 0) -> list[Rows]:
        """Rows of every batch, as `batch_rows` has them."""
        return batch_rows(self.table.lengths_Q, *self.images_and_regions, batch_size, seed=seed, number=number)

    @cached_property
    def images_and_regions(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(Q,) the number of each question's image, and of its regions; where none is looked at, an image each."""
        if self.regions is None and self.coarse is None:
            return np.arange(len(self.table)), np.zeros(len(self.table), dtype=np.int64)
        distinct, images_Q = np.unique(self.table.images, return_inverse=True)
        if self.regions is None:
            return images_Q, np.zeros(len(self.table), dtype=np.int64)
        counts = np.array([min(self.regions.count(str(image)), self.max_boxes) for image in distinct], dtype=np.int64)
        return images_Q, counts[images_Q]

    def look(self, files: RegionFiles, images: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Regions and describing words of each of some images."""
        found = [files.read(image) for image in images]
        most = max(1, min(self.max_boxes, max(len(each.boxes) for each in found)))
        features = np.zeros((len(found), most, files.width), dtype=np.float32)
        boxes = np.zeros((len(found), most, 4), dtype=np.float32)
        for place, each in enumerate(found):
            count = min(most, len(each.boxes))
            features[place, :count], boxes[place, :count] = each.features[:count], each.boxes[:count]
        none = np.zeros(1, dtype=np.int32)
        described = trimmed(padded([self.table.descriptions.get(image, none) for image in images]))
        return {"features_IMF": features, "boxes_IM4": boxes, "description_IW": described}

    def split(self, batch: QuestionBatch, size: int) -> list[QuestionBatch]:
        """The same batch in parts of at most `size` rows, read once more, for one process."""
        return [self.assemble(rows) for rows in chunks(batch.rows, size)]


def padded(rows: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Rows of different lengths as one array, 0 where they end."""
    found = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found
