"""What a checkpoint says of its model: checked against the weights before anything of it is built."""

from __future__ import annotations

from pathlib import Path

import backbones
import checkpoint
import compare
import models
from compare import NUMBER
from configs import OPTIONS
from sizes import refuse_larger

DESCRIPTION = {  # of a checkpoint
    "clip": {
        "model_cfg": {"embed_dim": int, "vision_cfg": {}, "text_cfg": {}},
        "preprocess_cfg": {"mean": [NUMBER, NUMBER, NUMBER], "std": [NUMBER, NUMBER, NUMBER]},
    },
    "image_size": int,
    "model": {"scale_q": NUMBER, "scale_c": NUMBER, "hidden_q": int, "hidden_c": int, "dropout": NUMBER},
    "scales": {str: {"low": NUMBER, "high": NUMBER}},
}
# What building from values of the wrong kind raises, beside ValueError.
MISFITS = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError)


def check_checkpoint(path: Path) -> None:
    """Refuse what does not describe a checkpoint, or a far larger one than there is, before memory is taken for it.

    Raises:
        ValueError: it is no checkpoint or is damaged; one line.
    """
    folder, shapes, description = checkpoint.load_shapes(path)

    def build() -> models.ScoreModel:
        clip = backbones.rebuild_clip(description["clip"], folder, image_size=description["image_size"])
        return models.build_model(clip, **{**description["model"], "prompt_levels": False})  # which add one number

    try:
        if said := compare.mismatch(description, DESCRIPTION):
            raise ValueError(said)
        OPTIONS["image_size"].check(description["image_size"])
        OPTIONS["test_crops"].check(description.get("test_crops") or None)
        read = [description["model"], description["image_size"], *backbones.described(description["clip"], folder)]
        refuse_larger(read, shapes, build)
    except (ValueError, *MISFITS) as error:
        raise misfit(folder, error) from error


def misfit(folder: Path, error: Exception) -> ValueError:
    """What to raise for a description of something else than the weights, in one line."""
    return ValueError(f"{folder}: the description does not fit the weights ({backbones.first_line(error, skip=1)})")
