"""Tokenizers: opened by name, restored from a checkpoint, and called so that what had to be cut is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from backbones.download import LOCAL_DIR, download

TOKENIZER_DIR = "tokenizer"
# What a description may ask of a tokenizer: nothing that names a file, or lets it bring code.
TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens"}

Tokenizer = Callable[[Sequence[str]], Tensor]


def open_tokenizer(name: str, model_cfg: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a name, folder or hub repository, which may bring no code. Raises ValueError."""
    text = model_cfg["text_cfg"]
    check_tokenizer_options(text)
    if name.startswith(LOCAL_DIR) and text.get("hf_tokenizer_name"):
        return restore_tokenizer(text, Path(name.removeprefix(LOCAL_DIR)))
    no_code = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    return download(f"the tokenizer of {name}", lambda: open_clip.get_tokenizer(name, **no_code))


def check_tokenizer_options(text_cfg: Mapping[str, Any]) -> None:
    """Raise ValueError for options of a tokenizer that a file may not give."""
    if odd := sorted(set(text_cfg.get("tokenizer_kwargs") or {}) - TOKENIZER_OPTIONS):
        raise ValueError(
            f"tokenizer_kwargs: {odd[0]!r} is not allowed, must be of {', '.join(sorted(TOKENIZER_OPTIONS))}"
        )


class TransformersTokenizer:
    """A transformers CLIP tokenizer called as open_clip calls its own: texts -> (P, context_length), padded with 0."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    @classmethod
    def load(cls, place: str, text_config: Any) -> Tokenizer:
        """From a folder or the hub; CLIP's standard tokenizer where a folder has none and the vocabulary fits."""
        from transformers import AutoTokenizer

        if Path(place).is_dir() and not any(Path(place).glob("*token*")) and not (Path(place) / "vocab.json").exists():
            standard = open_clip.SimpleTokenizer(context_length=text_config.max_position_embeddings)
            if standard.vocab_size != text_config.vocab_size:
                raise ValueError(f"{place}: no tokenizer files, and its vocabulary is not CLIP's; add tokenizer.json")
            return standard
        tokenizer = download(
            f"the tokenizer of {place}",
            lambda: AutoTokenizer.from_pretrained(
                place, trust_remote_code=False, local_files_only=Path(place).is_dir()
            ),
        )
        return cls(tokenizer, text_config.max_position_embeddings)

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """Texts -> (P, N) int64; too long ones are cut and keep their end token."""
        encoded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=context_length or self.context_length,
            return_tensors="pt",
        )
        return encoded["input_ids"] * encoded["attention_mask"]

    def save_pretrained(self, folder: str) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


def restore_tokenizer(text_cfg: Mapping[str, Any], place: Path) -> Tokenizer:
    """A saved tokenizer, or open_clip's own where none was saved."""
    length = text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not place.is_dir():
        return open_clip.SimpleTokenizer(context_length=length, **options)
    mode = text_cfg.get("tokenizer_mode")
    from transformers import AutoTokenizer

    closed: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}

    def load() -> Tokenizer:
        if text_cfg.get("hf_tokenizer_name"):
            return open_clip.tokenizer.HFTokenizer(
                str(place), context_length=length, tokenizer_mode=mode, **options, **closed
            )
        return TransformersTokenizer(AutoTokenizer.from_pretrained(str(place), **closed), length)

    return download(f"the tokenizer in {place}", load)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> tuple[Tensor, int]:
    """Texts -> (P, context_length) int64, and how many of them were too long and have been cut."""
    if not texts:
        return torch.zeros(0, context_length, dtype=torch.long), 0
    tokens_PN = tokenizer(list(texts))
    # A row that fills the context may just fit: it was cut only if a longer context puts something else in it.
    full = (tokens_PN[:, -1] != 0).nonzero().flatten().tolist()
    if not full:
        return tokens_PN, 0
    length = tokens_PN.shape[1]
    longer = tokenizer([texts[index] for index in full], context_length=length + 1)  # type: ignore[call-arg]
    return tokens_PN, int((longer[:, :length] != tokens_PN[full]).any(dim=1).sum())
