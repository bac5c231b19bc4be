"""Images that cannot be used, or no longer: told, left out if so asked, and never of a fold that is measured."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import baseline
from cli.memo import NO_MEMO
from evaluation import text_tables
from finetune import feed, run_files
from finetune.experiment import read_examples
from guidance.arguments import parse_args
from inputs import image_store
from training import devices, loop

QUICK = "--clip_model tiny --clip_pretrained none --image_size 56 --freeze_clip --epochs 3 --batch_size 8 --no_report"


PIXELS = f"{QUICK} --no_cache --image_memory_gb 0 --cache_max_gb 0"  # every image is decoded whenever it is needed


@dataclass(frozen=True)
class Copy:
    """A data set that may be damaged, and where a run on it goes."""

    csv: Path
    images: Path
    run: Path

    def train(self, flags: str) -> dict:
        paths = ["--data_csv_path", str(self.csv), "--image_base_dir", str(self.images), "--output_dir", str(self.run)]
        return baseline.main([*paths, *shlex.split(flags)])

    def damage(self, name: str) -> None:
        (self.images / name).unlink()

    def replace(self, name: str) -> None:
        Image.new("RGB", Image.open(self.images / name).size).save(self.images / name)


@pytest.fixture
def copy_set(demo_set, tmp_path) -> Copy:
    shutil.copy(demo_set[0], tmp_path / "data.csv")
    shutil.copytree(demo_set[1], tmp_path / "images")
    return Copy(tmp_path / "data.csv", tmp_path / "images", tmp_path / "run")


@pytest.fixture(scope="module")
def names_of(demo_set, tmp_path_factory) -> dict[str, list[str]]:
    """Names of the images in each fold."""
    config = parse_args(["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])])
    examples = read_examples(config, NO_MEMO)
    return {fold: examples.table["name"].iloc[examples.rows(fold)].tolist() for fold in ("train", "val", "test")}


def before_training(monkeypatch, change) -> None:
    """Let something happen after the data was checked and before any image is decoded."""
    original = run_files.write_inputs
    monkeypatch.setattr(run_files, "write_inputs", lambda *args: (original(*args), change()))


def after_epoch(monkeypatch, changes) -> None:
    """Let something happen after epochs, counted from 1."""
    original = text_tables.epoch_line

    def line(row, epochs):
        changes.get(row["epoch"], lambda: None)()
        return original(row, epochs)

    monkeypatch.setattr(text_tables, "epoch_line", line)


def one_line_of_exit_2(capsys, run) -> str:
    with pytest.raises(SystemExit) as caught:
        run()
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


def test_a_run_that_skips_is_one_on_the_data_without_what_it_skips(copy_set, names_of, capsys, tmp_path):
    lost = [names_of["train"][0], names_of["val"][1], names_of["test"][2]]
    for name in lost:
        copy_set.damage(name)
    os.mkfifo(copy_set.images / lost[1])
    results = copy_set.train(f"{QUICK} --bad_images skip --split_file {tmp_path / 'folds.csv'}")
    plan = capsys.readouterr().out
    assert "note      --bad_images skip: 3 of 64 images left out: " in plan and f"{lost[1]} (no regular file)" in plan
    skipped = pd.read_csv(copy_set.run / "skipped.csv").set_index("name")
    assert skipped["fold"].to_dict() == dict(zip(lost, ("train", "val", "test"), strict=True))
    table = pd.read_csv(copy_set.csv)
    assert (table["name"].iloc[skipped["row"] - 2] == skipped.index).all(), "rows as a spreadsheet counts"
    splits = pd.read_csv(copy_set.run / "splits.csv").set_index("name")["split"]
    assert splits.to_dict() == {name: fold for fold, names in names_of.items() for name in names}
    kept = copy_set.run.rename(tmp_path / "first")
    table[~table["name"].isin(lost)].to_csv(copy_set.csv, index=False)
    other = copy_set.train(f"{QUICK} --split_file {tmp_path / 'folds.csv'}")
    for key in ("val", "test", "base", "floors", "certainty", "images", "test_digest", "best_epoch"):
        assert results[key] == other[key], key
    first, second = (load_file(folder / "best" / "model.safetensors") for folder in (kept, copy_set.run))
    assert all(torch.equal(value, first[name]) for name, value in second.items())
    assert not (copy_set.run / "skipped.csv").exists()
    shutil.copy(kept / "skipped.csv", copy_set.run)
    copy_set.train(f"{QUICK} --epochs 1 --overwrite")
    assert not (copy_set.run / "skipped.csv").exists(), "an older run's"


def test_training_images_that_are_lost_before_they_are_cached_are_left_out(
    copy_set, names_of, monkeypatch, capsys, tmp_path
):
    lost = names_of["train"][3:5]
    before_training(monkeypatch, lambda: (copy_set.damage(lost[0]), copy_set.replace(lost[1])))
    results = copy_set.train(f"{QUICK} --bad_images skip --cache_dir {tmp_path / 'cache'}")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out  ")]
    assert len(said) == 2 and all(any(name in line for line in said) for name in lost)
    skipped = pd.read_csv(copy_set.run / "skipped.csv").set_index("name")
    assert skipped["reason"].to_dict() == {
        lost[0]: "No such file or directory",
        lost[1]: "has changed since it was checked",
    }
    assert set(skipped["fold"]) == {"train"}
    assert all(math.isfinite(value) for floor in results["floors"].values() for value in floor.values())
    assert math.isfinite(results["test"]["loss"]) and results["images"]["train"] == len(names_of["train"])


def test_what_is_cached_needs_no_file_any_more(copy_set, monkeypatch, tmp_path):
    first = copy_set.train(f"{QUICK} --cache_dir {tmp_path / 'cache'}")
    before_training(monkeypatch, lambda: shutil.rmtree(copy_set.images))
    again = copy_set.train(f"{QUICK} --cache_dir {tmp_path / 'cache'} --overwrite")
    assert (again["test"], again["floors"]) == (first["test"], first["floors"])


def test_a_training_image_that_is_lost_between_epochs_stays_out_when_it_comes_back(
    copy_set, names_of, monkeypatch, capsys
):
    lost, gone, seen = names_of["train"][7], copy_set.images.parent / "gone.png", []
    original = loop.train_epoch

    def train_epoch(model, batches, *args, **options):
        kept = list(batches)
        seen.append(sum(map(len, kept)))
        return original(model, kept, *args, **options)

    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    file = copy_set.images / lost
    after_epoch(monkeypatch, {1: lambda: file.rename(gone), 2: lambda: gone.rename(file)})
    copy_set.train(f"{PIXELS} --bad_images skip --no_test")
    count = len(names_of["train"])
    assert seen == [count, count - 1, count - 1]
    assert capsys.readouterr().out.count("left out  ") == 1
    assert pd.read_csv(copy_set.run / "skipped.csv")["name"].tolist() == [lost]


@pytest.mark.parametrize(
    ("fold", "flags", "says"),
    [
        ("train", "--no_test", r"\(has changed since it was checked\)\n$"),
        (
            "val",
            "--no_test --bad_images skip",
            "leaves out training images only, no score is measured on a changing fold",
        ),
        ("test", "--bad_images skip", "leaves out training images only"),
    ],
)
def test_images_that_change_in_mid_run_end_it_in_one_line_unless_they_may_be_left_out(
    copy_set, names_of, monkeypatch, capsys, fold, flags, says
):
    name = names_of[fold][2]
    after_epoch(monkeypatch, {1: lambda: copy_set.replace(name)})
    message = one_line_of_exit_2(capsys, lambda: copy_set.train(f"{PIXELS} {flags}"))
    assert re.search(says, message) and f"{copy_set.images / name} (has changed since it was checked)" in message
    assert not (copy_set.run / "skipped.csv").exists()


def test_several_processes_leave_nothing_out_in_mid_run_and_must_have_found_the_same(copy_set, monkeypatch):
    flags = ["--data_csv_path", str(copy_set.csv), "--image_base_dir", str(copy_set.images), "--bad_images", "skip"]
    config = parse_args(flags)
    examples = read_examples(config, NO_MEMO)
    alone = devices.start_runtime("cpu", "off")
    lost = examples.rows("train")[:1]

    def load(rows):
        raise image_store.Unreadable(dict.fromkeys(rows.tolist(), "gone"), [copy_set.images])

    first = examples.fingerprint
    monkeypatch.setattr(devices.Runtime, "agree", lambda runtime, value: first)
    with pytest.raises(ValueError, match="have not found the same images readable"):
        feed.build_dropping(config, replace(examples, fingerprint="other"), replace(alone, world=2))
    dropping = feed.build_dropping(config, examples, replace(alone, world=2))
    with pytest.raises(OSError, match="several processes cannot leave out images in mid-run"):
        dropping.load(lost, load)
    dropping = feed.build_dropping(config, examples, alone)
    assert len(dropping.load(lost, load)[0]) == 0 and dropping.rows == set(lost.tolist())
