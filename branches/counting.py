"""A counter of regions: how many different objects does attention rest on?

After Zhang, Hare and Prügel-Bennett, Learning to Count Objects in Natural Images for Visual Question Answering (2018):
regions that overlap are one object seen several times, and are taken together without deciding which is which.

Shapes: B batch, M regions, K regions that are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

NUM_PIECES = 16


class PiecewiseLinear(nn.Module):
    """A learned monotone function from [0, 1] onto [0, 1], the identity at first."""

    def __init__(self, pieces: int = NUM_PIECES) -> None:
        super().__init__()
        self.rise = nn.Parameter(torch.ones(pieces))

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        rise = self.rise.abs() / self.rise.abs().sum()
        heights = torch.cat([rise.new_zeros(1), rise.cumsum(0)])
        place = (x * len(rise)).clamp(0, len(rise))
        piece = place.detach().long().clamp(max=len(rise) - 1)
        return heights[piece] + (place - piece) * rise[piece]


class Counter(nn.Module):
    """Boxes and how much attention each has -> how many objects that are, softly one-hot.

    Equations (with a = sigmoid(attention), d = 1 - IoU and learned monotone f):

        A_ij  = f_1(a_i a_j) f_2(d_ij)                                     edges between different objects
        s_ij  = f_3(1 - |a_i - a_j|) prod_k f_3(1 - |X_ik - X_jk|)         how alike two regions are,
        X_ij  = f_4(a_i a_j) f_5(d_ij)                                     by what they are connected to
        count = sqrt(sum_ij A_ij / (s_i s_j) + sum_i f_1(a_i^2) / s_i)     with s_i = sum_j s_ij
        confidence = f_8(mean |f_6(a) - .5| + mean |f_7(d) - .5|)
    """

    def __init__(self, num_objects: int) -> None:
        super().__init__()
        self.num_objects = num_objects
        self.f = nn.ModuleList(PiecewiseLinear() for _ in range(8))

    def forward(self, attention_BM: Tensor, boxes_BM4: Tensor) -> Tensor:
        """Logits (B, M), those of no region being -inf, and x1, y1, x2, y2 (B, M, 4) -> (B, num_objects + 1)."""
        a_BK, boxes_BK4, there_BK = self.most_attended(attention_BM, boxes_BM4)
        there_BKK = there_BK[:, :, None] * there_BK[:, None, :]
        distance = 1 - torch.vmap(box_iou)(boxes_BK4, boxes_BK4).nan_to_num()
        both = a_BK[:, :, None] * a_BK[:, None, :]
        edges = self.f[0](both) * self.f[1](distance)
        likeness = self.likeness(a_BK, self.f[3](both) * self.f[4](distance)) * there_BKK
        likeness_BK = likeness.sum(dim=2) + (1 - there_BK)
        of_pairs = (edges / (likeness_BK[:, :, None] * likeness_BK[:, None, :])).sum(dim=(1, 2))
        of_regions = (self.f[0](a_BK.square()) / likeness_BK).sum(dim=1)
        count_B = (of_pairs + of_regions).clamp(min=1e-20).sqrt()
        certainty = mean_where((self.f[5](a_BK) - 0.5).abs(), there_BK)
        certainty = certainty + mean_where((self.f[6](distance) - 0.5).abs().flatten(1), there_BKK.flatten(1))
        return self.soft_one_hot(count_B) * self.f[7](certainty)[:, None]

    def most_attended(self, attention_BM: Tensor, boxes_BM4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention (B, K) on [0, 1], boxes (B, K, 4) and 1 or 0 (B, K) for whether there is one.

        Of the regions with most attention, at most num_objects.
        """
        logits, places = attention_BM.topk(min(self.num_objects, attention_BM.shape[1]), dim=1)
        boxes = boxes_BM4.gather(1, places[..., None].expand(-1, -1, 4))
        return logits.sigmoid(), boxes, (logits > -torch.inf).to(logits.dtype)

    def likeness(self, a_BK: Tensor, connected: Tensor) -> Tensor:
        """(B, K, K) how alike each two regions are, 1 being the same."""
        by_attention = self.f[2](1 - (a_BK[:, :, None] - a_BK[:, None, :]).abs())
        differences = (connected[:, :, None] - connected[:, None]).abs()  # (B, i, j, k)
        return by_attention * self.f[2](1 - differences).prod(dim=3)

    def soft_one_hot(self, count_B: Tensor) -> Tensor:
        """(B,) -> (B, num_objects + 1): all of it on a whole number, else shared by the two nearest."""
        count_B = count_B.clamp(max=float(self.num_objects))
        steps = torch.arange(self.num_objects + 1, device=count_B.device)
        return (1 - (count_B[:, None] - steps).abs()).clamp(min=0)


def mean_where(values: Tensor, weights: Tensor) -> Tensor:
    """The mean (B,) of the values (B, ...) whose weight is 1, not 0."""
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
