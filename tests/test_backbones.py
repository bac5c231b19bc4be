"""`backbones.py`: every form a CLIP comes in, against the library that wrote it; what is refused, and how."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import backbones
import models
from backbones import load_backbone, resolve
from inputs import TextTable

IMAGE_SIZE, CONTEXT, VOCAB = 32, 20, 60
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCAB, "width": 32, "heads": 2, "layers": 2},
}
# Sizes that no standard CLIP has: 4 heads of 12 and 5 of 8, MLPs that are not 4 times as wide.
ODD_VISION = {"hidden_size": 48, "intermediate_size": 100, "num_attention_heads": 4, "layer_norm_eps": 1e-3}
ODD_TEXT = {"hidden_size": 40, "intermediate_size": 99, "num_attention_heads": 5, "num_hidden_layers": 3}
TRANSFORMERS_FORMS = {
    "gelu": ({}, {}, "gelu"),
    "quick_gelu": ({}, {}, "quick_gelu"),
    "legacy end token": ({}, {"eos_token_id": 2}, "quick_gelu"),
    "odd sizes": (ODD_VISION, ODD_TEXT, "gelu"),
}
END = 55  # the end token where it is named; higher ones are words
OFFLINE_WAYS = ("--clip_pretrained WEIGHTS_FILE", "--clip_model local-dir:FOLDER", "--clip_pretrained assets")


# -------------------------------------------------------------------------------------------------- helpers


def stir(module: nn.Module) -> None:
    """Random values in every parameter, those that start as 0 or 1 too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=-1)


def images(size: int = IMAGE_SIZE) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(6))


def prompts(end: int) -> Tensor:
    """(P, N) tokens up to an end token and padding: short, with token 0 and others above `end` inside, and full."""
    tokens_PN = torch.zeros(4, CONTEXT, dtype=torch.long)
    for row, words in enumerate(([7, 8, 9], [], [5, 0, 0, min(end + 2, VOCAB - 2), 6, 5], [11] * (CONTEXT - 1))):
        tokens_PN[row, : len(words) + 1] = torch.tensor([*words, end])
    return tokens_PN


@torch.no_grad()
def assert_same_embeddings(clip: nn.Module, image: Callable[..., Any], text: Callable[..., Any], end: int) -> None:
    """Embeddings equal those of a reference; texts with their padding and without."""
    clip.eval()
    pictures, tokens = images(), prompts(end)
    torch.testing.assert_close(clip.encode_image(pictures), image(pictures), atol=1e-5, rtol=1e-5)
    expected = text(tokens)
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # the texts differ, so a match says something
    torch.testing.assert_close(clip.encode_text(tokens), expected, atol=1e-5, rtol=1e-5)
    model = models.ScoreModel(clip, nn.Identity(), embed_dim=expected.shape[1])
    torch.testing.assert_close(model.encode_image(pictures), unit(image(pictures)), atol=1e-5, rtol=1e-5)
    table = TextTable(list("abcd"), lambda texts: tokens, tokens.device, trim=models.trims_exactly(clip.text))
    for rows in (np.arange(4), np.arange(3)):  # without the last there is padding to leave out
        chosen = table.select(rows)
        assert len(rows) == 4 or chosen["text"].shape[1] < CONTEXT
        embedded = model.encode_text(chosen["text"])[chosen["prompt_of_B"]]
        torch.testing.assert_close(embedded, unit(expected[rows]), atol=1e-5, rtol=1e-5)


def refusal(*arguments: Any, **options: Any) -> str:
    """The one line with which loading a backbone is refused."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  (callers look at the message)
        load_backbone(*arguments, **{"image_size": IMAGE_SIZE, **options})
    message = str(error.value)
    assert message and "\n" not in message
    return message


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(path: Path, *keys: str, value: Any) -> None:
    whole = part = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    write_json(path, whole)


class Plant:
    """A pickle that, if it is run, makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


# ------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def reference() -> open_clip.CLIP:
    """A small open_clip CLIP with random weights. Read it, do not change it."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**SMALL)
    stir(model)
    return model.eval()


@pytest.fixture
def small_name(monkeypatch) -> str:
    """A name under which open_clip knows the architecture of `reference`."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-CLIP", SMALL)
    return "Small-CLIP"


@pytest.fixture
def open_clip_folder(reference, tmp_path) -> Path:
    """`reference` in open_clip's form."""
    folder = tmp_path / "open-clip"
    folder.mkdir()
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    write_json(folder / "open_clip_config.json", {"model_cfg": SMALL, "preprocess_cfg": preprocess})
    save_file(reference.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def hf() -> Any:
    """The transformers library, which takes seconds to import."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def hf_models(hf, tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Every form of a transformers CLIPModel, and the folder it was saved in. Read them, do not change them."""
    found = {}
    for name, (vision, text, activation) in TRANSFORMERS_FORMS.items():
        sizes = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
        ends = {"bos_token_id": END - 1, "eos_token_id": END, "pad_token_id": END}
        words = {"max_position_embeddings": CONTEXT, "vocab_size": VOCAB, **ends}
        config = hf.CLIPConfig(
            vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": 8, "hidden_act": activation, **vision},
            text_config={**sizes, **words, "hidden_act": activation, **text},
            projection_dim=24,
        )
        torch.manual_seed(0)
        model = hf.CLIPModel(config).eval()
        stir(model)
        folder = tmp_path_factory.mktemp("transformers")
        model.save_pretrained(folder)
        save_tokenizer_files(hf, folder)
        found[name] = (model, folder)
    return found


def save_tokenizer_files(hf: Any, folder: Path) -> None:
    """CLIP's tokenizer with letters for a vocabulary, whose end token is END."""
    letters = ["!", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    assert vocab["<|endoftext|>"] == END
    hf.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)


@pytest.fixture
def hf_folder(hf_models, tmp_path) -> Path:
    """A transformers folder of one's own to change."""
    return Path(shutil.copytree(hf_models["gelu"][1], tmp_path / "own"))


def features(method: Callable[..., Any]) -> Callable[..., Tensor]:
    """transformers' get_*_features as a function that returns the projected embedding."""

    def embed(value: Tensor) -> Tensor:
        found = method(value)
        return getattr(found, "pooler_output", found)

    return embed


def assert_same_as_transformers(clip: nn.Module, model: Any) -> None:
    end = END if model.config.text_config.eos_token_id == END else VOCAB - 1
    assert_same_embeddings(clip, features(model.get_image_features), features(model.get_text_features), end)


def assert_same_as_open_clip(clip: nn.Module, model: Any) -> None:
    assert_same_embeddings(clip, model.encode_image, model.encode_text, VOCAB - 1)


# ---------------------------------------------------------------------------------------------------- names


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
        assert config["preprocess_cfg"] == {"mean": list(theirs["mean"]), "std": list(theirs["std"])}, (name, tag)


def test_mean_and_std_follow_the_tag():
    clip_mean = [0.48145466, 0.4578275, 0.40821073]
    assert resolve("ViT-B-32", "openai").config["preprocess_cfg"]["mean"] == clip_mean
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
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


def test_the_assets_are_the_weights_of_tiny():
    clip = load_backbone("tiny", "assets", image_size=224).clip
    saved = load_file(backbones.TINY_DIR / "open_clip_model.safetensors")
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


# -------------------------------------------------------------------------------------- open_clip's own form


@pytest.mark.parametrize("prefix", ["local-dir:", ""], ids=["local-dir", "plain path"])
def test_a_folder_in_open_clips_form_embeds_as_open_clip_does(reference, open_clip_folder, prefix):
    backbone = load_backbone(f"{prefix}{open_clip_folder}", "openai", image_size=IMAGE_SIZE)
    assert_same_as_open_clip(backbone.clip, open_clip.create_model(f"local-dir:{open_clip_folder}").eval())
    assert_same_as_open_clip(backbone.clip, reference)
    assert backbone.config["preprocess_cfg"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert backbone.tokenizer(["a"]).shape == (1, CONTEXT)


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def custom_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout of CustomTextCLIP, made by loading into one."""
    clip = open_clip.CustomTextCLIP(**SMALL)
    clip.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(state))
    assert "text.positional_embedding" in clip.state_dict()
    return clip.state_dict()


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """What distributed training of open_clip saves."""
    return {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": value for name, value in state.items()}}


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [("safetensors", plain), ("pt", plain), ("pt", training_checkpoint), ("bin", plain)],
    ids=["safetensors", "pt", "training checkpoint", "bin"],
)
@pytest.mark.parametrize("layout", [plain, custom_text])
def test_a_weights_file_embeds_as_the_model_it_was_saved_from(reference, small_name, tmp_path, layout, suffix, wrap):
    path = tmp_path / f"weights.{suffix}"
    state = wrap(layout(reference.state_dict()))
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    clip = load_backbone(small_name, str(path), image_size=IMAGE_SIZE).clip
    assert_same_as_open_clip(clip, reference)
    assert torch.equal(clip.logit_scale, reference.logit_scale)


def test_half_precision_weights_become_float32(reference, small_name, tmp_path):
    save_file({name: value.half() for name, value in reference.state_dict().items()}, tmp_path / "half.safetensors")
    clip = load_backbone(small_name, str(tmp_path / "half.safetensors"), image_size=48).clip
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}
    assert torch.equal(clip.visual.proj, reference.visual.proj.half().float())


@pytest.mark.parametrize(("shape", "nonscalar"), [((1,), False), ((), True)])
def test_a_scalar_temperature_and_one_of_one_element_fit_each_other(reference, small_name, tmp_path, shape, nonscalar):
    open_clip.factory._MODEL_CONFIGS[small_name] = {**SMALL, "nonscalar_logit_scale": nonscalar}
    save_file({**reference.state_dict(), "logit_scale": torch.full(shape, 3.0)}, tmp_path / "weights.safetensors")
    clip = load_backbone(small_name, str(tmp_path / "weights.safetensors"), image_size=IMAGE_SIZE).clip
    assert clip.logit_scale.shape == ((1,) if nonscalar else ())
    assert clip.logit_scale.item() == 3.0


def test_transformers_weights_in_a_file_fit_an_open_clip_architecture(hf_models, monkeypatch, tmp_path):
    model, _ = hf_models["legacy end token"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-CLIP-quickgelu", {**SMALL, "quick_gelu": True})
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    path = str(tmp_path / "pytorch_model.bin")
    backbone = load_backbone("Small-CLIP-quickgelu", path, image_size=IMAGE_SIZE)
    assert_same_as_transformers(backbone.clip, model)


def test_a_weights_file_has_the_activation_and_normalisation_of_the_config_beside_it(
    hf_models, reference, open_clip_folder, small_name
):
    model, folder = hf_models["legacy end token"]
    for name in (small_name, "Small-CLIP"):
        backbone = load_backbone(name, str(folder / "model.safetensors"), image_size=IMAGE_SIZE)
        assert backbone.activation == "QuickGELU"
        assert_same_as_transformers(backbone.clip, model)
        assert backbone.notes == ()
    open_clip.factory._MODEL_CONFIGS[small_name] = {**SMALL, "quick_gelu": True}  # small_name takes it away again
    path = str(open_clip_folder / "open_clip_model.safetensors")
    backbone = load_backbone(small_name, path, image_size=IMAGE_SIZE)
    assert_same_as_open_clip(backbone.clip, reference)
    assert backbone.config["preprocess_cfg"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize("activation", ["GELU", "QuickGELU"])
def test_a_weights_file_alone_comes_with_a_note_on_its_activation(reference, small_name, tmp_path, activation):
    open_clip.factory._MODEL_CONFIGS[small_name] = {**SMALL, "quick_gelu": activation == "QuickGELU"}
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    backbone = load_backbone(small_name, str(tmp_path / "weights.safetensors"), image_size=IMAGE_SIZE)
    assert backbone.activation == activation
    (note,) = backbone.notes
    assert f"activation {activation} " in note and small_name in note


def test_a_folder_prefers_open_clips_safetensors_and_takes_what_there_is(reference, tmp_path):
    with pytest.raises(ValueError, match="no weights file"):
        backbones.find_weights(tmp_path)
    for name in ("a.bin", "a.pt", "a.safetensors", "open_clip_model.safetensors"):
        (tmp_path / name).touch()
        assert backbones.find_weights(tmp_path).name == name


def test_broken_weights_are_refused_and_not_read_for_a_random_start(open_clip_folder):
    (open_clip_folder / "open_clip_model.safetensors").write_bytes(b"broken")
    name = f"local-dir:{open_clip_folder}"
    assert "cannot be read as weights" in refusal(name, "openai")
    assert load_backbone(name, "none", image_size=IMAGE_SIZE).embed_dim == 24


@pytest.mark.parametrize("prefix", ["local-dir:", ""], ids=["local-dir", "plain path"])
def test_a_folder_refuses_weights_from_elsewhere(open_clip_folder, prefix):
    message = refusal(f"{prefix}{open_clip_folder}", "laion2b_s34b_b79k")
    assert "--clip_pretrained laion2b_s34b_b79k" in message and "its own weights" in message


# ------------------------------------------------------------------------------------------------ image size


@pytest.mark.parametrize("image_size", [16, 24, 48, 64])
def test_another_image_size_interpolates_the_position_table_as_open_clip_does(open_clip_folder, image_size):
    name = f"local-dir:{open_clip_folder}"
    theirs = open_clip.create_model(name, force_image_size=image_size).eval()
    clip = load_backbone(name, "openai", image_size=image_size).clip.eval()
    assert clip.visual.positional_embedding.shape == ((image_size // 8) ** 2 + 1, 32)
    torch.testing.assert_close(clip.visual.positional_embedding, theirs.visual.positional_embedding)
    pictures = images(image_size)
    torch.testing.assert_close(clip.encode_image(pictures), theirs.encode_image(pictures), atol=1e-5, rtol=1e-5)


def test_half_precision_position_tables_are_interpolated_too(reference, open_clip_folder):
    name, expected = f"local-dir:{open_clip_folder}", None
    expected = load_backbone(name, "openai", image_size=48).clip.visual.positional_embedding
    half = {key: value.half() for key, value in reference.state_dict().items()}
    save_file(half, open_clip_folder / "open_clip_model.safetensors")
    found = load_backbone(name, "openai", image_size=48).clip.visual.positional_embedding
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


def test_at_its_own_size_a_model_keeps_its_position_tables_exactly(reference, open_clip_folder):
    backbone = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=IMAGE_SIZE)
    clip = backbone.clip
    assert backbone.notes == ()
    assert torch.equal(clip.visual.positional_embedding, reference.visual.positional_embedding)
    assert torch.equal(clip.text.positional_embedding, reference.positional_embedding)


def test_another_image_size_than_the_weights_comes_with_a_note(open_clip_folder, small_name):
    (note,) = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=48).notes
    assert "--image_size 32" in note
    assert load_backbone(small_name, "none", image_size=48).notes == ()  # nothing was trained at any size


def test_the_config_of_a_backbone_builds_it_again_at_its_size(open_clip_folder):
    backbone = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=48)
    config = json.loads(json.dumps(backbone.config))
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 48
    again = backbones.build_clip(config, image_size=48)
    again.load_state_dict(backbone.clip.state_dict())


@pytest.mark.parametrize(("image_size", "near"), [(30, 32), (33, 32), (3, 8)])
def test_an_image_size_that_patches_cannot_tile_is_refused_with_a_near_one(small_name, image_size, near):
    message = refusal(small_name, "none", image_size=image_size)
    assert f"--image_size {image_size}" in message
    assert "patch size 8" in message and message.endswith(f"as {near}")


# ------------------------------------------------------------------------------------- transformers' own form


@pytest.mark.parametrize("form", TRANSFORMERS_FORMS)
def test_a_folder_in_transformers_form_embeds_as_transformers_does(hf_models, form):
    model, folder = hf_models[form]
    backbone = load_backbone(f"local-dir:{folder}", "openai", image_size=IMAGE_SIZE)
    assert_same_as_transformers(backbone.clip, model)
    assert backbone.activation == ("GELU" if TRANSFORMERS_FORMS[form][2] == "gelu" else "QuickGELU")
    assert torch.equal(backbone.clip.visual.positional_embedding, model.state_dict()[POSITIONS])


POSITIONS = "vision_model.embeddings.position_embedding.weight"


def test_half_precision_transformers_weights_become_float32(hf, hf_folder):
    hf.CLIPModel.from_pretrained(hf_folder, dtype=torch.float16).save_pretrained(hf_folder)
    clip = load_backbone(str(hf_folder), "openai", image_size=48).clip
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}


@given(st.integers(8, 4096), st.integers(8, 16384))
@settings(max_examples=300)
def test_the_mlp_has_the_width_that_transformers_gave_it(width, mlp_width):
    tower = SimpleNamespace(hidden_size=width, intermediate_size=mlp_width)
    assert int(width * backbones.mlp_ratio(tower)) == mlp_width


def test_normalisation_follows_the_preprocessor_config(hf, hf_folder):
    def found() -> dict[str, list[float]]:
        return resolve(f"local-dir:{hf_folder}", "openai").config["preprocess_cfg"]

    assert found() == backbones.DEFAULT_PREPROCESS
    processor = hf.CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    tokenizer = hf.AutoTokenizer.from_pretrained(hf_folder)
    hf.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(hf_folder)
    assert found() == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    for name in ("processor_config.json", "preprocessor_config.json"):
        (hf_folder / name).unlink(missing_ok=True)
    assert found() == backbones.DEFAULT_PREPROCESS
    hf.CLIPImageProcessor(image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7]).save_pretrained(hf_folder)
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


# ------------------------------------------------------------------------------------------ unfit and unsafe


@pytest.mark.parametrize("image_size", [IMAGE_SIZE, 48])
@pytest.mark.parametrize(
    "change",
    [
        {"embed_dim": 16},
        {"vision_cfg": {**SMALL["vision_cfg"], "width": 48}},
        {"vision_cfg": {**SMALL["vision_cfg"], "layers": 3}},
        {"vision_cfg": {**SMALL["vision_cfg"], "layers": 1}},
        {"vision_cfg": {**SMALL["vision_cfg"], "patch_size": 4}},
        {"vision_cfg": {**SMALL["vision_cfg"], "layers": [1, 1, 1, 1]}},
        {"text_cfg": {**SMALL["text_cfg"], "width": 48}},
        {"text_cfg": {**SMALL["text_cfg"], "vocab_size": 61}},
        {"text_cfg": {**SMALL["text_cfg"], "context_length": CONTEXT - 4}},
        {"init_logit_bias": -10},
    ],
    ids=str,
)
def test_weights_of_another_architecture_are_refused(reference, small_name, tmp_path, change, image_size):
    open_clip.factory._MODEL_CONFIGS[small_name] = {**SMALL, **change}
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    message = refusal(small_name, str(tmp_path / "weights.safetensors"), image_size=image_size)
    assert message.startswith("the weights do not fit Small-CLIP")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"logit_scale": torch.zeros(3)},
        {"logit_scale": 1.0},
        {"epoch": 3, "model": {}},
        {"vision_model.embeddings.class_embedding": torch.zeros(4), "logit_scale": torch.zeros(())},
        {0: torch.zeros(1)},
        [torch.zeros(1)],
        torch.zeros(1),
    ],
    ids=["nothing", "shape", "number", "nested", "half of transformers", "numbers as names", "list", "tensor"],
)
def test_a_file_without_a_whole_clip_in_it_is_refused(small_name, tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    refusal(small_name, str(tmp_path / "weights.pt"))


@pytest.mark.parametrize("suffix", ["pt", "bin", "pth", "safetensors"])
@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_code_in_a_weights_file_is_refused_and_never_run(small_name, tmp_path, write, suffix):
    path, planted = tmp_path / f"weights.{suffix}", tmp_path / "planted"
    content = {"state_dict": {"logit_scale": Plant(planted)}}
    if write == "torch":
        torch.save(content, tmp_path / "any")
        torch.load(tmp_path / "any", weights_only=False)
    else:
        (tmp_path / "any").write_bytes(pickle.dumps(content, protocol=2))
        pickle.loads((tmp_path / "any").read_bytes())
    assert planted.exists()  # it would do harm
    planted.unlink()
    (tmp_path / "any").rename(path)
    message = refusal(small_name, str(path))
    assert str(path) in message and "cannot be read as weights" in message
    assert not planted.exists()


def test_code_in_the_weights_of_a_transformers_folder_is_never_run(hf_folder, tmp_path):
    (hf_folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Plant(tmp_path / "planted")}, hf_folder / "pytorch_model.bin")
    refusal(str(hf_folder), "openai")
    assert not (tmp_path / "planted").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_refused_with_a_way_out(small_name, tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    message = refusal(small_name, str(tmp_path / "ViT-B-32.pt"))
    assert "TorchScript" in message and "state_dict()" in message and ".safetensors" in message


def test_coca_is_refused():
    with pytest.raises(ValueError, match="CoCa") as error:
        backbones.build_clip(resolve("coca_ViT-B-32", "none").config, image_size=224)
    assert "\n" not in str(error.value)


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


# -------------------------------------------------------------------------------------- the hub, and no network


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Callable[[str, Path], None]]:
    """Without a network: a function that puts a folder into the hub's cache."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def add(name: str, folder: Path) -> None:
        place = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / "abc")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("abc")

    return add


@pytest.mark.parametrize("name", ["org/some-model", "hf-hub:org/some-model"])
def test_a_hub_repository_in_open_clips_form_is_found_in_the_cache(hub, reference, open_clip_folder, name):
    hub("org/some-model", open_clip_folder)
    backbone = load_backbone(name, "openai", image_size=IMAGE_SIZE)
    assert_same_as_open_clip(backbone.clip, reference)
    assert backbone.config["preprocess_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert isinstance(backbone.tokenizer, open_clip.SimpleTokenizer)


@pytest.mark.parametrize("name", ["org/some-model", "hf-hub:org/some-model"])
def test_a_hub_repository_in_transformers_form_is_found_in_the_cache(hub, hf_models, name):
    model, folder = hf_models["gelu"]
    hub("org/some-model", folder)
    backbone = load_backbone(name, "openai", image_size=IMAGE_SIZE)
    assert_same_as_transformers(backbone.clip, model)
    assert backbone.tokenizer(["ab"])[0, :4].tolist() == [END - 1, 1, 29, END]


def test_a_hub_repository_without_an_open_clip_config_is_read_in_transformers_form(hub, hf_models, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    def absent(*arguments: Any, **options: Any) -> None:
        raise EntryNotFoundError("404: no such file")

    hub("org/some-model", hf_models["gelu"][1])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *arguments: None)
    assert resolve("org/some-model", "openai").config["model_cfg"]["text_cfg"]["eos_id"] == END


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["org/some-model", "hf-hub:org/some-model"])
def test_a_hub_repository_that_is_out_of_reach_is_refused_with_the_ways_around(name):
    message = refusal(name, "openai")
    assert "org/some-model" in message
    assert all(way in message for way in OFFLINE_WAYS)


def test_weights_of_a_hub_repository_that_are_out_of_reach_are_not_made_up(hub, open_clip_folder):
    (open_clip_folder / "open_clip_model.safetensors").unlink()
    hub("org/some-model", open_clip_folder)
    message = refusal("org/some-model", "openai")
    assert all(way in message for way in OFFLINE_WAYS)


def test_weights_of_a_tag_that_are_out_of_reach_are_not_made_up(monkeypatch, small_name):
    def unreachable(tag: dict[str, Any]) -> None:
        raise OSError(f"cannot reach {tag['hf_hub']}\nafter 5 attempts")

    tag = {"hf_hub": "org/weights", "mean": (0, 0, 0), "std": (1, 1, 1)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, small_name, {"some_tag": tag})
    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    message = refusal(small_name, "some_tag")
    assert "Small-CLIP (some_tag)" in message and "cannot reach org/weights" in message
    assert all(way in message for way in OFFLINE_WAYS)


def test_weights_of_a_tag_are_those_that_were_downloaded(monkeypatch, reference, small_name, tmp_path):
    save_file(reference.state_dict(), tmp_path / "downloaded.safetensors")
    tag = {"hf_hub": "org/weights", "mean": (0, 0, 0), "std": (1, 1, 1)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, small_name, {"some_tag": tag})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda asked: {str(tag): tmp_path}[str(asked)] / FILE)
    backbone = load_backbone(small_name, "some_tag", image_size=IMAGE_SIZE)
    assert_same_as_open_clip(backbone.clip, reference)
    assert backbone.config["preprocess_cfg"] == {"mean": [0, 0, 0], "std": [1, 1, 1]}


FILE = "downloaded.safetensors"


@pytest.mark.usefixtures("hub")
def test_a_tokenizer_that_is_out_of_reach_is_refused(monkeypatch, small_name):
    text = {**SMALL["text_cfg"], "hf_tokenizer_name": "org/tokenizer"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, small_name, {**SMALL, "text_cfg": text})
    message = refusal(small_name, "none")
    assert "tokenizer of Small-CLIP" in message
    assert all(way in message for way in OFFLINE_WAYS)


# ----------------------------------------------------------------------------------------------- tokenizers


def test_a_transformers_folder_is_tokenised_by_its_own_tokenizer(hf, hf_models):
    folder = hf_models["gelu"][1]
    tokenizer = load_backbone(str(folder), "openai", image_size=IMAGE_SIZE).tokenizer
    theirs = hf.AutoTokenizer.from_pretrained(folder)
    texts = ["a cat", "", "it is abc!", "ab" * CONTEXT]
    tokens = tokenizer(texts)
    assert tokens.shape == (4, CONTEXT) and tokens.dtype == torch.int64
    for row, text in zip(tokens.tolist(), texts, strict=True):
        expected = theirs(text)["input_ids"]
        if len(expected) > CONTEXT:
            expected = [*expected[: CONTEXT - 1], END]
        assert row == expected + [0] * (CONTEXT - len(expected))
    assert tokens[3, -1] == END


def standard_folder(hf: Any, folder: Path, vocab_size: int) -> Path:
    """A transformers folder without tokenizer files."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = hf.CLIPConfig(
        vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": 16},
        text_config={**sizes, "max_position_embeddings": CONTEXT, "vocab_size": vocab_size},
        projection_dim=8,
    )
    hf.CLIPModel(config).save_pretrained(folder)
    return folder


def test_a_transformers_folder_without_tokenizer_uses_clips_own_where_the_vocabulary_is_clips(hf, tmp_path):
    folder = standard_folder(hf, tmp_path, 49408)
    tokenizer = load_backbone(str(folder), "openai", image_size=IMAGE_SIZE).tokenizer
    texts = ["a red circle", "word " * 30]
    assert torch.equal(tokenizer(texts), open_clip.tokenize(texts, context_length=CONTEXT))


def test_a_transformers_folder_without_tokenizer_and_with_another_vocabulary_is_refused(hf, tmp_path):
    assert "tokenizer.json" in refusal(str(standard_folder(hf, tmp_path, 49409)), "openai")


EIGHT = open_clip.SimpleTokenizer(context_length=8)
WORDS = st.lists(st.sampled_from(["cat", "dog", "!~", "-", "antidisestablishmentarianism", "é"]), max_size=12)


@given(st.lists(WORDS, min_size=1, max_size=6))
@settings(max_examples=60)
def test_truncated_texts_are_counted_exactly(word_lists):
    """Against the number of tokens; "!~" holds token 0, which is also the padding."""
    texts = [" ".join(words) for words in word_lists]
    tokens, num_cut = backbones.tokenize(EIGHT, texts, 8)
    assert torch.equal(tokens, EIGHT(texts))
    assert num_cut == sum(len(EIGHT.encode(text)) + 2 > 8 for text in texts)


def test_a_text_that_just_fits_is_not_counted_as_cut():
    for num_words, num_cut in ((5, 0), (6, 0), (7, 1), (30, 1)):
        assert backbones.tokenize(EIGHT, ["cat " * num_words], 8)[1] == num_cut
    assert backbones.tokenize(EIGHT, ["cat " * 7, "cat " * 6, "dog " * 8], 8)[1] == 2


def test_truncated_texts_are_counted_exactly_whatever_a_tokenizer_pads_with(hf_models):
    folder = str(hf_models["gelu"][1])
    ours = load_backbone(folder, "openai", image_size=IMAGE_SIZE).tokenizer
    theirs = open_clip.tokenizer.HFTokenizer(folder, context_length=CONTEXT)
    assert (ours(["a"])[0, -1], theirs(["a"])[0, -1]) == (0, END)
    texts = ["a", "b" * (CONTEXT - 2), "c" * (CONTEXT - 1), "d" * 99]
    for tokenizer in (ours, theirs):
        tokens, num_cut = backbones.tokenize(tokenizer, texts, CONTEXT)
        assert torch.equal(tokens, tokenizer(texts))
        assert num_cut == 2


def test_no_texts_give_no_rows():
    tokens, num_cut = backbones.tokenize(EIGHT, [], 8)
    assert tokens.shape == (0, 8) and tokens.dtype == torch.int64
    assert num_cut == 0


def rebuilt(backbone: backbones.Backbone, folder: Path) -> backbones.Backbone:
    """The backbone as a checkpoint folder gives it back, its weights loaded as a checkpoint's reader does."""
    folder.mkdir()
    backbones.save_text_files(backbone, folder)
    config = json.loads(json.dumps(backbone.config))
    before = json.dumps(config)
    again = backbones.rebuild(config, folder, image_size=IMAGE_SIZE)
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
def test_an_open_clip_folder_with_a_tokenizer_of_its_own_survives_its_checkpoint(hf, open_clip_folder, tmp_path):
    save_tokenizer_files(hf, open_clip_folder)
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
def test_a_hugging_face_text_tower_survives_its_checkpoint(hf, open_clip_folder, tmp_path):
    """Its architecture is read from a folder or the hub, which a checkpoint must do without."""
    tower, config = tmp_path / "tower", open_clip_folder / "open_clip_config.json"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    hf.BertConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=CONTEXT).save_pretrained(tower)
    save_tokenizer_files(hf, open_clip_folder)
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
