"""Images as a CLIP sees them; its patches are regions for those who have no features of objects.

The whole image, squeezed to a square, is looked at: what a question is about may lie at its edge.

Shapes: B images, R rows and columns of patches, K = R x R regions, F numbers that describe one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from backbones import towers
from backbones.loading import Backbone
from inputs import frozen_cache
from inputs.image_store import ImageStore
from inputs.transfer import Rows, chunks, run_ahead
from inputs.views import Views
from regions.features import Regions
from storage.feature_cache import FeatureCache
from storage.image_files import ImageFile, check_images
from storage.messages import first_five
from training.devices import Runtime

AT_ONCE = 32  # images that are decoded and looked at together
FLAG = "--features clip"  # of patches


class ClipImages(ABC):
    """What a CLIP's image tower makes of whole images, computed once and kept in a cache folder."""

    flag = FLAG  # what asks for it

    def __init__(
        self, backbone: Backbone, runtime: Runtime, paths: Mapping[str, Path], cache: FeatureCache, num_stages: int
    ) -> None:
        """Nothing is computed yet, see `fill`.

        Args:
            paths: image -> its file.
            num_stages: of the tower.
        """
        self.visual: Any = backbone.clip.visual.to(runtime.device).eval()
        self.num_stages = num_stages
        self.runtime, self.paths = runtime, paths
        preprocess = backbone.config["preprocess_cfg"]
        self.views = Views(
            image_size=backbone.image_size,
            mean=preprocess["mean"],
            std=preprocess["std"],
            device=runtime.device,
            resize_mode="squash",
            interpolation=preprocess.get("interpolation", "bicubic"),
        )
        self.encode = frozen_cache.image_encoder(self.visual, num_stages, runtime, with_statistics=False)
        self.caching = frozen_cache.build_caching(backbone.config, runtime, cache, AT_ONCE)
        self.digests: dict[str, str] = {}  # of the images that were asked for: the content of their files

    @property
    def ids(self) -> Collection[str]:
        """The images there are."""
        return self.paths.keys()

    def open(self, shape: Sequence[int], dtype: torch.dtype, kind: str) -> None:
        """The cached rows, of this shape, type and kind."""
        self.kept = self.caching.open(
            self.num_stages,
            shape,
            dtype,
            input=kind,
            weights=self.caching.fingerprint(self.visual, self.num_stages),
            regions=frozen_cache.digest_of_code("regions/clip_regions.py", "regions/whole_images.py"),
        )

    def maps(self, images: Sequence[Tensor]) -> Tensor:
        """Decoded images -> what leaves the last of those stages."""
        return self.encode(self.views(images, [""] * len(images), None))[0]

    def black(self) -> Tensor:
        """An image to learn sizes by: (3, S, S) uint8."""
        return torch.zeros(3, self.views.image_size, self.views.image_size, dtype=torch.uint8)

    @abstractmethod
    def look(self, images: Sequence[Tensor]) -> Tensor:
        """Decoded images -> the rows that are kept of them. Raises ValueError for numbers that these cannot hold."""

    def fill(self, images: Iterable[str]) -> None:
        """Compute what is missing of these images, all processes together; they are known from then on.

        Raises:
            ValueError: files are missing or damaged, or the cache folder has no room.
            OSError: files have changed since they were checked.
        """
        names, kept, num_threads = list(images), self.kept, self.runtime.num_threads
        files = check_named(names, self.paths, self.flag, num_threads)
        distinct = {file.digest: file for file in files}
        keys = list(distinct)
        store = ImageStore(list(distinct.values()), image_size=self.views.decode_size, num_threads=num_threads)
        self.visual.to(self.runtime.device)
        is_filled = self.caching.fill(
            [kept],
            lambda: len(kept.missing(keys)) * kept.row_bytes,
            lambda: np.array(kept.missing(keys), dtype=int),
            partial(self.compute, store),
        )
        self.visual.cpu()  # training needs the GPU's memory
        if not is_filled:
            needed = len(kept.missing(keys)) * kept.row_bytes / 1e9
            raise ValueError(f"--cache_dir {kept.folder.parent}: has no room for {needed:.1f} GB of what CLIP sees")
        self.digests |= {name: file.digest for name, file in zip(names, files, strict=True)}

    def compute(self, store: ImageStore, rows: Rows) -> None:
        """Add what is missing of some of the store's images. Raises as `fill` does."""

        def load(part: Rows) -> tuple[list[str], list[Tensor]]:
            return [store.files[row].digest for row in part], store.load(part, keep=False)

        with tqdm(total=len(rows), unit="img", leave=False, disable=self.runtime.hide_progress) as bar:
            for keys, decoded in run_ahead(load, chunks(rows, AT_ONCE), self.runtime.num_ahead):
                self.kept.add(keys, self.look(decoded))
                bar.update(len(keys))
        self.kept.flush()


class PatchRegions(ClipImages):
    """The patches of images as regions; see `features.RegionFiles`."""

    def __init__(
        self, backbone: Backbone, runtime: Runtime, paths: Mapping[str, Path], cache: FeatureCache, *, most: int
    ) -> None:
        """As `ClipImages`.

        Args:
            most: regions of an image; a finer grid of patches is averaged to one that has no more.

        Raises:
            ValueError: the tower cannot be taken apart.
        """
        super().__init__(backbone, runtime, paths, cache, stages_with_patches(backbone.clip.visual))
        _, self.width, side, _ = as_map(self.maps([self.black()])).shape
        self.rows = max(1, min(side, math.isqrt(most)))
        self.boxes = grid(self.rows)
        self.open((self.rows**2, self.width), torch.float16, "patches")

    def count(self, image: str) -> int:
        """See `features.RegionFiles`."""
        return len(self.boxes)

    def look(self, images: Sequence[Tensor]) -> Tensor:
        """Decoded images -> (B, K, F) float16. Raises ValueError for numbers that this cannot hold."""
        x = pooled(self.maps(images), self.rows)
        if not x.isfinite().all():
            raise ValueError(f"{FLAG}: this CLIP's patches are not finite in half precision; choose another")
        return x

    def read(self, image: str) -> Regions:
        """See `features.RegionFiles`; an image that `fill` was not asked for is not there."""
        return Regions(self.kept.stack([self.digests[image]])[0].float().numpy(), self.boxes)


def check_named(names: Sequence[str], paths: Mapping[str, Path], flag: str, num_threads: int) -> list[ImageFile]:
    """Read the files of named images once. Raises ValueError, by the flag, for those that are missing or damaged."""
    if unknown := [name for name in names if name not in paths]:
        raise ValueError(f"{flag}: {len(unknown)} of {len(names)} images are not there: {first_five(unknown)}")
    return check_images([paths[name] for name in names], num_threads=num_threads)


def stages_with_patches(visual: Any) -> int:
    """How many stages of an image tower lead to its patches: all, or all but the last if that keeps their number.

    Being followed by pooling, the last block of a transformer or an EfficientNet has let go of where things are, and
    may compute the pooled token alone. That of a ResNet or ConvNeXt halves the grid, and is looked at.

    Raises ValueError for a tower that cannot be taken apart, or has too few blocks.
    """
    blocks = towers.staged_blocks(visual)
    parts = [part for block in blocks[-1:] for part in block.modules() if isinstance(part, (nn.Conv2d, nn.AvgPool2d))]
    num = len(blocks) - all(part.stride in (1, (1, 1)) for part in parts)
    if num < 1:
        raise ValueError(f"{FLAG}: this CLIP's image tower has no patches that can be read; choose another")
    return num


def as_map(x: Tensor) -> Tensor:
    """What leaves a stage that has patches, tokens (B, 1 + N, F) or already a map -> (B, F, rows, columns)."""
    if x.ndim == 4:
        return x
    side = math.isqrt(x.shape[1] - 1)
    return x[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # the class token comes first


def pooled(x: Tensor, rows: int) -> Tensor:
    """The same -> (B, K, F) float16, averaged to a grid of that many rows."""
    return F.adaptive_avg_pool2d(as_map(x).float(), rows).flatten(2).transpose(1, 2).half()


def grid(rows: int) -> NDArray[np.float32]:
    """(K, 4) boxes of a square grid, row by row."""
    edges = np.arange(rows + 1, dtype=np.float32) / rows
    return np.array(
        [[edges[x], edges[y], edges[x + 1], edges[y + 1]] for y in range(rows) for x in range(rows)], dtype=np.float32
    )
