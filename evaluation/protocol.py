"""Several runs over several splits, as the field reports them: one command, resumable, one table at the end.

The folder of such a protocol holds a run folder for each split, `protocol.json` (what is asked for) and, in the end,
`summary.json` and `summary.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from configs import FREE, NOT_SAVED, OPTIONS, TrainingConfig
from evaluation import metrics, summaries
from sources.scores import MEASURES, tasks_of, title_of
from storage import json_files, locks, tables
from storage.json_files import read_json
from training import run_folder, signals
from training.devices import Runtime

SUMMARY_TABLE = "summary.csv"
TRAINED = "trained_model"
DRAWN = ("data_csv_path", "image_base_dir")  # what --demo fills in by itself
RESULTS = {  # what is read of the results of a run that was finished before
    **dict.fromkeys(("data_fingerprint", "test_digest"), str),
    "images": {"train": int, "test": int, str: int},
    "test": {str: json_files.NUMBER},
    "floors": {str: {str: json_files.NUMBER}},
}


def planned_runs(config: TrainingConfig) -> dict[str, TrainingConfig]:
    """The runs of a protocol: name of its folder -> its options."""
    folds = [config.fold] if config.fold or not config.kfold else list(range(1, config.kfold + 1))
    found = {}
    for seed in range(config.seed, config.seed + config.repeats):
        for fold in folds:
            name = f"seed{seed}" + (f"-fold{fold}" if fold else "")
            found[name] = replace(config, repeats=1, seed=seed, fold=fold)
    return found


def run_all(
    config: TrainingConfig, run: Callable[[TrainingConfig], dict[str, Any]], folder: Path, runtime: Runtime
) -> dict[str, Any]:
    """Run every part that is not finished yet and summarise all.

    Args:
        run: makes one run and returns its results.
        folder: where the run folders go.

    Returns:
        What `summarise` returns; empty under `dry_run`.

    Raises:
        ValueError: the folder holds something else, or runs with other options.
    """
    runs = planned_runs(config)
    folder = runtime.agree(folder)
    if config.split_file and not Path(config.split_file).exists():
        raise ValueError(
            f"--split_file {config.split_file}: no such file; several runs only read one, to share its folds"
        )
    if runtime.is_main:
        refuse_occupied(folder, config)
    finished = {} if config.overwrite else runtime.of_main(lambda: finished_runs(folder, runs))
    if finished:
        runtime.say(f"{len(finished)} of {len(runs)} runs in {folder} are finished")
    if config.dry_run:
        name, part = next(iter(runs.items()))
        run(replace(part, output_dir=str(folder / name), overwrite=True))
        runtime.say(f"this {len(runs)} times: {', '.join(runs)}")
        return {}
    with locks.exclusive_folder(folder) if runtime.is_main else nullcontext():
        if runtime.is_main:
            write_protocol(folder, config, runs)
        return run_planned(config, run, folder, runtime, runs, finished)


def run_planned(
    config: TrainingConfig,
    run: Callable[[TrainingConfig], dict[str, Any]],
    folder: Path,
    runtime: Runtime,
    runs: Mapping[str, TrainingConfig],
    finished: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Run every part that is not among the finished ones, and summarise all: see `run_all`."""
    results = {}
    for number, (name, part) in enumerate(runs.items(), start=1):
        if name not in finished:
            runtime.say(f"-- run {number} of {len(runs)}: {name} (if stopped: --output_dir {folder} goes on from here)")
            how: dict[str, Any] = {"overwrite": True} if config.overwrite else {"resume": "auto"}
            try:
                finished[name] = run(replace(part, output_dir=str(folder / name), **how))
            except signals.Stopped:
                raise signals.Stopped(f"stopped, and what is done is saved: --resume {folder} goes on") from None
        results[name] = finished[name]
    summary = summarise(results)
    if runtime.is_main:
        json_files.write_json(folder / summaries.SUMMARY_FILE, summary)
        tables.write_csv(folder / SUMMARY_TABLE, summary_table(summary))
    runtime.say("\n".join(summary_lines(summary)))
    runtime.say(f"folder: {folder}")
    return summary


def refuse_occupied(folder: Path, config: TrainingConfig) -> None:
    """Raise ValueError if the folder holds something else than these repeated runs, of which there may be more now."""
    run_folder.refuse_foreign(folder, "repeated runs", lambda folder: (folder / summaries.PROTOCOL_FILE).exists())
    if any(folder.glob(f"*/{run_folder.RESULTS_FILE}")) and not config.overwrite:
        saved = read_json(folder / summaries.PROTOCOL_FILE)
        refuse_other_options(folder, "its runs were made", saved, replace(config, repeats=saved.get("repeats", 1)))


def refuse_other_options(folder: Path, what: str, saved: Mapping[str, Any], config: TrainingConfig) -> None:
    """Raise ValueError if saved options are not those of `config`."""
    other = [OPTIONS[key].flag for key, value in result_options(config).items() if saved.get(key) != value]
    if other:
        raise ValueError(
            f"--output_dir {folder}: {what} with other options ({', '.join(other[:5])}); choose another "
            "folder, or pass --overwrite to run all again"
        )


def write_protocol(folder: Path, config: TrainingConfig, runs: Iterable[str]) -> None:
    """Say in the folder what it is for, and forget an older summary and, to overwrite, runs. Raises ValueError."""
    for name in runs if config.overwrite else ():
        if (folder / name).exists():  # a new folder holds nothing before it says what it is for
            with run_folder.RunFolder(folder / name, overwrite=True):  # which empties it
                pass
    for name in (summaries.SUMMARY_FILE, SUMMARY_TABLE):
        (folder / name).unlink(missing_ok=True)
    json_files.write_json(folder / summaries.PROTOCOL_FILE, result_options(config))


def result_options(config: TrainingConfig) -> dict[str, Any]:
    """The options that decide the results, as JSON values."""
    unread = {*NOT_SAVED, *FREE, *(DRAWN if config.demo else ())}
    return {key: value for key, value in config.to_json().items() if key not in unread}


def finished_runs(folder: Path, runs: Mapping[str, TrainingConfig]) -> dict[str, dict[str, Any]]:
    """Results of the runs that are finished: name -> results. Raises ValueError if one has other options."""
    found = {}
    for name, config in runs.items():
        try:
            saved = read_json(folder / name / run_folder.CONFIG_FILE)
            results = read_json(folder / name / run_folder.RESULTS_FILE)
        except FileNotFoundError:
            continue
        refuse_other_options(folder, f"{name} was made", saved, config)
        said = json_files.schema_mismatch(results, RESULTS) or (
            "" if results["images"]["train"] else "no training images"
        )
        if said:
            raise ValueError(f"{folder / name / run_folder.RESULTS_FILE}: {said}; delete it to run {name} again")
        found[name] = results
    return found


def summarise(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics over runs: name -> results as `baseline.run` returns them.

    Returns:
        "runs": the names; "images": of the first run's folds; "tests": a digest of each run's test fold; "share": what
        overlapping training folds add to the variance of a mean (0 if all have the same test fold); "test": measure ->
        statistics of the trained model; "floors": the same for each floor that all runs have; "over": the same for
        trained model minus floor, paired by run.

    Raises:
        ValueError: the runs are not of the same data.
    """
    first = next(iter(runs.values()))
    if len({run["data_fingerprint"] for run in runs.values()}) > 1:
        raise ValueError("the data has changed between the runs: choose another --output_dir, or pass --overwrite")
    tests = [run["test_digest"] for run in runs.values()]
    share = first["images"]["test"] / first["images"]["train"] if len(set(tests)) > 1 else 0.0
    floors = [name for name in first["floors"] if all(name in run["floors"] for run in runs.values())]
    rows = {TRAINED: [run["test"] for run in runs.values()]}
    rows |= {name: [run["floors"][name] for run in runs.values()] for name in floors}
    keys = [key for key in first["test"] if key == "main" or key.startswith(tuple(f"{name}_" for name in MEASURES))]
    values = {
        name: {key: [row[key] for row in of_runs] for key in keys if all(key in row for row in of_runs)}
        for name, of_runs in rows.items()
    }
    return {
        "runs": list(runs),
        "images": dict(first["images"]),
        "tests": tests,
        "share": share,
        "test": {key: statistics(found, share) for key, found in values[TRAINED].items()},
        "floors": {name: {key: statistics(found, share) for key, found in values[name].items()} for name in floors},
        "over": {
            name: {
                key: statistics(np.subtract(values[TRAINED][key], found).tolist(), share)
                for key, found in values[name].items()
            }
            for name in floors
        },
    }


def statistics(values: list[float], share: float) -> dict[str, Any]:
    """mean, sd, median, "interval" (95 %, None for a single run) and the values of one measure over runs."""
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "median": float(np.median(values)),
        "interval": metrics.resampled_interval(values, share),
        "values": [float(value) for value in values],
    }


def summary_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each predictor and measure: predictor, measure, mean, sd, median, low, high."""
    rows = []
    for name, found in {TRAINED: summary["test"], **summary["floors"]}.items():
        for key, values in found.items():
            low, high = values["interval"] or (np.nan, np.nan)
            numbers = {part: values[part] for part in ("mean", "sd", "median")}
            rows.append({"predictor": name, "measure": key, **numbers, "low": low, "high": high})
    return pd.DataFrame(rows)


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as a table of text."""
    rows = {TRAINED: summary["test"], **summary["floors"]}
    width = max(map(len, rows)) + 1
    first = max(12, *(len(title_of(task)) for task in tasks_of(summary["test"]))) + 1
    count = len(summary["runs"])
    what = "all on the same test fold: intervals are those of chance in training"
    if count == 1:
        what = "no intervals: they take several"
    elif summary["share"]:
        what = "intervals allow for shared training images"
    sizes = ", ".join(f"{fold} {size}" for fold, size in summary["images"].items())
    lines = [
        f"{count} run{'s' if count > 1 else ''}, {sizes} images{' in the first' if count > 1 else ''}; {what}",
        f"{'':<{width + first}}{'SROCC':>7}{'sd':>7}{'median':>8}{'95 % interval':>18}{'PLCC':>8}{'sd':>7}{'fitted':>8}"
        f"{'KROCC':>7}{'RMSE':>7}",
    ]
    for task in tasks_of(summary["test"]):
        title = title_of(task)
        for name, found in rows.items():
            if f"srocc_{task}" not in found:
                continue
            srocc, plcc, fitted, krocc, rmse = (found[f"{key}_{task}"] for key in MEASURES)
            lines.append(
                f"{title:<{first}}{name.replace('_', ' '):<{width}}{srocc['mean']:>7.3f}{srocc['sd']:>7.3f}"
                f"{srocc['median']:>8.3f}{interval_text(srocc['interval']):>18}{plcc['mean']:>8.3f}{plcc['sd']:>7.3f}"
                f"{fitted['mean']:>8.3f}{krocc['mean']:>7.3f}{rmse['mean']:>7.3f}"
            )
            title = ""
    for task in tasks_of(summary["test"]):
        for floor, found in summary["over"].items():
            if f"srocc_{task}" in found and floor != "mean":  # which orders nothing
                over = found[f"srocc_{task}"]
                ends = f" ({interval_text(over['interval'], '+')})" if over["interval"] else ""
                lines.append(
                    f"SROCC of {title_of(task)}, trained model minus {floor.replace('_', ' ')}: "
                    f"{over['mean']:+.3f}{ends}"
                )
    return lines


def interval_text(interval: list[float] | None, sign: str = "") -> str:
    """An interval in words; "" if there is none."""
    return f"{interval[0]:{sign}.3f} .. {interval[1]:{sign}.3f}" if interval else ""
