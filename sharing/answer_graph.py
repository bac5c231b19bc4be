"""The fine branch of a run of main.py as ONNX: regions and numbers of words in, how likely each answer is out.

Shapes: B questions, I images, N words, E entities, W describing words, M regions, F features, A answers; S pixels per
side, K regions that a CLIP's patches are averaged to.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from answering.task import probabilities
from backbones import towers
from branches.counting import Counter
from branches.fine import FineBranch
from regions.clip_regions import PatchRegions, pooled
from sharing.onnx_files import DTYPES, write_onnx
from vqa.preprocess import MOST_ENTITIES

ANSWERS_FILE, REGIONS_FILE = "answers.onnx", "regions.onnx"
NAMED = "--mode export: this run"


class OnnxGru(nn.Module):
    """A GRU that stays one in the graph: torch.export would write its steps out, for one number of words."""

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        known = dict(gru.named_parameters())
        biases = torch.cat([known["bias_ih_l0"], known["bias_hh_l0"]])
        # ONNX has the gate of what is kept before that of what is reset.
        self.weights = nn.ParameterList(
            x.detach().unflatten(0, (-1, 3, gru.hidden_size))[:, [1, 0, 2]].flatten(0, 2)[None]
            for x in (known["weight_ih_l0"], known["weight_hh_l0"], biases)
        )
        self.input_size, self.hidden_size = gru.input_size, gru.hidden_size

    def forward(self, x_BND: Tensor) -> tuple[Tensor]:
        """(B, N, D) -> (B, N, hidden_size)."""
        x_NBD = x_BND.transpose(0, 1)
        found = torch.onnx.ops.symbolic(
            "GRU",
            (x_NBD, *self.weights),
            {"hidden_size": self.hidden_size, "linear_before_reset": 1},
            dtype=x_NBD.dtype,
            shape=(x_NBD.shape[0], 1, x_NBD.shape[1], self.hidden_size),
            version=14,
        )
        return (found[:, 0].transpose(0, 1),)


class OnnxCounter(nn.Module):
    """A counter that always has as many regions as it looks at, so that their number is fixed in the graph."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter.float()

    def forward(self, attention_BM: Tensor, boxes_BM4: Tensor) -> Tensor:
        """As `Counter`, in float32."""
        more = self.counter.num_objects
        attention = F.pad(attention_BM.float(), (0, more), value=-torch.inf)
        return self.counter(attention, F.pad(boxes_BM4.float(), (0, 0, 0, more))).to(attention_BM.dtype)


def fold_weights(branch: FineBranch) -> None:
    """Let each weight be one tensor, and no longer a direction and a length."""
    for layer in list(branch.modules()):
        if parametrize.is_parametrized(layer):
            for name in list(cast(Any, layer).parametrizations):
                parametrize.remove_parametrizations(layer, name)


class AnswerGraph(nn.Module):
    """All that a fine branch does, from numbers of words to probabilities."""

    def __init__(self, branch: FineBranch, loss: str, dtype: torch.dtype, *, question_len: int, described: int) -> None:
        """
        Args:
            branch: its weights folded, see `fold_weights`.
            loss: by which its logits are meant, "bce" or "ce".
            dtype: in which it computes, but for the counter.
            question_len: the most words of a question.
            described: the most words on an image; 0: there are none.
        """
        super().__init__()
        branch = deepcopy(branch).eval().to(dtype)
        branch.encode.read = cast(Any, OnnxGru(branch.encode.read))
        if branch.looks and branch.counter is not None:
            branch.counter = cast(Any, OnnxCounter(branch.counter))
        self.branch, self.loss, self.dtype = branch, loss, dtype
        self.question_len, self.described = question_len, described

    def forward(
        self,
        words: Tensor,
        entities: Tensor,
        features: Tensor | None = None,
        boxes: Tensor | None = None,
        image_of_question: Tensor | None = None,
        description: Tensor | None = None,
    ) -> Tensor:
        """Probabilities (B, A).

        Args:
            words, entities: (B, N) and (B, E) int64, 0 for none.
            features, boxes: (I, M, F) and (I, M, 4) float32, boxes of 0 where there is no region.
            image_of_question: (B,) int64.
            description: (I, W) int64, 0 for none.
        """
        if features is None or boxes is None:
            return probabilities(self.branch(words, entities), self.loss)
        if description is None:
            description = words.new_zeros(features.shape[0], 1)
        seen = (features.to(self.dtype), boxes.to(self.dtype), description, image_of_question)
        return probabilities(self.branch(words, entities, *seen), self.loss)

    def example(self) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
        """Inputs of the right shapes, and which of their dimensions may be of any size."""
        questions, images, regions = (torch.export.Dim(name, min=1) for name in ("questions", "images", "regions"))
        words = torch.export.Dim("words", min=1, max=max(2, self.question_len))
        entities = torch.export.Dim("entities", min=1, max=MOST_ENTITIES)
        inputs = {name: torch.ones(3, 2, dtype=torch.long) for name in ("words", "entities")}
        free: dict[str, dict[int, Any]] = {"words": {0: questions, 1: words}, "entities": {0: questions, 1: entities}}
        if self.branch.looks:
            inputs["features"] = torch.zeros(2, 13, self.branch.feature_width)
            inputs["boxes"] = torch.ones(2, 13, 4)
            inputs["image_of_question"] = torch.tensor([0, 1, 1])
            free |= {name: {0: images, 1: regions} for name in ("features", "boxes")}
            free["image_of_question"] = {0: questions}
            if self.described:
                inputs["description"] = torch.ones(2, 2, dtype=torch.long)
                free["description"] = {0: images, 1: torch.export.Dim("description", min=1, max=max(2, self.described))}
        return inputs, free


class RegionGraph(nn.Module):
    """A CLIP's patches as regions: the pixels of images in, features of regions out."""

    scale: Tensor
    shift: Tensor

    def __init__(self, known: PatchRegions, dtype: torch.dtype) -> None:
        super().__init__()
        views = known.views
        self.register_buffer("scale", views.scale.cpu().clone())
        self.register_buffer("shift", views.shift.cpu().clone())
        self.visual = deepcopy(known.visual).cpu().eval().to(dtype)
        self.num_stages, self.rows, self.size, self.dtype = known.num_stages, known.rows, views.image_size, dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """(I, S, S, 3) uint8 -> (I, K, F) float32, rounded to 16 bits as they are kept in training."""
        x = pixels.permute(0, 3, 1, 2).float() * self.scale - self.shift
        x, _ = towers.run_observed(self.visual, x.to(self.dtype), 0, self.num_stages, with_statistics=False)
        return pooled(x, self.rows).float()

    def example(self) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
        """As `AnswerGraph.example`."""
        pixels = torch.zeros(2, self.size, self.size, 3, dtype=torch.uint8)
        return {"pixels": pixels}, {"pixels": {0: torch.export.Dim("images", min=1)}}


def write_answers(
    branch: FineBranch, folder: Path, precision: str, *, loss: str, question_len: int, described: int
) -> None:
    """Write a fine branch, its weights folded, into a folder. Raises ValueError."""
    graph = AnswerGraph(branch, loss, DTYPES[precision], question_len=question_len, described=described)
    path = folder / ANSWERS_FILE
    write_onnx(graph, *graph.example(), path, precision, outputs=["probabilities"], named=NAMED)


def write_regions(known: PatchRegions, folder: Path, precision: str) -> None:
    """Write what a CLIP does into a folder. Raises ValueError."""
    graph = RegionGraph(known, DTYPES[precision])
    named = f"--mode export: {type(known.visual).__name__}"
    write_onnx(graph, *graph.example(), folder / REGIONS_FILE, precision, outputs=["features"], named=named)
