"""A space of options to search: a range or a list of values for each, and the files that name them. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.options import Option
from storage.json_files import read_json

KEYS = {"low", "high", "log", "step", "choices"}


@dataclass(frozen=True)
class Dimension:
    """The values that one option may take: `choices`, or from `low` to `high`."""

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    is_whole: bool = False  # whether its numbers are

    def to_json(self) -> dict[str, Any]:
        """As in a space file, with every key that says something."""
        if self.choices is not None:
            return {"choices": list(self.choices)}
        found: dict[str, Any] = {"low": self.low, "high": self.high}
        return found | ({"log": True} if self.log else {}) | ({"step": self.step} if self.step else {})

    def describe(self) -> str:
        """In words: "lr 1e-06..0.001 log"."""
        if self.choices is not None:
            return f"{self.name} {' | '.join(map(str, self.choices))}"
        how = " log" if self.log else f" step {self.step:g}" if self.step else ""
        return f"{self.name} {self.low:g}..{self.high:g}{how}"


Space = dict[str, Dimension]


def read_space(
    path: Path,
    given: Collection[str],
    options: Mapping[str, Option],
    may_be_searched: Callable[[str], bool],
    check_value: Callable[[str, Any], None],
) -> Space:
    """A space file.

    Args:
        given: options that flags fix.
        options: of the program.
        check_value: raises ValueError for what a text option cannot be, beyond what `Option.check` knows.

    Raises:
        ValueError: with the file, the option and the rule.
    """
    try:
        raw = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"--space {path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"--space {error}") from None
    if not raw:
        raise ValueError(f"--space {path}: must be a JSON object with an option or more")
    space = {}
    for name, text in raw.items():
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--space {path}: unknown option {name!r}{hint}")
        try:
            if not may_be_searched(name):
                raise ValueError("cannot be searched: the search sets it, or it decides which scores are compared")
            space[name] = read_dimension(options[name], text, check_value)
        except ValueError as error:
            raise ValueError(f"--space {path}: {name}: {error}") from None
        if name in given:
            raise ValueError(f"--space {path}: {name} is also given as {options[name].flag}; drop one of the two")
    return space


def read_dimension(spec: Option, raw: Any, check_value: Callable[[str, Any], None]) -> Dimension:
    """One entry of a space file. Raises ValueError."""
    if not isinstance(raw, Mapping):
        raise ValueError('must be {"low": ..., "high": ...} or {"choices": [...]}')
    if unknown := sorted(set(raw) - KEYS):
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}")
    if "choices" in raw:
        return read_choices(spec, raw, check_value)
    if spec.kind not in (int, float):
        raise ValueError('is no number: give {"choices": [...]}')
    if not {"low", "high"} <= set(raw):
        raise ValueError('needs "low" and "high", or "choices"')
    low, high, log, step = raw["low"], raw["high"], raw.get("log", False), raw.get("step")
    for value in (low, high, *([step] if step is not None else [])):
        if isinstance(value, bool) or not isinstance(value, (int, float) if spec.kind is float else int):
            raise ValueError(f"{value!r} must be a {'whole ' if spec.kind is int else ''}number")
    if not isinstance(log, bool):
        raise ValueError(f"log {log!r} must be true or false")
    for value in (low, high):
        spec.check(value)
    if low >= high:
        raise ValueError(f"low {low:g} must be below high {high:g}")
    if log and (low <= 0 or step is not None):
        raise ValueError("log works above 0 only, and without step")
    if step is not None and not (
        0 < step <= high - low and abs((high - low) / step - round((high - low) / step)) < 1e-6
    ):
        raise ValueError(f"step {step:g} must lead from low {low:g} to high {high:g}")
    return Dimension(spec.name, low=low, high=high, log=log, step=step, is_whole=spec.kind is int)


def read_choices(spec: Option, raw: Mapping[str, Any], check_value: Callable[[str, Any], None]) -> Dimension:
    """One entry that lists its values. Raises ValueError."""
    values = raw["choices"]
    if set(raw) != {"choices"}:
        raise ValueError('"choices" stand alone, without low, high, log and step')
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError("choices must be a list of two values or more")
    for value in values:
        spec.check(value)
        check_value(spec.name, value)
    if len({repr(value) for value in values}) < len(values):
        raise ValueError("choices has a value twice")
    return Dimension(spec.name, choices=tuple(values), is_whole=spec.kind is int)
