"""`evaluation/ridge.py` against scikit-learn's ridge and kernel ridge regression, fold by fold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_examples import left_out, sigmoid, unit_rows
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel

from evaluation import ridge
from evaluation.ridge import KERNEL_PENALTIES, NUM_FOLDS, PENALTIES, fit_kernel, fit_ridge


def plain_ridge(features: np.ndarray, target: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Ridge with a free intercept: solve the centred normal equations."""
    centred = features - features.mean(axis=0)
    gram = centred.T @ centred + penalty * np.eye(features.shape[1])
    weight = np.linalg.solve(gram, centred.T @ (target - target.mean()))
    return weight, float(target.mean() - features.mean(axis=0) @ weight)


@pytest.fixture(scope="module")
def noisy() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, labels with signal and noise, and groups of three."""
    rng = np.random.default_rng(3)
    images = unit_rows(rng, 120, 6)
    logit = images @ rng.normal(size=6) * 2 + 0.3 + rng.normal(size=120) * 0.5
    return images, sigmoid(logit), np.arange(120) // 3


@pytest.mark.parametrize(("num_rows", "width"), [(90, 7), (40, 60), (30, 29), (30, 30)])
def test_errors_of_left_out_folds_are_those_of_fitting_to_the_others(num_rows, width):
    rng = np.random.default_rng(width)
    features = unit_rows(rng, num_rows, width) + rng.normal(size=width)
    target = 3 + features @ rng.normal(size=width) + rng.normal(size=num_rows) * 0.3
    fold_of = rng.permutation(np.arange(num_rows) % 9 % 7)  # of two sizes
    found = list(ridge.left_out_errors(features - features.mean(axis=0), target, fold_of))
    expected = [left_out(Ridge(alpha=penalty), features, target, fold_of) for penalty in PENALTIES]
    np.testing.assert_allclose(found, expected, rtol=5e-3)
    np.testing.assert_allclose(found[8:], expected[8:], rtol=1e-4)  # float32 tells for the smallest penalties only
    assert max(expected) > 1.2 * min(expected)


def test_columns_that_say_the_same_change_no_error_of_left_out_folds():
    rng = np.random.default_rng(0)
    features, target, fold_of = unit_rows(rng, 50, 4), rng.normal(size=50), np.arange(50) % 10
    once = list(ridge.left_out_errors(features - features.mean(axis=0), target, fold_of))
    twice = np.hstack([features, features, np.zeros((50, 3))])
    again = list(ridge.left_out_errors((twice - twice.mean(axis=0)) / np.sqrt(2), target, fold_of))
    np.testing.assert_allclose(again, once, rtol=1e-3)


@given(st.lists(st.integers(0, 120), min_size=1, max_size=200))
def test_no_fold_shares_a_group_with_another(groups):
    fold_of = ridge.folds_of(np.array(groups))
    pairs = set(zip(groups, fold_of.tolist(), strict=True))
    assert len(pairs) == len(set(groups))
    assert set(fold_of) == set(range(min(NUM_FOLDS, len(set(groups)))))
    per_fold = np.bincount([fold for _, fold in pairs])
    assert per_fold.max() - per_fold.min() <= 1


@pytest.mark.parametrize("width", [6, 200], ids=["more rows", "more features"])
def test_the_chosen_solution_is_plain_ridge_with_the_penalty_of_the_least_error(noisy, width, monkeypatch):
    monkeypatch.setattr(ridge, "NUM_FOLDS", 6)
    images, target, groups = noisy
    features = np.hstack([images, np.random.default_rng(0).normal(size=(120, width - 6)) / 20])
    fitted = fit_ridge(features, target, groups)
    errors = [left_out(Ridge(alpha=penalty), features, target, ridge.folds_of(groups)) for penalty in PENALTIES]
    assert fitted.penalty == PENALTIES[np.argmin(errors)]
    assert PENALTIES[0] < fitted.penalty < PENALTIES[-1]  # the case is one in which the choice matters
    assert fitted.error == pytest.approx(min(errors), rel=1e-4)
    weights, bias = plain_ridge(features, target, fitted.penalty)
    np.testing.assert_allclose(fitted.weights, weights, rtol=1e-6, atol=1e-9)
    assert fitted.bias == pytest.approx(bias)
    np.testing.assert_allclose(fitted(features[:9]), features[:9] @ weights + bias)


def test_blocks_are_weighed_alike_whatever_their_units(noisy):
    images, target, groups = noisy
    others = np.random.default_rng(1).normal(size=(120, 9)) + 2
    sizes = [np.sqrt(np.square(block - block.mean(axis=0)).sum(axis=1).mean()) for block in (images, others)]
    fitted = fit_ridge(np.hstack([images, others]), target, groups, [6, 9])
    scaled = np.hstack([images / sizes[0], others / sizes[1]])
    plain = fit_ridge(scaled, target, groups)
    assert (fitted.penalty, fitted.error) == (plain.penalty, pytest.approx(plain.error))
    found = fitted(np.hstack([images, others]))
    np.testing.assert_allclose(found, plain(scaled), rtol=1e-6)
    again = fit_ridge(np.hstack([1000 * images - 3, others]), target, groups, [6, 9])
    np.testing.assert_allclose(again(np.hstack([1000 * images - 3, others])), found, rtol=1e-6)


def test_a_constant_block_says_nothing(noisy):
    images, target, groups = noisy
    alone = fit_ridge(images, target, groups, [6])
    beside = fit_ridge(np.hstack([images, np.full((120, 2), 0.25)]), target, groups, [6, 2])
    np.testing.assert_allclose(beside.weights, [*alone.weights, 0, 0], atol=1e-9)
    assert beside.bias == pytest.approx(alone.bias)


@pytest.mark.parametrize("most", [1, 10, 47, 60, 61])
def test_of_many_images_whole_groups_are_fitted_to(monkeypatch, most):
    monkeypatch.setattr(ridge, "MAX_IMAGES", most)
    groups = np.repeat(np.arange(20), np.arange(20) % 4 + 1)[np.random.default_rng(0).permutation(50)] + 7
    rows = ridge.sample_of(groups)
    taken = set(groups[rows])
    assert rows.tolist() == [row for row, group in enumerate(groups) if group in taken]
    if most >= 50:
        assert len(rows) == 50
    else:
        assert 0 < len(rows) <= max(most, 4) and len(rows) > most - 4
    rng = np.random.default_rng(1)
    features, target = unit_rows(rng, 50, 3), rng.uniform(size=50)
    fitted = fit_ridge(features, target, groups)
    target[np.setdiff1d(np.arange(50), rows)] = np.nan  # never looked at
    again = fit_ridge(features, target, groups)
    np.testing.assert_array_equal(again.weights, fitted.weights)
    assert (again.bias, again.penalty) == (fitted.bias, fitted.penalty)


# ------------------------------------------------------------------------------------------------ kernels


@pytest.fixture(scope="module")
def curved() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, a free feature, labels that bend with the first and rise with the second, and groups of three."""
    rng = np.random.default_rng(5)
    features, free = rng.normal(size=(120, 4)), rng.uniform(size=(120, 1))
    target = np.sin(2 * features[:, 0]) * features[:, 1] + 3 * free[:, 0] + rng.normal(size=120) * 0.1
    return features, free, target, np.arange(120) // 3


def test_the_kernel_is_gaussian_and_as_narrow_as_the_images_lie_apart(curved):
    features, *_ = curved
    kernel = ridge.build_kernel(features)
    apart = ((features[:, None] - features[None]) ** 2).sum(axis=-1)
    assert kernel.gamma == pytest.approx(ridge.NARROWNESS / np.median(apart))
    np.testing.assert_allclose(kernel(features[:7]), rbf_kernel(features[:7], features, gamma=kernel.gamma), atol=1e-12)
    wide = ridge.build_kernel(1000 * features + 5)
    np.testing.assert_allclose(wide(1000 * features + 5), kernel(features), atol=1e-6)  # no unit matters
    assert ridge.build_kernel(np.ones((3, 2))).gamma == 1.0


def naive_kernel_fit(alike, free, target, penalty):
    """Solve for weights, slopes and bias at once: [K + penalty I, X; X', 0] [w; line] = [y; 0]."""
    design = np.hstack([np.ones((len(target), 1)), free])
    corner = np.zeros((design.shape[1], design.shape[1]))
    system = np.block([[alike + penalty * np.eye(len(target)), design], [design.T, corner]])
    found = np.linalg.solve(system, np.concatenate([target, np.zeros(design.shape[1])]))
    return found[: len(target)], found[len(target) + 1 :], found[len(target)]


@pytest.mark.parametrize("num_free", [0, 1])
def test_a_kernel_fit_is_the_solution_with_the_penalty_of_the_least_error(curved, num_free, monkeypatch):
    monkeypatch.setattr(ridge, "NUM_FOLDS", 5)
    features, free, target, groups = curved
    free = free[:, :num_free]
    alike = ridge.build_kernel(features)(features)
    fitted = fit_kernel(alike, free, target, groups)
    weights, slopes, bias = naive_kernel_fit(alike, free, target, fitted.penalty)
    np.testing.assert_allclose(fitted.weights, weights, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(fitted.slopes, slopes, rtol=1e-6)
    assert fitted.bias == pytest.approx(bias)
    fold_of, errors = ridge.folds_of(groups), []
    for penalty in KERNEL_PENALTIES:
        left = np.empty(120)
        for fold in range(5):
            held = fold_of == fold
            parts = naive_kernel_fit(alike[np.ix_(~held, ~held)], free[~held], target[~held], penalty)
            left[held] = alike[np.ix_(held, ~held)] @ parts[0] + free[held] @ parts[1] + parts[2] - target[held]
        errors.append(np.square(left).mean())
    assert fitted.penalty == KERNEL_PENALTIES[np.argmin(errors)] and KERNEL_PENALTIES[0] < fitted.penalty
    assert fitted.error == pytest.approx(min(errors), rel=1e-3)
    np.testing.assert_allclose(fitted(alike[:5], free[:5]), alike[:5] @ weights + free[:5] @ slopes + bias)


def test_a_kernel_fit_knows_what_bends_and_is_that_of_scikit_learn(curved):
    features, free, target, groups = curved
    target = target - 3 * free[:, 0]
    kernel = ridge.build_kernel(features)
    fitted = fit_kernel(kernel(features), free[:, :0], target, groups)
    assert fitted.error < 0.6 * fit_ridge(features, target, groups).error
    model = KernelRidge(kernel="rbf", gamma=kernel.gamma, alpha=fitted.penalty).fit(features, target - fitted.bias)
    np.testing.assert_allclose(fitted.weights, model.dual_coef_, rtol=1e-6, atol=1e-8)


def test_where_a_kernel_tells_nothing_the_line_is_left():
    rng = np.random.default_rng(0)
    features, free = rng.normal(size=(200, 4)), rng.uniform(size=(200, 1))
    target = 2 * free[:, 0] - 1 + rng.normal(size=200) * 0.01
    alike = ridge.build_kernel(features)(features)
    fitted = fit_kernel(alike, free, target, np.arange(200))
    assert np.ptp(alike @ fitted.weights) < 0.02
    assert (*fitted.slopes, fitted.bias) == pytest.approx((2, -1), abs=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 1), (2, 1), (2, 2), (3, 2), (30, 1)])
def test_a_kernel_fit_works_with_few_rows_groups_and_features_that_do_not_vary(num_rows, num_groups):
    rng = np.random.default_rng(0)
    features, target = rng.normal(size=(num_rows, 3)), rng.uniform(size=num_rows)
    alike = ridge.build_kernel(features)(features)
    fitted = fit_kernel(alike, np.full((num_rows, 1), 0.6), target, np.arange(num_rows) % num_groups)
    assert np.isfinite(fitted.weights).all() and np.isfinite(fitted.bias) and fitted.slopes.tolist() == [0]
    assert np.isnan(fitted.error) == (num_groups == 1)
