"""Long runs and many of them: memory stays flat, epochs stay as fast, and nothing is left open in the end."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tqdm import tqdm

import baseline
import predict
import search
from inputs import image_store
from pages import report
from serving.scorer import Scorer

EPOCHS = 80
LEAK = 50_000  # bytes per epoch, planted
MOST_USED = 20_000  # bytes per epoch, that a run may need more: its history alone takes some 3 kB
MOST_OWN = 30_000  # bytes per epoch, that its process may grow by: gaps in between count
MOST_OBJECTS = 10  # per epoch, likewise
TINY = "--clip_model tiny --clip_pretrained none --image_size 56 --freeze_clip --batch_size 16"


def flags(demo_set: tuple[Path, Path], place: Path, name: str, more: str = "") -> list[str]:
    """A short run on the demo set."""
    paths = ["--data_csv_path", str(demo_set[0]), "--image_base_dir", str(demo_set[1])]
    folders = ["--cache_dir", str(place / "cache"), "--output_dir", str(place / name)]
    return [*paths, *folders, *shlex.split(f"{TINY} {more}")]


def slope(values: np.ndarray) -> float:
    """By how much values grow per epoch once a run has settled: the last three quarters, in four parts.

    The median of their fitted lines, as a buffer that a library takes once, at whatever epoch, is no growth.
    """
    parts = np.array_split(values[len(values) // 4 :], 4)
    return float(np.median([np.polyfit(np.arange(len(part)), part, 1)[0] for part in parts]))


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs Linux with glibc 2.33 or newer")
def test_memory_and_the_time_of_an_epoch_stay_flat_over_the_epochs_and_a_planted_leak_would_show(
    demo_set, tmp_path, is_torture, figure
):
    epochs = 5 * EPOCHS if is_torture else EPOCHS
    argv = [flags(demo_set, tmp_path, f"leak{leak}", f"--epochs {epochs} --no_report") for leak in (0, LEAK)]
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("memory_by_epoch.py")), str(leak), *more],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONMALLOC": "malloc"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for leak, more in zip((0, LEAK), argv, strict=True)
    ]
    said = [process.communicate(timeout=1800)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    plain, leaking = (np.array(json.loads(out.splitlines()[-1])) for out in said)
    assert len(plain) == len(leaking) == epochs
    used, own, objects = (slope(plain[:, column]) for column in range(3))
    found = f"{used / 1e3:.1f} kB in use per epoch over {epochs}, process {own / 1e3:.1f}"
    with_leak = slope(leaking[:, 0])
    figure("memory stays flat", f"{found}; {with_leak / 1e3:.1f} with a planted leak of {LEAK / 1e3:.0f}")
    assert used < MOST_USED < with_leak
    assert own < MOST_OWN
    assert objects < MOST_OBJECTS
    quarters = np.split(np.diff(plain[:, 3], prepend=plain[0, 3]), 4)
    assert np.quantile(quarters[-1], 0.1) < 1.3 * np.quantile(quarters[0], 0.1)  # epochs that nothing disturbed


def open_things() -> Counter[str]:
    """Open files by their name, threads and child processes, of this process."""
    found = Counter(f"thread {thread.name}" for thread in threading.enumerate())
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists them
            name = os.readlink(f"/proc/self/fd/{number}")
            found[f"file {name}"] += not name.endswith(".ttf")  # matplotlib keeps the few fonts that it has used
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has just ended
            found.update(f"process {number}" for number in (task / "children").read_text().split())
    return found


def mapped_files() -> set[str]:
    """Files of this test that are mapped into memory, whether or not they still have a name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "/cache/" in line}


@pytest.fixture
def nothing_stays_open() -> Iterator[Callable[[], None]]:
    """A function that fails if anything is open that was not when the test began."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs Linux's /proc")
    with tqdm(total=1, disable=True):  # starts a thread that stays, for all bars of the process
        pass
    before = open_things()

    def check() -> None:
        deadline = time.monotonic() + 10
        while (open_things() - before or mapped_files()) and time.monotonic() < deadline:  # threads take a moment
            time.sleep(0.05)
        assert open_things() - before == Counter()
        assert mapped_files() == set()

    gc.disable()  # what is only freed by chance counts as left
    yield check
    gc.enable()


@pytest.mark.parametrize(
    "more",
    [
        "--epochs 2 --num_workers 3",
        "--epochs 1 --num_workers 3 --no_cache --image_memory_gb 0 --no_report",  # decoded into a file
        "--epochs 1 --tensorboard --no_report",
    ],
)
def test_a_run_leaves_no_file_thread_or_process_open(demo_set, tmp_path, nothing_stays_open, more):
    baseline.main(flags(demo_set, tmp_path, "run", more))
    nothing_stays_open()


def test_a_run_that_fails_leaves_nothing_open(demo_set, tmp_path, nothing_stays_open, monkeypatch):
    decode, decoded = image_store.decode, []

    def fail(path: Path, size: int | None) -> np.ndarray:
        decoded.append(path)
        if len(decoded) > 20:
            raise OSError("the disk is gone")
        return decode(path, size)

    monkeypatch.setattr(image_store, "decode", fail)
    with pytest.raises(SystemExit) as exit_:
        baseline.main(flags(demo_set, tmp_path, "run", "--epochs 1 --num_workers 3 --image_memory_gb 0"))
    del exit_  # and with it the frames
    gc.collect()
    nothing_stays_open()


@pytest.fixture(scope="module")
def trained(demo_set, tmp_path_factory) -> Path:
    """A run folder. Read it, do not change it."""
    place = tmp_path_factory.mktemp("trained")
    baseline.main(flags(demo_set, place, "run", "--epochs 1 --no_report"))
    return place / "run"


def test_scoring_leaves_nothing_open(demo_set, trained, tmp_path, nothing_stays_open):
    scorer = Scorer.load(trained)
    scorer.score(sorted(demo_set[1].iterdir())[:5], "a red circle", num_workers=3)
    del scorer
    out = ["--out", str(tmp_path / "scores.csv"), "--chunk_size", "20", "--num_workers", "3"]
    predict.main(["--checkpoint", str(trained), "--csv", str(demo_set[0]), "--image_dir", str(demo_set[1]), *out])
    nothing_stays_open()


def test_a_report_leaves_nothing_open(trained, nothing_stays_open):
    report.write_report(trained)
    nothing_stays_open()


def test_a_search_leaves_nothing_open(demo_set, tmp_path, nothing_stays_open):
    (tmp_path / "space.json").write_text(json.dumps({"lr": {"low": 1e-4, "high": 1e-2, "log": True}}))
    own = ["--trials", "1", "--seeds", "1", "--space", str(tmp_path / "space.json")]
    search.main([*flags(demo_set, tmp_path, "search", "--epochs 1 --no_report"), *own])
    gc.unfreeze()  # what the search has taken for libraries' own
    gc.collect()
    nothing_stays_open()
