"""A picture of what an answer rests on: an image with regions or objects framed, named, and linked by relations.

Places are x, y in pixels of the canvas, boxes x1, y1, x2, y2; those that are given are shares of the image's sides.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

LONG_SIDE = 800  # pixels, of the image in the picture
MARGIN = 36  # pixels around it, where names find room
GAP = 6  # pixels between what is drawn and its name
SPOT = 8  # pixels around a line that a name should not hide
HEAD = 16  # pixels, of an arrow
SHORTEST = 60  # pixels, of an arrow between boxes that lie in each other
LETTERS, TITLE_LETTERS = 17, 20  # pixels
LONGEST_NAME = 28  # letters
MOST_ARROWS = 6  # of a picture; more of them hide more than they show
REVERSED = {"to the left of": "to the right of", "above": "below"}  # relations that say the same, the other way
REVERSED |= {second: first for first, second in REVERSED.items()}
LIGHT, HEAVY = (255, 214, 74), (200, 16, 60)  # colours of the least and the most weight
PAPER, INK, EMPTY = (255, 255, 255), (20, 20, 20), (226, 226, 226)

Point = tuple[float, float]
Corners = tuple[float, float, float, float]
Place = tuple[
    float, float, float, float
]  # x, y, and which point of what is put there lies on it, as shares of its sides


@dataclass(frozen=True)
class Mark:
    """Something on an image that a frame and a name are drawn for."""

    name: str
    box: Sequence[float]
    weight: float  # 0..1


@dataclass(frozen=True)
class Arrow:
    """A relation from one mark, by its place among all, to another."""

    source: int
    name: str
    target: int


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has the letters of most alphabets."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def colour_of(share: float) -> tuple[int, int, int]:
    """From LIGHT to HEAVY."""
    red, green, blue = (round(a + (b - a) * min(max(share, 0), 1)) for a, b in zip(LIGHT, HEAVY, strict=True))
    return red, green, blue


def canvas_size(size: tuple[float, float]) -> tuple[int, int]:
    """The size at which an image is drawn: its longer side is LONG_SIDE."""
    factor = LONG_SIDE / max(size)
    width, height = (max(1, round(factor * side)) for side in size)
    return width, height


def empty_canvas(width: float, height: float) -> Image.Image:
    """An image on which nothing is, in the proportions of one that is not there."""
    return Image.new("RGB", canvas_size((width, height)), EMPTY)


def draw_panel(image: Image.Image, marks: Sequence[Mark], arrows: Sequence[Arrow], title: str) -> Image.Image:
    """The image, as large as is easily read, with frames coloured by weight, arrows, names, and a title below."""
    image = image.convert("RGB").resize(canvas_size(image.size), Image.Resampling.LANCZOS)
    titles = textwrap.wrap(printable(title), max(20, round(1.8 * image.width / TITLE_LETTERS))) or [""]
    size = (image.width + 2 * MARGIN, image.height + 2 * MARGIN + round(1.4 * TITLE_LETTERS * len(titles)))
    canvas = Image.new("RGB", size, PAPER)
    canvas.paste(image, (MARGIN, MARGIN))
    pen = ImageDraw.Draw(canvas)
    boxes = [on_canvas(mark.box, image.size, MARGIN) for mark in marks]
    most = max((mark.weight for mark in marks), default=0) or 1
    colours = [colour_of(mark.weight / most) for mark in marks]
    for place in sorted(range(len(marks)), key=lambda place: marks[place].weight):  # the heaviest on top
        pen.rectangle(grown(boxes[place], 2), outline=INK, width=8)
        pen.rectangle(boxes[place], outline=colours[place], width=4)
    lines_of = arrow_lines(arrows, boxes, SHORTEST)
    for (source, target), (start, end) in lines_of.items():
        draw_arrow(pen, start, end, both=any((one.source, one.target) == (target, source) for one in arrows))
    room = (0.0, 0.0, float(size[0]), float(image.height + 2 * MARGIN))
    taken = [spot for line in lines_of.values() for spot in spots(*line)]
    for mark, box, colour in zip(marks, boxes, colours, strict=True):
        text = f"{shortened(mark.name)} {percent(mark.weight)}".lstrip()
        write(pen, text, colour, least_hiding(around(box), measured(text), room, taken, boxes))
    for (source, target), (start, end) in lines_of.items():
        text = relation_text(source, target, arrows, numbered=len(lines_of) > 1)
        places = along(start, end, measured(text))
        write(pen, text, PAPER, least_hiding(places, measured(text), room, taken, boxes))
    for number, line in enumerate(titles):
        pen.text((MARGIN, image.height + 2 * MARGIN + 1.4 * TITLE_LETTERS * number - 8), line, INK, font(TITLE_LETTERS))
    return canvas


def beside(panels: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row."""
    canvas = Image.new("RGB", (sum(each.width for each in panels), max(each.height for each in panels)), PAPER)
    left = 0
    for each in panels:
        canvas.paste(each, (left, 0))
        left += each.width
    return canvas


def printable(text: str) -> str:
    """A text without what has no shape to be drawn."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def shortened(name: str) -> str:
    """A name as it is drawn, cut where it is long."""
    plain = printable(name)
    return plain if len(plain) <= LONGEST_NAME else f"{plain[: LONGEST_NAME - 1]}…"


def percent(share: float) -> str:
    """A share in whole per cent."""
    return f"{100 * share:.0f}%" if share >= 0.005 else "<1%"


# -- where things are


def on_canvas(box: Sequence[float], size: tuple[int, int], margin: float) -> Corners:
    """A box in pixels of a canvas with an image of this size, and a margin around it."""
    left, top, right, bottom = (
        margin + min(max(edge, 0), 1) * side for edge, side in zip(box, (*size, *size), strict=True)
    )
    return left, top, max(left, right), max(top, bottom)


def grown(box: Corners, by: float) -> Corners:
    """A box with so much more at each side."""
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def shared(a: Corners, b: Corners) -> float:
    """The area that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def middle(box: Corners) -> Point:
    """The centre of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def around(box: Corners) -> list[Place]:
    """Where a box's name may stand, the best first."""
    left, top, right, bottom = grown(box, GAP)
    x, y = middle(box)
    outside: list[Place] = [
        (left, top, 0, 1),
        (left, bottom, 0, 0),
        (right, top, 1, 1),
        (right, bottom, 1, 0),
        (x, top, 0.5, 1),
    ]
    outside += [(x, bottom, 0.5, 0), (right, y, 0, 0.5), (left, y, 1, 0.5), (right, top, 0, 0), (left, bottom, 1, 1)]
    inside = grown(box, -GAP)
    return [*outside, (inside[0], inside[1], 0, 0), (inside[0], inside[3], 0, 1), (inside[2], inside[3], 1, 1)]


def along(start: Point, end: Point, size: Point) -> list[Place]:
    """The same for the name of an arrow: beside its line, where it just does not touch it."""
    length = math.dist(start, end) or 1
    across, down = (start[1] - end[1]) / length, (end[0] - start[0]) / length
    aside = abs(across) * size[0] / 2 + abs(down) * size[1] / 2 + SPOT + 2
    found = []
    for share in (0.5, 0.35, 0.65, 0.2, 0.8):
        x, y = (a + share * (b - a) for a, b in zip(start, end, strict=True))
        found += [(x + far * aside * across, y + far * aside * down, 0.5, 0.5) for far in (-1, 1, -2, 2)]
    return found


def arrow_lines(
    arrows: Sequence[Arrow], boxes: Sequence[Corners], shortest: float
) -> dict[tuple[int, int], tuple[Point, Point]]:
    """Start and end of one line for every two marks with a relation: from one edge to the other, if there is room.

    Args:
        shortest: how far the middles of two boxes have to lie from each other, lest the one is in the other.
    """
    found: dict[tuple[int, int], tuple[Point, Point]] = {}
    for source, target in ((arrow.source, arrow.target) for arrow in arrows):
        if source == target or (target, source) in found:
            continue
        start, end = middle(boxes[source]), middle(boxes[target])
        if math.dist(start, end) < shortest:  # one lies in the other: to where that one's edge is
            left, top, right, bottom = boxes[target]
            corners = [(left, top), (right, top), (left, bottom), (right, bottom)]
            end = max(corners, key=lambda corner: math.dist(start, corner))
        edges = (leaving(start, end, boxes[source]), leaving(end, start, boxes[target]))
        found[source, target] = edges if math.dist(*edges) >= 2 * HEAD else (start, end)
    return found


def relation_text(source: int, target: int, arrows: Sequence[Arrow], *, numbered: bool) -> str:
    """What is written at the line of two marks; if it leads to and fro, a row for each way.

    Args:
        numbered: say between which marks, by their numbers.
    """
    ways = []
    for one, other in ((source, target), (target, source)):
        names = dict.fromkeys(arrow.name for arrow in arrows if (arrow.source, arrow.target) == (one, other))
        if names:
            ways.append((f"{one + 1} → {other + 1}  ", shortened(", ".join(names))))
    return "\n".join(way + name if numbered or len(ways) > 1 else name for way, name in ways)


def spots(start: Point, end: Point) -> list[Corners]:
    """A line as a row of small boxes, which names should not hide."""
    count = 1 + int(math.dist(start, end) // (2 * SPOT))
    centres = [tuple(a + step / count * (b - a) for a, b in zip(start, end, strict=True)) for step in range(count + 1)]
    return [grown((x, y, x, y), SPOT) for x, y in centres]


def measured(text: str) -> Point:
    """Width and height of a name with the ground it stands on."""
    left, top, right, bottom = ImageDraw.Draw(Image.new("1", (1, 1))).multiline_textbbox((0, 0), text, font(LETTERS))
    return right - left + 10, bottom - top + 8


def least_hiding(
    places: Iterable[Place], size: Point, room: Corners, taken: list[Corners], boxes: Sequence[Corners]
) -> Corners:
    """Where a name of that size hides least, which is taken then: the first of such places.

    To hide another name, an arrow, or a box that is small is worst, then to hide a part of what is in a box.
    """

    def at(place: Place) -> Corners:
        x = min(max(place[0] - place[2] * size[0], room[0]), room[2] - size[0])
        y = min(max(place[1] - place[3] * size[1], room[1]), room[3] - size[1])
        return x, y, x + size[0], y + size[1]

    def hidden(corners: Corners) -> float:
        parts = ((shared(corners, box), max(1.0, (box[2] - box[0]) * (box[3] - box[1]))) for box in boxes)
        own = size[0] * size[1]
        return 4 * sum(shared(corners, other) for other in taken) + sum(
            part + own * part / area for part, area in parts
        )

    best = min(map(at, places), key=hidden)
    taken.append(best)
    return best


def leaving(inside: Point, outside: Point, box: Corners) -> Point:
    """Where the way from a point in a box leaves it; the point itself if the way's end lies in the box too."""
    if box[0] <= outside[0] <= box[2] and box[1] <= outside[1] <= box[3]:
        return inside
    shares = [
        (edge - inside[axis]) / (outside[axis] - inside[axis])
        for axis in (0, 1)
        for edge in (box[axis], box[axis + 2])
        if outside[axis] != inside[axis]
    ]
    share = min((share for share in shares if share > 0), default=0.0)
    return tuple(a + share * (b - a) for a, b in zip(inside, outside, strict=True))  # type: ignore[return-value]


# -- drawing


def draw_arrow(pen: ImageDraw.ImageDraw, start: Point, end: Point, *, both: bool) -> None:
    """A dark line with a head, or a head at both ends, on a light one so that it is seen on any ground."""
    length = math.dist(start, end)
    if length < 1:
        return
    x, y = (end[0] - start[0]) / length, (end[1] - start[1]) / length
    head = min(HEAD, length / (3 if both else 2))
    pen.line([start, end], PAPER, 7)
    pen.line([start, end], INK, 3)
    for tip, way in ((end, 1), (start, -1))[: 2 if both else 1]:
        neck = (tip[0] - way * head * x, tip[1] - way * head * y)
        wings = [(neck[0] - side * head / 2 * y, neck[1] + side * head / 2 * x) for side in (-1, 1)]
        pen.polygon([tip, *wings], INK, PAPER, 2)
    if not both:
        pen.ellipse(grown((*start, *start), 5), INK, PAPER, 2)


def write(pen: ImageDraw.ImageDraw, text: str, colour: tuple[int, int, int], corners: Corners) -> None:
    """Write a name on a ground of its own."""
    pen.rounded_rectangle(corners, 4, colour, INK, 1)
    left, top, _, _ = pen.multiline_textbbox((0, 0), text, font(LETTERS))
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = INK if light > 130 else PAPER
    pen.multiline_text((corners[0] + 5 - left, corners[1] + 4 - top), text, ink, font(LETTERS))


# -- of a scene graph


def as_marks(graph: Mapping[str, Any]) -> tuple[list[Mark], list[Arrow]]:
    """The objects of a subgraph, numbered, and what is drawn of its relations; see `vqa.scene_graph.subgraph`."""
    objects = enumerate(graph["objects"], start=1)
    marks = [Mark(f"{number} {each['name']}", each["box"], each["weight"]) for number, each in objects]
    return marks, drawn_relations(graph["relations"])


def drawn_relations(relations: Sequence[Sequence[Any]]) -> list[Arrow]:
    """Those that are drawn: the first, which are between the heaviest objects; none that says another the other way."""
    found: list[Arrow] = []
    for source, name, target in relations:
        if Arrow(target, REVERSED.get(name, ""), source) not in found:
            found.append(Arrow(source, name, target))
    pairs = list(dict.fromkeys(frozenset((arrow.source, arrow.target)) for arrow in found))[:MOST_ARROWS]
    return [arrow for arrow in found if frozenset((arrow.source, arrow.target)) in pairs]
