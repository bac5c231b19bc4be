"""The one writer and the one reader of run folders, knowing nothing of images or CLIP.

Every file appears whole or not at all: it is written beside its place, synced, then renamed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import tables
from reading import read_json, weight_shapes
from writing import write_whole

RESULTS_FILE = "results.json"
BEST_DIR = "best"
WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "scorer.json"
CONFIG_FILE = "config.json"
INPUT_FILES = (CONFIG_FILE, "splits.csv")  # every run begins by writing these
RUN_FILES = (*INPUT_FILES, "metrics.csv", RESULTS_FILE, "predictions.csv", "report.html")
RUN_FOLDERS = (BEST_DIR, "figures", "tensorboard", "wandb")
PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "numpy", "scipy", "pandas", "scikit-learn")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write UTF-8 CSV without an index; numbers with nine significant digits, texts as `tables.escape` has them."""
    write_whole(path, lambda temporary: tables.write(table, temporary))


def refuse_occupied(folder: Path, *, overwrite: bool) -> None:
    """Raise ValueError unless a new run may use the folder: absent, empty, or an older run that may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder}: is a file, must be a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    # Both, because other folders have a config.json too: a Hugging Face model's must not be taken for a run.
    if not all((folder / name).exists() for name in INPUT_FILES):
        raise ValueError(f"--output_dir {folder}: holds other things than a run; choose a new or empty folder")
    if not overwrite:
        kind = "a finished" if (folder / RESULTS_FILE).exists() else "an unfinished"
        raise ValueError(f"--output_dir {folder}: holds {kind} run; choose another or pass --overwrite")


def prepare_run_folder(folder: Path) -> None:
    """Make the folder of a new run, without what an older run left in it. See `refuse_occupied`."""
    for name in RUN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in reversed(RUN_FILES):  # what tells that this is a run goes last
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


class RunFolder:
    """The run folder of one process; where another process writes, `active` is False and nothing happens here."""

    def __init__(self, path: Path, *, active: bool = True) -> None:
        """Make the folder, without what an older run left in it."""
        self.path = path
        self.active = active
        if active:
            prepare_run_folder(path)

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, see `write_json`."""
        if self.active:
            write_json(self.path / name, value)

    def csv(self, name: str, table: pd.DataFrame) -> None:
        """Write a CSV file, see `write_csv`."""
        if self.active:
            write_csv(self.path / name, table)

    def weights(
        self, name: str, state: Mapping[str, Tensor], description: Mapping[str, Any], extra: Callable[[Path], None]
    ) -> None:
        """Write a checkpoint, see `save_weights`."""
        if self.active:
            save_weights(self.path / name, state, description, extra)


class LatestState:
    """Holds the newest weights in memory and writes them now and then, and in any case when the block is left.

    Args:
        write: writes a state.
        every_seconds: the least time between two writes.
        constant: names of weights that never change, which need no copy.
    """

    def __init__(
        self, write: Callable[[Mapping[str, Tensor]], None], *, every_seconds: float, constant: Collection[str] = ()
    ) -> None:
        self.write = write
        self.every_seconds = every_seconds
        self.constant = constant
        self.state: dict[str, Tensor] | None = None
        self.since = time.monotonic()  # the last write

    def __enter__(self) -> LatestState:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()

    def keep(self, state: Mapping[str, Tensor]) -> None:
        """Take this state, and forget the one before."""
        self.state = {
            name: value if name in self.constant else value.detach().to("cpu", copy=True)
            for name, value in state.items()
        }

    def flush_if_due(self) -> None:
        """Write what has not been written yet, if the last write is long ago."""
        if time.monotonic() - self.since >= self.every_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet."""
        if self.state is not None:
            self.write(self.state)
            self.state, self.since = None, time.monotonic()


def save_weights(
    folder: Path, state: Mapping[str, Tensor], description: Mapping[str, Any], extra: Callable[[Path], None]
) -> None:
    """Write a self-contained checkpoint folder, then put it in place of an older one. No pickle anywhere.

    Args:
        extra: may add files to the folder before it is put in place.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # safetensors refuses shared memory, and a view would drag its whole base along: copy to plain tensors.
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        write_whole(temporary / WEIGHTS_FILE, lambda path: save_file(plain, path))
        write_json(temporary / DESCRIPTION_FILE, description)
        extra(temporary)
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)  # of a process with this id that was killed; in containers ids recur
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weights_folder(folder: Path) -> Path:
    """The checkpoint folder that is meant: a run folder stands for the `best` in it."""
    is_run = not (folder / DESCRIPTION_FILE).exists() and (folder / BEST_DIR).is_dir()
    return folder / BEST_DIR if is_run else folder


def load_description(folder: Path) -> dict[str, Any]:
    """Read what describes the weights that `save_weights` wrote. Raises ValueError: no checkpoint, or a damaged one."""
    folder = weights_folder(folder)
    with damage_told(folder):
        return read_json(folder / DESCRIPTION_FILE)


def load_shapes(folder: Path) -> tuple[Path, dict[str, tuple[int, ...]], dict[str, Any]]:
    """As `load_weights`, but shapes in the place of the weights, which stay unread. Raises ValueError."""
    folder = weights_folder(folder)
    description = load_description(folder)
    with damage_told(folder):
        return folder, weight_shapes(folder / WEIGHTS_FILE), description


def load_weights(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote: its folder, weights and description. A run folder stands for the `best` in it.

    Raises:
        ValueError: it is no checkpoint, or a damaged one.
    """
    folder = weights_folder(folder)
    description = load_description(folder)
    with damage_told(folder):
        weight_shapes(folder / WEIGHTS_FILE)  # a stricter reader of headers than the next
        return folder, load_file(folder / WEIGHTS_FILE), description


@contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint is read into a ValueError of one line."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder}: not a checkpoint, {Path(error.filename or WEIGHTS_FILE).name} is missing"
        ) from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged checkpoint ({error})") from None


def environment() -> dict[str, Any]:
    """Versions of Python and the packages that matter, and the git revision of the code ("" outside git)."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"versions": versions, "git_revision": git_revision()}


def git_revision() -> str:
    """The commit this code is at, with "+changes" if it was edited since; "" if that cannot be told."""
    here = Path(__file__).parent
    try:
        commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
        revision, changes = (
            subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision + ("+changes" if changes else "")
