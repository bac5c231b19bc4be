"""Texts that are quoted in messages: on one line, and cut where they are long."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

LONGEST_ITEM = 300  # characters of a name in a message
LONGEST_LINE = 2000  # characters of a message


def one_line(error: Exception | str) -> str:
    """What an error says, whatever breaks of lines and long texts it quotes."""
    text = " ".join(str(error).split())
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


def quoted(text: str) -> str:
    """A text in quotes, cut where it is long."""
    return repr(text if len(text) <= 60 else text[:59] + "…")


def first_five(items: Sequence[object]) -> str:
    """The first five of a list in a line, very long ones cut, and that there are more."""
    texts = [str(item).replace("\n", "\\n") for item in items[:5]]
    return ", ".join(text if len(text) <= LONGEST_ITEM else f"{text[:LONGEST_ITEM]}…" for text in texts) + (
        ", ..." if len(items) > 5 else ""
    )


def note(text: str) -> None:
    """Tell the user something on stderr; of several processes one does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {text}", file=sys.stderr)
