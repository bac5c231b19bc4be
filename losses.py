"""Pure losses on scores: tensors in, scalars or named terms out.

Labels and predictions live on the label scale [0, 1], higher is better; predictions may stray outside it.
B is the batch, E the width of an embedding. Every loss has the one signature `loss(pred_B, target_B) -> ()`. It takes
inputs without missing labels, and gives an exact 0.0 that still has a (zero) gradient where there is nothing to
compare. Arithmetic is in float32 whatever AMP made of the predictions; float64 stays float64.
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


def fidelity_loss(pred_B: Tensor, target_B: Tensor) -> Tensor:
    """Fidelity loss, in [0, 1], between the order of the labels and Thurstone's model of the predictions.

    The mean over pairs of 1 - sqrt(p p^) - sqrt((1 - p)(1 - p^)), with p = 1, 1/2 or 0 as t_i is above, equal
    to or below t_j, and p^ = Phi((p_i - p_j) / (sqrt(2) THURSTONE_SIGMA)). Of the labels only order counts.

    Source: Tsai et al., "FRank: a ranking method with fidelity loss", SIGIR 2007; for image quality Zhang et
    al., "Uncertainty-aware blind image quality assessment in the laboratory and wild" (UNIQUE), TIP 2021.
    """
    pred, target = _prepare(pred_B, target_B)
    if pred.numel() < 2:
        return _zero(pred)
    p = (_differences(target).sign() + 1) / 2
    # Long before 60 the loss is flat in float64 too; far beyond it the derivative of log_ndtr is NaN.
    z = (_differences(pred) / (math.sqrt(2) * THURSTONE_SIGMA)).clamp(-60, 60)
    # sqrt(Phi(z)) by its logarithm: the gradient of sqrt is infinite where Phi underflows to 0.
    above = torch.exp(torch.special.log_ndtr(z) / 2)
    below = torch.exp(torch.special.log_ndtr(-z) / 2)
    return (1 - p.sqrt() * above - (1 - p).sqrt() * below).mean()


LOSSES: dict[str, Loss] = {
    "mse": mse_loss,
    "l1": l1_loss,
    "huber": huber_loss,
    "plcc": plcc_loss,
    "fidelity": fidelity_loss,
}


def combined_loss(
    terms: Sequence[tuple[float, str]],
    pred_B: Tensor,
    target_B: Tensor,
    labelled: Tensor | slice | None = None,
) -> Tensor:
    """Weighted sum of the named losses over the rows that have a label; a NaN in `target_B` is a missing one.

    `terms` are (weight, name) with names from LOSSES, as in [(1.0, "mse"), (0.5, "plcc")]. Rows without a label get a
    gradient of exactly 0, and a batch without any gives 0.0. `labelled` selects the rows that have one; left out, they
    are looked for, for which a GPU has to be waited for.
    Returns a scalar.
    """
    unknown = [name for _, name in terms if name not in LOSSES]
    if unknown:
        raise ValueError(f"unknown loss {unknown[0]!r}, choose from {', '.join(LOSSES)}")
    pred, target = _prepare(pred_B, target_B)
    if labelled is None:
        labelled = ~torch.isnan(target)
    # Selecting, not multiplying by 0: NaN * 0 is NaN, in the backward pass too.
    pred, target = pred[labelled], target[labelled]
    total = _zero(pred)
    for weight, name in terms:
        total = total + weight * LOSSES[name](pred, target)
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
) -> dict[str, Tensor]:
    """Losses of all tasks in `pred` ("q", "c"): {"loss_q": ..., "loss_c": ..., "loss": ...}, all scalars.

    `pred` and `target` map a task to its scores (B,), NaN for a missing label; `weights` and `means` (of the
    training labels, on [0, 1]) need every task in `pred`. A task's own entry is unweighted, "loss" is the sum
    of weight * entry. `labelled` maps a task to the places that have a label, None for all; left out, they are
    looked for.
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
        losses[f"loss_{task}"] = combined_loss(terms, scores, smoothed, places(task))
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
