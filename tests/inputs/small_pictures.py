"""Pictures and their files, and views of plain ones. No tests: these import it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inputs.views import Views


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture_of(kind: str, width: int, height: int) -> Image.Image:
    """Noise, or a few colours that flow into each other and one black bar with sharp edges."""
    rng = np.random.default_rng(0)
    if kind == "noisy":
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    colours = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    pixels = np.array(colours.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 3 + height // 40, width // 4 : width // 2] = 0
    return Image.fromarray(pixels)


def save_as(path: Path, picture: Image.Image, kind: str, orientation: int = 1) -> Path:
    """Write a picture with an EXIF orientation."""
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"compress_level": 1}
    path.write_bytes(encoded(picture, kind, exif=exif, **options))
    return path


CPU = torch.device("cpu")


def grey_views(**options: Any) -> Views:
    """Views whose values are grey levels, 0 to 255."""
    usual = {"image_size": 32, "mean": [0.0] * 3, "std": [1 / 255] * 3, "device": CPU, "seed": 1}
    return Views(**{**usual, "crop_scale_min": 0.5, "flip": True, **options})
