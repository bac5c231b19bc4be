"""`bench/`: both sides train alike, and the table is printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_both_sides_train_alike_and_the_table_says_by_how_much_ours_is_faster():
    flags = "--model tiny --freeze_layers 18 --num_images 40 --epochs 3 --cases partial"  # more epochs than views
    command = [sys.executable, "bench/speed.py", *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]  # it fails where losses differ
    head, _, *rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in head]
    assert [row[0].strip() for row in rows] == ["partial"]
    for row in rows:
        cells = dict(zip(head, (cell.strip() for cell in row), strict=True))
        ratio = float(cells["plain s"]) / float(cells["ours s"])
        assert float(cells["plain / ours"]) == pytest.approx(ratio, rel=0.02)
        assert float(cells["losses differ by"].rstrip("%")) < 0.1


@pytest.mark.slow
def test_an_epoch_of_questions_is_measured_beside_a_plain_loop(capfd):
    command = [sys.executable, str(ROOT / "bench" / "vqa_speed.py"), "--num_questions", "400", "--num_images", "200"]
    subprocess.run([*command, "--num_hid", "16", "--AOA_layers", "1"], check=True)
    row = capfd.readouterr().out.splitlines()[-1].split("|")
    assert row[1].strip() == "200" and all(float(cell.strip(" *")) > 0 for cell in row[2:-1])


@pytest.mark.slow
def test_scoring_is_measured_beside_a_plain_loop(capfd):
    command = [sys.executable, str(ROOT / "bench" / "predict_speed.py"), "--model", "ViT-S-32", "--num_images", "24"]
    subprocess.run([*command, "--repeats", "1"], check=True)
    said = capfd.readouterr().out
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| p")]
    assert [row[0].strip() for row in rows] == ["predict.py --amp off", "predict.py --amp bf16", "plain loop"]
    for _, seconds, rate, ratio in rows:
        assert float(rate) == pytest.approx(24 / float(seconds), rel=0.05)
        assert float(ratio) == pytest.approx(float(rows[-1][1]) / float(seconds), rel=0.05)
    assert said.count("SROCC to float32 0.9") == 2
