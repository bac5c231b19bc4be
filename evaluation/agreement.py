"""How well a fold's scores agree with people: correlations, their certainty, and each generator by itself.

Scores come in label units (0..1) from the model and in MOS units from everything else; what is found is in MOS units.
Data sets that were joined are measured each by itself: their raters never saw each other's images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from evaluation import metrics
from sources.examples import FOLDS, Examples, clusters, leakage
from sources.scores import TASKS, columns_of, title_of

Scores = Mapping[str, np.ndarray]  # task -> scores of a fold's images

MIN_PER_GENERATOR = 8  # labelled test images, below which a correlation says nothing


def by_set(scores: Scores, fold: str, examples: Examples) -> Iterator[tuple[str, Scores, Examples]]:
    """A fold's scores and the examples, for each data set by itself: (title, scores, examples)."""
    sets = examples.table["set"].to_numpy()
    for title in examples.sets:
        here = sets[examples.rows(fold)] == title
        yield title, {task: values[here] for task, values in scores.items()}, examples.only(title)


def agreements(in_mos: Scores, fold: str, examples: Examples) -> dict[str, float]:
    """Agreement of a fold's predictions (MOS units) with the labels that exist: "srocc_q", ..., "main".

    Joined data sets give the mean over those that have the score.
    """
    found: dict[str, list[float]] = {}
    for _, scores, own in by_set(in_mos, fold, examples):
        for task in own.scales:
            if task not in scores:
                continue
            mos = own.mos(task, fold)
            known = ~np.isnan(mos)
            for name, value in metrics.agreement(scores[task][known], mos[known]).items():
                found.setdefault(f"{name}_{task}", []).append(value)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    two = {key: means[key] for task in TASKS for key in (f"srocc_{task}", f"plcc_{task}") if key in means}
    return {**means, "main": metrics.main_score(two)} if two else means


def constant_notes(folds: Mapping[str, Scores | None], examples: Examples) -> list[str]:
    """A line for each fold and score whose correlations are 0 by definition, since one side of them is constant.

    Args:
        folds: predictions of each fold; None looks at the human scores alone.
    """
    found = []
    for fold, scores in folds.items():
        for task in examples.scales:
            mos = examples.mos(task, fold)
            sides = {"human": mos, "predicted": None if scores is None else scores[task]}
            for side, values in sides.items():
                known = values[~np.isnan(mos)] if values is not None else np.empty(0)
                if len(known) and np.ptp(known) == 0:
                    what = f"all {len(known)} {side} scores of {title_of(task)} in the {fold} fold are equal"
                    found.append(f"{what}: correlations with them are 0 by definition")
    return found


def in_mos_units(scores: Scores, examples: Examples) -> dict[str, np.ndarray]:
    """Label units -> MOS units, of the scores that have labels."""
    return {task: scale.to_mos(scores[task]) for task, scale in examples.scales.items()}


def data_facts(examples: Examples) -> dict[str, Any]:
    """What is to be known of the data: "images" (in each fold), "data_fingerprint", "test_digest" and "leakage"."""
    return {
        "images": {fold: len(examples.rows(fold)) for fold in FOLDS},
        "data_fingerprint": examples.fingerprint,
        "test_digest": examples.test_digest,
        "leakage": leakage(examples),
    }


def test_findings(scores: Scores, examples: Examples) -> dict[str, Any]:
    """What is to be known of the test fold's scores (label units) beside agreement.

    Returns:
        "certainty" and "generators" of one data set, empty for several; "sets": title -> "test" (agreement),
        "certainty" and "generators" of each of several.
    """
    in_mos = in_mos_units(scores, examples)
    if len(examples.sets) == 1:
        return {"certainty": certainty(in_mos, examples), "generators": generators(in_mos, examples), "sets": {}}
    sets = {}
    for title, own_scores, own in by_set(in_mos, "test", examples):
        sets[title] = {
            "test": agreements(own_scores, "test", own),
            "certainty": certainty(own_scores, own),
            "generators": generators(own_scores, own),
        }
    return {"certainty": {}, "generators": {}, "sets": sets}


def certainty(in_mos: Scores, examples: Examples) -> dict[str, dict[str, Any]]:
    """How sure the test fold's scores are, and what correlations do not tell: a part for each task of one data set.

    Returns:
        Task -> 95 % intervals of srocc and plcc (bootstrap over prompts; absent with a single prompt), the share of
        pairs of the same prompt that are ordered as people order them and their number, slope and bias (MOS units).
    """
    groups = clusters(examples.table)[examples.rows("test")]
    found = {}
    for task in examples.scales:
        mos = examples.mos(task, "test")
        known = ~np.isnan(mos)
        found[task] = certainty_of(in_mos[task][known], mos[known], groups[known])
    return found


def certainty_of(pred: np.ndarray, mos: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """`certainty` of one task: predictions and labels (n,) in MOS units, and the prompt number of each."""
    names: list[int] = groups.tolist()
    accuracy, num_pairs = metrics.within_group_accuracy(pred, mos, names)
    return {
        "intervals": {name: list(ends) for name, ends in metrics.cluster_bootstrap(pred, mos, names).items()},
        "within_prompt": {"accuracy": accuracy, "pairs": num_pairs},
        **metrics.calibration_line(pred, mos),
    }


def generator_table(pred: np.ndarray, mos: np.ndarray, generators: np.ndarray) -> pd.DataFrame:
    """How well each generator's images are judged: generator, images, srocc, plcc, mos and pred (means), MOS units.

    Generators with fewer than MIN_PER_GENERATOR images are left out; the worst comes first.
    """
    rows = []
    for name in sorted(set(generators)):
        own = generators == name
        if name and own.sum() >= MIN_PER_GENERATOR:
            agreed = {"srocc": metrics.srocc(pred[own], mos[own]), "plcc": metrics.plcc(pred[own], mos[own])}
            means = {"mos": float(mos[own].mean()), "pred": float(pred[own].mean())}
            rows.append({"generator": name, "images": int(own.sum()), **agreed, **means})
    columns = ["generator", "images", "srocc", "plcc", "mos", "pred"]
    return pd.DataFrame(rows, columns=columns).sort_values("srocc", kind="stable", ignore_index=True)


def generators(in_mos: Scores, examples: Examples) -> dict[str, dict[str, Any]]:
    """The test fold by generator: a part for each task of one data set; none where no two generators have images.

    Returns:
        Task -> "by_generator" (rows of `generator_table`, the worst first), "worst" (its name), and "ranking": SROCC
        of the generators' mean predicted and mean human scores.
    """
    names = examples.table["group"].to_numpy()[examples.rows("test")]
    found: dict[str, dict[str, Any]] = {}
    for task in examples.scales:
        mos = examples.mos(task, "test")
        known = ~np.isnan(mos)
        found |= by_generator(task, in_mos[task][known], mos[known], names[known])
    return found


def by_generator(task: str, pred: np.ndarray, mos: np.ndarray, names: np.ndarray) -> dict[str, dict[str, Any]]:
    """`generators` of one task: predictions, labels and the generator's name of each image (n,)."""
    table = generator_table(pred, mos, names)
    if len(table) < 2:
        return {}
    ranking = metrics.srocc(table["pred"], table["mos"])
    rows = table.to_dict("records")
    return {task: {"by_generator": rows, "worst": rows[0]["generator"], "ranking": ranking}}


def prediction_table(scores: Mapping[str, Scores], examples: Examples) -> pd.DataFrame:
    """One row per image in MOS units; the columns of a task without scores are empty."""
    tables = []
    for name, predicted in scores.items():
        fold = name.removesuffix("_eval")
        rows = examples.rows(fold)
        table = examples.table.iloc[rows]
        part = pd.DataFrame(
            {
                "row": rows,
                "name": table["name"].to_numpy(),
                "set": table["set"].to_numpy(),
                "split": fold,
                "prompt": table["prompt"].to_numpy(),
                "generator": table["group"].to_numpy(),
                "cluster": clusters(examples.table)[rows],
            }
        )
        for task in dict.fromkeys([*TASKS, *examples.scales]):
            mos_column, pred_column = columns_of(task)
            part[mos_column] = examples.mos(task, fold)
            known = task in examples.scales
            part[pred_column] = examples.scales[task].to_mos(predicted[task]) if known else np.nan
        part.loc[(table["prompt"] == "").to_numpy(), columns_of("c")[1]] = np.nan
        tables.append(part)
    return pd.concat(tables).sort_values("row").drop(columns="row")
