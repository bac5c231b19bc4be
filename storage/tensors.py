"""Tensors and a JSON value in one safetensors file, with a digest of both. No pickle anywhere.

Equal contents make equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.atomic import atomic_write
from storage.json_files import MOST_JSON, parse_json
from storage.messages import quoted
from storage.plain_files import check_plain_file


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, whose values stay unread.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: its header is damaged; the message does not name the file.
    """
    check_plain_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_JSON, path.stat().st_size - 8):
            raise ValueError(f"no safetensors file: its header claims {length} bytes")
        entries = parse_json(file.read(length))
    entries.pop("__metadata__", None)
    return {name: shape_of(name, entry) for name, entry in entries.items()}


def shape_of(name: str, entry: Any) -> tuple[int, ...]:
    """The shape that the header of a safetensors file gives a tensor. Raises ValueError."""
    shape = entry.get("shape") if isinstance(entry, Mapping) else None
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"no safetensors file: {quoted(name)} has no shape")
    return tuple(shape)


def digest_of(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """SHA-256 over names, types, shapes and values of plain tensors on the CPU, and over texts."""
    digest = hashlib.sha256("\0".join(texts).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\0{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Any) -> None:
    """Write tensors and a JSON value as one safetensors file that carries a digest of both. Raises NotWritten."""
    # safetensors refuses shared memory, and a view would drag its whole base along: copy to plain tensors.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(note)
    # One entry, because safetensors writes several in an order that changes from process to process.
    metadata = {"checked": json.dumps({"note": text, "sha256": digest_of(plain, text)})}

    def fill(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    atomic_write(path, fill)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what `write_tensors` wrote, which may be replaced meanwhile.

    Raises:
        OSError, ValueError, SafetensorError, RecursionError: it is missing, or not as it was written.
    """
    while True:
        status = path.stat()
        try:
            return read_tensors_once(path)
        except (OSError, ValueError, RuntimeError, SafetensorError):
            after = path.stat()  # safetensors opens the file twice: the second time it may have been another one
            if (after.st_ino, after.st_mtime_ns) == (status.st_ino, status.st_mtime_ns):
                raise


def read_tensors_once(path: Path) -> tuple[dict[str, Tensor], Any]:
    """As `read_tensors`, but of a file that is not replaced meanwhile."""
    with safe_open(path, framework="pt") as file:
        text, digest = metadata_of(file, path)
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    if digest_of(tensors, text) != digest:
        raise ValueError(f"{path.name} is not as it was written: its checksum does not match")
    return tensors, json.loads(text)


def read_note(path: Path) -> Any:
    """The JSON value beside the tensors of a file, which stay unread and unchecked. Raises as `read_tensors` does."""
    weight_shapes(path)  # a stricter reader of headers than the next
    with safe_open(path, framework="pt") as file:
        return json.loads(metadata_of(file, path)[0])


def metadata_of(file: Any, path: Path) -> tuple[str, str]:
    """The JSON text that `write_tensors` put beside the tensors, and the digest of all. Raises ValueError."""
    metadata = file.metadata() or {}
    checked = json.loads(metadata["checked"]) if "checked" in metadata else metadata  # older files have two entries
    if not isinstance(checked, dict) or not isinstance(text := checked.get("note", ""), str) or "sha256" not in checked:
        raise ValueError(f"{path.name} carries no checksum: this program did not write it")
    return text, checked["sha256"]


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Nested dicts, lists, numbers, texts, tensors and arrays as a JSON value; tensors go to `tensors` under names."""
    if isinstance(value, Tensor | np.ndarray):
        tensors[name] = torch.as_tensor(value)
        return {"array" if isinstance(value, np.ndarray) else "tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [pack(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
    assert value is None or isinstance(value, str | int | float), type(value)
    return value


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given; tuples are lists now. Raises LookupError, TypeError, ValueError for anything else."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    return tensors[content].numpy() if kind == "array" else tensors[content]
