"""Which worker runs which trial: taken, signed, and put back when a process has died."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuning.arguments import Request
from tuning.space import Dimension
from tuning.study import FINISHED, POLL_SECONDS, STORAGE_ERRORS, Search, SearchFailed, sampler_of, study_lock

BEAT_SECONDS = 30.0  # how often a running trial says that it is alive
DEAD_AFTER_SECONDS = 600.0  # without a word, on another machine
MANY_ALIKE = 3  # first trials that all fail the same way end the search


def superseded(trials: Sequence[FrozenTrial]) -> set[int]:
    """Numbers of the trials that another one stands for now, or that were begun by one too many."""
    again = {trial.user_attrs["instead_of"] for trial in trials if "instead_of" in trial.user_attrs}
    return again | {trial.number for trial in trials if "surplus" in trial.user_attrs}


def next_trial(search: Search) -> optuna.Trial | None:
    """The next trial to run, None when enough are finished; waits while others' trials may be all that is missing."""
    wanted = search.request.trials
    while True:
        with study_lock(search.request):
            for other in search.trials():
                if other.state == TrialState.RUNNING and is_dead(other):
                    requeue(search.study, other, killed=True)
            check_failures(search)
            states = [trial.state for trial in search.trials()]
            finished = sum(state in FINISHED for state in states)
            if finished >= wanted or search.is_over or is_orphan(search.request):
                return None
            if finished + states.count(TrialState.RUNNING) < wanted and (trial := begin_trial(search)):
                return trial
        time.sleep(POLL_SECONDS)


def begin_trial(search: Search) -> optuna.Trial | None:
    """Begin a trial, to be drawn by a sampler of its own: the same in every worker, and after a restart.

    None if those with other folders, whom nothing keeps waiting, were quicker.
    """
    trial = search.study.ask()
    with suppress(optuna.exceptions.UpdateFinishedTrialError):
        sign_trial(trial)
        # Several may have asked at once. All see the numbers in the same order, so all agree on who was first.
        before = [other for other in search.trials() if other.number < trial.number]
        if sum(other.state != TrialState.FAIL for other in before) < search.request.trials:
            place = len({other.number for other in before} - superseded(search.trials()))
            search.study.sampler = sampler_of(search.request.config.seed, place)
            return trial
        trial.set_user_attr("surplus", True)
        search.study.tell(trial, state=TrialState.FAIL)
    return None


def this_process() -> dict[str, Any]:
    """What tells this process from all others, of other machines, containers and times too."""
    namespace = Path("/proc/self/ns/pid")  # containers may share a name, and have a process 1 each
    place = [socket.gethostname(), os.readlink(namespace) if namespace.is_symlink() else ""]
    return {"place": place, "pid": os.getpid(), "start": state_and_start(os.getpid())[1]}


def sign_trial(trial: optuna.Trial) -> None:
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


def requeue(study: optuna.Study, trial: FrozenTrial, *, killed: bool) -> None:
    """End a trial that was cut short, and put its values in the queue again; those that kill twice stay out."""
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # another worker was quicker
        return
    if not (killed and trial.user_attrs.get("killed")):
        study.enqueue_trial(trial.params, user_attrs={"instead_of": trial.number, "killed": killed})


def requeue_own(search: Search) -> None:
    """Put back what this process was running, or had just begun and not signed yet."""
    me = this_process()
    with study_lock(search.request):
        for trial in search.trials():
            signed = trial.user_attrs.get("signed")
            is_new = trial.datetime_start is not None and trial.datetime_start >= search.began
            is_mine = is_new if signed is None else {**signed, **me} == signed
            if trial.state == TrialState.RUNNING and is_mine:
                requeue(search.study, trial, killed=False)


def is_orphan(request: Request) -> bool:
    """Whether this is a worker whose parent is gone."""
    return request.parent is not None and os.getppid() != request.parent


def check_failures(search: Search) -> None:
    """Raise SearchFailed if the first trials of this session all failed the same way, or more than were asked for."""
    trials = search.trials()
    here = [trial for trial in trials if trial.datetime_start and trial.datetime_start >= search.began]
    done = [trial for trial in here if trial.state.is_finished() and trial.number not in superseded(trials)]
    causes = [trial.user_attrs.get("cause") for trial in done]
    first = [re.sub(r"[-+.\de]*\d", "#", cause) if cause else None for cause in causes[:MANY_ALIKE]]
    if len(first) == MANY_ALIKE and None not in first and len(set(first)) == 1:
        raise SearchFailed(f"the first {MANY_ALIKE} trials all failed: {causes[0]}")
    failed = [cause for trial, cause in zip(done, causes, strict=True) if trial.state == TrialState.FAIL]
    if len(failed) > max(MANY_ALIKE, search.request.trials):
        raise SearchFailed(f"{len(failed)} trials have failed, the last one: {failed[-1]}")


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
                sign_trial(trial)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
