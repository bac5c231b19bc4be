"""`branches/graph.py`: against plain loops, and no question or graph has a say in another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from branches.graph import (
    GraphAttention,
    GraphBranch,
    GraphLayer,
    QuestionReader,
    Relations,
    Relevance,
    gated_softmax,
    packing,
    positions,
    sum_by,
)
from vqa.scene_graph import number_graph, pack
from vqa.text import build_vocabulary

SMALL: dict[str, Any] = {
    "num_words": 20,
    "num_answers": 7,
    "embed_dim": 6,
    "width": 16,
    "layers": 2,
    "sampler": "simple",
    "beta": 1e4,
}
SIZES = (5, 1, 0, 4)
KINDS = ("imle", "aimle", "gumbel", "simple", "soft")

Inputs = dict[str, Tensor]


def batch(sizes: tuple[int, ...] = SIZES, words: int = 6, seed: int = 0) -> Inputs:
    """Questions of different lengths about graphs of different sizes, in which most nodes have an edge to the next."""
    draw = torch.Generator().manual_seed(seed)
    num_nodes, starts = sum(sizes), torch.tensor([0, *sizes]).cumsum(0)
    ring = [
        (start + i, start + (i + 1) % size) for start, size in zip(starts, sizes, strict=False) for i in range(size)
    ]
    edges = torch.tensor([[int(a), int(b)] for a, b in ring if a != b] or [[0, 0]]).T[:, : len(ring)]
    edges = torch.cat([edges, edges.flip(0)[:, ::2]], dim=1)
    found = {
        "words_BN": torch.randint(1, 20, (len(sizes), words), generator=draw, dtype=torch.int32),
        "nodes_V4": torch.randint(1, 20, (num_nodes, 4), generator=draw, dtype=torch.int32),
        "node_boxes_V4": torch.rand(num_nodes, 4, generator=draw).sort(dim=-1).values,
        "graphs_V": torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        "edges_2E": edges,
        "relations_E": torch.randint(1, 20, (edges.shape[1],), generator=draw, dtype=torch.int32),
        "signs_E": torch.randint(0, 2, (edges.shape[1],), generator=draw) * 2.0 - 1,
    }
    for row in range(len(sizes)):
        found["words_BN"][row, max(1, words - row) :] = 0
    found["nodes_V4"][::2, 2:] = 0
    return found


def build(**changes: Any) -> GraphBranch:
    torch.manual_seed(0)
    return GraphBranch(**SMALL | changes).eval()


def take(inputs: Inputs, rows: list[int]) -> Inputs:
    """Some of the questions with their graphs, in this order, packed anew."""
    graphs, (source, target) = inputs["graphs_V"], inputs["edges_2E"]
    nodes = torch.cat([(graphs == row).nonzero()[:, 0] for row in rows])
    place = torch.full((len(graphs),), -1).scatter(0, nodes, torch.arange(len(nodes)))
    edges = torch.cat([(graphs[source] == row).nonzero()[:, 0] for row in rows])
    return {
        "words_BN": inputs["words_BN"][rows],
        "nodes_V4": inputs["nodes_V4"][nodes],
        "node_boxes_V4": inputs["node_boxes_V4"][nodes],
        "graphs_V": torch.arange(len(rows)).repeat_interleave(torch.stack([(graphs == row).sum() for row in rows])),
        "edges_2E": place[torch.stack([source, target])[:, edges]],
        "relations_E": inputs["relations_E"][edges],
        "signs_E": inputs["signs_E"][edges],
    }


def without_edges(inputs: Inputs) -> Inputs:
    return inputs | {name: inputs[name][..., :0] for name in ("edges_2E", "relations_E", "signs_E")}


def assert_alike(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def said(features: Tensor) -> Relations:
    """A relation of its own for each edge."""
    return Relations(features, torch.arange(len(features)), torch.ones(len(features)))


def plain_attention(layer: GraphAttention, x: Tensor, edges: Tensor, features: Tensor, gates: Tensor) -> Tensor:
    """What each node gets from all others, one at a time."""
    heads, size = layer.weight.shape
    rows = []
    for node in range(len(x)):
        powers, values = [], []
        arriving = [(int(edges[0, e]), features[e], gates[e]) for e in range(edges.shape[1]) if edges[1, e] == node]
        for source, feature, gate in [*arriving, (node, torch.zeros_like(features[0]), torch.tensor(1.0))]:
            joint = layer.to_source(x[source]) + layer.to_target(x[node]) + layer.to_edge(feature)
            joint = torch.where(joint > 0, joint, 0.2 * joint).view(heads, size)
            powers.append(gate * (joint * layer.weight).sum(dim=1).exp())
            values.append(layer.to_source(x[source]).view(heads, size))
        shares = torch.stack(powers) / torch.stack(powers).sum(dim=0)
        rows.append((shares[..., None] * torch.stack(values)).sum(dim=0).flatten())
    return torch.stack(rows)


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 12), torch.tensor([[0, 1, 2, 3, 0, 4], [1, 2, 0, 2, 1, 4]]), torch.randn(6, 5)


@pytest.mark.parametrize("gates", [None, torch.tensor([1.0, 0.0, 0.3, 1.0, 1.0, 0.5])])
def test_graph_attention_is_that_of_a_plain_loop(gates):
    x, edges, features = attention_inputs()
    layer = GraphAttention(12, 5, heads=3)
    expected = plain_attention(layer, x, edges, features, torch.ones(6) if gates is None else gates)
    assert_alike(layer(x, edges, said(features), gates), expected)


def test_graph_attention_is_that_of_torch_geometric():
    geometric = pytest.importorskip("torch_geometric.nn")
    x, edges, features = attention_inputs()
    layer = GraphAttention(12, 5, heads=3)
    other = geometric.GATv2Conv(12, 4, heads=3, edge_dim=5, add_self_loops=False, bias=False)
    other.lin_l, other.lin_r, other.lin_edge = layer.to_source, layer.to_target, layer.to_edge
    other.att.data.copy_(layer.weight[None])
    loops = torch.arange(6).expand(2, 6)
    expected = other(x, torch.cat([edges, loops], dim=1), torch.cat([features, torch.zeros(6, 5)]))
    assert_alike(layer(x, edges, said(features), None), expected)


def test_a_node_without_neighbours_keeps_itself():
    x, edges, features = attention_inputs()
    layer = GraphAttention(12, 5, heads=3)
    alone = layer.to_source(x)
    assert_alike(layer(x, edges, said(features), None)[5], alone[5])
    assert_alike(layer(x, edges, said(features), torch.zeros(6)), alone)
    assert_alike(layer(x, edges[:, :0], said(features[:0]), None), alone)


def test_the_gates_of_both_ends_of_an_edge_have_a_gradient():
    x, edges, features = attention_inputs()
    layer = GraphAttention(12, 5, heads=3)
    chosen = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], requires_grad=True)
    found = layer(x, edges, said(features), chosen[edges[0]] * chosen[edges[1]])
    (gradient,) = torch.autograd.grad((found[2] * torch.arange(12)).sum(), chosen)
    assert gradient[[1, 2, 3]].all() and not gradient[[0, 4, 5]].any()  # 1 and 3 lead to 2


def test_gated_softmax_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    logits, gates = torch.randn(7, 2) * 30, torch.rand(7, 1)
    gates[3] = 0
    group = torch.tensor([0, 2, 0, 2, 2, 0, 3])
    powers = gates.double() * logits.double().exp()
    sums = torch.stack([powers[group == number].sum(dim=0) for number in range(5)])
    assert_alike(gated_softmax(logits, gates, group, 5), (powers / sums[group]).float())


def test_gated_softmax_takes_large_logits_and_shut_gates():
    logits = torch.tensor([1e4, 1.0, 2.0, 5.0, -1e4], requires_grad=True)
    gates = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], requires_grad=True)
    found = gated_softmax(logits, gates, torch.tensor([0, 0, 0, 1, 2]), 3)
    assert_alike(found, torch.tensor([0, 1 / (1 + torch.e), torch.e / (1 + torch.e), 0, 1]))
    gradients = torch.autograd.grad((found * torch.arange(5)).sum(), (logits, gates))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_packed_nodes_come_back_from_rows_of_their_own():
    graphs = torch.tensor([2, 0, 2, 3, 0, 2])
    where = packing(graphs, 5)
    assert where.mask_BK.sum(dim=1).tolist() == [2, 0, 3, 1, 0]
    rows = where.pad(torch.arange(1.0, 7.0))
    assert rows.tolist() == [[2, 5, 0], [0, 0, 0], [1, 3, 6], [4, 0, 0], [0, 0, 0]]
    assert ((rows > 0) == where.mask_BK).all() and where.unpad(rows).tolist() == [1, 2, 3, 4, 5, 6]
    assert sum_by(torch.ones(6), graphs, 5).tolist() == [2, 0, 3, 1, 0]


def test_places_of_words_are_told_apart_at_any_width():
    for width in (1, 5, 8):
        found = positions(9, width)
        assert found.shape == (9, width) and len(found.unique(dim=0)) == 9
    torch.testing.assert_close(positions(3, 2)[2], torch.stack([torch.tensor(2.0).sin(), torch.tensor(2.0).cos()]))


def test_each_question_has_instructions_of_its_own():
    """Not those that a change of axes would deal out to others."""
    torch.manual_seed(0)
    reader = QuestionReader(6, 16, 4, num_instructions=3).eval()
    vectors, mask = torch.randn(4, 5, 6), torch.arange(5) < torch.tensor([5, 3, 0, 1])[:, None]
    whole, instructions = reader(vectors, mask)
    assert instructions is not None and (whole.shape, instructions.shape) == ((4, 16), (4, 3, 16))
    vectors[1] += 1
    changed_whole, changed = reader(vectors, mask)
    rest = [0, 2, 3]
    assert_alike(changed[rest], instructions[rest])
    assert_alike(changed_whole[rest], whole[rest])
    assert ((changed[1] - instructions[1]).abs().amax(dim=-1) > 1e-4).all()
    vectors[1, 3:] = 9.0  # of no word
    assert_alike(reader(vectors, mask)[1], changed)


def test_the_order_of_words_matters():
    model, inputs = build(), batch((4,))
    other = inputs | {"words_BN": inputs["words_BN"].flip(1)}
    assert (model(**other) - model(**inputs)).abs().max() > 1e-4


def test_a_layer_adds_to_what_is_known():
    torch.manual_seed(0)
    layer, (x, edges, features) = GraphLayer(12, 5, 3, None).eval(), attention_inputs()
    i, u, where = torch.randn(2, 12), torch.randn(2, 12), packing(torch.tensor([0, 0, 0, 0, 1, 1]), 2)
    gained = layer.norm(layer.attend(F.gelu(x * i[where.graphs_V]), edges, said(features), None))
    found, chosen = layer(x, edges, said(features), i, u, where)
    assert chosen is None
    assert_alike(found, x + gained)


def test_relevance_is_a_scaled_product_with_the_question_of_the_graph():
    torch.manual_seed(0)
    relevance = Relevance(4)
    x, u, graphs = torch.randn(3, 4), torch.randn(2, 4), torch.tensor([1, 0, 1])
    expected = [relevance.of_node(x[i]) @ relevance.of_question(u[graphs[i]]) / 2 for i in range(3)]
    assert_alike(relevance(x, u, graphs), torch.stack(expected))


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_mgat": True}, {"use_masking": False}, {"use_instruction": False}, {"sampler": "soft", "layers": 5}],
)
def test_a_question_is_answered_alike_alone_in_a_batch_in_any_order_and_padded(changes):
    model, inputs = build(**changes), batch()
    together, weights = model.look(**inputs)
    assert together.shape == (4, 7) and together.isfinite().all()
    longer = inputs | {"words_BN": F.pad(inputs["words_BN"], (0, 5))}
    assert_alike(model(**longer), together)
    order = [3, 0, 2, 1]
    assert_alike(model(**take(inputs, order)), together[order])
    for row in range(4):
        alone, own = model.look(**take(inputs, [row]))
        assert_alike(alone, together[row : row + 1])
        assert_alike(own, weights[inputs["graphs_V"] == row])
    with torch.no_grad():  # where other kernels are taken
        assert_alike(model(**inputs), together)


def test_nodes_and_edges_may_stand_in_any_order():
    model, inputs = build(use_mgat=True), batch()
    expected, weights = model.look(**inputs)
    nodes, edges = torch.randperm(10), torch.randperm(inputs["edges_2E"].shape[1])
    other = {name: value[nodes] if name.split("_")[-1].startswith("V") else value for name, value in inputs.items()}
    other["edges_2E"] = nodes.argsort()[inputs["edges_2E"]]
    other |= {name: other[name][..., edges] for name in ("edges_2E", "relations_E", "signs_E")}
    found, other_weights = model.look(**other)
    assert_alike(found, expected)
    assert_alike(other_weights, weights[nodes])


@pytest.mark.parametrize("part", ["words", "nodes", "boxes", "relations", "signs"])
@pytest.mark.parametrize("training", [True, False])
def test_another_question_and_graph_change_nothing(part, training):
    model, inputs = build(use_mgat=True, sample_k=4).train(training), batch((5, 4, 3))
    other = {name: value.clone() for name, value in inputs.items()}
    of_edges = inputs["graphs_V"][inputs["edges_2E"][0]]
    changes = {
        "words": ("words_BN", torch.arange(3) == 1),
        "nodes": ("nodes_V4", inputs["graphs_V"] == 1),
        "boxes": ("node_boxes_V4", inputs["graphs_V"] == 1),
        "relations": ("relations_E", of_edges == 1),
        "signs": ("signs_E", of_edges == 1),
    }
    name, where = changes[part]
    other[name][where] = -other[name][where] if part == "signs" else other[name][where] * 0 + 1
    torch.manual_seed(0)
    expected = model(**inputs)
    torch.manual_seed(0)
    found = model(**other)
    assert_alike(found[[0, 2]], expected[[0, 2]])
    assert (found[1] - expected[1]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "width"), [(1, 24), (1, 300), (2, 300), (5, 50)])
def test_other_sizes_work_and_every_weight_is_trained(kind, layers, width):
    model = build(sampler=kind, layers=layers, width=width, use_mgat=True, sample_k=5).train()
    inputs = batch((9, 8, 7))
    for _ in range(2):  # a choice by chance may happen to be the best
        (model(**inputs) * torch.arange(7)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_heads_are_as_many_as_divide_the_width():
    def heads(**changes: Any) -> int:
        return len(build(**changes).layers[0].attend.weight)

    assert [heads(width=width) for width in (16, 50, 9, 7)] == [4, 2, 3, 1]
    assert heads(width=64, heads=8) == 8


def test_only_what_is_used_has_weights():
    def parts(**changes: Any) -> tuple[bool, list[bool]]:
        model = build(layers=3, **changes)
        return model.read.queries is not None, [layer.relevance is not None for layer in model.layers]

    assert parts() == (True, [False, False, True])
    assert parts(use_mgat=True) == (True, [True, True, True])
    assert parts(use_masking=False) == parts(use_masking=False, use_mgat=True) == (True, [False] * 3)
    assert parts(use_instruction=False) == (False, [False, False, True])
    assert not any("decode" in name for name in build(use_instruction=False).state_dict())


@pytest.mark.parametrize("changes", [{"use_instruction": False}, {"use_masking": False}, {"use_mgat": True}])
def test_each_flag_changes_the_answer_given_the_same_weights(changes):
    model, other, inputs = build(), build(**changes), batch()
    known = model.state_dict()
    missing = other.load_state_dict({name: known[name] for name in other.state_dict() if name in known}, strict=False)
    assert all("layers.0.relevance" in name for name in missing.missing_keys)
    assert (model(**inputs) - other(**inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("sample_k", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_comes_from_k_nodes_alone(kind, sample_k):
    model, inputs = build(sampler=kind, sample_k=sample_k, layers=1), batch()
    for training in (False, True):
        weights = model.train(training).look(**inputs)[1]
        sums = sum_by(weights, inputs["graphs_V"], 4)
        torch.testing.assert_close(sums, torch.tensor([1.0, 1, 0, 1]))
        chosen = sum_by((weights > 0).float(), inputs["graphs_V"], 4).tolist()
        assert chosen == ([5, 1, 0, 4] if kind == "soft" else [min(size, sample_k) for size in SIZES])


def test_nodes_that_were_not_chosen_do_not_matter():
    """In one layer with masks, where no other layer has told of them."""
    model, inputs = build(layers=1), batch((6,))
    expected, weights = model.look(**inputs)
    compared = 0
    for node in (weights == 0).nonzero()[:, 0].tolist():
        for word in range(2, 20):
            other = inputs | {"nodes_V4": inputs["nodes_V4"].clone()}
            other["nodes_V4"][node] = word
            found, other_weights = model.look(**other)
            if torch.equal(other_weights > 0, weights > 0):
                assert_alike(found, expected)
                compared += 1
    assert compared > 0


def test_without_masks_every_node_counts():
    weights = build(use_masking=False).look(**batch())[1]
    assert (weights > 0).all()


def test_every_input_matters():
    model, inputs = build(use_masking=False), batch((5, 4, 4))
    expected = model(**inputs)
    for name, value in inputs.items():
        other = inputs | {name: value.roll(1, dims=-1 if name == "edges_2E" else 0)}
        if name == "edges_2E":
            other[name] = inputs["edges_2E"].flip(0)
        if name == "graphs_V":
            other[name] = (inputs["graphs_V"] + 1) % 3
        assert (model(**other) - expected).abs().max() > 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_is_no_obstacle(kind):
    some = batch()
    cases = {
        "no edges": without_edges(some),
        "no nodes": without_edges(batch((0, 0, 0))),
        "no words": some | {"words_BN": torch.zeros_like(some["words_BN"])},
        "no places for words": some | {"words_BN": some["words_BN"][:, :0]},
        "nothing": without_edges(batch((0,))) | {"words_BN": torch.zeros(1, 3, dtype=torch.int32)},
    }
    for name, inputs in cases.items():
        for training in (True, False):
            model = build(sampler=kind, use_mgat=True).train(training)
            logits = model(**inputs)
            assert logits.shape == (len(inputs["words_BN"]), 7) and logits.isfinite().all(), name
            logits.sum().backward()
            for parameter in model.parameters():
                assert not training or parameter.grad is not None, name  # several processes wait for each
                assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_graph_without_nodes_leaves_the_question_alone():
    model, inputs = build(), batch()
    none = without_edges(take(inputs, [2]))
    words = model.embed(none["words_BN"])
    u, _ = model.read(words, none["words_BN"] > 0)
    expected = model.classify(torch.cat([torch.zeros_like(u), u, torch.zeros_like(u)], dim=-1))
    assert_alike(model(**inputs)[2:3], expected)


def test_half_precision_gives_nearly_the_same():
    model, inputs = build(use_mgat=True), batch()
    expected = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs)
        for kind in KINDS:
            model_of_kind = build(sampler=kind).train()
            model_of_kind(**inputs).float().square().sum().backward()
            assert all(each.grad is not None and each.grad.isfinite().all() for each in model_of_kind.parameters())
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_gradients_are_those_of_finite_differences():
    model = build(sampler="soft", use_mgat=True).double()
    inputs = batch((4, 1, 0, 3))
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    boxes, signs = inputs["node_boxes_V4"].requires_grad_(), inputs["signs_E"].requires_grad_()
    weight = model.layers[0].attend.weight

    def logits(boxes: Tensor, signs: Tensor, weight: Tensor) -> Tensor:
        changed = {"layers.0.attend.weight": weight}
        return torch.func.functional_call(model, changed, (), inputs | {"node_boxes_V4": boxes, "signs_E": signs})

    assert torch.autograd.gradcheck(logits, (boxes, signs, weight.detach().requires_grad_()))


def test_words_start_from_given_vectors_and_answers_from_what_is_expected():
    model, inputs = build(), batch()
    vectors = torch.randn(20, 6)
    model.start_from(vectors)
    torch.testing.assert_close(model.embed.weight, vectors)
    accuracy = torch.tensor([0.0, 0.5, 0.25, 1.0, 0.1, 0.1, 0.05])
    with torch.no_grad():
        model.classify[-1].weight.zero_()
    model.expect(accuracy, "bce")
    torch.testing.assert_close(model(**inputs).sigmoid(), accuracy.expand(4, 7), atol=1e-5, rtol=0)
    model.expect(accuracy / 2, "ce")
    torch.testing.assert_close(model(**inputs).softmax(dim=1), accuracy.expand(4, 7) / 2, atol=1e-5, rtol=0)


def test_packed_scene_graphs_are_taken_as_they_are():
    entry = {"name": "cup", "x": 1, "y": 2, "w": 3, "h": 4, "attributes": ["red"], "relations": []}
    other = {**entry, "name": "dog", "relations": [{"name": "near", "object": "1"}]}
    words = build_vocabulary(["a red cup near a dog"])
    numbers = [number_graph({"objects": each}, words) for each in ({"1": entry, "2": other}, {}, {"1": entry})]
    packed = {name: torch.from_numpy(values) for name, values in pack(numbers).items()}
    questions = torch.from_numpy(words.encode(["Is a dog near a cup?", "red?", "cup?"], 6))
    assert build()(questions, **packed).shape == (3, 7)


def riddles(draw: torch.Generator, size: int = 64) -> tuple[Inputs, Tensor, Tensor]:
    """Graphs of three nodes, each with a name and a value: what is the value of the one that the question names?

    Returns:
        the inputs, which node it is (size, 3), its value (size,).
    """
    names = torch.rand(size, 3, generator=draw).argsort(dim=1)
    values = torch.randint(0, 3, (size, 3), generator=draw)
    asked = torch.randint(0, 3, (size, 1), generator=draw)
    nothing = torch.zeros_like(names)
    inputs = without_edges(batch((3,) * size)) | {
        "words_BN": asked + 2,
        "nodes_V4": torch.stack([names + 2, values + 10, nothing, nothing], dim=-1).flatten(0, 1),
        "node_boxes_V4": torch.zeros(3 * size, 4),
    }
    return inputs, names == asked, values[names == asked]


@pytest.mark.parametrize(
    "kind", ["imle", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "imle")]
)
def test_training_learns_to_choose_the_node_that_is_asked_for(kind):
    """From answers alone, in graphs never seen before; by chance, each would be right in a third of them.

    Losses are summed, so that each question has as large a gradient as it would have alone.
    """
    draw = torch.Generator().manual_seed(1)
    model = build(sampler=kind, sample_k=1, num_samples=4, layers=1, beta=10, num_answers=3, width=24, embed_dim=16)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.005)
    for _ in range(100):
        inputs, _, values = riddles(draw)
        optimizer.zero_grad()
        F.cross_entropy(model(**inputs), values, reduction="sum").backward()
        optimizer.step()
    inputs, is_asked, values = riddles(draw, 200)
    logits, weights = model.eval().look(**inputs)
    assert (logits.argmax(dim=1) == values).float().mean() > 0.65
    assert weights.view(-1, 3)[is_asked].mean() > 0.55
