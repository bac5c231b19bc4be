"""Show a run as one HTML file, or several beside each other.

    python report.py runs/a                # runs/a/report.html, and every picture in runs/a/figures
    python report.py runs/a runs/b ...     # a table here, and comparison.html in runs

Runs that do not lie in one folder are compared in comparison.html of the current one.

Run folders are only read, through their files. The pages need nothing but themselves: no network, no script.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import compare
import figures
import reading
import tables
from configs import NOT_SAVED, OPTIONS, OneLineParser, one_line_errors
from image_files import opened, read_file, to_rgb
from scores import MEASURES, columns_of, tasks_of, title_of, title_of_stem
from writing import write_whole

TEMPLATES = Path(__file__).resolve().parent / "assets" / "pages"
REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
FIGURES_DIR = "figures"
NUMBER = compare.NUMBER
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
NUM_EXAMPLES = 8  # worst, and best, images of each score
THUMBNAIL = 160  # pixels of its longer side
MAX_GENERATORS = 24  # drawn; the table has all
MAX_COLOURED = 6  # runs in a chart of several; the others are grey
LONGEST_REMARK = 1000  # characters of a part of one
LONGEST_TEXT = 240  # characters of a prompt or name
NOTHING = "–"  # for a value that does not exist


# -- a run folder's files


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
            raise ValueError(f"{self.folder / compare.PREDICTIONS_FILE}: no column {missing[0]!r}")
        try:
            table = table.assign(mos=table[mos].astype(float), pred=table[pred].astype(float))
        except ValueError as error:
            raise ValueError(f"{self.folder / compare.PREDICTIONS_FILE}: cannot be read ({one_line(error)})") from None
        return table[np.isfinite(table["mos"]) & np.isfinite(table["pred"])]


def read_run(folder: Path) -> Run:
    """Read a finished run. Raises ValueError."""
    options = read_json(folder / "config.json", folder)
    results = check_results(read_json(folder / "results.json", folder), folder / "results.json")
    epochs = read_csv(folder / "metrics.csv", folder, ["epoch"])
    try:
        epochs = epochs.astype(float)
    except ValueError as error:
        raise ValueError(f"{folder / 'metrics.csv'}: cannot be read ({one_line(error)})") from None
    predictions = read_csv(folder / compare.PREDICTIONS_FILE, folder, ["name", "set", "split", "prompt", "generator"])
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


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """A JSON object of a run. Raises ValueError."""
    try:
        return reading.read_json(path)
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
    if (folder / compare.PROTOCOL_FILE).exists():
        return f"{folder}: no finished repeated runs, {path.name} is missing"
    kind = "an unfinished run" if (folder / "config.json").exists() else "no run folder"
    return f"{folder}: {kind}, {path.name} is missing"


def one_line(error: Exception) -> str:
    """An error's message without line breaks, clipped."""
    return clip(" ".join(str(error).split()), 200)


def check_results(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same, if it has every part that a page shows. Raises ValueError."""
    if said := compare.mismatch(results, RESULTS):
        raise ValueError(f"{path}: {said}; run it again with this version")
    if not tasks_of(results["val"]):
        raise ValueError(f"{path}: holds no validation score")
    return results


# -- what pages are made of


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `words` columns are words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    strong: int = 0  # so many first rows are what it is about


@dataclass(frozen=True)
class Picture:
    """A figure with what is said below it. `name` is that of its file and must be unique in a page."""

    name: str
    caption: str
    figure: Figure

    @property
    def svg(self) -> str:
        """For the page; safe to insert, since figures escape every text in them."""
        return figures.to_svg(self.figure, self.name, self.caption)


@dataclass(frozen=True)
class Example:
    """An image with its scores; `source` is a data URL, or "" if the image that was scored is not there."""

    name: str
    prompt: str
    mos: float
    pred: float
    source: str


@dataclass
class Pictures:
    """The pictures of a page in the order they were drawn."""

    drawn: list[Picture] = field(default_factory=list)

    def add(self, name: str, caption: str, figure: Figure) -> Picture:
        """Take a figure. The name may hold anything: what a file name cannot hold becomes a hyphen."""
        plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)[:60]
        taken = {picture.name for picture in self.drawn}
        unique = next(n for i in range(1, len(taken) + 2) if (n := plain if i == 1 else f"{plain}-{i}") not in taken)
        self.drawn.append(Picture(unique, caption, figure))
        return self.drawn[-1]


def clip(text: object, longest: int = LONGEST_TEXT) -> str:
    """Text without control characters, cut after so many characters."""
    plain = "".join(letter if letter >= " " and letter != "\x7f" else " " for letter in str(text))
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def number(value: object, digits: int = 3, sign: str = "") -> str:
    """A number with so many digits behind the point; a dash for what is none."""
    if not isinstance(value, int | float) or not np.isfinite(value):
        return NOTHING
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")  # + 0.0: no -0.000


def between(interval: Sequence[float] | None, sign: str = "") -> str:
    """An interval in words; "" if there is none."""
    return f"{number(interval[0], sign=sign)} … {number(interval[1], sign=sign)}" if interval else ""


def value_text(value: object, longest: int = LONGEST_TEXT) -> str:
    """An option's value as JSON, a text as it is; clipped."""
    return clip(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), longest)


def seconds_text(seconds: float) -> str:
    """A time as people say it."""
    if not np.isfinite(seconds):
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill a template and put the page in place in one step."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clip": clip, "number": number, "between": between}
    text = environment.get_template(template).render(**content)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))


def write_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write each as PNG; pictures of an earlier report that are not drawn any more go."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink(missing_ok=True)  # another report of this folder may be at it too
    for picture in pictures:
        write_whole(folder / f"{picture.name}.png", partial(Path.write_bytes, data=figures.to_png(picture.figure)))


# -- the page of one run


def write_report(folder: Path) -> Path:
    """Write `report.html` and `figures/*.png` of a finished run, or of a folder of repeated runs, into it.

    Returns:
        The page.

    Raises:
        ValueError: the folder is neither, or a file in it cannot be read.
    """
    folder = Path(folder)
    pictures = Pictures()
    is_repeated = (folder / compare.PROTOCOL_FILE).exists()
    with figures.style():
        content = repeated_content(folder, pictures) if is_repeated else run_content(read_run(folder), pictures)
        template = "repeated.html.j2" if is_repeated else "report.html.j2"
        write_pictures(folder / FIGURES_DIR, pictures.drawn)
        write_page(folder / REPORT_FILE, template, title=folder.resolve().name, **content)  # last: who has it has all
    return folder / REPORT_FILE


def run_content(run: Run, pictures: Pictures) -> dict[str, Any]:
    """What the page of a run shows."""
    return {
        "run": run,
        "about": about(run.options, run.provenance),
        "notes": notes(run.results.get("notes")),
        "headlines": [headline(run, task) for task in run.tasks],
        "scores": score_table(run),
        "floors_picture": floors_picture(run, pictures),
        "certainty": certainty_table(run),
        "added": added_table(run),
        "advice": remarks(run.results.get("advice"), ("flag", "value", "recommended", "why", "change")),
        "diagnosis": remarks(run.results.get("diagnosis"), ("finding", "evidence", "proposal", "command")),
        "curves": curves(run, pictures),
        "agreement": agreement_pictures(run, pictures),
        "generators": generator_parts(run, pictures),
        "examples": [(title_of(task), *examples(run, task)) for task in run.tasks],
        "folds": folds_table(run),
        "changed": options_table(run.options, changed=True),
        "unchanged": options_table(run.options, changed=False),
        "again": shlex.join(["python", "baseline.py", "--config", str(run.folder / "config.json")]),
        "provenance": provenance_table(run),
        "timing": timing_table(run),
    }


def about(options: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    """What was trained on what, in a few words each."""
    data = "demo set" if options.get("demo") else options.get("dataset", "")
    data = options.get("data_csv_path", "") if data == "csv" else data
    weights = options.get("init_from") or f"{options.get('clip_model')} ({options.get('clip_pretrained')})"
    how = "all layers trained"
    if options.get("unfreeze_schedule"):
        how = f"layers frozen @ epoch: {options['unfreeze_schedule']}"
    elif options.get("partial_freeze"):
        how = f"{options.get('freeze_layers')} blocks frozen"
    how = "CLIP frozen" if options.get("freeze_clip") else how
    how += f", LoRA of rank {options['lora_rank']}" if options.get("lora_rank") else ""
    words = (data, weights, how, f"seed {options.get('seed')}", provenance.get("machine"))
    return [clip(word) for word in words if word]


def intervals_of(run: Run, task: str) -> dict[str, Sequence[float]]:
    """The 95 % intervals of a score's srocc and plcc, where there are any."""
    return run.results["certainty"].get(task, {}).get("intervals", {}) if run.fold == "test" else {}


def headline(run: Run, task: str) -> dict[str, Any]:
    """The most important numbers of a score."""
    own = run.results[run.fold]
    floors = {name: row[f"srocc_{task}"] for name, row in run.results["floors"].items() if f"srocc_{task}" in row}
    beside = ""
    if floors:
        best = max(floors, key=lambda name: floors[name])
        gap = round(own[f"srocc_{task}"] - floors[best], 3)
        far = f"{abs(gap):.3f} {'above' if gap > 0 else 'below'}" if gap else "level with"
        beside = f"{far} the best floor, {best.replace('_', ' ')}"
    return {
        "title": title_of(task),
        "measures": {name: own.get(f"{name}_{task}") for name in MEASURES},
        "intervals": {name: intervals_of(run, task).get(name) for name in ("srocc", "plcc")},
        "beside": beside,
    }


def measure_cells(row: Mapping[str, Any], task: str) -> list[str]:
    """A cell for each measure of a score."""
    return [number(row.get(f"{name}_{task}")) for name in MEASURES]


def score_table(run: Run) -> Table:
    """The trained model beside the floors."""
    by_set = {f"on {title}": part["test"] for title, part in run.results["sets"].items()}
    rows = []
    for task in run.tasks:
        title = title_of(task)
        for name, row in {"trained model": run.results[run.fold], **by_set, **run.results["floors"]}.items():
            if f"srocc_{task}" in row:
                rows.append([title, name.replace("_", " "), *measure_cells(row, task)])
                title = ""
    return Table(["score", "predictor", *MEASURES.values()], rows, words=2)


def floors_picture(run: Run, pictures: Pictures) -> list[Picture]:
    """SROCC of the trained model and the floors, a picture for each score; none without floors."""
    drawn = []
    for i, task in enumerate(run.tasks if run.results["floors"] else []):
        key = f"srocc_{task}"
        own = figures.Estimate("trained model", run.results[run.fold][key], intervals_of(run, task).get("srocc"), (), i)
        floors = [
            figures.Estimate(name.replace("_", " "), row[key])
            for name, row in sorted(run.results["floors"].items(), key=lambda item: -item[1].get(key, 0))
            if key in row
        ]
        caption = f"SROCC of {title_of(task)}: the trained model with its 95 % interval, and the floors"
        figure = figures.estimates([own, *floors], "SROCC, test fold")
        drawn.append(pictures.add(f"floors-{title_of(task)}", caption, figure))
    return drawn


def certainty_table(run: Run) -> Table | None:
    """Intervals and what correlations do not tell; None where the test fold was not read."""
    parts = {"": run.results["certainty"]}
    parts |= {title: part["certainty"] for title, part in run.results["sets"].items()}
    rows = []
    for title, found in parts.items():
        for task, part in found.items():
            name = f"{title_of(task)} on {title}" if title else title_of(task)
            ends = [between(part["intervals"].get(key)) or NOTHING for key in ("srocc", "plcc")]
            pairs = part["within_prompt"]
            known = pairs["accuracy"] is not None
            share = f"{pairs['accuracy']:.1%} of {pairs['pairs']}" if known else NOTHING
            rows.append([name, *ends, share, number(part["slope"], 2), number(part["bias"], 2, "+")])
    head = ["score", "SROCC, 95 %", "PLCC, 95 %", "pairs of a prompt ordered right", "slope", "bias, MOS"]
    return Table(head, rows) if rows else None


def added_table(run: Run) -> Table | None:
    """The trained model minus the frozen CLIP that it started from; None if that was not measured."""
    base, own = run.results["base"].get(run.fold) or {}, run.results[run.fold]
    rows = [
        [title_of(task), name, number(base[key]), number(own[key]), number(own[key] - base[key], sign="+")]
        for task in run.tasks
        for name, key in (("SROCC", f"srocc_{task}"), ("PLCC", f"plcc_{task}"))
        if key in base and key in own
    ]
    return Table(["score", "measure", "before training", "after", "added"], rows, words=2) if rows else None


def notes(found: object) -> list[str]:
    """What is to be known of scores that mean nothing; none if there is no list of them."""
    return [value_text(note, LONGEST_REMARK) for note in found] if isinstance(found, list) else []


def remarks(found: object, parts: Sequence[str]) -> list[dict[str, str]]:
    """The parts of each remark in words, "" where one has no such part; none if there is no list of them."""
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return [
        {part: "" if entry.get(part) is None else value_text(entry[part], LONGEST_REMARK) for part in parts}
        for entry in entries
    ]


def curves(run: Run, pictures: Pictures) -> list[Picture]:
    """What was measured in each epoch."""
    table, best = run.epochs, run.results["best_epoch"]
    tasks = [task for column in table for task in [str(column).removeprefix("val_srocc_")] if task != column]
    sides = (("", "training", 0), ("val_", "validation", 1))

    def lines(columns: Sequence[tuple[str, str, int, int]]) -> list[figures.Line]:
        x = table["epoch"].to_numpy()
        return [
            figures.Line(label, x, table[name].to_numpy(), colour, dash)
            for name, label, colour, dash in columns
            if name in table and np.isfinite(table[name]).any()
        ]

    drawn = []

    def draw(name: str, caption: str, ylabel: str, columns: Sequence[tuple[str, str, int, int]], **how: Any) -> None:
        if found := lines(columns):
            drawn.append(pictures.add(name, caption, figures.chart(found, ylabel, best=best, **how)))

    agreement = [
        (f"val_{key}_{task}", f"{name} {title_of(task)}", i, dash)
        for i, task in enumerate(tasks)
        for dash, (key, name) in enumerate((("srocc", "SROCC"), ("plcc", "PLCC")))
    ]
    draw("agreement", "Agreement with people on the validation fold", "correlation", agreement)
    whole = [(f"{side}loss", words, colour, 0) for side, words, colour in sides]
    draw("loss", "Loss in training and on the validation fold", "loss", whole)
    if len(tasks) > 1:
        parts = [
            (f"{side}loss_{task}", f"{title_of(task)}, {words}", i, dash)
            for i, task in enumerate(tasks)
            for side, words, dash in sides
        ]
        draw("loss-of-scores", "The loss of each score", "loss", parts)
    draw("learning-rate", "Learning rate at the start of each epoch", "learning rate", [("lr", "", 2, 0)])
    limit = run.options.get("max_grad_norm")
    limit = limit if isinstance(limit, int | float) else None
    norms = table["grad_norm"] if "grad_norm" in table else pd.Series(dtype=float)
    shown = limit if limit and np.isfinite(norms).any() and limit < 3 * norms.max() else None
    caption = "Gradient norm, before it is clipped" + (f" at {limit:g} (dashed)" if shown else "")
    draw("gradient-norm", caption, "gradient norm", [("grad_norm", "", 3, 0)], limit=shown)
    return drawn


def sets_of(run: Run) -> list[str | None]:
    """The data sets to be shown each by itself; None stands for all, where there is one."""
    titles = list(run.scored["set"].unique())
    return list(titles) if len(titles) > 1 else [None]


def agreement_pictures(run: Run, pictures: Pictures) -> list[Picture]:
    """Predicted against human scores, and how far they are apart, for each score of each data set."""
    drawn = []
    for i, task in enumerate(run.tasks):
        for title in sets_of(run):
            found = run.pairs(task, title)
            if found.empty:
                continue
            mos, pred = found["mos"].to_numpy(), found["pred"].to_numpy()
            name = title_of(task) + (f" on {clip(title, 40)}" if title else "")
            figure = figures.scatter(pred, mos, title_of(task), colour=i)
            drawn.append(pictures.add(f"scatter-{name}", f"Predicted and human {name}, {len(mos)} images", figure))
            off = pred - mos
            size = np.sqrt(np.mean(off**2))
            caption = f"Error of {name}: root mean square {size:.2f} MOS, before any fit"
            drawn.append(pictures.add(f"error-{name}", caption, figures.residuals(off, title_of(task), colour=i)))
    return drawn


def generator_parts(run: Run, pictures: Pictures) -> list[dict[str, Any]]:
    """A part for each score of each data set: title, pictures, table, ranking."""
    of_sets = {"": run.results["generators"]}
    of_sets |= {title: part["generators"] for title, part in run.results["sets"].items()}
    parts = []
    for title, found in of_sets.items():
        for task, part in found.items():
            rows = part["by_generator"]
            shown = rows[:MAX_GENERATORS]
            name = title_of(task) + (f" on {title}" if title else "")
            names = [row["generator"] for row in shown]
            srocc, mos, pred = (np.array([row[key] for row in shown]) for key in ("srocc", "mos", "pred"))
            colour = run.tasks.index(task) if task in run.tasks else 0
            worst = f", the worst {len(shown)} of {len(rows)}" if len(rows) > len(shown) else ""
            drawn = [
                pictures.add(
                    f"generators-{name}",
                    f"SROCC of {name} within each generator{worst}",
                    figures.generator_srocc(names, srocc, colour=colour),
                ),
                pictures.add(
                    f"generator-means-{name}",
                    f"Mean {name} of each generator, human and predicted{worst}",
                    figures.generator_means(names, mos, pred, colour=colour),
                ),
            ]
            cells = [
                [
                    clip(row["generator"], 80),
                    str(row["images"]),
                    *(number(row[key]) for key in ("srocc", "plcc")),
                    *(number(row[key], 2) for key in ("mos", "pred")),
                ]
                for row in rows
            ]
            table = Table(["generator", "images", "SROCC", "PLCC", "human, MOS", "predicted"], cells)
            parts.append({"title": name, "pictures": drawn, "table": table, "ranking": part["ranking"]})
    return parts


def examples(run: Run, task: str) -> tuple[list[Example], list[Example]]:
    """The images whose score is furthest off, the worst first, and those where it is nearest, the best first."""
    found = run.pairs(task)
    found = found.assign(off=(found["pred"] - found["mos"]).abs()).sort_values("off", ascending=False, kind="stable")
    worst = found.head(min(NUM_EXAMPLES, (len(found) + 1) // 2))
    best = found.tail(min(NUM_EXAMPLES, len(found) // 2))[::-1]
    return example_list(run, worst), example_list(run, best)


def example_list(run: Run, rows: pd.DataFrame) -> list[Example]:
    """Rows of `Run.pairs` as images."""
    return [
        Example(row["name"], row["prompt"], row["mos"], row["pred"], thumbnail(*run.files.get(row["name"], ("", ""))))
        for row in rows.to_dict("records")
    ]


def thumbnail(path: str, digest: str) -> str:
    """The image as a small JPEG in a data URL; "" if there is no such file, or its content is not what was scored."""
    try:
        content = read_file(path) if path else b""
        if not content or hashlib.sha256(content).hexdigest() != digest:
            return ""
        with opened(content) as image:
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = to_rgb(image)
    except OSError:
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def folds_table(run: Run) -> Table:
    """How large the folds are, and what they share with earlier ones."""
    sizes, leaked = run.results["images"], run.results["leakage"]
    head = ["fold", "images", *(f"{what} shared" for what in leaked)]
    rows = []
    for fold, size in sizes.items():
        shared = [NOTHING if fold == "train" else value_text(counts.get(fold, 0)) for counts in leaked.values()]
        rows.append([fold, str(size), *shared])
    return Table(head, rows)


def default_of(name: str) -> object:
    """An option's default as JSON holds it."""
    return json.loads(json.dumps(OPTIONS[name].default)) if name in OPTIONS else None


def options_table(options: Mapping[str, Any], *, changed: bool) -> Table:
    """The options that are not at their defaults, or all others. Facts about the place count as others."""
    rows = []
    for name, value in options.items():
        is_changed = (name not in OPTIONS or value != default_of(name)) and name not in NOT_SAVED
        if is_changed == changed:
            default = value_text(default_of(name)) if name in OPTIONS else "not an option of this version"
            rows.append([name, value_text(value), *([default] if changed else [])])
    return Table(["option", "value", *(["default"] if changed else [])], rows, words=3)


def provenance_table(run: Run) -> Table:
    """Where the run comes from."""
    rows = []
    for name, value in run.provenance.items():
        words = value_text(value)
        if isinstance(value, dict):
            words = ", ".join(f"{key} {value_text(part)}" for key, part in value.items())
        rows.append([name.replace("_", " "), words or "not known"])
    return Table(["what", ""], rows, words=2)


def timing_table(run: Run) -> Table:
    """How long it took, and for what."""
    table = run.epochs
    rows = [["in all", seconds_text(run.results["seconds"])]]
    if isinstance(since := run.results.get("seconds_from_first_batch"), int | float):
        rows.append(["before the first batch", seconds_text(run.results["seconds"] - since)])
    found = {name: table[name][np.isfinite(table[name])] for name in table}
    for name, words, text in (
        ("seconds", "an epoch of training (median)", lambda values: f"{values.median():.1f} s"),
        ("images_per_s", "images a second (median)", lambda values: f"{values.median():.0f}"),
        ("data_wait", "share of the time spent waiting for data", lambda values: f"{values.mean():.1%}"),
        ("gpu_memory_gb", "GPU memory at most", lambda values: f"{values.max():.1f} GB"),
    ):
        if name in found and len(found[name]):
            rows.append([words, text(found[name])])
    return Table(["time", ""], rows)


# -- the page of repeated runs


def repeated_content(folder: Path, pictures: Pictures) -> dict[str, Any]:
    """What the page of a folder of repeated runs shows. Raises ValueError."""
    summary = compare.read_summary(folder)
    options = read_json(folder / compare.PROTOCOL_FILE, folder)
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
        "summary": summary,
        "about": about(options, {}),
        "headlines": [
            {"title": title_of(task), **{name: summary["test"][f"{name}_{task}"] for name in ("srocc", "plcc")}}
            for task in tasks
        ],
        "scores": summary_table(rows, tasks),
        "pictures": drawn,
        "over": over_table(summary, tasks),
        "runs": parts_table(folder, summary["runs"], tasks),
        "links": [name for name in summary["runs"] if (folder / name / REPORT_FILE).exists()],
        "changed": options_table(options, changed=True),
        "unchanged": options_table(options, changed=False),
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
            numbers += [between(srocc["interval"]) or NOTHING, number(plcc["mean"]), number(plcc["sd"])]
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
                ends = between(found[key]["interval"], "+") or NOTHING
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


# -- several runs beside each other


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
    epochs: list[pd.DataFrame]  # metrics.csv of each run


def read_entry(folder: Path, name: str) -> Entry:
    """Read a run or a folder of repeated runs. Raises ValueError."""
    if (folder / compare.PROTOCOL_FILE).exists():
        return read_repeated(folder, name)
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
        epochs=[run.epochs],
    )


def correlations(measured: Mapping[str, Any]) -> list[str]:
    """The SROCC and raw PLCC of every score, by their keys in results.json."""
    return [key for key in measured if key.startswith(("srocc_", "plcc_")) and not key.startswith("plcc_fit_")]


def read_repeated(folder: Path, name: str) -> Entry:
    """As `read_entry` for repeated runs: means over them, seconds of all. Raises ValueError."""
    summary = compare.read_summary(folder)
    runs = [read_run(folder / part) for part in summary["runs"]]
    mains = [run.results["val"].get("main") for run in runs]
    epochs = sorted({run.results["best_epoch"] for run in runs})
    return Entry(
        folder=folder,
        name=name,
        options=read_json(folder / compare.PROTOCOL_FILE, folder),
        main=None if None in mains else float(np.mean([main for main in mains if main is not None])),
        test={key: figures.Estimate(name, *spread(summary["test"][key])) for key in correlations(summary["test"])},
        best_epoch=f"{epochs[0]}-{epochs[-1]}/{max(run.results['epochs'] for run in runs)}",
        seconds=sum(run.results["seconds"] for run in runs),
        is_repeated=True,
        epochs=[run.epochs for run in runs],
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
    places = {*NOT_SAVED, "cache_dir", *(("data_csv_path", "image_base_dir") if demo else ())}
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
    return number(found.value) + (f"\n({between(found.interval)})" if found.interval else "")


def options_beside(entries: Sequence[Entry]) -> Table:
    """The options that are not the same in all, a column for each."""
    names = differing_options(entries)
    rows = [[entry.name, *(value_text(entry.options[name]) for name in names)] for entry in entries]
    return Table(["run", *names], rows, words=1 + len(names))


def comparison_table(entries: Sequence[Entry]) -> Table:
    """A row for each entry, in their order."""
    names = differing_options(entries)
    tasks = tasks_of(dict.fromkeys(key for entry in entries for key in entry.test))
    keys = [f"{name}_{task}" for task in tasks for name in ("srocc", "plcc")]
    titles = {"srocc": "SROCC", "plcc": "PLCC"}
    heads = [f"{titles[name]} {title_of(task)}" for name, _, task in (key.partition("_") for key in keys)]
    rows = [
        [
            entry.name,
            number(entry.main),
            *(estimate_text(entry, key) for key in keys),
            entry.best_epoch,
            f"{entry.seconds:.0f}",
            in_words(entry, entries, names) or NOTHING,
        ]
        for entry in entries
    ]
    return Table(["run", "val main", *heads, "best epoch", "seconds", "differs in"], rows, strong=1)


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
        (compare.compare_runs, [entry for entry in entries if entry.test and not entry.is_repeated]),
        (compare.compare_protocols, [entry for entry in entries if entry.test and entry.is_repeated]),
    ):
        for other in group[1:]:
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    found = compare_them([group[0].folder, other.folder])
            except ValueError as error:
                notes.append(f"{other.name} and {group[0].name} have no paired differences: {one_line(error)}")
                continue
            notes += [line.removeprefix("note: ") for line in said.getvalue().splitlines()]
            tables.append(found[found["run"] == str(other.folder)].assign(run=other.name, best=group[0].name))
    if not tables and not notes:
        notes = ["no paired differences: fewer than two runs of a kind have test predictions"]
    empty = pd.DataFrame(columns=[*compare.COLUMNS, "best"])
    return (pd.concat(tables, ignore_index=True) if tables else empty), list(dict.fromkeys(notes))


def score_name(found: pd.DataFrame, score: str, title: str) -> str:
    """What a score is called in a table of differences: with its data set, where there are several."""
    several = len({name for name in found["set"] if name}) > 1
    return title_of_stem(score) + (f" on {title}" if several and title else "")


def differences_table(found: pd.DataFrame) -> Table:
    """Paired differences as cells."""
    rows = []
    for row in found.to_dict("records"):
        name = score_name(found, row["score"], row["set"])
        cells = [row["run"], row["best"], name, str(row["images"])]
        said = NOTHING
        for key in ("srocc", "plcc"):
            ends = [row[f"{key}_low"], row[f"{key}_high"]]
            known = bool(np.isfinite(ends).all())
            cells.append(number(row[f"d_{key}"], sign="+") + (f"\n({between(ends, '+')})" if known else ""))
            said = compare.verdict(*ends) if known and key == "srocc" else said
        rows.append([*cells, said])
    return Table(["run", "minus", "score", "images", "SROCC", "PLCC", "by SROCC"], rows, words=3)


def differences_pictures(found: pd.DataFrame, pictures: Pictures) -> list[Picture]:
    """The differences in SROCC with their intervals, a picture for each score and data set."""
    drawn = []
    for key, rows in found.groupby(["score", "set", "best"], sort=False):
        score, title, best = map(str, cast(tuple, key))
        known = rows[np.isfinite(rows["srocc_low"].astype(float))].head(MAX_GENERATORS)
        if known.empty:
            continue
        name = score_name(found, score, title)
        estimates = [
            figures.Estimate(row["run"], row["d_srocc"], (row["srocc_low"], row["srocc_high"]), (), 0)
            for row in known.to_dict("records")
        ]
        figure = figures.estimates(estimates, f"SROCC minus that of {figures.shorten(best)}", zero=True)
        caption = f"SROCC of {name}: difference to {best}, paired, with 95 % interval"
        drawn.append(pictures.add(f"difference-{name}", caption, figure))
    return drawn


def overlaid_curves(entries: Sequence[Entry], pictures: Pictures) -> list[Picture]:
    """Validation scores over epochs, a picture for each score; of many runs the best have colours."""
    columns = {"val_main": "main score (mean of SROCC and PLCC)"}
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


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of what the command line names."""
    with one_line_errors():
        parser = OneLineParser(
            prog="report.py",
            description="Show a run as one HTML file with pictures, or several runs beside each other.",
            allow_abbrev=False,
        )
        parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of --repeats or --kfold")
        parser.add_argument(
            "--out",
            metavar="FILE",
            help=f"the page that compares several (default: {COMPARISON_FILE} in the folder they lie in, or here if in "
            "several)",
        )
        args: argparse.Namespace = parser.parse_args(argv)
        folders = [Path(run) for run in args.runs]
        if len(folders) == 1:
            if args.out:
                raise ValueError(f"--out {args.out}: is for several runs; the page of one is {REPORT_FILE} in it")
            print(f"page: {write_report(folders[0])}")
            return
        out = Path(args.out) if args.out else default_page(folders)
        if out.is_dir() or not out.parent.is_dir():
            raise ValueError(f"--out {out}: must be a file in a folder that exists")
        print("\n".join(compare_folders(folders, out)))


if __name__ == "__main__":
    main(sys.argv[1:])
