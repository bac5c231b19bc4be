"""Towers that are no plain transformers: entered between their stages, frozen and cached like blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import baseline
from backbones import freezing, towers
from finetune import initial_model
from guidance.arguments import parse_args

SIZE = 64
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
RESNET = {"image_size": SIZE, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None}
STAGES = {"modified-resnet": 4, "resnet10t": 4, "convnext_atto": 4, "tf_efficientnet_lite0": 7}


def description(name: str) -> dict[str, Any]:
    """A CLIP with this image tower, in open_clip's form."""
    timm = {"image_size": SIZE, "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "avg"}
    vision = RESNET if name == "modified-resnet" else {**timm, "timm_proj": "linear"}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}


def clip_of(name: str) -> open_clip.CustomTextCLIP:
    """It, with moving statistics that normalise something."""
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(**description(name))
    for module in clip.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return clip


@pytest.mark.parametrize("name", STAGES)
def test_left_and_entered_between_any_two_stages_it_is_the_plain_tower(name):
    visual = clip_of(name).visual.eval()
    pixels = torch.randn(2, 3, SIZE, SIZE)
    num_stages = towers.num_stages(visual)
    assert num_stages == STAGES[name] + 1 == towers.depth_of(visual) + 1
    with torch.no_grad():
        plain = F.normalize(visual(pixels), dim=-1)
        for place in range(num_stages + 1):
            middle = towers.run_image(visual, pixels, 0, place)
            torch.testing.assert_close(towers.run_image(visual, middle, place, num_stages), plain, rtol=0, atol=1e-6)


def hooked(visual: Any, pixels: torch.Tensor) -> np.ndarray:
    """Mean and deviation over space of what leaves each stage in a plain pass."""
    parts = visual if hasattr(visual, "attnpool") else visual.trunk
    stages = getattr(parts, "stages", None) or getattr(parts, "blocks", None)
    seen: list[np.ndarray] = []
    hooks = [
        stage.register_forward_hook(lambda _, x, y: seen.append(y.double().numpy()))
        for stage in stages or (parts.layer1, parts.layer2, parts.layer3, parts.layer4)
    ]
    visual(pixels)
    for hook in hooks:
        hook.remove()
    return np.concatenate([part for x in seen for part in (x.mean(axis=(2, 3)), x.std(axis=(2, 3)))], axis=1)


@torch.no_grad()
@pytest.mark.parametrize("name", STAGES)
def test_statistics_are_those_of_every_stage_wherever_it_is_left_and_entered_again(name):
    visual = clip_of(name).visual.eval()
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    num_stages = towers.num_stages(visual)
    whole, expected = towers.run_observed(visual, pixels, 0, num_stages)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(whole, towers.run_image(visual, pixels, 0, num_stages))
    by_hand = hooked(visual, pixels)
    np.testing.assert_allclose(expected.numpy(), by_hand, rtol=1e-3, atol=1e-4 + 1e-6 * np.abs(by_hand).max())
    assert towers.observed_blocks(visual) == list(range(STAGES[name]))
    assert towers.num_statistics(visual) == expected.shape[1]
    for place in range(num_stages + 1):
        middle, early = towers.run_observed(visual, pixels, 0, place)
        image, late = towers.run_observed(visual, middle, place, num_stages)
        torch.testing.assert_close(image, whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.cat([early, late], dim=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_training", [False, True])
def test_counting_statistics_changes_nothing(is_training):
    visual = clip_of("resnet10t").visual.train(is_training)
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    towers.num_statistics(visual)
    assert all(module.training == is_training for module in visual.modules())
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())


@pytest.mark.parametrize("name", STAGES)
def test_freezing_counts_stages_and_leaves_no_parameter_out(name):
    clip = clip_of(name)
    for num_layers in range(STAGES[name] + 1):
        freezing.freeze_backbone(clip, num_layers=num_layers)
        assert towers.frozen_stages(clip.visual) == num_layers
        blocks = {parameter: towers.block_of(key) for key, parameter in clip.visual.named_parameters()}
        assert {place for place in blocks.values() if place is not None} == {*range(-1, STAGES[name])}
        for parameter, place in blocks.items():
            assert parameter.requires_grad == (place is None or place >= num_layers)
    with pytest.raises(ValueError, match=f"this image tower has {STAGES[name]} blocks"):
        freezing.freeze_backbone(clip, num_layers=STAGES[name] + 1)


def test_each_stage_learns_at_its_share_of_the_rate():
    clip = clip_of("tf_efficientnet_lite0")
    model = nn.Module()
    model.clip = clip
    scales = freezing.lr_scales(model, 0.5)
    depth = STAGES["tf_efficientnet_lite0"]
    assert scales["clip.visual.trunk.conv_head.weight"] == scales["clip.visual.head.proj.weight"] == 1
    assert scales["clip.visual.trunk.blocks.6.0.conv_pw.weight"] == 0.5
    assert scales["clip.visual.trunk.blocks.0.0.conv_dw.weight"] == 0.5**depth
    assert scales["clip.visual.trunk.conv_stem.weight"] == 0.5 ** (depth + 1)


@pytest.mark.parametrize("name", ["resnet10t", "modified-resnet"])
def test_recomputing_activations_gives_the_same_gradients(name):
    visual = clip_of(name).visual.eval()
    pixels = torch.randn(2, 3, SIZE, SIZE)
    grads = []
    for recomputes in (False, True):
        visual.zero_grad()
        getattr(visual, "trunk", visual).grad_checkpointing = recomputes
        towers.run_image(visual, pixels, 0, towers.num_stages(visual))[:, 0].sum().backward()
        grads.append([parameter.grad.clone() for parameter in visual.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a timm tower in open_clip's form, random weights."""
    place = tmp_path_factory.mktemp("clip")
    norm = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": description("resnet10t"), "preprocess_cfg": norm}
    (place / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip_of("resnet10t").state_dict(), place / "open_clip_model.safetensors")
    return place


def flags(folder: Path, demo_set: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    data = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1]), "--image_size", str(SIZE)]
    run = ["--clip_model", f"local-dir:{folder}", "--epochs", "2", "--batch_size", "16", "--lr", "1e-3"]
    return [*data, *run, "--cache_dir", str(out / "cache"), "--output_dir", str(out / "run"), "--no_report", *more]


@pytest.mark.slow
def test_a_run_on_cached_stages_is_the_run_without_a_cache(folder, demo_set, tmp_path):
    """Whose frozen stages keep their moving statistics too; and thawing step by step works."""
    plan = ["--unfreeze_schedule", "3@0,2@1", "--cache_views", "2", "--cache_dtype", "float32"]
    results = {
        name: baseline.main(flags(folder, demo_set, tmp_path / name, *plan, *more))
        for name, more in {"cached": (), "live": ("--no_cache",)}.items()
    }
    assert results["cached"]["test"] == pytest.approx(results["live"]["test"], abs=1e-5)
    tables = [pd.read_csv(tmp_path / name / "run" / "predictions.csv") for name in results]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-4)


def test_presets_and_advice_know_its_depth(folder):
    config = parse_args(["--clip_model", f"local-dir:{folder}", "--image_size", str(SIZE)])
    assert initial_model.num_blocks(config) == 4
    assert initial_model.num_blocks(parse_args(["--clip_model", "RN50", "--clip_pretrained", "none"])) == 4
    chosen = parse_args(
        ["--clip_model", f"local-dir:{folder}", "--image_size", str(SIZE), "--preset", "medium"],
        num_blocks=initial_model.num_blocks,
    )
    assert chosen.freeze_layers == 3


def test_a_text_tower_of_hugging_face_freezes_by_its_layers(tmp_path):
    import transformers  # takes seconds

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    transformers.BertConfig(**sizes, vocab_size=100, max_position_embeddings=32).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_proj_type": "linear", "hf_model_pretrained": False}
    clip = open_clip.CustomTextCLIP(**{**description("modified-resnet"), "text_cfg": text})
    freezing.freeze_backbone(clip, num_layers=2)
    trained = {name for name, parameter in clip.text.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("transformer.encoder.layer.2.", "proj")) for name in trained)
