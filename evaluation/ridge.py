"""Ridge regression, of features and of a kernel, with penalties by cross-validation in closed form.

Shapes: n images, D features, R their rank; of a kernel: L images that were fitted to, F features, K free ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_SPREAD = 1e-7  # of a feature on [0, 1] that is computed in float32
NUM_FOLDS = 50  # leaving out a fold costs next to nothing, see `left_out_errors`
MAX_IMAGES = 4000  # that anything is fitted to: the time rises with the third power, what is known hardly at all
PENALTIES = np.logspace(-4, 4, 33)  # for rows of length 1 on average: the largest leaves only the mean
KERNEL_PENALTIES = np.logspace(-3, 4, 29)  # the largest leaves the free features alone
NARROWNESS = 2.0  # gamma times the median squared distance; 1 and 4 were worse in cross-validation and on test folds


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
    penalty, error = best_penalty(PENALTIES, left_out_errors(centred_ND, target, fold_of) if fold_of.any() else ())
    weights = solve_ridge(centred_ND, target - target.mean(), penalty) / size_D
    return Fitted(weights, float(target.mean() - weights @ mean_D), penalty, error)


def best_penalty(penalties: Array, errors: Iterable[float]) -> tuple[float, float]:
    """The penalty of the least error, and that error; 1 and NaN where there was no cross-validation."""
    errors = list(errors)
    return (float(penalties[np.argmin(errors)]), float(min(errors))) if errors else (1.0, np.nan)


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
    squares_R, axes = spectrum(gram)
    bases_NR = axes if is_wide else centred_ND @ axes / np.sqrt(squares_R)
    constant_N1 = np.full((num_rows, 1), num_rows**-0.5)
    yield from fold_errors(bases_NR, squares_R, constant_N1, target, fold_of, PENALTIES)


def spectrum(gram: Array) -> tuple[Array, Array]:
    """Eigenvalues (R,) above rounding, and eigenvectors (n, R), of a matrix (n, n).

    In float32, which is fast and exact enough but for the lowest penalties on all but noise-free data.
    """
    squares_R, axes = scipy.linalg.eigh(gram.astype(np.float32), driver="evd")
    kept = squares_R > squares_R[-1] * 1e-6  # centring leaves a direction of rounding alone
    return squares_R[kept].astype(float), axes[:, kept].astype(float)


def fold_errors(
    bases_NR: Array,
    squares_R: Array,
    free_NK: Array,
    target: Array,
    fold_of: NDArray[np.int_],
    penalties: Array,
) -> Iterator[float]:
    """For each penalty the mean squared error of each fold's rows, fitted on all others, see `left_out_errors`.

    Args:
        bases_NR, squares_R: orthonormal columns, and how far each is to be believed: d / (d + penalty).
        free_NK: orthonormal columns, across those, that are fitted without a penalty.
    """
    centred = target - free_NK @ (free_NK.T @ target)
    shares_R = bases_NR.T @ centred
    members = [np.flatnonzero(fold_of == fold) for fold in range(fold_of.max() + 1)]
    for penalty in penalties:
        kept_R = squares_R / (squares_R + penalty)
        residuals = centred - bases_NR @ (kept_R * shares_R)
        total = 0.0
        for rows in members:
            smoother = free_NK[rows] @ free_NK[rows].T + (bases_NR[rows] * kept_R) @ bases_NR[rows].T
            total += np.square(np.linalg.lstsq(np.eye(len(rows)) - smoother, residuals[rows], rcond=None)[0]).sum()
        yield total / len(target)


def solve_ridge(centred_ND: Array, centred: Array, penalty: float) -> Array:
    """(D,) weights of ridge regression without a constant, by the smaller of the two systems of normal equations."""
    num_rows, num_features = centred_ND.shape
    if num_rows < num_features:
        return centred_ND.T @ solve_penalised(centred_ND @ centred_ND.T, centred, penalty)
    return solve_penalised(centred_ND.T @ centred_ND, centred_ND.T @ centred, penalty)


def solve_penalised(gram: Array, target: Array, penalty: float) -> Array:
    """x (n,) of (gram + penalty I) x = target; `gram` is overwritten."""
    gram.flat[:: len(gram) + 1] += penalty
    return scipy.linalg.solve(gram, target, assume_a="pos")


@dataclass(frozen=True)
class Kernel:
    """How alike two rows of features are: exp(-gamma |z - z_i|^2), 1 for the same."""

    places: Array  # (L, F)
    gamma: float

    def __call__(self, features_NF: Array) -> Array:
        """(n, F) -> (n, L)."""
        return np.exp(-self.gamma * squared_distances(features_NF, self.places))


@dataclass(frozen=True)
class KernelFit:
    """Kernel ridge regression: f = sum_i w_i kernel(z, z_i) + slopes . free + bias.

    Sources: Saunders, Gammerman and Vovk, "Ridge regression learning algorithm in dual variables", ICML 1998; the part
    without a penalty as in smoothing splines (Wahba, Spline Models for Observational Data, 1990, chapter 1).
    """

    weights: Array  # (L,)
    slopes: Array  # (K,)
    bias: float
    penalty: float
    error: float  # mean squared, in cross-validation; NaN where there was none

    def __call__(self, alike_NL: Array, free_NK: Array) -> Array:
        """(n, L), (n, K) -> (n,)."""
        return alike_NL @ self.weights + free_NK @ self.slopes + self.bias


def squared_distances(first_NF: Array, second_MF: Array) -> Array:
    """(n, m)."""
    squares = np.square(first_NF).sum(axis=1)[:, None] + np.square(second_MF).sum(axis=1)
    return np.maximum(squares - 2 * first_NF @ second_MF.T, 0)


def build_kernel(features_LF: Array) -> Kernel:
    """A kernel as narrow as fits how far these rows lie apart (the median heuristic)."""
    median = float(np.median(squared_distances(features_LF, features_LF)))
    return Kernel(features_LF, NARROWNESS / median if median > 0 else 1.0)


def fit_kernel(alike_NN: Array, free_NK: Array, target: Array, groups: NDArray[np.int_]) -> KernelFit:
    """Kernel ridge regression; the penalty by cross-validation over folds that share no group, as `fit_ridge`.

    Args:
        alike_NN: the kernel of the images with each other.
        free_NK: features that are fitted without a penalty, as the constant is; one that does not vary gets 0.
        groups: (n,) the prompt (or image) number of each row.
    """
    varies_K = free_NK.std(axis=0) > MIN_SPREAD
    design = np.hstack([np.ones((len(target), 1)), free_NK[:, varies_K]])
    basis = np.linalg.qr(design)[0]

    def across(values: Array) -> Array:
        """What of columns no weighted sum of the free features and the constant tells."""
        return values - basis @ (basis.T @ values)

    projected = across(across(alike_NN).T)
    fold_of = folds_of(groups)
    errors: Iterable[float] = ()
    if fold_of.any():
        squares_R, axes = spectrum(projected)
        errors = fold_errors(axes, squares_R, basis, target, fold_of, KERNEL_PENALTIES)
    penalty, error = best_penalty(KERNEL_PENALTIES, errors)
    weights = across(solve_penalised(projected, across(target), penalty))
    line = np.linalg.lstsq(design, target - alike_NN @ weights, rcond=None)[0]
    slopes = np.zeros(free_NK.shape[1])
    slopes[varies_K] = line[1:]
    return KernelFit(weights, slopes, float(line[0]), penalty, error)
