"""Pages as people open them: they need nothing but themselves, fit their screen, and stay harmless."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import (
    HOSTILE,
    change,
    keep_images,
    make_hostile,
    write_repeated,
    write_run,
)

from pages.comparison_page import compare_folders
from pages.report import write_report

pytestmark = pytest.mark.slow


def look(browser: Any, path: Path, scheme: str, width: int) -> dict[str, Any]:
    """Open a page as people do; what it loads and says must be nothing but itself."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(path.as_uri())
    found = tab.evaluate(
        """() => ({
            wide: document.documentElement.scrollWidth - innerWidth, title: document.title,
            paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
            letters: [...document.querySelectorAll("svg text")].map(text => getComputedStyle(text).fill),
            broken: [...document.images].filter(image => !image.naturalWidth).length,
        })"""
    )
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert found["wide"] <= 0 and found["broken"] == 0
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of a run whose images are there."""
    folder = tmp_path_factory.mktemp("shown")
    run = write_run(folder / "run", lr=1e-3)
    keep_images(run, folder / "images")
    return write_report(run)


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory) -> Path:
    """The page of a run whose texts are out to break it."""
    return write_report(make_hostile(write_run(tmp_path_factory.mktemp("hostile") / "run", lr=1e-3)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_page_needs_nothing_but_itself_and_fits_its_screen(browser, page, scheme, width):
    found = look(browser, page, scheme, width)
    paper, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("paper", "ink"))
    assert paper > 600 > ink if scheme == "light" else paper < 150 < 600 < ink
    assert set(found["letters"]) == {found["ink"]} and len(found["letters"]) > 100


@pytest.mark.parametrize("width", [360, 1200])
def test_a_hostile_page_stays_harmless_and_in_its_screen(browser, hostile_page, width):
    assert look(browser, hostile_page, "dark", width)["title"] == "run"


def test_runs_of_hostile_names_are_compared_harmlessly(browser, tmp_path):
    names = ["<img src=x onerror=document.title='taken'>", "'\"><svg onload=document.title='taken'>\x1b[31m"]
    runs = [write_run(tmp_path / name, spread=0.3 + i, lr=1e-3 * i + 1e-4) for i, name in enumerate(names)]
    for folder in runs:
        change(folder, "predictions.csv", lambda table: table.assign(prompt=HOSTILE, generator=HOSTILE, set=HOSTILE))
    compare_folders(runs, tmp_path / "comparison.html")
    assert look(browser, tmp_path / "comparison.html", "light", 1200)["title"] != "taken"


def test_other_pages_fit_a_phone_too(browser, tmp_path):
    runs = [write_run(tmp_path / ("n" * 60 + str(i)), spread=0.3 + i, lr=1e-3 * i + 1e-4) for i in range(3)]
    compare_folders(runs, tmp_path / "comparison.html")
    look(browser, tmp_path / "comparison.html", "light", 360)
    look(browser, write_report(write_repeated(tmp_path / "repeated")), "dark", 360)
