"""How a run is optimised: optimiser, schedule, averaged weights, what saves them, and what trades time for memory."""

from __future__ import annotations

import importlib.util
import shutil

import torch

from backbones import freezing, towers
from configs import TrainingConfig
from finetune import initial_model
from finetune.experiment import Experiment
from sources.examples import Examples
from training import checkpoints, devices, loop, micro_batches, optim, resuming, run_folder, signals, tracking
from training.fit import FitOptions

COMPILE_FROM = 200_000  # images through the model in a run, from which compilation should be worth its start-up


def fit_options(config: TrainingConfig) -> FitOptions:
    """How long and by which steps to train."""
    return FitOptions(
        epochs=config.epochs,
        lr=config.lr,
        select_by=config.select_by,
        accumulation=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        patience=config.early_stopping_patience,
        min_delta=config.early_stopping_min_delta,
    )


def build_train_state(experiment: Experiment) -> resuming.TrainState:
    """All that training changes."""
    config, model = experiment.config, experiment.model
    optimizer, schedule = build_optimizer(experiment)
    return resuming.TrainState(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        average=optim.WeightAverage(model, config.ema_decay),
        micro=micro_batches.MicroBatches(
            experiment.feed.split,
            enabled=config.dynamic_batch_size,
            max_usage=config.max_memory_usage,
            remedies="add --gradient_checkpointing, freeze more layers, or --no_cache",
        ),
        scaler=experiment.runtime.scaler,
        constant=never_trained(model, optimizer),
    )


def build_optimizer(
    experiment: Experiment,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over all that is trained at some stage, with no state of what is frozen as yet, and its schedule."""
    config, model, examples = experiment.config, experiment.model, experiment.examples
    scales = freezing.lr_scales(model, config.layer_decay)

    def lr_of(name: str) -> float:
        return config.lr * scales[name] if name in scales else config.head_lr or config.lr

    initial_model.freeze(config, model, examples, config.stages[-1][0])
    optimizer = optim.build_optimizer(model, lr_of, weight_decay=config.weight_decay)
    initial_model.freeze(config, model, examples, config.stages[0][0])
    return optimizer, optim.build_schedule(
        optimizer, kind=config.scheduler, num_steps=experiment.num_steps, warmup_ratio=config.warmup_ratio
    )


def never_trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of CLIP's parameters that the optimiser does not know."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) not in known}
    return {name for name in names if name.startswith("clip.")}  # base terms are fitted anew by a resumed run


def build_saver(
    experiment: Experiment,
    state: resuming.TrainState,
    writer: run_folder.RunFolder,
    best_weights: checkpoints.DeferredWeights,
    stop_signals: signals.Signals,
    started: float,
) -> resuming.Saver:
    """What saves the run's state; where an interrupted run is gone on with, that has been loaded."""
    config, runtime = experiment.config, experiment.runtime
    progress = resuming.Progress()

    def tell(error: Exception) -> None:
        if isinstance(error, loop.NonFiniteLoss):
            names = experiment.examples.table["name"].iloc[error.samples].tolist()
            found = resuming.failure(error, progress, {"images": names}, "python baseline.py", writer.path)
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
        dropped=experiment.feed.dropped,
        tell=tell,
        started=started,
    )
    if writer.resume:
        saver.go_on()
    return saver


def tracker_names(config: TrainingConfig) -> list[str]:
    """The trackers that are asked for."""
    return tracking.names_of(config.tensorboard, config.tracker)


def open_trackers(
    experiment: Experiment, writer: run_folder.RunFolder, progress: resuming.Progress
) -> tracking.Trackers:
    """What the scalars of every epoch are sent to, by the process that writes, those of finished epochs at once."""
    config = experiment.config
    names = tracker_names(config) if writer.active else []
    return tracking.Trackers(names, writer.path, config.to_json(), experiment.runtime.say, progress.history)


def compiles(config: TrainingConfig, examples: Examples, runtime: devices.Runtime) -> bool:
    """Whether CLIP's blocks are compiled. Raises ValueError if they shall and cannot."""
    is_on_gpu = runtime.device.type != "cpu"
    is_long = is_on_gpu and config.epochs * len(examples.rows("train")) > COMPILE_FROM and not config.lora_rank
    can = bool(shutil.which("cc") and (not is_on_gpu or importlib.util.find_spec("triton")))
    if config.compile == "on" and not can:
        raise ValueError("--compile on: needs a C compiler (cc) and, on a GPU, triton; install them or drop it")
    return config.compile == "on" or (config.compile == "auto" and is_long and can)


def tune_speed(experiment: Experiment) -> None:
    """Switch on what trades time against memory or start-up."""
    config, model = experiment.config, experiment.model
    if config.gradient_checkpointing:  # Hugging Face's towers would take False for True
        model.clip.set_grad_checkpointing(True)
    if compiles(config, experiment.examples, experiment.runtime):
        experiment.runtime.say("compiling CLIP's blocks with the first steps")
        towers.compile_blocks(model.clip)
