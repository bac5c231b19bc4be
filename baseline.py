"""Fine-tune CLIP with two residual heads on human scores of AI-generated images.

    python baseline.py --demo                            # works without data or network
    python baseline.py --partial_freeze --freeze_layers 18
    python baseline.py --help

`run(config)` is the whole story: data, model, optimiser, epochs, the test fold once, results.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # --help and mistakes in the flags answer here, before torch is imported, which takes seconds.
    from configs import one_line_errors, parse_args

    with one_line_errors():
        parse_args()

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

import backbones
import calibration
import checkpoint
import data
import demo
import engine
import losses
import metrics
import models
from configs import TrainingConfig, one_line_errors, parse_args

EVAL_LOADERS = ("train_eval", "val", "test")
MOS_COLUMNS = {"q": ("mos_quality", "pred_quality"), "c": ("mos_align", "pred_align")}


def run(config: TrainingConfig) -> dict[str, Any]:
    """Train as configured and return what `results.json` holds (empty under `dry_run`).

    Raises:
        ValueError: data or options that cannot work; nothing has been written then.
        engine.NonFiniteLoss: training broke down.
    """
    started = time.perf_counter()
    folder = Path(config.output_dir) if config.output_dir else new_run_dir(config)
    checkpoint.refuse_occupied(folder, overwrite=config.overwrite)
    runtime = engine.start_runtime(config.device, config.amp)
    engine.seed_everything(config.seed)

    # Data, model, and how one becomes batches for the other.
    config = replace(config, **demo_paths(config)) if config.demo else config
    examples = read_examples(config)
    backbone, model, arguments = start_model(config, examples)
    model.to(runtime.device)
    feed, num_truncated = build_feed(config, examples, backbone, runtime)
    loaders = build_loaders(config, examples, runtime)
    num_steps = engine.num_optimizer_steps(
        len(examples.rows("train")),
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        epochs=config.epochs,
    )
    print(plan(config, examples, backbone, model, runtime, num_steps=num_steps, num_truncated=num_truncated))
    if config.dry_run:
        return {}
    checkpoint.prepare_run_folder(folder)
    write_inputs(folder, config, examples, runtime)

    # What CLIP knows before training: the point to start from, and to be compared with at the end.
    known = {
        fold: engine.predict(model, feed.batches(loaders[fold]), models.embed_batch, runtime=runtime)
        for fold in EVAL_LOADERS
    }
    base = fit_base(known, examples)
    if config.calibration and isinstance(model.heads, models.ResidualHeads) and not config.init_from:
        model.heads.set_base(base.quality, base.consistency)

    optimizer = build_optimizer(config, model)
    schedule = engine.build_schedule(
        optimizer, kind=config.scheduler, num_steps=num_steps, warmup_ratio=config.warmup_ratio
    )
    average = engine.WeightAverage(model, config.ema_decay)
    compute_losses = build_losses(config, examples)
    history: list[dict[str, float]] = []
    selection: list[float] = []
    predictions: dict[str, dict[str, np.ndarray]] = {}

    def predict(scorer: models.ScoreModel, fold: str) -> dict[str, np.ndarray]:
        return engine.predict(scorer, feed.batches(loaders[fold]), models.score_batch, runtime=runtime)

    for epoch in range(1, config.epochs + 1):
        enter_stage(config, model, epoch)
        with Progress(len(examples.rows("train"))) as progress:
            lr = config.lr * optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["initial_lr"]
            trained = engine.train_epoch(
                model,
                feed.batches(loaders["train"]),
                compute_losses,
                optimizer=optimizer,
                schedule=schedule,
                runtime=runtime,
                average=average,
                accumulation=config.gradient_accumulation_steps,
                max_grad_norm=config.max_grad_norm,
                after_step=progress.update,
            )
        scores = predict(average.weights, "val")
        validated = {f"val_{name}": value for name, value in evaluate(scores, "val", examples, config).items()}
        history.append({"epoch": epoch, **trained, **validated, "lr": lr, **progress.timing()})
        selection.append(validated[f"val_{config.select_by}"])
        print(epoch_line(history[-1], config.epochs), flush=True)
        checkpoint.write_csv(folder / "metrics.csv", pd.DataFrame(history))
        if engine.best_epoch(selection) == epoch:
            predictions["val"] = scores
            save_scorer(folder / checkpoint.BEST_DIR, average.weights, backbone, arguments, config, examples)
        if engine.should_stop(
            selection, patience=config.early_stopping_patience, min_delta=config.early_stopping_min_delta
        ):
            print(f"no gain in {config.early_stopping_patience} epochs: stopped early")
            break

    # The test fold's scores are looked at here, once, with the weights that validation has chosen.
    best = models.merge_lora(average.weights)
    best.load_state_dict(checkpoint.load_weights(folder / checkpoint.BEST_DIR)[1])
    predictions |= {fold: predict(best, fold) for fold in ("train_eval", "test")}
    results = {
        "best_epoch": engine.best_epoch(selection),
        "epochs": len(history),
        **{fold: evaluate(predictions[fold], fold, examples, config) for fold in ("val", "test")},
        "base": {fold: agreements(base.scores(known[fold]), fold, examples) for fold in ("val", "test")},
        "floors": floors(examples),
        "seconds": round(time.perf_counter() - started, 3),
    }
    checkpoint.write_csv(folder / "predictions.csv", prediction_table(predictions, examples))
    checkpoint.write_json(folder / checkpoint.RESULTS_FILE, results)
    print(results_table(results, examples))
    print(f"run folder: {folder}")
    return results


def start_model(
    config: TrainingConfig, examples: data.Examples
) -> tuple[backbones.Backbone, models.ScoreModel, dict[str, Any]]:
    """CLIP with heads, frozen as asked, and the arguments that `models.build_model` builds it again from.

    Raises:
        ValueError: an unknown or unfitting backbone, checkpoint or number of layers.
    """
    if config.init_from:
        backbone, model, arguments = load_first_stage(config, examples)
    else:
        backbone = backbones.load_backbone(config.clip_model, config.clip_pretrained, image_size=config.image_size)
        arguments = model_arguments(config, backbone.embed_dim)
        model = models.build_model(backbone.clip, **arguments)
    num_layers = config.stages[0][0]
    if config.lora_rank:
        models.add_lora(model.clip, config.lora_rank, num_layers=num_layers)
    else:
        models.freeze_backbone(model.clip, everything=config.freeze_clip, num_layers=num_layers)
    return backbone, model, arguments


def load_first_stage(
    config: TrainingConfig, examples: data.Examples
) -> tuple[backbones.Backbone, models.ScoreModel, dict[str, Any]]:
    """CLIP and heads of an earlier run, as `start_model` returns them.

    Raises:
        ValueError: its heads are not those asked for, or it was trained on images that are now to be tested on.
    """
    folder, state, description = checkpoint.load_weights(Path(str(config.init_from)))
    backbone = backbones.rebuild(description["clip"], folder, image_size=config.image_size)
    arguments = model_arguments(config, backbone.embed_dim)
    free = {"dropout", "predict_rationale"}  # neither changes what the other weights mean
    for name, value in description["model"].items():
        if name not in free and value != arguments[name]:
            raise ValueError(f"--init_from {folder}: has {name} {value}, not {arguments[name]}; use the same flags")
    scales = {task: data.LabelScale(**scale) for task, scale in description["scales"].items()}
    if scales != examples.scales:
        print(f"note      scores of --init_from lie on {scales}, those of this data on {examples.scales}")
    splits = folder.parent / "splits.csv"
    if splits.is_file():
        before = pd.read_csv(splits, dtype=str, keep_default_na=False).set_index("name")["split"]
        tested = examples.table["name"][examples.rows("test")]
        leaked = [name for name in tested if before.get(name, "test") != "test"]
        if leaked:
            raise ValueError(
                f"--init_from {folder}: {len(leaked)} images of the test fold were trained or selected on there; "
                "use the same --seed, --test_size, --val_size and --split_by"
            )
    model = models.build_model(backbone.clip, **arguments)
    clip_state = {key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")}
    backbones.load_state(backbone.clip, clip_state, str(folder))
    model.load_state_dict({key: value for key, value in state.items() if key.startswith("heads.")}, strict=False)
    return backbone, model, arguments


def origin(config: TrainingConfig) -> str:
    """Where the weights come from, in words."""
    own = config.clip_model.partition(":")[1] and config.clip_pretrained != "none"
    return config.init_from or f"{config.clip_model} ({'its own weights' if own else config.clip_pretrained})"


def build_optimizer(config: TrainingConfig, model: models.ScoreModel) -> torch.optim.Optimizer:
    """AdamW over all that is trained at some stage; what is still frozen has no gradient and so no state yet."""
    scales = models.lr_scales(model, config.layer_decay)

    def lr_of(name: str) -> float:
        return config.lr * scales[name] if name in scales else config.head_lr or config.lr

    if config.unfreeze_schedule:
        models.freeze_backbone(model.clip, num_layers=config.stages[-1][0])
    optimizer = engine.build_optimizer(model, lr_of, weight_decay=config.weight_decay)
    if config.unfreeze_schedule:
        models.freeze_backbone(model.clip, num_layers=config.stages[0][0])
    return optimizer


def enter_stage(config: TrainingConfig, model: models.ScoreModel, epoch: int) -> None:
    """Thaw the layers that the plan gives free from this epoch (counted from 1) on."""
    for num_layers, epochs_done in config.stages[1:]:
        if epochs_done == epoch - 1:
            models.freeze_backbone(model.clip, num_layers=num_layers)
            print(f"{num_layers} layers stay frozen from epoch {epoch} on")


class Progress:
    """A bar on a terminal (nothing elsewhere) and the time of one epoch."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.started = time.perf_counter()
        self.bar = tqdm(total=num_images, unit="img", leave=False, disable=None)
        self.update = self.bar.update

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.train_seconds = time.perf_counter() - self.started

    def timing(self) -> dict[str, float]:
        """Training speed, and seconds since the epoch began."""
        return {
            "images_per_s": self.num_images / self.train_seconds,
            "seconds": time.perf_counter() - self.started,
        }


@dataclass(frozen=True)
class Base:
    """What a frozen CLIP knows, fitted on the training fold; None for a score without labels."""

    quality: tuple[np.ndarray, float] | None
    consistency: tuple[float, float] | None

    def scores(self, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Embeddings -> ridge probe "q" (logits) and zero-shot cosine "c": orders, not MOS units."""
        found = {}
        if self.quality:
            found["q"] = known["image"] @ self.quality[0] + self.quality[1]
        if self.consistency:
            found["c"] = known["cos"]
        return found


def fit_base(known: Mapping[str, Mapping[str, np.ndarray]], examples: data.Examples) -> Base:
    """Fit both base terms on the training fold's embeddings."""
    rows = examples.rows("train")
    targets = {task: values[rows] for task, values in examples.unit_targets.items()}
    labelled = {task: ~np.isnan(values) for task, values in targets.items()}
    quality = consistency = None
    if "q" in targets:
        groups = data.prompt_groups(examples.table)[rows]
        keep = labelled["q"]
        quality = calibration.fit_quality(known["train_eval"]["image"][keep], targets["q"][keep], groups[keep])
    if "c" in targets:
        keep = labelled["c"]
        consistency = calibration.fit_consistency(known["train_eval"]["cos"][keep], targets["c"][keep])
    return Base(quality, consistency)


def demo_paths(config: TrainingConfig) -> dict[str, str]:
    """Draw the demo set (once) and return where it is, as options."""
    # Named after the code that draws it, so that an older program's set is never taken for this one's.
    version = hashlib.sha256(Path(demo.__file__).read_bytes()).hexdigest()[:8]
    csv_path, image_dir = demo.write_demo_set(Path(config.cache_dir) / f"demo-{version}")
    return {"data_csv_path": str(csv_path), "image_base_dir": str(image_dir)}


def read_examples(config: TrainingConfig) -> data.Examples:
    """The data set that the options name. Raises ValueError."""
    examples = data.load_examples(
        config.data_csv_path,
        config.image_base_dir,
        data.Columns(
            name=config.name_column,
            prompt=config.prompt_column,
            quality=config.quality_column,
            consistency=config.consistency_column,
            explanation=config.explanation_column,
            group=config.group_column,
        ),
        split_by=config.split_by,
        test_size=config.test_size,
        val_size=config.val_size,
        seed=config.seed,
        ranges={"q": config.mos_range_q, "c": config.mos_range_c},
    )
    task = config.select_by.rpartition("_")[2]
    if task in data.TASKS and task not in examples.scales:
        raise ValueError(f"--select_by {config.select_by}: the data has no {data.TASKS[task]} scores")
    if not any({"q": config.w_q, "c": config.w_c}[task] for task in examples.scales):
        raise ValueError(f"the data has {' and '.join(data.TASKS[t] for t in examples.scales)} scores only, weighted 0")
    if config.use_explanations and (examples.table["prompt"] == "").all():
        raise ValueError("--use_explanations: needs prompts, and the data has none")
    if config.use_explanations and not (examples.table["explanation"] != "").any():
        raise ValueError(f"--use_explanations: column {config.explanation_column!r} is missing or empty")
    return examples


def model_arguments(config: TrainingConfig, embed_dim: int) -> dict[str, Any]:
    """The arguments of `models.build_model`, as JSON values."""
    sizes = {"layers": config.refinement_layers, "heads": config.refinement_heads, "dim": config.refinement_dim}
    return {
        "embed_dim": embed_dim,
        "residual": config.use_residual_learning,
        "scale_q": config.residual_scale_q,
        "scale_c": config.residual_scale_c,
        "hidden_q": config.hidden_dim_q,
        "hidden_c": config.hidden_dim_c,
        "dropout": config.dropout,
        "refinement": sizes if config.use_refinement else None,
        "predict_rationale": config.use_explanations,
    }


def build_feed(
    config: TrainingConfig, examples: data.Examples, backbone: backbones.Backbone, runtime: engine.Runtime
) -> tuple[data.Feed, int]:
    """The feed of batches, and the number of texts cut because they exceed the context length."""
    num_truncated = 0

    def tokenize(texts: Sequence[str]) -> Tensor:
        nonlocal num_truncated
        tokens, cut = backbones.tokenize(backbone.tokenizer, texts, backbone.clip.context_length)
        num_truncated += cut
        return tokens

    def text_table(column: str) -> data.TextTable | None:
        texts = examples.table[column].tolist()
        return data.TextTable(texts, tokenize, runtime.device) if any(texts) else None

    rationales = text_table("explanation") if config.use_explanations else None
    feed = data.Feed(
        device=runtime.device,
        mean=backbone.config["preprocess_cfg"]["mean"],
        std=backbone.config["preprocess_cfg"]["std"],
        targets=examples.unit_targets,
        prompts=text_table("prompt") if "c" in examples.scales or rationales else None,
        rationales=(rationales, (examples.table["explanation"] != "").to_numpy()) if rationales else None,
    )
    return feed, num_truncated


def build_loaders(
    config: TrainingConfig, examples: data.Examples, runtime: engine.Runtime
) -> dict[str, torch.utils.data.DataLoader]:
    """Loaders by name: "train" is augmented and shuffled; "train_eval", "val" and "test" are plain and in order."""
    images = data.ImageSet(
        examples.table["path"].tolist(),
        image_size=config.image_size,
        crop_scale_min=config.crop_scale_min,
        seed=config.seed,
        flip=config.horizontal_flip,
    )
    return {
        name: data.image_loader(
            images,
            examples.rows(name.removesuffix("_eval")),
            batch_size=config.batch_size if name == "train" else 2 * config.batch_size,
            shuffle=name == "train",
            num_workers=num_workers(config, runtime),
            pin_memory=runtime.device.type != "cpu",
            keep_workers=name in ("train", "val"),  # the others are read once or twice
        )
        for name in ("train", *EVAL_LOADERS)
    }


def num_workers(config: TrainingConfig, runtime: engine.Runtime) -> int:
    """Image-reading processes, as asked for or as suits the machine."""
    return runtime.default_workers if config.num_workers is None else config.num_workers


def score_terms(
    scores: Mapping[str, Tensor], targets: Mapping[str, Tensor], config: TrainingConfig, examples: data.Examples
) -> dict[str, Tensor]:
    """Named losses of label-unit scores: "loss_q", "loss_c" and their weighted sum "loss"."""
    return losses.score_losses(
        {task: scores[task] for task in examples.scales},
        targets,
        weights={"q": config.w_q, "c": config.w_c},
        terms=config.loss_terms,
        smoothing=config.label_smoothing,
        means=examples.train_means,
    )


def build_losses(config: TrainingConfig, examples: data.Examples) -> Any:
    """The function (model, batch) -> named losses that training minimises."""

    def compute(model: models.ScoreModel, batch: data.Batch) -> dict[str, Tensor]:
        scores = model(batch.images_B3SS, batch.tokens_PN, batch.prompt_of_B)
        terms = score_terms(scores, batch.targets, config, examples)
        if batch.rationale_tokens_RN is not None and batch.has_rationale_B is not None:
            target_BE = torch.zeros_like(scores["rationale"])
            if len(batch.rationale_tokens_RN):
                with torch.no_grad():
                    target_BE[batch.has_rationale_B] = model.encode_text(batch.rationale_tokens_RN)
            terms["loss_exp"] = losses.rationale_loss(scores["rationale"], target_BE, batch.has_rationale_B)
            terms["loss"] = terms["loss"] + config.w_exp * terms["loss_exp"]
        return terms

    return compute


def evaluate(
    scores: Mapping[str, np.ndarray], fold: str, examples: data.Examples, config: TrainingConfig
) -> dict[str, float]:
    """Losses (label units) and agreement (MOS units) of a fold's scores: "loss", "srocc_q", ..., "main"."""
    rows = examples.rows(fold)
    tensors = {task: torch.from_numpy(values) for task, values in scores.items()}
    targets = {task: torch.from_numpy(values[rows]) for task, values in examples.unit_targets.items()}
    terms = {name: float(value) for name, value in score_terms(tensors, targets, config, examples).items()}
    in_mos = {task: scale.to_mos(scores[task]) for task, scale in examples.scales.items()}
    return {**terms, **agreements(in_mos, fold, examples)}


def agreements(in_mos: Mapping[str, np.ndarray], fold: str, examples: data.Examples) -> dict[str, float]:
    """Agreement of a fold's predictions (MOS units) with the labels that exist: "srocc_q", ..., "main"."""
    found = {}
    for task in examples.scales:
        mos = examples.mos(task, fold)
        known = ~np.isnan(mos)
        for name, value in metrics.agreement(in_mos[task][known], mos[known]).items():
            found[f"{name}_{task}"] = value
    return {**found, "main": metrics.main_score(found)}


def floors(examples: data.Examples) -> dict[str, dict[str, float]]:
    """What predictors that look at no pixel reach on the test fold: the training mean and each generator's mean."""
    groups = examples.table["group"].to_numpy()
    predictors = {"mean": np.zeros(len(groups)), "generator_mean": groups}
    found = {}
    for name, codes in predictors.items():
        predicted = {}
        for task in examples.scales:
            mos = examples.mos(task, "train")
            known = examples.rows("train")[~np.isnan(mos)]
            predicted[task] = metrics.group_mean_predictor(
                codes[known], examples.table[task].to_numpy()[known], codes[examples.rows("test")]
            )
        found[name] = agreements(predicted, "test", examples)
    return found


def new_run_dir(config: TrainingConfig) -> Path:
    """runs/<time>-<short name>, not yet taken."""
    place = config.clip_model.partition(":")[2]
    model = re.sub(r"[^\w.-]+", "-", Path(place).name if place else config.clip_model).lower()
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{model}-{config.freezing}"
    taken = 1
    while (folder := Path("runs") / (name if taken == 1 else f"{name}-{taken}")).exists():
        taken += 1
    return folder


def write_inputs(folder: Path, config: TrainingConfig, examples: data.Examples, runtime: engine.Runtime) -> None:
    """Write what the run starts from: config.json and splits.csv."""
    config = replace(config, output_dir=str(folder))
    provenance = {
        **checkpoint.environment(),
        "machine": runtime.describe(),
        "resolved": {
            "device": runtime.device.type,
            "amp": runtime.precision,
            "num_workers": num_workers(config, runtime),
        },
        "data_fingerprint": examples.fingerprint,
        "mos_scales": {task: [scale.low, scale.high] for task, scale in examples.scales.items()},
    }
    checkpoint.write_json(folder / checkpoint.CONFIG_FILE, {**config.to_json(), "provenance": provenance})
    checkpoint.write_csv(folder / "splits.csv", pd.DataFrame({"name": examples.table["name"], "split": examples.folds}))


def save_scorer(
    folder: Path,
    model: models.ScoreModel,
    backbone: backbones.Backbone,
    arguments: Mapping[str, Any],
    config: TrainingConfig,
    examples: data.Examples,
) -> None:
    """Write a checkpoint that `predict.Scorer.load` can score with, without anything else."""
    description = {
        "clip": backbone.config,
        "image_size": config.image_size,
        "model": dict(arguments),
        "scales": {task: {"low": scale.low, "high": scale.high} for task, scale in examples.scales.items()},
        "source": origin(config),
    }
    state = models.merged_state(model)
    checkpoint.save_weights(folder, state, description, lambda path: backbones.save_text_files(backbone, path))


def prediction_table(scores: Mapping[str, Mapping[str, np.ndarray]], examples: data.Examples) -> pd.DataFrame:
    """One row per image in MOS units; the columns of a task without scores are empty."""
    parts = []
    for name, predicted in scores.items():
        fold = name.removesuffix("_eval")
        rows = examples.rows(fold)
        part = pd.DataFrame({"row": rows, "name": examples.table["name"].to_numpy()[rows], "split": fold})
        for task, (mos_column, pred_column) in MOS_COLUMNS.items():
            part[mos_column] = examples.mos(task, fold)
            known = task in examples.scales
            part[pred_column] = examples.scales[task].to_mos(predicted[task]) if known else np.nan
        part.loc[examples.table["prompt"].to_numpy()[rows] == "", MOS_COLUMNS["c"][1]] = np.nan
        parts.append(part)
    return pd.concat(parts).sort_values("row").drop(columns="row")


def plan(
    config: TrainingConfig,
    examples: data.Examples,
    backbone: backbones.Backbone,
    model: models.ScoreModel,
    runtime: engine.Runtime,
    *,
    num_steps: int,
    num_truncated: int,
) -> str:
    """What is about to be trained, in a few lines."""
    table = examples.table
    scores = ", ".join(
        f"{data.TASKS[task]} {table[task].min():g}..{table[task].max():g} ({table[task].notna().sum()})"
        for task in examples.scales
    )
    counts = models.count_parameters(model)
    parts = ", ".join(
        f"{name} {trained / 1e6:.2f}M of {(trained + frozen) / 1e6:.2f}M" for name, (trained, frozen) in counts.items()
    )
    sizes = ", ".join(f"{fold} {len(examples.rows(fold))}" for fold in data.FOLDS)
    own = (table["split"] != "").any()
    lines = [
        ("data", f"{len(table)} images, {table['prompt'].nunique()} prompts; {scores}"),
        ("split", f"{sizes} ({'as the CSV says' if own else 'by ' + config.split_by})"),
        ("backbone", f"{origin(config)}, {config.image_size} px, {backbone.activation}, {config.freezing}"),
        ("trained", parts),
        (
            "schedule",
            f"{config.epochs} epochs, {num_steps} steps of {config.batch_size * config.gradient_accumulation_steps}, "
            f"lr {config.lr:g} {config.scheduler}, loss {config.loss}, seed {config.seed}",
        ),
        ("machine", runtime.describe()),
    ]
    notes = list(backbone.notes)
    if num_truncated:
        notes.append(f"{num_truncated} text(s) exceed CLIP's context length and were cut")
    if config.freeze_layers != TrainingConfig.freeze_layers and not config.partial_freeze:
        notes.append("--freeze_layers does nothing without --partial_freeze")
    if config.stages[-1][1] >= config.epochs:
        notes.append(f"--unfreeze_schedule: epoch {config.stages[-1][1]} is never reached in {config.epochs} epochs")
    lines += [("note", note) for note in notes]
    return "\n".join(f"{title:<10}{text}" for title, text in lines)


def epoch_line(row: Mapping[str, float], epochs: int) -> str:
    """One line on an epoch."""
    tasks = [task for task in data.TASKS if f"val_srocc_{task}" in row]

    def pair(name: str) -> str:
        return " ".join(f"{task} {row[f'{name}_{task}']:.3f}" for task in tasks)

    rationale = f" exp {row['loss_exp']:.3f}" if "loss_exp" in row else ""
    return (
        f"epoch {int(row['epoch']):>{len(str(epochs))}}/{epochs}  loss {row['loss']:.4f} ({pair('loss')}{rationale})  "
        f"val {row['val_loss']:.4f}  SROCC {pair('val_srocc')}  PLCC {pair('val_plcc')}  "
        f"lr {row['lr']:.1e}  {row['images_per_s']:.0f} img/s  {row['seconds']:.1f} s"
    )


def results_table(results: Mapping[str, Any], examples: data.Examples) -> str:
    """The test fold's scores beside the floors."""
    columns = {"srocc": "SROCC", "plcc": "PLCC", "plcc_fit": "PLCC fitted", "krocc": "KROCC", "rmse": "RMSE (MOS)"}
    rows = {
        "trained model": results["test"],
        "before": results["base"]["test"],
        **{name.replace("_", " "): row for name, row in results["floors"].items()},
    }
    lines = [
        f"test fold: {len(examples.rows('test'))} images, weights of epoch {results['best_epoch']} of "
        f"{results['epochs']}, {results['seconds']:.0f} s in all",
        f"{'':<28}" + "".join(f"{title:>12}" for title in columns.values()),
    ]
    for task in examples.scales:
        for place, (name, row) in enumerate(rows.items()):
            title = data.TASKS[task] if place == 0 else ""
            lines.append(f"{title:<12} {name:<15}" + "".join(f"{row[f'{key}_{task}']:>12.3f}" for key in columns))
    added = ", ".join(
        f"{data.TASKS[task]} {results['test'][key] - results['base']['test'][key]:+.3f}"
        for task in examples.scales
        for key in [f"srocc_{task}"]
    )
    return "\n".join(
        [
            *lines,
            f"SROCC added by training to what CLIP knew before (ridge probe, cosine): {added}",
            f"main score (mean of SROCC and PLCC): {results['test']['main']:.3f}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line and run; returns the results. Mistakes are one line and exit code 2."""
    with one_line_errors(engine.NonFiniteLoss):
        return run(parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
