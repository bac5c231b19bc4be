"""Pictures of runs: numbers in, matplotlib figures out, and those as PNG or as SVG that follows the page's colours.

Draw and save inside `style()`, which leaves matplotlib's settings as they were. A figure is WIDTH inches wide so that
its letters can still be read on a phone.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from evaluation import metrics

WIDTH = 4.4  # inches
INK = "#111112"  # text and axes: on the page, whatever colour its text has
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, for any colour vision
DASHES = ("-", "--", ":", "-.")
FADED = 0.45
RASTER_DPI = 144  # of scattered points, which would make a page of thousands of elements
PNG_DPI = 150
LONGEST_LABEL = 22  # characters
MOST_WITH_NUMBERS = 12  # rows of a heat map whose cells have room for a number
DARKEST = 0.65  # opacity of a cell, on which a number can still be read
STYLE = {
    "font.size": 9.5,
    "text.parse_math": False,  # a generator's name may hold dollars
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same picture, the same file
}


@dataclass(frozen=True)
class Line:
    """A line of a chart: x and y of one length; y may have NaN. `colour` and `dash` count from 0."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    dash: int = 0
    faded: bool = False


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, if it has one, and the single values behind it."""

    label: str
    value: float
    interval: Sequence[float] | None = None
    values: Sequence[float] = ()
    colour: int | None = None  # None: the colour of text


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures look as those of this program, whatever the user's settings of matplotlib."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", STYLE]):
        # A page shows such letters in the reader's own fonts; in a PNG they are boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        yield


def blank(height: float, *, left: float = 0.76, right: float = 0.12, top: float = 0.3, bottom: float = 0.45) -> Axes:
    """Axes of a new figure; height and margins in inches, fixed since measuring text is slow."""
    figure = Figure(figsize=(WIDTH, height))
    return figure.add_axes((left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height))


def colour_of(number: int) -> str:
    """A data colour; they begin again after the last."""
    return SERIES[number % len(SERIES)]


def shorten(label: str, longest: int = LONGEST_LABEL) -> str:
    """One line of letters that can be drawn, clipped."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in label).split())
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def chart(lines: Sequence[Line], ylabel: str, *, best: int | None = None, limit: float | None = None) -> Figure:
    """Lines over epochs. `best` marks an epoch, `limit` a height."""
    named = [line for line in lines if line.label]
    legend_rows = -(-len(named) // 2) if len(named) > 1 else 0
    ax = blank(2.5 + 0.17 * legend_rows, top=0.26 + 0.17 * legend_rows)
    for line in lines:
        y = np.where(np.isfinite(line.y), line.y, np.nan)
        ax.plot(
            line.x,
            y,
            label=shorten(line.label, 30) or "_",
            color=INK if line.faded else colour_of(line.colour),
            alpha=FADED / 2 if line.faded else 1,
            linestyle=DASHES[line.dash % len(DASHES)],
            marker="o" if len(line.x) <= 30 and not line.faded else "",
            linewidth=0.8 if line.faded else None,
        )
    if limit is not None:
        ax.axhline(limit, color=INK, alpha=FADED, linewidth=0.8, linestyle="--")
    if best is not None:
        ax.axvline(best, color=INK, alpha=FADED, linewidth=0.8, linestyle=":")
        at_end = best > np.mean(ax.get_xlim())
        words = f"epoch {best} kept " if at_end else f" epoch {best} kept"
        note = ax.text(best, 1.01, words, transform=ax.get_xaxis_transform(), fontsize="small", alpha=0.75)
        note.set_horizontalalignment("right" if at_end else "left")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if max(map(abs, ax.get_ylim())) < 0.01:  # learning rates as 3e-5, without a factor above the axis
        ax.yaxis.set_major_formatter(lambda value, _: powers_of_ten(value))
    ax.set(xlabel="epoch", ylabel=ylabel)
    if legend_rows:
        ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.02 if best is None else 1.1), fontsize="small")
    return the_figure(ax)


def powers_of_ten(value: float) -> str:
    """A small number as 3e-5, which takes less room than 0.00003."""
    return np.format_float_scientific(value, precision=3, trim="-", exp_digits=1) if value else "0"


def scatter(pred: np.ndarray, mos: np.ndarray, title: str, *, colour: int = 0) -> Figure:
    """Predicted against human scores (n,), the identity, and the 4-parameter logistic that is fitted to them."""
    ax = blank(3.4, top=0.3)
    low, high = min(pred.min(), mos.min()), max(pred.max(), mos.max())
    room = 0.04 * (high - low) or 0.5
    size, alpha = (14, 0.6) if len(pred) <= 1000 else (6, 0.3)
    ax.scatter(pred, mos, s=size, alpha=alpha, color=colour_of(colour), linewidths=0, rasterized=True)
    ends = [low - room, high + room]
    ax.plot(ends, ends, color=INK, alpha=FADED, linewidth=0.9, linestyle="--", label="predicted = human")
    x = np.linspace(pred.min(), pred.max(), 100)
    fitted = metrics.apply_logistic(metrics.fit_logistic(pred, mos), x)
    ax.plot(x, fitted, color=INK, linewidth=1.5, label="logistic fit")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.set(xlim=ends, ylim=ends, xlabel=f"predicted {shorten(title)}, MOS", ylabel="human, MOS")
    ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.02), fontsize="small")
    return the_figure(ax)


def residuals(off: np.ndarray, title: str, *, colour: int = 0) -> Figure:
    """How often predictions are so far off: predicted minus human (n,), in MOS units."""
    ax = blank(3.4, top=0.3)
    bins = min(40, max(5, int(np.sqrt(len(off))) + 1))
    ax.hist(off, bins=bins, color=colour_of(colour), alpha=0.85, linewidth=0, histtype="stepfilled")
    ax.axvline(0, color=INK, alpha=FADED, linewidth=0.8)
    ax.axvline(off.mean(), color=INK, linewidth=1.2, linestyle="--", label=f"mean {off.mean():+.2f}")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel=f"predicted minus human {shorten(title)}, MOS", ylabel="images")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02), fontsize="small")
    return the_figure(ax)


def rows_of(labels: Sequence[str], *, top: float) -> Axes:
    """Axes with a row for each label, the first on top."""
    short = [shorten(label) for label in labels]
    left = 0.2 + 0.078 * max(map(len, short))
    ax = blank(0.24 * len(labels) + top + 0.55, left=left, top=top)
    ax.set_yticks(range(len(labels)), labels=short)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    return ax


def generator_srocc(names: Sequence[str], srocc: np.ndarray, *, colour: int = 0) -> Figure:
    """SROCC within each generator's images (g,) as bars."""
    ax = rows_of(names, top=0.1)
    ax.barh(range(len(names)), srocc, height=0.62, color=colour_of(colour), alpha=0.85, linewidth=0)
    ax.axvline(0, color=INK, alpha=FADED, linewidth=0.8)
    ax.set_xlim(min(0, *srocc), 1)
    ax.set_xlabel("SROCC within the generator's images")
    return the_figure(ax)


def generator_means(names: Sequence[str], mos: np.ndarray, pred: np.ndarray, *, colour: int = 0) -> Figure:
    """Mean human and mean predicted score of each generator (g,), joined by a line."""
    ax = rows_of(names, top=0.32)
    places = np.arange(len(names))
    ax.hlines(places, np.minimum(mos, pred), np.maximum(mos, pred), color=INK, alpha=FADED, linewidth=1)
    ax.plot(mos, places, "D", color=INK, markersize=4.5, label="human")
    ax.plot(pred, places, "o", color=colour_of(colour), markersize=6, label="predicted")
    ax.set_xlabel("mean score, MOS")
    ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.01), fontsize="small")
    return the_figure(ax)


def estimates(rows: Sequence[Estimate], xlabel: str, *, zero: bool = False) -> Figure:
    """Values below each other with their intervals; `zero` draws a line there."""
    ax = rows_of([row.label for row in rows], top=0.1)
    for place, row in enumerate(rows):
        colour = INK if row.colour is None else colour_of(row.colour)
        if row.values:
            ax.plot(row.values, [place] * len(row.values), "|", color=colour, markersize=9, alpha=FADED)
        if row.interval:
            ax.hlines(place, row.interval[0], row.interval[1], color=colour, linewidth=1.6)
        ax.plot([row.value], [place], "o", color=colour, markersize=6 if row.colour is not None else 4.5)
    if zero:
        ax.axvline(0, color=INK, alpha=FADED, linewidth=0.8, linestyle="--")
    ax.margins(x=0.06)
    ax.set_xlabel(xlabel)
    return the_figure(ax)


def heat_map(names: Sequence[str], shares: np.ndarray, xlabel: str, ylabel: str) -> Figure:
    """Shares (n, n) on 0..1 as cells, in per cent, the fuller the larger. `names` are of rows and of columns alike."""
    short = [shorten(name, 14) for name in names]
    labels = 0.12 + 0.075 * max(map(len, short))  # inches
    left, right, bottom = labels + 0.22, 0.12, labels + 0.25
    cell = min((WIDTH - left - right) / len(names), 0.36)
    ax = blank(cell * len(names) + 0.1 + bottom, left=left, right=right, top=0.1, bottom=bottom)
    for row, column in np.argwhere(shares >= 0.005):
        share = min(float(shares[row, column]), 1.0)
        place = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(place, 1, 1, color=colour_of(0), alpha=DARKEST * share, linewidth=0))
        if len(names) <= MOST_WITH_NUMBERS:
            ax.text(column, row, f"{100 * share:.0f}", fontsize="small", ha="center", va="center")
    places = range(len(names))
    ax.set_xticks(places, labels=short, rotation=90, fontsize="small")
    ax.set_yticks(places, labels=short, fontsize="small")
    ax.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), xlabel=xlabel, ylabel=ylabel)
    ax.grid(visible=False)
    return the_figure(ax)


def the_figure(ax: Axes) -> Figure:
    """The figure that these axes fill."""
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure on white, PNG_DPI dots per inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=PNG_DPI, facecolor="white")
    return file.getvalue()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element of an HTML page, as wide as what it is in.

    Text and axes have the colour of the page's text, data the page's --s0, --s1, ... Ids begin with `name`, so that
    several can be in one page. `label` is what it shows, for those who do not see it.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", dpi=RASTER_DPI, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    colours = {INK: "currentColor", **{colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}}

    def adapt(tag: re.Match[str]) -> str:
        found = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0])
        return re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", lambda colour: colours.get(colour[0], colour[0]), found)

    text = re.sub(r"<[^>]*>", adapt, text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view
    opening = f'<svg role="img" aria-label="{html.escape(label)}" {view[0]} xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"^<svg[^>]*>", lambda _: opening, text, count=1).strip()
