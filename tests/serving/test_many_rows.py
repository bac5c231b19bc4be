"""Scoring a table of very many rows in memory that does not grow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from tiny_run import finished_run

MEASURED = """
import sys
import predict

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))

flags, tables = sys.argv[1:-2], sys.argv[-2:]
for table in tables:
    predict.main([*flags, "--csv", table, "--out", table + ".scores"])
    print("peak", peak())
"""


def write_rows(path: Path, demo_set: tuple[Path, Path], count: int) -> Path:
    """A table that repeats the demo's images, with a kilobyte in each row that nobody asks for."""
    rows = pd.read_csv(demo_set[0])[["name", "prompt"]].assign(other="x" * 1000)
    whole = rows.to_csv(index=False).splitlines(keepends=True)
    with path.open("w") as file:
        file.write(whole[0])
        for number in range(count):
            file.write(whole[1 + number % len(rows)])
    return path


@pytest.mark.slow
@pytest.mark.torture
def test_memory_does_not_grow_with_the_rows(demo_set, tmp_path, is_torture, figure):
    count = 1_000_000 if is_torture else 60_000
    tables = [write_rows(tmp_path / f"{rows}.csv", demo_set, rows) for rows in (10_000, count)]
    flags = ["--checkpoint", str(finished_run(demo_set)), "--image_dir", str(demo_set[1]), "--num_workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *flags, *map(str, tables)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    short, long = (int(line.split()[1]) / 1024 for line in done.stdout.splitlines() if line.startswith("peak"))
    figure("memory of scoring", f"{count} rows take {long - short:.1f} MB more than 10,000")
    assert len(pd.read_csv(f"{tables[1]}.scores")) == count
    assert long - short < 40  # the table itself has 60 MB, and as strings in memory more
