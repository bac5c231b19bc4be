"""`texts`: each text tokenised once, cut where that changes nothing, and prompts with their levels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_feeds import CPU, LENGTH, letters, table_of
from torch import Tensor

from inputs.texts import LevelledTexts, TextTable

# -- texts


def test_a_text_table_tokenises_each_text_once_and_gives_a_batch_its_distinct_ones():
    asked: list[str] = []

    def tokenize(texts: Sequence[str]) -> Tensor:
        asked.extend(texts)
        return letters(texts)

    texts = ["cat", "dog", "cat", "", "fox", "dog"]
    table = TextTable(texts, tokenize, CPU)
    assert sorted(asked) == sorted(set(texts))
    rows = np.array([5, 0, 1, 2, 5])
    chosen = table.select(rows)
    assert len(chosen["tokens_PN"]) == 2 and chosen["text_stage"] == 0
    assert torch.equal(chosen["tokens_PN"][chosen["prompt_of_B"]], letters([texts[row] for row in rows]))
    assert len(asked) == 4


@settings(max_examples=100)
@given(st.lists(st.text("ab!猫", max_size=LENGTH), min_size=1, max_size=12), st.booleans(), st.data())
def test_any_batch_of_texts_maps_back_to_its_rows_cut_behind_the_longest_if_trimmed(texts, trim, drawn):
    rows = np.array(drawn.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=12)))
    table = table_of(texts, trim=trim)
    expected = [texts[row] for row in rows]

    def used(text: str) -> int:
        """Tokens up to the end token or, where that was cut off, up to the last that is not padding."""
        return len(text) + 1 if len(text) < LENGTH else len(text.rstrip("!")) or LENGTH

    length = max(map(used, expected)) if trim else LENGTH
    chosen = table.select(rows)
    assert len(chosen["tokens_PN"]) == len(set(expected))
    assert torch.equal(chosen["tokens_PN"][chosen["prompt_of_B"]], letters(expected)[:, :length])
    assert torch.equal(chosen["text"], chosen["tokens_PN"])


TEXTS = ["a", "a cat", "dogs", "a", "a!!"]


@pytest.mark.parametrize("rows", [[0, 3], [2, 4, 2], [4, 1, 0, 2, 3]])
@pytest.mark.parametrize("trim", [False, True])
def test_a_table_gives_the_activations_that_enter_a_stage_of_the_same_texts_and_length(trim, rows):
    table = table_of(TEXTS, trim=trim)
    longest = int(table.lengths.max())
    table.enter_at(3, table.host_tokens_UN[:, :longest, None] * torch.tensor([1, 10]))  # (U, N, W)
    chosen = table.select(np.array(rows))
    tokens = letters([TEXTS[row] for row in rows])
    length = max(len(TEXTS[row]) + 1 for row in rows) if trim else LENGTH
    assert chosen["text_stage"] == 3
    assert chosen["text"].shape == (len({TEXTS[row] for row in rows}), length, 2)
    assert torch.equal(chosen["tokens_PN"][chosen["prompt_of_B"]], tokens[:, :length])
    assert torch.equal(chosen["text"][chosen["prompt_of_B"]], tokens[:, :length, None] * torch.tensor([1, 10]))


@pytest.mark.parametrize("trim", [False, True])
def test_embeddings_of_texts_are_given_whole_and_tokens_again_from_stage_0_on(trim):
    table = table_of(TEXTS, trim=trim)
    weights = torch.rand(LENGTH, 20)  # more values than tokens
    table.enter_at(5, table.host_tokens_UN.float() @ weights)  # (U, E)
    rows = np.array([4, 0, 2])
    chosen = table.select(rows)
    assert chosen["text_stage"] == 5 and chosen["text"].shape == (3, 20)
    expected = letters([TEXTS[row] for row in rows]).float() @ weights
    torch.testing.assert_close(chosen["text"][chosen["prompt_of_B"]], expected)
    table.enter_at(0, None)
    chosen = table.select(rows)
    assert chosen["text_stage"] == 0 and torch.equal(chosen["text"], chosen["tokens_PN"])


# -- prompts with levels


QUALITY, CONSISTENCY = ("bad", "so so", "good"), ("{prompt}? no", "'{prompt}'", "yes, {prompt}!")
LONG = 40  # tokens: more than any of these texts has
odd_prompts = st.text("a{}0%\\!猫", max_size=8) | st.sampled_from(["{prompt}", "{0}", "{}", "{{a}}", "good", "'a'"])


def levelled(prompts: Sequence[str], **options: Any) -> LevelledTexts:
    tokenize = partial(letters, length=LONG)
    return LevelledTexts(prompts, tokenize, CPU, quality=QUALITY, consistency=CONSISTENCY, **options)


def with_levels(prompt: str) -> list[str]:
    """What an image with this prompt is compared with, by hand."""
    return [prompt, prompt + "? no", "'" + prompt + "'", "yes, " + prompt + "!"]


@settings(max_examples=100)
@given(st.lists(odd_prompts, min_size=1, max_size=6), st.booleans(), st.data())
def test_a_prompt_is_followed_by_its_own_levels_whatever_letters_it_has(prompts, trim, drawn):
    rows = np.array(drawn.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=8)))
    chosen = levelled(prompts, trim=trim).select(rows)
    expected = [with_levels(prompts[row]) for row in rows]
    distinct = {*QUALITY, *(text for texts in expected for text in texts)}
    length = max(map(len, distinct)) + 1 if trim else LONG
    assert chosen["tokens_PN"].shape == (len(distinct), length)
    assert chosen["prompt_of_B"].shape == (len(rows), 4)
    for places, texts in zip(chosen["prompt_of_B"], expected, strict=True):
        assert torch.equal(chosen["tokens_PN"][places], letters(texts, LONG)[:, :length])
    assert torch.equal(chosen["tokens_PN"][chosen["level_of_K"]], letters(QUALITY, LONG)[:, :length])


def test_texts_with_levels_are_tokenised_once_and_may_be_embedded_ahead():
    prompts = ["cat", "dog", "cat", ""]
    table = levelled(prompts, trim=True)
    assert len(table.tokens_UN) == 3 * 4 + len(QUALITY)
    table.enter_at(5, table.host_tokens_UN.float()[:, :4] * 0.5)  # (U, E)
    chosen = table.select(np.array([2, 3]))
    assert chosen["text_stage"] == 5
    expected = torch.stack([letters(with_levels(prompt), LONG)[:, :4] * 0.5 for prompt in ("cat", "")])
    assert torch.equal(chosen["text"][chosen["prompt_of_B"]], expected)
    assert torch.equal(chosen["text"][chosen["level_of_K"]], letters(QUALITY, LONG)[:, :4] * 0.5)
