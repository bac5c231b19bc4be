"""What a run trains and by which steps, as `training.fit` asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from answering.experiment import Experiment, Fold
from answering.feed import QuestionBatch
from branches.fusion import AnswerModel, fuse
from training import checkpoints, micro_batches, optim, resuming
from training.fit import FitOptions
from vqa.targets import dense

BAN_WARM_UP = (0.5, 1.0, 1.5, 2.0)  # of --lr in the first epochs; the last stays
BAN_DECAY = (10, 12, 14, 16, 18)  # epochs done, at each of which a quarter is left
WARM_UP = 0.1  # share of all steps, of the other schedules
MIXTURE_TIMES = 10  # --lr for what branches weigh: few steps are to tell a good one from a bad one
FRESH_TIMES = 2  # --xvlm_lr for those weights of X-VLM that a file of pretraining has not, as its authors do
MIXTURE_STEPS = 300
MOST_NUMBERS = 2**26  # of the validation fold's logits, which the mixture is fitted to: 256 MB
MIXTURE = "weight_KA"  # of `AnswerModel`
XVLM = "branches.coarse.xvlm."  # how the names of X-VLM's parameters begin

# "answer", its number, "probability", "loss", and of several branches "answer_fine" and so on: (Q,) each
Answers = dict[str, np.ndarray]


class AnswerTask:
    """Answers to questions; see `training.fit.Task`."""

    may_leave_unused = False

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.train = experiment.folds["train"]

    @property
    def num_samples(self) -> int:
        """Training questions."""
        return len(self.train.table)

    def enter_epoch(self, epoch: int, saver: resuming.Saver) -> bool:
        """Nothing thaws here."""
        return False

    def batches(self, epoch: int, num_done: int) -> Iterable[QuestionBatch]:
        """The batches of an epoch (from 1), without the first `num_done`."""
        config = self.experiment.config
        parts = self.train.feed.parts(config.batch_size, seed=config.seed, number=epoch)
        return self.train.feed.batches(parts[num_done:])

    def compute_losses(self, model: nn.Module, batch: QuestionBatch) -> dict[str, Tensor]:
        """The loss of a whole batch, of which this process computes its share."""
        own, taught = model(**batch.inputs, learns=True)
        config, gather = self.experiment.config, self.experiment.runtime.gather
        logits_BSA = gather(own, len(batch))
        assert batch.targets_BA is not None
        losses = {
            name: losses_of(logits_BSA[:, place], batch.targets_BA, config.loss).mean()
            for place, name in enumerate(self.experiment.model.names)
        } | {name: gather(loss_B, len(batch)).mean() for name, loss_B in taught.items()}
        weights = {"fused": config.fusion_ratio, "coarse": 0.0 if self.experiment.has_frozen_xvlm else 1.0}
        total = torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
        total = total + 0.0 * own.sum()  # every process has to have a gradient
        named = {f"loss_{name}": loss for name, loss in losses.items()}
        return {"loss": total, **(named if len(named) > 1 else {})}

    def validate(self, model: AnswerModel, before_batch: Callable[[], object]) -> tuple[Answers, dict[str, float]]:
        """Answers to the validation fold, and what they are worth."""
        answers = answer(self.experiment, model, self.experiment.folds["val"], before_batch)
        accuracies = {name.replace("answer", "accuracy"): self.accuracy(answers[name]) for name in answers_of(answers)}
        return answers, {"loss": float(answers["loss"].mean()), **accuracies}

    def accuracy(self, answers_Q: np.ndarray) -> float:
        """The mean accuracy of answers by the targets of the validation fold."""
        targets_QA = self.experiment.folds["val"].table.targets_QA
        assert targets_QA is not None
        return float(targets_QA[np.arange(targets_QA.shape[0]), answers_Q.astype(int)].mean())

    def weights(self, model: AnswerModel) -> dict[str, Tensor]:
        """All weights."""
        return model.state_dict()

    def epoch_line(self, row: Mapping[str, float]) -> str:
        """One line on an epoch."""
        return (
            f"epoch {row['epoch']:3.0f}/{self.experiment.config.epochs}  loss {row['loss']:.4f}  "
            f"val loss {row['val_loss']:.4f}  val accuracy {row['val_accuracy']:.4f}  "
            f"{row['images_per_s']:.0f} questions/s  {row['seconds']:.1f} s"
        )


def answers_of(answers: Answers) -> list[str]:
    """The names of the answers that were given to each question: the model's, then those of its branches."""
    return [name for name in answers if name == "answer" or name.startswith("answer_")]


def losses_of(logits_BA: Tensor, targets_BA: Tensor, kind: str) -> Tensor:
    """(B, A) logits and accuracies of answers -> (B,) losses.

    "bce": binary cross-entropy, summed over answers. "ce": cross-entropy against the accuracies as shares; 0 for a
    question to which no answer of the list is right.
    """
    logits_BA = logits_BA.float()
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits_BA, targets_BA, reduction="none").sum(dim=1)
    sums_B1 = targets_BA.sum(dim=1, keepdim=True)
    return -(targets_BA / sums_B1.clamp(min=1e-6) * F.log_softmax(logits_BA, dim=1)).sum(dim=1)


def probabilities(logits_BA: Tensor, kind: str) -> Tensor:
    """(B, A) how likely each answer is right; sums to 1 for "ce" only."""
    return logits_BA.float().sigmoid() if kind == "bce" else logits_BA.float().softmax(dim=1)


def answer(
    experiment: Experiment, model: AnswerModel, fold: Fold, before_batch: Callable[[], object] = lambda: None
) -> Answers:
    """The answer that a model finds most likely to each question of a fold; its loss too where people's are known."""
    kind, runtime = experiment.config.loss, experiment.runtime

    def compute(model: AnswerModel, batch: QuestionBatch) -> dict[str, Tensor]:
        logits_BSA = model(**batch.inputs)
        logits_BA = logits_BSA[:, 0]
        probability, number = probabilities(logits_BA, kind).max(dim=1)
        found = {"answer": number.double(), "probability": probability}
        for place, name in enumerate(model.names[1:], start=1):
            found[f"answer_{name}"] = logits_BSA[:, place].argmax(dim=1).double()
        if batch.targets_BA is not None:
            own = torch.from_numpy(runtime.share(np.arange(len(batch)))).to(batch.targets_BA.device)
            found["loss"] = losses_of(logits_BA, batch.targets_BA[own], kind)
        return found

    return fold.predict(model, experiment.config.batch_size, compute, runtime, before_batch=before_batch)


def weigh_branches(
    experiment: Experiment,
    model: AnswerModel,
    best_weights: checkpoints.DeferredWeights,
    before_batch: Callable[[], object],
) -> None:
    """Let the branches of a trained model weigh what makes the best mixture on the validation fold, and write that.

    On training questions, a branch that has learned them by heart looks better than it is. Where the validation fold
    is what will be measured (`--no_test`), it is not fitted to.
    """
    if model.weight_KA is None or not experiment.config.test:
        return
    fold, config, runtime = experiment.folds["val"], experiment.config, experiment.runtime
    assert fold.table.targets_QA is not None
    most = max(1, MOST_NUMBERS // model.weight_KA.numel())
    rows = np.sort(np.random.default_rng(config.seed).permutation(len(fold.table))[:most])

    def compute(model: AnswerModel, batch: QuestionBatch) -> dict[str, Tensor]:
        return {"logits": model(**batch.inputs)[:, 1:]}

    found = fold.predict(model, config.batch_size, compute, runtime, rows, before_batch=before_batch)
    if runtime.is_main:
        logits_QKA = torch.from_numpy(found["logits"]).to(runtime.device, torch.float32)
        targets_QA = torch.from_numpy(dense(fold.table.targets_QA, rows)).to(runtime.device)
        model.weight_KA.data = best_mixture(logits_QKA, targets_QA, config.loss)
        best_weights.keep(model.state_dict())
        best_weights.flush()
    runtime.copy_weights(model)
    runtime.say(f"mixture   weighed anew on {len(rows):,} validation questions")


def best_mixture(logits_QKA: Tensor, targets_QA: Tensor, loss: str) -> Tensor:
    """W (K, A) by which `fuse` is least wrong about questions, from equal shares on."""
    weight_KA = torch.zeros(logits_QKA.shape[1:], device=logits_QKA.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight_KA], lr=0.05)
    for _ in range(MIXTURE_STEPS):
        optimizer.zero_grad()
        losses_of(fuse(logits_QKA, weight_KA, loss), targets_QA, loss).mean().backward()
        optimizer.step()
    return weight_KA.detach()


def fit_options(experiment: Experiment) -> FitOptions:
    """How long and by which steps to train."""
    config = experiment.config
    return FitOptions(
        epochs=config.epochs,
        lr=config.xvlm_lr if experiment.model.xvlm is not None and config.branch_names == ["coarse"] else config.lr,
        select_by="accuracy",
        accumulation=config.batches_per_step,
        max_grad_norm=config.clip_norm,
        patience=config.early_stopping_patience,
    )


def ban_factor(epoch: int) -> float:
    """The learning rate of an epoch (from 0), as a share of --lr: that of Kim et al.'s program, whatever --epochs."""
    return BAN_WARM_UP[min(epoch, len(BAN_WARM_UP) - 1)] * 0.25 ** sum(epoch >= start for start in BAN_DECAY)


def build_schedule(experiment: Experiment, optimizer: Optimizer) -> LambdaLR:
    """The learning-rate schedules, advanced once per optimiser step: X-VLM has its own, linear to 0."""
    config, steps = experiment.config, experiment.steps_per_epoch
    num_steps = steps * config.epochs

    def factor(step: int, kind: str) -> float:
        if kind == "ban":
            return ban_factor(step // steps)
        return optim.lr_factor(step, kind=kind, num_steps=num_steps, num_warmup_steps=round(WARM_UP * num_steps))

    def of_xvlm(step: int) -> float:
        return factor(step, "linear")

    def of_others(step: int) -> float:
        return factor(step, config.scheduler)

    return LambdaLR(optimizer, [of_xvlm if group["part"] == "xvlm" else of_others for group in optimizer.param_groups])


def build_train_state(experiment: Experiment) -> resuming.TrainState:
    """All that training changes."""
    config, model = experiment.config, experiment.model
    fresh = set() if model.xvlm is None else {XVLM + name for name in model.xvlm.fresh}

    def lr_of(name: str) -> float:
        if name == MIXTURE:
            return config.lr * MIXTURE_TIMES
        if not name.startswith(XVLM):
            return config.lr
        return config.xvlm_lr * (FRESH_TIMES if name in fresh else 1)

    optimizer = optim.build_optimizer(
        model,
        lr_of,
        weight_decay=config.weight_decay,
        part_of=lambda name: "xvlm" if name.startswith(XVLM) else "",
    )
    return resuming.TrainState(
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(experiment, optimizer),
        average=optim.WeightAverage(model, config.ema_decay),
        micro=micro_batches.MicroBatches(
            experiment.folds["train"].feed.split,
            enabled=config.dynamic_batch_size,
            max_usage=config.max_memory_usage,
            remedies="add --memory_efficient_attention, or lower --max_boxes or --num_hid",
        ),
        scaler=experiment.runtime.scaler,
        constant=experiment.constant,
    )
