"""Scene graphs as numbers: words and boxes of objects, relations as edges, several graphs packed into one batch.

Shapes: K objects of a graph, V objects of all graphs of a batch, E edges, 4 words of an object or corners of a box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqa.text import PADDING, UNKNOWN, Vocabulary, words_of

WORDS_OF_OBJECT = 4  # of its name, then of its attributes


@dataclass(frozen=True)
class GraphNumbers:
    """A scene graph as numbers."""

    ids: tuple[str, ...]  # (K,) of the objects
    words_K4: NDArray[np.int32]  # 0: none, on the right
    boxes_K4: NDArray[np.float32]  # x1, y1, x2, y2 as shares of the image's width and height
    edges_2E: NDArray[np.int64]  # from the first object to the second
    relations_E: NDArray[np.int32]  # a word for each edge
    signs_E: NDArray[np.float32]  # 1: as it was given; -1: the way back of one that was given

    def __len__(self) -> int:
        return len(self.ids)


def number_graph(graph: Mapping[str, Any], vocabulary: Vocabulary) -> GraphNumbers:
    """A scene graph in the official form of GQA as numbers.

    Each relation also leads back, with the sign turned, unless the graph itself has a relation that does. Those to
    objects that are not there are left out. A graph of an image of unknown size takes the extent of its boxes for it.
    """
    objects = graph["objects"]
    place_of = {key: place for place, key in enumerate(objects)}
    given = [
        (place_of[key], place_of[relation["object"]], relation_word(relation["name"], vocabulary))
        for key, entry in objects.items()
        for relation in entry["relations"]
        if relation["object"] in place_of
    ]
    pairs = {(source, target) for source, target, _ in given}
    back = [(target, source, word) for source, target, word in given if (target, source) not in pairs]
    table = np.array(given + back, dtype=np.int64).reshape(-1, 3)
    texts = [" ".join([entry["name"], *entry["attributes"]]) for entry in objects.values()]
    words_K4 = vocabulary.encode(texts, WORDS_OF_OBJECT)
    words_K4[words_K4[:, 0] == PADDING, 0] = UNKNOWN  # an object without any word is an object still
    return GraphNumbers(
        ids=tuple(objects),
        words_K4=words_K4,
        boxes_K4=shares_of_image(graph),
        edges_2E=np.ascontiguousarray(table[:, :2].T),
        relations_E=table[:, 2].astype(np.int32),
        signs_E=np.repeat(np.array([1, -1], dtype=np.float32), [len(given), len(back)]),
    )


def relation_word(name: str, vocabulary: Vocabulary) -> int:
    """The number of the word that tells most of a relation: the least frequent one, as vocabularies are ordered.

    The first word would tell nothing: things are "to the left of" others and "to the right of" them.
    """
    return max((vocabulary.number_of.get(word, UNKNOWN) for word in words_of(name)), default=UNKNOWN)


def shares_of_image(graph: Mapping[str, Any]) -> NDArray[np.float32]:
    """(K, 4) the boxes of a graph's objects as shares of the image's width and height, on [0, 1]."""
    rows = [[entry[key] for key in ("x", "y", "w", "h")] for entry in graph["objects"].values()]
    boxes_K4 = np.array(rows, dtype=np.float64).reshape(-1, 4)
    boxes_K4[:, 2:] += boxes_K4[:, :2]
    extent_2 = boxes_K4[:, 2:].max(axis=0, initial=0)
    size_2 = np.array([graph.get(key) or extent for key, extent in zip(("width", "height"), extent_2, strict=True)])
    size_2[size_2 <= 0] = 1
    return np.clip(boxes_K4 / np.tile(size_2, 2), 0, 1).astype(np.float32)


def subgraph(graph: Mapping[str, Any], weights_K: Sequence[float], most: int) -> dict[str, Any]:
    """What of a scene graph was chosen, for people: as plain JSON.

    Args:
        weights_K: how much each object weighed; 0 for what was not chosen.
        most: objects that are told, the heaviest.

    Returns:
        "objects", the heaviest first, each with "name", "attributes", "box" (as shares of the image) and "weight"; and
        "relations" between these as the graph has them, those of the heaviest first: a place, a name, another place.
    """
    objects, boxes = graph["objects"], dict(zip(graph["objects"], shares_of_image(graph).tolist(), strict=True))
    weights = dict(zip(objects, weights_K, strict=True))
    chosen = sorted((key for key in objects if weights[key] > 0), key=lambda key: -weights[key])[:most]
    place_of = {key: place for place, key in enumerate(chosen)}
    return {
        "objects": [
            {**{part: objects[key][part] for part in ("name", "attributes")}, "box": boxes[key], "weight": weights[key]}
            for key in chosen
        ],
        "relations": [
            [place_of[key], relation["name"], place_of[relation["object"]]]
            for key in chosen
            for relation in objects[key]["relations"]
            if relation["object"] in place_of
        ],
    }


def pack(graphs: Sequence[GraphNumbers]) -> dict[str, NDArray[Any]]:
    """Graphs as one that falls into parts: what `branches.graph.GraphBranch` takes, by its names."""
    sizes = [len(graph) for graph in graphs]
    starts = np.cumsum([0, *sizes])
    edges = [graph.edges_2E + start for graph, start in zip(graphs, starts, strict=False)]
    return {
        "nodes_V4": joined([graph.words_K4 for graph in graphs], (0, WORDS_OF_OBJECT), np.int32),
        "node_boxes_V4": joined([graph.boxes_K4 for graph in graphs], (0, 4), np.float32),
        "graphs_V": np.repeat(np.arange(len(graphs), dtype=np.int64), sizes),
        "edges_2E": np.concatenate([np.empty((2, 0), dtype=np.int64), *edges], axis=1),
        "relations_E": joined([graph.relations_E for graph in graphs], (0,), np.int32),
        "signs_E": joined([graph.signs_E for graph in graphs], (0,), np.float32),
    }


def joined(parts: Sequence[NDArray[Any]], empty: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Arrays one after another; of none at all, an array of the shape `empty`."""
    return np.concatenate([np.empty(empty, dtype=dtype), *parts])
