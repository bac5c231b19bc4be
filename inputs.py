"""What a step eats: pixels or cached activations, prompts and labels, as batches on the device.

Everything that decides a shape is known to the host, so that a GPU is never waited for. Batches are made of rows of
a data set; under several processes each takes its share of a batch's rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from features import FeatureSet, key_of
from images import ImageStore, Unreadable, Views

T = TypeVar("T")
R = TypeVar("R")

Rows = np.ndarray  # (n,) int64 row numbers of a data set
View = int | None  # number of a training view; None: the evaluation view


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


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor from which a GPU can copy without being waited for."""
    return tensor if device.type == "cpu" else tensor.pin_memory()


class TextTable:
    """The texts of a table, each distinct one tokenised once. Row r has text number `text_of_row[r]`."""

    def __init__(
        self,
        texts: Sequence[str],
        tokenize: Callable[[Sequence[str]], Tensor],
        device: torch.device,
        *,
        trim: bool = False,
    ) -> None:
        """`trim`: a batch's texts may be cut behind the last end token among them."""
        self.text_of_row, distinct = pd.factorize(np.asarray(texts, dtype=object))
        tokens_UN = tokenize(list(distinct))
        # The last column in use: token 0 is also "!" inside a word, so counting tokens would cut end tokens off.
        used = (tokens_UN != 0).numpy()
        length = tokens_UN.shape[1]
        self.lengths = length - used[:, ::-1].argmax(axis=1) if trim else np.full(len(tokens_UN), length)
        self.host_tokens_UN = tokens_UN
        self.tokens_UN = tokens_UN.to(device)
        self.device = device
        self.enter_at(0, None)

    def enter_at(self, stage: int, activations: Tensor | None, dtype: torch.dtype | None = None) -> None:
        """From now on give what enters this stage of the text tower, (U, ...), as `dtype`; at stage 0 the token ids."""
        self.stage, self.activations, self.dtype = stage, activations, dtype

    def select(self, rows: Rows) -> dict[str, Any]:
        """The distinct texts of some rows, as a model takes them: text, tokens_PN, text_stage, prompt_of_B."""
        chosen, place = np.unique(self.text_of_row[rows], return_inverse=True)
        chosen_P = to_device(chosen, self.device)
        tokens_PN = self.tokens_UN[chosen_P, : int(self.lengths[chosen].max())]
        text = tokens_PN
        if self.activations is not None:
            text = self.activations[chosen_P].to(self.dtype or self.activations.dtype)
            text = text[:, : tokens_PN.shape[1]] if text.ndim == 3 else text
        return {
            "text": text,
            "tokens_PN": tokens_PN,
            "text_stage": self.stage,
            "prompt_of_B": to_device(place, self.device),
        }


class LevelledTexts(TextTable):
    """Prompts with levels: each prompt also as K texts of how well an image matches it, and K texts of quality."""

    def __init__(
        self,
        prompts: Sequence[str],
        tokenize: Callable[[Sequence[str]], Tensor],
        device: torch.device,
        *,
        quality: Sequence[str],
        consistency: Sequence[str],
        trim: bool = False,
    ) -> None:
        """`quality`: K texts, the worst first; `consistency`: K patterns with {prompt} in them, likewise."""
        self.per_prompt = 1 + len(consistency)
        patterns = ("{prompt}", *consistency)
        texts = [pattern.replace("{prompt}", prompt) for prompt in prompts for pattern in patterns]
        super().__init__([*texts, *quality], tokenize, device, trim=trim)
        self.places_of_quality = len(texts) + np.arange(len(quality))

    def select(self, rows: Rows) -> dict[str, Any]:
        """As a model with levels takes them: prompt_of_B is (B, 1 + K), and level_of_K has the levels of quality."""
        places = np.asarray(rows)[:, None] * self.per_prompt + np.arange(self.per_prompt)
        found = super().select(np.concatenate([places.ravel(), self.places_of_quality]))
        every = found.pop("prompt_of_B")
        return {
            **found,
            "prompt_of_B": every[: places.size].view(places.shape),
            "level_of_K": every[places.size :],
        }


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A small array on the device."""
    return pinned(torch.from_numpy(array), device).to(device, non_blocking=True)


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


class Dropping:
    """Which rows have been dropped because their images can no longer be used, and which may be.

    Whoever reads images in mid-run does it through `load`. A row that was dropped stays out, also if its file comes
    back: what is trained on would otherwise depend on when somebody looked.
    """

    def __init__(self, may_go: Iterable[int] = (), *, otherwise: str = "") -> None:
        """`may_go`: rows that may be dropped; `otherwise`: ends the error of all others."""
        self.rows: set[int] = set()
        self.may_go = {int(row) for row in may_go}
        self.otherwise = otherwise
        self.tell: Callable[[Mapping[int, str]], None] = lambda reasons: None  # is told of each row once, and why

    def left(self, rows: Rows) -> Rows:
        """Those of the rows that have not been dropped."""
        return rows[self.is_left(rows)]

    def is_left(self, rows: Rows) -> np.ndarray:
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
                if not error.reasons.keys() <= self.may_go:
                    raise OSError(f"{error}{self.otherwise}") from error
                self.rows.update(error.reasons)  # in place: others hold this set
                self.tell(error.reasons)
                if self.may_go <= self.rows:
                    raise OSError(f"{error}; no training image is left") from error
        return rows, None

    def whole(self, rows: Rows, values: np.ndarray) -> np.ndarray:
        """What was computed of the rows that are left, (m, ...), as (n, ...) of all: NaN for those dropped."""
        found = np.full((len(rows), *values.shape[1:]), np.nan)
        found[self.is_left(rows)] = values
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
        dropping: Dropping | None = None,
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
        self.dropping = dropping or Dropping()

    @property
    def dropped(self) -> set[int]:
        """The rows that have been left out since the run began; may be added to, to leave out more."""
        return self.dropping.rows

    def batches(self, order: Iterable[tuple[View, Rows]], *, num_done: int = 0) -> Iterator[Batch]:
        """One Batch for each (view, rows), without rows that have been dropped; none where all of them have been.

        `num_done`: so many batches are left out that the order has begun with, not counting those without rows.

        Raises:
            OSError: images can no longer be used, see `Dropping`.
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

    def assemble(self, rows: Rows, image: Tensor, num_views: int) -> Batch:
        """The Batch of these rows, whose share of images is given, each with so many views."""
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
            inputs={"image": image, "image_stage": self.source.stage, "num_views": num_views, **texts},
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
        image, num_views = batch.inputs["image"], batch.inputs["num_views"]
        return [self.assemble(batch.rows[s : s + size], image[s : s + size], num_views) for s in starts]


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
