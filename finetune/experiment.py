"""The parts of one run: data, model, and how one becomes batches for the other. Built from the options, complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import data
import models
from backbones.loading import Backbone
from cli.memo import Memo
from configs import TrainingConfig
from finetune import feed as feeds
from finetune import initial_model
from inputs.batches import BatchOrder, Feed
from inputs.image_sources import PixelSource
from sources.examples import Examples, leakage_notes
from sources.scores import TASKS, title_of
from training import devices, loop, optim

Scores = dict[str, np.ndarray]  # task, or what else was computed -> (n,) or (n, ...) of the rows of a fold


@dataclass(frozen=True)
class Experiment:
    """The parts of one run."""

    config: TrainingConfig  # for the demo, with the paths to its data
    runtime: devices.Runtime
    examples: Examples
    backbone: Backbone
    model: models.ScoreModel
    arguments: Mapping[str, Any]  # that `models.build_model` builds the model again from
    feed: Feed[PixelSource]
    orders: Mapping[str, BatchOrder]  # "train" is shuffled; "train_eval", "val" and "test" are in order
    num_truncated: int  # texts that were cut because they exceed the context length
    memo: Memo

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps."""
        return optim.num_optimizer_steps(
            len(self.examples.rows("train")),
            batch_size=self.config.batch_size,
            accumulation=self.config.gradient_accumulation_steps,
        )

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs

    def predict(self, model: models.ScoreModel, fold: str, compute: Any = models.score_batch, **hooks: Any) -> Scores:
        """What a model computes of all rows of a fold; `hooks` are those of `loop.predict`."""
        order = self.orders[fold]
        found = loop.predict(model, self.feed.batches(order), compute, runtime=self.runtime, **hooks)
        return {name: self.feed.dropping.whole(order.rows, values) for name, values in found.items()}


def build_experiment(config: TrainingConfig, runtime: devices.Runtime, memo: Memo) -> Experiment:
    """Read the data, load the model, and prepare the batches. Raises ValueError for what cannot work."""
    devices.seed_everything(config.seed)
    with runtime.main_first():
        config = data.find_demo(config) if config.demo else config
    examples = read_examples(config, memo)
    backbone, model, arguments = initial_model.start_model(config, examples, memo)
    model.to(runtime.device)
    runtime = devices.settle_precision(runtime, config.amp, model.clip.visual)
    feed, num_truncated = feeds.build_feed(config, examples, backbone, runtime, memo)
    orders = feeds.build_orders(config, examples)
    return Experiment(config, runtime, examples, backbone, model, arguments, feed, orders, num_truncated, memo)


def read_examples(config: TrainingConfig, memo: Memo) -> Examples:
    """The data that the options name, fit for them. Raises ValueError."""
    examples = memo.value("data", feeds.READ_BY.values(config), lambda: data.read_examples(config))
    check_examples(config, examples)
    return examples


def check_examples(config: TrainingConfig, examples: Examples) -> None:
    """Raise ValueError if the options ask for what the data has not."""
    task = config.select_by.rpartition("_")[2]
    if task in TASKS and task not in examples.scales:
        raise ValueError(f"--select_by {config.select_by}: the data has no {TASKS[task]} scores")
    if not any({"q": config.w_q, "c": config.w_c}.get(task, config.w_extra) for task in examples.scales):
        raise ValueError(f"the data has {' and '.join(map(title_of, examples.scales))} scores only, weighted 0")
    if not set(TASKS) & set(examples.scales):
        raise ValueError("the data has neither quality nor consistency scores: --extra_scores come beside them")
    stopped = config.task_gradients.removeprefix("stop_")
    if stopped in TASKS and set(examples.scales) == {stopped}:
        raise ValueError(f"--task_gradients {config.task_gradients}: the data has no other scores to train CLIP by")
    if config.strict_splits and (leaks := leakage_notes(examples)):
        raise ValueError(f"--strict_splits: {'; '.join(leaks)}")
    if config.use_explanations and (examples.table["prompt"] == "").all():
        raise ValueError("--use_explanations: needs prompts, and the data has none")
    if config.use_explanations and not (examples.table["explanation"] != "").any():
        raise ValueError(f"--use_explanations: column {config.explanation_column!r} is missing or empty")
