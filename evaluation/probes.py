"""Linear probes: what a frozen CLIP already knows of each score, fitted before the first epoch.

Left alone, consistency would start at (cos + 1) / 2, about .55 to .68 for every real CLIP while labels fill
[0, 1], and quality at noise; fine-tuning learning rates are too small to move either far.

Shapes: n images, E embedding, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold

from evaluation.agreement import Scores
from sources.examples import Examples, clusters

Array = NDArray[np.float64]

NUM_FOLDS = 5
MIN_SPREAD = 1e-7  # of a feature on [0, 1] that is computed in float32
PENALTIES = np.logspace(-4, 3, 15)  # unit embeddings: the largest leaves only the mean
LOGIT_CLIP = 0.05  # labels are taken into [.05, .95] before the logit, which would send 0 and 1 to infinity


def fit_line(feature: Array, target: Array) -> tuple[float, float]:
    """Least-squares (a, b) of target ~ a * feature + b, for a feature (n,) and labels (n,), both on [0, 1]."""
    spread = feature - feature.mean()
    # A constant feature leaves rounding, not 0: what is below float32's resolution says nothing.
    known = spread.std() > MIN_SPREAD
    slope = float(spread @ (target - target.mean()) / (spread @ spread)) if known else 0.0
    return slope, float(target.mean() - slope * feature.mean())


def fit_quality(image_NE: Array, target: Array, groups: NDArray[np.int_]) -> tuple[Array, float]:
    """Ridge (w (E,), b) of target ~ sigmoid(w . image + b), fitted in the logit.

    The penalty is chosen by cross-validation over folds that share no group, so that a prompt's pictures cannot
    vouch for each other.

    Args:
        image_NE: (n, E) unit embeddings.
        target: (n,) labels on [0, 1].
        groups: (n,) the prompt (or image) number of each row.
    """
    clipped = np.clip(target, LOGIT_CLIP, 1 - LOGIT_CLIP)
    logit = np.log(clipped / (1 - clipped))
    return fit_ridge(image_NE, logit, groups)


def fit_ridge(features_ND: Array, target: Array, groups: NDArray[np.int_]) -> tuple[Array, float]:
    """Ridge (w (D,), b) of target (n,) ~ w . features + b, the penalty by cross-validation over whole groups."""
    num_folds = min(NUM_FOLDS, len(np.unique(groups)))
    if num_folds < 2:
        ridge = Ridge(alpha=1.0).fit(features_ND, target)
    else:
        errors = np.zeros(len(PENALTIES))
        for rest, held in GroupKFold(num_folds).split(features_ND, groups=groups):
            # One fit for all penalties: each is that of a target of its own, and all targets are the same.
            targets = np.repeat(target[rest, None], len(PENALTIES), axis=1)
            ridge = Ridge(alpha=PENALTIES).fit(features_ND[rest], targets)
            errors += np.square(ridge.predict(features_ND[held]) - target[held, None]).mean(axis=0)
        ridge = Ridge(alpha=PENALTIES[errors.argmin()]).fit(features_ND, target)
    return np.asarray(ridge.coef_, dtype=np.float64), float(ridge.intercept_)


@dataclass(frozen=True)
class Base:
    """What a frozen CLIP knows, fitted on the training fold."""

    images: dict[str, tuple[np.ndarray, float]]  # scores of the image alone: weights (E,) and bias of the logit
    cosine: tuple[float, float] | None  # factor and offset of (cos + 1) / 2 for consistency; None without labels
    levels: dict[str, tuple[float, float]]  # likewise of the expected level of q and c; empty without levels

    @property
    def quality(self) -> tuple[ArrayLike, float] | None:
        """What the quality head starts from."""
        return self.levels.get("q") or self.images.get("q")

    @property
    def consistency(self) -> tuple[float, float] | None:
        """What the consistency head starts from."""
        return self.levels.get("c") or self.cosine

    def scores(self, known: Scores) -> dict[str, np.ndarray]:
        """Embeddings -> ridge probes (label units) and zero-shot cosine "c", which is in no units."""
        logits = {task: known["image"] @ weights + bias for task, (weights, bias) in self.images.items()}
        found = {task: 1 / (1 + np.exp(-values)) for task, values in logits.items()}
        return {**found, "c": known["cos"]} if self.cosine else found


def fit_base(known: Mapping[str, Scores], examples: Examples) -> Base:
    """Fit the base terms on the training fold's embeddings, those that are NaN left out."""
    rows = examples.rows("train")
    is_known = np.isfinite(known["train_eval"]["image"]).all(axis=1)
    groups = clusters(examples.table)[rows]
    images, levels = {}, {}
    cosine = None
    for task, values in examples.unit_targets.items():
        keep = ~np.isnan(values[rows]) & is_known
        target = values[rows][keep]
        if task == "c":
            cosine = fit_line((known["train_eval"]["cos"][keep] + 1) / 2, target)
        else:
            images[task] = fit_quality(known["train_eval"]["image"][keep], target, groups[keep])
        if f"level_{task}" in known["train_eval"]:
            levels[task] = fit_line(known["train_eval"][f"level_{task}"][keep], target)
    return Base(images, cosine, levels)
