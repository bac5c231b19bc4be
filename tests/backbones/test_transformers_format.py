"""`transformers_format`: a CLIP in transformers' form embeds as that library does; what is refused of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_clips import (
    IMAGE_SIZE,
    TRANSFORMERS_FORMS,
    assert_same_as_transformers,
    edit_json,
    hf,
    refusal,
    transformers_clip,
    write_transformers_form,
)

from backbones import transformers_format
from backbones.loading import load_backbone
from backbones.names import resolve


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """A small CLIP in transformers' form."""
    return write_transformers_form(tmp_path / "own")


@pytest.mark.parametrize("form", TRANSFORMERS_FORMS)
def test_a_folder_in_transformers_form_embeds_as_transformers_does(tmp_path, form):
    model, folder = transformers_clip(form), write_transformers_form(tmp_path, form)
    backbone = load_backbone(f"local-dir:{folder}", "openai", image_size=IMAGE_SIZE)
    assert_same_as_transformers(backbone.clip, model)
    assert backbone.activation == ("GELU" if TRANSFORMERS_FORMS[form][2] == "gelu" else "QuickGELU")
    assert torch.equal(backbone.clip.visual.positional_embedding, model.state_dict()[POSITIONS])


POSITIONS = "vision_model.embeddings.position_embedding.weight"


def test_half_precision_transformers_weights_become_float32(hf_folder):
    hf().CLIPModel.from_pretrained(hf_folder, dtype=torch.float16).save_pretrained(hf_folder)
    clip = load_backbone(str(hf_folder), "openai", image_size=48).clip
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}


@given(st.integers(8, 4096), st.integers(8, 16384))
@settings(max_examples=300)
def test_the_mlp_has_the_width_that_transformers_gave_it(width, mlp_width):
    tower = SimpleNamespace(hidden_size=width, intermediate_size=mlp_width)
    assert int(width * transformers_format.mlp_ratio(tower)) == mlp_width


def test_normalisation_follows_the_preprocessor_config(hf_folder):
    def found() -> dict[str, list[float]]:
        return resolve(f"local-dir:{hf_folder}", "openai").config["preprocess_cfg"]

    assert found() == transformers_format.DEFAULT_PREPROCESS
    processor = hf().CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    tokenizer = hf().AutoTokenizer.from_pretrained(hf_folder)
    hf().CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(hf_folder)
    assert found() == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    for name in ("processor_config.json", "preprocessor_config.json"):
        (hf_folder / name).unlink(missing_ok=True)
    assert found() == transformers_format.DEFAULT_PREPROCESS
    hf().CLIPImageProcessor(image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7]).save_pretrained(hf_folder)
    assert found() == {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}


@pytest.mark.parametrize(
    ("keys", "value", "part"),
    [
        (("model_type",), "siglip", "'siglip'"),
        (("text_config", "hidden_act"), "relu", "'relu'"),
        (("text_config", "num_attention_heads"), 5, "attention heads"),
        (("text_config", "hidden_size"), "wide", "hidden_size"),
        (("text_config",), ["no", "table"], "config.json"),
        (("projection_dim",), 16, ""),
        (("text_config", "num_hidden_layers"), 4, "missing"),
    ],
)
def test_a_transformers_config_that_cannot_be_used_is_refused(hf_folder, keys, value, part):
    edit_json(hf_folder / "config.json", *keys, value=value)
    message = refusal(str(hf_folder), "openai")
    assert str(hf_folder) in message and part in message


def test_a_transformers_folder_without_one_of_its_weights_is_refused(hf_folder):
    path = hf_folder / "model.safetensors"
    state = load_file(path)
    del state["visual_projection.weight"]
    save_file(state, path, metadata={"format": "pt"})
    assert "visual_projection.weight" in refusal(str(hf_folder), "openai")
    path.unlink()
    assert "model.safetensors" in refusal(str(hf_folder), "openai")
