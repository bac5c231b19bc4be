"""Files that appear whole or not at all: written beside their place, synced, then renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class NotWritten(OSError):
    """Says in one line which file or folder could not be written, and why."""


# What a killed process may leave: ours, and what safetensors writes before it renames.
TEMPORARY = re.compile(r"\..+\.\d+\.tmp|\.tmp\w{6}")


def temporary_name(path: Path) -> Path:
    """Where to write what is to become `path`: another name each time, for in containers process ids recur."""
    digits = int.from_bytes(os.urandom(4), "big")  # not `random`, which is seeded alike in several processes
    return path.with_name(f".{path.name}.{os.getpid()}{digits}.tmp")


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then move it to `path` in one step.

    Raises:
        NotWritten: what was there before is still there.
    """
    put_in_place(path, write, os.replace)


def write_new(path: Path, write: Callable[[Path], object]) -> None:
    """The same, unless there is such a file, even if that has just come. Raises NotWritten."""
    if not path.exists():
        put_in_place(path, write, link_new)


def link_new(source: Path, target: Path) -> None:
    """Give a file another name, unless that is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(source, target)


def put_in_place(path: Path, write: Callable[[Path], object], put: Callable[[Path, Path], object]) -> None:
    """Let `write` fill a temporary file, which `put` then makes the one at `path`. Raises NotWritten."""
    temporary = temporary_name(path)
    try:
        with write_errors(path):
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask says; safetensors would let only the owner read
            write(temporary)
            temporary.chmod(mode)
            sync(temporary)
            put(temporary, path)
            sync(path.parent)
    finally:
        with suppress(OSError):  # which has been said
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Let what the file system refuses name the file or folder that was to be written. Raises NotWritten."""
    try:
        yield
    except NotWritten:  # a file in this folder
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotWritten(f"{path}: cannot be written ({reason}); what was there before is kept") from error


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes have left half-written in and below a folder that is this process's alone."""
    for place, folders, files in os.walk(folder):  # which passes over what is removed meanwhile
        for path in (Path(place, name) for name in (*folders, *files)):
            if is_temporary(path):
                with suppress(OSError):  # another user's, in a cache that is shared
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that nothing was put into."""
    with suppress(OSError):
        folder.rmdir()


def is_empty_folder(folder: Path) -> bool:
    """Whether a folder is empty, but for what a killed process has left half-written."""
    return all(map(is_temporary, folder.iterdir()))


def is_temporary(path: Path) -> bool:
    """Whether its name says that something was being written here."""
    return TEMPORARY.fullmatch(path.name) is not None
