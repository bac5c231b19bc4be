"""Views of decoded images, taken where the model runs.

Two kinds, S pixels per side: the evaluation view (by default short side to S, centre crop), and numbered training
views (random crop and flip), which depend on the image's content, the number of the view and the seed, and on nothing
else. Since resizing hides what quality is about, a view may also consist of several: crops of native size, with or
without the resized one in front.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from storage.messages import quoted

BICUBIC = v2.InterpolationMode.BICUBIC
INTERPOLATIONS = {"bicubic": BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}
RESIZE_MODES = ("shortest", "longest", "squash")


def grid_shape(count: int) -> tuple[int, int]:
    """Crops along the shorter and the longer side: as near to a square as `count` allows.

    4, 6, 9, 12 and 15 cover an image well, a prime is one line.
    """
    few = max(rows for rows in range(1, math.isqrt(count) + 1) if count % rows == 0)
    return few, count // few


def crop_grid(height: int, width: int, size: int, count: int) -> list[tuple[int, int]]:
    """(top, left) of `count` crops on a grid that spans the image, the longer side with more of them."""
    few, many = grid_shape(count)
    rows, columns = (few, many) if width >= height else (many, few)
    tops, lefts = (
        np.rint(np.linspace(0, side - size, number) if number > 1 else [(side - size) / 2]).astype(int).tolist()
        for side, number in ((height, rows), (width, columns))
    )
    return [(top, left) for top in tops for left in lefts]


def at_least(image: Tensor, size: int) -> Tensor:
    """The image, enlarged if its shorter side has fewer than `size` pixels."""
    return F.resize(image, [size], interpolation=BICUBIC) if min(image.shape[1:]) < size else image


class Views:
    """Takes views of decoded images: cropped and resized with v2's own kernels, flipped and normalised as a batch."""

    def __init__(
        self,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        crop_scale_min: float = 1.0,
        flip: bool = False,
        seed: int = 0,
        crops: int = 0,
        test_crops: int = 0,
        global_view: bool = False,
        resize_mode: str = "shortest",
        interpolation: str = "bicubic",
    ) -> None:
        """How views are taken.

        Args:
            crops, test_crops: views of native size in place of the resized one, or with `global_view` behind it.
            resize_mode: how a whole image becomes an evaluation view: the shorter side to S and the middle of the
                longer one, the longer side to S between black bars, or both to S, as open_clip calls them.
        """
        if resize_mode not in RESIZE_MODES or interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"resize_mode {quoted(str(resize_mode))}, interpolation {quoted(str(interpolation))}: must be of "
                f"{', '.join(RESIZE_MODES)}, and of {', '.join(INTERPOLATIONS)}"
            )
        self.resize_mode = resize_mode
        self.interpolation = INTERPOLATIONS[interpolation]
        self.crops = crops
        self.test_crops = test_crops
        self.global_view = global_view or not test_crops
        self.image_size = image_size
        self.device = device
        self.flip = flip
        self.seed = seed
        self.crop = v2.RandomResizedCrop(image_size, scale=(crop_scale_min, 1.0), interpolation=self.interpolation)
        self.scale = torch.tensor(std, device=device).mul(255).reciprocal().view(1, 3, 1, 1)
        self.shift = (torch.tensor(mean, device=device) / torch.tensor(std, device=device)).view(1, 3, 1, 1)

    @property
    def decode_size(self) -> int | None:
        """At which size images are to be decoded, see `reduction`."""
        return None if self.test_crops else self.image_size

    def count(self, view: int | None) -> int:
        """How many views of an image a training view, or the evaluation view, consists of."""
        return self.global_view + (self.test_crops if view is None else self.crops)

    def draw(self, images: Sequence[Tensor], digests: Sequence[str], view: int) -> list[tuple[dict[str, int], bool]]:
        """For each image the crop of one training view, as v2 takes it, and whether to flip."""
        drawn = []
        with torch.random.fork_rng(devices=[]):
            for image, digest in zip(images, digests, strict=True):
                entropy = hashlib.sha256(f"{self.seed} {view} {digest}".encode()).digest()
                torch.default_generator.manual_seed(int.from_bytes(entropy[:8], "big"))
                drawn.append((self.crop.make_params([image]), bool(torch.rand(()) < 0.5) and self.flip))
        return drawn

    def draw_crops(self, image: Tensor, digest: str, view: int) -> list[tuple[int, int, bool]]:
        """(top, left, flip) of an image's crops of native size in a training view."""
        entropy = hashlib.sha256(f"{self.seed} {view} {digest} crops".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(entropy[:8], "big"))
        ends = [side - self.image_size for side in image.shape[1:]]
        tops, lefts = (rng.integers(0, end, self.crops, endpoint=True).tolist() for end in ends)
        flips = (rng.random(self.crops) < 0.5) & self.flip
        return list(zip(tops, lefts, flips.tolist(), strict=True))

    def __call__(self, images: Sequence[Tensor], digests: Sequence[str], view: int | None) -> Tensor:
        """Normalised views.

        Args:
            images: B decoded images, on any device.
            digests: their content hashes.
            view: number of the training view; None is the evaluation view.

        Returns:
            (B, 3, S, S) float32 on the device; (B, V, 3, S, S) where a view consists of several.
        """
        images = [image.to(self.device, non_blocking=True) for image in images]
        parts = [self.resized(images, digests, view)[:, None]] if self.global_view else []
        if self.count(view) > self.global_view:
            parts.append(self.native(images, digests, view))
        pixels = torch.cat(parts, dim=1).float().mul_(self.scale).sub_(self.shift)
        return pixels[:, 0] if pixels.shape[1] == 1 else pixels

    def resized(self, images: Sequence[Tensor], digests: Sequence[str], view: int | None) -> Tensor:
        """Whole images, or most of them, resized: (B, 3, S, S) uint8."""
        size = [self.image_size, self.image_size]
        if view is None:
            return torch.stack([self.whole(image) for image in images])
        drawn = self.draw(images, digests, view)
        crops = [
            F.resized_crop(image, **crop, size=size, interpolation=self.interpolation)
            for image, (crop, _) in zip(images, drawn, strict=True)
        ]
        flipped = torch.tensor([flip for _, flip in drawn], device=self.device)
        pixels = torch.stack(crops)
        return torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)

    def whole(self, image: Tensor) -> Tensor:
        """The evaluation view of a whole image: (3, S, S) uint8."""
        size = [self.image_size, self.image_size]
        if self.resize_mode == "squash":
            return F.resize(image, size, interpolation=self.interpolation)
        if self.resize_mode == "shortest":
            return F.center_crop(F.resize(image, size[:1], interpolation=self.interpolation), size)
        longest = max(image.shape[1:])
        sides = [max(1, round(side * self.image_size / longest)) for side in image.shape[1:]]
        fitted = F.resize(image, sides, interpolation=self.interpolation)
        top, left = ((self.image_size - side) // 2 for side in sides)
        return F.pad(fitted, [left, top, self.image_size - sides[1] - left, self.image_size - sides[0] - top])

    def native(self, images: Sequence[Tensor], digests: Sequence[str], view: int | None) -> Tensor:
        """Crops of native size, at random places in training and on a grid otherwise: (B, V, 3, S, S) uint8."""
        size = self.image_size
        found = []
        for number, image in enumerate(images):
            image = at_least(image, size)
            if view is None:
                height, width = image.shape[1:]
                places = [(*place, False) for place in crop_grid(height, width, size, self.test_crops)]
            else:
                places = self.draw_crops(image, digests[number], view)
            crops = (image[:, top : top + size, left : left + size] for top, left, _ in places)
            flips = (flip for *_, flip in places)
            found.append(
                torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)])
            )
        return torch.stack(found)
