"""Where a CLIP comes from: names, tags, folders and files in, one internal form out.

The internal form is open_clip's `CustomTextCLIP`, whose two towers are separate modules, `visual` and `text`.
Activation, sizes, normalisation and tokenizer follow the source of the weights. Nothing is ever replaced
silently: what cannot be loaded is refused in one line.
"""

from __future__ import annotations

import difflib
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from torch import Tensor

from reading import read_json, weight_shapes
from sizes import refuse_larger

LOCAL_DIR, HF_HUB = "local-dir:", "hf-hub:"
TINY_DIR = Path(__file__).parent / "assets" / "tiny-clip"
OPEN_CLIP_CONFIG = "open_clip_config.json"
TOKENIZER_DIR = "tokenizer"
DEFAULT_PREPROCESS = {
    "mean": list(open_clip.constants.OPENAI_DATASET_MEAN),
    "std": list(open_clip.constants.OPENAI_DATASET_STD),
}
OFFLINE_WAYS = (
    "Without a network: --clip_model local-dir:FOLDER (open_clip or transformers form), --clip_pretrained WEIGHTS_FILE "
    "(OpenAI's need a -quickgelu model name), or --clip_model tiny --clip_pretrained assets"
)

MOST_PATCHES = 100_000  # of an image; some position tables are computed for all of them, whatever weights there are
# What a description may ask of a tokenizer: nothing that names a file, or lets it bring code.
TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens"}

Tokenizer = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Backbone:
    """A CLIP with all that is needed to feed it and to build it again."""

    clip: open_clip.CustomTextCLIP
    tokenizer: Tokenizer
    config: dict[str, Any]  # open_clip's own form: {"model_cfg": {...}, "preprocess_cfg": {"mean", "std"}}
    notes: tuple[str, ...] = ()  # what a user should know of how it was loaded

    @property
    def embed_dim(self) -> int:
        """Width of the joint embedding."""
        return self.config["model_cfg"]["embed_dim"]

    @property
    def activation(self) -> str:
        """The activation of the transformer blocks."""
        return "QuickGELU" if self.config["model_cfg"].get("quick_gelu") else "GELU"


@dataclass(frozen=True)
class Source:
    """A resolved name: the architecture, and how to get weights and tokenizer when they are wanted."""

    config: dict[str, Any]
    read_state: Callable[[], Mapping[str, Tensor]]
    tokenizer: Callable[[], Tokenizer]
    notes: tuple[str, ...] = ()
    is_found: bool = True  # the architecture stands in a file that somebody wrote, not in open_clip's own list


def load_backbone(name: str, pretrained: str, *, image_size: int) -> Backbone:
    """Build the CLIP called `name` with the weights `pretrained`.

    Args:
        name: an open_clip name ("ViT-L-14", also "ViT-L/14@336"), "local-dir:PATH" or "hf-hub:ORG/NAME" in
            open_clip's or transformers' form, a hub id "ORG/NAME", or "tiny".
        pretrained: a tag, a weights file, "none" (random, from the global seed) or, for tiny, "assets". A folder or
            hub repository brings its own weights; only "none" matters there.
        image_size: pixels per side; the position table is interpolated to it.

    Raises:
        ValueError: an unknown name or tag, weights that do not fit, no network, or an unusable image size.
    """
    source = resolve(name, pretrained)
    state = source.read_state() if pretrained != "none" else None
    tokenizer = source.tokenizer()
    native = source.config["model_cfg"]["vision_cfg"].get("image_size", 224)
    notes = source.notes
    if state is not None and native != image_size:
        notes += (f"this CLIP was trained at {native} pixels; --image_size {native} would match it",)
    if source.is_found:
        shapes = None if state is None else {key: tuple(value.shape) for key, value in state.items()}
        check_size(source.config, name, shapes, image_size=image_size)
    clip = build_clip(source.config, image_size=image_size)
    if state is not None:
        load_state(clip, state, f"{name} ({pretrained}) at {image_size} pixels")
    return Backbone(clip=clip, tokenizer=tokenizer, config=source.config, notes=notes)


def resolve(name: str, pretrained: str) -> Source:
    """Find out what a name means. Raises ValueError."""
    if name == "tiny":
        if pretrained not in ("none", "assets"):
            raise ValueError(f"--clip_model tiny --clip_pretrained {pretrained}: tiny has 'assets' or 'none' (random)")
        return from_folder(TINY_DIR)
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
        "Also possible: tiny, local-dir:PATH, hf-hub:ORG/NAME"
    )


def from_name(key: str, pretrained: str) -> Source:
    """A built-in open_clip architecture with a tag or a weights file. Raises ValueError."""
    model_cfg = open_clip.get_model_config(key)
    preprocess = dict(DEFAULT_PREPROCESS)
    notes: tuple[str, ...] = ()
    tag = open_clip.get_pretrained_cfg(key, pretrained)
    if tag:
        # The activation and the normalisation belong to the weights, not to the architecture's name.
        model_cfg["quick_gelu"] = tag.get("quick_gelu", False)
        preprocess = {"mean": list(tag["mean"]), "std": list(tag["std"])}
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

    return Source(
        {"model_cfg": model_cfg, "preprocess_cfg": preprocess},
        read_state,
        lambda: open_tokenizer(key, model_cfg),
        notes,
        is_found=False,
    )


def check_size(
    config: dict[str, Any], what: str, shapes: Mapping[str, tuple[int, ...]] | None, *, image_size: int
) -> None:
    """Raise ValueError if a config describes far more than its weights hold; see `sizes.refuse_larger`."""
    try:
        refuse_larger(config, shapes, lambda: build_clip(deepcopy(config), image_size=image_size))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def open_tokenizer(name: str, model_cfg: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a name, folder or hub repository, which may bring no code. Raises ValueError."""
    text = model_cfg["text_cfg"]
    check_tokenizer_options(text)
    if name.startswith(LOCAL_DIR) and text.get("hf_tokenizer_name"):
        return restore_tokenizer(text, Path(name.removeprefix(LOCAL_DIR)))
    no_code = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    return download(f"the tokenizer of {name}", lambda: open_clip.get_tokenizer(name, **no_code))


def check_tokenizer_options(text_cfg: Mapping[str, Any]) -> None:
    """Raise ValueError for options of a tokenizer that a file may not give."""
    if odd := sorted(set(text_cfg.get("tokenizer_kwargs") or {}) - TOKENIZER_OPTIONS):
        raise ValueError(
            f"tokenizer_kwargs: {odd[0]!r} is not allowed, must be of {', '.join(sorted(TOKENIZER_OPTIONS))}"
        )


def from_folder(folder: Path) -> Source:
    """A folder in open_clip's or transformers' form. Raises ValueError."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return from_open_clip_files(str(folder), LOCAL_DIR, folder / OPEN_CLIP_CONFIG, lambda: find_weights(folder))
    if (folder / "config.json").is_file():
        return from_transformers(str(folder))
    raise ValueError(f"--clip_model {LOCAL_DIR}{folder}: there is neither {OPEN_CLIP_CONFIG} nor config.json in it")


def from_hub(model_id: str) -> Source:
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


def from_open_clip_files(place: str, scheme: str, config_path: Path, weights_path: Callable[[], Path]) -> Source:
    """A folder or hub repository in open_clip's form. Raises ValueError."""
    try:
        saved = read_json(config_path)
        preprocess = {**DEFAULT_PREPROCESS, **saved.get("preprocess_cfg", {})}
        model_cfg = dict(saved["model_cfg"])
        model_cfg |= {tower: dict(model_cfg[tower]) for tower in ("vision_cfg", "text_cfg")}  # both must be there
        config = {"model_cfg": model_cfg, "preprocess_cfg": {key: preprocess[key] for key in ("mean", "std")}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config_path}: not an open_clip config with a model_cfg ({error!r})") from None
    if scheme == LOCAL_DIR:
        keep_local(model_cfg["text_cfg"], Path(place))
    name = scheme + place
    return Source(config, lambda: read_weights(weights_path()), lambda: open_tokenizer(name, model_cfg))


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


def from_transformers(place: str) -> Source:
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

    return Source(config, read_state, lambda: TransformersTokenizer.load(place, parsed.text_config))


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


def config_from_transformers(config: Any, place: str) -> dict[str, Any]:
    """A transformers CLIPConfig as an open_clip model_cfg. Raises ValueError for what open_clip cannot express."""
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act or vision.hidden_act not in ("gelu", "quick_gelu"):
        raise ValueError(f"{place}: activations {vision.hidden_act!r} and {text.hidden_act!r} are not supported")
    # Exports from before the tokenizer's own end token was recorded say 2 and pool at the highest token instead.
    legacy = text.eos_token_id == 2
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": mlp_ratio(vision),
            "norm_kwargs": {"eps": vision.layer_norm_eps},
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": mlp_ratio(text),
            "norm_kwargs": {"eps": text.layer_norm_eps},
            "pool_type": "argmax" if legacy else "eos",
            "eos_id": text.eos_token_id,
        },
    }


def mlp_ratio(tower: Any) -> float:
    """The MLP's width over the tower's, such that open_clip's int(width * ratio) is the MLP's width again."""
    ratio = tower.intermediate_size / tower.hidden_size
    exact = int(tower.hidden_size * ratio) == tower.intermediate_size  # or one less, by rounding
    return ratio if exact else (tower.intermediate_size + 0.5) / tower.hidden_size


def state_from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a transformers CLIPModel under open_clip's names."""
    found = {
        "logit_scale": state["logit_scale"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "text.token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text.positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text.text_projection": state["text_projection.weight"].T,
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "text.ln_final": "text_model.final_layer_norm",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for tower, theirs in (("visual", "vision_model"), ("text", "text_model")):
        layers = [int(key.split(".")[3]) for key in state if key.startswith(f"{theirs}.encoder.layers.")]
        depth = 1 + max(layers, default=-1)
        for index in range(depth):
            block, layer = f"{tower}.transformer.resblocks.{index}", f"{theirs}.encoder.layers.{index}"
            norms |= {f"{block}.{own}": f"{layer}.{part}" for own, part in parts.items()}
            norms[f"{block}.attn.out_proj"] = f"{layer}.self_attn.out_proj"
            for kind in ("weight", "bias"):
                qkv = [state[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
    for own, theirs in norms.items():
        found |= {f"{own}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return found


def read_preprocess(place: str) -> dict[str, list[float]]:
    """Image mean and std of a folder or hub repository in transformers' form; CLIP's own where it names none."""
    from transformers.utils import cached_file

    def saved_in(name: str) -> dict[str, Any]:
        path = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
        return read_json(Path(path)) if path else {}

    saved = download(place, lambda: saved_in("preprocessor_config.json"))
    if not saved:  # transformers 5 saves a whole processor as one file
        saved = download(place, lambda: saved_in("processor_config.json")).get("image_processor") or {}
    return {
        "mean": saved.get("image_mean", DEFAULT_PREPROCESS["mean"]),
        "std": saved.get("image_std", DEFAULT_PREPROCESS["std"]),
    }


class TransformersTokenizer:
    """A transformers CLIP tokenizer called as open_clip calls its own: texts -> (P, context_length), padded with 0."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    @classmethod
    def load(cls, place: str, text_config: Any) -> Tokenizer:
        """From a folder or the hub; CLIP's standard tokenizer where a folder has none and the vocabulary fits."""
        from transformers import AutoTokenizer

        if Path(place).is_dir() and not any(Path(place).glob("*token*")) and not (Path(place) / "vocab.json").exists():
            standard = open_clip.SimpleTokenizer(context_length=text_config.max_position_embeddings)
            if standard.vocab_size != text_config.vocab_size:
                raise ValueError(f"{place}: no tokenizer files, and its vocabulary is not CLIP's; add tokenizer.json")
            return standard
        tokenizer = download(
            f"the tokenizer of {place}",
            lambda: AutoTokenizer.from_pretrained(
                place, trust_remote_code=False, local_files_only=Path(place).is_dir()
            ),
        )
        return cls(tokenizer, text_config.max_position_embeddings)

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """Texts -> (P, N) int64; too long ones are cut and keep their end token."""
        encoded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=context_length or self.context_length,
            return_tensors="pt",
        )
        return encoded["input_ids"] * encoded["attention_mask"]

    def save_pretrained(self, folder: str) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


def build_clip(config: dict[str, Any], *, image_size: int) -> open_clip.CustomTextCLIP:
    """A randomly initialised CustomTextCLIP; writes `image_size` into the config. Raises ValueError."""
    model_cfg = config["model_cfg"]
    if "multimodal_cfg" in model_cfg:
        raise ValueError("CoCa models are not supported: their text tower is trained to generate, not to embed")
    try:
        vision = model_cfg["vision_cfg"]
        if not re.fullmatch(r"[\w.]*", vision.get("timm_model_name", "")):
            raise AttributeError(f"timm_model_name {vision['timm_model_name']!r} is not one of timm's own")
        patch = vision.get("patch_size", 16)
        if "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int) and image_size % patch:
            near = max(1, round(image_size / patch)) * patch
            raise ValueError(
                f"--image_size {image_size}: must be a multiple of this model's patch size {patch}, as {near}"
            )
        if isinstance(patch, int) and (image_size // patch) ** 2 > MOST_PATCHES:
            raise AttributeError(f"patches of {patch} pixels are more than {MOST_PATCHES} of an image")
        vision["image_size"] = image_size
        plain = {key: value for key, value in deepcopy(model_cfg).items() if key != "custom_text"}
        plain["vision_cfg"]["timm_model_pretrained"] = False
        plain["text_cfg"]["hf_model_pretrained"] = False
        return open_clip.CustomTextCLIP(**plain)
    except (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError, OSError) as error:
        raise ValueError(f"cannot build a CLIP from its config: {first_line(error)}. {OFFLINE_WAYS}") from error


def download(what: str, fetch: Callable[[], Any]) -> Any:
    """Run what may need a network; any failure becomes one line that names the ways without one."""
    noisy = logging.getLogger("huggingface_hub")
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)  # its retries are told in our one line
    try:
        return fetch()
    except Exception as error:  # hub, HTTP and socket errors share no base; the cause is kept
        raise ValueError(f"cannot get {what}: {first_line(error)}. {OFFLINE_WAYS}") from error
    finally:
        noisy.setLevel(level)


def first_line(error: Exception, *, skip: int = 0) -> str:
    """The first telling line of an error's message, shortened; `skip` leaves out lines of mere title."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[min(skip, len(lines) - 1)] if lines else type(error).__name__
    return line.rstrip(".") if len(line) <= 160 else line[:157] + "..."


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


def rebuild(config: Mapping[str, Any], folder: Path, *, image_size: int) -> Backbone:
    """The backbone of a checkpoint folder, with random weights, without a network. Raises ValueError."""
    own = deepcopy(dict(config))
    clip = rebuild_clip(own, folder, image_size=image_size)
    own["model_cfg"]["vision_cfg"]["image_size"] = image_size
    tokenizer = restore_tokenizer(own["model_cfg"]["text_cfg"], folder / TOKENIZER_DIR)
    return Backbone(clip=clip, tokenizer=tokenizer, config=own)


def described(config: Mapping[str, Any], folder: Path) -> list[Any]:
    """All that decides how large the CLIP of a checkpoint folder is, as JSON values. Raises ValueError."""
    is_hf = bool(config["model_cfg"]["text_cfg"].get("hf_model_name"))
    return [config, check_hf_text(folder / TOKENIZER_DIR) if is_hf else {}]


def restore_tokenizer(text_cfg: Mapping[str, Any], place: Path) -> Tokenizer:
    """A saved tokenizer, or open_clip's own where none was saved."""
    length = text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not place.is_dir():
        return open_clip.SimpleTokenizer(context_length=length, **options)
    mode = text_cfg.get("tokenizer_mode")
    from transformers import AutoTokenizer

    closed: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}

    def load() -> Tokenizer:
        if text_cfg.get("hf_tokenizer_name"):
            return open_clip.tokenizer.HFTokenizer(
                str(place), context_length=length, tokenizer_mode=mode, **options, **closed
            )
        return TransformersTokenizer(AutoTokenizer.from_pretrained(str(place), **closed), length)

    return download(f"the tokenizer in {place}", load)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> tuple[Tensor, int]:
    """Texts -> (P, context_length) int64, and how many of them were too long and have been cut."""
    if not texts:
        return torch.zeros(0, context_length, dtype=torch.long), 0
    tokens_PN = tokenizer(list(texts))
    # A row that fills the context may just fit: it was cut only if a longer context puts something else in it.
    full = (tokens_PN[:, -1] != 0).nonzero().flatten().tolist()
    if not full:
        return tokens_PN, 0
    length = tokens_PN.shape[1]
    longer = tokenizer([texts[index] for index in full], context_length=length + 1)  # type: ignore[call-arg]
    return tokens_PN, int((longer[:, :length] != tokens_PN[full]).any(dim=1).sum())
