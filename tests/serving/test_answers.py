"""What the page answers, without the page: scores on their scale, tables, and messages for what cannot be used."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import pandas as pd
import pytest
from page_server import as_sent
from PIL import Image
from tiny_run import finished_run, shared

from serving.answers import MAX_SHEET, Answers, Upload, read_test_fold, score_html, small_image
from serving.answers import TestFold as KnownFold
from serving.shared_scorer import SharedScorer
from sources.examples import LabelScale


@pytest.fixture(scope="module")
def run(demo_set) -> Path:
    """The folder of a finished run. Read it, do not change it."""
    return finished_run(demo_set)


@pytest.fixture(scope="module")
def scorer(run) -> SharedScorer:
    return shared(run)


@pytest.fixture
def answers(scorer, tmp_path) -> Answers:
    return Answers(scorer, KnownFold(), tmp_path, max_pixels=1_000_000)


@pytest.fixture
def upload(tmp_path) -> Callable[..., Upload]:
    """A function that makes an upload."""

    def make(name: str, content: bytes | None = None) -> Upload:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}-{re.sub('[^a-z.]', '', name)}"
        path.write_bytes(as_sent(name, content)["buffer"])
        return Upload(name, path)

    return make


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header promises more."""
    content = bytearray(png(1, 1))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (png(1200, 1000), "1200 x 1000 are more than 1 million pixels"),
        (claiming(1200, 1000), "1200 x 1000 are more than 1 million pixels"),
        (claiming(60000, 60000), "decompression bomb"),
        (png(900, 900)[:60], "truncated"),
        (b"", "not an image"),
    ],
)
def test_what_cannot_be_decoded_is_told_in_one_line(upload, content, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        small_image(upload("x.png", content), 1_000_000, 100)
    assert str(caught.value).startswith("x.png (") and "\n" not in str(caught.value)
    assert small_image(upload("y.png", png(1000, 1000)), 1_000_000, 100).size == (100, 100)


@pytest.mark.parametrize(
    ("csv", "uploaded", "message"),
    [
        ("file,prompt\na.png,x\n", ["a.png"], "rows.csv: no column 'name' among 'file', 'prompt'"),
        ("name,prompt\nb.png,x\n<b>.png,y\n", ["a.png"], "2 image(s) of the CSV were not uploaded: b.png, &lt;b&gt;"),
        ("name,prompt\na.png,x\n", ["a.png", "a.png"], "1 image name(s) were uploaded more than once: a.png"),
        ("name,prompt\nx/a.png,x\ny/a.png,y\n", ["a.png"], "x/a.png and y/a.png: uploads have no folders"),
        ("name,prompt\n,x\n", ["a.png"], "rows.csv row 2: the image name is empty"),
        (f"name,prompt\na.png,{'x' * 2001}\n", ["a.png"], "rows.csv row 2: the prompt has more than 2000 characters"),
        ("name,prompt\n", ["a.png"], "rows.csv: has a header but no rows"),
        ("name,name\na,b\n", ["a.png"], "the header has"),
        ("name,prompt\n" + "a.png,x\n" * 501, ["a.png"], "501 rows, at most 500"),
        ("name\na.png\n", [], "a CSV and its images are both needed"),
        ("name" + "," * 1000 + "\na.png\n", ["a.png"], "has more than 1000 columns"),
        ("name\n" + "a" * MAX_SHEET, ["a.png"], f"bytes, at most {MAX_SHEET}"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(answers, upload, csv, uploaded, message):
    sheet = upload("rows.csv", csv.encode())
    with pytest.raises(gr.Error) as caught:
        answers.table([sheet], [upload(name, png(9, 9 + number)) for number, name in enumerate(uploaded)])
    told = html.unescape(caught.value.message)
    assert html.unescape(message) in told and str(sheet.path) not in told and "\n" not in told
    assert "<" not in caught.value.message


def test_a_csv_without_prompts_gets_quality_alone(answers, upload):
    shown, download = answers.table([upload("rows.csv", b"name\na.png\n")], [upload("a.png")])
    assert "rows.csv has no column &#x27;prompt&#x27;" in shown and "none without a prompt" in shown
    table = pd.read_csv(download.value["path"] if isinstance(download.value, dict) else download.value)
    assert table["pred_align"].isna().all() and table["pred_quality"].notna().all()


def test_a_table_of_a_spreadsheet_is_read_and_that_is_said_without_its_place(answers, upload):
    sheet = upload("rows.csv", "name;prompt\na.png;a cat, asleep\n".encode("utf-16"))
    shown, download = answers.table([sheet], [upload("a.png")])
    assert "rows.csv: read with UTF-16, semicolons between columns" in shown and str(sheet.path) not in shown
    table = pd.read_csv(download.value["path"] if isinstance(download.value, dict) else download.value)
    assert table["prompt"].tolist() == ["a cat, asleep"]


def test_a_table_comes_back_as_it_was_sent_and_is_safe_in_a_spreadsheet(answers, upload):
    sheet = upload("rows.csv", b"name,prompt\n=a.png,+1\n@b.png,it's -1\n")
    uploads = [upload("=a.png"), upload("@b.png", png(9, 9))]
    for _ in range(2):  # the second time it is the page's own download
        _, download = answers.table([sheet], uploads)
        path = Path(download.value["path"] if isinstance(download.value, dict) else download.value)
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line.split(",")[:2] for line in lines[1:]] == [["'=a.png", "'+1"], ["'@b.png", "it's -1"]]
        sheet = Upload("scores.csv", path)


def test_names_and_prompts_are_escaped(answers, upload):
    name, prompt = "<img src=x onerror=window.hit=1>.png", "<svg onload=window.hit=1>"
    rows = pd.DataFrame({"name": [name], "prompt": [prompt]}).to_csv(index=False)
    (_, notes), ranked = answers.score([upload(name), upload("<b>.png", b"no image")], prompt, "q")
    shown, _ = answers.table([upload("rows.csv", rows.encode())], [upload(name)])
    for text in (notes, ranked, shown):
        assert not re.search("<(img src=x|svg|b>[.])", text)
    assert "&lt;b&gt;.png" in notes and "&lt;img" in ranked and "&lt;img" in shown and "&lt;svg" in shown


def test_too_many_images_are_refused(answers, upload):
    with pytest.raises(gr.Error, match="501 images at once, at most 500"):
        answers.score([upload("a.png")] * 501, "", "q")


def test_prompts_that_are_cut_are_told(answers, upload):
    (_, notes), shown = answers.score([upload("a.png")], "word " * 200, "q")
    assert "1 prompt(s) are longer than the model reads" in notes and notes in shown


def test_a_score_stands_at_its_place_on_the_scale():
    shown = score_html(3.92, LabelScale(1, 5), 0.5)
    assert "<b>3.92</b> <span>of 1 to 5: 73 % of the way up</span>" in shown
    assert 'class="tick" style="left:73.0%"' in shown and 'class="band" style="left:60.5%;width:25.0%"' in shown
    assert "band" not in score_html(3.92, LabelScale(1, 5), None)
    assert 'style="left:0.0%;width:25.0%"' in score_html(1.0, LabelScale(1, 5), 1.0)  # not left of the scale


def test_what_a_run_says_of_its_test_fold(run, tmp_path):
    results = json.loads((run / "results.json").read_text())
    for path in (run, run / "best"):
        found = read_test_fold(path)
        assert found.num_images == results["images"]["test"]
        assert found.of("q") == (results["test"]["srocc_q"], results["test"]["rmse_q"]) and found.of("other") is None
    shutil.copytree(run / "best", tmp_path / "best")
    assert read_test_fold(tmp_path / "best") == KnownFold()
    (tmp_path / "results.json").write_text(json.dumps({**results, "test": {}}))  # of a run with --no_test
    assert read_test_fold(tmp_path / "best").of("q") is None
    for damage in (
        "{",
        json.dumps({**results, "test": {"rmse_q": [1]}}),
        json.dumps({**results, "test": {"plcc_c": "x"}}),
    ):
        (tmp_path / "results.json").write_text(damage)
        with pytest.raises(ValueError, match=r"results.json: cannot be read"):
            read_test_fold(tmp_path / "best")
