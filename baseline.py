"""Fine-tune CLIP with two residual heads on human scores of AI-generated images.

    python baseline.py --demo                            # works without data or network
    python baseline.py --partial_freeze --freeze_layers 18
    python baseline.py --help

`run(config)` is the whole story: data, model, optimiser, epochs, the test fold once, results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

if __name__ == "__main__":
    # --help, mistakes in the flags and Ctrl-C answer here, before torch is imported, which takes seconds.
    from cli.errors import one_line_errors
    from guidance.arguments import parse_args
    from training.signals import EXIT_TRY_AGAIN, end_quietly

    end_quietly(interrupted=EXIT_TRY_AGAIN)  # as later on: what is run again goes on
    with one_line_errors():
        parse_args()

import torch

import data
from cli.errors import one_line_errors
from cli.memo import NO_MEMO, Memo
from configs import TrainingConfig
from evaluation import agreement
from finetune import frozen_clip, initial_model, optimisation, outcome, plan, run_files
from finetune.experiment import build_experiment
from finetune.task import ScoreTask
from guidance.arguments import parse_args
from multirun import protocol
from training import devices, loop, micro_batches, run_folder, signals
from training.fit import fit


def run(
    config: TrainingConfig,
    *,
    after_epoch: Callable[[Mapping[str, float]], object] = lambda row: None,
    memo: Memo = NO_MEMO,
    stop_signals: signals.Signals = signals.NONE,
) -> dict[str, Any]:
    """Train as configured and return what `results.json` holds (empty under `dry_run`).

    Args:
        after_epoch: is given each row of `metrics.csv`, in every process; what it raises stops the run.
        memo: holds what other runs of this process have read and computed, and takes what this one adds.
        stop_signals: what asks the run to stop.

    Raises:
        ValueError: data or options that cannot work; nothing has been written then, unless a tracker cannot be opened.
        loop.NonFiniteLoss: training broke down; the state from before that is saved.
        signals.Stopped: a signal has stopped the run; its state is saved.
    """
    started = time.perf_counter()
    config, runtime, folder, found = run_files.start(config)
    if found == "finished":
        return outcome.finished_results(config, folder, runtime)

    # Data, model, and how one becomes batches for the other.
    experiment = build_experiment(config, runtime, memo)
    runtime.say(plan.plan(experiment))
    facts = plan.gather_facts(experiment)
    remarks = plan.check_advice(experiment, facts)
    if config.dry_run:
        return {}

    with run_files.open_folder(experiment, folder, resume=found == "interrupted") as writer:
        run_files.write_inputs(writer, experiment)
        ready = time.perf_counter()

        # What CLIP knows before training: the point to start from, and to be compared with at the end.
        frozen = frozen_clip.FrozenLayers(experiment)
        frozen.fill()
        known, base = frozen_clip.learn_base(experiment)

        # What training changes, and what keeps it.
        state = optimisation.build_train_state(experiment)
        optimisation.tune_speed(experiment)
        best_weights = run_files.keep_best(writer, experiment, state)
        saver = optimisation.build_saver(experiment, state, writer, best_weights, stop_signals, started)
        progress = saver.progress

        with optimisation.open_trackers(experiment, writer, progress) as trackers, best_weights, saver.guarding():
            task, options = ScoreTask(experiment, frozen), optimisation.fit_options(config)
            fit(task, options, saver, writer, best_weights, trackers, after_epoch=after_epoch)

            # The test fold's scores are looked at here, once, with the weights that validation has chosen.
            best = outcome.load_best(experiment, state.average.weights, folder)
            scores = outcome.score_folds(experiment, best, progress, saver.check)
            measured = outcome.measure(experiment, base, known, scores, frozen.statistics.of_all)
            results = outcome.conclude(experiment, progress, measured, facts, remarks)
            results |= outcome.timing(progress, started, ready)
            trackers.log({f"test_{name}": value for name, value in results["test"].items()}, len(progress.history))
            writer.csv("predictions.csv", agreement.prediction_table(scores, experiment.examples))
            writer.json(run_folder.RESULTS_FILE, results)
        outcome.write_report(config, folder, runtime)
        writer.forget_states()
    runtime.say("\n".join(outcome.closing_lines(results, experiment.examples, folder)))
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line and run; returns the results. Mistakes are one line and exit code 2."""
    with (
        one_line_errors(loop.NonFiniteLoss, micro_batches.OutOfMemory, torch.OutOfMemoryError, retry=signals.Stopped),
        signals.Signals() as stop_signals,
    ):
        config = parse_args(argv, num_images=data.count_training_images, num_blocks=initial_model.num_blocks)
        with run_files.with_folder(config) as config:
            if config.is_protocol:
                runtime = devices.start_runtime(config.device, config.amp, config.deterministic)
                folder = run_files.name_run_folder(config)
                results = protocol.run_all(
                    protocol.SCORER, config, partial(run, stop_signals=stop_signals), folder, runtime
                )
                if results:
                    outcome.write_report(config, folder, runtime)
            else:
                results = run(config, stop_signals=stop_signals)
        devices.stop_runtime()
        return results


if __name__ == "__main__":
    main(sys.argv[1:])
