"""Values for each option of the trainer, and the flags that say them. No tests: these import it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refusals import refusal

from configs import OPTIONS
from guidance.arguments import parse_args

# Values unlike the defaults that satisfy the rules between options, where any value would not do.
SAMPLES: dict[str, Any] = {
    "unfreeze_schedule": "3@0,1@2",
    "init_from": "runs/first",
    "refinement_heads": 4,
    "refinement_dim": 64,
    "loss": "l1+0.5*plcc",
    "seed": 7,
    "resume": "auto",
    "val_size": 0.25,
    "mos_range_q": (0.0, 5.0),
    "mos_range_c": (-1.0, 1.5),
    "max_grad_norm": 0.0,
    "dataset": "agiqa-3k,csv",
    "data_root": "folder",
    "kfold": 5,
    "fold": 2,
}
COMPANIONS = {
    "use_refinement": {"use_residual_learning": False},
    "dataset": {"data_root": "folder"},
    "data_root": {"dataset": "agiqa-3k"},
    "fold": {"kfold": 4},
    "resume": {"output_dir": "run"},
    "test_crops": {"crops": 3},
    "global_view": {"crops": 3},
}


def sample(name: str) -> Any:
    """A valid value of an option that is not its default."""
    spec = OPTIONS[name]
    if name in SAMPLES:
        return SAMPLES[name]
    if spec.kind is bool:
        return not spec.default
    if spec.metadata["choices"]:
        return next(choice for choice in spec.metadata["choices"] if choice != spec.default)
    if spec.kind is str:
        return "other"
    low, high = map(float, spec.metadata["within"][1:-1].split(","))
    if spec.kind is int:
        return (spec.default or int(low)) + 1
    value = (low + min(high, 1.0)) / 2
    return value / 2 if value == spec.default else value


def as_flags(name: str, value: Any) -> list[str]:
    """The command line that sets an option."""
    spec = OPTIONS[name]
    if spec.kind is bool:
        opposite = "--use_" + spec.flag.removeprefix("--no_") if spec.default else "--no_" + name
        return [spec.flag if value is not spec.default else opposite]
    return [spec.flag, *(map(str, value) if spec.pair else [str(value)])]


def write_json(folder: Path, value: Any) -> str:
    path = folder / "given.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def outcome(*argv: str) -> str:
    """The message that a command line is refused with."""
    return refusal(parse_args, argv)
