"""BERT (Devlin et al., 2019) with cross-attention, its weights under the names that transformers gives them.

As an encoder it reads text and, from some layer on, looks at something else, such as an image (X-VLM, ALBEF); as a
decoder, it says what comes next, each place seeing only what stands before it.

Shapes: B texts, N tokens, D width, H heads, V vocabulary; G things to look at, of M places each and width E. Tokens are
padded on the right with 0. Masks are True where there is something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PAD = 0  # the token that stands where there is none
INIT_STD = 0.02


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT, called as in its config.json; those of bert-base-uncased by default.

    Raises:
        ValueError: they do not go together.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    fusion_layer: int = 6  # the first with cross-attention
    encoder_width: int = 768  # of what is looked at

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.fusion_layer > self.num_hidden_layers:
            raise ValueError(f"fusion_layer {self.fusion_layer} is beyond {self.num_hidden_layers} num_hidden_layers")


def present(tokens_BN: Tensor) -> Tensor:
    """(B, N) tokens -> where there is one; the first place always counts, so that nothing is left without a place."""
    mask = tokens_BN != PAD
    mask[:, 0] = True
    return mask


def init_weights(module: nn.Module) -> None:
    """Give one layer of a BERT fresh weights."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx].detach())


class Embeddings(nn.Module):
    """Tokens as vectors that know their place."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens_BN: Tensor) -> Tensor:
        """(B, N) -> (B, N, D); all tokens are of the first type."""
        positions_ND = self.position_embeddings.weight[: tokens_BN.shape[1]]
        vectors = self.word_embeddings(tokens_BN) + self.token_type_embeddings.weight[0] + positions_ND
        return self.dropout(self.LayerNorm(vectors))


class Heads(nn.Module):
    """Attention of several heads, without what is made of it."""

    def __init__(self, config: BertConfig, width_other: int) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(width_other, config.hidden_size)
        self.value = nn.Linear(width_other, config.hidden_size)

    def forward(self, x_BND: Tensor, other_BME: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, D), (B, M, E) and a mask that broadcasts to (B, H, N, M) -> (B, N, D)."""
        parts = (self.query(x_BND), self.key(other_BME), self.value(other_BME))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """A linear map, added to what came before and normalised."""

    def __init__(self, config: BertConfig, width_in: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inner: Tensor, before_BND: Tensor) -> Tensor:
        """(B, N, width_in), (B, N, D) -> (B, N, D)."""
        return self.LayerNorm(self.dropout(self.dense(inner)) + before_BND)


class Attention(nn.Module):
    """Attention as a residual."""

    def __init__(self, config: BertConfig, width_other: int) -> None:
        super().__init__()
        self.self = Heads(config, width_other)
        self.output = Output(config, config.hidden_size)

    def forward(self, x_BND: Tensor, other_BME: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, D), (B, M, E) and a mask that broadcasts to (B, H, N, M) -> (B, N, D)."""
        return self.output(self.self(x_BND, other_BME, mask), x_BND)


class Dense(nn.Module):
    """A linear map and GELU."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width_in) -> (..., width_out)."""
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Tokens inform each other, look at something else if the layer can, and are transformed each by itself."""

    def __init__(self, config: BertConfig, *, crosses: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, config.encoder_width) if crosses else None
        self.intermediate = Dense(config.hidden_size, config.intermediate_size)
        self.output = Output(config, config.intermediate_size)

    def forward(self, x_BND: Tensor, mask: Tensor, other_GME: Tensor | None, other_mask: Tensor | None) -> Tensor:
        """(B, N, D), (G, M, E) and masks that broadcast to (B, H, N, N) and (G, H, B / G * N, M) -> (B, N, D).

        Texts that look at the same are side by side, in one row: what they look at is projected once.
        """
        x = self.attention(x_BND, x_BND, mask)
        if self.crossattention is not None and other_GME is not None:
            rows = x.reshape(len(other_GME), -1, x.shape[-1])
            x = self.crossattention(rows, other_GME, other_mask).view_as(x)
        return self.output(self.intermediate(x), x)


class Layers(nn.Module):
    """Layers one after the other."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        numbers = range(config.num_hidden_layers)
        self.layer = nn.ModuleList(Layer(config, crosses=number >= config.fusion_layer) for number in numbers)
        self.recomputes = False  # layers, in the backward pass, instead of keeping what they were computed from

    def forward(self, x_BND: Tensor, mask: Tensor, other_GME: Tensor | None, other_mask: Tensor | None) -> Tensor:
        """As `Layer.forward`."""
        for layer in self.layer:
            if self.recomputes and torch.is_grad_enabled():
                x_BND = checkpoint(layer, x_BND, mask, other_GME, other_mask, use_reentrant=False)
            else:
                x_BND = layer(x_BND, mask, other_GME, other_mask)
        return x_BND


class Bert(nn.Module):
    """Text in, a vector for each token out."""

    def __init__(self, config: BertConfig, *, causal: bool = False) -> None:
        """Build with fresh weights; causal: each token sees only those before it, and itself."""
        super().__init__()
        self.causal = causal
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.apply(init_weights)

    def forward(
        self, tokens_BN: Tensor, other_GME: Tensor | None = None, other_mask_GM: Tensor | None = None
    ) -> Tensor:
        """(B, N) tokens, and what they look at (G, M, E), all of it or what a mask tells -> (B, N, D).

        B is a multiple of G: the first B / G texts look at the first thing, and so on.
        """
        mask = present(tokens_BN)[:, None, None]
        if self.causal:
            length = tokens_BN.shape[1]
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=tokens_BN.device).tril()
        other_mask = None if other_mask_GM is None else other_mask_GM[:, None, None]
        return self.encoder(self.embeddings(tokens_BN), mask, other_GME, other_mask)


class Transform(Dense):
    """A linear map, GELU, normalisation."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.LayerNorm(super().forward(x))


class Predictions(nn.Module):
    """Vectors in, a logit for each word of the vocabulary out."""

    def __init__(self, config: BertConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight = words.weight  # what a word looks like is what it is recognised by
        self.bias = self.decoder.bias  # which files have under two names
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.decoder(self.transform(x))


class Head(nn.Module):
    """Holds the predictions, under the name that they have in files."""

    def __init__(self, config: BertConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.predictions = Predictions(config, words)


class BertDecoder(nn.Module):
    """Text, and what it is about, in; logits of what comes next out."""

    def __init__(self, config: BertConfig) -> None:
        """Build with fresh weights; config.fusion_layer is 0 where every layer is to look."""
        super().__init__()
        self.bert = Bert(config, causal=True)
        self.cls = Head(config, self.bert.embeddings.word_embeddings)
        self.cls.predictions.transform.apply(init_weights)

    def forward(
        self, tokens_BN: Tensor, other_GME: Tensor | None = None, other_mask_GM: Tensor | None = None
    ) -> Tensor:
        """(B, N) tokens and what they look at, as `Bert.forward` -> (B, N, V) logits of the token after each."""
        return self.cls.predictions(self.bert(tokens_BN, other_GME, other_mask_GM))

    def loss(
        self,
        tokens_BN: Tensor,
        other_GME: Tensor | None = None,
        other_mask_GM: Tensor | None = None,
        *,
        given: int = 1,
    ) -> Tensor:
        """As `forward` -> (B,) the sum of -log p(token | those before it) over the tokens after the given ones."""
        states_BND = self.bert(tokens_BN[:, :-1], other_GME, other_mask_GM)[:, given - 1 :]
        targets_BN = tokens_BN[:, given:]
        logits = self.cls.predictions(states_BND).flatten(0, 1)
        losses = F.cross_entropy(logits, targets_BN.flatten(), ignore_index=PAD, reduction="none")
        return losses.view(targets_BN.shape).sum(dim=1)
