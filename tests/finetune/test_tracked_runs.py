"""Trackers of whole runs: which get what of settings, epochs and test scores, and what stops a run."""

from __future__ import annotations

import json
import shlex
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from fake_trackers import OUTCOMES, RefusedError, Service, events, put_in_place

import baseline
from configs import TrainingConfig
from finetune import optimisation, outcome
from training import devices, resuming, run_folder, tracking
from training.tracking import TENSORBOARD_DIR, tag_of

TINY = "--clip_model tiny --clip_pretrained none --image_size 56"
RUN = f"{TINY} --freeze_clip --epochs 2 --lr 1e-2 --advice off --no_report"


def train_in(folder: Path, demo_set: tuple[Path, Path], flags: str = "") -> dict[str, Any]:
    """Train on the demo set with these flags."""
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    return baseline.main([*paths, "--output_dir", str(folder), *shlex.split(f"{RUN} {flags}")])


@pytest.fixture(params=["wandb", "mlflow"])
def service(request, monkeypatch) -> tuple[str, Service]:
    """A tracker's name, and what stands for it while the test lasts."""
    return request.param, put_in_place(request.param, monkeypatch)


@pytest.fixture(scope="module")
def tracked(demo_set, tmp_path_factory) -> tuple[Path, dict[str, Any], Service]:
    """The folder of a run with TensorBoard and W&B, its results, and what W&B was told."""
    with pytest.MonkeyPatch.context() as patch:
        folder, told = tmp_path_factory.mktemp("tracked") / "run", put_in_place("wandb", patch)
        results = train_in(folder, demo_set, "--tensorboard --tracker wandb --scheduler linear")
    return folder, results, told


def test_tensorboard_reads_back_what_metrics_csv_holds(tracked):
    folder, results, _ = tracked
    history, found = pd.read_csv(folder / "metrics.csv"), events(folder)
    columns = [name for name in history if name != "epoch"]
    tests = {f"test/{name}": value for name, value in results["test"].items()}
    assert {"train/lr", "train/grad_norm", "train/loss_q", "val/main", "speed/images_per_s"} <= set(
        map(tag_of, columns)
    )
    assert set(found.Tags()["scalars"]) == {*map(tag_of, columns), *tests}
    for name in columns:
        points = found.Scalars(tag_of(name))
        assert [point.step for point in points] == [1, 2]
        assert [point.value for point in points] == pytest.approx(history[name].tolist(), rel=1e-6), name
    assert history["lr"].nunique() == 2
    for tag, value in tests.items():
        (point,) = found.Scalars(tag)
        assert (point.step, point.value) == (2, pytest.approx(value, rel=1e-6))
    text = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lr | 0.01 |" in text and "| epochs | 2 |" in text


def test_a_tracker_gets_settings_every_epoch_and_the_test_scores(tracked):
    folder, results, told = tracked
    (started,) = told.started
    assert folder.name == started["name"]
    saved = json.loads((folder / "config.json").read_text())
    assert started["config"] == {name: value for name, value in saved.items() if name != "provenance"}
    assert (started["config"]["lr"], started["config"]["tracker"]) == (0.01, "wandb")
    history = pd.read_csv(folder / "metrics.csv")
    rows = [{tag_of(key): value for key, value in row.items() if key != "epoch"} for row in history.to_dict("records")]
    assert [step for step, _ in told.logged] == [1, 2, 2]
    for (_, scalars), row in zip(told.logged, rows, strict=False):
        assert scalars == pytest.approx(row, rel=1e-6)
    assert told.logged[-1][1] == {f"test/{key}": value for key, value in results["test"].items()}
    assert told.ended == [OUTCOMES["wandb"][False]]
    assert set(events(folder).Tags()["scalars"]) == {tag for _, scalars in told.logged for tag in scalars}


def test_without_the_flags_nothing_is_sent_and_an_older_runs_events_go(tracked, demo_set, tmp_path, monkeypatch):
    told = [put_in_place(name, monkeypatch) for name in OUTCOMES]
    folder = Path(shutil.copytree(tracked[0], tmp_path / "run"))
    (folder / "wandb").mkdir()
    train_in(folder, demo_set, "--overwrite")
    assert not {TENSORBOARD_DIR, "wandb"} & {item.name for item in folder.iterdir()}
    assert [(one.started, one.logged, one.ended) for one in told] == [([], [], [])] * 2


def test_a_run_that_leaves_the_test_fold_unread_sends_no_test_scores(demo_set, tmp_path, monkeypatch):
    told = put_in_place("mlflow", monkeypatch)
    train_in(tmp_path / "run", demo_set, "--no_test --tracker mlflow")
    sent = {tag for _, scalars in told.logged for tag in scalars}
    assert sent and not [tag for tag in sent if tag.startswith("test/")]
    assert told.ended == [OUTCOMES["mlflow"][False]]


def test_a_run_that_fails_after_its_last_epoch_is_told_as_failed(demo_set, tmp_path, monkeypatch):
    told = put_in_place("wandb", monkeypatch)

    def fail(*args: object) -> None:
        raise ValueError("out of luck")

    monkeypatch.setattr(outcome, "load_best", fail)
    with pytest.raises(SystemExit, match="2"):
        train_in(tmp_path / "run", demo_set, "--tracker wandb")
    assert told.ended == [OUTCOMES["wandb"][True]]


def test_only_the_process_that_writes_sends_anything(service, tmp_path):
    config = TrainingConfig(tensorboard=True, tracker=service[0])
    experiment = SimpleNamespace(config=config, runtime=devices.start_runtime("cpu", "off"))
    other = run_folder.RunFolder(tmp_path / "run", active=False)
    with optimisation.open_trackers(experiment, other, resuming.Progress()) as trackers:  # type: ignore[arg-type]
        trackers.log({"loss": 1.0}, 1)
    assert (service[1].started, service[1].logged) == ([], []) and not list(tmp_path.iterdir())


# -- what cannot be had


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
@pytest.mark.parametrize("leftover", [False, True])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    demo_set, package, leftover, monkeypatch, capsys, tmp_path
):
    real = tracking.importlib.util.find_spec
    spec = ModuleSpec(package, None, is_package=True) if leftover else None  # a folder of that name in the way
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: spec if name == package else real(name))
    with pytest.raises(SystemExit) as stop:
        train_in(tmp_path / "run", demo_set, f"--tracker {package} --cache_dir {tmp_path / 'cache'}")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err == (
        f"error: --tracker {package}: {package} is not installed; pip install {package}, or drop the flag\n"
    )
    assert list(tmp_path.iterdir()) == [] and printed.out == ""


def test_a_tracker_that_refuses_is_one_line_and_closes_the_others(demo_set, tmp_path, monkeypatch, capsys):
    put_in_place("wandb", monkeypatch).refusal = RefusedError("no key:\n  log in\n")
    closed, close = [], tracking.TensorBoard.close
    monkeypatch.setattr(
        tracking.TensorBoard, "close", lambda self, *, failed: closed.append(failed) or close(self, failed=failed)
    )
    with pytest.raises(SystemExit) as stop:
        train_in(tmp_path / "run", demo_set, "--tensorboard --tracker wandb")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --tracker wandb: no key: log in\n"
    assert closed == [True]
