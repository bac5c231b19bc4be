"""Runs of main.py from the questions to the page: what they leave, what they measured, and what each option does."""

from __future__ import annotations

import base64
import html
import json
import pickle
import re
import shlex
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_vqa import (
    FORMS,
    TINY,
    drawn_set,
    error_of,
    finished,
    finished_without_images,
    people,
    read,
    table,
    tiny_flags,
    tiny_run,
    write_table,
)
from stopped_runs import OF_TIME
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from answering.configs import NOT_SAVED, OPTIONS, VQAConfig, parse_args
from answering.folds import read_folds
from cli.parser import flag_words
from training import checkpoints
from vqa.answers import accuracy, soft_targets
from vqa.questions import plain_id

FILES = {"config.json", "metrics.csv", "results.json", "predictions.csv", "examples.json", "report.html"}
FLOORS = ["most frequent answer", "question only", "image only", "shuffled image"]
EACH_FORM = pytest.mark.parametrize("form", FORMS)
ONE_EPOCH = ["--epochs", "1"]
FINE = "branches.fine."


@EACH_FORM
def test_a_run_leaves_its_files_and_nothing_else(form):
    folder = finished(form)
    assert {path.name for path in folder.iterdir()} == {*FILES, "best", "figures"}
    assert {path.name for path in (folder / "best").iterdir()} == {"model.safetensors", "scorer.json"}
    config = read(folder / "config.json")
    assert (config["dataset"], config["num_hid"], config["epochs"]) == (form, 16, 3)
    assert config["provenance"]["resolved"]["processes"] == 1
    history = pd.read_csv(folder / "metrics.csv")
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    page = (folder / "report.html").read_text()
    assert f"{read(folder / 'results.json')['measures']['accuracy']:.3f}" in page


@EACH_FORM
def test_results_are_those_of_the_predictions_by_the_official_files(form):
    results, found = (read(finished(form) / "results.json"), table(finished(form) / "predictions.csv"))
    said = people(form, "val")
    assert sorted(found["id"]) == sorted(said)  # every question of the official fold, once
    assert [said[name][0] for name in found["id"]] == found["image"].tolist()
    if form == "VQA":
        own = [accuracy(given, said[name][1]) for name, given in zip(found["id"], found["prediction"], strict=True)]
    else:
        own = [float([given] == said[name][1]) for name, given in zip(found["id"], found["prediction"], strict=True)]
    assert found["accuracy"].astype(float).tolist() == pytest.approx(own, abs=1e-8)
    assert results["measures"]["accuracy"] == pytest.approx(np.mean(own))
    low, high = results["interval"]
    assert low <= np.mean(own) <= high and low < high
    assert found["prediction"].nunique() > 1  # or half of this would be true of anything


@EACH_FORM
def test_the_answer_of_people_stands_beside_each_prediction(form):
    found, said = table(finished(form) / "predictions.csv"), people(form, "val")
    best = [
        max((told := soft_targets(said[name][1])).values()) - told[own] for name, own in found[["id", "answer"]].values
    ]
    assert max(best) < 1e-9


@EACH_FORM
def test_folds_are_counted_and_share_no_image(form):
    results = read(finished(form) / "results.json")
    train, val = people(form, "train"), people(form, "val")
    count = results["data"]
    assert count["test"] == {"questions": len(val), "images": len({image for image, _ in val.values()})}
    images = {image for image, _ in train.values()}
    assert count["train"]["questions"] + count["val"]["questions"] == len(train)
    assert count["train"]["images"] + count["val"]["images"] == len(images)
    assert count["val"]["images"] == round(0.1 * len(images))
    known = {word for _, told in train.values() for one in told for word in soft_targets([one])}
    assert set(read(finished(form) / "best" / "scorer.json")["answers"]) <= known
    assert results["answers"] == len(read(finished(form) / "best" / "scorer.json")["answers"])


@EACH_FORM
def test_kinds_of_questions_add_up_to_all_of_them(form):
    results, found = read(finished(form) / "results.json"), table(finished(form) / "predictions.csv")
    assert list(results["by_kind"]) == (
        ["answer", "structural", "semantic"] if form == "GQA" else ["answer type", "question type"]
    )
    for kinds in results["by_kind"].values():
        counts = [one["questions"] for one in kinds.values()]
        assert sum(counts) == len(found)
        own = [one["accuracy"] for one in kinds.values()]
        assert np.average(own, weights=counts) == pytest.approx(results["measures"]["accuracy"])
        for floor in FLOORS:
            own = [one["floors"][floor] for one in kinds.values()]
            assert np.average(own, weights=counts) == pytest.approx(results["floors"][floor])
    column = "structural" if form == "GQA" else "answer type"
    means = found["accuracy"].astype(float).groupby(found[f"{column.removesuffix(' type')}_type"]).mean()
    assert {kind: one["accuracy"] for kind, one in results["by_kind"][column].items()} == pytest.approx(means.to_dict())


@EACH_FORM
def test_floors_stand_beside_the_accuracy(form):
    results = read(finished(form) / "results.json")
    assert list(results["floors"]) == FLOORS
    assert all(0 <= value <= results["ceiling"] <= 1 for value in (*results["floors"].values(), results["ceiling"]))
    own = VQAConfig(**{key: value for key, value in read(finished(form) / "config.json").items() if key in OPTIONS})
    totals: Counter[str] = Counter()
    for told in read_folds(own, None).questions["train"].answers:
        totals.update(soft_targets(told))
    most = min(totals, key=lambda word: (-round(totals[word], 6), word))
    expected = np.mean([accuracy(most, told) for _, told in people(form, "val").values()])
    assert results["floors"]["most frequent answer"] == pytest.approx(expected)


@EACH_FORM
def test_the_epoch_with_the_highest_validation_accuracy_is_kept(form):
    results, history = read(finished(form) / "results.json"), pd.read_csv(finished(form) / "metrics.csv")
    best = history.iloc[int(history["val_accuracy"].argmax())]
    assert (results["best_epoch"], results["epochs"]) == (best["epoch"], 3)
    assert results["val"] == pytest.approx({"accuracy": best["val_accuracy"], "loss": best["val_loss"]}, rel=1e-6)


@EACH_FORM
def test_the_confusion_counts_every_question(form):
    found = read(finished(form) / "results.json")["confusion"]
    assert np.shape(found["counts"]) == (len(found["answers"]),) * 2
    assert np.sum(found["counts"]) == len(people(form, "val"))
    if form == "GQA":
        said = [told[0] for _, told in people(form, "val").values()]
        for name, counts in zip(found["answers"][:-1], found["counts"], strict=False):
            assert sum(counts) == said.count(name)


@EACH_FORM
def test_examples_are_the_questions_answered_wrongly_and_rightly_with_most_certainty(form):
    shown = read(finished(form) / "examples.json")
    told = table(finished(form) / "predictions.csv").set_index("id")
    chance = told["probability"].astype(float)
    wrong = told["accuracy"].astype(float) == 0
    ids = [one["id"] for one in shown]
    assert len(ids) == len(set(ids)) and chance[wrong].idxmax() == ids[0]
    assert chance[[name for name in ids if wrong[name]]].is_monotonic_decreasing
    assert sum(wrong[ids]) == min(8, sum(wrong)) and sum(~wrong[ids]) == min(8, sum(~wrong))
    for one in shown:
        (best, sure), *others = one["prediction"]
        assert len(others) == 4 and all(sure >= other for _, other in others)
        assert best == told["prediction"][one["id"]] and sure == pytest.approx(chance[one["id"]], abs=1e-4)
        assert Path(one["image"]).is_file() and plain_id(one["image"]) == told["image"][one["id"]]
        assert len(one["boxes"]) == len(one["weights"]) > 0
        assert sum(one["weights"]) == pytest.approx(1, abs=1e-4)
        assert np.min(one["boxes"]) >= 0 and np.max(one["boxes"]) <= 1


# What each option does


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run of one epoch, to compare others with. Read it, do not change it."""
    return tiny_run(tmp_path_factory.mktemp("plain") / "run", *ONE_EPOCH)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Those of the weights of a run's fine branch, by their names in there."""
    weights = checkpoints.load_weights(folder)[1]
    assert all(name.startswith(FINE) for name in weights)
    return {name.removeprefix(FINE): tuple(value.shape) for name, value in weights.items()}


def history(folder: Path) -> pd.DataFrame:
    """What a run measured in its epochs, without times."""
    return pd.read_csv(folder / "metrics.csv").drop(columns=OF_TIME)


def test_a_run_by_questions_only_looks_at_no_image(tmp_path, capsys):
    folder = finished_without_images()
    assert list(read(folder / "results.json")["floors"]) == ["most frequent answer", "question only"]
    assert not any(name.startswith(("look", "attend", "pool")) for name in shapes(folder))
    assert all(one["boxes"] == one["weights"] == [] for one in read(folder / "examples.json"))
    # The same question gets the same answer whatever it is about.
    given = ["--question_only", "--data_csv_path", str(write_table(tmp_path)), "--dataset", "csv", *TINY, *ONE_EPOCH]
    main.run(parse_args([*given, "--no_report", "--output", str(tmp_path / "run")]))
    told = table(tmp_path / "run" / "predictions.csv")
    assert len(told) > len(set(told["question"])) == 2
    assert told.groupby("question")["prediction"].nunique().max() == 1
    assert "regions   no image is looked at" in capsys.readouterr().out


def test_shuffled_images_are_said_and_train_another_model(plain, tmp_path, capsys):
    folder = tiny_run(tmp_path / "run", "--shuffle_images", *ONE_EPOCH)
    assert "images shuffled among questions" in capsys.readouterr().out
    results, other = (read(each / "results.json") for each in (folder, plain))
    assert results["data"] == other["data"]
    assert list(results["floors"]) == FLOORS[:-1]
    assert history(folder)["loss"][0] != history(plain)["loss"][0]


def test_cross_entropy_shares_the_chance_among_answers(plain, tmp_path):
    folder = tiny_run(tmp_path / "run", "--loss", "ce", *ONE_EPOCH)
    results, other = (read(each / "results.json") for each in (folder, plain))
    assert results["measures"]["loss"] < np.log(results["answers"])
    assert results["measures"]["loss"] != other["measures"]["loss"]
    assert all(sum(chance for _, chance in one["prediction"]) <= 1 + 1e-6 for one in read(folder / "examples.json"))
    assert read(folder / "best" / "scorer.json")["options"]["loss"] == "ce"


def test_the_counter_is_there_if_it_is_asked_for(plain, tmp_path):
    folder = tiny_run(tmp_path / "run", "--use_counter", *ONE_EPOCH)
    new = shapes(folder).keys() - shapes(plain).keys()
    assert new and all(name.startswith(("counter", "project_count")) for name in new)
    assert shapes(folder)["project_count.weight"] == (16, 11)


def test_words_start_from_given_vectors(tmp_path, capsys):
    vectors = {"circle": [0.5, -1, 2, 0.25], "red": [3, 0, 0, -3], "nowhere": [1, 1, 1, 1]}
    text = "".join(f"{word} {' '.join(map(str, values))}\n" for word, values in vectors.items())
    (tmp_path / "glove.4d.txt").write_text(text)
    folder = tiny_run(tmp_path / "run", "--glove", str(tmp_path / "glove.4d.txt"), "--lr", "1e-9", *ONE_EPOCH)
    assert re.search(r"words     2 of \d+ have a vector in glove.4d.txt", capsys.readouterr().out)
    _, weights, description = checkpoints.load_weights(folder)
    for word in ("circle", "red"):
        row = weights[f"{FINE}encode.embed.0.weight"][description["words"].index(word)]
        assert row.tolist() == pytest.approx(vectors[word], abs=1e-5)


def test_a_moving_average_of_the_weights_is_what_is_measured_and_kept(plain, tmp_path):
    folder = tiny_run(tmp_path / "run", "--ema_decay", "0.9", *ONE_EPOCH)
    own, other = history(folder), history(plain)
    assert own["loss"][0] == other["loss"][0] and own["val_loss"][0] != other["val_loss"][0]
    weights, others = (checkpoints.load_weights(each)[1] for each in (folder, plain))
    assert weights.keys() == others.keys()
    assert all((value != others[name]).any() for name, value in weights.items() if name.startswith("classify"))


def test_scene_graphs_that_people_drew_are_told_beside_the_results(plain, tmp_path, capsys):
    folder = tiny_run(tmp_path / "run", "--sg_source", "gt", *ONE_EPOCH)
    (note,) = read(folder / "results.json")["notes"]
    assert note.startswith("--sg_source gt: people drew these scene graphs, which give answers away")
    assert capsys.readouterr().out.count(f"note      {note}") == 2  # in the plan, and below the results
    assert read(plain / "results.json")["notes"] == []
    assert read(folder / "best" / "scorer.json")["entities"] == ["circle", "ring", "square", "star", "triangle"]
    assert history(folder)["loss"][0] != history(plain)["loss"][0]


def test_scene_graphs_of_a_program_are_read_from_their_folder_and_give_nothing_away(tmp_path, capsys):
    graphs = str(drawn_set("GQA") / "sceneGraphs")
    argv = tiny_flags("--sg_source", "predicted", "--scene_graphs", graphs, "--dry_run")
    main.run(parse_args(argv))
    plan = capsys.readouterr().out
    assert ", 5 name something" in plan and "give answers away" not in plan


def test_sizes_are_those_that_were_asked_for(tmp_path):
    flags = "--num_hid 24 --gamma 3 --AOA_layers 2 --no_tfidf --activation relu --max_boxes 3 --question_len 5"
    folder = tiny_run(tmp_path / "run", *flags.split(), *ONE_EPOCH)
    found = shapes(folder)
    assert found["attend.weight"] == (3, 72)
    assert {name.split(".")[1] for name in found if name.startswith("layers.")} == {"0", "1"}
    assert {name.split(".")[1] for name in found if name.startswith("pool.")} == {"0", "1", "2"}
    assert [name for name in found if name.startswith("encode.embed")] == ["encode.embed.0.weight"]
    assert found["encode.read.weight_ih_l0"] == (3 * 24, 300)
    assert all(len(one["boxes"]) <= 3 for one in read(folder / "examples.json"))


def test_what_trades_time_for_memory_changes_no_number(plain, tmp_path):
    flags = "--memory_efficient_attention --dynamic_batch_size --mixed_precision"
    folder = tiny_run(tmp_path / "run", *flags.split(), *ONE_EPOCH)
    pd.testing.assert_frame_equal(history(folder), history(plain), rtol=1e-5)
    assert read(folder / "config.json")["provenance"]["resolved"]["amp"] == "off"  # on a CPU


def test_training_stops_where_validation_no_longer_rises(tmp_path, capsys):
    argv = tiny_flags("--early_stopping_patience", "1", "--epochs", "5", "--lr", "1e-9")
    results = main.run(parse_args([*argv, "--output", str(tmp_path / "run"), "--use_report"]))
    assert (results["epochs"], results["best_epoch"], results["val"]["loss"]) == (1, 0, None)
    assert "no gain in 1 epochs: stopped early" in capsys.readouterr().out
    assert "learnt nothing" in [one["finding"] for one in results["diagnosis"]]
    assert (tmp_path / "run" / "report.html").exists()


def test_a_table_of_ones_own_with_images_seen_by_a_clip(tmp_path, capsys):
    csv = write_table(tmp_path)
    data = ["--dataset", "csv", "--data_csv_path", str(csv), "--image_base_dir", str(drawn_set("VQA"))]
    clip = ["--features", "clip", "--clip_model", "tiny", "--clip_pretrained", "assets", "--max_boxes", "9"]
    own = [*data, *clip, "--cache_dir", str(tmp_path / "cache"), *TINY, "--epochs", "2", "--no_report"]
    results = main.run(parse_args([*own, "--output", str(tmp_path / "run")]))
    assert ", up to 9 an image" in capsys.readouterr().out
    told, asked = table(tmp_path / "run" / "predictions.csv"), table(csv)
    assert {name: part["images"] for name, part in results["data"].items()} == {"train": 20, "val": 2, "test": 6}
    assert len(told) == 12 and told["image"].nunique() == 6
    rows = asked.iloc[[int(name) - 1 for name in told["id"]]]
    assert told[["image", "question"]].values.tolist() == rows[["image", "question"]].values.tolist()
    expected = [
        accuracy(given, cell.split("|")) for given, cell in zip(told["prediction"], rows["answer"], strict=True)
    ]
    assert results["measures"]["accuracy"] == pytest.approx(np.mean(expected))
    assert results["by_kind"] == {} and (tmp_path / "cache" / "regions").is_dir()
    assert all(len(one["boxes"]) == 9 and Path(one["image"]).is_file() for one in read(tmp_path / "run/examples.json"))


def test_damaged_images_are_refused_or_left_out_with_their_questions(tmp_path, capsys):
    csv = write_table(tmp_path)
    shutil.copytree(drawn_set("VQA"), tmp_path / "images")
    broken = table(csv)["image"][0]
    (tmp_path / "images" / broken).write_text("no image")
    own = ["--dataset", "csv", "--data_csv_path", str(csv), "--image_base_dir", str(tmp_path / "images"), *TINY]
    own += ["--features", "clip", "--clip_model", "tiny", "--cache_dir", str(tmp_path), *ONE_EPOCH, "--no_report"]
    assert broken.rpartition("/")[2] in error_of(*own, "--output", str(tmp_path / "run"), capsys=capsys)
    results = main.run(parse_args([*own, "--bad_images", "skip", "--output", str(tmp_path / "run")]))
    assert sum(part["images"] for part in results["data"].values()) == table(csv)["image"].nunique() - 1
    said = capsys.readouterr().out
    assert "images cannot be read: " in said and "questions are about 1 images that --features has not" in said


def test_official_files_with_features_in_a_zip_file_train_as_the_demo_does(tmp_path):
    """All that --demo stands for is said by flags here, and its features come in the other form."""
    root = drawn_set("VQA")
    demo = tiny_run(tmp_path / "demo", *ONE_EPOCH, form="VQA")
    saved = read(demo / "config.json") | {"features": write_zip(tmp_path / "trainval_36.zip"), "demo": False}
    saved |= {"output": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
    words = flag_words({name: saved[name] for name in OPTIONS}, OPTIONS, {})
    assert {"--data_root", "--features", "--least_answers"} < set(words) and str(root) in words
    main.run(parse_args(words))
    pd.testing.assert_frame_equal(history(tmp_path / "run"), history(demo), rtol=1e-4)
    assert len(list((tmp_path / "cache" / "unpacked").glob("*.tsv"))) == 1


def write_zip(path: Path) -> str:
    """The drawn features of the form of VQA as a zipped TSV; boxes are in pixels there."""
    root = drawn_set("VQA")
    index = pickle.loads((root / "imgid2idx.pkl").read_bytes())
    sizes = {int(plain_id(each.name)): Image.open(each).size for each in root.glob("*2014/*.jpg")}
    lines = []
    with h5py.File(root / "trainval.hdf5") as file:
        for image, place in index.items():
            start, end = file["pos_boxes"][place]
            parts = (file[name][start:end].astype("<f4") for name in ("image_bb", "image_features"))
            coded = [base64.b64encode(part.tobytes()).decode() for part in parts]
            lines.append("\t".join(map(str, [image, *sizes[image], end - start, *coded])))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("trainval_36/trainval_resnet101_36.tsv", "\n".join(lines) + "\n")
    return str(path)


# Folders


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    argv = tiny_flags("--dry_run")
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--output", "there"]):
        assert main.main([*argv, *flags]) == {}
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[:7]] == [
            *("data", "questions", "answers", "regions", "model", "schedule", "machine")
        ]
        assert not any(line.startswith("epoch") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_name_gets_one(tmp_path, monkeypatch, capsys):
    argv = tiny_flags("--question_only", *ONE_EPOCH)
    monkeypatch.chdir(tmp_path)
    results = main.main(argv)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-gqa-fine", folder.name)
    assert f"run folder: runs/{folder.name}" in capsys.readouterr().out
    assert read(folder / "results.json") == json.loads(json.dumps(results))


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch, capsys):
    argv = tiny_flags("--features", "nowhere.tsv")
    monkeypatch.chdir(tmp_path)
    assert "nowhere.tsv: there is no such file" in error_of(*argv, capsys=capsys)
    assert list(tmp_path.iterdir()) == []


def test_remarks_are_refused_where_that_is_asked_for(tmp_path, monkeypatch, capsys):
    argv = tiny_flags("--batch_size", "200", "--advice", "strict")
    monkeypatch.chdir(tmp_path)
    assert "error: --advice strict: 1 remark(s)" in error_of(*argv, capsys=capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for name, said in (("notes", "holds other things than a run"), ("file", "is a file, must be a folder")):
        for flags in ([], ["--overwrite"]):
            error = error_of(*tiny_flags("--output", str(tmp_path / name), *flags), capsys=capsys)
            assert error.startswith(f"error: --output {tmp_path / name}: {said}")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["config.json"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_finished_run_is_replaced_only_if_that_is_asked_for(tmp_path, capsys):
    folder = shutil.copytree(finished("GQA"), tmp_path / "run")
    argv = tiny_flags("--question_only", *ONE_EPOCH, "--output", str(folder))
    error = error_of(*argv, capsys=capsys)
    assert f"--output {folder}: holds a finished run" in error and "--overwrite" in error
    assert read(folder / "results.json") == read(finished("GQA") / "results.json")
    main.main([*argv, "--overwrite"])
    assert {path.name for path in folder.iterdir()} == {*FILES, "best"} - {"report.html"}  # the older one's is gone
    assert read(folder / "results.json")["epochs"] == 1


@pytest.mark.slow
def test_scalars_of_every_epoch_go_to_tensorboard(tmp_path, capsys):
    """Also where a measure has nothing to go by: none of the questions that others imply are in the file."""
    root = shutil.copytree(drawn_set("GQA"), tmp_path / "GQA")
    asked = read(root / "questions" / "val_all_questions.json")
    alone = {name: {**one, "entailed": []} for name, one in asked.items() if one["isBalanced"]}
    (root / "questions" / "val_all_questions.json").write_text(json.dumps(alone))
    data = ["--data_root", str(root), "--question_only", "--tensorboard", "--no_report"]
    results = main.run(parse_args([*data, *TINY, "--output", str(tmp_path / "run")]))
    assert "consistency" not in results["measures"]
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [point.step for point in found.Scalars("val/accuracy")] == [1, 2]
    losses = history(tmp_path / "run")["loss"]
    assert [point.value for point in found.Scalars("train/loss")] == pytest.approx(losses.tolist(), rel=1e-6)
    for name in ("accuracy", "distribution"):
        assert found.Scalars(f"test/{name}")[0].value == pytest.approx(results["measures"][name])
    assert "test/consistency" not in found.Tags()["scalars"]
    assert "gets nothing more" not in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_the_command_that_a_run_tells_makes_the_same_run(form):
    folder = finished(form)
    command = read(folder / "results.json")["command"]
    assert html.escape(command) in (folder / "report.html").read_text()
    config, saved = parse_args(shlex.split(command)[2:]), read(folder / "config.json")
    drawn = ("data_root", "features", "scene_graphs", "branches", *NOT_SAVED)  # what follows from the others
    assert {name: getattr(config, name) for name in OPTIONS if name not in drawn} == {
        name: value for name, value in saved.items() if name in OPTIONS and name not in drawn
    }
