"""The program's own tables as CSV: texts that no spreadsheet takes for a formula, and that come back as they were."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from reading import refuse_odd_file

FORMULA = re.compile(r"'*[=+\-@\t\r]")  # how a formula begins for a spreadsheet, behind any apostrophes
ESCAPED = re.compile(r"'+[=+\-@\t\r]")


def escape(cell: Any) -> Any:
    """A cell, with an apostrophe in front if it is a text that a spreadsheet would take for a formula."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def unescape(cell: Any) -> Any:
    """The cell that `escape` was given."""
    return cell[1:] if isinstance(cell, str) and ESCAPED.match(cell) else cell


def escaped(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts, those of the header too, are escaped; numbers stay numbers."""
    return changed(table, escape)


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """A table that the program wrote, by `pandas.read_csv` with these options. Raises what that raises, ValueError."""
    refuse_odd_file(path)
    return changed(pd.read_csv(path, **options), unescape)


def changed(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """A table with each text cell, the header's too, changed."""
    columns = {
        place: column if is_numeric_dtype(column) else column.map(change, na_action="ignore").astype(column.dtype)
        for place, (_, column) in enumerate(table.items())
    }
    return pd.DataFrame(columns, index=table.index).set_axis([change(name) for name in table.columns], axis=1)
