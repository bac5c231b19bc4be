"""`tuning.sensitivity`: what mattered of what was searched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from tuning import sensitivity, space


def trials_of(options: Mapping[str, Any], scores: Any) -> list[sensitivity.Scored]:
    """Trials with these values of options and scores."""
    rows = pd.DataFrame(options).to_dict("records")
    return [sensitivity.Scored(row, score) for row, score in zip(rows, scores, strict=True)]


def test_importance_and_spread_of_a_known_function():
    rng = np.random.default_rng(0)
    drawn = {
        "lr": 10 ** rng.uniform(-6, 0, 80),
        "dropout": rng.uniform(0, 1, 80),
        "batch_size": rng.choice([16, 32, 64], 80).tolist(),
    }
    scores = 0.5 + 0.3 * (np.log10(drawn["lr"]) > -3) + 0.1 * (np.array(drawn["batch_size"]) == 32)
    axes = {
        "lr": space.Dimension("lr", low=1e-6, high=1.0, log=True),
        "dropout": space.Dimension("dropout", low=0.0, high=1.0),
        "batch_size": space.Dimension("batch_size", choices=(16, 32, 64)),
    }
    best = {"lr": 0.1, "dropout": 0.5, "batch_size": 32}
    table = sensitivity.importance_table(trials_of(drawn, scores.tolist()), axes, best, 0).set_index("option")
    assert list(table.index[:2]) == ["lr", "batch_size"] and table["importance"].sum() == pytest.approx(1)
    # Variances of two independent steps: .3 / 2 squared against .1 squared * 2 / 9.
    share = 0.15**2 / (0.15**2 + 0.01 * 2 / 9)
    assert table["importance"]["lr"] == pytest.approx(share, abs=0.07)
    assert table["spread"]["lr"] == pytest.approx(0.3, abs=0.06)
    assert table["spread"]["batch_size"] == pytest.approx(0.1, abs=0.03)
    assert table["spread"]["dropout"] < 0.03
    assert table["best_in"]["batch_size"] == "32" and table["best_value"]["lr"] == 0.1
    low, high = map(float, table["worst_in"]["lr"].split(".."))
    assert 1e-6 <= low < high <= 1e-3 * 1.01


@pytest.mark.parametrize(
    ("dimension", "given", "places", "titles"),
    [
        (space.Dimension("lr", low=1e-4, high=1.0, log=True), [1e-4, 2e-3, 0.5, 1.0], [0, 1, 3, 3], 4),
        (space.Dimension("dropout", low=0.0, high=0.8), [0.0, 0.3, 0.8], [0, 1, 3], 4),
        (
            space.Dimension("freeze_layers", low=16, high=22, step=2, is_whole=True),
            [16, 22, 20],
            [0, 3, 2],
            ["16", "18", "20", "22"],
        ),
        (space.Dimension("freeze_layers", low=8, high=11, is_whole=True), [8, 11], [0, 3], ["8", "9", "10", "11"]),
        (space.Dimension("loss", choices=("mse", "l1")), ["l1", "mse"], [1, 0], ["mse", "l1"]),
        (space.Dimension("head_lr", choices=(None, 0.1)), [0.1, None], [1, 0], ["None", "0.1"]),
    ],
)
def test_values_fall_into_bins(dimension, given, places, titles):
    found = sensitivity.bins(np.array([sensitivity.coded(value, dimension) for value in given]), dimension)
    assert found[0].tolist() == places
    assert len(found[1]) == titles if isinstance(titles, int) else found[1] == titles


def test_a_stopped_trial_counts_as_if_it_had_risen_like_the_others():
    lr = {"params": {"lr": 0.1}, "distributions": {"lr": optuna.distributions.FloatDistribution(0.01, 1)}}
    made = [
        optuna.create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.4, 2: 0.3}, **lr),
        optuna.create_trial(state=TrialState.PRUNED, **lr),  # broken down before its first epoch was over
        optuna.create_trial(state=TrialState.FAIL, intermediate_values={1: 0.9}, **lr),
        optuna.create_trial(value=0.7, intermediate_values={1: 0.6, 2: 0.5, 3: 0.7}, **lr),
        optuna.create_trial(value=0.8, intermediate_values={1: 0.2, 2: 0.3, 3: 0.8}, **lr),
        optuna.create_trial(value=0.9, intermediate_values={1: 0.5, 2: 0.7, 3: 0.9}, **lr),
    ]
    found = sensitivity.scored_trials(made)  # the others gained .1, .5 and .2 after the second epoch
    assert [trial.score for trial in found] == pytest.approx([0.7, 0.8, 0.9, 0.4 + 0.2])


def test_too_few_or_equal_trials_say_nothing():
    axes = {"dropout": space.Dimension("dropout", low=0.0, high=1.0)}
    for scores in ([0.1, 0.2], [0.5] * 10):
        trials = trials_of({"dropout": np.linspace(0, 1, len(scores))}, scores)
        table = sensitivity.importance_table(trials, axes, {"dropout": 0.5}, 0)
        assert table.empty and "too few trials" in sensitivity.table_lines(table)[0]
