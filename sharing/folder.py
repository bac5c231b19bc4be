"""A folder for others: it appears when it is whole, its scripts can be tried, and a card says what it is."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2

from inputs.views import Views, grid_shape
from pages import elements
from storage.atomic import temporary_name, write_errors
from storage.image_files import FORMATS

TEMPLATES = Path(__file__).with_name("templates")
CARD = "README.md"
PIXELS = "pixels.py"  # the script by which others read images


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to be filled, which then becomes `target`; nothing is left of it if that fails. Raises NotWritten."""
    temporary = temporary_name(target)
    try:
        with write_errors(target):
            temporary.mkdir()
        yield temporary
        with write_errors(target):
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let the scripts of a folder import each other; nothing stays, for other folders have some of the same name."""
    before = sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        sys.path.remove(str(folder))
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)


def copy_scripts(folder: Path, *names: str) -> None:
    """Put scripts into a folder."""
    for name in names:
        shutil.copyfile(TEMPLATES / name, folder / name)


def pixel_settings(views: Views) -> dict[str, Any]:
    """How PIXELS is to decode an image, and what it is to take of it."""
    taken = {
        "size": views.image_size,
        "mode": views.resize_mode,
        "interpolation": views.interpolation.value,
        "whole": views.global_view,
        "crops": list(grid_shape(views.test_crops)) if views.test_crops else None,
    }
    return {"decode": {"formats": list(FORMATS), "size": views.decode_size}, "views": taken}


def rendered(template: str, **values: Any) -> str:
    """A template filled in; what came with the data is to go through `cell` there."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,  # it is no page
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = cell
    return environment.get_template(template).render(values)


def cell(value: Any) -> str:
    """A text of somebody else's in a Markdown table or line."""
    text = elements.truncate(value, 200)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def summary(folder: Path, precision: str) -> str:
    """What has been written, in a line."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{folder}: {precision}, {size / 1e6:.1f} MB; see its {CARD}"
