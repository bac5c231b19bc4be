"""`guidance/presets.py`: what --preset and --demo stand for, what wins over them, and the command of a config."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from option_samples import SAMPLES, outcome, write_json
from programs import run_program

from cli.options import inside
from configs import NOT_SAVED, OPTIONS, PRESET_NAMES, TrainingConfig
from guidance import presets
from guidance.arguments import parse_args
from guidance.presets import DEMO_SETTINGS, PRESETS

# The embedded CLIP's, and the guide's three scenarios and five plans, as written there for ViT-L/14.
GUIDE = {
    "lite": "--clip_model lite --clip_pretrained assets --partial_freeze --freeze_layers 4 --epochs 4 --lr 1e-3 "
    "--task_gradients stop_c",
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
    assert list(GUIDE) == list(presets.PRESET_PURPOSES) and set(GUIDE) == set(PRESETS)


def test_the_presets_are_those_that_options_know_by_name():
    assert set(PRESETS) == set(PRESET_NAMES) and list(presets.PRESET_PURPOSES) == list(PRESET_NAMES)
    assert len(set(PRESET_NAMES)) == len(PRESET_NAMES)
    for values in PRESETS.values():
        assert None not in values.values() and not {name for name in values if OPTIONS[name].optional}


def test_demo_settings_are_valid_options():
    assert {demo: TrainingConfig(**found).clip_model for demo, found in DEMO_SETTINGS.items()} == {
        "real": "lite",
        "drawn": "tiny",
    }


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
    if given & set(presets.FREEZING):
        assert found.freeze_clip == alone.freeze_clip
        assert not (found.freeze_clip and (found.partial_freeze or found.lora_rank or found.unfreeze_schedule))
    for option in set(PRESETS[name]) - given - set(presets.FREEZING):
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
    found = parse_args(["--demo", "drawn", "--config", saved, "--preset", "small", "--epochs", "5"])
    assert (found.epochs, found.lr, found.dropout, found.seed) == (5, PRESETS["small"]["lr"], 0.3, 3)
    drawn = DEMO_SETTINGS["drawn"]
    assert (found.clip_model, found.mos_range_q) == (drawn["clip_model"], drawn["mos_range_q"])
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
    assert layers("--preset", "lite") == 4  # which names its model
    assert layers("--preset", "small") == TrainingConfig().freeze_layers


@pytest.mark.parametrize(
    ("name", "says"), [("smal", "did you mean small?"), ("qqqq", "auto, lite"), ("", "auto, lite")]
)
def test_an_unknown_preset_is_refused_with_the_nearest_or_all(name, says, tmp_path):
    for argv in (["--preset", name], ["--config", write_json(tmp_path, {"preset": name})]):
        message = outcome(*argv)
        assert message.startswith(f"--preset {name}: ") and says in message
    assert "did you mean lite?" in outcome("--config", write_json(tmp_path, {"preset": "list"}))
    for wrong in (3, [], {}):
        assert "a text" in outcome("--config", write_json(tmp_path, {"preset": wrong}))


@pytest.mark.parametrize("more", [[], ["--epochs", "3", "--demo"], ["--config", "missing.json"]])
def test_the_list_of_presets_says_what_each_is_for_and_the_flags_it_stands_for(more, capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_args(["--preset", "list", *more])
    lines = capsys.readouterr().out.splitlines()
    for name, purpose in presets.PRESET_PURPOSES.items():
        (place,) = [number for number, line in enumerate(lines) if line.split()[:1] == [name]]
        assert lines[place].endswith(purpose)
        assert replace(parse_args(shlex.split(lines[place + 1])), preset=name) == parse_args(["--preset", name])
    assert "24 blocks" in lines[-1]


def test_the_list_of_presets_answers_without_torch(tmp_path):
    done = run_program("baseline.py", "--preset", "list", "--epochs", "3", "--demo", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (0, f"{presets.preset_table()}\n", [])
    assert not done.imported & {"torch", "numpy", "pandas"}
    assert not list(tmp_path.iterdir())


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
    return st.floats(low, high).filter(lambda value: inside(value, spec.metadata["within"]))


@st.composite
def some_configs(draw: st.DrawFn) -> TrainingConfig:
    """Configs with a few options of one's own, as a command line could give them."""
    names = draw(st.lists(st.sampled_from([name for name in OPTIONS if name != "preset"]), max_size=6, unique=True))
    changes = {name: draw(values_of(name)) for name in names}
    base = DEMO_SETTINGS.get(str(changes.get("demo")), {})
    changes = {name: value for name, value in changes.items() if value is not None or name not in base}
    try:
        return TrainingConfig(**{**base, **changes})
    except ValueError:
        assume(False)
        raise


def read_back(command: str) -> TrainingConfig:
    return parse_args(shlex.split(command)[2:])


@settings(max_examples=100)
@given(some_configs())
def test_the_command_of_a_config_is_read_back_as_the_config(config):
    base = TrainingConfig()
    command = presets.command_line(config)
    assert command.startswith("python baseline.py")
    own = ("data_csv_path", "image_base_dir") if config.demo else ()  # which the demo fills in
    expected = replace(config, **{name: getattr(base, name) for name in (*NOT_SAVED, *own)})
    assert read_back(command) == expected


@pytest.mark.parametrize(
    "value", ["-x", "---", "--lr", "-1", "-1.5", "- a", "a b", 'it\'s "so"', "", "a\nb", "*", "=", "-a=b"]
)
def test_odd_texts_survive_the_command_line(value):
    config = TrainingConfig(name_column=value, group_column=value)
    assert read_back(presets.command_line(config)) == config


@pytest.mark.parametrize(
    "pair", [(-1, 5), (-1e-05, 5.0), (-2.5e-17, 1e-20), (-1e30, -1e-30), (-0.0, 1.0), (-0.5, 1e20)]
)
def test_ranges_below_zero_survive_the_command_line(pair):
    config = TrainingConfig(mos_range_q=pair, mos_range_c=pair)
    assert read_back(presets.command_line(config)) == config


def test_a_command_names_what_differs_and_nothing_else():
    assert presets.command_line(TrainingConfig()) == "python baseline.py"
    config = parse_args(["--preset", "small", "--output_dir", "runs/x", "--overwrite"])
    assert unnamed(read_back(presets.command_line(config))) == unnamed(
        replace(config, output_dir=None, overwrite=False)
    )
    assert "--preset" not in presets.command_line(config) and "runs/x" not in presets.command_line(config)
    demo = parse_args(["--demo", "--epochs", "3", "--no_partial_freeze"])
    assert presets.command_line(demo) == "python baseline.py --no_partial_freeze --epochs 3 --demo"
    drawn = replace(demo, data_csv_path="drawn.csv", image_base_dir="drawn")
    assert presets.command_line(drawn) == presets.command_line(demo)


@pytest.mark.parametrize("layers", [8, 18, 3])
@pytest.mark.parametrize("more", [{}, {"freeze_clip": True}, {"unfreeze_schedule": "20@0"}, {"lora_rank": 2}])
def test_a_demo_that_freezes_otherwise_is_read_back(layers, more):
    config = replace(parse_args(["--demo"]), partial_freeze=False, freeze_layers=layers, **more)
    assert read_back(presets.command_line(config)) == config
    if "freeze_clip" not in more:
        partly = replace(config, partial_freeze=True)
        assert read_back(presets.command_line(partly)) == partly


def test_a_command_takes_changes():
    config = TrainingConfig(epochs=3, freeze_clip=True)
    command = presets.command_line(config, freeze_clip=False, lr=0.5, test=False)
    assert command == "python baseline.py --epochs 3 --lr 0.5 --no_test"
    assert read_back(command) == TrainingConfig(epochs=3, lr=0.5, test=False)
    with pytest.raises(ValueError, match="--lr -1"):
        presets.command_line(config, lr=-1)
