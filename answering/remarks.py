"""What is said of a run: plan and advice before training, results and diagnosis after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from answering.configs import BRANCH_OPTIONS, DEMO_SETTINGS, OPTIONS, VQAConfig, recommended
from answering.experiment import Experiment
from storage.messages import one_line
from training import run_folder

FEW_QUESTIONS = 5_000  # below which large models learn questions by heart
SMALL_WIDTH = 256
OVERFIT = 0.05  # rise of the validation loss above its lowest, as a share
NEAR = 0.01  # accuracy that is no difference
COUNTED = 8  # questions of which is counted what training keeps
SHOWN_KINDS = 8  # of each, on the terminal
ADVISED = ("lr", "batch_size", "update_freq", "clip_norm", "dropout", "gamma", "AOA_layers", "num_hid", "omega_q")


def plan(experiment: Experiment) -> str:
    """What is about to be trained, in a few lines."""
    config, lexicon, model = experiment.config, experiment.lexicon, experiment.model
    sizes = ", ".join(
        f"{name} {len(fold.questions):,} on {len(set(fold.questions.images)):,} images"
        for name, fold in experiment.folds.items()
    )
    looked = "no image is looked at"
    if experiment.regions is not None:
        looked = f"{config.features}, {experiment.regions.width} numbers each, up to {config.max_boxes} an image"
        looked += "; images shuffled among questions" if config.shuffle_images else ""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    step = config.batch_size * config.batches_per_step * experiment.runtime.world // experiment.runtime.world
    lines = [
        ("data", "demo set" if config.demo else str(config.data_csv_path or config.data_root)),
        ("questions", sizes),
        (
            "answers",
            f"{len(lexicon.answers):,}; {len(lexicon.words):,} words, {len(lexicon.entities):,} name something",
        ),
        ("regions", looked),
        ("model", f"{config.branches}, {trained / 1e6:.2f}M parameters, width {config.num_hid}"),
        *coarse_lines(experiment),
        (
            "schedule",
            f"{config.epochs} epochs, {experiment.steps_per_epoch * config.epochs} steps of {step} questions "
            f"(--batch_size {config.batch_size} x {config.batches_per_step}), lr {config.lr:g} {config.scheduler}, "
            f"loss {config.loss}, seed {config.seed}",
        ),
        ("machine", experiment.runtime.describe()),
    ]
    lines += [("note", note) for note in [*experiment.notes, *unused(config)]]
    return "\n".join(f"{title:<10}{text}" for title, text in lines)


def coarse_lines(experiment: Experiment) -> list[tuple[str, str]]:
    """What the coarse branch asks."""
    config, xvlm = experiment.config, experiment.model.xvlm
    if experiment.coarse is None:
        return []
    if xvlm is None:
        why = "" if config.coarse else "; --checkpoint FILE would ask an X-VLM"
        return [("coarse", f"CLIP {config.clip_model} ({config.clip_pretrained}), frozen{why}")]
    how = "frozen, asked once" if xvlm.is_frozen else f"lr {config.xvlm_lr:g} linear"
    return [("coarse", f"X-VLM of {config.checkpoint}, images of {xvlm.xvlm.config.vision.image_res} pixels, {how}")]


def unused(config: VQAConfig) -> list[str]:
    """Options that were set for branches that are not trained."""
    own, others = config.owners, ",".join(config.branch_names)
    names = [name for branch, names in BRANCH_OPTIONS.items() if branch not in own for name in names]
    given = [OPTIONS[name].flag for name in names if getattr(config, name) != OPTIONS[name].default]
    if config.demo:
        given = [flag for flag in given if flag.removeprefix("--") not in DEMO_SETTINGS]
    return [f"{', '.join(given)}: nothing in --branches {others} uses this"] if given else []


def check_advice(experiment: Experiment) -> list[dict[str, str]]:
    """Say what is unusual about the settings. Raises ValueError for any of it if --advice is strict."""
    config, runtime = experiment.config, experiment.runtime
    said, on_gpu = [], runtime.device.type != "cpu"
    if config.advice != "off":
        said = advise(
            config,
            num_train=len(experiment.folds["train"].questions),
            free_memory=runtime.free_memory() if on_gpu else None,
            bytes_per_question=bytes_per_question(experiment) if on_gpu else 0,
        )
    for one in said:
        runtime.say(
            f"advice    {one['flag']} {one['value']}: {one['why']}; usual: {one['recommended']}; {one['change']}"
        )
    if said and config.advice == "strict":
        raise ValueError(f"--advice strict: {len(said)} remark(s), see above; change what they name")
    return said


def bytes_per_question(experiment: Experiment) -> float:
    """How many bytes training keeps of a question for the backward pass, counted on a few of them.

    Nothing is changed by it, random numbers included.
    """
    model, runtime, feed = experiment.model, experiment.runtime, experiment.folds["train"].feed
    rows = feed.parts(COUNTED)[-1]
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    was_training = model.training
    devices = [] if runtime.device.type == "cpu" else [runtime.device]
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        with runtime.autocast():
            found = model.train()(**feed.assemble(rows).inputs, learns=True)
        del found
    model.train(was_training)
    return sum(kept.values()) / len(feed.share(rows))


def advise(config: VQAConfig, *, num_train: int, free_memory: float | None, bytes_per_question: float) -> list[dict]:
    """Settings that are unusual, each with what is usual and why.

    Args:
        num_train: questions of the training fold.
        free_memory: bytes on the GPU; None on a CPU.
        bytes_per_question: that training keeps for the backward pass.
    """
    found = []
    for name in () if config.demo else ADVISED:
        low, high = recommended(name)
        value = getattr(config, name)
        if not low <= value <= high:
            found.append(
                remark(name, value, f"{low:g} to {high:g}", "outside of what the tuning guide tries", "move inside it")
            )
    effective = config.batch_size * config.batches_per_step
    if effective * 10 > num_train:
        found.append(
            remark(
                *(("update_freq", config.update_freq) if config.batches_per_step > 1 else ("batch_size", effective)),
                f"steps of at most {max(1, num_train // 10)} questions",
                f"{effective} questions a step leave fewer than ten steps an epoch",
                "--update_freq 1" if config.batches_per_step > 1 else "a smaller --batch_size",
            )
        )
    if num_train < FEW_QUESTIONS and config.num_hid > SMALL_WIDTH and not config.demo:
        found.append(
            remark(
                "num_hid",
                config.num_hid,
                f"up to {SMALL_WIDTH} below {FEW_QUESTIONS:,} questions",
                f"{num_train:,} questions are learnt by heart at this width",
                f"--num_hid {SMALL_WIDTH} --AOA_layers 2",
            )
        )
    if free_memory is not None and config.batch_size * bytes_per_question > free_memory:
        found.append(
            remark(
                "batch_size",
                config.batch_size,
                f"up to {max(1, int(free_memory // bytes_per_question))} on this GPU",
                "the activations of a batch do not fit into its free memory",
                "--dynamic_batch_size, --mixed_precision or --memory_efficient_attention",
            )
        )
    return found


def remark(flag: str, value: object, usual: str, why: str, change: str) -> dict[str, str]:
    """A remark on a setting, as `results.json` has it."""
    return {"flag": f"--{flag}", "value": str(value), "recommended": usual, "why": why, "change": change}


def diagnose(
    history: Sequence[Mapping[str, float]], best_epoch: int, measured: Mapping[str, Any], config: VQAConfig
) -> list[dict[str, str]]:
    """What the curves and floors of a run tell, each with a proposal."""
    found = []
    losses = [row["val_loss"] for row in history]
    if best_epoch == 0:
        found.append(
            finding(
                "learnt nothing",
                f"no epoch of {len(history)} answers better than the untrained model",
                "raise --lr, or train longer",
                f"--lr {10 * config.lr:g}",
            )
        )
    elif best_epoch == len(history) and len(history) > 1:
        rise = history[-1]["val_accuracy"] - history[-2]["val_accuracy"]
        found.append(
            finding(
                "not finished",
                f"the last epoch is the best, {rise:+.3f} above the one before it",
                "train longer",
                f"--epochs {2 * config.epochs}",
            )
        )
    if losses and losses[-1] > (1 + OVERFIT) * min(losses) and best_epoch < len(history):
        found.append(
            finding(
                "learns by heart",
                f"validation loss rose from {min(losses):.3f} to {losses[-1]:.3f} while training loss fell to "
                f"{history[-1]['loss']:.3f}",
                "a smaller model, more dropout, or fewer epochs",
                f"--dropout 0.6 --num_hid {max(64, config.num_hid // 2)} --early_stopping_patience 3",
            )
        )
    own = measured["measures"]["accuracy"]
    for name, low in measured["floors"].items():
        if own < low + NEAR:
            found.append(
                finding(
                    "no better than a floor",
                    f"accuracy {own:.3f} beside {low:.3f} of {name}",
                    WAYS.get(name, "look at the data"),
                    "",
                )
            )
    return found


WAYS = {
    "shuffled image": "the model does not use what it sees: other --features, or longer training",
    "question only": "train longer, or lower --lr; the questions alone go as far",
}


def finding(what: str, evidence: str, proposal: str, command: str) -> dict[str, str]:
    """A finding, as `results.json` has it."""
    return {"finding": what, "evidence": evidence, "proposal": proposal, "command": command}


def closing_lines(results: Mapping[str, Any], folder: Path) -> list[str]:
    """What is said at the end of a run."""
    lines = measured_lines(results)
    lines += [f"note      {note}" for note in results["notes"]]
    lines += [f"diagnosis {one['finding']}: {one['evidence']}; {one['proposal']}" for one in results["diagnosis"]]
    return [*lines, f"run folder: {folder}"]


def measured_lines(found: Mapping[str, Any]) -> list[str]:
    """Accuracy as a table: a row for each kind of question, a column for each floor."""
    fold, floors = found["fold"], list(found["floors"])
    head = f"accuracy, {fold} fold"
    lines = [
        "",
        f"{head:<28}{'model':>7}  {'95 % interval':<16}" + "".join(f"{name:>{len(name) + 3}}" for name in floors),
    ]
    whole = {
        "accuracy": found["measures"]["accuracy"],
        "interval": found["interval"],
        "questions": found["data"][fold]["questions"],
        "floors": found["floors"],
    }
    lines.append(table_row("all questions", whole, floors))
    lines += [branch_row(name, one) for name, one in found["branches"].items()]
    for key, kinds in found["by_kind"].items():
        lines.append(f"by {key}")
        shown = list(kinds.items())[:SHOWN_KINDS]
        lines += [table_row(f"  {kind}", one, floors) for kind, one in shown]
        if len(kinds) > len(shown):
            lines.append(f"  and {len(kinds) - len(shown)} more in {run_folder.RESULTS_FILE}")
    lines.append(f"{'best answer of the list':<28}{found['ceiling']:7.3f}")
    more = {name: value for name, value in found["measures"].items() if name not in ("accuracy", "loss")}
    looks = {name: more.pop(name) for name in list(more) if name.startswith("grounding_")}
    if more:
        lines.append(", ".join(f"{name} {value:.3f}" for name, value in more.items()))
    if looks:
        names = [name for name in looks if not name.endswith("_even")]
        told = [f"{name.removeprefix('grounding_')} {looks[name]:.3f} ({looks[f'{name}_even']:.3f})" for name in names]
        lines.append(f"grounding {', '.join(told)}; in brackets if all regions or objects weighed the same")
    return lines


def branch_row(name: str, one: Mapping[str, Any]) -> str:
    """What a branch gets by itself, beside the fused answer."""
    gain = " ({:+.3f} .. {:+.3f})".format(*one["gain_interval"]) if one["gain_interval"] else ""
    title, between = f"  {name} alone", between_text(one["interval"])
    return f"{title:<28}{one['accuracy']:7.3f}  {between:<16}   fused {one['gain_of_fused']:+.3f}{gain}"


def between_text(interval: Sequence[float]) -> str:
    """An interval in words, if there is one."""
    return "{:.3f} .. {:.3f}".format(*interval) if interval else ""


def table_row(title: str, one: Mapping[str, Any], floors: Sequence[str]) -> str:
    """A row of `measured_lines`."""
    between = between_text(one["interval"])
    cells = "".join(f"{one['floors'][name]:>{len(name) + 3}.3f}" for name in floors)
    return f"{title[:27]:<28}{one['accuracy']:7.3f}  {between:<16}{cells}   {one['questions']:,} questions"


def subgraph_lines(graph: Mapping[str, Any], num_objects: int) -> list[str]:
    """The objects of a scene graph that an answer rests on, numbered, and the relations between them."""
    objects, relations = graph["objects"], graph["relations"]
    names = [f"{number} {one_line(one['name'])}" for number, one in enumerate(objects, start=1)]
    told = [
        f"{one['weight']:5.3f}  {name}{one_line(''.join(f', {each}' for each in one['attributes']))}"
        for one, name in zip(objects, names, strict=True)
    ]
    linked = [f"{names[source]} -> {one_line(name)} -> {names[target]}" for source, name, target in relations]
    return [
        *titled("objects", told or ["none was chosen" if num_objects else "the scene graph has none"]),
        *titled("relations", linked or ["none between these"]),
    ]


def region_lines(regions: Sequence[Any]) -> list[str]:
    """Where most attention is: marks with a box, as shares of the image, and a weight."""
    told = []
    for one in regions:
        left, top, right, bottom = (f"{100 * edge:.0f}" for edge in one.box)
        told.append(f"{one.weight:5.3f}  {left} to {right} % of the width, {top} to {bottom} % of the height")
    return titled("regions", told or ["the image has none"])


def titled(title: str, lines: Sequence[str]) -> list[str]:
    """Lines with a title before the first of them."""
    return [f"{title if place == 0 else '':<10}{line}" for place, line in enumerate(lines)]
