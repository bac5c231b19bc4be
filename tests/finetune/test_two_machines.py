"""torchrun on two machines, for which two network namespaces stand: one process in each, and a cable that is pulled."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, needed
from stopped_runs import OF_TIME
from two_processes import session

import baseline

pytestmark = pytest.mark.slow

TINY = "--clip_model tiny --clip_pretrained none --image_size 56 --device cpu --no_report --no_test"
# baseline.py that counts another process as gone after ten seconds.
IMPATIENT = """
import sys
import baseline
from training import devices
devices.BEAT_SECONDS, devices.SILENT_SECONDS = 0.5, 10.0
baseline.main(sys.argv[1:])
"""


class Cable:
    """Two namespaces, each with one end of a cable."""

    def __init__(self) -> None:
        self.names = [f"machine-{os.getpid()}-{end}" for end in "ab"]
        self.cards = ["end-a", "end-b"]

    def ip(self, words: str) -> None:
        """Call ip; {a} and {b} are the namespaces."""
        words = words.format(a=self.names[0], b=self.names[1])
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)

    def start(self, script: Path, flags: str, cwd: Path) -> ExitStack:
        """Start a program by torchrun on both; holds the two processes as `running`."""
        stack = ExitStack()
        stack.running = []
        for rank, (name, card) in enumerate(zip(self.names, self.cards, strict=True)):
            torchrun = (
                f"{sys.executable} -m torch.distributed.run --nnodes=2 --node_rank={rank} --nproc_per_node=1 "
                f"--master_addr=10.77.0.1 --master_port=29500 {script} {flags}"
            )
            command = ["ip", "netns", "exec", name, *shlex.split(torchrun)]
            how = {"GLOO_SOCKET_IFNAME": card, "PYTHONPATH": str(ROOT)}
            stack.running.append(stack.enter_context(session(command, cwd, **how)))
        return stack


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    """Two namespaces that are connected."""
    needed("iproute2", shutil.which("ip"))
    cable = Cable()
    try:
        try:
            cable.ip("netns add {a}")
            cable.ip("netns add {b}")
            cable.ip("link add end-a netns {a} type veth peer name end-b netns {b}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for end, address in (("a", 1), ("b", 2)):
            cable.ip(f"-n {{{end}}} addr add 10.77.0.{address}/24 dev end-{end}")
            cable.ip(f"-n {{{end}}} link set lo up")
            cable.ip(f"-n {{{end}}} link set end-{end} up")
        yield cable
    finally:
        for end in "ab":
            with contextlib.suppress(subprocess.CalledProcessError):
                cable.ip(f"netns del {{{end}}}")


def flags_of(demo_set: tuple[Path, Path], folder: Path, more: str) -> str:
    return f"--data_csv_path {demo_set[0]} --image_base_dir {demo_set[1]} --output_dir {folder} {TINY} {more}"


def test_two_machines_train_as_one_process_does(cable, demo_set, tmp_path):
    how = "--dropout 0 --loss mse+plcc --epochs 2 --lr 1e-4 --batch_size 13"
    baseline.main(shlex.split(flags_of(demo_set, tmp_path / "one", how)))
    with cable.start(ROOT / "baseline.py", flags_of(demo_set, tmp_path / "two", how), tmp_path) as both:
        said = [process.communicate(timeout=300) for process in both.running]
        assert [process.returncode for process in both.running] == [0, 0], said
    assert "machine   2 processes, " in said[0][0] and said[1][0] == ""
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv").drop(columns=OF_TIME) for name in ("one", "two"))
    assert one.columns.tolist() == two.columns.tolist() and len(one) == 2
    np.testing.assert_allclose(two, one, rtol=3e-4, atol=1e-4)  # a correlation magnifies rounding


def test_a_cut_cable_ends_both_with_a_line_each_and_the_same_command_goes_on(cable, demo_set, tmp_path):
    script, run = tmp_path / "impatient.py", tmp_path / "run"
    script.write_text(IMPATIENT)
    how = "--freeze_clip --epochs 60 --lr 1e-3 --batch_size 5 --save_every_minutes 0.001 --resume auto"
    flags = flags_of(demo_set, run, how)
    with cable.start(script, flags, tmp_path) as both:
        deadline = time.monotonic() + 240
        while not ((run / "metrics.csv").exists() and list((run / "state").glob("step*"))):
            assert all(process.poll() is None for process in both.running) and time.monotonic() < deadline
            time.sleep(0.02)
        cable.ip("-n {a} link set end-a down")
        cut = time.monotonic()
        errors = [process.communicate(timeout=120)[1] for process in both.running]
    cable.ip("-n {a} link set end-a up")
    assert time.monotonic() - cut < 60
    for other, text in enumerate(errors[::-1]):
        (line,) = [line for line in text.splitlines() if line.startswith("stopped: ")]
        assert f"process {other} (" in line and "has not been heard for 10 s" in line and "same command goes on" in line
        assert not any(line.startswith("error: ") for line in text.splitlines())
    assert not (run / "results.json").exists()

    with cable.start(script, flags, tmp_path) as both:
        said = [process.communicate(timeout=300) for process in both.running]
        assert [process.returncode for process in both.running] == [0, 0], said
    assert "resume    epoch" in said[0][0]
    assert pd.read_csv(run / "metrics.csv")["epoch"].tolist() == list(range(1, 61))
    assert len(json.loads((run / "results.json").read_text())["resumed"]) == 1


def test_a_network_card_that_they_do_not_share_is_told_in_a_line(cable, demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(cable, "cards", ["lo", "lo"])
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    with cable.start(script, flags_of(demo_set, tmp_path / "run", ""), tmp_path) as both:
        errors = [process.communicate(timeout=240)[1] for process in both.running]
    said = [[line for line in text.splitlines() if line.startswith(("error: ", "stopped: "))] for text in errors]
    assert [len(lines) for lines in said] == [1, 1], said  # the other one may only notice that it is alone
    (told, *_) = [line for (line,) in said if line.startswith("error: ")]
    assert "cannot reach each other (" in told and told.endswith("GLOO_SOCKET_IFNAME which network card they share")
