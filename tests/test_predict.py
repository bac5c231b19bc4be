"""The command line of predict.py."""

from __future__ import annotations

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
    ],
)
def test_command_lines_that_cannot_be_are_refused(refused, flags, message):
    assert message in refused("--checkpoint", "none", *shlex.split(flags))


def test_several_processes_cannot_share_an_evaluation(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--evaluate: runs in one process" in refused("--checkpoint", "none", "--evaluate", "--csv", "a.csv")
