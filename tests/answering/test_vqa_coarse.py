"""Runs with the coarse branch: a CLIP, an X-VLM that is trained, an X-VLM that is asked once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_vqa import ONE_GRAPH, differences, drawn_cache, drawn_set, error_of, read, run_until, tiny_flags, tiny_run
from small_xvlm import small_xvlm, xvlm_flags

import main
from answering import images
from answering.configs import parse_args
from answering.experiment import build_experiment
from answering.task import XVLM, build_train_state
from branches.xvlm import Xvlm
from training import checkpoints, devices

CLIP = ["--coarse", "clip", "--clip_model", "tiny"]
TRAINED, FROZEN = xvlm_flags("--xvlm_lr", "1e-3"), xvlm_flags("--xvlm_lr", "0")
KINDS = {
    "clip": ["--branches", "coarse", *CLIP],
    "xvlm": ["--branches", "coarse", *TRAINED],
    "frozen": ["--branches", "fine,coarse", *FROZEN],
    "all": ["--branches", "fine,coarse,graph", "--sg_source", "gt", *ONE_GRAPH, *TRAINED],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind. Read them, do not change them."""
    place = tmp_path_factory.mktemp("coarse")
    return {name: tiny_run(place / name, *flags, "--epochs", "1") for name, flags in KINDS.items()}


def evaluation(folder: Path, kind: str) -> list[str]:
    """The command line that evaluates it on the test fold."""
    found = ["--mode", "evaluate", "--checkpoint", str(folder), "--data_root", str(drawn_set("GQA"))]
    found += ["--cache_dir", str(drawn_cache())]
    found += ["--features", str(drawn_set("GQA") / "objects")] if kind in ("frozen", "all") else []
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_test_fold_is_worth_again_what_the_run_said(kind, runs):
    found = main.main(evaluation(runs[kind], kind))  # the frozen one is asked anew here, from pixels
    told = read(runs[kind] / "results.json")
    assert found["measures"] == pytest.approx(told["measures"], rel=1e-4)
    assert found["branches"].keys() == told["branches"].keys()


def test_all_branches_answer_by_themselves_and_together(runs):
    results, metrics = read(runs["all"] / "results.json"), pd.read_csv(runs["all"] / "metrics.csv")
    assert list(results["branches"]) == ["fine", "coarse", "graph"]
    losses = {name: metrics[f"loss_{name}"][0] for name in ("fused", "fine", "coarse", "graph")}
    expected = 0.1 * losses["fused"] + losses["fine"] + losses["coarse"] + losses["graph"]
    assert metrics["loss"][0] == pytest.approx(expected, rel=1e-4)
    assert "shuffled image" in results["floors"]


def test_a_frozen_x_vlm_is_asked_once_stays_as_it_is_and_teaches_nothing(runs, tmp_path, monkeypatch):
    asked = []
    rank = Xvlm.try_answers
    monkeypatch.setattr(Xvlm, "try_answers", lambda self, *args: asked.append(1) or rank(self, *args))
    again = tiny_run(tmp_path / "again", *KINDS["frozen"], "--epochs", "1")
    assert asked == []  # all of it is in the cache
    assert differences(runs["frozen"], again) == []
    metrics = pd.read_csv(again / "metrics.csv")
    assert metrics["loss"][0] == pytest.approx(0.1 * metrics["loss_fused"][0] + metrics["loss_fine"][0], rel=1e-4)
    weights = checkpoints.load_weights(again)[1]
    given = torch.load(small_xvlm()[0], weights_only=True)["model"]
    name = "text_encoder.encoder.layer.2.crossattention.self.key.weight"
    assert torch.equal(weights[XVLM + name], given[name])


def test_another_image_or_other_answers_ask_it_again(tmp_path, monkeypatch):
    asked = []
    rank = Xvlm.try_answers
    monkeypatch.setattr(Xvlm, "try_answers", lambda self, *args: asked.append(1) or rank(self, *args))
    tiny_run(tmp_path / "shuffled", *KINDS["frozen"], "--epochs", "1", "--shuffle_images", "--least_answers", "12")
    assert asked


def test_x_vlm_learns_with_its_own_rate_and_schedule():
    flags = tiny_flags("--branches", "fine,coarse", *xvlm_flags("--xvlm_lr", "1e-3"), "--scheduler", "ban")
    experiment = build_experiment(parse_args(flags), devices.start_runtime("cpu", "off"))
    state = build_train_state(experiment)
    own = {group["part"]: group for group in state.optimizer.param_groups}
    assert own["xvlm"]["initial_lr"] == 1e-3 and own[""]["initial_lr"] == 3e-2
    count = sum(parameter.numel() for group in state.optimizer.param_groups for parameter in group["params"])
    assert count == sum(parameter.numel() for parameter in experiment.model.parameters())
    steps = 2 * experiment.steps_per_epoch
    warm_up, rates = round(0.1 * steps), []
    for _ in range(steps):
        rates.append((own["xvlm"]["lr"] / 1e-3, own[""]["lr"] / 3e-2))
        state.optimizer.step()
        state.schedule.step()
    expected = [min((step + 1) / (warm_up + 1), (steps - step) / (steps - warm_up)) for step in range(steps)]
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert [rate for _, rate in rates] == pytest.approx([0.5] * (steps // 2) + [1.0] * (steps // 2))


def test_what_pretraining_has_not_learns_twice_as_fast(tmp_path):
    weights, options = small_xvlm()
    state = torch.load(weights, weights_only=True)["model"]
    captions = {
        f"text_encoder.bert.{name.removeprefix('text_encoder.')}" if name.startswith("text_encoder.") else name: value
        for name, value in state.items()
        if not name.startswith("text_decoder.")
    } | {
        name.replace("text_decoder.", "text_encoder."): value
        for name, value in state.items()
        if name.startswith("text_decoder.cls.")
    }
    torch.save({"model": captions}, tmp_path / "pretrained.th")
    flags = ["--branches", "coarse", "--checkpoint", str(tmp_path / "pretrained.th"), "--config", str(options)]
    experiment = build_experiment(
        parse_args(tiny_flags(*flags, "--xvlm_lr", "1e-3")), devices.start_runtime("cpu", "off")
    )
    groups = build_train_state(experiment).optimizer.param_groups
    twice = sum(len(group["params"]) for group in groups if group["initial_lr"] == 2e-3)
    assert twice == 2 * 4  # keys and values, weights and biases, of two layers
    assert {group["initial_lr"] for group in groups} == {1e-3, 2e-3}


@pytest.mark.parametrize("kind", [pytest.param("all", marks=pytest.mark.slow), "frozen"])
def test_a_run_is_gone_on_with_exactly(kind, tmp_path):
    flags = tiny_flags(*KINDS[kind], "--epochs", "2", "--ema_decay", "0.5")
    main.run(parse_args([*flags, "--output", str(tmp_path / "whole")]))
    run_until(flags, tmp_path / "part", 9)
    assert main.main(["--resume", str(tmp_path / "part")])["epochs"] == 2
    assert differences(tmp_path / "whole", tmp_path / "part") == []


def test_changed_images_are_refused(tmp_path, capsys):
    shutil.copytree(drawn_set("GQA"), tmp_path / "set")
    flags = [*tiny_flags(*KINDS["clip"])[1:], "--data_root", str(tmp_path / "set")]
    run_until(flags, tmp_path / "run", 9)
    capsys.readouterr()
    pictures = tmp_path / "set/images"
    shutil.copy(pictures / "2.jpg", pictures / "1.jpg")
    assert "the data has changed" in error_of("--resume", str(tmp_path / "run"), capsys=capsys)


@pytest.mark.parametrize("kind", ["clip", "all"])
def test_answers_that_were_never_learned_are_chosen_among(kind, runs, capsys):
    picture = str(drawn_set("GQA") / "images" / "1.jpg")
    ask = ["--mode", "ask", "--checkpoint", str(runs[kind]), "--cache_dir", str(drawn_cache()), "--image", picture]
    found = main.main([*ask, "--question", "What colour is it?", "--answers", "violet|red | pale blue"])
    assert list(found) == sorted(found, key=found.__getitem__, reverse=True)
    assert set(found) == {"violet", "red", "pale blue"} and all(0 <= chance <= 1 for chance in found.values())
    turned = main.main([*ask, "--question", "What colour is it?", "--answers", "pale blue|violet|red"])
    assert turned == pytest.approx(found, abs=1e-6)
    assert "note" not in capsys.readouterr().out


def test_what_cannot_be_chosen_among_is_told_in_one_line(runs, capsys):
    ask = ["--mode", "ask", "--image", str(drawn_set("GQA") / "images" / "1.jpg"), "--question", "What?"]
    ask += ["--cache_dir", str(drawn_cache()), "--checkpoint", str(runs["clip"])]
    for answers in ("red", "red|red", "red||blue"):
        assert "--answers A|B: name at least two" in error_of(*ask, "--answers", answers, capsys=capsys)
    assert "looks at no region: drop --explain" in error_of(*ask, "--answers", "a|b", "--explain", capsys=capsys)
    assert "this run looks at no region or object" in error_of(*ask, "--explain", capsys=capsys)
    assert not Path("1-explained.png").exists()
    assert "--answers: belongs to --mode ask" in error_of("--demo", "--answers", "a|b", capsys=capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coarse", "xvlm"], "--coarse xvlm: needs --checkpoint FILE, X-VLM's weights"),
        ([*CLIP, *TRAINED], "--coarse clip asks a CLIP, not the X-VLM of --checkpoint: drop one"),
        (["--coarse", "clip", "--config", str(small_xvlm()[1])], "--config FILE: belongs to X-VLM's --checkpoint"),
        (["--branches", "coarse", *FROZEN], "--xvlm_lr 0: leaves nothing to train in --branches coarse"),
        (
            ["--branches", "coarse", "--question_only"],
            "--question_only looks at no image: drop it, or the coarse",
        ),
        (["--branches", "coarse", "--checkpoint", "/tmp"], "--checkpoint /tmp: is no file (X-VLM's weights"),
    ],
)
def test_options_that_do_not_go_together_are_told_in_one_line(flags, said, capsys):
    assert said in error_of("--demo", "--cache_dir", str(drawn_cache()), *flags, capsys=capsys)


def test_branches_follow_from_what_is_given():
    assert parse_args(["--demo"]).branch_names == ["fine"]
    assert parse_args(["--demo", *TRAINED]).branch_names == ["fine", "coarse"]
    assert parse_args(["--demo", *TRAINED, "--sg_source", "gt"]).branch_names == ["fine", "coarse", "graph"]
    assert parse_args(["--demo", "--sg_source", "gt", "--branches", "fine"]).branch_names == ["fine"]


def test_without_a_vocabulary_or_a_network_one_line_says_where_to_put_it(tmp_path, monkeypatch, capsys):
    weights, options = small_xvlm()
    shutil.copytree(options.parent.parent, tmp_path / "xvlm")
    shutil.rmtree(tmp_path / "xvlm" / "data")
    shutil.copy(weights, tmp_path / "model.th")
    monkeypatch.setattr(images, "hf_hub_download", lambda *names: (_ for _ in ()).throw(OSError("no route to host")))
    flags = ["--checkpoint", str(tmp_path / "model.th"), "--config", str(tmp_path / "xvlm/configs/VQA_32.yaml")]
    error = error_of(*tiny_flags(*flags), capsys=capsys)
    assert error == (
        "error: cannot get BERT's vocabulary: no route to host. Put vocab.txt of bert-base-uncased into "
        f"{tmp_path}, or into the folder that text_encoder names\n"
    )
    (tmp_path / "vocab.txt").write_text(
        "[PAD]\n[UNK]\n[CLS]\n[SEP]\n" + "\n".join(f"w{number}" for number in range(99))
    )
    error = error_of(*tiny_flags(*flags), capsys=capsys)
    assert "BERT's vocabulary has 103 words, X-VLM's config" in error


@pytest.mark.parametrize("kind", ["clip", "xvlm"])
def test_images_that_are_missing_or_damaged_are_refused_or_left_out(kind, tmp_path, capsys):
    shutil.copytree(drawn_set("GQA"), tmp_path / "set")
    asked = read(tmp_path / "set/questions/train_balanced_questions.json")
    names = list(dict.fromkeys(one["imageId"] for one in asked.values()))
    (tmp_path / "set/images" / f"{names[0]}.jpg").unlink()
    (tmp_path / "set/images" / f"{names[1]}.jpg").write_bytes(b"no image")
    flags = ["--data_root", str(tmp_path / "set"), "--epochs", "1", "--batch_size", "16", "--no_report", *KINDS[kind]]
    flags += ["--cache_dir", str(tmp_path / "cache"), "--num_hid", "16", "--output", str(tmp_path / "run")]
    assert "1 images that --image_base_dir has not, such as" in error_of(*flags, capsys=capsys)
    found = main.main([*flags, "--bad_images", "skip"])
    lost = sum(one["imageId"] in names[:2] for one in asked.values())
    assert sum(found["data"][fold]["questions"] for fold in ("train", "val")) == len(asked) - lost
    assert np.isfinite(found["measures"]["loss"])
