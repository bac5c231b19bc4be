"""Draw the demo set: captions of coloured shapes, flawed pictures of them, and the scores people might give.

Every prompt is drawn by eight made-up generators. Each picture is marred twice, independently:

- consistency: some attributes of the drawn scene (colour, kind, count, texture, ...) differ from the prompt;
- quality: the pixels are blurred, noisy, over-compressed, banded or faded.
Both are turned into mean opinion scores (MOS) in 1..5 with a little rater noise.
"""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from storage.atomic import remove_if_empty, sync
from storage.locks import locked

T = TypeVar("T")
CSV_COLUMNS = ("name", "prompt", "mos_quality", "mos_align", "explanation")
IMAGE_SIZE = 256
RATER_NOISE = 0.12  # standard deviation of a mean opinion score, in MOS points

COLOURS = {  # name -> sRGB; the first six are the demo's, the rest are for pretraining
    "red": (215, 35, 35), "green": (40, 160, 60), "blue": (40, 70, 215), "yellow": (240, 215, 40),
    "purple": (140, 45, 170), "orange": (245, 135, 25), "pink": (245, 130, 185), "cyan": (50, 200, 215),
    "brown": (120, 75, 40), "white": (250, 250, 250), "black": (25, 25, 25), "grey": (128, 128, 128),
}  # fmt: skip
COUNT_WORDS = {1: "a", 2: "two", 3: "three", 4: "four"}
PENALTIES = {"colour": 1.0, "kind": 0.4, "count": 0.2, "texture": 0.6, "backdrop": 1.0}
HALO = 0.25  # share of a picture's poor quality that also tells on what raters say of its consistency

# How much a degradation at full strength takes from the quality, 0..1.
ANNOYANCE = {"blur": 1.0, "noise": 0.95, "compression": 0.95, "banding": 0.85, "fading": 0.8}


@dataclass(frozen=True)
class Group:
    """`count` equal shapes; `size` is empty, small or large."""

    count: int
    colour: str
    kind: str
    size: str = ""


@dataclass(frozen=True)
class Scene:
    """What a caption says and a picture shows: one or two groups of shapes on a background."""

    groups: tuple[Group, ...]
    texture: str
    backdrop: str


@dataclass(frozen=True)
class Vocabulary:
    """What may occur in a scene, and how captions word it."""

    kinds: tuple[str, ...]
    colours: tuple[str, ...]  # of shapes and of backgrounds
    textures: tuple[str, ...]
    sizes: tuple[str, ...]
    max_count: int  # of equal shapes where they are alone
    templates: tuple[str, ...]


DEMO_VOCABULARY = Vocabulary(
    kinds=("circle", "square", "triangle", "star", "ring"),
    colours=tuple(COLOURS)[:6],
    textures=("plain", "striped", "checkered", "dotted", "gradient"),
    sizes=("",),
    max_count=3,
    templates=(
        "{things} on a {texture} {backdrop} background",
        "a picture of {things} on a {texture} {backdrop} background",
        "{things} in front of a {texture} {backdrop} wall",
    ),
)


@dataclass(frozen=True)
class Generator:
    """A made-up text-to-image model: exponents below 1 make its flaws more severe, above 1 milder."""

    name: str
    suffix: str
    quality_exponent: float
    consistency_exponent: float
    habits: tuple[str, ...]  # degradations it is prone to


GENERATORS = (
    Generator("alpha", ".jpg", 0.62, 1.60, ("blur", "blur")),
    Generator("beta", ".jpg", 0.75, 0.95, ("noise", "noise")),
    Generator("gamma", ".png", 1.00, 0.75, ("banding", "banding")),
    Generator("delta", ".jpg", 1.60, 1.40, ("compression",)),
    Generator("delta_fast", ".jpg", 0.80, 0.80, ("compression", "noise")),
    Generator("epsilon", ".jpg", 1.25, 2.10, ("fading", "fading")),
    Generator("zeta", ".jpg", 1.40, 1.20, ()),
    Generator("eta_v2", ".jpg", 1.10, 1.90, ("blur", "fading")),
)


def random_scene(rng: np.random.Generator, vocabulary: Vocabulary) -> Scene:
    """A scene of one or two groups with no colour or kind used twice, at most four shapes in all."""
    num_groups = int(rng.integers(1, 3))
    backdrop = _pick(rng, vocabulary.colours)
    colours = rng.permutation([name for name in vocabulary.colours if name != backdrop])[:num_groups]
    kinds = rng.permutation(vocabulary.kinds)[:num_groups]
    counts = 1 + rng.integers(vocabulary.max_count if num_groups == 1 else 2, size=num_groups)
    sizes = [_pick(rng, vocabulary.sizes) for _ in range(num_groups)]
    groups = tuple(map(Group, counts.tolist(), colours.tolist(), kinds.tolist(), sizes))
    return Scene(groups, _pick(rng, vocabulary.textures), backdrop)


def caption(scene: Scene, template: str) -> str:
    """The scene in words, such as "a red circle and two blue squares on a striped green background"."""
    things = " and ".join(_describe(group) for group in scene.groups)
    return template.format(things=things, texture=scene.texture, backdrop=scene.backdrop)


def slots(scene: Scene) -> list[tuple[str, int]]:
    """Every attribute that can be drawn wrong, as (name, group number); background ones have number -1."""
    own = [(name, i) for i in range(len(scene.groups)) for name in ("colour", "kind", "count")]
    return [*own, ("texture", -1), ("backdrop", -1)]


def alter(scene: Scene, slot: tuple[str, int], rng: np.random.Generator, vocabulary: Vocabulary) -> Scene:
    """The same scene with one attribute changed; colours stay visible against the background."""
    name, index = slot
    colours = [scene.backdrop, *(group.colour for group in scene.groups)]
    if name == "texture":
        return replace(scene, texture=_other(rng, vocabulary.textures, [scene.texture]))
    if name == "backdrop":
        return replace(scene, backdrop=_other(rng, vocabulary.colours, colours))
    group = scene.groups[index]
    if name == "colour":
        group = replace(group, colour=_other(rng, vocabulary.colours, colours))
    elif name == "kind":
        group = replace(group, kind=_other(rng, vocabulary.kinds, [other.kind for other in scene.groups]))
    else:
        limit = vocabulary.max_count if len(scene.groups) == 1 else 2
        group = replace(group, count=_other(rng, range(1, limit + 1), [group.count]))
    return replace(scene, groups=(*scene.groups[:index], group, *scene.groups[index + 1 :]))


def _describe(group: Group) -> str:
    words = [COUNT_WORDS[group.count], group.size, group.colour, group.kind]
    if group.count > 1:
        words[3] += "es" if group.kind.endswith("s") else "s"
    elif (group.size or group.colour)[0] in "aeiou":
        words[0] = "an"
    return " ".join(word for word in words if word)


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options: Sequence[T], taken: Sequence[T]) -> T:
    return _pick(rng, [option for option in options if option not in taken])


def draw_scene(scene: Scene, rng: np.random.Generator, size: int = IMAGE_SIZE) -> np.ndarray:
    """An undamaged picture of the scene, uint8 (size, size, 3); places, angles and lighting are random."""
    canvas = Image.fromarray(_background(scene, rng, size).repeat(2, axis=0).repeat(2, axis=1))
    draw = ImageDraw.Draw(canvas)
    shapes = [group for group in scene.groups for _ in range(group.count)]
    for group, (x, y, radius) in zip(shapes, _places(len(shapes), rng), strict=True):
        radius *= {"": 1.0, "small": 0.7, "large": 1.2}[group.size]
        _draw_shape(draw, group, 2 * size * x, 2 * size * y, 2 * size * radius, rng.uniform(-0.2, 0.2))
    pixels = np.asarray(canvas.reduce(2), dtype=np.float32)
    # Smooth lighting gives flat areas a slope, without which banding would not show.
    angle, axis = rng.uniform(0, 2 * math.pi), np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + 0.14 * (math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None])
    return np.clip(pixels * light[..., None], 0, 255).astype(np.uint8)


def _background(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    """The textured background in two tints of the backdrop colour, uint8 (size, size, 3)."""
    colour = np.array(COLOURS[scene.backdrop], dtype=np.float32)
    tints = colour * 0.45 + 255 * 0.55, colour * 0.8 + 255 * 0.04
    angle, period = rng.uniform(-0.5, 0.5) + _pick(rng, (0, math.pi / 2)), rng.uniform(0.11, 0.17)
    axis = np.arange(size, dtype=np.float32) / size * (2 * math.pi / period)
    u = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None] + np.float32(rng.uniform(0, 6))
    v = math.cos(angle) * axis[:, None] - math.sin(angle) * axis[None, :] + np.float32(rng.uniform(0, 6))
    if scene.texture == "gradient":
        ramp = u - u.mean()
        mix = 0.5 + _pick(rng, (-0.5, 0.5)) * ramp / np.abs(ramp).max()
    else:
        patterns: dict[str, Callable[[], np.ndarray]] = {
            "plain": lambda: np.full_like(u, -1.0),
            "striped": lambda: np.sin(u),
            "checkered": lambda: 2 * np.sin(u) * np.sin(v),
            "dotted": lambda: np.cos(u) + np.cos(v) - 0.6,
            "wavy": lambda: np.sin(u + 1.5 * np.sin(v / 2)),
            "grid": lambda: np.maximum(np.cos(u), np.cos(v)) - 0.85,
        }
        mix = np.clip(0.5 + 0.12 * period * size * patterns[scene.texture](), 0, 1)  # edges about 1 px wide
    return (tints[0] + mix[..., None] * (tints[1] - tints[0])).astype(np.uint8)


def _places(num_shapes: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each shape as fractions of the side; none overlap, all clear a centre crop's edge."""
    layouts = {
        1: [[(0.5, 0.5)]],
        2: [[(0.29, 0.5), (0.71, 0.5)], [(0.5, 0.29), (0.5, 0.71)], [(0.3, 0.3), (0.7, 0.7)]],
        3: [[(0.29, 0.3), (0.71, 0.3), (0.5, 0.71)], [(0.29, 0.7), (0.71, 0.7), (0.5, 0.29)]],
        4: [[(0.29, 0.29), (0.71, 0.29), (0.29, 0.71), (0.71, 0.71)]],
    }
    centres = rng.permutation(_pick(rng, layouts[num_shapes]))
    radius, jitter = (0.28, 0.06) if num_shapes == 1 else (0.175, 0.02)
    moved = centres + rng.uniform(-jitter, jitter, centres.shape)
    return [(float(x), float(y), radius * rng.uniform(0.88, 1.05)) for x, y in moved]


def _draw_shape(pen: ImageDraw.ImageDraw, group: Group, x: float, y: float, r: float, turn: float) -> None:
    """A filled shape of radius `r` with a dark outline, whose edges give blur something to spoil."""
    for inset, paint in ((0.0, (20, 20, 20)), (0.09 * r, COLOURS[group.colour])):
        if group.kind == "ring":
            box = x - r + inset, y - r + inset, x + r - inset, y + r - inset
            pen.ellipse(box, outline=paint, width=round(0.42 * r - 2 * inset))
        else:
            s = r - 1.3 * inset
            pen.polygon([(x + s * px, y + s * py) for px, py in _outline(group.kind, turn)], fill=paint)


def _outline(kind: str, turn: float) -> list[tuple[float, float]]:
    """Corners of a shape in the unit circle, turned by `turn` radians from upright."""
    corners = {"circle": 48, "triangle": 3, "star": 10, "hexagon": 6, "cross": 12}.get(kind, 4)
    angles = turn - math.pi / 2 + np.arange(corners) * (2 * math.pi / corners)
    radii = np.ones(corners)
    if kind == "square":
        angles = angles + math.pi / 4
    elif kind == "star":
        radii[1::2] = 0.42
    elif kind == "cross":  # arms from two long corners, then one short inner corner
        arm = 0.33
        angles = turn + np.repeat(np.arange(4) * math.pi / 2, 3) + np.tile([-arm, arm, math.pi / 4], 4)
        radii = np.tile([1.0, 1.0, math.sqrt(2) * math.sin(arm)], 4)
    x, y = radii * np.cos(angles), radii * np.sin(angles)
    if kind == "diamond":
        x = x * 0.55
    return list(zip(x.tolist(), y.tolist(), strict=True))


def random_levels(severity: float, rng: np.random.Generator, habits: Sequence[str] = ()) -> dict[str, float]:
    """Strengths in 0..1 of one or two degradations that together annoy by about `severity` (0..1)."""
    if severity < 0.04:
        return {}
    kinds = list(dict.fromkeys(str(kind) for kind in rng.permutation([*ANNOYANCE, *habits])))[:2]
    share = 1.0 if rng.random() < 0.5 else float(rng.uniform(0.5, 1.0))
    parts = [1 - (1 - severity) ** share, 1 - (1 - severity) ** (1 - share)]
    return {k: min(1.0, part / ANNOYANCE[k]) for k, part in zip(kinds, parts, strict=True) if part >= 0.04}


def total_severity(levels: dict[str, float]) -> float:
    """Overall annoyance in 0..1: what one degradation leaves of the quality, the next one reduces further."""
    return 1 - math.prod(1 - ANNOYANCE[kind] * level for kind, level in levels.items())


def degrade(pixels: np.ndarray, levels: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """The image, uint8 (H, W, 3), after the degradations named, each with a strength in 0..1."""
    if fading := levels.get("fading"):
        pixels = _to_uint8(150 + (pixels.astype(np.float32) - 150) * (1 - 0.8 * fading))
    if blur := levels.get("blur"):
        radius = (0.5 + 5.0 * blur) * len(pixels) / IMAGE_SIZE
        pixels = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    if noise := levels.get("noise"):  # in grains of 3 x 3 pixels, which survive scaling
        height, width = pixels.shape[:2]
        grain = rng.standard_normal((-(-height // 3), -(-width // 3), 3), dtype=np.float32)
        grain = grain.repeat(3, axis=0).repeat(3, axis=1)[:height, :width]
        pixels = _to_uint8(pixels + (5 + 65 * noise) * grain)
    if banding := levels.get("banding"):
        step = 255 / (1 + 7 * (1 - banding) ** 1.3)
        pixels = _to_uint8(np.round(pixels / step) * step)
    if compression := levels.get("compression"):  # at half resolution, so that the blocks are large
        height, width = pixels.shape[:2]
        buffer = io.BytesIO()
        quality = round(2 + 28 * (1 - compression) ** 1.5)
        Image.fromarray(pixels).reduce(2).save(buffer, "JPEG", quality=quality)
        pixels = np.asarray(Image.open(buffer).resize((width, height), Image.Resampling.NEAREST))
    return pixels


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Draft:
    """One row of the demo set before it is drawn: `severity` and `mismatch` are in 0..1."""

    name: str
    prompt: str
    shown: Scene
    levels: dict[str, float]
    severity: float
    mismatch: float
    mos_quality: float
    mos_align: float
    explanation: str


def demo_scenes(num_prompts: int = 80, seed: int = 0) -> list[Scene]:
    """The scenes the demo's prompts describe, all different."""
    rng = np.random.default_rng([seed, 1])
    scenes: dict[Scene, None] = {}
    while len(scenes) < num_prompts:
        scenes[random_scene(rng, DEMO_VOCABULARY)] = None
    return list(scenes)


def plan_demo_set(num_prompts: int = 80, seed: int = 0) -> list[Draft]:
    """Decide every row of the demo set; rows come prompt by prompt, one per generator."""
    rng = np.random.default_rng([seed, 2])
    drafts: list[Draft] = []
    for number, scene in enumerate(demo_scenes(num_prompts, seed)):
        prompt = caption(scene, _pick(rng, DEMO_VOCABULARY.templates))
        drafts += [_plan_row(generator, number, scene, prompt, rng) for generator in GENERATORS]
    return drafts


def _plan_row(maker: Generator, number: int, scene: Scene, prompt: str, rng: np.random.Generator) -> Draft:
    levels = random_levels(float(rng.random() ** maker.quality_exponent), rng, maker.habits)
    severity = total_severity(levels)
    shown, mismatch, faults = _misdraw(scene, float(rng.random() ** maker.consistency_exponent), rng)
    faults += [f"The picture shows {kind}." for kind, level in levels.items() if level > 0.3]
    name = f"{maker.name}_{number:03d}{maker.suffix}"
    scores = _opinion(severity, rng), _opinion(1 - (1 - mismatch) * (1 - HALO * severity), rng)
    explanation = " ".join(faults) if rng.random() < 0.8 else ""
    return Draft(name, prompt, shown, levels, severity, mismatch, *scores, explanation)


def _misdraw(scene: Scene, target: float, rng: np.random.Generator) -> tuple[Scene, float, list[str]]:
    """Draw about `target` (0..1) of the scene's weight wrong: (what is shown, wrong share, faults)."""
    order = [slots(scene)[i] for i in rng.permutation(len(slots(scene)))]
    total = sum(PENALTIES[name] for name, _ in order)
    shown, wrong, faults = scene, 0.0, list[str]()
    lost = sum(PENALTIES[name] for name, index in order if index == 1)
    if lost and lost < target * total and rng.random() < 0.4:
        shown, wrong = replace(scene, groups=scene.groups[:1]), lost
        faults = [f"The {scene.groups[1].kind} is missing."]
        order = [slot for slot in order if slot[1] != 1]
    for slot in order:
        if wrong + PENALTIES[slot[0]] / 2 <= target * total:
            shown, wrong = alter(shown, slot, rng, DEMO_VOCABULARY), wrong + PENALTIES[slot[0]]
            faults.append(_fault(slot, scene, shown))
    return shown, wrong / total, faults


def _fault(slot: tuple[str, int], asked: Scene, shown: Scene) -> str:
    name, i = slot
    if i < 0:
        return f"The background is {getattr(shown, name)} instead of {getattr(asked, name)}."
    was, now = asked.groups[i], shown.groups[i]
    if name == "count":
        return f"The number of {was.kind} shapes is {now.count} instead of {was.count}."
    return f"The {was.kind} is {'a ' * (name == 'kind')}{getattr(now, name)} instead of {getattr(was, name)}."


def _opinion(flaw: float, rng: np.random.Generator) -> float:
    """Mean opinion score in 1..5 for a flaw of 0..1; the first small flaws cost a little more."""
    return round(float(np.clip(4.85 - 3.7 * flaw**0.9 + RATER_NOISE * rng.standard_normal(), 1, 5)), 3)


def write_demo_set(folder: Path, *, num_prompts: int = 80, seed: int = 0) -> tuple[Path, Path]:
    """Draw the demo set into `folder`, unless it is there, and return (CSV file, image folder).

    It is drawn elsewhere and then renamed, so neither a crash nor a second process leaves half of one; a second process
    waits and takes what the first has drawn. Raises ValueError if `folder` holds something else or `num_prompts` is
    below 1.
    """
    paths = folder / "data.csv", folder / "images"
    if paths[0].exists():
        return paths
    if num_prompts < 1:
        raise ValueError(f"num_prompts is {num_prompts}, but at least 1 prompt is needed")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; remove it or name another demo folder")
    with ExitStack() as leaving:
        is_locked = leaving.enter_context(locked(folder, wait=_say_that_it_waits))
        leaving.callback(remove_if_empty, folder)
        is_empty = not any(folder.iterdir())
        if paths[0].exists():  # looked at last: where folders cannot be locked it may have come this very moment
            return paths
        if not is_empty:
            raise ValueError(f"{folder} is in use but holds no data.csv; remove it or name another demo folder")
        for left in folder.parent.glob(f".{folder.name}-*") if is_locked else ():  # by processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            staged = Path(scratch) / "set"
            (staged / "images").mkdir(parents=True)
            _draw_demo_set(staged, plan_demo_set(num_prompts, seed), seed)
            for path in [*staged.rglob("*"), staged]:  # or a machine that stops may leave empty files with these names
                sync(path)
            try:
                os.replace(staged, folder)
            except OSError:  # another process was quicker, where folders cannot be locked
                if not paths[0].exists():
                    raise
    return paths


def _say_that_it_waits() -> None:
    print("note      another run draws the demo set: waiting for it", flush=True)


def _draw_demo_set(staged: Path, drafts: list[Draft], seed: int) -> None:
    for index, draft in enumerate(drafts):
        rng = np.random.default_rng([seed, 3, index])
        image = Image.fromarray(degrade(draw_scene(draft.shown, rng), draft.levels, rng))
        image.save(staged / "images" / draft.name, quality=95, compress_level=1)  # of JPEG, of PNG
    with open(staged / "data.csv", "w", newline="", encoding="utf-8") as file:
        rows = ([getattr(draft, column) for column in CSV_COLUMNS] for draft in drafts)
        csv.writer(file, lineterminator="\n").writerows([CSV_COLUMNS, *rows])
