"""What a run trains, as `training.fit` asks for it: batches, losses, validation, and layers that thaw step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

import losses
import models
from backbones import freezing, towers
from configs import TrainingConfig
from evaluation import agreement, text_tables
from finetune import initial_model
from finetune.experiment import Experiment, Scores
from finetune.frozen_clip import FrozenLayers
from inputs.batches import Batch
from sources.examples import Examples
from sources.scores import TASKS
from training import resuming


class ScoreTask:
    """Scores of images; see `training.fit.Task`."""

    def __init__(self, experiment: Experiment, frozen: FrozenLayers) -> None:
        self.experiment = experiment
        self.frozen = frozen
        self.stage = experiment.config.stages[0]

    @property
    def num_samples(self) -> int:
        """Training images."""
        return len(self.experiment.examples.rows("train"))

    @property
    def may_leave_unused(self) -> bool:
        """Whether some trained parameters may get no gradient: a head without labels, a part a foreign tower skips."""
        model = self.experiment.model
        plain = all(map(towers.staged_blocks, (model.clip.visual, model.clip.text)))
        return not plain or model.task_gradients != "shared" or not set(TASKS) <= set(self.experiment.examples.scales)

    def enter_epoch(self, epoch: int, saver: resuming.Saver) -> bool:
        """Thaw the layers that --unfreeze_schedule gives free in this epoch, and cache what the others compute."""
        config = self.experiment.config
        due = [stage for stage in config.stages if stage[1] < epoch][-1]
        if due == self.stage:
            return False
        self.stage = due
        initial_model.freeze(config, self.experiment.model, self.experiment.examples, due[0])
        self.experiment.runtime.say(f"{due[0]} layers stay frozen from epoch {due[1] + 1} on")
        with saver.interruptible():
            self.frozen.fill()
        return True

    def batches(self, epoch: int, num_done: int) -> Iterator[Batch]:
        """The batches of an epoch (from 1), without the first `num_done`."""
        order = self.experiment.orders["train"].of_pass(epoch - 1)
        return self.experiment.feed.batches(order, num_done=num_done)

    def compute_losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named losses of the whole batch, of which this process computes its share."""
        config, runtime = self.experiment.config, self.experiment.runtime
        own = model(**batch.inputs)
        scores = {name: runtime.gather(values, len(batch)) for name, values in own.items()}
        terms = score_terms(scores, batch.targets, config, self.experiment.examples, batch.labelled)
        if config.use_explanations:
            predicted_RE = target_RE = scores["rationale"][:0]
            if batch.rationales:
                predicted_RE = scores["rationale"][batch.with_rationale]
                with torch.no_grad():
                    target_RE = self.experiment.model.encode_texts(batch.rationales)
            terms["loss_exp"] = losses.rationale_loss(predicted_RE, target_RE)
            terms["loss"] = terms["loss"] + config.w_exp * terms["loss_exp"]
        if runtime.world > 1:  # every process has to have a gradient for all that it has computed
            terms["loss"] = terms["loss"] + 0.0 * sum(values.sum() for values in own.values())
        return terms

    def validate(self, model: models.ScoreModel, before_batch: Callable[[], object]) -> tuple[Scores, dict[str, float]]:
        """Scores of the validation fold (label units), and what `evaluate` says of them."""
        scores = self.experiment.predict(model, "val", before_batch=before_batch)
        return scores, evaluate(scores, "val", self.experiment.examples, self.experiment.config)

    def weights(self, model: models.ScoreModel) -> dict[str, Tensor]:
        """The weights of a model, LoRA merged in."""
        return freezing.merged_state(model)

    def epoch_line(self, row: Mapping[str, float]) -> str:
        """One line on an epoch."""
        return text_tables.epoch_line(row, self.experiment.config.epochs)


def score_terms(
    scores: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    config: TrainingConfig,
    examples: Examples,
    labelled: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Named losses of label-unit scores: "loss_q", "loss_c" and their weighted sum "loss"."""
    return losses.score_losses(
        {task: scores[task] for task in examples.scales},
        targets,
        weights={"q": config.w_q, "c": config.w_c, **dict.fromkeys(config.extra_score_names, config.w_extra)},
        terms=config.loss_terms,
        smoothing=config.label_smoothing,
        means=examples.train_means,
        labelled=labelled,
    )


def evaluate(
    scores: Mapping[str, np.ndarray], fold: str, examples: Examples, config: TrainingConfig
) -> dict[str, float]:
    """Losses (label units) and agreement (MOS units) of a fold's scores: "loss", "srocc_q", ..., "main"."""
    rows = examples.rows(fold)
    tensors = {task: torch.from_numpy(values) for task, values in scores.items()}
    targets = {task: torch.from_numpy(values[rows]) for task, values in examples.unit_targets.items()}
    terms = {name: float(value) for name, value in score_terms(tensors, targets, config, examples).items()}
    return {**terms, **agreement.agreements(agreement.in_mos_units(scores, examples), fold, examples)}
