"""`storage/json_files.py`: strict JSON that comes back, in any alphabet."""

from __future__ import annotations

import json

import pytest
from folders import content, fill

from storage import json_files


def test_json_comes_back_and_keeps_other_alphabets_readable(tmp_path):
    value = {"prompt": "一只猫 é", "numbers": [1, 0.1, -1e-300], "nothing": None, "nested": {"yes": True}}
    json_files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value == json_files.read_json(tmp_path / "a.json")
    assert "一只猫" in text and text.endswith("}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_numbers_that_are_not_finite_and_keeps_the_old_file(tmp_path, number):
    fill(tmp_path, "a.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_files.write_json(tmp_path / "a.json", {"deep": [{"down": number}]})
    assert content(tmp_path) == {"a.json": b"{}"}
