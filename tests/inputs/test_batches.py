"""`batches`: orders of rows, and feeds that turn them into images, labels and texts; rows that are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_feeds import CPU, RowNumbers, digests, feed_of, letters, store_of, table_of, views_of
from torch import Tensor

from inputs import image_sources, image_store, transfer
from inputs.batches import Batch, BatchOrder, DroppedRows, Feed
from inputs.views import Views
from storage import image_files

# -- orders


rows_of_a_fold = st.lists(st.integers(0, 99), min_size=1, max_size=30, unique=True)


@given(rows_of_a_fold, st.integers(1, 40), st.booleans(), st.integers(0, 2**32 - 1))
def test_each_row_comes_once_per_pass_in_full_batches_and_one_of_what_is_left(rows, batch_size, shuffle, seed):
    order = BatchOrder(np.array(rows), batch_size=batch_size, shuffle=shuffle, seed=seed)
    for number in range(3):
        batches = list(order)
        assert sorted(np.concatenate([batch for _, batch in batches])) == sorted(rows)
        assert {view for view, _ in batches} == {number if shuffle else None}
        sizes = [len(batch) for _, batch in batches]
        assert set(sizes[:-1]) <= {batch_size} and 1 <= sizes[-1] <= batch_size


def as_lists(order: BatchOrder) -> list[tuple[image_sources.View, list[int]]]:
    return [(view, rows.tolist()) for view, rows in order]


def test_the_order_differs_between_passes_and_follows_from_the_seed():
    rows = np.array([3, 1, 4, 15, 9, 2, 6, 5, 35, 8])
    order = BatchOrder(rows, batch_size=4, shuffle=True, seed=1)
    passes = [as_lists(order) for _ in range(4)]
    assert len({tuple(row for _, batch in batches for row in batch) for batches in passes}) == 4
    again = BatchOrder(rows, batch_size=4, shuffle=True, seed=1)
    assert [as_lists(again) for _ in range(4)] == passes
    assert as_lists(BatchOrder(rows, batch_size=4, shuffle=True, seed=2)) != passes[0]
    assert rows.tolist() == [3, 1, 4, 15, 9, 2, 6, 5, 35, 8], "left alone"


def test_without_shuffling_every_pass_is_the_evaluation_view_in_order():
    order = BatchOrder(np.array([5, 0, 3, 2, 1]), batch_size=2)
    assert as_lists(order) == [(None, [5, 0]), (None, [3, 2]), (None, [1])] == as_lists(order)


# -- batches of pixels


@pytest.fixture(scope="module")
def store(demo_set) -> image_store.ImageStore:
    return store_of(demo_set)


def test_batches_are_the_same_however_many_threads_decode_and_batches_are_prepared_early(store):
    found = []
    for num_threads, num_ahead, max_memory in ((1, 0, 0), (3, 0, 1e9), (1, 2, 1e9), (3, 5, 0)):
        other = image_store.ImageStore(store.files, image_size=32, num_threads=num_threads, max_memory=max_memory)
        feed = feed_of(image_sources.PixelSource(other, views_of()), num_ahead=num_ahead)
        order = BatchOrder(np.arange(10), batch_size=4, shuffle=True, seed=3)
        found.append([list(feed.batches(order)) for _ in range(2)])
    for passes in found[1:]:
        for batches, expected in zip(passes, found[0], strict=True):
            for one, other in zip(batches, expected, strict=True):
                assert one.rows.tolist() == other.rows.tolist()
                assert torch.equal(one.inputs["image"], other.inputs["image"])
    first, second = (
        {row: image for batch in batches for row, image in zip(batch.rows, batch.inputs["image"], strict=True)}
        for batches in found[0]
    )
    assert first.keys() == second.keys() == set(range(10))
    assert not any(torch.equal(first[row], second[row]) for row in range(10)), "each pass has its own augmentation"


def test_a_feed_turns_rows_into_normalised_images_labels_and_texts(store):
    texts = ["cat", "dog", "cat", "fox"]
    reasons = ["", "dim", "", "raw"]
    feed = feed_of(
        image_sources.PixelSource(store, views_of()),
        targets={"q": np.array([0.1, 0.2, 0.3, 0.4]), "c": np.array([np.nan, 0.6, 0.7, np.nan])},
        prompts=table_of(texts),
        rationales=(table_of(reasons), np.array([bool(text) for text in reasons])),
    )
    (batch,) = feed.batches([(None, np.array([2, 3, 0]))])
    assert len(batch) == 3 and batch.rows.tolist() == [2, 3, 0]
    assert torch.equal(batch.inputs["image"], views_of()(store.load([2, 3, 0]), digests(store, [2, 3, 0]), None))
    np.testing.assert_allclose(batch.targets["q"].numpy(), [0.3, 0.4, 0.1], rtol=1e-6)
    np.testing.assert_allclose(batch.targets["c"].numpy(), [0.7, np.nan, np.nan], rtol=1e-6)
    assert all(values.dtype == torch.float32 for values in batch.targets.values())
    assert batch.labelled["q"] is None and batch.labelled["c"].tolist() == [0]
    assert batch.inputs["tokens_PN"][batch.inputs["prompt_of_B"]].equal(letters(["cat", "fox", "cat"]))
    assert batch.with_rationale.tolist() == [1]
    assert torch.equal(rationales_of(batch), letters(["raw"]))


def test_a_feed_without_texts_and_labels_has_none():
    (batch,) = feed_of(RowNumbers()).batches([(None, np.array([0, 1]))])
    assert set(batch.inputs) == {"image", "image_stage", "num_views"}
    assert batch.inputs["num_views"] == 1
    assert batch.targets == batch.labelled == {}
    assert batch.with_rationale is batch.rationales is None


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, np.nan]), min_size=1, max_size=12), st.data())
def test_places_with_a_label_are_given_unless_all_have_one(labels, drawn):
    rows = np.array(drawn.draw(st.lists(st.integers(0, len(labels) - 1), min_size=1, max_size=12)))
    (batch,) = feed_of(RowNumbers(), targets={"q": np.array(labels)}).batches([(None, rows)])
    known = [place for place, row in enumerate(rows) if labels[row] == labels[row]]
    assert (batch.labelled["q"] is None) == (len(known) == len(rows))
    if batch.labelled["q"] is not None:
        assert batch.labelled["q"].tolist() == known


def rationales_of(batch: Batch) -> Tensor:
    """Token ids of a batch's rationales, one row for each."""
    return batch.rationales["text"][batch.rationales["prompt_of_B"]]


def full_feed(source: image_sources.ImageSource, **options: Any) -> Feed:
    """A feed of six rows with everything that a batch can have, and gaps in it."""
    reasons = ["", "dim", "a", "", "raw", "bright"]
    return feed_of(
        source,
        targets={"q": np.arange(6) / 8, "c": np.array([0.1, np.nan, 0.3, 0.4, np.nan, 0.6])},
        prompts=table_of(["a", "bb", "a", "cccc", "bb", "d!"], trim=True),
        rationales=(table_of(reasons, trim=True), np.array([bool(text) for text in reasons])),
        **options,
    )


def test_a_share_has_some_of_the_images_and_their_prompts_but_the_labels_of_the_whole_batch():
    rows = np.array([3, 1, 0, 5, 2])
    source = RowNumbers()
    (part,) = full_feed(source, share=lambda rows: rows[1::2]).batches([(4, rows)])
    (whole,) = full_feed(RowNumbers()).batches([(4, rows)])
    assert source.asked == [(4, [1, 5])], "what is not in the share is not decoded"
    assert part.inputs["image"].tolist() == [[1, 4], [5, 4]]
    assert part.inputs["tokens_PN"][part.inputs["prompt_of_B"]].equal(letters(["bb", "d!"])[:, :3])
    assert part.rows.tolist() == rows.tolist() and len(part) == 5
    for task in ("q", "c"):
        torch.testing.assert_close(part.targets[task], whole.targets[task], equal_nan=True)
    assert part.labelled["q"] is whole.labelled["q"] is None
    assert part.labelled["c"].tolist() == whole.labelled["c"].tolist() == [0, 2, 3, 4]
    assert part.with_rationale.tolist() == whole.with_rationale.tolist() == [1, 3, 4]
    assert rationales_of(part).equal(rationales_of(whole))
    assert rationales_of(whole).equal(letters(["dim", "bright", "a"])[:, :7])


def test_a_feed_takes_images_from_where_it_is_told_to():
    cached = RowNumbers()
    feed = feed_of(RowNumbers())
    feed.source = cached
    list(feed.batches([(None, np.array([1, 0])), (3, np.array([2]))]))
    assert cached.asked == [(None, [1, 0]), (3, [2])] and feed.pixels.asked == []


def test_statistics_come_with_the_activations_that_they_belong_to():
    feed = feed_of(RowNumbers((1, 2), with_statistics=True), share=lambda rows: rows[1:])
    for batch in feed.batches([(None, np.array([4, 1, 0])), (5, np.array([3, 2, 1]))]):
        assert set(batch.inputs) == {"image", "statistics", "image_stage", "num_views"}
        assert torch.equal(batch.inputs["statistics"], batch.inputs["image"] + 0.5)
        assert len(batch.inputs["statistics"]) == 2


def test_a_batch_says_how_many_views_of_each_image_it_has():
    feed = feed_of(RowNumbers((3, 2)))
    evaluated, trained = feed.batches([(None, np.array([4, 1])), (5, np.array([1]))])
    assert evaluated.inputs["num_views"] == 3 and trained.inputs["num_views"] == 2
    assert evaluated.inputs["image"].tolist() == [[[row, -1, number] for number in range(3)] for row in (4, 1)]
    assert trained.inputs["image"].tolist() == [[[1, 5, 0], [1, 5, 1]]]


# -- parts of a batch


@pytest.mark.parametrize("with_statistics", [False, True], ids=["", "statistics"])
@pytest.mark.parametrize("counts", [(1, 1), (4, 3)], ids=["one view", "several views"])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_parts_of_a_batch_together_are_the_batch_with_texts_of_their_own(size, counts, with_statistics):
    source = RowNumbers(counts, with_statistics=with_statistics)
    feed = full_feed(source)
    rows = np.array([3, 1, 0, 5, 2, 4])
    (batch,) = feed.batches([(2, rows)])
    parts = feed.split(batch, size)
    assert [len(part) for part in parts] == [size] * (6 // size) + [6 % size] * (6 % size > 0)
    assert np.concatenate([part.rows for part in parts]).tolist() == rows.tolist()
    of_images = ["image", "statistics"][: 1 + with_statistics]
    for name in of_images:
        assert torch.cat([part.inputs[name] for part in parts]).equal(batch.inputs[name])
    assert source.asked == [(2, rows.tolist())], "nothing is decoded again"
    for task in ("q", "c"):
        joined = torch.cat([part.targets[task] for part in parts])
        torch.testing.assert_close(joined, batch.targets[task], equal_nan=True)
    starts = range(0, 6, size)
    found = [s + int(i) for s, part in zip(starts, parts, strict=True) if part.rationales for i in part.with_rationale]
    assert found == batch.with_rationale.tolist()
    for part in parts:  # as if it had been asked for by itself
        (alone,) = feed.batches([(2, part.rows)])
        assert part.inputs.keys() == alone.inputs.keys()
        for name in (*of_images, "text", "tokens_PN", "prompt_of_B"):
            assert part.inputs[name].equal(alone.inputs[name])
        assert part.inputs["image_stage"] == source.stage and part.inputs["text_stage"] == 0
        assert part.inputs["num_views"] == alone.inputs["num_views"] == counts[1]
        assert (part.rationales is None) == (alone.rationales is None)
        if part.rationales:
            assert rationales_of(part).equal(rationales_of(alone))
        known = (~part.targets["c"].isnan()).nonzero().flatten()
        assert part.labelled["c"] is None if len(known) == len(part) else part.labelled["c"].equal(known)


@pytest.mark.parametrize("size", [6, 7, 100])
def test_a_batch_that_is_small_enough_is_its_only_part(size):
    feed = full_feed(RowNumbers())
    (batch,) = feed.batches([(None, np.arange(6))])
    assert feed.split(batch, size) == [batch]


# -- images that can no longer be used


class Vanishing(RowNumbers):
    """A source some of whose rows can be had no more."""

    def __init__(self, gone: set[int]) -> None:
        super().__init__()
        self.gone = gone

    def prepare(self, rows: transfer.Rows, view: image_sources.View) -> Tensor:
        lost = [row for row in rows.tolist() if row in self.gone]
        if lost:
            raise image_store.Unreadable(dict.fromkeys(lost, "gone"), [Path(f"{row}.png") for row in lost])
        return super().prepare(rows, view)


def own_label_files(folder: Path, count: int) -> tuple[list[image_files.ImageFile], np.ndarray]:
    """Images in one grey each, which is also their label."""
    greys = 20 * np.arange(count)
    for row, grey in enumerate(greys):
        Image.new("RGB", (40, 40), (grey,) * 3).save(folder / f"{row:02}.png")
    return image_files.check_images(sorted(folder.iterdir())), greys.astype(float)


@settings(max_examples=25)
@given(st.sets(st.integers(0, 9), max_size=9), st.integers(1, 7), st.sampled_from([0, 2]), st.data())
def test_labels_stay_with_their_images_whatever_is_lost_and_when(tmp_path_factory, lost, batch_size, num_ahead, data):
    files, greys = own_label_files(tmp_path_factory.mktemp("greys"), 10)
    store = image_store.ImageStore(files, image_size=32, num_threads=2)
    dropping = DroppedRows(range(10))
    views = Views(image_size=32, mean=[0.0] * 3, std=[1 / 255] * 3, device=CPU)
    feed = feed_of(
        image_sources.PixelSource(store, views),
        targets={"q": np.where(greys == 60, np.nan, greys)},
        prompts=table_of([str(row) for row in range(10)]),
        num_ahead=num_ahead,
        dropping=dropping,
    )
    order = BatchOrder(np.arange(10), batch_size=batch_size, shuffle=True)
    when = {row: data.draw(st.integers(0, 2), label=f"pass before which {row} is lost") for row in sorted(lost)}
    told: list[int] = []
    dropping.tell = told.extend
    for number in range(4):
        for row in (row for row, at in when.items() if at == number):
            Image.new("RGB", (40, 40), "white").save(files[row].path)  # another image under the same name
        seen = []
        for batch in feed.batches(order):
            pixels = batch.inputs["image"].mean(dim=(1, 2, 3))
            assert len(batch) == len(batch.rows) == len(pixels) > 0
            torch.testing.assert_close(pixels, torch.tensor(greys[batch.rows], dtype=torch.float32))
            expected = torch.tensor(np.where(batch.rows == 3, np.nan, greys[batch.rows]), dtype=torch.float32)
            torch.testing.assert_close(batch.targets["q"], expected, equal_nan=True)
            texts = batch.inputs["tokens_PN"][batch.inputs["prompt_of_B"]]
            assert texts[:, 0].tolist() == [ord(str(row)) for row in batch.rows]
            seen += batch.rows.tolist()
        gone = {row for row, at in when.items() if at <= number}
        assert sorted(seen) == sorted(set(range(10)) - gone)
        assert feed.dropped == gone
    assert sorted(told) == sorted(lost), "each is told once"


def test_a_row_that_was_dropped_stays_out_also_when_its_file_comes_back_and_so_does_one_that_is_restored():
    source = Vanishing({1, 4})
    feed = feed_of(source, dropping=DroppedRows(range(5)))
    order = [(0, np.array([0, 1])), (0, np.array([4])), (0, np.array([2, 3]))]
    assert [batch.rows.tolist() for batch in feed.batches(order)] == [[0], [2, 3]], "a batch without rows is none"
    source.gone = set()
    assert [batch.rows.tolist() for batch in feed.batches(order)] == [[0], [2, 3]]
    again = feed_of(source, dropping=DroppedRows(range(5)))
    again.dropped.update(feed.dropped)
    assert [batch.rows.tolist() for batch in again.batches(order)] == [[0], [2, 3]]
    assert [batch.rows.tolist() for batch in again.batches(order[1:], num_done=0)] == [[2, 3]]
    assert [batch.rows.tolist() for batch in again.batches(order[::-1], num_done=1)] == [[0]], "nor is it counted"
    assert [batch.rows.tolist() for batch in again.batches(order[1:], num_done=1)] == []


def test_a_row_that_may_not_go_is_an_error_that_says_why_and_nothing_is_dropped():
    feed = feed_of(Vanishing({1, 4}), dropping=DroppedRows([0, 1, 2], otherwise="; because"))
    with pytest.raises(OSError, match=r"^2 image\(s\) can no longer be read: 1.png \(gone\), 4.png \(gone\); because$"):
        list(feed.batches([(0, np.array([0, 1, 4]))]))
    assert feed.dropped == set()
    with pytest.raises(OSError, match=r"1.png \(gone\)$"):
        list(feed_of(Vanishing({1})).batches([(0, np.array([0, 1]))]))


def test_the_last_row_that_may_go_is_an_error():
    feed = feed_of(Vanishing({0, 1, 2}), dropping=DroppedRows([0, 1, 2]))
    with pytest.raises(OSError, match="no training image is left"):
        list(feed.batches([(0, np.array([row])) for row in range(5)]))


@given(st.lists(st.integers(0, 30), unique=True, max_size=12), st.sets(st.integers(0, 30)))
def test_values_of_the_rows_left_find_their_places_among_all(rows, gone):
    dropping = DroppedRows()
    dropping.rows |= gone
    left = dropping.left(np.array(rows, dtype=int))
    found = dropping.whole(np.array(rows, dtype=int), np.stack([left, 2.0 * left], axis=1))
    expected = [[np.nan, np.nan] if row in gone else [row, 2 * row] for row in rows]
    np.testing.assert_array_equal(found, np.reshape(expected, (len(rows), 2)))
