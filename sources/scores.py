"""The scores that are predicted and the measures of agreement: what they are called, everywhere."""

from __future__ import annotations

from collections.abc import Iterable

TASKS = {"q": "quality", "c": "consistency"}  # the two that the trainer is about; --extra_scores adds others
MEASURES = {"srocc": "SROCC", "plcc": "PLCC", "plcc_fit": "PLCC fitted", "krocc": "KROCC", "rmse": "RMSE (MOS)"}
COLUMNS = {"q": ("mos_quality", "pred_quality"), "c": ("mos_align", "pred_align")}


def title_of(task: str) -> str:
    """What a score is called: an extra one by its column."""
    return TASKS.get(task, task)


def columns_of(task: str) -> tuple[str, str]:
    """How a table of predictions names the human and the predicted score of a task."""
    return COLUMNS.get(task) or (f"mos_{task.removeprefix('mos_')}", f"pred_{task.removeprefix('mos_')}")


def stem_of(task: str) -> str:
    """What both columns of a task have in common: "quality", "align"."""
    return columns_of(task)[0].removeprefix("mos_")


def title_of_stem(stem: str) -> str:
    """What the score of such columns is called."""
    return {stem_of(task): title for task, title in TASKS.items()}.get(stem, stem)


def tasks_of(measured: Iterable[str]) -> list[str]:
    """The scores that names of measures such as "srocc_q" are about, q and c first."""
    found = [name.removeprefix("srocc_") for name in measured if name.startswith("srocc_")]
    return [*(task for task in TASKS if task in found), *(task for task in found if task not in TASKS)]
