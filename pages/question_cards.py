"""Single questions of a run on its page: what people said, what was predicted, and what of the image it rests on."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drawing import scene_pictures
from pages.elements import NOTHING, name_of, percent, thumbnail, truncate
from storage.json_files import NUMBER, parse_json, schema_mismatch
from storage.messages import one_line
from storage.plain_files import check_plain_file

MAX_CARDS = 12  # questions answered badly, and well
MAX_BOXES = 8  # drawn on an image, those with most attention
MAX_ANSWERS = 5  # of people, and predicted, on a card
MOST_EXAMPLES = 32 * 2**20  # bytes of examples.json
LABEL = (36.0, 52.0)  # width and height of a number beside an object, in pixels of the enlarged thumbnail
SLACK = 1e-6  # by which rounding may leave 0..1

EXAMPLE = {
    **dict.fromkeys(("id", "image", "digest", "question"), str),
    **dict.fromkeys(("answer", "prediction", "boxes", "weights"), list),
    "accuracy": NUMBER,
}


@dataclass(frozen=True)
class Box:
    """A region of an image in pixels of its thumbnail, and how much attention it got."""

    x: float
    y: float
    width: float
    height: float
    opacity: float  # 0..1, 1 for the region with most
    weight: str


@dataclass(frozen=True)
class Linked:
    """An object of a scene graph that an answer rests on: corners, where its number stands, colour, and words."""

    box: scene_pictures.Corners
    label: scene_pictures.Point
    colour: str
    name: str
    weight: str


@dataclass(frozen=True)
class Line:
    """What is drawn of the relations between two objects: an arrow, or one that leads both ways."""

    start: scene_pictures.Point
    end: scene_pictures.Point
    leads_back: bool


@dataclass(frozen=True)
class Card:
    """A question with what people said and what was predicted, most likely first."""

    id: str
    question: str
    accuracy: str
    people: str
    predictions: list[tuple[str, str]]  # answer and its probability
    source: str  # data URL of the image, "" if it is not there
    size: tuple[int, int]  # of the thumbnail, in pixels
    boxes: list[Box]
    room: tuple[int, int]  # in which objects and lines are placed: the thumbnail, enlarged
    objects: list[Linked]  # the heaviest first
    lines: list[Line]
    relations: list[str]


# -- reading


def is_share(value: float) -> bool:
    """Whether a number is on 0..1, and so no percentage."""
    return -SLACK <= value <= 1 + SLACK


def read_examples(path: Path) -> list[dict[str, Any]]:
    """The questions of examples.json; none if there is no such file. Raises ValueError."""
    try:
        check_plain_file(path, MOST_EXAMPLES)
        found = parse_json(b'{"examples": %s}' % path.read_bytes())["examples"]  # a list, which `read_json` refuses
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({truncate(one_line(error), 200)})") from None
    if not isinstance(found, list):
        raise ValueError(f"{path}: is no list")
    if said := next(filter(None, (example_mismatch(example, str(i)) for i, example in enumerate(found))), ""):
        raise ValueError(f"{path}: {said}; run it again with this version")
    return found


def example_mismatch(example: Any, name: str) -> str:
    """What of an example is not as the page needs it, in words; "" if it all is."""
    if said := schema_mismatch(example, EXAMPLE, name):
        return said
    if not is_share(example["accuracy"]):
        return f"'{name}.accuracy' is not within 0 and 1"
    if len(example["weights"]) != len(example["boxes"]):
        return f"'{name}.weights' is no list of {len(example['boxes'])}"
    shapes: list[tuple[str, Any]] = [
        ("answer", [str, ...]),
        ("prediction", [list, ...]),
        ("boxes", [[NUMBER] * 4, ...]),
        ("weights", [NUMBER, ...]),
    ]
    parts = (schema_mismatch(example[key], shape, f"{name}.{key}") for key, shape in shapes if example[key])
    if said := next(filter(None, parts), "") or graph_mismatch(example.get("graph", {}), f"{name}.graph"):
        return said
    pairs = enumerate(example["prediction"])
    wrong = (
        i for i, pair in pairs if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], NUMBER)
    )
    return next((f"'{name}.prediction.{i}' is no answer with its probability" for i in wrong), "")


def graph_mismatch(graph: Any, name: str) -> str:
    """What of an example's part of a scene graph is not as the page needs it, in words; an example may have none."""
    if not graph:
        return ""
    if said := schema_mismatch(graph, {"objects": list, "relations": list}, name):
        return said
    object_shape = {"name": str, "attributes": list, "box": [NUMBER] * 4, "weight": NUMBER}
    for key, shape in (("objects", object_shape), ("relations", list)):
        if graph[key] and (said := schema_mismatch(graph[key], [shape, ...], f"{name}.{key}")):
            return said
    for place, each in enumerate(graph["objects"]):
        if each["attributes"] and (said := schema_mismatch(each["attributes"], [str, ...], f"{name}.objects.{place}")):
            return said
    places = range(len(graph["objects"]))
    for place, each in enumerate(graph["relations"]):
        is_relation = len(each) == 3 and isinstance(each[1], str)
        if not (is_relation and all(type(end) is int and end in places for end in each[::2])):
            return f"'{name}.relations.{place}' does not lead from an object to one"
    return ""


# -- showing


def cards(examples: Sequence[Mapping[str, Any]]) -> tuple[list[Card], list[Card]]:
    """The questions of examples.json that were answered badly, and those that were answered well, as they come."""
    worst = [example for example in examples if example["accuracy"] < 0.5]
    best = [example for example in examples if example["accuracy"] >= 0.5]
    return [card_of(example) for example in worst[:MAX_CARDS]], [card_of(example) for example in best[:MAX_CARDS]]


def card_of(example: Mapping[str, Any]) -> Card:
    """An example as it is shown; of the probabilities what is on 0..1."""
    source = thumbnail(example["image"], example["digest"])
    size = size_of(source) if source else (1, 1)
    graph = example.get("graph") or {"objects": [], "relations": []}
    objects, lines, relations = graph_on(graph, size)
    return Card(
        id=example["id"],
        question=example["question"],
        accuracy=percent(example["accuracy"]),
        people=", ".join(name_of(answer) for answer in example["answer"][:MAX_ANSWERS]) or NOTHING,
        predictions=[
            (name_of(answer), percent(min(max(probability, 0), 1)))
            for answer, probability in example["prediction"][:MAX_ANSWERS]
        ],
        source=source,
        size=size,
        boxes=boxes_on(example["boxes"], example["weights"], size) if source else [],
        room=scene_pictures.canvas_size(size),
        objects=objects,
        lines=lines,
        relations=relations,
    )


def graph_on(graph: Mapping[str, Any], size: tuple[int, int]) -> tuple[list[Linked], list[Line], list[str]]:
    """The objects of a scene graph, lines between them, and their relations in words; parts outside the image are cut.

    Args:
        size: the image's; sets the proportions.
    """
    entries = graph["objects"][:MAX_BOXES]
    arrows = scene_pictures.drawn_relations([one for one in graph["relations"] if max(one[::2]) < len(entries)])
    room = scene_pictures.canvas_size(size)
    boxes = [scene_pictures.on_canvas(entry["box"], room, 0) for entry in entries]
    lines = scene_pictures.arrow_lines(arrows, boxes, scene_pictures.SHORTEST)
    taken = [spot for line in lines.values() for spot in scene_pictures.spots(*line)]
    weights = [min(max(entry["weight"], 0), 1) for entry in entries]
    objects = []
    for entry, box, weight in zip(entries, boxes, weights, strict=True):
        colour = scene_pictures.colour_of(weight / (max(weights) or 1))
        places = scene_pictures.around(box)
        label = scene_pictures.least_hiding(places, LABEL, (0, 0, *room), taken, boxes)
        name = name_of(", ".join([entry["name"], *entry["attributes"]]))
        objects.append(Linked(box, (label[0], label[3]), f"rgb{colour}", name, percent(weight)))
    ways = {(arrow.source, arrow.target) for arrow in arrows}
    drawn = [Line(start, end, (target, source) in ways) for (source, target), (start, end) in lines.items()]
    said = [f"{arrow.source + 1} {name_of(arrow.name)} {arrow.target + 1}" for arrow in arrows]
    return objects, drawn, said


def size_of(source: str) -> tuple[int, int]:
    """Width and height of a thumbnail."""
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return image.size


def boxes_on(boxes: Sequence[Sequence[float]], weights: Sequence[float], size: tuple[int, int]) -> list[Box]:
    """The regions with most attention, the strongest last, so that it lies on top; parts outside the image are cut."""
    order = sorted(range(len(boxes)), key=lambda place: -weights[place])[:MAX_BOXES]
    found = []
    for place in reversed(order):
        left, top, right, bottom = np.clip(boxes[place], 0, 1) * [*size, *size]
        if right > left and bottom > top and weights[place] > 0:
            opacity = weights[place] / weights[order[0]]
            x, y, width, height = (round(float(edge), 1) for edge in (left, top, right - left, bottom - top))
            found.append(Box(x, y, width, height, round(opacity, 3), percent(min(weights[place], 1))))
    return found
