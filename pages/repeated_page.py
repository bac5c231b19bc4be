"""The page of repeated runs: what they have in common, and how far they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drawing import figures
from multirun import summaries
from pages.elements import NOTHING, Pictures, Table, interval_text, number, seconds_text
from pages.repeated_answers import repeated_answers_content
from pages.run_data import REPORT_FILE, check_results, read_json
from pages.run_page import about, options_table
from sources.scores import MEASURES, tasks_of, title_of


def repeated_content(folder: Path, pictures: Pictures) -> dict[str, Any]:
    """What the page of a folder of repeated runs shows. Raises ValueError."""
    summary = summaries.read_summary(folder)
    links = [name for name in summary["runs"] if (folder / name / REPORT_FILE).exists()]
    of_program = repeated_answers_content if summaries.is_of_answers(summary) else repeated_scores_content
    return {"summary": summary, "links": links, **of_program(folder, summary, pictures)}


def repeated_scores_content(folder: Path, summary: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    """Of runs of baseline.py. Raises ValueError."""
    options = read_json(folder / summaries.PROTOCOL_FILE, folder)
    tasks = tasks_of(summary["test"])
    rows = {"trained model": summary["test"], **summary["floors"]}
    drawn = []
    for i, task in enumerate(tasks):
        key = f"srocc_{task}"
        found = [
            figures.Estimate(name.replace("_", " "), *spread(row[key]), i if name == "trained model" else None)
            for name, row in rows.items()
            if key in row
        ]
        found[1:] = sorted(found[1:], key=lambda row: -row.value)
        caption = f"SROCC of {title_of(task)}: mean with 95 % interval, and each run"
        drawn.append(pictures.add(f"summary-{title_of(task)}", caption, figures.estimates(found, "SROCC, test fold")))
    return {
        "about": about(options, {}),
        "headlines": [
            headline(title_of(task), *(summary["test"][f"{name}_{task}"] for name in ("srocc", "plcc")))
            for task in tasks
        ],
        "scores": summary_table(rows, tasks),
        "pictures": drawn,
        "over": over_table(summary, tasks),
        "kinds": [],
        "measures": None,
        "runs": parts_table(folder, summary["runs"], tasks),
        "changed": options_table(options, changed=True),
        "unchanged": options_table(options, changed=False),
    }


def headline(title: str, srocc: Mapping[str, Any], plcc: Mapping[str, Any]) -> dict[str, str]:
    """The most important numbers of a score, as text."""
    return {
        "title": title,
        "big": number(srocc["mean"]),
        "small": f"SROCC ± {number(srocc['sd'])}",
        "interval": interval_text(srocc["interval"]),
        "more": f"PLCC {number(plcc['mean'])} ± {number(plcc['sd'])}",
    }


def spread(found: Mapping[str, Any]) -> tuple[float, Sequence[float] | None, Sequence[float]]:
    """Mean, interval and single values of a measure in a summary."""
    return found["mean"], found["interval"], found["values"]


def summary_table(rows: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> Table:
    """The trained model beside the floors, over all runs."""
    cells = []
    for task in tasks:
        title = title_of(task)
        for name, row in rows.items():
            if f"srocc_{task}" not in row:
                continue
            srocc, plcc = (row[f"{key}_{task}"] for key in ("srocc", "plcc"))
            numbers = [number(srocc["mean"]), number(srocc["sd"]), number(srocc["median"])]
            numbers += [interval_text(srocc["interval"]) or NOTHING, number(plcc["mean"]), number(plcc["sd"])]
            numbers += [number(row[f"{key}_{task}"]["mean"]) for key in ("plcc_fit", "krocc", "rmse")]
            cells.append([title, name.replace("_", " "), *numbers])
            title = ""
    head = ["score", "predictor", "SROCC", "sd", "median", "95 % interval", "PLCC", "sd"]
    return Table([*head, *list(MEASURES.values())[2:]], cells, words=2)


def over_table(summary: Mapping[str, Any], tasks: Sequence[str]) -> Table | None:
    """The trained model minus each floor, run by run; None without floors."""
    rows = []
    for task in tasks:
        for name, found in summary.get("over", {}).items():
            if (key := f"srocc_{task}") in found and name != "mean":  # which orders nothing
                ends = interval_text(found[key]["interval"], "+") or NOTHING
                rows.append([title_of(task), name.replace("_", " "), number(found[key]["mean"], sign="+"), ends])
    return Table(["score", "over", "SROCC", "95 % interval"], rows, words=2) if rows else None


def parts_table(folder: Path, names: Sequence[str], tasks: Sequence[str]) -> Table:
    """A row for each of the repeated runs that is still there."""
    rows = []
    for name in names:
        if (folder / name / "results.json").exists():
            found = check_results(read_json(folder / name / "results.json", folder), folder / name / "results.json")
            scores = [number(found["test"].get(f"srocc_{task}")) for task in tasks]
            epoch = f"{found['best_epoch']} of {found['epochs']}"
            rows.append([name, number(found["val"].get("main")), *scores, epoch, seconds_text(found["seconds"])])
    titles = [f"SROCC {title_of(task)}" for task in tasks]
    return Table(["run", "validation, main", *titles, "best epoch", "time"], rows)
