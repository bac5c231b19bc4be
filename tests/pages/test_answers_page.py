"""The page of a run of main.py, against run folders written by hand."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_runs import HOSTILE, Page, change, page_of, undraw
from PIL import Image
from refusals import refusal

from drawing import figures
from pages import answers_page, question_cards
from pages.report import write_report

ANSWERS = ["yes", "no", "2", "red", "white", "other"]
COUNTS = [
    [80, 12, 1, 0, 2, 5],
    [20, 60, 0, 0, 0, 5],
    [3, 4, 30, 0, 0, 3],
    [0, 1, 0, 15, 5, 4],
    [0, 0, 0, 6, 20, 4],
    [0, 0, 0, 0, 0, 0],
]
GQA = {"binary": 0.75, "open": 0.5, "consistency": 0.875, "validity": None, "distribution": 1.5}
LONG = "w" * 10_000


def kind(accuracy: float, questions: int, room: float | None = 0.05) -> dict[str, Any]:
    """What results.json holds of a kind of questions."""
    ends = [] if room is None else [max(accuracy - room, 0), min(accuracy + room, 1)]
    floors = {} if room is None else {"question only": 0.125, "most frequent answer": 0.25}
    return {"accuracy": accuracy, "questions": questions, "interval": ends, "floors": floors}


def write_answers_run(folder: Path, **results: Any) -> Path:
    """A finished run: three epochs, two groupings of questions, four questions on one image as examples."""
    folder.mkdir(parents=True)
    epochs = {"epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.5], "val_loss": [2.8, 2.2, 2.4], "grad_norm": 0.5, "lr": 3e-4}
    epochs |= {"data_wait": 0.25, "val_accuracy": [0.4, 0.6, 0.55], "images_per_s": 1250.0, "seconds": 1.5}
    pd.DataFrame(epochs).to_csv(folder / "metrics.csv", index=False)
    config = {"dataset": "VQA", "demo": False, "features": "clip", "branches": "fine", "lr": 3e-4, "seed": 1204}
    provenance = {"versions": {"python": "3.11.7"}, "git_revision": "abc123", "machine": "a machine"}
    (folder / "config.json").write_text(json.dumps({**config, "provenance": provenance}))
    numbers = {"best_epoch": 2, "epochs": 3, "seconds": 12.0, "fold": "test", "answers": 3129, "ceiling": 0.97}
    words: dict[str, list[Any]] = {"notes": [], "advice": [], "diagnosis": [], "resumed": []}
    found = {
        "program": "vqa",
        "measures": {"accuracy": 0.61, "loss": 2.25},
        "val": {"accuracy": 0.6, "loss": 2.2},
        "interval": [0.58, 0.64],
        "by_kind": {
            "answer type": {"yes/no": kind(0.8, 1200), "number": kind(0.35, 300), "other": kind(0.5, 1500)},
            "words": {"10": kind(0.5, 40, None), "4": kind(0.7, 2000), "5": kind(0.6, 960)},
        },
        "branches": {},
        "floors": {"most frequent answer": 0.2, "shuffled image": 0.31, "question only": 0.3},
        "confusion": {"answers": ANSWERS, "counts": COUNTS},
        "data": {"train": {"questions": 9000, "images": 3000}, "test": {"questions": 3000, "images": 1000}},
    }
    (folder / "results.json").write_text(json.dumps(found | numbers | words | results))
    write_examples(folder)
    return folder


def write_examples(folder: Path) -> None:
    """Four questions, two of them answered badly, on an image beside the run with twenty regions."""
    path = folder.parent / "image.jpg"
    right, down = np.meshgrid(np.linspace(0, 255, 400), np.linspace(0, 255, 200))
    Image.fromarray(np.stack([right, np.full_like(right, 90), down], axis=2).astype(np.uint8)).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rng = np.random.default_rng(0)
    corners, weights = rng.uniform(0, 0.6, (20, 2)).round(3), rng.dirichlet(np.full(20, 0.5)).round(4)
    likely = [["tree", 0.625], ["wall", 0.25], ["house", 0.1], ["car", 0.02], ["sky", 0.001], ["sea", 0.0]]
    examples = []
    for number, (thing, accuracy) in enumerate(
        (("dog", 0.0), ("boy on the left of the bus", 1.0), ("cat", 0.3), ("car", 0.9))
    ):
        example = {
            "id": f"id{number}",
            "image": str(path),
            "digest": digest,
            "question": f"What is behind the {thing}?",
        }
        example |= {"answer": ["tree", "trees", "bush"], "prediction": likely, "accuracy": accuracy}
        example |= {"boxes": [[x, y, x + 0.35, y + 0.3] for x, y in corners.tolist()], "weights": weights.tolist()}
        examples.append(example)
    (folder / "examples.json").write_text(json.dumps(examples))


def change_examples(folder: Path, edit: Callable[[list[Any]], Any]) -> None:
    """Edit examples.json; `edit` may change the list, or return something else."""
    path = folder / "examples.json"
    found = json.loads(path.read_text())
    changed = edit(found)
    path.write_text(json.dumps(found if changed is None else changed))


def make_hostile(run: Path) -> Path:
    """The same run, whose texts are now out to break the page."""

    def spoil(results: dict[str, Any]) -> None:
        results["by_kind"] = {HOSTILE: {HOSTILE: kind(0.5, 3), LONG: kind(0.5, 3), "": kind(0.5, 3)}, LONG: {}}
        results["floors"] = {HOSTILE: 0.5, LONG: 0.25, "": 0.1}
        results["measures"][HOSTILE] = results["measures"][LONG] = 0.5
        results["confusion"]["answers"] = [HOSTILE, LONG, "", "\u202e\0", "$x_{$", HOSTILE + "w"]
        results["data"] |= {HOSTILE: {"questions": 3, "images": 2}, LONG: {"questions": 3, "images": 2}}
        results |= {"notes": [HOSTILE, {HOSTILE: LONG}], "advice": [{"flag": HOSTILE, "value": LONG, "why": HOSTILE}]}
        results |= {"defaults": {HOSTILE: HOSTILE}, "resumed": [HOSTILE]}

    def spoil_example(examples: list[dict[str, Any]]) -> None:
        for example, text in zip(examples, (HOSTILE, LONG, "\0\x1b[31m\u202e", ""), strict=True):
            example |= {"id": text, "question": text, "answer": [text] * 50, "prediction": [[text, 1e300]] * 50}
        examples[0] |= {"image": HOSTILE, "digest": HOSTILE}
        examples[1] |= {"image": "/dev/zero"}
        examples[2] |= {"boxes": [[-1e300, 3, 1e300, -3], [1, 1, 0, 0], [-9, -9, 9, 9]], "weights": [1, 1, 1e300]}
        examples[3] |= {"weights": [-1.0] * 20}
        objects = [{"name": HOSTILE, "attributes": [LONG, HOSTILE], "box": [-1e300, 3, 1e300, -3], "weight": 1e300}]
        objects.append({"name": "\0\u202e", "attributes": [], "box": [1, 1, 0, 0], "weight": -1.0})
        relations = [[one, text, other] for one in (0, 1) for other in (0, 1) for text in (HOSTILE, LONG, "")]
        examples[2] |= {"graph": {"objects": objects * 50, "relations": relations * 50}}

    change(run, "results.json", spoil)
    change_examples(run, spoil_example)
    change(run, "config.json", lambda config: config.update({HOSTILE: LONG, LONG: HOSTILE, "features": HOSTILE}))
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run."""
    return write_answers_run(tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """For tests of words alone."""
    undraw(monkeypatch)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, Page]:
    """A finished run's folder, and its page with all pictures."""
    folder = write_answers_run(tmp_path_factory.mktemp("drawn") / "run")
    return folder, page_of(folder)


def sections(page: Page) -> list[str]:
    """The parts of a page that have a name."""
    return [str(attrs["id"]) for attrs in page.of("section") if "id" in attrs]


def test_the_page_says_what_the_files_hold(drawn):
    _, page = drawn
    assert page.tables["accuracy beside the floors"][1:] == [
        ["trained model", "61.0%", "58.0 … 64.0%", "–"],
        ["ceiling", "97.0%", "–", "−36.0"],
        ["shuffled image", "31.0%", "–", "+30.0"],
        ["question only", "30.0%", "–", "+31.0"],
        ["most frequent answer", "20.0%", "–", "+41.0"],
    ]
    assert page.tables["accuracy by answer type"][1:] == [
        ["other", "1,500", "50.0%", "45.0 … 55.0%", "25.0%"],
        ["yes/no", "1,200", "80.0%", "75.0 … 85.0%", "25.0%"],
        ["number", "300", "35.0%", "30.0 … 40.0%", "25.0%"],
    ]
    assert [row[0] for row in page.tables["accuracy by words"][1:]] == ["4", "5", "10"]
    assert page.tables["accuracy by words"][3] == ["10", "40", "50.0%", "–", "–"]
    assert page.tables["confusions"][:2] == [["people said", *ANSWERS], ["yes", "80", "12", "1", "0", "2", "5"]]
    assert page.tables["folds"][1:] == [["train", "9,000", "3,000"], ["test", "3,000", "1,000"]]
    assert ["features", "clip"] in page.tables["options"]
    assert ["git revision", "abc123"] in page.tables["provenance"]
    assert ["questions a second (median)", "1,250"] in page.tables["time"]
    assert not any("images a second" in row[0] for row in page.tables["time"])
    for words in (
        "95 %: 58.0 … 64.0% 3,000 questions about 1,000 images",
        "+30.0 points 31.0% by the best floor, shuffled image",
        "2 of 3 validation accuracy 60.0%",
        "the best of the 3,129 answers in the list",
    ):
        assert words in page.text
    assert sections(page) == [
        *("results", "kinds", "training", "confusion", "questions", "data", "options", "provenance")
    ]
    assert not any(attrs.get("class") == "notice" for attrs in page.of("p"))


def test_every_link_of_a_page_leads_to_a_part_of_it(drawn):
    _, page = drawn
    assert [str(link["href"]) for link in page.of("a")] == [f"#{name}" for name in sections(page)]


def test_pictures_are_also_png_files_and_take_the_colours_of_the_page(drawn):
    run, page = drawn
    names = {path.stem for path in (run / "figures").iterdir()}
    assert names == {
        *("floors", "kinds-answer-type", "kinds-words", "accuracy", "loss", "learning-rate", "gradient-norm"),
        "confusion",
    }
    assert len(page.of("figcaption")) == len(names)
    for figure in re.findall(r"<figure>.*?</figure>", page.source, re.DOTALL):
        assert not re.findall(r"#[0-9a-f]{6}\b", figure) and "currentColor" in figure


@pytest.mark.usefixtures("undrawn")
def test_the_command_of_a_run_is_shown_as_it_is_told(tmp_path):
    folder = write_answers_run(tmp_path / "run")
    assert "<p>The same run again: <code>–</code></p>" in page_of(folder).source  # of an older version
    change(folder, "results.json", lambda results: results.update(command="python main.py --data_root 'a <b>'"))
    (command,) = re.findall(r"<code>(python main.py .*?)</code>", page_of(folder).source)
    assert html.unescape(command) == "python main.py --data_root 'a <b>'"


@pytest.mark.usefixtures("undrawn")
def test_what_only_some_runs_tell_is_shown(run):
    found = {"finding": "asks no image", "evidence": "loss rose", "proposal": "stop early", "command": "python x"}
    advice = {"flag": "--lr", "value": 3e-5, "recommended": "1e-3", "why": "heads <b>only</b>", "change": "--lr 1e-3"}
    more = {"measures": {"accuracy": 0.61, "loss": None, **GQA}, "defaults": {"lr": 2.8e-4, "seed": 1204}}
    more |= {"notes": ["one", "<b>two</b>"], "advice": [advice], "diagnosis": [found], "resumed": [{"epoch": 1}]}
    change(run, "results.json", lambda results: results.update(more))
    change(run, "metrics.csv", lambda table: table.assign(loss_a=1.0, loss_b=2.0, val_loss_a=3.0))
    page = page_of(run)
    assert [[row[0], row[2]] for row in page.tables["further measures"][1:]] == [
        ["binary", "75.0%"],
        ["open", "50.0%"],
        ["consistency", "87.5%"],
        ["validity", "–"],
        ["distribution", "1.500"],
    ]
    assert page.tables["options that differ from the defaults"][1:] == [["lr", "0.0003", "0.00028"]]
    assert ["seed", "1204"] in page.tables["other options"] and "options" not in page.tables
    assert ["interrupted and gone on with", "1 time"] in page.tables["time"]
    for words in ("asks no image", "stop early", "--lr is 3e-05, recommended 1e-3", "heads <b>only</b>"):
        assert words in page.text
    assert sum(attrs.get("class") == "notice" for attrs in page.of("p")) == 2
    assert (run / "figures" / "loss-parts.png").exists() and "remarks" in sections(page)


@pytest.mark.usefixtures("undrawn")
def test_parts_that_are_empty_are_not_shown(run):
    empty = {"floors": {}, "by_kind": {"words": {}}, "confusion": {"answers": [], "counts": []}, "data": {}}
    empty |= {"interval": None, "best_epoch": 0, "notes": None, "advice": None, "diagnosis": None, "resumed": None}
    change(run, "results.json", lambda results: results.update(empty))
    change(run, "metrics.csv", lambda table: table.iloc[:0])
    (run / "examples.json").unlink()
    page = page_of(run)
    assert sections(page) == ["results", "options", "provenance"] and not page.of("figcaption")
    assert [str(link["href"]) for link in page.of("a")] == ["#results", "#options", "#provenance"]
    assert "untrained: none of 3 epochs was better" in page.text
    assert not any(
        word in page.text for word in ("floor", "95 %: ", "further", "not found", "best of the 3,129 answers, ")
    )


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_a_test_fold_shows_its_validation_fold(run):
    change(run, "results.json", lambda results: results.update(fold="val"))
    page = page_of(run)
    assert "Accuracy, validation fold" in page.text and "which also picked the epoch" in page.text


@pytest.mark.usefixtures("undrawn")
def test_two_pages_of_one_folder_are_the_same(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


# -- single questions


def test_cards_show_questions_answers_and_what_was_predicted(drawn):
    _, page = drawn
    asked = re.findall(r"What is behind the [^?]*\?", re.sub(r'aria-label="[^"]*"', "", page.source))
    assert [words.split()[-1] for words in asked] == ["dog?", "cat?", "bus?", "car?"]
    assert "What is behind the dog? People: tree, trees, bush tree 62.5% wall 25.0% house 10.0%" in page.text
    assert page.text.count("sky 0.1%") == 4 and "sea" not in page.text
    assert "accuracy 30.0%, question id2 Answered well" in page.text


def test_the_strongest_regions_are_drawn_where_they_are(drawn):
    run, page = drawn
    example = json.loads((run / "examples.json").read_text())[0]
    order = np.argsort(-np.array(example["weights"]))[: question_cards.MAX_BOXES][::-1]
    (card, *_) = re.findall(r'<svg role="img" aria-label="image of.*?</svg>', page.source, re.DOTALL)
    assert 'viewBox="0 0 160 80"' in card and card.count("data:image/jpeg;base64,") == 1
    shown = [float(text) for text in re.findall(r'<g opacity="([\d.]+)"', card)]
    weights = np.array(example["weights"])[order]
    assert shown == pytest.approx(weights / weights[-1], abs=1e-3) and shown[-1] == 1
    x, y, right, bottom = np.array(example["boxes"][order[-1]]).clip(0, 1) * [160, 80, 160, 80]
    last = re.findall(r'class="box" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', card)[-1]
    assert [float(text) for text in last] == pytest.approx([x, y, right - x, bottom - y], abs=0.051)
    assert f"{100 * weights[-1]:.1f}% of the attention" in card


GRAPH = {
    "objects": [
        {"name": "tree", "attributes": ["tall", "green"], "box": [0, 0, 0.25, 0.5], "weight": 0.75},
        {"name": "wall", "attributes": [], "box": [0.5, 0, 1, 0.5], "weight": 0.25},
    ],
    "relations": [[0, "to the left of", 1], [0, "near", 1], [1, "to the right of", 0]],
}


@pytest.mark.usefixtures("undrawn")
def test_the_objects_that_an_answer_rests_on_are_drawn_with_their_relations(run):
    change_examples(run, lambda examples: examples[0].update(graph=GRAPH))
    page = page_of(run)
    assert "Rests on 1 tree, tall, green 75.0%; 2 wall 25.0% where 1 to the left of 2 , 1 near 2" in page.text
    (card,) = re.findall(r'<svg role="img" aria-label="objects chosen.*?</svg>', page.source, re.DOTALL)
    assert 'viewBox="0 0 800 400"' in card and card.count("data:image/jpeg;base64,") == 1
    boxes = re.findall(
        r'class="object" stroke="rgb\(([\d, ]+)\)" x="([^"]+)" y="([^"]+)" width="([^"]+)" height="([^"]+)"', card
    )
    assert [tuple(map(float, box[1:])) for box in boxes] == [(400, 0, 400, 200), (0, 0, 200, 200)]  # heaviest on top
    light, heavy = (sum(map(int, box[0].split(","))) for box in boxes)
    assert heavy < light
    assert re.findall(r'class="arrow" d="([^"]+)" marker-end="url\(#head\)"/>', card) == ["M200.0 100.0 400.0 100.0"]
    assert re.findall(r">(\d)</text>", card) == ["1", "2"]
    assert 'id="head"' in page.source and "On the second image are the objects" in page.text
    assert page.source.count("objects chosen for") == 1  # the other questions have no graph


@pytest.mark.usefixtures("undrawn")
def test_a_graph_is_drawn_alone_where_no_region_is_looked_at_and_told_where_no_image_is(run):
    change_examples(
        run,
        lambda examples: [
            {**examples[0], "boxes": [], "weights": [], "graph": GRAPH},
            {**examples[1], "image": "", "graph": GRAPH},
            {**examples[2], "graph": {"objects": [], "relations": []}},
        ],
    )
    page = page_of(run)
    assert page.source.count('aria-label="image of') == 1 and page.source.count('aria-label="objects chosen') == 1
    assert page.text.count("Rests on 1 tree") == 2 and page.text.count("image not found") == 1


@pytest.mark.usefixtures("undrawn")
def test_an_image_that_is_not_the_one_that_was_asked_about_is_not_found(run, tmp_path):
    def spoil(examples: list[dict[str, Any]]) -> None:
        (tmp_path / "text").write_bytes(b"no image")
        examples[0]["image"] = ""
        examples[1]["image"] = str(tmp_path / "absent")
        examples[2]["digest"] = "0" * 64
        examples[3] |= {"image": str(tmp_path / "text"), "digest": hashlib.sha256(b"no image").hexdigest()}

    change_examples(run, spoil)
    page = page_of(run)
    assert page.text.count("image not found") == 4 and not page.of("image") and not page.of("g")


@pytest.mark.usefixtures("undrawn")
def test_no_more_is_shown_of_very_much_than_can_be_looked_at(run):
    change_examples(run, lambda examples: examples * 100)
    names = [f"n{i}" for i in range(40)]
    many = {"confusion": {"answers": names, "counts": np.ones((40, 40), int).tolist()}}
    many["by_kind"] = {name: {other: kind(0.5, 3) for other in names} for name in names}
    change(run, "results.json", lambda results: results.update(many))
    page = page_of(run)
    assert len(page.of("h4")) == 2 * question_cards.MAX_CARDS
    assert len(page.tables["confusions"]) == 2 + answers_page.MAX_CONFUSED
    assert page.tables["confusions"][1] == ["n0", *["1"] * 20, "20"]
    assert page.tables["confusions"][-1] == ["n39", *["20"] * 20, "400"]
    assert sum(name.startswith("accuracy by ") for name in page.tables) == answers_page.MAX_GROUPINGS


# -- files that somebody else may have written


def test_hostile_text_is_escaped_and_clipped(run, monkeypatch):
    monkeypatch.setattr(figures, "to_png", lambda *_: b"")
    page = page_of(make_hostile(run))
    assert "<script" not in page.source and not page.of("script") and "<img" not in page.source
    assert "w" * 1001 not in page.source and "&lt;script&gt;" in page.source
    assert not re.findall(r"[\0-\x09\x0b-\x1f\x7f]", page.source)
    assert page.text.count("image not found") == 2 and len(page.source) < 300_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", None, "no run folder, config.json is missing"),
        ("metrics.csv", None, "unfinished run, metrics.csv is missing"),
        ("metrics.csv", "epoch,loss\n1,abc\n", "metrics.csv: cannot be read"),
        ("results.json", '{"program": "vqa"', "results.json: cannot be read"),
        ("results.json", '{"program": "vqa"}', "results.json: it has no 'best_epoch'"),
        ("results.json", '{"program": "vqa", "seconds": NaN}', "not a finite number"),
        ("examples.json", "{}", "examples.json: is no list"),
        ("examples.json", "[{]", "examples.json: cannot be read"),
        ("examples.json", "[" * 100_000, "examples.json: cannot be read"),
        ("examples.json", '[{"id": 1}]', "examples.json: '0' has no 'image'"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(run, name, content, said):
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    assert said in refusal(write_report, run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"best_epoch": "2"}, "'best_epoch' is no number"),
        ({"fold": "train"}, "'fold' is neither 'test' nor 'val'"),
        ({"measures": {"accuracy": 61.0}}, "'measures.accuracy' is not within 0 and 1"),
        ({"measures": {"accuracy": None}}, "'measures.accuracy' is no number"),
        ({"interval": [0.5]}, "'interval' is no list of 2"),
        ({"interval": [0.5, 64.0]}, "'interval.1' is not within 0 and 1"),
        ({"by_kind": {"a": {"b": {"accuracy": 0.5}}}}, "'by_kind.a.b' has no 'questions'"),
        ({"by_kind": {"a": {"b": {**kind(0.5, 3), "interval": "x"}}}}, "'by_kind.a.b.interval' is no list of 2"),
        ({"by_kind": {"a": {"b": {**kind(0.5, 3), "interval": [-1, 1]}}}}, "'by_kind.a.b.interval.0' is not within"),
        ({"by_kind": {"a": {"b": {**kind(0.5, 3), "floors": 1}}}}, "'by_kind.a.b.floors' is no object"),
        ({"floors": {"a": "x"}}, "'floors.a' is no number"),
        ({"floors": {"a": 31.0}}, "'floors.a' is not within 0 and 1"),
        ({"confusion": {"answers": ["a", "b"], "counts": [[1, 2]]}}, "'confusion.counts' is no list of 2"),
        ({"confusion": {"answers": ["a"], "counts": [["x"]]}}, "'confusion.counts.0.0' is no number"),
        ({"data": {"train": 3}}, "'data.train' is no object"),
    ],
)
def test_parts_of_another_shape_are_refused_by_name(run, edit, said):
    change(run, "results.json", lambda results: results.update(edit))
    assert f"{run / 'results.json'}: {said}" in refusal(write_report, run)


def with_object(**changes: Any) -> dict[str, Any]:
    return {"objects": [{**GRAPH["objects"][0], **changes}], "relations": []}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"prediction": [["a"]]}, "'0.prediction.0' is no answer with its probability"),
        ({"prediction": [[0.5, "a"]]}, "'0.prediction.0' is no answer with its probability"),
        ({"prediction": ["ab"]}, "'0.prediction.0' is of another kind"),
        ({"accuracy": 90.0}, "'0.accuracy' is not within 0 and 1"),
        ({"weights": [1.0]}, "'0.weights' is no list of 20"),
        ({"boxes": [[0, 0, 1]], "weights": [1]}, "'0.boxes.0' is no list of 4"),
        ({"answer": [1]}, "'0.answer.0' is of another kind"),
        ({"graph": [1]}, "'0.graph' is no object"),
        ({"graph": {"objects": []}}, "'0.graph' has no 'relations'"),
        ({"graph": {"objects": [{"name": "a"}], "relations": []}}, "'0.graph.objects.0' has no 'attributes'"),
        ({"graph": with_object(box=[0, 1])}, "'0.graph.objects.0.box' is no list of 4"),
        ({"graph": with_object(attributes=[3])}, "'0.graph.objects.0.0' is of another kind"),
        *(
            ({"graph": {**GRAPH, "relations": [relation]}}, "'0.graph.relations.0' does not lead from an object to one")
            for relation in ([0, "near"], [0, 1, 1], [0, "near", 2], [-1, "near", 0], [True, "near", 0], [0.0, "a", 1])
        ),
    ],
)
def test_examples_of_another_shape_are_refused_by_name(run, edit, said):
    change_examples(run, lambda examples: examples[0].update(edit))
    assert f"{run / 'examples.json'}: {said}" in refusal(write_report, run)


def places_in(part: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every part of a JSON value."""
    keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else []
    return [found for key in keys for found in ((*place, key), *places_in(part[key], (*place, key)))]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["results.json", "examples.json"])
def test_no_damage_to_a_file_is_worse_than_one_line(run, name):
    """Every part in turn is taken away or is something else: the page is written, or the file is named."""
    change_examples(run, lambda examples: [{**examples[0], "boxes": [[0, 0, 1, 1]], "weights": [1], "graph": GRAPH}])
    small = {
        "confusion": {"answers": ["yes", "no"], "counts": [[2, 1], [0, 3]]},
        "by_kind": {"words": {"4": kind(0.7, 5)}},
    }
    change(run, "results.json", lambda results: results.update(small))
    whole = (run / name).read_text()
    refusals = 0
    for place in places_in(json.loads(whole)):
        for other in ("x", None, [], 1e308, -1, True, "absent"):
            found = json.loads(whole)
            part = found
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = other
            if other == "absent":
                del part[place[-1]]
            if name == "results.json" and found.get("program") != "vqa":
                continue
            (run / name).write_text(json.dumps(found))
            said = str(run / name)
            try:
                write_report(run)
            except ValueError as error:
                refusals += 1
                said = str(error)
            assert said.startswith(str(run / name)) and "\n" not in said, (place, other)
    assert refusals > 50


@pytest.mark.slow
@pytest.mark.parametrize("is_hostile", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_page_stays_harmless_and_in_its_screen(browser, run, is_hostile, width):
    page = write_report(make_hostile(run) if is_hostile else run)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme="dark")
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(page.as_uri())
    wide = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert (tab.title(), wide <= 0, said) == ("run", True, [])
    context.close()


# -- pictures


def test_a_heat_map_is_fuller_where_shares_are_larger():
    with figures.style():
        ax = figures.heat_map(["a", "b" * 40], np.array([[1.0, 0.0], [0.25, 0.75]]), "x", "y").axes[0]
    alphas = {tuple(cell.get_xy()): cell.get_alpha() for cell in ax.patches}
    full = figures.DARKEST
    assert alphas == {(-0.5, -0.5): full, (-0.5, 0.5): 0.25 * full, (0.5, 0.5): 0.75 * full}
    assert [text.get_text() for text in ax.texts] == ["100", "25", "75"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b" * 13 + "…"] and ax.get_ylim() == (1.5, -0.5)


def test_a_large_heat_map_has_no_numbers():
    with figures.style():
        ax = figures.heat_map([str(i) for i in range(21)], np.eye(21), "x", "y").axes[0]
    assert len(ax.patches) == 21 and not ax.texts
