"""--mode ask --explain: what an answer rests on, printed and drawn; grounding; and real scene graphs of GQA."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_vqa import (
    ONE_GRAPH,
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

import main
from vqa.scene_graph import subgraph

GRAPH = ["--branches", "graph", "--sg_source", "gt", *ONE_GRAPH, "--epochs", "1"]
MINE = Image.new("RGB", (40, 30), (90, 120, 150))


@cache
def both() -> Path:
    """The folder of a run of both branches. Read it, do not change it."""
    flags = ["--branches", "fine,graph", "--sg_source", "gt", *ONE_GRAPH, "--epochs", "1"]
    return tiny_run(Path(mkdtemp(prefix="vqa-")) / "both", *flags)


@cache
def graph_alone() -> Path:
    """The folder of a run of the graph branch. Read it, do not change it."""
    return tiny_run(Path(mkdtemp(prefix="vqa-")) / "graph", *GRAPH)


def true_graphs() -> list[str]:
    return ["--sg_source", "gt", "--scene_graphs", str(drawn_set("GQA") / "sceneGraphs")]


def ask(run: Path, image: Path | str, *flags: str, question: str = "What is to the left of the star?") -> list[str]:
    asked = ["--mode", "ask", "--checkpoint", str(run), "--image", str(image), "--question", question]
    return [*asked, "--explain", *flags]


def drawn_image(number: str = "31") -> Path:
    return drawn_set("GQA") / "images" / f"{number}.jpg"


def test_objects_relations_and_regions_are_printed_and_drawn(tmp_path, monkeypatch, capsys):
    """As examples.json has them of the same question."""
    monkeypatch.chdir(tmp_path)
    example = next(one for one in read(both() / "examples.json") if one["graph"]["relations"])
    image = Path(example["image"])
    flags = ["--features", str(drawn_features("GQA")), *true_graphs()]
    capsys.readouterr()
    found = main.main(ask(both(), image, *flags, question=example["question"]))
    assert list(found) == [answer for answer, _ in example["prediction"]]
    out = capsys.readouterr().out
    names = [f"{number} {one['name']}" for number, one in enumerate(example["graph"]["objects"], start=1)]
    for one, name in zip(example["graph"]["objects"], names, strict=True):
        assert f"{one['weight']:5.3f}  {', '.join([name, *one['attributes']])}\n" in out
    for source, name, target in example["graph"]["relations"]:
        assert f"{names[source]} -> {name} -> {names[target]}\n" in out
    regions = [float(text) for text in re.findall(r"^(?:regions   |          )([\d.]+)  \d+ to ", out, re.MULTILINE)]
    assert regions == pytest.approx(sorted(example["weights"], reverse=True)[:8], abs=6e-4)
    assert "note      --sg_source gt: people drew these scene graphs, which give answers away" in out
    assert out.endswith(f"picture   {image.stem}-explained.png\n")
    with Image.open(f"{image.stem}-explained.png") as picture:
        assert picture.width > 2 * 700 and picture.height > 700  # two panels in a row


def test_weights_are_those_of_a_graph_of_its_own():
    """Each chosen object of examples.json is one of the image's scene graph, with that one's box, and k are chosen."""
    graphs = read(drawn_set("GQA") / "sceneGraphs" / "val_sceneGraphs.json")
    for example in read(both() / "examples.json"):
        graph = graphs[Path(example["image"]).stem]
        whole = subgraph(graph, [1.0] * len(graph["objects"]), 99)["objects"]
        objects = [{**one, "weight": 1.0} for one in example["graph"]["objects"]]
        assert len(objects) == min(2, len(whole)) and all(one in whole for one in objects)
        assert sum(one["weight"] for one in example["graph"]["objects"]) == pytest.approx(1, abs=1e-5)


def test_a_run_without_a_graph_shows_its_attention(tmp_path, capsys):
    path = tmp_path / "deep" / "picture.png"
    flags = ["--features", str(drawn_features("GQA")), "--output", str(path)]
    argv = ask(finished("GQA"), drawn_image(), *flags)
    capsys.readouterr()
    main.main(argv)
    out = capsys.readouterr().out
    assert "regions   " in out and "objects" not in out and out.endswith(f"picture   {path}\n")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and max(picture.size) < 1000


def test_a_run_by_clip_explains_any_image(tmp_path, capsys):
    MINE.save(tmp_path / "mine.png")
    flags = ["--cache_dir", str(tmp_path / "cache"), "--output", str(tmp_path / "out.png")]
    main.main(ask(finished_by_clip(), tmp_path / "mine.png", *flags))
    assert "% of the width" in capsys.readouterr().out and (tmp_path / "out.png").is_file()


def test_an_image_that_is_not_there_is_drawn_empty_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "30.jpg").write_text("no image")
    for name, reason in (("31.jpg", "No such file"), ("30.jpg", "not an image")):
        main.main(ask(graph_alone(), name, *true_graphs()))
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"picture   {name[:2]}-explained.png, on an empty canvas (") and reason in last
        size = read(drawn_set("GQA") / "sceneGraphs" / "val_sceneGraphs.json")[name[:2]]
        with Image.open(f"{name[:2]}-explained.png") as picture:
            assert picture.getpixel((436, 400)) != (255, 255, 255)
            assert picture.width == round(800 * size["width"] / max(size["width"], size["height"])) + 72


def test_what_cannot_be_explained_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    MINE.save("elsewhere.png")
    folder = drawn_set("GQA") / "sceneGraphs"
    alone, there = graph_alone(), drawn_image()
    with_output = ["--output", "a.jpg"]
    for argv, said in (
        (ask(alone, there), "--explain: needs the scene graph of the image; name the folder of one by --sg_source"),
        (ask(alone, "elsewhere.png", *true_graphs()), f"--explain: {folder} has no scene graph of image 'elsewhere'"),
        (ask(alone, "nowhere.png", *true_graphs()), "--image nowhere.png: there is no such file"),
        (ask(finished_without_images(), "elsewhere.png"), "--explain: this run looks at no region or object"),
        (ask(alone, there, *true_graphs(), *with_output), "--output a.jpg: --explain draws a PNG"),
        ([*ask(alone, there)[:-1], *with_output], "--output a.jpg: --mode ask writes only what --explain draws"),
        (["--demo", "--explain"], "--explain: belongs to --mode ask"),
    ):
        assert said in error_of(*argv, capsys=capsys)
    Path("31-explained.png").write_text("mine")
    error = error_of(*ask(graph_alone(), drawn_image(), *true_graphs()), capsys=capsys)
    assert error == "error: --output 31-explained.png: is there already; name another, or pass --overwrite\n"
    assert Path("31-explained.png").read_text() == "mine"
    main.main(ask(graph_alone(), drawn_image(), *true_graphs(), "--overwrite"))
    assert Path("31-explained.png").read_bytes()[:4] == b"\x89PNG"


def test_names_from_a_file_reach_no_terminal_as_commands(tmp_path, capsys):
    graphs = read(drawn_set("GQA") / "sceneGraphs" / "val_sceneGraphs.json")
    for one in graphs["31"]["objects"].values():
        one |= {"name": "\x1b[31mred\x9b\n\ud800", "attributes": ["\x07" + "a" * 10**5]}
        one["relations"] = [{"name": "\x1b]0;by\x07\nline", "object": other} for other in graphs["31"]["objects"]]
    (tmp_path / "sceneGraphs.json").write_text(json.dumps(graphs))
    flags = ["--sg_source", "gt", "--scene_graphs", str(tmp_path), "--output", str(tmp_path / "a.png")]
    main.main(ask(graph_alone(), drawn_image(), *flags))
    out = capsys.readouterr().out
    assert r"1 \x1b[31mred\x9b \ud800" in out and r"\x1b]0;by\x07 line" in out
    assert not set(out) & set("\x1b\x9b\x07\ud800") and len(out) < 6000


# grounding


def naive_grounding(example: dict[str, Any], named: list[list[float]], boxes: list, weights: list) -> float:
    """From the definition, by points: how much of the attention is on what is named, each box spread over points."""
    total = 0.0
    for (x1, y1, x2, y2), weight in zip(boxes, weights, strict=True):
        x, y = ((np.arange(100) + 0.5) / 100 * (high - low) + low for low, high in ((x1, x2), (y1, y2)))
        inside = np.zeros((100, 100), dtype=bool)
        for left, top, right, bottom in named:
            inside |= ((left <= x) & (x < right))[:, None] & ((top <= y) & (y < bottom))[None]
        total += weight * inside.mean()
    return total


def test_grounding_is_that_of_a_naive_count(tmp_path, monkeypatch):
    """Over all questions of the test fold, of which examples.json is made to tell."""
    monkeypatch.setattr("answering.outcome.NUM_EXAMPLES", 10_000)
    run = tiny_run(tmp_path / "run", "--branches", "fine,graph", "--sg_source", "gt", *ONE_GRAPH, "--epochs", "1")
    examples = {one["id"]: one for one in read(run / "examples.json")}
    records = read(drawn_set("GQA") / "questions" / "val_all_questions.json")
    graphs = read(drawn_set("GQA") / "sceneGraphs" / "val_sceneGraphs.json")
    assert examples.keys() == set(table(run / "predictions.csv")["id"])
    rows: dict[str, list[float]] = {}
    for name, example in examples.items():
        graph, told = graphs[records[name]["imageId"]], records[name]["annotations"]
        size = np.array([graph["width"], graph["height"]] * 2)
        objects = [graph["objects"][key] for key in {*told["question"].values(), *told["fullAnswer"].values()}]
        named = [np.array([o["x"], o["y"], o["x"] + o["w"], o["y"] + o["h"]]) / size for o in objects]
        if not named:
            continue
        boxes, weights = example["boxes"], example["weights"]
        rows.setdefault("grounding_fine", []).append(naive_grounding(example, named, boxes, weights))
        even = [1 / len(boxes)] * len(boxes)
        rows.setdefault("grounding_fine_even", []).append(naive_grounding(example, named, boxes, even))
        chosen = example["graph"]["objects"]
        at, own = [one["box"] for one in chosen], [one["weight"] for one in chosen]
        rows.setdefault("grounding_graph", []).append(naive_grounding(example, named, at, own))
    measures = read(run / "results.json")["measures"]
    assert 20 < len(rows["grounding_fine"]) < len(examples)  # questions that name nothing do not count
    for name, values in rows.items():
        assert measures[name] == pytest.approx(np.mean(values), abs=2e-3)
    assert 0 < measures["grounding_graph_even"] < 1


@pytest.mark.parametrize("branches", ["fine", "graph"])
def test_grounding_needs_true_graphs_beside_predicted_ones(branches, tmp_path, capsys):
    flags = ["--branches", branches, "--sg_source", "predicted", *ONE_GRAPH, "--epochs", "1"]
    run = tiny_run(tmp_path / "run", *flags)
    out = capsys.readouterr().out
    measures = read(run / "results.json")["measures"]
    own = {f"grounding_{branches}", f"grounding_{branches}_even"}
    assert own == {name for name in measures if name.startswith("grounding")}
    assert f"\ngrounding {branches} {measures[f'grounding_{branches}']:.3f} (" in out
    # Without them there is no such measure; broken ones are said, and cost nothing else.
    root = tmp_path / "data"
    shutil.copytree(drawn_set("GQA") / "questions", root / "questions")
    shutil.copytree(drawn_set("GQA") / "choices", root / "choices")
    argv = ["--mode", "evaluate", "--checkpoint", str(run), "--data_root", str(root)]
    argv += ["--sg_source", "predicted", "--scene_graphs", str(drawn_set("GQA") / "predicted")]
    argv += ["--features", str(drawn_features("GQA"))] if branches == "fine" else []
    others = {name: value for name, value in measures.items() if name not in own}
    assert main.main(argv)["measures"] == pytest.approx(others, rel=1e-4)
    assert "grounding" not in capsys.readouterr().out
    (root / "val_sceneGraphs.json").write_text("{")
    assert main.main(argv)["measures"] == pytest.approx(others, rel=1e-4)
    assert "note      grounding is not measured: " in capsys.readouterr().out
    # Predicted graphs are never taken for true ones.
    (root / "val_sceneGraphs.json").unlink()
    shutil.copy(drawn_set("GQA") / "predicted" / "val_sceneGraphs.json", root)
    argv[argv.index("--scene_graphs") + 1] = str(root)
    assert main.main(argv)["measures"] == pytest.approx(others, rel=1e-4)


# real scene graphs


def real_questions(vqa_dir: Path, folder: Path) -> Path:
    """A data folder of the official form: two real questions of GQA about images whose scene graphs are there."""
    records = {}
    for image, question, program, name, answer, full, _, told in read(vqa_dir / "gqa" / "programs.json"):
        kind = "query" if "query" in program[-1] else "verify"
        types = {"structural": kind, "semantic": "obj", "detailed": kind}
        rest = {"groups": {"global": None, "local": ""}, "entailed": [], "semantic": [], "isBalanced": True}
        said = {"question": question, "answer": answer, "fullAnswer": full, "annotations": told}
        records[name] = {"imageId": image, "types": types, **said, **rest}
    other = {"question": "What is hanging above the chalkboard?", "answer": "picture", "imageId": "n578564"}
    records["202218649"] = {**records[name], **other, "annotations": {}}
    folder.mkdir()
    (folder / "val_all_questions.json").write_text(json.dumps(records))
    shutil.copy(vqa_dir / "gqa" / "sceneGraphs.json", folder)
    return folder


def test_a_run_on_drawn_scenes_answers_about_real_ones(vqa_dir, tmp_path, capsys):
    """Not rightly, perhaps: of their words it knows few. All of the way is there, to the picture."""
    root, run = real_questions(vqa_dir, tmp_path / "gqa"), graph_alone()
    data = ["--checkpoint", str(run), "--data_root", str(root)]
    capsys.readouterr()
    measures = main.main(["--mode", "evaluate", *data])["measures"]
    assert 0 < measures["grounding_graph"] <= 1 and "binary" in measures and np.isfinite(measures["loss"])
    note = "note      1 of 3 questions are about images without a scene graph: n578564"
    assert note in capsys.readouterr().out
    path = tmp_path / "answers.json"
    main.main(["--mode", "predict", *data, "--output", str(path)])
    assert [row["questionId"] for row in read(path)] == ["02930152", "07333408", "202218649"]
    names = {one["name"] for one in read(vqa_dir / "gqa" / "sceneGraphs.json")["2375429"]["objects"].values()}
    for where in (["--scene_graphs", str(root)], ["--data_root", str(root)]):
        image, picture = vqa_dir / "gqa" / "images" / "2375429.jpg", tmp_path / "picture.png"
        flags = ["--sg_source", "gt", *where, "--output", str(picture), "--overwrite"]
        main.main(ask(run, image, *flags, question="What is on the white wall?"))
        out = capsys.readouterr().out
        chosen = re.findall(r"^(?:objects   |          )[\d.]+  \d ([^,\n]+)", out, re.MULTILINE)
        assert len(chosen) == 2 and set(chosen) <= names
        with Image.open(picture) as drawn:
            assert drawn.size[0] == 872
