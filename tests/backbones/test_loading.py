"""`loading`: a CLIP by its name as its own library embeds, at any image size, and back from a checkpoint folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_clips import (
    CONTEXT,
    END,
    IMAGE_SIZE,
    SMALL,
    VOCAB,
    assert_same_as_open_clip,
    edit_json,
    hf,
    images,
    offline,
    prompts,
    reference,
    save_tokenizer_files,
    write_open_clip_form,
    write_transformers_form,
)
from torch import Tensor

from backbones import build, loading, names
from backbones.loading import load_backbone


@pytest.fixture
def small_name(monkeypatch) -> str:
    """A name under which open_clip knows the architecture of `reference`."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-CLIP", SMALL)
    return "Small-CLIP"


@pytest.fixture
def open_clip_folder(tmp_path) -> Path:
    """`reference` in open_clip's form."""
    return write_open_clip_form(tmp_path / "open-clip")


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """A small CLIP in transformers' form."""
    return write_transformers_form(tmp_path / "own")


# -- names


def test_the_assets_are_the_weights_of_tiny():
    clip = load_backbone("tiny", "assets", image_size=224).clip
    saved = load_file(names.EMBEDDED["tiny"] / "open_clip_model.safetensors")
    assert torch.equal(clip.visual.conv1.weight, saved["visual.conv1.weight"].float())


def test_none_starts_at_random_from_the_global_seed(small_name):
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return load_backbone(small_name, "none", image_size=IMAGE_SIZE).clip.visual.proj

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_backbone_tells_its_width_and_activation(small_name):
    backbone = load_backbone(small_name, "none", image_size=IMAGE_SIZE)
    assert (backbone.embed_dim, backbone.activation) == (24, "GELU")
    backbone.config["model_cfg"]["quick_gelu"] = True
    assert backbone.activation == "QuickGELU"


# -- open_clip's own form


@pytest.mark.parametrize("prefix", ["local-dir:", ""], ids=["local-dir", "plain path"])
def test_a_folder_in_open_clips_form_embeds_as_open_clip_does(open_clip_folder, prefix):
    backbone = load_backbone(f"{prefix}{open_clip_folder}", "openai", image_size=IMAGE_SIZE)
    assert_same_as_open_clip(backbone.clip, open_clip.create_model(f"local-dir:{open_clip_folder}").eval())
    assert_same_as_open_clip(backbone.clip, reference())
    assert backbone.config["preprocess_cfg"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert backbone.tokenizer(["a"]).shape == (1, CONTEXT)


# -- image size


@pytest.mark.parametrize("image_size", [None, IMAGE_SIZE, 48])
def test_a_backbone_sees_the_size_that_it_was_trained_at_unless_told_another(open_clip_folder, image_size):
    backbone = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=image_size)
    assert backbone.image_size == (image_size or IMAGE_SIZE)
    assert backbone.clip.visual.image_size == (backbone.image_size,) * 2
    assert bool(backbone.notes) == (backbone.image_size != IMAGE_SIZE)


def test_a_config_without_a_size_means_224(monkeypatch):
    vision = {name: value for name, value in SMALL["vision_cfg"].items() if name != "image_size"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-CLIP", {**SMALL, "vision_cfg": vision})
    backbone = load_backbone("Small-CLIP", "none")
    assert backbone.image_size == 224 and backbone.clip.visual.image_size == (224, 224)


@pytest.mark.parametrize("image_size", [16, 24, 48, 64])
def test_another_image_size_interpolates_the_position_table_as_open_clip_does(open_clip_folder, image_size):
    name = f"local-dir:{open_clip_folder}"
    theirs = open_clip.create_model(name, force_image_size=image_size).eval()
    clip = load_backbone(name, "openai", image_size=image_size).clip.eval()
    assert clip.visual.positional_embedding.shape == ((image_size // 8) ** 2 + 1, 32)
    torch.testing.assert_close(clip.visual.positional_embedding, theirs.visual.positional_embedding)
    pictures = images(image_size)
    torch.testing.assert_close(clip.encode_image(pictures), theirs.encode_image(pictures), atol=1e-5, rtol=1e-5)


def test_half_precision_position_tables_are_interpolated_too(open_clip_folder):
    name, expected = f"local-dir:{open_clip_folder}", None
    expected = load_backbone(name, "openai", image_size=48).clip.visual.positional_embedding
    half = {key: value.half() for key, value in reference().state_dict().items()}
    save_file(half, open_clip_folder / "open_clip_model.safetensors")
    found = load_backbone(name, "openai", image_size=48).clip.visual.positional_embedding
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


def test_at_its_own_size_a_model_keeps_its_position_tables_exactly(open_clip_folder):
    backbone = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=IMAGE_SIZE)
    clip = backbone.clip
    assert backbone.notes == ()
    assert torch.equal(clip.visual.positional_embedding, reference().visual.positional_embedding)
    assert torch.equal(clip.text.positional_embedding, reference().positional_embedding)


def test_another_image_size_than_the_weights_comes_with_a_note(open_clip_folder, small_name):
    (note,) = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=48).notes
    assert "--image_size 32" in note
    assert load_backbone(small_name, "none", image_size=48).notes == ()  # nothing was trained at any size


def test_the_config_of_a_backbone_builds_it_again_at_its_size(open_clip_folder):
    backbone = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=48)
    config = json.loads(json.dumps(backbone.config))
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 48
    again = build.build_clip(config, image_size=48)
    again.load_state_dict(backbone.clip.state_dict())


# -- checkpoint folders, without a network


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Callable[[str, Path], None]:
    """Without a network: a function that puts a folder into the hub's cache."""
    return offline(tmp_path / "hub", monkeypatch)


def rebuilt(backbone: loading.Backbone, folder: Path) -> loading.Backbone:
    """The backbone as a checkpoint folder gives it back, its weights loaded as a checkpoint's reader does."""
    folder.mkdir()
    loading.save_text_files(backbone, folder)
    config = json.loads(json.dumps(backbone.config))
    before = json.dumps(config)
    again = loading.rebuild_backbone(config, folder, image_size=IMAGE_SIZE)
    assert json.dumps(config) == before
    again.clip.load_state_dict(backbone.clip.state_dict())
    return again


TEXTS = ["a cat", "", "AB  cd!", "ab " * CONTEXT]


@pytest.mark.usefixtures("hub")
def test_a_transformers_clip_survives_its_checkpoint(hf_folder, tmp_path):
    backbone = load_backbone(str(hf_folder), "openai", image_size=IMAGE_SIZE)
    shutil.rmtree(hf_folder)
    again = rebuilt(backbone, tmp_path / "checkpoint")
    assert torch.equal(again.tokenizer(TEXTS), backbone.tokenizer(TEXTS))
    with torch.no_grad():
        assert torch.equal(again.clip.encode_image(images()), backbone.clip.encode_image(images()))
        assert torch.equal(again.clip.encode_text(prompts(END)), backbone.clip.encode_text(prompts(END)))


@pytest.mark.usefixtures("hub")
def test_open_clips_own_tokenizer_needs_no_files(open_clip_folder, tmp_path):
    backbone = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=IMAGE_SIZE)
    again = rebuilt(backbone, tmp_path / "checkpoint")
    assert torch.equal(again.tokenizer(TEXTS), backbone.tokenizer(TEXTS))
    assert not list((tmp_path / "checkpoint").iterdir())


@pytest.mark.usefixtures("hub")
def test_an_open_clip_folder_with_a_tokenizer_of_its_own_survives_its_checkpoint(open_clip_folder, tmp_path):
    save_tokenizer_files(open_clip_folder)
    config = open_clip_folder / "open_clip_config.json"
    edit_json(config, "model_cfg", "text_cfg", "hf_tokenizer_name", value="org/elsewhere")
    edit_json(config, "model_cfg", "text_cfg", "tokenizer_kwargs", value={"clean": "canonicalize"})
    backbone = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=IMAGE_SIZE)
    assert isinstance(backbone.tokenizer, open_clip.tokenizer.HFTokenizer)
    shutil.rmtree(open_clip_folder)
    again = rebuilt(backbone, tmp_path / "checkpoint")
    assert torch.equal(again.tokenizer(TEXTS), backbone.tokenizer(TEXTS))
    assert torch.equal(again.tokenizer(["a, b"]), again.tokenizer(["a b"]))  # cleaned as configured


@pytest.mark.usefixtures("hub")
def test_a_hugging_face_text_tower_survives_its_checkpoint(open_clip_folder, tmp_path):
    """Its architecture is read from a folder or the hub, which a checkpoint must do without."""
    tower, config = tmp_path / "tower", open_clip_folder / "open_clip_config.json"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    hf().BertConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=CONTEXT).save_pretrained(tower)
    save_tokenizer_files(open_clip_folder)
    text = {"hf_model_name": str(tower), "hf_tokenizer_name": "org/elsewhere", "context_length": CONTEXT}
    edit_json(config, "model_cfg", "text_cfg", value={**text, "hf_proj_type": "linear"})
    backbone = load_backbone(f"local-dir:{open_clip_folder}", "none", image_size=IMAGE_SIZE)
    shutil.rmtree(tower)
    shutil.rmtree(open_clip_folder)
    again = rebuilt(backbone, tmp_path / "checkpoint")
    tokens = backbone.tokenizer(TEXTS)
    assert torch.equal(again.tokenizer(TEXTS), tokens)
    with torch.no_grad():
        assert torch.equal(again.clip.eval().encode_text(tokens), backbone.clip.eval().encode_text(tokens))
