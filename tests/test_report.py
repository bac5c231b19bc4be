"""`report.py` on run folders written by hand, of which it is known what the pages must say."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import compare
import figures
import metrics
import report
from configs import TrainingConfig
from scores import COLUMNS

NUM_IMAGES = 48
MOS = {task: np.random.default_rng(seed).uniform(1, 5, NUM_IMAGES) for task, seed in (("q", 0), ("c", 1))}
VOID = {"meta", "link", "img", "br", "path", "use", "rect", "image"}


def noisy(task: str, spread: float = 0.7, seed: int = 2) -> np.ndarray:
    """Predictions with errors of this standard deviation."""
    return MOS[task] + np.random.default_rng(seed).normal(0, spread, NUM_IMAGES)


def measured(pred: dict[str, np.ndarray]) -> dict[str, float]:
    """What results.json holds of a fold."""
    found = {f"{k}_{task}": v for task, p in pred.items() for k, v in metrics.agreement(p, MOS[task]).items()}
    return {**found, "main": metrics.main_score(found)}


def write_run(folder: Path, *, tasks: str = "qc", spread: float = 0.7, epochs: int = 3, **options: Any) -> Path:
    """A finished run: test and validation fold of the same size and scores, two generators, six images a prompt."""
    folder.mkdir(parents=True)
    pred = {task: noisy(task, spread) for task in tasks}
    scores = measured(pred)
    makers = ["one" if i % 2 else "two" for i in range(NUM_IMAGES)]
    table = pd.DataFrame(
        {
            "name": [f"{makers[i]}_{i:02}.png" for i in range(NUM_IMAGES)],
            "set": "csv",
            "split": "test",
            "prompt": [f"prompt number {i // 6}" for i in range(NUM_IMAGES)],
            "generator": makers,
            "cluster": [i // 6 for i in range(NUM_IMAGES)],
        }
    )
    for task, (mos, own) in COLUMNS.items():
        table[mos] = MOS[task] if task in tasks else np.nan
        table[own] = pred[task] if task in tasks else np.nan
    held = table.assign(name="val_" + table["name"], split="val")
    pd.concat([table, held]).to_csv(folder / "predictions.csv", index=False)
    splits = pd.concat([table, held])[["name", "split"]].assign(digest="0" * 64)
    splits.to_csv(folder / "splits.csv", index=False)
    history = {"epoch": range(1, epochs + 1), "loss": 0.1, "val_loss": 0.2, "grad_norm": 0.5, "lr": 3e-5}
    history |= {"seconds": 1.5, "images_per_s": 200.0, "data_wait": 0.25, "val_main": scores["main"]}
    for task in tasks:
        history |= {f"val_{name}_{task}": scores[f"{name}_{task}"] for name in ("srocc", "plcc")}
        history |= {f"loss_{task}": 0.1, f"val_loss_{task}": 0.3}
    pd.DataFrame(history).to_csv(folder / "metrics.csv", index=False)
    config = TrainingConfig(**options).to_json()
    provenance = {"versions": {"python": "3.11.7"}, "git_revision": "abc123", "machine": "a machine"}
    (folder / "config.json").write_text(json.dumps({**config, "provenance": provenance}))
    rows = [
        {"generator": name, "images": 24, "srocc": srocc, "plcc": 0.5, "mos": 3.0, "pred": 2.75}
        for name, srocc in (("one", 0.25), ("two", 0.75))
    ]
    results = {
        "best_epoch": min(2, epochs),
        "epochs": epochs,
        "val": scores,
        "test": scores,
        "base": {"val": {}, "test": {key: value - 0.125 for key, value in scores.items()}},
        "floors": {"generator_mean": dict.fromkeys(scores, 0.25)},
        "images": {"train": 100, "val": NUM_IMAGES, "test": NUM_IMAGES},
        "leakage": {"prompt": {"val": 0, "test": 7}, "reference": {"val": 0, "test": 0}},
        "certainty": {
            task: {
                "intervals": {"srocc": [0.111, 0.999], "plcc": [0.222, 0.888]},
                "within_prompt": {"accuracy": 0.625, "pairs": 80},
                "slope": 0.92,
                "bias": -0.1,
            }
            for task in tasks
        },
        "generators": {task: {"by_generator": rows, "worst": "one", "ranking": 1.0} for task in tasks},
        "sets": {},
        "seconds": 12.0,
        "seconds_from_first_batch": 9.0,
        "data_fingerprint": "f" * 64,
        "test_digest": "d" * 64,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def change(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Edit a JSON or CSV file of a run; `edit` may change what it gets, or return something else."""
    path = folder / name
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        path.write_text(json.dumps(edit(found) or found))
    else:
        edit(pd.read_csv(path, keep_default_na=False)).to_csv(path, index=False)


def keep_images(folder: Path, images: Path) -> pd.DataFrame:
    """Give every image of a run a file in one colour, and its path and digest; returns splits.csv."""
    images.mkdir(exist_ok=True)
    splits = pd.read_csv(folder / "splits.csv")
    digests, paths = [], []
    for number, name in enumerate(splits["name"]):
        path = images / name
        Image.new("RGB", (400, 200), (number * 2, 0, 255 - number * 2)).save(path)
        paths.append(str(path))
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    splits = splits.assign(digest=digests, path=paths)
    splits.to_csv(folder / "splits.csv", index=False)
    return splits


class Page(HTMLParser):
    """A page's elements, its tables as lists of rows of cells, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.label = ""
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if found.get("class") == "scroll":
            self.label = str(found["aria-label"])
            self.tables[self.label] = []
        elif tag == "tr":
            self.tables[self.label].append([])
        elif tag in ("td", "th"):
            self.tables[self.label][-1].append("")

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.tags if tag not in VOID][-1:]
        if inside != ["style"]:
            self.words.append(data)
        rows = self.tables.get(self.label)
        if rows and rows[-1] and data.strip():
            rows[-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.label = ""

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of this kind."""
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(folder: Path) -> Page:
    """The report of a run, written now."""
    return Page(report.write_report(folder))


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with both scores."""
    return write_run(tmp_path / "run", epochs=3, lr=1e-3)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """For tests of words alone: pictures are made, but not rendered, which takes most of the time."""
    monkeypatch.setattr(figures, "to_svg", lambda *_: "")
    monkeypatch.setattr(figures, "to_png", lambda *_: b"")


def cells(*numbers: float) -> list[str]:
    """Numbers as a page shows them."""
    return [f"{value:.3f}" for value in numbers]


# -- the page of one run


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_the_files_hold(run):
    page = page_of(run)
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
    gap = scores["srocc_q"] - 0.25
    assert f"{gap:.3f} above the best floor, generator mean" in page.text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("column", "said"), [("gpu_memory_gb", True), ("other", False)])
def test_gpu_memory_is_told_where_it_was_measured(run, column, said):
    change(run, "metrics.csv", lambda table: table.assign(**{column: [1.25, 7.5, 3.0]}))
    assert (["GPU memory at most", "7.5 GB"] in page_of(run).tables["time"]) == said


@pytest.mark.usefixtures("undrawn")
def test_advice_and_diagnosis_are_shown(run):
    advice = {"flag": "--lr", "value": 3e-5, "recommended": "1e-3", "why": "heads <b>only</b>", "change": "--lr 1e-3"}
    found = {"finding": "overfits", "evidence": "loss rose", "proposal": "stop early", "command": "python x"}
    change(run, "results.json", lambda results: results.update(advice=[advice], diagnosis=[found]))
    page = page_of(run)
    for word in ("--lr is 3e-05", "recommended 1e-3", "heads <b>only</b>", "overfits", "loss rose", "stop early"):
        assert word in page.text.replace(" ,", ",")
    assert "Nothing was remarked" not in page.text and not page.of("b")[0].get("class")
    assert "<b>only" not in page.source


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("notes", [None, [], ["all 24 predicted scores are equal"], ["<b>one</b>", {"two": 2}]])
def test_scores_that_mean_nothing_are_explained_above_them(run, notes):
    change(run, "results.json", lambda results: results.update(notes=notes))
    page = page_of(run)
    assert len([attrs for attrs in page.of("p") if attrs.get("class") == "notice"]) == len(notes or [])
    assert all(str(note).replace("'", '"') in page.text for note in notes or [])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("empty", [None, []])
def test_without_advice_the_page_says_so(run, empty):
    change(run, "results.json", lambda results: results.update(advice=empty, diagnosis=empty))
    assert "Nothing was remarked" in page_of(run).text


@pytest.mark.usefixtures("undrawn")
def test_the_worst_and_the_best_images_come_in_their_order(run):
    pred = noisy("q")
    order = np.argsort(-np.abs(pred - MOS["q"]), kind="stable")
    named = [f"{'one' if i % 2 else 'two'}_{i:02}.png" for i in order]
    page = page_of(run)
    shown = re.findall(r"(?:one|two)_\d\d\.png", page.text)
    assert shown[:8] == named[:8] and shown[8:16] == named[:-9:-1]
    worst = order[0]
    gap = f"{pred[worst] - MOS['q'][worst]:+.2f}".replace("-", "−")
    said = f"{gap} human {MOS['q'][worst]:.2f}, predicted {pred[worst]:.2f} prompt number {worst // 6}"
    assert said.replace(" -", " −") in page.text


@pytest.mark.usefixtures("undrawn")
def test_thumbnails_show_the_images_that_were_scored(run, tmp_path):
    splits = keep_images(run, tmp_path / "images").set_index("name")
    found = report.read_run(run)
    for name in splits.index[:3]:
        source = report.thumbnail(*found.files[name])
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


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("column", [None, ""])
def test_without_paths_every_image_leaves_its_place(run, column):
    if column is not None:
        change(run, "splits.csv", lambda table: table.assign(path=column))
    page = page_of(run)
    assert page.text.count("image not found") == 32 and not page.of("img")


def thumbnail_of(path: Path) -> Image.Image:
    """What the page would show of a file."""
    source = report.thumbnail(str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_thumbnails_look_as_people_see_the_image(tmp_path):
    turned = Image.new("RGB", (320, 160), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert thumbnail_of(tmp_path / "turned.jpg").size == (80, 160)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert min(thumbnail_of(tmp_path / "clear.png").getpixel((5, 5))) > 250
    Image.fromarray(np.full((20, 20), 128 << 8, np.uint16)).save(tmp_path / "deep.png")
    assert abs(thumbnail_of(tmp_path / "deep.png").getpixel((5, 5))[0] - 128) < 4


def test_a_report_that_is_cut_short_has_no_page(run, monkeypatch):
    """A finished run that is gone on with makes up for its report if the page is not there."""
    to_png, drawn = figures.to_png, iter(range(99))

    def stop(figure: Any) -> bytes:
        if next(drawn) == 3:
            raise KeyboardInterrupt
        return to_png(figure)

    monkeypatch.setattr(figures, "to_png", stop)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(run)
    assert len(list((run / "figures").iterdir())) == 3 and not (run / "report.html").exists()


def test_two_reports_of_one_folder_at_once_both_come_to_their_end(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    unlink = Path.unlink

    def unlink_too_late(path: Path, missing_ok: bool = False) -> None:
        path.exists() and unlink(path)  # as the other does
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_too_late)
    report.write_pictures(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_also_png_files_and_old_ones_go(run):
    (run / "figures").mkdir()
    (run / "figures" / "old.png").write_bytes(b"")
    page = page_of(run)
    files = sorted(path.name for path in (run / "figures").iterdir())
    assert len(files) == len(page.of("figcaption")) == 15 and "old.png" not in files
    assert {"scatter-quality.png", "loss.png", "generators-consistency.png"} <= set(files)
    for name in files:
        with Image.open(run / "figures" / name) as image:
            image.load()
            assert image.format == "PNG" and image.width == figures.WIDTH * figures.PNG_DPI


def test_the_policy_of_a_page_lets_nothing_in_from_outside(run, undrawn):
    (policy,) = [str(meta["content"]) for meta in page_of(run).of("meta") if "http-equiv" in meta]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "script-src" not in rules


def test_ids_are_unique_and_every_reference_has_its_target(run):
    page = page_of(run)
    ids = Counter(str(attrs["id"]) for _, attrs in page.tags if "id" in attrs)
    assert max(ids.values()) == 1 and len(ids) > 500
    asked = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.source)
    assert len(asked) > 100 and {one or other for one, other in asked} <= set(ids)


def test_figures_take_the_colours_of_the_page(run):
    page = page_of(run)
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


@pytest.mark.usefixtures("undrawn")
def test_a_page_of_one_repeated_run_promises_no_intervals(tmp_path):
    folder = write_repeated(tmp_path / "one")

    def single(summary: dict[str, Any]) -> None:
        summary["runs"] = summary["runs"][:1]
        floors = [*summary["floors"].values(), *summary["over"].values()]
        for part in (summary["test"], *floors):
            for values in part.values():
                values |= {"values": values["values"][:1], "interval": None}

    change(folder, "summary.json", single)
    page = page_of(folder)
    assert "mean of 1 run " in page.text and "1 run; images:" in page.text and "no intervals" in page.text


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


def test_further_scores_are_shown_like_the_two(run):
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


HOSTILE = (
    "<script>document.title='taken'</script>\"'><img src=x onerror=document.title='taken'> $x_{$ \u202eRTL \u05d0\u05d1"
    "</title></style><svg onload=document.title='taken'><a href=\"javascript:document.title='taken'\">{{7*7}} \x1b[31m"
)


@pytest.fixture
def hostile_run(run) -> Path:
    """A run whose names, prompts, generators and options are out to break the page."""
    change(run, "predictions.csv", lambda table: table.assign(prompt=HOSTILE + "w" * 10_000, generator=HOSTILE))
    change(run, "predictions.csv", lambda table: table.assign(name=[HOSTILE + n for n in table["name"]], set=HOSTILE))

    def spoil(results: dict[str, Any]) -> None:
        for part in results["generators"].values():
            part["by_generator"][0]["generator"] = HOSTILE + "w" * 500
        results["notes"] = [HOSTILE, {HOSTILE: HOSTILE}]
        results["advice"] = [{"flag": HOSTILE, "value": {"a": HOSTILE}, "why": HOSTILE}]

    change(run, "results.json", spoil)
    change(run, "config.json", lambda config: config.update(data_csv_path=HOSTILE + "/long" * 100))
    return run


def test_hostile_text_is_escaped_and_clipped(hostile_run):
    page = page_of(hostile_run)
    assert "<script" not in page.source and not page.of("script")
    assert "<img" not in page.source and "w" * 300 not in page.source
    assert len(page.source) < 700_000 and "&lt;script&gt;" in page.source


# -- in a browser


def look(browser: Any, path: Path, scheme: str, width: int) -> dict[str, Any]:
    """Open a page as people do; what it loads and says must be nothing but itself."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(path.as_uri())
    found = tab.evaluate(
        """() => ({
            wide: document.documentElement.scrollWidth - innerWidth, title: document.title,
            paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
            letters: [...document.querySelectorAll("svg text")].map(text => getComputedStyle(text).fill),
            broken: [...document.images].filter(image => !image.naturalWidth).length,
        })"""
    )
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert found["wide"] <= 0 and found["broken"] == 0
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_page_needs_nothing_but_itself_and_fits_its_screen(browser, run, tmp_path, scheme, width):
    keep_images(run, tmp_path / "images")
    found = look(browser, report.write_report(run), scheme, width)
    paper, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("paper", "ink"))
    assert paper > 600 > ink if scheme == "light" else paper < 150 < 600 < ink
    assert set(found["letters"]) == {found["ink"]} and len(found["letters"]) > 100


@pytest.mark.parametrize("width", [360, 1200])
def test_a_hostile_page_stays_harmless_and_in_its_screen(browser, hostile_run, width):
    assert look(browser, report.write_report(hostile_run), "dark", width)["title"] == "run"


def test_runs_of_hostile_names_are_compared_harmlessly(browser, tmp_path, capsys):
    names = ["<img src=x onerror=document.title='taken'>", "'\"><svg onload=document.title='taken'>\x1b[31m"]
    runs = [write_run(tmp_path / name, spread=0.3 + i, lr=1e-3 * i + 1e-4) for i, name in enumerate(names)]
    for folder in runs:
        change(folder, "predictions.csv", lambda table: table.assign(prompt=HOSTILE, generator=HOSTILE, set=HOSTILE))
    report.main(list(map(str, runs)))
    assert look(browser, tmp_path / "comparison.html", "light", 1200)["title"] != "taken"
    assert "\x1b" not in capsys.readouterr().out


def test_other_pages_fit_a_phone_too(browser, tmp_path, capsys):
    runs = [write_run(tmp_path / ("n" * 60 + str(i)), spread=0.3 + i, lr=1e-3 * i + 1e-4) for i in range(3)]
    report.main(list(map(str, runs)))
    look(browser, tmp_path / "comparison.html", "light", 360)
    look(browser, report.write_report(write_repeated(tmp_path / "repeated")), "dark", 360)


# -- errors


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which these arguments are refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        report.main(argv)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


BROKEN: list[tuple[str, str | bytes | None, str]] = [
    ("results.json", None, "unfinished run, results.json is missing"),
    ("results.json", '{"best_epoch": 1', "results.json: cannot be read"),
    ("results.json", "[]", "not a JSON object"),
    ("results.json", "{}", "has no 'best_epoch'"),
    ("results.json", "[" * 100_000, "results.json: cannot be read"),
    ("config.json", None, "no run folder, config.json is missing"),
    ("config.json", b"\xff\xfe\x00", "config.json: cannot be read"),
    ("metrics.csv", "", "metrics.csv: cannot be read"),
    ("metrics.csv", "loss\n1\n", "no column 'epoch'"),
    ("metrics.csv", "epoch,loss\n1,abc\n", "metrics.csv: cannot be read"),
    ("predictions.csv", None, "unfinished run, predictions.csv is missing"),
    ("predictions.csv", "name,set\n", "no column 'split'"),
    ("predictions.csv", "name,set,split,prompt,generator\na,b,test,c,d\n", "no column 'mos_quality'"),
    ("splits.csv", "name\na\n", "no column 'digest'"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN)
def test_a_broken_run_is_refused_in_one_line(run, capsys, name, content, said):
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused([str(run)], capsys)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"images": {"train": 1}}, "'images' has no 'val'"),
        ({"certainty": {"q": {"other": 1}}}, "'certainty.q' has no 'intervals'"),
        ({"generators": {"q": {"by_generator": [], "ranking": 1.0}}}, "'generators.q.by_generator' is no list of any"),
        ({"sets": {"a": 1}}, "'sets.a' is no object"),
        ({"leakage": {"prompt": 1}}, "'leakage.prompt' is no object"),
        ({"floors": {"mean": {"srocc_q": None}}}, "'floors.mean.srocc_q' is no number"),
    ],
)
def test_parts_of_another_shape_are_refused_by_name(run, capsys, edit, said):
    change(run, "results.json", lambda results: results.update(edit))
    assert f"{run / 'results.json'}: {said}; run it again with this version" in refused([str(run)], capsys)


def places_in(part: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every part of a JSON value."""
    keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else []
    return [found for key in keys for found in ((*place, key), *places_in(part[key], (*place, key)))]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["results.json", "summary.json"])
def test_no_damage_to_a_file_is_worse_than_one_line(tmp_path, name, monkeypatch):
    """Every part in turn is taken away or is something else: the page is written, or the file is named."""
    for kind in ("scatter", "residuals", "chart"):  # most of the time, and not of these files
        monkeypatch.setattr(figures, kind, lambda *_, **__: matplotlib.figure.Figure())
    folder = (write_run if name == "results.json" else write_repeated)(tmp_path / "run")
    whole = (folder / name).read_text()
    refusals = 0
    for place in places_in(json.loads(whole)):
        for other in ("x", None, [], "absent"):
            found = json.loads(whole)
            part = found
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = other
            if other == "absent":
                del part[place[-1]]
            (folder / name).write_text(json.dumps(found))
            try:
                report.write_report(folder)
                said = str(folder / name)
            except ValueError as error:
                refusals += 1
                said = str(error)
            assert str(folder / name) in said, (place, other)
    assert refusals > 100


@pytest.mark.usefixtures("undrawn")
def test_a_bug_in_drawing_is_not_told_as_a_damaged_file(run, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(figures, "scatter", broken)
    with pytest.raises(KeyError, match="ours"):
        report.write_report(run)


@pytest.mark.usefixtures("undrawn")
def test_a_prompt_may_be_called_nan(run):
    change(run, "predictions.csv", lambda table: table.assign(prompt="nan", generator="NA"))
    assert set(report.read_run(run).scored["prompt"]) == {"nan"}


def test_scores_that_are_no_numbers_are_refused(run, capsys):
    change(run, "results.json", lambda results: results["val"].update(srocc_q="high"))
    assert "'val.srocc_q' is no number" in refused([str(run)], capsys)


def test_a_wrong_folder_or_flag_is_refused_in_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused([str(tmp_path / "absent")], capsys)
    assert "no folder" in refused([str(tmp_path / "file")], capsys)
    assert "no run folder" in refused([str(tmp_path / "empty")], capsys)
    assert "named twice" in refused([str(run), str(run / ".." / "run")], capsys)
    assert "is for several runs" in refused([str(run), "--out", "x.html"], capsys)
    assert "in a folder that exists" in refused([str(run), str(tmp_path), "--out", "absent/x.html"], capsys)
    assert "--aut" in refused([str(run), "--aut"], capsys)
    (tmp_path / "empty" / "protocol.json").write_text("{}")
    assert "no finished repeated runs" in refused([str(tmp_path / "empty")], capsys)


# -- several runs


@pytest.mark.usefixtures("undrawn")
def test_runs_are_compared_the_best_validation_score_first(tmp_path, capsys):
    spreads = {"poor": 2.0, "good": 0.3, "fair": 0.8}
    rates = {"poor": 1e-3, "good": 1e-3, "fair": 1e-4}
    for name, spread in spreads.items():
        write_run(tmp_path / name, spread=spread, lr=rates[name])
    report.write_report(tmp_path / "fair")
    report.main([str(tmp_path / name) for name in spreads])
    head, *lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r"  +", line) for line in lines[:3]]
    assert [row[0] for row in rows] == ["good", "fair", "poor"]
    scores = {name: measured({task: noisy(task, spread) for task in "qc"}) for name, spread in spreads.items()}
    for name, *found in rows:
        own = scores[name]
        assert found[0] == f"{own['main']:.3f}" and found[1] == f"{own['srocc_q']:.3f} (0.111 … 0.999)"
        assert found[4] == f"{own['plcc_c']:.3f} (0.222 … 0.888)" and found[5:7] == ["2/3", "12"]
        assert found[7] == ("lr 0.0001" if name == "fair" else "–")
    assert head.split("  ")[-1] == "differs in"
    page = Page(tmp_path / "comparison.html")
    assert [row[0] for row in page.tables["runs"][1:]] == ["good", "fair", "poor"]
    assert page.tables["options that differ"] == [
        ["run", "lr"],
        ["good", "0.001"],
        ["fair", "0.0001"],
        ["poor", "0.001"],
    ]
    assert [link["href"] for link in page.of("a")] == ["fair/report.html"]


@pytest.mark.usefixtures("undrawn")
def test_paired_differences_are_those_of_compare(tmp_path, capsys):
    runs = [write_run(tmp_path / name, spread=spread) for name, spread in (("good", 0.3), ("poor", 2.0))]
    report.main(list(map(str, reversed(runs))))
    assert "only 8 prompts" in capsys.readouterr().out
    expected = compare.compare_runs(runs).query("run == @runs[1].__str__()").to_dict("records")
    rows = Page(tmp_path / "comparison.html").tables["paired differences"][1:]
    assert len(rows) == len(expected) == 2
    for row, own in zip(rows, expected, strict=True):
        values = [own[f"{part}srocc{end}"] for part, end in (("d_", ""), ("", "_low"), ("", "_high"))]
        difference, low, high = (f"{value:+.3f}".replace("-", "−") for value in values)
        assert row[:2] == ["poor", "good"] and row[4] == f"{difference}\n({low} … {high})"
        assert row[6] == compare.verdict(values[1], values[2])


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_paired_is_said_in_one_line(tmp_path, capsys):
    runs = [write_run(tmp_path / name, spread=spread) for name, spread in (("one", 0.3), ("other", 2.0))]
    change(runs[1], "predictions.csv", lambda table: table.assign(name="x" + table["name"]))
    report.main([*map(str, runs), "--out", str(tmp_path / "here.html")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[3].startswith("other and one have no paired differences: ")
    assert lines[4] == f"page: {tmp_path / 'here.html'}"
    page = Page(tmp_path / "here.html")
    assert "paired differences" not in page.tables and "share 0 test image(s)" in page.text
    change(runs[1], "results.json", lambda results: results.update(test={}, floors={}, certainty={}, generators={}))
    report.main(list(map(str, runs)))
    assert "no paired differences: fewer than two runs" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_runs_in_different_folders_have_different_names_and_their_page_is_here(tmp_path, capsys, monkeypatch):
    runs = [write_run(tmp_path / folder / "run", spread=spread) for folder, spread in (("a", 0.3), ("b", 2.0))]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    report.main(list(map(str, runs)))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["a/run", "b/run"]
    assert (tmp_path / "here" / "comparison.html").exists() and not (tmp_path / "comparison.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_every_score_that_a_run_has_is_compared_the_two_first(tmp_path, capsys):
    runs = [write_run(tmp_path / name, spread=spread) for name, spread in (("more", 0.3), ("two", 2.0))]

    def add(results: dict[str, Any]) -> dict[str, Any]:
        extra = {f"{key[:-2]}_authenticity": 0.5 for key in results["test"] if key.endswith("_q")}
        return {**results, "test": {**extra, **results["test"]}}

    change(runs[0], "results.json", add)
    report.main(list(map(str, runs)))
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[:3]]
    titles = [f"{name} {title}" for title in ("quality", "consistency", "authenticity") for name in ("SROCC", "PLCC")]
    assert lines[0][2:8] == titles
    assert lines[1][6:8] == ["0.500", "0.500"] and lines[2][6:8] == ["–", "–"]
    assert Page(tmp_path / "comparison.html").tables["runs"][0][2:8] == titles


# -- repeated runs


def statistics(values: list[float]) -> dict[str, Any]:
    """As protocol.py writes them."""
    ends = metrics.resampled_interval(values, 0.25)
    mean, sd, median = float(np.mean(values)), float(np.std(values, ddof=1)), float(np.median(values))
    return {"mean": mean, "sd": sd, "median": median, "interval": ends, "values": values}


def write_repeated(folder: Path, spread: float = 0.5) -> Path:
    """A folder of two finished runs with their summary."""
    names = ["seed1", "seed2"]
    found = []
    for seed, name in enumerate(names, start=1):
        write_run(folder / name, spread=spread * seed, seed=seed)
        found.append(json.loads((folder / name / "results.json").read_text()))
    test = {key: statistics([run["test"][key] for run in found]) for key in found[0]["test"]}
    floor = {key: statistics([0.25, 0.25]) for key in test}
    over = {key: statistics([run["test"][key] - 0.25 for run in found]) for key in test}
    summary = {
        "runs": names,
        "tests": ["x", "y"],
        "share": 0.25,
        "images": {"train": 192, "val": 48, "test": 48},
        "test": test,
        "floors": {"generator_mean": floor},
        "over": {"generator_mean": over},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "protocol.json").write_text(json.dumps(TrainingConfig(repeats=2, seed=1).to_json()))
    return folder


@pytest.mark.usefixtures("undrawn")
def test_repeated_runs_have_a_page_of_their_summary(tmp_path):
    folder = write_repeated(tmp_path / "two")
    report.write_report(folder / "seed2")
    page = page_of(folder)
    scores = [measured({task: noisy(task, spread) for task in "qc"}) for spread in (0.5, 1.0)]
    values = [score["srocc_q"] for score in scores]
    low, high = metrics.resampled_interval(values, 0.25) or (0, 0)
    row = page.tables["scores beside the floors"][1]
    ends = f"{low:.3f} … {high:.3f}".replace("-", "−")
    assert row[:6] == [
        "quality",
        "trained model",
        *cells(np.mean(values), np.std(values, ddof=1), np.mean(values)),
        ends,
    ]
    assert page.tables["scores beside the floors"][2][1:4] == ["generator mean", "0.250", "0.000"]
    assert page.tables["trained model minus floors"][1][2] == f"{np.mean(values) - 0.25:+.3f}"
    assert page.tables["runs"][1][:3] == ["seed1", *cells(scores[0]["main"], values[0])]
    assert [link["href"] for link in page.of("a")] == ["seed2/report.html"]
    assert (folder / "figures" / "summary-quality.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_repeated_and_single_runs_stand_in_one_table(tmp_path, capsys):
    first, second = (write_repeated(tmp_path / name, spread) for name, spread in (("one", 0.5), ("two", 0.9)))
    single = write_run(tmp_path / "single", spread=3.0)
    report.main([str(single), str(first), str(second)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["one", "two", "single"]
    assert re.split("  +", lines[1])[7] == "24"  # seconds of both
    mains = [measured({task: noisy(task, spread) for task in "qc"})["main"] for spread in (0.5, 1.0)]
    assert re.split("  +", lines[1])[1] == f"{np.mean(mains):.3f}"
    rows = Page(tmp_path / "comparison.html").tables["paired differences"][1:]
    expected = compare.compare_protocols([first, second])
    assert [row[:3] for row in rows] == [["two", "one", "quality"], ["two", "one", "consistency"]]
    assert rows[0][4].startswith(f"{expected.iloc[1]['d_srocc']:+.3f}".replace("-", "−"))


# -- figures


def test_a_scatter_shows_every_image_the_fit_and_the_identity():
    pred = noisy("q")
    with figures.style():
        ax = figures.scatter(pred, MOS["q"], "quality").axes[0]
    (dots,) = ax.collections
    assert dots.get_rasterized() and np.allclose(dots.get_offsets(), np.stack([pred, MOS["q"]], axis=1))
    identity, fit = (np.asarray(line.get_xydata()) for line in ax.lines)
    assert np.array_equal(identity[:, 0], identity[:, 1])
    assert fit[:, 1] == pytest.approx(metrics.apply_logistic(metrics.fit_logistic(pred, MOS["q"]), fit[:, 0]))
    assert fit[0, 0] == pred.min() and fit[-1, 0] == pred.max() and ax.get_xlim() == ax.get_ylim()


def test_a_chart_shows_its_numbers_and_the_epoch_that_was_kept():
    lines = [figures.Line("a", np.arange(3), np.array([1.0, np.inf, 3.0])), figures.Line("b", np.arange(3), np.ones(3))]
    with figures.style():
        ax = figures.chart(lines, "loss", best=1, limit=0.5).axes[0]
    first, _, limit, kept = ax.lines
    assert np.array_equal(first.get_ydata(), [1, np.nan, 3], equal_nan=True)
    assert list(limit.get_ydata()) == [0.5, 0.5] and list(kept.get_xdata()) == [1, 1]
    assert "epoch 1 kept" in ax.texts[0].get_text()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize("epochs", [1, 2, 3, 200])
def test_epochs_are_whole_and_small_rates_are_written_out(epochs):
    rates = np.linspace(3e-5, 1e-5, epochs)
    with figures.style():
        ax = figures.chart([figures.Line("", np.arange(1.0, epochs + 1), rates)], "learning rate", best=1).axes[0]
        ticks = [text.get_text() for text in ax.get_xticklabels()]
        written = [text.get_text() for text in ax.get_yticklabels()]
    assert "1" in ticks or epochs == 200
    assert all(tick.lstrip("\N{MINUS SIGN}").isdigit() for tick in ticks)
    assert all(re.fullmatch(r"-?\d(\.\d+)?(e-[56])?", text) for text in written) and ax.get_legend() is None


def test_residuals_count_every_image_and_mark_their_mean():
    off = noisy("q") - MOS["q"]
    with figures.style():
        ax = figures.residuals(off, "quality").axes[0]
    outline = ax.patches[0].get_path().vertices
    counts, edges = np.histogram(off, bins=min(40, max(5, int(np.sqrt(NUM_IMAGES)) + 1)))
    assert outline[:, 1].max() == counts.max() and outline[:, 0].min() == edges[0]
    assert ax.lines[1].get_xdata()[0] == pytest.approx(off.mean())


def test_generators_keep_their_order_from_the_top():
    names, values = ["worst", "best"], np.array([-0.1, 0.9])
    with figures.style():
        bars = figures.generator_srocc(names, values).axes[0]
        means = figures.generator_means(names, np.array([1.0, 4.0]), np.array([2.0, 3.0])).axes[0]
    assert [bar.get_width() for bar in bars.patches] == values.tolist() and bars.get_ylim() == (1.6, -0.6)
    assert [text.get_text() for text in bars.get_yticklabels()] == names and bars.get_xlim() == (-0.1, 1)
    assert [line.get_xdata().tolist() for line in means.lines] == [[1, 4], [2, 3]]


def test_drawing_leaves_matplotlibs_settings_alone_and_ignores_the_users():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "xtick.labelsize": 41}):
        with figures.style():
            svg = figures.to_svg(figures.generator_srocc(["a$b$"], np.array([0.5])), "x", "y")
        assert matplotlib.rcParams["font.size"] == 30
    assert "a$b$" in svg and "41px" not in svg and "font-size: 9.5px" in svg.replace("font: 9.5px", "font-size: 9.5px")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("label", "shown"),
    [("plain", "plain"), ("a\nb\u202e\0c", "a b c"), ("x" * 30, "x" * 21 + "…"), ("x" * 22, "x" * 22), ("", "")],
)
def test_labels_are_one_line_and_clipped(label, shown):
    assert figures.shorten(label) == shown


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.12345, "0.123"), (-0.5, "−0.500"), (-0.0001, "0.000"), (None, "–"), (float("nan"), "–"), ("x", "–")],
)
def test_numbers_are_written_for_people(value, said):
    assert report.number(value) == said


def test_a_page_of_ten_thousand_images_stays_small(run):
    def many(table: pd.DataFrame) -> pd.DataFrame:
        whole = pd.concat([table[table["split"] == "test"]] * 209, ignore_index=True)
        rng = np.random.default_rng(0)
        columns = ["mos_quality", "pred_quality", "mos_align", "pred_align"]
        whole[columns] = whole[columns].astype(float) + rng.normal(0, 0.5, (len(whole), 4))
        return whole.assign(name=[f"{i}.png" for i in range(len(whole))])

    change(run, "predictions.csv", many)
    assert report.write_report(run).stat().st_size < 1_500_000
    assert "10032 images" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_a_run_of_the_trainer_itself_can_be_shown(demo_set, tmp_path):
    import baseline

    csv_file, images = demo_set
    flags = ["--data_csv_path", str(csv_file), "--image_base_dir", str(images), "--clip_model", "tiny"]
    flags += ["--clip_pretrained", "assets", "--freeze_clip", "--epochs", "2", "--output_dir", str(tmp_path / "run")]
    results = baseline.main([*flags, "--cache_dir", str(tmp_path / "cache")])
    page = page_of(tmp_path / "run")
    row = page.tables["scores beside the floors"][1]
    assert row[1:4] == [
        "trained model",
        *(c.replace("-", "−") for c in cells(*(results["test"][k] for k in ("srocc_q", "plcc_q")))),
    ]
