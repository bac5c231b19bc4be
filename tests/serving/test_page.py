"""The page, served: what it answers, and what it gives to nobody."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from page_server import Server, served
from tiny_run import finished_run, shared

from serving.shared_scorer import SharedScorer

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")  # said inside, not for us to mend


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


def uploaded(server: Server, path: Path) -> dict[str, Any]:
    """Upload a file, as the page does."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' + path.read_bytes()
    status, text = server.get("/gradio_api/upload", body + b"\r\n--x--\r\n", "multipart/form-data; boundary=x")
    assert status == 200
    return {"path": json.loads(text)[0], "meta": {"_type": "gradio.FileData"}, "orig_name": path.name}


def test_uploads_are_ranked_by_the_scores_of_the_scorer(server, scorer, files):
    """What the button under images and a prompt does, without a browser."""
    assert server.get("/")[0] == 200
    [event, *_] = [event for event in server.config()["dependencies"] if len(event["inputs"]) == 3]
    answer = server.press(event, [uploaded(server, path) for path in files], "a red circle", "q")
    scores = scorer.score(files, "a red circle").assign(name=[path.name for path in files])
    ranked = scores.sort_values("pred_quality", ascending=False)
    assert re.findall(r'class=\\"name\\">([^<]*)<', answer.split("process_completed")[1]) == ranked["name"].tolist()
    assert all(f"<b>{value:.2f}</b>" in answer for value in ranked["pred_quality"])


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


def table_event(server: Server) -> dict[str, Any]:
    """What the button under the two inputs of a table does."""
    config = server.config()
    inputs = [part["id"] for part in config["components"] if part["type"] == "file"][-2:]
    [event] = [event for event in config["dependencies"] if set(event["inputs"]) == set(inputs)]
    return event


def test_no_file_but_uploads_is_scored(server, files):
    """A request that names a file of this machine in place of an upload is refused."""
    sheet = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}, "orig_name": "rows.csv"}
    image = {"path": str(files[0]), "meta": {"_type": "gradio.FileData"}, "orig_name": "a.jpg"}
    answer = server.press(table_event(server), sheet, [image])
    assert '"success":false' in answer.replace(" ", "") and "root:" not in answer and "/bin/" not in answer


@pytest.mark.parametrize("route", ["/gradio_api/file=", "/gradio_api/proxy="])
@pytest.mark.parametrize("address", ["http://93.184.216.34/a.png", "https://93.184.216.34/", "http://127.0.0.1:1/"])
def test_the_page_fetches_nothing_for_a_visitor(server, route, address):
    status, text = server.get(route + address)
    assert status in (400, 403, 404) and len(text) < 200 and server.asked == []


@pytest.mark.parametrize("key", ["path", "url"])
def test_an_upload_that_is_an_address_is_not_fetched(server, key):
    """Gradio would fetch it."""
    address = "https://huggingface.co/robots.txt"  # of those that Gradio gets without a check
    file = {"path": "", "meta": {"_type": "gradio.FileData"}, "orig_name": "rows.csv", key: address}
    answer = server.press(table_event(server), file, [file])
    assert '"success":false' in answer.replace(" ", "") and "process_completed" in answer
    assert server.asked == []


def test_who_is_asked_for_anything_is_noted(server):
    """Or the tests above would say nothing."""
    for address in ("93.184.216.34", 80), ("127.0.0.1", 1):
        with pytest.raises(OSError):  # noqa: PT011
            socket.create_connection(address, timeout=1)
        assert server.asked.pop() in (address, address[0])
    assert server.asked == []


def test_uploads_are_bounded(server):
    assert server.config()["max_file_size"] == 100 * 1024**2
