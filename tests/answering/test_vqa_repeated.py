"""main.py with --repeats and --no_test: what varies, what is measured, what is left unread, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import Page, undraw, write_run
from small_vqa import NUM_TEST, drawn_cache, error_of, finished, people, read, table, tiny_flags, tiny_run, write_table
from stopped_runs import StopsAt

import compare
import main
import protocol
import report
from answering.configs import parse_args
from answering.folds import digest_of
from answering.run_files import PROGRAM
from evaluation import metrics
from multirun import comparison
from pages.comparison_page import compare_folders
from training import signals
from vqa.questions import Questions

SEEDS = ("seed1204", "seed1205")


@pytest.fixture(scope="module")
def repeated(tmp_path_factory) -> tuple[list[str], Path, dict[str, Any]]:
    """Two repeated runs of two branches: command line, folder, summary. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("repeated") / "out"
    branches = ["--branches", "fine,graph", "--sg_source", "gt", "--general_hidden_dim", "16", "--mgat_layers", "2"]
    argv = [*tiny_flags(*branches), "--repeats", "2", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        return argv, folder, main.main([*argv, "--use_report"])


def questions_of(run: Path, fold: str = "val") -> set[str]:
    """Ids of a run's predictions, all of them of an official fold."""
    found = set(table(run / "predictions.csv")["id"])
    assert found <= people("GQA", fold).keys()
    return found


def test_each_seed_is_an_ordinary_run_and_all_are_summarised(repeated):
    _, folder, summary = repeated
    made = {"protocol.json", "summary.json", "summary.csv", "report.html", "figures"}
    assert {path.name for path in folder.iterdir()} == {*SEEDS, *made}
    assert read(folder / "summary.json") == summary and summary["runs"] == list(SEEDS)
    results = [read(folder / name / "results.json") for name in SEEDS]
    accuracies = [found["measures"]["accuracy"] for found in results]
    assert summary["test"]["accuracy"]["values"] == accuracies
    assert summary["test"]["accuracy"]["interval"] == metrics.resampled_interval(accuracies, 0)
    for name in ("fine", "graph"):
        alone = [found["branches"][name] for found in results]
        assert summary["floors"][f"{name} branch alone"]["accuracy"]["values"] == [one["accuracy"] for one in alone]
        over = summary["over"][f"{name} branch alone"]["accuracy"]["values"]
        assert over == pytest.approx([one["gain_of_fused"] for one in alone])
    for name, values in results[0]["floors"].items():
        assert summary["floors"][name]["accuracy"]["values"][0] == values
    kinds = summary["kinds"]["structural"]
    assert {kind: found["values"][1] for kind, found in kinds.items()} == {
        kind: results[1]["by_kind"]["structural"][kind]["accuracy"] for kind in kinds
    }


def test_seeds_share_the_official_test_fold_and_draw_validation_folds_of_their_own(repeated, tmp_path):
    _, folder, summary = repeated
    assert questions_of(folder / SEEDS[0]) == questions_of(folder / SEEDS[1])
    assert len(set(summary["tests"])) == 1 and summary["share"] == 0
    for seed in ("1204", "1205"):
        tiny_run(tmp_path / seed, "--seed", seed, "--no_test", "--epochs", "1")
    assert questions_of(tmp_path / "1204", "train") != questions_of(tmp_path / "1205", "train")


def test_where_the_test_fold_is_drawn_seeds_draw_others(tmp_path):
    path = write_table(tmp_path / "data")
    argv = ["--dataset", "csv", "--data_csv_path", str(path), "--question_only", "--repeats", "2", "--num_hid", "8"]
    argv += ["--AOA_layers", "0", "--epochs", "1", "--batch_size", "16", "--update_freq", "1", "--no_report"]
    summary = main.main([*argv, "--output", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")])
    assert len(set(summary["tests"])) == 2
    assert summary["share"] == summary["images"]["test"] / summary["images"]["train"]


def test_the_same_command_runs_nothing_again_and_another_is_refused_in_one_line(repeated, monkeypatch, capsys):
    argv, folder, summary = repeated
    monkeypatch.setattr(main, "run", lambda config: pytest.fail("ran again"))
    assert main.main(argv) == summary
    assert main.main(["--resume", str(folder), "--cache_dir", str(drawn_cache()), "--no_report"]) == summary
    said = error_of(*argv, "--lr", "0.01", capsys=capsys)
    assert said.startswith(f"error: --output {folder}: its runs were made with other options (--lr); choose another")
    assert "(--features)" in error_of(*argv, "--features", "clip", capsys=capsys)
    assert "than repeated runs" in error_of(*argv, "--output", str(folder / SEEDS[0]), capsys=capsys)


def test_stopped_ones_go_on_to_the_end_of_those_that_were_not(repeated, tmp_path, monkeypatch):
    argv, folder, _ = repeated
    argv = [*argv, "--output", str(tmp_path / "out")]
    monkeypatch.setattr(signals, "Signals", lambda: StopsAt(4))
    with pytest.raises(SystemExit):
        main.main(argv)
    done = [name for name in SEEDS if (tmp_path / "out" / name / "results.json").exists()]
    assert len(done) < 2 and not (tmp_path / "out" / "summary.json").exists()
    monkeypatch.setattr(signals, "Signals", lambda: StopsAt(None))
    summary = main.main(["--resume", str(tmp_path / "out"), "--cache_dir", str(drawn_cache()), "--no_report"])
    assert summary == read(folder / "summary.json")


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main.main([*tiny_flags(), "--repeats", "3", "--dry_run", "--output", str(out)]) == {}
    assert "this 3 times: seed1204, seed1205, seed1206" in capsys.readouterr().out
    assert not out.exists()


def test_the_table_and_the_page_are_made_again(repeated, capsys, monkeypatch):
    _, folder, summary = repeated
    undraw(monkeypatch)
    protocol.main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 runs, train 25, val 3, test 4 images in the first; " + (
        "all on the same test fold: intervals are those of chance in training"
    )
    own = summary["test"]["accuracy"]
    (line,) = (line for line in lines if line.startswith("trained model"))
    assert line.split()[2:] == [
        *(f"{own[name]:.3f}" for name in ("mean", "sd", "median")),
        *("{:.3f} .. {:.3f}".format(*own["interval"]).split()),
    ]
    over = summary["over"]["graph branch alone"]["accuracy"]["mean"]
    assert any(line.startswith(f"accuracy, trained model minus graph branch alone: {over:+.3f} (") for line in lines)
    (folder / "report.html").unlink()
    report.main([str(folder)])
    page = Page(folder / "report.html")
    rows = {row[0]: row for row in page.tables["scores beside the floors"]}
    assert rows["trained model"][1] == f"{100 * own['mean']:.1f}%"
    assert {"fine branch alone", "graph branch alone", "most frequent answer"} < rows.keys()
    assert [row[0] for row in page.tables["runs"]] == ["run", *SEEDS]
    assert [row[0] for row in page.tables["by structural"]][1:] == list(summary["kinds"]["structural"])


def test_a_summary_that_lacks_a_part_is_refused(repeated, tmp_path, capsys):
    _, folder, summary = repeated
    (tmp_path / "protocol.json").write_text((folder / "protocol.json").read_text())
    for change, said in (
        ({"kinds": []}, "'kinds' is no object"),
        ({"test": {"binary": summary["test"]["binary"]}}, "'test' has no 'accuracy'"),
    ):
        (tmp_path / "summary.json").write_text(json.dumps({**summary, **change}))
        with pytest.raises(SystemExit):
            report.main([str(tmp_path)])
        assert said in capsys.readouterr().err


def test_without_the_test_fold_all_is_of_the_validation_fold(tmp_path, monkeypatch, capsys):
    scored: list[set[str]] = []
    score = Questions.score

    def watched(self: Questions, given: Any) -> np.ndarray:
        scored.append(set(self.ids))
        return score(self, given)

    monkeypatch.setattr(Questions, "score", watched)
    run = tiny_run(tmp_path / "run", "--no_test")
    assert "accuracy, val fold" in capsys.readouterr().out
    results, found = read(run / "results.json"), questions_of(run, "train")
    assert results["fold"] == "val" and results["floors"] == {}
    assert results["measures"]["accuracy"] == pytest.approx(results["val"]["accuracy"])
    assert len(found) == results["data"]["val"]["questions"]
    assert scored and not set.union(*scored) & people("GQA", "val").keys()
    undraw(monkeypatch)
    report.main([str(run)])
    assert "Accuracy, validation fold" in Page(run / "report.html").text


def test_what_excludes_repeats_is_refused(capsys):
    assert "--no_test: --repeats is for measuring on test folds" in error_of(
        "--demo", "--repeats", "2", "--no_test", capsys=capsys
    )
    asked = ("--mode", "evaluate", "--checkpoint", "R", "--data_root", "D", "--features", "F", "--repeats", "2")
    assert "--repeats 2: belongs to training" in error_of(*asked, capsys=capsys)


def test_a_digest_is_of_questions_and_answers_and_not_of_folds():
    def asked(*rows: tuple[str, str]) -> Questions:
        ids, answers = zip(*rows, strict=True)
        plain = {"images": ["i"] * len(rows), "texts": ["Is it?"] * len(rows)}
        return Questions(ids=list(ids), answers=[[answer] for answer in answers], kinds={}, source="", **plain)

    a, b, c = ("1", "yes"), ("2", "no"), ("3", "red")
    whole = digest_of([asked(a, b, c)])
    assert digest_of([asked(c), asked(b, a)]) == whole
    assert digest_of([asked(a, b)]) != whole and digest_of([asked(a, b, ("3", "blue"))]) != whole


def test_what_a_demo_fills_in_is_no_other_option_and_what_a_user_says_is():
    plain = parse_args(["--demo", "--branches", "fine"])
    before = PROGRAM.result_options(plain)
    filled = {**plain.to_json(), "data_root": "cache/drawn", "features": "cache/drawn/objects"}
    PROGRAM.refuse_other_options(Path("f"), "", filled, plain)
    with pytest.raises(ValueError, match=r"--output f: .*\(--features\)"):
        PROGRAM.refuse_other_options(Path("f"), "", {**filled, "features": "clip"}, plain)
    assert "cache_dir" not in before and before["num_hid"] == 128


def refusal_of(program: Any, *folders: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a program refuses folders with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        program.main([str(folder) for folder in folders])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_repeated_runs_are_compared_seed_by_seed(repeated, tmp_path, capsys):
    _, folder, summary = repeated
    better = tmp_path / "better"
    better.mkdir()
    (better / "protocol.json").write_text((folder / "protocol.json").read_text())
    shifted = json.loads(json.dumps(summary))
    shifted["test"]["accuracy"] |= {"values": [value + 0.1 for value in summary["test"]["accuracy"]["values"]]}
    (better / "summary.json").write_text(json.dumps(shifted))
    found = comparison.compare_protocols([folder, better])
    assert found["d_accuracy"][1] == pytest.approx(0.1)
    assert found[["accuracy_low", "accuracy_high"]].iloc[1].tolist() == pytest.approx([0.1, 0.1])
    assert found[found["by"] != ""]["d_accuracy"].dropna().eq(0).all() and len(found) > 4
    shifted["tests"] = ["x", "y"]
    (better / "summary.json").write_text(json.dumps(shifted))
    assert "has other seeds, folds, images or scores" in refusal_of(compare, folder, better, capsys=capsys)
    single = folder / SEEDS[0]
    assert "cannot be compared with each other" in refusal_of(compare, folder, single, capsys=capsys)


def test_runs_have_a_page_that_compares_them(tmp_path, monkeypatch):
    undraw(monkeypatch)
    first, other = finished("GQA"), tiny_run(tmp_path / "other", "--num_hid", "8", "--no_test")
    third = tiny_run(tmp_path / "third", "--num_hid", "24")
    compare_folders([first, other, third], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    rows = {row[0]: row for row in page.tables["runs"]}
    names = {name.rpartition("/")[2]: row for name, row in rows.items()}
    assert names["other"][2] == "–" and names["third"][2].startswith("0.")
    assert page.tables["runs"][0][:3] == ["run", "val accuracy", "accuracy"]
    assert "num_hid" in page.tables["options that differ"][0] and "output" not in page.tables["options that differ"][0]
    differences = page.tables["paired differences"]
    assert differences[0][2:] == ["kind", "questions", "accuracy", "by accuracy"]
    assert differences[1][2:4] == ["all questions", str(NUM_TEST)] and differences[2][2].startswith("answer: ")
    assert "Accuracy is that of the test fold" in page.text and "Accuracy on the validation fold" in page.text


def test_programs_are_not_mixed_on_a_page(tmp_path):
    scorer = write_run(tmp_path / "scorer")
    with pytest.raises(ValueError, match=r"is of main\.py, .* of baseline\.py"):
        compare_folders([scorer, finished("GQA")], tmp_path / "page.html")
