"""`branches/sampling.py`: exactly k real nodes, and gradients that are what they are said to be."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from branches.sampling import (
    AdaptiveImle,
    GumbelTopK,
    Imle,
    Sampler,
    build_sampler,
    centred,
    draw_subsets,
    marginals,
    sum_of_gamma,
    top_k,
)

DEFAULTS: dict[str, Any] = {"k": 2, "num_samples": 1, "alpha": 1.0, "beta": 10.0, "tau": 1.0}
NOISY = ("imle", "aimle", "gumbel", "simple")
KINDS = (*NOISY, "soft")
LOW = -1e9


def build(kind: str, **changes: Any) -> Sampler:
    return build_sampler(kind, **DEFAULTS | changes)


def mask(*sizes: int, most: int = 6) -> Tensor:
    return torch.arange(most) < torch.tensor(sizes)[:, None]


def every_subset(scores: Tensor, k: int) -> dict[tuple[int, ...], float]:
    """Subsets of k places and how probable each is."""
    powers = {subset: scores[list(subset)].sum().exp().item() for subset in combinations(range(len(scores)), k)}
    return {subset: power / sum(powers.values()) for subset, power in powers.items()}


def plain_marginals(scores: Tensor, k: int) -> Tensor:
    found = torch.zeros_like(scores)
    for subset, power in every_subset(scores, k).items():
        found[list(subset)] += power
    return found


@given(
    st.lists(st.tuples(st.sampled_from([-torch.inf, LOW, -1.0, 0.0, 0.5, 2.0]), st.booleans()), min_size=0, max_size=7),
    st.integers(1, 8),
)
def test_top_k_is_that_of_a_plain_sort(places, k):
    scores = torch.tensor([[score for score, _ in places]]).reshape(1, -1)
    are_nodes = torch.tensor([[there for _, there in places]], dtype=torch.bool).reshape(1, -1)
    real = [place for place, (_, there) in enumerate(places) if there]
    best = sorted(real, key=lambda place: (-places[place][0], place))[:k]
    assert top_k(scores, are_nodes, k).nonzero()[:, 1].tolist() == sorted(best)


def test_of_many_equal_scores_the_first_are_chosen():
    scores = torch.zeros(2, 300).index_fill(1, torch.arange(0, 300, 3), -1.0)
    assert top_k(scores, mask(300, 290, most=300), 4).nonzero()[:, 1].tolist() == [1, 2, 4, 5] * 2


def test_top_k_takes_samples_before_graphs():
    scores = torch.randn(3, 2, 6)
    found = top_k(scores, mask(6, 3), 2)
    for sample, z in zip(scores, found, strict=True):
        assert torch.equal(top_k(sample, mask(6, 3), 2), z)


SCORES = {
    "any": torch.tensor([[0.3, -2.0, 1.0, 0.2, 5.0, -1.0]]),
    "equal": torch.zeros(1, 6),
    "very low": torch.full((1, 6), LOW),
    "infinitely low": torch.full((1, 6), -torch.inf),
    "of both": torch.tensor([[-torch.inf, 0.0, LOW, -torch.inf, -3.0, LOW]]),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_k_nodes_are_chosen_and_no_padding(kind, training, scores):
    sizes = torch.tensor([6, 4, 3, 2, 1, 0])
    padded = scores.repeat(6, 1).masked_fill(~mask(*sizes), 99.0).requires_grad_()
    sampler = build(kind, k=3).train(training)
    for _ in range(10):
        z = sampler(padded, mask(*sizes))
        torch.testing.assert_close(z.sum(dim=1), sizes.clamp(max=3).float())
        assert not z[~mask(*sizes)].any() and ((z >= 0) & (z <= 1 + 1e-6)).all()
        assert kind == "soft" or ((z == 0) | (z == 1)).all()
        if z.requires_grad:
            (gradient,) = torch.autograd.grad((z * torch.arange(6.0)).sum(), padded)
            assert gradient.isfinite().all() and not gradient[~mask(*sizes)].any()
            assert not gradient[2:].any()  # graphs that keep all their nodes have nothing to learn


@pytest.mark.parametrize("kind", KINDS)
def test_more_places_than_nodes_change_nothing_and_no_place_is_no_obstacle(kind):
    sampler = build(kind, k=3).eval()
    scores = torch.randn(2, 6)
    short = sampler(scores[:, :4], mask(4, 2, most=4))
    torch.testing.assert_close(sampler(scores, mask(4, 2))[:, :4], short)
    nothing = build(kind, k=3).train()(scores.requires_grad_()[:, :0], mask(0, 0, most=0))
    assert nothing.shape == (2, 0) and nothing.requires_grad
    assert build(kind, k=9).train()(scores, mask(6, 5)).sum(dim=1).tolist() == [6, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_noise_but_in_training(kind):
    torch.manual_seed(0)
    scores, are_nodes = torch.randn(8, 6), mask(*[6] * 8)
    sampler = build(kind, num_samples=3).eval()
    calm = marginals(scores, are_nodes, 2) if kind == "soft" else top_k(scores, are_nodes, 2)
    state = torch.get_rng_state()
    assert torch.equal(sampler(scores, are_nodes), calm) and torch.equal(sampler(scores, are_nodes), calm)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sampler.train()(scores, are_nodes), calm) == (kind == "soft")


@pytest.mark.parametrize("kind", NOISY)
def test_several_samples_are_averaged(kind):
    torch.manual_seed(0)
    scores, are_nodes = torch.zeros(1, 6), mask(6)
    found = build(kind, num_samples=4)(scores, are_nodes) * 4
    torch.testing.assert_close(found, found.round())
    assert found.sum() == 8 and found.max() < 4
    many = build(kind, num_samples=3000)(scores, are_nodes)
    torch.testing.assert_close(many, torch.full((1, 6), 2 / 6), atol=0.04, rtol=0)


def test_a_sampler_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="--sampler_type best: must be one of imle, aimle, gumbel, simple, soft"):
        build("best")


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_marginals_are_those_of_all_subsets(k):
    torch.manual_seed(k)
    scores = torch.randn(3, 7, dtype=torch.float64) * 3
    found = marginals(scores, mask(7, 6, k, most=7), k)
    torch.testing.assert_close(found[0], plain_marginals(scores[0], k))
    torch.testing.assert_close(found[1, :6], plain_marginals(scores[1, :6], k))
    assert found[1, 6] == 0 and found[2].tolist() == [1.0] * k + [0.0] * (7 - k)


def test_marginals_of_far_scores_are_those_of_their_order():
    scores = torch.tensor([[5e4, 0.0, -1e5, 1.0]])
    expected = plain_marginals(torch.tensor([0.0, 1.0]), 1)
    torch.testing.assert_close(marginals(scores, mask(4, most=4), 2)[0, [1, 3]], expected)
    assert marginals(scores, mask(4, most=4), 2)[0, [0, 2]].tolist() == pytest.approx([1, 0])


def test_marginals_of_many_nodes_in_single_precision_are_nearly_those_in_double():
    torch.manual_seed(0)
    for k, far, atol in ((2, 5.0, 1e-5), (30, 20.0, 1e-3)):
        scores, are_nodes = torch.randn(4, 200) * far, mask(*[200] * 4, most=200)
        exact = marginals(scores.double(), are_nodes, k)
        torch.testing.assert_close(exact.sum(dim=1), torch.full((4,), float(k)).double())
        torch.testing.assert_close(marginals(scores, are_nodes, k).double(), exact, atol=atol, rtol=0)


def test_gradients_of_marginals_are_those_of_finite_differences():
    torch.manual_seed(0)
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    are_nodes = mask(6, 4, 2)
    assert torch.autograd.gradcheck(lambda x: marginals(x, are_nodes, 3), scores)
    assert torch.autograd.gradcheck(lambda x: build("soft", k=3, tau=0.5).eval()(x, are_nodes), scores)


def test_temperature_makes_the_soft_sampler_sharp():
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    torch.testing.assert_close(build("soft", tau=2.0)(scores, mask(6))[0], plain_marginals(scores[0] / 2, 2))
    torch.testing.assert_close(build("soft", tau=0.05)(scores, mask(6)), top_k(scores, mask(6), 2))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_subsets_are_drawn_as_often_as_they_are_probable(k):
    torch.manual_seed(k)
    scores = torch.randn(2, 5)
    drawn = draw_subsets(scores, mask(4, 5, most=5), k, 20000)
    for row, size in enumerate((4, 5)):
        for subset, probable in every_subset(scores[row, :size], k).items():
            expected = torch.zeros(5).index_fill(0, torch.tensor(subset), 1.0)
            share = (drawn[:, row] == expected).all(dim=1).float().mean().item()
            assert share == pytest.approx(probable, abs=0.015)


def test_the_noise_of_k_elements_together_is_that_of_gumbel():
    """Whose mean is Euler's constant and whose variance is pi^2 / 6."""
    torch.manual_seed(0)
    for k in (1, 2, 5):
        noise = sum_of_gamma((40000, k), k, torch.empty(0)).sum(dim=1)
        assert noise.mean().item() == pytest.approx(0.5772 + 0.05, abs=0.03)  # with 10 terms of the series
        assert noise.var().item() == pytest.approx(1.6449 - 0.095, abs=0.06)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_gradient_of_imle_is_the_difference_of_two_choices_under_one_noise(num_samples):
    torch.manual_seed(0)
    scores = torch.randn(2, 6, requires_grad=True)
    are_nodes, cost = mask(6, 4), torch.randn(2, 6)
    sampler = build("imle", num_samples=num_samples, alpha=0.7, beta=2.0, tau=0.5)
    state = torch.get_rng_state()
    z = sampler(scores, are_nodes)
    torch.set_rng_state(state)
    noise = 0.5 * sum_of_gamma((num_samples, 2, 6), 2, scores)
    chosen = torch.stack([top_k(scores + each, are_nodes, 2) for each in noise])
    target = torch.stack([top_k(0.7 * scores - 2.0 * cost + each, are_nodes, 2) for each in noise])
    torch.testing.assert_close(z, chosen.mean(dim=0))
    (z * cost).sum(dim=1).mean().backward()  # as large a step in a batch of two as alone
    assert scores.grad is not None and scores.grad.any()
    torch.testing.assert_close(scores.grad, (chosen - target).mean(dim=0))


def test_the_gradient_of_imle_without_noise_by_hand():
    """Nodes 0 and 1 are best, the loss is lower by 1 with node 3: a step of 10 puts it in the place of node 1."""
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]], requires_grad=True)
    z = build("imle", tau=0.0)(scores, mask(4, most=4))
    assert z.tolist() == [[1, 1, 0, 0]]
    (z * torch.tensor([0.0, 0.0, 0.0, -1.0])).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [[0, 1, 0, -1]]
    scores.grad = None
    z = build("imle", tau=0.0, beta=1.5)(scores, mask(4, most=4))  # a step that is too small
    (z * torch.tensor([0.0, 0.0, 0.0, -1.0])).sum().backward()
    assert scores.grad.tolist() == [[0, 0, 0, 0]]


def test_the_gradient_of_aimle_by_hand():
    """The step has the length of the scores: 5 along node 2. There they are 3, 4, 5 and 3, 4, -5."""
    scores = torch.tensor([[3.0, 4.0, 0.0]], requires_grad=True)
    sampler = build("aimle", k=1, tau=0.0)
    assert isinstance(sampler, AdaptiveImle)
    z = sampler(scores, mask(3, most=3))
    (z * torch.tensor([0.0, 0.0, 2.0])).sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0, -1.0, 1.0]]) / (2 * 5.0 / 2.0))
    assert sampler.beta == 1.0  # one node was exchanged, as it should be


def test_the_step_of_aimle_adapts_until_one_node_of_a_graph_is_exchanged():
    for start in (0.01, 100.0):
        torch.manual_seed(0)
        scores = torch.randn(64, 12)
        are_nodes, cost = mask(*[12] * 60, 2, 1, 0, 0, most=12), torch.randn(64, 12)
        sampler = build("aimle", k=3, num_samples=2)
        assert isinstance(sampler, AdaptiveImle)
        sampler.beta.fill_(start)
        for _ in range(150):
            leaf = scores.clone().requires_grad_()
            (sampler(leaf, are_nodes) * cost).sum().backward()
        noise = sum_of_gamma((200, 64, 12), 3, scores)
        noisy = scores + noise
        length = noisy[:, :60].square().sum(dim=(1, 2)).mean().sqrt()
        step = sampler.beta * length * cost / cost[:60].norm()
        exchanged = (top_k(noisy + step, are_nodes, 3) - top_k(noisy - step, are_nodes, 3)).abs().sum() / 2
        assert (exchanged / (200 * 60)).item() == pytest.approx(1, abs=0.1)


def test_the_step_of_aimle_stays_where_nothing_can_be_learned():
    sampler = build("aimle", k=2)
    assert isinstance(sampler, AdaptiveImle)
    for sizes, cost in (((2, 1), 1.0), ((6, 5), 0.0)):
        scores = torch.randn(2, 6, requires_grad=True)
        (sampler(scores, mask(*sizes)) * cost).sum().backward()
        assert scores.grad is not None and not scores.grad.any() and sampler.beta == 1
    assert "beta" in sampler.state_dict()


@pytest.mark.parametrize("kind", ["aimle", "simple", "gumbel"])
def test_the_gradient_is_as_large_as_the_loss_makes_it(kind):
    found = []
    for size in (1.0, 1000.0):
        torch.manual_seed(0)
        scores = torch.randn(4, 6, requires_grad=True)
        (build(kind)(scores, mask(6, 6, 5, 4)) * torch.arange(6.0) * size).sum().backward()
        assert scores.grad is not None and scores.grad.any()
        found.append(scores.grad / size)
    torch.testing.assert_close(*found)


def test_the_gradient_of_simple_is_that_of_exact_marginals():
    torch.manual_seed(0)
    scores = torch.randn(2, 6, requires_grad=True)
    are_nodes, cost = mask(6, 4), torch.randn(2, 6)
    (found,) = torch.autograd.grad((build("simple")(scores, are_nodes) * cost).sum(), scores)
    (exact,) = torch.autograd.grad((marginals(scores, are_nodes, 2) * cost).sum(), scores)
    torch.testing.assert_close(found, exact)


def test_the_relaxation_of_gumbel_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    sampler = build("gumbel", k=3, tau=0.7)
    assert isinstance(sampler, GumbelTopK)
    noisy = torch.randn(2, 6, dtype=torch.float64)
    found = sampler.relax(noisy, mask(6, 5))
    for row, size in enumerate((6, 5)):
        weights, chosen = noisy[row, :size].exp(), torch.zeros(size, dtype=torch.float64)
        for _ in range(3):
            p = weights ** (1 / 0.7) / (weights ** (1 / 0.7)).sum()
            chosen, weights = chosen + p, weights * (1 - p)
        torch.testing.assert_close(found[row, :size], chosen)
    assert found[1, 5] == 0
    hot = noisy.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sampler.relax(x, mask(6, 5)), hot)


@pytest.mark.parametrize("num_samples", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_training_finds_the_best_subset(kind, num_samples):
    """A loss that is 0 for the two planted nodes of each graph and more for any other two."""
    torch.manual_seed(0)
    sizes = (6, 5, 3)
    planted = torch.tensor([[0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]]).float()
    scores = (torch.randn(3, 6) - 2 * planted).requires_grad_()
    assert not torch.equal(top_k(scores, mask(*sizes), 2), planted)
    sampler = build(kind, num_samples=num_samples)
    optimizer = torch.optim.Adam([scores], lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        (sampler(scores, mask(*sizes)) - planted).square().sum().backward()
        optimizer.step()
    assert torch.equal(top_k(scores, mask(*sizes), 2), planted)
    if kind != "soft":
        assert torch.equal(sampler.eval()(scores, mask(*sizes)), planted)


def test_half_precision_is_no_obstacle():
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float16):
            scores = torch.randn(2, 6).to(dtype).requires_grad_()
            z = build(kind)(scores, mask(6, 3))
            assert z.sum(dim=1).tolist() == pytest.approx([2, 2], abs=0.02)
            (z * torch.arange(6)).sum().backward()
            assert scores.grad is not None and scores.grad.isfinite().all(), kind


def test_what_is_centred_has_the_kth_best_at_0():
    scores = torch.tensor([[3.0, 1.0, 2.0, -1e6], [7.0, 7.0, 0.0, 0.0]])
    found = centred(scores, mask(4, 2, most=4), 2)
    assert found.tolist() == [[1, -1, 0, -40], [0, 0, 0, 0]]
    assert isinstance(build("imle"), Imle)
