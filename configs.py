"""Every option of the trainer: one dataclass field each, from which flags, help, checks and JSON follow.

No torch here: `python baseline.py --help` and every usage error answer at once.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cli.options import Config, option, options_of, split_list

LOSS_NAMES = ("mse", "l1", "huber", "plcc", "fidelity")

# As sources/labels.py reads them.
DATASET_NAMES = (
    *("agiqa-3k", "agiqa-1k", "aigciqa2023", "aigiqa-20k", "pku-aigiqa-4k", "evalmuse-40k"),
    *("koniq-10k", "kadid-10k", "tid2013", "spaq", "live-challenge"),
)

# As guidance/presets.py spells them out.
PRESET_NAMES = ("lite", "small", "medium", "large", "fast", "balanced", "max", "quality", "consistency")

GROUPS = {
    "data": "what to train on, and how it is split",
    "backbone": "which CLIP, and how much of it is trained",
    "heads": "the residual heads on top of CLIP",
    "loss": "what is minimised",
    "optimisation": "how it is minimised, and which epoch is kept",
    "speed": "how fast, and with how much memory; results change by rounding, and with the number of cached views",
    "meta": "about the run itself",
}

# Of the options in the group data, those that say how an image is looked at.
VIEWS = ("image_size", "crop_scale_min", "crops", "test_crops", "global_view", "horizontal_flip")

# Columns of the data that mean something else already.
NOT_EXTRA = (
    *("name", "path", "prompt", "explanation", "q", "c", "q_std", "c_std", "split", "reference", "row", "group", "set"),
    *("quality", "align", "mos_quality", "mos_align", "images", "generator", "cluster"),  # of tables
    *("fit_q", "fit_c", "rationale", "image", "cos", "exp"),  # of results and losses
)

# Facts about a place, not about an experiment: a saved config does not carry them into the next run.
NOT_SAVED = ("config", "output_dir", "overwrite", "resume", "dry_run")

# Options that only decide where and how fast something is computed, or what is said and kept of it.
FREE = (
    *("num_workers", "image_memory_gb", "compile", "gradient_checkpointing", "cache_dir", "device"),
    *("preset", "advice", "report", "tensorboard", "tracker", "save_every_minutes", "keep_states"),
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """All options of one training run. Construction checks every value and raises ValueError naming the flag."""

    # data
    dataset: str = option(
        "csv",
        "data",
        f"'csv', or data sets as downloaded: {', '.join(DATASET_NAMES)}; several as in agiqa-3k,koniq-10k are "
        "trained on together, in the units of the first",
        metavar="NAME[,NAME]",
    )
    data_root: str | None = option(None, "data", "folder of each --dataset that is not csv", metavar="DIR[,DIR]")
    extra_scores: str | None = option(
        None, "data", "further scores to predict from the image, by column: authenticity", metavar="NAME[,NAME]"
    )
    data_csv_path: str = option("data/data.csv", "data", "table of image names, prompts and scores (UTF-8 CSV)")
    image_base_dir: str = option("data/images", "data", "folder that the image names are relative to")
    image_size: int | None = option(
        None,
        "data",
        "pixels per side that CLIP sees (default: what it was trained at)",
        within="[16, 4096]",
        recommended="224-336",
    )
    crop_scale_min: float = option(
        0.8, "data", "RandomResizedCrop keeps at least this share of the area", within="(0, 1]", recommended="0.6-1.0"
    )
    crops: int = option(
        0,
        "data",
        "random crops of native size per image and step, in place of the resized view; 0 = off",
        within="[0, 64]",
        recommended="4, 6 or 8",
    )
    test_crops: int | None = option(
        None,
        "data",
        "crops of native size, on a grid, when scores are read (default: --crops)",
        within="[1, 256]",
        recommended="4, 9 or 15",
    )
    global_view: bool = option(
        False, "data", "with --crops: also look at the resized view, which consistency is then judged by"
    )
    horizontal_flip: bool = option(True, "data", "never mirror training images: for prompts that say left or right")
    test_size: float = option(
        0.2,
        "data",
        "share of prompts (or images) for the test fold, where there is no --kfold",
        within="(0, 1)",
        recommended="0.1-0.3",
    )
    val_size: float = option(
        0.1, "data", "share of prompts (or images) for validation", within="(0, 1)", recommended="0.1-0.2"
    )
    split_by: str = option(
        "prompt",
        "data",
        "what must not be shared between folds (group: the reference image); a CSV column 'split' wins",
        choices=("prompt", "group", "image"),
    )
    split_file: str | None = option(
        None, "data", "CSV of name and split: read if it is there, else written", metavar="FILE"
    )
    kfold: int = option(0, "data", "test on each of so many parts in turn, a run for each; 0 = off", within="[0, 1000]")
    fold: int | None = option(None, "data", "run only this part of --kfold, from 1", within="[1, 1000]")
    repeats: int = option(
        1,
        "data",
        "run so often, with seeds --seed, --seed + 1, ..., each with its split unless folds are fixed",
        within="[1, 1000]",
    )
    bad_images: str = option(
        "error",
        "data",
        "images that cannot be read: refuse to train, or leave them out and list them in skipped.csv",
        choices=("error", "skip"),
    )
    duplicates: str = option(
        "error",
        "data",
        "CSV rows of the same image: refuse them, or take their mean scores (rows of several raters)",
        choices=("error", "mean"),
    )
    follow_links: bool = option(
        False, "data", "also read images through links that leave the image folder, as data stores make them"
    )
    strict_splits: bool = option(
        False, "data", "refuse to run if folds share a prompt, a reference image or the content of an image"
    )
    seed: int = option(42, "data", "seed of splits, weights, augmentation and order", within="[0, 4294967295]")
    mos_range_q: tuple[float, float] | None = option(
        None,
        "data",
        "lowest and highest possible quality score (default: those of the training fold)",
        metavar=("LO", "HI"),
    )
    mos_range_c: tuple[float, float] | None = option(None, "data", "the same for consistency", metavar=("LO", "HI"))
    name_column: str = option("name", "data", "CSV column of image file names", metavar="COLUMN")
    prompt_column: str = option("prompt", "data", "CSV column of prompts", metavar="COLUMN")
    quality_column: str = option("mos_quality", "data", "CSV column of quality scores", metavar="COLUMN")
    consistency_column: str = option("mos_align", "data", "CSV column of consistency scores", metavar="COLUMN")
    explanation_column: str = option("explanation", "data", "CSV column of rationale texts", metavar="COLUMN")
    quality_std_column: str = option(
        "std_quality", "data", "CSV column: standard deviation of the opinions on quality", metavar="COLUMN"
    )
    consistency_std_column: str = option("std_align", "data", "the same for consistency", metavar="COLUMN")
    group_column: str | None = option(
        None, "data", "CSV column naming the generator (default: file name up to its last underscore)", metavar="COLUMN"
    )

    # backbone
    clip_model: str = option(
        "ViT-L-14", "backbone", "an open_clip name, a file of OpenAI's, local-dir:PATH, hf-hub:ORG/NAME, or lite, tiny"
    )
    clip_pretrained: str = option(
        "openai", "backbone", "pretrained tag, a weights file, 'none' (random), or 'assets' (for lite and tiny)"
    )
    freeze_clip: bool = option(False, "backbone", "train the heads only (best below 500-1,000 images)")
    partial_freeze: bool = option(
        False, "backbone", "freeze embeddings and the first --freeze_layers blocks (best at 1K-5K images)"
    )
    freeze_layers: int = option(
        8,
        "backbone",
        "blocks frozen under --partial_freeze",
        within="[0, 256]",
        recommended="8-10 of 12 (ViT-B), 18-20 of 24 (ViT-L/14), 20-22 (ViT-L/14@336)",
    )

    unfreeze_schedule: str | None = option(
        None,
        "backbone",
        "thaw step by step, as in 22@0,20@10,18@20: layers frozen @ epochs done; implies --partial_freeze",
        metavar="PLAN",
    )
    lora_rank: int = option(
        0,
        "backbone",
        "train low-rank corrections of this rank instead of CLIP's weights; 0 = off",
        within="[0, 1024]",
        recommended="4-16",
    )
    init_from: str | None = option(
        None, "backbone", "second stage: start from another run, its CLIP instead of --clip_model", metavar="RUN"
    )

    # heads
    use_residual_learning: bool = option(True, "heads", "plain sigmoid heads instead of base + bounded delta")
    calibration: bool = option(
        True, "heads", "start from (cos+1)/2 and a random quality base instead of fitting both to frozen CLIP"
    )
    stage_features: str = option(
        "auto",
        "heads",
        "whether base terms and heads also read mean and deviation of what leaves the image tower's stages, where "
        "quality shows best; auto: of every tower that can be taken apart",
        choices=("auto", "on", "off"),
    )
    base: str = option(
        "auto",
        "heads",
        "what scores start from: kernel ridge regression on stage statistics; probe: ridge regression on these, "
        "embeddings and, if that is better in cross-validation, prompts; cosine: as probe, but consistency from the "
        "cosine; auto: kernel with --freeze_clip, else probe",
        choices=("auto", "kernel", "probe", "cosine"),
    )
    residual_scale_q: float = option(
        0.2,
        "heads",
        "largest change the head makes to quality (labels span 0..1)",
        within="[0, 1]",
        recommended="0.1 (<1K images), 0.2 (1K-5K), 0.3-0.5 (more)",
    )
    residual_scale_c: float = option(
        0.2, "heads", "the same for consistency", within="[0, 1]", recommended="as residual_scale_q"
    )
    hidden_dim_q: int = option(
        128, "heads", "hidden width of the quality head", within="[1, 65536]", recommended="64-512"
    )
    hidden_dim_c: int = option(
        256, "heads", "hidden width of the consistency head", within="[1, 65536]", recommended="64-512"
    )
    dropout: float = option(0.1, "heads", "dropout in the heads", within="[0, 1)", recommended="0.0-0.3")
    prompt_levels: bool = option(
        False,
        "heads",
        "start from which of five texts CLIP finds nearest ('a photo of bad ... perfect quality', '... that badly ... "
        "perfectly matches PROMPT') instead of ridge probe and cosine",
    )
    use_refinement: bool = option(
        False,
        "heads",
        "correct the coarse consistency score with a small transformer (older design; needs --no_residual_learning)",
    )
    refinement_layers: int = option(4, "heads", "its layers", within="[1, 64]")
    refinement_heads: int = option(8, "heads", "its attention heads", within="[1, 256]")
    refinement_dim: int = option(256, "heads", "its width, a multiple of --refinement_heads", within="[1, 65536]")

    # loss
    w_q: float = option(0.5, "loss", "weight of the quality loss", within="[0, 1000]", recommended="0.3-0.7")
    w_c: float = option(0.5, "loss", "weight of the consistency loss", within="[0, 1000]", recommended="0.3-0.7")
    w_extra: float = option(
        0.5, "loss", "weight of the loss of each of --extra_scores", within="[0, 1000]", recommended="0.1-0.5"
    )
    task_gradients: str = option(
        "shared",
        "loss",
        "whether one score's gradient stops at its head and leaves CLIP to the others: for scores that conflict",
        choices=("shared", "stop_q", "stop_c"),
    )
    w_exp: float = option(0.1, "loss", "weight of the explanation loss", within="[0, 1000]", recommended="0.05-0.3")
    use_explanations: bool = option(False, "loss", "also predict the rationale's text embedding where there is one")
    label_smoothing: float = option(
        0.0, "loss", "share by which targets are pulled toward their mean", within="[0, 1)", recommended="0.0-0.1"
    )
    loss: str = option(
        "mse+plcc",
        "loss",
        f"of {', '.join(LOSS_NAMES)}; several as in mse+0.5*plcc",
        metavar="EXPR",
    )

    # optimisation
    epochs: int = option(20, "optimisation", "passes over the training fold", within="[1, 100000]", recommended="10-50")
    batch_size: int = option(32, "optimisation", "images per step", within="[1, 65536]", recommended="8-128")
    lr: float = option(
        3e-5,
        "optimisation",
        "peak learning rate",
        within="(0, 10]",
        recommended="1e-3 frozen, 3e-5..1e-4 partly frozen, 1e-5..3e-5 full",
    )
    head_lr: float | None = option(
        None,
        "optimisation",
        "peak learning rate of the heads (default: --lr)",
        within="(0, 10]",
        recommended="1e-3..5e-3",
    )
    layer_decay: float = option(
        1.0,
        "optimisation",
        "each CLIP block learns at this share of the rate of the block above it",
        within="(0, 1]",
        recommended="0.65-1.0",
    )
    weight_decay: float = option(
        1e-4, "optimisation", "AdamW decay, none on biases and norms", within="[0, 10]", recommended="1e-5..1e-3"
    )
    warmup_ratio: float = option(
        0.05,
        "optimisation",
        "share of the steps with rising learning rate",
        within="[0, 1)",
        recommended="0.1 small data, 0.05 large, 0.01 frozen",
    )
    scheduler: str = option(
        "cosine",
        "optimisation",
        "learning rate after warm-up",
        choices=("cosine", "linear", "step", "constant", "cyclic"),
    )
    max_grad_norm: float = option(
        1.0, "optimisation", "clip the gradient norm here; 0 = off", within="[0, 1e9]", recommended="0.5-1.0, or 0"
    )
    gradient_accumulation_steps: int = option(
        1, "optimisation", "batches per optimiser step", within="[1, 65536]", recommended="1-8"
    )
    early_stopping_patience: int = option(
        0, "optimisation", "stop after this many epochs without gain; 0 = off", within="[0, 100000]", recommended="5"
    )
    early_stopping_min_delta: float = option(
        0.001, "optimisation", "smallest rise that counts as gain", within="[0, 1]"
    )
    amp: str = option(
        "auto",
        "optimisation",
        "mixed precision; auto: bf16 or fp16 on a GPU, on a CPU bf16 for a large CLIP where that is fast",
        choices=("auto", "bf16", "fp16", "off"),
    )
    select_by: str = option(
        "main",
        "optimisation",
        "validation score that picks the epoch; main = mean of SROCC and PLCC over both tasks",
        choices=("main", "srocc_q", "srocc_c"),
    )
    ema_decay: float = option(
        0.0, "optimisation", "average the weights with this decay; 0 = off", within="[0, 1)", recommended="0.99-0.9999"
    )

    # speed
    cache: bool = option(True, "speed", "compute the frozen layers in front anew in every epoch, cache nothing of them")
    cache_views: int | None = option(
        None,
        "speed",
        "augmented views of each training image that are cached, and cycled through; 0 = the evaluation view "
        "(default: 0 with --freeze_clip, else 2)",
        within="[0, 10000]",
        recommended="0-8",
    )
    cache_dtype: str = option(
        "auto",
        "speed",
        "of cached activations (embeddings stay float32); auto: what the frozen layers compute in",
        choices=("auto", "float32", "bf16", "fp16"),
    )
    cache_max_gb: float = option(
        20.0,
        "speed",
        "largest size of the feature cache in --cache_dir, and of decoded images there; what does not fit is not kept",
        within="[0, 1e9]",
    )
    image_memory_gb: float = option(
        4.0,
        "speed",
        "decoded images up to this size stay in memory, up to --cache_max_gb in a file, beyond they are decoded anew",
        within="[0, 1e9]",
    )
    num_workers: int | None = option(
        None, "speed", "threads that decode images (default: one per core, at most 16)", within="[0, 256]"
    )
    compile: str = option(
        "auto",
        "speed",
        "compile CLIP's blocks; auto: on a GPU, for runs of more than 200,000 images",
        choices=("auto", "on", "off"),
    )
    gradient_checkpointing: bool = option(
        False, "speed", "recompute activations in the backward pass: less memory, about a third slower"
    )
    dynamic_batch_size: bool = option(
        False, "speed", "when GPU memory runs out, put smaller parts of a batch through; the step stays as large"
    )
    deterministic: bool = option(
        False,
        "speed",
        "only kernels that give the same result every time: on a GPU slower, on a CPU the default anyway",
    )
    max_memory_usage: float = option(
        0.9, "speed", "share of GPU memory that --dynamic_batch_size plans for at the start", within="(0, 1]"
    )

    # meta
    preset: str | None = option(
        None,
        "meta",
        "settings by name, which flags override: lite (the embedded CLIP), small, medium, large (by the number of "
        "training images; auto counts them), fast, balanced, max, quality, consistency; 'list' shows each",
        metavar="NAME",
    )
    output_dir: str | None = option(None, "meta", "run folder (default: runs/<time>-<short name>)", metavar="DIR")
    overwrite: bool = option(False, "meta", "replace the finished run in --output_dir")
    resume: str | None = option(
        None,
        "meta",
        "go on with this interrupted run; auto: with the one in --output_dir, or start it if there is none",
        metavar="RUN|auto",
    )
    save_every_minutes: float = option(
        10.0,
        "meta",
        "how often what --resume needs is saved while training; 0 = only when a signal ends the run",
        within="[0, 1e6]",
    )
    keep_states: int = option(
        2, "meta", "so many of these are kept, the newest, until the run is finished", within="[1, 1000]"
    )
    cache_dir: str = option(
        ".cache", "meta", "folder for what is computed once: features, decoded images, the demo set", metavar="DIR"
    )
    config: str | None = option(None, "meta", "start from a saved config.json; flags override it", metavar="FILE")
    demo: str | None = option(
        None,
        "meta",
        "train on a small set that is here: real images with people's scores (so too without a word), or drawn ones; "
        "works without data or network",
        choices=("real", "drawn"),
        alone="real",
    )
    dry_run: bool = option(False, "meta", "build everything, print the plan, train nothing")
    test: bool = option(True, "meta", "leave the test fold unread: while settings are still being compared")
    advice: str = option(
        "print",
        "meta",
        "before training, compare the settings with what usually works; strict: refuse to train on any remark",
        choices=("print", "strict", "off"),
    )
    report: bool = option(True, "meta", "write no report.html and no figures")
    tensorboard: bool = option(False, "meta", "also write the scalars of every epoch to RUN/tensorboard")
    tracker: str | None = option(
        None, "meta", "also send settings and scalars to this tracker, if it is installed", choices=("wandb", "mlflow")
    )
    device: str = option("auto", "meta", "where to compute", choices=("auto", "cpu", "cuda"))

    def check_together(self) -> None:
        """Rules between options. Raises ValueError."""
        check_together(self)

    @cached_property
    def loss_terms(self) -> tuple[tuple[float, str], ...]:
        """`loss` as (weight, name) pairs."""
        return parse_loss(self.loss)

    @property
    def num_test_crops(self) -> int:
        """Crops of native size when scores are read."""
        return self.test_crops or self.crops

    @property
    def num_views_encoded(self) -> int:
        """Views of each image that go through the image tower at once, at most."""
        return max(1, self.crops + self.global_view, self.num_test_crops + self.global_view)

    @property
    def evaluation_batch_size(self) -> int:
        """Images at once where no activations are kept: more than in training, but not too many for the memory."""
        return max(1, min(2 * self.batch_size, 128) // self.num_views_encoded)

    @property
    def folds_read(self) -> list[str]:
        """The folds that scores are measured on."""
        return ["val", "test"] if self.test else ["val"]

    @property
    def is_protocol(self) -> bool:
        """Whether several runs are asked for."""
        return self.repeats > 1 or (self.kfold > 0 and self.fold is None)

    @property
    def dataset_names(self) -> list[str]:
        """The data sets to train on."""
        return split_list(self.dataset)

    @property
    def data_roots(self) -> list[str]:
        """The folders of those that are not a CSV, in their order."""
        return split_list(self.data_root)

    @property
    def extra_score_names(self) -> list[str]:
        """Scores beside quality and consistency."""
        return split_list(self.extra_scores)

    @property
    def stages(self) -> tuple[tuple[int | None, int], ...]:
        """What is frozen from which epoch on: (number of layers or None, epochs done) pairs, the first at 0."""
        if self.unfreeze_schedule:
            return parse_unfreeze_schedule(self.unfreeze_schedule)
        return ((self.freeze_layers if self.partial_freeze else None, 0),)

    @property
    def num_views(self) -> int:
        """Cached training views of each image: as asked for, or as measured to suit the freezing mode."""
        if self.cache_views is not None:
            return self.cache_views
        return CACHED_VIEWS["frozen" if self.freeze_clip else "partial"]

    @property
    def freezing(self) -> str:
        """Short name of the freezing mode: "frozen", "partial8" or "full", with "-lora4" behind it for LoRA."""
        layers = self.stages[0][0]
        mode = "frozen" if self.freeze_clip else "full" if layers is None else f"partial{layers}"
        return mode + (f"-lora{self.lora_rank}" if self.lora_rank else "")


# Training views that are cached by default, by freezing mode: docs/experiments.md has the measurements.
CACHED_VIEWS = {"frozen": 0, "partial": 2}


def parse_loss(text: str) -> tuple[tuple[float, str], ...]:
    """Read a loss expression: "mse+0.5*plcc" -> ((1.0, "mse"), (0.5, "plcc")). Raises ValueError."""
    terms = []
    # A '+' inside a number such as 1e+2 does not separate terms.
    for term in re.split(r"(?<![\deE][eE])\+", text.replace(" ", "")):
        weight, star, name = term.rpartition("*")
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = math.nan
        if name not in LOSS_NAMES or not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"--loss {text}: {term!r} is not [WEIGHT*]NAME with a positive weight and a name of "
                f"{', '.join(LOSS_NAMES)}"
            )
        terms.append((value, name))
    return tuple(terms)


def parse_unfreeze_schedule(text: str) -> tuple[tuple[int, int], ...]:
    """Read a plan of layers@epoch: "22@0,20@10" -> ((22, 0), (20, 10)). Raises ValueError."""
    parts = [re.fullmatch(r"(\d+)@(\d+)", part.strip()) for part in text.split(",")]
    stages = tuple((int(part[1]), int(part[2])) for part in parts if part)
    layers, epochs = zip(*stages, strict=True) if stages else ((), ())
    if (
        not all(parts)
        or epochs[0] != 0
        or list(epochs) != sorted(set(epochs))
        or list(layers) != sorted(set(layers), reverse=True)
    ):
        raise ValueError(
            f"--unfreeze_schedule {text}: must be LAYERS@EPOCH,... as in 22@0,20@10,18@20, the first at 0, with rising "
            "epochs and falling layers"
        )
    return stages


def check_together(config: TrainingConfig) -> None:
    """Rules between options. Raises ValueError."""
    parse_loss(config.loss)
    if config.preset not in (None, "auto", *PRESET_NAMES):
        near = difflib.get_close_matches(str(config.preset), ("auto", *PRESET_NAMES), n=1)
        names = f"did you mean {near[0]}?" if near else f"must be auto, {', '.join(PRESET_NAMES)} (list shows them)"
        raise ValueError(f"--preset {config.preset}: {names}")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on, --overwrite starts again: drop one")
    if config.resume == "auto" and not config.output_dir:
        raise ValueError("--resume auto: needs --output_dir, where the run is or shall be")
    if config.freeze_clip and config.partial_freeze:
        raise ValueError("--freeze_clip and --partial_freeze exclude each other: choose one")
    check_data(config)
    if config.unfreeze_schedule:
        parse_unfreeze_schedule(config.unfreeze_schedule)
        if config.freeze_clip or config.lora_rank:
            raise ValueError("--unfreeze_schedule thaws CLIP's own weights: drop it, or --freeze_clip and --lora_rank")
    if config.freeze_clip and config.lora_rank:
        raise ValueError("--lora_rank trains CLIP's blocks, --freeze_clip does not: drop one")
    if config.compile == "on" and config.lora_rank:
        raise ValueError("--compile on: LoRA makes every block a kind of its own to compile; drop it, or --lora_rank")
    if not config.crops and (config.test_crops or config.global_view):
        raise ValueError(f"--{'test_crops' if config.test_crops else 'global_view'}: needs --crops")
    if config.prompt_levels and not config.use_residual_learning:
        raise ValueError("--prompt_levels is a base term of residual learning: drop it, or --no_residual_learning")
    if config.use_refinement and config.use_residual_learning:
        raise ValueError("--use_refinement is the older design and needs --no_residual_learning")
    if config.refinement_dim % config.refinement_heads:
        raise ValueError(
            f"--refinement_dim {config.refinement_dim}: must be a multiple of --refinement_heads "
            f"{config.refinement_heads}"
        )
    if config.w_q + config.w_c == 0:
        raise ValueError("--w_q 0 --w_c 0: at least one of the two must be above 0")
    if config.test_size + config.val_size >= 1:
        raise ValueError(
            f"--test_size {config.test_size} --val_size {config.val_size}: must leave a training fold (sum below 1)"
        )
    for flag, pair in (("--mos_range_q", config.mos_range_q), ("--mos_range_c", config.mos_range_c)):
        if pair and pair[0] >= pair[1]:
            raise ValueError(f"{flag} {pair[0]} {pair[1]}: LO must be below HI")


def check_dataset_name(name: str, *known: str) -> None:
    """Raise ValueError unless a data set's name is among the known ones."""
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3)
        said = f"did you mean {' or '.join(near)}?" if near else f"must be of {', '.join(known)}"
        raise ValueError(f"--dataset {name}: {said}")


def check_data(config: TrainingConfig) -> None:
    """Rules between the options that name data and splits. Raises ValueError."""
    named = [name for name in config.dataset_names if name != "csv"]
    if not config.dataset_names:
        raise ValueError("--dataset: names no data set; leave it out for a CSV")
    if (
        len(config.dataset_names) > 1
        and "csv" not in config.dataset_names
        and (config.mos_range_q or config.mos_range_c)
    ):
        raise ValueError("--mos_range_q, --mos_range_c: are the CSV's; known data sets bring their own, drop it")
    if config.split_file and not Path(config.split_file).absolute().parent.is_dir():
        raise ValueError(f"--split_file {config.split_file}: its folder does not exist")
    for name in named:
        check_dataset_name(name, "csv", *DATASET_NAMES)
    if len(set(config.dataset_names)) < len(config.dataset_names):
        raise ValueError(f"--dataset {config.dataset}: names a data set twice")
    if len(config.data_roots) != len(named):
        need = f"needs --data_root with {len(named)} folder(s)" if named else "has no --data_root: drop one of the two"
        raise ValueError(f"--dataset {config.dataset}: {need}")
    # A table of predictions names a score without the "mos_" in front.
    plain = [name.removeprefix("mos_") for name in config.extra_score_names]
    for name in config.extra_score_names:
        if (
            not re.fullmatch(r"[A-Za-z]\w*(?<!_std)", name)
            or name in NOT_EXTRA
            or plain.count(name.removeprefix("mos_")) > 1
        ):
            raise ValueError(f"--extra_scores {config.extra_scores}: {name!r} cannot be the name of a further score")
    if config.kfold == 1:
        raise ValueError("--kfold 1: must be 0 (off) or at least 2")
    if config.fold and config.fold > config.kfold:
        raise ValueError(f"--fold {config.fold}: must be at most --kfold, which is {config.kfold}")
    if config.kfold and config.split_file:
        raise ValueError("--kfold draws its own splits: drop it, or --split_file")
    if config.is_protocol and not config.test:
        raise ValueError("--no_test: --repeats and --kfold are for measuring on test folds; drop one of the two")


OPTIONS = options_of(TrainingConfig)
