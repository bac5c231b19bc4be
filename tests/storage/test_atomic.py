"""`storage/atomic.py`: files whole or absent, on the disk before they take their place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from folders import content, fill, watch_disk

from storage import atomic


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("failure", [OSError("disk full"), ValueError("no such column"), KeyboardInterrupt()])
def test_a_writer_that_fails_half_way_leaves_what_was_there(tmp_path, old, failure):
    path = tmp_path / "table.csv"
    if old is not None:
        path.write_bytes(old)
    before = content(tmp_path)

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of the ne")
        raise failure

    with pytest.raises(type(failure)):
        atomic.atomic_write(path, write)
    assert content(tmp_path) == before


def test_a_file_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "a.txt").write_text("old and longer")
    atomic.atomic_write(tmp_path / "a.txt", lambda temporary: temporary.write_text("new"))
    assert content(tmp_path) == {"a.txt": b"new"}


def test_a_file_is_on_disk_before_it_takes_its_place_and_then_its_folder_is(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    done = watch_disk(tmp_path, monkeypatch)
    atomic.atomic_write(tmp_path / "a.txt", lambda temporary: temporary.write_text("new"))
    assert done == ["sync .a.txt~", "rename .a.txt~", "sync ."]


def test_processes_with_the_same_id_write_the_same_file_at_once(tmp_path):
    """In containers process ids recur."""
    path = tmp_path / "a.txt"

    def write(temporary: Path) -> None:
        assert atomic.is_temporary(temporary)  # so that it is swept away if this process is killed
        temporary.write_text("mine")
        atomic.atomic_write(path, lambda other: other.write_text("the other's"))
        assert path.read_text() == "the other's"

    atomic.atomic_write(path, write)
    assert content(tmp_path) == {"a.txt": b"mine"}


def test_sweeping_goes_on_where_a_folder_is_removed_meanwhile(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        fill(tmp_path / name / "deep", f".{name}.json.123.tmp", f"{name}.json")
    fill(tmp_path, ".best.123.tmp/deep/scorer.json")
    scandir, remove = os.scandir, shutil.rmtree

    def look_too_late(place: Any) -> Any:
        if str(place).endswith("deep"):
            remove(tmp_path / "b", ignore_errors=True)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", look_too_late)
    atomic.remove_temporaries(tmp_path)
    assert set(content(tmp_path)) == {"a/deep/a.json", "c/deep/c.json"}
