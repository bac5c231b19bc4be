"""`training/tracking.py`: what arrives at TensorBoard, W&B and MLflow, and what comes of one that cannot go on."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from fake_trackers import OUTCOMES, RefusedError, Service, events, put_in_place
from two_layers import NUM_EPOCHS, train

from training import loop, run_folder, tracking
from training.tracking import TENSORBOARD_DIR, Trackers, tag_of


@pytest.fixture(params=["wandb", "mlflow"])
def service(request, monkeypatch) -> tuple[str, Service]:
    """A tracker's name, and what stands for it while the test lasts."""
    return request.param, put_in_place(request.param, monkeypatch)


# -- in a training


def test_several_trackers_get_settings_and_every_epoch_as_metrics_csv_holds_it(tmp_path, service):
    name, told = service
    folder = tmp_path / "mine"
    train(folder, trackers=("tensorboard", name))
    (started,) = told.started
    assert "mine" in (started.get("name"), started.get("run_name")) and started["config"] == {"lr": 1e-2}
    history, found = pd.read_csv(folder / "metrics.csv"), events(folder)
    rows = [{tag_of(key): value for key, value in row.items() if key != "epoch"} for row in history.to_dict("records")]
    assert [step for step, _ in told.logged] == [*range(1, NUM_EPOCHS + 1)]
    for (_, scalars), row in zip(told.logged, rows, strict=True):
        assert scalars == pytest.approx(row, rel=1e-6)
    assert set(found.Tags()["scalars"]) == set(rows[0])
    for tag in rows[0]:
        assert [point.value for point in found.Scalars(tag)] == pytest.approx([row[tag] for row in rows], rel=1e-6)
    text = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lr | 0.01 |" in text
    assert told.ended == [OUTCOMES[name][False]]


@pytest.mark.parametrize("error", [loop.NonFiniteLoss("loss", float("nan"), step=3), KeyboardInterrupt()])
def test_a_training_that_breaks_down_is_told_as_failed(tmp_path, service, monkeypatch, error):
    real, epochs = loop.train_epoch, iter([None])

    def breaking(*args: Any, **options: Any) -> Any:
        if next(epochs, 1):
            raise error
        return real(*args, **options)

    monkeypatch.setattr(loop, "train_epoch", breaking)
    with pytest.raises(type(error)):
        train(tmp_path / "run", trackers=(service[0],))
    assert [step for step, _ in service[1].logged] == [1]
    assert service[1].ended == [OUTCOMES[service[0]][True]]


def test_a_tracker_that_fails_in_training_is_given_up_aloud_and_training_goes_on(
    tmp_path, service, monkeypatch, capsys
):
    name, told = service

    def fail(self: object, scalars: object, step: int) -> None:
        told.logged.append((step, {}))
        raise RefusedError("nobody\nanswers")

    monkeypatch.setattr(tracking.KINDS[name], "log", fail)
    progress, _ = train(tmp_path / "run", trackers=(name,))
    assert len(progress.history) == NUM_EPOCHS
    assert len(told.logged) == 1 and told.ended == []
    assert "gets nothing more: nobody answers" in capsys.readouterr().out


def test_an_older_runs_events_do_not_mix_with_those_of_the_next(tmp_path):
    for epochs in (4, 2):
        with run_folder.RunFolder(tmp_path / "run", overwrite=True):
            pass
        train(tmp_path / "run", trackers=("tensorboard",), epochs=epochs)
        steps = [point.step for point in events(tmp_path / "run").Scalars("val/fit")]
        assert steps == [*range(1, epochs + 1)]
    (tmp_path / "run" / "wandb").mkdir()
    with run_folder.RunFolder(tmp_path / "run", overwrite=True):
        pass
    train(tmp_path / "run")
    assert not {TENSORBOARD_DIR, "wandb"} & {item.name for item in (tmp_path / "run").iterdir()}


# -- by themselves


def test_epochs_that_are_told_again_replace_those_told_before(tmp_path):
    for last in (2, 3):
        with Trackers(["tensorboard"], tmp_path, {}) as trackers:
            for epoch in range(1, last + 1):
                trackers.log({"val_main": 0.5}, epoch)
    assert [event.step for event in events(tmp_path).Scalars("val/main")] == [1, 2, 3]


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


def test_a_tracker_that_refuses_is_one_line_and_closes_the_others(tmp_path, service, monkeypatch):
    name, told = service
    told.refusal = RefusedError("no key:\n  log in\n")
    closed, close = [], tracking.TensorBoard.close
    monkeypatch.setattr(
        tracking.TensorBoard, "close", lambda self, *, failed: closed.append(failed) or close(self, failed=failed)
    )
    with pytest.raises(ValueError, match=rf"^--tracker {name}: no key: log in$"):
        Trackers(["tensorboard", name], tmp_path, {})
    assert closed == [True]


def test_tensorboard_that_is_not_installed_is_refused_by_its_flag(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--tensorboard: tensorboard is not installed"):
        tracking.check_installed(["tensorboard"])
    tracking.check_installed([])


def test_without_trackers_nothing_is_written_or_imported(tmp_path, service):
    train(tmp_path / "run")
    assert not (tmp_path / "run" / TENSORBOARD_DIR).exists()
    assert (service[1].started, service[1].logged, service[1].ended) == ([], [], [])
