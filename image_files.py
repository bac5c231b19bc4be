"""Files to Pillow images, whatever lies there: the one place where image files are read and opened.

Only regular files are read, up to MAX_BYTES, and only by Pillow's readers of FORMATS. The content decides what it is,
not the name. Whatever is wrong with an image is an OSError that says so in a few words; its name is in it only where
`opened` was given a path.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Source = str | Path | bytes | Image.Image  # a file, the content of one, or an image in memory

# Of Pillow's readers, those of pixels alone: others, such as EPS, start programs, or open further files.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_BYTES = 256 << 20  # of a file
LARGE = 50_000_000  # pixels, above which images are decoded one at a time: many threads of them would fill the memory
NOT_REGULAR = "no regular file"
one_large = threading.Lock()


def read_file(path: str | Path) -> bytes:
    """The content of a regular file. A pipe that nobody writes to does not make it wait.

    Raises:
        OSError: there is none, it may not be read, is something else (a folder, a pipe, a socket, a device, links in
            a circle), or is larger than MAX_BYTES.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        # ENXIO: a socket, or a device that is not there
        raise OSError(NOT_REGULAR if error.errno in (errno.ELOOP, errno.ENXIO) else words(error)) from error
    except ValueError as error:  # a name with a null character
        raise OSError(str(error)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(NOT_REGULAR)
        if status.st_size > MAX_BYTES:
            raise OSError(f"{status.st_size} bytes, more than {MAX_BYTES}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_BYTES)  # a file that grows while it is read does not take more memory
    finally:
        os.close(descriptor)


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """An image whose header has been read; its pixels are decoded in the block.

    Raises:
        OSError: it cannot be read, or the block fails on it: not an image, cut off, more pixels than Pillow decodes
            (refused by the header), or a pixel format without a known range.
    """
    try:
        if isinstance(source, Image.Image):
            image = source.copy()
        else:
            content = source if isinstance(source, bytes) else read_file(source)
            image = Image.open(BytesIO(content), formats=formats())
        with image, one_large if image.width * image.height > LARGE else nullcontext():
            if image.mode == "F":
                raise OSError("floating-point pixels have no known range; save it with 8 bits")
            yield image
    except Exception as error:  # on damaged content Pillow's readers raise almost anything
        name = f"{source}: " if isinstance(source, str | Path) else ""
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else words(error)
        raise OSError(name + reason) from error


def words(error: Exception) -> str:
    """What is wrong, in one line without the file's name."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def to_rgb(source: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of an opened image: EXIF rotation applied, transparency on white, 16-bit scaled down."""
    image = ImageOps.exif_transpose(source)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white rather than scale
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
