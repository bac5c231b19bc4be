"""The embedded tiny CLIP and the demo on it: what the README promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import backbones
import baseline
import data
import engine
import images
import inputs
import metrics
import models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    """A cache folder, so that the demo set is drawn once for this file."""
    return tmp_path_factory.mktemp("cache")


def demo_run(cache_dir: Path, folder: Path, *flags: str) -> dict:
    return baseline.main(["--demo", "--cache_dir", str(cache_dir), "--output_dir", str(folder), *flags])


def test_the_asset_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in backbones.TINY_DIR.iterdir()}
    assert {"open_clip_config.json", "open_clip_model.safetensors", "README.md"} == set(files)
    assert sum(files.values()) <= 12 * 2**20


def test_its_cosine_knows_something_of_consistency_without_training(demo_set):
    table = data.read_table(*demo_set, data.Columns())
    backbone = backbones.load_backbone("tiny", "assets", image_size=224)
    model = models.ScoreModel(backbone.clip, torch.nn.Identity(), embed_dim=64)
    runtime = engine.start_runtime("cpu", "off")
    views = images.Views(image_size=224, device=runtime.device, **backbone.config["preprocess_cfg"])
    store = images.ImageStore(images.check_images(table["path"].tolist()), image_size=224, num_threads=1)
    feed = inputs.Feed(
        pixels=inputs.PixelSource(store, views),
        device=runtime.device,
        targets={},
        prompts=inputs.TextTable(table["prompt"].tolist(), backbone.tokenizer, runtime.device, trim=True),
    )
    order = inputs.BatchOrder(np.arange(len(table)), batch_size=32)
    known = engine.predict(model, feed.batches(order), models.embed_batch, runtime=runtime)
    assert metrics.srocc(known["cos"], table["c"]) >= 0.4


def test_the_demo_reaches_what_it_promises_above_the_floors(cache_dir, tmp_path):
    results = demo_run(cache_dir, tmp_path / "run")
    assert results["test"]["srocc_q"] >= 0.80
    assert results["test"]["srocc_c"] >= 0.80
    for name, margin in {"mean": 0.2, "generator_mean": 0.2, "image_statistics": 0.02}.items():
        assert results["test"]["srocc_q"] > results["floors"][name]["srocc_q"] + margin
        assert results["test"]["srocc_c"] > results["floors"][name]["srocc_c"] + margin
    history = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]


def test_a_frozen_clip_gains_by_its_heads_and_more_by_thawing_its_last_blocks(cache_dir, tmp_path):
    """On average over three splits: one split's gain is within what its few prompts decide."""
    before, frozen, partial = [], [], []
    for seed in ("1", "2", "3"):
        thawed = demo_run(cache_dir, tmp_path / f"partial{seed}", "--seed", seed)
        heads = ("--freeze_clip", "--no_partial_freeze", "--lr", "1e-3", "--seed", seed)
        fixed = demo_run(cache_dir, tmp_path / f"frozen{seed}", *heads)
        assert fixed["seconds"] < 120
        before.append(fixed["base"]["test"]["main"])
        frozen.append(fixed["test"]["main"])
        partial.append(thawed["test"]["main"])
    assert np.mean(before) < np.mean(frozen) < np.mean(partial)
