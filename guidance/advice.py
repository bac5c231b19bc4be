"""What usually works, compared with what is asked for, before training: a checklist as code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from configs import TrainingConfig
from guidance.presets import DEMO_SETTINGS, LITE, PRESET_DEPTH

SMALL_CLIP = 30_000_000  # parameters, below which a CLIP bears, and needs, larger learning rates than the usual ones
MIN_VAL = 50  # validation images, below which the best epoch is mostly chosen by chance
MIN_WARMUP_STEPS = 3

# Option -> lowest and highest value that usually make sense, and why.
USUAL = {
    "weight_decay": (1e-5, 1e-3, "less does nothing, more holds the weights at zero"),
    "dropout": (0.0, 0.3, "heads this small learn nothing through more"),
    "hidden_dim_q": (64, 512, "a narrower head underfits, a wider one overfits"),
    "hidden_dim_c": (64, 512, "a narrower head underfits, a wider one overfits"),
    "label_smoothing": (0.0, 0.1, "more hides the differences that are to be learnt"),
    "crop_scale_min": (0.6, 1.0, "smaller crops no longer show what the prompt asked for"),
    "test_size": (0.1, 0.3, "a smaller test fold is noise, a larger one is missed in training"),
    "w_exp": (0.05, 0.3, "the explanation is there to help the scores, not to outweigh them"),
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of data, model and machine before training."""

    num_train: int  # images
    num_val: int
    num_blocks: int | None  # of the image tower; None where it has none
    num_parameters: int  # of CLIP
    tasks: tuple[str, ...]  # scores with labels: "q", "c" and further ones
    num_steps: int  # of the optimiser, in all
    free_memory: float | None = None  # bytes on the GPU; None on a CPU
    bytes_per_image: float = 0.0  # that a training step keeps for each image of the batch
    draws_val: bool = True  # whether --val_size has a say; False where the data brings all folds


@dataclass(frozen=True)
class Remark:
    """One setting that is unusual for these data, this model or this machine."""

    flag: str
    value: str
    recommended: str
    why: str
    change: str  # flags that would mend it

    def __str__(self) -> str:
        return f"{self.flag} {self.value}: usual here is {self.recommended}, because {self.why}; try {self.change}"


def advise(config: TrainingConfig, facts: Facts) -> list[Remark]:
    """Remarks on settings that seldom work with such data, model and machine; none on what --demo itself chose."""
    remarks = [
        *on_learning_rate(config, facts),
        *on_freezing(config, facts),
        *on_residual_scales(config, facts),
        *on_batch(config, facts),
        *on_loss_weights(config, facts),
        *on_schedule(config, facts),
        *on_validation(config, facts),
        *on_ranges(config),
    ]
    chosen = {**DEMO_SETTINGS.get(config.demo or "", {}), **(LITE if config.preset == "lite" else {})}
    settled = {f"--{name}" for name, value in chosen.items() if getattr(config, name) == value}
    return [remark for remark in remarks if remark.flag not in settled]


def starts_random(config: TrainingConfig) -> bool:
    """Whether CLIP knows nothing yet that could be lost or kept."""
    return config.clip_pretrained == "none" and not config.init_from


def usual_learning_rates(config: TrainingConfig, facts: Facts) -> tuple[float, float]:
    """Lowest and highest usual peak learning rate, by what is trained."""
    if config.freeze_clip:
        return 1e-3, 5e-3
    if facts.num_parameters < SMALL_CLIP or starts_random(config):
        return 3e-5, 3e-3
    if config.lora_rank:
        return 3e-5, 1e-3
    if config.stages[0][0] is None:
        return 1e-5, 3e-5
    return (1e-5 if config.init_from else 2e-5), 1e-4  # a second stage goes on gently; the preset max takes 2e-5


def on_learning_rate(config: TrainingConfig, facts: Facts) -> Iterator[Remark]:
    """The learning rate against what is trained."""
    low, high = usual_learning_rates(config, facts)
    flag, lr = "--lr", config.lr
    if config.freeze_clip and config.head_lr is not None:
        flag, lr = "--head_lr", config.head_lr
    what = "only the heads are trained and" if config.freeze_clip else f"CLIP is trained ({config.freezing}) and"
    risk = "may not settle" if config.freeze_clip or starts_random(config) else "may lose what it knows"
    if lr < low:
        yield Remark(flag, f"{lr:g}", f"{low:g} to {high:g}", f"{what} would learn slowly", f"{flag} {low:g}")
    elif lr > high:
        yield Remark(flag, f"{lr:g}", f"{low:g} to {high:g}", f"{what} {risk}", f"{flag} {high:g}")


def on_freezing(config: TrainingConfig, facts: Facts) -> Iterator[Remark]:
    """How much is frozen against the depth of the model and the number of images; random weights have no such rule."""
    if starts_random(config):
        return
    yield from on_layers(config, facts)
    count = f"{facts.num_train:,} training images"
    partial = f"--partial_freeze --freeze_layers {round((facts.num_blocks or PRESET_DEPTH) * 0.75)}"
    if config.freeze_clip and facts.num_train > 5000:
        why = f"{count} can teach CLIP's last blocks too"
        yield Remark("--freeze_clip", "on", "partial or no freezing", why, f"--no_freeze_clip {partial} --lr 3e-5")
    if config.freezing == "full" and facts.num_train <= 5000:
        why = f"{count} are few to change all of CLIP by"
        if facts.num_train < 1000:
            yield Remark("--freeze_clip", "off", "on", why, "--preset small")
        else:
            yield Remark("--partial_freeze", "off", "on", why, partial)


def on_layers(config: TrainingConfig, facts: Facts) -> Iterator[Remark]:
    """The number of frozen layers against the depth of the model."""
    layers, depth = config.stages[0][0], facts.num_blocks or 0
    low, high = -(-depth * 2 // 3), depth * 11 // 12
    if layers is None or config.lora_rank or not 0 < low <= high or low <= layers <= high:
        return
    why = f"of {depth} blocks the last {depth - high} to {depth - low} are worth training"
    if config.unfreeze_schedule:
        plan = f"{high}@0" + (f",{low}@{max(1, config.epochs // 2)}" if low < high else "")
        change = f"--unfreeze_schedule {plan}"
        yield Remark("--unfreeze_schedule", config.unfreeze_schedule, f"to begin at {low} to {high}", why, change)
    else:
        change = f"--freeze_layers {min(max(layers, low), high)}"
        yield Remark("--freeze_layers", str(layers), f"{low} to {high}", why, change)


def on_residual_scales(config: TrainingConfig, facts: Facts) -> Iterator[Remark]:
    """The largest change that heads may make against the number of images."""
    if not config.use_residual_learning:
        return
    low, high, best = (0.05, 0.2, 0.1)
    if facts.num_train >= 1000:
        low, high, best = (0.15, 0.3, 0.2) if facts.num_train <= 5000 else (0.2, 0.5, 0.3)
    for task in ("q", "c"):
        value = getattr(config, f"residual_scale_{task}")
        if task in facts.tasks and not low <= value <= high:
            why = f"{facts.num_train:,} training images " + (
                "support a larger change to what CLIP knows" if value < low else "do not support so large a change"
            )
            flag = f"--residual_scale_{task}"
            yield Remark(flag, f"{value:g}", f"{low:g} to {high:g}", why, f"{flag} {best:g}")


def on_batch(config: TrainingConfig, facts: Facts) -> Iterator[Remark]:
    """The batch size against memory and the number of images."""
    flag, size, parts = "--batch_size", config.batch_size, config.gradient_accumulation_steps
    step = size * parts
    if step > 1 and step * 4 > facts.num_train:
        count = f"{facts.num_train:,} training images"
        why = f"{count} make {-(-facts.num_train // step)} step(s) of {step} per epoch"
        change = f"{flag} {max(1, min(size, facts.num_train // 20))}"
        change += " --gradient_accumulation_steps 1" if parts > 1 else ""
        recommended = f"at most {max(1, facts.num_train // 4)}" + (" per step" if parts > 1 else "")
        yield Remark(flag, str(size), recommended, why, change)
    if facts.free_memory is None or not facts.bytes_per_image:
        return
    fitting = int(config.max_memory_usage * facts.free_memory / facts.bytes_per_image)
    if size > fitting and not config.dynamic_batch_size and not config.gradient_checkpointing:
        why = (
            f"an image takes about {facts.bytes_per_image / 1e9:.2g} of {facts.free_memory / 1e9:.3g} GB that are free"
        )
        ways = "--gradient_checkpointing or (in one process) --dynamic_batch_size"
        yield Remark(flag, str(size), f"at most {max(1, fitting)}", why, ways)
    elif size < 16 and fitting >= 32 and facts.num_train >= 32 * parts * 20:
        why = f"memory suffices for about {fitting}, and larger batches are faster and steadier"
        yield Remark(flag, str(size), "16 to 64", why, f"{flag} 32")


def on_loss_weights(config: TrainingConfig, facts: Facts) -> Iterator[Remark]:
    """The weight of one score against the other."""
    share = config.w_q / (config.w_q + config.w_c)
    if {"q", "c"} <= set(facts.tasks) and not 0.3 - 1e-9 <= share <= 0.7 + 1e-9:
        flag, starved = ("--w_q", "quality") if share < 0.3 else ("--w_c", "consistency")
        value = min(config.w_q, config.w_c)
        recommended = "30 % to 70 % of both weights together"
        yield Remark(flag, f"{value:g}", recommended, f"{starved} is starved at less", "--w_q 0.5 --w_c 0.5")


def on_schedule(config: TrainingConfig, facts: Facts) -> Iterator[Remark]:
    """Epochs and warm-up."""
    low, high = 10, 50
    if config.epochs < low:
        yield Remark("--epochs", str(config.epochs), f"{low} to {high}", "fewer seldom suffice", f"--epochs {low}")
    elif config.epochs > high and not config.early_stopping_patience:
        why = "the best epoch seldom comes later"
        change = f"--epochs {high} or --early_stopping_patience 5"
        yield Remark("--epochs", str(config.epochs), f"{low} to {high}", why, change)
    ratio, steps = config.warmup_ratio, round(config.warmup_ratio * facts.num_steps)
    if ratio > 0.1 + 1e-9:
        why = "what is spent on warming up is missed at full rate"
        yield Remark("--warmup_ratio", f"{ratio:g}", "0.01 to 0.1", why, "--warmup_ratio 0.1")
    elif not config.freeze_clip and steps < MIN_WARMUP_STEPS < 0.1 * facts.num_steps:
        why = f"the first steps can undo what CLIP knows, and {steps} of {facts.num_steps} are warm-up"
        low_ratio = max(0.05, MIN_WARMUP_STEPS / facts.num_steps)
        yield Remark("--warmup_ratio", f"{ratio:g}", f"{low_ratio:.2g} to 0.1", why, "--warmup_ratio 0.1")


def on_validation(config: TrainingConfig, facts: Facts) -> Iterator[Remark]:
    """Whether enough images are held out to choose the epoch by."""
    if facts.num_val >= MIN_VAL:
        return
    why = f"the best epoch is chosen by {facts.num_val} image(s), which is mostly chance"
    # Of the images without the test fold, and rounded up to 0.05: some room, because whole prompts are drawn.
    needed = math.ceil(20 * MIN_VAL / max(1, facts.num_train + facts.num_val)) / 20
    can = facts.draws_val and needed <= 0.3 and needed + config.test_size <= 0.6
    change = f"--val_size {needed:g}" if can else "more images for validation"
    yield Remark("--val_size", f"{config.val_size:g}", f"{MIN_VAL} images or more", why, change)


def on_ranges(config: TrainingConfig) -> Iterator[Remark]:
    """Options whose usual range depends on nothing else."""
    for name, (low, high, why) in USUAL.items():
        value = getattr(config, name)
        unused = (name == "w_exp" and not config.use_explanations) or (name == "test_size" and config.kfold)
        if not unused and not low <= value <= high:
            best = min(max(value, low), high)
            yield Remark(f"--{name}", f"{value:g}", f"{low:g} to {high:g}", why, f"--{name} {best:g}")
