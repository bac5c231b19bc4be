"""Fit the base terms to what a frozen CLIP already knows, before the first epoch: arrays in, coefficients out.

Left alone, consistency would start at (cos + 1) / 2, about .55 to .68 for every real CLIP while labels fill
[0, 1], and quality at noise; fine-tuning learning rates are too small to move either far.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold

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
