"""What a run reads, as batches: images and texts, the order of rows, and what frozen layers make of them, kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import backbones
import caching
import checkpoint
import data
import engine
import features
import images
import inputs
import models
import tables
from configs import TrainingConfig
from kept import LOADED_BY, READ_BY, Kept

BYTES_PER_TRAINED = 20  # on a GPU: gradient, two moments, average, and some room


def build_feed(
    config: TrainingConfig,
    examples: data.Examples,
    backbone: backbones.Backbone,
    runtime: engine.Runtime,
    kept: Kept,
) -> tuple[inputs.Feed[inputs.PixelSource], int]:
    """The feed of batches, and the number of texts cut because they exceed the context length."""
    num_truncated = 0
    trim = models.trims_exactly(backbone.clip.text)

    def tokenize(texts: Sequence[str]) -> Tensor:
        nonlocal num_truncated
        tokens, cut = backbones.tokenize(backbone.tokenizer, texts, backbone.clip.context_length)
        num_truncated += cut
        return tokens

    def text_table(column: str) -> inputs.TextTable | None:
        texts = examples.table[column].tolist()
        return inputs.TextTable(texts, tokenize, runtime.device, trim=trim) if any(texts) else None

    prompts: inputs.TextTable | None = None
    if config.prompt_levels:
        texts = examples.table["prompt"].tolist()
        prompts = inputs.LevelledTexts(texts, tokenize, runtime.device, trim=trim, **models.LEVEL_TEXTS)
    elif uses_texts(config, examples):
        prompts = text_table("prompt")
    rationales = text_table("explanation") if config.use_explanations else None
    settings: dict[str, Any] = {
        "image_size": None if config.crops else config.image_size,
        "num_threads": num_threads(config, runtime),
        "max_memory": config.image_memory_gb * 1e9 / runtime.local_world,
        "max_file": config.cache_max_gb * 1e9 / runtime.local_world,
        "spill_dir": Path(config.cache_dir),
    }
    key = (READ_BY.values(config), *settings.values())
    store = kept.value("images", key, lambda: images.ImageStore(examples.files, **settings))
    views = images.Views(
        image_size=config.image_size,
        **backbone.config["preprocess_cfg"],
        device=runtime.device,
        crop_scale_min=config.crop_scale_min,
        flip=config.horizontal_flip,
        seed=config.seed,
        crops=config.crops,
        test_crops=config.num_test_crops,
        global_view=config.global_view,
    )
    spreads = {f"{task}_std": values for task, values in examples.spreads.items()} if config.uses_spreads else {}
    feed = inputs.Feed(
        pixels=inputs.PixelSource(store, views),
        device=runtime.device,
        targets={**examples.unit_targets, **spreads},
        prompts=prompts,
        rationales=(rationales, (examples.table["explanation"] != "").to_numpy()) if rationales else None,
        share=runtime.share,
        num_ahead=runtime.num_ahead,
        dropping=build_dropping(config, examples, runtime),
    )
    return feed, num_truncated


def uses_texts(config: TrainingConfig, examples: data.Examples) -> bool:
    """Whether anything that is trained looks at texts."""
    return "c" in examples.scales or config.use_explanations or config.prompt_levels


def num_threads(config: TrainingConfig, runtime: engine.Runtime) -> int:
    """Threads that decode images, as asked for or as suits the machine."""
    return runtime.num_threads if config.num_workers is None else config.num_workers


def build_dropping(config: TrainingConfig, examples: data.Examples, runtime: engine.Runtime) -> inputs.Dropping:
    """What happens to images that can no longer be used in mid-run: training images may be left out if so asked."""
    if config.bad_images == "error":
        return inputs.Dropping()
    if runtime.world > 1:
        if runtime.agree(examples.fingerprint) != examples.fingerprint:  # or they would wait for each other for ever
            raise ValueError("--bad_images skip: the processes have not found the same images readable")
        return inputs.Dropping(otherwise="; --bad_images skip: several processes cannot leave out images in mid-run")
    return inputs.Dropping(
        examples.rows("train"),
        otherwise="; --bad_images skip: leaves out training images only, no score is measured on a changing fold",
    )


def skipped_writer(
    writer: checkpoint.RunFolder, examples: data.Examples, runtime: engine.Runtime
) -> Callable[[Mapping[int, str]], None]:
    """The function that says which rows are left out in mid-run, and adds them to skipped.csv."""

    def tell(reasons: Mapping[int, str]) -> None:
        rows = list(reasons)
        table = examples.table.iloc[rows].assign(fold=examples.folds[rows], reason=list(reasons.values()))
        for path, reason in zip(table["path"], table["reason"], strict=True):
            runtime.say(f"left out  {path} ({reason}): the rest of the run goes on without it")
        file = writer.path / checkpoint.SKIPPED_FILE
        before = [tables.read_csv(file, dtype=str, keep_default_na=False)] if file.exists() else []
        writer.csv(checkpoint.SKIPPED_FILE, pd.concat([*before, table[data.SKIPPED]]))

    return tell


def build_orders(config: TrainingConfig, examples: data.Examples) -> dict[str, inputs.BatchOrder]:
    """Batches by name: "train" is augmented and shuffled; "train_eval", "val" and "test" are plain and in order."""
    evaluated = {
        name: inputs.BatchOrder(examples.rows(name.removesuffix("_eval")), batch_size=evaluation_batch(config))
        for name in ("train_eval", *folds_read(config))
    }
    train = inputs.BatchOrder(examples.rows("train"), batch_size=config.batch_size, shuffle=True, seed=config.seed)
    return {"train": train, **evaluated}


def folds_read(config: TrainingConfig) -> list[str]:
    """The folds that scores are measured on."""
    return ["val", "test"] if config.test else ["val"]


def evaluation_batch(config: TrainingConfig) -> int:
    """Images at once where no activations are kept: more than in training, but not too many for the memory."""
    return max(1, min(2 * config.batch_size, 128) // config.num_views_encoded)


def open_cache(config: TrainingConfig) -> features.FeatureCache | None:
    """The cache of what frozen layers compute; None if nothing is to be cached."""
    folder = Path(config.cache_dir) / "features"
    return features.FeatureCache(folder, config.cache_max_gb * 1e9) if config.cache else None


def open_caches(
    config: TrainingConfig,
    model: models.ScoreModel,
    feed: inputs.Feed[inputs.PixelSource],
    examples: data.Examples,
    backbone: backbones.Backbone,
    runtime: engine.Runtime,
    kept: Kept,
) -> tuple[Callable[[], None], caching.Statistics]:
    """What calls `cache_frozen`, for the frozen layers at the time of the call, and the statistics of the images."""
    store = open_cache(config)
    statistics = caching.Statistics(feed.pixels.store, store, feed.dropping)
    return partial(cache_frozen, config, model, feed, examples, backbone, runtime, store, statistics, kept), statistics


def caches_nothing(config: TrainingConfig, model: models.ScoreModel) -> bool:
    """Whether every layer is computed anew in every epoch: so asked for, or no tower is frozen in front."""
    return not config.cache or not max(map(models.frozen_stages, (model.clip.visual, model.clip.text)))


def cache_frozen(
    config: TrainingConfig,
    model: models.ScoreModel,
    feed: inputs.Feed[inputs.PixelSource],
    examples: data.Examples,
    backbone: backbones.Backbone,
    runtime: engine.Runtime,
    store: features.FeatureCache | None,
    statistics: caching.Statistics,
    kept: Kept,
) -> None:
    """Compute what the frozen layers make of images and prompts once, as far as there are any and it fits."""
    feed.source = feed.pixels
    text_tables = {"prompts": feed.prompts, "rationales": feed.rationales[0] if feed.rationales else None}
    for table in text_tables.values():
        if table:
            table.enter_at(0, None)
    if store is None or caches_nothing(config, model):
        return
    started = time.perf_counter()
    setting = caching.Caching(
        store,
        runtime,
        config.cache_dtype,
        caching.identity(backbone.config, runtime),
        batch_size=evaluation_batch(config),
        reserve=BYTES_PER_TRAINED * sum(p.numel() for p in model.parameters() if p.requires_grad),
        keep_decoded=len(config.stages) > 1,
        fingerprint=fingerprints(config, model, kept),
        dropping=feed.dropping,
    )
    train = examples.rows("train")
    rows_of: dict[inputs.View, inputs.Rows] = {
        None: np.arange(len(examples.table)),
        **dict.fromkeys(range(min(config.num_views, config.epochs)), train),  # no epoch would see the others
    }
    of_view = ("crop_scale_min", "horizontal_flip", "seed", *(("crops", "global_view") if config.crops else ()))
    of_test = {"test_crops": config.num_test_crops, "global_view": config.global_view}
    found = caching.cache_images(
        setting,
        model.clip.visual,
        feed.pixels,
        rows_of=rows_of,
        evaluation=of_test if config.crops else "evaluation",
        augmentation={name: getattr(config, name) for name in of_view},
        observe=statistics.observe,
    )
    reasons = {"images": found} if isinstance(found, str) else {}
    if isinstance(found, inputs.CachedSource):
        feed.source = found
    for what, table in text_tables.items():
        if table and (reason := caching.cache_texts(setting, model.clip.text, table)):
            reasons[what] = reason
    said = "; ".join(f"{what} not: {reason}" for what, reason in reasons.items())
    held = "" if isinstance(found, str) else f"{found.describe()}, "
    runtime.say(f"cache     {held}{time.perf_counter() - started:.1f} s{'; ' * bool(said)}{said}")


def fingerprints(config: TrainingConfig, model: models.ScoreModel, kept: Kept) -> Callable[[torch.nn.Module, int], str]:
    """What tells a tower's frozen layers from others, see `caching.fingerprint`; they stay as they were loaded."""
    if config.init_from:
        return caching.fingerprint

    def find(tower: torch.nn.Module, num_stages: int) -> str:
        key = (LOADED_BY.values(config), tower is model.clip.visual, num_stages)
        return kept.value("weights", key, lambda: caching.fingerprint(tower, num_stages), most=64)

    return find
