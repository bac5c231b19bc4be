"""`download`: repositories of the hub and tags from the cache, and what is said where there is no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
from safetensors.torch import save_file
from small_clips import (
    END,
    IMAGE_SIZE,
    OFFLINE_WAYS,
    SMALL,
    assert_same_as_open_clip,
    assert_same_as_transformers,
    offline,
    reference,
    refusal,
    transformers_clip,
    write_open_clip_form,
    write_transformers_form,
)

from backbones.loading import load_backbone
from backbones.names import resolve


@pytest.fixture
def small_name(monkeypatch) -> str:
    """A name under which open_clip knows the architecture of `reference`."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-CLIP", SMALL)
    return "Small-CLIP"


@pytest.fixture
def open_clip_folder(tmp_path) -> Path:
    """`reference` in open_clip's form."""
    return write_open_clip_form(tmp_path / "open-clip")


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """A small CLIP in transformers' form."""
    return write_transformers_form(tmp_path / "own")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Callable[[str, Path], None]:
    """Without a network: a function that puts a folder into the hub's cache."""
    return offline(tmp_path / "hub", monkeypatch)


@pytest.mark.parametrize("name", ["org/some-model", "hf-hub:org/some-model"])
def test_a_hub_repository_in_open_clips_form_is_found_in_the_cache(hub, open_clip_folder, name):
    hub("org/some-model", open_clip_folder)
    backbone = load_backbone(name, "openai", image_size=IMAGE_SIZE)
    assert_same_as_open_clip(backbone.clip, reference())
    assert backbone.config["preprocess_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert isinstance(backbone.tokenizer, open_clip.SimpleTokenizer)


@pytest.mark.parametrize("name", ["org/some-model", "hf-hub:org/some-model"])
def test_a_hub_repository_in_transformers_form_is_found_in_the_cache(hub, hf_folder, name):
    hub("org/some-model", hf_folder)
    backbone = load_backbone(name, "openai", image_size=IMAGE_SIZE)
    assert_same_as_transformers(backbone.clip, transformers_clip("gelu"))
    assert backbone.tokenizer(["ab"])[0, :4].tolist() == [END - 1, 1, 29, END]


def test_a_hub_repository_without_an_open_clip_config_is_read_in_transformers_form(hub, hf_folder, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    def absent(*arguments: Any, **options: Any) -> None:
        raise EntryNotFoundError("404: no such file")

    hub("org/some-model", hf_folder)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *arguments: None)
    assert resolve("org/some-model", "openai").config["model_cfg"]["text_cfg"]["eos_id"] == END


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["org/some-model", "hf-hub:org/some-model"])
def test_a_hub_repository_that_is_out_of_reach_is_refused_with_the_ways_around(name):
    message = refusal(name, "openai")
    assert "org/some-model" in message
    assert all(way in message for way in OFFLINE_WAYS)


def test_weights_of_a_hub_repository_that_are_out_of_reach_are_not_made_up(hub, open_clip_folder):
    (open_clip_folder / "open_clip_model.safetensors").unlink()
    hub("org/some-model", open_clip_folder)
    message = refusal("org/some-model", "openai")
    assert all(way in message for way in OFFLINE_WAYS)


def test_weights_of_a_tag_that_are_out_of_reach_are_not_made_up(monkeypatch, small_name):
    def unreachable(tag: dict[str, Any]) -> None:
        raise OSError(f"cannot reach {tag['hf_hub']}\nafter 5 attempts")

    tag = {"hf_hub": "org/weights", "mean": (0, 0, 0), "std": (1, 1, 1)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, small_name, {"some_tag": tag})
    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    message = refusal(small_name, "some_tag")
    assert "Small-CLIP (some_tag)" in message and "cannot reach org/weights" in message
    assert all(way in message for way in OFFLINE_WAYS)


def test_weights_of_a_tag_are_those_that_were_downloaded(monkeypatch, small_name, tmp_path):
    save_file(reference().state_dict(), tmp_path / "downloaded.safetensors")
    tag = {"hf_hub": "org/weights", "mean": (0, 0, 0), "std": (1, 1, 1)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, small_name, {"some_tag": tag})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda asked: {str(tag): tmp_path}[str(asked)] / FILE)
    backbone = load_backbone(small_name, "some_tag", image_size=IMAGE_SIZE)
    assert_same_as_open_clip(backbone.clip, reference())
    assert backbone.config["preprocess_cfg"] == {"mean": [0, 0, 0], "std": [1, 1, 1]}


FILE = "downloaded.safetensors"


@pytest.mark.usefixtures("hub")
def test_a_tokenizer_that_is_out_of_reach_is_refused(monkeypatch, small_name):
    text = {**SMALL["text_cfg"], "hf_tokenizer_name": "org/tokenizer"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, small_name, {**SMALL, "text_cfg": text})
    message = refusal(small_name, "none")
    assert "tokenizer of Small-CLIP" in message
    assert all(way in message for way in OFFLINE_WAYS)
