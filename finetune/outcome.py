"""What has come of a run: measured, diagnosed, told, and shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import models
from backbones import freezing
from configs import TrainingConfig
from evaluation import agreement, floors, probes, text_tables
from finetune.experiment import Experiment, Scores
from finetune.task import evaluate
from guidance import advice, diagnosis
from sources.examples import Examples
from storage.json_files import read_json
from training import checkpoints, devices, resuming, run_folder


def finished_results(config: TrainingConfig, folder: Path, runtime: devices.Runtime) -> dict[str, Any]:
    """What a run found that `--resume` need not go on with; makes up for a report that was cut short."""
    from pages.run_data import REPORT_FILE  # here, as matplotlib takes half a second to import

    runtime.say(f"{folder} is finished; nothing is left to do")
    if runtime.is_main:
        with run_folder.RunFolder(folder, resume=True) as writer:
            if not (folder / REPORT_FILE).exists():
                write_report(config, folder, runtime)
            writer.forget_states()
    return read_json(folder / run_folder.RESULTS_FILE)


def write_report(config: TrainingConfig, folder: Path, runtime: devices.Runtime) -> None:
    """Write the page of a finished run, or of repeated ones, unless it is not wanted."""
    if config.report and runtime.is_main:
        from pages import report  # here, as above

        report.write_report(folder)


def load_best(experiment: Experiment, trained: models.ScoreModel, folder: Path) -> models.ScoreModel:
    """The trained model with the weights of the epoch that validation has chosen."""
    best = freezing.merge_lora(trained)
    if experiment.runtime.is_main:
        best.load_state_dict(checkpoints.load_weights(folder / checkpoints.BEST_DIR)[1])
    experiment.runtime.copy_weights(best)
    return best


def score_folds(
    experiment: Experiment, best: models.ScoreModel, progress: resuming.Progress, before_batch: Callable[[], object]
) -> dict[str, Scores]:
    """The chosen model's scores of every fold; of the validation fold they are known already."""
    others = [fold for fold in experiment.orders if fold not in ("train", "val")]
    scores = {fold: experiment.predict(best, fold, before_batch=before_batch) for fold in others}
    return {**scores, "val": progress.best_scores}


def measure(
    experiment: Experiment,
    base: probes.Base,
    known: Mapping[str, Scores],
    scores: Mapping[str, Scores],
    statistics: Callable[[], np.ndarray],
) -> dict[str, Any]:
    """What the scores of the folds are worth, as in `results.json`; nothing of the test fold under --no_test."""
    config, examples = experiment.config, experiment.examples
    folds = config.folds_read
    found: dict[str, Any] = {fold: evaluate(scores[fold], fold, examples, config) for fold in folds}
    found["base"] = {fold: agreement.agreements(base.scores(known[fold]), fold, examples) for fold in folds}
    found |= agreement.data_facts(examples)
    found["notes"] = agreement.constant_notes({fold: scores[fold] for fold in folds}, examples)
    if not config.test:
        return {**found, **{key: {} for key in ("test", "floors", "certainty", "generators", "sets")}}
    simple = floors.floors(examples, base, known, experiment.runtime.of_main(statistics))
    return {**found, "floors": simple, **agreement.test_findings(scores["test"], examples)}


def conclude(
    experiment: Experiment,
    progress: resuming.Progress,
    measured: Mapping[str, Any],
    facts: advice.Facts,
    remarks: Sequence[advice.Remark],
) -> dict[str, Any]:
    """What `results.json` holds but for the times: what was measured, and what is to be said of it."""
    findings = diagnosis.diagnose(progress.history, experiment.config, facts, known=progress.selection[0])
    return {
        "best_epoch": progress.best_epoch,
        "epochs": len(progress.history),
        **measured,
        "advice": [asdict(remark) for remark in remarks],
        "diagnosis": [asdict(finding) for finding in findings],
        "resumed": progress.resumed,
    }


def timing(progress: resuming.Progress, started: float, ready: float) -> dict[str, float]:
    """Seconds that the run has taken, and those of this process without loading data and model."""
    now = time.perf_counter()
    return {"seconds": round(progress.seconds + now - started, 3), "seconds_from_first_batch": round(now - ready, 3)}


def closing_lines(results: Mapping[str, Any], examples: Examples, folder: Path) -> list[str]:
    """What is said at the end of a run."""
    findings = [diagnosis.Finding(**finding) for finding in results["diagnosis"]]
    notes = [f"note      {note}" for note in results["notes"]]
    return [text_tables.results_table(results, examples), *notes, *diagnosis.lines(findings), f"run folder: {folder}"]
