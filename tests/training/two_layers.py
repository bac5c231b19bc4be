"""A program of two layers and random numbers, trained by `training` alone: what any program has to bring.

PYTHONPATH=. [torchrun ...] python tests/training/two_layers.py FOLDER [--resume] [--no_dropout]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training import checkpoints, devices, loop, micro_batches, optim, resuming, run_folder, signals, tracking
from training.fit import FitOptions, fit

NUM_SAMPLES, NUM_TRAIN, BATCH_SIZE, NUM_EPOCHS = 60, 48, 8, 4
STEPS_PER_EPOCH = NUM_TRAIN // BATCH_SIZE


@dataclass(frozen=True)
class Batch:
    """Samples by number: those of this process, and the labels of all."""

    rows: np.ndarray
    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def data() -> tuple[Tensor, Tensor]:
    """(60, 5) numbers and (60, 1) labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_SAMPLES, 5, generator=generator)
    return x, x.sum(dim=1, keepdim=True).sin()


class Regression:
    """See `training.fit.Task`."""

    num_samples = NUM_TRAIN
    may_leave_unused = False

    def __init__(self, runtime: devices.Runtime, before_validation: Callable[[], object] = lambda: None) -> None:
        self.runtime = runtime
        self.before_validation = before_validation
        self.x, self.y = data()
        self.entered: list[int] = []

    def enter_epoch(self, epoch: int, saver: resuming.Saver) -> bool:
        self.entered.append(epoch)
        return False

    def batches(self, epoch: int, num_done: int) -> Iterator[Batch]:
        order = np.random.default_rng(epoch).permutation(NUM_TRAIN)
        for rows in order.reshape(-1, BATCH_SIZE)[num_done:]:
            yield Batch(rows, self.x[self.runtime.share(rows)], self.y[rows])

    def compute_losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        predicted = self.runtime.gather(model(batch.x), len(batch))
        return {"loss": nn.functional.mse_loss(predicted, batch.y)}

    def validate(
        self, model: nn.Module, before_batch: Callable[[], object]
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        self.before_validation()
        before_batch()
        model.eval()
        with torch.no_grad():
            predicted = model(self.x[NUM_TRAIN:])
        error = float(nn.functional.mse_loss(predicted, self.y[NUM_TRAIN:]))
        return {"predicted": predicted.numpy()}, {"fit": -error}

    def weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        return model.state_dict()

    def epoch_line(self, row: Mapping[str, float]) -> str:
        return f"epoch {row['epoch']}: {row['val_fit']:.6f}"


def two_layers(dropout: float = 0.1) -> nn.Sequential:
    """The network."""
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))


def train(
    folder: Path,
    *,
    resume: bool = False,
    trackers: tuple[str, ...] = (),
    dropout: float = 0.1,
    lr: float = 1e-2,
    stop_signals: signals.Signals = signals.NONE,
    before_validation: Callable[[], object] = lambda: None,
    **options: Any,
) -> tuple[resuming.Progress, Regression]:
    """Train in a folder; the weights of the best epoch end in FOLDER/best."""
    runtime = devices.start_runtime("cpu", "off")
    devices.seed_everything(1)
    model = two_layers(dropout)
    optimizer = optim.build_optimizer(model, lambda name: lr, weight_decay=0.0)
    schedule = optim.build_schedule(optimizer, kind="cosine", num_steps=NUM_EPOCHS * STEPS_PER_EPOCH, warmup_ratio=0.1)
    average = optim.WeightAverage(model, 0.5)
    micro = micro_batches.MicroBatches(lambda batch, size: [batch], enabled=False)
    state = resuming.TrainState(model, optimizer, schedule, average, micro, runtime.scaler, constant=())
    task = Regression(runtime, before_validation)
    with run_folder.RunFolder(folder, active=runtime.is_main, resume=resume) as writer:
        writer.json(run_folder.CONFIG_FILE, {"provenance": {}})
        best = checkpoints.DeferredWeights(
            lambda weights: writer.weights(checkpoints.BEST_DIR, weights, {}, lambda place: None), every_seconds=60
        )
        saver = resuming.Saver(
            checkpoints.StateFolder(folder, keep=2),
            resuming.Progress(),
            state,
            runtime,
            steps_per_epoch=STEPS_PER_EPOCH,
            every_seconds=1e-9,  # after every step
            stop_signals=stop_signals,
            before=best.flush,
            dropped=set(),
            tell=lambda error: None,
            started=0.0,
        )
        if resume:
            saver.load()
        names = list(trackers) if writer.active else []
        with tracking.Trackers(names, folder, {"lr": lr}, runtime.say) as opened, best, saver.guarding():
            chosen = FitOptions(**{"epochs": NUM_EPOCHS, "lr": lr, "select_by": "fit", **options})
            fit(task, chosen, saver, writer, best, opened)
        writer.json(run_folder.RESULTS_FILE, {"best_epoch": saver.progress.best_epoch})
        writer.forget_states()
    return saver.progress, task


if __name__ == "__main__":
    folder, *flags = sys.argv[1:]
    with signals.Signals() as listening:
        try:
            train(
                Path(folder),
                resume="--resume" in flags,
                dropout=0.0 if "--no_dropout" in flags else 0.1,
                stop_signals=listening,
            )
        except (signals.Stopped, loop.NonFiniteLoss) as error:
            print(error)
            sys.exit(signals.EXIT_TRY_AGAIN)
    devices.stop_runtime()
