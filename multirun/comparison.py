"""Whether runs differ: paired, on the test images that they share, by bootstrap over prompts.

Every run is compared with the first. Folders of repeated runs are compared split by split. Runs of main.py, which
answer questions, are compared by `answer_comparison`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import metrics
from multirun import answer_comparison
from multirun.answer_comparison import ASKED
from multirun.summaries import is_of_answers, read_summary
from multirun.summary_text import verdict
from sources.scores import stem_of, tasks_of, title_of_stem
from storage import tables

PREDICTIONS_FILE = "predictions.csv"
MIN_CLUSTERS = 20  # prompts, below which a bootstrap over them promises more than it holds
COLUMNS = [
    "score",
    "set",
    "run",
    "images",
    "srocc",
    "plcc",
    "d_srocc",
    "srocc_low",
    "srocc_high",
    "d_plcc",
    "plcc_low",
    "plcc_high",
]


def read_predictions(folder: Path) -> pd.DataFrame:
    """The predictions of a run, as its file has them. Raises ValueError."""
    texts = dict.fromkeys(("name", "id", *ASKED), str)
    try:
        return tables.read_csv(folder / PREDICTIONS_FILE, keep_default_na=False, na_values=[""], dtype=texts)
    except FileNotFoundError:
        unfinished = "an unfinished run" if (folder / "config.json").exists() else "no run folder"
        raise ValueError(f"{folder}: {unfinished}, {PREDICTIONS_FILE} is missing") from None


def scores_of(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The test fold's predictions of a run of baseline.py, by image name. Raises ValueError."""
    missing = [column for column in ("name", "set", "split", "cluster") if column not in table.columns]
    if missing:
        raise ValueError(f"{folder / PREDICTIONS_FILE}: no column {missing[0]!r}; run it again with this version")
    if not (table["split"] == "test").any():
        raise ValueError(f"{folder}: has no test scores, being a run with --no_test; run it again without")
    return table[table["split"] == "test"].set_index("name")


def score_names(table: pd.DataFrame) -> list[str]:
    """The scores that a table has human and predicted values of."""
    names = [column.removeprefix("pred_") for column in table.columns if column.startswith("pred_")]
    names = [name for name in names if f"mos_{name}" in table.columns]
    return [name for name in names if table[[f"mos_{name}", f"pred_{name}"]].notna().any().all()]


def compare_runs(folders: Sequence[Path]) -> pd.DataFrame:
    """A row for each score and run, in MOS units, compared on the test images of all runs.

    Returns:
        COLUMNS, or those of `answer_comparison` for runs of main.py; differences are to the first run, with their 95 %
        intervals (paired bootstrap over prompts).

    Raises:
        ValueError: a folder is no finished run, the runs share too few test images, or their human scores differ.
    """
    found = [read_predictions(folder) for folder in folders]
    if are_answers(folders, ["question" in table.columns for table in found]):
        return answer_comparison.compare_answers(folders, found)
    tables = [scores_of(folder, table) for folder, table in zip(folders, found, strict=True)]
    common = tables[0].index
    for table in tables[1:]:
        common = common.intersection(table.index, sort=False)
    scores = [name for name in score_names(tables[0]) if all(name in score_names(table) for table in tables)]
    if len(common) < 2 or not scores:
        raise ValueError(
            f"{folders[0]} and the others share {len(common)} test image(s) and {len(scores)} score(s): there is "
            "nothing to compare"
        )
    tables = [table.loc[common] for table in tables]
    rows = []
    if (num_clusters := tables[0]["cluster"].nunique()) < MIN_CLUSTERS:
        print(f"note: only {num_clusters} prompts: the intervals are too narrow", file=sys.stderr)
    for title in tables[0]["set"].unique():
        here = (tables[0]["set"] == title).to_numpy()
        for name in scores:
            rows += compare_score(folders, [table[here] for table in tables], str(title), name)
    return pd.DataFrame(rows, columns=COLUMNS)


def are_answers(folders: Sequence[Path], of_answers: Sequence[bool]) -> bool:
    """Whether these are runs of main.py. Raises ValueError if some are, and others are not."""
    if any(of_answers) and not all(of_answers):
        one, other = folders[of_answers.index(True)], folders[of_answers.index(False)]
        raise ValueError(f"{one} is of main.py, {other} of baseline.py: runs of one program can be compared")
    return all(of_answers)


def compare_score(
    folders: Sequence[Path], tables: Sequence[pd.DataFrame], title: str, name: str
) -> list[dict[str, Any]]:
    """Rows of `compare_runs` for one score of one data set; none if it has no two such scores. Raises ValueError."""
    columns = [f"mos_{name}", f"pred_{name}"]
    known = np.logical_and.reduce([table[columns].notna().all(axis=1) for table in tables])
    if known.sum() < 2:
        return []
    mos, first = tables[0][columns][known].to_numpy().T
    clusters = tables[0]["cluster"][known].tolist()
    rows = []
    for folder, table in zip(folders, tables, strict=True):
        own, pred = table[columns][known].to_numpy().T
        if not np.allclose(own, mos, rtol=1e-6):
            raise ValueError(f"{folder}: its human scores of {name} are not those of {folders[0]}")
        row: dict[str, Any] = {"score": name, "set": title, "run": str(folder), "images": int(known.sum())}
        row |= {"srocc": metrics.srocc(pred, mos), "plcc": metrics.plcc(pred, mos)}
        if table is not tables[0]:
            row |= differences(metrics.paired_bootstrap(first, pred, mos, clusters))
        rows.append(row)
    return rows


def differences(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """(difference, low, high) of each measure, as columns."""
    return {
        column: value
        for name, values in found.items()
        for column, value in zip((f"d_{name}", f"{name}_low", f"{name}_high"), values, strict=True)
    }


def compare_protocols(folders: Sequence[Path]) -> pd.DataFrame:
    """As `compare_runs` for folders of repeated runs: means over splits, intervals over paired splits.

    Raises:
        ValueError: a folder has no summary, the runs in them do not go by the same names (seeds and folds), or they
            share no score.
    """
    summaries = [read_summary(folder) for folder in folders]
    of_answers = are_answers(folders, [is_of_answers(summary) for summary in summaries])
    first = summaries[0]
    for folder, summary in zip(folders, summaries, strict=True):
        if summary["runs"] != first["runs"] or summary["tests"] != first["tests"]:
            raise ValueError(
                f"{folder}: has other seeds, folds, images or scores than {folders[0]}; repeat it as there"
            )
    if of_answers:
        return answer_comparison.compare_repeated_answers(folders, summaries)
    common = [key for key in first["test"] if all(key in summary["test"] for summary in summaries)]
    tasks = tasks_of(common)
    if not tasks:
        raise ValueError(f"{folders[0]} and the others share no score: there is nothing to compare")
    rows = []
    for task in tasks:
        for folder, summary in zip(folders, summaries, strict=True):
            row: dict[str, Any] = {"score": stem_of(task), "set": "", "run": str(folder)}
            row |= {"images": summary["images"]["test"]}
            found = {}
            for name in ("srocc", "plcc"):
                values, others = (np.array(side["test"][f"{name}_{task}"]["values"]) for side in (summary, first))
                row[name] = values.mean()
                interval = metrics.resampled_interval(values - others, first["share"]) or (np.nan, np.nan)
                found[name] = ((values - others).mean(), *interval)
            rows.append(row | (differences(found) if summary is not first else {}))
    return pd.DataFrame(rows, columns=COLUMNS)


def table_lines(found: pd.DataFrame) -> list[str]:
    """The comparison as text."""
    if "accuracy" in found:
        return answer_comparison.answer_table_lines(found)
    width = max(len(run) for run in found["run"]) + 2
    titles = found["score"].map(title_of_stem)
    if found["set"].nunique() > 1:
        titles = found["set"] + " " + titles
    wide = titles.str.len().max() + 2
    lines = [f"{'':<{wide}}{'':<{width}}{'images':>7}{'SROCC':>8}{'PLCC':>8}   difference in SROCC, 95 % interval"]
    for title, rows in found.groupby(titles, sort=False):
        for row in rows.to_dict("records"):
            said = ""
            if np.isfinite(row["srocc_low"]):
                low, high = row["srocc_low"], row["srocc_high"]
                said = f"   {row['d_srocc']:+.3f} ({low:+.3f} .. {high:+.3f})  {verdict(low, high)}"
            numbers = f"{row['images']:>7}{row['srocc']:>8.3f}{row['plcc']:>8.3f}"
            lines.append(f"{title:<{wide}}{row['run']:<{width}}{numbers}{said}")
            title = ""
    return lines
