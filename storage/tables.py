"""Tables in files.

The program's own are CSV whose texts no spreadsheet takes for a formula, and that come back as they were. Those of
other people are read cell by cell as text, however they are written.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from storage.atomic import atomic_write
from storage.messages import one_line, quoted
from storage.plain_files import DELIMITERS, CsvForm, RefusedFile, check_csv_header, csv_form

Say = Callable[[str], object]  # is told what a user should know

FORMULA = re.compile(r"'*[=+\-@\t\r]")  # how a formula begins for a spreadsheet, behind any apostrophes
ESCAPED = re.compile(r"'+[=+\-@\t\r]")
DECIMAL_COMMA, GROUPED = re.compile(r"[+-]?\d*,\d+"), re.compile(r"[+-]?\d{1,3}(,\d{3})+")


def escape(cell: Any) -> Any:
    """A cell, with an apostrophe in front if it is a text that a spreadsheet would take for a formula."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def unescape(cell: Any) -> Any:
    """The cell that `escape` was given."""
    return cell[1:] if isinstance(cell, str) and ESCAPED.match(cell) else cell


def write(table: pd.DataFrame, path: Path) -> None:
    """Write UTF-8 CSV without an index: numbers with nine significant digits, texts, the header's too, escaped."""
    safe = map_cells(table, escape)
    # A bare carriage return ends a row for whoever reads it, but is no reason to quote for who writes it.
    texts = [*safe.columns, *(cell for _, column in safe.items() if not is_numeric_dtype(column) for cell in column)]
    quoting = csv.QUOTE_ALL if any("\r" in str(text) for text in texts) else csv.QUOTE_MINIMAL
    safe.to_csv(path, index=False, float_format="%.9g", encoding="utf-8", quoting=quoting)  # type: ignore[call-overload]


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """A table that the program wrote, by `pandas.read_csv` with these options.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        ValueError: it cannot be read; one line that names the file.
    """
    try:
        check_csv_header(path)
        with warnings.catch_warnings():  # where a row is longer than the header, pandas only warns
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, index_col=False, **options)
        refuse_huge(table)
        return map_cells(table, unescape)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None


def refuse_huge(table: pd.DataFrame) -> None:
    """Raise ValueError for whole numbers that no column of numbers can hold, which pandas leaves to Python."""
    for name, column in table.items():
        if column.dtype == object and any(type(cell) is int and cell.bit_length() > 64 for cell in column):
            raise ValueError(f"column {quoted(str(name))} has a number of more than 64 bits")


def map_cells(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """A table with each text cell, the header's too, changed."""
    columns = {
        place: column if is_numeric_dtype(column) else column.map(change, na_action="ignore").astype(column.dtype)
        for place, (_, column) in enumerate(table.items())
    }
    return pd.DataFrame(columns, index=table.index).set_axis([change(name) for name in table.columns], axis=1)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write UTF-8 CSV without an index; numbers with nine significant digits, texts as `tables.escape` has them."""
    atomic_write(path, lambda temporary: write(table, temporary))


def read_cells(path: Path, columns: Collection[str] = ()) -> tuple[pd.DataFrame, CsvForm | None]:
    """All cells as text, the header's in the first row, and how they are written.

    Args:
        path: a CSV, or by its suffix a workbook, of which the first sheet is read, or a JSON list of objects.
        columns: names that a CSV's header may have.

    Raises:
        OSError, ValueError, and others of pandas and openpyxl: it cannot be read.
    """
    if path.suffix == ".xlsx":
        raw = pd.read_excel(path, header=None, dtype=str, keep_default_na=False, na_filter=False)
        return raw.map(lambda cell: str(cell).strip()), None
    if path.suffix == ".json":
        content = pd.DataFrame(json.loads(path.read_text(encoding="utf-8-sig")), dtype=object)
        rows = [list(content.columns), *content.to_numpy().tolist()]
        return pd.DataFrame([[text_of(cell) for cell in row] for row in rows], dtype=object), None
    form = csv_form(path, columns)
    raw = pd.read_csv(path, **as_text(form)).fillna("")
    return raw.apply(lambda column: column.str.strip()), form


def text_of(value: Any) -> str:
    """A value of a JSON file as a cell."""
    if isinstance(value, list | dict):
        return json.dumps(value)
    return "" if value is None or value != value else str(value).strip()


def column_key(name: str) -> str:
    """A column's name without regard to case, blanks and underscores."""
    return re.sub(r"[\s_]+", "_", name.strip().lower())


def as_text(form: CsvForm) -> dict[str, Any]:
    """How pandas gives every cell as text, one column more than the header names; blank lines count as rows."""
    return {
        "header": None,
        "names": range(len(form.header) + 1),
        "sep": form.delimiter,
        "skiprows": form.num_before,
        "encoding": form.encoding,
        "dtype": str,
        "keep_default_na": False,
        "skipinitialspace": True,
        "skip_blank_lines": False,
    }


def check_width(raw: pd.DataFrame, form: CsvForm) -> pd.DataFrame:
    """The columns of a table up to the last that the header names.

    Raises:
        RefusedFile: something stands behind it, so that a text or a number has been cut in two.
    """
    width = max((place + 1 for place, name in enumerate(form.header) if name), default=len(form.header))
    extra = raw.iloc[:, width:]
    wrong = (extra.apply(lambda column: column.str.strip()) != "").any(axis=1)
    if wrong.any():
        raise RefusedFile(too_wide(int(wrong.idxmax()) + 1 + form.num_before, form))
    return raw.iloc[:, :width]


def too_wide(row: int, form: CsvForm) -> str:
    """What is wrong with a row that is longer than the header."""
    divided = DELIMITERS[form.delimiter]
    return f"row {row} is longer than the header; texts and numbers with {divided} need double quotes around them"


def with_decimal_points(
    raw: pd.DataFrame, columns: Collection[str], form: CsvForm | None, path: str | Path
) -> tuple[pd.DataFrame, bool]:
    """A table whose numbers have points, and whether they had commas: if none of the columns has a point anywhere.

    Args:
        columns: of numbers; some may be missing.
        form: how the table is written, if it is a CSV.

    Raises:
        ValueError: the commas may be decimal ones as well as those of thousands.
    """
    columns = [name for name in columns if name in raw.columns]
    cells = [(row, name, cell.strip()) for name in columns for row, cell in raw[name].items()]
    commas = [found for found in cells if DECIMAL_COMMA.fullmatch(found[2])]
    if not commas or any("." in cell for *_, cell in cells):
        return raw, False
    if (form is None or form.delimiter != ";") and all(GROUPED.fullmatch(cell) for *_, cell in commas):
        row, name, cell = commas[0]
        both = f"{cell.replace(',', '.')} or {cell.replace(',', '')}"
        raise ValueError(f"{path} row {row}: {name} is {cell!r}, which may be {both}; write decimal points")
    numbers = {
        name: raw[name].map(lambda cell: cell.replace(",", ".") if DECIMAL_COMMA.fullmatch(cell.strip()) else cell)
        for name in columns
    }
    return raw.assign(**numbers), True


def say_form(path: str | Path, form: CsvForm, say: Say, *, has_commas: bool = False) -> None:
    """Say how a file was read, if it is not UTF-8 with commas and decimal points."""
    if has_commas or not form.is_usual:
        say(f"{path}: read with {form}{', decimal commas' * has_commas}")
