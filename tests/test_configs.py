"""`configs.py`: the frozen list of flags, the bounds of every option, the rules between them, and what follows."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from option_samples import COMPANIONS, as_flags, outcome
from refusals import refusal

import configs
from configs import GROUPS, LOSS_NAMES, OPTIONS, TrainingConfig
from guidance.arguments import parse_args

# The frozen list of flags. Whoever changes a line here changes what existing scripts and saved configs mean.
DOCUMENTED = {
    "--dataset": "csv",
    "--data_root": None,
    "--extra_scores": None,
    "--data_csv_path": "data/data.csv",
    "--image_base_dir": "data/images",
    "--image_size": None,
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
    "--duplicates": "error",
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
    "--stage_features": "auto",
    "--base": "auto",
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
    "--demo": None,
    "--dry_run": False,
    "--no_test": True,
    "--advice": "print",
    "--no_report": True,
    "--tensorboard": False,
    "--tracker": None,
    "--device": "auto",
}
NAMES_WITHIN = [name for name, spec in OPTIONS.items() if spec.metadata["within"]]
NUMBER_NAMES = [name for name, spec in OPTIONS.items() if spec.kind is float]


def test_flags_and_defaults_are_the_documented_ones_in_the_documented_order():
    assert [(spec.flag, spec.default) for spec in OPTIONS.values()] == list(DOCUMENTED.items())
    types = {spec.flag: type(spec.default) for spec in OPTIONS.values()}
    assert types == {flag: type(default) for flag, default in DOCUMENTED.items()}, "1 and 1.0 and True are not the same"


def test_options_and_fields_are_the_same_and_each_has_a_group_and_help():
    assert list(OPTIONS) == [item.name for item in fields(TrainingConfig)]
    for name, spec in OPTIONS.items():
        assert spec.metadata["group"] in GROUPS, name
        assert spec.metadata["help"], name
        spec.check(spec.default)


# -- rules on one option


def step(number: Any, toward: float) -> Any:
    """The next number of the same kind."""
    return number + int(math.copysign(1, toward)) if isinstance(number, int) else math.nextafter(number, toward)


@pytest.mark.parametrize("name", NAMES_WITHIN)
def test_every_interval_is_enforced_at_its_borders(name):
    spec = OPTIONS[name]
    interval = re.fullmatch(r"([(\[])(\S+), (\S+)([)\]])", spec.metadata["within"])
    assert interval, f"--{name}: {spec.metadata['within']} is not an interval such as (0, 1]"
    low, high = float(interval[2]), float(interval[3])
    for border, outward, closed in ((low, -math.inf, interval[1] == "["), (high, math.inf, interval[4] == "]")):
        number = spec.kind(border)
        accepted, refused = (number, step(number, outward)) if closed else (step(number, -outward), number)
        spec.check(accepted)
        assert refusal(TrainingConfig, **{name: refused}).startswith(
            f"--{name} {refused}: must be in {spec.metadata['within']}"
        )


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


def test_numbers_must_be_finite():
    for name in NUMBER_NAMES:
        spec = OPTIONS[name]
        assert f"--{name}" in outcome(*([f"--{name}", "0", "nan"] if spec.pair else [f"--{name}=nan"]))
        for value in (math.nan, math.inf, -math.inf):
            message = refusal(TrainingConfig, **{name: (0.0, value) if spec.pair else value})
            assert message == f"--{name} {value}: must be finite"


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
        (" 2 * huber + fidelity ", ((2.0, "huber"), (1.0, "fidelity"))),
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


# -- what follows from them


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
