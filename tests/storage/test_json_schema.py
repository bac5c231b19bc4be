"""What of a JSON value is not as it is expected, told by its place."""

from __future__ import annotations

import pytest

from storage import json_files


@pytest.mark.parametrize(
    ("found", "shape", "said"),
    [
        ({"a": 1}, {"a": int}, ""),
        ({"a": 1, "b": "x"}, {"a": int}, ""),
        ({"a": 1, "b": "x"}, {"a": int, str: int}, "'b' is no number"),
        ({}, {"a": int}, "it has no 'a'"),
        ([], {}, "it is no object"),
        ({"a": {"b": [1, "x"]}}, {"a": {str: [int, int]}}, "'a.b.1' is no number"),
        ({"a": [1]}, {"a": [int, int]}, "'a' is no list of 2"),
        ({"a": [1]}, {"a": [int, ...]}, ""),
        ({"a": []}, {"a": [int, ...]}, "'a' is no list of any"),
        (float("nan"), (int, float), "it is no number"),
        (None, (list, type(None)), ""),
        ("x", (list, type(None)), "it is of another kind"),
    ],
)
def test_a_mismatch_is_told_by_its_place(found, shape, said):
    assert json_files.schema_mismatch(found, shape) == said
