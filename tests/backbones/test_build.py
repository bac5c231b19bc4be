"""`build`: which sizes and kinds of CLIP are refused."""

from __future__ import annotations

import open_clip
import pytest
from small_clips import SMALL, refusal

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
