"""`describe`: what is said of small sets of which everything is known."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import DataFiles, scored_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import describe_data
from guidance.arguments import parse_args
from sources import describe, examples
from storage.image_files import ImageFile

FOLD_OF_PROMPT = ["train"] * 5 + ["val"] + ["test"] * 2


def examples_of(
    scores: Sequence[float], scale: examples.LabelScale | None = None, digests: Sequence[str] = (), **columns: Any
) -> examples.Examples:
    """Examples without images, all in training; a text that is not given is empty."""
    texts = dict.fromkeys(("prompt", "reference", "group", "explanation"), "")
    names = [f"{i}.png" for i in range(len(scores))]
    table = pd.DataFrame({"name": names, **texts, "set": "csv", "q": np.asarray(scores, float), **columns})
    files = [ImageFile(Path(name), digest, (8, 8)) for name, digest in zip(names, digests or names, strict=True)]
    folds = np.array(["train"] * len(scores))
    return examples.Examples(table, folds, {"q": scale or examples.LabelScale(1.0, 5.0)}, files, "")


def said_of(files: DataFiles, *flags: str) -> str:
    """The description of a data set."""
    return describe_data(parse_args([*files.flags, *flags]))


def fact(text: str, name: str) -> str:
    """What is said under a name; "" if nothing is."""
    found = [line.removeprefix(name).strip() for line in text.splitlines() if re.match(rf"{name}\s", line)]
    assert len(found) <= 1
    return found[0] if found else ""


def bars(lines: Sequence[str]) -> tuple[list[float], list[int], list[int]]:
    """The bins of a histogram: lower ends, counts and lengths of bars."""
    found = [re.fullmatch(r" +(-?\d+\.\d\d) \.\. +(-?\d+\.\d\d) +(\d+)  (#*)", line) for line in lines]
    return (
        [float(bar[1]) for bar in found if bar],
        [int(bar[3]) for bar in found if bar],
        [len(bar[4]) for bar in found if bar],
    )


# -- a set as a whole


@pytest.fixture
def described(make_dataset) -> str:
    """The description of 24 images with two contents twice, missing scores, references, rationales and a leak."""
    rows = [
        {**row, "split": FOLD_OF_PROMPT[i // 3], "reference": f"photo {i // 6}" if i < 18 else "", "explanation": ""}
        for i, row in enumerate(scored_rows())
    ]
    rows[1]["prompt"] = "  THING   0"  # the same as "thing 0"
    rows[2]["explanation"] = rows[7]["explanation"] = "the shape is blue"
    for i in (4, 9, 20):
        rows[i]["mos_align"] = ""
    files = make_dataset(rows)
    shutil.copy(files.images / "gen0_0.png", files.images / "gen1_0.png")  # both in training
    shutil.copy(files.images / "gen0_1.png", files.images / "gen2_7.png")  # training and test
    Image.new("RGB", (40, 10)).save(files.images / "gen0_5.png", "PNG")
    return said_of(files)


def test_what_is_in_a_set_is_counted(described):
    assert fact(described, "images") == "24; train 15, val 3, test 6"
    assert fact(described, "pixels") == "shorter side 10 to 16, 23 of 24 x 16; 2 size(s)"
    assert fact(described, "prompts") == "8, 3 to 3 images each"
    # Photo 2 is of prompts 4 and 5, which are in training and validation.
    assert fact(described, "references") == "3, 6 to 6 images each; 6 images without"
    assert fact(described, "generators") == "3, 8 to 8 images each"
    assert fact(described, "rationales") == "2 images"


def test_elongated_images_are_told_with_what_remains_unseen_of_them(make_dataset, described):
    assert fact(described, "elongated") == (
        "1 of 24 images are 3:1 or longer; the middle square that most CLIPs see leaves 75% of them unseen (up to "
        "75%): --crops looks at parts all over them"
    )


@pytest.mark.parametrize(("size", "lost"), [((30, 10), 0.67), ((10, 40), 0.75), ((29, 10), None)])
def test_what_the_middle_square_leaves_unseen_is_a_share_of_the_image(size, lost):
    files = [ImageFile(Path("x"), "", each) for each in (size, (10, 10))]
    said = describe.elongated_images(files)
    assert (
        said == "" if lost is None else "1 of 2 images are 3:1 or longer; " in said and f"leaves {lost:.0%} of" in said
    )


def test_images_of_the_same_content_are_named(described):
    said = fact(described, "duplicates")
    assert said == "2 content(s) occur more than once: gen0_0.png = gen1_0.png; gen0_1.png = gen2_7.png"


def test_what_folds_share_is_said(described):
    assert [line for line in described.splitlines() if line.startswith("leakage")] == [
        "leakage: 3 of 3 val images share their reference with an earlier fold",
        "leakage: 1 of 6 test images share their content with an earlier fold",
    ]


def test_scores_are_described_with_those_that_are_missing(described):
    lines = described.splitlines()
    (quality,) = (line for line in lines if line.startswith("quality:"))
    (consistency,) = (line for line in lines if line.startswith("consistency:"))
    # 1, 1.01, ..., 1.23, of which the first 15 are in training.
    assert quality == "quality: 24 scores 1 to 1.23 on a scale of 1 to 1.14, mean 1.11, sd 0.07"
    assert consistency.startswith("consistency: 21 scores 4.54 to 5 on a scale of 4.72 to 5, mean ")
    assert consistency.endswith("; 3 missing")
    assert sum(bars(lines[lines.index(quality) : lines.index(consistency)])[1]) == 24
    assert sum(bars(lines[lines.index(consistency) :])[1]) == 21


def test_generators_are_listed_with_their_mean_scores(described):
    lines = described.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["generator", "images", "quality", "consistency"])
    rows = [line.split() for line in lines[start + 1 : start + 4]]
    numbers = np.arange(24)
    known = ~np.isin(numbers, (4, 9, 20))
    for maker, row in enumerate(rows):
        own = numbers % 3 == maker
        assert row[:2] == [f"gen{maker}", "8"]
        means = [(1 + 0.01 * numbers[own]).mean(), (5 - 0.02 * numbers[own & known]).mean()]
        assert [float(cell) for cell in row[2:]] == pytest.approx(means, abs=0.006)


def test_what_a_set_has_not_is_not_said(make_dataset):
    rows = [
        {"name": f"{i}.png", "mos_quality": 1 + i / 10, "split": FOLD_OF_PROMPT[i // 3]} for i in range(24)
    ]  # no prompts, references, generators or rationales
    said = said_of(make_dataset(rows))
    for name in ("prompts", "references", "generators", "rationales", "consistency:", "generator"):
        assert not fact(said, name), name
    assert fact(said, "duplicates") == "none"
    assert "opinions" not in said and "missing" not in said
    assert said.endswith("leakage: none; folds share no prompt, reference image or file content")


def test_opinions_are_described_in_the_units_of_the_scores(make_dataset):
    spreads = [0.25] * 7 + [0.5] * 10 + [0.75] * 7
    rows = [{**row, "std_quality": spread} for row, spread in zip(scored_rows(), spreads, strict=True)]
    said = said_of(make_dataset(rows), "--mos_range_q", "0", "10")
    (line,) = (line for line in said.splitlines() if line.startswith("quality:"))
    assert "on a scale of 0 to 10" in line and line.endswith("opinions differ by 0.50 (median std)")


def test_sets_that_are_joined_are_described_each_by_itself(make_dataset, tmp_path):
    """Thirty photographs beside the CSV."""
    folder = tmp_path / "koniq"
    (folder / "512x384").mkdir(parents=True)
    for number in range(30):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "512x384" / f"{number}.jpg", "PNG")
    names = [f"{number}.jpg" for number in range(30)]
    table = pd.DataFrame({"image_name": names, "MOS": 1.5 + np.arange(30) / 10, "SD": 0.4})
    table.to_csv(folder / "koniq10k_scores_and_distributions.csv", index=False)
    said = said_of(make_dataset(scored_rows()), "--dataset", "csv,koniq-10k", "--data_root", str(folder))
    first, second = said.split("== koniq-10k\n")
    assert first.startswith("== csv\n")
    assert fact(first, "images").startswith("24; ") and fact(second, "images").startswith("30; ")
    assert fact(first, "prompts") and not fact(second, "prompts")
    assert "consistency: 24 scores" in first and "consistency" not in second
    assert "quality: 30 scores 1.5 to 4.4 on a scale of 1 to 5" in second  # in its own units
    assert second.count("leakage") == 1


# -- its parts


@settings(max_examples=50)
@given(st.lists(st.integers(10, 50), min_size=1, max_size=60), st.integers(0, 5))
def test_the_counts_of_a_histogram_add_up_and_its_longest_bar_is_full(tenths, num_missing):
    scores = np.array([*tenths, *[np.nan] * num_missing]) / 10
    head, *lines = describe.histogram(examples_of(scores), "q")
    lows, counts, lengths = bars(lines)
    assert len(lines) == len(counts) == describe.NUM_BINS and lows == sorted(lows)
    assert sum(counts) == len(tenths)
    assert max(lengths) == describe.BAR_LENGTH
    assert all(
        length == round(describe.BAR_LENGTH * count / max(counts))
        for length, count in zip(lengths, counts, strict=True)
    )
    assert head.startswith(
        f"quality: {len(tenths)} scores {min(tenths) / 10:g} to {max(tenths) / 10:g} on a scale of 1"
    )
    assert (f"; {num_missing} missing" in head) == (num_missing > 0)


def test_scores_lie_in_the_bins_they_are_counted_in():
    lows, counts, lengths = bars(describe.histogram(examples_of([0, 0, 0, 1, 10]), "q"))
    assert lows == list(range(10))
    assert counts == [3, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert lengths == [40, 13, 0, 0, 0, 0, 0, 0, 0, 13]


@settings(max_examples=40)
@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=12))
def test_duplicates_are_those_that_a_naive_search_finds(contents):
    said = describe.duplicates(examples_of([1.0] * len(contents), digests=contents))
    twice = [content for content in dict.fromkeys(contents) if contents.count(content) > 1]
    if not twice:
        assert said == "none"
        return
    groups = [" = ".join(f"{i}.png" for i, own in enumerate(contents) if own == content) for content in twice]
    assert said == f"{len(twice)} content(s) occur more than once: {'; '.join(groups)}"


def test_of_many_duplicates_the_first_are_named():
    said = describe.duplicates(examples_of([1.0] * 14, digests=[str(i // 2) for i in range(14)]))
    assert said.startswith("7 content(s) occur more than once: 0.png = 1.png; ")
    assert said.endswith("8.png = 9.png; ...") and said.count("=") == describe.MAX_LISTED


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a", "b", "a", "a"], "2, 1 to 3 images each"),
        (["a", "", "a", ""], "1, 2 to 2 images each; 2 images without"),
        (["", ""], "none"),
    ],
)
def test_texts_are_counted_with_the_rows_that_have_none(texts, said):
    assert describe.counted(pd.Series(texts)) == said


def test_a_generator_without_scores_has_none():
    table = examples_of([1.0, 2.0, np.nan], group=["a", "a", "b"])
    assert [line.split() for line in describe.generators(table)] == (
        [["generator", "images", "quality"], ["a", "2", "1.50"], ["b", "1", "NaN"]]
    )


def test_images_that_are_left_out_are_told_with_their_reasons(make_dataset):
    files = make_dataset(scored_rows(12, 3), without=["gen0_0.png"])
    (files.images / "gen1_4.png").write_bytes(b"no image")
    found = said_of(files, "--bad_images", "skip")
    expected = "2 of 36 images left out: gen0_0.png (No such file or directory), gen1_4.png (not an image)"
    assert fact(found, "left out") == expected
    for name in ("gen0_0.png", "gen1_4.png"):
        Image.new("RGB", (24, 16)).save(files.images / name)
    assert fact(said_of(files), "left out") == ""
