"""A trained run answers: the questions of a fold, with official result files, or one question about one image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from answering import images, outcome, remarks
from answering.configs import CLIP, ONE_BY_ONE, VQAConfig
from answering.experiment import Experiment
from answering.folds import read_questions, sources, with_regions
from answering.run_files import DESCRIPTION
from answering.task import answer
from branches.attended import Attended
from branches.coarse import ClipBranch, XvlmBranch
from branches.fusion import AnswerModel
from branches.xvlm import Tokenizer
from drawing import scene_pictures
from drawing.scene_pictures import Mark
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
    folder: Path  # of the weights

    def open_coarse(self, paths: Mapping[str, Path] | None = None) -> images.Coarse | None:
        """What the coarse branch sees: of these images, or of all. Raises ValueError."""
        config, runtime = self.config, self.runtime
        if "coarse" not in self.model.branches:
            return None
        if self.model.xvlm is None:
            return images.clip_coarse(config, runtime, paths)
        tokenizer = Tokenizer(self.folder)
        return images.xvlm_coarse(config, runtime, self.model.xvlm.xvlm.config, tokenizer, paths)


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
    folder = checkpoints.weights_folder(folder)
    return Answerer(config, runtime, model.to(runtime.device).eval(), lexicon, folder)


def trained_options(config: VQAConfig, description: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run answers by as it was trained. Raises ValueError for those asked for that it cannot."""
    options = {name: description["options"][name] for name in DESCRIPTION["options"]}
    branches = description["model"]["branches"]
    looks = branches.get("fine", {}).get("feature_width", 0) != 0
    by_clip = options["features"] == CLIP
    if config.question_only and (looks or branches.keys() & {"coarse", "graph"}):
        raise ValueError("--question_only: this run was trained to look at images; drop it")
    options |= {"question_only": not looks and not branches.keys() & {"coarse", "graph"}, "features": None}
    options["shuffle_images"] |= config.shuffle_images
    if looks:
        options["features"] = config.features or (CLIP if by_clip else None)
    if config.sg_source not in ("none", options["sg_source"]):
        raise ValueError(f"--sg_source {config.sg_source}: this run was trained with {options['sg_source']}; drop it")
    if options["sg_source"] == "predicted" and not config.scene_graphs and config.mode not in ONE_BY_ONE:
        raise ValueError(
            "--sg_source predicted --scene_graphs DIR: this run was trained with such scene graphs, so it needs those "
            "of the images asked about"
        )
    return options


def open_for(answerer: Answerer) -> RegionFiles | None:
    """The regions that a trained model looks at. Raises ValueError if these are others than it was trained on."""
    if answerer.model.feature_width == 0:
        return None
    if answerer.config.features is None:
        raise ValueError(
            "--features PATH: this run was trained on features from files, so it needs those of the images asked about"
        )
    known = images.open_regions(answerer.config, answerer.runtime)
    assert known is not None
    check_width(answerer, known)
    return known


def check_width(answerer: Answerer, known: RegionFiles) -> None:
    """Raise ValueError if regions are others than a model was trained on."""
    if known.width != (wanted := answerer.model.feature_width):
        raise ValueError(
            f"--features {answerer.config.features}: {known.width} numbers a region; the run was trained on {wanted}"
        )


def build(
    answerer: Answerer,
    questions: Questions,
    known: RegionFiles | None,
    coarse: images.Coarse | None,
    graphs: SceneGraphs | None = None,
) -> Experiment:
    """What `outcome` measures, with one fold. Without graphs, those of the options are read."""
    config = answerer.config
    images.prepare(known, coarse, [questions])
    if graphs is None:
        graphs = images.read_graphs(config)
        for note in images.absent_graph_notes(config, [questions], graphs):
            answerer.runtime.say(f"note      {note}")
    found = Experiment(config, answerer.runtime, {}, answerer.lexicon, graphs, known, answerer.model, {}, [], coarse)
    return replace(found, folds={config.fold: found.fold(questions)})


def read(answerer: Answerer, known: RegionFiles | None, coarse: images.Coarse | None, *, whole: bool) -> Questions:
    """The questions of --fold; of GQA the unbalanced ones too where the `whole` file is to be answered."""
    config, runtime = answerer.config, answerer.runtime
    usable = images.usable(known, coarse)
    questions = read_questions(config, config.fold)
    runtime.say(f"questions {questions.source}")
    if whole and questions.records is not None:
        questions = gqa_questions(questions.records, questions.records)
    if usable is not None:
        questions, said = with_regions(questions, usable, config.bad_images == "skip", sources(config))
        if said:
            runtime.say(f"note      {said}")
    return questions


def evaluate(config: VQAConfig) -> dict[str, Any]:
    """Answer the questions of --fold and say what the answers are worth. Raises ValueError."""
    answerer = load(config)
    path = answers_path(answerer.config) if config.output else None
    known, coarse = open_for(answerer), answerer.open_coarse()
    questions = read(answerer, known, coarse, whole=False)
    if not questions.are_answered:
        raise ValueError(f"--mode evaluate: {questions.source}; --mode predict answers them")
    experiment = build(answerer, questions, known, coarse)
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
    known, coarse = open_for(answerer), answerer.open_coarse()
    questions = read(answerer, known, coarse, whole=True)
    experiment = build(answerer, questions, known, coarse)
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
    sees_pixels = by_clip or "coarse" in answerer.model.branches
    if not path.is_file() and (sees_pixels or plain_id(path.name) not in graphs):
        raise ValueError(f"--image {path}: there is no such file")
    name = path.name if by_clip else plain_id(path.name)
    coarse = answerer.open_coarse({name: path})
    if config.answers:
        answerer = choosing(answerer, coarse, [text.strip() for text in config.answers.split("|")])
    known: RegionFiles | None
    if answerer.model.feature_width and by_clip:
        known = images.clip_regions(config, answerer.runtime, {name: path})
    else:
        known = open_for(answerer)
        if known is not None and name not in known.ids:
            raise ValueError(f"--features {config.features}: has no image {name!r}")
    if picture:
        check_explainable(answerer, plain_id(name), graphs)
    questions = Questions(["1"], [name], [str(config.question)], [()])
    answerer = replace(answerer, config=replace(config, shuffle_images=False))
    experiment = build(answerer, questions, known, coarse, graphs)
    feed = experiment.folds[config.fold].feed
    chances, seen = outcome.look(answerer.model, feed, np.array([0]), config.loss)
    best = np.argsort(-chances[0])[: outcome.MOST_ANSWERS]
    found = {answerer.lexicon.answers.answers[place]: float(chances[0, place]) for place in best}
    for text, chance in found.items():
        answerer.runtime.say(f"{chance:6.3f}  {text}")
    if not experiment.sees_images:
        answerer.runtime.say("note      this run looks at no image: trained with --question_only")
    if config.sg_source != "none" and plain_id(name) not in graphs and not config.answers:
        answerer.runtime.say("note      this run was trained with scene graphs; of this image there is none")
    for note in images.graph_notes(config) if graphs else []:
        answerer.runtime.say(f"note      {note}")
    if picture:
        graph = graphs.get(plain_id(name), outcome.NO_OBJECTS)
        explain(answerer, picture, graph, {key: looks[0] for key, looks in seen.items()}, found)
    return found


def choosing(answerer: Answerer, coarse: images.Coarse | None, answers: Sequence[str]) -> Answerer:
    """The coarse branch by itself, which chooses among these answers. Raises ValueError."""
    if coarse is None:
        raise ValueError("--answers: this run has no coarse branch, which alone knows answers that it never learned")
    if len(set(answers)) < max(2, len(answers)) or "" in answers:
        raise ValueError("--answers A|B: name at least two, each once")
    branch = answerer.model.branches["coarse"]
    assert isinstance(branch, ClipBranch | XvlmBranch)
    coarse.let_choose(branch, answers)
    model = AnswerModel({"coarse": branch}, answerer.model.inputs, len(answers), answerer.config.loss)
    lexicon = replace(answerer.lexicon, answers=AnswerList(tuple(answers)))
    return replace(answerer, model=model.to(answerer.runtime.device).eval(), lexicon=lexicon)


def check_explainable(answerer: Answerer, name: str, graphs: SceneGraphs) -> None:
    """Raise ValueError, before anything is computed, if what an answer rests on cannot be shown."""
    has_graph = "graph" in answerer.config.branch_names
    if not has_graph and answerer.model.feature_width == 0:
        raise ValueError("--explain: this run looks at no region or object, so there is nothing to show; drop it")
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
