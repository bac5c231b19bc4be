"""A trainer that scores by a formula, in the place of `baseline.run`, and small searches with it; tests import it.

PYTHONPATH=. python tests/tuning/stand_in.py PAUSE HANG_AT COUNT FLAGS_OF_SEARCH...      # one of COUNT at once
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

import baseline
from cli.memo import Memo
from configs import TrainingConfig
from finetune import experiment, initial_model
from search import main
from tuning import sensitivity
from tuning.study import FINISHED

LR = {"lr": {"low": 1e-6, "high": 1.0, "log": True}}


BEST_LR = 1e-3


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
        self, config: TrainingConfig, *, after_epoch: Callable[[Mapping[str, float]], None], memo: Memo
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
        experiment.read_examples = lambda config, memo: examples("same")
        initial_model.num_blocks = lambda config: 12


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
    return [trial.params for trial in study.trials if trial.state in FINISHED]


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(SystemExit) as stop:
        main(flags)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), said
    return lines[0].removeprefix("error: ")


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def in_place(*, findings: bool = False) -> Iterator[Callable[..., Trainer]]:
    """A function that puts a Trainer in the place of `baseline.run` until the block is left.

    Meanwhile studies are not forced onto the disk and, without `findings`, nobody looks at what mattered: both take
    longer than all the rest.
    """

    def install(*args: Any, **how: Any) -> Trainer:
        trainer = Trainer(*args, **how)
        trainer.install()
        return trainer

    def trust_the_memory(connection: Any, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((baseline, "run"), (experiment, "read_examples"), (initial_model, "num_blocks")):
            patch.setattr(module, name, getattr(module, name))  # to be put back in the end
        if not findings:
            nothing = pd.DataFrame(columns=sensitivity.COLUMNS)
            patch.setattr(sensitivity, "importance_table", lambda *given: nothing)
            patch.setattr(sensitivity, "draw", lambda path, *given: path.touch())
        event.listen(Engine, "connect", trust_the_memory)
        try:
            yield install
        finally:
            event.remove(Engine, "connect", trust_the_memory)


def process(
    folder: Path, flags: list[str], *, together: int = 1, hang_at: int = -1, pause: float = 0.3
) -> subprocess.Popen[str]:
    """A search in a process of its own, one of so many that begin `together`; `folder` is where it works."""
    return subprocess.Popen(
        [sys.executable, __file__, str(pause), str(hang_at), str(together), *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(baseline.__file__).parent)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def main_together(pause: str, hang_at: str, count: str, *flags: str) -> None:
    """Search, when so many processes of this kind are ready in the same folder."""
    Trainer(pause=float(pause), hang_at=int(hang_at)).install()
    Path(f"{os.getpid()}.started").touch()
    while len(list(Path().glob("*.started"))) < int(count):
        time.sleep(0.02)
    main(flags)


if __name__ == "__main__":
    main_together(*sys.argv[1:])
