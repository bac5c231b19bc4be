"""A stand-in for the Hugging Face hub: as much of its HTTP as huggingface_hub asks for. No tests: these import it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml

WRITER, READER = "hf_writer", "hf_reader"  # tokens of "me", who may write, and of "guest", who may read what is public
USERS = {WRITER: "me", READER: "guest"}
LICENSES = ("mit", "apache-2.0", "cc-by-4.0", "other")


class Refused(Exception):
    """An answer that is an error: status, the hub's code for it, and a text."""

    def __init__(self, status: int, code: str = "", text: str = "") -> None:
        self.status, self.code, self.text = status, code, text


@dataclass
class Repo:
    """A repository: the files of each commit, the newest last."""

    private: bool
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the newest commit."""
        return self.commits[self.head]


class Hub:
    """What the stand-in knows, and what it was asked. `failing` maps the end of a path to the status it answers."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # large files by their SHA-256
        self.asked: list[str] = []  # method and path
        self.failing: dict[str, int] = {}
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> Repo:
        """Make a repository with these files."""
        self.repos[name] = Repo(private, gated)
        self.repos[name].commit({".gitattributes": b"", **files})
        return self.repos[name]

    def repo(self, name: str, user: str | None) -> Repo:
        """A repository that this user may see."""
        found = self.repos.get(name)
        if found is None or (found.private and user != name.split("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def own(self, name: str, user: str | None) -> Repo:
        """A repository that this user may write to."""
        if self.repo(name, user) and user != name.split("/")[0]:
            raise Refused(403, text=f"You don't have the rights to write to {name}")
        return self.repo(name, user)

    @property
    def fetched(self) -> set[str]:
        """Names of the files that were fetched."""
        return {line.rpartition("/")[2] for line in self.asked if line.startswith("GET") and "/resolve/" in line}

    @property
    def sent(self) -> list[str]:
        """What would change something here."""
        return [line for line in self.asked if not line.startswith(("GET", "HEAD")) and "validate" not in line]

    def api(self, method: str, parts: list[str], body: bytes, user: str | None) -> object:
        """What an address below /api answers."""
        match method, parts:
            case "GET", ["whoami-v2"]:
                if user is None:
                    raise Refused(401, text="Invalid credentials in Authorization header")
                return {"name": user, "type": "user"}
            case "POST", ["validate-yaml"]:
                return check_yaml(json.loads(body)["content"])
            case "POST", ["repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization'] or user}/{asked['name']}"
                if asked["organization"] not in (None, user):
                    raise Refused(403, text=f"You don't have the rights to create {name}")
                private = asked.get("private", asked.get("visibility") == "private")
                self.add(name, {}, private=private)
                return {"url": f"{self.url}/{name}", "name": name}
            case "PUT", ["models", owner, name, "settings"]:
                asked = json.loads(body)
                self.own(f"{owner}/{name}", user).private = asked.get("private", asked.get("visibility") == "private")
                return {}
            case "GET", ["models", owner, name]:
                repo = self.repo(f"{owner}/{name}", user)
                return {
                    "id": f"{owner}/{name}",
                    "sha": repo.head,
                    "private": repo.private,
                    "tags": [],
                    "siblings": [{"rfilename": file} for file in repo.files],
                }
            case "GET", ["models", owner, name, "tree", _]:
                files = self.repo(f"{owner}/{name}", user).files
                return [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ]
            case "POST", ["models", owner, name, "preupload", _]:
                self.own(f"{owner}/{name}", user)
                return {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            case "POST", ["models", owner, name, "commit", _]:
                sha = self.commit(self.own(f"{owner}/{name}", user), body)
                return {"commitUrl": f"{self.url}/{owner}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        raise Refused(404, text="no such address in this stand-in")

    def commit(self, repo: Repo, body: bytes) -> str:
        """Do what the lines of a commit say."""
        files = dict(repo.files)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        return repo.commit(files)

    def batch(self, body: bytes) -> object:
        """Where large files are to be sent, unless they are here."""
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.stored:
                wanted["actions"] = {"upload": {"href": f"{self.url}/stored/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def file(self, name: str, revision: str, path: str, user: str | None) -> tuple[str, bytes]:
        """A file and its commit."""
        repo = self.repo(name, user)
        if repo.gated and user != name.split("/")[0]:
            raise Refused(403, "GatedRepo", "Access to this model is restricted")
        sha = repo.head if revision == "main" else revision
        if path not in repo.commits[sha]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        return sha, repo.commits[sha][path]


def check_yaml(content: str) -> object:
    """As the hub does, if less of it: metadata at the top, with a licence that it knows."""
    found = yaml.safe_load(content.split("---\n")[1])
    if found.get("license", "mit") not in LICENSES:
        raise Refused(400, text=json.dumps({"errors": [{"message": '"license" must be one of [...]'}]}))
    return {"errors": [], "warnings": []}


class Handler(BaseHTTPRequestHandler):
    """One request to a `Hub`, the server's attribute `hub`."""

    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        body = self.body()
        user = USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        try:
            for end, status in hub.failing.items():
                if path.endswith(end):
                    raise Refused(status, text="out of order")
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                self.answer(200, json.dumps(hub.api(self.command, parts[1:], body, user)).encode())
            elif path.endswith(".git/info/lfs/objects/batch"):
                self.answer(200, json.dumps(hub.batch(body)).encode())
            elif parts[0] == "stored":
                assert hashlib.sha256(body).hexdigest() == parts[1]
                hub.stored[parts[1]] = body
                self.answer(200)
            else:
                assert parts[2] == "resolve"
                sha, content = hub.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), user)
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(200, content, {"ETag": etag, "X-Repo-Commit": sha})
        except Refused as error:
            self.answer(error.status, error.text.encode(), {"X-Error-Code": error.code, "X-Error-Message": error.text})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        """What was sent, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *words: object) -> None:
        pass


@contextmanager
def served() -> Iterator[Hub]:
    """A hub that is served by threads of this process."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.hub = hub  # type: ignore[attr-defined]
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def environment(hub: Hub, home: Path, token: str = WRITER) -> dict[str, str]:
    """The variables with which another process takes a stand-in for the hub."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return {**own, "HF_TOKEN": token} if token else own


def use(hub: Hub, home: Path, patch: pytest.MonkeyPatch, token: str = WRITER) -> None:
    """Let huggingface_hub, which has read its environment already, take a stand-in for the hub."""
    for name, value in environment(hub, home).items():
        patch.setenv(name, value)
    log_in(patch, token)
    constants = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in constants.items():
        patch.setattr(f"huggingface_hub.constants.{name}", value)
    patch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))  # between tries
    huggingface_hub.close_session()  # which may have read other variables


def log_in(patch: pytest.MonkeyPatch, token: str) -> None:
    """Log in with another token, or with none."""
    patch.setenv("HF_TOKEN", token)
