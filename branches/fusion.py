"""Several branches as one model: each answers by itself, and together they answer by a mixture of what each thinks.

Shapes: K branches, B questions, A answers, S = 1 for a single branch, else 1 + K: the fused answer comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from branches.coarse import ClipBranch, XvlmBranch
from branches.fine import FineBranch
from branches.graph import GraphBranch

KINDS: Mapping[str, type[nn.Module]] = {
    "fine": FineBranch,
    "graph": GraphBranch,
    "clip": ClipBranch,
    "xvlm": XvlmBranch,
}
# What each is given of the inputs of a batch, as far as they are there.
INPUTS: Mapping[str, Sequence[str]] = {
    "fine": ("words_BN", "entities_BE", "features_IMF", "boxes_IM4", "description_IW", "images_B"),
    "graph": ("words_BN", "nodes_V4", "node_boxes_V4", "graphs_V", "edges_2E", "relations_E", "signs_E"),
    "clip": ("image_IE", "question_BE", "images_B"),
    "xvlm": (
        *("tokens_BL", "pixels_ICHW", "images_B", "tried_Bk", "log_p_Bk"),
        *("right_KT", "weights_K", "questions_K"),
    ),
}


def fuse(logits_BKA: Tensor, weight_KA: Tensor, loss: str) -> Tensor:
    """(B, A) logits of the mixture P = sum_k softmax_k(W) p_k, for each answer its own.

    Args:
        loss: "bce", where p_k is the sigmoid of a logit and so is P, or "ce", where both are softmaxes over answers.

    In logarithms throughout: a branch that is certain does not make the others' gradients vanish in rounding.
    """
    share_KA = F.log_softmax(weight_KA.float(), dim=0)
    logits_BKA = logits_BKA.float()
    if loss == "ce":
        return torch.logsumexp(share_KA + F.log_softmax(logits_BKA, dim=-1), dim=1)
    is_right = torch.logsumexp(share_KA + F.logsigmoid(logits_BKA), dim=1)
    is_wrong = torch.logsumexp(share_KA + F.logsigmoid(-logits_BKA), dim=1)  # the shares sum to 1
    return is_right - is_wrong


class AnswerModel(nn.Module):
    """Branches, which share nothing but the question, and the weights W (K, A) by which their answers are mixed."""

    def __init__(
        self, branches: Mapping[str, nn.Module], inputs: Mapping[str, Sequence[str]], num_answers: int, loss: str
    ) -> None:
        """
        Args:
            inputs: what each branch is given of the inputs of a batch.
            loss: see `fuse`.
        """
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.inputs = {name: tuple(inputs[name]) for name in branches}
        self.loss = loss
        self.weight_KA = nn.Parameter(torch.ones(len(branches), num_answers)) if len(branches) > 1 else None

    @classmethod
    def build(cls, branches: Mapping[str, Mapping[str, Any]], num_answers: int, loss: str) -> AnswerModel:
        """Branches by name from the arguments of each, with fresh weights; "kind" is that of one with another name."""
        built, inputs = {}, {}
        for name, arguments in branches.items():
            kind = arguments.get("kind", name)
            own = {key: value for key, value in arguments.items() if key != "kind"}
            built[name], inputs[name] = KINDS[kind](num_answers=num_answers, **own), INPUTS[kind]
        return cls(built, inputs, num_answers, loss)

    @property
    def names(self) -> list[str]:
        """Of the S answers."""
        return [*(["fused"] if self.weight_KA is not None else []), *self.branches]

    @property
    def feature_width(self) -> int:
        """Numbers of a region that is looked at; 0 where none is."""
        return cast(FineBranch, self.branches["fine"]).feature_width if "fine" in self.branches else 0

    @property
    def xvlm(self) -> XvlmBranch | None:
        """The branch that asks an X-VLM, if there is one."""
        branches = [branch for branch in self.branches.values() if isinstance(branch, XvlmBranch)]
        return branches[0] if branches else None

    def forward(self, *, learns: bool = False, **inputs: Tensor) -> Any:
        """The inputs of all branches -> (B, S, A) logits.

        Args:
            learns: give also the losses (B,) of those branches, by name, that learn by one of their own.
        """
        found, losses = [], {}
        for name, branch in self.branches.items():
            given = {key: inputs[key] for key in self.inputs[name] if key in inputs}
            if learns and isinstance(branch, XvlmBranch) and not branch.is_frozen:
                logits_BA, losses[name] = branch.teach(**given)
            else:
                logits_BA = branch(**given)
            found.append(logits_BA)
        logits_BSA = self.mix(torch.stack([logits_BA.float() for logits_BA in found], dim=1))
        return (logits_BSA, losses) if learns else logits_BSA

    def mix(self, logits_BKA: Tensor) -> Tensor:
        """(B, K, A) logits of the branches -> (B, S, A)."""
        if self.weight_KA is None:
            return logits_BKA
        fused_BA = fuse(logits_BKA, self.weight_KA, self.loss)
        return torch.cat([fused_BA[:, None], logits_BKA], dim=1)
