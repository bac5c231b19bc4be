"""`csv_files`: what may be in a CSV, cell by cell, and how it is refused by row and column."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import COLUMNS, csv_text, scored_rows
from refusals import refusal
from small_tables import USUAL, read

from sources import csv_files
from storage import image_files

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
    assert image_files.check_images(table["path"].tolist())
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
    columns = csv_files.Columns(
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
    message = refusal(read, files, csv_files.Columns(**{field: "nmae"}))
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
    assert "nowhere.csv: no such file" in refusal(csv_files.read_csv, tmp_path / "nowhere.csv")
    assert f"{tmp_path}: is not a plain file" in refusal(csv_files.read_csv, tmp_path)


def test_a_missing_image_folder_is_refused_by_flag_and_name(make_dataset, tmp_path):
    files = make_dataset(scored_rows(2))
    message = refusal(csv_files.read_table, files.csv, tmp_path / "nowhere", USUAL)
    assert "--image_base_dir" in message and "nowhere: no such folder" in message


def test_without_data_at_the_default_place_at_most_five_lines_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="AGIQA-3K") as caught:
        csv_files.read_csv("data/data.csv")
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
    np.testing.assert_array_equal(read(files, csv_files.Columns(consistency_std="sd"))["c_std"], [math.nan] * 3 + [0.7])
    assert read(files, scored=False)[["q_std", "c_std"]].isna().all(axis=None)


# -- generators


@pytest.mark.parametrize(
    ("name", "generator"),
    [("AttnGAN_normal_000.jpg", "AttnGAN_normal"), ("sub_dir/sd_1.png", "sd"), ("plain.png", ""), ("_1.png", "")],
)
def test_the_generator_is_the_file_name_up_to_its_last_underscore(name, generator):
    assert csv_files.generator_of(name) == generator
