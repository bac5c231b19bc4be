"""`cli/options.py`: what the options of any program are checked for, on those of a small one."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import pytest
from refusals import refusal
from small_program import OPTIONS, Baking

from cli.options import Config, inside, option, options_of, split_list


def test_options_are_the_fields_with_their_kinds_and_defaults():
    assert list(OPTIONS) == [item.name for item in fields(Baking)]
    assert {name: (spec.kind, spec.pair, spec.optional, spec.default) for name, spec in OPTIONS.items()} == {
        "flour": (str, False, False, "wheat"),
        "loaf": (str, False, True, None),
        "grams": (int, False, False, 500),
        "salt": (float, False, False, 0.02),
        "seeds": (bool, False, False, False),
        "heat": (float, True, False, (250.0, 200.5)),
        "rests": (int, True, True, None),
        "minutes": (int, False, True, None),
        "cooling": (float, False, True, None),
        "fan": (bool, False, False, True),
        "use_steam": (bool, False, False, True),
        "recipe": (str, False, True, None),
    }
    assert Baking() == Baking(**{name: spec.default for name, spec in OPTIONS.items()})


def test_a_flag_changes_the_default_and_a_switch_has_one_that_brings_it_back():
    flags = {name: spec.flag for name, spec in OPTIONS.items()}
    assert flags.pop("fan") == "--no_fan" and flags.pop("use_steam") == "--no_steam"
    assert flags == {name: f"--{name}" for name in flags}
    undone = {name: spec.undo for name, spec in OPTIONS.items() if spec.kind is bool}
    assert undone == {"seeds": "--no_seeds", "fan": "--use_fan", "use_steam": "--use_steam"}


def test_options_cannot_be_changed_after_their_check():
    with pytest.raises(FrozenInstanceError):
        Baking().grams = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("grams", [100, 101, 5000], [99, 5001, -100]),
        ("salt", [math.nextafter(0, 1), 0.5, math.nextafter(1, 0)], [0.0, 0, 1.0, 1, -0.5]),
        ("minutes", [1, 600], [0, 601]),
        ("cooling", [-90.0, -1e-5, 0.0, 0], [math.nextafter(-90, -91), math.nextafter(0, 1)]),
        ("rests", [(0, 900), (900, 0)], [(-1, 0), (0, 901)]),
    ],
)
def test_an_interval_is_enforced_at_its_borders_for_each_number_of_a_pair(name, accepted, refused):
    spec = OPTIONS[name]
    for value in accepted:
        assert getattr(Baking(**{name: value}), name) == value
    for value in refused:
        (wrong,) = [item for item in (value if spec.pair else [value]) if not inside(item, spec.metadata["within"])]
        assert refusal(Baking, **{name: value}) == f"--{name} {wrong}: must be in {spec.metadata['within']}"


def test_an_interval_is_read_as_written():
    values = (0, 0.5, 1)
    assert [inside(value, "(0, 1]") for value in values] == [False, True, True]
    assert [inside(value, "[0, 1)") for value in values] == [True, True, False]
    assert [inside(value, "[0, 1]") for value in (-0.1, 1.1)] == [False, False]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("grams", "500", "a whole number"),
        ("grams", 500.0, "a whole number"),
        ("grams", True, "a whole number"),
        ("grams", None, "a whole number"),
        ("salt", "2%", "a number"),
        ("salt", False, "a number"),
        ("salt", [0.02], "a number"),
        ("seeds", 1, "true or false"),
        ("seeds", "yes", "true or false"),
        ("loaf", 14, "a text"),
        ("heat", (250.0,), "two numbers"),
        ("heat", (1.0, 2.0, 3.0), "two numbers"),
        ("heat", 250.0, "two numbers"),
        ("heat", None, "two numbers"),
        ("heat", ("1", "5"), "a number"),
        ("rests", (1, 2.0), "a whole number"),
        ("flour", "rey", "one of wheat, rye, spelt"),
        ("flour", "RYE", "one of wheat, rye, spelt"),
        ("flour", "", "one of wheat, rye, spelt"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_flag_value_and_rule(name, value, rule):
    said = refusal(Baking, **{name: value})
    assert said.startswith(f"--{name} ") and rule in said


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(value):
    for changes in ({"salt": value}, {"heat": (0.0, value)}, {"cooling": value}):
        (name,) = changes
        assert refusal(Baking, **changes) == f"--{name} {value}: must be finite"


def test_whole_numbers_are_numbers():
    assert Baking(heat=(1, 5), cooling=-2) == Baking(heat=(1.0, 5.0), cooling=-2.0)


def test_rules_between_options_come_after_those_on_each():
    assert refusal(Baking, seeds=True, flour="rye") == "--seeds do not stick to --flour rye: drop one"
    assert "must be in" in refusal(Baking, seeds=True, flour="rye", grams=1)
    assert Baking(flour="rye") and Baking(seeds=True)


def test_what_is_quoted_in_a_refusal_breaks_no_line_and_does_not_fill_the_screen():
    assert refusal(Baking, flour="a\nb\r\n c") == "--flour a b c: must be one of wheat, rye, spelt"
    assert len(refusal(Baking, flour="x" * 10**6)) < 2100


def test_json_has_every_option_as_a_value_of_json():
    found = Baking(loaf="猫", heat=(1.5, -2.0)).to_json()
    assert list(found) == list(OPTIONS)
    assert (found["loaf"], found["heat"], found["rests"], found["use_steam"]) == ("猫", [1.5, -2.0], None, True)


def test_every_program_has_options_of_its_own():
    @dataclass(frozen=True, kw_only=True)
    class Other(Config):
        grams: float = option(1.0, "any", "another")

    assert options_of(Other).keys() == {"grams"} and options_of(Other)["grams"].kind is float
    assert options_of(Baking) is OPTIONS


@pytest.mark.parametrize(("text", "parts"), [("a, b", ["a", "b"]), ("a", ["a"]), ("a,,b", ["a", "", "b"]), (None, [])])
def test_a_list_is_split_at_its_commas(text: str | None, parts: list[str]):
    assert split_list(text) == parts


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("loaf", None, []),
        ("loaf", "big one", ["--loaf", "big one"]),
        ("loaf", "-x", ["--loaf=-x"]),
        ("grams", 700, ["--grams", "700"]),
        ("cooling", -1e-05, ["--cooling=-1e-05"]),
        ("seeds", True, ["--seeds"]),
        ("seeds", False, ["--no_seeds"]),
        ("fan", False, ["--no_fan"]),
        ("use_steam", True, ["--use_steam"]),
        ("heat", (-1e-05, 5.0), ["--heat", "-0.00001", "5.0"]),
    ],
)
def test_a_value_is_said_in_words_that_argparse_takes_for_it(name: str, value: Any, words: list[str]):
    assert OPTIONS[name].words(value) == words
    assert not [word for word in words[1:] if re.match(r"-[^\d]", word)]
