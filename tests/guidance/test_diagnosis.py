"""Diagnosis of drawn curves, with near misses and noise: what they show, and what is proposed."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from configs import TrainingConfig
from guidance import advice, arguments, diagnosis
from guidance.diagnosis import Finding, diagnose, lines, rises, smooth

CONFIG = TrainingConfig(partial_freeze=True, freeze_layers=18)
Rows = list[dict[str, float]]
Curve = float | Sequence[float]


def facts(**changes: Any) -> advice.Facts:
    known: dict[str, Any] = {
        "num_train": 2000,
        "num_val": 250,
        "num_blocks": 24,
        "num_parameters": 400_000_000,
        "tasks": ("q", "c"),
        "num_steps": 1000,
    }
    return advice.Facts(**{**known, **changes})


def history(num_epochs: int = 20, tasks: str = "qc", **given: Curve) -> Rows:
    """Rows as in metrics.csv, of a run that learns fast and then stays; `given` replaces columns of one or all tasks.

    Keys: loss, val_loss, score (both SROCC and PLCC), each for all tasks, or with _q or _c behind it; grad_norm.
    """
    shape = settle(num_epochs, 1.0, 0.0)
    usual = {
        "loss": [0.1 + 0.2 * value for value in shape],
        "val_loss": [0.12 + 0.18 * value for value in shape],
        "score": [0.85 - 0.3 * value for value in shape],
    }

    def column(name: str, task: str) -> np.ndarray:
        values = given.get(f"{name}_{task}", given.get(name, usual[name]))
        return np.broadcast_to(np.asarray(values, dtype=float), num_epochs)

    table = {
        "epoch": np.arange(1, num_epochs + 1.0),
        "grad_norm": np.broadcast_to(given.get("grad_norm", 1), num_epochs),
    }
    for name in ("loss", "val_loss"):
        table |= {f"{name}_{task}": column(name, task) for task in tasks}
        table[name] = np.mean([column(name, task) for task in tasks], axis=0)
    for task in tasks:
        table |= {f"val_{measure}_{task}": column("score", task) for measure in ("srocc", "plcc")}
    table["val_main"] = np.mean([column("score", task) for task in tasks], axis=0)
    return pd.DataFrame(table).to_dict("records")


def settle(num_epochs: int, start: float, end: float) -> list[float]:
    """A curve that moves from start to end, most of the way in the first few epochs."""
    return [end + (start - end) * math.exp(-1.5 * epoch) for epoch in range(num_epochs)]


def line(num_epochs: int, start: float, end: float) -> list[float]:
    return np.linspace(start, end, num_epochs).tolist()


def names(rows: Rows, config: TrainingConfig = CONFIG, known: advice.Facts | None = None) -> list[str]:
    return [found.finding for found in diagnose(rows, config, known or facts())]


def only(rows: Rows, config: TrainingConfig = CONFIG, known: advice.Facts | None = None) -> Finding:
    (found,) = diagnose(rows, config, known or facts())
    return found


def proposed(found: Finding) -> TrainingConfig:
    """The options of a finding's command."""
    python, program, *words = shlex.split(found.command)
    assert (python, program) == ("python", "baseline.py")
    return arguments.parse_args(words)


def changes(found: Finding, config: TrainingConfig = CONFIG) -> dict[str, Any]:
    """What the command changes, all of which the proposal has to name."""
    before, after = asdict(config), asdict(proposed(found))
    changed = {name: value for name, value in after.items() if value != before[name]}
    for name, value in changed.items():
        spec = configs.OPTIONS[name]
        assert spec.flag in found.proposal
        assert value is None or spec.kind is bool or f"to {diagnosis.plain(value)}" in found.proposal
    return changed


# Each way to fail, as curves of 20 epochs under CONFIG.
OVER = history(loss=line(20, 0.3, 0.03), val_loss=[*line(5, 0.3, 0.2), *line(15, 0.21, 0.3)])
OVER_C = history(loss_c=line(20, 0.3, 0.03), val_loss_c=[*line(5, 0.3, 0.2), *line(15, 0.21, 0.3)])
UNDER = history(loss=settle(20, 0.55, 0.45), val_loss=settle(20, 0.56, 0.47), score=settle(20, 0.0, 0.2))
SLOW = history(loss=line(20, 0.50, 0.49), val_loss=line(20, 0.51, 0.50), score=line(20, 0.10, 0.105))
UNSTABLE_VAL = history(val_loss=[0.2 + 0.06 * (epoch % 2) for epoch in range(20)])
UNSTABLE_TRAIN = history(loss=[*settle(12, 0.3, 0.15), *[0.25] * 8])
EXPLODING = history(grad_norm=[1.0] * 12 + [30.0] + [1.0] * 7)
AT_END = history(loss=line(20, 0.4, 0.2), val_loss=line(20, 0.41, 0.22), score=line(20, 0.3, 0.7))
AT_START = history(score=[0.8, *settle(19, 0.78, 0.7)])
STARVED_Q = history(
    loss_q=line(20, 0.6, 0.4), val_loss_q=settle(20, 0.6, 0.5), score_q=settle(20, 0.2, 0.5), loss_c=line(20, 0.4, 0.05)
)
CONFLICT = history(loss_c=0.25, score_q=settle(20, 0.5, 0.8), score_c=settle(20, 0.7, 0.6))
LOPSIDED = replace(CONFIG, w_q=0.1, w_c=0.9)
SLOWLY = replace(CONFIG, lr=1e-6)
FAILURES: list[tuple[str, Rows, TrainingConfig]] = [
    ("over-fitting", OVER, CONFIG),
    ("over-fitting", OVER_C, CONFIG),
    ("under-fitting", UNDER, CONFIG),
    ("slow", SLOW, SLOWLY),
    ("unstable", UNSTABLE_VAL, CONFIG),
    ("unstable", UNSTABLE_TRAIN, CONFIG),
    ("unstable", EXPLODING, CONFIG),
    ("best epoch at the very end", AT_END, CONFIG),
    ("best epoch at the very start", AT_START, CONFIG),
    ("one score starves the other", STARVED_Q, LOPSIDED),
    ("one score starves the other", CONFLICT, CONFIG),
]


# ---------------------------------------------------------------------------------------- what curves show


@pytest.mark.parametrize(("name", "rows", "config"), FAILURES)
def test_each_failure_is_found_by_its_name_and_nothing_else_is(name, rows, config):
    assert names(rows, config) == [name]


@pytest.mark.parametrize("num_epochs", range(3, 41))
def test_a_run_that_learns_and_stays_looks_fine(num_epochs):
    assert names(history(num_epochs)) == []


@given(
    st.integers(0, 10_000),
    st.integers(3, 50),
    st.sampled_from([(150, 20), (400, 50), (2000, 250), (20_000, 2500)]),
    st.sampled_from([{}, {"freeze_clip": True, "lr": 1e-3}, {"partial_freeze": True, "freeze_layers": 18}]),
)
@settings(max_examples=300, derandomize=True)  # one in some 90,000 of these is remarked on after all
def test_noise_on_a_fine_run_is_not_remarked_on(seed, num_epochs, sizes, mode):
    """Noise as the module takes it for: .5 / sqrt(n) on training losses, .1 / sqrt(n) on scores, likewise on losses."""
    rng = np.random.default_rng(seed)
    num_train, num_val = sizes

    def noisy(curve: Sequence[float], sd: float) -> np.ndarray:
        return np.asarray(curve) + sd * rng.normal(size=num_epochs).clip(-2.5, 2.5)

    given: dict[str, Any] = {}
    for task in "qc":
        given[f"loss_{task}"] = 0.2 * noisy(settle(num_epochs, 2, 1), 0.5 / math.sqrt(num_train))
        given[f"val_loss_{task}"] = 0.2 * noisy(settle(num_epochs, 2, 1.1), 0.1 / math.sqrt(num_val))
        given[f"score_{task}"] = noisy(settle(num_epochs, 0.5, 0.8), 0.05 / math.sqrt(num_val))
    known = facts(num_train=num_train, num_val=num_val)
    assert names(history(num_epochs, **given), TrainingConfig(**mode), known) == []


@given(st.integers(0, 10_000))
@settings(max_examples=50)
def test_a_calibrated_run_that_has_nothing_to_learn_looks_fine(seed):
    """As with all of CLIP frozen, where the base is as good as it gets: everything stays, but for noise."""
    rng = np.random.default_rng(seed)
    rows = history(loss=0.1 * (1 + 0.02 * rng.normal(size=20).clip(-2.5, 2.5)), val_loss=0.11, score=0.85)
    assert names(rows, TrainingConfig(freeze_clip=True, lr=1e-3)) == []


@pytest.mark.parametrize(("name", "rows", "config"), FAILURES)
@pytest.mark.parametrize("num_epochs", [0, 1, 2])
def test_two_epochs_say_nothing(name, rows, config, num_epochs):
    assert names(rows[:num_epochs], config) == []


@pytest.mark.parametrize(
    ("rows", "config", "known"),
    [
        # The validation loss rises by less than a tenth, or by a fifth where 9 images measure it.
        (history(loss=line(20, 0.3, 0.03), val_loss=[*line(5, 0.3, 0.2), *line(15, 0.2, 0.218)]), CONFIG, facts()),
        (
            history(loss=line(20, 0.3, 0.03), val_loss=[*line(5, 0.3, 0.2), *line(15, 0.2, 0.24)]),
            CONFIG,
            facts(num_val=9),
        ),
        # It rises, but training gets no further either.
        (history(loss=0.2, val_loss=[*line(5, 0.3, 0.2), *line(15, 0.21, 0.3)]), CONFIG, facts()),
        # A single good epoch is no valley to rise from.
        (history(loss=line(20, 0.3, 0.03), val_loss=[0.3] * 9 + [0.2] + [0.3] * 10), CONFIG, facts()),
        # Poor, but better than in UNDER; poor, but perhaps by chance; poor in validation only.
        (
            history(loss=settle(20, 0.5, 0.3), val_loss=settle(20, 0.5, 0.3), score=settle(20, 0.0, 0.5)),
            CONFIG,
            facts(),
        ),
        (UNDER, CONFIG, facts(num_val=9)),
        (
            history(loss=settle(20, 0.55, 0.2), val_loss=settle(20, 0.56, 0.47), score=settle(20, 0, 0.2)),
            CONFIG,
            facts(),
        ),
        # Nothing moves, but the rate is usual and the scores are good.
        (history(loss=line(20, 0.10, 0.099), val_loss=0.11, score=0.85), CONFIG, facts()),
        # Low rates that do learn.
        (history(), SLOWLY, facts()),
        # Validation that swings by less than a tenth, or only once; training that rises by less than 15 %.
        (history(val_loss=[0.2 + 0.018 * (epoch % 2) for epoch in range(20)]), CONFIG, facts()),
        (history(val_loss=[0.2] * 8 + [0.26] * 3 + [0.2] * 9), CONFIG, facts()),
        (history(loss=[*settle(12, 0.3, 0.15), *[0.17] * 8]), CONFIG, facts()),
        (UNSTABLE_TRAIN, CONFIG, facts(num_train=16)),
        (history(grad_norm=[1.0] * 12 + [9.0] + [1.0] * 7), CONFIG, facts()),
        (history(grad_norm=[100.0, 30.0, 3.0] + [1.0] * 17), CONFIG, facts()),
        # The last epoch is the best by little, or of few images, or the run was stopped there.
        (history(score=line(20, 0.8, 0.82)), CONFIG, facts()),
        (history(score=line(20, 0.7, 0.8)), CONFIG, facts(num_val=9)),
        (AT_END[:15], CONFIG, facts()),
        (history(val_loss=line(20, 0.30, 0.31), score=line(20, 0.3, 0.7)), CONFIG, facts()),
        (history(score=[*line(17, 0.4, 0.8), 0.79, 0.79, 0.79]), CONFIG, facts()),
        # The first epoch is the best by little, or the second one is.
        (history(score=[0.8, *settle(19, 0.79, 0.789)]), CONFIG, facts()),
        (history(score=[0.79, 0.8, *settle(18, 0.78, 0.7)]), CONFIG, facts()),
        # One score is as hard as it is, both weigh enough, or one was given up, or the other has learnt nothing.
        (STARVED_Q, replace(CONFIG, w_q=0.3, w_c=0.7), facts()),
        (STARVED_Q, replace(CONFIG, w_q=0.0, w_c=1.0), facts()),
        (STARVED_Q, replace(LOPSIDED, partial_freeze=False, freeze_clip=True, lr=1e-3), facts()),
        (history(loss_q=0.4, loss_c=0.1), LOPSIDED, facts()),
        (CONFLICT, replace(CONFIG, partial_freeze=False, freeze_clip=True, lr=1e-3), facts()),
        (CONFLICT, CONFIG, facts(num_val=9)),
        (CONFLICT, replace(CONFIG, lr=0.03), facts()),
        (CONFLICT, replace(CONFIG, task_gradients="stop_q"), facts()),
    ],
)
def test_near_misses_are_not_remarked_on(rows, config, known):
    assert names(rows, config, known) == []


def test_a_wobble_before_over_fitting_is_no_instability():
    rows = history(loss=line(20, 0.3, 0.03), val_loss=[0.2] * 8 + [0.26] * 3 + [0.2] * 5 + [0.26] * 4)
    assert names(rows) == ["over-fitting"]


def test_a_first_epoch_that_is_best_by_chance_is_not_worth_keeping():
    """Scores that 250 images do not tell from zero."""
    rows = history(score=[0.05, *settle(19, 0.03, 0.0)])
    assert "best epoch at the very start" not in names(rows)
    better = [{**row, "val_main": row["val_main"] + 0.1} for row in rows]
    assert "best epoch at the very start" in names(better)


def test_one_score_alone_is_read_as_well():
    for name, curves in {
        "over-fitting": {"loss": line(20, 0.3, 0.03), "val_loss": [*line(5, 0.3, 0.2), *line(15, 0.21, 0.3)]},
        "under-fitting": {"loss": settle(20, 0.55, 0.45), "val_loss": settle(20, 0.56, 0.47), "score": 0.2},
        "best epoch at the very end": {"val_loss": line(20, 0.4, 0.2), "score": line(20, 0.3, 0.7)},
    }.items():
        for task, other in ("qc", "cq"):
            found = only(history(tasks=task, **curves), known=facts(tasks=(task,)))
            assert found.finding == name
            assert f"residual_scale_{other}" not in found.proposal
    assert names(history(tasks="q"), known=facts(tasks=("q",))) == []


def test_over_fitting_names_the_score_and_leaves_the_other_alone():
    found = only(OVER_C)
    assert "consistency" in found.evidence and "quality" not in found.evidence
    assert changes(found).keys() >= {"residual_scale_c"} and "residual_scale_q" not in changes(found)
    assert {"residual_scale_q", "residual_scale_c"} <= changes(only(OVER)).keys()


def test_the_evidence_has_the_numbers_and_epochs():
    assert "epoch 5 to the end (epochs 16 to 20)" in only(OVER).evidence
    assert "0.200 to 0.287" in only(OVER).evidence
    assert "0.489 in epoch 10 to 0.700 in epoch 20 of 20" in only(AT_END).evidence
    assert "0.800 after epoch 1 and 0.700 at the end (epochs 16 to 20)" in only(AT_START).evidence
    assert "from 0.150 in epoch 12 to 0.250 in epoch 13" in only(UNSTABLE_TRAIN).evidence
    assert "30 in epoch 13, from about 1" in only(EXPLODING).evidence
    assert "0.200 to 0.260 (epochs 1 to 2), 0.200 to 0.260 (epochs 3 to 4)" in only(UNSTABLE_VAL).evidence
    assert "quality is 0.421 and that of consistency 0.087" in only(STARVED_Q, LOPSIDED).evidence


def test_what_selects_the_epoch_is_what_is_read():
    rows = history(score_q=[0.8, *settle(19, 0.78, 0.7)], score_c=0.8 - 0.1 * np.asarray(settle(20, 1, 0)))
    assert names(rows, replace(CONFIG, select_by="srocc_c")) == []
    assert names(rows, replace(CONFIG, select_by="srocc_q")) == ["best epoch at the very start"]


def test_findings_are_few_and_over_and_under_fitting_exclude_each_other():
    rows = history(
        loss=line(20, 0.6, 0.1), val_loss=line(20, 0.4, 0.6), score_q=line(20, 0.4, 0.1), score_c=line(20, 0.3, 0.2)
    )
    assert names(rows) == ["best epoch at the very start", "over-fitting"]
    rising = history(loss=line(20, 0.6, 0.1), val_loss=line(20, 0.4, 0.5), score=line(20, 0.1, 0.3))
    assert names(rising) == ["over-fitting"]
    # Poor on one score that is fitted nowhere, over-fitted on the other.
    mixed = {"loss_c": 0.5, "val_loss_c": 0.5, "score_c": 0.1}
    assert names(history(loss_q=line(20, 0.3, 0.03), val_loss_q=line(20, 0.2, 0.3), **mixed)) == ["over-fitting"]
    # The validation loss of both together falls, and so does not tell that the best epoch is the last.
    both = history(
        loss_c=line(20, 0.3, 0.03),
        val_loss_c=line(20, 0.2, 0.25),
        val_loss_q=line(20, 0.5, 0.3),
        score=line(20, 0.3, 0.7),
    )
    assert names(both) == ["over-fitting"]
    everything = history(loss=[0.5, 0.9] * 10, val_loss=[0.5, 0.9] * 10, score=line(20, 0.4, 0.1))
    assert names(everything) == ["unstable"]


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_curves_say_nothing_of_instability_or_over_fitting(value):
    rows = history(loss=line(20, 0.3, 0.1), val_loss=value, grad_norm=0.0)
    assert names(rows) == []
    assert names([{**row, "grad_norm": math.nan} for row in rows]) == []


def naive_rises(curve: Sequence[float], swing: float) -> int:
    """The largest number of rises beyond `swing` that falls beyond `swing` separate, by trying every end of each."""
    best = [(0, 0)] * (len(curve) + 1)  # for each start: most rises, when a rise or when a fall must come next

    for start in reversed(range(len(curve))):
        up = down = 0
        for place in range(start + 1, len(curve)):
            if curve[place] > curve[start] * (1 + swing):
                up = max(up, 1 + best[place][1])
            if curve[place] * (1 + swing) < curve[start]:
                down = max(down, best[place][0])
        best[start] = (max(up, best[start + 1][0]), max(down, best[start + 1][1]))
    return best[0][0]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=25), st.sampled_from([0.1, 0.5, 1.0]))
@settings(max_examples=200)
def test_rises_are_as_many_as_there_can_be(curve, swing):
    found = rises(curve, swing)
    assert len(found) == naive_rises(curve, swing)
    places = [place for pair in found for place in pair]
    assert places == sorted(places)
    assert all(curve[high] > curve[low] * (1 + swing) for low, high in found)


def test_smoothing_drops_an_outlier_and_keeps_steps_and_ends():
    assert smooth([1, 1, 9, 1, 1]) == [1, 1, 1, 1, 1]
    assert smooth([9, 1, 1, 5, 5]) == [9, 1, 1, 5, 5]


# ---------------------------------------------------------------------------------------- what is proposed


def test_proposals_are_the_next_steps_of_the_guide():
    assert changes(only(OVER)) == {
        "freeze_layers": 20,
        "residual_scale_q": 0.15,
        "residual_scale_c": 0.15,
        "weight_decay": 3e-4,
        "early_stopping_patience": 5,
    }
    assert changes(only(UNDER)) == {
        "freeze_layers": 16,
        "residual_scale_q": 0.3,
        "residual_scale_c": 0.3,
        "lr": 9e-5,
    }
    assert changes(only(SLOW, SLOWLY), SLOWLY) == {"lr": 2e-5}
    assert changes(only(AT_END)) == {"epochs": 30, "early_stopping_patience": 5}
    assert changes(only(AT_START)) == {"lr": 1e-5, "warmup_ratio": 0.1}
    assert changes(only(STARVED_Q, LOPSIDED), LOPSIDED) == {"w_q": 0.5, "w_c": 0.5}
    assert changes(only(CONFLICT)) == {"task_gradients": "stop_q"}
    jump = only(history(grad_norm=[1.0] * 15 + [50.0] * 5))
    assert changes(jump) == {"lr": 1e-5, "warmup_ratio": 0.1, "max_grad_norm": 0.5}
    rough = replace(CONFIG, lr=1e-3, max_grad_norm=0.0, scheduler="constant")
    assert changes(only(UNSTABLE_VAL, rough), rough) == {
        "lr": 1e-4,
        "max_grad_norm": 1.0,
        "warmup_ratio": 0.1,
        "scheduler": "cosine",
    }


@pytest.mark.parametrize(
    ("rows", "options", "known", "expected"),
    [
        (OVER, {}, {}, {"partial_freeze": True, "freeze_layers": 18}),
        (OVER, {}, {"num_blocks": 12}, {"partial_freeze": True, "freeze_layers": 9}),
        (OVER, {"partial_freeze": True, "freeze_layers": 9}, {"num_blocks": 12}, {"freeze_layers": 10}),
        (OVER, {"partial_freeze": True, "freeze_layers": 22}, {}, {"freeze_clip": True, "lr": 1e-3}),
        (OVER, {"unfreeze_schedule": "22@0,20@5"}, {}, {"unfreeze_schedule": "22@0"}),
        (OVER, {"unfreeze_schedule": "18@0"}, {}, {"unfreeze_schedule": "20@0"}),
        (OVER, {"lora_rank": 8}, {}, {"lora_rank": 4}),
        (OVER, {"freeze_clip": True, "lr": 1e-3}, {}, {"dropout": 0.2, "residual_scale_q": 0.15, "weight_decay": 3e-4}),
        (OVER, {"freeze_clip": True, "lr": 0.1}, {}, {"lr": 5e-3}),
        (OVER, {"residual_scale_q": 1.0, "residual_scale_c": 0.05}, {}, {"residual_scale_q": 0.5}),
        (UNDER, {"freeze_clip": True, "lr": 1e-3}, {}, {"freeze_clip": False, "partial_freeze": True, "lr": 1e-4}),
        (UNDER, {"freeze_clip": True, "lr": 1e-3}, {"num_train": 500}, {"dropout": 0.0, "lr": 3e-3}),
        (UNDER, {"freeze_clip": True, "lr": 1e-4, "head_lr": 1e-3}, {"num_train": 500}, {"lr": 3e-4, "head_lr": 3e-3}),
        (UNDER, {"unfreeze_schedule": "22@0,20@5"}, {}, {"unfreeze_schedule": "22@0,18@5"}),
        (UNDER, {"calibration": False, "residual_scale_q": 0.01}, {}, {"calibration": True, "residual_scale_q": 0.1}),
        (UNDER, {"lora_rank": 8}, {}, {"lora_rank": 16}),
        (UNDER, {"lr": 0.03}, {}, {"lr": 3e-5, "warmup_ratio": 0.1}),
        (AT_END, {"lr": 1e-6}, {}, {"lr": 1e-5}),
        (AT_END, {"lr": 0.03}, {}, {"lr": 3e-5, "warmup_ratio": 0.1}),
        (AT_START, {"lr": 1e-5}, {}, {"partial_freeze": True, "residual_scale_q": 0.15}),
        (CONFLICT, {"w_q": 0.6, "w_c": 0.4}, {}, {"w_q": 0.5, "w_c": 0.5}),
    ],
)
def test_proposals_fit_what_the_run_had(rows, options, known, expected):
    config = TrainingConfig(**options)
    found = only(rows, config, facts(**known))
    assert expected.items() <= changes(found, config).items()
    assert not ({"partial_freeze", "freeze_layers"} & changes(found, config).keys()) or not config.lora_rank


def test_a_score_that_was_kept_from_clip_is_not_told_to_starve():
    assert only(STARVED_Q, replace(CONFIG, w_q=0.05, w_c=0.95)).finding == "one score starves the other"
    cut_off = replace(CONFIG, w_q=0.05, w_c=0.95, task_gradients="stop_q")
    assert "one score starves the other" not in [found.finding for found in diagnose(STARVED_Q, cut_off, facts())]


def test_epochs_beyond_the_usual_give_way_to_a_higher_rate():
    rows = history(60, loss=line(60, 0.4, 0.2), val_loss=line(60, 0.41, 0.22), score=line(60, 0.3, 0.7))
    assert changes(only(rows, replace(CONFIG, epochs=60)), replace(CONFIG, epochs=60)) == {"lr": 9e-5}
    at_limit = replace(CONFIG, epochs=60, lr=1e-4)
    assert changes(only(rows, at_limit), at_limit) == {"epochs": 90, "early_stopping_patience": 5}


def test_a_second_stage_keeps_the_scales_and_the_base_of_the_first(tmp_path):
    config = replace(CONFIG, init_from="runs/first", calibration=False)
    for rows in (OVER, UNDER):
        assert not {"residual_scale_q", "residual_scale_c", "calibration"} & changes(only(rows, config), config).keys()


def test_random_weights_are_named_as_the_cause():
    assert "pretrained" in only(UNDER, replace(CONFIG, clip_pretrained="none", lr=1e-3)).proposal
    assert "pretrained" not in only(UNDER).proposal


CONFIGS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-7, 1e-5, 3e-5, 1e-3, 3e-2, 10.0]),
        "head_lr": st.sampled_from([None, 1e-3, 10.0]),
        "residual_scale_q": st.floats(0, 1),
        "residual_scale_c": st.floats(0, 1),
        "dropout": st.floats(0, 0.99),
        "weight_decay": st.floats(0, 10),
        "warmup_ratio": st.sampled_from([0.0, 0.05, 0.5]),
        "scheduler": st.sampled_from(["cosine", "constant", "cyclic"]),
        "max_grad_norm": st.sampled_from([0.0, 0.5, 1.0, 1e9]),
        "calibration": st.booleans(),
        "use_residual_learning": st.booleans(),
        "early_stopping_patience": st.sampled_from([0, 5, 100]),
        "epochs": st.sampled_from([3, 20, 100_000]),
        "clip_pretrained": st.sampled_from(["openai", "none"]),
        "task_gradients": st.sampled_from(["shared", "stop_q", "stop_c"]),
        "output_dir": st.sampled_from([None, "runs/before"]),
        "data_csv_path": st.just("my data/data.csv"),
    }
)
FREEZING = st.one_of(
    st.just({}),
    st.just({"freeze_clip": True}),
    st.integers(1, 24).map(lambda rank: {"lora_rank": rank}),
    st.integers(0, 23).map(lambda layers: {"partial_freeze": True, "freeze_layers": layers}),
    st.sampled_from(["22@0", "0@0", "22@0,20@10,18@15", "1@0,0@3"]).map(lambda plan: {"unfreeze_schedule": plan}),
)


@given(
    CONFIGS, FREEZING, st.sampled_from([rows for _, rows, _ in FAILURES] + [SLOW]), st.sampled_from([1, 12, 24, None])
)
@settings(max_examples=150)
def test_every_command_is_legal_new_and_points_the_right_way(options, freezing, rows, depth):
    config = TrainingConfig(**options, **freezing)
    for found in diagnose(rows, config, facts(num_blocks=depth)):
        after = proposed(found)
        changed = changes(found, replace(config, output_dir=None))
        assert changed or config.epochs == 100_000
        assert "output_dir" not in found.command and after.data_csv_path == config.data_csv_path
        assert after.output_dir is None and not (after.freeze_clip and after.freeze_layers != config.freeze_layers)
        if "freeze_layers" in changed and depth and config.freeze_layers < depth:
            assert 0 <= after.freeze_layers < depth
        scales = [(after.residual_scale_q, config.residual_scale_q), (after.residual_scale_c, config.residual_scale_c)]
        if found.finding == "over-fitting":
            assert all(new <= old for new, old in scales) and after.dropout >= config.dropout
            assert after.weight_decay >= config.weight_decay
        elif found.finding == "under-fitting":
            assert all(new >= old for new, old in scales) and after.dropout <= config.dropout
            assert after.weight_decay <= config.weight_decay
        elif found.finding == "unstable":
            assert after.lr < config.lr and after.max_grad_norm <= (config.max_grad_norm or 1.0)
        elif found.finding == "slow":
            assert after.lr > config.lr or (after.head_lr or 0) > (config.head_lr or 0) or config.lr == 10.0


def test_the_command_of_a_demo_run_is_a_demo_run():
    config = arguments.parse_args(["--demo"])
    found = only(AT_END, replace(config, epochs=20), facts(num_parameters=4_700_000))
    assert proposed(found) == replace(config, epochs=30, early_stopping_patience=5)


def test_findings_are_printed_with_the_command_on_its_own_line():
    found = diagnose(OVER, CONFIG, facts())
    first, second, third = lines(found)
    assert first == f"over-fitting: {found[0].evidence}"
    assert (second, third) == (f"    {found[0].proposal}", f"    {found[0].command}")
    assert lines([]) == []


WORSE, NO_GAIN = "worse than before training", "no gain from training"


@pytest.mark.parametrize(
    ("known", "best", "options", "expected"),
    [
        (0.80, 0.70, {}, [WORSE]),
        (0.80, 0.79, {}, [NO_GAIN]),  # within the noise of the fold
        (0.80, 0.80, {}, [NO_GAIN]),  # to equal is no gain
        (0.80, 0.81, {}, []),
        (0.80, 0.90, {}, []),
        (None, 0.70, {}, []),
        (0.80, 0.70, {"use_residual_learning": False}, [WORSE]),
        (0.80, 0.79, {"calibration": False}, [NO_GAIN]),
        (0.80, 0.70, {"init_from": "runs/first"}, [WORSE]),
    ],
)
def test_a_run_that_never_beats_what_it_started_from_is_told(known, best, options, expected):
    config = replace(CONFIG, **options)
    rows = history(12, score=[best - 0.01] * 5 + [best] * 7)
    found = diagnose(rows, config, facts(), known=known)
    assert [finding.finding for finding in found if finding.finding in (WORSE, NO_GAIN)] == expected
    if expected:
        assert f"0.800 before training, which is kept, and is {best:.3f} at best, after epoch 6" in found[0].evidence
        assert found[0].evidence.startswith("main on validation")
        assert proposed(found[0]).lr < config.lr
        timid = diagnose(rows, replace(config, lr=1e-5), facts(), known=known)
        assert proposed(timid[0]).lr == 1e-5 and "hold on" in timid[0].proposal


def test_where_heads_add_nothing_to_a_frozen_clip_its_last_layers_are_proposed():
    frozen = replace(CONFIG, freeze_clip=True, partial_freeze=False, lr=1e-3)
    (found,) = diagnose(history(12, score=0.79), frozen, facts(), known=0.8)
    assert found.finding == NO_GAIN and "train its last layers" in found.proposal
    assert proposed(found).partial_freeze and not proposed(found).freeze_clip
    (worse,) = diagnose(history(12, score=0.5), frozen, facts(), known=0.8)
    assert worse.finding == WORSE and proposed(worse).freeze_clip


@pytest.mark.parametrize(("num_val", "expected"), [(100, NO_GAIN), (2500, WORSE)])
def test_how_many_images_validate_tells_worse_from_no_gain(num_val, expected):
    found = diagnose(history(12, score=0.79), CONFIG, facts(num_val=num_val), known=0.8)
    assert found[0].finding == expected


@pytest.mark.parametrize("rows", [AT_START, AT_END, UNDER])
def test_a_run_without_gain_is_told_nothing_of_where_its_best_epoch_lies_or_of_poor_scores(rows):
    assert [found.finding for found in diagnose(rows, CONFIG, facts(), known=0.9)] == [WORSE]


def test_a_run_without_gain_may_over_fit_as_well():
    assert [found.finding for found in diagnose(OVER, CONFIG, facts(), known=0.9)] == [WORSE, "over-fitting"]
