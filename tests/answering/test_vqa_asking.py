"""A trained run of main.py measures, answers for the evaluation servers and is asked; what cannot answer says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from small_vqa import (
    FORMS,
    TINY,
    drawn_features,
    drawn_set,
    error_of,
    finished,
    finished_by_clip,
    finished_without_images,
    people,
    read,
    table,
    tiny_run,
    write_table,
)
from tiny_run import finished_run

import main
from answering.configs import parse_args
from training import checkpoints
from vqa.answers import accuracy
from vqa.questions import plain_id

EACH_FORM = pytest.mark.parametrize("form", FORMS)
VAL = {"GQA": "questions/val_all_questions.json", "VQA": "v2_OpenEnded_mscoco_val2014_questions.json"}
KEYS = {"GQA": ("questionId", "prediction"), "VQA": ("question_id", "answer")}


def flags_of(mode: str, form: str, run: Path, *flags: str, root: Path | None = None) -> list[str]:
    """The command line by which a run on a drawn set is to evaluate or predict."""
    data = ["--dataset", form, "--data_root", str(root or drawn_set(form)), "--features", str(drawn_features(form))]
    return ["--mode", mode, "--checkpoint", str(run), *data, *flags]


# evaluate


@EACH_FORM
def test_the_test_fold_is_worth_again_what_the_run_said(form, capsys):
    """The run's test fold is the official one with answers, val. --checkpoint names the run, or its weights."""
    told = read(finished(form) / "results.json")
    for run in (finished(form), finished(form) / "best"):
        found = main.main(flags_of("evaluate", form, run))
        assert found["measures"] == pytest.approx(told["measures"], rel=1e-5)
        assert found["ceiling"] == told["ceiling"] and found["confusion"] == told["confusion"]
        for key, kinds in told["by_kind"].items():
            for kind, one in kinds.items():
                assert found["by_kind"][key][kind] == {**one, "floors": {}}
    out = capsys.readouterr().out
    assert f"all questions               {told['measures']['accuracy']:7.3f}  " in out
    assert f"questions {len(people(form, 'val'))} questions about 4 images, with answers, from " in out


@EACH_FORM
def test_another_fold_is_measured_by_its_own_answers(form, tmp_path):
    path = tmp_path / "answers.json"
    found = main.main(flags_of("evaluate", form, finished(form), "--fold", "train", "--output", str(path)))
    said, given = people(form, "train"), {str(row[KEYS[form][0]]): row[KEYS[form][1]] for row in read(path)}
    assert given.keys() == said.keys()
    expected = np.mean([accuracy(given[name], told) for name, (_, told) in said.items()])
    assert found["measures"]["accuracy"] == pytest.approx(expected)
    assert found["data"] == {"train": {"questions": len(said), "images": 28}}
    assert "validity" not in found["measures"]  # val_choices.json is not about these questions


def test_scene_graphs_are_said_beside_what_they_went_into(tmp_path, capsys):
    run = tiny_run(tmp_path / "run", "--sg_source", "gt", "--epochs", "1")
    capsys.readouterr()
    found = main.main(flags_of("evaluate", "GQA", run))
    assert found["measures"] == pytest.approx(read(run / "results.json")["measures"], rel=1e-5)
    assert "note      --sg_source gt: people drew these scene graphs" in capsys.readouterr().out


def test_questions_alone_are_answered_without_features(capsys):
    found = main.main(["--mode", "evaluate", "--checkpoint", str(finished_without_images()), "--data_root",
                       str(drawn_set("GQA"))])  # fmt: skip
    told = read(finished_without_images() / "results.json")
    assert found["measures"] == pytest.approx(told["measures"], rel=1e-5)


def test_a_run_on_shuffled_images_is_measured_on_such(tmp_path):
    run = tiny_run(tmp_path / "run", "--shuffle_images", "--epochs", "1")
    found = main.main(flags_of("evaluate", "GQA", run))
    assert found["measures"] == pytest.approx(read(run / "results.json")["measures"], rel=1e-5)
    own = flags_of("evaluate", "GQA", finished("GQA"))
    assert main.main(own)["measures"]["loss"] != main.main([*own, "--shuffle_images"])["measures"]["loss"]


def test_a_run_by_clip_looks_again_where_the_images_are(tmp_path):
    data = ["--dataset", "VQA", "--data_root", str(drawn_set("VQA"))]
    own = ["--mode", "evaluate", "--checkpoint", str(finished_by_clip()), *data, "--cache_dir", str(tmp_path)]
    told = read(finished_by_clip() / "results.json")
    assert main.main(own)["measures"] == pytest.approx(told["measures"], rel=1e-4)


# predict


def without_answers(form: str, folder: Path) -> Path:
    """A data folder whose one file has the questions of the test fold, which nobody has answered: those of val."""
    asked = read(drawn_set(form) / VAL[form])
    if form == "GQA":
        kept = ("question", "imageId", "isBalanced")
        asked = {name: {key: one[key] for key in kept} for name, one in asked.items()}
    folder.mkdir()
    name = {"GQA": "submission_all_questions.json", "VQA": "v2_OpenEnded_mscoco_test2015_questions.json"}[form]
    (folder / name).write_text(json.dumps(asked))
    return folder


@EACH_FORM
def test_the_result_file_is_of_the_official_form_with_every_question_once(form, tmp_path, capsys):
    asked = read(drawn_set(form) / VAL[form])
    ids = list(asked) if form == "GQA" else [one["question_id"] for one in asked["questions"]]
    told = table(finished(form) / "predictions.csv").set_index("id")["prediction"]
    names = set(read(finished(form) / "best" / "scorer.json")["answers"])
    for fold, root in (("val", drawn_set(form)), ("test", without_answers(form, tmp_path / "test"))):
        path = tmp_path / "answers" / f"{fold}.json"
        flags = ["--fold", fold, "--output", str(path)]
        found = main.main(flags_of("predict", form, finished(form), *flags, root=root))
        rows = read(path)
        assert found == {"answers": len(ids)} and f"answers   {len(ids)} in {path}" in capsys.readouterr().out
        assert [list(row) for row in rows] == [list(KEYS[form])] * len(ids)
        given = {row[KEYS[form][0]]: row[KEYS[form][1]] for row in rows}
        assert len(rows) == len(given) and given.keys() == set(ids)  # numbers in VQA, texts in GQA
        assert set(given.values()) <= names
        assert {str(name): answer for name, answer in given.items() if str(name) in told} == told.to_dict()


def test_a_table_of_ones_own_is_answered_in_its_order(tmp_path):
    path = write_table(tmp_path)
    data = ["--dataset", "csv", "--data_csv_path", str(path)]
    run = tmp_path / "run"
    main.run(parse_args([*data, "--question_only", *TINY, "--epochs", "1", "--no_report", "--output", str(run)]))
    main.main(["--mode", "predict", "--checkpoint", str(run), *data, "--output", str(tmp_path / "answers.json")])
    rows = read(tmp_path / "answers.json")
    assert [row["id"] for row in rows] == [str(number) for number in range(1, 57)]
    assert {frozenset(row) for row in rows} == {frozenset(("id", "answer"))}


def test_result_files_have_a_name_and_are_not_overwritten(tmp_path, monkeypatch, capsys):
    argv = flags_of("predict", "VQA", finished("VQA"))
    monkeypatch.chdir(tmp_path)
    main.main(argv)
    path = Path("vqa-val-answers.json")
    rows = read(path)
    path.write_text("mine")
    error = error_of(*argv, capsys=capsys)
    assert error == f"error: --output {path}: is there already; name another, or pass --overwrite\n"
    assert path.read_text() == "mine"
    error = error_of(*flags_of("evaluate", "VQA", finished("VQA"), "--output", str(path)), capsys=capsys)
    assert "is there already" in error
    main.main([*argv, "--overwrite"])
    assert read(path) == rows and [each.name for each in tmp_path.iterdir()] == [path.name]


# ask


def asked(run: Path) -> tuple[str, str, str, float]:
    """Image, question, prediction and its probability of the question that a run answered with most certainty."""
    found = table(run / "predictions.csv")
    best = found.loc[found["probability"].astype(float).idxmax()]
    return best["image"], best["question"], best["prediction"], float(best["probability"])


def test_a_run_by_clip_is_asked_about_any_image(tmp_path, capsys):
    """And answers as it did when that image was one of the test fold's."""
    image, question, answer, chance = asked(finished_by_clip())
    (path,) = [each for each in drawn_set("VQA").glob("val2014/*.jpg") if plain_id(each.name) == image]
    own = shutil.copy(path, tmp_path / "my own image.jpg")
    ask = ["--mode", "ask", "--checkpoint", str(finished_by_clip()), "--image", str(own), "--question", question]
    capsys.readouterr()
    found = main.main([*ask, "--cache_dir", str(tmp_path / "cache")])
    assert len(found) == 5 and next(iter(found)) == answer
    assert found[answer] == pytest.approx(chance, abs=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(0 <= value <= 1 for value in found.values())
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{value:6.3f}  {text}" for text, value in found.items()]


@EACH_FORM
def test_a_run_by_features_is_asked_about_an_image_that_has_some(form, tmp_path, capsys):
    image, question, answer, chance = asked(finished(form))
    path = tmp_path / (f"{image}.jpg" if form == "GQA" else f"COCO_val2014_{int(image):012}.jpg")
    path.touch()
    own = ["--mode", "ask", "--checkpoint", str(finished(form)), "--features", str(drawn_features(form))]
    found = main.main([*own, "--image", str(path), "--question", question])
    assert next(iter(found)) == answer and found[answer] == pytest.approx(chance, abs=1e-4)
    (tmp_path / "unknown.jpg").touch()
    error = error_of(*own, "--image", str(tmp_path / "unknown.jpg"), "--question", question, capsys=capsys)
    assert error == f"error: --features {drawn_features(form)}: has no image 'unknown'\n"


def test_a_run_that_looks_at_no_image_says_so(tmp_path, capsys):
    (tmp_path / "any.jpg").touch()
    _, question, answer, _ = asked(finished_without_images())
    own = ["--mode", "ask", "--checkpoint", str(finished_without_images()), "--question", question]
    capsys.readouterr()
    assert next(iter(main.main([*own, "--image", str(tmp_path / "any.jpg")]))) == answer
    assert "this run looks at no image" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_told(tmp_path, capsys):
    own = ["--mode", "ask", "--checkpoint", str(finished_by_clip()), "--question", "Is it?", "--cache_dir",
           str(tmp_path / "cache")]  # fmt: skip
    assert "there is no such file" in error_of(*own, "--image", str(tmp_path / "no.jpg"), capsys=capsys)
    (tmp_path / "text.jpg").write_text("no image")
    assert "text.jpg" in error_of(*own, "--image", str(tmp_path / "text.jpg"), capsys=capsys)


# What cannot answer


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "best" / name).write_bytes((folder / "best" / name).read_bytes()[:-9])


def edit(**changes: object) -> Callable[[Path], None]:
    """Write the checkpoint again, as a whole one, with another description."""

    def act(folder: Path) -> None:
        _, weights, description = checkpoints.load_weights(folder)
        checkpoints.save_weights(folder / "best", weights, {**description, **changes}, lambda path: None)

    return act


def with_fine(folder: Path, **changes: object) -> dict:
    """The description of a run's model, with other arguments of its fine branch."""
    model = read(folder / "best" / "scorer.json")["model"]
    return {**model, "branches": {"fine": {**model["branches"]["fine"], **changes}}}


def other_sizes(folder: Path) -> None:
    edit(model=with_fine(folder, width=24))(folder)


def other_version(folder: Path) -> None:
    edit(model=with_fine(folder, speed=7))(folder)


def of_another_program(folder: Path) -> None:
    shutil.rmtree(folder / "best")
    checkpoints.save_weights(folder / "best", {"w": torch.ones(2)}, {"tasks": ["q", "c"]}, lambda path: None)


def without_weights(folder: Path) -> None:
    (folder / "best" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "not a checkpoint, scorer.json is missing"),
        (empty, "not a checkpoint, scorer.json is missing"),
        (of_another_program, "is no run of main.py"),
        (edit(words="the"), "is no run of main.py"),
        (edit(options={"dataset": "VQA"}), "is no run of main.py ('options' has no 'loss')"),
        (other_sizes, "damaged checkpoint (size mismatch for"),
        (other_version, "damaged checkpoint"),
        (cut("scorer.json"), "damaged checkpoint"),
        (cut("model.safetensors"), "damaged checkpoint"),
        (without_weights, "not a checkpoint, model.safetensors is missing"),
    ],
)
def test_what_is_no_trained_run_is_told_in_one_line(damage, said, tmp_path, capsys):
    run = shutil.copytree(finished("VQA"), tmp_path / "run")
    damage(run)
    for mode in ("evaluate", "predict"):
        error = error_of(*flags_of(mode, "VQA", run, "--output", str(tmp_path / "a.json")), capsys=capsys)
        assert said in error and str(run) in error
    assert not (tmp_path / "a.json").exists()


@pytest.mark.slow
def test_a_run_of_baseline_is_told_in_one_line(demo_set, capsys):
    run = finished_run(demo_set)
    assert "is no run of main.py" in error_of(*flags_of("evaluate", "VQA", run), capsys=capsys)


def test_features_have_to_be_named_and_as_wide_as_in_training(tmp_path, capsys):
    argv = flags_of("evaluate", "VQA", finished("VQA"))
    place = argv.index("--features")
    without = [*argv[:place], *argv[place + 2 :]]
    assert "error: --features PATH: this run was trained on features from files" in error_of(*without, capsys=capsys)
    for name in ("trainval.hdf5", "imgid2idx.pkl"):
        shutil.copy(drawn_set("VQA") / name, tmp_path)
    with h5py.File(tmp_path / "trainval.hdf5", "r+") as file:
        narrow = file["image_features"][:, :100]
        del file["image_features"]
        file["image_features"] = narrow
    error = error_of(*without, "--features", str(tmp_path / "trainval.hdf5"), capsys=capsys)
    assert error.endswith("trainval.hdf5: 100 numbers a region; the run was trained on 320\n")
    error = error_of(*without, "--features", str(tmp_path / "nowhere.hdf5"), capsys=capsys)
    assert "nowhere.hdf5: there is no such file" in error


def test_questions_about_images_without_features_are_refused_or_left_out(tmp_path, capsys):
    """Here all of them but those about one image."""
    asked = read(drawn_set("VQA") / VAL["VQA"])
    first = asked["questions"][0]["image_id"]
    count = sum(one["image_id"] == first for one in asked["questions"])
    others = [{**one, "image_id": one["image_id"] + (one["image_id"] != first) * 1000} for one in asked["questions"]]
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").write_text(json.dumps({"questions": others}))
    path = tmp_path / "answers.json"
    argv = flags_of("predict", "VQA", finished("VQA"), "--fold", "test", "--output", str(path), root=tmp_path)
    error = error_of(*argv, capsys=capsys)
    assert f"{len(others) - count} of {len(others)} questions are about 3 images that --features has not" in error
    assert main.main([*argv, "--bad_images", "skip"]) == {"answers": count}
    assert "note      left out: " in capsys.readouterr().out


def test_without_answers_there_is_nothing_to_evaluate(tmp_path, capsys):
    for form in FORMS:
        root = without_answers(form, tmp_path / form)
        error = error_of(*flags_of("evaluate", form, finished(form), "--fold", "test", root=root), capsys=capsys)
        assert error.startswith("error: --mode evaluate: ") and "--mode predict answers them" in error
        error = error_of(*flags_of("evaluate", form, finished(form), root=root), capsys=capsys)
        assert "has no questions of the val fold" in error


def test_scene_graphs_of_a_program_have_to_be_named_again(tmp_path, capsys):
    folder = drawn_set("GQA") / "sceneGraphs"
    graphs = ["--sg_source", "predicted", "--scene_graphs", str(folder)]
    run = tiny_run(tmp_path / "run", *graphs, "--epochs", "1")
    error = error_of(*flags_of("evaluate", "GQA", run), capsys=capsys)
    assert error.startswith("error: --sg_source predicted --scene_graphs DIR: this run was trained with such")
    others = ["--sg_source", "gt", "--scene_graphs", str(folder)]
    error = error_of(*flags_of("evaluate", "GQA", run, *others), capsys=capsys)
    assert error == "error: --sg_source gt: this run was trained with predicted; drop it\n"
    found = main.main(flags_of("evaluate", "GQA", run, *graphs))
    assert found["measures"] == pytest.approx(read(run / "results.json")["measures"], rel=1e-5)
    # Of one image there may be none, which is said.
    image, question, answer, chance = asked(run)
    (tmp_path / f"{image}.jpg").touch()
    ask = ["--mode", "ask", "--checkpoint", str(run), "--features", str(drawn_features("GQA"))]
    ask += ["--image", str(tmp_path / f"{image}.jpg"), "--question", question]
    capsys.readouterr()
    known = main.main([*ask, *graphs])
    assert known[answer] == pytest.approx(chance, abs=1e-4)
    assert "note" not in capsys.readouterr().out
    assert main.main(ask) != known
    assert "this run was trained with scene graphs; of this image there is none" in capsys.readouterr().out


def test_a_run_that_looks_at_images_does_not_answer_without(capsys):
    error = error_of(*flags_of("evaluate", "VQA", finished("VQA"), "--question_only"), capsys=capsys)
    assert error == "error: --question_only: this run was trained to look at images; drop it\n"
