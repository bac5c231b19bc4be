"""Which answers a model can give, and how right each is for a question.

Shapes: Q questions, B questions of a batch, A answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from vqa.answers import normalise, soft_targets


@dataclass(frozen=True)
class AnswerList:
    """The answers that a model can give, numbered."""

    answers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.answers)

    @cached_property
    def number_of(self) -> dict[str, int]:
        """Answer -> its number."""
        return {answer: number for number, answer in enumerate(self.answers)}


Spelling = Callable[[str], str]  # an answer -> the form in which it is compared


def build_answer_list(answers: Sequence[Sequence[str]], *, least: int, spelling: Spelling = normalise) -> AnswerList:
    """The answers that most people gave to at least so many questions, the most frequent first.

    Raises:
        ValueError: there is none.
    """
    counts: Counter[str] = Counter()
    for said in answers:
        if said:
            counts[Counter(map(spelling, said)).most_common(1)[0][0]] += 1
    kept = sorted((answer for answer, count in counts.items() if count >= least), key=lambda key: (-counts[key], key))
    if not kept:
        raise ValueError(f"no answer was given to {least} questions of the training fold; --least_answers 1 takes all")
    return AnswerList(tuple(kept))


def target_matrix(
    answers: Sequence[Sequence[str]], known: AnswerList, spelling: Spelling = normalise
) -> scipy.sparse.csr_array:
    """(Q, A) the accuracy of each answer to each question; a row of zeros where no known answer was given."""
    rows, columns, values = [], [], []
    for row, said in enumerate(answers):
        for answer, accuracy in soft_targets(said, spelling).items():
            if (column := known.number_of.get(answer)) is not None:
                rows.append(row)
                columns.append(column)
                values.append(accuracy)
    shape = (len(answers), len(known))
    return scipy.sparse.csr_array((np.array(values, dtype=np.float32), (rows, columns)), shape=shape)


def ceiling(targets_QA: scipy.sparse.csr_array) -> float:
    """The accuracy of whoever always picks the best answer of the list."""
    return float(targets_QA.max(axis=1).toarray().mean())


def dense(targets_QA: scipy.sparse.csr_array, rows: NDArray[np.int_]) -> NDArray[np.float32]:
    """(B, A) the targets of some questions."""
    return targets_QA[rows].toarray()
