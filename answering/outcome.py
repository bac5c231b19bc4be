"""What has come of a run: measured beside floors, with intervals, and what a page shows of it.

Shapes: Q questions, I images, A answers, M regions.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from numpy.typing import NDArray

from answering import images, remarks
from answering.configs import NOT_SAVED, OPTIONS, VQAConfig, command_line
from answering.experiment import Experiment, Fold
from answering.feed import QuestionBatch, QuestionFeed
from answering.folds import digest_of
from answering.task import Answers, answer, answers_of, probabilities
from branches.attended import Attended, attended
from branches.fusion import AnswerModel
from evaluation.metrics import mean_interval
from storage.atomic import atomic_write
from storage.json_files import read_json
from training import checkpoints, devices, resuming, run_folder
from vqa import floors, gqa_metrics
from vqa.gqa_metrics import covered
from vqa.questions import Questions, gqa_questions, plain_id, read_choices
from vqa.scene_graph import shares_of_image, subgraph
from vqa.targets import ceiling

FREQUENT = 10  # answers in the confusion
NUM_EXAMPLES = 8  # worst, and best, questions
MOST_ANSWERS = 5  # of an example
MOST_OBJECTS = 8  # of a scene graph that are told of one
NO_OBJECTS: dict[str, Any] = {"objects": {}}  # the scene graph of an image that has none
IMAGE_ONLY = 4000  # training images that are read once more for the floor


def load_best(experiment: Experiment, trained: AnswerModel, folder: Path) -> AnswerModel:
    """The trained model with the weights of the epoch that validation has chosen."""
    if experiment.runtime.is_main:
        trained.load_state_dict(checkpoints.load_weights(folder / checkpoints.BEST_DIR)[1])
    experiment.runtime.copy_weights(trained)
    return trained


def by_kind(
    questions: Questions, accuracy_Q: NDArray[np.float64], floors_Q: Mapping[str, NDArray[np.float64]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy of every kind of question that the data tells of, with interval, floors and number of questions."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    names = np.array(questions.images)
    for key, kinds in questions.kinds.items():
        found[key], of_each = {}, np.array(kinds)
        for kind, count in Counter(kinds).most_common():
            are_of_it = of_each == kind
            own = accuracy_Q[are_of_it]
            found[key][kind] = {
                "accuracy": float(own.mean()),
                "questions": count,
                "interval": mean_interval(own, names[are_of_it].tolist()),
                "floors": {name: float(values[are_of_it].mean()) for name, values in floors_Q.items()},
            }
    return found


def confusion(questions: Questions, given: Sequence[str]) -> dict[str, Any]:
    """How often each of the most frequent answers of people (rows) was answered with what (columns)."""
    said = [most_said(people, questions) for people in questions.answers]
    frequent = [name for name, _ in Counter(said).most_common(FREQUENT)]
    place = {name: number for number, name in enumerate(frequent)}
    counts = np.zeros((len(frequent) + 1, len(frequent) + 1), dtype=int)
    other = len(frequent)
    for people, own in zip(said, given, strict=True):
        counts[place.get(people, other), place.get(own, other)] += 1
    return {"answers": [*frequent, "other"], "counts": counts.tolist()}


def most_said(people: Sequence[str], questions: Questions) -> str:
    """What most people said."""
    return Counter(map(questions.spelling, people)).most_common(1)[0][0] if people else ""


def words_of(experiment: Experiment, numbers_Q: NDArray[Any]) -> list[str]:
    """Numbers of answers as text."""
    answers = experiment.lexicon.answers.answers
    return [answers[int(place)] for place in numbers_Q]


def floor_answers(experiment: Experiment, model: AnswerModel, fold: str) -> dict[str, NDArray[Any]]:
    """What much simpler predictors answer to a fold's questions: numbers of answers (Q,) each."""
    train, asked = experiment.folds["train"], experiment.folds[fold]
    targets_QA = train.table.targets_QA
    assert targets_QA is not None
    num_words = len(experiment.lexicon.words)
    bags = [floors.bag_of_words(table.words_QN, num_words) for table in (train.table, asked.table)]
    found = {
        "most frequent answer": np.full(len(asked.table), floors.most_frequent(targets_QA)),
        "question only": floors.ridge_answers(bags[0], targets_QA, bags[1]),
    }
    if experiment.regions is not None:
        read = set(list(dict.fromkeys(train.table.images))[:IMAGE_ONLY])
        kept = [row for row, image in enumerate(train.table.images) if image in read]
        named = ([train.table.images[row] for row in kept], asked.table.images)
        seen = [mean_features(experiment, names) for names in named]
        found["image only"] = floors.ridge_answers(seen[0], targets_QA[kept], seen[1])
    if experiment.sees_images and not experiment.config.shuffle_images:
        other = experiment.fold(asked.questions, asked.table.shuffled(experiment.config.seed))
        found["shuffled image"] = answer(experiment, model, other)["answer"].astype(int)
    return found


def mean_features(experiment: Experiment, names: Sequence[str]) -> scipy.sparse.csr_array:
    """(Q, F) the mean features of each question's image, scaled to a standard deviation near 1."""
    assert experiment.regions is not None
    most = experiment.config.max_boxes
    means = {name: experiment.regions.read(name).features[:most].mean(axis=0) for name in dict.fromkeys(names)}
    found = np.stack([means[name] for name in names])
    return scipy.sparse.csr_array(found / max(float(found.std()), 1e-12))


def measure(
    experiment: Experiment,
    model: AnswerModel,
    fold: str,
    answers: Answers,
    floor_answers: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, Any]:
    """What the answers to a fold are worth, as `results.json` has it.

    Args:
        floor_answers: numbers of the answers (Q,) of simpler predictors.
    """
    own = experiment.folds[fold]
    given = words_of(experiment, answers["answer"])
    accuracy_Q = own.questions.score(given)
    floors_Q = {
        name: own.questions.score(words_of(experiment, numbers)) for name, numbers in (floor_answers or {}).items()
    }
    assert own.table.targets_QA is not None
    measures = {"accuracy": float(accuracy_Q.mean()), "loss": float(answers["loss"].mean())}
    return {
        "fold": fold,
        "measures": measures
        | gqa_measures(experiment, model, own.questions, given)
        | grounding(experiment, model, own),
        "interval": mean_interval(accuracy_Q, own.questions.images),
        "by_kind": by_kind(own.questions, accuracy_Q, floors_Q),
        "branches": branch_accuracies(experiment, own.questions, answers, accuracy_Q),
        "floors": {name: float(values.mean()) for name, values in floors_Q.items()},
        "ceiling": ceiling(own.table.targets_QA),
        "confusion": confusion(own.questions, given),
        "data": {
            name: {"questions": len(part.questions), "images": len(set(part.questions.images))}
            for name, part in experiment.folds.items()
        },
        "answers": len(experiment.lexicon.answers),
    }


def branch_accuracies(
    experiment: Experiment, questions: Questions, answers: Answers, fused_Q: NDArray[np.float64]
) -> dict[str, dict[str, Any]]:
    """What each branch by itself gets, where there are several, and how far the fused answer, of fused_Q, is above."""
    found = {}
    for name in answers_of(answers)[1:]:
        own_Q = questions.score(words_of(experiment, answers[name]))
        found[name.removeprefix("answer_")] = {
            "accuracy": float(own_Q.mean()),
            "interval": mean_interval(own_Q, questions.images),
            "gain_of_fused": float((fused_Q - own_Q).mean()),
            "gain_interval": mean_interval(fused_Q - own_Q, questions.images),
        }
    return found


def gqa_measures(
    experiment: Experiment, model: AnswerModel, questions: Questions, given: Sequence[str]
) -> dict[str, float]:
    """What GQA's evaluation tells beside accuracy; nothing of other data, nor where there is nothing to tell it by."""
    if questions.records is None:
        return {}
    predictions = dict(zip(questions.ids, given, strict=True))
    known = images.usable(experiment.regions, experiment.coarse)
    entailed = {
        other: questions.records[other]
        for name in questions.ids
        for other in questions.records[name]["entailed"]
        if other not in predictions and other in questions.records
        and (known is None or questions.records[other]["imageId"] in known)
    }  # fmt: skip
    if entailed:
        more = gqa_questions(entailed, questions.records)
        told = words_of(experiment, answer(experiment, model, experiment.fold(more))["answer"])
        predictions |= dict(zip(more.ids, told, strict=True))
    records = {
        name: {**questions.records[name], "entailed": [
            other for other in questions.records[name]["entailed"] if other in predictions
        ]}
        for name in predictions
    }  # fmt: skip
    choices = read_choices(Path(str(experiment.config.data_root)))
    if choices is not None and not choices.keys() >= set(gqa_metrics.balanced(records)):
        choices = None  # they are of another fold
    found = gqa_metrics.measures(records, predictions, choices)
    return {name: value for name, value in found.items() if name != "accuracy" and not math.isnan(value)}


def grounding(experiment: Experiment, model: AnswerModel, fold: Fold) -> dict[str, float]:
    """How much of what each branch looked at is on what questions of GQA and their full answers name.

    Beside it, as "..._even", how much it would be if all regions, or objects, of an image weighed the same. Nothing
    where nothing is looked at, no question names an object, or nobody has drawn where these are.
    """
    if experiment.regions is None and "graph" not in model.branches:
        return {}
    boxes = named_boxes(experiment, fold.questions)
    kept = np.array([name in boxes for name in fold.questions.ids], dtype=bool)
    if not kept.any():
        return {}

    def compute(model: AnswerModel, batch: QuestionBatch) -> dict[str, torch.Tensor]:
        names = [fold.questions.ids[row] for row in experiment.runtime.share(batch.rows)]
        found = {}
        for branch, looks in attended(model, batch.inputs).items():
            shares = [covered(one.boxes_M4.cpu().numpy(), boxes[name]) for one, name in zip(looks, names, strict=True)]
            own = [float(one.weights_M.cpu().numpy() @ part) for one, part in zip(looks, shares, strict=True)]
            even = [float(part.mean()) if len(part) else 0.0 for part in shares]
            for key, values in ((f"grounding_{branch}", own), (f"grounding_{branch}_even", even)):
                found[key] = torch.tensor(values, device=experiment.runtime.device)
        return found

    told = fold.predict(model, experiment.config.batch_size, compute, experiment.runtime, np.flatnonzero(kept))
    return {name: float(values.mean()) for name, values in told.items()}


def named_boxes(experiment: Experiment, questions: Questions) -> dict[str, NDArray[np.float32]]:
    """Question -> (N, 4) boxes of the objects that it and its full answer name, as far as people have drawn them."""
    if questions.records is None:
        return {}
    named = {name: gqa_metrics.named_objects(questions.records[name]) for name in questions.ids}
    image_of = {name: plain_id(questions.records[name]["imageId"]) for name, objects in named.items() if objects}
    graphs = experiment.graphs
    if experiment.config.sg_source != "gt":
        try:
            graphs = images.read_true_graphs(experiment.config, set(image_of.values()))
        except ValueError as error:  # what nothing was trained by shall not cost the other results
            experiment.runtime.say(f"note      grounding is not measured: {error}")
            return {}
    boxes = {
        image: dict(zip(graphs[image]["objects"], shares_of_image(graphs[image]), strict=True))
        for image in set(image_of.values())
        if image in graphs
    }
    drawn = {
        name: [boxes[image][key] for key in named[name] if key in boxes[image]]
        for name, image in image_of.items()
        if image in boxes
    }
    return {name: np.stack(own) for name, own in drawn.items() if own}


def predictions_table(experiment: Experiment, fold: str, answers: Answers) -> pd.DataFrame:
    """A row for each question of a fold."""
    questions = experiment.folds[fold].questions
    given = words_of(experiment, answers["answer"])
    return pd.DataFrame(
        {
            "id": questions.ids,
            "image": questions.images,
            "question": questions.texts,
            "answer": [most_said(people, questions) for people in questions.answers],
            "prediction": given,
            "probability": answers["probability"],
            "accuracy": questions.score(given),
            **{f"{key.removesuffix(' type').replace(' ', '_')}_type": kinds for key, kinds in questions.kinds.items()},
        }
    )


@torch.inference_mode()
def look(
    model: AnswerModel, feed: QuestionFeed, rows: NDArray[np.int64], kind: str
) -> tuple[NDArray[Any], dict[str, list[Attended]]]:
    """(n, A) probabilities of answers to some questions, and what each branch looked at for each of them."""
    inputs = feed.assemble(rows).inputs
    chances = probabilities(model.eval()(**inputs)[:, 0], kind)
    return chances.cpu().numpy(), attended(model, inputs)


def examples(experiment: Experiment, model: AnswerModel, fold: str, table: pd.DataFrame) -> list[dict[str, Any]]:
    """The worst and best questions: those answered wrongly, and rightly, with most certainty."""
    own = experiment.folds[fold]
    sure = table["probability"].to_numpy()
    order = np.argsort(np.where(table["accuracy"] == 0, -sure, 1 + table["accuracy"]), kind="stable")
    worst = [row for row in order[:NUM_EXAMPLES] if table["accuracy"][row] == 0]
    order = np.argsort(-(table["accuracy"].to_numpy() + sure), kind="stable")
    rows = np.array([*worst, *(row for row in order[:NUM_EXAMPLES] if table["accuracy"][row] > 0)], dtype=np.int64)
    if not len(rows):
        return []
    whole = copy(own.feed)
    whole.share = lambda rows: rows  # and not the share of one process
    chances_QA, seen = look(model, whole, rows, experiment.config.loss)
    paths = images.find_images(experiment.config, [own.questions.images[row] for row in rows])
    names = experiment.lexicon.answers.answers
    found = []
    for place, (row, chances) in enumerate(zip(rows.tolist(), chances_QA, strict=True)):
        image = own.table.images[row]
        looks = {name: told[place] for name, told in seen.items()}
        path = paths.get(image)
        best = np.argsort(-chances)[:MOST_ANSWERS]
        found.append(
            {
                "id": own.questions.ids[row],
                "image": str(path or ""),
                "digest": hashlib.sha256(path.read_bytes()).hexdigest() if path else "",
                "question": own.questions.texts[row],
                "answer": list(dict.fromkeys(own.questions.answers[row])),
                "prediction": [[names[place], float(chances[place])] for place in best],
                "accuracy": float(table["accuracy"][row]),
                "boxes": looks["fine"].boxes_M4.tolist() if "fine" in looks else [],
                "weights": looks["fine"].weights_M.tolist() if "fine" in looks else [],
            }
        )
        if "graph" in looks:
            graph = experiment.graphs.get(plain_id(image), NO_OBJECTS)
            found[-1]["graph"] = subgraph(graph, looks["graph"].weights_M.tolist(), MOST_OBJECTS)
    return found


def conclude(
    experiment: Experiment, progress: resuming.Progress, measured: Mapping[str, Any], said: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """What `results.json` holds but for the times: what was measured, and what is to be said of it."""
    best = progress.best_epoch or 0
    row = progress.history[best - 1] if best else {}
    return {
        "program": "vqa",
        "best_epoch": best,
        "epochs": len(progress.history),
        "val": {"accuracy": max(progress.selection), "loss": row.get("val_loss")},
        **measured,
        "data_fingerprint": digest_of(fold.questions for fold in experiment.folds.values()),
        "test_digest": digest_of([experiment.folds["test"].questions]),
        "command": command_line(images.without_demo_paths(experiment.config)),
        "defaults": {name: spec.default for name, spec in OPTIONS.items() if name not in NOT_SAVED},
        "notes": images.graph_notes(experiment.config),
        "advice": list(said),
        "diagnosis": remarks.diagnose(progress.history, best, measured, experiment.config),
        "resumed": progress.resumed,
    }


def timing(progress: resuming.Progress, started: float, ready: float) -> dict[str, float]:
    """Seconds that the run has taken, and those of this process without loading data."""
    now = time.perf_counter()
    return {"seconds": round(progress.seconds + now - started, 3), "seconds_from_first_batch": round(now - ready, 3)}


def finished_results(folder: Path, runtime: devices.Runtime) -> dict[str, Any]:
    """What a run found that `--resume` need not go on with."""
    runtime.say(f"{folder} is finished; nothing is left to do")
    return read_json(folder / run_folder.RESULTS_FILE)


def write_report(config: VQAConfig, folder: Path, runtime: devices.Runtime) -> None:
    """Write the page of a finished run, or of repeated ones, unless it is not wanted."""
    if config.report and runtime.is_main:
        from pages import report  # here, as matplotlib takes half a second to import

        report.write_report(folder)


def write_findings(experiment: Experiment, model: AnswerModel, answers: Answers, writer: run_folder.RunFolder) -> None:
    """Write predictions.csv, and examples.json for the page."""
    fold = experiment.config.measured_fold
    table = predictions_table(experiment, fold, answers)
    writer.csv("predictions.csv", table)
    shown = examples(experiment, model, fold, table)
    if writer.active:
        atomic_write(writer.path / "examples.json", lambda path: path.write_text(json.dumps(shown, indent=1) + "\n"))
