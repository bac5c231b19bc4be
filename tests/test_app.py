"""The page of app.py: driven in a browser as a person would, and its parts by themselves."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

import app
import baseline
import commands
import explain
from data import LabelScale
from predict import Scorer

TINY = ["--clip_model", "tiny", "--clip_pretrained", "none", "--image_size", "56", "--freeze_clip", "--epochs", "1"]
PROMPT = "a red circle & two <b>blue</b> squares"
HOSTILE = "<img src=x onerror=window.hit=1>.png"
WAIT = 60_000  # milliseconds, for a machine that is busy


# -- a model, a server, a browser


@pytest.fixture(scope="module")
def run(demo_set, tmp_path_factory) -> Path:
    """The folder of a finished run. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("app") / "run"
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    baseline.main([*paths, *TINY, "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def scorer(run) -> Scorer:
    return Scorer.load(run)


@pytest.fixture(scope="module")
def files(demo_set) -> list[Path]:
    """Three images of the demo set."""
    return sorted(demo_set[1].glob("*.jpg"))[:3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """The program in a process of its own, with a proxy for whatever it asks of other machines."""

    def __init__(self, run: Path, temporary: Path, *flags: str) -> None:
        self.asked: list[bytes] = []
        self.proxy = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.listen, daemon=True).start()
        proxy = f"http://127.0.0.1:{self.proxy.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        here = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "TMPDIR": str(temporary)}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "app.py", "--checkpoint", run / "best", "--port", str(self.port), *flags],
            env={**os.environ, **dict.fromkeys(names, proxy), **here},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    def listen(self) -> None:
        while True:
            try:
                connection, _ = self.proxy.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(1000))

    def get(self, path: str, body: object = None) -> tuple[int, str]:
        """Status and text of an address."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def end(self, sign: signal.Signals) -> tuple[int, str, str]:
        """End it as the signal does: exit code, and what it wrote since it has started."""
        self.process.send_signal(sign)
        out, err = self.process.communicate(timeout=60)
        self.proxy.close()
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def server(run, tmp_path_factory) -> Iterator[Server]:
    found = Server(run, tmp_path_factory.mktemp("tmp"), "--max_pixels", "1000000")
    yield found
    found.end(signal.SIGINT)


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


def as_sent(name: str, content: bytes | None = None) -> dict[str, object]:
    """A file for an upload, by default a small image."""
    if content is None:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
        content = buffer.getvalue()
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


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


# -- what nobody may see


@pytest.mark.parametrize("place", ["/etc/passwd", "{run}/best/scorer.json", "{run}/results.json", "{root}/app.py"])
@pytest.mark.parametrize(
    "route",
    [
        "/gradio_api/file=",
        "/file=",
        "/gradio_api/file=../../../../../../../..",
        "/gradio_api/file=..%2f..%2f..%2f..%2f..%2f..%2f..%2f..",
        "/gradio_api/file=//",
        "/gradio_api/file=file://",
    ],
)
def test_no_file_but_uploads_is_served(server, run, place, route):
    path = place.format(run=run, root=ROOT)
    status, text = server.get(route + path)
    assert status in (403, 404) and len(text) < 200


def test_no_file_but_uploads_is_scored(server, files):
    """A request that names a file of this machine in place of an upload is refused."""
    config = json.loads(server.get("/config")[1])
    inputs = [part["id"] for part in config["components"] if part["type"] == "file"]
    [event] = [event for event in config["dependencies"] if set(event["inputs"]) == set(inputs[1:])]
    sheet = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}, "orig_name": "rows.csv"}
    image = {"path": str(files[0]), "meta": {"_type": "gradio.FileData"}, "orig_name": "a.jpg"}
    body = {"data": [sheet, [image]], "fn_index": event["id"], "session_hash": "abc"}
    status, _ = server.get("/gradio_api/queue/join", body)
    assert status == 200
    _, answer = server.get("/gradio_api/queue/data?session_hash=abc")
    assert '"success":false' in answer.replace(" ", "") and "root:" not in answer and "/bin/" not in answer


@pytest.mark.parametrize("route", ["/gradio_api/file=", "/gradio_api/proxy="])
@pytest.mark.parametrize("address", ["http://93.184.216.34/a.png", "https://93.184.216.34/", "http://127.0.0.1:1/"])
def test_the_page_fetches_nothing_for_a_visitor(server, route, address):
    before = len(server.asked)
    status, text = server.get(route + address)
    assert status in (400, 403, 404) and len(text) < 200 and len(server.asked) == before


@pytest.mark.parametrize("key", ["path", "url"])
def test_an_upload_that_is_an_address_is_not_fetched(server, key):
    """Gradio would fetch it; a server of this machine stands for any public one."""
    config = json.loads(server.get("/config")[1])
    inputs = [part["id"] for part in config["components"] if part["type"] == "file"]
    [event] = [event for event in config["dependencies"] if set(event["inputs"]) == set(inputs[1:])]
    address = "https://huggingface.co/robots.txt"  # of those that Gradio gets without a check
    file = {"path": "", "meta": {"_type": "gradio.FileData"}, "orig_name": "rows.csv", key: address}
    before = len(server.asked)
    body = {"data": [file, [file]], "fn_index": event["id"], "session_hash": f"url-{key}"}
    assert server.get("/gradio_api/queue/join", body)[0] == 200
    _, answer = server.get(f"/gradio_api/queue/data?session_hash=url-{key}")
    assert '"success":false' in answer.replace(" ", "") and "process_completed" in answer
    assert len(server.asked) == before


def test_uploads_are_bounded(server):
    assert json.loads(server.get("/config")[1])["max_file_size"] == 100 * 1024**2


def test_the_program_ends_quietly_and_asked_no_other_machine(run, tmp_path):
    found = Server(run, tmp_path)
    assert found.said == f"{found.url}/   Ctrl-C ends it\n"
    assert found.get("/")[0] == 200
    assert len(list(tmp_path.iterdir())) == 1  # its folder of uploads
    time.sleep(0.5)  # for what is asked in another thread
    assert found.end(signal.SIGINT) == (0, "\n", "")
    assert (found.asked, list(tmp_path.iterdir())) == ([], [])


# -- the command line


def program(*argv: str, without: tuple[str, ...] = ("torch", "gradio", "pandas")) -> subprocess.CompletedProcess[str]:
    """Run app.py where these packages cannot be imported."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({without!r})); sys.argv = ['app.py', *{list(argv)!r}]; "
    )
    command = [sys.executable, "-c", code + "runpy.run_path('app.py', run_name='__main__')"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_that_takes_seconds():
    done = program("--help")
    assert (done.returncode, done.stderr) == (0, "") and "--max_pixels" in done.stdout


def test_mistakes_are_one_line_before_anything_is_imported():
    done = program("--checkpoint", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --checkpoint nowhere: not a checkpoint, scorer.json is missing; name RUN/best or RUN\n"
    )


def test_without_gradio_it_is_asked_for(run):
    done = program("--checkpoint", str(run), "--port", str(free_port()))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: app.py needs Gradio: pip install -r requirements-extra.txt\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "0"], "--port 0: must lie in 1..65535"),
        (["--port", "70000"], "--port 70000: must lie in 1..65535"),
        (["--max_pixels", "0"], "--max_pixels 0: must lie in 1..178956970"),
        (["--max_pixels", "178956971"], "--max_pixels 178956971: must lie in"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 7860: cannot listen there"),
        (["--prot", "1"], "did you mean --port?"),
    ],
)
def test_flags_that_cannot_work_are_refused(run, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        commands.parse_app_args(["--checkpoint", str(run), *flags])


def test_a_port_that_is_taken_is_refused(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: cannot listen there"):
            commands.parse_app_args(["--checkpoint", str(run), "--port", str(port)])


def test_pillow_refuses_what_max_pixels_may_not_allow():
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS == commands.PILLOW_MAX_PIXELS


# -- parts


@pytest.fixture
def answers(scorer, tmp_path) -> app.Answers:
    return app.Answers(scorer, app.TestFold(), tmp_path, max_pixels=1_000_000)


@pytest.fixture
def upload(tmp_path) -> Callable[..., app.Upload]:
    """A function that makes an upload."""

    def make(name: str, content: bytes | None = None) -> app.Upload:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}-{re.sub('[^a-z.]', '', name)}"
        path.write_bytes(as_sent(name, content)["buffer"])
        return app.Upload(name, path)

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
        app.small_image(upload("x.png", content), 1_000_000, 100)
    assert str(caught.value).startswith("x.png (") and "\n" not in str(caught.value)
    assert app.small_image(upload("y.png", png(1000, 1000)), 1_000_000, 100).size == (100, 100)


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
        ("name\n" + "a" * app.MAX_SHEET, ["a.png"], f"bytes, at most {app.MAX_SHEET}"),
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


def test_a_table_comes_back_as_it_was_sent_and_is_safe_in_a_spreadsheet(answers, upload):
    sheet = upload("rows.csv", b"name,prompt\n=a.png,+1\n@b.png,it's -1\n")
    uploads = [upload("=a.png"), upload("@b.png", png(9, 9))]
    for _ in range(2):  # the second time it is the page's own download
        _, download = answers.table([sheet], uploads)
        path = Path(download.value["path"] if isinstance(download.value, dict) else download.value)
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line.split(",")[:2] for line in lines[1:]] == [["'=a.png", "'+1"], ["'@b.png", "it's -1"]]
        sheet = app.Upload("scores.csv", path)


def test_too_many_images_are_refused(answers, upload):
    with pytest.raises(gr.Error, match="501 images at once, at most 500"):
        answers.score([upload("a.png")] * 501, "", "q")


def test_prompts_that_are_cut_are_told(answers, upload):
    (_, notes), shown = answers.score([upload("a.png")], "word " * 200, "q")
    assert "1 prompt(s) are longer than the model reads" in notes and notes in shown


def test_a_score_stands_at_its_place_on_the_scale():
    shown = app.score_html(3.92, LabelScale(1, 5), 0.5)
    assert "<b>3.92</b> <span>of 1 to 5: 73 % of the way up</span>" in shown
    assert 'class="tick" style="left:73.0%"' in shown and 'class="band" style="left:60.5%;width:25.0%"' in shown
    assert "band" not in app.score_html(3.92, LabelScale(1, 5), None)
    assert 'style="left:0.0%;width:25.0%"' in app.score_html(1.0, LabelScale(1, 5), 1.0)  # not left of the scale


def test_what_a_run_says_of_its_test_fold(run, tmp_path):
    results = json.loads((run / "results.json").read_text())
    for path in (run, run / "best"):
        found = app.read_test_fold(path)
        assert found.num_images == results["images"]["test"]
        assert found.of("q") == (results["test"]["srocc_q"], results["test"]["rmse_q"]) and found.of("other") is None
    shutil.copytree(run / "best", tmp_path / "best")
    assert app.read_test_fold(tmp_path / "best") == app.TestFold()
    (tmp_path / "results.json").write_text(json.dumps({**results, "test": {}}))  # of a run with --no_test
    assert app.read_test_fold(tmp_path / "best").of("q") is None
    for damage in (
        "{",
        json.dumps({**results, "test": {"rmse_q": [1]}}),
        json.dumps({**results, "test": {"plcc_c": "x"}}),
    ):
        (tmp_path / "results.json").write_text(damage)
        with pytest.raises(ValueError, match=r"results.json: cannot be read"):
            app.read_test_fold(tmp_path / "best")
