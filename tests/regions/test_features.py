"""`regions/features.py`: the same regions out of every kind of file, and one line for what is wrong with one."""

from __future__ import annotations

import base64
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from regions.features import GqaObjects, NpzRegions, RegionFiles, StackedRegions, TsvRegions, open_features
from vqa.questions import plain_id

WIDTH, HEIGHT = 200, 100
COUNTS = {"7": 3, "12": 1, "n5": 2}


def regions(image: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (K, 4) and boxes (K, 4) in pixels."""
    draw = np.random.default_rng(len(image) + COUNTS[image])
    corners = np.sort(draw.uniform(size=(COUNTS[image], 2, 2)), axis=1).reshape(-1, 4)
    features = draw.normal(size=(COUNTS[image], 4)).astype(np.float32)
    return features, (corners * np.array([WIDTH, HEIGHT] * 2)).astype("f4")


def write_gqa(folder: Path) -> Path:
    """Two files, as the original has sixteen, with room for more regions than there are."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {}
    for number, images in enumerate((("7", "12"), ("n5",))):
        with h5py.File(folder / f"gqa_objects_{number}.h5", "w") as file:
            features, boxes = (file.create_dataset(name, (len(images), 5, 4)) for name in ("features", "bboxes"))
            for place, image in enumerate(images):
                features[place, : COUNTS[image]], boxes[place, : COUNTS[image]] = regions(image)
                entry = {"file": number, "idx": place, "objectsNum": COUNTS[image], "width": WIDTH, "height": HEIGHT}
                info[image] = entry
    (folder / "gqa_objects_info.json").write_text(json.dumps(info))
    return folder


def write_stacked(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "val36.hdf5"
    ends = np.cumsum(list(COUNTS.values()))
    both = [regions(image) for image in COUNTS]
    shares = [boxes / np.array([WIDTH, HEIGHT] * 2, dtype="f4") for _, boxes in both]
    spatial = [np.hstack([each, each[:, 2:] - each[:, :2]]) for each in shares]
    with h5py.File(path, "w") as file:
        file["image_features"] = np.concatenate([features for features, _ in both])
        file["spatial_features"] = np.concatenate(spatial)
        file["pos_boxes"] = np.stack([ends - list(COUNTS.values()), ends], axis=1)
    index = {int(image) if image.isdigit() else image: place for place, image in enumerate(COUNTS)}
    (folder / "val36_imgid2idx.pkl").write_bytes(pickle.dumps(index, protocol=2))
    return path


def coded(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()


def write_tsv(path: Path, *, wide: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for image, count in COUNTS.items():
        features, boxes = regions(image)
        name = f"COCO_val2014_{int(image):012}" if wide and image.isdigit() else image
        front = [name, HEIGHT, WIDTH, "a", "b", "c", "d"] if wide else [name, WIDTH, HEIGHT]
        lines.append("\t".join(map(str, [*front, count, coded(boxes), coded(features)])))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_npz(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for image in COUNTS:
        features, boxes = regions(image)
        np.savez(folder / f"{image}.npz", x=features, bbox=boxes, image_w=WIDTH, image_h=HEIGHT)
    return folder


def write_zip(folder: Path) -> Path:
    path = folder / "features.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(write_tsv(folder / "inner.tsv", wide=False), "deep/inner.tsv")
    return path


WRITERS = {
    "gqa": write_gqa,
    "stacked": write_stacked,
    "narrow tsv": lambda folder: write_tsv(folder / "x.tsv", wide=False),
    "wide tsv": lambda folder: write_tsv(folder / "x.tsv", wide=True),
    "npz": write_npz,
}


def opened(path: Path) -> RegionFiles:
    return open_features(path, lambda archive: archive.with_name("inner.tsv"))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_regions(kind, tmp_path):
    found = opened(WRITERS[kind](tmp_path / "features"))
    assert found.width == 4 and set(found.ids) == set(COUNTS)
    for image in ("12", "7", "n5", "12"):  # in any order, and again
        features, boxes = regions(image)
        got = found.read(image)
        np.testing.assert_array_equal(got.features, features)
        np.testing.assert_allclose(got.boxes, boxes / np.array([WIDTH, HEIGHT] * 2), rtol=1e-6)
        assert got.features.dtype == got.boxes.dtype == np.float32
    with pytest.raises(KeyError):
        found.read("8")


def test_a_zipped_file_is_read_where_it_is_unpacked(tmp_path):
    assert set(opened(write_zip(tmp_path)).ids) == set(COUNTS)


def test_the_official_files_are_read(vqa_dir):
    wide = TsvRegions(vqa_dir / "vqa-v2" / "train2014_obj36.tsv")
    assert len(wide.ids) == 10 and wide.width == 2048 and "132417" in wide.ids
    found = wide.read("132417")
    assert found.features.shape == (36, 2048) and (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert found.boxes[0].tolist() == pytest.approx([0, 0, 361.8466 / 500, 216.98055 / 333], abs=1e-5)


@pytest.mark.parametrize(
    ("image", "plain"),
    [
        ("COCO_val2014_000000000042", "42"),
        ("42", "42"),
        ("000042.jpg", "42"),
        ("val2014/COCO_val2014_000000000042.jpg", "42"),
        ("n578564", "n578564"),
        ("own photo.png", "own photo"),
        ("0", "0"),
    ],
)
def test_an_image_has_one_id_in_all_files(image, plain):
    assert plain_id(image) == plain


def edit_info(folder: Path, **changes: Any) -> Path:
    path = folder / "gqa_objects_info.json"
    info = json.loads(path.read_text())
    info["7"] |= changes
    path.write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"idx": 9}, "is not where"),
        ({"objectsNum": 6}, "is not where"),
        ({"width": 10}, "boxes outside of the image"),
        ({"file": 3}, r"gqa_objects_3\.h5: there is no such file"),
        ({"idx": None}, "image '7' lacks one of file, idx"),
    ],
)
def test_an_info_file_that_does_not_fit_is_told(changes, says, tmp_path):
    folder = edit_info(write_gqa(tmp_path), **changes)
    with pytest.raises(ValueError, match=says) as caught:
        GqaObjects(folder).read("7")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_told(wrong, tmp_path):
    path = write_stacked(tmp_path)
    with h5py.File(path, "a") as file:
        file["image_features"][1, 2] = wrong
    found = StackedRegions(path, tmp_path / "val36_imgid2idx.pkl")
    with pytest.raises(ValueError, match=r"val36\.hdf5: image '7': holds numbers that are not finite"):
        found.read("7")
    assert found.read("12").features.shape == (1, 4)


def test_files_that_were_cut_short_are_told(tmp_path):
    path = write_stacked(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"val36\.hdf5: cannot be read as HDF5 .* was the download cut short\?"):
        opened(path)
    tsv = write_tsv(tmp_path / "x.tsv", wide=False)
    tsv.write_bytes(tsv.read_bytes()[:-30])
    found = TsvRegions(tsv)
    assert found.read("7").features.shape == (3, 4)
    with pytest.raises(ValueError, match=r"x\.tsv: image 'n5': is damaged .* cut short\?"):
        found.read("n5")


def test_boxes_given_as_corner_and_size_are_told(tmp_path):
    folder = write_npz(tmp_path)
    _, boxes = regions("7")
    turned = np.hstack([boxes[:, :2], np.zeros((3, 2), dtype="f4")])  # x, y, w, h of very small regions
    np.savez(folder / "7.npz", features=np.ones((3, 4)), boxes=turned, width=WIDTH, height=HEIGHT)
    with pytest.raises(ValueError, match="are they x1, y1, x2, y2"):
        NpzRegions(folder).read("7")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"features": np.ones((2, 3)), "boxes": np.zeros((1, 4))}, "2x3 features and 1x4 boxes do not go together"),
        ({"features": np.ones((2, 3))}, "has no array 'boxes'; it has features"),
        ({"features": np.array([{}], dtype=object), "boxes": np.zeros((1, 4))}, "cannot be read"),
    ],
)
def test_archives_of_another_form_are_told(arrays, says, tmp_path):
    np.savez(tmp_path / "7.npz", **arrays)
    with pytest.raises(ValueError, match=says):
        NpzRegions(tmp_path)


def test_an_index_that_does_not_fit_is_told(tmp_path):
    path, index = write_stacked(tmp_path), tmp_path / "val36_imgid2idx.pkl"
    index.write_bytes(pickle.dumps({7: 5}))
    with pytest.raises(ValueError, match=r"places beyond the 3 images of val36\.hdf5"):
        StackedRegions(path, index)
    index.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="is no dict of images"):
        StackedRegions(path, index)
    index.unlink()
    with pytest.raises(ValueError, match=r"val36_imgid2idx\.pkl: there is no such file"):
        opened(path)


def test_unknown_kinds_of_files_are_told(tmp_path):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        opened(tmp_path / "none")
    for path in (tmp_path, tmp_path / "x.bin"):
        if path.suffix:
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"is no folder with gqa_objects_info\.json or \.npz files, and no \.hdf5"):
            opened(path)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["else"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"has no data set 'image_features'; it has else"):
        opened(tmp_path / "x.h5")
