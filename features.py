"""Exact caches of what frozen layers compute, shared by runs.

A cache folder holds one folder for each recipe: everything that the values depend on but for the single input
(weights, layer, transform, precision, code). In it lie segments, safetensors files with values and the keys of their
rows; a key is a hash of the single input. A segment appears whole or not at all and is never changed, so runs may
share a folder: at worst they compute the same rows twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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

    def open(self, recipe: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype) -> FeatureSet:
        """The rows of a recipe, each of the given shape and type; opening it marks it as used."""
        recipe = {**recipe, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        text = json.dumps(recipe, indent=1, sort_keys=True)
        folder = self.folder / key_of(text)[:32]
        if folder not in self.opened:
            self.opened[folder] = FeatureSet(folder, text, tuple(shape), dtype)
        return self.opened[folder]

    def make_room(self, num_bytes: float) -> bool:
        """Whether so many bytes more fit, removing the longest unused recipes of other runs where that helps."""
        sizes = {folder: size_of(folder) for folder in self.folder.glob("*/") if folder.is_dir()}
        own = sum(size for folder, size in sizes.items() if folder in self.opened)
        free = shutil.disk_usage(nearest_existing(self.folder)).free + sum(sizes.values()) - own
        if own + num_bytes > self.max_bytes or num_bytes > free - RESERVED_BYTES:
            return False
        others = sorted((last_use(folder), folder) for folder in sizes if folder not in self.opened)
        for _, folder in others:
            on_disk = shutil.disk_usage(self.folder).free
            if sum(sizes.values()) + num_bytes <= self.max_bytes and num_bytes <= on_disk - RESERVED_BYTES:
                break
            shutil.rmtree(folder, ignore_errors=True)  # a run that has its files open keeps them
            del sizes[folder]
        return True


class FeatureSet:
    """The cached rows of one recipe, on disk and memory-mapped."""

    def __init__(self, folder: Path, recipe: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder = folder
        self.recipe = recipe
        self.shape = shape
        self.dtype = dtype
        self.places: dict[str, tuple[Tensor, int]] = {}  # key -> a segment's values, and the row in it
        self.read: set[str] = set()  # names of the segments that `places` knows
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
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self.read:
                continue
            self.read.add(path.name)
            try:
                with safe_open(path, framework="pt") as file:
                    digests, values = file.get_tensor("keys"), file.get_tensor("values")  # maps, does not read
            except FileNotFoundError:
                continue  # another run has just made room
            except PermissionError as error:
                print(f"note      {path}: not used ({error})")
                continue
            except (SafetensorError, OSError) as error:
                print(f"note      {path}: damaged, not used ({error}); delete it")
                continue
            for row, digest in enumerate(digests.numpy()):
                self.places[digest.tobytes().hex()] = (values, row)

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
        name = uuid.uuid4().hex
        temporary = self.folder / f".{name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / RECIPE_FILE).write_text(self.recipe, encoding="utf-8")
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask says; safetensors would let only the owner read
            save_file(tensors, temporary)
            temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"--cache_dir {self.folder}: cannot be written ({error}); choose another folder or --no_cache"
            ) from error
        finally:
            with suppress(OSError):  # it is there only if something went wrong, which has been said
                temporary.unlink()
        self.pending.clear()
        self.refresh()

    def stack(self, keys: Sequence[str]) -> Tensor:
        """The rows of these keys, (n, *shape)."""
        out = torch.empty((len(keys), *self.shape), dtype=self.dtype)
        for target, key in zip(out, keys, strict=True):
            values, row = self.places[key]
            target.copy_(values[row])
        return out


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
