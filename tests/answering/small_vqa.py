"""Small drawn sets, and runs of main.py on them, each made once a session. No tests: these import it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from stopped_runs import OF_TIME, StopsAt

import main
from answering.configs import parse_args
from regions import demo_set
from training import checkpoints, devices, resuming, signals

NUM_IMAGES = 32
FORMS = ("GQA", "VQA")
# Questions of a run in GQA's form: to train on, which is as many steps of 16, and to test on.
NUM_TRAIN, NUM_STEPS, NUM_TEST = 270, 17, 41
# What a run is as small by as it can be, and still learns to give different answers.
TINY = ["--num_hid", "16", "--AOA_layers", "1", "--epochs", "2", "--batch_size", "16", "--lr", "3e-2"]
TINY += ["--no_use_counter"]
ONE_GRAPH = ["--general_hidden_dim", "16", "--mgat_layers", "2"]
FILES = {
    "GQA": ("questions/train_balanced_questions.json", "questions/val_all_questions.json"),
    "VQA": ("v2_mscoco_train2014_annotations.json", "v2_mscoco_val2014_annotations.json"),
}
WORST = -1.0  # of any accuracy


@cache
def drawn_cache() -> Path:
    """A folder for --cache_dir in which small drawn sets lie where the large ones would."""
    folder = Path(tempfile.mkdtemp(prefix="vqa-"))  # below the session's own, see tests/conftest.py
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_set, "NUM_IMAGES", NUM_IMAGES)
        for form in FORMS:
            demo_set.find_demo_set(folder, form, devices.start_runtime("cpu", "off"))
    return folder


def drawn_set(form: str) -> Path:
    """The folder of a small drawn set, as --data_root names it. Read it, do not change it."""
    return demo_set.find_demo_set(drawn_cache(), form, devices.start_runtime("cpu", "off"))[0]


def drawn_features(form: str) -> Path:
    """What --features names in it."""
    return demo_set.find_demo_set(drawn_cache(), form, devices.start_runtime("cpu", "off"))[1]


def tiny_flags(*flags: str, form: str = "GQA") -> list[str]:
    """The command line of a run of about a second on a drawn set, but for its folder."""
    return ["--demo", "--dataset", form, "--cache_dir", str(drawn_cache()), "--no_report", *TINY, *flags]


@contextmanager
def trained_weights_kept() -> Iterator[None]:
    """Whatever validation says of the untrained model."""
    begin = resuming.Progress.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resuming.Progress, "begin", lambda self, score, scores: begin(self, WORST, scores))
        yield


def tiny_run(folder: Path, *flags: str, form: str = "GQA") -> Path:
    """Make such a run, whose trained weights are kept; returns the folder."""
    with trained_weights_kept():
        main.run(parse_args([*tiny_flags(*flags, form=form), "--output", str(folder)]))
    return folder


@cache
def finished(form: str) -> Path:
    """The folder of a run with its page. Read it, do not change it."""
    return tiny_run(Path(tempfile.mkdtemp(prefix="vqa-")) / form, "--epochs", "3", "--use_report", form=form)


@cache
def finished_by_clip() -> Path:
    """The folder of a run that looks at images through a CLIP. Read it, do not change it."""
    flags = ["--features", "clip", "--clip_model", "tiny", "--clip_pretrained", "assets", "--max_boxes", "16"]
    return tiny_run(Path(tempfile.mkdtemp(prefix="vqa-")) / "clip", *flags, form="VQA")


@cache
def finished_without_images() -> Path:
    """The folder of a run that looks at no image. Read it, do not change it."""
    return tiny_run(Path(tempfile.mkdtemp(prefix="vqa-")) / "blind", "--question_only")


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(path: Path) -> pd.DataFrame:
    """A CSV file, all cells as text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def people(form: str, fold: str) -> dict[str, tuple[str, list[str]]]:
    """Question id -> image, and what people answered, as the official file has it: "train" or "val"."""
    found = read(drawn_set(form) / FILES[form][fold == "val"])
    if form == "GQA":
        return {name: (one["imageId"], [one["answer"]]) for name, one in found.items() if one["isBalanced"]}
    return {
        str(one["question_id"]): (str(one["image_id"]), [each["answer"] for each in one["answers"]])
        for one in found["annotations"]
    }


def differences(a: Path, b: Path) -> list[str]:
    """What is not the same to the bit in two finished runs, but for times."""
    weights = [checkpoints.load_weights(folder)[1] for folder in (a, b)]
    found = ["names of weights"] if weights[0].keys() != weights[1].keys() else []
    found += [name for name, value in weights[0].items() if not torch.equal(value, weights[1].get(name))]
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns=OF_TIME) for folder in (a, b)]
    found += [] if tables[0].equals(tables[1]) else ["metrics.csv"]
    for name in ("predictions.csv", "examples.json", "best/scorer.json"):
        found += [] if (a / name).read_bytes() == (b / name).read_bytes() else [name]
    results = [read(folder / "results.json") for folder in (a, b)]
    for name in ("seconds", "seconds_from_first_batch", "resumed"):
        results[0].pop(name), results[1].pop(name)
    return found + [name for name, value in results[0].items() if value != results[1].get(name)]


def error_of(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line by which main.py refuses a command line, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main.main(list(argv))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def write_table(folder: Path) -> Path:
    """A table of one's own about the drawn images: the same two questions about each of 28; data/questions.csv."""
    asked = {"Is there a circle?": "circle", "Is there a red thing?": "red"}
    graphs = read(drawn_set("GQA") / "sceneGraphs" / "train_sceneGraphs.json")
    rows = []
    for image, graph in graphs.items():
        seen = {word for one in graph["objects"].values() for word in (one["name"], *one["attributes"])}
        name = f"train2014/COCO_train2014_{int(image):012}.jpg"
        rows += [(name, text, "yes|yes it is" if word in seen else "no") for text, word in asked.items()]
    folder.mkdir(exist_ok=True)
    path = folder / "questions.csv"
    pd.DataFrame(rows, columns=["image", "question", "answer"]).to_csv(path, index=False)
    return path


def run_until(argv: list[str], folder: Path, number: int | None) -> int:
    """Begin a run or go on with it, until the n-th look at whether to stop or to the end; returns the looks."""
    stop_signals = StopsAt(number)
    config = parse_args(["--resume", str(folder)] if folder.exists() else [*argv, "--output", str(folder)])
    if number is None:
        main.run(config, stop_signals=stop_signals)
    else:
        with pytest.raises(signals.Stopped, match=rf"stopped and saved: --resume {folder} goes on from there"):
            main.run(config, stop_signals=stop_signals)
    return stop_signals.looks
