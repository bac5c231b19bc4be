"""`answering/feed.py`: every question once, little padding, and what a model is given of each."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from answering.feed import CHUNK, QuestionFeed, batch_rows, padded, trimmed
from regions.features import Regions
from vqa.preprocess import QuestionTable


class Images:
    """Regions that tell their image: K of image "K", all with that number; counts what is read."""

    width = 3
    ids = ("1", "2", "5")

    def __init__(self) -> None:
        self.read_images: list[str] = []

    def read(self, image: str) -> Regions:
        self.read_images.append(image)
        count = int(image)
        features = np.full((count, 3), count, dtype=np.float32)
        return Regions(features, np.tile(np.array([0, 0, 0.5, 1], dtype=np.float32), (count, 1)))


def table(targets: bool = True) -> QuestionTable:
    words = padded([np.array(row, dtype=np.int32) for row in ([3, 4, 5, 6], [7], [8, 9], [3, 3, 3])])
    return QuestionTable(
        words_QN=np.pad(words, ((0, 0), (0, 3))),
        entities_QE=np.array([[5, 0], [0, 0], [9, 8], [0, 0]], dtype=np.int32),
        images=["2", "1", "2", "5"],
        descriptions={"2": np.array([4, 5], dtype=np.int32), "5": np.array([6], dtype=np.int32)},
        targets_QA=scipy.sparse.csr_array(np.eye(4, 6, dtype=np.float32)) if targets else None,
    )


def feed(images: Images | None, **changes) -> QuestionFeed:
    settings = {"max_boxes": 4, "device": torch.device("cpu")} | changes
    return QuestionFeed(table(), images, **settings)


@given(st.lists(st.integers(1, 30), max_size=400), st.integers(1, 7), st.none() | st.integers(0, 3), st.integers(0, 3))
def test_every_row_comes_once_and_batches_are_full(lengths, size, seed, number):
    lengths = np.array(lengths, dtype=np.int64)
    parts = batch_rows(lengths, size, seed=seed, number=number)
    assert sorted(np.concatenate([*parts, np.empty(0, dtype=int)]).tolist()) == list(range(len(lengths)))
    assert sum(len(part) < size for part in parts) <= 1
    again = batch_rows(lengths, size, seed=seed, number=number)
    assert all(np.array_equal(*pair) for pair in zip(parts, again, strict=True))


def test_batches_hold_questions_of_like_length_in_an_order_of_their_own():
    lengths = np.random.default_rng(0).integers(3, 15, 20_000)
    parts = batch_rows(lengths, 32, seed=1)
    padding = sum(lengths[part].max() * len(part) - lengths[part].sum() for part in parts) / lengths.sum()
    plain = np.random.default_rng(1).permutation(20_000).reshape(-1, 32)
    assert padding < 0.02 < 0.4 < sum(lengths[part].max() * 32 - lengths[part].sum() for part in plain) / lengths.sum()
    means = np.array([lengths[part].mean() for part in parts])
    assert abs(np.corrcoef(means, np.arange(len(parts)))[0, 1]) < 0.15  # the short ones do not come first
    other = batch_rows(lengths, 32, seed=1, number=1)
    assert {tuple(sorted(part)) for part in parts}.isdisjoint(tuple(sorted(part)) for part in other)
    assert len(parts) > CHUNK


def test_a_batch_is_what_the_table_and_the_files_say():
    images = Images()
    batch = feed(images).assemble(np.array([0, 2, 3]))
    assert len(batch) == 3 and sorted(images.read_images) == ["2", "5"]  # each once
    assert batch.inputs["words_BN"].tolist() == [[3, 4, 5, 6], [8, 9, 0, 0], [3, 3, 3, 0]]
    assert batch.inputs["entities_BE"].tolist() == [[5, 0], [9, 8], [0, 0]]
    assert batch.inputs["description_BW"].tolist() == [[4, 5], [4, 5], [6, 0]]
    features, boxes = batch.inputs["features_BMF"], batch.inputs["boxes_BM4"]
    assert features[:, :, 0].tolist() == [[2, 2, 0, 0], [2, 2, 0, 0], [5, 5, 5, 5]]  # of five regions the first four
    assert boxes[0].tolist() == [[0, 0, 0.5, 1]] * 2 + [[0, 0, 0, 0]] * 2
    assert batch.targets_BA is not None and batch.targets_BA.tolist() == np.eye(4, 6)[[0, 2, 3]].tolist()


def test_without_images_none_is_read_and_without_answers_there_are_no_targets():
    batch = feed(None).assemble(np.array([1]))
    assert set(batch.inputs) == {"words_BN", "entities_BE"} and batch.inputs["words_BN"].tolist() == [[7]]
    unknown = QuestionFeed(table(targets=False), None, max_boxes=4, device=torch.device("cpu"))
    assert unknown.assemble(np.array([1])).targets_BA is None


def test_each_process_gets_its_share_and_all_targets():
    found = feed(Images(), share=lambda rows: rows[1::2]).assemble(np.array([0, 1, 2, 3]))
    assert found.inputs["words_BN"].tolist() == [[7, 0, 0], [3, 3, 3]] and found.targets_BA.shape == (4, 6)


def test_parts_of_a_batch_are_the_batch():
    whole = feed(Images())
    batch = whole.assemble(np.array([3, 0, 1]))
    parts = whole.split(batch, 2)
    assert [part.rows.tolist() for part in parts] == [[3, 0], [1]]
    assert torch.equal(torch.cat([part.targets_BA for part in parts]), batch.targets_BA)


def test_trimming_keeps_a_column():
    assert trimmed(np.zeros((2, 5), dtype=np.int32)).shape == (2, 1)
