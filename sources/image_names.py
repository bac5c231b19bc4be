"""Names of images in tables: which file each stands for, and which generator made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

from storage.image_files import is_missing, leaves_folder
from storage.messages import first_five


def check_image_names(
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
    leaves = dict(zip(present, leaves_folder(present, image_dir, *homes), strict=True)) if not follow_links else {}
    linked = [name for name, path in zip(table["name"], paths, strict=True) if leaves.get(path)]
    if linked:
        raise ValueError(
            f"{csv_path}: {len(linked)} image(s) lie behind links that leave {image_dir}: {first_five(linked)}; "
            "--follow_links allows that"
        )
    return paths


def generator_of(name: str) -> str:
    """The generator an image came from: its file name up to the last underscore ("" if it has none)."""
    return PurePosixPath(name).name.rpartition("_")[0]
