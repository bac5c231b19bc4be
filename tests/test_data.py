"""`data.py`: what may be in a CSV and an image folder, splits, scales, views, batches."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import COLUMNS, csv_text, scored_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import data

USUAL = data.Columns()
SPLIT = {"split_by": "prompt", "test_size": 0.25, "val_size": 0.25, "seed": 0}
NO_RANGES = {"q": None, "c": None}


def read(files, columns: data.Columns = USUAL, **options: Any) -> pd.DataFrame:
    return data.read_table(files.csv, files.images, columns, **options)


def refusal(function, *args: Any, **options: Any) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the CSV


def test_a_table_has_every_cell_and_counts_rows_as_a_spreadsheet_does(make_dataset):
    rows = scored_rows(3, 2)
    table = read(make_dataset(rows))
    assert table["name"].tolist() == [row["name"] for row in rows]
    assert table["prompt"].tolist() == [row["prompt"] for row in rows]
    assert table["q"].tolist() == [row["mos_quality"] for row in rows]
    assert table["c"].tolist() == [row["mos_align"] for row in rows]
    assert table["group"].tolist() == ["gen0", "gen1"] * 3
    assert table["row"].tolist() == [2, 3, 4, 5, 6, 7]
    assert set(table["split"]) == set(table["explanation"]) == {""}
    assert [path.is_file() for path in table["path"]] == [True] * 6
    assert list(table.index) == list(range(6))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_mark_and_line_ends_make_no_difference(make_dataset, encoding, newline):
    rows = scored_rows(2, 2)
    files = make_dataset(rows, encoding=encoding, newline=newline)
    assert files.csv.read_bytes().startswith(b"\xef\xbb\xbf") == (encoding == "utf-8-sig")
    table = read(files)
    assert table[["name", "prompt", "q", "c"]].to_numpy().tolist() == [[row[key] for key in COLUMNS] for row in rows]


def test_prompts_keep_commas_quotes_line_breaks_and_chinese(make_dataset):
    prompts = ['a cat, a dog, and "a fox"', "两只猫，一只狗", "first line\nsecond line", "naïve café 🎨", "NA", "null"]
    names = ["猫_0.png", "sub folder/a b_1.png", "x_2.PNG", "ü_3.png", "NA_4.png", "nan"]
    rows = [dict(zip(COLUMNS, (*cells, 3.5, 2), strict=True)) for cells in zip(names, prompts, strict=True)]
    table = read(make_dataset(rows))
    assert table["prompt"].tolist() == prompts
    assert table["name"].tolist() == names
    assert data.check_images(table["path"].tolist())
    assert table["q"].tolist() == [3.5] * 6


def test_blanks_around_cells_and_column_names_do_not_matter(make_dataset):
    text = " name , prompt ,mos_quality , mos_align\n a_1.png , a cat , 1.5 , 2 \n"
    table = read(make_dataset([{"name": "a_1.png"}], text=text))
    assert table.loc[0, ["name", "prompt", "q", "c"]].tolist() == ["a_1.png", "a cat", 1.5, 2.0]


def test_empty_rows_are_left_out_but_counted(make_dataset):
    text = csv_text(scored_rows(1, 3)).replace("gen1", "\n,,,\ngen1")
    table = read(make_dataset(scored_rows(1, 3), text=text))
    assert table["row"].tolist() == [2, 5, 6]
    assert list(table.index) == [0, 1, 2]


def test_columns_may_have_other_names_and_others_may_lie_between(make_dataset):
    text = "file,x,text,iqa,align,model,why\na.png,,a cat,1,2,sd,blurred\n"
    columns = data.Columns(
        name="file", prompt="text", quality="iqa", consistency="align", explanation="why", group="model"
    )
    table = read(make_dataset([{"name": "a.png"}], text=text), columns)
    keys = ["name", "prompt", "q", "c", "group", "explanation"]
    assert table.loc[0, keys].tolist() == ["a.png", "a cat", 1.0, 2.0, "sd", "blurred"]


@pytest.mark.parametrize("field", ["name", "prompt", "quality", "consistency", "explanation", "group"])
def test_a_column_that_was_asked_for_by_name_must_exist(make_dataset, field):
    files = make_dataset(scored_rows(2))
    message = refusal(read, files, data.Columns(**{field: "nmae"}))
    assert f"--{field}_column" in message and "'nmae'" in message and str(files.csv) in message
    assert "'prompt', 'mos_quality'" in message


def test_the_name_column_must_exist_under_its_usual_name(make_dataset):
    message = refusal(read, make_dataset([{"file": "a", "mos_quality": 1}]))
    assert "no column 'name'" in message and "--name_column" in message


def test_a_column_that_occurs_twice_is_refused(make_dataset):
    message = refusal(read, make_dataset(text="name,prompt,mos_quality,mos_quality\na,b,1,2\n"))
    assert "'mos_quality' more than once" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("name,prompt,mos_quality\n", "no rows"),
        ("name,prompt,mos_quality\n,,\n\n", "no rows"),
        ("name,prompt,mos_quality\na.png,a cat, a dog,3\n", "line 2"),
        ("name,prompt,mos_quality\na.png,b,3\na.png,a cat, a dog,3\n", "line 3"),
        ('name,prompt,mos_quality\na.png,"never closed,3\n', "double quotes"),
        ("name;prompt;mos_quality\na;b;3\n", "no column 'name' among 'name;prompt;mos_quality'"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused_by_file_and_reason(make_dataset, text, says):
    files = make_dataset(text=text)
    message = refusal(read, files)
    assert says in message and str(files.csv) in message


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_other_encodings_are_refused_with_what_to_do(make_dataset, encoding):
    files = make_dataset([{"name": "a.png", "prompt": "两只猫", "mos_quality": 3}], encoding=encoding)
    message = refusal(read, files)
    assert "not UTF-8" in message and str(files.csv) in message


def test_a_missing_csv_and_a_folder_in_its_place_are_refused_by_name(tmp_path):
    assert "nowhere.csv: no such file" in refusal(data.read_csv, tmp_path / "nowhere.csv")
    assert f"{tmp_path}: cannot be read" in refusal(data.read_csv, tmp_path)


def test_a_missing_image_folder_is_refused_by_flag_and_name(make_dataset, tmp_path):
    files = make_dataset(scored_rows(2))
    message = refusal(data.read_table, files.csv, tmp_path / "nowhere", USUAL)
    assert "--image_base_dir" in message and "nowhere: no such folder" in message


def test_without_data_at_the_default_place_at_most_five_lines_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="AGIQA-3K") as caught:
        data.read_csv("data/data.csv")
    message = str(caught.value)
    assert message.count("\n") <= 4
    for needed in ("github.com/", "data/data.csv", "data/images", "python baseline.py --demo"):
        assert needed in message


# -- scores


@pytest.mark.parametrize("cell", ["good", "nan", "NaN", "inf", "-inf", "1e999", "3,5", "0x10", "1_000", "--", "NA"])
@pytest.mark.parametrize("column", ["mos_quality", "mos_align"])
def test_a_score_that_is_no_finite_number_is_refused_by_row_and_column(make_dataset, cell, column):
    rows = scored_rows(3, 2)
    rows[3][column] = rows[5][column] = cell
    files = make_dataset(rows)
    message = refusal(read, files)
    assert f"{files.csv} row 5: {column} is {cell!r}" in message and "2 such row(s)" in message


def test_row_numbers_in_messages_count_empty_rows(make_dataset):
    text = csv_text(scored_rows(1, 2)).replace("gen1", "\n\ngen1").replace(",1.01,", ",x,")
    assert "row 5: mos_quality is 'x'" in refusal(read, make_dataset(scored_rows(1, 2), text=text))


@pytest.mark.parametrize(("cell", "value"), [("3", 3.0), ("+2.5", 2.5), ("-1e-1", -0.1), (" 4 ", 4.0), ("1E2", 100.0)])
def test_numbers_are_read_however_they_are_written(make_dataset, cell, value):
    assert read(make_dataset([{"name": "a.png", "prompt": "b", "mos_quality": cell}]))["q"].tolist() == [value]


def test_an_empty_cell_is_a_missing_score_and_nothing_else(make_dataset):
    rows = scored_rows(2, 2)
    rows[0]["mos_quality"] = rows[3]["mos_align"] = ""
    rows[1]["mos_align"] = "  "
    table = read(make_dataset(rows))
    assert table["q"].isna().tolist() == [True, False, False, False]
    assert table["c"].isna().tolist() == [False, True, False, True]


def test_a_row_that_ends_early_has_empty_cells(make_dataset):
    table = read(make_dataset([{"name": "a.png"}, {"name": "b.png"}], text="name,mos_quality,prompt\na.png,1\nb.png\n"))
    assert table["prompt"].tolist() == ["", ""]
    assert table["q"].isna().tolist() == [False, True]


@pytest.mark.parametrize(("task", "column"), [("q", "mos_quality"), ("c", "mos_align")])
@pytest.mark.parametrize("empty", [True, False])
def test_a_data_set_may_lack_one_score_which_is_then_no_task(make_dataset, task, column, empty):
    rows = [{key: "" if key == column else value for key, value in row.items()} for row in scored_rows()]
    files = make_dataset(rows, columns=None if empty else [key for key in COLUMNS if key != column])
    examples = data.load_examples(files.csv, files.images, USUAL, **SPLIT, ranges=NO_RANGES)
    other = "c" if task == "q" else "q"
    assert list(examples.scales) == list(examples.unit_targets) == list(examples.train_means) == [other]
    assert examples.table[task].isna().all() and not examples.table[other].isna().any()


def test_a_table_without_any_score_is_refused_for_training_only(make_dataset):
    files = make_dataset([{"name": "a.png", "prompt": "b"}])
    message = refusal(read, files)
    assert "--quality_column" in message and "--consistency_column" in message
    assert read(files, scored=False)["prompt"].tolist() == ["b"]


def test_scores_are_not_looked_at_where_they_are_not_needed(make_dataset):
    rows = [{"name": "a.png", "prompt": "", "mos_quality": "n/a", "mos_align": 3}]
    assert read(make_dataset(rows), scored=False)[["q", "c"]].isna().to_numpy().tolist() == [[True, True]]


def test_a_consistency_score_needs_a_prompt(make_dataset):
    rows = scored_rows(2, 2)
    rows[1]["prompt"] = rows[2]["prompt"] = " "
    message = refusal(read, make_dataset(rows))
    assert "row 3" in message and "'prompt'" in message and "2 such row(s)" in message


def test_quality_alone_needs_no_prompt(make_dataset):
    table = read(make_dataset([{"name": "a.png", "mos_quality": 3}]))
    assert table["prompt"].tolist() == [""]


# -- names and files


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


def test_links_inside_the_image_folder_may_point_out_of_it(make_dataset, tmp_path):
    files = make_dataset([{"name": "link.png", "prompt": "b", "mos_quality": 1}], without=["link.png"])
    Image.new("RGB", (8, 8)).save(tmp_path / "store.png")
    (files.images / "link.png").symlink_to(tmp_path / "store.png")
    assert data.check_images(read(files)["path"].tolist())


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


def test_a_folder_in_place_of_an_image_is_missing(make_dataset):
    files = make_dataset(scored_rows(1, 2), without=["gen0_0.png"])
    (files.images / "gen0_0.png").mkdir()
    assert "1 of 2 images are missing: gen0_0.png" in refusal(read, files)


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


@pytest.mark.parametrize(
    ("name", "generator"),
    [("AttnGAN_normal_000.jpg", "AttnGAN_normal"), ("sub_dir/sd_1.png", "sd"), ("plain.png", ""), ("_1.png", "")],
)
def test_the_generator_is_the_file_name_up_to_its_last_underscore(name, generator):
    assert data.generator_of(name) == generator


# -- image files


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def write_png(path: Path, samples: np.ndarray, colour_type: int) -> Path:
    """Write a 16-bit PNG as its specification says: (H, W) or (H, W, channels), big-endian, no filter."""
    height, width = samples.shape[:2]
    lines = samples.astype(">u2").reshape(height, -1)
    packed = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def loaded(path: Path | Image.Image) -> np.ndarray:
    """What `load_image` makes of a file, after checking that it is RGB and passes `check_images` too."""
    if isinstance(path, Path):
        assert len(data.check_images([path])) == 1
    image = data.load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 4).round().astype(np.uint16).reshape(4, 64)
    expected = np.repeat((ramp / 65535 * 255)[..., None], 3, axis=2)
    assert abs(loaded(write_png(tmp_path / "png.png", ramp, 0)) - expected).max() <= 1
    Image.fromarray(ramp).save(tmp_path / "tiff.tif")
    assert abs(loaded(tmp_path / "tiff.tif") - expected).max() <= 1
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "wide.tif")
    assert Image.open(tmp_path / "wide.tif").mode == "I"
    assert abs(loaded(tmp_path / "wide.tif") - expected).max() <= 1


def test_16_bit_colour_is_scaled(tmp_path):
    colours = np.random.default_rng(0).integers(0, 65536, (5, 7, 3))
    assert abs(loaded(write_png(tmp_path / "x.png", colours, 2)) - colours / 65535 * 255).max() <= 1


def test_16_bit_colour_with_transparency_lies_on_white(tmp_path):
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, 4))
    alpha = samples[..., 3:] / 65535
    expected = alpha * samples[..., :3] / 65535 * 255 + (1 - alpha) * 255
    assert abs(loaded(write_png(tmp_path / "x.png", samples, 6)) - expected).max() <= 2


def test_grey_and_two_level_images_become_equal_channels(tmp_path, noise):
    grey = noise[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(loaded(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    assert Image.open(tmp_path / "bits.png").mode == "1"
    expected = np.where(grey > 127, 255, 0)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(loaded(tmp_path / "bits.png"), expected)


def test_palettes_are_looked_up_and_their_transparent_entry_is_white(tmp_path):
    palette = np.array([(200, 10, 20), (0, 255, 0), (9, 9, 9), (1, 2, 3)])
    codes = np.random.default_rng(0).integers(0, 4, (6, 8), dtype=np.uint8)
    image = Image.fromarray(codes).convert("P")
    image.putdata(codes.flatten().tolist())
    image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(tmp_path / "plain.png")
    assert Image.open(tmp_path / "plain.png").mode == "P"
    np.testing.assert_array_equal(loaded(tmp_path / "plain.png"), palette[codes])
    image.save(tmp_path / "clear.png", transparency=2)
    palette[2] = 255
    np.testing.assert_array_equal(loaded(tmp_path / "clear.png"), palette[codes])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_images_lie_on_white(tmp_path, mode):
    samples = np.random.default_rng(0).integers(0, 256, (9, 11, len(mode)), dtype=np.uint8)
    samples[0, :, -1], samples[1, :, -1] = 0, 255
    Image.fromarray(samples).save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").mode == mode
    alpha = samples[..., -1:] / 255
    expected = np.broadcast_to(alpha * samples[..., :-1] + (1 - alpha) * 255, (9, 11, 3))
    found = loaded(tmp_path / "x.png")
    assert abs(found - expected).max() <= 1
    assert (found[0] == 255).all()


def test_one_colour_declared_transparent_is_white(tmp_path, noise):
    noise = noise.copy()
    noise[3:5] = (1, 2, 3)
    Image.fromarray(noise).save(tmp_path / "x.png", transparency=(1, 2, 3))
    expected = noise.copy()
    expected[3:5] = 255
    np.testing.assert_array_equal(loaded(tmp_path / "x.png"), expected)


def test_cmyk_becomes_rgb(tmp_path):
    inks = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    Image.frombytes("CMYK", (11, 9), inks.tobytes()).save(tmp_path / "x.tif")
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert abs(loaded(tmp_path / "x.tif") - expected).max() <= 1


def test_cmyk_jpegs_are_not_inverted(tmp_path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    assert abs(loaded(tmp_path / "red.jpg") - (255, 0, 0)).max() <= 6


# EXIF orientation -> what a viewer does to the stored pixels (Exif 2.3, tag 274)
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(tmp_path, noise, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(noise).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "x.png"), UPRIGHT[orientation](noise))


def test_exif_rotation_is_applied_to_16_bit_and_palette_images_too(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    ramp = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(ramp).save(tmp_path / "deep.png", exif=exif)
    assert abs(loaded(tmp_path / "deep.png")[..., 0] - np.rot90(ramp, -1) / 65535 * 255).max() <= 1
    codes = (np.arange(12) * 20).astype(np.uint8).reshape(3, 4)
    Image.fromarray(codes).convert("P").save(tmp_path / "palette.png", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "palette.png")[..., 0], np.rot90(codes, -1))


def test_images_in_memory_are_taken_as_they_are_and_left_alone(noise):
    image = Image.fromarray(noise)
    np.testing.assert_array_equal(loaded(image), noise)
    np.testing.assert_array_equal(np.asarray(image), noise)


def test_floating_point_images_are_refused_before_training_and_when_loaded(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path)
    assert "1 of 1 images cannot be read: x.tif (floating-point pixels" in refusal(data.check_images, [path])
    assert "floating-point" in refusal(data.load_image, path)


KINDS = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {})]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_wherever_an_image_is_cut_the_check_finds_what_loading_would(tmp_path, noise, kind, options):
    whole = encoded(Image.fromarray(noise), kind, **options)
    refused = 0
    for length in [*range(0, len(whole), max(1, len(whole) // 25)), len(whole) - 1]:
        path = tmp_path / f"{length}.img"
        path.write_bytes(whole[:length])
        found = None
        try:
            data.check_images([path])
        except ValueError as error:
            found = str(error)
        if found is None:
            data.load_image(path)
        else:
            assert path.name in found
            refused += 1
    assert refused > 20
    (tmp_path / "whole.img").write_bytes(whole)
    assert data.check_images([tmp_path / "whole.img"])


def test_all_unreadable_images_are_counted_and_the_first_five_named(tmp_path, noise):
    whole = encoded(Image.fromarray(noise), "PNG")
    contents = [
        whole,
        b"",
        b"GIF89a",
        b"no image at all",
        whole[:200],
        whole,
        whole[:30],
        b"\xff\xd8\xff",
        b"PK\x03\x04",
    ]
    paths = [tmp_path / f"{number}.png" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    message = refusal(data.check_images, paths)
    assert message.startswith("7 of 9 images cannot be read: 1.png (not an image), 2.png (")
    assert ", 6.png (" in message and message.endswith("), ...")
    assert "0.png" not in message and "7.png" not in message
    assert " at 0x" not in message, "no addresses of objects"


def test_an_image_too_large_to_decode_is_refused(tmp_path, noise, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.fromarray(noise), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "bomb.png (Image size (600 pixels) exceeds limit" in refusal(data.check_images, [path])


# -- fingerprint


def test_the_fingerprint_changes_with_any_byte_and_with_nothing_else(make_dataset):
    files = make_dataset(scored_rows(2, 2))
    paths = read(files)["path"].tolist()

    def now() -> str:
        return data.fingerprint(files.csv, data.check_images(paths))

    first = now()
    assert first == now() and len(first) == 64
    files.csv.touch()
    assert now() == first
    content = paths[2].read_bytes()
    paths[2].write_bytes(content + b"\0")
    assert now() != first
    paths[2].write_bytes(content)
    assert now() == first
    files.csv.write_bytes(files.csv.read_bytes().replace(b"1.01", b"1.02"))
    assert now() != first


def test_hashes_are_those_of_the_files_in_their_order(make_dataset):
    paths = read(make_dataset(scored_rows(10, 3)))["path"].tolist()
    assert data.check_images(paths) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


# -- splits


def table_of(prompts: list[str], **columns: Any) -> pd.DataFrame:
    """A table as `read_table` returns it, as far as splits look at it."""
    count = len(prompts)
    table = pd.DataFrame({"name": [f"{i}.png" for i in range(count)], "prompt": prompts, "split": ""})
    table["row"] = np.arange(count) + 2
    return table.assign(**{"q": np.arange(count) / 2, "c": np.arange(count) / 3, **columns})


@st.composite
def prompt_tables(draw: st.DrawFn) -> tuple[pd.DataFrame, list[int]]:
    """A table in random order and the number of each row's prompt; equal prompts differ in case and blanks."""
    numbers = list(itertools.chain(*([i] * draw(st.integers(2, 4)) for i in range(draw(st.integers(3, 15))))))
    numbers = draw(st.permutations(numbers))
    forms = ["a red cat {}", "A Red CAT {}", " a  red\tcat {} "]
    return table_of([draw(st.sampled_from(forms)).format(number) for number in numbers]), numbers


@settings(max_examples=60, deadline=None)
@given(prompt_tables(), st.floats(0.05, 0.45), st.floats(0.05, 0.45), st.integers(0, 2**32 - 1))
def test_folds_share_no_prompt_have_their_sizes_and_follow_from_the_seed(drawn, test_size, val_size, seed):
    table, numbers = drawn
    count = len(set(numbers))
    sizes = {"test": max(1, round(count * test_size)), "val": max(1, round(count * val_size))}
    assume(sum(sizes.values()) < count)
    options = {"split_by": "prompt", "test_size": test_size, "val_size": val_size, "seed": seed}
    folds = data.assign_folds(table, **options)
    prompts = {fold: {number for number, of in zip(numbers, folds, strict=True) if of == fold} for fold in data.FOLDS}
    assert sum(map(len, prompts.values())) == count == len(set.union(*prompts.values()))
    assert {fold: len(prompts[fold]) for fold in sizes} == sizes
    np.testing.assert_array_equal(folds, data.assign_folds(table, **options))


@pytest.mark.parametrize("split_by", ["prompt", "image"])
def test_other_seeds_draw_other_folds(split_by):
    table = table_of([f"thing {i // 2}" for i in range(40)])
    drawn = {tuple(data.assign_folds(table, **{**SPLIT, "split_by": split_by, "seed": seed})) for seed in range(8)}
    assert len(drawn) == 8


def test_folds_of_images_have_their_sizes_and_need_no_prompts():
    table = table_of([""] * 40, c=np.nan)
    folds = data.assign_folds(table, split_by="image", test_size=0.2, val_size=0.1, seed=3)
    assert {fold: int((folds == fold).sum()) for fold in data.FOLDS} == {"train": 28, "val": 4, "test": 8}


def test_folds_of_images_may_share_prompts_and_folds_of_prompts_may_not():
    table = table_of([f"thing {i % 5}" for i in range(40)])
    by_image = data.assign_folds(table, **{**SPLIT, "split_by": "image"})
    assert table.groupby("prompt")["name"].agg(lambda rows: len(set(by_image[rows.index]))).max() > 1
    by_prompt = data.assign_folds(table, **SPLIT)
    assert table.groupby("prompt")["name"].agg(lambda rows: len(set(by_prompt[rows.index]))).max() == 1


def test_the_split_column_wins_over_every_option(make_dataset):
    rows = scored_rows(6, 2)
    given = ["train", "test", "val"] * 4
    for row, fold in zip(rows, given, strict=True):
        row["split"] = fold
    table = read(make_dataset(rows))
    for seed, split_by in itertools.product((0, 1), ("prompt", "image")):
        folds = data.assign_folds(table, **{**SPLIT, "seed": seed, "split_by": split_by})
        assert folds.tolist() == given


def test_an_empty_split_column_is_none():
    table = table_of([f"thing {i // 2}" for i in range(20)])
    assert set(data.assign_folds(table, **SPLIT)) == set(data.FOLDS)


@pytest.mark.parametrize("wrong", ["", "training", "Test", "0"])
def test_an_unknown_fold_is_refused_by_row(wrong):
    table = table_of(["a"] * 8, split=["train", "train", "val", wrong, "val", "test", wrong, "test"])
    message = refusal(data.assign_folds, table, **SPLIT)
    assert f"row 5: split is {wrong!r}, must be train, val or test; 2 such row(s)" in message


@pytest.mark.parametrize("missing", data.FOLDS)
def test_a_split_column_that_leaves_a_fold_empty_is_refused(missing):
    others = [fold for fold in data.FOLDS if fold != missing]
    message = refusal(data.assign_folds, table_of(["a"] * 8, split=others * 4), **SPLIT)
    assert f"the {missing} fold has 0 image(s)" in message


@pytest.mark.parametrize("task", ["q", "c"])
def test_every_fold_needs_two_scores_of_each_task(task):
    split = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    scores = np.arange(8.0)
    scores[5] = np.nan
    message = refusal(data.assign_folds, table_of(["a"] * 8, split=split, **{task: scores}), **SPLIT)
    assert f"the val fold has 1 image(s) with a {data.TASKS[task]} score, needs at least 2" in message
    assert data.assign_folds(table_of(["a"] * 8, split=split, **{task: np.nan}), **SPLIT).tolist() == split


@pytest.mark.parametrize("prompts", [["a"], ["a"] * 9, ["a", "A ", " a"], ["a", "b"] * 6])
def test_too_few_prompts_for_three_folds_are_refused_with_their_number(prompts):
    message = refusal(data.assign_folds, table_of(prompts), **SPLIT)
    assert message.startswith(f"{len({prompt.strip().lower() for prompt in prompts})} prompt(s)")
    assert "--test_size 0.25" in message and "--val_size 0.25" in message


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_for_three_folds_are_refused_with_their_number(count):
    message = refusal(data.assign_folds, table_of(["a"] * count), **{**SPLIT, "split_by": "image"})
    assert message.startswith(f"{count} image(s) cannot fill three folds")


def test_sizes_that_leave_no_training_prompt_are_refused():
    table = table_of([f"thing {i // 3}" for i in range(12)])
    assert "4 prompt(s)" in refusal(data.assign_folds, table, split_by="prompt", test_size=0.5, val_size=0.45, seed=0)


def test_splitting_by_prompt_needs_a_prompt_in_every_row():
    message = refusal(data.assign_folds, table_of(["a", "b", "", "c"], c=np.nan), **SPLIT)
    assert "row 4" in message and "--split_by image" in message


# -- label scales


@settings(deadline=None)
@given(st.floats(-100, 100), st.floats(0.01, 100), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_scores_survive_the_way_to_label_units_and_back(low, width, shares):
    scale = data.LabelScale(low, low + width)
    mos = low + width * np.array(shares)
    np.testing.assert_allclose(scale.to_mos(scale.to_unit(mos)), mos, atol=1e-9)
    np.testing.assert_allclose(scale.to_unit(mos), shares, atol=1e-9 * max(1, (abs(low) + width) / width))


def test_only_what_people_see_is_clamped():
    scale = data.LabelScale(1.0, 5.0)
    assert scale.to_unit(np.array([0.0, 1.0, 3.0, 5.0, 7.0])).tolist() == [-0.25, 0.0, 0.5, 1.0, 1.5]
    mos = scale.to_mos(np.array([-0.25, 0.0, 0.5, 1.0, 1.5]))
    assert mos.tolist() == [0.0, 1.0, 3.0, 5.0, 7.0]
    assert scale.clamp(mos).tolist() == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert np.isnan(scale.to_unit(np.array([math.nan]))).all() and np.isnan(scale.to_mos(np.array([math.nan]))).all()


def test_the_scale_comes_from_the_training_fold_alone_and_passes_over_gaps():
    folds = np.array(["train", "val", "train", "test", "train"])
    mos = np.array([2.0, 0.0, 4.0, 9.0, np.nan])
    assert data.label_scale(mos, folds, None, "--mos_range_q") == data.LabelScale(2.0, 4.0)


def test_a_given_range_is_the_scale_and_its_ends_belong_to_it():
    folds = np.array(["train", "val", "test"])
    found = data.label_scale(np.array([1.0, np.nan, 5.0]), folds, (1.0, 5.0), "--mos_range_q")
    assert found == data.LabelScale(1.0, 5.0)


def test_scores_outside_a_given_range_are_refused_with_their_number():
    folds = np.array(["train", "val", "test", "train"])
    message = refusal(data.label_scale, np.array([1.0, 0.5, 5.5, np.nan]), folds, (1.0, 5.0), "--mos_range_c")
    assert message.startswith("--mos_range_c 1.0 5.0: 2 score(s) lie outside, such as 0.5")


def test_equal_training_scores_are_refused_unless_a_range_is_given():
    folds, mos = np.array(["train", "train", "val"]), np.array([3.0, 3.0, 4.0])
    message = refusal(data.label_scale, mos, folds, None, "--mos_range_q")
    assert "every training score is 3.0" in message and "--mos_range_q" in message
    assert data.label_scale(mos, folds, (1.0, 5.0), "--mos_range_q").high == 5.0


# -- the whole


def test_examples_hold_what_the_files_say(make_dataset):
    rows = scored_rows()
    rows[0]["mos_quality"] = ""
    files = make_dataset(rows)
    examples = data.load_examples(files.csv, files.images, USUAL, **SPLIT, ranges={"q": (1.0, 5.0), "c": None})
    assert sorted(np.concatenate([examples.rows(fold) for fold in data.FOLDS])) == list(range(len(rows)))
    assert examples.scales["q"] == data.LabelScale(1.0, 5.0)
    train = [rows[i]["mos_align"] for i in examples.rows("train")]
    assert examples.scales["c"] == data.LabelScale(min(train), max(train))
    assert examples.mos("c", "val").tolist() == [rows[i]["mos_align"] for i in examples.rows("val")]
    units = examples.unit_targets
    assert np.isnan(units["q"]).tolist() == [True] + [False] * (len(rows) - 1)
    assert units["q"][5] == pytest.approx((rows[5]["mos_quality"] - 1) / 4)
    assert examples.train_means["c"] == pytest.approx((np.mean(train) - min(train)) / (max(train) - min(train)))
    assert examples.fingerprint == data.fingerprint(files.csv, data.check_images(examples.table["path"].tolist()))


def test_unreadable_images_are_found_while_reading_the_data_set(make_dataset):
    files = make_dataset(scored_rows())
    (files.images / "gen1_3.png").write_bytes(b"")
    message = refusal(data.load_examples, files.csv, files.images, USUAL, **SPLIT, ranges=NO_RANGES)
    assert message == "1 of 24 images cannot be read: gen1_3.png (not an image)"


def test_the_demo_set_is_a_data_set(demo_set):
    examples = data.load_examples(*demo_set, USUAL, **SPLIT, ranges={"q": (1.0, 5.0), "c": (1.0, 5.0)})
    assert len(examples.table) == 64 and examples.table["prompt"].nunique() == 8
    assert {fold: len(examples.rows(fold)) for fold in data.FOLDS} == {"train": 32, "val": 16, "test": 16}
    assert (examples.table["explanation"] != "").any() and examples.table["group"].nunique() == 8


def test_agiqa_3k_is_a_data_set(agiqa_dir):
    table = data.read_table(agiqa_dir / "data.csv", agiqa_dir / "images", USUAL)
    assert not table[["q", "c"]].isna().any(axis=None)
    assert table["q"].between(0, 5).all() and table["c"].between(0, 5).all()
    assert {"AttnGAN_normal", "DALLE2_normal", "midjourney_normal", "sd1.5_highcorr"} <= set(table["group"])
    assert "" not in set(table["group"])
    folds = data.assign_folds(table, split_by="prompt", test_size=0.2, val_size=0.1, seed=42)
    plain = table["prompt"].str.lower().str.split().str.join(" ")
    assert pd.Series(folds).groupby(plain).nunique().max() == 1
    assert abs((folds == "test").mean() - 0.2) < 0.05
    assert data.check_images(table["path"].tolist()[::300])


# -- views of images


def image_set(paths: list[Any], **options: Any) -> data.ImageSet:
    return data.ImageSet(paths, **{"image_size": 32, "crop_scale_min": 0.5, "seed": 1, **options})


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(60, 40), (40, 60), (33, 33), (20, 90), (50, 50), (32, 32)]
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def test_the_evaluation_view_is_open_clips_own_after_normalisation():
    rng = np.random.default_rng(0)
    sizes = [(300, 260), (256, 256), (224, 224), (100, 180), (341, 512)]
    # Smooth pictures and noise: noise alone would hide a shift, smooth ones alone another filter.
    small = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size) for size in sizes]
    noisy = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    images = [*small, *noisy]
    mean, std = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
    feed = data.Feed(device=torch.device("cpu"), mean=mean, std=std, targets={}, prompts=None)
    views = image_set(images, image_size=224)
    pixels = torch.stack([views[None, index][0] for index in range(len(images))])
    (batch,) = feed.batches([(pixels, torch.arange(len(images)))])
    transform = open_clip.image_transform(224, is_train=False)
    expected = torch.stack([transform(image) for image in images])
    assert batch.images_B3SS.shape == expected.shape and batch.images_B3SS.dtype == torch.float32
    difference = (batch.images_B3SS - expected).abs() * torch.tensor(std).view(1, 3, 1, 1)
    assert difference.max() <= 1 / 255


def test_a_training_view_depends_on_seed_epoch_and_index_alone(pictures):
    views = image_set(pictures)
    keys = list(itertools.product(range(3), range(len(pictures))))
    first = {key: views[key][0] for key in keys}
    again = image_set(pictures)
    torch.manual_seed(123)
    for key in reversed(keys):
        assert torch.equal(again[key][0], first[key]), key
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in first.values())


def test_training_views_differ_between_epochs_indices_and_seeds():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    views = image_set([picture] * 4)
    drawn = [views[key][0] for key in itertools.product(range(4), range(4))]
    drawn += [image_set([picture], seed=seed)[0, 0][0] for seed in (2, 3)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


def test_drawing_a_view_leaves_the_global_random_state_alone(pictures):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    image_set(pictures)[0, 0]
    assert torch.equal(torch.rand(3), expected)


def test_the_evaluation_view_does_not_depend_on_the_seed(pictures):
    one, other = image_set(pictures, seed=1), image_set(pictures, seed=2)
    assert all(torch.equal(one[None, index][0], other[None, index][0]) for index in range(len(pictures)))


def test_training_views_keep_the_least_share_of_the_area():
    # A picture whose colours are coordinates tells how much of it a view shows.
    across = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    picture = Image.fromarray(np.stack([across, across.T, across], axis=2))
    views = image_set([picture], crop_scale_min=0.8)
    for epoch in range(30):
        view = views[epoch, 0][0].float()
        spans = [(view[channel].max() - view[channel].min() + 8) / 256 for channel in (0, 1)]
        assert spans[0] * spans[1] > 0.75


def collect(loader) -> list[tuple[list[int], torch.Tensor]]:
    return [(rows.tolist(), pixels) for pixels, rows in loader]


def test_batches_are_the_same_whatever_the_number_of_workers(demo_set):
    paths = sorted(demo_set[1].iterdir())[:10]
    batches = {}
    for num_workers in (0, 2):
        loader = data.image_loader(
            image_set(paths), np.arange(10), batch_size=4, shuffle=True, num_workers=num_workers, pin_memory=False
        )
        batches[num_workers] = [collect(loader), collect(loader)]  # two epochs
    for alone, shared in zip(batches[0], batches[2], strict=True):
        assert [rows for rows, _ in alone] == [rows for rows, _ in shared]
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(alone, shared, strict=True))
    first, second = (
        {row: view for rows, views in epoch for row, view in zip(rows, views, strict=True)} for epoch in batches[0]
    )
    assert first.keys() == second.keys() == set(range(10))
    assert not any(torch.equal(first[row], second[row]) for row in range(10)), "each epoch has its own augmentation"


def test_the_last_batch_is_kept_and_evaluation_goes_in_order(pictures):
    loader = data.image_loader(
        image_set(pictures), np.array([5, 0, 3, 2, 1]), batch_size=2, shuffle=False, num_workers=0, pin_memory=False
    )
    assert [rows for rows, _ in collect(loader)] == [[5, 0], [3, 2], [1]] == [rows for rows, _ in collect(loader)]


def test_each_index_comes_once_per_epoch_in_an_order_of_its_own():
    indices = np.array([3, 1, 4, 15, 9, 2, 6, 5, 35, 8])
    order = data.EpochOrder(indices, seed=1, shuffle=True)
    epochs = [list(order) for _ in range(4)]
    for number, epoch in enumerate(epochs):
        assert {key[0] for key in epoch} == {number}
        assert sorted(index for _, index in epoch) == sorted(indices)
    assert len(order) == len(indices)
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 4
    assert list(data.EpochOrder(indices, seed=1, shuffle=True)) == epochs[0]
    assert list(data.EpochOrder(indices, seed=2, shuffle=True)) != epochs[0]


def test_without_shuffling_every_pass_is_the_evaluation_view_in_order():
    order = data.EpochOrder(np.array([3, 1, 4]), seed=1, shuffle=False)
    assert list(order) == [(None, 3), (None, 1), (None, 4)] == list(order)


# -- batches


def letters(texts) -> torch.Tensor:
    """A tokenizer for tests: codes of the first three letters, padded with 0."""
    return torch.tensor([[ord(letter) for letter in text[:3].ljust(3, "\0")] for text in texts])


def test_a_text_table_tokenises_each_text_once_and_gives_a_batch_its_distinct_ones():
    asked: list[str] = []

    def tokenize(texts) -> torch.Tensor:
        asked.extend(texts)
        return letters(texts)

    texts = ["cat", "dog", "cat", "", "fox", "dog"]
    table = data.TextTable(texts, tokenize, torch.device("cpu"))
    assert sorted(asked) == sorted(set(texts))
    rows = torch.tensor([5, 0, 1, 2, 5])
    tokens_PN, prompt_of_B = table.select(rows)
    assert len(tokens_PN) == 2
    assert torch.equal(tokens_PN[prompt_of_B], letters([texts[row] for row in rows]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["cat", "dog", "fox", "猫", ""]), min_size=1, max_size=12), st.data())
def test_any_batch_of_texts_maps_back_to_its_rows(texts, drawn):
    rows = drawn.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=12))
    tokens_PN, prompt_of_B = data.TextTable(texts, letters, torch.device("cpu")).select(torch.tensor(rows))
    expected = [texts[row] for row in rows]
    assert len(tokens_PN) == len(set(expected))
    assert torch.equal(tokens_PN[prompt_of_B], letters(expected))


def test_a_feed_turns_loader_output_into_normalised_images_labels_and_texts():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    prompts, reasons = ["cat", "dog", "cat", "fox"], ["", "dim", "", "raw"]
    targets = {"q": np.array([0.1, 0.2, np.nan, 0.4]), "c": np.array([np.nan, 0.6, 0.7, 0.8])}
    device = torch.device("cpu")
    present = np.array([bool(text) for text in reasons])
    feed = data.Feed(
        device=device,
        mean=mean,
        std=std,
        targets=targets,
        prompts=data.TextTable(prompts, letters, device),
        rationales=(data.TextTable(reasons, letters, device), present),
    )
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 5, 5), dtype=np.uint8))
    rows = torch.tensor([2, 3, 0])
    (batch,) = feed.batches([(pixels, rows)])
    assert len(batch) == 3
    expected = (pixels.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(batch.images_B3SS.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(batch.targets["q"].numpy(), [np.nan, 0.4, 0.1], rtol=1e-6)
    np.testing.assert_allclose(batch.targets["c"].numpy(), [0.7, 0.8, np.nan], rtol=1e-6)
    assert batch.tokens_PN is not None and batch.prompt_of_B is not None and batch.has_rationale_B is not None
    assert len(batch.tokens_PN) == 2
    assert torch.equal(batch.tokens_PN[batch.prompt_of_B], letters(["cat", "fox", "cat"]))
    assert batch.has_rationale_B.tolist() == [False, True, False]
    assert torch.equal(batch.rationale_tokens_RN, letters(["raw"]))


def test_a_feed_without_texts_has_none():
    feed = data.Feed(device=torch.device("cpu"), mean=[0] * 3, std=[1] * 3, targets={}, prompts=None)
    (batch,) = feed.batches([(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([0]))])
    assert batch.tokens_PN is batch.prompt_of_B is batch.rationale_tokens_RN is batch.has_rationale_B is None
    assert batch.targets == {}
