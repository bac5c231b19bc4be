"""Whole runs, in-process, on a tiny set: what they write, what they promise, and every command of the guide."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import baseline
import compare
import models
from cli.memo import NO_MEMO, Memo
from evaluation import metrics
from finetune import initial_model
from finetune import task as score_task
from finetune.experiment import Experiment, read_examples
from guidance.arguments import parse_args
from predict import main
from serving.scorer import Scorer
from training import devices

RUN_FILES = {"config.json", "splits.csv", "metrics.csv", "results.json", "predictions.csv", "best"}
REPORT_FILES = {"report.html", "figures"}
TINY = "--clip_model tiny --clip_pretrained none --image_size 56 --no_report"
SHORT = f"{TINY} --partial_freeze --freeze_layers 22 --epochs 3 --lr 1e-3 --batch_size 16"


@pytest.fixture
def train(demo_set, tmp_path):
    """A function that trains on the demo set with the given flags; returns run folder and results."""

    def run(flags: str = SHORT, name: str = "run") -> tuple[Path, dict]:
        folder = tmp_path / name
        paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
        return folder, baseline.main([*paths, "--output_dir", str(folder), *shlex.split(flags)])

    return run


@pytest.fixture(scope="module")
def finished(demo_set, tmp_path_factory) -> tuple[Path, dict]:
    """One ordinary finished run. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    return folder, baseline.main([*paths, "--output_dir", str(folder), *shlex.split(SHORT), "--use_report"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "best" / "model.safetensors")


def untrained(folder: Path) -> models.ScoreModel:
    """The model that a run started with."""
    config = parse_args(["--config", str(folder / "config.json")])
    devices.seed_everything(config.seed)
    return initial_model.start_model(config, read_examples(config, NO_MEMO), NO_MEMO)[1]


def test_a_run_writes_exactly_its_files_and_the_loss_falls(finished):
    folder, results = finished
    assert {item.name for item in folder.iterdir()} == RUN_FILES | REPORT_FILES
    assert {item.name for item in (folder / "best").iterdir()} == {"model.safetensors", "scorer.json"}
    history = pd.read_csv(folder / "metrics.csv")
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert json.loads((folder / "results.json").read_text()) == results


def test_the_reported_scores_can_be_recomputed_from_the_predictions(finished):
    folder, results = finished
    table = pd.read_csv(folder / "predictions.csv")
    for fold in ("val", "test"):
        rows = table[table["split"] == fold]
        for task, mos, pred in (("q", "mos_quality", "pred_quality"), ("c", "mos_align", "pred_align")):
            for name, value in metrics.agreement(rows[pred], rows[mos]).items():
                assert results[fold][f"{name}_{task}"] == pytest.approx(value, abs=1e-4), (fold, name, task)
    assert table["pred_quality"].between(1, 5).all()


def test_folds_share_no_prompt_and_are_the_ones_written(finished, demo_set):
    folder, _ = finished
    splits = pd.read_csv(folder / "splits.csv").merge(pd.read_csv(demo_set[0]), on="name")
    assert splits.groupby("prompt")["split"].nunique().max() == 1
    assert set(splits["split"]) == {"train", "val", "test"}
    predictions = pd.read_csv(folder / "predictions.csv")
    assert predictions[["name", "split"]].equals(pd.read_csv(folder / "splits.csv")[["name", "split"]])


def test_the_saved_epoch_is_the_best_on_validation(finished):
    folder, results = finished
    history = pd.read_csv(folder / "metrics.csv")
    assert results["best_epoch"] == history["epoch"][history["val_main"].argmax()]
    assert results["val"]["main"] == pytest.approx(history["val_main"].max(), abs=1e-5)


def test_the_checkpoint_scores_files_as_the_run_did(finished, demo_set):
    folder, _ = finished
    expected = pd.read_csv(folder / "predictions.csv")[:9]
    scorer = Scorer.load(folder / "best")
    assert scorer.model.stage_width > 0
    scores = scorer.score([demo_set[1] / name for name in expected["name"]], expected["prompt"].tolist())
    np.testing.assert_allclose(scores["pred_quality"], expected["pred_quality"], atol=1e-4)
    np.testing.assert_allclose(scores["pred_align"], expected["pred_align"], atol=1e-4)


def test_results_hold_scores_base_and_floors(finished):
    _, results = finished
    keys = {f"{name}_{task}" for name in ("srocc", "plcc", "plcc_fit", "krocc", "rmse") for task in "qc"} | {"main"}
    assert keys <= set(results["val"]) and keys <= set(results["test"])
    floors = {"mean", "generator_mean", "image_statistics", "zero_shot_cosine", "ridge_probe"}
    assert set(results["floors"]) == floors
    for name, row in (*results["floors"].items(), *results["base"].items()):
        assert set(row) == ({key for key in keys if not key.endswith("q")} if name == "zero_shot_cosine" else keys)
    assert results["floors"]["mean"]["srocc_q"] == 0.0
    # Consistency starts from the probe or the cosine, whichever is better in cross-validation.
    floors = results["floors"]
    assert results["base"]["test"]["srocc_q"] == floors["ridge_probe"]["srocc_q"]
    assert results["base"]["test"]["srocc_c"] in [
        floors[name]["srocc_c"] for name in ("ridge_probe", "zero_shot_cosine")
    ]
    assert results["images"] == {"train": 40, "val": 8, "test": 16}
    assert results["seconds"] > 0


def test_another_seed_gives_other_weights(finished, train):
    folder, _ = train(f"{TINY} --freeze_clip --seed 7 --epochs 1 --no_test")
    first, second = weights(finished[0]), weights(folder)
    assert not torch.equal(first["heads.delta_q.0.weight"], second["heads.delta_q.0.weight"])


def test_frozen_layers_stay_bit_identical_and_trained_ones_move(train):
    folder, _ = train(f"{SHORT} --epochs 1 --no_test")
    fresh = untrained(folder)
    before, after = fresh.state_dict(), weights(folder)
    for name, value in before.items():
        frozen = name.startswith("clip.") and not dict(fresh.named_parameters())[name].requires_grad
        if frozen:
            assert torch.equal(value, after[name]), name
    moved = [name for name in before if name.startswith("clip.visual.transformer.resblocks.23.")]
    assert moved and any(not torch.equal(before[name], after[name]) for name in moved)


def test_a_frozen_clip_still_trains_its_heads(train):
    folder, results = train(f"{TINY} --freeze_clip --epochs 3 --lr 1e-2 --batch_size 16")
    history = pd.read_csv(folder / "metrics.csv")
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert math.isfinite(results["test"]["main"])


def test_thawing_step_by_step_trains_each_layer_from_its_epoch_on(train):
    folder, _ = train(
        f"{TINY} --unfreeze_schedule 24@0,23@1 --epochs 2 --lr 1e-3 --batch_size 16 --select_by srocc_q --no_test"
    )
    fresh = untrained(folder)
    before, after = fresh.state_dict(), weights(folder)
    best = json.loads((folder / "results.json").read_text())["best_epoch"]
    block = [name for name in before if name.startswith("clip.visual.transformer.resblocks.23.")]
    same = all(torch.equal(before[name], after[name]) for name in block)
    assert same == (best < 2)
    assert all(
        torch.equal(before[n], after[n]) for n in before if n.startswith("clip.visual.transformer.resblocks.22.")
    )


def test_a_second_stage_starts_from_the_first(finished, train):
    folder, _ = train(f"{SHORT} --epochs 1 --lr 1e-9 --no_test --init_from {finished[0]}", "second")
    first, second = weights(finished[0]), weights(folder)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_a_second_stage_refuses_heads_of_another_kind(finished, train, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(f"{SHORT} --no_residual_learning --init_from {finished[0]}", "second")
    assert exit_.value.code == 2
    assert "--init_from" in capsys.readouterr().err


def test_a_second_stage_refuses_to_test_on_what_the_first_was_trained_on(finished, train, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(f"{SHORT} --seed 5 --init_from {finished[0]}", "second")
    assert exit_.value.code == 2
    assert "images of the test fold were trained or selected on" in capsys.readouterr().err


def test_lora_trains_and_is_merged_into_plain_weights(train, demo_set):
    folder, results = train(f"{TINY} --lora_rank 2 --partial_freeze --freeze_layers 23 --epochs 1 --lr 1e-3")
    assert not any("parametrizations" in name for name in weights(folder))
    names = pd.read_csv(demo_set[0]).head(4)
    scores = Scorer.load(folder).score([demo_set[1] / name for name in names["name"]], names["prompt"].tolist())
    expected = pd.read_csv(folder / "predictions.csv").head(4)
    np.testing.assert_allclose(scores["pred_align"], expected["pred_align"], atol=1e-4)
    assert math.isfinite(results["test"]["main"])


def test_without_stage_features_all_is_told_from_the_embeddings_alone(train, demo_set):
    folder, _ = train(f"{SHORT} --freeze_clip --no_partial_freeze --epochs 1 --stage_features off")
    width = json.loads((folder / "best" / "scorer.json").read_text())["model"]["embed_dim"]
    found = weights(folder)
    assert not any(name.startswith("stage_") for name in found)
    assert found["heads.base_q.weight"].shape == (1, width)
    assert found["heads.base_c.weight"].shape == (1, 1 + 3 * width)
    assert found["heads.delta_q.0.weight"].shape[1] == width
    expected = pd.read_csv(folder / "predictions.csv").head(3)
    scores = Scorer.load(folder).score([demo_set[1] / name for name in expected["name"]], expected["prompt"].tolist())
    np.testing.assert_allclose(scores["pred_quality"], expected["pred_quality"], atol=1e-4)


def test_a_frozen_clip_starts_from_a_kernel_and_a_second_stage_keeps_it(train, demo_set):
    first, results = train(f"{TINY} --freeze_clip --epochs 1 --lr 1e-9", "first")
    before = weights(first)
    number = json.loads((first / "best" / "scorer.json").read_text())["model"]["kernel_images"]
    assert before["heads.base_kernel.places"].shape[0] == number == results["images"]["train"]
    assert "heads.base_q.weight" not in before and before["heads.base_c.weight"].shape == (1, 1)
    expected = pd.read_csv(first / "predictions.csv").head(3)
    scores = Scorer.load(first).score([demo_set[1] / name for name in expected["name"]], expected["prompt"].tolist())
    np.testing.assert_allclose(scores["pred_quality"], expected["pred_quality"], atol=1e-4)
    np.testing.assert_allclose(scores["pred_align"], expected["pred_align"], atol=1e-4)
    assert results["test"]["srocc_q"] == pytest.approx(results["base"]["test"]["srocc_q"], abs=1e-6)
    second, _ = train(f"{SHORT} --epochs 1 --lr 1e-9 --init_from {first}", "second")
    after = weights(second)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("heads.base_kernel"))
    third, _ = train(f"{SHORT} --epochs 1", "third")
    assert "heads.base_kernel.places" not in weights(third)  # whose layers are trained


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--stage_features off", "reads stage statistics, and there are none; take --base probe"),
        ("--no_calibration", "is fitted before training; drop --no_calibration"),
        ("--prompt_levels", "is one way to start, --prompt_levels another; drop one"),
        ("--no_residual_learning", "is a base term of residual learning; drop --no_residual_learning"),
    ],
)
def test_a_kernel_that_cannot_be_fitted_is_refused(train, flags, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(f"{TINY} --freeze_clip --base kernel {flags} --dry_run")
    assert exit_.value.code == 2 and capsys.readouterr().err == f"error: --base kernel: {says}\n"
    train(f"{TINY} --freeze_clip {flags} --dry_run")


def test_stages_of_a_tower_that_runs_only_as_a_whole_are_refused(train, tmp_path, capsys):
    vision = {"timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "linear", "timm_model_pretrained": False}
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": {**vision, "image_size": 64}, "text_cfg": text}
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    flags = f"--clip_model local-dir:{tmp_path / 'clip'} --clip_pretrained none --freeze_clip --dry_run"
    with pytest.raises(SystemExit) as exit_:
        train(f"{flags} --stage_features on")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert "error: --stage_features on: the image tower of local-dir:" in error
    train(f"{flags} --stage_features auto")


@pytest.mark.parametrize(
    "flags",
    [
        "--use_explanations --loss mse+0.5*plcc+fidelity --label_smoothing 0.1 --scheduler cyclic",
        "--no_residual_learning --ema_decay 0.9 --gradient_accumulation_steps 3 --max_grad_norm 0 --amp bf16",
        "--no_residual_learning --use_refinement --refinement_layers 1 --refinement_heads 2 --refinement_dim 16 "
        "--crops 1 --test_crops 3 --freeze_clip --no_partial_freeze",
        "--no_calibration --layer_decay 0.7 --head_lr 1e-2 --split_by image --crops 2 --test_crops 4 --global_view",
        "--prompt_levels --task_gradients stop_q --crops 1 --no_cache",
        "--base kernel --crops 2 --test_crops 4 --global_view --task_gradients stop_c",
    ],
)
def test_every_kind_of_run_finishes_and_its_checkpoint_scores(train, demo_set, flags):
    folder, results = train(f"{SHORT} --epochs 1 {flags}")
    history = pd.read_csv(folder / "metrics.csv")
    assert ("loss_exp" in history) == ("explanations" in flags)
    assert -1 <= results["test"]["srocc_q"] <= 1
    names = pd.read_csv(demo_set[0]).head(3)
    scores = Scorer.load(folder).score([demo_set[1] / name for name in names["name"]], names["prompt"].tolist())
    tolerance = 0.05 if "bf16" in flags else 1e-4
    expected = pd.read_csv(folder / "predictions.csv").head(3)
    np.testing.assert_allclose(scores["pred_quality"], expected["pred_quality"], atol=tolerance)


@pytest.fixture
def validated_as(monkeypatch) -> Callable[..., None]:
    """A function that says what validation shall find: of the untrained model, then of each epoch."""
    real = score_task.evaluate

    def plan(*scores: float) -> None:
        left = iter(scores)
        monkeypatch.setattr(score_task, "evaluate", lambda *args: {**real(*args), "main": next(left)})

    return plan


def test_early_stopping_stops(train, validated_as):
    validated_as(0.4, 0.5, 0.4, 0.3)
    folder, results = train(f"{SHORT} --epochs 5 --early_stopping_patience 2 --no_test")
    assert len(pd.read_csv(folder / "metrics.csv")) == 3
    assert results["best_epoch"] == 1


def test_early_stopping_counts_from_the_untrained_model(train, validated_as):
    validated_as(0.5, 0.4, 0.3)
    folder, results = train(f"{SHORT} --epochs 5 --early_stopping_patience 2 --no_test")
    assert len(pd.read_csv(folder / "metrics.csv")) == 2
    assert results["best_epoch"] == 0


def test_a_run_that_only_harms_keeps_the_untrained_model_and_says_so(train, validated_as, capsys):
    validated_as(0.5, 0.4, 0.5, 0.3)  # no better is not enough
    folder, results = train(f"{SHORT} --use_report")
    assert (results["best_epoch"], results["epochs"]) == (0, 3)
    fresh, kept = untrained(folder).state_dict(), weights(folder)
    fitted = {name for name in fresh if not torch.equal(fresh[name], kept[name])}  # before training, to what CLIP knows
    assert fitted and all(name.startswith(("heads.base", "stage_")) for name in fitted)
    for fold in ("val", "test"):  # what the kept model scores is what it starts from
        assert results[fold]["srocc_q"] == pytest.approx(results["base"][fold]["srocc_q"], abs=1e-6)
    said = capsys.readouterr().out
    assert "none of 3 epochs better than the untrained model" in said
    finding = results["diagnosis"][0]
    assert finding["finding"] == "no gain from training" and "before training, which is kept" in finding["evidence"]
    page = (folder / "report.html").read_text()
    assert finding["evidence"] in page and "none of 3 epochs was better" in page


def test_a_non_finite_loss_ends_with_one_line_and_code_1(train, monkeypatch, capsys):
    broken = {"loss": torch.tensor(float("nan"), requires_grad=True)}
    monkeypatch.setattr(score_task.ScoreTask, "compute_losses", lambda self, model, batch: broken)
    with pytest.raises(SystemExit) as exit_:
        train()
    assert exit_.value.code == 1
    assert "loss is nan at step 1" in capsys.readouterr().err


@pytest.mark.parametrize(("column", "task"), [("mos_quality", "q"), ("mos_align", "c")])
def test_a_data_set_may_lack_one_score(demo_set, tmp_path, column, task):
    table = pd.read_csv(demo_set[0]).drop(columns=column)
    table.to_csv(tmp_path / "data.csv", index=False)
    flags = f"--data_csv_path {tmp_path / 'data.csv'} --image_base_dir {demo_set[1]} --output_dir {tmp_path / 'run'}"
    results = baseline.main(shlex.split(f"{flags} {SHORT} --epochs 1"))
    assert not any(key.endswith(f"_{task}") for key in results["test"])
    predictions = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert predictions[{"q": "pred_quality", "c": "pred_align"}[task]].isna().all()
    assert predictions[{"q": "pred_align", "c": "pred_quality"}[task]].notna().all()


def test_missing_cells_are_masked_not_guessed(demo_set, tmp_path):
    table = pd.read_csv(demo_set[0])
    table.loc[table.index % 3 == 0, "mos_align"] = np.nan
    table.to_csv(tmp_path / "data.csv", index=False)
    flags = f"--data_csv_path {tmp_path / 'data.csv'} --image_base_dir {demo_set[1]} --output_dir {tmp_path / 'run'}"
    results = baseline.main(shlex.split(f"{flags} {SHORT} --epochs 1"))
    rows = pd.read_csv(tmp_path / "run" / "predictions.csv")
    rows = rows[(rows["split"] == "test") & rows["mos_align"].notna()]
    assert results["test"]["srocc_c"] == pytest.approx(metrics.srocc(rows["pred_align"], rows["mos_align"]), abs=1e-4)


def test_images_without_prompts_train_quality_alone(demo_set, tmp_path):
    pd.read_csv(demo_set[0])[["name", "mos_quality"]].to_csv(tmp_path / "data.csv", index=False)
    flags = f"--data_csv_path {tmp_path / 'data.csv'} --image_base_dir {demo_set[1]} --output_dir {tmp_path / 'run'}"
    results = baseline.main(shlex.split(f"{flags} {SHORT} --epochs 1 --split_by image"))
    assert "srocc_q" in results["test"] and "srocc_c" not in results["test"]


GUIDE = """
--epochs 30 --batch_size 64 --lr 5e-5
--w_q 0.3 --w_c 0.7
--w_q 0.7 --w_c 0.3
--w_q 0.5 --w_c 0.5
--residual_scale_q 0.1 --residual_scale_c 0.1
--residual_scale_q 0.4 --residual_scale_c 0.4

--partial_freeze --freeze_layers 18
--freeze_clip
--freeze_clip --residual_scale_q 0.1 --residual_scale_c 0.1 --epochs 30 --batch_size 16 --lr 1e-3 --w_q 0.5 --w_c 0.5
--partial_freeze --freeze_layers 18 --residual_scale_q 0.2 --residual_scale_c 0.2 --epochs 20 --batch_size 32 --lr 3e-5
--residual_scale_q 0.3 --residual_scale_c 0.3 --epochs 15 --batch_size 64 --lr 3e-5 --w_q 0.5 --w_c 0.5
--scheduler cosine
--scheduler linear
--scheduler step
--scheduler constant
--scheduler cyclic
--freeze_clip --epochs 10 --batch_size 64 --lr 1e-3
--partial_freeze --freeze_layers 20 --residual_scale_q 0.25 --residual_scale_c 0.25 --epochs 50 --lr 2e-5
--batch_size 16 --w_q 0.4 --w_c 0.6
--partial_freeze --freeze_layers 18 --w_q 0.7 --w_c 0.3 --residual_scale_q 0.3 --residual_scale_c 0.15
--partial_freeze --freeze_layers 18 --w_q 0.3 --w_c 0.7 --residual_scale_q 0.15 --residual_scale_c 0.3
--freeze_clip --epochs 10 --lr 1e-3
--partial_freeze --freeze_layers 20 --epochs 20 --lr 1e-5
--unfreeze_schedule 22@0,20@10,18@20 --epochs 30
--freeze_layers 22
--use_refinement --no_residual_learning --refinement_layers 4 --refinement_heads 8 --refinement_dim 256
--warmup_ratio 0.1 --dropout 0.2 --hidden_dim_q 64 --hidden_dim_c 512 --max_grad_norm 0.5 --weight_decay 1e-3
--early_stopping_patience 5 --early_stopping_min_delta 0.001 --label_smoothing 0.1 --test_size 0.3 --crop_scale_min 0.6
--use_explanations --w_exp 0.3 --image_size 336
""".strip("\n").split("\n")


@pytest.fixture(scope="module")
def memo() -> Memo:
    """Of the data and the CLIP that all commands of the guide share."""
    return Memo()


@pytest.mark.parametrize("command", GUIDE)
def test_every_command_of_the_guide_builds(command, memo, demo_set, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    tiny = ["--clip_model", "tiny", "--clip_pretrained", "none", "--dry_run"]
    assert baseline.run(parse_args([*paths, *tiny, *shlex.split(command)]), memo=memo) == {}
    assert "trained" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_images_train(agiqa_dir, tmp_path):
    table = pd.read_csv(agiqa_dir / "data.csv")
    table[table["prompt"].isin(table["prompt"].unique()[:24])].to_csv(tmp_path / "data.csv", index=False)
    flags = f"--data_csv_path {tmp_path / 'data.csv'} --image_base_dir {agiqa_dir / 'images'}"
    results = baseline.main(shlex.split(f"{flags} --output_dir {tmp_path / 'run'} {SHORT} --epochs 2"))
    history = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert 0 < results["test"]["plcc_fit_q"] <= 1


def test_a_leak_is_said_and_counted_and_refused_where_splits_are_strict(train, capsys):
    flags = f"{TINY} --freeze_clip --epochs 1 --batch_size 16 --split_by image"
    _, results = train(flags)
    shared = results["leakage"]["prompt"]["test"]
    assert shared > 0 and f"leakage: {shared} of 13 test images share their prompt" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        train(f"{flags} --strict_splits", "strict")
    assert stop.value.code == 2
    assert "error: --strict_splits: leakage: " in capsys.readouterr().err
    train(f"{TINY} --freeze_clip --epochs 1 --batch_size 16 --strict_splits --dry_run", "clean")


@pytest.mark.slow
def test_a_named_data_set_is_trained_on_as_its_csv_is(agiqa_dir, tmp_path):
    common = shlex.split(f"{TINY} --freeze_clip --epochs 1 --cache_dir {tmp_path / 'cache'}")
    whole = ["--mos_range_q", "0", "5", "--mos_range_c", "0", "5"]
    files = ["--data_csv_path", str(agiqa_dir / "data.csv"), "--image_base_dir", str(agiqa_dir / "images")]
    by_csv = baseline.main([*common, *whole, *files, "--output_dir", str(tmp_path / "csv")])
    named = ["--dataset", "agiqa-3k", "--data_root", str(agiqa_dir)]
    by_name = baseline.main([*common, *named, "--output_dir", str(tmp_path / "name")])
    assert by_name["floors"] == by_csv["floors"]
    assert by_name["test"]["main"] == pytest.approx(by_csv["test"]["main"], abs=1e-6)


def test_results_tell_how_sure_they_are(finished):
    folder, results = finished
    table = pd.read_csv(folder / "predictions.csv")
    test = table[table["split"] == "test"]
    for task, mos, pred in (("q", "mos_quality", "pred_quality"), ("c", "mos_align", "pred_align")):
        part = results["certainty"][task]
        low, high = part["intervals"]["srocc"]
        assert low <= high and low <= results["test"][f"srocc_{task}"] + 0.3
        line = metrics.calibration_line(test[pred].to_numpy(), test[mos].to_numpy())
        assert part["slope"] == pytest.approx(line["slope"], abs=1e-3)
        assert part["bias"] == pytest.approx(line["bias"], abs=1e-4)
        assert 0 <= part["within_prompt"]["accuracy"] <= 1 and part["within_prompt"]["pairs"] > 0


def test_further_scores_of_joined_sets_are_trained_saved_and_reported(demo_set, tmp_path):
    """The demo set as AGIQA-3K and as a CSV of one's own, which alone has a third score."""
    table = pd.read_csv(demo_set[0])[["name", "prompt", "mos_quality", "mos_align"]]
    agiqa = tmp_path / "agiqa"
    agiqa.mkdir()
    (agiqa / "images").symlink_to(demo_set[1])
    table.assign(adj1="", adj2="", style="", std_quality=0.5, std_align=0.5).to_csv(agiqa / "data.csv", index=False)
    own = table.assign(beauty=100 - 20 * table["mos_quality"])
    own.to_csv(tmp_path / "own.csv", index=False)
    flags = f"{SHORT} --epochs 1 --dataset agiqa-3k,csv --extra_scores beauty --loss mse+0.1*kl"
    paths = ["--data_root", agiqa, "--data_csv_path", tmp_path / "own.csv", "--image_base_dir", demo_set[1]]
    with pytest.raises(SystemExit):  # which has no spread of opinions
        baseline.main([*shlex.split(flags), *map(str, paths), "--output_dir", str(tmp_path / "run")])
    flags = flags.replace("--loss mse+0.1*kl", "")
    results = baseline.main([*shlex.split(flags), *map(str, paths), "--output_dir", str(tmp_path / "run")])
    assert set(results["sets"]) == {"agiqa-3k", "csv"}
    assert "srocc_beauty" in results["test"] and "srocc_beauty" not in results["sets"]["agiqa-3k"]["test"]
    for name in ("srocc_q", "plcc_c"):
        both = [part["test"][name] for part in results["sets"].values()]
        assert results["test"][name] == pytest.approx(np.mean(both))
    assert results["leakage"]["prompt"] == {"val": 0, "test": 0}  # although every prompt is in both
    expected = pd.read_csv(tmp_path / "run" / "predictions.csv").query("set == 'csv'").head(3)
    images = [demo_set[1] / name.removeprefix("csv/") for name in expected["name"]]
    scores = Scorer.load(tmp_path / "run").score(images, expected["prompt"].tolist(), clamp=False)
    for column in ("pred_quality", "pred_align", "pred_beauty"):
        np.testing.assert_allclose(scores[column], expected[column], atol=1e-3)


UNREAD = f"{SHORT} --epochs 2 --no_test --no_report"


def without_clocks(results: dict) -> dict:
    """Results but for what depends on the hour, and for what tells that the data has changed."""
    other = {"seconds", "seconds_from_first_batch", "data_fingerprint", "test_digest", "leakage"}
    return {key: value for key, value in results.items() if key not in other}


@pytest.fixture(scope="module")
def unread(demo_set, tmp_path_factory) -> tuple[Path, dict, str]:
    """A run that leaves its test fold unread: folder, results and what it said. Read it, do not change it."""
    place = tmp_path_factory.mktemp("unread")
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        results = baseline.main([*paths, "--output_dir", str(place / "run"), *shlex.split(UNREAD)])
    return place / "run", results, said.getvalue()


def test_a_run_without_a_test_says_nothing_of_the_test_fold(unread):
    folder, results, said = unread
    assert all(results[key] == {} for key in ("test", "floors", "certainty", "generators", "sets"))
    assert set(results["base"]) == {"val"} and results["images"]["test"] == 16
    table = pd.read_csv(folder / "predictions.csv")
    assert set(table["split"]) == {"train", "val"}
    assert "validation fold: 8 images, weights of epoch" in said and "test fold:" not in said
    assert f"main score (mean of SROCC and PLCC): {results['val']['main']:.3f}" in said
    assert json.loads((folder / "results.json").read_text()) == results


def test_a_run_without_a_test_trains_and_validates_as_one_with_it(unread, train):
    folder, results, _ = unread
    other, tested = train(UNREAD.replace("--no_test", ""))
    assert tested["test"] and results["val"] == tested["val"] and results["best_epoch"] == tested["best_epoch"]
    first, second = weights(folder), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    tables = [pd.read_csv(place / "predictions.csv") for place in (folder, other)]
    assert tables[0].equals(tables[1][tables[1]["split"] != "test"].reset_index(drop=True))


@pytest.mark.parametrize("more", ["", "--freeze_clip --no_partial_freeze"])
def test_nothing_of_an_unread_test_fold_decides_anything(more, demo_set, tmp_path, train):
    """Scores and pixels of the test fold are other ones, and all else stays the same, but for the data's digests."""
    folder, results = train(f"{UNREAD} {more}")
    splits = pd.read_csv(folder / "splits.csv")
    is_test = splits["split"] == "test"
    table, rng = pd.read_csv(demo_set[0]), np.random.default_rng(0)
    table.loc[is_test.to_numpy(), ["mos_quality", "mos_align"]] = rng.uniform(1, 5, (is_test.sum(), 2)).round(3)
    table.to_csv(tmp_path / "poisoned.csv", index=False)
    shutil.copytree(demo_set[1], tmp_path / "images")
    for name in splits["name"][is_test]:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    paths = f"--data_csv_path {tmp_path / 'poisoned.csv'} --image_base_dir {tmp_path / 'images'}"
    again = baseline.main(shlex.split(f"{paths} {UNREAD} {more} --output_dir {tmp_path / 'again'}"))
    assert again["data_fingerprint"] != results["data_fingerprint"]
    assert without_clocks(again) == without_clocks(results)
    first, second = weights(folder), weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("predictions.csv", "metrics.csv"):
        before, after = (pd.read_csv(place / name) for place in (folder, tmp_path / "again"))
        clocks = ["images_per_s", "seconds", "data_wait"] if name == "metrics.csv" else []
        assert before.drop(columns=clocks).equals(after.drop(columns=clocks))


def test_what_a_run_without_a_test_leaves_scores_images_and_starts_a_second_stage(unread, demo_set, tmp_path, capsys):
    folder = unread[0]
    expected = pd.read_csv(folder / "predictions.csv").head(4)
    files = [demo_set[1] / name for name in expected["name"]]
    scores = Scorer.load(folder).score(files, expected["prompt"].tolist())
    np.testing.assert_allclose(scores["pred_quality"], expected["pred_quality"], atol=1e-4)
    paths = f"--checkpoint {folder} --evaluate --csv {demo_set[0]} --image_dir {demo_set[1]}"
    main(shlex.split(paths))
    assert "48 of 64 images of data left out" in capsys.readouterr().out  # all but the test fold
    paths = f"--data_csv_path {demo_set[0]} --image_base_dir {demo_set[1]} --output_dir {tmp_path / 'second'}"
    second = baseline.main(shlex.split(f"{paths} {SHORT} --epochs 1 --init_from {folder}"))
    assert second["test"]["main"]
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "second"), str(folder)])
    assert capsys.readouterr().err == (
        f"error: {folder}: has no test scores, being a run with --no_test; run it again without\n"
    )


def test_a_run_says_every_epoch_to_who_asks_and_stops_when_told_to(demo_set, tmp_path):
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    config = parse_args([*paths, *shlex.split(f"{TINY} --freeze_clip --epochs 3"), "--output_dir", str(tmp_path / "a")])
    rows = []

    def stop(row):
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baseline.run(config, after_epoch=stop)
    written = pd.read_csv(tmp_path / "a" / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2] == written["epoch"].tolist()
    assert rows[1]["val_main"] == pytest.approx(written["val_main"][1])
    assert not (tmp_path / "a" / "results.json").exists()


@pytest.mark.parametrize(("name", "layers"), [("tiny", 24), ("ViT-B-32", 12), ("ViT-L-14", 24), ("ViT-H-14", 32)])
def test_the_depth_of_a_model_is_known_before_it_is_built(name, layers):
    config = parse_args(["--clip_model", name, "--clip_pretrained", "none"])
    assert initial_model.num_blocks(config) == layers


def test_a_preset_follows_the_data_and_the_first_stage(finished, demo_set, tmp_path, capsys):
    paths = f"--data_csv_path {demo_set[0]} --image_base_dir {demo_set[1]} --output_dir {tmp_path / 'run'}"
    flags = f"{TINY} --epochs 1 --preset auto --advice off --no_test"
    baseline.main(shlex.split(f"{paths} {flags}"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["preset"], saved["freeze_clip"], saved["batch_size"], saved["epochs"]) == ("small", True, 16, 1)
    assert initial_model.num_blocks(parse_args(["--init_from", str(finished[0])])) == 24


def test_scores_that_are_all_equal_are_told_and_have_correlation_0(demo_set, tmp_path, capsys, monkeypatch):
    table = pd.read_csv(demo_set[0])
    prompts = table["prompt"].unique().tolist()
    folds = table["prompt"].map(lambda prompt: ("val", "test", "train")[min(prompts.index(prompt), 2)])
    table = table.assign(split=folds)
    table.loc[folds != "train", "mos_quality"] = 3.0
    table.to_csv(tmp_path / "equal.csv", index=False)
    real = models.score_batch

    def constant(model: torch.nn.Module, batch: object) -> dict[str, torch.Tensor]:
        return {**(found := real(model, batch)), "c": torch.full_like(found["c"], 0.5)}

    predict = Experiment.predict

    def predict_constant(self: Experiment, scorer: Any, fold: str, compute: Any = constant, **hooks: Any) -> Any:
        return predict(self, scorer, fold, compute, **hooks)

    monkeypatch.setattr(Experiment, "predict", predict_constant)
    paths = ["--data_csv_path", str(tmp_path / "equal.csv"), "--image_base_dir", str(demo_set[1])]
    results = baseline.main([*paths, *shlex.split(SHORT), "--epochs", "1", "--output_dir", str(tmp_path / "run")])
    lines = [
        f"all {count} {side} scores of {title} in the {fold} fold are equal: correlations with them are 0 by definition"
        for fold, count in (("val", 8), ("test", 8))
        for side, title in (("human", "quality"), ("predicted", "consistency"))
    ]
    assert results["notes"] == lines
    said = capsys.readouterr().out
    assert all(f"note      {line}" in said for line in lines)
    for fold in ("val", "test"):
        assert {results[fold][f"{name}_{task}"] for name in ("srocc", "plcc", "krocc") for task in "qc"} == {0.0}
    json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=pytest.fail)
