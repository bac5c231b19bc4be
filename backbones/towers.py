"""The two towers of a CLIP in stages: entered, left and cached between any two blocks.

A block is a transformer's block or a stage of a convolutional network.

Shapes: B images, P distinct prompts, N tokens, D tower width, E embedding, S pixels per side, C channels, H and W the
height and width of a feature map, F statistics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    PatchDropout,
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# What follows a tower's last block, in open_clip's, timm's and Hugging Face's towers.
TOP = (
    r"(trunk\.)?(ln_post|ln_final|proj|text_projection|head|norm|fc_norm|attn_pool|attnpool)\b|trunk\.(conv_head|bn2)\b"
    r"|transformer\.pooler\b"
)
# Its blocks, by number; those of a ResNet count from 1.
BLOCK = r"(?:transformer\.|trunk\.)?(?:resblocks|blocks|stages|encoder\.layer|layers)\.(\d+)\.|(?:trunk\.)?layer(\d+)\."

STATISTICS_EPS = 1e-8  # of the variance, whose root has no slope at 0

Observer = Callable[[int, Tensor], object]  # is given the number of a block, and what leaves it


def trims_exactly(text: nn.Module) -> bool:
    """Whether padding after the end token cannot matter: causal attention and pooling at the end token."""
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and text.cls_emb is None
        and not text.use_pad_mask
        and text.pool_type in ("argmax", "eos")
    )


class Convolutions(NamedTuple):
    """A convolutional tower, taken apart."""

    stem: Callable[[Tensor], Tensor]  # pixels (B, 3, S, S) -> what enters the first stage (B, C, H, W)
    stages: Sequence[nn.Module]
    top: Callable[[Tensor], Tensor]  # what leaves the last stage -> (B, E)


def convolutions(tower: Any) -> Convolutions | None:
    """The parts of a ResNet of open_clip's, or of a ResNet, ConvNeXt or EfficientNet of timm's; None for all others."""
    if isinstance(tower, ModifiedResNet):
        return Convolutions(tower.stem, layers_of(tower), tower.attnpool)
    trunk = tower.trunk if isinstance(tower, TimmModel) else None
    if isinstance(trunk, EfficientNet):
        return Convolutions(
            lambda x: trunk.bn1(trunk.conv_stem(x)),
            list(trunk.blocks),
            lambda x: tower.head(trunk.forward_head(trunk.bn2(trunk.conv_head(x)))),
        )
    if isinstance(trunk, ResNet):
        return Convolutions(
            lambda x: trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x)))),
            layers_of(trunk),
            lambda x: tower.head(trunk.forward_head(x)),
        )
    if isinstance(trunk, ConvNeXt):
        return Convolutions(trunk.stem, list(trunk.stages), lambda x: tower.head(trunk.forward_head(trunk.norm_pre(x))))
    return None


def layers_of(network: Any) -> Sequence[nn.Module]:
    """The four stages of a ResNet."""
    return network.layer1, network.layer2, network.layer3, network.layer4


def staged_blocks(tower: nn.Module) -> Sequence[nn.Module]:
    """The blocks between which a tower can be entered; none if it is of a kind that can only be run as a whole."""
    if parts := convolutions(tower):
        return parts.stages
    if isinstance(tower, VisionTransformer) or trims_exactly(tower):
        transformer = cast(Any, tower).transformer
        return transformer.resblocks if transformer.batch_first else ()
    return ()


def num_stages(tower: nn.Module) -> int:
    """Stages of a tower: each block is one, the first with the embeddings; the last is pooling and projection."""
    return len(staged_blocks(tower)) + 1


def activation_bytes(tower: nn.Module, dtype: torch.dtype) -> float:
    """About how many bytes the trained blocks of an image tower keep for the backward pass of one image; 0 if unknown.

    A block keeps about 17 values for each of N tokens and D channels where attention is fused: what enters its two
    norms, four projections and activation (two of them 4 D wide), and queries, keys and values. QuickGELU, being two
    operations, keeps 4 more. Under autocast norms see float32, which is a tenth more than this.
    """
    blocks = [block for block in staged_blocks(tower) if any(p.requires_grad for p in block.parameters())]
    if not blocks or convolutions(tower):
        return 0
    num_tokens, width = cast(Any, tower).positional_embedding.shape
    num_values = 21 if any(isinstance(part, QuickGELU) for part in blocks[0].modules()) else 17
    return num_values * len(blocks) * num_tokens * width * dtype.itemsize


def block_of(name: str) -> int | None:
    """The block (from 0) of a parameter, by its name within a tower; -1 for embeddings and stem, None for the top."""
    if re.match(TOP, name):
        return None
    block = re.match(BLOCK, name)
    return -1 if block is None else int(block[1]) if block[1] else int(block[2]) - 1


def depth_of(tower: nn.Module) -> int:
    """How many blocks a tower has, whether it can be entered between them or not."""
    return 1 + max((place for name, _ in tower.named_parameters() if (place := block_of(name)) is not None), default=-1)


def stage_of(name: str, depth: int) -> int:
    """The stage (from 0) of a parameter, by its name within a tower that can be entered between `depth` blocks."""
    place = block_of(name)
    return depth if depth == 0 or place is None else max(0, place)


def frozen_stages(tower: nn.Module) -> int:
    """How many stages in front have nothing to train and nothing random: what leaves them never changes."""
    depth = len(staged_blocks(tower))
    trained = [stage_of(name, depth) for name, parameter in tower.named_parameters() if parameter.requires_grad]
    if trained and isinstance(getattr(tower, "patch_dropout", None), PatchDropout):
        return 0
    return min(trained, default=depth + 1)


def stage_state(tower: nn.Module, num: int) -> dict[str, Tensor]:
    """Weights and buffers of the first `num` stages."""
    depth = len(staged_blocks(tower))
    return {name: value for name, value in tower.state_dict().items() if stage_of(name, depth) < num}


def observed_blocks(visual: nn.Module) -> list[int]:
    """The blocks of an image tower, from 0, whose output tells of quality: see `statistics_of`.

    Each stage of a convolutional network; about every sixth of a transformer's depth, but for its end. None of a tower
    that can only be run as a whole.
    """
    depth = len(staged_blocks(visual))
    if convolutions(visual):
        return list(range(depth))
    step = max(1, round(depth / 6))
    return list(range(step - 1, depth - 1, step))


def num_statistics(visual: Any) -> int:
    """How many numbers F the statistics of all observed blocks are."""
    observed = observed_blocks(visual)
    if not observed or not convolutions(visual):
        return 2 * len(observed) * (visual.positional_embedding.shape[1] if observed else 0)
    was_training = visual.training
    with torch.no_grad():
        black = torch.zeros(1, 3, 64, 64, device=next(visual.parameters()).device)
        _, statistics_BF = run_observed(visual.eval(), black, 0, len(observed))
    visual.train(was_training)
    return statistics_BF.shape[1]


def statistics_of(x: Tensor) -> Tensor:
    """Mean and standard deviation over space, in float32: (B, C, H, W) or tokens (B, 1 + N, D) -> (B, 2C) or (B, 2D).

    What a picture's distortions change, and what the last layers, trained to name what it shows, have let go: Su et
    al., "Blindly assess image quality in the wild guided by a self-adaptive hyper network", CVPR 2020, read local
    features of each stage for it.
    """
    space = x.float().flatten(2) if x.ndim == 4 else x[:, 1:].float().transpose(1, 2)
    variance, mean = torch.var_mean(space, dim=2, correction=0)
    return torch.cat([mean, (variance + STATISTICS_EPS).sqrt()], dim=1)


def run_observed(
    visual: Any, x: Tensor, start: int, stop: int, *, with_statistics: bool = True
) -> tuple[Tensor, Tensor]:
    """As `run_image`, with the statistics (B, F) of the observed blocks among these stages, in their order.

    Args:
        with_statistics: False gives none, (B, 0).
    """
    observed = set(observed_blocks(visual)) if with_statistics else set()
    found: list[Tensor] = []

    def observe(number: int, x: Tensor) -> None:
        if number in observed:
            found.append(statistics_of(x))

    num_images = x.shape[0]
    x = run_image(visual, x, start, stop, observe)
    return x, torch.cat(found, dim=1) if found else torch.zeros(num_images, 0, device=x.device)


def run_image(visual: Any, x: Tensor, start: int, stop: int, observe: Observer = lambda number, x: None) -> Tensor:
    """Take images from the entry of stage `start` to that of `stop`; behind the last stage lie unit vectors (B, E).

    Between blocks there are tokens (B, N, D); behind the last block only the pooled one, (B, D), where there is one.
    Between convolutional stages there are feature maps (B, C, H, W).

    Args:
        observe: is called with the number of each block and what leaves it.
    """
    if start == stop:
        return x
    if parts := convolutions(visual):
        return run_convolutions(visual, parts, x, start, stop, observe)
    blocks = staged_blocks(visual)
    if not blocks:
        return F.normalize(visual(x).float(), dim=-1)
    if start == 0:
        x = visual._embeds(x)
    pooled_at_B = torch.zeros(x.shape[0], dtype=torch.long, device=x.device) if pools_one_token(visual) else None
    x = run_blocks(visual.transformer, x, start, stop, pooled_at_B=pooled_at_B, observe=observe)
    if stop <= len(blocks):
        return x
    pooled_BD, _ = visual._pool(x if x.ndim == 3 else x[:, None])
    return F.normalize((pooled_BD if visual.proj is None else pooled_BD @ visual.proj).float(), dim=-1)


def run_convolutions(visual: Any, parts: Convolutions, x: Tensor, start: int, stop: int, observe: Observer) -> Tensor:
    """As `run_image`, of a convolutional tower."""
    recomputes = getattr(getattr(visual, "trunk", visual), "grad_checkpointing", False) and torch.is_grad_enabled()
    if start == 0:
        x = parts.stem(x)
    for number, stage in list(enumerate(parts.stages))[start:stop]:
        x = checkpoint(stage, x, use_reentrant=False) if recomputes else stage(x)
        observe(number, x)
    return x if stop <= len(parts.stages) else F.normalize(parts.top(x).float(), dim=-1)


def run_text(text: Any, x: Tensor, tokens_PN: Tensor | None, start: int, stop: int) -> Tensor:
    """As `run_image`, for prompts cut to N tokens of which none follows the last end token."""
    if start == stop:
        return x
    blocks = staged_blocks(text)
    if not blocks:
        return F.normalize(text(x).float(), dim=-1)
    assert tokens_PN is not None
    end_P = text_global_pool(places_like(tokens_PN), tokens_PN, text.pool_type, text.eos_id)
    if start == 0:
        x = text.token_embedding(x) + text.positional_embedding[: x.shape[1]]
    mask = text.attn_mask[: tokens_PN.shape[1], : tokens_PN.shape[1]]
    pooled_at_P = end_P if pools_one_token(text) else None
    x = run_blocks(text.transformer, x, start, stop, mask=mask, pooled_at_B=pooled_at_P)
    if stop <= len(blocks):
        return x
    x = text.ln_final(x)
    pooled_PD = x if x.ndim == 2 else x[torch.arange(x.shape[0], device=x.device), end_P]
    if isinstance(text.text_projection, nn.Linear):
        pooled_PD = text.text_projection(pooled_PD)
    elif text.text_projection is not None:
        pooled_PD = pooled_PD @ text.text_projection
    return F.normalize(pooled_PD.float(), dim=-1)


def places_like(tokens_PN: Tensor) -> Tensor:
    """(P, N) of the numbers 0..N-1."""
    return torch.arange(tokens_PN.shape[1], device=tokens_PN.device).expand_as(tokens_PN)


def pools_one_token(tower: Any) -> bool:
    """Whether of the last block's output a single token is looked at, so that the block need not compute the others."""
    if type(staged_blocks(tower)[-1]) is not ResidualAttentionBlock:
        return False
    return not isinstance(tower, VisionTransformer) or (tower.pool_type == "tok" and tower.attn_pool is None)


def run_blocks(
    transformer: Any,
    x_BND: Tensor,
    start: int,
    stop: int,
    *,
    mask: Tensor | None = None,
    pooled_at_B: Tensor | None = None,
    observe: Observer = lambda number, x: None,
) -> Tensor:
    """Blocks `start` to `stop` of a transformer, recomputed in the backward pass if it is set so.

    Args:
        mask: (N, N) added to the attention's logits.
        pooled_at_B: where the one token stands that is used of the last block's output, if there is one.
        observe: as `run_image` takes it.

    Returns:
        (B, N, D); behind the last block (B, D) with `pooled_at_B`.
    """
    depth = len(transformer.resblocks)
    step: Any
    arguments: list[Any]
    for number in range(start, min(stop, depth)):
        block = transformer.resblocks[number]
        if number == depth - 1 and pooled_at_B is not None:
            step, arguments = run_last_block, [block, x_BND, pooled_at_B, mask]
        elif type(block) is ResidualAttentionBlock and block._compiled_call_impl is None:
            step, arguments = run_block, [block, x_BND, mask]
        else:
            step, arguments = block, [x_BND, None, None, mask]
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            x_BND = checkpoint(step, *arguments, use_reentrant=False)
        else:
            x_BND = step(*arguments)
        observe(number, x_BND)
    return x_BND


def run_block(block: Any, x_BND: Tensor, mask: Tensor | None) -> Tensor:
    """What the block does by itself, faster: see `tokens_first`."""
    x_BND = x_BND + block.ls_1(block.attention(tokens_first(block.ln_1(x_BND)), attn_mask=mask))
    return x_BND + block.ls_2(block.mlp(block.ln_2(x_BND)))


def tokens_first(x_BND: Tensor) -> Tensor:
    """The same tensor; under autocast laid out in memory as (N, B, D), the shape that nn.MultiheadAttention multiplies.

    Otherwise torch makes N small products of a large one where the weights need no gradient. On a CPU in bf16 it copies
    the weights for each, and a ViT-B-32 takes more than twice as long for an image.
    """
    autocast = torch.is_autocast_enabled(x_BND.device.type)
    return x_BND.transpose(0, 1).contiguous().transpose(0, 1) if autocast else x_BND


def run_last_block(block: Any, x_BND: Tensor, pooled_at_B: Tensor, mask: Tensor | None) -> Tensor:
    """One token of a block's output, (B, D): attention looks from it at all tokens, everything else is for it alone."""
    rows = torch.arange(x_BND.shape[0], device=x_BND.device)
    normed_BND = tokens_first(block.ln_1(x_BND))
    if mask is not None:  # (N, N) -> a row for each image and attention head
        mask = mask[pooled_at_B][:, None].repeat_interleave(block.attn.num_heads, dim=0)
    attended_B1D = block.attention(normed_BND[rows, pooled_at_B][:, None], normed_BND, normed_BND, attn_mask=mask)
    x_B1D = x_BND[rows, pooled_at_B][:, None] + block.ls_1(attended_B1D)
    return (x_B1D + block.ls_2(block.mlp(block.ln_2(x_B1D))))[:, 0]


def compile_blocks(clip: CustomTextCLIP) -> None:
    """Compile each transformer block by itself: blocks of equal shape share the work, weights keep their names."""
    # Both towers share one count: training or not, with gradient or not, and shapes, each make a variant.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for tower, dynamic in ((clip.visual, None), (clip.text, True)):  # the number and length of prompts changes
        for block in staged_blocks(tower):
            block.compile(dynamic=dynamic)
