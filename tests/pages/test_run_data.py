"""Run folders that are damaged or of another shape are refused by name, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from made_runs import (
    change,
    undraw,
    write_repeated,
    write_run,
)
from refusals import refusal

from drawing import figures
from pages import run_data
from pages.report import write_report


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with both scores."""
    return write_run(tmp_path / "run", epochs=3, lr=1e-3)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """For tests of words alone."""
    undraw(monkeypatch)


BROKEN: list[tuple[str, str | bytes | None, str]] = [
    ("results.json", None, "unfinished run, results.json is missing"),
    ("results.json", '{"best_epoch": 1', "results.json: cannot be read"),
    ("results.json", "[]", "not a JSON object"),
    ("results.json", "{}", "has no 'best_epoch'"),
    ("results.json", "[" * 100_000, "results.json: cannot be read"),
    ("config.json", None, "no run folder, config.json is missing"),
    ("config.json", b"\xff\xfe\x00", "config.json: cannot be read"),
    ("metrics.csv", "", "metrics.csv: cannot be read"),
    ("metrics.csv", "loss\n1\n", "no column 'epoch'"),
    ("metrics.csv", "epoch,loss\n1,abc\n", "metrics.csv: cannot be read"),
    ("predictions.csv", None, "unfinished run, predictions.csv is missing"),
    ("predictions.csv", "name,set\n", "no column 'split'"),
    ("predictions.csv", "name,set,split,prompt,generator\na,b,test,c,d\n", "no column 'mos_quality'"),
    ("splits.csv", "name\na\n", "no column 'digest'"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN)
def test_a_broken_run_is_refused_in_one_line(run, name, content, said):
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refusal(write_report, run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"images": {"train": 1}}, "'images' has no 'val'"),
        ({"certainty": {"q": {"other": 1}}}, "'certainty.q' has no 'intervals'"),
        ({"generators": {"q": {"by_generator": [], "ranking": 1.0}}}, "'generators.q.by_generator' is no list of any"),
        ({"sets": {"a": 1}}, "'sets.a' is no object"),
        ({"leakage": {"prompt": 1}}, "'leakage.prompt' is no object"),
        ({"floors": {"mean": {"srocc_q": None}}}, "'floors.mean.srocc_q' is no number"),
    ],
)
def test_parts_of_another_shape_are_refused_by_name(run, edit, said):
    change(run, "results.json", lambda results: results.update(edit))
    assert f"{run / 'results.json'}: {said}; run it again with this version" in refusal(write_report, run)


def test_scores_that_are_no_numbers_are_refused(run):
    change(run, "results.json", lambda results: results["val"].update(srocc_q="high"))
    assert "'val.srocc_q' is no number" in refusal(write_report, run)


@pytest.mark.usefixtures("undrawn")
def test_a_prompt_may_be_called_nan(run):
    change(run, "predictions.csv", lambda table: table.assign(prompt="nan", generator="NA"))
    assert set(run_data.read_run(run).scored["prompt"]) == {"nan"}


def places_in(part: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every part of a JSON value."""
    keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else []
    return [found for key in keys for found in ((*place, key), *places_in(part[key], (*place, key)))]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["results.json", "summary.json"])
def test_no_damage_to_a_file_is_worse_than_one_line(tmp_path, name, monkeypatch):
    """Every part in turn is taken away or is something else: the page is written, or the file is named."""
    for kind in ("scatter", "residuals", "chart"):  # most of the time, and not of these files
        monkeypatch.setattr(figures, kind, lambda *_, **__: matplotlib.figure.Figure())
    folder = (write_run if name == "results.json" else write_repeated)(tmp_path / "run")
    whole = (folder / name).read_text()
    refusals = 0
    for place in places_in(json.loads(whole)):
        for other in ("x", None, [], "absent"):
            found = json.loads(whole)
            part = found
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = other
            if other == "absent":
                del part[place[-1]]
            (folder / name).write_text(json.dumps(found))
            try:
                write_report(folder)
                said = str(folder / name)
            except ValueError as error:
                refusals += 1
                said = str(error)
            assert str(folder / name) in said, (place, other)
    assert refusals > 100
