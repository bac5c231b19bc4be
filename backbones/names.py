"""What the name of a CLIP means: an open_clip name, a folder or a hub repository in, a `ClipSource` out.

Activation, sizes, normalisation and tokenizer follow the source of the weights. Nothing is ever replaced silently:
what cannot be loaded is refused in one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from backbones.build import check_size
from backbones.download import HF_HUB, LOCAL_DIR, download, first_line
from backbones.tokenizers import Tokenizer, TransformersTokenizer, open_tokenizer
from backbones.transformers_format import (
    DEFAULT_PREPROCESS,
    config_from_transformers,
    read_preprocess,
    state_from_transformers,
)
from backbones.weights import find_weights, read_weights, stored_shapes
from storage.json_files import read_json

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = {"lite": ASSETS / "lite", "tiny": ASSETS / "tiny-clip"}
OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class ClipSource:
    """A resolved name: the architecture, and how to get weights and tokenizer when they are wanted."""

    config: dict[str, Any]
    read_state: Callable[[], Mapping[str, Tensor]]
    tokenizer: Callable[[], Tokenizer]
    notes: tuple[str, ...] = ()
    is_found: bool = True  # the architecture stands in a file that somebody wrote, not in open_clip's own list


def resolve(name: str, pretrained: str) -> ClipSource:
    """Find out what a name means. Raises ValueError."""
    if name in EMBEDDED:
        if pretrained not in ("none", "assets"):
            raise ValueError(
                f"--clip_model {name} --clip_pretrained {pretrained}: must be 'assets', or 'none' (random)"
            )
        return from_folder(EMBEDDED[name])
    if pretrained not in ("openai", "none") and (name.startswith((LOCAL_DIR, HF_HUB)) or Path(name).is_dir()):
        raise ValueError(f"--clip_pretrained {pretrained}: {name} brings its own weights; drop it, or say none")
    if name.startswith(LOCAL_DIR):
        return from_folder(Path(name.removeprefix(LOCAL_DIR)))
    key = name.replace("/", "-").replace("@", "-")
    if key in open_clip.list_models():
        return from_name(key, pretrained)
    if Path(name).is_dir():
        return from_folder(Path(name))
    if name.startswith(HF_HUB) or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return from_hub(name.removeprefix(HF_HUB))
    near = difflib.get_close_matches(key, open_clip.list_models(), n=3)
    raise ValueError(
        f"--clip_model {name}: not an open_clip model{'; near: ' + ', '.join(near) if near else ''}. "
        "Also possible: lite, tiny, local-dir:PATH, hf-hub:ORG/NAME"
    )


def from_name(key: str, pretrained: str) -> ClipSource:
    """A built-in open_clip architecture with a tag or a weights file. Raises ValueError."""
    model_cfg = open_clip.get_model_config(key)
    preprocess = dict(DEFAULT_PREPROCESS)
    notes: tuple[str, ...] = ()
    tag = open_clip.get_pretrained_cfg(key, pretrained)
    if tag:
        # The activation and the normalisation belong to the weights, not to the architecture's name.
        model_cfg["quick_gelu"] = tag.get("quick_gelu", False)
        preprocess = preprocessing(tag)
    elif pretrained != "none" and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(key)) or "none"
        raise ValueError(f"--clip_pretrained {pretrained}: neither a file nor a tag of {key} (tags: {tags})")
    elif pretrained != "none":
        beside = Path(pretrained).parent
        if any((beside / config).is_file() for config in (OPEN_CLIP_CONFIG, "config.json")):
            found = from_folder(beside).config
            model_cfg["quick_gelu"] = found["model_cfg"].get("quick_gelu", False)
            preprocess = found["preprocess_cfg"]
        else:
            activation = "QuickGELU" if model_cfg.get("quick_gelu") else "GELU"
            notes = (f"activation {activation} is taken from the name {key}: a weights file does not tell its own",)

    def read_state() -> Mapping[str, Tensor]:
        what = f"{key} ({pretrained})"
        path = download(what, lambda: open_clip.download_pretrained(tag)) if tag else pretrained
        return read_weights(Path(path))

    return ClipSource(
        {"model_cfg": model_cfg, "preprocess_cfg": preprocess},
        read_state,
        lambda: open_tokenizer(key, model_cfg),
        notes,
        is_found=False,
    )


def preprocessing(said: Mapping[str, Any]) -> dict[str, Any]:
    """What an image goes through on its way into a CLIP, as far as it is not the same for all."""
    usual = {"resize_mode": "shortest", "interpolation": "bicubic"}
    own = {key: said[key] for key, value in usual.items() if said.get(key, value) not in (value, None)}
    return {"mean": list(said["mean"]), "std": list(said["std"]), **own}


def from_folder(folder: Path) -> ClipSource:
    """A folder in open_clip's or transformers' form. Raises ValueError."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return from_open_clip_files(str(folder), LOCAL_DIR, folder / OPEN_CLIP_CONFIG, lambda: find_weights(folder))
    if (folder / "config.json").is_file():
        return from_transformers(str(folder))
    raise ValueError(f"--clip_model {LOCAL_DIR}{folder}: there is neither {OPEN_CLIP_CONFIG} nor config.json in it")


def from_hub(model_id: str) -> ClipSource:
    """A repository of the Hugging Face hub, in open_clip's or transformers' form. Raises ValueError."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    def config_file() -> str | None:
        try:
            return hf_hub_download(model_id, OPEN_CLIP_CONFIG)
        except EntryNotFoundError as error:
            # LocalEntryNotFoundError: there is no network either, and perhaps a transformers form in the cache.
            if isinstance(error, OSError) and not isinstance(try_to_load_from_cache(model_id, "config.json"), str):
                raise
            return None

    path = download(f"{HF_HUB}{model_id}", config_file)
    if path is None:
        return from_transformers(model_id)
    fetch = open_clip.pretrained.download_pretrained_from_hf
    return from_open_clip_files(
        model_id, HF_HUB, Path(path), lambda: download(f"{HF_HUB}{model_id}", lambda: Path(fetch(model_id)))
    )


def from_open_clip_files(place: str, scheme: str, config_path: Path, weights_path: Callable[[], Path]) -> ClipSource:
    """A folder or hub repository in open_clip's form. Raises ValueError."""
    try:
        saved = read_json(config_path)
        preprocess = {**DEFAULT_PREPROCESS, **saved.get("preprocess_cfg", {})}
        model_cfg = dict(saved["model_cfg"])
        model_cfg |= {tower: dict(model_cfg[tower]) for tower in ("vision_cfg", "text_cfg")}  # both must be there
        config = {"model_cfg": model_cfg, "preprocess_cfg": preprocessing(preprocess)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config_path}: not an open_clip config with a model_cfg ({error!r})") from None
    if scheme == LOCAL_DIR:
        keep_local(model_cfg["text_cfg"], Path(place))
    name = scheme + place
    return ClipSource(config, lambda: read_weights(weights_path()), lambda: open_tokenizer(name, model_cfg))


def keep_local(text_cfg: dict[str, Any], folder: Path) -> None:
    """Let the text tower of a folder be read from this machine alone. Raises ValueError if it is not here."""
    from huggingface_hub import try_to_load_from_cache

    name = text_cfg.get("hf_model_name")
    if not name:
        return
    if not isinstance(name, str) or not Path(name).is_dir():
        cached = try_to_load_from_cache(name, "config.json") if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) else None
        if not isinstance(cached, str):
            raise ValueError(
                f"{folder / OPEN_CLIP_CONFIG}: hf_model_name {name!r} is not on this machine, and no file may fetch it"
            )
        text_cfg["hf_model_name"] = str(Path(cached).parent)
    check_hf_text(Path(text_cfg["hf_model_name"]))


def check_hf_text(place: Path) -> dict[str, Any]:
    """The config of a Hugging Face text tower in a folder. Raises ValueError for what open_clip has no tower for."""
    from open_clip.hf_configs import arch_dict

    try:
        found = read_json(place / "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: no text tower ({error})") from None
    if found.get("model_type") not in arch_dict:
        raise ValueError(
            f"{place}: a text tower of type {found.get('model_type')!r}, must be of {', '.join(arch_dict)}"
        )
    return found


def from_transformers(place: str) -> ClipSource:
    """A CLIPModel of the transformers library, from a folder or the hub. Raises ValueError."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if Path(place).is_dir():
        read_json(Path(place) / "config.json")
    found = download(place, lambda: CLIPConfig.get_config_dict(place)[0])
    if found.get("model_type") != "clip":
        raise ValueError(f"{place}: is a {found.get('model_type')!r} model, only 'clip' can be read in this form")
    try:
        parsed = CLIPConfig.from_dict(found)
    except Exception as error:  # its validation errors have no base in common with others; the cause is kept
        raise ValueError(f"{place}: config.json cannot be used ({first_line(error, skip=1)})") from error
    config = {"model_cfg": config_from_transformers(parsed, place), "preprocess_cfg": read_preprocess(place)}

    is_local = Path(place).is_dir()

    def read_state() -> Mapping[str, Tensor]:
        if is_local:
            check_size(
                config, place, stored_shapes(Path(place)), image_size=config["model_cfg"]["vision_cfg"]["image_size"]
            )
        model, report = download(
            place,
            lambda: CLIPModel.from_pretrained(
                place,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=is_local,
                trust_remote_code=False,
            ),
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            raise ValueError(f"{place}: {len(names)} weights are missing or misshapen, such as {names[0]}")
        return state_from_transformers(model.state_dict())

    return ClipSource(config, read_state, lambda: TransformersTokenizer.load(place, parsed.text_config))
