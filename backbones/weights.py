"""Files of weights: found, read without running code from them, and checked."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import resize_pos_embed
from torch import Tensor

from backbones.download import first_line
from backbones.transformers_format import state_from_transformers
from storage.tensors import weight_shapes


def find_weights(folder: Path) -> Path:
    """The weights file of a folder in open_clip's form, safetensors preferred. Raises ValueError."""
    for pattern in ("open_clip_model.safetensors", "*.safetensors", "*.pt", "*.pth", "*.bin"):
        for path in sorted(folder.glob(pattern)):
            return path
    raise ValueError(f"{folder}: no weights file in it; --clip_pretrained none starts at random")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a .safetensors or a pickled file; never runs code from it. Raises ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is said in our one line
            refuse_bomb(path)
            state = open_clip.factory.load_state_dict(str(path), weights_only=True)
            refuse_claims(path, state)
    except Exception as error:  # pickle, zip and safetensors errors share no base; the cause is kept
        reason = first_line(error)
        if "TorchScript" in str(error):
            reason = "a TorchScript archive, which can hold code: save its state_dict() as .safetensors"
        raise ValueError(f"{path}: cannot be read as weights ({reason})") from error
    if "vision_model.embeddings.class_embedding" in state:
        try:
            return state_from_transformers(state)
        except KeyError as error:
            raise ValueError(f"{path}: weights in transformers' form without {error}") from None
    return state


def refuse_bomb(path: Path) -> None:
    """Raise ValueError for weights that would unpack to far more than the file holds; torch packs nothing."""
    if path.suffix == ".safetensors":
        weight_shapes(path)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 2 * path.stat().st_size:
                raise ValueError("a compressed archive")


def refuse_claims(path: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError for a tensor that claims to be larger than the file it came from."""
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is no named tensor")
        if tensor.numel() * tensor.itemsize > path.stat().st_size:
            raise ValueError(f"{name!r} claims {tensor.numel()} values")


def load_state(clip: open_clip.CustomTextCLIP, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load tensors in open_clip's form strictly; position tables are interpolated to the built size.

    Raises:
        ValueError: names or shapes do not fit.
    """
    state = dict(tensors)
    if "positional_embedding" in state:
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    state.pop("text.transformer.embeddings.position_ids", None)  # older exports of Hugging Face text towers
    try:
        for name in ("logit_scale", "logit_bias"):
            own = getattr(clip, name, None)
            if name in state and own is not None:
                state[name] = state[name].reshape(own.shape)
        for name in ("visual.positional_embedding", "text.positional_embedding"):
            if name in state:
                state[name] = state[name].float()  # half precision cannot be interpolated on a CPU
        resize_pos_embed(state, clip)
        clip.load_state_dict(state, strict=True)
    except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"the weights do not fit {what}: {first_line(error, skip=1)}") from error


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder in transformers' form. Raises ValueError for a damaged file, or none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            shapes |= weight_shapes(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as weights ({error})") from None
    for path in () if shapes else sorted(folder.glob("*.bin")):
        shapes |= {name: tuple(tensor.shape) for name, tensor in read_weights(path).items()}
    if not shapes:
        raise ValueError(f"{folder}: no model.safetensors in it; --clip_pretrained none starts at random")
    return shapes
