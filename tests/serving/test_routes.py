"""What the page's server answers to programs: scores, health, version; and to whom."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gradio_client import handle_file
from page_server import FORM, Server, form, served
from PIL import Image
from test_page import uploaded
from tiny_run import finished_run, loaded, shared

from serving import answers as answers_module
from serving.scorer import Scorer
from serving.shared_scorer import MOST_AT_ONCE, Request, SharedScorer

TOLERANCE = 1e-5  # MOS units; a batch of another size adds up in another order

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")  # said inside, not for us to mend


@pytest.fixture(scope="module")
def run(demo_set) -> Path:
    """The folder of a finished run. Read it, do not change it."""
    return finished_run(demo_set)


@pytest.fixture(scope="module")
def alone(run) -> Scorer:
    return loaded(run)


@pytest.fixture(scope="module")
def scorer(run) -> SharedScorer:
    return shared(run)


@pytest.fixture(scope="module")
def files(demo_set) -> list[Path]:
    return sorted(demo_set[1].glob("*.jpg"))


@pytest.fixture(scope="module")
def server(run, scorer, tmp_path_factory) -> Iterator[Server]:
    with served(scorer, run, tmp_path_factory.mktemp("uploads")) as found:
        yield found
    assert found.asked == []


@pytest.fixture
def hold(scorer, monkeypatch) -> Iterator[threading.Event]:
    """Nothing is scored until it is set."""
    released, answer_batch = threading.Event(), scorer.answer_batch

    def wait(batch: list[Request]) -> None:
        released.wait(60)
        answer_batch(batch)

    monkeypatch.setattr(scorer, "answer_batch", wait)
    yield released
    released.set()


def until(happens: Callable[[], object]) -> None:
    """Wait for it. Fails after a minute."""
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sixteen_at_once_get_each_their_own_scores(server, alone, files, hold):
    """Half of them by a form, half by Gradio's client."""
    prompts = [f"{number} red circles" for number in range(16)]
    wanted = alone.score(files[:16], prompts)
    assert np.diff(np.sort(wanted["pred_align"])).min() > 2 * TOLERANCE  # or another's would pass
    client = server.client()

    def ask(number: int) -> dict[str, float]:
        if number % 2:
            return client.predict(handle_file(files[number]), prompts[number], api_name="/score")
        status, text = server.get("/score", form(files[number].read_bytes(), prompt=prompts[number]), FORM)
        assert status == 200
        return json.loads(text)

    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, number) for number in range(16)]
        until(lambda: server.answers.num_waiting == 16)
        hold.set()
        found = [answer.result() for answer in asked]
    for column in ("pred_quality", "pred_align"):
        np.testing.assert_allclose([row[column] for row in found], wanted[column], rtol=0, atol=TOLERANCE)
    assert server.answers.num_waiting == 0


def test_without_a_prompt_quality_alone_and_a_cut_prompt_is_said(server, files):
    content = files[0].read_bytes()
    bare, cut = (
        json.loads(server.get("/score", form(content, **more), FORM)[1]) for more in ({}, {"prompt": "a " * 200})
    )
    assert bare["pred_align"] is None and bare["prompt_cut"] is False
    assert cut["pred_align"] is not None and cut["prompt_cut"] is True
    assert cut["pred_quality"] == pytest.approx(bare["pred_quality"], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (form(b"no image", "<b>.png"), FORM, 400, "<b>.png (not an image)"),
        (form(b"x", prompt="y" * 2001), FORM, 400, "the prompt has more than 2000 characters"),
        (form(prompt="y"), FORM, 400, "send a form: image, a file, and prompt, a text"),
        (form(image=None, image2="y"), FORM, 400, "send a form"),
        (form(b"x", a="1", b="2"), FORM, 400, "Too many fields"),
        (b"{}", "application/json", 400, "send a form"),
        (b"{}", "multipart/form-data", 400, "Missing boundary"),
    ],
)
def test_what_cannot_be_scored_is_told_in_a_line(server, body, kind, status, said):
    found, text = server.get("/score", body, kind)
    assert found == status and said in json.loads(text)["detail"]


def test_an_image_that_is_too_large_is_refused_before_it_is_sent(server):
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 104857601\r\n\r\n")
        assert b" 413 " in connection.recv(100)


def test_gradios_clients_hear_what_is_wrong(server, tmp_path):
    (tmp_path / "it's no image.png").write_bytes(b"x")
    client = server.client()
    with pytest.raises(Exception, match=r"it's no image.png \(not an image\)"):
        client.predict(handle_file(tmp_path / "it's no image.png"), "", api_name="/score")


def test_whoever_comes_when_as_many_wait_as_may_is_told_so(server, files, hold, monkeypatch):
    monkeypatch.setattr(answers_module, "MAX_WAITING", 3)
    with ThreadPoolExecutor(3) as pool:
        body = form(files[0].read_bytes())
        asked = [pool.submit(server.get, "/score", body, FORM) for _ in range(3)]
        until(lambda: server.answers.num_waiting == 3)
        status, text = server.get("/score", body, FORM)
        assert status == 503 and json.loads(text)["detail"].startswith("busy: 3 requests are waiting already")
        assert server.get("/health")[0] == 503 and json.loads(server.get("/health")[1])["ready"] is False
        client = server.client()
        with pytest.raises(Exception, match="busy: 3 requests are waiting already"):
            client.predict(handle_file(files[0]), "", api_name="/score")
        hold.set()
        assert [answer.result()[0] for answer in asked] == [200] * 3
    assert server.get("/health")[0] == 200


def test_large_images_may_not_wait_for_more_memory_than_there_may_be(server, files, hold, monkeypatch):
    body = form(files[0].read_bytes())
    with Image.open(files[0]) as image:
        monkeypatch.setattr(answers_module, "MAX_WAITING_PIXELS", 2 * image.width * image.height)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.get, "/score", body, FORM) for _ in range(2)]
        until(lambda: server.answers.pixels_waiting == answers_module.MAX_WAITING_PIXELS)
        status, text = server.get("/score", body, FORM)
        assert status == 503 and json.loads(text)["detail"].startswith("busy: many large images are waiting")
        hold.set()
        assert [answer.result()[0] for answer in asked] == [200] * 2
    assert server.answers.pixels_waiting == 0 and server.get("/score", body, FORM)[0] == 200


@pytest.mark.slow
def test_gradios_queue_is_bounded_too(server, files, hold):
    image = uploaded(server, files[0])
    for asked in range(1, MOST_AT_ONCE + answers_module.MAX_WAITING + 1):
        status, last = server.get("/gradio_api/call/score", {"data": [image, ""]})
        assert status == 200
        until(lambda asked=asked: server.answers.num_waiting == min(asked, MOST_AT_ONCE))
    status, text = server.get("/gradio_api/call/score", {"data": [image, ""]})
    assert status == 503 and "Queue is full" in text
    hold.set()
    assert "event: complete" in server.get(f"/gradio_api/call/score/{json.loads(last)['event_id']}")[1]
    until(lambda: server.answers.num_waiting == 0)


def test_clients_that_go_away_hold_up_nobody(server, files, hold, caplog):
    place = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    body = form(files[0].read_bytes())
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(place) as whole, socket.create_connection(place) as half:
        whole.sendall(head + body)
        half.sendall(head + body[:100])  # and nothing more comes
        until(lambda: server.answers.num_waiting == 1)
        whole.close()
        hold.set()
        assert server.get("/score", body, FORM)[0] == 200
        until(lambda: server.answers.num_waiting == 0)
    assert server.get("/health")[0] == 200 and caplog.records == []  # nor a traceback of the half one


def test_a_job_ends_when_its_page_is_closed(server, files, hold, monkeypatch):
    """Between two pieces; others have been let in between all along."""
    image, session = uploaded(server, files[0]), "closing"
    host, port = "127.0.0.1", int(server.url.rpartition(":")[2])
    batches: list[int] = []
    waiting = server.answers.scorer.answer_batch
    monkeypatch.setattr(
        server.answers.scorer, "answer_batch", lambda batch: (batches.append(len(batch[0].images)), waiting(batch))
    )
    [event, *_] = [event for event in server.config()["dependencies"] if len(event["inputs"]) == 3]
    body = {"data": [[image] * 4 * MOST_AT_ONCE, "", "q"], "fn_index": event["id"], "session_hash": session}
    with socket.create_connection((host, port)) as page:
        page.sendall(f"GET /gradio_api/heartbeat/{session} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b"200" in page.recv(100)
        assert server.get("/gradio_api/queue/join", body)[0] == 200
        until(lambda: batches)
        left = server.answers.left[session]
    until(left.is_set)
    hold.set()
    until(lambda: not server.answers.left)
    assert batches == [MOST_AT_ONCE]


def test_the_version_is_what_runs(server, run, alone):
    status, text = server.get("/version")
    found = json.loads(text)
    weights = (run / "best" / "model.safetensors").read_bytes()
    assert status == 200 and found["checkpoint"] == str(run) and found["device"] == alone.runtime.describe()
    assert found["sha256"] == hashlib.sha256(weights).hexdigest() and "torch" in found["versions"]
    assert found["scales"]["pred_quality"] == [alone.scales["q"].low, alone.scales["q"].high]
