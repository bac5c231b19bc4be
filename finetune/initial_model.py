"""The model that a run starts from: CLIP with heads on it, frozen as asked."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from backbones import build, freezing, loading, names, towers, weights
from cli.memo import NO_MEMO, DecidedBy, Memo
from configs import TrainingConfig
from evaluation import ridge
from finetune import feed
from sources.examples import Examples, LabelScale
from sources.seen import seen_by
from training import checkpoints

# What decides the CLIP that is loaded.
LOADED_BY = DecidedBy(others=("clip_model", "clip_pretrained", "image_size", "seed"))


def start_model(
    config: TrainingConfig, examples: Examples, memo: Memo
) -> tuple[loading.Backbone, models.ScoreModel, dict[str, Any]]:
    """CLIP with heads, frozen as asked, and the arguments that `models.build_model` builds it again from.

    Raises:
        ValueError: an unknown or unfitting backbone, checkpoint or number of layers.
    """
    if config.init_from:
        backbone, model, arguments = load_first_stage(config, examples)
    else:
        backbone = load_clip(config, memo)
        arguments = model_arguments(config, backbone, examples)
        model = models.build_model(backbone.clip, **arguments)
    if config.lora_rank:
        freezing.add_lora(model.clip, config.lora_rank, num_layers=config.stages[0][0])
    freeze(config, model, examples, config.stages[0][0])
    return backbone, model, arguments


def load_clip(config: TrainingConfig, memo: Memo) -> loading.Backbone:
    """The CLIP that the options name. Raises ValueError."""

    def load() -> tuple[loading.Backbone, Tensor]:
        backbone = loading.load_backbone(config.clip_model, config.clip_pretrained, image_size=config.image_size)
        return backbone, torch.get_rng_state()

    backbone, random_state = memo.value("CLIP", LOADED_BY.values(config), load)
    if memo is NO_MEMO:
        return backbone
    torch.set_rng_state(random_state)  # loading draws from it, and the heads are drawn next
    return replace(backbone, clip=copy.deepcopy(backbone.clip))


def load_first_stage(
    config: TrainingConfig, examples: Examples
) -> tuple[loading.Backbone, models.ScoreModel, dict[str, Any]]:
    """CLIP and heads of an earlier run, as `start_model` returns them.

    Raises:
        ValueError: its heads are not those asked for, or it was trained on images that are now to be tested on.
    """
    models.check_checkpoint(Path(str(config.init_from)))
    folder, state, description = checkpoints.load_weights(Path(str(config.init_from)))
    image_size = config.image_size or description["image_size"]
    backbone = loading.rebuild_backbone(description["clip"], folder, image_size=image_size)
    before = {**models.OLDER, **description["model"]}
    arguments = model_arguments(config, backbone, examples) | {"kernel_images": before["kernel_images"]}
    if config.base == "auto":
        arguments["base"] = before["base"]
    free = {"dropout", "predict_rationale", "task_gradients", "global_view"}  # none changes what the other weights mean
    for name, value in before.items():
        if name not in free and value != arguments[name]:
            raise ValueError(f"--init_from {folder}: has {name} {value}, not {arguments[name]}; use the same flags")
    scales = {task: LabelScale(**scale) for task, scale in description["scales"].items()}
    if scales != examples.scales:
        note = f"scores of --init_from lie on {scales}, those of this data on {examples.scales}"
        backbone = replace(backbone, notes=(*backbone.notes, note))
    seen = seen_by(folder)
    if seen is None:
        note = f"--init_from {folder} does not tell which images it has seen: they may be among those tested on"
        backbone = replace(backbone, notes=(*backbone.notes, note))
    leaked = [row for row in examples.rows("test") if seen and examples.files[row].digest in seen]
    if leaked:
        raise ValueError(
            f"--init_from {folder}: {len(leaked)} images of the test fold were trained or selected on there; "
            "use the same --seed, --test_size, --val_size and --split_by, or its splits.csv as --split_file"
        )
    model = models.build_model(backbone.clip, **arguments)
    clip_state = {key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")}
    weights.load_state(backbone.clip, clip_state, str(folder))
    heads = {key: value for key, value in state.items() if key.startswith(("heads.", "extra.", "stage_"))}
    model.load_state_dict(heads, strict=False)
    return backbone, model, arguments


def model_arguments(config: TrainingConfig, backbone: loading.Backbone, examples: Examples) -> dict[str, Any]:
    """The arguments of `models.build_model`, as JSON values. Raises ValueError for statistics of no stages."""
    stage_width = 0 if config.stage_features == "off" else towers.num_statistics(backbone.clip.visual)
    if config.stage_features == "on" and not stage_width:
        raise ValueError(
            f"--stage_features on: the image tower of {config.clip_model} cannot be taken apart into stages; drop it"
        )
    base = base_of(config, stage_width)
    sizes = {"layers": config.refinement_layers, "heads": config.refinement_heads, "dim": config.refinement_dim}
    return {
        "embed_dim": backbone.embed_dim,
        "residual": config.use_residual_learning,
        "scale_q": config.residual_scale_q,
        "scale_c": config.residual_scale_c,
        "hidden_q": config.hidden_dim_q,
        "hidden_c": config.hidden_dim_c,
        "dropout": config.dropout,
        "refinement": sizes if config.use_refinement else None,
        "predict_rationale": config.use_explanations,
        "extra": config.extra_score_names,
        "prompt_levels": config.prompt_levels,
        "global_view": config.global_view,
        "task_gradients": config.task_gradients,
        "stage_width": stage_width,
        "base": base,
        "kernel_images": min(len(examples.rows("train")), ridge.MAX_IMAGES) if base == "kernel" else 0,
    }


def base_of(config: TrainingConfig, stage_width: int) -> str:
    """What scores start from, --base auto resolved. Raises ValueError where there can be no kernel."""
    obstacles = {
        "reads stage statistics, and there are none; take --base probe": not stage_width,
        "is fitted before training; drop --no_calibration": not config.calibration,
        "is one way to start, --prompt_levels another; drop one": config.prompt_levels,
        "is a base term of residual learning; drop --no_residual_learning": not config.use_residual_learning,
    }
    found = [words for words, is_so in obstacles.items() if is_so]
    if config.base == "kernel" and found:
        raise ValueError(f"--base kernel: {found[0]}")
    if config.base != "auto":
        return config.base
    return "kernel" if config.freeze_clip and not found else "probe"


def freeze(config: TrainingConfig, model: models.ScoreModel, examples: Examples, num_layers: int | None) -> None:
    """Freeze what is not to be trained while `num_layers` are frozen; the text tower where no score uses it.

    Base terms that are fitted before training stay as they are.
    """
    if config.calibration:
        model.freeze_base()
    if not config.lora_rank:
        freezing.freeze_backbone(model.clip, everything=config.freeze_clip, num_layers=num_layers)
    if not feed.uses_texts(config, examples):
        model.clip.text.requires_grad_(False)


def num_blocks(config: TrainingConfig) -> int | None:
    """Blocks of the image tower that the options name, which --freeze_layers counts; None if it has none.

    Raises ValueError.
    """
    if config.init_from:
        clip = dict(checkpoints.load_description(Path(config.init_from))["clip"])
    else:
        clip = names.resolve(config.clip_model, config.clip_pretrained).config
    vision = clip["model_cfg"]["vision_cfg"]
    if "timm_model_name" not in vision:  # a ResNet lists the layers of each of its stages
        layers = vision.get("layers")
        return len(layers) if isinstance(layers, list) else layers
    with torch.device("meta"):
        visual = build.build_clip(copy.deepcopy(clip), image_size=config.image_size or loading.native_size(clip)).visual
    return towers.depth_of(visual) or None


def origin(config: TrainingConfig) -> str:
    """Where the weights come from, in words."""
    own = config.clip_model.partition(":")[1] and config.clip_pretrained != "none"
    return config.init_from or f"{config.clip_model} ({'its own weights' if own else config.clip_pretrained})"
