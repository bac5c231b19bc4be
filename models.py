"""The scoring model: CLIP, how much of it is trained, and two heads on its embeddings.

Shapes: B images, P distinct prompts, N tokens, D tower width, E embedding, S pixels per side.
Scores are label units: 0..1 spans the data set's MOS scale. Nothing is clamped inside the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

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

    def __init__(self, clip: nn.Module, heads: nn.Module, *, embed_dim: int, predict_rationale: bool = False) -> None:
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
        image_BE = self.encode_image(images_B3SS)
        text_BE = self.encode_text(tokens_PN)[prompt_of_B] if tokens_PN is not None else None
        return self.score(image_BE, text_BE)

    def train(self, mode: bool = True) -> ScoreModel:
        """As usual, but wholly frozen parts stay in eval mode: no dropout, no moving statistics."""
        super().train(mode)
        for module in self.clip.modules():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self


def build_model(
    clip: nn.Module,
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
    sizes = {"hidden_q": hidden_q, "hidden_c": hidden_c, "dropout": dropout}
    heads: nn.Module
    if residual:
        heads = ResidualHeads(embed_dim, scale_q=scale_q, scale_c=scale_c, **sizes)
    else:
        heads = PlainHeads(embed_dim, refinement=Refinement(**refinement) if refinement else None, **sizes)
    return ScoreModel(clip, heads, embed_dim=embed_dim, predict_rationale=predict_rationale)


def score_batch(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The scores of a batch that carries `images_B3SS`, `tokens_PN` and `prompt_of_B`."""
    scores = model(batch.images_B3SS, batch.tokens_PN, batch.prompt_of_B)
    return {task: scores[task] for task in ("q", "c") if task in scores}


def trims_exactly(text: nn.Module) -> bool:
    """Whether padding after the end token cannot matter: causal attention and pooling at the end token."""
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and text.cls_emb is None
        and not text.use_pad_mask
        and text.pool_type in ("argmax", "eos")
    )


def encode_tokens(clip: nn.Module, tokens_PN: Tensor) -> Tensor:
    """(P, N) token ids -> (P, E), computed only up to the longest prompt where that is exact."""
    text = clip.text
    if not trims_exactly(text):
        return clip.encode_text(tokens_PN)
    length = int((tokens_PN != 0).sum(dim=1).max())
    tokens_PN = tokens_PN[:, :length]
    x_PND = text.token_embedding(tokens_PN) + text.positional_embedding[:length]
    for block in text.transformer.resblocks:
        x_PND = block(x_PND, attn_mask=text.attn_mask[:length, :length])
    pooled_PD = text_global_pool(text.ln_final(x_PND), tokens_PN, text.pool_type, text.eos_id)
    if isinstance(text.text_projection, nn.Linear):
        return text.text_projection(pooled_PD)
    return pooled_PD if text.text_projection is None else pooled_PD @ text.text_projection


def tower_blocks(clip: nn.Module) -> dict[str, Sequence[nn.Module]]:
    """The transformer blocks of both towers. Raises ValueError for towers without such blocks."""
    towers = {"image": clip.visual, "text": clip.text}
    for name, tower in towers.items():
        if not hasattr(getattr(tower, "transformer", None), "resblocks"):
            raise ValueError(
                f"--partial_freeze: the {name} tower of this model ({type(tower).__name__}) has no plain transformer "
                "blocks; use --freeze_clip or full fine-tuning"
            )
    return {name: tower.transformer.resblocks for name, tower in towers.items()}


def freeze_backbone(clip: nn.Module, *, everything: bool = False, num_layers: int | None = None) -> None:
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
        raise ValueError(
            f"--freeze_layers {num_layers}: this image tower has {depth} blocks; "
            f"recommended for it: {depth * 2 // 3}-{depth * 5 // 6}"
        )
    visual, text = clip.visual, clip.text
    embeddings = [visual.conv1, visual.ln_pre, text.token_embedding]
    for module in [*embeddings, *blocks["image"][:num_layers], *blocks["text"][:num_layers]]:
        module.requires_grad_(False)
    for table in (visual.class_embedding, visual.positional_embedding, text.positional_embedding):
        table.requires_grad_(False)


def count_parameters(model: ScoreModel) -> dict[str, tuple[int, int]]:
    """{"image tower": (trained, frozen), "text tower": ..., "heads": ...} numbers of parameters."""
    parts = {"image tower": [model.clip.visual], "text tower": [model.clip.text], "heads": [model.heads]}
    if model.rationale is not None:
        parts["heads"].append(model.rationale)
    counts = {}
    for name, modules in parts.items():
        sizes = [(p.numel(), p.requires_grad) for module in modules for p in module.parameters()]
        trained = sum(size for size, grad in sizes if grad)
        counts[name] = (trained, sum(size for size, _ in sizes) - trained)
    return counts
