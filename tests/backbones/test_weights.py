"""`weights`: files of weights in every layout, against the library that wrote them; what is refused and never run."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import refusals
import torch
from safetensors.torch import save_file
from small_clips import (
    CONTEXT,
    IMAGE_SIZE,
    SMALL,
    assert_same_as_open_clip,
    assert_same_as_transformers,
    edit_json,
    images,
    offline,
    openai_clip,
    openai_sizes,
    reference,
    refusal,
    transformers_clip,
    write_json,
    write_open_clip_form,
    write_openai_archive,
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


# -- shards


def write_shards(folder: Path, state: dict[str, Tensor], stem: str, suffix: str, *, index: bool = True) -> list[Path]:
    """A state dict in three files, as libraries split large ones, with their index; returns the files."""
    names = list(state)
    paths = [folder / f"{stem}-{number:05}-of-00003{suffix}" for number in (1, 2, 3)]
    weight_map = {}
    for number, path in enumerate(paths):
        part = {name: state[name] for name in names[number::3]}
        weight_map |= dict.fromkeys(part, path.name)
        if suffix == ".safetensors":
            save_file({name: value.contiguous() for name, value in part.items()}, path, metadata={"format": "pt"})
        else:
            torch.save(part, path)
    if index:
        write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return paths


SHARDED = [("model", ".safetensors"), ("pytorch_model", ".bin"), ("open_clip_model", ".safetensors")]


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(("stem", "suffix"), SHARDED)
def test_a_folder_of_shards_embeds_as_the_whole(open_clip_folder, hf_folder, stem, suffix, index):
    (open_clip_folder / "open_clip_model.safetensors").unlink()
    write_shards(open_clip_folder, reference().state_dict(), stem, suffix, index=index)
    clip = load_backbone(f"local-dir:{open_clip_folder}", "openai", image_size=IMAGE_SIZE).clip
    assert_same_as_open_clip(clip, reference())
    (hf_folder / "model.safetensors").unlink()
    write_shards(hf_folder, transformers_clip("gelu").state_dict(), stem, suffix, index=index)
    clip = load_backbone(f"local-dir:{hf_folder}", "openai", image_size=IMAGE_SIZE).clip
    assert_same_as_transformers(clip, transformers_clip("gelu"))


@pytest.mark.parametrize("given", [0, 2, "index"])
@pytest.mark.parametrize(("stem", "suffix"), SHARDED)
def test_a_shard_or_the_index_stands_for_all(small_name, tmp_path, stem, suffix, given):
    paths = write_shards(tmp_path, reference().state_dict(), stem, suffix)
    path = tmp_path / f"{stem}{suffix}.index.json" if given == "index" else paths[given]
    assert_same_as_open_clip(load_backbone(small_name, str(path), image_size=IMAGE_SIZE).clip, reference())


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(("stem", "suffix"), SHARDED)
def test_a_missing_shard_is_named(open_clip_folder, stem, suffix, index):
    (open_clip_folder / "open_clip_model.safetensors").unlink()
    paths = write_shards(open_clip_folder, reference().state_dict(), stem, suffix, index=index)
    paths[1].unlink()
    message = refusal(f"local-dir:{open_clip_folder}", "openai")
    assert f"1 of its 3 shards are missing: {paths[1].name}" in message and str(open_clip_folder) in message


def test_a_whole_model_is_preferred_to_shards_of_it(tmp_path):
    paths = write_shards(tmp_path, reference().state_dict(), "model", ".safetensors", index=False)
    assert weights.find_weights(tmp_path) in paths
    (tmp_path / "model.safetensors").touch()
    assert weights.find_weights(tmp_path).name == "model.safetensors"


@pytest.mark.parametrize("weight_map", [{}, [], {"a": "../w.bin"}, {"a": "/etc/passwd"}, None])
def test_an_index_that_names_no_files_beside_it_is_refused(small_name, tmp_path, weight_map):
    path = tmp_path / "pytorch_model.bin.index.json"
    write_json(path, {"weight_map": weight_map})
    assert f"{path}: has no weight_map of files beside it" in refusal(small_name, str(path))


# -- folders with other things in them

BESIDE = [
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin", "rng_state.pth", "rng_state_0.pth"),
    *(
        "lr_scheduler.pt",
        "epoch_2_optim.pt",
        "scaler.pt",
        "random_states_0.pth",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "my_optimizer.pt",
    ),
]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "epoch_3.pt", "best.pth", "last.ckpt"])
def test_only_weights_are_weights(tmp_path, name):
    for other in BESIDE:
        (tmp_path / other).touch()
    with pytest.raises(ValueError, match="no weights file"):
        weights.find_weights(tmp_path)
    (tmp_path / name).touch()
    assert weights.find_weights(tmp_path).name == name


def test_of_several_epochs_none_is_guessed_and_one_can_be_named(open_clip_folder, tmp_path):
    (open_clip_folder / "open_clip_model.safetensors").unlink()
    name = f"local-dir:{open_clip_folder}"
    for epoch in (1, 2):
        state = {key: value * epoch for key, value in reference().state_dict().items()}
        torch.save({"state_dict": state, "epoch": epoch}, open_clip_folder / f"epoch_{epoch}.pt")
    message = refusal(name, "openai")
    assert "2 files may be the weights: epoch_1.pt, epoch_2.pt; name one with --clip_pretrained" in message
    for chosen in (name, str(open_clip_folder)):
        clip = load_backbone(chosen, str(open_clip_folder / "epoch_2.pt"), image_size=IMAGE_SIZE).clip
        assert torch.equal(clip.visual.proj, reference().visual.proj * 2)
    torch.save(reference().state_dict(), tmp_path / "elsewhere.pt")
    assert "brings its own weights" in refusal(name, str(tmp_path / "elsewhere.pt"))


def test_what_a_library_calls_the_weights_is_preferred_to_other_names(tmp_path):
    order = ("epoch_1.pt", "pytorch_model.bin", "model.safetensors", "open_clip_pytorch_model.bin")
    for name in (*order, "open_clip_model.safetensors"):
        (tmp_path / name).touch()
        assert weights.find_weights(tmp_path).name == name


def test_a_folder_of_checkpoints_names_them(open_clip_folder):
    (open_clip_folder.parent / "runs").mkdir()
    open_clip_folder.rename(open_clip_folder.parent / "runs" / "checkpoint-500")
    message = refusal(f"local-dir:{open_clip_folder.parent / 'runs'}", "openai")
    assert message.endswith("but in its folders checkpoint-500: name one")


def test_a_folder_may_hold_the_weights_of_a_name(small_name, tmp_path):
    torch.save(reference().state_dict(), tmp_path / "best.pt")
    (tmp_path / "optimizer.pt").touch()
    assert_same_as_open_clip(load_backbone(small_name, str(tmp_path), image_size=IMAGE_SIZE).clip, reference())


def test_the_state_of_an_optimiser_is_no_weights(small_name, tmp_path):
    parameter = nn.Parameter(torch.zeros(3))
    torch.save(torch.optim.AdamW([parameter]).state_dict(), tmp_path / "state.pt")
    assert "the state of an optimiser, not weights" in refusal(small_name, str(tmp_path / "state.pt"))


# -- wrappers


def under(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: state, "epoch": 3, "args": {"lr": 1e-3, "name": "run"}}


def behind(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED = [
    (["state_dict"], [under("state_dict")]),
    (["model"], [under("model")]),
    (["model_state_dict"], [under("model_state_dict")]),
    (["module."], [behind("module.")]),
    (["model."], [behind("model.")]),
    (["clip."], [behind("clip.")]),
    (["_orig_mod."], [behind("_orig_mod.")]),
    (["state_dict", "module.", "_orig_mod."], [behind("_orig_mod."), behind("module."), under("state_dict")]),
    (
        ["model", "state_dict", "model.", "clip."],
        [behind("clip."), behind("model."), under("state_dict"), under("model")],
    ),
]


@pytest.mark.parametrize("layout", [plain, custom_text])
@pytest.mark.parametrize(("seen", "wraps"), WRAPPED, ids=[" ".join(seen) for seen, _ in WRAPPED])
def test_weights_are_unwrapped_and_that_is_said(small_name, tmp_path, seen, wraps, layout):
    state: dict[str, Any] = layout(reference().state_dict())
    for wrap in wraps:
        state = wrap(state)
    torch.save(state, tmp_path / "weights.pt")
    backbone = load_backbone(small_name, str(tmp_path / "weights.pt"), image_size=IMAGE_SIZE)
    assert_same_as_open_clip(backbone.clip, reference())
    assert f"weights.pt: weights taken out of {' and '.join(map(repr, seen))}" in backbone.notes


def test_a_wrapped_file_in_transformers_form_is_unwrapped(hf_folder):
    state = transformers_clip("gelu").state_dict()
    (hf_folder / "model.safetensors").unlink()
    torch.save({"model_state_dict": behind("model.")(state)}, hf_folder / "best.pt")
    backbone = load_backbone(str(hf_folder), "openai", image_size=IMAGE_SIZE)
    assert_same_as_transformers(backbone.clip, transformers_clip("gelu"))
    assert backbone.notes == ("best.pt: weights taken out of 'model_state_dict' and 'model.'",)


def test_averaged_weights_are_unwrapped_without_their_counter(small_name, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(reference())
    torch.save(averaged.state_dict(), tmp_path / "weights.pt")
    assert "n_averaged" in averaged.state_dict()
    clip = load_backbone(small_name, str(tmp_path / "weights.pt"), image_size=IMAGE_SIZE).clip
    assert_same_as_open_clip(clip, reference())


def test_a_wrapper_whose_rest_does_not_fit_is_named(small_name, tmp_path):
    state = {**behind("model.clip.")(reference().state_dict()), "model.head.weight": torch.zeros(2, 3)}
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    message = refusal(small_name, str(tmp_path / "weights.pt"))
    count = len(reference().state_dict())
    assert f"{count} unexpected" in message.replace(str(count + 1), str(count)) and "missing (" in message
    assert f"'clip.' stands before {count} of {count + 1} names" in message
    assert message.endswith("; they were taken out of 'state_dict' and 'model.'")


def test_two_models_in_a_file_are_not_chosen_from(small_name, tmp_path):
    state = reference().state_dict()
    torch.save({"model": state, "state_dict": state}, tmp_path / "weights.pt")
    message = refusal(small_name, str(tmp_path / "weights.pt"))
    assert "has weights under 'state_dict' and 'model'; save one of them alone" in message


def test_an_unknown_wrapper_is_refused_by_name(small_name, tmp_path):
    torch.save({"model": {"student": reference().state_dict()}}, tmp_path / "weights.pt")
    assert "'student' is no named tensor, under 'model'" in refusal(small_name, str(tmp_path / "weights.pt"))


def test_what_is_missing_unexpected_and_misshapen_is_said_in_one_line(small_name, tmp_path):
    state = {**reference().state_dict(), "visual.proj": torch.zeros(32, 5), "head.bias": torch.zeros(2)}
    del state["ln_final.bias"]
    save_file(state, tmp_path / "weights.safetensors")
    message = refusal(small_name, str(tmp_path / "weights.safetensors"))
    assert (
        "1 missing (text.ln_final.bias), 1 unexpected (head.bias), 1 of another shape (visual.proj is (32, 5)"
        in message
    )
    assert "must be (32, 24))" in message


def test_what_transformers_would_report_is_said_in_our_one_line(hf_folder, capfd):
    state = {**transformers_clip("gelu").state_dict(), "lora.weight": torch.zeros(2), "head.bias": torch.zeros(2)}
    save_file({name: value.contiguous() for name, value in state.items()}, hf_folder / "model.safetensors")
    backbone = load_backbone(str(hf_folder), "openai", image_size=IMAGE_SIZE)
    assert backbone.notes == (
        "model.safetensors: 2 tensor(s) that are no part of a CLIP left out: head.bias, lora.weight",
    )
    assert_same_as_transformers(backbone.clip, transformers_clip("gelu"))
    assert capfd.readouterr() == ("", "")


def test_of_a_repository_too(hf_folder, tmp_path, monkeypatch):
    add = offline(tmp_path / "hub", monkeypatch)
    state = {**transformers_clip("gelu").state_dict(), "head.bias": torch.zeros(2)}
    save_file(
        {name: value.contiguous() for name, value in state.items()}, hf_folder / "model.safetensors", {"format": "pt"}
    )
    add("org/clip", hf_folder)
    records: list[logging.LogRecord] = []  # the library's own handler writes to a stream of an earlier test
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    backbone = load_backbone("org/clip", "openai", image_size=IMAGE_SIZE)
    assert backbone.notes == ("org/clip: 1 tensor(s) that are no part of a CLIP left out: head.bias",)
    assert_same_as_transformers(backbone.clip, transformers_clip("gelu"))
    assert records == []


def test_positions_of_other_images_than_the_config_names_are_refused(hf_folder):
    edit_json(hf_folder / "config.json", "vision_config", "image_size", value=64)
    assert "images of 64 pixels need 65 positions, not 17" in refusal(str(hf_folder), "openai", image_size=64)


# -- OpenAI's own


@pytest.fixture
def openai_name(monkeypatch) -> str:
    """A name under which open_clip knows the architecture of `openai_clip`, with GELU as all without -quickgelu."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-B-8", openai_sizes())
    return "Small-B-8"


def openai_state_dict(path: Path, numbers: str) -> Path:
    """The plain state dict with OpenAI's numbers, as tensors or as Python's."""
    state: dict[str, Any] = {name: value.half() for name, value in openai_clip().state_dict().items()}
    for name in weights.OPENAI:
        state[name] = int(state[name]) if numbers == "int" else state[name].long()
    torch.save({**state, "attn_mask": torch.zeros(CONTEXT, CONTEXT)}, path)
    return path


@pytest.mark.parametrize("form", ["archive", "tensor", "int"])
def test_openais_own_files_embed_as_the_model_they_were_made_of(openai_name, tmp_path, form):
    path = tmp_path / "ViT-B-8.pt"
    write_openai_archive(path) if form == "archive" else openai_state_dict(path, form)
    backbone = load_backbone(openai_name, str(path))
    assert_same_as_open_clip(backbone.clip, openai_clip())
    assert backbone.activation == "QuickGELU" and backbone.image_size == IMAGE_SIZE
    assert backbone.notes == ("ViT-B-8.pt is OpenAI's own form: activation QuickGELU",)
    assert {parameter.dtype for parameter in backbone.clip.parameters()} == {torch.float32}


def test_the_pixels_of_openais_own_file_are_those_of_its_positions(openai_name, tmp_path):
    open_clip.factory._MODEL_CONFIGS[openai_name]["vision_cfg"]["image_size"] = 48
    path = write_openai_archive(tmp_path / "ViT-B-8.pt")
    backbone = load_backbone(openai_name, str(path))
    assert backbone.image_size == IMAGE_SIZE
    assert torch.equal(backbone.clip.visual.positional_embedding, openai_clip().visual.positional_embedding)


def test_openais_own_file_is_a_model_by_itself(tmp_path):
    model = openai_clip(49408)
    path = write_openai_archive(tmp_path / "ViT-B-8.pt", model)
    backbone = load_backbone(str(path), "openai")
    assert backbone.config["model_cfg"] == {**openai_sizes(49408), "quick_gelu": True}
    with torch.no_grad():
        tokens = backbone.tokenizer(["a cat", "two dogs"])
        torch.testing.assert_close(backbone.clip.encode_text(tokens), model.encode_text(tokens), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            backbone.clip.encode_image(images()), model.encode_image(images()), atol=1e-5, rtol=1e-5
        )
    assert backbone.notes == ("ViT-B-8.pt is OpenAI's own form: sizes and activation QuickGELU are taken from it",)


def test_sizes_of_openais_convolutional_models_are_told_too():
    config = open_clip.get_model_config("RN50")
    with torch.device("meta"):
        state = open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"}).state_dict()
    found = weights.openai_config(weights.Weights(state))
    expected = {**config, "quick_gelu": True}
    assert {key: found[key] for key in ("embed_dim", "quick_gelu", "text_cfg", "vision_cfg")} == {
        key: expected[key] for key in ("embed_dim", "quick_gelu", "text_cfg", "vision_cfg")
    }


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"])
def test_sizes_of_openais_transformers_are_those_that_open_clip_knows(name):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    found = weights.openai_config(weights.Weights(state))
    assert found["text_cfg"] == config["text_cfg"] and found["embed_dim"] == config["embed_dim"]
    assert {**config["vision_cfg"], "head_width": 64} == found["vision_cfg"]


def test_a_file_that_does_not_tell_its_architecture_is_no_model_by_itself(tmp_path):
    torch.save(reference().state_dict(), tmp_path / "weights.pt")
    message = refusal(str(tmp_path / "weights.pt"), "openai")
    assert "does not tell its own architecture" in message and "--clip_pretrained" in message


def test_openais_own_file_of_another_architecture_is_refused(small_name, tmp_path):
    message = refusal(small_name, str(write_openai_archive(tmp_path / "ViT-B-8.pt")))
    assert message.startswith("the weights do not fit Small-CLIP") and "of another shape" in message


def test_the_code_of_an_archive_is_left_unread(openai_name, tmp_path):
    path, changed = write_openai_archive(tmp_path / "a.pt"), tmp_path / "ViT-B-8.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            is_code = "/code/" in entry.filename or entry.filename.endswith("constants.pkl")
            new.writestr(entry.filename, b"raise SystemExit" if is_code else old.read(entry))
    assert_same_as_open_clip(load_backbone(openai_name, str(changed)).clip, openai_clip())


def archive_with(path: Path, tree: bytes, **storages: bytes) -> Path:
    """A TorchScript archive with such a tree of modules."""
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("a/data.pkl", tree)
        new.writestr("a/constants.pkl", b"\x80\x02).")
        for key, content in storages.items():
            new.writestr(f"a/data/{key.removeprefix('s')}", content)
    return path


TENSOR = "ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI{count}\ntQ{view}I00\n}}tR"


def tree_of(tensor: str) -> bytes:
    """A module with one tensor in it, in the letters of pickles."""
    return f"\x80\x02c__torch__\nM\n)\x81}}Vw\n{tensor}sb.".encode("latin-1")


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (tree_of(TENSOR.format(count=4, view="I0\n(I4\nt(I1\nt")), ""),
        (tree_of(TENSOR.format(count=4, view="I0\n(I5\nt(I1\nt")), "larger than its storage"),
        (tree_of(TENSOR.format(count=4, view="I1\n(I4\nt(I1\nt")), "larger than its storage"),
        (tree_of(TENSOR.format(count=4, view="I0\n(I2\nt(I4\nt")), "larger than its storage"),
        (tree_of(TENSOR.format(count=4, view="I-1\n(I2\nt(I1\nt")), "a tensor of no shape"),
        (tree_of(TENSOR.format(count=4, view="I0\n(I2\nI2\nt(I1\nt")), "a tensor of no shape"),
        (tree_of(TENSOR.format(count=10**12, view="I0\n(I4\nt(I1\nt")), "values and holds 16 bytes"),
        (tree_of(TENSOR.format(count=4, view="I0\n(I1000000000\nt(I0\nt")), "claims 1000000000 values"),
        (tree_of(TENSOR.format(count=4, view="I0\n(I4\nt(I1\nt").replace("V0\n", "V7\n")), "a/data/7"),
        (b"\x80\x02cposix\nsystem\n(Vtouch planted\ntR.", "posix.system among its values"),
        (b"\x80\x02c__torch__\nM\n)\x81}b.", "without tensors"),
        (b"\x80\x02I3\n.", "without tensors"),
        (b"", "Ran out of input"),
    ],
)
def test_an_archive_that_lies_or_brings_code_is_refused(tmp_path, monkeypatch, tree, says):
    monkeypatch.chdir(tmp_path)
    path = archive_with(tmp_path / "a.pt", tree, s0=np.arange(4, dtype=np.float32).tobytes())
    if says:
        message = refusals.refusal(weights.read_weights, path)
        assert message.startswith(f"{path}: cannot be read as weights (") and says in message
    else:
        assert weights.read_weights(path).tensors["w"].tolist() == [0, 1, 2, 3]
    assert not (tmp_path / "planted").exists()


def test_a_module_that_holds_itself_is_read_once(tmp_path):
    tensor = TENSOR.format(count=4, view="I0\n(I4\nt(I1\nt")
    tree = f"\x80\x02c__torch__\nM\n)\x81q\x00}}(Vagain\nh\x00Vw\n{tensor}ub.".encode("latin-1")
    path = archive_with(tmp_path / "a.pt", tree, s0=np.arange(4, dtype=np.float32).tobytes())
    assert list(weights.read_weights(path).tensors) == ["w"]
