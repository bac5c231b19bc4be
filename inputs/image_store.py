"""Decoded images of a data set, each decoded once and kept in memory or in a file, as far as they fit."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from inputs.decoding import as_tensor, decode, reduction
from storage.image_files import ImageFile, read_file
from storage.messages import first_five


class Unreadable(OSError):
    """Images that were checked and can no longer be used."""

    def __init__(self, reasons: Mapping[int, str], paths: Sequence[Path]) -> None:
        """`reasons`: row -> what is wrong; `paths`: of these rows."""
        found = [f"{path} ({reason})" for path, reason in zip(paths, reasons.values(), strict=True)]
        super().__init__(f"{len(found)} image(s) can no longer be read: {first_five(found)}")
        self.reasons = dict(reasons)


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
