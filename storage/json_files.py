"""JSON files: written whole, and read with a bound, whoever wrote them; refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from storage.atomic import atomic_write
from storage.messages import quoted
from storage.plain_files import check_plain_file

NUMBER = (int, float)  # kinds of JSON values
MOST_JSON = 8 * 2**20  # bytes; what runs write has thousands
LONGEST_INTEGER = 19  # characters: 64 bits


def read_json(path: Path, most_bytes: int = MOST_JSON) -> dict[str, Any]:
    """A JSON object of UTF-8 text, with or without BOM, whose numbers are finite and whose keys occur once.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        ValueError: it cannot be read, is no such JSON, too large or too deep; one line that names the file.
    """
    try:
        check_plain_file(path, most_bytes)
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
            object_pairs_hook=unique_keys,
            parse_constant=refuse_number,
            parse_float=finite_float,
            parse_int=bounded_integer,
        )
        if "\\ud" in text.lower():  # half of a character, which no file and no terminal can hold
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that has a key twice is refused, where json would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{quoted(repeated)} occurs twice")
    return found


def refuse_number(text: str) -> float:
    """Raise ValueError for a number that is none."""
    raise ValueError(f"{quoted(text)} is not a finite number")


def finite_float(text: str) -> float:
    """A JSON number. Raises ValueError for one too large to be finite."""
    value = float(text)
    return value if math.isfinite(value) else refuse_number(text)


def bounded_integer(text: str) -> int:
    """A JSON integer. Raises ValueError for one of more than 64 bits."""
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"{quoted(text)} is too large a number")
    return int(text)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def schema_mismatch(found: object, shape: Any, name: str = "") -> str:
    """What of a JSON value is not of a shape, in words; "" if it all is.

    Args:
        shape: a kind, or several in a tuple, numbers being finite; {name: shape, ...} for an object with at least these
            parts, {str: shape} for one whose other parts are all alike; [shape, shape] for a list of so many, and
            [shape, ...] with an ellipsis for one of any number but none.
        name: what the value is called.
    """
    misfit = first_misfit(found, shape)
    if misfit is None:
        return ""
    keys, said = misfit
    what = ".".join(filter(None, (name, *keys)))
    return f"{repr(what) if what else 'it'} {said}"


def first_misfit(found: object, shape: Any) -> tuple[tuple[str, ...], str] | None:
    """Where in a JSON value, as keys, the first part is that is not of its shape, and what is wrong with it."""
    if isinstance(shape, dict):
        if not isinstance(found, dict):
            return (), "is no object"
        for key in shape:
            if key is not str and key not in found:
                return (), f"has no {key!r}"
        rest = shape.get(str)
        return first_of((key, part, shape.get(key, rest)) for key, part in found.items())
    if isinstance(shape, list):
        if not isinstance(found, list) or not found or (shape[-1] is not ... and len(found) != len(shape)):
            return (), f"is no list of {'any' if shape[-1] is ... else len(shape)}"
        return first_of((place, part, shape[0]) for place, part in enumerate(found))
    if not isinstance(found, shape) or (isinstance(found, float) and not math.isfinite(found)):
        return (), "is no number" if shape == NUMBER or shape is int else "is of another kind"
    return None


def first_of(parts: Iterable[tuple[object, object, Any]]) -> tuple[tuple[str, ...], str] | None:
    """The first misfit among the parts of an object or a list: key, value, and the shape, if it has one."""
    for key, part, shape in parts:
        if shape is None or (shape is part.__class__ and shape is not float):  # as nearly all are: millions in a file
            continue
        if (misfit := first_misfit(part, shape)) is not None:
            return (str(key), *misfit[0]), misfit[1]
    return None
