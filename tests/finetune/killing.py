"""Kills a training run at random moments and goes on with it, again and again; a program of its own, since it forks.

    PYTHONPATH=. python tests/finetune/killing.py FOLDER KILLS SEED FLAGS_OF_BASELINE...

After every kill each file of the run and of its cache must be whole, and a run that has come to its end must be the
same to the bit as one that nobody has killed. Prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import safe_open
from stopped_runs import differences

import baseline
from storage import tensors
from storage.atomic import is_temporary


def start(argv: list[str], log: Path) -> int:
    """The process id of a run of baseline.py in a fork of this process, which has all libraries loaded already."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                baseline.main(argv)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
    finally:
        os._exit(code)


def ended(pid: int, within: float) -> int | None:
    """The exit code of a process that ends in this time."""
    until = time.monotonic() + within
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def broken_files(folder: Path) -> list[str]:
    """Files that are not whole, but for those whose names say so."""
    readers: dict[str, Any] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".csv": pd.read_csv,
        ".png": lambda path: Image.open(path).load(),
        ".html": lambda path: path.read_text().rstrip().endswith("</html>") or 1 / 0,
        ".safetensors": lambda path: safe_open(path, framework="pt").keys(),
    }
    found = []
    for path in folder.rglob("*"):
        if path.is_dir() or any(map(is_temporary, (path, *path.parents))):
            continue
        try:
            readers[path.suffix](path)
            if path.suffix == ".safetensors" and "features" not in path.parts:
                tensors.read_tensors(path)
        except Exception as error:  # noqa: BLE001  (whatever a reader raises)
            found.append(f"{path}: {error!r}")
    return found


def main(folder: Path, kills: int, seed: int, argv: list[str]) -> dict[str, Any]:
    """See above."""
    argv = [*argv, "--save_every_minutes", "1e-9"]  # after every step
    log = folder / "log"
    began = time.monotonic()
    code = ended(start([*argv, "--cache_dir", str(folder / "cache"), "--output_dir", str(folder / "whole")], log), 600)
    assert code == 0, log.read_text()
    length = time.monotonic() - began
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {"kills": 0, "finished": 0, "differences": [], "broken": [], "seconds": length}
    chain, places = 0, set()
    while found["kills"] < kills or not found["finished"]:
        run, cache = folder / f"run{chain}", folder / f"cache{chain}"
        pid = start([*argv, "--cache_dir", str(cache), "--output_dir", str(run), "--resume", "auto"], log)
        code = ended(pid, rng.uniform(0, length) if found["kills"] < kills else 600)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found["kills"] += 1
            places.add(tuple(sorted(path.name for path in run.iterdir())) if run.exists() else ())
            found["broken"] += broken_files(run) + broken_files(cache)
            continue
        assert code == 0, log.read_text()[-3000:]
        found["differences"] += differences(folder / "whole", run)
        found["broken"] += [f"{path} is left" for path in run.rglob("*") if is_temporary(path)]
        found["finished"] += 1
        chain += 1
    return {**found, "places": len(places)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
