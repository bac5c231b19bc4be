"""`training/run_folder.py`: run folders that are not mixed up, and that say where they come from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from folders import content, fill

from training import run_folder

FOREIGN = {"notes.txt": b"mine", "config.csv": b"a,b\n"}
RUN_NAMES = ["config.json", "splits.csv", "metrics.csv", "results.json", "predictions.csv"]


def fill_run(folder: Path, *names: str) -> Path:
    """A run folder, told by what its config.json says, with files of these names."""
    fill(folder, "config.json", *names)
    (folder / "config.json").write_text('{"provenance": {}}')
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_new_run_may_use_an_absent_and_an_empty_folder(tmp_path, exists, overwrite):
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    run_folder.refuse_occupied(folder, overwrite=overwrite)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("a finished", run_folder.RUN_FILES),
        ("an unfinished", ["splits.csv", "best/scorer.json"]),
        ("an unfinished", []),
    ],
)
def test_an_older_run_is_refused_unless_it_may_be_overwritten(tmp_path, kind, names):
    folder = fill_run(tmp_path / "run", *names)
    with pytest.raises(ValueError, match=rf"--output_dir .*run: holds {kind} run; .*--overwrite"):
        run_folder.refuse_occupied(folder, overwrite=False)
    run_folder.refuse_occupied(folder, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names", [["photo.jpg"], [".hidden"], ["config.json", "splits.csv", "model.safetensors"], ["sub/a.txt"], ["a.tmp"]]
)
def test_a_folder_with_other_things_is_never_used(tmp_path, names, overwrite):
    folder = fill(tmp_path / "things", *names)
    with pytest.raises(ValueError, match=r"--output_dir .*things: holds other things than a run"):
        run_folder.refuse_occupied(folder, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_run_folder(tmp_path, overwrite):
    fill(tmp_path, "taken")
    with pytest.raises(ValueError, match=r"--output_dir .*taken: is a file"):
        run_folder.refuse_occupied(tmp_path / "taken", overwrite=overwrite)


def test_preparing_removes_what_an_older_run_left_and_nothing_else(tmp_path):
    folder = fill(tmp_path / "run", *RUN_NAMES, "best/model.safetensors", "best/tokenizer/vocab.json")
    for name, data in FOREIGN.items():
        (folder / name).write_bytes(data)
    fill(folder, "better/model.safetensors")
    fill(tmp_path, "results.json")
    run_folder.prepare_run_folder(folder)
    assert content(folder) == {**FOREIGN, "better/model.safetensors": b"{}"}
    assert not (folder / "best").exists()
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_that_is_half_removed_is_not_taken_for_a_finished_one(left, tmp_path, monkeypatch):
    """Nor for one whose states have lost the weights that they belong to."""
    folder = fill(tmp_path / "run", *RUN_NAMES, "best/model.safetensors", "state/step1.safetensors")
    removals, real = iter(range(99)), shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if next(removals) == left:
            raise KeyboardInterrupt
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run_folder.prepare_run_folder(folder)
    assert not (folder / "results.json").exists() and (folder / "config.json").exists()
    assert (folder / "best").exists() >= (folder / "state").exists()


def test_preparing_makes_a_folder_with_its_parents(tmp_path):
    run_folder.prepare_run_folder(tmp_path / "a" / "b" / "run")
    assert (tmp_path / "a" / "b" / "run").is_dir()


# Where a run comes from


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository with one commit in which run_folder.py seems to lie."""
    fill(tmp_path, "run_folder.py")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))
    return tmp_path


def test_the_revision_is_the_commit_and_tells_of_changes(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert run_folder.git_revision() == commit
    fill(repository, "a_new_file_that_git_does_not_know")
    assert run_folder.git_revision() == commit
    (repository / "run_folder.py").write_text("changed")
    assert run_folder.git_revision() == f"{commit}+changes"


def test_asking_for_the_revision_leaves_the_index_alone(repository):
    os.utime(repository / "run_folder.py", (1, 1))  # which `git status` would note there, with a lock
    before = (repository / ".git" / "index").read_bytes()
    assert run_folder.git_revision() == git(repository, "rev-parse", "HEAD")
    assert (repository / ".git" / "index").read_bytes() == before


def test_outside_git_the_revision_is_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))
    assert run_folder.git_revision() == ""


def test_within_the_repository_of_somebody_else_the_revision_is_empty(repository, monkeypatch):
    fill(repository, "environment/site-packages/run_folder.py")
    monkeypatch.setattr(run_folder, "__file__", str(repository / "environment" / "site-packages" / "run_folder.py"))
    assert run_folder.git_revision() == ""


def test_without_git_installed_the_revision_is_empty(repository, monkeypatch):
    assert run_folder.git_revision() != ""
    monkeypatch.setenv("PATH", str(repository))
    assert run_folder.git_revision() == ""


def test_the_environment_names_versions_and_revision(repository, monkeypatch):
    monkeypatch.setattr(run_folder, "PACKAGES", (*run_folder.PACKAGES, "no-such-package-at-all"))
    found = run_folder.environment()
    versions = found["versions"]
    assert found["git_revision"] == git(repository, "rev-parse", "HEAD")
    assert versions["numpy"] == np.__version__ and versions["pandas"] == pd.__version__
    assert versions["torch"] == version("torch")
    assert versions["python"].count(".") == 2
    assert {"open_clip_torch", "transformers", "torchvision", "scipy", "scikit-learn"} <= versions.keys()
    assert versions["no-such-package-at-all"] == "not installed"
    json.dumps(found, allow_nan=False)
