"""The parts of one run: folds of questions, regions, model. Built from the options, complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from answering import images
from answering.configs import VQAConfig
from answering.feed import QuestionFeed
from answering.folds import read_folds
from branches.fine import FineBranch
from regions.features import RegionFiles
from training import devices, loop, optim
from vqa.preprocess import Lexicon, QuestionTable, SceneGraphs, number_questions, prepare
from vqa.questions import Questions
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
        self, model: FineBranch, batch_size: int, compute: Any, runtime: devices.Runtime, **hooks: Any
    ) -> dict[str, np.ndarray]:
        """What a model computes of all questions, named (Q, ...) arrays; `hooks` are those of `loop.predict`."""
        parts = self.feed.parts(MORE_AT_ONCE * batch_size)
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
    model: FineBranch
    arguments: Mapping[str, Any]  # that `FineBranch` builds the model again from
    notes: list[str]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps."""
        return optim.num_optimizer_steps(
            len(self.folds["train"].table),
            batch_size=self.config.batch_size,
            accumulation=self.config.batches_per_step,
        )


def build_experiment(config: VQAConfig, runtime: devices.Runtime) -> Experiment:
    """Read the data, build the model, and prepare the batches. Raises ValueError for what cannot work."""
    devices.seed_everything(config.seed)
    if config.demo:
        with runtime.main_first():
            config = images.find_demo(config, runtime)
    known = images.open_regions(config, runtime)
    data = read_folds(config, None if known is None else known.ids)
    images.prepare(known, data.questions.values())
    graphs = images.read_graphs(config)
    with runtime.main_first():
        lexicon, tables = prepare(
            data.questions,
            graphs,
            Path(config.cache_dir) / "questions",
            least_answers=config.num_answered,
            **table_sizes(config),
        )
    folds = {
        name: build_fold(config, questions, shuffled(config, tables[name]), known, runtime)
        for name, questions in data.questions.items()
    }
    width = 0 if known is None else known.width
    model, arguments, said = build_model(config, lexicon, folds["train"].table, width)
    model.recomputes = config.memory_efficient_attention
    notes = data.notes + said + images.graph_notes(config)
    return Experiment(config, runtime, folds, lexicon, graphs, known, model.to(runtime.device), arguments, notes)


def table_sizes(config: VQAConfig) -> dict[str, int]:
    """How much of each question and image is read."""
    return {"question_len": config.question_len, "num_stat_word": config.num_stat_word, "topk": config.topk}


def shuffled(config: VQAConfig, table: QuestionTable) -> QuestionTable:
    """With --shuffle_images, each image of a fold in another one's place."""
    return table.shuffled(config.seed) if config.shuffle_images else table


def number(config: VQAConfig, questions: Questions, lexicon: Lexicon, graphs: SceneGraphs) -> QuestionTable:
    """More questions as numbers."""
    return shuffled(config, number_questions(questions, lexicon, graphs, **table_sizes(config)))


def build_fold(
    config: VQAConfig, questions: Questions, table: QuestionTable, known: RegionFiles | None, runtime: devices.Runtime
) -> Fold:
    """Questions with what makes batches of them."""
    feed = QuestionFeed(table, known, max_boxes=config.max_boxes, device=runtime.device, share=runtime.share)
    return Fold(questions, table, feed)


def build_model(
    config: VQAConfig, lexicon: Lexicon, table: QuestionTable, feature_width: int
) -> tuple[FineBranch, dict[str, Any], list[str]]:
    """The fine branch with fresh weights, the arguments it is built from, and what to say of its words."""
    vectors, note = None, "words     vectors are learned from the start; --glove FILE starts from given ones"
    if config.glove:
        vectors, count = read_glove(Path(config.glove), lexicon.words)
        note = f"words     {count:,} of {len(lexicon.words):,} have a vector in {Path(config.glove).name}"
    arguments: dict[str, Any] = {
        "num_words": len(lexicon.words),
        "num_answers": len(lexicon.answers),
        "feature_width": feature_width,
        "embed_dim": EMBED_DIM if vectors is None else vectors.shape[1],
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
    model = FineBranch(**arguments)
    assert table.targets_QA is not None
    with torch.no_grad():
        own = model.encode.first_vectors().numpy() if vectors is None else vectors
        company = cooccurrence(table.words_QN, len(lexicon.words)) @ own if config.tfidf else None
        model.encode.start_from(
            torch.from_numpy(own).clone(), None if company is None else torch.from_numpy(company).float()
        )
        model.expect(torch.from_numpy(np.asarray(table.targets_QA.mean(axis=0))), config.loss)
    return model, arguments, [note]
