"""`probes.py` against NumPy's least squares, scikit-learn's ridge regression and planted relations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_examples import AUTHENTICITY, FOLDS, examples_of, knowledge, left_out, sigmoid, unit_rows
from sklearn.linear_model import LinearRegression

from evaluation import probes, ridge
from evaluation.probes import LOGIT_CLIP, fit_line, fit_quality
from evaluation.ridge import PENALTIES, fit_ridge


def clipped_logit(target: np.ndarray) -> np.ndarray:
    inside = np.clip(target, LOGIT_CLIP, 1 - LOGIT_CLIP)
    return np.log(inside / (1 - inside))


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


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(0, 30))
@settings(max_examples=30)
def test_the_error_of_a_line_is_that_of_cross_validation(seed, num_folds, more):
    rng = np.random.default_rng(seed)
    fold_of = np.concatenate([np.arange(num_folds), np.arange(num_folds), rng.integers(0, num_folds, more)])
    feature, target = rng.uniform(0, 1, (2, len(fold_of)))
    expected = left_out(LinearRegression(), feature[:, None], target, fold_of)
    assert probes.line_error(feature, target, fold_of) == pytest.approx(expected, rel=1e-6)


def test_without_a_second_fold_nothing_is_known_of_a_lines_error():
    assert np.isnan(probes.line_error(np.linspace(0, 1, 5), np.linspace(0, 1, 5), np.zeros(5, dtype=int)))


# ------------------------------------------------------------------------------------------------- ridge


def test_quality_is_ridge_of_the_logit():
    rng = np.random.default_rng(3)
    images, groups = unit_rows(rng, 120, 6), np.arange(120) // 3
    target = sigmoid(images @ rng.normal(size=6) * 2 + 0.3 + rng.normal(size=120) * 0.5)
    of_quality, of_logit = fit_quality(images, target, groups), fit_ridge(images, clipped_logit(target), groups)
    np.testing.assert_array_equal(of_quality.weights, of_logit.weights)
    assert (of_quality.bias, of_quality.penalty) == (of_logit.bias, of_logit.penalty)


def test_quality_recovers_a_planted_logistic_relation():
    rng = np.random.default_rng(0)
    images, weights = unit_rows(rng, 300, 8), rng.normal(size=8)
    target = sigmoid(images @ weights + 0.2)
    assert target.min() > LOGIT_CLIP and target.max() < 1 - LOGIT_CLIP
    fitted = fit_quality(images, target, np.arange(300))
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-3)
    assert fitted.bias == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_quality_of_pure_noise_is_the_mean(seed):
    rng = np.random.default_rng(seed)
    images, target = unit_rows(rng, 400, 16), rng.uniform(0.1, 0.9, 400)
    fitted = fit_quality(images, target, np.arange(400))
    assert fitted.penalty == PENALTIES[-1]
    predicted = sigmoid(fitted(images))
    assert np.ptp(predicted) < 0.01 * np.ptp(target)
    assert predicted.mean() == pytest.approx(target.mean(), abs=0.02)


def test_pictures_of_one_prompt_cannot_vouch_for_each_other():
    """Embeddings that tell the prompt and nothing else, labels with an offset for each prompt.

    Across folds that share prompts the offsets look predictable; across folds that do not, they are noise.
    """
    rng = np.random.default_rng(3)
    prompt = np.arange(500) // 5
    images = unit_rows(rng, 100, 128)[prompt]
    target = sigmoid(rng.normal(size=100)[prompt])
    grouped = fit_quality(images, target, prompt)
    ungrouped = fit_quality(images, target, np.arange(500))
    assert grouped.penalty >= 1e6 * ungrouped.penalty


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 3), (30, 1)])
def test_quality_works_with_few_rows_and_groups(num_rows, num_groups):
    rng = np.random.default_rng(0)
    target = rng.uniform(0, 1, num_rows)
    fitted = fit_quality(unit_rows(rng, num_rows, 16), target, np.arange(num_rows) % num_groups, [10, 6])
    assert fitted.weights.shape == (16,)
    assert type(fitted.bias) is type(fitted.error) is float
    assert np.isfinite(fitted.weights).all() and np.isfinite(fitted.bias)
    assert np.isnan(fitted.error) == (num_groups == 1)  # no cross-validation


def test_labels_at_both_ends_of_the_scale_stay_finite():
    rng = np.random.default_rng(0)
    images, target = unit_rows(rng, 40, 4), np.arange(40) % 2 * 1.0
    fitted = fit_quality(images, target, np.arange(40))
    assert np.isfinite(fitted.weights).all()
    bound = np.log((1 - LOGIT_CLIP) / LOGIT_CLIP)
    assert abs(fitted.bias) < bound


# ------------------------------------------------------------------------------------------------ the base


WIDTH, STAGES = 6, 4
MANY = ["train"] * 200 + ["val"] * 5 + ["test"] * 5


def blocks_of(known: dict[str, np.ndarray], base: probes.Base) -> np.ndarray:
    """What consistency is told from, feature by feature."""
    rows = []
    for image, text, cos in zip(known["image"], known["text"], known["cos"], strict=True):
        embedding, raw = image[: len(text)], image[len(text) :]
        stages = (raw - base.stage_mean) / base.stage_scale
        rows.append([(cos + 1) / 2, *embedding, *text, *(embedding * text), *stages])
    return np.array(rows)


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
    fitted = probes.fit_quality(train["image"][keep], units["q"][keep], groups[keep], [6])
    np.testing.assert_allclose(base.images["q"].weights, fitted.weights)
    assert base.images["q"].bias == pytest.approx(fitted.bias)
    assert set(base.images) == {"q", "authenticity"}
    keep = ~np.isnan(units["c"])
    slope, offset = np.polyfit((train["cos"][keep] + 1) / 2, units["c"][keep], 1)
    assert base.cosine == pytest.approx((slope, offset))
    fitted = fit_ridge(blocks_of(train, base)[keep], units["c"][keep], groups[keep], [1, 6, 6, 6])
    np.testing.assert_allclose(base.joint.weights, fitted.weights, atol=1e-12)
    slope, offset = np.polyfit(train["level_c"][keep], units["c"][keep], 1)
    assert base.levels["c"] == pytest.approx((slope, offset))
    assert set(base.levels) == {"q", "c"}
    assert (base.quality, base.consistency) == (base.levels["q"], base.levels["c"])
    changed = examples.table.copy()
    changed.loc[examples.folds != "train", ["q", "c"]] = 1.0
    again = probes.fit_base(known, replace(examples, table=changed))
    assert again.cosine == base.cosine and again.levels == base.levels
    np.testing.assert_array_equal(again.joint.weights, base.joint.weights)


def test_stage_statistics_are_normalised_by_the_training_fold():
    examples = examples_of(FOLDS)
    known = knowledge(examples, stage_width=STAGES)
    known["train_eval"]["image"][:, -1] = 7.0  # constant
    known["train_eval"]["image"][3] = np.nan  # a lost image
    base = probes.fit_base(known, examples, stage_width=STAGES)
    left = np.delete(known["train_eval"]["image"], 3, axis=0)
    found = probes.normalised(left, base.stage_mean, base.stage_scale)
    np.testing.assert_array_equal(found[:, :WIDTH], left[:, :WIDTH])
    np.testing.assert_allclose(found[:, WIDTH:].mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(found[:, WIDTH:].std(axis=0), [0.5, 0.5, 0.5, 0], atol=1e-12)
    other = probes.normalised(known["test"]["image"], base.stage_mean, base.stage_scale)
    expected = (known["test"]["image"][:, WIDTH:] - left[:, WIDTH:].mean(axis=0)) / base.stage_scale
    np.testing.assert_allclose(other[:, WIDTH:], expected)
    assert all(len(fitted.weights) == WIDTH + STAGES for fitted in base.images.values())


@pytest.mark.parametrize("stage_width", [0, STAGES])
def test_probes_are_what_the_weights_say_in_label_units(stage_width):
    examples = examples_of(FOLDS)
    known = knowledge(examples, stage_width=stage_width)
    base = probes.fit_base(known, examples, stage_width=stage_width)
    found, test = base.probes(known["test"]), known["test"]
    assert list(found) == ["q", "c"]
    stages = (test["image"][:, WIDTH:] - base.stage_mean) / base.stage_scale
    weights = base.images["q"].weights
    logit = test["image"][:, :WIDTH] @ weights[:WIDTH] + stages @ weights[WIDTH:] + base.images["q"].bias
    np.testing.assert_allclose(found["q"], sigmoid(logit))
    np.testing.assert_allclose(found["c"], blocks_of(test, base) @ base.joint.weights + base.joint.bias)


def test_with_a_global_view_consistency_is_told_from_that_alone():
    examples = examples_of(MANY)
    known = knowledge(examples, stage_width=STAGES)
    for part in known.values():
        part["content"], part["image"] = part["image"], np.roll(part["image"], 1, axis=0)
    base = probes.fit_base(known, examples, stage_width=STAGES)
    shown = {fold: {**part, "image": part["content"]} for fold, part in known.items()}
    expected = blocks_of(shown["test"], base) @ base.joint.weights + base.joint.bias
    np.testing.assert_allclose(base.probes(known["test"])["c"], expected)


def examples_with(c: np.ndarray) -> probes.Examples:
    """Labels of consistency, on 1 to 5, for a training fold that is large enough to learn from."""
    return examples_of(MANY, c=np.clip(c, 1, 5))


@pytest.mark.parametrize("planted", ["image", "text", "product", "stages"])
def test_consistency_starts_from_whatever_tells_it_beyond_the_cosine(planted):
    known = knowledge(examples_of(MANY), stage_width=STAGES)
    joined = {name: np.concatenate([part[name] for part in known.values()]) for name in ("image", "text", "cos")}
    image = joined["image"][:, :WIDTH]
    feature = {
        "image": image[:, 0],
        "text": joined["text"][:, 1],
        "product": image[:, 2] * joined["text"][:, 2],
        "stages": (joined["image"][:, -1] - 5) / 100,
    }[planted]
    examples = examples_with(3 + 0.5 * feature)
    base = probes.fit_base(known, examples, stage_width=STAGES)
    assert base.is_joint and base.consistency == (base.joint.weights, base.joint.bias)
    found = base.scores(known["test"])
    np.testing.assert_allclose(found["c"], examples.unit_targets["c"][-5:], atol=0.06)
    place = {"image": 1, "text": 1 + WIDTH + 1, "product": 1 + 2 * WIDTH + 2, "stages": -1}[planted]
    size = np.abs(base.joint.weights) * blocks_of(known["train_eval"], base).std(axis=0)
    assert size[place] > 5 * np.delete(size, place).max()


def test_where_embeddings_are_noise_the_probe_is_that_of_cosine_and_stages_alone():
    rng = np.random.default_rng(0)
    examples = examples_of(MANY)
    known = knowledge(examples, width=100, stage_width=STAGES)
    train = known["train_eval"]
    raw = train["image"][:, -1]
    table = examples.table.copy()
    told = 2 + 3 * train["cos"] + (raw - 5) / 200 + 0.5 * rng.normal(size=200)
    table.loc[examples.folds == "train", "c"] = np.clip(told, 1, 5)
    examples = replace(examples, table=table)
    base = probes.fit_base(known, examples, stage_width=STAGES)
    assert base.is_joint and len(base.joint.weights) == 1 + 3 * 100 + STAGES
    assert np.count_nonzero(base.joint.weights[1:-STAGES]) == 0
    features = blocks_of(train, base)[:, [0, *range(-STAGES, 0)]]
    alone = fit_ridge(features, examples.unit_targets["c"][:200], np.arange(200), [1, STAGES])
    np.testing.assert_allclose(base.joint.weights[[0, *range(-STAGES, 0)]], alone.weights)
    assert base.joint.bias == pytest.approx(alone.bias) and base.joint.error == alone.error


def test_the_better_of_two_probes_is_taken():
    rng = np.random.default_rng(0)
    blocks = [rng.normal(size=(60, width)) for width in (1, 5, 5, 5, 3)]
    for feature, is_small in ((blocks[1][:, 0], False), (blocks[0][:, 0] + blocks[4][:, 1], True)):
        target = feature + 0.5 * rng.normal(size=60)
        found = probes.fit_joint(blocks, target, np.arange(60))
        assert (not found.weights[1:16].any()) == is_small and len(found.weights) == 19
    without_stages = [*blocks[:4], np.empty((60, 0))]
    assert len(probes.fit_joint(without_stages, blocks[0][:, 0], np.arange(60)).weights) == 16


def test_a_kernel_tells_what_bends_and_leaves_the_rest_to_the_cosine():
    rng = np.random.default_rng(0)
    folds = ["train"] * 300 + ["val"] * 5 + ["test"] * 60
    known = knowledge(examples_of(folds), stage_width=STAGES)
    joined = {name: np.concatenate([part[name] for part in known.values()]) for name in ("image", "cos")}
    raw = joined["image"][:, WIDTH:]
    z = (raw - raw.mean(axis=0)) / raw.std(axis=0)
    bent = np.abs(z[:, 0]) - 1
    labels = {"q": 3 + bent, "c": 3 + 0.7 * bent + joined["cos"]}
    noisy = {task: np.clip(value + 0.1 * rng.normal(size=len(raw)), 1, 5) for task, value in labels.items()}
    noisy["q"][:40] = np.nan  # of these only consistency is known
    examples = examples_of(folds, **noisy)
    known["train_eval"]["image"][50] = np.nan  # lost
    base = probes.fit_base(known, examples, stage_width=STAGES, base="kernel")
    assert base.kernel is not None and base.kernel.places.shape == (299, STAGES)
    assert not base.kernel_fits["q"].weights[:40].any() and base.kernel_fits["c"].weights[:40].any()
    fit = base.kernel_fits["c"]
    assert base.consistency == (fit.slopes, fit.bias) and not base.is_joint
    found, plain = base.scores(known["test"]), base.probes(known["test"])
    for task in ("q", "c"):
        expected = examples.unit_targets[task][-60:]
        assert np.corrcoef(found[task], expected)[0, 1] > 0.85 > np.corrcoef(plain[task], expected)[0, 1] + 0.2
    normal = (known["test"]["image"][:, WIDTH:] - base.stage_mean) / base.stage_scale
    by_hand = base.kernel(normal) @ fit.weights + (known["test"]["cos"] + 1) / 2 * fit.slopes[0] + fit.bias
    np.testing.assert_allclose(found["c"], by_hand)


def test_a_kernel_is_of_no_more_images_than_a_model_has_room_for(monkeypatch):
    monkeypatch.setattr(ridge, "MAX_IMAGES", 12)
    examples = examples_of(FOLDS, prompt=["one thing"] * len(FOLDS))  # a group that is larger by itself
    base = probes.fit_base(knowledge(examples, stage_width=STAGES), examples, stage_width=STAGES, base="kernel")
    assert base.kernel.places.shape == (12, STAGES) and np.isfinite(base.kernel_fits["q"].weights).all()


def of_cosine(noise: float) -> tuple[probes.Examples, dict[str, dict[str, np.ndarray]]]:
    """Labels that the cosine tells, and embeddings that tell nothing."""
    examples = examples_of(MANY)
    known = knowledge(examples, width=60)
    cos = np.concatenate([part["cos"] for part in known.values()])
    return examples_with(2 + 3 * cos + noise * np.random.default_rng(0).normal(size=len(cos))), known


def test_where_the_cosine_alone_is_better_in_cross_validation_consistency_starts_from_it():
    examples, known = of_cosine(0.3)
    base = probes.fit_base(known, examples)
    assert base.joint is not None and not base.is_joint
    assert base.consistency is base.cosine
    found = base.scores(known["test"])
    np.testing.assert_array_equal(found["c"], known["test"]["cos"])
    assert not np.allclose(base.probes(known["test"])["c"], known["test"]["cos"], atol=0.1)
    np.testing.assert_array_equal(found["q"], base.probes(known["test"])["q"])


def test_asked_for_the_cosine_consistency_starts_from_it_whatever_is_better():
    examples = examples_of(MANY)
    known = knowledge(examples)
    image = np.concatenate([part["image"] for part in known.values()])
    examples = examples_with(3 + 0.5 * image[:, 0])
    probe, cosine = (probes.fit_base(known, examples, base=base) for base in ("probe", "cosine"))
    assert probe.is_joint and not cosine.is_joint
    assert cosine.consistency is cosine.cosine and cosine.cosine == probe.cosine
    np.testing.assert_array_equal(cosine.joint.weights, probe.joint.weights)


@pytest.mark.filterwarnings("error")
def test_images_of_one_prompt_cannot_choose_a_probe():
    examples = examples_of(FOLDS, prompt="the same")
    base = probes.fit_base(knowledge(examples), examples)
    assert not base.is_joint and base.consistency is base.cosine and np.isfinite(base.cosine).all()


def test_heads_start_from_what_is_known_of_each_score():
    examples = examples_of(FOLDS, authenticity=AUTHENTICITY)
    known = knowledge(examples)
    base = probes.fit_base(known, examples)
    for task in ("q", "authenticity"):
        weights, bias = base.of_image(task)
        assert weights is base.images[task].weights and bias == base.images[task].bias
    assert base.of_image("beauty") is None and base.levels == {}
    assert base.quality == base.of_image("q")
    of_quality = examples_of(FOLDS, c=np.nan)
    base = probes.fit_base({fold: {"image": part["image"]} for fold, part in known.items()}, of_quality)
    assert base.consistency is base.joint is base.cosine is None and not base.is_joint
    assert list(base.scores(known["test"])) == list(base.probes(known["test"])) == ["q"]
