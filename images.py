"""Images: files in, pixels on the device out. Each file is decoded once and cropped where the model runs.

A decoded image is a (3, H, W) uint8 tensor. Two kinds of views are taken of it, S pixels per side: the evaluation
view (short side to S, centre crop, as in CLIP), and numbered training views (random crop and flip), which depend on
the image's content, the number of the view and the seed, and on nothing else. Since resizing hides what quality is
about, a view may also consist of several: crops of native size, with or without the resized one in front.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from image_files import Source, opened, read_file, to_rgb

LONGEST_ITEM = 300  # characters of a name in a message
MAX_REDUCTION = 8  # what JPEG decoders offer: a half, a quarter, an eighth of the size
# Where an image is so large that a half of it still has three times the pixels per side that the model sees, it is
# decoded at that half: Pillow's documentation calls the difference after resizing indistinguishable from 3 on.
REDUCING_GAP = 3
BICUBIC = v2.InterpolationMode.BICUBIC


@dataclass(frozen=True)
class ImageFile:
    """A checked image file."""

    path: Path
    digest: str  # SHA-256 of its content
    size: tuple[int, int]  # as stored: width and height, before any EXIF rotation


def first_five(items: Sequence[object]) -> str:
    """The first five of a list in a line, very long ones cut, and that there are more."""
    texts = [str(item).replace("\n", "\\n") for item in items[:5]]
    return ", ".join(text if len(text) <= LONGEST_ITEM else f"{text[:LONGEST_ITEM]}…" for text in texts) + (
        ", ..." if len(items) > 5 else ""
    )


class Unreadable(OSError):
    """Images that were checked and can no longer be used."""

    def __init__(self, reasons: Mapping[int, str], paths: Sequence[Path]) -> None:
        """`reasons`: row -> what is wrong; `paths`: of these rows."""
        found = [f"{path} ({reason})" for path, reason in zip(paths, reasons.values(), strict=True)]
        super().__init__(f"{len(found)} image(s) can no longer be read: {first_five(found)}")
        self.reasons = dict(reasons)


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


def leave_folder(paths: Sequence[Path], *homes: Path) -> list[bool]:
    """For each path whether links lead it out of all of these folders, which may be links themselves."""
    roots = tuple(os.path.join(os.path.realpath(home), "") for home in homes)  # with a slash at the end
    real = {folder: os.path.realpath(folder) for folder in {path.parent for path in paths}}  # few, so files cost a look

    def leaves(path: Path) -> bool:
        place = os.path.realpath(path) if os.path.islink(path) else os.path.join(real[path.parent], path.name)
        return not f"{place}/".startswith(roots)  # the folder itself is within

    return [leaves(path) for path in paths]


def reduction(size: tuple[int, int], image_size: int | None) -> int:
    """1, 2, 4 or 8: at which fraction an image of this width and height is decoded for views of `image_size`.

    None stands for views of native size: everything is decoded whole.
    """
    factor = 1
    while image_size and 2 * factor <= MAX_REDUCTION and min(size) >= 2 * factor * REDUCING_GAP * image_size:
        factor *= 2
    return factor


def load_image(source: Source, image_size: int | None = None) -> Image.Image:
    """Any image as upright 8-bit RGB, see `image_files.to_rgb`.

    Args:
        image_size: what views will be taken at; a far larger image is reduced, see `reduction`. None never does.

    Raises:
        OSError: it cannot be read, see `image_files.opened`.
    """
    with opened(source) as image:
        factor = reduction(image.size, image_size)
        reduced = tuple(math.ceil(side / factor) for side in image.size)
        if factor > 1:  # a JPEG decoder can skip detail; other formats ignore it
            width, height = image.size
            image.draft(None, (width // factor, height // factor))  # rounded up, it would choose a larger fraction
        upright = to_rgb(image)
    done = sorted(upright.size) == sorted(reduced)  # a rotation may have swapped the sides
    return upright if done else upright.reduce(factor)


class ImageStore:
    """Decoded images of a list of files, each decoded when first asked for and then kept, as far as they fit.

    They are kept in memory if all together take at most `max_memory` bytes, else in a file without a name in
    `spill_dir` if they take at most `max_file` bytes, else not at all: then they are decoded whenever asked for.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        *,
        image_size: int | None,
        num_threads: int,
        max_memory: float = 0,
        max_file: float = 0,
        spill_dir: Path | None = None,
    ) -> None:
        """`image_size`: see `reduction`."""
        self.files = list(files)
        self.image_size = image_size
        self.pool = ThreadPoolExecutor(max(1, num_threads))
        areas = [math.ceil(w / f) * math.ceil(h / f) for w, h in self.sizes() for f in [reduction((w, h), image_size)]]
        self.offsets = np.cumsum([0, *(3 * area for area in areas)])
        self.shapes: list[tuple[int, ...] | None] = [None] * len(files)
        self.pixels: np.ndarray | None = None
        self.place = "decoded whenever needed"
        total = int(self.offsets[-1])
        if total <= max_memory:
            self.pixels = np.empty(total, np.uint8)  # takes memory only where it is written
            self.place = "kept in memory"
        elif total <= max_file and spill_dir is not None:
            self.pixels = file_without_name(spill_dir, total)
            self.place = f"kept in a file in {spill_dir}" if self.pixels is not None else self.place

    def sizes(self) -> list[tuple[int, int]]:
        """Stored width and height of every file."""
        return [file.size for file in self.files]

    @property
    def num_reduced(self) -> int:
        """How many images are decoded at a fraction of their size."""
        return sum(reduction(size, self.image_size) > 1 for size in self.sizes())

    def describe(self) -> str:
        """What happens to the decoded images, in words."""
        reduced = f", {self.num_reduced} at a fraction of their size" if self.num_reduced else ""
        return f"{self.offsets[-1] / 1e9:.2f} GB decoded, {self.place}{reduced}"

    def load(self, rows: Sequence[int] | np.ndarray, *, keep: bool = True) -> list[Tensor]:
        """Decoded images: a (3, H, W) uint8 tensor for each row.

        Args:
            keep: False for images that will hardly be asked for again.

        Raises:
            Unreadable: files can no longer be read or have changed; tells which rows.
        """

        def attempt(row: int) -> Tensor | OSError:
            try:
                return self.load_one(row, keep=keep)
            except OSError as error:
                return error

        found = list(self.pool.map(attempt, map(int, rows)))
        reasons = {int(row): str(item) for row, item in zip(rows, found, strict=True) if isinstance(item, OSError)}
        if reasons:
            raise Unreadable(reasons, [self.files[row].path for row in reasons])
        return [item for item in found if isinstance(item, Tensor)]

    def load_one(self, row: int, *, keep: bool = True) -> Tensor:
        """As `load`, one row; the OSError does not name it."""
        shape = self.shapes[row]
        if self.pixels is not None and shape is not None:
            start, stop = self.offsets[row : row + 2]
            return as_tensor(self.pixels[start:stop].reshape(shape))
        decoded = decode(self.read(row), self.image_size)
        if self.pixels is not None and keep:
            start, stop = self.offsets[row : row + 2]
            self.pixels[start:stop] = decoded.reshape(-1)
            self.shapes[row] = decoded.shape  # last: another thread may look
        return as_tensor(decoded)

    def read(self, row: int) -> bytes:
        """The content of a file, which is the one that was checked. Raises OSError, without the name."""
        content = read_file(self.files[row].path)
        if hashlib.sha256(content).hexdigest() != self.files[row].digest:
            raise OSError("has changed since it was checked")
        return content


def file_without_name(folder: Path, size: int) -> np.ndarray | None:
    """`size` bytes of a file that vanishes with the process; None where the disk has not so much."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # Taken now: a disk that fills up later would end the process without a word.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            return None
        return np.memmap(file, np.uint8, "r+", shape=(size,))


def decode(source: Source, image_size: int | None) -> np.ndarray:
    """(H, W, 3) uint8 pixels of an image for views of `image_size`. Raises OSError."""
    return np.array(load_image(source, image_size))


def as_tensor(pixels_HW3: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 array -> (3, H, W) tensor that shares its memory."""
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1)


def crop_grid(height: int, width: int, size: int, count: int) -> list[tuple[int, int]]:
    """(top, left) of `count` crops on a grid that spans the image, the longer side with more of them.

    The grid is as near to a square as `count` allows: 4, 6, 9, 12 and 15 cover an image well, a prime is one line.
    """
    few = max(rows for rows in range(1, math.isqrt(count) + 1) if count % rows == 0)
    rows, columns = (few, count // few) if width >= height else (count // few, few)
    tops, lefts = (
        np.rint(np.linspace(0, side - size, number) if number > 1 else [(side - size) / 2]).astype(int).tolist()
        for side, number in ((height, rows), (width, columns))
    )
    return [(top, left) for top in tops for left in lefts]


def at_least(image: Tensor, size: int) -> Tensor:
    """The image, enlarged if its shorter side has fewer than `size` pixels."""
    return F.resize(image, [size], interpolation=BICUBIC) if min(image.shape[1:]) < size else image


class Views:
    """Takes views of decoded images: cropped and resized with v2's own kernels, flipped and normalised as a batch."""

    def __init__(
        self,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        crop_scale_min: float = 1.0,
        flip: bool = False,
        seed: int = 0,
        crops: int = 0,
        test_crops: int = 0,
        global_view: bool = False,
    ) -> None:
        """`crops`, `test_crops`: views of native size in place of the resized one, or with `global_view` behind it."""
        self.crops = crops
        self.test_crops = test_crops
        self.global_view = global_view or not test_crops
        self.image_size = image_size
        self.device = device
        self.flip = flip
        self.seed = seed
        self.crop = v2.RandomResizedCrop(image_size, scale=(crop_scale_min, 1.0), interpolation=BICUBIC)
        self.scale = torch.tensor(std, device=device).mul(255).reciprocal().view(1, 3, 1, 1)
        self.shift = (torch.tensor(mean, device=device) / torch.tensor(std, device=device)).view(1, 3, 1, 1)

    @property
    def decode_size(self) -> int | None:
        """At which size images are to be decoded, see `reduction`."""
        return None if self.test_crops else self.image_size

    def count(self, view: int | None) -> int:
        """How many views of an image a training view, or the evaluation view, consists of."""
        return self.global_view + (self.test_crops if view is None else self.crops)

    def draw(self, images: Sequence[Tensor], digests: Sequence[str], view: int) -> list[tuple[dict[str, int], bool]]:
        """For each image the crop of one training view, as v2 takes it, and whether to flip."""
        drawn = []
        with torch.random.fork_rng(devices=[]):
            for image, digest in zip(images, digests, strict=True):
                entropy = hashlib.sha256(f"{self.seed} {view} {digest}".encode()).digest()
                torch.default_generator.manual_seed(int.from_bytes(entropy[:8], "big"))
                drawn.append((self.crop.make_params([image]), bool(torch.rand(()) < 0.5) and self.flip))
        return drawn

    def draw_crops(self, image: Tensor, digest: str, view: int) -> list[tuple[int, int, bool]]:
        """(top, left, flip) of an image's crops of native size in a training view."""
        entropy = hashlib.sha256(f"{self.seed} {view} {digest} crops".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(entropy[:8], "big"))
        ends = [side - self.image_size for side in image.shape[1:]]
        tops, lefts = (rng.integers(0, end, self.crops, endpoint=True).tolist() for end in ends)
        flips = (rng.random(self.crops) < 0.5) & self.flip
        return list(zip(tops, lefts, flips.tolist(), strict=True))

    def __call__(self, images: Sequence[Tensor], digests: Sequence[str], view: int | None) -> Tensor:
        """Normalised views.

        Args:
            images: B decoded images, on any device.
            digests: their content hashes.
            view: number of the training view; None is the evaluation view.

        Returns:
            (B, 3, S, S) float32 on the device; (B, V, 3, S, S) where a view consists of several.
        """
        images = [image.to(self.device, non_blocking=True) for image in images]
        parts = [self.resized(images, digests, view)[:, None]] if self.global_view else []
        if self.count(view) > self.global_view:
            parts.append(self.native(images, digests, view))
        pixels = torch.cat(parts, dim=1).float().mul_(self.scale).sub_(self.shift)
        return pixels[:, 0] if pixels.shape[1] == 1 else pixels

    def resized(self, images: Sequence[Tensor], digests: Sequence[str], view: int | None) -> Tensor:
        """Whole images, or most of them, resized: (B, 3, S, S) uint8."""
        size = [self.image_size, self.image_size]
        if view is None:
            resized = (F.resize(image, size[:1], interpolation=BICUBIC) for image in images)
            return torch.stack([F.center_crop(image, size) for image in resized])
        drawn = self.draw(images, digests, view)
        crops = [
            F.resized_crop(image, **crop, size=size, interpolation=BICUBIC)
            for image, (crop, _) in zip(images, drawn, strict=True)
        ]
        flipped = torch.tensor([flip for _, flip in drawn], device=self.device)
        pixels = torch.stack(crops)
        return torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)

    def native(self, images: Sequence[Tensor], digests: Sequence[str], view: int | None) -> Tensor:
        """Crops of native size, at random places in training and on a grid otherwise: (B, V, 3, S, S) uint8."""
        size = self.image_size
        found = []
        for number, image in enumerate(images):
            image = at_least(image, size)
            if view is None:
                height, width = image.shape[1:]
                places = [(*place, False) for place in crop_grid(height, width, size, self.test_crops)]
            else:
                places = self.draw_crops(image, digests[number], view)
            crops = (image[:, top : top + size, left : left + size] for top, left, _ in places)
            flips = (flip for *_, flip in places)
            found.append(
                torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)])
            )
        return torch.stack(found)


def decode_all(sources: Sequence[Source], image_size: int | None, num_threads: int) -> list[Tensor]:
    """Decode files or Pillow images that are needed once. Raises OSError."""
    load: Callable[[Any], Tensor] = lambda source: as_tensor(decode(source, image_size))  # noqa: E731
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        return list(pool.map(load, sources))
