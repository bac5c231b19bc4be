"""`freezing`: what of CLIP is trained, LoRA merged and not, and learning rates by depth."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from small_models import (
    BATCH,
    IMAGE_LAYERS,
    TEXT_LAYERS,
    assert_one_line,
    build_clip,
    build_model,
    lora_model,
    resnet_clip,
    snapshot,
    stir,
    timm_clip,
    train_steps,
    trained_names,
)
from torch import nn

import models
from backbones.freezing import add_lora, freeze_backbone, lr_scales, merge_lora, merged_state

# -- freezing


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
    freeze_backbone(clip, everything=True)
    freeze_backbone(clip)  # it also thaws
    assert trained_names(clip) == {name for name, _ in clip.named_parameters()} - {"logit_scale"}


def test_a_bias_of_the_temperature_is_never_trained():
    clip = build_clip()
    clip.logit_bias = nn.Parameter(torch.zeros(()))
    freeze_backbone(clip)
    assert not {"logit_scale", "logit_bias"} & trained_names(clip)


def test_a_frozen_clip_trains_only_the_heads():
    model = build_model()
    freeze_backbone(model.clip, everything=True)
    assert trained_names(model) == {name for name, _ in model.named_parameters() if name.startswith("heads.")}


@pytest.mark.parametrize("num_layers", range(IMAGE_LAYERS + 1))
def test_partial_freezing_freezes_embeddings_and_the_first_blocks_of_both_towers(num_layers):
    """The text tower has fewer blocks than the image tower: from its depth on all of them are frozen."""
    clip = build_clip()
    freeze_backbone(clip, num_layers=num_layers)
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
        freeze_backbone(build_clip(), num_layers=IMAGE_LAYERS + 1)
    assert_one_line(error)


@pytest.mark.parametrize(
    ("build", "name"), [(resnet_clip, "ModifiedResNet"), (timm_clip, "TimmModel")], ids=["resnet", "timm"]
)
def test_towers_without_plain_blocks_refuse_lora(build, name):
    clip = build()
    with pytest.raises(ValueError, match=rf"--lora_rank: the image tower.*{name}") as error:
        add_lora(clip, 2, num_layers=0)
    assert_one_line(error)
    freeze_backbone(clip, everything=True)
    assert not trained_names(clip)


# -- LoRA


@torch.no_grad()
def scores_of(model: models.ScoreModel) -> torch.Tensor:
    scores = model.eval()(*BATCH)
    return torch.stack([scores["q"], scores["c"]])


def test_lora_starts_as_the_base_model_bit_for_bit():
    """Its weights do; scores differ in the last bit where memory lies otherwise, because BLAS then adds otherwise."""
    lora, base = lora_model(), build_model()
    weights, expected = merged_state(lora), base.state_dict()
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
    state = merged_state(model)
    plain = build_model()
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(scores_of(plain), expected, atol=1e-6, rtol=0)
    assert not any(value.requires_grad for value in state.values())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_merged_state_of_a_plain_model_is_its_state():
    model = build_model()
    state, own = merged_state(model), model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)


def test_merging_gives_a_plain_model_with_the_same_scores():
    model = lora_model()
    train_steps(model)
    expected = scores_of(model)
    assert merge_lora(model) is model
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
    torch.testing.assert_close(scores_of(merge_lora(twin)), expected, atol=1e-6, rtol=0)


# -- learning rates and parameter counts


def test_layer_decay_shrinks_the_learning_rate_once_per_block_from_the_top():
    model, decay = build_model(), 0.5
    scales = lr_scales(model, decay)
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
    scales = lr_scales(model, 1.0)
    assert set(scales.values()) == {1.0}
    towers = {name for name, _ in model.named_parameters() if name.startswith(("clip.visual.", "clip.text."))}
    assert set(scales) == towers


def test_lora_factors_follow_the_block_they_belong_to():
    scales = lr_scales(lora_model(), 0.5)
    for name in trained_names(lora_model()):
        if name.startswith("clip.visual."):
            assert scales[name] == 0.5 ** (IMAGE_LAYERS - int(name.split(".")[4]))


def test_layer_decay_knows_the_order_of_timm_towers():
    scales = lr_scales(build_model(timm_clip()), 0.5)
    patches = scales["clip.visual.trunk.patch_embed.proj.weight"]
    first, second = (scales[f"clip.visual.trunk.blocks.{index}.attn.qkv.weight"] for index in (0, 1))
    last = max(int(n.split(".")[4]) for n in scales if n.startswith("clip.visual.trunk.blocks."))
    assert patches < first < second
    assert scales[f"clip.visual.trunk.blocks.{last}.attn.qkv.weight"] == 0.5
    assert scales["clip.visual.head.proj.weight"] == 1.0
    assert scales["clip.visual.trunk.fc_norm.weight"] == 1.0
