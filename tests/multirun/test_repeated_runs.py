"""Repeated runs: which there are, that none is made twice, and statistics over them whose answers are known."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from configs import TrainingConfig
from guidance.arguments import parse_args
from multirun import protocol, summaries
from multirun.summary_text import summary_lines
from sources.scores import MEASURES, tasks_of
from storage import json_files
from training import devices

IMAGES = {"train": 40, "val": 8, "test": 10}  # 10 / 40 is what overlapping splits add to the variance
RUNTIME = devices.start_runtime("cpu", "off")


def results_of(seed: int) -> dict[str, Any]:
    """Results such as `baseline.run` returns, all numbers drawn."""
    rng = np.random.default_rng(seed)

    def drawn(tasks: str = "qc") -> dict[str, float]:
        return {f"{name}_{task}": float(rng.uniform(-1, 1)) for name in MEASURES for task in tasks} | {
            "main": float(rng.uniform(-1, 1))
        }

    floors = {"mean": drawn(), "zero_shot_cosine": drawn("c")}
    test = {"loss": 0.5, **drawn()}
    return {
        "images": IMAGES,
        "data_fingerprint": "same",
        "test_digest": str(seed),
        "test": test,
        "floors": floors,
        "seconds": 1.0,
    }


class Trainer:
    """Stands for `baseline.run`: leaves what a run leaves, and keeps the options of each that began."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at  # the run, counted from 0, in which Ctrl-C is pressed
        self.configs: list[TrainingConfig] = []

    @property
    def names(self) -> list[str]:
        """The folders that were worked on, in order."""
        return [Path(str(config.output_dir)).name for config in self.configs]

    def __call__(self, config: TrainingConfig) -> dict[str, Any]:
        self.configs.append(config)
        if config.dry_run:
            return {}
        folder = Path(str(config.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**config.to_json(), "provenance": {}}))
        if len(self.configs) - 1 == self.stop_at:
            raise KeyboardInterrupt
        results = results_of(config.seed * 1000 + (config.fold or 0))
        (folder / "results.json").write_text(json.dumps(results))
        return results


def protocol_of(folder: Path, trainer: Trainer, flags: str = "--repeats 3") -> dict[str, Any]:
    """Run a protocol with a trainer."""
    return protocol.run_all(protocol.SCORER, parse_args(flags.split()), trainer, folder, RUNTIME)


def refusal(folder: Path, flags: str) -> str:
    """Why a protocol is refused; nothing is run, and nothing is changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    trainer = Trainer()
    with pytest.raises(ValueError, match="--output_dir") as caught:
        protocol_of(folder, trainer, flags)
    assert not trainer.configs
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- which runs


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--repeats 3", "seed42 seed43 seed44"),
        ("--repeats 2 --seed 0", "seed0 seed1"),
        ("--kfold 3", "seed42-fold1 seed42-fold2 seed42-fold3"),
        ("--kfold 2 --repeats 2", "seed42-fold1 seed42-fold2 seed43-fold1 seed43-fold2"),
        ("--kfold 5 --fold 4 --repeats 2", "seed42-fold4 seed43-fold4"),
    ],
)
def test_each_run_has_a_folder_named_after_its_seed_and_fold(flags, names):
    config = parse_args(flags.split())
    assert config.is_protocol
    assert " ".join(protocol.planned_runs(config)) == names


def test_a_single_part_of_the_folds_is_an_ordinary_run():
    assert not parse_args(["--kfold", "5", "--fold", "4"]).is_protocol
    assert not parse_args([]).is_protocol


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from([0, 2, 3, 7]))
def test_every_seed_meets_every_fold_once_and_nothing_else_differs(seed, repeats, kfold):
    config = TrainingConfig(seed=seed, repeats=repeats, kfold=kfold, lr=0.01)
    found = list(protocol.planned_runs(config).values())
    folds = range(1, kfold + 1) if kfold else [None]
    assert [(part.seed, part.fold) for part in found] == [(seed + i, fold) for i in range(repeats) for fold in folds]
    assert not any(part.is_protocol for part in found)
    assert {replace(part, seed=seed, fold=None, repeats=repeats) for part in found} == {config}


# -- one after the other


def test_every_run_is_made_once_in_a_folder_of_its_own(tmp_path, capsys):
    trainer = Trainer()
    summary = protocol_of(tmp_path / "out", trainer, "--kfold 2 --repeats 2")
    assert trainer.names == ["seed42-fold1", "seed42-fold2", "seed43-fold1", "seed43-fold2"] == summary["runs"]
    assert [(config.seed, config.fold) for config in trainer.configs] == [(42, 1), (42, 2), (43, 1), (43, 2)]
    assert all(Path(str(config.output_dir)).parent == tmp_path / "out" for config in trainer.configs)
    assert files_in(tmp_path / "out") == {"protocol.json", "summary.json", "summary.csv", *trainer.names}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert json.loads((tmp_path / "out" / "protocol.json").read_text())["repeats"] == 2
    printed = capsys.readouterr().out
    assert "\n".join(summary_lines(summary)) in printed
    assert "run 3 of 4: seed43-fold1" in printed


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_an_interrupted_protocol_goes_on_to_the_summary_of_an_uninterrupted_one(tmp_path, stop_at):
    stopped = Trainer(stop_at)
    with pytest.raises(KeyboardInterrupt):
        protocol_of(tmp_path / "stopped", stopped)
    assert not (tmp_path / "stopped" / "summary.json").exists()
    rest = Trainer()
    summary = protocol_of(tmp_path / "stopped", rest)
    assert stopped.names[:-1] + rest.names == ["seed42", "seed43", "seed44"]
    assert summary == protocol_of(tmp_path / "whole", Trainer())
    for name in ("summary.json", "summary.csv", "protocol.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_protocol_is_summarised_again_without_a_run(tmp_path, capsys):
    first = protocol_of(tmp_path, Trainer())
    idle = Trainer()
    assert protocol_of(tmp_path, idle) == first
    assert not idle.configs
    assert f"3 of 3 runs in {tmp_path} are finished" in capsys.readouterr().out


def test_more_repeats_add_to_those_that_there_are(tmp_path):
    protocol_of(tmp_path, Trainer(), "--repeats 2")
    more = Trainer()
    assert protocol_of(tmp_path, more, "--repeats 4")["runs"] == ["seed42", "seed43", "seed44", "seed45"]
    assert more.names == ["seed44", "seed45"]


def test_runs_with_other_options_are_refused_with_their_flags(tmp_path):
    protocol_of(tmp_path, Trainer(), "--repeats 2")
    message = refusal(tmp_path, "--repeats 2 --lr 0.01 --no_horizontal_flip --no_residual_learning")
    assert message == (
        f"--output_dir {tmp_path}: its runs were made with other options (--no_horizontal_flip, "
        "--no_residual_learning, --lr); choose another folder, or pass --overwrite to run all again"
    )


def test_folds_of_another_number_are_refused(tmp_path):
    protocol_of(tmp_path, Trainer(), "--kfold 2")
    assert "its runs were made with other options (--kfold)" in refusal(tmp_path, "--kfold 3")


def test_a_run_that_was_made_otherwise_is_not_taken_for_one_of_these(tmp_path):
    protocol_of(tmp_path, Trainer(), "--repeats 2")
    config = json.loads((tmp_path / "seed43" / "config.json").read_text())
    (tmp_path / "seed43" / "config.json").write_text(json.dumps({**config, "lr": 0.5}))
    assert "seed43 was made with other options (--lr)" in refusal(tmp_path, "--repeats 2")


def test_where_and_how_fast_is_no_other_option(tmp_path):
    protocol_of(tmp_path, Trainer(), "--repeats 2")
    more = Trainer()
    protocol_of(tmp_path, more, "--repeats 3 --num_workers 3 --cache_dir elsewhere --image_memory_gb 1")
    assert more.names == ["seed44"]


def test_a_protocol_that_was_stopped_while_it_overwrote_goes_on_with_the_new_options(tmp_path):
    protocol_of(tmp_path, Trainer(), "--repeats 3")
    with pytest.raises(KeyboardInterrupt):
        protocol_of(tmp_path, Trainer(stop_at=1), "--repeats 3 --lr 0.01 --overwrite")
    rest = Trainer()
    protocol_of(tmp_path, rest, "--repeats 3 --lr 0.01")
    assert rest.names == ["seed43", "seed44"]


def test_a_new_protocol_that_was_killed_before_it_said_what_it_is_begins_again(tmp_path, monkeypatch):
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json_files, "write_json", kill)
        with pytest.raises(KeyboardInterrupt):
            protocol_of(tmp_path, Trainer(), "--repeats 2 --overwrite")
    again = Trainer()
    protocol_of(tmp_path, again, "--repeats 2 --overwrite")
    assert again.names == ["seed42", "seed43"]


def test_runs_on_the_same_folds_have_the_interval_of_independent_results(tmp_path):
    runs = {f"seed{seed}": {**results_of(seed), "test_digest": "same"} for seed in range(4)}
    found = summaries.summarise(runs)
    values = [run["test"]["srocc_q"] for run in runs.values()]
    assert found["share"] == 0
    half = stats.t.ppf(0.975, 3) * stats.sem(values)
    assert found["test"]["srocc_q"]["interval"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    assert "all on the same test fold" in summary_lines(found)[0]


def test_several_runs_read_a_split_file_but_write_none(tmp_path):
    with pytest.raises(ValueError, match=r"--split_file .*no\.csv: no such file"):
        protocol_of(tmp_path / "out", Trainer(), f"--repeats 2 --split_file {tmp_path / 'no.csv'}")


@pytest.mark.parametrize("flags", ["--output_dir elsewhere", "--config {config}"])
def test_where_options_come_from_and_where_runs_go_does_not_matter(tmp_path, flags):
    (tmp_path / "saved.json").write_text("{}")
    protocol_of(tmp_path / "out", Trainer(), "--repeats 2")
    idle = Trainer()
    protocol_of(tmp_path / "out", idle, f"--repeats 2 {flags.format(config=tmp_path / 'saved.json')}")
    assert not idle.configs


def test_a_demo_goes_on_although_its_runs_have_saved_where_they_drew_their_data(tmp_path):
    def run(config: TrainingConfig) -> dict[str, Any]:
        return trainer(replace(config, data_csv_path="drawn/data.csv", image_base_dir="drawn/images"))

    trainer = Trainer()
    for _ in range(2):
        protocol.run_all(protocol.SCORER, parse_args(["--demo", "--repeats", "2"]), run, tmp_path, RUNTIME)
    assert trainer.names == ["seed42", "seed43"]
    moved = "--repeats 2 --data_csv_path drawn/data.csv"
    protocol_of(tmp_path / "plain", Trainer(), "--repeats 2")
    assert "(--data_csv_path)" in refusal(tmp_path / "plain", moved)


@pytest.mark.parametrize("flags", ["--repeats 2", "--repeats 2 --overwrite", "--repeats 2 --dry_run"])
def test_a_folder_of_something_else_is_refused(tmp_path, flags):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    assert "holds other things than repeated runs" in refusal(tmp_path, flags)
    assert "photo.jpg: is a file, must be a folder" in refusal(tmp_path / "photo.jpg", flags)
    (tmp_path / "run").mkdir()
    for name in ("config.json", "splits.csv", "results.json"):
        (tmp_path / "run" / name).write_text("{}")
    assert "holds other things than repeated runs" in refusal(tmp_path / "run", flags)


def test_overwrite_runs_all_again_with_other_options(tmp_path):
    protocol_of(tmp_path, Trainer(), "--repeats 2")
    again = Trainer()
    protocol_of(tmp_path, again, "--repeats 2 --lr 0.01 --overwrite")
    assert again.names == ["seed42", "seed43"] and {config.lr for config in again.configs} == {0.01}
    assert json.loads((tmp_path / "protocol.json").read_text())["lr"] == 0.01


def test_an_older_summary_does_not_outlive_the_start_of_another(tmp_path):
    protocol_of(tmp_path, Trainer(), "--repeats 2")
    with pytest.raises(KeyboardInterrupt):
        protocol_of(tmp_path, Trainer(stop_at=0), "--repeats 2 --lr 0.01 --overwrite")
    assert not files_in(tmp_path) & {"summary.json", "summary.csv"}


def test_a_dry_run_plans_the_first_run_says_how_many_and_writes_nothing(tmp_path, capsys):
    trainer = Trainer()
    assert protocol_of(tmp_path / "out", trainer, "--kfold 3 --dry_run") == {}
    assert [(config.dry_run, config.fold) for config in trainer.configs] == [(True, 1)]
    assert "this 3 times: seed42-fold1, seed42-fold2, seed42-fold3" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# -- statistics


def runs_with(*, trained: Sequence[float], floor: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Runs with these SROCC of quality; all other measures are drawn."""
    runs = {f"seed{i}": results_of(i) for i in range(len(trained))}
    for run, own, other in zip(runs.values(), trained, floor, strict=True):
        run["test"]["srocc_q"] = own
        run["floors"]["mean"]["srocc_q"] = other
    return runs


def test_known_numbers_give_known_statistics():
    """t(0.975) of 2 degrees of freedom is 4.30265, and 1 / 3 + 10 / 40 is 7 / 12."""
    found = summaries.summarise(runs_with(trained=[0.1, 0.2, 0.6], floor=[0.0, 0.3, 0.3]))
    assert found["runs"] == ["seed0", "seed1", "seed2"] and found["images"] == IMAGES
    trained, floor, over = (
        found["test"]["srocc_q"],
        found["floors"]["mean"]["srocc_q"],
        found["over"]["mean"]["srocc_q"],
    )
    assert trained["values"] == [0.1, 0.2, 0.6]
    for part, mean, median, sd in (
        (trained, 0.3, 0.2, math.sqrt(0.07)),
        (floor, 0.2, 0.3, math.sqrt(0.03)),
        (over, 0.1, 0.1, 0.2),  # of 0.1, -0.1 and 0.3: paired by run
    ):
        half = 4.3026527 * sd * math.sqrt(7 / 12)
        assert (part["mean"], part["median"], part["sd"]) == pytest.approx((mean, median, sd))
        assert part["interval"] == pytest.approx([mean - half, mean + half], abs=1e-6)


def test_all_measures_of_all_predictors_are_summarised_and_losses_are_not():
    found = summaries.summarise(runs_with(trained=[0.1, 0.2], floor=[0.3, 0.4]))
    measures = {f"{name}_{task}" for name in MEASURES for task in "qc"} | {"main"}
    assert set(found["test"]) == set(found["floors"]["mean"]) == set(found["over"]["mean"]) == measures
    of_c = {key for key in measures if not key.endswith("_q")}
    assert set(found["floors"]["zero_shot_cosine"]) == set(found["over"]["zero_shot_cosine"]) == of_c


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_the_order_of_the_runs_changes_no_statistic(seeds, random):
    runs = {f"seed{seed}": results_of(seed) for seed in seeds}
    shuffled = {name: runs[name] for name in random.sample(sorted(runs), len(runs))}
    there, back = (
        summaries.summary_table(summaries.summarise(runs)),
        summaries.summary_table(summaries.summarise(shuffled)),
    )
    pd.testing.assert_frame_equal(there, back, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_floor_that_only_some_runs_have_is_left_out_whichever_they_are(place):
    """Such as the mean of each prompt, which needs a prompt that folds share."""
    runs = runs_with(trained=[0.1, 0.2, 0.6], floor=[0.0, 0.3, 0.3])
    expected = summaries.summarise(runs)
    list(runs.values())[place]["floors"]["prompt_mean"] = dict(results_of(9)["test"])
    assert summaries.summarise(runs) == expected
    for number, run in enumerate(runs.values()):
        if number != place:
            run["floors"] = {"prompt_mean": dict(results_of(number)["test"]), **run["floors"]}
    assert list(summaries.summarise(runs)["floors"]) == (
        ["mean", "zero_shot_cosine", "prompt_mean"] if place == 0 else ["prompt_mean", "mean", "zero_shot_cosine"]
    )


def test_a_single_run_has_no_interval():
    found = summaries.summarise(runs_with(trained=[0.5], floor=[0.25]))
    part = found["test"]["srocc_q"]
    assert part == {"mean": 0.5, "sd": 0.0, "median": 0.5, "interval": None, "values": [0.5]}
    assert found["over"]["mean"]["srocc_q"]["mean"] == 0.25
    assert summaries.summary_table(found)[["low", "high"]].isna().all(axis=None)
    text = "\n".join(summary_lines(found))
    assert ".." not in text and "()" not in text and "chance in training" not in text
    assert text.startswith("1 run, train 40, val 8, test 10 images; no intervals")


def test_the_table_has_a_row_for_each_predictor_and_measure():
    found = summaries.summarise(runs_with(trained=[0.1, 0.2, 0.6], floor=[0.0, 0.3, 0.3]))
    table = summaries.summary_table(found).set_index(["predictor", "measure"])
    assert len(table) == 11 + 11 + 6 and table.index.is_unique
    own = table.loc[("trained_model", "srocc_q")]
    assert own.tolist() == pytest.approx([0.3, math.sqrt(0.07), 0.2, *found["test"]["srocc_q"]["interval"]])


def numbers_in(line: str) -> list[float]:
    return [float(text) for text in re.findall(r"[+-]?\d+\.\d{3}", line)]


def test_the_lines_hold_the_numbers_under_their_titles():
    runs = runs_with(trained=[0.1, 0.2, 0.6], floor=[0.0, 0.3, 0.3])
    for run in runs.values():
        run["floors"]["generator_mean"] = run["floors"]["mean"]
    lines = summary_lines(summaries.summarise(runs))
    assert not any("minus mean" in line for line in lines)  # which orders nothing
    assert lines[0].startswith("3 runs, train 40, val 8, test 10 images in the first")
    assert re.split(r"  +", lines[1].strip()) == (
        ["SROCC", "sd", "median", "95 % interval", "PLCC", "sd", "fitted", "KROCC", "RMSE"]
    )
    values = {key: [run["test"][key] for run in runs.values()] for key in ("plcc_c", "plcc_fit_c", "krocc_c", "rmse_c")}
    srocc = [run["test"]["srocc_c"] for run in runs.values()]
    half = stats.t.ppf(0.975, 2) * np.std(srocc, ddof=1) * math.sqrt(7 / 12)
    ends = [np.mean(srocc) - half, np.mean(srocc) + half]
    plcc, fitted, krocc, rmse = values.values()
    expected = [np.mean(srocc), np.std(srocc, ddof=1), np.median(srocc), *ends, np.mean(plcc), np.std(plcc, ddof=1)]
    (line,) = (line for line in lines if line.startswith("consistency  trained model"))
    assert numbers_in(line) == pytest.approx([*expected, np.mean(fitted), np.mean(krocc), np.mean(rmse)], abs=6e-4)
    (line,) = (line for line in lines if line.startswith("SROCC of quality, trained model minus generator mean: "))
    assert numbers_in(line)[0] == 0.1
    titles = [line[:13].strip() for line in lines[2:]]
    assert titles[:7] == ["quality", "", "", "consistency", "", "", ""]
    assert [line[13:].split("  ")[0] for line in lines[2:9]] == (
        [*["trained model", "mean", "generator mean"], *["trained model", "mean", "zero shot cosine", "generator mean"]]
    )


def test_extra_scores_are_summarised_by_their_names():
    runs = runs_with(trained=[0.1, 0.3], floor=[0.0, 0.2])
    for run in runs.values():
        run["test"] |= {f"{name}_authenticity": run["test"][f"{name}_q"] for name in MEASURES}
    summary = summaries.summarise(runs)
    assert tasks_of(summary["test"]) == ["q", "c", "authenticity"]
    assert summary["test"]["srocc_authenticity"] == summary["test"]["srocc_q"]
    assert any(line.startswith("authenticity trained model") for line in summary_lines(summary))
