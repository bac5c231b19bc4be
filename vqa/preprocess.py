"""What a model is given to read, made of the official files alone: numbers of words, entities, words on images.

Public programs for these data sets ask for derived files that nobody can make again. Here everything follows from the
questions of the training fold and, if there are any, from scene graphs. It takes seconds, and is done in every run.

Shapes: Q questions, N words, E entities, W words on an image, A answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from storage.json_files import schema_mismatch
from storage.messages import quoted
from vqa.questions import Questions, plain_id, read_large_json
from vqa.targets import AnswerList, build_answer_list, target_matrix
from vqa.text import Vocabulary, build_vocabulary, words_of

MOST_ENTITIES = 7  # of a question
# Words of answers that name nothing to be seen.
NO_ENTITIES = frozenset(("a", "and", "at", "in", "no", "not", "of", "on", "the", "to", "with", "yes"))
BOX = dict.fromkeys(("x", "y", "w", "h"), (int, float))
GRAPH = {"objects": {str: {"name": str, **BOX, "attributes": list, "relations": list}}}

SceneGraphs = Mapping[str, Mapping[str, Any]]  # image -> as in the official files


@dataclass(frozen=True)
class Lexicon:
    """What the numbers mean that a model reads and gives."""

    words: Vocabulary
    entities: frozenset[str]  # words that name something to be seen
    answers: AnswerList


@dataclass(frozen=True)
class QuestionTable:
    """All questions of a fold, as numbers."""

    words_QN: NDArray[np.int32]  # 0: none, on the right
    entities_QE: NDArray[np.int32]
    images: Sequence[str]  # (Q,) the id of each question's image
    descriptions: Mapping[str, NDArray[np.int32]]  # image -> (W,) words that describe it
    targets_QA: scipy.sparse.csr_array | None  # the accuracy of each answer; None: unknown

    def __len__(self) -> int:
        return len(self.words_QN)

    @property
    def lengths_Q(self) -> NDArray[np.int64]:
        """Words of each question."""
        return (self.words_QN > 0).sum(axis=1)

    def shuffled(self, seed: int) -> QuestionTable:
        """The same questions, those on one image all about another one, which is drawn by chance."""
        order = np.random.default_rng(seed).permutation(sorted(set(self.images))).tolist()
        other = dict(zip(order, order[1:] + order[:1], strict=True))
        return replace(self, images=[other[image] for image in self.images])


def read_scene_graphs(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Scene graphs in the official form of GQA, from several files. Raises ValueError, in one line."""
    graphs: dict[str, dict[str, Any]] = {}
    for path in paths:
        found = read_large_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path}: is no object of scene graphs by their images, as GQA's files are")
        for image, graph in found.items():
            if said := schema_mismatch(graph, GRAPH) or parts_mismatch(graph):
                raise ValueError(f"{path}: scene graph {quoted(image)}: {said}")
            graphs[plain_id(image)] = graph
    return graphs


def parts_mismatch(graph: Mapping[str, Any]) -> str:
    """What of the lists in a scene graph is not as it should be, in words; "" if all is. They may be empty."""
    for entry in graph["objects"].values():
        for key, shape in (("attributes", str), ("relations", {"name": str, "object": str})):
            if entry[key] and (said := schema_mismatch(entry[key], [shape, ...], key)):
                return said
    return ""


def words_on_image(graph: Mapping[str, Any], topk: int) -> list[str]:
    """The most frequent names, attributes and relations in a scene graph, up to `topk` of each, as words."""
    objects = graph["objects"].values()
    kinds: tuple[Iterable[str], ...] = (
        (entry["name"] for entry in objects),
        (attribute for entry in objects for attribute in entry["attributes"]),
        (relation["name"] for entry in objects for relation in entry["relations"]),
    )
    phrases = [phrase for kind in kinds for phrase, _ in Counter(kind).most_common(topk)]
    return [word for phrase in phrases for word in words_of(phrase)]


def build_lexicon(questions: Questions, graphs: SceneGraphs, *, least_answers: int, topk: int) -> Lexicon:
    """Words, entities and answers of a training fold.

    Entities are the words by which scene graphs name objects or, without graphs, those of the answers that people gave.

    Args:
        least_answers: questions that an answer must be given to, to be in the list.

    Raises:
        ValueError: no answer is.
    """
    own = [graphs[image] for image in dict.fromkeys(questions.images) if image in graphs]
    descriptions = [" ".join(words_on_image(graph, topk)) for graph in own]
    answers = build_answer_list(questions.answers, least=least_answers, spelling=questions.spelling)
    named = [entry["name"] for graph in own for entry in graph["objects"].values()] or answers.answers
    entities = {word for name in named for word in words_of(name) if word not in NO_ENTITIES and not word.isdigit()}
    return Lexicon(build_vocabulary([*questions.texts, *descriptions]), frozenset(entities), answers)


def number_questions(
    questions: Questions,
    lexicon: Lexicon,
    graphs: SceneGraphs,
    *,
    question_len: int,
    num_stat_word: int,
    topk: int,
) -> QuestionTable:
    """A fold as numbers."""
    named = [
        " ".join([word for word in words_of(text) if word in lexicon.entities][:MOST_ENTITIES])
        for text in questions.texts
    ]
    known = [image for image in dict.fromkeys(questions.images) if image in graphs]
    rows = lexicon.words.encode([" ".join(words_on_image(graphs[image], topk)) for image in known], num_stat_word)
    return QuestionTable(
        lexicon.words.encode(questions.texts, question_len),
        lexicon.words.encode(named, MOST_ENTITIES),
        questions.images,
        {image: row[: max(1, np.count_nonzero(row))] for image, row in zip(known, rows, strict=True)},
        target_matrix(questions.answers, lexicon.answers, questions.spelling) if questions.are_answered else None,
    )
