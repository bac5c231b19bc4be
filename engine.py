"""The training machinery, knowing nothing of images or CLIP: device, precision, optimiser, epochs, selection."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

CHECK_EVERY_STEPS = 50  # losses are looked at this often, since each look makes a GPU wait


class NonFiniteLoss(RuntimeError):
    """Training broke down: a loss or a gradient is NaN or infinite."""


class SizedBatch(Protocol):
    """What the engine needs of a batch: its number of samples."""

    def __len__(self) -> int: ...


B = TypeVar("B", bound=SizedBatch)
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Runtime:
    """Where and how precisely to compute. Always complete: on a CPU the scaler and autocast do nothing."""

    device: torch.device
    precision: str  # "bf16", "fp16" or "off"
    scaler: torch.amp.GradScaler

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which to run a forward pass."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "off")

    def describe(self) -> str:
        """Device and precision in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type != "cpu" else f"{num_cpus()} CPU cores"
        return f"{name}, {'float32' if self.precision == 'off' else self.precision + ' autocast'}"

    @property
    def default_workers(self) -> int:
        """Image-reading processes that suit this machine. On a CPU they would fight with training for the cores."""
        return min(8, num_cpus()) if self.device.type != "cpu" else 0


def start_runtime(device: str, amp: str) -> Runtime:
    """Resolve "auto" device and precision. Raises ValueError for what this machine lacks."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: no usable GPU found; use --device cpu")
    on_gpu = has_gpu and device != "cpu"
    if amp == "fp16" and not on_gpu:
        raise ValueError("--amp fp16: needs a GPU; on a CPU use bf16 or off")
    if amp == "auto":
        amp = "off" if not on_gpu else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32
    chosen = torch.device("cuda" if on_gpu else "cpu")
    return Runtime(chosen, amp, torch.amp.GradScaler(chosen.type, enabled=amp == "fp16"))


def num_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_everything(seed: int) -> None:
    """Seed every library's global generator."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries may draw from it)
    torch.manual_seed(seed)


def parameter_groups(model: nn.Module, lr_of: Callable[[str], float], weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters, grouped by learning rate and decay: matrices decay, vectors (biases, norms) do not.

    Args:
        lr_of: name of a parameter -> its peak learning rate.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((lr_of(name), parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": weight_decay if decays else 0.0}
        for (lr, decays), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, lr_of: Callable[[str], float], *, weight_decay: float) -> Optimizer:
    """AdamW over the trained parameters (Loshchilov and Hutter, 2019)."""
    return AdamW(parameter_groups(model, lr_of, weight_decay), fused=True)


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


def num_optimizer_steps(num_samples: int, *, batch_size: int, accumulation: int, epochs: int) -> int:
    """Optimiser steps of a whole run; an epoch's last step may see fewer batches."""
    return math.ceil(math.ceil(num_samples / batch_size) / accumulation) * epochs


def grouped(batches: Iterable[B], size: int) -> Iterator[list[B]]:
    """Lists of `size` batches, the last perhaps shorter."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def train_epoch(
    model: M,
    batches: Iterable[B],
    compute_losses: Callable[[M, B], Mapping[str, Tensor]],
    *,
    optimizer: Optimizer,
    schedule: LambdaLR,
    runtime: Runtime,
    average: WeightAverage[M],
    accumulation: int = 1,
    max_grad_norm: float = 0.0,
    after_step: Callable[[int], None] = lambda num_samples: None,
) -> dict[str, float]:
    """Train over all batches once.

    Args:
        compute_losses: (model, batch) -> named scalar tensors, "loss" among them.
        accumulation: batches per optimiser step; each counts by its number of samples.
        after_step: called with the number of samples of each optimiser step, for progress.

    Returns:
        Mean of every named loss per sample, and "grad_norm" (before clipping; mean over the steps taken).

    Raises:
        NonFiniteLoss: names the loss (or "grad_norm") and the step.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums: dict[str, Tensor] = {}
    norms: list[Tensor] = []
    unchecked: list[tuple[int, dict[str, Tensor]]] = []
    num_samples = 0
    for step, group in enumerate(grouped(batches, accumulation), start=1):
        size = sum(len(batch) for batch in group)
        for batch in group:
            with runtime.autocast():
                losses = compute_losses(model, batch)
            runtime.scaler.scale(losses["loss"] * (len(batch) / size)).backward()
            detached = {name: value.detach() for name, value in losses.items()}
            unchecked.append((step, detached))
            for name, value in detached.items():
                # In float64: a loss may be bf16 under autocast, and a long sum in bf16 stands still.
                sums[name] = sums.get(name, 0.0) + value.double() * len(batch)
        runtime.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        if take_step(optimizer, runtime.scaler):
            schedule.step()
            average.update()
            norms.append(norm)
            unchecked.append((step, {"grad_norm": norm}))
        optimizer.zero_grad(set_to_none=True)
        num_samples += size
        if step % CHECK_EVERY_STEPS == 0:
            check_finite(unchecked)
            unchecked.clear()
        after_step(size)
    check_finite(unchecked)
    means = {name: float(total) / num_samples for name, total in sums.items()}
    return {**means, "grad_norm": float(torch.stack(norms).mean()) if norms else math.nan}


def take_step(optimizer: Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Step through the scaler; False if it skipped the step because of an overflow in fp16."""
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale


def check_finite(losses: Sequence[tuple[int, Mapping[str, Tensor]]]) -> None:
    """Raise NonFiniteLoss for the first value that is not finite."""
    for step, terms in losses:
        for name, value in terms.items():
            if not math.isfinite(float(value)):
                raise NonFiniteLoss(
                    f"{name} is {float(value)} at step {step} of this epoch: lower --lr, set --max_grad_norm 1, or "
                    "use --amp off"
                )


@torch.inference_mode()
def predict(
    model: M,
    batches: Iterable[B],
    compute_scores: Callable[[M, B], Mapping[str, Tensor]],
    *,
    runtime: Runtime,
) -> dict[str, np.ndarray]:
    """Score every batch in eval mode, in order: named (n,) arrays. Every sample counts, the last batch's too."""
    model.eval()
    collected: dict[str, list[Tensor]] = {}
    for batch in batches:
        with runtime.autocast():
            scores = compute_scores(model, batch)
        for name, value in scores.items():
            collected.setdefault(name, []).append(value.float())
    return {name: torch.cat(parts).cpu().numpy().astype(np.float64) for name, parts in collected.items()}


def best_epoch(scores: Sequence[float]) -> int:
    """Which epoch to keep, counted from 1: the first of those with the highest validation score."""
    return int(np.argmax(scores)) + 1


def should_stop(scores: Sequence[float], *, patience: int, min_delta: float) -> bool:
    """Whether the last `patience` epochs brought no gain on the best before them; 0 never stops.

    A gain is a rise, and of no less than `min_delta`.
    """
    if patience == 0 or len(scores) <= patience:
        return False
    rise = max(scores[-patience:]) - max(scores[:-patience])
    return rise <= 0 or rise < min_delta
