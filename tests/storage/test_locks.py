"""`storage/locks.py`: one at a time, whatever happens to the folder or to who holds its lock."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
from folders import locked_elsewhere

from storage.locks import locked


def test_a_lock_excludes_another_process_until_that_one_is_killed_and_leaves_no_file(tmp_path):
    with locked_elsewhere(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path, wait=None):
        pass
    with locked(tmp_path, wait=None) as is_locked:
        assert is_locked
    assert list(tmp_path.iterdir()) == []


def test_who_waits_says_so_once_and_gets_the_lock_when_it_is_given_back(tmp_path):
    said, waiting, inside = [], threading.Event(), threading.Event()

    def tell() -> None:
        said.append("waiting")
        waiting.set()

    def wait_for_it() -> None:
        with locked(tmp_path, wait=tell):
            inside.set()

    other = threading.Thread(target=wait_for_it)
    with locked(tmp_path, wait=None):
        other.start()
        assert waiting.wait(60) and not inside.wait(0.2)
    other.join(timeout=60)
    assert inside.is_set() and said == ["waiting"]


def test_a_lock_is_given_back_by_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path, wait=None):
        raise KeyError
    with locked(tmp_path, wait=None) as is_locked:
        assert is_locked


@pytest.mark.parametrize("made_anew", [False, True])
def test_the_lock_of_a_folder_that_was_removed_is_worth_nothing(tmp_path, made_anew):
    folder, held = tmp_path / "folder", []
    waiting = threading.Event()

    def wait_for_it() -> None:
        with locked(folder, wait=waiting.set) as is_locked:
            held.append((is_locked, folder.is_dir()))
            with pytest.raises(BlockingIOError), locked(folder, wait=None):  # so it is the one that is there
                pass

    other = threading.Thread(target=wait_for_it)
    with locked(folder, wait=None):
        other.start()
        assert waiting.wait(30)
        folder.rmdir()
        if made_anew:
            folder.mkdir()
    other.join(timeout=30)
    assert held == [(True, True)]


def test_a_folder_that_is_removed_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    folder, mkdir, made = tmp_path / "folder", os.mkdir, []

    def remove_it_then(path: Path, mode: int) -> None:
        made.append(path)
        if len(made) == 1:  # another process had made it, and has removed it since
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        mkdir(path, mode)
        if len(made) == 2:
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", remove_it_then)
    with locked(folder, wait=None) as is_locked:
        assert is_locked and folder.is_dir()
    assert made == [folder] * 3


def test_where_there_are_no_locks_the_block_runs_and_is_told(tmp_path, monkeypatch):
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, wait=None) as is_locked:
        assert not is_locked


@pytest.mark.parametrize("what", ["file", "file/folder", "link", "link/folder"])
def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path, what):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=what.partition("/")[0]), locked(tmp_path / what, wait=None):
        pass
