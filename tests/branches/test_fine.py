"""`branches/fine.py`: against plain loops, and indifferent to padding, company and empty regions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from branches.fine import AttentionOnAttention, BilinearAttention, BilinearPooling, FineBranch, GatedFusion

SMALL: dict[str, Any] = {
    "num_words": 20,
    "num_answers": 7,
    "feature_width": 5,
    "embed_dim": 6,
    "width": 16,
    "glimpses": 3,
    "layers": 2,
    "count_objects": 4,
    "omega_q": 0.5,
    "omega_v": 0.5,
}


def batch(size: int = 3, words: int = 6, regions: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Questions of different lengths about images with different numbers of regions."""
    draw = torch.Generator().manual_seed(seed)
    found = {
        "words_BN": torch.randint(1, 20, (size, words), generator=draw),
        "entities_BE": torch.randint(1, 20, (size, 3), generator=draw),
        "features_IMF": torch.rand(size, regions, 5, generator=draw),
        "boxes_IM4": torch.rand(size, regions, 4, generator=draw).sort(dim=-1).values,
        "description_IW": torch.randint(1, 20, (size, 4), generator=draw),
    }
    for row in range(size):
        found["words_BN"][row, words - row :] = 0
        found["entities_BE"][row, 3 - row :] = 0
        found["features_IMF"][row, regions - row :] = 0
        found["boxes_IM4"][row, regions - row :] = 0
        found["description_IW"][row, 4 - row :] = 0
    return found


def build(**changes: Any) -> FineBranch:
    torch.manual_seed(0)
    return FineBranch(**SMALL | changes).eval()


def padded(inputs: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    def longer(value: Tensor) -> Tensor:
        shape = list(value.shape)
        shape[1] = more
        return torch.cat([value, value.new_zeros(shape)], dim=1)

    return {name: longer(value) for name, value in inputs.items()}


def test_bilinear_attention_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    attend = BilinearAttention(4, 5, 3, glimpses=2).eval()
    x, y = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    x_mask = torch.tensor([[True, True, False], [True, True, True]])
    y_mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    found, _ = attend(x, y, x_mask, y_mask)
    for b in range(2):
        for g in range(2):
            powers = torch.zeros(3, 4)
            for i in range(3):
                for j in range(4):
                    if x_mask[b, i] and y_mask[b, j]:
                        left, right = attend.project_x(x[b, i]), attend.project_y(y[b, j])
                        powers[i, j] = (attend.weight[g] * left * right).sum().add(attend.bias[g]).exp()
            torch.testing.assert_close(found[b, g], powers / powers.sum())


def test_bilinear_pooling_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    pool = BilinearPooling(4, 5, 3).eval()
    x, y, attention = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.rand(2, 3, 4)
    expected = torch.zeros(2, 3)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                expected[b] += attention[b, i, j] * pool.project_x(x[b, i]) * pool.project_y(y[b, j])
    torch.testing.assert_close(pool(x, y, attention), expected)


def test_attention_on_attention_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    layer = AttentionOnAttention(128)
    assert layer.num_heads == 2
    x, context = torch.randn(1, 3, 128), torch.randn(1, 4, 128)
    mask = torch.tensor([[True, True, True, False]])
    query, (key, value) = layer.to_query(x)[0], layer.to_key_value(context)[0].chunk(2, dim=-1)
    for i in range(3):
        attended = []
        for head in range(2):
            part = slice(64 * head, 64 * head + 64)
            powers = torch.stack([(query[i, part] @ key[j, part] / 8).exp() for j in range(3)])
            attended.append(sum(power * value[j, part] for j, power in enumerate(powers / powers.sum())))
        first, gate = layer.gate(torch.cat([*attended, query[i]])).chunk(2)
        torch.testing.assert_close(layer(x, context, mask)[0, i], first * gate.sigmoid())


def test_a_fusion_of_strength_0_changes_nothing_and_weak_ones_little():
    torch.manual_seed(0)
    x, other, mask = torch.randn(2, 3, 4), torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)
    for omega in (0.0, 0.01):
        change = GatedFusion(4, 6, omega).eval()(x, other, mask[:, :3], mask) - x
        assert change.abs().max() <= omega * 20
    assert change.abs().max() > 0


@pytest.mark.parametrize("changes", [{}, {"count_objects": 0}, {"feature_width": 0}, {"second_embedding": False}])
def test_a_question_is_answered_alike_alone_in_a_batch_and_padded(changes):
    model, inputs = build(**changes), batch()
    if changes.get("feature_width") == 0:
        inputs = {name: inputs[name] for name in ("words_BN", "entities_BE")}
    together = model(**inputs)
    assert together.shape == (3, 7) and together.isfinite().all()
    torch.testing.assert_close(model(**padded(inputs, 4)), together, atol=1e-5, rtol=1e-5)
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_questions_about_one_image_are_answered_as_each_with_an_image_of_its_own(layers):
    model, inputs = build(layers=layers), batch(4)
    images = torch.tensor([2, 0, 2, 2])
    of_image = ("features_IMF", "boxes_IM4", "description_IW")
    own = inputs | {name: inputs[name][images] for name in of_image}
    shared = inputs | {name: inputs[name][:3] for name in of_image} | {"images_B": images}
    torch.testing.assert_close(model(**shared), model(**own), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("empty", ["words_BN", "entities_BE", "features_IMF", "description_IW"])
def test_what_is_not_there_is_no_obstacle(empty):
    inputs = batch()
    inputs[empty] = torch.zeros_like(inputs[empty])
    if empty == "features_IMF":
        inputs["boxes_IM4"] = torch.zeros_like(inputs["boxes_IM4"])
    model = build().train()
    logits = model(**inputs)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_input_matters():
    model, inputs = build(), batch()
    expected = model(**inputs)
    for name, value in inputs.items():
        other = {**inputs, name: value.flip(0)}
        if name in ("features_IMF", "boxes_IM4"):
            other["boxes_IM4"], other["features_IMF"] = (inputs[key].flip(0) for key in ("boxes_IM4", "features_IMF"))
        assert (model(**other) - expected).abs().max() > 1e-6, name


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 24, "glimpses": 1, "layers": 1},
        {"width": 192, "glimpses": 4, "layers": 3, "activation": "relu"},
        {"layers": 0, "count_objects": 12},
    ],
)
def test_other_sizes_work_and_every_weight_is_trained(changes):
    model = build(**changes).train()
    model(**batch(4, seed=1)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or "bias" in name or parameter.numel() == 1, name


def test_a_width_that_has_no_heads_is_refused():
    with pytest.raises(ValueError, match="--num_hid 200: must be a multiple of 64"):
        AttentionOnAttention(200)


def test_gradients_are_those_of_finite_differences():
    model = build().double()
    inputs = batch(2)
    words = {name: value for name, value in inputs.items() if not value.is_floating_point()}
    features = (inputs["features_IMF"][:, :3].double() + 0.1).requires_grad_()
    boxes = inputs["boxes_IM4"][:, :3].double()
    assert torch.autograd.gradcheck(lambda x: model(**words, features_IMF=x, boxes_IM4=boxes), features, atol=1e-4)
