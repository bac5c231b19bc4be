"""A checked data set in memory: images, prompts and scores, with their folds and scales, and what folds share.

Scores live on [0, 1] inside (`LabelScale`) and on the data set's own MOS scale everywhere a person looks.
A missing score is NaN from here on; it is masked in the loss and left out of every statistic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from sources.scores import TASKS
from storage.image_files import ImageFile
from storage.messages import first_five

FOLDS = ("train", "val", "test")
SKIPPED = ["name", "row", "path", "fold", "reason"]  # columns of what says which images were left out


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


@dataclass(frozen=True)
class Examples:
    """A checked data set: images, prompts and scores with their folds and scales."""

    table: pd.DataFrame  # as `read_table` returns it, and `set`, the title of the data set a row is from
    folds: np.ndarray  # (n,) of FOLDS
    scales: dict[str, LabelScale]  # task -> MOS scale; the tasks that have scores
    files: list[ImageFile]  # the checked images
    fingerprint: str
    skipped: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=SKIPPED))  # rows that were left out
    notes: tuple[str, ...] = ()  # what a user should know of how the files were read

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
class LabelledTable:
    """One data set as it was read, not yet split."""

    title: str
    table: pd.DataFrame  # as `read_table` returns it
    ranges: Mapping[str, tuple[float, float] | None]  # task -> MOS scale; None or absent: that of the training fold
    labels: bytes  # stands for the label file
    notes: tuple[str, ...] = ()  # what a user should know of how it was read


def skipped_note(examples: Examples) -> str:
    """How many images were left out of the data, the first five and why."""
    table = examples.skipped
    found = [f"{name} ({reason})" for name, reason in zip(table["name"], table["reason"], strict=True)]
    return f"{len(table)} of {len(table) + len(examples.table)} images left out: {first_five(found)}"
