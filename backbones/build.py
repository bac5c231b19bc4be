"""From a description in open_clip's form to a CLIP with random weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backbones.download import OFFLINE_WAYS, first_line
from backbones.towers import convolutions
from backbones.verify import refuse_larger

DRAWING = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
MOST_PATCHES = 100_000  # of an image; some position tables are computed for all of them, whatever weights there are


class UndrawnWeights(TorchFunctionMode):
    """Within it, modules are built with zeros where weights are drawn: for saved ones that overwrite them all."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        if function in DRAWING:
            with torch.no_grad():
                return (arguments[0] if arguments else (named or {})["tensor"]).zero_()
        return function(*arguments, **(named or {}))


def check_size(
    config: dict[str, Any], what: str, shapes: Mapping[str, tuple[int, ...]] | None, *, image_size: int
) -> None:
    """Raise ValueError if a config describes far more than its weights hold; see `verify.refuse_larger`."""
    try:
        refuse_larger(config, shapes, lambda: build_clip(deepcopy(config), image_size=image_size))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def build_clip(config: dict[str, Any], *, image_size: int) -> open_clip.CustomTextCLIP:
    """A randomly initialised CustomTextCLIP; writes `image_size` into the config. Raises ValueError."""
    model_cfg = config["model_cfg"]
    if "multimodal_cfg" in model_cfg:
        raise ValueError("CoCa models are not supported: their text tower is trained to generate, not to embed")
    try:
        vision = model_cfg["vision_cfg"]
        if not re.fullmatch(r"[\w.]*", vision.get("timm_model_name", "")):
            raise AttributeError(f"timm_model_name {vision['timm_model_name']!r} is not one of timm's own")
        patch = vision.get("patch_size", 16)
        if "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int) and image_size % patch:
            near = max(1, round(image_size / patch)) * patch
            raise ValueError(
                f"--image_size {image_size}: must be a multiple of this model's patch size {patch}, as {near}"
            )
        if isinstance(patch, int) and (image_size // patch) ** 2 > MOST_PATCHES:
            raise AttributeError(f"patches of {patch} pixels are more than {MOST_PATCHES} of an image")
        vision["image_size"] = image_size
        plain = {key: value for key, value in deepcopy(model_cfg).items() if key != "custom_text"}
        plain["vision_cfg"]["timm_model_pretrained"] = False
        plain["text_cfg"]["hf_model_pretrained"] = False
        clip = open_clip.CustomTextCLIP(**plain)
        if convolutions(clip.visual):  # in which convolutions are fastest, on CPUs and GPUs
            clip.visual.to(memory_format=torch.channels_last)
        return clip
    except (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError, OSError) as error:
        raise ValueError(f"cannot build a CLIP from its config: {first_line(error)}. {OFFLINE_WAYS}") from error
