"""`metrics.py` against SciPy, closed forms and invariants."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import metrics

CORRELATIONS = [metrics.srocc, metrics.plcc, metrics.krocc, metrics.plcc_fit]
PAIR_MEASURES = [*CORRELATIONS, metrics.rmse, metrics.agreement, metrics.fit_logistic]

# Scores with one decimal: coarse enough for ties, far enough apart for strictly monotone maps to keep order.
score = st.integers(0, 50).map(lambda tenths: tenths / 10)
pairs = st.lists(st.tuples(score, score), min_size=2, max_size=25).map(lambda rows: np.array(rows).T)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw(seed: int, n: int = 60, decimals: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Correlated predictions and scores; few decimals make ties."""
    rng = np.random.default_rng(seed)
    mos = rng.uniform(0, 5, n)
    return np.round(mos + rng.normal(0, 1, n), decimals), np.round(mos, decimals)


@pytest.mark.parametrize("decimals", [0, 8])
@pytest.mark.parametrize(
    ("measure", "oracle"),
    [(metrics.srocc, stats.spearmanr), (metrics.plcc, stats.pearsonr), (metrics.krocc, stats.kendalltau)],
)
def test_correlations_match_scipy_with_and_without_ties(measure, oracle, decimals):
    pred, mos = draw(0, decimals=decimals)
    assert measure(pred, mos) == pytest.approx(oracle(pred, mos)[0], abs=1e-12)
    assert type(measure(pred, mos)) is float


def test_srocc_is_plcc_of_average_ranks():
    pred, mos = draw(1, decimals=0)
    expected = np.corrcoef(stats.rankdata(pred), stats.rankdata(mos))[0, 1]
    assert metrics.srocc(pred, mos) == pytest.approx(expected, abs=1e-12)


def test_krocc_is_tau_b_of_a_naive_loop():
    pred, mos = draw(2, n=30, decimals=0)
    signs = [
        (np.sign(pred[i] - pred[j]), np.sign(mos[i] - mos[j])) for i, j in itertools.combinations(range(len(pred)), 2)
    ]
    concordance = sum(a * b for a, b in signs)
    untied = sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)
    assert metrics.krocc(pred, mos) == pytest.approx(concordance / np.sqrt(untied), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_rank_correlations_ignore_strictly_monotone_maps(rows):
    pred, mos = rows
    for measure in (metrics.srocc, metrics.krocc):
        assert measure(np.exp(pred) + pred**3, mos) == pytest.approx(measure(pred, mos), abs=1e-12)
        assert measure(-pred, mos) == pytest.approx(-measure(pred, mos), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(pairs, st.floats(0.1, 10), st.floats(-10, 10))
def test_affine_maps_of_pred_change_neither_plcc_nor_rmse(rows, scale, shift):
    pred, mos = rows
    assert metrics.plcc(scale * pred + shift, mos) == pytest.approx(metrics.plcc(pred, mos), abs=1e-9)
    line = metrics.rmse(pred[:4], mos[:4])
    assert metrics.rmse(scale * pred[:4] + shift, mos[:4]) == pytest.approx(line, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_the_fit_is_never_worse_than_the_straight_line(rows):
    """Ties, outliers, anticorrelated and tiny samples included."""
    pred, mos = rows
    measured = metrics.agreement(pred, mos)
    assert np.isfinite(list(measured.values())).all()
    assert measured["plcc_fit"] >= abs(measured["plcc"]) - 1e-6
    line_rmse = mos.std() * np.sqrt(max(0.0, 1 - measured["plcc"] ** 2))
    assert measured["rmse"] <= line_rmse + 1e-5


@settings(max_examples=25, deadline=None)
@given(pairs)
def test_the_fitted_map_is_monotone(rows):
    pred, mos = rows
    steps = np.diff(metrics.apply_logistic(metrics.fit_logistic(pred, mos), np.linspace(-5, 10, 50)))
    assert (steps >= -1e-9).all() or (steps <= 1e-9).all()


@pytest.mark.parametrize("truth", [(4.5, 0.5, 0.6, 0.1), (80.0, 20.0, -3.0, 2.0), (1.0, 5.0, 0.5, 0.2)])
def test_a_planted_logistic_is_recovered(truth):
    b1, b2, b3, b4 = truth
    pred = np.linspace(b3 - 5 * b4, b3 + 4 * b4, 200)
    mos = b2 + (b1 - b2) / (1 + np.exp(-(pred - b3) / abs(b4)))
    np.testing.assert_allclose(metrics.apply_logistic(truth, pred), mos, rtol=1e-12)
    found = metrics.fit_logistic(pred, mos)
    np.testing.assert_allclose(found, truth, rtol=1e-5)
    assert metrics.rmse(pred, mos) == pytest.approx(0, abs=1e-6)
    assert metrics.plcc_fit(pred, mos) == pytest.approx(1, abs=1e-9)
    assert abs(metrics.plcc(pred, mos)) < 0.99


def test_the_sign_of_the_width_does_not_matter_and_a_width_of_0_is_a_step():
    pred = np.array([-1e300, -1.0, 0.0, 1.0, 1e300])
    np.testing.assert_array_equal(
        metrics.apply_logistic([4, 1, 0, 0.5], pred), metrics.apply_logistic([4, 1, 0, -0.5], pred)
    )
    np.testing.assert_allclose(metrics.apply_logistic([4, 1, 0, 0], pred), [1, 1, 2.5, 4, 4])


def test_noisy_fit_reaches_the_planted_noise():
    rng = np.random.default_rng(3)
    pred = rng.uniform(-1, 1, 2000)
    mos = metrics.apply_logistic([5, 1, 0.2, 0.1], pred) + rng.normal(0, 0.3, 2000)
    assert metrics.rmse(pred, mos) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("limits", [(4.0, 2.0), (2.0, 4.0)])
def test_noisy_fits_are_as_good_as_a_search_over_a_grid(limits):
    """For a given middle and width the map is linear in its limits, so the grid needs only two dimensions."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pred = rng.normal(size=60)
        mos = metrics.apply_logistic([*limits, 0.8, 0.1], pred) + rng.normal(0, 0.5, 60)
        grid = itertools.product(np.linspace(-2, 2, 41), np.geomspace(0.02, 20, 20))
        best = max(abs(np.corrcoef(1 / (1 + np.exp((b3 - pred) / b4)), mos)[0, 1]) for b3, b4 in grid)
        assert metrics.plcc_fit(pred, mos) >= best - 0.005


def test_a_step_is_fitted_although_its_best_width_is_0():
    pred = np.arange(50.0)
    mos = np.where(pred > 20, 4.0, 1.0)
    assert metrics.rmse(pred, mos) < 1e-6


def test_a_straight_line_stays_one():
    pred = np.linspace(0, 1, 30)
    assert metrics.rmse(pred, 70 - 50 * pred) < 1e-4
    assert metrics.plcc_fit(pred, 70 - 50 * pred) == pytest.approx(1)
    assert metrics.plcc(pred, 70 - 50 * pred) == pytest.approx(-1)


def test_four_pairs_get_the_line_and_not_a_curve_through_all_of_them():
    pred, mos = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.0, 4.0, 4.0])
    line = np.polyval(np.polyfit(pred, mos, 1), pred)
    fitted = metrics.apply_logistic(metrics.fit_logistic(pred, mos), pred)
    np.testing.assert_allclose(fitted, line, atol=1e-5)
    assert metrics.rmse(pred, mos) == pytest.approx(np.sqrt(np.mean((line - mos) ** 2)), abs=1e-5)


def test_constant_pred_predicts_the_mean():
    mos = np.array([1.0, 2.0, 4.0, 6.0, 8.0, 9.0])
    pred = np.full(6, 0.1)
    assert pred.std() > 0  # rounding, which must not pass for a spread
    params = metrics.fit_logistic(pred, mos)
    np.testing.assert_array_equal(metrics.apply_logistic(params, [-99.0, 0.1, 99.0]), [5, 5, 5])
    assert metrics.rmse(pred, mos) == pytest.approx(mos.std())


@pytest.mark.parametrize("measure", CORRELATIONS)
def test_what_orders_nothing_correlates_0(measure):
    rising = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert measure(rising, rising) == pytest.approx(1)
    for pred, mos in ([0.1] * 6, rising), (rising, [0.1] * 6), ([1.0], [2.0]), ([], []):
        assert measure(pred, mos) == 0.0


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e200, 1e308])
def test_extreme_but_finite_input_gives_finite_answers(size):
    for n in (2, 5, 12):
        pred, mos = size * np.linspace(-1, 1, n), np.arange(n, dtype=float)
        assert np.isfinite(list(metrics.agreement(pred, mos).values())).all()


def test_nearly_constant_pred_is_finite_and_silent():
    pred = 1 + np.arange(6) * np.finfo(float).eps
    assert np.isfinite(list(metrics.agreement(pred, np.arange(6.0)).values())).all()


@pytest.mark.parametrize("measure", PAIR_MEASURES)
@pytest.mark.parametrize(
    ("pred", "mos", "message"),
    [
        ([1.0, np.nan, 2.0], [1.0, 2.0, 3.0], "pred has 1 non-finite"),
        ([1.0, 2.0, 3.0], [1.0, np.inf, -np.inf], "mos has 2 non-finite"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "one length, got 2 and 3"),
        ([[1.0], [2.0]], [1.0, 2.0], "one-dimensional"),
    ],
)
def test_faulty_input_is_refused(measure, pred, mos, message):
    with pytest.raises(ValueError, match=message):
        measure(pred, mos)


def test_rmse_of_nothing_is_refused_but_its_fit_is_not():
    assert np.isfinite(metrics.fit_logistic([], [])).all()
    for measure in (metrics.rmse, metrics.agreement):
        with pytest.raises(ValueError, match="at least one pair"):
            measure([], [])
    assert metrics.rmse([0.3], [4.0]) == 0.0


def test_agreement_gathers_the_single_measures(monkeypatch):
    pred, mos = draw(4)
    expected = {name: getattr(metrics, name)(pred, mos) for name in ("srocc", "plcc", "plcc_fit", "krocc", "rmse")}
    fits = []
    fit = metrics.fit_logistic
    monkeypatch.setattr(metrics, "fit_logistic", lambda *args: fits.append(1) or fit(*args))
    assert metrics.agreement(pred, mos) == expected
    assert len(fits) == 1


def test_main_score_averages_the_tasks_that_are_there():
    both = {
        "srocc_q": 0.9,
        "plcc_q": 0.7,
        "srocc_c": 0.5,
        "plcc_c": 0.3,
        "plcc_fit_q": 9.0,
        "srocc_q_low": 9.0,
    }
    assert metrics.main_score(both) == pytest.approx((0.8 + 0.4) / 2)
    assert metrics.main_score({"srocc_c": 0.5, "plcc_c": 0.3, "rmse_c": 9.0}) == pytest.approx(0.4)
    three = {**both, "srocc_a": 0.1, "plcc_a": 0.1}
    assert metrics.main_score(three) == pytest.approx((0.8 + 0.4 + 0.1) / 3)


def test_main_score_names_what_is_missing():
    with pytest.raises(ValueError, match="srocc_<task>"):
        metrics.main_score({"rmse_q": 1.0})
    with pytest.raises(ValueError, match="no plcc_q"):
        metrics.main_score({"srocc_q": 1.0, "plcc_fit_q": 1.0})


def test_group_means_and_the_overall_mean_for_unseen_groups():
    found = metrics.group_mean_predictor(["a", "a", "b"], [1.0, 2.0, 6.0], ["b", "new", "a", "b"])
    np.testing.assert_allclose(found, [6.0, 3.0, 1.5, 6.0])
    assert metrics.group_mean_predictor(["a"], [1.0], []).shape == (0,)


def test_group_means_refuse_faulty_input():
    for groups, mos in ([], []), (["a", "b"], [1.0]), (["a"], [np.nan]):
        with pytest.raises(ValueError, match=r"need one group|non-finite"):
            metrics.group_mean_predictor(groups, mos, ["a"])
