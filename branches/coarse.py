"""The coarse branch: the whole image and the whole question, as a pretrained model sees them.

`ClipBranch` scores answers by how near they are, in the space of a CLIP's texts, to what image and question make
together. `XvlmBranch` asks an X-VLM. Both can be asked to choose among answers that they were never trained on.

Shapes: B questions, I images, E width of a CLIP's embeddings, D joint width, A answers; L tokens of a question, T of an
answer, K right answers of all questions of a batch, k answers that X-VLM tries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from branches.bert import BertConfig, present
from branches.fine import prior_logits
from branches.xvlm import SwinConfig, Xvlm, XvlmConfig, load_checkpoint, spread

START_SCALE = 10.0  # of cosines
TRIED_IN_TRAINING = 8  # answers, beside which the mixture learns what this branch is worth


class ClipBranch(nn.Module):
    """Embeddings of a frozen CLIP in, logits of answers out (Radford et al., 2021).

    g = MLP[image, question, image * question]
    logit of an answer = s cos(g, T(answer) - mean of these) + b

    The answers' embeddings are centred, since those of all texts lie close together.
    """

    def __init__(self, *, num_answers: int, embed_dim: int, width: int, dropout: float) -> None:
        """Build with fresh weights, and answers that `choose_among` gives later.

        Args:
            embed_dim: E.
            width: D.
        """
        super().__init__()
        self.join = nn.Sequential(
            nn.Linear(3 * embed_dim, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, embed_dim),
        )
        self.log_scale = nn.Parameter(torch.tensor(START_SCALE).log())
        self.bias = nn.Parameter(torch.zeros(()))
        self.mean_E: Tensor
        self.answers_AE: Tensor
        self.register_buffer("mean_E", torch.zeros(embed_dim))
        self.register_buffer("answers_AE", torch.zeros(num_answers, embed_dim))

    @torch.no_grad()
    def start_from(self, answers_AE: Tensor) -> None:
        """Take the embeddings of the answers to be learned, and their mean, which stays."""
        self.mean_E.copy_(answers_AE.float().mean(dim=0))
        self.choose_among(answers_AE)

    @torch.no_grad()
    def choose_among(self, answers_AE: Tensor) -> None:
        """Answer by one of these from now on, learned or not."""
        self.answers_AE = F.normalize(answers_AE.float().to(self.mean_E.device) - self.mean_E, dim=-1)

    @torch.no_grad()
    def expect(self, accuracy_A: Tensor, loss: str) -> None:
        """Begin with how right an answer is on average."""
        self.bias.copy_(prior_logits(accuracy_A.mean(), loss))

    def forward(self, image_IE: Tensor, question_BE: Tensor, images_B: Tensor) -> Tensor:
        """Embeddings of images and questions, and which image each question is about -> (B, A) logits."""
        image_BE = image_IE.index_select(0, images_B)
        joined = self.join(torch.cat([image_BE, question_BE, image_BE * question_BE], dim=-1))
        cosines_BA = F.normalize(joined.float(), dim=-1) @ self.answers_AE.T
        return self.log_scale.exp() * cosines_BA + self.bias


class XvlmBranch(nn.Module):
    """An X-VLM's answers, by its own ranking, as logits."""

    def __init__(
        self, *, num_answers: int, answer_tokens: int, config: Mapping[str, Any], loss: str, is_frozen: bool
    ) -> None:
        """Build with fresh weights, and answers that `choose_among` gives later.

        Args:
            answer_tokens: T.
            config: an `XvlmConfig`, as `dataclasses.asdict` has it.
            loss: "bce", whose logits are those of each answer by itself, or "ce".
            is_frozen: nothing of it is trained.
        """
        super().__init__()
        self.xvlm = Xvlm(config_of(config)).requires_grad_(not is_frozen)
        self.loss, self.is_frozen = loss, is_frozen
        self.fresh: frozenset[str] = frozenset()  # names of weights that pretraining has not
        self.answers_AT: Tensor
        self.register_buffer("answers_AT", torch.zeros(num_answers, answer_tokens, dtype=torch.int64))

    def start_from(self, weights: Path) -> None:
        """Take the weights of a file of X-VLM's. Raises ValueError."""
        state, self.fresh = load_checkpoint(weights, self.xvlm)
        self.xvlm.load_state_dict(state)

    def expect(self, accuracy_A: Tensor, loss: str) -> None:
        """X-VLM knows what to expect."""

    def choose_among(self, answers_AT: Tensor) -> None:
        """Answer by one of these from now on."""
        self.answers_AT = answers_AT.to(self.answers_AT.device)

    def train(self, mode: bool = True) -> XvlmBranch:
        """As usual, but what is frozen is always evaluated."""
        return super().train(mode and not self.is_frozen)

    def forward(
        self,
        images_B: Tensor | None = None,
        tokens_BL: Tensor | None = None,
        pixels_ICHW: Tensor | None = None,
        tried_Bk: Tensor | None = None,
        log_p_Bk: Tensor | None = None,
        **right_answers: Tensor,
    ) -> Tensor:
        """Questions, images and which of these each is about, or what `rank` made of them before -> (B, A) logits."""
        if tried_Bk is None or log_p_Bk is None:
            assert tokens_BL is not None and pixels_ICHW is not None
            tried_Bk, log_p_Bk = self.rank(tokens_BL, pixels_ICHW, images_B)
        return self.logits(tried_Bk, log_p_Bk)

    def rank(self, tokens_BL: Tensor, pixels_ICHW: Tensor, images_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Questions and images -> the k answers that are tried, and log-probabilities of these: (B, k) each."""
        states = self.xvlm.read(tokens_BL, pixels_ICHW, images_B)
        return self.xvlm.try_answers(states, present(tokens_BL), self.answers_AT)

    def logits(self, tried_Bk: Tensor, log_p_Bk: Tensor) -> Tensor:
        """(B, A) logits of all answers; those that were not tried are hardly likely."""
        log_p_BA = spread(tried_Bk, log_p_Bk.float(), len(self.answers_AT))
        if self.loss == "ce":
            return log_p_BA
        return log_p_BA - torch.log1p(-log_p_BA.exp().clamp(max=1 - 1e-6))

    def teach(
        self,
        tokens_BL: Tensor,
        pixels_ICHW: Tensor,
        images_B: Tensor,
        right_KT: Tensor,
        weights_K: Tensor,
        questions_K: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, A) without gradients, and the losses (B,) by which an X-VLM learns; see `Xvlm.losses`."""
        states_BLD, mask_BL = self.xvlm.read(tokens_BL, pixels_ICHW, images_B), present(tokens_BL)
        losses_B = self.xvlm.losses(states_BLD, mask_BL, right_KT, weights_K, questions_K)
        self.xvlm.eval()
        with torch.no_grad():
            found = self.xvlm.try_answers(states_BLD.detach(), mask_BL, self.answers_AT, TRIED_IN_TRAINING)
        self.xvlm.train(self.training)
        return self.logits(*found), losses_B


def config_of(found: Mapping[str, Any]) -> XvlmConfig:
    """An `XvlmConfig` again from its dict, also where that has been JSON. Raises ValueError, TypeError."""
    vision: dict[str, Any] = dict(found["vision"])
    vision |= {name: tuple(vision[name]) for name in ("depths", "num_heads")}
    return XvlmConfig(**{**found, "vision": SwinConfig(**vision), "text": BertConfig(**found["text"])})
