"""The patches of an image as a CLIP sees them: regions for those who have no features of objects.

The whole image, squeezed to a square, is looked at: what a question is about may lie at its edge.

Shapes: B images, S pixels per side, R rows and columns of patches, K = R x R regions, F numbers that describe one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from backbones import towers
from backbones.loading import Backbone
from inputs import frozen_cache
from inputs.decoding import as_tensor, decode
from inputs.transfer import chunks
from inputs.views import Views
from regions.features import Regions
from storage.feature_cache import FeatureCache, FeatureSet
from storage.image_files import read_file
from storage.messages import first_five
from training.devices import Runtime

AT_ONCE = 32  # images through the tower


class PatchRegions:
    """Regions of images, computed by a CLIP once and kept in a cache folder.

    Args:
        paths: image -> its file.
        most: regions of an image; a finer grid of patches is averaged to one that has no more.
    """

    def __init__(
        self, backbone: Backbone, runtime: Runtime, paths: Mapping[str, Path], cache: FeatureCache, *, most: int
    ) -> None:
        """Raises ValueError for a tower that cannot be taken apart."""
        self.visual: Any = backbone.clip.visual.to(runtime.device).eval()
        blocks = towers.staged_blocks(self.visual)
        if not blocks:
            raise ValueError("--features clip: this CLIP's image tower has no patches that can be read; choose another")
        # The last block of a transformer may compute its pooled token alone.
        self.num_stages = len(blocks) if towers.convolutions(self.visual) else len(blocks) - 1
        self.runtime, self.paths, self.cache = runtime, paths, cache
        preprocess = backbone.config["preprocess_cfg"]
        self.views = Views(
            image_size=backbone.image_size,
            mean=preprocess["mean"],
            std=preprocess["std"],
            device=runtime.device,
            resize_mode="squash",
            interpolation=preprocess.get("interpolation", "bicubic"),
        )
        self.most_rows = max(1, int(most**0.5))
        black = torch.zeros(3, backbone.image_size, backbone.image_size, dtype=torch.uint8)
        self.width = self.look([black]).shape[2]
        self.boxes = grid(self.rows)
        self.digests: dict[str, str] = {}
        recipe = {
            **frozen_cache.identity(backbone.config, runtime),
            "what": "patches",
            "weights": frozen_cache.fingerprint(self.visual, self.num_stages),
            "stages": self.num_stages,
            "image_size": backbone.image_size,
        }
        self.kept: FeatureSet = cache.open(recipe, (self.rows**2, self.width), torch.float16)

    @property
    def ids(self) -> Collection[str]:
        """The images there are."""
        return self.paths.keys()

    @torch.inference_mode()
    def look(self, images: Sequence[Tensor]) -> Tensor:
        """Decoded images -> (B, K, F) float32."""
        with self.runtime.autocast():
            pixels = self.views(images, [""] * len(images), None)
            x, _ = towers.run_observed(self.visual, pixels, 0, self.num_stages, with_statistics=False)
        if x.ndim == 3:  # tokens, the class token first
            side = round((x.shape[1] - 1) ** 0.5)
            x = x[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        self.rows = min(x.shape[2], self.most_rows)
        return F.adaptive_avg_pool2d(x.float(), self.rows).flatten(2).transpose(1, 2)

    def fill(self, images: Iterable[str]) -> None:
        """Compute what is missing of these images. Raises ValueError for files that cannot be read."""
        names, wrong = list(images), []
        for name in names:
            try:
                self.digests[name] = hashlib.sha256(read_file(self.paths[name])).hexdigest()
            except OSError as error:
                wrong.append(f"{self.paths[name]} ({error})")
        if wrong:
            raise ValueError(f"--features clip: {len(wrong)} image(s) cannot be read: {first_five(wrong)}")
        runtime, kept = self.runtime, self.kept
        keys = {self.digests[name]: name for name in names}
        room = len(kept.missing(list(keys))) * kept.row_bytes
        with self.cache.alone([kept]) if runtime.is_main and room else nullcontext():
            if not runtime.of_main(lambda: not room or self.cache.make_room(room)):
                raise ValueError(f"--cache_dir {self.cache.folder}: has no room for {room / 1e9:.1f} GB of regions")
            if runtime.is_main:
                self.compute(keys)
        runtime.barrier()
        kept.refresh()

    def compute(self, keys: Mapping[str, str]) -> None:
        """Add the regions of images (content -> name) that are missing."""
        order = list(keys)
        todo = [order[place] for place in self.kept.missing(order)]
        with tqdm(total=len(todo), unit="img", leave=False, disable=self.runtime.hide_progress) as bar:
            for part in chunks(np.array(todo), AT_ONCE):
                images = []
                for key in part:
                    path = self.paths[keys[key]]
                    try:
                        images.append(as_tensor(decode(read_file(path), self.views.decode_size)))
                    except OSError as error:
                        raise ValueError(f"--features clip: {path}: cannot be read ({error})") from None
                self.kept.add(part.tolist(), self.look(images))
                bar.update(len(part))
        self.kept.flush()

    def read(self, image: str) -> Regions:
        """See `features.RegionFiles`."""
        return Regions(self.kept.stack([self.digests[image]])[0].float().numpy(), self.boxes)


def grid(rows: int) -> NDArray[np.float32]:
    """(K, 4) boxes of a square grid, row by row."""
    edges = np.arange(rows + 1, dtype=np.float32) / rows
    return np.array(
        [[edges[x], edges[y], edges[x + 1], edges[y + 1]] for y in range(rows) for x in range(rows)], dtype=np.float32
    )
