"""`vqa/preprocess.py`: what a model reads and gives follows from the questions, and from nothing a test fold holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vqa import preprocess
from vqa.preprocess import (
    QuestionTable,
    build_lexicon,
    number_questions,
    prepare,
    read_scene_graphs,
    words_on_image,
)
from vqa.questions import Questions


def thing(name: str, attributes: list[str] = [], relations: list[tuple[str, str]] = []) -> dict:  # noqa: B006
    found = [{"name": word, "object": other} for word, other in relations]
    return {"name": name, "x": 1, "y": 2, "w": 3, "h": 4, "attributes": attributes, "relations": found}


GRAPH = {
    "width": 10,
    "height": 10,
    "objects": {
        "1": thing("cup", ["red"], [("to the left of", "2")]),
        "2": thing("dog", ["brown", "furry"]),
        "3": thing("cup", ["red"]),
    },
}
ASKED = Questions(
    ["1", "2", "3"],
    ["7", "7", "8"],
    ["What color is the cup?", "Is there a dog on the table?", "How many cups?"],
    [("red",), ("yes", "yes", "no"), ("2", "two", "3")],
)
NUMBERED = {"question_len": 5, "num_stat_word": 6, "topk": 2}


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_words_on_an_image_are_the_most_frequent_names_attributes_and_relations():
    assert words_on_image(GRAPH, 2) == ["cup", "dog", "red", "brown", "to", "the", "left", "of"]
    assert words_on_image(GRAPH, 1) == ["cup", "red", "to", "the", "left", "of"]


def test_entities_are_what_scene_graphs_name_or_without_them_what_people_answer():
    lexicon = build_lexicon(ASKED, {"7": GRAPH}, least_answers=1, topk=2)
    assert lexicon.entities == {"cup", "dog"}
    assert set(lexicon.answers.answers) == {"red", "yes", "2"}
    assert {"furry", "table"} - set(lexicon.words.words) == {"furry"}  # beyond the two most frequent attributes
    assert build_lexicon(ASKED, {}, least_answers=1, topk=2).entities == {"red"}
    other = build_lexicon(ASKED, {"9": {"objects": {"1": thing("zebra")}}}, least_answers=1, topk=2)
    assert "zebra" not in other.words.words and other.entities == {"red"}  # no image of the training fold


def test_a_fold_as_numbers():
    lexicon = build_lexicon(ASKED, {"7": GRAPH}, least_answers=1, topk=2)
    table = number_questions(ASKED, lexicon, {"7": GRAPH}, **NUMBERED)
    assert table.lengths_Q.tolist() == [5, 5, 3]  # "on the table" is beyond the fifth word
    number_of = lexicon.words.number_of
    assert table.entities_QE[:, 0].tolist() == [number_of["cup"], number_of["dog"], 0]
    assert table.descriptions["7"].tolist() == [number_of[word] for word in ("cup", "dog", "red", "brown", "to", "the")]
    assert set(table.descriptions) == {"7"}
    assert table.targets_QA is not None
    right = table.targets_QA.toarray()
    assert right[0, lexicon.answers.number_of["red"]] == 1
    assert right[2, lexicon.answers.number_of["2"]] == pytest.approx((1 * 2 / 3 + 2 * 1 / 3) / 3)


def test_without_answers_there_are_no_targets():
    lexicon = build_lexicon(ASKED, {}, least_answers=1, topk=2)
    asked = Questions(["1"], ["7"], ["What zebra?"], [()])
    table = number_questions(asked, lexicon, {}, **NUMBERED)
    assert table.targets_QA is None
    assert table.words_QN[0, :3].tolist() == [lexicon.words.number_of["what"], 1, 0]  # 1: unknown


def test_shuffled_questions_are_about_another_image_and_stay_together():
    lexicon = build_lexicon(ASKED, {}, least_answers=1, topk=2)
    asked = ASKED.of([0, 1, 2, 2])
    table = number_questions(asked, lexicon, {}, **NUMBERED).shuffled(3)
    assert all(own != other for own, other in zip(asked.images, table.images, strict=True))
    assert table.images == ["8", "8", "7", "7"]
    np.testing.assert_array_equal(table.words_QN, number_questions(asked, lexicon, {}, **NUMBERED).words_QN)


def test_scene_graphs_are_read_from_several_files(tmp_path):
    paths = [write(tmp_path / "a.json", {"7": GRAPH}), write(tmp_path / "b.json", {"8": {"objects": {}}})]
    assert set(read_scene_graphs(paths)) == {"7", "8"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "is no object of scene graphs"),
        ({"7": {}}, "scene graph '7': it has no 'objects'"),
        ({"7": {"objects": {"1": {"name": "cup"}}}}, "scene graph '7': 'objects.1' has no 'x'"),
        ({"7": {"objects": {"1": thing("cup", [3])}}}, "scene graph '7': 'attributes.0' is of another kind"),  # type: ignore[list-item]
        ({"7": {"objects": {"1": thing("cup") | {"relations": [{}]}}}}, "'relations.0' has no 'name'"),
        *(
            ({"7": GRAPH | {side: size}}, f"scene graph '7': '{side}' is no number of pixels above 0, up to 1,000,000")
            for side in ("width", "height")
            for size in (0, -5, 2e6, float("nan"), float("inf"), 10**400, "10", None, [10])
        ),
        *(
            ({"7": {"objects": {"1": thing("cup") | {key: size}}}}, f"'objects.1.{key}' is ")
            for key in "xywh"
            for size in (2e6, -2e6, 10**400, float("nan"), float("-inf"), "3", None)
        ),
        *(
            ({"7": {"objects": {"1": thing("cup") | {key: -1}}}}, f"'objects.1.{key}' is not within 0 and 1,000,000")
            for key in "wh"
        ),
    ],
)
def test_what_is_no_scene_graph_is_told(value, said, tmp_path):
    with pytest.raises(ValueError, match=r"^.*graphs\.json: ") as caught:
        read_scene_graphs([write(tmp_path / "graphs.json", value)])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_real_scene_graphs_are_read(vqa_dir):
    graphs = read_scene_graphs([vqa_dir / "gqa" / "sceneGraphs.json"])
    assert len(graphs) == 4
    assert all(words_on_image(graph, 6) for graph in graphs.values())


FOLDS = {"train": ASKED.of([0, 0, 1, 2]), "test": ASKED.of([2, 0])}
SIZES = {"least_answers": 1, "question_len": 5, "num_stat_word": 6, "topk": 2}


def same(first: QuestionTable, second: QuestionTable) -> bool:
    arrays = [np.array_equal(getattr(first, name), getattr(second, name)) for name in ("words_QN", "entities_QE")]
    assert first.targets_QA is not None and second.targets_QA is not None
    described = json.dumps({name: row.tolist() for name, row in first.descriptions.items()}) == json.dumps(
        {name: row.tolist() for name, row in second.descriptions.items()}
    )
    targets = np.array_equal(first.targets_QA.toarray(), second.targets_QA.toarray())
    return all(arrays) and described and targets and first.images == second.images


def test_numbers_are_computed_once_and_found_again(tmp_path, monkeypatch):
    lexicon, tables = prepare(FOLDS, {"7": GRAPH}, tmp_path / "new", **SIZES)
    expected = number_questions(FOLDS["test"], lexicon, {"7": GRAPH}, **NUMBERED)
    assert same(tables["test"], expected) and lexicon == build_lexicon(
        FOLDS["train"], {"7": GRAPH}, least_answers=1, topk=2
    )
    monkeypatch.setattr(preprocess, "build_lexicon", None)  # cannot be called
    again, found = prepare(FOLDS, {"7": GRAPH}, tmp_path / "new", **SIZES)
    assert again == lexicon and all(same(found[name], table) for name, table in tables.items())
    assert found["test"].descriptions["7"].dtype == tables["test"].descriptions["7"].dtype


@pytest.mark.parametrize(
    ("folds", "graph", "sizes"),
    [
        (FOLDS | {"test": replace(ASKED, texts=["Why?", *ASKED.texts[1:]])}, GRAPH, SIZES),
        (FOLDS | {"test": replace(ASKED, images=["7", "8", "8"])}, GRAPH, SIZES),
        (FOLDS | {"test": replace(ASKED, answers=[("blue",), *ASKED.answers[1:]])}, GRAPH, SIZES),
        (FOLDS, {"objects": {"1": thing("zebra")}}, SIZES),
        *((FOLDS, GRAPH, SIZES | {name: value + 1}) for name, value in SIZES.items()),
    ],
)
def test_other_content_has_another_file(folds, graph, sizes, tmp_path):
    prepare(FOLDS, {"7": GRAPH}, tmp_path, **SIZES)
    prepare(folds, {"7": graph}, tmp_path, **sizes)
    assert len(list(tmp_path.iterdir())) == 2


def test_images_named_by_their_files_have_the_scene_graphs_of_their_ids():
    asked = replace(ASKED, images=["a/7.jpg", "COCO_val2014_000000000007.jpg", "8.jpg"])
    lexicon = build_lexicon(asked, {"7": GRAPH}, least_answers=1, topk=2)
    table = number_questions(asked, lexicon, {"7": GRAPH}, **NUMBERED)
    assert lexicon.entities == {"cup", "dog"} and set(table.descriptions) == set(asked.images[:2])


def test_a_damaged_file_is_made_again_and_the_oldest_give_way(tmp_path):
    lexicon, _ = prepare(FOLDS, {}, tmp_path, **SIZES)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"nonsense")
    assert prepare(FOLDS, {}, tmp_path, **SIZES)[0] == lexicon and path.stat().st_size > 100
    for length in range(6, 6 + preprocess.MOST_KEPT):
        prepare(FOLDS, {}, tmp_path, **SIZES | {"question_len": length})
    assert len(list(tmp_path.iterdir())) == preprocess.MOST_KEPT and not path.exists()


def test_questions_without_answers_are_kept_too(tmp_path):
    folds = {"train": ASKED, "test": replace(ASKED, answers=[()] * 3)}
    for _ in range(2):
        assert prepare(folds, {}, tmp_path, **SIZES)[1]["test"].targets_QA is None
