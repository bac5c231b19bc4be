"""Data sets that were read, brought together: images checked, folds drawn, scores brought to one scale."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sources.examples import SKIPPED, Examples, LabelledTable, LabelScale
from sources.image_names import check_image_names
from sources.scores import TASKS
from sources.splits import assign_all_folds, check_folds
from storage.image_files import ImageFile, refuse_broken, try_images


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


def named_table(found: pd.DataFrame, root: Path, folders: Sequence[str] = (), **rules: Any) -> pd.DataFrame:
    """A table as `labels.read_dataset` gives it, as `read_table` does.

    Args:
        folders: where below the root the images of such a data set may be.
        rules: of `check_image_names`.

    Raises:
        ValueError: one line naming the folder and the rule.
    """
    table = found.rename(columns={"unit": "reference"}).assign(explanation="", row=np.arange(len(found)) + 1)
    no_prompt = table["c"].notna() & (table["prompt"] == "")
    if no_prompt.any():
        raise ValueError(
            f"{root}: {no_prompt.sum()} image(s) have a consistency score but no prompt; if the data set comes with a "
            "file of prompts, put it there"
        )
    if "test" not in set(table["split"]):  # as published, the scores of the test fold may be withheld
        table["split"] = ""
    homes = [root / folder for folder in folders]
    return table.assign(path=check_image_names(table, root, root, homes=homes, **rules))


def build_examples(
    sources: Sequence[LabelledTable],
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
    found = check_files(sources, assign_all_folds(sources, split_by, tasks, options), tasks, skip_bad=skip_bad)
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
    notes = tuple(dict.fromkeys(note for source in sources for note in source.notes))
    return Examples(whole, np.concatenate(folds), ordered, usable, digest, skipped_rows(found), notes)


Checked = list[
    tuple[LabelledTable, np.ndarray, list[ImageFile | str]]
]  # data set, folds, files or what is wrong with them


def check_files(
    sources: Sequence[LabelledTable], folds: Sequence[np.ndarray], tasks: Sequence[str], *, skip_bad: bool
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
