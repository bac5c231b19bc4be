"""Regions of images, as files of bottom-up attention features have them: read one image at a time, never all at once.

Shapes: K regions of an image, F numbers that describe one. Boxes are x1, y1, x2, y2 as shares of width and height.
"""

from __future__ import annotations

import base64
import binascii
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from regions.pickles import read_plain_pickle
from storage.json_files import read_json, schema_mismatch
from storage.messages import first_five, one_line, quoted
from storage.plain_files import check_plain_file
from vqa.questions import plain_id

MARGIN = 0.02  # of a side by which a box may stick out of its image; it is cut there
MOST_INFO = 2**28  # bytes of GQA's info file; the original has 1.6e7
NARROW, WIDE = 6, 10  # columns of a TSV file
NPZ_ARRAYS = (("features", "x"), ("boxes", "bbox"))  # names that either goes by
NPZ_SIZES = (("width", "height"), ("image_w", "image_h"))


class Regions(NamedTuple):
    """What is known of one image."""

    features: NDArray[np.float32]  # (K, F)
    boxes: NDArray[np.float32]  # (K, 4)


class RegionFiles(Protocol):
    """Regions of many images, in files."""

    @property
    def width(self) -> int:
        """F."""

    @property
    def ids(self) -> Collection[str]:
        """The images there are."""

    def count(self, image: str) -> int:
        """About how many regions an image has; 0 where only reading them tells. Raises KeyError if it is not there."""

    def read(self, image: str) -> Regions:
        """The regions of one image. Raises KeyError if it is not there, ValueError if it is damaged; one line."""


def checked(where: str, features: Any, boxes: Any) -> Regions:
    """Regions whose numbers are finite and whose boxes lie in the image. Raises ValueError."""
    found = Regions(np.asarray(features, dtype=np.float32), np.asarray(boxes, dtype=np.float32))
    if found.features.ndim != 2 or found.boxes.shape != (len(found.features), 4):
        shapes = (
            f"{'x'.join(map(str, found.features.shape))} features and {'x'.join(map(str, found.boxes.shape))} boxes"
        )
        raise ValueError(f"{where}: {shapes} do not go together")
    if not (np.isfinite(found.features).all() and np.isfinite(found.boxes).all()):
        raise ValueError(f"{where}: holds numbers that are not finite")
    is_turned = (found.boxes[:, 2:] < found.boxes[:, :2]).any()
    if is_turned or found.boxes.min(initial=0) < -MARGIN or found.boxes.max(initial=0) > 1 + MARGIN:
        raise ValueError(f"{where}: has boxes outside of the image; are they x1, y1, x2, y2 in pixels of its size?")
    return found._replace(boxes=found.boxes.clip(0, 1))


def open_h5(path: Path, *names: str) -> h5py.File:
    """An HDF5 file that has these data sets. Raises ValueError."""
    try:
        file = h5py.File(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as HDF5 ({one_line(error)}); was the download cut short?") from None
    if absent := [name for name in names if not isinstance(file.get(name), h5py.Dataset)]:
        raise ValueError(f"{path}: has no data set {absent[0]!r}; it has {first_five(list(file))}")
    return file


class GqaObjects:
    """GQA's own features: gqa_objects_0.h5 to _15.h5, and gqa_objects_info.json, which says where each image is."""

    INFO = "gqa_objects_info.json"
    SHAPE: Mapping[str, type] = {"file": int, "idx": int, "objectsNum": int, "width": int, "height": int}

    def __init__(self, folder: Path) -> None:
        """Raises ValueError, in one line, for what is missing or damaged."""
        self.folder = folder
        info = folder / self.INFO
        try:
            self.info = read_json(info, MOST_INFO)
        except FileNotFoundError:
            raise ValueError(f"{info}: there is no such file; it comes with the features of GQA") from None
        for name, entry in self.info.items():
            if schema_mismatch(entry, self.SHAPE):
                raise ValueError(f"{info}: image {quoted(name)} lacks one of {', '.join(self.SHAPE)}")
        self.files: dict[int, tuple[h5py.Dataset, h5py.Dataset]] = {}
        self.width = int(self.file(next(iter(self.info.values()))["file"])[0].shape[2]) if self.info else 0

    @property
    def ids(self) -> Collection[str]:
        """The images there are."""
        return self.info.keys()

    def file(self, number: int) -> tuple[h5py.Dataset, h5py.Dataset]:
        """Features and boxes of one of the files, opened once."""
        if number not in self.files:
            file = open_h5(self.folder / f"gqa_objects_{number}.h5", "features", "bboxes")
            self.files[number] = file["features"], file["bboxes"]
        return self.files[number]

    def count(self, image: str) -> int:
        """See `RegionFiles`."""
        return self.info[image]["objectsNum"]

    def read(self, image: str) -> Regions:
        """See `RegionFiles`."""
        entry = self.info[image]
        (features, boxes), count = self.file(entry["file"]), entry["objectsNum"]
        where = f"{features.file.filename}: image {quoted(image)}"
        if not (0 <= entry["idx"] < len(features) and 0 <= count <= features.shape[1]):
            raise ValueError(f"{where}: is not where {self.INFO} says")
        size = np.array([entry["width"], entry["height"]] * 2, dtype=np.float32)
        return checked(where, features[entry["idx"], :count], boxes[entry["idx"], :count] / size)


class StackedRegions:
    """All regions of all images one after another, in one HDF5 file, and a pickle that says which image comes when."""

    def __init__(self, path: Path, index: Path) -> None:
        """Raises ValueError, in one line, for what is missing or damaged."""
        self.file = open_h5(path, "image_features", "spatial_features", "pos_boxes")
        found = read_plain_pickle(index)
        if not isinstance(found, dict) or not all(isinstance(place, int) for place in found.values()):
            raise ValueError(f"{index}: is no dict of images and their places")
        self.places = {plain_id(str(name)): place for name, place in found.items()}
        self.starts = self.file["pos_boxes"][:]
        if len(self.starts) <= max(self.places.values(), default=-1):
            raise ValueError(f"{index}: has places beyond the {len(self.starts):,} images of {path.name}")
        self.features, self.boxes = self.file["image_features"], self.file["spatial_features"]
        self.width = int(self.features.shape[1])

    def count(self, image: str) -> int:
        """See `RegionFiles`."""
        start, end = self.starts[self.places[image]]
        return int(end - start)

    @property
    def ids(self) -> Collection[str]:
        """The images there are."""
        return self.places.keys()

    def read(self, image: str) -> Regions:
        """See `RegionFiles`."""
        start, end = (int(place) for place in self.starts[self.places[image]])
        boxes = self.boxes[start:end, :4]  # already as shares; width and height follow
        return checked(f"{self.file.filename}: image {quoted(image)}", self.features[start:end], boxes)


@dataclass(frozen=True)
class Line:
    """Where the regions of an image stand in a TSV file."""

    start: int
    length: int
    count: int  # of regions; 0 if that cannot be read


class TsvRegions:
    """A line for each image, boxes and features as base64 of float32: the 36-box TSV in both of its widths.

    The narrow one has image_id, image_w, image_h, num_boxes, boxes, features; the wide one img_id, img_h, img_w, four
    columns on objects and attributes, num_boxes, boxes, features.
    """

    def __init__(self, path: Path) -> None:
        """Go through the file once to learn where each image is. Raises ValueError, in one line."""
        self.path = path
        try:
            check_plain_file(path)
            self.file = path.open("rb")
            self.lines = dict(self.index())
        except FileNotFoundError:
            raise ValueError(f"{path}: there is no such file") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None
        if not self.lines:
            raise ValueError(f"{path}: has no lines")
        self.width = self.read(next(iter(self.lines))).features.shape[1]

    def index(self) -> Iterable[tuple[str, Line]]:
        """Each image and its line."""
        start = 0
        for line in self.file:
            if line.strip():
                name, *rest = line.split(b"\t")
                said = rest[-3] if len(rest) > 2 else b""
                count = int(said) if said.isdigit() and len(said) < 6 else 0
                yield plain_id(name.decode("utf-8", "replace")), Line(start, len(line), count)
            start += len(line)

    @property
    def ids(self) -> Collection[str]:
        """The images there are."""
        return self.lines.keys()

    def count(self, image: str) -> int:
        """See `RegionFiles`."""
        return self.lines[image].count

    def read(self, image: str) -> Regions:
        """See `RegionFiles`."""
        line = self.lines[image]
        self.file.seek(line.start)
        fields = self.file.read(line.length).rstrip(b"\r\n").split(b"\t")
        where = f"{self.path}: image {quoted(image)}"
        if len(fields) not in (NARROW, WIDE):
            raise ValueError(f"{where}: has {len(fields)} columns, not {NARROW} or {WIDE}")
        size = fields[1:3] if len(fields) == NARROW else fields[2:0:-1]
        try:
            width, height, count = int(size[0]), int(size[1]), int(fields[-3])
            boxes, features = (np.frombuffer(base64.b64decode(field, validate=True), "<f4") for field in fields[-2:])
            boxes, features = boxes.reshape(count, 4), features.reshape(count, -1)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{where}: is damaged ({one_line(error)}); was the download cut short?") from None
        return checked(where, features, boxes / np.array([width, height] * 2, dtype=np.float32))


class NpzRegions:
    """A folder with an .npz file for each image: `features` (or `x`), `boxes` (or `bbox`) and the image's size."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError, in one line, if there is none."""
        self.paths = {plain_id(path.name): path for path in sorted(folder.glob("*.npz"))}
        if not self.paths:
            raise ValueError(f"{folder}: holds no .npz files")
        self.width = self.read(next(iter(self.paths))).features.shape[1]

    @property
    def ids(self) -> Collection[str]:
        """The images there are."""
        return self.paths.keys()

    def count(self, image: str) -> int:
        """See `RegionFiles`."""
        return 0

    def read(self, image: str) -> Regions:
        """See `RegionFiles`."""
        path = self.paths[image]
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays = {key: found[key] for key in found.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None
        features, boxes = (first_of(path, arrays, names) for names in NPZ_ARRAYS)
        size = next(([arrays[key] for key in keys] for keys in NPZ_SIZES if set(keys) <= set(arrays)), [1, 1])
        return checked(str(path), features, boxes / np.array([*size, *size], dtype=np.float32))


def first_of(path: Path, arrays: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The array that goes by one of some names. Raises ValueError."""
    for name in names:
        if name in arrays:
            return arrays[name]
    raise ValueError(f"{path}: has no array {names[0]!r}; it has {first_five(list(arrays))}")


def open_features(path: Path, unpack: Callable[[Path], Path]) -> RegionFiles:
    """The reader of a file or folder, told by what is there.

    Args:
        unpack: takes a zipped file, whose one TSV it unpacks where it can stay, and gives that.

    Raises:
        ValueError: it is none of the known kinds; one line that says which there are.
    """
    if path.is_dir():
        if (path / GqaObjects.INFO).exists():
            return GqaObjects(path)
        if next(path.glob("*.npz"), None):
            return NpzRegions(path)
    elif path.suffix in (".hdf5", ".h5"):
        index = [path.with_name(name) for name in (f"{path.stem}_imgid2idx.pkl", "imgid2idx.pkl")]
        return StackedRegions(path, next((each for each in index if each.exists()), index[0]))
    elif path.suffix == ".tsv":
        return TsvRegions(path)
    elif path.suffix == ".zip":
        return TsvRegions(unpack(path))
    elif not path.exists():
        raise ValueError(f"--features {path}: there is no such file or folder")
    raise ValueError(
        f"--features {path}: is no folder with {GqaObjects.INFO} or .npz files, and no .hdf5, .tsv or zipped .tsv file"
    )
