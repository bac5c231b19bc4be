"""The shell scripts: which runs they make, and whole, on a small set and the tiny model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from guidance.arguments import parse_args
from regions import demo_set
from training import devices


@pytest.fixture
def small_agiqa(demo_set, tmp_path) -> Path:
    """The demo set in the form of AGIQA-3K."""
    root = tmp_path / "agiqa"
    shutil.copytree(demo_set[1], root / "images")
    table = pd.read_csv(demo_set[0])[["name", "prompt", "mos_quality", "mos_align"]]
    table.assign(adj1="", adj2="", style="", std_quality=0.5, std_align=0.5).to_csv(root / "data.csv", index=False)
    return root


@pytest.fixture
def at_once(tmp_path) -> dict[str, str]:
    """Variables that let a script's runs be finished as soon as their flags are understood."""
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {ROOT / "tests" / "finished_at_once.py"} "$@"\n')
    python.chmod(0o755)
    return {"PYTHON": str(python), "PYTHONPATH": str(ROOT)}


def run_script(name: str, cwd: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of scripts/ to its end."""
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *flags],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def small_flags(demo_set: tuple[Path, Path]) -> list[str]:
    """Flags of a run that takes seconds."""
    words = "--clip_model tiny --clip_pretrained assets --image_size 56 --batch_size 16 --epochs 1"
    return [*words.split(), "--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]


SWEEPS = {  # script -> its variables, and the runs that they make, with an option that tells each from the others
    "recommended.sh": ({}, {"balanced": ("partial_freeze", True), "fast": ("freeze_clip", True)}),
    "sweep_lr.sh": ({"LRS": "1e-5 1e-3"}, {"lr-1e-5": ("lr", 1e-5), "lr-1e-3": ("lr", 1e-3)}),
    "sweep_residual_scale.sh": (
        {"SCALES": "0.1 0.4"},
        {"scale-0.1": ("residual_scale_q", 0.1), "scale-0.4": ("residual_scale_c", 0.4)},
    ),
    "two_stage.sh": (
        {"EPOCHS": "1 1", "LAYERS": "22"},
        {"stage-1": ("freeze_clip", True), "stage-2": ("init_from", "runs/here/stage-1"), "one-stage": ("lr", 3e-5)},
    ),
    "progressive_unfreezing.sh": (
        {"EPOCHS": "2", "PLAN": "23@0,22@1", "LAST": "22"},
        {"progressive": ("unfreeze_schedule", "23@0,22@1"), "from-the-start": ("freeze_layers", 22)},
    ),
}


VQA_SWEEPS = {  # as above, of main.py; each run with the options that tell it from the others
    "vqa_ablation.sh": (
        {"BRANCHES": "fine graph fine,graph"},
        {name.replace(",", "-"): {"branches": name, "test": True} for name in ("fine", "graph", "fine,graph")},
    ),
    "vqa_learning_rate.sh": (
        {},
        {
            "lr-2.8e-4": {"lr": 2.8e-4, "xvlm_lr": 5e-5, "test": False},
            "lr-3.5e-4": {"lr": 3.5e-4, "xvlm_lr": 7e-5},
            "lr-2e-4": {"lr": 2e-4, "xvlm_lr": 3e-5},
        },
    ),
    "vqa_complexity.sh": (
        {},
        {
            "layers-4-width-512": {"AOA_layers": 4, "num_hid": 512, "test": False},
            "layers-6-width-1024": {"AOA_layers": 6, "num_hid": 1024},
            "layers-8-width-2048": {"AOA_layers": 8, "num_hid": 2048},
        },
    ),
    "vqa_isubgvqa.sh": (
        {},
        {
            "layers-4": {"mgat_layers": 4, "alpha": 1.0, "beta": 10.0, "branches": "fine,graph", "test": False},
            "layers-6": {"mgat_layers": 6, "alpha": 1.5, "beta": 15.0},
            "layers-3": {"mgat_layers": 3, "alpha": 0.8, "beta": 8.0},
        },
    ),
    "vqa_8gb.sh": (
        {},
        {"run": {"gradient_accumulation_steps": 4, "mixed_precision": True, "max_memory_usage": 0.7}},
    ),
    "vqa_24gb.sh": ({}, {"run": {"batch_size": 48, "gradient_accumulation_steps": 1, "max_memory_usage": 0.9}}),
}


def check_runs(place: Path, expected: dict[str, tuple[str, object]]) -> None:
    """Each run is there, with the option that tells it from the others."""
    for run, (option, value) in expected.items():
        assert json.loads((place / run / "config.json").read_text())[option] == value


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_names_its_runs_makes_none_twice_and_mixes_none(name, tmp_path, at_once):
    variables, expected = SWEEPS[name]
    done = run_script(name, tmp_path, "--batch_size", "16", OUT="runs/here", **variables, **at_once)
    assert done.returncode == 0, done.stderr
    check_runs(tmp_path / "runs" / "here", expected)
    assert done.stdout.splitlines()[-1].split()[2:] == [f"runs/here/{run}" for run in expected]

    again = run_script(name, tmp_path, "--batch_size", "16", OUT="runs/here", **variables, **at_once)
    assert again.returncode == 0 and again.stdout.count("is finished") == len(expected)
    other = run_script(name, tmp_path, "--batch_size", "16", "--seed", "7", OUT="runs/here", **variables, **at_once)
    assert other.returncode == 2 and "OUT=" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize("name", VQA_SWEEPS)
@pytest.mark.parametrize("flags", [["--demo", "--sg_source", "gt", "--seed", "3"], []])
def test_a_script_of_questions_makes_the_runs_of_the_guide(name, flags, tmp_path, at_once):
    variables, expected = VQA_SWEEPS[name]
    done = run_script(name, tmp_path, *flags, OUT="runs/here", **variables, **at_once)
    assert done.returncode == 0, done.stderr
    made = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "runs" / "here").glob("*/config.json")
    }
    assert all(config["demo"] for config in made.values())
    if flags:
        assert all(config["seed"] == 3 and config["sg_source"] == "gt" for config in made.values())
    if flags or name != "vqa_complexity.sh":  # which is smaller on the demo
        assert made.keys() == expected.keys()
        for run, options in expected.items():
            assert {option: made[run][option] for option in options} == options
    if len(expected) > 1:
        assert {Path(word).name for word in done.stdout.splitlines()[-1].split()[2:]} == made.keys()
    again = run_script(name, tmp_path, *flags, OUT="runs/here", **variables, **at_once)
    assert again.returncode == 0 and again.stdout.count("is finished") == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqa_ablation.sh", "vqa_isubgvqa.sh"])
def test_a_script_of_questions_ends_with_one_table(name, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_set, "NUM_IMAGES", 32)
    root, features = demo_set.find_demo_set(tmp_path / "drawn", "GQA", devices.start_runtime("cpu", "off"))
    flags = (
        "--sg_source gt --num_hid 16 --AOA_layers 1 --general_hidden_dim 16 --epochs 1 --batch_size 16 --update_freq 1"
    )
    done = run_script(
        name, tmp_path, "--data_root", str(root), "--features", str(features), *flags.split(), OUT="runs/here"
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.rindex("run folder:") :]
    assert all(run in table for run in VQA_SWEEPS[name][1]) and "val accuracy" in table
    assert ("difference, 95 % interval" in table) == (name == "vqa_ablation.sh")
    assert (tmp_path / "runs" / "here" / "comparison.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep_lr.sh", "two_stage.sh"])
def test_a_sweep_makes_its_runs_and_ends_with_one_table_of_them(name, demo_set, tmp_path):
    variables, expected = SWEEPS[name]
    done = run_script(name, tmp_path, *small_flags(demo_set), OUT="runs/here", **variables)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.rindex("run folder:") :]
    check_runs(tmp_path / "runs" / "here", expected)
    assert all(run in table for run in expected)
    assert (tmp_path / "runs" / "here" / "comparison.html").is_file()


def test_a_mistake_does_not_stand_in_the_way_of_the_next_call(tmp_path, at_once):
    wrong = run_script("sweep_lr.sh", tmp_path, "--data_csv_pth", "x", OUT="runs/here", LRS="1e-3", **at_once)
    assert wrong.returncode == 2 and "did you mean --data_csv_path" in wrong.stderr
    right = run_script("sweep_lr.sh", tmp_path, "--data_csv_path", "x", OUT="runs/here", LRS="1e-3", **at_once)
    assert right.returncode == 0, right.stderr
    variables = {"OUT": "runs/two", "LAYERS": "23", **at_once}
    for epochs, code in (("1 1", 0), ("1 2", 2)):
        found = run_script("two_stage.sh", tmp_path, "--data_csv_path", "x", EPOCHS=epochs, **variables)
        assert found.returncode == code, found.stderr
    assert "runs/two/stage-2 was made with" in found.stderr


def test_the_reproduction_names_every_model_and_shows_each_and_all(tmp_path, at_once):
    variables = {"REPEATS": "2", "MODELS": "tiny=none=22 tiny=assets=22", **at_once}
    done = run_script("reproduce_agiqa3k.sh", tmp_path, "agiqa", "out", "--epochs", "1", **variables)
    assert done.returncode == 0, done.stderr
    check_runs(tmp_path / "out", {"tiny-none": ("repeats", 2), "tiny-assets": ("clip_pretrained", "assets")})
    shown = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("run folder:")]
    assert shown == [["out/tiny-none"], ["out/tiny-assets"], ["out/tiny-none", "out/tiny-assets"]]
    assert "Published" in done.stdout and "IPCE" in done.stdout


@pytest.mark.slow
def test_the_reproduction_runs_every_model_and_split_and_prints_all_tables(small_agiqa, tmp_path):
    flags = "--image_size 56 --epochs 1 --batch_size 16 --crops 1 --test_crops 1"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "reproduce_agiqa3k.sh"), str(small_agiqa), "out", *shlex.split(flags)],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "REPEATS": "2", "MODELS": "tiny=none=22 tiny=assets=22"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name in ("tiny-none", "tiny-assets"):
        summary = json.loads((tmp_path / "out" / name / "summary.json").read_text())
        assert summary["runs"] == ["seed42", "seed43"]
        assert f"== out/{name}\n2 runs, train " in done.stdout
    comparison, published = done.stdout[done.stdout.rindex("difference in SROCC") :].split("Published")
    assert "out/tiny-assets" in comparison and "IPCE" in published


def test_the_ablation_crosses_freezing_heads_and_loss(tmp_path):
    stand_in = tmp_path / "python"  # writes down the flags of each run and calls it finished
    stand_in.write_text(
        "#!/usr/bin/env bash\nset -e\n"
        'if [ "$(basename "$1")" = report.py ]; then echo "table of $(($# - 1))"; exit; fi\n'
        'echo "${@:2}" >>calls\nfolder=$(sed "s/.*--output_dir \\([^ ]*\\).*/\\1/" <<<"$*")\n'
        'mkdir -p "$folder" && touch "$folder/results.json"\n'
    )
    stand_in.chmod(0o755)
    done = run_script("ablation.sh", tmp_path, "--seed", "3", OUT="out", PYTHON=str(stand_in))
    assert done.returncode == 0 and done.stdout.endswith("table of 18\n"), done.stderr
    configs = [parse_args(shlex.split(call)) for call in (tmp_path / "calls").read_text().splitlines()]
    assert all(config.seed == 3 and not config.test for config in configs)
    seen = {(config.freezing, config.use_residual_learning, config.calibration, config.loss) for config in configs}
    heads = ((True, True), (True, False), (False, True))
    assert seen == {
        (freezing, *head, loss)
        for freezing in ("frozen", "partial18", "full")
        for head in heads
        for loss in ("mse", "mse+plcc")
    }


def test_every_script_is_named_in_the_docs_and_can_be_run():
    for script in (ROOT / "scripts").glob("*.sh"):
        if script.name != "common.sh":
            assert os.access(script, os.X_OK), script.name
            page = "vqa.md" if script.name.startswith("vqa_") else "tuning.md"
            assert f"scripts/{script.name}" in (ROOT / "docs" / page).read_text(), script.name
