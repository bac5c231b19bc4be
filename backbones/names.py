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

from backbones.download import HF_HUB, LOCAL_DIR, download, first_line
from backbones.tokenizers import Tokenizer, TransformersTokenizer, open_tokenizer
from backbones.transformers_format import (
    DEFAULT_PREPROCESS,
    config_from_transformers,
    read_preprocess,
    state_from_transformers,
)
from backbones.weights import Weights, find_weights, native_pixels, openai_config, read_weights
from storage.json_files import read_json
from storage.messages import first_five

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = {"lite": ASSETS / "lite", "tiny": ASSETS / "tiny-clip"}
OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class ClipSource:
    """A resolved name: the architecture, and how to get weights and tokenizer when they are wanted."""

    config: dict[str, Any]
    read_state: Callable[[], Weights]
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
    place, key = Path(name.removeprefix(LOCAL_DIR)), name.replace("/", "-").replace("@", "-")
    is_folder = name.startswith(LOCAL_DIR) or (place.is_dir() and key not in open_clip.list_models())
    own = Path(pretrained) if is_folder and Path(pretrained).resolve().parent == place.resolve() else None
    if pretrained not in ("openai", "none") and own is None and (is_folder or name.startswith(HF_HUB)):
        raise ValueError(f"--clip_pretrained {pretrained}: {name} brings its own weights; drop it, or say none")
    if is_folder:
        return from_folder(place, own if own and own.is_file() else None)
    if key in open_clip.list_models():
        return from_name(key, pretrained)
    if place.is_file():
        return from_openai_file(place)
    if name.startswith(HF_HUB) or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return from_hub(name.removeprefix(HF_HUB))
    near = difflib.get_close_matches(key, open_clip.list_models(), n=3)
    raise ValueError(
        f"--clip_model {name}: not an open_clip model{'; near: ' + ', '.join(near) if near else ''}. "
        "Also possible: lite, tiny, local-dir:PATH, hf-hub:ORG/NAME, one of OpenAI's own files"
    )


def from_name(key: str, pretrained: str) -> ClipSource:
    """A built-in open_clip architecture with a tag or a weights file. Raises ValueError."""
    model_cfg = open_clip.get_model_config(key)
    tag = open_clip.get_pretrained_cfg(key, pretrained)
    if tag:
        # The activation and the normalisation belong to the weights, not to the architecture's name.
        model_cfg["quick_gelu"] = tag.get("quick_gelu", False)
        config = {"model_cfg": model_cfg, "preprocess_cfg": preprocessing(tag)}

        def read_state() -> Weights:
            path = download(f"{key} ({pretrained})", lambda: open_clip.download_pretrained(tag))
            return read_weights(Path(path))

        return ClipSource(config, read_state, lambda: open_tokenizer(key, model_cfg), is_found=False)
    path = Path(pretrained)
    if pretrained != "none" and not path.exists():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(key)) or "none"
        raise ValueError(f"--clip_pretrained {pretrained}: neither a file nor a tag of {key} (tags: {tags})")
    config = {"model_cfg": model_cfg, "preprocess_cfg": dict(DEFAULT_PREPROCESS)}
    weights: Weights | None = None
    notes: tuple[str, ...] = ()
    if pretrained != "none":
        weights, notes = file_for_name(key, find_weights(path) if path.is_dir() else path, config)

    def read_file() -> Weights:
        assert weights is not None, "nothing is read for a random start"
        return weights

    return ClipSource(config, read_file, lambda: open_tokenizer(key, model_cfg), notes, is_found=False)


def file_for_name(key: str, path: Path, config: dict[str, Any]) -> tuple[Weights, tuple[str, ...]]:
    """Weights in a file for a built-in architecture, and notes; the config gets what these tell of the model."""
    weights, model_cfg = read_weights(path), config["model_cfg"]
    if weights.is_openai:
        model_cfg["quick_gelu"] = True
        if "visual.conv1.weight" in weights.tensors:
            model_cfg["vision_cfg"]["image_size"] = native_pixels(shapes_of(weights))
        return weights, (f"{path.name} is OpenAI's own form: activation QuickGELU",)
    if any((path.parent / name).is_file() for name in (OPEN_CLIP_CONFIG, "config.json")):
        found = from_folder(path.parent, path).config
        model_cfg["quick_gelu"] = found["model_cfg"].get("quick_gelu", False)
        config["preprocess_cfg"] = found["preprocess_cfg"]
        return weights, ()
    activation = "QuickGELU" if model_cfg.get("quick_gelu") else "GELU"
    return weights, (f"activation {activation} is taken from the name {key}: a weights file does not tell its own",)


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors by their names."""
    return {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}


def from_openai_file(path: Path) -> ClipSource:
    """A model of OpenAI's as a file that tells its own sizes. Raises ValueError."""
    weights = read_weights(path)
    if not weights.is_openai:
        raise ValueError(
            f"--clip_model {path}: does not tell its own architecture, as OpenAI's files do; name that, and give the "
            "file as --clip_pretrained"
        )
    try:
        model_cfg = openai_config(weights)
    except (KeyError, IndexError) as error:
        raise ValueError(f"--clip_model {path}: is no whole CLIP of OpenAI's form (no {error})") from None
    text = model_cfg["text_cfg"]
    tokenizer = open_clip.SimpleTokenizer(context_length=text["context_length"])
    if tokenizer.vocab_size != text["vocab_size"]:
        raise ValueError(f"--clip_model {path}: has {text['vocab_size']} words, OpenAI's models {tokenizer.vocab_size}")
    config = {"model_cfg": model_cfg, "preprocess_cfg": dict(DEFAULT_PREPROCESS)}
    notes = (f"{path.name} is OpenAI's own form: sizes and activation QuickGELU are taken from it",)
    return ClipSource(config, lambda: weights, lambda: tokenizer, notes)


def preprocessing(said: Mapping[str, Any]) -> dict[str, Any]:
    """What an image goes through on its way into a CLIP, as far as it is not the same for all."""
    usual = {"resize_mode": "shortest", "interpolation": "bicubic"}
    own = {key: said[key] for key, value in usual.items() if said.get(key, value) not in (value, None)}
    return {"mean": list(said["mean"]), "std": list(said["std"]), **own}


def from_folder(folder: Path, weights: Path | None = None) -> ClipSource:
    """A folder in open_clip's or transformers' form; `weights` is the file in it to read. Raises ValueError."""

    def find() -> Path:
        return weights or find_weights(folder)

    if (folder / OPEN_CLIP_CONFIG).is_file():
        return from_open_clip_files(str(folder), LOCAL_DIR, folder / OPEN_CLIP_CONFIG, find)
    if (folder / "config.json").is_file():
        return from_transformers(str(folder), find)
    inside = [path.parent.name for name in (OPEN_CLIP_CONFIG, "config.json") for path in folder.glob(f"*/{name}")]
    hint = f", but in its folders {first_five(sorted(inside))}: name one" if inside else ""
    raise ValueError(
        f"--clip_model {LOCAL_DIR}{folder}: there is neither {OPEN_CLIP_CONFIG} nor config.json in it{hint}"
    )


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


def from_transformers(place: str, find: Callable[[], Path] | None = None) -> ClipSource:
    """A CLIPModel of the transformers library, from the hub, or from a folder whose weights are found so.

    Raises:
        ValueError: it cannot be used.
    """
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

    def read_state() -> Weights:
        if find is not None:
            return fitting_pixels(read_weights(find()), config["model_cfg"]["vision_cfg"], place)
        model, report = download(
            place,
            lambda: CLIPModel.from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            ),
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            raise ValueError(f"{place}: {len(names)} weights are missing or misshapen, such as {names[0]}")
        left = sorted(map(str, report["unexpected_keys"]))
        notes = (f"{place}: {len(left)} tensor(s) that are no part of a CLIP left out: {first_five(left)}",)
        return Weights(state_from_transformers(model.state_dict())[0], notes=notes if left else ())

    return ClipSource(config, read_state, lambda: TransformersTokenizer.load(place, parsed.text_config))


def fitting_pixels(weights: Weights, vision: Mapping[str, Any], place: str) -> Weights:
    """The weights. Raises ValueError if their position table is not that of the images that a config names."""
    table = weights.tensors.get("visual.positional_embedding", torch.empty(0))
    wanted = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    if len(table) not in (0, wanted):
        raise ValueError(f"{place}: images of {vision['image_size']} pixels need {wanted} positions, not {len(table)}")
    return weights
