"""`training/checkpoints.py`: weights that come back exactly, damage that is refused, states of interrupted runs."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import content, fill, watch_disk
from safetensors.torch import load_file
from torch import Tensor

from storage import atomic
from training import checkpoints


def no_extra(folder: Path) -> None:
    """A checkpoint without further files."""


def save(folder: Path, state: dict[str, Tensor] | None = None, description: dict[str, Any] | None = None) -> Path:
    state = {"weight": torch.arange(6.0).reshape(2, 3)} if state is None else state
    checkpoints.save_weights(folder, state, description or {"size": 3}, no_extra)
    return folder


# Weights that come back


def test_weights_of_every_kind_come_back_exactly(tmp_path):
    torch.manual_seed(0)
    base = torch.randn(5, 7)
    state = {
        "plain": torch.randn(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "float64": torch.randn(3, dtype=torch.float64),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "int64": torch.arange(-2, 3),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(4.6052),
        "empty": torch.zeros(0, 3),
        "special": torch.tensor([float("inf"), -0.0, 1e-45]),
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "shared": base,
        "shared_again": base,
        "part_of_shared": base[1:3],
    }
    folder, found, description = checkpoints.load_weights(save(tmp_path / "w", state, {"scale": 0.1, "name": "猫"}))
    assert folder == tmp_path / "w"
    assert description == {"scale": 0.1, "name": "猫"}
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name], value.detach()), name
        assert not found[name].requires_grad


def test_a_small_view_does_not_drag_its_large_base_into_the_file(tmp_path):
    save(tmp_path / "w", {"part": torch.zeros(100_000)[:10]})
    assert (tmp_path / "w" / "model.safetensors").stat().st_size < 1000


def test_loaded_weights_do_not_change_with_the_model_or_with_the_file(tmp_path):
    live = torch.zeros(1000)
    _, found, _ = checkpoints.load_weights(save(tmp_path / "w", {"a": live}))
    live += 1
    save(tmp_path / "w", {"a": live})
    assert torch.equal(found["a"], torch.zeros(1000))


def test_a_checkpoint_folder_holds_no_pickle_and_nothing_left_over(tmp_path):
    checkpoints.save_weights(
        tmp_path / "deep" / "best",
        {"a": torch.ones(2)},
        {},
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
    )
    assert set(content(tmp_path)) == {
        "deep/best/model.safetensors",
        "deep/best/scorer.json",
        "deep/best/tokenizer.json",
    }
    for data in content(tmp_path).values():
        assert not data.startswith((b"\x80", b"PK"))  # pickle, and the zip that torch.save makes


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_weights_are_as_readable_as_the_other_files(tmp_path):
    folder = save(tmp_path / "w")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    plain = fill(tmp_path, "plain")
    assert (folder / "model.safetensors").stat().st_mode == (plain / "plain").stat().st_mode


def test_a_new_checkpoint_takes_the_place_of_the_older_one_whole(tmp_path):
    folder = save(tmp_path / "best", {"old": torch.ones(1)}, {"version": 1})
    fill(folder, "only_in_the_old.json")
    save(folder, {"new": torch.zeros(2)}, {"version": 2})
    _, state, description = checkpoints.load_weights(folder)
    assert list(state) == ["new"] and description == {"version": 2}
    assert set(content(tmp_path)) == {"best/model.safetensors", "best/scorer.json"}


@pytest.mark.parametrize("failing", ["description", "extra"])
def test_a_checkpoint_that_cannot_be_finished_leaves_the_older_one(tmp_path, failing):
    folder = save(tmp_path / "best", {"old": torch.ones(1)}, {"version": 1})
    before = content(tmp_path)

    def extra(path: Path) -> None:
        fill(path, "vocab.json")
        raise OSError("disk full")

    description = {"version": float("nan") if failing == "description" else 2}
    with pytest.raises((OSError, ValueError), match=r"disk full|JSON compliant"):
        checkpoints.save_weights(folder, {"new": torch.zeros(2)}, description, extra)
    assert content(tmp_path) == before


def test_processes_with_the_same_id_write_the_same_checkpoint_at_once(tmp_path):
    """In containers process ids recur."""

    def write_another(folder: Path) -> None:
        save(tmp_path / "best", {"other": torch.ones(1)})
        fill(folder, "vocab.json")

    checkpoints.save_weights(tmp_path / "best", {"mine": torch.ones(1)}, {"size": 3}, write_another)
    assert list(checkpoints.load_weights(tmp_path / "best")[1]) == ["mine"]
    assert set(content(tmp_path)) == {"best/model.safetensors", "best/scorer.json", "best/vocab.json"}


def test_a_run_folder_stands_for_the_best_in_it(tmp_path):
    fill(tmp_path, "config.json")
    save(tmp_path / "best", {"a": torch.ones(3)})
    folder, state, _ = checkpoints.load_weights(tmp_path)
    assert folder == tmp_path / "best"
    assert torch.equal(state["a"], torch.ones(3))


@pytest.mark.parametrize("place", ["before", "after"])
def test_weights_that_are_replaced_while_they_are_read_are_read_again(tmp_path, monkeypatch, place):
    folder, from_file = save(tmp_path / "best", {"a": torch.zeros(3)}), torch.UntypedStorage.from_file
    newer = iter([torch.ones(3)])

    def replace_and_open(*where: object, **how: object) -> torch.UntypedStorage:
        storage = from_file(*where, **how) if place == "after" else None
        for value in newer:
            save(folder, {"a": value})
        return storage or from_file(*where, **how)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replace_and_open)
    found = checkpoints.load_weights(folder)[1]["a"]
    assert torch.equal(found, torch.zeros(3) if place == "after" else torch.ones(3))  # one or the other, and whole


def test_weights_that_vanish_while_they_are_read_are_missing(tmp_path, monkeypatch):
    folder, from_file = save(tmp_path / "w"), torch.UntypedStorage.from_file

    def open_too_late(*where: object, **how: object) -> torch.UntypedStorage:
        (folder / "model.safetensors").unlink()
        return from_file(*where, **how)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", open_too_late)
    assert refused(folder).endswith("not a checkpoint, model.safetensors is missing")


@pytest.mark.parametrize("name", [".model.safetensors.123.tmp", ".tmpAb3dEf"])
def test_what_is_being_written_beside_weights_is_not_read_with_them(tmp_path, monkeypatch, name):
    folder, read = save(tmp_path / "w"), Path.read_bytes
    (folder / name).write_text("half of the ne")
    assert set(checkpoints.digests_of_files(folder)) == {"scorer.json"}

    def vanish(path: Path) -> bytes:
        (folder / name).unlink(missing_ok=True)  # it has become the weights
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", vanish)
    checkpoints.load_weights(folder)


def test_every_file_of_a_checkpoint_is_on_disk_before_it_takes_its_place_and_the_weights_come_last(
    tmp_path, monkeypatch
):
    done = watch_disk(tmp_path, monkeypatch)
    checkpoints.save_weights(tmp_path / "best", {"a": torch.ones(2)}, {}, lambda folder: fill(folder, "words/a.json"))
    before, after = done[: done.index("rename .best~")], done[done.index("rename .best~") :]
    assert {f"sync .best~{name}" for name in ("", "/scorer.json", "/words", "/words/a.json")} <= set(before)
    weights = "best/.model.safetensors~"
    assert after == ["rename .best~", "sync .", f"sync {weights}", f"rename {weights}", "sync best"]


# Damage


def refused(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (each caller looks at the message)
        checkpoints.load_weights(folder)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert "\n" not in message and message.startswith(f"{folder}: ")
    return message


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_truncated_weights_are_refused(tmp_path, kept):
    path = save(tmp_path / "w") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "damaged checkpoint" in refused(tmp_path / "w")


def weights_file(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file: the header's length, the header, the numbers."""
    return len(header).to_bytes(8, "little") + header + data


def test_the_hostile_headers_below_differ_from_one_that_safetensors_reads(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    path = save(tmp_path / "w") / "model.safetensors"
    path.write_bytes(weights_file(header, b"\0" * 16))
    assert torch.equal(load_file(path)["a"], torch.zeros(4))
    assert "carries no checksum" in refused(tmp_path / "w")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 8 + b"{}",
        weights_file(b"[]"),
        weights_file(b"\xff\xff"),
        weights_file(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"\0" * 12),
        weights_file(b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}', b"\0" * 16),
        weights_file(b'{"a":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}', b"\0" * 16),
        weights_file(b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', b"\0" * 16),
    ],
    ids=["endless", "list", "not_utf8", "beyond_the_end", "shape", "dtype", "negative"],
)
def test_hostile_headers_are_refused(tmp_path, data):
    (save(tmp_path / "w") / "model.safetensors").write_bytes(data)
    assert "damaged checkpoint" in refused(tmp_path / "w")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a": 1}}',
        b"[1, 2]",
        b'"text"',
        b"null",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\xff"}',
    ],
    ids=["empty", "cut", "trailing", "list", "string", "null", "nested", "nested_objects", "huge_number", "not_utf8"],
)
def test_hostile_descriptions_are_refused(tmp_path, text):
    (save(tmp_path / "w") / "scorer.json").write_bytes(text)
    assert "damaged checkpoint" in refused(tmp_path / "w")


@pytest.mark.parametrize("missing", ["scorer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, missing):
    (save(tmp_path / "w") / missing).unlink()
    assert refused(tmp_path / "w").endswith(f"not a checkpoint, {missing} is missing")


def test_an_absent_folder_and_a_file_are_no_checkpoints(tmp_path):
    fill(tmp_path, "file")
    assert "not a checkpoint" in refused(tmp_path / "absent")
    assert "not a checkpoint" in refused(tmp_path / "file")


def test_weights_that_are_a_folder_are_refused(tmp_path):
    path = save(tmp_path / "w") / "model.safetensors"
    path.unlink()
    path.mkdir()
    assert "damaged checkpoint" in refused(tmp_path / "w")


class Payload:
    """Runs when unpickled: makes the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dump", [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save])
def test_a_pickle_named_like_weights_is_refused_and_not_run(tmp_path, dump):
    path, trace = save(tmp_path / "w") / "model.safetensors", tmp_path / "it ran"
    dump({"weight": Payload(trace)}, path)
    assert "damaged checkpoint" in refused(tmp_path / "w")
    assert not trace.exists()
    file = BytesIO(path.read_bytes())
    torch.load(file, weights_only=False) if dump is torch.save else pickle.load(file)
    assert trace.exists()  # so the payload was live


# States


def test_a_disk_that_is_full_when_a_run_goes_on_costs_no_state(tmp_path, monkeypatch):
    save(tmp_path / "best")
    states = checkpoints.StateFolder(tmp_path, keep=2)
    for step in (1, 2):
        states.save(step, 1, {"step": step})
    before, said = content(tmp_path), []

    def full(*names: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(atomic.NotWritten, match=r"best/model.*No space left"):
            states.load(said.append)
    assert said == [] and content(tmp_path) == before
    assert states.load(said.append) == {"step": 2}


def test_the_folder_of_states_is_on_disk_before_a_state_is_put_into_it(tmp_path, monkeypatch):
    done = watch_disk(tmp_path, monkeypatch)
    checkpoints.StateFolder(tmp_path, keep=1).save(1, None, {"step": 1})
    name = "state/.step0000000001-nobest.safetensors~"
    assert done == ["sync .", f"sync {name}", f"rename {name}", "sync state"]


# The newest weights, written now and then


def kept(
    every_seconds: float, constant: tuple[str, ...] = ()
) -> tuple[checkpoints.DeferredWeights, list[dict[str, Tensor]]]:
    """A DeferredWeights, and what it has written so far."""
    written: list[dict[str, Tensor]] = []
    return checkpoints.DeferredWeights(
        lambda s: written.append(dict(s)), every_seconds=every_seconds, constant=constant
    ), written


def test_the_latest_state_is_the_one_of_when_it_was_kept_and_is_written_once():
    latest, written = kept(1e9)
    weight = torch.zeros(2)
    with latest:
        for _ in range(3):
            latest.keep({"w": weight})
            weight += 1  # training goes on
            latest.flush_if_due()
        assert written == []
    (state,) = written
    assert state["w"].tolist() == [2.0, 2.0]
    latest.flush()
    assert len(written) == 1


def test_a_state_is_written_as_soon_as_the_last_write_is_long_ago_though_no_newer_one_comes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    latest, written = kept(60)
    latest.keep({"w": torch.ones(1)})
    for seconds, times in ((59.0, 0), (60.0, 1), (200.0, 1)):
        clock[0] = seconds
        latest.flush_if_due()
        assert len(written) == times
    latest.keep({"w": torch.ones(1)})
    latest.flush_if_due()  # 140 s after the write
    assert len(written) == 2


def test_the_latest_state_is_written_when_training_breaks_down():
    latest, written = kept(1e9)

    def break_down() -> None:
        with latest:
            latest.keep({"w": torch.ones(1)})
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        break_down()
    assert len(written) == 1


def test_constant_weights_are_not_copied():
    latest, written = kept(1e9, constant=("frozen",))
    frozen, trained = torch.ones(1), torch.ones(1)
    latest.keep({"frozen": frozen, "trained": trained})
    latest.flush()
    assert written[0]["frozen"] is frozen and written[0]["trained"] is not trained
