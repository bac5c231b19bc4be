"""`sharing/templates`: short scripts of few libraries, which do to the bit what is done here with an image."""

from __future__ import annotations

import ast
import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from exported import NEEDED, script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from inputs.decoding import as_tensor, decode
from inputs.views import INTERPOLATIONS, RESIZE_MODES, Views, grid_shape
from sharing.folder import TEMPLATES
from storage.image_files import FORMATS

SIZE = 24
SIDES = st.integers(1, 150)


@pytest.mark.parametrize("name", NEEDED)
def test_a_script_is_short_and_needs_few_libraries(name):
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    needed = {module.__name__ for module in NEEDED[name]}
    assert names - sys.stdlib_module_names - {"pixels"} == needed - ({"PIL"} if "pixels" in names else set())


@settings(max_examples=60)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(list(INTERPOLATIONS)), st.integers(0, 2**32 - 1))
def test_it_resizes_as_torchvision_to_the_bit(height, width, new_height, new_width, kind, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = F.resize(as_tensor(pixels), [new_height, new_width], interpolation=v2.InterpolationMode(kind))
    found = script("pixels.py")["resize"](pixels, (new_height, new_width), kind)
    np.testing.assert_array_equal(found, expected.permute(1, 2, 0).numpy())


@settings(max_examples=150)
@given(
    st.tuples(SIDES, SIDES),
    st.sampled_from(RESIZE_MODES),
    st.sampled_from(list(INTERPOLATIONS)),
    st.integers(0, 9),
    st.booleans(),
)
def test_it_takes_the_views_that_the_scorer_takes(sides, mode, interpolation, crops, whole):
    pixels = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    settings_ = {"test_crops": crops, "global_view": whole, "resize_mode": mode, "interpolation": interpolation}
    views = Views(image_size=SIZE, mean=[0, 0, 0], std=[1, 1, 1], device=torch.device("cpu"), **settings_)
    expected = (views([as_tensor(pixels)], [], None).reshape(-1, 3, SIZE, SIZE) * 255).round()
    grid = grid_shape(crops) if crops else None
    found = script("pixels.py")["take_views"](pixels, SIZE, mode, interpolation, views.global_view, grid)
    np.testing.assert_array_equal(found, expected.permute(0, 2, 3, 1).numpy().astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int, height: int) -> Image.Image:
    """Colours that flow into each other."""
    few = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def images(kind: str) -> bytes:
    """A file of each kind that decoding treats in its own way."""
    plain = picture(300, 200)
    alpha = Image.fromarray(np.linspace(0, 255, 300 * 200).reshape(200, 300).astype(np.uint8))
    grey16 = Image.fromarray((np.arange(300 * 200).reshape(200, 300) % 65536).astype(np.uint16))
    clear = plain.copy()
    clear.putalpha(alpha)
    made = {
        "jpeg": lambda: encoded(plain, "JPEG"),
        "cmyk jpeg": lambda: encoded(plain.convert("CMYK"), "JPEG"),
        "grey jpeg": lambda: encoded(plain.convert("L"), "JPEG"),
        "png": lambda: encoded(plain, "PNG"),
        "transparent": lambda: encoded(clear, "PNG"),
        "transparent grey": lambda: encoded(clear.convert("LA"), "PNG"),
        "palette": lambda: encoded(plain.quantize(16), "PNG"),
        "transparent palette": lambda: encoded(plain.quantize(16), "PNG", transparency=3),
        "16 bits": lambda: encoded(grey16, "PNG"),
        "two colours": lambda: encoded(plain.convert("1"), "PNG"),
        "gif": lambda: encoded(plain, "GIF"),
        "bmp": lambda: encoded(plain, "BMP"),
        "tiff": lambda: encoded(plain, "TIFF"),
        "webp": lambda: encoded(clear, "WEBP", lossless=True),
    }
    return made[kind]()


KINDS = ("jpeg", "cmyk jpeg", "grey jpeg", "png", "transparent", "transparent grey", "palette", "transparent palette")


@pytest.mark.parametrize("kind", [*KINDS, "16 bits", "two colours", "gif", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("size", [None, 8, 12, 30, 100])  # decoded whole, at an eighth, a quarter, a half, whole
def test_it_decodes_what_the_scorer_decodes(tmp_path, kind, size):
    path = tmp_path / "image"
    path.write_bytes(images(kind))
    np.testing.assert_array_equal(script("pixels.py")["decode"](path, FORMATS, size), decode(path, size))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_it_turns_images_upright(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "image"
    path.write_bytes(encoded(picture(303, 201), kind, exif=exif))
    for size in (None, 15):
        np.testing.assert_array_equal(script("pixels.py")["decode"](path, FORMATS, size), decode(path, size))


def test_it_refuses_what_the_scorer_refuses(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"))
    with pytest.raises(AssertionError, match="of PNG alone"):
        script("pixels.py")["decode"](path, FORMATS, None)
    path.write_bytes(encoded(picture(30, 20), "EPS"))
    with pytest.raises(OSError, match="cannot identify"):
        script("pixels.py")["decode"](path, FORMATS, None)
