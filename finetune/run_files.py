"""The folder of a run: found, named, and filled with what the run starts from and what it keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pandas as pd
from torch import Tensor

from backbones import loading
from configs import TrainingConfig
from finetune import feed, initial_model
from finetune.experiment import Experiment
from finetune.optimisation import compiles, tracker_names
from multirun import protocol
from sources.examples import SKIPPED, Examples
from storage import locks, tables
from storage.atomic import write_new
from storage.json_files import read_json
from training import checkpoints, devices, resuming, run_folder, tracking

SAVE_EVERY_SECONDS = 60.0  # new best weights may stay in memory so long before they are written


def open_folder(experiment: Experiment, folder: Path, *, resume: bool) -> run_folder.RunFolder:
    """The folder of the run, for the process that writes."""
    active, overwrite = experiment.runtime.is_main, experiment.config.overwrite
    return run_folder.RunFolder(folder, active=active, overwrite=overwrite, resume=resume)


def start(config: TrainingConfig) -> tuple[TrainingConfig, devices.Runtime, Path, str]:
    """Join the other processes, if any, and agree on the run folder.

    Returns:
        The options, for an interrupted run with the precision it had on a CPU, where `--amp auto` is measured; runtime;
        folder; and what `--resume` finds in it: "finished", "interrupted", or "" for nothing.

    Raises:
        ValueError: for what cannot work.
    """
    runtime = devices.start_runtime(config.device, config.amp, config.deterministic)
    devices.recycle_memory(config.device)
    if config.dynamic_batch_size and runtime.world > 1:
        raise ValueError("--dynamic_batch_size: works in one process only; leave it out, or do not use torchrun")
    tracking.check_installed(tracker_names(config))
    folder, found, amp = name_run_folder(config), "", config.amp
    if runtime.is_main:
        found = find_run(config, folder)
        if found == "interrupted" and amp == "auto" and runtime.device.type == "cpu":
            amp = precision_on_cpu(folder)
        if not found:
            run_folder.refuse_occupied(folder, overwrite=config.overwrite)
        if folder.is_dir():
            with locks.exclusive_folder(folder):  # or it would be refused only after the data is read
                pass
    folder, found, amp = runtime.agree((folder, found, amp))
    if amp != config.amp:
        config, runtime = replace(config, amp=amp), replace(runtime, precision=amp)
    return config, runtime, folder, found


def precision_on_cpu(folder: Path) -> str:
    """What a run was computed in, if that was on a CPU; "auto" otherwise."""
    resolved = read_json(folder / run_folder.CONFIG_FILE)["provenance"]["resolved"]
    return resolved["amp"] if resolved["device"] == "cpu" else "auto"


def find_run(config: TrainingConfig, folder: Path) -> str:
    """What `--resume` finds, see `start`. Raises ValueError for a run with other options."""
    if not config.resume or not run_folder.is_run(folder):
        return ""
    saved = read_json(folder / run_folder.CONFIG_FILE)
    protocol.SCORER.refuse_other_options(folder, "its run was begun", saved, config)
    return "finished" if (folder / run_folder.RESULTS_FILE).exists() else "interrupted"


def name_run_folder(config: TrainingConfig) -> Path:
    """--output_dir, or runs/<time>-<short name>, not yet taken."""
    return Path(config.output_dir) if config.output_dir else run_folder.free_folder(name_run(config))


def name_run(config: TrainingConfig) -> str:
    """The time and, in short, what is trained."""
    place = config.clip_model.partition(":")[2]
    model = re.sub(r"[^\w.-]+", "-", Path(place).name if place else config.clip_model).lower()
    return f"{datetime.now():%Y%m%d-%H%M%S}-{model}-{config.freezing}"


@contextmanager
def with_folder(config: TrainingConfig) -> Iterator[TrainingConfig]:
    """The options with a folder for the run, made now, lest two that start together take one; goes if left empty."""
    if config.output_dir or config.dry_run:
        yield config
        return
    runtime = devices.start_runtime(config.device, config.amp, config.deterministic)
    with run_folder.new_folder(name_run(config), runtime) as folder:
        yield replace(config, output_dir=str(folder))


def write_inputs(writer: run_folder.RunFolder, experiment: Experiment) -> None:
    """Write what the run starts from: config.json, splits.csv and, where images were left out, skipped.csv.

    From here on images that are lost in mid-run are told and added to skipped.csv.

    Raises:
        ValueError: an interrupted run is gone on with, and that has changed, or has been finished by another process.
    """
    config, examples, runtime = experiment.config, experiment.examples, experiment.runtime
    if writer.active and writer.resume and (writer.path / run_folder.RESULTS_FILE).exists():
        raise ValueError(f"{writer.path}: another process has just finished this run; nothing is left to do")
    if writer.resume:
        before = read_json(writer.path / run_folder.CONFIG_FILE)["provenance"]
        runtime.say(run_folder.changes_since(before, writer.path, examples.fingerprint))
    else:
        write_config(writer, experiment)
    splits = pd.DataFrame({"name": examples.table["name"], "split": examples.folds})
    found = {"digest": [file.digest for file in examples.files], "path": [str(file.path) for file in examples.files]}
    splits = splits.assign(**found)
    skipped = examples.skipped
    if len(skipped):  # they keep their fold for when they can be read again
        splits = pd.concat([splits, skipped[["name", "path"]].assign(split=skipped["fold"], digest="")])
    if not (writer.path / run_folder.SPLITS_FILE).exists():  # as it may be where the run was killed early
        if len(skipped):
            writer.csv(run_folder.SKIPPED_FILE, skipped)
        writer.csv(run_folder.SPLITS_FILE, splits)
    if config.split_file and runtime.is_main:
        is_drawn = bool((examples.table["split"] == "").any())
        keep_splits(Path(config.split_file), splits[["name", "split"]].reset_index(drop=True), is_drawn=is_drawn)
    experiment.feed.dropping.tell = skipped_writer(writer, examples, runtime)


def keep_splits(path: Path, splits: pd.DataFrame, *, is_drawn: bool) -> None:
    """Write --split_file, unless it is there. Raises ValueError if these folds were drawn, and it has others by now."""
    write_new(path, lambda temporary: tables.write(splits, temporary))
    if is_drawn and not tables.read_csv(path, dtype=str, keep_default_na=False).equals(splits.astype(str)):
        raise ValueError(f"--split_file {path}: another run has just written other folds there; start this one again")


def write_config(writer: run_folder.RunFolder, experiment: Experiment) -> None:
    """Write config.json, which makes the folder that of a run."""
    examples, runtime = experiment.examples, experiment.runtime
    config = replace(experiment.config, output_dir=str(writer.path))
    provenance = {
        **run_folder.environment(),
        "machine": runtime.describe(),
        "resolved": {
            "device": runtime.device.type,
            "amp": runtime.precision,
            "num_workers": feed.num_threads(config, runtime),
            "cache_views": config.num_views,
            "compile": compiles(config, examples, runtime),
            "processes": runtime.world,
            **devices.cpu_arithmetic(),
        },
        "data_fingerprint": examples.fingerprint,
        "mos_scales": {task: [scale.low, scale.high] for task, scale in examples.scales.items()},
    }
    writer.json(run_folder.CONFIG_FILE, {**config.to_json(), "provenance": provenance})


def skipped_writer(
    writer: run_folder.RunFolder, examples: Examples, runtime: devices.Runtime
) -> Callable[[Mapping[int, str]], None]:
    """The function that says which rows are left out in mid-run, and adds them to skipped.csv."""

    def tell(reasons: Mapping[int, str]) -> None:
        rows = list(reasons)
        table = examples.table.iloc[rows].assign(fold=examples.folds[rows], reason=list(reasons.values()))
        for path, reason in zip(table["path"], table["reason"], strict=True):
            runtime.say(f"left out  {path} ({reason}): the rest of the run goes on without it")
        file = writer.path / run_folder.SKIPPED_FILE
        before = [tables.read_csv(file, dtype=str, keep_default_na=False)] if file.exists() else []
        writer.csv(run_folder.SKIPPED_FILE, pd.concat([*before, table[SKIPPED]]))

    return tell


def keep_best(
    writer: run_folder.RunFolder, experiment: Experiment, state: resuming.TrainState
) -> checkpoints.DeferredWeights:
    """What takes the weights of each epoch that is the best so far, and writes them now and then."""
    return checkpoints.DeferredWeights(
        lambda weights: save_scorer(writer, experiment, weights),
        every_seconds=SAVE_EVERY_SECONDS,
        constant=state.constant,
    )


def save_scorer(writer: run_folder.RunFolder, experiment: Experiment, state: Mapping[str, Tensor]) -> None:
    """Write a checkpoint that `serving.scorer.Scorer.load` can score with, without anything else."""
    config, backbone, scales = experiment.config, experiment.backbone, experiment.examples.scales
    description = {
        "clip": backbone.config,
        "image_size": backbone.image_size,
        "model": dict(experiment.arguments),
        "scales": {task: {"low": scale.low, "high": scale.high} for task, scale in scales.items()},
        "test_crops": config.num_test_crops,
        "source": initial_model.origin(config),
    }
    writer.weights(checkpoints.BEST_DIR, state, description, lambda path: loading.save_text_files(backbone, path))
