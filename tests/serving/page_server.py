"""The page of app.py, served by threads of this process, and files to upload. No tests: these import it."""

from __future__ import annotations

import io
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client
from PIL import Image

from serving.answers import Answers, read_test_fold
from serving.page import build_page, serve
from serving.routes import build_routes, describe
from serving.shared_scorer import SharedScorer

FORM = "multipart/form-data; boundary=x"


def form(image: bytes | None = None, name: str = "a.jpg", **fields: str) -> bytes:
    """A form as a browser or curl sends it."""
    parts = [f'Content-Disposition: form-data; name="{key}"\r\n\r\n{value}'.encode() for key, value in fields.items()]
    if image is not None:
        parts.append(f'Content-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode() + image)
    return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"


class Server:
    """A page that is served. `asked` holds whom this process has asked for anything beside it, which is refused."""

    def __init__(self, url: str, asked: list[object], answers: Answers, accounts: Mapping[str, str]) -> None:
        self.url = url
        self.asked = asked
        self.answers = answers
        self.accounts = accounts
        self.clients: dict[tuple[str, str] | None, Client] = {}

    def get(
        self,
        path: str,
        body: object = None,
        kind: str = "application/json",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[int, str]:
        """Status and text of an address; `body`, JSON or bytes, is posted to it."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": kind, **headers})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def press(self, event: dict[str, Any], *given: object) -> str:
        """What a button's event answers to these inputs."""
        session = f"session{id(given)}"
        body = {"data": list(given), "fn_index": event["id"], "session_hash": session}
        assert self.get("/gradio_api/queue/join", body)[0] == 200
        return self.get(f"/gradio_api/queue/data?session_hash={session}")[1]

    def client(self, auth: tuple[str, str] | None = None) -> Client:
        """Gradio's client of the page."""
        if auth not in self.clients:
            self.clients[auth] = Client(self.url, verbose=False, analytics_enabled=False, auth=auth)
        return self.clients[auth]

    def config(self) -> dict[str, Any]:
        """The page's parts and events."""
        found: dict[str, Any] = json.loads(self.get("/config")[1])
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refuse_others(patch: pytest.MonkeyPatch, port: int) -> list[object]:
    """Let this process connect to nothing but a port of its own machine. Returns whom it has asked, as it does."""
    asked: list[object] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and tuple(address[:2]) != ("127.0.0.1", port):
            asked.append(address)
            raise ConnectionRefusedError(address)
        connect(self, address)

    def resolve_here(host: Any, *args: Any, **options: Any) -> Any:
        if host not in (None, "127.0.0.1", "localhost", b"127.0.0.1", b"localhost"):
            asked.append(host)
            raise socket.gaierror(host)
        return resolve(host, *args, **options)

    patch.setattr(socket.socket, "connect", connect_here)
    patch.setattr(socket, "getaddrinfo", resolve_here)
    return asked


@contextmanager
def served(scorer: SharedScorer, run: Path, folder: Path, **accounts: str) -> Iterator[Server]:
    """The page of a run's model while the block lasts; `folder` takes uploads and downloads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        for name in ("get", "async_validate_url"):  # which serving replaces
            patch.setattr(gr.processing_utils.sh, name, getattr(gr.processing_utils.sh, name))
        # Gradio's client, not the page, would ask huggingface.co for something, and tell it something.
        patch.setattr("gradio_client.client.build_hf_headers", lambda **options: {})
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("no_proxy", "127.0.0.1")  # which serving changes
        port = free_port()
        asked = refuse_others(patch, port)
        answers = Answers(scorer, read_test_fold(run), folder, max_pixels=1_000_000)
        page = build_page(answers)
        routes = build_routes(answers, describe(scorer, run), accounts)
        url = serve(page, "127.0.0.1", port, routes=routes, accounts=accounts)
        server = Server(url.rstrip("/"), asked, answers, accounts)
        yield server
        for client in server.clients.values():
            client.close()
        page.close(verbose=False)


def as_sent(name: str, content: bytes | None = None) -> dict[str, object]:
    """A file for an upload, by default a small image."""
    if content is None:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
        content = buffer.getvalue()
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}
