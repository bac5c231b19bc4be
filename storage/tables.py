"""The program's own tables as CSV: texts that no spreadsheet takes for a formula, and that come back as they were."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from storage.atomic import atomic_write
from storage.messages import one_line, quoted
from storage.plain_files import check_csv_header

FORMULA = re.compile(r"'*[=+\-@\t\r]")  # how a formula begins for a spreadsheet, behind any apostrophes
ESCAPED = re.compile(r"'+[=+\-@\t\r]")


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
