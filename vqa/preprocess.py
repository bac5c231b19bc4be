"""What a model is given to read, made of the official files alone: numbers of words, entities, words on images.

Public programs for these data sets ask for derived files that nobody can make again. Here everything follows from the
questions of the training fold and, if there are any, from scene graphs; once, for it is kept in a file that is found
again by what went into it.

Shapes: Q questions, N words, E entities, W words on an image, A answers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from storage.atomic import atomic_write
from storage.json_files import NUMBER, schema_mismatch
from storage.messages import quoted
from vqa.questions import Questions, plain_id, read_large_json
from vqa.scene_graph import GraphNumbers
from vqa.targets import AnswerList, build_answer_list, target_matrix
from vqa.text import Vocabulary, build_vocabulary, words_of

MOST_ENTITIES = 7  # of a question
# Words of answers that name nothing to be seen.
NO_ENTITIES = frozenset(("a", "and", "at", "in", "no", "not", "of", "on", "the", "to", "with", "yes"))
VERSION = 1  # of the files that are kept; another one where the same questions give other numbers
MOST_KEPT = 8  # files; a new one takes the place of that which was used longest ago
MOST_PIXELS = 1_000_000  # of a side of an image, or of how far a box of a scene graph may lie from its corner
BOX = dict.fromkeys(("x", "y", "w", "h"), NUMBER)
GRAPH = {"objects": {str: {"name": str, **BOX, "attributes": list, "relations": list}}}

SceneGraphs = Mapping[str, Mapping[str, Any]]  # the plain id of an image -> as in the official files


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
    graphs: Mapping[str, GraphNumbers] | None = None  # image -> its scene graph; None: nothing reads them

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
            if said := schema_mismatch(graph, GRAPH) or sizes_mismatch(graph) or parts_mismatch(graph):
                raise ValueError(f"{path}: scene graph {quoted(image)}: {said}")
            graphs[plain_id(image)] = graph
    return graphs


def sizes_mismatch(graph: Mapping[str, Any]) -> str:
    """Which size, of the image if there is one or of a box, cannot be, in words; "" if all can."""
    for key in ("width", "height"):
        if key in graph and not (isinstance(graph[key], NUMBER) and 0 < graph[key] <= MOST_PIXELS):
            return f"{key!r} is no number of pixels above 0, up to {MOST_PIXELS:,}"
    for name, entry in graph["objects"].items():
        for key, least in (("x", -MOST_PIXELS), ("y", -MOST_PIXELS), ("w", 0), ("h", 0)):
            if not least <= entry[key] <= MOST_PIXELS:
                return f"{quoted(f'objects.{name}.{key}')} is not within {least:,} and {MOST_PIXELS:,} pixels"
    return ""


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


def graphs_of(questions: Questions, graphs: SceneGraphs) -> SceneGraphs:
    """The scene graphs of the images that are asked about, by the names that these have there."""
    plain = {image: plain_id(image) for image in dict.fromkeys(questions.images)}
    return {image: graphs[name] for image, name in plain.items() if name in graphs}


def all_words(graph: Mapping[str, Any]) -> str:
    """Every name, attribute and relation in a scene graph."""
    objects = graph["objects"].values()
    relations = (relation["name"] for entry in objects for relation in entry["relations"])
    return " ".join([*(word for entry in objects for word in (entry["name"], *entry["attributes"])), *relations])


def build_lexicon(
    questions: Questions, graphs: SceneGraphs, *, least_answers: int, topk: int, whole_graphs: bool = False
) -> Lexicon:
    """Words, entities and answers of a training fold.

    Entities are the words by which scene graphs name objects or, without graphs, those of the answers that people gave.

    Args:
        least_answers: questions that an answer must be given to, to be in the list.
        whole_graphs: all words of scene graphs are to be known, not only those of `words_on_image`.

    Raises:
        ValueError: no answer is.
    """
    own = list(graphs_of(questions, graphs).values())
    descriptions = [all_words(graph) if whole_graphs else " ".join(words_on_image(graph, topk)) for graph in own]
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
    known = graphs_of(questions, graphs)
    rows = lexicon.words.encode([" ".join(words_on_image(graph, topk)) for graph in known.values()], num_stat_word)
    return QuestionTable(
        lexicon.words.encode(questions.texts, question_len),
        lexicon.words.encode(named, MOST_ENTITIES),
        questions.images,
        {image: row[: max(1, np.count_nonzero(row))] for image, row in zip(known, rows, strict=True)},
        target_matrix(questions.answers, lexicon.answers, questions.spelling) if questions.are_answered else None,
    )


def prepare(
    questions: Mapping[str, Questions],
    graphs: SceneGraphs,
    folder: Path,
    *,
    least_answers: int,
    question_len: int,
    num_stat_word: int,
    topk: int,
    whole_graphs: bool = False,
) -> tuple[Lexicon, dict[str, QuestionTable]]:
    """The lexicon of the fold "train" and every fold as numbers, from a file in the folder or computed and kept there.

    Raises:
        ValueError: as `build_lexicon`.
        NotWritten: the folder cannot be written.
    """
    sizes = {"question_len": question_len, "num_stat_word": num_stat_word, "topk": topk}
    answered = {"least_answers": least_answers, "whole_graphs": whole_graphs}
    path = folder / f"{content_key(questions, graphs, {**sizes, **answered})}.safetensors"
    with suppress(FileNotFoundError, SafetensorError):
        found = read_prepared(path, questions)
        path.touch()
        return found
    lexicon = build_lexicon(
        questions["train"], graphs, least_answers=least_answers, topk=topk, whole_graphs=whole_graphs
    )
    tables = {name: number_questions(fold, lexicon, graphs, **sizes) for name, fold in questions.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_prepared(path, lexicon, tables)
    for old in sorted(folder.glob("*.safetensors"), key=lambda each: each.stat().st_mtime)[:-MOST_KEPT]:
        old.unlink(missing_ok=True)
    return lexicon, tables


def content_key(questions: Mapping[str, Questions], graphs: SceneGraphs, sizes: Mapping[str, int]) -> str:
    """A hash of all that the numbers depend on."""
    digest = hashlib.sha256(json.dumps([VERSION, MOST_ENTITIES, sizes]).encode())
    for name, fold in questions.items():
        digest.update(json.dumps([name, fold.records is None, fold.images, fold.texts, fold.answers]).encode())
        for entry in graphs_of(fold, graphs).items():
            digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def write_prepared(path: Path, lexicon: Lexicon, tables: Mapping[str, QuestionTable]) -> None:
    """Keep a lexicon and tables in a file. Raises NotWritten."""
    arrays: dict[str, NDArray[Any]] = {}
    described = {}
    for name, table in tables.items():
        rows = list(table.descriptions.values())
        ends = np.cumsum([0, *map(len, rows)])
        parts = {"words": table.words_QN, "entities": table.entities_QE, "ends": ends}
        parts["descriptions"] = np.concatenate([*rows, np.empty(0, dtype=np.int32)])
        if table.targets_QA is not None:
            parts |= {part: getattr(table.targets_QA, part) for part in ("data", "indices", "indptr")}
        arrays |= {f"{name}.{part}": np.ascontiguousarray(values) for part, values in parts.items()}
        described[name] = list(table.descriptions)
    known = [lexicon.words.words, sorted(lexicon.entities), lexicon.answers.answers, described]
    atomic_write(path, lambda temporary: save_file(arrays, temporary, {"lexicon": json.dumps(known)}))


def read_prepared(path: Path, questions: Mapping[str, Questions]) -> tuple[Lexicon, dict[str, QuestionTable]]:
    """What `write_prepared` has kept of these questions. Raises FileNotFoundError, SafetensorError."""
    with safe_open(path, framework="np") as file:
        words, entities, answers, described = json.loads(file.metadata()["lexicon"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    lexicon = Lexicon(Vocabulary(tuple(words)), frozenset(entities), AnswerList(tuple(answers)))
    tables = {}
    for name, fold in questions.items():
        own = {key.removeprefix(f"{name}."): values for key, values in arrays.items() if key.startswith(f"{name}.")}
        rows = [own["descriptions"][start:end] for start, end in pairwise(own["ends"])]
        targets = None
        if "data" in own:
            given = (own["data"], own["indices"], own["indptr"])
            targets = scipy.sparse.csr_array(given, shape=(len(fold), len(answers)))
        tables[name] = QuestionTable(
            own["words"], own["entities"], fold.images, dict(zip(described[name], rows, strict=True)), targets
        )
    return lexicon, tables
