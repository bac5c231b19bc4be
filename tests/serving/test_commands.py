"""`serving/commands.py`: the command line of predict.py; that of app.py is tested with the page it starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from programs import run_program

from serving import commands


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["a.png"], "--checkpoint"),
        (["--checkpoint", "run"], "no images to score"),
        (["--checkpoint", "run", "a.png", "--csv", "b.csv"], "--csv, not both"),
        (["--checkpoint", "run", "a.png", "--image_dir", "b"], "--image_dir, not both"),
        (["--checkpoint", "run", "--csv", "b.csv", "--prompt", "a cat"], "--prompt"),
        (["--checkpoint", "run", "a.png", "--batch_size", "0"], "--batch_size 0: must be in [1, 65536]"),
        (["--checkpoint", "run", "a.png", "--num_workers", "-1"], "--num_workers -1: must be in [0, 256]"),
        (["--checkpoint", "run", "a.png", "--batch_size", "x"], "--batch_size"),
        (["--checkpoint", "run", "a.png", "--device", "tpu"], "--device"),
        (["--checkpoint", "run", "a.png", "--promt", "a cat"], "did you mean --prompt?"),
        (["--checkpoint", "run", "a.png", "--out", "nowhere/scores.csv"], "--out nowhere/scores.csv"),
        (["--checkpoint", "run", "a.png", "--out", "."], "--out .: must be a file"),
        (["--checkpoint", "run", "a.png", "--out", "b.JPG"], "--out b.JPG: is the name of an image"),
        (["--checkpoint", "run", "a.png", "--duplicates", "mean"], "--duplicates: works with --evaluate only"),
        (["--checkpoint", "run", "a.png", "--quality_column", "x"], "--quality_column: works with --evaluate only"),
        (
            ["--checkpoint", "run", "a.png", "--out", "x", "--shard", "1/2", "--amp", "auto"],
            "--shard: each machine would",
        ),
    ],
)
def test_predict_refuses_command_lines_that_cannot_work(argv, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        commands.parse_predict_args(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [["--csv", "data.csv"], ["--evaluate", "--csv", "data.csv"], ["data.csv"]])
def test_predict_does_not_write_over_what_it_reads(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.csv").write_text("name,prompt\n")
    with pytest.raises(ValueError, match=r"--out .*/data.csv: is what is to be read, and would be overwritten"):
        commands.parse_predict_args(["--checkpoint", "run", *flags, "--out", str(tmp_path / "data.csv")])


def test_predict_takes_one_source_of_images(tmp_path):
    for source in (["a.png", "b.png", "--prompt", "a cat"], ["--image_dir", "b"], ["--csv", "c", "--image_dir", "b"]):
        args = commands.parse_predict_args(["--checkpoint", "run", *source, "--out", str(tmp_path / "scores.csv")])
        assert (args.batch_size, args.num_workers, args.device) == (64, None, "auto")


def test_mistakes_of_predict_answer_without_torch_in_one_line_and_exit_code_2(tmp_path):
    done = run_program("predict.py", "--checkpoint", "x", cwd=tmp_path)
    assert done.code == 2 and done.out == ""
    assert len(done.err) == 1 and done.err[0].startswith("error: ") and "no images" in done.err[0]
    assert "torch" not in done.imported
    assert not list(tmp_path.iterdir())
