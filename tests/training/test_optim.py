"""`training/optim.py`: schedules, parameter groups, averaged weights, the number of steps."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_models import batches_of, linear, train, weights
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from training import loop, optim

KINDS = ["cosine", "linear", "step", "cyclic", "constant"]


# Learning rates


def factors(kind: str, num_steps: int, num_warmup_steps: int = 0) -> list[float]:
    """The factor at every step, and at the one after the last."""
    return [
        optim.lr_factor(step, kind=kind, num_steps=num_steps, num_warmup_steps=num_warmup_steps)
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
    assert {optim.lr_factor(step, kind=kind, num_steps=40, num_warmup_steps=5) for step in range(40, 90)} == {0.0}


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
    values = [optim.lr_factor(step, **options) for step in range(num_steps + beyond)]
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
    schedule = optim.build_schedule(optimizer, kind=kind, num_steps=40, warmup_ratio=0.1)
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
    groups = optim.parameter_groups(model, lambda name: rates.get(name, 1e-3), 0.25)
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
    groups = optim.parameter_groups(model, lambda name: len(name) * 1e-4, 0.1)
    listed = sorted(id(parameter) for group in groups for parameter in group["params"])
    assert listed == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_the_optimizer_shrinks_matrices_alone_when_gradients_are_zero():
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model)
    optimizer = optim.build_optimizer(model, lambda name: 0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight, before.weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, before.bias)


# Averaged weights


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_is_the_exponential_one_worked_out_by_hand(decay):
    model = linear(torch.float64)
    average = optim.WeightAverage(model, decay)
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
    assert torch.equal(weights(optim.WeightAverage(model, 0.9).weights), weights(model))


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
    optimizer = optim.build_optimizer(model, lambda name: 0.1, weight_decay=0.5)
    trained = train(model, batches_of([2] * 20), optimizer=optimizer, ema_decay=decay)
    after = trained.average.weights[0].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(trained.average.weights[1].weight, model[1].weight)


@given(num_samples=st.integers(1, 60), batch_size=st.integers(1, 9), accumulation=st.integers(1, 5))
@settings(max_examples=60)
def test_the_number_of_steps_is_what_a_loop_would_take(num_samples, batch_size, accumulation):
    batches = [range(num_samples)[i : i + batch_size] for i in range(0, num_samples, batch_size)]
    groups = list(loop.batched(batches, accumulation))
    assert [sample for group in groups for batch in group for sample in batch] == list(range(num_samples))
    options = {"batch_size": batch_size, "accumulation": accumulation}
    assert optim.num_optimizer_steps(num_samples, **options) == len(groups)
