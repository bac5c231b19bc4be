"""A run that is stopped or killed anywhere goes on as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from stopped_runs import StopsAt, differences, flags_of, run_until, unequal, wait_for
from torch import Tensor

import baseline
import data
import losses
from finetune.frozen_clip import FrozenLayers
from guidance.arguments import parse_args
from multirun import protocol
from storage import locks
from training import checkpoints, devices, resuming, run_folder, signals

pytestmark = pytest.mark.usefixtures("trained_weights_are_kept")

SHOWN = ("--use_test", "--use_report")
FROZEN = "--freeze_clip"  # of most runs here, and of `whole`
CPU = devices.Runtime(torch.device("cpu"), "off", torch.amp.GradScaler("cpu", enabled=False))

KINDS = {
    "frozen, early stopping": ["--freeze_clip", "--early_stopping_patience", "1", "--epochs", "6"],
    "thawed step by step, averaged": ["--unfreeze_schedule", "22@0,20@1", "--ema_decay", "0.9", "--epochs", "2"],
    "LoRA, accumulated": ["--lora_rank", "2", "--freeze_layers", "22", "--gradient_accumulation_steps", "3"],
    "refinement, crops, no cache": [
        *("--no_residual_learning", "--use_refinement", "--freeze_clip", "--no_cache"),
        *("--crops", "2", "--global_view", "--scheduler", "cyclic"),
    ],
    "all trained, odd batches": ["--batch_size", "7", "--gradient_accumulation_steps", "2", "--layer_decay", "0.8"],
}


@pytest.fixture(scope="module")
def whole(demo_set, tmp_path_factory) -> Path:
    """A run with FROZEN that nobody has stopped. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_until(flags_of(demo_set, FROZEN), folder, None)
    assert json.loads((folder / "results.json").read_text())["best_epoch"] > 0
    assert "stage_mean" in checkpoints.load_weights(folder)[1]  # statistics of stages are read
    return folder


def stop_and_go_on(argv: list[str], whole: Path, part: Path, place: int, num_looks: int) -> None:
    """Stop a run at one of its looks, go on, stop it again soon after, and go on to the end: it is the whole one."""
    shutil.rmtree(part, ignore_errors=True)
    run_until(argv, part, place)
    assert len(list((part / "state").glob("step*"))) == 1
    second = min(num_looks - place, 2)
    if second > 1:
        run_until([*argv, "--resume", "auto"], part, second)
    run_until([*argv, "--resume", "auto"], part, None)
    assert differences(whole, part) == [], place
    assert not (part / "state").exists()
    resumed = json.loads((part / "results.json").read_text())["resumed"]
    assert len(resumed) == 1 + (second > 1)


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True)])
def test_a_run_goes_on_in_the_precision_that_it_began_in(demo_set, tmp_path, monkeypatch, capsys, first, then):
    """On a CPU, where auto tries what is fast: another machine may say something else."""
    argv = flags_of(demo_set, FROZEN)
    monkeypatch.setattr(devices, "LEAST_WEIGHTS", 1)
    for is_fast, place in ((first, 4), (then, None)):
        monkeypatch.setattr(devices, "has_fast_bf16", lambda is_fast=is_fast: is_fast)
        run_until([*argv, "--resume", "auto"], tmp_path / "run", place)
        assert ("bf16 autocast" in capsys.readouterr().out) == first


def test_a_run_that_is_stopped_ends_as_one_that_is_not(demo_set, tmp_path):
    """In the first epoch, after which layers thaw, and while the test fold is scored."""
    argv = flags_of(demo_set, *KINDS["thawed step by step, averaged"], "--use_test", "--keep_states", "1")
    num_looks = run_until(argv, tmp_path / "whole", None)
    for place in (4, num_looks):
        stop_and_go_on(argv, tmp_path / "whole", tmp_path / "part", place, num_looks)


@pytest.mark.torture
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_that_is_stopped_does(kind, demo_set, tmp_path, is_torture, figure):
    """Between two steps, in the middle of validation, between epochs and while the test fold is scored."""
    argv = flags_of(demo_set, *KINDS[kind], "--use_test", "--keep_states", "1")
    num_looks = run_until(argv, tmp_path / "whole", None)
    if kind.startswith("thawed"):  # or it would not matter to the test what the second stage has thawed
        assert json.loads((tmp_path / "whole" / "results.json").read_text())["best_epoch"] == 2
    rng = np.random.default_rng(0)
    places = range(1, num_looks + 1) if is_torture else sorted({1, num_looks, *rng.integers(2, num_looks, 2).tolist()})
    for place in places:
        stop_and_go_on(argv, tmp_path / "whole", tmp_path / "part", place, num_looks)
    figure("resume exactly", f"{len(places)} of {num_looks} places, 0 bits differ: {kind}")


@pytest.mark.torture
@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_is_not(demo_set, tmp_path, is_torture, figure):
    """SIGKILL at 12 moments of reading, caching, training, writing and reporting; every file whole every time."""
    argv = flags_of(demo_set, "--unfreeze_schedule", "22@0,20@1", "--epochs", "2", "--ema_decay", "0.9", *SHOWN)
    kills = 500 if is_torture else 12
    command = [sys.executable, str(ROOT / "tests" / "finetune" / "killing.py"), str(tmp_path), str(kills), "0", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["differences"], found["broken"]) == ([], [])
    assert found["kills"] == kills and found["finished"] >= 1
    figure("killed anywhere", f"{kills} kills, {found['finished']} runs finished, 0 files broken, 0 bits differ")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_run_after_its_step_with_exit_code_75(name, demo_set, tmp_path, environment, figure):
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "baseline.py"), *flags_of(demo_set, "--epochs", "5000")]
    process = subprocess.Popen(
        [*command, "--output_dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    wait_for(lambda: (folder / "metrics.csv").exists())
    asked = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=120)
    seconds = time.monotonic() - asked
    assert process.returncode == 75, said
    assert said.splitlines()[-2:] == [
        f"{name}: saving after this step; once more stops at once, without",
        f"stopped and saved: --resume {folder} goes on from there",
    ]
    states = checkpoints.StateFolder(folder, keep=2)
    state = states.load(print)
    assert state is not None and state["course"]["epoch"] >= 1
    figure("signals", f"{name}: exit code 75 within {seconds:.1f} s")


@pytest.mark.parametrize(
    ("name", "command", "code"),
    [
        ("SIGTERM", "baseline.py --demo drawn", 75),
        ("SIGINT", "baseline.py --demo drawn", 75),
        ("SIGINT", "predict.py --checkpoint none none.png", 130),
        ("SIGUSR1", "search.py --output_dir out", 75),
        ("SIGINT", "search.py --output_dir out", 130),
        ("SIGINT", "search.py --output_dir out --parent 1", 130),
    ],
)
def test_a_signal_while_libraries_are_imported_ends_in_a_line_too(name, command, code, tmp_path):
    # Python looks for signals between sleeps, not before one that has just begun.
    (tmp_path / "numpy.py").write_text("import time\nprint('imports', flush=True)\nwhile True: time.sleep(0.01)\n")
    program, *words = command.split()
    with subprocess.Popen(
        [sys.executable, str(ROOT / program), *words],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "imports\n"
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == ("" if "--parent" in words else f"stopped by {name}\n")  # a worker leaves that to its parent


@pytest.mark.slow
def test_a_signal_does_not_wait_for_a_cache_to_be_filled_in_mid_run(demo_set, tmp_path, monkeypatch):
    argv = flags_of(demo_set, "--unfreeze_schedule", "22@0,20@1", "--save_every_minutes", "0")
    run_until([*argv, "--cache_dir", str(tmp_path / "another")], tmp_path / "whole", None)
    fill, filled = FrozenLayers.fill, []

    def asked_meanwhile(self: FrozenLayers) -> None:
        filled.append(True)
        if len(filled) == 2:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("goes on")
        fill(self)

    argv += ["--cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr(FrozenLayers, "fill", asked_meanwhile)
    with signals.Signals() as stop_signals, pytest.raises(signals.Stopped, match="stopped and saved: --resume"):
        baseline.run(parse_args([*argv, "--output_dir", str(tmp_path / "part")]), stop_signals=stop_signals)
    run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
    assert json.loads((tmp_path / "part" / "results.json").read_text())["resumed"] == [{"epoch": 2, "step": 0}]
    assert differences(tmp_path / "whole", tmp_path / "part") == []


def test_a_run_that_is_stopped_before_the_untrained_model_is_validated_goes_on(demo_set, whole, tmp_path):
    argv, part = flags_of(demo_set, FROZEN), tmp_path / "part"
    run_until(argv, part, 1)
    (state,) = (part / "state").iterdir()
    assert state.stem.endswith(checkpoints.NO_BEST) and not (part / "best").exists()
    run_until([*argv, "--resume", "auto"], part, None)
    assert differences(whole, part) == []


# States that are damaged, or of something else


@pytest.fixture(scope="module")
def stopped_once(demo_set, tmp_path_factory) -> tuple[list[str], Path]:
    """The command line and the folder of a run with two states, the newer one in the third epoch. Copy it."""
    argv, folder = (
        flags_of(demo_set, FROZEN, "--save_every_minutes", "1e-9"),
        tmp_path_factory.mktemp("stopped") / "run",
    )
    run_until(argv, folder, 17)
    assert len(list((folder / "state").glob("step*"))) == 2
    return argv, folder


@pytest.fixture
def stopped(stopped_once, tmp_path) -> tuple[list[str], Path]:
    """The same, to be gone on with or damaged."""
    argv, folder = stopped_once
    return argv, shutil.copytree(folder, tmp_path / "run")


def test_a_damaged_state_is_told_and_the_one_before_it_taken(stopped, whole, tmp_path, capsys):
    argv, template = stopped
    for damage in ("cut", "bit", "empty"):
        folder = shutil.copytree(template, tmp_path / damage)
        older, newer = sorted((folder / "state").glob("step*"))
        content = bytearray(newer.read_bytes())
        content[-1000] ^= 1
        newer.write_bytes({"cut": content[:-1], "bit": content, "empty": b""}[damage])
        capsys.readouterr()
        run_until([*argv, "--resume", "auto"], folder, None)
        said = capsys.readouterr().out
        assert f"{newer}: damaged" in said and "trying the state before it" in said
        steps = int(older.stem[4:14]) % 5
        assert f"resume    epoch 3 after {steps} of 5 steps" in said
        assert differences(whole, folder) == []


def test_without_a_state_that_can_be_read_the_run_starts_again_and_says_so(stopped, whole, capsys):
    argv, folder = stopped
    for path in (folder / "state").iterdir():
        path.write_bytes(b"")
    run_until([*argv, "--resume", "auto"], folder, None)
    assert "resume    no state was saved: from the start" in capsys.readouterr().out
    assert differences(whole, folder) == []


def test_what_a_run_starts_from_is_written_also_if_it_was_killed_before(demo_set, tmp_path):
    argv = flags_of(demo_set, FROZEN, "--split_file", str(tmp_path / "folds.csv"))
    run_until(argv, tmp_path / "whole", None)
    folds = (tmp_path / "folds.csv").read_bytes()
    (tmp_path / "folds.csv").unlink()
    run_until(argv, tmp_path / "part", 3)
    for path in (tmp_path / "part" / "splits.csv", tmp_path / "folds.csv"):
        path.unlink()
    run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
    assert differences(tmp_path / "whole", tmp_path / "part") == []
    assert (tmp_path / "folds.csv").read_bytes() == folds


def test_an_epoch_is_not_over_before_its_row_is_written(demo_set, whole, tmp_path, monkeypatch):
    argv = flags_of(demo_set, FROZEN)
    real = run_folder.RunFolder.csv

    def fails_once(self: run_folder.RunFolder, name: str, table: pd.DataFrame) -> None:
        if name == "metrics.csv" and len(table) == 3:
            monkeypatch.setattr(run_folder.RunFolder, "csv", real)
            raise OSError("the disk is full")
        real(self, name, table)

    monkeypatch.setattr(run_folder.RunFolder, "csv", fails_once)
    with pytest.raises(OSError, match="the disk is full"):
        baseline.run(parse_args([*argv, "--output_dir", str(tmp_path / "part")]))
    run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
    assert differences(whole, tmp_path / "part") == []


@pytest.mark.slow
def test_images_that_were_lost_stay_out_and_their_batch_is_not_counted(demo_set, tmp_path):
    """The image is back when the run goes on, as it must be."""
    table = pd.read_csv(demo_set[0])
    table[table["prompt"].isin(table["prompt"].unique()[:4])].to_csv(tmp_path / "half.csv", index=False)
    images = shutil.copytree(demo_set[1], tmp_path / "images")
    few = ["--batch_size", "1", "--no_cache", "--image_memory_gb", "0", "--cache_max_gb", "0", "--bad_images", "skip"]
    argv = flags_of((tmp_path / "half.csv", images), FROZEN, *few, "--cache_dir", str(tmp_path / "cache"))

    def lose(row: Any) -> None:
        if row["epoch"] == 1:
            splits = pd.read_csv(tmp_path / name / "splits.csv")
            lost.append(Path(splits["path"][splits["split"] == "train"].iloc[5]))
            lost[0].rename(tmp_path / "lost")

    for name, number in (("whole", None), ("part", 46)):
        lost: list[Path] = []
        config = parse_args([*argv, "--output_dir", str(tmp_path / name)])
        with pytest.raises(signals.Stopped) if number else nullcontext():
            baseline.run(config, after_epoch=lose, stop_signals=StopsAt(number))
        (tmp_path / "lost").rename(lost[0])
    run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
    (resumed,) = json.loads((tmp_path / "part" / "results.json").read_text())["resumed"]
    assert resumed["epoch"] == 3 and 0 < resumed["step"] < 15
    assert differences(tmp_path / "whole", tmp_path / "part") == []


def test_a_state_brings_the_best_weights_that_it_knows(stopped):
    """Those in best/ may be of an epoch that came after it, and that may end otherwise on another machine."""
    _, folder = stopped
    best = folder / "best" / "model.safetensors"
    expected = best.read_bytes()
    _, weights, description = checkpoints.load_weights(folder)
    other = {name: value + 1 for name, value in weights.items()}
    checkpoints.save_weights(folder / "best", other, description, lambda path: None)
    assert best.read_bytes() != expected
    checkpoints.StateFolder(folder, keep=2).load(print)
    assert best.read_bytes() == expected


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lr", "2e-3"], "its run was begun with other options (--lr)"),
        (["--resume", "nowhere"], "--resume nowhere: there is no run in it"),
        (["--overwrite"], "--resume goes on, --overwrite starts again: drop one"),
    ],
)
def test_another_run_is_not_gone_on_with(flags, says, stopped, capsys):
    argv, folder = stopped
    with pytest.raises(SystemExit):
        baseline.main([*argv, "--output_dir", str(folder), "--resume", "auto", *flags])
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert len(list((folder / "state").glob("step*"))) == 2


def test_a_run_is_gone_on_with_by_its_folder_alone_and_only_what_is_free_may_change(stopped, capsys):
    _, folder = stopped
    for flags in (["--lr", "2e-3"], ["--config", "x.json"], ["--preset", "small", "--epochs", "9"]):
        with pytest.raises(SystemExit):
            baseline.main(["--resume", str(folder), *flags])
        assert "would make it another run; drop it" in capsys.readouterr().err
    results = baseline.main(["--resume", str(folder), "--num_workers", "1", "--use_report"])
    assert results["epochs"] == 3 and (folder / "report.html").exists()
    again = baseline.main(["--resume", str(folder)])
    assert "is finished; nothing is left to do" in capsys.readouterr().out
    assert again == json.loads((folder / "results.json").read_text())


def test_changed_data_is_refused(stopped, tmp_path, capsys):
    argv, folder = stopped
    table = pd.read_csv(argv[1])
    table["mos_quality"] += 0.01
    table.to_csv(tmp_path / "other.csv", index=False)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "data_csv_path": str(tmp_path / "other.csv")}))
    with pytest.raises(SystemExit):
        baseline.main(["--resume", str(folder)])
    assert "the data has changed since" in capsys.readouterr().err


def test_states_are_saved_by_the_clock_and_the_newest_are_kept(demo_set, tmp_path, monkeypatch):
    saved: list[int] = []
    real = checkpoints.StateFolder.save
    monkeypatch.setattr(
        checkpoints.StateFolder, "save", lambda self, *given: (saved.append(given[0]), real(self, *given))
    )
    run_until(flags_of(demo_set, FROZEN, "--epochs", "2"), tmp_path / "seldom", None)
    assert saved == []  # ten minutes are not over
    run_until(flags_of(demo_set, FROZEN, "--save_every_minutes", "0"), tmp_path / "never", None)
    assert saved == []
    often = flags_of(demo_set, FROZEN, "--save_every_minutes", "1e-9", "--keep_states", "3")
    run_until(often, tmp_path / "often", 15)
    assert saved == sorted(saved) and len(saved) == 14  # not when the untrained model is about to be validated
    kept = sorted(int(path.stem[4:14]) for path in (tmp_path / "often" / "state").glob("step*"))
    assert kept == sorted(set(saved))[-3:]


# Numbers gone wrong


def test_a_loss_that_is_not_finite_is_told_with_its_images_and_can_be_repeated(demo_set, tmp_path, monkeypatch, capsys):
    argv = flags_of(demo_set, FROZEN, "--output_dir", str(tmp_path / "run"))
    real, seen = losses.score_losses, []

    def broken(scores: Any, *given: Any, **options: Any) -> dict[str, Tensor]:
        found = real(scores, *given, **options)
        if found["loss"].requires_grad:  # in training
            seen.append(float(found["loss"].detach()))
            if len(seen) == 8 and not (tmp_path / "run" / "failure.json").exists():  # third step of the second epoch
                return {**found, "loss": found["loss"] * float("nan")}
        return found

    monkeypatch.setattr(losses, "score_losses", broken)
    with pytest.raises(SystemExit) as caught:
        baseline.main(argv)
    assert caught.value.code == 1
    said = capsys.readouterr()
    assert said.err.startswith("failed: loss is nan at step 3 of this epoch: lower --lr")
    told = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert (told["metric"], told["value"], told["epoch"], told["step"]) == ("loss", "nan", 2, 3)
    assert len(told["images"]) == 8 and set(told["images"]) <= set(pd.read_csv(argv[1])["name"])
    assert told["repeat"] == f"python baseline.py --resume {tmp_path / 'run'}"
    # The saved state repeats that very step: the same batch, weights and dropout.
    expected, state = seen[-1], checkpoints.StateFolder(tmp_path / "run", keep=2).load(print)
    assert state is not None and (state["course"]["epoch"], state["course"]["record"]["step"]) == (2, 2)
    seen.clear()
    baseline.main(["--resume", str(tmp_path / "run")])
    assert seen[0] == expected
    assert not (tmp_path / "run" / "failure.json").exists()


# One folder, one run


def test_two_runs_cannot_have_one_folder(demo_set, tmp_path, capsys):
    folder = tmp_path / "run"
    argv = flags_of(demo_set, FROZEN, "--output_dir", str(folder))
    with run_folder.RunFolder(folder):
        for flags in ([], ["--overwrite"], ["--resume", "auto"]):  # the kernel does not mind that it is one process
            with pytest.raises(SystemExit) as caught:
                baseline.main([*argv, *flags])
            error = capsys.readouterr().err
            assert caught.value.code == 2 and error.count("\n") == 1
            assert "another run is using it now; wait for its end or choose another" in error
        assert list(folder.iterdir()) == []
    baseline.main(argv)  # it is free again


@pytest.mark.slow
def test_another_process_cannot_have_the_folder_of_a_run(demo_set, tmp_path, environment):
    argv = flags_of(demo_set, FROZEN, "--output_dir", str(tmp_path / "run"))
    with run_folder.RunFolder(tmp_path / "run"):
        command = [sys.executable, str(ROOT / "baseline.py"), *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "another run is using it now; wait for its end or choose another" in done.stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_another_process_finishes_meanwhile_is_left_as_it_is(stopped, monkeypatch):
    argv, folder = stopped
    read = data.read_examples

    def finish_meanwhile(config: Any) -> Any:
        monkeypatch.setattr(data, "read_examples", read)
        run_until([*argv, "--resume", "auto"], folder, None)
        return read(config)

    monkeypatch.setattr(data, "read_examples", finish_meanwhile)
    with pytest.raises(ValueError, match="another process has just finished this run"):
        run_until([*argv, "--resume", "auto"], folder, None)
    assert not (folder / "state").exists()


def test_who_only_looks_whether_a_folder_is_free_is_waited_for(tmp_path, monkeypatch):
    looking = ExitStack()
    looking.enter_context(locks.exclusive_folder(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: looking.close())
    with locks.exclusive_folder(tmp_path):
        pass


def test_what_a_killed_process_left_half_written_is_swept_away(demo_set, tmp_path):
    folder = tmp_path / "run"
    (folder / ".best.123.tmp").mkdir(parents=True)
    (folder / ".best.123.tmp" / "scorer.json").write_text("{")
    (folder / ".config.json.123.tmp").write_text("{")
    baseline.main(flags_of(demo_set, FROZEN, "--output_dir", str(folder)))
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_repeated_runs_go_on_in_the_middle_of_one(demo_set, tmp_path, monkeypatch, capsys):
    argv = flags_of(demo_set, FROZEN, "--use_test", "--repeats", "2", "--epochs", "1")
    whole = baseline.main([*argv, "--output_dir", str(tmp_path / "whole")])
    looks, real = [0], resuming.Saver.check

    def check(self: resuming.Saver) -> None:
        looks[0] += 1
        if looks[0] == 14:  # in the second run
            self.stop_signals.asked = "SIGTERM"
        real(self)

    monkeypatch.setattr(resuming.Saver, "check", check)
    with pytest.raises(SystemExit) as caught:
        baseline.main([*argv, "--output_dir", str(tmp_path / "part")])
    assert caught.value.code == 75
    assert sorted(path.parent.name for path in (tmp_path / "part").glob("*/results.json")) == ["seed42"]
    capsys.readouterr()
    found = baseline.main(["--resume", str(tmp_path / "part")])
    said = capsys.readouterr().out
    assert "1 of 2 runs in" in said and "resume    epoch" in said
    assert unequal(found, whole, "summary") == []
    assert differences(tmp_path / "whole" / "seed43", tmp_path / "part" / "seed43") == []


@pytest.mark.slow
def test_repeated_runs_that_are_made_again_otherwise_go_on_too_and_have_their_folder_alone(demo_set, tmp_path, capsys):
    argv = flags_of(demo_set, FROZEN, "--use_test", "--repeats", "2", "--epochs", "1")
    folder = tmp_path / "runs"
    (folder / ".protocol.json.123.tmp").mkdir(parents=True)  # left by one that was killed at once
    baseline.main([*argv, "--output_dir", str(folder)])
    stop_signals = StopsAt(3)  # in the first of the new runs
    config = parse_args([*argv, "--output_dir", str(folder), "--lr", "2e-3", "--overwrite"])
    with pytest.raises(signals.Stopped, match=f"--resume {folder} goes on"):
        protocol.run_all(
            protocol.SCORER, config, functools.partial(baseline.run, stop_signals=stop_signals), folder, CPU
        )
    with locks.exclusive_folder(folder), pytest.raises(SystemExit):
        baseline.main(["--resume", str(folder)])
    assert "another run is using it now" in capsys.readouterr().err
    baseline.main(["--resume", str(folder)])
    for name in ("seed42", "seed43"):
        assert json.loads((folder / name / "config.json").read_text())["lr"] == 2e-3
