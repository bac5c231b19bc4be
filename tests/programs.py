"""Programs in processes of their own, and what they import. No tests: these import it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    code: int
    out: str
    err: list[str]  # lines
    imported: set[str]  # top-level packages
    seconds: float  # of a processor: others may be at work


def run_program(name: str, *argv: str, cwd: Path) -> Ended:
    """Run a program of the repository."""
    command = [sys.executable, "-X", "importtime", str(ROOT / name), *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = os.times()
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")
    after = os.times()
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in set(lines) - set(said)}
    return Ended(done.returncode, done.stdout, said, imported, sum(after[2:4]) - sum(before[2:4]))
