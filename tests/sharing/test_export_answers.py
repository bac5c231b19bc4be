"""`sharing/answers.py`: what is exported answers as the run does, where there is no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exported import bare_python, run_bare, script
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vqa import (
    ONE_GRAPH,
    drawn_cache,
    drawn_features,
    drawn_set,
    error_of,
    finished,
    finished_by_clip,
    finished_without_images,
    read,
    table,
    tiny_run,
)
from torch import nn

import main
from branches.counting import Counter
from branches.fusion import AnswerModel
from regions.features import NpzRegions, open_features
from sharing import answers
from sharing.answer_graph import OnnxCounter
from vqa.preprocess import MOST_ENTITIES, Lexicon, number_questions, read_scene_graphs, words_on_image
from vqa.questions import Questions, plain_id
from vqa.targets import AnswerList
from vqa.text import WORD, build_vocabulary

CLOSE = 1e-4
ANSWER = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
from answer import Answerer
rows = json.load(open(sys.argv[2]))
answerer = Answerer(sys.argv[1])
seen = {path: answerer.look(path) for path in set(rows["file"]) - {None}}
found = {}
for size in (1, 7, len(rows["question"])):
    chances = []
    for start in range(0, len(rows["question"]), size):
        part = {name: values[start : start + size] for name, values in rows.items()}
        images = [seen.get(path) for path in part["file"]]
        chances.extend(answerer.answer(part["question"], images, part["described"]))
    found[size] = [[answerer.answers[one.argmax()], float(one.max())] for one in chances]
there = [name for name in ("torch", "PIL") if importlib.util.find_spec(name)]
print(json.dumps({"found": list(found.values()), "there": there}))
"""


def exported(run: Path, folder: Path, *flags: str) -> dict[str, float]:
    words = ["--mode", "export", "--checkpoint", str(run), "--output", str(folder), "--cache_dir", str(drawn_cache())]
    return main.main([*words, *flags])


def as_npz(folder: Path, form: str, names: Sequence[str]) -> dict[str, str]:
    """The features of drawn images as .npz files, boxes in pixels of an image of 200 x 100."""
    known = open_features(drawn_features(form), lambda path: path)
    for name in set(names):
        features, boxes = known.read(name)
        np.savez(folder / f"{name}.npz", features=features, boxes=boxes * [200, 100, 200, 100], width=200, height=100)
    return {name: str(folder / f"{name}.npz") for name in names}


KINDS = {
    "files, counter": ("GQA", "answer.py", lambda folder: tiny_run(folder / "run", "--use_counter")),
    "pixels": ("VQA", "pixels.py", lambda folder: finished_by_clip()),
    "nothing": ("GQA", "answer.py", lambda folder: finished_without_images()),
    "words on images, ce": (
        "GQA",
        "answer.py",
        lambda folder: tiny_run(folder / "run", "--branches", "fine", "--sg_source", "gt", "--loss", "ce"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_answers_the_same_without_torch(kind, tmp_path, capsys):
    form, needed, make = KINDS[kind]
    run, out = make(tmp_path), tmp_path / "out"
    capsys.readouterr()
    measured = exported(run, out)
    said = capsys.readouterr().out
    told = table(run / "predictions.csv")  # of every question of the test fold, as the run answered it
    rows: dict[str, Any] = {"question": list(told["question"]), "described": [""] * len(told)}
    rows["file"] = [None] * len(told)
    if kind == "pixels":
        paths = {plain_id(path.name): str(path) for path in drawn_set(form).rglob("*.jpg")}
        rows["file"] = [paths[name] for name in told["image"]]
    elif kind != "nothing":
        files = as_npz(tmp_path, form, list(told["image"]))
        rows["file"] = [files[name] for name in told["image"]]
    if kind.startswith("words"):
        graphs = read_scene_graphs(sorted((drawn_set(form) / "sceneGraphs").glob("*.json")))
        rows["described"] = [" ".join(words_on_image(graphs[name], 6)) for name in told["image"]]
        assert all(rows["described"])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    python = bare_python(tmp_path / "venv", "answer.py", needed)
    found = run_bare(python, ANSWER, str(out), str(tmp_path / "rows.json"))
    assert found["there"] == (["PIL"] if kind == "pixels" else [])
    for by_size in found["found"]:
        given, chances = zip(*by_size, strict=True)
        assert list(given) == list(told["prediction"])
        np.testing.assert_allclose(chances, told["probability"].astype(float), atol=CLOSE, rtol=0)
    assert told["prediction"].nunique() > 1

    accuracy = read(run / "results.json")["measures"]["accuracy"]
    assert measured == {"same": 1, "furthest": measured["furthest"], "accuracy": accuracy, "own": accuracy}
    assert 0 < measured["furthest"] < CLOSE
    assert f"on {len(told)} questions of the run's test fold:\n  the same answer to 100.0 %, prob" in said
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| trained model | {100 * accuracy:.1f}% |" in card and "      the same answer to 100.0 %" in card
    assert ("answerer.look" in card) == (kind != "nothing") and ("--described" in card) == kind.startswith("words")
    assert str(drawn_cache()) not in card


@pytest.mark.slow
def test_it_answers_from_the_command_line_as_ask_does(tmp_path, capsys):
    run, out = finished_by_clip(), tmp_path / "out"
    exported(run, out)
    image = next(drawn_set("VQA").rglob("*.jpg"))
    asked = ["--image", str(image), "--question", "What colour is it?"]
    capsys.readouterr()
    main.main(["--mode", "ask", "--checkpoint", str(run), *asked, "--cache_dir", str(drawn_cache())])
    expected = capsys.readouterr().out
    code = "import json, runpy, sys, io, contextlib\nsys.path.insert(0, sys.argv[1])\nout = io.StringIO()\n"
    code += "folder, sys.argv = sys.argv[1], ['answer.py', *sys.argv[2:]]\n"
    code += "with contextlib.redirect_stdout(out):\n    runpy.run_path(folder + '/answer.py', run_name='__main__')\n"
    python = bare_python(tmp_path / "venv", "answer.py", "pixels.py")
    assert run_bare(python, code + "print(json.dumps(out.getvalue()))", str(out), *asked) == expected


@pytest.mark.slow
def test_of_a_mixture_the_fine_branch_is_exported_if_asked_for(tmp_path, capsys):
    run = tiny_run(tmp_path / "run", "--sg_source", "gt", *ONE_GRAPH)
    words = ["--mode", "export", "--checkpoint", str(run), "--output", str(tmp_path / "out")]
    said = error_of(*words, capsys=capsys)
    assert said.startswith(
        "error: --mode export: this run answers by fine and graph together, which cannot be exported;"
    )
    found = exported(run, tmp_path / "out", "--branches", "fine")
    assert found["same"] == 1 and found["furthest"] < CLOSE
    results = read(run / "results.json")
    assert found["accuracy"] == results["branches"]["fine"]["accuracy"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "one branch of a run whose answers are mixed from those of fine, graph." in card
    assert "This branch is the row `its fine branch alone`." in card


@pytest.mark.slow
def test_features_of_another_width_are_refused_or_not_compared(tmp_path, capsys):
    words = ["--mode", "export", "--checkpoint", str(finished("GQA")), "--output", str(tmp_path / "out")]
    said = error_of(*words, "--features", "clip", "--cache_dir", str(drawn_cache()), capsys=capsys)
    assert said.startswith("error: --features clip: ") and said.endswith(
        "numbers a region; the run was trained on 320\n"
    )
    assert list(tmp_path.iterdir()) == []
    np.savez(tmp_path / "1.npz", features=np.zeros((2, 5)), boxes=np.zeros((2, 4)))
    assert exported(finished("GQA"), tmp_path / "out", "--features", str(tmp_path)) == {}
    assert f"not compared with the run: --features {tmp_path}: 5 numbers a region;" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_smaller_variants_answer_nearly_the_same(precision, tmp_path, capsys):
    shutil.copytree(finished("GQA") / "best", tmp_path / "alone")
    shutil.copytree(finished("GQA"), tmp_path / "run")
    exported(tmp_path / "alone", tmp_path / "whole")
    assert "not compared with the run: --checkpoint " in capsys.readouterr().out
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert "were not compared with those of the run." in card and "Not known: no `results.json`" in card
    found = exported(tmp_path / "run", tmp_path / "out", "--precision", precision)
    assert f"out: {precision}, " in capsys.readouterr().out
    assert found["same"] > 0.9 and CLOSE / 10 < found["furthest"] < 0.1
    sizes = [(tmp_path / name / "answers.onnx").stat().st_size for name in ("out", "whole")]
    assert sizes[0] < 0.9 * sizes[1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--mode export: needs --output DIR, a new folder"),
        (["--output", "."], "--output .: must be a new folder, in one that exists"),
        (["--output", "new", "--device", "cuda"], "--device cuda: an export is made on the CPU, drop it"),
        (["--output", "new", "--question", "What?"], "--question: belongs to --mode ask"),
        (["--output", "new", "--precision", "int4"], "argument --precision: invalid choice: 'int4'"),
        (["--output", "new"], "none: not a checkpoint"),
        (
            ["--mode", "ask", "--image", "a.png", "--question", "What?", "--precision", "int8"],
            "--precision int8: belongs to --mode export",
        ),
    ],
)
def test_command_lines_that_cannot_be_are_refused(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in error_of("--mode", "export", "--checkpoint", "none", *flags, capsys=capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "wanted", "says"),
    [
        (["graph"], None, "--mode export: this run answers by graph; the fine branch alone can be exported"),
        (["graph"], "fine", "--mode export: this run answers by graph; the fine branch alone can be exported"),
        (["fine", "graph"], "graph", "--branches graph: the fine branch alone can be exported"),
        (["fine", "coarse", "graph"], None, "--mode export: this run answers by fine, coarse and graph together, "),
    ],
)
def test_what_is_no_fine_branch_is_refused(names, wanted, says):
    model = AnswerModel({name: nn.Linear(1, 1) for name in names}, dict.fromkeys(names, ()), 2, "bce")
    with pytest.raises(ValueError, match=says) as caught:
        answers.alone(SimpleNamespace(model=model), wanted)
    assert "\n" not in str(caught.value)


def test_the_counter_of_a_graph_counts_the_same_however_few_regions_there_are():
    torch.manual_seed(0)
    counter = Counter(10)
    for weight in counter.parameters():
        weight.data = torch.rand_like(weight)
    for regions in (1, 9, 10, 30):
        corner = torch.rand(3, regions, 2) / 2
        boxes = torch.cat([corner, corner + torch.rand(3, regions, 2) / 2], dim=2)
        attention = torch.randn(3, regions)
        attention[0, regions // 2 :] = -torch.inf
        torch.testing.assert_close(OnnxCounter(counter)(attention, boxes), counter(attention, boxes))


TEXTS = st.lists(st.text(st.sampled_from("abcdn'ts  DONT?é_9-"), max_size=30) | st.text(max_size=20), min_size=1)


@settings(max_examples=60)
@given(TEXTS, TEXTS, st.integers(1, 12))
def test_questions_become_the_numbers_that_a_run_reads(texts, others, length):
    vocabulary = build_vocabulary(texts)
    lexicon = Lexicon(vocabulary, frozenset(vocabulary.words[2::2]), AnswerList(("yes", "no")))
    asked = [*texts, *others]
    questions = Questions([str(n) for n in range(len(asked))], ["i"] * len(asked), asked, [()] * len(asked))
    expected = number_questions(questions, lexicon, {}, question_len=length, num_stat_word=1, topk=1)
    other = object.__new__(script("answer.py")["Answerer"])
    other.number_of, other.entities = vocabulary.number_of, lexicon.entities
    other.config = {
        "question": {"pattern": WORD.pattern, "words": length, "entities": MOST_ENTITIES},
        "regions": None,
    }
    seen: list[dict[str, Any]] = []
    other.session = SimpleNamespace(run=lambda names, feed: [seen.append(feed)])
    other.answer(asked)
    for name, rows in (("words", expected.words_QN), ("entities", expected.entities_QE)):
        found = seen[0][name]
        np.testing.assert_array_equal(found, rows[:, : found.shape[1]])
        assert not rows[:, found.shape[1] :].any()


F32 = np.float32
FEATURES, BOXES = np.arange(6, dtype=F32).reshape(3, 2), np.array([[0, 0, 0.5, 0.5]] * 3, F32)
FILES: dict[str, dict[str, Any]] = {
    "shares": {"features": FEATURES, "boxes": BOXES},
    "pixels": {"features": FEATURES, "boxes": BOXES * [30, 20, 30, 20], "width": 30, "height": 20},
    "other names": {"x": FEATURES, "bbox": BOXES * [30, 20, 30, 20], "image_w": 30, "image_h": 20},
    "a little outside": {"features": FEATURES, "boxes": BOXES * 2.03},
    "none": {"features": FEATURES[:0], "boxes": BOXES[:0]},
}
DAMAGED: dict[str, dict[str, Any]] = {
    "far outside": {"features": FEATURES, "boxes": BOXES * 3},
    "turned": {"features": FEATURES, "boxes": BOXES[:, ::-1]},
    "not finite": {"features": FEATURES * np.nan, "boxes": BOXES},
    "boxes not finite": {"features": FEATURES, "boxes": BOXES * np.nan},
    "other numbers": {"features": FEATURES, "boxes": BOXES[:2]},
    "no boxes": {"features": FEATURES},
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_regions_are_read_as_a_run_reads_them(name, tmp_path):
    np.savez(tmp_path / "1.npz", **FILES[name])
    for found, expected in zip(
        script("answer.py")["read_regions"](tmp_path / "1.npz"), NpzRegions(tmp_path).read("1"), strict=True
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", DAMAGED)
def test_files_of_regions_that_a_run_refuses_are_refused(name, tmp_path):
    np.savez(tmp_path / "1.npz", **DAMAGED[name])
    with pytest.raises(ValueError, match=r"1\.npz"):
        NpzRegions(tmp_path)
    with pytest.raises(AssertionError, match=" "):
        script("answer.py")["read_regions"](tmp_path / "1.npz")
