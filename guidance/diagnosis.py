"""What the curves of a finished run say, and the next run to try: how people read such curves, as code.

Curves wobble: weights move, small folds measure badly, and the default loss has a part that never falls to zero. What
chance explains is not remarked on; a run without findings looks fine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from configs import OPTIONS, TrainingConfig
from guidance import advice, presets
from sources.scores import TASKS

MAX_FINDINGS = 3

MIN_EPOCHS = 3  # two points make a line, but no curve
TAIL = 4  # the end of a curve is the median of its last quarter: one epoch alone may be an outlier

# Between two epochs, SROCC and PLCC on n validation images differ by about .1 / sqrt(n) without meaning anything, as
# both are measured on the same images; twice that is a difference. One score alone wobbles more than the mean of two.
MAIN_NOISE, TASK_NOISE = 0.2, 0.3
# Validation losses likewise: a rise below 10 % is no rise, and more is asked of fewer than 50 images.
MIN_VAL_RISE, VAL_LOSS_NOISE = 0.1, 0.7
# The training loss of an epoch is a mean over n images, cropped and dropped out anew: sd about .5 / sqrt(n) of it, as
# measured on frozen weights; among 20 epochs the highest and the lowest are 4 sd apart, so that 6 sd mean something.
MIN_TRAIN_SWING, TRAIN_LOSS_NOISE = 0.15, 3.0
MIN_SWINGS = 2  # rises beyond noise, each with a fall beyond noise behind it: an over-fitted run rises and stays
GRADIENT_JUMP = 10.0  # times the median norm of the epochs before: noise does not even double it
MIN_TRAIN_FALL = 0.1  # of the training loss, without which worse validation is not over-fitting
SLOW_FALL = 0.05  # of either loss over the whole run: what a few good steps reach
POOR_SCORE = 0.5  # mean of SROCC and PLCC; a convention: half of agreement, and hardly of use
# Of validation loss above training loss, to which few images add by chance; with more, the fit to training is better.
MAX_UNDER_GAP = 0.25
STARVED_SHARE = 0.3  # of both weights: the lowest that is recommended
STARVED_RATIO = 2.0  # one score's training loss to the other's: above what most scores differ by in difficulty
FED_FALL = 0.2  # of the other score's training loss: it must have learnt what the starved one has not

RATE_STEP = 3.0  # of the learning rate, up or down: a smaller one is often lost in noise
USUAL_EPOCHS = 50
PATIENCE = 5
SCALES = (0.05, 0.5)  # residual scales beyond are not proposed
MAX_DECAY = 1e-3
MAX_DROPOUT = 0.3


@dataclass(frozen=True)
class Finding:
    """One thing that the curves of a run show, and what to do about it."""

    finding: str  # short name, such as "over-fitting"
    evidence: str  # the numbers seen
    proposal: str  # what to change, and why
    command: str  # that runs it


def diagnose(
    history: Sequence[Mapping[str, float]], config: TrainingConfig, facts: advice.Facts, *, known: float | None = None
) -> list[Finding]:
    """Read the curves of a run.

    Args:
        history: a row for each epoch, as in `metrics.csv`; only the losses and scores of `facts.tasks` need be there.
        config: what it ran with.
        facts: what it ran on.
        known: the validation score that the epoch is chosen by, before training; None if it is not known.

    Returns:
        At most MAX_FINDINGS, the most important first; none for fewer than MIN_EPOCHS and for a run that looks fine.
    """
    if len(history) < MIN_EPOCHS:
        return []
    run = Curves(history, config, facts)
    for alone in (find_unstable, find_slow):  # what else such curves show comes from this
        found = alone(run)
        if found:
            return [found]
    over = find_over_fitting(run)
    lost = find_lost(run, known)
    end = None if over or lost else find_best_at_end(run)
    under = None if over or lost or end else find_under_fitting(run)
    start = None if lost else find_best_at_start(run)
    findings = [lost, start, over, find_starving(run), under, end]
    return [found for found in findings if found][:MAX_FINDINGS]


def lines(findings: Iterable[Finding]) -> list[str]:
    """The findings as lines for a terminal, each with its command on a line of its own."""
    return [
        line
        for found in findings
        for line in (f"{found.finding}: {found.evidence}", f"    {found.proposal}", f"    {found.command}")
    ]


class Curves:
    """The curves of a run with what belongs to them, and how they are read."""

    def __init__(self, history: Sequence[Mapping[str, float]], config: TrainingConfig, facts: advice.Facts) -> None:
        self.history = history
        self.config = config
        self.facts = facts
        self.tasks = [task for task in TASKS if task in facts.tasks]
        self.selection = self.curve(f"val_{config.select_by}")
        self.best = self.selection.index(max(self.selection))  # from 0; the first, as in resuming.Progress
        self.tail = max(1, len(history) // TAIL)
        self.main_noise = MAIN_NOISE / math.sqrt(facts.num_val)
        self.task_noise = TASK_NOISE / math.sqrt(facts.num_val)
        self.val_rise = max(MIN_VAL_RISE, VAL_LOSS_NOISE / math.sqrt(facts.num_val))
        self.train_fall = max(SLOW_FALL, TRAIN_LOSS_NOISE / 2 / math.sqrt(facts.num_train))
        self.train_swing = max(MIN_TRAIN_SWING, TRAIN_LOSS_NOISE / math.sqrt(facts.num_train))

    def curve(self, name: str) -> list[float]:
        """A column of the history."""
        return [row[name] for row in self.history]

    def score(self, task: str) -> list[float]:
        """Mean of SROCC and PLCC of a task."""
        return [(row[f"val_srocc_{task}"] + row[f"val_plcc_{task}"]) / 2 for row in self.history]

    def end(self, curve: Sequence[float]) -> float:
        """Where a curve has come to."""
        return median(curve[-self.tail :])

    def fall(self, name: str, since: int = 0) -> float:
        """The share of a loss that has gone since an epoch, counted from 0; negative if it has risen."""
        curve = self.curve(name)
        return 1 - self.end(curve) / curve[since] if curve[since] > 0 else 0.0

    @property
    def at_end(self) -> str:
        """The epochs that `end` reads, in words."""
        last = len(self.history)
        return f"epoch {last}" if self.tail == 1 else f"epochs {last - self.tail + 1} to {last}"

    @property
    def shares_clip(self) -> bool:
        """Whether two scores pull at the same trained weights."""
        return len(self.tasks) == 2 and not self.config.freeze_clip

    @property
    def rate(self) -> float:
        """The learning rate of what is mainly trained."""
        return self.config.head_lr or self.config.lr if self.config.freeze_clip else self.config.lr

    @property
    def usual_rates(self) -> tuple[float, float]:
        """The lowest and highest usual learning rate."""
        return advice.usual_learning_rates(self.config, self.facts)

    def finding(self, name: str, evidence: str, why: str, changes: Mapping[str, Any]) -> Finding:
        """A finding that proposes these changes, of those that are any."""
        changes = {name: value for name, value in changes.items() if value != getattr(self.config, name)}
        command = presets.command_line(self.config, **changes)
        return Finding(name, evidence, f"{why}: {describe(self.config, changes)}", command)


def find_unstable(run: Curves) -> Finding | None:
    """Losses that go up and down, or gradients that explode: the steps are too large."""
    changes = smaller_steps(run)
    why = "take smaller and safer steps"
    grad_norm = run.curve("grad_norm") if "grad_norm" in run.history[0] else []
    for epoch in range(2, len(grad_norm)):
        before = median(grad_norm[:epoch])
        if grad_norm[epoch] > GRADIENT_JUMP * before > 0:
            evidence = (
                f"the gradient norm jumps to {grad_norm[epoch]:.3g} in epoch {epoch + 1}, from about {before:.3g}"
            )
            if 0.5 < run.config.max_grad_norm <= 1:  # clipping as usual has not held it
                changes["max_grad_norm"] = 0.5
            return run.finding("unstable", evidence, why, changes)
    train, val = run.curve("loss"), run.curve("val_loss")
    swings = [(low, high) for low, high in rises(val, run.val_rise) if min(val[high:]) * (1 + run.val_rise) < val[high]]
    if len(swings) >= MIN_SWINGS:
        seen = ", ".join(
            f"{val[low]:.3f} to {val[high]:.3f} (epochs {low + 1} to {high + 1})" for low, high in swings[:3]
        )
        return run.finding("unstable", f"the validation loss falls and rises again and again: {seen}", why, changes)
    for low, high in rises(train, run.train_swing):
        evidence = (
            f"the training loss rises from {train[low]:.3f} in epoch {low + 1} to {train[high]:.3f} in epoch {high + 1}"
        )
        return run.finding("unstable", evidence, why, changes)
    return None


def find_slow(run: Curves) -> Finding | None:
    """Losses that hardly move, where the learning rate can be what holds them."""
    low, high = run.usual_rates
    is_poor = any(is_surely_poor(run, task) for task in run.tasks)
    if run.rate >= (high if is_poor else low):  # at usual rates, good scores that stay are what CLIP knew before
        return None
    if run.fall("loss") >= run.train_fall or abs(run.fall("val_loss")) >= SLOW_FALL:
        return None
    train, val = run.curve("loss"), run.curve("val_loss")
    evidence = (
        f"from epoch 1 to {run.at_end} the training loss goes from {train[0]:.3f} to {run.end(train):.3f}, the "
        f"validation loss from {val[0]:.3f} to {run.end(val):.3f}"
    )
    why = f"{low:g} to {high:g} is usual for what is trained here, so go up"
    return run.finding("slow", evidence, why, faster(run))


def find_lost(run: Curves, known: float | None) -> Finding | None:
    """A run of which no epoch has beaten what it started from."""
    best = run.selection[run.best]
    if known is None or known < best:
        return None
    name = "no gain from training" if known - best < run.main_noise else "worse than before training"
    evidence = (
        f"{run.config.select_by} on validation was {known:.3f} before training, which is kept, and is {best:.3f} at "
        f"best, after epoch {run.best + 1}"
    )
    if name == "no gain from training" and run.config.freeze_clip and (changes := freeze_less(run.config, run.facts)):
        why = "heads add nothing to what the frozen CLIP tells, so train its last layers"
        return run.finding(name, evidence, why, changes)
    if run.rate > run.usual_rates[0]:
        why = "the steps undo what CLIP knew, so take smaller ones"
        return run.finding(name, evidence, why, smaller_steps(run))
    why = "even small steps undo what CLIP knew, so hold on to it"
    return run.finding(name, evidence, why, tighter(run, run.tasks))


def find_best_at_start(run: Curves) -> Finding | None:
    """Validation that is best after the first epoch and then gets worse: training undoes what was known."""
    best, end = run.selection[run.best], run.end(run.selection)
    if run.best > 0 or best - end < run.main_noise or best < 1 / math.sqrt(run.facts.num_val):  # no better than chance
        return None
    evidence = (
        f"{run.config.select_by} on validation is {best:.3f} after epoch 1 and {end:.3f} at the end ({run.at_end})"
    )
    changes = smaller_steps(run)
    why = "the first epoch does good and the others harm, so go more slowly"
    if run.rate <= run.usual_rates[0]:
        why = "already slow steps do harm, so hold on to what CLIP knows"
        changes = tighter(run, run.tasks)
    return run.finding("best epoch at the very start", evidence, why, changes)


def find_over_fitting(run: Curves) -> Finding | None:
    """A validation loss that rises while the training loss falls, of all scores together or of one of them."""
    alone = [task for task in run.tasks if over_fits_since(run, f"loss_{task}") is not None]
    tasks = alone if len(alone) == 1 else run.tasks
    name = f"loss_{tasks[0]}" if len(tasks) == 1 else "loss"
    low = over_fits_since(run, name)
    if low is None:
        return None
    train, val = run.curve(name), run.curve(f"val_{name}")
    title = f"{TASKS[tasks[0]]}'s" if len(tasks) == 1 else "the"
    evidence = (
        f"from epoch {low + 1} to the end ({run.at_end}) {title} training loss falls from {train[low]:.3f} to "
        f"{run.end(train):.3f}, and the validation loss rises from {val[low]:.3f} to {run.end(val):.3f}"
    )
    return run.finding("over-fitting", evidence, "stay closer to what CLIP knows", tighter(run, tasks))


def over_fits_since(run: Curves, name: str) -> int | None:
    """The epoch, from 0, from which on a loss falls in training and rises in validation; None if it does not."""
    val = smooth(run.curve(f"val_{name}"))
    low = val.index(min(val))
    is_over = run.end(val) > val[low] * (1 + run.val_rise) and run.fall(name, low) >= MIN_TRAIN_FALL
    return low if is_over else None


def find_starving(run: Curves) -> Finding | None:
    """One score that has not been learnt because CLIP was left to the other."""
    if not run.shares_clip:
        return None
    for starved, fed in (("q", "c"), ("c", "q")):
        share = weight(run.config, starved) / (run.config.w_q + run.config.w_c)
        if share == 0 or run.config.task_gradients == f"stop_{starved}":  # so wanted
            continue
        losses = [run.end(run.curve(f"loss_{task}")) for task in (starved, fed)]
        is_behind = losses[0] >= STARVED_RATIO * losses[1] and run.fall(f"loss_{fed}") >= FED_FALL
        if is_behind and share < STARVED_SHARE:
            evidence = (
                f"at the end ({run.at_end}) the training loss of {TASKS[starved]} is {losses[0]:.3f} and that of "
                f"{TASKS[fed]} {losses[1]:.3f}, where {TASKS[starved]} has {share:.2g} of both weights"
            )
            return starving(run, evidence, f"let CLIP learn from {TASKS[starved]} too", {"w_q": 0.5, "w_c": 0.5})
        if run.rate > run.usual_rates[1]:  # such rates harm whichever score they like
            continue
        before, after = run.score(starved), run.score(fed)
        lost, won = before[0] - run.end(before), run.end(after) - after[0]
        if min(lost, won) < run.task_noise or run.fall(f"loss_{starved}") >= MIN_TRAIN_FALL:
            continue
        evidence = (
            f"on validation {TASKS[fed]} rises from {after[0]:.3f} in epoch 1 to {run.end(after):.3f} at the end "
            f"({run.at_end}), while {TASKS[starved]} falls from {before[0]:.3f} to {run.end(before):.3f}"
        )
        if share < 0.5:
            return starving(run, evidence, "give both the same weight", {"w_q": 0.5, "w_c": 0.5})
        if run.config.task_gradients == "shared":
            why = f"{TASKS[fed]} changes CLIP at the other's expense, so let it train its head only"
            return starving(run, evidence, why, {"task_gradients": f"stop_{fed}"})
    return None


def starving(run: Curves, evidence: str, why: str, changes: Mapping[str, Any]) -> Finding:
    """The finding that one score starves the other."""
    return run.finding("one score starves the other", evidence, why, changes)


def find_under_fitting(run: Curves) -> Finding | None:
    """Scores that are poor although the training images are fitted no better: the model may change too little."""
    poor = [task for task in run.tasks if is_surely_poor(run, task) and not has_gap(run, task)]
    if not poor:
        return None
    seen = ", ".join(
        f"{TASKS[task]} {run.end(run.curve(f'loss_{task}')):.3f} in training, "
        f"{run.end(run.curve(f'val_loss_{task}')):.3f} in validation, "
        f"SROCC {run.history[run.best][f'val_srocc_{task}']:.3f}"
        for task in poor
    )
    why = "let the model learn more"
    if run.config.clip_pretrained == "none" and not run.config.init_from:
        why = "weights that start at random need a pretrained CLIP most; short of that, let the model learn more"
    evidence = f"losses are still high at the end ({run.at_end}): {seen}"
    if run.rate > run.usual_rates[1]:
        why = "such large steps undo what is known, so take smaller ones"
        return run.finding("under-fitting", evidence, why, smaller_steps(run))
    return run.finding("under-fitting", evidence, why, looser(run, poor))


def find_best_at_end(run: Curves) -> Finding | None:
    """Validation that is still getting better when the last epoch ends."""
    num_epochs = len(run.history)
    if num_epochs < run.config.epochs or run.best + 1 <= 0.9 * num_epochs:  # a run that was stopped has no end
        return None
    middle = (num_epochs - 1) // 2
    rise = run.selection[run.best] - run.selection[middle]
    if rise < run.main_noise or run.fall("val_loss", middle) <= 0:
        return None
    evidence = (
        f"{run.config.select_by} on validation still rises, from {run.selection[middle]:.3f} in epoch {middle + 1} to "
        f"{run.selection[run.best]:.3f} in epoch {run.best + 1} of {num_epochs}"
    )
    low, high = run.usual_rates
    if run.rate > high:
        why = "what such large steps undo has to be learnt anew, so take smaller ones"
        return run.finding("best epoch at the very end", evidence, why, smaller_steps(run))
    if run.rate < low or (num_epochs >= USUAL_EPOCHS and run.rate < high):
        return run.finding("best epoch at the very end", evidence, "learn faster", faster(run))
    return run.finding("best epoch at the very end", evidence, "train for longer", longer(run.config))


def is_surely_poor(run: Curves, task: str) -> bool:
    """Whether a score never came near POOR_SCORE, by more than so few validation images can be wrong."""
    return max(run.score(task)) + 1 / math.sqrt(run.facts.num_val) < POOR_SCORE


def has_gap(run: Curves, task: str) -> bool:
    """Whether training images are fitted better than others."""
    train, val = run.end(run.curve(f"loss_{task}")), run.end(run.curve(f"val_loss_{task}"))
    return val > train * (1 + MAX_UNDER_GAP + 1 / math.sqrt(run.facts.num_val))


def smooth(curve: Sequence[float]) -> list[float]:
    """Running median of three, which drops single outliers; both ends stay."""
    return [curve[0], *(median(curve[i - 1 : i + 2]) for i in range(1, len(curve) - 1)), curve[-1]]


def rises(curve: Sequence[float], swing: float) -> list[tuple[int, int]]:
    """Where a curve of positive values rises by more than the share `swing`: (lowest, highest) places, from 0.

    Between two of them it falls by as much, by which the highest place is known.
    """
    found: list[tuple[int, int]] = []
    low = high = 0
    rising = False
    for place, value in enumerate(curve):
        if rising:
            if value > curve[high]:
                high = place
            elif value * (1 + swing) < curve[high]:
                found.append((low, high))
                rising, low = False, place
        elif value < curve[low]:
            low = place
        elif value > curve[low] * (1 + swing):
            rising, high = True, place
    return [*found, (low, high)] if rising else found


def smaller_steps(run: Curves) -> dict[str, Any]:
    """A lower learning rate, and what protects the steps where it is not there yet."""
    config, high = run.config, run.usual_rates[1]
    changes = scaled_rates(config, min(1 / RATE_STEP, high / run.rate))
    if config.max_grad_norm == 0 or config.max_grad_norm > 1:
        changes["max_grad_norm"] = 1.0
    if config.warmup_ratio < 0.1 and not config.freeze_clip:
        changes["warmup_ratio"] = 0.1
    if config.scheduler == "constant":
        changes["scheduler"] = "cosine"
    return changes


def faster(run: Curves) -> dict[str, Any]:
    """A higher learning rate, but none above the usual ones."""
    low, high = run.usual_rates
    return scaled_rates(run.config, min(max(run.rate * RATE_STEP, low), high) / run.rate)


def scaled_rates(config: TrainingConfig, factor: float) -> dict[str, Any]:
    """All learning rates times a factor, to two digits."""
    highest = 10.0  # that --lr takes
    rates = {"lr": config.lr, "head_lr": config.head_lr}
    return {name: min(highest, float(f"{rate * factor:.2g}")) for name, rate in rates.items() if rate is not None}


def longer(config: TrainingConfig) -> dict[str, Any]:
    """Half as many epochs again, with an end before if they bring nothing."""
    most = USUAL_EPOCHS if config.epochs < USUAL_EPOCHS else 100_000  # that --epochs takes
    changes = {"epochs": min(most, config.epochs + -(-config.epochs // 2))}
    if config.early_stopping_patience == 0 and changes["epochs"] > 2 * PATIENCE:
        changes["early_stopping_patience"] = PATIENCE
    return changes


def tighter(run: Curves, tasks: Sequence[str]) -> dict[str, Any]:
    """What keeps these scores closer to what CLIP knows; never empty."""
    config, high = run.config, run.usual_rates[1]
    changes = freeze_more(config, run.facts)
    changes |= rescaled(config, tasks, lambda scale: min(scale, max(SCALES[0], min(SCALES[1], 0.75 * scale))))
    if config.weight_decay < MAX_DECAY:
        changes["weight_decay"] = min(MAX_DECAY, max(1e-4, float(f"{3 * config.weight_decay:.2g}")))
    if config.freeze_clip and config.dropout < MAX_DROPOUT:  # more freezing is impossible
        changes["dropout"] = min(MAX_DROPOUT, round(config.dropout + 0.1, 2))
    if config.freeze_clip == changes.get("freeze_clip", config.freeze_clip) and (run.rate > high or not changes):
        changes |= scaled_rates(config, min(high / run.rate, 1 / RATE_STEP))
    if config.early_stopping_patience == 0 and config.epochs > 2 * PATIENCE:
        changes["early_stopping_patience"] = PATIENCE
    return changes


def looser(run: Curves, tasks: Sequence[str]) -> dict[str, Any]:
    """What lets these scores change more; never empty."""
    config = run.config
    changes = freeze_less(config, run.facts)
    changes |= rescaled(config, tasks, lambda scale: max(scale, min(SCALES[1], max(0.1, 1.5 * scale))))
    if config.use_residual_learning and not config.calibration and not config.init_from:
        changes["calibration"] = True
    if config.weight_decay > MAX_DECAY:
        changes["weight_decay"] = MAX_DECAY
    if config.freeze_clip and config.dropout > 0:
        changes["dropout"] = 0.0
    if config.freeze_clip == changes.get("freeze_clip", config.freeze_clip) and run.rate < run.usual_rates[1]:
        changes |= faster(run)
    return changes or longer(config)


def rescaled(config: TrainingConfig, tasks: Sequence[str], rule: Callable[[float], float]) -> dict[str, Any]:
    """Residual scales of these scores as the rule makes them, of those that it changes."""
    if not config.use_residual_learning or config.init_from:  # whose scales are those of the first stage
        return {}
    names = [f"residual_scale_{task}" for task in tasks]
    scales = {name: rule(getattr(config, name)) for name in names}
    return {name: float(f"{scale:.2g}") for name, scale in scales.items() if scale != getattr(config, name)}


def freeze_more(config: TrainingConfig, facts: advice.Facts) -> dict[str, Any]:
    """A twelfth more of the blocks frozen, at last all; a lower rank for LoRA; empty where all is frozen already."""
    depth, layers = facts.num_blocks, config.stages[-1][0]
    if config.freeze_clip:
        return {}
    if config.lora_rank:
        return {"lora_rank": config.lora_rank // 2} if config.lora_rank > 1 else {}
    if len(config.stages) > 1:
        return {"unfreeze_schedule": plan_of(config.stages[:-1])}
    if depth is None:
        return {}
    if layers is None:
        return {"partial_freeze": True, "freeze_layers": depth * 3 // 4}
    more = layers + max(1, depth // 12)
    if more < depth:
        return {"unfreeze_schedule": f"{more}@0"} if config.unfreeze_schedule else {"freeze_layers": more}
    frozen = {"freeze_clip": True, "partial_freeze": False, "unfreeze_schedule": None}
    return {**frozen, **usual_rate(config, frozen, facts)}


def freeze_less(config: TrainingConfig, facts: advice.Facts) -> dict[str, Any]:
    """A twelfth fewer of the blocks frozen, or the last quarter of an all frozen CLIP thawed; empty if none are.

    Fewer than 1,000 images cannot teach CLIP's own blocks.
    """
    depth, layers = facts.num_blocks, config.stages[-1][0]
    if config.lora_rank or depth is None:
        return {"lora_rank": config.lora_rank * 2} if 0 < config.lora_rank <= 512 else {}
    if config.freeze_clip:
        if facts.num_train < 1000:
            return {}
        thawed = {"freeze_clip": False, "partial_freeze": True, "freeze_layers": depth * 3 // 4}
        return {**thawed, **usual_rate(config, thawed, facts)}
    if not layers:
        return {}
    fewer = max(0, layers - max(1, depth // 12))
    if config.unfreeze_schedule:
        return {"unfreeze_schedule": plan_of([*config.stages[:-1], (fewer, config.stages[-1][1])])}
    return {"freeze_layers": fewer}


def usual_rate(config: TrainingConfig, changes: Mapping[str, Any], facts: advice.Facts) -> dict[str, Any]:
    """A learning rate that is usual once these changes are made."""
    low, high = advice.usual_learning_rates(replace(config, **changes), facts)
    rate = config.head_lr or config.lr
    if changes["freeze_clip"] and config.head_lr is not None:
        return {"head_lr": min(max(rate, low), high)}
    return {"lr": min(max(config.lr, low), high)}


def plan_of(stages: Iterable[tuple[int | None, int]]) -> str:
    """Stages as --unfreeze_schedule takes them."""
    return ",".join(f"{layers}@{epoch}" for layers, epoch in stages)


def weight(config: TrainingConfig, task: str) -> float:
    """The weight of a score's loss."""
    return config.w_q if task == "q" else config.w_c


def describe(config: TrainingConfig, changes: Mapping[str, Any]) -> str:
    """Changes in words: "--lr 0.001 to 0.003, add --freeze_clip"."""
    words = []
    for name, new in changes.items():
        spec, old = OPTIONS[name], getattr(config, name)
        if spec.kind is bool:
            words.append(f"{'drop' if new == spec.default else 'add'} {spec.flag}")
        elif new is None:
            words.append(f"drop {spec.flag}")
        else:
            words.append(" to ".join([f"{spec.flag} {plain(old)}", plain(new)]))
    return ", ".join(words)


def plain(value: Any) -> str:
    """A value as people write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
