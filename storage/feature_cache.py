"""Exact caches of what frozen layers compute, shared by runs.

A cache folder holds one folder for each recipe: everything that the values depend on but for the single input
(weights, layer, transform, precision, code). In it lie segments, safetensors files with values and the keys of their
rows; a key is a hash of the single input. A segment appears whole or not at all and is never changed, so runs may
share a folder. Who adds to a recipe holds the lock of its folder; others that want the same wait, and add the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.atomic import atomic_write, remove_if_empty, remove_temporaries
from storage.locks import locked

SEGMENT_BYTES = 256e6  # a segment is written when so much has come together
RESERVED_BYTES = 1e9  # of the disk, always left free
RECIPE_FILE = "recipe.json"


def key_of(*parts: object) -> str:
    """A key: SHA-256 over the parts, in hexadecimal."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


class FeatureCache:
    """A cache folder of bounded size. Recipes that were not used for longest make room for new ones."""

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.opened: dict[Path, FeatureSet] = {}
        self.said: set[str] = set()

    def open(self, recipe: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype) -> FeatureSet:
        """The rows of a recipe, each of the given shape and type; opening it marks it as used."""
        recipe = {**recipe, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        text = json.dumps(recipe, indent=1, sort_keys=True)
        folder = self.folder / key_of(text)[:32]
        if folder not in self.opened:
            self.opened[folder] = FeatureSet(folder, text, tuple(shape), dtype)
        return self.opened[folder]

    @contextmanager
    def alone(self, sets: Iterable[FeatureSet]) -> Iterator[None]:
        """Keep other processes from adding to these recipes, and from removing them; waits while another does so.

        Inside, what others have added is known. Raises ValueError if a folder cannot be written.
        """
        with ExitStack() as held:
            # In one order everywhere, or two runs would wait for each other.
            for rows in sorted({rows.folder: rows for rows in sets}.values(), key=lambda rows: rows.folder):
                try:
                    is_locked = held.enter_context(
                        locked(rows.folder, wait=lambda: self.say_once("another run computes the same: waiting for it"))
                    )
                except OSError as error:
                    raise unwritable(rows.folder, error) from error
                if is_locked:
                    held.callback(remove_if_empty, rows.folder)
                    rows.tidy()
                else:
                    self.say_once(f"{self.folder}: cannot be locked: runs at the same time may compute the same twice")
                rows.refresh()
            yield

    def say_once(self, text: str) -> None:
        """Print a note, unless it was printed before."""
        if text not in self.said:
            print(f"note      {text}", flush=True)
        self.said.add(text)

    def make_room(self, num_bytes: float) -> bool:
        """Whether so many bytes more fit, removing the longest unused recipes of other runs where that helps.

        Recipes that another process is adding to stay.
        """
        sizes = {folder: size_of(folder) for folder in self.folder.glob("*/") if folder.is_dir()}

        def fits() -> bool:
            free = shutil.disk_usage(nearest_existing(self.folder)).free
            return sum(sizes.values()) + num_bytes <= self.max_bytes and num_bytes <= free - RESERVED_BYTES

        own = sum(size for folder, size in sizes.items() if folder in self.opened)
        free = shutil.disk_usage(nearest_existing(self.folder)).free + sum(sizes.values()) - own
        if own + num_bytes > self.max_bytes or num_bytes > free - RESERVED_BYTES:
            return False
        others = sorted((last_use(folder), folder) for folder in sizes if folder not in self.opened)
        for _, folder in others:
            if fits():
                break
            with suppress(OSError), locked(folder, wait=None):
                shutil.rmtree(folder, ignore_errors=True)  # a run that has its files open keeps them
                sizes[folder] = size_of(folder)
        return fits()


class FeatureSet:
    """The cached rows of one recipe, on disk and memory-mapped."""

    def __init__(self, folder: Path, recipe: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder = folder
        self.recipe = recipe
        self.shape = shape
        self.dtype = dtype
        self.places: dict[str, tuple[Tensor, int]] = {}  # key -> a segment's values, and the row in it
        self.read: set[str] = set()  # names of the segments that `places` knows
        self.damaged: list[Path] = []
        self.pending: list[tuple[Sequence[str], Tensor]] = []
        self.refresh()
        with suppress(OSError):  # it may be new, removed just now, or another user's
            os.utime(folder / RECIPE_FILE)

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def refresh(self) -> None:
        """Take notice of segments that were added, by this process or another."""
        paths: list[Path] = []
        with suppress(FileNotFoundError):  # the folder may be removed this very moment
            paths = sorted(self.folder.glob("*.safetensors"))
        for path in paths:
            if path.name in self.read:
                continue
            self.read.add(path.name)
            try:
                with safe_open(path, framework="pt") as file:
                    digests, values = file.get_tensor("keys"), file.get_tensor("values")  # maps, does not read
            except FileNotFoundError:
                continue  # another run has just made room
            except RuntimeError:  # or does so before torch, which opens the file once more
                if path.exists():
                    raise
                continue
            except OSError as error:
                print(f"note      {path}: not used ({error})")
                continue
            except SafetensorError as error:
                print(f"note      {path}: damaged, not used ({error})")
                self.damaged.append(path)
                continue
            for row, digest in enumerate(digests.numpy()):
                self.places[digest.tobytes().hex()] = (values, row)

    def tidy(self) -> None:
        """Remove damaged segments and what killed processes have left. For who holds the lock: nobody writes then."""
        remove_temporaries(self.folder)
        for path in self.damaged:
            with suppress(OSError):  # another user's, or gone already
                path.unlink()
        self.damaged.clear()

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions of the keys that have no row yet."""
        return [position for position, key in enumerate(keys) if key not in self.places]

    def add(self, keys: Sequence[str], values: Tensor) -> None:
        """Add rows; they are written in large pieces, and can be read after `flush`."""
        assert values.shape == (len(keys), *self.shape), values.shape
        self.pending.append((list(keys), values.detach().to("cpu", self.dtype)))
        if sum(len(keys) for keys, _ in self.pending) * self.row_bytes >= SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added. Raises ValueError if the folder cannot be written."""
        if not self.pending:
            return
        keys = [key for part, _ in self.pending for key in part]
        digests = torch.frombuffer(bytearray(bytes.fromhex("".join(keys))), dtype=torch.uint8).view(len(keys), 32)
        tensors = {"keys": digests, "values": torch.cat([values for _, values in self.pending])}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.folder / RECIPE_FILE, lambda path: path.write_text(self.recipe, encoding="utf-8"))
            atomic_write(self.folder / f"{uuid.uuid4().hex}.safetensors", lambda path: save_file(tensors, path))
        except (OSError, SafetensorError) as error:
            raise unwritable(self.folder, error) from error
        self.pending.clear()
        self.refresh()

    def stack(self, keys: Sequence[str]) -> Tensor:
        """The rows of these keys, (n, *shape)."""
        out = torch.empty((len(keys), *self.shape), dtype=self.dtype)
        for target, key in zip(out, keys, strict=True):
            values, row = self.places[key]
            target.copy_(values[row])
        return out


def unwritable(folder: Path, error: Exception) -> ValueError:
    """What to tell the user."""
    reason = (isinstance(error, OSError) and error.strerror) or error
    return ValueError(f"--cache_dir {folder}: cannot be written ({reason}); choose another folder")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder that another run may be changing."""
    total = 0
    with suppress(FileNotFoundError):  # the folder
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def last_use(folder: Path) -> float:
    """When a recipe was last opened."""
    try:
        return (folder / RECIPE_FILE).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
