"""Agreement, certainty and generators: known answers on predictions made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_examples import (
    AUTHENTICITY,
    ENOUGH,
    FOLDS,
    MAKERS,
    MEASURES,
    MOS,
    by_makers,
    examples_of,
    guesses,
    joined_examples,
    label_units,
)

from evaluation import agreement, metrics
from sources.examples import LabelScale, clusters

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
        found = agreement.agreements(scores, fold, examples)
        of_two = [expected[f"{name}_{task}"] for task in "qc" for name in ("srocc", "plcc")]
        assert found == pytest.approx({**expected, "main": np.mean(of_two)}, abs=1e-12)


def test_agreement_on_several_is_the_mean_over_those_that_have_the_score():
    joined = joined_examples()
    scores = guesses(joined)
    rows = joined.rows("test")
    parts: dict[str, list[dict[str, float]]] = {"q": [], "c": [], "authenticity": []}
    for title, tasks in (("both", ("q", "c", "authenticity")), ("photos", ("q",))):
        for task in tasks:
            mos = joined.table[task].to_numpy()[rows]
            keep = (joined.table["set"].to_numpy()[rows] == title) & ~np.isnan(mos)
            parts[task].append(metrics.agreement(scores[task][keep], mos[keep]))
    found = agreement.agreements(scores, "test", joined)
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
    found, changed = (agreement.agreements(each, "test", examples) for each in (scores, worse))
    assert changed["srocc_authenticity"] == pytest.approx(-found["srocc_authenticity"])
    assert changed["main"] == found["main"]
    alone = agreement.agreements({"c": scores["c"]}, "test", examples)
    assert set(alone) == {f"{name}_c" for name in MEASURES} | {"main"}
    assert alone["main"] == pytest.approx((alone["srocc_c"] + alone["plcc_c"]) / 2)
    assert "main" not in agreement.agreements({"authenticity": scores["authenticity"]}, "test", examples)


def test_scores_without_labels_stay_out_of_mos_units():
    scales = {"q": LabelScale(0.0, 100.0), "c": MOS}
    examples = examples_of(FOLDS, scales)
    half = {"q": np.array([0.5]), "c": np.array([0.5]), "authenticity": np.array([0.5])}
    assert agreement.in_mos_units(half, examples) == {"q": np.array([50.0]), "c": np.array([3.0])}


# -- certainty


def test_perfect_predictions_are_certain():
    examples = examples_of(["test"] * 12, prompt=[f"thing {i // 3}" for i in range(12)], c=np.nan)
    found = agreement.certainty({"q": examples.mos("q", "test")}, examples)["q"]
    assert found["intervals"] == {"srocc": [1, 1], "plcc": [pytest.approx(1), pytest.approx(1)]}
    assert found["within_prompt"] == {"accuracy": 1.0, "pairs": 4 * 3}
    assert (found["slope"], found["bias"]) == (pytest.approx(1), pytest.approx(0))


def test_what_correlations_do_not_tell_is_told():
    """Right between prompts and wrong within; then too narrow and too high."""
    quality = np.array([1.0, 1.1, 1.2, 3.0, 3.1, 3.2, 4.0, 4.1])
    prompts = ["a", "a", "A", "b", "b", "b", "c", "c"]
    examples = examples_of(["test"] * 8, prompt=prompts, q=quality, c=np.nan)
    reversed_within = np.array([1.2, 1.1, 1.0, 3.2, 3.1, 3.0, 4.1, 4.0])
    found = agreement.certainty({"q": reversed_within}, examples)["q"]
    assert found["within_prompt"] == {"accuracy": 0.0, "pairs": 3 + 3 + 1}
    found = agreement.certainty({"q": quality / 2 + 4}, examples)["q"]
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
        found = agreement.certainty(scores, examples)
        assert found["q"]["intervals"] == {name: list(pair) for name, pair in ends.items()}
        assert found["q"]["within_prompt"]["pairs"] == 8 * 6 + 2 * 3
        assert found["c"]["within_prompt"]["pairs"] == 10 * 6


def test_one_prompt_alone_has_no_intervals_and_single_images_no_pairs():
    one = examples_of(["test"] * 6, prompt="a", c=np.nan)
    assert agreement.certainty(guesses(one), one)["q"]["intervals"] == {}
    apart = examples_of(["test"] * 6, c=np.nan)
    assert agreement.certainty(guesses(apart), apart)["q"]["within_prompt"] == {"accuracy": None, "pairs": 0}


# -- findings


def close(found: Any, expected: Any) -> None:
    """Equal but for rounding, whatever they are made of."""
    pd.testing.assert_frame_equal(pd.json_normalize([found]), pd.json_normalize([expected]), rtol=1e-9)


def test_findings_of_one_data_set_are_its_certainty_and_generators():
    examples = examples_of(FOLDS, group=["a", "b"] * (len(FOLDS) // 2))
    scores = guesses(examples)
    found = agreement.test_findings(label_units(scores, examples), examples)
    assert found["sets"] == {} and set(found["generators"]) == {"q", "c"}
    close(found["certainty"], agreement.certainty(scores, examples))
    close(found["generators"], agreement.generators(scores, examples))


def test_findings_of_several_are_told_for_each_by_itself():
    joined = joined_examples()
    joined.table["group"] = ["a", "a", "b", "b"] * (len(FOLDS) // 4)
    scores = guesses(joined)
    found = agreement.test_findings(label_units(scores, joined), joined)
    assert found["certainty"] == found["generators"] == {} and list(found["sets"]) == ["both", "photos"]
    assert list(found["sets"]["photos"]["certainty"]) == list(found["sets"]["photos"]["generators"]) == ["q"]
    here = joined.table["set"].to_numpy()[joined.rows("test")]
    for title, part in found["sets"].items():
        own = {task: values[here == title] for task, values in scores.items()}
        alone = joined.only(title)
        assert part["test"] == pytest.approx(agreement.agreements(own, "test", alone))
        close(part["certainty"], agreement.certainty(own, alone))
        close(part["generators"], agreement.generators(own, alone))
    assert set(found["sets"]["photos"]["test"]) == {f"{name}_q" for name in MEASURES} | {"main"}


# -- generators


def test_the_worst_generator_comes_first_and_small_and_nameless_ones_are_left_out():
    examples, pred = by_makers()
    table = agreement.generator_table(pred, examples.mos("q", "test"), np.array(MAKERS))
    assert table["generator"].tolist() == ["bad", "good"]
    assert table["images"].tolist() == [ENOUGH, ENOUGH]
    for measure in ("srocc", "plcc"):
        assert table[measure].tolist() == [pytest.approx(-1), pytest.approx(1)]
    means = examples.table.groupby("group")["q"].mean()[["bad", "good"]]
    np.testing.assert_allclose(table["mos"], means)
    np.testing.assert_allclose(table["pred"], means + 0.25)
    found = agreement.generators({"q": pred}, examples)
    assert list(found) == ["q"] and found["q"]["worst"] == "bad"
    assert found["q"]["by_generator"] == table.to_dict("records")
    assert found["q"]["ranking"] == pytest.approx(1)


def test_the_ranking_is_that_of_the_generators_means():
    examples, pred = by_makers()
    upside_down = pred - 10 * (np.array(MAKERS) == "bad")
    assert agreement.generators({"q": upside_down}, examples)["q"]["ranking"] == pytest.approx(-1)


def test_images_without_a_label_do_not_count_for_their_generator():
    examples, pred = by_makers()
    examples.table.loc[0, "q"] = np.nan  # "good" has one too few now, and "bad" is alone
    assert agreement.generators({"q": pred}, examples) == {}


def test_a_single_generator_is_compared_with_nobody():
    examples = examples_of(["test"] * 40, group="one")
    assert agreement.generators(guesses(examples), examples) == {}
    assert agreement.generator_table(np.ones(3), np.arange(3.0), np.array(["a"] * 3)).empty


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
    hundred = LabelScale(0.0, 100.0)
    scales = {"q": MOS, "c": MOS, "mos_beauty": MOS, "authenticity": hundred}
    examples = examples_of(folds, scales, **columns)
    examples.table.loc[[1, 4], "c"] = np.nan
    units = {task: np.linspace(0, 1, 6) * (0.5 if task == "q" else 1) for task in scales}
    scores = {
        name: {task: values[examples.folds == name.removesuffix("_eval")] for task, values in units.items()}
        for name in ("val", "train_eval", "test")
    }
    table = agreement.prediction_table(scores, examples)
    texts = ["name", "set", "split", "prompt", "generator", "cluster"]
    pairs = [f"{side}_{score}" for score in ("quality", "align", "beauty", "authenticity") for side in ("mos", "pred")]
    assert list(table.columns) == [*texts, *pairs]
    assert table["name"].tolist() == examples.table["name"].tolist()
    assert table["split"].tolist() == folds
    assert table["prompt"].tolist() == columns["prompt"] and table["generator"].tolist() == columns["group"]
    assert table["cluster"].tolist() == clusters(examples.table).tolist()
    for task, score in (("q", "quality"), ("c", "align"), ("mos_beauty", "beauty"), ("authenticity", "authenticity")):
        np.testing.assert_array_equal(table[f"mos_{score}"], examples.table[task])
        expected = scales[task].to_mos(units[task])
        if task == "c":
            expected[[1, 4]] = np.nan  # nothing to be consistent with
        np.testing.assert_allclose(table[f"pred_{score}"], expected)


def test_a_score_without_labels_has_empty_columns():
    examples = examples_of(["test"] * 4, c=np.nan)
    table = agreement.prediction_table({"test": {"q": np.zeros(4), "c": np.zeros(4)}}, examples)
    assert table[["mos_align", "pred_align"]].isna().all(axis=None)
    assert table["pred_quality"].tolist() == [1.0] * 4
