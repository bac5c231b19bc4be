"""The page of repeated runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_runs import (
    cells,
    change,
    measured,
    noisy,
    page_of,
    undraw,
    write_repeated,
)

from evaluation import metrics
from pages.report import write_report


@pytest.fixture(autouse=True)
def undrawn(monkeypatch) -> None:
    """What is tested here are words alone."""
    undraw(monkeypatch)


def test_repeated_runs_have_a_page_of_their_summary(tmp_path):
    folder = write_repeated(tmp_path / "two")
    write_report(folder / "seed2")
    page = page_of(folder)
    scores = [measured({task: noisy(task, spread) for task in "qc"}) for spread in (0.5, 1.0)]
    values = [score["srocc_q"] for score in scores]
    low, high = metrics.resampled_interval(values, 0.25) or (0, 0)
    row = page.tables["scores beside the floors"][1]
    ends = f"{low:.3f} … {high:.3f}".replace("-", "−")
    assert row[:6] == [
        "quality",
        "trained model",
        *cells(np.mean(values), np.std(values, ddof=1), np.mean(values)),
        ends,
    ]
    assert page.tables["scores beside the floors"][2][1:4] == ["generator mean", "0.250", "0.000"]
    assert page.tables["trained model minus floors"][1][2] == f"{np.mean(values) - 0.25:+.3f}"
    assert page.tables["runs"][1][:3] == ["seed1", *cells(scores[0]["main"], values[0])]
    assert [link["href"] for link in page.of("a")] == ["seed2/report.html"]
    assert (folder / "figures" / "summary-quality.png").exists()


def test_a_page_of_one_repeated_run_promises_no_intervals(tmp_path):
    folder = write_repeated(tmp_path / "one")

    def single(summary: dict[str, Any]) -> None:
        summary["runs"] = summary["runs"][:1]
        floors = [*summary["floors"].values(), *summary["over"].values()]
        for part in (summary["test"], *floors):
            for values in part.values():
                values |= {"values": values["values"][:1], "interval": None}

    change(folder, "summary.json", single)
    page = page_of(folder)
    assert "mean of 1 run " in page.text and "1 run; images:" in page.text and "no intervals" in page.text
