"""A trained run as a scorer: images and prompts in, scores in MOS units out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import models
from backbones import build, loading, tokenizers, towers
from inputs import image_sources, transfer
from inputs.batches import Batch, BatchOrder, Feed
from inputs.decoding import decode, decode_all
from inputs.texts import LevelledTexts, TextTable
from inputs.views import Views
from serving import hub
from sources import examples
from sources.scores import TASKS, columns_of
from storage.image_files import read_file
from storage.messages import first_five
from training import checkpoints, devices, loop

AnyScorer = TypeVar("AnyScorer", bound="Scorer")


class LoosePixels:
    """Evaluation views of files or Pillow images, each decoded when it is needed."""

    stage = 0

    def __init__(self, images: Sequence[str | Path | Image.Image], views: Views, num_threads: int) -> None:
        self.images = images
        self.views = views
        self.num_threads = num_threads

    def count(self, view: image_sources.View) -> int:
        """How many views of an image are given."""
        return self.views.count(view)

    def prepare(self, rows: transfer.Rows, view: image_sources.View) -> list[Tensor]:
        """Decoded images. Raises OSError that counts all images that cannot be read and names the first five."""
        try:
            decoded = decode_all([self.images[row] for row in rows], self.views.decode_size, self.num_threads)
        except OSError as error:
            with ThreadPoolExecutor(max(1, self.num_threads)) as pool:
                problems = [problem for problem in pool.map(self.problem, range(len(self.images))) if problem]
            found = f"{len(problems)} of {len(self.images)} images cannot be read: {first_five(problems)}"
            raise OSError(found if problems else f"an image could not be read at first ({error})") from error
        return [transfer.pinned(image, self.views.device) for image in decoded]

    def problem(self, row: int) -> str:
        """Name of an image that cannot be read, and why; "" for one that can."""
        image = self.images[row]
        name = f"image {row + 1}" if isinstance(image, Image.Image) else str(image)
        try:
            decode(image if isinstance(image, Image.Image) else read_file(image), self.views.decode_size)
        except OSError as error:
            return f"{name} ({error})"
        return ""

    def finish(self, prepared: list[Tensor], rows: transfer.Rows, view: image_sources.View) -> dict[str, Tensor]:
        """ "image": (B, 3, S, S) normalised pixels; (B, V, 3, S, S) of several views."""
        return {"image": self.views(prepared, [], None)}


class Scorer:
    """A trained model with all it needs: pixels and prompts in, scores in MOS units out."""

    def __init__(
        self,
        model: models.ScoreModel,
        tokenizer: tokenizers.Tokenizer,
        description: dict[str, Any],
        *,
        device: str,
        amp: str,
    ) -> None:
        self.runtime = devices.settle_precision(devices.start_runtime(device, amp), amp, model.clip.visual)
        self.model = model.to(self.runtime.device)
        self.tokenizer = tokenizer
        self.description = description
        self.num_truncated = 0
        self.scales = {task: examples.LabelScale(**scale) for task, scale in description["scales"].items()}

    @property
    def has_levels(self) -> bool:
        """Whether the scores start from levels, so that every image needs texts."""
        return getattr(self.model.heads, "temperature", None) is not None

    @classmethod
    def load(cls: type[AnyScorer], path: str | Path, *, device: str = "auto", amp: str = "off") -> AnyScorer:
        """Load RUN/best, RUN itself, or hf-hub:ORG/NAME. Raises ValueError if it is no checkpoint, or is damaged."""
        place = hub.local_folder(path)
        models.check_checkpoint(place)
        folder, state, description = checkpoints.load_weights(place)
        try:
            with build.UndrawnWeights():  # loaded next; drawing them would take a second for a ViT-L-14
                backbone = loading.rebuild_backbone(description["clip"], folder, image_size=description["image_size"])
                model = models.build_model(backbone.clip, **description["model"])
            model.load_state_dict(state)
            return cls(model, backbone.tokenizer, description, device=device, amp=amp)
        except torch.OutOfMemoryError:
            raise
        except models.BUILD_ERRORS as error:
            raise models.description_error(folder, error) from error

    def score(
        self,
        images: Sequence[str | Path | Image.Image],
        prompts: Sequence[str] | str | None = None,
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        progress: Callable[[int], object] | None = None,
        clamp: bool = True,
    ) -> pd.DataFrame:
        """Score images. Under torchrun every process scores what it is given, for itself.

        Args:
            images: paths or PIL images, of any size and mode.
            prompts: one per image, one for all, or None for quality alone. Empty texts count as none. Texts beyond
                CLIP's context length are cut; `num_truncated` holds how many that were.
            num_workers: threads that decode images; None: one per core, at most 16.
            progress: is told the number of images after each batch.
            clamp: keep scores within the scale, as people expect; clamping ties scores that differ.

        Returns:
            One row per image: pred_quality, pred_align and further scores in MOS units, NaN for what the model was
            not trained on or has no prompt for.

        Raises:
            ValueError: the numbers of images and prompts differ, or there is nothing that can be scored.
            OSError: images cannot be read; all are counted, the first five named.
        """
        texts = self.texts(len(images), prompts)
        return self.score_texts(
            images, texts, batch_size=batch_size, num_workers=num_workers, progress=progress, clamp=clamp
        )

    def score_texts(
        self,
        images: Sequence[str | Path | Image.Image],
        texts: Sequence[str],
        *,
        batch_size: int,
        num_workers: int | None = None,
        progress: Callable[[int], object] | None = None,
        clamp: bool = True,
    ) -> pd.DataFrame:
        """As `score`, with a text for each image, which may all be empty: a part of a table whose others are not."""
        self.num_truncated = 0
        columns = {task: columns_of(task)[1] for task in dict.fromkeys([*TASKS, *self.scales])}
        table = pd.DataFrame(np.nan, index=range(len(images)), columns=list(columns.values()))
        if not len(images):
            return table
        has_prompt = np.array([bool(text.strip()) for text in texts])
        pixels = self.pixels(images, num_workers)
        feed = Feed(
            pixels=pixels,
            device=self.runtime.device,
            targets={},
            prompts=self.text_table(texts) if has_prompt.any() or self.has_levels else None,
            num_ahead=self.runtime.num_ahead,
        )
        at_once = max(1, batch_size // pixels.count(None))  # as many views as otherwise images
        order = BatchOrder(np.arange(len(images)), batch_size=at_once)
        batches = reported(feed.batches(order), progress or (lambda num_images: None))
        alone = replace(self.runtime, rank=0, world=1)
        scores = loop.predict(self.model, batches, models.score_batch, runtime=alone)
        for task, scale in self.scales.items():
            if task in scores:
                table[columns[task]] = scale.to_mos(scores[task])
        table.loc[~has_prompt, columns["c"]] = np.nan
        return self.clamped(table) if clamp else table

    def texts(self, num_images: int, prompts: Sequence[str] | str | None) -> list[str]:
        """A prompt for each image, "" for none. Raises ValueError, see `score`."""
        prompts = "" if prompts is None else prompts
        texts = [prompts] * num_images if isinstance(prompts, str) else list(prompts)
        if len(texts) != num_images:
            raise ValueError(f"{num_images} images but {len(texts)} prompts: give one for each, one for all, or none")
        if texts and "q" not in self.scales and not any(text.strip() for text in texts):
            raise ValueError("this model was trained on consistency alone: give it prompts")
        return texts

    def clamped(self, table: pd.DataFrame) -> pd.DataFrame:
        """The same scores within their scales."""
        columns = {columns_of(task)[1]: scale for task, scale in self.scales.items()}
        return table.assign(**{column: scale.clamp(table[column].to_numpy()) for column, scale in columns.items()})

    def pixels(self, images: Sequence[str | Path | Image.Image], num_workers: int | None) -> LoosePixels:
        """The source of evaluation views."""
        return LoosePixels(images, self.views(), self.runtime.num_threads if num_workers is None else num_workers)

    def views(self) -> Views:
        """How images are looked at."""
        return Views(
            image_size=self.description["image_size"],
            device=self.runtime.device,
            test_crops=self.description.get("test_crops", 0),
            global_view=self.model.global_view,
            **self.description["clip"]["preprocess_cfg"],
        )

    def text_table(self, texts: Sequence[str]) -> TextTable:
        """The prompts, tokenised, with their levels if the model reads them."""
        trim = towers.trims_exactly(self.model.clip.text)
        if self.has_levels:
            return LevelledTexts(texts, self.tokenize, self.runtime.device, trim=trim, **models.LEVEL_TEXTS)
        return TextTable(texts, self.tokenize, self.runtime.device, trim=trim)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (P, N) token ids; counts those that had to be cut."""
        tokens, self.num_truncated = tokenizers.tokenize(self.tokenizer, texts, self.model.clip.context_length)
        return tokens


def reported(batches: Iterator[Batch], progress: Callable[[int], object]) -> Iterator[Batch]:
    """The batches, unchanged; tells the size of each once it has been worked on."""
    for batch in batches:
        yield batch
        progress(len(batch))
