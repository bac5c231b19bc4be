"""The training machinery, knowing nothing of images or CLIP: device, precision, optimiser, epochs, selection."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
CHECK_EVERY_STEPS = 50  # losses are looked at this often where each look makes a GPU wait
MOST_SKIPPED_STEPS = 30  # in a row under fp16: halved so often, a loss scale of 65,536 is at its end


class NonFiniteLoss(RuntimeError):
    """Training broke down: a loss or a gradient is NaN or infinite.

    Attributes:
        metric, value, step: what it was, and at which optimiser step of the epoch, from 1.
        samples: the samples of that step.
    """

    def __init__(self, metric: str, value: float, *, step: int, samples: Sequence[int] = ()) -> None:
        ways = "lower --lr, set --max_grad_norm 1, or use --amp off"
        super().__init__(f"{metric} is {value} at step {step} of this epoch: {ways}")
        self.metric, self.value, self.step, self.samples = metric, value, step, list(samples)


class OutOfMemory(RuntimeError):
    """The memory does not suffice, and nothing smaller is left to try."""


class SizedBatch(Protocol):
    """What the engine needs of a batch: its number of samples, over all processes."""

    def __len__(self) -> int: ...


RandomState = dict[str, Any]
B = TypeVar("B", bound=SizedBatch)
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """Where and how precisely to compute, and with how many processes. Always complete: on a CPU the scaler and
    autocast do nothing, and a single process shares with nobody."""

    device: torch.device
    precision: str  # "bf16", "fp16" or "off"
    scaler: torch.amp.GradScaler
    rank: int = 0
    world: int = 1
    local_world: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[self.precision]

    @property
    def num_threads(self) -> int:
        """Threads for work beside the model, such as decoding images."""
        return min(16, num_cpus())

    @property
    def num_ahead(self) -> int:
        """Batches to prepare while the model computes. On a CPU that would take cores from it."""
        return 0 if self.device.type == "cpu" else 2

    @property
    def hide_progress(self) -> bool | None:
        """tqdm's `disable`: the first process lets it decide by whether there is a terminal."""
        return None if self.is_main else True

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which to run a forward pass."""
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=self.precision != "off")

    def describe(self) -> str:
        """Device, number of processes and precision in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type != "cpu" else f"{num_cpus()} CPU cores"
        processes = f"{self.world} processes, " if self.world > 1 else ""
        return f"{processes}{name}, {'float32' if self.precision == 'off' else self.precision + ' autocast'}"

    def say(self, text: str) -> None:
        """Print, in one process only."""
        if self.is_main:
            print(text, flush=True)

    def free_memory(self) -> float:
        """Bytes that can still be had on a GPU; 0 on a CPU, whose memory is the host's."""
        if self.device.type == "cpu":
            return 0
        gpu = torch.get_device_module(self.device)
        pooled = gpu.memory_reserved(self.device) - gpu.memory_allocated(self.device)
        return gpu.mem_get_info(self.device)[0] + pooled

    def peak_memory(self) -> float:
        """The most bytes that this process has ever had on a GPU; 0 on a CPU."""
        return 0 if self.device.type == "cpu" else torch.get_device_module(self.device).max_memory_reserved(self.device)

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of a batch's rows: every `world`-th. One that gets none takes the first, uncounted."""
        own = rows[self.rank :: self.world]
        return own if len(own) else rows[:1]

    def gather(self, x: Tensor, size: int) -> Tensor:
        """Put together what all processes computed on their shares of `size` rows: (b, ...) -> (size, ...).

        A gradient flows to this process's own rows; summed over processes it is the whole gradient.
        """
        if self.world == 1:
            return x
        counts = [len(range(rank, size, self.world)) for rank in range(self.world)]
        own = x[: counts[self.rank]]
        padded = x.new_zeros((counts[0], *x.shape[1:]))
        padded[: len(own)] = own.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        whole = x.new_empty((size, *x.shape[1:]))
        for rank, (part, count) in enumerate(zip(parts, counts, strict=True)):
            whole[rank :: self.world] = own if rank == self.rank else part[:count]
        return whole

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process through before the others, to make what they then find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value: T) -> T:
        """The first process's value, in all processes."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def of_all(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def of_main(self, compute: Callable[[], T]) -> T:
        """What the first process computes, in all processes."""
        return self.agree(compute() if self.is_main else cast(T, None))

    def distribute(self, model: nn.Module, *, may_be_unused: bool) -> nn.Module:
        """The model to train: with several processes, one that averages gradients over them.

        `may_be_unused`: some trained parameters may get no gradient.
        """
        if self.world == 1:
            return model
        return DistributedDataParallel(model, find_unused_parameters=may_be_unused, gradient_as_bucket_view=True)

    def copy_weights(self, model: nn.Module) -> None:
        """Give all processes the first one's weights."""
        if self.world > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)


def start_runtime(device: str, amp: str, deterministic: bool | None = None) -> Runtime:
    """Resolve "auto" device and precision; join the other processes if torchrun has started several.

    Args:
        deterministic: see `allow_kernels`; None leaves that as it is.

    Raises:
        ValueError: for what this machine lacks.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: no usable GPU found; use --device cpu")
    on_gpu = has_gpu and device != "cpu"
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ValueError(f"process {local_rank} has no GPU of its own: start one per GPU ({torch.cuda.device_count()})")
    if amp == "fp16" and not on_gpu:
        raise ValueError("--amp fp16: needs a GPU; on a CPU use bf16 or off")
    if amp == "auto":
        amp = "off" if not on_gpu else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if deterministic is not None:
        allow_kernels(deterministic=deterministic)
    chosen = torch.device("cpu")
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        # The usual ten minutes are too few where one process waits for what another computes for a cache.
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", device_id=chosen if on_gpu else None, timeout=timedelta(hours=12)
        )
    scaler = torch.amp.GradScaler(chosen.type, enabled=amp == "fp16")
    rank, local_world = (dist.get_rank(), int(os.environ["LOCAL_WORLD_SIZE"])) if world > 1 else (0, 1)
    return Runtime(chosen, amp, scaler, rank=rank, world=world, local_world=local_world)


def allow_kernels(*, deterministic: bool) -> None:
    """Let torch use all kernels, or only those that give the same result every time, from here on.

    TF32 stays on: it rounds more, but always alike. Raises ValueError if the environment rules it out.
    """
    if deterministic:  # cuBLAS reads this when it starts
        given = os.environ.setdefault(CUBLAS_WORKSPACE, REPEATABLE_WORKSPACES[0])
        if given not in REPEATABLE_WORKSPACES:
            allowed = " or ".join(REPEATABLE_WORKSPACES)
            raise ValueError(f"--deterministic: the environment has {CUBLAS_WORKSPACE}={given}, must be {allowed}")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False


def stop_runtime() -> None:
    """Take leave of the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def num_cpus() -> int:
    """Cores for this process: those it may use, divided among the processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def arithmetic() -> dict[str, Any]:
    """What sums are rounded by on a CPU: "threads" that share them, and the "instructions" they are computed with."""
    return {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}


def num_gpus() -> int:
    """GPUs that this process can see."""
    return torch.cuda.device_count()


def seed_everything(seed: int) -> None:
    """Seed every library's global generator."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries may draw from it)
    torch.manual_seed(seed)


def random_state(runtime: Runtime) -> RandomState:
    """The state of every library's global generator, and of the device's."""
    state: RandomState = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if runtime.device.type != "cpu":
        state["device"] = torch.get_device_module(runtime.device).get_rng_state(runtime.device)
    return state


def set_random_state(state: RandomState, runtime: Runtime) -> None:
    """Go back to what `random_state` returned; a GPU that it knows nothing of is left as it is."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if runtime.device.type != "cpu" and "device" in state:
        torch.get_device_module(runtime.device).set_rng_state(state["device"], runtime.device)


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


class Stopwatch:
    """Adds up the time that is spent waiting for items."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, unchanged."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item


class MicroBatches(Generic[B]):
    """Cuts batches into as many parts as memory demands; the optimiser still sees whole ones.

    Args:
        split: (batch, size) -> the batch in parts of at most `size` samples.
        enabled: False never cuts: too little memory is then the user's to solve.
        max_usage: share of a GPU's memory that the first size may plan for.
    """

    def __init__(self, split: Callable[[B, int], list[B]], *, enabled: bool, max_usage: float = 0.9) -> None:
        self.split = split
        self.enabled = enabled
        self.max_usage = max_usage
        self.size: int | None = None  # None: whole batches
        self.probed = False

    def parts(self, batch: B) -> list[B]:
        """The batch, in parts if it is too large."""
        return [batch] if self.size is None else self.split(batch, self.size)

    def halve(self, largest: int) -> None:
        """Memory ran out with parts of up to `largest` samples. Raises OutOfMemory if nothing smaller is left."""
        if not self.enabled:
            raise OutOfMemory(
                f"out of memory with {largest} images at once: add --gradient_checkpointing or (in one process) "
                "--dynamic_batch_size, lower --batch_size, freeze more layers, or --no_cache"
            )
        if largest == 1:
            raise OutOfMemory("out of memory with a single image at once: add --gradient_checkpointing, freeze more")
        self.size = (largest + 1) // 2
        print(f"note      out of memory: from here on {self.size} images at once, steps stay as large", flush=True)

    def probe(self, batch: B, run: Callable[[list[B]], object], runtime: Runtime, reserve: float = 0) -> None:
        """Choose the first size on a GPU: the batch halved until the memory it should take fits, beside `reserve`."""
        if self.probed:
            return
        self.probed = True
        if not self.enabled or runtime.device.type == "cpu" or len(batch) < 4:
            return
        gpu = torch.get_device_module(runtime.device)

        def peak(size: int) -> float:
            gpu.reset_peak_memory_stats(runtime.device)
            try:
                with torch.random.fork_rng(devices=[runtime.device], device_type=runtime.device.type):
                    run([self.split(batch, size)[0]])
            except torch.OutOfMemoryError:
                return math.inf
            return gpu.max_memory_allocated(runtime.device)

        budget = self.max_usage * gpu.mem_get_info(runtime.device)[1] - reserve
        peak(1)  # leaves gradients behind, which from then on take their place in both measurements
        size = fitting_size(len(batch), peak(1), peak(2), budget)
        if size < len(batch):
            self.size = size
            print(f"note      {size} images at once fit into {self.max_usage:.0%} of the memory, steps stay as large")


def fitting_size(batch_size: int, bytes_of_1: float, bytes_of_2: float, budget: float) -> int:
    """`batch_size` halved until memory, which grows linearly with it, stays within the budget; at least 1."""
    size = batch_size
    while size > 1 and not bytes_of_1 + (size - 1) * (bytes_of_2 - bytes_of_1) <= budget:  # NaN if both are infinite
        size = (size + 1) // 2
    return size


def train_epoch(
    model: nn.Module,
    batches: Iterable[B],
    compute_losses: Callable[[nn.Module, B], Mapping[str, Tensor]],
    *,
    optimizer: Optimizer,
    schedule: LambdaLR,
    runtime: Runtime,
    average: WeightAverage,
    micro: MicroBatches[B],
    accumulation: int = 1,
    max_grad_norm: float = 0.0,
    record: EpochRecord | None = None,
    samples_of: Callable[[B], Sequence[int]] = lambda batch: (),
    after_step: Callable[[int], None] = lambda num_samples: None,
) -> dict[str, float]:
    """Train over all batches once.

    Args:
        model: as `Runtime.distribute` returns it.
        compute_losses: (model, batch) -> named scalar tensors of the whole batch, "loss" among them.
        micro: how batches are cut where memory is short.
        accumulation: batches per optimiser step; each counts by its number of samples.
        record: takes in every step; with steps in it, the epoch is gone on with, and `batches` are those left.
        samples_of: numbers of a batch's samples, to be named if they break training.
        after_step: called with the number of samples of each optimiser step, when it is in the record.

    Returns:
        Mean of every named loss per sample, "grad_norm" (before clipping; mean over the steps taken), and
        "data_wait", the share of the time in which this process waited for the next batch.

    Raises:
        NonFiniteLoss: names the loss (or "grad_norm") and the step, with the weights as they were before it.
        OutOfMemory: says what to change.
    """
    model.train()
    record = EpochRecord() if record is None else record
    watch, began = Stopwatch(), (time.perf_counter() - record.seconds, record.waited)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    record.random = random_state(runtime)
    for group in grouped(watch.over(batches), accumulation):
        losses = gradients(model, group, compute_losses, optimizer=optimizer, runtime=runtime, micro=micro)
        runtime.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        is_broken = record.is_broken_by(losses, norm)
        is_taken = take_step(optimizer, runtime.scaler, is_broken)
        if is_taken:
            schedule.step()
            average.update()
        optimizer.zero_grad(set_to_none=True)
        samples = [row for batch in group for row in samples_of(batch)]
        record.add(Step(losses, norm, is_taken, samples, record.random), is_broken)
        record.seconds, record.waited = time.perf_counter() - began[0], began[1] + watch.seconds
        record.random = random_state(runtime)
        after_step(sum(len(batch) for batch in group))
    return {**record.means(), "data_wait": record.waited / max(record.seconds, 1e-9)}


@dataclass
class Step:
    """An optimiser step that the record has not taken in yet: its losses may be on their way from a GPU."""

    losses: Sequence[tuple[int, dict[str, Tensor]]]  # (samples, losses) of its parts
    norm: Tensor
    is_taken: bool  # fp16 scaling did not skip it
    samples: Sequence[int]
    random: RandomState  # before it

    def first_non_finite(self) -> tuple[str, float] | None:
        """Name and value of the first loss or norm that is not finite."""
        values = [(name, float(value)) for _, terms in self.losses for name, value in terms.items()]
        return next((item for item in (*values, ("grad_norm", float(self.norm))) if not math.isfinite(item[1])), None)


class EpochRecord:
    """Losses and gradient norms of an epoch's steps; they are fetched from a GPU now and then only.

    Until they are, no step is taken after one whose values are not finite: see `is_broken_by`.
    """

    KEPT = (
        *("step", "num_samples", "num_measured", "num_skipped", "num_taken"),
        *("sums", "norm_sum", "seconds", "waited"),
    )

    def __init__(self) -> None:
        self.step = 0  # how many it has taken in
        self.num_samples = 0
        self.num_measured = 0  # without those whose losses an overflow in fp16 has spoilt
        self.num_skipped = 0  # steps in a row that fp16 scaling has skipped
        self.num_taken = 0
        self.sums: dict[str, Tensor] = {}  # from a state they lie on the CPU, where any device adds to them
        self.norm_sum: Tensor | float = 0.0  # over the steps taken
        self.seconds = 0.0  # of training, and those of them that went into waiting for batches
        self.waited = 0.0
        self.pending: list[Step] = []
        self.is_broken: Tensor | None = None  # 1.0 from the first step on whose values are not finite
        self.random: RandomState = {}  # before the step that comes next

    def state(self) -> dict[str, Any]:
        """What a new record needs to go on as this one. Raises NonFiniteLoss, see `settle`."""
        self.settle()
        return {name: getattr(self, name) for name in self.KEPT}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on as the record whose `state` this is."""
        vars(self).update(state)

    def is_broken_by(self, losses: Sequence[tuple[int, dict[str, Tensor]]], norm: Tensor) -> Tensor:
        """1.0 if a step of these values must not be taken: it or one before it is not finite. Stays on the device."""
        values = [value.float() for _, terms in losses for value in terms.values()]
        broken = 1 - torch.stack([*values, norm.float()]).isfinite().all().float()
        return broken if self.is_broken is None else torch.maximum(self.is_broken, broken)

    def add(self, step: Step, is_broken: Tensor) -> None:
        """Take in an optimiser step, or hold it until the next look at the device."""
        self.num_skipped = 0 if step.is_taken else self.num_skipped + 1
        if step.is_taken:
            self.is_broken = is_broken
        elif self.num_skipped == MOST_SKIPPED_STEPS:
            self.is_broken = torch.ones_like(is_broken)
        self.pending.append(step)
        if step.norm.device.type == "cpu" or len(self.pending) >= CHECK_EVERY_STEPS:
            self.settle()

    def settle(self) -> None:
        """Take in all steps, with one look, for which a GPU is waited for once.

        Raises:
            NonFiniteLoss: for the first one that is not finite; the record, and `random`, are as before that step.
        """
        pending, self.pending = self.pending, []
        is_broken = self.is_broken is not None and bool(self.is_broken)
        for step in pending:
            found = step.first_non_finite() if is_broken and (step.is_taken or step is pending[-1]) else None
            if found:
                self.random, self.is_broken = step.random, None
                raise NonFiniteLoss(*found, step=self.step + 1, samples=step.samples)
            self.take_in(step)

    def take_in(self, step: Step) -> None:
        """Add a step's values up."""
        self.step += 1
        if step.is_taken:
            self.num_taken += 1
            self.norm_sum = self.norm_sum + step.norm.double()
        for size, terms in step.losses:
            self.num_samples += size
            if step.is_taken or bool(torch.stack([value.float() for value in terms.values()]).isfinite().all()):
                self.num_measured += size
                for name, value in terms.items():
                    # In float64: a loss may be bf16 under autocast, and a long sum in bf16 stands still.
                    self.sums[name] = self.sums.get(name, 0.0) + value.double() * size

    def means(self) -> dict[str, float]:
        """Mean of every loss per sample, and of the gradient norm over the steps taken. Raises NonFiniteLoss."""
        self.settle()
        means = {name: float(total) / self.num_measured for name, total in self.sums.items()}
        return {**means, "grad_norm": float(self.norm_sum) / self.num_taken if self.num_taken else math.nan}


def gradients(
    model: nn.Module,
    group: Sequence[B],
    compute_losses: Callable[[nn.Module, B], Mapping[str, Tensor]],
    *,
    optimizer: Optimizer,
    runtime: Runtime,
    micro: MicroBatches[B],
) -> list[tuple[int, dict[str, Tensor]]]:
    """Compute the gradients of one optimiser step, in smaller parts if memory runs out.

    Returns:
        (samples, losses) of each part.
    """
    size = sum(len(batch) for batch in group)

    def run(parts: list[B]) -> list[tuple[int, dict[str, Tensor]]]:
        return backward(model, parts, compute_losses, size=size, runtime=runtime)

    if not micro.probed:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        micro.probe(group[0], run, runtime, reserve=8 * trained)  # AdamW's two moments come with the first step
    while True:
        optimizer.zero_grad(set_to_none=True)  # what the probe or a failed attempt has left
        parts = [part for batch in group for part in micro.parts(batch)]
        try:
            return run(parts)
        except torch.OutOfMemoryError:
            pass
        micro.halve(max(len(part) for part in parts))  # outside of `except`, whose traceback holds on to memory


def backward(
    model: nn.Module,
    parts: Sequence[B],
    compute_losses: Callable[[nn.Module, B], Mapping[str, Tensor]],
    *,
    size: int,
    runtime: Runtime,
) -> list[tuple[int, dict[str, Tensor]]]:
    """Add up the gradients of one optimiser step of `size` samples; returns (samples, losses) of each part."""
    found = []
    for number, part in enumerate(parts, start=1):
        # Gradients are averaged over processes once, with the last part.
        is_last = number == len(parts)
        with nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            with runtime.autocast():
                losses = compute_losses(model, part)
            # Each process holds its own rows' part of the gradient, and averaging divides by their number.
            loss = losses["loss"] * (runtime.world * len(part) / size)
            runtime.scaler.scale(loss).backward()
        found.append((len(part), {name: value.detach() for name, value in losses.items()}))
    return found


def take_step(optimizer: Optimizer, scaler: torch.amp.GradScaler, is_broken: Tensor) -> bool:
    """Step through the scaler; False if it skipped the step because of an overflow in fp16.

    Without scaling a step that `is_broken` (1.0) changes nothing; nobody waits for a GPU to say so.
    """
    if not scaler.is_enabled():
        optimizer.found_inf = is_broken  # type: ignore[attr-defined]  # the fused kernel looks at it
        optimizer.step()
        return True
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale


@torch.inference_mode()
def predict(
    model: M,
    batches: Iterable[B],
    compute_scores: Callable[[M, B], Mapping[str, Tensor]],
    *,
    runtime: Runtime,
    before_batch: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """Score every batch in eval mode, in order: named (n,) arrays. Every sample counts, the last batch's too."""
    model.eval()
    collected: dict[str, list[Tensor]] = {}
    for batch in batches:
        before_batch()
        with runtime.autocast():
            scores = compute_scores(model, batch)
        for name, value in scores.items():
            collected.setdefault(name, []).append(runtime.gather(value.float(), len(batch)))
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
