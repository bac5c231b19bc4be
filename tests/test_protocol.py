"""Repeated runs from the command line, with real runs: how many there are, what they share, and their tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny_run import TINY, data_flags, finished_run

import baseline
import compare
import protocol
from configs import TrainingConfig
from drawing import figures
from multirun.summary_text import summary_lines


@pytest.fixture(scope="module")
def repeated(demo_set, tmp_path_factory) -> tuple[list[str], Path, dict[str, Any]]:
    """Two repeated runs: their command line, folder and summary. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("repeated") / "out"
    argv = [*data_flags(demo_set), *TINY, "--repeats", "2", "--output_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:  # pictures are made, but not rendered, which takes most of the time
        patch.setattr(figures, "to_svg", lambda *_: "")
        patch.setattr(figures, "to_png", lambda *_: b"")
        return argv, folder, baseline.main(argv)


@pytest.fixture
def no_runs(monkeypatch) -> None:
    """Makes a run fail."""

    def run(config: TrainingConfig) -> dict[str, Any]:
        raise AssertionError(f"ran {config.output_dir}")

    monkeypatch.setattr(baseline, "run", run)


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """A function that expects a program to refuse a command line in one line, and returns it."""

    def check(main: Callable[[list[str]], object], argv: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(argv)
        message = capsys.readouterr().err
        assert caught.value.code == 2
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    return check


def splits(folder: Path) -> pd.DataFrame:
    """name, split and digest of a run's images."""
    return pd.read_csv(folder / "splits.csv")


def test_repeats_from_the_command_line_are_ordinary_runs_that_are_summarised(repeated):
    _, folder, summary = repeated
    made = {"protocol.json", "summary.json", "summary.csv", "report.html", "figures"}
    assert {path.name for path in folder.iterdir()} == {"seed42", "seed43", *made}
    results = [json.loads((folder / name / "results.json").read_text()) for name in ("seed42", "seed43")]
    for key, found in summary["test"].items():
        assert found["values"] == [run["test"][key] for run in results]
    assert set(summary["floors"]) == set(results[0]["floors"])
    assert not splits(folder / "seed42").equals(splits(folder / "seed43"))
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_a_repeated_run_is_the_one_that_its_seed_alone_gives(repeated, demo_set):
    _, folder, _ = repeated
    alone = json.loads((finished_run(demo_set, "--seed", "43") / "results.json").read_text())
    assert alone["test"] == json.loads((folder / "seed43" / "results.json").read_text())["test"]


def test_the_same_command_runs_nothing_again_and_another_is_refused_in_one_line(repeated, no_runs, refused):
    argv, _, summary = repeated
    assert baseline.main(argv) == summary
    assert "(--lr)" in refused(baseline.main, [*argv, "--lr", "0.01"])


def test_a_dry_run_on_a_folder_of_repeated_runs_prints_the_plan(repeated, capsys):
    argv, folder, _ = repeated
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert baseline.main([*argv, "--dry_run"]) == {}
    assert "this 2 times: seed42, seed43" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_single_run_does_not_go_into_a_folder_of_repeated_runs_nor_they_into_its(repeated, refused):
    argv, folder, _ = repeated
    single = [*argv, "--repeats", "1", "--overwrite"]
    assert "holds other things than a run" in refused(baseline.main, single)
    assert "than repeated runs" in refused(baseline.main, [*argv, "--output_dir", str(folder / "seed42")])


def test_the_table_is_printed_again(repeated, capsys, refused, tmp_path):
    _, folder, summary = repeated
    protocol.main([str(folder)])
    assert capsys.readouterr().out == "\n".join(summary_lines(summary)) + "\n"
    assert f"{tmp_path}: " in refused(protocol.main, [str(tmp_path)])
    assert "usage" in refused(protocol.main, [])


def test_repeated_runs_do_not_differ_from_themselves(repeated):
    _, folder, summary = repeated
    found = compare.main([str(folder), str(folder)])
    assert found["srocc"].tolist() == pytest.approx(
        [summary["test"][f"srocc_{task}"]["mean"] for task in "qc" for _ in range(2)]
    )
    assert found["d_srocc"].dropna().tolist() == [0, 0]
    one = compare.main([str(folder / "seed42"), str(folder / "seed42" / "best" / "..")])
    assert one["srocc"][0] == pytest.approx(summary["test"]["srocc_q"]["values"][0], abs=1e-6)
    assert one.loc[[1, 3], ["d_srocc", "srocc_low", "srocc_high"]].to_numpy().tolist() == [[0, 0, 0]] * 2


def test_folds_test_on_every_image_once_and_share_no_prompt(demo_set, tmp_path):
    """Eight prompts in three parts: 3, 3 and 2."""
    summary = baseline.main(
        [*data_flags(demo_set), *TINY, "--no_report", "--kfold", "3", "--output_dir", str(tmp_path / "out")]
    )
    prompts = pd.read_csv(demo_set[0]).set_index("name")["prompt"]
    found = [splits(tmp_path / "out" / name).set_index("name")["split"] for name in summary["runs"]]
    tested = [set(part.index[part == "test"]) for part in found]
    assert sorted(map(len, tested)) == [16, 24, 24]
    assert set.union(*tested) == set(prompts.index) and sum(map(len, tested)) == len(prompts)
    for part in found:
        assert set(part) == {"train", "val", "test"}
        assert part.groupby(prompts[part.index]).nunique().max() == 1
    assert len(summary["test"]["srocc_q"]["values"]) == 3
