"""`training/micro_batches.py`: batches cut where memory runs out train as whole ones do."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_models import CPU, Batch, batches_of, linear, losses_of, mean_loss, split, train, weights
from torch import Tensor, nn

from training import micro_batches


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
    micro = micro_batches.MicroBatches(split, enabled=True)
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
    micro = micro_batches.MicroBatches(split, enabled=True)
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
        model,
        batches_of(sizes, torch.float64),
        losses,
        accumulation=2,
        micro=micro_batches.MicroBatches(split, enabled=True),
    )
    train(alone, batches_of(sizes, torch.float64), accumulation=2)
    torch.testing.assert_close(weights(model), weights(alone), atol=1e-14, rtol=1e-14)


def test_running_out_of_memory_is_an_error_that_names_the_flag_unless_batches_may_be_cut(capsys):
    model = linear()
    before = weights(model)
    micro = micro_batches.MicroBatches(split, enabled=False, remedies="buy more")
    with pytest.raises(
        micro_batches.OutOfMemory, match=r"^out of memory with 4 samples at once: .*--dynamic_batch_size .*, buy more$"
    ):
        train(model, batches_of([2, 4]), forgetful(3), accumulation=2, micro=micro)
    assert torch.equal(weights(model), before)
    assert capsys.readouterr().out == ""


def test_a_single_sample_that_does_not_fit_is_an_error(capsys):
    with pytest.raises(micro_batches.OutOfMemory, match="with a single sample at once: use a smaller model"):
        train(linear(), batches_of([8]), forgetful(0), micro=micro_batches.MicroBatches(split, enabled=True))
    assert len(capsys.readouterr().out.splitlines()) == len(sizes_tried(8, 1))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(linear(), batches_of([8]), losses, micro=micro_batches.MicroBatches(split, enabled=True))


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
    found = micro_batches.fitting_size(batch_size, fixed + per_sample, fixed + 2 * per_sample, budget)
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
    micro = micro_batches.MicroBatches(split, max_usage=max_usage, **{"enabled": True, **options})
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
    micro = micro_batches.MicroBatches(split, enabled=True)
    micro.probe(batches_of([64])[0], lambda parts: heard.append(len(parts)), CPU)
    assert (micro.size, heard) == (None, [])
