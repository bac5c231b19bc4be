"""`regions/pickles.py`: plain values are read, and nothing is ever run."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regions.pickles import read_plain_pickle

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


def plain(scalars):
    """Containers of plain values."""
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
        max_leaves=10,
    )


# protocols below 3 spell bytes by a function
PICKLED = st.tuples(plain(SCALARS), st.integers(0, 2)) | st.tuples(
    plain(SCALARS | st.binary()), st.integers(3, pickle.HIGHEST_PROTOCOL)
)


@given(PICKLED)
def test_plain_values_are_read_back(tmp_path_factory, pickled):
    value, protocol = pickled
    path = tmp_path_factory.mktemp("pickles") / "value.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(path) == value


class Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_nothing_is_run(tmp_path):
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"a": Harmful(tmp_path / "made")}))
    with pytest.raises(ValueError, match=r"bad\.pkl: cannot be read \(holds 'posix\.mkdir'"):
        read_plain_pickle(path)
    assert not (tmp_path / "made").exists()
    pickle.loads(path.read_bytes())  # what pickle itself would have done
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("value", [np.arange(3), np.float64(1), collections.OrderedDict(a=1), Path("a"), len])
def test_other_objects_are_refused(value, tmp_path):
    path = tmp_path / "value.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match="neither text, number nor container"):
        read_plain_pickle(path)


@given(st.binary(max_size=40))
def test_damaged_bytes_are_refused_in_one_line_or_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("pickles") / "value.pkl"
    path.write_bytes(content)
    said = refusal(path)
    assert not said or (said.startswith(f"{path}: cannot be read") and "\n" not in said)


def refusal(path: Path) -> str:
    """What is said against a file; nothing if it is read."""
    try:
        read_plain_pickle(path)
    except ValueError as error:
        return str(error)
    return ""


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_plain_pickle(tmp_path / "none.pkl")
