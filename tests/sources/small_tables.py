"""Small data sets as tables, read or made up. No tests: these import it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sources import assemble, csv_files
from sources.examples import Examples, LabelledTable

USUAL = csv_files.Columns()
SPLIT = {"split_by": "prompt", "test_size": 0.25, "val_size": 0.25, "seed": 0}
NO_RANGES = {"q": None, "c": None}


def read(files, columns: csv_files.Columns = USUAL, **options: Any) -> pd.DataFrame:
    return csv_files.read_table(files.csv, files.images, columns, **options)


def load(csv_path, image_dir, columns: csv_files.Columns, *, ranges: dict[str, Any], **options: Any) -> Examples:
    """A CSV as a data set; `options` as `assemble.build_examples` takes them."""
    table = csv_files.read_table(csv_path, image_dir, columns)
    labelled = LabelledTable(title="csv", table=table, ranges=ranges, labels=csv_path.read_bytes())
    return assemble.build_examples([labelled], **options)


def table_of(prompts: list[str], **columns: Any) -> pd.DataFrame:
    """A table as `read_table` returns it, as far as splits look at it."""
    count = len(prompts)
    table = pd.DataFrame({"name": [f"{i}.png" for i in range(count)], "prompt": prompts, "split": "", "reference": ""})
    table["row"] = np.arange(count) + 2
    return table.assign(**{"q": np.arange(count) / 2, "c": np.arange(count) / 3, **columns})


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
    return load(files.csv, files.images, csv_files.Columns(), **options)


FOLDS_OF_EIGHT = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
