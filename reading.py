"""Files that somebody else may have written: read with a bound, checked, and refused in one line."""

from __future__ import annotations

import csv
import io
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_JSON = 8 * 2**20  # bytes; what runs write has thousands
LONGEST_LINE = 2000  # characters of a message
MOST_COLUMNS, LONGEST_HEADER = 1000, 2**20  # of a CSV; characters
LONGEST_INTEGER = 19  # characters: 64 bits


class OddFile(ValueError):
    """Says in one line, without the file's name, why it is not read at all."""


def refuse_odd_file(path: Path, most_bytes: int | None = None) -> None:
    """Raise OddFile unless a path is a plain file of at most so many bytes; a pipe or device would never end.

    Raises:
        FileNotFoundError: there is none.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OddFile("is not a plain file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise OddFile(f"has {found.st_size} bytes, at most {most_bytes} are read")


def refuse_odd_table(path: str | Path) -> None:
    """Raise OddFile for a CSV that pandas would take for ever to read: a pipe, or one with very many columns.

    Raises:
        FileNotFoundError: there is none.
        UnicodeDecodeError: its beginning is not UTF-8.
    """
    refuse_odd_file(Path(path))
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        lines = io.StringIO(file.read(LONGEST_HEADER), newline="")
    try:
        header = next(csv.reader(lines), [])
    except csv.Error as error:
        raise OddFile(str(error)) from None
    if len(header) > MOST_COLUMNS:
        raise OddFile(f"has more than {MOST_COLUMNS} columns")
    if not lines.read(1) and lines.tell() == LONGEST_HEADER:
        raise OddFile(f"the header has more than {LONGEST_HEADER} characters")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of UTF-8 text, with or without BOM, whose numbers are finite and whose keys occur once.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        ValueError: it cannot be read, is no such JSON, too large or too deep; one line that names the file.
    """
    try:
        refuse_odd_file(path, MOST_JSON)
        return parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def parse_json(content: bytes) -> dict[str, Any]:
    """As `read_json`, of bytes. Raises ValueError."""
    text = content.decode("utf-8-sig")
    try:
        found = json.loads(
            text,
            object_pairs_hook=without_repeats,
            parse_constant=refuse_number,
            parse_float=finite,
            parse_int=integer,
        )
        if "\\ud" in text.lower():  # half of a character, which no file and no terminal can hold
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that has a key twice is refused, where json would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shortened(repeated)} occurs twice")
    return found


def refuse_number(text: str) -> float:
    """Raise ValueError for a number that is none."""
    raise ValueError(f"{shortened(text)} is not a finite number")


def finite(text: str) -> float:
    """A JSON number. Raises ValueError for one too large to be finite."""
    value = float(text)
    return value if math.isfinite(value) else refuse_number(text)


def integer(text: str) -> int:
    """A JSON integer. Raises ValueError for one of more than 64 bits."""
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"{shortened(text)} is too large a number")
    return int(text)


def in_a_line(error: Exception | str) -> str:
    """What an error says, whatever breaks of lines and long texts it quotes."""
    text = " ".join(str(error).split())
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


def shortened(text: str) -> str:
    """A text in quotes, cut where it is long."""
    return repr(text if len(text) <= 60 else text[:59] + "…")


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, whose values stay unread.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: its header is damaged; the message does not name the file.
    """
    refuse_odd_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_JSON, path.stat().st_size - 8):
            raise ValueError(f"no safetensors file: its header claims {length} bytes")
        entries = parse_json(file.read(length))
    entries.pop("__metadata__", None)
    return {name: shape_of(name, entry) for name, entry in entries.items()}


def shape_of(name: str, entry: Any) -> tuple[int, ...]:
    """The shape that the header of a safetensors file gives a tensor. Raises ValueError."""
    shape = entry.get("shape") if isinstance(entry, Mapping) else None
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"no safetensors file: {shortened(name)} has no shape")
    return tuple(shape)
