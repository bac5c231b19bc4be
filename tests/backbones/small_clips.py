"""Small CLIPs in open_clip's and transformers' forms, and how loading them is refused. No tests: these import it."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import refusals
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from backbones import towers
from backbones.loading import load_backbone
from inputs.texts import TextTable

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
    table = TextTable(list("abcd"), lambda texts: tokens, tokens.device, trim=towers.trims_exactly(clip.text))
    for rows in (np.arange(4), np.arange(3)):  # without the last there is padding to leave out
        chosen = table.select(rows)
        assert len(rows) == 4 or chosen["text"].shape[1] < CONTEXT
        embedded = model.encode_text(chosen["text"])[chosen["prompt_of_B"]]
        torch.testing.assert_close(embedded, unit(expected[rows]), atol=1e-5, rtol=1e-5)


def refusal(*arguments: Any, **options: Any) -> str:
    """The one line with which loading a backbone is refused."""
    return refusals.refusal(load_backbone, *arguments, **{"image_size": IMAGE_SIZE, **options})


class OpenAIClip(open_clip.CLIP):
    """A CLIP with the numbers among its weights that OpenAI's own files have there, and two outputs as theirs."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config, quick_gelu=True)
        sizes = {"input_resolution": IMAGE_SIZE, "context_length": self.context_length, "vocab_size": self.vocab_size}
        for name, value in sizes.items():
            if hasattr(self, name):
                delattr(self, name)
            self.register_buffer(name, torch.tensor(value))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        per_image = self.encode_image(image, normalize=True) @ self.encode_text(text, normalize=True).T
        return per_image, per_image.T


def openai_sizes(vocab_size: int = VOCAB) -> dict[str, Any]:
    """The architecture of a small CLIP as OpenAI built theirs: heads of 64."""
    vision = {"image_size": IMAGE_SIZE, "layers": 2, "width": 64, "head_width": 64, "patch_size": 8}
    text = {"context_length": CONTEXT, "vocab_size": vocab_size, "width": 64, "heads": 1, "layers": 3}
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}


@cache
def openai_clip(vocab_size: int = VOCAB) -> OpenAIClip:
    """A small CLIP of OpenAI's form with values of half precision. Read it, do not change it."""
    torch.manual_seed(0)
    model = OpenAIClip(**openai_sizes(vocab_size))
    stir(model)
    return model.half().float().eval()


def write_openai_archive(path: Path, model: OpenAIClip | None = None) -> Path:
    """Such a CLIP as OpenAI published theirs: a traced TorchScript archive in half precision."""
    model = copy.deepcopy(model or openai_clip())  # a traced model shares its weights
    tokens = torch.zeros(1, CONTEXT, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (images()[:1], tokens), check_trace=False)
        traced.half().save(str(path))
    return path


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(path: Path, *keys: str, value: Any) -> None:
    whole = part = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    write_json(path, whole)


@cache
def reference() -> open_clip.CLIP:
    """A small open_clip CLIP with random weights. Read it, do not change it."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**SMALL)
    stir(model)
    return model.eval()


def write_open_clip_form(folder: Path) -> Path:
    """`reference` in open_clip's form."""
    folder.mkdir()
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    write_json(folder / "open_clip_config.json", {"model_cfg": SMALL, "preprocess_cfg": preprocess})
    save_file(reference().state_dict(), folder / "open_clip_model.safetensors")
    return folder


@cache
def hf() -> Any:
    """The transformers library, which takes seconds to import."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


@cache
def transformers_clip(form: str) -> Any:
    """A form of a transformers CLIPModel. Read it, do not change it."""
    vision, text, activation = TRANSFORMERS_FORMS[form]
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"bos_token_id": END - 1, "eos_token_id": END, "pad_token_id": END}
    words = {"max_position_embeddings": CONTEXT, "vocab_size": VOCAB, **ends}
    config = hf().CLIPConfig(
        vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": 8, "hidden_act": activation, **vision},
        text_config={**sizes, **words, "hidden_act": activation, **text},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = hf().CLIPModel(config).eval()
    stir(model)
    return model


def write_transformers_form(folder: Path, form: str = "gelu") -> Path:
    """A transformers CLIPModel as a folder, with CLIP's tokenizer."""
    transformers_clip(form).save_pretrained(folder)
    save_tokenizer_files(folder)
    return folder


def save_tokenizer_files(folder: Path) -> None:
    """CLIP's tokenizer with letters for a vocabulary, whose end token is END."""
    letters = ["!", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    assert vocab["<|endoftext|>"] == END
    hf().CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)


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


def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Take the network away; returns a function that puts a folder into the hub's cache."""
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def add(name: str, folder: Path) -> None:
        place = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / "abc")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("abc")

    return add
