"""Which options matter: what the scores of a search's trials say about each, as a table and a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from sklearn.ensemble import RandomForestRegressor

from tuning.space import Dimension, Space

NUM_BINS = 4
MIN_PER_BIN = 2  # trials, below which a mean says little
MIN_TRIALS = 4  # below which nothing is said
COLUMNS = ["option", "importance", "spread", "best_in", "best_mean", "worst_in", "worst_mean", "best_value"]


@dataclass(frozen=True)
class Scored:
    """A trial that can be compared with others: the values of its options, and a score."""

    params: Mapping[str, Any]
    score: float


def scored_trials(trials: Sequence[FrozenTrial]) -> list[Scored]:
    """The trials with a score. One that was stopped early counts as if it had gone on to gain what the median trial has
    gained from that epoch on: what it had reached is not comparable with what others reached in more epochs."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    found = [Scored(trial.params, float(trial.values[0])) for trial in complete]
    for trial in trials:
        if trial.state == TrialState.PRUNED and trial.intermediate_values:
            epoch = max(trial.intermediate_values)
            reached = [(best_until(other, epoch), other.values[0]) for other in complete]
            gains = [final - there for there, final in reached if there is not None]
            own = best_until(trial, epoch)
            if own is not None:
                found.append(Scored(trial.params, own + (float(np.median(gains)) if gains else 0.0)))
    return found


def best_until(trial: FrozenTrial, epoch: int) -> float | None:
    """The best score of a trial until an epoch; None if it has none."""
    seen = [value for step, value in trial.intermediate_values.items() if step <= epoch and math.isfinite(value)]
    return max(seen, default=None)


def importance_table(trials: Sequence[Scored], space: Space, best: Mapping[str, Any], seed: int) -> pd.DataFrame:
    """How much each option matters: a row of COLUMNS each, the most important first; none for too few trials.

    `importance` is the share of the variance of the score that functional ANOVA gives the option alone (Hutter et al.,
    2014), relative to the other options; `spread` is the mean score in the best bin of its values minus
    that in the worst, all else equal (see `spread`), NaN where no two bins have MIN_PER_BIN trials.

    Args:
        best: the values of the best trial.
    """
    if len(trials) < MIN_TRIALS or len({trial.score for trial in trials}) == 1:
        return pd.DataFrame(columns=COLUMNS)
    table_ND = np.array(
        [[coded(trial.params[name], dimension) for name, dimension in space.items()] for trial in trials]
    )
    scores_N = np.array([trial.score for trial in trials])
    importance = shares(table_ND, scores_N, space, seed)
    model = RandomForestRegressor(random_state=seed).fit(table_ND, scores_N)
    rows = [
        {
            "option": name,
            "importance": importance[name],
            **spread(model, table_ND, column, dimension),
            "best_value": best[name],
        }
        for column, (name, dimension) in enumerate(space.items())
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def coded(value: Any, dimension: Dimension) -> float:
    """A value on the scale that it was searched on: the logarithm, the place among the choices, or the number."""
    if dimension.choices is not None:
        return dimension.choices.index(value)
    return math.log(value) if dimension.log else float(value)


def shares(table_ND: np.ndarray, scores_N: np.ndarray, space: Space, seed: int) -> dict[str, float]:
    """Importance of each option, by Optuna's functional ANOVA, which would not take the logarithm itself."""
    study = optuna.create_study(direction="maximize")
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(range(len(dimension.choices)))
        if dimension.choices is not None
        else optuna.distributions.FloatDistribution(coded(dimension.low, dimension), coded(dimension.high, dimension))
        for name, dimension in space.items()
    }
    for row, score in zip(table_ND.tolist(), scores_N.tolist(), strict=True):
        params = {
            name: int(value) if space[name].choices is not None else value
            for name, value in zip(space, row, strict=True)
        }
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=score))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: found.get(name, 0.0) for name in space}


def spread(model: RandomForestRegressor, table_ND: np.ndarray, column: int, dimension: Dimension) -> dict[str, Any]:
    """Mean score in the best and in the worst bin of an option's values, all else equal, and the difference.

    TPE looks more often where scores are high, in all options at once, so plain means of bins would credit an option
    with what others have done. Here `model` says what each trial would have scored with this option in that bin.

    Args:
        table_ND: values of `coded`, a row for each trial, which the model was fitted to.
        column: that of the option.
    """
    own = table_ND[:, column]
    places, titles = bins(own, dimension)
    means = {}
    for place in range(len(titles)):
        if (places == place).sum() >= MIN_PER_BIN:
            moved = table_ND.copy()
            moved[:, column] = np.median(own[places == place])
            means[place] = float(model.predict(moved).mean())
    if len(means) < 2:
        return {"spread": math.nan, "best_in": "", "best_mean": math.nan, "worst_in": "", "worst_mean": math.nan}
    best, worst = max(means, key=lambda place: means[place]), min(means, key=lambda place: means[place])
    return {
        "spread": means[best] - means[worst],
        "best_in": titles[best],
        "best_mean": means[best],
        "worst_in": titles[worst],
        "worst_mean": means[worst],
    }


def bins(values: np.ndarray, dimension: Dimension) -> tuple[np.ndarray, list[str]]:
    """The bin of each value of `coded`, and what each bin is called: one for each of few values, else equal parts."""
    if dimension.choices is not None:
        return values.astype(int), [str(choice) for choice in dimension.choices]
    step = dimension.step or (1 if dimension.is_whole else 0)
    count = round((dimension.high - dimension.low) / step) + 1 if step else math.inf
    if count <= 2 * NUM_BINS and not dimension.log:
        numbers = [dimension.low + place * step for place in range(int(count))]
        return np.rint((values - dimension.low) / step).astype(int), [f"{number:g}" for number in numbers]
    edges = np.linspace(coded(dimension.low, dimension), coded(dimension.high, dimension), NUM_BINS + 1)
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, NUM_BINS - 1)
    ends = np.exp(edges) if dimension.log else edges
    return places, [f"{start:.2g}..{stop:.2g}" for start, stop in pairwise(ends)]


def table_lines(table: pd.DataFrame) -> list[str]:
    """The table as text."""
    if table.empty:
        return ["too few trials with different scores to tell which options matter"]
    wide = max(len("option"), *(len(name) for name in table["option"])) + 2
    best = max(len("best values"), *(len(title) + 9 for title in table["best_in"])) + 3
    lines = [f"{'option':<{wide}}{'importance':>10}{'spread':>9}   {'best values':<{best}}{'worst values'}"]
    for row in table.to_dict("records"):
        known = math.isfinite(row["spread"])
        ends = [f"{row[f'{end}_mean']:.3f} in {row[f'{end}_in']}" if known else "" for end in ("best", "worst")]
        size = f"{row['spread']:>9.3f}" if known else f"{'':>9}"
        lines.append(f"{row['option']:<{wide}}{row['importance']:>10.2f}{size}   {ends[0]:<{best}}{ends[1]}")
    return lines


def draw(path: Path, table: pd.DataFrame, trials: Sequence[FrozenTrial], score: str) -> None:
    """Draw importance and spread of each option beside the scores of all trials in their order.

    Args:
        trials: of the study, in their order.
        score: what the trials are compared by, in words.
    """
    figure = Figure(figsize=(11, 0.4 * max(len(table), 5) + 2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    for axes, column, title in ((left, "importance", "importance"), (middle, "spread", f"spread of {score}")):
        axes.barh(table["option"], table[column].fillna(0.0), color="#4477aa")
        axes.set_ylim(max(len(table), 4) - 0.5, -0.5)  # the most important on top, and no bar as thick as a wall
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    middle.set_yticklabels([])
    done = [(trial.number, trial.value) for trial in trials if trial.state == TrialState.COMPLETE]
    stopped = [
        (trial.number, max(trial.intermediate_values.values()))
        for trial in trials
        if trial.state == TrialState.PRUNED and trial.intermediate_values
    ]
    for points, marker, colour, label in (
        (done, "o", "#4477aa", "finished"),
        (stopped, "x", "#cc6677", "stopped early"),
    ):
        if points:
            right.scatter(*zip(*points, strict=True), marker=marker, s=18, color=colour, label=label)
    numbers, scores = zip(*done, strict=True)
    right.step(numbers, np.maximum.accumulate(scores), where="post", color="#222222", linewidth=1, label="best so far")
    right.set_xlabel("trial")
    right.set_title(f"validation {score}", fontsize=10)
    right.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower right", ncols=3)
    figure.savefig(path, dpi=130, format="png")
