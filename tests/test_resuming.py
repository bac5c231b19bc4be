"""`resuming.py` and `signals.py`: a run that is stopped or killed anywhere goes on as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

import backbones
import baseline
import checkpoint
import engine
import protocol
import resuming
import signals
import sources
from configs import parse_args

OF_TIME = ["images_per_s", "data_wait", "seconds"]
SMALL = ["--clip_model", "tiny", "--clip_pretrained", "none", "--image_size", "56", "--batch_size", "8", "--lr", "1e-3"]
CPU = engine.Runtime(torch.device("cpu"), "off", torch.amp.GradScaler("cpu", enabled=False))


def flags_of(demo_set: tuple[Path, Path], *flags: str) -> list[str]:
    """The command line of a small run, but for its folder."""
    data = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    return [*data, *SMALL, "--epochs", "3", "--no_report", *flags]


def unequal(a: Any, b: Any, name: str) -> list[str]:
    """Names of the JSON values that are not the same.

    What comes after the fitted logistic may differ in the seventh digit: LAPACK rounds by where arrays lie in memory.
    """
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in unequal(a[key], b[key], f"{name} {key}")]
    is_fitted = "plcc_fit" in name or "rmse" in name
    return [] if a == b or (is_fitted and a == pytest.approx(b, rel=1e-6)) else [name]


def differences(a: Path, b: Path) -> list[str]:
    """What is not the same to the bit in two finished runs, but for times; see `unequal`."""
    found = []
    weights = [checkpoint.load_weights(folder)[1] for folder in (a, b)]
    if weights[0].keys() != weights[1].keys():
        found.append("names of weights")
    found += [name for name in weights[0] if not torch.equal(weights[0][name], weights[1].get(name))]
    found += [] if (a / "splits.csv").read_bytes() == (b / "splits.csv").read_bytes() else ["splits.csv"]
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns=OF_TIME).to_dict() for folder in (a, b)]
    found += unequal(*tables, "metrics.csv")
    found += [] if (a / "predictions.csv").read_bytes() == (b / "predictions.csv").read_bytes() else ["predictions.csv"]
    results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    for of_process in ("seconds", "seconds_from_first_batch", "resumed", "diagnosis"):
        results[0].pop(of_process), results[1].pop(of_process)
    return found + unequal(*results, "results.json")


class StopsAt(signals.Signals):
    """Asks a run to stop when it looks for the n-th time whether it should; counts the looks."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.number = number
        self.looks = 0

    @property
    def asked(self) -> str:  # type: ignore[override]
        self.looks += 1
        return "SIGTERM" if self.looks == self.number else ""

    @asked.setter
    def asked(self, name: str) -> None:
        pass


def run_until(argv: list[str], folder: Path, number: int | None) -> int:
    """Run until the n-th look, or to the end; returns the number of looks."""
    listening = StopsAt(number)
    config = parse_args([*argv, "--output_dir", str(folder)])
    if number is None:
        baseline.run(config, listening=listening)
    else:
        with pytest.raises(signals.Stopped, match=r"stopped and saved: --resume "):
            baseline.run(config, listening=listening)
    return listening.looks


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


@pytest.mark.torture
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(kind, demo_set, tmp_path, capsys, is_torture, figure):
    """Between two steps, in the middle of validation, between epochs and while the test fold is scored."""
    argv = flags_of(demo_set, *KINDS[kind], "--keep_states", "1")
    num_looks = run_until(argv, tmp_path / "whole", None)
    if kind.startswith("thawed"):  # or it would not matter to the test what the second stage has thawed
        assert json.loads((tmp_path / "whole" / "results.json").read_text())["best_epoch"] == 2
    rng = np.random.default_rng(0)
    places = range(1, num_looks + 1) if is_torture else sorted({1, num_looks, *rng.integers(2, num_looks, 2).tolist()})
    for place in places:
        shutil.rmtree(tmp_path / "part", ignore_errors=True)
        run_until(argv, tmp_path / "part", place)
        assert len(list((tmp_path / "part" / "state").glob("step*"))) == 1
        second = min(num_looks - place, 2)  # and again, soon after
        if second > 1:
            run_until([*argv, "--resume", "auto"], tmp_path / "part", second)
        run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
        assert differences(tmp_path / "whole", tmp_path / "part") == [], place
        assert not (tmp_path / "part" / "state").exists()
        resumed = json.loads((tmp_path / "part" / "results.json").read_text())["resumed"]
        assert len(resumed) == 1 + (second > 1)
    figure("resume exactly", f"{len(places)} of {num_looks} places, 0 bits differ: {kind}")


@pytest.mark.torture
@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_is_not(demo_set, tmp_path, is_torture, figure):
    """SIGKILL at 50 moments of reading, caching, training, writing and reporting; every file whole every time."""
    argv = flags_of(demo_set, "--unfreeze_schedule", "22@0,20@1", "--epochs", "2", "--use_report", "--ema_decay", "0.9")
    kills = 500 if is_torture else 50
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), str(tmp_path), str(kills), "0", *argv]
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


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
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
    states = checkpoint.StateFolder(folder, keep=2)
    state = states.load(print)
    assert state is not None and state["course"]["epoch"] >= 1
    figure("signals", f"{name}: exit code 75 within {seconds:.1f} s")


def test_a_signal_before_training_stops_at_once_and_a_second_one_always(capfd):
    with (
        signals.Signals() as listening,
        pytest.raises(signals.Stopped, match=r"SIGTERM outside of training: the same command goes on"),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert listening.asked == "SIGTERM"
    with signals.Signals() as listening, listening.held_back():
        signal.raise_signal(signal.SIGUSR1)
        assert listening.asked == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "SIGUSR1: saving after this step; once more stops at once, without\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: signals.Signals().__enter__().before).result() == {}


def test_nothing_that_expects_errors_takes_a_signal_for_one():
    with signals.Signals(), pytest.raises(signals.Stopped):
        backbones.download("weights", lambda: signal.raise_signal(signal.SIGTERM))


STOPPING = """
import signal
import signals
from configs import one_line_errors

with one_line_errors(retry=signals.Stopped), signals.Signals() as listening, listening.held_back():
    input()
    signal.raise_signal(signal.SIGINT)
    raise signals.Stopped("saved")
"""


@pytest.mark.parametrize("is_read", [True, False])
def test_a_signal_that_has_ended_the_reader_of_stderr_too_stops_the_run_as_any_other(is_read):
    """Ctrl-C in a terminal with `2>&1 | tee log`: it must not break the step, nor change the exit code."""
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", STOPPING], cwd=ROOT, text=True, **pipes)
    assert process.stdin is not None and process.stderr is not None
    if not is_read:
        process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    said = process.stderr.read() if is_read else ""
    assert process.wait(60) == 75
    assert (
        said.splitlines()
        == ["SIGINT: saving after this step; once more stops at once, without", "saved"][: 2 * is_read]
    )


@pytest.mark.parametrize(
    ("name", "command", "code"),
    [
        ("SIGTERM", "baseline.py --demo", 75),
        ("SIGINT", "baseline.py --demo", 75),
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


def test_a_signal_does_not_wait_for_a_cache_to_be_filled_in_mid_run(demo_set, tmp_path, monkeypatch):
    argv = flags_of(demo_set, "--unfreeze_schedule", "22@0,20@1", "--save_every_minutes", "0")
    run_until([*argv, "--cache_dir", str(tmp_path / "another")], tmp_path / "whole", None)
    fill, filled = baseline.feeding.cache_frozen, []

    def asked_meanwhile(*args: Any) -> None:
        filled.append(True)
        if len(filled) == 2:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("goes on")
        fill(*args)

    argv += ["--cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr(baseline.feeding, "cache_frozen", asked_meanwhile)
    with signals.Signals() as listening, pytest.raises(signals.Stopped, match="stopped and saved: --resume"):
        baseline.run(parse_args([*argv, "--output_dir", str(tmp_path / "part")]), listening=listening)
    run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
    assert json.loads((tmp_path / "part" / "results.json").read_text())["resumed"] == [{"epoch": 2, "step": 0}]
    assert differences(tmp_path / "whole", tmp_path / "part") == []


# States that are damaged, or of something else


@pytest.fixture
def stopped(demo_set, tmp_path) -> tuple[list[str], Path]:
    """The command line and the folder of a run with two states, the newer one in the third epoch."""
    argv = flags_of(demo_set, "--freeze_clip", "--save_every_minutes", "1e-9")
    run_until(argv, tmp_path / "run", 17)
    assert len(list((tmp_path / "run" / "state").glob("step*"))) == 2
    return argv, tmp_path / "run"


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_state_is_told_and_the_one_before_it_taken(damage, stopped, tmp_path, capsys):
    argv, folder = stopped
    older, newer = sorted((folder / "state").glob("step*"))
    content = bytearray(newer.read_bytes())
    content[-1000] ^= 1
    newer.write_bytes({"cut": content[:-1], "bit": content, "empty": b""}[damage])
    run_until(argv, tmp_path / "whole", None)
    capsys.readouterr()
    run_until([*argv, "--resume", "auto"], folder, None)
    said = capsys.readouterr().out
    assert f"{newer}: damaged" in said and "trying the state before it" in said
    steps = int(older.stem[4:14]) % 5
    assert f"resume    epoch 3 after {steps} of 5 steps" in said
    assert differences(tmp_path / "whole", folder) == []


def test_without_a_state_that_can_be_read_the_run_starts_again_and_says_so(stopped, tmp_path, capsys):
    argv, folder = stopped
    for path in (folder / "state").iterdir():
        path.write_bytes(b"")
    run_until(argv, tmp_path / "whole", None)
    run_until([*argv, "--resume", "auto"], folder, None)
    assert "resume    no state was saved: from the start" in capsys.readouterr().out
    assert differences(tmp_path / "whole", folder) == []


@pytest.mark.parametrize("keep", [1, 2])
def test_a_state_replaces_later_ones_that_were_given_up(keep, tmp_path):
    states = checkpoint.StateFolder(tmp_path, keep=2)
    for step in (7, 8):
        states.save(step, 0, {"step": step})
    for path in states.states():
        path.write_bytes(b"")
    assert states.load(lambda text: None) is None
    states = checkpoint.StateFolder(tmp_path, keep=keep)
    for step in (1, 2):
        states.save(step, 0, {"step": step})
        assert states.load(print) == {"step": step}
    assert len(states.states()) == keep


def test_what_a_run_starts_from_is_written_also_if_it_was_killed_before(demo_set, tmp_path):
    argv = flags_of(demo_set, "--freeze_clip", "--split_file", str(tmp_path / "folds.csv"))
    run_until(argv, tmp_path / "whole", None)
    folds = (tmp_path / "folds.csv").read_bytes()
    (tmp_path / "folds.csv").unlink()
    run_until(argv, tmp_path / "part", 3)
    for path in (tmp_path / "part" / "splits.csv", tmp_path / "folds.csv"):
        path.unlink()
    run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
    assert differences(tmp_path / "whole", tmp_path / "part") == []
    assert (tmp_path / "folds.csv").read_bytes() == folds


def test_an_epoch_is_not_over_before_its_row_is_written(demo_set, tmp_path, monkeypatch, capsys):
    argv = flags_of(demo_set, "--freeze_clip")
    run_until(argv, tmp_path / "whole", None)
    real = checkpoint.RunFolder.csv

    def fails_once(self: checkpoint.RunFolder, name: str, table: pd.DataFrame) -> None:
        if name == "metrics.csv" and len(table) == 3:
            monkeypatch.setattr(checkpoint.RunFolder, "csv", real)
            raise OSError("the disk is full")
        real(self, name, table)

    monkeypatch.setattr(checkpoint.RunFolder, "csv", fails_once)
    with pytest.raises(OSError, match="the disk is full"):
        baseline.run(parse_args([*argv, "--output_dir", str(tmp_path / "part")]))
    run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
    assert differences(tmp_path / "whole", tmp_path / "part") == []


def test_images_that_were_lost_stay_out_and_their_batch_is_not_counted(demo_set, tmp_path):
    """The image is back when the run goes on, as it must be."""
    images = shutil.copytree(demo_set[1], tmp_path / "images")
    few = ["--batch_size", "1", "--no_cache", "--image_memory_gb", "0", "--cache_max_gb", "0", "--bad_images", "skip"]
    argv = [*flags_of((demo_set[0], images), "--freeze_clip", *few), "--cache_dir", str(tmp_path / "cache")]

    def lose(row: Any) -> None:
        if row["epoch"] == 1:
            splits = pd.read_csv(tmp_path / name / "splits.csv")
            lost.append(Path(splits["path"][splits["split"] == "train"].iloc[5]))
            lost[0].rename(tmp_path / "lost")

    for name, number in (("whole", None), ("part", 124)):  # in the third epoch
        lost: list[Path] = []
        config = parse_args([*argv, "--output_dir", str(tmp_path / name)])
        with pytest.raises(signals.Stopped) if number else nullcontext():
            baseline.run(config, after_epoch=lose, listening=StopsAt(number))
        (tmp_path / "lost").rename(lost[0])
    run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
    assert differences(tmp_path / "whole", tmp_path / "part") == []


def test_sums_of_a_state_go_on_where_the_losses_are():
    """They come back to the CPU, and a GPU's are added; "meta" is a device as well."""
    record = engine.EpochRecord()
    record.take_in(engine.Step([(2, {"loss": torch.tensor(3.0)})], torch.tensor(4.0), True, [], {}))
    assert record.means() == {"loss": 3.0, "grad_norm": 4.0}
    again = engine.EpochRecord()
    again.load(record.state())
    elsewhere = torch.empty((), device="meta")
    again.take_in(engine.Step([(2, {"loss": elsewhere})], elsewhere, True, [], {}))
    assert {value.device.type for value in (again.sums["loss"], again.norm_sum)} == {"meta"}
    assert again.state()["num_taken"] == 2


def test_a_state_brings_the_best_weights_that_it_knows(stopped):
    """Those in best/ may be of an epoch that came after it, and that may end otherwise on another machine."""
    _, folder = stopped
    best = folder / "best" / "model.safetensors"
    expected = best.read_bytes()
    _, weights, description = checkpoint.load_weights(folder)
    other = {name: value + 1 for name, value in weights.items()}
    checkpoint.save_weights(folder / "best", other, description, lambda path: None)
    assert best.read_bytes() != expected
    checkpoint.StateFolder(folder, keep=2).load(print)
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
    real = checkpoint.StateFolder.save
    monkeypatch.setattr(
        checkpoint.StateFolder, "save", lambda self, *given: (saved.append(given[0]), real(self, *given))
    )
    run_until(flags_of(demo_set, "--freeze_clip", "--epochs", "2"), tmp_path / "seldom", None)
    assert saved == []  # ten minutes are not over
    run_until(flags_of(demo_set, "--freeze_clip", "--save_every_minutes", "0"), tmp_path / "never", None)
    assert saved == []
    often = flags_of(demo_set, "--freeze_clip", "--save_every_minutes", "1e-9", "--keep_states", "3")
    run_until(often, tmp_path / "often", 14)
    assert saved == sorted(saved) and len(saved) == 14
    kept = sorted(int(path.stem[4:14]) for path in (tmp_path / "often" / "state").glob("step*"))
    assert kept == sorted(set(saved))[-3:]


# Numbers gone wrong


def test_a_loss_that_is_not_finite_is_told_with_its_images_and_can_be_repeated(demo_set, tmp_path, monkeypatch, capsys):
    argv = flags_of(demo_set, "--freeze_clip", "--output_dir", str(tmp_path / "run"))
    real, seen = baseline.losses.score_losses, []

    def broken(scores: Any, *given: Any, **options: Any) -> dict[str, Tensor]:
        found = real(scores, *given, **options)
        if found["loss"].requires_grad:  # in training
            seen.append(float(found["loss"].detach()))
            if len(seen) == 8 and not (tmp_path / "run" / "failure.json").exists():  # third step of the second epoch
                return {**found, "loss": found["loss"] * float("nan")}
        return found

    monkeypatch.setattr(baseline.losses, "score_losses", broken)
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
    expected, state = seen[-1], checkpoint.StateFolder(tmp_path / "run", keep=2).load(print)
    assert state is not None and (state["course"]["epoch"], state["course"]["record"]["step"]) == (2, 2)
    seen.clear()
    baseline.main(["--resume", str(tmp_path / "run")])
    assert seen[0] == expected
    assert not (tmp_path / "run" / "failure.json").exists()


# One folder, one run


def test_two_runs_cannot_have_one_folder(demo_set, tmp_path, capsys, environment):
    folder = tmp_path / "run"
    argv = flags_of(demo_set, "--freeze_clip", "--output_dir", str(folder))
    with checkpoint.RunFolder(folder):
        command = [sys.executable, str(ROOT / "baseline.py"), *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "another run is using it now; wait for its end or choose another" in done.stderr
        for flags in (["--overwrite"], ["--resume", "auto"]):  # the kernel does not mind that it is the same process
            with pytest.raises(SystemExit):
                baseline.main([*argv, *flags])
            assert "another run is using it now" in capsys.readouterr().err
        assert list(folder.iterdir()) == []
    baseline.main(argv)  # it is free again


def test_a_run_that_another_process_finishes_meanwhile_is_left_as_it_is(stopped, monkeypatch):
    argv, folder = stopped
    read = sources.read_examples

    def finish_meanwhile(config: Any) -> Any:
        monkeypatch.setattr(sources, "read_examples", read)
        run_until([*argv, "--resume", "auto"], folder, None)
        return read(config)

    monkeypatch.setattr(sources, "read_examples", finish_meanwhile)
    with pytest.raises(ValueError, match="another process has just finished this run"):
        run_until([*argv, "--resume", "auto"], folder, None)
    assert not (folder / "state").exists()


def test_who_only_looks_whether_a_folder_is_free_is_waited_for(tmp_path, monkeypatch):
    looking = ExitStack()
    looking.enter_context(checkpoint.alone_in(tmp_path))
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: looking.close())
    with checkpoint.alone_in(tmp_path):
        pass


def test_what_a_killed_process_left_half_written_is_swept_away(demo_set, tmp_path):
    folder = tmp_path / "run"
    (folder / ".best.123.tmp").mkdir(parents=True)
    (folder / ".best.123.tmp" / "scorer.json").write_text("{")
    (folder / ".config.json.123.tmp").write_text("{")
    baseline.main(flags_of(demo_set, "--freeze_clip", "--output_dir", str(folder)))
    assert not list(folder.glob(".*"))


# Disks that are full or cannot be written


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
    states = checkpoint.StateFolder(small_disk / "run", keep=2)
    assert states.load(print) is not None
    checkpoint.load_weights(small_disk / "run")
    figure("read-only in mid-run", "told in one line, weights and states intact")


@pytest.mark.slow
@pytest.mark.torture
def test_a_folder_that_may_no_longer_be_written_is_told_and_the_run_goes_on_later(
    demo_set, tmp_path, environment, figure
):
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
        env=environment,
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
    checkpoint.load_weights(folder)
    run_until([*argv, "--resume", "auto"], folder, None)
    run_until(argv, tmp_path / "whole", None)
    assert differences(tmp_path / "whole", folder) == []
    figure("permission lost in mid-run", "told in one line, 0 bits differ after --resume")


@pytest.mark.parametrize("value", [None, 1, "text", [1, [2.5, None]], {"a": {1: torch.arange(3)}, 7: [np.eye(2)]}, {}])
def test_states_come_back_as_they_were(value, tmp_path):
    tensors: dict[str, Tensor] = {}
    checkpoint.write_tensors(tmp_path / "s.safetensors", tensors, note := checkpoint.pack(value, "s", tensors))
    found, saved = checkpoint.read_tensors(tmp_path / "s.safetensors")
    assert json.dumps(saved) == json.dumps(note)
    assert str(checkpoint.unpack(saved, found)) == str(value)


def test_generators_go_on_from_a_saved_state(tmp_path):
    engine.seed_everything(3)
    state = engine.random_state(CPU)
    expected = (np.random.rand(), torch.rand(1), __import__("random").random())  # noqa: NPY002
    tensors: dict[str, Tensor] = {}
    checkpoint.write_tensors(tmp_path / "s.safetensors", tensors, checkpoint.pack(state, "s", tensors))
    checkpoint.write_tensors(tmp_path / "s.safetensors", tensors, checkpoint.pack(state, "s", tensors))
    found, saved = checkpoint.read_tensors(tmp_path / "s.safetensors")
    engine.set_random_state(checkpoint.unpack(saved, found), CPU)
    assert expected == (np.random.rand(), torch.rand(1), __import__("random").random())  # noqa: NPY002


def test_resuming_knows_other_weights(tmp_path):
    def trained(value: float) -> resuming.Trained:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        nn.init.constant_(model[0].weight, value)
        nn.init.zeros_(model[0].bias)
        optimizer = engine.build_optimizer(model[1], lambda name: 0.1, weight_decay=0.0)
        schedule = engine.build_schedule(optimizer, kind="constant", num_steps=9, warmup_ratio=0.0)
        micro = engine.MicroBatches(lambda batch, size: [batch], enabled=False)
        constant = {"0.weight", "0.bias"}
        return resuming.Trained(model, optimizer, schedule, engine.WeightAverage(model, 0), micro, CPU.scaler, constant)

    state = trained(1.0).state()
    assert set(state["model"]) == {"1.weight", "1.bias"}
    trained(1.0).load(state)
    with pytest.raises(ValueError, match="the weights that CLIP starts from have changed"):
        trained(2.0).load(state)
    with pytest.raises(ValueError, match="of another model"):
        trained(1.0).load({**state, "model": {"2.weight": torch.ones(1)}})


def test_repeated_runs_go_on_in_the_middle_of_one(demo_set, tmp_path, monkeypatch, capsys):
    argv = flags_of(demo_set, "--freeze_clip", "--repeats", "2", "--epochs", "2")
    whole = baseline.main([*argv, "--output_dir", str(tmp_path / "whole")])
    looks, real = [0], resuming.Saver.check

    def check(self: resuming.Saver) -> None:
        looks[0] += 1
        if looks[0] == 25:  # in the second run
            self.listening.asked = "SIGTERM"
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


def test_repeated_runs_that_are_made_again_otherwise_go_on_too_and_have_their_folder_alone(demo_set, tmp_path, capsys):
    argv = flags_of(demo_set, "--freeze_clip", "--repeats", "2", "--epochs", "1")
    folder = tmp_path / "runs"
    (folder / ".protocol.json.123.tmp").mkdir(parents=True)  # left by one that was killed at once
    baseline.main([*argv, "--output_dir", str(folder)])
    listening = StopsAt(3)  # in the first of the new runs
    config = parse_args([*argv, "--output_dir", str(folder), "--lr", "2e-3", "--overwrite"])
    with pytest.raises(signals.Stopped, match=f"--resume {folder} goes on"):
        protocol.run_all(config, functools.partial(baseline.run, listening=listening), folder, CPU)
    with checkpoint.alone_in(folder), pytest.raises(SystemExit):
        baseline.main(["--resume", str(folder)])
    assert "another run is using it now" in capsys.readouterr().err
    baseline.main(["--resume", str(folder)])
    for name in ("seed42", "seed43"):
        assert json.loads((folder / name / "config.json").read_text())["lr"] == 2e-3
