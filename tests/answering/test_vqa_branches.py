"""Runs with the graph branch, alone and beside the fine one: trained, fused, measured, asked, gone on with."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from small_vqa import ONE_GRAPH, differences, drawn_set, error_of, people, read, run_until, table, tiny_flags, tiny_run

import main
from answering.configs import parse_args

BOTH = ["--branches", "fine,graph", "--sg_source", "gt", *ONE_GRAPH]
GRAPH = ["--branches", "graph", "--sg_source", "gt", *ONE_GRAPH]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of a run of both branches. Read it, do not change it."""
    return tiny_run(tmp_path_factory.mktemp("both") / "run", *BOTH, "--epochs", "1")


def test_each_branch_answers_by_itself_and_both_together(both):
    results, metrics = read(both / "results.json"), pd.read_csv(both / "metrics.csv")
    assert list(results["branches"]) == ["fine", "graph"]
    for name, one in results["branches"].items():
        assert one["accuracy"] + one["gain_of_fused"] == pytest.approx(results["measures"]["accuracy"])
        low, high = one["gain_interval"]
        assert low <= one["gain_of_fused"] <= high
        assert 0 <= metrics[f"val_accuracy_{name}"][0] <= 1
    losses = [metrics[f"loss_{name}"][0] for name in ("fused", "fine", "graph")]
    assert metrics["loss"][0] == pytest.approx(0.1 * losses[0] + losses[1] + losses[2], rel=1e-4)
    assert read(both / "best" / "scorer.json")["options"]["branches"] == "fine,graph"


def test_the_graph_branch_alone_looks_at_no_region(tmp_path, capsys):
    folder = tiny_run(tmp_path / "run", *GRAPH, "--epochs", "1")
    out = capsys.readouterr().out
    assert "regions   no image is looked at" in out
    results = read(folder / "results.json")
    assert results["branches"] == {} and "image only" not in results["floors"]
    assert "note      --sg_source gt: people drew these scene graphs" in out


@pytest.mark.parametrize("sampler", ["aimle", "gumbel", "simple", "soft"])
def test_every_sampler_trains(sampler, tmp_path):
    folder = tiny_run(tmp_path / "run", *GRAPH, "--sampler_type", sampler, "--epochs", "1", "--nb_samples", "2")
    assert np.isfinite(read(folder / "results.json")["measures"]["loss"])


def test_predicted_graphs_of_the_drawn_set_are_others_and_give_nothing_away(tmp_path, capsys):
    folder = tiny_run(tmp_path / "run", "--branches", "graph", "--sg_source", "predicted", *ONE_GRAPH, "--epochs", "1")
    assert read(folder / "results.json")["notes"] == []
    true, seen = (read(drawn_set("GQA") / place / "val_sceneGraphs.json") for place in ("sceneGraphs", "predicted"))
    assert true.keys() == seen.keys() and true != seen
    assert sum(len(graph["objects"]) for graph in seen.values()) < sum(len(graph["objects"]) for graph in true.values())


@pytest.mark.parametrize("branches", [BOTH, GRAPH])
def test_the_test_fold_is_worth_again_what_the_run_said(branches, tmp_path):
    folder = tiny_run(tmp_path / "run", *branches, "--epochs", "1")
    data = ["--data_root", str(drawn_set("GQA")), "--sg_source", "gt"]
    data += ["--features", str(drawn_set("GQA") / "objects")] if "fine,graph" in branches else []
    found = main.main(["--mode", "evaluate", "--checkpoint", str(folder), *data])
    told = read(folder / "results.json")
    assert found["measures"] == pytest.approx(told["measures"], rel=1e-4)
    assert found["branches"].keys() == told["branches"].keys()


def test_a_run_of_both_is_gone_on_with_exactly(tmp_path):
    flags = tiny_flags(*BOTH, "--epochs", "2")
    main.run(parse_args([*flags, "--output", str(tmp_path / "whole")]))
    run_until(flags, tmp_path / "part", 7)
    assert main.main(["--resume", str(tmp_path / "part")])["epochs"] == 2
    assert differences(tmp_path / "whole", tmp_path / "part") == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--branches", "graph"], "--branches graph: reads scene graphs; say by --sg_source gt or predicted"),
        (["--branches", "fine,fine"], "names one twice"),
        (["--branches", "coarsest"], "--branches coarsest: 'coarsest' is none of fine, coarse, graph"),
        ([*GRAPH, "--question_only"], "--question_only looks at no image: drop it, or the graph branch"),
    ],
)
def test_branches_that_cannot_be_are_told_in_one_line(flags, said, capsys):
    assert said in error_of("--demo", *flags, capsys=capsys)


def test_every_question_of_the_test_fold_is_answered(both):
    told = table(both / "predictions.csv")
    assert set(told["id"]) == {name for name, _ in people("GQA", "val").items()}
    assert json.loads((both / "examples.json").read_text())
