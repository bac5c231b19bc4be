"""Mistakes at the command line: one clear line, exit code 2, nothing written. And odd input that must work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, DataFiles, csv_text, scored_rows
from PIL import Image

import baseline
import predict
from serving.scorer import Scorer
from training import checkpoints

TINY = ["--clip_model", "tiny", "--clip_pretrained", "none", "--image_size", "56", "--freeze_clip"]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """A function that expects a command line to be refused as it should be, and returns the message."""
    monkeypatch.chdir(tmp_path)

    def check(argv: Sequence[str], *, main: Callable = baseline.main, num_lines: int = 1) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(argv))
        message = capsys.readouterr().err
        assert caught.value.code == 2
        assert message.startswith("error: ") and message.endswith("\n")
        assert message.count("\n") == num_lines, message
        assert contents(tmp_path) == before, "something was written"
        return message

    return check


@pytest.fixture
def training_on(refused) -> Callable[..., str]:
    """A function that expects training on a data set to be refused, and returns the message."""

    def check(files: DataFiles, *flags: str) -> str:
        return refused([*files.flags, *TINY, "--output_dir", "run", *flags])

    return check


@pytest.fixture(scope="module")
def trained(demo_set, tmp_path_factory) -> Path:
    """The folder of a finished run. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    baseline.main([*paths, *TINY, "--epochs", "1", "--no_report", "--output_dir", str(folder)])
    return folder


# -- data


def test_no_data_at_the_default_place_is_told_in_five_lines_with_three_ways_on(refused):
    message = refused(TINY, num_lines=5)
    for needed in ("data/data.csv", "AGIQA-3K", "github.com/", "data/images", "python baseline.py --demo"):
        assert needed in message


@pytest.mark.parametrize("flag", ["--data_csv_path", "--image_base_dir"])
def test_a_missing_csv_or_image_folder_is_refused_by_name(make_dataset, training_on, flag):
    message = training_on(make_dataset(scored_rows()), flag, "nowhere")
    assert "nowhere: no such" in message


def test_missing_images_are_counted_and_five_of_them_named(make_dataset, training_on):
    rows = scored_rows()
    names = [row["name"] for row in rows]
    message = training_on(make_dataset(rows, without=names[:6]))
    assert f"6 of 24 images are missing (nearest to '{names[0]}' is " in message
    assert "): " + ", ".join(names[:5]) + ", ..." in message


def test_unreadable_and_truncated_images_are_counted_and_named(make_dataset, training_on):
    files = make_dataset(scored_rows())
    (files.images / "gen0_0.png").write_bytes(b"no image")
    whole = (files.images / "gen1_2.png").read_bytes()
    (files.images / "gen1_2.png").write_bytes(whole[: len(whole) // 2])
    message = training_on(files)
    assert "2 of 24 images cannot be read: gen0_0.png (not an image), gen1_2.png (" in message


def test_what_is_no_regular_file_is_refused_without_a_wait(make_dataset, training_on, ends_in_time):
    files = make_dataset(scored_rows(), without=["gen0_0.png", "gen1_1.png", "gen2_2.png"])
    os.mkfifo(files.images / "gen0_0.png")
    (files.images / "gen1_1.png").mkdir()
    (files.images / "gen2_2.png").symlink_to("gen2_2.png")
    message = training_on(files)
    reasons = ", ".join(f"{name} (no regular file)" for name in ("gen0_0.png", "gen1_1.png", "gen2_2.png"))
    assert message == f"error: 3 of 24 images cannot be read: {reasons}\n"


def test_links_out_of_the_image_folder_are_refused_unless_asked_for(make_dataset, training_on, tmp_path, capsys):
    files = make_dataset(scored_rows())
    (files.images / "gen0_0.png").rename(tmp_path / "elsewhere.png")
    (files.images / "gen0_0.png").symlink_to(tmp_path / "elsewhere.png")
    assert "1 image(s) lie behind links that leave " in training_on(files)
    assert "24 images" in planned(files, capsys, "--follow_links")


def test_a_data_set_by_name_is_held_to_its_folder_too_and_its_image_folder_may_be_a_link(tmp_path, refused, capsys):
    root, store = tmp_path / "set", tmp_path / "store"
    rows = [{**row, "std_quality": 1, "std_align": 1} for row in scored_rows()]
    for folder in (root, store):
        folder.mkdir()
    (root / "data.csv").write_text(csv_text(rows), encoding="utf-8")
    for row in rows:
        Image.new("RGB", (24, 24)).save(store / row["name"])
    (root / "images").symlink_to(store)
    flags = ["--dataset", "agiqa-3k", "--data_root", str(root), *TINY]
    assert baseline.main([*flags, "--dry_run"]) == {}
    assert "24 images" in capsys.readouterr().out
    (store / "gen1_1.png").rename(tmp_path / "outside.png")
    (store / "gen1_1.png").symlink_to(tmp_path / "outside.png")
    message = refused([*flags, "--output_dir", "run"])
    assert "1 image(s) lie behind links" in message and "images/gen1_1.png; --follow_links allows that" in message
    (store / "gen0_0.png").unlink()  # the first of all
    assert baseline.main([*flags, "--dry_run", "--follow_links", "--bad_images", "skip"]) == {}
    assert "1 of 24 images left out: images/gen0_0.png (No such file" in capsys.readouterr().out


def test_floating_point_images_are_refused_before_training(make_dataset, training_on):
    files = make_dataset(scored_rows())
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(files.images / "gen0_0.png", "TIFF")
    assert "gen0_0.png (floating-point" in training_on(files)


@pytest.mark.parametrize(("cell", "shown"), [("good", "'good'"), ("nan", "'nan'"), ("-inf", "'-inf'")])
def test_a_score_that_is_no_finite_number_is_refused_by_row(make_dataset, training_on, cell, shown):
    rows = scored_rows()
    rows[7]["mos_align"] = cell
    assert f"row 9: mos_align is {shown}" in training_on(make_dataset(rows))


def test_names_that_occur_twice_are_refused(make_dataset, training_on):
    rows = scored_rows()
    rows[7]["name"] = rows[3]["name"]
    assert f"more than once: {rows[3]['name']}" in training_on(make_dataset(rows))


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png"])
def test_names_that_leave_the_image_folder_are_refused(make_dataset, training_on, name):
    rows = scored_rows()
    rows[7]["name"] = name
    message = training_on(make_dataset(rows))
    assert "1 image name(s) leave " in message and message.endswith(f": {name}\n")


@pytest.mark.parametrize(("text", "says"), [("", "is empty"), ("name,prompt,mos_quality,mos_align\n", "no rows")])
def test_an_empty_csv_is_refused(make_dataset, training_on, text, says):
    assert says in training_on(make_dataset(text=text))


@pytest.mark.parametrize(
    ("columns", "flags", "says"),
    [
        (
            ["prompt", "mos_quality"],
            [],
            "no column 'name' among 'prompt', 'mos_quality'; name yours with --name_column",
        ),
        (["name", "prompt"], [], "--quality_column, --consistency_column"),
        (["name", "mos_align"], [], "a consistency score without a prompt"),
        (["name", "mos_quality"], [], "--split_by image"),
        (["name", "prompt", "mos_quality"], ["--consistency_column", "align"], "no column 'align'"),
        (["name", "prompt", "mos_quality"], ["--group_column", "model"], "no column 'model'"),
        (["name", "prompt", "mos_quality"], ["--use_explanations"], "'explanation' is missing or empty"),
        (["name", "prompt", "mos_quality"], ["--select_by", "srocc_c"], "--select_by srocc_c: the data has no"),
    ],
)
def test_missing_columns_are_refused_by_name_with_the_flag_to_use(make_dataset, training_on, columns, flags, says):
    assert says in training_on(make_dataset(scored_rows(), columns=columns), *flags)


@pytest.mark.parametrize(
    ("num_prompts", "per_prompt", "flags", "says"),
    [
        (1, 1, [], "1 prompt(s) cannot fill three folds"),
        (1, 9, [], "1 prompt(s) cannot fill three folds"),
        (1, 2, ["--split_by", "image"], "2 image(s) cannot fill three folds"),
        (4, 3, ["--test_size", "0.5", "--val_size", "0.45"], "--test_size 0.5 --val_size 0.45"),
        (8, 1, [], "the val fold has 1 image(s)"),
    ],
)
def test_data_that_cannot_fill_three_folds_is_refused(make_dataset, training_on, num_prompts, per_prompt, flags, says):
    assert says in training_on(make_dataset(scored_rows(num_prompts, per_prompt)), *flags)


def test_a_split_column_with_an_empty_fold_is_refused(make_dataset, training_on):
    rows = [{**row, "split": "val" if number % 3 else "train"} for number, row in enumerate(scored_rows())]
    assert "the test fold has 0 image(s)" in training_on(make_dataset(rows))


def test_scores_outside_the_given_range_are_refused(make_dataset, training_on):
    message = training_on(make_dataset(scored_rows()), "--mos_range_c", "1", "4.9")
    assert "--mos_range_c 1.0 4.9: 5 score(s) lie outside, such as 5.0" in message


def test_equal_scores_are_refused(make_dataset, training_on):
    message = training_on(make_dataset([{**row, "mos_quality": 3} for row in scored_rows()]))
    assert "every training score is 3.0" in message


# -- flags and models


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--epochs", "0"], "--epochs 0: must be in [1, 100000]"),
        (["--lr", "nan"], "--lr nan: must be finite"),
        (["--crop_scale_min", "1.5"], "--crop_scale_min 1.5: must be in (0, 1]"),
        (["--batch_size", "many"], "--batch_size: invalid int value: 'many'"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--scheduler", "cosin"], "--scheduler: invalid choice: 'cosin'"),
        (["--config", "nowhere.json"], "--config nowhere.json: no such file"),
        (["--demo", "--data_csv_path", "x.csv"], "--data_csv_path"),
    ],
)
def test_flags_that_are_wrong_are_refused_by_flag_value_and_rule(refused, flags, says):
    assert says in refused([*flags, "--output_dir", "run"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--clip_model", "ViT-B-23"], "--clip_model ViT-B-23: not an open_clip model; near: ViT-B-32"),
        (["--clip_model", "ViT-B-32", "--clip_pretrained", "nobody"], "--clip_pretrained nobody: neither a file nor"),
        (["--clip_model", "local-dir:nowhere"], "nowhere"),
        (["--clip_pretrained", "openai"], "--clip_model tiny --clip_pretrained openai"),
        (["--image_size", "100"], "--image_size 100: must be a multiple of"),
    ],
)
def test_models_and_weights_that_do_not_exist_are_refused_by_name(make_dataset, training_on, flags, says):
    assert says in training_on(make_dataset(scored_rows()), *flags)


def test_a_weights_file_that_is_none_is_refused_by_name(make_dataset, training_on, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    message = training_on(make_dataset(scored_rows()), "--clip_model", "ViT-B-32", "--clip_pretrained", "junk.pt")
    assert "junk.pt" in message


def test_more_frozen_layers_than_there_are_is_refused(make_dataset, training_on):
    message = training_on(make_dataset(scored_rows()), "--no_freeze_clip", "--partial_freeze", "--freeze_layers", "200")
    assert "200" in message


# -- the run folder


def test_a_finished_run_is_not_replaced_without_overwrite(make_dataset, training_on, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    message = training_on(make_dataset(scored_rows()))
    assert "--output_dir run: holds a finished run" in message and "--overwrite" in message


def test_a_finished_run_survives_a_mistake_made_with_overwrite(make_dataset, training_on, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    files = make_dataset(scored_rows(), without=["gen0_0.png"])
    assert "1 of 24 images are missing" in training_on(files, "--overwrite")


def test_a_folder_with_other_things_and_a_file_are_no_place_for_a_run(make_dataset, training_on, tmp_path):
    files = make_dataset(scored_rows())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x", encoding="utf-8")
    for flags in ([], ["--overwrite"]):
        assert "--output_dir thesis" in training_on(files, "--output_dir", "thesis", *flags)
        assert "--output_dir set/data.csv" in training_on(files, "--output_dir", "set/data.csv", *flags)


# -- odd input that works


def planned(files: DataFiles, capsys: pytest.CaptureFixture, *flags: str) -> str:
    """What a dry run says about a data set."""
    assert baseline.main([*files.flags, *TINY, "--dry_run", *flags]) == {}
    return capsys.readouterr().out


def test_windows_files_with_chinese_names_and_prompts_work(make_dataset, capsys):
    rows = scored_rows()
    for number, row in enumerate(rows):
        row.update(name=f"图像/画_{number}.png", prompt=f"一只猫, 和“{row['prompt']}”")
    plan = planned(make_dataset(rows, encoding="utf-8-sig", newline="\r\n"), capsys)
    assert "24 images, 8 prompts" in plan and "train 15, val 3, test 6" in plan


def test_prompts_over_the_context_length_are_cut_counted_and_said(make_dataset, capsys):
    rows = scored_rows()
    for row in rows[:6]:  # two prompts, three rows each
        row["prompt"] += " cat" * 100
    assert "2 text(s) exceed CLIP's context length and were cut" in planned(make_dataset(rows), capsys)


def test_elongated_images_are_told_before_training_unless_all_of_them_is_looked_at(make_dataset, capsys):
    files = make_dataset(scored_rows(), size=(64, 16))
    said = "note      24 of 24 images are 3:1 or longer; the middle square that most CLIPs see leaves 75% of them"
    assert said in planned(files, capsys)
    assert "3:1" not in planned(files, capsys, "--crops", "4")


def test_what_was_read_otherwise_than_it_is_written_is_told_before_training(make_dataset, capsys):
    rows = scored_rows()
    files = make_dataset(rows)
    table = pd.DataFrame([{**row, "name": row["name"].upper()} for row in rows])
    table.to_csv(files.csv, index=False, sep=";", decimal=",")
    said = planned(files, capsys)
    assert f"note      {files.csv}: read with semicolons between columns, decimal commas\n" in said
    assert "24 image name(s) are taken for files spelled otherwise, such as 'GEN0_0.PNG' for 'gen0_0.png'" in said


def test_nothing_is_said_of_cut_prompts_where_there_are_none(make_dataset, capsys):
    assert "context length" not in planned(make_dataset(scored_rows()), capsys)


@pytest.mark.parametrize(("column", "left"), [("mos_quality", "consistency"), ("mos_align", "quality")])
def test_a_data_set_with_one_score_is_planned_for_one_task(make_dataset, capsys, column, left):
    columns = [key for key in scored_rows()[0] if key != column]
    plan = planned(make_dataset(scored_rows(), columns=columns), capsys)
    gone = {"consistency": "quality", "quality": "consistency"}[left]
    assert f"{left} " in plan.splitlines()[0] and f"{gone} " not in plan.splitlines()[0]


def test_images_of_every_kind_are_trained_on(make_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = make_dataset(scored_rows())
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    grey, rgb, rgba = Image.fromarray(noise[..., 0]), Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    kinds = [(grey, "PNG"), (rgb.quantize(16), "PNG"), (rgba, "PNG"), (rgb.convert("CMYK"), "JPEG"), (deep, "PNG")]
    for number, (image, kind) in enumerate([*kinds, (rgba.convert("LA"), "PNG"), (grey.convert("1"), "PNG")]):
        image.save(files.images / f"gen0_{number}.png", kind)
    rgb.save(files.images / "gen0_7.png", "PNG", exif=exif)
    results = baseline.main([*files.flags, *TINY, "--epochs", "1", "--no_report", "--output_dir", "run"])
    assert np.isfinite(results["test"]["loss"])
    assert len((tmp_path / "run" / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 25


# -- scoring


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "picture.png"
    Image.new("RGB", (60, 60), "red").save(path)
    return str(path)


@pytest.fixture
def scoring(refused) -> Callable[..., str]:
    """A function that expects predict.py to refuse a command line, and returns the message."""
    return lambda *argv: refused([str(word) for word in argv], main=predict.main)


def test_a_missing_checkpoint_is_refused_by_name(scoring, picture, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty", "picture.png"):
        message = scoring("--checkpoint", name, picture)
        assert name in message and "checkpoint" in message


@pytest.mark.parametrize("missing", ["scorer.json", "model.safetensors"])
def test_a_checkpoint_without_one_of_its_files_is_refused_by_that_file(scoring, picture, trained, tmp_path, missing):
    shutil.copytree(trained / "best", tmp_path / "best")
    (tmp_path / "best" / missing).unlink()
    assert missing in scoring("--checkpoint", tmp_path / "best", picture)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "text"])
def test_damaged_weights_are_refused(scoring, picture, trained, tmp_path, damage):
    shutil.copytree(trained / "best", tmp_path / "best")
    path = tmp_path / "best" / "model.safetensors"
    whole = path.read_bytes()
    changed = {"cut": whole[:-100], "header": b"\xff" * 8 + whole[8:], "empty": b"", "text": b"no weights at all"}
    path.write_bytes(changed[damage])
    message = scoring("--checkpoint", tmp_path / "best", picture)
    assert "damaged checkpoint" in message and str(tmp_path / "best") in message


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"clip": 3}', "null"])
def test_a_damaged_description_is_refused(scoring, picture, trained, tmp_path, damage):
    shutil.copytree(trained / "best", tmp_path / "best")
    (tmp_path / "best" / "scorer.json").write_text(damage, encoding="utf-8")
    assert str(tmp_path / "best") in scoring("--checkpoint", tmp_path / "best", picture)


def test_a_description_of_another_model_is_refused_in_one_line(scoring, picture, trained, tmp_path):
    _, state, description = checkpoints.load_weights(trained)
    description["model"]["hidden_q"] += 1
    checkpoints.save_weights(tmp_path / "best", state, description, lambda folder: None)
    message = scoring("--checkpoint", tmp_path / "best", picture)
    assert "does not fit the weights" in message and "size mismatch" in message


def test_missing_and_unreadable_images_are_refused_by_name(scoring, picture, trained, tmp_path, ends_in_time):
    assert "nowhere.png: no such image" in scoring("--checkpoint", trained, picture, "nowhere.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    assert "1 of 2 images cannot be read: broken.png" in scoring("--checkpoint", trained, picture, "broken.png")
    os.mkfifo(tmp_path / "pipe.png")
    message = scoring("--checkpoint", trained, picture, "pipe.png")
    assert "1 of 2 images cannot be read: pipe.png (no regular file)" in message


def test_folders_and_tables_without_images_are_refused(scoring, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--image_dir empty: no images" in scoring("--checkpoint", trained, "--image_dir", "empty")
    assert "--image_dir nowhere: no such folder" in scoring("--checkpoint", trained, "--image_dir", "nowhere")
    assert "nowhere.csv: no such file" in scoring("--checkpoint", trained, "--csv", "nowhere.csv")
    (tmp_path / "a.csv").write_text("name,prompt\nx.png,a cat\n", encoding="utf-8")
    assert "1 of 1 images are missing: x.png" in scoring("--checkpoint", trained, "--csv", "a.csv")
    assert "--prompt_column" in scoring("--checkpoint", trained, "--csv", "a.csv", "--prompt_column", "text")
    argv = ("--checkpoint", trained, "--csv", "a.csv", "--image_dir", "nowhere")
    assert "--image_dir nowhere: no such folder" in scoring(*argv)


def test_a_place_for_the_scores_that_does_not_exist_is_refused_before_scoring(scoring, picture, trained):
    assert "--out nowhere/x.csv" in scoring("--checkpoint", trained, picture, "--out", "nowhere/x.csv")


def test_every_image_needs_its_prompt(trained, picture):
    scorer = Scorer.load(trained)
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        scorer.score([picture, picture], ["a red circle"])
    assert len(scorer.score([picture, picture], ["a red circle", ""])) == 2
    assert len(scorer.score([], [])) == 0


# -- as a user meets it


@pytest.mark.parametrize(
    ("program", "argv", "num_lines", "says"),
    [
        ("baseline.py", ["--epochs", "0"], 1, "--epochs 0: must be in [1, 100000]"),  # before torch is imported
        pytest.param("baseline.py", [], 5, "AGIQA-3K", marks=pytest.mark.slow),
        pytest.param(
            "predict.py",
            ["--checkpoint", "nowhere", "--csv", "bad.csv"],
            1,
            "1 of 1 images are missing",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_is_a_line_on_stderr_and_exit_code_2_without_a_traceback(program, argv, num_lines, says, tmp_path):
    (tmp_path / "bad.csv").write_text(csv_text([{"name": "a.png", "prompt": "b"}]), encoding="utf-8")
    command = [sys.executable, str(ROOT / program), *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == num_lines
    assert says in done.stderr and done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]
