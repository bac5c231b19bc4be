"""`sharing/tokenizer.py`: tokenizer.json gives the token ids that the scorer gives, whatever the text."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import ftfy
import open_clip
import pytest
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from backbones.tokenizers import TransformersTokenizer, restore_tokenizer
from sharing import tokenizer as export_tokenizer

CONTEXT = 20
# Characters that one library knows and the other does not yet are no promise.
ANY = st.characters(exclude_categories=("Cs", "Cn", "Co"))
ODD = st.sampled_from("aAbBsSTtré ǅΣςİıſ\t\n'’“”ﬁＡ１ｶﾞ\x85\x00\x1b[m0129.,!-_#;<>/&lt;&amp;&eacute;   😀🏽漢हि")
TEXTS = st.one_of(st.text(ANY, max_size=20), st.text(ODD, max_size=20), st.text(ODD | ANY, max_size=60))


@cache
def tokenizer(kind: str) -> Any:
    if kind == "lite":
        return restore_tokenizer({"context_length": CONTEXT, "hf_tokenizer_name": "."}, ROOT / "assets" / "lite")
    if kind == "transformers":
        from transformers import AutoTokenizer

        lite = AutoTokenizer.from_pretrained(ROOT / "assets" / "lite", local_files_only=True)
        return TransformersTokenizer(lite, CONTEXT)
    return open_clip.SimpleTokenizer(context_length=CONTEXT, clean=kind)


@cache
def made(kind: str) -> tuple[Any, dict[str, bool]]:
    return export_tokenizer.portable(tokenizer(kind), CONTEXT, trim=True)


@pytest.mark.parametrize("kind", ["lower", "whitespace", "canonicalize", "lite", "transformers"])
def test_token_ids_are_those_of_the_scorer(kind):
    @settings(max_examples=150)
    @given(TEXTS)
    def same(text: str) -> None:
        assume(not {"<", "&"} <= set(text))  # ftfy decodes no entities there, html.unescape does
        assume(ftfy.fix_text(text) == ftfy.fix_text(text, fix_encoding=False))  # which is left out
        assume(kind != "canonicalize" or "Σ" not in text)  # small, it depends on the punctuation around it
        expected = tokenizer(kind)([text])[0].tolist()
        found = export_tokenizer.ids(*made(kind), [text])[0]
        assert found + [0] * (CONTEXT - len(found)) == expected

    same()


@pytest.mark.parametrize("kind", ["lower", "lite"])
def test_texts_are_padded_to_the_longest_or_all_to_the_context(kind):
    texts = ["a", "a red circle, very red", "word " * 99]
    whole, before = export_tokenizer.portable(tokenizer(kind), CONTEXT, trim=False)
    assert export_tokenizer.ids(whole, before, texts) == tokenizer(kind)(texts).tolist()
    short = export_tokenizer.ids(*made(kind), texts[:2])
    assert len(short[0]) == len(short[1]) < CONTEXT


def test_a_written_tokenizer_is_read_back_the_same(tmp_path: Path):
    from tokenizers import Tokenizer

    one, before = made("lower")
    one.save(str(tmp_path / "tokenizer.json"))
    texts = ["a photo of a cat", "Don’t ＡＢＣ ﬁne", ""]
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert export_tokenizer.ids(read, before, texts) == export_tokenizer.ids(one, before, texts)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: open_clip.SimpleTokenizer(context_length=CONTEXT, reduction_mask="random"),
            "leaves words out at random",
        ),
        (lambda: lambda texts: texts, "the tokenizer function has no form in the tokenizers library"),
        (lambda: with_stripped_separators(), "in a way that the tokenizers library cannot"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(make, says):
    with pytest.raises(ValueError, match=says) as caught:
        export_tokenizer.portable(make(), CONTEXT, trim=False)
    assert "\n" not in str(caught.value)


def with_stripped_separators() -> Any:
    text = {"context_length": CONTEXT, "hf_tokenizer_name": ".", "tokenizer_kwargs": {"strip_sep_token": True}}
    return restore_tokenizer(text, ROOT / "assets" / "lite")
