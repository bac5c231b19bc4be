"""Questions as folds: read, checked, and split so that no image is in two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from answering.configs import CLIP, VQAConfig
from storage.messages import first_five
from vqa.questions import NoQuestions, Questions, find_gqa, find_vqa, plain_id, read_gqa, read_table, read_vqa


@dataclass(frozen=True)
class Folds:
    """Questions of each fold, and what was done to get them."""

    questions: Mapping[str, Questions]  # "train", "val", which chooses the epoch, and "test"
    notes: list[str]
    draws_test: bool  # whether another seed has another test fold


def digest_of(folds: Iterable[Questions]) -> str:
    """Of all questions with their images and answers, however they are split into folds, and in whatever order."""
    rows = (row for part in folds for row in zip(part.ids, part.images, part.texts, part.answers, strict=True))
    digest = hashlib.sha256()
    for row in sorted(rows):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def read_questions(config: VQAConfig, fold: str) -> Questions:
    """The questions of a fold of the official files, or those of the table. Raises ValueError."""
    if config.dataset == "csv":
        found = read_table(Path(str(config.data_csv_path)))
        # files of features know images by number or stem, CLIP by their files
        return found if config.features == CLIP else replace(found, images=[plain_id(name) for name in found.images])
    root = Path(str(config.data_root))
    return read_vqa(*find_vqa(root, fold)) if config.dataset == "VQA" else read_gqa(find_gqa(root, fold))


def read_official(config: VQAConfig) -> tuple[Questions, Questions | None]:
    """Questions to train on, and those to test on that come with answers, if there are any. Raises ValueError."""
    found = read_questions(config, "train")
    if not found.are_answered:
        raise ValueError(f"{found.source}: there is nothing to learn without answers")
    if config.dataset == "csv":
        return found, None
    try:
        held_out = read_questions(config, "val")
    except NoQuestions:
        return found, None
    return found, held_out if held_out.are_answered else None


def with_regions(
    questions: Questions, known: Collection[str], skip: bool, whose: str = "--features"
) -> tuple[Questions, str]:
    """The questions on images that are known, and a note on the others, which `whose` has not.

    Raises:
        ValueError: there are others, and they are not to be left out; or there are only others.
    """
    rows = [row for row, image in enumerate(questions.images) if image in known]
    if len(rows) == len(questions):
        return questions, ""
    absent = list(dict.fromkeys(image for image in questions.images if image not in known))
    said = (
        f"{len(questions) - len(rows):,} of {len(questions):,} questions are about {len(absent):,} images that "
        f"{whose} has not, such as {first_five(absent)}"
    )
    if not skip or not rows:
        raise ValueError(f"{said}; get these, or leave such questions out by --bad_images skip")
    return questions.of(rows), f"left out: {said}"


def sources(config: VQAConfig) -> str:
    """The options that say where images are known from."""
    flags = ["--features"] * bool(config.features) + ["--image_base_dir"] * ("coarse" in config.branch_names)
    return " or ".join(flags)


def draw_images(questions: Questions, share: float, seed: int) -> tuple[Questions, Questions]:
    """The questions on a share of the images, drawn by chance, and the others. Raises ValueError for too few images."""
    images = sorted(set(questions.images))
    count = round(share * len(images))
    if not 0 < count < len(images):
        raise ValueError(f"{len(images)} image(s) are too few for folds of their own (--val_size, --test_size)")
    drawn = set(np.random.default_rng(seed).permutation(images)[:count].tolist())
    rows = range(len(questions))
    inside = [row for row in rows if questions.images[row] in drawn]
    return questions.of(inside), questions.of(row for row in rows if questions.images[row] not in drawn)


def read_folds(config: VQAConfig, known: Collection[str] | None) -> Folds:
    """The folds that the options name.

    Args:
        known: images that can be looked at; None: none is.

    Raises:
        ValueError: files are missing or damaged, or what is in them does not suffice.
    """
    train, test = read_official(config)
    notes = [questions.source for questions in (train, test) if questions is not None]
    if known is not None:
        train, said = with_regions(train, known, config.bad_images == "skip", sources(config))
        notes += [said] * bool(said)
    if known is not None and test is not None:
        test, said = with_regions(test, known, config.bad_images == "skip", sources(config))
        notes += [said] * bool(said)
    draws_test = test is None
    if test is None:
        test, train = draw_images(train, config.test_size, config.seed)
    else:
        tested = set(test.images)
        rows = [row for row, image in enumerate(train.images) if image not in tested]
        if len(rows) < len(train):
            notes.append(
                f"left out: {len(train) - len(rows):,} of {len(train):,} training questions, which are about images of "
                "the test fold"
            )
        train = train.of(rows)
    val, train = draw_images(train, config.val_size, config.seed + 1)
    return Folds({"train": train, "val": val, "test": test}, notes, draws_test)
