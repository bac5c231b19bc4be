"""The label files of image quality data sets as they are downloaded, read into one common form.

`read_dataset` takes the name and the folder of a data set and gives a table with a row for each image:

    name     path of the image, relative to the folder
    prompt   "" if the set has none
    q, c, authenticity   scores in the set's own units, higher is better, NaN where missing
    q_std, c_std         standard deviation of the opinions behind a score, NaN where not given
    group    the generator ("" if not told)
    unit     what must not be shared between folds: the reference image; "" where that is the prompt or nothing
    split    the official fold: train, val, test or ""

A row without any score stays, unless the data set withholds the scores of its validation and test images. What is wrong
with an official file is mended and said: rows that stand twice, names without an image, images without a row.
Sources are named beside each reader. Nothing here looks into an image.
"""

from __future__ import annotations

import json
import math
import os
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
from sources import csv_files
from sources.image_names import ImageFolder, generator_of, image_folder, match_names
from storage import tables
from storage.image_files import SUFFIXES
from storage.messages import first_five, note, quoted
from storage.tables import Say

COLUMNS = ("name", "prompt", "q", "c", "authenticity", "q_std", "c_std", "group", "unit", "split")
TEXTS = ("name", "prompt", "group", "unit", "split")
SCORES = ["q", "c", "authenticity"]
TWINS = (".csv", ".xlsx", ".json")  # forms that the same table goes round in
MOST_ABSENT = 0.05  # of the images that labels name: more than that is no fault of the labels, but of a download
Table = pd.DataFrame


@dataclass(frozen=True)
class DataSet:
    """A data set that can be read by name."""

    title: str
    files: tuple[str, ...]  # label files, as patterns below the root, one of which must be there, or a twin of it
    read: Callable[[Path, Say], Table]
    ranges: dict[str, tuple[float, float]]  # task -> lowest and highest score that its scale allows
    images: tuple[str, ...] = ("images", "")  # folders below the root that may hold them; {split} is the fold's name


def read_dataset(name: str, root: Path, *, leave_out: bool = True, say: Say = note) -> Table:
    """The table of a data set: the columns of COLUMNS, names relative to `root`.

    Args:
        leave_out: whether rows whose image is not there are left out, if they are few.
        say: is told what was mended.

    Raises:
        ValueError: one line naming the file, the column or the row, and the rule.
    """
    check_dataset_name(name, *DATASETS)
    known_set = DATASETS[name]
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    if not any(path.is_file() for pattern in known_set.files for twin in twins(pattern) for path in root.glob(twin)):
        raise ValueError(f"{root}: no label file of {known_set.title} here; looked for {', '.join(known_set.files)}")

    def tell(text: str) -> None:
        say(f"{known_set.title}: {text}")

    found = known_set.read(root, tell)
    if found[SCORES].isna().all(axis=None):
        raise ValueError(f"{root}: the label file of {known_set.title} has no scores")
    if nameless := int((found["name"] == "").sum()):
        tell(f"{nameless} row(s) that name no image left out")
        found = found[found["name"] != ""].reset_index(drop=True)
    parts = [
        find_images(root, found[found["split"] == split], known_set.images, split, leave_out=leave_out, say=tell)
        for split in found["split"].unique()
    ]
    found = pd.concat(parts).sort_index()
    say_unnamed(root, found["name"].tolist(), tell)
    found = without_repeats(found, tell).reset_index(drop=True)
    bare = found.loc[found[SCORES].isna().all(axis=1), "name"].tolist()
    if bare:
        tell(f"{len(bare)} image(s) have no score: {first_five(bare)}")
    return found


def find_images(root: Path, rows: Table, candidates: Sequence[str], split: str, *, leave_out: bool, say: Say) -> Table:
    """The rows of a fold with the names that their files have below the root."""
    names = rows["name"].tolist()
    folder = image_folder(root, names, candidates, split)
    place = ImageFolder(root / folder)
    files = match_names(names, place, "the label file", say, may_be_missing=True)
    absent = [name for name in names if name not in files]
    if absent and leave_out and len(absent) <= MOST_ABSENT * len(names):
        say(f"{len(absent)} row(s) whose image is not there left out: {first_five(absent)}")
        rows = rows[rows["name"].isin(files)]
    return rows.assign(name=[str(PurePosixPath(folder) / files.get(name, name)) for name in rows["name"]])


def say_unnamed(root: Path, names: Sequence[str], say: Say) -> None:
    """Say which images lie beside those of the rows and are in none."""
    folders = sorted({PurePosixPath(name).parent for name in names})
    there = {
        str(folder / entry)
        for folder in folders
        for entry in (os.listdir(root / folder) if (root / folder).is_dir() else ())
        if PurePosixPath(entry).suffix.lower() in SUFFIXES
    }
    if other := sorted(there - set(names)):
        say(f"{len(other)} image(s) have no row: {first_five(other)}")


def without_repeats(found: Table, say: Say) -> Table:
    """One row of those that are the same; none of those that give an image different scores."""
    again = found["name"].duplicated(keep=False)
    if not again.any():
        return found
    same = found.duplicated(["name", "prompt", *SCORES])
    left = found[~same]
    differ = left["name"].duplicated(keep=False)
    if same.any():
        say(f"{same.sum()} row(s) that stand there twice left out: {first_five(found.loc[same, 'name'].tolist())}")
    if differ.any():
        names = left.loc[differ, "name"].unique().tolist()
        say(
            f"{differ.sum()} rows of {len(names)} image(s) with different scores left out, as nothing tells which is "
            f"right: {first_five(names)}"
        )
    return left[~differ]


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


def twins(name: str) -> list[str]:
    """A file's name or pattern, and what it is called in the other forms that it goes round in."""
    stem, dot, suffix = name.rpartition(".")
    return [name] + [stem + twin for twin in TWINS if dot + suffix in TWINS and twin != dot + suffix]


def label_file(root: Path, names: Sequence[str], say: Say) -> Path:
    """The first of these files or their twins that is there, otherwise the first of all; others there are said."""
    there = [root / twin for name in names for twin in twins(name) if (root / twin).is_file()]
    if len(there) > 1:
        say(f"labels are read from {there[0].name}, not from {first_five([path.name for path in there[1:]])}")
    return there[0] if there else root / names[0]


def label_table(
    path: Path, columns: Sequence[str], numbers: Sequence[str], say: Say, *, order: Sequence[str] = ()
) -> Table:
    """The table in a CSV, a workbook's first sheet or a JSON file: every cell as text, an empty one as "".

    Headers may differ in case, blanks and underscores, and may stand again between the rows.

    Args:
        columns: that must be there.
        numbers: those of all columns that hold numbers.
        order: the columns of such a file without a header, which is known by the image's name in its first row.

    Raises:
        ValueError: it cannot be read, lacks a column, or has no rows.
    """
    key = tables.column_key
    with one_line_errors(path):
        raw, form = tables.read_cells(path, {*columns, *numbers, *order})
    wanted = {key(name): name for name in (*columns, *numbers, *order)}
    first = [wanted.get(key(cell), cell.strip()) for cell in raw.iloc[0]] if len(raw) else [""]
    if order and not set(first) & set(order) and any(PurePosixPath(cell).suffix.lower() in SUFFIXES for cell in first):
        if raw.shape[1] > len(order) and (raw.iloc[:, len(order) :] != "").any(axis=None):
            raise ValueError(f"{path}: has more columns than {', '.join(order)}, and no header")
        raw = raw.reindex(columns=range(len(order)), fill_value="").set_axis(list(order), axis=1)
        say(f"{path.name} has no header, its columns are taken as {', '.join(order)}")
    else:
        with one_line_errors(path):
            raw = tables.check_width(raw, form) if form else raw
        raw = raw.set_axis(first[: raw.shape[1]], axis=1).iloc[1:]
    raw = need_columns(raw[(raw != "").any(axis=1)].reset_index(drop=True), columns, path)
    raw = raw.loc[:, ~raw.columns.duplicated()]
    stray = raw[list(columns)].apply(lambda column: column.map(key) == key(str(column.name))).all(axis=1)
    if stray.any():
        say(f"{stray.sum()} header(s) between the rows of {path.name} left out")
        raw = raw[~stray].reset_index(drop=True)
    raw, has_commas = tables.with_decimal_points(raw, numbers, form, path)
    if form:
        tables.say_form(path.name, form, say, has_commas=has_commas)
    return raw


def need_columns(raw: Table, columns: Sequence[str], path: Path) -> Table:
    """The table itself. Raises ValueError unless it has these columns and a row."""
    missing = [column for column in columns if column not in raw.columns]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(map(repr, missing))} among {csv_files.columns_found(list(raw.columns))}"
        )
    twice = [column for column in columns if (raw.columns == column).sum() > 1]
    if twice:
        raise ValueError(f"{path}: the header has {quoted(twice[0])} more than once")
    if raw.empty:
        raise ValueError(f"{path}: has a header but no rows")
    return raw


def scores(raw: Table, column: str, path: Path) -> np.ndarray:
    """A column of text as numbers, NaN where it is empty or not there. Raises ValueError for anything else."""
    found = np.full(len(raw), np.nan)
    for row, cell in enumerate(raw.get(column, ())):
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


def visible_files(root: Path, pattern: str) -> list[Path]:
    """Files that a pattern matches, without hidden ones and those by which a spreadsheet locks its own."""
    return sorted(path for path in root.glob(pattern) if not path.name.startswith((".", "~$")))


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


def read_agiqa_3k(root: Path, say: Say) -> Table:
    """Li et al., IEEE TCSVT 2023."""
    path = label_file(root, ["data.csv"], say)
    numbers = ("mos_quality", "std_quality", "mos_align", "std_align")
    order = ("name", "prompt", "adj1", "adj2", "style", *numbers)
    raw = label_table(path, ("name", "prompt", *numbers), numbers, say, order=order)
    q, q_std, c, c_std = (scores(raw, column, path) for column in numbers)
    return table(
        name=raw["name"], prompt=raw["prompt"], q=q, c=c, q_std=q_std, c_std=c_std, group=raw["name"].map(generator_of)
    )


def read_agiqa_1k(root: Path, say: Say) -> Table:
    """Zhang et al., 2023. One score, of quality. One image has two rows with two scores, two have none."""
    path = label_file(root, ["AIGC_MOS_Zscore.xlsx"], say)
    columns = ("Image", "Prompt", "MOS")
    raw = label_table(path, columns, ("MOS",), say, order=columns)
    return table(
        name=raw["Image"],
        prompt=raw["Prompt"],
        q=scores(raw, "MOS", path),
        group=raw["Image"].str.partition("_")[0],
    )


def read_aigciqa2023(root: Path, say: Say) -> Table:
    """Wang et al., 2023: the joined CSV, the CSV that circulates (scores divided by 20), or the official files."""
    heads = []
    for path in (path for suffix in TWINS for path in visible_files(root, f"*{suffix}")):
        with one_line_errors(path):
            raw, _ = tables.read_cells(path, {"quality_mos", "mosz1"})
        header = {tables.column_key(cell) for cell in raw.iloc[0]} if len(raw) else set()
        if "quality_mos" in header:
            return joined_aigciqa2023(path, say)
        if "mosz1" in header:
            return circulated_aigciqa2023(path, say)
        heads += [path.name] if path.suffix == ".csv" else []
    folder = first_file(root, *(f"{place}mosz1.mat" for place in ("", "DATA/MOS/", "MOS/"))).parent
    if heads and not (folder / "mosz1.mat").is_file():
        raise ValueError(f"{root / heads[0]}: has neither a column 'quality_mos' nor 'mosz1'")
    return official_aigciqa2023(root, folder, say)


def official_aigciqa2023(root: Path, folder: Path, say: Say) -> Table:
    """The MATLAB files in `folder`: images 0.png, 1.png, ... in the order of their rows, or as pic-index.xlsx has them.

    Six models made four images of each prompt; all images of a model stand together.
    """
    columns = {name: matrix(folder / f"mosz{n}.mat", "MOSz") for n, name in ((1, "q"), (2, "authenticity"), (3, "c"))}
    count = len(columns["q"])
    for number in (2, 3):
        path = folder / f"mosz{number}.mat"
        same_length(path, len(columns["authenticity" if number == 2 else "c"]), count)
    for number, name in ((1, "q_std"), (3, "c_std")):
        path = folder.parent / "STD" / f"SD{number}.mat"
        if path.is_file():
            columns[name] = matrix(path, "SD")
            same_length(path, len(columns[name]), count)
    names, models = pd.Series([f"{row}.png" for row in range(count)]), pd.Series([""] * count)
    index = first_file(root, "pic-index.xlsx", "pic-index_.xlsx", "DATA/pic-index.xlsx")
    if index.is_file() or not any((root / place / names[0]).is_file() for place in AIGCIQA_IMAGES):
        raw = need_columns(index_of(index), ("0", "1"), index)
        same_length(index, len(raw), count)
        models = raw["0"]
        nested = models + "/" + raw["1"]
        is_flat = any((root / place / names[0]).is_file() for place in AIGCIQA_IMAGES)
        is_nested = any((root / place / nested[0]).is_file() for place in AIGCIQA_IMAGES)
        names = names if is_flat and not is_nested else nested
    return table(name=names, prompt=prompts_of_aigciqa2023(root, count, say), group=models, **columns)


def index_of(path: Path) -> Table:
    """The workbook that tells model and file of each row; it has no header."""
    with one_line_errors(path):
        if not path.is_file():
            raise FileNotFoundError
        raw = pd.read_excel(path, header=None, dtype=str, na_filter=False)
    return raw.rename(columns=str).map(str.strip)


def prompts_of_aigciqa2023(root: Path, count: int, say: Say) -> list[str]:
    """A prompt for each row: the third column of a workbook without a header, or a CSV's column `prompt`."""
    places = [f"{place}AIGCIQA2023_Prompts{suffix}" for place in ("", "DATA/", "DATA/MOS/") for suffix in TWINS]
    path = first_file(root, *places)
    if not path.is_file():
        say("AIGCIQA2023_Prompts.xlsx is not here, which has the prompts that consistency is about")
        return [""] * count
    with one_line_errors(path):
        raw, _ = tables.read_cells(path, {"prompt"})
    header = [tables.column_key(cell) for cell in raw.iloc[0]]
    column = raw.iloc[1:, header.index("prompt")] if "prompt" in header else raw.iloc[:, min(2, raw.shape[1] - 1)]
    each = [prompt for prompt in column.tolist() if prompt for _ in range(4)]
    if not each or count % len(each):
        raise ValueError(f"{path}: has {len(each) // 4} prompts, which {count} images cannot be of, four by each model")
    return each * (count // len(each))


def joined_aigciqa2023(path: Path, say: Say) -> Table:
    """AIGCIQA2023 with its own scores, a name such as 0.png for each image."""
    scored = ("quality_mos", "authenticity_mos", "correspondence_mos", "quality_std", "correspondence_std")
    raw = label_table(path, ("name", "prompt", *scored), scored, say)
    q, authenticity, c, q_std, c_std = (scores(raw, column, path) for column in scored)
    return table(name=raw["name"], prompt=raw["prompt"], q=q, c=c, authenticity=authenticity, q_std=q_std, c_std=c_std)


def circulated_aigciqa2023(path: Path, say: Say) -> Table:
    """AIGCIQA2023 with scores divided by 20 and prompts in quotes."""
    scored = ("mosz1", "mosz2", "mosz3")
    raw = label_table(path, ("model", "image_name", "prompt", *scored), scored, say)
    q, authenticity, c = (20 * scores(raw, column, path) for column in scored)
    return table(
        name=raw["model"] + "/" + raw["image_name"],
        prompt=raw["prompt"].str.strip('"'),
        q=q,
        c=c,
        authenticity=authenticity,
        group=raw["model"],
    )


def read_aigiqa_20k(root: Path, say: Say) -> Table:
    """Li et al., CVPR Workshops 2024 (NTIRE). One score; validation and test images without it are left out."""
    order = ("name", "prompt", "mos")
    paths = {fold: label_file(root, [f"info_{fold}.csv"], say) for fold in ("train", "val", "test")}
    paths = {fold: path for fold, path in paths.items() if path.is_file()}
    if not paths:
        whole = [path for suffix in (".xlsx", ".csv", ".json") for path in visible_files(root, f"*{suffix}")]
        paths = {"": whole[0]}
    parts = []
    for fold, path in paths.items():
        raw = label_table(path, ("name", "prompt") if fold else order, ("mos",), lambda text: None, order=order)
        parts.append(raw.assign(mos=scores(raw, "mos", path), split=fold))
    raw = pd.concat(parts, ignore_index=True)
    kept = raw["mos"].notna() | (raw["split"] == "train")
    if not kept.all():
        say(f"{(~kept).sum()} image(s) whose score is not published left out")
    raw = raw[kept].reset_index(drop=True)
    return table(
        name=raw["name"], prompt=raw["prompt"], q=raw["mos"], group=raw["name"].map(generator_of), split=raw["split"]
    )


def read_pku_aigiqa_4k(root: Path, say: Say) -> Table:
    """Yuan et al., 2024: text-to-image and image-to-image."""
    path = label_file(root, PKU_FILES, say)
    numbers = ("mos_q", "mos_a", "mos_c")
    order = ("image_prompt", "text_prompt", "generated_image", *numbers)
    raw = label_table(path, ("text_prompt", "generated_image", *numbers), numbers, say, order=order)
    q, authenticity, c = (scores(raw, column, path) for column in numbers)
    return table(
        name=raw["generated_image"],
        prompt=raw["text_prompt"],
        q=q,
        c=c,
        authenticity=authenticity,
        group=raw["generated_image"].map(generator_of),
    )


def read_evalmuse_40k(root: Path, say: Say) -> Table:
    """Han et al., 2024 (NTIRE 2025). Consistency alone: the mean of the annotators' total scores."""
    path = label_file(root, ["train_list.json"], say)
    raw = label_table(path, ("img_path", "prompt", "total_score"), (), say)
    with one_line_errors(path):
        opinions = [np.asarray(json.loads(cell or "[]"), dtype=float).ravel() for cell in raw["total_score"]]
    return table(
        name=raw["img_path"],
        prompt=raw["prompt"],
        c=[values.mean() if len(values) else math.nan for values in opinions],
        c_std=[values.std() if len(values) > 1 else math.nan for values in opinions],
        group=raw["img_path"].str.rpartition("/")[0].str.partition("/")[0],
    )


def read_koniq_10k(root: Path, say: Say) -> Table:
    """Hosu et al., IEEE TIP 2020. `MOS` on 1..5; a second file has the official folds, and `MOS` on 1..100."""
    votes = tuple(f"c{level}" for level in range(1, 6))
    files = []
    for name, last in zip(KONIQ_FILES, ("MOS_zscore", "set"), strict=True):
        path = label_file(root, [name], say)
        if path.is_file():
            needed = ("image_name", "MOS", "SD" if last == "MOS_zscore" else "set")
            order = ("image_name", *votes, "c_total", "MOS", "SD", last)
            files.append((path, label_table(path, needed, ("MOS", "SD"), say, order=order)))
    path, raw = files[0]
    folds = dict(zip(files[-1][1]["image_name"], files[-1][1].get("set", ""), strict=False))
    q = scores(raw, "MOS", path)
    if (q > 5).any():
        say(f"MOS of {path.name} is on 1..100, brought to 1..5")
        q = 1 + (q - 1) * 4 / 99
    fold = raw["image_name"].map(folds).astype(object).fillna("").str.lower()
    split = fold.replace({"training": "train", "validation": "val"})
    return table(name=raw["image_name"], q=q, q_std=scores(raw, "SD", path), split=split)


def read_kadid_10k(root: Path, say: Say) -> Table:
    """Lin et al., QoMEX 2019. Despite its name `dmos` is higher for better pictures."""
    path = label_file(root, ["dmos.csv"], say)
    columns = ("dist_img", "ref_img", "dmos", "var")
    raw = label_table(path, columns, ("dmos", "var"), say, order=columns)
    spread = np.sqrt(scores(raw, "var", path))
    return table(name=raw["dist_img"], q=scores(raw, "dmos", path), q_std=spread, unit=raw["ref_img"])


def read_tid2013(root: Path, say: Say) -> Table:
    """Ponomarenko et al., 2015. Names and files differ in their case."""
    path = root / "mos_with_names.txt"
    with one_line_errors(path):
        rows = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    wrong = [row for row in rows if len(row) != 2]
    if wrong or not rows:
        raise ValueError(f"{path}: {' '.join(wrong[0]) if wrong else 'nothing'!r} where a score and a name must stand")
    raw = pd.DataFrame(rows, columns=["mos", "name"])
    return table(name=raw["name"], q=scores(raw, "mos", path), unit=raw["name"].str.partition("_")[0].str.upper())


def read_spaq(root: Path, say: Say) -> Table:
    """Fang et al., CVPR 2020."""
    path = label_file(root, SPAQ_FILES, say)
    attributes = ("Brightness", "Colorfulness", "Contrast", "Noisiness", "Sharpness")
    raw = label_table(path, ("Image name", "MOS"), ("MOS",), say, order=("Image name", "MOS", *attributes))
    return table(name=raw["Image name"], q=scores(raw, "MOS", path))


def read_live_challenge(root: Path, say: Say) -> Table:
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
KONIQ_FILES = ("koniq10k_scores_and_distributions.csv", "koniq10k_distributions_sets.csv")
PKU_FILES = ("annotation.xlsx", "I2IQA_annotation.xlsx")
AIGCIQA_IMAGES = ("Image/allimg", "allimg", "Image", "images", "")
FIVE, FROM_ONE, HUNDRED = (0.0, 5.0), (1.0, 5.0), (0.0, 100.0)
KONIQ_IMAGES = ("1024x768", "koniq10k_1024x768", "512x384", "koniq10k_512x384", "images", "")

DATASETS = {
    "agiqa-3k": DataSet("AGIQA-3K", ("data.csv",), read_agiqa_3k, {"q": FIVE, "c": FIVE}, ("images", "image", "")),
    "agiqa-1k": DataSet(
        "AGIQA-1K", ("AIGC_MOS_Zscore.xlsx",), read_agiqa_1k, {"q": FIVE}, ("file", "images", "image", "")
    ),
    "aigciqa2023": DataSet(
        "AIGCIQA2023",
        ("*.csv", "mosz1.mat", "DATA/MOS/mosz1.mat", "MOS/mosz1.mat"),
        read_aigciqa2023,
        {"q": HUNDRED, "c": HUNDRED, "authenticity": HUNDRED},
        AIGCIQA_IMAGES,
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
        PKU_FILES,
        read_pku_aigiqa_4k,
        {"q": FIVE, "c": FIVE, "authenticity": FIVE},
        ("generated_images", "Generated_image/All", "images", ""),
    ),
    "evalmuse-40k": DataSet("EvalMuse-40K", ("train_list.json",), read_evalmuse_40k, {"c": FROM_ONE}),
    "koniq-10k": DataSet("KonIQ-10k", KONIQ_FILES, read_koniq_10k, {"q": FROM_ONE}, KONIQ_IMAGES),
    "kadid-10k": DataSet("KADID-10k", ("dmos.csv",), read_kadid_10k, {"q": FROM_ONE}),
    "tid2013": DataSet(
        "TID2013", ("mos_with_names.txt",), read_tid2013, {"q": (0.0, 9.0)}, ("distorted_images", "images", "")
    ),
    "spaq": DataSet("SPAQ", SPAQ_FILES, read_spaq, {"q": HUNDRED}, ("TestImage", "images", "")),
    "live-challenge": DataSet(
        "LIVE Challenge", LIVE_FILES, read_live_challenge, {"q": HUNDRED}, ("Images", "images", "")
    ),
}
