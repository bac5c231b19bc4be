"""`search.py`: spaces that are refused, studies that go on where they stopped, and optima that are known beforehand."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pandas as pd
import pytest
from conftest import ROOT, scored_rows
from folders import fill
from optuna.trial import TrialState
from safetensors.torch import load_file
from stand_in import (
    BEST_LR,
    LR,
    Trainer,
    examples,
    flags_of,
    in_place,
    interrupt,
    parabola,
    process,
    refusal,
    values,
)

import baseline
import data
import search
from backbones import loading
from cli.memo import Memo
from configs import TrainingConfig
from finetune import experiment, outcome, task
from guidance.arguments import parse_args
from multirun import protocol
from search import SearchFailed, main, run_workers
from training import devices, loop
from tuning import arguments, study
from tuning.study import FINISHED, STARTUP_TRIALS

TINY = shlex.split("--clip_model tiny --clip_pretrained none --image_size 56 --freeze_clip --batch_size 16")


@pytest.fixture
def train() -> Iterator[Callable[..., Trainer]]:
    """A function that puts a Trainer in the place of `baseline.run`."""
    with in_place() as install:
        yield install


# -- spaces


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("{", "", ["cannot be read"]),
        ("[]", "", ["is not a JSON object"]),
        ('{"lr": {"low": 1e-5, "high": 1e-3}, "lr": {"low": 1e-5, "high": 1e-3}}', "", ["'lr' occurs twice"]),
        ({"learning_rat": {"low": 0, "high": 1}}, "", ["unknown option 'learning_rat'"]),
        ({"dropuot": {"low": 0, "high": 0.5}}, "", ["did you mean 'dropout'"]),
        ({"lr": {"low": 1e-3, "high": 1e-5}}, "", ["lr", "low 0.001 must be below high 1e-05"]),
        ({"lr": {"low": 1e-5, "high": 11}}, "", ["--lr 11", "(0, 10]"]),
        ({"lr": {"low": 0, "high": 1}}, "", ["--lr 0", "(0, 10]"]),
        ({"dropout": {"low": 0, "high": 0.5, "log": True}}, "", ["log works above 0"]),
        ({"lr": {"low": 1e-5, "high": float("nan")}}, "", ["is not a finite number"]),
        ({"lr": {"low": 1e-5}}, "", ['needs "low" and "high"']),
        ({"lr": {"low": 1e-5, "high": 1, "logg": True}}, "", ["unknown key 'logg'"]),
        ({"lr": {"low": "1e-5", "high": 1}}, "", ["'1e-5' must be a number"]),
        ({"lr": 1e-3}, "", ['must be {"low"']),
        ({"epochs": {"low": 1.5, "high": 4}}, "", ["1.5 must be a whole number"]),
        ({"epochs": {"low": 1, "high": 4, "step": 2}}, "", ["step 2 must lead from low 1 to high 4"]),
        ({"epochs": {"low": 1, "high": 4, "step": 0}}, "", ["step 0"]),
        ({"loss": {"low": 0, "high": 1}}, "", ["is no number"]),
        ({"loss": {"choices": ["mse", "mes"]}}, "", ["--loss mes"]),
        ({"scheduler": {"choices": ["cosine", "cosin"]}}, "", ["--scheduler cosin", "cosine, linear"]),
        ({"loss": {"choices": ["mse"]}}, "", ["two values or more"]),
        ({"batch_size": {"choices": [16, 16]}}, "", ["a value twice"]),
        ({"batch_size": {"choices": [16, 32], "low": 1}}, "", ["stand alone"]),
        ({"w_q": {"low": 0.5, "high": 2}}, "", ["w_q", "w_c is 1 - w_q"]),
        ({"output_dir": {"choices": ["a", "b"]}}, "", ["output_dir", "cannot be searched"]),
        ({"test_size": {"low": 0.1, "high": 0.3}}, "", ["cannot be searched"]),
        ({"quality_column": {"choices": ["mos_quality", "mos_align"]}}, "", ["quality_column", "cannot be searched"]),
        ({"mos_range_q": {"choices": [[1, 5], [0, 6]]}}, "", ["mos_range_q", "cannot be searched"]),
        ({"select_by": {"choices": ["main", "srocc_q"]}}, "", ["cannot be searched"]),
        ({"dropout": {"choices": [0.1, [0.2]]}}, "", ["--dropout [0.2]", "must be a number"]),
        (LR, "--lr 1e-4", ["lr is also given as --lr"]),
        ({"freeze_layers": {"low": 1, "high": 4}}, "--freeze_clip", ["freeze_layers does nothing"]),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_in_one_line(content, flags, words, tmp_path, train, capsys):
    trainer = train()
    said = refusal(flags_of(tmp_path, content, flags), capsys)
    assert "--space" in said and all(word in said for word in words), said
    assert not trainer.configs and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--trials 0 --output_dir a", "--trials 0"),
        ("--trials 5", "--output_dir"),
        ("--seeds -1 --output_dir a", "--seeds -1"),
        ("--workers 0 --output_dir a", "--workers 0"),
        ("--timeout 0 --output_dir a", "--timeout 0"),
        ("--repeats 3 --output_dir a", "--repeats"),
        ("--no_test --output_dir a", "--no_test"),
        ("--trails 5 --output_dir a", "did you mean --trials"),
        ("--epochz 5 --output_dir a", "did you mean --epochs"),
        ("--space no.json --output_dir a", "--space no.json: no such file"),
        ("--storage mysqll://me:secret@h/db --output_dir a", "--storage mysqll://me:***@h/db"),
        ("--storage study.db --output_dir a", "--storage: must be a database URL such as postgresql://"),
        ("--storage postgresql://me:secret@h:p/db --output_dir a", "--storage: must be a database URL such as"),
        ("--storage postgresql://me:sec@ret@h/db --output_dir a", "--storage: has an @ too many; within a password"),
        (
            "--storage postgresql://me:secret@127.0.0.1:1/db?password=secret --output_dir a",
            "--storage postgresql://me:***@127.0.0.1:1/db: cannot be used (connection failed: connection to server at",
        ),
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_line(flags, words, train, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train()
    said = refusal(shlex.split(flags), capsys)
    assert words in said and "sec" not in said


def test_every_kind_of_option_comes_back_as_it_was_chosen(tmp_path, train):
    content = {
        "horizontal_flip": {"choices": [True, False]},
        "head_lr": {"choices": [None, 1e-3]},
        "calibration": {"choices": [True, False]},
        "loss": {"choices": ["mse", "mse+plcc"]},
        "epochs": {"low": 2, "high": 6, "step": 2},
        "hidden_dim_q": {"low": 8, "high": 512, "log": True},
        "dropout": {"low": 0, "high": 0.5, "step": 0.25},
        "cache_views": {"choices": [None, 0, 2]},
    }
    trainer = train()
    main(flags_of(tmp_path, content, "--trials 30"))
    seen = {name: {getattr(config, name) for config in trainer.configs} for name in content}
    assert seen["horizontal_flip"] == {True, False} and seen["head_lr"] == {None, 1e-3}
    assert seen["calibration"] == {True, False} and seen["loss"] == {"mse", "mse+plcc"}
    assert seen["epochs"] == {2, 4, 6} and seen["dropout"] == {0.0, 0.25, 0.5} and seen["cache_views"] == {None, 0, 2}
    assert min(seen["hidden_dim_q"]) >= 8 and len(seen["hidden_dim_q"]) > 10
    saved = json.loads((tmp_path / "out" / "best_config.json").read_text())
    best = replace(parse_args(["--config", str(tmp_path / "out" / "best_config.json")]), config=None)
    assert saved["epochs"] == best.epochs and best in [
        replace(c, output_dir=None, test=True, report=True, save_every_minutes=best.save_every_minutes)
        for c in trainer.configs
    ]


# -- a study


@pytest.fixture
def train_and_look() -> Iterator[Callable[..., Trainer]]:
    """The same, and the search looks at what mattered."""
    with in_place(findings=True) as install:
        yield install


def test_a_planted_optimum_is_found_and_written_down(tmp_path, train_and_look, capsys):
    content = {**LR, "dropout": {"low": 0, "high": 0.9}, "w_exp": {"low": 0.05, "high": 0.3}}  # w_exp does nothing
    trainer = train_and_look()
    study = main(flags_of(tmp_path, content, "--trials 40"))
    out = tmp_path / "out"
    assert abs(math.log10(study.best_params["lr"] / BEST_LR)) < 0.5
    assert all(not config.test and not config.report for config in trainer.configs)
    table = pd.read_csv(out / "importance.csv")
    importance = dict(zip(table["option"], table["importance"], strict=True))
    assert table["option"][0] == "lr" and importance["lr"] > 0.8 > 0.1 > importance["w_exp"]
    assert table["spread"][0] > 5 * table["spread"][table["option"] == "w_exp"].item()  # though TPE has a habit of it
    assert importance["lr"] + importance["dropout"] + importance["w_exp"] == pytest.approx(1)
    assert (out / "importance.png").read_bytes().startswith(b"\x89PNG")
    trials = pd.read_csv(out / "trials.csv")
    assert len(trials) == 40 and set(trials["state"]) == {"complete", "pruned"}
    best = trials.loc[trials["score"].idxmax()]
    assert best["lr"] == pytest.approx(study.best_params["lr"]) and best["best_epoch"] == 4
    config = replace(parse_args(["--config", str(out / "best_config.json")]), config=None)
    assert parabola(config) == pytest.approx(study.best_value)
    said = capsys.readouterr().out
    command = next(line for line in said.splitlines() if line.startswith("python baseline.py"))
    assert parse_args(shlex.split(command)[2:]) == config
    lines = [line for line in said.splitlines() if line.startswith("trial ")]
    assert len(lines) == 40 and re.fullmatch(
        r"trial 0 +lr \S+ dropout \S+ w_exp \S+: main -?\d\.\d{4}, best -?\d\.\d{4} \(trial 0\), \d+ s", lines[0]
    )


def test_the_line_of_a_trial_is_written_in_one_piece(tmp_path, train, monkeypatch):
    """Workers share one output; print() without a buffer writes a line's end apart, and two lines become one."""
    train()
    pieces: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SimpleNamespace(write=pieces.append, flush=lambda: None))
        main(flags_of(tmp_path, more="--trials 3"))
    told = [piece for piece in pieces if piece.startswith("trial ")]
    assert len(told) == 3 and all(re.fullmatch(r"trial \d .+\n", piece) for piece in told)


def test_a_bad_trial_is_stopped_early_and_a_good_one_is_not(tmp_path, train, capsys):
    scores = iter([0.5, 0.6, 0.7, 0.5, 0.6, 0.1, 0.9, 0.05])
    by_lr: dict[float, float] = {}

    def planted(config: TrainingConfig) -> float:
        return by_lr.setdefault(config.lr, next(scores) if config.lr not in by_lr else 0.0)

    train(planted)
    study = main(flags_of(tmp_path, LR, "--epochs 10"))
    states = [trial.state for trial in study.trials]
    assert states == [*[TrialState.COMPLETE] * 5, TrialState.PRUNED, TrialState.COMPLETE, TrialState.PRUNED]
    assert [max(trial.intermediate_values) for trial in study.trials] == [10] * 5 + [2, 10, 2]
    assert "pruned at epoch 2 (0.0200)" in capsys.readouterr().out


def test_it_maximises_what_selects_the_epoch(tmp_path, train):
    trainer = train()
    study = main(flags_of(tmp_path, LR, "--trials 3 --select_by srocc_c"))
    assert study.best_value == max(map(parabola, trainer.configs))


# -- going on


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["config.json", "splits.csv"], "holds a run"),
        (["config.json", "study.db", "search.json"], "holds a run"),  # one that a search has begun to fill
        (["best/scorer.json"], "holds a run"),
        (["protocol.json", "seed42/config.json"], "holds other things than a search"),
        (["trials/notes.txt"], "holds other things than a search"),
    ],
)
@pytest.mark.parametrize("storage", ["", "--storage journal:elsewhere/journal.log"])
def test_a_folder_with_anything_but_a_search_is_refused_untouched(
    files, words, storage, tmp_path, train, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    trainer = train()
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    flags = flags_of(tmp_path, LR, storage)
    before = sorted(tmp_path.rglob("*"))
    assert f"--output_dir {tmp_path / 'out'}: {words}" in refusal(flags, capsys)
    assert sorted(tmp_path.rglob("*")) == before and not trainer.configs


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, train, capsys):
    train()
    (tmp_path / "out").write_text("")
    assert "is a file" in refusal(flags_of(tmp_path), capsys)


@pytest.mark.parametrize(
    "storage", ["", "journal:elsewhere/journal.log", "journal:out/journal.log", "sqlite:///elsewhere.db"]
)
def test_a_search_is_known_again_even_if_it_has_not_begun_its_first_trial(storage, tmp_path, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags_of(tmp_path, LR, f"--trials 3 --storage {storage}" if storage else "--trials 3")
    train()
    (tmp_path / "out").mkdir()  # empty
    with monkeypatch.context() as patch:
        patch.setattr(search, "check_plan", interrupt)
        with pytest.raises(SystemExit):
            main(flags)
    trainer = train()
    for count in (3, 5):
        main([*flags, "--trials", str(count)])
        assert len(trainer.configs) == count


def test_a_search_that_was_stopped_goes_on_as_if_it_never_had(tmp_path, train, capsys):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    train()
    whole = values(main(flags_of(tmp_path / "a", LR, "--trials 9")))
    train(stop_at=2)
    flags = flags_of(tmp_path / "b", LR, "--trials 9")
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 130
    said = capsys.readouterr()
    assert said.err.splitlines() == ["interrupted: what is finished is kept, the same command goes on from there"]
    train(stop_at=3)
    with pytest.raises(SystemExit):
        main(flags)
    trainer = train()
    study = main(flags)
    assert values(study) == whole
    assert len(trainer.configs) == 9 - 2 - 3
    assert main(flags) and len(trainer.configs) == 4  # nothing is left to do
    assert len(pd.read_csv(tmp_path / "b" / "out" / "trials.csv")) == 9


def test_more_trials_may_be_asked_for_later(tmp_path, train):
    train()
    main(flags_of(tmp_path, LR, "--trials 5"))
    trainer = train()
    assert len(values(main(flags_of(tmp_path, LR, "--trials 9")))) == 9
    assert len(trainer.configs) == 4


def test_no_two_trials_are_alike(tmp_path, train):
    trainer = train()
    for count in (3, 6, 9):
        main(flags_of(tmp_path, LR, f"--trials {count}"))
    assert len({config.lr for config in trainer.configs}) == 9


def test_other_options_than_the_study_was_begun_with_are_refused(tmp_path, train, capsys):
    train()
    main(flags_of(tmp_path, LR, "--trials 2"))
    trainer = train()
    for content, flags, words in (
        (LR, "--weight_decay 0.1", "weight_decay is 0.1, not 0.0001"),
        (LR, "--seed 1", "seed is 1, not 42"),
        ({"lr": {"low": 1e-5, "high": 1.0, "log": True}}, "", "lr in"),
        ({**LR, "dropout": {"low": 0, "high": 0.5}}, "", "dropout is searched"),
        ({"dropout": {"low": 0, "high": 0.5}}, "", "lr is not searched"),
    ):
        capsys.readouterr()
        assert words in refusal(flags_of(tmp_path, content, f"--trials 20 {flags}"), capsys)
    assert not trainer.configs


def test_changed_data_is_refused(tmp_path, train, capsys):
    train()
    main(flags_of(tmp_path, LR, "--trials 2"))
    capsys.readouterr()
    train()
    experiment.read_examples = lambda config, memo: examples("other")
    assert "the data has changed" in refusal(flags_of(tmp_path, LR, "--trials 20"), capsys)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["", "--storage journal:shared/journal.log"])
def test_processes_share_a_study_and_make_no_trial_too_many(storage, tmp_path, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags_of(tmp_path, LR, f"--trials 12 {storage}")
    workers = [process(tmp_path, flags, together=2) for _ in range(2)]
    said = [worker.communicate(timeout=200) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    train()
    study = main(flags)
    assert len(values(study)) == 12 and len({trial["lr"] for trial in values(study)}) == 12
    lines = [len(re.findall("^trial ", out, re.MULTILINE)) for out, _ in said]
    assert sum(lines) == 12 and min(lines) >= 2
    assert not any(trial.state == TrialState.RUNNING for trial in study.trials)


@pytest.mark.slow
def test_a_trial_whose_process_was_killed_is_run_again(tmp_path, train):
    flags = flags_of(tmp_path, LR, "--trials 6")
    worker = process(tmp_path, flags, hang_at=2)
    logs = tmp_path / "out" / "trials"
    deadline = time.monotonic() + 120
    while len(list(logs.glob("*.log"))) < 4:  # of the plan, of two trials, and of one that does not end
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    worker.kill()
    worker.communicate()
    before = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/out/study.db")
    running = [trial for trial in before.trials if trial.state == TrialState.RUNNING]
    assert len(running) == 1
    train()
    study = main(flags)
    assert len(values(study)) == 6
    again = [trial for trial in study.trials if trial.user_attrs.get("instead_of") == running[0].number]
    assert len(again) == 1 and again[0].params == running[0].params and again[0].state in FINISHED


@pytest.mark.parametrize(
    ("ends", "failure", "note"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "",
            "note      worker 1 was killed (signal 9); its trial is run again",
        ),
        ("sys.exit('error: the disk is gone')", "a worker has ended with the error above", ""),
    ],
)
def test_how_a_worker_ended_is_said(ends, failure, note, tmp_path, monkeypatch, capfd):
    """Of two workers the second one, which is told by its GPU, ends badly."""
    script = tmp_path / "worker.py"
    script.write_text(f"import os, signal, sys\nif os.environ['LOCAL_RANK'] == '1': {ends}\n")
    monkeypatch.setattr(search, "__file__", str(script))
    monkeypatch.setattr(devices, "num_gpus", lambda: 2)
    request = arguments.parse_search_args([*flags_of(tmp_path), "--workers", "2"])
    with pytest.raises(SearchFailed, match=failure) if failure else nullcontext():
        run_workers(request, [])
    said = capfd.readouterr()
    assert said.out == (note + "\n" if note else "")
    assert said.err == ("error: the disk is gone\n" if failure else "")


def test_an_installed_search_runs_its_workers_by_the_name_of_its_module(tmp_path, monkeypatch, capfd):
    package = fill(tmp_path / "image_scores", "__init__.py")
    (package / "search.py").write_text("import sys\nprint(__spec__.name, sys.path.count(sys.argv[1]))\n")
    monkeypatch.setattr(search, "__package__", "image_scores")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_workers(arguments.parse_search_args([*flags_of(tmp_path), "--workers", "2"]), [str(package)])
    assert capfd.readouterr().out == "image_scores.search 0\n" * 2  # whose folder is no place to import from


# -- two at once


# -- failures


def test_failed_trials_do_not_count_and_are_listed(tmp_path, train, capsys):
    calls = []

    def sometimes(config: TrainingConfig) -> float:
        calls.append(config.lr)
        if len(set(calls)) == 3:
            raise ValueError("the sky has fallen")
        return parabola(config)

    train(sometimes)
    study = main(flags_of(tmp_path, LR))
    assert len(values(study)) == 8 and [trial.state for trial in study.trials].count(TrialState.FAIL) == 1
    assert re.search(r"^failed +trial 2: lr \S+: the sky has fallen$", capsys.readouterr().out, re.MULTILINE)
    table = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert len(table) == 9 and table["cause"].dropna().tolist() == ["the sky has fallen"]


def test_the_same_failure_three_times_at_first_ends_the_search(tmp_path, train, capsys):
    calls = []

    def never(config: TrainingConfig) -> float:
        calls.append(config)
        raise ValueError(f"file {len(calls)} cannot be written")

    train(never)
    flags = flags_of(tmp_path, LR, "--trials 2")
    for session in (1, 2):  # whoever has mended the cause may go on
        with pytest.raises(SystemExit) as stop:
            main(flags)
        assert stop.value.code == 1 and len(calls) == 3 * session
        last = capsys.readouterr().err.splitlines()
        assert last == [f"failed: the first 3 trials all failed: file {3 * session - 2} cannot be written"]
    train()
    assert len(values(main(flags))) == 2


def test_a_trial_that_breaks_down_counts_as_stopped_early(tmp_path, train):
    def broken(config: TrainingConfig) -> float:
        if config.lr > 0.1:
            raise loop.NonFiniteLoss("loss", float("nan"), step=3)
        return parabola(config)

    trainer = train(broken)
    study = main(flags_of(tmp_path, LR, "--trials 20"))
    assert len(study.trials) == 20
    diverged = [trial for trial in study.trials if "diverged" in trial.user_attrs.get("cause", "")]
    assert diverged and all(trial.state == TrialState.PRUNED for trial in diverged)
    assert len(diverged) == sum(config.lr > 0.1 for config in trainer.configs)


def test_an_error_of_the_disk_is_said_and_its_trial_kept_for_later(tmp_path, train, capsys):
    def full(config: TrainingConfig) -> float:
        raise OSError("No space left on device")

    train(full)
    flags = flags_of(tmp_path, LR, "--trials 2")
    assert refusal(flags, capsys) == "No space left on device"
    train()
    assert len(values(main(flags))) == 2


def test_a_database_that_stays_locked_is_said_in_one_line(tmp_path, train, monkeypatch, capsys):
    monkeypatch.setattr(study, "BUSY_SECONDS", 0.01)
    locks = []

    def lock(config: TrainingConfig) -> float:
        locks.append(sqlite3.connect(tmp_path / "out" / "study.db"))
        locks[-1].execute("BEGIN IMMEDIATE")
        return parabola(config)

    train(lock)
    with pytest.raises(SystemExit) as stop:
        main(flags_of(tmp_path))
    locks[0].close()
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "failed: the study cannot be used ((sqlite3.OperationalError) database is locked); the same command goes on"
    ]


def test_timeout_ends_with_what_there_is(tmp_path, train, monkeypatch, capsys):
    trainer = train()
    clock = SimpleNamespace(now=lambda: datetime.now() + timedelta(seconds=50 * len(trainer.configs)))
    monkeypatch.setattr(study, "datetime", clock)
    found = main(flags_of(tmp_path, LR, "--trials 1000 --timeout 120"))
    assert 1 <= len(found.trials) <= 3
    assert "the same command goes on" in capsys.readouterr().out and (tmp_path / "out" / "best_config.json").exists()


# -- the end


class Repeats:
    """Stands for `protocol.run_all` and for the page: leaves a folder as repeated runs do, and keeps what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, TrainingConfig]] = []
        self.pages: list[str] = []
        monkeypatch.setattr(protocol, "run_all", self.run_all)
        monkeypatch.setattr(outcome, "write_report", lambda config, folder, runtime: self.pages.append(folder.name))

    def run_all(self, program: Any, config: TrainingConfig, run: Any, folder: Path, runtime: Any) -> dict[str, Any]:
        assert not config.overwrite
        protocol.refuse_occupied(program, folder, config)
        self.asked.append((folder.name, config))
        (folder / "seed42").mkdir(parents=True, exist_ok=True)
        (folder / "protocol.json").write_text(json.dumps(protocol.SCORER.result_options(config)))
        (folder / "seed42" / "results.json").write_text(json.dumps({"lr": config.lr}))
        return {}


def test_the_best_is_repeated_with_its_test_fold_in_the_end_only(tmp_path, train, monkeypatch, capsys):
    trainer, repeats = train(), Repeats(monkeypatch)
    flags = [*flags_of(tmp_path), "--seeds", "3"]
    study = main(flags)
    assert [(name, config.repeats, config.test) for name, config in repeats.asked] == [("best", 3, True)]
    assert repeats.asked[0][1].lr == study.best_params["lr"]
    assert len(trainer.configs) == 8 and not any(config.test for config in trainer.configs)
    main([*flags, "--seeds", "5"])
    assert [(name, config.repeats) for name, config in repeats.asked[1:]] == [("best", 5)]
    assert repeats.pages == ["best"] * 2
    assert "read before" not in capsys.readouterr().out


def test_what_was_read_of_the_test_fold_before_is_kept_and_said(tmp_path, train, monkeypatch, capsys):
    repeats = Repeats(monkeypatch)
    train(lambda config: 0.5 * parabola(config))
    flags = [*flags_of(tmp_path), "--seeds", "3"]
    first = main([*flags, "--trials", "2"]).best_trial
    capsys.readouterr()
    train()  # what comes now scores higher
    later = main([*flags, "--trials", "4"]).best_trial
    said = capsys.readouterr().out
    assert later.number > first.number
    assert [(name, config.lr) for name, config in repeats.asked] == [
        ("best", first.params["lr"]),
        (f"best-trial{later.number}", later.params["lr"]),
    ]
    assert said.count("the test fold has been read before with other settings, kept in best\n") == 1
    kept = json.loads((tmp_path / "out" / "best" / "seed42" / "results.json").read_text())
    assert kept["lr"] == first.params["lr"]
    main([*flags, "--trials", "4"])  # the same again goes where it was
    assert repeats.asked[-1][0] == repeats.pages[-1] == f"best-trial{later.number}"


def test_repeats_that_were_stopped_before_they_read_the_test_fold_make_room(tmp_path, train, monkeypatch, capsys):
    repeats = Repeats(monkeypatch)
    train()
    flags = [*flags_of(tmp_path), "--seeds", "3", "--trials", "2"]
    main(flags)
    (tmp_path / "out" / "best" / "seed42" / "results.json").unlink()
    (tmp_path / "out" / "best" / "protocol.json").write_text(json.dumps({"lr": 0.5}))
    capsys.readouterr()
    main(flags)
    assert repeats.asked[-1][0] == "best" and "read before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("split", "flags", "is_said"),
    [
        ("", "--seeds 3", True),
        ("", "--seeds 1", False),  # the fold that no trial has read
        ("test", "--seeds 3", False),
        ("", "--seeds 3 --split_file folds.csv", False),  # written by the first trial
    ],
)
def test_drawn_folds_share_images_with_those_that_chose_the_settings(
    split, flags, is_said, tmp_path, train, monkeypatch, capsys
):
    Repeats(monkeypatch)
    train()
    experiment.read_examples = lambda config, memo: examples("same", split)
    main([*flags_of(tmp_path), "--trials", "2", *flags.split()])
    assert ("test on images that helped to choose the settings" in capsys.readouterr().out) == is_said


# -- what matters


# -- with real runs


def test_help_answers_without_torch_and_optuna(tmp_path):
    code = "raise ImportError('not wanted')"
    for name in ("torch", "optuna", "numpy"):
        (tmp_path / f"{name}.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "search.py")]
    done = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--trials N" in done.stdout and "--residual_scale_q" in done.stdout, done.stderr
    assert "--parent" not in done.stdout
    done = subprocess.run([*command, "--trials", "0"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: --trials 0: must be at least 1\n")


@pytest.mark.parametrize(("flags", "lines"), [("", 1), ("--parent 1", 0)])
def test_ctrl_c_is_answered_once_and_not_by_the_workers_too(flags, lines, train, monkeypatch, capsys):
    train()
    monkeypatch.setattr(search, "parse_search_args", lambda *args, **how: interrupt())
    with pytest.raises(SystemExit) as stop:
        main(["--output_dir", "out", *flags.split()])
    assert stop.value.code == 130 and len(capsys.readouterr().err.splitlines()) == lines


def test_without_optuna_it_says_what_to_install(tmp_path):
    code = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'optuna' else find(name, *rest)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = ['search.py', '--output_dir', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(ROOT / 'search.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: search.py needs Optuna: pip install -r requirements-extra.txt\n"


def test_without_the_driver_of_postgresql_it_says_what_to_install(tmp_path, train, capsys, monkeypatch):
    train()
    monkeypatch.setitem(sys.modules, "psycopg", None)
    said = refusal(flags_of(tmp_path, LR, "--storage postgresql://me:secret@h/db"), capsys)
    assert said == (
        "--storage postgresql://me:***@h/db: cannot be used (it needs psycopg: pip install -r requirements-extra.txt)"
    )


def test_trials_share_what_they_do_not_change_and_score_as_single_runs_do(make_dataset, tmp_path, monkeypatch):
    files = make_dataset(scored_rows())
    read, loaded, folds = [], [], []
    originals = data.read_examples, loading.load_backbone, task.evaluate
    monkeypatch.setattr(data, "read_examples", lambda *a: read.append(1) or originals[0](*a))
    monkeypatch.setattr(loading, "load_backbone", lambda *a, **k: loaded.append(1) or originals[1](*a, **k))
    monkeypatch.setattr(task, "evaluate", lambda s, fold, *a: folds.append(fold) or originals[2](s, fold, *a))
    content = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "dropout": {"low": 0, "high": 0.5}}
    trained = ["--no_freeze_clip", "--partial_freeze", "--freeze_layers", "22"]  # what a trial trains is its own
    flags = ["--cache_dir", str(tmp_path / "cache"), *TINY, *trained, *files.flags]
    study = main([*flags_of(tmp_path, content, "--trials 3 --epochs 2"), *flags])
    assert (len(read), len(loaded)) == (1, 1)
    assert set(folds) == {"val"}
    assert not list((tmp_path / "out").rglob("*.safetensors"))  # weights of trials are not kept
    monkeypatch.undo()
    for trial in study.trials:
        alone = parse_args([*flags, "--epochs", "2", "--no_test", "--no_report"])
        alone = replace(alone, **trial.params, output_dir=str(tmp_path / f"alone{trial.number}"))
        assert baseline.run(alone)["val"]["main"] == trial.value


@pytest.mark.slow
def test_a_stopped_run_leaves_no_half_file(make_dataset, tmp_path):
    files = make_dataset(scored_rows())
    config = parse_args([*TINY, *files.flags, "--epochs", "4", "--cache_dir", str(tmp_path / "cache"), "--no_test"])

    def stop(row: Mapping[str, float]) -> None:
        if row["epoch"] == 2:
            raise optuna.TrialPruned

    with pytest.raises(optuna.TrialPruned):
        baseline.run(replace(config, output_dir=str(tmp_path / "run")), after_epoch=stop)
    found = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert not any(".tmp" in name for name in found) and "results.json" not in found
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == 2


@pytest.mark.slow
@pytest.mark.torture
def test_four_workers_share_a_real_search_and_its_cache_and_the_best_is_repeated(make_dataset, tmp_path, figure):
    files = make_dataset(scored_rows())
    trained = ["--no_freeze_clip", "--partial_freeze", "--freeze_layers", "22"]
    flags = ["--cache_dir", str(tmp_path / "cache"), *TINY, *trained, *files.flags, "--workers", "4", "--seeds", "2"]
    content = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    command = [sys.executable, str(ROOT / "search.py"), *flags_of(tmp_path, content, "--trials 7 --epochs 1"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    numbers = [int(number) for number in re.findall(r"^trial (\d+)", done.stdout, re.MULTILINE)]
    trials = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert sorted(numbers) == trials["trial"].tolist() and len(trials) == 7
    assert set(trials["state"]) == {"complete"} and trials["lr"].nunique() == 7
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/out/study.db")
    assert sum(trial.state in FINISHED for trial in study.trials) == 7
    for path in (tmp_path / "out").rglob("*.json"):
        json.loads(path.read_text())
    assert not list(tmp_path.rglob("*.tmp"))
    recipes = list((tmp_path / "cache" / "features").iterdir())
    for folder in recipes:
        keys = [row.tobytes() for path in folder.glob("*.safetensors") for row in load_file(path)["keys"].numpy()]
        assert keys and len(keys) == len(set(keys))
    assert len(recipes) == 7  # of each seed's CLIP evaluation views, training views and prompts; statistics
    summary = json.loads((tmp_path / "out" / "best" / "summary.json").read_text())
    assert summary["runs"] == ["seed42", "seed43"] and "srocc_q" in summary["test"]
    figure("four workers", "7 of 7 trials run once, no row of the cache computed twice")


@pytest.mark.slow
def test_the_measured_optimum_of_the_demo_is_found(tmp_path):
    """Heads without calibration on the frozen tiny CLIP: docs/search.md has the grid, good from 3e-3 to 3e-1."""
    content = {"lr": {"low": 1e-7, "high": 1.0, "log": True}, "w_exp": {"low": 0.05, "high": 0.3}}
    heads = "--freeze_clip --no_calibration --stage_features off --base cosine"
    training = f"--demo drawn {heads} --epochs 2 --trials 24"
    flags = [*training.split(), "--cache_dir", str(tmp_path / "c")]
    study = main([*flags_of(tmp_path, content), *flags])
    trials = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert len(trials) == 24
    assert 3e-3 <= study.best_params["lr"] <= 0.32
    random = trials["score"][:STARTUP_TRIALS]
    assert study.best_value > random.median() + 0.1
    table = pd.read_csv(tmp_path / "out" / "importance.csv")
    assert table["option"][0] == "lr" and table["importance"][0] > 0.7


def test_a_stopped_trial_is_written_down_with_the_best_it_reached(tmp_path, train):
    """Not with what it said last, which Optuna takes for its value."""
    heights = {1: 0.4, 2: 0.3, 3: 0.1, 4: 0.1}
    trainer = train()
    main(flags_of(tmp_path, LR, "--trials 5"))

    def falling(config: TrainingConfig, *, memo: Memo, after_epoch: Any = None) -> dict[str, Any]:
        for epoch, height in () if config.dry_run else heights.items():
            after_epoch({"epoch": epoch, "val_main": -10 + height})
        return {}

    baseline.run = falling
    study = main(flags_of(tmp_path, LR, "--trials 6"))
    stopped = study.trials[-1]
    assert stopped.state == TrialState.PRUNED and stopped.value == pytest.approx(-9.7) and len(trainer.configs) == 5
    last = pd.read_csv(tmp_path / "out" / "trials.csv").iloc[-1]
    assert (last["score"], last["epochs"], last["best_epoch"]) == (pytest.approx(-9.6), 2, 1)


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (LR, "", "partial8"),
        (LR, "--freeze_clip", "frozen"),
        (LR, "--no_partial_freeze", "full"),
        (LR, "--lora_rank 4", "full-lora4"),
        ({"freeze_layers": {"low": 8, "high": 11}}, "", "partial8, but freeze_layers searched"),
    ],
)
def test_it_says_how_clip_is_frozen(content, flags, words, tmp_path, train, capsys):
    train()
    main(flags_of(tmp_path, content, f"--trials 1 {flags}"))
    assert f"          CLIP: {words}\n" in capsys.readouterr().out
