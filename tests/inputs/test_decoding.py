"""`decoding`: any file as upright 8-bit RGB, whole or at a fraction of its size; what checks find of it."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin, TiffTags
from refusals import refusal
from small_pictures import encoded, grey_views, picture_of, save_as

from inputs import decoding
from storage import image_files

# -- any file as upright 8-bit RGB


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
        assert len(image_files.check_images([path])) == 1
    image = decoding.load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 4).round().astype(np.uint16).reshape(4, 64)
    expected = np.repeat((ramp / 65535 * 255)[..., None], 3, axis=2)
    assert abs(loaded(write_png(tmp_path / "png.png", ramp, 0)) - expected).max() <= 1
    Image.fromarray(ramp).save(tmp_path / "tiff.tif")
    assert abs(loaded(tmp_path / "tiff.tif") - expected).max() <= 1
    (tmp_path / "grey.pgm").write_bytes(b"P5 64 4 65535\n" + ramp.astype(">u2").tobytes())
    assert Image.open(tmp_path / "grey.pgm").mode == "I"
    assert abs(loaded(tmp_path / "grey.pgm") - expected).max() <= 1
    np.testing.assert_array_equal(loaded(tmp_path / "tiff.tif"), np.repeat((ramp >> 8)[..., None], 3, axis=2))


def tiff(path: Path, values: np.ndarray, **tags: float) -> Path:
    """A grey TIFF of these values with tags by their names."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[{each.name: number for number, each in TiffTags.TAGS_V2.items()}[name]] = value
        if isinstance(value, float):
            info.tagtype[{each.name: number for number, each in TiffTags.TAGS_V2.items()}[name]] = TiffTags.FLOAT
    Image.fromarray(values).save(path, tiffinfo=info)
    return path


WIDE_TAGS = [
    {"MaxSampleValue": 255},
    {"MinSampleValue": 10, "MaxSampleValue": 250},
    {"SMinSampleValue": -20.0, "SMaxSampleValue": 4000.0},
    {"SMinSampleValue": 0.0, "SMaxSampleValue": 1.0},
]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize("tags", WIDE_TAGS, ids=str)
def test_values_of_more_bits_are_read_by_the_range_that_a_tag_tells(tmp_path, tags, kind):
    low = tags.get("SMinSampleValue", tags.get("MinSampleValue", 0))
    high = tags.get("SMaxSampleValue", tags.get("MaxSampleValue"))
    ramp = np.linspace(low - 5, high + 5, 64 * 4).reshape(4, 64).astype(kind)
    found = loaded(tiff(tmp_path / "x.tif", ramp, **tags))
    expected = ((ramp.astype(float) - low) / (high - low)).clip(0, 1) * 255
    assert abs(found - expected[..., None]).max() <= 1
    with Image.open(tmp_path / "x.tif") as opened:
        assert opened.mode == {np.int32: "I", np.float32: "F"}[kind]
        np.testing.assert_array_equal(loaded(opened), found)


@pytest.mark.parametrize("tags", [{}, {"MinSampleValue": 3}, {"MinSampleValue": 7, "MaxSampleValue": 7}], ids=str)
@pytest.mark.parametrize(("kind", "said"), [(np.int32, "32-bit integer"), (np.float32, "floating-point")])
def test_values_of_more_bits_without_a_range_are_refused(tmp_path, tags, kind, said):
    path = tiff(tmp_path / "x.tif", np.arange(256, dtype=kind).reshape(16, 16), **tags)
    line = f"{said} pixels have no known range; save it with 8 or 16 bits"
    assert f"1 of 1 images cannot be read: x.tif ({line})" in refusal(image_files.check_images, [path])
    for source in (path, Image.fromarray(np.arange(256, dtype=kind).reshape(16, 16))):
        with pytest.raises(OSError, match=line):
            decoding.load_image(source)


def test_16_bits_with_a_sign_have_no_range_either(tmp_path):
    content = tiff(tmp_path / "x.tif", np.arange(256, dtype=np.uint16).reshape(16, 16), SampleFormat=1).read_bytes()
    entry = (339).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    assert entry + b"\x01\0" in content
    (tmp_path / "x.tif").write_bytes(content.replace(entry + b"\x01\0", entry + b"\x02\0"))
    assert "x.tif (signed 16-bit pixels have no" in refusal(image_files.check_images, [tmp_path / "x.tif"])


def test_a_real_image_of_32_bits_is_refused_and_not_black(wild_dir):
    message = refusal(image_files.check_images, [wild_dir / "int32_0_255.tif"])
    assert "int32_0_255.tif (32-bit integer pixels have no known range; save it with 8 or 16 bits)" in message


def test_the_12_bits_of_a_scanner_are_scaled_by_what_they_can_hold(tmp_path):
    ramp = np.linspace(0, 4095, 64).round().astype(int)
    pairs = ramp.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    tiff(tmp_path / "x.tif", np.zeros((1, 64), np.uint16))
    content = bytearray((tmp_path / "x.tif").read_bytes())
    with Image.open(tmp_path / "x.tif") as image:
        (start,), bits = image.tag_v2[273], (16).to_bytes(2, "little")
    entry = (258).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little") + bits
    place = content.index(entry)
    content[place + 8 : place + 10] = (12).to_bytes(2, "little")
    content[start : start + 96] = packed.astype(np.uint8).tobytes()
    (tmp_path / "x.tif").write_bytes(content)
    assert abs(loaded(tmp_path / "x.tif")[0, :, 0] - ramp / 4095 * 255).max() <= 1


def test_grey_values_that_count_from_white_are_turned_round(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 4).round().astype(np.uint16).reshape(4, 64)
    content = tiff(tmp_path / "x.tif", ramp).read_bytes()
    entry = (262).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    (tmp_path / "x.tif").write_bytes(content.replace(entry + b"\x01\0", entry + b"\0\0"))
    assert abs(loaded(tmp_path / "x.tif") - (255 - ramp / 65535 * 255)[..., None]).max() <= 1


def test_16_bit_grey_is_turned_upright_too(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 4).round().astype(np.uint16).reshape(4, 64)
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.fromarray(ramp).save(tmp_path / "x.tif", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "x.tif")[..., 0], np.rot90(ramp >> 8, -1))


@pytest.mark.parametrize("major", [b"heic", b"heix", b"mif1"])
def test_heic_is_named_with_the_package_that_reads_it(tmp_path, major):
    brands = b"".join([major, bytes(4), b"mif1", b"heic"])
    (tmp_path / "x.jpg").write_bytes((8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + bytes(64))
    message = refusal(image_files.check_images, [tmp_path / "x.jpg"])
    assert "x.jpg (HEIC, which is not read; save it as JPEG or PNG, as the package pillow-heif can)" in message
    (tmp_path / "x.jpg").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(64))
    assert "x.jpg (not an image)" in refusal(image_files.check_images, [tmp_path / "x.jpg"])


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
    assert "1 of 1 images cannot be read: x.tif (floating-point pixels" in refusal(image_files.check_images, [path])
    with pytest.raises(OSError, match="floating-point"):
        decoding.load_image(path)


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
            image_files.check_images([path])
        except ValueError as error:
            found = str(error)
        if found is None:
            decoding.load_image(path)
        else:
            assert path.name in found
            refused += 1
    assert refused > 20
    (tmp_path / "whole.img").write_bytes(whole)
    assert image_files.check_images([tmp_path / "whole.img"])


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
    message = refusal(image_files.check_images, paths)
    assert message.startswith("7 of 9 images cannot be read: 1.png (not an image), 2.png (")
    assert ", 6.png (" in message and message.endswith("), ...")
    assert "0.png" not in message and "7.png" not in message
    assert " at 0x" not in message, "no addresses of objects"


def test_an_image_too_large_to_decode_is_refused(tmp_path, noise, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.fromarray(noise), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "bomb.png (Image size (600 pixels) exceeds limit" in refusal(image_files.check_images, [path])


def test_a_checked_file_has_its_path_the_hash_of_its_content_and_its_stored_size(tmp_path, noise):
    exif = Image.Exif()
    exif[274] = 6  # rotated, which the stored size does not know
    paths = []
    for number, (kind, options) in enumerate(itertools.product(("PNG", "JPEG", "WEBP"), ({}, {"exif": exif}))):
        picture = Image.fromarray(noise[: 20 - number])
        paths.append(tmp_path / f"{number}.img")
        paths[-1].write_bytes(encoded(picture, kind, **options))
    paths.reverse()
    assert image_files.check_images(paths) == [
        image_files.ImageFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), (30, 20 - int(path.stem)))
        for path in paths
    ]


# -- large images at a fraction of their size


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 512))
def test_the_fraction_is_the_smallest_that_leaves_three_pixels_for_each_of_a_view(width, height, image_size):
    def leaves_enough(factor: int) -> bool:
        return min(width, height) / factor >= 3 * image_size

    factor = decoding.reduction((width, height), image_size)
    assert factor == max(other for other in (1, 2, 4, 8) if other == 1 or leaves_enough(other))
    assert decoding.reduction((width, height), None) == 1, "views of native size need all pixels"


# Sides that a fraction divides and sides that it does not; for views of 16 pixels at a half, a quarter, an eighth.
LARGE = [(128, 100), (131, 97), (200, 240), (195, 391), (400, 416), (389, 407), (511, 385)]


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_fraction_has_the_sides_of_the_upright_image_over_the_factor_rounded_up(tmp_path, kind, orientation, size):
    path = save_as(tmp_path / "x", picture_of("smooth", *size), kind, orientation)
    factor = decoding.reduction(size, 16)
    assert factor > 1
    width, height = reversed(size) if orientation == 6 else size
    assert decoding.load_image(path).size == (width, height)
    assert decoding.load_image(path, 16).size == (math.ceil(width / factor), math.ceil(height / factor))
    assert decoding.decode(path, 16).shape == (math.ceil(height / factor), math.ceil(width / factor), 3)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("size", LARGE)
def test_a_jpeg_decoder_skips_the_detail_itself_and_nothing_is_left_to_reduce(tmp_path, monkeypatch, size, mode):
    path = save_as(tmp_path / "x", picture_of("smooth", *size).convert(mode), "JPEG", 6)

    def reduce(*args: Any) -> None:
        raise AssertionError("decoded in full, then reduced")

    monkeypatch.setattr(Image.Image, "reduce", reduce)
    factor = decoding.reduction(size, 16)
    assert decoding.load_image(path, 16).size == (math.ceil(size[1] / factor), math.ceil(size[0] / factor))


@pytest.mark.parametrize("size", LARGE)
def test_other_files_and_pictures_in_memory_are_averaged_over_blocks(tmp_path, size):
    picture = picture_of("noisy", *size)
    factor = decoding.reduction(size, 16)
    pixels = np.asarray(picture, dtype=float)
    width, height = (side - side % factor for side in size)  # the last blocks are incomplete
    blocks = pixels[:height, :width].reshape(height // factor, factor, width // factor, factor, 3).mean(axis=(1, 3))
    for source in (save_as(tmp_path / "x", picture, "PNG"), picture):
        found = np.asarray(decoding.load_image(source, 16), dtype=float)[: len(blocks), : blocks.shape[1]]
        assert abs(found - blocks).max() <= 1
    assert picture.size == size, "left alone"


def test_an_image_that_is_not_large_is_decoded_as_it_is(tmp_path, noise):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(Image.fromarray(noise), "PNG"))
    assert decoding.reduction((30, 20), 4) == 1
    np.testing.assert_array_equal(decoding.decode(path, 4), noise)


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
    fraction, whole = (
        decoding.as_tensor(decoding.decode(path, 64)),
        decoding.as_tensor(np.array(decoding.load_image(path))),
    )
    assert fraction.shape != whole.shape
    one, other = (grey_views(image_size=64)([image], [""], None) for image in (fraction, whole))
    difference = (one - other).abs()
    mean, most = tolerance[content]
    assert difference.mean() <= mean and difference.max() <= most
