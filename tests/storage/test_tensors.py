"""`storage/tensors.py`: equal contents are equal files, and files of older versions are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage import tensors

NOTE = {"files": {"scorer.json": "12ab", "猫": "é"}, "numbers": [1, 0.5, None, True]}
NUM_FILES = 8
WRITER = """
import sys
from collections.abc import Mapping
from pathlib import Path
from test_tensors import write_some
write_some(Path(sys.argv[1]))
"""


def some_tensors() -> dict[str, Tensor]:
    """Tensors of several kinds, the same each time."""
    plain = torch.arange(12.0).reshape(3, 4)
    kinds = (torch.float64, torch.bfloat16, torch.int64, torch.bool)
    return {"strided": plain[:, ::2], **{str(kind): plain.to(kind) for kind in kinds}, "plain": plain}


def write_some(folder: Path) -> None:
    """Write the same a few times, the tensors in another order each time."""
    for number in range(NUM_FILES):
        names = list(some_tensors())
        turned = {name: some_tensors()[name] for name in names[number % 3 :] + names[: number % 3]}
        tensors.write_tensors(folder / f"{os.getpid()}_{number}.safetensors", turned, NOTE)


def write_as_before(path: Path, state: dict[str, Tensor], changes: Mapping[str, str] | None = None) -> None:
    """A file as older versions wrote it: note and digest are two entries of its header."""
    text = json.dumps(NOTE)
    save_file(state, path, {"note": text, "sha256": tensors.digest_of(state, text), **(changes or {})})


def test_equal_contents_of_two_processes_are_equal_files(tmp_path):
    write_some(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], env=environment, check=True, timeout=120)
    written = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(written) == 2 * NUM_FILES and len(set(written)) == 1


def test_what_was_written_comes_back_with_its_note(tmp_path):
    tensors.write_tensors(tmp_path / "a.safetensors", some_tensors(), NOTE)
    found, note = tensors.read_tensors(tmp_path / "a.safetensors")
    assert note == NOTE
    assert found.keys() == some_tensors().keys()
    assert all(torch.equal(found[name], value) for name, value in some_tensors().items())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert list(file.metadata()) == ["checked"]


def test_a_file_of_an_older_version_is_read(tmp_path):
    path, state = tmp_path / "a.safetensors", {name: x.contiguous() for name, x in some_tensors().items()}
    write_as_before(path, state)
    found, note = tensors.read_tensors(path)
    assert note == NOTE
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, "its checksum does not match"),
        ({"note": '{"other": 1}'}, "its checksum does not match"),
        ({"checked": '["no", "object"]'}, "carries no checksum"),
        ({"checked": "{}"}, "carries no checksum"),
    ],
)
def test_a_file_of_an_older_version_that_is_not_as_it_was_is_refused(tmp_path, changes, says):
    write_as_before(tmp_path / "a.safetensors", {"a": torch.ones(2)}, changes)
    with pytest.raises(ValueError, match=rf"^a\.safetensors .*{says}"):
        tensors.read_tensors(tmp_path / "a.safetensors")
