"""`tuning.queue` and `tuning.study`: several workers, of which some die, run every trial once."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import event, exc
from sqlalchemy.engine import Engine
from stand_in import LR, Trainer, flags_of, in_place, parabola, values

import search
from cli.memo import Memo
from configs import TrainingConfig
from search import main, prepare, run_trial
from storage.locks import locked
from training import run_folder
from tuning import arguments, queue, study
from tuning.study import (
    FINISHED,
    OPENINGS,
    SEARCH_FILE,
    Search,
    check_same_search,
    open_study,
    refuse_occupied,
)


@pytest.fixture
def train() -> Iterator[Callable[..., Trainer]]:
    """A function that puts a Trainer in the place of `baseline.run`."""
    with in_place() as install:
        yield install


def signed_by(trial: optuna.Trial, **other: Any) -> None:
    """Sign a trial as another process would."""
    trial.set_user_attr("signed", {**queue.this_process(), "beat": time.time(), **other})


@pytest.mark.parametrize("place", [["elsewhere", queue.this_process()["place"][1]], ["", "pid:[1]"]])
def test_a_silent_trial_of_another_machine_is_given_up_after_a_while(place, tmp_path, train):
    """Or of another container, which may have the name of this one."""
    train()
    study = main(flags_of(tmp_path, LR, "--trials 3"))
    trial = study.ask()
    place = [place[0] or queue.this_process()["place"][0], place[1]]
    signed_by(trial, place=place)
    assert not queue.is_dead(study.trials[-1])
    signed_by(trial, place=place, beat=time.time() - queue.DEAD_AFTER_SECONDS - 1)
    assert queue.is_dead(study.trials[-1])
    assert len(values(main(flags_of(tmp_path, LR, "--trials 5")))) == 5


def test_whether_a_trial_of_this_machine_is_dead_is_seen_at_its_process():
    study = optuna.create_study()
    trial = study.ask()
    silent = {"beat": time.time() - 100 * queue.DEAD_AFTER_SECONDS}  # a laptop that slept
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        start = queue.state_and_start(ended.pid)[1]
        for signed, is_dead in (
            (silent, False),
            ({"start": "1"}, True),  # whose number another process has now
            ({"pid": ended.pid, "start": start}, True),  # killed, and its parent has not looked yet
        ):
            signed_by(trial, **signed)
            assert queue.is_dead(study.trials[0]) == is_dead, signed
    signed_by(trial, pid=ended.pid, start=start)
    assert start.isdigit() and queue.is_dead(study.trials[0])


def test_where_processes_cannot_be_seen_a_living_one_is_told_by_its_beat(monkeypatch):
    monkeypatch.setattr(queue, "state_and_start", lambda pid: ("", ""))
    study = optuna.create_study()
    trial = study.ask()
    signed_by(trial)
    assert not queue.is_dead(study.trials[0])
    signed_by(trial, beat=time.time() - queue.DEAD_AFTER_SECONDS - 1)
    assert queue.is_dead(study.trials[0])
    with subprocess.Popen(["true"]) as ended:
        pass
    signed_by(trial, pid=ended.pid)
    assert queue.is_dead(study.trials[0])


def test_a_process_may_have_any_name(tmp_path):
    name = tmp_path / "x) Z 1 (y"
    name.symlink_to("/bin/sleep")
    with subprocess.Popen([name, "60"]) as process:
        state, start = queue.state_and_start(process.pid)
        process.kill()
    assert state in "RSD" and len(start) > 1 and start.isdigit()


def test_a_beat_that_cannot_be_written_is_not_the_last_one(monkeypatch):
    monkeypatch.setattr(queue, "BEAT_SECONDS", 0.001)
    errors = [optuna.exceptions.StorageInternalError(), exc.OperationalError("", {}, Exception()), OSError()]
    came_through = threading.Event()

    def set_user_attr(name: str, value: Any) -> None:
        if errors:
            raise errors.pop()
        came_through.set()

    with queue.heartbeat(SimpleNamespace(set_user_attr=set_user_attr)):
        assert came_through.wait(20)


@pytest.mark.parametrize("call", [6, 10])  # of five in each trial: in the first epoch, and when all are over
def test_whose_trial_was_taken_over_says_so_and_goes_on(call, tmp_path, train, capsys):
    calls = []

    def taken(config: TrainingConfig) -> float:
        calls.append(config)
        if len(calls) == call:
            study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/out/study.db")
            queue.requeue(study, study.trials[-1], killed=True)
        return parabola(config)

    train(taken)
    study = main(flags_of(tmp_path))
    said = capsys.readouterr().out
    assert said.count("note      trial 1 was taken over by another worker, which took this one for dead\n") == 1
    assert len(values(study)) == 8 and study.trials[1].state == TrialState.FAIL
    (again,) = (trial for trial in study.trials if trial.user_attrs.get("instead_of") == 1)
    assert again.state in FINISHED and again.params == study.trials[1].params


def worker_of(folder: Path, trials: int = 8) -> Search:
    """A worker of a search, or another one."""
    (folder / "out").mkdir(exist_ok=True)
    request = arguments.parse_search_args(flags_of(folder, LR, f"--trials {trials}"))
    return Search(open_study(request), request, dict(request.space or {}), Memo(), datetime.now())


@contextmanager
def meanwhile(monkeypatch: pytest.MonkeyPatch, statement: str, other: Callable[[], Any]) -> Iterator[list[Any]]:
    """Call `other` in a thread just before this one sends the first such statement, until it is done or has to wait.

    Yields:
        Where its result, or its error, will be when the block is over.
    """
    here, threads, found, waits = threading.current_thread(), [], [], threading.Event()
    monkeypatch.setattr(study, "locked", lambda folder, *, wait: locked(folder, wait=waits.set))

    def call() -> None:
        try:
            found.append(other())
        except Exception as error:  # noqa: BLE001  # which is what is looked for
            found.append(error)

    def before(connection: Any, cursor: Any, text: str, *rest: Any) -> None:
        if threads or threading.current_thread() is not here or not text.strip().startswith(statement):
            return
        threads.append(threading.Thread(target=call))
        threads[0].start()
        while threads[0].is_alive() and not waits.wait(0.01):
            pass

    event.listen(Engine, "before_cursor_execute", before)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        threads[0].join()


def test_two_workers_are_never_given_the_same_trial(tmp_path, monkeypatch):
    mine, others = worker_of(tmp_path), worker_of(tmp_path)
    for lr in (1e-3, 1e-2):
        mine.study.enqueue_trial({"lr": lr})
    with meanwhile(monkeypatch, "UPDATE trials", lambda: queue.next_trial(others).number) as found:
        number = queue.next_trial(mine).number
    assert [number, *found] == [0, 1]


def test_two_workers_do_not_put_the_same_trial_back(tmp_path, monkeypatch):
    mine, others = worker_of(tmp_path), worker_of(tmp_path)
    trial = mine.study.ask()
    trial.suggest_float("lr", 1e-6, 1.0, log=True)
    signed_by(trial, start="1")  # a dead one
    with meanwhile(monkeypatch, "UPDATE trials", lambda: queue.next_trial(others).number) as found:
        number = queue.next_trial(mine).number
    assert [number, *found] == [1, 2]
    assert [trial.user_attrs.get("instead_of") for trial in mine.study.trials] == [None, 0, None]


def test_a_trial_that_just_ends_is_not_put_back(tmp_path, train, monkeypatch):
    train()
    mine, others = worker_of(tmp_path), worker_of(tmp_path)
    trial = queue.next_trial(mine)
    monkeypatch.setattr(queue, "is_dead", lambda trial: True)
    with meanwhile(monkeypatch, "UPDATE trials", lambda: queue.next_trial(others).number) as found:
        run_trial(mine, trial)
    assert found == [1] and mine.study.trials[0].state == TrialState.COMPLETE
    assert "instead_of" not in mine.study.trials[1].user_attrs


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE studies", "INSERT INTO alembic_version", "INSERT INTO study_user_attributes"]
)
def test_the_same_search_may_be_started_twice_at_once(statement, tmp_path, train, monkeypatch):
    train()
    request = arguments.parse_search_args(flags_of(tmp_path))
    with meanwhile(monkeypatch, statement, lambda: prepare(request, Memo()).study.study_name) as found:
        assert prepare(request, Memo()).study.study_name == "search"
    assert found == ["search"]


def test_what_is_searched_is_never_half_written(tmp_path, monkeypatch):
    """Nor for those on other machines, with folders of their own."""
    mine, others = worker_of(tmp_path), worker_of(tmp_path)
    write = mine.study.set_user_attr

    def then_the_others(name: str, value: Any) -> None:
        write(name, value)
        check_same_search(others.study, others.request, others.space, {})

    monkeypatch.setattr(mine.study, "set_user_attr", then_the_others)
    check_same_search(mine.study, mine.request, mine.space, {})


def test_a_search_that_begins_this_very_moment_is_no_other_thing(tmp_path, monkeypatch):
    look = run_folder.is_empty_folder

    def late(folder: Path) -> bool:
        (folder / SEARCH_FILE).write_text("{}")
        return look(folder)

    monkeypatch.setattr(run_folder, "is_empty_folder", late)
    refuse_occupied(tmp_path, "--output_dir")


@pytest.mark.parametrize(("failures", "url"), [(2, "postgresql://h/db"), (99, "postgresql://h/db"), (1, "sqlite://")])
def test_a_database_server_is_tried_again_since_others_may_be_making_its_tables(failures, url, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "POLL_SECONDS", 0)
    calls = []

    def storage_at(asked: str) -> Any:
        calls.append(asked)
        if len(calls) <= failures:
            raise exc.ProgrammingError("CREATE TABLE", {}, Exception("exists already"))
        return optuna.storages.InMemoryStorage()

    monkeypatch.setattr(study, "storage_at", storage_at)
    request = arguments.parse_search_args(flags_of(tmp_path, LR, f"--storage {url}"))
    with pytest.raises(ValueError, match="exists already") if failures != 2 else nullcontext():
        open_study(request)
    assert calls == [url] * {2: 3, 99: OPENINGS, 1: 1}[failures]


@pytest.fixture(scope="module")
def four_values(tmp_path_factory) -> list[dict[str, Any]]:
    """What the four trials of a search try that nobody has stopped."""
    with in_place() as install:
        install()
        return values(main(flags_of(tmp_path_factory.mktemp("whole"), LR, "--trials 4")))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(optuna.Study, "ask"), (queue, "sign_trial"), (queue, "sampler_of"), (search, "next_trial"), (search, "suggest")],
)
def test_a_trial_that_has_just_begun_is_given_back_at_ctrl_c(owner, name, four_values, tmp_path, train, monkeypatch):
    train()
    original, calls = getattr(owner, name), []

    def interrupted(*args: Any) -> Any:
        found = original(*args)
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return found

    flags = flags_of(tmp_path, LR, "--trials 4")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(SystemExit) as stop:
            main(flags)
    assert stop.value.code == 130
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/out/study.db")
    assert [trial.state for trial in study.trials[2:]] == [TrialState.FAIL, TrialState.WAITING]
    assert values(main(flags)) == four_values


def test_a_trial_that_kills_its_process_twice_is_not_tried_a_third_time(tmp_path, train):
    train()
    study = main(flags_of(tmp_path, LR, "--trials 2"))
    for again in (False, True):
        trial = study.ask()
        assert trial.user_attrs.get("killed", False) == again
        trial.suggest_float("lr", 1e-6, 1.0, log=True)
        queue.requeue(study, study.trials[trial.number], killed=True)
    assert not any(trial.state == TrialState.WAITING for trial in study.trials)


def test_who_asks_a_moment_too_late_steps_back_and_waits(tmp_path, train, monkeypatch):
    train()
    study = main(flags_of(tmp_path, LR, "--trials 2"))
    request = arguments.parse_search_args(flags_of(tmp_path, LR, "--trials 3"))
    ask, others = study.ask, []

    def late() -> Any:
        others.append(ask())  # another worker's, of this very moment
        signed_by(others[-1], place=["elsewhere", ""])
        return ask()

    def wait(seconds: float) -> None:
        study.tell(others[0], 0.5)

    monkeypatch.setattr(study, "ask", late)
    monkeypatch.setattr(queue.time, "sleep", wait)
    mine = Search(study, request, dict(request.space or {}), Memo(), datetime.now())
    assert queue.next_trial(mine) is None
    assert [trial.state for trial in study.trials[2:]] == [TrialState.COMPLETE, TrialState.FAIL]
    assert queue.superseded(study.trials) == {3} and "cause" not in study.trials[3].user_attrs
