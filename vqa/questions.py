"""Questions about images, and what people answered, from the official files of VQA v2 and GQA or from a table."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import tables
from storage.json_files import schema_mismatch
from storage.messages import first_five, one_line, quoted
from storage.plain_files import check_plain_file
from vqa.answers import accuracy, normalise
from vqa.gqa_metrics import kinds_of

MOST_BYTES = 4 * 2**30  # of a file of questions; the largest of GQA has 1.5e9
GQA_RECORD = {
    "question": str,
    "imageId": str,
    "isBalanced": bool,
}
GQA_ANSWERED = {
    "answer": str,
    "groups": dict,
    "entailed": list,
    "types": {"structural": str, "semantic": str, "detailed": str},
    "semantic": list,
}


@dataclass(frozen=True)
class Questions:
    """Questions of one fold, in the order of their file."""

    ids: list[str]
    images: list[str]  # id or file name of each question's image
    texts: list[str]
    answers: list[tuple[str, ...]]  # what people said to each; () where that is unknown
    kinds: dict[str, list[str]] = field(default_factory=dict)  # what accuracy is told by: "answer type" -> each one's
    records: Mapping[str, Mapping[str, Any]] | None = None  # of GQA, as its measures need them, with unbalanced ones
    source: str = ""  # what was read, in words

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def are_answered(self) -> bool:
        """Whether people's answers are known."""
        return any(self.answers)

    @property
    def spelling(self) -> Callable[[str], str]:
        """The form in which answers are compared: GQA compares them letter by letter."""
        return normalise if self.records is None else str

    def score(self, predictions: Sequence[str]) -> NDArray[np.float64]:
        """(Q,) how right an answer to each question is, by the evaluation of its data set."""
        if self.records is not None:
            return np.array([float(given in said) for given, said in zip(predictions, self.answers, strict=True)])
        return np.array([accuracy(given, said) for given, said in zip(predictions, self.answers, strict=True)])

    def of(self, rows: Iterable[int]) -> Questions:
        """Some of them, with all records."""
        kept = list(rows)
        ids, images, texts = ([values[row] for row in kept] for values in (self.ids, self.images, self.texts))
        kinds = {key: [values[row] for row in kept] for key, values in self.kinds.items()}
        return replace(
            self, ids=ids, images=images, texts=texts, answers=[self.answers[row] for row in kept], kinds=kinds
        )


def read_large_json(path: Path) -> Any:
    """The JSON value in a file, gzipped or not. Raises ValueError, in one line that names the file."""
    try:
        check_plain_file(path, MOST_BYTES)
        with (gzip.open if path.suffix == ".gz" else Path.open)(path, "rb") as file:
            return json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None


def read_vqa(questions: Path, annotations: Path | None = None) -> Questions:
    """Questions in the official form of VQA v2, and the ten answers to each; without annotations, the questions alone.

    Raises:
        ValueError: a file is missing, damaged or of another form, or the two do not belong together.
    """
    asked = list_of(questions, "questions", {"question_id": int, "image_id": int, "question": str})
    ids = [str(entry["question_id"]) for entry in asked]
    refuse_repeated(questions, ids)
    answers: list[tuple[str, ...]] = [()] * len(ids)
    kinds: dict[str, list[str]] = {}
    if annotations is not None:
        shape = {"question_id": int, "answers": [{"answer": str}, ...], "answer_type": str, "question_type": str}
        said = {str(entry["question_id"]): entry for entry in list_of(annotations, "annotations", shape)}
        if absent := [name for name in ids if name not in said]:
            raise ValueError(
                f"{annotations}: has no answers to {len(absent):,} of {len(ids):,} questions of {questions.name}, "
                f"such as {first_five(absent)}; do the two belong together?"
            )
        answers = [tuple(str(one["answer"]) for one in said[name]["answers"]) for name in ids]
        kinds = {key: [said[name][key.replace(" ", "_")] for name in ids] for key in ("answer type", "question type")}
    images = [str(entry["image_id"]) for entry in asked]
    source = described(ids, images, questions, "with answers" if annotations else "without answers")
    return Questions(ids, images, [entry["question"] for entry in asked], answers, kinds, source=source)


def list_of(path: Path, key: str, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The list that a file of VQA v2 holds under a key, each entry of a shape. Raises ValueError."""
    found = read_large_json(path)
    entries = found.get(key) if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: has no list {key!r}, as the official files of VQA v2 have it")
    for number, entry in enumerate(entries):
        if said := schema_mismatch(entry, shape):
            raise ValueError(f"{path}: number {number + 1} of {key!r}: {said}")
    return entries


def read_gqa(paths: Sequence[Path]) -> Questions:
    """Questions in the official form of GQA, from one file or from the parts of one.

    Only balanced ones are asked; what measures need of the others is kept in `records`.

    Raises:
        ValueError: a file is missing, damaged or of another form.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        found = read_large_json(path)
        if not isinstance(found, dict) or not found:
            raise ValueError(f"{path}: is no object of questions by their ids, as GQA's files are")
        for name, record in found.items():
            shape = GQA_RECORD | (GQA_ANSWERED if isinstance(record, dict) and "answer" in record else {})
            if said := schema_mismatch(record, shape):
                raise ValueError(f"{path}: question {quoted(name)}: {said}")
        if repeated := [name for name in found if name in records]:
            raise ValueError(f"{path}: {first_five(repeated)} were in an earlier file already")
        records |= found
    asked = {name: record for name, record in records.items() if record["isBalanced"]} or records
    rest = f"; {len(records) - len(asked):,} unbalanced ones are left out" if len(records) > len(asked) else ""
    found = gqa_questions(asked, records)
    said = "with answers" if found.are_answered else "without answers"
    return replace(found, source=described(found.ids, found.images, paths[0], said) + rest)


def gqa_questions(asked: Mapping[str, Mapping[str, Any]], records: Mapping[str, Mapping[str, Any]]) -> Questions:
    """Questions made of GQA's records; `records` holds these and others that measures need."""
    kinds = [kinds_of(record) for record in asked.values() if "answer" in record]
    return Questions(
        list(asked),
        [record["imageId"] for record in asked.values()],
        [record["question"] for record in asked.values()],
        [(record["answer"],) if "answer" in record else () for record in asked.values()],
        {key: [kind[key] for kind in kinds] for key in ("answer", "structural", "semantic")}
        if len(kinds) == len(asked)
        else {},
        records,
    )


def read_table(path: Path) -> Questions:
    """Questions from a CSV file with the columns image, question and, if they are known, answer.

    Several answers to one question stand in one cell, separated by "|".

    Raises:
        ValueError: the file is missing or damaged, lacks a column, or is empty.
    """
    table = tables.read_csv(path, dtype=str, keep_default_na=False)
    if absent := [name for name in ("image", "question") if name not in table.columns]:
        raise ValueError(f"{path}: has no column {absent[0]!r}; it has {', '.join(map(quoted, table.columns))}")
    if table.empty:
        raise ValueError(f"{path}: has no rows")
    ids = [str(number + 1) for number in range(len(table))] if "id" not in table.columns else list(table["id"])
    refuse_repeated(path, ids)
    cells = list(table["answer"]) if "answer" in table.columns else [""] * len(table)
    answers = [tuple(part.strip() for part in cell.split("|") if part.strip()) for cell in cells]
    images = list(table["image"])
    said = "with answers" if any(answers) else "without answers"
    return Questions(ids, images, list(table["question"]), answers, source=described(ids, images, path, said))


def plain_id(image: str) -> str:
    """An image's id as all files have it: "COCO_val2014_000000000042" and "42.jpg" are "42"."""
    stem = image.rpartition("/")[2].partition(".")[0]
    number = re.fullmatch(r"(?:COCO_\w+_)?0*(\d+)", stem)
    return number.group(1) if number else stem


def described(ids: Sequence[str], images: Sequence[str], path: Path, said: str) -> str:
    """What was read, in words."""
    return f"{len(ids):,} questions about {len(set(images)):,} images, {said}, from {path.name}"


def refuse_repeated(path: Path, ids: Sequence[str]) -> None:
    """Raise ValueError for ids that occur twice."""
    if len(set(ids)) < len(ids):
        repeated = [name for name, count in Counter(ids).items() if count > 1]
        raise ValueError(f"{path}: ids occur twice: {first_five(repeated)}")


# Where each fold's files lie below --data_root, whichever of them are there; GQA's largest come in parts.
VQA_FILES = {
    "train": ("train2014", "train"),
    "val": ("val2014", "valid", "val"),
    "test": ("test2015", "test-dev2015", "test"),
}
GQA_TIERS = {"train": ("train",), "val": ("val",), "test": ("testdev", "test", "challenge", "submission")}


def find_vqa(root: Path, fold: str) -> tuple[Path, Path | None]:
    """The questions and, if there are any, annotations of a fold of VQA v2. Raises ValueError."""
    tried: list[Path] = []
    for name in VQA_FILES[fold]:
        for question_name, annotation_name in (
            (f"v2_OpenEnded_mscoco_{name}_questions.json", f"v2_mscoco_{name}_annotations.json"),
            (f"questions_{name}.json", f"annotations_{name}.json"),
        ):
            for suffix in ("", ".gz"):
                questions, annotations = (root / f"{each}{suffix}" for each in (question_name, annotation_name))
                if questions.is_file():
                    return questions, annotations if annotations.is_file() else None
                tried.append(questions)
    raise missing(root, fold, tried, "https://visualqa.org/download.html")


def find_gqa(root: Path, fold: str) -> list[Path]:
    """The files of questions of a fold of GQA, balanced ones if they are there. Raises ValueError."""
    tried: list[Path] = []
    for tier in GQA_TIERS[fold]:
        for kind in ("balanced", "all"):
            name = f"{tier}_{kind}_questions"
            for folder in (root, root / "questions", root / "questions1.2"):
                if (folder / f"{name}.json").is_file():
                    return [folder / f"{name}.json"]
                if parts := sorted((folder / name).glob(f"{name}_*.json"), key=lambda path: (len(path.name), path)):
                    return parts
            tried.append(root / f"{name}.json")
    raise missing(root, fold, tried, "https://cs.stanford.edu/people/dorarad/gqa/download.html")


def read_choices(root: Path) -> dict[str, dict[str, list[str]]] | None:
    """What may be answered to each question of GQA's val fold; None if the file is not there. Raises ValueError."""
    for folder in (root, root / "choices", root / "eval"):
        if (path := folder / "val_choices.json").is_file():
            found = read_large_json(path)
            if said := schema_mismatch(found, {str: {"valid": [str, ...], "plausible": [str, ...]}}):
                raise ValueError(f"{path}: {said}")
            return found
    return None


class NoQuestions(ValueError):
    """A fold has no files."""


def missing(root: Path, fold: str, tried: Sequence[Path], where: str) -> NoQuestions:
    """What to raise for a fold without files."""
    what = "is no folder" if not root.is_dir() else f"has no questions of the {fold} fold, such as {tried[0].name}"
    return NoQuestions(f"--data_root {root}: {what}; they are at {where}")
