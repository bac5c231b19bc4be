"""Several runs beside each other: the page, and the table for the terminal."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from made_runs import (
    HOSTILE,
    Page,
    change,
    measured,
    noisy,
    undraw,
    write_repeated,
    write_run,
)

from multirun import comparison
from pages.comparison_page import compare_folders, default_page
from pages.report import write_report


@pytest.fixture(autouse=True)
def undrawn(monkeypatch) -> None:
    """What is tested here are words alone."""
    undraw(monkeypatch)


def test_runs_are_compared_the_best_validation_score_first(tmp_path):
    spreads = {"poor": 2.0, "good": 0.3, "fair": 0.8}
    rates = {"poor": 1e-3, "good": 1e-3, "fair": 1e-4}
    for name, spread in spreads.items():
        write_run(tmp_path / name, spread=spread, lr=rates[name])
    write_report(tmp_path / "fair")
    head, *lines = compare_folders([tmp_path / name for name in spreads], tmp_path / "comparison.html")
    rows = [re.split(r"  +", line) for line in lines[:3]]
    assert [row[0] for row in rows] == ["good", "fair", "poor"]
    scores = {name: measured({task: noisy(task, spread) for task in "qc"}) for name, spread in spreads.items()}
    for name, *found in rows:
        own = scores[name]
        assert found[0] == f"{own['main']:.3f}" and found[1] == f"{own['srocc_q']:.3f} (0.111 … 0.999)"
        assert found[4] == f"{own['plcc_c']:.3f} (0.222 … 0.888)" and found[5:7] == ["2/3", "12"]
        assert found[7] == ("lr 0.0001" if name == "fair" else "–")
    assert head.split("  ")[-1] == "differs in"
    page = Page(tmp_path / "comparison.html")
    assert [row[0] for row in page.tables["runs"][1:]] == ["good", "fair", "poor"]
    assert page.tables["options that differ"] == [
        ["run", "lr"],
        ["good", "0.001"],
        ["fair", "0.0001"],
        ["poor", "0.001"],
    ]
    assert [link["href"] for link in page.of("a")] == ["fair/report.html"]


def test_paired_differences_are_those_of_compare(tmp_path):
    runs = [write_run(tmp_path / name, spread=spread) for name, spread in (("good", 0.3), ("poor", 2.0))]
    lines = compare_folders(list(reversed(runs)), tmp_path / "comparison.html")
    assert any("only 8 prompts" in line for line in lines)
    expected = comparison.compare_runs(runs).query("run == @runs[1].__str__()").to_dict("records")
    rows = Page(tmp_path / "comparison.html").tables["paired differences"][1:]
    assert len(rows) == len(expected) == 2
    for row, own in zip(rows, expected, strict=True):
        values = [own[f"{part}srocc{end}"] for part, end in (("d_", ""), ("", "_low"), ("", "_high"))]
        difference, low, high = (f"{value:+.3f}".replace("-", "−") for value in values)
        assert row[:2] == ["poor", "good"] and row[4] == f"{difference}\n({low} … {high})"
        assert row[6] == comparison.verdict(values[1], values[2])


def test_what_cannot_be_paired_is_said_in_one_line(tmp_path):
    runs = [write_run(tmp_path / name, spread=spread) for name, spread in (("one", 0.3), ("other", 2.0))]
    change(runs[1], "predictions.csv", lambda table: table.assign(name="x" + table["name"]))
    lines = compare_folders(runs, tmp_path / "here.html")
    assert len(lines) == 5 and lines[3].startswith("other and one have no paired differences: ")
    assert lines[4] == f"page: {tmp_path / 'here.html'}"
    page = Page(tmp_path / "here.html")
    assert "paired differences" not in page.tables and "share 0 test image(s)" in page.text
    change(runs[1], "results.json", lambda results: results.update(test={}, floors={}, certainty={}, generators={}))
    lines = compare_folders(runs, tmp_path / "here.html")
    assert any(line.startswith("no paired differences: fewer than two runs") for line in lines)


def test_runs_in_different_folders_have_different_names_and_their_page_is_here(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / folder / "run", spread=spread) for folder, spread in (("a", 0.3), ("b", 2.0))]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lines = compare_folders(runs, default_page(runs))
    assert [line.split()[0] for line in lines[1:3]] == ["a/run", "b/run"]
    assert (tmp_path / "here" / "comparison.html").exists() and not (tmp_path / "comparison.html").exists()


def test_every_score_that_a_run_has_is_compared_the_two_first(tmp_path):
    runs = [write_run(tmp_path / name, spread=spread) for name, spread in (("more", 0.3), ("two", 2.0))]

    def add(results: dict[str, Any]) -> dict[str, Any]:
        extra = {f"{key[:-2]}_authenticity": 0.5 for key in results["test"] if key.endswith("_q")}
        return {**results, "test": {**extra, **results["test"]}}

    change(runs[0], "results.json", add)
    lines = [re.split(r"  +", line) for line in compare_folders(runs, tmp_path / "comparison.html")[:3]]
    titles = [f"{name} {title}" for title in ("quality", "consistency", "authenticity") for name in ("SROCC", "PLCC")]
    assert lines[0][2:8] == titles
    assert lines[1][6:8] == ["0.500", "0.500"] and lines[2][6:8] == ["–", "–"]
    assert Page(tmp_path / "comparison.html").tables["runs"][0][2:8] == titles


def test_repeated_and_single_runs_stand_in_one_table(tmp_path):
    first, second = (write_repeated(tmp_path / name, spread) for name, spread in (("one", 0.5), ("two", 0.9)))
    single = write_run(tmp_path / "single", spread=3.0)
    lines = compare_folders([single, first, second], tmp_path / "comparison.html")
    assert [line.split()[0] for line in lines[1:4]] == ["one", "two", "single"]
    assert re.split("  +", lines[1])[7] == "24"  # seconds of both
    mains = [measured({task: noisy(task, spread) for task in "qc"})["main"] for spread in (0.5, 1.0)]
    assert re.split("  +", lines[1])[1] == f"{np.mean(mains):.3f}"
    rows = Page(tmp_path / "comparison.html").tables["paired differences"][1:]
    expected = comparison.compare_protocols([first, second])
    assert [row[:3] for row in rows] == [["two", "one", "quality"], ["two", "one", "consistency"]]
    assert rows[0][4].startswith(f"{expected.iloc[1]['d_srocc']:+.3f}".replace("-", "−"))


def test_hostile_names_and_texts_are_harmless(tmp_path):
    names = ["<img src=x onerror=document.title='taken'>", "'\"><svg onload=document.title='taken'>\x1b[31m"]
    runs = [write_run(tmp_path / name, spread=0.3 + i, lr=1e-3 * i + 1e-4) for i, name in enumerate(names)]
    for folder in runs:
        change(folder, "predictions.csv", lambda table: table.assign(prompt=HOSTILE, generator=HOSTILE, set=HOSTILE))
    compare_folders(runs, tmp_path / "comparison.html")
    page = Page(tmp_path / "comparison.html")
    assert not any(tag in ("img", "script") or "onload" in attrs or "onerror" in attrs for tag, attrs in page.tags)
    assert "&lt;img" in page.source
