"""The shell scripts, whole, on a small set and the tiny model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT


@pytest.fixture
def small_agiqa(demo_set, tmp_path) -> Path:
    """The demo set in the form of AGIQA-3K."""
    root = tmp_path / "agiqa"
    shutil.copytree(demo_set[1], root / "images")
    table = pd.read_csv(demo_set[0])[["name", "prompt", "mos_quality", "mos_align"]]
    table.assign(adj1="", adj2="", style="", std_quality=0.5, std_align=0.5).to_csv(root / "data.csv", index=False)
    return root


def test_the_reproduction_runs_every_model_and_split_and_prints_all_tables(small_agiqa, tmp_path):
    flags = "--image_size 112 --epochs 1 --batch_size 16 --crops 1 --test_crops 1"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "reproduce_agiqa3k.sh"), str(small_agiqa), "out", *shlex.split(flags)],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "REPEATS": "2", "MODELS": "tiny=none=22 tiny=assets=22"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name in ("tiny-none", "tiny-assets"):
        summary = json.loads((tmp_path / "out" / name / "summary.json").read_text())
        assert summary["runs"] == ["seed42", "seed43"]
        assert f"== out/{name}\n2 runs, train " in done.stdout
    comparison, published = done.stdout[done.stdout.rindex("difference in SROCC") :].split("Published")
    assert "out/tiny-assets" in comparison and "IPCE" in published
