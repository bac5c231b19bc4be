"""Linear probes: what a frozen CLIP already knows of each score, fitted before the first epoch.

Left alone, consistency would start at (cos + 1) / 2, about .55 to .68 for every real CLIP while labels fill
[0, 1], and quality at noise; fine-tuning learning rates are too small to move either far.

Shapes: n images, E embedding, F stage statistics, X = E + F, D features, R the rank of the features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from evaluation.agreement import Scores
from sources.examples import Examples, clusters

Array = NDArray[np.float64]

NUM_FOLDS = 50  # leaving out a fold costs next to nothing, see `left_out_errors`
MAX_IMAGES = 4000  # that a probe is fitted to: the time rises with the third power, what it knows hardly at all
MIN_SPREAD = 1e-7  # of a feature on [0, 1] that is computed in float32
PENALTIES = np.logspace(-4, 4, 33)  # for rows of length 1 on average: the largest leaves only the mean
LOGIT_CLIP = 0.05  # labels are taken into [.05, .95] before the logit, which would send 0 and 1 to infinity


def fit_line(feature: Array, target: Array) -> tuple[float, float]:
    """Least-squares (a, b) of target ~ a * feature + b, for a feature (n,) and labels (n,), both on [0, 1]."""
    spread = feature - feature.mean()
    # A constant feature leaves rounding, not 0: what is below float32's resolution says nothing.
    known = spread.std() > MIN_SPREAD
    slope = float(spread @ (target - target.mean()) / (spread @ spread)) if known else 0.0
    return slope, float(target.mean() - slope * feature.mean())


def line_error(feature: Array, target: Array, fold_of: NDArray[np.int_]) -> float:
    """Mean squared error of `fit_line` on each fold, fitted on the others; NaN if there are none."""
    if fold_of.max() == 0:
        return np.nan
    left = np.empty(len(target))
    for fold in range(fold_of.max() + 1):
        held = fold_of == fold
        slope, offset = fit_line(feature[~held], target[~held])
        left[held] = target[held] - slope * feature[held] - offset
    return float(np.square(left).mean())


def fit_quality(features_ND: Array, target: Array, groups: NDArray[np.int_], widths: Sequence[int] = ()) -> Fitted:
    """Ridge of target ~ sigmoid(w . features + b), labels (n,) on [0, 1], fitted in the logit; else as `fit_ridge`."""
    clipped = np.clip(target, LOGIT_CLIP, 1 - LOGIT_CLIP)
    return fit_ridge(features_ND, np.log(clipped / (1 - clipped)), groups, widths)


@dataclass(frozen=True)
class Fitted:
    """A linear probe."""

    weights: Array  # (D,)
    bias: float
    penalty: float
    error: float  # mean squared, in cross-validation; NaN where there was none

    def __call__(self, features_ND: np.ndarray) -> Array:
        """(n, D) -> (n,)."""
        return features_ND @ self.weights + self.bias


def fit_ridge(features_ND: Array, target: Array, groups: NDArray[np.int_], widths: Sequence[int] = ()) -> Fitted:
    """Ridge regression of target (n,) ~ w . features + b.

    The penalty is chosen by cross-validation over folds that share no group, so that a prompt's pictures cannot
    vouch for each other.

    Args:
        groups: (n,) the prompt (or image) number of each row.
        widths: of the blocks that the features consist of, each of which is centred and scaled to rows of length 1 on
            average, so that one penalty suits all; () takes the features as they are.
    """
    rows = sample_of(groups)
    features_ND, target, groups = features_ND[rows], target[rows], groups[rows]
    mean_D = features_ND.mean(axis=0)
    centred_ND = features_ND - mean_D
    size_D = np.ones(len(mean_D))
    for block in np.split(np.arange(len(mean_D)), np.cumsum(widths)[:-1]) if widths else ():
        size_D[block] = np.sqrt(np.square(centred_ND[:, block]).sum(axis=1).mean()) or 1.0
    centred_ND = centred_ND / size_D
    fold_of = folds_of(groups)
    penalty, error = 1.0, np.nan
    if fold_of.max() > 0:
        errors = list(left_out_errors(centred_ND, target, fold_of))
        penalty, error = PENALTIES[np.argmin(errors)], min(errors)
    weights = solve_ridge(centred_ND, target - target.mean(), penalty) / size_D
    return Fitted(weights, float(target.mean() - weights @ mean_D), float(penalty), float(error))


def sample_of(groups: NDArray[np.int_]) -> NDArray[np.int_]:
    """The rows to fit to: all, or whole groups drawn at random, at most MAX_IMAGES of them, but one group at least."""
    if len(groups) <= MAX_IMAGES:
        return np.arange(len(groups))
    names, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(0).permutation(len(names))
    taken = order[: max(1, int((np.cumsum(sizes[order]) <= MAX_IMAGES).sum()))]
    return np.flatnonzero(np.isin(group_of, taken))


def folds_of(groups: NDArray[np.int_]) -> NDArray[np.int_]:
    """(n,) a fold for each row, 0 to at most NUM_FOLDS - 1, none of which shares a group with another."""
    names, group_of = np.unique(groups, return_inverse=True)
    return (np.random.default_rng(0).permutation(len(names)) % NUM_FOLDS)[group_of]


def left_out_errors(centred_ND: Array, target: Array, fold_of: NDArray[np.int_]) -> Iterator[float]:
    """For each of PENALTIES the mean squared error of each fold's rows, by ridge regression on all others.

    Nothing is fitted again: with the smoother S = 1/n + U diag(d / (d + penalty)) U', what leaving out the rows g makes
    of their residuals r is (I - S_gg)^-1 r_g, exactly but for the blocks' centres and scales, which stay those of all
    rows (Golub, Heath and Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter",
    Technometrics 1979, for single rows).
    """
    num_rows, num_features = centred_ND.shape
    is_wide = num_rows <= num_features
    gram = centred_ND @ centred_ND.T if is_wide else centred_ND.T @ centred_ND
    # In float32, which is fast and exact enough but for the lowest penalties on all but noise-free data.
    squares_R, axes = scipy.linalg.eigh(gram.astype(np.float32), driver="evd")
    kept = squares_R > squares_R[-1] * 1e-6  # centring leaves a direction of rounding alone
    squares_R, axes = squares_R[kept].astype(float), axes[:, kept].astype(float)
    bases_NR = axes if is_wide else centred_ND @ axes / np.sqrt(squares_R)
    centred = target - target.mean()
    shares_R = bases_NR.T @ centred
    members = [np.flatnonzero(fold_of == fold) for fold in range(fold_of.max() + 1)]
    for penalty in PENALTIES:
        kept_R = squares_R / (squares_R + penalty)
        residuals = centred - bases_NR @ (kept_R * shares_R)
        total = 0.0
        for rows in members:
            smoother = 1 / num_rows + (bases_NR[rows] * kept_R) @ bases_NR[rows].T
            total += np.square(np.linalg.lstsq(np.eye(len(rows)) - smoother, residuals[rows], rcond=None)[0]).sum()
        yield total / num_rows


def solve_ridge(centred_ND: Array, centred: Array, penalty: float) -> Array:
    """(D,) weights of ridge regression without a constant, by the smaller of the two systems of normal equations."""
    num_rows, num_features = centred_ND.shape
    if num_rows < num_features:
        gram_NN = centred_ND @ centred_ND.T
        gram_NN.flat[:: num_rows + 1] += penalty
        return centred_ND.T @ scipy.linalg.solve(gram_NN, centred, assume_a="pos")
    gram_DD = centred_ND.T @ centred_ND
    gram_DD.flat[:: num_features + 1] += penalty
    return scipy.linalg.solve(gram_DD, centred_ND.T @ centred, assume_a="pos")


@dataclass(frozen=True)
class Base:
    """What a frozen CLIP knows, fitted on the training fold."""

    images: dict[str, Fitted]  # scores of the image alone: the logit of its embedding and normalised stage statistics
    cosine: tuple[float, float] | None  # factor and offset of (cos + 1) / 2 for consistency; None without labels
    levels: dict[str, tuple[float, float]]  # likewise of the expected level of q and c; empty without levels
    joint: Fitted | None  # consistency from `joint_blocks`; None without labels
    is_joint: bool  # whether consistency starts from that: asked for, and better than the cosine in cross-validation
    stage_mean: Array  # (F,) of the raw stage statistics
    stage_scale: Array  # (F,) by which they are divided, so that an image's have length 1 on average

    @property
    def quality(self) -> tuple[ArrayLike, float] | None:
        """What the quality head starts from."""
        return self.levels.get("q") or self.of_image("q")

    @property
    def consistency(self) -> tuple[ArrayLike, float] | None:
        """What the consistency head starts from: weights of all of its features, or of the first alone."""
        if self.joint and self.is_joint and not self.levels:
            return self.joint.weights, self.joint.bias
        return self.levels.get("c") or self.cosine

    def of_image(self, task: str) -> tuple[ArrayLike, float] | None:
        """What the head of a score of the image alone starts from."""
        fitted = self.images.get(task)
        return (fitted.weights, fitted.bias) if fitted else None

    def probes(self, known: Scores) -> dict[str, np.ndarray]:
        """What CLIP makes of images -> what ridge regression tells from it, in label units."""
        features = normalised(known["image"], self.stage_mean, self.stage_scale)
        found: dict[str, np.ndarray] = {task: 1 / (1 + np.exp(-fit(features))) for task, fit in self.images.items()}
        if self.joint:
            found["c"] = self.joint(np.hstack(joint_blocks(known, self.stage_mean, self.stage_scale)))
        return found

    def scores(self, known: Scores) -> dict[str, np.ndarray]:
        """As `probes`; where consistency starts from the cosine alone, "c" is that, in no units."""
        found = self.probes(known)
        return found if self.is_joint or "c" not in found else {**found, "c": known["cos"]}


def normalised(image_NX: np.ndarray, stage_mean: Array, stage_scale: Array) -> np.ndarray:
    """Embeddings and raw stage statistics (n, X), the latter normalised."""
    embed_dim = image_NX.shape[1] - len(stage_mean)
    return np.hstack([image_NX[:, :embed_dim], (image_NX[:, embed_dim:] - stage_mean) / stage_scale])


def joint_blocks(known: Scores, stage_mean: Array, stage_scale: Array) -> list[np.ndarray]:
    """What consistency can be told from: [(cos + 1) / 2, image, text, image * text, stages], each (n, ...)."""
    image = normalised(known.get("content", known["image"]), stage_mean, stage_scale)
    text = known["text"]
    image, stages = image[:, : text.shape[1]], image[:, text.shape[1] :]
    return [(known["cos"][:, None] + 1) / 2, image, text, image * text, stages]


def fit_joint(blocks: Sequence[np.ndarray], target: Array, groups: NDArray[np.int_]) -> Fitted:
    """The better of two probes in cross-validation: of all blocks, or of the cosine and the stages alone.

    The second, whose weights of the others are 0, is for a CLIP whose embeddings tell little beyond their cosine.
    """
    widths = [block.shape[1] for block in blocks]
    found = [fit_ridge(np.hstack(blocks), target, groups, [width for width in widths if width])]
    if widths[-1]:
        fitted = fit_ridge(np.hstack([blocks[0], blocks[-1]]), target, groups, [widths[0], widths[-1]])
        weights = np.concatenate([fitted.weights[:1], np.zeros(sum(widths[1:-1])), fitted.weights[1:]])
        found.append(replace(fitted, weights=weights))
    return min(found, key=lambda fitted: fitted.error)


def fit_base(known: Mapping[str, Scores], examples: Examples, *, stage_width: int = 0, base: str = "probe") -> Base:
    """Fit the base terms on what CLIP makes of the training fold, images that are NaN left out.

    Args:
        known: fold -> what `models.embed_batch` gives.
        stage_width: how many of the last numbers of each image are raw stage statistics.
        base: "probe", or "cosine" to judge consistency by that alone.
    """
    rows, train = examples.rows("train"), known["train_eval"]
    is_known = np.isfinite(train["image"]).all(axis=1)
    groups = clusters(examples.table)[rows]
    raw = train["image"][is_known, train["image"].shape[1] - stage_width :]
    mean, spread = raw.mean(axis=0), raw.std(axis=0)
    scale = np.where(spread > MIN_SPREAD, spread, 1.0) * np.sqrt(stage_width)
    features = normalised(train["image"], mean, scale)
    widths = [width for width in (features.shape[1] - stage_width, stage_width) if width]
    images, levels = {}, {}
    cosine = joint = None
    is_joint = False
    for task, values in examples.unit_targets.items():
        keep = ~np.isnan(values[rows]) & is_known
        target = values[rows][keep]
        if task == "c":
            feature = (train["cos"][keep] + 1) / 2
            cosine = fit_line(feature, target)
            blocks = [block[keep] for block in joint_blocks(train, mean, scale)]
            joint = fit_joint(blocks, target, groups[keep])
            # Never where there is no cross-validation: the error is NaN then.
            is_joint = base == "probe" and joint.error < line_error(feature, target, folds_of(groups[keep]))
        else:
            images[task] = fit_quality(features[keep], target, groups[keep], widths)
        if f"level_{task}" in train:
            levels[task] = fit_line(train[f"level_{task}"][keep], target)
    return Base(images, cosine, levels, joint, is_joint, mean, scale)
