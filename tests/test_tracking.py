"""`tracking.py`: what arrives at TensorBoard, W&B and MLflow, in whole runs and when a run breaks down."""

from __future__ import annotations

import json
import math
import shlex
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import baseline
import checkpoint
import engine
import resuming
import tracking
from configs import TrainingConfig
from tracking import TENSORBOARD_DIR, Trackers, tag_of

TINY = "--clip_model tiny --clip_pretrained none --image_size 112"
RUN = f"{TINY} --freeze_clip --epochs 2 --lr 1e-2 --advice off --no_report"


@pytest.fixture
def train(demo_set, tmp_path):
    """A function that trains on the demo set with the given flags; returns run folder and results."""

    def run(flags: str = "") -> tuple[Path, dict[str, Any]]:
        paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
        folder = tmp_path / "run"
        return folder, baseline.main([*paths, "--output_dir", str(folder), *shlex.split(f"{RUN} {flags}")])

    return run


class Service:
    """Stands for W&B and MLflow alike, and writes down what it is told."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[Any] = []
        self.refusal: Exception | None = None

    def start(self, **given: Any) -> Any:
        if self.refusal:
            raise self.refusal
        self.started.append(given)
        return SimpleNamespace(log=self.log, finish=lambda exit_code: self.ended.append(exit_code))

    def log(self, scalars: dict[str, float], step: int) -> None:
        assert all(isinstance(value, float) for value in scalars.values())
        self.logged.append((step, scalars))


class RefusedError(Exception):
    pass


@pytest.fixture(params=["wandb", "mlflow"])
def service(request, monkeypatch) -> tuple[str, Service]:
    """A tracker's name, and what stands for it while the test lasts."""
    told, module = Service(), ModuleType(request.param)
    module.__spec__ = ModuleSpec(request.param, None, origin="here")
    if request.param == "wandb":
        module.init, module.Error = told.start, RefusedError  # type: ignore[attr-defined]
    else:
        module.start_run, module.log_metrics = told.start, told.log  # type: ignore[attr-defined]
        module.log_params = lambda given: told.started[-1].update(config=given)  # type: ignore[attr-defined]
        module.end_run = told.ended.append  # type: ignore[attr-defined]
        module.MlflowException = RefusedError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, told


OUTCOMES = {"wandb": {True: 1, False: 0}, "mlflow": {True: "FAILED", False: "FINISHED"}}


def events(folder: Path) -> Any:
    """What TensorBoard reads of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / TENSORBOARD_DIR))
    found.Reload()
    return found


# -- in a run


def test_tensorboard_reads_back_what_metrics_csv_holds(train):
    folder, results = train("--tensorboard --scheduler linear")
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


def test_nothing_is_written_or_imported_without_the_flag(train, service):
    folder, _ = train()
    assert not (folder / TENSORBOARD_DIR).exists()
    assert (service[1].started, service[1].logged, service[1].ended) == ([], [], [])


def test_a_tracker_gets_settings_every_epoch_and_the_test_scores(train, service):
    name, told = service
    folder, results = train(f"--tracker {name}")
    (started,) = told.started
    assert folder.name in (started.get("name"), started.get("run_name"))
    saved = json.loads((folder / "config.json").read_text())
    assert started["config"] == {name: value for name, value in saved.items() if name != "provenance"}
    assert (started["config"]["lr"], started["config"]["tracker"]) == (0.01, name)
    history = pd.read_csv(folder / "metrics.csv")
    rows = [{tag_of(key): value for key, value in row.items() if key != "epoch"} for row in history.to_dict("records")]
    assert [step for step, _ in told.logged] == [1, 2, 2]
    for (_, scalars), row in zip(told.logged, rows, strict=False):
        assert scalars == pytest.approx(row, rel=1e-6)
    assert told.logged[-1][1] == {f"test/{key}": value for key, value in results["test"].items()}
    assert told.ended == [OUTCOMES[name][False]]


def test_several_trackers_get_the_same(train, service):
    folder, _ = train(f"--tensorboard --tracker {service[0]}")
    assert set(events(folder).Tags()["scalars"]) == {tag for _, scalars in service[1].logged for tag in scalars}


def test_a_run_that_leaves_the_test_fold_unread_sends_no_test_scores(train, service):
    train(f"--no_test --tracker {service[0]}")
    sent = {tag for _, scalars in service[1].logged for tag in scalars}
    assert sent and not [tag for tag in sent if tag.startswith("test/")]
    assert service[1].ended == [OUTCOMES[service[0]][False]]


@pytest.mark.parametrize("error", [engine.NonFiniteLoss("loss", float("nan"), step=3), KeyboardInterrupt()])
def test_a_run_that_breaks_down_is_told_as_failed(train, service, monkeypatch, error):
    real, epochs = baseline.engine.train_epoch, iter([None])

    def breaking(*args: Any, **options: Any) -> Any:
        if next(epochs, 1):
            raise error
        return real(*args, **options)

    monkeypatch.setattr(baseline.engine, "train_epoch", breaking)
    with pytest.raises(SystemExit):
        train(f"--tracker {service[0]}")
    assert [step for step, _ in service[1].logged] == [1]
    assert service[1].ended == [OUTCOMES[service[0]][True]]


def test_an_older_runs_events_do_not_mix_with_those_of_the_next(train):
    train("--tensorboard")
    folder, _ = train("--tensorboard --overwrite")
    assert [point.step for point in events(folder).Scalars("val/main")] == [1, 2]
    for name in ("tensorboard", "wandb"):
        (folder / name).mkdir(exist_ok=True)
    folder, _ = train("--overwrite")
    assert not {"tensorboard", "wandb"} & {item.name for item in folder.iterdir()}


def test_epochs_that_are_told_again_replace_those_told_before(tmp_path):
    for last in (2, 3):
        with Trackers(["tensorboard"], tmp_path, {}) as trackers:
            for epoch in range(1, last + 1):
                trackers.log({"val_main": 0.5}, epoch)
    assert [event.step for event in events(tmp_path).Scalars("val/main")] == [1, 2, 3]


def test_only_the_process_that_writes_sends_anything(service, tmp_path):
    config = TrainingConfig(tensorboard=True, tracker=service[0])
    other = checkpoint.RunFolder(tmp_path / "run", active=False)
    with baseline.open_trackers(config, other, engine.start_runtime("cpu", "off"), resuming.Course()) as trackers:
        trackers.log({"loss": 1.0}, 1)
    assert (service[1].started, service[1].logged) == ([], []) and not list(tmp_path.iterdir())


# -- what cannot be had


@pytest.mark.parametrize(("flag", "package"), [("--tracker wandb", "wandb"), ("--tracker mlflow", "mlflow")])
@pytest.mark.parametrize("leftover", [False, True])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    train, flag, package, leftover, monkeypatch, capsys, tmp_path
):
    real = tracking.importlib.util.find_spec
    spec = ModuleSpec(package, None, is_package=True) if leftover else None  # a folder of that name in the way
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: spec if name == package else real(name))
    with pytest.raises(SystemExit) as stop:
        train(f"{flag} --cache_dir {tmp_path / 'cache'}")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err == f"error: {flag}: {package} is not installed; pip install {package}, or drop the flag\n"
    assert list(tmp_path.iterdir()) == [] and printed.out == ""


def test_tensorboard_that_is_not_installed_is_refused_by_its_flag(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--tensorboard: tensorboard is not installed"):
        tracking.check_installed(["tensorboard"])
    tracking.check_installed([])


def test_a_tracker_that_refuses_is_one_line_and_closes_the_others(train, service, monkeypatch, capsys):
    name, told = service
    told.refusal = RefusedError("no key:\n  log in\n")
    closed = []
    monkeypatch.setattr(tracking.TensorBoard, "close", lambda self, *, failed: closed.append(failed))
    with pytest.raises(SystemExit) as stop:
        train(f"--tensorboard --tracker {name}")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: --tracker {name}: no key: log in\n"
    assert closed == [True]


# -- by itself


@pytest.mark.parametrize(
    ("column", "tag"),
    [
        ("val_main", "val/main"),
        ("test_srocc_q", "test/srocc_q"),
        ("lr", "train/lr"),
        ("loss", "train/loss"),
        ("grad_norm", "train/grad_norm"),
        ("seconds", "speed/seconds"),
        ("data_wait", "speed/data_wait"),
        ("images_per_s", "speed/images_per_s"),
        ("gpu_memory_gb", "speed/gpu_memory_gb"),
        ("value", "train/value"),
    ],
)
def test_a_column_becomes_a_tag_of_its_section(column, tag):
    assert tag_of(column) == tag


def test_trackers_close_when_the_block_is_left(tmp_path, service):
    name, told = service
    with Trackers([name], tmp_path, {}) as trackers:
        trackers.log({"epoch": 1, "loss": math.nan}, 1)
        assert told.ended == []
    assert told.ended == [OUTCOMES[name][False]]
    assert [list(scalars) for _, scalars in told.logged][:1] == [["train/loss"]]


def test_a_run_that_fails_after_its_last_epoch_is_told_as_failed(train, service, monkeypatch):
    name, told = service

    def fail(*args: object) -> None:
        raise ValueError("out of luck")

    monkeypatch.setattr(baseline, "load_best", fail)
    with pytest.raises(SystemExit, match="2"):
        train(f"--tracker {name}")
    assert told.ended == [OUTCOMES[name][True]]


def test_a_tracker_that_fails_in_training_is_given_up_aloud_and_training_goes_on(train, service, monkeypatch, capsys):
    name, told = service

    def fail(self: object, scalars: object, step: int) -> None:
        told.logged.append((step, {}))
        raise RefusedError("nobody\nanswers")

    monkeypatch.setattr(tracking.KINDS[name], "log", fail)
    assert "best_epoch" in train(f"--tracker {name}")[1]
    assert len(told.logged) == 1 and told.ended == []
    assert "gets nothing more: nobody answers" in capsys.readouterr().out
