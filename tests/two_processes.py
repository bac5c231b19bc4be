"""Programs in two processes: forked by one that has all libraries loaded, or started by one that starts others.

torchrun's own start takes longer than all the rest of such a test.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


def fork_both(run: Callable[[int], object]) -> int:
    """Call `run` with the ranks of two processes, in each its own; the exit code of the first that failed, or 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(2):
        if pid := os.fork():
            started.append(pid)
            continue
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
        code = 1
        try:
            run(rank)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    return next(filter(None, (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started)), 0)


@contextlib.contextmanager
def session(command: list[str], cwd: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a program that starts others; whatever is left of them when the block is left is killed."""
    started = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
