"""`inputs.py`: orders of rows, text tables, pixels and cached activations, and the batches that are made of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import features
import images
import inputs

CPU = torch.device("cpu")
LENGTH = 8  # of the token rows that `letters` makes
END = 999


def letters(texts: Sequence[str], length: int = LENGTH) -> Tensor:
    """A tokenizer for tests: codes of letters, 0 for "!" as CLIP has it, then an end token, padded with 0."""
    rows = [[0 if letter == "!" else ord(letter) for letter in text] + [END] for text in texts]
    return torch.tensor([(row + [0] * length)[:length] for row in rows]).reshape(len(rows), length)


def table_of(texts: Sequence[str], **options: Any) -> inputs.TextTable:
    return inputs.TextTable(texts, letters, CPU, **options)


class RowNumbers:
    """A source for tests whose activations tell which row and view they are of; it notes what it was asked for.

    Where a view consists of several, the third number tells which of them.
    """

    stage = 2

    def __init__(self, counts: tuple[int, int] = (1, 1)) -> None:
        """`counts`: how many the evaluation view and a training view consist of."""
        self.counts = counts
        self.asked: list[tuple[inputs.View, list[int]]] = []

    def count(self, view: inputs.View) -> int:
        return self.counts[view is not None]

    def prepare(self, rows: inputs.Rows, view: inputs.View) -> Tensor:
        self.asked.append((view, rows.tolist()))
        return torch.from_numpy(rows)

    def finish(self, prepared: Tensor, rows: inputs.Rows, view: inputs.View) -> Tensor:
        assert prepared.tolist() == rows.tolist()
        found = torch.stack([prepared, torch.full_like(prepared, -1 if view is None else view)], dim=1)
        if self.count(view) == 1:
            return found
        several = torch.arange(self.count(view)).expand(len(rows), -1)[..., None]
        return torch.cat([found[:, None].expand(-1, self.count(view), -1), several], dim=2)


def feed_of(source: inputs.ImageSource, **options: Any) -> inputs.Feed:
    return inputs.Feed(**{"pixels": source, "device": CPU, "targets": {}, "prompts": None, **options})


# -- orders


rows_of_a_fold = st.lists(st.integers(0, 99), min_size=1, max_size=30, unique=True)


@given(rows_of_a_fold, st.integers(1, 40), st.booleans(), st.integers(0, 2**32 - 1))
def test_each_row_comes_once_per_pass_in_full_batches_and_one_of_what_is_left(rows, batch_size, shuffle, seed):
    order = inputs.BatchOrder(np.array(rows), batch_size=batch_size, shuffle=shuffle, seed=seed)
    for number in range(3):
        batches = list(order)
        assert sorted(np.concatenate([batch for _, batch in batches])) == sorted(rows)
        assert {view for view, _ in batches} == {number if shuffle else None}
        sizes = [len(batch) for _, batch in batches]
        assert set(sizes[:-1]) <= {batch_size} and 1 <= sizes[-1] <= batch_size


def as_lists(order: inputs.BatchOrder) -> list[tuple[inputs.View, list[int]]]:
    return [(view, rows.tolist()) for view, rows in order]


def test_the_order_differs_between_passes_and_follows_from_the_seed():
    rows = np.array([3, 1, 4, 15, 9, 2, 6, 5, 35, 8])
    order = inputs.BatchOrder(rows, batch_size=4, shuffle=True, seed=1)
    passes = [as_lists(order) for _ in range(4)]
    assert len({tuple(row for _, batch in batches for row in batch) for batches in passes}) == 4
    again = inputs.BatchOrder(rows, batch_size=4, shuffle=True, seed=1)
    assert [as_lists(again) for _ in range(4)] == passes
    assert as_lists(inputs.BatchOrder(rows, batch_size=4, shuffle=True, seed=2)) != passes[0]
    assert rows.tolist() == [3, 1, 4, 15, 9, 2, 6, 5, 35, 8], "left alone"


def test_without_shuffling_every_pass_is_the_evaluation_view_in_order():
    order = inputs.BatchOrder(np.array([5, 0, 3, 2, 1]), batch_size=2)
    assert as_lists(order) == [(None, [5, 0]), (None, [3, 2]), (None, [1])] == as_lists(order)


# -- texts


def test_a_text_table_tokenises_each_text_once_and_gives_a_batch_its_distinct_ones():
    asked: list[str] = []

    def tokenize(texts: Sequence[str]) -> Tensor:
        asked.extend(texts)
        return letters(texts)

    texts = ["cat", "dog", "cat", "", "fox", "dog"]
    table = inputs.TextTable(texts, tokenize, CPU)
    assert sorted(asked) == sorted(set(texts))
    rows = np.array([5, 0, 1, 2, 5])
    chosen = table.select(rows)
    assert len(chosen["tokens_PN"]) == 2 and chosen["text_stage"] == 0
    assert torch.equal(chosen["tokens_PN"][chosen["prompt_of_B"]], letters([texts[row] for row in rows]))
    assert len(asked) == 4


@settings(max_examples=100)
@given(st.lists(st.text("ab!猫", max_size=LENGTH), min_size=1, max_size=12), st.booleans(), st.data())
def test_any_batch_of_texts_maps_back_to_its_rows_cut_behind_the_longest_if_trimmed(texts, trim, drawn):
    rows = np.array(drawn.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=12)))
    table = table_of(texts, trim=trim)
    expected = [texts[row] for row in rows]

    def used(text: str) -> int:
        """Tokens up to the end token or, where that was cut off, up to the last that is not padding."""
        return len(text) + 1 if len(text) < LENGTH else len(text.rstrip("!")) or LENGTH

    length = max(map(used, expected)) if trim else LENGTH
    chosen = table.select(rows)
    assert len(chosen["tokens_PN"]) == len(set(expected))
    assert torch.equal(chosen["tokens_PN"][chosen["prompt_of_B"]], letters(expected)[:, :length])
    assert torch.equal(chosen["text"], chosen["tokens_PN"])


TEXTS = ["a", "a cat", "dogs", "a", "a!!"]


@pytest.mark.parametrize("rows", [[0, 3], [2, 4, 2], [4, 1, 0, 2, 3]])
@pytest.mark.parametrize("trim", [False, True])
def test_a_table_gives_the_activations_that_enter_a_stage_of_the_same_texts_and_length(trim, rows):
    table = table_of(TEXTS, trim=trim)
    longest = int(table.lengths.max())
    table.enter_at(3, table.host_tokens_UN[:, :longest, None] * torch.tensor([1, 10]))  # (U, N, W)
    chosen = table.select(np.array(rows))
    tokens = letters([TEXTS[row] for row in rows])
    length = max(len(TEXTS[row]) + 1 for row in rows) if trim else LENGTH
    assert chosen["text_stage"] == 3
    assert chosen["text"].shape == (len({TEXTS[row] for row in rows}), length, 2)
    assert torch.equal(chosen["tokens_PN"][chosen["prompt_of_B"]], tokens[:, :length])
    assert torch.equal(chosen["text"][chosen["prompt_of_B"]], tokens[:, :length, None] * torch.tensor([1, 10]))


@pytest.mark.parametrize("trim", [False, True])
def test_embeddings_of_texts_are_given_whole_and_tokens_again_from_stage_0_on(trim):
    table = table_of(TEXTS, trim=trim)
    weights = torch.rand(LENGTH, 20)  # more values than tokens
    table.enter_at(5, table.host_tokens_UN.float() @ weights)  # (U, E)
    rows = np.array([4, 0, 2])
    chosen = table.select(rows)
    assert chosen["text_stage"] == 5 and chosen["text"].shape == (3, 20)
    expected = letters([TEXTS[row] for row in rows]).float() @ weights
    torch.testing.assert_close(chosen["text"][chosen["prompt_of_B"]], expected)
    table.enter_at(0, None)
    chosen = table.select(rows)
    assert chosen["text_stage"] == 0 and torch.equal(chosen["text"], chosen["tokens_PN"])


# -- prompts with levels


QUALITY, CONSISTENCY = ("bad", "so so", "good"), ("{prompt}? no", "'{prompt}'", "yes, {prompt}!")
LONG = 40  # tokens: more than any of these texts has
odd_prompts = st.text("a{}0%\\!猫", max_size=8) | st.sampled_from(["{prompt}", "{0}", "{}", "{{a}}", "good", "'a'"])


def levelled(prompts: Sequence[str], **options: Any) -> inputs.LevelledTexts:
    tokenize = partial(letters, length=LONG)
    return inputs.LevelledTexts(prompts, tokenize, CPU, quality=QUALITY, consistency=CONSISTENCY, **options)


def with_levels(prompt: str) -> list[str]:
    """What an image with this prompt is compared with, by hand."""
    return [prompt, prompt + "? no", "'" + prompt + "'", "yes, " + prompt + "!"]


@settings(max_examples=100)
@given(st.lists(odd_prompts, min_size=1, max_size=6), st.booleans(), st.data())
def test_a_prompt_is_followed_by_its_own_levels_whatever_letters_it_has(prompts, trim, drawn):
    rows = np.array(drawn.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=8)))
    chosen = levelled(prompts, trim=trim).select(rows)
    expected = [with_levels(prompts[row]) for row in rows]
    distinct = {*QUALITY, *(text for texts in expected for text in texts)}
    length = max(map(len, distinct)) + 1 if trim else LONG
    assert chosen["tokens_PN"].shape == (len(distinct), length)
    assert chosen["prompt_of_B"].shape == (len(rows), 4)
    for places, texts in zip(chosen["prompt_of_B"], expected, strict=True):
        assert torch.equal(chosen["tokens_PN"][places], letters(texts, LONG)[:, :length])
    assert torch.equal(chosen["tokens_PN"][chosen["level_of_K"]], letters(QUALITY, LONG)[:, :length])


def test_texts_with_levels_are_tokenised_once_and_may_be_embedded_ahead():
    prompts = ["cat", "dog", "cat", ""]
    table = levelled(prompts, trim=True)
    assert len(table.tokens_UN) == 3 * 4 + len(QUALITY)
    table.enter_at(5, table.host_tokens_UN.float()[:, :4] * 0.5)  # (U, E)
    chosen = table.select(np.array([2, 3]))
    assert chosen["text_stage"] == 5
    expected = torch.stack([letters(with_levels(prompt), LONG)[:, :4] * 0.5 for prompt in ("cat", "")])
    assert torch.equal(chosen["text"][chosen["prompt_of_B"]], expected)
    assert torch.equal(chosen["text"][chosen["level_of_K"]], letters(QUALITY, LONG)[:, :4] * 0.5)


# -- batches of pixels


@pytest.fixture(scope="module")
def store(demo_set) -> images.ImageStore:
    files = images.check_images(sorted(demo_set[1].iterdir())[:10])
    return images.ImageStore(files, image_size=32, num_threads=2, max_memory=1e9)


def views_of(**options: Any) -> images.Views:
    usual = {"image_size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5), "device": CPU, "seed": 1}
    return images.Views(**{**usual, "crop_scale_min": 0.5, "flip": True, **options})


def digests(store: images.ImageStore, rows: Sequence[int] | np.ndarray) -> list[str]:
    return [store.files[row].digest for row in rows]


@pytest.mark.parametrize("options", [{}, {"crops": 2, "test_crops": 4}], ids=["resized", "crops"])
@pytest.mark.parametrize("view", [None, 0, 7])
def test_pixels_are_the_views_of_the_decoded_images(store, view, options):
    rows, source = np.array([7, 2, 5]), inputs.PixelSource(store, views_of(**options))
    (batch,) = feed_of(source).batches([(view, rows)])
    expected = views_of(**options)(
        [images.as_tensor(images.decode(store.files[row].path, 32)) for row in rows], digests(store, rows), view
    )
    assert torch.equal(batch.inputs["image"], expected)
    assert batch.inputs["image_stage"] == source.stage == 0
    assert batch.inputs["num_views"] == source.count(view) == (expected.shape[1] if options else 1)


def test_batches_are_the_same_however_many_threads_decode_and_batches_are_prepared_early(store):
    found = []
    for num_threads, num_ahead, max_memory in ((1, 0, 0), (3, 0, 1e9), (1, 2, 1e9), (3, 5, 0)):
        other = images.ImageStore(store.files, image_size=32, num_threads=num_threads, max_memory=max_memory)
        feed = feed_of(inputs.PixelSource(other, views_of()), num_ahead=num_ahead)
        order = inputs.BatchOrder(np.arange(10), batch_size=4, shuffle=True, seed=3)
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
        inputs.PixelSource(store, views_of()),
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


def rationales_of(batch: inputs.Batch) -> Tensor:
    """Token ids of a batch's rationales, one row for each."""
    return batch.rationales["text"][batch.rationales["prompt_of_B"]]


def full_feed(source: inputs.ImageSource, **options: Any) -> inputs.Feed:
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


def test_a_batch_says_how_many_views_of_each_image_it_has():
    feed = feed_of(RowNumbers((3, 2)))
    evaluated, trained = feed.batches([(None, np.array([4, 1])), (5, np.array([1]))])
    assert evaluated.inputs["num_views"] == 3 and trained.inputs["num_views"] == 2
    assert evaluated.inputs["image"].tolist() == [[[row, -1, number] for number in range(3)] for row in (4, 1)]
    assert trained.inputs["image"].tolist() == [[[1, 5, 0], [1, 5, 1]]]


# -- parts of a batch


@pytest.mark.parametrize("counts", [(1, 1), (4, 3)], ids=["one view", "several views"])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_parts_of_a_batch_together_are_the_batch_with_texts_of_their_own(size, counts):
    source = RowNumbers(counts)
    feed = full_feed(source)
    rows = np.array([3, 1, 0, 5, 2, 4])
    (batch,) = feed.batches([(2, rows)])
    parts = feed.split(batch, size)
    assert [len(part) for part in parts] == [size] * (6 // size) + [6 % size] * (6 % size > 0)
    assert np.concatenate([part.rows for part in parts]).tolist() == rows.tolist()
    assert torch.cat([part.inputs["image"] for part in parts]).equal(batch.inputs["image"])
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
        assert all(
            part.inputs[name].equal(alone.inputs[name]) for name in ("image", "text", "tokens_PN", "prompt_of_B")
        )
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


# -- ahead of time


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_running_ahead_gives_the_same_results_in_order(depth):
    assert list(inputs.run_ahead(lambda item: item * item, range(20), depth)) == [n * n for n in range(20)]
    assert list(inputs.run_ahead(str, [], depth)) == []


@pytest.mark.parametrize("depth", [0, 3])
def test_an_exception_comes_in_the_place_of_its_result(depth):
    def invert(item: int) -> float:
        return 1 / (item - 5)

    results, found = inputs.run_ahead(invert, range(10), depth), []
    with pytest.raises(ZeroDivisionError):
        found.extend(results)  # keeps what came before
    assert found == [1 / (item - 5) for item in range(5)]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_are_taken_up_to_the_depth_ahead_and_no_further(depth):
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(12):
            taken += 1
            yield item

    ahead = []
    for received, item in enumerate(inputs.run_ahead(lambda item: item, items(), depth)):
        assert item == received
        ahead.append(taken - received - 1)
    assert ahead == [min(depth, 12 - received - 1) for received in range(12)]


def test_what_is_ahead_is_computed_in_another_thread_while_a_result_is_in_use():
    done = [threading.Event() for _ in range(4)]
    threads = set()

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        done[item].set()
        return item

    results = inputs.run_ahead(work, range(4), 2)
    assert next(results) == 0
    assert done[1].wait(30) and done[2].wait(30)  # without being asked for
    assert not done[3].is_set()
    assert list(results) == [1, 2, 3]
    assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.parametrize("depth", [0, 3])
def test_who_wants_no_more_results_leaves_no_thread_behind(depth):
    before = threading.active_count()
    results = inputs.run_ahead(lambda item: item, range(100), depth)
    assert next(results) == 0
    results.close()
    assert threading.active_count() <= before  # one of another test may have ended since


# -- cached activations


ROWS = 6
TRAIN = np.array([4, 1, 3])  # only these have training views
SHAPE = (2, 3)


def activations(row: int, view: inputs.View, count: int = 1) -> Tensor:
    """What the frozen layers would give for a row's view, in tests; of several views a row for each."""
    one = torch.arange(6.0).reshape(SHAPE) + 10 * row + 100 * (-1 if view is None else view)
    return one if count == 1 else torch.stack([one + number / 8 for number in range(count)])


@pytest.fixture(params=["memory-mapped", "resident"])
def cached(request, tmp_path):
    """A function that caches the evaluation view of all rows and some training views of the training rows."""

    def make(
        num_views: int, dtype: torch.dtype = torch.float32, counts: tuple[int, int] = (1, 1)
    ) -> inputs.CachedSource:
        cache = features.FeatureCache(tmp_path / "cache", max_bytes=1e9)
        evaluation, training = (
            cache.open({"view": name}, activations(0, 0, count).shape, dtype)
            for name, count in zip(("evaluation", "training"), counts, strict=True)
        )
        source = inputs.CachedSource(
            (evaluation, training),
            [features.key_of("image", row) for row in range(ROWS)],
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
    order = inputs.BatchOrder(TRAIN, batch_size=2, shuffle=True, seed=5)
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
    batches = list(feed.batches(inputs.BatchOrder(rows, batch_size=2)))
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
    found = features.FeatureCache(tmp_path / "cache", max_bytes=1e9).open({}, shape, torch.bfloat16)
    rows_of = {None: np.arange(90_000), 0: np.arange(50_000), 1: np.arange(50_000)}
    source = inputs.CachedSource((found, found), [], rows_of=rows_of, stage=4, device=CPU, dtype=torch.bfloat16)
    size = 190_000 * np.prod(shape) * 2 / 1e9
    assert source.describe() == f"{what}, 2 training view(s), {size:.2f} GB memory-mapped"


@pytest.mark.parametrize(("shape", "what"), [((512,), "embeddings"), ((257, 1024), "activations after 4 blocks")])
def test_a_cached_source_of_several_views_says_the_same_of_all_of_them(tmp_path, shape, what):
    cache = features.FeatureCache(tmp_path / "cache", max_bytes=1e9)
    evaluation = cache.open({"view": "evaluation"}, (5, *shape), torch.float16)
    training = cache.open({"view": "training"}, (2, *shape), torch.float16)
    rows_of = {None: np.arange(9000), 0: np.arange(7000)}
    source = inputs.CachedSource(
        (evaluation, training), [], rows_of=rows_of, stage=4, device=CPU, dtype=torch.float16, counts=(5, 2)
    )
    size = (9000 * 5 + 7000 * 2) * np.prod(shape) * 2
    assert source.size(rows_of) == size and source.size({0: np.arange(10)}) == 10 * 2 * np.prod(shape) * 2
    assert source.describe() == f"{what}, 1 training view(s), {size / 1e9:.2f} GB memory-mapped"


# -- images that can no longer be used


class Vanishing(RowNumbers):
    """A source some of whose rows can be had no more."""

    def __init__(self, gone: set[int]) -> None:
        super().__init__()
        self.gone = gone

    def prepare(self, rows: inputs.Rows, view: inputs.View) -> Tensor:
        lost = [row for row in rows.tolist() if row in self.gone]
        if lost:
            raise images.Unreadable(dict.fromkeys(lost, "gone"), [Path(f"{row}.png") for row in lost])
        return super().prepare(rows, view)


def own_label_files(folder: Path, count: int) -> tuple[list[images.ImageFile], np.ndarray]:
    """Images in one grey each, which is also their label."""
    greys = 20 * np.arange(count)
    for row, grey in enumerate(greys):
        Image.new("RGB", (40, 40), (grey,) * 3).save(folder / f"{row:02}.png")
    return images.check_images(sorted(folder.iterdir())), greys.astype(float)


@settings(max_examples=25)
@given(st.sets(st.integers(0, 9), max_size=9), st.integers(1, 7), st.sampled_from([0, 2]), st.data())
def test_labels_stay_with_their_images_whatever_is_lost_and_when(tmp_path_factory, lost, batch_size, num_ahead, data):
    files, greys = own_label_files(tmp_path_factory.mktemp("greys"), 10)
    store = images.ImageStore(files, image_size=32, num_threads=2)
    dropping = inputs.Dropping(range(10))
    views = inputs.Views(image_size=32, mean=[0.0] * 3, std=[1 / 255] * 3, device=CPU)
    feed = feed_of(
        inputs.PixelSource(store, views),
        targets={"q": np.where(greys == 60, np.nan, greys)},
        prompts=table_of([str(row) for row in range(10)]),
        num_ahead=num_ahead,
        dropping=dropping,
    )
    order = inputs.BatchOrder(np.arange(10), batch_size=batch_size, shuffle=True)
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
    feed = feed_of(source, dropping=inputs.Dropping(range(5)))
    order = [(0, np.array([0, 1])), (0, np.array([4])), (0, np.array([2, 3]))]
    assert [batch.rows.tolist() for batch in feed.batches(order)] == [[0], [2, 3]], "a batch without rows is none"
    source.gone = set()
    assert [batch.rows.tolist() for batch in feed.batches(order)] == [[0], [2, 3]]
    again = feed_of(source, dropping=inputs.Dropping(range(5)))
    again.dropped.update(feed.dropped)
    assert [batch.rows.tolist() for batch in again.batches(order)] == [[0], [2, 3]]
    assert [batch.rows.tolist() for batch in again.batches(order[1:], num_done=0)] == [[2, 3]]
    assert [batch.rows.tolist() for batch in again.batches(order[::-1], num_done=1)] == [[0]], "nor is it counted"
    assert [batch.rows.tolist() for batch in again.batches(order[1:], num_done=1)] == []


def test_a_row_that_may_not_go_is_an_error_that_says_why_and_nothing_is_dropped():
    feed = feed_of(Vanishing({1, 4}), dropping=inputs.Dropping([0, 1, 2], otherwise="; because"))
    with pytest.raises(OSError, match=r"^2 image\(s\) can no longer be read: 1.png \(gone\), 4.png \(gone\); because$"):
        list(feed.batches([(0, np.array([0, 1, 4]))]))
    assert feed.dropped == set()
    with pytest.raises(OSError, match=r"1.png \(gone\)$"):
        list(feed_of(Vanishing({1})).batches([(0, np.array([0, 1]))]))


def test_the_last_row_that_may_go_is_an_error():
    feed = feed_of(Vanishing({0, 1, 2}), dropping=inputs.Dropping([0, 1, 2]))
    with pytest.raises(OSError, match="no training image is left"):
        list(feed.batches([(0, np.array([row])) for row in range(5)]))


@given(st.lists(st.integers(0, 30), unique=True, max_size=12), st.sets(st.integers(0, 30)))
def test_values_of_the_rows_left_find_their_places_among_all(rows, gone):
    dropping = inputs.Dropping()
    dropping.rows |= gone
    left = dropping.left(np.array(rows, dtype=int))
    found = dropping.whole(np.array(rows, dtype=int), np.stack([left, 2.0 * left], axis=1))
    expected = [[np.nan, np.nan] if row in gone else [row, 2 * row] for row in rows]
    np.testing.assert_array_equal(found, np.reshape(expected, (len(rows), 2)))
