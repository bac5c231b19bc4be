"""`storage/feature_cache.py`: what is put into a cache comes out again, whatever else is done to its folder."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from folders import locked_elsewhere
from safetensors.torch import load_file, save_file

from storage import feature_cache
from storage.feature_cache import RECIPE_FILE, FeatureCache, FeatureSet, key_of

SHAPE = (3, 4)
RECIPE = {"weights": "a", "stages": 2}
GB = 1e9


def keys(start: int, stop: int) -> list[str]:
    return [key_of("image", number) for number in range(start, stop)]


def values(names: list[str], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that follow from their keys, so that a row under a wrong key shows."""
    seeds = (torch.Generator().manual_seed(int(name[:12], 16)) for name in names)
    return torch.stack([torch.randn(SHAPE, generator=seed) for seed in seeds]).to(dtype)


def open_set(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> FeatureSet:
    return FeatureCache(folder, GB).open({**RECIPE, **changes}, SHAPE, dtype)


def put(rows: FeatureSet, names: list[str]) -> FeatureSet:
    rows.add(names, values(names, rows.dtype))
    rows.flush()
    return rows


def segments(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def assert_holds(rows: FeatureSet, names: list[str]) -> None:
    assert rows.missing(names) == []
    assert torch.equal(rows.stack(names), values(names, rows.dtype))


# ------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit_here_and_in_a_later_run(dtype, tmp_path):
    names = keys(0, 7)
    first = put(open_set(tmp_path, dtype), names)
    assert_holds(first, names)
    later = open_set(tmp_path, dtype)
    assert_holds(later, names)
    assert torch.equal(later.stack(names[::-2]), values(names[::-2], dtype))
    assert later.stack(names).dtype == dtype
    assert later.stack([]).shape == (0, *SHAPE)
    assert first.row_bytes == values(names[:1], dtype).nbytes


def test_rows_are_stored_in_the_type_of_the_cache_whatever_they_were_computed_in(tmp_path):
    rows, names = open_set(tmp_path, torch.bfloat16), keys(0, 3)
    rows.add(names, values(names).requires_grad_())
    rows.flush()
    assert torch.equal(rows.stack(names), values(names).bfloat16())


def test_rows_of_the_wrong_shape_are_refused(tmp_path):
    rows, names = open_set(tmp_path), keys(0, 3)
    for wrong in (values(names)[:2], values(names)[:, :2], values(names).flatten(1)):
        with pytest.raises(AssertionError):
            rows.add(names, wrong)


def test_missing_keys_are_named_by_their_places(tmp_path):
    rows = open_set(tmp_path)
    assert rows.missing(keys(0, 3)) == [0, 1, 2]
    put(rows, keys(1, 3))
    assert rows.missing(keys(0, 5)) == [0, 3, 4]
    assert rows.missing([]) == []
    with pytest.raises(KeyError):
        rows.stack(keys(0, 1))


def test_keys_tell_their_parts_apart():
    assert len({key_of("a", 1), key_of("a", 2), key_of("a1"), key_of("a", "1", ""), key_of("1", "a")}) == 5
    assert key_of("a", 1) == key_of("a", "1")
    assert len(bytes.fromhex(key_of("a"))) == 32


@pytest.mark.parametrize("rows_per_segment", [1, 2, 3, 100])
def test_rows_are_written_in_segments_and_the_rest_by_flush(rows_per_segment, tmp_path, monkeypatch):
    rows, names = open_set(tmp_path), keys(0, 7)
    monkeypatch.setattr("storage.feature_cache.SEGMENT_BYTES", rows_per_segment * rows.row_bytes)
    for name in names:
        rows.add([name], values([name]))
    full = len(names) // rows_per_segment
    assert len(segments(tmp_path)) == full
    assert rows.missing(names) == list(range(full * rows_per_segment, len(names)))
    rows.flush()
    rows.flush()
    assert len(segments(tmp_path)) == -(-len(names) // rows_per_segment)
    assert_holds(rows, names)
    assert_holds(open_set(tmp_path), names)


# ---------------------------------------------------------------------------------------------- recipes


def test_another_recipe_shape_or_type_has_other_rows(tmp_path):
    names = keys(0, 2)
    put(open_set(tmp_path), names)
    cache = FeatureCache(tmp_path, GB)
    others = [
        cache.open({**RECIPE, "weights": "b"}, SHAPE, torch.float32),
        cache.open({**RECIPE, "stages": 3}, SHAPE, torch.float32),
        cache.open({**RECIPE, "view": None}, SHAPE, torch.float32),
        cache.open({"weights": "a"}, SHAPE, torch.float32),
        cache.open(RECIPE, SHAPE[::-1], torch.float32),
        cache.open(RECIPE, SHAPE, torch.float16),
    ]
    for other in others:
        assert other.missing(names) == [0, 1]
    assert len({other.folder for other in others}) == len(others)


def test_the_order_in_which_a_recipe_is_written_down_does_not_matter(tmp_path):
    put(open_set(tmp_path), keys(0, 2))
    again = FeatureCache(tmp_path, GB).open(dict(reversed(RECIPE.items())), list(SHAPE), torch.float32)
    assert_holds(again, keys(0, 2))


def test_a_cache_opens_each_recipe_once(tmp_path):
    cache = FeatureCache(tmp_path, GB)
    first = cache.open(RECIPE, SHAPE, torch.float32)
    assert cache.open(dict(RECIPE), SHAPE, torch.float32) is first
    assert list(cache.opened.values()) == [first]


def test_opening_writes_nothing(tmp_path):
    rows = open_set(tmp_path / "cache")
    rows.flush()
    assert not (tmp_path / "cache").exists()


# --------------------------------------------------------------------------------------- damage and other runs


def test_a_damaged_segment_is_reported_not_used_and_computed_anew(tmp_path, capsys):
    rows = open_set(tmp_path)
    for start in range(4):
        put(rows, keys(start, start + 1))
    cut, garbage, empty, _ = segments(tmp_path)
    lost = [key for path in (cut, garbage, empty) for key in keys_in(path)]
    cut.write_bytes(cut.read_bytes()[:-1])
    garbage.write_bytes(os.urandom(len(garbage.read_bytes())))
    empty.write_bytes(b"")
    capsys.readouterr()
    later = open_set(tmp_path)
    said = capsys.readouterr().out
    assert all(path.name in said for path in (cut, garbage, empty)) and said.count("\n") == 3
    names = keys(0, 4)
    assert sorted(names[place] for place in later.missing(names)) == sorted(lost)
    put(later, lost)
    assert_holds(later, names)
    assert capsys.readouterr().out == ""  # said once


def keys_in(path: Path) -> list[str]:
    return [row.tobytes().hex() for row in load_file(path)["keys"].numpy()]


def test_a_file_of_another_kind_under_a_segments_name_is_reported_and_not_used(tmp_path, capsys):
    rows = put(open_set(tmp_path), keys(0, 1))
    save_file({"other": torch.zeros(2)}, rows.folder / "foreign.safetensors")
    later = open_set(tmp_path)
    assert "foreign.safetensors" in capsys.readouterr().out
    assert_holds(later, keys(0, 1))


def test_what_a_broken_off_run_left_behind_is_not_used(tmp_path, capsys):
    rows = put(open_set(tmp_path), keys(0, 1))
    whole = segments(tmp_path)[0]
    left = rows.folder / ".0123456789abcdef.safetensors.123.tmp"
    whole.rename(left)
    later = open_set(tmp_path)
    assert later.missing(keys(0, 1)) == [0]
    put(later, keys(0, 1))
    assert_holds(open_set(tmp_path), keys(0, 1))
    assert capsys.readouterr().out == ""


def test_a_finished_flush_leaves_no_temporary_file(tmp_path):
    rows = put(open_set(tmp_path), keys(0, 3))
    assert {path.suffix for path in rows.folder.iterdir()} == {".safetensors", ".json"}


def test_runs_that_share_a_folder_see_each_others_rows_after_a_refresh(tmp_path):
    one, other = open_set(tmp_path), open_set(tmp_path)
    put(one, keys(0, 2))
    put(other, keys(1, 4))  # flush takes notice, too
    assert other.missing(keys(0, 5)) == [4]
    assert one.missing(keys(0, 5)) == [2, 3, 4]
    one.refresh()
    assert_holds(one, keys(0, 4))
    assert_holds(other, keys(0, 4))


# ------------------------------------------------------------------------------------------ one at a time


@contextmanager
def another(folder: Path, start: int, stop: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that has added rows, has a segment half written, and holds on to the recipe until killed."""
    rows = put(open_set(folder), keys(start, stop))
    (rows.folder / ".half.safetensors.123.tmp").write_bytes(b"half a segm")
    with locked_elsewhere(rows.folder) as process:
        yield process


def test_who_finds_another_process_adding_waits_aloud_and_misses_only_the_rest_even_if_that_one_is_killed(
    tmp_path, capsys
):
    cache = FeatureCache(tmp_path, GB)
    rows = cache.open(RECIPE, SHAPE, torch.float32)
    missed: list[list[int]] = []

    def add() -> None:
        with cache.alone([rows]):
            missed.append(rows.missing(keys(0, 6)))
            put(rows, keys(4, 6))

    with another(tmp_path, 0, 4) as process:
        mine = threading.Thread(target=add)
        mine.start()
        for _ in range(600):
            if cache.said:
                break
            mine.join(0.1)
        mine.join(0.3)  # and still waits
        assert mine.is_alive() and missed == []
        assert capsys.readouterr().out == "note      another run computes the same: waiting for it\n"
        process.kill()
        mine.join(60)
    assert missed == [[4, 5]]
    assert_holds(open_set(tmp_path), keys(0, 6))
    assert not list(tmp_path.rglob(".*.tmp"))  # of the one that was killed
    with cache.alone([rows]):
        pass
    assert capsys.readouterr().out == ""


def test_room_is_never_made_of_what_another_process_is_adding_to_until_that_one_is_gone(tmp_path):
    old = used(tmp_path, "old", at=1000)
    with another(tmp_path, 0, 4) as process:
        busy = open_set(tmp_path)
        os.utime(busy.folder / RECIPE_FILE, (1, 1))  # the first to go, but for the lock
        each = size(old)
        cache = FeatureCache(tmp_path, each + size(busy))
        assert cache.make_room(each)
        assert busy.folder.exists() and not old.folder.exists()
        assert not cache.make_room(each + 1)
        assert segments(busy.folder)
        process.kill()
        process.wait(60)
        assert cache.make_room(each + 1)
        assert not busy.folder.exists()


def test_two_that_want_the_same_recipes_in_another_order_do_not_wait_for_each_other(tmp_path):
    done = []

    def both(order: int) -> None:
        cache = FeatureCache(tmp_path, GB)
        sets = [cache.open({"weights": name}, SHAPE, torch.float32) for name in "abc"]
        for _ in range(100):
            with cache.alone(sets[::order]):
                pass
        done.append(order)

    workers = [threading.Thread(target=both, args=(order,), daemon=True) for order in (1, -1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert sorted(done) == [-1, 1]
    assert list(tmp_path.iterdir()) == []  # folders that nothing was put into go again


def test_where_folders_cannot_be_locked_it_is_said_once_and_nothing_of_others_is_removed(tmp_path, monkeypatch, capsys):
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = FeatureCache(tmp_path, GB)
    rows = cache.open(RECIPE, SHAPE, torch.float32)
    rows.folder.mkdir()
    others = rows.folder / ".other.safetensors.1.tmp"
    others.write_bytes(b"half a segm")
    for start in (0, 2):
        with cache.alone([rows]):
            put(rows, keys(start, start + 2))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "cannot be locked" in said
    assert others.exists()
    assert_holds(open_set(tmp_path), keys(0, 4))


def test_who_adds_to_a_recipe_removes_its_damaged_segments(tmp_path, capsys):
    rows = put(put(open_set(tmp_path), keys(0, 2)), keys(2, 4))
    cut = next(path for path in segments(tmp_path) if keys_in(path) == keys(2, 4))
    cut.write_bytes(cut.read_bytes()[:-1])
    cache = FeatureCache(tmp_path, GB)
    later = cache.open(RECIPE, SHAPE, torch.float32)
    assert cut.exists()
    with cache.alone([later]):
        assert not cut.exists()
        put(later, keys(2, 4))
    assert capsys.readouterr().out.count(cut.name) == 1
    assert_holds(open_set(tmp_path), keys(0, 4))
    assert rows.folder == later.folder and capsys.readouterr().out == ""


def test_a_recipe_is_never_seen_half_written(tmp_path, monkeypatch):
    rows = put(open_set(tmp_path), keys(0, 1))
    before = (rows.folder / RECIPE_FILE).read_text()
    rows.recipe = "something longer, that the disk has no room for"

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="No space left"):
        put(rows, keys(1, 2))
    assert (rows.folder / RECIPE_FILE).read_text() == before
    assert {path.suffix for path in rows.folder.iterdir()} == {".safetensors", ".json"}


def fill(folder: Path, start: int, stop: int, rounds: int) -> None:
    """Add rows in many small segments, checking all the time what can be seen of them and of others'."""
    rows = open_set(folder)
    everything = keys(0, stop + start)
    for number in range(rounds):
        put(rows, keys(start, stop)[number::rounds])
        missing = set(rows.missing(everything))
        seen = [key for place, key in enumerate(everything) if place not in missing]
        assert_holds(rows, seen)


def test_two_processes_adding_to_one_folder_never_corrupt_it(tmp_path, capfd):
    other = multiprocessing.get_context("spawn").Process(target=fill, args=(tmp_path, 20, 60, 20))
    other.start()
    while not segments(tmp_path):  # it has begun
        assert other.is_alive()
        time.sleep(0.01)
    fill(tmp_path, 0, 40, 20)  # twenty rows are added by both
    other.join(timeout=120)
    assert other.exitcode == 0
    assert_holds(open_set(tmp_path), keys(0, 60))
    assert len(segments(tmp_path)) == 40
    assert "damaged" not in capfd.readouterr().out
    assert not list(tmp_path.rglob("*.tmp"))


# --------------------------------------------------------------------------------------------- size and room


def used(folder: Path, name: str, *, at: float) -> FeatureSet:
    """A recipe with rows that was last opened at some time."""
    rows = put(open_set(folder, weights=name), keys(0, 10))
    os.utime(rows.folder / RECIPE_FILE, (at, at))
    return rows


def size(rows: FeatureSet) -> int:
    return sum(path.stat().st_size for path in rows.folder.iterdir())


def test_room_is_refused_beyond_the_bound_and_nothing_is_removed_for_it(tmp_path):
    old = used(tmp_path, "old", at=1000)
    cache = FeatureCache(tmp_path, size(old))
    mine = cache.open(RECIPE, SHAPE, torch.float32)
    assert not cache.make_room(size(old) + 1)
    assert old.folder.exists()
    put(mine, keys(0, 5))
    assert not cache.make_room(size(old) - size(mine) + 1)
    assert old.folder.exists()


def test_room_is_refused_beyond_what_the_disk_has_left(tmp_path):
    cache = FeatureCache(tmp_path / "not" / "there", 1e30)
    assert cache.make_room(1)
    assert not cache.make_room(1e20)
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("when", ["size_of", "last_use"])
def test_room_is_found_while_another_run_removes_recipes(when, tmp_path, monkeypatch):
    look = getattr(feature_cache, when)

    def look_too_late(folder: Path) -> float:
        shutil.rmtree(folder)
        return look(folder)

    for name in "ab":
        used(tmp_path, name, at=1)
    monkeypatch.setattr(feature_cache, when, look_too_late)
    assert FeatureCache(tmp_path, GB).make_room(GB)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_another_run_removes_while_it_is_opened_has_no_rows(tmp_path, monkeypatch, capsys):
    rows, from_file = put(open_set(tmp_path), keys(0, 3)), torch.UntypedStorage.from_file

    def open_too_late(*where: object, **how: object) -> torch.UntypedStorage:
        shutil.rmtree(rows.folder)
        return from_file(*where, **how)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "from_file", open_too_late)
        late = open_set(tmp_path)
    assert late.missing(keys(0, 3)) == [0, 1, 2] and capsys.readouterr().out == ""
    assert_holds(put(late, keys(0, 3)), keys(0, 3))


def test_a_segment_that_is_there_but_cannot_be_mapped_is_an_error(tmp_path, monkeypatch):
    put(open_set(tmp_path), keys(0, 3))

    def fail(*where: object, **how: object) -> torch.UntypedStorage:
        raise RuntimeError("out of maps")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail)
    with pytest.raises(RuntimeError, match="out of maps"):
        open_set(tmp_path)


def test_a_bound_of_zero_has_no_room_for_anything(tmp_path):
    assert not FeatureCache(tmp_path, 0).make_room(1)


def test_the_longest_unused_recipes_of_others_make_room_and_never_an_opened_one(tmp_path):
    mine, oldest, old, recent = (used(tmp_path, name, at=at) for at, name in enumerate("mabc"))
    each = size(mine)
    assert {size(item) for item in (oldest, old, recent)} == {each}
    cache = FeatureCache(tmp_path, 4 * each)
    opened = cache.open({**RECIPE, "weights": "m"}, SHAPE, torch.float32)
    assert opened.folder == mine.folder
    assert cache.make_room(0)
    assert [item.folder.exists() for item in (mine, oldest, old, recent)] == [True] * 4
    assert cache.make_room(each)
    assert [item.folder.exists() for item in (mine, oldest, old, recent)] == [True, False, True, True]
    assert cache.make_room(3 * each)
    assert [item.folder.exists() for item in (mine, oldest, old, recent)] == [True, False, False, False]
    assert not cache.make_room(3 * each + 1)
    assert_holds(open_set(tmp_path, weights="m"), keys(0, 10))


def test_opening_a_recipe_marks_it_as_used(tmp_path):
    first, second = used(tmp_path, "first", at=1000), used(tmp_path, "second", at=2000)
    open_set(tmp_path, weights="first")
    cache = FeatureCache(tmp_path, 2 * size(first))
    assert cache.make_room(1)
    assert first.folder.exists() and not second.folder.exists()


def test_a_run_whose_rows_another_removes_keeps_those_it_knows_and_can_add_more(tmp_path):
    mine = put(open_set(tmp_path), keys(0, 3))
    other = FeatureCache(tmp_path, size(mine))
    assert other.make_room(size(mine))
    assert not mine.folder.exists()
    assert_holds(mine, keys(0, 3))
    put(mine, keys(3, 5))
    assert_holds(mine, keys(0, 5))
    assert open_set(tmp_path).missing(keys(0, 5)) == [0, 1, 2]


def test_a_folder_that_cannot_be_written_is_one_line_with_the_way_out(tmp_path):
    (tmp_path / "cache").write_text("a file in the folder's place")
    rows = open_set(tmp_path / "cache" / "features")
    rows.add(keys(0, 2), values(keys(0, 2)))
    with pytest.raises(ValueError, match="--cache_dir") as error:
        rows.flush()
    assert "choose another folder" in str(error.value) and "\n" not in str(error.value)


def test_a_disk_that_is_full_leaves_no_piece_of_a_segment(tmp_path, monkeypatch):
    rows = put(open_set(tmp_path), keys(0, 1))

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half a segm")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("storage.feature_cache.save_file", full)
    with pytest.raises(ValueError, match=r"No space left on device.*choose another folder"):
        put(rows, keys(1, 2))
    assert not list(tmp_path.rglob("*.tmp")) and len(segments(tmp_path)) == 1
    assert_holds(open_set(tmp_path), keys(0, 1))
