"""`image_sources`: pixels, and cached activations in their place, view by view."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_feeds import CPU, RowNumbers, digests, feed_of, store_of, views_of
from torch import Tensor

from inputs import decoding, image_sources, image_store
from inputs.batches import BatchOrder
from storage import feature_cache

# -- pixels


@pytest.fixture(scope="module")
def store(demo_set) -> image_store.ImageStore:
    return store_of(demo_set)


@pytest.mark.parametrize("options", [{}, {"crops": 2, "test_crops": 4}], ids=["resized", "crops"])
@pytest.mark.parametrize("view", [None, 0, 7])
def test_pixels_are_the_views_of_the_decoded_images(store, view, options):
    rows, source = np.array([7, 2, 5]), image_sources.PixelSource(store, views_of(**options))
    (batch,) = feed_of(source).batches([(view, rows)])
    expected = views_of(**options)(
        [decoding.as_tensor(decoding.decode(store.files[row].path, 32)) for row in rows], digests(store, rows), view
    )
    assert torch.equal(batch.inputs["image"], expected)
    assert batch.inputs["image_stage"] == source.stage == 0
    assert batch.inputs["num_views"] == source.count(view) == (expected.shape[1] if options else 1)


# -- cached activations


ROWS = 6
TRAIN = np.array([4, 1, 3])  # only these have training views
SHAPE = (2, 3)


def activations(row: int, view: image_sources.View, count: int = 1) -> Tensor:
    """What the frozen layers would give for a row's view, in tests; of several views a row for each."""
    one = torch.arange(6.0).reshape(SHAPE) + 10 * row + 100 * (-1 if view is None else view)
    return one if count == 1 else torch.stack([one + number / 8 for number in range(count)])


@pytest.fixture(params=["memory-mapped", "resident"])
def cached(request, tmp_path):
    """A function that caches the evaluation view of all rows and some training views of the training rows."""

    def make(
        num_views: int, dtype: torch.dtype = torch.float32, counts: tuple[int, int] = (1, 1)
    ) -> image_sources.CachedSource:
        cache = feature_cache.FeatureCache(tmp_path / "cache", max_bytes=1e9)
        evaluation, training = (
            cache.open({"view": name}, activations(0, 0, count).shape, dtype)
            for name, count in zip(("evaluation", "training"), counts, strict=True)
        )
        source = image_sources.CachedSource(
            (evaluation, training),
            [feature_cache.key_of("image", row) for row in range(ROWS)],
            rows_of={None: np.arange(ROWS), **dict.fromkeys(range(num_views), TRAIN)},
            stage=4,
            device=CPU,
            dtype=torch.float32,
            counts=counts,
        )
        for view, rows in source.rows_of.items():
            found, keys = source.keys(rows, view)
            found.add(keys, torch.stack([activations(row, view, counts[view is not None]) for row in rows]))
        for found in (evaluation, training):
            found.flush()
        if request.param == "resident":
            source.move_to_device()
            assert set(source.resident) == set(source.rows_of)
        return source

    return make


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_training_pass_e_sees_cached_view_e_modulo_their_number(cached, num_views):
    feed = feed_of(RowNumbers())
    feed.source = cached(num_views)
    order = BatchOrder(TRAIN, batch_size=2, shuffle=True, seed=5)
    for number in range(2 * num_views + 1):
        batches = list(feed.batches(order))
        assert sorted(np.concatenate([batch.rows for batch in batches])) == sorted(TRAIN)
        for batch in batches:
            expected = torch.stack([activations(row, number % num_views) for row in batch.rows])
            assert torch.equal(batch.inputs["image"], expected)
            assert batch.inputs["image_stage"] == 4


def test_without_training_views_training_sees_the_evaluation_view(cached):
    source = cached(0)
    expected = torch.stack([activations(row, None) for row in TRAIN])
    for view in (None, 0, 1, 5):
        assert torch.equal(source.finish(source.prepare(TRAIN, view), TRAIN, view), expected)


@pytest.mark.parametrize("num_views", [0, 2])
def test_evaluation_sees_the_evaluation_view_of_any_rows(cached, num_views):
    feed = feed_of(RowNumbers(), num_ahead=2)
    feed.source = cached(num_views)
    rows = np.array([5, 0, 4, 1, 2])
    batches = list(feed.batches(BatchOrder(rows, batch_size=2)))
    found = torch.cat([batch.inputs["image"] for batch in batches])
    assert torch.equal(found, torch.stack([activations(row, None) for row in rows]))


@pytest.mark.parametrize("counts", [(4, 2), (1, 3), (3, 1)])
def test_cached_views_may_be_several_and_not_as_many_in_training_as_in_evaluation(cached, counts):
    feed = feed_of(RowNumbers())
    feed.source = cached(2, counts=counts)
    for view, seen, count in ((None, None, counts[0]), (0, 0, counts[1]), (3, 1, counts[1])):
        (batch,) = feed.batches([(view, TRAIN)])
        assert batch.inputs["num_views"] == count
        assert torch.equal(batch.inputs["image"], torch.stack([activations(row, seen, count) for row in TRAIN]))
    assert feed.source.size(feed.source.rows_of) == 6 * 4 * (ROWS * counts[0] + 2 * len(TRAIN) * counts[1])


def test_without_training_views_there_are_as_many_in_training_as_in_evaluation(cached):
    feed = feed_of(RowNumbers())
    feed.source = cached(0, counts=(4, 2))
    (batch,) = feed.batches([(1, TRAIN)])
    assert batch.inputs["num_views"] == feed.source.count(None) == 4
    assert torch.equal(batch.inputs["image"], torch.stack([activations(row, None, 4) for row in TRAIN]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_rounded_in_the_cache_and_given_as_the_type_that_they_were(cached, dtype):
    source = cached(1, dtype)
    found = source.finish(source.prepare(TRAIN, 0), TRAIN, 0)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.stack([activations(row, 0) for row in TRAIN]).to(dtype).float())


@pytest.mark.parametrize(("shape", "what"), [((512,), "embeddings"), ((257, 1024), "activations after 4 blocks")])
def test_a_cached_source_says_what_it_holds_and_how_much(tmp_path, shape, what):
    found = feature_cache.FeatureCache(tmp_path / "cache", max_bytes=1e9).open({}, shape, torch.bfloat16)
    rows_of = {None: np.arange(90_000), 0: np.arange(50_000), 1: np.arange(50_000)}
    source = image_sources.CachedSource((found, found), [], rows_of=rows_of, stage=4, device=CPU, dtype=torch.bfloat16)
    size = 190_000 * np.prod(shape) * 2 / 1e9
    assert source.describe() == f"{what}, 2 training view(s), {size:.2f} GB memory-mapped"


@pytest.mark.parametrize(("shape", "what"), [((512,), "embeddings"), ((257, 1024), "activations after 4 blocks")])
def test_a_cached_source_of_several_views_says_the_same_of_all_of_them(tmp_path, shape, what):
    cache = feature_cache.FeatureCache(tmp_path / "cache", max_bytes=1e9)
    evaluation = cache.open({"view": "evaluation"}, (5, *shape), torch.float16)
    training = cache.open({"view": "training"}, (2, *shape), torch.float16)
    rows_of = {None: np.arange(9000), 0: np.arange(7000)}
    source = image_sources.CachedSource(
        (evaluation, training), [], rows_of=rows_of, stage=4, device=CPU, dtype=torch.float16, counts=(5, 2)
    )
    size = (9000 * 5 + 7000 * 2) * np.prod(shape) * 2
    assert source.size(rows_of) == size and source.size({0: np.arange(10)}) == 10 * 2 * np.prod(shape) * 2
    assert source.describe() == f"{what}, 1 training view(s), {size / 1e9:.2f} GB memory-mapped"
