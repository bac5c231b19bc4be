"""Choosing exactly k nodes of each graph, such that what chooses them can be trained.

Each sampler turns scores into z, which is 1 for nodes that are chosen and 0 for others, and passes gradients with
respect to z on to the scores by its own estimate. A graph of no more than k nodes keeps them all.

Shapes: B graphs, K nodes of the largest graph, k nodes that are chosen, S samples of noise. Masks are True where there
is a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import Gamma

NOT_THERE = -1e30  # the logarithm of nothing, finite, so that no gradient becomes NaN
FURTHEST = 40.0  # from the k-th best score: a node beyond is chosen always or never, to the last digit
GAMMA_TERMS = 10  # of the sum whose limit is exact
ADAPTS_BY = 0.1  # at most so much, as a logarithm, does the step of AIMLE change at once
ANY_SIZE = 1e-6  # of scores that are all 0


def top_k(scores_BK: Tensor, mask_BK: Tensor, k: int) -> Tensor:
    """(..., K) and (B, K) -> (..., K), 1 for the best min(k, nodes) of each graph and 0 for the rest.

    Of equal scores the first one counts as better. What the mask leaves out is never chosen, however low the others.
    """
    order = scores_BK.argsort(dim=-1, descending=True, stable=True)
    are_nodes = mask_BK.expand_as(scores_BK).gather(-1, order)
    are_best = are_nodes & (are_nodes.cumsum(dim=-1) <= k)
    return torch.zeros_like(scores_BK).scatter(-1, order, are_best.to(scores_BK.dtype))


def all_are_kept(mask_BK: Tensor, k: int) -> Tensor:
    """(B, 1) whether a graph has no more than k nodes."""
    return mask_BK.sum(dim=1, keepdim=True) <= k


def centred(scores_BK: Tensor, mask_BK: Tensor, k: int) -> Tensor:
    """(B, K) scores less the k-th best of each graph, within +-FURTHEST; of graphs that keep all nodes, 0.

    For where only differences matter, and where large ones are as good as infinite ones.
    """
    scores_BK = scores_BK.to(torch.promote_types(scores_BK.dtype, torch.float32))
    best = scores_BK.detach().masked_fill(~mask_BK, -torch.inf).topk(k, dim=1).values
    away = (scores_BK - best[:, -1:]).nan_to_num(0.0, FURTHEST, -FURTHEST).clamp(-FURTHEST, FURTHEST)
    return away.masked_fill(~mask_BK, NOT_THERE).masked_fill(all_are_kept(mask_BK, k), 0.0)


def polynomials(theta_BK: Tensor, k: int) -> Tensor:
    """(K + 1, B, k + 1) logarithms of the elementary symmetric polynomials e_j of the first i of exp(theta).

    e_j is the sum over all subsets of j elements of their products, by e_j(i + 1) = e_j(i) + exp(theta_i) e_j-1(i).
    """
    state = theta_BK.new_full((len(theta_BK), k + 1), NOT_THERE)
    state[:, 0] = 0.0
    states = [state]
    for theta_B in theta_BK.unbind(dim=1):
        longer = torch.logaddexp(state[:, 1:], state[:, :-1] + theta_B[:, None])
        state = torch.cat([state[:, :1], longer], dim=1)
        states.append(state)
    return torch.stack(states)


def marginals(scores_BK: Tensor, mask_BK: Tensor, k: int) -> Tensor:
    """(B, K) how probable each node is to be in a subset of k, if subsets are as probable as exp(sum of their scores).

    Exact and differentiable (Ahmed et al., SIMPLE: A Gradient Estimator for k-Subset Sampling, 2023), in O(K k):

        p_i = exp(theta_i) sum_j e_j(those before i) e_(k-1-j)(those after i) / e_k(all)

    They sum to k, or to the number of nodes where that is less.
    """
    k = min(k, scores_BK.shape[1])
    theta = centred(scores_BK, mask_BK, k)
    before, after = polynomials(torch.cat([theta, theta.flip(1)]), k).split(len(theta), dim=1)
    others = torch.logsumexp(before[:-1, :, :k] + after[:-1, :, :k].flip(0, 2), dim=-1)
    found = (theta + others.T - before[-1, :, k:]).exp()
    return torch.where(all_are_kept(mask_BK, k), mask_BK.to(found.dtype), found)


@torch.no_grad()
def draw_subsets(scores_BK: Tensor, mask_BK: Tensor, k: int, num_samples: int) -> Tensor:
    """(S, B, K) subsets of k nodes, 1 or 0 each, drawn by the probabilities that `marginals` tells the sums of.

    From the last node to the first: it is in with the share that subsets with it have in all that are still possible.
    """
    k = min(k, scores_BK.shape[1])
    theta = centred(scores_BK, mask_BK, k)
    known = polynomials(theta, k)
    chance = torch.rand(num_samples, *theta.shape, dtype=theta.dtype, device=theta.device)
    left = torch.full((len(theta), num_samples), k, device=theta.device)
    found = torch.zeros_like(chance)
    for i in reversed(range(theta.shape[1])):
        with_it = theta[:, i, None] + known[i].gather(1, (left - 1).clamp(min=0))
        is_in = ((with_it - known[i + 1].gather(1, left)).exp() > chance[..., i].T) & (left > 0)
        left = left - is_in.long()
        found[..., i] = is_in.T.to(found.dtype)
    return torch.where(all_are_kept(mask_BK, k), mask_BK.to(found.dtype), found)


def sum_of_gamma(shape: tuple[int, ...], k: int, like: Tensor) -> Tensor:
    """Noise for subsets of k: that of k elements together is Gumbel's (Niepert et al., 2021, theorem 1).

    (sum_i Gamma(shape 1 / k, scale k / i) - log terms) / k,   i = 1 .. terms
    """
    terms = torch.arange(1, GAMMA_TERMS + 1, dtype=torch.float32, device=like.device)
    drawn = Gamma(torch.full_like(terms, 1 / k), terms / k).sample(shape)
    return ((drawn.sum(dim=-1) - terms[-1].log()) / k).to(like.dtype)


class Sampler(nn.Module):
    """Scores to chosen nodes. In eval mode, and without any node, there is no noise and nothing to be learned."""

    is_noisy = True

    def __init__(self, k: int) -> None:
        super().__init__()
        assert k >= 1
        self.k = k

    def forward(self, scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """(B, K) scores and where there are nodes -> (B, K) which are chosen, the mean of several samples."""
        if not scores_BK.shape[1]:
            return scores_BK  # and with it what it was computed from, which thus has a gradient: 0
        if self.is_noisy and not self.training:
            return top_k(scores_BK, mask_BK, self.k)
        return self.sample(scores_BK, mask_BK)

    def sample(self, scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """As `forward`, of at least one node and with noise."""
        raise NotImplementedError


class PerturbAndMap(torch.autograd.Function):
    """The best nodes under noise; the gradient is what the sampler makes of the noise, the scores and dL/dz."""

    @staticmethod
    def forward(ctx: Any, scores_BK: Tensor, noise_SBK: Tensor, mask_BK: Tensor, sampler: Imle) -> Tensor:
        """(B, K), (S, B, K), (B, K) -> (B, K), the mean over S."""
        ctx.save_for_backward(scores_BK, noise_SBK, mask_BK)
        ctx.sampler = sampler
        return top_k(scores_BK + noise_SBK, mask_BK, sampler.k).mean(dim=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """dL/dz (B, K) -> an estimate of dL/dscores."""
        return ctx.sampler.gradient(*ctx.saved_tensors, gradients[0]), None, None, None


class Imle(Sampler):
    """Implicit maximum likelihood (Niepert, Minervini and Franceschi, Implicit MLE, 2021).

        z = top_k(theta + tau noise),   z' = top_k(alpha theta - beta dL/dz + tau noise),   dL/dtheta = mean(z - z')

    with the same noise for both: nodes that the loss would rather have chosen gain. The gradient tells where to go and
    not how much the loss gains by it. L is the loss of a graph's own question: where a batch has its mean, that is
    undone, or a larger batch would be a smaller step.
    """

    def __init__(self, k: int, num_samples: int, alpha: float, beta: float, tau: float) -> None:
        super().__init__(k)
        self.num_samples, self.alpha, self.step, self.tau = num_samples, alpha, beta, tau

    def sample(self, scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """(B, K) -> (B, K)."""
        noise = self.tau * sum_of_gamma((self.num_samples, *scores_BK.shape), self.k, scores_BK)
        return PerturbAndMap.apply(scores_BK, noise, mask_BK, self)

    def gradient(self, scores_BK: Tensor, noise_SBK: Tensor, mask_BK: Tensor, gradient_BK: Tensor) -> Tensor:
        """(B, K), (S, B, K), (B, K) and dL/dz (B, K) -> dL/dscores (B, K)."""
        chosen = top_k(scores_BK + noise_SBK, mask_BK, self.k)
        step = self.step * num_in_batch(scores_BK)
        target = top_k(self.alpha * scores_BK - step * gradient_BK + noise_SBK, mask_BK, self.k)
        return (chosen - target).mean(dim=0)


def num_in_batch(scores_BK: Tensor) -> int:
    """B, over all processes."""
    return len(scores_BK) * (dist.get_world_size() if dist.is_initialized() else 1)


class AdaptiveImle(Imle):
    """Implicit maximum likelihood whose step finds its own size (Minervini, Franceschi and Niepert, 2023).

    A difference of both sides, over the step, so that its size follows that of dL/dz:

        dL/dtheta = mean(top_k(alpha theta + step dL/dz + tau noise) - top_k(alpha theta - step dL/dz + tau noise))
                    / (2 step),
        step = beta |theta + tau noise| / |dL/dz|

    beta starts at 1, and with every backward pass grows while less than one node of a graph is exchanged between the
    two sides, and shrinks while more are. Graphs that keep all their nodes do not count.
    """

    beta: Tensor

    def __init__(self, k: int, num_samples: int, alpha: float, tau: float) -> None:
        super().__init__(k, num_samples, alpha, 0.0, tau)
        self.register_buffer("beta", torch.tensor(1.0))

    def gradient(self, scores_BK: Tensor, noise_SBK: Tensor, mask_BK: Tensor, gradient_BK: Tensor) -> Tensor:
        """(B, K), (S, B, K), (B, K) and dL/dz (B, K) -> dL/dscores (B, K); adapts beta."""
        free_BK = mask_BK & ~all_are_kept(mask_BK, self.k)
        gradient_BK = gradient_BK.masked_fill(~free_BK, 0.0)
        length = gradient_BK.norm()
        length = torch.where(length > 0, length, 1.0)
        noisy = (scores_BK + noise_SBK).masked_fill(~free_BK, 0.0)
        step = self.beta * noisy.square().sum(dim=(1, 2)).mean().sqrt().clamp(min=ANY_SIZE) / length
        sides = (self.alpha * scores_BK + sign * step * gradient_BK + noise_SBK for sign in (1, -1))
        above, below = (top_k(side, mask_BK, self.k) for side in sides)
        self.adapt(above - below, free_BK, gradient_BK)
        return ((above - below).mean(dim=0) / (2 * step)).to(scores_BK.dtype)

    def adapt(self, difference_SBK: Tensor, free_BK: Tensor, gradient_BK: Tensor) -> None:
        """Take the size of the next step from how many nodes of each graph this one exchanged."""
        num_graphs = free_BK.any(dim=1).sum() * len(difference_SBK)
        exchanged = difference_SBK.abs().sum() / 2 / num_graphs.clamp(min=1)
        change = (1 - exchanged).clamp(-1, 1) * ADAPTS_BY
        self.beta *= torch.where(gradient_BK.any(), change, 0.0).exp().to(self.beta.dtype)
        self.beta.clamp_(1e-4, 1e4)


class GumbelTopK(Sampler):
    """The best nodes under Gumbel's noise; gradients are those of a relaxation (Xie and Ermon, 2019).

    Which is the sum of k softmaxes at temperature tau, each of the scores less what was chosen before:

        a_1 = theta + noise,   p_j = softmax(a_j / tau),   a_(j+1) = a_j + log(1 - p_j)
    """

    def __init__(self, k: int, num_samples: int, tau: float) -> None:
        super().__init__(k)
        assert tau > 0
        self.num_samples, self.tau = num_samples, tau

    def sample(self, scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """(B, K) -> (B, K)."""
        size = len(scores_BK)
        scores, mask = scores_BK.repeat(self.num_samples, 1), mask_BK.repeat(self.num_samples, 1)
        drawn = torch.empty_like(scores).exponential_().clamp(min=torch.finfo(scores.dtype).tiny)
        noisy = scores - drawn.log()
        z = straight_through(top_k(noisy, mask, self.k), self.relax(noisy, mask))
        return z.unflatten(0, (self.num_samples, size)).mean(dim=0)

    def relax(self, noisy_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """(B, K) -> (B, K), which sum to k or to the number of nodes."""
        k = min(self.k, noisy_BK.shape[1])
        a = centred(noisy_BK, mask_BK, k)
        chosen = torch.zeros_like(a)
        for _ in range(k):
            p = torch.softmax(a / self.tau, dim=1)
            chosen = chosen + p
            a = a + (1 - p).clamp(min=torch.finfo(a.dtype).tiny).log()
        return torch.where(all_are_kept(mask_BK, k), mask_BK.to(a.dtype), chosen)


class Simple(Sampler):
    """Subsets drawn exactly; gradients are those of the exact marginals (Ahmed et al., SIMPLE, 2023)."""

    def __init__(self, k: int, num_samples: int) -> None:
        super().__init__(k)
        self.num_samples = num_samples

    def sample(self, scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """(B, K) -> (B, K)."""
        drawn = draw_subsets(scores_BK, mask_BK, self.k, self.num_samples).mean(dim=0)
        return straight_through(drawn, marginals(scores_BK, mask_BK, self.k))


class Soft(Sampler):
    """No choice but how probable each node is to be chosen, at temperature tau: the exact marginals."""

    is_noisy = False

    def __init__(self, k: int, tau: float) -> None:
        super().__init__(k)
        assert tau > 0
        self.tau = tau

    def sample(self, scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """(B, K) -> (B, K)."""
        return marginals(scores_BK / self.tau, mask_BK, self.k)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The first, exactly, with the gradient of the second."""
    return hard + (soft - soft.detach())


def build_sampler(kind: str, *, k: int, num_samples: int, alpha: float, beta: float, tau: float) -> Sampler:
    """A sampler by its name: imle, aimle, gumbel, simple or soft.

    Args:
        k: nodes of each graph that are chosen.
        num_samples: of noise, of which the mean is taken; soft has none.
        alpha, beta: of imle; aimle finds its own beta.
        tau: imle, aimle: the noise is multiplied by it; gumbel, soft: temperature; simple: has none.

    Raises:
        ValueError: there is no such sampler.
    """
    kinds: Mapping[str, Callable[[], Sampler]] = {
        "imle": lambda: Imle(k, num_samples, alpha, beta, tau),
        "aimle": lambda: AdaptiveImle(k, num_samples, alpha, tau),
        "gumbel": lambda: GumbelTopK(k, num_samples, tau),
        "simple": lambda: Simple(k, num_samples),
        "soft": lambda: Soft(k, tau),
    }
    if kind not in kinds:
        raise ValueError(f"--sampler_type {kind}: must be one of {', '.join(kinds)}")
    return kinds[kind]()
