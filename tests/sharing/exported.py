"""The script of an exported scorer, and an environment that has only what it needs. No tests: these import it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import PIL
import tokenizers
from conftest import ROOT

TEMPLATE = ROOT / "sharing" / "templates" / "score.py"
NEEDED = (np, PIL, onnxruntime, tokenizers)


@cache
def script() -> dict[str, Any]:
    """What score.py defines."""
    return runpy.run_path(str(TEMPLATE))


@cache
def bare_python(place: Path) -> Path:
    """An interpreter that finds NumPy, Pillow, onnxruntime and tokenizers, and no other library."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    packages = next(place.glob("lib/python*/site-packages"))
    for module in NEEDED:
        folder = Path(str(module.__file__)).parent
        for found in (folder, *folder.parent.glob(f"{folder.name.lower().replace('pil', 'pillow')}.libs")):
            (packages / found.name).symlink_to(found)
    return place / "bin" / "python"


def run_bare(python: Path, code: str, *words: str) -> Any:
    """What a piece of code prints as JSON, run by such an interpreter."""
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
