"""Figures show their numbers, and leave matplotlib alone."""

from __future__ import annotations

import re

import matplotlib
import numpy as np
import pytest
from made_runs import (
    MOS,
    NUM_IMAGES,
    noisy,
)

from drawing import figures
from evaluation import metrics


def test_a_scatter_shows_every_image_the_fit_and_the_identity():
    pred = noisy("q")
    with figures.style():
        ax = figures.scatter(pred, MOS["q"], "quality").axes[0]
    (dots,) = ax.collections
    assert dots.get_rasterized() and np.allclose(dots.get_offsets(), np.stack([pred, MOS["q"]], axis=1))
    identity, fit = (np.asarray(line.get_xydata()) for line in ax.lines)
    assert np.array_equal(identity[:, 0], identity[:, 1])
    assert fit[:, 1] == pytest.approx(metrics.apply_logistic(metrics.fit_logistic(pred, MOS["q"]), fit[:, 0]))
    assert fit[0, 0] == pred.min() and fit[-1, 0] == pred.max() and ax.get_xlim() == ax.get_ylim()


def test_a_chart_shows_its_numbers_and_the_epoch_that_was_kept():
    lines = [figures.Line("a", np.arange(3), np.array([1.0, np.inf, 3.0])), figures.Line("b", np.arange(3), np.ones(3))]
    with figures.style():
        ax = figures.chart(lines, "loss", best=1, limit=0.5).axes[0]
    first, _, limit, kept = ax.lines
    assert np.array_equal(first.get_ydata(), [1, np.nan, 3], equal_nan=True)
    assert list(limit.get_ydata()) == [0.5, 0.5] and list(kept.get_xdata()) == [1, 1]
    assert "epoch 1 kept" in ax.texts[0].get_text()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize("epochs", [1, 2, 3, 200])
def test_epochs_are_whole_and_small_rates_are_written_out(epochs):
    rates = np.linspace(3e-5, 1e-5, epochs)
    with figures.style():
        ax = figures.chart([figures.Line("", np.arange(1.0, epochs + 1), rates)], "learning rate", best=1).axes[0]
        ticks = [text.get_text() for text in ax.get_xticklabels()]
        written = [text.get_text() for text in ax.get_yticklabels()]
    assert "1" in ticks or epochs == 200
    assert all(tick.lstrip("\N{MINUS SIGN}").isdigit() for tick in ticks)
    assert all(re.fullmatch(r"-?\d(\.\d+)?(e-[56])?", text) for text in written) and ax.get_legend() is None


def test_residuals_count_every_image_and_mark_their_mean():
    off = noisy("q") - MOS["q"]
    with figures.style():
        ax = figures.residuals(off, "quality").axes[0]
    outline = ax.patches[0].get_path().vertices
    counts, edges = np.histogram(off, bins=min(40, max(5, int(np.sqrt(NUM_IMAGES)) + 1)))
    assert outline[:, 1].max() == counts.max() and outline[:, 0].min() == edges[0]
    assert ax.lines[1].get_xdata()[0] == pytest.approx(off.mean())


def test_generators_keep_their_order_from_the_top():
    names, values = ["worst", "best"], np.array([-0.1, 0.9])
    with figures.style():
        bars = figures.generator_srocc(names, values).axes[0]
        means = figures.generator_means(names, np.array([1.0, 4.0]), np.array([2.0, 3.0])).axes[0]
    assert [bar.get_width() for bar in bars.patches] == values.tolist() and bars.get_ylim() == (1.6, -0.6)
    assert [text.get_text() for text in bars.get_yticklabels()] == names and bars.get_xlim() == (-0.1, 1)
    assert [line.get_xdata().tolist() for line in means.lines] == [[1, 4], [2, 3]]


def test_drawing_leaves_matplotlibs_settings_alone_and_ignores_the_users():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "xtick.labelsize": 41}):
        with figures.style():
            svg = figures.to_svg(figures.generator_srocc(["a$b$"], np.array([0.5])), "x", "y")
        assert matplotlib.rcParams["font.size"] == 30
    assert "a$b$" in svg and "41px" not in svg and "font-size: 9.5px" in svg.replace("font: 9.5px", "font-size: 9.5px")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("label", "shown"),
    [("plain", "plain"), ("a\nb\u202e\0c", "a b c"), ("x" * 30, "x" * 21 + "…"), ("x" * 22, "x" * 22), ("", "")],
)
def test_labels_are_one_line_and_clipped(label, shown):
    assert figures.shorten(label) == shown
