"""The study of a search: its storage, and the promise that it is about one space, one set of options, one data set."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from cli.memo import Memo
from storage import json_files
from storage.locks import locked
from training import checkpoints, run_folder
from tuning.arguments import Request
from tuning.programs import SCORER
from tuning.space import Space

STARTUP_TRIALS = 10  # drawn at random before TPE begins to learn
PRUNE_FROM_TRIALS = 5  # finished trials, before which none is stopped early
POLL_SECONDS = 1.0
BUSY_SECONDS = 100.0  # how long SQLite waits for other workers
CONNECT_SECONDS = 10  # how long a server may take to answer
OPENINGS = 5  # of a server's database, whose tables several may be making at once
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STORAGE_ERRORS = (optuna.exceptions.OptunaError, SQLAlchemyError)
TRIALS_DIR = "trials"
BEST_RUNS = "best"
SEARCH_FILE = "search.json"  # tells the folder of a search
STUDY_FILE = "study.db"
JOURNAL = "journal:"


class SearchFailed(RuntimeError):
    """The search cannot go on, or has nothing to show."""


@dataclass(frozen=True)
class Search:
    """A study, and what is asked of it."""

    study: optuna.Study
    request: Request
    space: Space
    memo: Memo
    began: datetime
    draws_folds: bool = False  # whether other seeds have other test folds

    @property
    def score(self) -> str:
        """What trials are compared by."""
        return self.request.program.score(self.request.config)

    @property
    def is_over(self) -> bool:
        """Whether --timeout has passed."""
        limit = self.request.timeout
        return limit is not None and (datetime.now() - self.began).total_seconds() >= limit

    def trials(self) -> list[FrozenTrial]:
        """All trials, in their order."""
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> list[FrozenTrial]:
        """Those that count."""
        return [trial for trial in self.trials() if trial.state in FINISHED]


def refuse_occupied(folder: Path, flag: str) -> None:
    """Raise ValueError unless the folder that `flag` names is absent, empty, or that of a search, which may go on."""
    runs = (run_folder.CONFIG_FILE, f"{checkpoints.BEST_DIR}/{checkpoints.DESCRIPTION_FILE}")
    if any((folder / name).exists() for name in runs):
        raise ValueError(f"{flag} {folder}: holds a run; choose a new or empty folder")
    own = (SEARCH_FILE, STUDY_FILE)
    run_folder.refuse_foreign(folder, "a search", lambda folder: any((folder / name).exists() for name in own), flag)


def study_lock(request: Request) -> AbstractContextManager[bool]:
    """A block that others with this folder, which is made, wait for: SQLite would give two of them the same trial."""
    return locked(request.folder, wait=lambda: None)  # silently, for it is short


def write_search_file(request: Request) -> None:
    """Say in the folder, before anything else is there, that it is a search's, wherever its study is."""
    if not (request.folder / SEARCH_FILE).exists():
        kept_in = {"study_name": request.study_name, "storage": without_password(request.storage)}
        json_files.write_json(request.folder / SEARCH_FILE, kept_in)


def open_study(request: Request) -> optuna.Study:
    """The study in its storage, made if it is not there. Raises ValueError for a storage that cannot be used."""
    tries = 1 if request.storage.startswith((JOURNAL, "sqlite")) else OPENINGS
    while True:
        tries -= 1
        try:
            return optuna.create_study(
                storage=storage_at(request.storage),
                study_name=request.study_name,
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(
                    n_startup_trials=PRUNE_FROM_TRIALS, n_warmup_steps=max(2, round(request.config.epochs / 5))
                ),
            )
        except (*STORAGE_ERRORS, ImportError, OSError) as error:
            if not tries or not isinstance(error, DBAPIError) or not error.statement:  # none: it does not answer
                shown = without_password(request.storage)
                raise ValueError(f"--storage {shown}: cannot be used ({reason_of(error)})") from None
        time.sleep(POLL_SECONDS)


def storage_at(storage: str) -> Any:
    """The storage of --storage. Raises ValueError, and what a database raises."""
    if storage.startswith(JOURNAL):
        path = Path(storage.removeprefix(JOURNAL))
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    url = database_url(storage)
    engine: dict[str, Any] = {"pool_pre_ping": True}  # a server may have been started again meanwhile
    if url.drivername.startswith("sqlite"):
        engine = {"connect_args": {"timeout": BUSY_SECONDS}}
    elif url.drivername == "postgresql":  # for which SQLAlchemy has another driver in each release
        if importlib.util.find_spec("psycopg") is None:
            raise ImportError("it needs psycopg: pip install -r requirements-extra.txt")
        url = url.set(drivername="postgresql+psycopg", query={"connect_timeout": str(CONNECT_SECONDS), **url.query})
    return optuna.storages.RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine)


def database_url(storage: str) -> URL:
    """A storage that is no journal. Raises ValueError, without the password that may be in it."""
    try:
        url = make_url(storage)
    except (SQLAlchemyError, ValueError):  # ValueError: its port is no number
        raise ValueError(
            "--storage: must be a database URL such as postgresql://USER@HOST/NAME, or journal:PATH"
        ) from None
    if "@" in (url.host or ""):
        raise ValueError("--storage: has an @ too many; within a password it is written %40")
    return url


def reason_of(error: Exception) -> str:
    """What a database or its driver says, in one line."""
    return str(error.__cause__ or error).splitlines()[0]


def without_password(storage: str) -> str:
    """A storage, fit to be printed. Raises ValueError if it is none."""
    if storage.startswith(JOURNAL):
        return storage
    return database_url(storage).difference_update_query(["password"]).render_as_string(hide_password=True)


def check_same_search(study: optuna.Study, request: Request, space: Space, result_options: Mapping[str, Any]) -> None:
    """Write down what is searched, or raise ValueError if the study was begun with something else."""
    asked: dict[str, Any] = {
        "program": request.program.script,
        "options": dict(result_options),
        "space": {name: dimension.to_json() for name, dimension in space.items()},
    }
    has_trials = bool(study.trials)  # looked at first, for what is searched is written before them
    saved = study.user_attrs.get("searched")
    if saved is None and has_trials:
        raise ValueError(f"--study_name {study.study_name}: the storage has another program's study of this name")
    if saved is None:
        study.set_user_attr("searched", asked)  # as one, lest others see a half of it
        return
    if (before := saved.get("program", SCORER.script)) != request.program.script:
        raise ValueError(
            f"--study_name {study.study_name}: is a search of {before}; choose a new --{request.program.folder}"
        )
    other: list[str] = []
    for name, now in asked["space"].items():
        if name in saved["space"] and saved["space"][name] != now:
            other.append(f"{name} in {now}, not {saved['space'][name]}")
    other += [f"{name} is searched" for name in asked["space"] if name not in saved["space"]]
    other += [f"{name} is not searched" for name in saved["space"] if name not in asked["space"]]
    searched = {*asked["space"], *saved["space"]}
    for name, now in asked["options"].items():
        before = saved["options"].get(name)
        if before != now and name not in searched:
            other.append(f"{name} is {now}, not {before}")
    if other:
        raise ValueError(
            f"--study_name {study.study_name}: was begun with other options ({'; '.join(other[:5])}); use the same "
            f"flags, or a new --{request.program.folder}"
        )


def check_same_data(search: Search, fingerprint: str) -> None:
    """Raise ValueError if the study's trials have seen other data."""
    with study_lock(search.request):
        known = search.study.user_attrs.get("data")
        if known is None:
            search.study.set_user_attr("data", fingerprint)
    if known not in (None, fingerprint):
        raise ValueError(f"{search.request.folder}: the data has changed since the search began; choose a new folder")


def sampler_of(seed: int, place: int) -> optuna.samplers.TPESampler:
    """The sampler of one trial."""
    entropy = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
    return optuna.samplers.TPESampler(
        multivariate=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS, seed=entropy
    )
