"""Search the options of baseline.py for the best validation score, with Optuna.

    python search.py --demo --trials 20 --output_dir runs/search      # works without data or network
    python search.py --help

A trial is one `baseline.run` that leaves the test fold unread; the best one is repeated in the end, and that reads it.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # --help, mistakes in the flags and Ctrl-C answer here, before torch and Optuna are imported, which takes seconds.
    from configs import one_line_errors
    from signals import end_as_usual, end_quietly
    from space import parse_search_args

    end_quietly(silently="--parent" in sys.argv)  # a worker's parent says it
    with one_line_errors():
        parse_search_args()
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("search.py needs Optuna: pip install -r requirements-extra.txt")

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

import baseline
import checkpoint
import compare
import engine
import protocol
import sensitivity
import sources
import starting
from configs import FREEZING, NOT_SAVED, TrainingConfig, command_line, one_line_errors
from kept import Kept
from locking import locked
from reading import read_json
from space import Dimension, Request, Space, default_space, options_of, parse_search_args
from writing import holds_nothing, write_whole

STARTUP_TRIALS = 10  # drawn at random before TPE begins to learn
PRUNE_FROM_TRIALS = 5  # finished trials, before which none is stopped early
BEAT_SECONDS = 30.0  # how often a running trial says that it is alive
DEAD_AFTER_SECONDS = 600.0  # without a word, on another machine
POLL_SECONDS = 1.0
BUSY_SECONDS = 100.0  # how long SQLite waits for other workers
OPENINGS = 5  # of a server's database, whose tables several may be making at once
MANY_ALIKE = 3  # first trials that all fail the same way end the search
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STORAGE_ERRORS = (optuna.exceptions.OptunaError, SQLAlchemyError)
FAILURES = (ValueError, engine.OutOfMemory, torch.OutOfMemoryError)
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
    kept: Kept
    began: datetime
    draws_folds: bool = False  # whether other seeds have other test folds

    @property
    def score(self) -> str:
        """What trials are compared by."""
        return self.request.config.select_by

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


# -- the study


def refuse_occupied(folder: Path) -> None:
    """Raise ValueError unless the folder is absent, empty, or that of a search, which may go on."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder}: is a file, must be a folder")
    runs = (checkpoint.CONFIG_FILE, f"{checkpoint.BEST_DIR}/{checkpoint.DESCRIPTION_FILE}")
    if any((folder / name).exists() for name in runs):
        raise ValueError(f"--output_dir {folder}: holds a run; choose a new or empty folder")
    # Looked at in this order, since the same command may be writing its first file right now.
    is_empty = not folder.exists() or holds_nothing(folder)
    is_search = any((folder / name).exists() for name in (SEARCH_FILE, STUDY_FILE))
    if not is_empty and not is_search:
        raise ValueError(f"--output_dir {folder}: holds other things than a search; choose a new or empty folder")


def one_at_a_time(request: Request) -> AbstractContextManager[bool]:
    """A block that others with this folder, which is made, wait for: SQLite would give two of them the same trial."""
    return locked(request.folder, wait=lambda: None)  # silently, for it is short


def mark_folder(request: Request) -> None:
    """Say in the folder, before anything else is there, that it is a search's, wherever its study is."""
    if not (request.folder / SEARCH_FILE).exists():
        kept_in = {"study_name": request.study_name, "storage": without_password(request.storage)}
        checkpoint.write_json(request.folder / SEARCH_FILE, kept_in)


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
            if not tries or not isinstance(error, DBAPIError):
                shown = without_password(request.storage)
                raise ValueError(f"--storage {shown}: cannot be used ({reason_of(error)})") from None
        time.sleep(POLL_SECONDS)


def storage_at(url: str) -> Any:
    """The storage of a URL."""
    if url.startswith(JOURNAL):
        path = Path(url.removeprefix(JOURNAL))
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    wait = {"connect_args": {"timeout": BUSY_SECONDS}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=wait)


def reason_of(error: Exception) -> str:
    """What a database or its driver says, in one line."""
    return str(error.__cause__ or error).splitlines()[0]


def without_password(url: str) -> str:
    """A storage, fit to be printed."""
    try:
        return url if url.startswith(JOURNAL) else make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "(no database URL)"


def agree_with(study: optuna.Study, request: Request, space: Space) -> None:
    """Write down what is searched, or raise ValueError if the study was begun with something else."""
    asked = {
        "options": protocol.options(request.config),
        "space": {name: dimension.to_json() for name, dimension in space.items()},
    }
    has_trials = bool(study.trials)  # looked at first, for what is searched is written before them
    saved = study.user_attrs.get("searched")
    if saved is None and has_trials:
        raise ValueError(f"--study_name {study.study_name}: the storage has another program's study of this name")
    if saved is None:
        study.set_user_attr("searched", asked)  # as one, lest others see a half of it
        return
    other = []
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
            "flags, or a new --output_dir"
        )


def agree_on_data(search: Search, fingerprint: str) -> None:
    """Raise ValueError if the study's trials have seen other data."""
    with one_at_a_time(search.request):
        known = search.study.user_attrs.get("data")
        if known is None:
            search.study.set_user_attr("data", fingerprint)
    if known not in (None, fingerprint):
        raise ValueError(f"{search.request.folder}: the data has changed since the search began; choose a new folder")


# -- whose turn it is


def voided(trials: Sequence[FrozenTrial]) -> set[int]:
    """Numbers of the trials that another one stands for now, or that were begun by one too many."""
    again = {trial.user_attrs["instead_of"] for trial in trials if "instead_of" in trial.user_attrs}
    return again | {trial.number for trial in trials if "surplus" in trial.user_attrs}


def next_trial(search: Search) -> optuna.Trial | None:
    """The next trial to run, None when enough are finished; waits while others' trials may be all that is missing."""
    wanted = search.request.trials
    while True:
        with one_at_a_time(search.request):
            for other in search.trials():
                if other.state == TrialState.RUNNING and is_dead(other):
                    put_back(search.study, other, killed=True)
            check_hope(search)
            states = [trial.state for trial in search.trials()]
            finished = sum(state in FINISHED for state in states)
            if finished >= wanted or search.is_over or is_orphan(search.request):
                return None
            if finished + states.count(TrialState.RUNNING) < wanted and (trial := take(search)):
                return trial
        time.sleep(POLL_SECONDS)


def take(search: Search) -> optuna.Trial | None:
    """Begin a trial, to be drawn by a sampler of its own: the same in every worker, and after a restart.

    None if those with other folders, whom nothing keeps waiting, were quicker.
    """
    trial = search.study.ask()
    with suppress(optuna.exceptions.UpdateFinishedTrialError):
        sign(trial)
        # Several may have asked at once. All see the numbers in the same order, so all agree on who was first.
        before = [other for other in search.trials() if other.number < trial.number]
        if sum(other.state != TrialState.FAIL for other in before) < search.request.trials:
            place = len({other.number for other in before} - voided(search.trials()))
            search.study.sampler = sampler_of(search.request.config.seed, place)
            return trial
        trial.set_user_attr("surplus", True)
        search.study.tell(trial, state=TrialState.FAIL)
    return None


def sampler_of(seed: int, place: int) -> optuna.samplers.TPESampler:
    """The sampler of one trial."""
    entropy = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
    return optuna.samplers.TPESampler(
        multivariate=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS, seed=entropy
    )


def this_process() -> dict[str, Any]:
    """What tells this process from all others, of other machines, containers and times too."""
    namespace = Path("/proc/self/ns/pid")  # containers may share a name, and have a process 1 each
    place = [socket.gethostname(), os.readlink(namespace) if namespace.is_symlink() else ""]
    return {"place": place, "pid": os.getpid(), "start": state_and_start(os.getpid())[1]}


def sign(trial: optuna.Trial) -> None:
    """Say in the study who runs the trial, and that it is alive."""
    trial.set_user_attr("signed", {**this_process(), "beat": time.time()})


def is_dead(trial: FrozenTrial) -> bool:
    """Whether the process that ran this trial is gone; where that cannot be seen, whether it was silent for long."""
    signed = trial.user_attrs.get("signed", {})
    if signed and signed["place"] == this_process()["place"]:
        state, start = state_and_start(signed["pid"])
        if start:
            return start != signed["start"] or state in "ZX"  # of another process, or ended and not yet waited for
        if not is_alive(signed["pid"]):
            return True
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return time.time() - signed.get("beat", started) > DEAD_AFTER_SECONDS


def state_and_start(pid: int) -> tuple[str, str]:
    """What a process does, and when it was started, since numbers are used again; empty where that cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", ""
    after_name = stat.rpartition(")")[2].split()  # in a name there may be anything
    return after_name[0], after_name[19]


def is_alive(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def put_back(study: optuna.Study, trial: FrozenTrial, *, killed: bool) -> None:
    """End a trial that was cut short, and put its values in the queue again; those that kill twice stay out."""
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # another worker was quicker
        return
    if not (killed and trial.user_attrs.get("killed")):
        study.enqueue_trial(trial.params, user_attrs={"instead_of": trial.number, "killed": killed})


def give_back(search: Search) -> None:
    """Put back what this process was running, or had just begun and not signed yet."""
    me = this_process()
    with one_at_a_time(search.request):
        for trial in search.trials():
            signed = trial.user_attrs.get("signed")
            is_new = trial.datetime_start is not None and trial.datetime_start >= search.began
            is_mine = is_new if signed is None else {**signed, **me} == signed
            if trial.state == TrialState.RUNNING and is_mine:
                put_back(search.study, trial, killed=False)


def is_orphan(request: Request) -> bool:
    """Whether this is a worker whose parent is gone."""
    return request.parent is not None and os.getppid() != request.parent


def check_hope(search: Search) -> None:
    """Raise SearchFailed if the first trials of this session all failed the same way, or more than were asked for."""
    trials = search.trials()
    here = [trial for trial in trials if trial.datetime_start and trial.datetime_start >= search.began]
    done = [trial for trial in here if trial.state.is_finished() and trial.number not in voided(trials)]
    causes = [trial.user_attrs.get("cause") for trial in done]
    first = [re.sub(r"[-+.\de]*\d", "#", cause) if cause else None for cause in causes[:MANY_ALIKE]]
    if len(first) == MANY_ALIKE and None not in first and len(set(first)) == 1:
        raise SearchFailed(f"the first {MANY_ALIKE} trials all failed: {causes[0]}")
    failed = [cause for trial, cause in zip(done, causes, strict=True) if trial.state == TrialState.FAIL]
    if len(failed) > max(MANY_ALIKE, search.request.trials):
        raise SearchFailed(f"{len(failed)} trials have failed, the last one: {failed[-1]}")


# -- one trial


def suggest(trial: optuna.Trial, dimension: Dimension) -> Any:
    """A value for one option."""
    if dimension.choices is not None:
        return trial.suggest_categorical(dimension.name, dimension.choices)
    low, high, step = dimension.low, dimension.high, dimension.step
    if dimension.is_whole:
        return trial.suggest_int(dimension.name, int(low), int(high), step=int(step or 1), log=dimension.log)
    return trial.suggest_float(dimension.name, low, high, step=step, log=dimension.log)


@contextmanager
def heartbeat(trial: optuna.Trial) -> Iterator[None]:
    """Let the study know that the trial is alive, for as long as the block lasts."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(*STORAGE_ERRORS, OSError):  # the next beat may come through
                sign(trial)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run_trial(search: Search, trial: optuna.Trial) -> None:
    """Run one trial, tell the study what came of it, and say so."""
    started = time.perf_counter()
    try:
        values = {name: suggest(trial, dimension) for name, dimension in search.space.items()}
        with heartbeat(trial):
            state, score, cause = outcome(search, trial, values)
        with one_at_a_time(search.request):
            trial.set_user_attr("seconds", round(time.perf_counter() - started, 1))
            if cause:
                trial.set_user_attr("cause", cause)
            search.study.tell(trial, score, state=state, skip_if_finished=True)
        said = trial_line(search, trial.number)
    except optuna.exceptions.UpdateFinishedTrialError:
        said = f"note      trial {trial.number} was taken over by another worker, which took this one for dead"
    # In one piece: print() writes the line's end apart where Python does not buffer, and the lines of workers mix.
    print(said + "\n", end="", flush=True)


def outcome(
    search: Search, trial: optuna.Trial, values: Mapping[str, Any]
) -> tuple[TrialState, float | None, str | None]:
    """Train with these values: how it ended, the validation score if it ended well, and the cause if it did not."""
    request = search.request
    folder = request.folder / TRIALS_DIR / f"{trial.number:04d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)

    def after_epoch(row: Mapping[str, float]) -> None:
        trial.report(row[f"val_{search.score}"], int(row["epoch"]))
        if row["epoch"] < config.epochs and trial.should_prune():
            raise optuna.TrialPruned

    try:
        config = options_of(request.config, search.space, values, request.given)
        config = replace(config, output_dir=str(folder), test=False, report=False, save_every_minutes=0.0)
        with folder.with_suffix(".log").open("w", encoding="utf-8") as log, redirect_stdout(log):
            results = baseline.run(config, after_epoch=after_epoch, kept=search.kept)
    except optuna.TrialPruned:
        return TrialState.PRUNED, None, None
    except engine.NonFiniteLoss as error:  # as good as stopped early: the same values would break down again
        return TrialState.PRUNED, None, f"diverged: {error}"
    except FAILURES as error:
        return TrialState.FAIL, None, str(error) or type(error).__name__
    finally:
        for name in (checkpoint.BEST_DIR, checkpoint.STATE_DIR):  # a whole CLIP for each trial is too much
            shutil.rmtree(folder / name, ignore_errors=True)
        gc.collect()  # what refers to itself holds a model in memory
    trial.set_user_attr("best_epoch", results["best_epoch"])
    return TrialState.COMPLETE, results["val"][search.score], None


def values_line(params: Mapping[str, Any]) -> str:
    """Options and values, in a few words."""
    return " ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def trial_line(search: Search, number: int) -> str:
    """What was tried, what came of it, and the best so far."""
    trials = search.trials()
    trial = trials[number]
    epoch = max(trial.intermediate_values, default=0)
    said = {
        TrialState.COMPLETE: lambda: f"{search.score} {trial.value:.4f}",
        TrialState.PRUNED: lambda: f"pruned at epoch {epoch} ({trial.intermediate_values.get(epoch, np.nan):.4f})",
    }.get(trial.state, lambda: "failed")()
    cause = trial.user_attrs.get("cause")
    said = cause.splitlines()[0] if cause else said
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = max(complete, key=lambda trial: trial.values[0], default=None)
    so_far = f"best {best.value:.4f} (trial {best.number})" if best else "no best yet"
    return (
        f"trial {number:<4} {values_line(trial.params)}: {said}, {so_far}, {trial.user_attrs.get('seconds', 0):.0f} s"
    )


# -- processes


def work(search: Search) -> None:
    """Run trials until there are enough; one that is cut short goes back into the queue."""
    try:
        while (trial := next_trial(search)) is not None:
            run_trial(search, trial)
    except BaseException:
        with suppress(*STORAGE_ERRORS, OSError):  # then whoever looks next finds this process gone
            give_back(search)
        raise


def run_workers(request: Request, argv: Sequence[str]) -> None:
    """Let other processes run the trials. Raises SearchFailed if one ends with an error, which it has said."""
    count = request.workers
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, engine.num_cpus() // count)),
        "LOCAL_WORLD_SIZE": str(count),  # for the threads that decode images
        "TQDM_DISABLE": "1",
    }
    workers = []
    try:
        for number in range(count):
            command = [sys.executable, __file__, *argv, "--parent", str(os.getpid())]
            own = {**environment, "LOCAL_RANK": str(number % max(1, engine.num_gpus()))}
            # In a session of its own: Ctrl-C reaches this process alone, which passes it on.
            workers.append(subprocess.Popen(command, env=own, start_new_session=True))
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGINT)
        for worker in workers:
            worker.wait()
    if any(code > 0 for code in codes):
        raise SearchFailed("a worker has ended with the error above; the same command goes on")
    for number, code in enumerate(codes):
        if code < 0:
            print(f"note      worker {number} was killed (signal {-code}); its trial is run again")


# -- the end


def best_config(search: Search) -> TrainingConfig:
    """The options of the best trial. Raises SearchFailed if none was finished."""
    if not any(trial.state == TrialState.COMPLETE for trial in search.trials()):
        causes = [trial.user_attrs["cause"] for trial in search.trials() if "cause" in trial.user_attrs]
        said = f", the last one: {causes[-1]}" if causes else ""
        raise SearchFailed(f"no trial has come to its end{said}")
    return options_of(search.request.config, search.space, search.study.best_params, search.request.given)


def write_findings(search: Search) -> TrainingConfig:
    """Write and print what the trials say; returns the options of the best one."""
    folder, study = search.request.folder, search.study
    config = best_config(search)
    checkpoint.write_csv(folder / "trials.csv", trials_table(search))
    saved = {name: value for name, value in config.to_json().items() if name not in NOT_SAVED}
    checkpoint.write_json(folder / "best_config.json", saved)
    scored = sensitivity.scored_trials(search.finished())
    table = sensitivity.importance_table(scored, search.space, study.best_params, search.request.config.seed)
    checkpoint.write_csv(folder / "importance.csv", table)
    figure = folder / "importance.png"
    write_whole(figure, lambda path: sensitivity.draw(path, table, search.finished(), search.score))
    states = [trial.state for trial in search.trials()]
    sizes = f"{states.count(TrialState.COMPLETE)} complete, {states.count(TrialState.PRUNED)} stopped early"
    print(f"\n{len(search.finished())} trials ({sizes}) in {folder}; spread is of validation {search.score}")
    print("\n".join(sensitivity.table_lines(table)))
    for trial in search.trials():
        if "cause" in trial.user_attrs:
            print(f"failed    trial {trial.number}: {values_line(trial.params)}: {trial.user_attrs['cause']}")
    best = study.best_trial
    print(f"\nbest: trial {best.number}, validation {search.score} {best.value:.4f}, {values_line(best.params)}")
    print(command_line(config))
    return config


def trials_table(search: Search) -> pd.DataFrame:
    """A row for each trial: trial, state, score, epochs, best_epoch, seconds, cause, and the value of each option."""
    rows = []
    void = voided(search.trials())
    for trial in search.trials():
        if trial.number in void or not trial.state.is_finished():
            continue
        seen = trial.intermediate_values
        row = {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            # Optuna takes what a stopped trial said last for its value.
            "score": trial.value if trial.state == TrialState.COMPLETE else max(seen.values(), default=None),
            "epochs": max(seen, default=0),
            "best_epoch": max(seen, key=lambda epoch: seen[epoch], default=None),
            "seconds": trial.user_attrs.get("seconds"),
            "cause": trial.user_attrs.get("cause", "" if trial.state in FINISHED else "its process was killed"),
        }
        rows.append(row | {name: trial.params.get(name) for name in search.space})
    return pd.DataFrame(rows)


def repeat_best(search: Search, config: TrainingConfig) -> None:
    """Run the best options with --seeds seeds, each reading its test fold once; goes on where it was stopped."""
    request = search.request
    config = replace(config, repeats=request.seeds)
    runtime = engine.start_runtime(config.device, config.amp, config.deterministic)
    folder, before = place_of_best(request.folder, config, search.study.best_trial.number)
    print(f"\nthe best {request.seeds} times, from seed {config.seed} on, in {folder}; this reads the test fold")
    if before:
        print(f"note      the test fold has been read before with other settings, kept in {', '.join(before)}")
    if search.draws_folds and request.seeds > 1:
        print(
            "note      folds are drawn: seeds after the first test on images that helped to choose the settings; "
            "fixed folds (--split_file) avoid that"
        )
    protocol.run_all(config, baseline.run, folder, runtime)
    baseline.write_report(config, folder, runtime)


def place_of_best(folder: Path, config: TrainingConfig, number: int) -> tuple[Path, list[str]]:
    """Where the repeated runs of the best trial go, and the names of the folders that hold those of other settings.

    The first go to best/; if the best settings have changed since the test fold was read, to best-trial<number>/.
    """
    first, other = folder / BEST_RUNS, folder / f"{BEST_RUNS}-trial{number}"
    own, before = first, []
    for place in sorted(
        {results.parent.parent for results in folder.glob(f"{BEST_RUNS}*/*/{checkpoint.RESULTS_FILE}")}
    ):
        saved = read_json(place / compare.PROTOCOL_FILE)
        if protocol.options(replace(config, repeats=saved.get("repeats", 1))) == saved:
            own = place
        else:
            before.append(place.name)
    return (other if own.name in before else own), before


# -- the whole


def prepare(request: Request, kept: Kept) -> Search:
    """Open the study, having made sure that what is asked for can be run at all. Raises ValueError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("search.py: every trial is one process; leave torchrun out, --workers starts several")
    refuse_occupied(request.folder)
    began = datetime.now()
    config = sources.draw_demo(request.config) if request.config.demo else request.config
    depth = starting.num_blocks(config)
    space = request.space or default_space(config, depth, request.given)
    with one_at_a_time(request):
        mark_folder(request)
        study = open_study(request)
        agree_with(study, request, space)
    examples = baseline.read_examples(config, kept)
    drawn = not config.split_file and bool((examples.table["split"] == "").any())
    search = Search(study, request, space, kept, began, drawn)
    agree_on_data(search, examples.fingerprint)
    return search


def search_all(request: Request, argv: Sequence[str]) -> optuna.Study:
    """Run the trials and what comes after them. Raises ValueError and SearchFailed."""
    kept = Kept()
    search = prepare(request, kept)
    gc.freeze()  # so that collecting after a trial looks at what that trial has left, not at every library
    if request.parent is not None:
        work(search)
        return search.study
    have = len(search.finished())
    if have < request.trials:
        print(f"search    {', '.join(dimension.describe() for dimension in search.space.values())}")
        print(f"          CLIP: {freezing(search)}")
        finished = f", {have} of them finished" if have else ""
        print(f"          {request.trials} trials{finished}, by validation {search.score}")
        check_plan(search)
        if request.workers > 1:
            kept.kinds.clear()
            run_workers(request, argv)
        work(search)
    have = len(search.finished())
    if have < request.trials:
        print(f"--timeout is over after {have} of {request.trials} trials; the same command goes on")
    config = write_findings(search)
    kept.kinds.clear()
    if request.seeds:
        repeat_best(search, config)
    return search.study


def freezing(search: Search) -> str:
    """How CLIP is frozen in the trials, in words."""
    searched = [name for name in FREEZING if name in search.space]
    return search.request.config.freezing + (f", but {' and '.join(searched)} searched" if searched else "")


def check_plan(search: Search) -> None:
    """Build what a trial trains, without training. Raises ValueError for what cannot work."""
    folder = search.request.folder / TRIALS_DIR / "plan"
    config = replace(search.request.config, output_dir=str(folder), dry_run=True, test=False, report=False)
    path = folder.with_suffix(".log")
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as log, redirect_stdout(log):
        baseline.run(config, kept=search.kept)


def main(argv: Sequence[str] | None = None) -> optuna.Study:
    """Search as the command line says; returns the study. Mistakes are one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    with one_line_errors(SearchFailed, engine.NonFiniteLoss, engine.OutOfMemory, torch.OutOfMemoryError):
        try:
            request = parse_search_args(argv, num_blocks=starting.num_blocks, num_images=sources.count_training_images)
            return search_all(request, argv)
        except STORAGE_ERRORS as error:
            raise SearchFailed(f"the study cannot be used ({reason_of(error)}); the same command goes on") from error
        except KeyboardInterrupt:
            if "--parent" not in argv:  # which says it for its workers
                print("interrupted: what is finished is kept, the same command goes on from there", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    end_as_usual()
    main(sys.argv[1:])
