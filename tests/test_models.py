"""`models`: the score's formula by hand, heads of every kind, several views, tasks, and entering at any stage."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from small_models import (
    ARGUMENTS,
    BATCH,
    EMBED_DIM,
    IMAGE_LAYERS,
    TEXT_LAYERS,
    build_clip,
    build_model,
    images,
    prompts,
    resnet_clip,
    snapshot,
    stir,
    train_steps,
    trained_names,
)
from torch import nn

import models
from backbones.freezing import freeze_backbone
from backbones.towers import num_statistics, run_image, run_observed, run_text
from evaluation.ridge import Kernel, KernelFit

SCALE_Q, SCALE_C = 0.2, 0.3
HEADS = {"scale_q": SCALE_Q, "scale_c": SCALE_C, "hidden_q": 8, "hidden_c": 8, "dropout": 0.0}
PLAIN = {**ARGUMENTS, "residual": False}
REFINED = {**PLAIN, "refinement": {"layers": 1, "heads": 2, "dim": 8}}
FURTHER = {**ARGUMENTS, "extra": ["authenticity", "beauty"]}
LEVELS = {**ARGUMENTS, "prompt_levels": True}
NUM_STATISTICS = 2 * 32 * 2  # of the image tower of `build_clip`: width 32, two blocks observed
PROBE = {**ARGUMENTS, "base": "probe"}
STAGED = {**PROBE, "stage_width": NUM_STATISTICS}
KERNEL = {**STAGED, "base": "kernel", "kernel_images": 7}
ALL_NEW = {
    **FURTHER,
    "prompt_levels": True,
    "global_view": True,
    "task_gradients": "stop_q",
    "stage_width": NUM_STATISTICS,
}


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


# -- residual heads


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


# -- stage statistics, and a base that knows what a probe knows


STAGES = 5
KINDS_OF_BASES = {"probe": (0, "probe"), "cosine": (STAGES, "cosine"), "both": (STAGES, "probe")}


def heads_of(stage_width: int, base: str) -> models.ResidualHeads:
    torch.manual_seed(0)
    return models.ResidualHeads(EMBED_DIM, **HEADS, stage_width=stage_width, base=base)


def features_of(image: torch.Tensor, text: torch.Tensor, base: str) -> np.ndarray:
    """What the base term of consistency reads, image by image."""
    rows = []
    for values, words in zip(image.double().numpy(), text.double().numpy(), strict=True):
        embedding, stages = values[:EMBED_DIM], values[EMBED_DIM:]
        rows.append([(embedding @ words + 1) / 2])
        if base == "probe":
            rows[-1] += [*embedding, *words, *(embedding * words), *stages]
    return np.array(rows)


@pytest.mark.parametrize(("stage_width", "base"), KINDS_OF_BASES.values(), ids=KINDS_OF_BASES)
def test_a_fitted_base_scores_as_the_probe_that_it_is_fitted_as(stage_width, base):
    heads, rng = heads_of(stage_width, base), np.random.default_rng(0)
    stages = torch.from_numpy(rng.normal(size=(9, stage_width))).float()
    image, text = torch.cat([unit(9, 0), stages], dim=1), unit(9, 1)
    features = features_of(image, text, base)
    of_q, of_c = rng.normal(size=EMBED_DIM + stage_width), rng.normal(size=features.shape[1])
    heads.set_base((of_q, 0.3), (of_c, -0.4))
    q = 1 / (1 + np.exp(-(image.double().numpy() @ of_q + 0.3)))
    np.testing.assert_allclose(heads.quality(image).detach(), q, atol=1e-5)
    np.testing.assert_allclose(heads.consistency(image, text).detach(), features @ of_c - 0.4, atol=1e-5)


def kernel_model(**changes: Any) -> tuple[models.ScoreModel, Any, dict[str, Any]]:
    """A model whose kernel is of five images, the kernel, and the fits of q and c."""
    model, rng = build_model(**KERNEL | changes), np.random.default_rng(0)
    kernel = Kernel(rng.normal(size=(5, NUM_STATISTICS)), 0.01)
    fits = {task: KernelFit(rng.normal(size=5), np.array([0.7] * (task == "c")), 0.3, 1.0, 0.1) for task in ("q", "c")}
    model.heads.set_base(None, (fits["c"].slopes, fits["c"].bias))
    model.heads.base_kernel.set(
        kernel.places, kernel.gamma, {task: (fit.weights, fit.bias) for task, fit in fits.items()}
    )
    return model.eval(), kernel, fits


@pytest.mark.parametrize(("num_views", "global_view"), [(1, False), (3, False), (3, True)])
def test_a_kernel_scores_as_it_was_fitted(num_views, global_view):
    model, kernel, fits = kernel_model(global_view=global_view)
    batch = batch_of(KERNEL, 4, num_views)
    with torch.no_grad():
        found = model(**batch)
        known = {name: value.double().numpy() for name, value in models.embed_batch(model, models_batch(batch)).items()}
    alike = kernel(known["image"][:, EMBED_DIM:])
    np.testing.assert_allclose(found["q"], fits["q"](alike, np.empty((4, 0))), atol=1e-5)
    np.testing.assert_allclose(found["c"], fits["c"](alike, (known["cos"][:, None] + 1) / 2), atol=1e-5)


def models_batch(inputs: dict[str, Any]) -> Any:
    return SimpleNamespace(inputs=inputs)


def test_a_kernel_is_kept_in_a_checkpoint_and_never_trained():
    model, *_ = kernel_model()
    again = build_model(**KERNEL)
    again.load_state_dict(model.state_dict())
    batch = batch_of(KERNEL)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch), model(**batch))
    assert not any(parameter.requires_grad for parameter in model.heads.base_kernel.parameters())
    assert not list(model.heads.base_kernel.buffers())  # several processes would send each other those
    stir(model.heads.delta_q)
    assert (model(**batch)["q"] - again(**batch)["q"]).abs().max() <= SCALE_Q


def test_fitting_a_kernel_anew_leaves_nothing_of_the_one_before():
    model, kernel, fits = kernel_model()
    base = model.heads.base_kernel
    base.set(kernel.places[:2], 0.5, {"q": (fits["q"].weights[:2], 0.1)})
    assert torch.count_nonzero(base.places[2:]) == torch.count_nonzero(base.weights[:, 2:]) == 0
    assert torch.count_nonzero(base.weights[1]) == 0 and (base.gamma, base.bias_q) == (0.5, pytest.approx(0.1))


@pytest.mark.parametrize(("stage_width", "base"), KINDS_OF_BASES.values(), ids=KINDS_OF_BASES)
def test_the_cosine_alone_may_be_what_any_base_starts_from(stage_width, base):
    heads = heads_of(stage_width, base)
    image, text = torch.cat([unit(9, 0), torch.randn(9, stage_width)], dim=1), unit(9, 1)
    half = (F.cosine_similarity(image[:, :EMBED_DIM], text) + 1) / 2
    torch.testing.assert_close(heads.consistency(image, text), half)  # what it is before anything is fitted
    nn.init.ones_(heads.base_c.weight)
    heads.set_base(None, (1.7, -0.4))
    torch.testing.assert_close(heads.consistency(image, text), 1.7 * half - 0.4)
    assert heads.base_c.weight.requires_grad


@pytest.mark.parametrize("base", ["probe", "cosine"])
def test_learned_deltas_read_the_stages_too(base):
    heads = heads_of(STAGES, base)
    stir(heads)
    stages = torch.randn(7, STAGES, generator=torch.Generator().manual_seed(2))
    image, text = torch.cat([unit(7, 0), stages], dim=1), unit(7, 1)
    embedding, cos = image[:, :EMBED_DIM], (image[:, :EMBED_DIM] * text).sum(dim=1, keepdim=True)
    joint = torch.cat([embedding, text, cos, stages], dim=1)
    q = torch.sigmoid(heads.base_q(image)) + SCALE_Q * torch.tanh(heads.delta_q(image))
    known = torch.from_numpy(features_of(image, text, base)).float()
    c = heads.base_c(known) + SCALE_C * torch.tanh(heads.delta_c(joint))
    torch.testing.assert_close(heads.quality(image), q[:, 0])
    torch.testing.assert_close(heads.consistency(image, text), c[:, 0], atol=1e-5, rtol=1e-5)


def test_plain_heads_read_the_stages_too():
    heads = build_model(**{**STAGED, "residual": False}).heads
    stir(heads)
    stages = torch.randn(7, NUM_STATISTICS, generator=torch.Generator().manual_seed(2))
    image, text = torch.cat([unit(7, 0), stages], dim=1), unit(7, 1)
    cos = (image[:, :EMBED_DIM] * text).sum(dim=1, keepdim=True)
    joint = torch.cat([image[:, :EMBED_DIM], text, cos, stages], dim=1)
    torch.testing.assert_close(heads.quality(image), torch.sigmoid(heads.head_q(image))[:, 0])
    torch.testing.assert_close(heads.consistency(image, text), torch.sigmoid(heads.head_c(joint))[:, 0])


def staged_model(arguments: dict[str, Any] = STAGED, clip: Any = None) -> models.ScoreModel:
    """A model that reads stages, with a scaling that normalises something."""
    model = build_model(clip, **arguments).eval()
    stir(model.heads)
    stir(model.extra)
    rng = np.random.default_rng(0)
    model.set_stage_scaling(rng.normal(size=model.stage_width), rng.uniform(5, 20, model.stage_width))
    return model


@torch.no_grad()
def test_an_image_is_its_unit_embedding_and_its_normalised_statistics():
    model = staged_model()
    found = model.encode_image(images(3))
    assert found.shape == (3, EMBED_DIM + NUM_STATISTICS) and num_statistics(model.clip.visual) == NUM_STATISTICS
    embedding, raw = run_observed(model.clip.visual, images(3), 0, IMAGE_LAYERS + 1)
    torch.testing.assert_close(found[:, :EMBED_DIM], embedding)
    torch.testing.assert_close(found[:, EMBED_DIM:], (raw - model.stage_mean) / model.stage_scale)
    torch.testing.assert_close(build_model().encode_image(images(3)), embedding)


@torch.no_grad()
@pytest.mark.parametrize("arguments", [STAGED, ALL_NEW, {**STAGED, "residual": False}], ids=["probe", "all", "plain"])
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("stage", range(IMAGE_LAYERS + 2))
def test_a_batch_that_enters_at_a_stage_with_its_statistics_scores_as_its_pixels(stage, num_views, arguments):
    model = staged_model(arguments)
    batch = batch_of(arguments, num_views=num_views)
    pixels = batch["image"].flatten(0, 1) if num_views > 1 else batch["image"]
    entering, raw = run_observed(model.clip.visual, pixels, 0, stage)
    if num_views > 1:
        entering, raw = entering.unflatten(0, (3, num_views)), raw.unflatten(0, (3, num_views))
    given = {"image": entering, "image_stage": stage}
    if stage:
        given["statistics"] = raw
    found, expected = model(**{**batch, **given}), model(**batch)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-5, rtol=0)
    if stage > 1:
        others = model(**{**batch, **given, "statistics": raw + 1})
        assert not torch.allclose(others["q"], expected["q"], atol=1e-3)


def test_the_scaling_of_stages_is_saved_and_not_trained():
    model = staged_model()
    state = model.state_dict()
    again = build_model(**STAGED).eval()
    again.load_state_dict(state)
    for name in ("stage_mean", "stage_scale"):
        assert torch.equal(getattr(again, name), getattr(model, name)) and name in state
        assert name not in dict(model.named_parameters())
    batch = batch_of(STAGED)
    assert torch.equal(again(**batch)["q"], model(**batch)["q"])


def test_stages_that_are_trained_get_gradients_through_their_statistics():
    model = staged_model()
    freeze_backbone(model.clip, num_layers=1)
    blocks = model.clip.visual.transformer.resblocks
    model.encode_image(images(3))[:, EMBED_DIM:].sum().backward()
    grads = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in blocks]
    assert grads == [False, True, False]  # frozen; observed; behind the last that is observed


def test_an_older_description_builds_the_model_that_it_described():
    model = build_model(**ARGUMENTS)
    assert not models.OLDER.keys() & ARGUMENTS.keys()
    assert model.stage_width == 0 and models.OLDER == {"stage_width": 0, "base": "cosine", "kernel_images": 0}
    assert model.heads.base_c.weight.shape == (1, 1) and model.heads.base_q.weight.shape == (1, EMBED_DIM)
    assert not any(name.startswith("stage_") for name in model.state_dict())
    explicit = build_model(**ARGUMENTS, **models.OLDER)
    explicit.load_state_dict(model.state_dict())


# -- levels


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
    freeze_backbone(model.clip, everything=True)
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


# -- plain heads


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


# -- the whole model


@pytest.mark.parametrize(
    "arguments",
    [ARGUMENTS, PLAIN, REFINED, {**ARGUMENTS, "predict_rationale": True}, FURTHER, LEVELS, PROBE, STAGED, ALL_NEW],
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
@pytest.mark.parametrize("stage_width", [0, NUM_STATISTICS])
@pytest.mark.parametrize("global_view", [False, True])
def test_embed_batch_averages_over_views_and_tells_levels(global_view, stage_width):
    model = build_model(**LEVELS, global_view=global_view, stage_width=stage_width).eval()
    batch = batch_of(LEVELS, num_views=3)
    known = models.embed_batch(model, SimpleNamespace(inputs=batch))
    assert set(known) == {"image", "text", "cos", "level_q", "level_c"} | ({"content"} if global_view else set())
    views_BVX = model.encode_image(batch["image"].flatten(0, 1)).unflatten(0, (3, 3))
    text_PE = model.encode_text(batch["text"])
    temperature = model.heads.temperature.item()
    for row, (prompt, *levels) in enumerate(batch["prompt_of_B"].tolist()):
        views_VE = views_BVX[row, :, :EMBED_DIM]
        content_VE = views_VE[:1] if global_view else views_VE
        expected = {
            "image": views_BVX[row].mean(dim=0),
            **({"content": views_BVX[row, 0]} if global_view else {}),
            "text": text_PE[prompt],
            "cos": (content_VE @ text_PE[prompt]).mean(),
            "level_q": naive_level(views_VE, text_PE[[6, 5]], temperature).mean(),
            "level_c": naive_level(content_VE, text_PE[levels], temperature).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(known[name][row], value, atol=1e-5, rtol=0)


# -- several views, further scores, tasks


KINDS_OF_HEADS = {
    "residual": ARGUMENTS,
    "refined": REFINED,
    "further": {**FURTHER, "predict_rationale": True},
    "levels": LEVELS,
    "stages": STAGED,
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
    entering = run_image(model.clip.visual, batch["image"].flatten(0, 1), 0, stage).unflatten(0, (3, 2))
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
@pytest.mark.parametrize(
    "arguments",
    [ARGUMENTS, PLAIN, LEVELS, FURTHER, STAGED],
    ids=["residual", "plain", "levels", "extra", "stages"],
)
@pytest.mark.parametrize(("stopped", "other"), [("q", "c"), ("c", "q")])
def test_a_stopped_task_trains_its_head_but_not_clip(stopped, other, arguments, num_views):
    shared, model = (build_model(**arguments, task_gradients=how) for how in ("shared", f"stop_{stopped}"))
    for each in (shared, model):
        freeze_backbone(each.clip)
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


# -- stages


@torch.no_grad()
def test_a_model_scores_the_same_from_whatever_stage_it_is_entered_at():
    model = build_model().eval()
    stir(model.heads)
    pictures, tokens, prompt_of = BATCH
    expected = model(*BATCH)
    for image_stage in range(IMAGE_LAYERS + 2):
        for text_stage in range(TEXT_LAYERS + 2):
            found = model(
                run_image(model.clip.visual, pictures, 0, image_stage),
                run_text(model.clip.text, tokens, tokens, 0, text_stage),
                prompt_of,
                image_stage=image_stage,
                text_stage=text_stage,
                tokens_PN=tokens if 0 < text_stage <= TEXT_LAYERS else None,
            )
            for name in ("q", "c"):
                torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)


# -- freezing


@pytest.mark.parametrize("freezing", [{"everything": True}, {"num_layers": 0}, {"num_layers": 2}, {"num_layers": 3}])
def test_frozen_parameters_get_no_gradient_no_state_and_stay_bit_identical(freezing):
    model = build_model()
    freeze_backbone(model.clip, **freezing)
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


def test_training_mode_leaves_batch_statistics_alone_and_trains_scale_and_shift():
    model = build_model(resnet_clip())
    freeze_backbone(model.clip, everything=True)
    before = snapshot(model.clip)
    train_steps(model, size=64)
    assert all(torch.equal(value, before[name]) for name, value in model.clip.state_dict().items())
    freeze_backbone(model.clip)
    train_steps(model, num_steps=1, size=64)
    moved = {name for name, value in model.clip.state_dict().items() if not torch.equal(value, before[name])}
    assert "visual.bn1.weight" in moved and not any("running" in name or "num_batches" in name for name in moved)


def test_frozen_towers_drop_no_patches_and_trained_ones_do():
    model = build_model(build_clip({"patch_dropout": 0.5}))
    freeze_backbone(model.clip, everything=True)
    pictures = images(4)
    expected = model.eval().encode_image(pictures)
    model.train()
    torch.testing.assert_close(model.encode_image(pictures), expected)
    freeze_backbone(model.clip)
    model.train()
    assert not torch.allclose(model.encode_image(pictures), expected, atol=1e-3)
    torch.testing.assert_close(model.eval().encode_image(pictures), expected)


def test_training_mode_reaches_all_that_is_trained_and_nothing_wholly_frozen():
    model = build_model()
    freeze_backbone(model.clip, num_layers=1)
    assert model.train() is model
    first, *others = model.clip.visual.transformer.resblocks
    assert not any(module.training for module in [*first.modules(), model.clip.text.token_embedding])
    assert all(module.training for block in others for module in block.modules())
    assert all(module.training for module in model.heads.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


# -- learning rates and parameter counts


@pytest.mark.parametrize("arguments", [ARGUMENTS, REFINED, {**STAGED, "predict_rationale": True}, ALL_NEW])
@pytest.mark.parametrize("freezing", [{}, {"everything": True}, {"num_layers": 2}])
def test_parameter_counts_add_up_to_the_whole_model_but_the_temperature(arguments, freezing):
    model = build_model(**arguments)
    freeze_backbone(model.clip, **freezing)
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
