"""How much of a CLIP is trained: frozen blocks, LoRA, learning rates by depth.

Shapes: O and I a weight's rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from open_clip import CustomTextCLIP
from torch import Tensor, nn
from torch.nn.utils import parametrize

from backbones import towers

M = TypeVar("M", bound=nn.Module)
# By depth of the image tower: ViT-B, and ViT-L/14 (at 336 pixels).
RECOMMENDED_FREEZE_LAYERS = {12: "8-10", 24: "18-20 (20-22 at 336 pixels)"}


def tower_blocks(clip: CustomTextCLIP) -> dict[str, Sequence[Any]]:
    """The transformer blocks of both towers. Raises ValueError for towers without such blocks."""
    both = {"image": clip.visual, "text": clip.text}
    for name, tower in both.items():
        if not hasattr(getattr(tower, "transformer", None), "resblocks"):
            raise ValueError(
                f"--lora_rank: the {name} tower of this model ({type(tower).__name__}) has no plain transformer "
                "blocks; train it without"
            )
    return {name: tower.transformer.resblocks for name, tower in both.items()}


def freeze_backbone(clip: CustomTextCLIP, *, everything: bool = False, num_layers: int | None = None) -> None:
    """Choose what of CLIP is trained: by default all of it but the contrastive temperature, which no score uses.

    Args:
        everything: train nothing of CLIP.
        num_layers: freeze the embeddings and the first so many blocks of both towers (all blocks of a tower that
            has at most that many); final norm and projection stay trained.

    Raises:
        ValueError: `num_layers` is above the image tower's depth.
    """
    clip.requires_grad_(not everything)
    for scalar in (clip.logit_scale, getattr(clip, "logit_bias", None)):
        if scalar is not None:
            scalar.requires_grad_(False)
    if everything or num_layers is None:
        return
    depth = towers.depth_of(clip.visual)
    for name, tower in {"image": clip.visual, "text": clip.text}.items():
        if not towers.depth_of(tower):
            raise ValueError(
                f"--partial_freeze: the {name} tower of this model ({type(tower).__name__}) has no blocks that are "
                "known here; use --freeze_clip or full fine-tuning"
            )
    if num_layers > depth:
        advice = RECOMMENDED_FREEZE_LAYERS.get(depth, f"{depth * 3 // 4}-{depth * 5 // 6}")
        raise ValueError(
            f"--freeze_layers {num_layers}: this image tower has {depth} blocks; recommended for it: {advice}"
        )
    for tower in (clip.visual, clip.text):
        for name, parameter in tower.named_parameters():
            place = towers.block_of(name)
            if place is not None and place < num_layers:
                parameter.requires_grad_(False)


class LowRank(nn.Module):
    """LoRA (Hu et al., 2022) as a parametrization of a weight (O, I): W + (alpha / r) B A, with alpha = 2 r.

    B starts at zero, so the first step sees the base weight, bit for bit.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """(O, I) -> (O, I)."""
        return weight + 2.0 * (self.b @ self.a).to(weight.dtype)


def add_lora(clip: CustomTextCLIP, rank: int, *, num_layers: int | None) -> None:
    """Train low-rank corrections of the attention and MLP projections instead of CLIP's own weights.

    PyTorch's parametrizations do it, because the attention keeps its projections in one bare parameter.

    Args:
        num_layers: leave the first so many blocks of both towers as they are (None: correct all).
    """
    freeze_backbone(clip, num_layers=num_layers)  # checks the depth
    freeze_backbone(clip, everything=True)
    for blocks in tower_blocks(clip).values():
        for block in list(blocks)[num_layers or 0 :]:
            places = ((block.attn, "in_proj_weight"), (block.attn.out_proj, "weight"))
            for module, name in (*places, (block.mlp.c_fc, "weight"), (block.mlp.c_proj, "weight")):
                parametrize.register_parametrization(module, name, LowRank(getattr(module, name), rank))


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model under their plain names, LoRA merged in; the model itself stays as it is."""
    state = {}
    for name, value in model.state_dict().items():
        if ".parametrizations." not in name:
            state[name] = value
        elif name.endswith(".original"):
            owner, _, parameter = name.removesuffix(".original").partition(".parametrizations.")
            state[f"{owner}.{parameter}"] = getattr(model.get_submodule(owner), parameter).detach()
    return state


def merge_lora(model: M) -> M:
    """Fold LoRA into the weights, in place; returns the model. Deep copies of it can no longer be used after that."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in list(cast(nn.ModuleDict, module.parametrizations)):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Name of each CLIP parameter -> its share of the learning rate: `layer_decay` per block below the top.

    Final norm and projection get 1, the last block `layer_decay`, the embeddings the least (as in BEiT).
    """
    scales = {}
    for tower in ("clip.visual.", "clip.text."):
        names = [name for name, _ in model.named_parameters() if name.startswith(tower)]
        places = {name: towers.block_of(name.removeprefix(tower)) for name in names}
        depth = 1 + max((place for place in places.values() if place is not None), default=-1)
        for name, place in places.items():
            scales[name] = layer_decay ** (0 if place is None else depth - place)
    return scales
