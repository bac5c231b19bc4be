"""`answering/feed.py`: every question once, little padding, and what a model is given of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from answering.feed import CHUNK, TOGETHER, QuestionFeed, batch_rows, padded, trimmed
from regions.features import Regions
from vqa.preprocess import QuestionTable
from vqa.scene_graph import number_graph
from vqa.text import SPECIAL, Vocabulary


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

    def count(self, image: str) -> int:
        return int(image)


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


questions = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), max_size=400)  # words, image


@given(questions, st.integers(1, 7), st.none() | st.integers(0, 3), st.integers(0, 3))
def test_every_row_comes_once_and_batches_are_full(asked, size, seed, number):
    lengths, images = np.array(asked, dtype=np.int64).reshape(-1, 2).T
    parts = batch_rows(lengths, images, 3 * images, size, seed=seed, number=number)
    assert sorted(np.concatenate([*parts, np.empty(0, dtype=int)]).tolist()) == list(range(len(lengths)))
    assert sum(len(part) < size for part in parts) <= 1
    again = batch_rows(lengths, images, 3 * images, size, seed=seed, number=number)
    assert all(np.array_equal(*pair) for pair in zip(parts, again, strict=True))


def drawn(num: int = 20_000, num_images: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, images and regions of questions."""
    draw = np.random.default_rng(0)
    images = draw.integers(num_images, size=num)
    return draw.integers(3, 15, num), images, draw.integers(10, 51, num_images)[images]


def padding(sizes: np.ndarray, parts: list[np.ndarray]) -> float:
    """How many are padded for each that is there."""
    return sum(sizes[part].max() * len(part) for part in parts) / sizes.sum() - 1


def test_batches_hold_questions_of_like_size_in_an_order_of_their_own():
    lengths, images, regions = drawn()
    parts = batch_rows(lengths, images, regions, 32, seed=1)
    plain = list(np.random.default_rng(1).permutation(len(lengths)).reshape(-1, 32))
    assert padding(regions, parts) < 0.02 < 0.5 < padding(regions, plain)
    means = np.array([regions[part].mean() for part in parts])
    assert abs(np.corrcoef(means, np.arange(len(parts)))[0, 1]) < 0.15  # the small ones do not come first
    other = batch_rows(lengths, images, regions, 32, seed=1, number=1)
    assert {tuple(sorted(part)) for part in parts}.isdisjoint(tuple(sorted(part)) for part in other)
    assert len(parts) > CHUNK
    alone = batch_rows(lengths, np.arange(len(lengths)), np.zeros_like(lengths), 32, seed=1)  # no image is looked at
    assert padding(lengths, alone) < 0.02


def test_questions_of_an_image_are_together_but_not_all_of_them_nor_always_the_same():
    lengths, images, regions = drawn(num_images=400)
    found = []
    for number in range(2):
        parts = batch_rows(lengths, images, regions, 32, seed=1, number=number)
        counts = [np.bincount(images[part]) for part in parts]
        assert np.mean([32 / np.count_nonzero(each) for each in counts if each.sum() == 32]) > 0.8 * TOGETHER
        found.append({tuple(part[images[part] == image]) for part in parts for image in set(images[part])})
    assert len(found[0] & found[1]) < 0.05 * len(found[0])
    once = [set(images[part]) for part in batch_rows(lengths, images, regions, 128)]  # nothing is shuffled
    assert sum(map(len, once)) < 400 + len(once)


def test_a_batch_is_what_the_table_and_the_files_say():
    images = Images()
    batch = feed(images).assemble(np.array([0, 2, 3]))
    assert len(batch) == 3 and sorted(images.read_images) == ["2", "5"]  # each once
    assert batch.inputs["words_BN"].tolist() == [[3, 4, 5, 6], [8, 9, 0, 0], [3, 3, 3, 0]]
    assert batch.inputs["entities_BE"].tolist() == [[5, 0], [9, 8], [0, 0]]
    assert batch.inputs["images_B"].tolist() == [0, 0, 1]
    assert batch.inputs["description_IW"].tolist() == [[4, 5], [6, 0]]
    features, boxes = batch.inputs["features_IMF"], batch.inputs["boxes_IM4"]
    assert features[:, :, 0].tolist() == [[2, 2, 0, 0], [5, 5, 5, 5]]  # of five regions the first four
    assert boxes[0].tolist() == [[0, 0, 0.5, 1]] * 2 + [[0, 0, 0, 0]] * 2
    assert batch.targets_BA is not None and batch.targets_BA.tolist() == np.eye(4, 6)[[0, 2, 3]].tolist()


def test_without_images_none_is_read_and_without_answers_there_are_no_targets():
    batch = feed(None).assemble(np.array([1]))
    assert set(batch.inputs) == {"words_BN", "entities_BE"} and batch.inputs["words_BN"].tolist() == [[7]]
    unknown = QuestionFeed(table(targets=False), None, max_boxes=4, device=torch.device("cpu"))
    assert unknown.assemble(np.array([1])).targets_BA is None


def test_each_question_has_the_scene_graph_of_its_image():
    words = Vocabulary((*SPECIAL, "cup", "dog"))
    thing = {"x": 0, "y": 0, "w": 1, "h": 1, "attributes": [], "relations": []}
    named = {"2": ["cup", "dog"], "1": ["dog"]}  # of image 5 there is none
    graphs = {
        image: number_graph({"objects": {name: {"name": name, **thing} for name in names}}, words)
        for image, names in named.items()
    }
    own = QuestionFeed(replace(table(), graphs=graphs), None, max_boxes=4, device=torch.device("cpu"))
    batch = own.assemble(np.array([1, 3, 0, 2]))  # about images 1, 5, 2 and 2
    assert batch.inputs["graphs_V"].tolist() == [0, 2, 2, 3, 3]
    assert batch.inputs["nodes_V4"][:, 0].tolist() == [3, 2, 3, 2, 3]
    assert own.split(batch, 2)[1].inputs["graphs_V"].tolist() == [0, 0, 1, 1]


def test_each_process_gets_its_share_and_all_targets():
    found = feed(Images(), share=lambda rows: rows[1::2]).assemble(np.array([0, 1, 2, 3]))
    assert found.inputs["words_BN"].tolist() == [[7, 0, 0], [3, 3, 3]] and found.targets_BA.shape == (4, 6)


def test_parts_of_a_batch_are_the_batch():
    whole = feed(Images())
    batch = whole.assemble(np.array([3, 0, 1]))
    parts = whole.split(batch, 2)
    assert [part.rows.tolist() for part in parts] == [[3, 0], [1]]
    assert torch.equal(torch.cat([part.targets_BA for part in parts]), batch.targets_BA)
    assert [part.inputs["images_B"].tolist() for part in parts] == [[0, 1], [0]]  # of "5" and "2", then of "1"
    assert parts[0].inputs["features_IMF"][:, 0, 0].tolist() == [5, 2]
    assert parts[1].inputs["features_IMF"][:, 0, 0].tolist() == [1]
    assert sum(len(part.inputs["words_BN"]) for part in parts) == 3


def test_the_first_batches_ask_about_few_regions_and_an_image_after_the_other():
    assert [part.tolist() for part in feed(Images()).parts(2)] == [[1, 2], [0, 3]]


def test_trimming_keeps_a_column():
    assert trimmed(np.zeros((2, 5), dtype=np.int32)).shape == (2, 1)
