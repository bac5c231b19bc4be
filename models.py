"""The scoring model: CLIP, how much of it is trained, and two heads on its embeddings.

Shapes: B images, P distinct prompts, N tokens, D tower width, E embedding, S pixels per side.
Scores are label units: 0..1 spans the data set's MOS scale. Nothing is clamped inside the graph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from open_clip import CustomTextCLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn.utils import parametrize

# What follows a tower's last block, in open_clip's, timm's and Hugging Face's towers.
TOP = "ln_post|ln_final|proj|text_projection|head|norm|fc_norm|attn_pool|attnpool"
# By depth of the image tower: ViT-B, and ViT-L/14 (at 336 pixels).
RECOMMENDED_FREEZE_LAYERS = {12: "8-10", 24: "18-20 (20-22 at 336 pixels)"}
NUM_CONSISTENCY_TOKENS = 3  # image, text and coarse score: what the refinement transformer reads


def mlp(dim_in: int, dim_hidden: int, dropout: float, *, zero_last: bool) -> nn.Sequential:
    """(B, dim_in) -> (B, 1); with `zero_last` it starts as exactly zero."""
    last = nn.Linear(dim_hidden, 1)
    if zero_last:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(dim_in, dim_hidden), nn.GELU(), nn.Dropout(dropout), last)


def joint_features(image_BE: Tensor, text_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings -> [image, text, cos] (B, 2E + 1) and cos (B, 1)."""
    cos_B1 = (image_BE * text_BE).sum(dim=-1, keepdim=True)
    return torch.cat([image_BE, text_BE, cos_B1], dim=-1), cos_B1


class ResidualHeads(nn.Module):
    """score = what CLIP already knows + small bounded learned delta.

        quality      q = sigmoid(w . image + b)              + scale_q * tanh(MLP(image))
        consistency  c = a * (cos(image, text) + 1) / 2 + b  + scale_c * tanh(MLP([image, text, cos]))

    The deltas start at exactly zero, so a fresh model is its base.
    """

    def __init__(
        self, embed_dim: int, *, scale_q: float, scale_c: float, hidden_q: int, hidden_c: int, dropout: float
    ) -> None:
        super().__init__()
        self.scale_q = scale_q
        self.scale_c = scale_c
        self.base_q = nn.Linear(embed_dim, 1)
        self.base_c = nn.Linear(1, 1)
        nn.init.ones_(self.base_c.weight)
        nn.init.zeros_(self.base_c.bias)
        self.delta_q = mlp(embed_dim, hidden_q, dropout, zero_last=True)
        self.delta_c = mlp(2 * embed_dim + 1, hidden_c, dropout, zero_last=True)

    @torch.no_grad()
    def set_base(self, quality: tuple[ArrayLike, float] | None, consistency: tuple[float, float] | None) -> None:
        """Start from fitted base terms: quality (w (E,), b), consistency (a, b); None leaves one as it is."""
        for layer, fitted in ((self.base_q, quality), (self.base_c, consistency)):
            if fitted is not None:
                layer.weight.copy_(torch.from_numpy(np.atleast_2d(np.asarray(fitted[0]))))
                layer.bias.fill_(fitted[1])

    def quality(self, image_BE: Tensor) -> Tensor:
        """(B, E) -> (B,)."""
        base_B1 = torch.sigmoid(self.base_q(image_BE))
        return (base_B1 + self.scale_q * torch.tanh(self.delta_q(image_BE))).squeeze(-1)

    def consistency(self, image_BE: Tensor, text_BE: Tensor) -> Tensor:
        """(B, E), (B, E) -> (B,)."""
        features, cos_B1 = joint_features(image_BE, text_BE)
        base_B1 = self.base_c((cos_B1 + 1) / 2)
        return (base_B1 + self.scale_c * torch.tanh(self.delta_c(features))).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Sizes of the transformer that corrects the coarse consistency score."""

    layers: int
    heads: int
    dim: int


class PlainHeads(nn.Module):
    """Sigmoid heads that learn both scores from nothing; optionally a transformer refines the coarse consistency."""

    def __init__(
        self, embed_dim: int, *, hidden_q: int, hidden_c: int, dropout: float, refinement: Refinement | None = None
    ) -> None:
        super().__init__()
        self.head_q = mlp(embed_dim, hidden_q, dropout, zero_last=False)
        self.head_c = mlp(2 * embed_dim + 1, hidden_c, dropout, zero_last=False)
        self.refine = ConsistencyRefiner(embed_dim, refinement, dropout) if refinement else None

    def quality(self, image_BE: Tensor) -> Tensor:
        """(B, E) -> (B,)."""
        return torch.sigmoid(self.head_q(image_BE)).squeeze(-1)

    def consistency(self, image_BE: Tensor, text_BE: Tensor) -> Tensor:
        """(B, E), (B, E) -> (B,)."""
        features, _ = joint_features(image_BE, text_BE)
        logit_B1 = self.head_c(features)
        if self.refine is not None:
            logit_B1 = logit_B1 + self.refine(image_BE, text_BE, torch.sigmoid(logit_B1))
        return torch.sigmoid(logit_B1).squeeze(-1)


class ConsistencyRefiner(nn.Module):
    """Image, text and coarse score as three tokens -> a correction of the coarse logit, zero at the start."""

    def __init__(self, embed_dim: int, sizes: Refinement, dropout: float) -> None:
        super().__init__()
        self.embed_image = nn.Linear(embed_dim, sizes.dim)
        self.embed_text = nn.Linear(embed_dim, sizes.dim)
        self.embed_coarse = nn.Linear(1, sizes.dim)
        self.kind = nn.Parameter(0.02 * torch.randn(NUM_CONSISTENCY_TOKENS, sizes.dim))
        layer = nn.TransformerEncoderLayer(
            sizes.dim, sizes.heads, 4 * sizes.dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, sizes.layers, nn.LayerNorm(sizes.dim), enable_nested_tensor=False)
        self.correction = nn.Linear(sizes.dim, 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(self, image_BE: Tensor, text_BE: Tensor, coarse_B1: Tensor) -> Tensor:
        """(B, E), (B, E), (B, 1) -> (B, 1)."""
        embedded = (self.embed_image(image_BE), self.embed_text(text_BE), self.embed_coarse(coarse_B1))
        tokens_BND = torch.stack(embedded, dim=1) + self.kind
        return self.correction(self.encoder(tokens_BND)[:, -1])


class ScoreModel(nn.Module):
    """CLIP and heads: pixels and prompts in, label-unit scores out."""

    clip: CustomTextCLIP
    heads: ResidualHeads | PlainHeads
    rationale: nn.Linear | None

    def __init__(
        self,
        clip: CustomTextCLIP,
        heads: ResidualHeads | PlainHeads,
        *,
        embed_dim: int,
        predict_rationale: bool = False,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.heads = heads
        self.rationale = nn.Linear(2 * embed_dim + 1, embed_dim) if predict_rationale else None

    def encode_image(self, images_B3SS: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, E) unit vectors, float32."""
        return F.normalize(self.clip.encode_image(images_B3SS).float(), dim=-1)

    def encode_text(self, tokens_PN: Tensor) -> Tensor:
        """(P, N) token ids -> (P, E) unit vectors, float32."""
        return F.normalize(encode_tokens(self.clip, tokens_PN).float(), dim=-1)

    def encode(
        self, images_B3SS: Tensor, tokens_PN: Tensor | None, prompt_of_B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Images and their prompts (as `forward` takes them) -> (B, E) and (B, E), or None without prompts."""
        image_BE = self.encode_image(images_B3SS)
        return image_BE, None if tokens_PN is None else self.encode_text(tokens_PN)[prompt_of_B]

    def score(self, image_BE: Tensor, text_BE: Tensor | None) -> dict[str, Tensor]:
        """Unit embeddings -> {"q": (B,), "c": (B,) if there is text, "rationale": (B, E) if predicted}.

        In float32 whatever the autocast: half precision would tie scores that differ.
        """
        with torch.autocast(image_BE.device.type, enabled=False):
            scores = {"q": self.heads.quality(image_BE)}
            if text_BE is not None:
                scores["c"] = self.heads.consistency(image_BE, text_BE)
                if self.rationale is not None:
                    features, _ = joint_features(image_BE, text_BE)
                    scores["rationale"] = self.rationale(features)
        return scores

    def forward(
        self, images_B3SS: Tensor, tokens_PN: Tensor | None = None, prompt_of_B: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Score images against their prompts, each distinct prompt encoded once.

        Args:
            images_B3SS: (B, 3, S, S) normalised pixels.
            tokens_PN: (P, N) distinct prompts; None for quality alone.
            prompt_of_B: (B,) the row of `tokens_PN` that belongs to each image.

        Returns:
            As `score`.
        """
        return self.score(*self.encode(images_B3SS, tokens_PN, prompt_of_B))

    def train(self, mode: bool = True) -> ScoreModel:
        """As usual, but wholly frozen parts stay in eval mode: no dropout, no moving statistics."""
        super().train(mode)
        for module in self.clip.modules():
            trained = [parameter.requires_grad for parameter in module.parameters()]
            if trained and not any(trained):  # what has no parameters follows its parent
                module.eval()
        return self


def build_model(
    clip: CustomTextCLIP,
    *,
    embed_dim: int,
    residual: bool,
    scale_q: float,
    scale_c: float,
    hidden_q: int,
    hidden_c: int,
    dropout: float,
    refinement: Mapping[str, int] | None,
    predict_rationale: bool,
) -> ScoreModel:
    """A ScoreModel from plain (JSON) arguments, so that a checkpoint can say how it was built."""
    heads: ResidualHeads | PlainHeads
    if residual:
        heads = ResidualHeads(
            embed_dim, scale_q=scale_q, scale_c=scale_c, hidden_q=hidden_q, hidden_c=hidden_c, dropout=dropout
        )
    else:
        refine = Refinement(**refinement) if refinement else None
        heads = PlainHeads(embed_dim, hidden_q=hidden_q, hidden_c=hidden_c, dropout=dropout, refinement=refine)
    return ScoreModel(clip, heads, embed_dim=embed_dim, predict_rationale=predict_rationale)


def score_batch(model: ScoreModel, batch: Any) -> dict[str, Tensor]:
    """The scores of a batch that carries `images_B3SS`, `tokens_PN` and `prompt_of_B`."""
    scores = model(batch.images_B3SS, batch.tokens_PN, batch.prompt_of_B)
    return {task: scores[task] for task in ("q", "c") if task in scores}


def embed_batch(model: ScoreModel, batch: Any) -> dict[str, Tensor]:
    """What CLIP itself knows of a batch: "image" (B, E) and, with prompts, "cos" (B,)."""
    image_BE, text_BE = model.encode(batch.images_B3SS, batch.tokens_PN, batch.prompt_of_B)
    if text_BE is None:
        return {"image": image_BE}
    return {"image": image_BE, "cos": (image_BE * text_BE).sum(dim=-1)}


def trims_exactly(text: Any) -> bool:
    """Whether padding after the end token cannot matter: causal attention and pooling at the end token."""
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and text.cls_emb is None
        and not text.use_pad_mask
        and text.pool_type in ("argmax", "eos")
    )


def encode_tokens(clip: CustomTextCLIP, tokens_PN: Tensor) -> Tensor:
    """(P, N) token ids -> (P, E), computed only up to the longest prompt where that is exact."""
    text = clip.text
    if not trims_exactly(text):
        return clip.encode_text(tokens_PN)
    # The last column in use: token 0 is also "!" inside a word, so counting tokens would cut end tokens off.
    length = int((tokens_PN != 0).any(dim=0).nonzero().max()) + 1
    tokens_PN = tokens_PN[:, :length]
    x_PND = text.token_embedding(tokens_PN) + text.positional_embedding[:length]
    for block in text.transformer.resblocks:
        x_PND = block(x_PND, attn_mask=text.attn_mask[:length, :length])
    pooled_PD = text_global_pool(text.ln_final(x_PND), tokens_PN, text.pool_type, text.eos_id)
    if isinstance(text.text_projection, nn.Linear):
        return text.text_projection(pooled_PD)
    return pooled_PD if text.text_projection is None else pooled_PD @ text.text_projection


def tower_blocks(clip: CustomTextCLIP) -> dict[str, Sequence[Any]]:
    """The transformer blocks of both towers. Raises ValueError for towers without such blocks."""
    towers = {"image": clip.visual, "text": clip.text}
    for name, tower in towers.items():
        if not hasattr(getattr(tower, "transformer", None), "resblocks"):
            raise ValueError(
                f"--partial_freeze: the {name} tower of this model ({type(tower).__name__}) has no plain transformer "
                "blocks; use --freeze_clip or full fine-tuning"
            )
    return {name: tower.transformer.resblocks for name, tower in towers.items()}


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
    blocks = tower_blocks(clip)
    depth = len(blocks["image"])
    if num_layers > depth:
        advice = RECOMMENDED_FREEZE_LAYERS.get(depth, f"{depth * 3 // 4}-{depth * 5 // 6}")
        raise ValueError(
            f"--freeze_layers {num_layers}: this image tower has {depth} blocks; recommended for it: {advice}"
        )
    visual, text = clip.visual, clip.text
    embeddings = [visual.conv1, visual.ln_pre, text.token_embedding]
    for module in [*embeddings, *blocks["image"][:num_layers], *blocks["text"][:num_layers]]:
        module.requires_grad_(False)
    for table in (visual.class_embedding, visual.positional_embedding, text.positional_embedding):
        table.requires_grad_(False)


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


def merged_state(model: ScoreModel) -> dict[str, Tensor]:
    """The weights of a model under their plain names, LoRA merged in; the model itself stays as it is."""
    state = {}
    for name, value in model.state_dict().items():
        if ".parametrizations." not in name:
            state[name] = value
        elif name.endswith(".original"):
            owner, _, parameter = name.removesuffix(".original").partition(".parametrizations.")
            state[f"{owner}.{parameter}"] = getattr(model.get_submodule(owner), parameter).detach()
    return state


def merge_lora(model: ScoreModel) -> ScoreModel:
    """Fold LoRA into the weights, in place; returns the model. Deep copies of it can no longer be used after that."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in list(cast(nn.ModuleDict, module.parametrizations)):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def lr_scales(model: ScoreModel, layer_decay: float) -> dict[str, float]:
    """Name of each CLIP parameter -> its share of the learning rate: `layer_decay` per block below the top.

    Final norm and projection get 1, the last block `layer_decay`, the embeddings the least (as in BEiT).
    """
    scales = {}
    for tower in ("visual", "text"):
        names = [name for name, _ in model.named_parameters() if name.startswith(f"clip.{tower}.")]
        places = {name: re.search(r"\.(?:resblocks|blocks)\.(\d+)\.", name) for name in names}
        depth = 1 + max((int(place[1]) for place in places.values() if place), default=-1)
        for name, place in places.items():
            top = re.match(rf"clip\.{tower}\.(trunk\.)?({TOP})\b", name)
            steps = depth - int(place[1]) if place else 0 if top else depth + 1
            scales[name] = layer_decay**steps
    return scales


def count_parameters(model: ScoreModel) -> dict[str, tuple[int, int]]:
    """{"image tower": (trained, frozen), "text tower": ..., "heads": ...} numbers of parameters."""
    parts: dict[str, list[nn.Module]] = {
        "image tower": [model.clip.visual],
        "text tower": [model.clip.text],
        "heads": [model.heads],
    }
    if model.rationale is not None:
        parts["heads"].append(model.rationale)
    counts = {}
    for name, modules in parts.items():
        sizes = [(p.numel(), p.requires_grad) for module in modules for p in module.parameters()]
        trained = sum(size for size, grad in sizes if grad)
        counts[name] = (trained, sum(size for size, _ in sizes) - trained)
    return counts
