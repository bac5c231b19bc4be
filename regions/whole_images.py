"""Images as a whole, with the questions about them: what the coarse branch is given to read.

Shapes: Q questions of a fold, U different ones, B of a batch, I images, E width of a CLIP's embeddings, S pixels of a
side; L tokens of a question, A answers of T tokens, K right answers of the questions of a batch, k answers that were
tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from backbones import towers
from backbones.loading import Backbone
from inputs import frozen_cache
from inputs.image_store import ImageStore
from inputs.texts import TextTable
from inputs.transfer import Rows, chunks, trimmed
from inputs.views import Views
from regions.clip_regions import ClipImages, check_named
from storage.feature_cache import FeatureCache, key_of
from training.devices import Runtime

FLAG = "--branches coarse"
MOST_DECODED = 2e9  # bytes of decoded images that are kept in memory


class CoarseInputs(Protocol):
    """What the coarse branch reads of the questions of a fold."""

    def read(self, rows: Rows, images: Sequence[str]) -> dict[str, Any]:
        """Rows of the fold, and the images that these are about, each once -> arguments of the branch."""


class ClipEmbeddings(ClipImages):
    """Embeddings of images and texts by a frozen CLIP, of length 1."""

    flag = FLAG

    def __init__(self, backbone: Backbone, runtime: Runtime, paths: Mapping[str, Path], cache: FeatureCache) -> None:
        """Nothing is computed yet, see `fill`. `paths`: image -> its file."""
        super().__init__(backbone, runtime, paths, cache, towers.num_stages(backbone.clip.visual))
        self.text, self.tokenizer = backbone.clip.text.requires_grad_(False), backbone.tokenizer
        self.width = backbone.embed_dim
        self.open((self.width,), torch.float32, "embedding")

    def look(self, images: Sequence[Tensor]) -> Tensor:
        """Decoded images -> (B, E)."""
        return F.normalize(self.maps(images).float(), dim=-1)

    def read(self, images: Sequence[str]) -> Tensor:
        """(I, E) of images that `fill` was asked for."""
        return self.kept.stack([self.digests[image] for image in images])

    def embed(self, texts: Sequence[str]) -> tuple[Tensor, NDArray[np.int64]]:
        """(U, E) of the distinct ones of some texts, embedded once and kept, and which of these each text is (n,).

        Raises:
            ValueError: there is no room.
        """
        device = self.runtime.device
        table = TextTable(texts, self.tokenizer, device, trim=towers.trims_exactly(self.text))
        if said := frozen_cache.cache_texts(self.caching, self.text.to(device).eval(), table):
            raise ValueError(f"{FLAG}: embeddings of {len(texts):,} texts: {said}")
        assert table.activations is not None
        return F.normalize(table.activations.float(), dim=-1).cpu(), table.text_of_row


@dataclass(frozen=True)
class EmbeddedQuestions:
    """Questions and images as embeddings; see `CoarseInputs`."""

    images: ClipEmbeddings
    texts_UE: Tensor
    text_of_Q: NDArray[np.int64]

    def read(self, rows: Rows, images: Sequence[str]) -> dict[str, Any]:
        """See `CoarseInputs`."""
        return {
            "image_IE": self.images.read(images).numpy(),
            "question_BE": self.texts_UE[self.text_of_Q[rows]].numpy(),
        }


class Pixels:
    """Whole images, squeezed to squares and normalised as CLIP's are, read whenever they are asked for."""

    def __init__(self, paths: Mapping[str, Path], image_size: int, runtime: Runtime) -> None:
        """Nothing is read yet, see `fill`. `paths`: image -> its file."""
        self.paths, self.runtime = paths, runtime
        self.views = Views(
            image_size=image_size,
            mean=OPENAI_DATASET_MEAN,
            std=OPENAI_DATASET_STD,
            device=runtime.device,
            resize_mode="squash",
        )
        self.digests: dict[str, str] = {}

    @property
    def ids(self) -> Collection[str]:
        """The images there are."""
        return self.paths.keys()

    def fill(self, images: Iterable[str]) -> None:
        """Make sure that images can be read. Raises ValueError for those that are missing or damaged."""
        names, num_threads = list(images), self.runtime.num_threads
        files = check_named(names, self.paths, FLAG, num_threads)
        self.row_of = {name: row for row, name in enumerate(names)}
        self.digests = {name: file.digest for name, file in zip(names, files, strict=True)}
        self.store = ImageStore(
            files, image_size=self.views.decode_size, num_threads=num_threads, max_memory=MOST_DECODED
        )

    def read(self, images: Sequence[str]) -> Tensor:
        """(I, 3, S, S) of images that `fill` was asked for. Raises OSError if they have changed since."""
        decoded = self.store.load([self.row_of[image] for image in images])
        return self.views(decoded, [self.digests[image] for image in images], None)


@dataclass(frozen=True)
class WordedQuestions:
    """Questions and their right answers as tokens, padded on the right, and images as pixels; see `CoarseInputs`."""

    images: Pixels
    tokens_QL: NDArray[np.int64]
    answers_AT: NDArray[np.int64]
    targets_QA: scipy.sparse.csr_array | None  # the accuracy of each answer; None: unknown

    def read(self, rows: Rows, images: Sequence[str]) -> dict[str, Any]:
        """See `CoarseInputs`."""
        found = {"pixels_ICHW": self.images.read(images), "tokens_BL": trimmed(self.tokens_QL[rows])}
        if self.targets_QA is None:
            return found
        own = self.targets_QA[rows].tocoo()
        answers_K, weights_K, questions_K = own.col, own.data, own.row
        if not len(answers_K):  # all weights of a network that learns must have a gradient, if one of 0
            answers_K, weights_K, questions_K = (np.zeros(1, dtype=part.dtype) for part in (own.col, own.data, own.row))
        return found | {
            "right_KT": trimmed(self.answers_AT[answers_K]),
            "weights_K": weights_K.astype(np.float32),
            "questions_K": questions_K.astype(np.int64),
        }


@dataclass(frozen=True)
class RankedQuestions:
    """The answers that a frozen X-VLM tries, and their log-probabilities; see `CoarseInputs`."""

    tried_Qk: NDArray[np.int64]
    log_p_Qk: NDArray[np.float32]

    def read(self, rows: Rows, images: Sequence[str]) -> dict[str, Any]:
        """See `CoarseInputs`."""
        return {"tried_Bk": self.tried_Qk[rows], "log_p_Bk": self.log_p_Qk[rows]}


@torch.inference_mode()
def rank_once(
    asked: WordedQuestions,
    images_Q: Sequence[str],
    rank: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    caching: frozen_cache.Caching,
    num_tried: int,
    **recipe: Any,
) -> RankedQuestions:
    """What a frozen X-VLM makes of questions about images, computed once and kept.

    Args:
        images_Q: the image of each question.
        rank: tokens (B, L), pixels (I, 3, S, S) and the image of each (B,) -> answers tried and log-probabilities.
        recipe: what it depends on but for question and image.

    Raises:
        ValueError: there is no room.
    """
    # In float64, which holds both the numbers of answers and float32.
    kept = caching.cache.open({**caching.identity, **recipe}, (2, num_tried), torch.float64)
    digests = asked.images.digests
    keys = [key_of(row[row > 0].tolist(), digests[image]) for row, image in zip(asked.tokens_QL, images_Q, strict=True)]
    device = caching.runtime.device

    def wanted() -> Rows:
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        rows = np.array([first[key] for key in dict.fromkeys(keys) if key not in kept.places], dtype=int)
        return rows[np.argsort([digests[images_Q[row]] for row in rows], kind="stable")]

    def compute(rows: Rows) -> None:
        for part in chunks(rows, caching.batch_size):
            place_of = {name: place for place, name in enumerate(dict.fromkeys(images_Q[row] for row in part))}
            images_B = torch.tensor([place_of[images_Q[row]] for row in part], device=device)
            tokens = torch.from_numpy(trimmed(asked.tokens_QL[part])).to(device)
            with caching.runtime.autocast():
                tried, log_p = rank(tokens, asked.images.read(list(place_of)), images_B)
            kept.add([keys[row] for row in part], torch.stack([tried.double(), log_p.double()], dim=1))
        kept.flush()

    if not caching.fill([kept], lambda: len(wanted()) * kept.row_bytes, wanted, compute):
        needed = len(wanted()) * kept.row_bytes / 1e9
        raise ValueError(f"--cache_dir {kept.folder.parent}: has no room for {needed:.1f} GB of X-VLM's answers")
    tried_Qk, log_p_Qk = kept.stack(keys).unbind(dim=1)
    return RankedQuestions(tried_Qk.long().numpy(), log_p_Qk.float().numpy())
