"""`cli/parser.py`: flags, help, saved options, and the command line written back, of a program with options alone."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refusal
from small_program import GROUPS, NOT_SAVED, OPTIONS, Baking, build_parser, parse, words

from cli import parser
from cli.options import inside

OTHERS: dict[str, Any] = {
    "flour": "spelt",
    "loaf": "big",
    "grams": 700,
    "salt": 0.25,
    "seeds": True,
    "heat": (-1.5, 5.0),
    "rests": (3, 4),
    "minutes": 45,
    "cooling": -2.5,
    "fan": False,
    "use_steam": False,
}


def outcome(*argv: str) -> str:
    """The message that a command line is refused with."""
    return refusal(parse, argv)


def given_in(folder: Path, value: Any) -> str:
    path = folder / "given.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def load(path: str | Path) -> dict[str, Any]:
    return parser.load_options(path, OPTIONS, not_saved=NOT_SAVED, flag="--recipe")


# -- flags


def test_a_command_line_without_flags_is_all_defaults():
    assert parse([]) == Baking()


@pytest.mark.parametrize("name", OTHERS)
def test_every_flag_sets_its_option_and_no_other(name):
    spec, value = OPTIONS[name], OTHERS[name]
    given = [] if spec.kind is bool else [str(item) for item in (value if spec.pair else [value])]
    found = parse([spec.flag, *given])
    assert found == Baking(**{name: value}) != Baking()
    assert type(getattr(found, name)) is (tuple if spec.pair else spec.kind)


@pytest.mark.parametrize("name", ["seeds", "fan", "use_steam"])
def test_every_switch_can_be_undone_and_the_last_word_counts(name):
    spec = OPTIONS[name]
    assert parse([spec.flag, spec.undo]) == Baking()
    assert parse([spec.undo, spec.flag]) == Baking(**{name: not spec.default})


@pytest.mark.parametrize(
    ("wrong", "near"), [("--gram", "--grams"), ("--sead", "--seeds"), ("--heet", "--heat"), ("--lo", "--loaf")]
)
def test_a_misspelt_flag_is_refused_with_the_nearest_one(wrong, near):
    for argv in ([wrong, "1"], [f"{wrong}=1"]):
        said = outcome(*argv)
        assert wrong in said and f"did you mean {near}?" in said


def test_a_flag_unlike_any_other_points_to_help():
    assert "--qqqqqqqqqqqq" in (said := outcome("--qqqqqqqqqqqq")) and "--help" in said


def test_no_flag_can_be_abbreviated():
    for spec in OPTIONS.values():
        assert spec.flag[:-1] in outcome(spec.flag[:-1], "1")


@pytest.mark.parametrize("argv", [["bread"], ["-x"], ["--", "x"]])
def test_words_that_are_no_flags_are_refused(argv):
    assert argv[-1].lstrip("-") in outcome(*argv)


@pytest.mark.parametrize("argv", [["--grams", "ten"], ["--grams", "2.5"], ["--salt", ""], ["--heat", "1", "x"]])
def test_a_value_that_is_no_number_is_refused_by_flag_and_value(argv):
    said = outcome(*argv)
    assert argv[0] in said and repr(argv[-1]) in said


@pytest.mark.parametrize("argv", [["--grams"], ["--heat", "1"], ["--heat", "1", "2", "3"]])
def test_too_few_or_too_many_values_are_refused(argv):
    assert outcome(*argv)


@pytest.mark.parametrize("argv", [["--grams=nan"], ["--salt=inf"], ["--heat", "0", "nan"], ["--flour", "RYE"]])
def test_checks_hold_for_flags_too(argv):
    assert argv[0].partition("=")[0] in outcome(*argv)


# -- help


def squeezed(text: str) -> str:
    """Text without the blanks and line breaks that wrapping adds."""
    return "".join(text.split())


def test_help_shows_groups_and_each_flag_with_default_choices_and_recommended_range():
    text = build_parser().format_help()
    assert text.startswith("usage: bake ") and "Bake bread." in text and "Eat it: with butter" in text
    places = [text.index(f"\n{name}:") for name in GROUPS]
    assert places == sorted(places)
    for title in GROUPS.values():
        assert squeezed(title) in squeezed(text)
    for spec in OPTIONS.values():
        start = re.search(rf"^  {spec.flag}\b", text, re.MULTILINE)
        assert start, spec.name
        in_oven = start.start() > places[1]
        assert in_oven == (spec.metadata["group"] == "oven")
        rest = text[start.end() :]
        following = re.search(r"^  -|^\S", rest, re.MULTILINE)
        entry = squeezed(rest[: following.start()] if following else rest)
        assert squeezed(spec.metadata["help"]) in entry
        shown = "(default:off)" if spec.kind is bool else squeezed(f"(default: {spec.default})")
        assert (shown in entry) == (spec.default is not None)
        for part in spec.metadata["metavar"] or ():
            assert part in entry
    assert "{wheat,rye,spelt}" in text and squeezed("[recommended: 500 to 1000]") in squeezed(text)
    assert "--use_steam" not in text and "--no_seeds" not in text  # they only undo


# -- saved options


def test_saved_options_come_back_but_for_what_is_not_saved(tmp_path):
    saved = Baking(**OTHERS, recipe="other.json")
    path = given_in(tmp_path, {**saved.to_json(), "provenance": {"machine": "any"}})
    assert Baking(**load(path)) == Baking(**OTHERS)


@settings(max_examples=50)
@given(
    salt=st.floats(0, 1, exclude_min=True, exclude_max=True),
    heat=st.tuples(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300)),
    grams=st.integers(100, 5000),
    loaf=st.none() | st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_saved_options_come_back_exactly(tmp_path_factory, salt, heat, grams, loaf):
    baking = Baking(salt=salt, heat=heat, grams=grams, loaf=loaf)
    file = tmp_path_factory.getbasetemp() / "round_trip_of_a_small_program.json"
    file.write_text(json.dumps(baking.to_json()), encoding="utf-8")
    assert Baking(**load(file)) == baking


def test_flags_win_over_a_file_even_when_they_give_the_default(tmp_path):
    path = given_in(tmp_path, {"grams": 700, "use_steam": False, "seeds": True, "salt": 0.5})
    found = parse(["--recipe", path, "--grams", "500", "--use_steam", "--no_seeds"])
    assert found == Baking(salt=0.5, recipe=path)


def test_null_says_nothing_where_an_option_may_be_left_out(tmp_path):
    assert load(given_in(tmp_path, {"loaf": None, "rests": None, "minutes": 3})) == {"minutes": 3}
    assert load(given_in(tmp_path, {"grams": None})) == {"grams": None}  # which its check refuses
    assert "a whole number" in outcome("--recipe", given_in(tmp_path, {"grams": None}))


def test_a_hand_written_file_may_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "notepad.json"
    path.write_text('{"grams": 300}', encoding="utf-8-sig")
    assert load(path) == {"grams": 300}


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    said = outcome("--recipe", given_in(tmp_path, {"gram": 300}))
    assert said.startswith("--recipe ") and "given.json" in said
    assert "unknown option 'gram'; did you mean 'grams'?" in said
    assert "did you mean" not in outcome("--recipe", given_in(tmp_path, {"qqqqqqqq": 3}))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", "null", "[" * 100_000, b"\xff\xfe{}"])
def test_a_file_that_is_no_json_object_is_refused_by_its_name(content, tmp_path):
    path = tmp_path / "given.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert outcome("--recipe", str(path)).startswith(f"--recipe {path}")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    assert outcome("--recipe", "nowhere.json") == "--recipe nowhere.json: no such file"
    assert str(tmp_path) in outcome("--recipe", str(tmp_path))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_in_a_file_that_is_not_finite_is_refused(value, tmp_path):
    path = given_in(tmp_path, {"salt": value})
    said = outcome("--recipe", path)
    assert said.startswith(f"--recipe {path}") and "is not a finite number" in said


@pytest.mark.parametrize(
    ("value", "rule"), [([1], "two numbers"), ([1, 2, 3], "two numbers"), (5, "two numbers"), (["1", "5"], "a number")]
)
def test_a_list_that_is_no_pair_is_refused_by_its_flag(value, rule, tmp_path):
    said = outcome("--recipe", given_in(tmp_path, {"heat": value}))
    assert said.startswith("--heat ") and rule in said


# -- the command line written back

TEXTS = st.one_of(  # but "--" alone, which argparse drops before Python 3.13
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda text: text != "--"
    ),
    st.sampled_from(["-x", "--grams", "-1", "- a", "a b", "it's", '"', "$HOME", "a\nb", "-é=1", ""]),
)


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Valid values of an option, by what it says of itself."""
    spec = OPTIONS[name]
    within = spec.metadata["within"] or "[-1e30, 1e30]"
    low, high = map(float, within[1:-1].split(","))
    single: st.SearchStrategy[Any] = {
        bool: st.booleans(),
        int: st.integers(int(low), int(high)),
        float: st.floats(low, high).filter(lambda value: inside(value, within)),
        str: st.sampled_from(spec.metadata["choices"] or [""]) if spec.metadata["choices"] else TEXTS,
    }[spec.kind]
    values = st.tuples(single, single) if spec.pair else single
    return st.none() | values if spec.optional else values


@st.composite
def some_bakings(draw: st.DrawFn) -> Baking:
    names = draw(st.lists(st.sampled_from(list(OTHERS)), max_size=6, unique=True))
    try:
        return Baking(**{name: draw(values_of(name)) for name in names})
    except ValueError:  # rye with seeds
        assume(False)
        raise


@settings(max_examples=100)
@given(some_bakings())
def test_the_command_line_of_options_is_read_back_as_the_options(baking):
    assert parse(shlex.split(shlex.join(words(baking)))) == baking


def test_a_command_line_names_what_differs_from_the_defaults_or_from_what_holds_anyway():
    assert words(Baking()) == []
    assert words(Baking(grams=700, fan=False)) == ["--grams", "700", "--no_fan"]
    options = vars(Baking(grams=500, fan=True, salt=0.5))
    base = {"grams": 700, "fan": False, "salt": 0.5}
    assert parser.flag_words(options, OPTIONS, base) == ["--grams", "500", "--use_fan"]
    assert parser.flag_words({"salt": 0.25}, OPTIONS, {}) == ["--salt", "0.25"]
