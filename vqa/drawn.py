"""Drawn scenes of coloured shapes and questions about them, written as the official files of GQA or VQA v2.

A data set that needs no download. Everything follows from the seed: scenes, pixels, boxes and questions are the same in
both forms. Answers are balanced, so that questions alone tell little. Places are in pixels, y pointing down.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from storage.atomic import remove_if_empty, sync, temporary_name, write_errors
from storage.locks import locked
from vqa.answers import NUMBERS
from vqa.drawn_questions import (
    COLOURS,
    FRAMES,
    GROUPS,
    KINDS,
    RADII,
    SIDES,
    TYPES,
    Question,
    Scene,
    Shape,
    ask_all,
    mixed,
    pick,
)

GAP = 4  # least distance between shapes, and from the frame, in pixels
FRAME = 4  # width of the frame, in pixels
VAL_SHARE = 1 / 8
PREDICTED = "predicted"  # folder of the scene graphs as a program might see them
OVERLOOKED, MISTAKEN = 0.1, 0.1  # shares of objects and relations, of names and colours
JITTER = 2.0  # pixels by which a box is off
OTHERWISE = {  # what some people say instead
    "yes": ("yes it is", "yeah"), "no": ("nope", "not"), "circle": ("a circle", "disc"), "square": ("a square", "box"),
    "triangle": ("a triangle", "the triangle"), "star": ("a star", "the star"), "ring": ("a ring", "hoop"),
    "red": ("the red", "crimson"), "green": ("the green", "lime"), "blue": ("the blue", "navy"),
    "yellow": ("the yellow", "gold"), "purple": ("the purple", "violet"), "orange": ("the orange", "amber"),
    "small": ("the small", "little"), "large": ("the large", "big"),
    "black": ("dark", "ebony"), "white": ("the white", "ivory"), "brown": ("wooden", "the brown"),
    "left": ("to the left", "on the left"), "right": ("to the right", "on the right"),
    "above": ("over it", "higher"), "below": ("under it", "lower"),
} | {str(number): (word, f"about {word}") for number, word in enumerate(NUMBERS)}  # fmt: skip
# How VQA v2 names a question's type, as far as it occurs here; the longest that fits.
QUESTION_TYPES = ("what color is the", "is there a", "is there", "is the", "are the", "how many", "what is", "what")
INFO = {
    "description": "Drawn scenes and questions, in the form of v2.0 of the VQA dataset.",
    "url": "http://visualqa.org", "version": "2.0", "year": 2017, "contributor": "vqa/drawn.py",
    "date_created": "2026-01-01 00:00:00",
}  # fmt: skip
LICENCE = {"url": "https://opensource.org/license/mit", "name": "MIT License"}


@dataclass(frozen=True)
class DrawnImage:
    """An image file and its regions."""

    id: str  # as the questions of either form have it: "1", "2", ...
    path: Path
    fold: str  # "train" or "val"
    width: int
    height: int
    boxes: list[list[float]]  # x1, y1, x2, y2 in pixels, of every shape and of a few pieces of background, mixed


def random_scene(seed: int, number: int, fold: str) -> Scene:
    """Three to six shapes that do not touch, in half of all scenes of few kinds, in half of few colours."""
    rng = np.random.default_rng([seed, 1, number])
    width, height = (8 * int(eighth) for eighth in rng.integers(15, 18, size=2))
    kinds, colours = (mixed(rng, names)[: pick(rng, (2, 3, 9, 9))] for names in (KINDS, tuple(COLOURS)))
    wanted = int(rng.integers(3, 7))
    shapes: list[Shape] = []
    for attempt in count():
        if len(shapes) == wanted:
            break
        if attempt % 100 == 0:  # the first ones may leave no room
            shapes = []
        size = pick(rng, tuple(RADII))
        radius = RADII[size] * rng.uniform(0.9, 1.1)
        x, y = (float(rng.uniform(radius + FRAME + GAP, side - radius - FRAME - GAP)) for side in (width, height))
        if all(math.hypot(x - other.x, y - other.y) > radius + other.radius + GAP for other in shapes):
            name = f"{10 * number + len(shapes)}"
            turn = float(rng.uniform(-0.25, 0.25))
            shapes.append(Shape(name, pick(rng, kinds), pick(rng, colours), size, x, y, radius, turn))
    boxes = [*([float(side) for side in shape.box] for shape in shapes), *background(rng, width, height, shapes)]
    return Scene(str(number), fold, width, height, tuple(shapes), mixed(rng, boxes), pick(rng, tuple(FRAMES)))


def background(rng: np.random.Generator, width: int, height: int, shapes: Sequence[Shape]) -> list[list[float]]:
    """Two to four boxes, each the one of 20 by chance of which shapes cover the least share."""
    taken = np.array([shape.box for shape in shapes])
    found = []
    for _ in range(int(rng.integers(2, 5))):
        sides = rng.integers(14, 41, size=(20, 2))
        starts = rng.integers(FRAME + GAP, np.array([width, height]) - sides - FRAME - GAP + 1)
        ends = starts + sides
        shared = np.minimum(ends[:, None], taken[:, 2:]) - np.maximum(starts[:, None], taken[:, :2])
        covered = shared.clip(min=0).prod(axis=2).sum(axis=1) / sides.prod(axis=1)
        best = int(covered.argmin())
        found.append([float(side) for side in (*starts[best], *ends[best])])
    return found


def paint(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """(height, width, 3) pixels in sRGB: framed shapes on a pale ground, which may have stripes or dots."""
    rng = np.random.default_rng([seed, 2, int(scene.id)])
    down, across = np.mgrid[: scene.height, : scene.width].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), rng.uniform(8, 20)
    u, v = (2 * math.pi / period * (math.cos(a) * across + math.sin(a) * down) for a in (angle, angle + math.pi / 2))
    texture = pick(rng, (0 * u, 6 * np.sign(np.sin(u)), 8 * (np.cos(u) + np.cos(v) > 0.9)))
    ground = rng.uniform(150, 220) + rng.uniform(-8, 8, size=3) + texture[..., None]
    canvas = Image.fromarray(ground.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1))
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, 0, 2 * scene.width - 1, 2 * scene.height - 1), outline=FRAMES[scene.frame], width=2 * FRAME)
    for shape in scene.shapes:
        colour = COLOURS[shape.colour]
        if shape.kind == "ring":
            left, top, right, bottom = (2 * float(c + s * shape.radius) for s in (-1, 1) for c in (shape.x, shape.y))
            pen.ellipse((left, top, right, bottom), outline=colour, width=round(0.8 * shape.radius))
        else:
            pen.polygon([(2 * x, 2 * y) for x, y in shape.outline.tolist()], fill=colour)
    slope, turn = rng.uniform(0, 0.12), rng.uniform(0, 2 * math.pi)
    along = math.cos(turn) * (2 * across / scene.width - 1) + math.sin(turn) * (2 * down / scene.height - 1)
    light = rng.uniform(0.85, 1.1) + slope * along
    noise = rng.uniform(1, 5) * rng.standard_normal((scene.height, scene.width, 3), dtype=np.float32)
    return np.clip(np.asarray(canvas.reduce(2)) * light[..., None] + noise, 0, 255).astype(np.uint8)


def scene_graph(scene: Scene) -> dict[str, Any]:
    """A scene in the form of GQA's scene graphs."""
    objects = {}
    for shape in scene.shapes:
        x1, y1, x2, y2 = shape.box
        relations = [
            {"name": side, "object": other.id}
            for other in scene.shapes
            if other is not shape and (side := shape.side_of(other))
        ]
        looks = {"attributes": [shape.colour, shape.size], "relations": relations}
        objects[shape.id] = {"name": shape.kind, "x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1, **looks}
    return {"width": scene.width, "height": scene.height, "objects": objects}


def as_predicted(graph: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A scene graph as a program might see it: objects and relations overlooked, names and attributes mistaken."""
    seen = {name: entry for name, entry in graph["objects"].items() if rng.random() > OVERLOOKED}
    objects = {}
    for name, entry in seen.items():
        kind = pick(rng, KINDS) if rng.random() < MISTAKEN else entry["name"]
        colour, size = entry["attributes"]
        colour = pick(rng, list(COLOURS)) if rng.random() < MISTAKEN else colour
        relations = [one for one in entry["relations"] if one["object"] in seen and rng.random() > OVERLOOKED]
        box = {side: entry[side] + round(float(rng.normal(scale=JITTER)), 2) for side in "xy"}
        sizes = {side: max(1.0, entry[side] + round(float(rng.normal(scale=JITTER)), 2)) for side in "wh"}
        objects[name] = {"name": kind, **box, **sizes, "attributes": [colour, size], "relations": relations}
    return {**graph, "objects": objects}


def graph_files(scenes: Sequence[Scene], seed: int) -> dict[str, Any]:
    """Scene graphs as they are, and as a program might see them, by their paths."""
    rng, files = np.random.default_rng([seed, 4]), {}
    for fold in ("train", "val"):
        graphs = {scene.id: scene_graph(scene) for scene in scenes if scene.fold == fold}
        files[f"sceneGraphs/{fold}_sceneGraphs.json"] = graphs
        files[f"{PREDICTED}/{fold}_sceneGraphs.json"] = {name: as_predicted(one, rng) for name, one in graphs.items()}
    return files


def gqa_records(scene: Scene, balanced: Sequence[Question], with_implied: bool) -> dict[str, dict[str, Any]]:
    """GQA's records of the questions about a scene, by their ids; with those that they imply, which are unbalanced."""
    known = {question.text: question for question in balanced}
    todo = list(balanced) if with_implied else []
    for question in todo:  # which grows on the way
        more = {other.text: other for ask in question.implied if (other := ask()).text not in known}
        known |= more
        todo += more.values()
    ids = {text: f"{int(scene.id):05d}{place:03d}" for place, text in enumerate(known)}
    return {
        ids[text]: gqa_record(scene, question, ids, place < len(balanced))
        for place, (text, question) in enumerate(known.items())
    }


def gqa_record(scene: Scene, question: Question, ids: Mapping[str, str], is_balanced: bool) -> dict[str, Any]:
    """GQA's record of a question; `ids` are those of all questions about this scene, by their texts."""
    structural, semantic, detailed, group = TYPES[question.variant]
    written = [
        f"{step.operation}: {step.argument}{f' {step.dependencies}' * (step.dependencies != [])}"
        for step in question.steps
    ]
    words = "_".join(step.argument.partition(" (")[0] for step in question.steps if step.argument.strip("?"))
    answered = {"0": question.named[0][1].id} if question.variant == "query related" else {}
    implied = dict.fromkeys(ask().text for ask in question.implied)
    return {
        "semantic": [step._asdict() for step in question.steps],
        "entailed": [ids[text] for text in implied if text in ids],
        "equivalent": [ids[question.text]],
        "question": question.text,
        "imageId": scene.id,
        "isBalanced": is_balanced,
        "groups": {"global": None if group == "yes/no" else group, "local": f"{question.variant}-{words}"},
        "answer": question.answer,
        "semanticStr": "->".join(written),
        "annotations": {
            "answer": answered,
            "question": spans(question.text, question.named[len(answered) :]),
            "fullAnswer": spans(question.full_answer, question.named),
        },
        "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
        "fullAnswer": question.full_answer,
    }


def spans(text: str, named: Sequence[tuple[str, Shape]]) -> dict[str, str]:
    """Where shapes are named: the number of a word, or "first:end" of several -> the shape's id."""
    words = [word.strip(",.?") for word in text.split()]
    found = {}
    for name, shape in named:
        size = len(name.split())
        starts = [start for start in range(len(words)) if words[start : start + size] == name.split()]
        if starts:
            found[f"{starts[0]}" if size == 1 else f"{starts[0]}:{starts[0] + size}"] = shape.id
    return found


def gqa_files(asked: Sequence[tuple[Scene, list[Question]]], seed: int) -> dict[str, Any]:
    """What the JSON files of GQA hold, by their paths; nothing in them is left to chance."""
    files: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    for fold, tier in (("train", "train_balanced"), ("val", "val_all")):
        inside = [(scene, questions) for scene, questions in asked if scene.fold == fold]
        records = {}
        for scene, questions in inside:
            records |= gqa_records(scene, questions, with_implied=fold == "val")
        files[f"questions/{tier}_questions.json"] = records
    files["choices/val_choices.json"] = choices = {}
    for name, record in records.items():
        valid = list(GROUPS[record["groups"]["global"] or "yes/no"])
        is_choice = record["types"]["structural"] == "choose"
        plausible = chosen_among(record["semantic"][-1]["argument"]) if is_choice else valid
        choices[name] = {"valid": valid, "plausible": plausible}
    return files


def chosen_among(argument: str) -> list[str]:
    """The answers that a question offers, from the argument of its last step."""
    _, _, relations = argument.partition(",")
    options = (relations.partition(",")[0] or argument).split("|")
    return [SIDES.get(option, option) for option in options]


def vqa_files(asked: Sequence[tuple[Scene, list[Question]]], seed: int) -> dict[str, Any]:
    """What the JSON files of VQA v2 hold, by their paths; the seed decides what each of ten people says."""
    rng = np.random.default_rng([seed, 3])
    files: dict[str, Any] = {}
    for fold in ("train", "val"):
        common = {"info": INFO, "data_type": "mscoco", "license": LICENCE, "data_subtype": f"{fold}2014"}
        questions, annotations = [], []
        for scene, place, question in [(s, *each) for s, own in asked if s.fold == fold for each in enumerate(own)]:
            ids = {"image_id": int(scene.id), "question_id": 1000 * int(scene.id) + place}
            questions.append({"question": question.text, **ids})
            group, text = TYPES[question.variant][3], f"{question.text.lower()} "
            annotations.append(
                {
                    "question_type": next(words for words in QUESTION_TYPES if text.startswith(f"{words} ")),
                    "multiple_choice_answer": question.answer,
                    "answers": people(rng, question, group),
                    "answer_type": group if group in ("yes/no", "number") else "other",
                    **ids,
                }
            )
        files[f"v2_OpenEnded_mscoco_{fold}2014_questions.json"] = common | {
            "task_type": "Open-Ended",
            "questions": questions,
        }
        files[f"v2_mscoco_{fold}2014_annotations.json"] = common | {"annotations": annotations}
    return files


def people(rng: np.random.Generator, question: Question, group: str) -> list[dict[str, Any]]:
    """What ten people say: up to two are wrong, up to two say it otherwise, and the rest are right."""
    others = [option for option in question.options or GROUPS[group] if option != question.answer]
    said = [pick(rng, others) for _ in range(pick(rng, (0, 0, 0, 1, 1, 2)))]
    said += [pick(rng, OTHERWISE[question.answer]) for _ in range(pick(rng, (0, 0, 1, 2)))]
    said += [question.answer] * (10 - len(said))
    return [
        {"answer": answer, "answer_confidence": pick(rng, ("yes",) * 7 + ("maybe", "maybe", "no")), "answer_id": number}
        for number, answer in enumerate(mixed(rng, said), start=1)
    ]


FORMS = {"GQA": gqa_files, "VQA": vqa_files}


def draw(folder: Path, form: str, *, num_images: int = 480, seed: int = 1204) -> list[DrawnImage]:
    """Draw the set into a folder, in the form of "GQA" or "VQA", unless it is there, and say which images it has.

    It is drawn elsewhere and then renamed, so neither a crash nor a second process leaves a part of one.

    Raises:
        ValueError: another form, too few images, or a folder that holds anything else, another drawn set included.
        OSError: the folder cannot be written.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, not one of {', '.join(FORMS)}")
    num_val = max(1, round(VAL_SHARE * num_images))
    if num_images <= num_val:
        raise ValueError(f"num_images is {num_images}, but either fold needs an image")
    folds = ["train"] * (num_images - num_val) + ["val"] * num_val
    scenes = [random_scene(seed, number, fold) for number, fold in enumerate(folds, start=1)]
    found = FORMS[form](list(zip(scenes, ask_all(scenes, seed), strict=True)), seed) | graph_files(scenes, seed)
    files = {name: json.dumps(content).encode() for name, content in found.items()}
    names = [image_name(scene, form) for scene in scenes]
    with write_errors(folder), ExitStack() as leaving:
        is_locked = leaving.enter_context(locked(folder, wait=say_that_it_waits))
        leaving.callback(remove_if_empty, folder)
        if not any(folder.iterdir()):
            if is_locked:
                remove_left(folder)
            put(folder, files, dict(zip(names, scenes, strict=True)), seed)
        if not all((path := folder / name).is_file() and path.read_bytes() == files[name] for name in files):
            raise ValueError(f"{folder}: holds something else than this drawn set; remove it or name another folder")
    return [
        DrawnImage(scene.id, folder / name, scene.fold, scene.width, scene.height, scene.boxes)
        for scene, name in zip(scenes, names, strict=True)
    ]


def image_name(scene: Scene, form: str) -> str:
    """Where the image of a scene lies in the set."""
    tier = f"{scene.fold}2014"
    return f"images/{scene.id}.jpg" if form == "GQA" else f"{tier}/COCO_{tier}_{int(scene.id):012d}.jpg"


def say_that_it_waits() -> None:
    """Tell the user why nothing happens."""
    print("note      another run draws the demo set: waiting for it", flush=True)


def remove_left(folder: Path) -> None:
    """Remove what processes that were killed have left beside a folder which they were to fill."""
    for path in folder.parent.glob(".*.tmp"):
        if path.stem.rpartition(".")[0] == f".{folder.name}":
            shutil.rmtree(path, ignore_errors=True)


def put(folder: Path, files: Mapping[str, bytes], images: Mapping[str, Scene], seed: int) -> None:
    """Write all files of a set at once, in place of an empty folder. Raises OSError."""
    staged = temporary_name(folder)
    try:
        for name in (*files, *images):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (staged / name).write_bytes(content)
        for name, scene in images.items():
            Image.fromarray(paint(scene, seed)).save(staged / name, quality=92, subsampling=0)
        for path in (*staged.rglob("*"), staged):  # or a machine that stops may leave empty files with these names
            sync(path)
        try:
            os.replace(staged, folder)
        except OSError:  # another process was quicker, where folders cannot be locked
            if not any(folder.iterdir()):
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
