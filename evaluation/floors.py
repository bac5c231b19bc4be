"""What simple predictors reach on the test fold: means, image statistics, and probes on frozen embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from evaluation import metrics, ridge
from evaluation.agreement import Scores, agreements
from evaluation.probes import Base
from sources.examples import Examples, clusters, prompt_groups


def floors(
    examples: Examples, base: Base, known: Mapping[str, Scores], statistics_NS: np.ndarray
) -> dict[str, dict[str, float]]:
    """What simple predictors reach on the test fold, fitted on the training fold.

    Without looking at a pixel: the mean, each generator's mean and, where prompts are shared between folds, each
    prompt's mean and both. With pixels: ridge regression on simple statistics of the image, the zero-shot cosine, and
    the ridge probes of the frozen CLIP.

    Args:
        known: fold -> what `models.embed_batch` gives of the frozen CLIP.
        statistics_NS: (n, S) of all images.
            Training rows that are NaN, here or there, were dropped and teach nothing.
    """
    found = {name: agreements(scores, "test", examples) for name, scores in pixel_free(examples).items()}
    train, test = examples.rows("train"), examples.rows("test")
    from_statistics = ridge_scores(examples, statistics_NS[train], statistics_NS[test], list(examples.scales))
    found["image_statistics"] = agreements(from_statistics, "test", examples)
    if base.cosine:
        found["zero_shot_cosine"] = agreements({"c": known["test"]["cos"]}, "test", examples)
    found["ridge_probe"] = agreements(base.probes(known["test"]), "test", examples)
    levels = {task: known["test"][f"level_{task}"] for task in base.levels}
    return {**found, "zero_shot_levels": agreements(levels, "test", examples)} if levels else found


def pixel_free(examples: Examples) -> dict[str, dict[str, np.ndarray]]:
    """Scores (MOS units) of the test fold from group means of the training fold: predictor -> task -> (n,)."""
    set_codes = pd.factorize(examples.table["set"])[0]
    makers = pd.factorize(examples.table["set"] + "\0" + examples.table["group"])[0]
    prompts = prompt_groups(examples.table)
    train, test = examples.rows("train"), examples.rows("test")
    found: dict[str, dict[str, np.ndarray]] = {"mean": {}, "generator_mean": {}}
    if np.isin(prompts[test], prompts[train]).any():
        found |= {"prompt_mean": {}, "generator_and_prompt_mean": {}}
    for task in examples.scales:
        mos = examples.table[task].to_numpy()
        fit = train[~np.isnan(mos[train])]

        def mean_of(codes: np.ndarray, fit: np.ndarray = fit, mos: np.ndarray = mos) -> np.ndarray:
            return metrics.group_mean_predictor(codes[fit], mos[fit], codes[test])

        found["mean"][task] = mean_of(set_codes)
        found["generator_mean"][task] = mean_of(makers)
        if "prompt_mean" in found:
            found["prompt_mean"][task] = mean_of(prompts)
            found["generator_and_prompt_mean"][task] = mean_of(makers) + mean_of(prompts) - mean_of(set_codes)
    return found


def ridge_scores(
    examples: Examples, train_ND: np.ndarray, test_MD: np.ndarray, tasks: list[str]
) -> dict[str, np.ndarray]:
    """Ridge regression of each task's labels on features of the training fold: task -> (m,) of the test fold, in MOS.

    The penalty is chosen by cross-validation over prompts.
    """
    rows = examples.rows("train")
    groups = clusters(examples.table)[rows]
    is_known = np.isfinite(train_ND).all(axis=1)
    centre, spread = train_ND[is_known].mean(axis=0), train_ND[is_known].std(axis=0)
    # Rows of length 1 on average, as the embeddings are for which the penalties were chosen.
    size = np.where(spread > 0, spread, 1.0) * np.sqrt(train_ND.shape[1])
    train, test = ((values - centre) / size for values in (train_ND, test_MD))
    found = {}
    for task in tasks:
        mos = examples.mos(task, "train")
        keep = ~np.isnan(mos) & is_known
        found[task] = ridge.fit_ridge(train[keep], mos[keep], groups[keep])(test)
    return found
