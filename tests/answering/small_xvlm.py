"""A tiny X-VLM with random weights, in files as X-VLM has them, made once a session. No tests: these import it."""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache
from pathlib import Path

import torch
from small_vqa import drawn_set, people, read

from branches.xvlm import Xvlm, read_config, swin_to_xvlm

YAML = """
vision_config: 'configs/swin.json'
text_config: 'configs/bert.json'
text_encoder: 'data/words'
use_swin: True
use_clip_vit: False
use_roberta: False
image_res: 32
patch_size: 8
num_dec_layers: 2
k_test: 5
"""
VISION = {"image_res": 32, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4]}
TEXT = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 48,
    "fusion_layer": 1,
    "hidden_act": "gelu",
}


@cache
def small_xvlm() -> tuple[Path, Path]:
    """Its weights and its YAML, as --checkpoint and --config name them. Read them, do not change them."""
    folder = Path(tempfile.mkdtemp(prefix="xvlm-"))
    texts = [one["question"] for one in read(drawn_set("GQA") / "questions/train_balanced_questions.json").values()]
    answers = [text for fold in ("train", "val") for _, given in people("GQA", fold).values() for text in given]
    words = sorted({word for text in texts + answers for word in re.findall(r"\w+", text.lower())})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    for name in ("xvlm/configs", "xvlm/data/words", "pretrained"):
        (folder / name).mkdir(parents=True)
    (folder / "xvlm/data/words/vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "xvlm/configs/swin.json").write_text(json.dumps(VISION))
    (folder / "xvlm/configs/bert.json").write_text(json.dumps({**TEXT, "vocab_size": len(vocabulary)}))
    options = folder / "xvlm/configs/VQA_32.yaml"
    options.write_text(YAML)
    torch.manual_seed(0)
    model = Xvlm(read_config(options))
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for everything to matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = model.state_dict()
    weights = folder / "pretrained/model"
    torch.save({"model": swin_to_xvlm(state)}, weights)
    return weights, options


def xvlm_flags(*flags: str) -> list[str]:
    """What asks it."""
    weights, options = small_xvlm()
    return ["--checkpoint", str(weights), "--config", str(options), *flags]
