"""What the trials of a search have found: a line for each, tables, the best options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from optuna.trial import TrialState

from storage import json_files, tables
from storage.atomic import atomic_write
from tuning import sensitivity
from tuning.queue import superseded
from tuning.study import FINISHED, Search, SearchFailed


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


def best_config(search: Search) -> Any:
    """The options of the best trial. Raises SearchFailed if none was finished."""
    if not any(trial.state == TrialState.COMPLETE for trial in search.trials()):
        causes = [trial.user_attrs["cause"] for trial in search.trials() if "cause" in trial.user_attrs]
        said = f", the last one: {causes[-1]}" if causes else ""
        raise SearchFailed(f"no trial has come to its end{said}")
    request = search.request
    return request.program.options_of(request.config, search.space, search.study.best_params, request.given)


def write_findings(search: Search) -> Any:
    """Write and print what the trials say; returns the options of the best one."""
    folder, study, program = search.request.folder, search.study, search.request.program
    config = best_config(search)
    tables.write_csv(folder / "trials.csv", trials_table(search))
    saved = {name: value for name, value in config.to_json().items() if name not in program.not_saved}
    json_files.write_json(folder / "best_config.json", saved)
    scored = sensitivity.scored_trials(search.finished())
    table = sensitivity.importance_table(scored, search.space, study.best_params, search.request.config.seed)
    tables.write_csv(folder / "importance.csv", table)
    figure = folder / "importance.png"
    atomic_write(figure, lambda path: sensitivity.draw(path, table, search.finished(), search.score))
    states = [trial.state for trial in search.trials()]
    sizes = f"{states.count(TrialState.COMPLETE)} complete, {states.count(TrialState.PRUNED)} stopped early"
    print(f"\n{len(search.finished())} trials ({sizes}) in {folder}; spread is of validation {search.score}")
    print("\n".join(sensitivity.table_lines(table)))
    for trial in search.trials():
        if "cause" in trial.user_attrs:
            print(f"failed    trial {trial.number}: {values_line(trial.params)}: {trial.user_attrs['cause']}")
    best = study.best_trial
    print(f"\nbest: trial {best.number}, validation {search.score} {best.value:.4f}, {values_line(best.params)}")
    print(program.command_line(config))
    return config


def trials_table(search: Search) -> pd.DataFrame:
    """A row for each trial: trial, state, score, epochs, best_epoch, seconds, cause, and the value of each option."""
    rows = []
    void = superseded(search.trials())
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
