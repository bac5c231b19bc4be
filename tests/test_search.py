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
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from conftest import ROOT, scored_rows
from optuna.trial import TrialState
from safetensors.torch import load_file
from sqlalchemy import event, exc
from sqlalchemy.engine import Engine

import baseline
import engine
import protocol
import search
import sensitivity
import space
import starting
from configs import OPTIONS, VIEWS, TrainingConfig, parse_args
from kept import KNOWN_BY, LOADED_BY, READ_BY, DecidedBy, Kept
from locking import locked

LR = {"lr": {"low": 1e-6, "high": 1.0, "log": True}}
BEST_LR = 1e-3
TINY = shlex.split("--clip_model tiny --clip_pretrained none --image_size 112 --freeze_clip --batch_size 16")
DRIVER = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import test_search
test_search.Trainer(pause={pause}, hang_at={hang_at}).install()
import search
Path(f"{{os.getpid()}}.started").touch()
while len(list(Path().glob("*.started"))) < {count}:
    time.sleep(0.02)
search.main(sys.argv[1:])
"""


def parabola(config: TrainingConfig) -> float:
    """The score of options whose best is known: lr at BEST_LR, dropout at 0; nothing else counts."""
    return 0.9 - 0.05 * (math.log10(config.lr) - math.log10(BEST_LR)) ** 2 - 0.1 * config.dropout


def examples(fingerprint: str, split: str = "") -> SimpleNamespace:
    """As much of the data as a search looks at."""
    return SimpleNamespace(fingerprint=fingerprint, table=pd.DataFrame({"split": [split]}))


class Trainer:
    """Stands for `baseline.run`: scores by a formula, rising over the epochs, and keeps the options it was given."""

    def __init__(
        self,
        score: Callable[[TrainingConfig], float] = parabola,
        *,
        stop_at: int | None = None,
        hang_at: int | None = None,
        pause: float = 0.0,
    ) -> None:
        self.score = score
        self.stop_at = stop_at  # the run, counted from 0, in which Ctrl-C is pressed
        self.hang_at = hang_at  # the run that does not end
        self.pause = pause
        self.configs: list[TrainingConfig] = []

    def __call__(
        self, config: TrainingConfig, *, after_epoch: Callable[[Mapping[str, float]], None], kept: Kept
    ) -> dict[str, Any]:
        self.configs.append(config)
        if len(self.configs) - 1 == self.stop_at:
            raise KeyboardInterrupt
        time.sleep(600 if len(self.configs) - 1 == self.hang_at else self.pause)
        for epoch in range(1, config.epochs + 1):
            after_epoch(
                {"epoch": epoch, "loss": 1.0, f"val_{config.select_by}": self.score(config) * epoch / config.epochs}
            )
        return {"best_epoch": config.epochs, "val": {config.select_by: self.score(config)}}

    def install(self) -> None:
        """Take the place of everything that looks at data or a model."""
        baseline.run = lambda config, **how: {} if config.dry_run else self(config, **how)
        baseline.read_examples = lambda config, kept: examples("same")
        starting.num_blocks = lambda config: 12


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """A function that puts a Trainer in the place of `baseline.run`."""
    for module, name in ((baseline, "run"), (baseline, "read_examples"), (starting, "num_blocks")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back in the end

    def install(*args: Any, **how: Any) -> Trainer:
        trainer = Trainer(*args, **how)
        trainer.install()
        return trainer

    return install


def space_file(folder: Path, content: Any) -> str:
    path = folder / "space.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def flags_of(folder: Path, content: Any = LR, more: str = "") -> list[str]:
    """A small search with the stand-in."""
    epochs = "" if "epochs" in content else "--epochs 4"
    flags = f"--trials 8 --seeds 0 {epochs} --output_dir {folder / 'out'} --space {space_file(folder, content)} {more}"
    return shlex.split(flags)


def values(study: Any) -> list[dict[str, Any]]:
    """What the trials that count have tried, in their order."""
    return [trial.params for trial in study.trials if trial.state in search.FINISHED]


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(SystemExit) as stop:
        search.main(flags)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), said
    return lines[0].removeprefix("error: ")


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
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_line(flags, words, train, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train()
    assert words in refusal(shlex.split(flags), capsys)


def default(flags: str, depth: int | None = 24) -> dict[str, str]:
    """The default space after a command line: option -> how it is described."""
    request = space.parse_search_args([*shlex.split(flags), "--output_dir", "out"])
    found = space.default_space(request.config, depth, request.given)
    return {name: dimension.describe().removeprefix(f"{name} ") for name, dimension in found.items()}


def test_the_default_space_is_that_of_the_guide():
    assert default("") == {
        "lr": "1e-06..0.001 log",
        "residual_scale_q": "0.1..0.5",
        "residual_scale_c": "0.1..0.5",
        "freeze_layers": "16..22 step 2",
        "w_q": "0.3..0.7",
        "batch_size": "16 | 32 | 64",
    }


@pytest.mark.parametrize(
    ("flags", "depth", "layers"),
    [
        ("", 12, "8..11 step 1"),
        ("", 24, "16..22 step 2"),
        ("", None, None),  # a tower without blocks
        ("--freeze_layers 9", 12, None),
        ("--freeze_clip", 12, None),
        ("--no_partial_freeze", 12, None),
        ("--unfreeze_schedule 8@0,6@2", 12, None),
        ("--preset large", 12, None),
        ("--preset medium", 12, "8..11 step 1"),
        ("--demo", 24, "16..22 step 2"),
    ],
)
def test_freeze_layers_follow_the_depth_and_are_searched_only_where_they_do_something(flags, depth, layers):
    assert default(flags, depth).get("freeze_layers") == layers


@pytest.mark.parametrize(
    ("flags", "freezing"),
    [
        ("", "partial8"),
        ("--freeze_layers 9", "partial9"),
        ("--freeze_clip", "frozen"),
        ("--no_partial_freeze", "full"),
        ("--unfreeze_schedule 8@0,6@2", "partial8"),
        ("--lora_rank 4", "full-lora4"),
        ("--preset large", "full"),
    ],
)
def test_a_search_freezes_in_part_unless_something_else_was_said(flags, freezing):
    assert space.parse_search_args([*shlex.split(flags), "--output_dir", "out"]).config.freezing == freezing


def test_a_config_file_decides_about_freezing_but_fixes_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"partial_freeze": False, "lr": 1e-4}))
    found = default(f"--config {path}")
    assert "freeze_layers" not in found and "lr" in found


def test_flags_leave_the_space_and_frozen_heads_get_larger_rates():
    assert default("--freeze_clip --batch_size 8 --w_c 0.4") == {
        "lr": "0.0001..0.01 log",
        "residual_scale_q": "0.1..0.5",
        "residual_scale_c": "0.1..0.5",
    }
    assert "residual_scale_q" not in default("--no_residual_learning")


def test_w_c_is_what_w_q_leaves():
    request = space.parse_search_args(["--output_dir", "out"])
    found = space.default_space(request.config, 24, request.given)
    config = space.options_of(request.config, found, {"w_q": 0.3}, request.given)
    assert (config.w_q, config.w_c) == (0.3, 0.7)
    both = {**found, "w_c": found["w_q"]}
    assert space.options_of(request.config, both, {"w_q": 0.3, "w_c": 0.4}, request.given).w_c == 0.4


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
    search.main(flags_of(tmp_path, content, "--trials 30"))
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


def test_a_planted_optimum_is_found_and_written_down(tmp_path, train, capsys):
    content = {**LR, "dropout": {"low": 0, "high": 0.9}, "w_exp": {"low": 0.05, "high": 0.3}}  # w_exp does nothing
    trainer = train()
    study = search.main(flags_of(tmp_path, content, "--trials 40"))
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
        search.main(flags_of(tmp_path, more="--trials 3"))
    told = [piece for piece in pieces if piece.startswith("trial ")]
    assert len(told) == 3 and all(re.fullmatch(r"trial \d .+\n", piece) for piece in told)


def test_a_bad_trial_is_stopped_early_and_a_good_one_is_not(tmp_path, train, capsys):
    scores = iter([0.5, 0.6, 0.7, 0.5, 0.6, 0.1, 0.9, 0.05])
    by_lr: dict[float, float] = {}

    def planted(config: TrainingConfig) -> float:
        return by_lr.setdefault(config.lr, next(scores) if config.lr not in by_lr else 0.0)

    train(planted)
    study = search.main(flags_of(tmp_path, LR, "--epochs 10"))
    states = [trial.state for trial in study.trials]
    assert states == [*[TrialState.COMPLETE] * 5, TrialState.PRUNED, TrialState.COMPLETE, TrialState.PRUNED]
    assert [max(trial.intermediate_values) for trial in study.trials] == [10] * 5 + [2, 10, 2]
    assert "pruned at epoch 2 (0.0200)" in capsys.readouterr().out


def test_it_maximises_what_selects_the_epoch(tmp_path, train):
    trainer = train()
    study = search.main(flags_of(tmp_path, LR, "--trials 3 --select_by srocc_c"))
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
            search.main(flags)
    trainer = train()
    for count in (3, 5):
        search.main([*flags, "--trials", str(count)])
        assert len(trainer.configs) == count


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_search_that_was_stopped_goes_on_as_if_it_never_had(tmp_path, train, capsys):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    train()
    whole = values(search.main(flags_of(tmp_path / "a", LR, "--trials 9")))
    train(stop_at=2)
    flags = flags_of(tmp_path / "b", LR, "--trials 9")
    with pytest.raises(SystemExit) as stop:
        search.main(flags)
    assert stop.value.code == 130
    said = capsys.readouterr()
    assert said.err.splitlines() == ["interrupted: what is finished is kept, the same command goes on from there"]
    train(stop_at=3)
    with pytest.raises(SystemExit):
        search.main(flags)
    trainer = train()
    study = search.main(flags)
    assert values(study) == whole
    assert len(trainer.configs) == 9 - 2 - 3
    assert search.main(flags) and len(trainer.configs) == 4  # nothing is left to do
    assert len(pd.read_csv(tmp_path / "b" / "out" / "trials.csv")) == 9


def test_more_trials_may_be_asked_for_later(tmp_path, train):
    train()
    search.main(flags_of(tmp_path, LR, "--trials 5"))
    trainer = train()
    assert len(values(search.main(flags_of(tmp_path, LR, "--trials 9")))) == 9
    assert len(trainer.configs) == 4


def test_no_two_trials_are_alike(tmp_path, train):
    trainer = train()
    for count in (3, 6, 9):
        search.main(flags_of(tmp_path, LR, f"--trials {count}"))
    assert len({config.lr for config in trainer.configs}) == 9


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (LR, "--weight_decay 0.1", "weight_decay is 0.1, not 0.0001"),
        (LR, "--seed 1", "seed is 1, not 42"),
        ({"lr": {"low": 1e-5, "high": 1.0, "log": True}}, "", "lr in"),
        ({**LR, "dropout": {"low": 0, "high": 0.5}}, "", "dropout is searched"),
        ({"dropout": {"low": 0, "high": 0.5}}, "", "lr is not searched"),
    ],
)
def test_other_options_than_the_study_was_begun_with_are_refused(content, flags, words, tmp_path, train, capsys):
    train()
    search.main(flags_of(tmp_path, LR, "--trials 2"))
    trainer = train()
    capsys.readouterr()
    assert words in refusal(flags_of(tmp_path, content, f"--trials 20 {flags}"), capsys)
    assert not trainer.configs


def test_changed_data_is_refused(tmp_path, train, capsys):
    train()
    search.main(flags_of(tmp_path, LR, "--trials 2"))
    capsys.readouterr()
    train()
    baseline.read_examples = lambda config, kept: examples("other")
    assert "the data has changed" in refusal(flags_of(tmp_path, LR, "--trials 20"), capsys)


def processes(folder: Path, flags: list[str], count: int, hang_at: int | None = None) -> list[subprocess.Popen[str]]:
    """The same search in several processes at once, with the stand-in for training."""
    code = DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests"), pause=0.3, hang_at=hang_at, count=count)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *flags],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["", "--storage journal:shared/journal.log"])
def test_processes_share_a_study_and_make_no_trial_too_many(storage, tmp_path, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags_of(tmp_path, LR, f"--trials 12 {storage}")
    workers = processes(tmp_path, flags, 2)
    said = [worker.communicate(timeout=200) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    train()
    study = search.main(flags)
    assert len(values(study)) == 12 and len({trial["lr"] for trial in values(study)}) == 12
    lines = [len(re.findall("^trial ", out, re.MULTILINE)) for out, _ in said]
    assert sum(lines) == 12 and min(lines) >= 2
    assert not any(trial.state == TrialState.RUNNING for trial in study.trials)


@pytest.mark.slow
def test_a_trial_whose_process_was_killed_is_run_again(tmp_path, train):
    flags = flags_of(tmp_path, LR, "--trials 6")
    (process,) = processes(tmp_path, flags, 1, hang_at=2)
    logs = tmp_path / "out" / "trials"
    deadline = time.monotonic() + 120
    while len(list(logs.glob("*.log"))) < 4:  # of the plan, of two trials, and of one that does not end
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/out/study.db")
    running = [trial for trial in before.trials if trial.state == TrialState.RUNNING]
    assert len(running) == 1
    train()
    study = search.main(flags)
    assert len(values(study)) == 6
    again = [trial for trial in study.trials if trial.user_attrs.get("instead_of") == running[0].number]
    assert len(again) == 1 and again[0].params == running[0].params and again[0].state in search.FINISHED


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
    monkeypatch.setattr(engine, "num_gpus", lambda: 2)
    request = space.parse_search_args([*flags_of(tmp_path), "--workers", "2"])
    with pytest.raises(search.SearchFailed, match=failure) if failure else nullcontext():
        search.run_workers(request, [])
    said = capfd.readouterr()
    assert said.out == (note + "\n" if note else "")
    assert said.err == ("error: the disk is gone\n" if failure else "")


def signed_by(trial: optuna.Trial, **other: Any) -> None:
    """Sign a trial as another process would."""
    trial.set_user_attr("signed", {**search.this_process(), "beat": time.time(), **other})


@pytest.mark.parametrize("place", [["elsewhere", search.this_process()["place"][1]], ["", "pid:[1]"]])
def test_a_silent_trial_of_another_machine_is_given_up_after_a_while(place, tmp_path, train):
    """Or of another container, which may have the name of this one."""
    train()
    study = search.main(flags_of(tmp_path, LR, "--trials 3"))
    trial = study.ask()
    place = [place[0] or search.this_process()["place"][0], place[1]]
    signed_by(trial, place=place)
    assert not search.is_dead(study.trials[-1])
    signed_by(trial, place=place, beat=time.time() - search.DEAD_AFTER_SECONDS - 1)
    assert search.is_dead(study.trials[-1])
    assert len(values(search.main(flags_of(tmp_path, LR, "--trials 5")))) == 5


def test_whether_a_trial_of_this_machine_is_dead_is_seen_at_its_process():
    study = optuna.create_study()
    trial = study.ask()
    silent = {"beat": time.time() - 100 * search.DEAD_AFTER_SECONDS}  # a laptop that slept
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        start = search.state_and_start(ended.pid)[1]
        for signed, is_dead in (
            (silent, False),
            ({"start": "1"}, True),  # whose number another process has now
            ({"pid": ended.pid, "start": start}, True),  # killed, and its parent has not looked yet
        ):
            signed_by(trial, **signed)
            assert search.is_dead(study.trials[0]) == is_dead, signed
    signed_by(trial, pid=ended.pid, start=start)
    assert start.isdigit() and search.is_dead(study.trials[0])


def test_where_processes_cannot_be_seen_a_living_one_is_told_by_its_beat(monkeypatch):
    monkeypatch.setattr(search, "state_and_start", lambda pid: ("", ""))
    study = optuna.create_study()
    trial = study.ask()
    signed_by(trial)
    assert not search.is_dead(study.trials[0])
    signed_by(trial, beat=time.time() - search.DEAD_AFTER_SECONDS - 1)
    assert search.is_dead(study.trials[0])
    with subprocess.Popen(["true"]) as ended:
        pass
    signed_by(trial, pid=ended.pid)
    assert search.is_dead(study.trials[0])


def test_a_process_may_have_any_name(tmp_path):
    name = tmp_path / "x) Z 1 (y"
    name.symlink_to("/bin/sleep")
    with subprocess.Popen([name, "60"]) as process:
        state, start = search.state_and_start(process.pid)
        process.kill()
    assert state in "RSD" and len(start) > 1 and start.isdigit()


def test_a_beat_that_cannot_be_written_is_not_the_last_one(monkeypatch):
    monkeypatch.setattr(search, "BEAT_SECONDS", 0.001)
    errors = [optuna.exceptions.StorageInternalError(), exc.OperationalError("", {}, Exception()), OSError()]
    came_through = threading.Event()

    def set_user_attr(name: str, value: Any) -> None:
        if errors:
            raise errors.pop()
        came_through.set()

    with search.heartbeat(SimpleNamespace(set_user_attr=set_user_attr)):
        assert came_through.wait(20)


@pytest.mark.parametrize("call", [6, 10])  # of five in each trial: in the first epoch, and when all are over
def test_whose_trial_was_taken_over_says_so_and_goes_on(call, tmp_path, train, capsys):
    calls = []

    def taken(config: TrainingConfig) -> float:
        calls.append(config)
        if len(calls) == call:
            study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/out/study.db")
            search.put_back(study, study.trials[-1], killed=True)
        return parabola(config)

    train(taken)
    study = search.main(flags_of(tmp_path))
    said = capsys.readouterr().out
    assert said.count("note      trial 1 was taken over by another worker, which took this one for dead\n") == 1
    assert len(values(study)) == 8 and study.trials[1].state == TrialState.FAIL
    (again,) = (trial for trial in study.trials if trial.user_attrs.get("instead_of") == 1)
    assert again.state in search.FINISHED and again.params == study.trials[1].params


# -- two at once


def worker_of(folder: Path, trials: int = 8) -> search.Search:
    """A worker of a search, or another one."""
    (folder / "out").mkdir(exist_ok=True)
    request = space.parse_search_args(flags_of(folder, LR, f"--trials {trials}"))
    return search.Search(search.open_study(request), request, dict(request.space or {}), Kept(), datetime.now())


@contextmanager
def meanwhile(monkeypatch: pytest.MonkeyPatch, statement: str, other: Callable[[], Any]) -> Iterator[list[Any]]:
    """Call `other` in a thread just before this one sends the first such statement, until it is done or has to wait.

    Yields:
        Where its result, or its error, will be when the block is over.
    """
    here, threads, found, waits = threading.current_thread(), [], [], threading.Event()
    monkeypatch.setattr(search, "locked", lambda folder, *, wait: locked(folder, wait=waits.set), raising=False)

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
    with meanwhile(monkeypatch, "UPDATE trials", lambda: search.next_trial(others).number) as found:
        number = search.next_trial(mine).number
    assert [number, *found] == [0, 1]


def test_two_workers_do_not_put_the_same_trial_back(tmp_path, monkeypatch):
    mine, others = worker_of(tmp_path), worker_of(tmp_path)
    trial = mine.study.ask()
    trial.suggest_float("lr", 1e-6, 1.0, log=True)
    signed_by(trial, start="1")  # a dead one
    with meanwhile(monkeypatch, "UPDATE trials", lambda: search.next_trial(others).number) as found:
        number = search.next_trial(mine).number
    assert [number, *found] == [1, 2]
    assert [trial.user_attrs.get("instead_of") for trial in mine.study.trials] == [None, 0, None]


def test_a_trial_that_just_ends_is_not_put_back(tmp_path, train, monkeypatch):
    train()
    mine, others = worker_of(tmp_path), worker_of(tmp_path)
    trial = search.next_trial(mine)
    monkeypatch.setattr(search, "is_dead", lambda trial: True)
    with meanwhile(monkeypatch, "UPDATE trials", lambda: search.next_trial(others).number) as found:
        search.run_trial(mine, trial)
    assert found == [1] and mine.study.trials[0].state == TrialState.COMPLETE
    assert "instead_of" not in mine.study.trials[1].user_attrs


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE studies", "INSERT INTO alembic_version", "INSERT INTO study_user_attributes"]
)
def test_the_same_search_may_be_started_twice_at_once(statement, tmp_path, train, monkeypatch):
    train()
    request = space.parse_search_args(flags_of(tmp_path))
    with meanwhile(monkeypatch, statement, lambda: search.prepare(request, Kept()).study.study_name) as found:
        assert search.prepare(request, Kept()).study.study_name == "search"
    assert found == ["search"]


def test_what_is_searched_is_never_half_written(tmp_path, monkeypatch):
    """Nor for those on other machines, with folders of their own."""
    mine, others = worker_of(tmp_path), worker_of(tmp_path)
    write = mine.study.set_user_attr

    def then_the_others(name: str, value: Any) -> None:
        write(name, value)
        search.agree_with(others.study, others.request, others.space)

    monkeypatch.setattr(mine.study, "set_user_attr", then_the_others)
    search.agree_with(mine.study, mine.request, mine.space)


def test_a_search_that_begins_this_very_moment_is_no_other_thing(tmp_path, monkeypatch):
    look = search.holds_nothing

    def late(folder: Path) -> bool:
        (folder / search.SEARCH_FILE).write_text("{}")
        return look(folder)

    monkeypatch.setattr(search, "holds_nothing", late)
    search.refuse_occupied(tmp_path)


@pytest.mark.parametrize(("failures", "url"), [(2, "postgresql://h/db"), (99, "postgresql://h/db"), (1, "sqlite://")])
def test_a_database_server_is_tried_again_since_others_may_be_making_its_tables(failures, url, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "POLL_SECONDS", 0)
    calls = []

    def storage_at(asked: str) -> Any:
        calls.append(asked)
        if len(calls) <= failures:
            raise exc.ProgrammingError("CREATE TABLE", {}, Exception("exists already"))
        return optuna.storages.InMemoryStorage()

    monkeypatch.setattr(search, "storage_at", storage_at)
    request = space.parse_search_args(flags_of(tmp_path, LR, f"--storage {url}"))
    with pytest.raises(ValueError, match="exists already") if failures != 2 else nullcontext():
        search.open_study(request)
    assert calls == [url] * {2: 3, 99: search.OPENINGS, 1: 1}[failures]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(optuna.Study, "ask"), (search, "sign"), (search, "sampler_of"), (search, "next_trial"), (search, "suggest")],
)
def test_a_trial_that_has_just_begun_is_given_back_at_ctrl_c(owner, name, tmp_path, train, monkeypatch):
    monkeypatch.setattr(search, "write_findings", lambda search: search.request.config)  # which takes long
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    train()
    whole = values(search.main(flags_of(tmp_path / "a", LR, "--trials 4")))
    original, calls = getattr(owner, name), []

    def interrupted(*args: Any) -> Any:
        found = original(*args)
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return found

    flags = flags_of(tmp_path / "b", LR, "--trials 4")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(SystemExit) as stop:
            search.main(flags)
    assert stop.value.code == 130
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/b/out/study.db")
    assert [trial.state for trial in study.trials[2:]] == [TrialState.FAIL, TrialState.WAITING]
    assert values(search.main(flags)) == whole


def test_a_trial_that_kills_its_process_twice_is_not_tried_a_third_time(tmp_path, train):
    train()
    study = search.main(flags_of(tmp_path, LR, "--trials 2"))
    for again in (False, True):
        trial = study.ask()
        assert trial.user_attrs.get("killed", False) == again
        trial.suggest_float("lr", 1e-6, 1.0, log=True)
        search.put_back(study, study.trials[trial.number], killed=True)
    assert not any(trial.state == TrialState.WAITING for trial in study.trials)


def test_who_asks_a_moment_too_late_steps_back_and_waits(tmp_path, train, monkeypatch):
    train()
    study = search.main(flags_of(tmp_path, LR, "--trials 2"))
    request = space.parse_search_args(flags_of(tmp_path, LR, "--trials 3"))
    ask, others = study.ask, []

    def late() -> Any:
        others.append(ask())  # another worker's, of this very moment
        signed_by(others[-1], place=["elsewhere", ""])
        return ask()

    def wait(seconds: float) -> None:
        study.tell(others[0], 0.5)

    monkeypatch.setattr(study, "ask", late)
    monkeypatch.setattr(search.time, "sleep", wait)
    mine = search.Search(study, request, dict(request.space or {}), Kept(), datetime.now())
    assert search.next_trial(mine) is None
    assert [trial.state for trial in study.trials[2:]] == [TrialState.COMPLETE, TrialState.FAIL]
    assert search.voided(study.trials) == {3} and "cause" not in study.trials[3].user_attrs


# -- failures


def test_failed_trials_do_not_count_and_are_listed(tmp_path, train, capsys):
    calls = []

    def sometimes(config: TrainingConfig) -> float:
        calls.append(config.lr)
        if len(set(calls)) == 3:
            raise ValueError("the sky has fallen")
        return parabola(config)

    train(sometimes)
    study = search.main(flags_of(tmp_path, LR))
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
            search.main(flags)
        assert stop.value.code == 1 and len(calls) == 3 * session
        last = capsys.readouterr().err.splitlines()
        assert last == [f"failed: the first 3 trials all failed: file {3 * session - 2} cannot be written"]
    train()
    assert len(values(search.main(flags))) == 2


def test_a_trial_that_breaks_down_counts_as_stopped_early(tmp_path, train):
    def broken(config: TrainingConfig) -> float:
        if config.lr > 0.1:
            raise engine.NonFiniteLoss("loss", float("nan"), step=3)
        return parabola(config)

    trainer = train(broken)
    study = search.main(flags_of(tmp_path, LR, "--trials 20"))
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
    assert len(values(search.main(flags))) == 2


def test_a_database_that_stays_locked_is_said_in_one_line(tmp_path, train, monkeypatch, capsys):
    monkeypatch.setattr(search, "BUSY_SECONDS", 0.01)
    locks = []

    def lock(config: TrainingConfig) -> float:
        locks.append(sqlite3.connect(tmp_path / "out" / "study.db"))
        locks[-1].execute("BEGIN IMMEDIATE")
        return parabola(config)

    train(lock)
    with pytest.raises(SystemExit) as stop:
        search.main(flags_of(tmp_path))
    locks[0].close()
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "failed: the study cannot be used ((sqlite3.OperationalError) database is locked); the same command goes on"
    ]


def test_timeout_ends_with_what_there_is(tmp_path, train, monkeypatch, capsys):
    trainer = train()
    clock = SimpleNamespace(now=lambda: datetime.now() + timedelta(seconds=50 * len(trainer.configs)))
    monkeypatch.setattr(search, "datetime", clock)
    study = search.main(flags_of(tmp_path, LR, "--trials 1000 --timeout 120"))
    assert 1 <= len(study.trials) <= 3
    assert "the same command goes on" in capsys.readouterr().out and (tmp_path / "out" / "best_config.json").exists()


# -- the end


class Repeats:
    """Stands for `protocol.run_all` and for the page: leaves a folder as repeated runs do, and keeps what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, TrainingConfig]] = []
        self.pages: list[str] = []
        monkeypatch.setattr(protocol, "run_all", self.run_all)
        monkeypatch.setattr(baseline, "write_report", lambda config, folder, runtime: self.pages.append(folder.name))

    def run_all(self, config: TrainingConfig, run: Any, folder: Path, runtime: Any) -> dict[str, Any]:
        assert not config.overwrite
        protocol.refuse_occupied(folder, config)
        self.asked.append((folder.name, config))
        (folder / "seed42").mkdir(parents=True, exist_ok=True)
        (folder / "protocol.json").write_text(json.dumps(protocol.options(config)))
        (folder / "seed42" / "results.json").write_text(json.dumps({"lr": config.lr}))
        return {}


def test_the_best_is_repeated_with_its_test_fold_in_the_end_only(tmp_path, train, monkeypatch, capsys):
    trainer, repeats = train(), Repeats(monkeypatch)
    flags = [*flags_of(tmp_path), "--seeds", "3"]
    study = search.main(flags)
    assert [(name, config.repeats, config.test) for name, config in repeats.asked] == [("best", 3, True)]
    assert repeats.asked[0][1].lr == study.best_params["lr"]
    assert len(trainer.configs) == 8 and not any(config.test for config in trainer.configs)
    search.main([*flags, "--seeds", "5"])
    assert [(name, config.repeats) for name, config in repeats.asked[1:]] == [("best", 5)]
    assert repeats.pages == ["best"] * 2
    assert "read before" not in capsys.readouterr().out


def test_what_was_read_of_the_test_fold_before_is_kept_and_said(tmp_path, train, monkeypatch, capsys):
    repeats = Repeats(monkeypatch)
    train(lambda config: 0.5 * parabola(config))
    flags = [*flags_of(tmp_path), "--seeds", "3"]
    first = search.main([*flags, "--trials", "2"]).best_trial
    capsys.readouterr()
    train()  # what comes now scores higher
    later = search.main([*flags, "--trials", "4"]).best_trial
    said = capsys.readouterr().out
    assert later.number > first.number
    assert [(name, config.lr) for name, config in repeats.asked] == [
        ("best", first.params["lr"]),
        (f"best-trial{later.number}", later.params["lr"]),
    ]
    assert said.count("the test fold has been read before with other settings, kept in best\n") == 1
    kept = json.loads((tmp_path / "out" / "best" / "seed42" / "results.json").read_text())
    assert kept["lr"] == first.params["lr"]
    search.main([*flags, "--trials", "4"])  # the same again goes where it was
    assert repeats.asked[-1][0] == repeats.pages[-1] == f"best-trial{later.number}"


def test_repeats_that_were_stopped_before_they_read_the_test_fold_make_room(tmp_path, train, monkeypatch, capsys):
    repeats = Repeats(monkeypatch)
    train()
    flags = [*flags_of(tmp_path), "--seeds", "3", "--trials", "2"]
    search.main(flags)
    (tmp_path / "out" / "best" / "seed42" / "results.json").unlink()
    (tmp_path / "out" / "best" / "protocol.json").write_text(json.dumps({"lr": 0.5}))
    capsys.readouterr()
    search.main(flags)
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
    baseline.read_examples = lambda config, kept: examples("same", split)
    search.main([*flags_of(tmp_path), "--trials", "2", *flags.split()])
    assert ("test on images that helped to choose the settings" in capsys.readouterr().out) == is_said


# -- what matters


def trials_of(options: Mapping[str, Any], scores: Any) -> list[sensitivity.Scored]:
    """Trials with these values of options and scores."""
    rows = pd.DataFrame(options).to_dict("records")
    return [sensitivity.Scored(row, score) for row, score in zip(rows, scores, strict=True)]


def test_importance_and_spread_of_a_known_function():
    rng = np.random.default_rng(0)
    drawn = {
        "lr": 10 ** rng.uniform(-6, 0, 80),
        "dropout": rng.uniform(0, 1, 80),
        "batch_size": rng.choice([16, 32, 64], 80).tolist(),
    }
    scores = 0.5 + 0.3 * (np.log10(drawn["lr"]) > -3) + 0.1 * (np.array(drawn["batch_size"]) == 32)
    axes = {
        "lr": space.Dimension("lr", low=1e-6, high=1.0, log=True),
        "dropout": space.Dimension("dropout", low=0.0, high=1.0),
        "batch_size": space.Dimension("batch_size", choices=(16, 32, 64)),
    }
    best = {"lr": 0.1, "dropout": 0.5, "batch_size": 32}
    table = sensitivity.importance_table(trials_of(drawn, scores.tolist()), axes, best, 0).set_index("option")
    assert list(table.index[:2]) == ["lr", "batch_size"] and table["importance"].sum() == pytest.approx(1)
    # Variances of two independent steps: .3 / 2 squared against .1 squared * 2 / 9.
    share = 0.15**2 / (0.15**2 + 0.01 * 2 / 9)
    assert table["importance"]["lr"] == pytest.approx(share, abs=0.07)
    assert table["spread"]["lr"] == pytest.approx(0.3, abs=0.06)
    assert table["spread"]["batch_size"] == pytest.approx(0.1, abs=0.03)
    assert table["spread"]["dropout"] < 0.03
    assert table["best_in"]["batch_size"] == "32" and table["best_value"]["lr"] == 0.1
    low, high = map(float, table["worst_in"]["lr"].split(".."))
    assert 1e-6 <= low < high <= 1e-3 * 1.01


@pytest.mark.parametrize(
    ("dimension", "given", "places", "titles"),
    [
        (space.Dimension("lr", low=1e-4, high=1.0, log=True), [1e-4, 2e-3, 0.5, 1.0], [0, 1, 3, 3], 4),
        (space.Dimension("dropout", low=0.0, high=0.8), [0.0, 0.3, 0.8], [0, 1, 3], 4),
        (space.Dimension("freeze_layers", low=16, high=22, step=2), [16, 22, 20], [0, 3, 2], ["16", "18", "20", "22"]),
        (space.Dimension("freeze_layers", low=8, high=11), [8, 11], [0, 3], ["8", "9", "10", "11"]),
        (space.Dimension("loss", choices=("mse", "l1")), ["l1", "mse"], [1, 0], ["mse", "l1"]),
        (space.Dimension("head_lr", choices=(None, 0.1)), [0.1, None], [1, 0], ["None", "0.1"]),
    ],
)
def test_values_fall_into_bins(dimension, given, places, titles):
    found = sensitivity.bins(np.array([sensitivity.coded(value, dimension) for value in given]), dimension)
    assert found[0].tolist() == places
    assert len(found[1]) == titles if isinstance(titles, int) else found[1] == titles


def test_a_stopped_trial_counts_as_if_it_had_risen_like_the_others():
    lr = {"params": {"lr": 0.1}, "distributions": {"lr": optuna.distributions.FloatDistribution(0.01, 1)}}
    made = [
        optuna.create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.4, 2: 0.3}, **lr),
        optuna.create_trial(state=TrialState.PRUNED, **lr),  # broken down before its first epoch was over
        optuna.create_trial(state=TrialState.FAIL, intermediate_values={1: 0.9}, **lr),
        optuna.create_trial(value=0.7, intermediate_values={1: 0.6, 2: 0.5, 3: 0.7}, **lr),
        optuna.create_trial(value=0.8, intermediate_values={1: 0.2, 2: 0.3, 3: 0.8}, **lr),
        optuna.create_trial(value=0.9, intermediate_values={1: 0.5, 2: 0.7, 3: 0.9}, **lr),
    ]
    found = sensitivity.scored_trials(made)  # the others gained .1, .5 and .2 after the second epoch
    assert [trial.score for trial in found] == pytest.approx([0.7, 0.8, 0.9, 0.4 + 0.2])


def test_too_few_or_equal_trials_say_nothing():
    axes = {"dropout": space.Dimension("dropout", low=0.0, high=1.0)}
    for scores in ([0.1, 0.2], [0.5] * 10):
        trials = trials_of({"dropout": np.linspace(0, 1, len(scores))}, scores)
        table = sensitivity.importance_table(trials, axes, {"dropout": 0.5}, 0)
        assert table.empty and "too few trials" in sensitivity.table_lines(table)[0]


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
        search.main(["--output_dir", "out", *flags.split()])
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


def test_trials_share_what_they_do_not_change_and_score_as_single_runs_do(make_dataset, tmp_path, monkeypatch):
    files = make_dataset(scored_rows())
    read, loaded, folds = [], [], []
    originals = baseline.sources.read_examples, baseline.backbones.load_backbone, baseline.evaluate
    monkeypatch.setattr(baseline.sources, "read_examples", lambda *a: read.append(1) or originals[0](*a))
    monkeypatch.setattr(baseline.backbones, "load_backbone", lambda *a, **k: loaded.append(1) or originals[1](*a, **k))
    monkeypatch.setattr(baseline, "evaluate", lambda s, fold, *a: folds.append(fold) or originals[2](s, fold, *a))
    content = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "dropout": {"low": 0, "high": 0.5}}
    trained = ["--no_freeze_clip", "--partial_freeze", "--freeze_layers", "22"]  # what a trial trains is its own
    flags = ["--cache_dir", str(tmp_path / "cache"), *TINY, *trained, *files.flags]
    study = search.main([*flags_of(tmp_path, content, "--trials 3 --epochs 2"), *flags])
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
    assert sum(trial.state in search.FINISHED for trial in study.trials) == 7
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
def test_the_measured_optimum_of_the_demo_is_found(tmp_path, train):
    """Heads without calibration on the frozen tiny CLIP: docs/search.md has the grid, good from 3e-3 to 3e-1."""
    content = {"lr": {"low": 1e-7, "high": 1.0, "log": True}, "w_exp": {"low": 0.05, "high": 0.3}}
    flags = shlex.split(f"--demo --freeze_clip --no_calibration --epochs 2 --trials 24 --cache_dir {tmp_path / 'c'}")
    study = search.main([*flags_of(tmp_path, content), *flags])
    trials = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert len(trials) == 24
    assert 3e-3 <= study.best_params["lr"] <= 0.32
    random = trials["score"][: search.STARTUP_TRIALS]
    assert study.best_value > random.median() + 0.1
    table = pd.read_csv(tmp_path / "out" / "importance.csv")
    assert table["option"][0] == "lr" and table["importance"][0] > 0.7


def test_of_the_data_only_the_views_may_be_searched():
    """What is compared is the same in all trials: images, scores, their ranges, folds."""
    searched = {name for name in OPTIONS if space.may_be_searched(name)}
    for name, option in OPTIONS.items():
        if option.metadata["group"] in ("data", "meta"):
            assert (name in searched) == (name in VIEWS), name
        else:
            assert (name in searched) == (name != "select_by"), name
    assert not any(name.endswith("_column") or name.startswith("mos_range") for name in searched)
    assert set(VIEWS) <= set(OPTIONS) and not searched & {"seed", "fold", "dataset", "demo", "test", "output_dir"}
    assert not any(OPTIONS[name].pair for name in searched)  # which a study could not keep as they are


def test_a_stopped_trial_is_written_down_with_the_best_it_reached(tmp_path, train):
    """Not with what it said last, which Optuna takes for its value."""
    heights = {1: 0.4, 2: 0.3, 3: 0.1, 4: 0.1}
    trainer = train()
    search.main(flags_of(tmp_path, LR, "--trials 5"))

    def falling(config: TrainingConfig, *, kept: Kept, after_epoch: Any = None) -> dict[str, Any]:
        for epoch, height in () if config.dry_run else heights.items():
            after_epoch({"epoch": epoch, "val_main": -10 + height})
        return {}

    baseline.run = falling
    study = search.main(flags_of(tmp_path, LR, "--trials 6"))
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
    search.main(flags_of(tmp_path, content, f"--trials 1 {flags}"))
    assert f"          CLIP: {words}\n" in capsys.readouterr().out


# Options that change nothing of what the untrained CLIP makes of the images ...
NOT_FOR_KNOWN = (
    "use_residual_learning calibration residual_scale_q residual_scale_c hidden_dim_q hidden_dim_c "
    "dropout use_refinement refinement_layers refinement_heads refinement_dim w_q w_c w_extra "
    "task_gradients w_exp label_smoothing loss epochs lr head_lr layer_decay weight_decay warmup_ratio "
    "scheduler max_grad_norm gradient_accumulation_steps early_stopping_patience early_stopping_min_delta "
    "select_by ema_decay preset output_dir overwrite config dry_run advice report tensorboard tracker "
    "resume save_every_minutes keep_states"
)
# ... nor, with these, of what is read of the data before it becomes batches ...
NOT_FOR_DATA = (
    "prompt_levels use_explanations batch_size amp test device freeze_clip "
    "partial_freeze freeze_layers unfreeze_schedule lora_rank init_from cache cache_views cache_dtype "
    "cache_max_gb image_memory_gb num_workers compile gradient_checkpointing dynamic_batch_size "
    "deterministic max_memory_usage crop_scale_min crops test_crops global_view horizontal_flip"
)
# ... (and these, which name the CLIP) ...
OF_CLIP = "clip_model clip_pretrained image_size"
# ... nor, with NOT_FOR_DATA and these, of the CLIP that is loaded.
NOT_FOR_CLIP = (
    "dataset data_root extra_scores data_csv_path image_base_dir test_size val_size split_by split_file "
    "kfold fold repeats strict_splits mos_range_q mos_range_c name_column prompt_column quality_column "
    "consistency_column explanation_column quality_std_column consistency_std_column group_column "
    "cache_dir demo bad_images follow_links"
)


@pytest.mark.parametrize(
    ("decided", "free"),
    [
        (KNOWN_BY, NOT_FOR_KNOWN),
        (READ_BY, f"{NOT_FOR_KNOWN} {NOT_FOR_DATA} {OF_CLIP}"),
        (LOADED_BY, f"{NOT_FOR_KNOWN} {NOT_FOR_DATA} {NOT_FOR_CLIP}"),
    ],
)
def test_of_every_option_it_is_settled_whether_what_is_kept_depends_on_it(decided, free):
    """A new option is on no list: decide whether it changes what runs share, lest they share a stale value."""
    names = decided.names()
    assert sorted([*names, *free.split()]) == sorted(OPTIONS)


def test_what_is_kept_is_told_apart_by_the_values_that_decide_it():
    decided = DecidedBy(groups=("backbone",), without=("init_from",), others=("seed",))
    plain = TrainingConfig()
    assert decided.values(plain) == decided.values(replace(plain, init_from="a", lr=0.1))
    for name, value in {"freeze_layers": 9, "clip_model": "tiny", "seed": 1}.items():
        assert decided.values(replace(plain, **{name: value})) != decided.values(plain), name
