"""Floors against plain loops, and against planted relations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_examples import (
    FOLDS,
    MEASURES,
    MOS,
    examples_of,
    knowledge,
    naive_means,
)
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from evaluation import floors, metrics, probes, ridge
from sources.examples import Examples

# -- floors without pixels


@st.composite
def grouped_examples(draw: st.DrawFn) -> Examples:
    """Small examples in random folds with generators, prompts and gaps."""
    size = draw(st.integers(8, 24))
    draws = {
        name: draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
        for name, values in {"fold": ["train", "val", "test"], "group": "xyz", "prompt": "abcdefg", "set": "st"}.items()
    }
    folds = ["train", "train", "test", "test", *draws.pop("fold")[4:]]
    quality = draw(st.lists(st.sampled_from([1.0, 2.0, 3.5, 5.0, np.nan]), min_size=size, max_size=size))
    return examples_of(folds, {"q": MOS, "c": MOS}, q=[1.5, 2.5, *quality[2:]], **draws)


@settings(max_examples=60)
@given(grouped_examples())
def test_floors_without_pixels_are_group_means_of_the_training_fold(examples):
    found = floors.pixel_free(examples)
    shared = set(examples.table["prompt"][examples.folds == "train"]) & set(
        examples.table["prompt"][examples.folds == "test"]
    )
    with_prompts = {"prompt_mean", "generator_and_prompt_mean"} if shared else set()
    assert set(found) == {"mean", "generator_mean"} | with_prompts
    for task in ("q", "c"):
        of_maker = naive_means(examples, task, ["set", "group"])
        np.testing.assert_allclose(found["mean"][task], naive_means(examples, task, ["set"]))
        np.testing.assert_allclose(found["generator_mean"][task], of_maker)
        if shared:
            of_prompt = naive_means(examples, task, ["prompt"])
            np.testing.assert_allclose(found["prompt_mean"][task], of_prompt)
            np.testing.assert_allclose(
                found["generator_and_prompt_mean"][task], of_maker + of_prompt - found["mean"][task]
            )


def test_prompts_are_shared_whatever_their_case_and_missing_ones_are_not():
    folds = ["train"] * 4 + ["test"] * 4
    assert "prompt_mean" in floors.pixel_free(examples_of(folds, prompt=[*"abcd", " A", *"efg"]))
    assert "prompt_mean" not in floors.pixel_free(examples_of(folds, prompt="", c=np.nan))


# -- floors from features


def planted(size: int = 60) -> tuple[Examples, np.ndarray]:
    """Labels that are a linear function of three of five features."""
    rng = np.random.default_rng(4)
    features = rng.normal(size=(size, 5))
    folds = ["train"] * (size // 2) + ["test"] * (size - size // 2)
    quality = features @ [0.5, -0.25, 0.1, 0, 0] + 3
    return examples_of(folds, prompt=[f"thing {i // 2}" for i in range(size)], q=quality), features


def ridge_q(examples: Examples, features: np.ndarray) -> np.ndarray:
    train, test = examples.rows("train"), examples.rows("test")
    return floors.ridge_scores(examples, features[train], features[test], ["q"])["q"]


def test_a_planted_linear_relation_is_found_in_mos_units():
    examples, features = planted()
    np.testing.assert_allclose(ridge_q(examples, features), examples.mos("q", "test"), atol=0.01)


def test_labels_and_features_of_the_test_fold_are_never_looked_at():
    examples, features = planted()
    found = ridge_q(examples, features)
    examples.table.loc[examples.rows("test"), "q"] = np.random.default_rng(0).uniform(1, 5, len(found))
    np.testing.assert_array_equal(ridge_q(examples, features), found)
    examples.table.loc[examples.rows("test"), "q"] = np.nan
    np.testing.assert_array_equal(ridge_q(examples, features), found)
    features[examples.rows("test")[1:]] *= 100
    assert ridge_q(examples, features)[0] == pytest.approx(found[0], abs=1e-12)


def test_units_of_features_and_a_constant_one_do_not_matter():
    examples, features = planted()
    other = np.hstack([features * [1, 1e4, 1e-4, 7, 1] + [0, 5, 0, -100, 1e3], np.full((len(features), 5), 3.0)])
    # Twice as many columns, half of them empty: rows are half as long, for which the penalty may differ a step.
    np.testing.assert_allclose(ridge_q(examples, other), ridge_q(examples, features), atol=0.01)
    np.testing.assert_allclose(ridge_q(examples, other[:, :5]), ridge_q(examples, features), atol=1e-9)


def test_ridge_scores_are_those_of_a_search_with_sklearn_over_whole_prompts_of_labelled_images(monkeypatch):
    monkeypatch.setattr(ridge, "NUM_FOLDS", 6)
    rng = np.random.default_rng(1)
    examples, features = planted(120)
    train, test = examples.rows("train"), examples.rows("test")
    examples.table.loc[train, "q"] += rng.normal(size=len(train))  # so that the penalty matters
    examples.table.loc[train[::7], "q"] = np.nan
    keep = examples.table["q"].notna().to_numpy()[train]
    centre, spread = features[train].mean(axis=0), features[train].std(axis=0) * np.sqrt(5)
    fit, held = (features[train] - centre) / spread, (features[test] - centre) / spread
    prompts = examples.table["prompt"].to_numpy()[train][keep]
    folds = PredefinedSplit(ridge.folds_of(pd.factorize(prompts)[0]))
    target = examples.mos("q", "train")[keep]
    errors = [
        np.mean((cross_val_predict(Ridge(alpha=penalty), fit[keep], target, cv=folds) - target) ** 2)
        for penalty in ridge.PENALTIES
    ]
    best = int(np.argmin(errors))
    assert 0 < best < len(errors) - 1
    expected = Ridge(alpha=ridge.PENALTIES[best]).fit(fit[keep], target).predict(held)
    np.testing.assert_allclose(ridge_q(examples, features), expected, rtol=1e-6)


def floors_of(examples: Examples, known=None, statistics=None) -> dict[str, dict[str, float]]:
    known = known or knowledge(examples)
    if statistics is None:
        statistics = np.random.default_rng(5).normal(size=(len(examples.table), 3))
    return floors.floors(examples, probes.fit_base(known, examples), known, statistics)


def keys(*tasks: str) -> set[str]:
    return {f"{name}_{task}" for name in MEASURES for task in tasks} | {"main"}


def test_every_floor_has_the_measures_of_the_scores_it_can_give():
    examples = examples_of(FOLDS, group=["a", "b"] * (len(FOLDS) // 2))
    found = floors_of(examples)
    assert list(found) == ["mean", "generator_mean", "image_statistics", "zero_shot_cosine", "ridge_probe"]
    assert set(found.pop("zero_shot_cosine")) == keys("c")
    assert all(set(row) == keys("q", "c") for row in found.values())
    assert found["mean"]["srocc_q"] == found["mean"]["plcc_c"] == 0.0
    expected = metrics.agreement(naive_means(examples, "q", ["group"]), examples.mos("q", "test"))
    assert {name: found["generator_mean"][f"{name}_q"] for name in MEASURES} == pytest.approx(expected)


def test_floors_of_quality_alone_need_no_texts():
    examples = examples_of(FOLDS, c=np.nan, prompt="")
    known = {fold: {"image": part["image"]} for fold, part in knowledge(examples).items()}
    found = floors_of(examples, known)
    assert set(found) == {"mean", "generator_mean", "image_statistics", "ridge_probe"}
    assert all(set(row) == keys("q") for row in found.values())


def test_floors_by_prompt_and_by_levels_are_there_where_they_can_be():
    examples = examples_of(FOLDS, prompt=[f"thing {i % 10}" for i in range(len(FOLDS))])
    known = knowledge(examples, levels=True)
    found = floors_of(examples, known)
    assert {"prompt_mean", "generator_and_prompt_mean", "zero_shot_levels"} < set(found)
    expected = metrics.agreement(naive_means(examples, "c", ["prompt"]), examples.mos("c", "test"))
    assert {name: found["prompt_mean"][f"{name}_c"] for name in MEASURES} == pytest.approx(expected)
    for name in ("srocc", "plcc"):
        measure = getattr(metrics, name)
        level = measure(known["test"]["level_q"], examples.mos("q", "test"))
        assert found["zero_shot_levels"][f"{name}_q"] == pytest.approx(level)


def test_what_is_planted_in_features_shows_in_its_floor_only():
    folds = ["train"] * 150 + ["val"] * 8 + ["test"] * 40
    examples = examples_of(folds)
    known, statistics = knowledge(examples), np.random.default_rng(5).normal(size=(len(folds), 3))
    rows = {"train_eval": examples.rows("train"), "val": examples.rows("val"), "test": examples.rows("test")}
    table = examples.table
    table["q"] = statistics @ [0.2, 0.3, -0.1] + 3
    for fold, part in known.items():  # consistency: how image and text go together, which no image tells alone
        table.loc[rows[fold], "c"] = (part["image"] * part["text"])[:, :2].sum(axis=1) / 5 + 3
    found = floors_of(examples, known, statistics)
    assert found["image_statistics"]["srocc_q"] > 0.99 > 0.6 > abs(found["ridge_probe"]["srocc_q"])
    assert found["ridge_probe"]["srocc_c"] > 0.9 > 0.6 > abs(found["image_statistics"]["srocc_c"])
    expected = metrics.srocc(known["test"]["cos"], examples.mos("c", "test"))
    assert found["zero_shot_cosine"]["srocc_c"] == pytest.approx(expected)
    assert abs(expected) < 0.6


@pytest.mark.parametrize("base", ["probe", "cosine"])
def test_the_probe_is_there_whatever_consistency_starts_from(base):
    examples = examples_of(FOLDS)
    known = knowledge(examples, stage_width=3)
    fitted = probes.fit_base(known, examples, stage_width=3, base=base)
    found = floors.floors(examples, fitted, known, np.random.default_rng(5).normal(size=(len(FOLDS), 3)))
    for task, scores in fitted.probes(known["test"]).items():
        assert found["ridge_probe"][f"plcc_{task}"] == pytest.approx(metrics.plcc(scores, examples.mos(task, "test")))
    expected = metrics.plcc(known["test"]["cos"], examples.mos("c", "test"))
    assert found["zero_shot_cosine"]["plcc_c"] == pytest.approx(expected)
