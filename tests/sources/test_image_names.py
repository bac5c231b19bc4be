"""`image_names`: which names of images are refused, and which files are missing."""

from __future__ import annotations

import pytest
from conftest import DataFiles, scored_rows
from PIL import Image
from refusals import refusal
from small_tables import read

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
