"""`regions/demo_set.py`: the drawn set appears whole, and its features tell what pixels show."""

from __future__ import annotations

import json
import pickletools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from backbones.loading import Backbone, load_backbone
from regions import demo_set
from regions.features import RegionFiles, open_features
from training.devices import Runtime, start_runtime
from vqa.drawn import DrawnImage

NUM_IMAGES, FEW = 96, 4
FORMS = ("GQA", "VQA")
FIRST = NUM_IMAGES * 2 // 3  # images that shapes and colours are learned from


@dataclass(frozen=True)
class Made:
    """A drawn set, the reader of its features, and what went into these."""

    folder: Path
    files: RegionFiles
    images: Sequence[DrawnImage]
    features: Sequence[np.ndarray]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_runtime("cpu", "off")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(*demo_set.CLIP)


@pytest.fixture(scope="module")
def made(tmp_path_factory, runtime) -> dict[str, Made]:
    """The set in both forms."""
    found, cache, compute = {}, tmp_path_factory.mktemp("cache"), demo_set.box_features
    computed: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_set, "NUM_IMAGES", NUM_IMAGES)
        patch.setattr(
            demo_set, "box_features", lambda *given: computed.append((given[2], compute(*given))) or computed[-1][1]
        )
        for form in FORMS:
            folder, path = demo_set.find_demo_set(cache, form, runtime)
            found[form] = Made(folder, open_features(path, lambda archive: archive), *computed.pop())
    assert sorted(path.name for path in cache.iterdir()) == ["drawn-gqa-3", "drawn-vqa-3"]
    return found


@pytest.fixture
def few(monkeypatch) -> None:
    """A set that is drawn at once."""
    monkeypatch.setattr(demo_set, "NUM_IMAGES", FEW)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_computed_is_read_back(form, made):
    own = made[form]
    assert set(own.files.ids) == {image.id for image in own.images} and len(own.images) == NUM_IMAGES
    for image, features in zip(own.images, own.features, strict=True):
        found = own.files.read(image.id)
        assert len(features) == len(image.boxes) > 3
        np.testing.assert_array_equal(found.features, features)
        np.testing.assert_allclose(found.boxes * ([image.width, image.height] * 2), image.boxes, atol=1e-4)
    assert own.files.width == own.features[0].shape[1] == 2 * (16 + 24 + 40 + 80)  # mean and deviation, four stages


def test_both_forms_have_the_same_features(made):
    for one, other in zip(*(made[form].features for form in FORMS), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_index_of_images_is_a_pickle_of_numbers_alone(made):
    content = (made["VQA"].folder / "imgid2idx.pkl").read_bytes()
    needs_code = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "PERSID", "EXT1"}
    assert {opcode.name for opcode, _, _ in pickletools.genops(content)}.isdisjoint(needs_code)


def test_features_are_scaled_by_the_training_fold_alone(made):
    own = made["GQA"]
    rows = {
        fold: np.concatenate([part for image, part in zip(own.images, own.features, strict=True) if image.fold == fold])
        for fold in ("train", "val")
    }
    np.testing.assert_allclose(rows["train"].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(rows["train"].std(axis=0, ddof=1), 1, atol=1e-2)
    assert np.abs(rows["val"].mean(axis=0)).max() > 0.01
    assert np.abs(rows["val"]).max() < 30  # no number that hardly varies is blown up


def test_features_tell_colours_and_kinds(made):
    own = made["GQA"]
    graphs: dict[str, Any] = {}
    for path in sorted((own.folder / "sceneGraphs").iterdir()):
        graphs |= json.loads(path.read_bytes())
    features: tuple[list[np.ndarray], ...] = ([], [])
    looks: tuple[list[tuple[str, str]], ...] = ([], [])
    for number, image in enumerate(own.images):
        found = own.files.read(image.id)
        places = (found.boxes * ([image.width, image.height] * 2)).round().astype(int).tolist()
        for thing in graphs[image.id]["objects"].values():
            x, y = thing["x"], thing["y"]
            features[number >= FIRST].append(found.features[places.index([x, y, x + thing["w"], y + thing["h"]])])
            looks[number >= FIRST].append((thing["attributes"][0], thing["name"]))
    for answer, chance in ((0, 1 / 6), (1, 1 / 5)):
        learned, held_out = ([look[answer] for look in part] for part in looks)
        told = LogisticRegression(C=0.1, max_iter=300).fit(np.array(features[0]), learned)
        assert told.score(np.array(features[1]), held_out) > 0.9 > 2 * chance
        assert len(held_out) > 100


def test_a_region_is_seen_with_a_little_around_it(tmp_path):
    across, down = np.meshgrid(np.arange(130), np.arange(120))
    pixels = np.stack([across, down, 0 * down], axis=2).astype(np.uint8)  # that tell where they are
    Image.fromarray(pixels).save(tmp_path / "places.png")
    boxes = [[20, 30, 60, 50], [0, 100, 30, 120], [110, 0, 130, 10]]
    seen = ((16, 28, 64, 52), (0, 98, 33, 120), (108, 0, 130, 11))  # a tenth of a side more, but for the picture's edge
    image = DrawnImage("1", tmp_path / "places.png", "train", 130, 120, boxes)
    for crop, (left, top, right, bottom) in zip(demo_set.crops_of(image), seen, strict=True):
        assert crop.shape == (3, demo_set.CROP, demo_set.CROP)
        np.testing.assert_allclose(crop[:2, 0, 0], [left, top], atol=1)
        np.testing.assert_allclose(crop[:2, -1, -1], [right - 1, bottom - 1], atol=1)


def crop_of(image: DrawnImage, box: Sequence[float]) -> tuple[float, ...]:
    """What is seen of a box, a pixel more to be sure."""
    across, down = (demo_set.MARGIN * (box[axis + 2] - box[axis]) + 1 for axis in (0, 1))
    return box[0] - across, box[1] - down, box[2] + across, box[3] + down


def is_alone(image: DrawnImage, place: int) -> bool:
    """Whether no other region of an image sees anything of a box."""
    x1, y1, x2, y2 = image.boxes[place]
    others = [crop_of(image, box) for number, box in enumerate(image.boxes) if number != place]
    return not any(x1 < right and left < x2 and y1 < bottom and top < y2 for left, top, right, bottom in others)


def test_what_is_painted_over_changes_its_own_features_and_no_others(made, backbone, runtime, tmp_path):
    own = made["VQA"]
    image, place = next(
        (image, place) for image in own.images for place in range(len(image.boxes)) if is_alone(image, place)
    )
    folder = own.folder / image.path.parent.name
    pixels = np.array(Image.open(folder / image.path.name))
    before = replace(image, path=tmp_path / "before.png")
    Image.fromarray(pixels).save(before.path)
    x1, y1, x2, y2 = map(int, image.boxes[place])
    pixels[y1:y2, x1:x2] = pixels[y1:y2, x1:x2, ::-1] // 2
    after = replace(image, path=tmp_path / "after.png")
    Image.fromarray(pixels).save(after.path)
    both = [demo_set.describe(backbone, runtime, [each]).numpy() for each in (before, after)]
    changes = np.abs(both[1] - both[0]).max(axis=1)
    assert changes[place] > 0.1
    assert np.delete(changes, place).max() < 1e-5


STEPS = ("draw", "load_backbone", "box_features", "write_gqa_objects", "write_json", "sync")


@pytest.mark.parametrize("step", STEPS)
def test_a_set_that_fails_halfway_leaves_nothing_and_can_be_made_again(step, few, runtime, tmp_path, monkeypatch):
    work = getattr(demo_set, step)

    def fail(*given: Any, **more: Any) -> None:
        work(*given, **more)
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(demo_set, step, fail)
        with pytest.raises(OSError, match="the disk is full"):
            demo_set.find_demo_set(tmp_path, "GQA", runtime)
    assert list(tmp_path.iterdir()) == []
    if step == STEPS[-1]:
        folder, features = demo_set.find_demo_set(tmp_path, "GQA", runtime)
        assert list(tmp_path.iterdir()) == [folder] and len(open_features(features, lambda archive: archive).ids) == FEW


def test_a_set_that_is_there_is_not_made_again(few, runtime, tmp_path, monkeypatch):
    first = demo_set.find_demo_set(tmp_path, "VQA", runtime)
    monkeypatch.setattr(demo_set, "make_demo_set", lambda *given: pytest.fail("is drawn again"))
    assert demo_set.find_demo_set(tmp_path, "VQA", runtime) == first


def test_what_a_killed_process_left_is_swept_away(few, runtime, tmp_path):
    left = tmp_path / ".drawn-gqa-3.7123.tmp" / "drawn-gqa-3"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    other = tmp_path / ".drawn-vqa-3.7123.tmp"
    other.mkdir()
    folder, _ = demo_set.find_demo_set(tmp_path, "GQA", runtime)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, other.name}


@pytest.fixture
def drawn(few, monkeypatch) -> list[Path]:
    """The sets that were drawn."""
    found: list[Path] = []
    draw = demo_set.draw
    monkeypatch.setattr(
        demo_set, "draw", lambda folder, *given, **more: found.append(folder) or draw(folder, *given, **more)
    )
    return found


def meanwhile(monkeypatch, work: Callable[[], None]) -> None:
    """Let something happen while features are computed."""
    compute = demo_set.box_features
    monkeypatch.setattr(demo_set, "box_features", lambda *given: work() or compute(*given))


def test_of_two_at_once_one_draws_and_the_other_waits(drawn, runtime, tmp_path, monkeypatch):
    waits, found = threading.Event(), []
    second = threading.Thread(target=lambda: found.append(demo_set.find_demo_set(tmp_path, "GQA", runtime)))

    def start_another() -> None:
        second.start()
        assert waits.wait(60)

    meanwhile(monkeypatch, start_another)
    monkeypatch.setattr(demo_set, "say_that_it_waits", waits.set)
    found.append(demo_set.find_demo_set(tmp_path, "GQA", runtime))
    second.join()
    assert len(drawn) == 1 and found[0] == found[1]


def test_where_folders_have_no_locks_the_quicker_of_two_is_kept(drawn, runtime, tmp_path, monkeypatch):
    @contextmanager
    def unlocked(folder: Path, **given: Any) -> Iterator[bool]:
        yield False

    def be_quicker() -> None:
        (tmp_path / "drawn-gqa-3").mkdir()
        (tmp_path / "drawn-gqa-3" / "of another process").write_bytes(b"")

    monkeypatch.setattr(demo_set, "locked", unlocked)
    meanwhile(monkeypatch, be_quicker)
    folder, _ = demo_set.find_demo_set(tmp_path, "GQA", runtime)
    assert len(drawn) == 1 and [path.name for path in folder.iterdir()] == ["of another process"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_cache_folder_that_cannot_be_one_is_an_error_of_the_file_system(runtime, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        demo_set.find_demo_set(tmp_path / "file", "GQA", runtime)
