"""`images.py`: files as 8-bit RGB, whole or at a fraction of their size, where they are kept, and views of them."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import images


def refusal(function, *args: Any, **options: Any) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- any file as upright 8-bit RGB


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def write_png(path: Path, samples: np.ndarray, colour_type: int) -> Path:
    """Write a 16-bit PNG as its specification says: (H, W) or (H, W, channels), big-endian, no filter."""
    height, width = samples.shape[:2]
    lines = samples.astype(">u2").reshape(height, -1)
    packed = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def loaded(path: Path | Image.Image) -> np.ndarray:
    """What `load_image` makes of a file, after checking that it is RGB and passes `check_images` too."""
    if isinstance(path, Path):
        assert len(images.check_images([path])) == 1
    image = images.load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 4).round().astype(np.uint16).reshape(4, 64)
    expected = np.repeat((ramp / 65535 * 255)[..., None], 3, axis=2)
    assert abs(loaded(write_png(tmp_path / "png.png", ramp, 0)) - expected).max() <= 1
    Image.fromarray(ramp).save(tmp_path / "tiff.tif")
    assert abs(loaded(tmp_path / "tiff.tif") - expected).max() <= 1
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "wide.tif")
    assert Image.open(tmp_path / "wide.tif").mode == "I"
    assert abs(loaded(tmp_path / "wide.tif") - expected).max() <= 1


def test_16_bit_colour_is_scaled(tmp_path):
    colours = np.random.default_rng(0).integers(0, 65536, (5, 7, 3))
    assert abs(loaded(write_png(tmp_path / "x.png", colours, 2)) - colours / 65535 * 255).max() <= 1


def test_16_bit_colour_with_transparency_lies_on_white(tmp_path):
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, 4))
    alpha = samples[..., 3:] / 65535
    expected = alpha * samples[..., :3] / 65535 * 255 + (1 - alpha) * 255
    assert abs(loaded(write_png(tmp_path / "x.png", samples, 6)) - expected).max() <= 2


def test_grey_and_two_level_images_become_equal_channels(tmp_path, noise):
    grey = noise[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(loaded(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    assert Image.open(tmp_path / "bits.png").mode == "1"
    expected = np.where(grey > 127, 255, 0)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(loaded(tmp_path / "bits.png"), expected)


def test_palettes_are_looked_up_and_their_transparent_entry_is_white(tmp_path):
    palette = np.array([(200, 10, 20), (0, 255, 0), (9, 9, 9), (1, 2, 3)])
    codes = np.random.default_rng(0).integers(0, 4, (6, 8), dtype=np.uint8)
    image = Image.fromarray(codes).convert("P")
    image.putdata(codes.flatten().tolist())
    image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(tmp_path / "plain.png")
    assert Image.open(tmp_path / "plain.png").mode == "P"
    np.testing.assert_array_equal(loaded(tmp_path / "plain.png"), palette[codes])
    image.save(tmp_path / "clear.png", transparency=2)
    palette[2] = 255
    np.testing.assert_array_equal(loaded(tmp_path / "clear.png"), palette[codes])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_images_lie_on_white(tmp_path, mode):
    samples = np.random.default_rng(0).integers(0, 256, (9, 11, len(mode)), dtype=np.uint8)
    samples[0, :, -1], samples[1, :, -1] = 0, 255
    Image.fromarray(samples).save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").mode == mode
    alpha = samples[..., -1:] / 255
    expected = np.broadcast_to(alpha * samples[..., :-1] + (1 - alpha) * 255, (9, 11, 3))
    found = loaded(tmp_path / "x.png")
    assert abs(found - expected).max() <= 1
    assert (found[0] == 255).all()


def test_one_colour_declared_transparent_is_white(tmp_path, noise):
    noise = noise.copy()
    noise[3:5] = (1, 2, 3)
    Image.fromarray(noise).save(tmp_path / "x.png", transparency=(1, 2, 3))
    expected = noise.copy()
    expected[3:5] = 255
    np.testing.assert_array_equal(loaded(tmp_path / "x.png"), expected)


def test_cmyk_becomes_rgb(tmp_path):
    inks = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    Image.frombytes("CMYK", (11, 9), inks.tobytes()).save(tmp_path / "x.tif")
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert abs(loaded(tmp_path / "x.tif") - expected).max() <= 1


def test_cmyk_jpegs_are_not_inverted(tmp_path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    assert abs(loaded(tmp_path / "red.jpg") - (255, 0, 0)).max() <= 6


# EXIF orientation -> what a viewer does to the stored pixels (Exif 2.3, tag 274)
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(tmp_path, noise, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(noise).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "x.png"), UPRIGHT[orientation](noise))


def test_exif_rotation_is_applied_to_16_bit_and_palette_images_too(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    ramp = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(ramp).save(tmp_path / "deep.png", exif=exif)
    assert abs(loaded(tmp_path / "deep.png")[..., 0] - np.rot90(ramp, -1) / 65535 * 255).max() <= 1
    codes = (np.arange(12) * 20).astype(np.uint8).reshape(3, 4)
    Image.fromarray(codes).convert("P").save(tmp_path / "palette.png", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "palette.png")[..., 0], np.rot90(codes, -1))


def test_images_in_memory_are_taken_as_they_are_and_left_alone(noise):
    image = Image.fromarray(noise)
    np.testing.assert_array_equal(loaded(image), noise)
    np.testing.assert_array_equal(np.asarray(image), noise)


def test_floating_point_images_are_refused_before_training_and_when_loaded(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path)
    assert "1 of 1 images cannot be read: x.tif (floating-point pixels" in refusal(images.check_images, [path])
    with pytest.raises(OSError, match="floating-point"):
        images.load_image(path)


KINDS = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {})]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_wherever_an_image_is_cut_the_check_finds_what_loading_would(tmp_path, noise, kind, options):
    whole = encoded(Image.fromarray(noise), kind, **options)
    refused = 0
    for length in [*range(0, len(whole), max(1, len(whole) // 25)), len(whole) - 1]:
        path = tmp_path / f"{length}.img"
        path.write_bytes(whole[:length])
        found = None
        try:
            images.check_images([path])
        except ValueError as error:
            found = str(error)
        if found is None:
            images.load_image(path)
        else:
            assert path.name in found
            refused += 1
    assert refused > 20
    (tmp_path / "whole.img").write_bytes(whole)
    assert images.check_images([tmp_path / "whole.img"])


def test_all_unreadable_images_are_counted_and_the_first_five_named(tmp_path, noise):
    whole = encoded(Image.fromarray(noise), "PNG")
    contents = [
        whole,
        b"",
        b"GIF89a",
        b"no image at all",
        whole[:200],
        whole,
        whole[:30],
        b"\xff\xd8\xff",
        b"PK\x03\x04",
    ]
    paths = [tmp_path / f"{number}.png" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    message = refusal(images.check_images, paths)
    assert message.startswith("7 of 9 images cannot be read: 1.png (not an image), 2.png (")
    assert ", 6.png (" in message and message.endswith("), ...")
    assert "0.png" not in message and "7.png" not in message
    assert " at 0x" not in message, "no addresses of objects"


def test_an_image_too_large_to_decode_is_refused(tmp_path, noise, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.fromarray(noise), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "bomb.png (Image size (600 pixels) exceeds limit" in refusal(images.check_images, [path])


def test_a_checked_file_has_its_path_the_hash_of_its_content_and_its_stored_size(tmp_path, noise):
    exif = Image.Exif()
    exif[274] = 6  # rotated, which the stored size does not know
    paths = []
    for number, (kind, options) in enumerate(itertools.product(("PNG", "JPEG", "WEBP"), ({}, {"exif": exif}))):
        picture = Image.fromarray(noise[: 20 - number])
        paths.append(tmp_path / f"{number}.img")
        paths[-1].write_bytes(encoded(picture, kind, **options))
    paths.reverse()
    assert images.check_images(paths) == [
        images.ImageFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), (30, 20 - int(path.stem)))
        for path in paths
    ]


# -- large images at a fraction of their size


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 512))
def test_the_fraction_is_the_smallest_that_leaves_three_pixels_for_each_of_a_view(width, height, image_size):
    def leaves_enough(factor: int) -> bool:
        return min(width, height) / factor >= 3 * image_size

    factor = images.reduction((width, height), image_size)
    assert factor == max(other for other in (1, 2, 4, 8) if other == 1 or leaves_enough(other))
    assert images.reduction((width, height), None) == 1, "views of native size need all pixels"


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


# Sides that a fraction divides and sides that it does not; for views of 16 pixels at a half, a quarter, an eighth.
LARGE = [(128, 100), (131, 97), (200, 240), (195, 391), (400, 416), (389, 407), (511, 385)]


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_fraction_has_the_sides_of_the_upright_image_over_the_factor_rounded_up(tmp_path, kind, orientation, size):
    path = save_as(tmp_path / "x", picture_of("smooth", *size), kind, orientation)
    factor = images.reduction(size, 16)
    assert factor > 1
    width, height = reversed(size) if orientation == 6 else size
    assert images.load_image(path).size == (width, height)
    assert images.load_image(path, 16).size == (math.ceil(width / factor), math.ceil(height / factor))
    assert images.decode(path, 16).shape == (math.ceil(height / factor), math.ceil(width / factor), 3)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("size", LARGE)
def test_a_jpeg_decoder_skips_the_detail_itself_and_nothing_is_left_to_reduce(tmp_path, monkeypatch, size, mode):
    path = save_as(tmp_path / "x", picture_of("smooth", *size).convert(mode), "JPEG", 6)

    def reduce(*args: Any) -> None:
        raise AssertionError("decoded in full, then reduced")

    monkeypatch.setattr(Image.Image, "reduce", reduce)
    factor = images.reduction(size, 16)
    assert images.load_image(path, 16).size == (math.ceil(size[1] / factor), math.ceil(size[0] / factor))


@pytest.mark.parametrize("size", LARGE)
def test_other_files_and_pictures_in_memory_are_averaged_over_blocks(tmp_path, size):
    picture = picture_of("noisy", *size)
    factor = images.reduction(size, 16)
    pixels = np.asarray(picture, dtype=float)
    width, height = (side - side % factor for side in size)  # the last blocks are incomplete
    blocks = pixels[:height, :width].reshape(height // factor, factor, width // factor, factor, 3).mean(axis=(1, 3))
    for source in (save_as(tmp_path / "x", picture, "PNG"), picture):
        found = np.asarray(images.load_image(source, 16), dtype=float)[: len(blocks), : blocks.shape[1]]
        assert abs(found - blocks).max() <= 1
    assert picture.size == size, "left alone"


def test_an_image_that_is_not_large_is_decoded_as_it_is(tmp_path, noise):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(Image.fromarray(noise), "PNG"))
    assert images.reduction((30, 20), 4) == 1
    np.testing.assert_array_equal(images.decode(path, 4), noise)


# Grey levels on average and at most; measured: 0.3 and 5, 1.5 and 8. Sides that do not divide are rounded up, which
# moves edges by less than a pixel; measured: 1.2 and 25, 2.3 and 15.
EXACT = {"smooth": (0.6, 10), "noisy": (2.5, 14)}
ROUNDED = {"smooth": (2.0, 40), "noisy": (3.5, 24)}


@pytest.mark.parametrize("content", EXACT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("size", "tolerance"),
    [((400, 390), EXACT), ((800, 1000), EXACT), ((391, 413), ROUNDED), ((771, 775), ROUNDED)],
)
def test_the_evaluation_view_of_a_fraction_is_close_to_that_of_the_whole(tmp_path, size, tolerance, kind, content):
    path = save_as(tmp_path / "x", picture_of(content, *size), kind)
    fraction, whole = images.as_tensor(images.decode(path, 64)), images.as_tensor(np.array(images.load_image(path)))
    assert fraction.shape != whole.shape
    one, other = (grey_views(image_size=64)([image], [""], None) for image in (fraction, whole))
    difference = (one - other).abs()
    mean, most = tolerance[content]
    assert difference.mean() <= mean and difference.max() <= most


# -- where decoded images are kept


SIZE = 16  # pixels per side of the views that the stores of these tests decode for
PLACES = ["memory", "file", "nowhere"]


@pytest.fixture
def files(tmp_path) -> list[images.ImageFile]:
    """Checked image files of several sizes and kinds, two of which are decoded at a fraction."""
    (tmp_path / "images").mkdir()
    paths = []
    for number, (width, height) in enumerate([(60, 40), (40, 60), (131, 97), (20, 90), (16, 16), (195, 391), (33, 7)]):
        kind, orientation = [("PNG", 1), ("JPEG", 6)][number % 2]
        picture = picture_of("smooth", width, height)
        paths.append(save_as(tmp_path / "images" / f"{number}.img", picture, kind, orientation))
    return images.check_images(paths)


def num_bytes(files: Sequence[images.ImageFile]) -> int:
    """Of all decoded images together."""
    return sum(images.decode(file.path, SIZE).nbytes for file in files)


def store_in(place: str, files: Sequence[images.ImageFile], folder: Path) -> images.ImageStore:
    """A store that has just enough room in this place."""
    total = num_bytes(files)
    room = {"memory": {"max_memory": total}, "file": {"max_memory": total - 1, "max_file": total}, "nowhere": {}}
    return images.ImageStore(files, image_size=SIZE, num_threads=3, spill_dir=folder / "spill", **room[place])


@pytest.fixture
def decoded_paths(monkeypatch) -> Counter[Path]:
    """How often each file was read, counted from now on."""
    counts: Counter[Path] = Counter()
    lock, read_file = threading.Lock(), images.read_file

    def counted(path: Path) -> bytes:
        with lock:
            counts[path] += 1
        return read_file(path)

    monkeypatch.setattr(images, "read_file", counted)
    return counts


def assert_equal(found: Sequence[torch.Tensor], files: Sequence[images.ImageFile]) -> None:
    """Check that these are the decoded images of the files."""
    for image, file in zip(found, files, strict=True):
        expected = np.asarray(images.load_image(file.path, SIZE)).transpose(2, 0, 1)
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image.numpy(), expected)


@pytest.mark.parametrize("place", PLACES)
def test_a_store_gives_the_rows_asked_for_however_often_and_in_any_order(files, tmp_path, place):
    store = store_in(place, files, tmp_path)
    for rows in ([3], [6, 0, 5], np.arange(len(files)), [2, 2, 4], np.arange(len(files))[::-1], []):
        assert_equal(store.load(rows), [files[row] for row in rows])


@pytest.mark.parametrize(("place", "times"), [("memory", 1), ("file", 1), ("nowhere", 3)])
def test_each_file_is_decoded_once_if_it_is_kept_and_whenever_asked_for_if_not(
    files, tmp_path, decoded_paths, place, times
):
    store = store_in(place, files, tmp_path)
    decoded_paths.clear()
    for rows in ([0, 1, 2, 3], [6, 5, 4], np.arange(len(files)), np.arange(len(files))[::-1]):
        store.load(rows)
    assert decoded_paths == {file.path: times for file in files}


@pytest.mark.parametrize("place", ["memory", "file"])
def test_threads_that_ask_row_by_row_get_what_one_of_them_decoded(files, tmp_path, decoded_paths, place):
    store = store_in(place, files, tmp_path)
    decoded_paths.clear()
    order = np.random.default_rng(0)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            rows = order.permutation(len(files)).tolist()
            assert_equal(list(pool.map(store.load_one, rows)), [files[row] for row in rows])
    assert decoded_paths == {file.path: 1 for file in files}


@pytest.mark.parametrize("place", PLACES)
def test_threads_that_ask_for_the_same_row_at_once_all_get_it_whole(files, tmp_path, place):
    store, start = store_in(place, files, tmp_path), threading.Barrier(4)

    def ask(_: int) -> torch.Tensor:
        start.wait(timeout=30)
        return store.load_one(5).clone()

    with ThreadPoolExecutor(4) as pool:
        assert_equal(list(pool.map(ask, range(4))), [files[5]] * 4)


def test_images_are_kept_in_memory_if_they_fit_else_in_a_file_if_they_fit_else_not(files, tmp_path):
    total, folder = num_bytes(files), tmp_path / "deep" / "spill"

    def place(max_memory: float, max_file: float, spill_dir: Path | None = folder) -> str:
        limits = {"max_memory": max_memory, "max_file": max_file, "spill_dir": spill_dir}
        return images.ImageStore(files, image_size=SIZE, num_threads=1, **limits).place

    assert place(total, 0) == place(1e12, 1e12) == "kept in memory"
    assert place(total - 1, total - 1) == place(0, 0) == place(0, 1e12, None) == "decoded whenever needed"
    assert not folder.exists(), "made when it is needed"
    assert place(total - 1, total) == f"kept in a file in {folder}"
    assert folder.is_dir()


def test_the_file_that_images_are_kept_in_cannot_be_seen_and_is_gone_with_the_store(files, tmp_path):
    store = store_in("file", files, tmp_path)
    assert isinstance(store.pixels, np.memmap)
    store.load(range(len(files)))
    assert list((tmp_path / "spill").iterdir()) == []


def test_a_store_says_how_much_it_decodes_where_to_and_how_much_of_it_at_a_fraction():
    photos = [images.ImageFile(Path(f"{number}.jpg"), "", (6000, 4001)) for number in range(90)]
    drawings = [images.ImageFile(Path("x.png"), "", (500, 400))]

    def described(image_size: int) -> str:
        return images.ImageStore([*photos, *drawings], image_size=image_size, num_threads=1).describe()

    whole, half = 90 * 3 * 6000 * 4001 + 3 * 500 * 400, 90 * 3 * 3000 * 2001 + 3 * 500 * 400
    assert described(1000) == f"{whole / 1e9:.2f} GB decoded, decoded whenever needed"
    assert described(336) == f"{half / 1e9:.2f} GB decoded, decoded whenever needed, 90 at a fraction of their size"


def test_a_store_for_views_of_native_size_decodes_every_image_whole(files):
    total = sum(3 * width * height for width, height in (file.size for file in files))
    store = images.ImageStore(files, image_size=None, num_threads=2, max_memory=total)
    assert store.describe() == f"{total / 1e9:.2f} GB decoded, kept in memory"
    for _ in range(2):
        for image, file in zip(store.load(range(len(files))), files, strict=True):
            np.testing.assert_array_equal(image.numpy(), loaded(file.path).transpose(2, 0, 1))


@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_file_that_has_another_size_than_when_it_was_checked_is_an_error_that_names_it(files, tmp_path, place):
    store = store_in(place, files, tmp_path)
    Image.new("RGB", (61, 40)).save(files[0].path, "PNG")
    with pytest.raises(OSError, match="has changed since it was checked") as caught:
        store.load(range(len(files)))
    assert str(files[0].path) in str(caught.value)
    assert_equal(store.load([1, 2]), files[1:3])


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_holds_another_image_of_the_same_size_than_when_it_was_checked_is_an_error(files, tmp_path, place):
    store = store_in(place, files, tmp_path)
    Image.new("RGB", files[0].size).save(files[0].path, "PNG")
    with pytest.raises(images.Unreadable, match="has changed since it was checked") as caught:
        store.load([1, 0, 2])
    assert caught.value.reasons == {0: "has changed since it was checked"}
    assert str(files[0].path) in str(caught.value)


def test_all_rows_that_can_no_longer_be_read_are_told_with_their_reasons_and_five_are_named(files, tmp_path):
    store = store_in("nowhere", files, tmp_path)
    for file in files[:6]:
        file.path.unlink()
    os.mkfifo(files[0].path)
    with pytest.raises(images.Unreadable) as caught:
        store.load(np.arange(len(files))[::-1])
    gone = "No such file or directory"
    assert caught.value.reasons == {5: gone, 4: gone, 3: gone, 2: gone, 1: gone, 0: "no regular file"}
    assert str(caught.value).startswith("6 image(s) can no longer be read: ")
    assert str(caught.value).endswith(f"1.img ({gone}), ...")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loss", ["deleted", "cut", "text"])
def test_a_file_that_can_no_longer_be_read_is_an_os_error(files, tmp_path, place, loss):
    store, path = store_in(place, files, tmp_path), files[3].path
    content = {"cut": path.read_bytes()[: path.stat().st_size // 2], "text": b"no longer an image"}
    path.unlink()
    if loss in content:
        path.write_bytes(content[loss])
    with pytest.raises(OSError, match=r"3\.img|truncated"):
        store.load([2, 3])


@pytest.mark.parametrize("place", ["memory", "file"])
def test_an_image_that_was_kept_outlives_its_file(files, tmp_path, place):
    store = store_in(place, files, tmp_path)
    expected = [image.clone() for image in store.load(range(len(files)))]
    for file in files:
        file.path.unlink()
    assert all(map(torch.equal, store.load(range(len(files))), expected))


@pytest.mark.parametrize("place", PLACES)
def test_images_that_are_not_to_be_kept_are_decoded_again(files, tmp_path, decoded_paths, place):
    store = store_in(place, files, tmp_path)
    decoded_paths.clear()
    found = [store.load(range(len(files)), keep=False) for _ in range(2)]
    assert decoded_paths == {file.path: 2 for file in files}
    for images_of_once in found:
        assert_equal(images_of_once, files)


def test_a_disk_that_has_not_enough_space_keeps_nothing(files, tmp_path, monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    store = store_in("file", files, tmp_path)
    assert store.place == "decoded whenever needed"
    assert_equal(store.load(range(len(files))), files)


def test_files_and_pictures_that_are_needed_once_are_decoded_in_their_order(files, noise):
    sources = [files[2].path, Image.fromarray(noise), str(files[5].path), files[0].path]
    found = images.decode_all(sources, SIZE, num_threads=3)
    assert_equal([found[0], *found[2:]], [files[2], files[5], files[0]])
    np.testing.assert_array_equal(found[1].numpy(), noise.transpose(2, 0, 1))
    with pytest.raises(OSError, match="nowhere"):
        images.decode_all([*sources, "nowhere.png"], SIZE, num_threads=3)


# -- views


CPU = torch.device("cpu")


def grey_views(**options: Any) -> images.Views:
    """Views whose values are grey levels, 0 to 255."""
    usual = {"image_size": 32, "mean": [0.0] * 3, "std": [1 / 255] * 3, "device": CPU, "seed": 1}
    return images.Views(**{**usual, "crop_scale_min": 0.5, "flip": True, **options})


# Options of views that consist of one image each, and of several.
SEVERAL = {
    "resized": {},
    "crops": {"crops": 3, "test_crops": 4},
    "one crop": {"crops": 1, "test_crops": 1},
    "resized and crops": {"crops": 2, "test_crops": 6, "global_view": True},
}
of_any_kind = pytest.mark.parametrize("options", SEVERAL.values(), ids=SEVERAL)


@pytest.fixture(scope="module")
def pictures() -> list[torch.Tensor]:
    """Decoded images: wide, tall, smaller than a view, exactly a view, and ten times as long as wide."""
    rng = np.random.default_rng(0)
    sizes = [(60, 40), (40, 60), (33, 33), (20, 90), (50, 50), (32, 32), (400, 40)]
    return [torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)) for width, height in sizes]


def digests_of(pictures: Sequence[torch.Tensor]) -> list[str]:
    return [hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in pictures]


def test_the_evaluation_view_is_open_clips_own_after_normalisation():
    rng = np.random.default_rng(0)
    sizes = [(300, 260), (256, 256), (224, 224), (100, 180), (341, 512), (671, 333)]
    # Smooth pictures and noise: noise alone would hide a shift, smooth ones alone another filter.
    small = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size) for size in sizes]
    noisy = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    sources = [*small, *noisy]
    mean, std = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
    views = images.Views(image_size=224, mean=mean, std=std, device=CPU)
    found = views([images.as_tensor(images.decode(source, 224)) for source in sources], [""] * len(sources), None)
    transform = open_clip.image_transform(224, is_train=False)
    expected = torch.stack([transform(source) for source in sources])
    assert found.shape == expected.shape and found.dtype == torch.float32
    difference = (found - expected).abs() * torch.tensor(std).view(1, 3, 1, 1) * 255
    # torch's kernel for 8 bits and Pillow's round differently, nothing more.
    assert difference.max() < 2.01 and difference.mean() < 0.1


def test_the_middle_of_an_image_that_is_larger_one_way_only_is_seen_as_it_is():
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 50), dtype=np.uint8))
    assert torch.equal(grey_views()([picture], [""], None).round(), picture[None, :, :, 9:41].float())


@of_any_kind
def test_views_are_normalised_by_the_channels_mean_and_deviation(pictures, options):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    for view in (None, 3):
        grey, found = (
            views(pictures, digests_of(pictures), view).numpy()
            for views in (grey_views(**options), grey_views(**options, mean=mean, std=std))
        )
        expected = (grey.round() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        np.testing.assert_allclose(found, expected, atol=1e-5)


@of_any_kind
def test_a_training_view_depends_on_seed_number_and_content_alone(pictures, options):
    digests = digests_of(pictures)
    first = {number: grey_views(**options)(pictures, digests, number) for number in range(3)}
    again = grey_views(**options)
    torch.manual_seed(123)
    for number, place in reversed(list(itertools.product(range(3), range(len(pictures))))):
        alone = again([pictures[place]], [digests[place]], number)  # in a batch of its own, in another order
        assert torch.equal(alone[0], first[number][place]), (number, place)
    several = (again.count(0),) * (again.count(0) > 1)
    shape = (len(pictures), *several, 3, 32, 32)
    assert all(views.shape == shape and views.dtype == torch.float32 for views in first.values())


@of_any_kind
def test_training_views_differ_between_numbers_contents_and_seeds(options):
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8))
    digests = ["one", "two", "three", "four"]
    drawn = [view for number in range(4) for view in grey_views(**options)([picture] * 4, digests, number)]
    drawn += [grey_views(**options, seed=seed)([picture], ["one"], 0)[0] for seed in (2, 3)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


@of_any_kind
def test_taking_views_leaves_the_global_random_state_and_the_images_alone(pictures, options):
    before = [picture.clone() for picture in pictures]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for view in (None, 0, 1):
        grey_views(**options)(pictures, digests_of(pictures), view).zero_()
    assert torch.equal(torch.rand(3), expected)
    assert all(map(torch.equal, pictures, before))


@of_any_kind
def test_the_evaluation_view_depends_on_the_image_alone(pictures, options):
    one = grey_views(**options, seed=1)(pictures, digests_of(pictures), None)
    other = grey_views(**options, seed=2, crop_scale_min=0.1, flip=False)(pictures, [""] * len(pictures), None)
    assert torch.equal(one, other)


def test_flipping_mirrors_about_half_of_the_views_and_changes_no_crop(pictures):
    digests, mirrored = digests_of(pictures), 0
    for number in range(12):
        plain, flipped = (grey_views(flip=flip)(pictures, digests, number) for flip in (False, True))
        for one, other in zip(plain, flipped, strict=True):
            assert torch.equal(other, one) != torch.equal(other, one.flip(-1))
            mirrored += not torch.equal(other, one)
    assert 0.3 < mirrored / (12 * len(pictures)) < 0.7


def test_training_views_keep_the_least_share_of_the_area():
    # A picture whose colours are coordinates tells how much of it a view shows.
    across = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    picture = torch.stack([across, across.T, across])
    views, shares = grey_views(crop_scale_min=0.5), []
    for number in range(60):
        (view,) = views([picture], ["digest"], number)
        spans = [(view[channel].max() - view[channel].min() + 8) / 256 for channel in (0, 1)]
        shares.append(float(spans[0] * spans[1]))
    assert min(shares) > 0.46
    assert min(shares) < 0.6 and max(shares) > 0.9, "and as much as all of it"


def test_with_a_least_share_of_one_a_square_image_is_always_seen_whole():
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8))
    views = grey_views(crop_scale_min=1.0, flip=False)
    whole = views([picture], [""], None)
    assert all(torch.equal(views([picture], ["digest"], number), whole) for number in range(5))


# -- several views of an image


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 64), st.integers(1, 36))
def test_a_grid_of_crops_spans_the_image_evenly_with_more_of_them_along_the_longer_side(high, wide, size, count):
    height, width = size + high, size + wide
    grid = images.crop_grid(height, width, size, count)
    splits = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    few, many = min(splits, key=lambda split: (abs(split[0] - split[1]), split))
    rows, columns = (few, many) if width >= height else (many, few)
    tops, lefts = [top for top, _ in grid[::columns]], [left for _, left in grid[:columns]]
    assert grid == list(itertools.product(tops, lefts)) and len(grid) == count and len(tops) == rows
    for starts, last in ((tops, high), (lefts, wide)):
        if len(starts) == 1:
            assert abs(starts[0] - last / 2) <= 0.5, "centred"
        else:
            assert starts[0] == 0 and starts[-1] == last, "from edge to edge"
            assert max(np.diff(starts)) - min(np.diff(starts)) <= 1


def test_crops_that_are_known_by_hand():
    assert images.crop_grid(64, 80, 32, 1) == [(16, 24)]
    assert images.crop_grid(50, 90, 50, 3) == [(0, 0), (0, 20), (0, 40)]
    assert images.crop_grid(100, 200, 50, 6) == [(0, 0), (0, 75), (0, 150), (50, 0), (50, 75), (50, 150)]
    assert images.crop_grid(200, 100, 50, 6) == [(0, 0), (0, 50), (75, 0), (75, 50), (150, 0), (150, 50)]


@pytest.mark.parametrize(
    ("crops", "test_crops", "global_view", "training", "evaluation"),
    [(0, 0, False, 1, 1), (1, 1, False, 1, 1), (3, 6, False, 3, 6), (2, 1, True, 3, 2), (1, 4, True, 2, 5)],
)
def test_views_say_how_many_images_they_consist_of(pictures, crops, test_crops, global_view, training, evaluation):
    views = grey_views(crops=crops, test_crops=test_crops, global_view=global_view)
    assert views.decode_size == (None if test_crops else 32)
    for view, count in ((None, evaluation), (0, training), (7, training)):
        assert views.count(view) == count
        found = views(pictures, digests_of(pictures), view)
        assert found.shape == (len(pictures), *(count,) * (count > 1), 3, 32, 32)
        assert found.dtype == torch.float32


def large(pictures: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those of which a view of 32 pixels is a part."""
    return [picture for picture in pictures if min(picture.shape[1:]) >= 32]


def test_crops_for_evaluation_are_the_pixels_of_the_image_on_the_grid(pictures):
    pictures = large(pictures)
    found = grey_views(crops=1, test_crops=6)(pictures, [""] * len(pictures), None).round()
    for views, picture in zip(found, pictures, strict=True):
        places = images.crop_grid(*picture.shape[1:], 32, 6)
        assert torch.equal(views, torch.stack([picture[:, y : y + 32, x : x + 32] for y, x in places]).float())


def place_of(view: torch.Tensor, picture: torch.Tensor) -> tuple[int, int]:
    """Top and left of a view in a picture of noise, where it must be found exactly once."""
    windows = picture.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
    (place,) = (windows == view.round()).flatten(2).all(dim=2).nonzero().tolist()
    return place[0], place[1]


def test_crops_for_training_are_pixels_of_the_image_from_anywhere_in_it():
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 34, 33), dtype=np.uint8))
    views = grey_views(crops=3, test_crops=3, flip=False)
    drawn = Counter(place_of(view, picture) for number in range(40) for view in views([picture], [""], number)[0])
    assert set(drawn) == set(itertools.product(range(3), range(2))), "the edges too"
    assert max(drawn.values()) < 3 * min(drawn.values())


def test_crops_are_mirrored_each_by_itself_and_only_if_asked_for(pictures):
    pictures, mirrored = large(pictures), []
    for number in range(20):
        plain, flipped = (
            grey_views(crops=2, test_crops=2, flip=flip)(pictures, digests_of(pictures), number)
            for flip in (False, True)
        )
        for picture, one, other in zip(pictures, plain[:, 0], flipped[:, 0], strict=True):
            assert place_of(one, picture)
            assert torch.equal(other, one) != torch.equal(other, one.flip(-1))
        mirrored.append((plain != flipped).flatten(2).any(dim=2))
    shares = torch.cat(mirrored).float()  # (n, 2)
    assert ((shares.mean(dim=0) > 0.35) & (shares.mean(dim=0) < 0.65)).all()
    assert 0.35 < (shares[:, 0] != shares[:, 1]).float().mean() < 0.65, "independently"


@pytest.mark.parametrize("view", [None, 0, 5])
def test_the_whole_image_in_front_of_crops_is_what_there_is_without_crops(pictures, view):
    digests, crops = digests_of(pictures), {"crops": 2, "test_crops": 4}
    both = grey_views(**crops, global_view=True)(pictures, digests, view)
    assert torch.equal(both[:, 0], grey_views()(pictures, digests, view))
    assert torch.equal(both[:, 1:], grey_views(**crops)(pictures, digests, view))


def test_images_smaller_than_a_crop_are_enlarged_until_it_fits():
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (31, 90), (1, 2)]
    small = [torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8)) for size in sizes]
    digests = digests_of(small)
    whole = grey_views()(small, digests, None)  # its middle, at the size of which the shorter side fits
    assert torch.equal(grey_views(crops=1, test_crops=1)(small, digests, None), whole)
    row = torch.arange(0, 250, 10, dtype=torch.uint8).expand(3, 10, 25)  # enlarged to 32 x 80
    left, right = grey_views(crops=1, test_crops=2)([row], [""], None)[0]
    assert left.min() == 0 and right.max() >= 240, "from edge to edge"
    assert left.max() < 110 and right.min() > 130, "but not all of it at once"
    training = grey_views(crops=4, test_crops=4)(small, digests, 0)
    assert training.shape == (3, 4, 3, 32, 32) and training.std(dim=(2, 3, 4)).min() > 1
