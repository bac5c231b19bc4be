"""`image_names`: which names of images are refused, and which files are missing."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from conftest import DataFiles, scored_rows
from PIL import Image
from refusals import refusal
from small_tables import USUAL, read

from sources import csv_files
from storage import image_files


@pytest.mark.parametrize(
    "name",
    ["../x.png", "a/../../x.png", "..", "/etc/x.png", "//host/x.png", "C:\\x.png", "C:/x.png", "..\\x.png", "\\\\h\\x"],
)
def test_names_that_leave_the_image_folder_are_refused(make_dataset, name):
    rows = [*scored_rows(1, 2), {"name": name, "prompt": "b", "mos_quality": 1}]
    files = make_dataset(rows)
    (files.images.parent / "x.png").write_bytes(b"never to be looked at")
    message = refusal(read, files)
    assert "1 image name(s) leave" in message and message.endswith(f": {name}")


@pytest.mark.parametrize("name", ["..a.png", "a..png", "a/b/c.png", "./d.png", "C.png", "...png"])
def test_names_with_dots_and_folders_that_stay_inside_are_fine(make_dataset, name):
    assert read(make_dataset([{"name": name, "prompt": "b", "mos_quality": 1}]))["path"][0].is_file()


def test_links_that_leave_the_image_folder_are_refused_by_name_unless_allowed(make_dataset, tmp_path):
    rows = [{"name": f"{place}.png", "prompt": "b", "mos_quality": 1} for place in ("out", "in", "deep/out", "plain")]
    files = make_dataset(rows, without=["out.png", "in.png", "deep/out.png"])
    (tmp_path / "store").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "store" / "out.png")
    (files.images / "out.png").symlink_to(tmp_path / "store" / "out.png")
    (files.images / "in.png").symlink_to("plain.png")
    (files.images / "deep").symlink_to(tmp_path / "store")
    message = refusal(read, files)
    assert "2 image(s) lie behind links that leave " in message
    assert message.endswith(": out.png, deep/out.png; --follow_links allows that")
    assert len(image_files.check_images(read(files, follow_links=True)["path"].tolist())) == 4


def test_the_image_folder_itself_may_be_a_link_and_a_folder_whose_name_begins_alike_is_outside(make_dataset, tmp_path):
    files = make_dataset(scored_rows(1, 2))
    (tmp_path / "link").symlink_to(files.images)
    linked = DataFiles(files.csv, tmp_path / "link")
    assert len(read(linked)) == 2
    beside = files.images.with_name("images2")
    beside.mkdir()
    (files.images / "gen0_0.png").rename(beside / "gen0_0.png")
    (files.images / "gen0_0.png").symlink_to(beside / "gen0_0.png")
    assert "1 image(s) lie behind links" in refusal(read, linked)


def test_all_missing_images_are_counted_and_the_first_five_named(make_dataset):
    rows = scored_rows(4, 3)
    names = [row["name"] for row in rows]
    message = refusal(read, make_dataset(rows, without=names[2:9]))
    assert "7 of 12 images are missing" in message
    assert message.endswith(", ".join(names[2:7]) + ", ...")
    assert names[7] not in message and names[0] not in message


def test_five_missing_images_are_all_named_without_dots(make_dataset):
    rows = scored_rows(2, 3)
    message = refusal(read, make_dataset(rows, without=[row["name"] for row in rows[:5]]))
    assert message.endswith(", ".join(row["name"] for row in rows[:5]))


def test_what_is_there_but_no_file_is_not_called_missing(make_dataset):
    files = make_dataset(scored_rows(1, 3), without=["gen0_0.png", "gen1_0.png"])
    (files.images / "gen0_0.png").mkdir()
    (files.images / "gen1_0.png").symlink_to("gen1_0.png")  # in a circle
    paths = read(files)["path"].tolist()
    message = refusal(image_files.check_images, paths)
    assert message.endswith("gen0_0.png (no regular file), gen1_0.png (no regular file)")


@pytest.mark.parametrize("again", ["gen0_0.png", "./gen0_0.png", " gen0_0.png "])
def test_names_that_occur_twice_are_refused(make_dataset, again):
    rows = scored_rows(2, 2)
    rows[3]["name"] = again
    message = refusal(read, make_dataset(rows))
    assert "1 image name(s) occur more than once" in message and "gen0_0.png" in message


def test_an_empty_name_is_refused_by_row(make_dataset):
    rows = scored_rows(2, 2)
    rows[2]["name"] = " "
    assert "row 4: the image name is empty; 1 such row(s)" in refusal(read, make_dataset(rows))


# -- names that nearly match


def put(folder: Path, *names: str) -> Path:
    """A picture under each name below a folder."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name, "PNG")
    return folder


def read_names(folder: Path, *names: str, **options: object) -> tuple[list[str], list[str]]:
    """The names that a CSV with these has in the end, and what is said."""
    path = folder.parent / "data.csv"
    path.write_text("name,mos_quality\n" + "".join(f'"{name}",{row}\n' for row, name in enumerate(names)))
    said: list[str] = []
    table = csv_files.read_table(path, folder, USUAL, say=said.append, **options)
    assert table["path"].tolist() == [folder / name for name in table["name"]]
    assert table["written"].tolist() == [name.strip() for name in names]
    assert all(image_files.is_missing(file) is False for file in table["path"]) or "may_be_missing" in options
    return table["name"].tolist(), said


ACCENT = "caf\u00e9_1.png"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Controlnet\\000-1.png", "Controlnet/000-1.png"),
        ("controlnet/000-1.PNG", "Controlnet/000-1.png"),
        ("a_1.JPEG", "a_1.jpeg"),
        ("A_1.jpeg", "a_1.jpeg"),
        ("a_1", "a_1.jpeg"),
        ("sd1.5_000", "sd1.5_000.JPG"),
        ("sub\\A_1", "sub/a_1.webp"),
        (".\\a_1.jpeg", "a_1.jpeg"),
        ("images/a_1.jpeg", "a_1.jpeg"),
        ("Images\\sub\\a_1.webp", "sub/a_1.webp"),
        ("./data/images/a_1.jpeg", "a_1.jpeg"),
        ("  a_1.jpeg ", "a_1.jpeg"),
        ("a_1.jpeg", " a_1.jpeg "),
        (unicodedata.normalize("NFD", ACCENT), ACCENT),
        (ACCENT, unicodedata.normalize("NFD", ACCENT)),
        (unicodedata.normalize("NFD", ACCENT).upper(), ACCENT),
        ("STRASSE_1.png", "straße_1.png"),
    ],
)
def test_a_name_that_differs_in_its_spelling_alone_is_taken_for_the_one_file(tmp_path, name, file):
    folder = put(tmp_path / "data" / "images", file, "other_1.png")
    names, said = read_names(folder, name, "other_1.png")
    assert names == [file, "other_1.png"]
    if name.strip() == file:
        assert said == []
    else:
        (line,) = said
        assert "1 image name(s) are taken for files spelled otherwise, such as " in line and repr(file) in line


def test_a_file_of_exactly_this_name_wins(tmp_path):
    names = ["a.png", "A.png", "a\\b.png", "a/b.png", "images/a.png"]
    assert read_names(put(tmp_path / "images", *names), *names) == (names, [])
    put(tmp_path / "images", "c/d.png", "C/d.png")  # and a folder of exactly this name
    assert read_names(tmp_path / "images", "c/D.png", "C\\D.PNG")[0] == ["c/d.png", "C/d.png"]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("a.PNG", ["a.png", "A.png"]),
        ("a", ["a.png", "a.jpg"]),
        ("A/b.png", ["a/B.png", "a/b.PNG"]),
        ("B/x.png", ["b/X.png", "b/x.PNG"]),
    ],
)
def test_a_name_that_several_files_may_be_meant_by_is_refused_with_both(tmp_path, name, files):
    message = refusal(read_names, put(tmp_path / "images", *files), name)
    assert f"1 image name(s) may mean several files of {tmp_path / 'images'}: {name!r} one of " in message
    assert all(repr(file) in message for file in files)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sunset_001.jpg", "sunset_01.jpg"),
        ("sub/sunset_001.jpg", "sub/sunset_02.jpg"),
        ("images\\sunset_001.jpg", "sunset_01.jpg"),
        ("sunset_01.png", "sunset_01.jpg"),
        ("nowhere/sunset_01.jpg", "sunset_01.jpg"),
    ],
)
def test_where_none_matches_the_nearest_name_is_shown(tmp_path, name, near):
    folder = put(tmp_path / "images", "sunset_01.jpg", "sub/sunset_02.jpg", "zebra.jpg")
    message = refusal(read_names, folder, name)
    assert f"1 of 1 images are missing (nearest to {name!r} is {near!r}): {name}" in message


def test_where_none_is_near_none_is_shown(tmp_path):
    assert "1 of 1 images are missing: qqq.jpg" in refusal(read_names, put(tmp_path / "images", "a_1.png"), "qqq.jpg")


def test_near_names_do_not_leave_the_folder(tmp_path):
    put(tmp_path, "x.png")
    folder = put(tmp_path / "images", "a.png")
    assert "leave" in refusal(read_names, folder, "..\\X.png")
    (folder / "link").symlink_to(tmp_path)
    assert "lie behind links" in refusal(read_names, folder, "LINK\\X.png")


def test_skipped_images_keep_the_names_that_they_are_written_with(tmp_path):
    folder = put(tmp_path / "images", "a.png")
    assert read_names(folder, "A.png", "B\\c.png", may_be_missing=True)[0] == ["a.png", "B\\c.png"]
