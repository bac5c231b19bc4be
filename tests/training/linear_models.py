"""Linear models of three inputs on random batches, trained by `training.loop`. No tests: these import it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training import devices, loop, micro_batches, optim

SIZES = [4, 4, 4, 4, 3]  # of batches; two a step leave a last step with one shorter batch


@dataclass(frozen=True)
class Batch:
    """Inputs (B, 3), targets (B, 1) and the samples' numbers (B,)."""

    x: Tensor
    y: Tensor
    number: Tensor

    def __len__(self) -> int:
        return len(self.x)


def batches_of(sizes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Batch]:
    """Random samples in batches of the given sizes; the samples depend on their total only."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(n, 1, generator=generator, dtype=torch.float64).to(dtype)
    parts = zip(x.split(list(sizes)), y.split(list(sizes)), torch.arange(n).split(list(sizes)), strict=True)
    return [Batch(*part) for part in parts]


def split(batch: Batch, size: int) -> list[Batch]:
    """The batch in parts of at most `size` samples."""
    parts = zip(batch.x.split(size), batch.y.split(size), batch.number.split(size), strict=True)
    return [Batch(*part) for part in parts]


def linear(dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 1).to(dtype)


def mean_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"loss": (model(batch.x) - batch.y).square().mean()}


CPU = devices.Runtime(torch.device("cpu"), "off", torch.amp.GradScaler("cpu", enabled=False))


@dataclass
class Trained:
    """What a training leaves behind."""

    report: dict[str, float]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    average: optim.WeightAverage


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    compute_losses=mean_loss,
    *,
    lr: float = 0.1,
    optimizer: torch.optim.Optimizer | None = None,
    runtime: devices.Runtime = CPU,
    ema_decay: float = 0.0,
    micro: micro_batches.MicroBatches | None = None,
    **options,
) -> Trained:
    """One epoch. SGD unless told otherwise: Adam hides a gradient of the wrong size."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    schedule = optim.build_schedule(optimizer, kind="constant", num_steps=1000, warmup_ratio=0.0)
    average = optim.WeightAverage(model, ema_decay)
    report = loop.train_epoch(
        model,
        batches,
        compute_losses,
        optimizer=optimizer,
        schedule=schedule,
        runtime=runtime,
        average=average,
        micro=micro or micro_batches.MicroBatches(split, enabled=False),
        **options,
    )
    return Trained(report, optimizer, schedule, average)


def losses_of(trained: Trained) -> dict[str, float]:
    """The report without what depends on the clock."""
    return {name: value for name, value in trained.report.items() if name != "data_wait"}


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
