"""What a data set holds, before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from sources.examples import FOLDS, Examples, leakage_notes, prompt_keys, skipped_note
from sources.scores import title_of
from storage.image_files import ImageFile

NUM_BINS = 10
BAR_LENGTH = 40
MAX_LISTED = 5
WIDE = 0.25  # of an image outside of the square in its middle
ELONGATED = 3  # times as long as wide


def describe(whole: Examples, sets: Sequence[Examples]) -> str:
    """Rows, folds, scores with histograms, prompts, references, generators, duplicates and leakage, as text.

    Args:
        whole: all data sets together.
        sets: each by itself, in its own units.
    """
    lines = []
    for own in sets:
        if len(sets) > 1:
            lines.append(f"== {own.sets[0]}")
        lines += [f"{name:<12}{text}" for name, text in facts(own)]
        for task in own.scales:
            lines += ["", *histogram(own, task)]
        lines += ["", *generators(own), ""]
    notes = leakage_notes(whole)
    return "\n".join([*lines, *(notes or ["leakage: none; folds share no prompt, reference image or file content"])])


def facts(examples: Examples) -> list[tuple[str, str]]:
    """(name, text) of what can be said in a line each."""
    table = examples.table
    files = examples.files
    short = [min(file.size) for file in files]
    sizes = Counter(file.size for file in files)
    (width, height), most = sizes.most_common(1)[0]
    found = [
        ("images", f"{len(table)}; " + ", ".join(f"{fold} {len(examples.rows(fold))}" for fold in FOLDS)),
        ("pixels", f"shorter side {min(short)} to {max(short)}, {most} of {width} x {height}; {len(sizes)} size(s)"),
        ("wide", wide_images(files)),
        ("elongated", elongated_images(files) or "none"),
        ("prompts", counted(prompt_keys(table))),
        ("references", counted(table["reference"])),
        ("generators", counted(table["group"])),
        ("rationales", f"{(table['explanation'] != '').sum()} images"),
        ("duplicates", duplicates(examples)),
    ]
    if len(examples.skipped):
        found.append(("left out", skipped_note(examples)))
    found += [("note", note) for note in examples.notes]
    return [(name, text) for name, text in found if text not in ("none", "0 images") or name == "duplicates"]


def wide_images(files: Sequence[ImageFile]) -> str:
    """What the square in the middle, which most CLIPs look at, leaves out of images that are no squares."""
    lost = np.array([1 - min(file.size) / max(file.size) for file in files])
    if not lost.any():
        return "none"
    many = (lost >= WIDE).sum()
    return f"the middle square leaves out up to {lost.max():.0%} of an image, {WIDE:.0%} or more of {many} image(s)"


def elongated_images(files: Sequence[ImageFile]) -> str:
    """What the square in the middle leaves out of very long images, and how they are seen whole; "" without any."""
    sizes = [file.size for file in files if max(file.size) >= ELONGATED * min(file.size)]
    if not sizes:
        return ""
    lost = np.array([1 - min(size) / max(size) for size in sizes])
    return (
        f"{len(lost)} of {len(files)} images are {ELONGATED}:1 or longer; the middle square that most CLIPs see "
        f"leaves {lost.mean():.0%} of them unseen (up to {lost.max():.0%}): --crops looks at parts all over them"
    )


def counted(texts: pd.Series) -> str:
    """How many different texts there are, and on how many rows each stands."""
    counts = texts[texts != ""].value_counts()
    if counts.empty:
        return "none"
    bare = (texts == "").sum()
    return f"{len(counts)}, {counts.min()} to {counts.max()} images each" + (f"; {bare} images without" * bool(bare))


def duplicates(examples: Examples) -> str:
    """Images whose files have the same content, in words."""
    same: dict[str, list[str]] = {}
    for name, file in zip(examples.table["name"], examples.files, strict=True):
        same.setdefault(file.digest, []).append(name)
    groups = [names for names in same.values() if len(names) > 1]
    if not groups:
        return "none"
    shown = "; ".join(" = ".join(names) for names in groups[:MAX_LISTED])
    return f"{len(groups)} content(s) occur more than once: {shown}{'; ...' * (len(groups) > MAX_LISTED)}"


def histogram(examples: Examples, task: str) -> list[str]:
    """A score's range, mean and distribution as bars."""
    mos = examples.table[task].dropna().to_numpy()
    scale = examples.scales[task]
    spread = examples.spreads.get(task)
    opinions = ""
    if spread is not None:
        opinions = f", opinions differ by {np.median(spread) * (scale.high - scale.low):.2f} (median std)"
    missing = len(examples.table) - len(mos)
    lines = [
        f"{title_of(task)}: {len(mos)} scores {mos.min():g} to {mos.max():g} on a scale of {scale.low:g} to "
        f"{scale.high:g}, mean {mos.mean():.2f}, sd {mos.std():.2f}{opinions}" + f"; {missing} missing" * bool(missing)
    ]
    counts, edges = np.histogram(mos, bins=NUM_BINS)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        lines.append(f"  {low:>8.2f} ..{high:>8.2f} {count:>6}  {'#' * round(BAR_LENGTH * count / counts.max())}")
    return lines


def generators(examples: Examples) -> list[str]:
    """Mean scores of each generator."""
    table = examples.table[examples.table["group"] != ""]
    if table.empty:
        return []
    tasks = list(examples.scales)
    rows = table.groupby("group")[tasks].mean()
    rows.insert(0, "images", table.groupby("group").size())
    rows = rows.rename(columns={task: title_of(task) for task in tasks}).rename_axis("generator").reset_index()
    return rows.to_string(index=False, float_format="%.2f").splitlines()
