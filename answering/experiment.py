"""The parts of one run: folds of questions, regions, model. Built from the options, complete."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from answering import images
from answering.configs import VQAConfig
from answering.feed import QuestionFeed
from answering.folds import read_folds
from branches.coarse import ClipBranch, XvlmBranch
from branches.fine import FineBranch
from branches.fusion import AnswerModel
from branches.graph import GraphBranch
from regions.features import RegionFiles
from regions.whole_images import ClipEmbeddings
from training import devices, loop, optim
from vqa.preprocess import Lexicon, QuestionTable, SceneGraphs, graphs_of, number_questions, prepare
from vqa.questions import Questions
from vqa.scene_graph import number_graph
from vqa.text import cooccurrence, read_glove

EMBED_DIM = 300  # of a word where no vectors are given
MORE_AT_ONCE = 4  # times as many questions where nothing is kept for a backward pass
COUNTED = 10  # regions that the counter looks at, as Zhang et al. do


@dataclass(frozen=True)
class Fold:
    """Questions of one fold, and what makes batches of them."""

    questions: Questions
    table: QuestionTable
    feed: QuestionFeed

    def predict(
        self,
        model: AnswerModel,
        batch_size: int,
        compute: Any,
        runtime: devices.Runtime,
        rows: np.ndarray | None = None,
        **hooks: Any,
    ) -> dict[str, np.ndarray]:
        """What a model computes of the questions in these rows, all for None: named (Q, ...) arrays in order of rows.

        `hooks` are those of `loop.predict`.
        """
        parts = self.feed.parts(MORE_AT_ONCE * batch_size)
        if rows is not None:
            parts = [some for part in parts if len(some := part[np.isin(part, rows)])]
        found = loop.predict(model, self.feed.batches(parts), compute, runtime=runtime, **hooks)
        back = np.argsort(np.concatenate(parts))
        return {name: values[back] for name, values in found.items()}


@dataclass(frozen=True)
class Experiment:
    """The parts of one run."""

    config: VQAConfig  # for the demo, with the paths to its data
    runtime: devices.Runtime
    folds: Mapping[str, Fold]  # "train", "val", which chooses the epoch, and "test"
    lexicon: Lexicon
    graphs: SceneGraphs
    regions: RegionFiles | None
    model: AnswerModel
    arguments: Mapping[str, Any]  # that `AnswerModel.build` builds the model again from
    notes: list[str]
    coarse: images.Coarse | None = None

    @property
    def has_frozen_xvlm(self) -> bool:
        """Whether an X-VLM answers that is not trained."""
        return self.model.xvlm is not None and self.model.xvlm.is_frozen

    @property
    def constant(self) -> Collection[str]:
        """Names of the weights that are never trained."""
        names = self.model.state_dict() if self.has_frozen_xvlm else {}
        return {name for name in names if name.startswith("branches.coarse.")}

    @property
    def sees_images(self) -> bool:
        """Whether anything is known of images."""
        return self.regions is not None or self.coarse is not None or "graph" in self.config.branch_names

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps."""
        return optim.num_optimizer_steps(
            len(self.folds["train"].table),
            batch_size=self.config.batch_size,
            accumulation=self.config.batches_per_step,
        )

    def fold(self, questions: Questions, table: QuestionTable | None = None) -> Fold:
        """Questions as numbers, if they are not yet, with what makes batches of them."""
        config, runtime, lexicon = self.config, self.runtime, self.lexicon
        table = number(config, questions, lexicon, self.graphs) if table is None else table
        coarse = None if self.coarse is None else self.coarse.inputs(questions.texts, table, lexicon.answers.answers)
        feed = QuestionFeed(
            table,
            self.regions,
            max_boxes=config.max_boxes,
            device=runtime.device,
            share=runtime.share,
            coarse=coarse,
        )
        return Fold(questions, table, feed)


def build_experiment(config: VQAConfig, runtime: devices.Runtime) -> Experiment:
    """Read the data, build the model, and prepare the batches. Raises ValueError for what cannot work."""
    devices.seed_everything(config.seed)
    if config.demo:
        with runtime.main_first():
            config = images.find_demo(config, runtime)
    config = replace(config, branches=",".join(config.branch_names))
    known, coarse = images.open_regions(config, runtime), images.open_coarse(config, runtime)
    data = read_folds(config, images.usable(known, coarse))
    images.prepare(known, coarse, data.questions.values())
    graphs = images.read_graphs(config)
    with runtime.main_first():
        lexicon, tables = prepare(
            data.questions,
            graphs,
            Path(config.cache_dir) / "questions",
            least_answers=config.num_answered,
            whole_graphs="graph" in config.branch_names,
            **table_sizes(config),
        )
    tables = {name: finish(config, data.questions[name], table, lexicon, graphs) for name, table in tables.items()}
    width = 0 if known is None else known.width
    model, arguments, said = build_model(config, lexicon, tables["train"], width, coarse)
    model = model.to(runtime.device)
    if coarse is not None and model.xvlm is not None and model.xvlm.is_frozen and not config.dry_run:
        coarse.frozen = model.xvlm
    notes = data.notes + said + images.graph_notes(config)
    notes += images.absent_graph_notes(config, data.questions.values(), graphs)
    experiment = Experiment(config, runtime, {}, lexicon, graphs, known, model, arguments, notes, coarse)
    folds = {name: experiment.fold(questions, tables[name]) for name, questions in data.questions.items()}
    return replace(experiment, folds=folds)


def table_sizes(config: VQAConfig) -> dict[str, int]:
    """How much of each question and image is read."""
    return {"question_len": config.question_len, "num_stat_word": config.num_stat_word, "topk": config.topk}


def finish(
    config: VQAConfig, questions: Questions, table: QuestionTable, lexicon: Lexicon, graphs: SceneGraphs
) -> QuestionTable:
    """With the scene graphs that the graph branch reads; under --shuffle_images, each image in another one's place."""
    if "graph" in config.branch_names:
        known = graphs_of(questions, graphs)
        table = replace(table, graphs={image: number_graph(graph, lexicon.words) for image, graph in known.items()})
    return table.shuffled(config.seed) if config.shuffle_images else table


def number(config: VQAConfig, questions: Questions, lexicon: Lexicon, graphs: SceneGraphs) -> QuestionTable:
    """More questions as numbers."""
    table = number_questions(questions, lexicon, graphs, **table_sizes(config))
    return finish(config, questions, table, lexicon, graphs)


def build_model(
    config: VQAConfig, lexicon: Lexicon, table: QuestionTable, feature_width: int, coarse: images.Coarse | None
) -> tuple[AnswerModel, dict[str, Any], list[str]]:
    """The model with fresh weights, the arguments it is built from, and what to say of its words."""
    vectors, note = None, "words     vectors are learned from the start; --glove FILE starts from given ones"
    if config.glove:
        vectors, count = read_glove(Path(config.glove), lexicon.words)
        note = f"words     {count:,} of {len(lexicon.words):,} have a vector in {Path(config.glove).name}"
    words = {"num_words": len(lexicon.words), "embed_dim": EMBED_DIM if vectors is None else vectors.shape[1]}
    answers = lexicon.answers.answers
    of_branch = {
        "fine": words | fine_arguments(config, feature_width),
        "graph": words | graph_arguments(config),
        "coarse": {} if coarse is None else coarse_arguments(config, coarse, answers),
    }
    arguments: dict[str, Any] = {
        "branches": {name: of_branch[name] for name in config.branch_names},
        "num_answers": len(lexicon.answers),
        "loss": config.loss,
    }
    model = AnswerModel.build(**arguments)
    assert table.targets_QA is not None
    right_A = torch.from_numpy(np.asarray(table.targets_QA.mean(axis=0)))
    for branch in model.branches.values():
        assert isinstance(branch, FineBranch | GraphBranch | ClipBranch | XvlmBranch)
        branch.expect(right_A, config.loss)
        if isinstance(branch, FineBranch):
            branch.recomputes = config.memory_efficient_attention
            start_words(branch, vectors, table, company=config.tfidf)
        elif isinstance(branch, GraphBranch) and vectors is not None:
            branch.start_from(torch.from_numpy(vectors))
    if coarse is not None:
        start_coarse(config, model, coarse, answers)
    return model, arguments, [note]


def start_coarse(config: VQAConfig, model: AnswerModel, coarse: images.Coarse, answers: Sequence[str]) -> None:
    """Let the coarse branch start from what has been learnt before. Raises ValueError."""
    branch = model.branches["coarse"]
    if isinstance(branch, ClipBranch):
        branch.start_from(coarse.embedded(answers))
    elif isinstance(branch, XvlmBranch):
        branch.xvlm.recomputes = config.memory_efficient_attention
        coarse.let_choose(branch, answers)
        branch.start_from(Path(str(config.checkpoint)))


def start_words(branch: FineBranch, vectors: np.ndarray | None, table: QuestionTable, *, company: bool) -> None:
    """Let words start from given vectors, or from those they have, and from the company they keep."""
    own = branch.encode.first_vectors().detach().numpy() if vectors is None else vectors
    second = cooccurrence(table.words_QN, len(own)) @ own if company else None
    branch.encode.start_from(
        torch.from_numpy(own).clone(), None if second is None else torch.from_numpy(second).float()
    )


def fine_arguments(config: VQAConfig, feature_width: int) -> dict[str, Any]:
    """Those of `FineBranch` that options say."""
    return {
        "feature_width": feature_width,
        "width": config.num_hid,
        "glimpses": config.gamma,
        "layers": config.AOA_layers,
        "activation": config.activation,
        "dropout": config.dropout,
        "omega_q": config.omega_q,
        "omega_v": config.omega_v,
        "second_embedding": config.tfidf,
        "count_objects": COUNTED if config.use_counter else 0,
    }


def coarse_arguments(config: VQAConfig, coarse: images.Coarse, answers: Sequence[str]) -> dict[str, Any]:
    """Those of `ClipBranch`, or of `XvlmBranch`."""
    if coarse.xvlm is None:
        assert isinstance(coarse.images, ClipEmbeddings)
        sizes = {"embed_dim": coarse.images.width, "width": config.num_hid}
        return {"kind": "clip", **sizes, "dropout": config.dropout}
    return {
        "kind": "xvlm",
        "answer_tokens": coarse.tokens(answers).shape[1],
        "config": asdict(coarse.xvlm),
        "loss": config.loss,
        "is_frozen": config.xvlm_lr == 0,
    }


def graph_arguments(config: VQAConfig) -> dict[str, Any]:
    """Those of `GraphBranch` that options say."""
    return {
        "width": config.general_hidden_dim,
        "layers": config.mgat_layers,
        "sampler": config.sampler_type,
        "sample_k": config.sample_k,
        "num_samples": config.nb_samples,
        "alpha": config.alpha,
        "beta": config.beta,
        "tau": config.tau,
        "use_instruction": bool(config.use_instruction),
        "use_masking": bool(config.use_masking),
        "use_mgat": bool(config.use_mgat),
        "dropout": config.dropout,
    }
