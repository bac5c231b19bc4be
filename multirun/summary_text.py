"""The summary of repeated runs as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multirun.summaries import TRAINED, is_of_answers
from sources.scores import MEASURES, tasks_of, title_of

SHOWN_KINDS = 8  # of what questions are told apart by


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as a table of text."""
    return answer_lines(summary) if is_of_answers(summary) else score_lines(summary)


def title_line(summary: Mapping[str, Any]) -> str:
    """How many runs there are, on how many images, and what their intervals are of."""
    count = len(summary["runs"])
    what = "all on the same test fold: intervals are those of chance in training"
    if count == 1:
        what = "no intervals: they take several"
    elif summary["share"]:
        what = "intervals allow for shared training images"
    sizes = ", ".join(f"{fold} {size}" for fold, size in summary["images"].items())
    return f"{count} run{'s' if count > 1 else ''}, {sizes} images{' in the first' if count > 1 else ''}; {what}"


def score_lines(summary: Mapping[str, Any]) -> list[str]:
    """Of baseline.py: agreement with people."""
    rows = {TRAINED: summary["test"], **summary["floors"]}
    width = max(map(len, rows)) + 1
    first = max(12, *(len(title_of(task)) for task in tasks_of(summary["test"]))) + 1
    lines = [
        title_line(summary),
        f"{'':<{width + first}}{'SROCC':>7}{'sd':>7}{'median':>8}{'95 % interval':>18}{'PLCC':>8}{'sd':>7}{'fitted':>8}"
        f"{'KROCC':>7}{'RMSE':>7}",
    ]
    for task in tasks_of(summary["test"]):
        title = title_of(task)
        for name, found in rows.items():
            if f"srocc_{task}" not in found:
                continue
            srocc, plcc, fitted, krocc, rmse = (found[f"{key}_{task}"] for key in MEASURES)
            lines.append(
                f"{title:<{first}}{name.replace('_', ' '):<{width}}{srocc['mean']:>7.3f}{srocc['sd']:>7.3f}"
                f"{srocc['median']:>8.3f}{interval_text(srocc['interval']):>18}{plcc['mean']:>8.3f}{plcc['sd']:>7.3f}"
                f"{fitted['mean']:>8.3f}{krocc['mean']:>7.3f}{rmse['mean']:>7.3f}"
            )
            title = ""
    for task in tasks_of(summary["test"]):
        for floor, found in summary["over"].items():
            if f"srocc_{task}" in found and floor != "mean":  # which orders nothing
                over = found[f"srocc_{task}"]
                ends = f" ({interval_text(over['interval'], '+')})" if over["interval"] else ""
                lines.append(
                    f"SROCC of {title_of(task)}, trained model minus {floor.replace('_', ' ')}: "
                    f"{over['mean']:+.3f}{ends}"
                )
    return lines


def answer_lines(summary: Mapping[str, Any]) -> list[str]:
    """Of main.py: accuracy of the model, its branches and the floors, of every kind of question, and GQA's measures."""
    rows = {TRAINED: summary["test"], **summary["floors"]}
    parts = [(name.replace("_", " "), row["accuracy"]) for name, row in rows.items()]
    tables = [("accuracy", parts)]
    for key, kinds in summary["kinds"].items():
        tables.append((f"by {key}", [(f"  {kind}", found) for kind, found in list(kinds.items())[:SHOWN_KINDS]]))
    more = [(name, found) for name, found in summary["test"].items() if name != "accuracy"]
    tables += [("other measures", more)] if more else []
    width = max(len(name) for title, part in tables for name in (title, *dict(part))) + 1
    lines = [title_line(summary), f"{'':<{width}}{'mean':>8}{'sd':>7}{'median':>8}{'95 % interval':>18}"]
    for title, part in tables:
        lines += [] if title == "accuracy" else [title]
        for name, found in part:
            numbers = f"{found['mean']:>8.3f}{found['sd']:>7.3f}{found['median']:>8.3f}"
            lines.append(f"{name:<{width}}{numbers}{interval_text(found['interval']):>18}".rstrip())
    for floor, found in summary["over"].items():
        over = found["accuracy"]
        ends = f" ({interval_text(over['interval'], '+')})" if over["interval"] else ""
        lines.append(f"accuracy, trained model minus {floor}: {over['mean']:+.3f}{ends}")
    return lines


def interval_text(interval: list[float] | None, sign: str = "") -> str:
    """An interval in words; "" if there is none."""
    return f"{interval[0]:{sign}.3f} .. {interval[1]:{sign}.3f}" if interval else ""


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says."""
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"
