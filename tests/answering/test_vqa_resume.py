"""A run of main.py that is stopped, killed or broken anywhere goes on as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from conftest import ROOT
from folders import content
from small_vqa import (
    NUM_STEPS,
    NUM_TRAIN,
    TINY,
    differences,
    drawn_features,
    drawn_set,
    error_of,
    people,
    read,
    run_until,
    tiny_flags,
    write_table,
)
from stopped_runs import wait_for

import main
from answering import task
from answering.configs import parse_args
from training import checkpoints

pytestmark = pytest.mark.usefixtures("trained_weights_are_kept")

KINDS = {
    "as it comes": [],
    "accumulated and averaged": ["--batch_size", "9", "--update_freq", "2", "--ema_decay", "0.9"],
}
OFTEN = ["--save_every_minutes", "1e-9"]  # after every step


def stop_and_go_on(argv: list[str], whole: Path, part: Path, *places: int) -> None:
    """Stop a run at its n-th look, go on to the next stop, and so on to its end: it is the whole one."""
    shutil.rmtree(part, ignore_errors=True)
    for place in places:
        run_until(argv, part, place)
        assert list((part / "state").glob("step*")) and not (part / "results.json").exists()
    run_until(argv, part, None)
    assert differences(whole, part) == [], places
    assert not (part / "state").exists()
    assert len(read(part / "results.json")["resumed"]) == len(places)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trained_weights_are_kept) -> dict[str, tuple[Path, int]]:
    """Runs of each kind that nobody has stopped, and how often they looked. Read them, do not change them."""
    place = tmp_path_factory.mktemp("whole")
    return {name: (place / name, run_until(tiny_flags(*flags), place / name, None)) for name, flags in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(kind, whole, tmp_path):
    """In the middle of the first epoch, and of the second."""
    folder, looks = whole[kind]
    assert read(folder / "results.json")["best_epoch"] > 0
    stop_and_go_on(tiny_flags(*KINDS[kind]), folder, tmp_path / "part", looks // 4, looks // 2)


def test_a_run_that_is_stopped_before_and_after_training_does_too(whole, tmp_path):
    """Before the untrained model is measured, and while the test fold is answered."""
    folder, looks = whole["as it comes"]
    stop_and_go_on(tiny_flags(*KINDS["as it comes"]), folder, tmp_path / "part", 1, looks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_anywhere_does(kind, whole, tmp_path):
    folder, looks = whole[kind]
    for place in range(2, looks, 5):
        stop_and_go_on(tiny_flags(*KINDS[kind]), folder, tmp_path / "part", place)


def test_what_a_kill_leaves_is_gone_on_with(tmp_path):
    """The folder is copied in mid-run: there is no more than that where a run is killed."""
    argv = tiny_flags("--question_only", "--batch_size", "64", *OFTEN, "--keep_states", "1")

    def copy(row: Any) -> None:
        if row["epoch"] == 2:
            shutil.copytree(tmp_path / "whole", tmp_path / "killed")

    main.run(parse_args([*argv, "--output", str(tmp_path / "whole")]), after_epoch=copy)
    assert len(list((tmp_path / "killed" / "state").glob("step*"))) == 1
    (tmp_path / "killed" / ".metrics.csv.123.tmp").write_text("half")
    run_until(argv, tmp_path / "killed", None)
    # That the epoch was over had not been saved yet.
    assert read(tmp_path / "killed" / "results.json")["resumed"] == [{"epoch": 2, "step": -(-NUM_TRAIN // 64)}]
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    assert not list((tmp_path / "killed").glob(".*"))


def command(*argv: str) -> dict[str, Any]:
    """What starts main.py in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return {"args": [sys.executable, str(ROOT / "main.py"), *argv], "env": environment, "text": True}


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path):
    argv = tiny_flags("--epochs", "6", *OFTEN)
    subprocess.run(**command(*argv, "--output", str(tmp_path / "whole")), check=True, capture_output=True)
    part = tmp_path / "part"
    for kills in range(3):
        own = ["--resume", str(part)] if kills else [*argv, "--output", str(part)]
        with subprocess.Popen(**command(*own), stdout=subprocess.DEVNULL) as process:
            wait_for(lambda before=20 * kills: newest_step(part) > before + 10)
            process.send_signal(signal.SIGKILL)
        assert not (part / "results.json").exists()
    done = subprocess.run(**command("--resume", str(part)), check=True, capture_output=True)
    assert "resume    epoch" in done.stdout
    assert differences(tmp_path / "whole", part) == []


def newest_step(folder: Path) -> int:
    """Of the states in a run folder; 0 if there is none."""
    return max((int(path.name[4:14]) for path in (folder / "state").glob("step*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_a_run_after_its_step_with_exit_code_75(name, tmp_path):
    folder = tmp_path / "run"
    own = command(*tiny_flags("--epochs", "5000"), "--output", str(folder))
    with subprocess.Popen(**own, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(lambda: (folder / "metrics.csv").exists())
        asked = time.monotonic()
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and time.monotonic() - asked < 30
    assert said.splitlines()[-2:] == [
        f"{name}: saving after this step; once more stops at once, without",
        f"stopped and saved: --resume {folder} goes on from there",
    ]
    assert checkpoints.StateFolder(folder, keep=2).load(print)


# What is gone on with


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, whole) -> Path:
    """The folder of a run that was stopped in its second epoch. Copy it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run_until(tiny_flags(*KINDS["as it comes"]), folder, whole["as it comes"][1] // 2)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path) -> Path:
    """The same, to be gone on with or damaged."""
    return shutil.copytree(stopped_once, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lr", "0.1"], "--lr would make it another run; drop it, or start a new one"),
        (["--question_only"], "--question_only would make it another run"),
        (["--output", "elsewhere"], "--output would make it another run"),
        (["--overwrite"], "--overwrite would make it another run"),
        (["--gamma", "0"], "--gamma would make it another run"),
    ],
)
def test_other_options_are_refused(flags, said, stopped, capsys):
    before = content(stopped)
    assert said in error_of("--resume", str(stopped), *flags, capsys=capsys)
    assert content(stopped) == before


def test_what_is_said_of_a_run_may_change(stopped, whole, capsys):
    main.main(["--resume", str(stopped), "--use_report", "--advice", "off"])
    lines = capsys.readouterr().out.splitlines()
    assert f"resume    {stopped}" in lines
    (told,) = [line for line in lines if line.startswith("resume    epoch 2 after ")]
    assert told.endswith(f" of {NUM_STEPS} steps")
    assert (stopped / "report.html").exists()
    assert differences(whole["as it comes"][0], stopped) == ["command"]  # with the options that are said


def test_without_a_state_that_can_be_read_the_run_starts_again_and_says_so(stopped, whole, capsys):
    for path in (stopped / "state").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    main.main(["--resume", str(stopped)])
    said = capsys.readouterr().out
    assert "damaged checkpoint" in said and "resume    no state was saved: from the start" in said
    assert differences(whole["as it comes"][0], stopped) == []


def test_changed_data_is_refused(tmp_path, capsys):
    table = write_table(tmp_path)
    data = ["--dataset", "csv", "--data_csv_path", str(table), "--question_only", *TINY, "--no_report"]
    run_until(data, tmp_path / "run", 5)
    before, text = content(tmp_path / "run"), table.read_text()
    for old, new in (("yes|yes it is", "yes"), ("Is there a circle?", "Is there a ring?")):
        table.write_text(text.replace(old, new, 1))
        error = error_of("--resume", str(tmp_path / "run"), capsys=capsys)
        assert "the data has changed since the run began; restore it, or start another run" in error
        assert content(tmp_path / "run") == before
    table.write_text(text)
    config = read(tmp_path / "run" / "config.json")
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "provenance": None}))
    assert "the data has changed" in error_of("--resume", str(tmp_path / "run"), capsys=capsys)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert main.main(["--resume", str(tmp_path / "run")])["epochs"] == 2


def test_changed_features_are_refused(tmp_path, capsys):
    shutil.copytree(drawn_features("VQA").parent, tmp_path / "features")
    path = tmp_path / "features" / drawn_features("VQA").name
    data = ["--dataset", "VQA", "--data_root", str(drawn_set("VQA")), "--features", str(path), *TINY, "--no_report"]
    run_until([*data, "--cache_dir", str(tmp_path / "cache")], tmp_path / "run", 5)
    with h5py.File(path, "r+") as file:
        file["image_features"][...] = file["image_features"][()][::-1]
    assert "the data has changed" in error_of("--resume", str(tmp_path / "run"), capsys=capsys)


def test_a_finished_run_is_left_alone(whole, capsys):
    folder = whole["as it comes"][0]
    before, times = content(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main.main(["--resume", str(folder)]) == read(folder / "results.json")
    assert f"{folder} is finished; nothing is left to do" in capsys.readouterr().out
    assert content(folder) == before and {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_a_loss_that_is_not_finite_is_told_with_its_questions_and_can_be_repeated(tmp_path, monkeypatch, capsys):
    folder, real, seen = tmp_path / "run", task.losses_of, []

    def broken(logits_BA: torch.Tensor, *given: Any) -> torch.Tensor:
        found = real(logits_BA, *given)
        if logits_BA.requires_grad:  # in training
            seen.append(found.detach().clone())
            if len(seen) == NUM_STEPS + 4 and not (folder / "failure.json").exists():  # fourth step of the second epoch
                return found * math.nan
        return found

    monkeypatch.setattr(task, "losses_of", broken)
    with pytest.raises(SystemExit) as caught:
        main.main([*tiny_flags(), "--output", str(folder)])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("failed: loss is nan at step 4 of this epoch: lower --lr")
    told = read(folder / "failure.json")
    assert (told["metric"], told["value"], told["epoch"], told["step"]) == ("loss", "nan", 2, 4)
    assert len(set(told["questions"])) == 16 and set(told["questions"]) <= set(people("GQA", "train"))
    assert told["repeat"] == f"python main.py --resume {folder}"
    # The saved state repeats that very step: the same questions, weights and dropout.
    expected = seen[-1]
    seen.clear()
    main.main(["--resume", str(folder)])
    assert torch.equal(seen[0], expected)
    assert not (folder / "failure.json").exists() and (folder / "results.json").exists()
