"""Disks that are full or cannot be written in mid-run: it is told in a line, and what was saved is intact."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ROOT
from stopped_runs import differences, flags_of, run_until, wait_for

import baseline
from training import checkpoints


def mounted(folder: Path, *options: str) -> bool:
    """Whether a small file system in memory could be mounted there."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    return (
        shutil.which("mount") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.fixture
def small_disk(tmp_path) -> Any:
    """A folder on a disk of 40 MB: room for two states and the best weights, not for more."""
    if not mounted(tmp_path / "disk", "-o", "size=40m"):
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.torture
def test_a_full_disk_is_told_and_what_was_saved_is_intact(small_disk, demo_set, tmp_path, capsys, figure):
    argv = flags_of(demo_set, "--freeze_clip", "--save_every_minutes", "1e-9")
    folder = small_disk / "run"
    run_until(argv, folder, 17)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(b"x" * (free - 100_000))
    with pytest.raises(SystemExit) as caught:
        baseline.main([*argv, "--output_dir", str(folder), "--resume", "auto"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'state'}") and "No space left on device" in error
    assert error.count("\n") == 1 and "what was there before is kept" in error
    assert {path: path.read_bytes() for path in before} == before
    (small_disk / "other").unlink()
    run_until([*argv, "--resume", "auto"], folder, None)
    run_until(argv, tmp_path / "whole", None)
    assert differences(tmp_path / "whole", folder) == []
    figure("disk full", "told in one line, earlier states intact, 0 bits differ after --resume")


@pytest.mark.torture
def test_a_folder_that_becomes_read_only_is_told_and_keeps_what_it_has(small_disk, demo_set, capsys, figure):
    argv = flags_of(demo_set, "--freeze_clip", "--save_every_minutes", "1e-9", "--output_dir", str(small_disk / "run"))
    real = pd.DataFrame.to_csv
    calls = [0]

    def read_only_then(self: pd.DataFrame, *given: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:  # metrics.csv of the second epoch
            subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        return real(self, *given, **options)

    pd.DataFrame.to_csv = read_only_then  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(SystemExit) as caught:
            baseline.main(argv)
    finally:
        pd.DataFrame.to_csv = real  # type: ignore[method-assign]
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Read-only file system" in error and error.count("\n") == 1
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    states = checkpoints.StateFolder(small_disk / "run", keep=2)
    assert states.load(print) is not None
    checkpoints.load_weights(small_disk / "run")
    figure("read-only in mid-run", "told in one line, weights and states intact")


@pytest.mark.slow
@pytest.mark.torture
def test_a_folder_that_may_no_longer_be_written_is_told_and_the_run_goes_on_later(demo_set, tmp_path, figure):
    argv = flags_of(demo_set, "--freeze_clip", "--epochs", "25")
    often, folder = ["--save_every_minutes", "1e-9"], tmp_path / "run"
    obeying: list[str] = []
    if os.geteuid() == 0:  # root is not held back by permissions, unless it gives that right up
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, or another user than root")
        obeying = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    process = subprocess.Popen(
        [*obeying, sys.executable, str(ROOT / "baseline.py"), *argv, *often, "--output_dir", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    wait_for((folder / "best" / "model.safetensors").exists)
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))]
    for path in folders:
        path.chmod(0o500)
    _, error = process.communicate(timeout=120)
    for path in folders:
        path.chmod(0o700)
    assert process.returncode == 2
    assert error.startswith(f"error: {folder}") and "Permission denied" in error and error.count("\n") == 1, error
    checkpoints.load_weights(folder)
    run_until([*argv, "--resume", "auto"], folder, None)
    run_until(argv, tmp_path / "whole", None)
    assert differences(tmp_path / "whole", folder) == []
    figure("permission lost in mid-run", "told in one line, 0 bits differ after --resume")
