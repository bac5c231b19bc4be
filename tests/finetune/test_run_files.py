"""`finetune.run_files`: folders of runs that are given no name."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from finetune import run_files
from guidance.arguments import parse_args
from training import run_folder


def test_runs_that_start_in_one_second_get_folders_of_their_own_and_one_that_fails_leaves_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_args(["--demo"])
    with contextlib.ExitStack() as running:
        folders = {running.enter_context(run_files.with_folder(config)).output_dir for _ in range(20)}
        assert len(folders) == 20 and all(Path(str(folder)).is_dir() for folder in folders)
    assert list(tmp_path.iterdir()) == []
    looked = [Path("runs/a"), Path("runs/a"), Path("runs/b")]
    Path("runs/a").mkdir(parents=True)  # another run makes it after this one has looked
    monkeypatch.setattr(run_folder, "free_folder", lambda name: looked.pop(0))
    with run_files.with_folder(config) as named:
        assert named == replace(config, output_dir="runs/b")
    assert [path.name for path in Path("runs").iterdir()] == ["a"]
