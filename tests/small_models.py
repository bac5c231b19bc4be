"""Small models on a small CLIP, and a batch for them. No tests: these import it."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import nn

import models
from backbones.freezing import add_lora

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


BATCH = (images(4), prompts(2, 5)[:, :6], torch.tensor([0, 1, 1, 0]))


def lora_model(num_layers: int | None = None, **changes: Any) -> models.ScoreModel:
    model = build_model(**changes)
    add_lora(model.clip, 2, num_layers=num_layers)
    return model
