"""Names of images in tables: which file each stands for, and which generator made it."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

from storage.image_files import SUFFIXES, is_missing, leaves_folder
from storage.messages import first_five, note, quoted

MOST_COMPARED = 5000  # files of a folder that a missing name is compared with


class ImageFolder:
    """The files below a folder, which names may mean although they are spelled a little differently.

    Differences in backslashes, case, blanks around, Unicode normal form, a missing suffix, a leading "./" and the name
    of the folder itself are looked through.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listings: dict[str, dict[str, list[str]]] = {}  # subfolder -> key -> entries

    def entries(self, subfolder: str) -> dict[str, list[str]]:
        """What lies in a subfolder, by `key_of`."""
        if subfolder not in self.listings:
            found: dict[str, list[str]] = {}
            try:
                for entry in sorted(os.listdir(self.folder / subfolder)):
                    found.setdefault(key_of(entry), []).append(entry)
            except (OSError, ValueError):  # no folder; a null character in its name
                pass
            self.listings[subfolder] = found
        return self.listings[subfolder]

    def find(self, name: str) -> list[str]:
        """The files that a name may mean, as names relative to the folder: itself alone if there is such a file."""
        if not is_missing(self.folder / name):
            return [name]
        parts = parts_of(name)
        return self.below(parts) or self.below(parts[self.num_own(parts) :])

    def below(self, parts: Sequence[str]) -> list[str]:
        """All paths whose parts have the same keys."""
        found = [""]
        for number, part in enumerate(parts):
            matches: list[str] = []
            for place in found:
                entries = self.entries(place)
                same = entries.get(key_of(part), [])
                if number == len(parts) - 1 and not same and PurePosixPath(part).suffix.lower() not in SUFFIXES:
                    same = [each for suffix in SUFFIXES for each in entries.get(key_of(part) + suffix, [])]
                same = [part] if part in same else same
                matches += [f"{place}/{entry}" if place else entry for entry in same]
            found = sorted(matches)
        return found if parts else []

    def num_own(self, parts: Sequence[str]) -> int:
        """How many parts at the beginning of a name are the end of the folder's own path."""
        own = [key_of(part) for part in Path(os.path.abspath(self.folder)).parts]
        keys = [key_of(part) for part in parts]
        return next((size for size in range(len(parts) - 1, 0, -1) if own[-size:] == keys[:size]), 0)

    def nearest(self, name: str) -> str:
        """The name of the file that is most like a missing one; "" if none is."""
        parts = parts_of(name)
        for begin in dict.fromkeys((0, self.num_own(parts))):
            places = self.below(parts[begin:-1]) or [""]
            keys = self.entries(places[0])
            near = difflib.get_close_matches(key_of(parts[-1] if parts else name), list(keys)[:MOST_COMPARED], n=1)
            if near:
                return str(PurePosixPath(places[0]) / keys[near[0]][0])
        return ""


def key_of(part: str) -> str:
    """A file's name without regard to case, blanks around and Unicode normal form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", part).strip().casefold())


def parts_of(name: str) -> list[str]:
    """Folders and file of a name, whichever slashes it has."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def spelling(name: str) -> str:
    """A name as a path with slashes, in one Unicode normal form; equal for names that mean the same file."""
    return unicodedata.normalize("NFC", "/".join(parts_of(name)))


def check_image_names(
    table: pd.DataFrame,
    image_dir: Path,
    csv_path: str | Path,
    *,
    homes: Sequence[Path] = (),
    follow_links: bool = False,
    may_be_missing: bool = False,
    may_repeat: bool = False,
    say: Callable[[str], object] = note,
) -> list[Path]:
    """Paths of all images. A name that no file has means the one file that differs from it in its spelling alone.

    Args:
        homes: folders beside `image_dir` that links may lead to; any of them may be a link itself.
        follow_links: links may lead anywhere.
        may_be_missing, may_repeat: images may be missing, or stand in several rows.
        say: is told how many names differ in their spelling.

    Raises:
        ValueError: empty or repeated names, names or links that leave the folder, missing images, or names that
            several files may be meant by.
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
    files = match_names(table["name"].tolist(), ImageFolder(image_dir), csv_path, say, may_be_missing=may_be_missing)
    paths = [image_dir / files.get(name, name) for name in table["name"]]  # "./a.png" and "a.png" are now the same
    if not may_repeat:
        refuse_repeated(table, paths, csv_path)
    present = [path for name, path in zip(table["name"], paths, strict=True) if name in files]
    leaves = dict(zip(present, leaves_folder(present, image_dir, *homes), strict=True)) if not follow_links else {}
    linked = [name for name, path in zip(table["name"], paths, strict=True) if leaves.get(path)]
    if linked:
        raise ValueError(
            f"{csv_path}: {len(linked)} image(s) lie behind links that leave {image_dir}: {first_five(linked)}; "
            "--follow_links allows that"
        )
    return paths


def match_names(
    names: Sequence[str],
    folder: ImageFolder,
    csv_path: str | Path,
    say: Callable[[str], object],
    *,
    may_be_missing: bool,
) -> dict[str, str]:
    """Name -> name of the file that it means, of those that have one. Raises ValueError."""
    meant = {name: folder.find(name) for name in dict.fromkeys(names)}
    several = [name for name, found in meant.items() if len(found) > 1]
    if several:
        choices = ", ".join(map(quoted, meant[several[0]][:5]))
        raise ValueError(
            f"{csv_path}: {len(several)} image name(s) may mean several files of {folder.folder}: "
            f"{quoted(several[0])} one of {choices}"
        )
    missing = [name for name in names if not meant[name]]
    if missing and not may_be_missing:
        near = folder.nearest(missing[0])
        hint = f" (nearest to {quoted(missing[0])} is {quoted(near)})" if near else ""
        raise ValueError(
            f"{folder.folder}: {len(missing)} of {len(names)} images are missing{hint}: {first_five(missing)}"
        )
    spelled = [f"{quoted(name)} for {quoted(found[0])}" for name, found in meant.items() if found and found[0] != name]
    if spelled:
        say(f"{csv_path}: {len(spelled)} image name(s) are taken for files spelled otherwise, such as {spelled[0]}")
    return {name: found[0] for name, found in meant.items() if found}


def refuse_repeated(table: pd.DataFrame, paths: Sequence[Path], csv_path: str | Path) -> None:
    """Raise ValueError for images that stand in more than one row."""
    rows: dict[Path, list[int]] = {}
    for path, row in zip(paths, table["row"], strict=True):
        rows.setdefault(path, []).append(row)
    names = dict(zip(paths, table["name"], strict=True))
    repeated = [
        f"{names[path]} (rows {', '.join(map(str, found[:5]))}{', ...' * (len(found) > 5)})"
        for path, found in rows.items()
        if len(found) > 1
    ]
    if repeated:
        raise ValueError(
            f"{csv_path}: {len(repeated)} image name(s) occur more than once: {first_five(repeated)}; "
            "--duplicates mean averages the scores of such rows"
        )


def image_folder(root: Path, names: Sequence[str], candidates: Sequence[str], split: str) -> str:
    """The first of the folders that has the first image that is in any.

    Args:
        candidates: folders below the root; {split} in them is the fold.

    Raises:
        ValueError: no image is in any.
    """
    folders = list(dict.fromkeys(folder.format(split=split).rstrip("/") for folder in candidates))
    for image in names:
        for folder in folders:
            if (root / folder / image).is_file():
                return folder
    places = {folder: ImageFolder(root / folder) for folder in folders}
    for image in names:
        for folder in folders:
            if places[folder].find(image):
                return folder
    looked = ", ".join(folder or "the folder itself" for folder in folders)
    near = next(
        (f"{folder}/{near}".lstrip("/") for folder in folders if (near := places[folder].nearest(names[0]))), ""
    )
    raise ValueError(
        f"{root}: none of the labels' images, such as {names[0]}, is here; looked in {looked}"
        + (f"; the nearest is {quoted(near)}" if near else "")
    )


def names_of(names: pd.Series, paths: Sequence[Path], image_dir: Path) -> pd.Series:
    """Names that stand for other files than their own become the names of these."""
    return pd.Series(
        [
            name if image_dir / name == path else path.relative_to(image_dir).as_posix()
            for name, path in zip(names, paths, strict=True)
        ],
        index=names.index,
        dtype=names.dtype,
    )


def generator_of(name: str) -> str:
    """The generator an image came from: its file name up to the last underscore ("" if it has none)."""
    return PurePosixPath(name.replace("\\", "/")).name.rpartition("_")[0]
