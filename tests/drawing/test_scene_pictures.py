"""`drawing/scene_pictures.py`: frames, names and arrows are where they belong, and hide little."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from drawing import scene_pictures as pictures
from drawing.scene_pictures import Arrow, Mark

GROUND = (90, 120, 150)
CUP, DOG = Mark("1 cup", (0.1, 0.1, 0.3, 0.4), 0.75), Mark("2 dog", (0.6, 0.5, 0.9, 0.9), 0.25)
HOSTILE = ("", "w" * 5000, "\0\x1b[31m\u202e\ud800\n\n", "茶 ☃ 🐕", "  ")


def drawn(*marks: Mark, arrows: tuple[Arrow, ...] = (), size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """(height, width, 3) pixels."""
    return np.asarray(pictures.draw_panel(Image.new("RGB", size, GROUND), marks, arrows, "What is it? a cup 75%"))


def colours_at(pixels: np.ndarray, x: float, y: float) -> set[tuple[int, ...]]:
    """Those within three pixels of a place."""
    part = pixels[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4]
    return set(map(tuple, part.reshape(-1, 3).tolist()))


@pytest.mark.parametrize("size", [(64, 48), (2000, 1500), (48, 64), (800, 1)])
def test_an_image_is_drawn_at_a_size_that_is_easily_read(size):
    pixels = drawn(CUP, size=size)
    width, height = pictures.canvas_size(size)
    assert max(width, height) == pictures.LONG_SIDE
    assert width / height == pytest.approx(size[0] / size[1], rel=0.01) or 1 in size
    assert pixels.shape[1] == width + 2 * pictures.MARGIN and pixels.shape[0] > height + 2 * pictures.MARGIN


def test_frames_lie_on_their_boxes_in_the_colour_of_their_weight_and_the_rest_is_the_image():
    pixels = drawn(CUP, DOG)
    for mark, share in ((CUP, 1.0), (DOG, 1 / 3)):
        left, top, right, bottom = pictures.on_canvas(mark.box, (800, 600), pictures.MARGIN)
        for x, y in ((left, (top + bottom) / 2), (right, (top + bottom) / 2), ((left + right) / 2, bottom)):
            assert pictures.colour_of(share) in colours_at(pixels, x, y)
        assert colours_at(pixels, (left + right) / 2, (top + bottom) / 2) == {GROUND}  # no name in it
    assert colours_at(pixels, 436, 100) == {GROUND} and colours_at(pixels, 10, 400) == {pictures.PAPER}


def test_heavier_is_darker():
    light = [sum(pictures.colour_of(share)) for share in (-1, 0, 0.25, 0.5, 1, 2)]
    assert light[0] == light[1] > light[2] > light[3] > light[4] == light[5]


def test_an_arrow_leads_from_the_edge_of_one_box_to_the_other_and_one_line_stands_for_both_ways():
    boxes = [(0.0, 0.0, 100.0, 100.0), (300.0, 0.0, 500.0, 100.0)]
    to, back = Arrow(0, "near", 1), Arrow(1, "far from", 0)
    assert pictures.arrow_lines([to], boxes, 60) == {(0, 1): ((100, 50), (300, 50))}
    assert pictures.arrow_lines([back], boxes, 60) == {(1, 0): ((300, 50), (100, 50))}
    assert list(pictures.arrow_lines([to, back, to, Arrow(0, "by", 0)], boxes, 60)) == [(0, 1)]


@pytest.mark.parametrize(
    "inner", [(150, 150, 250, 250), (0, 0, 10, 10), (0, 0, 400, 400), (398, 0, 402, 400), (403, 0, 600, 400)]
)
def test_an_arrow_between_boxes_that_overlap_or_touch_is_seen_too(inner):
    boxes = [tuple(map(float, inner)), (0.0, 0.0, 400.0, 400.0)]
    for arrow in (Arrow(0, "on", 1), Arrow(1, "under", 0)):
        ((start, end),) = pictures.arrow_lines([arrow], boxes, 60).values()
        assert math.dist(start, end) >= 30


def test_what_is_said_the_other_way_is_drawn_once_and_numbers_tell_several_lines_apart():
    relations = [[0, "to the left of", 1], [0, "near", 1], [1, "to the right of", 0], [1, "watching", 0]]
    arrows = pictures.drawn_relations(relations)
    assert arrows == [Arrow(0, "to the left of", 1), Arrow(0, "near", 1), Arrow(1, "watching", 0)]
    said = pictures.relation_text(0, 1, arrows, numbered=False)
    assert said == "1 → 2  to the left of, near\n2 → 1  watching"
    assert pictures.relation_text(0, 1, arrows[:2], numbered=False) == "to the left of, near"
    assert pictures.relation_text(0, 1, arrows[:1], numbered=True) == "1 → 2  to the left of"
    pairs = list(combinations(range(8), 2))
    found = pictures.drawn_relations([[a, "near", b] for a, b in pairs])
    assert [(arrow.source, arrow.target) for arrow in found] == pairs[: pictures.MOST_ARROWS]


def test_names_do_not_lie_on_each_other_nor_on_what_they_name():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = rng.uniform(0, 0.75, (3, 2))
        boxes = [pictures.on_canvas((*low, *low + 0.15), (800, 600), 36) for low in corners]
        if any(pictures.shared(pictures.grown(a, 30), b) for a, b in combinations(boxes, 2)):
            continue  # one may lie between another and its name
        taken: list[pictures.Corners] = []
        for box in boxes:
            size = pictures.measured("3 a long name 12%")
            pictures.least_hiding(pictures.around(box), size, (0, 0, 872, 672), taken, boxes)
        assert not any(pictures.shared(a, b) for a, b in combinations(taken, 2))
        assert not any(pictures.shared(name, box) for name in taken for box in boxes)
        assert all(x1 >= 0 and y1 >= 0 and x2 <= 872 and y2 <= 672 for x1, y1, x2, y2 in taken)


def test_names_of_boxes_at_one_place_stand_beside_each_other():
    taken: list[pictures.Corners] = []
    for _ in range(4):
        box = (300.0, 300.0, 400.0, 400.0)
        pictures.least_hiding(pictures.around(box), (120, 25), (0, 0, 872, 672), taken, [box])
    assert len(taken) == 4 and not any(pictures.shared(a, b) for a, b in combinations(taken, 2))


def test_names_are_cut_and_hold_no_command():
    assert pictures.shortened("a\x1b\nb\ud800") == "a  b "
    assert len(pictures.shortened("w" * 99)) == pictures.LONGEST_NAME


def test_any_name_and_any_box_can_be_drawn():
    boxes = ((0, 0, 1, 1), (0.5, 0.5, 0.5, 0.5), (1, 1, 0, 0), (-1e300, -5, 1e300, 5), (1, 1, 1, 1))
    marks = [Mark(name, box, weight) for name, box, weight in zip(HOSTILE, boxes, (1, 0, 0.001, 2, -1), strict=True)]
    arrows = tuple(Arrow(a, name, b) for a in range(5) for b in range(5) for name in HOSTILE)
    assert drawn(*marks, arrows=arrows).shape[1] == 872
    assert drawn().shape[1] == 872
    for name in HOSTILE:
        assert pictures.draw_panel(Image.new("RGB", (8, 6)), [], [], name).size[0] == 872
    assert pictures.empty_canvas(1e6, 0.01).size == (800, 1)


def test_pictures_stand_in_a_row():
    row = pictures.beside([Image.new("RGB", (30, 20), "red"), Image.new("RGB", (10, 40), "blue")])
    assert row.size == (40, 40) and row.getpixel((5, 5)) == (255, 0, 0) and row.getpixel((35, 35)) == (0, 0, 255)
    assert row.getpixel((5, 35)) == pictures.PAPER
