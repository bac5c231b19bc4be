"""`training/devices.py`: device, precision, processes, seeds, and kernels that repeat themselves."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import random
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_models import CPU, Batch, batches_of, linear, split, train, weights
from torch import Tensor, nn

from training import devices, loop, micro_batches, optim

# Several processes: what each gets (`test_distributed.py` starts some)


def test_a_single_process_shares_with_nobody(capsys):
    rows, x, model = np.arange(7), torch.randn(7, 2, requires_grad=True), linear()
    before = weights(model)
    np.testing.assert_array_equal(CPU.share(rows), rows)
    assert CPU.gather(x, 7) is x
    assert CPU.agree(value := {"a": 1}) is value
    assert CPU.distribute(model, may_be_unused=True) is model
    CPU.copy_weights(model)
    CPU.barrier()
    with CPU.main_first():
        CPU.say("once")
    assert torch.equal(weights(model), before)
    assert capsys.readouterr().out == "once\n"


@given(world=st.integers(1, 9), n=st.integers(1, 40), start=st.integers(0, 5))
@settings(max_examples=100)
def test_shares_are_disjoint_and_together_the_batch_and_nobody_gets_nothing(world, n, start):
    rows = start + 3 * np.arange(n)
    shares = [replace(CPU, rank=rank, world=world).share(rows) for rank in range(world)]
    assert min(map(len, shares)) >= 1
    assert max(map(len, shares)) == math.ceil(n / world)
    assert sorted(np.concatenate(shares[: min(n, world)])) == rows.tolist()
    assert all(set(share) <= set(rows) for share in shares)


def test_only_the_first_process_speaks(capsys):
    for rank in (1, 0, 2):
        replace(CPU, rank=rank, world=3).say(f"here is {rank}")
    assert capsys.readouterr().out == "here is 0\n"
    assert replace(CPU, world=3).describe().startswith("3 processes, ")


@pytest.mark.parametrize(("cores", "processes", "threads"), [(40, 1, 16), (40, 4, 10), (6, 4, 1), (2, 8, 1)])
def test_processes_on_one_machine_divide_its_cores(monkeypatch, cores, processes, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert devices.num_cpus() == max(1, cores // processes)
    assert CPU.num_threads == threads


# Device and precision


@pytest.fixture
def pretended_gpu(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets torch say that there is a GPU, which is enough to choose it."""
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    yield monkeypatch
    torch.set_float32_matmul_precision(precision)


def test_asking_for_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^--device cuda: no usable GPU found"):
        devices.start_runtime("cuda", "auto")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_fp16_on_a_cpu_is_an_error(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^--amp fp16: needs a GPU"):
        devices.start_runtime(device, "fp16")


def test_auto_without_a_gpu_is_float32_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime = devices.start_runtime("auto", "auto")
    assert (runtime.device.type, runtime.precision, runtime.scaler.is_enabled()) == ("cpu", "off", False)
    assert runtime.num_ahead == 0 and runtime.free_memory() == 0
    assert runtime.describe().endswith("CPU cores, float32")
    with runtime.autocast():
        assert linear()(torch.ones(1, 3)).dtype == torch.float32


@pytest.mark.parametrize(("is_fast", "least", "precision"), [(True, 6, "bf16"), (True, 7, "off"), (False, 6, "off")])
def test_auto_on_a_cpu_is_bf16_for_large_networks_where_that_is_fast(monkeypatch, is_fast, least, precision):
    monkeypatch.setattr(devices, "has_fast_bf16", lambda: is_fast)
    monkeypatch.setattr(devices, "LEAST_WEIGHTS", least)
    network = nn.Linear(2, 2)  # of 6 weights
    assert devices.settle_precision(CPU, "auto", network).precision == precision
    assert devices.settle_precision(CPU, "off", network) == CPU


@pytest.mark.parametrize(("bf16", "is_fast"), [(1.0, True), (1.5, True), (1.6, False), (9.0, False)])
def test_bf16_is_fast_from_one_and_a_half_times_on(monkeypatch, bf16, is_fast):
    monkeypatch.setattr(devices, "seconds_of_product", {torch.float32: 2.25, torch.bfloat16: bf16}.__getitem__)
    assert devices.has_fast_bf16.__wrapped__() == is_fast


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.skipif(
    resource.getpagesize() != 4096 or (HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()),
    reason="counts pages of 4 KB",
)
def test_what_is_freed_on_a_cpu_is_used_again():
    def pages_filled() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(20_000_000)  # 80 MB, 20,000 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    devices.recycle_memory("cpu")
    assert min(pages_filled() for _ in range(5)) < 20_000


@pytest.mark.parametrize(("device", "times"), [("auto", 0), ("cuda", 0), ("cpu", 1)])
def test_with_a_gpu_the_memory_of_the_host_is_left_alone(monkeypatch, device, times):
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *option: asked.append(option)))
    devices.recycle_memory(device)
    assert len(asked) == 2 * times


def test_a_larger_product_takes_longer():
    small, large = (devices.seconds_of_product(torch.float32, size) for size in (16, 512))
    assert 0 < small < large


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_auto_with_a_gpu_takes_the_best_precision_it_has(pretended_gpu, has_bf16, precision):
    pretended_gpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    runtime = devices.start_runtime("auto", "auto")
    assert (runtime.device.type, runtime.precision) == ("cuda", precision)
    assert runtime.scaler.is_enabled() == (precision == "fp16")
    assert runtime.num_ahead > 0


def test_a_process_without_a_gpu_of_its_own_is_an_error(pretended_gpu):
    pretended_gpu.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"^process 1 has no GPU of its own: start one per GPU \(1\)"):
        devices.start_runtime("auto", "off")
    pretended_gpu.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.start_runtime("auto", "off").device == torch.device("cuda", 1)


def test_the_cpu_can_be_chosen_beside_a_gpu(pretended_gpu):
    runtime = devices.start_runtime("cpu", "auto")
    assert (runtime.device.type, runtime.precision) == ("cpu", "off")
    with pytest.raises(ValueError, match="fp16"):
        devices.start_runtime("cpu", "fp16")


def learn(runtime: devices.Runtime) -> tuple[list[float], nn.Module, int]:
    """Losses of 30 epochs on y = 2 x1 - x2, the model, and the steps taken."""
    model = linear().to(runtime.device)
    batches = [
        Batch(
            batch.x.to(runtime.device),
            (batch.x @ torch.tensor([[2.0], [-1.0], [0.0]])).to(runtime.device),
            batch.number,
        )
        for batch in batches_of([8] * 4)
    ]
    optimizer = optim.build_optimizer(model, lambda name: 0.05, weight_decay=0.0)
    schedule = optim.build_schedule(optimizer, kind="constant", num_steps=120, warmup_ratio=0.0)
    average = optim.WeightAverage(model, 0.5)
    dtypes: set[torch.dtype] = set()

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = model(batch.x)
        dtypes.add(output.dtype)
        return {"loss": (output.float() - batch.y).square().mean()}

    history = [
        loop.train_epoch(
            model,
            batches,
            losses,
            optimizer=optimizer,
            schedule=schedule,
            runtime=runtime,
            average=average,
            micro=micro_batches.MicroBatches(split, enabled=False),
            max_grad_norm=10.0,
        )["loss"]
        for _ in range(30)
    ]
    assert dtypes == {{"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[runtime.precision]}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return history, average.weights, schedule.last_epoch


@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_a_cpu_learns_in_float32_and_in_bf16(precision):
    history, model, steps = learn(devices.start_runtime("cpu", precision))
    assert history[-1] < 0.01 * history[0]
    assert model.weight.detach().flatten().tolist() == pytest.approx([2, -1, 0], abs=0.15)
    assert steps == 120


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_a_gpu_learns_in_every_precision(precision):
    runtime = devices.start_runtime("cuda", precision)
    history, model, steps = learn(runtime)
    assert runtime.scaler.is_enabled() == (precision == "fp16")
    assert history[-1] < 0.01 * history[0]
    assert model.weight.detach().flatten().tolist() == pytest.approx([2, -1, 0], abs=0.15)
    assert 100 <= steps <= 120  # fp16 begins by skipping steps until its scale fits


# -- kernels that repeat themselves


@pytest.fixture
def kernels(monkeypatch) -> Iterator[None]:
    """The settings of torch are put back in the end."""
    monkeypatch.delenv(devices.CUBLAS_WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    os.environ.pop(devices.CUBLAS_WORKSPACE, None)


def is_deterministic() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_deterministic_kernels_are_switched_both_ways_at_every_start_and_left_alone_by_who_does_not_say(kernels):
    devices.start_runtime("cpu", "off", True)
    assert is_deterministic() == (True, True, False)
    assert os.environ[devices.CUBLAS_WORKSPACE] in devices.REPEATABLE_WORKSPACES
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    devices.start_runtime("cpu", "off")
    assert is_deterministic() == (True, True, False)
    devices.start_runtime("cpu", "off", False)
    assert is_deterministic() == (False, False, False)


def test_an_environment_that_rules_deterministic_kernels_out_is_refused(kernels, monkeypatch):
    monkeypatch.setenv(devices.CUBLAS_WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match=r"--deterministic: .*=:0:0, must be :4096:8 or :16:8"):
        devices.start_runtime("cpu", "off", True)
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(devices.CUBLAS_WORKSPACE, ":16:8")
    devices.start_runtime("cpu", "off", True)
    assert os.environ[devices.CUBLAS_WORKSPACE] == ":16:8"


# Reproducibility


def seeded_run(seed: int) -> tuple[Tensor, float]:
    """Shuffling, initialisation and dropout, all from the global generators."""
    devices.seed_everything(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    batches = batches_of([4] * 6)
    random.shuffle(batches)
    batches = [batches[i] for i in np.random.permutation(6)]  # noqa: NPY002  (the global generator is meant)
    optimizer = optim.build_optimizer(model, lambda name: 0.01, weight_decay=0.1)
    trained = train(model, batches, optimizer=optimizer, ema_decay=0.9)
    return weights(trained.average.weights), trained.report["loss"]


def test_one_seed_gives_identical_weights_twice_and_another_seed_others():
    first, first_loss = seeded_run(3)
    second, second_loss = seeded_run(3)
    assert torch.equal(first, second) and first_loss == second_loss
    assert not torch.equal(first, seeded_run(4)[0])


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: np.random.rand(), lambda: float(torch.rand(1))],  # noqa: NPY002
    ids=["random", "numpy", "torch"],
)
def test_seeding_reaches_every_library(draw):
    devices.seed_everything(5)
    first = draw()
    devices.seed_everything(5)
    assert draw() == first
    devices.seed_everything(6)
    assert draw() != first


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_process_that_is_no_longer_heard_ends_the_others_in_a_line(is_alive, monkeypatch, capfd):
    monkeypatch.setattr(os, "_exit", sys.exit)
    store, seconds = dist.HashStore(), iter(range(2000))
    mine, others = devices.Pulse(store, 0, 2), devices.Pulse(store, 1, 2)
    mine.listen()

    def wait(timeout: float) -> bool:
        if is_alive:
            others.beat()
        mine.listen()
        return next(seconds, None) is None

    monkeypatch.setattr(devices.Pulse, "over", SimpleNamespace(wait=wait))
    with nullcontext() if is_alive else pytest.raises(SystemExit, match="75"):
        mine.judge()
    said = capfd.readouterr().err
    assert said.count("\n") == (not is_alive)
    assert is_alive or f"process 1 ({socket.gethostname()}) has not been heard for 300 s" in said
