"""`branches/counting.py`: exact where the answer is known, and indifferent to what should not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from branches.counting import Counter, PiecewiseLinear

CELLS = torch.tensor([[x, y, x + 0.8, y + 0.8] for x in range(4) for y in range(4)])  # 16 boxes, none touching another


def count(attention: torch.Tensor, boxes: torch.Tensor, num_objects: int = 10) -> torch.Tensor:
    with torch.no_grad():
        return Counter(num_objects)(attention[None], boxes[None])[0]


def logits(*are_looked_at: bool) -> torch.Tensor:
    return torch.where(torch.tensor(are_looked_at), 60.0, -60.0)


@given(st.integers(0, 10), st.randoms(use_true_random=False))
def test_disjoint_boxes_are_counted_exactly(number, random):
    chosen = random.sample(range(16), number)
    found = count(logits(*(place in chosen for place in range(16))), CELLS)
    assert found.argmax() == number
    assert found[number] == found.sum()  # all of it, times how sure it is
    assert found[number] == pytest.approx(1.0, abs=1e-5)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_an_object_seen_several_times_counts_once(times):
    boxes = torch.cat([CELLS[place].expand(repeats, 4) for place, repeats in enumerate(times)])
    found = count(logits(*[True] * len(boxes)), boxes)
    assert found.argmax() == len(times)
    assert (found * torch.arange(11)).sum() / found.sum() == pytest.approx(len(times), abs=1e-4)


def test_more_objects_than_can_be_told_are_the_most():
    found = count(logits(*[True] * 16), CELLS, num_objects=5)
    assert found.argmax() == 5 and len(found) == 6


def test_neither_order_nor_empty_regions_matter():
    torch.manual_seed(0)
    attention, boxes = torch.randn(6), torch.rand(6, 4).cumsum(-1)
    expected = count(attention, boxes)
    order = torch.randperm(6)
    torch.testing.assert_close(count(attention[order], boxes[order]), expected)
    longer = torch.cat([attention, torch.full((7,), -torch.inf)]), torch.cat([boxes, torch.zeros(7, 4)])
    torch.testing.assert_close(count(*longer), expected)


def test_gradients_reach_attention_and_every_function():
    torch.manual_seed(0)
    counter = Counter(10)
    attention = torch.randn(2, 6, requires_grad=True)
    boxes = torch.rand(2, 6, 4).cumsum(-1)
    (counter(attention, boxes) * torch.arange(11.0)).sum().backward()
    assert attention.grad is not None and attention.grad.isfinite().all() and attention.grad.abs().sum() > 0
    for function in counter.f:
        assert function.rise.grad is not None and function.rise.grad.isfinite().all()
        assert function.rise.grad.abs().sum() > 0


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(1)
    counter = Counter(4).double()
    boxes = (torch.rand(1, 4, 4).cumsum(-1)).double()
    assert torch.autograd.gradcheck(
        lambda attention: counter(attention, boxes),
        torch.tensor([[0.3, -0.8, 1.1, 0.1]], dtype=torch.float64, requires_grad=True),
    )


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_learned_functions_rise_from_0_to_1(rises, places):
    function = PiecewiseLinear(4)
    with torch.no_grad():
        function.rise.copy_(torch.tensor(rises) + 0.01)
    x = torch.tensor([0.0, *sorted(places), 1.0])
    y = function(x).detach()
    assert y[0] == 0 and y[-1] == pytest.approx(1, abs=1e-5) and (y.diff() >= -1e-6).all()
    torch.testing.assert_close(PiecewiseLinear()(x).detach(), x)
