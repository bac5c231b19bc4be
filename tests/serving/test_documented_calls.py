"""The calls that docs/serving.md shows do what it says, as they stand there."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from page_server import Server, served
from tiny_run import finished_run, shared

HERE = "http://127.0.0.1:7860"
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = [
    "\n".join(line[4:] for line in lines)
    for is_code, lines in itertools.groupby(TEXT.splitlines(), key=lambda line: line.startswith("    "))
    if is_code
]
CALLS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("curl")]
[PYTHON] = [block for block in BLOCKS if block.startswith("from gradio_client")]
[ANSWER] = [json.loads(block) for block in BLOCKS if block.startswith("{")]

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")  # said inside, not for us to mend


@pytest.fixture(scope="module", params=[{}, {"me": "s3cret"}], ids=["open", "guarded"])
def server(request, demo_set, tmp_path_factory) -> Iterator[Server]:
    run = finished_run(demo_set)
    with served(shared(run), run, tmp_path_factory.mktemp("uploads"), **request.param) as found:
        yield found


@pytest.fixture
def place(demo_set, tmp_path) -> Path:
    """A folder with the image that the calls name."""
    shutil.copy(min(demo_set[1].glob("*.jpg")), tmp_path / "a.png")
    return tmp_path


def said(command: list[str], place: Path, **more: str) -> str:
    """What a command prints."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        command, cwd=place, check=True, stdout=subprocess.PIPE, text=True, timeout=120, env={**environment, **more}
    ).stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("call", CALLS)
def test_a_call_by_curl_works(call, server, place):
    assert HERE in call
    found = json.loads(said(["sh", "-c", call.replace(HERE, server.url) + " --silent"], place))
    if server.accounts and "-u" not in call and "/health" not in call:
        assert found == {"detail": "wrong user or password"}
    else:
        assert set(found) == set(ANSWER) or "ready" in found or "sha256" in found


@pytest.mark.slow
def test_the_python_works(server, place):
    code = PYTHON.replace(HERE, server.url)
    if server.accounts:
        given = f'"{HERE}", auth=("me", "s3cret")'
        assert given in TEXT
        code = PYTHON.replace(f'"{HERE}"', given.replace(HERE, server.url))
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    found = said([sys.executable, "-c", code], place, **quiet)
    assert set(ANSWER) == set(eval(found.splitlines()[-1]))
