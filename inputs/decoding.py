"""From an image file to decoded pixels, a (3, H, W) uint8 tensor; a far larger image than is needed is reduced."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storage.image_files import Source, opened, to_rgb

MAX_REDUCTION = 8  # what JPEG decoders offer: a half, a quarter, an eighth of the size
# Where an image is so large that a half of it still has three times the pixels per side that the model sees, it is
# decoded at that half: Pillow's documentation calls the difference after resizing indistinguishable from 3 on.
REDUCING_GAP = 3


def reduction(size: tuple[int, int], image_size: int | None) -> int:
    """1, 2, 4 or 8: at which fraction an image of this width and height is decoded for views of `image_size`.

    None stands for views of native size: everything is decoded whole.
    """
    factor = 1
    while image_size and 2 * factor <= MAX_REDUCTION and min(size) >= 2 * factor * REDUCING_GAP * image_size:
        factor *= 2
    return factor


def load_image(source: Source, image_size: int | None = None) -> Image.Image:
    """Any image as upright 8-bit RGB, see `image_files.to_rgb`.

    Args:
        image_size: what views will be taken at; a far larger image is reduced, see `reduction`. None never does.

    Raises:
        OSError: it cannot be read, see `image_files.opened`.
    """
    with opened(source) as image:
        factor = reduction(image.size, image_size)
        reduced = tuple(math.ceil(side / factor) for side in image.size)
        if factor > 1:  # a JPEG decoder can skip detail; other formats ignore it
            width, height = image.size
            image.draft(None, (width // factor, height // factor))  # rounded up, it would choose a larger fraction
        upright = to_rgb(image)
    done = sorted(upright.size) == sorted(reduced)  # a rotation may have swapped the sides
    return upright if done else upright.reduce(factor)


def decode(source: Source, image_size: int | None) -> np.ndarray:
    """(H, W, 3) uint8 pixels of an image for views of `image_size`. Raises OSError."""
    return np.array(load_image(source, image_size))


def as_tensor(pixels_HW3: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 array -> (3, H, W) tensor that shares its memory."""
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1)


def decode_all(sources: Sequence[Source], image_size: int | None, num_threads: int) -> list[Tensor]:
    """Decode files or Pillow images that are needed once. Raises OSError."""
    load: Callable[[Any], Tensor] = lambda source: as_tensor(decode(source, image_size))  # noqa: E731
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        return list(pool.map(load, sources))
