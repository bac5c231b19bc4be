"""`search.py --program vqa`: its spaces, what is refused, and searches that are whole but small."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_vqa import people, read, table, tiny_flags
from stand_in import in_place

import main
import search
from answering.configs import BRANCH_OPTIONS, OPTIONS, VQAConfig, parse_args
from tuning import arguments, programs

PLAIN = "--program vqa --data_root D --features F --output out"
GRAPH = f"{PLAIN} --branches fine,graph --sg_source gt"
LR = {"lr": {"low": 1e-5, "high": 1e-1, "log": True}}


@pytest.fixture
def quick() -> Iterator[None]:
    """Studies are not forced onto the disk, and nobody looks at what mattered: both take longer than all the rest."""
    with in_place():
        yield


def usual(flags: str) -> dict[str, str]:
    """The default space after a command line: option -> how it is described."""
    request = arguments.parse_search_args(shlex.split(flags))
    found = request.space or request.program.default_space(request.config, None, request.given)
    return {name: dimension.describe().removeprefix(f"{name} ") for name, dimension in found.items()}


def space_file(folder: Path, content: Mapping[str, Any]) -> str:
    path = folder / "space.json"
    path.write_text(json.dumps(content))
    return str(path)


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command line is refused with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        search.main(["--program", "vqa", *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
    return said.removeprefix("error: ")


def test_the_default_space_is_that_of_the_guide_for_the_branches_that_are_trained():
    fine = {
        "lr": "0.0001..0.0005 log",
        "dropout": "0.3..0.6",
        "num_hid": "512 | 1024 | 2048",
        "AOA_layers": "4..8",
        "omega_q": "0.05..0.2",
    }
    assert usual(PLAIN) == fine
    assert usual(GRAPH) == {**fine, "mgat_layers": "2..6", "sample_k": "1..5", "fusion_ratio": "0.05..0.2"}
    alone = usual(f"{PLAIN} --branches graph --sg_source gt")
    assert set(alone) == {"lr", "dropout", "mgat_layers", "sample_k"}
    assert set(usual(f"{PLAIN} --lr 1e-4 --dropout 0.5")) == {"num_hid", "AOA_layers", "omega_q"}


def test_a_demo_searches_smaller_models():
    found = usual("--program vqa --demo --output out")
    assert (found["num_hid"], found["AOA_layers"], found["lr"]) == ("64 | 128 | 256", "0..2", "0.0003..0.003 log")


def test_every_usual_option_is_one_of_a_branch_that_has_it():
    for branch, names in programs.USUAL.items():
        for name in names:
            owners = {owner for owner, options in BRANCH_OPTIONS.items() if name in options}
            assert owners == ({branch} if branch else set()), name


def test_the_experiments_of_the_guide_are_ready():
    assert usual(f"{GRAPH} --space learning_rate") == {"lr": "0.0002 | 0.00028 | 0.00035"}
    assert usual(f"{GRAPH} --space complexity") == {"AOA_layers": "4 | 6 | 8", "num_hid": "512 | 1024 | 2048"}
    assert usual(f"{GRAPH} --space isubgvqa") == {
        "mgat_layers": "3 | 4 | 6",
        "alpha": "0.8 | 1.0 | 1.5",
        "beta": "8.0 | 10.0 | 15.0",
    }
    assert set(usual(f"{GRAPH} --space isubgvqa --sampler_type aimle")) == {"mgat_layers", "alpha"}
    assert set(usual(f"{GRAPH} --space isubgvqa --sampler_type soft --alpha 2")) == {"mgat_layers"}
    for options in programs.EXPERIMENTS.values():
        for name, values in options.items():
            for value in values:
                OPTIONS[name].check(value)


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        ({"mgat_layers": {"low": 2, "high": 4}}, "", "mgat_layers does nothing here, with --branches fine; drop it"),
        ({"fusion_ratio": {"low": 0.1, "high": 0.2}}, "", "fusion_ratio does nothing here"),
        (
            {"beta": {"low": 5, "high": 20}},
            "--branches graph --sg_source gt --sampler_type soft",
            "beta does nothing here, with --branches graph, --sampler_type soft",
        ),
        ({"seed": {"low": 1, "high": 4}}, "", "seed: cannot be searched"),
        ({"repeats": {"low": 1, "high": 4}}, "", "repeats: cannot be searched"),
        ({"val_size": {"low": 0.1, "high": 0.4}}, "", "val_size: cannot be searched"),
        ({"features": {"choices": ["a", "b"]}}, "", "features: cannot be searched"),
        ({"freeze_layers": {"low": 1, "high": 4}}, "", "unknown option 'freeze_layers'"),
        (LR, "--lr 1e-3", "lr is also given as --lr"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(content, flags, said, tmp_path, capsys):
    words = ["--demo", "--output", str(tmp_path / "out"), "--space", space_file(tmp_path, content)]
    assert said in refusal([*words, *flags.split()], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--demo", "--output DIR: say where the search is to be kept"),
        ("--demo --output a --repeats 3", "--repeats: every trial is one run"),
        ("--demo --output a --no_test", "--no_test: no trial reads the test fold anyway"),
        ("--demo --output a --overwrite", "--overwrite: is of main.py alone; drop it, and choose a new --output"),
        ("--demo --output_dir a", "unrecognized arguments: --output_dir"),
        ("--demo --output a --space isubgvqa", "--space isubgvqa: nothing is left to search"),
        ("--demo --output a --space complexiti", "--space complexiti: no such file"),
        ("--mode evaluate --checkpoint R --data_root D --output a", "--mode evaluate: every trial is trained"),
        ("--demo --output a --gama 2", "did you mean --gamma?"),
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_line(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(shlex.split(flags), capsys)


def test_help_shows_the_flags_of_the_program_that_is_named(capsys):
    for words, flags, others in (
        (["--program", "vqa"], "--AOA_layers", "--freeze_layers"),
        ([], "--freeze_layers", "--AOA_layers"),
    ):
        with pytest.raises(SystemExit):
            arguments.parse_search_args([*words, "--help"])
        said = capsys.readouterr().out
        assert f"{flags} " in said and f"\n  {others} " not in said and "--trials N" in said


def parabola(config: VQAConfig) -> float:
    """An accuracy whose best is known: lr at 1e-3."""
    return 0.9 - 0.05 * (math.log10(config.lr) + 3) ** 2


def test_a_planted_optimum_is_found_and_the_test_fold_read_in_the_end_only(tmp_path, quick, monkeypatch, capsys):
    seen: list[VQAConfig] = []

    def run(config: VQAConfig, *, after_epoch: Any = lambda row: None) -> dict[str, Any]:
        if config.dry_run:
            return {}
        seen.append(config)
        accuracy = parabola(config)
        after_epoch({"epoch": config.epochs, "val_accuracy": accuracy})
        folds = {fold: {"images": 9} for fold in ("train", "val", "test")}
        results = {
            "program": "vqa",
            "data_fingerprint": "d",
            "test_digest": "t",
            "data": folds,
            "best_epoch": 1,
            "val": {"accuracy": accuracy},
            "measures": {"accuracy": accuracy},
            "floors": {},
            "branches": {},
            "by_kind": {},
        }
        Path(str(config.output)).mkdir(parents=True, exist_ok=True)
        return results

    monkeypatch.setattr(main, "run", run)
    out, flags = tmp_path / "out", tiny_flags("--space", space_file(tmp_path, LR), "--trials", "20", "--seeds", "2")
    flags = [word for place, word in enumerate(flags) if "--lr" not in (word, flags[place - 1])]
    study = search.main(["--program", "vqa", *flags, "--output", str(out)])
    trials, repeats = seen[:20], seen[20:]
    assert not any(config.test or config.report for config in trials) and all(config.test for config in repeats)
    assert [config.seed for config in repeats] == [1204, 1205]
    assert abs(math.log10(study.best_params["lr"]) + 3) < 0.5
    best = json.loads((out / "best_config.json").read_text())
    assert best["lr"] == study.best_params["lr"] == repeats[0].lr
    said = capsys.readouterr().out
    (command,) = (line for line in said.splitlines() if line.startswith("python main.py"))
    assert parse_args(shlex.split(command)[2:]).lr == best["lr"]
    assert "--branches fine" in said and "by validation accuracy" in said
    assert json.loads((out / "best" / "summary.json").read_text())["runs"] == ["seed1204", "seed1205"]
    assert search.main(["--program", "vqa", *flags, "--output", str(out)]).best_params == study.best_params
    assert len(seen) == 22 + 2  # the stand-in leaves nothing of the repeated runs
    other = refusal([*flags, "--gamma", "1", "--output", str(out)], capsys)
    assert "was begun with other options (gamma is 1, not 2)" in other


def test_trials_are_runs_of_the_program_and_leave_the_test_fold_alone(tmp_path, quick):
    out = tmp_path / "out"
    flags = ["--program", "vqa", *tiny_flags("--trials", "2", "--seeds", "0", "--output", str(out))]
    flags = [word for place, word in enumerate(flags) if "--lr" not in (word, flags[place - 1])]
    study = search.main([*flags, "--space", space_file(tmp_path, LR)])
    for trial in study.trials:
        run = out / "trials" / f"{trial.number:04d}"
        assert read(run / "config.json")["lr"] == trial.params["lr"] and not (run / "best").exists()
        assert trial.value == read(run / "results.json")["val"]["accuracy"]
        assert not set(table(run / "predictions.csv")["id"]) & people("GQA", "val").keys()
    assert not (out / "best").exists()
