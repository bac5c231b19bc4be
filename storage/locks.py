"""One process at a time in a folder: a lock that leaves no file, and ends with the process however that ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(folder: Path, *, wait: Callable[[], object] | None) -> Iterator[bool]:
    """Hold the lock of a folder, which is made if it is not there.

    Args:
        wait: called before another process that has the lock is waited for; None does not wait.

    Yields:
        True; False where the file system has no locks on folders: then other processes may be here too.

    Raises:
        BlockingIOError: another process has the lock, and `wait` is None.
        OSError: the folder cannot be made or opened.
    """
    while True:
        with suppress(FileExistsError):  # it is being removed, or is no folder, as opening it will tell
            folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if folder.is_symlink() or not folder.parent.is_dir():  # a link to nowhere
                raise
            continue  # removed this very moment
        try:
            is_locked = lock(descriptor, wait)
            if is_there(folder, descriptor):
                yield is_locked
                return
        finally:
            os.close(descriptor)  # and with it goes the lock


def lock(descriptor: int, wait: Callable[[], object] | None) -> bool:
    """Lock what a descriptor stands for; False if that cannot be. Raises BlockingIOError as `locked` does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait is None:
            raise
        wait()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # some network file systems
        return False
    return True


def is_there(folder: Path, descriptor: int) -> bool:
    """Whether the folder is still the one that was opened, and not removed, or made anew, while it was waited for."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def exclusive_folder(folder: Path, option: str = "") -> Iterator[None]:
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
