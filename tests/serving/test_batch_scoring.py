"""Scoring large tables: in pieces, kept when stopped, gone on with by the same command, shared by processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_run import finished_run, load, loaded

import models
import predict
from inputs import decoding
from serving import batch_scoring, commands
from serving.scorer import Scorer
from storage.chunks import Chunks
from training import devices

CHUNK = 8  # rows in a piece, and in a batch, so that batches are the same in pieces and at once
NUM_ROWS = 28  # three whole pieces and a half


@pytest.fixture(scope="module")
def trained(demo_set) -> Path:
    """The folder of a finished run. Read it, do not change it."""
    return finished_run(demo_set)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch) -> None:
    """Loading takes most of the time, and is not what is tested here."""

    def load_once(path: str | Path, *, amp: str = "off", **_: object) -> Scorer:
        scorer = copy(loaded(Path(path)))
        scorer.runtime = replace(scorer.runtime, precision=amp)
        return scorer

    monkeypatch.setattr(Scorer, "load", load_once)


@pytest.fixture
def table(demo_set, tmp_path) -> SimpleNamespace:
    """A CSV of 28 images and prompts, its folder of images, and where the scores shall go."""
    rows = pd.read_csv(demo_set[0])[["name", "prompt"]].head(NUM_ROWS)
    (tmp_path / "images").mkdir()
    for name in rows["name"]:
        shutil.copy(demo_set[1] / name, tmp_path / "images" / name)
    rows.to_csv(tmp_path / "data.csv", index=False)
    return SimpleNamespace(
        rows=rows, csv=tmp_path / "data.csv", images=tmp_path / "images", out=tmp_path / "scores.csv", demo=demo_set[1]
    )


@pytest.fixture
def command(trained, table) -> list[str]:
    """The command line that scores the table in pieces."""
    source = ["--csv", str(table.csv), "--image_dir", str(table.images)]
    sizes = ["--chunk_size", str(CHUNK), "--batch_size", str(CHUNK)]
    return ["--checkpoint", str(trained), *source, "--out", str(table.out), *sizes]


@pytest.fixture
def expected(trained, table) -> pd.DataFrame:
    """The table's scores, computed at once."""
    paths = [table.images / name for name in table.rows["name"]]
    scores = Scorer.load(trained).score(paths, table.rows["prompt"].tolist(), batch_size=CHUNK)
    return pd.concat([table.rows["name"], scores], axis=1)


@pytest.fixture
def scored(monkeypatch) -> list[list[str]]:
    """Names of the images of every piece, as they are scored."""
    calls = []
    original = Scorer.score_texts

    def score(self, paths, *args, **kwargs):
        calls.append([Path(path).name for path in paths])
        return original(self, paths, *args, **kwargs)

    monkeypatch.setattr(Scorer, "score_texts", score)
    return calls


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """A function that expects a command line to be refused in one line, and returns it."""

    def check(argv: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            predict.main(argv)
        message = capsys.readouterr().err
        assert caught.value.code == 2
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    return check


def parts_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def stop_at(number: int, monkeypatch) -> Callable[[], None]:
    """Interrupt the scoring of this piece, counted from 0, as Ctrl-C does. Returns what undoes that."""
    original = Chunks.write

    def write(self, found, scores):
        if found == number:
            raise KeyboardInterrupt
        original(self, found, scores)

    monkeypatch.setattr(Chunks, "write", write)
    return lambda: monkeypatch.setattr(Chunks, "write", original)


@pytest.fixture
def stopped(command, table, monkeypatch) -> list[str]:
    """The command line, after it was interrupted in its third piece."""
    resume = stop_at(2, monkeypatch)
    with pytest.raises(SystemExit) as caught:
        predict.main(command)
    assert caught.value.code == 130
    assert sorted(path.name for path in parts_of(table.out).iterdir()) == ["000000.csv", "000001.csv", "job.json"]
    resume()
    return command


def assert_scores(out: Path, expected: pd.DataFrame) -> None:
    """The file holds these scores, and no folder of parts is left beside it."""
    pd.testing.assert_frame_equal(pd.read_csv(out), expected, rtol=1e-7)
    assert not parts_of(out).exists()


# -- in pieces


def test_a_table_in_pieces_gets_the_scores_it_gets_at_once(command, table, expected, scored, capsys):
    table.out.write_text("older scores", encoding="utf-8")
    predict.main(command)
    assert_scores(table.out, expected)
    assert [len(names) for names in scored] == [8, 8, 8, 4]
    assert list(chain(*scored)) == table.rows["name"].tolist()
    printed = capsys.readouterr().out
    assert printed.startswith("28 rows scored in ") and printed.endswith(f"per second): {table.out}\n")
    in_pieces = table.out.read_bytes()
    predict.main([*command, "--chunk_size", "1000"])
    assert table.out.read_bytes() == in_pieces


def test_a_full_gpu_is_not_the_checkpoints_fault(trained, table, monkeypatch, capsys):
    def fill(model, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Scorer, "load", load)
    monkeypatch.setattr(models.ScoreModel, "to", fill)
    with pytest.raises(SystemExit) as caught:
        predict.main(["--checkpoint", str(trained), "--image_dir", str(table.images)])
    assert caught.value.code == 1 and capsys.readouterr().err == "failed: CUDA out of memory\n"


@pytest.fixture
def consistency_alone(trained, monkeypatch) -> None:
    """The model knows of nothing but consistency."""
    scorer = copy(loaded(trained))
    scorer.scales = {"c": scorer.scales["c"]}
    monkeypatch.setattr(Scorer, "load", lambda path, **_: scorer)


@pytest.mark.usefixtures("consistency_alone")
def test_a_piece_without_any_prompt_has_no_consistency_and_stops_nothing(command, table):
    prompts = table.rows["prompt"].where(table.rows.index >= CHUNK, "")
    table.rows.assign(prompt=prompts).to_csv(table.csv, index=False)
    predict.main(command)
    assert pd.read_csv(table.out)["pred_align"].isna().tolist() == [True] * CHUNK + [False] * (NUM_ROWS - CHUNK)


@pytest.mark.usefixtures("consistency_alone")
def test_where_no_prompt_is_given_a_model_that_needs_one_says_so(trained, command, table, refused):
    for rows in (table.rows[["name"]], table.rows.assign(prompt=" ")):
        rows.to_csv(table.csv, index=False)
        assert "trained on consistency alone: give it prompts" in refused(command)
    folder = ["--checkpoint", str(trained), "--image_dir", str(table.images), "--out", str(table.out)]
    assert "trained on consistency alone: give it prompts" in refused(folder)
    predict.main([*folder, "--prompt", "a circle"])
    assert pd.read_csv(table.out)["pred_align"].notna().all()


@pytest.mark.parametrize(("amp", "precision"), [("auto", "bf16"), ("off", "off")])
def test_auto_is_for_scoring_what_it_is_for_training(trained, monkeypatch, amp, precision):
    monkeypatch.setattr(devices, "has_fast_bf16", lambda: True)
    monkeypatch.setattr(devices, "LEAST_WEIGHTS", 1)
    assert load(trained, device="cpu", amp=amp).runtime.precision == precision


def test_an_image_and_a_prompt_that_meet_again_in_a_piece_are_scored_once(trained, command, table, scored):
    rows = table.rows.head(4)
    rows = pd.concat([rows, rows.head(1).assign(prompt="a blue square"), rows[3:0:-1]], ignore_index=True)
    rows.to_csv(table.csv, index=False)
    predict.main(command)
    assert scored == [rows["name"].tolist()[:5]]
    alone = Scorer.load(trained).score([table.images / name for name in rows["name"]], rows["prompt"].tolist())
    assert_scores(table.out, pd.concat([rows["name"], alone], axis=1))


def test_a_table_as_a_spreadsheet_writes_it_gets_the_same_scores_under_its_own_names(command, table, expected, capsys):
    names = [f".\\Images\\{name.upper()}" for name in table.rows["name"]]
    renamed = table.rows.assign(name=names)
    renamed.to_csv(table.csv, index=False, sep="\t", encoding="utf-16")
    predict.main(command)
    found = pd.read_csv(table.out)
    assert found["name"].tolist() == names
    table.out.write_text(found.assign(name=table.rows["name"]).to_csv(index=False))
    assert_scores(table.out, expected)
    said = capsys.readouterr().err.splitlines()
    assert f"note: {table.csv}: read with UTF-16, tabs between columns" in said
    assert (
        sum("image name(s) are taken for files spelled otherwise" in line for line in said) == 4
    )  # one for each piece


def test_a_folder_in_pieces_gets_the_scores_it_gets_at_once(trained, table, scored):
    (table.images / "deeper").mkdir()
    first = min(table.rows["name"])
    shutil.move(table.images / first, table.images / "deeper" / first)
    argv = ["--checkpoint", str(trained), "--image_dir", str(table.images), "--prompt", "a red circle"]
    predict.main([*argv, "--out", str(table.out), "--chunk_size", "10"])
    found = pd.read_csv(table.out).set_index("name")
    assert [len(names) for names in scored] == [10, 10, 8]
    assert sorted(found.index) == sorted({f"deeper/{first}", *table.rows["name"]} - {first})
    alone = Scorer.load(trained).score([table.images / name for name in found.index], "a red circle")
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_images_and_prompts_named_on_the_command_line_go_into_a_file_too(trained, table):
    paths = [str(table.images / name) for name in table.rows["name"][:3]]
    predict.main(["--checkpoint", str(trained), *paths, "--out", str(table.out), "--chunk_size", "2"])
    found = pd.read_csv(table.out)
    assert found["name"].tolist() == paths
    alone = Scorer.load(trained).score(paths)
    np.testing.assert_allclose(found["pred_quality"], alone["pred_quality"], rtol=1e-5)
    assert found["pred_align"].isna().all()


def test_each_image_is_decoded_once(command, monkeypatch):
    opened = []
    original = decoding.load_image

    def load_image(path, image_size):
        opened.append(path)
        return original(path, image_size)

    monkeypatch.setattr(decoding, "load_image", load_image)
    predict.main(command)
    assert len(opened) == len(set(opened)) == NUM_ROWS


@pytest.mark.parametrize("chunk", ["1", "2", "100"])
def test_blank_rows_quotes_and_a_byte_order_mark_read_the_same_in_pieces(trained, table, chunk, scored):
    a, b, c = table.rows["name"][:3]
    text = f'prompt, name ,other\n"red, and\nround", {a},\n\n,,\nblue,{b}\n,{c},x\n\n'
    table.csv.write_bytes(text.encode("utf-8-sig"))
    argv = ["--checkpoint", str(trained), "--csv", str(table.csv), "--image_dir", str(table.images)]
    predict.main([*argv, "--out", str(table.out), "--chunk_size", chunk])
    found = pd.read_csv(table.out)
    alone = Scorer.load(trained).score([table.images / name for name in (a, b, c)], ["red, and\nround", "blue", ""])
    assert found["name"].tolist() == [a, b, c]
    np.testing.assert_allclose(found[["pred_quality", "pred_align"]], alone, rtol=1e-5)
    assert np.isnan(found["pred_align"][2])
    assert max(map(len, scored[:-1])) <= int(chunk)


@pytest.mark.parametrize("place", [[], ["--out"]])
def test_a_name_that_is_repeated_is_scored_twice(trained, table, capsys, place):
    name = table.rows["name"][0]
    table.csv.write_text(f"name,prompt\n{name},a red circle\n./{name},a blue square\n{name},\n", encoding="utf-8")
    argv = ["--checkpoint", str(trained), "--csv", str(table.csv), "--image_dir", str(table.images)]
    predict.main([*argv, *place, *([str(table.out)] if place else [])])
    rows = table.out.read_text(encoding="utf-8").splitlines() if place else capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 3 and all(name in row for row in rows[1:])


def test_cut_prompts_are_counted_over_all_pieces(trained, table, capsys):
    long = " ".join(["round"] * 300)
    prompts = [f"{long} {n}" if n % 2 else "short" for n in range(6)]
    rows = pd.DataFrame({"name": table.rows["name"][:6], "prompt": [*prompts[:4], "", ""]})
    rows.to_csv(table.csv, index=False)
    argv = ["--checkpoint", str(trained), "--csv", str(table.csv), "--image_dir", str(table.images)]
    predict.main([*argv, "--out", str(table.out), "--chunk_size", "2"])
    assert capsys.readouterr().err == "note: 2 prompt(s) exceed CLIP's context length and were cut\n"


# -- going on


def test_the_same_command_goes_on_and_scores_no_finished_piece_again(stopped, table, expected, scored, capsys):
    capsys.readouterr()
    predict.main(stopped)
    assert scored == [table.rows["name"].tolist()[16:24], table.rows["name"].tolist()[24:]]
    assert_scores(table.out, expected)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "going on: 16 rows were scored before"
    assert second.startswith("12 rows scored in ")


@pytest.mark.parametrize("number", [0, 2])
def test_a_command_that_was_killed_while_it_tidied_up_goes_on(command, table, expected, monkeypatch, scored, number):
    parts = Chunks(table.out, {})
    original = Path.unlink

    def unlink(path, missing_ok=False):
        if path == parts.path(number):
            raise KeyboardInterrupt
        original(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(SystemExit):
        predict.main(command)
    monkeypatch.setattr(Path, "unlink", original)
    assert parts.finished() == list(range(number, 4))
    scored.clear()
    predict.main(command)
    assert len(scored) == number
    assert_scores(table.out, expected)


def test_a_second_command_for_the_same_file_is_refused_while_the_first_one_scores(
    command, table, expected, refused, monkeypatch, scored
):
    write, said = Chunks.write, []

    def write_and_be_disturbed(self: Chunks, number: int, scores: pd.DataFrame) -> None:
        write(self, number, scores)
        if number == 1:
            said.append(refused(command))

    monkeypatch.setattr(Chunks, "write", write_and_be_disturbed)
    monkeypatch.setattr(Chunks, "wait_for", None)  # which would be for ever
    predict.main(command)
    assert said == [f"error: --out {table.out}: another run is using it now; wait for its end or choose another\n"]
    assert len(scored) == 4
    assert_scores(table.out, expected)


@pytest.mark.parametrize("left", [["job.json"], ["job.json", ".000000.csv.123.tmp"], []])
def test_a_folder_of_parts_without_a_part_stands_in_nobodys_way(command, table, expected, refused, left):
    parts_of(table.out).mkdir()
    for name in left:
        (parts_of(table.out) / name).write_text('{"csv": "another"}')
    broken = table.images / table.rows["name"][0]
    image = broken.read_bytes()
    broken.unlink()
    refused(command)
    assert not parts_of(table.out).exists()
    broken.write_bytes(image)
    predict.main(command)
    assert_scores(table.out, expected)


def test_a_broken_image_stops_with_its_name_and_once_repaired_the_command_goes_on(
    command, table, expected, refused, scored
):
    table.out.write_text("older scores", encoding="utf-8")
    names = table.rows["name"].tolist()[16:23]
    broken = {name: (table.images / name).read_bytes() for name in names}
    for name in names:
        (table.images / name).write_bytes(b"x")
    (table.images / names[-1]).write_bytes(broken[names[-1]][:-20])  # truncated
    message = refused(command)
    assert "7 of 8 images cannot be read: " in message
    assert message.count("(not an image)") == 5 and all(name in message for name in names[:5])
    assert message.endswith(", ...; the scores so far are kept, the same command goes on from there\n")
    assert table.out.read_text(encoding="utf-8") == "older scores"
    for name, content in broken.items():
        (table.images / name).write_bytes(content)
    scored.clear()
    predict.main(command)
    assert len(scored) == 2
    assert_scores(table.out, expected)


def test_a_missing_image_stops_and_once_it_is_there_the_command_goes_on(command, table, expected, refused, scored):
    name = table.rows["name"][9]
    (table.images / name).unlink()
    assert f"): {name}; the scores so far are kept" in refused(command)
    shutil.copy(table.demo / name, table.images)
    scored.clear()
    predict.main(command)
    assert len(scored) == 3
    assert_scores(table.out, expected)


def another_csv(table, command):
    with table.csv.open("a", encoding="utf-8") as file:
        file.write(f"{table.rows['name'][0]},once more\n")


def another_folder(table, command):
    command[command.index("--image_dir") + 1] = str(shutil.copytree(table.images, table.out.parent / "others"))


def another_checkpoint(table, command):
    copied = shutil.copytree(command[1], table.out.parent / "run")
    command[1] = str(copied)


def another_size(table, command):
    command[command.index("--chunk_size") + 1] = "7"


def another_precision(table, command):
    command += ["--amp", "bf16"]


def another_column(table, command):
    command += ["--prompt_column", "name"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (another_csv, "csv"),
        (another_folder, "image_dir"),
        (another_checkpoint, "checkpoint"),
        (another_precision, "amp"),
        (another_size, "chunk_size"),
        (another_column, "columns"),
    ],
)
def test_parts_of_another_command_are_refused_until_their_folder_is_deleted(
    stopped, table, refused, scored, change, what
):
    change(table, stopped)
    message = refused(stopped)
    assert f"(other {what})" in message and str(parts_of(table.out)) in message and "delete" in message
    assert not scored and len(list(parts_of(table.out).iterdir())) == 3
    shutil.rmtree(parts_of(table.out))
    predict.main(stopped)
    assert len(list(chain(*scored))) == len(pd.read_csv(table.out)) >= NUM_ROWS


def test_parts_of_a_folder_with_other_images_or_another_prompt_are_refused(trained, table, refused, monkeypatch):
    argv = ["--checkpoint", str(trained), "--image_dir", str(table.images), "--out", str(table.out)]
    argv += ["--chunk_size", "20", "--prompt"]
    stop_at(1, monkeypatch)
    with pytest.raises(SystemExit):
        predict.main([*argv, "a red circle"])
    assert "(other prompt)" in refused([*argv, "a blue circle"])
    shutil.copy(table.images / table.rows["name"][0], table.images / "one_more.png")
    assert "(other images)" in refused([*argv, "a red circle"])


def test_another_checkpoint_at_the_same_place_is_another_command(stopped, table, trained, refused):
    own = shutil.copytree(trained, table.out.parent / "run")
    shutil.rmtree(parts_of(table.out))
    stopped[1] = str(own)
    (table.images / table.rows["name"][20]).unlink()
    assert "missing" in refused(stopped)
    os.utime(own / "best" / "model.safetensors")
    assert "(other checkpoint)" in refused(stopped)


# -- mistakes


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"name,prompt\n", "has a header but no rows"),
        (b"name,prompt\n\n,\n", "has a header but no rows"),
        (b"name,name\nA,b\n", "the header has 'name' more than once"),
        (b"file,prompt\nA,b\n", "no column 'name' among 'file', 'prompt'; name yours with --name_column"),
        (b"name,prompt\nA,b\n\xff,c\n", "not UTF-8"),
        (b"name,prompt\nA,b\nA,b,c\n", "row 3 is longer than the header"),
        (b"name,prompt\nA,b\n\n,c\n", "row 4: the image name is empty"),
        (b"name,prompt\nA,b\n../A,c\n", "1 image name(s) leave"),
        (b"name,prompt\nB,b\n", "1 of 1 images are missing: B"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(trained, table, refused, content, says):
    table.csv.write_bytes(content.replace(b"A", table.rows["name"][0].encode()))
    argv = ["--checkpoint", str(trained), "--csv", str(table.csv), "--image_dir", str(table.images)]
    for place in ([], ["--out", str(table.out)]):
        message = refused([*argv, *place])
        assert says in message and "kept" not in message
        assert not table.out.exists() and not parts_of(table.out).exists()


@pytest.mark.parametrize("place", [[], ["--out", "scores.csv"]])
def test_sources_that_do_not_exist_are_refused_by_name(trained, table, refused, monkeypatch, place):
    monkeypatch.chdir(table.out.parent)
    for source, says in (
        (["--csv", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--csv", "images"], "images: "),
        (["--image_dir", "nowhere"], "--image_dir nowhere: no such folder"),
        (["nowhere.png"], "nowhere.png: no such image"),
    ):
        assert says in refused(["--checkpoint", str(trained), *source, *place])
    checkpoint = ["--checkpoint", "images", "--csv", "data.csv", "--image_dir", "images"]
    assert "images: not a checkpoint" in refused([*checkpoint, *place])


def test_a_mended_command_line_is_not_taken_for_another_command(command, table, expected, refused):
    assert "--prompt_column" in refused([*command, "--prompt_column", "text"])
    predict.main(command)
    assert_scores(table.out, expected)


def test_sizes_of_pieces_and_processes_without_a_file_are_refused(monkeypatch, refused, table):
    assert "--chunk_size 0: must be at least 1" in refused(["--checkpoint", "run", "a.png", "--chunk_size", "0"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "need --out" in refused(["--checkpoint", "run", "a.png"])
    assert commands.parse_predict_args(["--checkpoint", "run", "a.png", "--out", str(table.out)]).chunk_size == 4096


def test_from_python_unreadable_images_are_counted_and_named(trained, table, tmp_path):
    good = table.images / table.rows["name"][0]
    (tmp_path / "bad.png").write_bytes(b"x")
    floating = Image.new("F", (60, 60))
    scorer = Scorer.load(trained)
    with pytest.raises(OSError, match=r"3 of 5 images cannot be read: .*bad.png \(not an image\), image 4 \(floating"):
        scorer.score([good, tmp_path / "bad.png", Image.open(good), floating, "nowhere.png"], batch_size=1)


def test_the_number_of_cut_prompts_is_that_of_the_last_call(trained, table):
    path = table.images / table.rows["name"][0]
    scorer = Scorer.load(trained)
    scorer.score([path], " ".join(["round"] * 300))
    assert scorer.num_truncated == 1
    scorer.score([path])
    assert scorer.num_truncated == 0


# -- several processes


@pytest.mark.parametrize("done", [set(), {0, 2}])
def test_processes_share_the_pieces_that_are_missing_evenly(trained, command, table, done, monkeypatch):
    args = commands.parse_predict_args(command)
    scorer = copy(loaded(trained))
    runtime = scorer.runtime
    monkeypatch.setattr(Chunks, "write", lambda self, number, scores: taken.append(number))
    shares = []
    for rank in range(3):
        taken: list[int] = []
        scorer.runtime = replace(runtime, rank=rank, world=3)
        counts = batch_scoring.score_share(scorer, args, [], Chunks(table.out, {}), done)
        assert counts == (4, NUM_ROWS, 0)
        shares.append(taken)
    missing = [number for number in range(4) if number not in done]
    assert shares == [missing[rank::3] for rank in range(3)]


def under_torchrun(argv: list[str]) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "predict.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*program, *argv], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_two_processes_write_the_file_that_one_writes(command, table, expected, scored):
    done = under_torchrun(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("28 rows scored in ")
    assert_scores(table.out, expected)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_job_with_its_message_and_the_same_command_goes_on(
    command, table, expected, capsys
):
    name = table.rows["name"][25]  # in the last piece, the second process's second
    (table.images / name).write_bytes(b"x")
    done = under_torchrun(command)
    assert done.returncode != 0 and not table.out.exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "1 of 4 images cannot be read" in said[0] and name in said[0]
    shutil.copy(table.demo / name, table.images)
    predict.main(command)
    assert capsys.readouterr().out.startswith("going on: ")
    assert_scores(table.out, expected)


# -- links and pipes


@pytest.fixture
def linked(table, tmp_path) -> SimpleNamespace:
    """The table, one of whose images lies behind a link out of its folder, and one behind a link inside it."""
    outside, inside = table.rows["name"][:2]
    (tmp_path / "store").mkdir()
    shutil.move(table.images / outside, tmp_path / "store" / outside)
    (table.images / outside).symlink_to(tmp_path / "store" / outside)
    (table.images / "deep").mkdir()
    shutil.move(table.images / inside, table.images / "deep" / inside)
    (table.images / inside).symlink_to(Path("deep") / inside)
    (table.images / "more").symlink_to(tmp_path / "store")
    (table.images / "round").symlink_to(table.images)
    return SimpleNamespace(**vars(table), outside=outside, inside=inside)


def test_a_table_is_held_to_its_folder_unless_links_may_be_followed(command, linked, expected, refused):
    message = refused(command)
    assert f"1 image(s) lie behind links that leave {linked.images}: {linked.outside}; --follow_links" in message
    predict.main([*command, "--follow_links"])
    assert_scores(linked.out, expected)


def test_a_folder_is_searched_without_links_that_leave_it_and_says_how_many_it_passed_over(linked, capsys):
    found = batch_scoring.images_in(linked.images)
    assert sorted(found) == sorted({*linked.rows["name"], f"deep/{linked.inside}"} - {linked.outside})
    assert capsys.readouterr().err.startswith(f"note: 2 link(s) that leave {linked.images} were passed over; --follow")
    found = batch_scoring.images_in(linked.images, follow_links=True)
    assert sorted(found) == sorted({*linked.rows["name"], f"deep/{linked.inside}", f"more/{linked.outside}"})
    assert capsys.readouterr().err == ""


def test_a_pipe_named_as_an_image_is_an_error_and_not_passed_over(trained, table, refused, ends_in_time):
    os.mkfifo(table.images / "a.png")
    message = refused(["--checkpoint", str(trained), "--image_dir", str(table.images)])
    assert f"1 of 29 images cannot be read: {table.images / 'a.png'} (no regular file)" in message


def test_shards_in_any_order_are_joined_into_the_same_table(command, expected, table, scored, capsys, refused):
    for shard in (3, 1):
        predict.main([*command, "--shard", f"{shard}/3"])
    assert "shard 1 of 3: 2 of its 2 pieces scored" in capsys.readouterr().out
    assert [len(names) for names in scored] == [CHUNK, CHUNK, NUM_ROWS - 3 * CHUNK]  # pieces 3, 1 and 4
    assert not table.out.exists()
    error = refused([*command, "--join"])
    assert error.startswith("error: --join: 1 of 4 pieces are missing, such as number 2; run their shards again")
    predict.main([*command, "--shard", "2/3"])
    count = len(scored)
    predict.main([*command, "--shard", "2/3"])
    predict.main([*command, "--join"])
    assert len(scored) == count and f"{NUM_ROWS} rows joined" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(table.out), expected, rtol=1e-5)
    assert not parts_of(table.out).exists()


def test_what_is_missing_of_shards_is_scored_by_the_command_itself(command, expected, table):
    predict.main([*command, "--shard", "2/2"])
    predict.main(command)
    pd.testing.assert_frame_equal(pd.read_csv(table.out), expected, rtol=1e-5)


def test_shards_of_another_table_are_refused(command, table, refused):
    predict.main([*command, "--shard", "1/2"])
    table.rows.assign(prompt="something else").to_csv(table.csv, index=False)
    assert "holds scores of another command (other csv)" in refused([*command, "--shard", "2/2"])
    assert "holds scores of another command (other csv)" in refused([*command, "--join"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shard", "0/3"], "--shard 0/3: must be such as 3/16"),
        (["--shard", "4/3"], "--shard 4/3: must be such as 3/16"),
        (["--shard", "x"], "--shard x: must be such as 3/16"),
        (["--shard", "1/2", "--join"], "--join: joins what all shards have scored, drop --shard"),
    ],
)
def test_shards_that_cannot_be_are_told(command, flags, said, refused):
    assert said in refused([*command, *flags])
    assert "needs --out FILE" in refused([*command[:2], "a.png", "--shard", "1/2"])
