"""A trained run answers: the questions of a fold, with official result files, or one question about one image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from answering import images, outcome, remarks
from answering.configs import CLIP, VQAConfig
from answering.experiment import Experiment, build_fold, number
from answering.feed import QuestionFeed
from answering.folds import read_questions, with_regions
from answering.run_files import DESCRIPTION
from answering.task import answer
from branches.attended import Attended
from branches.fusion import AnswerModel
from pages import scene_pictures
from pages.scene_pictures import Mark
from regions.features import RegionFiles
from storage.atomic import atomic_write
from storage.image_files import opened, to_rgb
from storage.json_files import schema_mismatch
from storage.messages import one_line
from training import checkpoints, devices
from vqa.preprocess import Lexicon, SceneGraphs
from vqa.questions import Questions, gqa_questions, plain_id
from vqa.scene_graph import subgraph
from vqa.targets import AnswerList
from vqa.text import Vocabulary


@dataclass(frozen=True)
class Answerer:
    """A trained model with what it reads and gives."""

    config: VQAConfig  # what was asked for, with the options that the run was trained by
    runtime: devices.Runtime
    model: AnswerModel
    lexicon: Lexicon


def load(config: VQAConfig) -> Answerer:
    """The run of --checkpoint. Raises ValueError for what is none, in one line."""
    folder = Path(str(config.checkpoint))
    runtime = devices.start_runtime(config.device, config.amp)
    description = checkpoints.load_description(folder)
    if said := schema_mismatch(description, DESCRIPTION):
        raise ValueError(f"--checkpoint {folder}: is no run of main.py ({said})")
    config = replace(config, **trained_options(config, description))
    with checkpoints.damage_errors(folder):
        lexicon = Lexicon(
            Vocabulary(tuple(description["words"])),
            frozenset(description["entities"]),
            AnswerList(tuple(description["answers"])),
        )
        model = AnswerModel.build(**description["model"])
        _, weights, _ = checkpoints.load_weights(folder)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[-1]) from error
    return Answerer(config, runtime, model.to(runtime.device).eval(), lexicon)


def trained_options(config: VQAConfig, description: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run answers by as it was trained. Raises ValueError for those asked for that it cannot."""
    options = {name: description["options"][name] for name in DESCRIPTION["options"]}
    looks = description["model"]["branches"].get("fine", {}).get("feature_width", 0) != 0
    by_clip = options["features"] == CLIP
    if looks and config.question_only:
        raise ValueError("--question_only: this run was trained to look at images; drop it")
    options |= {"question_only": not looks, "features": None}
    options["shuffle_images"] |= config.shuffle_images
    if looks:
        options["features"] = config.features or (CLIP if by_clip else None)
    if config.sg_source not in ("none", options["sg_source"]):
        raise ValueError(f"--sg_source {config.sg_source}: this run was trained with {options['sg_source']}; drop it")
    if options["sg_source"] == "predicted" and not config.scene_graphs and config.mode != "ask":
        raise ValueError(
            "--sg_source predicted --scene_graphs DIR: this run was trained with such scene graphs, so it needs those "
            "of the images asked about"
        )
    return options


def open_for(answerer: Answerer) -> RegionFiles | None:
    """The regions that a trained model looks at. Raises ValueError if these are others than it was trained on."""
    wanted = answerer.model.feature_width
    if wanted == 0:
        return None
    if answerer.config.features is None:
        raise ValueError(
            "--features PATH: this run was trained on features from files, so it needs those of the images asked about"
        )
    known = images.open_regions(answerer.config, answerer.runtime)
    assert known is not None
    if known.width != wanted:
        raise ValueError(
            f"--features {answerer.config.features}: {known.width} numbers a region; the run was trained on {wanted}"
        )
    return known


def build(answerer: Answerer, questions: Questions, known: RegionFiles | None) -> Experiment:
    """What `outcome` measures, with one fold."""
    config, runtime, lexicon = answerer.config, answerer.runtime, answerer.lexicon
    images.prepare(known, [questions])
    graphs = images.read_graphs(config)
    for note in images.absent_graph_notes(config, [questions], graphs):
        runtime.say(f"note      {note}")
    fold = build_fold(config, questions, number(config, questions, lexicon, graphs), known, runtime)
    return Experiment(config, runtime, {config.fold: fold}, lexicon, graphs, known, answerer.model, {}, [])


def read(answerer: Answerer, known: RegionFiles | None, *, whole: bool) -> Questions:
    """The questions of --fold; of GQA the unbalanced ones too where the `whole` file is to be answered."""
    config, runtime = answerer.config, answerer.runtime
    questions = read_questions(config, config.fold)
    runtime.say(f"questions {questions.source}")
    if whole and questions.records is not None:
        questions = gqa_questions(questions.records, questions.records)
    if known is not None:
        questions, said = with_regions(questions, known.ids, config.bad_images == "skip")
        if said:
            runtime.say(f"note      {said}")
    return questions


def evaluate(config: VQAConfig) -> dict[str, Any]:
    """Answer the questions of --fold and say what the answers are worth. Raises ValueError."""
    answerer = load(config)
    path = answers_path(answerer.config) if config.output else None
    known = open_for(answerer)
    questions = read(answerer, known, whole=False)
    if not questions.are_answered:
        raise ValueError(f"--mode evaluate: {questions.source}; --mode predict answers them")
    experiment = build(answerer, questions, known)
    answers = answer(experiment, answerer.model, experiment.folds[config.fold])
    found = outcome.measure(experiment, answerer.model, config.fold, answers)
    answerer.runtime.say("\n".join(remarks.measured_lines(found)))
    for note in images.graph_notes(answerer.config):
        answerer.runtime.say(f"note      {note}")
    if path:
        write_answers(path, answerer, questions, outcome.words_of(experiment, answers["answer"]))
    return found


def predict(config: VQAConfig) -> dict[str, Any]:
    """Answer the questions of --fold and write the file that the evaluation server takes. Raises ValueError."""
    answerer = load(config)
    path = answers_path(answerer.config)
    known = open_for(answerer)
    questions = read(answerer, known, whole=True)
    experiment = build(answerer, questions, known)
    answers = answer(experiment, answerer.model, experiment.folds[config.fold])
    given = outcome.words_of(experiment, answers["answer"])
    write_answers(path, answerer, questions, given)
    return {"answers": len(given)}


def answers_path(config: VQAConfig) -> Path:
    """Where the answers are to be written. Raises ValueError if there is something already."""
    return free_path(config, f"{config.dataset.lower()}-{config.fold}-answers.json")


def free_path(config: VQAConfig, default: str) -> Path:
    """--output, or what it is by default. Raises ValueError if there is something already."""
    path = Path(config.output or default)
    if path.exists() and not config.overwrite:
        raise ValueError(f"--output {path}: is there already; name another, or pass --overwrite")
    return path


def write_answers(path: Path, answerer: Answerer, questions: Questions, given: list[str]) -> None:
    """Write the result file in the form of the data set."""
    config, runtime = answerer.config, answerer.runtime
    pairs = zip(questions.ids, given, strict=True)
    if config.dataset == "VQA":
        rows: list[dict[str, Any]] = [{"question_id": int(name), "answer": text} for name, text in pairs]
    elif config.dataset == "GQA":
        rows = [{"questionId": name, "prediction": text} for name, text in pairs]
    else:
        rows = [{"id": name, "answer": text} for name, text in pairs]
    if runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: temporary.write_text(json.dumps(rows) + "\n", encoding="utf-8"))
    runtime.say(f"answers   {len(rows):,} in {path}")


def ask(config: VQAConfig) -> dict[str, Any]:
    """Answer --question about --image with the five most likely answers. Raises ValueError."""
    answerer = load(config)
    config, path = answerer.config, Path(str(config.image))
    picture = free_path(config, f"{path.stem}-explained.png") if config.explain else None
    by_clip = answerer.model.feature_width > 0 and config.features == CLIP
    has_graphs = config.scene_graphs or (config.sg_source == "gt" and config.data_root)
    graphs = images.read_graphs(config) if has_graphs else {}
    if not path.is_file() and (by_clip or plain_id(path.name) not in graphs):
        raise ValueError(f"--image {path}: there is no such file")
    known: RegionFiles | None
    if by_clip:
        known, name = images.clip_regions(config, answerer.runtime, {path.name: path}), path.name
        images.prepare(known, [Questions(["1"], [name], [""], [()])])
    else:
        known, name = open_for(answerer), plain_id(path.name)
        if known is not None and name not in known.ids:
            raise ValueError(f"--features {config.features}: has no image {name!r}")
    if picture:
        check_explainable(answerer, plain_id(name), graphs)
    questions = Questions(["1"], [name], [str(config.question)], [()])
    table = number(replace(config, shuffle_images=False), questions, answerer.lexicon, graphs)
    feed = QuestionFeed(table, known, max_boxes=config.max_boxes, device=answerer.runtime.device)
    chances, seen = outcome.look(answerer.model, feed, np.array([0]), config.loss)
    best = np.argsort(-chances[0])[: outcome.MOST_ANSWERS]
    found = {answerer.lexicon.answers.answers[place]: float(chances[0, place]) for place in best}
    for text, chance in found.items():
        answerer.runtime.say(f"{chance:6.3f}  {text}")
    if answerer.model.feature_width == 0 and "graph" not in config.branch_names:
        answerer.runtime.say("note      this run looks at no image: trained with --question_only")
    if config.sg_source != "none" and plain_id(name) not in graphs:
        answerer.runtime.say("note      this run was trained with scene graphs; of this image there is none")
    for note in images.graph_notes(config) if graphs else []:
        answerer.runtime.say(f"note      {note}")
    if picture:
        graph = graphs.get(plain_id(name), outcome.NO_OBJECTS)
        explain(answerer, picture, graph, {key: looks[0] for key, looks in seen.items()}, found)
    return found


def check_explainable(answerer: Answerer, name: str, graphs: SceneGraphs) -> None:
    """Raise ValueError, before anything is computed, if what an answer rests on cannot be shown."""
    has_graph = "graph" in answerer.config.branch_names
    if not has_graph and answerer.model.feature_width == 0:
        raise ValueError("--explain: this run looks at no image, so there is nothing to show; drop it")
    if has_graph and name not in graphs:
        where = answerer.config.scene_graphs or answerer.config.data_root
        given = f"{where} has no scene graph of image {name!r}" if where else "needs the scene graph of the image"
        raise ValueError(f"--explain: {given}; name the folder of one by --sg_source and --scene_graphs DIR")


def explain(
    answerer: Answerer,
    picture: Path,
    graph: Mapping[str, Any],
    seen: Mapping[str, Attended],
    answers: Mapping[str, float],
) -> None:
    """Print what an answer rests on, objects and relations or regions, and draw it on the image."""
    config, runtime = answerer.config, answerer.runtime
    image, said = image_or_canvas(Path(str(config.image)), graph)
    best, chance = next(iter(answers.items()))
    title = f"{config.question} {best} {scene_pictures.percent(chance)}. "
    title += "Image not found or not readable. " if said else ""
    panels = []
    if "graph" in seen:
        part = subgraph(graph, seen["graph"].weights_M.tolist(), outcome.MOST_OBJECTS)
        runtime.say("\n".join(remarks.subgraph_lines(part, len(graph["objects"]))))
        legend = "Objects chosen of the scene graph, and what each weighs"
        panels.append(scene_pictures.draw_panel(image, *scene_pictures.as_marks(part), title + legend))
    if "fine" in seen:
        order = seen["fine"].weights_M.argsort(descending=True)[: outcome.MOST_OBJECTS]
        weights, boxes = (part[order].tolist() for part in seen["fine"])
        regions = [Mark("", box, weight) for box, weight in zip(boxes, weights, strict=True)]
        runtime.say("\n".join(remarks.region_lines(regions)))
        legend = "Regions with most attention"
        panels.append(scene_pictures.draw_panel(image, regions, [], title + legend))
    if runtime.is_main:
        picture.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(picture, lambda temporary: scene_pictures.beside(panels).save(temporary, "PNG"))
    runtime.say(f"picture   {picture}{said}")


def image_or_canvas(path: Path, graph: Mapping[str, Any]) -> tuple[Image.Image, str]:
    """The image, or an empty one of its proportions if it cannot be read, with why."""
    try:
        with opened(path) as image:
            return to_rgb(image), ""
    except OSError as error:
        empty = scene_pictures.empty_canvas(graph.get("width", 4), graph.get("height", 3))
        return empty, f", on an empty canvas ({one_line(error)})"


ASKING: Mapping[str, Callable[[VQAConfig], dict[str, Any]]] = {"evaluate": evaluate, "predict": predict, "ask": ask}
