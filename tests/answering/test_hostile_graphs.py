"""Scene graphs that anybody may have written: read or refused in a line, and whatever is read can be answered about."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from branches.graph import GraphBranch
from vqa.preprocess import all_words, read_scene_graphs, words_on_image
from vqa.scene_graph import number_graph, pack, subgraph
from vqa.text import build_vocabulary

MOST = settings().max_examples  # 10,000 with --torture
FUZZ = settings(
    max_examples=40 if MOST == 100 else MOST, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
WORDS = build_vocabulary(["is the red cup to the left of a dog on it"])
NEAR = 1e-4  # scores that are nearer than this may be ordered otherwise in another batch

GRAPH: dict[str, Any] = {
    "width": 20,
    "height": 10,
    "objects": {
        "1": {"name": "cup", "x": 1, "y": 2, "w": 3, "h": 4, "attributes": ["red"], "relations": [
            {"name": "to the left of", "object": "2"}]},
        "2": {"name": "dog", "x": 9, "y": 0, "w": 9.5, "h": 9, "attributes": [], "relations": []},
    },
}  # fmt: skip
HOSTILE = (
    *(None, True, "", "x", "\0\x1b[31m", "\ud800", [], [[]], {}, {"": {}}, [None] * 3),
    *(0, -1, 1e6, 1e-300, 1e300, -1e300, 10**400, -(10**400), float("nan"), float("inf"), float("-inf")),
)


def build(kind: str = "imle") -> GraphBranch:
    torch.manual_seed(0)
    sizes = {"num_words": len(WORDS), "num_answers": 5, "embed_dim": 6, "width": 16, "layers": 2, "sample_k": 2}
    return GraphBranch(**sizes, sampler=kind).eval()  # type: ignore[arg-type]


@torch.inference_mode()
def answered(branch: GraphBranch, graphs: list[Any], texts: list[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits of a batch, and how much each object of each graph weighed."""
    numbers = [number_graph(graph, WORDS) for graph in graphs]
    packed = {name: torch.from_numpy(values) for name, values in pack(numbers).items()}
    logits, weights = branch.look(torch.from_numpy(WORDS.encode(texts, 6)), **packed)
    return logits, list(weights.split([len(each) for each in numbers]))


def refusal(path: Path) -> str:
    """What a file of scene graphs is refused with, in a line; "" if it is read, and can be answered about then."""
    said = ""
    try:
        graphs = read_scene_graphs([path])
    except ValueError as error:
        graphs, said = {}, str(error)
    if said:
        assert "\n" not in said and said.startswith(str(path)) and len(said) < 3000
    for graph in graphs.values():
        logits, (weights,) = answered(build(), [graph], ["is it red"])
        assert logits.isfinite().all() and weights.isfinite().all()
        assert all(isinstance(text, str) for text in (*words_on_image(graph, 3), all_words(graph)))
        part = subgraph(graph, weights.tolist(), 8)
        assert len(part["objects"]) == min(2, len(graph["objects"])) and json.dumps(part)
    return said


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every part of a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [found for key in keys for found in ((*path, key), *places(value[key], (*path, key)))]


def test_every_part_may_be_anything(tmp_path):
    path, refused, read = tmp_path / "sceneGraphs.json", 0, 0
    for place in places({"7": GRAPH}):
        for other in HOSTILE:
            whole = json.loads(json.dumps({"7": GRAPH}))
            part = whole
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = other
            path.write_text(json.dumps(whole))
            is_refused = bool(refusal(path))
            refused, read = refused + is_refused, read + (not is_refused)
    assert refused > 300 and read > 50


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"7":' * 50_000, '{"7": {"objects": ' + "[" * 5000, "\0", '{"7": 1e999}', '"x"'],
)
def test_what_is_no_file_of_graphs_is_refused(text, tmp_path):
    (tmp_path / "graphs.json").write_text(text)
    assert refusal(tmp_path / "graphs.json")


def test_a_graph_of_ten_thousand_objects_is_answered_about_soon(tmp_path):
    entry = {"name": "cup", "x": 1, "y": 2, "w": 3, "h": 4, "attributes": ["red"] * 50}
    objects = {
        str(number): {**entry, "relations": [{"name": "on", "object": str(other)} for other in (number, number + 1, 0)]}
        for number in range(10_000)
    }
    (tmp_path / "graphs.json").write_text(json.dumps({"7": {"width": 20, "height": 20, "objects": objects}}))
    started = time.process_time()
    assert refusal(tmp_path / "graphs.json") == ""
    assert time.process_time() - started < 10


def test_an_object_related_to_itself_is_as_one_that_is_not():
    """It has an edge to itself anyway, but without a word."""
    alone = {"1": {**GRAPH["objects"]["1"], "relations": []}}
    itself = {"1": {**alone["1"], "relations": [{"name": "on", "object": "1"}] * 3}}
    assert number_graph({"objects": itself}, WORDS).edges_2E.tolist() == [[0] * 3] * 2  # none leads back as well
    logits, weights = answered(build(), [{"objects": itself}], ["is it"])
    assert logits.isfinite().all() and weights[0].tolist() == [1]


@st.composite
def scene_graphs(draw: st.DrawFn) -> dict[str, Any]:
    """Any that is read: up to eight objects, with relations to themselves, to others, several times, to nothing."""
    ids = draw(st.lists(st.text(max_size=3), max_size=8, unique=True))
    names = st.sampled_from([*WORDS.words, "the red dog", "", "zebra"]) | st.text(max_size=6)
    sides = st.floats(0, 1e6) | st.integers(0, 30)
    corners = st.floats(-1e6, 1e6) | st.integers(-5, 30)
    relation = st.fixed_dictionaries({"name": names, "object": st.sampled_from([*ids, "nothing"])})
    thing = st.fixed_dictionaries(
        {"name": names, "x": corners, "y": corners, "w": sides, "h": sides}
        | {"attributes": st.lists(names, max_size=5), "relations": st.lists(relation, max_size=6)}
    )
    size = draw(st.fixed_dictionaries({}, optional=dict.fromkeys(("width", "height"), st.floats(1e-3, 1e6))))
    return {**size, "objects": {name: draw(thing) for name in ids}}


def is_decided(branch: GraphBranch, graph: Any, text: str) -> bool:
    """Whether it is more than rounding that tells which objects of a graph are chosen."""
    seen: list[Tensor] = []
    sampler = branch.layers[-1].sampler
    hook = sampler.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))  # type: ignore[union-attr]
    answered(branch, [graph], [text])
    hook.remove()
    scores = seen[0][0].sort(descending=True).values
    return len(scores) < 3 or bool(scores[1] - scores[2] > NEAR)


@given(st.lists(st.tuples(scene_graphs(), st.sampled_from(["", "is the cup red", "dog"])), min_size=1, max_size=4))
@pytest.mark.parametrize("kind", ["imle", "soft"])
@FUZZ
def test_any_graph_is_answered_about_alone_as_in_a_batch(kind, asked):
    branch = build(kind)
    graphs, texts = [graph for graph, _ in asked], [text for _, text in asked]
    logits, weights = answered(branch, graphs, texts)
    assert logits.shape == (len(asked), 5) and logits.isfinite().all()
    for row, (graph, text) in enumerate(asked):
        own = weights[row]
        assert own.sum().item() == pytest.approx(min(1, len(graph["objects"])), abs=1e-4) and (own >= 0).all()
        if kind == "imle":
            assert (own > 0).sum() <= 2
        if kind == "soft" or is_decided(branch, graph, text):
            logits_alone, (alone,) = answered(branch, [graph], [text])
            torch.testing.assert_close(logits[row], logits_alone[0], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(own, alone, atol=1e-3, rtol=1e-3)


@given(scene_graphs())
@FUZZ
def test_any_graph_has_boxes_in_its_image_and_edges_between_its_objects(graph):
    numbers, count = number_graph(graph, WORDS), len(graph["objects"])
    assert numbers.words_K4.shape == (count, 4) and np.isfinite(numbers.boxes_K4).all()
    assert ((numbers.boxes_K4 >= 0) & (numbers.boxes_K4 <= 1)).all()
    assert (numbers.boxes_K4[:, 2:] >= numbers.boxes_K4[:, :2]).all()
    assert ((numbers.edges_2E >= 0) & (numbers.edges_2E < count)).all()
    part = subgraph(graph, [1.0] * count, 5)
    assert len(part["objects"]) == min(count, 5)
    assert all(0 <= end < len(part["objects"]) for source, _, target in part["relations"] for end in (source, target))
