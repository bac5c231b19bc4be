"""Several runs beside each other: one page, and one table for the terminal."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from configs import NOT_SAVED
from drawing import figures
from multirun import answer_comparison, comparison, summaries
from pages.answers_page import read_answers_run
from pages.elements import NOTHING, Picture, Pictures, Table, interval_text, number, truncate, value_text, write_page
from pages.repeated_page import spread
from pages.run_data import REPORT_FILE, Run, is_of_answers, read_json, read_run
from pages.run_page import MAX_GENERATORS, intervals_of
from sources.scores import tasks_of, title_of, title_of_stem
from storage.messages import one_line

DRAWN = ("data_csv_path", "image_base_dir", "data_root", "features", "scene_graphs")  # that a demo fills in
COMPARISON_FILE = "comparison.html"
MAX_COLOURED = 6  # runs in a chart of several; the others are grey


@dataclass(frozen=True)
class Entry:
    """A run, or a folder of repeated runs, as a row of a comparison."""

    folder: Path
    name: str
    options: dict[str, Any]
    main: float | None  # validation score; of repeated runs the mean
    test: dict[str, figures.Estimate]  # measure -> value and interval; empty if the test fold was not read
    best_epoch: str
    seconds: float
    is_repeated: bool
    of_answers: bool  # of main.py
    epochs: list[pd.DataFrame]  # metrics.csv of each run


def read_entry(folder: Path, name: str) -> Entry:
    """Read a run or a folder of repeated runs. Raises ValueError."""
    if (folder / summaries.PROTOCOL_FILE).exists():
        return read_repeated(folder, name)
    if is_of_answers(folder):
        return read_answers(folder, name)
    run = read_run(folder)
    test = run.results["test"]
    ends = {f"{key}_{task}": found for task in run.tasks for key, found in intervals_of(run, task).items()}
    return Entry(
        folder=folder,
        name=name,
        options=run.options,
        main=run.results["val"].get("main"),
        test={key: figures.Estimate(name, test[key], ends.get(key)) for key in correlations(test)},
        best_epoch=f"{run.results['best_epoch']}/{run.results['epochs']}",
        seconds=run.results["seconds"],
        is_repeated=False,
        of_answers=False,
        epochs=[run.epochs],
    )


def read_answers(folder: Path, name: str) -> Entry:
    """As `read_entry` for a run of main.py. Raises ValueError."""
    run = read_answers_run(folder)
    accuracy = figures.Estimate(name, run.accuracy.value, run.accuracy.interval)
    return Entry(
        folder=folder,
        name=name,
        options={key: value for key, value in run.options.items() if key in run.results.get("defaults", {})},
        main=run.results["val"]["accuracy"],
        test={"accuracy": accuracy} if run.fold == "test" else {},
        best_epoch=f"{run.results['best_epoch']}/{run.results['epochs']}",
        seconds=run.results["seconds"],
        is_repeated=False,
        of_answers=True,
        epochs=[run.epochs],
    )


def common_parent(folders: Sequence[Path]) -> Path:
    """The folder that all of these lie in."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def default_page(folders: Sequence[Path]) -> Path:
    """Where the page goes: into the folder that all of these lie in directly, else into the current one."""
    parents = {folder.resolve().parent for folder in folders}
    return (parents.pop() if len(parents) == 1 else Path()) / COMPARISON_FILE


def differing_options(entries: Sequence[Entry]) -> list[str]:
    """Names of the options that are not the same in all, beside those that only say where something is."""
    demo = all(entry.options.get("demo") for entry in entries)
    places = {*NOT_SAVED, "cache_dir", *(DRAWN if demo else ())}
    shared = [name for name in entries[0].options if all(name in entry.options for entry in entries)]
    return [
        name
        for name in shared
        if name not in places and any(entry.options[name] != entries[0].options[name] for entry in entries)
    ]


def in_words(entry: Entry, entries: Sequence[Entry], names: Sequence[str]) -> str:
    """Those of the options `names` in which an entry differs from most of all `entries`."""
    said = []
    for name in names:
        values = [value_text(other.options[name]) for other in entries]
        own = value_text(entry.options[name])
        if 2 * values.count(own) <= len(values):
            said.append(f"{name} {own}")
    return ", ".join(said)


def estimate_text(entry: Entry, key: str) -> str:
    """A measure of the test fold with its interval, as a cell."""
    found = entry.test.get(key)
    if found is None:
        return NOTHING
    return number(found.value) + (f"\n({interval_text(found.interval)})" if found.interval else "")


def options_beside(entries: Sequence[Entry]) -> Table:
    """The options that are not the same in all, a column for each."""
    names = differing_options(entries)
    rows = [[entry.name, *(value_text(entry.options[name]) for name in names)] for entry in entries]
    return Table(["run", *names], rows, words=1 + len(names))


def comparison_table(entries: Sequence[Entry]) -> Table:
    """A row for each entry, in their order."""
    names = differing_options(entries)
    heads = measures_of(entries)
    rows = [
        [
            entry.name,
            number(entry.main),
            *(estimate_text(entry, key) for key in heads),
            entry.best_epoch,
            f"{entry.seconds:.0f}",
            in_words(entry, entries, names) or NOTHING,
        ]
        for entry in entries
    ]
    main = "val accuracy" if entries[0].of_answers else "val main"
    return Table(["run", main, *heads.values(), "best epoch", "seconds", "differs in"], rows, strong=1)


def measures_of(entries: Sequence[Entry]) -> dict[str, str]:
    """The measures of the test fold that any entry has: key -> how it is called."""
    keys = dict.fromkeys(key for entry in entries for key in entry.test)
    if entries[0].of_answers:
        return {key: key for key in keys}
    titles = {"srocc": "SROCC", "plcc": "PLCC"}
    return {f"{name}_{task}": f"{titles[name]} {title_of(task)}" for task in tasks_of(keys) for name in titles}


def text_lines(table: Table) -> list[str]:
    """A table as text: the first and the last column to the left, numbers to the right."""
    cells = [[" ".join(cell.split()) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *numbers, last = row
        padded = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded, last]).rstrip())
    return lines


def paired_differences(entries: Sequence[Entry]) -> tuple[pd.DataFrame, list[str]]:
    """Every entry against the best one that has test scores, and what kept others from being compared.

    Single runs are compared on the test images that each shares with the best, repeated runs split by split.

    Returns:
        Rows as `compare.compare_runs` gives them without those of the best, "run" being names; and notes.
    """
    tables, notes = [], []
    for compare_them, group in (
        (comparison.compare_runs, [entry for entry in entries if entry.test and not entry.is_repeated]),
        (comparison.compare_protocols, [entry for entry in entries if entry.test and entry.is_repeated]),
    ):
        for other in group[1:]:
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    found = compare_them([group[0].folder, other.folder])
            except ValueError as error:
                notes.append(
                    f"{other.name} and {group[0].name} have no paired differences: {truncate(one_line(error), 200)}"
                )
                continue
            notes += [line.removeprefix("note: ") for line in said.getvalue().splitlines()]
            tables.append(found[found["run"] == str(other.folder)].assign(run=other.name, best=group[0].name))
    if not tables and not notes:
        notes = ["no paired differences: fewer than two runs of a kind have test predictions"]
    columns = answer_comparison.COLUMNS if entries[0].of_answers else comparison.COLUMNS
    empty = pd.DataFrame(columns=[*columns, "best"])
    return (pd.concat(tables, ignore_index=True) if tables else empty), list(dict.fromkeys(notes))


def score_name(found: pd.DataFrame, score: str, title: str) -> str:
    """What a score is called in a table of differences: with its data set, where there are several."""
    several = len({name for name in found["set"] if name}) > 1
    return title_of_stem(score) + (f" on {title}" if several and title else "")


def differences_table(found: pd.DataFrame) -> Table:
    """Paired differences as cells."""
    of_answers = "accuracy" in found
    keys = ("accuracy",) if of_answers else ("srocc", "plcc")
    rows = []
    for row in found.to_dict("records"):
        name = title_of_row(found, row)
        cells = [row["run"], row["best"], name, number(row["questions" if of_answers else "images"], 0)]
        said = NOTHING
        for key in keys:
            ends = [row[f"{key}_low"], row[f"{key}_high"]]
            known = bool(np.isfinite(ends).all())
            cells.append(number(row[f"d_{key}"], sign="+") + (f"\n({interval_text(ends, '+')})" if known else ""))
            said = comparison.verdict(*ends) if known and key == keys[0] else said
        rows.append([*cells, said])
    head = ["questions", "accuracy", "by accuracy"] if of_answers else ["images", "SROCC", "PLCC", "by SROCC"]
    return Table(["run", "minus", "kind" if of_answers else "score", *head], rows, words=3)


def title_of_row(found: pd.DataFrame, row: Mapping[Any, Any]) -> str:
    """What a row of differences is about."""
    if "accuracy" in found:
        return answer_comparison.title_of_kind(row["by"], row["kind"])
    return score_name(found, row["score"], row["set"])


def differences_pictures(found: pd.DataFrame, pictures: Pictures) -> list[Picture]:
    """The differences in SROCC or accuracy with their intervals, a picture for each score and data set."""
    drawn = []
    key, measure, by = "srocc", "SROCC", ["score", "set", "best"]
    if "accuracy" in found:
        key, measure, by = "accuracy", "Accuracy", ["best"]
        found = found[found["by"] == ""]
    for _, rows in found.groupby(by, sort=False):
        known = rows[np.isfinite(rows[f"{key}_low"].astype(float))].head(MAX_GENERATORS)
        if known.empty:
            continue
        records = known.to_dict("records")
        name, best = title_of_row(found, records[0]), records[0]["best"]
        estimates = [
            figures.Estimate(row["run"], row[f"d_{key}"], (row[f"{key}_low"], row[f"{key}_high"]), (), 0)
            for row in records
        ]
        figure = figures.estimates(estimates, f"{measure} minus that of {figures.shorten(best)}", zero=True)
        caption = f"{measure} of {name}: difference to {best}, paired, with 95 % interval"
        drawn.append(pictures.add(f"difference-{name}", caption, figure))
    return drawn


def overlaid_curves(entries: Sequence[Entry], pictures: Pictures) -> list[Picture]:
    """Validation scores over epochs, a picture for each score; of many runs the best have colours."""
    columns = {"val_main": "main score (mean of SROCC and PLCC)", "val_accuracy": "accuracy"}
    names = [str(column) for entry in entries for table in entry.epochs for column in table]
    columns |= {name: f"SROCC of {title_of(name[10:])}" for name in names if name.startswith("val_srocc_")}
    drawn = []
    for column, words in columns.items():
        lines = []
        for place, entry in enumerate(entries):
            for part, table in enumerate(entry.epochs):
                if column in table and np.isfinite(table[column]).any():
                    label = entry.name if part == 0 and place < MAX_COLOURED else ""
                    x, y = table["epoch"].to_numpy(), table[column].to_numpy()
                    lines.append(figures.Line(label, x, y, place, faded=place >= MAX_COLOURED))
        if lines:
            grey = f"; the best {MAX_COLOURED} in colour" if len(entries) > MAX_COLOURED else ""
            caption = f"{words[0].upper()}{words[1:]} on the validation fold{grey}"
            drawn.append(pictures.add(f"curves-{column}", caption, figures.chart(lines, words.partition(" (")[0])))
    return drawn


def compare_folders(folders: Sequence[Path], out: Path) -> list[str]:
    """Write the page that compares runs.

    Args:
        folders: two or more runs or folders of repeated runs.
        out: the page.

    Returns:
        Lines for the terminal: the table, and what could not be compared.

    Raises:
        ValueError: a folder is neither, is named twice, or a file in it cannot be read.
    """
    places = [folder.resolve() for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{folder}: is named twice")
    parent = common_parent(folders)
    # A folder inside another that is named too has a name of its own: relative to what they share.
    entries = [
        read_entry(folder, str(place.relative_to(parent))) for folder, place in zip(folders, places, strict=True)
    ]
    comparison.are_answers(folders, [entry.of_answers for entry in entries])
    entries.sort(key=lambda entry: (entry.main is None, -(entry.main or 0.0), entry.name))
    table = comparison_table(entries)
    found, notes = paired_differences(entries)
    pictures = Pictures()
    with figures.style():
        write_page(
            out,
            "comparison.html.j2",
            title=f"{len(entries)} runs in {parent.name}",
            table=replace(table, head=table.head[:-1], rows=[row[:-1] for row in table.rows]),
            options=options_beside(entries),
            links=report_links(entries, out),
            of_answers=entries[0].of_answers,
            curves=overlaid_curves(entries, pictures),
            differences=differences_table(found),
            differences_pictures=differences_pictures(found, pictures),
            notes=notes,
        )
    return [*text_lines(table), *notes, f"page: {out}"]


def report_links(entries: Sequence[Entry], out: Path) -> list[tuple[str, str]]:
    """(name, relative address) of the reports that the runs have."""
    found = []
    for entry in entries:
        page = entry.folder.resolve() / REPORT_FILE
        if page.exists():
            found.append((entry.name, quote(Path(os.path.relpath(page, out.resolve().parent)).as_posix())))
    return found


def correlations(measured: Mapping[str, Any]) -> list[str]:
    """The SROCC and raw PLCC of every score, by their keys in results.json."""
    return [key for key in measured if key.startswith(("srocc_", "plcc_")) and not key.startswith("plcc_fit_")]


def read_repeated(folder: Path, name: str) -> Entry:
    """As `read_entry` for repeated runs: means over them, seconds of all. Raises ValueError."""
    summary = summaries.read_summary(folder)
    of_answers = summaries.is_of_answers(summary)
    runs: list[Run] = [(read_answers_run if of_answers else read_run)(folder / part) for part in summary["runs"]]
    mains = [run.results["val"].get("accuracy" if of_answers else "main") for run in runs]
    keys = ["accuracy"] if of_answers else correlations(summary["test"])
    epochs = sorted({run.results["best_epoch"] for run in runs})
    return Entry(
        folder=folder,
        name=name,
        options=read_json(folder / summaries.PROTOCOL_FILE, folder),
        main=None if None in mains else float(np.mean([main for main in mains if main is not None])),
        test={key: figures.Estimate(name, *spread(summary["test"][key])) for key in keys},
        best_epoch=f"{epochs[0]}-{epochs[-1]}/{max(run.results['epochs'] for run in runs)}",
        seconds=sum(run.results["seconds"] for run in runs),
        is_repeated=True,
        of_answers=of_answers,
        epochs=[run.epochs for run in runs],
    )
