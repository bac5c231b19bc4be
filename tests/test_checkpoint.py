"""`checkpoint.py`: files whole or absent, run folders that are not mixed up, weights that come back exactly."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import checkpoint
import writing

FOREIGN = {"notes.txt": b"mine", "config.csv": b"a,b\n"}
RUN_NAMES = ["config.json", "splits.csv", "metrics.csv", "results.json", "predictions.csv"]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, *names: str) -> Path:
    """A folder with files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def fill_run(folder: Path, *names: str) -> Path:
    """A run folder, told by what its config.json says, with files of these names."""
    fill(folder, "config.json", *names)
    (folder / "config.json").write_text('{"provenance": {}}')
    return folder


def no_extra(folder: Path) -> None:
    """A checkpoint without further files."""


def save(folder: Path, state: dict[str, Tensor] | None = None, description: dict[str, Any] | None = None) -> Path:
    state = {"weight": torch.arange(6.0).reshape(2, 3)} if state is None else state
    checkpoint.save_weights(folder, state, description or {"size": 3}, no_extra)
    return folder


# Single files


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
        writing.write_whole(path, write)
    assert content(tmp_path) == before


def test_a_file_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "a.txt").write_text("old and longer")
    writing.write_whole(tmp_path / "a.txt", lambda temporary: temporary.write_text("new"))
    assert content(tmp_path) == {"a.txt": b"new"}


@pytest.fixture
def done(tmp_path, monkeypatch) -> list[str]:
    """What is synced and renamed, as it happens; temporary names without their digits."""
    calls, replace = [], os.replace

    def name_of(path: Path) -> str:
        return re.sub(r"\.\d+\.tmp", "~", str(path.relative_to(tmp_path)))

    def sync(descriptor: int) -> None:
        (found,) = [
            path for path in (tmp_path, *tmp_path.rglob("*")) if path.stat().st_ino == os.fstat(descriptor).st_ino
        ]
        calls.append(f"sync {name_of(found)}")

    def rename(source: Path, target: Path) -> None:
        calls.append(f"rename {name_of(source)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    return calls


def test_a_file_is_on_disk_before_it_takes_its_place_and_then_its_folder_is(tmp_path, done):
    (tmp_path / "a.txt").write_text("old")
    writing.write_whole(tmp_path / "a.txt", lambda temporary: temporary.write_text("new"))
    assert done == ["sync .a.txt~", "rename .a.txt~", "sync ."]


def test_every_file_of_a_checkpoint_is_on_disk_before_it_takes_its_place_and_the_weights_come_last(tmp_path, done):
    checkpoint.save_weights(tmp_path / "best", {"a": torch.ones(2)}, {}, lambda folder: fill(folder, "words/a.json"))
    before, after = done[: done.index("rename .best~")], done[done.index("rename .best~") :]
    assert {f"sync .best~{name}" for name in ("", "/scorer.json", "/words", "/words/a.json")} <= set(before)
    weights = "best/.model.safetensors~"
    assert after == ["rename .best~", "sync .", f"sync {weights}", f"rename {weights}", "sync best"]


def test_the_folder_of_states_is_on_disk_before_a_state_is_put_into_it(tmp_path, done):
    checkpoint.StateFolder(tmp_path, keep=1).save(1, 0, {"step": 1})
    name = "state/.step0000000001-best000000.safetensors~"
    assert done == ["sync .", f"sync {name}", f"rename {name}", "sync state"]


def test_processes_with_the_same_id_write_the_same_file_at_once(tmp_path):
    """In containers process ids recur."""
    path = tmp_path / "a.txt"

    def write(temporary: Path) -> None:
        assert writing.is_temporary(temporary)  # so that it is swept away if this process is killed
        temporary.write_text("mine")
        writing.write_whole(path, lambda other: other.write_text("the other's"))
        assert path.read_text() == "the other's"

    writing.write_whole(path, write)
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
    writing.sweep(tmp_path)
    assert set(content(tmp_path)) == {"a/deep/a.json", "c/deep/c.json"}


def test_json_comes_back_and_keeps_other_alphabets_readable(tmp_path):
    value = {"prompt": "一只猫 é", "numbers": [1, 0.1, -1e-300], "nothing": None, "nested": {"yes": True}}
    checkpoint.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "一只猫" in text and text.endswith("}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_numbers_that_are_not_finite_and_keeps_the_old_file(tmp_path, number):
    fill(tmp_path, "a.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(tmp_path / "a.json", {"deep": [{"down": number}]})
    assert content(tmp_path) == {"a.json": b"{}"}


def test_csv_is_utf8_without_an_index_and_with_nine_significant_digits(tmp_path):
    table = pd.DataFrame(
        {
            "name": ["猫.png", 'a "b", c'],
            "score": [1 / 3, 123456.7890123],
            "small": [1.23456789012e-7, np.nan],
            "count": [1, 10_000_000_000],
        },
        index=[7, 8],
    )
    checkpoint.write_csv(tmp_path / "a.csv", table)
    assert (tmp_path / "a.csv").read_bytes().decode("utf-8").splitlines() == [
        "name,score,small,count",
        "猫.png,0.333333333,1.23456789e-07,1",
        '"a ""b"", c",123456.789,,10000000000',
    ]


def test_float32_numbers_survive_a_csv_exactly(tmp_path):
    values = np.random.default_rng(0).normal(size=500).astype(np.float32)
    checkpoint.write_csv(tmp_path / "a.csv", pd.DataFrame({"x": values.astype(np.float64)}))
    assert np.array_equal(pd.read_csv(tmp_path / "a.csv")["x"].astype(np.float32), values)


# Run folders


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_new_run_may_use_an_absent_and_an_empty_folder(tmp_path, exists, overwrite):
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    checkpoint.refuse_occupied(folder, overwrite=overwrite)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("a finished", checkpoint.RUN_FILES),
        ("an unfinished", ["splits.csv", "best/scorer.json"]),
        ("an unfinished", []),
    ],
)
def test_an_older_run_is_refused_unless_it_may_be_overwritten(tmp_path, kind, names):
    folder = fill_run(tmp_path / "run", *names)
    with pytest.raises(ValueError, match=rf"--output_dir .*run: holds {kind} run; .*--overwrite"):
        checkpoint.refuse_occupied(folder, overwrite=False)
    checkpoint.refuse_occupied(folder, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names", [["photo.jpg"], [".hidden"], ["config.json", "splits.csv", "model.safetensors"], ["sub/a.txt"], ["a.tmp"]]
)
def test_a_folder_with_other_things_is_never_used(tmp_path, names, overwrite):
    folder = fill(tmp_path / "things", *names)
    with pytest.raises(ValueError, match=r"--output_dir .*things: holds other things than a run"):
        checkpoint.refuse_occupied(folder, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_run_folder(tmp_path, overwrite):
    fill(tmp_path, "taken")
    with pytest.raises(ValueError, match=r"--output_dir .*taken: is a file"):
        checkpoint.refuse_occupied(tmp_path / "taken", overwrite=overwrite)


def test_preparing_removes_what_an_older_run_left_and_nothing_else(tmp_path):
    folder = fill(tmp_path / "run", *RUN_NAMES, "best/model.safetensors", "best/tokenizer/vocab.json")
    for name, data in FOREIGN.items():
        (folder / name).write_bytes(data)
    fill(folder, "better/model.safetensors")
    fill(tmp_path, "results.json")
    checkpoint.prepare_run_folder(folder)
    assert content(folder) == {**FOREIGN, "better/model.safetensors": b"{}"}
    assert not (folder / "best").exists()
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_that_is_half_removed_is_not_taken_for_a_finished_one(left, tmp_path, monkeypatch):
    """Nor for one whose states have lost the weights that they belong to."""
    folder = fill(tmp_path / "run", *RUN_NAMES, "best/model.safetensors", "state/step1.safetensors")
    removals, real = iter(range(99)), checkpoint.shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if next(removals) == left:
            raise KeyboardInterrupt
        real(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prepare_run_folder(folder)
    assert not (folder / "results.json").exists() and (folder / "config.json").exists()
    assert (folder / "best").exists() >= (folder / "state").exists()


def test_preparing_makes_a_folder_with_its_parents(tmp_path):
    checkpoint.prepare_run_folder(tmp_path / "a" / "b" / "run")
    assert (tmp_path / "a" / "b" / "run").is_dir()


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
    folder, found, description = checkpoint.load_weights(save(tmp_path / "w", state, {"scale": 0.1, "name": "猫"}))
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
    _, found, _ = checkpoint.load_weights(save(tmp_path / "w", {"a": live}))
    live += 1
    save(tmp_path / "w", {"a": live})
    assert torch.equal(found["a"], torch.zeros(1000))


def test_a_checkpoint_folder_holds_no_pickle_and_nothing_left_over(tmp_path):
    checkpoint.save_weights(
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
    _, state, description = checkpoint.load_weights(folder)
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
        checkpoint.save_weights(folder, {"new": torch.zeros(2)}, description, extra)
    assert content(tmp_path) == before


def test_processes_with_the_same_id_write_the_same_checkpoint_at_once(tmp_path):
    """In containers process ids recur."""

    def write_another(folder: Path) -> None:
        save(tmp_path / "best", {"other": torch.ones(1)})
        fill(folder, "vocab.json")

    checkpoint.save_weights(tmp_path / "best", {"mine": torch.ones(1)}, {"size": 3}, write_another)
    assert list(checkpoint.load_weights(tmp_path / "best")[1]) == ["mine"]
    assert set(content(tmp_path)) == {"best/model.safetensors", "best/scorer.json", "best/vocab.json"}


def test_a_run_folder_stands_for_the_best_in_it(tmp_path):
    fill(tmp_path, "config.json")
    save(tmp_path / "best", {"a": torch.ones(3)})
    folder, state, _ = checkpoint.load_weights(tmp_path)
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
    found = checkpoint.load_weights(folder)[1]["a"]
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
    assert set(checkpoint.digests_of_files(folder)) == {"scorer.json"}

    def vanish(path: Path) -> bytes:
        (folder / name).unlink(missing_ok=True)  # it has become the weights
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", vanish)
    checkpoint.load_weights(folder)


# Damage


def refused(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (each caller looks at the message)
        checkpoint.load_weights(folder)
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
    states = checkpoint.StateFolder(tmp_path, keep=2)
    for step in (1, 2):
        states.save(step, 1, {"step": step})
    before, said = content(tmp_path), []

    def full(*names: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(checkpoint.shutil, "copyfile", full)
        with pytest.raises(writing.NotWritten, match=r"best/model.*No space left"):
            states.load(said.append)
    assert said == [] and content(tmp_path) == before
    assert states.load(said.append) == {"step": 2}


# Where a run comes from


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository with one commit in which checkpoint.py seems to lie."""
    fill(tmp_path, "checkpoint.py")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    return tmp_path


def test_the_revision_is_the_commit_and_tells_of_changes(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert checkpoint.git_revision() == commit
    fill(repository, "a_new_file_that_git_does_not_know")
    assert checkpoint.git_revision() == commit
    (repository / "checkpoint.py").write_text("changed")
    assert checkpoint.git_revision() == f"{commit}+changes"


def test_asking_for_the_revision_leaves_the_index_alone(repository):
    os.utime(repository / "checkpoint.py", (1, 1))  # which `git status` would note there, with a lock
    before = (repository / ".git" / "index").read_bytes()
    assert checkpoint.git_revision() == git(repository, "rev-parse", "HEAD")
    assert (repository / ".git" / "index").read_bytes() == before


def test_outside_git_the_revision_is_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    assert checkpoint.git_revision() == ""


def test_without_git_installed_the_revision_is_empty(repository, monkeypatch):
    assert checkpoint.git_revision() != ""
    monkeypatch.setenv("PATH", str(repository))
    assert checkpoint.git_revision() == ""


def test_the_environment_names_versions_and_revision(repository, monkeypatch):
    monkeypatch.setattr(checkpoint, "PACKAGES", (*checkpoint.PACKAGES, "no-such-package-at-all"))
    found = checkpoint.environment()
    versions = found["versions"]
    assert found["git_revision"] == git(repository, "rev-parse", "HEAD")
    assert versions["numpy"] == np.__version__ and versions["pandas"] == pd.__version__
    assert versions["torch"] == version("torch")
    assert versions["python"].count(".") == 2
    assert {"open_clip_torch", "transformers", "torchvision", "scipy", "scikit-learn"} <= versions.keys()
    assert versions["no-such-package-at-all"] == "not installed"
    json.dumps(found, allow_nan=False)


def kept(
    every_seconds: float, constant: tuple[str, ...] = ()
) -> tuple[checkpoint.LatestState, list[dict[str, Tensor]]]:
    """A LatestState, and what it has written so far."""
    written: list[dict[str, Tensor]] = []
    return checkpoint.LatestState(
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
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
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
