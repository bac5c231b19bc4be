"""Where and how precisely to compute: device, precision, processes, generators of random numbers."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training import signals

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
LEAST_WEIGHTS = 20_000_000  # of a network, from which bf16 is faster on a CPU; smaller ones spend their time elsewhere

ARRIVAL = timedelta(minutes=15)  # until all processes have to be there at the start
BEAT_SECONDS = 5.0  # how often a process says that it is alive
SILENT_SECONDS = 300.0  # without a word, after which another process counts as gone

# Of glibc's mallopt: what is given back, how many blocks are mapped for themselves, how many pools threads have.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

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

    On a CPU "auto" is "off", see `settle_precision`.

    Args:
        deterministic: see `allow_kernels`; None leaves that as it is.

    Raises:
        ValueError: for what this machine lacks.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = is_on_gpu(device)
    if device == "cuda" and not on_gpu:
        raise ValueError("--device cuda: no usable GPU found; use --device cpu")
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
        join_processes("nccl" if on_gpu else "gloo", chosen if on_gpu else None)
    scaler = torch.amp.GradScaler(chosen.type, enabled=amp == "fp16")
    rank, local_world = (dist.get_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if world > 1 else (0, 1)
    return Runtime(chosen, amp, scaler, rank=rank, world=world, local_world=local_world)


def settle_precision(runtime: Runtime, amp: str, module: nn.Module) -> Runtime:
    """With bf16 if --amp is auto, this is a CPU where that is fast, and the module large enough to gain by it."""
    is_large = sum(weight.numel() for weight in module.parameters()) >= LEAST_WEIGHTS
    if amp == "auto" and runtime.device.type == "cpu" and is_large and all(runtime.of_all(has_fast_bf16())):
        return replace(runtime, precision="bf16")
    return runtime


def is_on_gpu(device: str) -> bool:
    """Whether --device means a GPU here."""
    return device != "cpu" and torch.cuda.is_available()


def recycle_memory(device: str, *, one_pool: bool = False) -> None:
    """For programs on a CPU: let the C library keep what is freed for what is asked for next.

    glibc maps each large block, as activations are, anew, and the system fills its pages with zeros, which takes longer
    than many a layer. What the process has once had it keeps until its end.

    Args:
        one_pool: also where another than the main thread computes, whose own pools hold no large blocks. They are there
            because threads wait for one another at a single one: training in bf16 takes a fifth more time with it.
    """
    if not is_on_gpu(device) and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            mallopt(option, value)
        if one_pool:
            mallopt(M_ARENA_MAX, 1)


@cache
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16 at least 1.5 times as fast as in float32, tried in a moment."""
    whole, half = (seconds_of_product(dtype) for dtype in (torch.float32, torch.bfloat16))
    return whole >= 1.5 * half


def seconds_of_product(dtype: torch.dtype, size: int = 512) -> float:
    """The time of a product of two square matrices, the best of a few."""
    matrix = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(5):  # the first one sets things up
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return min(times)


def join_processes(backend: str, device: torch.device | None) -> None:
    """Join the other processes, and watch over them. Raises ValueError if they cannot be reached."""
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=ARRIVAL))
        pulse = Pulse(dist.PrefixStore("pulse", store.clone()), rank, world)
        pulse.watch()
        # The usual ten minutes are too few where one process waits for what another computes for a cache.
        how: dict[str, Any] = {"device_id": device, "timeout": timedelta(hours=12)}
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, **how)
    except RuntimeError as error:
        raise ValueError(
            f"the processes cannot reach each other ({str(error).splitlines()[0]}); on several machines, say by "
            f"{backend.upper()}_SOCKET_IFNAME which network card they share"
        ) from error


class Pulse:
    """Lets the other processes know that this one is alive, and ends it when one of them is no longer heard.

    What waits for another process would go on waiting for hours: a machine that is switched off, or cut from the
    network, closes no connection.
    """

    over = threading.Event()  # this process has taken leave of the others

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        """`store`: of this object alone, since one that waits for an answer lets nobody else ask."""
        self.store = store
        self.rank = rank
        self.silence = dict.fromkeys(set(range(world)) - {rank}, 0.0)  # seconds, by rank
        self.heard: dict[int, bytes] = {}
        self.beat()

    def beat(self) -> None:
        """Say that this process is alive."""
        self.store.set(str(self.rank), f"{time.monotonic()} {socket.gethostname()}")

    def watch(self) -> None:
        """Wait for all to be there, then beat and judge until the processes take leave. Raises RuntimeError."""
        self.store.wait([str(rank) for rank in self.silence], ARRIVAL)
        self.listen()
        self.over.clear()
        for work in (self.talk, self.judge):
            threading.Thread(target=work, daemon=True).start()

    def talk(self) -> None:
        """Beat and listen; without a network this may hang, which is why another thread judges."""
        while not self.over.wait(BEAT_SECONDS):
            with suppress(RuntimeError):
                self.beat()
                self.listen()

    def listen(self) -> None:
        """Note who has beaten since it was last looked at."""
        ranks = list(self.silence)
        for rank, value in zip(ranks, self.store.multi_get([str(rank) for rank in ranks]), strict=True):
            if value != self.heard.get(rank):
                self.heard[rank], self.silence[rank] = value, 0.0

    def judge(self) -> None:
        """End this process when another one has been silent for too long, while this one was awake."""
        while not self.over.wait(1.0):
            for rank in self.silence:
                self.silence[rank] += 1.0
            gone = [rank for rank, seconds in self.silence.items() if seconds > SILENT_SECONDS]
            if gone:
                host = self.heard.get(gone[0], b"").decode(errors="replace").partition(" ")[2]
                signals.tell(
                    f"stopped: process {gone[0]} ({host}) has not been heard for {SILENT_SECONDS:.0f} s, its machine "
                    "or the network must be gone; the same command goes on from what was saved, with --resume if needed"
                )
                os._exit(signals.EXIT_TRY_AGAIN)


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
    """Take leave of the other processes, if there are any, when all are ready to."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # one that has failed has said so
            dist.barrier()
        Pulse.over.set()
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
