"""`statistics` against plain definitions in NumPy and SciPy, and on pictures whose values are known."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from inputs import batches, decoding, image_store
from inputs.statistics import NAMES, ImageStatistics, simple_statistics
from storage import feature_cache, image_files

SIZES = [(64, 48), (33, 70), (9, 9), (8, 8), (7, 20), (1, 30), (30, 1), (1, 1)]


def found_in(pixels_HW3: np.ndarray) -> dict[str, float]:
    """The statistics of a picture by their names."""
    values = simple_statistics(torch.from_numpy(pixels_HW3.astype(np.uint8)).permute(2, 0, 1))
    assert values.shape == (len(NAMES),) and values.dtype == torch.float32
    return dict(zip(NAMES, values.tolist(), strict=True))


def plain(pixels_HW3: np.ndarray) -> dict[str, float]:
    """The definitions, for a picture of at most 256 pixels per side."""
    red, green, blue = np.moveaxis(pixels_HW3 / 255, 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    height, width = luma.shape
    opponents = red - green, (red + green) / 2 - blue
    across, down = abs(np.diff(luma, axis=1)), abs(np.diff(luma, axis=0))
    details = [
        abs(luma[y, x] - luma[y, x + 1] - luma[y + 1, x] + luma[y + 1, x + 1]) / 2
        for y in range(height - 1)
        for x in range(width - 1)
    ]
    shares = []  # steps over the border of two blocks, in relation to all
    for steps in (across, down.T):
        at_border = [steps[:, x] for x in range(steps.shape[1]) if (x + 1) % 8 == 0]
        shares.append((np.mean(at_border) + 1e-3) / (steps.mean() + 1e-3) if at_border else 1)
    return {
        "brightness": luma.mean(),
        "contrast": luma.std(),
        "entropy": stats.entropy(np.histogram(luma, bins=64, range=(0, 1))[0], base=2),
        "dark": np.mean(luma < 0.05),
        "bright": np.mean(luma > 0.95),
        "saturation": np.mean(pixels_HW3.max(axis=2) - pixels_HW3.min(axis=2)) / 255,
        "colourfulness": np.hypot(*(o.std() for o in opponents)) + 0.3 * np.hypot(*(o.mean() for o in opponents)),
        "gradient": sum(steps.mean() if steps.size else 0 for steps in (across, down)) / 2,
        "sharpness": math.log(ndimage.laplace(luma, mode="nearest").var() + 1e-6),
        "noise": np.mean(details) if details else 0,
        "blockiness": math.log(np.mean(shares)),
        "size": math.log(min(height, width)),
    }


def noise(height: int, width: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(low, high, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A few colours that flow into each other."""
    small = Image.fromarray(noise(height // 40 + 2, width // 40 + 2))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def flat(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (40, 30, 3))


def test_there_are_twelve_with_names_of_their_own():
    assert len(NAMES) == len(set(NAMES)) == 12


@pytest.mark.parametrize("picture", [noise, smooth])
@pytest.mark.parametrize("size", SIZES)
def test_every_statistic_matches_its_plain_definition(size, picture):
    pixels = picture(*size)
    found, expected = found_in(pixels), plain(pixels)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-5, rel=1e-4), name


@settings(max_examples=60)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 2, 256]), st.integers(0, 999))
def test_they_are_finite_for_pictures_of_any_size_and_within_their_range(height, width, levels, seed):
    """Of one colour, of black and white, and of all colours."""
    codes = np.random.default_rng(seed).integers(0, levels, (height, width, 3))
    found = found_in(codes * 255 // max(1, levels - 1))
    assert all(map(math.isfinite, found.values()))
    for name in ("brightness", "dark", "bright", "saturation", "gradient", "noise"):
        assert 0 <= found[name] <= 1 + 1e-6, name
    assert 0 <= found["contrast"] <= 0.5 + 1e-6
    assert -1e-6 <= found["entropy"] <= min(6, math.log2(height * width)) + 1e-5
    assert abs(found["blockiness"]) <= math.log(1000)
    assert found["size"] == pytest.approx(math.log(min(height, width)), abs=1e-6)


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_flat_grey_picture_has_a_brightness_and_nothing_else(level):
    found = found_in(flat(level, level, level))
    assert found.pop("brightness") == pytest.approx(level / 255, abs=1e-6)
    assert found.pop("dark") == (level == 0) and found.pop("bright") == (level == 255)
    assert found.pop("size") == pytest.approx(math.log(30))
    assert found.pop("sharpness") == pytest.approx(math.log(1e-6), abs=1e-3)
    assert max(map(abs, found.values())) < 1e-5, found


def test_a_red_picture_is_saturated_and_colourful_but_has_no_contrast():
    found = found_in(flat(255, 0, 0))
    assert found["brightness"] == pytest.approx(0.299)
    assert found["saturation"] == 1
    assert found["colourfulness"] == pytest.approx(0.3 * math.hypot(1, 0.5))
    assert found["contrast"] == pytest.approx(0, abs=1e-6) and found["gradient"] == 0


def test_a_chessboard_of_pixels_is_all_contrast_and_detail():
    board = np.indices((16, 32)).sum(axis=0) % 2 * 255
    found = found_in(np.repeat(board[..., None], 3, axis=2))
    for name, value in {"brightness": 0.5, "contrast": 0.5, "entropy": 1, "dark": 0.5, "bright": 0.5}.items():
        assert found[name] == pytest.approx(value), name
    for name, value in {"saturation": 0, "colourfulness": 0, "gradient": 1, "noise": 1, "blockiness": 0}.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_blur_takes_and_noise_adds_what_sharpness_gradient_and_noise_measure():
    picture, rng = smooth(120, 160), np.random.default_rng(0)
    picture[40:70, 50:90] = 0  # with edges
    grain = rng.normal(0, 12, picture.shape)
    noisy = [(picture + amount * grain).clip(0, 255) for amount in (1, 2, 3)]
    blurred = [ndimage.gaussian_filter(noisy[0], (sigma, sigma, 0)) for sigma in (2, 1, 0.5)]
    found = [found_in(pixels) for pixels in (*blurred, *noisy)]
    for name in ("sharpness", "gradient", "noise"):
        values = [each[name] for each in found]
        assert values == sorted(values) and min(np.diff(values)) > 0, name


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("size", [(120, 160), (530, 700), (265, 300)])
def test_the_worse_a_jpeg_the_more_it_shows_its_blocks_wherever_it_is_looked_at(size):
    picture = smooth(*size)
    found = [found_in(as_jpeg(picture, quality))["blockiness"] for quality in (95, 30, 10, 3)]
    assert found == sorted(found) and found[-1] > found[0] + 0.7


def test_blocks_of_a_single_colour_have_all_their_steps_at_the_borders():
    blocks = np.kron(noise(6, 8), np.ones((8, 8, 1), dtype=np.uint8))
    found = found_in(blocks)["blockiness"]
    assert found == pytest.approx(math.log((63 / 7 + 47 / 5) / 2), abs=0.1)  # all steps over those at borders
    assert found_in(blocks[4:, 4:])["blockiness"] < -3, "another grid is none of a JPEG"


def test_of_a_large_picture_the_middle_is_looked_at_from_a_whole_block_on():
    picture = noise(530, 701)
    picture[:, ::3] = 0
    top, left = (530 - 256) // 2 // 8 * 8, (701 - 256) // 2 // 8 * 8
    found, middle = found_in(picture), found_in(picture[top : top + 256, left : left + 256])
    assert found.pop("size") == pytest.approx(math.log(530)) and middle.pop("size") == pytest.approx(math.log(256))
    assert found == middle


def test_the_picture_is_left_alone():
    picture = torch.from_numpy(noise(20, 30)).permute(2, 0, 1)
    before = picture.clone()
    simple_statistics(picture)
    assert torch.equal(picture, before)


def test_statistics_are_those_of_all_pixels_however_small_an_image_is_decoded(tmp_path):
    rng = np.random.default_rng(0)
    for number, size in enumerate([(800, 700), (60, 50)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    files = image_files.check_images(sorted(tmp_path.glob("*.png")))
    store = image_store.ImageStore(files, image_size=56, num_threads=1)
    assert store.num_reduced == 1
    found = ImageStatistics(store, None).of_all()
    for row, file in zip(found, files, strict=True):
        whole = decoding.as_tensor(decoding.decode(file.path, None))
        np.testing.assert_allclose(row, simple_statistics(whole), rtol=1e-5)


def test_statistics_of_a_cache_are_those_computed_and_each_is_computed_once(tmp_path, demo_set, monkeypatch):
    files = image_files.check_images(sorted(demo_set[1].iterdir())[:6])
    store = image_store.ImageStore(files, image_size=112, num_threads=1)
    expected = ImageStatistics(store, None).of_all()
    cache = feature_cache.FeatureCache(tmp_path / "cache", 1e9)
    first = ImageStatistics(store, cache)
    first.observe(np.array([0, 2]), store.load([0, 2]))
    np.testing.assert_allclose(first.of_all(), expected, rtol=1e-6)
    monkeypatch.setattr(store, "load", None)  # nothing is left to decode
    again = ImageStatistics(store, feature_cache.FeatureCache(tmp_path / "cache", 1e9))
    np.testing.assert_allclose(again.of_all(), expected, rtol=1e-6)


@pytest.fixture
def large_files(tmp_path) -> list[image_files.ImageFile]:
    """Checked images that are decoded at a fraction of their size."""
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (700, 800, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    return image_files.check_images(sorted(tmp_path.glob("*.png")))


def test_statistics_of_an_image_that_is_lost_are_not_a_number_where_it_may_be_left_out(large_files):
    def statistics(droppable: Sequence[int]) -> ImageStatistics:
        store = image_store.ImageStore(large_files, image_size=56, num_threads=1)
        return ImageStatistics(store, None, batches.DroppedRows(droppable))

    expected = statistics([]).of_all()
    Image.new("RGB", (800, 700)).save(large_files[1].path)
    lost = statistics([0, 1])
    found = lost.of_all()
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    assert np.isnan(found[1]).all() and lost.dropping.rows == {1}
    with pytest.raises(OSError, match=r"1\.png \(has changed since it was checked\)"):
        statistics([0, 2]).of_all()


def test_statistics_look_at_no_other_image_than_was_decoded(large_files):
    store = image_store.ImageStore(large_files, image_size=56, num_threads=1)
    decoded = store.load([1])
    Image.new("RGB", (800, 700)).save(large_files[1].path)
    with pytest.raises(image_store.Unreadable, match="has changed since it was checked"):
        ImageStatistics(store, None).observe(np.array([1]), decoded)
