"""`names`: what a name means, and which weights, activation and normalisation go with it."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
from small_clips import SMALL, refusal, write_open_clip_form

from backbones.names import resolve


@pytest.fixture
def open_clip_folder(tmp_path) -> Path:
    """`reference` in open_clip's form."""
    return write_open_clip_form(tmp_path / "open-clip")


# -- names


@pytest.mark.parametrize(
    ("name", "key", "image_size", "patch", "width", "layers"),
    [
        ("ViT-B/32", "ViT-B-32", 224, 32, 768, 12),
        ("ViT-B/16", "ViT-B-16", 224, 16, 768, 12),
        ("ViT-L/14", "ViT-L-14", 224, 14, 1024, 24),
        ("ViT-L/14@336", "ViT-L-14-336", 336, 14, 1024, 24),
    ],
)
def test_openai_and_open_clip_names_mean_the_same_architecture(name, key, image_size, patch, width, layers):
    found = resolve(name, "openai").config
    assert found == resolve(key, "openai").config
    vision = found["model_cfg"]["vision_cfg"]
    assert [vision[part] for part in ("image_size", "patch_size", "width", "layers")] == [
        image_size,
        patch,
        width,
        layers,
    ]
    assert {**found["model_cfg"], "quick_gelu": None} == {**open_clip.get_model_config(key), "quick_gelu": None}


@pytest.mark.parametrize(
    ("name", "tag", "quick_gelu"),
    [
        ("ViT-B/32", "openai", True),
        ("ViT-L-14", "openai", True),
        ("ViT-L-14-quickgelu", "openai", True),
        ("RN50", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32", "LAION2B-S34B-B79K", False),
        ("ViT-L/14", "laion2b_s32b_b82k", False),
        ("ViT-L-14", "datacomp_xl_s13b_b90k", False),
        ("ViT-B-32", "none", False),
        ("ViT-B-32-quickgelu", "none", True),
    ],
)
def test_the_activation_belongs_to_the_weights(name, tag, quick_gelu):
    assert bool(resolve(name, tag).config["model_cfg"].get("quick_gelu")) is quick_gelu


def test_every_pretrained_tag_gives_its_own_activation_and_normalisation():
    pairs = open_clip.list_pretrained()
    assert len(pairs) > 100
    for name, tag in pairs:
        theirs, config = open_clip.get_pretrained_cfg(name, tag), resolve(name, tag).config
        assert config["model_cfg"]["quick_gelu"] is theirs.get("quick_gelu", False), (name, tag)
        usual = {"resize_mode": "shortest", "interpolation": "bicubic"}
        own = {key: theirs[key] for key, value in usual.items() if theirs.get(key, value) != value}
        expected = {"mean": list(theirs["mean"]), "std": list(theirs["std"]), **own}
        assert config["preprocess_cfg"] == expected, (name, tag)


def test_mean_and_std_follow_the_tag():
    clip_mean = [0.48145466, 0.4578275, 0.40821073]
    assert resolve("ViT-B-32", "openai").config["preprocess_cfg"]["mean"] == clip_mean
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    assert resolve("ViT-B-16-SigLIP", "webli").config["preprocess_cfg"] == half


def test_resolving_leaves_open_clips_own_configs_alone():
    before = open_clip.get_model_config("ViT-B-32")
    config = resolve("ViT-B-32", "openai").config
    config["model_cfg"]["vision_cfg"]["image_size"] = 1
    assert open_clip.get_model_config("ViT-B-32") == before


def test_an_unknown_name_is_refused_with_near_ones():
    message = refusal("ViT-B-23", "openai")
    assert "ViT-B-32" in message and "local-dir:PATH" in message


def test_an_unknown_tag_is_refused_with_the_tags_there_are():
    message = refusal("ViT-B/32", "laion3b")
    assert "laion3b" in message
    assert all(tag in message for tag in open_clip.list_pretrained_tags_by_model("ViT-B-32"))


def test_tiny_has_assets_or_random_weights_and_nothing_else():
    assert "'assets'" in refusal("tiny", "openai")
    for pretrained in ("assets", "none"):
        assert resolve("tiny", pretrained).config["model_cfg"]["text_cfg"]["vocab_size"] == 49408


@pytest.mark.parametrize("prefix", ["local-dir:", ""], ids=["local-dir", "plain path"])
def test_a_folder_refuses_weights_from_elsewhere(open_clip_folder, prefix):
    message = refusal(f"{prefix}{open_clip_folder}", "laion2b_s34b_b79k")
    assert "--clip_pretrained laion2b_s34b_b79k" in message and "its own weights" in message


# -- folders


@pytest.mark.parametrize(
    "saved",
    [
        "no JSON",
        [],
        {},
        {"model_cfg": []},
        {"model_cfg": SMALL, "preprocess_cfg": None},
        {"model_cfg": {key: SMALL[key] for key in ("embed_dim", "text_cfg")}},
        {"model_cfg": {key: SMALL[key] for key in ("embed_dim", "vision_cfg")}},
        {"model_cfg": {key: SMALL[key] for key in ("vision_cfg", "text_cfg")}},
        {"model_cfg": {**SMALL, "colour": 1}},
        {"model_cfg": {**SMALL, "text_cfg": {**SMALL["text_cfg"], "heads": 3}}},
    ],
    ids=str,
)
def test_a_broken_open_clip_config_is_refused(open_clip_folder, saved):
    path = open_clip_folder / "open_clip_config.json"
    path.write_text(saved if isinstance(saved, str) else json.dumps(saved), encoding="utf-8")
    refusal(f"local-dir:{open_clip_folder}", "openai")


def test_a_folder_of_neither_form_is_refused(tmp_path):
    for name in (f"local-dir:{tmp_path}", str(tmp_path), f"local-dir:{tmp_path / 'absent'}"):
        message = refusal(name, "openai")
        assert "open_clip_config.json" in message and "config.json" in message
