"""The summary that repeated runs leave: read back, with every part checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sources.scores import MEASURES, tasks_of
from storage.json_files import NUMBER, read_json, schema_mismatch

PROTOCOL_FILE = "protocol.json"  # tells a folder of repeated runs
SUMMARY_FILE = "summary.json"
STATISTICS = {  # of a measure over repeated runs
    **dict.fromkeys(("mean", "sd", "median"), NUMBER),
    "interval": (list, type(None)),
    "values": [NUMBER, ...],
}
SUMMARY = {  # of summary.json
    "runs": [str, ...],
    "tests": [str, ...],
    "share": NUMBER,
    "images": {"test": int, str: int},
    "test": {str: STATISTICS},
    "floors": {str: {str: STATISTICS}},
    "over": {str: {str: STATISTICS}},
}


def score_mismatch(measured: Mapping[str, Any], name: str) -> str:
    """What the scores of "srocc_q", ... are without, in words; "" if each has them all."""
    absent = [key for task in tasks_of(measured) for part in MEASURES if (key := f"{part}_{task}") not in measured]
    return f"{name!r} has no {absent[0]!r}" if absent else ""


def summary_mismatch(found: Any) -> str:
    """What of a summary is not as it is written, in words; "" if it all is."""
    if said := schema_mismatch(found, SUMMARY):
        return said
    parts = {"test": found["test"], **{f"floors.{name}": row for name, row in found["floors"].items()}}
    for name, row in parts.items():
        if said := score_mismatch(row, name):
            return said
    parts |= {f"over.{name}": row for name, row in found["over"].items()}
    for name, row in parts.items():
        for key, values in row.items():
            if len(values["values"]) != len(found["runs"]):
                return f"'{name}.{key}.values' are not as many as the runs"
            if values["interval"] is not None and (
                said := schema_mismatch(values["interval"], [NUMBER, NUMBER], f"{name}.{key}.interval")
            ):
                return said
    return ""


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary that repeated runs have left, with every part it is written with. Raises ValueError."""
    try:
        found = read_json(folder / SUMMARY_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: no finished repeated runs, {SUMMARY_FILE} is missing") from None
    if said := summary_mismatch(found):
        raise ValueError(
            f"{folder / SUMMARY_FILE}: {said}: it was made by another version, or changed; run the same command again"
        )
    return found
