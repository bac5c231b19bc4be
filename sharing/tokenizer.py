"""The tokenizer of a scorer as one file of the tokenizers library, which needs none of our code.

What open_clip does to a text before it is cut into tokens is part of that file, but for two steps of Python's own,
`html.unescape` and `str.lower`. ftfy's repair of texts that were decoded wrongly is left out.
"""

from __future__ import annotations

import html
import string
from collections.abc import Mapping, Sequence
from typing import Any

import ftfy.fixes
import open_clip
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from backbones import tokenizers
from backbones.tokenizers import TransformersTokenizer
from storage.messages import quoted

CLEANERS = {"_clean_lower": "lower", "_clean_whitespace": "whitespace", "_clean_canonicalize": "canonicalize"}
PRIVATE = "\ue000"  # a character that no fix changes
# Odd texts on which a written tokenizer has to agree with the one it was made from.
SAMPLES = (
    *(
        "",
        "a photo of a cat",
        "  A  Red\tCIRCLE,\n(blue) square!  ",
        "it's 3.5 o'clock; they'll've 1234 dogs",
        "x" * 300,
    ),
    *(
        "word " * 200,
        "caf\u00e9 cafe\u0301 \ufb01ne \uff21\uff22 \u201cquoted\u201d don\u2019t",
        "&lt;b&gt; &amp;amp; &eacute;",
    ),
    *(
        "\u039f\u0394\u039f\u03a3 \u4e2d\u6587 \u0939\u093f\u0928 \U0001f600 \u0130I",
        "a_b-c 8k, hdr, --ar 16:9 (masterpiece:1.2)",
    ),
)


def portable(tokenizer: tokenizers.Tokenizer, context_length: int, *, trim: bool) -> tuple[Tokenizer, dict[str, bool]]:
    """A tokenizer as one of the tokenizers library, and what is to be done to a text before: unescape, lower.

    Args:
        trim: texts are padded to the longest of a batch, not to the context length.

    Raises:
        ValueError: it cannot be written so; one line.
    """
    kind = type(tokenizer).__name__
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        clean, pad = clean_of(tokenizer), 0
        made = from_simple(tokenizer, clean)
    elif isinstance(tokenizer, (open_clip.tokenizer.HFTokenizer, TransformersTokenizer)):
        theirs = tokenizer.tokenizer
        if not getattr(theirs, "is_fast", False):
            raise ValueError(f"--export: the tokenizer {type(theirs).__name__} has no form in the tokenizers library")
        made = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
        clean = "" if isinstance(tokenizer, TransformersTokenizer) else clean_of(tokenizer)
        pad = 0 if isinstance(tokenizer, TransformersTokenizer) else theirs.pad_token_id
    else:
        raise ValueError(f"--export: the tokenizer {kind} has no form in the tokenizers library")
    if clean:
        steps = [*cleaning(clean), *([made.normalizer] if made.normalizer else [])]
        made.normalizer = normalizers.Sequence(steps)
    made.enable_truncation(context_length)
    made.enable_padding(length=None if trim else context_length, pad_id=pad, pad_token=made.id_to_token(pad) or "")
    before = {"unescape": bool(clean), "lower": clean in ("lower", "canonicalize")}
    check_same(tokenizer, made, before)
    return made, before


def clean_of(tokenizer: Any) -> str:
    """How open_clip cleans texts for a tokenizer. Raises ValueError."""
    name = tokenizer.clean_fn.__name__
    if name not in CLEANERS or getattr(tokenizer, "reduction_fn", None):
        raise ValueError(
            "--export: the tokenizer leaves words out at random (reduction_mask), which cannot be exported"
        )
    return CLEANERS[name]


def from_simple(tokenizer: open_clip.SimpleTokenizer, clean: str) -> Tokenizer:
    """open_clip's own byte-pair encoding."""
    start, end, *others = (tokenizer.decoder[number] for number in tokenizer.all_special_ids)
    made = Tokenizer(
        models.BPE(
            vocab=tokenizer.encoder, merges=list(tokenizer.bpe_ranks), end_of_word_suffix="</w>", cache_capacity=0
        )
    )
    special = [AddedToken(token, special=True, normalized=True) for token in (start, end, *others)]
    if clean != "canonicalize":  # which leaves nothing of their brackets
        made.add_special_tokens(special)
    pattern = (
        f"(?i){'|'.join([start, end, *others])}|'s|'t|'re|'ve|'m|'ll|'d|\\p{{L}}+|\\p{{N}}|[^\\s\\p{{L}}\\p{{N}}]+"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ids = [(token, tokenizer.encoder[token]) for token in (start, end)]
    made.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    return made


def cleaning(clean: str) -> list[Any]:
    """What ftfy does to each character by itself, and then `open_clip.tokenizer.get_clean_fn`, as normalizers."""
    found: list[Any] = [normalizers.Replace(Regex("\x1b\\[[0-9;]*[A-Za-z]"), "")]  # colours of a terminal
    for target, characters in replaced().items():
        odd = "".join(f"\\x{{{ord(character):x}}}" for character in characters)
        found.append(normalizers.Replace(Regex(f"[{odd}]"), target))
    found.append(normalizers.NFC())
    if clean == "canonicalize":
        found.append(normalizers.Replace("_", " "))
        odd = "".join(f"\\x{{{ord(character):x}}}" for character in string.punctuation)
        found.append(normalizers.Replace(Regex(f"[{odd}]"), ""))
    if clean != "whitespace":
        found.append(normalizers.Lowercase())
    return [*found, normalizers.Replace(Regex("\\s+"), " "), normalizers.Strip()]


def replaced() -> dict[str, list[str]]:
    """What ftfy replaces wherever it stands: curly quotes, ligatures, wide letters, control characters and such.

    Returns:
        New text -> the characters that become it.
    """
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and chr(code) != PRIVATE]
    text = PRIVATE.join(characters)
    fixes = ftfy.fixes
    for fix in (fixes.fix_c1_controls, fixes.fix_latin_ligatures, fixes.fix_character_width, fixes.uncurl_quotes):
        text = fix(text)
    text = fixes.remove_control_chars(fixes.fix_line_breaks(text))
    found: dict[str, list[str]] = {}
    for character, target in zip(characters, text.split(PRIVATE), strict=True):
        if target != character:
            found.setdefault(target, []).append(character)
    return found


def ids(made: Tokenizer, before: Mapping[str, bool], texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, as `score.py` makes them."""
    texts = [html.unescape(html.unescape(text)) if before["unescape"] else text for text in texts]
    texts = [text.lower() if before["lower"] else text for text in texts]
    return [found.ids for found in made.encode_batch(texts)]


def check_same(tokenizer: tokenizers.Tokenizer, made: Tokenizer, before: Mapping[str, bool]) -> None:
    """Raise ValueError unless both cut SAMPLES alike."""
    for text in SAMPLES:
        expected = tokenizer([text])[0].tolist()
        found = ids(made, before, [text])[0]
        if found + [0] * (len(expected) - len(found)) != expected:
            raise ValueError(
                f"--export: the tokenizer cuts {quoted(text)} in a way that the tokenizers library cannot; "
                "such a run cannot be exported"
            )
