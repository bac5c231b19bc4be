"""`answering/configs.py`: every flag of the guide is understood, and every mistake is one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from answering.configs import DEMO_SETTINGS, GROUPS, OPTIONS, VQAConfig, parse_args

ROOT = Path(__file__).resolve().parents[2]
DATA = ["--data_root", "D", "--features", "F"]
# The tuning guide's table of options.
GUIDE_DEFAULTS = {
    "epochs": 20,
    "lr": 2.8e-4,
    "xvlm_lr": 5e-5,
    "batch_size": 32,
    "update_freq": 4,
    "seed": 1204,
    "gamma": 2,
    "use_counter": False,
    "counter_act": "zhang",
    "AOA_layers": 6,
    "num_hid": 1024,
    "activation": "swish",
    "dropout": 0.45,
    "question_len": 12,
    "max_boxes": 50,
    "num_stat_word": 30,
    "tfidf": True,
    "general_hidden_dim": 300,
    "mgat_layers": 4,
    "sampler_type": "imle",
    "sample_k": 2,
    "nb_samples": 1,
    "alpha": 1.0,
    "beta": 10.0,
    "tau": 1.0,
    "use_instruction": 1,
    "use_masking": 1,
    "use_mgat": 0,
    "clip_norm": 0.25,
    "gradient_accumulation_steps": 1,
    "dynamic_batch_size": False,
    "max_memory_usage": 0.8,
    "mixed_precision": False,
    "memory_efficient_attention": False,
    "omega_q": 0.1,
    "omega_v": 0.01,
    "fusion_ratio": 0.1,
    "topk": 6,
}


def test_defaults_are_those_of_the_guide():
    config = parse_args(DATA)
    assert {name: getattr(config, name) for name in GUIDE_DEFAULTS} == GUIDE_DEFAULTS


def test_every_option_has_a_group_and_every_group_options():
    assert {spec.metadata["group"] for spec in OPTIONS.values()} == set(GROUPS)


def test_flags_go_above_what_the_demo_stands_for():
    assert parse_args(["--demo"]).num_hid == DEMO_SETTINGS["num_hid"]
    assert parse_args(["--demo", "--num_hid", "1024"]).num_hid == 1024
    assert parse_args(DATA).num_hid == 1024


def test_a_switch_that_is_on_can_be_named_either_way():
    assert parse_args([*DATA, "--tfidf"]).tfidf
    assert not parse_args([*DATA, "--no_tfidf"]).tfidf


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--data_root DIR: say where the questions are, or try --demo"),
        (["--dataset", "csv"], "--data_csv_path FILE: say where the questions are"),
        (["--data_root", "D"], "--features PATH or --features clip: say what is known of images"),
        (["--demo", "--data_root", "D"], "--demo draws its own data"),
        (["--demo", "--dataset", "csv"], "--demo draws a set in the form of GQA or VQA"),
        ([*DATA, "--data_csv_path", "x.csv"], "--data_csv_path does not go with --dataset GQA"),
        (["--dataset", "VQAv2"], "invalid choice: 'VQAv2'"),
        (["--demo", "--gama", "2"], "unrecognized arguments: --gama 2 (did you mean --gamma?)"),
        (["--demo", "--gamma", "0"], "--gamma 0: must be in [1, 64]"),
        (["--demo", "--dropout", "1"], "--dropout 1.0: must be in [0, 1)"),
        (["--demo", "--sampler_type", "best"], "invalid choice: 'best'"),
        (["--demo", "--use_mgat", "2"], "--use_mgat 2: must be in [0, 1]"),
        (["--demo", "--branches", "fine,coarse,"], "--branches fine,coarse,: '' is none of fine, coarse, graph"),
        (["--demo", "--branches", "left"], "'left' is none of fine, coarse, graph"),
        (["--demo", "--checkpoint", "no/model"], "--checkpoint no/model: there is no such file"),
        (["--demo", "--config", "no.yaml"], "--config no.yaml: there is no such file"),
        (["--demo", "--question_only", "--shuffle_images"], "so there is none to shuffle"),
        (["--question_only", *DATA], "--question_only looks at no image: drop it, or --features"),
        ([*DATA, "--val_size", "0.5", "--test_size", "0.5"], "must leave a training fold"),
        ([*DATA, "--sg_source", "predicted"], "--sg_source predicted: needs --scene_graphs"),
        ([*DATA, "--scene_graphs", "D"], "--scene_graphs: say by --sg_source"),
        ([*DATA, "--image", "x.jpg"], "--image: belongs to --mode ask"),
        (["--mode", "ask"], "--mode ask: needs --checkpoint RUN/best"),
        (["--mode", "ask", "--checkpoint", "R", "--question", "Is it?"], "--mode ask: needs --image FILE"),
        (["--mode", "predict", "--checkpoint", "R"], "--mode predict: needs --data_root"),
        (["--mode", "evaluate", "--checkpoint", "R", *DATA, "--dry_run"], "--dry_run: belongs to training"),
        (["--resume", "no/run"], "--resume no/run: there is no run in it"),
        ([*DATA, "--num_hid", "nine"], "invalid int value: 'nine'"),
    ],
)
def test_a_mistake_is_told_in_one_line(argv, said):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        parse_args(argv)
    assert said in str(caught.value)


def test_a_run_is_gone_on_with_by_its_own_options(tmp_path):
    saved = {**VQAConfig(data_root="D", features="F", num_hid=64).to_json(), "provenance": {}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = parse_args(["--resume", str(tmp_path), "--cache_dir", "elsewhere"])
    assert (config.num_hid, config.output, config.cache_dir) == (64, str(tmp_path), "elsewhere")
    assert parse_args(["--resume", str(tmp_path), "--num_hid", "64"]) == parse_args(["--resume", str(tmp_path)])
    with pytest.raises(ValueError, match="--num_hid would make it another run"):
        parse_args(["--resume", str(tmp_path), "--num_hid", "32"])


def run_main(*argv: str) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "main.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done, time.perf_counter() - started


def test_help_and_mistakes_answer_without_torch():
    done, seconds = run_main("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(f"{spec.flag} " in done.stdout or f"{spec.flag}\n" in done.stdout for spec in OPTIONS.values())
    assert all(f"\n{group}:\n" in done.stdout for group in GROUPS)
    assert "[recommended: 512-2048]" in done.stdout
    assert seconds < 5  # torch takes longer here than all else
    done, _ = run_main("--demo", "--gamma", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: argument --gamma: invalid int value: 'x'; see --help\n"
