"""`branches/coarse.py`: answers by nearness and by an X-VLM, indifferent to company, open to answers never learned."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from test_xvlm import config

from branches.bert import present
from branches.coarse import ClipBranch, XvlmBranch, config_of

WIDTH, NUM_ANSWERS = 6, 5
ANSWERS = torch.tensor([[2, 7, 3, 0], [2, 8, 9, 3], [2, 10, 3, 0], [2, 12, 3, 0], [2, 7, 9, 3]])
QUESTIONS = torch.tensor([[2, 4, 5, 6], [2, 9, 0, 0], [2, 11, 5, 0]])
OF_IMAGE = torch.tensor([1, 0, 1])


def clip_branch() -> ClipBranch:
    torch.manual_seed(0)
    branch = ClipBranch(num_answers=NUM_ANSWERS, embed_dim=WIDTH, width=8, dropout=0.3)
    branch.start_from(torch.randn(NUM_ANSWERS, WIDTH))
    return branch.eval()


def embedded() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    images, questions = (F.normalize(torch.randn(size, WIDTH), dim=-1) for size in (2, 3))
    return {"image_IE": images, "question_BE": questions, "images_B": OF_IMAGE}


def xvlm_branch(loss: str = "bce", *, is_frozen: bool = False) -> XvlmBranch:
    torch.manual_seed(0)
    sizes = asdict(config())
    branch = XvlmBranch(num_answers=NUM_ANSWERS, answer_tokens=4, config=sizes, loss=loss, is_frozen=is_frozen)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    branch.choose_among(ANSWERS)
    return branch.eval()


def asked() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"tokens_BL": QUESTIONS, "pixels_ICHW": torch.randn(2, 3, 32, 32), "images_B": OF_IMAGE}


def test_an_answer_counts_by_how_near_it_is_once_the_mean_of_all_is_taken_off():
    branch, given = clip_branch(), embedded()
    answers = torch.randn(NUM_ANSWERS, WIDTH, generator=torch.Generator().manual_seed(3))
    branch.start_from(answers)
    found = branch(**given)
    for row, image in enumerate(OF_IMAGE):
        parts = given["image_IE"][image], given["question_BE"][row]
        g = branch.join(torch.cat([*parts, parts[0] * parts[1]]))
        for place, answer in enumerate(answers):
            expected = 10 * F.cosine_similarity(g, answer - answers.mean(dim=0), dim=0)
            torch.testing.assert_close(found[row, place], expected, atol=1e-5, rtol=1e-5)


def test_answers_that_were_never_learned_are_scored_as_if_they_had_been():
    branch, given = clip_branch(), embedded()
    answers = torch.randn(NUM_ANSWERS, WIDTH)
    branch.start_from(answers)
    before = branch(**given)
    other = torch.randn(1, WIDTH)
    branch.choose_among(torch.cat([answers[[3, 0]], other]))
    after = branch(**given)
    torch.testing.assert_close(after[:, :2], before[:, [3, 0]])
    assert after.shape == (3, 3)


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_it_begins_with_how_right_an_answer_is_on_average(loss):
    branch = clip_branch()
    branch.expect(torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4]), loss)
    expected = torch.logit(torch.tensor(0.2)) if loss == "bce" else torch.tensor(0.2).log()
    torch.testing.assert_close(branch.bias.detach(), expected)


@pytest.mark.parametrize("build", [clip_branch, xvlm_branch])
def test_a_question_alone_is_answered_as_in_a_batch(build):
    branch, given = build(), embedded() if build is clip_branch else asked()
    together = branch(**given)
    for row, image in enumerate(OF_IMAGE):
        own = {
            name: value[image : image + 1] if name in ("image_IE", "pixels_ICHW") else value[row : row + 1]
            for name, value in given.items()
        } | {"images_B": torch.tensor([0])}
        torch.testing.assert_close(branch(**own), together[row : row + 1], atol=1e-4, rtol=1e-4)


def test_padding_of_questions_changes_nothing():
    branch, given = xvlm_branch(), asked()
    longer = given | {"tokens_BL": F.pad(given["tokens_BL"], (0, 3))}
    torch.testing.assert_close(branch(**longer), branch(**given), atol=1e-4, rtol=1e-4)


def test_logits_are_those_of_what_x_vlm_finds_likely():
    given = asked()
    likely = xvlm_branch("ce")(**given).exp()
    torch.testing.assert_close(likely, xvlm_branch("bce")(**given).sigmoid(), atol=1e-5, rtol=1e-3)
    branch = xvlm_branch("ce")
    ranked = branch.xvlm.rank(QUESTIONS, given["pixels_ICHW"], ANSWERS, images_B=OF_IMAGE)
    torch.testing.assert_close(branch(**given), ranked)
    assert likely.sum(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-4)


def test_a_certain_answer_keeps_its_logit_finite():
    branch = xvlm_branch("bce")
    logits = branch.logits(torch.tensor([[0, 1]]), torch.tensor([[0.0, -100.0]]))
    assert logits.isfinite().all() and logits[0, 0] > 10 and logits[0, 1:].max() < -20


def test_what_was_ranked_before_gives_the_same_logits():
    branch, given = xvlm_branch(), asked()
    tried, log_p = branch.rank(**given)
    assert torch.equal(branch(tried_Bk=tried, log_p_Bk=log_p), branch(**given))


def test_it_learns_by_the_loss_of_its_words_and_the_mixture_gives_no_gradient():
    branch, given = xvlm_branch(), asked()
    right = {
        "right_KT": ANSWERS[[1, 0, 2]],
        "weights_K": torch.tensor([1.0, 0.3, 0.6]),
        "questions_K": torch.tensor([0, 2, 2]),
    }
    logits, losses = branch.teach(**given, **right)
    assert not logits.requires_grad and losses.shape == (3,) and losses[1] == 0
    whole = branch.xvlm(
        QUESTIONS, given["pixels_ICHW"], right["right_KT"], right["weights_K"], right["questions_K"], OF_IMAGE
    )
    torch.testing.assert_close(losses.mean(), whole)
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in branch.parameters())
    states = branch.xvlm.read(QUESTIONS, given["pixels_ICHW"], OF_IMAGE)
    tried, log_p = branch.xvlm.try_answers(states, present(QUESTIONS), ANSWERS, 8)
    torch.testing.assert_close(logits, branch.logits(tried, log_p))


def test_teaching_leaves_it_in_training_and_what_is_frozen_is_always_evaluated():
    branch = xvlm_branch().train()
    right = {
        "right_KT": ANSWERS[:1],
        "weights_K": torch.ones(1),
        "questions_K": torch.zeros(1, dtype=torch.int64),
    }
    branch.teach(**asked(), **right)
    assert all(module.training for module in branch.modules())
    frozen = xvlm_branch(is_frozen=True).train()
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_config_comes_back_from_json():
    assert config_of(json.loads(json.dumps(asdict(config())))) == config()
