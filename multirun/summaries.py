"""The summary of repeated runs: statistics over them, and read back with every part checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import metrics
from sources.scores import MEASURES, tasks_of
from storage.json_files import NUMBER, read_json, schema_mismatch

PROTOCOL_FILE = "protocol.json"  # tells a folder of repeated runs
SUMMARY_FILE = "summary.json"
TRAINED = "trained_model"
ANSWERS = "vqa"  # "program" in what main.py leaves
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


def summarise(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics over runs: name -> what was found, as `results.json` of baseline.py has it.

    Returns:
        "runs": the names; "images": of the first run's folds; "tests": a digest of each run's test fold; "share": what
        overlapping training folds add to the variance of a mean (0 if all have the same test fold); "test": measure ->
        statistics of the trained model; "floors": the same for each floor that all runs have; "over": the same for
        trained model minus floor, paired by run. Of main.py also "program" and, for accuracy, "kinds": what questions
        are told apart by -> kind -> statistics, for kinds that all runs have.

    Raises:
        ValueError: the runs are not of the same data.
    """
    first = next(iter(runs.values()))
    if len({run["data_fingerprint"] for run in runs.values()}) > 1:
        raise ValueError("the data has changed between the runs: choose another folder, or pass --overwrite")
    tests = [run["test_digest"] for run in runs.values()]
    share = first["images"]["test"] / first["images"]["train"] if len(set(tests)) > 1 else 0.0
    floors = [name for name in first["floors"] if all(name in run["floors"] for run in runs.values())]

    def over_runs(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
        names = [key for key in rows[0] if not key.startswith("loss") and all(key in row for row in rows)]
        return {key: [row[key] for row in rows] for key in names}

    trained = over_runs([run["test"] for run in runs.values()])
    by_floor = {name: over_runs([run["floors"][name] for run in runs.values()]) for name in floors}
    by_floor = {name: {key: row[key] for key in trained if key in row} for name, row in by_floor.items()}
    found = {
        "runs": list(runs),
        "images": dict(first["images"]),
        "tests": tests,
        "share": share,
        "test": {key: statistics(values, share) for key, values in trained.items()},
        "floors": {
            name: {key: statistics(values, share) for key, values in row.items()} for name, row in by_floor.items()
        },
        "over": {
            name: {key: statistics(np.subtract(trained[key], values).tolist(), share) for key, values in row.items()}
            for name, row in by_floor.items()
        },
    }
    if "program" in first:
        kinds = {key: over_runs([run["kinds"].get(key, {}) for run in runs.values()]) for key in first["kinds"]}
        found["program"] = first["program"]
        found["kinds"] = {
            key: {kind: statistics(values, share) for kind, values in row.items()} for key, row in kinds.items()
        }
    return found


def statistics(values: list[float], share: float) -> dict[str, Any]:
    """mean, sd, median, "interval" (95 %, None for a single run) and the values of one measure over runs."""
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "median": float(np.median(values)),
        "interval": metrics.resampled_interval(values, share),
        "values": [float(value) for value in values],
    }


def summary_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each predictor and measure: predictor, measure, mean, sd, median, low, high."""
    rows = []
    for name, found in {TRAINED: summary["test"], **summary["floors"]}.items():
        for key, values in found.items():
            low, high = values["interval"] or (np.nan, np.nan)
            numbers = {part: values[part] for part in ("mean", "sd", "median")}
            rows.append({"predictor": name, "measure": key, **numbers, "low": low, "high": high})
    return pd.DataFrame(rows)


def score_mismatch(measured: Mapping[str, Any], name: str) -> str:
    """What the scores of "srocc_q", ... are without, in words; "" if each has them all."""
    absent = [key for task in tasks_of(measured) for part in MEASURES if (key := f"{part}_{task}") not in measured]
    return f"{name!r} has no {absent[0]!r}" if absent else ""


def is_of_answers(summary: Mapping[str, Any]) -> bool:
    """Whether a summary is of runs of main.py."""
    return summary.get("program") == ANSWERS


def answers_mismatch(found: Mapping[str, Any]) -> str:
    """What a summary of runs of main.py is without, in words; "" if it has all."""
    if said := schema_mismatch(found, {"kinds": {str: {str: STATISTICS}}}):
        return said
    rows = {"test": found["test"], **found["floors"], **found["over"]}
    return next((f"{name!r} has no 'accuracy'" for name, row in rows.items() if "accuracy" not in row), "")


def summary_mismatch(found: Any) -> str:
    """What of a summary is not as it is written, in words; "" if it all is."""
    if said := schema_mismatch(found, SUMMARY):
        return said
    parts = {"test": found["test"], **{f"floors.{name}": row for name, row in found["floors"].items()}}
    for name, row in parts.items():
        if said := score_mismatch(row, name):
            return said
    parts |= {f"over.{name}": row for name, row in found["over"].items()}
    if is_of_answers(found):
        if said := answers_mismatch(found):
            return said
        parts |= {f"kinds.{name}": row for name, row in found["kinds"].items()}
    for name, row in parts.items():
        for key, values in row.items():
            if len(values["values"]) != len(found["runs"]):
                return f"'{name}.{key}.values' are not as many as the runs"
            if values["interval"] is not None and (
                said := schema_mismatch(values["interval"], [NUMBER, NUMBER], f"{name}.{key}.interval")
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
