"""`answering/task.py`, `outcome.py`, `remarks.py`: losses, schedule, intervals and what is said, piece by piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_vqa import ONE_GRAPH, tiny_flags

from answering.configs import VQAConfig, parse_args, recommended
from answering.experiment import build_experiment
from answering.outcome import by_kind, confusion
from answering.remarks import ADVISED, advise, bytes_per_question, diagnose
from answering.task import ban_factor, losses_of, probabilities
from evaluation.metrics import mean_interval
from training import devices
from vqa.questions import Questions

CONFIG = VQAConfig(data_root="D", features="F")
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
TARGETS = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.0, 0.0]])


def test_bce_is_summed_over_answers():
    chance = 1 / (1 + np.exp(-LOGITS.numpy()))
    right = TARGETS.numpy()
    expected = -(right * np.log(chance) + (1 - right) * np.log(1 - chance)).sum(axis=1)
    np.testing.assert_allclose(losses_of(LOGITS, TARGETS, "bce"), expected, rtol=1e-6)


def test_ce_takes_accuracies_as_shares_and_passes_over_what_no_answer_fits():
    chance = np.exp(LOGITS.numpy()) / np.exp(LOGITS.numpy()).sum(axis=1, keepdims=True)
    expected = -(1.0 * np.log(chance[0, 0]) + 0.3 * np.log(chance[0, 1])) / 1.3
    found = losses_of(LOGITS, TARGETS, "ce")
    assert found[0].item() == pytest.approx(expected, rel=1e-6) and found[1].item() == 0


def test_probabilities_are_those_of_the_loss():
    torch.testing.assert_close(probabilities(LOGITS, "ce").sum(dim=1), torch.ones(2))
    torch.testing.assert_close(probabilities(LOGITS, "bce"), LOGITS.sigmoid())


def test_the_ban_schedule_warms_up_by_epochs_and_is_cut_to_a_quarter_five_times():
    found = [ban_factor(epoch) for epoch in range(22)]
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert found[9:13] == [2.0, 0.5, 0.5, 0.125]
    assert found[18:] == [2 * 0.25**5] * 4


def test_an_interval_covers_the_true_accuracy_as_often_as_it_should_where_images_decide():
    draw, covered = np.random.default_rng(0), 0
    for trial in range(200):
        easy = np.repeat(draw.random(60), 5)  # five questions on an image share how easy it is
        right = (draw.random(300) < easy).astype(float)
        low, high = mean_interval(right, [f"image{number // 5}" for number in range(300)], seed=trial)
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 198  # 95 % of 200, and chance
    naive = [mean_interval(np.tile([0.0, 1.0], 150), [str(n) for n in range(300)])]
    assert naive[0][1] - naive[0][0] == pytest.approx(2 * 1.96 * 0.5 / 300**0.5, rel=0.1)


def test_one_image_has_no_interval():
    assert mean_interval(np.array([0.0, 1.0]), ["7", "7"]) == []


ASKED = Questions(
    ["1", "2", "3", "4"],
    ["7", "7", "8", "9"],
    ["a", "b", "c", "d"],
    [("yes",), ("no", "no", "maybe"), ("The Cup",), ("cup",)],
    {"answer type": ["yes/no", "yes/no", "other", "other"]},
)


def test_kinds_have_their_accuracy_floors_and_counts():
    found = by_kind(ASKED, np.array([1.0, 0.0, 1.0, 1.0]), {"blind": np.array([0.0, 0.5, 0.0, 1.0])})
    kinds = found["answer type"]
    assert kinds["yes/no"]["accuracy"] == 0.5 and kinds["yes/no"]["floors"] == {"blind": 0.25}
    assert kinds["other"] | {"interval": []} == {
        "accuracy": 1.0,
        "questions": 2,
        "interval": [],
        "floors": {"blind": 0.5},
    }
    assert kinds["yes/no"]["interval"] == []  # both on one image


def test_confusion_counts_frequent_answers_in_the_form_in_which_they_are_compared():
    found = confusion(ASKED, ["yes", "yes", "cup", "zebra"])
    assert found["answers"] == ["cup", "yes", "no", "other"]
    assert found["counts"] == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_recommended_ranges_are_read_from_the_help():
    assert recommended("lr") == (1e-4, 5e-4) and recommended("num_hid") == (512, 2048)
    assert all(low < high for low, high in map(recommended, ADVISED))


def advised(config: VQAConfig, **facts) -> set[str]:
    given = {"num_train": 400_000, "free_memory": None, "bytes_per_question": 1e6, **facts}
    return {one["flag"] for one in advise(config, **given)}


def test_advice_says_what_is_unusual_and_nothing_of_the_guides_own_settings():
    assert advised(CONFIG) == set()
    assert advised(VQAConfig(data_root="D", features="F", lr=0.01, dropout=0.1)) == {"--lr", "--dropout"}
    assert advised(CONFIG, num_train=1000) == {"--update_freq", "--num_hid"}
    assert advised(CONFIG, free_memory=1e9, bytes_per_question=1e8) == {"--batch_size"}
    assert advised(VQAConfig(demo=True, lr=0.01)) == set()


def row(loss: float, val_loss: float, accuracy: float) -> dict[str, float]:
    return {"loss": loss, "val_loss": val_loss, "val_accuracy": accuracy}


MEASURED = {"measures": {"accuracy": 0.6}, "floors": {"question only": 0.4}}


@pytest.mark.parametrize(
    ("history", "best", "measured", "found"),
    [
        ([row(3, 3, 0.5), row(2, 2.5, 0.6), row(1, 2.5, 0.6)], 2, MEASURED, []),
        ([row(3, 3, 0.5), row(2, 2.5, 0.6)], 2, MEASURED, ["not finished"]),
        ([row(3, 3, 0.5), row(2, 2.5, 0.4)], 0, MEASURED, ["learnt nothing"]),
        ([row(3, 3, 0.5), row(2, 2.5, 0.6), row(0.5, 4, 0.55)], 2, MEASURED, ["learns by heart"]),
        (
            [row(3, 3, 0.5), row(2, 2.5, 0.6), row(1, 2.5, 0.6)],
            2,
            {"measures": {"accuracy": 0.405}, "floors": {"question only": 0.4}},
            ["no better than a floor"],
        ),
    ],
)
def test_curves_and_floors_are_told(history, best, measured, found):
    said = diagnose(history, best, measured, CONFIG)
    assert [one["finding"] for one in said] == found
    assert all(one["evidence"] and one["proposal"] for one in said)


def memory(*flags: str) -> float:
    """What training keeps of a question, of a run on the drawn set."""
    torch.manual_seed(0)
    experiment = build_experiment(parse_args(tiny_flags(*flags)), devices.start_runtime("cpu", "off"))
    before = torch.random.get_rng_state()
    found = bytes_per_question(experiment)
    assert torch.equal(torch.random.get_rng_state(), before) and experiment.model.training
    return found


def test_the_memory_of_a_question_is_what_autograd_keeps():
    both, fine, graph = (
        memory("--branches", name, "--sg_source", "gt", "--num_hid", "64", *ONE_GRAPH)
        for name in ("fine,graph", "fine", "graph")
    )
    assert both == pytest.approx(fine + graph, rel=0.1) and min(fine, graph) > 0.05 * both
    layers = [memory("--num_hid", "64", "--AOA_layers", number) for number in ("1", "2", "3")]
    assert layers[2] - layers[1] == pytest.approx(layers[1] - layers[0], rel=0.05)
    regions, words = 10, 9  # or so, with padding; 17 vectors of each in each layer
    assert layers[1] - layers[0] == pytest.approx(17 * 4 * 64 * (regions + words), rel=0.4)
    recomputed = memory("--num_hid", "64", "--AOA_layers", "3", "--memory_efficient_attention")
    assert layers[2] - recomputed > 2 * (layers[1] - layers[0])
