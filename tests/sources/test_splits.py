"""`splits`: folds of whole prompts, references or images, as drawn, as given, and one part after the other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from conftest import scored_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refusal
from small_tables import SPLIT, read, table_of

from sources import csv_files, splits
from sources.examples import FOLDS
from sources.scores import TASKS


@st.composite
def prompt_tables(draw: st.DrawFn) -> tuple[pd.DataFrame, list[int]]:
    """A table in random order and the number of each row's prompt; equal prompts differ in case and blanks."""
    numbers = list(itertools.chain(*([i] * draw(st.integers(2, 4)) for i in range(draw(st.integers(3, 15))))))
    numbers = draw(st.permutations(numbers))
    forms = ["a red cat {}", "A Red CAT {}", " a  red\tcat {} "]
    return table_of([draw(st.sampled_from(forms)).format(number) for number in numbers]), numbers


def by_fold(numbers: list[int], folds: np.ndarray) -> dict[str, set[int]]:
    """The prompts of each fold."""
    return {fold: {number for number, its in zip(numbers, folds, strict=True) if its == fold} for fold in FOLDS}


@settings(max_examples=60)
@given(prompt_tables(), st.floats(0.05, 0.45), st.floats(0.05, 0.45), st.integers(0, 2**32 - 1))
def test_folds_share_no_prompt_have_their_sizes_and_follow_from_the_seed(drawn, test_size, val_size, seed):
    table, numbers = drawn
    count = len(set(numbers))
    sizes = {"test": max(1, round(count * test_size)), "val": max(1, round(count * val_size))}
    assume(sum(sizes.values()) < count)
    options = {"split_by": "prompt", "test_size": test_size, "val_size": val_size, "seed": seed}
    folds = splits.assign_folds(table, **options)
    prompts = by_fold(numbers, folds)
    assert sum(map(len, prompts.values())) == count == len(set.union(*prompts.values()))
    assert {fold: len(prompts[fold]) for fold in sizes} == sizes
    np.testing.assert_array_equal(folds, splits.assign_folds(table, **options))


@pytest.mark.parametrize("split_by", ["prompt", "image"])
def test_other_seeds_draw_other_folds(split_by):
    table = table_of([f"thing {i // 2}" for i in range(40)])
    drawn = {tuple(splits.assign_folds(table, **{**SPLIT, "split_by": split_by, "seed": seed})) for seed in range(8)}
    assert len(drawn) == 8


def test_folds_of_images_have_their_sizes_and_need_no_prompts():
    table = table_of([""] * 40, c=np.nan)
    folds = splits.assign_folds(table, split_by="image", test_size=0.2, val_size=0.1, seed=3)
    assert {fold: int((folds == fold).sum()) for fold in FOLDS} == {"train": 28, "val": 4, "test": 8}


def test_folds_of_images_may_share_prompts_and_folds_of_prompts_may_not():
    table = table_of([f"thing {i % 5}" for i in range(40)])
    by_image = splits.assign_folds(table, **{**SPLIT, "split_by": "image"})
    assert table.groupby("prompt")["name"].agg(lambda rows: len(set(by_image[rows.index]))).max() > 1
    by_prompt = splits.assign_folds(table, **SPLIT)
    assert table.groupby("prompt")["name"].agg(lambda rows: len(set(by_prompt[rows.index]))).max() == 1


def test_the_split_column_wins_over_every_option(make_dataset):
    rows = scored_rows(6, 2)
    given = ["train", "test", "val"] * 4
    for row, fold in zip(rows, given, strict=True):
        row["split"] = fold
    table = read(make_dataset(rows))
    for seed, split_by in itertools.product((0, 1), ("prompt", "image")):
        folds = splits.assign_folds(table, **{**SPLIT, "seed": seed, "split_by": split_by})
        assert folds.tolist() == given


def test_an_empty_split_column_is_none():
    table = table_of([f"thing {i // 2}" for i in range(20)])
    assert set(splits.assign_folds(table, **SPLIT)) == set(FOLDS)


@pytest.mark.parametrize("wrong", ["", "training", "Test", "0"])
def test_an_unknown_fold_is_refused_by_row(wrong):
    table = table_of(["a"] * 8, split=["train", "train", "val", wrong, "val", "test", wrong, "test"])
    message = refusal(splits.assign_folds, table, **SPLIT)
    assert f"row 5: split is {wrong!r}, must be train, val or test; 2 such row(s)" in message


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_split_column_that_leaves_a_fold_empty_is_refused(missing):
    others = [fold for fold in FOLDS if fold != missing]
    message = refusal(splits.assign_folds, table_of(["a", "b", "c", "d"] * 2, split=others * 4), **SPLIT)
    assert f"the {missing} fold has 0 image(s)" in message


@pytest.mark.parametrize(
    ("split", "empty"), [(["train", "test"] * 4, "val"), (["test"] * 8, "train"), (["train"] * 8, "val")]
)
def test_a_split_column_from_which_no_validation_fold_can_be_drawn_is_refused(split, empty):
    message = refusal(splits.assign_folds, table_of(["a"] * 8, split=split), **SPLIT)  # training has one prompt at most
    assert f"the {empty} fold has 0 image(s)" in message


@settings(max_examples=60)
@given(prompt_tables(), st.floats(0.05, 0.6), st.integers(0, 2**32 - 1), st.data())
def test_a_split_column_without_validation_gets_it_out_of_training_in_whole_prompts(drawn, val_size, seed, choice):
    table, numbers = drawn
    tested = choice.draw(st.sets(st.sampled_from(numbers), min_size=1, max_size=len(set(numbers)) - 2))
    num_val = max(1, round((len(set(numbers)) - len(tested)) * val_size))
    assume(num_val < len(set(numbers)) - len(tested))
    table["split"] = ["test" if number in tested else "train" for number in numbers]
    options = {"split_by": "prompt", "test_size": 0.5, "val_size": val_size, "seed": seed}
    folds = splits.assign_folds(table, **options)
    of = by_fold(numbers, folds)
    assert of["test"] == tested and len(of["val"]) == num_val
    assert not of["val"] & of["train"] and of["val"] | of["train"] == set(numbers) - tested
    np.testing.assert_array_equal(folds, splits.assign_folds(table, **options))


# -- a run for each part


@settings(max_examples=60)
@given(prompt_tables(), st.integers(2, 15), st.floats(0.05, 0.45), st.integers(0, 2**32 - 1))
def test_over_all_parts_every_prompt_is_tested_on_once(drawn, num_parts, val_size, seed):
    table, numbers = drawn
    count = len(set(numbers))
    num_val = max(1, round(count * val_size))
    assume(num_parts <= count and math.ceil(count / num_parts) + num_val < count)
    tested = []
    for part in range(1, num_parts + 1):
        options = {
            "split_by": "prompt",
            "test_size": 0.9,
            "val_size": val_size,
            "seed": seed,
            "part": (part, num_parts),
        }
        folds = splits.assign_folds(table, **options)
        of = by_fold(numbers, folds)
        assert len(of["val"]) == num_val and len(of["test"]) in (count // num_parts, math.ceil(count / num_parts))
        assert sum(map(len, of.values())) == count  # no prompt is in two folds
        tested += of["test"]
    np.testing.assert_array_equal(folds, splits.assign_folds(table, **options))
    assert sorted(tested) == sorted(set(numbers))


@pytest.mark.parametrize(("split_by", "column"), [("image", "name"), ("group", "reference")])
def test_parts_are_also_cut_out_of_images_and_references(split_by, column):
    table = table_of([""] * 20, reference=[f"ref{i // 2}" for i in range(20)], c=np.nan)
    options = {**SPLIT, "split_by": split_by}
    tested = [table[column][splits.assign_folds(table, **options, part=(k, 3)) == "test"].unique() for k in (1, 2, 3)]
    assert sorted(np.concatenate(tested)) == sorted(table[column].unique())


def test_other_seeds_cut_other_parts():
    table = table_of([f"thing {i // 2}" for i in range(40)])
    tested = {tuple(splits.assign_folds(table, **{**SPLIT, "seed": s}, part=(1, 4)) == "test") for s in range(8)}
    assert len(tested) == 8


def test_parts_are_refused_beside_folds_of_its_own_and_where_there_are_too_few_prompts():
    split = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    message = refusal(splits.assign_folds, table_of(list("aabbccdd"), split=split), **SPLIT, part=(1, 2))
    assert message.startswith("--kfold: the data set has folds of its own")
    message = refusal(splits.assign_folds, table_of(list("aabbccdd")), **SPLIT, part=(1, 5))
    assert message == "4 prompt(s) cannot be cut into 5 parts; lower --kfold"
    message = refusal(splits.assign_folds, table_of(list("aabb")), **SPLIT, part=(1, 2))
    assert message.startswith("2 prompt(s) cannot fill three folds")


@pytest.mark.parametrize("task", ["q", "c"])
def test_every_fold_needs_two_scores_of_each_task(task):
    split = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    scores = np.arange(8.0)
    scores[5] = np.nan
    message = refusal(splits.assign_folds, table_of(["a"] * 8, split=split, **{task: scores}), **SPLIT)
    assert f"the val fold has 1 image(s) with a score of {TASKS[task]}, needs at least 2" in message
    assert splits.assign_folds(table_of(["a"] * 8, split=split, **{task: np.nan}), **SPLIT).tolist() == split


@pytest.mark.parametrize("prompts", [["a"], ["a"] * 9, ["a", "A ", " a"], ["a", "b"] * 6])
def test_too_few_prompts_for_three_folds_are_refused_with_their_number(prompts):
    message = refusal(splits.assign_folds, table_of(prompts), **SPLIT)
    assert message.startswith(f"{len({prompt.strip().lower() for prompt in prompts})} prompt(s)")
    assert "--test_size 0.25" in message and "--val_size 0.25" in message


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_for_three_folds_are_refused_with_their_number(count):
    message = refusal(splits.assign_folds, table_of(["a"] * count), **{**SPLIT, "split_by": "image"})
    assert message.startswith(f"{count} image(s) cannot fill three folds")


def test_sizes_that_leave_no_training_prompt_are_refused():
    table = table_of([f"thing {i // 3}" for i in range(12)])
    assert "4 prompt(s)" in refusal(splits.assign_folds, table, split_by="prompt", test_size=0.5, val_size=0.45, seed=0)


def test_splitting_by_prompt_needs_a_prompt_in_every_row():
    message = refusal(splits.assign_folds, table_of(["a", "b", "", "c"], c=np.nan), **SPLIT)
    assert "row 4" in message and "--split_by image" in message


# -- reference images


def test_distorted_copies_of_a_reference_stay_in_one_fold(make_dataset):
    rows = [{"name": f"d{i}.png", "mos_quality": 1 + i / 10, "reference": f"ref{i // 4}"} for i in range(40)]
    files = make_dataset(rows)
    table = csv_files.read_table(files.csv, files.images, csv_files.Columns())
    folds = splits.assign_folds(table, split_by="group", test_size=0.2, val_size=0.1, seed=1)
    assert (
        pd.DataFrame({"reference": table["reference"], "fold": folds}).groupby("reference")["fold"].nunique().max() == 1
    )
    assert (folds == "test").sum() == 8 and (folds == "val").sum() == 4
    with pytest.raises(ValueError, match=r"row 2 has no prompt, .*use --split_by group"):
        splits.assign_folds(table, split_by="prompt", test_size=0.2, val_size=0.1, seed=1)
    with pytest.raises(ValueError, match=r"row 2 has no reference, .*use --split_by image"):
        splits.assign_folds(table.assign(reference=""), split_by="group", test_size=0.2, val_size=0.1, seed=1)


# -- prompts that joined sets share


def test_a_prompt_that_an_earlier_set_has_placed_keeps_its_fold_unless_the_set_brings_its_own():
    placed: dict[str, str] = {}
    table = pd.DataFrame({"prompt": ["a cat", "b", "", "c"], "split": ""})
    first = splits.keep_prompts_together(table, np.array(["train", "val", "test", "test"]), placed)
    assert first.tolist() == ["train", "val", "test", "test"]
    later = pd.DataFrame({"prompt": ["A  Cat", "c", "d", ""], "split": ""})
    assert splits.keep_prompts_together(later, np.array(["test", "train", "val", "train"]), dict(placed)).tolist() == (
        ["train", "test", "val", "train"]
    )
    official = later.assign(split="test")
    assert splits.keep_prompts_together(official, np.array(["test"] * 4), dict(placed)).tolist() == ["test"] * 4
