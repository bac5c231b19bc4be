"""A run of main.py as a folder for others: its fine branch as ONNX, vocabulary, answers, a card and an answer.py."""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from answering import asking, images
from answering.asking import Answerer
from answering.configs import CLIP, NOT_SAVED, OPTIONS, VQAConfig
from answering.experiment import Fold
from answering.feed import QuestionBatch
from answering.folds import read_folds
from answering.outcome import words_of
from answering.task import probabilities
from branches.fine import FineBranch
from branches.fusion import AnswerModel
from cli.parser import load_options
from inputs.transfer import chunks
from pages import answers_page
from pages.answers_page import AnswersRun, read_answers_run
from regions.clip_regions import PatchRegions
from regions.features import RegionFiles
from sharing.answer_graph import fold_weights, write_answers, write_regions
from sharing.folder import CARD, PIXELS, copy_scripts, importable, new_folder, pixel_settings, rendered, summary
from sharing.onnx_files import DISABLED
from storage.atomic import write_errors
from storage.json_files import write_json
from training import checkpoints, run_folder
from vqa.preprocess import MOST_ENTITIES, graphs_of, words_on_image
from vqa.text import WORD

SCRIPT = "answer.py"
MOST_COMPARED = 1000  # questions
AT_ONCE = 64  # of them
PLACES = ("data_root", "data_csv_path", "features", "image_base_dir", "scene_graphs")  # that may have moved


@dataclass(frozen=True)
class Compared:
    """What is found by asking the exported branch and this one the same questions."""

    source: str  # the questions, in words
    same: float  # share of them with the same answer
    furthest: float  # of all probabilities
    accuracy: float  # of the exported one
    own: float

    def lines(self) -> list[str]:
        """The same in words."""
        return [
            f"compared with the float32 branch it was made from, on {self.source}:",
            f"  the same answer to {100 * self.same:.1f} %, probabilities off by at most {self.furthest:.1g}",
            f"  accuracy {self.accuracy:.4f}, in float32 {self.own:.4f}",
        ]


def export(config: VQAConfig) -> dict[str, float]:
    """Write the fine branch of --checkpoint into the folder --output, and say how far it agrees with this one.

    Returns:
        The numbers of `Compared`; nothing if the questions of the run's test fold are no longer there.

    Raises:
        ValueError: it cannot be exported. OSError: the folder cannot be written.
    """
    target = Path(str(config.output))
    loaded = asking.load(replace(config, device="cpu"))
    answerer = alone(loaded, config.branches)
    folder = checkpoints.weights_folder(Path(str(config.checkpoint))).resolve().parent
    run = read_answers_run(folder) if (folder / run_folder.RESULTS_FILE).exists() else None
    branch = cast(FineBranch, answerer.model.branches["fine"])
    fold_weights(branch)
    with new_folder(target) as new:
        with write_errors(target):
            write_branch(answerer, branch, new)
        try:
            found = compare(answerer, new, run_options(config, folder))
            said = found.lines()
        except ValueError as error:  # what is written does not depend on it
            found, said = None, [f"not compared with the run: {error}"]
        with write_errors(target):
            card = card_of(answerer, run, found, list(loaded.model.branches))
            (new / CARD).write_text(card, encoding="utf-8", errors="replace")
    print("\n".join([summary(target, config.precision), *said]))
    return {} if found is None else {name: value for name, value in vars(found).items() if name != "source"}


def alone(answerer: Answerer, wanted: str | None) -> Answerer:
    """The same with its fine branch alone.

    Args:
        wanted: the branch that was asked for by name; None: the run.

    Raises:
        ValueError: that is another one, or several.
    """
    names = list(answerer.model.branches)
    if wanted not in (None, "fine"):
        raise ValueError(f"--branches {wanted}: the fine branch alone can be exported")
    if "fine" not in names:
        raise ValueError(
            f"--mode export: this run answers by {' and '.join(names)}; the fine branch alone can be exported"
        )
    if len(names) > 1 and wanted is None:
        raise ValueError(
            f"--mode export: this run answers by {', '.join(names[:-1])} and {names[-1]} together, which cannot be "
            "exported; --branches fine exports the fine branch alone, whose answers are others"
        )
    branch = answerer.model.branches["fine"]
    model = AnswerModel({"fine": branch}, answerer.model.inputs, len(answerer.lexicon.answers), answerer.config.loss)
    return replace(answerer, model=model.eval())


def run_options(config: VQAConfig, folder: Path) -> VQAConfig:
    """The options by which a run has read its questions, with places that flags name. Raises ValueError."""
    saved = load_options(folder / run_folder.CONFIG_FILE, OPTIONS, not_saved=NOT_SAVED, flag="--checkpoint")
    moved = {name: getattr(config, name) for name in PLACES if getattr(config, name) is not None}
    ours: dict[str, Any] = {"branches": "fine", "checkpoint": None, "config": None, "coarse": None, "repeats": 1}
    return VQAConfig(**{**saved, **moved, **ours, "device": "cpu", "cache_dir": config.cache_dir})


def write_branch(answerer: Answerer, branch: FineBranch, folder: Path) -> None:
    """Fill a folder with all that answer.py reads, and itself. Raises ValueError for what cannot be exported."""
    config, lexicon = answerer.config, answerer.lexicon
    described = config.num_stat_word if branch.looks and config.sg_source != "none" else 0
    settings: dict[str, Any] = {
        "question": {"pattern": WORD.pattern, "words": config.question_len, "entities": MOST_ENTITIES},
        "regions": None,
        "decode": None,
        "views": None,
        "session": {"disabled_optimizers": DISABLED.get(config.precision, [])},
    }
    if branch.looks:
        settings["regions"] = {"most": config.max_boxes, "width": branch.feature_width, "described": described}
        settings["regions"]["of_each_kind"] = config.topk if described else 0
    copy_scripts(folder, SCRIPT)
    if branch.looks and config.features == CLIP:
        known = images.clip_regions(config, answerer.runtime, {})
        asking.check_width(answerer, known)
        write_regions(known, folder, config.precision)
        settings |= {**pixel_settings(known.views), "boxes": known.boxes.tolist()}
        copy_scripts(folder, PIXELS)
    write_json(folder / "preprocess.json", settings)
    words = {"words": lexicon.words.words, "entities": sorted(lexicon.entities), "answers": lexicon.answers.answers}
    write_json(folder / "vocabulary.json", words)
    write_answers(
        branch, folder, config.precision, loss=config.loss, question_len=config.question_len, described=described
    )


def compare(answerer: Answerer, folder: Path, config: VQAConfig) -> Compared:
    """Ask both the first questions of the run's test fold. Raises ValueError if these cannot be read."""
    known = images.open_regions(config, answerer.runtime)
    if known is not None:
        asking.check_width(replace(answerer, config=config), known)
    name = config.measured_fold
    questions = read_folds(config, images.usable(known, None)).questions[name]
    questions = questions.of(range(min(len(questions), MOST_COMPARED)))
    experiment = asking.build(replace(answerer, config=config), questions, known, None)
    fold = experiment.folds[config.fold]

    def compute(model: AnswerModel, batch: QuestionBatch) -> dict[str, Tensor]:
        return {"probabilities": probabilities(model(**batch.inputs)[:, 0], config.loss)}

    own_QA = fold.predict(answerer.model, config.batch_size, compute, answerer.runtime)["probabilities"]
    described = {
        image: " ".join(words_on_image(graph, config.topk))
        for image, graph in graphs_of(questions, experiment.graphs).items()
    }
    found_QA = ask_exported(folder, fold, known, described)
    answers = [words_of(experiment, values.argmax(axis=1)) for values in (found_QA, own_QA)]
    fold_name = {"test": "test", "val": "validation"}[name]
    return Compared(
        f"{len(questions):,} questions of the run's {fold_name} fold",
        float(np.mean([one == other for one, other in zip(*answers, strict=True)])),
        float(np.abs(found_QA - own_QA).max()),
        *(float(questions.score(given).mean()) for given in answers),
    )


def ask_exported(
    folder: Path, fold: Fold, known: RegionFiles | None, described: Mapping[str, str]
) -> NDArray[np.float32]:
    """(Q, A) probabilities that answer.py gives. `described`: words on images, of those that have a scene graph."""
    with importable(folder):
        other = runpy.run_path(str(folder / SCRIPT))["Answerer"](folder)
    parts = []
    for rows in chunks(np.arange(len(fold.questions)), AT_ONCE):
        names = [fold.table.images[row] for row in rows]
        seen = {name: look(other, known, name) for name in dict.fromkeys(names)} if known is not None else {}
        texts = [fold.questions.texts[row] for row in rows]
        parts.append(other.answer(texts, [seen.get(name) for name in names], [described.get(n, "") for n in names]))
    return np.concatenate(parts)


def look(other: Any, known: RegionFiles, name: str) -> Any:
    """The regions of an image as answer.py takes them, which reads .npz files alone."""
    return other.look(known.paths[name]) if isinstance(known, PatchRegions) else tuple(known.read(name))


def card_of(answerer: Answerer, run: AnswersRun | None, found: Compared | None, branches: Sequence[str]) -> str:
    """What the branch is, what it is worth, and how it is used. `branches`: of the whole run."""
    config, width = answerer.config, answerer.model.feature_width
    sees = "nothing" if width == 0 else "pixels" if config.features == CLIP else "features"
    return rendered(
        "answer_card.md.j2",
        run=run,
        about=answers_page.about(without_paths(run.options), run.provenance) if run else [],
        table=answers_page.floors_table(run) if run else None,
        precision=config.precision,
        compared=found.lines() if found else [],
        answers=len(answerer.lexicon.answers),
        sees=sees,
        image="cat.jpg" if sees == "pixels" else "cat.npz",
        width=width,
        described=config.topk if width and config.sg_source != "none" else 0,
        branches=branches,
    )


def without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run, of files only their names."""
    found = {name: Path(str(options[name])).name for name in ("data_csv_path", "features") if options.get(name)}
    return {**options, **found}
