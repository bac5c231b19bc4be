"""Pretrain the tiny CLIP in assets/tiny-clip on drawn scenes, so that demo, tests and docs need no download.

The loss is CLIP's with hard negatives: every image also sees captions that differ from its own in one or two
attributes or in the words for its quality. A linear head, dropped afterwards, predicts the degradations, so
the embedding holds how damaged a picture is. The second stage asks that the cosine fall by degrees as more of
the caption is wrong.

    python tools/pretrain_tiny_clip.py                                     # first stage, from scratch
    python tools/pretrain_tiny_clip.py --resume --grading 10 --num-steps 500 --lr 5e-4        # second stage
    python tools/pretrain_tiny_clip.py --check                             # only measure the saved weights
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sources import demo  # noqa: E402

FOLDER = ROOT / "assets" / "tiny-clip"
SEED = 20_000  # the demo draws with seed 0
Rng = np.random.Generator
Levels = dict[str, float]
Sample = tuple[np.ndarray, demo.Scene, Levels]

WIDE_VOCABULARY = demo.Vocabulary(
    kinds=(*demo.DEMO_VOCABULARY.kinds, "diamond", "cross", "hexagon"),
    colours=tuple(demo.COLOURS),
    textures=(*demo.DEMO_VOCABULARY.textures, "wavy", "grid"),
    sizes=("", "", "", "small", "large"),
    max_count=4,
    templates=(
        *demo.DEMO_VOCABULARY.templates,
        "an image of {things} against a {texture} {backdrop} background",
        "a drawing of {things} over a {texture} {backdrop} backdrop",
        "a {texture} {backdrop} background with {things}",
        "{things}, {texture} {backdrop} background",
    ),
)
GRADING_WEIGHTS = {"colour": 1.0, "kind": 0.6, "count": 0.4, "texture": 0.7, "backdrop": 1.0}
DEGRADATION_WORDS = {
    "blur": ("blurry", "blurred"),
    "noise": ("noisy", "grainy"),
    "compression": ("compressed", "blocky"),
    "banding": ("banded", "posterised"),
    "fading": ("faded", "washed out"),
}
GRADE_WORDS = ("slightly ", "", "heavily ", "extremely ")  # severity quarter -> adverb
QUALITY_WORDS = ("excellent", "good", "fair", "poor", "bad")  # severity fifth -> adjective
CLEAN_WORDS = ("sharp", "clean", "sharp clean", "pristine")


# -------------------------------------------------------------------------------------- scenes and captions


def draw_sample(rng: Rng, excluded: frozenset[demo.Scene] = frozenset()) -> Sample:
    """A damaged picture, uint8 (256, 256, 3), the scene it shows and its degradation strengths."""
    vocabulary = WIDE_VOCABULARY if rng.random() < 0.5 else demo.DEMO_VOCABULARY
    while (scene := demo.random_scene(rng, vocabulary)) in excluded:
        pass
    levels = demo.random_levels(float(rng.random()), rng)
    return demo.degrade(demo.draw_scene(scene, rng), levels, rng), scene, levels


def quality_phrase(levels: Levels, rng: Rng) -> str:
    """Words for how the picture looks, such as "heavily compressed" or "poor quality"."""
    severity = demo.total_severity(levels)
    if rng.random() < 0.4:
        return QUALITY_WORDS[min(4, int(5 * severity))] + " quality"
    if severity < 0.1:
        return str(rng.choice(CLEAN_WORDS))
    worst = max(levels, key=lambda kind: demo.ANNOYANCE[kind] * levels[kind])
    return GRADE_WORDS[min(3, int(4 * severity))] + str(rng.choice(DEGRADATION_WORDS[worst]))


def training_caption(scene: demo.Scene, levels: Levels | None, rng: Rng) -> str:
    """A true caption in any wording; with `levels` it also says how good the picture is."""
    text = demo.caption(scene, str(rng.choice(WIDE_VOCABULARY.templates)))
    if levels is None:
        return text
    phrase = quality_phrase(levels, rng)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase} {rng.choice(('picture', 'image'))} of {text}"


def captions_of(scene: demo.Scene, levels: Levels, num_wrong: int, rng: Rng) -> list[str]:
    """A true caption followed by `num_wrong` false ones, each wrong in one or two things."""
    named = levels if rng.random() < 0.5 else None
    captions = [training_caption(scene, named, rng)]
    while len(captions) <= num_wrong:
        if named is not None and len(captions) <= num_wrong // 3:
            other = demo.random_levels(float(rng.random()), rng)
            if abs(demo.total_severity(other) - demo.total_severity(levels)) > 0.25:
                captions.append(training_caption(scene, other, rng))
            continue
        wrong = scene
        for i in rng.permutation(len(demo.slots(scene)))[: 2 if len(captions) == num_wrong else 1]:
            wrong = demo.alter(wrong, demo.slots(scene)[i], rng, WIDE_VOCABULARY)
        captions.append(training_caption(wrong, named, rng))
    return captions


def graded_caption(scene: demo.Scene, rng: Rng) -> tuple[str, float]:
    """A caption with any number of things wrong, and the share of its weight that is (0..1)."""
    told, slots = scene, demo.slots(scene)
    if len(scene.groups) == 1 and rng.random() < 0.2:  # the picture lacks a group
        other = demo.random_scene(rng, WIDE_VOCABULARY).groups[0]
        told = demo.Scene((*scene.groups, other), scene.texture, scene.backdrop)
    total = sum(GRADING_WEIGHTS[name] for name, _ in demo.slots(told))
    wrong = total - sum(GRADING_WEIGHTS[name] for name, _ in slots)
    for i in rng.permutation(len(slots))[: int(rng.integers(len(slots) + 1))]:
        told = demo.alter(told, slots[i], rng, WIDE_VOCABULARY)
        wrong += GRADING_WEIGHTS[slots[i][0]]
    return training_caption(told, None, rng), wrong / total


def _draw_chunk(job: tuple[int, int]) -> list[Sample]:
    seed, count = job
    rng, excluded = np.random.default_rng([SEED, seed]), frozenset(demo.demo_scenes())
    return [draw_sample(rng, excluded) for _ in range(count)]


def draw_pool(num_images: int, first_seed: int = 0) -> tuple[torch.Tensor, list[demo.Scene], list[Levels]]:
    """Images, uint8 (num_images, 3, 256, 256), with their scenes and degradations; drawn by two processes."""
    jobs = [(first_seed + i, min(250, num_images - 250 * i)) for i in range(math.ceil(num_images / 250))]
    images = torch.empty(num_images, 3, demo.IMAGE_SIZE, demo.IMAGE_SIZE, dtype=torch.uint8)
    scenes: list[demo.Scene] = []
    all_levels: list[Levels] = []
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for chunk in pool.imap(_draw_chunk, jobs):
            for image, scene, levels in chunk:
                images[len(scenes)] = torch.from_numpy(image).permute(2, 0, 1)
                scenes.append(scene)
                all_levels.append(levels)
    return images, scenes, all_levels


# ------------------------------------------------------------------------------------------------- training


@lru_cache(maxsize=1)
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


@lru_cache(maxsize=4096)
def _word_tokens(word: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(word))


def tokenize(captions: list[str]) -> torch.Tensor:
    """Token numbers (B, longest): as open_clip's, but padded only to the longest, each word encoded once."""
    start, end = [_tokenizer().sot_token_id], [_tokenizer().eot_token_id]
    rows = [start + [t for word in text.split() for t in _word_tokens(word)] + end for text in captions]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def encode_text(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Unit text embeddings (B, E); the mask is causal, so leaving out the padding changes nothing."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x)), tokens.argmax(dim=-1)]
    return F.normalize(x @ model.text_projection, dim=-1)


def encode_images(model: open_clip.CLIP, images: torch.Tensor, rng: Rng | None = None) -> torch.Tensor:
    """Unit image embeddings (B, E) of uint8 (B, 3, 256, 256); with `rng`, views are augmented.

    Both views that programs use are trained: the picture scaled to 224 pixels, and a crop at full resolution.
    """
    pixels = images.float() / 255
    if rng is not None and rng.random() < 0.5:
        top, left = rng.integers(0, images.shape[-1] - 224 + 1, size=2)
        pixels = pixels[..., top : top + 224, left : left + 224]
    else:
        pixels = F.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    if rng is not None:
        flipped = torch.from_numpy(rng.random(len(pixels)) < 0.5)
        pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    return model.encode_image((pixels - mean) / std, normalize=True)


@torch.no_grad()
def set_stem(model: open_clip.CLIP, num_waves: int = 16) -> None:
    """Fix the patch embedding and the first MLP: coarse shapes, and the strength of fine detail.

    Noise, blocks and bands show in how strong fine detail is whatever its sign, which a linear embedding
    cannot say. Trained from random weights this stem lags behind the rest, because Adam's steps are large
    beside weights of fan-in 2352. A fixed stem: Chen et al., MoCo v3, arXiv:2104.02057.
    """
    generator = torch.Generator().manual_seed(SEED)
    conv, mlp = model.visual.conv1.weight, model.visual.transformer.resblocks[0].mlp
    axis = (torch.arange(conv.shape[-1]) + 0.5) * math.pi / conv.shape[-1]
    waves = torch.stack([wave / wave.norm() for wave in (torch.cos(k * axis) for k in range(len(axis)))])
    coarse = sorted(((y, x) for y in range(4) for x in range(4)), key=sum)[:10]
    conv[num_waves:] = 0  # the last channels are kept free for the strengths
    for channel in range(num_waves):
        fine, other = (int(torch.randint(low, len(axis), (), generator=generator)) for low in (7, 0))
        wave = torch.outer(waves[fine], waves[other])
        colour = F.normalize(torch.randn(3, generator=generator), dim=0)
        conv[channel] = 2 * colour[:, None, None] * (wave if channel % 2 else wave.T)
        both = [2 * channel, 2 * channel + 1]  # gelu(2x) + gelu(-2x) is about 2|x|
        mlp.c_fc.weight[both] = 0.0
        mlp.c_fc.bias[both] = 0.0
        mlp.c_proj.weight[:, both] = 0.0
        mlp.c_fc.weight[both, channel] = torch.tensor([2.0, -2.0])
        mlp.c_proj.weight[channel - num_waves, both] = 0.5
    for i, (y, x) in enumerate(coarse):
        for band in range(3):
            gain = 0.06 * (1 + x + y)  # natural pictures hold less the finer the wave
            conv[num_waves + 3 * i + band, band] = gain * torch.outer(waves[y], waves[x])
    for parameter in (conv, *mlp.parameters()):
        parameter.requires_grad_(False)


def targets_of(levels: list[Levels]) -> torch.Tensor:
    """What the auxiliary head predicts (B, 6): strength of each degradation, and the total severity."""
    rows = [[one.get(kind, 0.0) for kind in demo.ANNOYANCE] + [demo.total_severity(one)] for one in levels]
    return torch.tensor(rows)


def contrastive_loss(model: open_clip.CLIP, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """CLIP loss of (B, E) and (B * (1 + negatives), E), each true caption followed by its false ones."""
    logits = model.logit_scale.exp() * image @ text.T
    stride = len(text) // len(image)
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target * stride) + F.cross_entropy(logits[:, ::stride].T, target)) / 2


def grading_loss(model: open_clip.CLIP, image: torch.Tensor, scenes: list[demo.Scene], rng: Rng) -> torch.Tensor:
    """Squared error of cosines that ought to fall evenly with the share of a caption that is wrong."""
    texts, mismatch = zip(*(graded_caption(scene, rng) for scene in scenes for _ in range(2)), strict=True)
    cosine = (image.repeat_interleave(2, 0) * encode_text(model, tokenize(list(texts)))).sum(1)
    return (cosine - (0.9 - 1.2 * torch.tensor(mismatch, dtype=torch.float32))).square().mean()


def train(model: open_clip.CLIP, args: argparse.Namespace) -> None:
    """Train in place; measure on held-out scenes and save every `args.save_every_steps` steps."""
    started = time.perf_counter()
    images, scenes, levels = draw_pool(args.num_images)
    held_out = draw_pool(1024, first_seed=1_000_000)
    print(f"drew {args.num_images} scenes in {time.perf_counter() - started:.0f} s", flush=True)
    rng = np.random.default_rng([SEED, 1])
    # Words alone teach quality slowly. The auxiliary head is dropped afterwards.
    head = torch.nn.Linear(model.visual.output_dim, len(demo.ANNOYANCE) + 1)
    spread = targets_of(levels).std(0)
    head.bias.data = targets_of(levels).mean(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {"params": list(head.parameters()), "weight_decay": 0.0, "lr": 20 * args.lr},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(step / 200, 0.5 + 0.5 * math.cos(math.pi * step / args.num_steps)),
    )
    order, running = np.array([], dtype=int), np.zeros(3)
    for step in range(1, args.num_steps + 1):
        if len(order) < args.batch_size:
            order = rng.permutation(args.num_images)
        batch, order = order[: args.batch_size], order[args.batch_size :]
        per_image = (captions_of(scenes[i], levels[i], args.num_negatives, rng) for i in batch)
        captions = [text for group in per_image for text in group]
        image = encode_images(model, images[torch.from_numpy(batch)], rng)
        contrastive = contrastive_loss(model, image, encode_text(model, tokenize(captions)))
        error = (head(image * 8) - targets_of([levels[i] for i in batch])) / spread
        auxiliary = error.square().mean() + error[:, -1].square().mean()
        grading = torch.zeros(())
        if args.grading:
            grading = grading_loss(model, image, [scenes[i] for i in batch], rng)
        loss = contrastive + auxiliary + args.grading * grading
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        running = running + (0.02 if step > 50 else 1 / step) * (
            np.array([contrastive.item(), auxiliary.item(), grading.item()]) - running
        )
        if step % 50 == 0:
            seconds = time.perf_counter() - started
            losses = "contrastive {:.3f} auxiliary {:.3f} grading {:.4f}".format(*running)
            print(f"step {step} {losses} {seconds:.0f} s", flush=True)
        if step % args.save_every_steps == 0 or step == args.num_steps:
            print(json.dumps(measure_held_out(model, *held_out)), flush=True)
            save(model)


def save(model: open_clip.CLIP) -> None:
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    partial = FOLDER / "partial.safetensors"
    save_file(state, partial)
    partial.chmod(0o644)  # save_file makes it readable to its owner only
    partial.replace(FOLDER / "open_clip_model.safetensors")


# ---------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
def measure_held_out(
    model: open_clip.CLIP, images: torch.Tensor, scenes: list[demo.Scene], levels: list[Levels]
) -> dict[str, float]:
    """How often the true caption wins: over 63 other scenes', and over itself with one attribute altered."""
    model.eval()
    rng, among_others, against_altered = np.random.default_rng([SEED, 2]), [], []
    for i in range(0, len(images), 64):
        image = encode_images(model, images[i : i + 64])
        altered = []
        for scene in scenes[i : i + 64]:
            slot = demo.slots(scene)[int(rng.integers(len(demo.slots(scene))))]
            altered.append(demo.alter(scene, slot, rng, WIDE_VOCABULARY))
        template = demo.DEMO_VOCABULARY.templates[0]
        true, false = (
            encode_text(model, tokenize([demo.caption(scene, template) for scene in group]))
            for group in (scenes[i : i + 64], altered)
        )
        cosines = image @ true.T
        among_others.append(cosines.argmax(1) == torch.arange(len(image)))
        against_altered.append(cosines.diagonal() > (image * false).sum(1))
    model.train()
    names = "among_64_captions", "against_one_altered_attribute"
    return {
        name: round(torch.cat(hits).float().mean().item(), 4)
        for name, hits in zip(names, (among_others, against_altered), strict=True)
    }


@torch.no_grad()
def measure_demo(model: open_clip.CLIP) -> dict[str, float]:
    """On the demo set, untrained: SROCC of the cosine with consistency, and of a ridge probe with quality."""
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        _, image_dir = demo.write_demo_set(Path(folder) / "demo")
        drafts = demo.plan_demo_set()
        pixels = [torch.from_numpy(np.array(Image.open(image_dir / draft.name))) for draft in drafts]
    embeddings = [encode_images(model, p.permute(2, 0, 1)[None]) for p in pixels]
    image = torch.cat(embeddings)
    text = encode_text(model, tokenize([draft.prompt for draft in drafts]))
    quality, align = (np.array([getattr(d, name) for d in drafts]) for name in ("mos_quality", "mos_align"))
    folds = np.arange(len(drafts)) // len(demo.GENERATORS) % 5  # rows come prompt by prompt
    features, predicted = image.numpy().astype(np.float64), np.zeros(len(drafts))
    for fold in range(5):
        known, asked = folds != fold, folds == fold
        centre, mean = features[known].mean(0), quality[known].mean()
        x = features[known] - centre
        weights = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ (quality[known] - mean))
        predicted[asked] = (features[asked] - centre) @ weights + mean
    return {
        "zero_shot_srocc_align": round(float(spearmanr((image * text).sum(1).numpy(), align)[0]), 4),
        "ridge_probe_srocc_quality": round(float(spearmanr(predicted, quality)[0]), 4),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-images", type=int, default=16_000, help="scenes drawn and kept in memory")
    parser.add_argument("--num-steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-negatives", type=int, default=6, help="false captions per image")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every-steps", type=int, default=250)
    parser.add_argument("--grading", type=float, default=0.0, help="weight of the graded captions")
    parser.add_argument("--resume", action="store_true", help="go on from the saved weights")
    parser.add_argument("--check", action="store_true", help="measure the saved weights and stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    model = open_clip.create_model(f"local-dir:{FOLDER}", load_weights=args.check or args.resume)
    if not args.check:
        set_stem(model)  # the same every time, so it may be set again
        train(model, args)
        model = open_clip.create_model(f"local-dir:{FOLDER}")  # as stored, in half precision
    print(json.dumps(measure_held_out(model, *draw_pool(1024, first_seed=1_000_000)) | measure_demo(model)))


if __name__ == "__main__":
    main()
