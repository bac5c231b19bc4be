"""`vqa/questions.py`: the official files are read as they are, and what is wrong with one is said in a line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from vqa_records import gqa_record

from vqa.questions import find_gqa, find_vqa, read_gqa, read_table, read_vqa


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((gzip.compress if path.suffix == ".gz" else bytes)(json.dumps(value).encode()))
    return path


def vqa_question(number: int, **changes: Any) -> dict[str, Any]:
    return {"question_id": number, "image_id": number // 10, "question": f"What is {number}?"} | changes


def vqa_annotation(number: int, *answers: str, **changes: Any) -> dict[str, Any]:
    said = [{"answer": answer, "answer_confidence": "yes", "answer_id": place} for place, answer in enumerate(answers)]
    return {"question_id": number, "answers": said, "answer_type": "other", "question_type": "what is"} | changes


@pytest.fixture
def vqa_files(tmp_path: Path) -> tuple[Path, Path]:
    asked = write(tmp_path / "q.json", {"questions": [vqa_question(11), vqa_question(12), vqa_question(20)]})
    said = [vqa_annotation(number, "a", "b") for number in (20, 12, 11, 99)]  # in another order, and one too many
    return asked, write(tmp_path / "a.json", {"annotations": said})


def test_answers_find_their_questions_by_id(vqa_files):
    found = read_vqa(*vqa_files)
    assert (found.ids, found.images) == (["11", "12", "20"], ["1", "1", "2"])
    assert found.answers == [("a", "b")] * 3
    assert found.kinds == {"answer type": ["other"] * 3, "question type": ["what is"] * 3}
    assert found.source == "3 questions about 2 images, with answers, from q.json"


def test_questions_are_read_without_answers(vqa_files):
    found = read_vqa(vqa_files[0])
    assert not found.are_answered and found.kinds == {} and "without answers" in found.source


def test_the_official_files_are_read(vqa_dir):
    found = read_vqa(*find_vqa(vqa_dir / "vqa-v2", "train"))
    assert len(found) == 5 and all(len(answers) == 10 for answers in found.answers)
    assert found.texts[0] == "What is this photo taken looking through?"
    assert found.answers[0].count("net") == 8 and found.kinds["question type"][0] == "what is this"
    many = read_vqa(*find_vqa(vqa_dir / "vqa-v2-60k", "val"))
    assert len(many) == 8977 and set(many.kinds["answer type"]) == {"yes/no", "number", "other"}


def test_gqa_asks_balanced_questions_and_keeps_the_others_for_its_measures(tmp_path):
    first = write(
        tmp_path / "0.json", {"q1": gqa_record("cup", entailed=["q2"]), "q2": gqa_record("yes", isBalanced=False)}
    )
    second = write(tmp_path / "1.json", {"q3": gqa_record("no", imageId="2")})
    found = read_gqa([first, second])
    assert (found.ids, found.images, found.answers) == (["q1", "q3"], ["1", "2"], [("cup",), ("no",)])
    assert found.records is not None and set(found.records) == {"q1", "q2", "q3"}
    assert found.kinds["structural"] == ["query", "query"]
    assert found.source.endswith("from 0.json; 1 unbalanced ones are left out")
    with pytest.raises(ValueError, match=r"1\.json: q3 were in an earlier file"):
        read_gqa([second, second])


def test_gqa_questions_of_a_test_fold_have_no_answers(tmp_path):
    plain = {"question": "Is it?", "imageId": "n5", "isBalanced": False}
    found = read_gqa([write(tmp_path / "q.json", {"q": plain})])
    assert (found.ids, found.are_answered, found.kinds) == (["q"], False, {})


def test_official_gqa_files_are_read(vqa_dir):
    found = read_gqa([vqa_dir / "gqa" / "questions0.json"])
    assert found.texts == ["What is hanging above the chalkboard?"] and found.answers == [("picture",)]


def test_a_table_of_own_questions_is_read(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text('image,question,answer\na.png,"What, then?",cat|a cat\nb.png,Is it?,\n')
    found = read_table(path)
    assert found.texts == ["What, then?", "Is it?"] and found.answers == [("cat", "a cat"), ()]
    assert (found.ids, found.images) == (["1", "2"], ["a.png", "b.png"])


def test_each_fold_is_found_where_the_downloads_unpack_to(tmp_path):
    vqa = write(tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json", {})
    assert find_vqa(tmp_path, "test") == (vqa, None)
    parts = [
        write(tmp_path / f"questions1.2/train_all_questions/train_all_questions_{number}.json", {})
        for number in (0, 2, 10)
    ]
    assert find_gqa(tmp_path, "train") == parts
    whole = write(tmp_path / "train_balanced_questions.json", {})
    assert find_gqa(tmp_path, "train") == [whole]


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"no questions of the val fold, such as v2_Open.*; they are at https://visualqa"
    ):
        find_vqa(tmp_path, "val")
    with pytest.raises(ValueError, match=r"none: is no folder; they are at https://cs\.stanford"):
        find_gqa(tmp_path / "none", "train")


BROKEN: dict[str, Any] = {
    "is no JSON": (b"{", "cannot be read"),
    "a list": (b"[]", "has no list 'questions'"),
    "an empty list": (b'{"questions": []}', "has no list 'questions'"),
    "an id that is a text": (json.dumps({"questions": [vqa_question(1, question_id="x")]}).encode(), "number 1 of"),
    "no image": (b'{"questions": [{"question_id": 1, "question": "?"}]}', "has no 'image_id'"),
    "an id twice": (json.dumps({"questions": [vqa_question(1)] * 2}).encode(), "ids occur twice: 1"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_wrong_file_is_refused_in_one_line(kind, tmp_path):
    content, says = BROKEN[kind]
    path = tmp_path / "q.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_vqa(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_archive_is_refused(tmp_path):
    path = tmp_path / "q.json.gz"
    path.write_bytes(gzip.compress(b'{"questions": []}')[:-9])
    with pytest.raises(ValueError, match=r"q\.json\.gz: cannot be read"):
        read_vqa(path)


def test_answers_to_other_questions_are_refused(vqa_files, tmp_path):
    other = write(tmp_path / "other.json", {"annotations": [vqa_annotation(12, "a")]})
    with pytest.raises(ValueError, match=r"no answers to 2 of 3 questions of q\.json, such as 11, 20; do the two"):
        read_vqa(vqa_files[0], other)


def test_gqa_records_of_another_form_are_refused(tmp_path):
    for record, says in ((gqa_record("cup", types=3), "'types' is no object"), ([], "it is no object")):
        with pytest.raises(ValueError, match=f"question 'q': {says}"):
            read_gqa([write(tmp_path / "q.json", {"q": record})])


def test_tables_that_lack_what_is_needed_are_refused(tmp_path):
    for text, says in (("image,answer\na,b\n", "no column 'question'"), ("image,question\n", "has no rows")):
        path = tmp_path / "own.csv"
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_table(path)
