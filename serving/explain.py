"""Where a model looked: how much each score falls when a patch of the image is covered.

from serving.explain import occlusion_map, overlay, seen_box
maps = occlusion_map(scorer, "a.png", "a red circle")
overlay(image, maps["q"], seen_box(scorer, image.size)).save("quality.png")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from inputs.decoding import load_image
from serving.scorer import Scorer
from sources.scores import columns_of

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

RAISES = (196, 30, 40)  # colours that people who do not tell red from green tell apart
LOWERS = (20, 98, 190)
STRONGEST = 0.75  # how much of the colour the strongest patch takes
COPY_PIXELS = 100_000_000  # that covered copies of an image have together, at most


def seen_box(scorer: Scorer, size: tuple[int, int]) -> Box:
    """The part of an upright image of this width and height that the model is shown.

    Without crops that is the square in the middle, or all of it for a CLIP that squashes or pads, see `views.Views`.
    With crops of native size it is the whole image, although between the crops of a very large one gaps may be left.
    """
    width, height = size
    views = scorer.pixels([], None).views
    if views.test_crops or views.resize_mode != "shortest":
        return (0, 0, width, height)
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def patches(box: Box, grid: int) -> list[tuple[int, int, int, int]]:
    """The box cut into grid x grid patches, row by row, in whole pixels. Raises ValueError if it has too few."""
    left, top, right, bottom = box
    if grid < 1:
        raise ValueError(f"grid {grid}: must be at least 1")
    if min(right - left, bottom - top) < grid:
        raise ValueError(f"{right - left:g} x {bottom - top:g} pixels cannot be cut into {grid} x {grid} patches")
    xs, ys = (np.rint(np.linspace(*ends, grid + 1)).astype(int).tolist() for ends in ((left, right), (top, bottom)))
    return [(xs[x], ys[y], xs[x + 1], ys[y + 1]) for y in range(grid) for x in range(grid)]


def occlusion_map(
    scorer: Scorer,
    image: str | Path | Image.Image,
    prompt: str | None = None,
    grid: int = 8,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Cover one patch after another with the mean colour of what the model sees, and score again.

    Args:
        grid: patches per side of `seen_box`.
        batch_size: views at once, fewer where the image is large.
        progress: is told how many of the grid * grid + 1 images have been scored since the last call.

    Returns:
        task -> (grid, grid) array, rows from the top: by how much (MOS units) the score falls when the patch is
        covered. Above 0: what is there raises the score. Scores that the model cannot give, such as consistency
        without a prompt, are left out. They are not clamped to the scale, at whose ends all maps would be flat.

    Raises:
        ValueError: fewer pixels than patches, or nothing can be scored. OSError: the image cannot be read.
    """
    whole = load_image(image, scorer.pixels([], None).views.decode_size)
    box = seen_box(scorer, whole.size)
    places = patches(box, grid)
    left, top, right, bottom = (round(end) for end in box)
    mean = np.asarray(whole)[top:bottom, left:right].mean(axis=(0, 1))
    colour = tuple(int(channel) for channel in mean.round())
    at_once = int(min(max(COPY_PIXELS // (whole.width * whole.height), 1), batch_size))
    covers = [None, *places]  # the whole image first
    tables = []
    for start in range(0, len(covers), at_once):
        copies = [covered(whole, place, colour) for place in covers[start : start + at_once]]
        tables.append(scorer.score(copies, prompt, batch_size=batch_size, clamp=False))
        if progress:
            progress(len(copies))
    scores = pd.concat(tables, ignore_index=True)
    columns = {task: columns_of(task)[1] for task in scorer.scales}
    known = {task: scores[column].to_numpy() for task, column in columns.items() if scores[column].notna().all()}
    return {task: (values[0] - values[1:]).reshape(grid, grid) for task, values in known.items()}


def covered(image: Image.Image, place: tuple[int, int, int, int] | None, colour: tuple[int, ...]) -> Image.Image:
    """A copy of the image with one patch, if any, in one colour."""
    copy = image.copy()
    if place:
        copy.paste(colour, place)
    return copy


def overlay(image: Image.Image, values: np.ndarray, box: Box | None = None, limit: float | None = None) -> Image.Image:
    """A map over its image in grey: red where the score is raised, blue where it is lowered, the more the stronger.

    Args:
        image: upright; of any size, if `box` is of the same.
        values: (grid, grid), see `occlusion_map`.
        box: the part of the image that the map is of, see `seen_box`; the rest is darkened. None: all of it.
        limit: the absolute value that gets the strongest colour; None: the largest in the map.

    Raises:
        ValueError: the box has fewer pixels than patches.
    """
    box = box or (0, 0, image.width, image.height)
    limit = limit or float(np.abs(values).max()) or 1.0
    grey = np.asarray(image.convert("L"), dtype=float)[..., None].repeat(3, axis=2)
    shown = grey * 0.35
    for (left, top, right, bottom), value in zip(patches(box, len(values)), values.flat, strict=True):
        share = STRONGEST * min(abs(value) / limit, 1.0)
        colour = np.array(RAISES if value > 0 else LOWERS)
        shown[top:bottom, left:right] = (1 - share) * grey[top:bottom, left:right] + share * colour
    return Image.fromarray(shown.round().astype(np.uint8))
