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

from space import Dimension, Space, encode

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
    2014), relative to the other options; `spread` the mean score of the trials in the best bin of its values minus
    that in the worst, NaN where no two bins have MIN_PER_BIN trials.

    Args:
        best: the values of the best trial.
    """
    if len(trials) < MIN_TRIALS or len({trial.score for trial in trials}) == 1:
        return pd.DataFrame(columns=COLUMNS)
    study = optuna.create_study(direction="maximize")
    distributions = {name: distribution(dimension) for name, dimension in space.items()}
    for trial in trials:
        params = {name: plain(trial.params[name], dimension) for name, dimension in space.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=trial.score))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    importance = optuna.importance.get_param_importances(study, evaluator=evaluator)
    rows = []
    for name, dimension in space.items():
        row = spread([trial.params[name] for trial in trials], [trial.score for trial in trials], dimension)
        rows.append({"option": name, "importance": importance.get(name, 0.0), **row, "best_value": best[name]})
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Where the values of `plain` lie."""
    if dimension.choices is not None:
        return optuna.distributions.CategoricalDistribution([encode(choice) for choice in dimension.choices])
    low, high = plain(dimension.low, dimension), plain(dimension.high, dimension)
    return optuna.distributions.FloatDistribution(low, high)


def plain(value: Any, dimension: Dimension) -> Any:
    """A value on the scale that it was searched on: Optuna's ANOVA would take the logarithm of none."""
    if dimension.choices is not None:
        return value
    return math.log(value) if dimension.log else float(value)


def spread(values: Sequence[Any], scores: Sequence[float], dimension: Dimension) -> dict[str, Any]:
    """Mean score of the trials in the best and in the worst bin of an option's values, and the difference."""
    places, titles = bins(values, dimension)
    table = pd.DataFrame({"bin": places, "score": scores}).groupby("bin")["score"].agg(["mean", "size"])
    means = table["mean"][table["size"] >= MIN_PER_BIN]
    if len(means) < 2:
        return {"spread": math.nan, "best_in": "", "best_mean": math.nan, "worst_in": "", "worst_mean": math.nan}
    best, worst = int(means.idxmax()), int(means.idxmin())
    return {
        "spread": float(means[best] - means[worst]),
        "best_in": titles[best],
        "best_mean": float(means[best]),
        "worst_in": titles[worst],
        "worst_mean": float(means[worst]),
    }


def bins(values: Sequence[Any], dimension: Dimension) -> tuple[list[int], list[str]]:
    """The bin of each value, and what each bin is called: one for each of few values, else equal parts of the range."""
    if dimension.choices is not None:
        known = [encode(choice) for choice in dimension.choices]
        return [known.index(value) for value in values], [str(choice) for choice in known]
    step = dimension.step or (1 if dimension.is_whole else 0)
    count = round((dimension.high - dimension.low) / step) + 1 if step else math.inf
    if count <= 2 * NUM_BINS and not dimension.log:
        numbers = [dimension.low + place * step for place in range(int(count))]
        return [round((value - dimension.low) / step) for value in values], [f"{number:g}" for number in numbers]
    scale = np.log if dimension.log else np.asarray
    low, high = float(scale(dimension.low)), float(scale(dimension.high))
    edges = np.linspace(low, high, NUM_BINS + 1)
    places = np.clip(np.searchsorted(edges, scale(np.array(values, float)), side="right") - 1, 0, NUM_BINS - 1)
    ends = np.exp(edges) if dimension.log else edges
    return places.tolist(), [f"{start:.2g}..{stop:.2g}" for start, stop in pairwise(ends)]


def table_lines(table: pd.DataFrame) -> list[str]:
    """The table as text."""
    if table.empty:
        return ["too few trials with different scores to tell which options matter"]
    wide = max(len("option"), *(len(name) for name in table["option"])) + 2
    best = max(len("best values"), *(len(title) + 8 for title in table["best_in"])) + 2
    lines = [f"{'option':<{wide}}{'importance':>10}{'spread':>9}   {'best values':<{best}}{'worst values'}"]
    for row in table.to_dict("records"):
        known = math.isfinite(row["spread"])
        ends = [f"{row[f'{end}_mean']:.3f} in {row[f'{end}_in']}" if known else "" for end in ("best", "worst")]
        size = f"{row['spread']:>9.3f}" if known else f"{'':>9}"
        lines.append(f"{row['option']:<{wide}}{row['importance']:>10.2f}{size}   {ends[0]:<{best + 3}}{ends[1]}")
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
        axes.invert_yaxis()
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
    right.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130, format="png")
