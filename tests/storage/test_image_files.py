"""`storage/image_files.py`: what lies where an image should be is read or refused in a line.

No wait, no program, no bomb.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from inputs import decoding
from storage import image_files

BOMB_SIDE = 50_000
PATIENCE = 20  # seconds, after which something hangs


@pytest.fixture(scope="module")
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    return file.getvalue()


def refusal(function: Callable[[], object]) -> str:
    """The one line of the OSError that a call ends with, which it has to do within PATIENCE."""
    found: list[object] = []

    def call() -> None:
        try:
            found.append(function())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)  # one that hangs must not keep the tests from ending
    thread.start()
    thread.join(PATIENCE)
    assert found, "hangs"
    assert isinstance(found[0], OSError), "was not refused"
    assert str(found[0]) and "\n" not in str(found[0])
    return str(found[0])


def put(path: Path, what: str) -> Path:
    """Something that is no regular file."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))  # such names are short
    else:
        path.symlink_to({"circle": path, "device": Path("/dev/zero")}[what])
    return path


@pytest.mark.parametrize("what", ["pipe", "folder", "socket", "circle", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    path = put(tmp_path / "x.jpg", what)
    assert refusal(lambda: image_files.read_file(path)) == "no regular file"
    assert refusal(lambda: decoding.load_image(path)) == f"{path}: no regular file"
    assert image_files.try_images([path]) == ["no regular file"]


def test_no_file_stays_open_and_none_is_handed_to_other_programs(tmp_path, monkeypatch):
    opened = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda *args: opened.append(original(*args)) or opened[-1])
    inheritable = []
    fstat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda number: inheritable.append(os.get_inheritable(number)) or fstat(number))
    (tmp_path / "x").write_bytes(b"abc")
    assert image_files.read_file(tmp_path / "x") == b"abc"
    os.mkfifo(tmp_path / "pipe")
    refusal(lambda: image_files.read_file(tmp_path / "pipe"))
    assert len(opened) == 2 and inheritable and not any(inheritable)
    for number in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            fstat(number)


def test_names_that_lead_nowhere_or_may_not_be_read_are_told_by_the_systems_words(tmp_path, monkeypatch):
    assert refusal(lambda: image_files.read_file(tmp_path / "nowhere")) == "No such file or directory"
    assert refusal(lambda: image_files.read_file(tmp_path / ("x" * 300))) == "File name too long"
    assert "null" in refusal(lambda: image_files.read_file("a\0b"))

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)  # who runs the tests may read everything
    assert image_files.try_images([tmp_path / "secret.png"]) == ["Permission denied"]


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path):
    path = tmp_path / "x.png"
    path.touch()
    os.truncate(path, image_files.MAX_BYTES + 1)  # takes no disk
    assert (
        refusal(lambda: image_files.read_file(path))
        == f"{image_files.MAX_BYTES + 1} bytes, more than {image_files.MAX_BYTES}"
    )


@pytest.mark.parametrize("kind", image_files.FORMATS)
def test_the_content_decides_and_not_the_name(tmp_path, noise, kind):
    path = tmp_path / ("x.png" if kind == "JPEG" else "x.jpg")
    path.write_bytes(encoded(noise, kind))
    with image_files.opened(path) as image:
        assert image.size == noise.size and image.format == kind
    assert image_files.check_images([path])[0].size == noise.size


def test_formats_whose_readers_start_programs_are_no_images(tmp_path, noise, monkeypatch):
    def start(*args: object, **options: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    content = encoded(noise, "EPS")
    assert Image.open(io.BytesIO(content)).format == "EPS", "Pillow would read it"
    (tmp_path / "x.png").write_bytes(content)
    assert refusal(lambda: decoding.load_image(tmp_path / "x.png")).endswith("x.png: not an image")
    assert image_files.try_images([tmp_path / "x.png"]) == ["not an image"]


DAMAGED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")


@given(st.sampled_from(DAMAGED), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8))
def test_damaged_content_is_read_or_refused_in_a_line(noise, kind, changes):
    content = bytearray(encoded(noise, kind))
    for place, value in changes:
        content[place % len(content)] = value
    result: Image.Image | OSError
    try:
        result = decoding.load_image(bytes(content), 8)
    except OSError as error:
        result = error
    assert result.mode == "RGB" if isinstance(result, Image.Image) else str(result) and "\n" not in str(result)


def test_what_a_reader_raises_is_an_os_error_whatever_it_is(noise):
    for error in (RuntimeError("two\nlines"), MemoryError(), struct.error("cut"), KeyError(3)):
        with (
            pytest.raises(OSError, match=r"^(two lines|MemoryError|cut|3)$"),
            image_files.opened(encoded(noise, "PNG")),
        ):
            raise error


# -- bombs


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb() -> bytes:
    """A whole PNG of two colours, 1.4 MB that hold 2.5 billion pixels."""
    packer = zlib.compressobj(1)
    row = bytes(1 + BOMB_SIDE // 8)
    body = b"".join(packer.compress(row) for _ in range(BOMB_SIDE)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def claiming(kind: str, place: int, form: str) -> bytes:
    """A small image whose header claims to be larger."""
    content = bytearray(encoded(Image.new("RGB", (16, 16)), kind))
    struct.pack_into(form, content, place, BOMB_SIDE, BOMB_SIDE)
    return bytes(content)


def write_bombs(folder: Path) -> None:
    jpeg = encoded(Image.new("RGB", (16, 16)), "JPEG")
    text = zlib.compress(bytes(100 << 20), 1)
    png = encoded(Image.new("RGB", (16, 16)), "PNG")
    contents = {
        "png": png_bomb(),
        "bmp": claiming("BMP", 18, "<ii"),
        "gif": claiming("GIF", 6, "<HH"),
        "jpeg": claiming("JPEG", jpeg.index(b"\xff\xc0") + 5, ">HH"),
        "ppm": f"P6 {BOMB_SIDE} {BOMB_SIDE} 255\n".encode() + bytes(99),
        "text": png[:33] + chunk(b"zTXt", b"x\0\0" + text) + png[33:],
        "profile": png[:33] + chunk(b"iCCP", b"x\0\0" + text) + png[33:],
    }
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)


MEASURE = """
import re, sys
from pathlib import Path
from storage import image_files
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])  # of this program alone
image_files.formats()
before = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        with image_files.opened(path) as image:
            image.load()
    except OSError as error:
        print(path.stem, error, sep="|")
print(peak() - before)
"""


@pytest.mark.torture
def test_bombs_are_refused_by_their_headers_with_their_size_and_take_no_memory(tmp_path, figure):
    write_bombs(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    *lines, peak = done.stdout.splitlines()
    found = dict(line.split("|") for line in lines)
    for name in ("png", "bmp", "gif", "jpeg", "ppm"):
        assert f"{BOMB_SIDE**2} pixels" in found[name], name
    for name in ("text", "profile"):
        assert "too large" in found[name], name
    assert int(peak) < 60 * 1024, "KiB; the pixels of the first alone would take 2.5 GB"
    figure("decompression bombs", f"{len(found)} refused, peak memory +{int(peak) / 1024:.1f} MB")


def test_very_large_images_are_decoded_one_at_a_time(noise, monkeypatch):
    monkeypatch.setattr(image_files, "LARGE", 599)
    content, inside, most = encoded(noise, "PNG"), [], []
    start = threading.Barrier(4)

    def look(_: int) -> None:
        start.wait(PATIENCE)
        for _ in range(20):
            with image_files.opened(content) as image:
                inside.append(1)
                most.append(len(inside))
                image.load()
                inside.pop()

    def most_at_once() -> int:
        most.clear()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(look, range(4)))
        return max(most)

    assert most_at_once() == 1
