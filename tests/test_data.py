"""`data.py`: which data the options name, from small data sets in the forms they are downloaded in; its command."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, DataFiles, scored_rows
from PIL import Image
from refusals import refusal

import data
from data import count_training_images, describe_data, read_examples
from guidance.arguments import parse_args
from sources import demo, labels, splits
from sources.examples import FOLDS, Examples, LabelScale, prompt_groups

NUM_IMAGES = 24


def put_images(root: Path, *names: str) -> None:
    """A tiny picture under each name, none like another."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colour = (number, len(str(root)) % 256, sum(name.encode()) % 256)
        Image.new("RGB", (8, 8), colour).save(root / name, "PNG")


def agiqa_3k(root: Path, num_images: int = NUM_IMAGES) -> Path:
    """Two images of each prompt by two generators."""
    names = [f"gen{i % 2}_{i // 2}.jpg" for i in range(num_images)]
    put_images(root, *(f"images/{name}" for name in names))
    table = pd.DataFrame({"name": names, "prompt": [f"thing {i // 2}" for i in range(num_images)]})
    table[["mos_quality", "std_quality", "mos_align", "std_align"]] = [
        (0.5 + i / 10, 0.25, 4.5 - i / 10, 0.5) for i in range(num_images)
    ]
    table.to_csv(root / "data.csv", index=False)
    return root


def koniq_10k(root: Path, num_images: int = NUM_IMAGES) -> Path:
    """Photographs without prompts or references, on 1 to 5."""
    names = [f"{i}.jpg" for i in range(num_images)]
    put_images(root, *(f"512x384/{name}" for name in names))
    table = pd.DataFrame({"image_name": names, "MOS": 1.5 + np.arange(num_images) / 10, "SD": 0.4})
    table.to_csv(root / "koniq10k_scores_and_distributions.csv", index=False)
    return root


def kadid_10k(root: Path, num_images: int = NUM_IMAGES) -> Path:
    """Three distorted copies of each reference."""
    names = [f"I{i // 3}_{i % 3}.png" for i in range(num_images)]
    put_images(root, *(f"images/{name}" for name in names))
    references = [f"I{i // 3}.png" for i in range(num_images)]
    table = pd.DataFrame({"dist_img": names, "ref_img": references, "dmos": 1 + np.arange(num_images) / 10, "var": 0.1})
    table.to_csv(root / "dmos.csv", index=False)
    return root


def aigciqa2023(root: Path, num_images: int = NUM_IMAGES) -> Path:
    """With a score of authenticity."""
    numbers = np.arange(num_images)
    table = pd.DataFrame({"name": [f"{i}.png" for i in numbers], "prompt": [f"subject {i // 2}" for i in numbers]})
    for place, name in enumerate(("quality", "authenticity", "correspondence")):
        table[f"{name}_mos"] = 30.0 + 10 * place + numbers
        table[f"{name}_std"] = 1.0 + place
    put_images(root, *(f"allimg/{name}" for name in table["name"]))
    table.to_csv(root / "AIGCIQA2023.csv", index=False)
    return root


def aigiqa_20k(root: Path, *, withheld: bool) -> Path:
    """With official folds; the scores of the test fold may be withheld."""
    for fold, first, last in (("train", 0, 12), ("val", 12, 18), ("test", 18, 24)):
        names = [f"SDXL_{i:04}.png" for i in range(first, last)]
        hidden = withheld and fold == "test"
        rows = [f"{name},scene {name}" + ("" if hidden else f",{i / 10}") for i, name in enumerate(names, start=first)]
        put_images(root / fold, *names)
        (root / f"info_{fold}.csv").write_text("\n".join(rows) + "\n")
    return root


WRITERS = {"agiqa-3k": agiqa_3k, "koniq-10k": koniq_10k, "kadid-10k": kadid_10k, "aigciqa2023": aigciqa2023}


@pytest.fixture
def read(tmp_path, make_dataset):
    """A function that writes the data sets that --dataset names and reads them; `csv` stands for the rows given."""

    def call(dataset: str, *flags: str, rows=None) -> Examples:
        given = ["--dataset", dataset]
        names = dataset.split(",")
        roots = [tmp_path / name for name in names if name != "csv"]
        for root in roots:
            if not root.exists():
                WRITERS[root.name](root)
        if roots:
            given += ["--data_root", ",".join(map(str, roots))]
        if "csv" in names:
            files = DataFiles(tmp_path / "set" / "data.csv", tmp_path / "set" / "images")
            given += (files if files.csv.exists() else make_dataset(rows or scored_rows())).flags
        return read_examples(parse_args([*given, *flags]))

    return call


def folds_of(examples: Examples, column: str) -> dict[str, set[str]]:
    """What the folds hold of a column."""
    return {fold: set(examples.table[column][examples.folds == fold]) for fold in FOLDS}


def shares_nothing(folds: dict[str, set[str]]) -> bool:
    return sum(map(len, folds.values())) == len(set.union(*folds.values()))


# -- one data set


def test_a_csv_is_read_with_the_columns_ranges_and_folds_asked_for(read):
    rows = [{**row, "sd": 0.5, "model": "m"} for row in scored_rows()]
    flags = ["--mos_range_q", "1", "9", "--quality_std_column", "sd", "--group_column", "model", "--seed", "3"]
    examples = read("csv", *flags, "--test_size", "0.25", "--val_size", "0.25", rows=rows)
    assert examples.table["q"].tolist() == [row["mos_quality"] for row in rows]
    assert examples.table["name"].tolist() == [row["name"] for row in rows]
    assert set(examples.table["group"]) == {"m"} and set(examples.table["q_std"]) == {0.5}
    assert examples.scales["q"] == LabelScale(1.0, 9.0)
    train = examples.mos("c", "train")
    assert examples.scales["c"] == LabelScale(train.min(), train.max())
    split = {"split_by": "prompt", "test_size": 0.25, "val_size": 0.25, "seed": 3}
    assert examples.folds.tolist() == splits.assign_folds(examples.table, **split).tolist()


def test_a_data_set_as_downloaded_is_read_by_name_with_the_scale_of_its_raters(read, tmp_path):
    examples = read("agiqa-3k")
    found = labels.read_dataset("agiqa-3k", tmp_path / "agiqa-3k")
    assert len(found) == NUM_IMAGES and examples.sets == ["agiqa-3k"]
    for column in ("name", "prompt", "q", "c", "q_std", "c_std", "group"):
        assert examples.table[column].tolist() == found[column].tolist(), column
    assert examples.scales == {"q": LabelScale(0.0, 5.0), "c": LabelScale(0.0, 5.0)}
    assert [file.path for file in examples.files] == [tmp_path / "agiqa-3k" / name for name in found["name"]]
    assert shares_nothing(folds_of(examples, "prompt"))
    assert read("agiqa-3k", "--mos_range_q", "0", "10").scales["q"] == LabelScale(0.0, 10.0)


def test_the_fingerprint_of_a_named_data_set_changes_with_a_score(read, tmp_path):
    before = read("agiqa-3k").fingerprint
    assert read("agiqa-3k").fingerprint == before
    path = tmp_path / "agiqa-3k" / "data.csv"
    path.write_text(path.read_text().replace(",4.5,", ",4.25,"))
    assert read("agiqa-3k").fingerprint != before


@pytest.mark.parametrize(
    ("name", "asked", "unit"),
    [
        ("agiqa-3k", "prompt", "prompt"),
        ("agiqa-3k", "image", "image"),
        ("kadid-10k", "prompt", "group"),
        ("kadid-10k", "image", "image"),
        ("koniq-10k", "prompt", "image"),
    ],
)
def test_a_known_set_without_prompts_is_split_by_its_references_or_images(read, name, asked, unit):
    examples = read(name, "--split_by", asked)
    split = {"split_by": unit, "test_size": 0.2, "val_size": 0.1, "seed": 42}
    assert examples.folds.tolist() == splits.assign_folds(examples.table, **split).tolist()
    if unit == "group":
        assert shares_nothing(folds_of(examples, "reference"))


def test_a_csv_without_prompts_is_not_split_by_something_else_in_silence(read):
    rows = [{"name": f"{i}.png", "mos_quality": i} for i in range(12)]
    message = refusal(read, "csv", rows=rows)
    assert "row 2 has no prompt, so --split_by prompt cannot place it" in message


def test_official_folds_win_where_all_have_scores(tmp_path):
    root = aigiqa_20k(tmp_path / "set", withheld=False)
    config = parse_args(["--dataset", "aigiqa-20k", "--data_root", str(root)])
    examples = read_examples(config)
    assert examples.folds.tolist() == [name.partition("/")[0] for name in examples.table["name"]]
    assert {fold: len(examples.rows(fold)) for fold in FOLDS} == {"train": 12, "val": 6, "test": 6}


def test_folds_are_drawn_where_the_official_test_scores_are_withheld(tmp_path):
    root = aigiqa_20k(tmp_path / "set", withheld=True)
    config = parse_args(["--dataset", "aigiqa-20k", "--data_root", str(root), "--test_size", "0.5"])
    examples = read_examples(config)
    assert len(examples.table) == 18 and len(examples.rows("test")) == 9
    split = {"split_by": "prompt", "test_size": 0.5, "val_size": 0.1, "seed": 42}
    assert examples.folds.tolist() == splits.assign_folds(examples.table.assign(split=""), **split).tolist()


def test_a_known_set_whose_consistency_scores_lack_prompts_is_refused(tmp_path):
    root = agiqa_3k(tmp_path / "set")
    path = root / "data.csv"
    path.write_text(path.read_text().replace("thing 3,", ","))
    config = parse_args(["--dataset", "agiqa-3k", "--data_root", str(root)])
    said = refusal(read_examples, config)
    assert said.startswith(f"{root}: 2 image(s) have a consistency score but no prompt; ") and "file of prompts" in said


@pytest.mark.parametrize("name", ["csv", "koniq-10k"])
def test_the_parts_of_a_data_set_are_tested_on_in_turn(read, name):
    tested = []
    for fold in ("1", "2", "3"):
        examples = read(name, "--kfold", "3", "--fold", fold)
        tested += examples.table["name"][examples.rows("test")].tolist()
    assert sorted(tested) == sorted(examples.table["name"])


# -- several


def test_data_sets_are_joined_in_the_units_of_the_first(read, tmp_path):
    examples = read("agiqa-3k,koniq-10k")
    assert examples.sets == ["agiqa-3k", "koniq-10k"]
    assert examples.scales == {"q": LabelScale(0.0, 5.0), "c": LabelScale(0.0, 5.0)}
    photographs = labels.read_dataset("koniq-10k", tmp_path / "koniq-10k")
    joined = examples.only("koniq-10k").table
    assert joined["name"].tolist() == [f"koniq-10k/{name}" for name in photographs["name"]]
    np.testing.assert_allclose(joined["q"], (photographs["q"] - 1) / 4 * 5)
    np.testing.assert_allclose(joined["q_std"], photographs["q_std"] / 4 * 5)
    assert joined["c"].isna().all()
    assert list(examples.only("koniq-10k").scales) == ["q"]


def test_each_of_several_is_split_as_it_is_alone(read):
    joined = read("kadid-10k,agiqa-3k,koniq-10k")
    for name in joined.sets:
        assert joined.only(name).folds.tolist() == read(name).folds.tolist()


@pytest.mark.parametrize("order", ["csv,koniq-10k", "koniq-10k,csv"])
def test_a_csv_joins_data_sets_as_downloaded_and_alone_heeds_the_range(read, order):
    examples = read(order, "--mos_range_q", "1", "3")
    assert examples.sets == order.split(",")
    first = LabelScale(1.0, 3.0) if order.startswith("csv") else LabelScale(1.0, 5.0)
    assert examples.scales["q"] == first
    known = {"csv": (1.0, 3.0), "koniq-10k": (1.0, 5.0)}
    own_units = {"csv": [row["mos_quality"] for row in scored_rows()], "koniq-10k": 1.5 + np.arange(NUM_IMAGES) / 10}
    for name, (low, high) in known.items():
        expected = first.to_mos(LabelScale(low, high).to_unit(np.array(own_units[name])))
        np.testing.assert_allclose(examples.only(name).table["q"], expected)
    assert examples.only("csv").table["c"].notna().all()


# -- further scores


def test_a_further_score_of_one_of_two_data_sets_is_missing_in_the_other(read):
    examples = read("agiqa-3k,aigciqa2023", "--extra_scores", "authenticity")
    assert list(examples.scales) == ["q", "c", "authenticity"]
    assert list(examples.only("agiqa-3k").scales) == ["q", "c"]
    assert examples.scales["authenticity"] == LabelScale(0.0, 100.0)
    assert examples.table["authenticity"].isna().tolist() == [True] * NUM_IMAGES + [False] * NUM_IMAGES
    assert examples.table["authenticity"][NUM_IMAGES:].tolist() == (40.0 + np.arange(NUM_IMAGES)).tolist()


@pytest.mark.parametrize("order", ["csv,aigciqa2023", "aigciqa2023,csv"])
def test_a_csv_may_lack_a_further_score_beside_a_data_set_that_has_it(read, order):
    examples = read(order, "--extra_scores", "authenticity")
    assert list(examples.only("csv").scales) == ["q", "c"]
    assert list(examples.only("aigciqa2023").scales) == ["q", "c", "authenticity"]


def test_a_csv_may_have_a_further_score_with_gaps_that_a_data_set_lacks(read):
    rows = [{**row, "beauty": i if i else ""} for i, row in enumerate(scored_rows())]
    examples = read("csv,koniq-10k", "--extra_scores", "beauty", rows=rows)
    assert list(examples.only("csv").scales) == ["q", "c", "beauty"] and list(examples.only("koniq-10k").scales) == [
        "q"
    ]
    np.testing.assert_array_equal(examples.only("csv").table["beauty"], [np.nan, *range(1, len(rows))])


@pytest.mark.parametrize("dataset", ["koniq-10k", "agiqa-3k,koniq-10k", "csv,koniq-10k"])
@pytest.mark.parametrize("extra", ["authenticity", "beauty"])
def test_a_further_score_that_no_data_set_has_is_refused(read, dataset, extra):
    message = refusal(read, dataset, "--extra_scores", extra)
    assert message == f"--extra_scores {extra}: {dataset} has no such scores"


def test_a_csv_alone_must_have_each_further_score_and_values_in_it(read):
    rows = [{**row, "authenticity": ""} for row in scored_rows()]
    assert refusal(read, "csv", "--extra_scores", "beauty", rows=rows).endswith("name yours with --extra_scores")
    message = refusal(read, "csv", "--extra_scores", "authenticity")
    assert message == "--extra_scores authenticity: csv has no such scores"


# -- folds from a file


def put_splits(path: Path, examples: Examples, folds: list[str]) -> Path:
    pd.DataFrame({"name": examples.table["name"], "split": folds}).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("dataset", ["csv", "agiqa-3k", "agiqa-3k,koniq-10k"])
def test_folds_are_read_from_a_file_by_name_in_any_order(read, tmp_path, dataset):
    first = read(dataset)
    folds = (["test", "train", "train", "val"] * len(first.table))[: len(first.table)]
    path = put_splits(tmp_path / "splits.csv", first, folds)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *sorted(lines[1:]), "of another set.png,nowhere"]))
    assert read(dataset, "--split_file", str(path)).folds.tolist() == folds != first.folds.tolist()


def test_folds_as_they_were_drawn_can_be_read_again(read, tmp_path):
    first = read("agiqa-3k,koniq-10k", "--seed", "5")
    path = put_splits(tmp_path / "splits.csv", first, first.folds.tolist())
    again = read("agiqa-3k,koniq-10k", "--seed", "6", "--split_file", str(path))
    assert again.folds.tolist() == first.folds.tolist()
    assert again.fingerprint == first.fingerprint


def test_a_file_of_folds_that_is_not_there_yet_changes_nothing(read, tmp_path):
    assert read("csv", "--split_file", str(tmp_path / "none.csv")).folds.tolist() == read("csv").folds.tolist()


def test_folds_from_a_file_win_over_official_ones(tmp_path):
    flags = ["--dataset", "aigiqa-20k", "--data_root", str(aigiqa_20k(tmp_path / "set", withheld=False))]
    official = read_examples(parse_args(flags))
    path = put_splits(tmp_path / "splits.csv", official, ["train", "val", "test"] * 8)
    assert read_examples(parse_args([*flags, "--split_file", str(path)])).folds.tolist() == [*FOLDS] * 8


@pytest.mark.parametrize("dataset", ["csv", "agiqa-3k,koniq-10k"])
def test_images_without_a_fold_in_the_file_are_counted_and_one_is_named(read, tmp_path, dataset):
    examples = read(dataset)
    path = put_splits(tmp_path / "splits.csv", examples, examples.folds.tolist())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], *lines[6:]]))
    message = refusal(read, dataset, "--split_file", str(path))
    name = examples.table["name"][3]
    assert message == f"--split_file {path}: 2 image(s) have no fold there, such as {name}"


def test_a_file_of_folds_that_names_an_image_twice_is_refused(read, tmp_path):
    examples = read("csv")
    path = put_splits(tmp_path / "splits.csv", examples, examples.folds.tolist())
    path.write_text(path.read_text() + "gen0_1.png,train\n")
    message = refusal(read, "csv", "--split_file", str(path))
    assert message == f"--split_file {path}: 'gen0_1.png' occurs more than once"


@pytest.mark.parametrize(("header", "missing"), [("name,fold", "split"), ("image,split", "name"), ("a,b", "name")])
def test_a_file_of_folds_without_its_columns_is_refused(read, tmp_path, header, missing):
    path = tmp_path / "splits.csv"
    path.write_text(f"{header}\ngen0_1.png,train\n")
    message = refusal(read, "csv", "--split_file", str(path))
    assert message == f"--split_file {path}: no column {missing!r}; it must have name and split"


def test_an_unknown_fold_in_the_file_is_refused(read, tmp_path):
    examples = read("csv")
    path = put_splits(tmp_path / "splits.csv", examples, ["training", *examples.folds.tolist()[1:]])
    assert "split is 'training', must be train, val or test" in refusal(read, "csv", "--split_file", str(path))


@pytest.mark.parametrize("as_written", [True, False])
def test_folds_are_found_by_the_names_of_the_csv_and_by_those_of_the_files(make_dataset, as_written):
    rows = scored_rows()
    files = make_dataset(rows)
    written = [f"IMAGES\\{row['name'].upper()}" for row in rows]
    table = pd.DataFrame(rows)
    table.assign(name=written).to_csv(files.csv, index=False, sep=";")
    folds = [("train", "val", "test")[number % 3] for number in range(len(rows))]
    path = files.csv.with_name("splits.csv")
    names = written if as_written else table["name"]
    pd.DataFrame({"name": names, "split": folds}).to_csv(path, index=False, sep="\t", encoding="utf-16")
    found = read_examples(parse_args([*files.flags, "--split_file", str(path)]))
    assert found.folds.tolist() == folds and found.table["name"].tolist() == table["name"].tolist()
    assert len(found.notes) == 3
    assert "semicolons" in found.notes[0] and "24 image name(s)" in found.notes[1]
    assert found.notes[2] == f"{path}: read with UTF-16, tabs between columns"


# -- how many images there will be to train on


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Callable[..., list[str]]:
    """A function that gives 100 prompts with four images each, and columns more, as flags."""
    place = tmp_path_factory.mktemp("many")
    rows = scored_rows(100, 4)
    (place / "images").mkdir()
    put_images(place / "images", *(row["name"] for row in rows))

    def flags(**columns: list[str]) -> list[str]:
        table = pd.DataFrame(rows).assign(**columns)
        table.to_csv(place / "data.csv", index=False)
        return DataFiles(place / "data.csv", place / "images").flags

    return flags


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--test_size", "0.4", "--val_size", "0.2"],
        ["--split_by", "image", "--val_size", "0.3"],
        ["--kfold", "4", "--fold", "2", "--test_size", "0.9", "--val_size", "0.08"],
    ],
)
def test_the_training_images_of_a_csv_are_counted_about_right(many, flags):
    config = parse_args([*many(), *flags])
    true = len(read_examples(config).rows("train"))
    assert true != 280 or not flags
    assert count_training_images(config) == pytest.approx(true, rel=0.05)


def test_several_parts_are_counted_as_one_of_them(many):
    config = parse_args([*many(), "--kfold", "5", "--val_size", "0.1"])
    assert count_training_images(config) == pytest.approx(400 * 0.7, rel=0.05)


@pytest.mark.parametrize("pattern", [("train", "val", "test"), ("train", "test"), ("train", "train", "train", "test")])
def test_the_training_images_of_fixed_folds_are_counted_about_right(many, pattern):
    split = [pattern[number // 4 % len(pattern)] for number in range(400)]
    config = parse_args([*many(split=split), "--val_size", "0.25", "--test_size", "0.5"])
    true = len(read_examples(config).rows("train"))
    assert count_training_images(config) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("names", ["agiqa-3k", "koniq-10k", "agiqa-3k,koniq-10k", "kadid-10k,csv"])
def test_the_training_images_of_named_sets_are_counted_about_right(many, tmp_path, names):
    roots = [tmp_path / name for name in names.split(",") if name != "csv"]
    for root in roots:
        WRITERS[root.name](root, 30)
    flags = ["--dataset", names, "--data_root", ",".join(map(str, roots)), "--test_size", "0.3"]
    config = parse_args([*flags, *(many() if "csv" in names else [])])
    true = len(read_examples(config).rows("train"))
    assert count_training_images(config) == pytest.approx(true, rel=0.05)


def test_official_folds_are_counted_as_they_are(tmp_path):
    root = aigiqa_20k(tmp_path, withheld=False)
    config = parse_args(["--dataset", "aigiqa-20k", "--data_root", str(root), "--test_size", "0.6"])
    assert count_training_images(config) == len(read_examples(config).rows("train")) == 12


@pytest.mark.parametrize("flags", [[], ["--test_size", "0.3"], ["--kfold", "8", "--fold", "1"]])
def test_the_demo_is_counted_without_being_drawn(tmp_path, flags):
    config = parse_args(["--demo", "drawn", "--cache_dir", str(tmp_path / "cache"), *flags])
    table = pd.DataFrame([{"prompt": draft.prompt, "split": ""} for draft in demo.plan_demo_set()])
    folds = splits.draw_folds(
        prompt_groups(table),
        "prompt",
        config.test_size,
        config.val_size,
        config.seed,
        (config.fold, config.kfold) if config.fold else None,
    )
    assert count_training_images(config) == pytest.approx((folds == "train").sum(), rel=0.05)
    assert not (tmp_path / "cache").exists()


# -- the command


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """A function that expects a command line to be refused in one line, and returns it."""

    def check(*argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            data.main(argv)
        message = capsys.readouterr().err
        assert caught.value.code == 2
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    return check


def test_the_command_prints_the_description(make_dataset, capsys):
    files = make_dataset(scored_rows())
    data.main(["describe", *files.flags])
    said = capsys.readouterr()
    assert (said.out, said.err) == (describe_data(parse_args(files.flags)) + "\n", "")


def test_what_was_read_otherwise_than_it_is_written_is_described(make_dataset, capsys):
    rows = scored_rows()
    files = make_dataset(rows)
    table = pd.DataFrame([*rows, {**rows[0], "mos_quality": 2.5}])
    table.to_csv(files.csv, index=False, sep=";", decimal=",")
    data.main(["describe", *files.flags, "--duplicates", "mean"])
    said = capsys.readouterr().out
    assert f"note        {files.csv}: read with semicolons between columns, decimal commas" in said
    assert f"note        {files.csv}: --duplicates mean: 2 rows of 1 image(s) averaged" in said
    assert "images      24; " in said


def test_rows_of_one_image_are_refused_with_the_flag_that_averages_them(make_dataset, refused):
    rows = scored_rows()
    message = refused("describe", *make_dataset([*rows, rows[3]]).flags)
    assert message.endswith("gen0_1.png (rows 5, 26); --duplicates mean averages the scores of such rows\n")


def test_the_official_agiqa_1k_is_described_with_its_faults(wild_dir, tmp_path, capsys):
    raw = pd.read_excel(wild_dir / "AIGC_MOS_Zscore.xlsx")
    (tmp_path / "AIGC_MOS_Zscore.xlsx").write_bytes((wild_dir / "AIGC_MOS_Zscore.xlsx").read_bytes())
    (tmp_path / "file").mkdir()
    for number, name in enumerate(raw["Image"]):
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(tmp_path / "file" / name, "PNG")
    data.main(["describe", "--dataset", "agiqa-1k", "--data_root", str(tmp_path)])
    said = capsys.readouterr().out
    assert "images      1078; " in said
    assert "note        AGIQA-1K: 2 rows of 1 image(s) with different scores left out" in said
    assert "dreamStudio_8_9_1_1.jpg" in said


def test_a_named_set_whose_rows_lack_images_leaves_them_to_bad_images(tmp_path):
    root = kadid_10k(tmp_path, 40)
    (root / "images" / "I3_1.png").unlink()
    flags = ["--dataset", "kadid-10k", "--data_root", str(root)]
    assert len(read_examples(parse_args(flags)).table) == 39
    kept = read_examples(parse_args([*flags, "--bad_images", "skip"]))
    assert len(kept.table) == 39 and kept.skipped["name"].tolist() == ["images/I3_1.png"] and kept.notes == ()


def test_the_file_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: usage: python data.py describe [")


def test_other_commands_and_wrong_flags_are_refused_in_one_line(refused, tmp_path):
    usage = "error: usage: python data.py describe ["
    assert refused("describ").startswith(usage) and refused("--demo").startswith(usage)
    assert "did you mean --data_csv_path?" in refused("describe", "--data_csv", "x.csv")
    assert f"{tmp_path / 'no.csv'}: no such file" in refused("describe", "--data_csv_path", str(tmp_path / "no.csv"))


def test_no_command_at_all_is_refused(refused):
    assert refused().startswith("error: usage: ")
