"""Optimiser, learning-rate schedule, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

M = TypeVar("M", bound=nn.Module)


def parameter_groups(
    model: nn.Module,
    lr_of: Callable[[str], float],
    weight_decay: float,
    part_of: Callable[[str], str] = lambda name: "",
) -> list[dict[str, Any]]:
    """Trained parameters, grouped by part, learning rate and decay: matrices decay, vectors (biases, norms) do not.

    Args:
        lr_of: name of a parameter -> its peak learning rate.
        part_of: name of a parameter -> what the group is called by "part", for a schedule of its own.
    """
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), lr_of(name), parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": weight_decay if decays else 0.0, "part": part}
        for (part, lr, decays), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module,
    lr_of: Callable[[str], float],
    *,
    weight_decay: float,
    part_of: Callable[[str], str] = lambda name: "",
) -> Optimizer:
    """AdamW over the trained parameters (Loshchilov and Hutter, 2019); see `parameter_groups`."""
    return AdamW(parameter_groups(model, lr_of, weight_decay, part_of), fused=True)


def lr_factor(step: int, *, kind: str, num_steps: int, num_warmup_steps: int) -> float:
    """Learning rate at an optimiser step, as a share of its peak.

    Linear warm-up, then: cosine or linear to 0; step (x 0.1 at half and again at three quarters); constant; or
    cyclic (four triangles between 0.1 and 1, after Smith, 2017).
    """
    if step < num_warmup_steps:
        return (step + 1) / (num_warmup_steps + 1)
    done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if kind == "linear":
        return max(0.0, 1 - done)
    if kind == "step":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    if kind == "cyclic":
        return 0.1 + 0.9 * abs(1 - 2 * (4 * done % 1))
    assert kind == "constant", kind
    return 1.0


def build_schedule(optimizer: Optimizer, *, kind: str, num_steps: int, warmup_ratio: float) -> LambdaLR:
    """The learning-rate schedule, to be advanced once per optimiser step that was really taken."""
    num_warmup_steps = round(warmup_ratio * num_steps)
    return LambdaLR(
        optimizer,
        lambda step: lr_factor(step, kind=kind, num_steps=num_steps, num_warmup_steps=num_warmup_steps),
    )


class WeightAverage(Generic[M]):
    """Exponential moving average of the weights; with decay 0 simply the model itself."""

    def __init__(self, model: M, decay: float) -> None:
        self.model = model
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None

    def update(self) -> None:
        """Take the model's present weights into the average."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    @property
    def weights(self) -> M:
        """The module to evaluate and to keep."""
        return self.model if self.averaged is None else cast(M, self.averaged.module)


def num_optimizer_steps(num_samples: int, *, batch_size: int, accumulation: int) -> int:
    """Optimiser steps of an epoch, whose last one may see fewer batches."""
    return math.ceil(math.ceil(num_samples / batch_size) / accumulation)
