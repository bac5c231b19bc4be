"""`tokenizers`: a folder's own tokenizer or CLIP's, and which texts had to be cut."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_clips import CONTEXT, END, IMAGE_SIZE, hf, refusal, write_transformers_form

from backbones import tokenizers
from backbones.loading import load_backbone


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """A small CLIP in transformers' form."""
    return write_transformers_form(tmp_path / "own")


def test_a_transformers_folder_is_tokenised_by_its_own_tokenizer(hf_folder):
    tokenizer = load_backbone(str(hf_folder), "openai", image_size=IMAGE_SIZE).tokenizer
    theirs = hf().AutoTokenizer.from_pretrained(hf_folder)
    texts = ["a cat", "", "it is abc!", "ab" * CONTEXT]
    tokens = tokenizer(texts)
    assert tokens.shape == (4, CONTEXT) and tokens.dtype == torch.int64
    for row, text in zip(tokens.tolist(), texts, strict=True):
        expected = theirs(text)["input_ids"]
        if len(expected) > CONTEXT:
            expected = [*expected[: CONTEXT - 1], END]
        assert row == expected + [0] * (CONTEXT - len(expected))
    assert tokens[3, -1] == END


def standard_folder(folder: Path, vocab_size: int) -> Path:
    """A transformers folder without tokenizer files."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = hf().CLIPConfig(
        vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": 16},
        text_config={**sizes, "max_position_embeddings": CONTEXT, "vocab_size": vocab_size},
        projection_dim=8,
    )
    hf().CLIPModel(config).save_pretrained(folder)
    return folder


def test_a_transformers_folder_without_tokenizer_uses_clips_own_where_the_vocabulary_is_clips(tmp_path):
    folder = standard_folder(tmp_path, 49408)
    tokenizer = load_backbone(str(folder), "openai", image_size=IMAGE_SIZE).tokenizer
    texts = ["a red circle", "word " * 30]
    assert torch.equal(tokenizer(texts), open_clip.tokenize(texts, context_length=CONTEXT))


def test_a_transformers_folder_without_tokenizer_and_with_another_vocabulary_is_refused(tmp_path):
    assert "tokenizer.json" in refusal(str(standard_folder(tmp_path, 49409)), "openai")


EIGHT = open_clip.SimpleTokenizer(context_length=8)
WORDS = st.lists(st.sampled_from(["cat", "dog", "!~", "-", "antidisestablishmentarianism", "é"]), max_size=12)


@given(st.lists(WORDS, min_size=1, max_size=6))
@settings(max_examples=60)
def test_truncated_texts_are_counted_exactly(word_lists):
    """Against the number of tokens; "!~" holds token 0, which is also the padding."""
    texts = [" ".join(words) for words in word_lists]
    tokens, num_cut = tokenizers.tokenize(EIGHT, texts, 8)
    assert torch.equal(tokens, EIGHT(texts))
    assert num_cut == sum(len(EIGHT.encode(text)) + 2 > 8 for text in texts)


def test_a_text_that_just_fits_is_not_counted_as_cut():
    for num_words, num_cut in ((5, 0), (6, 0), (7, 1), (30, 1)):
        assert tokenizers.tokenize(EIGHT, ["cat " * num_words], 8)[1] == num_cut
    assert tokenizers.tokenize(EIGHT, ["cat " * 7, "cat " * 6, "dog " * 8], 8)[1] == 2


def test_truncated_texts_are_counted_exactly_whatever_a_tokenizer_pads_with(hf_folder):
    folder = str(hf_folder)
    ours = load_backbone(folder, "openai", image_size=IMAGE_SIZE).tokenizer
    theirs = open_clip.tokenizer.HFTokenizer(folder, context_length=CONTEXT)
    assert (ours(["a"])[0, -1], theirs(["a"])[0, -1]) == (0, END)
    texts = ["a", "b" * (CONTEXT - 2), "c" * (CONTEXT - 1), "d" * 99]
    for tokenizer in (ours, theirs):
        tokens, num_cut = tokenizers.tokenize(tokenizer, texts, CONTEXT)
        assert torch.equal(tokens, tokenizer(texts))
        assert num_cut == 2


def test_no_texts_give_no_rows():
    tokens, num_cut = tokenizers.tokenize(EIGHT, [], 8)
    assert tokens.shape == (0, 8) and tokens.dtype == torch.int64
    assert num_cut == 0
