"""What each branch had an eye on when it answered: how much every region, or object of a scene graph, weighed.

Shapes: B questions, M regions of an image or objects of a scene graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from branches.fine import FineBranch
from branches.fusion import AnswerModel
from branches.graph import GraphBranch


class Attended(NamedTuple):
    """Where a branch looked for one question."""

    weights_M: Tensor  # sum to 1, unless there is nothing to look at
    boxes_M4: Tensor  # x1, y1, x2, y2 on [0, 1]


@torch.inference_mode()
def attended(model: AnswerModel, inputs: Mapping[str, Tensor]) -> dict[str, list[Attended]]:
    """Branch -> what it looked at for each of B questions; of the branches that look at something with a place.

    Those of the fine branch are the mean over its glimpses, summed over the words of the question.

    Args:
        model: in evaluation mode; while it is trained, regions and objects are drawn by chance.
        inputs: of a batch, as the model takes them.
    """
    found = {}
    for name, branch in model.branches.items():
        given = {key: inputs[key] for key in model.inputs[name] if key in inputs}
        if isinstance(branch, FineBranch) and branch.looks:
            found[name] = regions(branch, given)
        elif isinstance(branch, GraphBranch):
            _, weights_V = branch.look(**given)
            graphs_V, boxes_V4 = given["graphs_V"], given["node_boxes_V4"]
            sizes = torch.bincount(graphs_V, minlength=len(given["words_BN"])).tolist()
            parts = zip(weights_V.float().split(sizes), boxes_V4.split(sizes), strict=True)  # as `pack` has put them
            found[name] = [Attended(*part) for part in parts]
    return found


def regions(branch: FineBranch, inputs: Mapping[str, Tensor]) -> list[Attended]:
    """What the fine branch looked at for each question, without the padding."""
    seen: list[Tensor] = []
    hook = branch.attend.register_forward_hook(lambda layer, given, out: seen.append(out[0]))
    try:
        branch(**inputs)
    finally:
        hook.remove()
    weights_BM = seen[0].float().mean(dim=1).sum(dim=1)
    boxes_BM4 = inputs["boxes_IM4"]
    if "images_B" in inputs:
        boxes_BM4 = boxes_BM4.index_select(0, inputs["images_B"])
    masks_BM = (boxes_BM4 > 0).any(dim=-1)
    return [Attended(own[mask], at[mask]) for own, at, mask in zip(weights_BM, boxes_BM4, masks_BM, strict=True)]
