"""The one writer and the one reader of run folders, knowing nothing of images or CLIP.

Every file appears whole or not at all: it is written beside its place, synced, then renamed. Weights carry a digest of
themselves and of the files beside them, which is compared whenever they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import tables
from locking import locked
from reading import in_a_line, read_json, weight_shapes
from writing import holds_nothing, is_temporary, sweep, sync, temporary_name, write_errors, write_whole

RESULTS_FILE = "results.json"
BEST_DIR = "best"
WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "scorer.json"
CONFIG_FILE = "config.json"
SPLITS_FILE = "splits.csv"
STATE_DIR = "state"
FAILURE_FILE = "failure.json"
SKIPPED_FILE = "skipped.csv"
RUN_FILES = (
    *(CONFIG_FILE, SPLITS_FILE, SKIPPED_FILE, "metrics.csv", FAILURE_FILE, RESULTS_FILE),
    *("predictions.csv", "report.html"),
)
RUN_FOLDERS = (STATE_DIR, BEST_DIR, "figures", "tensorboard", "wandb")
PACKAGES = (
    *("torch", "torchvision", "open_clip_torch", "timm", "transformers", "pillow"),
    *("numpy", "scipy", "pandas", "scikit-learn"),
)


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
    if not folder.exists() or holds_nothing(folder):
        return
    if not is_run(folder):
        raise ValueError(f"--output_dir {folder}: holds other things than a run; choose a new or empty folder")
    if not overwrite:
        is_finished = (folder / RESULTS_FILE).exists()
        kind = "a finished" if is_finished else "an unfinished"
        ways = "choose another" if is_finished else f"go on with --resume {folder}, choose another"
        raise ValueError(f"--output_dir {folder}: holds {kind} run; {ways} or pass --overwrite")


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run, finished or not; other programs' folders may have a config.json too."""
    try:
        return "provenance" in read_json(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return False


def prepare_run_folder(folder: Path) -> None:
    """Make the folder of a new run, without what an older run left in it. See `refuse_occupied`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).unlink(missing_ok=True)  # first what tells that it is finished
    for name in RUN_FOLDERS:  # and the states before the weights that they belong to
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in reversed(RUN_FILES):  # what tells that this is a run goes last
        (folder / name).unlink(missing_ok=True)


class RunFolder:
    """The run folder of one process; where another process writes, `active` is False and nothing happens here.

    As long as the block lasts no other run can have the folder.

    Args:
        overwrite, resume: whether an older run may be replaced, or gone on with.
    """

    def __init__(self, path: Path, *, active: bool = True, overwrite: bool = False, resume: bool = False) -> None:
        self.path = path
        self.active = active
        self.overwrite = overwrite
        self.resume = resume
        self.leaving = ExitStack()

    def __enter__(self) -> RunFolder:
        """Make the folder, without what an older run left in it. Raises ValueError if another run has it."""
        if self.active:
            with ExitStack() as leaving:
                leaving.enter_context(alone_in(self.path))
                if not self.resume:
                    refuse_occupied(self.path, overwrite=self.overwrite)  # another run may just have ended here
                    prepare_run_folder(self.path)
                sweep(self.path)
                self.leaving = leaving.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.leaving.close()

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, see `write_json`."""
        if self.active:
            write_json(self.path / name, value)

    def csv(self, name: str, table: pd.DataFrame) -> None:
        """Write a CSV file, see `write_csv`."""
        if self.active:
            write_csv(self.path / name, table)

    def forget_states(self) -> None:
        """Remove what only an interrupted run needs: this one is finished."""
        if self.active:
            (self.path / FAILURE_FILE).unlink(missing_ok=True)
            shutil.rmtree(self.path / STATE_DIR, ignore_errors=True)

    def weights(
        self, name: str, state: Mapping[str, Tensor], description: Mapping[str, Any], extra: Callable[[Path], None]
    ) -> None:
        """Write a checkpoint, see `save_weights`."""
        if self.active:
            save_weights(self.path / name, state, description, extra)


@contextmanager
def alone_in(folder: Path, option: str = "") -> Iterator[None]:
    """Have a folder, which is made if it is not there, for this run alone. Raises ValueError if another run has it.

    Args:
        option: what the user has named; "" for the folder, as --output_dir.
    """
    with ExitStack() as leaving:
        try:
            can_lock = leaving.enter_context(locked(folder, wait=None))
        except BlockingIOError:
            time.sleep(0.2)  # it may only have looked whether the folder is free
            try:
                can_lock = leaving.enter_context(locked(folder, wait=None))
            except BlockingIOError:
                option = option or f"--output_dir {folder}"
                raise ValueError(f"{option}: another run is using it now; wait for its end or choose another") from None
        if not can_lock:
            print(f"note      {folder}: this file system has no locks; let no other run use the folder", flush=True)
        yield


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


def digest_of(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """SHA-256 over names, types, shapes and values of plain tensors on the CPU, and over texts."""
    digest = hashlib.sha256("\0".join(texts).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\0{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Any) -> None:
    """Write tensors and a JSON value as one safetensors file that carries a digest of both. Raises NotWritten."""
    # safetensors refuses shared memory, and a view would drag its whole base along: copy to plain tensors.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(note)
    metadata = {"note": text, "sha256": digest_of(plain, text)}

    def fill(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_whole(path, fill)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what `write_tensors` wrote, which may be replaced meanwhile.

    Raises:
        OSError, ValueError, SafetensorError, RecursionError: it is missing, or not as it was written.
    """
    while True:
        status = path.stat()
        try:
            return read_tensors_once(path)
        except (OSError, ValueError, RuntimeError, SafetensorError):
            after = path.stat()  # safetensors opens the file twice: the second time it may have been another one
            if (after.st_ino, after.st_mtime_ns) == (status.st_ino, status.st_mtime_ns):
                raise


def read_tensors_once(path: Path) -> tuple[dict[str, Tensor], Any]:
    """As `read_tensors`, but of a file that is not replaced meanwhile."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    text = metadata.get("note", "")
    if "sha256" not in metadata:
        raise ValueError(f"{path.name} carries no checksum: this program did not write it")
    if digest_of(tensors, text) != metadata["sha256"]:
        raise ValueError(f"{path.name} is not as it was written: its checksum does not match")
    return tensors, json.loads(text)


def digests_of_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every finished file in and below a folder, by its name there; the weights carry their own."""
    weights = folder / WEIGHTS_FILE
    paths = [path for path in sorted(folder.rglob("*")) if path != weights and not is_temporary(path)]
    paths = [path for path in paths if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def save_weights(
    folder: Path, state: Mapping[str, Tensor], description: Mapping[str, Any], extra: Callable[[Path], None]
) -> None:
    """Write a self-contained checkpoint folder, in place of an older one. No pickle anywhere.

    The weights come last and vouch for the other files; where only they differ, they are replaced in one step.

    Args:
        extra: may add files to the folder before it is put in place.

    Raises:
        NotWritten: the file system refuses.
    """
    temporary = temporary_name(folder)
    try:
        with write_errors(folder):
            temporary.mkdir(parents=True)
            write_json(temporary / DESCRIPTION_FILE, description)
            extra(temporary)
            files = digests_of_files(temporary)
            if folder.exists() and digests_of_files(folder) != files:
                shutil.rmtree(folder)
            if not folder.exists():
                for path in (*temporary.rglob("*"), temporary):
                    sync(path)
                os.replace(temporary, folder)
                sync(folder.parent)
        write_tensors(folder / WEIGHTS_FILE, state, {"files": files})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Nested dicts, lists, numbers, texts, tensors and arrays as a JSON value; tensors go to `tensors` under names."""
    if isinstance(value, Tensor | np.ndarray):
        tensors[name] = torch.as_tensor(value)
        return {"array" if isinstance(value, np.ndarray) else "tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [pack(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
    assert value is None or isinstance(value, str | int | float), type(value)
    return value


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given; tuples are lists now. Raises LookupError, TypeError, ValueError for anything else."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    return tensors[content].numpy() if kind == "array" else tensors[content]


class StateFolder:
    """What an interrupted run needs to go on: the newest few states, and the best weights that each of them knows.

    Args:
        run: the run folder.
        keep: how many states stay.
    """

    def __init__(self, run: Path, *, keep: int) -> None:
        self.run = run
        self.folder = run / STATE_DIR
        self.best = run / BEST_DIR / WEIGHTS_FILE
        self.keep = keep

    def states(self) -> list[Path]:
        """The files of the states, the oldest first."""
        return sorted(self.folder.glob("step*-best*.safetensors"))

    def best_of(self, state: Path) -> Path:
        """Where the best weights that a state knows are kept beside it."""
        return self.folder / f"{state.stem.partition('-')[2]}.safetensors"

    def save(self, step: int, best_epoch: int, state: Mapping[str, Any]) -> None:
        """Write a state: nested dicts and lists of numbers, texts, tensors and arrays. Raises NotWritten.

        Args:
            step: optimiser steps so far.
            best_epoch: the epoch that the best weights are of; 0 for none yet.
        """
        path = self.folder / f"step{step:010d}-best{best_epoch:06d}.safetensors"
        tensors: dict[str, Tensor] = {}
        note = pack(state, "state", tensors)
        with write_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            sync(self.run)
            if best_epoch:
                put_copy(self.best, self.best_of(path))
            write_tensors(path, tensors, note)
            kept = [old for old in self.states() if old <= path][-self.keep :]  # later ones were damaged, or given up
            for old in set(self.folder.iterdir()) - {*kept, *map(self.best_of, kept)}:
                old.unlink()

    def load(self, say: Callable[[str], object], *, active: bool = True) -> dict[str, Any] | None:
        """The newest state that is as it was written, with its best weights back in their place; None if there is none.

        Args:
            say: is told of every state that is damaged.
            active: False leaves the best weights to another process.

        Raises:
            NotWritten: the best weights cannot be put back.
        """
        for path in reversed(self.states()):
            try:
                with damage_told(path):
                    tensors, note = read_tensors(path)
                    state = unpack(note, tensors)
                    has_best = not path.stem.endswith("-best000000")
                    if has_best:
                        read_tensors(self.best_of(path))
            except ValueError as error:
                say(f"note      {error}; trying the state before it")
                continue
            if has_best and active:  # a disk that is full here damages no state
                put_copy(self.best_of(path), self.best)
            return state
        return None


def put_copy(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source`, which is never written to, only replaced; or a copy of it."""

    def fill(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)

    write_whole(target, fill)


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
        state, note = read_tensors(folder / WEIGHTS_FILE)
        found = digests_of_files(folder)
        for name, digest in note["files"].items():
            if found.get(name) != digest:
                raise ValueError(f"{name} is not as it was written: its checksum does not match")
    return folder, state, description


@contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint, or a file of one, is read into a ValueError of one line."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder}: not a checkpoint, {Path(error.filename or WEIGHTS_FILE).name} is missing"
        ) from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, SafetensorError, RecursionError) as error:
        raise ValueError(f"{folder}: damaged checkpoint ({in_a_line(error)})") from None


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
    # The lock that status would take can fail a commit that somebody makes at the same moment.
    commands = ("git rev-parse HEAD", "git --no-optional-locks status --porcelain --untracked-files=no")
    try:
        revision, changes = (
            subprocess.run(
                command.split(), cwd=here, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision + ("+changes" if changes else "")
