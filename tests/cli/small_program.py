"""Another program than the trainer: its options, and a command that does nothing but answer. No tests: these import it.

PYTHONPATH=. python tests/cli/small_program.py [flags]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cli import parser
from cli.errors import one_line_errors
from cli.options import Config, option, options_of

GROUPS = {"dough": "what is kneaded", "oven": "how it is baked, and for how long; 100% by hand"}
NOT_SAVED = ("recipe",)


@dataclass(frozen=True, kw_only=True)
class Baking(Config):
    """How to bake bread."""

    flour: str = option("wheat", "dough", "what is milled", choices=("wheat", "rye", "spelt"))
    loaf: str | None = option(None, "dough", "name of the loaf", metavar="NAME")
    grams: int = option(500, "dough", "weight of the loaf", within="[100, 5000]", recommended="500 to 1000")
    salt: float = option(0.02, "dough", "share of the flour, such as 2%", within="(0, 1)")
    seeds: bool = option(False, "dough", "put seeds on 50% of it")
    heat: tuple[float, float] = option((250.0, 200.5), "oven", "at first, at last", metavar=("FIRST", "LAST"))
    rests: tuple[int, int] | None = option(None, "oven", "minutes before and after", within="[0, 900]")
    minutes: int | None = option(None, "oven", "time (default: by weight)", within="[1, 600]")
    cooling: float | None = option(None, "oven", "degrees a minute", within="[-90, 0]")
    fan: bool = option(True, "oven", "bake without the fan")
    use_steam: bool = option(True, "oven", "bake without steam")
    recipe: str | None = option(None, "oven", "take options from this file", metavar="FILE")

    def check_together(self) -> None:
        """See `Config`."""
        if self.seeds and self.flour == "rye":
            raise ValueError("--seeds do not stick to --flour rye: drop one")


OPTIONS = options_of(Baking)


def build_parser() -> parser.OneLineParser:
    """The command line."""
    return parser.build_parser(Baking, GROUPS, prog="bake", description="Bake bread.", epilog="Eat it: with butter")


def parse(argv: Sequence[str] | None) -> Baking:
    """Flags win over a recipe."""
    flags = parser.parse_flags(build_parser(), argv)
    saved = {}
    if "recipe" in flags:
        saved = parser.load_options(flags["recipe"], OPTIONS, not_saved=NOT_SAVED, flag="--recipe")
    return Baking(**{**saved, **flags})


def words(baking: Baking) -> list[str]:
    """The command line of these options."""
    return parser.flag_words(vars(baking), OPTIONS, {})


def main(argv: Sequence[str] | None = None) -> None:
    """Say in JSON what is baked."""
    with one_line_errors(ArithmeticError):
        baking = parse(argv)
        if baking.minutes == 600:
            raise ArithmeticError("the loaf is a coal")
        print(json.dumps(baking.to_json()))


if __name__ == "__main__":
    main(sys.argv[1:])
