"""Files to Pillow images, whatever lies there: the one place where image files are read and opened.

Only regular files are read, up to MAX_BYTES, and only by Pillow's readers of FORMATS. The content decides what it is,
not the name. Whatever is wrong with an image is an OSError that says so in a few words; its name is in it only where
`opened` was given a path.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from storage.messages import first_five

Source = str | Path | bytes | Image.Image  # a file, the content of one, or an image in memory

# Of Pillow's readers, those of pixels alone: others, such as EPS, start programs, or open further files.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # that names of images usually have
MAX_BYTES = 256 << 20  # of a file
LARGE = 50_000_000  # pixels, above which images are decoded one at a time: many threads of them would fill the memory
NOT_REGULAR = "no regular file"
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
WIDE = {"I": "32-bit integer", "F": "floating-point"}  # pixels of more than 16 bits, whose mode tells no range
RANGE = "range of values"  # key of an opened image's `info`: lowest and highest
# TIFF tags: bits of a value, how they become grey, lowest and highest value (of any kind, of whole numbers)
BITS, GREY, LOWEST, HIGHEST = 258, 262, (340, 280), (341, 281)
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
        raise OSError(NOT_REGULAR if error.errno in (errno.ELOOP, errno.ENXIO) else short_reason(error)) from error
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
            image = open_content(content)
        with image, one_large if image.width * image.height > LARGE else nullcontext():
            if image.mode.startswith(tuple(WIDE)):
                image.info[RANGE] = value_range(source if isinstance(source, Image.Image) else image)
            yield image
    except Exception as error:  # on damaged content Pillow's readers raise almost anything
        name = f"{source}: " if isinstance(source, str | Path) else ""
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else short_reason(error)
        raise OSError(name + reason) from error


def open_content(content: bytes) -> Image.Image:
    """An image whose header has been read. Raises OSError for HEIC, and whatever Pillow raises."""
    try:
        return Image.open(BytesIO(content), formats=formats())
    except UnidentifiedImageError:
        size = int.from_bytes(content[:4], "big")
        brands = {content[place : place + 4] for place in (8, *range(16, min(size, 256), 4))}
        if content[4:8] == b"ftyp" and brands & HEIC_BRANDS:
            raise OSError("HEIC, which is not read; save it as JPEG or PNG, as the package pillow-heif can") from None
        raise


def value_range(image: Image.Image) -> tuple[float, float]:
    """The values of black and white in an image of more than 8 bits.

    Raises:
        OSError: nothing tells them.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode not in WIDE:  # 16 bits, or the 12 of a scanner
        found = 0.0, 2.0 ** min(tags.get(BITS, (16,))) - 1
    elif image.format in ("PPM", "PNG") and image.mode == "I":  # whose reader scales to 16 bits
        found = 0.0, 65535.0
    else:
        low, high = (next((tags[tag] for tag in pair if tag in tags), None) for pair in (LOWEST, HIGHEST))
        low, high = (np.ravel(0 if value is None else value)[0] for value in (low, high))
        found = float(low), float(high)
        if not (np.isfinite(found).all() and found[0] < found[1]):
            kind = "signed 16-bit" if tags.get(BITS) == (16,) else WIDE[image.mode]
            raise OSError(f"{kind} pixels have no known range; save it with 8 or 16 bits")
    return found[::-1] if tags.get(GREY) == 0 else found


def short_reason(error: Exception) -> str:
    """What is wrong, in one line without the file's name."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def to_rgb(source: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of an opened image: EXIF rotation applied, transparency on white, more bits scaled down."""
    image = ImageOps.exif_transpose(source)
    if image.mode.startswith(tuple(WIDE)):  # which Pillow would clip to white rather than scale
        black, white = image.info[RANGE]
        unit = (np.asarray(image, dtype=np.float32) - min(black, white)) / abs(white - black)
        grey = np.floor(np.nan_to_num(unit).clip(0, 1) * 255.999).astype(np.uint8)
        return Image.fromarray(grey if black < white else 255 - grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageFile:
    """A checked image file."""

    path: Path
    digest: str  # SHA-256 of its content
    size: tuple[int, int]  # as stored: width and height, before any EXIF rotation


def try_images(paths: Sequence[Path], *, num_threads: int = 8) -> list[ImageFile | str]:
    """Read every image once: the checked file of each, or what is wrong with it.

    JPEGs are decoded at an eighth of their size: that still reads the file to its end, so a truncated one shows.
    """

    def check(path: Path) -> ImageFile | str:
        try:
            content = read_file(path)
            with opened(content) as image:
                size = image.size
                image.draft("RGB", (1, 1))
                image.load()
            return ImageFile(path, hashlib.sha256(content).hexdigest(), size)
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        return list(pool.map(check, paths, chunksize=8))


def check_images(paths: Sequence[Path], *, num_threads: int = 8) -> list[ImageFile]:
    """Read every image once, see `try_images`.

    Raises:
        ValueError: some cannot be read; all are counted, the first five named.
    """
    results = try_images(paths, num_threads=num_threads)
    refuse_broken(paths, results)
    return [file for file in results if isinstance(file, ImageFile)]


def refuse_broken(paths: Sequence[Path], results: Sequence[ImageFile | str]) -> None:
    """Raise ValueError if any image of `try_images` cannot be read; all are counted, the first five named."""
    broken = [f"{path.name} ({item})" for path, item in zip(paths, results, strict=True) if isinstance(item, str)]
    if broken:
        raise ValueError(f"{len(broken)} of {len(paths)} images cannot be read: {first_five(broken)}")


def is_missing(path: Path) -> bool:
    """Whether nothing is there; what is there but no image is told when it is read."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character in the name
        return True
    except OSError:
        return False
    return False


def leaves_folder(paths: Sequence[Path], *homes: Path) -> list[bool]:
    """For each path whether links lead it out of all of these folders, which may be links themselves."""
    roots = tuple(os.path.join(os.path.realpath(home), "") for home in homes)  # with a slash at the end
    real = {folder: os.path.realpath(folder) for folder in {path.parent for path in paths}}  # few, so files cost a look

    def leaves(path: Path) -> bool:
        place = os.path.realpath(path) if os.path.islink(path) else os.path.join(real[path.parent], path.name)
        return not f"{place}/".startswith(roots)  # the folder itself is within

    return [leaves(path) for path in paths]
