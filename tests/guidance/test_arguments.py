"""`guidance/arguments.py`: every flag of baseline.py, what wins over what, saved options, and help."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from option_samples import COMPANIONS, as_flags, outcome, sample, write_json
from programs import Ended, run_program

from configs import GROUPS, NOT_SAVED, OPTIONS, TrainingConfig
from guidance import arguments
from guidance.arguments import parse_args
from guidance.presets import DEMO_SETTINGS

# -- flags


def test_a_command_line_without_flags_is_all_defaults():
    config = parse_args([])
    assert config == TrainingConfig()
    assert {name: getattr(config, name) for name in OPTIONS} == {name: spec.default for name, spec in OPTIONS.items()}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("config", "demo", "preset")])
def test_every_flag_sets_its_option_and_no_other(name):
    value = sample(name)
    assert value != OPTIONS[name].default
    changes = {name: value, **COMPANIONS.get(name, {})}
    config = parse_args([word for key, item in changes.items() for word in as_flags(key, item)])
    assert config == TrainingConfig(**changes)
    assert {key for key in OPTIONS if getattr(config, key) != OPTIONS[key].default} == set(changes)
    assert type(getattr(config, name)) is (tuple if OPTIONS[name].pair else OPTIONS[name].kind)


@pytest.mark.parametrize("name", [name for name, spec in OPTIONS.items() if spec.kind is bool])
def test_every_switch_can_be_undone_and_the_last_word_counts(name):
    default = OPTIONS[name].default
    on, off = as_flags(name, not default), as_flags(name, default)
    assert on != off
    assert getattr(parse_args([*on, *off]), name) is default
    if name not in COMPANIONS:
        assert getattr(parse_args([*off, *on]), name) is not default


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("--epoch", "--epochs"),
        ("--data_csv", "--data_csv_path"),
        ("--no_residual", "--no_residual_learning"),
        ("--bach_size", "--batch_size"),
        ("--frieze_clip", "--freeze_clip"),
    ],
)
def test_a_misspelt_flag_is_refused_with_the_nearest_one(wrong, near):
    message = outcome(wrong, "1")
    assert wrong in message and f"did you mean {near}?" in message


# -- precedence, saved options


def test_flags_win_over_config_over_demo_over_defaults(tmp_path):
    config_file = write_json(tmp_path, {"epochs": 7, "lr": 0.02})
    assert DEMO_SETTINGS["real"]["epochs"] not in (5, 7, TrainingConfig().epochs)
    assert DEMO_SETTINGS["real"]["clip_model"] != TrainingConfig().clip_model
    found = parse_args(["--demo", "--config", config_file, "--epochs", "5"])
    assert (found.epochs, found.lr, found.clip_model) == (5, 0.02, DEMO_SETTINGS["real"]["clip_model"])
    assert found.batch_size == TrainingConfig().batch_size
    assert parse_args(["--demo", "--config", config_file]).epochs == 7
    assert parse_args(["--demo"]).epochs == DEMO_SETTINGS["real"]["epochs"]
    assert parse_args(["--config", config_file]).clip_model == TrainingConfig().clip_model


def test_a_flag_wins_even_when_it_gives_the_default(tmp_path):
    config_file = write_json(tmp_path, {"epochs": 7, "use_residual_learning": False, "freeze_clip": True})
    default = TrainingConfig()
    found = parse_args(
        ["--config", config_file, "--epochs", str(default.epochs), "--use_residual_learning", "--no_freeze_clip"]
    )
    assert found == TrainingConfig(config=config_file)


def test_a_config_with_the_demo_on_brings_the_demo_settings_unless_switched_off(tmp_path):
    config_file = write_json(tmp_path, {"demo": "drawn"})
    assert parse_args(["--config", config_file]).clip_model == "tiny"
    assert parse_args(["--config", config_file, "--no_demo"]) == TrainingConfig(config=config_file)


@pytest.mark.parametrize("name", ["data_csv_path", "image_base_dir"])
def test_the_demo_does_not_silently_ignore_data_that_was_named(name, tmp_path):
    message = outcome("--demo", f"--{name}", "x")
    assert "--demo" in message and f"--{name}" in message
    config_file = write_json(tmp_path, {"demo": "drawn"})
    assert "--no_demo" in outcome("--config", config_file, f"--{name}", "x")
    assert parse_args(["--config", config_file, "--no_demo", f"--{name}", "x"]) is not None


def test_json_round_trip_keeps_every_option_but_facts_about_the_place(tmp_path):
    clashing = {"partial_freeze", "unfreeze_schedule", "lora_rank", "split_file", "prompt_levels", "preset", "repeats"}
    clashing.add("resume")
    config = TrainingConfig(**{name: sample(name) for name in OPTIONS if name not in clashing})
    assert set(config.to_json()) == set(OPTIONS)
    path = write_json(tmp_path, {**config.to_json(), "provenance": {"machine": "any"}})
    found = TrainingConfig(**arguments.load_options(path))
    for name in OPTIONS:
        expected = OPTIONS[name].default if name in NOT_SAVED or name in clashing else sample(name)
        assert getattr(found, name) == expected, name


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    message = outcome("--config", write_json(tmp_path, {"epoch": 3}))
    assert "'epoch'" in message and "did you mean 'epochs'" in message and "given.json" in message
    assert "did you mean" not in outcome("--config", write_json(tmp_path, {"qqqqqqqq": 3}))


def test_a_missing_config_and_a_folder_are_refused_by_name(tmp_path):
    assert "nowhere.json: no such file" in outcome("--config", "nowhere.json")
    assert str(tmp_path) in outcome("--config", str(tmp_path))


def test_null_in_a_config_says_nothing_so_that_no_value_of_the_demo_is_unsaid(tmp_path):
    saved = write_json(tmp_path, {"demo": "drawn", "mos_range_q": None, "preset": None, "head_lr": None})
    found = parse_args(["--config", saved])
    assert found == replace(parse_args(["--demo", "drawn"]), config=saved)
    assert not [name for name in DEMO_SETTINGS["drawn"] if getattr(found, name) is None]


# -- help, and mistakes


def squeezed(text: str) -> str:
    """Text without the blanks and line breaks that wrapping adds."""
    return "".join(text.split())


@pytest.fixture(scope="module")
def help_run(tmp_path_factory) -> Ended:
    """`baseline.py --help`."""
    return run_program("baseline.py", "--help", cwd=tmp_path_factory.mktemp("help"))


def test_help_answers_within_a_second_and_without_torch(help_run):
    assert help_run.code == 0
    assert {"argparse", "configs"} <= help_run.imported
    assert not help_run.imported & {"torch", "numpy", "pandas", "open_clip", "PIL"}
    assert help_run.seconds < 1


def test_help_shows_each_flag_with_default_and_recommended_range(help_run):
    for name, spec in OPTIONS.items():
        start = re.search(rf"^  {spec.flag}\b", help_run.out, re.MULTILINE)
        assert start, name
        rest = help_run.out[start.end() :]
        following = re.search(r"^  -|^\S", rest, re.MULTILINE)
        entry = squeezed(rest[: following.start()] if following else rest)
        assert squeezed(spec.metadata["help"]) in entry
        if spec.metadata["recommended"]:
            assert squeezed(f"[recommended: {spec.metadata['recommended']}]") in entry
        if spec.kind is bool:
            assert "(default:off)" in entry
        elif spec.default is not None:
            assert squeezed(f"(default: {spec.default})") in entry
        if spec.metadata["choices"]:
            assert "{" + ",".join(spec.metadata["choices"]) + "}" in entry
        for part in spec.metadata["metavar"] or ():
            assert part in entry


def test_help_has_every_group_and_no_line_is_cut(help_run):
    assert help_run.err == []
    for name, title in GROUPS.items():
        assert f"{name}:" in help_run.out and squeezed(title) in squeezed(help_run.out)


def test_mistakes_in_the_flags_answer_without_torch_in_one_line_and_exit_code_2(tmp_path):
    done = run_program("baseline.py", "--epoch", "3", cwd=tmp_path)
    assert done.code == 2 and done.out == ""
    assert done.err == ["error: unrecognized arguments: --epoch 3 (did you mean --epochs?)"]
    assert "torch" not in done.imported
    assert not list(tmp_path.iterdir())
    assert outcome("--epochs", "0") == "--epochs 0: must be in [1, 100000]"
