"""The command line of compare.py: what it prints and writes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

import compare
from multirun import comparison


@pytest.fixture
def run(tmp_path) -> Callable[..., str]:
    """A function that writes the folder of a finished run of 60 images and returns its name."""

    def write(name: str, seed: int = 0) -> str:
        mos = np.random.default_rng(9).uniform(1, 5, 60)
        usual = {
            "name": [f"{i:03}.png" for i in range(60)],
            "set": "csv",
            "split": "test",
            "cluster": np.arange(60) // 3,
        }
        pred = mos + np.random.default_rng(seed).normal(size=60)
        (tmp_path / name).mkdir()
        table = pd.DataFrame({**usual, "mos_quality": mos, "pred_quality": pred})
        table.to_csv(tmp_path / name / "predictions.csv", index=False)
        return str(tmp_path / name)

    return write


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """A function that expects a command line to be refused in one line, and returns it."""

    def check(*argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            compare.main(argv)
        message = capsys.readouterr().err
        assert caught.value.code == 2
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    return check


def test_the_table_is_printed_and_written_as_it_is_returned(run, tmp_path, capsys):
    out = tmp_path / "table.csv"
    found = compare.main([run("one", 1), run("other", 2), "--out", str(out)])
    pd.testing.assert_frame_equal(pd.read_csv(out), found, rtol=1e-5, check_dtype=False)
    assert capsys.readouterr().out.splitlines() == comparison.table_lines(found)


def test_what_cannot_be_compared_is_refused_in_one_line(run, refused, tmp_path):
    one = run("one")
    assert "name at least two run folders" in refused(one)
    assert "required: RUN" in refused()
    assert "did you mean --out?" in refused("a", "b", "--outt", "c")
    assert f"error: {tmp_path}: no run folder, predictions.csv is missing\n" == refused(one, str(tmp_path))
    (tmp_path / "repeated").mkdir()
    (tmp_path / "repeated" / "protocol.json").write_text("{}")
    assert "cannot be compared with each other" in refused(one, str(tmp_path / "repeated"))
    assert "no finished repeated runs" in refused(*[str(tmp_path / "repeated")] * 2)
