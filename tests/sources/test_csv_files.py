"""`csv_files`: what may be in a CSV, cell by cell, and how it is refused by row and column."""

from __future__ import annotations

import csv
import math

import numpy as np
import pandas as pd
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
        ("name,prompt,mos_quality\na.png,a cat, a dog,3\n", "row 2 is longer than the header"),
        ("name,prompt,mos_quality\na.png,b,3\na.png,a cat, a dog,3\n", "row 3 is longer"),
        ('name,prompt,mos_quality\na.png,"never closed,3\n', "double quotes"),
        ("name,prompt,mos_quality\na.png,b,3\na.png,a cat, a dog, a fox,3\n", "line 3 is longer than the header"),
        ("file;text;score\na;b;3\n", "no column 'name' among 'file', 'text', 'score'"),
        ("name,text;prompt\na,b;c\n", "can be read with commas or semicolons between columns"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused_by_file_and_reason(make_dataset, text, says):
    files = make_dataset(text=text)
    message = refusal(read, files)
    assert says in message and str(files.csv) in message


@pytest.mark.parametrize(("encoding", "text"), [("gbk", "两只猫"), ("cp1252", "café"), ("latin-1", "ü")])
def test_encodings_that_nothing_tells_are_refused_with_what_to_do(make_dataset, encoding, text):
    files = make_dataset([{"name": "a.png", "prompt": text, "mos_quality": 3}], encoding=encoding)
    message = refusal(read, files)
    assert "not UTF-8" in message and str(files.csv) in message


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(60), b"\xd0\xcf\x11\xe0" + bytes(60)])
def test_a_workbook_that_is_called_a_csv_is_refused_with_what_to_do(make_dataset, content):
    files = make_dataset(scored_rows(1))
    files.csv.write_bytes(content)
    assert "is a workbook, no CSV; save it as 'CSV UTF-8'" in refusal(read, files)


# -- as spreadsheets and other countries write it

FOUR = {"name": ["a.png", "b.png"], "prompt": ["a cat, a dog", "x; y"], "mos_quality": [3.5, 2.25], "mos_align": [4, 1]}


def written(delimiter: str = ",", decimal: str = ".", *, quoting: int = csv.QUOTE_MINIMAL, trailing: str = "") -> str:
    """FOUR as such a spreadsheet writes it; `trailing` ends the rows, or these and the header."""
    table = pd.DataFrame({name: [str(cell).replace(".", decimal) for cell in cells] for name, cells in FOUR.items()})
    table["name"] = FOUR["name"]
    lines = table.to_csv(index=False, sep=delimiter, quoting=quoting, lineterminator="\n").splitlines()  # type: ignore[call-overload]
    ends = [delimiter if trailing == "all" else "", *([delimiter if trailing else ""] * 2)]
    return "".join(line + end + "\n" for line, end in zip(lines, ends, strict=True))


@pytest.mark.parametrize("trailing", ["", "rows", "all"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL], ids=["unquoted", "quoted"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    ("delimiter", "decimal"), [(",", "."), (",", ","), (";", "."), (";", ","), ("\t", "."), ("\t", ","), ("|", ".")]
)
def test_delimiter_decimal_sign_and_encoding_make_no_difference_and_are_said(
    make_dataset, delimiter, decimal, encoding, quoting, trailing
):
    text = written(delimiter, decimal, quoting=quoting, trailing=trailing)
    files = make_dataset([{"name": name} for name in FOUR["name"]], text=text, encoding=encoding)
    said: list[str] = []
    table = read(files, say=said.append)
    assert [table[column].tolist() for column in ("name", "prompt", "q", "c")] == list(FOUR.values())
    parts = {
        {";": "semicolons", "\t": "tabs", "|": "bars"}.get(delimiter, ""),
        "UTF-16" * encoding.startswith("utf-16"),
        "decimal commas" * (decimal == ","),
    } - {""}
    assert len(said) == bool(parts)
    assert all(part in said[0] and str(files.csv) in said[0] for part in parts)


@pytest.mark.parametrize(("name", "said"), [("semicolon_decimal_comma", "semicolons"), ("tab_separated", "tabs")])
def test_real_exports_of_spreadsheets_are_read(wild_dir, agiqa_dir, name, said):
    found: list[str] = []
    table = csv_files.read_table(wild_dir / f"{name}.csv", agiqa_dir / "images", USUAL, say=found.append)
    official = pd.read_csv(agiqa_dir / "data.csv").set_index("name").loc[table["name"]]
    np.testing.assert_array_equal(table["q"], official["mos_quality"])
    np.testing.assert_array_equal(table["c"], official["mos_align"])
    assert table["prompt"].tolist() == official["prompt"].str.strip().tolist()
    assert len(found) == 1 and f"{said} between columns" in found[0]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_commas_that_may_be_those_of_thousands_are_refused(make_dataset, delimiter):
    files = make_dataset(text=f'name{delimiter}mos_quality\na.png{delimiter}"3,550"\nb.png{delimiter}"2,125"\n')
    message = refusal(read, files)
    assert f"{files.csv} row 2: mos_quality is '3,550', which may be 3.550 or 3550; write decimal points" in message


@pytest.mark.parametrize("header", ["name,prompt,mos_quality", "name,prompt,mos_quality,"])
def test_a_decimal_comma_without_quotes_is_refused_and_not_cut_in_two(make_dataset, header):
    files = make_dataset(text=f"{header}\na.png,a cat,3,55\nb.png,a dog,2,5\n")
    assert "row 2 is longer than the header; texts and numbers with commas need double" in refusal(read, files)


def test_decimal_commas_beside_points_are_refused_by_row(make_dataset):
    files = make_dataset(text="name;prompt;mos_quality\na.png;a cat;3.5\nb.png;a dog;2,5\n")
    assert f"{files.csv} row 3: mos_quality is '2,5'" in refusal(read, files)


def test_a_line_that_names_the_delimiter_is_no_header_but_a_row(make_dataset):
    text = "sep=;\nname;prompt;mos_quality\na.png;a cat;3,5\n"
    files = make_dataset([{"name": "a.png"}], text=text)
    table = read(files)
    assert (table["q"].tolist(), table["row"].tolist()) == ([3.5], [3])
    files.csv.write_text(text + "b.png;a dog;x\n")
    assert "row 4: mos_quality is 'x'" in refusal(read, files)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("before", ["{0}", "  {0}{0}", "sep=;{0}", "{0}sep=;{0} {0}"])
def test_blank_lines_before_the_header_are_passed_over_and_counted(make_dataset, before, newline):
    files = make_dataset([{"name": "a.png"}])
    lines = [before.format(newline), f"name;mos_quality{newline}", f"a.png;3{newline}"]
    files.csv.write_bytes("".join(lines).encode())
    table = read(files)
    assert (table["q"].tolist(), table["row"].tolist()) == ([3], [before.count("{0}") + 2])


@pytest.mark.parametrize("text", ["\n", "\r\n\r\n", "\n  ", "sep=;\n", "sep=;\n\n", "\r", "\ufeff\n"])
def test_a_csv_of_blank_lines_is_empty(make_dataset, text):
    files = make_dataset([{"name": "a.png"}])
    files.csv.write_bytes(text.encode())
    assert f"{files.csv}: is empty, must have a header" in refusal(read, files)


def test_a_blank_line_of_an_old_mac_is_refused(make_dataset):
    files = make_dataset([{"name": "a.png"}])
    files.csv.write_bytes(b"\rname,mos_quality\ra.png,3\r")
    assert f"{files.csv}: begins with a blank line" in refusal(read, files)


def test_utf_16_that_is_cut_off_is_refused_by_its_name(make_dataset):
    files = make_dataset(scored_rows(1), encoding="utf-16")
    files.csv.write_bytes(files.csv.read_bytes()[:-1])
    assert f"{files.csv}: not UTF-16" in refusal(read, files)


# -- several rows of an image


def rated(*scores: float, **more: object) -> list[dict[str, object]]:
    """Rows of one image by several raters, behind one of another."""
    other = {"name": "b.png", "prompt": "a dog", "mos_quality": 1, "std_quality": 0.25, **dict.fromkeys(more, "")}
    return [other, *({"name": "a.png", "prompt": "a cat", "mos_quality": score, **more} for score in scores)]


def test_several_rows_of_an_image_are_refused_by_row_with_the_way_on(make_dataset):
    message = refusal(read, make_dataset(rated(3, 4, 4.5)))
    assert "1 image name(s) occur more than once: a.png (rows 3, 4, 5); --duplicates mean averages" in message


def test_several_raters_are_averaged_and_their_deviation_is_kept(make_dataset):
    rows = rated(3, 4, 4.5, mos_align="", authenticity=2, explanation="dull")
    rows[2] |= {"mos_align": 2, "authenticity": 4, "explanation": "blurred"}
    rows[0] |= {"authenticity": 7}
    said: list[str] = []
    table = read(make_dataset(rows), extra=["authenticity"], duplicates="mean", say=said.append)
    assert table["name"].tolist() == ["b.png", "a.png"] and table["row"].tolist() == [2, 3]
    np.testing.assert_allclose(table["q"], [1, np.mean([3, 4, 4.5])])
    np.testing.assert_allclose(table["q_std"], [0.25, np.std([3, 4, 4.5])])
    np.testing.assert_allclose(table["c"], [math.nan, 2])
    assert table["c_std"].isna().all()
    np.testing.assert_allclose(table["authenticity"], [7, np.mean([2, 4, 2])])
    assert table["explanation"].tolist() == ["", "dull blurred"]
    assert said == [f"{table['path'][0].parent.parent / 'data.csv'}: --duplicates mean: 3 rows of 1 image(s) averaged"]


def test_names_that_mean_the_same_file_are_rows_of_one_image(make_dataset):
    rows = [{"name": name, "prompt": "a", "mos_quality": score} for name, score in (("a.png", 1), ("./A.PNG", 4))]
    files = make_dataset(rows, without=["./A.PNG"])
    assert "a.png" in refusal(read, files) or "A.PNG" in refusal(read, files)
    assert read(files, duplicates="mean")["q"].tolist() == [2.5]


@pytest.mark.parametrize("column", ["prompt", "split", "reference"])
def test_rows_of_an_image_that_differ_in_more_than_scores_are_refused(make_dataset, column):
    rows = rated(3, 4, split="train", reference="r.png")
    rows[-1] |= {column: "val"}
    message = refusal(read, make_dataset(rows), duplicates="mean")
    assert f"the rows of a.png (3, 4) differ in their {column}" in message


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
