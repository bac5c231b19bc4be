"""`models.py`: the score's formula by hand, towers entered at any stage, freezing, LoRA, learning rates per layer."""

from __future__ import annotations

import copy
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from scipy.special import softmax
from torch import nn

import models
from inputs import TextTable

EMBED_DIM, IMAGE_LAYERS, TEXT_LAYERS, CONTEXT, VOCAB = 16, 3, 2, 12, 50
END = VOCAB - 1  # the highest token, at which CLIP pools
SCALE_Q, SCALE_C = 0.2, 0.3
HEADS = {"scale_q": SCALE_Q, "scale_c": SCALE_C, "hidden_q": 8, "hidden_c": 8, "dropout": 0.0}
ARGUMENTS = {
    **HEADS,
    "embed_dim": EMBED_DIM,
    "residual": True,
    "refinement": None,
    "predict_rationale": False,
}
PLAIN = {**ARGUMENTS, "residual": False}
REFINED = {**PLAIN, "refinement": {"layers": 1, "heads": 2, "dim": 8}}
FURTHER = {**ARGUMENTS, "extra": ["authenticity", "beauty"]}
LEVELS = {**ARGUMENTS, "prompt_levels": True}
ALL_NEW = {**FURTHER, "prompt_levels": True, "global_view": True, "task_gradients": "stop_q"}


def build_clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> open_clip.CustomTextCLIP:
    """A small CLIP, the same at every call."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": IMAGE_LAYERS}
    words = {"context_length": CONTEXT, "vocab_size": VOCAB, "width": 32, "heads": 2, "layers": TEXT_LAYERS}
    return open_clip.CustomTextCLIP(
        embed_dim=EMBED_DIM, vision_cfg={**sizes, **(vision or {})}, text_cfg={**words, **(text or {})}
    )


def resnet_clip() -> open_clip.CustomTextCLIP:
    """RN50 in small: its image tower has batch normalisation and no transformer blocks."""
    return build_clip({"layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "patch_size": None, "image_size": 64})


def timm_clip() -> open_clip.CustomTextCLIP:
    """A CLIP whose image tower is one of timm's smallest vision transformers."""
    return build_clip({"timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64})


def build_model(clip: open_clip.CustomTextCLIP | None = None, **changes: Any) -> models.ScoreModel:
    clip = clip or build_clip()
    torch.manual_seed(1)
    return models.build_model(clip, **{**ARGUMENTS, **changes})


def images(number: int, size: int = 32) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(2))


def prompts(*lengths: int) -> torch.Tensor:
    """(P, N) tokens of prompts with so many words, the end token after them, then padding."""
    generator = torch.Generator().manual_seed(3)
    tokens_PN = torch.zeros(len(lengths), CONTEXT, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens_PN[row, :length] = torch.randint(1, END - 1, (length,), generator=generator)
        tokens_PN[row, length] = END
    return tokens_PN


def batch_of(arguments: dict[str, Any], number: int = 3, num_views: int = 1) -> dict[str, Any]:
    """A batch of images, of several views if asked for, with the texts that a model of these arguments reads."""
    pictures = images(number * num_views)
    if num_views > 1:
        pictures = pictures.unflatten(0, (number, num_views))
    batch = {"image": pictures, "num_views": num_views, "text": prompts(2, 7, 4, 1, 5, 3, 6)}
    if not arguments.get("prompt_levels"):
        return {**batch, "prompt_of_B": torch.tensor([1, 0, 1, 2])[:number]}
    places = torch.tensor([[0, 1, 2], [3, 4, 0], [0, 1, 2], [3, 4, 0]])[:number]
    return {**batch, "prompt_of_B": places, "level_of_K": torch.tensor([6, 5])}


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, EMBED_DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def stir(module: nn.Module) -> None:
    """Move every parameter off its initial value."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def trained_names(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def train_steps(model: models.ScoreModel, num_steps: int = 3, size: int = 32) -> torch.optim.AdamW:
    """A few steps of AdamW over all parameters, frozen ones included, on the sum of both scores."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(num_steps):
        scores = model(images(4, size), prompts(3, 5), torch.tensor([0, 1, 1, 0]))
        ((scores["q"] - 1) ** 2 + (scores["c"] - 1) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def assert_one_line(error: pytest.ExceptionInfo[ValueError]) -> None:
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------- residual heads


@pytest.fixture
def residual() -> models.ResidualHeads:
    torch.manual_seed(0)
    return models.ResidualHeads(EMBED_DIM, **HEADS)


def test_a_fresh_residual_model_scores_exactly_by_its_base_formula(residual):
    residual.set_base((np.linspace(-2, 2, EMBED_DIM), 0.3), (1.7, -0.4))
    image, text = unit(9, 0), unit(9, 1)
    q = torch.sigmoid(image @ torch.linspace(-2, 2, EMBED_DIM) + 0.3)
    c = 1.7 * ((image * text).sum(dim=1) + 1) / 2 - 0.4
    torch.testing.assert_close(residual.quality(image), q, atol=1e-6, rtol=0)
    torch.testing.assert_close(residual.consistency(image, text), c, atol=1e-6, rtol=0)
    assert torch.count_nonzero(residual.delta_q(image)) == 0
    assert torch.count_nonzero(residual.delta_c(models.joint_features(image, text)[0])) == 0


def test_without_a_fitted_base_consistency_starts_as_half_the_cosine_plus_one(residual):
    image, text = unit(5, 0), unit(5, 1)
    expected = (F.cosine_similarity(image, text) + 1) / 2
    torch.testing.assert_close(residual.consistency(image, text), expected)


def test_scores_follow_the_documented_formula_after_training(residual):
    stir(residual)
    image, text = unit(7, 0), unit(7, 1)
    cos = (image * text).sum(dim=1, keepdim=True)
    q = torch.sigmoid(residual.base_q(image)) + SCALE_Q * torch.tanh(residual.delta_q(image))
    joint = torch.cat([image, text, cos], dim=1)
    c = residual.base_c((cos + 1) / 2) + SCALE_C * torch.tanh(residual.delta_c(joint))
    torch.testing.assert_close(residual.quality(image), q[:, 0])
    torch.testing.assert_close(residual.consistency(image, text), c[:, 0])


def test_deltas_never_exceed_their_scale(residual):
    image, text = unit(50, 0), unit(50, 1)
    base_q, base_c = residual.quality(image), residual.consistency(image, text)
    for head in (residual.delta_q, residual.delta_c):
        nn.init.normal_(head[-1].weight, std=100)
    move_q, move_c = residual.quality(image) - base_q, residual.consistency(image, text) - base_c
    for move, scale in ((move_q, SCALE_Q), (move_c, SCALE_C)):
        assert 0.9 * scale < move.abs().max() <= scale + 1e-6


def test_scores_outside_the_label_range_still_have_a_gradient(residual):
    residual.set_base((np.zeros(EMBED_DIM), 5.0), (1.0, 3.0))
    nn.init.constant_(residual.delta_q[-1].bias, 1.0)
    image, text = unit(4, 0).requires_grad_(), unit(4, 1)
    q, c = residual.quality(image), residual.consistency(image, text)
    assert (q > 1).all() and (c > 1).all()
    assert torch.autograd.grad(q.sum(), residual.delta_q[-1].bias, retain_graph=True)[0] != 0
    assert torch.autograd.grad(c.sum(), image)[0].abs().sum() > 0
    residual.set_base(None, (1.0, -3.0))
    low = residual.consistency(image, text)
    assert (low < 0).all()
    assert torch.autograd.grad(low.sum(), image)[0].abs().sum() > 0


def test_set_base_changes_only_what_it_is_given(residual):
    before = snapshot(residual)
    residual.set_base(None, None)
    assert all(torch.equal(before[name], value) for name, value in residual.state_dict().items())
    residual.set_base(None, (2.0, 0.5))
    assert (residual.base_c.weight.item(), residual.base_c.bias.item()) == (2.0, 0.5)
    assert torch.equal(residual.base_q.weight, before["base_q.weight"])
    residual.set_base((np.arange(EMBED_DIM), -1.0), None)
    assert residual.base_q.weight.tolist() == [list(range(EMBED_DIM))]
    assert residual.base_q.bias.item() == -1.0
    assert residual.base_c.weight.item() == 2.0
    assert residual.base_q.weight.requires_grad


# ------------------------------------------------------------------------------------------------- levels


def test_levels_are_five_texts_each_the_worst_first():
    assert models.LEVEL_TEXTS["quality"][0] == "a photo of bad quality"
    assert models.LEVEL_TEXTS["quality"][-1] == "a photo of perfect quality"
    assert models.LEVEL_TEXTS["consistency"][0] == "a photo that badly matches '{prompt}'"
    assert models.LEVEL_TEXTS["consistency"][-1] == "a photo that perfectly matches '{prompt}'"
    assert [len(set(texts)) for texts in models.LEVEL_TEXTS.values()] == [5, 5]
    assert all(text.count("{prompt}") == 1 for text in models.LEVEL_TEXTS["consistency"])


def naive_level(image_BE: torch.Tensor, levels: torch.Tensor, temperature: float) -> torch.Tensor:
    """`expected_level`, image by image and level by level."""
    found = []
    for row, image in enumerate(image_BE.double().numpy()):
        texts = (levels if levels.ndim == 2 else levels[row]).double().numpy()
        chances = softmax([temperature * float(image @ text) for text in texts])
        found.append([sum(chance * k / (len(texts) - 1) for k, chance in enumerate(chances))])
    return torch.tensor(found, dtype=torch.float32)


@pytest.mark.parametrize("num_levels", [2, 5])
@pytest.mark.parametrize("temperature", [0.0, 3.0, 100.0])
def test_the_expected_level_is_that_of_a_softmax_over_cosines(temperature, num_levels):
    image, levels = unit(num_levels, 0), unit(num_levels, 1)  # as many images as levels: their dimensions look alike
    own = unit(num_levels * num_levels, 2).view(num_levels, num_levels, EMBED_DIM)
    for texts in (levels, own):
        found = models.expected_level(image, texts, torch.tensor(temperature))
        assert found.shape == (num_levels, 1)
        torch.testing.assert_close(found, naive_level(image, texts, temperature), atol=1e-5, rtol=0)
        assert found.min() >= 0 and found.max() <= 1
    shared = levels.expand(num_levels, -1, -1)
    torch.testing.assert_close(
        models.expected_level(image, shared, torch.tensor(temperature)),
        models.expected_level(image, levels, torch.tensor(temperature)),
    )


def test_an_image_is_at_the_level_whose_text_it_equals():
    levels = unit(5, 1)
    found = models.expected_level(levels, levels, torch.tensor(500.0))
    torch.testing.assert_close(found[:, 0], torch.linspace(0, 1, 5))


@pytest.fixture
def with_levels() -> models.ResidualHeads:
    torch.manual_seed(0)
    return models.ResidualHeads(EMBED_DIM, **HEADS, temperature=20.0)


def test_heads_with_levels_start_as_the_expected_levels(with_levels):
    image, text, shared, own = unit(6, 0), unit(6, 1), unit(5, 2), unit(30, 3).view(6, 5, EMBED_DIM)
    expected_q, expected_c = (naive_level(image, levels, 20.0)[:, 0] for levels in (shared, own))
    torch.testing.assert_close(with_levels.quality(image, shared), expected_q, atol=1e-5, rtol=0)
    torch.testing.assert_close(with_levels.consistency(image, text, own), expected_c, atol=1e-5, rtol=0)
    with_levels.set_base((0.5, 0.3), (-2.0, 1.5))
    torch.testing.assert_close(with_levels.quality(image, shared), 0.5 * expected_q + 0.3, atol=1e-5, rtol=0)
    torch.testing.assert_close(with_levels.consistency(image, text, own), 1.5 - 2 * expected_c, atol=1e-5, rtol=0)


def test_heads_with_levels_follow_the_documented_formula_after_training(with_levels):
    stir(with_levels)
    image, text, shared, own = unit(6, 0), unit(6, 1), unit(5, 2), unit(30, 3).view(6, 5, EMBED_DIM)
    temperature = with_levels.temperature.item()
    assert temperature != 20
    q = with_levels.base_q(naive_level(image, shared, temperature)) + SCALE_Q * torch.tanh(with_levels.delta_q(image))
    joint = torch.cat([image, text, (image * text).sum(dim=1, keepdim=True)], dim=1)
    c = with_levels.base_c(naive_level(image, own, temperature)) + SCALE_C * torch.tanh(with_levels.delta_c(joint))
    torch.testing.assert_close(with_levels.quality(image, shared), q[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(with_levels.consistency(image, text, own), c[:, 0], atol=1e-5, rtol=0)


def test_the_temperature_of_levels_starts_as_that_of_clip_and_is_trained_by_itself():
    model = build_model(**LEVELS)
    models.freeze_backbone(model.clip, everything=True)
    before = model.clip.logit_scale.exp().item()
    assert model.heads.temperature.item() == pytest.approx(before) and before > 10
    model(**batch_of(LEVELS))["q"].sum().backward()
    assert model.heads.temperature.grad != 0
    model.heads.temperature.data.fill_(1.0)
    assert model.clip.logit_scale.exp().item() == before
    assert build_model().heads.temperature is None


def test_a_model_with_levels_compares_each_image_with_its_own_and_with_those_of_quality():
    model = build_model(**LEVELS).eval()
    stir(model.heads)
    batch = batch_of(LEVELS)
    found = model(**batch)
    text_PE = model.encode_text(batch["text"])
    for row, (prompt, *levels) in enumerate(batch["prompt_of_B"].tolist()):
        image = model.encode_image(batch["image"][row : row + 1])
        q = model.heads.quality(image, text_PE[[6, 5]])
        c = model.heads.consistency(image, text_PE[[prompt]], text_PE[levels][None])
        torch.testing.assert_close(found["q"][row], q[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found["c"][row], c[0], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- plain heads


def test_plain_heads_stay_between_zero_and_one():
    heads = build_model(residual=False).heads
    stir(heads)
    image, text = unit(200, 0), unit(200, 1)
    for scores in (heads.quality(image), heads.consistency(image, text)):
        assert scores.min() > 0 and scores.max() < 1
        assert scores.std() > 0


def test_refinement_starts_as_the_coarse_score_and_learns_from_there():
    plain, refined = build_model(residual=False), build_model(**REFINED)
    refined.heads.head_c.load_state_dict(plain.heads.head_c.state_dict())
    image, text = unit(6, 0), unit(6, 1)
    coarse = plain.heads.consistency(image, text)
    assert torch.equal(refined.heads.consistency(image, text), coarse)
    optimizer = torch.optim.AdamW(refined.heads.refine.parameters(), lr=1e-2)
    for _ in range(2):  # the first step moves the last layer off zero, the second reaches what lies below it
        optimizer.zero_grad()
        refined.heads.consistency(image, text).sum().backward()
        optimizer.step()
    without = [name for name, p in refined.heads.refine.named_parameters() if not p.grad.abs().sum() > 0]
    assert not without
    assert (refined.heads.consistency(image, text) != coarse).all()


def test_refinement_reads_image_text_and_coarse_score():
    refine = build_model(**REFINED).heads.refine
    stir(refine)
    base = (unit(3, 0), unit(3, 1), torch.full((3, 1), 0.4))
    for place, other in enumerate((unit(3, 2), unit(3, 3), torch.full((3, 1), 0.6))):
        changed = [other if index == place else value for index, value in enumerate(base)]
        assert (refine(*changed) != refine(*base)).all()


# ----------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize(
    "arguments", [ARGUMENTS, PLAIN, REFINED, {**ARGUMENTS, "predict_rationale": True}, FURTHER, LEVELS, ALL_NEW]
)
def test_a_model_is_built_again_from_its_json_arguments(arguments):
    first = build_model(**arguments).eval()
    stir(first)
    again = models.build_model(build_clip(), **json.loads(json.dumps(arguments))).eval()
    again.load_state_dict(first.state_dict())
    for num_views in (1, 2):
        batch = batch_of(arguments, num_views=num_views)
        expected, found = first(**batch), again(**batch)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (again.global_view, again.task_gradients) == (first.global_view, first.task_gradients)


@pytest.mark.parametrize("arguments", [ARGUMENTS, PLAIN, REFINED, FURTHER, {**FURTHER, "residual": False}])
def test_the_dropout_argument_reaches_every_head(arguments):
    model = build_model(**{**arguments, "dropout": 0.35})
    modules = [*model.heads.modules(), *model.extra.modules()]
    rates = [module.p for module in modules if isinstance(module, nn.Dropout)]
    assert len(rates) >= 2 + len(arguments.get("extra", ()))
    assert set(rates) == {0.35}


def test_without_prompts_there_is_only_quality():
    model = build_model(predict_rationale=True).eval()
    assert set(model(images(2))) == {"q"}
    torch.testing.assert_close(
        model(images(2))["q"], model(images(2), prompts(3), torch.zeros(2, dtype=torch.long))["q"]
    )


def test_rationale_is_a_linear_map_of_image_text_and_cosine():
    model = build_model(predict_rationale=True).eval()
    image, text = unit(4, 0), unit(4, 1)
    scores = model.score(image, text)
    assert set(scores) == {"q", "c", "rationale"}
    joint = torch.cat([image, text, (image * text).sum(dim=1, keepdim=True)], dim=1)
    torch.testing.assert_close(scores["rationale"], model.rationale(joint))
    assert scores["rationale"].shape == (4, EMBED_DIM)


def test_embeddings_are_unit_vectors_in_float32():
    model = build_model().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedded = (model.encode_image(images(3)), model.encode_text(prompts(2, 5)))
    for vectors in embedded:
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_scores_are_computed_in_float32_under_autocast():
    model = build_model(predict_rationale=True)
    stir(model.heads)
    image, text = unit(40, 0), unit(40, 1)
    expected = model.score(image, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.heads.base_q(image).dtype == torch.bfloat16  # autocast does reach the heads
        found = model.score(image, text)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_distinct_prompt_is_encoded_once_and_scores_as_if_it_were_alone():
    model = build_model().eval()
    stir(model.heads)
    rows = []
    hook = model.clip.text.token_embedding.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    pictures, tokens, prompt_of = images(5), prompts(2, 9, 4), torch.tensor([2, 0, 0, 1, 2])
    together = model(pictures, tokens, prompt_of)
    hook.remove()
    assert rows == [3]
    for index, prompt in enumerate(prompt_of.tolist()):
        alone = model(pictures[index : index + 1], tokens[prompt : prompt + 1], torch.zeros(1, dtype=torch.long))
        for name in ("q", "c"):
            torch.testing.assert_close(together[name][index], alone[name][0], atol=1e-5, rtol=0)


def test_score_batch_gives_the_scores_and_embed_batch_what_clip_knows():
    model = build_model(predict_rationale=True).eval()
    text = {"text": prompts(2, 5), "prompt_of_B": torch.tensor([1, 1, 0])}
    batch = SimpleNamespace(inputs={"image": images(3), **text})
    scores, known = models.score_batch(model, batch), models.embed_batch(model, batch)
    assert set(scores) == {"q", "c"} and set(known) == {"image", "text", "cos"}
    text_BE = model.encode_text(text["text"])[text["prompt_of_B"]]
    assert torch.equal(known["text"], text_BE)
    assert torch.equal(known["image"], model.encode_image(batch.inputs["image"]))
    torch.testing.assert_close(known["cos"], F.cosine_similarity(known["image"], text_BE))
    torch.testing.assert_close(scores["c"], model.heads.consistency(known["image"], text_BE))
    batch.inputs = {"image": images(3)}
    assert set(models.score_batch(model, batch)) == {"q"}
    assert set(models.embed_batch(model, batch)) == {"image"}


@torch.no_grad()
@pytest.mark.parametrize("global_view", [False, True])
def test_embed_batch_averages_over_views_and_tells_levels(global_view):
    model = build_model(**LEVELS, global_view=global_view).eval()
    batch = batch_of(LEVELS, num_views=3)
    known = models.embed_batch(model, SimpleNamespace(inputs=batch))
    assert set(known) == {"image", "text", "cos", "level_q", "level_c"}
    views_BVE = model.encode_image(batch["image"].flatten(0, 1)).unflatten(0, (3, 3))
    text_PE = model.encode_text(batch["text"])
    temperature = model.heads.temperature.item()
    for row, (prompt, *levels) in enumerate(batch["prompt_of_B"].tolist()):
        views_VE = views_BVE[row]
        content_VE = views_VE[:1] if global_view else views_VE
        expected = {
            "image": views_VE.mean(dim=0),
            "text": text_PE[prompt],
            "cos": (content_VE @ text_PE[prompt]).mean(),
            "level_q": naive_level(views_VE, text_PE[[6, 5]], temperature).mean(),
            "level_c": naive_level(content_VE, text_PE[levels], temperature).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(known[name][row], value, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------ several views, further scores, tasks


KINDS_OF_HEADS = {
    "residual": ARGUMENTS,
    "refined": REFINED,
    "further": {**FURTHER, "predict_rationale": True},
    "levels": LEVELS,
}


@pytest.mark.parametrize("arguments", KINDS_OF_HEADS.values(), ids=KINDS_OF_HEADS)
def test_scores_of_several_views_are_the_mean_of_those_of_each(arguments):
    model = build_model(**arguments).eval()
    stir(model.heads)
    stir(model.extra)
    batch = batch_of(arguments, num_views=4)
    found = model(**batch)
    alone = [model(**{**batch, "image": batch["image"][:, view], "num_views": 1}) for view in range(4)]
    assert found.keys() == alone[0].keys()
    for name, values in found.items():
        of_views = torch.stack([scores[name] for scores in alone])
        torch.testing.assert_close(values, of_views.mean(dim=0), atol=1e-5, rtol=0)
        assert of_views.std(dim=0).min() > 1e-5, "views that say the same would show nothing"


@pytest.mark.parametrize("arguments", KINDS_OF_HEADS.values(), ids=KINDS_OF_HEADS)
def test_with_a_global_view_the_prompt_is_compared_with_the_first_alone(arguments):
    model, plain = (build_model(**arguments, global_view=value).eval() for value in (True, False))
    for each in (model, plain):
        stir(each.heads)
        stir(each.extra)
    batch = batch_of(arguments, num_views=3)
    first = {**batch, "image": batch["image"][:, 0], "num_views": 1}
    found, of_first, of_all = model(**batch), plain(**first), plain(**batch)
    for name, values in found.items():
        expected = of_first if name in ("c", "rationale") else of_all
        torch.testing.assert_close(values, expected[name], atol=1e-5, rtol=0)
        assert not torch.allclose(of_first[name], of_all[name], atol=1e-5)
    for name, values in model(**first).items():  # the only view that there is
        torch.testing.assert_close(values, of_first[name], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("stage", range(IMAGE_LAYERS + 2))
def test_several_views_enter_at_any_stage(stage):
    model = build_model().eval()
    batch = batch_of(ARGUMENTS, num_views=2)
    entering = models.run_image(model.clip.visual, batch["image"].flatten(0, 1), 0, stage).unflatten(0, (3, 2))
    found, expected = model(**{**batch, "image": entering, "image_stage": stage}), model(**batch)
    for name in ("q", "c"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)


def test_further_scores_have_heads_of_their_own_of_the_kind_of_quality():
    image = unit(7, 0)
    for arguments in (FURTHER, {**FURTHER, "residual": False}):
        model = build_model(**arguments)
        stir(model.extra)
        scores = model.score(image)
        assert set(scores) == {"q", "authenticity", "beauty"}
        assert scores["authenticity"].shape == (7,)
        assert not torch.allclose(scores["authenticity"], scores["beauty"], atol=1e-3)
    head = model.extra_heads["beauty"].head
    torch.testing.assert_close(scores["beauty"], torch.sigmoid(head(image))[:, 0])
    head = build_model(**FURTHER).extra_heads["beauty"]
    head.set_base((np.linspace(-2, 2, EMBED_DIM), 0.3))
    base = torch.sigmoid(image @ torch.linspace(-2, 2, EMBED_DIM) + 0.3)
    torch.testing.assert_close(head(image), base)
    stir(head.delta)
    torch.testing.assert_close(head(image), base + SCALE_Q * torch.tanh(head.delta(image)[:, 0]))


def test_score_batch_gives_further_scores_and_no_rationale():
    model = build_model(**{**FURTHER, "predict_rationale": True}).eval()
    batch = SimpleNamespace(inputs=batch_of(FURTHER))
    assert set(models.score_batch(model, batch)) == {"q", "c", "authenticity", "beauty"}


def task_gradients_of(model: models.ScoreModel, batch: dict[str, Any], *tasks: str) -> dict[str, torch.Tensor]:
    """Gradients of the sum of some tasks' squared errors; parameters that get none are left out."""
    model.zero_grad(set_to_none=True)
    scores = model(**batch)
    sum(((scores[task] - 1) ** 2).sum() for task in tasks).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("arguments", [ARGUMENTS, PLAIN, LEVELS, FURTHER], ids=["residual", "plain", "levels", "extra"])
@pytest.mark.parametrize(("stopped", "other"), [("q", "c"), ("c", "q")])
def test_a_stopped_task_trains_its_head_but_not_clip(stopped, other, arguments, num_views):
    shared, model = (build_model(**arguments, task_gradients=how) for how in ("shared", f"stop_{stopped}"))
    for each in (shared, model):
        models.freeze_backbone(each.clip)
        stir(each.heads)
        stir(each.extra)
    batch, extra = batch_of(arguments, 4, num_views), arguments.get("extra", ())
    found, both = (task_gradients_of(each, batch, "q", "c", *extra) for each in (model, shared))
    alone = task_gradients_of(shared, batch, other, *extra)
    for name, value in both.items():
        if not name.startswith("clip."):
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
            assert value.abs().sum() > 0
    of_clip = [{n: v for n, v in grads.items() if n.startswith("clip.")} for grads in (found, alone, both)]
    assert of_clip[0].keys() == of_clip[1].keys()
    for name, value in of_clip[1].items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
    assert any(not torch.allclose(of_clip[2][name], value, atol=1e-4) for name, value in of_clip[1].items())
    with torch.no_grad():
        for name, value in shared(**batch).items():
            torch.testing.assert_close(model(**batch)[name], value, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------ encoding text


def selected(clip: open_clip.CustomTextCLIP, tokens_PN: torch.Tensor) -> torch.Tensor:
    """Prompts as a step gets them: without the padding that all of them share, if the tower cannot see it."""
    trim = models.trims_exactly(clip.text)
    table = TextTable([str(row) for row in range(len(tokens_PN))], lambda texts: tokens_PN, tokens_PN.device, trim=trim)
    return table.select(np.arange(len(tokens_PN)))["text"]


def embedded(clip: open_clip.CustomTextCLIP, tokens_PN: torch.Tensor) -> torch.Tensor:
    return build_model(clip).eval().encode_text(selected(clip, tokens_PN))


@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 5}, {"proj_bias": True}, {"proj_type": "none"}])
def test_trimmed_padding_changes_no_text_embedding(text):
    clip = build_clip(text={**text, "width": EMBED_DIM if "proj_type" in text else 32}).eval()
    assert models.trims_exactly(clip.text)
    for tokens in (prompts(2), prompts(2, 7, 0), prompts(CONTEXT - 1, 3)):
        if "eos_id" in text:  # an end token that is not the highest: every prompt begins with a higher one
            tokens[tokens == END] = text["eos_id"]
            tokens[:, 0] = torch.where(tokens[:, 0] == text["eos_id"], tokens[:, 0], END)
        expected = clip.encode_text(tokens, normalize=True)
        torch.testing.assert_close(embedded(clip, tokens), expected, atol=1e-6, rtol=0)


def test_only_as_many_tokens_as_the_longest_prompt_has_are_computed():
    clip, lengths = build_clip(), []
    clip.text.token_embedding.register_forward_hook(lambda module, given, out: lengths.append(given[0].shape[1]))
    embedded(clip, prompts(2, 6, 4))
    assert lengths == [7]


def test_a_prompt_that_holds_token_zero_keeps_its_end():
    """Token 0 is the padding and also "!" inside a word of CLIP's vocabulary."""
    clip, tokens = build_clip().eval(), prompts(6)
    tokens[0, 2:5] = 0
    torch.testing.assert_close(embedded(clip, tokens), clip.encode_text(tokens, normalize=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_towers_that_see_the_padding_are_not_trimmed_and_run_as_a_whole(text):
    clip = build_clip(text=text).eval()
    assert not models.trims_exactly(clip.text)
    assert models.num_stages(clip.text) == 1
    tokens = prompts(2, 4)
    assert torch.equal(selected(clip, tokens), tokens)
    torch.testing.assert_close(embedded(clip, tokens), clip.encode_text(tokens, normalize=True))


# ------------------------------------------------------------------------------------------------- stages

BATCH = (images(4), prompts(2, 5)[:, :6], torch.tensor([0, 1, 1, 0]))
TOWERS = {
    "image": {},
    "image, mean pooling": {"pool_type": "avg"},
    "image, norm after pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "image, attention pooling": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "text": {},
    "text, projection with bias": {"proj_bias": True},
    "text, named end token": {"pool_type": "eos", "eos_id": END},
}


def tower_and_runs(kind: str) -> tuple[open_clip.CustomTextCLIP, nn.Module, Any, torch.Tensor]:
    """A CLIP in eval mode, one of its towers, what takes (x, start, stop) through it, and its embeddings of BATCH."""
    pictures, tokens, _ = BATCH
    if kind.startswith("image"):
        clip = build_clip(vision=TOWERS[kind]).eval()
        whole = clip.encode_image(pictures, normalize=True)
        return clip, clip.visual, lambda x, start, stop: models.run_image(clip.visual, x, start, stop), whole
    clip = build_clip(text=TOWERS[kind]).eval()
    padded = F.pad(tokens, (0, CONTEXT - tokens.shape[1]))
    whole = clip.encode_text(padded, normalize=True)
    return clip, clip.text, lambda x, start, stop: models.run_text(clip.text, x, tokens, start, stop), whole


def entry(kind: str) -> torch.Tensor:
    return BATCH[0 if kind.startswith("image") else 1]


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_left_and_entered_again_at_any_stage_gives_the_whole(kind):
    _, tower, run, whole = tower_and_runs(kind)
    num = models.num_stages(tower)
    assert num == (IMAGE_LAYERS if kind.startswith("image") else TEXT_LAYERS) + 1
    torch.testing.assert_close(run(entry(kind), 0, num), whole, atol=1e-6, rtol=0)
    seen = []
    for stage in range(num + 1):
        x = run(entry(kind), 0, stage)
        torch.testing.assert_close(run(x, stage, num), whole, atol=1e-6, rtol=0)
        seen.append(x)
    for one, other in pairwise(seen):  # every stage does something
        assert one.shape != other.shape or not torch.allclose(one, other, atol=1e-3)


@torch.no_grad()
def test_a_model_scores_the_same_from_whatever_stage_it_is_entered_at():
    model = build_model().eval()
    stir(model.heads)
    pictures, tokens, prompt_of = BATCH
    expected = model(*BATCH)
    for image_stage in range(IMAGE_LAYERS + 2):
        for text_stage in range(TEXT_LAYERS + 2):
            found = model(
                models.run_image(model.clip.visual, pictures, 0, image_stage),
                models.run_text(model.clip.text, tokens, tokens, 0, text_stage),
                prompt_of,
                image_stage=image_stage,
                text_stage=text_stage,
                tokens_PN=tokens if 0 < text_stage <= TEXT_LAYERS else None,
            )
            for name in ("q", "c"):
                torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("kind", ["image", "image, attention pooling", "text"])
def test_what_leaves_a_stage_depends_on_every_weight_of_the_stages_before_and_on_no_other(kind, lora):
    clip, tower, run, _ = tower_and_runs(kind)
    if lora:
        models.add_lora(clip, 2, num_layers=1)
        stir(clip)  # factors that are zero hide each other
    parameters = dict(tower.named_parameters())
    for stage in range(1, models.num_stages(tower) + 1):
        names = set(models.stage_state(tower, stage)) & set(parameters)
        before = run(entry(kind), 0, stage)
        for name, parameter in parameters.items():
            kept = parameter.clone()
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
            assert torch.equal(run(entry(kind), 0, stage), before) == (name not in names), (stage, name)
            parameter.copy_(kept)
    assert names == set(parameters)


def stages_of(clip: open_clip.CustomTextCLIP) -> tuple[int, int]:
    return models.frozen_stages(clip.visual), models.frozen_stages(clip.text)


def test_full_fine_tuning_leaves_no_stage_frozen_and_a_frozen_clip_all():
    clip = build_clip()
    models.freeze_backbone(clip)
    assert stages_of(clip) == (0, 0)
    models.freeze_backbone(clip, everything=True)
    assert stages_of(clip) == (IMAGE_LAYERS + 1, TEXT_LAYERS + 1)


@pytest.mark.parametrize("num_layers", range(IMAGE_LAYERS + 1))
def test_partial_freezing_leaves_as_many_stages_frozen_as_blocks(num_layers):
    clip = build_clip()
    models.freeze_backbone(clip, num_layers=num_layers)
    assert stages_of(clip) == (num_layers, min(num_layers, TEXT_LAYERS))


@pytest.mark.parametrize("num_layers", [None, *range(IMAGE_LAYERS + 1)])
def test_lora_leaves_the_stages_before_its_first_block_frozen_and_a_tower_without_any_as_a_whole(num_layers):
    clip = lora_model(num_layers).clip
    untouched = num_layers or 0
    expected = [untouched if untouched < depth else depth + 1 for depth in (IMAGE_LAYERS, TEXT_LAYERS)]
    assert stages_of(clip) == tuple(expected)


def test_random_patches_leave_no_stage_frozen_unless_all_are():
    clip = build_clip({"patch_dropout": 0.5})
    models.freeze_backbone(clip, num_layers=2)
    assert stages_of(clip) == (0, 2)
    models.freeze_backbone(clip, everything=True)
    assert stages_of(clip) == (IMAGE_LAYERS + 1, TEXT_LAYERS + 1)


def bert_clip(folder: Path) -> open_clip.CustomTextCLIP:
    """A CLIP whose text tower is one of Hugging Face's."""
    import transformers  # takes seconds

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    transformers.BertConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=CONTEXT).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_proj_type": "linear", "hf_model_pretrained": False}
    return build_clip(text=text)


@pytest.mark.parametrize("kind", ["timm", "resnet", "hugging face"])
def test_towers_of_other_kinds_are_one_stage(kind, tmp_path):
    clip = {"timm": timm_clip, "resnet": resnet_clip, "hugging face": lambda: bert_clip(tmp_path)}[kind]().eval()
    tower = clip.text if kind == "hugging face" else clip.visual
    assert models.num_stages(tower) == 1
    models.freeze_backbone(clip)
    assert models.frozen_stages(tower) == 0
    next(tower.parameters()).requires_grad_(False)
    assert models.frozen_stages(tower) == 0
    tower.requires_grad_(False)
    assert models.frozen_stages(tower) == 1
    assert set(models.stage_state(tower, 1)) == set(tower.state_dict()) and not models.stage_state(tower, 0)
    model = build_model(clip).eval()
    if kind == "hugging face":
        tokens = prompts(3, 5)
        found, expected = model.encode_text(tokens), clip.encode_text(tokens, normalize=True)
        again = model.encode_text(found, 1)
    else:
        found, expected = model.encode_image(images(2, 64)), clip.encode_image(images(2, 64), normalize=True)
        again = model.encode_image(found, 1)
    torch.testing.assert_close(found, expected)
    assert torch.equal(again, found)
    assert not found.requires_grad


FREEZINGS = {
    "full": {},
    "heads only": {"everything": True},
    "no block": {"num_layers": 0},
    "two blocks": {"num_layers": 2},
    "three blocks": {"num_layers": 3},
    "LoRA": {"lora": None},
    "LoRA behind two blocks": {"lora": 2},
}


def frozen_model(freezing: str, clip: open_clip.CustomTextCLIP | None = None) -> models.ScoreModel:
    how = FREEZINGS[freezing]
    model = build_model(clip)
    if "lora" in how:
        models.add_lora(model.clip, 2, num_layers=how["lora"])
    else:
        models.freeze_backbone(model.clip, **how)
    stir(model.heads)
    return model


def gradients(model: models.ScoreModel, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    ((scores["q"] - 1) ** 2 + (scores["c"] - 1) ** 2).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> None:
    assert {name for name, value in found.items() if value is None} == {n for n, v in expected.items() if v is None}
    for name, value in expected.items():
        if value is not None:
            torch.testing.assert_close(
                found[name], value, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("freezing", FREEZINGS)
def test_training_changes_what_leaves_a_trained_stage_and_nothing_before(freezing):
    model = frozen_model(freezing)
    visual, text = model.clip.visual, model.clip.text

    @torch.no_grad()
    def leaving() -> list[list[torch.Tensor]]:
        model.eval()
        return [
            [models.run_image(visual, BATCH[0], 0, stage) for stage in range(models.num_stages(visual) + 1)],
            [models.run_text(text, BATCH[1], BATCH[1], 0, stage) for stage in range(models.num_stages(text) + 1)],
        ]

    before = leaving()
    train_steps(model, 2)
    for tower, old, new in zip((visual, text), before, leaving(), strict=True):
        moved = [not torch.equal(one, other) for one, other in zip(old, new, strict=True)]
        frozen = models.frozen_stages(tower)
        assert moved == [False] * (frozen + 1) + [True] * (models.num_stages(tower) - frozen)


@pytest.mark.parametrize("freezing", FREEZINGS)
def test_frozen_stages_keep_no_activations_and_the_rest_gets_the_gradients_of_a_plain_pass(freezing):
    model = frozen_model(freezing).train()
    entered, left = {}, {}
    for tower in (model.clip.visual, model.clip.text):
        for number, block in enumerate(tower.transformer.resblocks):
            key = (tower, number)  # the last block is run in pieces: its first and last piece tell of it
            block.ln_1.register_forward_pre_hook(lambda _, x, key=key: entered.update({key: x[0].grad_fn is not None}))
            block.ls_2.register_forward_hook(lambda _, x, y, key=key: left.update({key: y.grad_fn is not None}))
    found = gradients(model, model(*BATCH))
    assert len(entered) == len(left) == sum(len(t.transformer.resblocks) for t in (model.clip.visual, model.clip.text))
    for tower, number in entered:
        frozen = models.frozen_stages(tower)
        assert entered[tower, number] == (number > frozen or freezing == "full")
        assert left[tower, number] == (number >= frozen)
    assert len(entered) == IMAGE_LAYERS + TEXT_LAYERS
    pictures, tokens, prompt_of = BATCH
    image_BE = model.clip.encode_image(pictures, normalize=True)
    text_BE = model.clip.encode_text(F.pad(tokens, (0, CONTEXT - tokens.shape[1])), normalize=True)
    expected = gradients(model, model.score(image_BE, text_BE[prompt_of]))
    assert_same_gradients(found, expected)
    assert {name for name, value in found.items() if value is not None} == trained_names(model)


@pytest.mark.parametrize("freezing", FREEZINGS)
def test_gradient_checkpointing_recomputes_trained_blocks_only_and_changes_no_gradient(freezing):
    model = frozen_model(freezing).train()
    calls: dict[nn.Module, int] = {}
    blocks = [*model.clip.visual.transformer.resblocks, *model.clip.text.transformer.resblocks]
    for block in blocks:
        block.ln_1.register_forward_pre_hook(lambda module, given: calls.update({module: calls.get(module, 0) + 1}))
    expected = gradients(model, model(*BATCH))
    assert list(calls.values()) == [1] * len(blocks)
    calls.clear()
    model.clip.set_grad_checkpointing(True)
    assert_same_gradients(gradients(model, model(*BATCH)), expected)
    frozen = [models.frozen_stages(tower) for tower in (model.clip.visual, model.clip.text)]
    passes = [
        2 if number >= first_trained else 1
        for depth, first_trained in zip((IMAGE_LAYERS, TEXT_LAYERS), frozen, strict=True)
        for number in range(depth)
    ]
    assert [calls[block.ln_1] for block in blocks] == passes
    calls.clear()
    with torch.no_grad():
        model(*BATCH)
    assert list(calls.values()) == [1] * len(blocks)


@pytest.fixture
def dynamo() -> Any:
    """The statistics of a compiler that knows nothing yet and would rather fail than give up on a block."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def compiled_twin(model: models.ScoreModel) -> models.ScoreModel:
    twin = copy.deepcopy(model)
    models.compile_blocks(twin.clip)
    blocks = [*twin.clip.visual.transformer.resblocks, *twin.clip.text.transformer.resblocks]
    assert all(block._compiled_call_impl is not None for block in blocks)
    return twin


OTHER_BATCH = (images(3), prompts(1, 8, 4)[:, :9], torch.tensor([0, 2, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("freezing", ["full", "two blocks"])
def test_compiled_blocks_learn_the_same_under_the_same_names(freezing, monkeypatch, dynamo):
    """Traced as for the compiler, which would take a minute, but run step by step."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, **how, backend="aot_eager"))
    model = frozen_model(freezing).train()
    twin, before = compiled_twin(model), dynamo["unique_graphs"]
    assert list(twin.state_dict()) == list(model.state_dict())
    for batch in (BATCH, OTHER_BATCH):
        expected, found = model(*batch), twin(*batch)
        for name in ("q", "c"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
        assert_same_gradients(gradients(twin, found), gradients(model, expected))
    assert dynamo["unique_graphs"] > before


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("gcc", "cc", "clang", "g++", "c++"))), reason="there is no C compiler")
def test_compiled_blocks_score_the_same(dynamo):
    model = frozen_model("full").eval()
    twin = compiled_twin(model)
    before = dynamo["unique_graphs"]
    expected, found = model(*BATCH), twin(*BATCH)
    for name in ("q", "c"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
    assert dynamo["unique_graphs"] == before + 2  # one for each tower, whose blocks share it


# ------------------------------------------------------------------------------------------------ freezing


def names_below(clip: open_clip.CustomTextCLIP, *prefixes: str) -> set[str]:
    """Names of the parameters below some parts; each part must exist."""
    names = {name for name, _ in clip.named_parameters()}
    found = [{name for name in names if name == prefix or name.startswith(prefix + ".")} for prefix in prefixes]
    assert all(found), prefixes
    return set().union(*found)


EMBEDDINGS = (
    "visual.conv1",
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.ln_pre",
    "text.token_embedding",
    "text.positional_embedding",
)
ENDS = ("visual.ln_post", "visual.proj", "text.ln_final", "text.text_projection")


def test_by_default_all_of_clip_but_the_temperature_is_trained():
    clip = build_clip()
    models.freeze_backbone(clip, everything=True)
    models.freeze_backbone(clip)  # it also thaws
    assert trained_names(clip) == {name for name, _ in clip.named_parameters()} - {"logit_scale"}


def test_a_bias_of_the_temperature_is_never_trained():
    clip = build_clip()
    clip.logit_bias = nn.Parameter(torch.zeros(()))
    models.freeze_backbone(clip)
    assert not {"logit_scale", "logit_bias"} & trained_names(clip)


def test_a_frozen_clip_trains_only_the_heads():
    model = build_model()
    models.freeze_backbone(model.clip, everything=True)
    assert trained_names(model) == {name for name, _ in model.named_parameters() if name.startswith("heads.")}


@pytest.mark.parametrize("num_layers", range(IMAGE_LAYERS + 1))
def test_partial_freezing_freezes_embeddings_and_the_first_blocks_of_both_towers(num_layers):
    """The text tower has fewer blocks than the image tower: from its depth on all of them are frozen."""
    clip = build_clip()
    models.freeze_backbone(clip, num_layers=num_layers)
    blocks = [
        f"{tower}.transformer.resblocks.{index}"
        for tower, depth in (("visual", IMAGE_LAYERS), ("text", TEXT_LAYERS))
        for index in range(num_layers, depth)
    ]
    assert trained_names(clip) == names_below(clip, *ENDS, *blocks)


def test_every_parameter_is_an_embedding_a_block_an_end_or_the_temperature():
    clip = build_clip()
    blocks = ("visual.transformer.resblocks", "text.transformer.resblocks")
    assert names_below(clip, *EMBEDDINGS, *ENDS, *blocks, "logit_scale") == {n for n, _ in clip.named_parameters()}


def test_more_frozen_layers_than_the_image_tower_has_is_an_error_that_names_its_depth():
    with pytest.raises(ValueError, match=rf"--freeze_layers {IMAGE_LAYERS + 1}: .*\b{IMAGE_LAYERS} blocks") as error:
        models.freeze_backbone(build_clip(), num_layers=IMAGE_LAYERS + 1)
    assert_one_line(error)


@pytest.mark.parametrize(
    ("build", "name"), [(resnet_clip, "ModifiedResNet"), (timm_clip, "TimmModel")], ids=["resnet", "timm"]
)
def test_towers_without_plain_blocks_refuse_partial_freezing_and_lora(build, name):
    clip = build()
    for attempt in (lambda: models.freeze_backbone(clip, num_layers=1), lambda: models.add_lora(clip, 2, num_layers=0)):
        with pytest.raises(ValueError, match=rf"image tower.*{name}") as error:
            attempt()
        assert_one_line(error)
    models.freeze_backbone(clip, everything=True)
    assert not trained_names(clip)


@pytest.mark.parametrize("freezing", [{"everything": True}, {"num_layers": 0}, {"num_layers": 2}, {"num_layers": 3}])
def test_frozen_parameters_get_no_gradient_no_state_and_stay_bit_identical(freezing):
    model = build_model()
    models.freeze_backbone(model.clip, **freezing)
    before, trained = snapshot(model), trained_names(model)
    optimizer = train_steps(model)
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter in optimizer.state, name
            assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter not in optimizer.state, name
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name


def test_training_mode_leaves_frozen_batch_statistics_alone():
    model = build_model(resnet_clip())
    models.freeze_backbone(model.clip, everything=True)
    before = snapshot(model.clip)
    train_steps(model, size=64)
    assert all(torch.equal(value, before[name]) for name, value in model.clip.state_dict().items())
    models.freeze_backbone(model.clip)
    train_steps(model, num_steps=1, size=64)
    moved = [name for name, value in model.clip.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("running_mean") for name in moved)


def test_frozen_towers_drop_no_patches_and_trained_ones_do():
    model = build_model(build_clip({"patch_dropout": 0.5}))
    models.freeze_backbone(model.clip, everything=True)
    pictures = images(4)
    expected = model.eval().encode_image(pictures)
    model.train()
    torch.testing.assert_close(model.encode_image(pictures), expected)
    models.freeze_backbone(model.clip)
    model.train()
    assert not torch.allclose(model.encode_image(pictures), expected, atol=1e-3)
    torch.testing.assert_close(model.eval().encode_image(pictures), expected)


def test_training_mode_reaches_all_that_is_trained_and_nothing_wholly_frozen():
    model = build_model()
    models.freeze_backbone(model.clip, num_layers=1)
    assert model.train() is model
    first, *others = model.clip.visual.transformer.resblocks
    assert not any(module.training for module in [*first.modules(), model.clip.text.token_embedding])
    assert all(module.training for block in others for module in block.modules())
    assert all(module.training for module in model.heads.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


# ---------------------------------------------------------------------------------------------------- LoRA


def lora_model(num_layers: int | None = None, **changes: Any) -> models.ScoreModel:
    model = build_model(**changes)
    models.add_lora(model.clip, 2, num_layers=num_layers)
    return model


@torch.no_grad()
def scores_of(model: models.ScoreModel) -> torch.Tensor:
    scores = model.eval()(*BATCH)
    return torch.stack([scores["q"], scores["c"]])


def test_lora_starts_as_the_base_model_bit_for_bit():
    """Its weights do; scores differ in the last bit where memory lies otherwise, because BLAS then adds otherwise."""
    lora, base = lora_model(), build_model()
    weights, expected = models.merged_state(lora), base.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    torch.testing.assert_close(scores_of(lora), scores_of(base), atol=1e-6, rtol=0)


def test_lora_adds_twice_the_product_of_its_factors():
    model = lora_model()
    stir(model.clip)
    linear = model.clip.visual.transformer.resblocks[0].mlp.c_fc
    factors = linear.parametrizations.weight
    expected = factors.original + 2 * factors[0].b @ factors[0].a
    torch.testing.assert_close(linear.weight, expected)
    assert factors[0].a.shape == (2, 32) and factors[0].b.shape == (128, 2)


def test_with_lora_only_its_factors_and_the_heads_are_trained():
    model = lora_model()
    trained = trained_names(model)
    factors = {name for name in trained if not name.startswith("heads.")}
    assert all(name.endswith((".0.a", ".0.b")) and ".parametrizations." in name for name in factors)
    assert len(factors) == 2 * 4 * (IMAGE_LAYERS + TEXT_LAYERS)
    assert trained - factors == {name for name, _ in model.named_parameters() if name.startswith("heads.")}
    before = snapshot(model)
    train_steps(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained


def test_lora_leaves_the_first_blocks_as_they_are():
    model = lora_model(num_layers=TEXT_LAYERS)
    blocks = {name.partition(".attn.")[0].partition(".mlp.")[0] for name in trained_names(model.clip)}
    assert blocks == {f"visual.transformer.resblocks.{index}" for index in range(TEXT_LAYERS, IMAGE_LAYERS)}
    with pytest.raises(ValueError, match=f"{IMAGE_LAYERS} blocks") as error:
        lora_model(num_layers=IMAGE_LAYERS + 1)
    assert_one_line(error)


def test_merged_state_fits_a_plain_model_and_leaves_its_own_as_it_was():
    model = lora_model()
    train_steps(model)
    expected, before = scores_of(model), snapshot(model)
    assert not torch.allclose(expected, scores_of(build_model()), atol=1e-3)
    state = models.merged_state(model)
    plain = build_model()
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(scores_of(plain), expected, atol=1e-6, rtol=0)
    assert not any(value.requires_grad for value in state.values())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_merged_state_of_a_plain_model_is_its_state():
    model = build_model()
    state, own = models.merged_state(model), model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)


def test_merging_gives_a_plain_model_with_the_same_scores():
    model = lora_model()
    train_steps(model)
    expected = scores_of(model)
    assert models.merge_lora(model) is model
    torch.testing.assert_close(scores_of(model), expected, atol=1e-6, rtol=0)
    assert model.state_dict().keys() == build_model().state_dict().keys()


def test_a_deep_copy_with_lora_scores_the_same_and_then_goes_its_own_way():
    model = lora_model()
    train_steps(model, 1)
    twin = copy.deepcopy(model)
    expected = scores_of(model)
    assert torch.equal(scores_of(twin), expected)
    train_steps(model, 1)
    assert torch.equal(scores_of(twin), expected)
    assert not torch.equal(scores_of(model), expected)
    torch.testing.assert_close(scores_of(models.merge_lora(twin)), expected, atol=1e-6, rtol=0)


# -------------------------------------------------------------------------- learning rates and parameter counts


def test_layer_decay_shrinks_the_learning_rate_once_per_block_from_the_top():
    model, decay = build_model(), 0.5
    scales = models.lr_scales(model, decay)
    for tower, depth in (("visual", IMAGE_LAYERS), ("text", TEXT_LAYERS)):
        for index in range(depth):
            names = [name for name in scales if name.startswith(f"clip.{tower}.transformer.resblocks.{index}.")]
            assert len(names) == 12
            assert {scales[name] for name in names} == {decay ** (depth - index)}
    of_part = {part: {scales[f"clip.{n}"] for n in names_below(model.clip, part)} for part in (*ENDS, *EMBEDDINGS)}
    assert {part for part, found in of_part.items() if found == {1.0}} == set(ENDS)
    for part in EMBEDDINGS:
        depth = IMAGE_LAYERS if part.startswith("visual") else TEXT_LAYERS
        assert of_part[part] == {decay ** (depth + 1)}


def test_without_layer_decay_every_clip_parameter_has_the_full_learning_rate():
    model = build_model()
    scales = models.lr_scales(model, 1.0)
    assert set(scales.values()) == {1.0}
    towers = {name for name, _ in model.named_parameters() if name.startswith(("clip.visual.", "clip.text."))}
    assert set(scales) == towers


def test_lora_factors_follow_the_block_they_belong_to():
    scales = models.lr_scales(lora_model(), 0.5)
    for name in trained_names(lora_model()):
        if name.startswith("clip.visual."):
            assert scales[name] == 0.5 ** (IMAGE_LAYERS - int(name.split(".")[4]))


def test_layer_decay_knows_the_order_of_timm_towers():
    scales = models.lr_scales(build_model(timm_clip()), 0.5)
    patches = scales["clip.visual.trunk.patch_embed.proj.weight"]
    first, second = (scales[f"clip.visual.trunk.blocks.{index}.attn.qkv.weight"] for index in (0, 1))
    last = max(int(n.split(".")[4]) for n in scales if n.startswith("clip.visual.trunk.blocks."))
    assert patches < first < second
    assert scales[f"clip.visual.trunk.blocks.{last}.attn.qkv.weight"] == 0.5
    assert scales["clip.visual.head.proj.weight"] == 1.0
    assert scales["clip.visual.trunk.fc_norm.weight"] == 1.0


@pytest.mark.parametrize("arguments", [ARGUMENTS, REFINED, {**ARGUMENTS, "predict_rationale": True}, ALL_NEW])
@pytest.mark.parametrize("freezing", [{}, {"everything": True}, {"num_layers": 2}])
def test_parameter_counts_add_up_to_the_whole_model_but_the_temperature(arguments, freezing):
    model = build_model(**arguments)
    models.freeze_backbone(model.clip, **freezing)
    counts = models.count_parameters(model)
    assert set(counts) == {"image tower", "text tower", "heads"}
    sizes = {name: (p.numel(), p.requires_grad) for name, p in model.named_parameters() if name != "clip.logit_scale"}
    assert sum(trained for trained, _ in counts.values()) == sum(size for size, grad in sizes.values() if grad)
    assert sum(frozen for _, frozen in counts.values()) == sum(size for size, grad in sizes.values() if not grad)
    visual = sum(size for name, (size, _) in sizes.items() if name.startswith("clip.visual."))
    assert sum(counts["image tower"]) == visual


def test_an_mlp_maps_rows_to_one_number_through_its_hidden_width():
    head = models.mlp(5, 7, 0.0, zero_last=False)
    assert [tuple(p.shape) for p in head.parameters()] == [(7, 5), (7,), (1, 7), (1,)]
    x = torch.ones(2, 5)
    expected = head[3](F.gelu(head[0](x)))
    torch.testing.assert_close(head(x), expected)
    assert math.isclose(models.mlp(5, 7, 0.0, zero_last=True)(x).abs().sum().item(), 0.0)


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_the_last_block_is_computed_for_the_token_that_is_read_where_there_is_one(kind):
    _, tower, run, _ = tower_and_runs(kind)
    depth = models.num_stages(tower) - 1
    whole = tower.transformer.resblocks[-1]
    seen: list[tuple[int, ...]] = []
    hook = whole.mlp.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    left = run(entry(kind), 0, depth)
    hook.remove()
    assert (left.ndim == 2) == models.pools_one_token(tower) == (seen[0][1] == 1)


# -- memory


def bytes_kept(tower: nn.Module, num_images: int) -> int:
    """What autograd keeps of a forward pass for the backward pass, without the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*tower.parameters(), *tower.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tower(torch.randn(num_images, 3, *tower.image_size))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("name", "quick_gelu"), [("tiny", False), ("small", False), ("small", True)])
@pytest.mark.parametrize("num_trained", [0, 1, 3, None])
def test_the_memory_of_an_image_is_about_what_autograd_keeps(name, quick_gelu, num_trained):
    if name == "tiny":
        config = json.loads((ROOT / "assets" / "tiny-clip" / "open_clip_config.json").read_text())["model_cfg"]
    else:
        vision = {"layers": 6, "width": 128, "head_width": 32, "patch_size": 16, "image_size": 96}
        config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": {"layers": 1, "width": 32, "heads": 2}}
    tower = open_clip.CLIP(**{**config, "quick_gelu": quick_gelu}).visual.train()
    blocks = tower.transformer.resblocks
    if num_trained is not None:
        tower.requires_grad_(False)
        for block in blocks[len(blocks) - num_trained :]:
            block.requires_grad_(True)
    expected = models.activation_bytes(tower, torch.float32)
    kept = (bytes_kept(tower, 6) - bytes_kept(tower, 2)) / 4
    if num_trained == 0:
        assert kept == expected == 0
    else:
        assert expected / 1.2 < kept < expected * 1.2
    assert models.activation_bytes(tower, torch.bfloat16) == expected / 2


def test_the_memory_of_a_tower_without_such_blocks_is_unknown():
    assert models.activation_bytes(nn.Linear(3, 4), torch.float32) == 0
