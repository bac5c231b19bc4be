"""Score images with a trained run: from the command line, or from Python in three lines.

from predict import Scorer
scorer = Scorer.load("runs/demo/best")
print(scorer.score(["a.png", "b.png"], ["a red circle", "a blue square"]))
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # --help and mistakes in the flags answer here, before torch is imported, which takes seconds.
    from configs import one_line_errors, parse_predict_args

    with one_line_errors():
        parse_predict_args()

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

import backbones
import checkpoint
import data
import engine
import models
from configs import one_line_errors, parse_predict_args

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SCORE_COLUMNS = {"q": "pred_quality", "c": "pred_align"}


class Scorer:
    """A trained model with all it needs: pixels and prompts in, scores in MOS units out."""

    def __init__(
        self,
        model: models.ScoreModel,
        tokenizer: backbones.Tokenizer,
        description: dict[str, Any],
        *,
        device: str,
        amp: str,
    ) -> None:
        self.runtime = engine.start_runtime(device, amp)
        self.model = model.to(self.runtime.device)
        self.tokenizer = tokenizer
        self.description = description
        self.num_truncated = 0
        self.scales = {task: data.LabelScale(**scale) for task, scale in description["scales"].items()}

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", amp: str = "off") -> Scorer:
        """Load a checkpoint folder (RUN/best, or RUN itself). Raises ValueError if it is none or is damaged."""
        folder, state, description = checkpoint.load_weights(Path(path))
        try:
            backbone = backbones.rebuild(description["clip"], folder, image_size=description["image_size"])
            model = models.build_model(backbone.clip, **description["model"])
            model.load_state_dict(state)
            return cls(model, backbone.tokenizer, description, device=device, amp=amp)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = backbones.first_line(error, skip=1)
            raise ValueError(f"{folder}: the description does not fit the weights ({reason})") from error

    def score(
        self,
        images: Sequence[str | Path | Image.Image],
        prompts: Sequence[str] | str | None = None,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> pd.DataFrame:
        """Score images.

        Args:
            images: paths or PIL images, of any size and mode.
            prompts: one per image, one for all, or None for quality alone. Empty texts count as none. Texts beyond
                CLIP's context length are cut; `num_truncated` holds how many that were.

        Returns:
            One row per image: pred_quality and pred_align in MOS units, NaN for what the model was not trained
            on or has no prompt for.

        Raises:
            ValueError: the numbers of images and prompts differ, or there is nothing that can be scored.
            OSError: an image cannot be read.
        """
        prompts = "" if prompts is None else prompts
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(texts) != len(images):
            raise ValueError(f"{len(images)} images but {len(texts)} prompts: give one for each, one for all, or none")
        table = pd.DataFrame(np.nan, index=range(len(images)), columns=list(SCORE_COLUMNS.values()))
        if not len(images):
            return table
        image_set = data.ImageSet(images, image_size=self.description["image_size"], crop_scale_min=1.0, seed=0)
        loader = data.image_loader(
            image_set,
            np.arange(len(images)),
            batch_size=batch_size,
            shuffle=False,
            num_workers=num_workers,
            pin_memory=self.runtime.device.type != "cpu",
        )
        has_prompt = np.array([bool(text.strip()) for text in texts])
        if not has_prompt.any() and "q" not in self.scales:
            raise ValueError("this model was trained on consistency alone: give it prompts")
        feed = data.Feed(
            device=self.runtime.device,
            mean=self.description["clip"]["preprocess_cfg"]["mean"],
            std=self.description["clip"]["preprocess_cfg"]["std"],
            targets={},
            prompts=data.TextTable(texts, self.tokenize, self.runtime.device) if has_prompt.any() else None,
        )
        scores = engine.predict(self.model, feed.batches(loader), models.score_batch, runtime=self.runtime)
        for task, scale in self.scales.items():
            if task in scores:
                table[SCORE_COLUMNS[task]] = scale.clamp(scale.to_mos(scores[task]))
        table.loc[~has_prompt, "pred_align"] = np.nan
        return table

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (P, N) token ids; counts those that had to be cut."""
        tokens, self.num_truncated = backbones.tokenize(self.tokenizer, texts, self.model.clip.context_length)
        return tokens


def images_in(folder: Path) -> list[str]:
    """Names of all image files below a folder, sorted. Raises ValueError if there are none."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if is_image(path)]
    if not names:
        raise ValueError(f"--image_dir {folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in it")
    return names


def is_image(path: Path) -> bool:
    """Whether a file's name says that it is an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def gather(args: argparse.Namespace) -> tuple[list[str], list[Path], list[str]]:
    """Names, paths and prompts ("" for none) that the flags ask to score. Raises ValueError."""
    if args.image_dir and not Path(args.image_dir).is_dir():
        raise ValueError(f"--image_dir {args.image_dir}: no such folder")
    if args.csv:
        columns = data.Columns(name=args.name_column, prompt=args.prompt_column)
        table = data.read_table(args.csv, args.image_dir or Path(args.csv).parent, columns, scored=False)
        return table["name"].tolist(), table["path"].tolist(), table["prompt"].tolist()
    if args.image_dir:
        names = images_in(Path(args.image_dir))
        return names, [Path(args.image_dir) / name for name in names], [args.prompt or ""] * len(names)
    for path in args.images:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such image")
    return args.images, [Path(path) for path in args.images], [args.prompt or ""] * len(args.images)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Score what the command line names; print the table, or write it to --out. Returns it."""
    with one_line_errors():
        args = parse_predict_args(argv)
        names, paths, prompts = gather(args)
        data.check_images(paths)
        scorer = Scorer.load(args.checkpoint, device=args.device)
        scores = scorer.score(paths, prompts, batch_size=args.batch_size, num_workers=args.num_workers)
        if scorer.num_truncated:
            print(f"note: {scorer.num_truncated} prompt(s) exceed CLIP's context length and were cut", file=sys.stderr)
        scores.insert(0, "name", names)
        if args.out:
            checkpoint.write_csv(Path(args.out), scores)
            print(f"{len(scores)} images scored: {args.out}")
        else:
            print(scores.dropna(axis=1, how="all").to_string(index=False, float_format="%.4f"))
        return scores


if __name__ == "__main__":
    main(sys.argv[1:])
