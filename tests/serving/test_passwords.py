"""A page with a password: who does not have it is told nothing, but whether the server is ready."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import handle_file
from page_server import FORM, Server, form, served
from tiny_run import finished_run, loaded, shared

TOLERANCE = 1e-5  # MOS units; a batch of another size adds up in another order

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")  # said inside, not for us to mend


@pytest.fixture(scope="module")
def guarded(demo_set, tmp_path_factory) -> Iterator[Server]:
    run = finished_run(demo_set)
    with served(shared(run), run, tmp_path_factory.mktemp("uploads"), me="s3cret:ü") as found:
        yield found
    assert found.asked == []


@pytest.fixture(scope="module")
def image(demo_set) -> Path:
    return min(demo_set[1].glob("*.jpg"))


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


def test_without_the_password_nothing_is_told(guarded, image):
    body = form(image.read_bytes())
    for more in ({}, basic("s3cret"), basic(""), {"Authorization": "Basic x"}, {"Authorization": "Bearer s3cret:ü"}):
        assert guarded.get("/score", body, FORM, more)[0] == 401
        assert guarded.get("/version", headers=more)[0] == 401
    for path in ("/config", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/queue/data?session_hash=x"):
        assert guarded.get(path)[0] == 401
    assert guarded.get("/gradio_api/call/score", {"data": [None, ""]})[0] == 401
    assert guarded.get("/gradio_api/upload", body, FORM)[0] == 401
    status, text = guarded.get("/health")
    assert status == 200 and set(json.loads(text)) == {"ready", "waiting", "max_waiting"}
    page = guarded.get("/")
    assert page[0] == 200 and "auth_required" in page[1] and "What people would say" not in page[1]


def test_with_the_password_all_is(guarded, demo_set, image):
    body, wanted = form(image.read_bytes()), loaded(finished_run(demo_set)).score([image])["pred_quality"][0]
    status, text = guarded.get("/score", body, FORM, basic("s3cret:ü"))
    assert status == 200 and json.loads(text)["pred_quality"] == pytest.approx(wanted, abs=TOLERANCE)
    assert guarded.get("/version", headers=basic("s3cret:ü"))[0] == 200
    client = guarded.client(auth=("me", "s3cret:ü"))
    found = client.predict(handle_file(image), "", api_name="/score")
    assert found["pred_quality"] == pytest.approx(wanted, abs=TOLERANCE)
    for password in ("s3cret", ""):
        with pytest.raises(Exception, match=r"[Cc]ould not login|credentials"):
            guarded.client(auth=("me", password))
