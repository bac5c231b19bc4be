"""Finished runs of a tiny CLIP on the demo set, each trained once. No tests: these import it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import baseline
from serving.scorer import Scorer
from serving.shared_scorer import SharedScorer

TINY = ["--clip_model", "tiny", "--clip_pretrained", "none", "--image_size", "56", "--freeze_clip", "--epochs", "1"]
load = Scorer.load  # which tests replace


def data_flags(demo_set: tuple[Path, Path]) -> list[str]:
    """The options of baseline.py that name the demo set."""
    return ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]


@cache
def finished_run(demo_set: tuple[Path, Path], *flags: str) -> Path:
    """The folder of a run with these flags more. Read it, do not change it."""
    folder = demo_set[0].parent.with_name("-".join(["run", *(flag.strip("-") for flag in flags)]))
    baseline.main([*data_flags(demo_set), *TINY, "--no_report", *flags, "--output_dir", str(folder)])
    return folder


@cache
def loaded(checkpoint: Path) -> Scorer:
    """The scorer of a run that nobody changes. Use it, do not change it."""
    return load(checkpoint)


@cache
def shared(checkpoint: Path) -> SharedScorer:
    """The same for many threads."""
    return SharedScorer.load(checkpoint)
