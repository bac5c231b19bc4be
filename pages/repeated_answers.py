"""The page of repeated runs that answer questions about images: accuracy of model, branches, floors and kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drawing import figures
from multirun import summaries
from pages.answers_page import about, check_results, name_of, options_tables, percent, percent_interval
from pages.elements import NOTHING, Pictures, Table, number, seconds_text
from pages.run_data import read_json

HEAD = ["accuracy", "sd, points", "median", "95 % interval"]


def repeated_answers_content(folder: Path, summary: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    """What the page of a folder of such runs shows. Raises ValueError."""
    options = read_json(folder / summaries.PROTOCOL_FILE, folder)
    parts = parts_of(folder, summary["runs"])
    changed, unchanged = options_tables(options, next(iter(parts.values()), {}))
    own = summary["test"]["accuracy"]
    rows = {"trained model": own, **{name: row["accuracy"] for name, row in summary["floors"].items()}}
    drawn = [
        in_percent(name, found, 0 if found is own else None)
        for name, found in sorted(rows.items(), key=lambda item: (item[1] is not own, -item[1]["mean"]))
    ]
    caption = "Accuracy: mean with 95 % interval, and each run"
    return {
        "about": about(options, {}),
        "headlines": [
            {
                "title": "accuracy",
                "big": percent(own["mean"]),
                "small": f"± {number(100 * own['sd'], 1)} points",
                "interval": percent_interval(own["interval"]),
                "more": "",
            }
        ],
        "scores": accuracy_table("predictor", rows),
        "pictures": [pictures.add("summary-accuracy", caption, figures.estimates(drawn, "accuracy, %, test fold"))],
        "over": over_table(summary),
        "kinds": [(name_of(key), accuracy_table("kind", kinds)) for key, kinds in summary["kinds"].items() if kinds],
        "measures": measures_table(summary),
        "runs": parts_table(parts),
        "changed": changed,
        "unchanged": unchanged,
    }


def in_percent(name: str, found: Mapping[str, Any], colour: int | None) -> figures.Estimate:
    """An accuracy over runs for a picture."""
    ends = [100 * end for end in found["interval"]] if found["interval"] else None
    return figures.Estimate(name_of(name), 100 * found["mean"], ends, [100 * one for one in found["values"]], colour)


def accuracy_table(what: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each predictor or kind of question."""
    cells = [
        [
            name_of(name),
            percent(found["mean"]),
            number(100 * found["sd"], 1),
            percent(found["median"]),
            percent_interval(found["interval"]) or NOTHING,
        ]
        for name, found in rows.items()
    ]
    return Table([what, *HEAD], cells, strong=1 if what == "predictor" else 0)


def over_table(summary: Mapping[str, Any]) -> Table | None:
    """The trained model minus its branches and the floors, run by run; None without any."""
    rows = []
    for name, found in summary["over"].items():
        mean, ends = found["accuracy"]["mean"], found["accuracy"]["interval"]
        between = f"{number(100 * ends[0], 1, '+')} … {number(100 * ends[1], 1, '+')}" if ends else NOTHING
        rows.append([name_of(name), number(100 * mean, 1, "+"), between])
    return Table(["over", "accuracy, points", "95 % interval"], rows) if rows else None


def measures_table(summary: Mapping[str, Any]) -> Table | None:
    """What GQA's evaluation tells beside accuracy; None of other data."""
    rows = [
        [name_of(name), number(found["mean"]), number(found["sd"])]
        for name, found in summary["test"].items()
        if name != "accuracy"
    ]
    return Table(["measure", "mean", "sd"], rows) if rows else None


def parts_of(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results of the repeated runs that are still there. Raises ValueError."""
    paths = {name: folder / name / "results.json" for name in names}
    return {name: check_results(read_json(path, folder), path) for name, path in paths.items() if path.exists()}


def parts_table(parts: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each run."""
    rows = [
        [
            name,
            percent(found["val"]["accuracy"]),
            percent(found["measures"]["accuracy"]),
            f"{found['best_epoch']} of {found['epochs']}",
            seconds_text(found["seconds"]),
        ]
        for name, found in parts.items()
    ]
    return Table(["run", "validation", "test", "best epoch", "time"], rows)
