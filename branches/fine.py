"""The fine branch: every word of a question against every region of its image.

Bilinear attention (Kim, Jun and Zhang, Bilinear Attention Networks, 2018) finds the pairs of words and regions that
matter, attention on attention (Huang et al., 2019) lets words and regions inform themselves and each other, and
`branches.counting` tells how many regions the question is about.

Shapes: B questions, I images, N words, M regions, D joint width, G glimpses, A answers. Masks are True where there is
something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from branches.counting import Counter

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "swish": nn.SiLU}
ATTENTION_FACTOR = 3  # attention is judged in a space this much wider than the joint one, as by Kim et al.
HEAD_WIDTH = 64
EMBED_STD = 0.1  # of words without given vectors: small, so that training soon outweighs chance


def linear(width_in: int, width_out: int) -> nn.Linear:
    """A linear map whose weight is kept as a direction and one length."""
    whole = -1  # and not one length for each output
    return weight_norm(nn.Linear(width_in, width_out), dim=whole)


def projection(width_in: int, width_out: int, dropout: float) -> nn.Sequential:
    """Dropout, a weight-normalised linear map, ReLU."""
    return nn.Sequential(nn.Dropout(dropout), linear(width_in, width_out), nn.ReLU())


class BilinearAttention(nn.Module):
    """Attention over all pairs of two sequences, G times.

        logit_g(i, j) = h_g . (relu(W_x x_i) * relu(W_y y_j)) + c_g

    and softmax over the pairs of which both are there.
    """

    def __init__(self, width_x: int, width_y: int, width: int, glimpses: int, dropout: float = 0.2) -> None:
        super().__init__()
        wide = ATTENTION_FACTOR * width
        self.project_x = projection(width_x, wide, dropout)
        self.project_y = projection(width_y, wide, dropout)
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.randn(glimpses, wide) / wide**0.5)
        self.bias = nn.Parameter(torch.zeros(glimpses))

    def forward(self, x_BND: Tensor, y_BMD: Tensor, x_mask: Tensor, y_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, Dx), (B, M, Dy) and their masks -> attention (B, G, N, M), which sums to 1, and its logits."""
        x, y = self.dropout(self.project_x(x_BND)), self.project_y(y_BMD)
        logits_BGNM = torch.einsum("gk,bnk,bmk->bgnm", self.weight, x, y) + self.bias[:, None, None]
        pairs = (x_mask[:, :, None] & y_mask[:, None, :])[:, None]
        logits_BGNM = logits_BGNM.masked_fill(~pairs, torch.finfo(logits_BGNM.dtype).min)
        attention = F.softmax(logits_BGNM.flatten(2), dim=-1).view_as(logits_BGNM)
        return attention * pairs, logits_BGNM  # of an image without any region, nothing


class BilinearPooling(nn.Module):
    """What two sequences make of each other under attention: sum over pairs of attention * relu(V x) * relu(U y)."""

    def __init__(self, width_x: int, width_y: int, width: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.project_x = projection(width_x, width, dropout)
        self.project_y = projection(width_y, width, dropout)

    def forward(self, x_BND: Tensor, y_BMD: Tensor, attention_BNM: Tensor) -> Tensor:
        """(B, N, Dx), (B, M, Dy), (B, N, M) -> (B, D)."""
        return torch.einsum("bnd,bnm,bmd->bd", self.project_x(x_BND), attention_BNM, self.project_y(y_BMD))


class GatedFusion(nn.Module):
    """Let a sequence take in what another one has to say of it: x + omega * (P b) * x, b being their bilinear pooling.

    omega, which is learned, starts small, so that x is at first nearly what it was.
    """

    def __init__(self, width: int, width_other: int, omega: float) -> None:
        super().__init__()
        self.attend = BilinearAttention(width, width_other, width, glimpses=1)
        self.pool = BilinearPooling(width, width_other, width)
        self.project = linear(width, width)
        self.omega = nn.Parameter(torch.tensor(float(omega)))

    def forward(self, x_BND: Tensor, other_BMD: Tensor, x_mask: Tensor, other_mask: Tensor) -> Tensor:
        """(B, N, D), (B, M, D') and their masks -> (B, N, D)."""
        attention, _ = self.attend(x_BND, other_BMD, x_mask, other_mask)
        pooled_BD = self.pool(x_BND, other_BMD, attention[:, 0])
        return x_BND + self.omega * self.project(pooled_BD)[:, None] * x_BND


class AttentionOnAttention(nn.Module):
    """Attention whose result is gated by what asked for it: GLU(W [attended, query])."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(1, width // HEAD_WIDTH)
        if width % self.num_heads:
            raise ValueError(f"--num_hid {width}: must be a multiple of {HEAD_WIDTH}, or below {2 * HEAD_WIDTH}")
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * width, bias=False)
        self.gate = nn.Linear(2 * width, 2 * width)

    def forward(self, x_BND: Tensor, context_BMD: Tensor, context_mask: Tensor) -> Tensor:
        """(B, N, D), (B, M, D) and the mask of the second -> (B, N, D)."""
        query = self.to_query(x_BND)
        key, value = self.to_key_value(context_BMD).chunk(2, dim=-1)
        heads = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        query_BHND, key_BHMD, value_BHMD = heads
        # Where there is nothing to look at, all places are looked at, whose sum below is taken for nothing.
        is_empty = ~context_mask.any(dim=1)
        mask = context_mask | is_empty[:, None]
        attended = F.scaled_dot_product_attention(query_BHND, key_BHMD, value_BHMD, mask[:, None, None])
        attended = attended.transpose(1, 2).flatten(2) * ~is_empty[:, None, None]
        return F.glu(self.gate(torch.cat([attended, query], dim=-1)), dim=-1)


def word_embedding(num_words: int, width: int) -> nn.Embedding:
    """Vectors of words to learn, that of padding being 0."""
    embed = nn.Embedding(num_words, width, padding_idx=0)
    nn.init.normal_(embed.weight, std=EMBED_STD)
    with torch.no_grad():
        embed.weight[0] = 0.0
    return embed


def look_up(embed: Callable[[Tensor], Tensor], *words: Tensor) -> list[Tensor]:
    """Numbers of words, in several tensors of shape (...) -> their vectors (..., D) for each of these.

    All are looked up at once, because every look-up has a gradient as large as the vocabulary.
    """
    found = embed(torch.cat([each.flatten() for each in words]))
    parts = found.split([each.numel() for each in words])
    return [part.view(*each.shape, found.shape[1]) for part, each in zip(parts, words, strict=True)]


def prior_logits(accuracy_A: Tensor, loss: str) -> Tensor:
    """Logits (A,) that say of each answer how right it is on average.

    Args:
        loss: "bce", whose logits are those of each answer by itself, or "ce".
    """
    prior_A = accuracy_A.float().clamp(1e-6, 1 - 1e-6)
    return torch.logit(prior_A) if loss == "bce" else prior_A.log()


class WordEncoder(nn.Module):
    """Words as vectors, and what a GRU makes of them in their order."""

    def __init__(self, num_words: int, embed_dim: int, width: int, *, second: bool, dropout: float) -> None:
        super().__init__()
        self.embed = nn.ModuleList(word_embedding(num_words, embed_dim) for _ in range(2 if second else 1))
        self.dropout = nn.Dropout(dropout)
        self.read = nn.GRU(embed_dim * len(self.embed), width, batch_first=True)

    @property
    def embed_width(self) -> int:
        """Numbers of a word's vector."""
        return self.read.input_size

    @torch.no_grad()
    def start_from(self, vectors_VD: Tensor, neighbours_VD: Tensor | None) -> None:
        """Take given vectors of words, and of the company that they keep."""
        for layer, vectors in zip(self.embed, (vectors_VD, neighbours_VD), strict=False):
            if vectors is not None:
                cast(nn.Embedding, layer).weight.copy_(vectors)

    def first_vectors(self) -> Tensor:
        """(V, D) of all words, without those of their company."""
        return cast(nn.Embedding, self.embed[0]).weight

    def vectors(self, *words: Tensor) -> list[Tensor]:
        """See `look_up`; each vector has embed_width numbers."""
        return look_up(
            lambda numbers: self.dropout(torch.cat([embed(numbers) for embed in self.embed], dim=-1)), *words
        )

    def forward(self, vectors_BND: Tensor) -> Tensor:
        """(B, N, embed_width) vectors of words, padded on the right -> (B, N, D)."""
        return self.read(vectors_BND)[0]


class Layer(nn.Module):
    """Words inform each other, then regions each other, then regions take in the words; all as residuals."""

    def __init__(self, width: int, *, looks: bool) -> None:
        super().__init__()
        self.words, self.norm_words = AttentionOnAttention(width), nn.LayerNorm(width)
        if looks:
            self.regions, self.across = (AttentionOnAttention(width) for _ in range(2))
            self.norm_regions, self.norm_across = (nn.LayerNorm(width) for _ in range(2))

    def among_regions(self, v: Tensor, v_mask: Tensor) -> Tensor:
        """(I, M, D) and its mask -> the same: regions inform each other, whatever is asked."""
        known = self.norm_regions(v)
        return v + self.regions(known, known, v_mask)

    def forward(
        self, q: Tensor, v: Tensor | None, q_mask: Tensor, v_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), (B, M, D) and their masks -> the same; without regions, words alone.

        Without a mask of the regions, they have informed each other before.
        """
        known = self.norm_words(q)
        q = q + self.words(known, known, q_mask)
        if v is None:
            return q, None
        if v_mask is not None:
            v = self.among_regions(v, v_mask)
        return q, v + self.across(self.norm_across(v), q, q_mask)


class FineBranch(nn.Module):
    """Questions and regions in, logits of answers out.

    Q = GRU(words), gated by the entities named in the question (omega_q)
    V = regions and where they are, gated by words that describe the image (omega_v)
    Q, V through the layers of attention on attention
    Q <- Q + P_g b_g + counter_g        for each glimpse g, b_g being what words and regions make of each other
    logits = MLP(sum of Q over its words)
    """

    def __init__(
        self,
        *,
        num_words: int,
        num_answers: int,
        feature_width: int,
        embed_dim: int = 300,
        width: int = 1024,
        glimpses: int = 2,
        layers: int = 6,
        activation: str = "swish",
        dropout: float = 0.45,
        omega_q: float = 0.1,
        omega_v: float = 0.01,
        second_embedding: bool = True,
        count_objects: int = 0,
    ) -> None:
        """Build with fresh weights.

        Args:
            feature_width: of the vector of a region; 0: no image is looked at.
            second_embedding: words have a second vector each, of the company they keep.
            count_objects: how many the counter tells apart; 0: there is none.
        """
        super().__init__()
        self.encode = WordEncoder(num_words, embed_dim, width, second=second_embedding, dropout=0.2)
        self.take_entities = GatedFusion(width, self.encode.embed_width, omega_q)
        self.feature_width = feature_width
        self.layers = nn.ModuleList(Layer(width, looks=self.looks) for _ in range(layers))
        self.classify = nn.Sequential(
            linear(width, 2 * width),
            ACTIVATIONS[activation](),
            nn.Dropout(dropout),
            linear(2 * width, num_answers),
        )
        self.recomputes = False  # layers, in the backward pass, instead of keeping what they were computed from
        if not self.looks:
            return
        self.look = nn.Sequential(nn.LayerNorm(feature_width), nn.Linear(feature_width, width), nn.Dropout(0.2))
        self.place = nn.Linear(6, width)
        self.take_description = GatedFusion(width, width, omega_v)
        self.attend = BilinearAttention(width, width, width, glimpses)
        self.pool = nn.ModuleList(BilinearPooling(width, width, width) for _ in range(glimpses))
        self.project = nn.ModuleList(linear(width, width) for _ in range(glimpses))
        self.counter = Counter(count_objects) if count_objects else None
        self.project_count = nn.Linear(count_objects + 1, width) if count_objects else None

    @property
    def looks(self) -> bool:
        """Whether images are looked at."""
        return self.feature_width > 0

    @torch.no_grad()
    def expect(self, accuracy_A: Tensor, loss: str) -> None:
        """Begin with how right each answer is on average, rather than to learn that first; see `prior_logits`."""
        cast(nn.Linear, self.classify[-1]).bias.copy_(prior_logits(accuracy_A, loss))

    def forward(
        self,
        words_BN: Tensor,
        entities_BE: Tensor,
        features_IMF: Tensor | None = None,
        boxes_IM4: Tensor | None = None,
        description_IW: Tensor | None = None,
        images_B: Tensor | None = None,
    ) -> Tensor:
        """Numbers of words (0: none), vectors of regions and their boxes on [0, 1] (all 0: none) -> (B, A) logits.

        images_B tells which of the images each question is about; without it, each is about its own. What does not
        depend on the question is computed once for each image.
        """
        words = [each for each in (words_BN, entities_BE, description_IW) if each is not None]
        words_BND, entities_BED, *description = self.encode.vectors(*words)
        q_mask = words_BN > 0
        q = self.take_entities(self.encode(words_BND), entities_BED, q_mask, entities_BE > 0)
        v, v_mask, boxes_BM4 = None, None, boxes_IM4
        if self.looks:
            assert features_IMF is not None and boxes_IM4 is not None and description_IW is not None
            v_mask = (boxes_IM4 > 0).any(dim=-1)
            v = self.look(features_IMF) + self.place(geometry(boxes_IM4))
            v = self.take_description(v, self.encode(description[0]), v_mask, description_IW > 0)
            if len(self.layers):
                v = cast(Layer, self.layers[0]).among_regions(v, v_mask)
            if images_B is not None:
                v, v_mask, boxes_BM4 = (each.index_select(0, images_B) for each in (v, v_mask, boxes_IM4))
        for number, layer in enumerate(self.layers):
            inputs = (q, v, q_mask, v_mask if number else None)  # the first layer's have been, once for each image
            if self.recomputes and torch.is_grad_enabled():
                q, v = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                q, v = layer(*inputs)
        if v is not None:
            assert v_mask is not None
            q = self.look_up(q, v, q_mask, v_mask, boxes_BM4)
        return self.classify((q * q_mask[..., None]).sum(dim=1))

    def look_up(self, q: Tensor, v: Tensor, q_mask: Tensor, v_mask: Tensor, boxes_BM4: Tensor | None) -> Tensor:
        """(B, N, D), (B, M, D) -> the words (B, N, D) with what each glimpse at the regions adds."""
        attention_BGNM, logits_BGNM = self.attend(q, v, q_mask, v_mask)
        for glimpse, (pool, project) in enumerate(zip(self.pool, self.project, strict=True)):
            q = q + project(pool(q, v, attention_BGNM[:, glimpse]))[:, None]
            if self.counter is not None and self.project_count is not None:
                regions_BM = logits_BGNM[:, glimpse].amax(dim=1).masked_fill(~v_mask, -torch.inf)
                q = q + self.project_count(self.counter(regions_BM, boxes_BM4))[:, None]
        return q


def geometry(boxes_BM4: Tensor) -> Tensor:
    """x1, y1, x2, y2 -> (B, M, 6) with width and height."""
    return torch.cat([boxes_BM4, boxes_BM4[..., 2:] - boxes_BM4[..., :2]], dim=-1)
