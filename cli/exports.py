"""What programs ask for before they write a run into a folder for others; the standard library alone."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

PRECISIONS = ("float32", "float16", "int8")
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_export(asked: str, target: str, folder: str, device: str) -> None:
    """Raise ValueError unless a run can be exported here.

    Args:
        asked: the flag that asks for it.
        target: the flag that names the folder.
    """
    if device not in ("auto", "cpu"):
        raise ValueError(f"--device {device}: an export is made on the CPU, drop it")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{asked}: runs in one process; leave torchrun out")
    if os.path.lexists(folder) or not Path(folder).parent.is_dir():
        raise ValueError(f"{target} {folder}: must be a new folder, in one that exists")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{asked}: needs {', '.join(missing)}: pip install -r requirements-extra.txt")
