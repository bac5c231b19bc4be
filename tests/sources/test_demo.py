"""`demo`: a set that is reproducible, well-formed, labelled by what was done to the pictures, no use to cheats."""

from __future__ import annotations

import csv
import multiprocessing
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from sources import demo
from storage import locks

NUM_PROMPTS = 4


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory) -> tuple[Path, Path]:
    return demo.write_demo_set(tmp_path_factory.mktemp("parent") / "demo", num_prompts=NUM_PROMPTS)


@pytest.fixture(scope="module")
def drafts() -> list[demo.Draft]:
    return demo.plan_demo_set()


def read_rows(csv_path: Path) -> list[dict[str, str]]:
    with open(csv_path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def drawn(scene: demo.Scene, levels: dict[str, float]) -> np.ndarray:
    return demo.degrade(demo.draw_scene(scene, np.random.default_rng(5)), levels, np.random.default_rng(6))


def sharpness(image: np.ndarray) -> float:
    return float(np.abs(np.diff(image.astype(np.float64), axis=1)).mean())


# -- the files


def test_same_seed_gives_same_bytes_and_another_seed_does_not(demo_set, tmp_path):
    first = all_bytes(demo_set[0].parent)
    assert len(first) == 1 + NUM_PROMPTS * len(demo.GENERATORS)
    demo.write_demo_set(tmp_path / "again", num_prompts=NUM_PROMPTS)
    assert all_bytes(tmp_path / "again") == first
    demo.write_demo_set(tmp_path / "other", num_prompts=1, seed=1)
    assert not any(data == first[name] for name, data in all_bytes(tmp_path / "other").items())


def test_draws_once(demo_set):
    before = {path: path.stat().st_mtime_ns for path in demo_set[0].parent.rglob("*")}
    assert demo.write_demo_set(demo_set[0].parent, num_prompts=2, seed=9) == demo_set
    assert {path: path.stat().st_mtime_ns for path in demo_set[0].parent.rglob("*")} == before


def test_csv_and_names_are_well_formed(demo_set):
    csv_path, image_dir = demo_set
    assert (csv_path.name, image_dir.name) == ("data.csv", "images")
    rows = read_rows(csv_path)
    assert tuple(rows[0]) == ("name", "prompt", "mos_quality", "mos_align", "explanation")
    assert sorted(row["name"] for row in rows) == sorted(path.name for path in image_dir.iterdir())
    assert all(re.fullmatch(r"[a-z0-9_]+_\d+\.(png|jpg)", row["name"]) for row in rows)
    generators = {row["name"].rpartition("_")[0] for row in rows}
    assert generators == {generator.name for generator in demo.GENERATORS}
    assert "delta_fast" in generators
    for row in rows:
        with Image.open(image_dir / row["name"]) as image:
            assert (image.mode, image.size) == ("RGB", (256, 256))
    # Every prompt is drawn by every generator; training mirrors pictures, so no prompt may name a side.
    prompts = [row["prompt"] for row in rows]
    assert all(prompts.count(prompt) == len(demo.GENERATORS) for prompt in prompts)
    assert not any(re.search(r"\b(left|right)\b", prompt) for prompt in prompts)
    explained = [bool(row["explanation"]) for row in rows]
    assert any(explained)
    assert not all(explained)


def test_a_crash_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    drafts_left = [5]
    honest = demo.degrade

    def crash(*args):
        drafts_left[0] -= 1
        if drafts_left[0] == 0:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(demo, "degrade", crash)
    with pytest.raises(KeyboardInterrupt):
        demo.write_demo_set(tmp_path / "demo", num_prompts=2)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    csv_path, image_dir = demo.write_demo_set(tmp_path / "demo", num_prompts=2)
    assert len(read_rows(csv_path)) == len(list(image_dir.iterdir())) == 2 * len(demo.GENERATORS)


def test_half_a_set_and_bad_arguments_are_refused(tmp_path):
    half = tmp_path / "half"
    (half / "images").mkdir(parents=True)
    (half / "images" / "alpha_000.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(str(half))):
        demo.write_demo_set(half)
    with pytest.raises(ValueError, match="num_prompts is 0"):
        demo.write_demo_set(tmp_path / "none", num_prompts=0)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "demo").mkdir()
    assert demo.write_demo_set(tmp_path / "demo", num_prompts=1)[0].exists()


def test_a_quicker_process_wins_where_folders_cannot_be_locked(tmp_path, monkeypatch):
    @contextmanager
    def without_lock(folder, wait):
        folder.mkdir(parents=True, exist_ok=True)
        yield False

    monkeypatch.setattr(demo, "locked", without_lock)
    folder = tmp_path / "demo"
    honest = os.replace

    def lose(source, target):
        monkeypatch.setattr(os, "replace", honest)
        demo.write_demo_set(folder, num_prompts=1, seed=3)
        honest(source, target)

    monkeypatch.setattr(os, "replace", lose)
    csv_path, _ = demo.write_demo_set(folder, num_prompts=2)
    assert len(read_rows(csv_path)) == len(demo.GENERATORS)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_who_has_locked_the_folder_around_it_can_draw(tmp_path):
    with locks.locked(tmp_path, wait=None), ThreadPoolExecutor(1) as pool:
        csv_path, _ = pool.submit(demo.write_demo_set, tmp_path / "demo", num_prompts=1).result(60)
    assert len(read_rows(csv_path)) == len(demo.GENERATORS)


def draw(folder: Path, begun: Any, may_go_on: Any) -> None:
    """Another process that draws, and stops for a while at its third picture."""
    honest, drawn = demo.degrade, []

    def degrade(*args):
        drawn.append(1)
        if len(drawn) == 3:
            begun.set()
            may_go_on.wait(600)
        return honest(*args)

    demo.degrade = degrade
    demo.write_demo_set(folder, num_prompts=2)


@pytest.mark.slow
def test_a_process_that_is_killed_while_drawing_leaves_nothing_and_one_that_waits_draws_nothing(tmp_path, monkeypatch):
    folder, context = tmp_path / "demo", multiprocessing.get_context("spawn")
    processes, events = [], []
    for _ in range(2):
        events.append((context.Event(), context.Event()))
        processes.append(context.Process(target=draw, args=(folder, *events[-1]), daemon=True))
        processes[-1].start()
        assert events[-1][0].wait(120)
        assert list(folder.iterdir()) == [] and len(list(tmp_path.iterdir())) == 2  # half a set, under another name
        if len(processes) == 1:
            processes[0].kill()
            processes[0].join(60)

    said = []
    monkeypatch.setattr("builtins.print", lambda text, **how: said.append(text) or events[1][1].set())
    monkeypatch.setattr(demo, "_draw_demo_set", None)
    csv_path, image_dir = demo.write_demo_set(folder, num_prompts=2)
    processes[1].join(60)
    assert said == ["note      another run draws the demo set: waiting for it"]
    assert len(read_rows(csv_path)) == len(list(image_dir.iterdir())) == 2 * len(demo.GENERATORS)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


# -- the labels


@pytest.mark.parametrize(("label", "flaw"), [("mos_quality", "severity"), ("mos_align", "mismatch")])
def test_labels_spread_and_follow_the_flaw(drafts, label, flaw):
    scores = np.array([getattr(draft, label) for draft in drafts])
    flaws = np.array([getattr(draft, flaw) for draft in drafts])
    assert 1 <= scores.min() < 1.4
    assert 4.6 < scores.max() <= 5
    assert (np.histogram(scores, bins=[1, 2, 3, 4, 5])[0] > 0.1 * len(scores)).all()
    assert -1 < spearmanr(flaws, scores)[0] < -0.93  # raters disagree, and quality tells on consistency


@pytest.mark.parametrize("label", ["mos_quality", "mos_align"])
def test_generator_names_and_prompts_alone_predict_little(drafts, label):
    """A model has to look: what can be known without pixels ranks the pictures poorly."""
    scores = np.array([getattr(draft, label) for draft in drafts])
    makers = np.array([draft.name.rpartition("_")[0] for draft in drafts])
    prompts = np.array([draft.prompt for draft in drafts])
    floors = []
    for fold in range(4):
        asked = np.isin(prompts, np.unique(prompts)[fold::4])
        means = {maker: scores[~asked & (makers == maker)].mean() for maker in set(makers)}
        floors.append(spearmanr([means[maker] for maker in makers[asked]], scores[asked])[0])
    assert 0.1 < np.mean(floors) < 0.45
    assert abs(spearmanr([len(prompt) for prompt in prompts], scores)[0]) < 0.2


def test_quality_and_consistency_are_different_questions(drafts):
    assert abs(spearmanr([d.severity for d in drafts], [d.mismatch for d in drafts])[0]) < 0.15
    assert 0 < spearmanr([d.mos_quality for d in drafts], [d.mos_align for d in drafts])[0] < 0.4


def test_mismatch_counts_what_was_drawn_wrong(drafts):
    """The recorded mismatch is the weight of the attributes that differ; a lost group counts whole."""
    scenes = demo.demo_scenes()
    for i, draft in enumerate(drafts):
        asked, shown = scenes[i // len(demo.GENERATORS)], draft.shown
        assert draft.prompt in [demo.caption(asked, t) for t in demo.DEMO_VOCABULARY.templates]
        wrong = total = 0.0
        for name, index in demo.slots(asked):
            was = asked.groups[index] if index >= 0 else asked
            now = shown if index < 0 else shown.groups[index] if index < len(shown.groups) else None
            total += demo.PENALTIES[name]
            wrong += demo.PENALTIES[name] * (now is None or getattr(was, name) != getattr(now, name))
        assert draft.mismatch == pytest.approx(wrong / total)
        assert (draft.mismatch == 0) == (asked == shown)


# -- the pictures


@pytest.mark.parametrize("kind", list(demo.ANNOYANCE))
def test_a_stronger_degradation_is_measurably_worse(kind):
    scene = demo.Scene((demo.Group(2, "red", "star"),), "checkered", "blue")
    clean = drawn(scene, {}).astype(np.float64)
    images = [drawn(scene, {kind: level}) for level in (0.15, 0.5, 1.0)]
    errors = [np.abs(image - clean).mean() for image in images]
    assert 0 < errors[0] < errors[1] < errors[2]
    if kind in ("blur", "fading"):
        assert sharpness(images[0]) > sharpness(images[1]) > sharpness(images[2])
    severities = [demo.total_severity({kind: level}) for level in (0.0, 0.15, 0.5, 1.0)]
    assert severities == sorted(set(severities))


def test_severity_is_what_was_asked_for():
    rng = np.random.default_rng(0)
    for severity in np.linspace(0, 0.8, 30):
        levels = demo.random_levels(float(severity), rng)
        assert demo.total_severity(levels) == pytest.approx(severity, abs=0.05)
        assert all(0 < level <= 1 for level in levels.values())


def test_each_attribute_can_be_altered_alone_and_is_seen():
    rng = np.random.default_rng(0)
    for _ in range(4):
        scene = demo.random_scene(rng, demo.DEMO_VOCABULARY)
        for slot in demo.slots(scene):
            other = demo.alter(scene, slot, rng, demo.DEMO_VOCABULARY)
            differing = [
                (attribute, i)
                for attribute, i in demo.slots(scene)
                if getattr((scene if i < 0 else scene.groups[i]), attribute)
                != getattr((other if i < 0 else other.groups[i]), attribute)
            ]
            assert differing == [slot]
            assert not np.array_equal(drawn(scene, {}), drawn(other, {}))


def test_captions_read_naturally():
    scene = demo.Scene((demo.Group(1, "orange", "ring"), demo.Group(2, "blue", "cross")), "striped", "green")
    text = demo.caption(scene, demo.DEMO_VOCABULARY.templates[0])
    assert text == "an orange ring and two blue crosses on a striped green background"
