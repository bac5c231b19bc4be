"""Pure losses on scores: tensors in, scalars or named terms out.

Labels and predictions live on the label scale [0, 1], higher is better; predictions may stray outside it.
B is the batch, E the width of an embedding. Every loss has the one signature `loss(pred_B, target_B) -> ()`, those
of label distributions a third argument `std_B`, the standard deviation of the opinions behind each label. It takes
inputs without missing labels, and gives an exact 0.0 that still has a (zero) gradient where there is
nothing to compare. Arithmetic is in float32 whatever AMP made of the predictions; float64 stays float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

# A tenth of the label scale, 0.4 of a grade on the five-grade scale: larger errors count as outliers.
HUBER_DELTA = 0.1
# Standard deviation of one image's opinion in Thurstone's model. UNIQUE and LIQE use 1 on wider scales; on
# [0, 1] that would hold every probability between .24 and .76, and no order of predictions would get near 0.
THURSTONE_SIGMA = 0.1
# Opinions that agree better than this are taken for agreeing by chance: few people were asked.
MIN_OPINION_STD = 0.02
# A spread of scores on [0, 1] below this is rounding, and dividing by it would make gradients explode.
MIN_STD = 1e-6
# An embedding shorter than this counts as this long: one that starts at 0 would get a gradient of 1e8.
MIN_NORM = 1e-3


def mse_loss(pred_B: Tensor, target_B: Tensor) -> Tensor:
    """Mean squared error."""
    pred, target = _prepare(pred_B, target_B)
    return F.mse_loss(pred, target) if pred.numel() else _zero(pred)


def l1_loss(pred_B: Tensor, target_B: Tensor) -> Tensor:
    """Mean absolute error."""
    pred, target = _prepare(pred_B, target_B)
    return F.l1_loss(pred, target) if pred.numel() else _zero(pred)


def huber_loss(pred_B: Tensor, target_B: Tensor) -> Tensor:
    """Huber's loss: half the squared error up to HUBER_DELTA, linear with slope HUBER_DELTA beyond."""
    pred, target = _prepare(pred_B, target_B)
    return F.huber_loss(pred, target, delta=HUBER_DELTA) if pred.numel() else _zero(pred)


def plcc_loss(pred_B: Tensor, target_B: Tensor) -> Tensor:
    """(1 - r) / 2 in [0, 1], r being Pearson's correlation within the batch.

    0 with a zero gradient where r is undefined: fewer than two items, or a side with std <= MIN_STD.
    """
    pred, target = _prepare(pred_B, target_B)
    if pred.numel() < 2:
        return _zero(pred)
    pred, target = pred - pred.mean(), target - target.mean()
    var_pred, var_target = pred.square().mean(), target.square().mean()
    # The inner `where` keeps the branch that the outer one drops finite: its gradient is multiplied by 0.
    defined = (var_pred > MIN_STD**2) & (var_target > MIN_STD**2)
    r = (pred * target).mean() / torch.where(defined, var_pred * var_target, 1.0).sqrt()
    return torch.where(defined, ((1 - r) / 2).clamp(0, 1), _zero(pred))


def rank_loss(pred_B: Tensor, target_B: Tensor) -> Tensor:
    """Margin ranking loss, the margin of a pair being its difference in label.

    The mean of max(0, (t_i - t_j) - (p_i - p_j)) over the pairs with t_i > t_j. Pairs of equal labels order
    nothing and are left out; no other pairs, 0.

    Source: Wen and Wang, "A strong baseline for image and video quality assessment", 2021 (its
    L_rank, without the ties).
    """
    pred, target = _prepare(pred_B, target_B)
    gap_pred, gap_target = _differences(pred), _differences(target)
    shortfall = F.relu(gap_target.abs() - gap_target.sign() * gap_pred)
    return shortfall.sum() / (gap_target != 0).sum().clamp(min=1)


def fidelity_loss(pred_B: Tensor, target_B: Tensor) -> Tensor:
    """Fidelity loss, in [0, 1], between the order of the labels and Thurstone's model of the predictions.

    The mean over pairs of 1 - sqrt(p p^) - sqrt((1 - p)(1 - p^)), with p = 1, 1/2 or 0 as t_i is above, equal
    to or below t_j, and p^ = Phi((p_i - p_j) / (sqrt(2) THURSTONE_SIGMA)). Of the labels only order counts.

    Source: Tsai et al., "FRank: a ranking method with fidelity loss", SIGIR 2007; for image quality Zhang et
    al., "Uncertainty-aware blind image quality assessment in the laboratory and wild" (UNIQUE), TIP 2021.
    """
    pred, target = _prepare(pred_B, target_B)
    p = (_differences(target).sign() + 1) / 2
    return _fidelity(pred, p, 1 - p)


def thurstone_loss(pred_B: Tensor, target_B: Tensor, std_B: Tensor) -> Tensor:
    """`fidelity_loss` against the probability that people prefer one image to the other.

    As there, but p = Phi((t_i - t_j) / sqrt(s_i^2 + s_j^2)) for opinions of standard deviation s around each label:
    a pair on which opinions overlap need not be ordered for certain.

    Source: Zhang et al. (UNIQUE), TIP 2021, equations 2 to 4.
    """
    pred, target = _prepare(pred_B, target_B)
    _, std = _prepare(pred_B, std_B)
    variance = std.clamp(min=MIN_OPINION_STD).square()
    z = _differences(target) / _pair_sums(variance).sqrt()
    return _fidelity(pred, torch.special.ndtr(z), torch.special.ndtr(-z))


def kl_loss(pred_B: Tensor, target_B: Tensor, std_B: Tensor) -> Tensor:
    """KL divergence of the label distribution N(t, s^2) from N(p, s^2), relative to the batch's mean precision.

    The mean of (p - t)^2 w with w = s^-2 / mean(s^-2): where all opinions spread alike, `mse_loss`; elsewhere an error
    counts less the less people agree.
    """
    pred, target = _prepare(pred_B, target_B)
    _, std = _prepare(pred_B, std_B)
    if not pred.numel():
        return _zero(pred)
    precision = std.clamp(min=MIN_OPINION_STD).square().reciprocal()
    return ((pred - target).square() * precision / precision.mean()).mean()


def _fidelity(pred: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Mean fidelity loss of Thurstone's model of `pred` (B,) against probabilities p of all pairs i < j.

    q is 1 - p, which the float32 next to 1 leaves no digits of: the loss would depend on which of a pair is first.
    """
    if pred.numel() < 2:
        return _zero(pred)
    z = _differences(pred) / (math.sqrt(2) * THURSTONE_SIGMA)
    # Long before 60 the loss is flat in float64 too; far beyond it the derivative of log_ndtr is NaN.
    z = z.clamp(-60, 60)
    # sqrt(Phi(z)) by its logarithm: the gradient of sqrt is infinite where Phi underflows to 0.
    above = torch.exp(torch.special.log_ndtr(z) / 2)
    below = torch.exp(torch.special.log_ndtr(-z) / 2)
    return (1 - p.sqrt() * above - q.sqrt() * below).mean()


LOSSES: dict[str, Loss] = {
    "mse": mse_loss,
    "l1": l1_loss,
    "huber": huber_loss,
    "plcc": plcc_loss,
    "rank": rank_loss,
    "fidelity": fidelity_loss,
}
SPREAD_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"kl": kl_loss, "thurstone": thurstone_loss}


def combined_loss(
    terms: Sequence[tuple[float, str]],
    pred_B: Tensor,
    target_B: Tensor,
    labelled: Tensor | slice | None = None,
    std_B: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the named losses over the rows that have a label; a NaN in `target_B` is a missing one.

    `terms` are (weight, name) with names from LOSSES and SPREAD_LOSSES (which need `std_B`), as in
    [(1.0, "mse"), (0.5, "plcc")]. Rows without a label get a gradient of exactly 0, and a batch without any gives 0.0.
    `labelled` selects the rows that have one; left out, they are looked for, for which a GPU has to be waited for.
    Returns a scalar.
    """
    unknown = [name for _, name in terms if name not in {**LOSSES, **SPREAD_LOSSES}]
    if unknown:
        raise ValueError(f"unknown loss {unknown[0]!r}, choose from {', '.join([*LOSSES, *SPREAD_LOSSES])}")
    pred, target = _prepare(pred_B, target_B)
    if labelled is None:
        labelled = ~torch.isnan(target)
    # Selecting, not multiplying by 0: NaN * 0 is NaN, in the backward pass too.
    pred, target = pred[labelled], target[labelled]
    total = _zero(pred)
    for weight, name in terms:
        if name in LOSSES:
            value = LOSSES[name](pred, target)
        elif std_B is None:
            raise ValueError(f"the loss {name} needs the standard deviation of the opinions")
        else:
            value = SPREAD_LOSSES[name](pred, target, std_B[labelled])
        total = total + weight * value
    return total


def smooth_targets(target_B: Tensor, mean: float, amount: float) -> Tensor:
    """Label smoothing for regression: labels (B,) pulled towards the training `mean`; NaN stays NaN.

    `amount` in [0, 1] is the share of the mean; anything else is a ValueError.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"label smoothing must be in [0, 1], got {amount}")
    return (1 - amount) * target_B + amount * mean


def rationale_loss(pred_RE: Tensor, text_RE: Tensor) -> Tensor:
    """Mean of 1 - cosine, in [0, 2], of the predicted and the text embeddings of R rationales.

    The text side is a fixed target: no gradient flows into it. No rows give 0.0. Returns a scalar.
    """
    pred, text = _prepare(pred_RE, text_RE.detach())
    if not len(pred):
        return _zero(pred)
    return (1 - F.cosine_similarity(pred, text, dim=-1, eps=MIN_NORM)).mean()


def score_losses(
    pred: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    *,
    weights: Mapping[str, float],
    terms: Sequence[tuple[float, str]],
    smoothing: float,
    means: Mapping[str, float],
    labelled: Mapping[str, Tensor | None] | None = None,
    spreads: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Losses of all tasks in `pred` ("q", "c"): {"loss_q": ..., "loss_c": ..., "loss": ...}, all scalars.

    `pred` and `target` map a task to its scores (B,), NaN for a missing label; `weights` and `means` (of the
    training labels, on [0, 1]) need every task in `pred`. A task's own entry is unweighted, "loss" is the sum
    of weight * entry. `labelled` maps a task to the places that have a label, None for all; left out, they are
    looked for. `spreads` maps a task to the standard deviation (B,) of the opinions behind each label, which losses of
    label distributions need.
    """
    if not pred:
        raise ValueError("score_losses needs the predictions of at least one task")

    def places(task: str) -> Tensor | slice | None:
        if labelled is None:
            return None
        found = labelled[task]
        return slice(None) if found is None else found

    losses = {}
    for task, scores in pred.items():
        smoothed = smooth_targets(target[task], means[task], smoothing)
        losses[f"loss_{task}"] = combined_loss(terms, scores, smoothed, places(task), (spreads or {}).get(task))
    total = torch.stack([weights[task] * losses[f"loss_{task}"] for task in pred]).sum()
    return {**losses, "loss": total}


def _prepare(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in float32, or in float64 where `pred` is; unequal shapes would broadcast silently."""
    if pred.shape != target.shape:
        raise ValueError(f"shapes must agree, got {tuple(pred.shape)} and {tuple(target.shape)}")
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    return pred.to(dtype), target.to(dtype)


def _zero(pred: Tensor) -> Tensor:
    """0.0 that stays attached to the graph, so that backward() works and gives zeros."""
    return pred.sum() * 0.0


def _differences(x_B: Tensor) -> Tensor:
    """x_i - x_j for all pairs i < j: (B,) -> (B * (B - 1) / 2,)."""
    i, j = torch.triu_indices(len(x_B), len(x_B), offset=1, device=x_B.device)
    return x_B[i] - x_B[j]


def _pair_sums(x_B: Tensor) -> Tensor:
    """x_i + x_j for all pairs i < j: (B,) -> (B * (B - 1) / 2,)."""
    i, j = torch.triu_indices(len(x_B), len(x_B), offset=1, device=x_B.device)
    return x_B[i] + x_B[j]
