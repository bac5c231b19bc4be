"""Settings by name: what --demo and --preset stand for, and how they give way to other options."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from cli.parser import flag_words
from configs import NOT_SAVED, OPTIONS, TrainingConfig

# How the embedded CLIP learns best, measured in docs/experiments.md.
LITE = {
    "clip_model": "lite",
    "clip_pretrained": "assets",
    "partial_freeze": True,
    "freeze_layers": 4,
    "epochs": 4,
    "lr": 1e-3,
    "task_gradients": "stop_c",
}

# What --demo stands for: a small, fast run that shows the whole program. Explicit flags win.
DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "real": {**LITE, "freeze_layers": 5, "val_size": 0.2, "epochs": 6, "warmup_ratio": 0.1},
    "drawn": {
        "clip_model": "tiny",
        "clip_pretrained": "assets",
        "partial_freeze": True,
        "freeze_layers": 18,
        "epochs": 8,
        "lr": 3e-4,
        "mos_range_q": (1.0, 5.0),
        "mos_range_c": (1.0, 5.0),
    },
}

# What --preset stands for. Each says how CLIP is frozen; `freeze_layers` is of 24 blocks and follows the model's depth,
# but for `lite`, which names its model.
PRESET_DEPTH = 24
PRESETS: dict[str, dict[str, Any]] = {
    "lite": LITE,
    "small": {
        "freeze_clip": True,
        "residual_scale_q": 0.1,
        "residual_scale_c": 0.1,
        "epochs": 30,
        "batch_size": 16,
        "lr": 1e-3,
        "w_q": 0.5,
        "w_c": 0.5,
    },
    "medium": {
        "partial_freeze": True,
        "freeze_layers": 18,
        "residual_scale_q": 0.2,
        "residual_scale_c": 0.2,
        "epochs": 20,
        "batch_size": 32,
        "lr": 3e-5,
        "w_q": 0.5,
        "w_c": 0.5,
    },
    "large": {
        "residual_scale_q": 0.3,
        "residual_scale_c": 0.3,
        "epochs": 15,
        "batch_size": 64,
        "lr": 3e-5,
        "w_q": 0.5,
        "w_c": 0.5,
    },
    "fast": {"freeze_clip": True, "epochs": 10, "batch_size": 64, "lr": 1e-3},
    "max": {
        "partial_freeze": True,
        "freeze_layers": 20,
        "residual_scale_q": 0.25,
        "residual_scale_c": 0.25,
        "epochs": 50,
        "batch_size": 16,
        "lr": 2e-5,
        "w_q": 0.4,
        "w_c": 0.6,
    },
    "quality": {
        "partial_freeze": True,
        "freeze_layers": 18,
        "w_q": 0.7,
        "w_c": 0.3,
        "residual_scale_q": 0.3,
        "residual_scale_c": 0.15,
    },
    "consistency": {
        "partial_freeze": True,
        "freeze_layers": 18,
        "w_q": 0.3,
        "w_c": 0.7,
        "residual_scale_q": 0.15,
        "residual_scale_c": 0.3,
    },
}
PRESETS["balanced"] = PRESETS["medium"]
PRESET_PURPOSES = {
    "lite": "the embedded CLIP: nothing to download, minutes on a CPU",
    "small": "below 1,000 training images",
    "medium": "1,000 to 5,000 training images",
    "large": "more than 5,000 training images",
    "fast": "a first check, within minutes",
    "balanced": "the usual compromise, the same as medium",
    "max": "the most that time can buy",
    "quality": "quality matters more",
    "consistency": "consistency with the prompt matters more",
}
# The options that say how CLIP is frozen.
FREEZING = ("freeze_clip", "partial_freeze", "freeze_layers", "unfreeze_schedule", "lora_rank")


def preset_table() -> str:
    """What each preset stands for, as a table of text."""
    width = max(map(len, PRESET_PURPOSES)) + 2
    lines: list[str] = []
    for name, purpose in PRESET_PURPOSES.items():
        lines += [f"{name:<{width}}{purpose}", f"{'':<{width}}{' '.join(flag_words(PRESETS[name], OPTIONS, {}))}"]
    depth = f"Below lite, --freeze_layers is of {PRESET_DEPTH} blocks, and fewer for a CLIP that has fewer"
    return "\n".join([*lines, f"{depth}. All else is the default; flags override."])


def preset_by_size(num_images: int) -> str:
    """The preset for so many training images."""
    return "small" if num_images < 1000 else "medium" if num_images <= 5000 else "large"


def without_overridden(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of the options `below`: who says above how to freeze CLIP says all of it."""
    dropped: tuple[str, ...] = ()
    if above.get("freeze_clip"):
        dropped = FREEZING
    elif any(above.get(name) for name in ("partial_freeze", "unfreeze_schedule", "lora_rank")):
        dropped = ("freeze_clip",)
    elif above.get("partial_freeze") is False:
        dropped = ("freeze_layers",)
    if any(name in above for name in ("partial_freeze", "freeze_layers", "lora_rank")):
        dropped += ("unfreeze_schedule",)
    return {key: value for key, value in below.items() if key not in dropped}


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Options of both; where both have one, or both speak of freezing, those of `above`."""
    return {**without_overridden(below, above), **above}


def with_preset(
    below: Mapping[str, Any],
    above: Mapping[str, Any],
    name: str | None,
    num_images: Callable[[TrainingConfig], int] | None,
    num_blocks: Callable[[TrainingConfig], int | None] | None,
) -> dict[str, Any]:
    """`below` with what the preset stands for, given the options `above` it. Raises ValueError; see `parse_args`."""
    if name is None:
        return dict(below)
    below = {key: value for key, value in below.items() if key not in FREEZING}
    plain = TrainingConfig(**overlay(below, above))
    if name == "auto" and num_images:
        name = preset_by_size(num_images(plain))
    replace(plain, preset=name)  # says what is wrong with the name
    settings = {**PRESETS.get(name, {}), "preset": name}
    follows = "freeze_layers" in settings and "clip_model" not in settings and "freeze_layers" not in above
    depth = num_blocks(plain) if num_blocks and follows else None
    if depth:
        settings["freeze_layers"] = round(settings["freeze_layers"] * depth / PRESET_DEPTH)
    return {**below, **settings}


def command_line(config: TrainingConfig, **changes: Any) -> str:
    """The shell command that runs `config` with `changes`, but for what belongs to one place (NOT_SAVED).

    No flag says None where the demo has a value, and `parse_args` never yields that.
    """
    values = asdict(replace(config, preset=None, **changes))
    base: dict[str, Any] = {"demo": None}
    if config.demo:  # which has its own data
        settings = DEMO_SETTINGS[config.demo]
        said = {name: values[name] for name in FREEZING if values[name] != settings.get(name, OPTIONS[name].default)}
        base |= {name: values[name] for name in ("data_csv_path", "image_base_dir")} | without_overridden(
            settings, said
        )
    values = {name: value for name, value in values.items() if name not in NOT_SAVED}
    return " ".join(["python baseline.py", *map(shlex.quote, flag_words(values, OPTIONS, base))])
