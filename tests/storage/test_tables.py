"""`storage/tables.py`: no text is taken for a formula, and every one comes back."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storage import tables

TEXTS = st.text(st.one_of(st.sampled_from("'=+-@\t\r\n,\" 1a"), st.characters(codec="utf-8", exclude_characters="\0")))


@given(st.lists(TEXTS, min_size=1), TEXTS)
@example(["=", "'=", "''=", "'", "'a", "-1", "\t"], "=score")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_come_back_from_a_file_in_which_none_begins_as_a_formula(tmp_path, texts, title):
    path = tmp_path / "a.csv"
    table = pd.DataFrame({title + "x": texts, "number": np.arange(len(texts)) - 1.5})
    tables.write_csv(path, table)
    options = {"keep_default_na": False, "dtype": {0: str}}
    pd.testing.assert_frame_equal(tables.read_csv(path, **options), table, check_dtype=False)
    raw = pd.read_csv(path, **options)
    assert not any(re.match(r"[=+\-@\t\r]", text) for text in [*raw.iloc[:, 0], *raw.columns])
    assert raw["number"].tolist() == table["number"].tolist()


@pytest.mark.parametrize("start", "=+-@\t\r")
def test_an_apostrophe_goes_before_what_begins_as_a_formula_and_nothing_else(start):
    assert tables.escape(f"{start}1") == f"'{start}1"
    assert (tables.escape(f"1{start}1"), tables.escape(-1.5), tables.escape("it's")) == (f"1{start}1", -1.5, "it's")


def test_columns_keep_their_kind():
    table = pd.DataFrame({"text": ["=a", None], "none": [None, None], "number": [-1.0, np.nan], "is": [True, False]})
    changed = tables.map_cells(table, tables.escape)
    assert changed.dtypes.tolist() == table.dtypes.tolist() and changed["text"].tolist()[0] == "'=a"


def test_a_carriage_return_begins_no_row(tmp_path):
    tables.write_csv(tmp_path / "a.csv", pd.DataFrame({"name": ["a\r=1"], "score": [0.5]}))
    assert (tmp_path / "a.csv").read_bytes().splitlines(keepends=True)[0].startswith(b'"name"')
    assert len(pd.read_csv(tmp_path / "a.csv")) == 1


def test_a_table_that_somebody_else_wrote_keeps_its_apostrophes_but_before_formulas(tmp_path: Path):
    (tmp_path / "a.csv").write_text("name\n'quoted'\n'=a\n=b\n")
    assert tables.read_csv(tmp_path / "a.csv")["name"].tolist() == ["'quoted'", "=a", "=b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("," * 1000 + "\n", "has more than 1000 columns"),
        ("name\n" + "x," * 50_000 + "x\n", "does not match length of data"),
        ("name,score\na," + "9" * 300 + "\n", "column 'score' has a number of more than 64 bits"),
        ("name\na\nb,1\n", "Expected 1 fields in line 3, saw 2"),
        (",".join(["x" * 10_000] * 200), "the header has more than 1048576 characters"),
    ],
)
def test_a_table_out_of_bounds_is_refused_soon_and_in_a_line(content, says, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        tables.read_csv(path)
    assert str(caught.value).startswith(f"{path}: cannot be read (") and "\n" not in str(caught.value)
    assert time.process_time() - start < 2


def test_csv_is_utf8_without_an_index_and_with_nine_significant_digits(tmp_path):
    table = pd.DataFrame(
        {
            "name": ["猫.png", 'a "b", c'],
            "score": [1 / 3, 123456.7890123],
            "small": [1.23456789012e-7, np.nan],
            "count": [1, 10_000_000_000],
        },
        index=[7, 8],
    )
    tables.write_csv(tmp_path / "a.csv", table)
    assert (tmp_path / "a.csv").read_bytes().decode("utf-8").splitlines() == [
        "name,score,small,count",
        "猫.png,0.333333333,1.23456789e-07,1",
        '"a ""b"", c",123456.789,,10000000000',
    ]


def test_float32_numbers_survive_a_csv_exactly(tmp_path):
    values = np.random.default_rng(0).normal(size=500).astype(np.float32)
    tables.write_csv(tmp_path / "a.csv", pd.DataFrame({"x": values.astype(np.float64)}))
    assert np.array_equal(pd.read_csv(tmp_path / "a.csv")["x"].astype(np.float32), values)
