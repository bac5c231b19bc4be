"""`weights`: files of weights in every layout, against the library that wrote them; what is refused and never run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from small_clips import (
    CONTEXT,
    IMAGE_SIZE,
    SMALL,
    assert_same_as_open_clip,
    assert_same_as_transformers,
    reference,
    refusal,
    transformers_clip,
    write_open_clip_form,
    write_transformers_form,
)
from torch import Tensor, nn

from backbones import weights
from backbones.loading import load_backbone


class Plant:
    """A pickle that, if it is run, makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


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


# -- open_clip's own form


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def custom_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout of CustomTextCLIP, made by loading into one."""
    clip = open_clip.CustomTextCLIP(**SMALL)
    clip.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(state))
    assert "text.positional_embedding" in clip.state_dict()
    return clip.state_dict()


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """What distributed training of open_clip saves."""
    return {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": value for name, value in state.items()}}


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [("safetensors", plain), ("pt", plain), ("pt", training_checkpoint), ("bin", plain)],
    ids=["safetensors", "pt", "training checkpoint", "bin"],
)
@pytest.mark.parametrize("layout", [plain, custom_text])
def test_a_weights_file_embeds_as_the_model_it_was_saved_from(small_name, tmp_path, layout, suffix, wrap):
    path = tmp_path / f"weights.{suffix}"
    state = wrap(layout(reference().state_dict()))
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    clip = load_backbone(small_name, str(path), image_size=IMAGE_SIZE).clip
    assert_same_as_open_clip(clip, reference())
    assert torch.equal(clip.logit_scale, reference().logit_scale)


def test_half_precision_weights_become_float32(small_name, tmp_path):
    save_file({name: value.half() for name, value in reference().state_dict().items()}, tmp_path / "half.safetensors")
    clip = load_backbone(small_name, str(tmp_path / "half.safetensors"), image_size=48).clip
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}
    assert torch.equal(clip.visual.proj, reference().visual.proj.half().float())


@pytest.mark.parametrize(("shape", "nonscalar"), [((1,), False), ((), True)])
def test_a_scalar_temperature_and_one_of_one_element_fit_each_other(small_name, tmp_path, shape, nonscalar):
    open_clip.factory._MODEL_CONFIGS[small_name] = {**SMALL, "nonscalar_logit_scale": nonscalar}
    save_file({**reference().state_dict(), "logit_scale": torch.full(shape, 3.0)}, tmp_path / "weights.safetensors")
    clip = load_backbone(small_name, str(tmp_path / "weights.safetensors"), image_size=IMAGE_SIZE).clip
    assert clip.logit_scale.shape == ((1,) if nonscalar else ())
    assert clip.logit_scale.item() == 3.0


def test_transformers_weights_in_a_file_fit_an_open_clip_architecture(monkeypatch, tmp_path):
    model = transformers_clip("legacy end token")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-CLIP-quickgelu", {**SMALL, "quick_gelu": True})
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    path = str(tmp_path / "pytorch_model.bin")
    backbone = load_backbone("Small-CLIP-quickgelu", path, image_size=IMAGE_SIZE)
    assert_same_as_transformers(backbone.clip, model)


def test_a_weights_file_has_the_activation_and_normalisation_of_the_config_beside_it(
    open_clip_folder, small_name, tmp_path
):
    model, folder = transformers_clip("legacy end token"), write_transformers_form(tmp_path, "legacy end token")
    for name in (small_name, "Small-CLIP"):
        backbone = load_backbone(name, str(folder / "model.safetensors"), image_size=IMAGE_SIZE)
        assert backbone.activation == "QuickGELU"
        assert_same_as_transformers(backbone.clip, model)
        assert backbone.notes == ()
    open_clip.factory._MODEL_CONFIGS[small_name] = {**SMALL, "quick_gelu": True}  # small_name takes it away again
    path = str(open_clip_folder / "open_clip_model.safetensors")
    backbone = load_backbone(small_name, path, image_size=IMAGE_SIZE)
    assert_same_as_open_clip(backbone.clip, reference())
    assert backbone.config["preprocess_cfg"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize("activation", ["GELU", "QuickGELU"])
def test_a_weights_file_alone_comes_with_a_note_on_its_activation(small_name, tmp_path, activation):
    open_clip.factory._MODEL_CONFIGS[small_name] = {**SMALL, "quick_gelu": activation == "QuickGELU"}
    save_file(reference().state_dict(), tmp_path / "weights.safetensors")
    backbone = load_backbone(small_name, str(tmp_path / "weights.safetensors"), image_size=IMAGE_SIZE)
    assert backbone.activation == activation
    (note,) = backbone.notes
    assert f"activation {activation} " in note and small_name in note


def test_a_folder_prefers_open_clips_safetensors_and_takes_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="no weights file"):
        weights.find_weights(tmp_path)
    for name in ("a.bin", "a.pt", "a.safetensors", "open_clip_model.safetensors"):
        (tmp_path / name).touch()
        assert weights.find_weights(tmp_path).name == name


def test_broken_weights_are_refused_and_not_read_for_a_random_start(open_clip_folder):
    (open_clip_folder / "open_clip_model.safetensors").write_bytes(b"broken")
    name = f"local-dir:{open_clip_folder}"
    assert "cannot be read as weights" in refusal(name, "openai")
    assert load_backbone(name, "none", image_size=IMAGE_SIZE).embed_dim == 24


# -- unfit and unsafe


OTHERS = [
    {"embed_dim": 16},
    {"vision_cfg": {**SMALL["vision_cfg"], "width": 48}},
    {"vision_cfg": {**SMALL["vision_cfg"], "layers": 3}},
    {"vision_cfg": {**SMALL["vision_cfg"], "layers": 1}},
    {"vision_cfg": {**SMALL["vision_cfg"], "patch_size": 4}},
    {"vision_cfg": {**SMALL["vision_cfg"], "layers": [1, 1, 1, 1]}},
    {"text_cfg": {**SMALL["text_cfg"], "width": 48}},
    {"text_cfg": {**SMALL["text_cfg"], "vocab_size": 61}},
    {"text_cfg": {**SMALL["text_cfg"], "context_length": CONTEXT - 4}},
    {"init_logit_bias": -10},
]


@pytest.mark.parametrize(
    ("change", "image_size"),
    [*((change, IMAGE_SIZE) for change in OTHERS), *((change, 48) for change in OTHERS[::4])],
    ids=str,
)
def test_weights_of_another_architecture_are_refused(small_name, tmp_path, change, image_size):
    open_clip.factory._MODEL_CONFIGS[small_name] = {**SMALL, **change}
    save_file(reference().state_dict(), tmp_path / "weights.safetensors")
    message = refusal(small_name, str(tmp_path / "weights.safetensors"), image_size=image_size)
    assert message.startswith("the weights do not fit Small-CLIP")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"logit_scale": torch.zeros(3)},
        {"logit_scale": 1.0},
        {"epoch": 3, "model": {}},
        {"vision_model.embeddings.class_embedding": torch.zeros(4), "logit_scale": torch.zeros(())},
        {0: torch.zeros(1)},
        [torch.zeros(1)],
        torch.zeros(1),
    ],
    ids=["nothing", "shape", "number", "nested", "half of transformers", "numbers as names", "list", "tensor"],
)
def test_a_file_without_a_whole_clip_in_it_is_refused(small_name, tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    refusal(small_name, str(tmp_path / "weights.pt"))


@pytest.mark.parametrize("suffix", ["pt", "bin", "pth", "safetensors"])
@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_code_in_a_weights_file_is_refused_and_never_run(small_name, tmp_path, write, suffix):
    path, planted = tmp_path / f"weights.{suffix}", tmp_path / "planted"
    content = {"state_dict": {"logit_scale": Plant(planted)}}
    if write == "torch":
        torch.save(content, tmp_path / "any")
        torch.load(tmp_path / "any", weights_only=False)
    else:
        (tmp_path / "any").write_bytes(pickle.dumps(content, protocol=2))
        pickle.loads((tmp_path / "any").read_bytes())
    assert planted.exists()  # it would do harm
    planted.unlink()
    (tmp_path / "any").rename(path)
    message = refusal(small_name, str(path))
    assert str(path) in message and "cannot be read as weights" in message
    assert not planted.exists()


def test_code_in_the_weights_of_a_transformers_folder_is_never_run(hf_folder, tmp_path):
    (hf_folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Plant(tmp_path / "planted")}, hf_folder / "pytorch_model.bin")
    refusal(str(hf_folder), "openai")
    assert not (tmp_path / "planted").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_refused_with_a_way_out(small_name, tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    message = refusal(small_name, str(tmp_path / "ViT-B-32.pt"))
    assert "TorchScript" in message and "state_dict()" in message and ".safetensors" in message
