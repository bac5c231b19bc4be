"""A trained run as a folder for others: ONNX, tokenizer, preprocessing, a model card, and a score.py without torch."""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import models
from evaluation.metrics import srocc
from pages.run_data import Run
from serving.scorer import Scorer
from sharing.card import card_text, run_of
from sharing.folder import CARD, PIXELS, copy_scripts, importable, new_folder, pixel_settings, summary
from sharing.graph import GRAPH_FILE, ScoreGraph, write_graph
from sharing.onnx_files import DISABLED, DTYPES
from sharing.tokenizer import portable
from sources.scores import columns_of
from storage.atomic import write_errors
from storage.json_files import write_json

SCRIPT = "score.py"
MOST_COMPARED = 100  # images
AT_ONCE = 16  # of them


@dataclass(frozen=True)
class Samples:
    """Images to compare the two scorers on."""

    source: str
    paths: list[str]
    prompts: list[str]


def export(args: argparse.Namespace, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Write the scorer of --checkpoint into the folder --export, and say how far it agrees with this one.

    Args:
        names: images that the flags name, to compare on; none: the run's own test images.

    Returns:
        Name of a score -> SROCC with the scorer it was made from, and the largest difference in MOS units.

    Raises:
        ValueError: it cannot be exported. OSError: images cannot be read, or the folder cannot be written.
    """
    precision = args.precision or "float32"
    target = Path(args.export)
    scorer = Scorer.load(args.checkpoint, device="cpu")
    run = run_of(Path(args.checkpoint))
    samples = samples_of(args, names, run)
    with new_folder(target) as folder:
        with write_errors(target):
            write_scorer(scorer, folder, precision)
        found = compare(scorer, folder, samples)
        with write_errors(target):
            card = card_text(
                scorer,
                run,
                name=target.name,
                graph=GRAPH_FILE,
                precision=precision,
                compared=compared_lines(samples, found) if found else [],
            )
            (folder / CARD).write_text(card, encoding="utf-8", errors="replace")
    print(summary(target, precision))
    print("\n".join(compared_lines(samples, found)))
    return found


def samples_of(args: argparse.Namespace, names: Sequence[str], run: Run | None) -> Samples:
    """The images that are named, or those of the run's test fold that are still there, at most MOST_COMPARED."""
    if names:
        paths = [str(Path(args.image_dir or "") / name) for name in names[:MOST_COMPARED]]
        return Samples("named images", paths, [args.prompt or ""] * len(paths))
    rows = [] if run is None else zip(run.scored["name"], run.scored["prompt"], strict=True)
    known = [(run.files.get(name, ("", ""))[0], prompt) for name, prompt in rows] if run else []
    there = [(path, prompt) for path, prompt in known if path and Path(path).is_file()][:MOST_COMPARED]
    fold = {"test": "test", "val": "validation"}[run.fold] if run else "test"
    return Samples(f"images of the run's {fold} fold", [path for path, _ in there], [text for _, text in there])


def write_scorer(scorer: Scorer, folder: Path, precision: str) -> None:
    """Fill a folder with all that score.py reads, and itself. Raises ValueError for what cannot be exported."""
    graph = ScoreGraph(scorer, DTYPES[precision])
    text = None
    if graph.reads_text:
        made, before = portable(scorer.tokenizer, graph.text_length, trim=graph.trims)
        made.save(str(folder / "tokenizer.json"))
        levels = models.LEVEL_TEXTS["consistency"] if scorer.has_levels else []
        text = {"patterns": ["{prompt}", *levels], **before}
    settings = {
        "scores": {
            columns_of(task)[1]: {"low": scale.low, "high": scale.high} for task, scale in scorer.scales.items()
        },
        **pixel_settings(scorer.views()),
        "text": text,
        "session": {"disabled_optimizers": DISABLED.get(precision, [])},
    }
    write_json(folder / "preprocess.json", settings)
    write_graph(graph, folder, precision)
    copy_scripts(folder, SCRIPT, PIXELS)


def compare(scorer: Scorer, folder: Path, samples: Samples) -> dict[str, tuple[float, float]]:
    """As `export` returns it; nothing without images. Raises OSError."""
    if not samples.paths:
        return {}
    expected = scorer.score(samples.paths, samples.prompts)
    with importable(folder):
        other = runpy.run_path(str(folder / SCRIPT))["Scorer"](folder)
    parts = [
        other.score(samples.paths[start : start + AT_ONCE], samples.prompts[start : start + AT_ONCE])
        for start in range(0, len(samples.paths), AT_ONCE)
    ]
    found = {}
    for name in parts[0]:
        mine, theirs = expected[name].to_numpy(), np.concatenate([part[name] for part in parts])
        known = np.isfinite(mine)
        if known.any():
            found[name] = (srocc(theirs[known], mine[known]), float(np.abs(theirs - mine)[known].max()))
    return found


def compared_lines(samples: Samples, found: Mapping[str, tuple[float, float]]) -> list[str]:
    """What `compare` has found, in words."""
    if not found:
        return ["compared with nothing: no images of the run's test fold are here; IMAGE... or --image_dir names some"]
    head = f"compared with the float32 scorer it was made from, on {len(samples.paths)} {samples.source}:"
    return [head, *(f"  {name}: SROCC {rank:.4f}, off by at most {far:.1g} MOS" for name, (rank, far) in found.items())]
