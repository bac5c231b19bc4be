"""How well runs score labelled sets, their own or others: the table across data sets.

Images that a run was trained or selected on, known by their content, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import agreement, metrics, text_tables
from sources import assemble, csv_files, examples, labels
from sources.scores import MEASURES, columns_of, title_of
from sources.seen import prompts_seen_by, seen_by
from storage.image_files import check_images

COLUMNS = ["run", "set", "score", "images", *MEASURES, "srocc_low", "srocc_high", "generator_mean_srocc"]


@dataclass(frozen=True)
class LabelledSet:
    """A labelled set to evaluate on."""

    title: str
    table: pd.DataFrame  # as `data.read_table` returns it
    digests: list[str]  # SHA-256 of each image's content


def read_sets(
    csv: str | None,
    image_dir: Path,
    columns: csv_files.Columns,
    named: Sequence[tuple[str, str]],
    extra: Sequence[str],
    *,
    follow_links: bool = False,
    duplicates: str = "error",
) -> list[LabelledSet]:
    """The sets that a command line names: a CSV, or (name, folder) pairs of known data sets. Raises ValueError.

    Args:
        follow_links: links may lead out of the image folders.
        duplicates: what becomes of several rows of one image in the CSV, as `csv_files.read_table` takes it.
    """
    if csv and not image_dir.is_dir():
        raise ValueError(f"--image_dir {image_dir}: no such folder")
    tables = {}
    for name, folder in named:
        root = Path(folder)
        found = labels.read_dataset(name, root)
        tables[name] = assemble.named_table(found, root, labels.image_folders(name), follow_links=follow_links)
    if csv:
        title = csv if Path(csv).stem in tables else Path(csv).stem
        present = csv_files.columns_present(csv, extra, columns.names)
        rules: dict[str, Any] = {"duplicates": duplicates, "follow_links": follow_links}
        tables[title] = csv_files.read_table(csv, image_dir, columns, extra=present, **rules)
    return [
        LabelledSet(title, table, [file.digest for file in check_images(table["path"].tolist())])
        for title, table in tables.items()
    ]


def evaluate(
    run: str,
    scales: Sequence[str],
    labelled: LabelledSet,
    score: Callable[[pd.DataFrame], pd.DataFrame],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score a labelled set with a run and measure the agreement.

    Args:
        run: the run's folder.
        scales: the scores that the run predicts.
        score: rows of a table -> columns pred_quality, ..., as `predict.Scorer.score` gives them.

    Returns:
        A row of COLUMNS for each score that both have, and lines of text: what was left out, and the generators.
    """
    seen = seen_by(Path(run))
    fresh = np.array([seen is None or digest not in seen for digest in labelled.digests])
    table = labelled.table[fresh].reset_index(drop=True)
    tasks = [task for task in scales if task in table and table[task].notna().sum() > 1]
    lines = []
    if seen is None:
        lines.append(f"note: {run} does not tell which images it was trained on (no splits.csv with digests beside it)")
    elif not fresh.all():
        lines.append(f"note: {(~fresh).sum()} of {len(fresh)} images of {labelled.title} left out: {run} has seen them")
    if leaked := int(examples.prompt_keys(table).isin(prompts_seen_by(Path(run))).sum()):
        lines.append(f"note: {leaked} of the {len(table)} others share their prompt with an image that {run} has seen")
    if not tasks:
        had = ", ".join(title_of(task) for task in scales)
        return [], [*lines, f"note: no unseen images of {labelled.title} with scores that {run} predicts ({had})"]
    predicted = score(table)
    clusters = examples.clusters(table)
    makers = table["group"].to_numpy()
    rows: list[dict[str, Any]] = []
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        pred = predicted[columns_of(task)[1]].to_numpy()
        known = table[task].notna().to_numpy() & np.isfinite(pred)
        mos = table[task].to_numpy()[known]
        pred = pred[known]
        ends = metrics.cluster_bootstrap(pred, mos, clusters[known].tolist()).get("srocc", (np.nan, np.nan))
        rows.append(
            {
                "run": run,
                "set": labelled.title,
                "score": title_of(task),
                "images": len(mos),
                **metrics.agreement(pred, mos),
                "srocc_low": ends[0],
                "srocc_high": ends[1],
                "generator_mean_srocc": generator_floor(mos, makers[known]),
            }
        )
        found |= agreement.by_generator(task, pred, mos, makers[known])
    return rows, lines + text_tables.generator_lines(found)


def generator_floor(mos: np.ndarray, makers: np.ndarray) -> float:
    """SROCC of each generator's mean score; NaN where generators have so few images that this is the score itself."""
    if len(mos) < agreement.MIN_PER_GENERATOR * len(set(makers)):
        return np.nan
    names: list[str] = makers.tolist()
    return metrics.srocc(metrics.group_mean_predictor(names, mos, names), mos)


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table across runs and sets as text."""
    wide = {
        key: max(len(text) for text in (key, *(str(row[key]) for row in rows))) + 2 for key in ("run", "set", "score")
    }
    titles = "".join(f"{title:>12}" for title in MEASURES.values())
    head = "".join(f"{key:<{width}}" for key, width in wide.items())
    lines = [f"{head}{'images':>7}{titles}{'95 % of SROCC':>18}{'generator':>11}"]
    for row in rows:
        cells = "".join(f"{row[key]:<{width}}" for key, width in wide.items())
        numbers = "".join(f"{row[name]:>12.3f}" for name in MEASURES)
        floor = f"{row['generator_mean_srocc']:.3f}" if np.isfinite(row["generator_mean_srocc"]) else ""
        ends = f"{row['srocc_low']:.3f} .. {row['srocc_high']:.3f}" if np.isfinite(row["srocc_low"]) else ""
        lines.append(f"{cells}{row['images']:>7}{numbers}{ends:>18}{floor:>11}")
    return [*lines, "generator: SROCC of the mean score of each generator in this very set, which looks at no pixel"]
