"""`vqa/preprocess.py`: what a model reads and gives follows from the questions, and from nothing a test fold holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vqa.preprocess import build_lexicon, number_questions, read_scene_graphs, words_on_image
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
