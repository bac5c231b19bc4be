"""The label files of image quality data sets as they are downloaded, read into one common form.

`read_dataset` takes the name and the folder of a data set and gives a table with a row for each image:

    name     path of the image, relative to the folder
    prompt   "" if the set has none
    q, c, authenticity   scores in the set's own units, higher is better, NaN where missing
    q_std, c_std         standard deviation of the opinions behind a score, NaN where not given
    group    the generator ("" if not told)
    unit     what must not be shared between folds: the reference image; "" where that is the prompt or nothing
    split    the official fold: train, val, test or ""

A row without any score stays, unless the data set withholds the scores of its validation and test images.
Sources are named beside each reader. Nothing here looks into an image.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from configs import check_dataset_name
from sources.image_names import generator_of

COLUMNS = ("name", "prompt", "q", "c", "authenticity", "q_std", "c_std", "group", "unit", "split")
TEXTS = ("name", "prompt", "group", "unit", "split")
Table = pd.DataFrame


@dataclass(frozen=True)
class DataSet:
    """A data set that can be read by name."""

    title: str
    files: tuple[str, ...]  # label files, as patterns below the root, one of which must be there
    read: Callable[[Path], Table]
    ranges: dict[str, tuple[float, float]]  # task -> lowest and highest score that its scale allows
    images: tuple[str, ...] = ("images", "")  # folders below the root that may hold them; {split} is the fold's name


def read_dataset(name: str, root: Path) -> Table:
    """The table of a data set: the columns of COLUMNS, names relative to `root`.

    Raises:
        ValueError: one line naming the file, the column or the row, and the rule.
    """
    check_dataset_name(name, *DATASETS)
    known_set = DATASETS[name]
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    if not any(path.is_file() for pattern in known_set.files for path in root.glob(pattern)):
        raise ValueError(f"{root}: no label file of {known_set.title} here; looked for {', '.join(known_set.files)}")
    found = known_set.read(root)
    if found[["q", "c", "authenticity"]].isna().all(axis=None):
        raise ValueError(f"{root}: the label file of {known_set.title} has no scores")
    if (found["name"] == "").any():
        raise ValueError(f"{root}: {(found['name'] == '').sum()} row(s) of {known_set.title} name no image")
    for split in found["split"].unique():
        rows = found["split"] == split
        folder = image_folder(root, found.loc[rows, "name"].tolist(), known_set.images, split)
        found.loc[rows, "name"] = [str(PurePosixPath(folder) / image) for image in found.loc[rows, "name"]]
    return found


def image_folder(root: Path, names: Sequence[str], candidates: Sequence[str], split: str) -> str:
    """The first of the folders that has the first image that is in any. Raises ValueError if none is."""
    folders = list(dict.fromkeys(folder.format(split=split).rstrip("/") for folder in candidates))
    for image in names:
        for folder in folders:
            if (root / folder / image).is_file():
                return folder
    looked = ", ".join(folder or "the folder itself" for folder in folders)
    raise ValueError(f"{root}: none of the labels' images, such as {names[0]}, is here; looked in {looked}")


def image_folders(name: str) -> list[str]:
    """Where below its root a data set may have its images."""
    return [folder.format(split=split) for folder in DATASETS[name].images for split in ("train", "val", "test")]


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turn what the readers of files raise into a ValueError of one line that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    # What pandas, openpyxl, json and scipy raise for files that are not what their names say.
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        BadZipFile,
        MatReadError,
        NotImplementedError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason or type(error).__name__})") from None


def need_columns(raw: Table, columns: Sequence[str], path: Path) -> Table:
    """The table itself. Raises ValueError unless it has these columns and a row."""
    missing = [column for column in columns if column not in raw.columns]
    if missing:
        present = ", ".join(repr(str(column)) for column in raw.columns)
        raise ValueError(f"{path}: no column {', '.join(map(repr, missing))} among {present}")
    if raw.empty:
        raise ValueError(f"{path}: has a header but no rows")
    return raw


def csv_table(path: Path, *columns: str) -> Table:
    """A CSV with a header, every cell as text, an empty one as "". Raises ValueError."""
    with one_line_errors(path):
        # Without a header of its own, pandas takes a row that is longer than the first for an error.
        raw = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    raw = raw.fillna("").set_axis(raw.iloc[0].fillna("").str.strip().tolist(), axis=1)
    return need_columns(raw.iloc[1:].reset_index(drop=True), columns, path)


def excel_table(path: Path, *columns: str) -> Table:
    """The first sheet of a workbook, its first row the header, every cell as text. Raises ValueError."""
    with one_line_errors(path):
        raw = pd.read_excel(path, dtype=str, keep_default_na=False, na_filter=False)
    return need_columns(raw.rename(columns=lambda column: str(column).strip()), columns, path)


def scores(raw: Table, column: str, path: Path) -> np.ndarray:
    """A column of text as numbers, NaN where it is empty. Raises ValueError for anything else."""
    found = np.full(len(raw), np.nan)
    for row, cell in enumerate(raw[column]):
        text = "" if pd.isna(cell) else str(cell).strip()
        if text and text.lower() != "nan":
            try:
                found[row] = float(text)
            except ValueError:
                found[row] = math.inf
            if math.isinf(found[row]):
                raise ValueError(f"{path}: {column} of the {row + 1}. image is {text!r}, must be a number or empty")
    return found


def matrix(path: Path, key: str) -> np.ndarray:
    """The numbers of a MATLAB file's variable in one row. Raises ValueError."""
    values = cells(path, key)
    with one_line_errors(path):
        return np.asarray(values, dtype=float)


def cells(path: Path, key: str) -> np.ndarray:
    """The entries of a MATLAB file's variable in one row: numbers, or what a cell array holds. Raises ValueError."""
    with one_line_errors(path):
        if not path.is_file():
            raise FileNotFoundError
        content = loadmat(path)
    present = [name for name in content if not name.startswith("__")]
    if key not in present:
        raise ValueError(f"{path}: no variable {key!r} among {', '.join(map(repr, present))}")
    return np.asarray(content[key]).ravel()


def first_file(root: Path, *names: str) -> Path:
    """The first of these files that is there, otherwise the first of all."""
    return next((root / name for name in names if (root / name).is_file()), root / names[0])


def same_length(path: Path, count: int, expected: int) -> None:
    """Raise ValueError if a file that stands beside another has not as many entries."""
    if count != expected:
        raise ValueError(f"{path}: has {count} entries, the file that names the images {expected}")


def table(**columns: Any) -> Table:
    """A table in the common form; columns that are left out are empty."""
    size = len(columns["name"])
    empty: dict[str, Any] = {column: "" if column in TEXTS else np.nan for column in COLUMNS}
    found = pd.DataFrame({**empty, **columns}, index=range(size))[list(COLUMNS)]
    for column in COLUMNS:
        if column in TEXTS:
            found[column] = found[column].astype(str).str.strip()
        else:
            found[column] = found[column].astype(float)
    return found


def read_agiqa_3k(root: Path) -> Table:
    """Li et al., IEEE TCSVT 2023."""
    path = root / "data.csv"
    raw = csv_table(path, "name", "prompt", "mos_quality", "std_quality", "mos_align", "std_align")
    return table(
        name=raw["name"],
        prompt=raw["prompt"],
        q=scores(raw, "mos_quality", path),
        c=scores(raw, "mos_align", path),
        q_std=scores(raw, "std_quality", path),
        c_std=scores(raw, "std_align", path),
        group=raw["name"].map(generator_of),
    )


def read_agiqa_1k(root: Path) -> Table:
    """Zhang et al., 2023. One score, of quality."""
    path = root / "AIGC_MOS_Zscore.xlsx"
    raw = excel_table(path, "Image", "Prompt", "MOS")
    return table(
        name=raw["Image"],
        prompt=raw["Prompt"],
        q=scores(raw, "MOS", path),
        group=raw["Image"].str.partition("_")[0],
    )


def read_aigciqa2023(root: Path) -> Table:
    """Wang et al., 2023: the joined CSV, the CSV that circulates (scores divided by 20), or the official files."""
    heads = []
    for path in sorted(root.glob("*.csv")):
        raw = csv_table(path)
        if "quality_mos" in raw:
            return joined_aigciqa2023(path)
        if "mosz1" in raw:
            return circulated_aigciqa2023(path)
        heads.append(path.name)
    folder = first_file(root, "mosz1.mat", "DATA/MOS/mosz1.mat").parent
    if heads and not (folder / "mosz1.mat").is_file():
        raise ValueError(f"{root}: no column 'quality_mos' or 'mosz1' in {', '.join(heads)}")
    index = root / "pic-index.xlsx"
    with one_line_errors(index):
        raw = pd.read_excel(index, header=None, dtype=str, na_filter=False)
    raw = need_columns(raw.rename(columns=str), ("0", "1"), index)
    columns = {}
    for number, column in enumerate(("q", "authenticity", "c"), start=1):
        path = folder / f"mosz{number}.mat"
        columns[column] = matrix(path, "MOSz")
        same_length(path, len(columns[column]), len(raw))
    return table(name=raw["0"].str.strip() + "/" + raw["1"].str.strip(), group=raw["0"], **columns)


def joined_aigciqa2023(path: Path) -> Table:
    """AIGCIQA2023 with its own scores, a name such as 0.png for each image."""
    scored = ("quality_mos", "authenticity_mos", "correspondence_mos", "quality_std", "correspondence_std")
    raw = csv_table(path, "name", "prompt", *scored)
    q, authenticity, c, q_std, c_std = (scores(raw, column, path) for column in scored)
    return table(name=raw["name"], prompt=raw["prompt"], q=q, c=c, authenticity=authenticity, q_std=q_std, c_std=c_std)


def circulated_aigciqa2023(path: Path) -> Table:
    """AIGCIQA2023 with scores divided by 20 and prompts in quotes."""
    raw = csv_table(path, "model", "image_name", "prompt", "mosz1", "mosz2", "mosz3")
    return table(
        name=raw["model"].str.strip() + "/" + raw["image_name"].str.strip(),
        prompt=raw["prompt"].str.strip().str.strip('"'),
        q=20 * scores(raw, "mosz1", path),
        c=20 * scores(raw, "mosz3", path),
        authenticity=20 * scores(raw, "mosz2", path),
        group=raw["model"],
    )


def read_aigiqa_20k(root: Path) -> Table:
    """Li et al., CVPR Workshops 2024 (NTIRE). One score; validation and test images without it are left out."""
    parts = []
    paths = [root / f"info_{fold}.csv" for fold in ("train", "val", "test")]
    for path in (path for path in paths if path.is_file()):
        with one_line_errors(path):
            raw = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if raw.shape[1] not in (2, 3):
            raise ValueError(f"{path}: has {raw.shape[1]} columns, must have name, prompt and score")
        raw = raw.reindex(columns=range(3)).set_axis(["name", "prompt", "mos"], axis=1)
        parts.append(raw.assign(mos=scores(raw, "mos", path), split=path.stem.removeprefix("info_")))
    if not parts:
        path = sorted(root.glob("*.xlsx"))[0]
        raw = excel_table(path, "name", "prompt", "mos")
        parts.append(raw.assign(mos=scores(raw, "mos", path), split=""))
    raw = pd.concat(parts, ignore_index=True)
    raw = raw[raw["mos"].notna() | (raw["split"] == "train")].reset_index(drop=True)
    return table(
        name=raw["name"], prompt=raw["prompt"], q=raw["mos"], group=raw["name"].map(generator_of), split=raw["split"]
    )


def read_pku_aigiqa_4k(root: Path) -> Table:
    """Yuan et al., 2024: text-to-image and image-to-image."""
    path = root / "annotation.xlsx"
    raw = excel_table(path, "text_prompt", "generated_image", "mos_q", "mos_a", "mos_c")
    return table(
        name=raw["generated_image"],
        prompt=raw["text_prompt"],
        q=scores(raw, "mos_q", path),
        c=scores(raw, "mos_c", path),
        authenticity=scores(raw, "mos_a", path),
        group=raw["generated_image"].map(generator_of),
    )


def read_evalmuse_40k(root: Path) -> Table:
    """Han et al., 2024 (NTIRE 2025). Consistency alone: the mean of the annotators' total scores."""
    path = root / "train_list.json"
    with one_line_errors(path):
        raw = pd.DataFrame.from_records(json.loads(path.read_text(encoding="utf-8-sig")))
    need_columns(raw, ("img_path", "prompt", "total_score"), path)
    with one_line_errors(path):
        opinions = [np.asarray(scores_given, dtype=float).ravel() for scores_given in raw["total_score"]]
    names = raw["img_path"].astype(str)
    return table(
        name=names,
        prompt=raw["prompt"],
        c=[values.mean() if len(values) else math.nan for values in opinions],
        c_std=[values.std() if len(values) > 1 else math.nan for values in opinions],
        group=names.str.rpartition("/")[0].str.partition("/")[0],
    )


def read_koniq_10k(root: Path) -> Table:
    """Hosu et al., IEEE TIP 2020. `MOS` on 1..5."""
    path = root / "koniq10k_scores_and_distributions.csv"
    raw = csv_table(path, "image_name", "MOS", "SD")
    return table(name=raw["image_name"], q=scores(raw, "MOS", path), q_std=scores(raw, "SD", path))


def read_kadid_10k(root: Path) -> Table:
    """Lin et al., QoMEX 2019. Despite its name `dmos` is higher for better pictures."""
    path = root / "dmos.csv"
    raw = csv_table(path, "dist_img", "ref_img", "dmos", "var")
    spread = np.sqrt(scores(raw, "var", path))
    return table(name=raw["dist_img"], q=scores(raw, "dmos", path), q_std=spread, unit=raw["ref_img"])


def read_tid2013(root: Path) -> Table:
    """Ponomarenko et al., 2015."""
    path = root / "mos_with_names.txt"
    with one_line_errors(path):
        rows = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    wrong = [row for row in rows if len(row) != 2]
    if wrong or not rows:
        raise ValueError(f"{path}: {' '.join(wrong[0]) if wrong else 'nothing'!r} where a score and a name must stand")
    raw = pd.DataFrame(rows, columns=["mos", "name"])
    return table(name=raw["name"], q=scores(raw, "mos", path), unit=raw["name"].str.partition("_")[0].str.upper())


def read_spaq(root: Path) -> Table:
    """Fang et al., CVPR 2020."""
    path = first_file(root, *SPAQ_FILES)
    raw = excel_table(path, "Image name", "MOS")
    return table(name=raw["Image name"], q=scores(raw, "MOS", path))


def read_live_challenge(root: Path) -> Table:
    """Ghadiyaram and Bovik, IEEE TIP 2016. The seven images t1 to t7 come in a folder of their own."""
    folder = first_file(root, *LIVE_FILES).parent
    path = folder / "AllImages_release.mat"
    names = [str(np.asarray(cell).ravel()[0]) for cell in cells(path, "AllImages_release")]
    practice = {name: f"trainingImages/{name}" for name in names if re.fullmatch(r"t\d\.bmp", name)}
    moved = any((root / above / there).is_file() for there in practice.values() for above in ("Images", ""))
    mos = matrix(folder / "AllMOS_release.mat", "AllMOS_release")
    same_length(folder / "AllMOS_release.mat", len(mos), len(names))
    return table(name=[practice[name] if moved and name in practice else name for name in names], q=mos)


SPAQ_FILES = tuple(f"{folder}MOS and Image attribute scores.xlsx" for folder in ("", "Annotations/"))
LIVE_FILES = ("AllMOS_release.mat", "Data/AllMOS_release.mat")
FIVE, FROM_ONE, HUNDRED = (0.0, 5.0), (1.0, 5.0), (0.0, 100.0)
KONIQ_IMAGES = ("1024x768", "koniq10k_1024x768", "512x384", "koniq10k_512x384", "images", "")

DATASETS = {
    "agiqa-3k": DataSet("AGIQA-3K", ("data.csv",), read_agiqa_3k, {"q": FIVE, "c": FIVE}, ("images", "image", "")),
    "agiqa-1k": DataSet(
        "AGIQA-1K", ("AIGC_MOS_Zscore.xlsx",), read_agiqa_1k, {"q": FIVE}, ("file", "images", "image", "")
    ),
    "aigciqa2023": DataSet(
        "AIGCIQA2023",
        ("*.csv", "mosz1.mat", "DATA/MOS/mosz1.mat"),
        read_aigciqa2023,
        {"q": HUNDRED, "c": HUNDRED, "authenticity": HUNDRED},
        ("Image/allimg", "allimg", "Image", "images", ""),
    ),
    "aigiqa-20k": DataSet(
        "AIGIQA-20K",
        ("info_train.csv", "info_val.csv", "info_test.csv", "*.xlsx"),
        read_aigiqa_20k,
        {"q": FIVE},
        ("{split}", "images/{split}", "images", "all", ""),
    ),
    "pku-aigiqa-4k": DataSet(
        "PKU-AIGIQA-4K",
        ("annotation.xlsx",),
        read_pku_aigiqa_4k,
        {"q": FIVE, "c": FIVE, "authenticity": FIVE},
        ("generated_images", "images", ""),
    ),
    "evalmuse-40k": DataSet("EvalMuse-40K", ("train_list.json",), read_evalmuse_40k, {"c": FROM_ONE}),
    "koniq-10k": DataSet(
        "KonIQ-10k", ("koniq10k_scores_and_distributions.csv",), read_koniq_10k, {"q": FROM_ONE}, KONIQ_IMAGES
    ),
    "kadid-10k": DataSet("KADID-10k", ("dmos.csv",), read_kadid_10k, {"q": FROM_ONE}),
    "tid2013": DataSet(
        "TID2013", ("mos_with_names.txt",), read_tid2013, {"q": (0.0, 9.0)}, ("distorted_images", "images", "")
    ),
    "spaq": DataSet("SPAQ", SPAQ_FILES, read_spaq, {"q": HUNDRED}, ("TestImage", "images", "")),
    "live-challenge": DataSet(
        "LIVE Challenge", LIVE_FILES, read_live_challenge, {"q": HUNDRED}, ("Images", "images", "")
    ),
}
