"""Memory and time of a run after every epoch, with a planted leak of so many bytes; a program of its own.

    PYTHONPATH=. PYTHONMALLOC=malloc python tests/finetune/memory_by_epoch.py LEAK FLAGS_OF_BASELINE...

Prints a row for each epoch, as JSON: bytes that are in use, bytes that the process has in memory (without those of
files, which come and go as the kernel likes), Python objects, processor time. glibc's own count, which has Python's
objects too if they are malloc's, shows a leak that fills old gaps.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Mapping

import baseline
from finetune import run_files
from guidance.arguments import parse_args

COUNTS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Mallinfo(ctypes.Structure):
    """What glibc's malloc counts."""

    _fields_ = [(name, ctypes.c_size_t) for name in COUNTS]


def main(leak: int, argv: list[str]) -> None:
    """See above."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    rows: list[tuple[float, ...]] = []
    kept: list[bytes] = []

    def look(row: Mapping[str, float]) -> None:
        kept.append(b"x" * leak)
        found = mallinfo()
        with open("/proc/self/status") as file:
            own = next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
        rows.append((found.uordblks + found.hblkhd, own, len(gc.get_objects()), time.process_time()))

    run_files.SAVE_EVERY_SECONDS = 0.0  # all writing counts
    baseline.run(parse_args(argv), after_epoch=look)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
