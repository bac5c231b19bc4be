"""What pages are made of: thumbnails, numbers, files of pictures."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pages import elements


def thumbnail_of(path: Path) -> Image.Image:
    """What the page would show of a file."""
    source = elements.thumbnail(str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_thumbnails_look_as_people_see_the_image(tmp_path):
    turned = Image.new("RGB", (320, 160), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert thumbnail_of(tmp_path / "turned.jpg").size == (80, 160)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert min(thumbnail_of(tmp_path / "clear.png").getpixel((5, 5))) > 250
    Image.fromarray(np.full((20, 20), 128 << 8, np.uint16)).save(tmp_path / "deep.png")
    assert abs(thumbnail_of(tmp_path / "deep.png").getpixel((5, 5))[0] - 128) < 4


def test_two_reports_of_one_folder_at_once_both_come_to_their_end(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    unlink = Path.unlink

    def unlink_too_late(path: Path, missing_ok: bool = False) -> None:
        path.exists() and unlink(path)  # as the other does
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_too_late)
    elements.write_pictures(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.12345, "0.123"), (-0.5, "−0.500"), (-0.0001, "0.000"), (None, "–"), (float("nan"), "–"), ("x", "–")],
)
def test_numbers_are_written_for_people(value, said):
    assert elements.number(value) == said
