"""What pages are made of: tables, pictures, example images, numbers as text."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from drawing import figures
from storage.atomic import atomic_write
from storage.image_files import opened, read_file, to_rgb

LONGEST_NAME = 48  # characters of a kind or an answer in a table
LONGEST_TEXT = 240  # characters of a prompt or name

TEMPLATES = Path(__file__).resolve().parent / "templates"
FIGURES_DIR = "figures"
THUMBNAIL = 160  # pixels of its longer side
NOTHING = "–"  # for a value that does not exist


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `words` columns are words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    strong: int = 0  # so many first rows are what it is about


@dataclass(frozen=True)
class Picture:
    """A figure with what is said below it. `name` is that of its file and must be unique in a page."""

    name: str
    caption: str
    figure: Figure

    @property
    def svg(self) -> str:
        """For the page; safe to insert, since figures escape every text in them."""
        return figures.to_svg(self.figure, self.name, self.caption)


@dataclass(frozen=True)
class Example:
    """An image with its scores; `source` is a data URL, or "" if the image that was scored is not there."""

    name: str
    prompt: str
    mos: float
    pred: float
    source: str


@dataclass
class Pictures:
    """The pictures of a page in the order they were drawn."""

    drawn: list[Picture] = field(default_factory=list)

    def add(self, name: str, caption: str, figure: Figure) -> Picture:
        """Take a figure. The name may hold anything: what a file name cannot hold becomes a hyphen."""
        plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)[:60]
        taken = {picture.name for picture in self.drawn}
        unique = next(n for i in range(1, len(taken) + 2) if (n := plain if i == 1 else f"{plain}-{i}") not in taken)
        self.drawn.append(Picture(unique, caption, figure))
        return self.drawn[-1]


def truncate(text: object, longest: int = LONGEST_TEXT) -> str:
    """Text without control characters, cut after so many characters."""
    plain = "".join(letter if letter >= " " and letter != "\x7f" else " " for letter in str(text))
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def number(value: object, digits: int = 3, sign: str = "") -> str:
    """A number with so many digits behind the point; a dash for what is none."""
    if not isinstance(value, int | float) or not np.isfinite(value):
        return NOTHING
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")  # + 0.0: no -0.000


def percent(share: float, sign: str = "") -> str:
    """A share in per cent."""
    return f"{number(100 * share, 1, sign)}%"


def name_of(text: str) -> str:
    """A floor, kind or answer as it is shown."""
    return truncate(text, LONGEST_NAME) or "(empty)"


def interval_text(interval: Sequence[float] | None, sign: str = "") -> str:
    """An interval in words; "" if there is none."""
    return f"{number(interval[0], sign=sign)} … {number(interval[1], sign=sign)}" if interval else ""


def value_text(value: object, longest: int = LONGEST_TEXT) -> str:
    """An option's value as JSON, a text as it is; clipped."""
    return truncate(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), longest)


def seconds_text(seconds: float) -> str:
    """A time as people say it."""
    if not np.isfinite(seconds):
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill a template and put the page in place in one step."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clip": truncate, "number": number, "between": interval_text}
    text = environment.get_template(template).render(**content)
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))


def write_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write each as PNG; pictures of an earlier report that are not drawn any more go."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink(missing_ok=True)  # another report of this folder may be at it too
    for picture in pictures:
        atomic_write(folder / f"{picture.name}.png", partial(Path.write_bytes, data=figures.to_png(picture.figure)))


def thumbnail(path: str, digest: str) -> str:
    """The image as a small JPEG in a data URL; "" if there is no such file, or its content is not what was scored."""
    try:
        content = read_file(path) if path else b""
        if not content or hashlib.sha256(content).hexdigest() != digest:
            return ""
        with opened(content) as image:
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = to_rgb(image)
    except OSError:
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
