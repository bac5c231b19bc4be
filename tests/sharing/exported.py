"""The scripts of exported folders, and an environment that has only what they need. No tests: these import it."""

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

from sharing.folder import TEMPLATES, importable

NEEDED = {"score.py": (np, PIL, onnxruntime, tokenizers), "answer.py": (np, onnxruntime), "pixels.py": (np, PIL)}


@cache
def script(name: str) -> dict[str, Any]:
    """What one of them defines."""
    with importable(TEMPLATES):
        return runpy.run_path(str(TEMPLATES / name))


@cache
def bare_python(place: Path, *scripts: str) -> Path:
    """An interpreter that finds the libraries which these scripts need, and no others."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    packages = next(place.glob("lib/python*/site-packages"))
    for module in {module for name in scripts for module in NEEDED[name]}:
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
