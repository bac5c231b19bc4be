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


def test_where_no_folder_has_any_image_those_looked_in_are_named(tmp_path):
    spaq(tmp_path)
    (tmp_path / "TestImage" / "00001.jpg").unlink()
    found = message("spaq", tmp_path)
    assert found.endswith("such as 00001.jpg, is here; looked in TestImage, images, the folder itself")
    put_images(tmp_path / "images", "0001.jpg")
    assert message("spaq", tmp_path).endswith("the folder itself; the nearest is 'images/0001.jpg'")


def test_the_command_line_knows_every_data_set():
    assert list(DATASET_NAMES) == list(DATASETS)


# -- what official files have wrong, and the forms that they go round in


def told(name: str, root: Path, **options: bool) -> tuple[pd.DataFrame, list[str]]:
    """The table of a data set, and what is said about it, without the name of the set in front."""
    said: list[str] = []
    found = read_dataset(name, root, say=said.append, **options)
    title = f"{DATASETS[name].title}: "
    assert all(line.startswith(title) and "\n" not in line for line in said)
    return found, [line.removeprefix(title) for line in said]


def kadid_rows(root: Path, *rows: str, images: Sequence[str] = ("a.png", "b.png")) -> None:
    put_text(root / "dmos.csv", "dist_img,ref_img,dmos,var", *rows)
    put_images(root / "images", *images)


@pytest.mark.parametrize("write", [write for _, write in FORMS], ids=[write.__name__ for _, write in FORMS])
def test_nothing_is_said_of_a_file_without_fault(tmp_path, write):
    name = next(name for name, each in FORMS if each is write)
    write(tmp_path)
    known = {"aigiqa_20k": 2, "aigiqa_20k_workbook": 2, "aigciqa2023_official": 1}  # withheld scores, missing prompts
    assert len(told(name, tmp_path)[1]) == known.get(write.__name__, 0)


def test_the_official_workbook_of_agiqa_1k_is_read(tmp_path, wild_dir):
    raw = pd.read_excel(wild_dir / "AIGC_MOS_Zscore.xlsx")
    (tmp_path / "AIGC_MOS_Zscore.xlsx").write_bytes((wild_dir / "AIGC_MOS_Zscore.xlsx").read_bytes())
    (tmp_path / "file").mkdir()
    for name in [*raw["Image"], "dreamStudio_without.jpg", "deepai_without.jpg"]:
        (tmp_path / "file" / name).touch()
    found, said = told("agiqa-1k", tmp_path)
    counts = raw["Image"].value_counts()
    kept = raw[raw["Image"].map(counts) == 1]
    assert len(kept) == len(raw) - 2 and found["name"].tolist() == [f"file/{name}" for name in kept["Image"]]
    np.testing.assert_array_equal(found["q"], kept["MOS"])
    assert found["prompt"].tolist() == kept["Prompt"].str.strip().tolist()
    assert len(said) == 2
    assert said[0] == "2 image(s) have no row: file/deepai_without.jpg, file/dreamStudio_without.jpg"
    assert said[1].startswith("2 rows of 1 image(s) with different scores left out")
    assert said[1].endswith(": file/dreamStudio_8_9_1_1.jpg")


def test_rows_that_stand_twice_are_taken_once(tmp_path):
    kadid_rows(tmp_path, "a.png,r.png,3,1", "b.png,r.png,2,1", "a.png,r.png,3,1")
    found, said = told("kadid-10k", tmp_path)
    assert found["name"].tolist() == ["images/a.png", "images/b.png"] and found["q"].tolist() == [3, 2]
    assert said == ["1 row(s) that stand there twice left out: images/a.png"]


def test_rows_of_names_that_mean_the_same_file_are_compared(tmp_path):
    kadid_rows(tmp_path, "A.PNG,r.png,3,1", "b.png,r.png,2,1", "a.png,r.png,4,1")
    found, said = told("kadid-10k", tmp_path)
    assert found["name"].tolist() == ["images/b.png"]
    assert said[-1].startswith("2 rows of 1 image(s) with different scores left out")


def test_rows_without_a_name_headers_in_between_and_blank_rows_are_left_out(tmp_path):
    header = "dist_img,ref_img,dmos,var"
    kadid_rows(tmp_path, "a.png,r.png,3,1", header, ",,,", ",r.png,3,1", "b.png,r.png,2,1")
    found, said = told("kadid-10k", tmp_path)
    assert found["name"].tolist() == ["images/a.png", "images/b.png"]
    assert said == ["1 header(s) between the rows of dmos.csv left out", "1 row(s) that name no image left out"]


def test_images_without_a_score_or_a_row_are_said(tmp_path):
    kadid_rows(tmp_path, "a.png,r.png,,", "b.png,r.png,2,1", images=["a.png", "b.png", "c.png"])
    assert told("kadid-10k", tmp_path)[1] == [
        "1 image(s) have no row: images/c.png",
        "1 image(s) have no score: images/a.png",
    ]


@pytest.mark.parametrize("leave_out", [True, False])
def test_a_few_names_without_an_image_are_left_out_and_many_are_not(tmp_path, leave_out):
    rows = [f"{number}.png,r.png,{number % 5},1" for number in range(40)]
    kadid_rows(tmp_path, *rows, images=[f"{number}.png" for number in range(2, 40)])
    found, said = told("kadid-10k", tmp_path, leave_out=leave_out)
    if leave_out:
        assert len(found) == 38 and said == ["2 row(s) whose image is not there left out: 0.png, 1.png"]
    else:
        assert len(found) == 40 and said == []
    (tmp_path / "images" / "2.png").unlink()
    assert len(told("kadid-10k", tmp_path)[0]) == 40  # more than one in twenty: refused when the images are looked for


def test_names_and_files_may_differ_in_case(tmp_path):
    tid2013(tmp_path)
    for name, other in (("I01_01_1.bmp", "i01_01_1.BMP"), ("i02_24_5.bmp", "I02_24_5.bmp")):
        (tmp_path / "distorted_images" / name).rename(tmp_path / "distorted_images" / other)
    found, said = told("tid2013", tmp_path)
    assert found["name"].tolist() == ["distorted_images/i01_01_1.BMP", "distorted_images/I02_24_5.bmp"]
    assert found["unit"].tolist() == ["I01", "I02"]
    assert "2 image name(s) are taken for files spelled otherwise" in said[0]


TABLES = ["agiqa-3k", "agiqa-1k", "pku-aigiqa-4k", "evalmuse-40k", "koniq-10k", "kadid-10k", "spaq"]


def rewritten(path: Path, suffix: str, *, header: bool = True) -> Path:
    """A table of a data set in another form, the first one deleted."""
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {".xlsx": pd.read_excel, ".json": pd.read_json}
    content = readers.get(path.suffix, pd.read_csv)(path)
    path.unlink()
    twin = path.with_suffix(suffix)
    if suffix == ".json":
        content.to_json(twin, orient="records")
    elif suffix == ".xlsx":
        content.to_excel(twin, index=False, header=header)
    else:
        content.to_csv(twin, index=False, header=header)
    return twin


def label_path(name: str, root: Path) -> Path:
    return next(path for pattern in DATASETS[name].files for path in root.glob(pattern))


@pytest.mark.parametrize("suffix", [".csv", ".xlsx", ".json"])
@pytest.mark.parametrize("name", TABLES)
def test_the_same_table_in_another_form_gives_the_same(tmp_path, name, suffix):
    dict(FORMS)[name](tmp_path)
    expected = read_dataset(name, tmp_path)
    rewritten(label_path(name, tmp_path), suffix)
    found, said = told(name, tmp_path)
    if name == "agiqa-1k":  # what pandas takes for a missing value in writing the twin
        found, expected = found.drop(columns="prompt"), expected.drop(columns="prompt")
    pd.testing.assert_frame_equal(found, expected, rtol=1e-9)
    assert said == []


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
@pytest.mark.parametrize("name", [name for name in TABLES if name not in ("evalmuse-40k", "spaq")])
def test_a_table_without_its_header_gives_the_same(tmp_path, name, suffix):
    dict(FORMS)[name](tmp_path)
    path = label_path(name, tmp_path)
    if name == "agiqa-1k":
        agiqa_1k_without_na = [("deepai_0_0_0_0.jpg", "bird, car", 2.793411), ("sd_0_0_0_1.jpg", "car", 3)]
        put_excel(path, ["Image", "Prompt", "MOS"], *agiqa_1k_without_na)
    expected = read_dataset(name, tmp_path)
    twin = rewritten(path, suffix, header=False)
    found, said = told(name, tmp_path)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-9)
    assert said == [f"{twin.name} has no header, its columns are taken as {said[0].partition(' taken as ')[2]}"]


def test_a_header_may_differ_in_case_and_blanks(tmp_path):
    pku_aigiqa_4k(tmp_path)
    expected = read_dataset("pku-aigiqa-4k", tmp_path)
    raw = pd.read_excel(tmp_path / "annotation.xlsx")
    raw.rename(columns=lambda name: name.replace("_", " ").title()).to_excel(tmp_path / "annotation.xlsx", index=False)
    pd.testing.assert_frame_equal(read_dataset("pku-aigiqa-4k", tmp_path), expected)


def test_a_column_that_stands_twice_is_refused(tmp_path):
    put_text(tmp_path / "dmos.csv", "dist_img,ref_img,dmos,DMOS,var", "a.png,r.png,3,4,1")
    assert message("kadid-10k", tmp_path).endswith("dmos.csv: the header has 'dmos' more than once")


def test_of_two_forms_of_a_table_one_is_read_and_both_are_said(tmp_path):
    kadid_10k(tmp_path)
    pd.read_csv(tmp_path / "dmos.csv").assign(dmos=1.0).to_excel(tmp_path / "dmos.xlsx", index=False)
    found, said = told("kadid-10k", tmp_path)
    assert found["q"].tolist() == [4.57] and said == ["labels are read from dmos.csv, not from dmos.xlsx"]


def test_an_official_table_that_a_spreadsheet_has_saved_again_is_read(tmp_path):
    kadid_10k(tmp_path)
    text = "dist_img;ref_img;dmos;var\r\nI01_01_01.png;I01.png;4,57;0,25\r\n"
    (tmp_path / "dmos.csv").write_bytes(text.encode("utf-16"))
    found, said = told("kadid-10k", tmp_path)
    assert found["q"].tolist() == [4.57] and found["q_std"].tolist() == [0.5]
    assert said == ["dmos.csv: read with UTF-16, semicolons between columns, decimal commas"]


def koniq_sets(root: Path, *, header: bool = True, scale: float = 1.0) -> list[str]:
    """KonIQ's second file, with the official folds: proportions of votes, and MOS on 1..100 in truth."""
    names = [f"{number}.jpg" for number in range(6)]
    folds = ["training", "training", "validation", "test", "test", "training"]
    first = ["image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set"] if header else []
    rows = [
        f"{name},0,0,0.5,0.5,0,100,{scale * (3.5 - number / 4)},0.5,{fold}"
        for number, (name, fold) in enumerate(zip(names, folds, strict=True))
    ]
    put_text(root / "koniq10k_distributions_sets.csv", *first, *rows)
    put_images(root / "512x384", *names)
    return folds


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
@pytest.mark.parametrize("header", [True, False])
def test_the_second_file_of_koniq_gives_the_official_folds(tmp_path, header, suffix):
    koniq_sets(tmp_path, header=header, scale=20)
    if suffix == ".xlsx":
        raw = pd.read_csv(tmp_path / "koniq10k_distributions_sets.csv", header=None)
        (tmp_path / "koniq10k_distributions_sets.csv").unlink()
        raw.to_excel(tmp_path / "koniq10k_distributions_sets.xlsx", index=False, header=False)
    found, said = told("koniq-10k", tmp_path)
    assert found["split"].tolist() == ["train", "train", "val", "test", "test", "train"]
    expected = [1 + (20 * (3.5 - number / 4) - 1) * 4 / 99 for number in range(6)]
    np.testing.assert_allclose(found["q"], expected, rtol=1e-12)
    np.testing.assert_array_equal(found["q_std"], [0.5] * 6)
    assert f"MOS of koniq10k_distributions_sets{suffix} is on 1..100, brought to 1..5" in said
    assert len(said) == (1 if header else 2)


@pytest.mark.parametrize("with_header", [True, False])
def test_with_both_files_of_koniq_scores_are_those_of_the_first(tmp_path, with_header):
    folds = koniq_sets(tmp_path, header=with_header, scale=20)
    head = ['"image_name","c1","c2","c3","c4","c5","c_total","MOS","SD","MOS_zscore"'] if with_header else []
    rows = [f'"{number}.jpg",0,0,50,50,0,100,{3.5 - number / 4},0.25,60' for number in range(6)]
    put_text(tmp_path / "koniq10k_scores_and_distributions.csv", *head, *rows)
    found = told("koniq-10k", tmp_path)[0]
    np.testing.assert_allclose(found["q"], [3.5 - number / 4 for number in range(6)])
    assert found["q_std"].tolist() == [0.25] * 6
    assert found["split"].replace({"train": "training", "val": "validation"}).tolist() == folds


def aigciqa_official(root: Path, *, prompts: str, index: bool) -> pd.DataFrame:
    """Six models, two prompts, four images of each, as they are published: images by number, prompts in a workbook."""
    models = ["Controlnet", "DALLE", "Glide", "Lafite", "stable-diffusion", "Unidiffuser"]
    rows = [(model, f"{prompt:03}-{copy}.png", prompt) for model in models for prompt in range(2) for copy in range(4)]
    values = np.arange(len(rows)) + 20.0
    for number in (1, 2, 3):
        for folder, stem, key in (("MOS", "mosz", "MOSz"), ("STD", "SD", "SD")):
            path = root / "DATA" / folder / f"{stem}{number}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            savemat(path, {key: (values + number if key == "MOSz" else values / 100)[:, None]})
    texts = ["a corgi", "two dogs, running"]
    if prompts == ".xlsx":
        put_excel(root / "AIGCIQA2023_Prompts.xlsx", None, *(("Basic", "Simple", text, "x") for text in texts))
    elif prompts == ".csv":
        pd.DataFrame({"style": "s", "prompt": texts}).to_csv(root / "AIGCIQA2023_Prompts.csv", index=False)
    if index:
        put_excel(root / "pic-index.xlsx", None, *(row[:2] for row in rows))
    put_images(root / "Image" / "allimg", *(f"{number}.png" for number in range(len(rows))))
    return pd.DataFrame({"prompt": [texts[row[2]] for row in rows], "model": [row[0] for row in rows], "q": values + 1})


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("prompts", [".xlsx", ".csv"])
def test_the_official_aigciqa2023_has_its_prompts_beside_numbered_images(tmp_path, prompts, index):
    expected = aigciqa_official(tmp_path, prompts=prompts, index=index)
    found, said = told("aigciqa2023", tmp_path)
    assert said == []
    assert found["name"].tolist() == [f"Image/allimg/{number}.png" for number in range(48)]
    assert found["prompt"].tolist() == expected["prompt"].tolist()
    assert found["group"].tolist() == (expected["model"].tolist() if index else [""] * 48)
    np.testing.assert_allclose(found[["q", "authenticity", "c"]], expected[["q"]].to_numpy() + np.arange(3))
    np.testing.assert_allclose(found["q_std"], (expected["q"] - 1) / 100)


def test_prompts_that_cannot_be_those_of_the_images_are_refused(tmp_path):
    aigciqa_official(tmp_path, prompts=".xlsx", index=False)
    put_excel(tmp_path / "AIGCIQA2023_Prompts.xlsx", None, *[("a", "b", f"text {number}") for number in range(5)])
    assert "AIGCIQA2023_Prompts.xlsx: has 5 prompts, which 48 images cannot be of" in message("aigciqa2023", tmp_path)


def test_the_files_by_which_a_spreadsheet_locks_its_own_are_passed_over(tmp_path):
    aigiqa_20k_workbook(tmp_path)
    (tmp_path / "~$mos.xlsx").write_bytes(b"lock")
    assert len(told("aigiqa-20k", tmp_path)[0]) == 1


def test_scores_that_are_not_published_are_said(tmp_path):
    aigiqa_20k(tmp_path)
    assert told("aigiqa-20k", tmp_path)[1][0] == "2 image(s) whose score is not published left out"
