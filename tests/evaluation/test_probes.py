"""`probes.py` against NumPy's least squares, the closed form of ridge regression and planted relations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_examples import AUTHENTICITY, FOLDS, examples_of, knowledge
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from evaluation import probes
from evaluation.probes import LOGIT_CLIP, NUM_FOLDS, PENALTIES, fit_line, fit_quality, fit_ridge


def unit_rows(rng: np.random.Generator, num_rows: int, width: int) -> np.ndarray:
    rows = rng.normal(size=(num_rows, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def clipped_logit(target: np.ndarray) -> np.ndarray:
    inside = np.clip(target, LOGIT_CLIP, 1 - LOGIT_CLIP)
    return np.log(inside / (1 - inside))


def closed_form(images: np.ndarray, target: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """What `fit_quality` finds with a penalty."""
    return plain_ridge(images, clipped_logit(target), penalty)


def plain_ridge(features: np.ndarray, target: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Ridge with a free intercept: solve the centred normal equations."""
    centred = features - features.mean(axis=0)
    gram = centred.T @ centred + penalty * np.eye(features.shape[1])
    weight = np.linalg.solve(gram, centred.T @ (target - target.mean()))
    return weight, float(target.mean() - features.mean(axis=0) @ weight)


def chosen_penalty(images: np.ndarray, target: np.ndarray, fitted: tuple[np.ndarray, float]) -> float:
    """The penalty whose closed form is the fit; there must be exactly one."""
    matches = [
        penalty for penalty in PENALTIES if np.allclose(closed_form(images, target, penalty)[0], fitted[0], atol=1e-7)
    ]
    assert len(matches) == 1, matches
    return matches[0]


# ---------------------------------------------------------------------------------------- a single feature


@given(st.integers(0, 10_000), st.integers(2, 40))
@settings(max_examples=40)
def test_the_line_is_that_of_least_squares(seed, num_rows):
    rng = np.random.default_rng(seed)
    feature, target = rng.uniform(0, 1, num_rows), rng.uniform(0, 1, num_rows)
    expected = np.linalg.lstsq(np.column_stack([feature, np.ones(num_rows)]), target, rcond=None)[0]
    np.testing.assert_allclose(fit_line(feature, target), expected, rtol=1e-6, atol=1e-8)


def test_the_narrow_spread_of_a_real_clips_cosine_is_kept():
    rng = np.random.default_rng(0)
    half = (rng.normal(0.28, 0.004, 200).astype(np.float32).astype(np.float64) + 1) / 2
    assert fit_line(half, 40 * half - 25) == pytest.approx((40, -25), rel=1e-6)


@given(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=60))
@settings(max_examples=80)
def test_a_constant_feature_gives_slope_zero_and_the_mean(value, labels):
    target = np.array(labels)
    slope, offset = fit_line(np.full(len(labels), value), target)
    assert slope == 0
    assert offset == pytest.approx(target.mean())


def test_float32_rounding_of_one_cosine_is_not_taken_for_signal():
    rng = np.random.default_rng(0)
    jitter = np.nextafter(np.float32(0.3), rng.choice(np.float32([0, 1]), 50)).astype(np.float64)
    assert np.ptp(jitter) > 0
    assert fit_line((jitter + 1) / 2, rng.uniform(0, 1, 50))[0] == 0


# ----------------------------------------------------------------------------------------------- quality


@pytest.fixture(scope="module")
def noisy() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, labels with signal and noise, and groups of three."""
    rng = np.random.default_rng(3)
    images = unit_rows(rng, 120, 6)
    logit = images @ rng.normal(size=6) * 2 + 0.3 + rng.normal(size=120) * 0.5
    return images, sigmoid(logit), np.arange(120) // 3


def test_quality_recovers_a_planted_logistic_relation():
    rng = np.random.default_rng(0)
    images, weight = unit_rows(rng, 300, 8), rng.normal(size=8)
    target = sigmoid(images @ weight + 0.2)
    assert target.min() > LOGIT_CLIP and target.max() < 1 - LOGIT_CLIP
    fitted, offset = fit_quality(images, target, np.arange(300))
    np.testing.assert_allclose(fitted, weight, atol=1e-4)
    assert offset == pytest.approx(0.2, abs=1e-4)


def test_quality_is_closed_form_ridge_for_one_of_the_penalties(noisy):
    images, target, groups = noisy
    fitted = fit_quality(images, target, groups)
    weight, offset = closed_form(images, target, chosen_penalty(images, target, fitted))
    np.testing.assert_allclose(fitted[0], weight, atol=1e-7)
    assert fitted[1] == pytest.approx(offset, abs=1e-7)


def test_quality_chooses_the_penalty_that_predicts_unseen_groups_best(noisy):
    images, target, groups = noisy
    logit = clipped_logit(target)
    fold_of_group = np.full(groups.max() + 1, -1)
    for held_out in range(NUM_FOLDS):  # equal groups: any assignment that balances them has folds of 8 groups
        fold_of_group[held_out::NUM_FOLDS] = held_out
    errors = []
    for penalty in PENALTIES:
        squares = []
        for held_out in range(NUM_FOLDS):
            test = fold_of_group[groups] == held_out
            weight, offset = closed_form(images[~test], target[~test], penalty)
            squares.append(np.mean((images[test] @ weight + offset - logit[test]) ** 2))
        errors.append(np.mean(squares))
    chosen = list(PENALTIES).index(chosen_penalty(images, target, fit_quality(images, target, groups)))
    assert abs(chosen - int(np.argmin(errors))) <= 1  # which groups share a fold is not fixed
    assert 0 < chosen < len(PENALTIES) - 1  # the case is one in which the choice matters


def test_quality_of_pure_noise_is_all_but_the_mean():
    rng = np.random.default_rng(1)
    images, target = unit_rows(rng, 60, 64), rng.uniform(0.1, 0.9, 60)
    weight, offset = fit_quality(images, target, np.arange(60))
    assert chosen_penalty(images, target, (weight, offset)) >= 10
    predicted = sigmoid(images @ weight + offset)
    assert np.ptp(predicted) < 0.1 * np.ptp(target)
    assert predicted.mean() == pytest.approx(target.mean(), abs=0.05)


def test_pictures_of_one_prompt_cannot_vouch_for_each_other():
    """Embeddings that tell the prompt and nothing else, labels with an offset for each prompt.

    Across folds that share prompts the offsets look predictable; across folds that do not, they are noise.
    """
    rng = np.random.default_rng(0)
    prompt = np.arange(200) // 10
    images = unit_rows(rng, 20, 64)[prompt]
    target = sigmoid(rng.normal(size=20)[prompt])
    grouped = fit_quality(images, target, prompt)
    ungrouped = fit_quality(images, target, np.arange(200))
    assert chosen_penalty(images, target, grouped) >= 100 * chosen_penalty(images, target, ungrouped)


def test_no_fold_shares_a_group_with_another(monkeypatch, noisy):
    images, target, groups = noisy
    seen = []

    class Spy(probes.GroupKFold):
        def split(self, *arrays, **options):
            for fold in super().split(*arrays, **options):
                seen.append(fold)
                yield fold

    monkeypatch.setattr(probes, "GroupKFold", Spy)
    fit_quality(images, target, groups)
    assert len(seen) == NUM_FOLDS
    assert all(not set(groups[train]) & set(groups[test]) for train, test in seen)
    assert sorted(row for _, test in seen for row in test) == list(range(len(groups)))


@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 3), (30, 1)])
def test_quality_works_with_few_rows_and_groups(num_rows, num_groups):
    rng = np.random.default_rng(0)
    target = rng.uniform(0, 1, num_rows)
    weight, offset = fit_quality(unit_rows(rng, num_rows, 16), target, np.arange(num_rows) % num_groups)
    assert weight.shape == (16,)
    assert type(offset) is float
    assert np.isfinite(weight).all() and np.isfinite(offset)


def test_labels_at_both_ends_of_the_scale_stay_finite():
    rng = np.random.default_rng(0)
    images, target = unit_rows(rng, 40, 4), np.arange(40) % 2 * 1.0
    weight, offset = fit_quality(images, target, np.arange(40))
    assert np.isfinite(weight).all()
    bound = np.log((1 - LOGIT_CLIP) / LOGIT_CLIP)
    assert abs(offset) < bound


def test_the_penalty_is_the_one_that_sklearns_own_search_chooses(noisy):
    images, target, groups = noisy
    clipped = np.clip(target, probes.LOGIT_CLIP, 1 - probes.LOGIT_CLIP)
    folds = list(GroupKFold(NUM_FOLDS).split(images, groups=groups))
    search = RidgeCV(probes.PENALTIES, cv=folds, scoring="neg_mean_squared_error")
    search.fit(images, np.log(clipped / (1 - clipped)))
    weight, offset = fit_quality(images, target, groups)
    np.testing.assert_allclose(weight, search.coef_, rtol=1e-6, atol=1e-9)
    assert offset == pytest.approx(search.intercept_)


def test_ridge_is_fitted_to_any_target_and_quality_is_ridge_of_the_logit(noisy):
    images, target, groups = noisy
    weight, offset = fit_ridge(images, clipped_logit(target), groups)
    of_quality = fit_quality(images, target, groups)
    np.testing.assert_array_equal(weight, of_quality[0])
    assert offset == of_quality[1]
    mos = 1 + 99 * target  # far outside of where a logit exists
    fitted = fit_ridge(images, mos, groups)
    plain = [plain_ridge(images, mos, penalty) for penalty in PENALTIES]
    assert sum(np.allclose(fitted[0], weight) and np.isclose(fitted[1], offset) for weight, offset in plain) == 1


# ------------------------------------------------------------------------------------------------ the base


def test_the_base_is_fitted_to_the_labelled_images_of_the_training_fold():
    rng, prompt_of = np.random.default_rng(0), np.arange(len(FOLDS)) // 5
    examples = examples_of(
        FOLDS, authenticity=AUTHENTICITY, prompt=[f"thing {i}" for i in prompt_of], q=rng.uniform(1, 5, 68)[prompt_of]
    )
    examples.table.loc[[0, 5], "q"] = np.nan
    examples.table.loc[[1, 2], "c"] = np.nan
    known = knowledge(examples, levels=True)
    # The embedding tells the prompt, and the prompt the label: penalties differ by what counts as unseen.
    known["train_eval"]["image"] = rng.normal(size=(68, 6))[prompt_of[:20]]
    base = probes.fit_base(known, examples)
    train = known["train_eval"]
    units = {task: values[:20] for task, values in examples.unit_targets.items()}
    groups = prompt_of[:20]
    keep = ~np.isnan(units["q"])
    weights, bias = probes.fit_quality(train["image"][keep], units["q"][keep], groups[keep])
    np.testing.assert_allclose(base.images["q"][0], weights)
    assert base.images["q"][1] == pytest.approx(bias)
    assert set(base.images) == {"q", "authenticity"}
    keep = ~np.isnan(units["c"])
    slope, offset = np.polyfit((train["cos"][keep] + 1) / 2, units["c"][keep], 1)
    assert base.cosine == pytest.approx((slope, offset))
    slope, offset = np.polyfit(train["level_c"][keep], units["c"][keep], 1)
    assert base.levels["c"] == pytest.approx((slope, offset))
    assert set(base.levels) == {"q", "c"}
    assert (base.quality, base.consistency) == (base.levels["q"], base.levels["c"])
    changed = examples.table.copy()
    changed.loc[examples.folds != "train", ["q", "c"]] = 1.0
    again = probes.fit_base(known, replace(examples, table=changed))
    assert again.cosine == base.cosine and again.levels == base.levels


def test_without_levels_heads_start_from_probe_and_cosine():
    examples = examples_of(FOLDS)
    known = knowledge(examples)
    base = probes.fit_base(known, examples)
    assert base.levels == {} and base.quality is base.images["q"] and base.consistency is base.cosine
    found = base.scores(known["test"])
    assert list(found) == ["q", "c"]
    logit = known["test"]["image"] @ base.images["q"][0] + base.images["q"][1]
    np.testing.assert_allclose(found["q"], 1 / (1 + np.exp(-logit)))
    np.testing.assert_array_equal(found["c"], known["test"]["cos"])
    of_quality = examples_of(FOLDS, c=np.nan)
    base = probes.fit_base(known, of_quality)
    assert base.consistency is None and list(base.scores(known["test"])) == ["q"]
