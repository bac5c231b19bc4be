"""Weights on disk: checkpoint folders that vouch for all their files, and the states of interrupted runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from storage.atomic import atomic_write, is_temporary, sync, temporary_name, write_errors
from storage.json_files import read_json, write_json
from storage.messages import one_line
from storage.tensors import pack, read_tensors, unpack, weight_shapes, write_tensors

BEST_DIR = "best"
WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "scorer.json"
STATE_DIR = "state"


class DeferredWeights:
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

    def __enter__(self) -> DeferredWeights:
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


NO_BEST = "nobest"  # in a state's name, in place of the epoch that the best weights are of


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
        return sorted(self.folder.glob("step*.safetensors"))

    def best_of(self, state: Path) -> Path:
        """Where the best weights that a state knows are kept beside it."""
        return self.folder / f"{state.stem.partition('-')[2]}.safetensors"

    def save(self, step: int, best_epoch: int | None, state: Mapping[str, Any]) -> None:
        """Write a state: nested dicts and lists of numbers, texts, tensors and arrays. Raises NotWritten.

        Args:
            step: optimiser steps so far.
            best_epoch: the epoch that the best weights are of; None while there are none.
        """
        best = NO_BEST if best_epoch is None else f"best{best_epoch:06d}"
        path = self.folder / f"step{step:010d}-{best}.safetensors"
        tensors: dict[str, Tensor] = {}
        note = pack(state, "state", tensors)
        with write_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            sync(self.run)
            if best_epoch is not None:
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
                with damage_errors(path):
                    tensors, note = read_tensors(path)
                    state = unpack(note, tensors)
                    has_best = not path.stem.endswith(NO_BEST)
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

    atomic_write(target, fill)


def weights_folder(folder: Path) -> Path:
    """The checkpoint folder that is meant: a run folder stands for the `best` in it."""
    is_run = not (folder / DESCRIPTION_FILE).exists() and (folder / BEST_DIR).is_dir()
    return folder / BEST_DIR if is_run else folder


def load_description(folder: Path) -> dict[str, Any]:
    """Read what describes the weights that `save_weights` wrote. Raises ValueError: no checkpoint, or a damaged one."""
    folder = weights_folder(folder)
    with damage_errors(folder):
        return read_json(folder / DESCRIPTION_FILE)


def load_shapes(folder: Path) -> tuple[Path, dict[str, tuple[int, ...]], dict[str, Any]]:
    """As `load_weights`, but shapes in the place of the weights, which stay unread. Raises ValueError."""
    folder = weights_folder(folder)
    description = load_description(folder)
    with damage_errors(folder):
        return folder, weight_shapes(folder / WEIGHTS_FILE), description


def load_weights(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote: its folder, weights and description. A run folder stands for the `best` in it.

    Raises:
        ValueError: it is no checkpoint, or a damaged one.
    """
    folder = weights_folder(folder)
    description = load_description(folder)
    with damage_errors(folder):
        weight_shapes(folder / WEIGHTS_FILE)  # a stricter reader of headers than the next
        state, note = read_tensors(folder / WEIGHTS_FILE)
        found = digests_of_files(folder)
        for name, digest in note["files"].items():
            if found.get(name) != digest:
                raise ValueError(f"{name} is not as it was written: its checksum does not match")
    return folder, state, description


@contextmanager
def damage_errors(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint, or a file of one, is read into a ValueError of one line."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder}: not a checkpoint, {Path(error.filename or WEIGHTS_FILE).name} is missing"
        ) from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, SafetensorError, RecursionError) as error:
        raise ValueError(f"{folder}: damaged checkpoint ({one_line(error)})") from None
