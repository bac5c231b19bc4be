"""A run folder as its files tell it, read with every part checked that a page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from multirun import comparison, summaries
from pages.elements import truncate
from sources.scores import columns_of, tasks_of
from storage import json_files, tables
from storage.json_files import NUMBER
from storage.messages import one_line

REPORT_FILE = "report.html"
MEASURED = {str: NUMBER}
CERTAINTY = {
    "intervals": {str: [NUMBER, NUMBER]},
    "within_prompt": {"accuracy": (*NUMBER, type(None)), "pairs": int},
    **dict.fromkeys(("slope", "bias"), NUMBER),
}
GENERATOR = {"generator": str, "images": int, **dict.fromkeys(("srocc", "plcc", "mos", "pred"), NUMBER)}
FINDINGS = {  # of one data set
    "certainty": {str: CERTAINTY},
    "generators": {str: {"by_generator": [GENERATOR, ...], "ranking": NUMBER}},
}
RESULTS = {  # what the pages show of results.json
    **dict.fromkeys(("best_epoch", "epochs"), int),
    "seconds": NUMBER,
    **dict.fromkeys(("val", "test"), MEASURED),
    "base": {str: MEASURED},
    "floors": {str: MEASURED},
    **FINDINGS,
    "leakage": {str: {str: int}},
    "images": dict.fromkeys(("train", "val", "test", str), int),
    "sets": {str: {"test": MEASURED, **FINDINGS}},
}


@dataclass(frozen=True)
class Run:
    """A finished run, as its files tell of it."""

    folder: Path
    options: dict[str, Any]
    provenance: dict[str, Any]
    results: dict[str, Any]
    epochs: pd.DataFrame  # metrics.csv
    predictions: pd.DataFrame
    files: dict[str, tuple[str, str]]  # image name -> path as the trainer saw it ("" if unknown) and SHA-256

    @property
    def fold(self) -> str:
        """The fold that the page is about: test, or val where the test fold was left unread."""
        return "test" if self.results["test"] else "val"

    @property
    def tasks(self) -> list[str]:
        """The scores that the run predicts."""
        return tasks_of(self.results[self.fold])

    @cached_property
    def scored(self) -> pd.DataFrame:
        """The predictions of `fold`."""
        return self.predictions[self.predictions["split"] == self.fold]

    def pairs(self, task: str, title: str | None = None) -> pd.DataFrame:
        """Rows of `scored`, of one data set if named, that have both scores, as "mos" and "pred" (MOS units)."""
        table = self.scored if title is None else self.scored[self.scored["set"] == title]
        mos, pred = columns_of(task)
        missing = [column for column in (mos, pred) if column not in table.columns]
        if missing:
            raise ValueError(f"{self.folder / comparison.PREDICTIONS_FILE}: no column {missing[0]!r}")
        try:
            table = table.assign(mos=table[mos].astype(float), pred=table[pred].astype(float))
        except ValueError as error:
            raise ValueError(
                f"{self.folder / comparison.PREDICTIONS_FILE}: cannot be read ({truncate(one_line(error), 200)})"
            ) from None
        return table[np.isfinite(table["mos"]) & np.isfinite(table["pred"])]


def read_run(folder: Path) -> Run:
    """Read a finished run. Raises ValueError."""
    options = read_json(folder / "config.json", folder)
    results = check_results(read_json(folder / "results.json", folder), folder / "results.json")
    epochs = read_epochs(folder)
    predictions = read_csv(
        folder / comparison.PREDICTIONS_FILE, folder, ["name", "set", "split", "prompt", "generator"]
    )
    texts = ["name", "set", "prompt", "generator"]
    predictions[texts] = predictions[texts].fillna("")
    splits = read_csv(folder / "splits.csv", folder, ["name", "digest"], texts=True).fillna("")
    paths = splits["path"] if "path" in splits else [""] * len(splits)
    provenance = options.pop("provenance", {})
    return Run(
        folder=folder,
        options=options,
        provenance=provenance if isinstance(provenance, dict) else {},
        results=results,
        epochs=epochs,
        predictions=predictions,
        files=dict(zip(splits["name"], zip(paths, splits["digest"], strict=True), strict=True)),
    )


def is_of_answers(folder: Path) -> bool:
    """Whether this is a finished run of main.py."""
    results = folder / "results.json"
    return results.exists() and read_json(results, folder).get("program") == summaries.ANSWERS


def read_epochs(folder: Path) -> pd.DataFrame:
    """The numbers of every epoch. Raises ValueError."""
    epochs = read_csv(folder / "metrics.csv", folder, ["epoch"])
    try:
        return epochs.astype(float)
    except ValueError as error:
        raise ValueError(f"{folder / 'metrics.csv'}: cannot be read ({truncate(one_line(error), 200)})") from None


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """A JSON object of a run. Raises ValueError."""
    try:
        return json_files.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(missing(path, folder)) from None


def read_csv(path: Path, folder: Path, columns: Sequence[str], *, texts: bool = False) -> pd.DataFrame:
    """A table of a run with at least these columns, empty cells as NaN. Raises ValueError."""
    kinds = str if texts else dict.fromkeys(("name", "set", "split", "prompt", "generator"), str)
    try:
        table = tables.read_csv(path, keep_default_na=False, na_values=[""], dtype=kinds)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(missing(path, folder)) from None
    absent = [column for column in columns if column not in table.columns]
    if absent:
        raise ValueError(f"{path}: no column {absent[0]!r}; run it again with this version")
    return table


def missing(path: Path, folder: Path) -> str:
    """What it means that a run's file is not there."""
    if not folder.is_dir():
        return f"{folder}: {'no folder' if folder.exists() else 'no such folder'}"
    if (folder / summaries.PROTOCOL_FILE).exists():
        return f"{folder}: no finished repeated runs, {path.name} is missing"
    kind = "an unfinished run" if (folder / "config.json").exists() else "no run folder"
    return f"{folder}: {kind}, {path.name} is missing"


def check_results(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same, if it has every part that a page shows. Raises ValueError."""
    if results.get("program") == "vqa":
        raise ValueError(f"{path.parent}: is a run of main.py; one of baseline.py is looked for")
    if said := json_files.schema_mismatch(results, RESULTS):
        raise ValueError(f"{path}: {said}; run it again with this version")
    if not tasks_of(results["val"]):
        raise ValueError(f"{path}: holds no validation score")
    return results
