"""A CLIP with all that is needed to feed it: from a name, or back from a checkpoint folder.

The internal form is open_clip's `CustomTextCLIP`, whose two towers are separate modules, `visual` and `text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip

from backbones.build import build_clip, check_size
from backbones.names import check_hf_text, resolve
from backbones.tokenizers import (
    TOKENIZER_DIR,
    Tokenizer,
    TransformersTokenizer,
    check_tokenizer_options,
    restore_tokenizer,
)
from backbones.weights import load_state


@dataclass(frozen=True)
class Backbone:
    """A CLIP with all that is needed to feed it and to build it again."""

    clip: open_clip.CustomTextCLIP
    tokenizer: Tokenizer
    config: dict[str, Any]  # open_clip's own form: {"model_cfg": {...}, "preprocess_cfg": {"mean", "std", ...}}
    notes: tuple[str, ...] = ()  # what a user should know of how it was loaded

    @property
    def embed_dim(self) -> int:
        """Width of the joint embedding."""
        return self.config["model_cfg"]["embed_dim"]

    @property
    def image_size(self) -> int:
        """Pixels per side that it sees."""
        return self.config["model_cfg"]["vision_cfg"]["image_size"]

    @property
    def activation(self) -> str:
        """The activation of the transformer blocks."""
        return "QuickGELU" if self.config["model_cfg"].get("quick_gelu") else "GELU"


def load_backbone(name: str, pretrained: str, *, image_size: int | None = None) -> Backbone:
    """Build the CLIP called `name` with the weights `pretrained`.

    Args:
        name: an open_clip name ("ViT-L-14", also "ViT-L/14@336"), "local-dir:PATH" or "hf-hub:ORG/NAME" in
            open_clip's or transformers' form, a hub id "ORG/NAME", or "tiny".
        pretrained: a tag, a weights file, "none" (random, from the global seed) or "assets" (lite, tiny). A folder or
            hub repository brings its own weights; only "none" matters there.
        image_size: pixels per side, to which the position table is interpolated; None: as it was trained.

    Raises:
        ValueError: an unknown name or tag, weights that do not fit, no network, or an unusable image size.
    """
    source = resolve(name, pretrained)
    weights = source.read_state() if pretrained != "none" else None
    tokenizer = source.tokenizer()
    native = native_size(source.config)
    image_size = image_size or native
    notes = (*source.notes, *(weights.notes if weights else ()))
    if weights and native != image_size:
        notes += (f"this CLIP was trained at {native} pixels; --image_size {native} would match it",)
    if source.is_found:
        shapes = {key: tuple(value.shape) for key, value in weights.tensors.items()} if weights else None
        check_size(source.config, name, shapes, image_size=image_size)
    clip = build_clip(source.config, image_size=image_size)
    if weights:
        load_state(clip, weights.tensors, f"{name} ({pretrained}) at {image_size} pixels", weights.wrappers)
    return Backbone(clip=clip, tokenizer=tokenizer, config=source.config, notes=notes)


def native_size(config: Mapping[str, Any]) -> int:
    """Pixels per side that a CLIP in open_clip's form was trained at."""
    return config["model_cfg"]["vision_cfg"].get("image_size", 224)


def save_text_files(backbone: Backbone, folder: Path) -> None:
    """Put what a Hugging Face tokenizer or text tower reads beside the weights; open_clip's own need nothing."""
    place = folder / TOKENIZER_DIR
    if isinstance(backbone.tokenizer, (TransformersTokenizer, open_clip.tokenizer.HFTokenizer)):
        backbone.tokenizer.save_pretrained(str(place))
    if backbone.config["model_cfg"]["text_cfg"].get("hf_model_name"):
        backbone.clip.text.config.save_pretrained(str(place))


def rebuild_clip(config: Mapping[str, Any], folder: Path, *, image_size: int) -> open_clip.CustomTextCLIP:
    """The CLIP of a checkpoint folder, with random weights, without a network. Raises ValueError."""
    own = deepcopy(dict(config))
    text = own["model_cfg"]["text_cfg"]
    check_tokenizer_options(text)
    if text.get("hf_model_name"):
        check_hf_text(folder / TOKENIZER_DIR)
        text["hf_model_name"] = str((folder / TOKENIZER_DIR).resolve())  # a relative one could be that of a repository
    return build_clip(own, image_size=image_size)


def rebuild_backbone(config: Mapping[str, Any], folder: Path, *, image_size: int) -> Backbone:
    """The backbone of a checkpoint folder, with random weights, without a network. Raises ValueError."""
    own = deepcopy(dict(config))
    clip = rebuild_clip(own, folder, image_size=image_size)
    own["model_cfg"]["vision_cfg"]["image_size"] = image_size
    tokenizer = restore_tokenizer(own["model_cfg"]["text_cfg"], folder / TOKENIZER_DIR)
    return Backbone(clip=clip, tokenizer=tokenizer, config=own)


def size_description(config: Mapping[str, Any], folder: Path) -> list[Any]:
    """All that decides how large the CLIP of a checkpoint folder is, as JSON values. Raises ValueError."""
    is_hf = bool(config["model_cfg"]["text_cfg"].get("hf_model_name"))
    return [config, check_hf_text(folder / TOKENIZER_DIR) if is_hf else {}]
