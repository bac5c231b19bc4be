"""`examples`: what belongs together, label scales, spreads of opinions, and what folds share."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from small_tables import FOLDS_OF_EIGHT, NO_LEAK, set_with_folds, table_of

from sources.examples import Examples, LabelScale, clusters, groups_of, leakage, leakage_notes

# -- what belongs together


KEYS = st.sampled_from(["", "a", "b", "c"])


@given(st.lists(st.tuples(KEYS, st.booleans()), min_size=1, max_size=12))
def test_groups_are_equal_keys_but_those_that_stand_alone(items):
    key, alone = pd.Series([key for key, _ in items]), pd.Series([alone for _, alone in items])
    codes = groups_of(key, alone)
    for i, j in itertools.combinations(range(len(items)), 2):
        assert (codes[i] == codes[j]) == (key[i] == key[j] and not alone[i] and not alone[j])


@given(st.lists(st.tuples(st.sampled_from(["", "a", "A", "b"]), KEYS), min_size=1, max_size=12))
def test_a_cluster_is_a_prompt_or_without_one_a_reference_or_else_an_image(items):
    table = table_of([prompt for prompt, _ in items], reference=[reference for _, reference in items])
    codes = clusters(table)
    for (i, (prompt, reference)), (j, (prompt2, reference2)) in itertools.combinations(enumerate(items), 2):
        told = prompt or prompt2
        assert (codes[i] == codes[j]) == (prompt.lower() == prompt2.lower() if told else reference == reference2 != "")


# -- label scales


@given(st.floats(-100, 100), st.floats(0.01, 100), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_scores_survive_the_way_to_label_units_and_back(low, width, shares):
    scale = LabelScale(low, low + width)
    mos = low + width * np.array(shares)
    np.testing.assert_allclose(scale.to_mos(scale.to_unit(mos)), mos, atol=1e-9)
    np.testing.assert_allclose(scale.to_unit(mos), shares, atol=1e-9 * max(1, (abs(low) + width) / width))


def test_only_what_people_see_is_clamped():
    scale = LabelScale(1.0, 5.0)
    assert scale.to_unit(np.array([0.0, 1.0, 3.0, 5.0, 7.0])).tolist() == [-0.25, 0.0, 0.5, 1.0, 1.5]
    mos = scale.to_mos(np.array([-0.25, 0.0, 0.5, 1.0, 1.5]))
    assert mos.tolist() == [0.0, 1.0, 3.0, 5.0, 7.0]
    assert scale.clamp(mos).tolist() == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert np.isnan(scale.to_unit(np.array([math.nan]))).all() and np.isnan(scale.to_mos(np.array([math.nan]))).all()


# -- leakage


def test_a_clean_split_leaks_nothing_and_is_not_spoken_of(make_dataset):
    examples = set_with_folds(make_dataset, list("aabbccdd"), FOLDS_OF_EIGHT, reference=list("eeffgghh"))
    assert leakage(examples) == NO_LEAK
    assert leakage_notes(examples) == []


def test_planted_leaks_are_counted_by_fold_and_kind(make_dataset):
    prompts = ["a cat", "b", "c", "d", "e", "A  Cat", "e", "d"]  # case and spacing hide nothing; 6 leaks from val
    references = ["r", "s", "", "", "r", "s", "r", "R"]  # a file name, for which case matters; none is none
    twins = {7: 0, 1: 0}  # a pair within a fold is fine
    examples = set_with_folds(make_dataset, prompts, FOLDS_OF_EIGHT, twins, reference=references)
    assert leakage(examples) == {
        "prompt": {"val": 1, "test": 2},
        "reference": {"val": 2, "test": 1},
        "content": {"val": 0, "test": 1},
    }
    assert leakage_notes(examples) == [
        "leakage: 1 of 2 val images share their prompt with an earlier fold",
        "leakage: 2 of 2 test images share their prompt with an earlier fold",
        "leakage: 2 of 2 val images share their reference with an earlier fold",
        "leakage: 1 of 2 test images share their reference with an earlier fold",
        "leakage: 1 of 2 test images share their content with an earlier fold",
    ]


def test_images_without_prompts_and_references_leak_by_content_only(make_dataset):
    examples = set_with_folds(make_dataset, [""] * 8, FOLDS_OF_EIGHT, twins={4: 3})
    assert leakage(examples) == {**NO_LEAK, "content": {"val": 1, "test": 0}}


# -- spreads of the opinions


def examples_of(table: pd.DataFrame, scales: dict[str, LabelScale]) -> Examples:
    return Examples(table, np.array(["train"] * len(table)), scales, [], "")


def test_spreads_are_in_label_units_and_gaps_get_the_median():
    table = table_of(["a"] * 4, q_std=[0.4, np.nan, 1.2, 0.6], c_std=np.nan)
    scales = {"q": LabelScale(1.0, 5.0), "c": LabelScale(0.0, 2.0)}
    spreads = examples_of(table, scales).spreads
    assert list(spreads) == ["q"]
    np.testing.assert_allclose(spreads["q"], [0.1, 0.15, 0.3, 0.15])


def test_a_table_without_spreads_has_none():
    scale = LabelScale(0.0, 1.0)
    assert examples_of(table_of(["a"] * 4), {"q": scale}).spreads == {}
    table = table_of(["a"] * 4, q_std=1.0, authenticity=1.0)
    assert list(examples_of(table, {"q": scale, "authenticity": scale}).spreads) == ["q"]


# -- the test fold


def test_the_digest_of_the_test_fold_knows_its_images_and_scores_and_nothing_else(make_dataset):
    examples = set_with_folds(make_dataset, list("aabbccdd"), FOLDS_OF_EIGHT)

    def changed(row: int) -> str:
        table = examples.table.copy()
        table.loc[row, "q"] += 0.5
        return replace(examples, table=table).test_digest

    assert changed(0) == examples.test_digest != changed(7)
    turned = replace(examples, table=examples.table[::-1].reset_index(drop=True), folds=examples.folds[::-1])
    turned = replace(turned, files=examples.files[::-1])
    assert turned.test_digest == examples.test_digest
