"""What much simpler predictors reach: floors for a model that answers questions about images.

Shapes: Q questions, A answers, F features.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

PENALTY = 10.0  # of ridge regression, beside a Gram matrix of counts
MOST_FEATURES = 6000  # of ridge regression, those that occur most; solved in seconds


def most_frequent(targets_QA: scipy.sparse.csr_array) -> int:
    """The one answer that is right most often."""
    return int(np.asarray(targets_QA.sum(axis=0)).argmax())


def bag_of_words(words_QN: NDArray[np.int32], num_words: int) -> scipy.sparse.csr_array:
    """(Q, F) which words a question has, and whether it begins with them."""
    rows = np.repeat(np.arange(len(words_QN)), words_QN.shape[1])
    columns = words_QN.ravel()
    firsts = num_words + words_QN[:, 0]
    rows, columns = np.concatenate([rows, np.arange(len(words_QN))]), np.concatenate([columns, firsts])
    found = scipy.sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(words_QN), 2 * num_words))
    found.data[:] = 1
    return found[:, 1:]  # without padding


def ridge_answers(
    train_QF: scipy.sparse.csr_array, targets_QA: scipy.sparse.csr_array, test_QF: scipy.sparse.csr_array
) -> NDArray[np.int64]:
    """(Q',) the answer that ridge regression on features finds most right for each test question."""
    counts = np.asarray(train_QF.sum(axis=0)).ravel()
    kept = np.sort(np.argsort(-np.abs(counts), kind="stable")[:MOST_FEATURES])
    train, test = (with_constant(features[:, kept]) for features in (train_QF, test_QF))
    gram = (train.T @ train).toarray() + PENALTY * np.eye(train.shape[1])
    weights_FA = cho_solve(cho_factor(gram), (train.T @ targets_QA).toarray())
    return np.concatenate(
        [(test[start : start + 4096] @ weights_FA).argmax(axis=1) for start in range(0, test.shape[0], 4096)]
    )


def with_constant(features_QF: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """A feature more, which is 1."""
    return scipy.sparse.csr_array(scipy.sparse.hstack([features_QF, np.ones((features_QF.shape[0], 1))]))
