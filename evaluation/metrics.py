"""How well predicted scores agree with human mean opinion scores (MOS).

Every function takes `pred` and `mos` of shape (N,), any real dtype, in any units: the correlations ignore
units and `rmse` answers in the units of `mos`. The protocol is that of VQEG and of the NTIRE challenges:
SROCC, PLCC both raw and after a fitted logistic, KROCC, and RMSE after the same logistic.

Two conventions hold throughout. Values that are constant, or fewer than two, order nothing: their
correlation is reported as 0.0, never NaN and never with a warning, so that a collapsed model reads as useless
and can still be compared. A NaN or an infinity is a fault upstream and raises ValueError, as do unequal
lengths.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

Array = NDArray[np.float64]

# A logistic this many times wider than the data is a straight line to about one part in 1e7.
_LINE_WIDTH = 1e3
# ln(width / std of pred) stays within this, so that neither exp() nor the division by the width overflows.
_MAX_LOG_WIDTH = 7.0
# Resamples are worked through in blocks of about this many numbers, which bounds the memory for any N.
_BLOCK = 2**18
# Resamples of means, and how many of them at once.
_RESAMPLES, _AT_ONCE = 1000, 50


def srocc(pred: ArrayLike, mos: ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1], ties given their average rank; 0.0 where nothing is ordered."""
    return _correlation(stats.spearmanr, *_pair(pred, mos))


def plcc(pred: ArrayLike, mos: ArrayLike) -> float:
    """Pearson's linear correlation in [-1, 1] of the raw predictions; 0.0 where either side is constant."""
    return _correlation(stats.pearsonr, *_pair(pred, mos))


def krocc(pred: ArrayLike, mos: ArrayLike) -> float:
    """Kendall's rank correlation tau-b in [-1, 1], which corrects for ties; 0.0 where nothing is ordered."""
    return _correlation(stats.kendalltau, *_pair(pred, mos))


def fit_logistic(pred: ArrayLike, mos: ArrayLike) -> Array:
    """Least-squares parameters (b1, b2, b3, b4) of VQEG's monotone map from `pred` to `mos`.

        y = b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|))

    b1 and b2 are the limits in MOS units, b3 the middle and |b4| the width in units of `pred`. Where `pred`
    falls as `mos` rises, b1 < b2 and the map falls too: PLCC and RMSE after it look as good as for a `pred`
    that rises, and only the raw SROCC and PLCC show the sign.

    Finite input always gets an answer. The best straight line, written as a very wide logistic, is returned
    when no fit beats it and for fewer than five pairs, which four parameters could join exactly. A side that
    is constant, or whose variance over- or underflows, gives the constant mean of `mos` (b1 = b2), and no
    pairs at all give the constant 0.

    Source: VQEG, Final report on the validation of objective models of video quality assessment, 2000.
    """
    x, y = _pair(pred, mos)
    if x.size == 0:
        return np.array([0.0, 0.0, 0.0, 1.0])
    with np.errstate(all="ignore"):
        x_mean, x_std, y_mean, y_std = x.mean(), x.std(), y.mean(), y.std()
        if _is_constant(x) or _is_constant(y) or not (0 < x_std < np.inf and 0 < y_std < np.inf):
            return np.array([y_mean, y_mean, x_mean, 1.0])
        # Standardised, the starting values and the tolerances suit every MOS scale.
        b1, b2, b3, b4 = _fit_standardised((x - x_mean) / x_std, (y - y_mean) / y_std)
        return np.array([y_mean + y_std * b1, y_mean + y_std * b2, x_mean + x_std * b3, x_std * b4])


def apply_logistic(params: ArrayLike, pred: ArrayLike) -> Array:
    """Map `pred` (N,) to MOS units (N,) with the parameters that `fit_logistic` returns."""
    b1, b2, b3, b4 = np.asarray(params, dtype=np.float64)
    x = np.asarray(pred, dtype=np.float64)
    width = max(abs(b4), np.finfo(np.float64).tiny)  # a width of 0 is the step function, not 0 / 0
    with np.errstate(all="ignore"):
        return b2 + (b1 - b2) * special.expit((x - b3) / width)


def plcc_fit(pred: ArrayLike, mos: ArrayLike) -> float:
    """PLCC after the fitted logistic, in [0, 1]; never below |PLCC| but for rounding."""
    return plcc(apply_logistic(fit_logistic(pred, mos), pred), mos)


def rmse(pred: ArrayLike, mos: ArrayLike) -> float:
    """Root mean squared error in MOS units *after* the fitted logistic; offset and scale of `pred` are free.

    Raises ValueError for no pairs: an error of 0.0 there would read as perfect.
    """
    return _rms(apply_logistic(fit_logistic(pred, mos), pred), mos)


def agreement(pred: ArrayLike, mos: ArrayLike) -> dict[str, float]:
    """All five measures: srocc, plcc, plcc_fit, krocc, and rmse in MOS units. The logistic is fitted once."""
    fitted = apply_logistic(fit_logistic(pred, mos), pred)
    return {
        "srocc": srocc(pred, mos),
        "plcc": plcc(pred, mos),
        "plcc_fit": plcc(fitted, mos),
        "krocc": krocc(pred, mos),
        "rmse": _rms(fitted, mos),
    }


def main_score(results: Mapping[str, float]) -> float:
    """NTIRE's main score (SROCC + raw PLCC) / 2, averaged over the tasks in `results`.

    A task T is any key `srocc_T` whose T has no underscore (`srocc_q`, `srocc_c`), and needs its `plcc_T`;
    all other keys are ignored.
    """
    tasks = [key[len("srocc_") :] for key in results if key.startswith("srocc_")]
    tasks = [task for task in tasks if task and "_" not in task]
    if not tasks:
        raise ValueError(f"main_score needs a srocc_<task> key such as srocc_q, got {sorted(results)}")
    for task in tasks:
        if f"plcc_{task}" not in results:
            raise ValueError(f"main_score has srocc_{task} but no plcc_{task}")
    return float(np.mean([(results[f"srocc_{task}"] + results[f"plcc_{task}"]) / 2 for task in tasks]))


def group_mean_predictor(
    train_groups: Sequence[Hashable], train_mos: ArrayLike, test_groups: Sequence[Hashable]
) -> Array:
    """Predict without looking at a pixel: each test item gets the mean MOS of its group in train.

    A group is whatever is known beforehand, such as the generator. Groups unseen in train get the overall
    train mean. Takes (N,), (N,) and (M,), returns (M,) in the units of `train_mos`. No training items, or
    unequal lengths, are a ValueError.
    """
    mos = _vector(train_mos, "train_mos")
    if mos.size == 0 or len(train_groups) != mos.size:
        raise ValueError(f"need one group for each of 1 or more MOS, got {len(train_groups)} and {mos.size}")
    members: dict[Hashable, list[float]] = {}
    for group, score in zip(train_groups, mos, strict=True):
        members.setdefault(group, []).append(float(score))
    means = {group: float(np.mean(scores)) for group, scores in members.items()}
    overall = float(mos.mean())
    return np.array([means.get(group, overall) for group in test_groups], dtype=np.float64)


def calibration_line(pred: ArrayLike, mos: ArrayLike) -> dict[str, float]:
    """How far the raw predictions are off the MOS scale, which correlations and `rmse` leave out.

    "slope" is that of the least-squares line of `mos` on `pred`, in units of MOS per unit of `pred`: 1 is
    perfect, below 1 says that `pred` is spread too widely for how well it predicts, above 1 too narrowly.
    "bias" is mean(pred - mos) in MOS units: 0 is perfect, above 0 says that `pred` is too high.

    Finite input gets a finite answer: the slope is 0.0 for constant `pred`, whose best line is flat, and where
    it exceeds the range of a float. No pairs are a ValueError: a bias of 0.0 there would read as perfect.
    """
    x, y = _pair(pred, mos)
    if x.size == 0:
        raise ValueError("the calibration line needs at least one pair of pred and mos, got none")
    (unit_x, x_size), (unit_y, y_size) = _to_unit_extent(x), _to_unit_extent(y)
    with np.errstate(all="ignore"):
        slope = float(unit_x @ unit_y / (unit_x @ unit_x) * np.divide(y_size, x_size))  # 0 / 0 for constant pred
        bias = np.sum(x / x.size) - np.sum(y / x.size)  # divided first: the sum of large values overflows
    return {"slope": slope if np.isfinite(slope) else 0.0, "bias": float(np.nan_to_num(bias))}


def within_group_accuracy(pred: ArrayLike, mos: ArrayLike, groups: Sequence[Hashable]) -> tuple[float | None, int]:
    """Share in [0, 1] of the pairs inside a group that `pred` orders as `mos` does, and the number of pairs.

    With the prompt as group, (N,) labels, this asks which of several images of one prompt is better, which no
    difference between prompts can answer. Only pairs of different MOS count, all pairs weigh the same, and
    equal `pred` scores one half, so that constant predictions and guessing both get 0.5.

    Where no group has two different MOS the answer is (None, 0): 0.0 would read as all wrong. One label per
    row is needed, and none may be NaN: else ValueError.
    """
    x, y = _pair(pred, mos)
    codes = _codes(groups, x.size, "groups")
    half_points = pairs = 0
    for rows in np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]):
        for i, row in enumerate(rows[:-1]):
            others = rows[i + 1 :]
            others = others[y[others] != y[row]]
            tied = x[others] == x[row]
            agree = (x[others] > x[row]) == (y[others] > y[row])
            half_points += 2 * int(np.sum(agree & ~tied)) + int(tied.sum())
            pairs += others.size
    return (half_points / (2 * pairs) if pairs else None), pairs


def cluster_bootstrap(
    pred: ArrayLike,
    mos: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    num_samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals (low, high) of "srocc" and "plcc" under resampling of whole clusters.

    `clusters`, (N,) labels, says which rows belong together, such as the images of one prompt: their errors
    are alike, and resampling single rows would take them for independent and give intervals that are too
    narrow. Each of `num_samples` resamples draws as many clusters as there are, with replacement, and takes
    all rows of each. `level` is the nominal coverage; with fewer than some 20 clusters the true one is lower.

    The answer is a function of the input and `seed`. Names of clusters do not matter, the order in which they
    first appear does, as another seed would. A resample in which either side is constant counts as 0.0.
    Fewer than two clusters have no spread to show, and the answer is the empty dict, which holds no NaN and
    merges into any results. Unequal lengths, a NaN label, `num_samples` below 1 and a `level` outside (0, 1)
    are a ValueError.

    Source: Efron and Tibshirani, An introduction to the bootstrap, 1993, chapter 13 (percentile intervals);
    Field and Welsh, Bootstrapping clustered data, J. R. Statist. Soc. B 69, 2007 (clusters).
    """
    x, y = _pair(pred, mos)
    found = _bootstrap([x], y, clusters, num_samples, seed, level)
    return {name: _interval(values[0], level) for name, values in found.items()}


def paired_bootstrap(
    pred_a: ArrayLike,
    pred_b: ArrayLike,
    mos: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    num_samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float, float]]:
    """How much better `pred_b` is than `pred_a`: (b - a, low, high) of "srocc" and "plcc", each in [-2, 2].

    The first number is the difference on the rows as given, the others its percentile interval. Both are
    measured on the same resamples of clusters, so that what makes a resample easy or hard for either cancels:
    an interval without 0 tells two models apart even where their own intervals overlap. All inputs are (N,);
    resampling, conventions, the empty answer, errors and sources are those of `cluster_bootstrap`.
    """
    (a, y), (b, _) = _pair(pred_a, mos), _pair(pred_b, mos)
    found = _bootstrap([a, b], y, clusters, num_samples, seed, level)
    measures = {"srocc": srocc, "plcc": plcc}
    return {
        name: (measures[name](b, y) - measures[name](a, y), *_interval(of_b - of_a, level))
        for name, (of_a, of_b) in found.items()
    }


def mean_interval(values: ArrayLike, clusters: Sequence[Hashable], *, seed: int = 0) -> list[float]:
    """The 95 % percentile interval [low, high] of the mean of `values`, (N,), under resampling of whole clusters.

    `clusters`, (N,) labels, says which values belong together, such as those of the questions about one image. Of
    paired differences, this is the interval of the difference of two means. Of one cluster: []. For sources see
    `cluster_bootstrap`.
    """
    x = _vector(values, "values")
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(place)
    if len(counts) < 2:
        return []
    sums = np.bincount(place, weights=x)
    draw, means = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES // _AT_ONCE):
        drawn = draw.integers(len(counts), size=(_AT_ONCE, len(counts)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return [float(end) for end in np.quantile(np.concatenate(means), (0.025, 0.975))]


def resampled_interval(values: ArrayLike, share: float, *, level: float = 0.95) -> list[float] | None:
    """Interval [low, high] of the mean of `values`, (R,), one from each of R random splits; None for a single one.

    Training folds of different splits overlap, so their results are not independent and the usual t interval is too
    narrow. The variance of the mean is therefore taken as sd^2 (1 / R + share), `share` being the number of test
    items divided by that of training items, with R - 1 degrees of freedom.

    Source: Nadeau and Bengio, Inference for the generalization error, Machine Learning 52, 2003, section 5 (corrected
    resampled t test); Bouckaert and Frank, PAKDD 2004, for repeated k-fold cross-validation.
    """
    x = _vector(values, "values")
    if not share >= 0 or not 0 < level < 1:
        raise ValueError(f"need share of 0 or more and 0 < level < 1, got {share} and {level}")
    if x.size < 2:
        return None
    half = stats.t.ppf((1 + level) / 2, x.size - 1) * x.std(ddof=1) * np.sqrt(1 / x.size + share)
    return [float(x.mean() - half), float(x.mean() + half)]


def _vector(values: ArrayLike, name: str) -> Array:
    """`values` as a finite float64 vector, or ValueError."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} has {int((~np.isfinite(vector)).sum())} non-finite values of {vector.size}")
    return vector


def _pair(pred: ArrayLike, mos: ArrayLike) -> tuple[Array, Array]:
    """Both sides as finite float64 vectors of one length, or ValueError."""
    x, y = _vector(pred, "pred"), _vector(mos, "mos")
    if x.size != y.size:
        raise ValueError(f"pred and mos must have one length, got {x.size} and {y.size}")
    return x, y


def _is_constant(x: Array) -> bool:
    return bool(x.min() == x.max())


def _correlation(measure: Callable[..., Any], x: Array, y: Array) -> float:
    """`measure(x, y)[0]`, or 0.0 where it is undefined."""
    if x.size < 2 or _is_constant(x) or _is_constant(y):
        return 0.0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # SciPy warns of nearly constant input, which is what a collapsed model yields.
        warnings.simplefilter("ignore")
        value = float(measure(x, y)[0])
    return value if np.isfinite(value) else 0.0


def _rms(fitted: ArrayLike, mos: ArrayLike) -> float:
    error = np.asarray(fitted, dtype=np.float64) - np.asarray(mos, dtype=np.float64)
    if error.size == 0:
        raise ValueError("RMSE needs at least one pair of pred and mos, got none")
    return float(np.sqrt(np.mean(error**2)))


def _fit_standardised(x: Array, y: Array) -> Array:
    """The better of a straight line and the fitted logistic, for x and y of mean 0 and std 1."""

    def squared_error(params: Array) -> float:
        return float(np.sum((apply_logistic(params, x) - y) ** 2))

    slope = float(np.mean(x * y))
    width = _LINE_WIDTH * float(np.abs(x).max())
    # expit(u) = 1/2 + u/4 - ..., so limits of +-2 * slope * width give that slope in the middle.
    candidates = [np.array([2 * slope * width, -2 * slope * width, 0.0, width])]
    if x.size > 4:
        limits = (y.max(), y.min()) if slope >= 0 else (y.min(), y.max())
        candidates.append(_least_squares(x, y, np.array([*limits, 0.0, 0.0])))
    return min(candidates, key=squared_error)  # the line comes first: it wins ties, and over NaN


def _least_squares(x: Array, y: Array, start: Array) -> Array:
    """Levenberg-Marquardt from `start` = (b1, b2, b3, ln b4), whose logarithm keeps the width positive."""

    def width_of(theta: Array) -> float:
        return float(np.exp(np.clip(theta[3], -_MAX_LOG_WIDTH, _MAX_LOG_WIDTH)))

    def residuals(theta: Array) -> Array:
        return theta[1] + (theta[0] - theta[1]) * special.expit((x - theta[2]) / width_of(theta)) - y

    def jacobian(theta: Array) -> Array:
        u = (x - theta[2]) / width_of(theta)
        rise = special.expit(u)
        slope = (theta[0] - theta[1]) * rise * special.expit(-u)
        return np.stack([rise, 1 - rise, -slope / width_of(theta), -slope * u], axis=1)

    theta = optimize.least_squares(residuals, start, jac=jacobian, method="lm", max_nfev=100).x
    return np.array([*theta[:3], width_of(theta)])


def _codes(labels: Sequence[Hashable], size: int, name: str) -> NDArray[np.intp]:
    """`labels` (N,) numbered 0, 1, ... in the order of first appearance, or ValueError."""
    if len(labels) != size:
        raise ValueError(f"{name} must have one label per row, got {len(labels)} for {size}")
    numbers: dict[Hashable, int] = {}
    codes = [numbers.setdefault(label, len(numbers)) for label in labels]
    if any(label != label for label in numbers):  # NaN, which would not even be one group
        raise ValueError(f"{name} has NaN among its labels")
    return np.array(codes, dtype=np.intp)


def _to_unit_extent(x: Array) -> tuple[Array, float]:
    """`x` of one or more values, moved to mean 0 and scaled to a largest magnitude of 1, and that scale.

    Constant `x` gives exact zeros. The squares of the result neither overflow nor vanish, whatever the units of `x`.
    """
    size = float(np.abs(x).max()) or 1.0
    centred = x / size
    centred = centred - centred.mean()
    extent = float(np.abs(centred).max()) or 1.0
    return centred / extent, size * extent


def _interval(values: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _bootstrap(
    preds: Sequence[Array], y: Array, clusters: Sequence[Hashable], num_samples: int, seed: int, level: float
) -> dict[str, Array]:
    """SROCC and PLCC of each of P `preds` on the same resamples, (P, num_samples); {} for under two clusters.

    A resample is kept as how often each row is in it, never as the rows themselves: resamples of any size then
    fit one matrix, and the data are sorted once instead of once per resample.
    """
    if num_samples < 1 or not 0 < level < 1:
        raise ValueError(f"need num_samples of 1 or more and 0 < level < 1, got {num_samples} and {level}")
    codes = _codes(clusters, y.size, "clusters")
    k = int(codes.max()) + 1 if codes.size else 0
    if k < 2:
        return {}
    rng = np.random.default_rng(seed)
    columns = [*preds, y]
    extents = [_to_unit_extent(column)[0] for column in columns]
    found = {name: np.zeros((len(preds), num_samples)) for name in ("srocc", "plcc")}
    step = max(1, _BLOCK // y.size)
    for start in range(0, num_samples, step):
        rows = min(step, num_samples - start)
        drawn = rng.integers(k, size=(rows, k)) + k * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * k).reshape(rows, k)[:, codes].astype(np.float64)
        ranks, varied = zip(*(_weighted_ranks(column, weights) for column in columns), strict=True)
        for i in range(len(preds)):
            defined = varied[i] & varied[-1]
            for name, sides in ("srocc", ranks), ("plcc", extents):
                values = _weighted_correlation(sides[i], sides[-1], weights)
                found[name][i, start : start + rows] = np.where(defined & np.isfinite(values), values, 0.0)
    return found


def _weighted_ranks(x: Array, weights: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Average ranks of `x` (N,) with each value repeated `weights` (S, N) times, (S, N), and whether they vary, (S,).

    The rank of a value that is not there (weight 0) means nothing.
    """
    _, place, times = np.unique(x, return_inverse=True, return_counts=True)
    order, first = np.argsort(place, kind="stable"), np.cumsum(times) - times
    together = np.add.reduceat(weights[:, order], first, axis=1)  # how often each distinct value is there
    average = np.cumsum(together, axis=1) - (together - 1) / 2
    return average[:, place], np.count_nonzero(together, axis=1) > 1


def _weighted_correlation(x: Array, y: Array, weights: Array) -> Array:
    """Pearson's correlation (S,) of x and y, (N,) or (S, N), each pair repeated `weights` (S, N) times."""
    size = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / size
    y = y - (weights * y).sum(axis=1, keepdims=True) / size
    weighted = weights * x
    with np.errstate(all="ignore"):
        spread = np.sqrt((weighted * x).sum(axis=1)) * np.sqrt((weights * y * y).sum(axis=1))
        return np.clip((weighted * y).sum(axis=1) / spread, -1, 1)
