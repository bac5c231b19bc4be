"""A CSV of images: read, checked, and brought into the form that all data sets share."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sources.image_names import check_image_names, generator_of, names_of
from storage import tables
from storage.messages import first_five, note, quoted
from storage.plain_files import RefusedFile, csv_form
from storage.tables import Say

NO_DATA = """no data at {path}. Three ways on:
  see it work now, without data:  python baseline.py --demo
  AGIQA-3K (2,982 images, MIT), from github.com/lcysyzxdxc/AGIQA-3k-Database:
                                  its data.csv as data/data.csv, its images into data/images
  your own images:                --data_csv_path CSV (name,prompt,mos_quality,mos_align) --image_base_dir DIR"""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How the CSV names what we read."""

    name: str = "name"
    prompt: str = "prompt"
    quality: str = "mos_quality"
    consistency: str = "mos_align"
    explanation: str = "explanation"
    group: str | None = None
    quality_std: str = "std_quality"
    consistency_std: str = "std_align"

    @classmethod
    def from_options(cls, options: object) -> Columns:
        """As options called `name_column`, `prompt_column`, ... say; what a program does not ask for is as usual."""
        names = [item.name for item in fields(cls)]
        given = {name: getattr(options, f"{name}_column") for name in names if hasattr(options, f"{name}_column")}
        return cls(**given)

    @property
    def names(self) -> set[str]:
        """All columns that may be read."""
        return {"split", "reference", *(name for name in vars(self).values() if name)}


def read_table(
    csv_path: str | Path,
    image_dir: str | Path,
    columns: Columns,
    *,
    scored: bool = True,
    extra: Sequence[str] = (),
    duplicates: str = "error",
    say: Say = note,
    **rules: Any,
) -> pd.DataFrame:
    """Read and check a CSV of images.

    Args:
        csv_path: a CSV with a header, as `read_csv` reads it.
        image_dir: the folder that the names are relative to.
        scored: whether the scores are read, and at least one of the two columns must hold some.
        extra: columns of further scores.
        duplicates: "mean" makes one row of an image's rows, by `average_rows`; "error" refuses them.
        say: is told how the file is written, if that is unusual, and what was made of it.
        rules: of `check_image_names`.

    Returns:
        One row per image: name, written (the name as the CSV has it), path, prompt ("" if none), explanation ("" if
        none), q, c and each extra score (MOS, float64, NaN where missing), q_std and c_std (of the opinions behind a
        score, NaN where not given), group (generator), reference and split ("" if the CSV has none), and row (as a
        spreadsheet counts).

    Raises:
        ValueError: one line naming the file, the row or the column, and the rule.
    """
    numbers = [columns.quality, columns.consistency, columns.quality_std, columns.consistency_std, *extra]
    raw = read_csv(csv_path, columns.names, numbers if scored else extra, say=say)  # indexed by row number
    if not Path(image_dir).is_dir():
        raise ValueError(f"--image_base_dir {image_dir}: no such folder")
    check_columns(list(raw.columns), columns, extra, csv_path)
    table = typed_columns(raw, columns, extra, csv_path, scored=scored)
    averaged = duplicates == "mean"
    paths = check_image_names(table, Path(image_dir), csv_path, may_repeat=averaged, say=say, **rules)
    own_names = names_of(table["name"], paths, Path(image_dir))
    table = table.assign(path=pd.Series(paths, table.index), name=own_names, written=table["name"])
    table["group"] = raw[columns.group].str.strip() if columns.group else table["name"].map(generator_of)
    return (average_rows(table, extra, csv_path, say) if averaged else table).reset_index(drop=True)


def typed_columns(
    raw: pd.DataFrame, columns: Columns, extra: Sequence[str], csv_path: str | Path, *, scored: bool
) -> pd.DataFrame:
    """The columns of `read_table` that the file itself has, scores as numbers. Raises ValueError."""

    def texts(column: str) -> pd.Series:
        return raw[column].str.strip() if column in raw.columns else pd.Series("", index=raw.index)

    table = pd.DataFrame(
        {
            "name": texts(columns.name),
            "prompt": texts(columns.prompt),
            "explanation": texts(columns.explanation),
            "q": parse_scores(raw, columns.quality, csv_path) if scored else np.nan,
            "c": parse_scores(raw, columns.consistency, csv_path) if scored else np.nan,
            **{column: parse_scores(raw, column, csv_path) for column in extra},
            "q_std": parse_scores(raw, columns.quality_std, csv_path) if scored else np.nan,
            "c_std": parse_scores(raw, columns.consistency_std, csv_path) if scored else np.nan,
            "split": texts("split"),
            "reference": texts("reference"),
            "row": raw.index,
        }
    )
    if scored:
        check_scored(table, columns, csv_path)
    return table


def average_rows(table: pd.DataFrame, extra: Sequence[str], csv_path: str | Path, say: Say) -> pd.DataFrame:
    """One row of all rows of an image, each the opinion of somebody else: mean scores, and their standard deviation.

    What people wrote (`explanation`) is joined; all else must be the same in the rows of an image.

    Raises:
        ValueError: it is not.
    """
    scores, same = ["q", "c", *extra], ["prompt", "group", "split", "reference"]
    images = table.groupby("path", sort=False)
    for column in same:
        counts = images[column].nunique()
        if (counts > 1).any():
            rows = table[table["path"] == counts.idxmax()]
            raise ValueError(
                f"{csv_path}: --duplicates mean: the rows of {rows['name'].iloc[0]} "
                f"({first_five(rows['row'].tolist())}) differ in their {column}: {quoted(rows[column].iloc[0])}, ..."
            )
    sizes = images["name"].transform("size")
    if (sizes > 1).any():
        say(f"{csv_path}: --duplicates mean: {(sizes > 1).sum()} rows of {(images.size() > 1).sum()} image(s) averaged")
    texts = images["explanation"].transform(lambda cells: " ".join(dict.fromkeys(filter(None, cells))))
    found = table.assign(explanation=texts, **{column: images[column].transform("mean") for column in scores})
    for task in ("q", "c"):  # a single opinion keeps the deviation that the file gives it
        alone = images[task].transform("count") < 2
        found.loc[~alone, f"{task}_std"] = images[task].transform("std", ddof=0)[~alone]
    return found[~table["path"].duplicated()]


def check_scored(table: pd.DataFrame, columns: Columns, csv_path: str | Path) -> None:
    """Raise ValueError for a table without any score, or a consistency score without a prompt."""
    if table[["q", "c"]].isna().all(axis=None):
        raise ValueError(
            f"{csv_path}: no scores in column {columns.quality!r} or {columns.consistency!r}; "
            "name yours with --quality_column, --consistency_column"
        )
    no_prompt = table[table["c"].notna() & (table["prompt"] == "")]
    if len(no_prompt):
        raise ValueError(
            f"{csv_path} row {no_prompt['row'].iloc[0]}: a consistency score without a prompt (column "
            f"{columns.prompt!r}); {len(no_prompt)} such row(s)"
        )


def check_columns(present: Sequence[str], columns: Columns, extra: Sequence[str], csv_path: str | Path) -> None:
    """Raise ValueError for a missing column. Usual names may be absent, those asked for by another name may not."""
    for flag, column, usual in (
        ("--name_column", columns.name, None),
        ("--prompt_column", columns.prompt, Columns.prompt),
        ("--quality_column", columns.quality, Columns.quality),
        ("--consistency_column", columns.consistency, Columns.consistency),
        ("--explanation_column", columns.explanation, Columns.explanation),
        ("--quality_std_column", columns.quality_std, Columns.quality_std),
        ("--consistency_std_column", columns.consistency_std, Columns.consistency_std),
        ("--group_column", columns.group, Columns.group),
        *(("--extra_scores", column, None) for column in extra),
    ):
        if column != usual and column not in present:
            raise ValueError(f"{csv_path}: no column {column!r} among {columns_found(present)}; name yours with {flag}")


def columns_found(present: Sequence[str]) -> str:
    """The names of columns for a message: the first twenty."""
    return ", ".join(map(quoted, present[:20])) + (f", ... ({len(present)} in all)" if len(present) > 20 else "")


def read_csv(
    path: str | Path, texts: Collection[str] = (), numbers: Collection[str] = (), *, say: Say = note
) -> pd.DataFrame:
    """All cells of a CSV as text, indexed by row as a spreadsheet counts: the header is row 1.

    Encoding and delimiter are told by `plain_files.csv_form`, a decimal comma by the scores; numbers have points then.
    Rows without any text are left out.

    Args:
        texts, numbers: columns that the file may have.
        say: is told of any form but UTF-8 with commas and decimal points.

    Raises:
        ValueError: one line naming the file and the rule.
    """
    with csv_errors(path):
        form = csv_form(path, {*texts, *numbers})
        raw = pd.read_csv(path, **tables.as_text(form))
        raw = tables.check_width(raw.fillna(""), form)  # a row that ends early
    raw.columns = raw.iloc[0].str.strip().tolist()
    raw.index = raw.index + 1 + form.num_before
    repeated = sorted({column for column in raw.columns[raw.columns.duplicated()] if column})
    if repeated:
        raise ValueError(f"{path}: the header has {quoted(repeated[0])} more than once")
    rows = raw.iloc[1:]
    rows = rows[(rows.apply(lambda column: column.str.strip()) != "").any(axis=1)]
    if rows.empty:
        raise ValueError(f"{path}: has a header but no rows")
    rows, has_commas = tables.with_decimal_points(rows, numbers, form, path)
    tables.say_form(path, form, say, has_commas=has_commas)
    return rows


def columns_present(path: str | Path, columns: Sequence[str], names: Collection[str]) -> list[str]:
    """Those of the columns that a CSV has, which may have others of these names. Raises ValueError."""
    header = read_csv(path, {*columns, *names}, say=lambda text: None).columns
    return [column for column in columns if column in header]


@contextmanager
def csv_errors(path: str | Path) -> Iterator[None]:
    """Turn what pandas raises for an unreadable CSV into a ValueError of one line."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(
            NO_DATA.format(path=path) if str(path) == "data/data.csv" else f"{path}: no such file"
        ) from None
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper().partition("-SIG")[0]
        raise ValueError(f"{path}: not {encoding} at byte {error.start}; save it as 'CSV UTF-8'") from None
    except UnicodeError as error:  # UTF-16 that says not which
        raise ValueError(f"{path}: {error}; save it as 'CSV UTF-8'") from None
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: is empty, must have a header and a row for each image") from None
    except RefusedFile as error:
        raise ValueError(f"{path}: {error}") from None
    except pd.errors.ParserError as error:
        reason = str(error).strip().rpartition("C error: ")[2]
        reason = re.sub(r"Expected \d+ fields in line (\d+), saw \d+", r"line \1 is longer than the header", reason)
        raise ValueError(
            f"{path}: not a readable CSV ({reason}); texts with commas or quotes need double quotes around them"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def parse_scores(raw: pd.DataFrame, column: str, path: str | Path) -> pd.Series:
    """A score column as floats; an empty cell (or no such column) is NaN. Raises ValueError for anything else."""
    if column not in raw.columns:
        return pd.Series(np.nan, index=raw.index)
    text = raw[column].str.strip()
    numbers = pd.to_numeric(text, errors="coerce").astype(float)
    wrong = (text != "") & ~np.isfinite(numbers)
    if wrong.any():
        first: Any = wrong.idxmax()
        raise ValueError(
            f"{path} row {first}: {column} is {quoted(text[first])}, must be a finite number or empty; "
            f"{wrong.sum()} such row(s)"
        )
    return numbers
