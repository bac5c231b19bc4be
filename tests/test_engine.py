"""`engine.py` on small linear models: schedules, steps, cut batches, averages, exact prediction, selection."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import engine

KINDS = ["cosine", "linear", "step", "cyclic", "constant"]
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


CPU = engine.Runtime(torch.device("cpu"), "off", torch.amp.GradScaler("cpu", enabled=False))


@dataclass
class Trained:
    """What a training leaves behind."""

    report: dict[str, float]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    average: engine.WeightAverage


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    compute_losses=mean_loss,
    *,
    lr: float = 0.1,
    optimizer: torch.optim.Optimizer | None = None,
    runtime: engine.Runtime = CPU,
    ema_decay: float = 0.0,
    micro: engine.MicroBatches | None = None,
    **options,
) -> Trained:
    """One epoch. SGD unless told otherwise: Adam hides a gradient of the wrong size."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    schedule = engine.build_schedule(optimizer, kind="constant", num_steps=1000, warmup_ratio=0.0)
    average = engine.WeightAverage(model, ema_decay)
    report = engine.train_epoch(
        model,
        batches,
        compute_losses,
        optimizer=optimizer,
        schedule=schedule,
        runtime=runtime,
        average=average,
        micro=micro or engine.MicroBatches(split, enabled=False),
        **options,
    )
    return Trained(report, optimizer, schedule, average)


def losses_of(trained: Trained) -> dict[str, float]:
    """The report without what depends on the clock."""
    return {name: value for name, value in trained.report.items() if name != "data_wait"}


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# Learning rates


def factors(kind: str, num_steps: int, num_warmup_steps: int = 0) -> list[float]:
    """The factor at every step, and at the one after the last."""
    return [
        engine.lr_factor(step, kind=kind, num_steps=num_steps, num_warmup_steps=num_warmup_steps)
        for step in range(num_steps + 1)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_a_straight_line_from_above_zero_to_the_peak(kind):
    rising = factors(kind, 50, 7)[: 7 + 1]
    assert rising == pytest.approx(np.linspace(1 / 8, 1, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_has_the_peak_rate(kind):
    assert factors(kind, 20)[0] == 1.0


def test_cosine_is_that_of_torch_and_ends_at_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = CosineAnnealingLR(optimizer, T_max=40)
    expected = []
    for _ in range(41):
        expected.append(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()
    assert factors("cosine", 45, 5)[5:] == pytest.approx(expected, abs=1e-12)
    assert factors("cosine", 45, 5)[-1] == 0.0


def test_linear_falls_in_a_straight_line_to_zero():
    assert factors("linear", 45, 5)[5:] == pytest.approx(np.linspace(1, 0, 41))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_what_ends_at_zero_stays_there(kind):
    assert {engine.lr_factor(step, kind=kind, num_steps=40, num_warmup_steps=5) for step in range(40, 90)} == {0.0}


def test_step_drops_tenfold_at_half_and_at_three_quarters():
    assert factors("step", 48, 8)[8:-1] == pytest.approx([1.0] * 20 + [0.1] * 10 + [0.01] * 10)


def test_cyclic_is_four_triangles_between_a_tenth_and_one():
    corners = np.linspace(0, 80, 9)
    heights = [1, 0.1] * 4 + [1]
    assert factors("cyclic", 90, 10)[10:] == pytest.approx(np.interp(np.arange(81), corners, heights))


def test_constant_stays_at_the_peak_after_warm_up():
    assert factors("constant", 30, 4)[4:] == [1.0] * 27


@given(kind=st.sampled_from(KINDS), num_steps=st.integers(1, 300), ratio=st.floats(0, 1), beyond=st.integers(0, 50))
@settings(max_examples=100)
def test_no_factor_is_negative_or_above_the_peak_even_after_the_last_step(kind, num_steps, ratio, beyond):
    num_warmup_steps = round(ratio * num_steps)
    options = {"kind": kind, "num_steps": num_steps, "num_warmup_steps": num_warmup_steps}
    values = [engine.lr_factor(step, **options) for step in range(num_steps + beyond)]
    assert all(0 <= value <= 1 for value in values)
    assert all(value > 0 for value in values[:num_steps])
    if kind == "cyclic":
        assert all(value >= 0.1 - 1e-12 for value in values[num_warmup_steps:])


@pytest.mark.parametrize(("kind", "slope"), [("cosine", math.pi / 2), ("linear", 1), ("cyclic", 7.2), ("constant", 0)])
@pytest.mark.parametrize("num_warmup_steps", [0, 1, 30, 150])
def test_every_kind_but_step_is_continuous(kind, slope, num_warmup_steps):
    steepest = max(slope / (300 - num_warmup_steps), 1 / (num_warmup_steps + 1) if num_warmup_steps else 0)
    assert np.abs(np.diff(factors(kind, 300, num_warmup_steps))).max() <= steepest + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_keeps_the_ratios_between_parameter_groups(kind):
    peaks = [1e-3, 1e-4, 3e-7]
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in peaks], lr=0.5)
    schedule = engine.build_schedule(optimizer, kind=kind, num_steps=40, warmup_ratio=0.1)
    seen = []
    for _ in range(40):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(seen, np.outer(factors(kind, 40, 4)[:-1], peaks), rtol=1e-12)


# Parameter groups


class Mixed(nn.Module):
    """Matrices, biases, a norm, a scalar, a frozen layer and two layers that share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.head.weight
        self.scale = nn.Parameter(torch.ones(()))


def test_only_matrices_decay_and_every_parameter_has_its_own_learning_rate():
    model = Mixed()
    rates = {"body.0.weight": 1e-5, "body.0.bias": 1e-5, "body.1.weight": 1e-5, "body.1.bias": 2e-5}
    groups = engine.parameter_groups(model, lambda name: rates.get(name, 1e-3), 0.25)
    found = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert {name: found.get(id(parameter)) for name, parameter in model.named_parameters()} == {
        "frozen.weight": None,
        "frozen.bias": None,
        "body.0.weight": (1e-5, 0.25),
        "body.0.bias": (1e-5, 0.0),
        "body.1.weight": (1e-5, 0.0),
        "body.1.bias": (2e-5, 0.0),
        "head.weight": (1e-3, 0.25),
        "scale": (1e-3, 0.0),
    }


def test_every_trained_parameter_is_in_exactly_one_group():
    model = Mixed()
    groups = engine.parameter_groups(model, lambda name: len(name) * 1e-4, 0.1)
    listed = sorted(id(parameter) for group in groups for parameter in group["params"])
    assert listed == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_the_optimizer_shrinks_matrices_alone_when_gradients_are_zero():
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model)
    optimizer = engine.build_optimizer(model, lambda name: 0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight, before.weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, before.bias)


# One epoch of training


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("accumulation", [2, 3, 5, 9])
def test_accumulated_batches_train_as_one_big_batch_does(dtype, tolerance, accumulation):
    small, big = linear(dtype), linear(dtype)
    groups = [SIZES[i : i + accumulation] for i in range(0, len(SIZES), accumulation)]
    in_parts = train(small, batches_of(SIZES, dtype), accumulation=accumulation)
    at_once = train(big, batches_of([sum(group) for group in groups], dtype))
    torch.testing.assert_close(weights(small), weights(big), atol=tolerance, rtol=tolerance)
    assert losses_of(in_parts) == pytest.approx(losses_of(at_once), rel=1e-5)
    assert in_parts.schedule.last_epoch == len(groups)


def test_steps_are_those_of_plain_gradient_descent():
    model, naive = linear(torch.float64), linear(torch.float64)
    train(model, batches_of(SIZES, torch.float64), lr=0.05)
    for batch in batches_of(SIZES, torch.float64):
        gradients = torch.autograd.grad((naive(batch.x) - batch.y).square().mean(), list(naive.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(naive.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
    torch.testing.assert_close(weights(model), weights(naive), atol=1e-14, rtol=1e-14)


def gradient_at_step(max_grad_norm: float) -> tuple[Tensor, Tensor, float]:
    """The gradient as it is, the one the optimiser sees, and the norm reported."""
    model, (batch,) = linear(torch.float64), batches_of([8], torch.float64)
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(mean_loss(model, batch)["loss"], model.parameters())])
    seen: list[Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()]))
    )
    report = train(model, [batch], optimizer=optimizer, max_grad_norm=max_grad_norm).report
    return whole, seen[0], report["grad_norm"]


def test_gradients_are_clipped_to_the_norm_and_keep_their_direction():
    whole, seen, _ = gradient_at_step(0.25)
    assert whole.norm() > 0.5
    torch.testing.assert_close(seen, whole * (0.25 / whole.norm()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e6])
def test_gradients_stay_whole_with_clipping_off_or_out_of_reach(max_grad_norm):
    whole, seen, _ = gradient_at_step(max_grad_norm)
    torch.testing.assert_close(seen, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.25])
def test_the_reported_gradient_norm_is_the_one_before_clipping(max_grad_norm):
    whole, _, reported = gradient_at_step(max_grad_norm)
    assert reported == pytest.approx(float(whole.norm()))


def test_no_gradient_is_left_for_the_next_epoch():
    model = linear()
    train(model, batches_of(SIZES))
    assert all(parameter.grad is None for parameter in model.parameters())


def number_losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Terms whose mean over samples is known."""
    return {"loss": model(batch.x).mean() * 0, "number": batch.number.float().mean(), "tenth": torch.tensor(0.1)}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_reported_losses_are_means_over_samples_not_over_batches(accumulation):
    report = train(linear(), batches_of([10, 4, 1]), number_losses, accumulation=accumulation).report
    assert report.keys() == {"loss", "number", "tenth", "grad_norm", "data_wait"}
    assert report["number"] == pytest.approx(7.0)
    assert report["tenth"] == pytest.approx(0.1)


def test_long_means_are_exact_although_the_losses_are_bf16():
    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": model(batch.x).mean() * 0, "half": torch.tensor(0.5, dtype=torch.bfloat16)}

    assert train(linear(), batches_of([1] * 400), losses).report["half"] == 0.5


def test_the_callback_hears_the_number_of_samples_of_every_step():
    heard: list[int] = []
    train(linear(), batches_of(SIZES), accumulation=2, after_step=heard.append)
    assert heard == [8, 8, 3]


def test_training_uses_train_mode_even_after_an_evaluation():
    model = linear().eval()
    modes: list[bool] = []

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        modes.append(model.training)
        return mean_loss(model, batch)

    train(model, batches_of([2, 2]), losses)
    assert modes == [True, True]


def test_frozen_parameters_neither_move_nor_count_in_the_gradient_norm():
    model = linear(torch.float64)
    model.bias.requires_grad_(False)
    bias = model.bias.clone()
    (batch,) = batches_of([8], torch.float64)
    gradient = torch.autograd.grad(mean_loss(model, batch)["loss"], model.weight)[0]
    optimizer = engine.build_optimizer(model, lambda name: 0.1, weight_decay=0.5)
    report = train(model, [batch], optimizer=optimizer).report
    assert torch.equal(model.bias, bias)
    assert report["grad_norm"] == pytest.approx(float(gradient.norm()))


# Waiting for batches


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock for the engine that shows `now` and stands still."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def slow_items(clock: SimpleNamespace, items: Sequence, seconds: float, end: float = 0.0) -> Iterator:
    """The items, each of which takes so many seconds; finding that there are no more takes `end`."""
    for item in items:
        clock.now += seconds
        yield item
    clock.now += end


def test_a_stopwatch_counts_the_waiting_and_not_the_work_between(clock):
    watch = engine.Stopwatch()
    seen = []
    for item in watch.over(slow_items(clock, "abc", seconds=2.0, end=0.5)):
        clock.now += 64.0
        seen.append(item)
    assert seen == ["a", "b", "c"]
    assert watch.seconds == 3 * 2.0 + 0.5


def test_a_stopwatch_adds_up_over_several_rounds_and_counts_what_failed(clock):
    watch = engine.Stopwatch()

    def failing() -> Iterator[int]:
        clock.now += 4.0
        raise OSError("no such image")
        yield 0

    assert list(watch.over(slow_items(clock, range(3), seconds=1.0))) == [0, 1, 2]
    with pytest.raises(OSError, match="no such image"):
        list(watch.over(failing()))
    assert watch.seconds == 3.0 + 4.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_reported_wait_is_the_share_of_time_in_which_no_batch_was_there(clock, accumulation):
    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        clock.now += 6.0
        return mean_loss(model, batch)

    report = train(linear(), slow_items(clock, batches_of(SIZES), 2.0), losses, accumulation=accumulation).report
    assert report["data_wait"] == pytest.approx(2 / (2 + 6))


# Batches cut where memory runs out


def forgetful(limit: int, heard: list[int] | None = None):
    """`mean_loss` on a device whose memory holds at most `limit` samples; `heard` gets the sizes that fitted."""

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if len(batch) > limit:
            raise torch.OutOfMemoryError(f"{len(batch)} samples")
        if heard is not None:
            heard.append(len(batch))
        return {**mean_loss(model, batch), "number": batch.number.float().mean()}

    return losses


def sizes_tried(largest: int, limit: int) -> list[int]:
    """What is left after each halving, until it fits."""
    tried = []
    while largest > limit:
        largest = math.ceil(largest / 2)
        tried.append(largest)
    return tried


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 16])
def test_cut_batches_train_as_whole_ones_do(limit, accumulation, capsys):
    sizes = [3, 8, 16, 5, 7]  # with two a step, a part that fits comes before one that does not
    steps = [sizes[i : i + accumulation] for i in range(0, len(sizes), accumulation)]
    whole, cut = linear(), linear()
    heard: list[int] = []
    micro = engine.MicroBatches(split, enabled=True)
    options = {"accumulation": accumulation, "ema_decay": 0.5}
    expected = train(whole, batches_of(sizes), forgetful(99), **options)
    found = train(cut, batches_of(sizes), forgetful(limit), micro=micro, after_step=heard.append, **options)
    torch.testing.assert_close(weights(cut), weights(whole), atol=1e-6, rtol=1e-6)
    averages = weights(found.average.weights), weights(expected.average.weights)
    torch.testing.assert_close(*averages, atol=1e-6, rtol=1e-6)
    assert losses_of(found) == pytest.approx(losses_of(expected), rel=1e-6)
    assert found.schedule.last_epoch == expected.schedule.last_epoch == len(steps)
    assert heard == [sum(step) for step in steps]
    first = next((max(step) for step in steps if max(step) > limit), limit)
    halvings = sizes_tried(first, limit)
    assert micro.size == (halvings[-1] if halvings else None)
    said = capsys.readouterr().out.splitlines()
    assert [int(line.partition("from here on ")[2].split()[0]) for line in said] == halvings


def test_no_more_is_tried_than_what_fitted_before():
    heard: list[int] = []
    micro = engine.MicroBatches(split, enabled=True)
    for _ in range(2):
        train(linear(), batches_of([8, 8, 3]), forgetful(2, heard), micro=micro)
    assert heard == 2 * [2, 2, 2, 2, 2, 2, 2, 2, 2, 1]


def test_what_a_failed_attempt_left_in_the_gradients_does_not_count():
    model, alone = linear(torch.float64), linear(torch.float64)
    failures = iter([False, True])  # the first part goes through, then memory runs out

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if next(failures, False):
            raise torch.OutOfMemoryError
        return mean_loss(model, batch)

    sizes = [4, 4]
    train(
        model, batches_of(sizes, torch.float64), losses, accumulation=2, micro=engine.MicroBatches(split, enabled=True)
    )
    train(alone, batches_of(sizes, torch.float64), accumulation=2)
    torch.testing.assert_close(weights(model), weights(alone), atol=1e-14, rtol=1e-14)


def test_running_out_of_memory_is_an_error_that_names_the_flag_unless_batches_may_be_cut(capsys):
    model = linear()
    before = weights(model)
    with pytest.raises(engine.OutOfMemory, match=r"^out of memory with 4 images at once: add .*--dynamic_batch_size"):
        train(model, batches_of([2, 4]), forgetful(3), accumulation=2)
    assert torch.equal(weights(model), before)
    assert capsys.readouterr().out == ""


def test_a_single_sample_that_does_not_fit_is_an_error(capsys):
    with pytest.raises(engine.OutOfMemory, match="with a single image at once: add --gradient_checkpointing"):
        train(linear(), batches_of([8]), forgetful(0), micro=engine.MicroBatches(split, enabled=True))
    assert len(capsys.readouterr().out.splitlines()) == len(sizes_tried(8, 1))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(linear(), batches_of([8]), losses, micro=engine.MicroBatches(split, enabled=True))


@given(
    batch_size=st.integers(1, 5000),
    fixed=st.integers(0, 10**6),
    per_sample=st.integers(0, 10**4),
    budget=st.integers(0, 10**7),
)
@settings(max_examples=300)
def test_the_first_size_is_the_largest_halving_that_fits(batch_size, fixed, per_sample, budget):
    halvings = [math.ceil(batch_size / 2**times) for times in range(14)]
    fitting = [size for size in halvings if fixed + size * per_sample <= budget]
    found = engine.fitting_size(batch_size, fixed + per_sample, fixed + 2 * per_sample, budget)
    assert found == max(fitting, default=1)


def probed(monkeypatch, *, used: int, per_sample: int, batch_size: int, max_usage: float = 0.5, **options):
    """MicroBatches after its look at a pretended GPU of 1000 bytes, and the sizes that it ran."""
    heard: list[int] = []
    # The first run leaves gradients of 7 bytes behind.
    gpu = SimpleNamespace(
        reset_peak_memory_stats=lambda device: None,
        max_memory_allocated=lambda device: used + per_sample * heard[-1] - 7 * (len(heard) == 1),
        mem_get_info=lambda device: (300, 1000),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: nullcontext())
    micro = engine.MicroBatches(split, max_usage=max_usage, **{"enabled": True, **options})
    runtime = replace(CPU, device=torch.device("cuda", 0))
    for batch in batches_of([batch_size, batch_size]):
        micro.probe(batch, lambda parts: heard.extend(len(part) for part in parts), runtime)
    return micro, heard


@pytest.mark.parametrize(("batch_size", "size"), [(8, None), (64, 16), (20, None), (21, 11), (1000, 16)])
def test_on_a_gpu_the_first_size_is_planned_once_from_two_small_parts(monkeypatch, capsys, batch_size, size):
    micro, heard = probed(monkeypatch, used=100, per_sample=20, batch_size=batch_size)
    assert (micro.size, heard) == (size, [1, 1, 2])
    assert ("50% of the memory" in capsys.readouterr().out) == (size is not None)


def test_no_memory_is_looked_at_where_batches_are_not_cut(monkeypatch):
    micro, heard = probed(monkeypatch, used=100, per_sample=20, batch_size=64, enabled=False)
    assert (micro.size, heard) == (None, [])
    micro = engine.MicroBatches(split, enabled=True)
    micro.probe(batches_of([64])[0], lambda parts: heard.append(len(parts)), CPU)
    assert (micro.size, heard) == (None, [])


# Several processes: what each gets (tests/test_distributed.py starts some)


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
    assert engine.num_cpus() == max(1, cores // processes)
    assert CPU.num_threads == threads


# Steps that the scaler skips


class SkippingScaler:
    """Scales by 8 and skips chosen steps (counted from 1), as torch's does after an overflow."""

    def __init__(self, skipped: set[int]) -> None:
        self.skipped, self.step_number, self.factor = skipped, 0, 8.0

    def is_enabled(self) -> bool:
        return True

    def scale(self, loss: Tensor) -> Tensor:
        return loss * 8

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 8

    def get_scale(self) -> float:
        return self.factor

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step_number += 1
        if self.step_number not in self.skipped:
            optimizer.step()

    def update(self) -> None:
        self.factor *= 0.5 if self.step_number in self.skipped else 2


def test_a_skipped_step_advances_neither_schedule_nor_average_nor_weights():
    batches = batches_of([4] * 5)
    model, alone = linear(), linear()
    runtime = engine.Runtime(torch.device("cpu"), "off", SkippingScaler({2, 5}))
    skipping = train(model, batches, runtime=runtime, ema_decay=0.75)
    without = train(alone, [batches[0], batches[2], batches[3]], ema_decay=0.75)
    assert skipping.schedule.last_epoch == without.schedule.last_epoch == 3
    torch.testing.assert_close(weights(model), weights(alone))
    torch.testing.assert_close(weights(skipping.average.weights), weights(without.average.weights))


@pytest.mark.filterwarnings("error")
def test_an_overflow_of_the_scaled_gradient_skips_the_step_and_its_norm():
    batches = batches_of([4, 4, 4])
    overflowing = Batch(batches[0].x * 1e18, batches[0].y, batches[0].number)  # its square is finite, 2**40 of it not
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    model, alone = linear(), linear()
    runtime = engine.Runtime(torch.device("cpu"), "off", scaler)
    optimizer = engine.build_optimizer(model, lambda name: 0.1, weight_decay=0.0)
    skipping = train(model, [overflowing, *batches[1:]], optimizer=optimizer, runtime=runtime, ema_decay=0.5)
    optimizer = engine.build_optimizer(alone, lambda name: 0.1, weight_decay=0.0)
    without = train(alone, batches[1:], optimizer=optimizer, ema_decay=0.5)
    assert scaler.get_scale() == 2.0**39
    assert skipping.schedule.last_epoch == 2
    assert torch.equal(weights(model), weights(alone))
    assert torch.equal(weights(skipping.average.weights), weights(without.average.weights))
    assert skipping.report["grad_norm"] == pytest.approx(without.report["grad_norm"])


def test_an_epoch_of_skipped_steps_reports_no_gradient_norm():
    runtime = engine.Runtime(torch.device("cpu"), "off", SkippingScaler({1, 2}))
    assert math.isnan(train(linear(), batches_of([4, 4]), runtime=runtime).report["grad_norm"])


# Breakdowns


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad_step", [1, engine.CHECK_EVERY_STEPS, engine.CHECK_EVERY_STEPS + 3])
def test_a_loss_that_is_not_finite_is_named_with_its_step(value, bad_step):
    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        bad = int(batch.number[0]) == 2 * (bad_step - 1)
        return {**mean_loss(model, batch), "part": torch.tensor(value if bad else 0.0)}

    with pytest.raises(engine.NonFiniteLoss, match=rf"^part is {value} at step {bad_step} of this epoch: .*--lr"):
        train(linear(), batches_of([1] * 2 * (engine.CHECK_EVERY_STEPS + 7)), losses, lr=1e-3, accumulation=2)


def test_a_breakdown_ends_the_epoch_at_the_next_check():
    heard: list[int] = []

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": model(batch.x).mean() * math.nan}

    with pytest.raises(engine.NonFiniteLoss, match="loss is nan at step 1 "):
        train(linear(), batches_of([1] * 200), losses, after_step=heard.append)
    assert len(heard) < engine.CHECK_EVERY_STEPS


def test_a_gradient_that_is_not_finite_is_noticed_although_the_loss_is():
    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        last = int(batch.number[-1]) == sum(SIZES) - 1
        return {"loss": (model(batch.x) * 0).sum().sqrt() if last else model(batch.x).mean()}  # 0, its slope NaN

    with pytest.raises(engine.NonFiniteLoss, match=f"grad_norm is nan at step {len(SIZES)} "):
        train(linear(), batches_of(SIZES), losses)


def breaking(steps: set[int]) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    """Losses that are infinite in these steps, counted from 1, of batches of two."""

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        loss = mean_loss(model, batch)["loss"]
        return {"loss": loss * math.inf if int(batch.number[0]) // 2 + 1 in steps else loss}

    return losses


def test_a_step_that_fp16_scaling_skips_does_not_stop_the_run_and_spoils_no_mean():
    runtime = engine.Runtime(torch.device("cpu"), "off", SkippingScaler({2, 3}))
    report = train(linear(), batches_of([2] * 5), breaking({2, 3}), runtime=runtime).report
    assert math.isfinite(report["loss"]) and math.isfinite(report["grad_norm"])


def test_fp16_scaling_that_skips_every_step_is_told():
    every = set(range(1, 100))
    runtime = engine.Runtime(torch.device("cpu"), "off", SkippingScaler(every))
    with pytest.raises(engine.NonFiniteLoss, match="loss is inf at step 30 of"):
        train(linear(), batches_of([2] * 99), breaking(every), runtime=runtime)


def test_a_broken_step_changes_nothing_and_names_its_samples():
    model, until_then, batches = linear(), linear(), batches_of([2] * 5)
    with pytest.raises(engine.NonFiniteLoss) as caught:
        train(model, batches, breaking({4}), samples_of=lambda batch: batch.number.tolist())
    assert (caught.value.step, caught.value.samples) == (4, [6, 7])
    train(until_then, batches[:3])
    assert torch.equal(weights(model), weights(until_then))


# Reproducibility


def seeded_run(seed: int) -> tuple[Tensor, float]:
    """Shuffling, initialisation and dropout, all from the global generators."""
    engine.seed_everything(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    batches = batches_of([4] * 6)
    random.shuffle(batches)
    batches = [batches[i] for i in np.random.permutation(6)]  # noqa: NPY002  (the global generator is meant)
    optimizer = engine.build_optimizer(model, lambda name: 0.01, weight_decay=0.1)
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
    engine.seed_everything(5)
    first = draw()
    engine.seed_everything(5)
    assert draw() == first
    engine.seed_everything(6)
    assert draw() != first


# Averaged weights


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_is_the_exponential_one_worked_out_by_hand(decay):
    model = linear(torch.float64)
    average = engine.WeightAverage(model, decay)
    expected = None
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.full_like(parameter, (-1.0) ** step * (step + 1)))
        average.update()
        expected = weights(model) if expected is None else decay * expected + (1 - decay) * weights(model)
        torch.testing.assert_close(weights(average.weights), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(weights(average.weights), weights(model))


def test_before_the_first_step_the_average_is_the_model():
    model = linear()
    assert torch.equal(weights(engine.WeightAverage(model, 0.9).weights), weights(model))


def test_with_decay_zero_the_average_is_the_model_itself():
    model = linear()
    trained = train(model, batches_of([2, 2]), ema_decay=0.0)
    assert trained.average.weights is model


def test_training_averages_the_weights_after_every_step():
    model, batches = linear(torch.float64), batches_of([4] * 4, torch.float64)
    history: list[Tensor] = []
    trained = train(model, batches, ema_decay=0.6, after_step=lambda _: history.append(weights(model)))
    expected = history[0]
    for step in history[1:]:
        expected = 0.6 * expected + 0.4 * step
    torch.testing.assert_close(weights(trained.average.weights), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_frozen_parameters_stay_bit_identical_in_the_average(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50).requires_grad_(False), nn.Linear(50, 1))
    before = copy.deepcopy(model[0].state_dict())
    optimizer = engine.build_optimizer(model, lambda name: 0.1, weight_decay=0.5)
    trained = train(model, batches_of([2] * 20), optimizer=optimizer, ema_decay=decay)
    after = trained.average.weights[0].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(trained.average.weights[1].weight, model[1].weight)


# Prediction


def scores_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"number": batch.number, "score": model(batch.x).squeeze(1), "embedding": batch.x * 2}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 10, 11, 64])
def test_every_sample_is_scored_once_and_in_order_whatever_the_batch_size(batch_size):
    n = 11
    sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
    model, (whole,) = linear(), batches_of([n])
    found = engine.predict(model, batches_of(sizes), scores_of, runtime=CPU)
    assert found["number"].tolist() == list(range(n))
    np.testing.assert_allclose(found["score"], model(whole.x).squeeze(1).detach(), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found["embedding"], (whole.x * 2).double())


def test_predictions_are_float64_arrays_in_the_shape_of_the_scores():
    found = engine.predict(linear(), batches_of([4, 1]), scores_of, runtime=CPU)
    assert {name: (values.dtype, values.shape) for name, values in found.items()} == {
        "number": (np.float64, (5,)),
        "score": (np.float64, (5,)),
        "embedding": (np.float64, (5, 3)),
    }


def test_prediction_switches_dropout_off_and_builds_no_graph():
    model = nn.Sequential(linear(), nn.Dropout(0.5)).train()
    graphs: list[bool] = []

    def scores(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        score = model(batch.x).squeeze(1)
        graphs.append(score.requires_grad)
        return {"score": score}

    found = engine.predict(model, batches_of([8, 8]), scores, runtime=CPU)["score"]
    (whole,) = batches_of([16])
    np.testing.assert_allclose(found, model[0](whole.x).squeeze(1).detach(), rtol=1e-6, atol=1e-7)
    assert graphs == [False, False]


def test_bf16_scores_come_back_as_float64():
    runtime = engine.start_runtime("cpu", "bf16")
    found = engine.predict(linear(), batches_of([4]), lambda m, b: {"score": m(b.x)}, runtime=runtime)["score"]
    assert found.dtype == np.float64
    exact = torch.from_numpy(found)
    assert torch.equal(exact, exact.bfloat16().double())  # computed in bf16, then widened


# Selection


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.9, 0.8, 0.7, 0.1], 1),
        ([0.1, 0.2, 0.3], 3),
        ([0.1, 0.7, 0.3, 0.7, 0.2], 2),
        ([0.5, 0.5, 0.5], 1),
        ([-0.3, -0.1, -0.2], 2),
        ([0.0], 1),
    ],
)
def test_the_best_epoch_is_the_first_of_the_highest(scores, best):
    assert engine.best_epoch(scores) == best


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "stops"),
    [
        ([0.5, 0.4, 0.3, 0.2], 0, 0.0, False),  # patience 0 is off
        ([0.5, 0.4], 2, 0.0, False),  # too few epochs to tell
        ([0.5, 0.4, 0.3], 2, 0.0, True),
        ([0.5, 0.4, 0.6], 2, 0.0, False),
        ([0.5, 0.6, 0.4], 2, 0.0, False),
        ([0.5, 0.6, 0.4, 0.4], 2, 0.0, True),
        ([0.5, 0.4], 1, 0.0, True),
        ([0.5, 0.5, 0.5], 2, 0.0, True),  # to equal is no gain
        ([0.5, 0.5625, 0.5625], 2, 0.125, True),  # a rise, too small to count
        ([0.5, 0.5625, 0.625], 2, 0.125, False),  # the smallest that counts, in small steps
        ([0.5, 0.5, 0.6249], 2, 0.125, True),
        ([0.0, 0.5, 0.3, 0.55], 2, 0.125, True),  # measured against the best, not the first
        ([-0.5, -0.25, -0.25], 1, 0.125, True),
    ],
)
def test_training_stops_after_epochs_without_gain(scores, patience, min_delta, stops):
    assert engine.should_stop(scores, patience=patience, min_delta=min_delta) is stops


@given(
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    epochs=st.integers(1, 3),
)
@settings(max_examples=60)
def test_the_number_of_steps_is_what_a_loop_would_take(num_samples, batch_size, accumulation, epochs):
    steps = 0
    for _ in range(epochs):
        batches = [range(num_samples)[i : i + batch_size] for i in range(0, num_samples, batch_size)]
        groups = list(engine.grouped(batches, accumulation))
        assert [sample for group in groups for batch in group for sample in batch] == list(range(num_samples))
        steps += len(groups)
    options = {"batch_size": batch_size, "accumulation": accumulation, "epochs": epochs}
    assert engine.num_optimizer_steps(num_samples, **options) == steps


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
        engine.start_runtime("cuda", "auto")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_fp16_on_a_cpu_is_an_error(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^--amp fp16: needs a GPU"):
        engine.start_runtime(device, "fp16")


def test_auto_without_a_gpu_is_float32_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime = engine.start_runtime("auto", "auto")
    assert (runtime.device.type, runtime.precision, runtime.scaler.is_enabled()) == ("cpu", "off", False)
    assert runtime.num_ahead == 0 and runtime.free_memory() == 0
    assert runtime.describe().endswith("CPU cores, float32")
    with runtime.autocast():
        assert linear()(torch.ones(1, 3)).dtype == torch.float32


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_auto_with_a_gpu_takes_the_best_precision_it_has(pretended_gpu, has_bf16, precision):
    pretended_gpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    runtime = engine.start_runtime("auto", "auto")
    assert (runtime.device.type, runtime.precision) == ("cuda", precision)
    assert runtime.scaler.is_enabled() == (precision == "fp16")
    assert runtime.num_ahead > 0


def test_a_process_without_a_gpu_of_its_own_is_an_error(pretended_gpu):
    pretended_gpu.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"^process 1 has no GPU of its own: start one per GPU \(1\)"):
        engine.start_runtime("auto", "off")
    pretended_gpu.setattr(torch.cuda, "device_count", lambda: 2)
    assert engine.start_runtime("auto", "off").device == torch.device("cuda", 1)


def test_the_cpu_can_be_chosen_beside_a_gpu(pretended_gpu):
    runtime = engine.start_runtime("cpu", "auto")
    assert (runtime.device.type, runtime.precision) == ("cpu", "off")
    with pytest.raises(ValueError, match="fp16"):
        engine.start_runtime("cpu", "fp16")


def learn(runtime: engine.Runtime) -> tuple[list[float], nn.Module, int]:
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
    optimizer = engine.build_optimizer(model, lambda name: 0.05, weight_decay=0.0)
    schedule = engine.build_schedule(optimizer, kind="constant", num_steps=120, warmup_ratio=0.0)
    average = engine.WeightAverage(model, 0.5)
    dtypes: set[torch.dtype] = set()

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = model(batch.x)
        dtypes.add(output.dtype)
        return {"loss": (output.float() - batch.y).square().mean()}

    history = [
        engine.train_epoch(
            model,
            batches,
            losses,
            optimizer=optimizer,
            schedule=schedule,
            runtime=runtime,
            average=average,
            micro=engine.MicroBatches(split, enabled=False),
            max_grad_norm=10.0,
        )["loss"]
        for _ in range(30)
    ]
    assert dtypes == {{"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[runtime.precision]}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return history, average.weights, schedule.last_epoch


@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_a_cpu_learns_in_float32_and_in_bf16(precision):
    history, model, steps = learn(engine.start_runtime("cpu", precision))
    assert history[-1] < 0.01 * history[0]
    assert model.weight.detach().flatten().tolist() == pytest.approx([2, -1, 0], abs=0.15)
    assert steps == 120


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_a_gpu_learns_in_every_precision(precision):
    runtime = engine.start_runtime("cuda", precision)
    history, model, steps = learn(runtime)
    assert runtime.scaler.is_enabled() == (precision == "fp16")
    assert history[-1] < 0.01 * history[0]
    assert model.weight.detach().flatten().tolist() == pytest.approx([2, -1, 0], abs=0.15)
    assert 100 <= steps <= 120  # fp16 begins by skipping steps until its scale fits


# -- kernels that repeat themselves


@pytest.fixture
def kernels(monkeypatch) -> Iterator[None]:
    """The settings of torch are put back in the end."""
    monkeypatch.delenv(engine.CUBLAS_WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    os.environ.pop(engine.CUBLAS_WORKSPACE, None)


def is_deterministic() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_deterministic_kernels_are_switched_both_ways_at_every_start_and_left_alone_by_who_does_not_say(kernels):
    engine.start_runtime("cpu", "off", True)
    assert is_deterministic() == (True, True, False)
    assert os.environ[engine.CUBLAS_WORKSPACE] in engine.REPEATABLE_WORKSPACES
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    engine.start_runtime("cpu", "off")
    assert is_deterministic() == (True, True, False)
    engine.start_runtime("cpu", "off", False)
    assert is_deterministic() == (False, False, False)


def test_an_environment_that_rules_deterministic_kernels_out_is_refused(kernels, monkeypatch):
    monkeypatch.setenv(engine.CUBLAS_WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match=r"--deterministic: .*=:0:0, must be :4096:8 or :16:8"):
        engine.start_runtime("cpu", "off", True)
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(engine.CUBLAS_WORKSPACE, ":16:8")
    engine.start_runtime("cpu", "off", True)
    assert os.environ[engine.CUBLAS_WORKSPACE] == ":16:8"
