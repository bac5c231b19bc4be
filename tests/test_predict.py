"""The command line of predict.py."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable

import pytest

import predict


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """A function that expects a command line to be refused in one line, and returns it."""

    def check(*argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            predict.main(argv)
        message = capsys.readouterr().err
        assert caught.value.code == 2
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    return check


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--evaluate", "--evaluate: needs human scores: --csv FILE or --dataset NAME --data_root DIR"),
        ("--evaluate a.png", "--evaluate: needs human scores"),
        ("--evaluate --csv a.csv a.png", "and no IMAGE"),
        ("--evaluate --image_dir .", "--evaluate: needs human scores"),
        ("--dataset spaq --data_root .", "--dataset: works with --evaluate only"),
        ("--data_root .", "--dataset: works with --evaluate only"),
        ("--checkpoint another a.png", "several --checkpoint: works with --evaluate only"),
        ("--evaluate --dataset spak --data_root .", "--dataset spak: did you mean spaq?"),
        ("--evaluate --dataset csv --data_root .", "--dataset csv: must be of agiqa-3k, "),
        ("--evaluate --dataset spaq", "--data_root: has 0 folder(s) for 1 --dataset"),
        ("--evaluate --dataset spaq,tid2013 --data_root .", "--data_root: has 1 folder(s) for 2 --dataset"),
        ("--evaluate --csv a.csv --out no/such/folder.csv", "--out no/such/folder.csv: must be a file in a folder"),
        ("--evaluate --csv a.csv", "none: not a checkpoint"),
        ("--export out --csv a.csv", "--csv: does not go with --export, drop one of the two"),
        ("--export out --out a.csv", "--out: does not go with --export"),
        ("--export out --evaluate --csv a.csv", "--csv: does not go with --export"),
        ("--export . a.png", "--export .: must be a new folder, in one that exists"),
        ("--export no/such", "--export no/such: must be a new folder, in one that exists"),
        ("--export out --device cuda", "--device cuda: an export is made on the CPU, drop it"),
        (
            "--export out --prompt cat",
            "--prompt: belongs to IMAGE... or --image_dir; without them the run's own prompts",
        ),
        ("--export out --precision int4", "--precision"),
        ("--export out --checkpoint other", "several --checkpoint: works with --evaluate only"),
        ("--precision int8 a.png", "--precision int8: works with --export only"),
        ("--export out a.png", "a.png: no such image"),
        ("--export out", "none: not a checkpoint"),
        ("--push_to_hub a/b", "none: not a checkpoint"),
        ("--push_to_hub a/b a.png", "a.png: --push_to_hub scores no images, drop one of the two"),
        ("--push_to_hub a/b --image_dir .", "--image_dir: does not go with --push_to_hub"),
        ("--push_to_hub a/b --export out", "--export: does not go with --push_to_hub"),
        ("--push_to_hub a/b --checkpoint other", "several --checkpoint: works with --evaluate only"),
        ("--push_to_hub scorer", "--push_to_hub scorer: must be ORG/NAME"),
        ("--push_to_hub a/../b", "--push_to_hub a/../b: must be ORG/NAME"),
        ("--push_to_hub a/..", "--push_to_hub a/..: must be ORG/NAME"),
        ("--push_to_hub a/b --license 'my own'", "--license my own: must be a name such as mit"),
        ("--public a.png", "--public: works with --push_to_hub only"),
        ("--yes --export out", "--yes: works with --push_to_hub only"),
        ("--license mit a.png", "--license: works with --push_to_hub only"),
        ("--evaluate --csv a.csv --checkpoint hf-hub:a", "--checkpoint hf-hub:a: must be hf-hub:ORG/NAME"),
    ],
)
def test_command_lines_that_cannot_be_are_refused(refused, flags, message):
    assert message in refused("--checkpoint", "none", *shlex.split(flags))


def test_several_processes_cannot_share_an_evaluation(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--evaluate: runs in one process" in refused("--checkpoint", "none", "--evaluate", "--csv", "a.csv")


def test_an_export_says_what_it_lacks(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnxs") else name)
    said = refused("--checkpoint", "none", "--export", "out")
    assert said == "error: --export: needs onnxscript: pip install -r requirements-extra.txt\n"


def test_several_processes_cannot_share_an_export(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--export: runs in one process" in refused("--checkpoint", "none", "--export", "out")
