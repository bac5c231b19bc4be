"""The texts of a data set: each distinct one tokenised once, and given as token ids or cached activations.

Shapes: U distinct texts, P those of a batch, N tokens, B images, K levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from inputs.transfer import Rows, to_device


class TextTable:
    """The texts of a table, each distinct one tokenised once. Row r has text number `text_of_row[r]`."""

    def __init__(
        self,
        texts: Sequence[str],
        tokenize: Callable[[Sequence[str]], Tensor],
        device: torch.device,
        *,
        trim: bool = False,
    ) -> None:
        """`trim`: a batch's texts may be cut behind the last end token among them."""
        self.text_of_row, distinct = pd.factorize(np.asarray(texts, dtype=object))
        tokens_UN = tokenize(list(distinct))
        # The last column in use: token 0 is also "!" inside a word, so counting tokens would cut end tokens off.
        used = (tokens_UN != 0).numpy()
        length = tokens_UN.shape[1]
        self.lengths = length - used[:, ::-1].argmax(axis=1) if trim else np.full(len(tokens_UN), length)
        self.host_tokens_UN = tokens_UN
        self.tokens_UN = tokens_UN.to(device)
        self.device = device
        self.enter_at(0, None)

    def enter_at(self, stage: int, activations: Tensor | None, dtype: torch.dtype | None = None) -> None:
        """From now on give what enters this stage of the text tower, (U, ...), as `dtype`; at stage 0 the token ids."""
        self.stage, self.activations, self.dtype = stage, activations, dtype

    def select(self, rows: Rows) -> dict[str, Any]:
        """The distinct texts of some rows, as a model takes them: text, tokens_PN, text_stage, prompt_of_B."""
        chosen, place = np.unique(self.text_of_row[rows], return_inverse=True)
        chosen_P = to_device(chosen, self.device)
        tokens_PN = self.tokens_UN[chosen_P, : int(self.lengths[chosen].max())]
        text = tokens_PN
        if self.activations is not None:
            text = self.activations[chosen_P].to(self.dtype or self.activations.dtype)
            text = text[:, : tokens_PN.shape[1]] if text.ndim == 3 else text
        return {
            "text": text,
            "tokens_PN": tokens_PN,
            "text_stage": self.stage,
            "prompt_of_B": to_device(place, self.device),
        }


class LevelledTexts(TextTable):
    """Prompts with levels: each prompt also as K texts of how well an image matches it, and K texts of quality."""

    def __init__(
        self,
        prompts: Sequence[str],
        tokenize: Callable[[Sequence[str]], Tensor],
        device: torch.device,
        *,
        quality: Sequence[str],
        consistency: Sequence[str],
        trim: bool = False,
    ) -> None:
        """`quality`: K texts, the worst first; `consistency`: K patterns with {prompt} in them, likewise."""
        self.per_prompt = 1 + len(consistency)
        patterns = ("{prompt}", *consistency)
        texts = [pattern.replace("{prompt}", prompt) for prompt in prompts for pattern in patterns]
        super().__init__([*texts, *quality], tokenize, device, trim=trim)
        self.places_of_quality = len(texts) + np.arange(len(quality))

    def select(self, rows: Rows) -> dict[str, Any]:
        """As a model with levels takes them: prompt_of_B is (B, 1 + K), and level_of_K has the levels of quality."""
        places = np.asarray(rows)[:, None] * self.per_prompt + np.arange(self.per_prompt)
        found = super().select(np.concatenate([places.ravel(), self.places_of_quality]))
        every = found.pop("prompt_of_B")
        return {
            **found,
            "prompt_of_B": every[: places.size].view(places.shape),
            "level_of_K": every[places.size :],
        }
