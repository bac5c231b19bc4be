"""`regions/clip_regions.py`: patches are where their boxes say, and are computed once."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from PIL import Image

from answering.feed import QuestionFeed
from backbones.loading import Backbone, load_backbone
from inputs.decoding import decode_all
from inputs.image_store import Unreadable
from regions import clip_regions
from regions.clip_regions import PatchRegions
from storage.feature_cache import FeatureCache
from training.devices import Runtime, start_runtime
from vqa.preprocess import QuestionTable

GREY, RED = (128, 128, 128), (230, 30, 30)
SIDES = {"tiny": 8, "lite": 4}  # patches along a side; lite sees 128 pixels
WIDTHS = {"tiny": 64, "lite": 192}


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_runtime("cpu", "off")


@pytest.fixture(scope="module")
def backbones() -> Mapping[str, Backbone]:
    """A tower of transformer blocks and a convolutional one."""
    return {"tiny": load_backbone("tiny", "assets"), "lite": load_backbone("lite", "assets", image_size=128)}


@pytest.fixture
def reader(backbones, runtime, tmp_path) -> Callable[..., PatchRegions]:
    """A function that makes a reader as a run of its own would: it knows of the cache what is on disk."""

    def make(name: str | Backbone, paths: Mapping[str, Path] | None = None, **changes: Any) -> PatchRegions:
        backbone = backbones[name] if isinstance(name, str) else name
        cache = FeatureCache(tmp_path / "cache", changes.get("max_bytes", 1e9))
        return PatchRegions(
            backbone, changes.get("runtime", runtime), paths or {}, cache, most=changes.get("most", 1000)
        )

    return make


@pytest.fixture
def looked(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of all images that a tower was shown, in any process."""
    shapes: list[tuple[int, ...]] = []
    look = PatchRegions.look

    def count(self, images):
        shapes.extend(tuple(image.shape) for image in images)
        return look(self, images)

    monkeypatch.setattr(PatchRegions, "look", count)
    return shapes


@pytest.fixture
def photos(tmp_path) -> dict[str, Path]:
    """Five pictures of different sizes; the first two are the same."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in {0: (40, 60), 2: (300, 200), 3: (200, 300), 4: (170, 170)}.items():
        coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    (folder / "1.jpg").write_bytes((folder / "0.jpg").read_bytes())
    return {path.stem: path for path in sorted(folder.iterdir())}


def painted(size: tuple[int, int], box: tuple[float, ...] | None = None) -> bytes:
    """A grey picture of this width and height, the inside of a box (in pixels) red."""
    image = Image.new("RGB", size, GREY)
    if box is not None:
        left, top, right, bottom = box
        image.paste(RED, (int(np.ceil(left)), int(np.ceil(top)), int(right), int(bottom)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def assert_nearly(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for a rounding to float16 here and there."""
    np.testing.assert_allclose(found, expected, rtol=2**-9, atol=1e-4)


def boxes_meet(boxes: np.ndarray) -> bool:
    """Whether boxes cover the unit square and nothing twice, to the last bit."""
    x, y = np.unique(boxes[:, ::2]), np.unique(boxes[:, 1::2])
    cells = {(*low, *high) for low, high in zip(boxes[:, :2].tolist(), boxes[:, 2:].tolist(), strict=True)}
    wanted = {
        (x1, y1, x2, y2)
        for x1, x2 in zip(x[:-1].tolist(), x[1:].tolist(), strict=True)
        for y1, y2 in zip(y[:-1].tolist(), y[1:].tolist(), strict=True)
    }
    return cells == wanted and len(boxes) == len(wanted) and {x[0], y[0], x[-1], y[-1]} == {0, 1} == {x[0], x[-1]}


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("most", [1, 3, 10, 1000])
def test_regions_are_no_more_than_wanted_and_their_boxes_tile_the_image(name, most, reader):
    found = reader(name, most=most)
    rows = min(int(most**0.5), SIDES[name])
    assert found.width == WIDTHS[name] and found.boxes.shape == (rows * rows, 4)
    assert found.boxes.dtype == np.float32 and boxes_meet(found.boxes)
    black = torch.zeros(2, 3, 30, 50, dtype=torch.uint8)
    assert found.look(list(black)).shape == (2, rows * rows, WIDTHS[name])


def test_boxes_that_leave_a_gap_are_found():
    boxes = clip_regions.grid(3)
    assert boxes_meet(boxes) and not boxes_meet(boxes[1:]) and not boxes_meet(boxes * np.float32(0.5))
    boxes[4, 2] += 1e-6
    assert not boxes_meet(boxes)


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("size", [(300, 150), (170, 410)])
@pytest.mark.parametrize("most", [9, 1000])
def test_what_a_box_covers_changes_its_own_region_most(name, size, most, reader, tmp_path):
    found = reader(name, most=most)
    places = range(0, len(found.boxes), max(1, len(found.boxes) // 9))
    contents = [painted(size), *(painted(size, found.boxes[place] * np.array([*size, *size])) for place in places)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.png").write_bytes(content)
    found.paths = {str(number): tmp_path / f"{number}.png" for number in range(len(contents))}
    found.fill(found.ids)
    plain, *patched = (found.read(str(number)).features for number in range(len(contents)))
    changes = [np.linalg.norm(each - plain, axis=1) for each in patched]
    assert [int(change.argmax()) for change in changes] == list(places)


@pytest.mark.parametrize("name", SIDES)
def test_an_image_alone_in_a_batch_and_from_the_cache_is_the_same(name, reader, photos):
    found = reader(name, photos)
    decoded = decode_all(list(photos.values()), found.views.decode_size, 1)
    together = found.look(decoded).float().numpy()
    found.fill(photos)
    for image, pixels, expected in zip(photos, decoded, together, strict=True):
        cached = found.read(image)
        assert cached.features.dtype == np.float32 and cached.boxes is found.boxes
        assert_nearly(cached.features, expected)
        assert_nearly(found.look([pixels])[0].float().numpy(), expected)
    assert np.abs(found.read("0").features - found.read("2").features).max() > 0.1
    np.testing.assert_array_equal(found.read("1").features, found.read("0").features)


def test_what_was_computed_is_not_computed_again(reader, photos, looked):
    first = reader("tiny", photos)
    first.fill(["0", "1", "4", "4"])
    assert len(looked) == 2  # names or contents that come twice are looked at once
    first.fill(["0"])
    again = reader("tiny", dict(reversed(photos.items())))
    again.fill(["4", "1"])
    assert len(looked) == 2
    np.testing.assert_array_equal(again.read("1").features, first.read("0").features)
    again.fill(photos)
    assert len(looked) == 4


def changed(backbone: Backbone, name: str) -> Backbone:
    """The same with another value of one parameter of the image tower."""
    clip = copy.deepcopy(backbone.clip)
    with torch.no_grad():
        clip.visual.get_parameter(name).mul_(1.5)
    return replace(backbone, clip=clip)


def test_only_weights_that_decide_the_regions_make_them_anew(reader, backbones, photos, looked):
    first = reader("tiny", photos)
    first.fill(["0"])
    behind = changed(backbones["tiny"], "ln_post.weight")
    reader(behind, photos).fill(["0"])
    assert len(looked) == 1
    other = reader(changed(backbones["tiny"], "conv1.weight"), photos)
    other.fill(["0"])
    assert len(looked) == 2
    assert np.abs(other.read("0").features - first.read("0").features).max() > 0.01


def test_sizes_and_numbers_of_regions_are_kept_apart(reader, photos, looked):
    small = load_backbone("tiny", "assets", image_size=112)  # with another position table
    readers = [reader("tiny", photos), reader(small, photos), reader("tiny", photos, most=16), reader("lite", photos)]
    for found in readers:
        found.fill(["2"])
    assert len(looked) == 4
    features = [found.read("2").features for found in readers]
    assert [each.shape for each in features] == [(64, 64), (16, 64), (16, 64), (16, 192)]
    assert np.abs(features[1] - features[2]).max() > 0.01


def test_missing_and_broken_images_are_named_in_one_line(reader, photos, looked):
    photos["0"].unlink()
    photos["2"].write_bytes(photos["2"].read_bytes()[:500])
    photos["3"].write_text("no image")
    found = reader("tiny", photos)
    with pytest.raises(ValueError, match=r"3 of 5 images cannot be read: 0\.jpg .*, 2\.jpg .*, 3\.jpg ") as caught:
        found.fill(photos)
    small_models.assert_one_line(caught)
    assert looked == []  # nobody waits hours for that
    with pytest.raises(ValueError, match=r"2 of 3 images are not there: 7, 8") as caught:
        found.fill(["1", "7", "8"])
    small_models.assert_one_line(caught)


def test_an_image_that_changes_after_it_was_checked_does_not_get_into_the_cache(reader, photos, monkeypatch):
    check = clip_regions.check_images

    def then_change(paths: Any, **options: Any) -> Any:
        files = check(paths, **options)
        photos["0"].write_bytes(photos["3"].read_bytes())
        return files

    monkeypatch.setattr(clip_regions, "check_images", then_change)
    found = reader("tiny", photos)
    with pytest.raises(Unreadable, match=r"0\.jpg \(has changed"):
        found.fill(["0"])
    assert list(found.kept.folder.parent.rglob("*.safetensors")) == []


def test_what_is_cached_needs_no_file_any_more(reader, photos):
    found = reader("tiny", photos)
    found.fill(["0"])
    before = found.read("0").features
    photos["0"].unlink()
    np.testing.assert_array_equal(found.read("0").features, before)


def test_images_that_were_not_asked_for_are_not_there(reader, photos):
    found = reader("tiny", photos)
    found.fill(["0"])
    assert set(found.ids) == set(photos)
    for name in ("1", "7"):
        with pytest.raises(KeyError):
            found.read(name)


def test_a_folder_without_room_is_told_and_stays_empty(reader, photos, looked):
    found = reader("tiny", photos, max_bytes=10_000)
    with pytest.raises(ValueError, match=r"--cache_dir .*cache: has no room for 0\.0 GB of what CLIP sees") as caught:
        found.fill(photos)
    small_models.assert_one_line(caught)
    assert looked == [] and list(found.kept.folder.parent.rglob("*.safetensors")) == []


def test_a_huge_image_is_decoded_at_a_fraction_and_looks_as_a_small_one(reader, tmp_path, looked):
    for name, scale in (("huge", 4), ("small", 1)):
        content = painted((600 * scale, 450 * scale), (0, 0, 300 * scale, 450 * scale))
        (tmp_path / f"{name}.png").write_bytes(content)
    found = reader("lite", {name: tmp_path / f"{name}.png" for name in ("huge", "small")})
    found.fill(["huge"])
    found.fill(["small"])
    assert looked == [(3, 450, 600)] * 2
    assert_nearly(found.read("huge").features, found.read("small").features)


def backbone_of(clip: Any, image_size: int) -> Backbone:
    config = {
        "model_cfg": {"vision_cfg": {"image_size": image_size}},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    return Backbone(clip=clip, tokenizer=lambda texts: torch.zeros(1), config=config)


def test_towers_without_patches_are_refused_in_one_line(reader):
    for clip, size in ((small_models.timm_clip(), 64), (small_models.build_clip({"layers": 1}), 32)):
        with pytest.raises(ValueError, match="--features clip: this CLIP's image tower has no patches") as caught:
            reader(backbone_of(clip, size))
        small_models.assert_one_line(caught)


def test_the_last_stage_of_a_resnet_is_looked_at_and_the_last_block_of_a_transformer_is_not():
    assert clip_regions.stages_with_patches(small_models.resnet_clip().visual) == 4
    assert clip_regions.stages_with_patches(small_models.build_clip().visual) == small_models.IMAGE_LAYERS - 1


def test_numbers_that_are_too_large_to_be_kept_are_told(reader, backbones, photos):
    clip = copy.deepcopy(backbones["tiny"].clip)
    with torch.no_grad():
        clip.visual.transformer.resblocks[3].mlp.c_proj.bias[0] = 1e5
    with pytest.raises(ValueError, match="not finite in half precision") as caught:
        reader(replace(backbones["tiny"], clip=clip), photos).fill(photos)
    small_models.assert_one_line(caught)


def test_a_feed_makes_batches_of_them(reader, photos):
    found = reader("lite", photos)
    found.fill(photos)
    table = QuestionTable(
        words_QN=np.array([[3, 4], [5, 0], [6, 0]], dtype=np.int32),
        entities_QE=np.zeros((3, 1), dtype=np.int32),
        images=["2", "0", "2"],
        descriptions={},
        targets_QA=None,
    )
    feed = QuestionFeed(table, found, max_boxes=20, device=torch.device("cpu"))
    batch = next(feed.batches([np.array([0, 1, 2])])).inputs
    assert [found.count(image) for image in table.images] == [len(found.read(image).boxes) for image in table.images]
    for row, image in enumerate(table.images):
        place = batch["images_B"][row]
        np.testing.assert_array_equal(batch["features_IMF"][place], found.read(image).features[:20])
        np.testing.assert_array_equal(batch["boxes_IM4"][place], found.boxes[:20])


class Pair(Runtime):
    """Two processes, played by threads that meet and hand each other values."""

    meeting = threading.Barrier(2, timeout=60)
    said: tuple[list[Any], ...] = ([None], [None])

    def barrier(self) -> None:
        self.meeting.wait()

    def of_all(self, value: Any) -> list[Any]:
        self.said[self.rank][0] = value
        self.barrier()
        found = [each[0] for each in self.said]
        self.barrier()
        return found

    def agree(self, value: Any) -> Any:
        return self.of_all(value)[0]


@pytest.fixture
def pair(runtime) -> Iterator[list[Pair]]:
    yield [Pair(runtime.device, "off", runtime.scaler, rank=rank, world=2, local_world=2) for rank in (0, 1)]
    Pair.meeting.reset()


def in_both(work: Callable[[int], None]) -> list[BaseException]:
    """Do something in two threads; what they raised."""
    raised: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:  # noqa: BLE001 - told to who started it
            raised.append(error)

    threads = [threading.Thread(target=run, args=[rank]) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_two_processes_share_the_work_and_both_have_it_all(reader, photos, pair, looked):
    readers = [reader("tiny", photos, runtime=each) for each in pair]
    assert in_both(lambda rank: readers[rank].fill(photos)) == []
    assert len(looked) == 4
    for name in photos:
        np.testing.assert_array_equal(*(found.read(name).features for found in readers))
    assert np.abs(readers[0].read("2").features - readers[0].read("3").features).max() > 0.1


def test_two_processes_both_say_that_there_is_no_room(reader, photos, pair):
    readers = [reader("tiny", photos, runtime=each, max_bytes=10) for each in pair]
    raised = in_both(lambda rank: readers[rank].fill(photos))
    assert ["has no room" in str(error) for error in raised] == [True, True]
