"""`labels`: label files in the forms they are downloaded in, read into one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.io import savemat

from configs import DATASET_NAMES
from sources.labels import COLUMNS, DATASETS, TEXTS, read_dataset

NAN = float("nan")
TYPES = {column: object if column in TEXTS else float for column in COLUMNS}


def put_images(root: Path, *names: str) -> None:
    """A tiny picture under each name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (200, 30, 30)).save(root / name)


def put_text(path: Path, *lines: str, newline: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + newline for line in lines).encode())


def put_excel(path: Path, columns: Sequence[str] | None, *rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows), columns=columns).to_excel(path, index=False, header=columns is not None)


def cell_array(*names: str) -> np.ndarray:
    """A column of texts as MATLAB keeps them."""
    cells = np.empty((len(names), 1), dtype=object)
    cells[:, 0] = names
    return cells


def agiqa_3k(root: Path) -> list[dict[str, object]]:
    put_text(
        root / "data.csv",
        "name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align",
        "AttnGAN_normal_000.jpg,statue of a man,,,,0.965602553,0.223270101,0.40889324,0.615607722",
        'sd1.5_lowcorr_001.jpg,"a man, None",sharp,,anime style,1.5,0.5,2.5,',
        newline="\r\n",
    )
    put_images(root / "images", "AttnGAN_normal_000.jpg", "sd1.5_lowcorr_001.jpg")
    first = {"q": 0.965602553, "c": 0.40889324, "q_std": 0.223270101, "c_std": 0.615607722}
    return [
        {
            "name": "images/AttnGAN_normal_000.jpg",
            "prompt": "statue of a man",
            "group": "AttnGAN_normal",
            **first,
        },
        {
            "name": "images/sd1.5_lowcorr_001.jpg",
            "prompt": "a man, None",
            "group": "sd1.5_lowcorr",
            "q": 1.5,
            "c": 2.5,
            "q_std": 0.5,
        },
    ]


def agiqa_1k(root: Path) -> list[dict[str, object]]:
    prompt = "bird, driving aircraft, city, anime style"
    rows = [("deepai_0_0_0_0.jpg", prompt, 2.793411), ("sd_0_0_0_1.jpg", "NA", 3)]
    put_excel(root / "AIGC_MOS_Zscore.xlsx", ["Image", "Prompt", "MOS"], *rows)
    put_images(root / "file", "deepai_0_0_0_0.jpg", "sd_0_0_0_1.jpg")
    return [
        {"name": "file/deepai_0_0_0_0.jpg", "prompt": prompt, "q": 2.793411, "group": "deepai"},
        {"name": "file/sd_0_0_0_1.jpg", "prompt": "NA", "q": 3.0, "group": "sd"},
    ]


def aigciqa2023_joined(root: Path) -> list[dict[str, object]]:
    put_text(
        root / "AIGCIQA2023.csv",
        ",name,prompt,style,class,quality_mos,authenticity_mos,correspondence_mos,"
        "quality_std,authenticity_std,correspondence_std",
        "0,0.png,a corgi,Basic,Animals,60.164,47.246,59.986,0.885,1.261,1.356",
        "1,1.png,a corgi,Basic,Animals,30.5,40.5,50.5,1,2,3",
    )
    put_images(root / "Image" / "allimg", "0.png", "1.png")
    first = {"q": 60.164, "authenticity": 47.246, "c": 59.986, "q_std": 0.885, "c_std": 1.356}
    second = {"q": 30.5, "authenticity": 40.5, "c": 50.5, "q_std": 1.0, "c_std": 3.0}
    return [
        {"name": "Image/allimg/0.png", "prompt": "a corgi", **first},
        {"name": "Image/allimg/1.png", "prompt": "a corgi", **second},
    ]


def aigciqa2023_circulated(root: Path) -> list[dict[str, object]]:
    put_text(
        root / "labels.csv",
        "model,image_name,mosz1,mosz2,mosz3,prompt",
        'Controlnet,000-1.png,3.0082,2.3623,2.9993,"""a corgi"""',
        'DALLE,000-2.png,1.525,2.025,2.525,"""a corgi"""',
    )
    put_images(root / "Image", "Controlnet/000-1.png", "DALLE/000-2.png")
    rows = [("Controlnet/000-1.png", 60.164, 47.246, 59.986), ("DALLE/000-2.png", 30.5, 40.5, 50.5)]
    return [
        {
            "name": f"Image/{name}",
            "prompt": "a corgi",
            "q": q,
            "authenticity": a,
            "c": c,
            "group": name.partition("/")[0],
        }
        for name, q, a, c in rows
    ]


def aigciqa2023_official(root: Path) -> list[dict[str, object]]:
    put_excel(root / "pic-index.xlsx", None, ("Controlnet", "000-1.png"), ("DALLE", "000-2.png"))
    (root / "DATA" / "MOS").mkdir(parents=True)
    for number, values in enumerate(([60.164, 30.5], [47.246, 40.5], [59.986, 50.5]), start=1):
        savemat(root / "DATA" / "MOS" / f"mosz{number}.mat", {"MOSz": np.array(values)[:, None]})
    put_images(root / "Image", "Controlnet/000-1.png", "DALLE/000-2.png")
    rows = [("Controlnet/000-1.png", 60.164, 47.246, 59.986), ("DALLE/000-2.png", 30.5, 40.5, 50.5)]
    return [
        {"name": f"Image/{name}", "q": q, "authenticity": a, "c": c, "group": name.partition("/")[0]}
        for name, q, a, c in rows
    ]


def aigiqa_20k(root: Path) -> list[dict[str, object]]:
    put_text(root / "info_train.csv", 'DALLE2_0000.png,"A gopnik, sitting",3.6638868235', "SDXL_0001.png,a cat,2.5")
    put_text(root / "info_val.csv", "DALLE2_0002.png,a dog,", "SDXL_0003.png,a bird,1.25")
    put_text(root / "info_test.csv", "DALLE2_0004.png,a fish")
    put_images(root, "train/DALLE2_0000.png", "train/SDXL_0001.png", "val/DALLE2_0002.png", "val/SDXL_0003.png")
    return [
        {
            "name": "train/DALLE2_0000.png",
            "prompt": "A gopnik, sitting",
            "q": 3.6638868235,
            "group": "DALLE2",
            "split": "train",
        },
        {"name": "train/SDXL_0001.png", "prompt": "a cat", "q": 2.5, "group": "SDXL", "split": "train"},
        {"name": "val/SDXL_0003.png", "prompt": "a bird", "q": 1.25, "group": "SDXL", "split": "val"},
    ]


def aigiqa_20k_workbook(root: Path) -> list[dict[str, object]]:
    rows = [("DALLE2_0000.png", "a cat", 3.5), ("SDXL_0001.png", "a dog", None)]
    put_excel(root / "mos.xlsx", ["name", "prompt", "mos"], *rows)
    put_images(root / "all", "DALLE2_0000.png", "SDXL_0001.png")
    return [{"name": "all/DALLE2_0000.png", "prompt": "a cat", "q": 3.5, "group": "DALLE2"}]


def pku_aigiqa_4k(root: Path) -> list[dict[str, object]]:
    columns = ["image_prompt", "text_prompt", "generated_image", "mos_q", "mos_a", "mos_c"]
    rows = [(None, "a cat", "MJ_text_0001.png", 3.5, 2.5, 1.5), ("ref.png", "a dog", "SD_image_0002.png", 4, 3, 2)]
    put_excel(root / "annotation.xlsx", columns, *rows)
    put_images(root / "generated_images", "MJ_text_0001.png", "SD_image_0002.png")
    first = {"prompt": "a cat", "q": 3.5, "authenticity": 2.5, "c": 1.5, "group": "MJ_text"}
    second = {"prompt": "a dog", "q": 4.0, "authenticity": 3.0, "c": 2.0, "group": "SD_image"}
    return [
        {"name": "generated_images/MJ_text_0001.png", **first},
        {"name": "generated_images/SD_image_0002.png", **second},
    ]


def evalmuse_40k(root: Path) -> list[dict[str, object]]:
    rows = [
        {
            "prompt_id": "00110",
            "prompt": "a cat on a mat",
            "img_path": "SDXL-Turbo/00110.png",
            "total_score": [4, 3, 2],
            "element_score": {"cat (animal)": 1.0},
            "promt_meaningless": [0, 0, 0],
        },
        {"prompt_id": "00111", "prompt": "a dog", "img_path": "PixArt/00111.png", "total_score": [5]},
    ]
    (root / "train_list.json").write_text(json.dumps(rows), encoding="utf-8")
    put_images(root / "images", "SDXL-Turbo/00110.png", "PixArt/00111.png")
    first = {"prompt": "a cat on a mat", "c": 3.0, "c_std": np.sqrt(2 / 3), "group": "SDXL-Turbo"}
    return [
        {"name": "images/SDXL-Turbo/00110.png", **first},
        {"name": "images/PixArt/00111.png", "prompt": "a dog", "c": 5.0, "group": "PixArt"},
    ]


def koniq_10k(root: Path) -> list[dict[str, object]]:
    put_text(
        root / "koniq10k_scores_and_distributions.csv",
        '"image_name","c1","c2","c3","c4","c5","c_total","MOS","SD","MOS_zscore"',
        '"10004473376.jpg",0,0,25,73,7,105,3.828571429,0.527278894,82.80880152',
    )
    put_images(root / "512x384", "10004473376.jpg")
    return [{"name": "512x384/10004473376.jpg", "q": 3.828571429, "q_std": 0.527278894}]


def kadid_10k(root: Path) -> list[dict[str, object]]:
    put_text(root / "dmos.csv", "dist_img,ref_img,dmos,var", "I01_01_01.png,I01.png,4.57,0.25", newline="\r\n")
    put_images(root / "images", "I01_01_01.png")
    return [{"name": "images/I01_01_01.png", "q": 4.57, "q_std": 0.5, "unit": "I01.png"}]


def tid2013(root: Path) -> list[dict[str, object]]:
    put_text(root / "mos_with_names.txt", "5.51429 I01_01_1.bmp", "4.1 i02_24_5.bmp", newline="\r\n")
    put_images(root / "distorted_images", "I01_01_1.bmp", "i02_24_5.bmp")
    return [
        {"name": "distorted_images/I01_01_1.bmp", "q": 5.51429, "unit": "I01"},
        {"name": "distorted_images/i02_24_5.bmp", "q": 4.1, "unit": "I02"},
    ]


def spaq(root: Path) -> list[dict[str, object]]:
    columns = ["Image name", "MOS", "Brightness", "Colorfulness"]
    put_excel(root / "Annotations" / "MOS and Image attribute scores.xlsx", columns, ("00001.jpg", 35.08, 47.7, 40.3))
    put_images(root / "TestImage", "00001.jpg")
    return [{"name": "TestImage/00001.jpg", "q": 35.08}]


def live_challenge(root: Path) -> list[dict[str, object]]:
    (root / "Data").mkdir()
    savemat(root / "Data" / "AllImages_release.mat", {"AllImages_release": cell_array("3.bmp", "t1.bmp", "10.bmp")})
    savemat(root / "Data" / "AllMOS_release.mat", {"AllMOS_release": np.array([[63.96, 25.34, 48.5]])})
    put_images(root / "Images", "3.bmp", "trainingImages/t1.bmp", "10.bmp")
    return [
        {"name": "Images/3.bmp", "q": 63.96},
        {"name": "Images/trainingImages/t1.bmp", "q": 25.34},
        {"name": "Images/10.bmp", "q": 48.5},
    ]


FORMS: list[tuple[str, Callable[[Path], list[dict[str, object]]]]] = [
    ("agiqa-3k", agiqa_3k),
    ("agiqa-1k", agiqa_1k),
    ("aigciqa2023", aigciqa2023_joined),
    ("aigciqa2023", aigciqa2023_circulated),
    ("aigciqa2023", aigciqa2023_official),
    ("aigiqa-20k", aigiqa_20k),
    ("aigiqa-20k", aigiqa_20k_workbook),
    ("pku-aigiqa-4k", pku_aigiqa_4k),
    ("evalmuse-40k", evalmuse_40k),
    ("koniq-10k", koniq_10k),
    ("kadid-10k", kadid_10k),
    ("tid2013", tid2013),
    ("spaq", spaq),
    ("live-challenge", live_challenge),
]


@pytest.mark.parametrize(("name", "write"), FORMS, ids=[write.__name__ for _, write in FORMS])
def test_a_label_file_gives_the_common_table(tmp_path, name, write):
    rows = write(tmp_path)
    expected = pd.DataFrame(
        [{column: row.get(column, "" if column in TEXTS else NAN) for column in COLUMNS} for row in rows]
    )
    found = read_dataset(name, tmp_path)
    # Texts are held as Python's in one release of pandas and as Arrow's in another.
    pd.testing.assert_frame_equal(found.astype(dict.fromkeys(TEXTS, object)), expected.astype(TYPES), rtol=1e-12)
    assert all((tmp_path / image).is_file() for image in found["name"])


@pytest.mark.parametrize(("name", "write"), FORMS, ids=[write.__name__ for _, write in FORMS])
def test_the_tasks_with_a_range_are_those_with_scores_and_hold_them(tmp_path, name, write):
    write(tmp_path)
    found = read_dataset(name, tmp_path)
    ranges = DATASETS[name].ranges
    assert set(ranges) == {task for task in ("q", "c", "authenticity") if found[task].notna().any()}
    assert all(found[task].between(low, high).all() for task, (low, high) in ranges.items())


def test_the_three_forms_of_aigciqa2023_give_the_same_scores(tmp_path):
    found = []
    for write in (aigciqa2023_joined, aigciqa2023_circulated, aigciqa2023_official):
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
        found.append(read_dataset("aigciqa2023", tmp_path / write.__name__)[["q", "c", "authenticity"]])
    assert len(found[0]) == 2
    pd.testing.assert_frame_equal(found[0], found[1], rtol=1e-12)
    pd.testing.assert_frame_equal(found[0], found[2], rtol=1e-12)


def test_every_data_set_is_written_by_a_test():
    assert set(DATASETS) == {name for name, _ in FORMS}


def test_the_real_agiqa_3k_is_read(agiqa_dir):
    found = read_dataset("agiqa-3k", agiqa_dir)
    assert len(found) == 2382
    assert found["group"].nunique() == 10
    assert found[["q", "c", "q_std", "c_std"]].notna().all(axis=None)
    assert found[["q", "c"]].stack().between(0, 5).all()
    assert found["name"].is_unique
    assert all((agiqa_dir / name).is_file() for name in found["name"])


def test_a_folder_without_the_first_image_is_passed_over(tmp_path):
    koniq_10k(tmp_path)
    put_images(tmp_path / "1024x768", "another.jpg")
    assert read_dataset("koniq-10k", tmp_path)["name"].tolist() == ["512x384/10004473376.jpg"]
    put_images(tmp_path / "1024x768", "10004473376.jpg")
    assert read_dataset("koniq-10k", tmp_path)["name"].tolist() == ["1024x768/10004473376.jpg"]


def test_images_may_lie_beside_the_labels(tmp_path):
    tid2013(tmp_path)
    (tmp_path / "distorted_images" / "I01_01_1.bmp").rename(tmp_path / "I01_01_1.bmp")
    assert read_dataset("tid2013", tmp_path)["name"].tolist() == ["I01_01_1.bmp", "i02_24_5.bmp"]


def test_a_row_without_a_score_stays_where_none_is_withheld(tmp_path):
    put_text(tmp_path / "dmos.csv", "dist_img,ref_img,dmos,var", "a.png,r.png,,", "b.png,r.png,3,1")
    put_images(tmp_path / "images", "a.png", "b.png")
    found = read_dataset("kadid-10k", tmp_path)
    assert found["name"].tolist() == ["images/a.png", "images/b.png"]
    np.testing.assert_array_equal(found["q"], [NAN, 3.0])


def message(name: str, root: Path) -> str:
    """What is said of a folder that cannot be read, which must be one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        read_dataset(name, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    assert message("AGIQA3K", tmp_path).startswith("--dataset AGIQA3K: did you mean agiqa-3k")
    assert all(name in message("zzz", tmp_path) for name in DATASETS)


def test_a_missing_folder_is_named(tmp_path):
    assert message("spaq", tmp_path / "gone") == f"{tmp_path / 'gone'}: no such folder"


@pytest.mark.parametrize("name", DATASETS)
def test_without_a_label_file_those_looked_for_are_named(tmp_path, name):
    said = message(name, tmp_path)
    assert said.startswith(f"{tmp_path}: no label file of {DATASETS[name].title}")
    assert all(file in said for file in DATASETS[name].files)


@pytest.mark.parametrize(
    ("name", "file", "column"),
    [
        ("agiqa-3k", "data.csv", "mos_align"),
        ("agiqa-1k", "AIGC_MOS_Zscore.xlsx", "Prompt"),
        ("aigciqa2023", "any.csv", "quality_mos"),
        ("aigiqa-20k", "any.xlsx", "mos"),
        ("pku-aigiqa-4k", "annotation.xlsx", "mos_a"),
        ("evalmuse-40k", "train_list.json", "total_score"),
        ("koniq-10k", "koniq10k_scores_and_distributions.csv", "SD"),
        ("kadid-10k", "dmos.csv", "ref_img"),
        ("spaq", "MOS and Image attribute scores.xlsx", "Image name"),
        ("live-challenge", "AllImages_release.mat", "AllImages_release"),
    ],
)
def test_a_missing_column_is_named_with_its_file(tmp_path, name, file, column):
    if file.endswith(".csv"):
        put_text(tmp_path / file, "a,b", "1,2")
    elif file.endswith(".xlsx"):
        put_excel(tmp_path / file, ["a", "b"], (1, 2))
    elif file.endswith(".json"):
        (tmp_path / file).write_text('[{"a": 1}]')
    else:
        for each in ("AllImages_release.mat", "AllMOS_release.mat"):
            savemat(tmp_path / each, {"a": [1.0]})
    said = message(name, tmp_path)
    assert file in said
    assert repr(column) in said


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00 not what it says \x80" * 9, b'a,b\n1,2\n"3,4,5\n6,7,8,9'])
@pytest.mark.parametrize("name", [name for name in DATASETS if name != "live-challenge"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    file = DATASETS[name].files[0].replace("*", "any")
    (tmp_path / file).write_bytes(content)
    assert message(name, tmp_path).startswith(f"{tmp_path / file}: ")


@pytest.mark.parametrize("content", [b"", b"not MATLAB's" * 99])
def test_a_matlab_file_that_cannot_be_read_is_named(tmp_path, content):
    live_challenge(tmp_path)
    (tmp_path / "Data" / "AllImages_release.mat").write_bytes(content)
    assert message("live-challenge", tmp_path).startswith(f"{tmp_path / 'Data' / 'AllImages_release.mat'}: cannot be")


def test_the_second_of_two_label_files_is_named_where_it_is_missing(tmp_path):
    live_challenge(tmp_path)
    path = tmp_path / "Data" / "AllImages_release.mat"
    path.unlink()
    assert message("live-challenge", tmp_path) == f"{path}: no such file"


def test_label_files_of_different_lengths_are_refused(tmp_path):
    live_challenge(tmp_path)
    savemat(tmp_path / "Data" / "AllMOS_release.mat", {"AllMOS_release": np.array([[63.96, 25.34]])})
    assert "AllMOS_release.mat: has 2 entries, the file that names the images 3" in message("live-challenge", tmp_path)


@pytest.mark.parametrize("score", ["good", "inf", "3,5,1"])
def test_a_score_that_is_no_number_is_refused(tmp_path, score):
    put_text(tmp_path / "dmos.csv", "dist_img,ref_img,dmos,var", "a.png,r.png,3,1", f'b.png,r.png,"{score}",1')
    put_images(tmp_path / "images", "a.png", "b.png")
    assert f"dmos.csv: dmos of the 2. image is {score!r}" in message("kadid-10k", tmp_path)


def test_a_longer_row_is_refused_and_not_shifted(tmp_path):
    put_text(tmp_path / "dmos.csv", "dist_img,ref_img,dmos,var", "a.png,r.png,3,1,9")
    assert "dmos.csv: cannot be read" in message("kadid-10k", tmp_path)


def test_a_header_without_rows_is_refused(tmp_path):
    put_text(tmp_path / "dmos.csv", "dist_img,ref_img,dmos,var")
    assert message("kadid-10k", tmp_path).endswith("dmos.csv: has a header but no rows")


def test_labels_without_any_score_are_refused(tmp_path):
    put_text(tmp_path / "info_test.csv", "DALLE2_0004.png,a fish")
    assert message("aigiqa-20k", tmp_path).endswith("the label file of AIGIQA-20K has no scores")


def test_a_row_without_an_image_name_is_refused(tmp_path):
    put_text(tmp_path / "dmos.csv", "dist_img,ref_img,dmos,var", "a.png,r.png,3,1", ",r.png,3,1")
    put_images(tmp_path / "images", "a.png")
    assert "1 row(s) of KADID-10k name no image" in message("kadid-10k", tmp_path)


def test_where_no_folder_has_any_image_those_looked_in_are_named(tmp_path):
    spaq(tmp_path)
    (tmp_path / "TestImage" / "00001.jpg").unlink()
    found = message("spaq", tmp_path)
    assert found.endswith("such as 00001.jpg, is here; looked in TestImage, images, the folder itself")


def test_the_command_line_knows_every_data_set():
    assert list(DATASET_NAMES) == list(DATASETS)
