"""`answering/task.py`: what branches weigh in the end is fitted to the validation fold, and is what a run keeps."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from small_vqa import ONE_GRAPH, differences, tiny_flags, tiny_run

import main
from answering import outcome, task
from answering.configs import parse_args
from answering.task import best_mixture, losses_of
from branches.fusion import fuse
from training import checkpoints

BOTH = ["--branches", "fine,graph", "--sg_source", "gt", *ONE_GRAPH, "--epochs", "1"]


def overrated(num_questions: int = 400, num_answers: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (Q, 2, A) of a branch that knows little and one that is sure, but right of answer 0 only; and (Q, A)."""
    draw = torch.Generator().manual_seed(0)
    right_Q = torch.randint(num_answers, (num_questions,), generator=draw)
    targets_QA = torch.eye(num_answers)[right_Q]
    modest_QA = 2 * targets_QA - 1 + 0.5 * torch.randn(targets_QA.shape, generator=draw)
    sure_QA = 6 * torch.randn(targets_QA.shape, generator=draw)
    sure_QA[:, 0] = 12 * targets_QA[:, 0] - 6
    return torch.stack([modest_QA, sure_QA], dim=1), targets_QA


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_a_branch_weighs_what_it_is_worth_on_the_questions_given_for_each_answer(loss):
    logits_QKA, targets_QA = overrated()
    weight_KA = best_mixture(logits_QKA, targets_QA, loss)
    shares_KA = weight_KA.softmax(dim=0)
    assert (shares_KA[0, 1:] > 0.8).all()
    if loss == "bce":  # where answers are judged one by one
        assert shares_KA[1, 0] > 0.8

    def worth(logits_QA: torch.Tensor) -> float:
        return losses_of(logits_QA, targets_QA, loss).mean().item()

    own = worth(fuse(logits_QKA, weight_KA, loss))
    assert own < worth(fuse(logits_QKA, torch.zeros(2, 4), loss))
    assert own < min(worth(logits_QKA[:, place]) for place in (0, 1))


def test_a_run_keeps_the_mixture_that_is_best_on_validation(tmp_path, monkeypatch, capsys):
    found = []

    def recording(*given):
        found.append((*given, best_mixture(*given)))
        return found[-1][-1]

    monkeypatch.setattr(task, "best_mixture", recording)
    folder = tiny_run(tmp_path / "run", *BOTH)
    assert "mixture   weighed anew on" in capsys.readouterr().out
    [(logits_QKA, targets_QA, loss, weight_KA)] = found
    kept = checkpoints.load_weights(folder / "best")[1]
    assert torch.equal(kept[task.MIXTURE], weight_KA)
    trained = pd.read_csv(folder / "metrics.csv")["val_loss"].min()
    assert losses_of(fuse(logits_QKA, weight_KA, loss), targets_QA, loss).mean().item() < trained

    unread = tiny_run(tmp_path / "unread", *BOTH, "--no_test")  # the validation fold is what is measured
    assert len(found) == 1
    others = checkpoints.load_weights(unread / "best")[1]
    assert not torch.equal(others.pop(task.MIXTURE), kept.pop(task.MIXTURE))
    assert all(torch.equal(value, kept[name]) for name, value in others.items())


def test_a_run_that_breaks_off_behind_the_mixture_goes_on_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(task, "MOST_NUMBERS", 20 * 2 * 27)  # of 2 branches and 27 answers: not all questions
    flags = tiny_flags(*BOTH)
    main.run(parse_args([*flags, "--output", str(tmp_path / "whole")]))
    assert "weighed anew on 20 validation questions" in capsys.readouterr().out

    def broken(*given: object) -> None:
        raise RuntimeError("the power is out")

    config = parse_args([*flags, "--output", str(tmp_path / "part")])
    with monkeypatch.context() as patch:
        patch.setattr(outcome, "floor_answers", broken)
        with pytest.raises(RuntimeError, match="power"):
            main.run(config)
    main.main(["--resume", str(tmp_path / "part")])
    assert differences(tmp_path / "whole", tmp_path / "part") == []
