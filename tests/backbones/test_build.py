"""`build`: which sizes and kinds of CLIP are refused."""

from __future__ import annotations

import open_clip
import pytest
import torch
from small_clips import SMALL, refusal
from torch import nn

from backbones import build
from backbones.names import resolve


@pytest.fixture
def small_name(monkeypatch) -> str:
    """A name under which open_clip knows the architecture of `reference`."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-CLIP", SMALL)
    return "Small-CLIP"


@pytest.mark.parametrize(("image_size", "near"), [(30, 32), (33, 32), (3, 8)])
def test_an_image_size_that_patches_cannot_tile_is_refused_with_a_near_one(small_name, image_size, near):
    message = refusal(small_name, "none", image_size=image_size)
    assert f"--image_size {image_size}" in message
    assert "patch size 8" in message and message.endswith(f"as {near}")


def test_coca_is_refused():
    with pytest.raises(ValueError, match="CoCa") as error:
        build.build_clip(resolve("coca_ViT-B-32", "none").config, image_size=224)
    assert "\n" not in str(error.value)


DRAWN = {
    "nn.Linear": lambda: nn.Linear(5, 5).weight,
    "nn.Embedding": lambda: nn.Embedding(5, 5).weight,
    "nn.init.normal_": lambda: nn.init.normal_(torch.full((5,), 9.0)),
    "nn.init.trunc_normal_": lambda: nn.init.trunc_normal_(torch.full((5,), 9.0)),
    "nn.init.xavier_uniform_": lambda: nn.init.xavier_uniform_(torch.full((5, 5), 9.0)),
    "Tensor.uniform_": lambda: torch.full((5,), 9.0).uniform_(1, 2),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_weights_that_will_be_overwritten_are_not_drawn(draw):
    before = torch.get_rng_state()
    with build.UndrawnWeights():
        undrawn = draw()
    assert torch.equal(undrawn, torch.zeros_like(undrawn)) and torch.equal(torch.get_rng_state(), before)
    assert draw().std() > 0 and not torch.equal(torch.get_rng_state(), before)  # outside, they are


def test_weights_that_are_not_random_are_as_ever_where_none_is_drawn():
    with build.UndrawnWeights():
        assert torch.equal(nn.LayerNorm(3).weight, torch.ones(3))
        assert torch.equal(nn.init.constant_(torch.zeros(3), 7), torch.full((3,), 7.0))
