"""The options of a program: one dataclass field each, from which flag, check, help and JSON follow."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from decimal import Decimal
from functools import cache
from typing import Any, cast, get_origin, get_type_hints

from storage.messages import one_line


def option(
    default: Any,
    group: str,
    help: str,
    *,
    within: str | None = None,
    recommended: str | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | Sequence[str] | None = None,
    alone: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        within: an interval such as "(0, 1]" that the value (each value, for pairs) must lie in.
        recommended: advice shown in `--help`, never enforced.
        alone: what the flag stands for without a value, of an option that may be None; --no_NAME brings that back.
    """
    metadata = {
        "group": group,
        "help": help,
        "within": within,
        "recommended": recommended,
        "choices": tuple(choices) if choices else None,
        "metavar": metavar,
        "alone": alone,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One flag, derived from a field of a `Config`."""

    name: str
    kind: type
    optional: bool
    pair: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """The flag that changes the default."""
        if self.kind is bool and self.default is True:
            return "--no_" + self.name.removeprefix("use_")
        return "--" + self.name

    def check(self, value: Any) -> None:
        """Raise ValueError unless `value` has the type and lies in the interval or the choices."""
        if value is None and self.optional:
            return
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.kind]
        if self.pair and (not isinstance(value, tuple) or len(value) != 2):
            raise ValueError(f"--{self.name} {value!r}: must be two numbers, LO HI")
        for item in cast(Sequence[Any], value if self.pair else (value,)):
            allowed = (int, float) if self.kind is float else (self.kind,)
            if not isinstance(item, allowed) or (isinstance(item, bool) and self.kind is not bool):
                raise ValueError(f"--{self.name} {item!r}: must be {expected}")
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"--{self.name} {item}: must be finite")
            if self.metadata["within"] and not inside(item, self.metadata["within"]):
                raise ValueError(f"--{self.name} {item}: must be in {self.metadata['within']}")
            if self.metadata["choices"] and item not in self.metadata["choices"]:
                raise ValueError(f"--{self.name} {item}: must be one of {', '.join(self.metadata['choices'])}")

    def words(self, value: Any) -> list[str]:
        """The flag and the value as words of a command line; none for a value that no flag can say (None)."""
        if value is None:
            return []
        if self.kind is bool:
            return [self.undo if value == self.default else self.flag]
        if value == self.metadata["alone"]:
            return [self.flag]
        if self.pair:  # argparse takes "-0.00001" for a number, "-1e-05" for a flag
            return [f"--{self.name}", *(f"{Decimal(str(item)):f}" if item < 0 else str(item) for item in value)]
        return [f"--{self.name}={value}"] if str(value).startswith("-") else [f"--{self.name}", str(value)]

    @property
    def undo(self) -> str:
        """The switch that brings the default back, which a saved config or the demo has changed."""
        return self.undoing[0]

    @property
    def undoing(self) -> list[str]:
        """All the names of that switch."""
        if not self.default:
            return ["--no_" + self.name]
        return list(dict.fromkeys(("--use_" + self.flag.removeprefix("--no_"), "--" + self.name)))

    def add_to(self, parser: argparse._ArgumentGroup) -> None:
        """Add the flag; absent flags leave no trace in the namespace."""
        text = self.metadata["help"]
        if self.metadata["recommended"]:
            text += f" [recommended: {self.metadata['recommended']}]"
        if self.kind is bool:
            parser.add_argument(
                self.flag,
                dest=self.name,
                action="store_const",
                const=not self.default,
                default=argparse.SUPPRESS,
                help=f"{text} (default: off)".replace("%", "%%"),
            )
        if self.kind is bool or self.metadata["alone"]:
            parser.add_argument(
                *self.undoing,
                dest=self.name,
                action="store_const",
                const=self.default,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        if self.kind is bool:
            return
        if self.default is not None:
            text += f" (default: {self.default})"
        parser.add_argument(
            self.flag,
            dest=self.name,
            type=self.kind,
            default=argparse.SUPPRESS,
            nargs=2 if self.pair else "?" if self.metadata["alone"] else None,
            const=self.metadata["alone"],
            choices=self.metadata["choices"],
            metavar=self.metadata["metavar"] if not self.metadata["choices"] else None,
            help=text.replace("%", "%%"),
        )


def inside(value: Any, interval: str) -> bool:
    """Whether `value` lies in an interval written as "(0, 1]"."""
    low, high = (float(part) for part in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below


def split_list(text: str | None) -> list[str]:
    """Read "a, b" as ["a", "b"]."""
    return [part.strip() for part in text.split(",")] if text else []


@cache
def options_of(config_class: type[Config]) -> dict[str, Option]:
    """The options of a program, by name, in the order of their fields."""
    hints = get_type_hints(config_class)
    options = {}
    for item in fields(config_class):
        hint = hints[item.name]
        alternatives = (hint,) if get_origin(hint) is tuple else getattr(hint, "__args__", (hint,))
        kinds = [kind for kind in alternatives if kind is not type(None)]
        pair = getattr(kinds[0], "__args__", None)
        assert item.default is not MISSING
        options[item.name] = Option(
            name=item.name,
            kind=pair[0] if pair else kinds[0],
            optional=item.default is None,
            pair=bool(pair),
            default=item.default,
            metadata=item.metadata,
        )
    return options


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a program: a frozen dataclass whose fields are made by `option`.

    A field is a bool, int, float or str, a pair of numbers, or one of these or None; each has a default.
    Construction checks every value, then the rules between them, and raises ValueError naming the flag.
    """

    def __post_init__(self) -> None:
        try:
            for name, spec in options_of(type(self)).items():  # type: ignore[arg-type]  # mypy: the hash of its instances
                spec.check(getattr(self, name))
            self.check_together()
        except ValueError as error:  # it quotes what was given
            raise ValueError(one_line(error)) from None

    def check_together(self) -> None:
        """Rules between options; raises ValueError. None, unless a program has some."""

    def to_json(self) -> dict[str, Any]:
        """Every option as JSON values."""
        return json.loads(json.dumps(asdict(self)))
