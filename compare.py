"""Tell whether runs differ: paired, on the test images that they share, by bootstrap over prompts.

    python compare.py runs/a runs/b [runs/c ...]

Every run is compared with the first. Folders of repeated runs (--repeats, --kfold) are compared split by split.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import metrics
import tables
from configs import OneLineParser, one_line_errors
from reading import read_json
from scores import MEASURES, stem_of, tasks_of, title_of_stem

PREDICTIONS_FILE = "predictions.csv"
PROTOCOL_FILE = "protocol.json"  # tells a folder of repeated runs
SUMMARY_FILE = "summary.json"
MIN_CLUSTERS = 20  # prompts, below which a bootstrap over them promises more than it holds
NUMBER = (int, float)
STATISTICS = {  # of a measure over repeated runs
    **dict.fromkeys(("mean", "sd", "median"), NUMBER),
    "interval": (list, type(None)),
    "values": [NUMBER, ...],
}
SUMMARY = {  # of summary.json
    "runs": [str, ...],
    "tests": [str, ...],
    "share": NUMBER,
    "images": {"test": int, str: int},
    "test": {str: STATISTICS},
    "floors": {str: {str: STATISTICS}},
    "over": {str: {str: STATISTICS}},
}
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
    """The test fold's predictions of a run, by image name. Raises ValueError."""
    path = folder / PREDICTIONS_FILE
    try:
        table = tables.read_csv(path, keep_default_na=False, na_values=[""], dtype={"name": str})
    except FileNotFoundError:
        unfinished = "an unfinished run" if (folder / "config.json").exists() else "no run folder"
        raise ValueError(f"{folder}: {unfinished}, {PREDICTIONS_FILE} is missing") from None
    missing = [column for column in ("name", "set", "split", "cluster") if column not in table.columns]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]!r}; run it again with this version")
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
        COLUMNS; differences are to the first run, with their 95 % intervals (paired bootstrap over prompts).

    Raises:
        ValueError: a folder is no finished run, the runs share too few test images, or their human scores differ.
    """
    tables = [read_predictions(folder) for folder in folders]
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


def mismatch(found: object, shape: Any, name: str = "") -> str:
    """What of a JSON value is not of a shape, in words; "" if it all is.

    Args:
        shape: a kind, or several in a tuple, numbers being finite; {name: shape, ...} for an object with at least these
            parts, {str: shape} for one whose other parts are all alike; [shape, shape] for a list of so many, and
            [shape, ...] with an ellipsis for one of any number but none.
        name: what the value is called.
    """
    what = repr(name) if name else "it"
    if isinstance(shape, dict):
        if not isinstance(found, dict):
            return f"{what} is no object"
        absent = [key for key in shape if key is not str and key not in found]
        parts = [
            (found[key], shape.get(key, shape.get(str)), str(key)) for key in found if key in shape or str in shape
        ]
        return f"{what} has no {absent[0]!r}" if absent else first_mismatch(parts, name)
    if isinstance(shape, list):
        if not isinstance(found, list) or not found or (shape[-1] is not ... and len(found) != len(shape)):
            return f"{what} is no list of {'any' if shape[-1] is ... else len(shape)}"
        return first_mismatch([(part, shape[0], str(place)) for place, part in enumerate(found)], name)
    if not isinstance(found, shape) or (isinstance(found, float) and not np.isfinite(found)):
        return f"{what} is no number" if shape == NUMBER or shape is int else f"{what} is of another kind"
    return ""


def first_mismatch(parts: Sequence[tuple[object, Any, str]], name: str) -> str:
    """The first of `mismatch` of the parts of an object or a list: value, shape, name."""
    said = (mismatch(part, shape, f"{name}.{key}" if name else key) for part, shape, key in parts)
    return next(filter(None, said), "")


def score_mismatch(measured: Mapping[str, Any], name: str) -> str:
    """What the scores of "srocc_q", ... are without, in words; "" if each has them all."""
    absent = [key for task in tasks_of(measured) for part in MEASURES if (key := f"{part}_{task}") not in measured]
    return f"{name!r} has no {absent[0]!r}" if absent else ""


def summary_mismatch(found: Any) -> str:
    """What of a summary is not as it is written, in words; "" if it all is."""
    if said := mismatch(found, SUMMARY):
        return said
    parts = {"test": found["test"], **{f"floors.{name}": row for name, row in found["floors"].items()}}
    for name, row in parts.items():
        if said := score_mismatch(row, name):
            return said
    parts |= {f"over.{name}": row for name, row in found["over"].items()}
    for name, row in parts.items():
        for key, values in row.items():
            if len(values["values"]) != len(found["runs"]):
                return f"'{name}.{key}.values' are not as many as the runs"
            if values["interval"] is not None and (
                said := mismatch(values["interval"], [NUMBER, NUMBER], f"{name}.{key}.interval")
            ):
                return said
    return ""


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary that repeated runs have left, with every part it is written with. Raises ValueError."""
    try:
        found = read_json(folder / SUMMARY_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: no finished repeated runs, {SUMMARY_FILE} is missing") from None
    if said := summary_mismatch(found):
        raise ValueError(
            f"{folder / SUMMARY_FILE}: {said}: it was made by another version, or changed; run the same command again"
        )
    return found


def compare_protocols(folders: Sequence[Path]) -> pd.DataFrame:
    """As `compare_runs` for folders of repeated runs: means over splits, intervals over paired splits.

    Raises:
        ValueError: a folder has no summary, the runs in them do not go by the same names (seeds and folds), or they
            share no score.
    """
    summaries = [read_summary(folder) for folder in folders]
    first = summaries[0]
    for folder, summary in zip(folders, summaries, strict=True):
        if summary["runs"] != first["runs"] or summary["tests"] != first["tests"]:
            raise ValueError(
                f"{folder}: has other seeds, folds, images or scores than {folders[0]}; repeat it as there"
            )
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


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says."""
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def table_lines(found: pd.DataFrame) -> list[str]:
    """The comparison as text."""
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


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Compare what the command line names; print the table and return it."""
    with one_line_errors():
        parser = OneLineParser(
            prog="compare.py",
            description="Tell whether runs differ, on the test images that they share: paired bootstrap over prompts. "
            "Folders of repeated runs (--repeats, --kfold) are compared split by split.",
            allow_abbrev=False,
        )
        parser.add_argument(
            "runs", nargs="+", metavar="RUN", help="run folders; the first is what others are compared with"
        )
        parser.add_argument("--out", metavar="FILE", help="also write the table there, as CSV")
        args: argparse.Namespace = parser.parse_args(argv)
        folders = [Path(run) for run in args.runs]
        if len(folders) < 2:
            raise ValueError("name at least two run folders; see --help")
        repeated = [(folder / PROTOCOL_FILE).exists() for folder in folders]
        if any(repeated) and not all(repeated):
            raise ValueError("single runs and folders of repeated runs cannot be compared with each other")
        found = compare_protocols(folders) if all(repeated) else compare_runs(folders)
        print("\n".join(table_lines(found)))
        if args.out:
            found.to_csv(args.out, index=False, float_format="%.6g")
        return found


if __name__ == "__main__":
    main(sys.argv[1:])
