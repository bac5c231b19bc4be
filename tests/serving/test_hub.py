"""`serving/hub.py`: a scorer on the hub is fetched file by file, scores the same, and needs no network afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from hub_server import Hub
from tiny_run import finished_run, loaded

from serving.scorer import Scorer
from storage import tensors
from training import checkpoints

NAME = "hf-hub:me/scorer"


@pytest.fixture
def home(tmp_path) -> Path:
    """Where the hub's cache is."""
    return tmp_path / "home"


@pytest.fixture
def hub(home, monkeypatch) -> Iterator[Hub]:
    """A hub to read from, without a login."""
    with hub_server.served() as found:
        hub_server.use(found, home, monkeypatch, token="")
        yield found


@pytest.fixture
def best(demo_set) -> Path:
    """A checkpoint that nobody changes."""
    return finished_run(demo_set) / "best"


def contents(folder: Path) -> dict[str, bytes]:
    """The files in and below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(name: str = NAME) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(ValueError, match=r"hub:|models--") as caught:
        Scorer.load(name, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_scorer_on_the_hub_scores_the_same_to_the_bit_and_then_without_a_network(hub, best, demo_set, monkeypatch):
    others = {"README.md": b"hello", "own.py": b"raise SystemExit", "tokenizer/own.py": b"", "pytorch_model.bin": b""}
    hub.add("me/scorer", {**contents(best), **others})
    images = sorted(demo_set[1].iterdir())[:3]
    expected = loaded(best).score(images, "a red circle")
    assert Scorer.load(NAME, device="cpu").score(images, "a red circle").equals(expected)
    assert hub.fetched == {"scorer.json", "model.safetensors"}

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}")
    assert Scorer.load(NAME, device="cpu").score(images, "a red circle").equals(expected)


def test_what_is_there_now_is_fetched(hub, best):
    hub.add("me/scorer", {"scorer.json": b"{}", "model.safetensors": b""})
    assert "damaged checkpoint" in refusal()
    hub.repos["me/scorer"].commit(contents(best))
    assert Scorer.load(NAME, device="cpu").description == loaded(best).description


FILES = {"scorer.json": b"{}", "model.safetensors": b""}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda hub: None, "hf-hub:me/scorer: not found on http://127.0.0.1:"),
        (lambda hub: hub.add("me/scorer", FILES, private=True), "hf auth login as one who may read it"),
        (lambda hub: hub.add("me/scorer", FILES, gated=True), "is gated: ask for access at http://127.0.0.1:"),
        (
            lambda hub: hub.add("me/scorer", {"config.json": b"{}"}),
            "is no scorer of this program, scorer.json is",
        ),
        (lambda hub: hub.add("me/scorer", {"scorer.json": b"{}"}), "no scorer of this program, model.safetensors is"),
        (lambda hub: hub.failing.update({"scorer.json": 503}), "answers 503 (out of order)"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(hub, make: Callable[[Hub], Any], message):
    make(hub)
    assert message in refusal()


def test_without_a_network_a_line_says_so(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}")
    assert f"is not in the cache, and {hub.url} cannot be reached: check the network" in refusal()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "is not in the cache, and HF_HUB_OFFLINE is set" in refusal()


@pytest.mark.parametrize("name", ["hf-hub:scorer--", "hf-hub:../scorer", "hf-hub:a/b/c", "hf-hub:"])
def test_a_name_that_is_none_is_refused_without_asking(hub, name):
    assert name in refusal(name)
    assert hub.asked == []


@pytest.mark.parametrize(
    "file",
    ["../../../evil", "tokenizer/../../../evil", "/tmp/evil", "own.py", "tokenizer/.evil", "tokenizer/a/b", "a\nb"],
)
def test_files_out_of_their_place_are_not_asked_for(hub, home, tmp_path, file):
    path = tmp_path / "model.safetensors"
    tensors.write_tensors(path, {"a": torch.zeros(1)}, {"files": {"scorer.json": "", file: ""}})
    hub.add("me/scorer", {"scorer.json": b"{}", "model.safetensors": path.read_bytes(), file: b"evil"})
    assert "hf-hub:me/scorer: is no scorer of this program (wants " in refusal()
    assert not any("evil" in line for line in hub.asked)
    assert {path.name for path in home.rglob("*") if path.is_symlink()} == {"scorer.json", "model.safetensors"}


@pytest.mark.parametrize("note", [{"files": 3}, {"files": [1]}, {}, []])
def test_a_list_of_files_that_is_none_is_refused(hub, tmp_path, note):
    path = tmp_path / "model.safetensors"
    tensors.write_tensors(path, {"a": torch.zeros(1)}, note)
    hub.add("me/scorer", {"scorer.json": b"{}", "model.safetensors": path.read_bytes()})
    assert "damaged checkpoint" in refusal()


def test_a_description_that_names_files_of_this_machine_is_refused(hub, best, tmp_path):
    folder = Path(shutil.copytree(best, tmp_path / "best"))
    found = json.loads((folder / "scorer.json").read_text())
    found["clip"]["model_cfg"]["text_cfg"]["hf_model_name"] = str(tmp_path)
    (folder / "scorer.json").write_text(json.dumps(found))
    state, _ = tensors.read_tensors(folder / "model.safetensors")
    tensors.write_tensors(folder / "model.safetensors", state, {"files": checkpoints.digests_of_files(folder)})
    hub.add("me/scorer", contents(folder))
    assert "the description does not fit the weights" in refusal()


def test_a_pickle_is_not_unpacked(hub):
    hub.add("me/scorer", {"scorer.json": b"{}", "model.safetensors": b"\x80\x04cos\nabort\n(tR."})
    assert "damaged checkpoint" in refusal()
