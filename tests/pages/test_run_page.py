"""The page of one run, against run folders written by hand."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_runs import (
    MOS,
    NUM_IMAGES,
    Page,
    cells,
    change,
    keep_images,
    make_hostile,
    measured,
    noisy,
    page_of,
    undraw,
    write_run,
)
from PIL import Image
from tiny_run import finished_run

from drawing import figures
from pages import elements, run_data
from pages.report import write_report


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with both scores."""
    return write_run(tmp_path / "run", epochs=3, lr=1e-3)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """For tests of words alone."""
    undraw(monkeypatch)


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Page:
    """The page of a finished run, for tests of words alone."""
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        return page_of(write_run(tmp_path_factory.mktemp("usual") / "run", epochs=3, lr=1e-3))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, Page]:
    """A finished run's folder, in which an older picture lay, and its page with all pictures."""
    folder = write_run(tmp_path_factory.mktemp("drawn") / "run", epochs=3, lr=1e-3)
    (folder / "figures").mkdir()
    (folder / "figures" / "old.png").write_bytes(b"")
    return folder, page_of(folder)


def test_the_page_says_what_the_files_hold(usual):
    page = usual
    scores = measured({task: noisy(task) for task in "qc"})
    rows = page.tables["scores beside the floors"]
    for task, row in (("q", 1), ("c", 3)):
        keys = [f"{name}_{task}" for name in ("srocc", "plcc", "plcc_fit", "krocc", "rmse")]
        assert rows[row][1:] == ["trained model", *cells(*(scores[key] for key in keys))]
        assert rows[row + 1][1:3] == ["generator mean", "0.250"]
    assert rows[1][0] == "quality" and rows[3][0] == "consistency"
    added = page.tables["what training has added"]
    assert added[1] == ["quality", "SROCC", *cells(scores["srocc_q"] - 0.125, scores["srocc_q"]), "+0.125"]
    assert page.tables["certainty"][2] == [
        *("consistency", "0.111 … 0.999", "0.222 … 0.888", "62.5% of 80", "0.92", "−0.10")
    ]
    assert ["test", "48", "7", "0"] in page.tables["folds and leakage"]
    assert ["lr", "0.001", "3e-05"] in page.tables["options that differ from the defaults"]
    assert len(page.tables["options that differ from the defaults"]) == 2
    assert ["epochs", "20"] in page.tables["other options"]
    assert ["git revision", "abc123"] in page.tables["provenance"]
    assert ["images a second (median)", "200"] in page.tables["time"] and ["in all", "12 s"] in page.tables["time"]
    assert ["before the first batch", "3 s"] in page.tables["time"]
    assert page.tables["generators, quality"][1] == ["one", "24", "0.250", "0.500", "3.00", "2.75"]
    assert "Nothing was remarked" in page.text and "left unread" not in page.text
    assert not any("GPU" in row[0] for row in page.tables["time"])
    assert not any(attrs.get("class") == "notice" for attrs in page.of("p"))
    assert page.text.count("image not found") == 32 and not page.of("img")  # the run does not tell where they lie
    gap = scores["srocc_q"] - 0.25
    assert f"{gap:.3f} above the best floor, generator mean" in page.text


@pytest.mark.usefixtures("undrawn")
def test_what_only_some_runs_tell_is_shown(run):
    """GPU memory, advice, diagnosis, and why scores mean nothing."""
    change(run, "metrics.csv", lambda table: table.assign(gpu_memory_gb=[1.25, 7.5, 3.0]))
    advice = {"flag": "--lr", "value": 3e-5, "recommended": "1e-3", "why": "heads <b>only</b>", "change": "--lr 1e-3"}
    found = {"finding": "overfits", "evidence": "loss rose", "proposal": "stop early", "command": "python x"}
    notes = ["all 24 predicted scores are equal", "<b>one</b>", {"two": 2}]
    change(run, "results.json", lambda results: results.update(advice=[advice], diagnosis=[found], notes=notes))
    page = page_of(run)
    assert ["GPU memory at most", "7.5 GB"] in page.tables["time"]
    for word in ("--lr is 3e-05", "recommended 1e-3", "heads <b>only</b>", "overfits", "loss rose", "stop early"):
        assert word in page.text.replace(" ,", ",")
    assert "Nothing was remarked" not in page.text and not page.of("b")[0].get("class")
    assert "<b>only" not in page.source
    assert sum(attrs.get("class") == "notice" for attrs in page.of("p")) == len(notes)
    assert all(str(note).replace("'", '"') in page.text for note in notes)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("empty", [None, []])
def test_parts_that_are_empty_are_as_good_as_absent(run, empty):
    change(run, "results.json", lambda results: results.update(advice=empty, diagnosis=empty, notes=empty))
    change(run, "splits.csv", lambda table: table.assign(path=""))
    page = page_of(run)
    assert "Nothing was remarked" in page.text
    assert not any(attrs.get("class") == "notice" for attrs in page.of("p"))
    assert page.text.count("image not found") == 32 and not page.of("img")


def test_the_worst_and_the_best_images_come_in_their_order(usual):
    pred = noisy("q")
    order = np.argsort(-np.abs(pred - MOS["q"]), kind="stable")
    named = [f"{'one' if i % 2 else 'two'}_{i:02}.png" for i in order]
    shown = re.findall(r"(?:one|two)_\d\d\.png", usual.text)
    assert shown[:8] == named[:8] and shown[8:16] == named[:-9:-1]
    worst = order[0]
    gap = f"{pred[worst] - MOS['q'][worst]:+.2f}".replace("-", "−")
    said = f"{gap} human {MOS['q'][worst]:.2f}, predicted {pred[worst]:.2f} prompt number {worst // 6}"
    assert said.replace(" -", " −") in usual.text


@pytest.mark.usefixtures("undrawn")
def test_thumbnails_show_the_images_that_were_scored(run, tmp_path):
    splits = keep_images(run, tmp_path / "images").set_index("name")
    found = run_data.read_run(run)
    for name in splits.index[:3]:
        source = elements.thumbnail(*found.files[name])
        small = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
        assert (small.format, small.size) == ("JPEG", (160, 80))
        with Image.open(splits.loc[name, "path"]) as whole:
            assert np.abs(np.subtract(small.getpixel((80, 40)), whole.getpixel((200, 100)))).max() <= 6
    page = page_of(run)
    assert len(page.of("img")) == 32 and "image not found" not in page.text
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") and image["alt"] for image in page.of("img"))


@pytest.mark.usefixtures("undrawn")
def test_an_image_that_is_not_the_one_that_was_scored_leaves_a_visible_place(run, tmp_path):
    pred = noisy("q")
    order = np.argsort(-np.abs(pred - MOS["q"]))
    names = [f"{'one' if i % 2 else 'two'}_{i:02}.png" for i in order[:3]]
    keep_images(run, tmp_path / "images")
    change(run, "predictions.csv", lambda table: table.drop(columns=["mos_align", "pred_align"]))
    change(run, "results.json", lambda found: found.update({k: only_q(v) for k, v in found.items()}))
    (tmp_path / "images" / names[0]).unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / names[1])
    (tmp_path / "images" / names[2]).write_bytes(b"no image")
    digest = hashlib.sha256(b"no image").hexdigest()
    change(
        run, "splits.csv", lambda table: table.assign(digest=table["digest"].mask(table["name"] == names[2], digest))
    )
    page = page_of(run)
    assert page.text.count("image not found") == 3 and len(page.of("img")) == 13
    assert all(name in page.text for name in names)


def only_q(part: Any) -> Any:
    """A part of results.json without what is about consistency."""
    if isinstance(part, dict):
        return {key: only_q(value) for key, value in part.items() if key != "c" and not key.endswith("_c")}
    return part


def test_a_report_that_is_cut_short_has_no_page(run, monkeypatch):
    """A finished run that is gone on with makes up for its report if the page is not there."""
    to_png, drawn = figures.to_png, iter(range(99))

    def stop(figure: Any) -> bytes:
        if next(drawn) == 3:
            raise KeyboardInterrupt
        return to_png(figure)

    monkeypatch.setattr(figures, "to_png", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report(run)
    assert len(list((run / "figures").iterdir())) == 3 and not (run / "report.html").exists()


def test_pictures_are_also_png_files_and_old_ones_go(drawn):
    run, page = drawn
    files = sorted(path.name for path in (run / "figures").iterdir())
    assert len(files) == len(page.of("figcaption")) == 15 and "old.png" not in files
    assert {"scatter-quality.png", "loss.png", "generators-consistency.png"} <= set(files)
    for name in files:
        with Image.open(run / "figures" / name) as image:
            image.load()
            assert image.format == "PNG" and image.width == figures.WIDTH * figures.PNG_DPI


def test_the_policy_of_a_page_lets_nothing_in_from_outside(usual):
    (policy,) = [str(meta["content"]) for meta in usual.of("meta") if "http-equiv" in meta]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "script-src" not in rules


def test_ids_are_unique_and_every_reference_has_its_target(drawn):
    _, page = drawn
    ids = Counter(str(attrs["id"]) for _, attrs in page.tags if "id" in attrs)
    assert max(ids.values()) == 1 and len(ids) > 500
    asked = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.source)
    assert len(asked) > 100 and {one or other for one, other in asked} <= set(ids)


def test_figures_take_the_colours_of_the_page(drawn):
    _, page = drawn
    drawn = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(drawn) == 15
    for svg in drawn:
        plain = re.sub(r"data:image/png;base64,[^\"]*", "", svg)
        assert figures.INK not in plain and "currentColor" in plain
        assert not set(figures.SERIES) & set(re.findall(r"#[0-9a-f]{6}", plain))
        assert re.search(r'<svg role="img" aria-label="[^"]{10,}" viewBox="[\d. ]+"', svg)


@pytest.mark.usefixtures("undrawn")
def test_the_command_for_the_same_run_names_the_folder_as_a_shell_reads_it(tmp_path):
    folder = write_run(tmp_path / "it's; a run")
    (command,) = re.findall(r"<code>(python baseline.py .*?)</code>", page_of(folder).source)
    assert shlex.split(html.unescape(command))[2:] == ["--config", str(folder / "config.json")]


# -- runs that are not as usual


@pytest.mark.usefixtures("undrawn")
def test_a_run_whose_test_fold_was_left_unread_shows_its_validation_fold(run):
    empty: dict[str, Any] = {name: {} for name in ("test", "floors", "certainty", "generators")}
    change(run, "results.json", lambda results: results.update(empty))
    change(run, "predictions.csv", lambda table: table[table["split"] == "val"])
    page = page_of(run)
    assert "The test fold was left unread" in page.text and "Main score, validation" in page.text
    assert len(page.tables["scores beside the floors"]) == 3 and "certainty" not in page.tables
    assert re.search(r"val_(one|two)_\d\d.png", page.source) and (run / "figures" / "scatter-quality.png").exists()
    assert "Told apart on the test fold only" in page.text and "Not measured on this fold" in page.text


@pytest.mark.usefixtures("undrawn")
def test_one_score_one_epoch_and_one_generator_are_enough(tmp_path):
    run = write_run(tmp_path / "run", tasks="q", epochs=1)
    change(run, "results.json", lambda results: results.update(generators={}))
    page = page_of(run)
    assert "Consistency" not in page.text and "No two generators have enough" in page.text
    assert (run / "figures" / "loss.png").exists() and not (run / "figures" / "loss-of-scores.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_cells_without_a_number_are_left_out(run):
    def spoil(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype({"loss": object, "lr": object}).assign(grad_norm="", images_per_s=["", "100", "inf"])
        table.loc[1, ["loss", "lr"]] = ["", "nan"]
        return table

    change(run, "metrics.csv", spoil)
    change(run, "predictions.csv", lambda table: table.assign(mos_quality=[""] * 10 + list(table["mos_quality"])[10:]))
    page = page_of(run)
    assert ["images a second (median)", "100"] in page.tables["time"]
    assert "Predicted and human quality, 38 images" in page.text and "consistency, 48 images" in page.text
    assert not (run / "figures" / "gradient-norm.png").exists()


def test_further_scores_are_shown_like_the_two(run, monkeypatch):
    monkeypatch.setattr(figures, "to_png", lambda *_: b"")
    change(run, "predictions.csv", lambda table: table.rename(columns=lambda c: c.replace("_align", "_authenticity")))
    rename = lambda text: re.sub(r'(\w)_c"', r'\1_authenticity"', text).replace('"c":', '"authenticity":')  # noqa: E731
    path = run / "results.json"
    path.write_text(rename(path.read_text()))
    change(run, "metrics.csv", lambda table: table.rename(columns=lambda c: re.sub("_c$", "_authenticity", c)))
    page = page_of(run)
    assert page.tables["scores beside the floors"][3][0] == "authenticity"
    assert (run / "figures" / "scatter-authenticity.png").exists() and "SROCC authenticity" in page.source


@pytest.mark.usefixtures("undrawn")
def test_several_data_sets_are_shown_each_by_itself(run):
    def join(results: dict[str, Any]) -> None:
        part = {name: results[name] for name in ("test", "certainty", "generators")}
        results.update(certainty={}, generators={}, sets={"a/b": part, "c": part})

    change(run, "results.json", join)
    change(run, "predictions.csv", lambda table: table.assign(set=["a/b", "c"] * NUM_IMAGES))
    page = page_of(run)
    assert [row[1] for row in page.tables["scores beside the floors"][1:4]] == ["trained model", "on a/b", "on c"]
    assert [row[0] for row in page.tables["certainty"][1:3]] == ["quality on a/b", "consistency on a/b"]
    assert (run / "figures" / "scatter-quality-on-a-b.png").exists()
    assert "Predicted and human quality on c, 24 images" in page.text


def test_hostile_text_is_escaped_and_clipped(run, monkeypatch):
    monkeypatch.setattr(figures, "to_png", lambda *_: b"")
    page = page_of(make_hostile(run))
    assert "<script" not in page.source and not page.of("script")
    assert "<img" not in page.source and "w" * 300 not in page.source
    assert len(page.source) < 700_000 and "&lt;script&gt;" in page.source


@pytest.mark.usefixtures("undrawn")
def test_a_bug_in_drawing_is_not_told_as_a_damaged_file(run, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(figures, "scatter", broken)
    with pytest.raises(KeyError, match="ours"):
        write_report(run)


def test_a_page_of_ten_thousand_images_stays_small(run, monkeypatch):
    def many(table: pd.DataFrame) -> pd.DataFrame:
        whole = pd.concat([table[table["split"] == "test"]] * 209, ignore_index=True)
        rng = np.random.default_rng(0)
        columns = ["mos_quality", "pred_quality", "mos_align", "pred_align"]
        whole[columns] = whole[columns].astype(float) + rng.normal(0, 0.5, (len(whole), 4))
        return whole.assign(name=[f"{i}.png" for i in range(len(whole))])

    change(run, "predictions.csv", many)
    monkeypatch.setattr(figures, "to_png", lambda *_: b"")  # which are not in the page
    assert write_report(run).stat().st_size < 1_500_000
    assert "10032 images" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_the_trainer_itself_can_be_shown(demo_set, tmp_path):
    run = shutil.copytree(finished_run(demo_set), tmp_path / "run")
    test = json.loads((run / "results.json").read_text())["test"]
    row = page_of(run).tables["scores beside the floors"][1]
    expected = (number.replace("-", "−") for number in cells(test["srocc_q"], test["plcc_q"]))
    assert row[1:4] == ["trained model", *expected]
