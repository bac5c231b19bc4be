"""`branches/bert.py`: against transformers, and indifferent to padding and company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from branches.bert import Bert, BertConfig, BertDecoder, present

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-7,
}
WIDTH_SEEN = 10


def theirs(kind: Any, **changes: Any) -> Any:
    """A model of transformers with random weights, none of them 0 or 1."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **changes, attn_implementation="eager", pad_token_id=0)
    model = kind(config, add_pooling_layer=False) if kind is transformers.BertModel else kind(config)
    return scrambled(model)


def scrambled(model: nn.Module) -> Any:
    """Weights large enough for everything to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def ours(config: BertConfig, **changes: Any) -> Bert:
    torch.manual_seed(1)
    return Bert(config, **changes).double().eval()


def texts() -> Tensor:
    """Three of 8, 5 and 1 tokens."""
    tokens = torch.randint(1, 30, (3, 8), generator=torch.Generator().manual_seed(0))
    tokens[1, 5:], tokens[2, 1:] = 0, 0
    return tokens


def seen(width: int = SIZES["hidden_size"]) -> tuple[Tensor, Tensor]:
    """Something of 5, 3 and 4 places that three texts look at."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).bool()
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64), mask


def test_an_encoder_of_text_is_that_of_transformers():
    oracle = theirs(transformers.BertModel)
    model = ours(BertConfig(**SIZES, fusion_layer=3))
    model.load_state_dict(oracle.state_dict(), strict=True)
    tokens = texts()
    expected = oracle(tokens, attention_mask=(tokens > 0).long()).last_hidden_state
    torch.testing.assert_close(model(tokens)[tokens > 0], expected[tokens > 0], atol=1e-9, rtol=0)


def test_upper_layers_look_at_something_else_as_those_of_transformers_do():
    """In transformers only decoders can: the mask of a decoder that sees everything, and no looking below."""
    oracle = theirs(transformers.BertModel, is_decoder=True, add_cross_attention=True)
    for number, layer in enumerate(oracle.encoder.layer):
        if number < 1:
            layer.is_decoder = False
            del layer.crossattention
        else:
            layer.crossattention.self.key = scrambled(nn.Linear(WIDTH_SEEN, SIZES["hidden_size"]))
            layer.crossattention.self.value = scrambled(nn.Linear(WIDTH_SEEN, SIZES["hidden_size"]))
    model = ours(BertConfig(**SIZES, fusion_layer=1, encoder_width=WIDTH_SEEN))
    model.load_state_dict(oracle.state_dict(), strict=True)
    tokens, (other, other_mask) = texts(), seen(WIDTH_SEEN)
    everything = torch.zeros(3, 1, 8, 8, dtype=torch.float64).masked_fill((tokens == 0)[:, None, None], -1e30)
    expected = oracle(
        tokens,
        attention_mask=everything,
        encoder_hidden_states=other,
        encoder_attention_mask=other_mask.long(),
        use_cache=False,
    ).last_hidden_state
    torch.testing.assert_close(model(tokens, other, other_mask)[tokens > 0], expected[tokens > 0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("looks", [True, False])
def test_a_decoder_is_that_of_transformers(looks):
    oracle = theirs(transformers.BertLMHeadModel, is_decoder=True, add_cross_attention=True)
    torch.manual_seed(1)
    model = BertDecoder(BertConfig(**SIZES, fusion_layer=0, encoder_width=SIZES["hidden_size"])).double().eval()
    model.load_state_dict(oracle.state_dict(), strict=True)
    tokens, (other, other_mask) = texts(), seen()
    asked = {"encoder_hidden_states": other, "encoder_attention_mask": other_mask.long()} if looks else {}
    labels = tokens.masked_fill(tokens == 0, -100)
    expected = oracle(tokens, attention_mask=(tokens > 0).long(), labels=labels, use_cache=False, **asked)
    given = (other, other_mask) if looks else ()
    torch.testing.assert_close(model(tokens, *given)[tokens > 0], expected.logits[tokens > 0], atol=1e-9, rtol=0)
    losses = model.loss(tokens, *given)
    assert losses.shape == (3,) and losses[2] == 0
    mean = losses.sum() / (tokens[:, 1:] > 0).sum()
    torch.testing.assert_close(mean, expected.loss.double(), atol=1e-6, rtol=0)  # which is of single precision


def test_names_are_those_of_transformers_and_cross_attention_begins_where_it_should():
    model = ours(BertConfig(**SIZES, fusion_layer=2, encoder_width=WIDTH_SEEN))
    crossing = {name for name in model.state_dict() if "crossattention" in name}
    names = [f"self.{part}" for part in ("query", "key", "value")] + ["output.dense", "output.LayerNorm"]
    kinds = ("weight", "bias")
    assert crossing == {f"encoder.layer.2.crossattention.{name}.{kind}" for name in names for kind in kinds}
    assert set(model.state_dict()) - crossing == set(theirs(transformers.BertModel).state_dict())
    assert model.encoder.layer[2].crossattention.self.key.in_features == WIDTH_SEEN


def decoder() -> BertDecoder:
    torch.manual_seed(0)
    return scrambled(BertDecoder(BertConfig(**SIZES, fusion_layer=1, encoder_width=WIDTH_SEEN)))


@pytest.mark.parametrize("causal", [True, False])
def test_a_text_is_read_alike_alone_in_a_batch_and_padded(causal):
    model = scrambled(ours(BertConfig(**SIZES, fusion_layer=1, encoder_width=WIDTH_SEEN), causal=causal))
    tokens, (other, other_mask) = texts(), seen(WIDTH_SEEN)
    together = model(tokens, other, other_mask)
    longer = torch.cat([tokens, tokens.new_zeros(3, 3)], dim=1)
    filler = torch.full((3, 2, WIDTH_SEEN), 100.0, dtype=torch.float64)
    wider, wider_mask = torch.cat([other, filler], dim=1), torch.cat([other_mask, other_mask.new_zeros(3, 2)], dim=1)
    padded = model(longer, wider, wider_mask)[:, :8]
    torch.testing.assert_close(padded[tokens > 0], together[tokens > 0])
    for row, length in enumerate((8, 5, 1)):
        alone = model(tokens[row : row + 1, :length], other[row : row + 1], other_mask[row : row + 1])
        torch.testing.assert_close(alone[0], together[row, :length])


def test_a_decoder_never_sees_what_comes_next():
    model, tokens, (other, other_mask) = decoder(), texts(), seen(WIDTH_SEEN)
    changed = tokens.clone()
    changed[0, 4:] = tokens[0, 4:] % 29 + 1
    before, after = (model(each, other, other_mask)[0] for each in (tokens, changed))
    torch.testing.assert_close(before[:4], after[:4])
    assert (before[4:] - after[4:]).abs().amax(dim=1).min() > 1e-6


def test_texts_that_look_at_the_same_are_read_as_each_with_its_own():
    model, (other, other_mask) = decoder(), seen(WIDTH_SEEN)
    tokens = torch.cat([texts(), texts().flip(0)])
    shared = model(tokens, other, other_mask)
    own = model(tokens, other.repeat_interleave(2, dim=0), other_mask.repeat_interleave(2, dim=0))
    torch.testing.assert_close(shared[tokens > 0], own[tokens > 0])


def test_the_loss_after_more_that_is_given_leaves_out_the_first_tokens():
    model, tokens, given = decoder(), texts(), seen(WIDTH_SEEN)
    logs = model(tokens, *given).log_softmax(dim=-1)
    for first in (1, 2, 3):
        expected = [-sum(logs[row, n - 1, tokens[row, n]] for n in range(first, 8) if tokens[row, n]) for row in (0, 1)]
        torch.testing.assert_close(model.loss(tokens, *given, given=first)[:2], torch.stack(expected))
    assert model.loss(tokens[:, :2], *given, given=2).tolist() == [0, 0, 0]


def test_texts_without_any_token_are_no_obstacle():
    model, given = decoder().train(), seen(WIDTH_SEEN)
    nothing = torch.zeros(3, 4, dtype=torch.long)
    assert present(nothing).tolist() == [[True, False, False, False]] * 3
    model(nothing, *given).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_weight_is_trained_and_fresh_ones_are_small():
    torch.manual_seed(0)
    model = BertDecoder(BertConfig(**SIZES, fusion_layer=1, encoder_width=WIDTH_SEEN))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.bert.embeddings.word_embeddings.weight[0].eq(0).all()
    other, other_mask = seen(WIDTH_SEEN)
    model.loss(texts(), other.float(), other_mask).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or "key.bias" in name, name
        if parameter.dim() == 2:
            assert 0.01 < parameter.std() < 0.03, name


def test_layers_that_are_computed_again_have_the_same_gradients():
    model, tokens, given = decoder(), texts(), seen(WIDTH_SEEN)
    found: list[list[Tensor]] = []
    runs = []
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: runs.append(len(found)))
    for recomputes in (False, True):
        model.bert.encoder.recomputes = recomputes
        model.zero_grad()
        model.loss(tokens, *given).sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(found[0], found[1])
    assert runs == [0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 24 is no multiple of 5 heads"),
        ({"fusion_layer": 4}, "fusion_layer 4 is beyond 3 num_hidden_layers"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**SIZES | {"fusion_layer": 1} | changes)
