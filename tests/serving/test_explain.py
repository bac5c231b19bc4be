"""Maps of where a model looked: held against scorers that look at one known place, and against covering by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_run import finished_run, loaded

from inputs.decoding import as_tensor
from inputs.views import Views
from serving import explain
from serving.scorer import Scorer


class OnePlace:
    """A scorer that looks at one rectangle: its quality is `factor` times the mean of the red channel in there."""

    def __init__(
        self, place: tuple[int, int, int, int], *, factor: float = 1.0, crops: int = 0, resize_mode: str = "shortest"
    ) -> None:
        self.place = place
        self.factor = factor
        self.scales = {"q": None, "c": None}
        self.views = SimpleNamespace(test_crops=crops, decode_size=None, resize_mode=resize_mode)
        self.calls: list[int] = []

    def pixels(self, images, num_workers):
        return SimpleNamespace(views=self.views)

    def score(self, images, prompts, *, batch_size, clamp):
        assert not clamp
        self.calls.append(len(images))
        values = [self.factor * np.asarray(image.crop(self.place))[..., 0].mean() for image in images]
        return pd.DataFrame({"pred_quality": values, "pred_align": np.nan if prompts is None else 2.0})


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# -- where


@pytest.mark.parametrize(
    ("size", "crops", "resize_mode", "box"),
    [
        ((60, 40), 0, "shortest", (10, 0, 50, 40)),
        ((40, 60), 0, "shortest", (0, 10, 40, 50)),
        ((40, 40), 0, "shortest", (0, 0, 40, 40)),
        ((60, 40), 9, "shortest", (0, 0, 60, 40)),
        ((60, 40), 0, "squash", (0, 0, 60, 40)),
        ((60, 40), 0, "longest", (0, 0, 60, 40)),
    ],
)
def test_what_is_seen(size, crops, resize_mode, box):
    assert explain.seen_box(OnePlace((0, 0, 1, 1), crops=crops, resize_mode=resize_mode), size) == box


@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
def test_the_model_is_shown_the_box_and_nothing_else(size):
    """The evaluation view of an image is that of its box, whatever lies around."""
    views = Views(image_size=50, mean=(0.5,) * 3, std=(0.5,) * 3, device=torch.device("cpu"))
    scorer = SimpleNamespace(pixels=lambda images, num_workers: SimpleNamespace(views=views))
    image = noise(*size)
    box = tuple(map(int, explain.seen_box(scorer, size)))
    alone = Image.new("RGB", size, "red")
    alone.paste(image.crop(box), box[:2])
    seen, of_alone = (views([as_tensor(np.array(one))], [], None) for one in (image, alone))
    inner = np.s_[..., 2:-2, 2:-2]  # resizing mixes neighbours at the edge
    torch.testing.assert_close(seen[inner], of_alone[inner])


def test_patches_cover_the_box_once():
    counts = np.zeros((40, 60), int)
    for left, top, right, bottom in explain.patches((10, 0, 51, 40), 7):
        counts[top:bottom, left:right] += 1
    assert (counts[:, 10:51] == 1).all() and counts.sum() == 40 * 41


@pytest.mark.parametrize(("box", "grid"), [((0, 0, 5, 100), 8), ((0, 0, 100, 5), 8), ((0, 0, 100, 100), 0)])
def test_a_box_that_cannot_be_cut_is_refused(box, grid):
    with pytest.raises(ValueError, match=f"{grid}"):
        explain.patches(box, grid)


# -- how much


@pytest.mark.parametrize("factor", [1.0, -2.0])
@pytest.mark.parametrize(("size", "crops"), [((80, 80), 0), ((120, 80), 0), ((80, 120), 0), ((120, 80), 4)])
def test_the_map_is_the_change_in_the_patch_that_counts_and_zero_elsewhere(size, crops, factor):
    """Patch row 2, column 5 of 8: the scorer looks there and nowhere else."""
    image = noise(*size)
    left, top, right, bottom = box = tuple(map(int, explain.seen_box(OnePlace((0, 0, 1, 1), crops=crops), size)))
    place = explain.patches(box, 8)[2 * 8 + 5]
    assert place[0] == left + (right - left) * 5 // 8 and place[1] == top + (bottom - top) * 2 // 8
    image.paste((255, 0, 0), place)
    found = explain.occlusion_map(OnePlace(place, factor=factor, crops=crops), image)
    expected = np.zeros((8, 8))
    expected[2, 5] = factor * (255 - np.asarray(image.crop(box))[..., 0].mean().round())
    assert list(found) == ["q"]  # there is no prompt, so no consistency
    np.testing.assert_allclose(found["q"], expected, atol=1e-9)


def test_the_image_is_taken_upright(tmp_path):
    image = noise(48, 48)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    place = explain.patches((0, 0, 48, 48), 8)[7]
    found = explain.occlusion_map(OnePlace(place), tmp_path / "turned.png")["q"]
    upright = explain.occlusion_map(OnePlace(place), image.transpose(Image.Transpose.ROTATE_270))["q"]
    assert np.count_nonzero(found) == 1
    np.testing.assert_array_equal(found, upright)


def test_large_images_are_copied_a_few_at_a_time_with_the_same_result(monkeypatch):
    image, scorer, few = noise(64, 64), OnePlace((0, 0, 30, 30)), OnePlace((0, 0, 30, 30))
    whole = explain.occlusion_map(scorer, image, "a prompt", grid=4)
    monkeypatch.setattr(explain, "COPY_PIXELS", 5 * 64 * 64)
    told: list[int] = []
    parts = explain.occlusion_map(few, image, "a prompt", grid=4, progress=told.append)
    assert (scorer.calls, few.calls, told) == ([17], [5, 5, 5, 2], [5, 5, 5, 2])
    assert list(whole) == ["q", "c"] and not whole["c"].any()
    for task in whole:
        np.testing.assert_array_equal(parts[task], whole[task])


@pytest.fixture(scope="module", params=[(), ("--crops", "2", "--test_crops", "4", "--global_view")], ids=["", "crops"])
def scorer(request, demo_set) -> Scorer:
    """A trained model; with crops it looks at the whole image at native size, too."""
    return loaded(finished_run(demo_set, *request.param))


def test_the_map_of_a_model_is_what_covering_by_hand_changes(scorer, demo_set):
    path = next(iter(sorted(Path(demo_set[1]).glob("*.jpg"))))
    image = Image.open(path).convert("RGB")
    found = explain.occlusion_map(scorer, path, "a red circle", grid=4, batch_size=16)
    assert set(found) == {"q", "c"}
    width, height = image.size
    assert width == height  # so that the box is the image
    mean = tuple(int(value) for value in np.asarray(image).mean(axis=(0, 1)).round())
    by_hand = image.copy()
    row, column = divmod(int(np.abs(found["q"]).argmax()), 4)  # where it counts most
    left, top = width * column // 4, height * row // 4
    by_hand.paste(mean, (left, top, width * (column + 1) // 4, height * (row + 1) // 4))
    scores = scorer.score([image, by_hand], "a red circle", clamp=False)
    change = scores.iloc[0] - scores.iloc[1]
    assert abs(change["pred_quality"]) > 1e-6
    np.testing.assert_allclose(found["q"][row, column], change["pred_quality"], atol=1e-5)
    np.testing.assert_allclose(found["c"][row, column], change["pred_align"], atol=1e-5)


# -- the picture


def test_red_raises_blue_lowers_and_what_is_not_seen_is_dark():
    image = Image.new("RGB", (60, 20), (100, 100, 100))
    values = np.array([[1.0, -1.0], [0.5, 0.0]])
    shown = np.asarray(explain.overlay(image, values, (20, 0, 40, 20))).astype(int)
    assert shown.shape == (20, 60, 3)
    (strong, lower), (half, none) = ([shown[y, x] for x in (25, 35)] for y in (5, 15))
    assert strong[0] > strong[2] + 50 and lower[2] > lower[0] + 50
    assert (none == 100).all() and (shown[:, :20] < 50).all() and (shown[:, 40:] < 50).all()
    np.testing.assert_allclose(half - 100, (strong - 100) / 2, atol=1)


def test_a_limit_tells_how_strong_a_colour_is():
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    strong, weak = (
        np.asarray(explain.overlay(image, np.array([[0.1]]), limit=limit)).astype(int)[0, 0] for limit in (0.1, 1.0)
    )
    np.testing.assert_allclose(weak - 100, (strong - 100) / 10, atol=1)
    assert (np.asarray(explain.overlay(image, np.zeros((2, 2)))) == 100).all()
