"""`reporting.py`: known answers on predictions made by hand, floors against plain loops, and what the tables say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

import calibration
import data
import metrics
import reporting
import scores
from images import ImageFile
from scores import TASKS

MOS = data.LabelScale(1.0, 5.0)
MEASURES = ("srocc", "plcc", "plcc_fit", "krocc", "rmse")


def examples_of(
    folds: Sequence[str], scales: dict[str, data.LabelScale] | None = None, **columns: Any
) -> data.Examples:
    """Examples without images; what a column does not say is random and differs for each row."""
    rng = np.random.default_rng(len(folds))
    size = len(folds)
    usual = {
        "name": [f"{i}.png" for i in range(size)],
        "prompt": [f"thing {i}" for i in range(size)],
        "group": "",
        "reference": "",
        "set": "csv",
        "q": rng.uniform(1, 5, size),
        "c": rng.uniform(1, 5, size),
    }
    table = pd.DataFrame({**usual, **columns})
    known = {task: MOS for task in ("q", "c", "authenticity") if task in table and table[task].notna().any()}
    files = [ImageFile(Path(name), name, (8, 8)) for name in table["name"]]
    return data.Examples(table, np.array(folds), scales or known, files, "")


def guesses(examples: data.Examples, fold: str = "test", seed: int = 0) -> dict[str, np.ndarray]:
    """Predictions in MOS units that have something to do with the labels."""
    rng = np.random.default_rng(seed)
    return {
        task: np.nan_to_num(examples.mos(task, fold), nan=3.0) + rng.normal(size=len(examples.rows(fold)))
        for task in examples.scales
    }


FOLDS = ["train"] * 20 + ["val"] * 8 + ["test"] * 40
AUTHENTICITY = np.linspace(1, 5, len(FOLDS))


@pytest.fixture
def joined() -> data.Examples:
    """Two data sets, interleaved: one with q, c and authenticity, one with q alone; some labels are missing."""
    examples = examples_of(FOLDS, set=["both", "photos"] * (len(FOLDS) // 2), authenticity=AUTHENTICITY)
    table = examples.table
    table.loc[table["set"] == "photos", ["c", "authenticity"]] = np.nan
    table.loc[[30, 33, 35, 52], "q"] = np.nan
    return examples


# -- agreement


def test_agreement_on_one_data_set_is_that_of_its_labels():
    examples = examples_of(FOLDS, authenticity=AUTHENTICITY)
    examples.table.loc[[29, 40], "q"] = np.nan
    for fold in ("val", "test"):
        scores = guesses(examples, fold)
        expected = {}
        for task in ("q", "c", "authenticity"):
            known = ~np.isnan(examples.mos(task, fold))
            measured = metrics.agreement(scores[task][known], examples.mos(task, fold)[known])
            expected |= {f"{name}_{task}": value for name, value in measured.items()}
        found = reporting.agreements(scores, fold, examples)
        of_two = [expected[f"{name}_{task}"] for task in "qc" for name in ("srocc", "plcc")]
        assert found == pytest.approx({**expected, "main": np.mean(of_two)}, abs=1e-12)


def test_agreement_on_several_is_the_mean_over_those_that_have_the_score(joined):
    scores = guesses(joined)
    rows = joined.rows("test")
    parts: dict[str, list[dict[str, float]]] = {"q": [], "c": [], "authenticity": []}
    for title, tasks in (("both", ("q", "c", "authenticity")), ("photos", ("q",))):
        for task in tasks:
            mos = joined.table[task].to_numpy()[rows]
            keep = (joined.table["set"].to_numpy()[rows] == title) & ~np.isnan(mos)
            parts[task].append(metrics.agreement(scores[task][keep], mos[keep]))
    found = reporting.agreements(scores, "test", joined)
    for task, measured in parts.items():
        for name in MEASURES:
            assert found[f"{name}_{task}"] == pytest.approx(np.mean([part[name] for part in measured])), (name, task)
    of_two = [found[f"{name}_{task}"] for task in "qc" for name in ("srocc", "plcc")]
    assert found["main"] == pytest.approx(np.mean(of_two))
    assert len(found) == 16


def test_the_main_score_takes_quality_and_consistency_only():
    examples = examples_of(FOLDS, authenticity=AUTHENTICITY)
    scores = guesses(examples)
    worse = {**scores, "authenticity": -scores["authenticity"]}
    found, changed = (reporting.agreements(each, "test", examples) for each in (scores, worse))
    assert changed["srocc_authenticity"] == pytest.approx(-found["srocc_authenticity"])
    assert changed["main"] == found["main"]
    alone = reporting.agreements({"c": scores["c"]}, "test", examples)
    assert set(alone) == {f"{name}_c" for name in MEASURES} | {"main"}
    assert alone["main"] == pytest.approx((alone["srocc_c"] + alone["plcc_c"]) / 2)
    assert "main" not in reporting.agreements({"authenticity": scores["authenticity"]}, "test", examples)


def test_scores_without_labels_stay_out_of_mos_units():
    scales = {"q": data.LabelScale(0.0, 100.0), "c": MOS}
    examples = examples_of(FOLDS, scales)
    half = {"q": np.array([0.5]), "c": np.array([0.5]), "authenticity": np.array([0.5])}
    assert reporting.in_mos_units(half, examples) == {"q": np.array([50.0]), "c": np.array([3.0])}


# -- certainty


def test_perfect_predictions_are_certain():
    examples = examples_of(["test"] * 12, prompt=[f"thing {i // 3}" for i in range(12)], c=np.nan)
    found = reporting.certainty({"q": examples.mos("q", "test")}, examples)["q"]
    assert found["intervals"] == {"srocc": [1, 1], "plcc": [pytest.approx(1), pytest.approx(1)]}
    assert found["within_prompt"] == {"accuracy": 1.0, "pairs": 4 * 3}
    assert (found["slope"], found["bias"]) == (pytest.approx(1), pytest.approx(0))


def test_what_correlations_do_not_tell_is_told():
    """Right between prompts and wrong within; then too narrow and too high."""
    quality = np.array([1.0, 1.1, 1.2, 3.0, 3.1, 3.2, 4.0, 4.1])
    prompts = ["a", "a", "A", "b", "b", "b", "c", "c"]
    examples = examples_of(["test"] * 8, prompt=prompts, q=quality, c=np.nan)
    reversed_within = np.array([1.2, 1.1, 1.0, 3.2, 3.1, 3.0, 4.1, 4.0])
    found = reporting.certainty({"q": reversed_within}, examples)["q"]
    assert found["within_prompt"] == {"accuracy": 0.0, "pairs": 3 + 3 + 1}
    found = reporting.certainty({"q": quality / 2 + 4}, examples)["q"]
    assert (found["slope"], found["bias"]) == (pytest.approx(2), pytest.approx(np.mean(4 - quality / 2)))


def test_intervals_are_those_of_resampled_prompts_and_of_references_without_prompts():
    prompts, references = [f"thing {i // 4}" for i in range(40)], [f"r{i // 4}" for i in range(40)]
    codes = [i // 4 for i in range(40)]
    for columns in ({"prompt": prompts}, {"prompt": "", "reference": references}):
        examples = examples_of(["test"] * 40, **columns)
        examples.table.loc[[3, 17], "q"] = np.nan
        scores = guesses(examples)
        keep = examples.table["q"].notna().to_numpy()
        ends = metrics.cluster_bootstrap(
            scores["q"][keep], examples.mos("q", "test")[keep], np.array(codes)[keep].tolist()
        )
        found = reporting.certainty(scores, examples)
        assert found["q"]["intervals"] == {name: list(pair) for name, pair in ends.items()}
        assert found["q"]["within_prompt"]["pairs"] == 8 * 6 + 2 * 3
        assert found["c"]["within_prompt"]["pairs"] == 10 * 6


def test_one_prompt_alone_has_no_intervals_and_single_images_no_pairs():
    one = examples_of(["test"] * 6, prompt="a", c=np.nan)
    assert reporting.certainty(guesses(one), one)["q"]["intervals"] == {}
    apart = examples_of(["test"] * 6, c=np.nan)
    assert reporting.certainty(guesses(apart), apart)["q"]["within_prompt"] == {"accuracy": None, "pairs": 0}


# -- findings


def label_units(scores: dict[str, np.ndarray], examples: data.Examples) -> dict[str, np.ndarray]:
    return {task: scale.to_unit(scores[task]) for task, scale in examples.scales.items()}


def close(found: Any, expected: Any) -> None:
    """Equal but for rounding, whatever they are made of."""
    pd.testing.assert_frame_equal(pd.json_normalize([found]), pd.json_normalize([expected]), rtol=1e-9)


def test_findings_of_one_data_set_are_its_certainty_and_generators():
    examples = examples_of(FOLDS, group=["a", "b"] * (len(FOLDS) // 2))
    scores = guesses(examples)
    found = reporting.findings(label_units(scores, examples), examples)
    assert found["sets"] == {} and set(found["generators"]) == {"q", "c"}
    close(found["certainty"], reporting.certainty(scores, examples))
    close(found["generators"], reporting.generators(scores, examples))


def test_findings_of_several_are_told_for_each_by_itself(joined):
    joined.table["group"] = ["a", "a", "b", "b"] * (len(FOLDS) // 4)
    scores = guesses(joined)
    found = reporting.findings(label_units(scores, joined), joined)
    assert found["certainty"] == found["generators"] == {} and list(found["sets"]) == ["both", "photos"]
    assert list(found["sets"]["photos"]["certainty"]) == list(found["sets"]["photos"]["generators"]) == ["q"]
    here = joined.table["set"].to_numpy()[joined.rows("test")]
    for title, part in found["sets"].items():
        own = {task: values[here == title] for task, values in scores.items()}
        alone = joined.only(title)
        assert part["test"] == pytest.approx(reporting.agreements(own, "test", alone))
        close(part["certainty"], reporting.certainty(own, alone))
        close(part["generators"], reporting.generators(own, alone))
    assert set(found["sets"]["photos"]["test"]) == {f"{name}_q" for name in MEASURES} | {"main"}


# -- generators


ENOUGH = reporting.MIN_PER_GENERATOR
MAKERS = ["good"] * ENOUGH + ["bad"] * ENOUGH + ["few"] * (ENOUGH - 1) + [""] * ENOUGH


def by_makers() -> tuple[data.Examples, np.ndarray]:
    """Predictions that order one generator's images right and another's backwards."""
    quality = np.arange(len(MAKERS)) / 10 + 1
    pred = quality.copy()
    pred[ENOUGH : 2 * ENOUGH] = pred[ENOUGH : 2 * ENOUGH][::-1]
    return examples_of(["test"] * len(MAKERS), group=MAKERS, q=quality, c=np.nan), pred + 0.25


def test_the_worst_generator_comes_first_and_small_and_nameless_ones_are_left_out():
    examples, pred = by_makers()
    table = reporting.generator_table(pred, examples.mos("q", "test"), np.array(MAKERS))
    assert table["generator"].tolist() == ["bad", "good"]
    assert table["images"].tolist() == [ENOUGH, ENOUGH]
    for measure in ("srocc", "plcc"):
        assert table[measure].tolist() == [pytest.approx(-1), pytest.approx(1)]
    means = examples.table.groupby("group")["q"].mean()[["bad", "good"]]
    np.testing.assert_allclose(table["mos"], means)
    np.testing.assert_allclose(table["pred"], means + 0.25)
    found = reporting.generators({"q": pred}, examples)
    assert list(found) == ["q"] and found["q"]["worst"] == "bad"
    assert found["q"]["by_generator"] == table.to_dict("records")
    assert found["q"]["ranking"] == pytest.approx(1)


def test_the_ranking_is_that_of_the_generators_means():
    examples, pred = by_makers()
    upside_down = pred - 10 * (np.array(MAKERS) == "bad")
    assert reporting.generators({"q": upside_down}, examples)["q"]["ranking"] == pytest.approx(-1)


def test_images_without_a_label_do_not_count_for_their_generator():
    examples, pred = by_makers()
    examples.table.loc[0, "q"] = np.nan  # "good" has one too few now, and "bad" is alone
    assert reporting.generators({"q": pred}, examples) == {}


def test_a_single_generator_is_compared_with_nobody():
    examples = examples_of(["test"] * 40, group="one")
    assert reporting.generators(guesses(examples), examples) == {}
    assert reporting.generator_table(np.ones(3), np.arange(3.0), np.array(["a"] * 3)).empty


# -- floors without pixels


@st.composite
def grouped_examples(draw: st.DrawFn) -> data.Examples:
    """Small examples in random folds with generators, prompts and gaps."""
    size = draw(st.integers(8, 24))
    draws = {
        name: draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
        for name, values in {"fold": ["train", "val", "test"], "group": "xyz", "prompt": "abcdefg", "set": "st"}.items()
    }
    folds = ["train", "train", "test", "test", *draws.pop("fold")[4:]]
    quality = draw(st.lists(st.sampled_from([1.0, 2.0, 3.5, 5.0, np.nan]), min_size=size, max_size=size))
    return examples_of(folds, {"q": MOS, "c": MOS}, q=[1.5, 2.5, *quality[2:]], **draws)


def naive_means(examples: data.Examples, task: str, keys: Sequence[str]) -> np.ndarray:
    """For each test image the mean label of the training images alike in `keys`, or of all of them."""
    table = examples.table.assign(fold=examples.folds)
    train = table[(table["fold"] == "train") & table[task].notna()]
    found = []
    for _, row in table[table["fold"] == "test"].iterrows():
        alike = [
            label for _, other in train.iterrows() for label in [other[task]] if all(other[k] == row[k] for k in keys)
        ]
        found.append(np.mean(alike or train[task]))
    return np.array(found)


@settings(max_examples=60)
@given(grouped_examples())
def test_floors_without_pixels_are_group_means_of_the_training_fold(examples):
    found = reporting.pixel_free(examples)
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
    assert "prompt_mean" in reporting.pixel_free(examples_of(folds, prompt=[*"abcd", " A", *"efg"]))
    assert "prompt_mean" not in reporting.pixel_free(examples_of(folds, prompt="", c=np.nan))


# -- floors from features


def planted(size: int = 60) -> tuple[data.Examples, np.ndarray]:
    """Labels that are a linear function of three of five features."""
    rng = np.random.default_rng(4)
    features = rng.normal(size=(size, 5))
    folds = ["train"] * (size // 2) + ["test"] * (size - size // 2)
    quality = features @ [0.5, -0.25, 0.1, 0, 0] + 3
    return examples_of(folds, prompt=[f"thing {i // 2}" for i in range(size)], q=quality), features


def ridge_q(examples: data.Examples, features: np.ndarray) -> np.ndarray:
    train, test = examples.rows("train"), examples.rows("test")
    return reporting.ridge_scores(examples, features[train], features[test], ["q"])["q"]


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


def test_ridge_scores_are_those_of_sklearns_search_over_whole_prompts_of_labelled_images():
    rng = np.random.default_rng(1)
    examples, features = planted(120)
    train, test = examples.rows("train"), examples.rows("test")
    examples.table.loc[train, "q"] += rng.normal(size=len(train))  # so that the penalty matters
    examples.table.loc[train[::7], "q"] = np.nan
    keep = examples.table["q"].notna().to_numpy()[train]
    centre, spread = features[train].mean(axis=0), features[train].std(axis=0) * np.sqrt(5)
    fit, held = (features[train] - centre) / spread, (features[test] - centre) / spread
    prompts = examples.table["prompt"].to_numpy()[train][keep]
    folds = list(GroupKFold(calibration.NUM_FOLDS).split(fit[keep], groups=pd.factorize(prompts)[0]))
    search = RidgeCV(calibration.PENALTIES, cv=folds, scoring="neg_mean_squared_error")
    search.fit(fit[keep], examples.mos("q", "train")[keep])
    np.testing.assert_allclose(ridge_q(examples, features), search.predict(held), rtol=1e-6)


# -- what CLIP knows


def knowledge(examples: data.Examples, width: int = 6, *, levels: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """Random embeddings of each fold, as a frozen CLIP would give them."""
    rng = np.random.default_rng(2)
    known = {}
    for name, fold in (("train_eval", "train"), ("val", "val"), ("test", "test")):
        size = len(examples.rows(fold))
        image, text = rng.normal(size=(2, size, width))
        known[name] = {"image": image, "text": text, "cos": rng.uniform(0.1, 0.4, size)}
        if levels:
            known[name] |= {f"level_{task}": rng.uniform(size=size) for task in ("q", "c")}
    return known


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
    base = reporting.fit_base(known, examples)
    train = known["train_eval"]
    units = {task: values[:20] for task, values in examples.unit_targets.items()}
    groups = prompt_of[:20]
    keep = ~np.isnan(units["q"])
    weights, bias = calibration.fit_quality(train["image"][keep], units["q"][keep], groups[keep])
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
    again = reporting.fit_base(known, replace(examples, table=changed))
    assert again.cosine == base.cosine and again.levels == base.levels


def test_without_levels_heads_start_from_probe_and_cosine():
    examples = examples_of(FOLDS)
    known = knowledge(examples)
    base = reporting.fit_base(known, examples)
    assert base.levels == {} and base.quality is base.images["q"] and base.consistency is base.cosine
    found = base.scores(known["test"])
    assert list(found) == ["q", "c"]
    logit = known["test"]["image"] @ base.images["q"][0] + base.images["q"][1]
    np.testing.assert_allclose(found["q"], 1 / (1 + np.exp(-logit)))
    np.testing.assert_array_equal(found["c"], known["test"]["cos"])
    of_quality = examples_of(FOLDS, c=np.nan)
    base = reporting.fit_base(known, of_quality)
    assert base.consistency is None and list(base.scores(known["test"])) == ["q"]


def floors_of(examples: data.Examples, known=None, statistics=None) -> dict[str, dict[str, float]]:
    known = known or knowledge(examples)
    if statistics is None:
        statistics = np.random.default_rng(5).normal(size=(len(examples.table), 3))
    return reporting.floors(examples, reporting.fit_base(known, examples), known, statistics)


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
    examples = examples_of(FOLDS)
    known, statistics = knowledge(examples), np.random.default_rng(5).normal(size=(len(FOLDS), 3))
    rows = {"train_eval": examples.rows("train"), "val": examples.rows("val"), "test": examples.rows("test")}
    table = examples.table
    table["q"] = statistics @ [0.2, 0.3, -0.1] + 3
    for fold, part in known.items():  # consistency: how image and text go together, which no image tells alone
        table.loc[rows[fold], "c"] = (part["image"] * part["text"])[:, :2].sum(axis=1) / 5 + 3
    found = floors_of(examples, known, statistics)
    assert found["image_statistics"]["srocc_q"] > 0.99 > 0.6 > abs(found["ridge_probe"]["srocc_q"])
    assert found["ridge_probe"]["srocc_c"] > 0.9 > 0.6 > abs(found["image_statistics"]["srocc_c"])
    for part in known.values():
        part["cos"] = -part["cos"]
    flipped = floors_of(examples, known, statistics)
    expected = metrics.srocc(known["test"]["cos"], examples.mos("c", "test"))
    assert flipped["zero_shot_cosine"]["srocc_c"] == pytest.approx(expected)
    assert flipped["zero_shot_cosine"]["srocc_c"] == pytest.approx(-found["zero_shot_cosine"]["srocc_c"])
    assert flipped["ridge_probe"] == found["ridge_probe"]


# -- tables


def test_predictions_are_listed_in_mos_units_with_what_is_known_of_each_image():
    folds = ["test", "train", "val", "train", "test", "val"]
    columns = {
        "prompt": ["a", "", "b", "B", "", "c"],
        "group": list("xyzxyz"),
        "reference": ["", "r", "", "", "r", ""],
        "mos_beauty": [1.0, np.nan, 3.0, 4.0, 5.0, 2.0],
        "authenticity": [2.0, 3.0, 4.0, 5.0, 1.0, 1.5],
    }
    hundred = data.LabelScale(0.0, 100.0)
    scales = {"q": MOS, "c": MOS, "mos_beauty": MOS, "authenticity": hundred}
    examples = examples_of(folds, scales, **columns)
    examples.table.loc[[1, 4], "c"] = np.nan
    units = {task: np.linspace(0, 1, 6) * (0.5 if task == "q" else 1) for task in scales}
    scores = {
        name: {task: values[examples.folds == name.removesuffix("_eval")] for task, values in units.items()}
        for name in ("val", "train_eval", "test")
    }
    table = reporting.prediction_table(scores, examples)
    texts = ["name", "set", "split", "prompt", "generator", "cluster"]
    pairs = [f"{side}_{score}" for score in ("quality", "align", "beauty", "authenticity") for side in ("mos", "pred")]
    assert list(table.columns) == [*texts, *pairs]
    assert table["name"].tolist() == examples.table["name"].tolist()
    assert table["split"].tolist() == folds
    assert table["prompt"].tolist() == columns["prompt"] and table["generator"].tolist() == columns["group"]
    assert table["cluster"].tolist() == data.clusters(examples.table).tolist()
    for task, score in (("q", "quality"), ("c", "align"), ("mos_beauty", "beauty"), ("authenticity", "authenticity")):
        np.testing.assert_array_equal(table[f"mos_{score}"], examples.table[task])
        expected = scales[task].to_mos(units[task])
        if task == "c":
            expected[[1, 4]] = np.nan  # nothing to be consistent with
        np.testing.assert_allclose(table[f"pred_{score}"], expected)


def test_a_score_without_labels_has_empty_columns():
    examples = examples_of(["test"] * 4, c=np.nan)
    table = reporting.prediction_table({"test": {"q": np.zeros(4), "c": np.zeros(4)}}, examples)
    assert table[["mos_align", "pred_align"]].isna().all(axis=None)
    assert table["pred_quality"].tolist() == [1.0] * 4


def row_of(seed: int, *tasks: str) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {f"{name}_{task}": float(rng.uniform(-1, 1)) for task in tasks for name in MEASURES}


def test_the_table_of_scores_has_a_line_for_each_predictor_that_gives_the_score():
    rows = {"trained model": row_of(0, "q", "c"), "zero_shot_cosine": row_of(1, "c"), "mean": row_of(2, "q", "c")}
    lines = reporting.score_table(rows, ["q", "c"])
    assert lines[0].split() == " ".join(scores.MEASURES.values()).split()
    expected = []
    for title, task, names in (
        ("quality", "q", ["trained model", "mean"]),
        ("consistency", "c", ["trained model", "zero_shot_cosine", "mean"]),
    ):
        for name in names:
            numbers = [f"{rows[name][f'{measure}_{task}']:.3f}" for measure in MEASURES]
            expected.append([*([title] if name == names[0] else []), *name.replace("_", " ").split(), *numbers])
    assert [line.split() for line in lines[1:]] == expected
    assert len({len(line) for line in lines}) == 1


def test_the_table_of_generators_has_both_scores_of_each():
    examples, pred = by_makers()
    examples = replace(examples, table=examples.table.assign(c=examples.table["q"] / 2), scales={"q": MOS, "c": MOS})
    examples.table.loc[0, "c"] = np.nan  # "good" has one too few
    examples.table.loc[examples.table["group"] == "few", "group"] = "bad"
    examples.table.loc[examples.table["group"] == "", "group"] = "other"
    found = reporting.generators({"q": pred, "c": pred / 2}, examples)
    lines = reporting.generator_lines(found)
    of_c = {row["generator"]: row for row in found["c"]["by_generator"]}
    expected = []
    for row in found["q"]["by_generator"]:
        name = row["generator"]
        expected.append([name, str(row["images"])])
        for own in [row, *([of_c[name]] if name in of_c else [])]:
            expected[-1] += [f"{own['srocc']:.3f}", f"{own['mos']:.2f}", f"{own['pred']:.2f}"]
    assert [line.split() for line in lines[1:-1]] == expected
    assert [len(row) for row in expected] == [8, 5, 8] and expected[0][0] == "bad"
    assert " ".join(lines[0].split()) == "SROCC by generator images quality MOS pred consistency MOS pred"
    rankings = ", ".join(f"{title} {found[task]['ranking']:.3f}" for task, title in TASKS.items())
    assert lines[-1] == f"SROCC of the generators' means: {rankings}"
    assert reporting.generator_lines({}) == []


def test_of_many_generators_the_worst_are_shown_and_the_others_counted():
    shown = reporting.MAX_GENERATORS_SHOWN
    names = [f"g{i:02}" for i in range(shown + 3) for _ in range(ENOUGH)]
    examples = examples_of(["test"] * len(names), group=names, c=np.nan)
    found = reporting.generators(guesses(examples), examples)
    lines = reporting.generator_lines(found)
    worst = [row["generator"] for row in found["q"]["by_generator"][:shown]]
    assert [line.split()[0] for line in lines[1 : shown + 1]] == worst
    assert lines[shown + 1] == "... and 3 more in results.json"
    assert len(lines) == shown + 3


def test_certainty_in_words():
    part = {
        "intervals": {"srocc": [0.1, 0.25], "plcc": [-0.5, 0.5]},
        "within_prompt": {"accuracy": 0.625, "pairs": 8},
        "slope": 1.25,
        "bias": -0.125,
    }
    bare = {"intervals": {}, "within_prompt": {"accuracy": None, "pairs": 0}, "slope": 0.5, "bias": 2.0}
    assert reporting.certainty_lines({"q": part, "authenticity": bare}) == [
        "quality: 95 % intervals over prompts: SROCC 0.100 .. 0.250, PLCC -0.500 .. 0.500; "
        "pairs of one prompt ordered right: 62.5%; slope 1.25, bias -0.12",
        "authenticity: slope 0.50, bias +2.00",
    ]


def test_a_line_on_an_epoch_names_every_score():
    row = {
        "epoch": 3,
        "loss": 0.12345,
        "loss_q": 0.1,
        "loss_c": 0.2,
        "loss_beauty": 0.3,
        "val_loss": 0.5,
        "lr": 3e-5,
        "images_per_s": 123.4,
        "data_wait": 0.25,
        "seconds": 9.87,
    }
    row |= {"val_srocc_q": 0.61, "val_srocc_c": 0.62, "val_srocc_beauty": 0.63}
    row |= {"val_plcc_q": 0.71, "val_plcc_c": 0.72, "val_plcc_beauty": 0.73}
    line = reporting.epoch_line(row, 20)
    assert line == (
        "epoch  3/20  loss 0.1235 (q 0.100 c 0.200 beauty 0.300)  val 0.5000  "
        "SROCC q 0.610 c 0.620 beauty 0.630  PLCC q 0.710 c 0.720 beauty 0.730  "
        "lr 3.0e-05  123 img/s, waited 25%  9.9 s"
    )
    assert "beauty 0.300 exp 0.900)" in reporting.epoch_line({**row, "loss_exp": 0.9}, 20)


def results_of(examples: data.Examples) -> dict[str, Any]:
    """Results as a run gathers them."""
    scores, known = guesses(examples), knowledge(examples)
    base = reporting.fit_base(known, examples)
    statistics = np.random.default_rng(0).normal(size=(len(examples.table), 3))
    return {
        "best_epoch": 4,
        "epochs": 7,
        "seconds": 61.6,
        "test": reporting.agreements(scores, "test", examples),
        "base": {"test": reporting.agreements(base.scores(known["test"]), "test", examples)},
        "floors": reporting.floors(examples, base, known, statistics),
        **reporting.findings(label_units(scores, examples), examples),
    }


def test_the_results_of_one_data_set_in_text():
    examples = examples_of(FOLDS, group=["a", "b"] * (len(FOLDS) // 2), authenticity=AUTHENTICITY)
    results = results_of(examples)
    lines = reporting.results_table(results, examples).splitlines()
    assert lines[0] == "test fold: 40 images, weights of epoch 4 of 7, 62 s in all"
    rows = {"trained model": results["test"], **results["floors"]}
    parts = [
        *reporting.score_table(rows, ["q", "c", "authenticity"]),
        *reporting.certainty_lines(results["certainty"]),
        *reporting.generator_lines(results["generators"]),
    ]
    assert lines[1:-2] == parts
    gains = [results["test"][f"srocc_{task}"] - results["base"]["test"][f"srocc_{task}"] for task in examples.scales]
    assert lines[-2].endswith("quality {:+.3f}, consistency {:+.3f}, authenticity {:+.3f}".format(*gains))
    assert lines[-1] == f"main score (mean of SROCC and PLCC): {results['test']['main']:.3f}"


def test_the_results_of_several_data_sets_have_a_line_for_each(joined):
    results = results_of(joined)
    text = reporting.results_table(results, joined)
    table = [line.split() for line in text.splitlines()]
    for title, tasks in (("both", "qc"), ("photos", "q")):
        part = results["sets"][title]
        for task in tasks:
            numbers = [f"{part['test'][f'{name}_{task}']:.3f}" for name in MEASURES]
            assert ["on", title, *numbers] in table
        for line in reporting.certainty_lines(part["certainty"]):
            assert f"{title}: {line}" in text.splitlines()
    assert sum(row[:2] == ["on", "photos"] for row in table) == 1
    assert sum(row[:2] == ["on", "both"] for row in table) == 3
