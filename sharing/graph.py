"""A scorer as one ONNX graph: pixels and token ids in, scores in MOS units out.

Shapes: B images, V views of each, S pixels per side, P distinct texts, N tokens, K levels.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from backbones import towers
from serving.scorer import Scorer
from sharing.onnx_files import write_onnx
from sources.scores import columns_of

GRAPH_FILE = "scorer.onnx"


class ScoreGraph(nn.Module):
    """All that a scorer does, from pixels and token ids to MOS units clamped to their scale."""

    scale: Tensor
    shift: Tensor
    levels_KE: Tensor | None

    def __init__(self, scorer: Scorer, dtype: torch.dtype) -> None:
        """`dtype`: in which CLIP computes; the heads stay in float32."""
        super().__init__()
        preprocess = scorer.description["clip"]["preprocess_cfg"]
        mean, std = (torch.tensor(preprocess[name]) for name in ("mean", "std"))
        self.register_buffer("scale", std.mul(255).reciprocal().view(3, 1, 1))
        self.register_buffer("shift", (mean / std).view(3, 1, 1))
        self.model = deepcopy(scorer.model).eval()
        self.num_views = scorer.views().count(None)
        self.image_size = scorer.description["image_size"]
        self.scales = scorer.scales
        self.dtype = dtype
        self.num_texts = 1 + len(models.LEVEL_TEXTS["consistency"]) * scorer.has_levels
        levels_KE = None
        if scorer.has_levels:
            tokens = scorer.tokenize(models.LEVEL_TEXTS["quality"])
            with torch.no_grad():
                levels_KE = self.model.encode_text(tokens, 0, tokens)
        self.register_buffer("levels_KE", levels_KE)
        self.text_length = scorer.tokenize([""]).shape[1]
        self.trims = towers.trims_exactly(self.model.clip.text)
        if self.trims:
            # A row more than any text has: torch.export takes a table that is read to its end for one of fixed length.
            text: Any = self.model.clip.text
            longer = nn.functional.pad(text.positional_embedding.detach(), (0, 0, 0, 1))
            text.positional_embedding = nn.Parameter(longer)
            text.attn_mask = nn.functional.pad(text.attn_mask, (0, 1, 0, 1))
        self.model.clip.to(dtype)

    @property
    def reads_text(self) -> bool:
        """Whether there is a score that depends on the prompt."""
        return "c" in self.scales

    @property
    def names(self) -> list[str]:
        """Names of the scores, in the order in which they are returned."""
        return [columns_of(task)[1] for task in self.scales]

    def forward(
        self, pixels: Tensor, tokens: Tensor | None = None, prompt_of_image: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Scores (B,) in MOS units.

        Args:
            pixels: (B, V, S, S, 3) uint8.
            tokens: (P, N) int64 of the distinct texts.
            prompt_of_image: (B, 1) int64, which of the texts is an image's prompt; with levels (B, 1 + K), which are
                its prompt and the levels of consistency with it.
        """
        image = pixels.permute(0, 1, 4, 2, 3).flatten(0, 1).float() * self.scale - self.shift
        image = self.model.encode_image(image.to(self.dtype))
        if self.num_views > 1:
            image = image.unflatten(0, (-1, self.num_views))
        text_BE = levels_BKE = None
        if tokens is not None and prompt_of_image is not None:
            texts = self.model.encode_text(tokens, 0, tokens)[prompt_of_image]
            text_BE, levels_BKE = texts[:, 0], texts[:, 1:]
        scores = self.model.score(image, text_BE, self.levels_KE, levels_BKE)
        mos = (scale.low + scores[task] * (scale.high - scale.low) for task, scale in self.scales.items())
        return tuple(x.clamp(scale.low, scale.high) for x, scale in zip(mos, self.scales.values(), strict=True))

    def example(self) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
        """Inputs of the right shapes, and which of their dimensions may be of any size."""
        size = self.image_size
        images, texts = torch.export.Dim("images", min=1), torch.export.Dim("texts", min=1)
        inputs = {"pixels": torch.zeros(2, self.num_views, size, size, 3, dtype=torch.uint8)}
        free: dict[str, dict[int, Any]] = {"pixels": {0: images}}
        if self.reads_text:
            inputs["tokens"] = torch.ones(3, self.text_length, dtype=torch.long)
            inputs["prompt_of_image"] = torch.zeros(2, self.num_texts, dtype=torch.long)
            free |= {"tokens": {0: texts}, "prompt_of_image": {0: images}}
            if self.trims:
                free["tokens"][1] = torch.export.Dim("tokens", min=2, max=self.text_length)
        return inputs, free


def write_graph(graph: ScoreGraph, folder: Path, precision: str) -> None:
    """Write a graph into a folder. Raises ValueError."""
    towers_of = {type(tower).__name__ for tower in (graph.model.clip.visual, graph.model.clip.text)}
    named = f"--export: {' or '.join(sorted(towers_of))}"
    path = folder / GRAPH_FILE
    write_onnx(graph, *graph.example(), path, precision, outputs=graph.names, named=named, within="clip.")
