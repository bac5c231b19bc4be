"""`training/fit.py`: a network of two layers on random numbers gets all that `training` has to give."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch import nn
from two_layers import NUM_EPOCHS, NUM_TRAIN, STEPS_PER_EPOCH, Regression, data, train, two_layers

from training import checkpoints, devices, signals

PROGRAM = [sys.executable, str(ROOT / "tests" / "training" / "two_layers.py")]
OF_TIME = ["images_per_s", "seconds", "data_wait"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("fit") / "whole"
    train(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_weights(folder)[1]


def history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv").drop(columns=OF_TIME, errors="ignore")


def assert_same(a: Path, b: Path) -> None:
    """Two runs are equal to the bit, but for times."""
    assert {name: value.tolist() for name, value in weights(a).items()} == {
        name: value.tolist() for name, value in weights(b).items()
    }
    pd.testing.assert_frame_equal(history(a), history(b), check_exact=True)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def test_the_loop_is_that_of_plain_pytorch(tmp_path):
    """Written out: AdamW, the schedule, the average of the weights, and the best epoch by validation, 0 untrained."""
    progress, _ = train(tmp_path / "run", max_grad_norm=0.5)
    averaged = two_layers().eval()
    devices.seed_everything(1)
    model = two_layers()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    x, y = data()
    total, warm = NUM_EPOCHS * STEPS_PER_EPOCH, round(0.1 * NUM_EPOCHS * STEPS_PER_EPOCH)

    def validation_error() -> float:
        averaged.load_state_dict(average)
        with torch.no_grad():
            return float(nn.functional.mse_loss(averaged(x[NUM_TRAIN:]), y[NUM_TRAIN:]))

    step, errors, kept = 0, [validation_error()], [average]
    for epoch in range(1, NUM_EPOCHS + 1):
        model.train()
        for rows in np.random.default_rng(epoch).permutation(NUM_TRAIN).reshape(STEPS_PER_EPOCH, -1):
            done = (step - warm) / (total - warm)
            lr = 1e-2 * ((step + 1) / (warm + 1) if step < warm else 0.5 * (1 + np.cos(np.pi * done)))
            optimizer.param_groups[0]["lr"] = lr
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            now = model.state_dict()
            average = {name: now[name].clone() if step == 0 else average[name].lerp(now[name], 0.5) for name in now}
            step += 1
        errors.append(validation_error())
        kept.append(average)
    assert [-score for score in progress.selection] == pytest.approx(errors, rel=1e-5)
    assert [row["val_fit"] for row in progress.history] == progress.selection[1:]
    assert progress.best_epoch == int(np.argmin(errors)) > 0
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, kept[progress.best_epoch][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"patience": 1, "min_delta": 1.0}, {"patience": 2, "min_delta": 1.0}])
def test_it_ends_where_validation_no_longer_rises(options, tmp_path):
    progress, task = train(tmp_path / "run", **options)
    assert len(progress.history) == options["patience"]  # the first has no more to gain on the untrained model
    assert task.entered == [*range(1, 1 + options["patience"]), options["patience"]]


HARMFUL = {"lr": 10.0}  # at which every epoch is worse than none


def assert_untrained(folder: Path) -> None:
    """What a run has kept is what it started from."""
    devices.seed_everything(1)
    expected, found = two_layers().state_dict(), weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_where_every_epoch_is_worse_the_untrained_weights_are_kept(tmp_path):
    progress, task = train(tmp_path / "run", **HARMFUL)
    assert len(progress.history) == NUM_EPOCHS and max(progress.selection[1:]) < progress.selection[0]
    assert progress.best_epoch == 0
    assert_untrained(tmp_path / "run")
    scores, measured = task.validate(two_layers_as_kept(tmp_path / "run"), lambda: None)
    assert measured["fit"] == progress.selection[0]
    np.testing.assert_array_equal(progress.best_scores["predicted"], scores["predicted"])


def two_layers_as_kept(folder: Path) -> nn.Module:
    model = two_layers()
    model.load_state_dict(weights(folder))
    return model


@pytest.mark.parametrize("number", [1, 8, 20])
def test_they_are_kept_wherever_the_run_was_stopped(number, tmp_path):
    with pytest.raises(signals.Stopped):
        train(tmp_path / "run", stop_signals=StopsAt(number), **HARMFUL)
    progress, _ = train(tmp_path / "run", resume=True, **HARMFUL)
    assert progress.best_epoch == 0 and len(progress.history) == NUM_EPOCHS and progress.resumed
    assert_untrained(tmp_path / "run")


def test_a_run_that_never_gains_ends_early_with_the_untrained_weights(tmp_path):
    progress, _ = train(tmp_path / "run", patience=2, **HARMFUL)
    assert len(progress.history) == 2 and progress.best_epoch == 0
    assert_untrained(tmp_path / "run")


def test_stopped_before_the_untrained_model_is_validated_it_goes_on_with_that(whole, tmp_path):
    folder = tmp_path / "run"

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with signals.Signals() as listening, pytest.raises(signals.Stopped, match="stopped and saved"):
        train(folder, stop_signals=listening, before_validation=stop)
    assert [path.name for path in (folder / "state").iterdir()] == ["step0000000000-nobest.safetensors"]
    validated = []
    progress, _ = train(folder, resume=True, before_validation=lambda: validated.append(1))
    assert len(validated) == 1 + NUM_EPOCHS and len(progress.selection) == 1 + NUM_EPOCHS
    assert_same(whole, folder)


class StopsAt(signals.Signals):
    """Asks to stop when it is looked at for the n-th time."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.looks, self.number = 0, number

    @property
    def asked(self) -> str:  # type: ignore[override]
        self.looks += 1
        return "SIGTERM" if self.looks == self.number else ""

    @asked.setter
    def asked(self, name: str) -> None:
        pass


def test_stopped_anywhere_and_gone_on_with_it_ends_as_if_nothing_had_happened(whole, tmp_path):
    stopped = 0
    for number in range(1, 100, 3):
        folder = tmp_path / str(number)
        try:
            train(folder, stop_signals=StopsAt(number))
        except signals.Stopped:
            stopped += 1
            train(folder, resume=True)
            assert_same(whole, folder)
        else:
            break
    assert 3 * stopped > NUM_EPOCHS * STEPS_PER_EPOCH  # between any two steps, and around validation


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(whole, tmp_path):
    """By SIGKILL, at moments that come later each time."""
    folder, kills = tmp_path / "run", 0
    for wait in (0.02, 0.05, 0.1, 0.2, 0.4):
        if (folder / "results.json").exists():  # it was over before it could be killed
            break
        resume = ["--resume"] if (folder / "config.json").exists() else []
        process = subprocess.Popen([*PROGRAM, str(folder), *resume], env=environment(), stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills > 0
    if not (folder / "results.json").exists():
        subprocess.run([*PROGRAM, str(folder), "--resume"], env=environment(), check=True, capture_output=True)
    assert_same(whole, folder)


def test_trackers_get_every_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    progress, _ = train(tmp_path / "run", trackers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("val/fit")]
    assert shown == pytest.approx([row["val_fit"] for row in progress.history])


def test_two_processes_train_as_one(tmp_path):
    train(tmp_path / "one", dropout=0.0)  # which each process would draw for itself
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*command, *PROGRAM[1:], str(tmp_path / "two"), "--no_dropout"],
        env=environment(TMPDIR=str(tmp_path)),
        check=True,
        capture_output=True,
    )
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    pd.testing.assert_frame_equal(one, two, rtol=1e-4)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-4, atol=1e-5)


def test_a_task_brings_nothing_but_what_the_protocol_names():
    asked = {"num_samples", "may_leave_unused", "enter_epoch", "batches", "compute_losses", "validate", "weights"}
    assert {name for name in vars(Regression) if not name.startswith("_")} == asked | {"epoch_line"}
