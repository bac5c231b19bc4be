"""`vqa/scene_graph.py`: numbers that say what the graph says, and batches in which no graph touches another."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from vqa.preprocess import words_on_image
from vqa.scene_graph import GraphNumbers, number_graph, pack, subgraph
from vqa.text import UNKNOWN, Vocabulary, build_vocabulary


def thing(name: str, attributes: list[str], *relations: tuple[str, str], box: tuple[float, ...] = (0, 0, 5, 5)) -> dict:
    found = [{"name": word, "object": other} for word, other in relations]
    x, y, w, h = box
    return {"name": name, "x": x, "y": y, "w": w, "h": h, "attributes": attributes, "relations": found}


GRAPH: dict[str, Any] = {
    "width": 20,
    "height": 10,
    "objects": {
        "17": thing("coffee cup", ["red", "small", "full"], ("to the left of", "4"), box=(2, 1, 4, 8)),
        "4": thing("dog", [], ("to the right of", "17"), ("near", "9"), ("near", "missing")),
        "9": thing("zebra", ["brown"], box=(15, 5, 10, 5)),
        "x": thing("", []),
    },
}
EMPTY: dict[str, Any] = {"width": 3, "height": 3, "objects": {}}
WORDS = Vocabulary(
    ("<pad>", "<unk>", "the", "to", "of", "left", "right", "near", "cup", "coffee", "red", "small", "dog")
)


def edges_of(numbers: GraphNumbers) -> set[tuple[str, str, str, float]]:
    """From, to, by which word, sign."""
    rows = zip(*numbers.edges_2E, numbers.relations_E, numbers.signs_E, strict=True)
    return {(numbers.ids[i], numbers.ids[j], WORDS.words[word], float(sign)) for i, j, word, sign in rows}


def test_words_are_those_of_the_name_then_those_of_attributes_and_unknown_is_not_padding():
    numbers = number_graph(GRAPH, WORDS)
    assert numbers.ids == ("17", "4", "9", "x") and len(numbers) == 4
    assert [[WORDS.words[word] for word in row] for row in numbers.words_K4] == [
        ["coffee", "cup", "red", "small"],
        ["dog", "<pad>", "<pad>", "<pad>"],
        ["<unk>", "<unk>", "<pad>", "<pad>"],
        ["<unk>", "<pad>", "<pad>", "<pad>"],
    ]
    assert numbers.words_K4.dtype == np.int32 and numbers.relations_E.dtype == np.int32


def test_boxes_are_shares_of_the_image():
    boxes = number_graph(GRAPH, WORDS).boxes_K4
    assert boxes.dtype == np.float32
    np.testing.assert_allclose(boxes[0], [0.1, 0.1, 0.3, 0.9])
    np.testing.assert_allclose(boxes[2], [0.75, 0.5, 1, 1])  # which ends at 25 of 20


def test_boxes_of_an_image_of_unknown_size_are_shares_of_their_extent():
    unknown = {"objects": GRAPH["objects"]}
    np.testing.assert_allclose(number_graph(unknown, WORDS).boxes_K4[0], [2 / 25, 1 / 10, 6 / 25, 9 / 10])
    flat = {"objects": {"1": thing("cup", [], box=(0, 0, 0, 0))}}
    np.testing.assert_array_equal(number_graph(flat, WORDS).boxes_K4, [[0, 0, 0, 0]])


def test_relations_lead_back_where_none_does_and_not_to_what_is_missing():
    assert edges_of(number_graph(GRAPH, WORDS)) == {
        ("17", "4", "left", 1),
        ("4", "17", "right", 1),
        ("4", "9", "near", 1),
        ("9", "4", "near", -1),
    }


def test_several_relations_between_two_all_lead_back_and_one_to_itself_does_not():
    graph = {"objects": {"1": thing("cup", [], ("near", "2"), ("left", "2"), ("of", "1")), "2": thing("dog", [])}}
    assert edges_of(number_graph(graph, WORDS)) == {
        ("1", "2", "near", 1),
        ("1", "2", "left", 1),
        ("1", "1", "of", 1),
        ("2", "1", "near", -1),
        ("2", "1", "left", -1),
    }


@pytest.mark.parametrize("name", ["holding", "", "--"])
def test_a_relation_without_a_known_word_is_unknown(name):
    graph = {"objects": {"1": thing("cup", [], (name, "2")), "2": thing("dog", [])}}
    assert number_graph(graph, WORDS).relations_E.tolist() == [UNKNOWN, UNKNOWN]


def test_left_and_right_are_told_apart_by_a_vocabulary_of_questions():
    texts = ["What is to the left of the dog?", "Is the cup to the right of it?", " ".join(words_on_image(GRAPH, 3))]
    words = build_vocabulary(texts)
    numbers = number_graph(GRAPH, words)
    assert [words.words[word] for word in numbers.relations_E[:2]] == ["left", "right"]


def test_an_empty_graph_has_nothing():
    numbers = number_graph(EMPTY, WORDS)
    assert (len(numbers), numbers.words_K4.shape, numbers.boxes_K4.shape) == (0, (0, 4), (0, 4))
    assert (numbers.edges_2E.shape, numbers.relations_E.shape, numbers.signs_E.shape) == ((2, 0), (0,), (0,))


def test_packed_graphs_fall_into_the_same_graphs_again():
    graphs = [number_graph(each, WORDS) for each in (GRAPH, EMPTY, GRAPH)]
    packed = pack(graphs)
    assert packed["graphs_V"].tolist() == [0] * 4 + [2] * 4
    of_edges = packed["graphs_V"][packed["edges_2E"]]
    assert (of_edges[0] == of_edges[1]).all()
    for number, graph in enumerate(graphs):
        are_own, are_edges = packed["graphs_V"] == number, of_edges[0] == number
        np.testing.assert_array_equal(packed["nodes_V4"][are_own], graph.words_K4)
        np.testing.assert_array_equal(packed["node_boxes_V4"][are_own], graph.boxes_K4)
        start = np.flatnonzero(are_own)[0] if len(graph) else 0
        np.testing.assert_array_equal(packed["edges_2E"][:, are_edges] - start, graph.edges_2E)
        np.testing.assert_array_equal(packed["relations_E"][are_edges], graph.relations_E)
        np.testing.assert_array_equal(packed["signs_E"][are_edges], graph.signs_E)


@pytest.mark.parametrize("graphs", [[], [EMPTY], [EMPTY, GRAPH]])
def test_what_is_packed_has_the_same_types_whatever_it_is(graphs):
    packed = pack([number_graph(graph, WORDS) for graph in graphs])
    assert {name: values.dtype for name, values in packed.items()} == {
        "nodes_V4": np.int32,
        "node_boxes_V4": np.float32,
        "graphs_V": np.int64,
        "edges_2E": np.int64,
        "relations_E": np.int32,
        "signs_E": np.float32,
    }
    assert packed["edges_2E"].shape == (2, len(packed["signs_E"])) and packed["nodes_V4"].shape[1] == 4


def test_what_was_chosen_is_told_with_the_relations_inside_the_heaviest_first():
    part = subgraph(GRAPH, [0.25, 0.75, 0.0, 0.0], 5)
    assert [(one["name"], one["weight"]) for one in part["objects"]] == [("dog", 0.75), ("coffee cup", 0.25)]
    assert part["objects"][1]["attributes"] == ["red", "small", "full"]
    assert part["objects"][1]["box"] == pytest.approx([0.1, 0.1, 0.3, 0.9])
    assert part["relations"] == [[0, "to the right of", 1], [1, "to the left of", 0]]  # none to "9", nor to "missing"
    assert json.loads(json.dumps(part)) == part


def test_no_more_objects_are_told_than_wanted():
    part = subgraph(GRAPH, [0.1, 0.2, 0.3, 0.4], 2)
    assert [one["name"] for one in part["objects"]] == ["", "zebra"] and part["relations"] == []
    assert subgraph(GRAPH, [0.0] * 4, 3) == {"objects": [], "relations": []} == subgraph(EMPTY, [], 3)
