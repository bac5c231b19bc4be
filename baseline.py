"""Fine-tune CLIP with two residual heads on human scores of AI-generated images.

    python baseline.py --demo                            # works without data or network
    python baseline.py --partial_freeze --freeze_layers 18
    python baseline.py --help

`run(config)` is the whole story: data, model, optimiser, epochs, the test fold once, results.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # --help, mistakes in the flags and Ctrl-C answer here, before torch is imported, which takes seconds.
    from configs import one_line_errors, parse_args
    from signals import AGAIN, end_quietly

    end_quietly(interrupted=AGAIN)  # as later on: what is run again goes on
    with one_line_errors():
        parse_args()

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

import advice
import backbones
import checkpoint
import data
import diagnosis
import engine
import feeding
import inputs
import losses
import models
import protocol
import report
import reporting
import resuming
import signals
import sources
import starting
import tables
import tracking
from configs import TrainingConfig, one_line_errors, parse_args
from kept import NOTHING, READ_BY, Kept
from reading import read_json
from scores import TASKS, title_of
from writing import remove_if_empty, write_new

COMPILE_FROM = 200_000  # images through the model in a run, from which compilation should be worth its start-up
SAVE_EVERY_SECONDS = 60.0  # new best weights may stay in memory so long before they are written

AfterEpoch = Callable[[Mapping[str, float]], None]
Scores = dict[str, np.ndarray]


def run(
    config: TrainingConfig,
    *,
    after_epoch: AfterEpoch = lambda row: None,
    kept: Kept = NOTHING,
    listening: signals.Signals = signals.NONE,
) -> dict[str, Any]:
    """Train as configured and return what `results.json` holds (empty under `dry_run`).

    Args:
        after_epoch: is given each row of `metrics.csv`, in every process; what it raises stops the run.
        kept: holds what other runs of this process have read and computed, and takes what this one adds.
        listening: to the signals that stop the run.

    Raises:
        ValueError: data or options that cannot work; nothing has been written then, unless a tracker cannot be opened.
        engine.NonFiniteLoss: training broke down; the state from before that is saved.
        signals.Stopped: a signal has stopped the run; its state is saved.
    """
    started = time.perf_counter()
    runtime, folder, found = start(config)
    if found == "finished":
        return finished_results(config, folder, runtime)
    engine.seed_everything(config.seed)

    # Data, model, and how one becomes batches for the other.
    with runtime.main_first():
        config = sources.draw_demo(config) if config.demo else config
    examples = read_examples(config, kept)
    backbone, model, arguments = starting.start_model(config, examples, kept)
    model.to(runtime.device)
    feed, num_truncated = feeding.build_feed(config, examples, backbone, runtime, kept)
    orders = feeding.build_orders(config, examples)
    num_steps = count_steps(config, examples)
    runtime.say(plan(config, examples, backbone, model, feed, runtime, num_steps, num_truncated))
    facts = gather_facts(config, examples, model, runtime, num_steps)
    remarks = heed_advice(config, facts, runtime)
    if config.dry_run:
        return {}

    predict = build_predict(feed, orders, runtime)
    with open_folder(config, folder, runtime, resume=found == "interrupted") as writer:
        write_inputs(writer, config, examples, runtime)
        feed.dropping.tell = feeding.skipped_writer(writer, examples, runtime)

        # What CLIP knows before training: the point to start from, and to be compared with at the end.
        ready = time.perf_counter()
        fill_cache, statistics = feeding.open_caches(config, model, feed, examples, backbone, runtime, kept)
        fill_cache()
        known, base = starting.learn_base(config, model, predict, orders, examples, kept)
        if config.calibration and not config.init_from:
            starting.set_base(model, base)

        trained = build_training(config, model, examples, feed, runtime, num_steps)
        tune_speed(config, model, examples, runtime)
        compute_losses = build_losses(config, examples, model, runtime)
        newest_best = checkpoint.LatestState(
            lambda state: save_scorer(writer, state, backbone, arguments, config, examples),
            every_seconds=SAVE_EVERY_SECONDS,
            constant=trained.constant,
        )
        saver = build_saver(config, examples, feed, writer, trained, runtime, newest_best, listening, started)
        course, stage, trainee = saver.course, config.stages[0], None

        with open_trackers(config, writer, runtime, course) as trackers, newest_best, saver.guarding():
            while course.epoch <= config.epochs and not stops_early(config, course.selection, runtime):
                if (due := stage_of(config, course.epoch)) != stage:
                    enter_stage(config, model, examples, due, runtime, saver, fill_cache)
                    stage, trainee = due, None
                trainee = trainee or runtime.distribute(model, may_be_unused=leaves_unused(examples, model))
                with Progress(course, len(examples.rows("train")), runtime, saver.check) as progress:
                    course.lr = course.lr if course.record.step else config.lr * trained.lr_factor
                    losses_of_epoch = engine.train_epoch(
                        trainee,
                        feed.batches(orders["train"].of_pass(course.epoch - 1), num_done=num_done(config, course)),
                        compute_losses,
                        optimizer=trained.optimizer,
                        schedule=trained.schedule,
                        runtime=runtime,
                        average=trained.average,
                        micro=trained.micro,
                        accumulation=config.gradient_accumulation_steps,
                        max_grad_norm=config.max_grad_norm,
                        record=course.record,
                        samples_of=lambda batch: batch.rows,
                        after_step=progress.after_step,
                    )
                scores = predict(trained.average.weights, "val", before_batch=saver.check)
                measured = runtime.agree(evaluate(scores, "val", examples, config))  # or processes might stop apart
                validated = {f"val_{name}": value for name, value in measured.items()}
                row = {"epoch": course.epoch, **losses_of_epoch, **validated, "lr": course.lr, **progress.timing()}
                writer.csv("metrics.csv", pd.DataFrame([*course.history, row]))  # an epoch without its row is not over
                if course.would_be_best(score := validated[f"val_{config.select_by}"]) and runtime.is_main:
                    newest_best.keep(models.merged_state(trained.average.weights))
                course.close_epoch(row, score, scores)
                trackers.log(row, len(course.history))
                runtime.say(reporting.epoch_line(row, config.epochs))
                newest_best.flush_if_due()
                after_epoch(row)
                saver.check()

            if (due := stage_of(config, course.epoch - 1)) != stage:  # gone on with where only the test was left
                enter_stage(config, model, examples, due, runtime, saver, fill_cache)

            # The test fold's scores are looked at here, once, with the weights that validation has chosen.
            newest_best.flush()
            saver.is_over = True
            best = load_best(trained.average.weights, folder, runtime)
            others = [fold for fold in orders if fold not in ("train", "val")]
            predictions = {fold: predict(best, fold, before_batch=saver.check) for fold in others}
            predictions["val"] = course.best_scores
            outcome = measure(config, examples, base, known, predictions, lambda: runtime.of_main(statistics.of_all))
            results = {**conclude(config, course, outcome, facts, remarks), **times(course, started, ready)}
            trackers.log({f"test_{name}": value for name, value in results["test"].items()}, len(course.history))
            writer.csv("predictions.csv", reporting.prediction_table(predictions, examples))
            writer.json(checkpoint.RESULTS_FILE, results)
        write_report(config, folder, runtime)
        writer.forget_states()
    runtime.say("\n".join(closing_lines(results, examples, folder)))
    return results


def build_predict(
    feed: inputs.Feed[inputs.PixelSource], orders: Mapping[str, inputs.BatchOrder], runtime: engine.Runtime
) -> Callable[..., Scores]:
    """The function (model, fold, what to compute, hooks of `engine.predict`) -> (n,) arrays of all rows of the fold."""

    def predict(scorer: models.ScoreModel, fold: str, compute: Any = models.score_batch, **hooks: Any) -> Scores:
        found = engine.predict(scorer, feed.batches(orders[fold]), compute, runtime=runtime, **hooks)
        return {name: feed.dropping.whole(orders[fold].rows, values) for name, values in found.items()}

    return predict


def conclude(
    config: TrainingConfig,
    course: resuming.Course,
    outcome: Mapping[str, Any],
    facts: advice.Facts,
    remarks: Sequence[advice.Remark],
) -> dict[str, Any]:
    """What `results.json` holds but for the times: what was measured, and what is to be said of it."""
    known = outcome["base"]["val"].get(config.select_by)
    findings = diagnosis.diagnose(course.history, config, facts, known=known)
    return {
        "best_epoch": course.best_epoch,
        "epochs": len(course.history),
        **outcome,
        "advice": [asdict(remark) for remark in remarks],
        "diagnosis": [asdict(finding) for finding in findings],
        "resumed": course.resumed,
    }


def times(course: resuming.Course, started: float, ready: float) -> dict[str, float]:
    """Seconds that the run has taken, and those of this process without loading data and model."""
    now = time.perf_counter()
    return {"seconds": round(course.seconds + now - started, 3), "seconds_from_first_batch": round(now - ready, 3)}


def closing_lines(results: Mapping[str, Any], examples: data.Examples, folder: Path) -> list[str]:
    """What is said at the end of a run."""
    findings = [diagnosis.Finding(**finding) for finding in results["diagnosis"]]
    notes = [f"note      {note}" for note in results["notes"]]
    return [reporting.results_table(results, examples), *notes, *diagnosis.lines(findings), f"run folder: {folder}"]


def finished_results(config: TrainingConfig, folder: Path, runtime: engine.Runtime) -> dict[str, Any]:
    """What a run found that `--resume` need not go on with; makes up for a report that was cut short."""
    runtime.say(f"{folder} is finished; nothing is left to do")
    if runtime.is_main:
        with checkpoint.RunFolder(folder, resume=True) as writer:
            if not (folder / report.REPORT_FILE).exists():
                write_report(config, folder, runtime)
            writer.forget_states()
    return read_json(folder / checkpoint.RESULTS_FILE)


def open_folder(config: TrainingConfig, folder: Path, runtime: engine.Runtime, *, resume: bool) -> checkpoint.RunFolder:
    """The folder of the run, for the process that writes."""
    return checkpoint.RunFolder(folder, active=runtime.is_main, overwrite=config.overwrite, resume=resume)


def build_training(
    config: TrainingConfig,
    model: models.ScoreModel,
    examples: data.Examples,
    feed: inputs.Feed[inputs.PixelSource],
    runtime: engine.Runtime,
    num_steps: int,
) -> resuming.Trained:
    """All that training changes."""
    optimizer, schedule = build_optimizer(config, model, examples, num_steps)
    return resuming.Trained(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        average=engine.WeightAverage(model, config.ema_decay),
        micro=engine.MicroBatches(feed.split, enabled=config.dynamic_batch_size, max_usage=config.max_memory_usage),
        scaler=runtime.scaler,
        constant=never_trained(model, optimizer),
    )


def build_saver(
    config: TrainingConfig,
    examples: data.Examples,
    feed: inputs.Feed[inputs.PixelSource],
    writer: checkpoint.RunFolder,
    trained: resuming.Trained,
    runtime: engine.Runtime,
    newest_best: checkpoint.LatestState,
    listening: signals.Signals,
    started: float,
) -> resuming.Saver:
    """What saves the run's state; where an interrupted run is gone on with, that has been loaded."""
    course = resuming.Course()
    steps_per_epoch = count_steps(replace(config, epochs=1), examples)

    def tell(error: Exception) -> None:
        if isinstance(error, engine.NonFiniteLoss):
            names = examples.table["name"].iloc[error.samples].tolist()
            writer.json(checkpoint.FAILURE_FILE, failure(error, course, names, writer.path))
        runtime.say(f"saved     in {writer.path} as it was before; --resume {writer.path} repeats from there")

    saver = resuming.Saver(
        checkpoint.StateFolder(writer.path, keep=config.keep_states),
        course,
        trained,
        runtime,
        step=lambda: (course.epoch - 1) * steps_per_epoch + course.record.step,
        every_seconds=60 * config.save_every_minutes,
        listening=listening,
        before=newest_best.flush,
        dropped=feed.dropped,
        tell=tell,
        started=started,
    )
    if writer.resume:
        has_state = saver.load()
        where = f"epoch {course.epoch} after {course.record.step} of {steps_per_epoch} steps"
        runtime.say(f"resume    {where if has_state else 'no state was saved: from the start'}")
    return saver


def failure(error: engine.NonFiniteLoss, course: resuming.Course, names: list[str], folder: Path) -> dict[str, Any]:
    """What failure.json holds: what broke training, and how to see it again."""
    return {
        "error": str(error),
        "metric": error.metric,
        "value": str(error.value),
        "epoch": course.epoch,
        "step": error.step,
        "images": names,
        "repeat": shlex.join(["python", "baseline.py", "--resume", str(folder)]),
    }


def num_done(config: TrainingConfig, course: resuming.Course) -> int:
    """Batches of the present epoch that are trained on already, see `inputs.Feed.batches`."""
    return course.record.step * config.gradient_accumulation_steps


def write_report(config: TrainingConfig, folder: Path, runtime: engine.Runtime) -> None:
    """Write the page of a finished run, or of repeated ones, unless it is not wanted."""
    if config.report and runtime.is_main:
        report.write_report(folder)


def stops_early(config: TrainingConfig, selection: Sequence[float], runtime: engine.Runtime) -> bool:
    """Whether the validation scores have stopped rising for as long as is allowed."""
    patience = config.early_stopping_patience
    is_over = engine.should_stop(selection, patience=patience, min_delta=config.early_stopping_min_delta)
    if is_over:
        runtime.say(f"no gain in {patience} epochs: stopped early")
    return is_over


def load_best(trained: models.ScoreModel, folder: Path, runtime: engine.Runtime) -> models.ScoreModel:
    """The trained model with the weights of the epoch that validation has chosen."""
    best = models.merge_lora(trained)
    if runtime.is_main:
        best.load_state_dict(checkpoint.load_weights(folder / checkpoint.BEST_DIR)[1])
    runtime.copy_weights(best)
    return best


def measure(
    config: TrainingConfig,
    examples: data.Examples,
    base: reporting.Base,
    known: Mapping[str, reporting.Scores],
    predictions: Mapping[str, reporting.Scores],
    statistics: Callable[[], np.ndarray],
) -> dict[str, Any]:
    """What the scores of the folds are worth, as in `results.json`; nothing of the test fold under --no_test."""
    folds = feeding.folds_read(config)
    found: dict[str, Any] = {fold: evaluate(predictions[fold], fold, examples, config) for fold in folds}
    found["base"] = {fold: reporting.agreements(base.scores(known[fold]), fold, examples) for fold in folds}
    found |= reporting.of_data(examples)
    found["notes"] = reporting.of_constants({fold: predictions[fold] for fold in folds}, examples)
    if not config.test:
        return {**found, **{key: {} for key in ("test", "floors", "certainty", "generators", "sets")}}
    floors = reporting.floors(examples, base, known, statistics())
    return {**found, "floors": floors, **reporting.findings(predictions["test"], examples)}


def start(config: TrainingConfig) -> tuple[engine.Runtime, Path, str]:
    """Join the other processes, if any, and agree on the run folder.

    Returns:
        runtime, folder, and what `--resume` finds in it: "finished", "interrupted", or "" for nothing.

    Raises:
        ValueError: for what cannot work.
    """
    runtime = engine.start_runtime(config.device, config.amp, config.deterministic)
    if config.dynamic_batch_size and runtime.world > 1:
        raise ValueError("--dynamic_batch_size: works in one process only; leave it out, or do not use torchrun")
    tracking.check_installed(tracker_names(config))
    folder, found = run_folder(config), ""
    if runtime.is_main:
        found = find_run(config, folder)
        if not found:
            checkpoint.refuse_occupied(folder, overwrite=config.overwrite)
        if folder.is_dir():
            with checkpoint.alone_in(folder):  # or it would be refused only after the data is read
                pass
    return runtime, *runtime.agree((folder, found))


def find_run(config: TrainingConfig, folder: Path) -> str:
    """What `--resume` finds, see `start`. Raises ValueError for a run with other options."""
    if not config.resume or not checkpoint.is_run(folder):
        return ""
    saved = read_json(folder / checkpoint.CONFIG_FILE)
    protocol.refuse_other_options(folder, "its run was begun", saved, config)
    return "finished" if (folder / checkpoint.RESULTS_FILE).exists() else "interrupted"


def tracker_names(config: TrainingConfig) -> list[str]:
    """The trackers that are asked for."""
    return ["tensorboard"] * config.tensorboard + ([config.tracker] if config.tracker else [])


def open_trackers(
    config: TrainingConfig, writer: checkpoint.RunFolder, runtime: engine.Runtime, course: resuming.Course
) -> tracking.Trackers:
    """What the scalars of every epoch are sent to, by the process that writes, those of finished epochs at once."""
    names = tracker_names(config) if writer.active else []
    trackers = tracking.Trackers(names, writer.path, config.to_json(), runtime.say)
    for row in course.history:
        trackers.log(row, int(row["epoch"]))
    return trackers


def gather_facts(
    config: TrainingConfig, examples: data.Examples, model: models.ScoreModel, runtime: engine.Runtime, num_steps: int
) -> advice.Facts:
    """What advice and diagnosis go by."""
    on_gpu = runtime.device.type != "cpu"
    return advice.Facts(
        num_train=len(examples.rows("train")),
        num_val=len(examples.rows("val")),
        num_blocks=len(models.staged_blocks(model.clip.visual)) or None,
        num_parameters=sum(parameter.numel() for parameter in model.clip.parameters()),
        tasks=tuple(examples.scales),
        num_steps=num_steps,
        free_memory=runtime.free_memory() * runtime.world if on_gpu else None,
        bytes_per_image=models.activation_bytes(model.clip.visual, runtime.compute_dtype) * config.num_views_encoded,
        draws_val="val" not in set(examples.table["split"]),
    )


def heed_advice(config: TrainingConfig, facts: advice.Facts, runtime: engine.Runtime) -> list[advice.Remark]:
    """Say what is unusual about the settings. Raises ValueError for any of it if --advice is strict."""
    remarks = [] if config.advice == "off" else advice.advise(config, facts)
    for remark in remarks:
        runtime.say(f"advice    {remark}")
    if remarks and config.advice == "strict":
        raise ValueError(f"--advice strict: {len(remarks)} remark(s), see above; change what they name")
    return remarks


def how_split(config: TrainingConfig, examples: data.Examples) -> str:
    """Where the folds come from, in words."""
    if config.split_file:
        is_drawn = (examples.table["split"] == "").any()
        return f"by {config.split_by}, kept in {config.split_file}" if is_drawn else f"as in {config.split_file}"
    ways = []
    for title in examples.sets:
        table = examples.only(title).table
        drawn = "by " + sources.suitable_unit(title, table, config.split_by)
        ways.append("as the data set says" if (table["split"] != "").any() else drawn)
    part = f", part {config.fold} of {config.kfold}" if config.kfold else ""
    return ", ".join(ways if len(set(ways)) > 1 else ways[:1]) + part


def origin(config: TrainingConfig) -> str:
    """Where the weights come from, in words."""
    own = config.clip_model.partition(":")[1] and config.clip_pretrained != "none"
    return config.init_from or f"{config.clip_model} ({'its own weights' if own else config.clip_pretrained})"


def build_optimizer(
    config: TrainingConfig, model: models.ScoreModel, examples: data.Examples, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over all that is trained at some stage, with no state of what is frozen as yet, and its schedule."""
    scales = models.lr_scales(model, config.layer_decay)

    def lr_of(name: str) -> float:
        return config.lr * scales[name] if name in scales else config.head_lr or config.lr

    starting.freeze(config, model, examples, config.stages[-1][0])
    optimizer = engine.build_optimizer(model, lr_of, weight_decay=config.weight_decay)
    starting.freeze(config, model, examples, config.stages[0][0])
    ratio = config.warmup_ratio
    return optimizer, engine.build_schedule(optimizer, kind=config.scheduler, num_steps=num_steps, warmup_ratio=ratio)


def stage_of(config: TrainingConfig, epoch: int) -> tuple[int | None, int]:
    """The entry of `config.stages` that holds in an epoch, counted from 1."""
    return [stage for stage in config.stages if stage[1] < epoch][-1]


def enter_stage(
    config: TrainingConfig,
    model: models.ScoreModel,
    examples: data.Examples,
    stage: tuple[int | None, int],
    runtime: engine.Runtime,
    saver: resuming.Saver,
    fill_cache: Callable[[], None],
) -> None:
    """Thaw the layers that the plan gives free, and keep what the others make of the data."""
    starting.freeze(config, model, examples, stage[0])
    runtime.say(f"{stage[0]} layers stay frozen from epoch {stage[1] + 1} on")
    with saver.interruptible():
        fill_cache()


def compiles(config: TrainingConfig, examples: data.Examples, runtime: engine.Runtime) -> bool:
    """Whether CLIP's blocks are compiled. Raises ValueError if they shall and cannot."""
    is_on_gpu = runtime.device.type != "cpu"
    is_long = is_on_gpu and config.epochs * len(examples.rows("train")) > COMPILE_FROM and not config.lora_rank
    can = bool(shutil.which("cc") and (not is_on_gpu or importlib.util.find_spec("triton")))
    if config.compile == "on" and not can:
        raise ValueError("--compile on: needs a C compiler (cc) and, on a GPU, triton; install them or drop it")
    return config.compile == "on" or (config.compile == "auto" and is_long and can)


def tune_speed(
    config: TrainingConfig, model: models.ScoreModel, examples: data.Examples, runtime: engine.Runtime
) -> None:
    """Switch on what trades time against memory or start-up."""
    if config.gradient_checkpointing:  # Hugging Face's towers would take False for True
        model.clip.set_grad_checkpointing(True)
    if compiles(config, examples, runtime):
        runtime.say("compiling CLIP's blocks with the first steps")
        models.compile_blocks(model.clip)


class Progress:
    """A bar on a terminal (nothing elsewhere) and the time of one epoch; `check` is called after every step."""

    def __init__(
        self, course: resuming.Course, num_images: int, runtime: engine.Runtime, check: Callable[[], object]
    ) -> None:
        self.record = course.record
        self.runtime = runtime
        self.check = check
        self.started = time.perf_counter() - self.record.seconds
        self.bar = tqdm(
            total=num_images,
            initial=self.record.num_samples,
            unit="img",
            leave=False,
            disable=runtime.hide_progress,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def after_step(self, num_images: int) -> None:
        """Count the images of a step."""
        self.bar.update(num_images)
        self.check()

    def timing(self) -> dict[str, float]:
        """Training speed, seconds since the epoch began and, on a GPU, the most memory that the run has taken."""
        peak = self.runtime.peak_memory()
        return {
            "images_per_s": self.record.num_samples / max(self.record.seconds, 1e-9),
            "seconds": time.perf_counter() - self.started,
            **({"gpu_memory_gb": peak / 1e9} if peak else {}),
        }


def read_examples(config: TrainingConfig, kept: Kept = NOTHING) -> data.Examples:
    """The data that the options name, fit for them. Raises ValueError."""
    examples = kept.value("data", READ_BY.values(config), lambda: sources.read_examples(config))
    check_examples(config, examples)
    return examples


def check_examples(config: TrainingConfig, examples: data.Examples) -> None:
    """Raise ValueError if the options ask for what the data has not."""
    task = config.select_by.rpartition("_")[2]
    if task in TASKS and task not in examples.scales:
        raise ValueError(f"--select_by {config.select_by}: the data has no {TASKS[task]} scores")
    if not any({"q": config.w_q, "c": config.w_c}.get(task, config.w_extra) for task in examples.scales):
        raise ValueError(f"the data has {' and '.join(map(title_of, examples.scales))} scores only, weighted 0")
    if not set(TASKS) & set(examples.scales):
        raise ValueError("the data has neither quality nor consistency scores: --extra_scores come beside them")
    stopped = config.task_gradients.removeprefix("stop_")
    if stopped in TASKS and set(examples.scales) == {stopped}:
        raise ValueError(f"--task_gradients {config.task_gradients}: the data has no other scores to train CLIP by")
    if config.uses_spreads and set(examples.spreads) & set(examples.scales) != set(examples.scales):
        lacking = next(task for task in examples.scales if task not in examples.spreads)
        way = "which --extra_scores do not have"
        if lacking in TASKS:
            way = "name its column with --quality_std_column, --consistency_std_column"
        raise ValueError(f"--loss {config.loss}: needs the opinions' std on {title_of(lacking)}; {way}")
    if config.strict_splits and (leaks := data.leakage_notes(examples)):
        raise ValueError(f"--strict_splits: {'; '.join(leaks)}")
    if config.use_explanations and (examples.table["prompt"] == "").all():
        raise ValueError("--use_explanations: needs prompts, and the data has none")
    if config.use_explanations and not (examples.table["explanation"] != "").any():
        raise ValueError(f"--use_explanations: column {config.explanation_column!r} is missing or empty")


def count_steps(config: TrainingConfig, examples: data.Examples) -> int:
    """Optimiser steps of the whole run."""
    return engine.num_optimizer_steps(
        len(examples.rows("train")),
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        epochs=config.epochs,
    )


def score_terms(
    scores: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    config: TrainingConfig,
    examples: data.Examples,
    labelled: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Named losses of label-unit scores: "loss_q", "loss_c" and their weighted sum "loss"."""
    return losses.score_losses(
        {task: scores[task] for task in examples.scales},
        targets,
        weights={"q": config.w_q, "c": config.w_c, **dict.fromkeys(config.extra_score_names, config.w_extra)},
        terms=config.loss_terms,
        smoothing=config.label_smoothing,
        means=examples.train_means,
        labelled=labelled,
        spreads={task: targets[f"{task}_std"] for task in examples.scales if f"{task}_std" in targets},
    )


def leaves_unused(examples: data.Examples, model: models.ScoreModel) -> bool:
    """Whether some of what is trained may get no gradient: a head without labels, a part that a foreign tower skips."""
    plain = all(map(models.staged_blocks, (model.clip.visual, model.clip.text)))
    return not plain or model.task_gradients != "shared" or not set(TASKS) <= set(examples.scales)


def build_losses(
    config: TrainingConfig, examples: data.Examples, model: models.ScoreModel, runtime: engine.Runtime
) -> Any:
    """The function (model, batch) -> named losses of the whole batch that training minimises."""

    def compute(trainee: torch.nn.Module, batch: inputs.Batch) -> dict[str, Tensor]:
        own = trainee(**batch.inputs)
        scores = {name: runtime.gather(values, len(batch)) for name, values in own.items()}
        terms = score_terms(scores, batch.targets, config, examples, batch.labelled)
        if config.use_explanations:
            predicted_RE = target_RE = scores["rationale"][:0]
            if batch.rationales:
                predicted_RE = scores["rationale"][batch.with_rationale]
                with torch.no_grad():
                    target_RE = model.encode_texts(batch.rationales)
            terms["loss_exp"] = losses.rationale_loss(predicted_RE, target_RE)
            terms["loss"] = terms["loss"] + config.w_exp * terms["loss_exp"]
        if runtime.world > 1:  # every process has to have a gradient for all that it has computed
            terms["loss"] = terms["loss"] + 0.0 * sum(values.sum() for values in own.values())
        return terms

    return compute


def evaluate(
    scores: Mapping[str, np.ndarray], fold: str, examples: data.Examples, config: TrainingConfig
) -> dict[str, float]:
    """Losses (label units) and agreement (MOS units) of a fold's scores: "loss", "srocc_q", ..., "main"."""
    rows = examples.rows(fold)
    tensors = {task: torch.from_numpy(values) for task, values in scores.items()}
    targets = {task: torch.from_numpy(values[rows]) for task, values in examples.unit_targets.items()}
    targets |= {f"{task}_std": torch.from_numpy(values[rows]) for task, values in examples.spreads.items()}
    terms = {name: float(value) for name, value in score_terms(tensors, targets, config, examples).items()}
    return {**terms, **reporting.agreements(reporting.in_mos_units(scores, examples), fold, examples)}


def run_folder(config: TrainingConfig) -> Path:
    """--output_dir, or runs/<time>-<short name>, not yet taken."""
    if config.output_dir:
        return Path(config.output_dir)
    place = config.clip_model.partition(":")[2]
    model = re.sub(r"[^\w.-]+", "-", Path(place).name if place else config.clip_model).lower()
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{model}-{config.freezing}"
    taken = 1
    while (folder := Path("runs") / (name if taken == 1 else f"{name}-{taken}")).exists():
        taken += 1
    return folder


@contextmanager
def with_folder(config: TrainingConfig) -> Iterator[TrainingConfig]:
    """The options with a folder for the run, made now, lest two that start together take one; goes if left empty."""
    if config.output_dir or config.dry_run:
        yield config
        return
    runtime = engine.start_runtime(config.device, config.amp, config.deterministic)
    folder = runtime.of_main(lambda: make_run_folder(config))
    try:
        yield replace(config, output_dir=str(folder))
    finally:
        for made in (folder, folder.parent) if runtime.is_main else ():
            remove_if_empty(made)


def make_run_folder(config: TrainingConfig) -> Path:
    """Make the folder that `run_folder` names. Raises OSError."""
    while True:
        folder = run_folder(config)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run has just taken it; the next name, then, unless there is a file
            if not folder.is_dir():
                raise


def write_inputs(
    writer: checkpoint.RunFolder, config: TrainingConfig, examples: data.Examples, runtime: engine.Runtime
) -> None:
    """Write what the run starts from: config.json, splits.csv and, where images were left out, skipped.csv.

    Raises:
        ValueError: an interrupted run is gone on with, and that has changed, or has been finished by another process.
    """
    if writer.active and writer.resume and (writer.path / checkpoint.RESULTS_FILE).exists():
        raise ValueError(f"{writer.path}: another process has just finished this run; nothing is left to do")
    if writer.resume:
        before = read_json(writer.path / checkpoint.CONFIG_FILE)["provenance"]
        runtime.say(changes_since(before, writer.path, examples))
    else:
        write_config(writer, config, examples, runtime)
    splits = pd.DataFrame({"name": examples.table["name"], "split": examples.folds})
    found = {"digest": [file.digest for file in examples.files], "path": [str(file.path) for file in examples.files]}
    splits = splits.assign(**found)
    skipped = examples.skipped
    if len(skipped):  # they keep their fold for when they can be read again
        splits = pd.concat([splits, skipped[["name", "path"]].assign(split=skipped["fold"], digest="")])
    if not (writer.path / checkpoint.SPLITS_FILE).exists():  # as it may be where the run was killed early
        if len(skipped):
            writer.csv(checkpoint.SKIPPED_FILE, skipped)
        writer.csv(checkpoint.SPLITS_FILE, splits)
    if config.split_file and runtime.is_main:
        is_drawn = bool((examples.table["split"] == "").any())
        keep_splits(Path(config.split_file), splits[["name", "split"]].reset_index(drop=True), is_drawn=is_drawn)


def keep_splits(path: Path, splits: pd.DataFrame, *, is_drawn: bool) -> None:
    """Write --split_file, unless it is there. Raises ValueError if these folds were drawn, and it has others by now."""
    write_new(path, lambda temporary: tables.write(splits, temporary))
    if is_drawn and not tables.read_csv(path, dtype=str, keep_default_na=False).equals(splits.astype(str)):
        raise ValueError(f"--split_file {path}: another run has just written other folds there; start this one again")


def write_config(
    writer: checkpoint.RunFolder, config: TrainingConfig, examples: data.Examples, runtime: engine.Runtime
) -> None:
    """Write config.json, which makes the folder that of a run."""
    config = replace(config, output_dir=str(writer.path))
    provenance = {
        **checkpoint.environment(),
        "machine": runtime.describe(),
        "resolved": {
            "device": runtime.device.type,
            "amp": runtime.precision,
            "num_workers": feeding.num_threads(config, runtime),
            "cache_views": config.num_views,
            "compile": compiles(config, examples, runtime),
            "processes": runtime.world,
            **engine.arithmetic(),
        },
        "data_fingerprint": examples.fingerprint,
        "mos_scales": {task: [scale.low, scale.high] for task, scale in examples.scales.items()},
    }
    writer.json(checkpoint.CONFIG_FILE, {**config.to_json(), "provenance": provenance})


def changes_since(before: Mapping[str, Any], folder: Path, examples: data.Examples) -> str:
    """What is another than when a run began, in words. Raises ValueError if the data is."""
    if before.get("data_fingerprint") != examples.fingerprint:
        raise ValueError(
            f"--resume {folder}: the data has changed since the run began; restore it, or start another run"
        )
    now = checkpoint.environment()
    versions = before.get("versions", {})
    other = [
        f"{name} {now['versions'][name]}" for name in now["versions"] if versions.get(name) != now["versions"][name]
    ]
    other += ["the code"] if before.get("git_revision") != now["git_revision"] else []
    return f"resume    {folder}" + (f"; since it began has changed: {', '.join(other)}" if other else "")


def never_trained(model: models.ScoreModel, optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the parameters that the optimiser does not know."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in known}


def save_scorer(
    writer: checkpoint.RunFolder,
    state: Mapping[str, Tensor],
    backbone: backbones.Backbone,
    arguments: Mapping[str, Any],
    config: TrainingConfig,
    examples: data.Examples,
) -> None:
    """Write a checkpoint that `predict.Scorer.load` can score with, without anything else."""
    description = {
        "clip": backbone.config,
        "image_size": config.image_size,
        "model": dict(arguments),
        "scales": {task: {"low": scale.low, "high": scale.high} for task, scale in examples.scales.items()},
        "test_crops": config.num_test_crops,
        "source": origin(config),
    }
    writer.weights(checkpoint.BEST_DIR, state, description, lambda path: backbones.save_text_files(backbone, path))


def plan(
    config: TrainingConfig,
    examples: data.Examples,
    backbone: backbones.Backbone,
    model: models.ScoreModel,
    feed: inputs.Feed[inputs.PixelSource],
    runtime: engine.Runtime,
    num_steps: int,
    num_truncated: int,
) -> str:
    """What is about to be trained, in a few lines."""
    table = examples.table
    scores = ", ".join(
        f"{title_of(task)} {table[task].min():g}..{table[task].max():g} ({table[task].notna().sum()})"
        for task in examples.scales
    )
    counts = models.count_parameters(model)
    parts = ", ".join(
        f"{name} {trained / 1e6:.2f}M of {(trained + frozen) / 1e6:.2f}M" for name, (trained, frozen) in counts.items()
    )
    sizes = ", ".join(f"{fold} {len(examples.rows(fold))}" for fold in data.FOLDS)
    num_prompts = table["prompt"][table["prompt"] != ""].nunique()
    lines = [
        ("data", f"{', '.join(examples.sets)}: {len(table)} images, {num_prompts} prompts; {scores}"),
        ("split", f"{sizes} ({how_split(config, examples)})"),
        ("backbone", f"{origin(config)}, {config.image_size} px, {backbone.activation}, {config.freezing}"),
        ("trained", parts),
        (
            "schedule",
            f"{config.epochs} epochs, {num_steps} steps of {config.batch_size * config.gradient_accumulation_steps}, "
            f"lr {config.lr:g} {config.scheduler}, loss {config.loss}, seed {config.seed}",
        ),
        ("images", feed.pixels.store.describe()),
        ("machine", runtime.describe()),
    ]
    if config.preset:
        lines.insert(0, ("preset", f"{config.preset}; --preset list shows what that is"))
    folds = dict.fromkeys(feeding.folds_read(config))
    notes = [*data.leakage_notes(examples), *reporting.of_constants(folds, examples), *backbone.notes]
    if len(examples.skipped):
        notes.insert(0, f"--bad_images skip: {sources.skipped_note(examples)}")
    if num_truncated:
        notes.append(f"{num_truncated} text(s) exceed CLIP's context length and were cut")
    if config.freeze_layers != TrainingConfig.freeze_layers:
        if config.unfreeze_schedule:
            notes.append("--freeze_layers does nothing beside --unfreeze_schedule")
        elif not config.partial_freeze:
            notes.append("--freeze_layers does nothing without --partial_freeze")
    if config.cache_views is not None and feeding.caches_nothing(config, model):
        notes.append("--cache_views does nothing here: no layers in front are frozen and cached")
    if config.crops and config.num_views == 0 and not feeding.caches_nothing(config, model):
        notes.append("heads train on the --test_crops here: --crops counts with --cache_views 1 and more")
    small = sum(min(file.size) < config.image_size for file in examples.files)
    if config.crops and small:
        notes.append(f"--crops: {small} images are smaller than --image_size and will be enlarged")
    if config.stages[-1][1] >= config.epochs:
        notes.append(f"--unfreeze_schedule: epoch {config.stages[-1][1]} is never reached in {config.epochs} epochs")
    lines += [("note", note) for note in notes]
    return "\n".join(f"{title:<10}{text}" for title, text in lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line and run; returns the results. Mistakes are one line and exit code 2."""
    with (
        one_line_errors(engine.NonFiniteLoss, engine.OutOfMemory, torch.OutOfMemoryError, retry=signals.Stopped),
        signals.Signals() as listening,
    ):
        config = parse_args(argv, num_images=sources.count_training_images, num_blocks=starting.num_blocks)
        with with_folder(config) as config:
            if config.is_protocol:
                runtime = engine.start_runtime(config.device, config.amp, config.deterministic)
                folder = run_folder(config)
                results = protocol.run_all(config, partial(run, listening=listening), folder, runtime)
                if results:
                    write_report(config, folder, runtime)
            else:
                results = run(config, listening=listening)
        engine.stop_runtime()
        return results


if __name__ == "__main__":
    main(sys.argv[1:])
