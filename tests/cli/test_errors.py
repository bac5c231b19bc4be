"""`cli/errors.py`: one line and an exit code for what a user can mend, a traceback for what only we can."""

from __future__ import annotations

import json

import pytest
from programs import run_program
from small_program import Baking, main

from cli import errors


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("--lr 0: must be above 0"), 2, "error: --lr 0: must be above 0\n"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 2, "error: x.png: No such file or directory\n"),
        (OSError("2 of 3 images cannot be read"), 2, "error: 2 of 3 images cannot be read\n"),
        (ArithmeticError("loss is nan"), 1, "failed: loss is nan\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (LookupError("run me again"), 75, "run me again\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(error, code, says, capsys):
    with pytest.raises(SystemExit) as caught, errors.one_line_errors(ArithmeticError, retry=LookupError):
        raise error
    assert caught.value.code == code
    printed = capsys.readouterr()
    assert printed.err == says and printed.out == ""


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), errors.one_line_errors():
        _ = 1 / 0


def test_control_characters_are_spelt_out_and_everything_else_is_left(capsys):
    text = "".join(map(chr, range(0x20, 0x7F))) + "é猫\t\n"
    assert errors.printable(text) == text
    hostile = "\x1b[2J\r\x00\x7f\x9b\u202e\u2066\ud800"
    assert errors.printable(hostile) == "\\x1b[2J\\r\\x00\\x7f\\x9b\\u202e\\u2066\\ud800"
    with errors.one_line_errors():
        print(f"printed {hostile}", flush=True)
    with pytest.raises(SystemExit), errors.one_line_errors():
        raise ValueError(hostile)
    out, err = capsys.readouterr()
    assert out == f"printed {errors.printable(hostile)}\n" and err == f"error: {errors.printable(hostile)}\n"


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--grams", "99"], 2, "error: --grams 99: must be in [100, 5000]\n"),
        (["--gram", "99"], 2, "error: unrecognized arguments: --gram 99 (did you mean --grams?)\n"),
        (["--flour", "rye", "--seeds"], 2, "error: --seeds do not stick to --flour rye: drop one\n"),
        (["--recipe", "nowhere.json"], 2, "error: --recipe nowhere.json: no such file\n"),
        (["--minutes", "600"], 1, "failed: the loaf is a coal\n"),
    ],
)
def test_another_program_answers_mistakes_in_one_line(argv, code, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    printed = capsys.readouterr()
    assert (caught.value.code, printed.err, printed.out) == (code, says, "")


def test_another_program_answers_without_heavy_libraries(tmp_path):
    done = run_program("tests/cli/small_program.py", "--grams", "700", cwd=tmp_path)
    assert (done.code, json.loads(done.out), done.err) == (0, Baking(grams=700).to_json(), [])
    assert {"argparse", "cli"} <= done.imported
    assert not done.imported & {"torch", "numpy", "pandas", "configs", "PIL"}
