"""Several runs over several seeds and splits, as the field reports them: one command, resumable, one table at the end.

The folder of such a protocol holds a run folder for each split, `protocol.json` (what is asked for) and, in the end,
`summary.json` and `summary.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cli.options import Config, Option
from configs import FREE, NOT_SAVED, OPTIONS, TrainingConfig
from multirun import summaries
from multirun.summary_text import summary_lines
from storage import json_files, locks, tables
from storage.json_files import read_json
from training import run_folder, signals
from training.devices import Runtime

SUMMARY_TABLE = "summary.csv"


@dataclass(frozen=True)
class Program:
    """What repeated runs have to know of the program that makes them."""

    options: Mapping[str, Option]
    folder: str  # the option that names a run's folder
    free: Collection[str]  # options that results do not depend on
    without_drawn: Callable[[dict[str, Any]], dict[str, Any]]  # JSON values but for what --demo fills in by itself
    planned: Callable[[Any], dict[str, Any]]  # options -> those of each run, by the name of its folder
    results: Mapping[Any, Any]  # what is read of the results of a run, as `json_files.schema_mismatch` checks it
    findings: Callable[[Mapping[str, Any]], Mapping[str, Any]]  # results -> what `summaries.summarise` takes of them

    def result_options(self, config: Config) -> dict[str, Any]:
        """The options that decide the results, as JSON values."""
        return {key: value for key, value in self.without_drawn(config.to_json()).items() if key not in self.free}

    def refuse_other_options(self, folder: Path, what: str, saved: Mapping[str, Any], config: Config) -> None:
        """Raise ValueError if saved options are not those of `config`."""
        before, asked = self.without_drawn(dict(saved)), self.result_options(config)
        other = [self.options[key].flag for key, now in asked.items() if before.get(key) != now]
        if other:
            raise ValueError(
                f"--{self.folder} {folder}: {what} with other options ({', '.join(other[:5])}); choose another "
                "folder, or pass --overwrite to run all again"
            )


def planned_runs(config: TrainingConfig) -> dict[str, TrainingConfig]:
    """The runs of baseline.py: name of the folder -> options. Raises ValueError for folds that they cannot share."""
    if config.split_file and not Path(config.split_file).exists():
        raise ValueError(
            f"--split_file {config.split_file}: no such file; several runs only read one, to share its folds"
        )
    folds = [config.fold] if config.fold or not config.kfold else list(range(1, config.kfold + 1))
    found = {}
    for seed in range(config.seed, config.seed + config.repeats):
        for fold in folds:
            name = f"seed{seed}" + (f"-fold{fold}" if fold else "")
            found[name] = replace(config, repeats=1, seed=seed, fold=fold)
    return found


def without_drawn(values: dict[str, Any]) -> dict[str, Any]:
    """Options of baseline.py as JSON values, without the paths to the demo's data."""
    drawn = ("data_csv_path", "image_base_dir") if values.get("demo") else ()
    return {key: value for key, value in values.items() if key not in drawn}


SCORER = Program(  # baseline.py
    options=OPTIONS,
    folder="output_dir",
    free=(*NOT_SAVED, *FREE),
    without_drawn=without_drawn,
    planned=planned_runs,
    results={
        **dict.fromkeys(("data_fingerprint", "test_digest"), str),
        "images": {"train": int, "test": int, str: int},
        "test": {str: json_files.NUMBER},
        "floors": {str: {str: json_files.NUMBER}},
    },
    findings=lambda results: results,
)


def run_all(
    program: Program, config: Any, run: Callable[[Any], dict[str, Any]], folder: Path, runtime: Runtime
) -> dict[str, Any]:
    """Run every part that is not finished yet and summarise all.

    Args:
        config: the options of `program`.
        run: makes one run and returns its results.
        folder: where the run folders go.

    Returns:
        What `summaries.summarise` returns; empty under `dry_run`.

    Raises:
        ValueError: the folder holds something else, or runs with other options.
    """
    runs = program.planned(config)
    folder = runtime.agree(folder)
    if runtime.is_main:
        refuse_occupied(program, folder, config)
    finished = {} if config.overwrite else runtime.of_main(lambda: finished_runs(program, folder, runs))
    if finished:
        runtime.say(f"{len(finished)} of {len(runs)} runs in {folder} are finished")
    if config.dry_run:
        name, part = next(iter(runs.items()))
        run(replace(part, overwrite=True, **{program.folder: str(folder / name)}))
        runtime.say(f"this {len(runs)} times: {', '.join(runs)}")
        return {}
    with locks.exclusive_folder(folder) if runtime.is_main else nullcontext():
        if runtime.is_main:
            write_protocol(program, folder, config, runs)
        results = run_planned(program, config, run, folder, runtime, runs, finished)
        summary = summaries.summarise({name: program.findings(found) for name, found in results.items()})
        if runtime.is_main:
            json_files.write_json(folder / summaries.SUMMARY_FILE, summary)
            tables.write_csv(folder / SUMMARY_TABLE, summaries.summary_table(summary))
    runtime.say("\n".join(summary_lines(summary)))
    runtime.say(f"folder: {folder}")
    return summary


def run_planned(
    program: Program,
    config: Any,
    run: Callable[[Any], dict[str, Any]],
    folder: Path,
    runtime: Runtime,
    runs: Mapping[str, Any],
    finished: Mapping[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The results of all runs, of which those that are not finished are made now or gone on with: see `run_all`."""
    results = {}
    for number, (name, part) in enumerate(runs.items(), start=1):
        if name not in finished:
            place = folder / name
            runtime.say(
                f"-- run {number} of {len(runs)}: {name} (if stopped: --{program.folder} {folder} goes on from here)"
            )
            begun = not config.overwrite and runtime.of_main(partial(run_folder.is_run, place))
            how = {"overwrite": config.overwrite, "resume": str(place) if begun else None, program.folder: str(place)}
            try:
                results[name] = run(replace(part, **how))
            except signals.Stopped:
                raise signals.Stopped(f"stopped, and what is done is saved: --resume {folder} goes on") from None
        else:
            results[name] = finished[name]
    return results


def refuse_occupied(program: Program, folder: Path, config: Any) -> None:
    """Raise ValueError if the folder holds something else than these repeated runs, of which there may be more now."""
    flag = f"--{program.folder}"
    run_folder.refuse_foreign(folder, "repeated runs", lambda folder: (folder / summaries.PROTOCOL_FILE).exists(), flag)
    if any(folder.glob(f"*/{run_folder.RESULTS_FILE}")) and not config.overwrite:
        saved = read_json(folder / summaries.PROTOCOL_FILE)
        now = replace(config, repeats=saved.get("repeats", 1))
        program.refuse_other_options(folder, "its runs were made", saved, now)


def write_protocol(program: Program, folder: Path, config: Any, runs: Iterable[str]) -> None:
    """Say in the folder what it is for, and forget an older summary and, to overwrite, runs. Raises ValueError."""
    for name in runs if config.overwrite else ():
        if (folder / name).exists():  # a new folder holds nothing before it says what it is for
            with run_folder.RunFolder(folder / name, overwrite=True, flag=f"--{program.folder}"):  # which empties it
                pass
    for name in (summaries.SUMMARY_FILE, SUMMARY_TABLE):
        (folder / name).unlink(missing_ok=True)
    json_files.write_json(folder / summaries.PROTOCOL_FILE, program.result_options(config))


def finished_runs(program: Program, folder: Path, runs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Results of the runs that are finished: name -> results. Raises ValueError if one has other options."""
    found = {}
    for name, config in runs.items():
        try:
            saved = read_json(folder / name / run_folder.CONFIG_FILE)
            results = read_json(folder / name / run_folder.RESULTS_FILE)
        except FileNotFoundError:
            continue
        program.refuse_other_options(folder, f"{name} was made", saved, config)
        said = json_files.schema_mismatch(results, program.results)
        if not said and not program.findings(results)["images"]["train"]:
            said = "no training images"
        if said:
            raise ValueError(f"{folder / name / run_folder.RESULTS_FILE}: {said}; delete it to run {name} again")
        found[name] = results
    return found
