"""Train a model that answers questions about images (GQA, VQA v2, or a table of one's own), measure it, ask it.

    python main.py --demo                                # works without data or network
    python main.py --dataset VQA --data_root VQA --features VQA/trainval_36.zip
    python main.py --mode ask --checkpoint RUN/best --image cat.jpg --question "What is it?"
    python main.py --mode export --checkpoint RUN/best --output exported
    python main.py --help

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
    from answering.configs import parse_args
    from cli.errors import one_line_errors
    from training.signals import EXIT_TRY_AGAIN, end_quietly

    end_quietly(interrupted=EXIT_TRY_AGAIN)  # as later on: what is run again goes on
    with one_line_errors():
        parse_args()

import torch

from answering import asking, outcome, remarks, run_files, task
from answering.configs import VQAConfig, parse_args
from answering.experiment import build_experiment
from cli.errors import one_line_errors
from multirun import protocol
from training import devices, loop, micro_batches, run_folder, signals
from training.fit import fit


def run(
    config: VQAConfig,
    *,
    after_epoch: Callable[[Mapping[str, float]], object] = lambda row: None,
    stop_signals: signals.Signals = signals.NONE,
) -> dict[str, Any]:
    """Train as configured and return what `results.json` holds (empty under `dry_run`).

    Args:
        after_epoch: is given each row of `metrics.csv`, in every process; what it raises stops the run.
        stop_signals: what asks the run to stop.

    Raises:
        ValueError: data or options that cannot work; nothing has been written then, unless a tracker cannot be opened.
        loop.NonFiniteLoss: training broke down; the state from before that is saved.
        signals.Stopped: a signal has stopped the run; its state is saved.
    """
    started = time.perf_counter()
    runtime, folder, found = run_files.start(config)
    if found == "finished":
        return outcome.finished_results(folder, runtime)

    # Questions, regions, model.
    experiment = build_experiment(config, runtime)
    runtime.say(remarks.plan(experiment))
    said = remarks.check_advice(experiment)
    if config.dry_run:
        return {}

    with run_files.open_folder(experiment, folder, resume=found == "interrupted") as writer:
        run_files.write_inputs(writer, experiment)
        ready = time.perf_counter()

        # What training changes, and what keeps it.
        state = task.build_train_state(experiment)
        best_weights = run_files.keep_best(writer, experiment)
        saver = run_files.build_saver(experiment, state, writer, best_weights, stop_signals, started)
        progress = saver.progress

        with run_files.open_trackers(experiment, writer, progress) as trackers, best_weights, saver.guarding():
            options = task.fit_options(experiment)
            fit(task.AnswerTask(experiment), options, saver, writer, best_weights, trackers, after_epoch=after_epoch)

            # The test fold's answers are looked at here, once, with the weights that validation has chosen.
            best = outcome.load_best(experiment, state.average.weights, folder)
            task.weigh_branches(experiment, best, best_weights, saver.check)
            fold = config.measured_fold  # the validation fold where the test fold is left unread
            answers = task.answer(experiment, best, experiment.folds[fold], saver.check)
            floors = outcome.floor_answers(experiment, best, fold) if config.test else {}
            measured = outcome.measure(experiment, best, fold, answers, floors)
            results = outcome.conclude(experiment, progress, measured, said)
            results |= outcome.timing(progress, started, ready)
            sent = {f"{fold}_{name}": value for name, value in measured["measures"].items()}
            trackers.log(sent, len(progress.history))
            outcome.write_findings(experiment, best, answers, writer)
            writer.json(run_folder.RESULTS_FILE, results)
        outcome.write_report(config, folder, runtime)
        writer.forget_states()
    runtime.say("\n".join(remarks.closing_lines(results, folder)))
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line and run; returns the results. Mistakes are one line and exit code 2."""
    with (
        one_line_errors(loop.NonFiniteLoss, micro_batches.OutOfMemory, torch.OutOfMemoryError, retry=signals.Stopped),
        signals.Signals() as stop_signals,
    ):
        config = parse_args(argv)
        if config.mode == "export":
            from sharing.answers import export  # with libraries that training does without

            return export(config)
        if config.mode != "train":
            return asking.ASKING[config.mode](config)
        with run_files.with_folder(config) as config:
            if config.repeats > 1:
                runtime = devices.start_runtime(config.device, config.amp)
                folder, once = run_files.name_run_folder(config), partial(run, stop_signals=stop_signals)
                results = protocol.run_all(run_files.PROGRAM, config, once, folder, runtime)
                if results:
                    outcome.write_report(config, folder, runtime)
            else:
                results = run(config, stop_signals=stop_signals)
        devices.stop_runtime()
        return results


if __name__ == "__main__":
    main(sys.argv[1:])
