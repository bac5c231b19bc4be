"""The program app.py: its command line, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from tiny_run import finished_run

from serving import commands


@pytest.fixture
def run(tmp_path) -> Path:
    """What passes for a run until its model is loaded."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scorer.json").write_text("{}")
    return tmp_path / "run"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        (["--auth", "me"], "--auth: must be USER:PASSWORD, neither empty"),
        (["--auth", ":s3cret"], "--auth: must be USER:PASSWORD"),
        (["--auth", "me :s3cret"], "no space around USER"),
        (["--auth", "me:s3cret", "--auth_file", "x"], "--auth_file: drop either it or --auth"),
    ],
)
def test_flags_that_cannot_work_are_refused(run, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        commands.parse_app_args(["--checkpoint", str(run), *flags])


def test_a_checkpoint_on_the_hub_is_named_by_two_parts():
    port = ["--port", str(free_port())]
    assert commands.parse_app_args(["--checkpoint", "hf-hub:me/scorer", *port]).checkpoint == "hf-hub:me/scorer"
    with pytest.raises(ValueError, match="--checkpoint hf-hub:scorer: must be hf-hub:ORG/NAME"):
        commands.parse_app_args(["--checkpoint", "hf-hub:scorer", *port])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\n", "must have a line USER:PASSWORD"),
        (b"me:s3cret\ns3cret\n", " line 2: must be USER:PASSWORD"),
        (b"me:s3cret\nme:other\n", " line 2: the user me has a line above already"),
        (b"me:s3cret\xff", "must be text in UTF-8"),
    ],
)
def test_a_file_of_passwords_that_cannot_be_used_is_refused_without_telling_any(run, tmp_path, text, message):
    (tmp_path / "passwords").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        commands.parse_app_args(["--checkpoint", str(run), "--auth_file", str(tmp_path / "passwords")])
    assert "s3cret" not in str(caught.value)


def test_a_file_of_passwords_has_a_user_in_each_line(run, tmp_path):
    (tmp_path / "passwords").write_text("me:s3cret\n\nyou:with: colon\n", encoding="utf-8")
    args = commands.parse_app_args(
        ["--checkpoint", str(run), "--port", str(free_port()), "--auth_file", str(tmp_path / "passwords")]
    )
    assert args.accounts == {"me": "s3cret", "you": "with: colon"}


@pytest.mark.usefixtures("ends_in_time")
def test_passwords_may_come_through_a_pipe_and_begin_with_a_byte_order_mark(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    content = b"\xef\xbb\xbfme:s3cret\n"
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,), daemon=True)
    writer.start()
    argv = ["--checkpoint", str(run), "--port", str(free_port()), "--auth_file", str(tmp_path / "pipe")]
    for _ in range(2):  # as the program does, early and again
        assert commands.parse_app_args(argv).accounts == {"me": "s3cret"}
    writer.join()


def test_a_port_that_is_taken_is_refused(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: cannot listen there"):
            commands.parse_app_args(["--checkpoint", str(run), "--port", str(port)])


def test_pillow_refuses_what_max_pixels_may_not_allow():
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS == commands.PILLOW_MAX_PIXELS


# -- started


class Server:
    """The program in a process of its own, with a proxy for whatever it asks of other machines."""

    def __init__(self, run: Path, temporary: Path, *flags: str) -> None:
        self.asked: list[bytes] = []
        self.proxy = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.listen, daemon=True).start()
        proxy = f"http://127.0.0.1:{self.proxy.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        here = {"NO_PROXY": "", "no_proxy": "", "TMPDIR": str(temporary)}
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

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an address."""
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                self.url + path, timeout=30
            ) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def end(self, sign: signal.Signals) -> tuple[int, str, str]:
        """End it as the signal does: exit code, and what it wrote since it has started."""
        self.process.send_signal(sign)
        out, err = self.process.communicate(timeout=60)
        self.proxy.close()
        return self.process.returncode, out, err


@pytest.mark.slow
def test_the_program_asks_no_other_machine_and_ends_quietly(demo_set, tmp_path):
    found = Server(finished_run(demo_set), tmp_path)
    assert found.said == f"{found.url}/   Ctrl-C ends it\n"
    assert found.get("/")[0] == 200
    assert found.get("/gradio_api/file=http://93.184.216.34/a.png")[0] in (400, 403, 404)
    assert len(list(tmp_path.iterdir())) == 1  # its folder of uploads
    time.sleep(0.5)  # for what is asked in another thread
    assert found.end(signal.SIGINT) == (0, "\n", "")
    assert (found.asked, list(tmp_path.iterdir())) == ([], [])


WARM, MOST_GROWN = 500, 10_000  # requests before memory is measured; kB that all others together may add to it


def memory_kb(process: int) -> int:
    """Memory of a process that is its own and in use."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_stays_flat_over_requests(demo_set, tmp_path, is_torture, figure):
    number = 5000 if is_torture else 1000
    image = min(demo_set[1].glob("*.jpg")).read_bytes()
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    found = Server(finished_run(demo_set), tmp_path)
    request = urllib.request.Request(
        f"{found.url}/score", head + image + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}
    )
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: ask(request, timeout=60).read(), range(WARM)))
        before = memory_kb(found.process.pid)
        assert all(pool.map(lambda _: ask(request, timeout=60).read(), range(number)))
    grown = memory_kb(found.process.pid) - before
    figure("memory of a server", f"{grown / number:.2f} kB more per request over {number}")
    assert found.end(signal.SIGINT)[0] == 0
    assert grown < MOST_GROWN  # an image that stayed would be 33 kB as a file, more when decoded
