"""A scorer that many may ask at the same time: what comes together is scored in one batch.

Gradio can batch too, but what is wrong with one visitor's upload is then the answer to all of a batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from serving.scorer import Scorer

MOST_AT_ONCE = 32  # images after which a batch takes no further request, and the most of one request

Images = Sequence[str | Path | Image.Image]


class Answer(NamedTuple):
    """Scores as `Scorer.score` gives them, and those of the prompts that the model could not read to their end."""

    table: pd.DataFrame
    cut: set[str]


@dataclass(frozen=True)
class Request:
    """Images with a prompt for each, and where the answer will be."""

    images: Images
    prompts: Sequence[str]
    answer: Future[Answer] = field(default_factory=Future)


class SharedScorer(Scorer):
    """A scorer for many threads. One of its own scores, first come, first served; `close` ends it."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.is_closing = False
        self.thread = threading.Thread(target=self.work, name="scorer", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End when what was asked before has been answered."""
        self.requests.put(None)
        self.thread.join()

    def ask(self, image: str | Path | Image.Image, prompt: str) -> Future[Answer]:
        """The scores of one image, not clamped, as soon as they are there. Raises ValueError."""
        request = Request([image], self.texts(1, [prompt]))
        self.requests.put(request)
        return request.answer

    def answer(
        self,
        images: Images,
        prompts: Sequence[str] | str | None,
        progress: Callable[[int], object] = lambda num_images: None,
        *,
        clamp: bool = True,
    ) -> Answer:
        """Score any number of images, a piece at a time, so that others come in between; waits. See `Scorer.score`."""
        texts = self.texts(len(images), prompts)
        if not texts:
            return Answer(super().score([]), set())
        tables, cut = [], set[str]()
        for start in range(0, len(images), MOST_AT_ONCE):
            piece = slice(start, start + MOST_AT_ONCE)
            request = Request(images[piece], texts[piece])
            self.requests.put(request)
            found = request.answer.result()
            tables.append(found.table)
            cut |= found.cut
            progress(len(found.table))  # which may raise, and so end the job
        table = pd.concat(tables, ignore_index=True)
        return Answer(self.clamped(table) if clamp else table, cut)

    def score(
        self,
        images: Images,
        prompts: Sequence[str] | str | None = None,
        *,
        batch_size: int = MOST_AT_ONCE,
        num_workers: int | None = None,
        progress: Callable[[int], object] | None = None,
        clamp: bool = True,
    ) -> pd.DataFrame:
        """See `Scorer.score`; how many are scored at once, and with how many threads, is not for the asker to say."""
        return self.answer(images, prompts, progress or (lambda num_images: None), clamp=clamp).table

    def work(self) -> None:
        """Answer requests, as many at a time as have come, until `close`."""
        while not self.is_closing:
            batch: list[Request] = []
            while sum(len(request.images) for request in batch) < MOST_AT_ONCE:
                if batch and self.requests.empty():
                    break
                request = self.requests.get()
                if request is None:
                    self.is_closing = True
                    break
                if request.answer.set_running_or_notify_cancel():  # otherwise nobody waits for it any more
                    batch.append(request)
            if batch:
                self.answer_batch(batch)

    def answer_batch(self, batch: Sequence[Request]) -> None:
        """Score what several have asked for together; if that fails, each alone, so that no other is troubled by it."""
        images = [image for request in batch for image in request.images]
        prompts = [prompt for request in batch for prompt in request.prompts]
        try:
            table = self.score_texts(images, prompts, batch_size=MOST_AT_ONCE, clamp=False)
            cut = self.cut_among(set(prompts)) if self.num_truncated else set()
        except Exception as error:  # noqa: BLE001  # whatever it is, whoever has asked gets it
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
            else:
                for request in batch:
                    self.answer_batch([request])
            return
        start = 0
        for request in batch:
            own = table.iloc[start : start + len(request.images)].reset_index(drop=True)
            request.answer.set_result(Answer(own, cut & set(request.prompts)))
            start += len(own)

    def cut_among(self, prompts: set[str]) -> set[str]:
        """Those of the prompts that have more to them than the model reads."""
        found = set()
        for prompt in prompts:
            self.text_table([prompt])
            if self.num_truncated:
                found.add(prompt)
        return found
