"""What a run reads, as batches: images and texts, and the order of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import models
from backbones import loading, tokenizers, towers
from cli.memo import DecidedBy, Memo
from configs import VIEWS, TrainingConfig
from inputs import batches, image_sources, image_store
from inputs.texts import LevelledTexts, TextTable
from inputs.views import Views
from sources.examples import Examples
from training import devices

# What decides the data that is read, and the store of its images.
READ_BY = DecidedBy(groups=("data",), without=VIEWS, others=("demo", "cache_dir"))


def build_feed(
    config: TrainingConfig,
    examples: Examples,
    backbone: loading.Backbone,
    runtime: devices.Runtime,
    memo: Memo,
) -> tuple[batches.Feed[image_sources.PixelSource], int]:
    """The feed of batches, and the number of texts cut because they exceed the context length."""
    num_truncated = 0
    trim = towers.trims_exactly(backbone.clip.text)

    def tokenize(texts: Sequence[str]) -> Tensor:
        nonlocal num_truncated
        tokens, cut = tokenizers.tokenize(backbone.tokenizer, texts, backbone.clip.context_length)
        num_truncated += cut
        return tokens

    def text_table(column: str) -> TextTable | None:
        texts = examples.table[column].tolist()
        return TextTable(texts, tokenize, runtime.device, trim=trim) if any(texts) else None

    prompts: TextTable | None = None
    if config.prompt_levels:
        texts = examples.table["prompt"].tolist()
        prompts = LevelledTexts(texts, tokenize, runtime.device, trim=trim, **models.LEVEL_TEXTS)
    elif uses_texts(config, examples):
        prompts = text_table("prompt")
    rationales = text_table("explanation") if config.use_explanations else None
    settings: dict[str, Any] = {
        "image_size": None if config.crops else backbone.image_size,
        "num_threads": num_threads(config, runtime),
        "max_memory": config.image_memory_gb * 1e9 / runtime.local_world,
        "max_file": config.cache_max_gb * 1e9 / runtime.local_world,
        "spill_dir": Path(config.cache_dir),
    }
    key = (READ_BY.values(config), *settings.values())
    store = memo.value("images", key, lambda: image_store.ImageStore(examples.files, **settings))
    views = Views(
        image_size=backbone.image_size,
        **backbone.config["preprocess_cfg"],
        device=runtime.device,
        crop_scale_min=config.crop_scale_min,
        flip=config.horizontal_flip,
        seed=config.seed,
        crops=config.crops,
        test_crops=config.num_test_crops,
        global_view=config.global_view,
    )
    feed = batches.Feed(
        pixels=image_sources.PixelSource(store, views),
        device=runtime.device,
        targets=examples.unit_targets,
        prompts=prompts,
        rationales=(rationales, (examples.table["explanation"] != "").to_numpy()) if rationales else None,
        share=runtime.share,
        num_ahead=runtime.num_ahead,
        dropping=build_dropping(config, examples, runtime),
    )
    return feed, num_truncated


def uses_texts(config: TrainingConfig, examples: Examples) -> bool:
    """Whether anything that is trained looks at texts."""
    return "c" in examples.scales or config.use_explanations or config.prompt_levels


def num_threads(config: TrainingConfig, runtime: devices.Runtime) -> int:
    """Threads that decode images, as asked for or as suits the machine."""
    return runtime.num_threads if config.num_workers is None else config.num_workers


def build_dropping(config: TrainingConfig, examples: Examples, runtime: devices.Runtime) -> batches.DroppedRows:
    """What happens to images that can no longer be used in mid-run: training images may be left out if so asked."""
    if config.bad_images == "error":
        return batches.DroppedRows()
    if runtime.world > 1:
        if runtime.agree(examples.fingerprint) != examples.fingerprint:  # or they would wait for each other for ever
            raise ValueError("--bad_images skip: the processes have not found the same images readable")
        return batches.DroppedRows(
            otherwise="; --bad_images skip: several processes cannot leave out images in mid-run"
        )
    return batches.DroppedRows(
        examples.rows("train"),
        otherwise="; --bad_images skip: leaves out training images only, no score is measured on a changing fold",
    )


def build_orders(config: TrainingConfig, examples: Examples) -> dict[str, batches.BatchOrder]:
    """Batches by name: "train" is augmented and shuffled; "train_eval", "val" and "test" are plain and in order."""
    evaluated = {
        name: batches.BatchOrder(examples.rows(name.removesuffix("_eval")), batch_size=config.evaluation_batch_size)
        for name in ("train_eval", *config.folds_read)
    }
    train = batches.BatchOrder(examples.rows("train"), batch_size=config.batch_size, shuffle=True, seed=config.seed)
    return {"train": train, **evaluated}
