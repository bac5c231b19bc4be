"""Search the options of baseline.py or main.py for the best validation score, with Optuna.

    python search.py --demo --trials 20 --output_dir runs/search      # works without data or network
    python search.py --program vqa --demo --trials 20 --output runs/search-vqa
    python search.py --help

A trial is one `baseline.run` or `main.run` that leaves the test fold unread; the best one is repeated in the end, and
that reads it.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # --help, mistakes in the flags and Ctrl-C answer here, before torch and Optuna are imported, which takes seconds.
    from cli.errors import one_line_errors
    from training.signals import end_as_usual, end_quietly
    from tuning.arguments import parse_search_args

    end_quietly(silently="--parent" in sys.argv)  # a worker's parent says it
    with one_line_errors():
        parse_search_args()
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("search.py needs Optuna: pip install -r requirements-extra.txt")

import optuna
import torch
from optuna.trial import TrialState

import baseline
import data
import main as answering_program
from answering import folds, images
from answering import outcome as answers_outcome
from answering import run_files as answers_run_files
from cli.errors import one_line_errors
from cli.memo import Memo
from finetune import experiment, initial_model, outcome
from guidance.presets import FREEZING
from multirun import protocol, summaries
from storage.json_files import read_json
from training import checkpoints, devices, loop, micro_batches, run_folder
from training.signals import end_quietly
from tuning.arguments import Request, parse_search_args
from tuning.programs import ANSWERER, SCORER
from tuning.queue import heartbeat, next_trial, requeue_own, suggest
from tuning.results import trial_line, write_findings
from tuning.space import Space
from tuning.study import (
    BEST_RUNS,
    STORAGE_ERRORS,
    TRIALS_DIR,
    Search,
    SearchFailed,
    check_same_data,
    check_same_search,
    open_study,
    reason_of,
    refuse_occupied,
    study_lock,
    write_search_file,
)

FAILURES = (ValueError, micro_batches.OutOfMemory, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Trainer:
    """What runs the program whose options are searched."""

    runs: protocol.Program  # as repeated runs know it
    run: Callable[..., dict[str, Any]]  # options, after_epoch, memo -> results
    space: Callable[[Request], Space]  # what is searched
    look: Callable[[Request, Memo], tuple[str, bool]]  # digest of the data; whether other seeds draw other test folds
    start: Callable[[Any], devices.Runtime]
    write_report: Callable[[Any, Path, devices.Runtime], None]


def scorer_space(request: Request) -> Space:
    """What is searched of baseline.py. Raises ValueError."""
    config = data.find_demo(request.config) if request.config.demo else request.config
    depth = initial_model.num_blocks(config)
    return request.space or SCORER.default_space(config, depth, request.given)


def look_at_scores(request: Request, memo: Memo) -> tuple[str, bool]:
    """See `Trainer.look`. Raises ValueError for data that cannot be used."""
    config = data.find_demo(request.config) if request.config.demo else request.config
    examples = experiment.read_examples(config, memo)
    return examples.fingerprint, not config.split_file and bool((examples.table["split"] == "").any())


def look_at_questions(request: Request, memo: Memo) -> tuple[str, bool]:
    """See `Trainer.look`. Raises ValueError for data that cannot be used."""
    runtime, config = start_answers(request.config), request.config
    config = images.find_demo(config, runtime) if config.demo else config
    known = images.usable(images.open_regions(config, runtime), images.open_coarse(config, runtime))
    found = folds.read_folds(config, known)
    return folds.digest_of(found.questions.values()), found.draws_test


def start_answers(config: Any) -> devices.Runtime:
    """Join the other processes, if any, for runs of main.py."""
    return devices.start_runtime(config.device, config.amp)


TRAINERS = {
    SCORER.script: Trainer(
        runs=protocol.SCORER,
        run=lambda config, **how: baseline.run(config, **how),
        space=scorer_space,
        look=look_at_scores,
        start=lambda config: devices.start_runtime(config.device, config.amp, config.deterministic),
        write_report=lambda *given: outcome.write_report(*given),
    ),
    ANSWERER.script: Trainer(
        runs=answers_run_files.PROGRAM,
        run=lambda config, memo=None, **how: answering_program.run(config, **how),
        space=lambda request: request.space or ANSWERER.default_space(request.config, None, request.given),
        look=look_at_questions,
        start=start_answers,
        write_report=answers_outcome.write_report,
    ),
}


def trainer_of(request: Request) -> Trainer:
    """What runs the program that a request names."""
    return TRAINERS[request.program.script]


def run_trial(search: Search, trial: optuna.Trial) -> None:
    """Run one trial, tell the study what came of it, and say so."""
    started = time.perf_counter()
    try:
        values = {name: suggest(trial, dimension) for name, dimension in search.space.items()}
        with heartbeat(trial):
            state, score, cause = train_trial(search, trial, values)
        with study_lock(search.request):
            trial.set_user_attr("seconds", round(time.perf_counter() - started, 1))
            if cause:
                trial.set_user_attr("cause", cause)
            search.study.tell(trial, score, state=state, skip_if_finished=True)
        said = trial_line(search, trial.number)
    except optuna.exceptions.UpdateFinishedTrialError:
        said = f"note      trial {trial.number} was taken over by another worker, which took this one for dead"
    # In one piece: print() writes the line's end apart where Python does not buffer, and the lines of workers mix.
    print(said + "\n", end="", flush=True)


def train_trial(
    search: Search, trial: optuna.Trial, values: Mapping[str, Any]
) -> tuple[TrialState, float | None, str | None]:
    """Train with these values: how it ended, the validation score if it ended well, and the cause if it did not."""
    request = search.request
    folder = request.folder / TRIALS_DIR / f"{trial.number:04d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)

    def after_epoch(row: Mapping[str, float]) -> None:
        trial.report(row[f"val_{search.score}"], int(row["epoch"]))
        if row["epoch"] < config.epochs and trial.should_prune():
            raise optuna.TrialPruned

    try:
        config = request.program.options_of(request.config, search.space, values, request.given)
        config = replace(config, **apart(request, folder), save_every_minutes=0.0)
        with folder.with_suffix(".log").open("w", encoding="utf-8") as log, redirect_stdout(log):
            results = trainer_of(request).run(config, after_epoch=after_epoch, memo=search.memo)
    except optuna.TrialPruned:
        return TrialState.PRUNED, None, None
    except loop.NonFiniteLoss as error:  # as good as stopped early: the same values would break down again
        return TrialState.PRUNED, None, f"diverged: {error}"
    except FAILURES as error:
        return TrialState.FAIL, None, str(error) or type(error).__name__
    finally:
        for name in (checkpoints.BEST_DIR, checkpoints.STATE_DIR):  # a whole CLIP for each trial is too much
            shutil.rmtree(folder / name, ignore_errors=True)
        gc.collect()  # what refers to itself holds a model in memory
    trial.set_user_attr("best_epoch", results["best_epoch"])
    return TrialState.COMPLETE, results["val"][search.score], None


def apart(request: Request, folder: Path) -> dict[str, Any]:
    """The options that a trial has beside its values: a folder of its own, and the test fold left unread."""
    return {request.program.folder: str(folder), "test": False, "report": False}


def work(search: Search) -> None:
    """Run trials until there are enough; one that is cut short goes back into the queue."""
    try:
        while (trial := next_trial(search)) is not None:
            run_trial(search, trial)
    except BaseException:
        with suppress(*STORAGE_ERRORS, OSError):  # then whoever looks next finds this process gone
            requeue_own(search)
        raise


def run_workers(request: Request, argv: Sequence[str]) -> None:
    """Let other processes run the trials. Raises SearchFailed if one ends with an error, which it has said."""
    count = request.workers
    itself = ["-m", f"{__package__}.search"] if __package__ else [__file__]  # installed, or in a checkout
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1" if __package__ else "",  # so that -m looks for nothing in the current folder
        "OMP_NUM_THREADS": str(max(1, devices.num_cpus() // count)),
        "LOCAL_WORLD_SIZE": str(count),  # for the threads that decode images
        "TQDM_DISABLE": "1",
    }
    workers = []
    try:
        for number in range(count):
            command = [sys.executable, *itself, *argv, "--parent", str(os.getpid())]
            own = {**environment, "LOCAL_RANK": str(number % max(1, devices.num_gpus()))}
            # In a session of its own: Ctrl-C reaches this process alone, which passes it on.
            workers.append(subprocess.Popen(command, env=own, start_new_session=True))
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGINT)
        for worker in workers:
            worker.wait()
    if any(code > 0 for code in codes):
        raise SearchFailed("a worker has ended with the error above; the same command goes on")
    for number, code in enumerate(codes):
        if code < 0:
            print(f"note      worker {number} was killed (signal {-code}); its trial is run again")


def repeat_best(search: Search, config: Any) -> None:
    """Run the best options with --seeds seeds, each reading its test fold once; goes on where it was stopped."""
    request, trainer = search.request, trainer_of(search.request)
    config = replace(config, repeats=request.seeds)
    runtime = trainer.start(config)
    folder, before = place_of_best(request, config, search.study.best_trial.number)
    print(f"\nthe best {request.seeds} times, from seed {config.seed} on, in {folder}; this reads the test fold")
    if before:
        print(f"note      the test fold has been read before with other settings, kept in {', '.join(before)}")
    if search.draws_folds and request.seeds > 1:
        print(
            "note      folds are drawn: seeds after the first test on images that helped to choose the settings; "
            "fixed folds avoid that" + (" (--split_file)" if request.program is SCORER else "")
        )
    protocol.run_all(trainer.runs, config, trainer.run, folder, runtime)
    trainer.write_report(config, folder, runtime)


def place_of_best(request: Request, config: Any, number: int) -> tuple[Path, list[str]]:
    """Where the repeated runs of the best trial go, and the names of the folders that hold those of other settings.

    The first go to best/; if the best settings have changed since the test fold was read, to best-trial<number>/.
    """
    folder, result_options = request.folder, trainer_of(request).runs.result_options
    first, other = folder / BEST_RUNS, folder / f"{BEST_RUNS}-trial{number}"
    own, before = first, []
    for place in sorted(
        {results.parent.parent for results in folder.glob(f"{BEST_RUNS}*/*/{run_folder.RESULTS_FILE}")}
    ):
        saved = read_json(place / summaries.PROTOCOL_FILE)
        if result_options(replace(config, repeats=saved.get("repeats", 1))) == saved:
            own = place
        else:
            before.append(place.name)
    return (other if own.name in before else own), before


def prepare(request: Request, memo: Memo) -> Search:
    """Open the study, having made sure that what is asked for can be run at all. Raises ValueError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("search.py: every trial is one process; leave torchrun out, --workers starts several")
    refuse_occupied(request.folder, f"--{request.program.folder}")
    began, trainer = datetime.now(), trainer_of(request)
    space = trainer.space(request)
    with study_lock(request):
        write_search_file(request)
        study = open_study(request)
        check_same_search(study, request, space, trainer.runs.result_options(request.config))
    fingerprint, drawn = trainer.look(request, memo)
    search = Search(study, request, space, memo, began, drawn)
    check_same_data(search, fingerprint)
    return search


def search_all(request: Request, argv: Sequence[str]) -> optuna.Study:
    """Run the trials and what comes after them. Raises ValueError and SearchFailed."""
    memo = Memo()
    search = prepare(request, memo)
    gc.freeze()  # so that collecting after a trial looks at what that trial has left, not at every library
    if request.parent is not None:
        work(search)
        return search.study
    have = len(search.finished())
    if have < request.trials:
        print(f"search    {', '.join(dimension.describe() for dimension in search.space.values())}")
        print(f"          {about_trials(search)}")
        finished = f", {have} of them finished" if have else ""
        print(f"          {request.trials} trials{finished}, by validation {search.score}")
        check_plan(search)
        if request.workers > 1:
            memo.kinds.clear()
            run_workers(request, argv)
        work(search)
    have = len(search.finished())
    if have < request.trials:
        print(f"--timeout is over after {have} of {request.trials} trials; the same command goes on")
    config = write_findings(search)
    memo.kinds.clear()
    if request.seeds:
        repeat_best(search, config)
    return search.study


def about_trials(search: Search) -> str:
    """What all trials have in common: how CLIP is frozen, or which branches are trained."""
    if search.request.program is ANSWERER:
        return f"--branches {','.join(search.request.config.branch_names)}"
    searched = [name for name in FREEZING if name in search.space]
    return f"CLIP: {search.request.config.freezing}" + (f", but {' and '.join(searched)} searched" if searched else "")


def check_plan(search: Search) -> None:
    """Build what a trial trains, without training. Raises ValueError for what cannot work."""
    folder = search.request.folder / TRIALS_DIR / "plan"
    config = replace(search.request.config, **apart(search.request, folder), dry_run=True)
    path = folder.with_suffix(".log")
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as log, redirect_stdout(log):
        trainer_of(search.request).run(config, memo=search.memo)


def main(argv: Sequence[str] | None = None) -> optuna.Study:
    """Search as the command line says; returns the study. Mistakes are one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    with one_line_errors(SearchFailed, loop.NonFiniteLoss, micro_batches.OutOfMemory, torch.OutOfMemoryError):
        try:
            request = parse_search_args(
                argv, num_blocks=initial_model.num_blocks, num_images=data.count_training_images
            )
            return search_all(request, argv)
        except STORAGE_ERRORS as error:
            raise SearchFailed(f"the study cannot be used ({reason_of(error)}); the same command goes on") from error
        except KeyboardInterrupt:
            if "--parent" not in argv:  # which says it for its workers
                print("interrupted: what is finished is kept, the same command goes on from there", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    end_as_usual()
    main(sys.argv[1:])
