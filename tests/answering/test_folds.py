"""`answering/folds.py`: no image is in two folds, nothing is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vqa_records import gqa_record

from answering.configs import VQAConfig
from answering.folds import draw_images, read_folds, with_regions
from vqa.questions import Questions


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def vqa_files(root: Path, fold: str, images: list[int], *, answered: bool = True) -> None:
    ids = [1000 * image + (fold == "val") for image in images]
    pairs = zip(ids, images, strict=True)
    asked = [{"question_id": name, "image_id": image, "question": "Is it?"} for name, image in pairs]
    write(root / f"v2_OpenEnded_mscoco_{fold}2014_questions.json", {"questions": asked})
    said = [
        {"question_id": name, "answers": [{"answer": "yes"}] * 10, "answer_type": "yes/no", "question_type": "is it"}
        for name in ids
    ]
    if answered:
        write(root / f"v2_mscoco_{fold}2014_annotations.json", {"annotations": said})


def config_of(root: Path, **changes: object) -> VQAConfig:
    given: dict = {"dataset": "VQA", "data_root": str(root), "features": "F", "val_size": 0.25, **changes}
    return VQAConfig(**given)


def images_of(folds) -> dict[str, set[str]]:
    return {name: set(questions.images) for name, questions in folds.questions.items()}


def test_the_official_fold_with_answers_is_for_testing_and_its_images_are_not_trained_on(tmp_path):
    vqa_files(tmp_path, "train", list(range(1, 41)))
    vqa_files(tmp_path, "val", [39, 40, 50])
    folds = read_folds(config_of(tmp_path), None)
    found = images_of(folds)
    assert found["test"] == {"39", "40", "50"}
    assert found["train"] | found["val"] == {str(image) for image in range(1, 39)}
    assert not found["train"] & found["val"] and len(found["val"]) == round(0.25 * 38)
    assert "left out: 2 of 40 training questions, which are about images of the test fold" in folds.notes


@pytest.mark.parametrize("has_val", [False, True])
def test_without_an_answered_fold_the_test_fold_is_drawn_by_image(has_val, tmp_path):
    vqa_files(tmp_path, "train", list(range(1, 41)))
    if has_val:
        vqa_files(tmp_path, "val", [50], answered=False)
    found = images_of(read_folds(config_of(tmp_path, test_size=0.2), None))
    assert {name: len(images) for name, images in found.items()} == {"train": 24, "val": 8, "test": 8}
    assert found == images_of(read_folds(config_of(tmp_path, test_size=0.2), None))
    assert found != images_of(read_folds(config_of(tmp_path, test_size=0.2, seed=1), None))


def test_images_without_regions_are_an_error_or_left_out_and_counted(tmp_path):
    vqa_files(tmp_path, "train", list(range(1, 41)))
    known = [str(image) for image in range(1, 31)]
    with pytest.raises(ValueError, match="10 of 40 questions are about 10 images that --features has not, such as 31"):
        read_folds(config_of(tmp_path), known)
    folds = read_folds(config_of(tmp_path, bad_images="skip"), known)
    assert set().union(*images_of(folds).values()) == set(known)
    assert any(note.startswith("left out: 10 of 40 questions") for note in folds.notes)
    with pytest.raises(ValueError, match="40 of 40 questions"):
        read_folds(config_of(tmp_path, bad_images="skip"), ["nothing"])


def test_damaged_val_files_are_told_and_not_passed_over(tmp_path):
    vqa_files(tmp_path, "train", [1, 2, 3])
    write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", [])
    with pytest.raises(ValueError, match="has no list 'questions'"):
        read_folds(config_of(tmp_path), None)


def test_nothing_can_be_learnt_without_answers(tmp_path):
    vqa_files(tmp_path, "train", [1, 2, 3], answered=False)
    with pytest.raises(ValueError, match="there is nothing to learn without answers"):
        read_folds(config_of(tmp_path), None)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no questions of the train fold"):
        read_folds(config_of(tmp_path / "none"), None)


def test_gqa_and_tables_are_read(tmp_path):
    records = {f"q{image}": gqa_record("cup", imageId=str(image)) for image in range(12)}
    write(tmp_path / "gqa" / "train_balanced_questions.json", records)
    found = images_of(read_folds(config_of(tmp_path / "gqa", dataset="GQA"), None))
    assert sum(map(len, found.values())) == 12
    rows = "".join(f"cats/{image}.jpg,What?,cat|kitten\n" for image in range(12))
    (tmp_path / "t.csv").write_text("image,question,answer\n" + rows)
    table = VQAConfig(dataset="csv", data_csv_path=str(tmp_path / "t.csv"), features="clip", val_size=0.25)
    assert "cats/3.jpg" in set().union(*images_of(read_folds(table, None)).values())
    files = VQAConfig(dataset="csv", data_csv_path=str(tmp_path / "t.csv"), features="F", val_size=0.25)
    assert "3" in set().union(*images_of(read_folds(files, None)).values())


def test_too_few_images_are_told():
    asked = Questions(["1", "2"], ["7", "7"], ["a", "b"], [("x",), ("y",)])
    with pytest.raises(ValueError, match=r"1 image\(s\) are too few"):
        draw_images(asked, 0.5, 0)


def test_questions_with_regions_stay_as_they_are():
    asked = Questions(["1", "2"], ["7", "8"], ["a", "b"], [("x",), ("y",)])
    assert with_regions(asked, {"7", "8"}, False) == (asked, "")
