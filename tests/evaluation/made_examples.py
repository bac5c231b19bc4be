"""Made up: examples without images, predictions, embeddings as of a frozen CLIP. No tests: these import it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from evaluation import agreement
from sources.examples import Examples, LabelScale
from storage.image_files import ImageFile

MOS = LabelScale(1.0, 5.0)
MEASURES = ("srocc", "plcc", "plcc_fit", "krocc", "rmse")
FOLDS = ["train"] * 20 + ["val"] * 8 + ["test"] * 40
AUTHENTICITY = np.linspace(1, 5, len(FOLDS))
ENOUGH = agreement.MIN_PER_GENERATOR
MAKERS = ["good"] * ENOUGH + ["bad"] * ENOUGH + ["few"] * (ENOUGH - 1) + [""] * ENOUGH


def examples_of(folds: Sequence[str], scales: dict[str, LabelScale] | None = None, **columns: Any) -> Examples:
    """Examples without images; what a column does not say is random and differs for each row."""
    rng = np.random.default_rng(len(folds))
    size = len(folds)
    usual = {
        "name": [f"{i}.png" for i in range(size)],
        "prompt": [f"thing {i}" for i in range(size)],
        "group": "",
        "reference": "",
        "set": "csv",
        "q": rng.uniform(1, 5, size),
        "c": rng.uniform(1, 5, size),
    }
    table = pd.DataFrame({**usual, **columns})
    known = {task: MOS for task in ("q", "c", "authenticity") if task in table and table[task].notna().any()}
    files = [ImageFile(Path(name), name, (8, 8)) for name in table["name"]]
    return Examples(table, np.array(folds), scales or known, files, "")


def joined_examples() -> Examples:
    """Two data sets, interleaved: one with q, c and authenticity, one with q alone; some labels are missing."""
    examples = examples_of(FOLDS, set=["both", "photos"] * (len(FOLDS) // 2), authenticity=AUTHENTICITY)
    table = examples.table
    table.loc[table["set"] == "photos", ["c", "authenticity"]] = np.nan
    table.loc[[30, 33, 35, 52], "q"] = np.nan
    return examples


def guesses(examples: Examples, fold: str = "test", seed: int = 0) -> dict[str, np.ndarray]:
    """Predictions in MOS units that have something to do with the labels."""
    rng = np.random.default_rng(seed)
    return {
        task: np.nan_to_num(examples.mos(task, fold), nan=3.0) + rng.normal(size=len(examples.rows(fold)))
        for task in examples.scales
    }


def label_units(scores: dict[str, np.ndarray], examples: Examples) -> dict[str, np.ndarray]:
    """MOS units -> label units."""
    return {task: scale.to_unit(scores[task]) for task, scale in examples.scales.items()}


def by_makers() -> tuple[Examples, np.ndarray]:
    """Predictions that order one generator's images right and another's backwards."""
    quality = np.arange(len(MAKERS)) / 10 + 1
    pred = quality.copy()
    pred[ENOUGH : 2 * ENOUGH] = pred[ENOUGH : 2 * ENOUGH][::-1]
    return examples_of(["test"] * len(MAKERS), group=MAKERS, q=quality, c=np.nan), pred + 0.25


def naive_means(examples: Examples, task: str, keys: Sequence[str]) -> np.ndarray:
    """For each test image the mean label of the training images alike in `keys`, or of all of them."""
    rows = list(zip(examples.folds, examples.table[task], *(examples.table[key] for key in keys), strict=True))
    train = [(label, own) for fold, label, *own in rows if fold == "train" and not np.isnan(label)]
    found = []
    for fold, _, *own in rows:
        if fold == "test":
            alike = [label for label, other in train if other == own]
            found.append(np.mean(alike or [label for label, _ in train]))
    return np.array(found)


def knowledge(
    examples: Examples, width: int = 6, *, stage_width: int = 0, levels: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Random embeddings of each fold, as a frozen CLIP would give them, with raw stage statistics behind them."""
    rng = np.random.default_rng(2)
    known = {}
    for name, fold in (("train_eval", "train"), ("val", "val"), ("test", "test")):
        size = len(examples.rows(fold))
        image, text = rng.normal(size=(2, size, width))
        known[name] = {"image": image, "text": text, "cos": rng.uniform(0.1, 0.4, size)}
        if levels:
            known[name] |= {f"level_{task}": rng.uniform(size=size) for task in ("q", "c")}
        if stage_width:
            stages = 5 + rng.normal(size=(size, stage_width)) * np.logspace(-2, 2, stage_width)
            known[name]["image"] = np.hstack([image, stages])
    return known


def unit_rows(rng: np.random.Generator, num_rows: int, width: int) -> np.ndarray:
    rows = rng.normal(size=(num_rows, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def left_out(model: BaseEstimator, features: np.ndarray, target: np.ndarray, fold_of: np.ndarray) -> float:
    """Mean squared error in cross-validation, each fold predicted by a model that is fitted to the others."""
    return float(np.mean((cross_val_predict(model, features, target, cv=PredefinedSplit(fold_of)) - target) ** 2))
