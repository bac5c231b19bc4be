"""Same options, same result: to the bit where that is promised, to rounding where only that can be."""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from stopped_runs import differences

import baseline
from sources import demo
from training import run_folder

TINY = "--clip_model tiny --clip_pretrained none --image_size 56 --batch_size 16 --lr 1e-3 --no_report"
PARTIAL = f"{TINY} --partial_freeze --freeze_layers 22"

# Every way of training that other tests use: thawing, LoRA, refinement, every loss, crops, levels, rationales, bf16.
KINDS = {
    "thawing": f"{TINY} --unfreeze_schedule 23@0,22@1 --epochs 2 --use_explanations",
    "whole": f"{TINY} --epochs 1 --no_freeze_clip --ema_decay 0.5 --no_residual_learning --layer_decay 0.7",
    "lora": f"{PARTIAL} --epochs 1 --lora_rank 2 --amp bf16 --gradient_checkpointing",
    "refined": f"{PARTIAL} --epochs 1 --no_residual_learning --use_refinement --refinement_layers 1 "
    "--refinement_heads 2 --refinement_dim 16",
    "losses": f"{PARTIAL} --epochs 1 --loss mse+l1+0.5*plcc+fidelity --label_smoothing 0.1 --no_cache",
    "crops": f"{PARTIAL} --epochs 1 --crops 2 --test_crops 4 --global_view --gradient_accumulation_steps 2",
    "levels": f"{PARTIAL} --epochs 1 --prompt_levels --task_gradients stop_q --crops 1 --test_crops 1 --no_cache",
    "preset": f"{TINY} --preset small --epochs 2 --dropout 0.3",
}

FAST = ("thawing", "preset")


@pytest.fixture(autouse=True)
def all_kernels() -> Iterator[None]:
    """Other tests begin as they do without --deterministic."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def run_in(place: Path, demo_set: tuple[Path, Path], flags: str, name: str) -> Path:
    folder = place / name
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    where = ["--output_dir", str(folder), "--cache_dir", str(place / f"{name}-cache")]
    baseline.main([*paths, *where, *shlex.split(flags)])
    return folder


@pytest.fixture
def train(demo_set, tmp_path) -> Callable[[str, str], Path]:
    """A function that trains on the demo set with a cache of its own; returns the run folder."""
    return functools.partial(run_in, tmp_path, demo_set)


@pytest.fixture(scope="module")
def plain(demo_set, tmp_path_factory) -> Callable[[str], Path]:
    """A function that gives the run with some flags, made once."""
    place = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda kind: run_in(place, demo_set, KINDS[kind], kind))


def assert_identical(one: Path, other: Path) -> None:
    """All that two runs have found is the same to the bit, but for what clocks say."""
    assert differences(one, other) == []


# A second time


def again(folder: Path, name: str = "again", more: tuple[str, ...] = ()) -> Path:
    """The run that a saved config gives, in its own folder."""
    other = folder.with_name(f"{folder.name}-{name}")
    baseline.main(["--config", str(folder / "config.json"), "--output_dir", str(other), *more])
    return other


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in KINDS])
def test_a_saved_config_gives_the_run_again_to_the_bit_by_deterministic_kernels_too(plain, kind):
    """On a CPU there are no other kernels, so --deterministic changes nothing. Each has a cache of its own."""
    folder = plain(kind)
    cache = ("--cache_dir", str(folder.with_name(f"{kind}-other-cache")))
    other = again(folder, "deterministic", ("--deterministic", *cache))
    assert torch.are_deterministic_algorithms_enabled()
    assert_identical(folder, other)
    assert json.loads((other / "config.json").read_text())["deterministic"] is True


def test_a_saved_config_gives_the_run_again_to_the_bit_from_what_it_has_cached(plain):
    torch.use_deterministic_algorithms(True)  # as an earlier run in this process may have left it
    assert_identical(plain("thawing"), again(plain("thawing")))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_the_demo_and_the_parts_of_repeated_runs_are_given_again_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "write_demo_set", functools.partial(demo.write_demo_set, num_prompts=8))
    where = ["--demo", "drawn", "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")]
    baseline.main([*where, *shlex.split(f"{PARTIAL} --epochs 1 --repeats 2")])
    for part in ("seed42", "seed43"):
        assert_identical(tmp_path / "run" / part, again(tmp_path / "run" / part, "again"))


@pytest.mark.slow
def test_the_same_command_in_another_process_leaves_the_same_bytes(demo_set, tmp_path, monkeypatch):
    """As two users may call it: each in a folder and with a cache of its own; and in another order of sets."""
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    argv = [*paths, *shlex.split(f"{TINY} --preset small --epochs 1 --dropout 0.3 --output_dir run")]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    baseline.main(argv)
    order = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    done = subprocess.run(
        [sys.executable, str(ROOT / "baseline.py"), *argv],
        cwd=tmp_path / "there",
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONHASHSEED": order},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    one, other = (tmp_path / name / "run" / "best" for name in ("here", "there"))
    names = sorted(path.relative_to(one) for path in one.rglob("*"))
    assert Path("model.safetensors") in names and Path("scorer.json") in names
    assert sorted(path.relative_to(other) for path in other.rglob("*")) == names
    for name in names:
        assert (one / name).is_dir() or (one / name).read_bytes() == (other / name).read_bytes(), name
    assert_identical(one.parent, other.parent)


def test_what_a_run_needs_to_be_given_again_is_written_down(plain):
    saved = json.loads((plain("preset") / "config.json").read_text())
    provenance = saved["provenance"]
    assert {"torch", "pillow", "open_clip_torch", "numpy", "python"} <= set(provenance["versions"])
    resolved = provenance["resolved"]
    assert resolved["threads"] == torch.get_num_threads()
    assert resolved["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert (resolved["device"], resolved["amp"], resolved["compile"], resolved["processes"]) == ("cpu", "off", False, 1)
    assert {"num_workers", "cache_views"} <= set(resolved) and {"seed", "deterministic"} <= set(saved)
    results = json.loads((plain("preset") / "results.json").read_text())
    assert provenance["data_fingerprint"] == results["data_fingerprint"]
    assert provenance["git_revision"] == run_folder.git_revision()


# Threads and steps


@pytest.mark.parametrize(
    ("more", "counts"),
    [
        ("--no_cache --image_memory_gb 0 --cache_max_gb 0 --no_test", (0, 4)),
        pytest.param("--no_cache", (0, 2, 4), marks=pytest.mark.slow),
        pytest.param("", (0, 2, 4), marks=pytest.mark.slow),
    ],
)
def test_how_many_threads_decode_changes_no_bit(train, more, counts):
    flags = f"{PARTIAL} --epochs 1 {more}"
    alone, *others = (train(f"{flags} --num_workers {count}", f"threads{count}") for count in counts)
    for other in others:
        assert_identical(alone, other)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "sizes"), [("mse", (8, 4, 2)), ("plcc", (8, 2))])
def test_how_a_step_is_split_changes_a_sum_by_rounding_alone_and_a_correlation_by_more(train, loss, sizes):
    flags = f"{TINY} --freeze_layers 23 --epochs 1 --dropout 0 --loss {loss} --warmup_ratio 0 --no_test"
    losses, predictions = [], []
    for size in sizes:
        split = f"--batch_size {size} --gradient_accumulation_steps {8 // size}"
        folder = train(f"{flags} {split}", f"split{size}")
        losses.append(pd.read_csv(folder / "metrics.csv")["loss"].to_numpy())
        predictions.append(pd.read_csv(folder / "predictions.csv")["pred_quality"].to_numpy())
    for other in range(1, len(sizes)):
        if loss == "mse":
            np.testing.assert_allclose(losses[other], losses[0], rtol=1e-4)
            np.testing.assert_allclose(predictions[other], predictions[0], atol=1e-3)
        else:
            assert np.abs(losses[other] / losses[0] - 1).max() > 1e-2
