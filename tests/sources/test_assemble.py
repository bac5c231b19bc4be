"""`assemble`: tables as one data set, its scale and fingerprint; several joined; images left out."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import COLUMNS, csv_text, scored_rows
from refusals import refusal
from small_tables import FOLDS_OF_EIGHT, NO_LEAK, NO_RANGES, SPLIT, USUAL, load, read

from sources import assemble, csv_files, splits
from sources.examples import FOLDS, Examples, LabelledTable, LabelScale, leakage
from sources.scores import TASKS
from storage import image_files


@pytest.mark.parametrize(("task", "column"), [("q", "mos_quality"), ("c", "mos_align")])
@pytest.mark.parametrize("empty", [True, False])
def test_a_data_set_may_lack_one_score_which_is_then_no_task(make_dataset, task, column, empty):
    rows = [{key: "" if key == column else value for key, value in row.items()} for row in scored_rows()]
    files = make_dataset(rows, columns=None if empty else [key for key in COLUMNS if key != column])
    examples = load(files.csv, files.images, USUAL, **SPLIT, ranges=NO_RANGES)
    other = "c" if task == "q" else "q"
    assert list(examples.scales) == list(examples.unit_targets) == list(examples.train_means) == [other]
    assert examples.table[task].isna().all() and not examples.table[other].isna().any()


def test_the_fingerprint_changes_with_any_byte_and_with_nothing_else(make_dataset):
    files = make_dataset(scored_rows(2, 2))
    paths = read(files)["path"].tolist()

    def now() -> str:
        return assemble.fingerprint(files.csv.read_bytes(), [file.digest for file in image_files.check_images(paths)])

    first = now()
    assert first == now() and len(first) == 64
    files.csv.touch()
    assert now() == first
    content = paths[2].read_bytes()
    paths[2].write_bytes(content + b"\0")
    assert now() != first
    paths[2].write_bytes(content)
    assert now() == first
    files.csv.write_bytes(files.csv.read_bytes().replace(b"1.01", b"1.02"))
    assert now() != first


# -- label scales


def test_the_scale_comes_from_the_training_fold_alone_and_passes_over_gaps():
    folds = np.array(["train", "val", "train", "test", "train"])
    mos = np.array([2.0, 0.0, 4.0, 9.0, np.nan])
    assert assemble.label_scale(mos, folds, None, "--mos_range_q") == LabelScale(2.0, 4.0)


def test_a_given_range_is_the_scale_and_its_ends_belong_to_it():
    folds = np.array(["train", "val", "test"])
    found = assemble.label_scale(np.array([1.0, np.nan, 5.0]), folds, (1.0, 5.0), "--mos_range_q")
    assert found == LabelScale(1.0, 5.0)


def test_scores_outside_a_given_range_are_refused_with_their_number():
    folds = np.array(["train", "val", "test", "train"])
    message = refusal(assemble.label_scale, np.array([1.0, 0.5, 5.5, np.nan]), folds, (1.0, 5.0), "--mos_range_c")
    assert message.startswith("--mos_range_c 1.0 5.0: 2 score(s) lie outside, such as 0.5")


def test_equal_training_scores_are_refused_unless_a_range_is_given():
    folds, mos = np.array(["train", "train", "val"]), np.array([3.0, 3.0, 4.0])
    message = refusal(assemble.label_scale, mos, folds, None, "--mos_range_q")
    assert "every training score is 3.0" in message and "--mos_range_q" in message
    assert assemble.label_scale(mos, folds, (1.0, 5.0), "--mos_range_q").high == 5.0


# -- the whole


def test_examples_hold_what_the_files_say(make_dataset):
    rows = scored_rows()
    rows[0]["mos_quality"] = ""
    files = make_dataset(rows)
    examples = load(files.csv, files.images, USUAL, **SPLIT, ranges={"q": (1.0, 5.0), "c": None})
    assert sorted(np.concatenate([examples.rows(fold) for fold in FOLDS])) == list(range(len(rows)))
    assert examples.scales["q"] == LabelScale(1.0, 5.0)
    train = [rows[i]["mos_align"] for i in examples.rows("train")]
    assert examples.scales["c"] == LabelScale(min(train), max(train))
    assert examples.mos("c", "val").tolist() == [rows[i]["mos_align"] for i in examples.rows("val")]
    units = examples.unit_targets
    assert np.isnan(units["q"]).tolist() == [True] + [False] * (len(rows) - 1)
    assert units["q"][5] == pytest.approx((rows[5]["mos_quality"] - 1) / 4)
    assert examples.train_means["c"] == pytest.approx((np.mean(train) - min(train)) / (max(train) - min(train)))
    assert examples.files == image_files.check_images([files.images / row["name"] for row in rows])
    assert examples.fingerprint == assemble.fingerprint(
        files.csv.read_bytes(), [file.digest for file in examples.files]
    )


def test_unreadable_images_are_found_while_reading_the_data_set(make_dataset):
    files = make_dataset(scored_rows())
    (files.images / "gen1_3.png").write_bytes(b"")
    message = refusal(load, files.csv, files.images, USUAL, **SPLIT, ranges=NO_RANGES)
    assert message == "1 of 24 images cannot be read: gen1_3.png (not an image)"


def test_the_demo_set_is_a_data_set(demo_set):
    examples = load(*demo_set, USUAL, **SPLIT, ranges={"q": (1.0, 5.0), "c": (1.0, 5.0)})
    assert len(examples.table) == 64 and examples.table["prompt"].nunique() == 8
    assert {fold: len(examples.rows(fold)) for fold in FOLDS} == {"train": 32, "val": 16, "test": 16}
    assert (examples.table["explanation"] != "").any() and examples.table["group"].nunique() == 8


def test_agiqa_3k_is_a_data_set(agiqa_dir):
    table = csv_files.read_table(agiqa_dir / "data.csv", agiqa_dir / "images", USUAL)
    assert not table[["q", "c"]].isna().any(axis=None)
    assert table["q"].between(0, 5).all() and table["c"].between(0, 5).all()
    assert {"AttnGAN_normal", "DALLE2_normal", "midjourney_normal", "sd1.5_highcorr"} <= set(table["group"])
    assert "" not in set(table["group"])
    folds = splits.assign_folds(table, split_by="prompt", test_size=0.2, val_size=0.1, seed=42)
    plain = table["prompt"].str.lower().str.split().str.join(" ")
    assert pd.Series(folds).groupby(plain).nunique().max() == 1
    assert abs((folds == "test").mean() - 0.2) < 0.05
    assert image_files.check_images(table["path"].tolist()[::300])


# -- several data sets


def labelled(table: pd.DataFrame, title: str, ranges=None, **columns: Any) -> LabelledTable:
    """Rows of a table as a data set of their own."""
    rows = table.reset_index(drop=True).assign(**columns)
    return LabelledTable(title=title, table=rows, ranges=ranges or {}, labels=title.encode())


@pytest.fixture
def two_tables(make_dataset) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables of 24 images each, which share no prompt and no image."""
    rows = [{**row, "std_quality": 0.5 + i / 100, "reference": f"r{i // 6}"} for i, row in enumerate(scored_rows(16))]
    table = read(make_dataset(rows))
    return table[:24], table[24:]


def test_one_data_set_keeps_its_names_and_scores(two_tables):
    examples = assemble.build_examples([labelled(two_tables[0], "one")], **SPLIT)
    assert examples.sets == ["one"] and examples.only("one") is examples
    columns = ["name", "prompt", "q", "c", "q_std"]
    pd.testing.assert_frame_equal(examples.table[columns], two_tables[0][columns])


def test_joined_data_sets_are_named_and_split_each_by_itself(two_tables):
    sources = [labelled(two_tables[0], "one"), labelled(two_tables[1], "two")]
    examples = assemble.build_examples(sources, **{**SPLIT, "split_by": ["prompt", "group"]})
    alone = [
        assemble.build_examples([source], **{**SPLIT, "split_by": unit})
        for source, unit in zip(sources, ("prompt", "group"), strict=True)
    ]
    assert examples.sets == ["one", "two"] and len(examples.table) == 48
    for title, own in zip(examples.sets, alone, strict=True):
        part = examples.only(title)
        assert part.table["name"].tolist() == [f"{title}/{name}" for name in own.table["name"]]
        assert part.table["prompt"].tolist() == own.table["prompt"].tolist()
        assert part.folds.tolist() == own.folds.tolist()
        assert part.files == own.files and part.sets == [title]
        assert part.rows("test").tolist() == own.rows("test").tolist()
    by_reference = examples.only("two").table.groupby("reference").indices.values()
    assert max(len(set(examples.only("two").folds[rows])) for rows in by_reference) == 1
    digests = [file.digest for file in examples.files]
    assert examples.fingerprint == assemble.fingerprint(b"onetwo", digests) != alone[0].fingerprint


def test_scores_are_brought_to_the_scale_of_the_first_data_set_in_their_order(two_tables):
    first, second = two_tables
    shuffled = np.random.default_rng(0).uniform(10, 90, len(second))
    ranges = [{"q": (1.0, 5.0)}, {"q": (0.0, 100.0)}]
    sources = [labelled(first, "one", ranges[0]), labelled(second, "two", ranges[1], q=shuffled, q_std=25.0)]
    examples = assemble.build_examples(sources, **SPLIT)
    assert examples.scales["q"] == LabelScale(1.0, 5.0)
    one, two = examples.only("one").table, examples.only("two").table
    assert one["q"].tolist() == first["q"].tolist() and one["q_std"].tolist() == first["q_std"].tolist()
    np.testing.assert_allclose(two["q"], 1 + shuffled / 25)
    np.testing.assert_allclose(two["q_std"], 1.0)
    assert np.argsort(two["q"]).tolist() == np.argsort(shuffled).tolist()
    np.testing.assert_allclose(examples.unit_targets["q"][24:], shuffled / 100)
    np.testing.assert_allclose(examples.spreads["q"][24:], 0.25)


def test_without_ranges_the_training_folds_are_laid_over_each_other(two_tables):
    examples = assemble.build_examples([labelled(two_tables[0], "one"), labelled(two_tables[1], "two")], **SPLIT)
    for task in TASKS:
        for title in examples.sets:
            train, scale = examples.only(title).mos(task, "train"), examples.scales[task]
            np.testing.assert_allclose([train.min(), train.max()], [scale.low, scale.high])


def test_a_score_that_one_data_set_lacks_is_missing_there_and_has_the_scale_of_the_other(two_tables):
    ranges = {"q": (1.0, 5.0), "c": (0.0, 6.0), "authenticity": (0.0, 100.0)}
    extra = np.linspace(20, 60, 24)
    sources = [
        labelled(two_tables[0], "one", ranges, c=np.nan, authenticity=np.nan),
        labelled(two_tables[1], "two", ranges, authenticity=extra),
    ]
    examples = assemble.build_examples(sources, extra=["authenticity"], **SPLIT)
    assert list(examples.scales) == ["q", "c", "authenticity"]
    assert {task: (scale.low, scale.high) for task, scale in examples.scales.items()} == ranges
    assert list(examples.only("one").scales) == ["q"] and list(examples.only("two").scales) == list(examples.scales)
    for task, known in (("q", [True] * 48), ("c", [False] * 24 + [True] * 24)):
        assert examples.table[task].notna().tolist() == known
    assert examples.table["authenticity"][24:].tolist() == extra.tolist()
    assert examples.table["authenticity"][:24].isna().all()


def test_every_fold_needs_two_of_each_further_score_too(two_tables):
    table = two_tables[0].assign(authenticity=np.nan)
    table.loc[:3, "authenticity"] = 1.0
    message = refusal(assemble.build_examples, [labelled(table, "one")], extra=["authenticity"], **SPLIT)
    assert "fold has" in message and "score of authenticity, needs at least 2" in message


def test_leaks_from_one_data_set_into_another_are_counted(make_dataset):
    folds = FOLDS_OF_EIGHT * 2
    rows = [
        {"name": f"g_{i}.png", "prompt": f"p{i}", "mos_quality": 1 + i % 8, "split": fold, "reference": f"r{i % 8}"}
        for i, fold in enumerate(folds)
    ]
    rows[12]["prompt"] = " P0"  # validation of the second set, training of the first
    rows[7]["prompt"] = "p13"  # test of the first, validation of the second
    files = make_dataset(rows)
    (files.images / "g_15.png").write_bytes((files.images / "g_1.png").read_bytes())
    table = read(files)
    examples = assemble.build_examples([labelled(table[:8], "one"), labelled(table[8:], "two")], **SPLIT)
    # Two data sets may call different images r0: references are compared within a set.
    assert leakage(examples) == {**NO_LEAK, "prompt": {"val": 1, "test": 1}, "content": {"val": 0, "test": 1}}


def test_joined_sets_share_no_prompt_between_folds(make_dataset):
    rows = [{"name": f"g_{i}.png", "prompt": f"p{i % 10}", "mos_quality": 1 + i / 30} for i in range(30)]
    files = make_dataset(rows)
    table = csv_files.read_table(files.csv, files.images, csv_files.Columns())
    sources = [
        LabelledTable(title=title, table=part.reset_index(drop=True), ranges={}, labels=b"")
        for title, part in (("one", table[:30]), ("other", table[::-1]))
    ]
    examples = assemble.build_examples(sources, split_by="prompt", test_size=0.2, val_size=0.2, seed=1)
    assert leakage(examples)["prompt"] == {"val": 0, "test": 0}
    assert set(examples.only("other").folds) == set(FOLDS)


# -- images that are left out


def skipping(files, **options: Any) -> Examples:
    table = csv_files.read_table(files.csv, files.images, USUAL, may_be_missing=True)
    source = LabelledTable(title="csv", table=table, ranges={}, labels=files.csv.read_bytes())
    usual = {"split_by": "prompt", "test_size": 0.2, "val_size": 0.2, "seed": 3}
    return assemble.build_examples([source], **{**usual, "skip_bad": True, **options})


@pytest.fixture
def damaged(make_dataset) -> SimpleNamespace:
    """A data set of 36 rows, its examples, and what lies at four of them afterwards."""
    files = make_dataset(scored_rows(12, 3))
    whole = skipping(files)
    rows = [0, 7, 20, 35]  # the first has the lowest quality and the highest consistency of all
    names = whole.table["name"].iloc[rows].tolist()
    for name in names:
        (files.images / name).unlink()
    os.mkfifo(files.images / names[1])
    (files.images / names[2]).write_bytes(b"no image")
    (files.images / names[3]).symlink_to(names[3])
    reasons = ["No such file or directory", "no regular file", "not an image", "no regular file"]
    return SimpleNamespace(files=files, whole=whole, rows=rows, names=names, reasons=reasons)


def test_images_that_cannot_be_read_are_left_out_and_all_others_keep_their_folds(damaged):
    found = skipping(damaged.files)
    rest = np.setdiff1d(np.arange(36), damaged.rows)
    assert found.table["name"].tolist() == damaged.whole.table["name"].iloc[rest].tolist()
    assert found.folds.tolist() == damaged.whole.folds[rest].tolist()
    assert [file.path.name for file in found.files] == found.table["name"].tolist()
    assert found.skipped["name"].tolist() == damaged.names
    assert found.skipped["row"].tolist() == [row + 2 for row in damaged.rows]
    assert found.skipped["fold"].tolist() == damaged.whole.folds[damaged.rows].tolist()
    assert found.skipped["reason"].tolist() == damaged.reasons
    assert found.skipped["path"].tolist() == [damaged.files.images / name for name in damaged.names]
    assert len(damaged.whole.skipped) == 0


def test_what_is_left_is_as_a_table_without_the_others_that_has_the_same_folds(damaged):
    found = skipping(damaged.files)
    folds = dict(zip(found.table["name"], found.folds, strict=True))
    rows = [{**row, "split": folds[row["name"]]} for row in scored_rows(12, 3) if row["name"] in folds]
    damaged.files.csv.write_text(csv_text(rows), encoding="utf-8")
    other = skipping(damaged.files, skip_bad=False)
    assert found.scales == other.scales != damaged.whole.scales
    assert found.test_digest == other.test_digest
    for task, values in other.unit_targets.items():
        np.testing.assert_array_equal(found.unit_targets[task], values)


def test_what_is_left_must_still_fill_the_folds_with_the_scores_that_the_data_had(damaged):
    for name in damaged.whole.table["name"][damaged.whole.rows("val")][1:]:
        (damaged.files.images / name).unlink(missing_ok=True)
    message = refusal(skipping, damaged.files)
    assert message.startswith("--bad_images skip: without ") and "the val fold has " in message


def test_a_score_that_only_lost_images_had_is_missed(make_dataset):
    rows = scored_rows(12, 3)
    for row in rows[6:]:
        row["mos_align"] = ""
    files = make_dataset([{**row, "split": ("train", "val", "test")[number % 3]} for number, row in enumerate(rows)])
    assert set(skipping(files).scales) == {"q", "c"}
    for row in rows[:6]:
        (files.images / row["name"]).unlink()
    assert "has 0 image(s) with a score of consistency" in refusal(skipping, files)


def test_nothing_left_is_refused_in_words(make_dataset):
    rows = scored_rows(12, 3)
    files = make_dataset(rows, without=[row["name"] for row in rows])
    message = refusal(skipping, files)
    assert "none of the 36 images of csv is left: gen0_0.png (No such file or directory)" in message


def test_unreadable_images_are_refused_with_their_reasons_unless_they_may_be_skipped(damaged):
    assert refusal(skipping, damaged.files, skip_bad=False) == "4 of 36 images cannot be read: " + ", ".join(
        f"{name} ({reason})" for name, reason in zip(damaged.names, damaged.reasons, strict=True)
    )
