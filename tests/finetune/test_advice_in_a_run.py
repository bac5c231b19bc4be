"""Advice in a run: what it goes by, where it is said and kept, and that it can refuse the run."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from tiny_run import TINY, data_flags

import baseline
from backbones import towers
from cli.memo import NO_MEMO
from finetune import experiment, initial_model, plan
from guidance.advice import Facts, Remark
from guidance.arguments import parse_args

RUN = "--lr 0.5 --no_cache --no_report"


@pytest.fixture
def train(demo_set, tmp_path) -> Callable[[str], dict[str, Any]]:
    """A function that trains on the demo set with the given flags; returns the results."""

    def run(flags: str) -> dict[str, Any]:
        return baseline.main([*data_flags(demo_set), *TINY, "--output_dir", str(tmp_path / "run"), *shlex.split(flags)])

    return run


def test_advice_is_said_and_kept_and_the_run_goes_on(train, capsys):
    results = train(RUN)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice ")]
    assert said == [f"advice    {Remark(**remark)}" for remark in results["advice"]]
    assert {"--lr", "--epochs", "--val_size", "--batch_size"} == {remark["flag"] for remark in results["advice"]}
    assert results["epochs"] == 1


def test_strict_advice_refuses_before_anything_is_written(train, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(f"{RUN} --advice strict --cache_dir {tmp_path / 'cache'}")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith("error: --advice strict: 4 remark(s)") and printed.err.count("\n") == 1
    assert printed.out.count("advice    --") == 4
    assert list(tmp_path.iterdir()) == []


def test_advice_that_is_switched_off_says_nothing(train, capsys):
    results = train(f"{RUN} --advice off")
    assert results["advice"] == [] and "advice  " not in capsys.readouterr().out


def test_facts_are_those_of_data_model_and_machine(demo_set, tmp_path):
    table = pd.read_csv(demo_set[0])
    table.drop(columns="mos_align").assign(beauty=range(len(table))).to_csv(tmp_path / "data.csv", index=False)
    given = f"--data_csv_path {tmp_path / 'data.csv'} --image_base_dir {demo_set[1]} --extra_scores beauty"
    tiny = "--clip_model tiny --clip_pretrained none --image_size 112 --partial_freeze --freeze_layers 22 --crops 3"
    config = parse_args(f"{given} {tiny}".split())
    examples = experiment.read_examples(config, NO_MEMO)
    _, model, _ = initial_model.start_model(config, examples, NO_MEMO)
    cpu = SimpleNamespace(device=torch.device("cpu"), compute_dtype=torch.float32, world=1)
    parts = SimpleNamespace(config=config, examples=examples, model=model, runtime=cpu, num_steps=77)
    facts = plan.gather_facts(parts)
    per_view = towers.activation_bytes(model.clip.visual, torch.float32)
    assert facts == Facts(
        num_train=40,
        num_val=8,
        num_blocks=24,
        num_parameters=sum(parameter.numel() for parameter in model.clip.parameters()),
        tasks=("q", "beauty"),
        num_steps=77,
        free_memory=None,
        bytes_per_image=3 * per_view,
        draws_val=True,
    )
    gpu = SimpleNamespace(device=torch.device("cuda"), compute_dtype=torch.bfloat16, world=2, free_memory=lambda: 5e9)
    facts = plan.gather_facts(SimpleNamespace(**{**vars(parts), "runtime": gpu}))
    assert (facts.free_memory, facts.bytes_per_image) == (10e9, 1.5 * per_view)
    fixed = replace(examples, table=examples.table.assign(split=examples.folds))
    assert not plan.gather_facts(SimpleNamespace(**{**vars(parts), "examples": fixed})).draws_val
    assert asdict(facts)["draws_val"]


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["real", "drawn"])
def test_the_demo_itself_is_built_without_a_remark(tmp_path, demo):
    argv = ["--demo", demo, "--dry_run", "--advice", "strict", "--cache_dir", str(tmp_path), "--output_dir"]
    assert baseline.main([*argv, str(tmp_path / "run")]) == {}
