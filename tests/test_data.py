"""`data.py`: what may be in a CSV and an image folder, fingerprints, splits, scales."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import COLUMNS, DataFiles, csv_text, scored_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import images
from scores import TASKS

USUAL = data.Columns()
SPLIT = {"split_by": "prompt", "test_size": 0.25, "val_size": 0.25, "seed": 0}
NO_RANGES = {"q": None, "c": None}


def read(files, columns: data.Columns = USUAL, **options: Any) -> pd.DataFrame:
    return data.read_table(files.csv, files.images, columns, **options)


def load(csv_path, image_dir, columns: data.Columns, *, ranges: dict[str, Any], **options: Any) -> data.Examples:
    """A CSV as a data set; `options` as `data.build_examples` takes them."""
    table = data.read_table(csv_path, image_dir, columns)
    labelled = data.Labelled(title="csv", table=table, ranges=ranges, labels=csv_path.read_bytes())
    return data.build_examples([labelled], **options)


def refusal(function, *args: Any, **options: Any) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the CSV


def test_a_table_has_every_cell_and_counts_rows_as_a_spreadsheet_does(make_dataset):
    rows = scored_rows(3, 2)
    table = read(make_dataset(rows))
    assert table["name"].tolist() == [row["name"] for row in rows]
    assert table["prompt"].tolist() == [row["prompt"] for row in rows]
    assert table["q"].tolist() == [row["mos_quality"] for row in rows]
    assert table["c"].tolist() == [row["mos_align"] for row in rows]
    assert table["group"].tolist() == ["gen0", "gen1"] * 3
    assert table["row"].tolist() == [2, 3, 4, 5, 6, 7]
    assert set(table["split"]) == set(table["explanation"]) == {""}
    assert [path.is_file() for path in table["path"]] == [True] * 6
    assert list(table.index) == list(range(6))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_mark_and_line_ends_make_no_difference(make_dataset, encoding, newline):
    rows = scored_rows(2, 2)
    files = make_dataset(rows, encoding=encoding, newline=newline)
    assert files.csv.read_bytes().startswith(b"\xef\xbb\xbf") == (encoding == "utf-8-sig")
    table = read(files)
    assert table[["name", "prompt", "q", "c"]].to_numpy().tolist() == [[row[key] for key in COLUMNS] for row in rows]


def test_prompts_keep_commas_quotes_line_breaks_and_chinese(make_dataset):
    prompts = ['a cat, a dog, and "a fox"', "两只猫，一只狗", "first line\nsecond line", "naïve café 🎨", "NA", "null"]
    names = ["猫_0.png", "sub folder/a b_1.png", "x_2.PNG", "ü_3.png", "NA_4.png", "nan"]
    rows = [dict(zip(COLUMNS, (*cells, 3.5, 2), strict=True)) for cells in zip(names, prompts, strict=True)]
    table = read(make_dataset(rows))
    assert table["prompt"].tolist() == prompts
    assert table["name"].tolist() == names
    assert images.check_images(table["path"].tolist())
    assert table["q"].tolist() == [3.5] * 6


def test_blanks_around_cells_and_column_names_do_not_matter(make_dataset):
    text = " name , prompt ,mos_quality , mos_align\n a_1.png , a cat , 1.5 , 2 \n"
    table = read(make_dataset([{"name": "a_1.png"}], text=text))
    assert table.loc[0, ["name", "prompt", "q", "c"]].tolist() == ["a_1.png", "a cat", 1.5, 2.0]


def test_empty_rows_are_left_out_but_counted(make_dataset):
    text = csv_text(scored_rows(1, 3)).replace("gen1", "\n,,,\ngen1")
    table = read(make_dataset(scored_rows(1, 3), text=text))
    assert table["row"].tolist() == [2, 5, 6]
    assert list(table.index) == [0, 1, 2]


def test_columns_may_have_other_names_and_others_may_lie_between(make_dataset):
    text = "file,x,text,iqa,align,model,why\na.png,,a cat,1,2,sd,blurred\n"
    columns = data.Columns(
        name="file", prompt="text", quality="iqa", consistency="align", explanation="why", group="model"
    )
    table = read(make_dataset([{"name": "a.png"}], text=text), columns)
    keys = ["name", "prompt", "q", "c", "group", "explanation"]
    assert table.loc[0, keys].tolist() == ["a.png", "a cat", 1.0, 2.0, "sd", "blurred"]


@pytest.mark.parametrize(
    "field",
    ["name", "prompt", "quality", "consistency", "explanation", "group", "quality_std", "consistency_std"],
)
def test_a_column_that_was_asked_for_by_name_must_exist(make_dataset, field):
    files = make_dataset(scored_rows(2))
    message = refusal(read, files, data.Columns(**{field: "nmae"}))
    assert f"--{field}_column" in message and "'nmae'" in message and str(files.csv) in message
    assert "'prompt', 'mos_quality'" in message


def test_the_name_column_must_exist_under_its_usual_name(make_dataset):
    message = refusal(read, make_dataset([{"file": "a", "mos_quality": 1}]))
    assert "no column 'name'" in message and "--name_column" in message


def test_a_column_that_occurs_twice_is_refused(make_dataset):
    message = refusal(read, make_dataset(text="name,prompt,mos_quality,mos_quality\na,b,1,2\n"))
    assert "'mos_quality' more than once" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("name,prompt,mos_quality\n", "no rows"),
        ("name,prompt,mos_quality\n,,\n\n", "no rows"),
        ("name,prompt,mos_quality\na.png,a cat, a dog,3\n", "line 2"),
        ("name,prompt,mos_quality\na.png,b,3\na.png,a cat, a dog,3\n", "line 3"),
        ('name,prompt,mos_quality\na.png,"never closed,3\n', "double quotes"),
        ("name;prompt;mos_quality\na;b;3\n", "no column 'name' among 'name;prompt;mos_quality'"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused_by_file_and_reason(make_dataset, text, says):
    files = make_dataset(text=text)
    message = refusal(read, files)
    assert says in message and str(files.csv) in message


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_other_encodings_are_refused_with_what_to_do(make_dataset, encoding):
    files = make_dataset([{"name": "a.png", "prompt": "两只猫", "mos_quality": 3}], encoding=encoding)
    message = refusal(read, files)
    assert "not UTF-8" in message and str(files.csv) in message


def test_a_missing_csv_and_a_folder_in_its_place_are_refused_by_name(tmp_path):
    assert "nowhere.csv: no such file" in refusal(data.read_csv, tmp_path / "nowhere.csv")
    assert f"{tmp_path}: is not a plain file" in refusal(data.read_csv, tmp_path)


def test_a_missing_image_folder_is_refused_by_flag_and_name(make_dataset, tmp_path):
    files = make_dataset(scored_rows(2))
    message = refusal(data.read_table, files.csv, tmp_path / "nowhere", USUAL)
    assert "--image_base_dir" in message and "nowhere: no such folder" in message


def test_without_data_at_the_default_place_at_most_five_lines_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="AGIQA-3K") as caught:
        data.read_csv("data/data.csv")
    message = str(caught.value)
    assert message.count("\n") <= 4
    for needed in ("github.com/", "data/data.csv", "data/images", "python baseline.py --demo"):
        assert needed in message


# -- scores


@pytest.mark.parametrize("cell", ["good", "nan", "NaN", "inf", "-inf", "1e999", "3,5", "0x10", "1_000", "--", "NA"])
@pytest.mark.parametrize("column", ["mos_quality", "mos_align"])
def test_a_score_that_is_no_finite_number_is_refused_by_row_and_column(make_dataset, cell, column):
    rows = scored_rows(3, 2)
    rows[3][column] = rows[5][column] = cell
    files = make_dataset(rows)
    message = refusal(read, files)
    assert f"{files.csv} row 5: {column} is {cell!r}" in message and "2 such row(s)" in message


def test_row_numbers_in_messages_count_empty_rows(make_dataset):
    text = csv_text(scored_rows(1, 2)).replace("gen1", "\n\ngen1").replace(",1.01,", ",x,")
    assert "row 5: mos_quality is 'x'" in refusal(read, make_dataset(scored_rows(1, 2), text=text))


@pytest.mark.parametrize(("cell", "value"), [("3", 3.0), ("+2.5", 2.5), ("-1e-1", -0.1), (" 4 ", 4.0), ("1E2", 100.0)])
def test_numbers_are_read_however_they_are_written(make_dataset, cell, value):
    assert read(make_dataset([{"name": "a.png", "prompt": "b", "mos_quality": cell}]))["q"].tolist() == [value]


def test_an_empty_cell_is_a_missing_score_and_nothing_else(make_dataset):
    rows = scored_rows(2, 2)
    rows[0]["mos_quality"] = rows[3]["mos_align"] = ""
    rows[1]["mos_align"] = "  "
    table = read(make_dataset(rows))
    assert table["q"].isna().tolist() == [True, False, False, False]
    assert table["c"].isna().tolist() == [False, True, False, True]


def test_a_row_that_ends_early_has_empty_cells(make_dataset):
    table = read(make_dataset([{"name": "a.png"}, {"name": "b.png"}], text="name,mos_quality,prompt\na.png,1\nb.png\n"))
    assert table["prompt"].tolist() == ["", ""]
    assert table["q"].isna().tolist() == [False, True]


@pytest.mark.parametrize(("task", "column"), [("q", "mos_quality"), ("c", "mos_align")])
@pytest.mark.parametrize("empty", [True, False])
def test_a_data_set_may_lack_one_score_which_is_then_no_task(make_dataset, task, column, empty):
    rows = [{key: "" if key == column else value for key, value in row.items()} for row in scored_rows()]
    files = make_dataset(rows, columns=None if empty else [key for key in COLUMNS if key != column])
    examples = load(files.csv, files.images, USUAL, **SPLIT, ranges=NO_RANGES)
    other = "c" if task == "q" else "q"
    assert list(examples.scales) == list(examples.unit_targets) == list(examples.train_means) == [other]
    assert examples.table[task].isna().all() and not examples.table[other].isna().any()


def test_a_table_without_any_score_is_refused_for_training_only(make_dataset):
    files = make_dataset([{"name": "a.png", "prompt": "b"}])
    message = refusal(read, files)
    assert "--quality_column" in message and "--consistency_column" in message
    assert read(files, scored=False)["prompt"].tolist() == ["b"]


def test_scores_are_not_looked_at_where_they_are_not_needed(make_dataset):
    rows = [{"name": "a.png", "prompt": "", "mos_quality": "n/a", "mos_align": 3}]
    assert read(make_dataset(rows), scored=False)[["q", "c"]].isna().to_numpy().tolist() == [[True, True]]


def test_a_consistency_score_needs_a_prompt(make_dataset):
    rows = scored_rows(2, 2)
    rows[1]["prompt"] = rows[2]["prompt"] = " "
    message = refusal(read, make_dataset(rows))
    assert "row 3" in message and "'prompt'" in message and "2 such row(s)" in message


def test_quality_alone_needs_no_prompt(make_dataset):
    table = read(make_dataset([{"name": "a.png", "mos_quality": 3}]))
    assert table["prompt"].tolist() == [""]


# -- further scores and spreads


def test_further_scores_are_read_by_their_columns_and_may_have_gaps(make_dataset):
    rows = [{**row, "authenticity": i / 2, "beauty": ""} for i, row in enumerate(scored_rows(2, 2))]
    rows[2]["authenticity"] = " "
    table = read(make_dataset(rows), extra=["beauty", "authenticity"])
    np.testing.assert_array_equal(table["authenticity"], [0, 0.5, math.nan, 1.5])
    assert table["beauty"].isna().all() and table["beauty"].dtype == float


def test_a_further_score_that_is_no_number_is_refused_by_row_and_column(make_dataset):
    rows = [{**row, "authenticity": "much" if i == 1 else 1} for i, row in enumerate(scored_rows(2, 2))]
    files = make_dataset(rows)
    assert "row 3: authenticity is 'much'" in refusal(read, files, extra=["authenticity"])
    assert "authenticity" not in read(files)  # where nobody asks for it, it is nobody's mistake


def test_a_column_of_further_scores_must_exist(make_dataset):
    files = make_dataset(scored_rows(2))
    message = refusal(read, files, extra=["mos_quality", "authenticity"])
    assert message.startswith(f"{files.csv}: no column 'authenticity' among 'name', 'prompt', 'mos_quality'")
    assert message.endswith("--extra_scores")


def test_spreads_are_read_where_there_are_any(make_dataset):
    rows = [{**row, "std_quality": i / 10, "sd": ""} for i, row in enumerate(scored_rows(2, 2))]
    rows[3]["sd"] = 0.7
    files = make_dataset(rows)
    table = read(files)
    assert table["q_std"].tolist() == [0.0, 0.1, 0.2, 0.3]
    assert table["c_std"].isna().all()
    np.testing.assert_array_equal(read(files, data.Columns(consistency_std="sd"))["c_std"], [math.nan] * 3 + [0.7])
    assert read(files, scored=False)[["q_std", "c_std"]].isna().all(axis=None)


# -- names and files


@pytest.mark.parametrize(
    "name",
    ["../x.png", "a/../../x.png", "..", "/etc/x.png", "//host/x.png", "C:\\x.png", "C:/x.png", "..\\x.png", "\\\\h\\x"],
)
def test_names_that_leave_the_image_folder_are_refused(make_dataset, name):
    rows = [*scored_rows(1, 2), {"name": name, "prompt": "b", "mos_quality": 1}]
    files = make_dataset(rows)
    (files.images.parent / "x.png").write_bytes(b"never to be looked at")
    message = refusal(read, files)
    assert "1 image name(s) leave" in message and message.endswith(f": {name}")


@pytest.mark.parametrize("name", ["..a.png", "a..png", "a/b/c.png", "./d.png", "C.png", "...png"])
def test_names_with_dots_and_folders_that_stay_inside_are_fine(make_dataset, name):
    assert read(make_dataset([{"name": name, "prompt": "b", "mos_quality": 1}]))["path"][0].is_file()


def test_links_that_leave_the_image_folder_are_refused_by_name_unless_allowed(make_dataset, tmp_path):
    rows = [{"name": f"{place}.png", "prompt": "b", "mos_quality": 1} for place in ("out", "in", "deep/out", "plain")]
    files = make_dataset(rows, without=["out.png", "in.png", "deep/out.png"])
    (tmp_path / "store").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "store" / "out.png")
    (files.images / "out.png").symlink_to(tmp_path / "store" / "out.png")
    (files.images / "in.png").symlink_to("plain.png")
    (files.images / "deep").symlink_to(tmp_path / "store")
    message = refusal(read, files)
    assert "2 image(s) lie behind links that leave " in message
    assert message.endswith(": out.png, deep/out.png; --follow_links allows that")
    assert len(images.check_images(read(files, follow_links=True)["path"].tolist())) == 4


def test_the_image_folder_itself_may_be_a_link_and_a_folder_whose_name_begins_alike_is_outside(make_dataset, tmp_path):
    files = make_dataset(scored_rows(1, 2))
    (tmp_path / "link").symlink_to(files.images)
    linked = DataFiles(files.csv, tmp_path / "link")
    assert len(read(linked)) == 2
    beside = files.images.with_name("images2")
    beside.mkdir()
    (files.images / "gen0_0.png").rename(beside / "gen0_0.png")
    (files.images / "gen0_0.png").symlink_to(beside / "gen0_0.png")
    assert "1 image(s) lie behind links" in refusal(read, linked)


def test_all_missing_images_are_counted_and_the_first_five_named(make_dataset):
    rows = scored_rows(4, 3)
    names = [row["name"] for row in rows]
    message = refusal(read, make_dataset(rows, without=names[2:9]))
    assert "7 of 12 images are missing" in message
    assert message.endswith(", ".join(names[2:7]) + ", ...")
    assert names[7] not in message and names[0] not in message


def test_five_missing_images_are_all_named_without_dots(make_dataset):
    rows = scored_rows(2, 3)
    message = refusal(read, make_dataset(rows, without=[row["name"] for row in rows[:5]]))
    assert message.endswith(", ".join(row["name"] for row in rows[:5]))


def test_what_is_there_but_no_file_is_not_called_missing(make_dataset):
    files = make_dataset(scored_rows(1, 3), without=["gen0_0.png", "gen1_0.png"])
    (files.images / "gen0_0.png").mkdir()
    (files.images / "gen1_0.png").symlink_to("gen1_0.png")  # in a circle
    paths = read(files)["path"].tolist()
    message = refusal(images.check_images, paths)
    assert message.endswith("gen0_0.png (no regular file), gen1_0.png (no regular file)")


@pytest.mark.parametrize("again", ["gen0_0.png", "./gen0_0.png", " gen0_0.png "])
def test_names_that_occur_twice_are_refused(make_dataset, again):
    rows = scored_rows(2, 2)
    rows[3]["name"] = again
    message = refusal(read, make_dataset(rows))
    assert "1 image name(s) occur more than once" in message and "gen0_0.png" in message


def test_an_empty_name_is_refused_by_row(make_dataset):
    rows = scored_rows(2, 2)
    rows[2]["name"] = " "
    assert "row 4: the image name is empty; 1 such row(s)" in refusal(read, make_dataset(rows))


@pytest.mark.parametrize(
    ("name", "generator"),
    [("AttnGAN_normal_000.jpg", "AttnGAN_normal"), ("sub_dir/sd_1.png", "sd"), ("plain.png", ""), ("_1.png", "")],
)
def test_the_generator_is_the_file_name_up_to_its_last_underscore(name, generator):
    assert data.generator_of(name) == generator


# -- fingerprint


def test_the_fingerprint_changes_with_any_byte_and_with_nothing_else(make_dataset):
    files = make_dataset(scored_rows(2, 2))
    paths = read(files)["path"].tolist()

    def now() -> str:
        return data.fingerprint(files.csv.read_bytes(), [file.digest for file in images.check_images(paths)])

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


# -- splits


def table_of(prompts: list[str], **columns: Any) -> pd.DataFrame:
    """A table as `read_table` returns it, as far as splits look at it."""
    count = len(prompts)
    table = pd.DataFrame({"name": [f"{i}.png" for i in range(count)], "prompt": prompts, "split": "", "reference": ""})
    table["row"] = np.arange(count) + 2
    return table.assign(**{"q": np.arange(count) / 2, "c": np.arange(count) / 3, **columns})


@st.composite
def prompt_tables(draw: st.DrawFn) -> tuple[pd.DataFrame, list[int]]:
    """A table in random order and the number of each row's prompt; equal prompts differ in case and blanks."""
    numbers = list(itertools.chain(*([i] * draw(st.integers(2, 4)) for i in range(draw(st.integers(3, 15))))))
    numbers = draw(st.permutations(numbers))
    forms = ["a red cat {}", "A Red CAT {}", " a  red\tcat {} "]
    return table_of([draw(st.sampled_from(forms)).format(number) for number in numbers]), numbers


def by_fold(numbers: list[int], folds: np.ndarray) -> dict[str, set[int]]:
    """The prompts of each fold."""
    return {fold: {number for number, its in zip(numbers, folds, strict=True) if its == fold} for fold in data.FOLDS}


@settings(max_examples=60)
@given(prompt_tables(), st.floats(0.05, 0.45), st.floats(0.05, 0.45), st.integers(0, 2**32 - 1))
def test_folds_share_no_prompt_have_their_sizes_and_follow_from_the_seed(drawn, test_size, val_size, seed):
    table, numbers = drawn
    count = len(set(numbers))
    sizes = {"test": max(1, round(count * test_size)), "val": max(1, round(count * val_size))}
    assume(sum(sizes.values()) < count)
    options = {"split_by": "prompt", "test_size": test_size, "val_size": val_size, "seed": seed}
    folds = data.assign_folds(table, **options)
    prompts = by_fold(numbers, folds)
    assert sum(map(len, prompts.values())) == count == len(set.union(*prompts.values()))
    assert {fold: len(prompts[fold]) for fold in sizes} == sizes
    np.testing.assert_array_equal(folds, data.assign_folds(table, **options))


@pytest.mark.parametrize("split_by", ["prompt", "image"])
def test_other_seeds_draw_other_folds(split_by):
    table = table_of([f"thing {i // 2}" for i in range(40)])
    drawn = {tuple(data.assign_folds(table, **{**SPLIT, "split_by": split_by, "seed": seed})) for seed in range(8)}
    assert len(drawn) == 8


def test_folds_of_images_have_their_sizes_and_need_no_prompts():
    table = table_of([""] * 40, c=np.nan)
    folds = data.assign_folds(table, split_by="image", test_size=0.2, val_size=0.1, seed=3)
    assert {fold: int((folds == fold).sum()) for fold in data.FOLDS} == {"train": 28, "val": 4, "test": 8}


def test_folds_of_images_may_share_prompts_and_folds_of_prompts_may_not():
    table = table_of([f"thing {i % 5}" for i in range(40)])
    by_image = data.assign_folds(table, **{**SPLIT, "split_by": "image"})
    assert table.groupby("prompt")["name"].agg(lambda rows: len(set(by_image[rows.index]))).max() > 1
    by_prompt = data.assign_folds(table, **SPLIT)
    assert table.groupby("prompt")["name"].agg(lambda rows: len(set(by_prompt[rows.index]))).max() == 1


def test_the_split_column_wins_over_every_option(make_dataset):
    rows = scored_rows(6, 2)
    given = ["train", "test", "val"] * 4
    for row, fold in zip(rows, given, strict=True):
        row["split"] = fold
    table = read(make_dataset(rows))
    for seed, split_by in itertools.product((0, 1), ("prompt", "image")):
        folds = data.assign_folds(table, **{**SPLIT, "seed": seed, "split_by": split_by})
        assert folds.tolist() == given


def test_an_empty_split_column_is_none():
    table = table_of([f"thing {i // 2}" for i in range(20)])
    assert set(data.assign_folds(table, **SPLIT)) == set(data.FOLDS)


@pytest.mark.parametrize("wrong", ["", "training", "Test", "0"])
def test_an_unknown_fold_is_refused_by_row(wrong):
    table = table_of(["a"] * 8, split=["train", "train", "val", wrong, "val", "test", wrong, "test"])
    message = refusal(data.assign_folds, table, **SPLIT)
    assert f"row 5: split is {wrong!r}, must be train, val or test; 2 such row(s)" in message


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_split_column_that_leaves_a_fold_empty_is_refused(missing):
    others = [fold for fold in data.FOLDS if fold != missing]
    message = refusal(data.assign_folds, table_of(["a", "b", "c", "d"] * 2, split=others * 4), **SPLIT)
    assert f"the {missing} fold has 0 image(s)" in message


@pytest.mark.parametrize(
    ("split", "empty"), [(["train", "test"] * 4, "val"), (["test"] * 8, "train"), (["train"] * 8, "val")]
)
def test_a_split_column_from_which_no_validation_fold_can_be_drawn_is_refused(split, empty):
    message = refusal(data.assign_folds, table_of(["a"] * 8, split=split), **SPLIT)  # training has one prompt at most
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
    folds = data.assign_folds(table, **options)
    of = by_fold(numbers, folds)
    assert of["test"] == tested and len(of["val"]) == num_val
    assert not of["val"] & of["train"] and of["val"] | of["train"] == set(numbers) - tested
    np.testing.assert_array_equal(folds, data.assign_folds(table, **options))


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
        folds = data.assign_folds(table, **options)
        of = by_fold(numbers, folds)
        assert len(of["val"]) == num_val and len(of["test"]) in (count // num_parts, math.ceil(count / num_parts))
        assert sum(map(len, of.values())) == count  # no prompt is in two folds
        np.testing.assert_array_equal(folds, data.assign_folds(table, **options))
        tested += of["test"]
    assert sorted(tested) == sorted(set(numbers))


@pytest.mark.parametrize(("split_by", "column"), [("image", "name"), ("group", "reference")])
def test_parts_are_also_cut_out_of_images_and_references(split_by, column):
    table = table_of([""] * 20, reference=[f"ref{i // 2}" for i in range(20)], c=np.nan)
    options = {**SPLIT, "split_by": split_by}
    tested = [table[column][data.assign_folds(table, **options, part=(k, 3)) == "test"].unique() for k in (1, 2, 3)]
    assert sorted(np.concatenate(tested)) == sorted(table[column].unique())


def test_other_seeds_cut_other_parts():
    table = table_of([f"thing {i // 2}" for i in range(40)])
    tested = {tuple(data.assign_folds(table, **{**SPLIT, "seed": s}, part=(1, 4)) == "test") for s in range(8)}
    assert len(tested) == 8


def test_parts_are_refused_beside_folds_of_its_own_and_where_there_are_too_few_prompts():
    split = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    message = refusal(data.assign_folds, table_of(list("aabbccdd"), split=split), **SPLIT, part=(1, 2))
    assert message.startswith("--kfold: the data set has folds of its own")
    message = refusal(data.assign_folds, table_of(list("aabbccdd")), **SPLIT, part=(1, 5))
    assert message == "4 prompt(s) cannot be cut into 5 parts; lower --kfold"
    message = refusal(data.assign_folds, table_of(list("aabb")), **SPLIT, part=(1, 2))
    assert message.startswith("2 prompt(s) cannot fill three folds")


@pytest.mark.parametrize("task", ["q", "c"])
def test_every_fold_needs_two_scores_of_each_task(task):
    split = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    scores = np.arange(8.0)
    scores[5] = np.nan
    message = refusal(data.assign_folds, table_of(["a"] * 8, split=split, **{task: scores}), **SPLIT)
    assert f"the val fold has 1 image(s) with a score of {TASKS[task]}, needs at least 2" in message
    assert data.assign_folds(table_of(["a"] * 8, split=split, **{task: np.nan}), **SPLIT).tolist() == split


@pytest.mark.parametrize("prompts", [["a"], ["a"] * 9, ["a", "A ", " a"], ["a", "b"] * 6])
def test_too_few_prompts_for_three_folds_are_refused_with_their_number(prompts):
    message = refusal(data.assign_folds, table_of(prompts), **SPLIT)
    assert message.startswith(f"{len({prompt.strip().lower() for prompt in prompts})} prompt(s)")
    assert "--test_size 0.25" in message and "--val_size 0.25" in message


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_for_three_folds_are_refused_with_their_number(count):
    message = refusal(data.assign_folds, table_of(["a"] * count), **{**SPLIT, "split_by": "image"})
    assert message.startswith(f"{count} image(s) cannot fill three folds")


def test_sizes_that_leave_no_training_prompt_are_refused():
    table = table_of([f"thing {i // 3}" for i in range(12)])
    assert "4 prompt(s)" in refusal(data.assign_folds, table, split_by="prompt", test_size=0.5, val_size=0.45, seed=0)


def test_splitting_by_prompt_needs_a_prompt_in_every_row():
    message = refusal(data.assign_folds, table_of(["a", "b", "", "c"], c=np.nan), **SPLIT)
    assert "row 4" in message and "--split_by image" in message


# -- what belongs together

KEYS = st.sampled_from(["", "a", "b", "c"])


@given(st.lists(st.tuples(KEYS, st.booleans()), min_size=1, max_size=12))
def test_groups_are_equal_keys_but_those_that_stand_alone(items):
    key, alone = pd.Series([key for key, _ in items]), pd.Series([alone for _, alone in items])
    codes = data.groups_of(key, alone)
    for i, j in itertools.combinations(range(len(items)), 2):
        assert (codes[i] == codes[j]) == (key[i] == key[j] and not alone[i] and not alone[j])


@given(st.lists(st.tuples(st.sampled_from(["", "a", "A", "b"]), KEYS), min_size=1, max_size=12))
def test_a_cluster_is_a_prompt_or_without_one_a_reference_or_else_an_image(items):
    table = table_of([prompt for prompt, _ in items], reference=[reference for _, reference in items])
    codes = data.clusters(table)
    for (i, (prompt, reference)), (j, (prompt2, reference2)) in itertools.combinations(enumerate(items), 2):
        told = prompt or prompt2
        assert (codes[i] == codes[j]) == (prompt.lower() == prompt2.lower() if told else reference == reference2 != "")


# -- label scales


@given(st.floats(-100, 100), st.floats(0.01, 100), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_scores_survive_the_way_to_label_units_and_back(low, width, shares):
    scale = data.LabelScale(low, low + width)
    mos = low + width * np.array(shares)
    np.testing.assert_allclose(scale.to_mos(scale.to_unit(mos)), mos, atol=1e-9)
    np.testing.assert_allclose(scale.to_unit(mos), shares, atol=1e-9 * max(1, (abs(low) + width) / width))


def test_only_what_people_see_is_clamped():
    scale = data.LabelScale(1.0, 5.0)
    assert scale.to_unit(np.array([0.0, 1.0, 3.0, 5.0, 7.0])).tolist() == [-0.25, 0.0, 0.5, 1.0, 1.5]
    mos = scale.to_mos(np.array([-0.25, 0.0, 0.5, 1.0, 1.5]))
    assert mos.tolist() == [0.0, 1.0, 3.0, 5.0, 7.0]
    assert scale.clamp(mos).tolist() == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert np.isnan(scale.to_unit(np.array([math.nan]))).all() and np.isnan(scale.to_mos(np.array([math.nan]))).all()


def test_the_scale_comes_from_the_training_fold_alone_and_passes_over_gaps():
    folds = np.array(["train", "val", "train", "test", "train"])
    mos = np.array([2.0, 0.0, 4.0, 9.0, np.nan])
    assert data.label_scale(mos, folds, None, "--mos_range_q") == data.LabelScale(2.0, 4.0)


def test_a_given_range_is_the_scale_and_its_ends_belong_to_it():
    folds = np.array(["train", "val", "test"])
    found = data.label_scale(np.array([1.0, np.nan, 5.0]), folds, (1.0, 5.0), "--mos_range_q")
    assert found == data.LabelScale(1.0, 5.0)


def test_scores_outside_a_given_range_are_refused_with_their_number():
    folds = np.array(["train", "val", "test", "train"])
    message = refusal(data.label_scale, np.array([1.0, 0.5, 5.5, np.nan]), folds, (1.0, 5.0), "--mos_range_c")
    assert message.startswith("--mos_range_c 1.0 5.0: 2 score(s) lie outside, such as 0.5")


def test_equal_training_scores_are_refused_unless_a_range_is_given():
    folds, mos = np.array(["train", "train", "val"]), np.array([3.0, 3.0, 4.0])
    message = refusal(data.label_scale, mos, folds, None, "--mos_range_q")
    assert "every training score is 3.0" in message and "--mos_range_q" in message
    assert data.label_scale(mos, folds, (1.0, 5.0), "--mos_range_q").high == 5.0


# -- the whole


def test_examples_hold_what_the_files_say(make_dataset):
    rows = scored_rows()
    rows[0]["mos_quality"] = ""
    files = make_dataset(rows)
    examples = load(files.csv, files.images, USUAL, **SPLIT, ranges={"q": (1.0, 5.0), "c": None})
    assert sorted(np.concatenate([examples.rows(fold) for fold in data.FOLDS])) == list(range(len(rows)))
    assert examples.scales["q"] == data.LabelScale(1.0, 5.0)
    train = [rows[i]["mos_align"] for i in examples.rows("train")]
    assert examples.scales["c"] == data.LabelScale(min(train), max(train))
    assert examples.mos("c", "val").tolist() == [rows[i]["mos_align"] for i in examples.rows("val")]
    units = examples.unit_targets
    assert np.isnan(units["q"]).tolist() == [True] + [False] * (len(rows) - 1)
    assert units["q"][5] == pytest.approx((rows[5]["mos_quality"] - 1) / 4)
    assert examples.train_means["c"] == pytest.approx((np.mean(train) - min(train)) / (max(train) - min(train)))
    assert examples.files == images.check_images([files.images / row["name"] for row in rows])
    assert examples.fingerprint == data.fingerprint(files.csv.read_bytes(), [file.digest for file in examples.files])


def test_unreadable_images_are_found_while_reading_the_data_set(make_dataset):
    files = make_dataset(scored_rows())
    (files.images / "gen1_3.png").write_bytes(b"")
    message = refusal(load, files.csv, files.images, USUAL, **SPLIT, ranges=NO_RANGES)
    assert message == "1 of 24 images cannot be read: gen1_3.png (not an image)"


def test_the_demo_set_is_a_data_set(demo_set):
    examples = load(*demo_set, USUAL, **SPLIT, ranges={"q": (1.0, 5.0), "c": (1.0, 5.0)})
    assert len(examples.table) == 64 and examples.table["prompt"].nunique() == 8
    assert {fold: len(examples.rows(fold)) for fold in data.FOLDS} == {"train": 32, "val": 16, "test": 16}
    assert (examples.table["explanation"] != "").any() and examples.table["group"].nunique() == 8


def test_agiqa_3k_is_a_data_set(agiqa_dir):
    table = data.read_table(agiqa_dir / "data.csv", agiqa_dir / "images", USUAL)
    assert not table[["q", "c"]].isna().any(axis=None)
    assert table["q"].between(0, 5).all() and table["c"].between(0, 5).all()
    assert {"AttnGAN_normal", "DALLE2_normal", "midjourney_normal", "sd1.5_highcorr"} <= set(table["group"])
    assert "" not in set(table["group"])
    folds = data.assign_folds(table, split_by="prompt", test_size=0.2, val_size=0.1, seed=42)
    plain = table["prompt"].str.lower().str.split().str.join(" ")
    assert pd.Series(folds).groupby(plain).nunique().max() == 1
    assert abs((folds == "test").mean() - 0.2) < 0.05
    assert images.check_images(table["path"].tolist()[::300])


# -- leakage

NO_LEAK = {what: {"val": 0, "test": 0} for what in ("prompt", "reference", "content")}


def set_with_folds(
    make_dataset, prompts: list[str], folds: list[str], twins: dict[int, int] | None = None, **columns: list[str]
):
    """Examples with given prompts and folds; `twins` gives an image the content of another."""
    rows = [
        {"name": f"g_{i}.png", "prompt": prompt, "mos_quality": 1 + i / 10, "split": fold}
        for i, (prompt, fold) in enumerate(zip(prompts, folds, strict=True))
    ]
    for column, values in columns.items():
        rows = [{**row, column: value} for row, value in zip(rows, values, strict=True)]
    files = make_dataset(rows)
    for copy, original in (twins or {}).items():
        (files.images / f"g_{copy}.png").write_bytes((files.images / f"g_{original}.png").read_bytes())
    options = {"split_by": "prompt", "test_size": 0.2, "val_size": 0.1, "seed": 1, "ranges": {"q": None, "c": None}}
    return load(files.csv, files.images, data.Columns(), **options)


FOLDS_OF_EIGHT = ["train"] * 4 + ["val"] * 2 + ["test"] * 2


def test_a_clean_split_leaks_nothing_and_is_not_spoken_of(make_dataset):
    examples = set_with_folds(make_dataset, list("aabbccdd"), FOLDS_OF_EIGHT, reference=list("eeffgghh"))
    assert data.leakage(examples) == NO_LEAK
    assert data.leakage_notes(examples) == []


def test_planted_leaks_are_counted_by_fold_and_kind(make_dataset):
    prompts = ["a cat", "b", "c", "d", "e", "A  Cat", "e", "d"]  # case and spacing hide nothing; 6 leaks from val
    references = ["r", "s", "", "", "r", "s", "r", "R"]  # a file name, for which case matters; none is none
    twins = {7: 0, 1: 0}  # a pair within a fold is fine
    examples = set_with_folds(make_dataset, prompts, FOLDS_OF_EIGHT, twins, reference=references)
    assert data.leakage(examples) == {
        "prompt": {"val": 1, "test": 2},
        "reference": {"val": 2, "test": 1},
        "content": {"val": 0, "test": 1},
    }
    assert data.leakage_notes(examples) == [
        "leakage: 1 of 2 val images share their prompt with an earlier fold",
        "leakage: 2 of 2 test images share their prompt with an earlier fold",
        "leakage: 2 of 2 val images share their reference with an earlier fold",
        "leakage: 1 of 2 test images share their reference with an earlier fold",
        "leakage: 1 of 2 test images share their content with an earlier fold",
    ]


def test_images_without_prompts_and_references_leak_by_content_only(make_dataset):
    examples = set_with_folds(make_dataset, [""] * 8, FOLDS_OF_EIGHT, twins={4: 3})
    assert data.leakage(examples) == {**NO_LEAK, "content": {"val": 1, "test": 0}}


# -- reference images


def test_distorted_copies_of_a_reference_stay_in_one_fold(make_dataset):
    rows = [{"name": f"d{i}.png", "mos_quality": 1 + i / 10, "reference": f"ref{i // 4}"} for i in range(40)]
    files = make_dataset(rows)
    table = data.read_table(files.csv, files.images, data.Columns())
    folds = data.assign_folds(table, split_by="group", test_size=0.2, val_size=0.1, seed=1)
    assert (
        pd.DataFrame({"reference": table["reference"], "fold": folds}).groupby("reference")["fold"].nunique().max() == 1
    )
    assert (folds == "test").sum() == 8 and (folds == "val").sum() == 4
    with pytest.raises(ValueError, match=r"row 2 has no prompt, .*use --split_by group"):
        data.assign_folds(table, split_by="prompt", test_size=0.2, val_size=0.1, seed=1)
    with pytest.raises(ValueError, match=r"row 2 has no reference, .*use --split_by image"):
        data.assign_folds(table.assign(reference=""), split_by="group", test_size=0.2, val_size=0.1, seed=1)


# -- spreads of the opinions


def examples_of(table: pd.DataFrame, scales: dict[str, data.LabelScale]) -> data.Examples:
    return data.Examples(table, np.array(["train"] * len(table)), scales, [], "")


def test_spreads_are_in_label_units_and_gaps_get_the_median():
    table = table_of(["a"] * 4, q_std=[0.4, np.nan, 1.2, 0.6], c_std=np.nan)
    scales = {"q": data.LabelScale(1.0, 5.0), "c": data.LabelScale(0.0, 2.0)}
    spreads = examples_of(table, scales).spreads
    assert list(spreads) == ["q"]
    np.testing.assert_allclose(spreads["q"], [0.1, 0.15, 0.3, 0.15])


def test_a_table_without_spreads_has_none():
    scale = data.LabelScale(0.0, 1.0)
    assert examples_of(table_of(["a"] * 4), {"q": scale}).spreads == {}
    table = table_of(["a"] * 4, q_std=1.0, authenticity=1.0)
    assert list(examples_of(table, {"q": scale, "authenticity": scale}).spreads) == ["q"]


# -- several data sets


def labelled(table: pd.DataFrame, title: str, ranges=None, **columns: Any) -> data.Labelled:
    """Rows of a table as a data set of their own."""
    rows = table.reset_index(drop=True).assign(**columns)
    return data.Labelled(title=title, table=rows, ranges=ranges or {}, labels=title.encode())


@pytest.fixture
def two_tables(make_dataset) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables of 24 images each, which share no prompt and no image."""
    rows = [{**row, "std_quality": 0.5 + i / 100, "reference": f"r{i // 6}"} for i, row in enumerate(scored_rows(16))]
    table = read(make_dataset(rows))
    return table[:24], table[24:]


def test_one_data_set_keeps_its_names_and_scores(two_tables):
    examples = data.build_examples([labelled(two_tables[0], "one")], **SPLIT)
    assert examples.sets == ["one"] and examples.only("one") is examples
    columns = ["name", "prompt", "q", "c", "q_std"]
    pd.testing.assert_frame_equal(examples.table[columns], two_tables[0][columns])


def test_joined_data_sets_are_named_and_split_each_by_itself(two_tables):
    sources = [labelled(two_tables[0], "one"), labelled(two_tables[1], "two")]
    examples = data.build_examples(sources, **{**SPLIT, "split_by": ["prompt", "group"]})
    alone = [
        data.build_examples([source], **{**SPLIT, "split_by": unit})
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
    assert examples.fingerprint == data.fingerprint(b"onetwo", digests) != alone[0].fingerprint


def test_scores_are_brought_to_the_scale_of_the_first_data_set_in_their_order(two_tables):
    first, second = two_tables
    shuffled = np.random.default_rng(0).uniform(10, 90, len(second))
    ranges = [{"q": (1.0, 5.0)}, {"q": (0.0, 100.0)}]
    sources = [labelled(first, "one", ranges[0]), labelled(second, "two", ranges[1], q=shuffled, q_std=25.0)]
    examples = data.build_examples(sources, **SPLIT)
    assert examples.scales["q"] == data.LabelScale(1.0, 5.0)
    one, two = examples.only("one").table, examples.only("two").table
    assert one["q"].tolist() == first["q"].tolist() and one["q_std"].tolist() == first["q_std"].tolist()
    np.testing.assert_allclose(two["q"], 1 + shuffled / 25)
    np.testing.assert_allclose(two["q_std"], 1.0)
    assert np.argsort(two["q"]).tolist() == np.argsort(shuffled).tolist()
    np.testing.assert_allclose(examples.unit_targets["q"][24:], shuffled / 100)
    np.testing.assert_allclose(examples.spreads["q"][24:], 0.25)


def test_without_ranges_the_training_folds_are_laid_over_each_other(two_tables):
    examples = data.build_examples([labelled(two_tables[0], "one"), labelled(two_tables[1], "two")], **SPLIT)
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
    examples = data.build_examples(sources, extra=["authenticity"], **SPLIT)
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
    message = refusal(data.build_examples, [labelled(table, "one")], extra=["authenticity"], **SPLIT)
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
    examples = data.build_examples([labelled(table[:8], "one"), labelled(table[8:], "two")], **SPLIT)
    # Two data sets may call different images r0: references are compared within a set.
    assert data.leakage(examples) == {**NO_LEAK, "prompt": {"val": 1, "test": 1}, "content": {"val": 0, "test": 1}}


# -- prompts that joined sets share


def test_a_prompt_that_an_earlier_set_has_placed_keeps_its_fold_unless_the_set_brings_its_own():
    placed: dict[str, str] = {}
    table = pd.DataFrame({"prompt": ["a cat", "b", "", "c"], "split": ""})
    first = data.follow_prompts(table, np.array(["train", "val", "test", "test"]), placed)
    assert first.tolist() == ["train", "val", "test", "test"]
    later = pd.DataFrame({"prompt": ["A  Cat", "c", "d", ""], "split": ""})
    assert data.follow_prompts(later, np.array(["test", "train", "val", "train"]), dict(placed)).tolist() == (
        ["train", "test", "val", "train"]
    )
    official = later.assign(split="test")
    assert data.follow_prompts(official, np.array(["test"] * 4), dict(placed)).tolist() == ["test"] * 4


def test_joined_sets_share_no_prompt_between_folds(make_dataset):
    rows = [{"name": f"g_{i}.png", "prompt": f"p{i % 10}", "mos_quality": 1 + i / 30} for i in range(30)]
    files = make_dataset(rows)
    table = data.read_table(files.csv, files.images, data.Columns())
    sources = [
        data.Labelled(title=title, table=part.reset_index(drop=True), ranges={}, labels=b"")
        for title, part in (("one", table[:30]), ("other", table[::-1]))
    ]
    examples = data.build_examples(sources, split_by="prompt", test_size=0.2, val_size=0.2, seed=1)
    assert data.leakage(examples)["prompt"] == {"val": 0, "test": 0}
    assert set(examples.only("other").folds) == set(data.FOLDS)


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


# -- images that are left out


def skipping(files, **options: Any) -> data.Examples:
    table = data.read_table(files.csv, files.images, USUAL, may_be_missing=True)
    source = data.Labelled(title="csv", table=table, ranges={}, labels=files.csv.read_bytes())
    usual = {"split_by": "prompt", "test_size": 0.2, "val_size": 0.2, "seed": 3}
    return data.build_examples([source], **{**usual, "skip_bad": True, **options})


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
