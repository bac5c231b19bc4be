"""From texts to rows of word numbers and back, and the vectors that words start from.

Shapes: P texts, N words of the longest, V words of the vocabulary, D width of a vector.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from storage.messages import quoted
from storage.plain_files import check_plain_file

PADDING, UNKNOWN = 0, 1  # the first two numbers of every vocabulary
SPECIAL = ("<pad>", "<unk>")
WORD = re.compile(r"'s\b|n't\b|\w+?(?=n't\b)|\w+")
MOST_VECTOR_BYTES = 16 * 2**30  # of a file of word vectors; GloVe's largest has 5.6e9


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; "isn't" and "cat's" are two each."""
    return WORD.findall(text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """Numbered words, the first two being padding and all unknown words."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.words[:2] != SPECIAL or len(set(self.words)) < len(self.words):
            raise ValueError(f"a vocabulary begins with {SPECIAL} and has each word once")

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def number_of(self) -> dict[str, int]:
        """Word -> its number."""
        return {word: number for number, word in enumerate(self.words)}

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int32]:
        """(P, length) numbers of the first words of each text, padded on the right."""
        rows = np.full((len(texts), length), PADDING, dtype=np.int32)
        for row, text in zip(rows, texts, strict=True):
            found = [self.number_of.get(word, UNKNOWN) for word in words_of(text)[:length]]
            row[: len(found)] = found
        return rows


def build_vocabulary(texts: Iterable[str], *, least: int = 1) -> Vocabulary:
    """The words that occur at least so often, the most frequent first, and alphabetically among equals."""
    counts = Counter(chain.from_iterable(map(words_of, texts)))
    kept = sorted((word for word, count in counts.items() if count >= least), key=lambda word: (-counts[word], word))
    return Vocabulary((*SPECIAL, *kept))


def read_glove(path: Path, vocabulary: Vocabulary) -> tuple[NDArray[np.float32], int]:
    """Vectors of a text file in the form of GloVe, a word and its numbers on each line.

    Returns:
        (V, D), words that the file lacks and padding being 0; and how many words it has.

    Raises:
        ValueError: the file is missing, its lines are of different widths, or no word is in it.
    """
    vectors: NDArray[np.float32] | None = None
    found = set()
    try:
        check_plain_file(path, MOST_VECTOR_BYTES)
        with path.open(encoding="utf-8", errors="replace") as file:
            for count, line in enumerate(file, start=1):
                word, _, rest = line.rstrip().partition(" ")
                number = vocabulary.number_of.get(word)
                if vectors is not None and (number is None or number in found):
                    continue  # as most lines are, whose numbers nobody needs
                numbers = rest.split(" ") if rest else []
                if count == 1 and len(numbers) == 1:
                    continue  # word2vec's header: how many words, how many numbers
                if vectors is None:
                    vectors = np.zeros((len(vocabulary), len(numbers)), dtype=np.float32)
                if number is None:
                    continue
                if len(numbers) != vectors.shape[1]:
                    raise ValueError(f"line {count} has {len(numbers)} numbers where the first has {vectors.shape[1]}")
                vectors[number] = np.array(numbers, dtype=np.float32)
                if not np.isfinite(vectors[number]).all():
                    raise ValueError(f"line {count}: the vector of {quoted(word)} is not finite")
                found.add(number)
    except FileNotFoundError:
        raise ValueError(
            f"--glove {path}: there is no such file; GloVe is at https://nlp.stanford.edu/projects/glove/"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--glove {path}: {error}") from None
    if vectors is None or not found:
        raise ValueError(f"--glove {path}: has none of the {len(vocabulary):,} words of the questions")
    return vectors, len(found)


def cooccurrence(rows_PN: NDArray[np.int32], num_words: int) -> scipy.sparse.csr_array:
    """(V, V) how words are told by the company they keep: each row sums to 1, or to 0 for a word that stands alone.

    Entry (i, j) counts the pairs of places in one text that hold i and j, over the number of texts' places that hold j,
    so that a word that is everywhere tells little (the "tf-idf" of Kim et al., Bilinear Attention Networks, 2018).
    """
    firsts, seconds = np.triu_indices(rows_PN.shape[1], k=1)
    left, right = rows_PN[:, firsts].ravel(), rows_PN[:, seconds].ravel()
    are_known = (left > UNKNOWN) & (right > UNKNOWN)
    left, right = left[are_known], right[are_known]
    shape = (num_words, num_words)
    counts = scipy.sparse.coo_array(
        (np.ones(2 * len(left)), (np.concatenate([left, right]), np.concatenate([right, left]))), shape=shape
    ).tocsr()
    places = np.maximum(np.bincount(rows_PN.ravel(), minlength=num_words), 1)
    weighed = counts @ scipy.sparse.diags_array(1 / places)
    sums = weighed.sum(axis=1)
    return scipy.sparse.csr_array(scipy.sparse.diags_array(1 / np.where(sums > 0, sums, 1)) @ weighed)
