"""Run folders written by hand, and pages taken apart. No tests: these import it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from configs import TrainingConfig
from drawing import figures
from evaluation import metrics
from pages.report import write_report
from sources.scores import COLUMNS

NUM_IMAGES = 48
MOS = {task: np.random.default_rng(seed).uniform(1, 5, NUM_IMAGES) for task, seed in (("q", 0), ("c", 1))}
VOID = {"meta", "link", "img", "br", "path", "use", "rect", "image"}
HOSTILE = (
    "<script>document.title='taken'</script>\"'><img src=x onerror=document.title='taken'> $x_{$ \u202eRTL \u05d0\u05d1"
    "</title></style><svg onload=document.title='taken'><a href=\"javascript:document.title='taken'\">{{7*7}} \x1b[31m"
)


def noisy(task: str, spread: float = 0.7, seed: int = 2) -> np.ndarray:
    """Predictions with errors of this standard deviation."""
    return MOS[task] + np.random.default_rng(seed).normal(0, spread, NUM_IMAGES)


def measured(pred: dict[str, np.ndarray]) -> dict[str, float]:
    """What results.json holds of a fold."""
    found = {f"{k}_{task}": v for task, p in pred.items() for k, v in metrics.agreement(p, MOS[task]).items()}
    return {**found, "main": metrics.main_score(found)}


def write_run(folder: Path, *, tasks: str = "qc", spread: float = 0.7, epochs: int = 3, **options: Any) -> Path:
    """A finished run: test and validation fold of the same size and scores, two generators, six images a prompt."""
    folder.mkdir(parents=True)
    pred = {task: noisy(task, spread) for task in tasks}
    scores = measured(pred)
    makers = ["one" if i % 2 else "two" for i in range(NUM_IMAGES)]
    table = pd.DataFrame(
        {
            "name": [f"{makers[i]}_{i:02}.png" for i in range(NUM_IMAGES)],
            "set": "csv",
            "split": "test",
            "prompt": [f"prompt number {i // 6}" for i in range(NUM_IMAGES)],
            "generator": makers,
            "cluster": [i // 6 for i in range(NUM_IMAGES)],
        }
    )
    for task, (mos, own) in COLUMNS.items():
        table[mos] = MOS[task] if task in tasks else np.nan
        table[own] = pred[task] if task in tasks else np.nan
    held = table.assign(name="val_" + table["name"], split="val")
    pd.concat([table, held]).to_csv(folder / "predictions.csv", index=False)
    splits = pd.concat([table, held])[["name", "split"]].assign(digest="0" * 64)
    splits.to_csv(folder / "splits.csv", index=False)
    history = {"epoch": range(1, epochs + 1), "loss": 0.1, "val_loss": 0.2, "grad_norm": 0.5, "lr": 3e-5}
    history |= {"seconds": 1.5, "images_per_s": 200.0, "data_wait": 0.25, "val_main": scores["main"]}
    for task in tasks:
        history |= {f"val_{name}_{task}": scores[f"{name}_{task}"] for name in ("srocc", "plcc")}
        history |= {f"loss_{task}": 0.1, f"val_loss_{task}": 0.3}
    pd.DataFrame(history).to_csv(folder / "metrics.csv", index=False)
    config = TrainingConfig(**options).to_json()
    provenance = {"versions": {"python": "3.11.7"}, "git_revision": "abc123", "machine": "a machine"}
    (folder / "config.json").write_text(json.dumps({**config, "provenance": provenance}))
    rows = [
        {"generator": name, "images": 24, "srocc": srocc, "plcc": 0.5, "mos": 3.0, "pred": 2.75}
        for name, srocc in (("one", 0.25), ("two", 0.75))
    ]
    results = {
        "best_epoch": min(2, epochs),
        "epochs": epochs,
        "val": scores,
        "test": scores,
        "base": {"val": {}, "test": {key: value - 0.125 for key, value in scores.items()}},
        "floors": {"generator_mean": dict.fromkeys(scores, 0.25)},
        "images": {"train": 100, "val": NUM_IMAGES, "test": NUM_IMAGES},
        "leakage": {"prompt": {"val": 0, "test": 7}, "reference": {"val": 0, "test": 0}},
        "certainty": {
            task: {
                "intervals": {"srocc": [0.111, 0.999], "plcc": [0.222, 0.888]},
                "within_prompt": {"accuracy": 0.625, "pairs": 80},
                "slope": 0.92,
                "bias": -0.1,
            }
            for task in tasks
        },
        "generators": {task: {"by_generator": rows, "worst": "one", "ranking": 1.0} for task in tasks},
        "sets": {},
        "seconds": 12.0,
        "seconds_from_first_batch": 9.0,
        "data_fingerprint": "f" * 64,
        "test_digest": "d" * 64,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def statistics(values: list[float]) -> dict[str, Any]:
    """As protocol.py writes them."""
    ends = metrics.resampled_interval(values, 0.25)
    mean, sd, median = float(np.mean(values)), float(np.std(values, ddof=1)), float(np.median(values))
    return {"mean": mean, "sd": sd, "median": median, "interval": ends, "values": values}


def write_repeated(folder: Path, spread: float = 0.5) -> Path:
    """A folder of two finished runs with their summary."""
    names = ["seed1", "seed2"]
    found = []
    for seed, name in enumerate(names, start=1):
        write_run(folder / name, spread=spread * seed, seed=seed)
        found.append(json.loads((folder / name / "results.json").read_text()))
    test = {key: statistics([run["test"][key] for run in found]) for key in found[0]["test"]}
    floor = {key: statistics([0.25, 0.25]) for key in test}
    over = {key: statistics([run["test"][key] - 0.25 for run in found]) for key in test}
    summary = {
        "runs": names,
        "tests": ["x", "y"],
        "share": 0.25,
        "images": {"train": 192, "val": 48, "test": 48},
        "test": test,
        "floors": {"generator_mean": floor},
        "over": {"generator_mean": over},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "protocol.json").write_text(json.dumps(TrainingConfig(repeats=2, seed=1).to_json()))
    return folder


def change(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Edit a JSON or CSV file of a run; `edit` may change what it gets, or return something else."""
    path = folder / name
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        path.write_text(json.dumps(edit(found) or found))
    else:
        edit(pd.read_csv(path, keep_default_na=False)).to_csv(path, index=False)


def keep_images(folder: Path, images: Path) -> pd.DataFrame:
    """Give every image of a run a file in one colour, and its path and digest; returns splits.csv."""
    images.mkdir(exist_ok=True)
    splits = pd.read_csv(folder / "splits.csv")
    digests, paths = [], []
    for number, name in enumerate(splits["name"]):
        path = images / name
        Image.new("RGB", (400, 200), (number * 2, 0, 255 - number * 2)).save(path)
        paths.append(str(path))
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    splits = splits.assign(digest=digests, path=paths)
    splits.to_csv(folder / "splits.csv", index=False)
    return splits


def make_hostile(run: Path) -> Path:
    """The same run, whose names, prompts, generators and options are now out to break the page."""
    change(run, "predictions.csv", lambda table: table.assign(prompt=HOSTILE + "w" * 10_000, generator=HOSTILE))
    change(run, "predictions.csv", lambda table: table.assign(name=[HOSTILE + n for n in table["name"]], set=HOSTILE))

    def spoil(results: dict[str, Any]) -> None:
        for part in results["generators"].values():
            part["by_generator"][0]["generator"] = HOSTILE + "w" * 500
        results["notes"] = [HOSTILE, {HOSTILE: HOSTILE}]
        results["advice"] = [{"flag": HOSTILE, "value": {"a": HOSTILE}, "why": HOSTILE}]

    change(run, "results.json", spoil)
    change(run, "config.json", lambda config: config.update(data_csv_path=HOSTILE + "/long" * 100))
    return run


class Page(HTMLParser):
    """A page's elements, its tables as lists of rows of cells, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.label = ""
        self.inside = ""
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.inside = self.inside if tag in VOID else tag
        if found.get("class") == "scroll":
            self.label = str(found["aria-label"])
            self.tables[self.label] = []
        elif tag == "tr":
            self.tables[self.label].append([])
        elif tag in ("td", "th"):
            self.tables[self.label][-1].append("")

    def handle_data(self, data: str) -> None:
        if self.inside != "style":
            self.words.append(data)
        rows = self.tables.get(self.label)
        if rows and rows[-1] and data.strip():
            rows[-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.label = ""

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of this kind."""
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(folder: Path) -> Page:
    """The report of a run, written now."""
    return Page(write_report(folder))


def undraw(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words alone: pictures are made, but not rendered, which takes most of the time."""
    monkeypatch.setattr(figures, "to_svg", lambda *_: "")
    monkeypatch.setattr(figures, "to_png", lambda *_: b"")


def cells(*numbers: float) -> list[str]:
    """Numbers as a page shows them."""
    return [f"{value:.3f}" for value in numbers]
