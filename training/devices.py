"""Where and how precisely to compute: device, precision, processes, generators of random numbers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")

RandomState = dict[str, Any]
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


def cpu_arithmetic() -> dict[str, Any]:
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
