"""Folders of small files: their content, their way to the disk, and locks on them. No tests: these import it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from storage.locks import locked
with locked(Path(sys.argv[1]), wait=None):
    print("mine", flush=True)
    time.sleep(600)
"""


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, *names: str) -> Path:
    """A folder with files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def watch_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed below a folder, as it happens; temporary names without their digits."""
    calls, replace = [], os.replace

    def name_of(path: Path) -> str:
        return re.sub(r"\.\d+\.tmp", "~", str(path.relative_to(folder)))

    def sync(descriptor: int) -> None:
        number = os.fstat(descriptor).st_ino
        (found,) = [path for path in (folder, *folder.rglob("*")) if path.stat().st_ino == number]
        calls.append(f"sync {name_of(found)}")

    def rename(source: Path, target: Path) -> None:
        calls.append(f"rename {name_of(source)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    return calls


@contextmanager
def locked_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a folder until it is killed, at the latest when the block is left."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
