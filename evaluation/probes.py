"""Probes: what a frozen CLIP already knows of each score, fitted before the first epoch.

Left alone, consistency would start at (cos + 1) / 2, about .55 to .68 for every real CLIP while labels fill
[0, 1], and quality at noise; fine-tuning learning rates are too small to move either far.

Shapes: n images, E embedding, F stage statistics, X = E + F, D features, L images of a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation import ridge
from evaluation.agreement import Scores
from evaluation.ridge import MIN_SPREAD, Array, Fitted, Kernel, KernelFit
from sources.examples import Examples, clusters
from sources.scores import TASKS

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
    """Ridge of target ~ sigmoid(w . features + b), labels (n,) on [0, 1], fitted in the logit."""
    clipped = np.clip(target, LOGIT_CLIP, 1 - LOGIT_CLIP)
    return ridge.fit_ridge(features_ND, np.log(clipped / (1 - clipped)), groups, widths)


@dataclass(frozen=True)
class Base:
    """What a frozen CLIP knows, fitted on the training fold."""

    images: dict[str, Fitted]  # scores of the image alone: the logit of its embedding and normalised stage statistics
    cosine: tuple[float, float] | None  # factor and offset of (cos + 1) / 2 for consistency; None without labels
    levels: dict[str, tuple[float, float]]  # likewise of the expected level of q and c; empty without levels
    joint: Fitted | None  # consistency from `joint_blocks`; None without labels
    is_joint: bool  # whether consistency starts from that: asked for, and better than the cosine in cross-validation
    kernel: Kernel | None  # of the normalised stage statistics, where base terms are to start from that
    kernel_fits: dict[str, KernelFit]  # of q and c, to the images of that kernel
    stage_mean: Array  # (F,) of the raw stage statistics
    stage_scale: Array  # (F,) by which they are divided, so that an image's have length 1 on average

    @property
    def quality(self) -> tuple[ArrayLike, float] | None:
        """What the quality head starts from."""
        return self.levels.get("q") or self.of_image("q")

    @property
    def consistency(self) -> tuple[ArrayLike, float] | None:
        """What the consistency head starts from: weights of all of its features, or of the first alone."""
        if fitted := self.kernel_fits.get("c"):
            return fitted.slopes, fitted.bias
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
        """What base terms make of images; where consistency starts from the cosine alone, "c" is that, in no units."""
        found = self.probes(known)
        if self.kernel:
            features = normalised(known["image"], self.stage_mean, self.stage_scale)
            alike = self.kernel(features[:, features.shape[1] - len(self.stage_mean) :])
            return found | {task: fit(alike, free_features(task, known)) for task, fit in self.kernel_fits.items()}
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


def free_features(task: str, known: Scores) -> np.ndarray:
    """What a score's kernel fit has beside the kernel, (n, K): consistency the cosine, on [0, 1]."""
    return (known["cos"][:, None] + 1) / 2 if task == "c" else np.empty((len(known["image"]), 0))


def fit_joint(blocks: Sequence[np.ndarray], target: Array, groups: NDArray[np.int_]) -> Fitted:
    """The better of two probes in cross-validation: of all blocks, or of the cosine and the stages alone.

    The second, whose weights of the others are 0, is for a CLIP whose embeddings tell little beyond their cosine.
    """
    widths = [block.shape[1] for block in blocks]
    found = [ridge.fit_ridge(np.hstack(blocks), target, groups, [width for width in widths if width])]
    if widths[-1]:
        fitted = ridge.fit_ridge(np.hstack([blocks[0], blocks[-1]]), target, groups, [widths[0], widths[-1]])
        weights = np.concatenate([fitted.weights[:1], np.zeros(sum(widths[1:-1])), fitted.weights[1:]])
        found.append(replace(fitted, weights=weights))
    return min(found, key=lambda fitted: fitted.error)


def fit_kernels(
    kernel: Kernel, frees: Mapping[str, Array], targets: Mapping[str, Array], groups: NDArray[np.int_]
) -> dict[str, KernelFit]:
    """A fit for each score's labels, (L,) with NaN where there is none, on the images of a kernel."""
    alike, fits = kernel(kernel.places), {}
    for task, target in targets.items():
        keep = ~np.isnan(target)
        fitted = ridge.fit_kernel(alike[np.ix_(keep, keep)], frees[task][keep], target[keep], groups[keep])
        weights = np.zeros(len(target))
        weights[keep] = fitted.weights
        fits[task] = replace(fitted, weights=weights)
    return fits


def fit_base(known: Mapping[str, Scores], examples: Examples, *, stage_width: int = 0, base: str = "probe") -> Base:
    """Fit the base terms on what CLIP makes of the training fold, images that are NaN left out.

    Args:
        known: fold -> what `models.embed_batch` gives.
        stage_width: how many of the last numbers of each image are raw stage statistics.
        base: "kernel" to start from kernel ridge regression on the stage statistics, "probe" from that on all there is,
            "cosine" to judge consistency by that alone.
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
    cosine = joint = kernel = None
    kernel_fits: dict[str, KernelFit] = {}
    is_joint = False
    if base == "kernel":
        chosen = np.flatnonzero(is_known)[ridge.sample_of(groups[is_known])][
            : ridge.MAX_IMAGES
        ]  # of a huge group a part
        kernel = ridge.build_kernel(features[chosen, features.shape[1] - stage_width :])
        targets = {task: values[rows][chosen] for task, values in examples.unit_targets.items() if task in TASKS}
        frees = {task: free_features(task, train)[chosen] for task in targets}
        kernel_fits = fit_kernels(kernel, frees, targets, groups[chosen])
    for task, values in examples.unit_targets.items():
        keep = ~np.isnan(values[rows]) & is_known
        target = values[rows][keep]
        if task == "c":
            feature = (train["cos"][keep] + 1) / 2
            cosine = fit_line(feature, target)
            blocks = [block[keep] for block in joint_blocks(train, mean, scale)]
            joint = fit_joint(blocks, target, groups[keep])
            # Never where there is no cross-validation: the error is NaN then.
            is_joint = base == "probe" and joint.error < line_error(feature, target, ridge.folds_of(groups[keep]))
        else:
            images[task] = fit_quality(features[keep], target, groups[keep], widths)
        if f"level_{task}" in train:
            levels[task] = fit_line(train[f"level_{task}"][keep], target)
    return Base(images, cosine, levels, joint, is_joint, kernel, kernel_fits, mean, scale)
