"""A scorer that many ask at once: their requests are scored together, and nobody gets what is another's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_run import finished_run, loaded

import models
from serving.scorer import Scorer
from serving.shared_scorer import MOST_AT_ONCE, Request, SharedScorer

TOLERANCE = 1e-5  # MOS units; a batch of another size adds up in another order
LONG = "a red circle and " * 40


@pytest.fixture(scope="module")
def alone(demo_set) -> Scorer:
    return loaded(finished_run(demo_set))


class Held(SharedScorer):
    """Begins to score when it is `released`. `sizes` has the number of requests of every batch."""

    def __init__(self, *parts, **options) -> None:
        self.released, self.sizes = threading.Event(), []
        super().__init__(*parts, **options)

    def answer_batch(self, batch: list[Request]) -> None:
        self.released.wait(60)
        self.sizes.append(len(batch))
        super().answer_batch(batch)


@pytest.fixture
def held(demo_set) -> Iterator[Held]:
    scorer = Held.load(finished_run(demo_set))
    yield scorer
    scorer.released.set()
    scorer.close()
    assert not scorer.thread.is_alive()


@pytest.fixture(scope="module")
def files(demo_set) -> list[Path]:
    return sorted(demo_set[1].glob("*.jpg"))


def test_what_comes_together_is_scored_in_one_batch_and_everybody_gets_their_own(held, alone, files):
    prompts = [f"{number} red circles" for number in range(16)]
    asked = [held.ask(path, prompt) for path, prompt in zip(files, prompts, strict=False)]
    held.released.set()
    found = pd.concat([answer.result(60).table for answer in asked], ignore_index=True)
    wanted = alone.score(files[:16], prompts, clamp=False)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    assert np.diff(np.sort(wanted["pred_align"])).min() > 2 * TOLERANCE  # or another's would pass
    assert sum(held.sizes) == 16 and len(held.sizes) <= 2


def test_a_long_job_lets_others_in_between(held, alone, files):
    many = (files * 3)[: 3 * MOST_AT_ONCE]
    seen: list[int] = []
    job = threading.Thread(target=lambda: tables.append(held.score(many, "a circle", progress=seen.append)))
    tables: list[pd.DataFrame] = []
    job.start()
    while held.requests.empty() and not held.sizes and not job.is_alive():
        pass
    one = held.ask(files[0], "")
    held.released.set()
    one.add_done_callback(lambda answer: seen.append(-1))
    job.join(60)
    assert seen[-1] == MOST_AT_ONCE and -1 in seen[:2]
    np.testing.assert_allclose(tables[0], alone.score(many, "a circle"), rtol=0, atol=TOLERANCE)


def test_what_is_wrong_with_one_request_is_said_to_that_one_alone(held, alone, files, tmp_path):
    asked = [held.ask(path, "") for path in (files[0], tmp_path / "no.png", files[1])]
    held.released.set()
    with pytest.raises(OSError, match=r"no\.png"):
        asked[1].result(60)
    found = [asked[place].result(60).table["pred_quality"][0] for place in (0, 2)]
    np.testing.assert_allclose(found, alone.score(files[:2], clamp=False)["pred_quality"], rtol=0, atol=TOLERANCE)


def test_what_nobody_waits_for_any_more_is_not_scored(held, files):
    held.ask(files[0], "").add_done_callback(lambda answer: None)
    dropped, kept = held.ask(files[1], ""), held.ask(files[2], "")
    is_dropped = dropped.cancel()
    held.released.set()
    kept.result(60)
    assert sum(held.sizes) == 3 - is_dropped


def test_prompts_that_were_cut_are_told_to_those_who_sent_them(held, files):
    asked = [held.ask(files[0], prompt) for prompt in ("a circle", LONG, "")]
    held.released.set()
    assert [answer.result(60).cut for answer in asked] == [set(), {LONG}, set()]


def test_a_piece_of_a_job_may_be_without_prompts_where_the_model_needs_them(held, alone, files, monkeypatch):
    monkeypatch.setattr(held, "scales", {"c": held.scales["c"]})
    held.released.set()
    many, prompts = (files * 2)[: MOST_AT_ONCE + 1], [""] * MOST_AT_ONCE + ["a circle"]
    found = held.score(many, prompts)["pred_align"]
    assert found[:MOST_AT_ONCE].isna().all() and found.notna().sum() == 1
    with pytest.raises(ValueError, match="consistency alone"):
        held.score(many, "")


def test_a_batch_is_no_larger_than_it_may_be(held, files, monkeypatch):
    sizes: list[int] = []
    score_batch = models.score_batch
    monkeypatch.setattr(
        models, "score_batch", lambda model, batch: sizes.append(len(batch)) or score_batch(model, batch)
    )
    held.released.set()
    requests = [Request(files[:1], [""]), Request((files * 2)[:MOST_AT_ONCE], [""] * MOST_AT_ONCE)]
    held.answer_batch(requests)
    assert [len(request.answer.result().table) for request in requests] == [1, MOST_AT_ONCE]
    assert sum(sizes) == MOST_AT_ONCE + 1 and max(sizes) <= MOST_AT_ONCE


def test_it_scores_as_any_scorer_does(held, alone, files):
    held.released.set()
    pd.testing.assert_frame_equal(held.score([]), alone.score([]))
    found = held.answer(files[:3], [LONG, "b", "c"], clamp=False)
    assert found.cut == {LONG}
    np.testing.assert_allclose(
        found.table, alone.score(files[:3], [LONG, "b", "c"], clamp=False), rtol=0, atol=TOLERANCE
    )
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        held.score(files[:2], ["a"])
