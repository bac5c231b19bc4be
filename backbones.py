"""Where a CLIP comes from: names, tags, folders and files in, one internal form out.

The internal form is open_clip's `CustomTextCLIP`, whose two towers are separate modules, `visual` and `text`.
Nothing is ever replaced silently: what cannot be loaded is refused in one line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX
from torch import Tensor, nn

TINY_DIR = Path(__file__).parent / "assets" / "tiny-clip"
CONFIG_FILE = "open_clip_config.json"
TOKENIZER_DIR = "tokenizer"
DEFAULT_PREPROCESS = {
    "mean": list(open_clip.constants.OPENAI_DATASET_MEAN),
    "std": list(open_clip.constants.OPENAI_DATASET_STD),
}

Tokenizer = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Backbone:
    """A CLIP with all that is needed to feed it and to build it again."""

    clip: nn.Module
    tokenizer: Tokenizer
    config: dict[str, Any]  # open_clip's own form: {"model_cfg": {...}, "preprocess_cfg": {"mean", "std"}}

    @property
    def embed_dim(self) -> int:
        return self.config["model_cfg"]["embed_dim"]

    @property
    def context_length(self) -> int:
        return self.clip.context_length

    @property
    def mean(self) -> list[float]:
        return self.config["preprocess_cfg"]["mean"]

    @property
    def std(self) -> list[float]:
        return self.config["preprocess_cfg"]["std"]


def load_backbone(name: str, pretrained: str, *, image_size: int) -> Backbone:
    """Build the CLIP called `name` with the weights `pretrained`.

    Args:
        name: an open_clip name, "local-dir:PATH", "hf-hub:ORG/NAME" or "tiny".
        pretrained: a tag, the path of a weights file, "none" (random, from the global seed) or, for tiny, "assets".
            Ignored where the name brings its own weights, unless "none".
        image_size: pixels per side; the position table is interpolated to it.

    Raises:
        ValueError: an unknown name or tag, weights that do not fit, no network, or an unusable image size.
    """
    if name == "tiny":
        if pretrained not in ("none", "assets"):
            raise ValueError(f"--clip_model tiny --clip_pretrained {pretrained}: tiny has 'assets' or 'none' (random)")
        name = f"{LOCAL_DIR_PREFIX}{TINY_DIR}"
    if name.startswith(LOCAL_DIR_PREFIX):
        config, weights = read_local_dir(Path(name.removeprefix(LOCAL_DIR_PREFIX)))
    elif name.startswith(HF_HUB_PREFIX):
        config, weights = fetch_hub(name)
    else:
        config, weights = find_named(name, pretrained)
    clip = build_clip(config, image_size=image_size)
    if pretrained != "none":
        load_weights(clip, weights, name)
    return Backbone(clip=clip, tokenizer=build_tokenizer(name), config=config)


def read_local_dir(folder: Path) -> tuple[dict[str, Any], Path | None]:
    """Config and weights file of a folder in open_clip's form. Raises ValueError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"--clip_model {LOCAL_DIR_PREFIX}{folder}: there is no {path}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        config = {
            "model_cfg": saved["model_cfg"],
            "preprocess_cfg": {**DEFAULT_PREPROCESS, **saved.get("preprocess_cfg", {})},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an open_clip config with a model_cfg ({error!r})") from None
    found = open_clip.factory._find_checkpoint_in_dir(folder)
    return config, Path(found) if found else None


def fetch_hub(name: str) -> tuple[dict[str, Any], Path]:
    """Config and weights of an open_clip model on the Hugging Face hub. Raises ValueError."""
    model_id = name.removeprefix(HF_HUB_PREFIX)
    saved = download(name, lambda: open_clip.factory._get_hf_config(model_id))
    weights = download(name, lambda: open_clip.pretrained.download_pretrained_from_hf(model_id))
    config = {
        "model_cfg": saved["model_cfg"],
        "preprocess_cfg": {**DEFAULT_PREPROCESS, **saved.get("preprocess_cfg", {})},
    }
    return config, Path(weights)


def find_named(name: str, pretrained: str) -> tuple[dict[str, Any], Path | None]:
    """Config and weights file of a built-in open_clip name (also written with slashes). Raises ValueError."""
    key = name.replace("/", "-").replace("@", "-")
    model_cfg = open_clip.get_model_config(key)
    if model_cfg is None:
        near = difflib.get_close_matches(key, open_clip.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(
            f"--clip_model {name}: not an open_clip model{hint}. Also: tiny, local-dir:PATH, hf-hub:ORG/NAME"
        )
    config = {"model_cfg": model_cfg, "preprocess_cfg": dict(DEFAULT_PREPROCESS)}
    if pretrained == "none":
        return config, None
    if Path(pretrained).is_file():
        return config, Path(pretrained)
    tag = open_clip.get_pretrained_cfg(key, pretrained)
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(key)) or "none"
        raise ValueError(
            f"--clip_pretrained {pretrained}: neither a file nor a tag of {key}; its tags: {tags}; 'none' for random"
        )
    # The activation and the normalisation belong to the weights, not to the architecture's name.
    model_cfg["quick_gelu"] = tag.get("quick_gelu", False)
    config["preprocess_cfg"] = {"mean": list(tag["mean"]), "std": list(tag["std"])}
    return config, Path(download(f"{name} ({pretrained})", lambda: open_clip.download_pretrained(tag)))


def download(what: str, fetch: Callable[[], Any]) -> Any:
    """Run a download; any failure becomes one line that names the ways without a network."""
    try:
        return fetch()
    except Exception as error:  # hub, HTTP and socket libraries share no base class; the cause is kept
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"cannot download {what}: {reason[:160]}. Without a network: --clip_pretrained WEIGHTS_FILE, "
            "--clip_model local-dir:FOLDER, or --clip_model tiny --clip_pretrained assets"
        ) from error


def build_clip(config: dict[str, Any], *, image_size: int) -> nn.Module:
    """A randomly initialised CustomTextCLIP; writes `image_size` into the config. Raises ValueError."""
    model_cfg = config["model_cfg"]
    if "multimodal_cfg" in model_cfg:
        raise ValueError("CoCa models are not supported: their text tower is trained to generate, not to embed")
    vision = model_cfg["vision_cfg"]
    patch = vision.get("patch_size", 16)
    if "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int) and image_size % patch:
        near = max(1, round(image_size / patch)) * patch
        raise ValueError(f"--image_size {image_size}: must be a multiple of this model's patch size {patch}, as {near}")
    vision["image_size"] = image_size
    plain = {key: value for key, value in deepcopy(model_cfg).items() if key != "custom_text"}
    plain["vision_cfg"]["timm_model_pretrained"] = False
    plain["text_cfg"]["hf_model_pretrained"] = False
    try:
        return open_clip.CustomTextCLIP(**plain)
    except (TypeError, KeyError, AssertionError, RuntimeError, OSError) as error:
        raise ValueError(f"cannot build a CLIP from its config: {error}") from error


def load_weights(clip: nn.Module, path: Path | None, name: str) -> None:
    """Load a weights file strictly. Raises ValueError: missing, unreadable, or of another architecture."""
    if path is None:
        raise ValueError(
            f"--clip_model {name}: no weights file in that folder; --clip_pretrained none starts at random"
        )
    try:
        open_clip.load_checkpoint(clip, str(path), strict=True, weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and key errors share no base class; the cause is kept
        raise ValueError(
            f"{path}: not weights of {name} in open_clip's form ({str(error).splitlines()[0][:160]})"
        ) from error


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that goes with a model name. Raises ValueError if it must be downloaded and cannot be."""
    plain = name if ":" in name else name.replace("/", "-").replace("@", "-")
    return download(f"the tokenizer of {name}", lambda: open_clip.get_tokenizer(plain))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put a Hugging Face tokenizer's files beside the weights; open_clip's own needs none."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder / TOKENIZER_DIR))


def restore_tokenizer(config: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, without a network."""
    text = config["model_cfg"]["text_cfg"]
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = text.get("tokenizer_kwargs") or {}
    if (folder / TOKENIZER_DIR).is_dir():
        return open_clip.tokenizer.HFTokenizer(
            str(folder / TOKENIZER_DIR), context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options
        )
    return open_clip.SimpleTokenizer(context_length=length, **options)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> tuple[Tensor, int]:
    """Texts -> (P, context_length) int64, and how many of them were too long and have been cut."""
    if not texts:
        return torch.zeros(0, context_length, dtype=torch.long), 0
    tokens_PN = tokenizer(list(texts))
    # A row that fills the context may just fit: cut only if more context would have held more tokens.
    full = (tokens_PN != 0).all(dim=1).nonzero().flatten().tolist()
    longer = tokenizer([texts[index] for index in full], context_length=context_length + 1) if full else tokens_PN[:0]
    return tokens_PN, int((longer[:, -1:] != 0).sum())
