"""`vqa/drawn.py`: the drawn set is in the official forms, and its answers follow from what is seen."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vqa import drawn
from vqa.answers import accuracy, normalise
from vqa.gqa_metrics import measures
from vqa.preprocess import read_scene_graphs
from vqa.questions import find_gqa, find_vqa, read_choices, read_gqa, read_vqa

NUM_IMAGES, NUM_VAL = 96, 12
HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 130, "blue": 229, "purple": 286}  # degrees
SIZES = {"small", "large"}
SIDE = "to the left of|to the right of|above|below"

Graph = Mapping[str, Any]


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "gqa"
    return folder, drawn.draw(folder, "GQA", num_images=NUM_IMAGES)


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "vqa"
    return folder, drawn.draw(folder, "VQA", num_images=NUM_IMAGES)


@pytest.fixture(scope="module")
def graphs(gqa) -> dict[str, Graph]:
    return read_scene_graphs(sorted((gqa[0] / "sceneGraphs").glob("*.json")))


@pytest.fixture(scope="module")
def records(gqa) -> dict[str, dict[str, Any]]:
    """All questions of both folds, by their ids."""
    return {name: record for path in (gqa[0] / "questions").iterdir() for name, record in read(path).items()}


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def template(record: Mapping[str, Any]) -> str:
    return f"{record['types']['detailed']} {record['semantic'][-1]['operation']} {record['groups']['global']}"


# What the questions mean, written anew: once from their words, once from their programs.


def fits(entry: Graph, name: str, *attributes: str) -> bool:
    return name in ("thing", entry["name"]) and set(attributes) <= set(entry["attributes"])


def find(graph: Graph, words: str) -> list[str]:
    *attributes, name = words.split()
    return [number for number, entry in graph["objects"].items() if fits(entry, name, *attributes)]


def only(graph: Graph, words: str) -> Graph:
    (number,) = find(graph, words)
    return graph["objects"][number]


def value(entry: Graph, of: str) -> str:
    if of in ("shape", "name"):
        return entry["name"]
    (found,) = set(entry["attributes"]) & (set(HUES) if of == "color" else SIZES)
    return found


def side(entry: Graph, other: Graph) -> str:
    """Where something lies, seen from something else: over five parts aside for four up or down, or the reverse."""
    dx, dy = (2 * (entry[at] - other[at]) + entry[size] - other[size] for at, size in (("x", "w"), ("y", "h")))
    if 4 * abs(dx) > 5 * abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    if 4 * abs(dy) > 5 * abs(dx):
        return "above" if dy < 0 else "below"
    return ""


def beside(graph: Graph, relation: str, other: Graph) -> list[Graph]:
    return [entry for entry in graph["objects"].values() if entry is not other and side(entry, other) == relation]


def answer_to_words(text: str, graph: Graph) -> str:
    """The answer to a question by its words alone."""
    parts: tuple[str, ...] = ()

    def asks(pattern: str) -> bool:
        nonlocal parts
        found = re.fullmatch(pattern, text)
        parts = found.groups() if found else ()
        return found is not None

    def yes(is_true: bool) -> str:
        return "yes" if is_true else "no"

    if asks(r"Is there an? (.+) (and|or) an? (.+)\?"):
        return yes({"and": all, "or": any}[parts[1]](find(graph, words) for words in parts[::2]))
    if asks(rf"Is there an? (.+?) ({SIDE}) the (.+)\?"):
        return yes(any(fits(entry, parts[0]) for entry in beside(graph, parts[1], only(graph, parts[2]))))
    if asks(r"Is there an? (.+)\?"):
        return yes(bool(find(graph, parts[0])))
    if asks(r"What (color|shape) is the (.+)\?"):
        return value(only(graph, parts[1]), parts[0])
    if asks(rf"What is ({SIDE}) the (.+)\?"):
        (found,) = beside(graph, parts[0], only(graph, parts[1]))
        return str(found["name"])
    if asks(r"How many (.+)s are there\?"):
        return str(len(find(graph, parts[0])))
    if asks(r"Are the (.+) and the (.+) of the same (color|shape)\?"):
        return yes(len({value(only(graph, words), parts[2]) for words in parts[:2]}) == 1)
    if asks(r"Is the (.+?) (to the left|to the right|above|below) or (to the \w+ of|above|below) the (.+)\?"):
        found = side(only(graph, parts[0]), only(graph, parts[3]))
        assert found in (parts[2], parts[1] + " of" * parts[2].endswith(" of"))
        return found.removeprefix("to the ").removesuffix(" of")
    if asks(rf"Is the (.+?) ({SIDE}) the (.+)\?"):
        return yes(side(only(graph, parts[0]), only(graph, parts[2])) == parts[1])
    if asks(r"Is the (.+) (\w+) or (\w+)\?"):
        (found,) = set(only(graph, parts[0])["attributes"]) & set(parts[1:])
        return found
    assert asks(r"Is the (.+) (\w+)\?"), text
    return yes(parts[1] in only(graph, parts[0])["attributes"])


def answer_of_program(steps: list[dict[str, Any]], graph: Graph) -> str:
    """The answer that the steps lead to, which must name the very objects that they find."""
    objects, found = graph["objects"], list[Any]()
    for step in steps:
        operation, _, kind = step["operation"].partition(" ")
        argument, _, ids = step["argument"].rstrip(")").partition(" (")
        given = [found[number] for number in step["dependencies"]]
        if operation == "select":
            found.append({number for number in objects if fits(objects[number], argument)})
            assert set(ids.split(",")) <= (found[-1] or {"-"}) | {"-"}
        elif operation == "filter":
            found.append({number for number in given[0] if argument in objects[number]["attributes"]})
        elif operation == "relate":
            name, relation, _ = argument.split(",")
            near = beside(graph, relation, objects[next(iter(given[0]))])
            found.append({n for n in objects if objects[n] in near and name in ("_", objects[n]["name"])})
            assert ids in found[-1]
        elif operation == "exist":
            found.append(bool(given[0]))
        elif operation in ("and", "or"):
            found.append({"and": all, "or": any}[operation](given))
        elif operation == "count":
            found.append(len(given[0]))
        elif operation == "same":
            found.append(len({value(objects[number], kind) for (number,) in given}) == 1)
        else:
            (own,) = given[0]
            if (operation, kind) == ("choose", "rel"):
                found.append(side(objects[own], objects[ids]).removeprefix("to the ").removesuffix(" of"))
                assert found[-1] in argument.split(",")[1]
            elif (operation, kind) == ("verify", "rel"):
                found.append(side(objects[own], objects[ids]) == argument.split(",")[1])
            elif operation == "verify":
                found.append(value(objects[own], kind) == argument)
            elif operation == "choose":
                (chosen,) = {value(objects[own], kind)} & set(argument.split("|"))
                found.append(chosen)
            else:
                assert operation == "query"
                found.append(value(objects[own], argument))
    return {True: "yes", False: "no"}[found[-1]] if isinstance(found[-1], bool) else str(found[-1])


def frame(path: Path) -> str:
    """What the edge of an image looks like."""
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB")).astype(float)
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)]).mean(axis=0)
    return "white" if edge.min() > 150 else "brown" if edge[0] - edge[2] > 30 else "black"


def test_answers_on_the_frame_follow_from_the_pixels(records, gqa):
    paths = {image.id: image.path for image in gqa[1]}
    asked = [record for record in records.values() if " the frame" in record["question"]]
    for record in asked:
        found, words = frame(paths[record["imageId"]]), record["question"].rstrip("?").split()
        is_verified = len(words) == 4  # "Is the frame black?"
        assert record["answer"] == (("no", "yes")[words[-1] == found] if is_verified else found), record["question"]
        assert found in record["fullAnswer"]
        assert record["semantic"][0]["operation"] == "select"
    assert {record["types"]["structural"] for record in asked} == {"query", "verify", "choose"}


def test_no_box_has_any_of_the_frame(gqa):
    for image in gqa[1]:
        x1, y1, x2, y2 = np.array(image.boxes).T
        assert min(x1.min(), y1.min()) >= 7 and x2.max() <= image.width - 7 and y2.max() <= image.height - 7


def test_every_answer_follows_from_the_scene(records, graphs):
    assert len({template(record) for record in records.values()}) == 19
    for record in records.values():
        if " the frame" in record["question"]:
            continue  # of which no graph tells
        graph = graphs[record["imageId"]]
        assert answer_to_words(record["question"], graph) == record["answer"], record["question"]
        assert answer_of_program(record["semantic"], graph) == record["answer"], record["semanticStr"]
        assert record["answer"] in record["fullAnswer"].lower()


def test_relations_are_those_of_the_boxes(graphs):
    for graph in graphs.values():
        for entry in graph["objects"].values():
            told = {relation["object"]: relation["name"] for relation in entry["relations"]}
            others = {number: other for number, other in graph["objects"].items() if other is not entry}
            assert told == {number: way for number, other in others.items() if (way := side(entry, other))}


def test_boxes_are_those_of_the_pixels(gqa, graphs):
    for image in gqa[1][::3]:
        with Image.open(image.path) as file:
            assert file.size == (image.width, image.height)
            hue, saturation, _ = np.moveaxis(np.asarray(file.convert("HSV")).astype(float), 2, 0)
        distances = np.stack([np.abs((hue * 360 / 255 - centre + 180) % 360 - 180) for centre in HUES.values()])
        nearest = np.where(saturation > 110, distances.argmin(axis=0), -1)
        graph = graphs[image.id]
        assert (graph["width"], graph["height"]) == (image.width, image.height)
        for entry in graph["objects"].values():
            box = [entry["x"], entry["y"], entry["x"] + entry["w"], entry["y"] + entry["h"]]
            assert box in image.boxes
            x1, y1, x2, y2 = box
            own = nearest == list(HUES).index(value(entry, "color"))
            pieces, _ = ndimage.label(own)
            piece = np.bincount(pieces[y1:y2, x1:x2][own[y1:y2, x1:x2]]).argmax()
            down, across = ndimage.find_objects(pieces)[piece - 1]
            np.testing.assert_allclose([across.start, down.start, across.stop, down.stop], box, atol=2)
            assert (max(entry["w"], entry["h"]) > 22) == ("large" in entry["attributes"])


def test_some_boxes_are_of_the_background(gqa, graphs):
    for image in gqa[1]:
        of_shapes = [[o["x"], o["y"], o["x"] + o["w"], o["y"] + o["h"]] for o in graphs[image.id]["objects"].values()]
        assert 3 <= len(of_shapes) <= 6
        others = [box for box in image.boxes if box not in of_shapes]
        assert 2 <= len(others) <= 4 and len(image.boxes) == len(of_shapes) + len(others)
        for x1, y1, x2, y2 in image.boxes:
            assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height
    firsts = [image.boxes[0] in [[*map(float, box)] for box in image.boxes[1:]] for image in gqa[1]]
    assert not any(firsts)  # no box twice


def test_answers_are_balanced(records):
    of_template, of_text = defaultdict(Counter), defaultdict(Counter)
    for record in records.values():
        if record["isBalanced"]:
            of_template[template(record)][record["answer"]] += 1
            of_text[record["question"]][record["answer"]] += 1
            if record["types"]["structural"] == "choose":
                options = drawn.chosen_among(record["semantic"][-1]["argument"])
                of_template["choose, place"][options.index(record["answer"])] += 1
    assert len(of_template) == 19  # one of them for places, and none for what is only entailed
    for counts in (*of_template.values(), *(counts for counts in of_text.values() if counts.total() >= 10)):
        assert counts.most_common(1)[0][1] / counts.total() <= 0.6, counts
    assert all(counts.total() >= 12 for counts in of_template.values())


def test_gqa_is_read_and_true_answers_are_worth_everything(gqa):
    folder, images = gqa
    train, val = (read_gqa(find_gqa(folder, fold)) for fold in ("train", "val"))
    assert len(train) > 8 * (NUM_IMAGES - NUM_VAL) and len(val) > 8 * NUM_VAL
    assert len(val.records) > 2 * len(val) and set(train.kinds["structural"]) == set(val.kinds["structural"])
    assert set(train.kinds["structural"]) == {"verify", "query", "choose", "compare", "logical"}
    assert {image.id for image in images if image.fold == "val"} == set(val.images)

    truth, choices = {name: record["answer"] for name, record in val.records.items()}, read_choices(folder)
    found = measures(val.records, truth, choices)
    expected = dict.fromkeys(("accuracy", "binary", "open", "consistency", "validity", "plausibility"), 1)
    assert found == expected | {"distribution": 0}
    asked = set(val.ids)
    spoilt = {name: answer if name in asked else "?" for name, answer in truth.items()}
    assert measures(val.records, spoilt)["consistency"] < 0.2
    assert measures(val.records, dict.fromkeys(truth, "?"), choices)["validity"] == 0


def test_what_is_entailed_is_there(records):
    for name, record in records.items():
        assert {records[other]["imageId"] for other in record["entailed"]} <= {record["imageId"]}
        assert name not in record["entailed"] and record["equivalent"] == [name]
    val = [record for record in records.values() if int(record["imageId"]) > NUM_IMAGES - NUM_VAL]
    assert {record["isBalanced"] for record in val} == {True, False}
    silent = {template(record) for record in val if record["isBalanced"] and not record["entailed"]}
    assert {"twoSame same color None", "twoSame same shape None"} <= silent
    assert not any(name.startswith(("directOf", "relS", "chooseAttr", "verifyAttr", "count")) for name in silent)


def written(steps: list[dict[str, Any]]) -> str:
    parts = [(f"{step['operation']}: {step['argument']}", step["dependencies"]) for step in steps]
    return "->".join(f"{said} {others}" if others else said for said, others in parts)


def test_gqa_records_are_whole(records, graphs):
    for record in records.values():
        assert record["semanticStr"] == written(record["semantic"])
        objects = graphs[record["imageId"]]["objects"]
        for key, text in (("question", record["question"]), ("fullAnswer", record["fullAnswer"])):
            words = [word.strip(",.?") for word in text.split()]
            for span, number in record["annotations"][key].items():
                start, end = map(int, span.split(":")) if ":" in span else (int(span), int(span) + 1)
                *attributes, name = words[start:end]
                assert fits(objects[number], name, *attributes), (text, span)
        for number in record["annotations"]["answer"].values():
            assert objects[number]["name"] == record["answer"]


def test_fields_are_those_of_the_official_files(vqa_dir, gqa, vqa, records, graphs):
    (official,) = read(vqa_dir / "gqa/questions.json").values()
    assert official["semanticStr"] == written(official["semantic"])
    for record in records.values():
        assert record.keys() == official.keys()
        for key in ("types", "groups", "annotations"):
            assert record[key].keys() == official[key].keys()
        assert record["semantic"][0].keys() == official["semantic"][0].keys()
    graph = next(iter(read(vqa_dir / "gqa/sceneGraphs.json").values()))
    own, entry = next(iter(graphs.values())), next(iter(graph["objects"].values()))
    assert own.keys() <= graph.keys()
    assert next(iter(own["objects"].values())).keys() == entry.keys()
    for fold in ("train", "val"):
        for ours, theirs in zip(find_vqa(vqa[0], fold), find_vqa(vqa_dir / "vqa-v2", fold), strict=True):
            assert ours.name == theirs.name
            mine, other = read(ours), read(theirs)
            assert mine.keys() >= other.keys() and mine["data_subtype"] == f"{fold}2014"
            for key in ("info", "license"):
                assert mine[key].keys() == other[key].keys()
            (key,) = mine.keys() & {"questions", "annotations"}
            assert mine[key][0].keys() == other[key][0].keys()


def test_ten_people_answer_and_most_are_right(vqa):
    said = [entry for fold in ("train", "val") for entry in read(find_vqa(vqa[0], fold)[1])["annotations"]]
    odd = wrong = 0
    for entry in said:
        texts, true = [one["answer"] for one in entry["answers"]], entry["multiple_choice_answer"]
        assert Counter(texts).most_common(1) == [(true, texts.count(true))] and texts.count(true) >= 6
        assert accuracy(true, texts) == 1
        assert sorted(one["answer_id"] for one in entry["answers"]) == list(range(1, 11))
        assert {one["answer_confidence"] for one in entry["answers"]} <= {"yes", "maybe", "no"}
        kind = "yes/no" if true in ("yes", "no") else "number" if true.isdigit() else "other"
        assert entry["answer_type"] == kind
        odd += any(text != true and normalise(text) == normalise(true) for text in texts)
        wrong += any(normalise(text) != normalise(true) for text in texts)
    assert 0.1 < odd / len(said) < 0.9 and 0.2 < wrong / len(said) < 0.9


def test_both_forms_tell_the_same(gqa, vqa, records):
    assert [(one.id, one.fold, one.boxes) for one in gqa[1]] == [(one.id, one.fold, one.boxes) for one in vqa[1]]
    assert all(one.path.read_bytes() == other.path.read_bytes() for one, other in zip(gqa[1], vqa[1], strict=True))
    told = [(r["imageId"], r["question"], r["answer"]) for _, r in sorted(records.items()) if r["isBalanced"]]
    found = []
    for fold in ("train", "val"):
        questions, annotations = find_vqa(vqa[0], fold)
        asked, entries = read_vqa(questions, annotations), read(annotations)["annotations"]
        answers = [entry["multiple_choice_answer"] for entry in entries]
        found += zip(asked.images, asked.texts, answers, strict=True)
        for entry, text in zip(entries, asked.texts, strict=True):
            assert text.lower().startswith(f"{entry['question_type']} ")
    assert found == told


def test_no_image_is_in_two_folds(gqa, vqa):
    names = [str(number) for number in range(1, NUM_IMAGES + 1)]
    for folder, images in (gqa, vqa):
        assert [image.id for image in images] == names
        assert [image.fold for image in images] == ["train"] * (NUM_IMAGES - NUM_VAL) + ["val"] * NUM_VAL
        assert sorted(folder.rglob("*.jpg")) == sorted(image.path for image in images)
    tiers = {fold: set(read_gqa(find_gqa(gqa[0], fold)).images) for fold in ("train", "val")}
    assert tiers == {"train": set(names[:-NUM_VAL]), "val": set(names[-NUM_VAL:])}
    assert {fold: set(read_vqa(*find_vqa(vqa[0], fold)).images) for fold in ("train", "val")} == tiers
    assert vqa[1][0].path == vqa[0] / "train2014/COCO_train2014_000000000001.jpg"
    assert vqa[1][-1].path == vqa[0] / f"val2014/COCO_val2014_{NUM_IMAGES:012d}.jpg"
    assert gqa[1][0].path == gqa[0] / "images/1.jpg"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["GQA", "VQA"])
def test_a_seed_is_a_set(tmp_path, form):
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        drawn.draw(tmp_path / name, form, num_images=8, seed=seed)
    one, again, other = (contents(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again
    assert one.keys() == other.keys() and all(one[name] != other[name] for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "one", "other"]


def test_a_set_is_drawn_once_and_another_is_refused(tmp_path, monkeypatch):
    first = drawn.draw(tmp_path / "set", "GQA", num_images=8)
    monkeypatch.setattr(drawn, "paint", None)
    assert drawn.draw(tmp_path / "set", "GQA", num_images=8) == first
    for form, options in (("VQA", {}), ("GQA", {"seed": 1}), ("GQA", {"num_images": 9})):
        with pytest.raises(ValueError, match="holds something else than this drawn set"):
            drawn.draw(tmp_path / "set", form, **{"num_images": 8, **options})


def test_a_set_appears_at_once(tmp_path, monkeypatch):
    moves = []
    replace = drawn.os.replace

    def move(source: Path, target: Path) -> None:
        moves.append((sorted(contents(source)), target, list(target.iterdir())))
        replace(source, target)

    monkeypatch.setattr(drawn.os, "replace", move)
    drawn.draw(tmp_path / "set", "GQA", num_images=8)
    assert moves == [(sorted(contents(tmp_path / "set")), tmp_path / "set", [])]


def test_a_set_that_is_cut_short_leaves_nothing(tmp_path, monkeypatch):
    paint = drawn.paint

    def fail(scene: drawn.Scene, seed: int) -> Any:
        if scene.id == "5":
            raise KeyboardInterrupt
        return paint(scene, seed)

    (tmp_path / ".set.12.tmp").mkdir()  # of a process that was killed
    with monkeypatch.context() as patch:
        patch.setattr(drawn, "paint", fail)
        with pytest.raises(KeyboardInterrupt):
            drawn.draw(tmp_path / "set", "VQA", num_images=8)
    assert list(tmp_path.iterdir()) == []
    assert len(drawn.draw(tmp_path / "set", "VQA", num_images=8)) == 8


@pytest.mark.parametrize(
    ("form", "num_images", "said"), [("gqa", 8, "form is 'gqa', not one of GQA, VQA"), ("GQA", 1, "num_images is 1")]
)
def test_what_cannot_be_drawn_is_refused(tmp_path, form, num_images, said):
    with pytest.raises(ValueError, match=said):
        drawn.draw(tmp_path / "set", form, num_images=num_images)
    assert list(tmp_path.iterdir()) == []
