"""`image_sources`: pixels, and cached activations in their place, view by view."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_feeds import CPU, RowNumbers, digests, feed_of, store_of, views_of
from torch import Tensor

from inputs import decoding, image_sources, image_store
from inputs.batches import BatchOrder
from inputs.image_sources import Layout
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


# -- rows of a cache


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views", [(), (1,), (3,)], ids=["one view", "one of several", "several views"])
def test_activations_and_statistics_lie_in_one_row_and_are_read_bit_for_bit(views, dtype):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(5, *views, 4, 3, generator=generator).to(dtype)
    numbers = torch.randint(-(2**31), 2**31, (5, *views, 7), generator=generator, dtype=torch.int32)
    statistics = numbers.view(torch.float32)  # any bits, those of NaN and of what half precision cannot hold too
    layout = Layout(tuple(image.shape[1:]), tuple(statistics.shape[1:]))
    rows = layout.pack(image, statistics)
    assert rows.dtype == dtype and rows.ndim == 2
    assert rows.nbytes == image.nbytes + statistics.nbytes
    order = torch.tensor([3, 0, 4])
    for given in (torch.float32, dtype):
        found = layout.unpack(rows[order], given)
        assert set(found) == {"image", "statistics"}
        assert found["image"].dtype == given and torch.equal(found["image"], image[order].to(given))
        assert found["statistics"].dtype == torch.float32
        assert torch.equal(found["statistics"].view(torch.int32), numbers[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views", [(), (3,)], ids=["one view", "several views"])
def test_without_statistics_a_row_is_the_activations_alone(views, dtype):
    image = torch.randn(5, *views, 4, 3).to(dtype)
    layout = Layout(tuple(image.shape[1:]), (*views, 0))
    rows = layout.pack(image, torch.zeros(5, *views, 0))
    assert torch.equal(rows, image.flatten(1))
    found = layout.unpack(rows, dtype)
    assert set(found) == {"image"} and torch.equal(found["image"], image)


# -- cached activations


ROWS = 6
TRAIN = np.array([4, 1, 3])  # only these have training views
SHAPE = (2, 3)
NUM_STATISTICS = 5


def activations(row: int, view: image_sources.View, count: int = 1) -> Tensor:
    """What the frozen layers would give for a row's view, in tests; of several views a row for each."""
    one = torch.arange(6.0).reshape(SHAPE) + 10 * row + 100 * (-1 if view is None else view)
    return one if count == 1 else torch.stack([one + number / 8 for number in range(count)])


def statistics(row: int, view: image_sources.View, count: int = 1) -> Tensor:
    """Numbers that half precision does not hold, behind those activations."""
    return 1 / (3 + activations(row, view, count).flatten(-2)[..., :NUM_STATISTICS])


def layouts_of(counts: tuple[int, int], shape: tuple[int, ...], num_statistics: int) -> tuple[Layout, Layout]:
    several = [() if count == 1 else (count,) for count in counts]
    evaluation, training = (Layout((*views, *shape), (*views, num_statistics)) for views in several)
    return evaluation, training


@pytest.fixture(params=["memory-mapped", "resident"])
def cached(request, tmp_path):
    """A function that caches the evaluation view of all rows and some training views of the training rows."""

    def make(
        num_views: int,
        dtype: torch.dtype = torch.float32,
        counts: tuple[int, int] = (1, 1),
        num_statistics: int = 0,
    ) -> image_sources.CachedSource:
        cache = feature_cache.FeatureCache(tmp_path / "cache", max_bytes=1e9)
        layouts = layouts_of(counts, SHAPE, num_statistics)

        def row_of(row: int, view: image_sources.View) -> Tensor:
            count = counts[view is not None]
            values = statistics(row, view, count)[..., :num_statistics]
            return layouts[view is not None].pack(activations(row, view, count)[None].to(dtype), values[None])[0]

        evaluation, training = (
            cache.open({"view": name}, row_of(0, view).shape, dtype)
            for name, view in (("evaluation", None), ("training", 0))
        )
        source = image_sources.CachedSource(
            (evaluation, training),
            [feature_cache.key_of("image", row) for row in range(ROWS)],
            rows_of={None: np.arange(ROWS), **dict.fromkeys(range(num_views), TRAIN)},
            stage=4,
            device=CPU,
            dtype=torch.float32,
            layouts=layouts,
            counts=counts,
        )
        for view, rows in source.rows_of.items():
            found, keys = source.keys(rows, view)
            found.add(keys, torch.stack([row_of(row, view) for row in rows]))
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
        assert torch.equal(source.finish(source.prepare(TRAIN, view), TRAIN, view)["image"], expected)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_rounded_in_the_cache_and_given_as_the_type_that_they_were(cached, dtype):
    source = cached(1, dtype)
    found = source.finish(source.prepare(TRAIN, 0), TRAIN, 0)
    assert set(found) == {"image"} and found["image"].dtype == torch.float32
    assert torch.equal(found["image"], torch.stack([activations(row, 0) for row in TRAIN]).to(dtype).float())


@pytest.mark.parametrize("counts", [(1, 1), (4, 2), (1, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_cached_beside_the_activations_and_never_rounded(cached, dtype, counts):
    feed = feed_of(RowNumbers())
    feed.source = cached(2, dtype, counts, NUM_STATISTICS)
    for view, seen in ((None, None), (0, 0), (3, 1)):
        (batch,) = feed.batches([(view, TRAIN)])
        count = counts[view is not None]
        expected = torch.stack([activations(row, seen, count) for row in TRAIN]).to(dtype).float()
        assert torch.equal(batch.inputs["image"], expected)
        assert torch.equal(batch.inputs["statistics"], torch.stack([statistics(row, seen, count) for row in TRAIN]))
    per_view = 6 * dtype.itemsize + 4 * NUM_STATISTICS
    assert feed.source.size(feed.source.rows_of) == per_view * (ROWS * counts[0] + 2 * len(TRAIN) * counts[1])


@pytest.mark.parametrize("counts", [(1, 1), (5, 2)], ids=["one view", "several views"])
@pytest.mark.parametrize(("num_statistics", "also"), [(0, ""), (6, " and statistics")])
@pytest.mark.parametrize(
    ("is_embedding", "shape", "what"),
    [(True, (512,), "embeddings"), (False, (257, 1024), "activations after 4 blocks")],
)
def test_a_cached_source_says_what_it_holds_and_how_much(
    tmp_path, is_embedding, shape, what, num_statistics, also, counts
):
    cache = feature_cache.FeatureCache(tmp_path / "cache", max_bytes=1e9)
    per_view = int(np.prod(shape)) + 2 * num_statistics  # numbers of two bytes; a statistic takes two of them
    evaluation, training = (cache.open({"count": n}, (n * per_view,), torch.bfloat16) for n in counts)
    rows_of = {None: np.arange(9000), 0: np.arange(7000), 1: np.arange(7000)}
    source = image_sources.CachedSource(
        (evaluation, training),
        [],
        rows_of=rows_of,
        stage=4,
        device=CPU,
        dtype=torch.bfloat16,
        layouts=layouts_of(counts, shape, num_statistics),
        counts=counts,
        is_embedding=is_embedding,
    )
    size = 2 * per_view * (9000 * counts[0] + 14_000 * counts[1])
    assert source.size(rows_of) == size and source.size({0: np.arange(10)}) == 2 * per_view * 10 * counts[1]
    assert source.describe() == f"{what}{also}, 2 training view(s), {size / 1e9:.2f} GB memory-mapped"
