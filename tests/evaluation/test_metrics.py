"""`metrics.py` against SciPy, closed forms and invariants."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluation import metrics

CORRELATIONS = [metrics.srocc, metrics.plcc, metrics.krocc, metrics.plcc_fit]
PAIR_MEASURES = [*CORRELATIONS, metrics.rmse, metrics.agreement, metrics.fit_logistic, metrics.calibration_line]

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


@settings(max_examples=40)
@given(pairs)
def test_rank_correlations_ignore_strictly_monotone_maps(rows):
    pred, mos = rows
    for measure in (metrics.srocc, metrics.krocc):
        assert measure(np.exp(pred) + pred**3, mos) == pytest.approx(measure(pred, mos), abs=1e-12)
        assert measure(-pred, mos) == pytest.approx(-measure(pred, mos), abs=1e-12)


@settings(max_examples=40)
@given(pairs, st.floats(0.1, 10), st.floats(-10, 10))
def test_affine_maps_of_pred_change_neither_plcc_nor_rmse(rows, scale, shift):
    pred, mos = rows
    assert metrics.plcc(scale * pred + shift, mos) == pytest.approx(metrics.plcc(pred, mos), abs=1e-9)
    line = metrics.rmse(pred[:4], mos[:4])
    assert metrics.rmse(scale * pred[:4] + shift, mos[:4]) == pytest.approx(line, abs=1e-5)


@settings(max_examples=60)
@given(pairs)
def test_the_fit_is_never_worse_than_the_straight_line(rows):
    """Ties, outliers, anticorrelated and tiny samples included."""
    pred, mos = rows
    measured = metrics.agreement(pred, mos)
    assert np.isfinite(list(measured.values())).all()
    assert measured["plcc_fit"] >= abs(measured["plcc"]) - 1e-6
    line_rmse = mos.std() * np.sqrt(max(0.0, 1 - measured["plcc"] ** 2))
    assert measured["rmse"] <= line_rmse + 1e-5


@settings(max_examples=25)
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


def draw_clustered(seed: int, k: int = 40, per: int = 5, rho: float = 0.6) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Two standard normal columns that correlate `rho` in population; most of each is shared by its cluster."""
    rng = np.random.default_rng(seed)
    covariance = [[1, rho], [rho, 1]]
    shared = np.repeat(rng.multivariate_normal([0, 0], covariance, k), per, axis=0)
    pred, mos = (np.sqrt(0.6) * shared + np.sqrt(0.4) * rng.multivariate_normal([0, 0], covariance, k * per)).T
    return pred, mos, np.repeat(np.arange(k), per).tolist()


def naive_resamples(clusters: list, num_samples: int, seed: int) -> list[np.ndarray]:
    """The rows of each resample, written out."""
    members = [np.flatnonzero(np.array(clusters) == name) for name in dict.fromkeys(clusters)]
    rng = np.random.default_rng(seed)
    return [
        np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]) for _ in range(num_samples)
    ]


labels = st.sampled_from("abcd")
labelled = st.lists(st.tuples(score, score, labels), min_size=2, max_size=20).map(
    lambda rows: (np.array([row[:2] for row in rows]).T, [row[2] for row in rows])
)


@pytest.mark.parametrize("decimals", [0, 8])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_intervals_are_those_of_a_naive_loop_with_scipy(decimals, level):
    """Clusters of 1 to 5 rows in mixed order, so that resamples differ in size."""
    pred, mos = draw(5, n=24, decimals=decimals)
    clusters = np.random.default_rng(6).choice(list("abcdefghi"), 24, p=np.arange(1, 10) / 45).tolist()
    chosen = naive_resamples(clusters, 200, seed=7)
    found = metrics.cluster_bootstrap(pred, mos, clusters, num_samples=200, seed=7, level=level)
    assert found.keys() == {"srocc", "plcc"}
    for name, oracle in ("srocc", stats.spearmanr), ("plcc", stats.pearsonr):
        values = [oracle(pred[rows], mos[rows])[0] for rows in chosen]
        expected = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
        assert found[name] == pytest.approx(tuple(expected), abs=1e-9)


def test_paired_intervals_are_those_of_a_naive_loop_over_differences():
    pred_a, mos = draw(8, n=24, decimals=0)
    pred_b = mos + np.random.default_rng(9).normal(0, 0.3, 24)
    clusters = [i % 7 for i in range(24)]
    chosen = naive_resamples(clusters, 150, seed=3)
    found = metrics.paired_bootstrap(pred_a, pred_b, mos, clusters, num_samples=150, seed=3, level=0.9)
    assert found.keys() == {"srocc", "plcc"}
    for name, oracle in ("srocc", stats.spearmanr), ("plcc", stats.pearsonr):
        values = [oracle(pred_b[rows], mos[rows])[0] - oracle(pred_a[rows], mos[rows])[0] for rows in chosen]
        difference = oracle(pred_b, mos)[0] - oracle(pred_a, mos)[0]
        assert found[name] == pytest.approx((difference, *np.quantile(values, [0.05, 0.95])), abs=1e-9)


def test_the_size_of_the_blocks_does_not_change_the_resamples(monkeypatch):
    pred, mos, clusters = draw_clustered(0, k=7, per=3)
    whole = metrics.cluster_bootstrap(pred, mos, clusters, num_samples=50)
    for rows in 1, 7, 49:
        monkeypatch.setattr(metrics, "_BLOCK", rows * len(clusters))
        found = metrics.cluster_bootstrap(pred, mos, clusters, num_samples=50)
        assert found == {name: pytest.approx(limits, abs=1e-12) for name, limits in whole.items()}


def test_nominal_intervals_cover_the_population_unless_the_clusters_are_ignored():
    """For normal pairs of correlation rho the population SROCC is 6 / pi * asin(rho / 2)."""
    truth = {"plcc": 0.6, "srocc": 6 / np.pi * np.arcsin(0.3)}
    runs = 150
    covered: dict[tuple[str, bool], int] = dict.fromkeys(itertools.product(truth, [True, False]), 0)
    for seed in range(runs):
        pred, mos, clusters = draw_clustered(seed)
        for by_cluster, units in (True, clusters), (False, list(range(len(clusters)))):
            found = metrics.cluster_bootstrap(pred, mos, units, num_samples=100, seed=seed)
            for name, (low, high) in found.items():
                covered[name, by_cluster] += low <= truth[name] <= high
    for name in truth:
        assert 0.88 <= covered[name, True] / runs <= 0.99
        assert covered[name, False] / runs < 0.86


def test_nominal_intervals_of_a_difference_cover_it_unless_the_clusters_are_ignored():
    """Both models correlate with the scores as planted, and share a cluster's luck, of scores and of errors."""
    planted = np.array([0.5, 0.7])
    truth = {"plcc": 0.2, "srocc": np.diff(6 / np.pi * np.arcsin(planted / 2))[0]}
    runs, k, per = 120, 40, 5
    covered: dict[tuple[str, bool], int] = dict.fromkeys(itertools.product(truth, [True, False]), 0)
    clusters = np.repeat(np.arange(k), per).tolist()
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        shared = np.repeat(rng.normal(size=(3, k)), per, axis=1)
        mos, *errors = np.sqrt(0.6) * shared + np.sqrt(0.4) * rng.normal(size=(3, k * per))
        a, b = (rho * mos + np.sqrt(1 - rho**2) * error for rho, error in zip(planted, errors, strict=True))
        for by_cluster, units in (True, clusters), (False, list(range(k * per))):
            found = metrics.paired_bootstrap(a, b, mos, units, num_samples=100, seed=seed)
            for name, (_, low, high) in found.items():
                covered[name, by_cluster] += low <= truth[name] <= high
    for name in truth:
        assert 0.88 <= covered[name, True] / runs <= 0.99
        assert covered[name, False] / runs < 0.86


def test_strongly_clustered_data_have_wider_intervals_than_single_rows_suggest():
    pred, mos, _ = draw_clustered(1, k=30, per=1)
    clusters = np.repeat(np.arange(30), 9).tolist()  # nine copies of each row hold no more than one does
    pred, mos = np.repeat(pred, 9), np.repeat(mos, 9)
    honest = metrics.cluster_bootstrap(pred, mos, clusters)
    naive = metrics.cluster_bootstrap(pred, mos, list(range(270)))
    for name in honest:
        assert 2 < np.diff(honest[name])[0] / np.diff(naive[name])[0] < 4  # sqrt(9) in the limit


def test_copies_inside_each_cluster_change_no_interval():
    pred, mos, clusters = draw_clustered(2, k=12, per=2)
    once = metrics.cluster_bootstrap(pred, mos, clusters, num_samples=100)
    thrice = metrics.cluster_bootstrap(np.tile(pred, 3), np.tile(mos, 3), clusters * 3, num_samples=100)
    assert thrice == {name: pytest.approx(limits, abs=1e-9) for name, limits in once.items()}


@settings(max_examples=40)
@given(labelled)
def test_monotone_maps_and_names_of_clusters_leave_the_srocc_interval_exactly_as_it_was(case):
    (pred, mos), clusters = case
    found = metrics.cluster_bootstrap(pred, mos, clusters, num_samples=30)
    renamed = [("prompt", ord(name)) for name in clusters]
    mapped = metrics.cluster_bootstrap(np.exp(pred) + pred**3, 7 * mos + 2, renamed, num_samples=30)
    assert ("srocc" in found) == (len(set(clusters)) > 1)
    assert found.get("srocc") == mapped.get("srocc")
    for low, high in found.values():
        assert -1 <= low <= high <= 1


@settings(max_examples=40)
@given(labelled)
def test_swapping_the_models_mirrors_the_paired_interval_and_a_model_ties_with_itself(case):
    (pred, mos), clusters = case
    other = np.roll(pred, 1)
    there = metrics.paired_bootstrap(pred, other, mos, clusters, num_samples=30)
    back = metrics.paired_bootstrap(other, pred, mos, clusters, num_samples=30)
    for name, (difference, low, high) in there.items():
        assert back[name] == pytest.approx((-difference, -high, -low), abs=1e-12)
    same = metrics.paired_bootstrap(pred, pred, mos, clusters, num_samples=30)
    assert same == dict.fromkeys(there, (0.0, 0.0, 0.0))


def test_rows_may_come_in_any_order_that_keeps_the_first_of_each_cluster():
    pred, mos, clusters = draw_clustered(3, k=8, per=4)
    order = [*range(0, 32, 4), *np.random.default_rng(0).permutation([i for i in range(32) if i % 4])]
    found = metrics.cluster_bootstrap(pred[order], mos[order], [clusters[i] for i in order], num_samples=99)
    expected = metrics.cluster_bootstrap(pred, mos, clusters, num_samples=99)
    assert found == {name: pytest.approx(limits, abs=1e-9) for name, limits in expected.items()}


def test_the_seed_decides_the_resamples_and_nothing_else_does():
    pred, mos, clusters = draw_clustered(4)
    first = metrics.cluster_bootstrap(pred, mos, clusters, num_samples=50, seed=1)
    assert metrics.cluster_bootstrap(pred, mos, clusters, num_samples=50, seed=1) == first
    assert metrics.cluster_bootstrap(pred, mos, clusters, num_samples=50, seed=2) != first


def test_one_interval_can_tell_apart_two_models_whose_own_intervals_overlap():
    _, mos, clusters = draw_clustered(5)
    noise = np.random.default_rng(5).normal(size=mos.size)
    worse, better = mos + noise, mos + 0.85 * noise
    alone = [metrics.cluster_bootstrap(pred, mos, clusters) for pred in (worse, better)]
    together = metrics.paired_bootstrap(worse, better, mos, clusters)
    for name, (difference, low, high) in together.items():
        assert alone[1][name][0] < alone[0][name][1]
        assert 0 < low < difference < high


def test_resamples_that_are_constant_count_as_0():
    """Two clusters of one row: a resample holds both rows, or one of them twice."""
    chosen = naive_resamples(["a", "b"], 400, seed=0)
    for pred, sign in ([1.0, 2.0], 1), ([2.0, 1.0], -1):
        values = [sign * float(rows[0] != rows[1]) for rows in chosen]
        expected = tuple(np.quantile(values, [0.2, 0.8]))
        assert sorted(np.abs(expected)) == [0, 1]
        found = metrics.cluster_bootstrap(pred, [3.0, 4.0], ["a", "b"], num_samples=400, level=0.6)
        assert found == {"srocc": pytest.approx(expected), "plcc": pytest.approx(expected)}
    for pred in [0.1] * 6, [0.0] * 6:
        found = metrics.cluster_bootstrap(pred, np.arange(6.0), list("aabbcc"), num_samples=20)
        assert found == {"srocc": (0.0, 0.0), "plcc": (0.0, 0.0)}


@pytest.mark.parametrize("sizes", [(3, 7), (6, 11), (7, 13)])
def test_rounding_does_not_pass_for_a_spread_in_a_constant_resample(sizes):
    """Both sides are constant inside each cluster, so only a resample of both clusters correlates."""
    pred, mos = np.repeat([0.1, 0.7], sizes), np.repeat([0.3, 1.1], sizes)
    found = metrics.cluster_bootstrap(pred, mos, np.repeat([0, 1], sizes).tolist(), num_samples=400, level=0.999)
    assert found == {"srocc": (0.0, pytest.approx(1)), "plcc": (0.0, pytest.approx(1))}
    found = metrics.cluster_bootstrap(-pred, mos, np.repeat([0, 1], sizes).tolist(), num_samples=400, level=0.999)
    assert found == {"srocc": (pytest.approx(-1), 0.0), "plcc": (pytest.approx(-1), 0.0)}


def test_fewer_than_two_clusters_have_no_interval():
    for rows in 0, 1, 5:
        values, clusters = np.arange(rows), ["only"] * rows
        assert metrics.cluster_bootstrap(values, values, clusters) == {}
        assert metrics.paired_bootstrap(values, values, values, clusters) == {}


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e200, 1e308])
def test_intervals_and_calibration_of_extreme_but_finite_input_are_finite(size):
    pred, mos = size * np.linspace(-1, 1, 12), np.arange(12.0)
    found = metrics.paired_bootstrap(mos, pred, mos, list("aabbccddeeff"), num_samples=50)
    for difference, *limits in found.values():
        assert np.isfinite(difference)
        assert limits == pytest.approx([0, 0], abs=1e-3)  # 1e-320 has about three digits
    for line in metrics.calibration_line(pred, mos), metrics.calibration_line(pred, -pred):
        assert np.isfinite(list(line.values())).all()
    assert metrics.calibration_line(pred, -pred)["slope"] == pytest.approx(-1)


def test_within_group_accuracy_is_that_of_a_naive_loop():
    pred, mos = draw(10, n=50, decimals=0)
    groups = np.random.default_rng(10).choice(list("abcdefgh"), 50).tolist()
    points = []
    for i, j in itertools.combinations(range(50), 2):
        if groups[i] == groups[j] and mos[i] != mos[j]:
            points.append(0.5 + 0.5 * np.sign(pred[i] - pred[j]) * np.sign(mos[i] - mos[j]))
    assert set(points) == {0, 0.5, 1}
    accuracy, number = metrics.within_group_accuracy(pred, mos, groups)
    assert number == len(points)
    assert accuracy == pytest.approx(np.mean(points), abs=1e-12)


def test_within_group_accuracy_sees_nothing_between_groups():
    """Offsets of whole prompts ruin the correlation and leave the order inside each as it was."""
    mos = np.array([1.0, 2.0, 3.0, 4.0])
    assert metrics.within_group_accuracy([11, 12, 1, 2], mos, ["a", "a", "b", "b"]) == (1.0, 2)
    assert metrics.srocc([11, 12, 1, 2], mos) < 0
    assert metrics.within_group_accuracy([2, 1, 12, 11], mos, ["a", "a", "b", "b"]) == (0.0, 2)
    assert metrics.within_group_accuracy([5, 5, 5, 5], mos, ["a", "a", "b", "b"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("mos", "groups"), [([], []), ([1.0], ["a"]), ([1.0, 2.0], ["a", "b"]), ([3.0, 3.0], ["a", "a"])]
)
def test_without_pairs_there_is_no_within_group_accuracy(mos, groups):
    assert metrics.within_group_accuracy(np.arange(len(mos)), mos, groups) == (None, 0)


@settings(max_examples=60)
@given(labelled, st.randoms(use_true_random=False))
def test_within_group_accuracy_ignores_monotone_maps_and_the_order_of_rows(case, random):
    (pred, mos), groups = case
    accuracy, number = metrics.within_group_accuracy(pred, mos, groups)
    order = random.sample(range(len(groups)), len(groups))
    shuffled = (np.exp(pred) + pred**3)[order], mos[order], [groups[i] for i in order]
    assert metrics.within_group_accuracy(*shuffled) == (accuracy, number)
    if accuracy is not None:
        assert metrics.within_group_accuracy(-pred, mos, groups)[0] == pytest.approx(1 - accuracy, abs=1e-12)


def test_within_one_group_without_ties_the_accuracy_is_krocc_between_0_and_1():
    pred, mos = draw(11)
    accuracy, number = metrics.within_group_accuracy(pred, mos, ["a"] * 60)
    assert number == 60 * 59 / 2
    assert accuracy == pytest.approx((metrics.krocc(pred, mos) + 1) / 2, abs=1e-12)


def test_the_calibration_line_matches_polyfit_and_the_mean_error():
    pred, mos = draw(12)
    found = metrics.calibration_line(pred, mos)
    assert found == {
        "slope": pytest.approx(np.polyfit(pred, mos, 1)[0], abs=1e-10),
        "bias": pytest.approx(np.mean(pred - mos), abs=1e-12),
    }
    assert all(type(value) is float for value in found.values())


@settings(max_examples=40)
@given(pairs, st.floats(0.1, 10), st.floats(-10, 10))
def test_scaling_pred_divides_the_slope_and_shifting_it_moves_only_the_bias(rows, scale, shift):
    pred, mos = rows
    found = metrics.calibration_line(pred, mos)
    assert metrics.calibration_line(scale * pred, mos)["slope"] == pytest.approx(found["slope"] / scale, abs=1e-7)
    shifted = metrics.calibration_line(pred + shift, mos)
    assert shifted["slope"] == pytest.approx(found["slope"], abs=1e-7)
    assert shifted["bias"] == pytest.approx(found["bias"] + shift, abs=1e-9)
    perfect = metrics.calibration_line(mos, mos)
    assert perfect == {"slope": pytest.approx(float(np.ptp(mos) > 0)), "bias": 0.0}


def test_constant_pred_has_a_flat_calibration_line():
    for pred, mos, bias in ([0.1] * 6, [1.1] * 5 + [2.1], -7 / 6), ([3.0], [1.0], 2.0), ([2.0, 2.0], [2.0, 2.0], 0.0):
        assert metrics.calibration_line(pred, mos) == {"slope": 0.0, "bias": pytest.approx(bias)}
    tiny = np.nextafter(0, 1)  # its slope, 1 / tiny, is no float
    assert metrics.calibration_line([0.0, tiny], [1.0, 2.0])["slope"] == 0.0
    with pytest.raises(ValueError, match="at least one pair"):
        metrics.calibration_line([], [])


def test_the_bias_survives_sums_that_overflow():
    pred = np.array([1.5e308, 1.5e308, -1.5e308])
    assert metrics.calibration_line(pred, -pred)["bias"] == pytest.approx(1e308)
    assert metrics.calibration_line(pred[:2], -pred[:2])["bias"] == np.finfo(float).max


GROUPED = [
    metrics.within_group_accuracy,
    metrics.cluster_bootstrap,
    lambda pred, mos, groups: metrics.paired_bootstrap(pred, mos, mos, groups),
    lambda pred, mos, groups: metrics.paired_bootstrap(mos, pred, mos, groups),
]


@pytest.mark.parametrize("measure", GROUPED)
def test_grouped_measures_refuse_faulty_input(measure):
    rising = [1.0, 2.0, 3.0]
    for pred, groups, message in (
        ([1.0, np.nan, 3.0], ["a", "a", "b"], "pred has 1 non-finite"),
        ([1.0, 2.0], ["a", "b"], "one length, got 2 and 3"),
        (rising, ["a", "b"], "one label per row, got 2 for 3"),
        (rising, ["a", "b", float("nan")], "NaN among its labels"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(pred, rising, groups)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"level": 0.0}, {"level": 1.0}, {"level": float("nan")}])
def test_bootstraps_refuse_options_that_mean_nothing(options):
    rising = [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="need num_samples of 1 or more and 0 < level < 1"):
        metrics.cluster_bootstrap(rising, rising, list("abc"), **options)
    with pytest.raises(ValueError, match="need num_samples of 1 or more and 0 < level < 1"):
        metrics.paired_bootstrap(rising, rising, rising, list("abc"), **options)


several = st.lists(score, min_size=2, max_size=12)
shares = st.sampled_from([0.0, 0.1, 0.25, 1.0])


@settings(max_examples=60)
@given(several, shares, st.sampled_from([0.5, 0.9, 0.95]))
def test_the_interval_over_splits_is_that_of_the_written_formula(values, share, level):
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = stats.t.isf((1 - level) / 2, len(values) - 1) * (variance * (1 / len(values) + share)) ** 0.5
    found = metrics.resampled_interval(values, share, level=level)
    assert found == pytest.approx([mean - half, mean + half], abs=1e-9)
    assert all(type(end) is float for end in found)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_where_splits_share_nothing_the_interval_is_scipys_of_the_mean(level):
    values = [0.81, 0.84, 0.79, 0.9, 0.83]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    assert metrics.resampled_interval(values, 0.0, level=level) == pytest.approx(list(expected), abs=1e-12)


@settings(max_examples=40)
@given(several, shares, st.floats(0.1, 10), st.floats(-10, 10), st.randoms(use_true_random=False))
def test_the_interval_over_splits_moves_with_its_values_and_ignores_their_order(values, share, scale, shift, random):
    low, high = metrics.resampled_interval(values, share)
    moved = [scale * value + shift for value in random.sample(values, len(values))]
    assert metrics.resampled_interval(moved, share) == pytest.approx([scale * low + shift, scale * high + shift])
    assert metrics.resampled_interval([-value for value in values], share) == pytest.approx([-high, -low])


def test_equal_values_have_an_interval_without_extent_and_fewer_than_two_have_none():
    assert metrics.resampled_interval([0.1, 0.1, 0.1], 0.25) == pytest.approx([0.1, 0.1], abs=1e-12)
    assert metrics.resampled_interval([0.7], 0.25) is None
    assert metrics.resampled_interval([], 0.25) is None


@pytest.mark.parametrize(
    ("values", "share", "level", "message"),
    [
        ([0.1, 0.2], -0.01, 0.95, "need share of 0 or more"),
        ([0.1, 0.2], 0.25, 0.0, "0 < level < 1"),
        ([0.1, 0.2], 0.25, 1.0, "0 < level < 1"),
        ([0.1, 0.2], 0.25, float("nan"), "0 < level < 1"),
        ([0.1, float("nan")], 0.25, 0.95, "values has 1 non-finite"),
        ([[0.1, 0.2]], 0.25, 0.95, "one-dimensional"),
    ],
)
def test_the_interval_over_splits_refuses_faulty_input(values, share, level, message):
    with pytest.raises(ValueError, match=message):
        metrics.resampled_interval(values, share, level=level)


def test_the_interval_over_overlapping_splits_covers_where_the_usual_one_does_not():
    """The statistic is the mean of the test fold, for which the variance of the mean over splits is known."""
    runs, size, num_test, num_splits = 400, 50, 10, 10
    share, overlap = num_test / (size - num_test), num_test / size
    covered = {"corrected": 0, "usual": 0}
    widths = []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        sample = rng.normal(size=size)
        means = [rng.permutation(sample)[:num_test].mean() for _ in range(num_splits)]
        for name, allowance in ("corrected", share), ("usual", 0.0):
            low, high = metrics.resampled_interval(means, allowance)
            covered[name] += low <= 0 <= high
        widths.append(np.diff(metrics.resampled_interval(means, share))[0] / 2)
    assert 0.92 <= covered["corrected"] / runs <= 0.98
    assert covered["usual"] / runs < 0.85
    variance = (overlap + (1 - overlap) / num_splits) / num_test
    assert np.mean(np.square(widths)) == pytest.approx(stats.t.ppf(0.975, num_splits - 1) ** 2 * variance, rel=0.1)
