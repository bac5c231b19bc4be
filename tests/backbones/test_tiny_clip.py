"""The embedded tiny CLIP and the demo on it: what the README promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import baseline
import models
from backbones import loading, names
from evaluation import metrics
from inputs import batches, image_sources, image_store, texts
from inputs.views import Views
from sources import csv_files
from storage import image_files
from training import devices, loop


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory) -> Callable[..., tuple[dict, Path]]:
    """A function that gives the results and the folder of a run on the demo set, which is drawn once."""
    place = tmp_path_factory.mktemp("demo-runs")

    def run(*flags: str) -> tuple[dict, Path]:
        folder = place / "-".join(["run", *(flag.strip("-") for flag in flags)])
        paths = ["--cache_dir", str(place / "cache"), "--output_dir", str(folder)]
        return baseline.main(["--demo", "drawn", "--no_report", *paths, *flags]), folder

    return run


def test_the_asset_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in names.EMBEDDED["tiny"].iterdir()}
    assert {"open_clip_config.json", "open_clip_model.safetensors", "README.md"} == set(files)
    assert sum(files.values()) <= 12 * 2**20


def test_its_cosine_knows_something_of_consistency_without_training(demo_set):
    table = csv_files.read_table(*demo_set, csv_files.Columns())
    backbone = loading.load_backbone("tiny", "assets", image_size=224)
    model = models.ScoreModel(backbone.clip, torch.nn.Identity(), embed_dim=64)
    runtime = devices.start_runtime("cpu", "off")
    views = Views(image_size=224, device=runtime.device, **backbone.config["preprocess_cfg"])
    store = image_store.ImageStore(image_files.check_images(table["path"].tolist()), image_size=224, num_threads=1)
    feed = batches.Feed(
        pixels=image_sources.PixelSource(store, views),
        device=runtime.device,
        targets={},
        prompts=texts.TextTable(table["prompt"].tolist(), backbone.tokenizer, runtime.device, trim=True),
    )
    order = batches.BatchOrder(np.arange(len(table)), batch_size=32)
    known = loop.predict(model, feed.batches(order), models.embed_batch, runtime=runtime)
    assert metrics.srocc(known["cos"], table["c"]) >= 0.4


@pytest.mark.slow
def test_the_demo_reaches_what_it_promises_above_the_floors(demo_run):
    results, folder = demo_run()
    assert results["test"]["srocc_q"] >= 0.80
    assert results["test"]["srocc_c"] >= 0.75
    for name, margin in {"mean": 0.2, "generator_mean": 0.2, "image_statistics": 0.02}.items():
        assert results["test"]["srocc_q"] > results["floors"][name]["srocc_q"] + margin
        assert results["test"]["srocc_c"] > results["floors"][name]["srocc_c"] + margin
    history = pd.read_csv(folder / "metrics.csv")
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
