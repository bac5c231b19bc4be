"""What the frozen CLIP of a run knows: the activations of its frozen layers, computed once, and the base terms.

Activations are cached where there are frozen layers in front, and where they fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
from torch import nn

import models
from backbones import towers
from cli.memo import DecidedBy, Memo
from configs import TrainingConfig
from evaluation import probes
from finetune.experiment import Experiment, Scores
from finetune.initial_model import LOADED_BY
from inputs import frozen_cache
from inputs.image_sources import CachedSource, View
from inputs.statistics import ImageStatistics
from inputs.transfer import Rows
from storage.feature_cache import FeatureCache

# What decides what the untrained CLIP makes of the data.
KNOWN_BY = DecidedBy(
    groups=("data", "backbone", "speed"),
    others=(
        "demo",
        "cache_dir",
        "test",
        "prompt_levels",
        "use_explanations",
        "amp",
        "device",
        "batch_size",
        "stage_features",
        "base",
    ),
)
BYTES_PER_TRAINED = 20  # on a GPU: gradient, two moments, average, and some room


class FrozenLayers:
    """The cache of a run, and the statistics of its images, which are computed along the way."""

    def __init__(self, experiment: Experiment) -> None:
        config = experiment.config
        self.experiment = experiment
        folder = Path(config.cache_dir) / "features"
        self.cache = FeatureCache(folder, config.cache_max_gb * 1e9) if config.cache else None
        self.statistics = ImageStatistics(experiment.feed.pixels.store, self.cache, experiment.feed.dropping)

    def fill(self) -> None:
        """Compute what the layers that are frozen now make of images and prompts, and feed from that."""
        config, model, feed = self.experiment.config, self.experiment.model, self.experiment.feed
        feed.source = feed.pixels
        tables = {"prompts": feed.prompts, "rationales": feed.rationales[0] if feed.rationales else None}
        for table in tables.values():
            if table:
                table.enter_at(0, None)
        if self.cache is None or caches_nothing(config, model):
            return
        started = time.perf_counter()
        setting = self.setting(self.cache)
        found = self.cache_images(setting)
        reasons = {"images": found} if isinstance(found, str) else {}
        if isinstance(found, CachedSource):
            feed.source = found
        for what, table in tables.items():
            if table and (reason := frozen_cache.cache_texts(setting, model.clip.text, table)):
                reasons[what] = reason
        said = "; ".join(f"{what} not: {reason}" for what, reason in reasons.items())
        held = "" if isinstance(found, str) else f"{found.describe()}, "
        seconds = time.perf_counter() - started
        self.experiment.runtime.say(f"cache     {held}{seconds:.1f} s{'; ' * bool(said)}{said}")

    def setting(self, cache: FeatureCache) -> frozen_cache.Caching:
        """How activations are cached."""
        config, model = self.experiment.config, self.experiment.model
        return frozen_cache.Caching(
            cache,
            self.experiment.runtime,
            config.cache_dtype,
            frozen_cache.identity(self.experiment.backbone.config, self.experiment.runtime),
            batch_size=config.evaluation_batch_size,
            reserve=BYTES_PER_TRAINED * sum(p.numel() for p in model.parameters() if p.requires_grad),
            keep_decoded=len(config.stages) > 1,
            fingerprint=fingerprints(config, model, self.experiment.memo),
            dropping=self.experiment.feed.dropping,
        )

    def cache_images(self, setting: frozen_cache.Caching) -> CachedSource | str:
        """See `frozen_cache.cache_images`."""
        config, examples = self.experiment.config, self.experiment.examples
        train = examples.rows("train")
        rows_of: dict[View, Rows] = {
            None: np.arange(len(examples.table)),
            **dict.fromkeys(range(min(config.num_views, config.epochs)), train),  # no epoch would see the others
        }
        of_view = ("crop_scale_min", "horizontal_flip", "seed", *(("crops", "global_view") if config.crops else ()))
        of_test = {"test_crops": config.num_test_crops, "global_view": config.global_view}
        return frozen_cache.cache_images(
            setting,
            self.experiment.model.clip.visual,
            self.experiment.feed.pixels,
            rows_of=rows_of,
            evaluation=of_test if config.crops else "evaluation",
            augmentation={name: getattr(config, name) for name in of_view},
            observe=self.statistics.observe,
            with_statistics=self.experiment.model.stage_width > 0,
        )


def caches_nothing(config: TrainingConfig, model: models.ScoreModel) -> bool:
    """Whether every layer is computed anew in every epoch: so asked for, or no tower is frozen in front."""
    return not config.cache or not max(map(towers.frozen_stages, (model.clip.visual, model.clip.text)))


def fingerprints(config: TrainingConfig, model: models.ScoreModel, memo: Memo) -> Callable[[nn.Module, int], str]:
    """What tells a tower's frozen layers from others, see `frozen_cache.fingerprint`; they stay as they were loaded."""
    if config.init_from:
        return frozen_cache.fingerprint

    def find(tower: nn.Module, num_stages: int) -> str:
        key = (LOADED_BY.values(config), tower is model.clip.visual, num_stages)
        return memo.value("weights", key, lambda: frozen_cache.fingerprint(tower, num_stages), most=64)

    return find


def learn_base(experiment: Experiment) -> tuple[dict[str, Scores], probes.Base]:
    """What the untrained CLIP makes of each fold, and the base terms fitted to it; residual heads start from them."""
    config, model, start = experiment.config, experiment.model, experiment.arguments["base"]

    def learn() -> tuple[dict[str, Scores], probes.Base]:
        folds = [fold for fold in experiment.orders if fold != "train"]
        known = {fold: experiment.predict(model, fold, models.embed_batch) for fold in folds}
        base = probes.fit_base(known, experiment.examples, stage_width=model.stage_width, base=start)
        return known, base

    known, base = experiment.memo.value("known", (start, KNOWN_BY.values(config)), learn, most=16)
    if not config.init_from:
        model.set_stage_scaling(base.stage_mean, base.stage_scale)
        if config.calibration:
            set_base(model, base)
    return known, base


def set_base(model: models.ScoreModel, base: probes.Base) -> None:
    """Let residual heads start from what CLIP knows."""
    if not isinstance(model.heads, models.ResidualHeads):
        return
    model.heads.set_base(base.quality, base.consistency)
    if base.kernel and model.heads.base_kernel:
        fits = {task: (fit.weights, fit.bias) for task, fit in base.kernel_fits.items()}
        model.heads.base_kernel.set(base.kernel.places, base.kernel.gamma, fits)
    for task, head in model.extra_heads.items():
        if fitted := base.of_image(task):
            cast(models.ResidualHead, head).set_base(fitted)
