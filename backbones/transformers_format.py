"""A CLIP in transformers' form, brought into open_clip's: config, weights, preprocessing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from backbones.download import download
from storage.json_files import read_json

DEFAULT_PREPROCESS = {
    "mean": list(open_clip.constants.OPENAI_DATASET_MEAN),
    "std": list(open_clip.constants.OPENAI_DATASET_STD),
}


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


def state_from_transformers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a transformers CLIPModel under open_clip's names, and the names of others. Raises KeyError."""
    used = set()

    def take(name: str) -> Tensor:
        used.add(name)
        return state[name]

    found = {
        "logit_scale": take("logit_scale"),
        "visual.class_embedding": take("vision_model.embeddings.class_embedding"),
        "visual.conv1.weight": take("vision_model.embeddings.patch_embedding.weight"),
        "visual.positional_embedding": take("vision_model.embeddings.position_embedding.weight"),
        "visual.proj": take("visual_projection.weight").T,
        "text.token_embedding.weight": take("text_model.embeddings.token_embedding.weight"),
        "text.positional_embedding": take("text_model.embeddings.position_embedding.weight"),
        "text.text_projection": take("text_projection.weight").T,
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "text.ln_final": "text_model.final_layer_norm",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for tower, theirs in (("visual", "vision_model"), ("text", "text_model")):
        layers = [int(key.split(".")[3]) for key in state if re.match(rf"{theirs}\.encoder\.layers\.\d{{1,4}}\.", key)]
        depth = 1 + max(layers, default=-1)
        for index in range(depth):
            block, layer = f"{tower}.transformer.resblocks.{index}", f"{theirs}.encoder.layers.{index}"
            norms |= {f"{block}.{own}": f"{layer}.{part}" for own, part in parts.items()}
            norms[f"{block}.attn.out_proj"] = f"{layer}.self_attn.out_proj"
            for kind in ("weight", "bias"):
                qkv = [take(f"{layer}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
    for own, theirs in norms.items():
        found |= {f"{own}.{kind}": take(f"{theirs}.{kind}") for kind in ("weight", "bias")}
    return found, [name for name in state if name not in used]


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
