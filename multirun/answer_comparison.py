"""Whether runs of main.py differ: paired, on the test questions that they share, by bootstrap over images.

Every run is compared with the first; `comparison` reads what they left.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import metrics
from multirun.summary_text import SHOWN_KINDS, verdict
from storage.json_files import read_json

MIN_IMAGES = 20  # below which a bootstrap over them promises more than it holds
ASKED = ["image", "question", "answer"]  # what is the same where the data is
COLUMNS = ["by", "kind", "run", "questions", "images", "accuracy", "d_accuracy", "accuracy_low", "accuracy_high"]


def check_answers(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """A run's predictions by question, if they are of its test fold. Raises ValueError."""
    missing = [column for column in ("id", *ASKED, "accuracy") if column not in table.columns]
    if missing:
        raise ValueError(f"{folder}: predictions.csv has no column {missing[0]!r}; run it again with this version")
    try:
        fold = read_json(folder / "results.json").get("fold")
    except FileNotFoundError:
        raise ValueError(f"{folder}: an unfinished run, results.json is missing") from None
    if fold != "test":
        raise ValueError(f"{folder}: has no test answers, being a run with --no_test; run it again without")
    try:
        return table.astype({"accuracy": float}).set_index("id")
    except ValueError:
        raise ValueError(f"{folder}: predictions.csv has an accuracy that is no number") from None


def compare_answers(folders: Sequence[Path], found: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """A row for each kind of question and run, compared on the test questions of all runs.

    Args:
        found: the predictions of each, as their files have them.

    Returns:
        COLUMNS; "by" and "kind" are empty for all questions. Differences are to the first run, with 95 % intervals.

    Raises:
        ValueError: a run has no test answers, or the runs are of other data.
    """
    tables = [check_answers(folder, table) for folder, table in zip(folders, found, strict=True)]
    common = tables[0].index
    for folder, table in zip(folders, tables, strict=True):
        if not table.index.is_unique:
            raise ValueError(f"{folder}: predictions.csv has a question twice")
        common = common.intersection(table.index, sort=False)
    if not len(common):
        raise ValueError(f"{folders[0]} and the others share no test question: they are of other data")
    if any(len(table) > len(common) for table in tables):
        sizes = ", ".join(f"{len(table):,}" for table in tables)
        print(f"note: compared on the {len(common):,} test questions that all have, of {sizes}", file=sys.stderr)
    tables = [table.loc[common] for table in tables]
    for folder, table in zip(folders, tables, strict=True):
        if not table[ASKED].equals(tables[0][ASKED]):
            raise ValueError(f"{folder}: its questions and answers are not those of {folders[0]}")
    if (num_images := tables[0]["image"].nunique()) < MIN_IMAGES:
        print(f"note: only {num_images} images: the intervals are too narrow", file=sys.stderr)
    rows = [
        row for by, kind, chosen in kinds_of(tables) for row in compare_kind(folders, tables, chosen, by=by, kind=kind)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def kinds_of(tables: Sequence[pd.DataFrame]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(by, kind, its rows): all questions, then every kind that all tables tell of, the most frequent first."""
    first = tables[0]
    yield "", "", np.ones(len(first), dtype=bool)
    for column in first.columns:
        if column.endswith("_type") and all(column in table for table in tables):
            for kind in first[column].value_counts().index:
                yield column.removesuffix("_type"), str(kind), (first[column] == kind).to_numpy()


def compare_kind(
    folders: Sequence[Path], tables: Sequence[pd.DataFrame], chosen: np.ndarray, **about: str
) -> Iterator[dict[str, Any]]:
    """A row for each run on the chosen rows."""
    images = tables[0]["image"][chosen].tolist()
    first = tables[0]["accuracy"][chosen].to_numpy()
    for folder, table in zip(folders, tables, strict=True):
        own = table["accuracy"][chosen].to_numpy()
        row = {**about, "run": str(folder), "questions": len(own), "images": len(set(images)), "accuracy": own.mean()}
        if table is not tables[0]:
            row |= difference((own - first).mean(), metrics.mean_interval(own - first, images))
        yield row


def difference(mean: float, ends: Sequence[float] | None) -> dict[str, float]:
    """A difference as columns."""
    low, high = ends or (np.nan, np.nan)
    return {"d_accuracy": float(mean), "accuracy_low": low, "accuracy_high": high}


def compare_repeated_answers(folders: Sequence[Path], summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """As `compare_answers` for folders of repeated runs: means over runs, intervals over runs that are paired."""
    first, rows = summaries[0], []
    for by, kind in [("", ""), *((by, kind) for by, kinds in first["kinds"].items() for kind in kinds)]:
        found = [summary["kinds"].get(by, {}).get(kind) if by else summary["test"]["accuracy"] for summary in summaries]
        if None in found:
            continue
        for folder, summary, one in zip(folders, summaries, found, strict=True):
            row = {"by": by, "kind": kind, "run": str(folder), "questions": np.nan, "accuracy": one["mean"]}
            row["images"] = summary["images"]["test"]
            if summary is not first:
                apart = np.subtract(one["values"], found[0]["values"])
                row |= difference(apart.mean(), metrics.resampled_interval(apart, first["share"]))
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def title_of_kind(by: str, kind: str) -> str:
    """What a row is about, in words."""
    return f"{by.replace('_', ' ')}: {kind}" if by else "all questions"


def answer_table_lines(found: pd.DataFrame) -> list[str]:
    """The comparison as text, with the most frequent kinds."""
    width = max(len(run) for run in found["run"]) + 2
    shown = found[found.groupby("by")["kind"].transform(lambda kinds: pd.factorize(kinds)[0]) < SHOWN_KINDS]
    titles = [title_of_kind(by, kind) for by, kind in zip(shown["by"], shown["kind"], strict=True)]
    wide = max(map(len, titles)) + 2
    lines = [f"{'':<{wide}}{'':<{width}}{'questions':>10}{'accuracy':>10}   difference, 95 % interval"]
    before = ""
    for title, row in zip(titles, shown.to_dict("records"), strict=True):
        said = ""
        if np.isfinite(row["d_accuracy"]):
            said = f"   {row['d_accuracy']:+.3f}"
        if np.isfinite(row["accuracy_low"]):
            low, high = row["accuracy_low"], row["accuracy_high"]
            said += f" ({low:+.3f} .. {high:+.3f})  {verdict(low, high)}"
        count = f"{row['questions']:,.0f}" if np.isfinite(row["questions"]) else ""
        head = "" if title == before else title
        lines.append(f"{head:<{wide}}{row['run']:<{width}}{count:>10}{row['accuracy']:>10.3f}{said}")
        before = title
    return lines
