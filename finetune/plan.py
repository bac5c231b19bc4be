"""What a run is about to do, in words: plan, advice, and the facts that both go by."""

from __future__ import annotations

import models
from backbones import towers
from configs import TrainingConfig
from evaluation import agreement
from finetune import initial_model
from finetune.experiment import Experiment
from finetune.frozen_clip import caches_nothing
from guidance import advice
from sources.describe import elongated_images
from sources.examples import FOLDS, Examples, leakage_notes, skipped_note
from sources.scores import title_of
from sources.splits import suitable_unit


def gather_facts(experiment: Experiment) -> advice.Facts:
    """What advice and diagnosis go by."""
    config, examples, runtime = experiment.config, experiment.examples, experiment.runtime
    clip = experiment.model.clip
    on_gpu = runtime.device.type != "cpu"
    return advice.Facts(
        num_train=len(examples.rows("train")),
        num_val=len(examples.rows("val")),
        num_blocks=towers.depth_of(clip.visual) or None,
        num_parameters=sum(parameter.numel() for parameter in clip.parameters()),
        tasks=tuple(examples.scales),
        num_steps=experiment.num_steps,
        free_memory=runtime.free_memory() * runtime.world if on_gpu else None,
        bytes_per_image=towers.activation_bytes(clip.visual, runtime.compute_dtype) * config.num_views_encoded,
        draws_val="val" not in set(examples.table["split"]),
    )


def check_advice(experiment: Experiment, facts: advice.Facts) -> list[advice.Remark]:
    """Say what is unusual about the settings. Raises ValueError for any of it if --advice is strict."""
    config = experiment.config
    remarks = [] if config.advice == "off" else advice.advise(config, facts)
    for remark in remarks:
        experiment.runtime.say(f"advice    {remark}")
    if remarks and config.advice == "strict":
        raise ValueError(f"--advice strict: {len(remarks)} remark(s), see above; change what they name")
    return remarks


def how_split(config: TrainingConfig, examples: Examples) -> str:
    """Where the folds come from, in words."""
    if config.split_file:
        is_drawn = (examples.table["split"] == "").any()
        return f"by {config.split_by}, kept in {config.split_file}" if is_drawn else f"as in {config.split_file}"
    ways = []
    for title in examples.sets:
        table = examples.only(title).table
        drawn = "by " + suitable_unit(title, table, config.split_by)
        ways.append("as the data set says" if (table["split"] != "").any() else drawn)
    part = f", part {config.fold} of {config.kfold}" if config.kfold else ""
    return ", ".join(ways if len(set(ways)) > 1 else ways[:1]) + part


def plan(experiment: Experiment) -> str:
    """What is about to be trained, in a few lines."""
    config, examples, model = experiment.config, experiment.examples, experiment.model
    table = examples.table
    scores = ", ".join(
        f"{title_of(task)} {table[task].min():g}..{table[task].max():g} ({table[task].notna().sum()})"
        for task in examples.scales
    )
    counts = models.count_parameters(model)
    parts = ", ".join(
        f"{name} {trained / 1e6:.2f}M of {(trained + frozen) / 1e6:.2f}M" for name, (trained, frozen) in counts.items()
    )
    sizes = ", ".join(f"{fold} {len(examples.rows(fold))}" for fold in FOLDS)
    num_prompts = table["prompt"][table["prompt"] != ""].nunique()
    origin = initial_model.origin(config)
    lines = [
        ("data", f"{', '.join(examples.sets)}: {len(table)} images, {num_prompts} prompts; {scores}"),
        ("split", f"{sizes} ({how_split(config, examples)})"),
        (
            "backbone",
            f"{origin}, {experiment.backbone.image_size} px, {experiment.backbone.activation}, {config.freezing}",
        ),
        ("trained", parts),
        (
            "schedule",
            f"{config.epochs} epochs, {experiment.num_steps} steps of "
            f"{config.batch_size * config.gradient_accumulation_steps}, "
            f"lr {config.lr:g} {config.scheduler}, loss {config.loss}, seed {config.seed}",
        ),
        ("images", experiment.feed.pixels.store.describe()),
        ("machine", experiment.runtime.describe()),
    ]
    if config.preset:
        lines.insert(0, ("preset", f"{config.preset}; --preset list shows what that is"))
    lines += [("note", note) for note in notes(experiment)]
    return "\n".join(f"{title:<10}{text}" for title, text in lines)


def notes(experiment: Experiment) -> list[str]:
    """What is to be known of data and options before training."""
    config, examples, model = experiment.config, experiment.examples, experiment.model
    folds = dict.fromkeys(config.folds_read)
    found = [
        *examples.notes,
        *leakage_notes(examples),
        *agreement.constant_notes(folds, examples),
        *experiment.backbone.notes,
    ]
    if len(examples.skipped):
        found.insert(0, f"--bad_images skip: {skipped_note(examples)}")
    if experiment.num_truncated:
        found.append(f"{experiment.num_truncated} text(s) exceed CLIP's context length and were cut")
    if config.freeze_layers != TrainingConfig.freeze_layers:
        if config.unfreeze_schedule:
            found.append("--freeze_layers does nothing beside --unfreeze_schedule")
        elif not config.partial_freeze:
            found.append("--freeze_layers does nothing without --partial_freeze")
    if config.cache_views is not None and caches_nothing(config, model):
        found.append("--cache_views does nothing here: no layers in front are frozen and cached")
    if config.crops and config.num_views == 0 and not caches_nothing(config, model):
        found.append("heads train on the --test_crops here: --crops counts with --cache_views 1 and more")
    shortest = experiment.backbone.config["preprocess_cfg"].get("resize_mode", "shortest") == "shortest"
    if not config.crops and shortest and (said := elongated_images(examples.files)):
        found.append(said)
    small = sum(min(file.size) < experiment.backbone.image_size for file in examples.files)
    if config.crops and small:
        found.append(f"--crops: {small} images are smaller than --image_size and will be enlarged")
    if config.stages[-1][1] >= config.epochs:
        found.append(f"--unfreeze_schedule: epoch {config.stages[-1][1]} is never reached in {config.epochs} epochs")
    return found
