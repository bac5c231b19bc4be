"""`training/resuming.py`: which epoch is kept, and when training stops for want of gain."""

from __future__ import annotations

import pytest

from training import resuming


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.9, 0.8, 0.7, 0.1], 1),
        ([0.1, 0.2, 0.3], 3),
        ([0.1, 0.7, 0.3, 0.7, 0.2], 2),
        ([0.5, 0.5, 0.5], 1),
        ([-0.3, -0.1, -0.2], 2),
        ([0.0], 1),
    ],
)
def test_the_best_epoch_is_the_first_of_the_highest(scores, best):
    assert resuming.best_epoch(scores) == best


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
