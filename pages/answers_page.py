"""The page of a run that answers questions about images: accuracy, floors, kinds, confusions, single questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from drawing import figures
from pages.elements import (
    NOTHING,
    Picture,
    Pictures,
    Table,
    name_of,
    number,
    percent,
    seconds_text,
    truncate,
    value_text,
)
from pages.question_cards import cards, is_share, read_examples
from pages.run_data import Run, read_epochs, read_json
from pages.run_page import curves, notes, provenance_table, remarks, timing_table
from storage.json_files import NUMBER, schema_mismatch

MAX_GROUPINGS = 8  # of questions: by type of answer, by words, ...
MAX_KINDS = 24  # drawn of each grouping; the table has all
MAX_CONFUSED = 20  # answers in the confusions, beside "other"

OPTIONAL = (*NUMBER, type(None))
RESULTS = {  # what the page shows of results.json
    **dict.fromkeys(("best_epoch", "epochs", "answers"), int),
    "seconds": NUMBER,
    "fold": str,
    "measures": {"accuracy": NUMBER, str: OPTIONAL},
    "val": {"accuracy": NUMBER, str: OPTIONAL},
    "by_kind": {str: {str: {"accuracy": NUMBER, "questions": int}}},
    "branches": {str: {"accuracy": NUMBER, "gain_of_fused": NUMBER, "interval": list}},
    "floors": {str: NUMBER},
    "ceiling": NUMBER,
    "confusion": {"answers": list, "counts": list},
    "data": {str: {"questions": int, "images": int}},
}
MEASURES = {  # of GQA -> what they say; shares but for the last
    "binary": "accuracy on questions that are answered with yes or no, or with one of two",
    "open": "accuracy on all others",
    "consistency": "accuracy on what a question that was answered rightly entails",
    "validity": "share of answers that fit the question, such as a colour to one for a colour",
    "plausibility": "share of answers that make sense for what is asked about",
    "grounding_fine": "share of the fine branch's attention that is on what question and answer name",
    "grounding_fine_even": "the same if all regions had as much",
    "grounding_graph": "share of the weight of the graph branch's objects that is on what question and answer name",
    "grounding_graph_even": "the same if all objects had as much",
    "distribution": "chi-square distance from the distribution of people's answers; lower is better",
}


@dataclass(frozen=True)
class AnswersRun(Run):
    """A finished run of main.py, as its files tell of it; of its predictions only the examples are read."""

    examples: list[dict[str, Any]]

    @property
    def fold(self) -> str:
        """The fold that the page is about."""
        return self.results["fold"]

    @property
    def fold_name(self) -> str:
        """The same in words."""
        return "validation" if self.fold == "val" else "test"

    @property
    def accuracy(self) -> figures.Estimate:
        """Of the trained model."""
        return figures.Estimate("trained model", self.results["measures"]["accuracy"], self.results.get("interval"))


# -- reading


def read_answers_run(folder: Path) -> AnswersRun:
    """Read a finished run. Raises ValueError."""
    options = read_json(folder / "config.json", folder)
    results = check_results(read_json(folder / "results.json", folder), folder / "results.json")
    epochs = read_epochs(folder)
    provenance = options.pop("provenance", {})
    return AnswersRun(
        folder=folder,
        options=options,
        provenance=provenance if isinstance(provenance, dict) else {},
        results=results,
        epochs=epochs,
        predictions=pd.DataFrame(),
        files={},
        examples=read_examples(folder / "examples.json"),
    )


def check_results(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same, if it has every part that the page shows. Raises ValueError."""
    said = schema_mismatch(results, RESULTS) or shares_mismatch(results)
    if not said and results["fold"] not in ("test", "val"):
        said = "'fold' is neither 'test' nor 'val'"
    if not said and (names := results["confusion"]["answers"]):
        square = [[int] * len(names)] * len(names)
        said = schema_mismatch(results["confusion"], {"answers": [str, ...], "counts": square}, "confusion")
    if said:
        raise ValueError(f"{path}: {said}; run it again with this version")
    return results


def shares_mismatch(results: Mapping[str, Any]) -> str:
    """Which accuracy or interval is not made of numbers on 0..1, in words; an interval may be empty or absent."""
    found = {"measures.accuracy": results["measures"]["accuracy"], "val.accuracy": results["val"]["accuracy"]}
    found |= {"ceiling": results["ceiling"], **{f"floors.{name}": value for name, value in results["floors"].items()}}
    intervals = {"interval": results.get("interval")}
    for key, parts in results["by_kind"].items():
        for kind, part in parts.items():
            found[f"by_kind.{key}.{kind}.accuracy"] = part["accuracy"]
            intervals[f"by_kind.{key}.{kind}.interval"] = part.get("interval")
            floors = part.get("floors", {})
            if said := schema_mismatch(floors, {str: NUMBER}, f"by_kind.{key}.{kind}.floors"):
                return said
            found |= {f"by_kind.{key}.{kind}.floors.{name}": value for name, value in floors.items()}
    for name, ends in intervals.items():
        if ends not in (None, []):
            if said := schema_mismatch(ends, [NUMBER, NUMBER], name):
                return said
            found |= {f"{name}.{place}": end for place, end in enumerate(ends)}
    return next((f"{name!r} is not within 0 and 1" for name, value in found.items() if not is_share(value)), "")


# -- showing


def answers_content(run: AnswersRun, pictures: Pictures) -> dict[str, Any]:
    """What the page of such a run shows."""
    results = run.results
    floors = floors_pictures(run, pictures)
    kinds = kind_parts(run, pictures)
    drawn = training_curves(run, pictures)
    changed, unchanged = options_tables(run.options, results)
    worst, best = cards(run.examples)
    return {
        "run": run,
        "about": about(run.options, run.provenance),
        "notes": notes(results.get("notes")),
        "tiles": tiles(run),
        "ceiling": percent(results["ceiling"]),
        "scores": floors_table(run),
        "floors_pictures": floors,
        "measures": measures_table(run),
        "kinds": kinds,
        "advice": remarks(results.get("advice"), ("flag", "value", "recommended", "why", "change")),
        "diagnosis": remarks(results.get("diagnosis"), ("finding", "evidence", "proposal", "command")),
        "curves": drawn,
        "confusion": confusion_part(run, pictures),
        "worst": worst,
        "best": best,
        "has_graphs": any(card.objects for card in (*worst, *best)),
        "data": data_table(run),
        "changed": changed,
        "unchanged": unchanged,
        "again": truncate(results.get("command") or NOTHING, 2000),
        "provenance": provenance_table(run),
        "timing": times_table(run),
    }


def percent_interval(interval: Sequence[float] | None) -> str:
    """An interval of shares in per cent; "" if there is none."""
    return f"{number(100 * interval[0], 1)} … {percent(interval[1])}" if interval else ""


def about(options: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    """What was trained on what, in a few words each."""
    data = f"demo set in the form of {options.get('dataset')}" if options.get("demo") else options.get("dataset")
    data = options.get("data_csv_path") if data == "csv" else data
    seen = f"regions from {options['features']}" if options.get("features") else ""
    seen = "images shuffled" if options.get("shuffle_images") else seen
    seen = "no image" if options.get("question_only") else seen
    branches = f"branches {options['branches']}" if options.get("branches") else ""
    seed = f"seed {options['seed']}" if "seed" in options else ""
    return [truncate(word) for word in (data, seen, branches, seed, provenance.get("machine")) if word]


def tiles(run: AnswersRun) -> list[dict[str, Any]]:
    """The most important numbers: each a title, a number, its unit, and lines of words below it."""
    results, own = run.results, run.accuracy
    size = results["data"].get(run.fold, {})
    about_size = f"{size['questions']:,} questions about {size['images']:,} images" if size else ""
    found = [
        {
            "title": f"Accuracy, {run.fold_name} fold",
            "big": percent(own.value),
            "small": "",
            "lines": [f"95 %: {percent_interval(own.interval)}" if own.interval else "", about_size],
        }
    ]
    if results["floors"]:
        best, value = max(results["floors"].items(), key=lambda item: item[1])
        gap = own.value - value
        words = f"{percent(value)} by the best floor, {name_of(best)}"
        found.append(
            {"title": "Beside the best floor", "big": number(100 * gap, 1, "+"), "small": "points", "lines": [words]}
        )
    epoch, epochs = results["best_epoch"], results["epochs"]
    untrained = "" if epoch else f"untrained: none of {epochs} epochs was better"
    validation = f"validation accuracy {percent(results['val']['accuracy'])}" if run.fold == "test" else ""
    found.append({"title": "Epoch kept", "big": str(epoch), "small": f"of {epochs}", "lines": [untrained, validation]})
    table = run.epochs
    median = float(table["seconds"].median()) if "seconds" in table else float("nan")
    each = f"{median:.1f} s for an epoch (median)" if np.isfinite(median) else ""
    found.append({"title": "Time", "big": seconds_text(results["seconds"]), "small": "in all", "lines": [each]})
    return found


def beside(run: AnswersRun) -> list[tuple[str, float]]:
    """What the model is compared with: the ceiling, then the floors, the best first."""
    floors = sorted(run.results["floors"].items(), key=lambda item: -item[1])
    return [("ceiling", run.results["ceiling"]), *floors]


def floors_table(run: AnswersRun) -> Table:
    """The trained model beside the ceiling and the floors."""
    own = run.accuracy
    rows = [["trained model", percent(own.value), percent_interval(own.interval) or NOTHING, NOTHING]]
    for name, one in run.results["branches"].items():
        between, gain = percent_interval(one["interval"]) or NOTHING, number(100 * one["gain_of_fused"], 1, "+")
        rows.append([f"its {name} branch alone", percent(one["accuracy"]), between, gain])
    for name, value in beside(run):
        rows.append([name_of(name), percent(value), NOTHING, number(100 * (own.value - value), 1, "+")])
    return Table(["predictor", "accuracy", "95 % interval", "trained model minus it, points"], rows, strong=1)


def in_percent(found: figures.Estimate, colour: int | None) -> figures.Estimate:
    """An estimate of a share for a picture, in per cent."""
    ends = [100 * end for end in found.interval] if found.interval else None
    return figures.Estimate(found.label, 100 * found.value, ends, (), colour)


def floors_pictures(run: AnswersRun, pictures: Pictures) -> list[Picture]:
    """Accuracy of the trained model, the ceiling and the floors; none without floors."""
    if not run.results["floors"]:
        return []
    rows = [in_percent(run.accuracy, 0)]
    rows += [in_percent(figures.Estimate(name_of(name), value), None) for name, value in beside(run)[: MAX_KINDS + 1]]
    caption = "Accuracy of the trained model with its 95 % interval, the ceiling, and the floors"
    return [pictures.add("floors", caption, figures.estimates(rows, f"accuracy, %, {run.fold_name} fold"))]


def measures_table(run: AnswersRun) -> Table | None:
    """GQA's further measures; None if there are none."""
    found = {name: value for name, value in run.results["measures"].items() if name not in ("accuracy", "loss")}
    rows = []
    for name, value in found.items():
        is_share = name in MEASURES and name != "distribution"
        shown = NOTHING if value is None else percent(value) if is_share else number(value)
        rows.append([name_of(name), MEASURES.get(name, ""), shown])
    return Table(["measure", "meaning", "value"], rows, words=2) if rows else None


def kind_parts(run: AnswersRun, pictures: Pictures) -> list[dict[str, Any]]:
    """A part for each way of grouping questions: title, picture, table."""
    parts = []
    groupings = [(title, kinds) for title, kinds in run.results["by_kind"].items() if kinds]
    for place, (title, kinds) in enumerate(groupings[:MAX_GROUPINGS]):
        known = sorted(kinds.items(), key=lambda item: (-item[1]["questions"], item[0]))
        if all(kind.isdecimal() for kind in kinds):  # numbers of words or steps
            known = sorted(kinds.items(), key=lambda item: (len(item[0]), item[0]))
        rows = [
            [
                name_of(kind),
                f"{part['questions']:,}",
                percent(part["accuracy"]),
                percent_interval(part.get("interval")) or NOTHING,
                percent(max(part["floors"].values())) if part.get("floors") else NOTHING,
            ]
            for kind, part in known
        ]
        drawn = [in_percent(replace(run.accuracy, label="all questions"), None)]
        for kind, part in known[:MAX_KINDS]:
            drawn.append(in_percent(figures.Estimate(name_of(kind), part["accuracy"], part.get("interval")), place))
        most = f", the {MAX_KINDS} most frequent of {len(known)}" if len(known) > MAX_KINDS else ""
        caption = f"Accuracy by {name_of(title)}, with 95 % intervals{most}"
        figure = figures.estimates(drawn, f"accuracy, %, {run.fold_name} fold")
        picture = pictures.add(f"kinds-{title}", caption, figure)
        table = Table([name_of(title), "questions", "accuracy", "95 % interval", "best floor"], rows)
        parts.append({"title": name_of(title), "picture": picture, "table": table})
    return parts


def lines_of(table: pd.DataFrame, columns: Sequence[tuple[str, str, int, int]], scale: float = 1) -> list[figures.Line]:
    """Those of the columns (name, label, colour, dash) of metrics.csv that hold a number, over epochs."""
    x = table["epoch"].to_numpy()
    return [
        figures.Line(label, x, scale * table[name].to_numpy(), colour, dash)
        for name, label, colour, dash in columns
        if name in table and np.isfinite(table[name]).any()
    ]


def training_curves(run: AnswersRun, pictures: Pictures) -> list[Picture]:
    """What was measured in each epoch: accuracy, the parts of the loss, and what every program measures."""
    table, best = run.epochs, run.results["best_epoch"] or None
    drawn = []
    if found := lines_of(table, [("val_accuracy", "", 0, 0)], 100):
        figure = figures.chart(found, "accuracy, %", best=best)
        drawn.append(pictures.add("accuracy", "Accuracy on the validation fold", figure))
    drawn += curves(run, pictures)
    parts = [str(column).removeprefix("loss_") for column in table if str(column).startswith("loss_")]
    if len(parts) > 1:
        columns = [
            (f"{side}loss_{part}", f"{name_of(part)}, {words}", i, dash)
            for i, part in enumerate(parts[: len(figures.SERIES)])
            for dash, (side, words) in enumerate((("", "training"), ("val_", "validation")))
        ]
        if found := lines_of(table, columns):
            drawn.append(pictures.add("loss-parts", "The parts of the loss", figures.chart(found, "loss", best=best)))
    return drawn


def confusion_part(run: AnswersRun, pictures: Pictures) -> dict[str, Any] | None:
    """Which answers are taken for which, as a picture and as a table; None if that is not known."""
    names = [name_of(name) for name in run.results["confusion"]["answers"]]
    if not names:
        return None
    counts = np.maximum(np.array(run.results["confusion"]["counts"], dtype=float), 0)
    if len(names) > MAX_CONFUSED + 1:  # the others join the last, which is "other"
        names = [*names[:MAX_CONFUSED], names[-1]]
        starts = range(MAX_CONFUSED + 1)
        counts = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    caption = "Of the questions to which people gave an answer (row), per cent that were answered so (column)"
    picture = pictures.add("confusion", caption, figures.heat_map(names, shares, "predicted", "people said"))
    rows = [[name, *(f"{count:.0f}" for count in row)] for name, row in zip(names, counts, strict=True)]
    return {"picture": picture, "table": Table(["people said", *names], rows)}


def data_table(run: AnswersRun) -> Table:
    """How large the folds are."""
    rows = [
        [name_of(fold), f"{size['questions']:,}", f"{size['images']:,}"] for fold, size in run.results["data"].items()
    ]
    return Table(["fold", "questions", "images"], rows)


def times_table(run: AnswersRun) -> Table:
    """How long it took, and for what."""
    table = timing_table(replace(run, epochs=run.epochs.drop(columns="images_per_s", errors="ignore")))
    rows = [list(row) for row in table.rows]
    if "images_per_s" in run.epochs and np.isfinite(run.epochs["images_per_s"]).any():
        rows.append(["questions a second (median)", f"{run.epochs['images_per_s'].median():,.0f}"])
    if isinstance(resumed := run.results.get("resumed"), list) and resumed:
        rows.append(["interrupted and gone on with", f"{len(resumed)} time{'s' if len(resumed) > 1 else ''}"])
    return Table(table.head, rows)


def options_tables(options: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[Table | None, Table]:
    """The options that are not at the defaults that results.json tells, and all others; None where it tells none."""
    found = results.get("defaults")
    defaults = found if isinstance(found, dict) else {}
    changed = [name for name, value in options.items() if name in defaults and value != defaults[name]]
    rows = [[truncate(name), value_text(options[name]), value_text(defaults[name])] for name in changed]
    others = [[truncate(name), value_text(value)] for name, value in options.items() if name not in changed]
    own = Table(["option", "value", "default"], rows, words=3) if defaults else None
    return own, Table(["option", "value"], others, words=3)
