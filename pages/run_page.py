"""The page of one run: scores, floors, curves, generators, best and worst images, options."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from configs import NOT_SAVED, OPTIONS
from drawing import figures
from pages.elements import (
    NOTHING,
    Example,
    Picture,
    Pictures,
    Table,
    interval_text,
    number,
    seconds_text,
    thumbnail,
    truncate,
    value_text,
)
from pages.run_data import Run
from sources.scores import MEASURES, title_of

NUM_EXAMPLES = 8  # worst, and best, images of each score
MAX_GENERATORS = 24  # drawn; the table has all
LONGEST_REMARK = 1000  # characters of a part of one


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
        "again": f"python baseline.py --config {shlex.quote(str(run.folder / 'config.json'))}",
        "provenance": provenance_table(run),
        "timing": timing_table(run),
    }


def about(options: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    """What was trained on what, in a few words each."""
    weights = options.get("init_from") or f"{options.get('clip_model')} ({options.get('clip_pretrained')})"
    how = "all layers trained"
    if options.get("unfreeze_schedule"):
        how = f"layers frozen @ epoch: {options['unfreeze_schedule']}"
    elif options.get("partial_freeze"):
        how = f"{options.get('freeze_layers')} blocks frozen"
    how = "CLIP frozen" if options.get("freeze_clip") else how
    how += f", LoRA of rank {options['lora_rank']}" if options.get("lora_rank") else ""
    words = (data_name(options), weights, how, f"seed {options.get('seed')}", provenance.get("machine"))
    return [truncate(word) for word in words if word]


def data_name(options: Mapping[str, Any]) -> str:
    """The data of a run: names of data sets, or the path of a CSV."""
    if options.get("demo"):
        return "demo set"
    name = str(options.get("dataset", ""))
    return str(options.get("data_csv_path", "")) if name == "csv" else name


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
            ends = [interval_text(part["intervals"].get(key)) or NOTHING for key in ("srocc", "plcc")]
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
            drawn.append(pictures.add(name, caption, figures.chart(found, ylabel, best=best or None, **how)))

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
            name = title_of(task) + (f" on {truncate(title, 40)}" if title else "")
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
                    truncate(row["generator"], 80),
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
