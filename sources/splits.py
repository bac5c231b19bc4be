"""Folds: drawn over whole prompts, or taken from the data set, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupShuffleSplit

from sources.examples import FOLDS, LabelledTable, prompt_groups, prompt_keys
from sources.scores import TASKS, title_of
from storage.messages import quoted


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
                f"row {wrong['row'].iloc[0]}: split is {quoted(wrong['split'].iloc[0])}, must be train, val or "
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


def assign_all_folds(
    sources: Sequence[LabelledTable], split_by: str | Sequence[str], tasks: Sequence[str], options: Mapping[str, Any]
) -> list[np.ndarray]:
    """The folds of each data set's rows. Raises ValueError."""
    placed: dict[str, str] = {}
    folds = []
    for number, source in enumerate(sources):
        unit = split_by if isinstance(split_by, str) else split_by[number]
        own = assign_folds(source.table, split_by=unit, tasks=tasks, **options)
        if unit == "prompt":
            own = keep_prompts_together(source.table, own, placed)
            check_folds(source.table, own, tasks)
        folds.append(own)
    return folds


def keep_prompts_together(table: pd.DataFrame, folds: np.ndarray, placed: dict[str, str]) -> np.ndarray:
    """The same folds, but of prompts that an earlier data set has `placed`, which also learns of these.

    Folds that the data set brings itself stay.
    """
    keys = prompt_keys(table)
    drawn = (table["split"] == "").all()
    found = [placed.get(key, fold) if key and drawn else fold for key, fold in zip(keys, folds, strict=True)]
    for key, fold in zip(keys, found, strict=True):
        placed.setdefault(key, fold)
    return np.array(found)


def suitable_unit(title: str, table: pd.DataFrame, split_by: str) -> str:
    """What a data set is split by: as asked for, but a known one without prompts by its references or images."""
    if title == "csv" or split_by != "prompt" or (table["prompt"] != "").all():
        return split_by
    return "group" if (table["reference"] != "").all() else "image"
