"""`configs.py`: the frozen list of flags, precedence, every rule at its border, and messages."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import configs
from configs import DEMO_SETTINGS, GROUPS, LOSS_NAMES, NOT_SAVED, OPTIONS, PRESETS, TrainingConfig, parse_args

# The frozen list of flags. Whoever changes a line here changes what existing scripts and saved configs mean.
DOCUMENTED = {
    "--dataset": "csv",
    "--data_root": None,
    "--extra_scores": None,
    "--data_csv_path": "data/data.csv",
    "--image_base_dir": "data/images",
    "--image_size": 224,
    "--crop_scale_min": 0.8,
    "--crops": 0,
    "--test_crops": None,
    "--global_view": False,
    "--no_horizontal_flip": True,
    "--test_size": 0.2,
    "--val_size": 0.1,
    "--split_by": "prompt",
    "--split_file": None,
    "--kfold": 0,
    "--fold": None,
    "--repeats": 1,
    "--bad_images": "error",
    "--follow_links": False,
    "--strict_splits": False,
    "--seed": 42,
    "--mos_range_q": None,
    "--mos_range_c": None,
    "--name_column": "name",
    "--prompt_column": "prompt",
    "--quality_column": "mos_quality",
    "--consistency_column": "mos_align",
    "--explanation_column": "explanation",
    "--quality_std_column": "std_quality",
    "--consistency_std_column": "std_align",
    "--group_column": None,
    "--clip_model": "ViT-L-14",
    "--clip_pretrained": "openai",
    "--freeze_clip": False,
    "--partial_freeze": False,
    "--freeze_layers": 8,
    "--unfreeze_schedule": None,
    "--lora_rank": 0,
    "--init_from": None,
    "--no_residual_learning": True,
    "--no_calibration": True,
    "--residual_scale_q": 0.2,
    "--residual_scale_c": 0.2,
    "--hidden_dim_q": 128,
    "--hidden_dim_c": 256,
    "--dropout": 0.1,
    "--prompt_levels": False,
    "--use_refinement": False,
    "--refinement_layers": 4,
    "--refinement_heads": 8,
    "--refinement_dim": 256,
    "--w_q": 0.5,
    "--w_c": 0.5,
    "--w_extra": 0.5,
    "--task_gradients": "shared",
    "--w_exp": 0.1,
    "--use_explanations": False,
    "--label_smoothing": 0.0,
    "--loss": "mse+plcc",
    "--epochs": 20,
    "--batch_size": 32,
    "--lr": 3e-05,
    "--head_lr": None,
    "--layer_decay": 1.0,
    "--weight_decay": 0.0001,
    "--warmup_ratio": 0.05,
    "--scheduler": "cosine",
    "--max_grad_norm": 1.0,
    "--gradient_accumulation_steps": 1,
    "--early_stopping_patience": 0,
    "--early_stopping_min_delta": 0.001,
    "--amp": "auto",
    "--select_by": "main",
    "--ema_decay": 0.0,
    "--no_cache": True,
    "--cache_views": None,
    "--cache_dtype": "auto",
    "--cache_max_gb": 20.0,
    "--image_memory_gb": 4.0,
    "--num_workers": None,
    "--compile": "auto",
    "--gradient_checkpointing": False,
    "--dynamic_batch_size": False,
    "--deterministic": False,
    "--max_memory_usage": 0.9,
    "--preset": None,
    "--output_dir": None,
    "--overwrite": False,
    "--resume": None,
    "--save_every_minutes": 10.0,
    "--keep_states": 2,
    "--cache_dir": ".cache",
    "--config": None,
    "--demo": False,
    "--dry_run": False,
    "--no_test": True,
    "--advice": "print",
    "--no_report": True,
    "--tensorboard": False,
    "--tracker": None,
    "--device": "auto",
}

# Values unlike the defaults that satisfy the rules between options, where any value would not do.
SAMPLES: dict[str, Any] = {
    "unfreeze_schedule": "3@0,1@2",
    "init_from": "runs/first",
    "refinement_heads": 4,
    "refinement_dim": 64,
    "loss": "l1+0.5*plcc",
    "seed": 7,
    "resume": "auto",
    "val_size": 0.25,
    "mos_range_q": (0.0, 5.0),
    "mos_range_c": (-1.0, 1.5),
    "max_grad_norm": 0.0,
    "dataset": "agiqa-3k,csv",
    "data_root": "folder",
    "kfold": 5,
    "fold": 2,
}
COMPANIONS = {
    "use_refinement": {"use_residual_learning": False},
    "dataset": {"data_root": "folder"},
    "data_root": {"dataset": "agiqa-3k"},
    "fold": {"kfold": 4},
    "resume": {"output_dir": "run"},
    "test_crops": {"crops": 3},
    "global_view": {"crops": 3},
}
NAMES_WITHIN = [name for name, spec in OPTIONS.items() if spec.metadata["within"]]
NUMBER_NAMES = [name for name, spec in OPTIONS.items() if spec.kind is float]


def sample(name: str) -> Any:
    """A valid value of an option that is not its default."""
    spec = OPTIONS[name]
    if name in SAMPLES:
        return SAMPLES[name]
    if spec.kind is bool:
        return not spec.default
    if spec.metadata["choices"]:
        return next(choice for choice in spec.metadata["choices"] if choice != spec.default)
    if spec.kind is str:
        return "other"
    low, high = map(float, spec.metadata["within"][1:-1].split(","))
    if spec.kind is int:
        return (spec.default or int(low)) + 1
    value = (low + min(high, 1.0)) / 2
    return value / 2 if value == spec.default else value


def as_flags(name: str, value: Any) -> list[str]:
    """The command line that sets an option."""
    spec = OPTIONS[name]
    if spec.kind is bool:
        opposite = "--use_" + spec.flag.removeprefix("--no_") if spec.default else "--no_" + name
        return [spec.flag if value is not spec.default else opposite]
    return [spec.flag, *(map(str, value) if spec.pair else [str(value)])]


def write_json(folder: Path, value: Any) -> str:
    path = folder / "given.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def outcome(*argv: str) -> str:
    """The message that a command line is refused with."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        parse_args(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- flags and defaults


def test_flags_and_defaults_are_the_documented_ones_in_the_documented_order():
    assert [(spec.flag, spec.default) for spec in OPTIONS.values()] == list(DOCUMENTED.items())
    types = {spec.flag: type(spec.default) for spec in OPTIONS.values()}
    assert types == {flag: type(default) for flag, default in DOCUMENTED.items()}, "1 and 1.0 and True are not the same"


def test_a_command_line_without_flags_is_all_defaults():
    config = parse_args([])
    assert config == TrainingConfig()
    assert {name: getattr(config, name) for name in OPTIONS} == {name: spec.default for name, spec in OPTIONS.items()}


def test_options_and_fields_are_the_same_and_each_has_a_group_and_help():
    assert list(OPTIONS) == [item.name for item in fields(TrainingConfig)]
    for name, spec in OPTIONS.items():
        assert spec.metadata["group"] in GROUPS, name
        assert spec.metadata["help"], name
        spec.check(spec.default)


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


def test_a_config_cannot_be_changed_after_its_check():
    with pytest.raises(FrozenInstanceError):
        TrainingConfig().epochs = 0  # type: ignore[misc]


# -- precedence and JSON


def test_flags_win_over_config_over_demo_over_defaults(tmp_path):
    config_file = write_json(tmp_path, {"epochs": 7, "lr": 0.02})
    assert DEMO_SETTINGS["epochs"] not in (5, 7, TrainingConfig().epochs)
    assert DEMO_SETTINGS["clip_model"] != TrainingConfig().clip_model
    found = parse_args(["--demo", "--config", config_file, "--epochs", "5"])
    assert (found.epochs, found.lr, found.clip_model) == (5, 0.02, DEMO_SETTINGS["clip_model"])
    assert found.batch_size == TrainingConfig().batch_size
    assert parse_args(["--demo", "--config", config_file]).epochs == 7
    assert parse_args(["--demo"]).epochs == DEMO_SETTINGS["epochs"]
    assert parse_args(["--config", config_file]).clip_model == TrainingConfig().clip_model


def test_a_flag_wins_even_when_it_gives_the_default(tmp_path):
    config_file = write_json(tmp_path, {"epochs": 7, "use_residual_learning": False, "freeze_clip": True})
    default = TrainingConfig()
    found = parse_args(
        ["--config", config_file, "--epochs", str(default.epochs), "--use_residual_learning", "--no_freeze_clip"]
    )
    assert found == TrainingConfig(config=config_file)


def test_demo_settings_are_valid_options():
    assert TrainingConfig(**DEMO_SETTINGS).clip_model == "tiny"


def test_a_config_with_the_demo_on_brings_the_demo_settings_unless_switched_off(tmp_path):
    config_file = write_json(tmp_path, {"demo": True})
    assert parse_args(["--config", config_file]).clip_model == "tiny"
    assert parse_args(["--config", config_file, "--no_demo"]) == TrainingConfig(config=config_file)


@pytest.mark.parametrize("name", ["data_csv_path", "image_base_dir"])
def test_the_demo_does_not_silently_ignore_data_that_was_named(name, tmp_path):
    message = outcome("--demo", f"--{name}", "x")
    assert "--demo" in message and f"--{name}" in message
    config_file = write_json(tmp_path, {"demo": True})
    assert "--no_demo" in outcome("--config", config_file, f"--{name}", "x")
    assert parse_args(["--config", config_file, "--no_demo", f"--{name}", "x"]) is not None


def test_json_round_trip_keeps_every_option_but_facts_about_the_place(tmp_path):
    clashing = {"partial_freeze", "unfreeze_schedule", "lora_rank", "split_file", "prompt_levels", "preset", "repeats"}
    clashing.add("resume")
    config = TrainingConfig(**{name: sample(name) for name in OPTIONS if name not in clashing})
    assert set(config.to_json()) == set(OPTIONS)
    path = write_json(tmp_path, {**config.to_json(), "provenance": {"machine": "any"}})
    found = TrainingConfig(**configs.load_options(path))
    for name in OPTIONS:
        expected = OPTIONS[name].default if name in NOT_SAVED or name in clashing else sample(name)
        assert getattr(found, name) == expected, name


@settings(max_examples=50)
@given(
    lr=st.floats(0, 10, exclude_min=True),
    low=st.floats(-1e6, 1e6),
    width=st.floats(0.5, 1e6),
    seed=st.integers(0, 2**32 - 1),
    path=st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_json_round_trip_is_exact(tmp_path_factory, lr, low, width, seed, path):
    config = TrainingConfig(lr=lr, mos_range_q=(low, low + width), seed=seed, data_csv_path=path)
    file = tmp_path_factory.getbasetemp() / "round_trip.json"
    file.write_text(json.dumps(config.to_json()), encoding="utf-8")
    assert TrainingConfig(**configs.load_options(file)) == config


def test_a_hand_written_config_may_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "notepad.json"
    path.write_text('{"epochs": 3}', encoding="utf-8-sig")
    assert configs.load_options(path) == {"epochs": 3}


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    message = outcome("--config", write_json(tmp_path, {"epoch": 3}))
    assert "'epoch'" in message and "did you mean 'epochs'" in message and "given.json" in message
    assert "did you mean" not in outcome("--config", write_json(tmp_path, {"qqqqqqqq": 3}))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", "null", "[" * 100_000, b"\xff\xfe{}"])
def test_a_config_that_is_no_json_object_is_refused_by_its_name(content, tmp_path):
    path = tmp_path / "given.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in outcome("--config", str(path))


def test_a_missing_config_and_a_folder_are_refused_by_name(tmp_path):
    assert "nowhere.json: no such file" in outcome("--config", "nowhere.json")
    assert str(tmp_path) in outcome("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("epochs", "20", "a whole number"),
        ("epochs", 2.0, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", None, "a whole number"),
        ("lr", "1e-3", "a number"),
        ("lr", False, "a number"),
        ("lr", [0.1], "a number"),
        ("freeze_clip", 1, "true or false"),
        ("freeze_clip", "yes", "true or false"),
        ("clip_model", 14, "a text"),
        ("mos_range_q", [1], "two numbers"),
        ("mos_range_q", [1, 2, 3], "two numbers"),
        ("mos_range_q", 5, "two numbers"),
        ("mos_range_q", ["1", "5"], "a number"),
        ("scheduler", "cosin", "one of"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_config_is_refused_by_flag_value_and_rule(key, value, rule, tmp_path):
    message = outcome("--config", write_json(tmp_path, {key: value}))
    assert message.startswith(f"--{key} ")
    assert rule in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_in_a_config_that_is_not_finite_is_refused(value, tmp_path):
    path = write_json(tmp_path, {"lr": value})
    message = outcome("--config", path)
    assert message.startswith(f"--config {path}") and "is not a finite number" in message


def test_whole_numbers_are_numbers_in_a_config(tmp_path):
    found = parse_args(["--config", write_json(tmp_path, {"lr": 1, "mos_range_q": [1, 5]})])
    assert (found.lr, found.mos_range_q) == (1, (1, 5))


# -- presets

# The guide's three scenarios and five plans, as written there for ViT-L/14.
GUIDE = {
    "small": "--freeze_clip --residual_scale_q 0.1 --residual_scale_c 0.1 --epochs 30 --batch_size 16 --lr 1e-3 "
    "--w_q 0.5 --w_c 0.5",
    "medium": "--partial_freeze --freeze_layers 18 --residual_scale_q 0.2 --residual_scale_c 0.2 --epochs 20 "
    "--batch_size 32 --lr 3e-5 --w_q 0.5 --w_c 0.5",
    "large": "--residual_scale_q 0.3 --residual_scale_c 0.3 --epochs 15 --batch_size 64 --lr 3e-5 --w_q 0.5 --w_c 0.5",
    "fast": "--freeze_clip --epochs 10 --batch_size 64 --lr 1e-3",
    "balanced": "--partial_freeze --freeze_layers 18 --residual_scale_q 0.2 --residual_scale_c 0.2 --epochs 20 "
    "--batch_size 32 --lr 3e-5 --w_q 0.5 --w_c 0.5",
    "max": "--partial_freeze --freeze_layers 20 --residual_scale_q 0.25 --residual_scale_c 0.25 --epochs 50 "
    "--batch_size 16 --lr 2e-5 --w_q 0.4 --w_c 0.6",
    "quality": "--partial_freeze --freeze_layers 18 --w_q 0.7 --w_c 0.3 --residual_scale_q 0.3 --residual_scale_c 0.15",
    "consistency": "--partial_freeze --freeze_layers 18 --w_q 0.3 --w_c 0.7 --residual_scale_q 0.15 "
    "--residual_scale_c 0.3",
}


def unnamed(config: TrainingConfig) -> TrainingConfig:
    """The same without the names of what it came from."""
    return replace(config, preset=None, config=None)


def never(config: TrainingConfig) -> int:
    pytest.fail("asked although there is nothing to resolve")


@pytest.mark.parametrize("name", GUIDE)
def test_a_preset_is_exactly_the_flags_of_the_guide(name):
    found = parse_args(["--preset", name], num_images=never)
    assert found.preset == name
    assert unnamed(found) == parse_args(GUIDE[name].split())


def test_the_guide_has_a_line_for_every_preset():
    assert list(GUIDE) == list(configs.PRESET_PURPOSES) and set(GUIDE) == set(PRESETS)


@pytest.mark.parametrize("name", GUIDE)
@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 7 --lr 0.25 --w_q 0.9",
        "--batch_size 32 --residual_scale_q 0.2",  # the defaults, said aloud
        "--freeze_clip",
        "--partial_freeze",
        "--partial_freeze --freeze_layers 3",
        "--unfreeze_schedule 22@0,20@5",
        "--lora_rank 4",
    ],
)
def test_flags_win_over_a_preset_and_over_its_way_of_freezing(name, flags):
    found = parse_args(["--preset", name, *flags.split()])
    alone = parse_args(flags.split())
    given = {word.removeprefix("--") for word in flags.split() if word.startswith("--")}
    assert all(getattr(found, option) == getattr(alone, option) for option in given)
    if given & set(configs.FREEZING):
        assert found.freeze_clip == alone.freeze_clip
        assert not (found.freeze_clip and (found.partial_freeze or found.lora_rank or found.unfreeze_schedule))
    for option in set(PRESETS[name]) - given - set(configs.FREEZING):
        assert getattr(found, option) == PRESETS[name][option]


@pytest.mark.parametrize(
    ("flags", "freezing"),
    [
        ("--partial_freeze --freeze_layers 18", "partial18"),
        ("--freeze_layers 18 --partial_freeze", "partial18"),
        ("--no_partial_freeze", "full"),
        ("--lora_rank 4", "full-lora4"),
        ("--freeze_clip", "frozen"),
        ("--unfreeze_schedule 20@0", "partial20"),
        ("--epochs 3", "partial22"),
    ],
)
def test_flags_on_freezing_win_over_the_schedule_of_a_config(flags, freezing, tmp_path):
    saved = write_json(tmp_path, {"unfreeze_schedule": "22@0,20@10"})
    assert parse_args(["--config", saved, *flags.split()]).freezing == freezing


def test_a_switch_turns_off_how_a_preset_freezes():
    assert parse_args(["--preset", "small", "--no_freeze_clip"]).freezing == "full"
    assert parse_args(["--preset", "medium", "--no_partial_freeze"]).freezing == "full"
    assert parse_args(["--preset", "max", "--no_partial_freeze"]).freeze_layers == TrainingConfig().freeze_layers


def test_flags_win_over_a_preset_over_a_config_over_the_demo(tmp_path):
    saved = write_json(tmp_path, {"epochs": 7, "lr": 0.02, "dropout": 0.3, "lora_rank": 4, "seed": 3})
    found = parse_args(["--demo", "--config", saved, "--preset", "small", "--epochs", "5"])
    assert (found.epochs, found.lr, found.dropout, found.seed) == (5, PRESETS["small"]["lr"], 0.3, 3)
    assert found.clip_model == DEMO_SETTINGS["clip_model"] and found.mos_range_q == DEMO_SETTINGS["mos_range_q"]
    assert found.freezing == "frozen"  # neither the demo's layers nor the file's LoRA
    thawing = parse_args(["--config", saved, "--preset", "medium", "--unfreeze_schedule", "20@0,18@4"])
    assert (thawing.lora_rank, thawing.stages) == (0, ((20, 0), (18, 4)))


def test_a_preset_in_a_hand_written_config_lies_below_the_rest_of_the_file(tmp_path):
    saved = write_json(tmp_path, {"preset": "small", "epochs": 7})
    found = parse_args(["--config", saved])
    assert found == replace(parse_args(["--preset", "small", "--epochs", "7"]), config=saved)
    assert parse_args(["--config", saved, "--partial_freeze"]).freezing == "partial8"
    other = parse_args(["--config", saved, "--preset", "large"], num_images=never)
    assert (other.preset, other.freezing, other.epochs) == ("large", "full", PRESETS["large"]["epochs"])
    (tmp_path / "own").mkdir()
    unfrozen = write_json(tmp_path / "own", {"preset": "medium", "freeze_clip": True})
    assert parse_args(["--config", unfrozen]).freezing == "frozen"
    counted = write_json(tmp_path / "own", {"preset": "auto"})
    assert parse_args(["--config", counted], num_images=lambda config: 10).preset == "small"


@pytest.mark.parametrize(
    "flags", ["--preset auto", "--preset max --epochs 9", "--demo --preset medium", "--preset fast"]
)
def test_a_saved_config_of_a_preset_gives_the_same_options_and_resolves_nothing(flags, tmp_path):
    first = parse_args(flags.split(), num_images=lambda config: 2000, num_blocks=lambda config: 12)
    saved = write_json(tmp_path, first.to_json())
    again = parse_args(["--config", saved], num_images=never, num_blocks=never)
    assert replace(again, config=None) == first
    assert parse_args(["--config", saved, "--lora_rank", "2"], num_images=never, num_blocks=never).lora_rank == 2


@pytest.mark.parametrize(
    ("count", "name"), [(1, "small"), (999, "small"), (1000, "medium"), (5000, "medium"), (5001, "large")]
)
def test_auto_goes_by_the_number_of_images_that_the_other_options_leave(count, name):
    asked = []
    argv = ["--preset", "auto", "--test_size", "0.25", "--epochs", "3"]
    found = parse_args(argv, num_images=lambda config: asked.append(config) or count)
    assert asked == [parse_args(argv[2:])]
    assert found == parse_args(["--preset", name, *argv[2:]])
    assert found.preset == name


def test_auto_without_anything_to_count_by_stays_auto():
    assert parse_args(["--preset", "auto", "--epochs", "3"]) == TrainingConfig(preset="auto", epochs=3)


@pytest.mark.parametrize(("depth", "eighteen", "twenty"), [(12, 9, 10), (24, 18, 20), (32, 24, 27), (None, 18, 20)])
def test_frozen_layers_follow_the_depth_of_the_model(depth, eighteen, twenty):
    def layers(*argv: str) -> int:
        return parse_args(argv, num_blocks=lambda config: depth).freeze_layers

    assert [layers("--preset", name) for name in ("medium", "max", "quality")] == [eighteen, twenty, eighteen]
    assert layers("--preset", "medium", "--freeze_layers", "5") == 5
    assert layers("--preset", "small") == TrainingConfig().freeze_layers


@pytest.mark.parametrize(
    ("name", "says"), [("smal", "did you mean small?"), ("qqqq", "auto, small"), ("", "auto, small")]
)
def test_an_unknown_preset_is_refused_with_the_nearest_or_all(name, says, tmp_path):
    for argv in (["--preset", name], ["--config", write_json(tmp_path, {"preset": name})]):
        message = outcome(*argv)
        assert message.startswith(f"--preset {name}: ") and says in message
    assert "list shows them" in outcome("--config", write_json(tmp_path, {"preset": "list"}))
    for wrong in (3, [], {}):
        assert "a text" in outcome("--config", write_json(tmp_path, {"preset": wrong}))


@pytest.mark.parametrize("more", [[], ["--epochs", "3", "--demo"], ["--config", "missing.json"]])
def test_the_list_of_presets_answers_without_torch(more, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "baseline.py"), "--preset", "list", *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert not imported(done) & {"torch", "numpy", "pandas"}
    lines = done.stdout.splitlines()
    for name, purpose in configs.PRESET_PURPOSES.items():
        (place,) = [number for number, line in enumerate(lines) if line.split()[:1] == [name]]
        assert lines[place].endswith(purpose)
        assert replace(parse_args(shlex.split(lines[place + 1])), preset=name) == parse_args(["--preset", name])
    assert "24 blocks" in lines[-1] and not list(tmp_path.iterdir())


# -- from a config to the command that runs it

WORDS = st.one_of(  # but "--" alone, which argparse drops before Python 3.13
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda text: text != "--"
    ),
    st.sampled_from(["-x", "--lr", "-1", "- a", "a b", "it's", '"', "$HOME", "a\nb", "-é=1", ""]),
)


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Valid values of an option."""
    spec = OPTIONS[name]
    if name in SAMPLES and not spec.pair:
        return st.sampled_from([SAMPLES[name], spec.default])
    if spec.pair:
        numbers = st.floats(-1e30, 1e30)
        return st.none() | st.tuples(numbers, numbers).filter(lambda pair: pair[0] < pair[1])
    if spec.kind is bool:
        return st.booleans()
    if spec.metadata["choices"]:
        return st.sampled_from(spec.metadata["choices"])
    if spec.kind is str:
        return WORDS if not spec.optional else st.none() | WORDS
    low, high = map(float, spec.metadata["within"][1:-1].split(","))
    if spec.kind is int:
        return st.integers(int(low), int(high))
    return st.floats(low, high).filter(lambda value: configs.inside(value, spec.metadata["within"]))


@st.composite
def some_configs(draw: st.DrawFn) -> TrainingConfig:
    """Configs with a few options of one's own, as a command line could give them."""
    names = draw(st.lists(st.sampled_from([name for name in OPTIONS if name != "preset"]), max_size=6, unique=True))
    changes = {name: draw(values_of(name)) for name in names}
    base = DEMO_SETTINGS if changes.get("demo") else {}
    changes = {name: value for name, value in changes.items() if value is not None or name not in base}
    try:
        return TrainingConfig(**{**base, **changes})
    except ValueError:
        assume(False)
        raise


def read_back(command: str) -> TrainingConfig:
    return parse_args(shlex.split(command)[2:])


@settings(max_examples=150)
@given(some_configs())
def test_the_command_of_a_config_is_read_back_as_the_config(config):
    base = TrainingConfig()
    command = configs.command_line(config)
    assert command.startswith("python baseline.py")
    own = ("data_csv_path", "image_base_dir") if config.demo else ()  # which the demo fills in
    expected = replace(config, **{name: getattr(base, name) for name in (*NOT_SAVED, *own)})
    assert read_back(command) == expected


@pytest.mark.parametrize(
    "value", ["-x", "---", "--lr", "-1", "-1.5", "- a", "a b", 'it\'s "so"', "", "a\nb", "*", "=", "-a=b"]
)
def test_odd_texts_survive_the_command_line(value):
    config = TrainingConfig(name_column=value, group_column=value)
    assert read_back(configs.command_line(config)) == config


@pytest.mark.parametrize(
    "pair", [(-1, 5), (-1e-05, 5.0), (-2.5e-17, 1e-20), (-1e30, -1e-30), (-0.0, 1.0), (-0.5, 1e20)]
)
def test_ranges_below_zero_survive_the_command_line(pair):
    config = TrainingConfig(mos_range_q=pair, mos_range_c=pair)
    assert read_back(configs.command_line(config)) == config


def test_a_command_names_what_differs_and_nothing_else():
    assert configs.command_line(TrainingConfig()) == "python baseline.py"
    config = parse_args(["--preset", "small", "--output_dir", "runs/x", "--overwrite"])
    assert unnamed(read_back(configs.command_line(config))) == unnamed(
        replace(config, output_dir=None, overwrite=False)
    )
    assert "--preset" not in configs.command_line(config) and "runs/x" not in configs.command_line(config)
    demo = parse_args(["--demo", "--epochs", "3", "--no_partial_freeze"])
    assert configs.command_line(demo) == "python baseline.py --no_partial_freeze --epochs 3 --demo"
    drawn = replace(demo, data_csv_path="drawn.csv", image_base_dir="drawn")
    assert configs.command_line(drawn) == configs.command_line(demo)


@pytest.mark.parametrize("layers", [8, 18, 3])
@pytest.mark.parametrize("more", [{}, {"freeze_clip": True}, {"unfreeze_schedule": "20@0"}, {"lora_rank": 2}])
def test_a_demo_that_freezes_otherwise_is_read_back(layers, more):
    config = replace(parse_args(["--demo"]), partial_freeze=False, freeze_layers=layers, **more)
    assert read_back(configs.command_line(config)) == config
    if "freeze_clip" not in more:
        partly = replace(config, partial_freeze=True)
        assert read_back(configs.command_line(partly)) == partly


def test_a_command_takes_changes_and_another_program():
    config = TrainingConfig(epochs=3, freeze_clip=True)
    command = configs.command_line(config, "search.py", freeze_clip=False, lr=0.5, test=False)
    assert command == "python search.py --epochs 3 --lr 0.5 --no_test"
    assert read_back(command) == TrainingConfig(epochs=3, lr=0.5, test=False)
    with pytest.raises(ValueError, match="--lr -1"):
        configs.command_line(config, lr=-1)


def test_null_in_a_config_says_nothing_so_that_no_value_of_the_demo_is_unsaid(tmp_path):
    saved = write_json(tmp_path, {"demo": True, "mos_range_q": None, "preset": None, "head_lr": None})
    found = parse_args(["--config", saved])
    assert found == replace(parse_args(["--demo"]), config=saved)
    assert not [name for name in DEMO_SETTINGS if getattr(found, name) is None]
    for values in PRESETS.values():
        assert None not in values.values() and not {name for name in values if OPTIONS[name].optional}


# -- rules on one option


@pytest.mark.parametrize("name", NAMES_WITHIN)
@pytest.mark.parametrize("side", ["low", "high"])
def test_every_interval_is_enforced_at_its_border(name, side):
    spec = OPTIONS[name]
    interval = re.fullmatch(r"([(\[])(\S+), (\S+)([)\]])", spec.metadata["within"])
    assert interval, f"--{name}: {spec.metadata['within']} is not an interval such as (0, 1]"
    number = spec.kind(float(interval[2 if side == "low" else 3]))
    closed = interval[1] == "[" if side == "low" else interval[4] == "]"
    outward = -math.inf if side == "low" else math.inf

    def step(toward: float) -> Any:
        return number + int(math.copysign(1, toward)) if spec.kind is int else math.nextafter(number, toward)

    accepted, refused = (number, step(outward)) if closed else (step(-outward), number)
    spec.check(accepted)
    with pytest.raises(ValueError, match=re.escape(f"must be in {spec.metadata['within']}")) as caught:
        TrainingConfig(**{name: refused})
    assert str(caught.value).startswith(f"--{name} {refused}: ")


def test_an_interval_is_read_as_written():
    values = (0, 0.5, 1)
    assert [configs.inside(value, "(0, 1]") for value in values] == [False, True, True]
    assert [configs.inside(value, "[0, 1)") for value in values] == [True, True, False]
    assert [configs.inside(value, "[0, 1]") for value in (-0.1, 1.1)] == [False, False]


@pytest.mark.parametrize("name", [name for name, spec in OPTIONS.items() if spec.metadata["choices"]])
def test_choices_are_all_accepted_and_nothing_else(name):
    choices = OPTIONS[name].metadata["choices"]
    for choice in choices:
        others = COMPANIONS.get(name, {}) if choice != OPTIONS[name].default else {}
        words = [word for key, item in others.items() for word in as_flags(key, item)]
        assert getattr(parse_args([f"--{name}", choice, *words]), name) == choice
    for wrong in ("", choices[0].upper(), "nonsense"):
        message = outcome(f"--{name}", wrong)
        assert f"--{name}" in message and all(choice in message for choice in choices)
        with pytest.raises(ValueError, match=f"--{name} {wrong}: must be one of"):
            TrainingConfig(**{name: wrong})


@pytest.mark.parametrize("name", NUMBER_NAMES)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_must_be_finite(name, value):
    spec = OPTIONS[name]
    argv = [f"--{name}", "0", value] if spec.pair else [f"--{name}={value}"]
    assert f"--{name}" in outcome(*argv)
    given = (0.0, float(value)) if spec.pair else float(value)
    with pytest.raises(ValueError, match=f"--{name} {value}: must be finite"):
        TrainingConfig(**{name: given})


@pytest.mark.parametrize("argv", [["--epochs", "ten"], ["--epochs", "2.5"], ["--lr", ""], ["--mos_range_q", "1", "x"]])
def test_a_value_that_is_no_number_is_refused_by_flag_and_value(argv):
    message = outcome(*argv)
    assert argv[0] in message and repr(argv[-1]) in message


@pytest.mark.parametrize("argv", [["--epochs"], ["--mos_range_q", "1"], ["--mos_range_q", "1", "2", "3"]])
def test_too_few_or_too_many_values_are_refused(argv):
    assert outcome(*argv)


# -- rules between options


@pytest.mark.parametrize(
    ("argv", "culprits"),
    [
        (["--freeze_clip", "--partial_freeze"], ["--freeze_clip", "--partial_freeze"]),
        (["--use_refinement"], ["--use_refinement", "--no_residual_learning"]),
        (["--prompt_levels", "--no_residual_learning"], ["--prompt_levels", "--no_residual_learning"]),
        (["--global_view"], ["--global_view", "--crops"]),
        (["--test_crops", "4"], ["--test_crops", "--crops"]),
        (["--kfold", "1"], ["--kfold 1"]),
        (["--fold", "1"], ["--fold 1", "--kfold"]),
        (["--kfold", "3", "--fold", "4"], ["--fold 4", "--kfold"]),
        (["--kfold", "3", "--split_file", "folds.csv"], ["--kfold", "--split_file"]),
        (["--no_test", "--repeats", "2"], ["--no_test", "--repeats"]),
        (["--no_test", "--kfold", "3"], ["--no_test", "--kfold"]),
        (["--split_file", "no/such/folder.csv"], ["--split_file no/such/folder.csv"]),
        (["--dataset", ""], ["--dataset"]),
        (["--dataset", "agiqa-3k"], ["--dataset agiqa-3k", "--data_root"]),
        (["--dataset", "agiqa-3k,agiqa-3k", "--data_root", "a,b"], ["--dataset", "twice"]),
        (["--dataset", "agiqa-3k,koniq-10k", "--data_root", "a"], ["--data_root", "2 folder(s)"]),
        (["--dataset", "agiqa3k", "--data_root", "a"], ["--dataset agiqa3k", "agiqa-3k"]),
        (
            ["--dataset", "agiqa-3k,koniq-10k", "--data_root", "a,b", "--mos_range_q", "1", "5"],
            ["--mos_range_q", "CSV"],
        ),
        *(
            (["--extra_scores", name], [f"--extra_scores {name}"])
            for name in ("q", "mos_align", "a b", "x_std", "fit_q")
        ),
        (["--extra_scores", "x,mos_x"], ["--extra_scores x,mos_x"]),
        (["--w_q", "0", "--w_c", "0"], ["--w_q", "--w_c"]),
        (["--test_size", "0.7", "--val_size", "0.3"], ["--test_size 0.7", "--val_size 0.3"]),
        (["--test_size", "0.9"], ["--test_size 0.9", "--val_size 0.1"]),
        (["--mos_range_q", "5", "1"], ["--mos_range_q 5.0 1.0"]),
        (["--mos_range_c", "2", "2"], ["--mos_range_c 2.0 2.0"]),
        (["--refinement_dim", "100"], ["--refinement_dim 100", "--refinement_heads 8"]),
        (["--freeze_clip", "--lora_rank", "4"], ["--freeze_clip", "--lora_rank"]),
        (["--freeze_clip", "--unfreeze_schedule", "2@0"], ["--freeze_clip", "--unfreeze_schedule"]),
        (["--lora_rank", "4", "--unfreeze_schedule", "2@0"], ["--lora_rank", "--unfreeze_schedule"]),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(argv, culprits):
    message = outcome(*argv)
    assert all(culprit in message for culprit in culprits)


@pytest.mark.parametrize(
    "argv",
    [
        ["--use_refinement", "--no_residual_learning"],
        ["--w_q", "0"],
        ["--w_c", "0"],
        ["--test_size", "0.69", "--val_size", "0.3"],
        ["--mos_range_q", "-1", "1"],
        ["--freeze_clip", "--no_freeze_clip", "--partial_freeze"],
        ["--partial_freeze", "--lora_rank", "4"],
        ["--no_test", "--kfold", "3", "--fold", "1"],
    ],
)
def test_options_that_look_like_a_contradiction_but_are_none_are_accepted(argv):
    assert parse_args(argv) is not None


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("mse", ((1.0, "mse"),)),
        ("mse+0.5*plcc", ((1.0, "mse"), (0.5, "plcc"))),
        (" 2 * huber + rank ", ((2.0, "huber"), (1.0, "rank"))),
        ("1e+2*mse+1e-3*l1", ((100.0, "mse"), (0.001, "l1"))),
        (".5*fidelity", ((0.5, "fidelity"),)),
    ],
)
def test_loss_expressions_are_read(text, terms):
    assert parse_args(["--loss", text]).loss_terms == terms


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "mse+",
        "+mse",
        "mes",
        "0*mse",
        "-1*mse",
        "nan*mse",
        "inf*mse",
        "*mse",
        "2*",
        "2mse",
        "mse*2",
        "mse,plcc",
    ],
)
def test_loss_expressions_that_cannot_be_read_are_refused_with_the_names(text):
    with pytest.raises(ValueError, match="--loss") as caught:
        TrainingConfig(loss=text)
    assert all(name in str(caught.value) for name in LOSS_NAMES)


@given(
    st.lists(
        st.tuples(st.floats(0, exclude_min=True, allow_infinity=False), st.sampled_from(LOSS_NAMES)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["+", " + "]),
)
def test_any_weighted_sum_of_losses_is_read_back(terms, plus):
    assert configs.parse_loss(plus.join(f"{weight!r}*{name}" for weight, name in terms)) == tuple(terms)


@pytest.mark.parametrize(
    "text", ["", "3", "3@1", "3@0,1", "3@0,1@0", "3@0,4@2", "3@0,3@2", "3@0,2@5,1@4", "-1@0", "a@0", "3@0;1@2"]
)
def test_unfreeze_schedules_that_cannot_be_followed_are_refused(text):
    with pytest.raises(ValueError, match="--unfreeze_schedule"):
        configs.parse_unfreeze_schedule(text)


def test_the_freezing_mode_has_a_short_name():
    assert TrainingConfig().freezing == "full"
    assert TrainingConfig(freeze_clip=True).freezing == "frozen"
    assert TrainingConfig(partial_freeze=True, freeze_layers=18).freezing == "partial18"
    assert TrainingConfig(unfreeze_schedule="22@0,20@10").freezing == "partial22"
    assert TrainingConfig(lora_rank=4).freezing == "full-lora4"


def test_the_stages_of_thawing_follow_from_the_freezing_flags():
    assert TrainingConfig().stages == ((None, 0),)
    assert TrainingConfig(partial_freeze=True, freeze_layers=3).stages == ((3, 0),)
    assert TrainingConfig(unfreeze_schedule="22@0, 20@10").stages == ((22, 0), (20, 10))


def test_the_number_of_cached_views_is_the_one_asked_for_or_the_one_that_help_names():
    named = re.search(r"default: (\d+) with --freeze_clip, else (\d+)\)", OPTIONS["cache_views"].metadata["help"])
    frozen, others = map(int, named.groups())
    assert TrainingConfig(freeze_clip=True).num_views == frozen
    for mode in ({}, {"partial_freeze": True}, {"unfreeze_schedule": "3@0,1@2"}, {"lora_rank": 4}):
        assert TrainingConfig(**mode).num_views == others
    for number in (0, frozen + others + 1):
        assert TrainingConfig(cache_views=number).num_views == number
        assert TrainingConfig(cache_views=number, freeze_clip=True).num_views == number


# -- flags that are none


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
@pytest.mark.parametrize("joined", [False, True])
def test_a_misspelt_flag_is_refused_with_the_nearest_one(wrong, near, joined):
    message = outcome(f"{wrong}=1") if joined else outcome(wrong, "1")
    assert wrong in message and f"did you mean {near}?" in message


def test_a_flag_unlike_any_other_points_to_help():
    message = outcome("--qqqqqqqqqqqq")
    assert "--qqqqqqqqqqqq" in message and "--help" in message


def test_no_flag_can_be_abbreviated():
    flags = {as_flags(name, sample(name))[0] for name in OPTIONS}
    tried = 0
    for name in OPTIONS:
        words = as_flags(name, sample(name))
        if words[0][:-1] not in flags:
            assert words[0][:-1] in outcome(words[0][:-1], *words[1:])
            tried += 1
    assert tried == len(OPTIONS)


@pytest.mark.parametrize("argv", [["data.csv"], ["-x"], ["--", "x"]])
def test_words_that_are_no_flags_are_refused(argv):
    assert argv[-1].lstrip("-") in outcome(*argv)


# -- help


def squeezed(text: str) -> str:
    """Text without the blanks and line breaks that wrapping adds."""
    return "".join(text.split())


@pytest.fixture(scope="module")
def help_run() -> tuple[subprocess.CompletedProcess[str], float]:
    """`baseline.py --help` with a list of everything it imports, and its processor time: others may be at work."""
    command = [sys.executable, "-X", "importtime", "baseline.py", "--help"]
    before = os.times()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
    after = os.times()
    return done, sum(after[2:4]) - sum(before[2:4])


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level packages that a process run with -X importtime imported."""
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}


def test_help_answers_within_a_second_and_without_torch(help_run):
    done, seconds = help_run
    assert {"argparse", "configs"} <= imported(done)
    assert not imported(done) & {"torch", "numpy", "pandas", "open_clip", "PIL"}
    assert seconds < 1


@pytest.mark.parametrize("name", OPTIONS)
def test_help_shows_each_flag_with_default_and_recommended_range(name, help_run):
    spec, (done, _) = OPTIONS[name], help_run
    start = re.search(rf"^  {spec.flag}\b", done.stdout, re.MULTILINE)
    assert start
    rest = done.stdout[start.end() :]
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
    done, _ = help_run
    assert done.stderr.count("Traceback") == 0
    for name, title in GROUPS.items():
        assert f"{name}:" in done.stdout and squeezed(title) in squeezed(done.stdout)


@pytest.mark.parametrize(
    ("program", "argv", "says"),
    [
        ("baseline.py", ["--epochs", "0"], "--epochs 0: must be in [1, 100000]"),
        ("baseline.py", ["--epoch", "3"], "did you mean --epochs?"),
        ("predict.py", ["--checkpoint", "x"], "no images"),
        ("predict.py", ["x.png"], "--checkpoint"),
    ],
)
def test_mistakes_in_the_flags_answer_without_torch_in_one_line_and_exit_code_2(program, argv, says, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / program), *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == ""
    assert len(said) == 1 and said[0].startswith("error: ") and says in said[0]
    assert "torch" not in imported(done)
    assert not list(tmp_path.iterdir())


# -- exit codes


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("--lr 0: must be above 0"), 2, "error: --lr 0: must be above 0\n"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 2, "error: x.png: No such file or directory\n"),
        (OSError("2 of 3 images cannot be read"), 2, "error: 2 of 3 images cannot be read\n"),
        (ArithmeticError("loss is nan"), 1, "failed: loss is nan\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(error, code, says, capsys):
    with pytest.raises(SystemExit) as caught, configs.one_line_errors(ArithmeticError):
        raise error
    assert caught.value.code == code
    printed = capsys.readouterr()
    assert printed.err.startswith(says) and printed.err.count("\n") == 1 and printed.out == ""


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), configs.one_line_errors():
        _ = 1 / 0


def test_control_characters_are_spelt_out_and_everything_else_is_left(capsys):
    text = "".join(map(chr, range(0x20, 0x7F))) + "é猫\t\n"
    assert configs.printable(text) == text
    hostile = "\x1b[2J\r\x00\x7f\x9b\u202e\u2066\ud800"
    assert configs.printable(hostile) == "\\x1b[2J\\r\\x00\\x7f\\x9b\\u202e\\u2066\\ud800"
    with configs.one_line_errors():
        print(f"printed {hostile}", flush=True)
    with pytest.raises(SystemExit), configs.one_line_errors():
        raise ValueError(hostile)
    out, err = capsys.readouterr()
    assert out == f"printed {configs.printable(hostile)}\n" and err == f"error: {configs.printable(hostile)}\n"
