"""`training/loop.py` on small linear models: steps, waiting, skipped steps, breakdowns, exact prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from linear_models import CPU, SIZES, Batch, batches_of, linear, losses_of, mean_loss, train, weights
from torch import Tensor, nn

from training import devices, loop, optim

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

    assert train(linear(), batches_of([1] * 300), losses).report["half"] == 0.5


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
    optimizer = optim.build_optimizer(model, lambda name: 0.1, weight_decay=0.5)
    report = train(model, [batch], optimizer=optimizer).report
    assert torch.equal(model.bias, bias)
    assert report["grad_norm"] == pytest.approx(float(gradient.norm()))


# Waiting for batches


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock for the engine that shows `now` and stands still."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def slow_items(clock: SimpleNamespace, items: Sequence, seconds: float, end: float = 0.0) -> Iterator:
    """The items, each of which takes so many seconds; finding that there are no more takes `end`."""
    for item in items:
        clock.now += seconds
        yield item
    clock.now += end


def test_a_stopwatch_counts_the_waiting_and_not_the_work_between(clock):
    watch = loop.Stopwatch()
    seen = []
    for item in watch.over(slow_items(clock, "abc", seconds=2.0, end=0.5)):
        clock.now += 64.0
        seen.append(item)
    assert seen == ["a", "b", "c"]
    assert watch.seconds == 3 * 2.0 + 0.5


def test_a_stopwatch_adds_up_over_several_rounds_and_counts_what_failed(clock):
    watch = loop.Stopwatch()

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
    runtime = devices.Runtime(torch.device("cpu"), "off", SkippingScaler({2, 5}))
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
    runtime = devices.Runtime(torch.device("cpu"), "off", scaler)
    optimizer = optim.build_optimizer(model, lambda name: 0.1, weight_decay=0.0)
    skipping = train(model, [overflowing, *batches[1:]], optimizer=optimizer, runtime=runtime, ema_decay=0.5)
    optimizer = optim.build_optimizer(alone, lambda name: 0.1, weight_decay=0.0)
    without = train(alone, batches[1:], optimizer=optimizer, ema_decay=0.5)
    assert scaler.get_scale() == 2.0**39
    assert skipping.schedule.last_epoch == 2
    assert torch.equal(weights(model), weights(alone))
    assert torch.equal(weights(skipping.average.weights), weights(without.average.weights))
    assert skipping.report["grad_norm"] == pytest.approx(without.report["grad_norm"])


def test_an_epoch_of_skipped_steps_reports_no_gradient_norm():
    runtime = devices.Runtime(torch.device("cpu"), "off", SkippingScaler({1, 2}))
    assert math.isnan(train(linear(), batches_of([4, 4]), runtime=runtime).report["grad_norm"])


# Breakdowns


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad_step", [1, loop.CHECK_EVERY_STEPS, loop.CHECK_EVERY_STEPS + 3])
def test_a_loss_that_is_not_finite_is_named_with_its_step(value, bad_step):
    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        bad = int(batch.number[0]) == 2 * (bad_step - 1)
        return {**mean_loss(model, batch), "part": torch.tensor(value if bad else 0.0)}

    with pytest.raises(loop.NonFiniteLoss, match=rf"^part is {value} at step {bad_step} of this epoch: .*--lr"):
        train(linear(), batches_of([1] * 2 * (loop.CHECK_EVERY_STEPS + 7)), losses, lr=1e-3, accumulation=2)


def test_a_breakdown_ends_the_epoch_at_the_next_check():
    heard: list[int] = []

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": model(batch.x).mean() * math.nan}

    with pytest.raises(loop.NonFiniteLoss, match="loss is nan at step 1 "):
        train(linear(), batches_of([1] * 200), losses, after_step=heard.append)
    assert len(heard) < loop.CHECK_EVERY_STEPS


def test_a_gradient_that_is_not_finite_is_noticed_although_the_loss_is():
    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        last = int(batch.number[-1]) == sum(SIZES) - 1
        return {"loss": (model(batch.x) * 0).sum().sqrt() if last else model(batch.x).mean()}  # 0, its slope NaN

    with pytest.raises(loop.NonFiniteLoss, match=f"grad_norm is nan at step {len(SIZES)} "):
        train(linear(), batches_of(SIZES), losses)


def breaking(steps: set[int]) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    """Losses that are infinite in these steps, counted from 1, of batches of two."""

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        loss = mean_loss(model, batch)["loss"]
        return {"loss": loss * math.inf if int(batch.number[0]) // 2 + 1 in steps else loss}

    return losses


def test_a_step_that_fp16_scaling_skips_does_not_stop_the_run_and_spoils_no_mean():
    runtime = devices.Runtime(torch.device("cpu"), "off", SkippingScaler({2, 3}))
    report = train(linear(), batches_of([2] * 5), breaking({2, 3}), runtime=runtime).report
    assert math.isfinite(report["loss"]) and math.isfinite(report["grad_norm"])


def test_fp16_scaling_that_skips_every_step_is_told():
    every = set(range(1, 100))
    runtime = devices.Runtime(torch.device("cpu"), "off", SkippingScaler(every))
    with pytest.raises(loop.NonFiniteLoss, match="loss is inf at step 30 of"):
        train(linear(), batches_of([2] * 99), breaking(every), runtime=runtime)


def test_a_broken_step_changes_nothing_and_names_its_samples():
    model, until_then, batches = linear(), linear(), batches_of([2] * 5)
    with pytest.raises(loop.NonFiniteLoss) as caught:
        train(model, batches, breaking({4}), samples_of=lambda batch: batch.number.tolist())
    assert (caught.value.step, caught.value.samples) == (4, [6, 7])
    train(until_then, batches[:3])
    assert torch.equal(weights(model), weights(until_then))


# Prediction


def scores_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"number": batch.number, "score": model(batch.x).squeeze(1), "embedding": batch.x * 2}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 10, 11, 64])
def test_every_sample_is_scored_once_and_in_order_whatever_the_batch_size(batch_size):
    n = 11
    sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
    model, (whole,) = linear(), batches_of([n])
    found = loop.predict(model, batches_of(sizes), scores_of, runtime=CPU)
    assert found["number"].tolist() == list(range(n))
    np.testing.assert_allclose(found["score"], model(whole.x).squeeze(1).detach(), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found["embedding"], (whole.x * 2).double())


def test_predictions_are_float64_arrays_in_the_shape_of_the_scores():
    found = loop.predict(linear(), batches_of([4, 1]), scores_of, runtime=CPU)
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

    found = loop.predict(model, batches_of([8, 8]), scores, runtime=CPU)["score"]
    (whole,) = batches_of([16])
    np.testing.assert_allclose(found, model[0](whole.x).squeeze(1).detach(), rtol=1e-6, atol=1e-7)
    assert graphs == [False, False]


def test_bf16_scores_come_back_as_float64():
    runtime = devices.start_runtime("cpu", "bf16")
    found = loop.predict(linear(), batches_of([4]), lambda m, b: {"score": m(b.x)}, runtime=runtime)["score"]
    assert found.dtype == np.float64
    exact = torch.from_numpy(found)
    assert torch.equal(exact, exact.bfloat16().double())  # computed in bf16, then widened
