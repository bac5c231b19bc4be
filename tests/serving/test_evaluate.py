"""`predict.py --evaluate`: finished runs measured on labelled sets."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from refusals import refusal
from tiny_run import finished_run, loaded

from evaluation import cross_dataset, metrics
from serving import batch_scoring
from serving.commands import parse_predict_args
from serving.scorer import Scorer
from sources.scores import MEASURES
from training import loop

# -- from the command line


@pytest.fixture(scope="module")
def runs(demo_set) -> list[Path]:
    """Two finished runs with different folds. Read them, do not change them."""
    return [finished_run(demo_set), finished_run(demo_set, "--seed", "43")]


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch) -> None:
    """Loading takes most of the time, and is not what is tested here."""
    monkeypatch.setattr(Scorer, "load", lambda path, **_: loaded(Path(path)))


@pytest.fixture
def source(demo_set) -> list[str]:
    """The options that name the demo set."""
    return ["--csv", str(demo_set[0]), "--image_dir", str(demo_set[1])]


def evaluated(run: Path, *flags: str) -> pd.DataFrame:
    """The table of `predict.py --evaluate`."""
    return batch_scoring.evaluate(parse_predict_args(["--checkpoint", str(run), "--evaluate", *flags]))


def assert_own_results(found: pd.DataFrame, run: Path) -> None:
    """The table says of one set what the run said of its test fold."""
    results = json.loads((run / "results.json").read_text())
    assert found["score"].tolist() == ["quality", "consistency"]
    assert found["images"].tolist() == [results["images"]["test"]] * 2
    for row, task in zip(found.to_dict("records"), "qc", strict=True):
        for name in ("srocc", "plcc", "rmse"):
            assert row[name] == pytest.approx(results["test"][f"{name}_{task}"], abs=5e-3)  # a swap of two near ties
        assert [row["srocc_low"], row["srocc_high"]] == (
            pytest.approx(results["certainty"][task]["intervals"]["srocc"], abs=0.05)
        )


def test_a_run_keeps_the_content_of_its_images_in_mind(runs, demo_set):
    splits = pd.read_csv(runs[0] / "splits.csv")
    contents = [(demo_set[1] / name).read_bytes() for name in splits["name"]]
    assert splits["digest"].tolist() == [hashlib.sha256(content).hexdigest() for content in contents]


def test_on_its_own_set_a_run_reaches_what_it_reported_of_its_test_fold(runs, source, capsys):
    assert_own_results(evaluated(runs[0], *source), runs[0])
    assert f"48 of 64 images of data left out: {runs[0]} has seen them" in capsys.readouterr().out


def test_several_raters_of_a_table_from_a_spreadsheet_are_averaged_where_that_is_asked_for(
    runs, demo_set, tmp_path, capsys
):
    table = pd.read_csv(demo_set[0])
    twice = [
        table.assign(**{name: table[name] + sign for name in ("mos_quality", "mos_align")}) for sign in (0.5, -0.5)
    ]
    pd.concat(twice).to_csv(tmp_path / "twice.csv", index=False, sep=";", decimal=",")
    source = ["--csv", str(tmp_path / "twice.csv"), "--image_dir", str(demo_set[1])]
    assert_own_results(evaluated(runs[0], *source, "--duplicates", "mean"), runs[0])
    said = capsys.readouterr().err
    assert "semicolons between columns, decimal commas" in said and "128 rows of 64 image(s) averaged" in said
    with pytest.raises(ValueError, match=r"64 image name\(s\) occur more than once"):
        evaluated(runs[0], *source)


def test_images_that_were_seen_are_known_under_other_names_and_columns(runs, demo_set, tmp_path):
    table = pd.read_csv(demo_set[0])
    names = table["name"].str.replace("_", "-renamed_")
    (tmp_path / "images").mkdir()
    for old, new in zip(table["name"], names, strict=True):
        shutil.copy(demo_set[1] / old, tmp_path / "images" / new)
    usual = {"name": "file", "prompt": "text", "mos_quality": "quality", "mos_align": "match"}
    table.assign(name=names).rename(columns=usual).to_csv(tmp_path / "renamed.csv", index=False)
    columns = shlex.split("--name_column file --prompt_column text --quality_column quality --consistency_column match")
    found = evaluated(
        runs[0], "--csv", str(tmp_path / "renamed.csv"), "--image_dir", str(tmp_path / "images"), *columns
    )
    assert set(found["set"]) == {"renamed"}
    assert_own_results(found, runs[0])


def test_a_moved_checkpoint_is_measured_on_every_image_by_its_unclamped_scores(
    runs, demo_set, source, tmp_path, monkeypatch, capsys
):
    shutil.copytree(runs[0] / "best", tmp_path / "moved" / "best")
    original = loop.predict

    def stretched(*args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        found = original(*args, **kwargs)
        return {task: 0.5 + (values - values.mean()) / values.std() for task, values in found.items()}

    monkeypatch.setattr(loop, "predict", stretched)  # a third of the scores leaves the scale
    found = evaluated(tmp_path / "moved", *source)
    assert "does not tell which images it was trained on" in capsys.readouterr().out
    assert found["images"].tolist() == [64, 64]
    table = pd.read_csv(demo_set[0])
    paths, prompts = [demo_set[1] / name for name in table["name"]], table["prompt"].tolist()
    scorer = loaded(runs[0])
    free, clamped = (scorer.score(paths, prompts, clamp=clamp) for clamp in (False, True))
    for row, mos, column in zip(
        found.to_dict("records"), ("mos_quality", "mos_align"), ("pred_quality", "pred_align"), strict=True
    ):
        expected = metrics.agreement(free[column], table[mos])
        assert {name: row[name] for name in MEASURES} == pytest.approx(expected, abs=1e-3)
        assert row["plcc"] != pytest.approx(metrics.plcc(clamped[column], table[mos]), abs=2e-3)


def koniq(root: Path, num_images: int = 6) -> Path:
    """Photographs without prompts."""
    (root / "512x384").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(num_images):
        noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "512x384" / f"{number}.jpg")
    names = [f"{number}.jpg" for number in range(num_images)]
    table = pd.DataFrame({"image_name": names, "MOS": 1.5 + np.arange(num_images) / 10, "SD": 0.4})
    table.to_csv(root / "koniq10k_scores_and_distributions.csv", index=False)
    return root


def test_every_run_is_measured_on_every_set_by_the_scores_that_both_have(runs, source, tmp_path, capsys):
    root, out = koniq(tmp_path / "koniq"), tmp_path / "table.csv"
    flags = [*source, "--dataset", "koniq-10k", "--data_root", str(root), "--out", str(out)]
    found = evaluated(runs[0], "--checkpoint", str(runs[1] / "best"), *flags)
    names = [str(runs[0]), str(runs[1] / "best")]
    assert found[["run", "set", "score", "images"]].to_numpy().tolist() == [
        *([name, "koniq-10k", "quality", 6] for name in names),
        *([name, "data", score, 16] for name in names for score in ("quality", "consistency")),
    ]
    assert_own_results(found[found["run"] == names[1]].tail(2), runs[1])
    pd.testing.assert_frame_equal(pd.read_csv(out), found, rtol=1e-6)
    printed = capsys.readouterr().out
    assert "\n".join(cross_dataset.table_lines(found.to_dict("records"))) in printed
    assert f"{names[0]} on koniq-10k:\n" in printed


def test_a_set_of_nothing_but_seen_images_is_refused(runs, demo_set, tmp_path):
    splits = pd.read_csv(runs[0] / "splits.csv")
    table = pd.read_csv(demo_set[0]).merge(splits[splits["split"] != "test"][["name"]], on="name")
    table.to_csv(tmp_path / "seen.csv", index=False)
    flags = ["--csv", str(tmp_path / "seen.csv"), "--image_dir", str(demo_set[1])]
    assert refusal(evaluated, runs[0], *flags) == "--evaluate: there is nothing to score"


def test_a_table_without_scores_is_refused(runs, demo_set, tmp_path):
    pd.read_csv(demo_set[0])[["name", "prompt"]].to_csv(tmp_path / "plain.csv", index=False)
    flags = ["--csv", str(tmp_path / "plain.csv"), "--image_dir", str(demo_set[1])]
    assert "no scores in column 'mos_quality' or 'mos_align'" in refusal(evaluated, runs[0], *flags)


def test_a_set_that_is_not_there_is_refused(runs, tmp_path):
    assert f"{tmp_path / 'no.csv'}: no such file" in refusal(evaluated, runs[0], "--csv", str(tmp_path / "no.csv"))
    flags = ["--dataset", "spaq", "--data_root", str(tmp_path)]
    assert f"{tmp_path}: no label file of SPAQ here" in refusal(evaluated, runs[0], *flags)
