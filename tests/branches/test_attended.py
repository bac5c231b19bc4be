"""`branches/attended.py`: for each question what each branch looked at, whatever else is in its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from branches.attended import attended
from branches.fusion import AnswerModel

WORDS = {"num_words": 20, "embed_dim": 6, "width": 16}
BRANCHES: dict[str, dict[str, Any]] = {
    "fine": {**WORDS, "feature_width": 5, "layers": 1, "glimpses": 2},
    "graph": {**WORDS, "layers": 2, "sample_k": 2},
}


def build(*names: str, **fine: Any) -> AnswerModel:
    torch.manual_seed(0)
    arguments = {name: BRANCHES[name] | (fine if name == "fine" else {}) for name in names}
    return AnswerModel.build(arguments, num_answers=7, loss="bce").eval()


def inputs() -> dict[str, Tensor]:
    """Three questions about two images, of 4 and 2 regions, and about graphs of 3, 0 and 4 nodes without edges."""
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(1, 20, (3, 5), generator=draw, dtype=torch.int32)
    words[1, 2:] = 0
    boxes = torch.rand(2, 4, 4, generator=draw).sort(dim=-1).values
    boxes[1, 2:] = 0
    return {
        "words_BN": words,
        "entities_BE": words[:, :2],
        "features_IMF": torch.randn(2, 4, 5, generator=draw),
        "boxes_IM4": boxes,
        "description_IW": words[:2, :1],
        "images_B": torch.tensor([1, 0, 1]),
        "nodes_V4": torch.randint(1, 20, (7, 4), generator=draw, dtype=torch.int32),
        "node_boxes_V4": torch.rand(7, 4, generator=draw).sort(dim=-1).values,
        "graphs_V": torch.tensor([0, 0, 0, 2, 2, 2, 2]),
        "edges_2E": torch.zeros(2, 0, dtype=torch.int64),
        "relations_E": torch.zeros(0, dtype=torch.int32),
        "signs_E": torch.zeros(0),
    }


def test_each_question_has_the_regions_of_its_image_and_the_objects_of_its_graph():
    given = inputs()
    found = attended(build("fine", "graph"), given)
    assert list(found) == ["fine", "graph"]
    assert [len(one.weights_M) for one in found["fine"]] == [2, 4, 2]
    assert [len(one.weights_M) for one in found["graph"]] == [3, 0, 4]
    torch.testing.assert_close(found["fine"][0].boxes_M4, given["boxes_IM4"][1, :2])
    torch.testing.assert_close(found["graph"][2].boxes_M4, given["node_boxes_V4"][3:])
    for one in (*found["fine"], found["graph"][0], found["graph"][2]):
        assert one.weights_M.sum().item() == pytest.approx(1, abs=1e-5) and (one.weights_M >= 0).all()
    assert [(one.weights_M > 0).sum().item() for one in found["graph"]] == [2, 0, 2]


def test_regions_weigh_what_the_attention_says_that_the_answer_is_made_of():
    """The mean over glimpses, summed over words."""
    model, given, seen = build("fine"), inputs(), []
    model.branches["fine"].attend.register_forward_hook(lambda layer, args, out: seen.append(out[0]))
    model(**{key: given[key] for key in model.inputs["fine"]})
    (attention,) = seen
    for row, one in enumerate(attended(model, given)["fine"]):
        expected = sum(attention[row, glimpse, word] for glimpse in range(2) for word in range(5)) / 2
        torch.testing.assert_close(one.weights_M, expected[: len(one.weights_M)])


def test_a_question_alone_looks_where_it_does_in_a_batch():
    model, given = build("fine", "graph"), inputs()
    nodes = given["graphs_V"] == 2
    alone = {**given, **{name: given[name][2:] for name in ("words_BN", "entities_BE", "images_B")}}
    alone |= {name: given[name][nodes] for name in ("nodes_V4", "node_boxes_V4")}
    alone["graphs_V"] = torch.zeros(4, dtype=torch.int64)
    for name, (one,) in attended(model, alone).items():
        torch.testing.assert_close(one.weights_M, attended(model, given)[name][2].weights_M, atol=1e-5, rtol=1e-5)


def test_a_branch_that_looks_at_nothing_tells_nothing():
    given = inputs()
    assert attended(build("fine", feature_width=0), {key: given[key] for key in ("words_BN", "entities_BE")}) == {}
    assert list(attended(build("graph"), given)) == ["graph"]
