"""`training/resuming.py`: which epoch is kept, and when training stops for want of gain."""

from __future__ import annotations

import numpy as np
import pytest

from training import resuming


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.9, 0.8, 0.7, 0.1], 0),
        ([0.05, 0.9, 0.8, 0.7, 0.1], 1),
        ([0.0, 0.1, 0.2, 0.3], 3),
        ([0.2, 0.1, 0.7, 0.3, 0.7, 0.2], 2),
        ([0.5, 0.5, 0.5], 0),
        ([-0.4, -0.3, -0.1, -0.2], 2),
        ([0.0], 0),
    ],
)
def test_the_best_epoch_is_the_first_of_the_highest_and_the_untrained_model_is_epoch_0(scores, best):
    progress = resuming.Progress()
    assert progress.best_epoch is None
    progress.begin(scores[0], {"predicted": np.array([0.0])})
    assert progress.best_epoch == 0 and progress.epoch == 1
    for epoch, score in enumerate(scores[1:], start=1):
        is_best = score > max(scores[:epoch])
        assert progress.would_be_best(score) == is_best
        progress.close_epoch({"epoch": epoch}, score, {"predicted": np.array([float(epoch)])})
        assert (progress.best_epoch == epoch) == is_best
    assert progress.best_epoch == best == progress.best_scores["predicted"].item()
    assert progress.selection == scores and progress.epoch == len(scores) == len(progress.history) + 1


def test_what_is_best_is_known_again_after_a_stop():
    progress, again = resuming.Progress(), resuming.Progress()
    progress.begin(0.5, {"predicted": np.array([1.0])})
    progress.close_epoch({"epoch": 1}, 0.25, {"predicted": np.array([2.0])})
    again.load_state_dict(progress.state_dict())
    assert (again.best_epoch, again.selection, again.epoch) == (0, [0.5, 0.25], 2)
    assert again.best_scores["predicted"].item() == 1.0
    assert not again.would_be_best(0.5) and again.would_be_best(0.75)


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "stops"),
    [
        ([0.5, 0.4, 0.3, 0.2], 0, 0.0, False),  # patience 0 is off
        ([0.5, 0.4], 2, 0.0, False),  # too few epochs to tell
        ([0.5, 0.4, 0.3], 2, 0.0, True),
        ([0.5, 0.4, 0.6], 2, 0.0, False),
        ([0.5, 0.6, 0.4], 2, 0.0, False),
        ([0.5, 0.6, 0.4, 0.4], 2, 0.0, True),
        ([0.5, 0.4], 1, 0.0, True),
        ([0.5, 0.5, 0.5], 2, 0.0, True),  # to equal is no gain
        ([0.5, 0.5625, 0.5625], 2, 0.125, True),  # a rise, too small to count
        ([0.5, 0.5625, 0.625], 2, 0.125, False),  # the smallest that counts, in small steps
        ([0.5, 0.5, 0.6249], 2, 0.125, True),
        ([0.0, 0.5, 0.3, 0.55], 2, 0.125, True),  # measured against the best, not the first
        ([-0.5, -0.25, -0.25], 1, 0.125, True),
    ],
)
def test_training_stops_after_epochs_without_gain(scores, patience, min_delta, stops):
    assert resuming.should_stop(scores, patience=patience, min_delta=min_delta) is stops
