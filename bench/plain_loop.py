"""The yardstick: the same training as baseline.py, as a competent user writes it without any of its short cuts.

    python bench/plain_loop.py [flags of baseline.py]

A DataLoader decodes, augments and normalises every image in every epoch; both towers run as a whole, prompts padded
to the context length; what is frozen merely has `requires_grad=False`. Device, precision, optimiser, schedule,
evaluation and weights at the start are those of baseline.py, and so are the crops, so that the losses can be compared:
with --cache_views V, epoch e takes the crops of epoch e mod V. Prints one line of JSON.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
from backbones import tokenizers
from cli.memo import NO_MEMO
from configs import TrainingConfig
from evaluation import probes
from finetune import feed, initial_model
from finetune.experiment import read_examples
from finetune.frozen_clip import caches_nothing
from finetune.task import evaluate
from guidance.arguments import parse_args
from inputs import decoding, views
from inputs.batches import BatchOrder
from sources.examples import Examples
from sources.scores import TASKS
from training import devices, loop, optim

EVALUATION = -1  # the view of an image that is not augmented
BICUBIC = v2.InterpolationMode.BICUBIC


class ScoredImages(Dataset):
    """All rows of a data set, as (pixels (3, S, S), token ids (77,), targets (2,))."""

    def __init__(
        self,
        config: TrainingConfig,
        examples: Examples,
        tokens: Tensor,
        preprocess: dict[str, Any],
        image_size: int,
    ) -> None:
        self.files, self.tokens = examples.files, tokens
        self.targets = np.stack([examples.unit_targets[task] for task in TASKS], axis=1).astype(np.float32)
        self.view = torch.full((), EVALUATION).share_memory_()  # of training; reading processes see it change
        self.size = image_size
        self.normalise = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess["mean"], preprocess["std"])]
        )
        self.views = views.Views(
            image_size=image_size,
            device=torch.device("cpu"),
            crop_scale_min=config.crop_scale_min,
            flip=config.horizontal_flip,
            seed=config.seed,
            **preprocess,
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        image = decoding.load_image(self.files[row].path)
        view = int(self.view)
        if view == EVALUATION:
            image = VF.center_crop(VF.resize(image, [self.size], interpolation=BICUBIC), [self.size] * 2)
        else:
            shape = torch.empty(3, image.height, image.width, device="meta")
            ((crop, flip),) = self.views.draw([shape], [self.files[row].digest], view)
            image = VF.resized_crop(image, **crop, size=[self.size] * 2, interpolation=BICUBIC)
            image = VF.horizontal_flip(image) if flip else image
        return self.normalise(image), self.tokens[row], torch.from_numpy(self.targets[row])


class RowsOf(Sampler[list[int]]):
    """The batches of a BatchOrder."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[int]]:
        for _, rows in self.order:
            yield rows.tolist()


def forward(model: models.ScoreModel, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Both towers on whole inputs, then the heads."""
    image = F.normalize(model.clip.encode_image(pixels).float(), dim=-1)
    text = F.normalize(model.clip.encode_text(tokens).float(), dim=-1)
    return {**model.score(image, text), "image": image, "text": text, "cos": (image * text).sum(dim=-1)}


def train(config: TrainingConfig) -> dict[str, Any]:
    """Train as configured; returns the mean loss of each epoch, the test scores and what it took."""
    runtime = devices.start_runtime(config.device, config.amp)
    devices.seed_everything(config.seed)
    examples = read_examples(config, NO_MEMO)
    backbone, model, _ = initial_model.start_model(config, examples, NO_MEMO)
    model.to(runtime.device)
    runtime = devices.settle_precision(runtime, config.amp, model.clip.visual)
    prompts = examples.table["prompt"].tolist()
    tokens, _ = tokenizers.tokenize(backbone.tokenizer, prompts, backbone.clip.context_length)
    preprocess = backbone.config["preprocess_cfg"]
    optimizer = torch.optim.AdamW(
        optim.parameter_groups(model, lambda name: config.lr, config.weight_decay), fused=runtime.device.type != "cpu"
    )
    num_train = len(examples.rows("train"))
    num_steps = config.epochs * optim.num_optimizer_steps(num_train, batch_size=config.batch_size, accumulation=1)
    schedule = optim.build_schedule(
        optimizer, kind=config.scheduler, num_steps=num_steps, warmup_ratio=config.warmup_ratio
    )
    # On a CPU, reading processes fight with the model for the cores: none is faster.
    num_workers = 0 if runtime.device.type == "cpu" else min(16, devices.num_cpus())
    dataset = ScoredImages(config, examples, tokens, preprocess, backbone.image_size)
    loaders = {
        name: DataLoader(
            dataset,
            batch_sampler=RowsOf(order),
            num_workers=num_workers,
            pin_memory=num_workers > 0,
            persistent_workers=num_workers > 0,
        )
        for name, order in feed.build_orders(config, examples).items()
    }
    watch = loop.Stopwatch()

    def batches(name: str, view: int) -> Iterator[tuple[Tensor, ...]]:
        dataset.view.fill_(view)
        for parts in watch.over(loaders[name]):
            yield tuple(part.to(runtime.device, non_blocking=True) for part in parts)

    @torch.no_grad()
    def scores(fold: str) -> dict[str, np.ndarray]:
        model.eval()
        parts = []
        for pixels, ids, _ in batches(fold, EVALUATION):
            with runtime.autocast():
                found = forward(model, pixels, ids)
            parts.append({name: value.float().cpu().numpy().astype(np.float64) for name, value in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    started = time.perf_counter()
    base = probes.fit_base({"train_eval": scores("train_eval")}, examples, base=config.base)
    assert isinstance(model.heads, models.ResidualHeads)
    model.heads.set_base(base.quality, base.consistency)
    is_cached = not caches_nothing(config, model)
    curve: list[float] = []
    validation: list[float] = []
    best: dict[str, Tensor] = {}
    for epoch in range(config.epochs):
        model.train()
        view = epoch if not is_cached else epoch % config.num_views if config.num_views else EVALUATION
        total = torch.zeros((), device=runtime.device)
        for pixels, ids, targets in batches("train", view):
            with runtime.autocast():
                found = forward(model, pixels, ids)
                loss_q, loss_c = (F.mse_loss(found[task], targets[:, i]) for i, task in enumerate(TASKS))
                loss = config.w_q * loss_q + config.w_c * loss_c
            optimizer.zero_grad()
            runtime.scaler.scale(loss).backward()
            runtime.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            runtime.scaler.step(optimizer)
            runtime.scaler.update()
            schedule.step()
            total += loss.detach() * len(pixels)
        curve.append(float(total) / num_train)
        validation.append(evaluate(scores("val"), "val", examples, config)["main"])
        if validation[-1] > max(validation[:-1], default=-math.inf):
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    test = evaluate(scores("test"), "test", examples, config)
    seconds = time.perf_counter() - started
    return {
        "losses": curve,
        "test_main": test["main"],
        "seconds": seconds,
        "data_wait": watch.seconds / seconds,
        "peak_gb": peak_gb(runtime),
        "device": runtime.describe(),
    }


def peak_gb(runtime: devices.Runtime) -> float:
    """The most memory in use so far: of the GPU, or of this process."""
    if runtime.device.type != "cpu":
        return torch.get_device_module(runtime.device).max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # in KB on Linux


if __name__ == "__main__":
    print(json.dumps(train(parse_args(sys.argv[1:]))))
