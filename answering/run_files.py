"""The folder of a run: found, filled with what the run starts from, and what it keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from answering.configs import FREE, NOT_SAVED, OPTIONS, VQAConfig
from answering.experiment import Experiment
from multirun import protocol
from storage.json_files import NUMBER, read_json
from training import checkpoints, devices, loop, resuming, run_folder, signals, tracking

SAVE_EVERY_SECONDS = 60.0  # new best weights may stay in memory so long before they are written
MOST_CHECKED = 100  # images of a fold whose regions are compared when a run is gone on with
FLAG = "--output"
DESCRIPTION: dict[str, Any] = {  # what a checkpoint says of itself, as `json_files.schema_mismatch` checks it
    "program": str,
    "model": {"branches": dict, "num_answers": int, "loss": str},
    "words": [str, ...],
    "entities": list,
    "answers": [str, ...],
    "options": {
        **dict.fromkeys(("dataset", "loss", "sg_source", "clip_model", "clip_pretrained", "branches"), str),
        **dict.fromkeys(("question_len", "num_stat_word", "topk", "max_boxes"), int),
        "shuffle_images": bool,
        "features": (str, type(None)),
    },
}


def planned_runs(config: VQAConfig) -> dict[str, VQAConfig]:
    """The runs of --repeats: name of the folder -> options."""
    seeds = range(config.seed, config.seed + config.repeats)
    return {f"seed{seed}": replace(config, repeats=1, seed=seed) for seed in seeds}


def without_drawn(values: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON values, without the paths to the demo's data."""
    root = values.get("data_root")
    if not values["demo"] or root is None:
        return values
    drawn = [name for name in ("features", "scene_graphs") if str(values[name]).startswith(root)]
    return {**values, **dict.fromkeys(("data_root", *drawn))}


def findings(results: Mapping[str, Any]) -> dict[str, Any]:
    """What repeated runs are summarised by: results.json -> what `summaries.summarise` takes."""
    alone = {f"{name} branch alone": one for name, one in results["branches"].items()}
    floors = {name: {"accuracy": value} for name, value in results["floors"].items()}
    return {
        **{name: results[name] for name in ("program", "data_fingerprint", "test_digest")},
        "images": {fold: size["images"] for fold, size in results["data"].items()},
        "test": results["measures"],
        "floors": {**{name: {"accuracy": one["accuracy"]} for name, one in alone.items()}, **floors},
        "kinds": {
            key: {kind: one["accuracy"] for kind, one in kinds.items()} for key, kinds in results["by_kind"].items()
        },
    }


PROGRAM = protocol.Program(
    options=OPTIONS,
    folder="output",
    free=(*NOT_SAVED, *FREE),
    without_drawn=without_drawn,
    planned=planned_runs,
    results={
        **dict.fromkeys(("program", "data_fingerprint", "test_digest"), str),
        "data": {fold: {"images": int} for fold in ("train", "val", "test")},
        "measures": {"accuracy": NUMBER, str: NUMBER},
        "floors": {str: NUMBER},
        "branches": {str: {"accuracy": NUMBER}},
        "by_kind": {str: {str: {"accuracy": NUMBER}}},
    },
    findings=findings,
)


@contextmanager
def with_folder(config: VQAConfig) -> Iterator[VQAConfig]:
    """The options with a folder for the run."""
    if config.output or config.dry_run:
        yield config
        return
    runtime = devices.start_runtime(config.device, config.amp)
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.dataset.lower()}-{'-'.join(config.branch_names)}"
    with run_folder.new_folder(name, runtime) as folder:
        yield replace(config, output=str(folder))


def start(config: VQAConfig) -> tuple[devices.Runtime, Path, str]:
    """Join the other processes, if any, and agree on the run folder.

    Returns:
        runtime, folder, and what `--resume` finds in it: "finished", "interrupted", or "" for nothing.

    Raises:
        ValueError: for what cannot work.
    """
    runtime = devices.start_runtime(config.device, config.amp)
    devices.recycle_memory(config.device)
    if config.dynamic_batch_size and runtime.world > 1:
        raise ValueError("--dynamic_batch_size: works in one process only; leave it out, or do not use torchrun")
    tracking.check_installed(tracker_names(config))
    folder, found = name_run_folder(config), ""
    if config.resume and runtime.is_main:
        PROGRAM.refuse_other_options(folder, "its run was begun", read_json(folder / run_folder.CONFIG_FILE), config)
        found = "finished" if (folder / run_folder.RESULTS_FILE).exists() else "interrupted"
    elif runtime.is_main and config.output:
        run_folder.refuse_occupied(folder, overwrite=config.overwrite, flag=FLAG)
    return runtime, *runtime.agree((folder, found))


def name_run_folder(config: VQAConfig) -> Path:
    """--output; without it nothing is written (see `with_folder`)."""
    return Path(config.output or "runs/dry-run")


def tracker_names(config: VQAConfig) -> list[str]:
    """The trackers that are asked for."""
    return tracking.names_of(config.tensorboard, config.tracker)


def open_folder(experiment: Experiment, folder: Path, *, resume: bool) -> run_folder.RunFolder:
    """The folder of the run, for the process that writes."""
    return run_folder.RunFolder(
        folder,
        active=experiment.runtime.is_main,
        overwrite=experiment.config.overwrite,
        resume=resume,
        flag=FLAG,
    )


def fingerprint(experiment: Experiment) -> str:
    """Of all questions, answers and folds, of the regions of some of their images, and of those seen as a whole."""
    digest, known, coarse = hashlib.sha256(), experiment.regions, experiment.coarse
    for name, fold in experiment.folds.items():
        asked = fold.questions
        digest.update(json.dumps([name, asked.ids, asked.images, asked.texts, asked.answers]).encode())
        names = sorted(set(asked.images))
        if coarse is not None:
            digest.update(json.dumps([coarse.images.digests[name] for name in names]).encode())
        if known is not None:
            for name in names[:: 1 + len(names) // MOST_CHECKED]:
                found = known.read(name)
                digest.update(found.features.tobytes() + found.boxes.tobytes())
    return digest.hexdigest()


def write_inputs(writer: run_folder.RunFolder, experiment: Experiment) -> None:
    """Write config.json, which makes the folder that of a run; of one that is gone on with, say what has changed.

    Raises:
        ValueError: that is the data.
    """
    runtime, data = experiment.runtime, fingerprint(experiment)
    if writer.resume:
        before = read_json(writer.path / run_folder.CONFIG_FILE).get("provenance") or {}
        runtime.say(run_folder.changes_since(before, writer.path, data))
        return
    provenance = {
        **run_folder.environment(),
        "machine": runtime.describe(),
        "resolved": {"device": runtime.device.type, "amp": runtime.precision, "processes": runtime.world},
        "data_fingerprint": data,
    }
    config = replace(experiment.config, output=str(writer.path))
    writer.json(run_folder.CONFIG_FILE, {**config.to_json(), "provenance": provenance})


def keep_best(writer: run_folder.RunFolder, experiment: Experiment) -> checkpoints.DeferredWeights:
    """What takes the weights of each epoch that is the best so far, and writes them now and then."""
    lexicon, config = experiment.lexicon, experiment.config
    description = {
        "program": "vqa",
        "model": dict(experiment.arguments),
        "words": list(lexicon.words.words),
        "entities": sorted(lexicon.entities),
        "answers": list(lexicon.answers.answers),
        "options": {name: getattr(config, name) for name in DESCRIPTION["options"]},
    }

    def add_vocabulary(folder: Path) -> None:
        if experiment.coarse is not None and experiment.coarse.tokenizer is not None:
            experiment.coarse.tokenizer.save(folder)

    def write(state: Mapping[str, Tensor]) -> None:
        writer.weights(checkpoints.BEST_DIR, state, description, add_vocabulary)

    return checkpoints.DeferredWeights(write, every_seconds=SAVE_EVERY_SECONDS, constant=experiment.constant)


def build_saver(
    experiment: Experiment,
    state: resuming.TrainState,
    writer: run_folder.RunFolder,
    best_weights: checkpoints.DeferredWeights,
    stop_signals: signals.Signals,
    started: float,
) -> resuming.Saver:
    """What saves the run's state; where an interrupted run is gone on with, that has been loaded."""
    config, runtime, progress = experiment.config, experiment.runtime, resuming.Progress()

    def tell(error: Exception) -> None:
        if isinstance(error, loop.NonFiniteLoss):
            asked = [experiment.folds["train"].questions.ids[row] for row in error.samples]
            found = resuming.failure(error, progress, {"questions": asked}, "python main.py", writer.path)
            writer.json(run_folder.FAILURE_FILE, found)
        runtime.say(f"saved     in {writer.path} as it was before; --resume {writer.path} repeats from there")

    saver = resuming.Saver(
        checkpoints.StateFolder(writer.path, keep=config.keep_states),
        progress,
        state,
        runtime,
        steps_per_epoch=experiment.steps_per_epoch,
        every_seconds=60 * config.save_every_minutes,
        stop_signals=stop_signals,
        before=best_weights.flush,
        dropped=set(),
        tell=tell,
        started=started,
    )
    if writer.resume:
        saver.go_on()
    return saver


def open_trackers(
    experiment: Experiment, writer: run_folder.RunFolder, progress: resuming.Progress
) -> tracking.Trackers:
    """What the scalars of every epoch are sent to, by the process that writes, those of finished epochs at once."""
    config = experiment.config
    names = tracker_names(config) if writer.active else []
    return tracking.Trackers(names, writer.path, config.to_json(), experiment.runtime.say, progress.history)
