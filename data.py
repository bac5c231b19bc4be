"""From tables of scores and folders of images to a checked data set: reading, splitting, scaling.

Scores live on [0, 1] inside (`LabelScale`) and on the data set's own MOS scale everywhere a person looks.
A missing score is NaN from here on; it is masked in the loss and left out of every statistic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupShuffleSplit

from images import ImageFile, first_five, is_missing, leave_folder, refuse_broken, try_images
from reading import OddFile, refuse_odd_table, shortened
from scores import TASKS, title_of

FOLDS = ("train", "val", "test")
SKIPPED = ["name", "row", "path", "fold", "reason"]  # columns of what says which images were left out

# How pandas gives every cell as text, blank lines included, which count as rows.
CSV_AS_TEXT: dict[str, Any] = {
    "header": None,
    "dtype": str,
    "keep_default_na": False,
    "encoding": "utf-8-sig",
    "skipinitialspace": True,
    "skip_blank_lines": False,
}

NO_DATA = """no data at {path}. Three ways on:
  see it work now, without data:  python baseline.py --demo
  AGIQA-3K (2,982 images, MIT), from github.com/lcysyzxdxc/AGIQA-3k-Database:
                                  its data.csv as data/data.csv, its images into data/images
  your own images:                --data_csv_path CSV (name,prompt,mos_quality,mos_align) --image_base_dir DIR"""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How the CSV names what we read."""

    name: str = "name"
    prompt: str = "prompt"
    quality: str = "mos_quality"
    consistency: str = "mos_align"
    explanation: str = "explanation"
    group: str | None = None
    quality_std: str = "std_quality"
    consistency_std: str = "std_align"


def read_table(
    csv_path: str | Path,
    image_dir: str | Path,
    columns: Columns,
    *,
    scored: bool = True,
    extra: Sequence[str] = (),
    **rules: Any,
) -> pd.DataFrame:
    """Read and check a CSV of images.

    Args:
        csv_path: UTF-8 CSV (with or without BOM) with a header.
        image_dir: the folder that the names are relative to.
        scored: whether the scores are read, and at least one of the two columns must hold some.
        extra: columns of further scores.
        rules: of `check_names`.

    Returns:
        One row per image: name, path, prompt ("" if none), explanation ("" if none), q, c and each extra score (MOS,
        float64, NaN where missing), q_std and c_std (of the opinions behind a score, NaN where not given), group
        (generator), reference and split ("" if the CSV has none), and row (as a spreadsheet counts).

    Raises:
        ValueError: one line naming the file, the row or the column, and the rule.
    """
    raw = read_csv(csv_path)  # indexed by row number
    if not Path(image_dir).is_dir():
        raise ValueError(f"--image_base_dir {image_dir}: no such folder")
    check_columns(list(raw.columns), columns, extra, csv_path)

    def texts(column: str | None) -> pd.Series:
        return raw[column].str.strip() if column in raw.columns else pd.Series("", index=raw.index)

    table = pd.DataFrame(
        {
            "name": texts(columns.name),
            "prompt": texts(columns.prompt),
            "explanation": texts(columns.explanation),
            "q": parse_scores(raw, columns.quality, csv_path) if scored else np.nan,
            "c": parse_scores(raw, columns.consistency, csv_path) if scored else np.nan,
            **{column: parse_scores(raw, column, csv_path) for column in extra},
            "q_std": parse_scores(raw, columns.quality_std, csv_path) if scored else np.nan,
            "c_std": parse_scores(raw, columns.consistency_std, csv_path) if scored else np.nan,
            "split": texts("split"),
            "reference": texts("reference"),
            "row": raw.index,
        }
    )
    table["group"] = texts(columns.group) if columns.group else table["name"].map(generator_of)
    if scored:
        check_scored(table, columns, csv_path)
    table["path"] = check_names(table, Path(image_dir), csv_path, **rules)
    return table.reset_index(drop=True)


def check_scored(table: pd.DataFrame, columns: Columns, csv_path: str | Path) -> None:
    """Raise ValueError for a table without any score, or a consistency score without a prompt."""
    if table[["q", "c"]].isna().all(axis=None):
        raise ValueError(
            f"{csv_path}: no scores in column {columns.quality!r} or {columns.consistency!r}; "
            "name yours with --quality_column, --consistency_column"
        )
    no_prompt = table[table["c"].notna() & (table["prompt"] == "")]
    if len(no_prompt):
        raise ValueError(
            f"{csv_path} row {no_prompt['row'].iloc[0]}: a consistency score without a prompt (column "
            f"{columns.prompt!r}); {len(no_prompt)} such row(s)"
        )


def check_columns(present: Sequence[str], columns: Columns, extra: Sequence[str], csv_path: str | Path) -> None:
    """Raise ValueError for a missing column. Usual names may be absent, those asked for by another name may not."""
    for flag, column, usual in (
        ("--name_column", columns.name, None),
        ("--prompt_column", columns.prompt, Columns.prompt),
        ("--quality_column", columns.quality, Columns.quality),
        ("--consistency_column", columns.consistency, Columns.consistency),
        ("--explanation_column", columns.explanation, Columns.explanation),
        ("--quality_std_column", columns.quality_std, Columns.quality_std),
        ("--consistency_std_column", columns.consistency_std, Columns.consistency_std),
        ("--group_column", columns.group, Columns.group),
        *(("--extra_scores", column, None) for column in extra),
    ):
        if column != usual and column not in present:
            raise ValueError(f"{csv_path}: no column {column!r} among {columns_found(present)}; name yours with {flag}")


def columns_found(present: Sequence[str]) -> str:
    """The names of columns for a message: the first twenty."""
    return ", ".join(map(shortened, present[:20])) + (f", ... ({len(present)} in all)" if len(present) > 20 else "")


def read_csv(path: str | Path) -> pd.DataFrame:
    """All cells of a UTF-8 CSV as text, indexed by row as a spreadsheet counts: the header is row 1.

    Rows without any text are left out. Raises ValueError.
    """
    with csv_errors(path):
        raw = pd.read_csv(path, **CSV_AS_TEXT)
    raw = raw.fillna("")  # a row that ends early
    raw.columns = raw.iloc[0].str.strip().tolist()
    raw.index = raw.index + 1
    repeated = sorted({column for column in raw.columns[raw.columns.duplicated()] if column})
    if repeated:
        raise ValueError(f"{path}: the header has {shortened(repeated[0])} more than once")
    rows = raw.iloc[1:]
    rows = rows[(rows.apply(lambda column: column.str.strip()) != "").any(axis=1)]
    if rows.empty:
        raise ValueError(f"{path}: has a header but no rows")
    return rows


def columns_present(path: str | Path, columns: Sequence[str]) -> list[str]:
    """Those of the columns that a CSV has. Raises ValueError."""
    header = read_csv(path).columns
    return [column for column in columns if column in header]


@contextmanager
def csv_errors(path: str | Path) -> Iterator[None]:
    """Turn what pandas raises for an unreadable CSV into a ValueError of one line."""
    try:
        refuse_odd_table(path)
        yield
    except FileNotFoundError:
        raise ValueError(
            NO_DATA.format(path=path) if str(path) == "data/data.csv" else f"{path}: no such file"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as 'CSV UTF-8'") from None
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: is empty, must have a header and a row for each image") from None
    except OddFile as error:
        raise ValueError(f"{path}: {error}") from None
    except pd.errors.ParserError as error:
        reason = str(error).strip().rpartition("C error: ")[2]
        raise ValueError(
            f"{path}: not a readable CSV ({reason}); texts with commas or quotes need double quotes around them"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def parse_scores(raw: pd.DataFrame, column: str, path: str | Path) -> pd.Series:
    """A score column as floats; an empty cell (or no such column) is NaN. Raises ValueError for anything else."""
    if column not in raw.columns:
        return pd.Series(np.nan, index=raw.index)
    text = raw[column].str.strip()
    numbers = pd.to_numeric(text, errors="coerce").astype(float)
    wrong = (text != "") & ~np.isfinite(numbers)
    if wrong.any():
        first: Any = wrong.idxmax()
        raise ValueError(
            f"{path} row {first}: {column} is {shortened(text[first])}, must be a finite number or empty; "
            f"{wrong.sum()} such row(s)"
        )
    return numbers


def generator_of(name: str) -> str:
    """The generator an image came from: its file name up to the last underscore ("" if it has none)."""
    return PurePosixPath(name).name.rpartition("_")[0]


def check_names(
    table: pd.DataFrame,
    image_dir: Path,
    csv_path: str | Path,
    *,
    homes: Sequence[Path] = (),
    follow_links: bool = False,
    may_be_missing: bool = False,
) -> list[Path]:
    """Paths of all images.

    Args:
        homes: folders beside `image_dir` that links may lead to; any of them may be a link itself.
        follow_links: links may lead anywhere.

    Raises:
        ValueError: empty or repeated names, names or links that leave the folder, or missing images.
    """
    empty = table.loc[table["name"] == "", "row"]
    if len(empty):
        raise ValueError(f"{csv_path} row {empty.iloc[0]}: the image name is empty; {len(empty)} such row(s)")
    outside = [
        name
        for name in table["name"]
        if name.startswith("/") or PureWindowsPath(name).is_absolute() or ".." in PureWindowsPath(name).parts
    ]
    if outside:
        raise ValueError(f"{csv_path}: {len(outside)} image name(s) leave {image_dir}: {first_five(outside)}")
    paths = [image_dir / name for name in table["name"]]  # "./a.png" and "a.png" are now the same
    repeated = table.loc[pd.Series(paths, index=table.index).duplicated(), "name"].unique().tolist()
    if repeated:
        raise ValueError(f"{csv_path}: {len(repeated)} image name(s) occur more than once: {first_five(repeated)}")
    is_there = [not is_missing(path) for path in paths]
    missing = table.loc[[not there for there in is_there], "name"].tolist()
    if missing and not may_be_missing:
        raise ValueError(f"{image_dir}: {len(missing)} of {len(paths)} images are missing: {first_five(missing)}")
    present = [path for path, there in zip(paths, is_there, strict=True) if there]
    leaves = dict(zip(present, leave_folder(present, image_dir, *homes), strict=True)) if not follow_links else {}
    linked = [name for name, path in zip(table["name"], paths, strict=True) if leaves.get(path)]
    if linked:
        raise ValueError(
            f"{csv_path}: {len(linked)} image(s) lie behind links that leave {image_dir}: {first_five(linked)}; "
            "--follow_links allows that"
        )
    return paths


def assign_folds(
    table: pd.DataFrame,
    *,
    split_by: str,
    test_size: float,
    val_size: float,
    seed: int,
    part: tuple[int, int] | None = None,
    tasks: Sequence[str] = tuple(TASKS),
) -> np.ndarray:
    """The fold of each row: "train", "val" or "test".

    The table's own `split` wins; one that has no validation fold gets it out of training. Otherwise whole prompts
    (compared without regard to case and spacing), reference images or single images are drawn at random, so that
    `test_size` and `val_size` are shares of all prompts (or images).

    Args:
        part: (k, K) takes the k-th (from 1) of K parts as the test fold, in place of `test_size`.
        tasks: the scores that every fold must have, if any has.

    Raises:
        ValueError: an unknown fold name, too few prompts or images, or a fold that lacks scores of a task.
    """
    if (table["split"] != "").any():
        wrong = table[~table["split"].isin(FOLDS)]
        if len(wrong):
            raise ValueError(
                f"row {wrong['row'].iloc[0]}: split is {shortened(wrong['split'].iloc[0])}, must be train, val or "
                f"test; {len(wrong)} such row(s)"
            )
        if part:
            raise ValueError("--kfold: the data set has folds of its own; drop --kfold, or the column 'split' of a CSV")
        folds = table["split"].to_numpy(dtype=str).astype("<U5")
        if "val" not in folds and "test" in folds:
            train = np.flatnonzero(folds == "train")
            units = split_units(table.iloc[train], split_by)
            num_units = len(np.unique(units))
            num_val = max(1, round(num_units * val_size))
            if num_val < num_units:  # else `check_folds` says what is wrong
                folds[train[draw_units(units, num_val, seed)]] = "val"
    else:
        folds = draw_folds(split_units(table, split_by), split_by, test_size, val_size, seed, part)
    check_folds(table, folds, tasks)
    return folds


def split_units(table: pd.DataFrame, split_by: str) -> np.ndarray:
    """A number for each row; rows with the same number stay in one fold. Raises ValueError."""
    if split_by == "image":
        return np.arange(len(table))
    column = {"prompt": "prompt", "group": "reference"}[split_by]
    if (table[column] == "").any():
        row = table.loc[table[column] == "", "row"].iloc[0]
        others = "--split_by image" if (table["reference"] == "").any() else "--split_by group (reference image)"
        raise ValueError(f"row {row} has no {column}, so --split_by {split_by} cannot place it; use {others}")
    return prompt_groups(table) if split_by == "prompt" else pd.factorize(table["reference"])[0]


def prompt_groups(table: pd.DataFrame) -> np.ndarray:
    """A number for each row, equal for prompts that differ in case and spacing only; no prompt, a number of its own."""
    keys = prompt_keys(table)
    return groups_of(keys, keys == "")


def prompt_keys(table: pd.DataFrame) -> pd.Series:
    """Each row's prompt without regard to case and spacing."""
    return table["prompt"].str.casefold().str.split().str.join(" ")


def clusters(table: pd.DataFrame) -> np.ndarray:
    """A number for each row, equal for rows that are judged alike: the prompt, without one the reference image."""
    by_reference = groups_of(table["reference"], table["reference"] == "") + 2 * len(table)
    return np.where(table["prompt"] != "", prompt_groups(table), by_reference)


def groups_of(key: pd.Series, alone: pd.Series) -> np.ndarray:
    """A number for each row, equal for equal keys; rows that stand `alone` get one of their own."""
    codes = pd.factorize(key)[0]
    return np.where(alone, len(codes) + np.arange(len(codes)), codes)


def draw_folds(
    units: np.ndarray,
    split_by: str,
    test_size: float,
    val_size: float,
    seed: int,
    part: tuple[int, int] | None = None,
) -> np.ndarray:
    """Random folds of whole units. Raises ValueError if there are too few units for three folds."""
    count = len(np.unique(units))
    num_test, num_val = max(1, round(count * test_size)), max(1, round(count * val_size))
    if part:
        if count < part[1]:
            raise ValueError(f"{count} {split_by}(s) cannot be cut into {part[1]} parts; lower --kfold")
        chosen = np.array_split(np.random.default_rng(seed).permutation(np.unique(units)), part[1])[part[0] - 1]
        num_test = len(chosen)
    if count - num_test - num_val < 1:
        asked = (f"--kfold {part[1]}" if part else f"--test_size {test_size}") + f" --val_size {val_size}"
        raise ValueError(f"{count} {split_by}(s) cannot fill three folds with {asked}; add data or lower these")
    folds = np.full(len(units), "train", dtype="<U5")
    test = np.flatnonzero(np.isin(units, chosen)) if part else draw_units(units, num_test, seed)
    folds[test] = "test"
    rest = np.flatnonzero(folds == "train")
    folds[rest[draw_units(units[rest], num_val, seed)]] = "val"
    return folds


def draw_units(units: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Places of the rows of `count` units, drawn at random."""
    splitter = GroupShuffleSplit(n_splits=1, test_size=count, random_state=seed)
    return next(splitter.split(units, groups=units))[1]


def check_folds(table: pd.DataFrame, folds: np.ndarray, tasks: Sequence[str]) -> None:
    """Raise ValueError unless every fold can be trained on or measured: two scores of each task that has any."""
    for task in tasks:
        title = title_of(task)
        if table[task].isna().all():
            continue
        for fold in FOLDS:
            count = table.loc[folds == fold, task].notna().sum()
            if count < 2:
                raise ValueError(
                    f"the {fold} fold has {count} image(s) with a score of {title}, needs at least 2; "
                    "change --test_size, --val_size or the CSV's split column"
                )


@dataclass(frozen=True)
class LabelScale:
    """The MOS scale of one score: `low`..`high` in MOS units are 0..1 inside."""

    low: float
    high: float

    def to_unit(self, mos: np.ndarray) -> np.ndarray:
        """MOS units -> label units."""
        return (mos - self.low) / (self.high - self.low)

    def to_mos(self, unit: np.ndarray) -> np.ndarray:
        """Label units -> MOS units. What is measured is not clamped: clamping would tie scores that differ."""
        return self.low + unit * (self.high - self.low)

    def clamp(self, mos: np.ndarray) -> np.ndarray:
        """MOS units within the scale, for people to see."""
        return np.clip(mos, self.low, self.high)


def label_scale(mos: np.ndarray, folds: np.ndarray, given: tuple[float, float] | None, flag: str) -> LabelScale:
    """The scale of a score: as given, or from the lowest to the highest in the training fold.

    Raises:
        ValueError: a score lies outside the given range, or all training scores are equal.
    """
    if given:
        outside = (mos < given[0]) | (mos > given[1])
        if outside.any():
            raise ValueError(
                f"{flag} {given[0]} {given[1]}: {outside.sum()} score(s) lie outside, such as {mos[outside][0]}"
            )
        return LabelScale(*given)
    train = mos[folds == "train"]
    low, high = float(np.nanmin(train)), float(np.nanmax(train))
    if low == high:
        raise ValueError(f"every training score is {low}: nothing to learn; check the score column or set {flag}")
    return LabelScale(low, high)


def fingerprint(labels: bytes, image_hashes: Sequence[str]) -> str:
    """SHA-256 over the label file and every image's content: equal data, equal fingerprint."""
    digest = hashlib.sha256(labels)
    for item in image_hashes:
        digest.update(item.encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Examples:
    """A checked data set: images, prompts and scores with their folds and scales."""

    table: pd.DataFrame  # as `read_table` returns it, and `set`, the title of the data set a row is from
    folds: np.ndarray  # (n,) of FOLDS
    scales: dict[str, LabelScale]  # task -> MOS scale; the tasks that have scores
    files: list[ImageFile]  # the checked images
    fingerprint: str
    skipped: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=SKIPPED))  # rows that were left out

    @cached_property
    def test_digest(self) -> str:
        """SHA-256 over the test fold's images and scores, in whatever order: equal tests, equal digest."""
        rows = self.rows("test")
        scores = zip(*(self.mos(task, "test").tolist() for task in self.scales), strict=True)
        lines = sorted(f"{self.files[row].digest} {own}" for row, own in zip(rows, scores, strict=True))
        return hashlib.sha256("\n".join([*self.scales, *lines]).encode()).hexdigest()

    def rows(self, fold: str) -> np.ndarray:
        """Row numbers of a fold."""
        return np.flatnonzero(self.folds == fold)

    def mos(self, task: str, fold: str) -> np.ndarray:
        """MOS of a fold's rows, NaN where missing."""
        return self.table[task].to_numpy()[self.rows(fold)]

    @cached_property
    def sets(self) -> list[str]:
        """Titles of the data sets that the rows are from."""
        return self.table["set"].unique().tolist()

    def only(self, title: str) -> Examples:
        """The rows of one data set, with the scores that it has."""
        if len(self.sets) == 1:
            return self
        rows = np.flatnonzero(self.table["set"] == title)
        table = self.table.iloc[rows].reset_index(drop=True)
        scales = {task: scale for task, scale in self.scales.items() if table[task].notna().any()}
        return Examples(table, self.folds[rows], scales, [self.files[row] for row in rows], self.fingerprint)

    @cached_property
    def spreads(self) -> dict[str, np.ndarray]:
        """Task -> (n,) standard deviation of the opinions behind each label, in label units; none if none is given.

        A label without one gets the median.
        """
        found = {}
        for task, scale in ((task, scale) for task, scale in self.scales.items() if task in TASKS):
            std = self.table[f"{task}_std"] if f"{task}_std" in self.table else pd.Series(np.nan, self.table.index)
            typical = std[self.table[task].notna()].median()
            if np.isfinite(typical):
                found[task] = std.fillna(typical).to_numpy() / (scale.high - scale.low)
        return found

    @cached_property
    def unit_targets(self) -> dict[str, np.ndarray]:
        """Task -> (n,) labels on [0, 1], NaN where missing."""
        return {task: scale.to_unit(self.table[task].to_numpy()) for task, scale in self.scales.items()}

    @cached_property
    def train_means(self) -> dict[str, float]:
        """Task -> mean training label on [0, 1]."""
        return {task: float(np.nanmean(values[self.rows("train")])) for task, values in self.unit_targets.items()}


def leakage(examples: Examples) -> dict[str, dict[str, int]]:
    """How many images of the validation and the test fold share something with an earlier fold.

    Returns:
        {"prompt": {"val": ..., "test": ...}, "reference": {...}, "content": {...}}: numbers of images whose prompt
        (without regard to case and spacing), reference image or file content also occurs in training; for the test
        fold, in training or validation.
    """
    digests = pd.factorize(np.array([file.digest for file in examples.files]))[0]
    references = groups_of(
        examples.table["set"] + "\0" + examples.table["reference"], examples.table["reference"] == ""
    )
    found: dict[str, dict[str, int]] = {}
    for what, codes in (
        ("prompt", prompt_groups(examples.table)),
        ("reference", references),
        ("content", digests),
    ):
        found[what] = {}
        for number, fold in enumerate(FOLDS[1:], start=1):
            earlier = codes[np.isin(examples.folds, FOLDS[:number])]
            found[what][fold] = int(np.isin(codes[examples.rows(fold)], earlier).sum())
    return found


def leakage_notes(examples: Examples) -> list[str]:
    """What `leakage` found, in words: a line for each fold and kind that has any."""
    return [
        f"leakage: {count} of {len(examples.rows(fold))} {fold} images share their {what} with an earlier fold"
        for what, counts in leakage(examples).items()
        for fold, count in counts.items()
        if count
    ]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One data set as it was read, not yet split."""

    title: str
    table: pd.DataFrame  # as `read_table` returns it
    ranges: Mapping[str, tuple[float, float] | None]  # task -> MOS scale; None or absent: that of the training fold
    labels: bytes  # stands for the label file


def named_table(found: pd.DataFrame, root: Path, folders: Sequence[str] = (), **rules: Any) -> pd.DataFrame:
    """A table as `labels.read_dataset` gives it, as `read_table` does.

    Args:
        folders: where below the root the images of such a data set may be.
        rules: of `check_names`.

    Raises:
        ValueError: one line naming the folder and the rule.
    """
    table = found.rename(columns={"unit": "reference"}).assign(explanation="", row=np.arange(len(found)) + 1)
    no_prompt = table["c"].notna() & (table["prompt"] == "")
    if no_prompt.any():
        raise ValueError(f"{root}: {no_prompt.sum()} image(s) have a consistency score but no prompt")
    if "test" not in set(table["split"]):  # as published, the scores of the test fold may be withheld
        table["split"] = ""
    homes = [root / folder for folder in folders]
    return table.assign(path=check_names(table, root, root, homes=homes, **rules))


def build_examples(
    sources: Sequence[Labelled],
    *,
    split_by: str | Sequence[str],
    extra: Sequence[str] = (),
    skip_bad: bool = False,
    **options: Any,
) -> Examples:
    """Split data sets, check their images, and bring all to the scale of the first that has a score.

    Args:
        sources: with several, names get the set's title in front.
        split_by: as `assign_folds` takes it; a list gives each set its own.
        extra: scores beside q and c.
        skip_bad: leave out images that cannot be read. All others keep their folds, and the rest is as without them.
        options: further ones of `assign_folds`.

    Raises:
        ValueError: folds or scales that cannot be, or images that cannot be read.
    """
    tasks = (*TASKS, *extra)
    scales: dict[str, LabelScale] = {}
    tables, folds = [], []
    found = check_files(sources, place(sources, split_by, tasks, options), tasks, skip_bad=skip_bad)
    for source, own, files in found:
        kept = np.array([isinstance(file, ImageFile) for file in files])
        table = source.table[kept].reset_index(drop=True).assign(set=source.title)
        for task in tasks:
            if table[task].isna().all():
                continue
            flag = f"--mos_range_{task}" if task in TASKS else "--extra_scores"
            scale = label_scale(table[task].to_numpy(), own[kept], source.ranges.get(task), flag)
            common = scales.setdefault(task, scale)
            table[task] = common.to_mos(scale.to_unit(table[task].to_numpy())) if scale != common else table[task]
            if f"{task}_std" in table:
                table[f"{task}_std"] *= (common.high - common.low) / (scale.high - scale.low)
        if len(sources) > 1:
            table["name"] = source.title + "/" + table["name"]
        tables.append(table)
        folds.append(own[kept])
    whole = pd.concat(tables, ignore_index=True)
    usable = [file for *_, files in found for file in files if isinstance(file, ImageFile)]
    labels = b"".join(source.labels for source in sources)
    ordered = {task: scales[task] for task in tasks if task in scales}
    digest = fingerprint(labels, [file.digest for file in usable])
    return Examples(whole, np.concatenate(folds), ordered, usable, digest, skipped_rows(found))


def place(
    sources: Sequence[Labelled], split_by: str | Sequence[str], tasks: Sequence[str], options: Mapping[str, Any]
) -> list[np.ndarray]:
    """The folds of each data set's rows. Raises ValueError."""
    placed: dict[str, str] = {}
    folds = []
    for number, source in enumerate(sources):
        unit = split_by if isinstance(split_by, str) else split_by[number]
        own = assign_folds(source.table, split_by=unit, tasks=tasks, **options)
        if unit == "prompt":
            own = follow_prompts(source.table, own, placed)
            check_folds(source.table, own, tasks)
        folds.append(own)
    return folds


Checked = list[tuple[Labelled, np.ndarray, list[ImageFile | str]]]  # data set, folds, files or what is wrong with them


def check_files(
    sources: Sequence[Labelled], folds: Sequence[np.ndarray], tasks: Sequence[str], *, skip_bad: bool
) -> Checked:
    """Read every image once. Raises ValueError for broken ones, or for what is left without them."""
    paths = [path for source in sources for path in source.table["path"]]
    results = try_images(paths)
    if not skip_bad:
        refuse_broken(paths, results)
    rest = iter(results)
    found = [(source, own, list(islice(rest, len(own)))) for source, own in zip(sources, folds, strict=True)]
    for source, own, files in found:
        kept = np.array([isinstance(file, ImageFile) for file in files])
        if not kept.any():
            first = f"{source.table['name'].iloc[0]} ({files[0]})"
            raise ValueError(
                f"--bad_images skip: none of the {len(files)} images of {source.title} is left: {first}, ..."
            )
        if not kept.all():
            try:
                check_folds(source.table, np.where(kept, own, "skipped"), tasks)
            except ValueError as error:
                raise ValueError(f"--bad_images skip: without {(~kept).sum()} images {error}") from None
    return found


def skipped_rows(found: Checked) -> pd.DataFrame:
    """The columns of SKIPPED for every image that cannot be read."""
    rows = [
        (f"{source.title}/{name}" if len(found) > 1 else name, row, path, fold, file)
        for source, own, files in found
        for name, row, path, fold, file in zip(*(source.table[key] for key in SKIPPED[:3]), own, files, strict=True)
        if isinstance(file, str)
    ]
    return pd.DataFrame(rows, columns=SKIPPED)


def follow_prompts(table: pd.DataFrame, folds: np.ndarray, placed: dict[str, str]) -> np.ndarray:
    """The same folds, but of prompts that an earlier data set has `placed`, which also learns of these.

    Folds that the data set brings itself stay.
    """
    keys = prompt_keys(table)
    drawn = (table["split"] == "").all()
    found = [placed.get(key, fold) if key and drawn else fold for key, fold in zip(keys, folds, strict=True)]
    for key, fold in zip(keys, found, strict=True):
        placed.setdefault(key, fold)
    return np.array(found)


if __name__ == "__main__":  # the one command that is called by this file's name
    import describe

    describe.main()
