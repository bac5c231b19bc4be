"""The model card of a scorer that is given away: README.md with the hub's metadata, from the run's own files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from backbones.download import HF_HUB, LOCAL_DIR
from cli.options import split_list
from configs import DATASET_NAMES
from pages import run_page
from pages.run_data import Run, read_run
from serving.scorer import Scorer
from sharing.folder import rendered
from sources.scores import TASKS, columns_of, title_of
from training import checkpoints

METRICS = {"srocc": "spearmanr", "plcc": "pearsonr"}  # measures -> the hub's names of them
TASK_TYPE = "image-classification"  # the nearest: the hub knows no task that ends in a number


def run_of(checkpoint: Path) -> Run | None:
    """The finished run that a checkpoint belongs to; None if it lies alone. Raises ValueError if that is damaged."""
    folder = checkpoints.weights_folder(checkpoint).resolve().parent
    return read_run(folder) if (folder / "results.json").exists() else None


def card_text(scorer: Scorer, run: Run | None, *, name: str, license_name: str = "", **form: Any) -> str:
    """What the scorer is, what it is worth, how it is used, and nothing that its files do not tell.

    Args:
        name: what the scorer is called.
        license_name: the hub's name of a licence; "" if none was stated.
        form: `graph`, `precision` and `compared` of an exported scorer, or `repository` on the hub.
    """
    known = {"graph": "", "precision": "", "compared": [], "repository": "", **form}
    return rendered(
        "model_card.md.j2",
        **known,
        metadata=metadata(scorer, run, name, license_name, library="onnx" if known["graph"] else "pytorch").to_yaml(),
        license=license_name,
        run=run,
        about=run_page.about(without_paths(run.options), run.provenance) if run else [],
        tables=[table for table in (run_page.score_table(run), run_page.certainty_table(run)) if table] if run else [],
        source=public_source(scorer.description.get("source", "a CLIP")),
        scores=[
            (columns_of(task)[1], title_of(task), scale, task in TASKS and task != "q")
            for task, scale in scorer.scales.items()
        ],
    )


def metadata(scorer: Scorer, run: Run | None, name: str, license_name: str, *, library: str) -> ModelCardData:
    """What the hub shows, sorts and finds models by."""
    datasets = [] if run is None else datasets_of(run)
    results = [] if run is None else [row for title in sets_of(run) for row in eval_results(run, title)]
    return ModelCardData(
        license=license_name or None,
        library_name=library,
        pipeline_tag=TASK_TYPE,
        tags=["image-quality-assessment", "ai-generated-images", "clip"],
        datasets=datasets or None,
        metrics=list(METRICS.values()) if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def datasets_of(run: Run) -> list[str]:
    """The known data sets that a run was trained on, by name."""
    return [name for name in split_list(run_page.data_name(run.options)) if name in DATASET_NAMES]


def sets_of(run: Run) -> list[str | None]:
    """The data sets that were measured one by one; None stands for all."""
    return [None, *run.results["sets"]]


def eval_results(run: Run, title: str | None) -> list[EvalResult]:
    """SROCC and PLCC of each score on the fold that was measured, with the ends of their 95 % intervals."""
    part = run.results["sets"][title] if title else {**run.results, "test": run.results[run.fold]}
    name = title or run_page.data_name(without_paths(run.options))
    return [
        EvalResult(
            task_type=TASK_TYPE,
            task_name="image quality assessment",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data",
            dataset_name=name,
            dataset_split={"test": "test", "val": "validation"}[run.fold],
            metric_type=kind,
            metric_name=f"{measure.upper()} of {title_of(task)}",
            metric_value=value,
            metric_args={"interval_95": ends} if ends else None,
        )
        for task in run.tasks
        for measure, kind in METRICS.items()
        if (value := part["test"].get(f"{measure}_{task}")) is not None
        for ends in [part["certainty"].get(task, {}).get("intervals", {}).get(measure)]
    ]


def without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run; of those that may be paths of this machine their last part alone."""
    names = ("data_csv_path", "init_from", "clip_model", "clip_pretrained")
    found = {name: public_name(str(options[name])) for name in names if options.get(name)}
    return {**options, **found}


def public_source(text: str) -> str:
    """Where weights come from, "NAME (WEIGHTS)", without paths of this machine."""
    found = re.fullmatch(r"(.*) \((.*)\)", text)
    return f"{public_name(found[1])} ({public_name(found[2])})" if found else public_name(text)


def public_name(text: str) -> str:
    """A name that may be a path of this machine: its last part if it is one, or else itself."""
    if text.startswith(HF_HUB):
        return text
    path = Path(text.removeprefix(LOCAL_DIR))
    is_meant = text.startswith((LOCAL_DIR, ".", "~", "/")) or len(path.parts) > 2
    return path.name if is_meant or os.path.exists(path) else text
