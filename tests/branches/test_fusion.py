"""`branches/fusion.py`: the mixture is that of the definition, and stays finite where branches are certain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from branches.fusion import AnswerModel, fuse


def draw(size: int = 4, branches: int = 3, answers: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(size, branches, answers, generator=generator, dtype=torch.float64)
    return logits, torch.randn(branches, answers, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_the_mixture_is_that_of_a_plain_loop(loss):
    logits, weight = draw()
    fused = fuse(logits, weight, loss)
    found = fused.sigmoid() if loss == "bce" else fused.exp()
    for b in range(4):
        for a in range(5):
            shares = weight[:, a].exp() / weight[:, a].exp().sum()
            chances = [logits[b, k, a].sigmoid() if loss == "bce" else logits[b, k].softmax(dim=0)[a] for k in range(3)]
            expected = sum(share * chance for share, chance in zip(shares, chances, strict=True))
            assert found[b, a].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_branches_that_agree_are_what_they_agree_on_whatever_the_weights(loss):
    logits, weight = draw()
    same = logits[:, :1].expand(-1, 3, -1)
    found, expected = fuse(same, weight, loss), logits[:, 0].float()
    expected = expected if loss == "bce" else expected.log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_certain_branches_keep_value_and_gradient_finite(loss, size):
    logits = torch.tensor([[[size, -size], [-size, size]]], requires_grad=True)
    weight = torch.zeros(2, 2, requires_grad=True)
    fused = fuse(logits, weight, loss)
    assert fused.isfinite().all()
    fused.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


class Scaled(nn.Module):
    """A branch: a number times what it is given."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, words_BN: torch.Tensor, more_BN: torch.Tensor | None = None) -> torch.Tensor:
        return self.by * (words_BN if more_BN is None else words_BN + more_BN)


def test_each_branch_gets_its_inputs_and_answers_beside_the_mixture():
    words, more = torch.randn(3, 5), torch.randn(3, 5)
    own = {"fine": ("words_BN",), "graph": ("words_BN", "more_BN")}
    model = AnswerModel({"fine": Scaled(2.0), "graph": Scaled(-1.0)}, own, 5, "bce")
    logits = model(words_BN=words, more_BN=more, other_BN=more)
    assert logits.shape == (3, 3, 5)
    torch.testing.assert_close(logits[:, 1], 2 * words)
    torch.testing.assert_close(logits[:, 2], -(words + more))
    torch.testing.assert_close(logits[:, 0].sigmoid(), (logits[:, 1].sigmoid() + logits[:, 2].sigmoid()) / 2)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_single_branch_is_not_mixed():
    model = AnswerModel({"fine": Scaled(2.0)}, {"fine": ("words_BN",)}, 5, "ce")
    words = torch.randn(3, 5)
    assert torch.equal(model(words_BN=words), 2 * words[:, None]) and len(list(model.parameters())) == 1
