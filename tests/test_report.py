"""The command line of report.py: which page it writes, what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import undraw, write_run

import report


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run."""
    return write_run(tmp_path / "run", lr=1e-3)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which these arguments are refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        report.main(argv)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


def test_the_pages_of_one_run_and_of_several_are_written_and_named(run, tmp_path, capsys, monkeypatch):
    undraw(monkeypatch)
    report.main([str(run)])
    assert capsys.readouterr().out == f"page: {run / 'report.html'}\n" and (run / "report.html").is_file()
    other = write_run(tmp_path / "other", spread=2.0, lr=1e-3)
    for flags, page in ([], "comparison.html"), (["--out", str(tmp_path / "here.html")], "here.html"):
        report.main([str(other), str(run), *flags])
        head, first, second, note, said = capsys.readouterr().out.splitlines()
        assert head.endswith("differs in") and first.startswith("run ") and second.startswith("other ")
        assert "only 8 prompts" in note
        assert said == f"page: {tmp_path / page}" and (tmp_path / page).is_file()


def test_names_do_nothing_to_a_terminal(run, tmp_path, capsys, monkeypatch):
    undraw(monkeypatch)
    report.main([str(run), str(write_run(tmp_path / "\x1b[31mred", spread=2.0))])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and r"\x1b[31mred" in printed


def test_a_wrong_folder_or_flag_is_refused_in_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused([str(tmp_path / "absent")], capsys)
    assert "no folder" in refused([str(tmp_path / "file")], capsys)
    assert "no run folder" in refused([str(tmp_path / "empty")], capsys)
    assert "named twice" in refused([str(run), str(run / ".." / "run")], capsys)
    assert "is for several runs" in refused([str(run), "--out", "x.html"], capsys)
    assert "in a folder that exists" in refused([str(run), str(tmp_path), "--out", "absent/x.html"], capsys)
    assert "--aut" in refused([str(run), "--aut"], capsys)
    (tmp_path / "empty" / "protocol.json").write_text("{}")
    assert "no finished repeated runs" in refused([str(tmp_path / "empty")], capsys)
