"""What a GPU must do as a CPU does: go on exactly, learn in half precision, compile, take the memory that was counted.

CHECK_DEVICE=cpu runs all but the last on a CPU, so that the tests themselves are known to work where there is no GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
import small_vqa
import stopped_runs
import torch

import baseline
from answering import remarks
from answering.configs import parse_args as parse_questions
from answering.experiment import build_experiment
from guidance.arguments import parse_args
from training import devices

DEVICE = os.environ.get("CHECK_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
HALF = ["bf16", "fp16"] if ON_GPU else ["bf16"]
MODELS = {"frozen": ["--freeze_clip"], "partial": ["--partial_freeze", "--freeze_layers", "22"], "full": []}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("trained_weights_are_kept"),
]


@pytest.fixture
def repeatable(monkeypatch):
    """Kernels that repeat themselves, as far as there are such."""
    monkeypatch.setenv(devices.CUBLAS_WORKSPACE, devices.REPEATABLE_WORKSPACES[0])
    devices.allow_kernels(deterministic=True)
    yield
    devices.allow_kernels(deterministic=False)


def losses(argv: list[str], folder: Path, *flags: str) -> list[float]:
    """The mean loss of each epoch of a run of baseline.py."""
    baseline.run(parse_args([*argv, *flags, "--device", DEVICE, "--output_dir", str(folder)]))
    return pd.read_csv(folder / "metrics.csv")["loss"].tolist()


@pytest.mark.parametrize("model", MODELS)
def test_a_stopped_run_of_scores_goes_on_exactly(model, demo_set, tmp_path):
    argv = stopped_runs.flags_of(demo_set, *MODELS[model], "--epochs", "2", "--device", DEVICE, "--deterministic")
    looks = stopped_runs.run_until(argv, tmp_path / "whole", None)
    stopped_runs.run_until(argv, tmp_path / "part", looks // 2)
    stopped_runs.run_until([*argv, "--resume", "auto"], tmp_path / "part", None)
    assert stopped_runs.differences(tmp_path / "whole", tmp_path / "part") == []


@pytest.mark.parametrize("branches", ["fine", "graph", "fine,coarse,graph"])
def test_a_stopped_run_of_questions_goes_on_exactly(branches, tmp_path, repeatable):
    argv = small_vqa.tiny_flags("--branches", branches, "--device", DEVICE, *small_vqa.ONE_GRAPH)
    argv += ["--sg_source", "predicted"] if "graph" in branches else []
    argv += ["--clip_model", "tiny", "--clip_pretrained", "assets"] if "coarse" in branches else []
    small_vqa.run_until(argv, tmp_path / "whole", None)
    small_vqa.run_until(argv, tmp_path / "part", 20)
    small_vqa.run_until(argv, tmp_path / "part", None)
    assert small_vqa.differences(tmp_path / "whole", tmp_path / "part") == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("amp", HALF)
def test_half_precision_learns_what_float32_does(amp, model, demo_set, tmp_path):
    argv = stopped_runs.flags_of(demo_set, *MODELS[model])
    whole = losses(argv, tmp_path / "off", "--amp", "off")
    half = losses(argv, tmp_path / amp, "--amp", amp)
    assert half == pytest.approx(whole, rel=0.05)


def test_compiled_blocks_learn_what_others_do(demo_set, tmp_path):
    argv = stopped_runs.flags_of(demo_set, "--amp", "off", "--epochs", "1")
    whole = losses(argv, tmp_path / "plain", "--compile", "off")
    assert losses(argv, tmp_path / "compiled", "--compile", "on") == pytest.approx(whole, rel=0.01)


@pytest.mark.skipif(not ON_GPU, reason="a CPU does not tell how much memory was in use")
def test_a_step_takes_the_memory_that_was_counted(figure):
    flags = small_vqa.tiny_flags("--batch_size", "256", "--num_hid", "1024", "--AOA_layers", "2")
    config = parse_questions([*flags, "--device", DEVICE])
    runtime = devices.start_runtime(config.device, config.amp)
    experiment = build_experiment(config, runtime)
    counted = 256 * remarks.bytes_per_question(experiment)
    batch = experiment.folds["train"].feed.assemble(experiment.folds["train"].feed.parts(256)[0])
    experiment.model.train()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with runtime.autocast():
        logits = experiment.model(**batch.inputs)
    kept = torch.cuda.memory_allocated() - before
    logits.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    figure("memory of a step", f"counted {counted / 1e6:.0f} MB, kept {kept / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert kept == pytest.approx(counted, rel=0.25)
