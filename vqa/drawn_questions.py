"""Questions about scenes of coloured shapes: what they ask, by which steps they are answered, and which are chosen.

Of each template one question is asked of a scene, so that no answer is much more frequent than another and the
questions alone tell little. Places are in pixels, y pointing down.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations, permutations
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
KINDS = ("circle", "square", "triangle", "star", "ring")
COLOURS = {  # name -> sRGB
    "red": (215, 35, 35), "green": (40, 160, 60), "blue": (40, 70, 215), "yellow": (240, 215, 40),
    "purple": (140, 45, 170), "orange": (245, 135, 25),
}  # fmt: skip
FRAMES = {"black": (25, 25, 25), "white": (250, 250, 250), "brown": (115, 75, 40)}  # of the image; name -> sRGB
RADII = {"small": 9.0, "large": 18.0}  # of the circle around a shape, in pixels, give or take a tenth
OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {other: name for name, other in OPPOSITE.items()}
SIDES = {side: side.removeprefix("to the ").removesuffix(" of") for side in OPPOSITE}  # as an answer names them
DECIDED = 1.25  # how much further one thing must lie from another along one axis than along the other
MOST_COUNTED = 4  # of what "how many" asks for
SAME_TEXT = 3  # weight of balance among questions of the same words, beside that among all of a variant

GROUPS = {  # what the answer to a question is one of
    "yes/no": ("yes", "no"), "color": tuple(COLOURS), "shape": KINDS, "thing": KINDS, "size": tuple(RADII),
    "number": tuple(map(str, range(MOST_COUNTED + 1))), "frame": tuple(FRAMES), "side": tuple(SIDES.values()),
}  # fmt: skip
# Variant of question -> GQA's structural, semantic and detailed type; the group of its answers.
TYPES = {
    "exist": ("verify", "obj", "exist", "yes/no"), "exist related": ("verify", "rel", "existRelS", "yes/no"),
    "exist and": ("logical", "obj", "existAnd", "yes/no"), "exist or": ("logical", "obj", "existOr", "yes/no"),
    "query color": ("query", "attr", "directOf", "color"), "query shape": ("query", "attr", "directOf", "shape"),
    "query related": ("query", "rel", "relS", "thing"), "count": ("query", "obj", "count", "number"),
    "verify color": ("verify", "attr", "verifyAttr", "yes/no"), "verify rel": ("verify", "rel", "relVerify", "yes/no"),
    "verify size": ("verify", "attr", "verifyAttr", "yes/no"),
    "choose color": ("choose", "attr", "chooseAttr", "color"), "choose size": ("choose", "attr", "chooseAttr", "size"),
    "choose rel": ("choose", "rel", "relChooser", "side"),
    "query frame": ("query", "global", "frame", "frame"), "verify frame": ("verify", "global", "frameVerify", "yes/no"),
    "choose frame": ("choose", "global", "frameChoose", "frame"),
    "same color": ("compare", "attr", "twoSame", "yes/no"), "same shape": ("compare", "attr", "twoSame", "yes/no"),
}  # fmt: skip
WORDS = {"colour": "color", "kind": "shape", "size": "size"}  # attribute -> as questions call it


@dataclass(frozen=True)
class Shape:
    """A shape in a scene: what it is, where its centre lies, and by how many radians it is turned."""

    id: str
    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    turn: float

    @cached_property
    def outline(self) -> NDArray[np.float64]:
        """(N, 2) corners of the outer edge."""
        corners = {"square": 4, "triangle": 3, "star": 10}.get(self.kind, 60)
        angles = self.turn - math.pi / 2 + np.arange(corners) * (2 * math.pi / corners)
        radii = np.full(corners, self.radius)
        if self.kind == "square":
            angles += math.pi / 4
        if self.kind == "star":
            radii[1::2] *= 0.42
        return np.stack([self.x + radii * np.cos(angles), self.y + radii * np.sin(angles)], axis=1)

    @cached_property
    def box(self) -> list[int]:
        """x1, y1, x2, y2 of the smallest box of whole pixels around it."""
        low, high = np.floor(self.outline.min(axis=0)), np.floor(self.outline.max(axis=0)) + 1
        return [int(low[0]), int(low[1]), int(high[0]), int(high[1])]

    def side_of(self, other: Shape) -> str:
        """How it lies, seen from another shape: a key of OPPOSITE; "" where it lies about as much aside as above."""
        dx, dy = ((self.box[i] + self.box[i + 2] - other.box[i] - other.box[i + 2]) / 2 for i in (0, 1))
        if abs(dx) > DECIDED * abs(dy):
            return "to the left of" if dx < 0 else "to the right of"
        if abs(dy) > DECIDED * abs(dx):
            return "above" if dy < 0 else "below"
        return ""


class Step(NamedTuple):
    """One step of the reasoning that answers a question; it takes what the steps numbered by `dependencies` found."""

    operation: str
    argument: str
    dependencies: list[int]


class Look(NamedTuple):
    """A description of shapes; "" leaves an attribute open."""

    kind: str = ""
    colour: str = ""
    size: str = ""

    def fits(self, shape: Shape) -> bool:
        """Whether a shape looks so."""
        kind, colour, size = self
        return kind in ("", shape.kind) and colour in ("", shape.colour) and size in ("", shape.size)

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.kind or "thing") if word)

    @property
    def with_article(self) -> str:
        """Such as "an orange star"."""
        return f"{'an' if str(self)[0] in 'aeiou' else 'a'} {self}"

    def steps(self, scene: Scene, start: int = 0) -> list[Step]:
        """The steps that find these shapes, numbered from `start`."""
        ids = ",".join(shape.id for shape in scene.that(self)) or "-"
        found = [Step("select", f"{self.kind or 'thing'} ({ids})", [])]
        for operation, value in (("filter color", self.colour), ("filter size", self.size)):
            if value:
                found.append(Step(operation, value, [start + len(found) - 1]))
        return found


@dataclass(frozen=True)
class Scene:
    """What is on an image."""

    id: str
    fold: str
    width: int
    height: int
    shapes: tuple[Shape, ...]
    boxes: list[list[float]]  # as `DrawnImage` has them
    frame: str  # of FRAMES; neither boxes nor scene graphs tell of it

    def that(self, look: Look) -> list[Shape]:
        """The shapes that look so."""
        return [shape for shape in self.shapes if look.fits(shape)]

    def named_by(self, *attributes: str) -> list[tuple[Shape, Look]]:
        """Each shape that some of these attributes tell from all others, and its shortest descriptions by them."""
        found = []
        for shape in self.shapes:
            for number in range(1, len(attributes) + 1):
                groups = combinations(attributes, number)
                looks = [Look(**{key: getattr(shape, key) for key in group}) for group in groups]
                if alone := [(shape, look) for look in looks if len(self.that(look)) == 1]:
                    found += alone
                    break
        return found


@dataclass(frozen=True)
class Question:
    """A question about a scene, and its answer."""

    variant: str  # a key of TYPES
    text: str
    answer: str
    full_answer: str
    steps: list[Step]
    named: Sequence[tuple[str, Shape]] = ()  # words of the question or the full answer that stand for one shape
    implied: Sequence[Callable[[], Question]] = ()  # ask what is known with the answer
    options: tuple[str, ...] = ()  # what is left of the group of answers, in the order of the text

    @property
    def balanced_by(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Within what each answer should be about as frequent: all of its variant; those with the same words."""
        place = f", number {self.options.index(self.answer)}" if self.options else ""
        return (self.variant + place, self.answer), (self.text, self.answer)


def yes_no(is_true: bool) -> str:
    """A truth value as an answer."""
    return "yes" if is_true else "no"


def then(steps: list[Step], operation: str, argument: str) -> list[Step]:
    """Steps, and another one that takes what the last of them found."""
    return [*steps, Step(operation, argument, [len(steps) - 1])]


def ask_exist(scene: Scene, look: Look) -> Question:
    """Whether there is something that looks so."""
    found = scene.that(look)
    said = f"Yes, there is {look.with_article}." if found else f"No, there are no {look}s."
    others = [look._replace(size=size) for size in RADII if not look.size]
    if found:
        others = [less for key in Look._fields if getattr(look, key) and any(less := look._replace(**{key: ""}))]
    implied = [partial(ask_exist, scene, other) for other in others]
    named = [(str(look), found[0])] if len(found) == 1 else []
    text = f"Is there {look.with_article}?"
    return Question("exist", text, yes_no(bool(found)), said, then(look.steps(scene), "exist", "?"), named, implied)


def ask_attribute(scene: Scene, key: str, shape: Shape, look: Look) -> Question:
    """What colour the one that looks so has, or what shape; `key` is "colour" or "kind"."""
    answer, word = getattr(shape, key), WORDS[key]
    text, said = f"What {word} is the {look}?", f"The {look} is {'a ' * (key == 'kind')}{answer}."
    implied = [partial(ask_exist, scene, look._replace(**{key: answer}))]
    if key == "colour":
        implied.append(partial(ask_verify, scene, key, shape, look, answer))
    steps = then(look.steps(scene), "query", word)
    return Question(f"query {word}", text, answer, said, steps, [(str(look), shape)], implied)


def ask_related(scene: Scene, relation: str, shape: Shape, look: Look, found: Shape) -> Question:
    """What lies on one side of the shape that looks so, where `found` alone lies."""
    side = f"{relation} the {look}"
    steps = then(then(look.steps(scene), "relate", f"_,{relation},s ({found.id})"), "query", "name")
    text, said, named = f"What is {side}?", f"The {found.kind} is {side}.", [(found.kind, found), (str(look), shape)]
    implied = [partial(ask_whether_related, scene, relation, shape, look, found)]
    return Question("query related", text, found.kind, said, steps, named, implied)


def ask_whether_related(scene: Scene, relation: str, shape: Shape, look: Look, found: Shape) -> Question:
    """Whether something like `found` lies on one side of the shape that looks so, as it does."""
    thing = f"a {found.kind} {relation} the {look}"
    steps = then(then(look.steps(scene), "relate", f"{found.kind},{relation},s ({found.id})"), "exist", "?")
    text, said, named = f"Is there {thing}?", f"Yes, there is {thing}.", [(found.kind, found), (str(look), shape)]
    implied = [partial(ask_exist, scene, Look(found.kind))]
    return Question("exist related", text, "yes", said, steps, named, implied)


def ask_verify(scene: Scene, key: str, shape: Shape, look: Look, value: str) -> Question:
    """Whether the shape that looks so has a colour or a size; `key` is "colour" or "size"."""
    own, variant = getattr(shape, key), f"verify {WORDS[key]}"
    answer, steps = yes_no(own == value), then(look.steps(scene), variant, value)
    text, said = f"Is the {look} {value}?", f"{answer.title()}, the {look} is {own}."
    implied = [partial(ask_exist, scene, look._replace(**{key: value}))]
    return Question(variant, text, answer, said, steps, [(str(look), shape)], implied)


def ask_side(scene: Scene, relation: str, shape: Shape, look: Look, other: Shape) -> Question:
    """Whether a shape lies on one side of another, which is the only one of its kind."""
    side = shape.side_of(other)
    answer, text = yes_no(relation == side), f"Is the {look} {relation} the {other.kind}?"
    said, named = f"{answer.title()}, the {look} is {side} the {other.kind}.", [(str(look), shape), (other.kind, other)]
    steps = then(look.steps(scene), "verify rel", f"{other.kind},{relation},o ({other.id})")
    implied = [partial(ask_exist, scene, known) for known in (look, Look(other.kind))]
    return Question("verify rel", text, answer, said, steps, named, implied)


def ask_choice(scene: Scene, key: str, shape: Shape, look: Look, options: tuple[str, ...]) -> Question:
    """Which of two colours or sizes the shape that looks so has; `key` is "colour" or "size"."""
    own, variant = getattr(shape, key), f"choose {WORDS[key]}"
    text, said = f"Is the {look} {options[0]} or {options[1]}?", f"The {look} is {own}."
    steps = then(look.steps(scene), variant, "|".join(options))
    implied = [partial(ask_verify, scene, key, shape, look, value) for value in options]
    return Question(variant, text, own, said, steps, [(str(look), shape)], implied, options)


def ask_same(scene: Scene, key: str, pair: Sequence[tuple[Shape, Look]]) -> Question:
    """Whether two shapes have the same colour or are of the same kind; `key` is "colour" or "kind"."""
    (one, first), (two, second) = pair
    values, article = (getattr(one, key), getattr(two, key)), "a " * (key == "kind")
    answer, variant = yes_no(values[0] == values[1]), f"same {WORDS[key]}"
    said = f"No, the {first} is {article}{values[0]} and the {second} is {article}{values[1]}."
    if answer == "yes":
        said = f"Yes, the {first} and the {second} are both {values[0]}{'s' * (key == 'kind')}."
    steps = first.steps(scene)
    both = [*steps, *second.steps(scene, len(steps))]
    both.append(Step(variant, "", [len(steps) - 1, len(both) - 1]))
    text = f"Are the {first} and the {second} of the same {WORDS[key]}?"
    return Question(variant, text, answer, said, both, [(str(first), one), (str(second), two)])


def ask_both(scene: Scene, word: str, looks: Sequence[Look]) -> Question:
    """Whether there are two things, or one of them; `word` is "and" or "or"."""
    present = [look for look in looks if scene.that(look)]
    answer = yes_no(len(present) == 2 if word == "and" else bool(present))
    steps: list[Step] = []
    ends = []
    for look in looks:
        steps += look.steps(scene, len(steps))
        steps.append(Step("exist", "?", [len(steps) - 1]))
        ends.append(len(steps) - 1)
    steps.append(Step(word, "", ends))
    said = " and ".join(look.with_article if look in present else f"no {look}" for look in looks)
    text = f"Is there {looks[0].with_article} {word} {looks[1].with_article}?"
    implied = [partial(ask_exist, scene, look) for look in looks if len(present) != 1]
    return Question(f"exist {word}", text, answer, f"{answer.title()}, there is {said}.", steps, (), implied)


def ask_count(scene: Scene, look: Look) -> Question:
    """How many things look so. GQA asks nothing of the kind; the record is as of its open questions."""
    number = len(scene.that(look))
    said = f"There is 1 {look}." if number == 1 else f"There are {number} {look}s."
    text, steps = f"How many {look}s are there?", then(look.steps(scene), "count", "")
    return Question("count", text, str(number), said, steps, (), [partial(ask_exist, scene, look)])


def ask_which_side(scene: Scene, shape: Shape, look: Look, other: Shape, turned: bool) -> Question:
    """On which of two opposite sides of another shape a shape lies; `turned` names that first on which it does not."""
    side = shape.side_of(other)
    options = (OPPOSITE[side], side) if turned else (side, OPPOSITE[side])
    first, second = (option.removesuffix(" of") for option in options)
    text = f"Is the {look} {first} or {second}{' of' * side.endswith(' of')} the {other.kind}?"
    said, named = f"The {look} is {side} the {other.kind}.", [(str(look), shape), (other.kind, other)]
    steps = then(look.steps(scene), "choose rel", f"{other.kind},{'|'.join(options)},o ({other.id})")
    implied = [partial(ask_side, scene, way, shape, look, other) for way in options]
    answers = tuple(SIDES[option] for option in options)
    return Question("choose rel", text, SIDES[side], said, steps, named, implied, answers)


def ask_frame(scene: Scene, options: tuple[str, ...]) -> Question:
    """What colour the frame of the image has: one of all, of two, or whether it is this one."""
    own, steps = scene.frame, [Step("select", "frame (-)", [])]
    said = f"The frame is {own}."
    if len(options) == len(FRAMES):
        return Question("query frame", "What color is the frame?", own, said, then(steps, "query", "frame"))
    if len(options) == 2:
        text, steps = f"Is the frame {options[0]} or {options[1]}?", then(steps, "choose frame", "|".join(options))
        implied = [partial(ask_frame, scene, (option,)) for option in options]
        return Question("choose frame", text, own, said, steps, (), implied, options)
    answer, steps = yes_no(own == options[0]), then(steps, "verify frame", options[0])
    return Question("verify frame", f"Is the frame {options[0]}?", answer, f"{answer.title()}, {said.lower()}", steps)


def candidates(scene: Scene, rng: np.random.Generator) -> Iterator[list[Question]]:
    """For each template, what may be asked of a scene, with every answer that there is."""
    shapes, by_kind, by_colour = scene.shapes, scene.named_by("kind", "size"), scene.named_by("colour", "size")
    by_either = scene.named_by("kind", "colour")
    plain = [Look(kind) for kind in KINDS] + [Look(colour=colour) for colour in COLOURS]
    full = [Look(kind, colour) for kind in KINDS for colour in COLOURS]

    yield [ask_exist(scene, look) for look in (*plain, *full)]
    yield [ask_attribute(scene, "colour", *asked) for asked in by_kind]
    yield [ask_attribute(scene, "kind", *asked) for asked in by_colour]
    yield [
        ask_related(scene, relation, shape, look, found[0])
        for shape, look in by_either
        for relation in OPPOSITE
        if len(found := [other for other in shapes if other.side_of(shape) == relation]) == 1
    ]
    wrong = {shape.id: pick(rng, [colour for colour in COLOURS if colour != shape.colour]) for shape in shapes}
    alone = [shape for shape in shapes if len(scene.that(Look(shape.kind))) == 1]
    sides = [(*asked, other) for asked in by_either for other in alone if asked[0].side_of(other)]
    yield [
        *(ask_verify(scene, "colour", *asked, c) for asked in by_kind for c in (asked[0].colour, wrong[asked[0].id])),
        *(ask_verify(scene, "size", *asked, size) for asked in by_either for size in RADII),
        *(ask_side(scene, way, *a) for a in sides for side in [a[0].side_of(a[2])] for way in (side, OPPOSITE[side])),
    ]
    yield [
        *(ask_choice(scene, "colour", *a, two) for a in by_kind for two in permutations((a[0].colour, wrong[a[0].id]))),
        *(ask_choice(scene, "size", *asked, two) for asked in by_either for two in permutations(RADII)),
    ]
    yield [
        ask_same(scene, key, pair)
        for key, asked in (("colour", by_kind), ("kind", by_colour))
        for pair in combinations(mixed(rng, asked), 2)
        if pair[0][0] is not pair[1][0]
    ]
    present = mixed(rng, list({Look(shape.kind, shape.colour): None for shape in shapes}))
    absent = mixed(rng, [look for look in full if look not in present])
    either = [mixed(rng, two) for two in zip(present, absent, strict=False)]
    yield [
        *(ask_both(scene, "and", two) for two in (*combinations(present, 2), *either)),
        *(ask_both(scene, "or", two) for two in (*combinations(absent[:4], 2), *either)),
    ]
    yield [ask_which_side(scene, *asked, turned) for asked in sides for turned in (False, True)]
    other = pick(rng, [frame for frame in FRAMES if frame != scene.frame])
    wanted = [tuple(FRAMES), *permutations((scene.frame, other)), (scene.frame,), (other,)]
    yield [ask_frame(scene, options) for options in wanted]
    yield [ask_count(scene, look) for look in plain if len(scene.that(look)) <= MOST_COUNTED]


def ask_all(scenes: Sequence[Scene], seed: int) -> list[list[Question]]:
    """For each scene one question of each template that it allows, answers being balanced in either fold."""
    rng = np.random.default_rng([seed, 0])
    counts: dict[str, Counter[tuple[str, str]]] = {"train": Counter(), "val": Counter()}
    asked: list[list[Question]] = []
    for scene in scenes:
        asked.append([])
        seen = counts[scene.fold]

        def excess(question: Question, seen: Counter[tuple[str, str]] = seen) -> int:
            among_all, among_same = question.balanced_by
            return seen[among_all] + SAME_TEXT * seen[among_same]

        for options in candidates(scene, rng):
            if options:
                chosen = min(mixed(rng, options), key=excess)
                seen.update(chosen.balanced_by)
                asked[-1].append(chosen)
    return asked


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of some, by chance."""
    return options[int(rng.integers(len(options)))]


def mixed(rng: np.random.Generator, options: Sequence[T]) -> list[T]:
    """All of some, in an order by chance."""
    return [options[place] for place in rng.permutation(len(options))]
