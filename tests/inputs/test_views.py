"""`views`: the evaluation view as open_clip takes it, training views that know their image and number, crops."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_pictures import CPU, grey_views

from inputs import decoding
from inputs.views import Views, crop_grid

# -- one view of an image


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
    views = Views(image_size=224, mean=mean, std=std, device=CPU)
    found = views([decoding.as_tensor(decoding.decode(source, 224)) for source in sources], [""] * len(sources), None)
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
    grid = crop_grid(height, width, size, count)
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
    assert crop_grid(64, 80, 32, 1) == [(16, 24)]
    assert crop_grid(50, 90, 50, 3) == [(0, 0), (0, 20), (0, 40)]
    assert crop_grid(100, 200, 50, 6) == [(0, 0), (0, 75), (0, 150), (50, 0), (50, 75), (50, 150)]
    assert crop_grid(200, 100, 50, 6) == [(0, 0), (0, 50), (75, 0), (75, 50), (150, 0), (150, 50)]


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
        places = crop_grid(*picture.shape[1:], 32, 6)
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
