"""Runs in two processes: they compute what one process computes, and one of them speaks; and torchrun's jobs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from both_processes import SIZES, coupled, module
from conftest import ROOT
from safetensors.torch import load_file
from stopped_runs import OF_TIME, differences
from torch import Tensor
from two_processes import session

import baseline
from training import devices

pytestmark = pytest.mark.slow  # tests/training/test_fit.py has two processes in the quick part

TINY = "--clip_model tiny --clip_pretrained none --image_size 56 --dropout 0 --device cpu --loss mse --no_report"
# Of the 40 images for training, batches of 13 leave a last one of a single image: one process has no share of it.
CASES = {
    "thawing": f"{TINY} --unfreeze_schedule 23@0,22@1 --epochs 2 --lr 1e-3 --batch_size 16 --use_explanations "
    "--preset auto",
    "whole": f"{TINY} --loss mse+plcc --epochs 2 --lr 1e-4 --batch_size 13 --no_test --tensorboard",
    "quality": f"{TINY} --epochs 2 --lr 1e-4 --batch_size 7 --gradient_accumulation_steps 2 --ema_decay 0.5",
}
# Each process has generators of its own, which drop out other rows.
DROPOUT = f"{TINY} --dropout 0.3 --freeze_clip --epochs 2 --lr 1e-3 --batch_size 5"


def job(*arguments: str, cwd: Path) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Start baseline.py in two processes, as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return session([*command, str(ROOT / "baseline.py"), *arguments], cwd)


@dataclass(frozen=True)
class Runs:
    """Runs of the same cases by one process and by two, what each printed, and what the two brought together."""

    folders: dict[str, tuple[Path, Path]]
    printed: dict[str, str]  # of the case "thawing", by "one", and by the "first" and the "second" of two
    place: Path  # where the two ran "thawing"
    ranks: list[dict]


@pytest.fixture(scope="module")
def runs(demo_set, tmp_path_factory) -> Runs:
    """All runs of the tests that are not slow: two processes start once. Read them, do not change them."""
    place = tmp_path_factory.mktemp("distributed")
    table = pd.read_csv(demo_set[0]).drop(columns="mos_align")
    table.loc[table.index % 5 == 0, "mos_quality"] = np.nan
    table.to_csv(place / "quality.csv", index=False)

    def flags(name: str) -> list[str]:
        csv_path = place / "quality.csv" if name == "quality" else demo_set[0]
        return ["--data_csv_path", str(csv_path), "--image_base_dir", str(demo_set[1]), *shlex.split(CASES[name])]

    def to(folder: Path) -> list[str]:
        return ["--output_dir", str(folder), "--cache_dir", str(folder.with_name(f"{folder.name}-cache"))]

    printed = {}
    for name in CASES:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            baseline.main([*flags(name), *to(place / f"one-{name}")])
        printed[name] = out.getvalue()

    others = [name for name in CASES if name != "thawing"]
    data = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1]), *shlex.split(DROPOUT)]
    job = {
        "runs": [*([*flags(name), *to(place / f"two-{name}")] for name in others), [*data, *to(place / "whole")]],
        "stopped": [*data, *to(place / "stopped")],
        "main": flags("thawing"),  # as a user would: all folders are the default ones
    }
    (place / "job.json").write_text(json.dumps(job))
    user = place / "user"
    user.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("both_processes.py")), str(place), str(place / "job.json")]
    with session(command, user, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}") as started:
        _, err = started.communicate(timeout=180)
    assert started.returncode == 0, err
    (thawing,) = (user / "runs").iterdir()
    said = [(place / f"said{rank}.txt").read_text() for rank in range(2)]
    return Runs(
        folders={name: (place / f"one-{name}", place / f"two-{name}") for name in others}
        | {"thawing": (place / "one-thawing", thawing)},
        printed={"one": printed["thawing"], "first": said[0], "second": said[1]},
        place=user,
        ranks=[torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in range(2)],
    )


# Whole runs


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(runs, name):
    one, two = (pd.read_csv(folder / "metrics.csv") for folder in runs.folders[name])
    assert one.columns.tolist() == two.columns.tolist()
    assert len(one) >= 2 and one["loss"].nunique() == len(one)
    np.testing.assert_allclose(two.drop(columns=OF_TIME), one.drop(columns=OF_TIME), rtol=1e-4, atol=1e-4)
    terms = [column for column in one if "loss" in column]
    np.testing.assert_allclose(two[terms], one[terms], rtol=3e-4)  # a correlation magnifies rounding


@pytest.mark.parametrize("name", CASES)
def test_two_processes_predict_as_one_does(runs, name):
    one, two = (pd.read_csv(folder / "predictions.csv") for folder in runs.folders[name])
    words = ["name", "set", "split", "prompt", "generator"]
    assert two[words].equals(one[words])
    np.testing.assert_allclose(two.drop(columns=words), one.drop(columns=words), rtol=1e-4)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in runs.folders[name])
    assert second["best_epoch"] == first["best_epoch"]
    assert (first["test"] == {}) == (name == "whole")
    for part in ("val",) if name == "whole" else ("val", "test"):
        assert second[part] == pytest.approx(first[part], rel=1e-4, abs=1e-4)
        assert second["base"][part] == pytest.approx(first["base"][part], rel=1e-4, abs=1e-4)


def without_key_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the biases of attention keys: softmax ignores them, so that their gradient is rounding alone."""
    kept = dict(state)
    for name, value in state.items():
        if name.endswith("attn.in_proj_bias"):
            query, _, values = value.chunk(3)
            kept[name] = torch.cat([query, values])
    return kept


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_with_the_weights_of_one(runs, name):
    one, two = (without_key_biases(load_file(folder / "best" / "model.safetensors")) for folder in runs.folders[name])
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_two_processes_that_are_stopped_go_on_as_if_they_had_not_been(runs):
    place = runs.place.parent
    assert {path.name for path in place.glob("stopped?")} == {"stopped0", "stopped1"}
    assert len(json.loads((place / "stopped" / "results.json").read_text())["resumed"]) == 1
    assert differences(place / "whole", place / "stopped") == []


def test_the_run_says_how_many_processes_it_had(runs):
    configs = [json.loads((folder / "config.json").read_text()) for folder in runs.folders["thawing"]]
    assert [config["provenance"]["resolved"]["processes"] for config in configs] == [1, 2]


def test_one_process_of_the_two_speaks_and_writes(runs):
    first_words = {kind: [line.split()[0] for line in text.splitlines()] for kind, text in runs.printed.items()}
    assert first_words["first"] == first_words["one"]
    assert {"data", "machine", "cache", "advice", "epoch", "test", "run"} <= set(first_words["first"])
    assert "machine   2 processes, " in runs.printed["first"]
    assert runs.printed["second"] == ""
    assert {item.name for item in runs.place.iterdir()} == {"runs", ".cache"}
    one, two = ({item.name for item in folder.rglob("*")} for folder in runs.folders["thawing"])
    assert two == one


def test_both_take_the_preset_and_get_the_same_advice(runs):
    one, two = (json.loads((folder / "results.json").read_text()) for folder in runs.folders["thawing"])
    assert two["advice"] and two["advice"] == one["advice"]
    saved = json.loads((runs.folders["thawing"][1] / "config.json").read_text())
    assert (saved["preset"], saved["epochs"]) == ("small", 2)


def test_two_processes_leave_the_test_fold_unread_and_one_of_them_tracks(runs):
    folder = runs.folders["whole"][1]
    assert json.loads((folder / "results.json").read_text())["test"] == {}
    assert "test" not in set(pd.read_csv(folder / "predictions.csv")["split"])
    assert len(list((folder / "tensorboard").iterdir())) == 1


# A failure, or a request to stop: each needs two processes of its own


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_job_with_its_message(demo_set, tmp_path):
    occupied = tmp_path / "run"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1]), "--output_dir", str(occupied)]
    with job(*paths, *shlex.split(CASES["whole"]), cwd=tmp_path) as started:
        out, err = started.communicate(timeout=120)
    assert started.returncode != 0
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        f"error: --output_dir {occupied}: holds other things than a run; choose a new or empty folder"
    ]
    assert "epoch" not in out
    assert [item.name for item in occupied.iterdir()] == ["thesis.txt"]


def train_two(demo_set: tuple[Path, Path], folder: Path, flags: str) -> contextlib.AbstractContextManager:
    """Start two processes that train into a folder."""
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1]), "--output_dir", str(folder)]
    return job(*paths, *shlex.split(flags), cwd=folder.parent)


def await_first_epoch(started: subprocess.Popen[str], folder: Path) -> None:
    """Return when the run in the folder has finished an epoch."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.csv").exists():
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_job_and_is_named(demo_set, tmp_path):
    folder = tmp_path / "run"
    with train_two(demo_set, folder, f"{CASES['whole']} --epochs 500") as started:
        await_first_epoch(started, folder)
        (victim,) = [process for process in children(started.pid) if b"\0RANK=1\0" in environment(process)]
        os.kill(victim, signal.SIGKILL)
        _, err = started.communicate(timeout=120)
    assert started.returncode != 0
    assert "Signal 9 (SIGKILL)" in err and f"pid: {victim}" in err
    assert not (folder / "results.json").exists()
    pd.read_csv(folder / "metrics.csv")


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_saves_and_the_same_command_goes_on(demo_set, tmp_path):
    """torchrun hands its SIGTERM to the processes, and waits for them."""
    flags = f"{DROPOUT} --epochs 30 --resume auto"
    whole, part = tmp_path / "whole", tmp_path / "part"
    with train_two(demo_set, whole, flags) as started:
        _, err = started.communicate(timeout=180)
        assert started.returncode == 0, err
    with train_two(demo_set, part, flags) as started:
        await_first_epoch(started, part)
        started.send_signal(signal.SIGTERM)
        _, err = started.communicate(timeout=120)
    assert started.returncode != 0
    assert f"stopped and saved: --resume {part} goes on from there" in err, err
    assert len(list((part / "state").glob("step*"))) == 1 and not (part / "results.json").exists()
    with train_two(demo_set, part, flags) as started:
        out, err = started.communicate(timeout=180)
    assert started.returncode == 0 and "resume    epoch" in out, err
    assert differences(whole, part) == []


@pytest.mark.slow
def test_an_image_that_is_lost_in_mid_run_ends_the_job_and_is_named(demo_set, tmp_path):
    """Each process would meet it at another time, or never: several cannot leave it out as one does."""
    pictures = shutil.copytree(demo_set[1], tmp_path / "images")
    reading = "--no_cache --image_memory_gb 0 --cache_max_gb 0 --bad_images skip"
    folder = tmp_path / "run"
    with train_two((demo_set[0], pictures), folder, f"{DROPOUT} {reading} --epochs 500") as started:
        await_first_epoch(started, folder)
        splits = pd.read_csv(folder / "splits.csv")
        lost = splits["path"][splits["split"] == "train"].iloc[3]
        Path(lost).unlink()
        _, err = started.communicate(timeout=180)
    assert started.returncode != 0
    assert f"error: 1 image(s) can no longer be read: {lost}" in err, err
    assert "several processes cannot leave out images in mid-run" in err
    assert not (folder / "results.json").exists() and not (folder / "skipped.csv").exists()


def children(process: int) -> list[int]:
    """Processes that this one has started."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def environment(process: int) -> bytes:
    """Variables of a process, between zeros."""
    return b"\0" + Path(f"/proc/{process}/environ").read_bytes()


def test_batches_are_not_cut_in_several_processes(demo_set, tmp_path, monkeypatch, capsys):
    alone = devices.start_runtime("cpu", "off")
    monkeypatch.setattr(devices, "start_runtime", lambda *_: replace(alone, world=2))
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    with pytest.raises(SystemExit) as exit_:
        baseline.main([*paths, "--output_dir", str(tmp_path / "run"), *shlex.split(TINY), "--dynamic_batch_size"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: --dynamic_batch_size: ")


# What brings processes together


@pytest.mark.parametrize("place", range(len(SIZES)))
def test_all_processes_see_the_whole_batch_in_its_order(runs, place):
    _, predict, _ = coupled(SIZES[place])
    expected = predict(np.arange(SIZES[place])).detach()
    assert [found["world"] for found in runs.ranks] == [2, 2]
    for found in runs.ranks:
        torch.testing.assert_close(found["gathered"][place], expected)


@pytest.mark.parametrize("place", range(len(SIZES)))
def test_gradients_summed_over_processes_are_those_of_one(runs, place):
    weight, predict, loss = coupled(SIZES[place])
    loss(predict(np.arange(SIZES[place]))).backward()
    parts = [found["gradients"][place] for found in runs.ranks]
    torch.testing.assert_close(parts[0] + parts[1], weight.grad)
    assert bool(parts[1].any()) == (SIZES[place] > 1)


def test_all_processes_take_the_first_ones_value(runs):
    assert [found["rank"] for found in runs.ranks] == [0, 1]
    assert [found["agreed"] for found in runs.ranks] == 2 * [{"rank": 0, "words": ["a"]}]


def test_all_processes_take_the_first_ones_weights_and_buffers(runs):
    expected = module(0).state_dict()
    for found in runs.ranks:
        assert found["copied"].keys() == expected.keys()
        assert all(torch.equal(found["copied"][name], value) for name, value in expected.items())
    assert not any(torch.equal(module(1).state_dict()[name], value) for name, value in list(expected.items())[:2])


def test_what_the_first_process_makes_the_others_find(runs):
    assert [found["found_it_made"] for found in runs.ranks] == [True, True]
