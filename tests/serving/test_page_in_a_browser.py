"""The page, driven in a browser as a person would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from page_server import Server, as_sent, served
from tiny_run import finished_run, shared

from serving import explain
from serving.shared_scorer import SharedScorer

PROMPT = "a red circle & two <b>blue</b> squares"
HOSTILE = "<img src=x onerror=window.hit=1>.png"
WAIT = 60_000  # milliseconds, for a machine that is busy


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")]


@pytest.fixture(scope="module")
def run(demo_set) -> Path:
    """The folder of a finished run. Read it, do not change it."""
    return finished_run(demo_set)


@pytest.fixture(scope="module")
def scorer(run) -> SharedScorer:
    return shared(run)


@pytest.fixture(scope="module")
def files(demo_set) -> list[Path]:
    """Three images of the demo set."""
    return sorted(demo_set[1].glob("*.jpg"))[:3]


@pytest.fixture(scope="module")
def server(run, scorer, tmp_path_factory) -> Iterator[Server]:
    with served(scorer, run, tmp_path_factory.mktemp("uploads")) as found:
        yield found
    assert found.asked == []


@pytest.fixture
def page(server, browser) -> Iterator[Page]:
    """The page, freshly opened; at the end nothing has gone wrong in it and nobody else was asked for anything."""
    tab = browser.new_page()
    tab.set_default_timeout(WAIT)
    hosts: set[str | None] = set()
    wrong: list[str] = []
    tab.on("request", lambda request: request.url.startswith("data:") or hosts.add(urlsplit(request.url).hostname))
    tab.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(server.url)
    tab.get_by_role("button", name="Score", exact=True).wait_for()
    yield Page(tab)
    hit = tab.evaluate("window.hit")
    tab.close()
    assert (hosts, wrong, hit) == ({"127.0.0.1"}, [], None)


class Page:
    """What a person does on the page."""

    def __init__(self, tab) -> None:
        self.tab = tab

    def open(self, title: str) -> None:
        self.tab.get_by_role("tab", name=title).click()

    @property
    def shown(self):
        return self.tab.get_by_role("tabpanel").filter(visible=True)

    def upload(self, files, into: str = "Images") -> None:
        """Into the input with this label; waits until all are there."""
        block = self.shown.locator(".block").filter(has=self.tab.get_by_text(into, exact=True))
        block.locator("input[type=file]").set_input_files(files)
        if into == "Image":
            block.locator("img").wait_for()
        else:
            block.locator("tr.file").nth(len(files) - 1).wait_for()

    def press(self, name: str) -> None:
        self.shown.get_by_role("button", name=name, exact=True).click()

    def score(self, prompt: str | None = None) -> list[tuple[str, list[str]]]:
        if prompt is not None:
            self.shown.get_by_label("Prompt").fill(prompt)
        self.press("Score")
        return self.table()

    def table(self) -> list[tuple[str, list[str]]]:
        """Rows of the table: name and scores as they stand there."""
        self.shown.locator("table.scores").wait_for()
        rows = self.shown.locator("table.scores tbody tr").all()
        return [
            (row.locator(".name").inner_text(), [cell.inner_text() for cell in row.locator(".number b").all()])
            for row in rows
        ]

    def message(self) -> str:
        """What an error says."""
        toast = self.tab.get_by_test_id("toast-body")
        toast.wait_for()
        return toast.inner_text()


# -- Score


def test_images_are_scored_as_the_scorer_does_and_ranked_by_the_chosen_score(page, scorer, files):
    table = scorer.score(files, PROMPT).assign(name=[path.name for path in files])
    assert table["pred_quality"].nunique() == table["pred_align"].nunique() == 3

    def expected(column: str) -> list[tuple[str, list[str]]]:
        ranked = table.sort_values(column, ascending=False)
        values = ranked[["pred_quality", "pred_align"]].to_numpy()
        return [(name, [f"{value:.2f}" for value in row]) for name, row in zip(ranked["name"], values, strict=True)]

    page.upload(files)
    assert page.score(PROMPT) == expected("pred_quality")
    page.shown.get_by_label("consistency").check()
    page.tab.wait_for_function(
        "name => document.querySelector('#ranking .name').innerText === name", arg=expected("pred_align")[0][0]
    )
    assert page.table() == expected("pred_align")


def test_without_a_prompt_quality_alone(page, scorer, files):
    page.upload(files)
    page.shown.get_by_label("consistency").check()
    found = page.score()
    values = scorer.score(files)["pred_quality"].sort_values(ascending=False)
    assert [scores for _, scores in found] == [[f"{value:.2f}"] for value in values]
    assert "no consistency without a prompt: ranked by quality" in page.shown.inner_text()


def test_what_scores_mean_comes_from_the_run(page, run, scorer, files):
    results = json.loads((run / "results.json").read_text())["test"]
    text = page.tab.locator(".about").inner_text()
    for task in ("q", "c"):
        low, high = scorer.scales[task].low, scorer.scales[task].high
        assert f"{low:g} to {high:g}" in text
        assert f"SROCC of {results[f'srocc_{task}']:.2f}" in text and f"about {results[f'rmse_{task}']:.2f}" in text
    page.upload(files[:1])
    page.score()
    scale, value = scorer.scales["q"], scorer.score(files[:1])["pred_quality"][0]
    share = round(100 * (value - scale.low) / (scale.high - scale.low))
    assert f"of {scale.low:g} to {scale.high:g}: {share} % of the way up" in page.shown.inner_text()


def test_names_and_prompts_are_shown_as_text(page):
    page.upload([as_sent(HOSTILE)])
    assert [name for name, _ in page.score("<script>window.hit=1</script>")] == [HOSTILE]
    page.open("Table")
    rows = pd.DataFrame({"name": [HOSTILE], "prompt": ["${window.hit=1} {{x}} <svg onload=window.hit=1>"]})
    page.upload([as_sent("rows.csv", rows.to_csv(index=False).encode())], "CSV: name,prompt")
    page.upload([as_sent(HOSTILE)], "Its images")
    page.press("Score the table")
    assert page.table()[0][0].split("\n") == rows.iloc[0].tolist()


def test_broken_images_are_named_and_the_others_scored(page, files):
    page.upload([as_sent(files[0].name, files[0].read_bytes()), as_sent(HOSTILE, b"no image")])
    assert [name for name, _ in page.score()] == [files[0].name]
    assert f"1 of 2 images cannot be read: {HOSTILE} (not an image" in page.shown.inner_text()


def test_an_image_that_cannot_be_used_is_a_message(page):
    page.upload([as_sent(HOSTILE, b"no image")])
    page.press("Score")
    message = page.message()
    assert f"1 of 1 images cannot be read: {HOSTILE} (not an image" in message
    assert "Traceback" not in message and "/tmp" not in message


def test_nothing_to_score_is_a_message(page):
    page.press("Score")
    assert "no image yet" in page.message()


# -- Where it looked


def test_a_map_for_each_score(page, scorer, files):
    page.open("Where it looked")
    page.upload([files[0]], "Image")
    page.shown.get_by_label("Prompt").fill(PROMPT)
    page.shown.get_by_label("4", exact=True).check()
    page.press("Show")
    page.shown.locator("figure").nth(1).wait_for()
    maps = explain.occlusion_map(scorer, files[0], PROMPT, 4)
    figures = page.shown.locator("figure").all()
    assert [figure.locator("h3").inner_text() for figure in figures] == ["quality", "consistency"]
    for figure, values in zip(figures, maps.values(), strict=True):
        row, column = np.unravel_index(np.abs(values).argmax(), values.shape)
        verb = "lowers" if values[row, column] > 0 else "raises"
        assert f"row {row + 1}, column {column + 1} {verb} it by {abs(values).max():.2f}" in figure.inner_text()
        assert figure.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 100


def test_a_broken_image_has_no_map_but_a_message(page):
    page.open("Where it looked")
    page.press("Show")
    assert "no image yet" in page.message()


# -- Table


def test_a_table_up_and_down(page, scorer, files):
    names = [f"images/{path.name}" for path in files[:2]] + [f"images/{files[0].name}"]
    rows = pd.DataFrame({"name": names, "prompt": ["=1+1", "two blue squares", ""]})
    page.open("Table")
    page.upload([as_sent("rows.csv", rows.to_csv(index=False).encode())], "CSV: name,prompt")
    page.upload(files, "Its images")
    page.press("Score the table")
    assert [name.split("\n")[0] for name, _ in page.table()] == names
    assert f"1 image(s) without a row were not scored: {files[2].name}" in page.shown.inner_text()
    with page.tab.expect_download() as waiting:
        page.shown.get_by_text("Download as CSV").click()
    found = pd.read_csv(waiting.value.path(), keep_default_na=False, na_values={"pred_align": [""]})
    assert waiting.value.suggested_filename == "scores.csv"
    scores = scorer.score([files[0], files[1], files[0]], rows["prompt"].tolist())
    expected = pd.concat([rows.assign(prompt=["'=1+1", "two blue squares", ""]), scores], axis=1)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)


def test_a_table_that_cannot_be_scored_is_a_message(page):
    page.open("Table")
    page.upload([as_sent("rows.csv", b"name,prompt\n<b>.png,y\n")], "CSV: name,prompt")
    page.upload([as_sent("a.png")], "Its images")
    page.press("Score the table")
    assert "1 image(s) of the CSV were not uploaded: <b>.png" in page.message()
