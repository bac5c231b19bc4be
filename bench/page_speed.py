"""How many images app.py scores a second for 1, 8 and 32 programs at once, and how long each waits, as a table.

    python bench/page_speed.py --checkpoint runs/demo/best
    python bench/page_speed.py --checkpoint runs/demo/best --before ../older

A way is "form" (POST /score), "client" (what Gradio's client sends: the upload, the call, the question for the answer)
or "button" (what the page sends; one visitor at a time). Each server is a process of its own; the clients are threads
of this process, on the same cores. Images are pictures of noise, 512 x 512.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from speed import ROOT, select_images

API = "/gradio_api"
Ask = Callable[[http.client.HTTPConnection, bytes], None]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/best")
    parser.add_argument("--before", type=Path, help="a checkout of an older version, whose button is measured too")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--num_images", type=int, default=256, help="of every measurement (default: 256)")
    args = parser.parse_args(argv)
    print("| version | way | clients | images/s | median ms | p95 ms |", "|---|---|---|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory() as place:
        _, folder = select_images(argparse.Namespace(num_images=64, data_csv_path=None), Path(place))
        images = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
        if args.before:
            compare("before", args.before, {"button": button}, images, args)
        compare("now", ROOT, {"button": button, "client": client, "form": form}, images, args)


def compare(version: str, root: Path, ways: Mapping[str, Ask], images: list[bytes], args: argparse.Namespace) -> None:
    """Measure one version and print its rows."""
    with server(root, args.checkpoint.resolve()) as port:
        for name, ask in ways.items():
            for clients in args.clients:
                measure(port, ask, images, 2 * clients, clients)  # warms up
                seconds, waits = measure(port, ask, images, args.num_images, clients)
                median, p95 = 1000 * np.percentile(waits, [50, 95])
                row = f"{len(waits) / seconds:.1f} | {median:.0f} | {p95:.0f} |"
                print(f"| {version} | {name} | {clients} | {row}", flush=True)


def measure(port: int, ask: Ask, images: list[bytes], number: int, clients: int) -> tuple[float, list[float]]:
    """Seconds that `number` images took together, and each for itself."""

    def work(first: int) -> list[float]:
        connection, waits = http.client.HTTPConnection("127.0.0.1", port), []
        for place in range(first, number, clients):
            start = time.perf_counter()
            ask(connection, images[place % len(images)])
            waits.append(time.perf_counter() - start)
        connection.close()
        return waits

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        waits = [wait for found in pool.map(work, range(clients)) for wait in found]
    return time.perf_counter() - start, waits


@contextmanager
def server(root: Path, checkpoint: Path) -> Iterator[int]:
    """app.py of a checkout, on a port of its own, while the block lasts."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--checkpoint", str(checkpoint), "--port", str(port)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        if not process.stdout or "http" not in process.stdout.readline():
            raise SystemExit(f"{root}/app.py did not start")
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def call(connection: http.client.HTTPConnection, method: str, path: str, body: object = None, **more: str) -> bytes:
    """What the server answers; a body is sent as JSON unless it is bytes."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, content, {"Content-Type": "application/json", **more})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status} {text!r}")
    return text


def send(connection: http.client.HTTPConnection, path: str, field: str, image: bytes) -> bytes:
    """Post an image as a form."""
    head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="a.jpg"\r\n\r\n'
    prompt = '\r\n--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red circle\r\n--x--\r\n'
    body = head.encode() + image + prompt.encode()
    return call(connection, "POST", path, body, **{"Content-Type": "multipart/form-data; boundary=x"})


def form(connection: http.client.HTTPConnection, image: bytes) -> None:
    """POST /score."""
    assert json.loads(send(connection, "/score", "image", image))["pred_quality"]


def uploaded(connection: http.client.HTTPConnection, image: bytes) -> dict[str, Any]:
    """An image as an argument, after Gradio has got it."""
    [path] = json.loads(send(connection, f"{API}/upload", "files", image))
    return {"path": path, "orig_name": "a.jpg", "meta": {"_type": "gradio.FileData"}}


def client(connection: http.client.HTTPConnection, image: bytes) -> None:
    """What Gradio's client does."""
    [event] = [event for event in events(connection.port) if event["api_visibility"] == "public"]
    press(connection, event, [uploaded(connection, image), "a red circle"])


def button(connection: http.client.HTTPConnection, image: bytes) -> None:
    """What the page does when Score is pressed."""
    event = next(event for event in events(connection.port) if len(event["inputs"]) == 3)
    press(connection, event, [[uploaded(connection, image)], "a red circle", "q"])


def press(connection: http.client.HTTPConnection, event: dict[str, Any], data: list[Any]) -> None:
    """Let an event happen, and wait for what comes of it. A connection is a session."""
    session = f"session{id(connection)}"
    body = {"data": data, "fn_index": event["id"], "session_hash": session}
    call(connection, "POST", f"{API}/queue/join", body)
    assert b'"success":true' in call(connection, "GET", f"{API}/queue/data?session_hash={session}")


@cache
def events(port: int) -> list[dict[str, Any]]:
    """The events of the page."""
    found: dict[str, Any] = json.loads(call(http.client.HTTPConnection("127.0.0.1", port), "GET", "/config"))
    return found["dependencies"]


if __name__ == "__main__":
    main()
