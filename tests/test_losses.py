"""`losses.py` against naive loops, SciPy, finite differences and invariants."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.autograd import gradcheck

import losses

NAMES = ["mse", "l1", "huber", "plcc", "fidelity"]
ALL_TERMS = [(float(weight), name) for weight, name in enumerate(NAMES, start=1)]

label = st.integers(0, 20).map(lambda twentieths: twentieths / 20)
batches = st.lists(st.tuples(label, label), min_size=1, max_size=12)


def draw(seed: int, n: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 predictions without ties, and labels of which some are tied."""
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.uniform(0, 1, n)), torch.tensor(np.round(rng.uniform(0, 1, n), 1))


def gradient(loss, pred: torch.Tensor, *rest) -> torch.Tensor:
    leaf = pred.clone().requires_grad_()
    loss(leaf, *rest).backward()
    return leaf.grad


def naive(name: str, pred: np.ndarray, target: np.ndarray) -> float:
    """The definitions, item by item and pair by pair."""
    errors = [abs(p - t) for p, t in zip(pred, target, strict=True)]
    index_pairs = list(itertools.combinations(range(len(pred)), 2))
    if name == "mse":
        return float(np.mean([e**2 for e in errors]))
    if name == "l1":
        return float(np.mean(errors))
    if name == "huber":
        return float(np.mean([e**2 / 2 if e < 0.1 else 0.1 * (e - 0.05) for e in errors]))
    if name == "plcc":
        return (1 - stats.pearsonr(pred, target)[0]) / 2
    values = []
    for i, j in index_pairs:
        p = 0.5 if target[i] == target[j] else float(target[i] > target[j])
        p_hat = stats.norm.cdf((pred[i] - pred[j]) / np.sqrt(2) / 0.1)
        values.append(1 - np.sqrt(p * p_hat) - np.sqrt((1 - p) * (1 - p_hat)))
    return float(np.mean(values))


def test_the_tables_name_every_loss():
    assert list(losses.LOSSES) == NAMES


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_losses_match_the_naive_definition(name, seed):
    pred, target = draw(seed)
    found = losses.LOSSES[name](pred, target)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(naive(name, pred.numpy(), target.numpy()), abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences(name):
    pred, target = draw(5)
    assert gradcheck(losses.LOSSES[name], (pred.requires_grad_(), target))
    assert pred.grad is None and gradient(losses.LOSSES[name], pred.detach(), target).abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(rows=batches, seed=st.integers(0, 999))
def test_the_order_of_the_batch_does_not_matter(name, rows, seed):
    pred, target = torch.tensor(rows, dtype=torch.float64).T
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    loss = losses.LOSSES[name]
    assert loss(pred[order], target[order]).item() == pytest.approx(loss(pred, target).item(), abs=1e-9)
    torch.testing.assert_close(gradient(loss, pred[order], target[order]), gradient(loss, pred, target)[order])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(rows=batches)
def test_loss_and_gradient_are_finite_whatever_ties_there_are(name, rows):
    pred, target = torch.tensor(rows, dtype=torch.float32).T
    loss = losses.LOSSES[name]
    assert -1e-6 <= loss(pred, target).item() <= 1 + 1e-6
    assert gradient(loss, pred, target).isfinite().all()


@settings(max_examples=40)
@given(rows=batches, scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_plcc_loss_ignores_affine_maps_of_pred_and_flips_with_its_sign(rows, scale, shift):
    pred, target = torch.tensor(rows, dtype=torch.float64).T
    plain = losses.plcc_loss(pred, target).item()
    assert losses.plcc_loss(scale * pred + shift, target).item() == pytest.approx(plain, abs=1e-9)
    if len(set(pred.tolist())) > 1 and len(set(target.tolist())) > 1:
        assert losses.plcc_loss(-pred, target).item() == pytest.approx(1 - plain, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 0.1, 0.7, 1.0])
def test_plcc_loss_of_a_constant_side_is_0_with_gradient_0(level, dtype):
    """Rounding makes the mean of equal numbers differ from them: dividing by that would blow gradients up."""
    constant, rising = torch.full((7,), level, dtype=dtype), torch.linspace(0, 1, 7).to(dtype)
    for pred, target in (constant, rising), (rising, constant):
        assert losses.plcc_loss(pred, target).item() == 0.0
        assert gradient(losses.plcc_loss, pred, target).abs().max() == 0.0


def test_plcc_loss_at_its_ends():
    rising = torch.linspace(0, 1, 7)
    assert losses.plcc_loss(rising, 0.2 + 0.1 * rising).item() == pytest.approx(0, abs=1e-6)
    assert losses.plcc_loss(-rising, rising).item() == pytest.approx(1, abs=1e-6)
    assert losses.plcc_loss(rising[:2], rising[:2]).item() == pytest.approx(0, abs=1e-6)
    for seed in range(30):  # rounding puts some correlations just beyond 1
        pred, _ = draw(seed)
        assert 0 <= losses.plcc_loss(pred.float(), pred.float() / 3).item() <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_prediction_costs_nothing(name):
    """Fidelity only approaches 0, as pairs grow further apart than sigma."""
    target = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75])
    assert losses.LOSSES[name](target, target).item() == pytest.approx(0, abs=0.02 if name == "fidelity" else 1e-6)
    assert losses.LOSSES[name](1 - target, target).item() > 0.03


def test_fidelity_of_tied_labels_is_least_where_predictions_tie():
    target = torch.tensor([0.5, 0.5])
    assert losses.fidelity_loss(torch.tensor([0.3, 0.3]), target).item() == pytest.approx(0, abs=1e-6)
    assert losses.fidelity_loss(torch.tensor([0.0, 1.0]), target).item() == pytest.approx(1 - 0.5**0.5, abs=1e-3)


@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0, 30.0, 1e20])
@pytest.mark.parametrize("target", [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_fidelity_gradient_is_finite_where_probabilities_underflow(target, apart):
    pred = torch.tensor([0.0, apart])
    assert gradient(losses.fidelity_loss, pred, torch.tensor(target)).isfinite().all()
    if apart == 1.0 and target == (1.0, 0.0):  # a pair wrong by the whole scale still learns
        assert gradient(losses.fidelity_loss, pred, torch.tensor(target))[0] < -1e-6


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_cost_exactly_0_and_can_be_differentiated(name):
    empty = torch.zeros(0, requires_grad=True)
    value = losses.LOSSES[name](empty, torch.zeros(0))
    assert value.item() == 0.0 and value.shape == () and value.requires_grad
    value.backward()
    assert empty.grad.shape == (0,)


@pytest.mark.parametrize("name", ["plcc", "fidelity"])
def test_one_item_has_no_order(name):
    single = torch.tensor([0.3])
    assert losses.LOSSES[name](single, torch.tensor([0.9])).item() == 0.0
    assert gradient(losses.LOSSES[name], single, torch.tensor([0.9])).tolist() == [0.0]


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32_under_autocast_too(name):
    pred, target = draw(6)
    pred = pred.bfloat16()
    expected = losses.LOSSES[name](pred.double(), target).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.LOSSES[name](pred, target)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(ValueError, match="shapes must agree"):
        losses.LOSSES[name](torch.zeros(4, 1), torch.zeros(4))


# -- losses together


def test_combined_loss_is_the_weighted_sum():
    pred, target = draw(7)
    expected = sum(weight * naive(name, pred.numpy(), target.numpy()) for weight, name in ALL_TERMS)
    assert losses.combined_loss(ALL_TERMS, pred, target).item() == pytest.approx(expected, abs=1e-9)
    assert losses.combined_loss([(0.5, "mse"), (0.5, "mse")], pred, target).item() == pytest.approx(
        naive("mse", pred.numpy(), target.numpy())
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stray", [0.5, float("nan")])
def test_missing_labels_are_as_if_the_rows_were_not_there(name, stray):
    """Even where the prediction of such a row is NaN."""
    pred, target = draw(8)
    missing = torch.zeros(len(pred), dtype=torch.bool)
    missing[[1, 4, 5]] = True
    kept, kept_target = pred[~missing], target[~missing]
    pred[missing], target[missing] = stray, float("nan")

    def combined(pred_B, target_B):
        return losses.combined_loss([(2.0, name)], pred_B, target_B)

    assert combined(pred, target).item() == pytest.approx(2 * losses.LOSSES[name](kept, kept_target).item())
    found = gradient(combined, pred, target)
    assert (found[missing] == 0).all()
    torch.testing.assert_close(found[~missing], 2 * gradient(losses.LOSSES[name], kept, kept_target))


def test_a_batch_without_labels_costs_exactly_0():
    pred = torch.rand(4, requires_grad=True)
    value = losses.combined_loss(ALL_TERMS, pred, torch.full((4,), float("nan")))
    value.backward()
    assert value.item() == 0.0 and pred.grad.tolist() == [0.0] * 4


def test_a_diverged_prediction_is_not_hidden():
    for name in NAMES:
        value = losses.LOSSES[name](torch.tensor([0.1, float("nan"), 0.3]), torch.tensor([0.1, 0.2, 0.3]))
        assert value.isnan(), name


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match=r"'mae'.*mse, l1.*fidelity"):
        losses.combined_loss([(1.0, "mae")], torch.zeros(2), torch.zeros(2))


def test_smoothing_pulls_towards_the_mean_and_keeps_nan():
    target = torch.tensor([0.0, 1.0, float("nan")])
    assert losses.smooth_targets(target, 0.6, 0.1)[:2].tolist() == pytest.approx([0.06, 0.96])
    assert losses.smooth_targets(target, 0.6, 0.1)[2].isnan()
    assert torch.equal(losses.smooth_targets(target[:2], 0.6, 0.0), target[:2])
    with pytest.raises(ValueError, match=r"1\.5"):
        losses.smooth_targets(target, 0.6, 1.5)


def test_rationale_loss_is_the_mean_of_1_minus_cosine():
    rng = np.random.default_rng(9)
    pred, text = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    cosines = [p @ t / np.sqrt((p @ p) * (t @ t)) for p, t in zip(pred, text, strict=True)]
    pred_RE = torch.tensor(pred, requires_grad=True)
    text_RE = torch.tensor(text, requires_grad=True)
    value = losses.rationale_loss(pred_RE, text_RE)
    assert value.item() == pytest.approx(1 - np.mean(cosines))
    value.backward()
    assert text_RE.grad is None and (pred_RE.grad != 0).all()


def test_rationale_gradient_matches_finite_differences():
    torch.manual_seed(0)
    pred, text = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert gradcheck(lambda x: losses.rationale_loss(x, text), (pred.requires_grad_(),))


def test_rationale_loss_without_rows_or_from_zero():
    pred, text = torch.zeros(3, 4), torch.ones(3, 4)
    none = pred[:0].requires_grad_()
    value = losses.rationale_loss(none, text[:0])
    value.backward()  # the graph is there, so that a batch without rationales can be trained on
    assert value.item() == 0.0 and none.grad.shape == (0, 4)
    assert losses.rationale_loss(pred, text).item() == 1.0
    assert 0 < gradient(losses.rationale_loss, pred, text).abs().max() < 1e3


def scores(**changes):
    target = {"q": torch.tensor([0.2, float("nan"), 0.9]), "c": torch.tensor([0.5, 0.1, 0.3])}
    pred = {"q": torch.tensor([0.1, 0.5, 0.7]), "c": torch.tensor([0.3, 0.1, 0.6])}
    options = {
        "weights": {"q": 2.0, "c": 0.5},
        "terms": [(1.0, "mse"), (0.3, "fidelity")],
        "smoothing": 0.2,
        "means": {"q": 0.6, "c": 0.4},
    }
    return losses.score_losses(**{"pred": pred, "target": target, **options, **changes})


def test_score_losses_are_named_unweighted_and_summed_with_weights():
    found = scores()
    assert set(found) == {"loss_q", "loss_c", "loss"}
    target_q = [0.8 * 0.2 + 0.2 * 0.6, 0.8 * 0.9 + 0.2 * 0.6]
    target_c = [0.8 * t + 0.2 * 0.4 for t in (0.5, 0.1, 0.3)]
    for key, pred, target in ("loss_q", [0.1, 0.7], target_q), ("loss_c", [0.3, 0.1, 0.6], target_c):
        assert found[key].item() == pytest.approx(
            naive("mse", pred, target) + 0.3 * naive("fidelity", pred, target), abs=1e-6
        )
    assert found["loss"].item() == pytest.approx(2 * found["loss_q"].item() + 0.5 * found["loss_c"].item())
    assert found["loss"].shape == ()


def test_score_losses_cover_only_the_predicted_tasks():
    found = scores(pred={"c": torch.tensor([0.3, 0.1, 0.6])})
    assert set(found) == {"loss_c", "loss"}
    assert found["loss"].item() == pytest.approx(0.5 * scores()["loss_c"].item())
    with pytest.raises(ValueError, match="at least one task"):
        scores(pred={})


def test_score_losses_backpropagate_to_labelled_rows_only():
    pred = {"q": torch.tensor([0.1, 0.5, 0.7], requires_grad=True)}
    scores(pred=pred)["loss"].backward()
    assert pred["q"].grad[1] == 0 and (pred["q"].grad[[0, 2]] != 0).all()
