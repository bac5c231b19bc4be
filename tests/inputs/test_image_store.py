"""`image_store`: where decoded images are kept, and files that are no longer what they were."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_pictures import picture_of, save_as

from inputs import decoding, image_store
from storage import image_files

SIZE = 16  # pixels per side of the views that the stores of these tests decode for
PLACES = ["memory", "file", "nowhere"]


@pytest.fixture
def files(tmp_path) -> list[image_files.ImageFile]:
    """Checked image files of several sizes and kinds, two of which are decoded at a fraction."""
    (tmp_path / "images").mkdir()
    paths = []
    for number, (width, height) in enumerate([(60, 40), (40, 60), (131, 97), (20, 90), (16, 16), (195, 391), (33, 7)]):
        kind, orientation = [("PNG", 1), ("JPEG", 6)][number % 2]
        picture = picture_of("smooth", width, height)
        paths.append(save_as(tmp_path / "images" / f"{number}.img", picture, kind, orientation))
    return image_files.check_images(paths)


def num_bytes(files: Sequence[image_files.ImageFile]) -> int:
    """Of all decoded images together."""
    return sum(decoding.decode(file.path, SIZE).nbytes for file in files)


def store_in(place: str, files: Sequence[image_files.ImageFile], folder: Path) -> image_store.ImageStore:
    """A store that has just enough room in this place."""
    total = num_bytes(files)
    room = {"memory": {"max_memory": total}, "file": {"max_memory": total - 1, "max_file": total}, "nowhere": {}}
    return image_store.ImageStore(files, image_size=SIZE, num_threads=3, spill_dir=folder / "spill", **room[place])


@pytest.fixture
def decoded_paths(monkeypatch) -> Counter[Path]:
    """How often each file was read, counted from now on."""
    counts: Counter[Path] = Counter()
    lock, read_file = threading.Lock(), image_store.read_file

    def counted(path: Path) -> bytes:
        with lock:
            counts[path] += 1
        return read_file(path)

    monkeypatch.setattr(image_store, "read_file", counted)
    return counts


def assert_equal(found: Sequence[torch.Tensor], files: Sequence[image_files.ImageFile]) -> None:
    """Check that these are the decoded images of the files."""
    for image, file in zip(found, files, strict=True):
        expected = np.asarray(decoding.load_image(file.path, SIZE)).transpose(2, 0, 1)
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image.numpy(), expected)


@pytest.mark.parametrize("place", PLACES)
def test_a_store_gives_the_rows_asked_for_however_often_and_in_any_order(files, tmp_path, place):
    store = store_in(place, files, tmp_path)
    for rows in ([3], [6, 0, 5], np.arange(len(files)), [2, 2, 4], np.arange(len(files))[::-1], []):
        assert_equal(store.load(rows), [files[row] for row in rows])


@pytest.mark.parametrize(("place", "times"), [("memory", 1), ("file", 1), ("nowhere", 3)])
def test_each_file_is_decoded_once_if_it_is_kept_and_whenever_asked_for_if_not(
    files, tmp_path, decoded_paths, place, times
):
    store = store_in(place, files, tmp_path)
    decoded_paths.clear()
    for rows in ([0, 1, 2, 3], [6, 5, 4], np.arange(len(files)), np.arange(len(files))[::-1]):
        store.load(rows)
    assert decoded_paths == {file.path: times for file in files}


@pytest.mark.parametrize("place", ["memory", "file"])
def test_threads_that_ask_row_by_row_get_what_one_of_them_decoded(files, tmp_path, decoded_paths, place):
    store = store_in(place, files, tmp_path)
    decoded_paths.clear()
    order = np.random.default_rng(0)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            rows = order.permutation(len(files)).tolist()
            assert_equal(list(pool.map(store.load_one, rows)), [files[row] for row in rows])
    assert decoded_paths == {file.path: 1 for file in files}


@pytest.mark.parametrize("place", PLACES)
def test_threads_that_ask_for_the_same_row_at_once_all_get_it_whole(files, tmp_path, place):
    store, start = store_in(place, files, tmp_path), threading.Barrier(4)

    def ask(_: int) -> torch.Tensor:
        start.wait(timeout=30)
        return store.load_one(5).clone()

    with ThreadPoolExecutor(4) as pool:
        assert_equal(list(pool.map(ask, range(4))), [files[5]] * 4)


def test_images_are_kept_in_memory_if_they_fit_else_in_a_file_if_they_fit_else_not(files, tmp_path):
    total, folder = num_bytes(files), tmp_path / "deep" / "spill"

    def place(max_memory: float, max_file: float, spill_dir: Path | None = folder) -> str:
        limits = {"max_memory": max_memory, "max_file": max_file, "spill_dir": spill_dir}
        return image_store.ImageStore(files, image_size=SIZE, num_threads=1, **limits).place

    assert place(total, 0) == place(1e12, 1e12) == "kept in memory"
    assert place(total - 1, total - 1) == place(0, 0) == place(0, 1e12, None) == "decoded whenever needed"
    assert not folder.exists(), "made when it is needed"
    assert place(total - 1, total) == f"kept in a file in {folder}"
    assert folder.is_dir()


def test_the_file_that_images_are_kept_in_cannot_be_seen_and_is_gone_with_the_store(files, tmp_path):
    store = store_in("file", files, tmp_path)
    assert isinstance(store.pixels, np.memmap)
    store.load(range(len(files)))
    assert list((tmp_path / "spill").iterdir()) == []


def test_a_store_says_how_much_it_decodes_where_to_and_how_much_of_it_at_a_fraction():
    photos = [image_files.ImageFile(Path(f"{number}.jpg"), "", (6000, 4001)) for number in range(90)]
    drawings = [image_files.ImageFile(Path("x.png"), "", (500, 400))]

    def described(image_size: int) -> str:
        return image_store.ImageStore([*photos, *drawings], image_size=image_size, num_threads=1).describe()

    whole, half = 90 * 3 * 6000 * 4001 + 3 * 500 * 400, 90 * 3 * 3000 * 2001 + 3 * 500 * 400
    assert described(1000) == f"{whole / 1e9:.2f} GB decoded, decoded whenever needed"
    assert described(336) == f"{half / 1e9:.2f} GB decoded, decoded whenever needed, 90 at a fraction of their size"


def test_a_store_for_views_of_native_size_decodes_every_image_whole(files):
    total = sum(3 * width * height for width, height in (file.size for file in files))
    store = image_store.ImageStore(files, image_size=None, num_threads=2, max_memory=total)
    assert store.describe() == f"{total / 1e9:.2f} GB decoded, kept in memory"
    for _ in range(2):
        for image, file in zip(store.load(range(len(files))), files, strict=True):
            np.testing.assert_array_equal(image.numpy(), decoding.decode(file.path, None).transpose(2, 0, 1))


@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_file_that_has_another_size_than_when_it_was_checked_is_an_error_that_names_it(files, tmp_path, place):
    store = store_in(place, files, tmp_path)
    Image.new("RGB", (61, 40)).save(files[0].path, "PNG")
    with pytest.raises(OSError, match="has changed since it was checked") as caught:
        store.load(range(len(files)))
    assert str(files[0].path) in str(caught.value)
    assert_equal(store.load([1, 2]), files[1:3])


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_holds_another_image_of_the_same_size_than_when_it_was_checked_is_an_error(files, tmp_path, place):
    store = store_in(place, files, tmp_path)
    Image.new("RGB", files[0].size).save(files[0].path, "PNG")
    with pytest.raises(image_store.Unreadable, match="has changed since it was checked") as caught:
        store.load([1, 0, 2])
    assert caught.value.reasons == {0: "has changed since it was checked"}
    assert str(files[0].path) in str(caught.value)


def test_all_rows_that_can_no_longer_be_read_are_told_with_their_reasons_and_five_are_named(files, tmp_path):
    store = store_in("nowhere", files, tmp_path)
    for file in files[:6]:
        file.path.unlink()
    os.mkfifo(files[0].path)
    with pytest.raises(image_store.Unreadable) as caught:
        store.load(np.arange(len(files))[::-1])
    gone = "No such file or directory"
    assert caught.value.reasons == {5: gone, 4: gone, 3: gone, 2: gone, 1: gone, 0: "no regular file"}
    assert str(caught.value).startswith("6 image(s) can no longer be read: ")
    assert str(caught.value).endswith(f"1.img ({gone}), ...")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loss", ["deleted", "cut", "text"])
def test_a_file_that_can_no_longer_be_read_is_an_os_error(files, tmp_path, place, loss):
    store, path = store_in(place, files, tmp_path), files[3].path
    content = {"cut": path.read_bytes()[: path.stat().st_size // 2], "text": b"no longer an image"}
    path.unlink()
    if loss in content:
        path.write_bytes(content[loss])
    with pytest.raises(OSError, match=r"3\.img|truncated"):
        store.load([2, 3])


@pytest.mark.parametrize("place", ["memory", "file"])
def test_an_image_that_was_kept_outlives_its_file(files, tmp_path, place):
    store = store_in(place, files, tmp_path)
    expected = [image.clone() for image in store.load(range(len(files)))]
    for file in files:
        file.path.unlink()
    assert all(map(torch.equal, store.load(range(len(files))), expected))


@pytest.mark.parametrize("place", PLACES)
def test_images_that_are_not_to_be_kept_are_decoded_again(files, tmp_path, decoded_paths, place):
    store = store_in(place, files, tmp_path)
    decoded_paths.clear()
    found = [store.load(range(len(files)), keep=False) for _ in range(2)]
    assert decoded_paths == {file.path: 2 for file in files}
    for images_of_once in found:
        assert_equal(images_of_once, files)


def test_a_disk_that_has_not_enough_space_keeps_nothing(files, tmp_path, monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    store = store_in("file", files, tmp_path)
    assert store.place == "decoded whenever needed"
    assert_equal(store.load(range(len(files))), files)


def test_files_and_pictures_that_are_needed_once_are_decoded_in_their_order(files):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    sources = [files[2].path, Image.fromarray(noise), str(files[5].path), files[0].path]
    found = decoding.decode_all(sources, SIZE, num_threads=3)
    assert_equal([found[0], *found[2:]], [files[2], files[5], files[0]])
    np.testing.assert_array_equal(found[1].numpy(), noise.transpose(2, 0, 1))
    with pytest.raises(OSError, match="nowhere"):
        decoding.decode_all([*sources, "nowhere.png"], SIZE, num_threads=3)
