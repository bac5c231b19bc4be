"""The scoring model: CLIP with two heads on its embeddings, and what a checkpoint says of it.

Shapes: B images, V views of each, P distinct prompts, K levels, N tokens, E embedding, F stage statistics, X = E + F,
S pixels per side. Where each image has several views, they stand in a dimension behind B.
Scores are label units: 0..1 spans the data set's MOS scale. Nothing is clamped inside the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from open_clip import CustomTextCLIP
from torch import Tensor, nn

from backbones import download
from backbones.loading import rebuild_clip, size_description
from backbones.towers import frozen_stages, num_stages, run_observed, run_text
from backbones.verify import refuse_larger
from configs import OPTIONS
from storage import json_files
from storage.json_files import NUMBER
from training import checkpoints

Weights = tuple[ArrayLike, float]  # of a linear base term: (D,) and its bias

EXTRA_PREFIX = "score_"
# Five texts of quality, and of agreement with the prompt; the worst first.
LEVEL_TEXTS = {
    "quality": [f"a photo of {level} quality" for level in ("bad", "poor", "fair", "good", "perfect")],
    "consistency": [
        f"a photo that {level} matches '{{prompt}}'" for level in ("badly", "poorly", "fairly", "well", "perfectly")
    ],
}
NUM_CONSISTENCY_TOKENS = 3  # image, text and coarse score: what the refinement transformer reads

DESCRIPTION = {  # of a checkpoint
    "clip": {
        "model_cfg": {"embed_dim": int, "vision_cfg": {}, "text_cfg": {}},
        "preprocess_cfg": {"mean": [NUMBER, NUMBER, NUMBER], "std": [NUMBER, NUMBER, NUMBER]},
    },
    "image_size": int,
    "model": {"scale_q": NUMBER, "scale_c": NUMBER, "hidden_q": int, "hidden_c": int, "dropout": NUMBER},
    "scales": {str: {"low": NUMBER, "high": NUMBER}},
}
# What `build_model` is to take for what an older checkpoint does not tell.
OLDER = {"stage_width": 0, "base": "cosine", "kernel_images": 0}
# What building from values of the wrong kind raises, beside ValueError.
BUILD_ERRORS = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError)


def mlp(dim_in: int, dim_hidden: int, dropout: float, *, zero_last: bool) -> nn.Sequential:
    """(B, dim_in) -> (B, 1); with `zero_last` it starts as exactly zero."""
    last = nn.Linear(dim_hidden, 1)
    if zero_last:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(dim_in, dim_hidden), nn.GELU(), nn.Dropout(dropout), last)


def joint_features(image_BX: Tensor, text_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings, the image's with its stage statistics -> [image, text, cos, stages] (B, X + E + 1) and cos (B, 1)."""
    image_BE, stages_BF = parted(image_BX, text_BE.shape[-1])
    cos_B1 = (image_BE * text_BE).sum(dim=-1, keepdim=True)
    return torch.cat([image_BE, text_BE, cos_B1, stages_BF], dim=-1), cos_B1


def parted(image_BX: Tensor, embed_dim: int) -> tuple[Tensor, Tensor]:
    """An image's unit embedding (B, E) and its stage statistics (B, F)."""
    return image_BX[..., :embed_dim], image_BX[..., embed_dim:]


def expected_level(image_BE: Tensor, levels_KE: Tensor, temperature: Tensor) -> Tensor:
    """Expectation (B, 1) over levels 0..1 whose probabilities are a softmax over cosines, as in CLIP's own training.

    Args:
        levels_KE: embedded texts of the levels, the lowest first, (K, E) for all images or (B, K, E) for each.
        temperature: () the factor on the cosines.

    Source: Wang et al., "Exploring CLIP for assessing the look and feel of images", AAAI 2023, with two levels;
    Zhang et al., "Blind image quality assessment via vision-language correspondence" (LIQE), CVPR 2023, with five.
    """
    cos_BK = (image_BE[:, None] * levels_KE).sum(dim=-1)
    values_K = torch.linspace(0, 1, levels_KE.shape[-2], device=image_BE.device)
    return ((temperature * cos_BK).softmax(dim=-1) * values_K).sum(dim=-1, keepdim=True)


class KernelBase(nn.Module):
    """What stage statistics tell of quality and consistency: sum_i w_i exp(-gamma |stages - stages_i|^2).

    Fitted by `evaluation.ridge.fit_kernel` to L training images, and never trained.
    """

    def __init__(self, num_images: int, stage_width: int) -> None:
        super().__init__()
        # No buffers: several processes would send each other those in every step.
        self.places, self.weights, self.gamma, self.bias_q = (
            nn.Parameter(torch.zeros(shape), requires_grad=False)
            for shape in ((num_images, stage_width), (2, num_images), (), ())
        )

    @torch.no_grad()
    def set(self, places: ArrayLike, gamma: float, weights: Mapping[str, tuple[ArrayLike, float]]) -> None:
        """Take a fitted kernel (L', F) of at most L images, and the weights (L',) and bias of q and c."""
        places = torch.as_tensor(np.asarray(places))
        for parameter in self.parameters():
            parameter.zero_()
        self.places[: len(places)] = places
        self.gamma.fill_(gamma)
        for row, task in enumerate(("q", "c")):
            if task in weights:
                self.weights[row, : len(places)] = torch.as_tensor(np.asarray(weights[task][0]))
        if "q" in weights:
            self.bias_q.fill_(weights["q"][1])

    def forward(self, stages_BF: Tensor, row: int) -> Tensor:
        """(B, F) -> (B,): quality in row 0, in row 1 what consistency has beside the cosine."""
        apart_BL = stages_BF.square().sum(1)[:, None] + self.places.square().sum(1) - 2 * stages_BF @ self.places.T
        return torch.exp(-self.gamma * apart_BL.clamp(min=0)) @ self.weights[row] + (self.bias_q if row == 0 else 0.0)


class ResidualHeads(nn.Module):
    """score = what CLIP already knows + small bounded learned delta.

        quality      q = sigmoid(w . [image, stages] + b)    + scale_q * tanh(MLP([image, stages]))
        consistency  c = w . [(cos + 1) / 2, image, text, image * text, stages] + b
                                                             + scale_c * tanh(MLP([image, text, cos, stages]))

    With `base` "cosine" consistency starts from a * (cos + 1) / 2 + b. With "kernel" it does too, and `base_kernel` is
    added to it and is all that quality starts from; `ScoreModel.score` adds it, once for all views of an image. With a
    `temperature` both base terms are a * level + b, `level` being the `expected_level` of five texts. The deltas start
    at exactly zero, so a fresh model is its base.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        scale_q: float,
        scale_c: float,
        hidden_q: int,
        hidden_c: int,
        dropout: float,
        temperature: float | None = None,
        stage_width: int = 0,
        base: str = "cosine",
        kernel_images: int = 0,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.scale_q = scale_q
        self.scale_c = scale_c
        width = embed_dim + stage_width
        is_kernel = base == "kernel" and temperature is None
        self.base_kernel = KernelBase(kernel_images, stage_width) if is_kernel else None
        self.base_q = None if is_kernel else nn.Linear(width if temperature is None else 1, 1)
        self.is_probe = base == "probe" and temperature is None
        self.base_c = nn.Linear(1 + 2 * embed_dim + width if self.is_probe else 1, 1)
        self.temperature = None if temperature is None else nn.Parameter(torch.tensor(temperature))
        if self.base_q is not None and temperature is not None:
            nn.init.ones_(self.base_q.weight)
            nn.init.zeros_(self.base_q.bias)
        nn.init.zeros_(self.base_c.weight)
        nn.init.ones_(self.base_c.weight[:, :1])
        nn.init.zeros_(self.base_c.bias)
        self.delta_q = mlp(width, hidden_q, dropout, zero_last=True)
        self.delta_c = mlp(embed_dim + 1 + width, hidden_c, dropout, zero_last=True)

    @torch.no_grad()
    def set_base(self, quality: Weights | None, consistency: Weights | None) -> None:
        """Start from fitted base terms, weights and bias, see `evaluation.probes.Base`; None leaves one as it is.

        Consistency may be fitted to the first features alone: the others count for nothing then.
        """
        for layer, fitted in ((self.base_q, quality), (self.base_c, consistency)):
            if fitted is not None and layer is not None:
                weights = torch.from_numpy(np.atleast_2d(np.asarray(fitted[0])))
                layer.weight.zero_()
                layer.weight[:, : weights.shape[1]] = weights
                layer.bias.fill_(fitted[1])

    def quality(self, image_BX: Tensor, levels_KE: Tensor | None = None) -> Tensor:
        """(B, X), with a temperature also (K, E) -> (B,)."""
        if self.base_q is None:
            base_B1 = torch.zeros_like(image_BX[:, :1])
        elif self.temperature is None:
            base_B1 = torch.sigmoid(self.base_q(image_BX))
        else:
            image_BE, _ = parted(image_BX, self.embed_dim)
            base_B1 = self.base_q(expected_level(image_BE, cast(Tensor, levels_KE), self.temperature))
        return (base_B1 + self.scale_q * torch.tanh(self.delta_q(image_BX))).squeeze(-1)

    def consistency(self, image_BX: Tensor, text_BE: Tensor, levels_BKE: Tensor | None = None) -> Tensor:
        """(B, X), (B, E), with a temperature also (B, K, E) -> (B,)."""
        features, cos_B1 = joint_features(image_BX, text_BE)
        image_BE, stages_BF = parted(image_BX, self.embed_dim)
        known = (cos_B1 + 1) / 2
        if self.temperature is not None:
            known = expected_level(image_BE, cast(Tensor, levels_BKE), self.temperature)
        elif self.is_probe:
            known = torch.cat([known, image_BE, text_BE, image_BE * text_BE, stages_BF], dim=-1)
        return (self.base_c(known) + self.scale_c * torch.tanh(self.delta_c(features))).squeeze(-1)


class ResidualHead(nn.Module):
    """A further score of the image: sigmoid(w . image + b) + scale * tanh(MLP(image)), as quality."""

    def __init__(self, width: int, *, scale: float, hidden: int, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.base = nn.Linear(width, 1)
        self.delta = mlp(width, hidden, dropout, zero_last=True)

    @torch.no_grad()
    def set_base(self, fitted: Weights) -> None:
        """Start from fitted weights (X,) and bias."""
        self.base.weight.copy_(torch.from_numpy(np.atleast_2d(np.asarray(fitted[0]))))
        self.base.bias.fill_(fitted[1])

    def forward(self, image_BX: Tensor) -> Tensor:
        """(B, X) -> (B,)."""
        return (torch.sigmoid(self.base(image_BX)) + self.scale * torch.tanh(self.delta(image_BX))).squeeze(-1)


class PlainHead(nn.Module):
    """A further score of the image, learned from nothing."""

    def __init__(self, width: int, *, hidden: int, dropout: float) -> None:
        super().__init__()
        self.head = mlp(width, hidden, dropout, zero_last=False)

    def forward(self, image_BX: Tensor) -> Tensor:
        """(B, X) -> (B,)."""
        return torch.sigmoid(self.head(image_BX)).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Sizes of the transformer that corrects the coarse consistency score."""

    layers: int
    heads: int
    dim: int


class PlainHeads(nn.Module):
    """Sigmoid heads that learn both scores from nothing; optionally a transformer refines the coarse consistency."""

    def __init__(
        self,
        embed_dim: int,
        *,
        hidden_q: int,
        hidden_c: int,
        dropout: float,
        refinement: Refinement | None = None,
        stage_width: int = 0,
    ) -> None:
        super().__init__()
        self.head_q = mlp(embed_dim + stage_width, hidden_q, dropout, zero_last=False)
        self.head_c = mlp(2 * embed_dim + 1 + stage_width, hidden_c, dropout, zero_last=False)
        self.refine = ConsistencyRefiner(embed_dim, refinement, dropout) if refinement else None

    def quality(self, image_BX: Tensor, levels_KE: Tensor | None = None) -> Tensor:
        """(B, X) -> (B,)."""
        return torch.sigmoid(self.head_q(image_BX)).squeeze(-1)

    def consistency(self, image_BX: Tensor, text_BE: Tensor, levels_BKE: Tensor | None = None) -> Tensor:
        """(B, X), (B, E) -> (B,)."""
        features, _ = joint_features(image_BX, text_BE)
        logit_B1 = self.head_c(features)
        if self.refine is not None:
            image_BE, _ = parted(image_BX, text_BE.shape[-1])
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


class Embeddings(NamedTuple):
    """What CLIP makes of images and their texts: unit vectors; behind an image's stand its stage statistics."""

    image: Tensor  # (B, X); (B, V, X) with several views
    text: Tensor | None = None  # (B, E) of the prompts
    levels_q: Tensor | None = None  # (K, E) of the levels of quality
    levels_c: Tensor | None = None  # (B, K, E) of the levels of consistency with each prompt


class ScoreModel(nn.Module):
    """CLIP and heads: pixels and prompts in, label-unit scores out."""

    clip: CustomTextCLIP
    heads: ResidualHeads | PlainHeads
    rationale: nn.Linear | None
    stage_mean: Tensor
    stage_scale: Tensor

    def __init__(
        self,
        clip: CustomTextCLIP,
        heads: ResidualHeads | PlainHeads,
        *,
        embed_dim: int,
        predict_rationale: bool = False,
        extra: Mapping[str, nn.Module] | None = None,
        global_view: bool = False,
        task_gradients: str = "shared",
        stage_width: int = 0,
    ) -> None:
        """See `build_model`."""
        super().__init__()
        self.clip = clip
        self.stage_width = stage_width
        # What the raw statistics are normalised by; a checkpoint without any has none of these.
        self.register_buffer("stage_mean", torch.zeros(stage_width), persistent=stage_width > 0)
        self.register_buffer("stage_scale", torch.ones(stage_width), persistent=stage_width > 0)
        self.heads = heads
        # Behind a prefix, because a module's own attributes, such as "type" or "values", are no keys of a ModuleDict.
        self.extra = nn.ModuleDict({EXTRA_PREFIX + task: head for task, head in (extra or {}).items()})
        self.global_view = global_view
        self.task_gradients = task_gradients
        self.rationale = nn.Linear(2 * embed_dim + 1 + stage_width, embed_dim) if predict_rationale else None

    def encode_image(self, image: Tensor, stage: int = 0, statistics: Tensor | None = None) -> Tensor:
        """What enters the image tower at `stage` (normalised pixels (B, 3, S, S) at 0) -> (B, X), float32.

        The frozen stages in front keep no activations.

        Args:
            statistics: (B, ...) those of the stages before, raw.

        Returns:
            Unit vectors (B, E), and behind them the statistics of all observed blocks (B, F), normalised.
        """
        visual = self.clip.visual
        frozen = max(stage, frozen_stages(visual))
        with torch.no_grad():
            image, early = run_observed(visual, image, stage, frozen, with_statistics=self.stage_width > 0)
        image, late = run_observed(visual, image, frozen, num_stages(visual), with_statistics=self.stage_width > 0)
        parts = [early, late] if statistics is None else [statistics, early, late]
        return torch.cat([image, (torch.cat(parts, dim=-1) - self.stage_mean) / self.stage_scale], dim=-1)

    def freeze_base(self) -> None:
        """Let training leave the base terms as they are: so many weights, fitted to the same images, would over-fit."""
        for heads in (self.heads, *self.extra.values()):
            for name, module in heads.named_children():
                if name.startswith("base"):
                    module.requires_grad_(False)

    @torch.no_grad()
    def set_stage_scaling(self, mean_F: ArrayLike, scale_F: ArrayLike) -> None:
        """What the raw statistics are normalised by: (raw - mean) / scale."""
        self.stage_mean.copy_(torch.as_tensor(np.asarray(mean_F)))
        self.stage_scale.copy_(torch.as_tensor(np.asarray(scale_F)))

    def encode_text(self, text: Tensor, stage: int = 0, tokens_PN: Tensor | None = None) -> Tensor:
        """What enters the text tower at `stage` (token ids (P, N) at 0) -> (P, E) unit vectors, float32.

        Args:
            tokens_PN: the token ids; needed between the first and the last stage.
        """
        frozen = max(stage, frozen_stages(self.clip.text))
        tokens_PN = text if stage == 0 else tokens_PN
        with torch.no_grad():
            text = run_text(self.clip.text, text, tokens_PN, stage, frozen)
        return run_text(self.clip.text, text, tokens_PN, frozen, num_stages(self.clip.text))

    def encode_texts(self, texts: Mapping[str, Any]) -> Tensor:
        """Texts as `encode` takes them: text, text_stage, tokens_PN and prompt_of_B -> (B, E)."""
        return self.encode_text(texts["text"], texts["text_stage"], texts["tokens_PN"])[texts["prompt_of_B"]]

    def encode(
        self,
        image: Tensor,
        text: Tensor | None = None,
        prompt_of_B: Tensor | None = None,
        *,
        image_stage: int = 0,
        statistics: Tensor | None = None,
        text_stage: int = 0,
        tokens_PN: Tensor | None = None,
        num_views: int = 1,
        level_of_K: Tensor | None = None,
    ) -> Embeddings:
        """Images and their texts (as `forward` takes them) -> their embeddings."""
        if num_views > 1:
            image = image.flatten(0, 1)
            statistics = None if statistics is None else statistics.flatten(0, 1)
        image = self.encode_image(image, image_stage, statistics)
        image = image.unflatten(0, (-1, num_views)) if num_views > 1 else image
        if text is None:
            return Embeddings(image)
        text_PE = self.encode_text(text, text_stage, tokens_PN)
        text = text_PE[prompt_of_B]
        if level_of_K is None:
            return Embeddings(image, text)
        return Embeddings(image, text[:, 0], text_PE[level_of_K], text[:, 1:])

    def score(
        self,
        image: Tensor,
        text_BE: Tensor | None = None,
        levels_KE: Tensor | None = None,
        levels_BKE: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `Embeddings` holds -> {"q": (B,), "c": (B,) if there is text, ..., "rationale": (B, E) if predicted}.

        Scores of several views are averaged; with a global view, consistency is judged by that alone.
        In float32 whatever the autocast: half precision would tie scores that differ.
        """
        with torch.autocast(image.device.type, enabled=False):
            for_q = all_c = image
            if self.task_gradients == "stop_q":
                for_q, levels_KE = detached(for_q), detached(levels_KE)
            if self.task_gradients == "stop_c":
                all_c, text_BE, levels_BKE = detached(all_c), detached(text_BE), detached(levels_BKE)
            for_c = self.view_of_content(all_c)
            scores = {"q": averaged(lambda image_BX: self.heads.quality(image_BX, levels_KE), for_q)}
            scores |= {task: averaged(head, image) for task, head in self.extra_heads.items()}
            kernel = getattr(self.heads, "base_kernel", None)
            if kernel is not None:
                scores["q"] = scores["q"] + kernel(self.stages_of(for_q), 0)
            if text_BE is not None:
                scores["c"] = averaged(self.heads.consistency, for_c, text_BE, levels_BKE)
                if kernel is not None:
                    scores["c"] = scores["c"] + kernel(self.stages_of(all_c), 1)
                if self.rationale is not None:
                    content_BX = for_c if for_c.ndim == 2 else for_c.mean(dim=1)
                    scores["rationale"] = self.rationale(joint_features(content_BX, text_BE)[0])
        return scores

    @property
    def extra_heads(self) -> dict[str, nn.Module]:
        """The heads of further scores, by their names."""
        return {name.removeprefix(EXTRA_PREFIX): head for name, head in self.extra.items()}

    def stages_of(self, image: Tensor) -> Tensor:
        """The stage statistics (B, F) of images (B, X), of several views (B, V, X) their mean."""
        return (image if image.ndim == 2 else image.mean(dim=1))[:, image.shape[-1] - self.stage_width :]

    def view_of_content(self, image: Tensor) -> Tensor:
        """What the prompt is compared with: the global view (B, E), the first of several, or all there are."""
        return image[:, 0] if self.global_view and image.ndim == 3 else image

    def forward(
        self, image: Tensor, text: Tensor | None = None, prompt_of_B: Tensor | None = None, **stages: Any
    ) -> dict[str, Tensor]:
        """Score images against their prompts, each distinct prompt encoded once.

        Args:
            image: (B, 3, S, S) normalised pixels, or what enters a later stage of the tower; (B, V, ...) for
                several views.
            text: (P, N) token ids of the distinct prompts, or what enters a later stage; None for quality alone.
            prompt_of_B: (B,) the row of `text` that belongs to each image; with levels (B, 1 + K), those of the
                prompt and of its levels of consistency.
            stages: `image_stage` and the `statistics` of the stages before it (B, ...), `text_stage`, `tokens_PN`,
                `num_views` and `level_of_K` (the rows of `text` that are levels of quality) of `encode`.

        Returns:
            As `score`.
        """
        return self.score(*self.encode(image, text, prompt_of_B, **stages))

    def train(self, mode: bool = True) -> ScoreModel:
        """As usual, but wholly frozen parts stay in eval mode (no dropout), and so do all of CLIP's batch norms.

        Their statistics are part of what the tower has learnt from far more images than a batch holds, and the base
        terms are fitted to what they give; scale and shift are trained.
        """
        super().train(mode)
        if not mode:
            return self
        # Whether a module has a trained parameter anywhere below it; what has no parameters follows its parent.
        is_trained: dict[str, bool] = {}
        for name, parameter in self.clip.named_parameters():
            owner = name
            while owner:
                owner = owner.rpartition(".")[0]
                is_trained[owner] = is_trained.get(owner, False) or parameter.requires_grad
        for name, module in self.clip.named_modules():  # parents first
            is_trained.setdefault(name, is_trained.get(name.rpartition(".")[0], True))
            module.training = is_trained[name] and not isinstance(module, nn.modules.batchnorm._BatchNorm)
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
    extra: Sequence[str] = (),
    prompt_levels: bool = False,
    global_view: bool = False,
    task_gradients: str = "shared",
    stage_width: int = 0,
    base: str = "cosine",
    kernel_images: int = 0,
) -> ScoreModel:
    """A ScoreModel from plain (JSON) arguments, so that a checkpoint can say how it was built.

    Args:
        extra: scores beside quality and consistency; each gets a head like that of quality.
        prompt_levels: the base terms are expectations over five texts.
        global_view: of several views the first is the whole image, and the only one that is compared with the prompt.
        task_gradients: "shared", or "stop_q" or "stop_c", which keeps that score's gradient out of CLIP.
        stage_width: F, how many statistics of the image tower's stages the heads read; 0: none.
        base: "kernel", "probe" or "cosine": what scores start from, see `ResidualHeads`.
        kernel_images: L, how many images a kernel is fitted to.
    """
    sizes: dict[str, Any] = {"hidden_q": hidden_q, "hidden_c": hidden_c, "dropout": dropout, "stage_width": stage_width}
    of_extra: dict[str, Any] = {"hidden": hidden_q, "dropout": dropout}
    heads: ResidualHeads | PlainHeads
    further: dict[str, nn.Module]
    if residual:
        temperature = float(clip.logit_scale.detach().exp()) if prompt_levels else None
        start: dict[str, Any] = {"temperature": temperature, "base": base, "kernel_images": kernel_images}
        heads = ResidualHeads(embed_dim, scale_q=scale_q, scale_c=scale_c, **start, **sizes)
        further = {task: ResidualHead(embed_dim + stage_width, scale=scale_q, **of_extra) for task in extra}
    else:
        heads = PlainHeads(embed_dim, refinement=Refinement(**refinement) if refinement else None, **sizes)
        further = {task: PlainHead(embed_dim + stage_width, **of_extra) for task in extra}
    return ScoreModel(
        clip,
        heads,
        embed_dim=embed_dim,
        predict_rationale=predict_rationale,
        extra=further,
        global_view=global_view,
        task_gradients=task_gradients,
        stage_width=stage_width,
    )


def averaged(score: Callable[..., Tensor], image: Tensor, *others: Tensor | None) -> Tensor:
    """Scores (B,) of embeddings (B, X), with what belongs to each; of several views (B, V, X) their mean."""
    if image.ndim == 2:
        return score(image, *others)
    num_views = image.shape[1]
    repeated = (None if other is None else other.repeat_interleave(num_views, dim=0) for other in others)
    return score(image.flatten(0, 1), *repeated).unflatten(0, (-1, num_views)).mean(dim=1)


def detached(x: Any) -> Any:
    """A tensor without its history; None stays None."""
    return None if x is None else x.detach()


def score_batch(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The scores of a batch that carries a model's arguments as `inputs`."""
    scores = model(**batch.inputs)
    return {task: values for task, values in scores.items() if task != "rationale"}


def embed_batch(model: ScoreModel, batch: Any) -> dict[str, Tensor]:
    """What CLIP itself knows of a batch.

    Returns:
        "image" (B, X), the mean over views; with prompts "text" (B, E), "cos" (B,) and, with a global view, "content"
        (B, X), that view alone; with levels "level_q" and "level_c" (B,), what they expect, on 0..1.
    """
    known = model.encode(**batch.inputs)
    views = known.image if known.image.ndim == 3 else known.image[:, None]
    found = {"image": views.mean(dim=1)}
    if known.text is not None:
        content = model.view_of_content(known.image)
        found["text"] = known.text
        found["cos"] = averaged(lambda *pair: joint_features(*pair)[1].squeeze(-1), content, known.text)
        if model.global_view:
            found["content"] = content
    temperature = getattr(model.heads, "temperature", None)
    if temperature is not None:

        def level(image_BX: Tensor, levels: Tensor | None) -> Tensor:
            image_BE, _ = parted(image_BX, image_BX.shape[-1] - model.stage_width)
            return expected_level(image_BE, cast(Tensor, levels), temperature).squeeze(-1)

        found["level_q"] = averaged(lambda image_BX: level(image_BX, known.levels_q), known.image)
        found["level_c"] = averaged(level, content, known.levels_c)
    return found


def count_parameters(model: ScoreModel) -> dict[str, tuple[int, int]]:
    """{"image tower": (trained, frozen), "text tower": ..., "heads": ...} numbers of parameters."""
    parts: dict[str, list[nn.Module]] = {
        "image tower": [model.clip.visual],
        "text tower": [model.clip.text],
        "heads": [model.heads, model.extra],
    }
    if model.rationale is not None:
        parts["heads"].append(model.rationale)
    counts = {}
    for name, modules in parts.items():
        sizes = [(p.numel(), p.requires_grad) for module in modules for p in module.parameters()]
        trained = sum(size for size, grad in sizes if grad)
        counts[name] = (trained, sum(size for size, _ in sizes) - trained)
    return counts


def check_checkpoint(path: Path) -> None:
    """Refuse what does not describe a checkpoint, or a far larger one than there is, before memory is taken for it.

    Raises:
        ValueError: it is no checkpoint or is damaged; one line.
    """
    folder, shapes, description = checkpoints.load_shapes(path)

    def build() -> ScoreModel:
        clip = rebuild_clip(description["clip"], folder, image_size=description["image_size"])
        return build_model(clip, **{**description["model"], "prompt_levels": False})  # which add one number

    try:
        if description.get("program") == "vqa":
            raise ValueError("it is of a run of main.py, which answers by --mode ask")
        if said := json_files.schema_mismatch(description, DESCRIPTION):
            raise ValueError(said)
        OPTIONS["image_size"].check(description["image_size"])
        OPTIONS["test_crops"].check(description.get("test_crops") or None)
        read = [description["model"], description["image_size"], *size_description(description["clip"], folder)]
        refuse_larger(read, shapes, build)
    except (ValueError, *BUILD_ERRORS) as error:
        raise description_error(folder, error) from error


def description_error(folder: Path, error: Exception) -> ValueError:
    """What to raise for a description of something else than the weights, in one line."""
    return ValueError(f"{folder}: the description does not fit the weights ({download.first_line(error, skip=1)})")
