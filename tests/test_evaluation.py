"""`evaluation.py` and `predict.py --evaluate`: what counts as seen, and agreement on what is left."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import baseline
import evaluation
import metrics
import predict
from commands import parse_predict_args
from scores import MEASURES

TINY = shlex.split("--clip_model tiny --clip_pretrained none --image_size 112 --freeze_clip --epochs 1 --batch_size 16")
SIZE = 24
MOS = np.random.default_rng(0).uniform(1, 5, SIZE)


def labelled_set(**columns: Any) -> evaluation.LabelledSet:
    """A set of 24 images of 8 prompts by 3 generators; the content of image i is "i"."""
    usual = {
        "name": [f"{i}.png" for i in range(SIZE)],
        "prompt": [f"thing {i // 3}" for i in range(SIZE)],
        "reference": "",
        "group": [f"gen{i % 3}" for i in range(SIZE)],
        "q": MOS,
        "c": 6 - MOS,
    }
    return evaluation.LabelledSet("things", pd.DataFrame({**usual, **columns}), [str(i) for i in range(SIZE)])


class Model:
    """Scores with an error that the name decides, and keeps what it was given."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns  # instead of the usual scores
        self.names: list[str] = []

    def __call__(self, table: pd.DataFrame) -> pd.DataFrame:
        self.names = table["name"].tolist()
        numbers = [int(Path(name).stem) for name in self.names]
        error = np.random.default_rng(1).normal(size=SIZE)[numbers]
        usual = {"pred_quality": MOS[numbers] + error, "pred_align": 6 - MOS[numbers] - error}
        own = {name: np.asarray(values)[numbers] for name, values in self.columns.items()}
        return pd.DataFrame({**usual, **own})


@pytest.fixture
def run_that_saw(tmp_path) -> Callable[..., str]:
    """A function that makes a run folder whose images, by content, were in these folds."""

    def make(**folds: str) -> str:
        (tmp_path / "run" / "best").mkdir(parents=True)
        rows = [(f"old{digest}", fold, digest) for fold, digests in folds.items() for digest in digests.split()]
        pd.DataFrame(rows, columns=["name", "split", "digest"]).to_csv(tmp_path / "run" / "splits.csv", index=False)
        (tmp_path / "run" / "config.json").write_text("{}")
        return str(tmp_path / "run")

    return make


# -- what was seen


def test_images_of_the_training_and_validation_folds_are_left_out_by_their_content(run_that_saw):
    run = run_that_saw(train="3 5 99", val="7", test="8 9")
    model = Model()
    rows, lines = evaluation.evaluate(run, ["q"], labelled_set(), model)
    assert model.names == [f"{i}.png" for i in range(SIZE) if i not in (3, 5, 7)]
    assert [row["images"] for row in rows] == [SIZE - 3]
    assert lines[0] == f"note: 3 of {SIZE} images of things left out: {run} has seen them"


def test_a_checkpoint_has_seen_what_its_run_has(run_that_saw):
    run = Path(run_that_saw(train="3 5", val="7", test="8"))
    (run / "best" / "scorer.json").write_text("{}")
    assert evaluation.seen_by(run) == evaluation.seen_by(run / "best") == {"3", "5", "7"}


@pytest.mark.parametrize("change", ["absent", "without digests"])
def test_a_run_that_does_not_tell_what_it_has_seen_is_said_to(run_that_saw, change):
    run = Path(run_that_saw(train="3 5"))
    if change == "absent":
        (run / "splits.csv").unlink()
    else:
        pd.read_csv(run / "splits.csv")[["name", "split"]].to_csv(run / "splits.csv", index=False)
    assert evaluation.seen_by(run) is None
    rows, lines = evaluation.evaluate(str(run), ["q"], labelled_set(), Model())
    assert rows[0]["images"] == SIZE
    assert lines[0].startswith(f"note: {run} does not tell which images it was trained on")


def test_where_nothing_was_seen_nothing_is_said(run_that_saw):
    _, lines = evaluation.evaluate(run_that_saw(train="99", test="1"), ["q"], labelled_set(), Model())
    assert not any(line.startswith("note") for line in lines)


# -- what is measured


def test_a_row_for_each_score_holds_the_agreement_on_the_scores_given(run_that_saw):
    run = run_that_saw(train="0 1 2")
    rows, _ = evaluation.evaluate(run, ["q", "c"], labelled_set(), Model())
    assert [(row["run"], row["set"], row["score"], row["images"]) for row in rows] == (
        [(run, "things", "quality", SIZE - 3), (run, "things", "consistency", SIZE - 3)]
    )
    assert all(list(row) == evaluation.COLUMNS for row in rows)
    predicted = Model()(labelled_set().table)[3:]
    for row, mos, pred in zip(rows, (MOS[3:], 6 - MOS[3:]), predicted.to_numpy().T, strict=True):
        assert {name: row[name] for name in MEASURES} == pytest.approx(metrics.agreement(pred, mos))
        clusters = [i // 3 for i in range(3, SIZE)]
        assert (row["srocc_low"], row["srocc_high"]) == metrics.cluster_bootstrap(pred, mos, clusters)["srocc"]


def test_images_without_a_human_or_a_predicted_score_are_left_out_of_that_score(run_that_saw):
    human = np.where(np.arange(SIZE) < 4, np.nan, MOS)
    pred = np.where(np.arange(SIZE) % 5 == 0, np.nan, np.arange(SIZE))
    rows, _ = evaluation.evaluate(run_that_saw(), ["q", "c"], labelled_set(q=human), Model(pred_quality=pred))
    keep = (np.arange(SIZE) >= 4) & (np.arange(SIZE) % 5 != 0)
    assert [row["images"] for row in rows] == [keep.sum(), SIZE]
    assert {name: rows[0][name] for name in MEASURES} == pytest.approx(metrics.agreement(pred[keep], MOS[keep]))


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["gen a", "gen b", "gen c"]), min_size=SIZE, max_size=SIZE))
def test_the_generator_column_is_what_knowing_the_generator_alone_gives(tmp_path_factory, makers):
    run = str(tmp_path_factory.getbasetemp())
    rows, _ = evaluation.evaluate(run, ["q"], labelled_set(group=makers), Model())
    means = pd.Series(MOS).groupby(makers).transform("mean")
    assert rows[0]["generator_mean_srocc"] == pytest.approx(metrics.srocc(means, MOS), abs=1e-9)


def test_generators_that_decide_the_score_are_seen_to(run_that_saw):
    rows, lines = evaluation.evaluate(
        run_that_saw(), ["q"], labelled_set(q=[float(i % 3) for i in range(SIZE)]), Model(pred_quality=MOS)
    )
    assert rows[0]["generator_mean_srocc"] == pytest.approx(1)
    assert sum(line.startswith("gen") for line in lines) == 3 and lines[-1].startswith("SROCC of the generators' means")


def test_further_scores_go_by_their_column(run_that_saw):
    labelled = labelled_set(authenticity=MOS)
    rows, _ = evaluation.evaluate(run_that_saw(), ["q", "authenticity"], labelled, Model(pred_authenticity=-MOS))
    assert [row["score"] for row in rows] == ["quality", "authenticity"]
    assert rows[1]["srocc"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("columns", "seen"), [({"q": np.nan}, ""), ({"q": [1.0] + [np.nan] * 23}, ""), ({}, " ".join(map(str, range(24))))]
)
def test_a_set_without_unseen_scores_of_the_run_has_no_row_and_a_line_that_says_so(run_that_saw, columns, seen):
    run = run_that_saw(train=seen)
    rows, lines = evaluation.evaluate(run, ["q", "authenticity"], labelled_set(**columns), Model())
    assert rows == []
    assert lines[-1] == f"note: no unseen images of things with scores that {run} predicts (quality, authenticity)"


def test_what_an_earlier_stage_has_seen_is_seen_too(run_that_saw, tmp_path):
    first = Path(run_that_saw(train="1 2", val="3"))
    second = tmp_path / "second"
    second.mkdir()
    pd.DataFrame({"name": ["4"], "split": ["train"], "digest": ["4"]}).to_csv(second / "splits.csv", index=False)
    (second / "config.json").write_text(json.dumps({"init_from": str(first / "best")}))
    assert evaluation.seen_by(second / "best") == {"1", "2", "3", "4"}
    (first / "splits.csv").unlink()
    assert evaluation.seen_by(second / "best") is None


def test_the_table_has_a_line_for_each_row_with_its_numbers(run_that_saw):
    rows, _ = evaluation.evaluate(run_that_saw(), ["q", "c"], labelled_set(), Model())
    rows[1] |= {"srocc_low": np.nan, "srocc_high": np.nan}
    head, first, second, note = evaluation.table_lines(rows)
    assert head.split()[:5] == ["run", "set", "score", "images", "SROCC"] and note.startswith("generator: ")
    cells = first.split()
    numbers = [rows[0][name] for name in (*MEASURES, "srocc_low", "srocc_high", "generator_mean_srocc")]
    assert cells[1:4] == ["things", "quality", str(SIZE)]
    assert [float(cell) for cell in cells[4:] if cell != ".."] == pytest.approx(numbers, abs=6e-4)
    assert len(second.split()) == len(cells) - 3 and len(second) == len(first) == len(head)


def test_titles_stand_apart_over_short_names(run_that_saw):
    rows, _ = evaluation.evaluate(run_that_saw(), ["q"], labelled_set(), Model())
    head, line, _ = evaluation.table_lines([{**rows[0], "run": "r", "set": "s"}])
    assert head.split()[:4] == ["run", "set", "score", "images"]
    assert [head.index(title) for title in ("set", "score")] == [line.index(cell) for cell in ("s ", "quality")]


# -- from the command line


@pytest.fixture(scope="module")
def runs(demo_set, tmp_path_factory) -> list[Path]:
    """Two finished runs with different folds. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("runs")
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    for seed in (42, 43):
        baseline.main([*paths, *TINY, "--seed", str(seed), "--output_dir", str(folder / f"seed{seed}")])
    return sorted(folder.iterdir())


@pytest.fixture
def source(demo_set) -> list[str]:
    """The options that name the demo set."""
    return ["--csv", str(demo_set[0]), "--image_dir", str(demo_set[1])]


def evaluated(run: Path, *flags: str) -> pd.DataFrame:
    """The table of `predict.py --evaluate`."""
    return predict.evaluate(parse_predict_args(["--checkpoint", str(run), "--evaluate", *flags]))


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """A function that expects a command line to be refused in one line, and returns it."""

    def check(*argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            predict.main(argv)
        message = capsys.readouterr().err
        assert caught.value.code == 2
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    return check


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
    original = predict.engine.predict

    def stretched(*args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        found = original(*args, **kwargs)
        return {task: 0.5 + (values - values.mean()) / values.std() for task, values in found.items()}

    monkeypatch.setattr(predict.engine, "predict", stretched)  # a third of the scores leaves the scale
    found = evaluated(tmp_path / "moved", *source)
    assert "does not tell which images it was trained on" in capsys.readouterr().out
    assert found["images"].tolist() == [64, 64]
    table = pd.read_csv(demo_set[0])
    paths, prompts = [demo_set[1] / name for name in table["name"]], table["prompt"].tolist()
    scorer = predict.Scorer.load(runs[0])
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
    assert "\n".join(evaluation.table_lines(found.to_dict("records"))) in printed
    assert f"{names[0]} on koniq-10k:\n" in printed


def test_a_set_of_nothing_but_seen_images_is_refused(runs, demo_set, tmp_path, refused):
    splits = pd.read_csv(runs[0] / "splits.csv")
    table = pd.read_csv(demo_set[0]).merge(splits[splits["split"] != "test"][["name"]], on="name")
    table.to_csv(tmp_path / "seen.csv", index=False)
    flags = ["--evaluate", "--csv", str(tmp_path / "seen.csv"), "--image_dir", str(demo_set[1])]
    message = refused("--checkpoint", str(runs[0]), *flags)
    assert message == "error: --evaluate: there is nothing to score\n"


def test_a_table_without_scores_is_refused(runs, demo_set, tmp_path, refused):
    pd.read_csv(demo_set[0])[["name", "prompt"]].to_csv(tmp_path / "plain.csv", index=False)
    flags = ["--evaluate", "--csv", str(tmp_path / "plain.csv"), "--image_dir", str(demo_set[1])]
    assert "no scores in column 'mos_quality' or 'mos_align'" in refused("--checkpoint", str(runs[0]), *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--evaluate", "--evaluate: needs human scores: --csv FILE or --dataset NAME --data_root DIR"),
        ("--evaluate a.png", "--evaluate: needs human scores"),
        ("--evaluate --csv a.csv a.png", "and no IMAGE"),
        ("--evaluate --image_dir .", "--evaluate: needs human scores"),
        ("--dataset spaq --data_root .", "--dataset: works with --evaluate only"),
        ("--data_root .", "--dataset: works with --evaluate only"),
        ("--checkpoint another a.png", "several --checkpoint: works with --evaluate only"),
        ("--evaluate --dataset spak --data_root .", "--dataset spak: must be of agiqa-3k, "),
        ("--evaluate --dataset csv --data_root .", "--dataset csv: must be of agiqa-3k, "),
        ("--evaluate --dataset spaq", "--data_root: has 0 folder(s) for 1 --dataset"),
        ("--evaluate --dataset spaq,tid2013 --data_root .", "--data_root: has 1 folder(s) for 2 --dataset"),
        ("--evaluate --csv a.csv --out no/such/folder.csv", "--out no/such/folder.csv: must be a file in a folder"),
        ("--evaluate --csv a.csv", "none: not a checkpoint"),
    ],
)
def test_command_lines_that_cannot_be_are_refused(refused, flags, message):
    assert message in refused("--checkpoint", "none", *shlex.split(flags))


def test_several_processes_cannot_share_an_evaluation(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--evaluate: runs in one process" in refused("--checkpoint", "none", "--evaluate", "--csv", "a.csv")


def test_a_set_that_is_not_there_is_refused(runs, refused, tmp_path):
    given = ["--checkpoint", str(runs[0]), "--evaluate"]
    assert f"{tmp_path / 'no.csv'}: no such file" in refused(*given, "--csv", str(tmp_path / "no.csv"))
    flags = ["--dataset", "spaq", "--data_root", str(tmp_path)]
    assert f"{tmp_path}: no label file of SPAQ here" in refused(*given, *flags)


def test_prompts_that_a_run_has_seen_are_counted(run_that_saw):
    run = run_that_saw()
    prompts = pd.DataFrame({"prompt": ["Thing  0", "thing 1", ""], "split": ["train", "test", "val"]})
    prompts.to_csv(Path(run) / "predictions.csv", index=False)
    assert evaluation.prompts_seen_by(Path(run) / "best") == {"thing 0"}
    _, lines = evaluation.evaluate(run, ["q"], labelled_set(), Model())
    (said,) = [line for line in lines if "share their prompt" in line]
    assert said.startswith(f"note: 3 of the {SIZE} others")


def test_generators_of_few_images_are_no_floor():
    mos = np.arange(16.0)
    assert np.isnan(evaluation.generator_floor(mos, np.arange(16)))
    assert evaluation.generator_floor(mos, np.repeat(["a", "b"], 8)) > 0.8
