"""Every command of the tuning guide builds what it names, and prints its plan."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_vqa import NUM_TRAIN, drawn_cache, error_of
from small_xvlm import small_xvlm
from torch import Tensor

import main
from answering.configs import parse_args

# The guide's commands, in its order, without "python main.py".
GUIDE = [
    # Tuning step by step.
    "--lr 2.8e-4 --xvlm_lr 5e-5 --batch_size 32 --epochs 20",
    "--AOA_layers 6 --num_hid 1024 --dropout 0.45",
    "--general_hidden_dim 300 --mgat_layers 4 --alpha 1.0 --beta 10.0",
    # Memory, speed.
    "--batch_size 16 --gradient_accumulation_steps 2 --mixed_precision --memory_efficient_attention "
    "--max_memory_usage 0.7",
    "--batch_size 64 --update_freq 2 --dynamic_batch_size --max_memory_usage 0.9",
    # Data sets.
    "--dataset GQA --lr 2.8e-4 --batch_size 32 --AOA_layers 6 --general_hidden_dim 300 --mgat_layers 4",
    "--dataset VQA --lr 3e-4 --batch_size 24 --AOA_layers 8 --general_hidden_dim 512 --mgat_layers 6",
    # GPUs of 8 and of 24 GB.
    "--batch_size 16 --gradient_accumulation_steps 4 --mixed_precision --max_memory_usage 0.7",
    "--batch_size 48 --gradient_accumulation_steps 1 --max_memory_usage 0.9",
    # Experiments: learning rate, size, graph.
    "--lr 2.8e-4 --xvlm_lr 5e-5",
    "--lr 3.5e-4 --xvlm_lr 7e-5",
    "--lr 2e-4 --xvlm_lr 3e-5",
    "--AOA_layers 4 --num_hid 512",
    "--AOA_layers 6 --num_hid 1024",
    "--AOA_layers 8 --num_hid 2048",
    "--mgat_layers 4 --alpha 1.0 --beta 10.0",
    "--mgat_layers 6 --alpha 1.5 --beta 15.0",
    "--mgat_layers 3 --alpha 0.8 --beta 8.0",
    # Whole configurations.
    "--checkpoint pretrained/model --config xvlm/configs/VQA_480.yaml --output saved_models/high_performance "
    "--lr 3e-4 --xvlm_lr 6e-5 --batch_size 48 --AOA_layers 8 --num_hid 1536 --general_hidden_dim 512 --mgat_layers 6 "
    "--alpha 1.2 --beta 12.0 --mixed_precision --max_memory_usage 0.9",
    "--checkpoint pretrained/model --config xvlm/configs/VQA_480.yaml --output saved_models/memory_optimized "
    "--lr 2.5e-4 --xvlm_lr 4e-5 --batch_size 16 --gradient_accumulation_steps 4 --AOA_layers 4 --num_hid 768 "
    "--general_hidden_dim 256 --mgat_layers 3 --alpha 0.8 --beta 8.0 --mixed_precision --memory_efficient_attention "
    "--max_memory_usage 0.7",
]
WITH_FILES = [command for command in GUIDE if "--checkpoint" in command]
UNUSED = ("xvlm_lr", "general_hidden_dim", "mgat_layers", "alpha", "beta")  # by the fine branch
# What a command is as small by as it can be; its other options stay.
SMALL = "--num_hid 16 --AOA_layers 1 --general_hidden_dim 16 --mgat_layers 2 --epochs 1 --val_size 0.3 --no_report"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder to work in, with the files that two commands name."""
    monkeypatch.chdir(tmp_path)
    weights, options = small_xvlm()
    shutil.copytree(options.parent.parent, tmp_path / "xvlm")
    (tmp_path / "xvlm/configs" / options.name).rename(tmp_path / "xvlm/configs/VQA_480.yaml")
    (tmp_path / "pretrained").mkdir()
    shutil.copy(weights, tmp_path / "pretrained/model")
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


def flags_of(command: str) -> list[str]:
    """The command on a drawn set, without training."""
    return [*shlex.split(command), "--demo", "--dry_run", "--cache_dir", str(drawn_cache())]


def parameters(width: int, layers: int, *, words: int, answers: int, features: int = 320, glimpses: int = 2) -> int:
    """How many numbers the fine branch learns, summed up by hand; the drawn sets' regions have 320 numbers."""

    def normed(a: int, b: int) -> int:
        return a * b + b + 1

    def attention(x: int, y: int, joint: int, looks: int) -> int:
        return normed(x, 3 * joint) + normed(y, 3 * joint) + looks * 3 * joint + looks

    def pooling(x: int, y: int) -> int:
        return normed(x, width) + normed(y, width)

    def fusion(x: int, y: int) -> int:
        return attention(x, y, width, 1) + pooling(x, y) + normed(width, width) + 1

    encoder = 2 * words * 300 + 3 * width * (600 + width + 2)
    look = 2 * features + features * width + width + 6 * width + width
    layer = 3 * (width * width + 2 * width * width + 4 * width * width + 2 * width + 2 * width)
    last = attention(width, width, width, glimpses) + glimpses * (pooling(width, width) + normed(width, width))
    counter = 8 * 16 + 11 * width + width  # eight curves of 16 steps each
    classifier = normed(width, 2 * width) + normed(2 * width, answers)
    return encoder + fusion(width, 600) + look + fusion(width, width) + layers * layer + last + counter + classifier


def check(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run it, and compare its plan with what it says."""
    config = parse_args(flags_of(command))
    assert main.run(config) == {}
    plan = dict(re.findall(r"^(\w+) +(.*)", capsys.readouterr().out, re.MULTILINE))
    words = shlex.split(command)
    given = {flag.removeprefix("--"): value for flag, value in pairwise(words) if flag[:2] == "--"}
    # Flags go above what the demo stands for.
    epochs, width = int(given.get("epochs", 8)), int(given.get("num_hid", 128))
    batch, layers = int(given.get("batch_size", 64)), int(given.get("AOA_layers", 1))
    batches = int(given.get("update_freq", 1)) * int(given.get("gradient_accumulation_steps", 1))
    steps = -(-NUM_TRAIN // (batch * batches)) * epochs
    expected = f"{epochs} epochs, {steps} steps of {batch * batches} questions (--batch_size {batch} x {batches}), "
    assert plan["schedule"].startswith(f"{expected}lr {float(given.get('lr', 1e-3)):g} cosine")
    assert plan["questions"].startswith(f"train {NUM_TRAIN} on 25 images")
    answers, vocabulary = (int(number) for number in re.findall(r"\d+", plan["answers"])[:2])
    count = parameters(width, layers, words=vocabulary, answers=answers)
    asks = "checkpoint" in given
    if asks:
        assert plan["coarse"] == (
            f"X-VLM of pretrained/model, images of 32 pixels, lr {float(given['xvlm_lr']):g} linear"
        )
        state = torch.load("pretrained/model", weights_only=True)["model"]
        tied = [f"text_decoder.cls.predictions.decoder.{name}" for name in ("weight", "bias")]
        count += sum(value.numel() for name, value in state.items() if name not in tied)
        count += 2 * answers  # what the branches weigh
    assert plan["model"].startswith(
        f"{'fine,coarse' if asks else 'fine'}, {count / 1e6:.2f}M parameters, width {width}"
    )
    # What branches are for that are not trained is taken, and said to be of no use.
    unused = [f"--{name}" for name in given if name in UNUSED[asks:] and value_differs(name, given[name])]
    assert (set(unused) <= set(plan["note"].split(": ")[0].split(", "))) if unused else "nothing in" not in plan["note"]


def value_differs(name: str, value: str) -> bool:
    """Whether an option is given another value than its default."""
    default = getattr(parse_args(["--demo"]), name)
    return value != default if default is None else type(default)(value) != default


@pytest.mark.parametrize("command", GUIDE)
def test_a_command_of_the_guide_is_taken_and_builds_the_model_that_it_names(command, place, monkeypatch, capsys):
    """At full size, but for the drawing of random weights, which would take most of the time."""

    def undrawn(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", undrawn)
    check(command, capsys)


@pytest.mark.slow
def test_the_largest_one_is_built_with_all_its_weights(place, capsys):
    check("--AOA_layers 8 --num_hid 2048", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("command", GUIDE)
def test_a_command_of_the_guide_trains_all_branches(command, place, tmp_path_factory):
    """On a drawn set, and small."""
    folder = tmp_path_factory.mktemp("run")
    branches = "--branches fine,coarse,graph --sg_source predicted"
    argv = [*shlex.split(f"{command} {SMALL} {branches}"), "--demo", "--cache_dir", str(drawn_cache())]
    results = main.main([*argv, "--output", str(folder / "run")])
    assert list(results["branches"]) == ["fine", "coarse", "graph"] and results["epochs"] == 1
    assert np.isfinite(results["measures"]["loss"])
    history = pd.read_csv(folder / "run" / "metrics.csv")
    assert history[["loss_fused", "loss_fine", "loss_coarse", "loss_graph"]].notna().all(axis=None)


@pytest.mark.parametrize("command", WITH_FILES)
def test_files_that_a_command_names_have_to_be_there(command, place, capsys):
    for name, flag in (("pretrained/model", "--checkpoint"), ("xvlm/configs/VQA_480.yaml", "--config")):
        (place / name).rename(place / "away")
        error = error_of(*flags_of(command), capsys=capsys)
        assert error == f"error: {flag} {name}: there is no such file (X-VLM's, for the coarse branch)\n"
        (place / "away").rename(place / name)


@pytest.mark.parametrize("command", GUIDE)
def test_without_data_a_command_says_in_one_line_what_is_missing(command, place, capsys):
    error = error_of(*shlex.split(command), capsys=capsys)
    assert error == "error: --data_root DIR: say where the questions are, or try --demo\n"
