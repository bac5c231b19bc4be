"""`frozen_clip` in whole runs: cached activations change nothing, and are computed when they must be and only then."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import baseline
import models
from backbones import loading, towers
from evaluation import probes
from inputs import image_sources, image_store
from storage import feature_cache

pytestmark = pytest.mark.usefixtures("trained_weights_are_kept")

EPOCHS, VIEWS = 2, 1
IMAGE_LAYERS, TEXT_LAYERS, LAYERS = 5, 2, 3  # of the image tower the first LAYERS are frozen, and all of the text tower
TOLERANCE = 1e-5
# The correlation loss would magnify rounding. No cache is looked at in a report.
SMALL = "--image_size 32 --batch_size 16 --lr 5e-4 --loss mse --no_report"
PARTIAL = f"{SMALL} --partial_freeze --freeze_layers {LAYERS}"
BASE = f"{PARTIAL} --epochs 1 --cache_views {VIEWS}"


@dataclass
class Data:
    """A data set of one's own to change: a table with folds, and a folder of images."""

    table: pd.DataFrame
    folder: Path

    def flags(self, csv_path: Path) -> list[str]:
        self.table.to_csv(csv_path, index=False)
        return ["--data_csv_path", str(csv_path), "--image_base_dir", str(self.folder)]

    def path(self, fold: str) -> Path:
        """An image of a fold."""
        return self.folder / self.table["name"][self.table["split"] == fold].iloc[0]

    def size(self, fold: str) -> int:
        return int((self.table["split"] == fold).sum())


@dataclass(frozen=True)
class Run:
    """What a run has left."""

    folder: Path
    results: dict[str, Any]

    @property
    def losses(self) -> pd.DataFrame:
        table = pd.read_csv(self.folder / "metrics.csv")
        return table.drop(columns=["seconds", "images_per_s", "data_wait"])

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "best" / "model.safetensors")

    @property
    def predictions(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "predictions.csv").set_index("name")[["pred_quality", "pred_align"]]


def assert_same(one: Run, other: Run, tolerance: float) -> None:
    """Losses, weights and predictions agree; with tolerance 0 bit for bit."""
    np.testing.assert_allclose(one.losses, other.losses, rtol=0, atol=tolerance)
    mine, others = one.weights, other.weights
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        if tolerance and name.endswith("in_proj_bias"):
            # No score depends on the keys' bias: its gradient is rounding, which Adam makes steps of.
            value[len(value) // 3 : 2 * len(value) // 3] = others[name][len(value) // 3 : 2 * len(value) // 3]
        torch.testing.assert_close(value, others[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")
    np.testing.assert_allclose(one.predictions, other.predictions, rtol=0, atol=10 * tolerance)


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """To build CLIP's tokenizer takes as long as a run of these tests does otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A folder with a small CLIP, whose weights are always the same."""
    vision = {"image_size": 32, "layers": IMAGE_LAYERS, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": TEXT_LAYERS}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def pictures(demo_set, tmp_path_factory) -> Path:
    """The pictures of the demo set, small. They must not be changed."""
    folder = tmp_path_factory.mktemp("pictures")
    for path in demo_set[1].iterdir():
        with Image.open(path) as image:
            image.resize((48, 48)).save(folder / path.name, "PNG")
    return folder


@pytest.fixture(scope="module")
def folds(demo_set) -> pd.DataFrame:
    """The demo set's table, with the folds that a run would draw."""
    table = pd.read_csv(demo_set[0])
    prompts = table["prompt"].unique()
    assert len(prompts) == 8
    fold_of = dict(zip(prompts, ["train"] * 5 + ["val"] + ["test"] * 2, strict=True))
    return table.assign(split=table["prompt"].map(fold_of))


@pytest.fixture
def dataset(folds, pictures) -> Data:
    """The demo set. Its images must not be changed."""
    return Data(folds.copy(), pictures)


@pytest.fixture
def own_images(dataset, tmp_path) -> Data:
    """The demo set with images of one's own."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in dataset.folder.iterdir():
        os.link(path, folder / path.name)
    return Data(dataset.table, folder)


def run_in(place: Path, data: Data, clip: Path, flags: str, name: str, cache: Path) -> Run:
    folder = place / name
    paths = [*data.flags(place / f"{name}.csv"), "--output_dir", str(folder), "--cache_dir", str(cache)]
    return Run(folder, baseline.main([*paths, "--clip_model", f"local-dir:{clip}", *shlex.split(flags)]))


@pytest.fixture
def train(tmp_path, dataset, clip) -> Callable[..., Run]:
    """A function that trains in this test's cache folder."""

    def run(flags: str = BASE, name: str = "run", data: Data = dataset, cache: str = "cache") -> Run:
        return run_in(tmp_path, data, clip, flags, name, tmp_path / cache)

    return run


@pytest.fixture(scope="module")
def plain(folds, pictures, clip, tmp_path_factory) -> Callable[[str], Run]:
    """A function that gives the run with some flags that caches nothing."""

    @functools.cache
    def run(flags: str) -> Run:
        place = tmp_path_factory.mktemp("plain")
        found = run_in(place, Data(folds, pictures), clip, f"{flags} --no_cache", "run", place / "cache")
        assert not (place / "cache").exists()
        return found

    return run


@pytest.fixture
def computed(monkeypatch) -> Counter[str]:
    """How many rows were added to caches since it was cleared.

    Of "evaluation" and "training" views, of "text", and of "statistics" of images, which are written at a run's end.
    """
    counts: Counter[str] = Counter()
    add = feature_cache.FeatureSet.add

    def counted(self: feature_cache.FeatureSet, keys: list[str], values: torch.Tensor) -> None:
        recipe = json.loads(self.recipe)
        view = recipe.get("view", "statistics" if "what" in recipe else recipe["input"])
        counts["training" if isinstance(view, Mapping) else view] += len(keys)
        add(self, keys, values)

    monkeypatch.setattr(feature_cache.FeatureSet, "add", counted)
    return counts


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The images that were read to be decoded."""
    found: list[int] = []
    read = image_store.ImageStore.read
    monkeypatch.setattr(image_store.ImageStore, "read", lambda store, row: found.append(row) or read(store, row))
    return found


@pytest.fixture
def passes(monkeypatch) -> dict[str, list[tuple[int, int, torch.Tensor]]]:
    """(start, stop, input) of every pass through some stages of a tower: "image" and "text"."""
    found: dict[str, list[tuple[int, int, torch.Tensor]]] = {"image": [], "text": []}
    run_image, run_text = towers.run_image, towers.run_text

    def image(visual: Any, x: torch.Tensor, start: int, stop: int, *observer: Any) -> torch.Tensor:
        if start < stop:
            found["image"].append((start, stop, x.detach().clone()))
        return run_image(visual, x, start, stop, *observer)

    def text(tower: Any, x: torch.Tensor, tokens: Any, start: int, stop: int) -> torch.Tensor:
        if start < stop:
            found["text"].append((start, stop, x.detach().clone()))
        return run_text(tower, x, tokens, start, stop)

    monkeypatch.setattr(towers, "run_image", image)
    for module in (towers, models):  # the one runs what is frozen for the cache, the other all else
        monkeypatch.setattr(module, "run_text", text)
    return found


# -- exactness


@pytest.mark.parametrize(
    "flags",
    [
        "--freeze_clip --use_explanations",
        f"--partial_freeze --freeze_layers {LAYERS}",
        f"--unfreeze_schedule {LAYERS + 1}@0,{LAYERS}@1",
        pytest.param("--freeze_clip", marks=pytest.mark.slow),
        # The text tower is shallower, and trained here.
        pytest.param("--partial_freeze --freeze_layers 1", marks=pytest.mark.slow),
        pytest.param(f"--partial_freeze --freeze_layers {LAYERS} --lora_rank 2", marks=pytest.mark.slow),
        pytest.param(
            f"--partial_freeze --freeze_layers {LAYERS} --ema_decay 0.5 --gradient_accumulation_steps 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_as_many_cached_views_as_epochs_change_nothing(train, plain, flags):
    cached = train(f"{SMALL} {flags} --epochs {EPOCHS} --cache_views {EPOCHS}")
    assert list(cached.folder.parent.glob("cache/**/*.safetensors"))
    assert "stage_mean" in cached.weights  # statistics of stages are read
    assert cached.results["best_epoch"] > 0
    assert_same(cached, plain(f"{SMALL} {flags} --epochs {EPOCHS}"), TOLERANCE)


def test_data_without_prompts_are_cached_as_exactly(train, dataset):
    dataset.table = dataset.table[["name", "mos_quality", "split"]]
    cached = train(f"{PARTIAL} --epochs {EPOCHS} --cache_views {EPOCHS}", "cached")
    assert_same(cached, train(f"{PARTIAL} --epochs {EPOCHS} --no_cache", "plain"), TOLERANCE)


@pytest.mark.parametrize("flags", [PARTIAL, pytest.param(f"{SMALL} --freeze_clip", marks=pytest.mark.slow)])
def test_a_warm_cache_gives_identical_results_decodes_nothing_and_runs_no_frozen_layer(train, decoded, passes, flags):
    flags = f"{flags} --epochs {EPOCHS} --cache_views {VIEWS}"
    first = train(flags, "first")
    assert decoded
    decoded.clear()
    for seen in passes.values():
        seen.clear()
    second = train(flags, "second")
    assert_same(first, second, 0)
    assert decoded == []
    # Of each tower one row runs, for the shape of what comes out.
    for name, seen in passes.items():
        (probe,) = [x for start, _, x in seen if start == 0]
        assert len(probe) == 1
        assert name == "text" or not probe.any()
    later = {start for seen in passes.values() for start, _, _ in seen} - {0}
    assert later == (set() if "--freeze_clip" in flags else {LAYERS, TEXT_LAYERS})


def test_without_cached_views_every_epoch_trains_on_the_evaluation_view(train, views_seen):
    train(f"{PARTIAL} --epochs {EPOCHS} --cache_views 0")
    assert set(views_seen) == {None, *range(EPOCHS)}
    for epoch in range(EPOCHS):
        for row, x in views_seen[epoch].items():
            assert torch.equal(x, views_seen[None][row])


def test_epochs_cycle_through_the_cached_views(train, views_seen):
    train(f"{PARTIAL} --epochs 3 --cache_views 2")
    first, second, third = (views_seen[epoch] for epoch in range(3))
    assert first.keys() == second.keys() == third.keys()
    assert all(torch.equal(x, third[row]) for row, x in first.items())
    for other in (second, views_seen[None]):  # now and then a random crop is the whole image
        assert sum(torch.equal(x, other[row]) for row, x in first.items()) < len(first) / 4


@pytest.fixture
def views_seen(monkeypatch) -> dict[int | None, dict[int, torch.Tensor]]:
    """View that was asked for -> row of the data set -> the activations and statistics that were given."""
    seen: dict[int | None, dict[int, torch.Tensor]] = {}
    finish = image_sources.CachedSource.finish

    def recorded(
        self: image_sources.CachedSource, prepared: torch.Tensor, rows: np.ndarray, view: Any
    ) -> dict[str, torch.Tensor]:
        given = finish(self, prepared, rows, view)
        assert given.keys() == {"image", "statistics"}
        x = torch.cat([values.flatten(1) for values in given.values()], dim=1)
        seen.setdefault(view, {}).update({int(row): value.clone() for row, value in zip(rows, x, strict=True)})
        return given

    monkeypatch.setattr(image_sources.CachedSource, "finish", recorded)
    return seen


def test_a_frozen_text_tower_sees_each_distinct_prompt_once(train, dataset, passes):
    train(f"{SMALL} --freeze_clip --epochs {EPOCHS}")
    rows = Counter(bytes(tokens.numpy()) for start, _, x in passes["text"] for tokens in x if start == 0)
    assert len(rows) == dataset.table["prompt"].nunique()
    assert rows.total() <= len(rows) + 1  # one of them once more, for the shape
    assert {start for start, _, _ in passes["text"]} == {0}


# -- keys


@pytest.fixture(scope="module")
def warm(folds, pictures, clip, tmp_path_factory) -> Path:
    """The cache folder of a finished run with BASE. Copy it, do not change it."""
    place = tmp_path_factory.mktemp("warm")
    run_in(place, Data(folds, pictures), clip, BASE, "run", place / "cache")
    return place / "cache"


class Cached(Exception):
    """A run has come as far as its cache."""


@pytest.fixture
def again(warm, tmp_path, train, computed, monkeypatch) -> Callable[..., dict[str, int]]:
    """A function that starts another run on the warm cache, and returns how many rows of what it computed."""
    shutil.copytree(warm, tmp_path / "cache")

    def stop(*arguments: Any, **options: Any) -> None:
        raise Cached

    def run(flags: str = "", **options: Any) -> dict[str, int]:
        monkeypatch.setattr(probes, "fit_base", stop)  # what comes next
        with pytest.raises(Cached):
            train(f"{BASE} {flags}", **options)
        return {kind: count for kind, count in computed.items() if count}

    return run


ALL = {"evaluation": 64, "training": 40 * VIEWS, "text": 8}
STATISTICS = {"statistics": 64}
NO_TEXT = {"evaluation": 64, "training": 40 * VIEWS}
TRAINING = {"training": 40 * VIEWS}


def test_a_cold_cache_computes_each_row_once(train, computed, dataset):
    train()
    prompts = dataset.table["prompt"].nunique()
    assert computed == {
        "evaluation": len(dataset.table),
        "training": VIEWS * dataset.size("train"),
        "text": prompts,
        "statistics": len(dataset.table),
    }
    assert computed == ALL | STATISTICS


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--lr 1e-4 --epochs 2 --batch_size 8 --dropout 0.3 --loss mse+plcc --w_q 0.3 --select_by srocc_q",
        "--no_residual_learning --label_smoothing 0.1 --weight_decay 0.1",
        "--lora_rank 2",  # behind the frozen blocks, where it changes nothing of what enters
        "--cache_dtype float32",  # what "auto" is on a CPU
        "--cache_max_gb 1 --image_memory_gb 0 --num_workers 2",
        f"--cache_views {VIEWS + 1}",  # no epoch would see the one that is new
        "--base cosine",
    ],
)
def test_what_cannot_change_the_cached_values_computes_nothing(again, flags):
    found = again(flags)
    assert found == ({"text": 8} if "lora" in flags else {})  # LoRA leaves the shallower text tower frozen as a whole


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--seed 7", TRAINING),
        ("--crop_scale_min 0.5", TRAINING),
        ("--no_horizontal_flip", TRAINING),
        (f"--cache_views {VIEWS + 1} --epochs {VIEWS + 1}", TRAINING),  # only the one that is new
        (f"--freeze_layers {LAYERS - 1}", NO_TEXT),  # of the text tower all blocks stay frozen
        ("--freeze_layers 1", ALL),
        ("--stage_features off", NO_TEXT),
        ("--cache_dtype bf16", ALL),
        ("--amp bf16", ALL),
        ("--no_partial_freeze --freeze_clip", ALL),
    ],
)
def test_what_changes_some_of_the_cached_values_computes_those(again, flags, expected):
    assert again(flags) == expected


def test_another_image_size_computes_all_images(again):
    found = again("--image_size 48")
    assert {kind: found[kind] for kind in NO_TEXT} == NO_TEXT


@pytest.mark.parametrize(
    "flags",
    [
        "--cache_dtype bf16",
        pytest.param("--cache_dtype fp16", marks=pytest.mark.slow),
        pytest.param("--cache_dtype fp16 --amp bf16", marks=pytest.mark.slow),
    ],
)
def test_a_cache_in_half_precision_trains_nearly_the_same(train, plain, flags):
    whole, half = plain(f"{PARTIAL} --epochs 1").losses, train(f"{BASE} {flags}").losses
    columns = [name for name in whole if "loss" in name]
    np.testing.assert_allclose(half[columns], whole[columns], atol=2e-3)
    assert not np.allclose(half[columns], whole[columns], rtol=0, atol=1e-7)


def test_embeddings_stay_in_float32_whatever_type_is_asked_for(train, computed):
    train(f"{SMALL} --freeze_clip --epochs 1 --cache_views 0", "first")
    assert computed == {"evaluation": 64, "text": 8} | STATISTICS
    computed.clear()
    second = train(f"{SMALL} --freeze_clip --epochs 1 --cache_views 0 --cache_dtype bf16", "second")
    assert not computed
    types = {load_file(path)["values"].dtype for path in second.folder.parent.glob("cache/**/*.safetensors")}
    assert types == {torch.float32}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("visual.transformer.resblocks.0.mlp.c_fc.weight", NO_TEXT),
        (f"visual.transformer.resblocks.{LAYERS - 1}.ln_2.bias", NO_TEXT),
        ("visual.class_embedding", NO_TEXT),
        ("text.token_embedding.weight", {"text": 8}),
        (f"visual.transformer.resblocks.{LAYERS}.ln_1.weight", {}),
        ("visual.proj", {}),
        ("text.ln_final.weight", {}),
    ],
)
def test_one_changed_weight_computes_the_tower_it_freezes_in(again, monkeypatch, name, expected):
    load = loading.load_backbone

    def changed(*arguments: Any, **options: Any) -> loading.Backbone:
        backbone = load(*arguments, **options)
        with torch.no_grad():
            backbone.clip.get_parameter(name).view(-1)[-1].add_(1e-3)
        return backbone

    monkeypatch.setattr(loading, "load_backbone", changed)
    assert again() == expected


@pytest.mark.parametrize(
    ("fold", "expected"),
    [("train", {"evaluation": 1, "training": VIEWS}), ("test", {"evaluation": 1})],
)
def test_one_changed_pixel_computes_the_image_it_is_in(again, own_images, fold, expected):
    path = own_images.path(fold)
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[0, 0, 0] ^= 1
    path.unlink()  # a link to the demo set
    Image.fromarray(pixels).save(path)
    assert again(data=own_images) == expected


def test_images_are_known_by_their_content_not_their_name_or_place(again, own_images):
    for path in list(own_images.folder.iterdir()):
        path.rename(path.with_name(f"moved_{path.name}"))
    own_images.table["name"] = "moved_" + own_images.table["name"]
    assert again(data=own_images) == {}


def test_another_order_of_the_table_computes_nothing(again, dataset):
    dataset.table = dataset.table[::-1]
    assert again() == {}


def test_a_dropped_row_computes_nothing(again, dataset):
    dataset.table = dataset.table.drop(index=[1, 60])
    assert again() == {}


def test_an_added_row_computes_itself(again, own_images):
    path = own_images.path("train")
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(own_images.folder / "added.png")
    row = own_images.table.iloc[[0]].assign(name="added.png", prompt="a cat", split="train")
    own_images.table = pd.concat([row, own_images.table])
    assert again(data=own_images) == {"evaluation": 1, "training": VIEWS, "text": 1}


def test_an_image_that_comes_into_the_training_fold_computes_its_training_views(again, dataset):
    place = dataset.table.index[dataset.table["split"] == "test"][0]
    dataset.table.loc[place, "split"] = "train"
    assert again() == {"training": VIEWS}


def test_thawing_caches_what_leaves_fewer_layers(train, computed):
    train(f"{SMALL} --unfreeze_schedule {LAYERS + 1}@0,{LAYERS}@1 --epochs {EPOCHS} --cache_views {VIEWS}")
    assert computed == {"evaluation": 2 * 64, "training": 2 * 40 * VIEWS, "text": 8} | STATISTICS


# -- room, damage, company


@pytest.mark.parametrize("max_gb", ["0", "2e-5"])
def test_what_does_not_fit_is_computed_anew_and_said(train, plain, computed, capsys, max_gb):
    small = train(f"{PARTIAL} --epochs {EPOCHS} --cache_views {EPOCHS} --cache_max_gb {max_gb}")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cache")]
    assert len(said) == 1 and "images not: would take" in said[0] and "--cache_max_gb" in said[0]
    assert ("prompts not: would take" in said[0]) == (max_gb == "0")
    assert computed == ({} if max_gb == "0" else {"text": 8} | STATISTICS)  # these are small enough
    assert_same(small, plain(f"{PARTIAL} --epochs {EPOCHS}"), TOLERANCE)


def test_a_damaged_segment_is_said_and_computed_anew(train, computed, capsys):
    first = train(name="first")
    assert "damaged, not used" not in capsys.readouterr().out
    for path in (first.folder.parent / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    computed.clear()
    second = train(name="second")
    assert computed == ALL | STATISTICS
    assert capsys.readouterr().out.count("damaged, not used") == 4
    assert_same(first, second, 0)


def test_a_cache_folder_that_cannot_be_written_is_one_line_and_exit_code_2(train, tmp_path, capsys):
    (tmp_path / "file").write_text("a file in the folder's place")
    with pytest.raises(SystemExit) as error:
        train(cache="file")
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "--cache_dir" in said and "choose another folder" in said and said.count("\n") == 1


@pytest.mark.slow
def test_two_runs_at_once_may_share_a_cache(dataset, clip, train, computed, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ["--clip_model", f"local-dir:{clip}", *shlex.split(BASE), "--cache_dir", str(tmp_path / "cache")]
    command = [sys.executable, str(ROOT / "baseline.py"), *flags]
    runs = [Run(tmp_path / name, {}) for name in ("one", "other")]
    started = [
        subprocess.Popen(
            [*command, *dataset.flags(tmp_path / f"{run.folder.name}.csv"), "--output_dir", str(run.folder)],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for run in runs
    ]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "damaged, not used" not in out
    third = train()
    assert not computed
    for run in runs:
        assert_same(run, third, 0)
    assert_each_row_is_stored_once(tmp_path / "cache")


def assert_each_row_is_stored_once(cache: Path) -> None:
    """And nothing lies about that was not finished."""
    recipes = list((cache / "features").iterdir())
    assert recipes
    for folder in recipes:
        stored = [load_file(path)["keys"].numpy() for path in folder.glob("*.safetensors")]
        keys = [row.tobytes() for part in stored for row in part]
        assert keys and len(keys) == len(set(keys)), json.loads((folder / feature_cache.RECIPE_FILE).read_text())
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".safetensors", ".json"}


SLOW = """
import sys, time

sys.path.insert(0, sys.argv[1])
import baseline
from storage import feature_cache

save = feature_cache.save_file


def hang(tensors, path):
    save(tensors, path)
    saved.append(path)
    if len(saved) == 3:
        open("hangs", "w").close()
        time.sleep(600)


saved = []
feature_cache.SEGMENT_BYTES, feature_cache.save_file = 1, hang
baseline.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_after_a_run_that_was_killed_while_filling_the_next_computes_the_rest(
    dataset, clip, train, plain, computed, tmp_path
):
    flags = [*dataset.flags(tmp_path / "killed.csv"), "--clip_model", f"local-dir:{clip}", *shlex.split(BASE)]
    flags += ["--cache_dir", str(tmp_path / "cache")]
    command = [sys.executable, "-c", SLOW, str(ROOT), *flags, "--output_dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list(tmp_path.glob("cache/**/.*.tmp"))
    found = train()
    assert 0 < computed["evaluation"] < ALL["evaluation"]
    assert_each_row_is_stored_once(tmp_path / "cache")
    assert_same(found, plain(f"{PARTIAL} --epochs 1 --cache_views {VIEWS}"), TOLERANCE)
