"""Advice: each rule just inside and outside, what it says, and that doing what it says silences it."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import configs
from cli import options
from configs import TrainingConfig
from guidance import advice, presets
from guidance.advice import Facts, Remark, advise
from guidance.arguments import parse_args
from guidance.presets import PRESETS

# Settings and facts that leave nothing to be said: others are compared with them one by one.
PLAIN = parse_args(["--preset", "medium"])
FACTS = Facts(num_train=2000, num_val=200, num_blocks=24, num_parameters=400_000_000, tasks=("q", "c"), num_steps=1000)
BIG = {"num_train": 9000}
SMALL = {"num_train": 900}
FULL = {"partial_freeze": False}
FROZEN = {"partial_freeze": False, "freeze_clip": True, "lr": 1e-3}
TUNED = {**FULL, "residual_scale_q": 0.3, "residual_scale_c": 0.3}
GPU = {"free_memory": 100e9, "bytes_per_image": 1e9}


def remarks(config: dict[str, Any], facts: dict[str, Any]) -> list[Remark]:
    return advise(replace(PLAIN, **config), replace(FACTS, **facts))


def up(value: float) -> float:
    return math.nextafter(value, math.inf)


def down(value: float) -> float:
    return math.nextafter(value, 0)


# Settings, facts, and the flag of the one remark on them, or None.
RULES: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    # learning rate, by what is trained
    ({"lr": 2e-5}, {}, None),
    ({"lr": down(2e-5)}, {}, "--lr"),
    ({"lr": 1e-4}, {}, None),
    ({"lr": up(1e-4)}, {}, "--lr"),
    ({"lr": 1e-5, "init_from": "runs/first"}, {}, None),
    ({"lr": down(1e-5), "init_from": "runs/first"}, {}, "--lr"),
    ({**TUNED, "lr": 1e-5}, BIG, None),
    ({**TUNED, "lr": down(1e-5)}, BIG, "--lr"),
    ({**TUNED, "lr": up(3e-5)}, BIG, "--lr"),
    ({**FROZEN, "lr": 5e-3}, {}, None),
    ({**FROZEN, "lr": up(5e-3)}, {}, "--lr"),
    ({**FROZEN, "lr": down(1e-3)}, {}, "--lr"),
    ({**FROZEN, "lr": 3e-5, "head_lr": 1e-3}, {}, None),
    ({**FROZEN, "head_lr": down(1e-3)}, {}, "--head_lr"),
    ({**FROZEN, "head_lr": up(5e-3)}, {}, "--head_lr"),
    ({"lora_rank": 4, "lr": 1e-3}, {}, None),
    ({"lora_rank": 4, "lr": up(1e-3)}, {}, "--lr"),
    ({"lora_rank": 4, "lr": down(3e-5)}, {}, "--lr"),
    ({"lr": 3e-3}, {"num_parameters": advice.SMALL_CLIP - 1}, None),
    ({"lr": 3e-3}, {"num_parameters": advice.SMALL_CLIP}, "--lr"),
    ({"lr": up(3e-3)}, {"num_parameters": advice.SMALL_CLIP - 1}, "--lr"),
    ({"lr": 3e-3, "clip_pretrained": "none"}, {}, None),
    ({"lr": 3e-3, "clip_pretrained": "none", "init_from": "runs/first"}, {}, "--lr"),
    # frozen layers, by depth
    *(({"freeze_layers": layers}, {}, None) for layers in (16, 18, 20, 22)),
    *(({"freeze_layers": layers}, {}, "--freeze_layers") for layers in (0, 15, 23, 24)),
    *(({"freeze_layers": layers}, {"num_blocks": 12}, None) for layers in (8, 9, 10, 11)),
    *(({"freeze_layers": layers}, {"num_blocks": 12}, "--freeze_layers") for layers in (7, 12)),
    *(({"freeze_layers": layers}, {"num_blocks": None}, None) for layers in (0, 18)),
    *(({"freeze_layers": layers}, {"num_blocks": 2}, None) for layers in (0, 1, 2)),
    ({"freeze_layers": 2}, {"num_blocks": 3}, None),
    ({"freeze_layers": 1}, {"num_blocks": 3}, "--freeze_layers"),
    ({"freeze_layers": 0, "clip_pretrained": "none"}, {}, None),
    ({"freeze_layers": 0, "lora_rank": 4}, {}, None),
    ({"partial_freeze": False, "unfreeze_schedule": "22@0,20@5"}, {}, None),
    ({"partial_freeze": False, "unfreeze_schedule": "23@0,20@5"}, {}, "--unfreeze_schedule"),
    ({"partial_freeze": False, "unfreeze_schedule": "15@0"}, {}, "--unfreeze_schedule"),
    # how much is frozen, by the number of images
    (FROZEN, {"num_train": 5000}, None),
    ({**FROZEN, "residual_scale_q": 0.3, "residual_scale_c": 0.3}, {"num_train": 5001}, "--freeze_clip"),
    (TUNED, {"num_train": 5001}, None),
    (FULL, {"num_train": 5000}, "--partial_freeze"),
    (FULL, {"num_train": 1000}, "--partial_freeze"),
    (FULL, {"num_train": 999}, "--freeze_clip"),
    ({**FULL, "clip_pretrained": "none"}, {"num_train": 999}, None),
    ({**FULL, "lora_rank": 8}, {"num_train": 999}, None),
    # residual scales, by the number of images
    *(
        ({f"residual_scale_{task}": value}, facts, f"--residual_scale_{task}" if said else None)
        for task in "qc"
        for value, facts, said in [
            (0.05, {"num_train": 999}, False),
            (down(0.05), {"num_train": 999}, True),
            (up(0.2), {"num_train": 999}, True),
            (0.15, {"num_train": 1000}, False),
            (0.3, {"num_train": 5000}, False),
            (down(0.15), {"num_train": 1000}, True),
            (up(0.3), {"num_train": 5000}, True),
            (0.5, {"num_train": 5001}, False),
            (down(0.2), {"num_train": 5001}, True),
            (up(0.5), {"num_train": 5001}, True),
        ]
    ),
    ({"residual_scale_c": 0.9}, {"tasks": ("q",)}, None),
    ({"residual_scale_q": 0.9}, {"tasks": ("c", "beauty")}, None),
    ({"residual_scale_q": 0.9, "use_residual_learning": False}, {}, None),
    # batch size, by the number of images and by memory
    ({"batch_size": 225}, SMALL, None),
    ({"batch_size": 226}, SMALL, "--batch_size"),
    ({"batch_size": 25, "gradient_accumulation_steps": 9}, SMALL, None),
    ({"batch_size": 25, "gradient_accumulation_steps": 10}, SMALL, "--batch_size"),
    ({"batch_size": 90}, GPU, None),
    ({"batch_size": 91}, GPU, "--batch_size"),
    ({"batch_size": 91, "gradient_checkpointing": True}, GPU, None),
    ({"batch_size": 91, "dynamic_batch_size": True}, GPU, None),
    ({"batch_size": 91}, {**GPU, "bytes_per_image": 0.0}, None),
    ({"batch_size": 91, "max_memory_usage": 1.0}, GPU, None),
    ({"batch_size": 16}, GPU, None),
    ({"batch_size": 15}, GPU, "--batch_size"),
    ({"batch_size": 15}, {**GPU, "num_train": 640}, "--batch_size"),
    ({"batch_size": 15}, {**GPU, "num_train": 639}, None),
    ({"batch_size": 15}, {**GPU, "bytes_per_image": 2.9e9}, None),
    ({"batch_size": 15}, {**GPU, "bytes_per_image": 90e9 / 32}, "--batch_size"),
    ({"batch_size": 15}, {}, None),
    ({"batch_size": 1}, {"num_train": 3}, None),
    ({"batch_size": 2}, {"num_train": 7}, "--batch_size"),
    # weights of the losses
    ({"w_q": 0.3, "w_c": 0.7}, {}, None),
    ({"w_q": 3.0, "w_c": 7.0}, {}, None),
    ({"w_q": 0.29, "w_c": 0.71}, {}, "--w_q"),
    ({"w_q": 0.71, "w_c": 0.29}, {}, "--w_c"),
    ({"w_q": 0.0, "w_c": 1.0}, {"tasks": ("c",)}, None),
    # epochs and warm-up
    ({"epochs": 10}, {}, None),
    ({"epochs": 9}, {}, "--epochs"),
    ({"epochs": 50}, {}, None),
    ({"epochs": 51}, {}, "--epochs"),
    ({"epochs": 51, "early_stopping_patience": 5}, {}, None),
    ({"warmup_ratio": 0.1}, {}, None),
    ({"warmup_ratio": 0.101}, {}, "--warmup_ratio"),
    ({"warmup_ratio": 0.003}, {}, None),
    ({"warmup_ratio": 0.002}, {}, "--warmup_ratio"),
    ({"warmup_ratio": 0.0}, {"num_steps": 30}, None),  # too short a run for any warm-up
    ({"warmup_ratio": 0.0}, {"num_steps": 31}, "--warmup_ratio"),
    ({**FROZEN, "warmup_ratio": 0.0}, {}, None),
    # validation
    ({}, {"num_val": 50}, None),
    ({}, {"num_val": 49}, "--val_size"),
    # ranges that depend on nothing
    *(
        ({name: value, **more}, {}, f"--{name}" if said else None)
        for name, low, high, more in [
            ("weight_decay", 1e-5, 1e-3, {}),
            ("dropout", 0.0, 0.3, {}),
            ("label_smoothing", 0.0, 0.1, {}),
            ("crop_scale_min", 0.6, 1.0, {}),
            ("test_size", 0.1, 0.3, {}),
            ("w_exp", 0.05, 0.3, {"use_explanations": True}),
        ]
        for value, said in [(low, False), (high, False), (down(low), True), (up(high), True)]
        if options.inside(value, configs.OPTIONS[name].metadata["within"]) and (value != low or not said)
    ),
    *(
        ({name: value}, {}, f"--{name}" if said else None)
        for name in ("hidden_dim_q", "hidden_dim_c")
        for value, said in [(64, False), (512, False), (63, True), (513, True)]
    ),
    ({"w_exp": 0.9}, {}, None),
    ({"test_size": 0.05, "kfold": 5}, {}, None),
]


@pytest.mark.parametrize(("config", "facts", "flag"), RULES)
def test_each_rule_speaks_just_outside_of_what_is_usual_and_not_inside(config, facts, flag):
    assert [remark.flag for remark in remarks(config, facts)] == ([flag] if flag else [])


def test_every_function_of_rules_is_tried():
    tried = {flag.removeprefix("--") for _, _, flag in RULES if flag}
    assert set(advice.USUAL) <= tried
    assert len(tried - set(advice.USUAL)) == 14


# -- presets, the guide and the demo


@pytest.mark.parametrize("free_memory", [None, 70e9])
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("small", (350, 640, 999)),
        ("medium", (1000, 2400, 5000)),
        ("large", (5001, 9000, 30_000)),
        ("fast", (350, 2400, 5000)),
        ("balanced", (1000, 2400, 5000)),
        ("max", (1000, 2400, 5000)),
        ("quality", (1000, 2400, 5000)),
        ("consistency", (1000, 2400, 5000)),
    ],
)
def test_presets_get_no_remark_where_they_belong(name, counts, free_memory):
    assert name in PRESETS
    for depth in (12, 24, 32):
        config = parse_args(["--preset", name], num_blocks=lambda config, depth=depth: depth)
        for count in counts:
            facts = facts_of(config, replace(FACTS, num_blocks=depth), count / 0.7, free_memory)
            assert advise(config, facts) == []


def test_the_two_stages_of_the_guide_get_no_remark():
    first = parse_args(shlex.split("--freeze_clip --epochs 10 --lr 1e-3"))
    second = parse_args(shlex.split("--partial_freeze --freeze_layers 20 --epochs 20 --lr 1e-5 --init_from runs/first"))
    thawing = parse_args(shlex.split("--unfreeze_schedule 22@0,20@10,18@20 --epochs 30"))
    for config in (first, second, thawing):
        assert advise(config, FACTS) == []


def test_the_demo_gets_no_remark_on_what_it_chose_itself():
    facts = replace(FACTS, num_train=448, num_val=64, num_parameters=4_700_000, num_steps=8 * 14)
    demo = parse_args(["--demo", "drawn"])
    assert advise(demo, facts) == []
    assert [remark.flag for remark in advise(replace(demo, demo=None), facts)] == ["--epochs"]
    assert [remark.flag for remark in advise(replace(demo, epochs=5), facts)] == ["--epochs"]


# -- what a remark says


def kind(remark: Remark) -> tuple[str, str]:
    """What a remark is about, whatever its numbers."""
    return remark.flag, re.sub(r"[\d.,e-]+", "", remark.why)


def facts_of(config: TrainingConfig, facts: Facts, total: float, free_memory: float | None = None) -> Facts:
    """Facts of a run with so many images in all."""
    num_train = max(1, round(total * (1 - config.test_size - config.val_size)))
    step = config.batch_size * config.gradient_accumulation_steps
    return replace(
        facts,
        num_train=num_train,
        num_val=round(total * config.val_size) if facts.draws_val else facts.num_val,
        num_steps=-(-num_train // step) * config.epochs,
        free_memory=free_memory,
        bytes_per_image=0.0 if config.freeze_clip else 3e8,
    )


@st.composite
def some_settings(draw: st.DrawFn) -> TrainingConfig:
    """Settings that are mostly unusual."""
    freezing = draw(st.sampled_from(["", "--freeze_clip", "--partial_freeze", "--lora_rank 4"]))
    if not freezing and draw(st.booleans()):
        freezing = "--unfreeze_schedule " + draw(st.sampled_from(["24@0,3@2", "20@0,18@9", "2@0", "31@0,30@1"]))
    words = [*freezing.split(), "--freeze_layers", str(draw(st.integers(0, 40)))]
    for name, values in {
        "lr": [1e-7, 1e-5, 3e-5, 1e-3, 0.1],
        "head_lr": [1e-5, 2e-3, 1.0],
        "epochs": [1, 2, 9, 20, 51, 300],
        "batch_size": [1, 7, 32, 500],
        "gradient_accumulation_steps": [1, 3, 64],
        "residual_scale_q": [0.0, 0.01, 0.2, 0.4, 1.0],
        "residual_scale_c": [0.0, 0.1, 0.25, 0.6],
        "w_q": [0.0, 0.1, 1.0],
        "w_c": [0.01, 0.5, 9.0],
        "warmup_ratio": [0.0, 0.001, 0.05, 0.3],
        "val_size": [0.001, 0.05, 0.1, 0.25, 0.5],
        "test_size": [0.01, 0.2, 0.45],
        "weight_decay": [0.0, 1.0],
        "dropout": [0.5],
        "label_smoothing": [0.4],
        "hidden_dim_q": [1, 5000],
        "hidden_dim_c": [3, 700],
        "crop_scale_min": [0.1],
        "w_exp": [0.0, 5.0],
        "clip_pretrained": ["none"],
        "init_from": ["runs/first"],
    }.items():
        if draw(st.booleans()):
            words += [f"--{name}", str(draw(st.sampled_from(values)))]
    switches = ("--use_explanations", "--no_residual_learning", "--demo", "--gradient_checkpointing")
    words += [switch for switch in switches if draw(st.integers(0, 5)) == 0]
    try:
        return parse_args(words)
    except ValueError:
        assume(False)
        raise


@settings(max_examples=60)
@given(
    some_settings(),
    st.sampled_from([3, 20, 60, 250, 999, 1500, 4000, 8000, 40_000]),
    st.sampled_from([None, 1, 2, 3, 4, 6, 12, 24, 32]),
    st.sampled_from([4_000_000, 400_000_000]),
    st.sampled_from([("q", "c"), ("q",), ("c", "beauty")]),
    st.sampled_from([None, 1e9, 80e9]),
    st.booleans(),
)
def test_doing_what_a_remark_says_silences_it(config, total, depth, parameters, tasks, free_memory, draws_val):
    known = replace(FACTS, num_val=5, num_blocks=depth, num_parameters=parameters, tasks=tasks, draws_val=draws_val)
    found = advise(config, facts_of(config, known, total, free_memory))
    assert len(set(map(kind, found))) == len(found)
    if any("larger batches" in remark.why for remark in found):
        assert sum(remark.flag == "--batch_size" for remark in found) == 1, "neither larger and smaller at once"
    for remark in found:
        says = str(remark)
        assert re.fullmatch(r"--\w+ \S.*: usual here is \S.*, because \S.*[^.,; ]; try \S.*[^.,; ]", says), says
        assert "\n" not in says and "  " not in says and "None" not in says and len(says) < 240
        assert remark.flag.removeprefix("--") in configs.OPTIONS
        if " or " in remark.change or not remark.change.startswith("--"):
            for word in re.findall(r"--\w+", remark.change):
                assert word.removeprefix("--") in configs.OPTIONS
            continue
        command = shlex.split(presets.command_line(config))[2:]
        mended = parse_args([*command, *remark.change.split()], num_blocks=lambda config: depth)
        still = advise(mended, facts_of(mended, known, total, free_memory))
        assert kind(remark) not in map(kind, still)
        if "partial_freeze" in remark.change:
            assert "--freeze_layers" not in [other.flag for other in still]


def test_a_remark_names_flag_value_range_reason_and_change():
    (remark,) = remarks({"lr": 0.5}, {})
    assert str(remark) == (
        "--lr 0.5: usual here is 2e-05 to 0.0001, because CLIP is trained (partial18) and may lose what it knows; "
        "try --lr 0.0001"
    )
    (remark,) = remarks({"batch_size": 300, "gradient_accumulation_steps": 2}, {})
    assert (remark.value, remark.recommended) == ("300", "at most 500 per step")
    assert remark.why == "2,000 training images make 4 step(s) of 600 per epoch"
    assert remark.change == "--batch_size 100 --gradient_accumulation_steps 1"
    (remark,) = remarks({"batch_size": 95}, GPU)
    assert (remark.recommended, "1 of 100 GB" in remark.why) == ("at most 90", True)
    (remark,) = remarks({"warmup_ratio": 0.05}, {"num_steps": 40})
    assert (remark.value, remark.recommended) == ("0.05", "0.075 to 0.1")


@pytest.mark.parametrize(
    ("config", "facts", "recommended", "change"),
    [
        ({"residual_scale_q": 1.0}, SMALL, "0.05 to 0.2", "--residual_scale_q 0.1"),
        ({"residual_scale_q": 1.0}, {}, "0.15 to 0.3", "--residual_scale_q 0.2"),
        ({**TUNED, "residual_scale_q": 1.0}, BIG, "0.2 to 0.5", "--residual_scale_q 0.3"),
        ({"batch_size": 300}, SMALL, "at most 225", "--batch_size 45"),
        ({"warmup_ratio": 0.0}, {}, "0.05 to 0.1", "--warmup_ratio 0.1"),
        ({"unfreeze_schedule": "3@0"}, {"num_blocks": 3}, "to begin at 2 to 2", "--unfreeze_schedule 2@0"),
        ({"unfreeze_schedule": "9@0"}, {}, "to begin at 16 to 22", "--unfreeze_schedule 22@0,16@10"),
        ({"freeze_layers": 3}, {}, "16 to 22", "--freeze_layers 16"),
        (FULL, {}, "on", "--partial_freeze --freeze_layers 18"),
        (FULL, {"num_blocks": 12}, "on", "--partial_freeze --freeze_layers 9"),
        ({"w_q": 0.1, "w_c": 0.9}, {}, "30 % to 70 % of both weights together", "--w_q 0.5 --w_c 0.5"),
        ({"dropout": 0.9}, {}, "0 to 0.3", "--dropout 0.3"),
        ({"weight_decay": 0.0}, {}, "1e-05 to 0.001", "--weight_decay 1e-05"),
    ],
)
def test_a_remark_recommends_what_suits_these_facts(config, facts, recommended, change):
    (remark,) = remarks(config, facts)
    assert (remark.recommended, remark.change) == (recommended, change)


def test_only_a_pretrained_clip_that_is_trained_can_lose_what_it_knows():
    for config, risk in (({}, "may lose what it knows"), (FROZEN, "may not settle")):
        (remark,) = remarks({**config, "lr": 5.0}, {})
        assert remark.why.endswith(risk)
    (remark,) = remarks({"lr": 5.0, "clip_pretrained": "none"}, {})
    assert remark.why.endswith("may not settle")


@pytest.mark.parametrize(
    ("config", "facts", "change"),
    [
        ({}, {"num_val": 40, "num_train": 280}, "--val_size 0.2"),
        ({"val_size": 0.001}, {"num_val": 8, "num_train": 512}, "--val_size 0.1"),
        ({"val_size": 0.05}, {"num_val": 10, "num_train": 157}, "--val_size 0.3"),
        ({"val_size": 0.05}, {"num_val": 10, "num_train": 156}, "more images for validation"),
        ({"val_size": 0.05}, {"num_val": 0, "num_train": 140}, "more images for validation"),
        ({}, {"num_val": 40, "num_train": 280, "draws_val": False}, "more images for validation"),
        ({"test_size": 0.3}, {"num_val": 20, "num_train": 160}, "--val_size 0.3"),
        ({"test_size": 0.31}, {"num_val": 20, "num_train": 160}, "more images for validation"),
    ],
)
def test_more_validation_is_advised_only_where_it_can_be_had(config, facts, change):
    (remark,) = (remark for remark in remarks(config, facts) if remark.flag == "--val_size")
    assert remark.change == change
