"""Small data sets that several test files share."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from sources import demo

ROOT = Path(__file__).resolve().parent.parent
# Before torch is imported, and for the processes that tests start: on small images threads only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "2")
COLUMNS = ("name", "prompt", "mos_quality", "mos_align")
TEMPORARY = Path(
    os.environ.get("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
)  # the system's own, in which tests must leave nothing
# What libraries leave there that know no better. Only these, as others may use that folder meanwhile.
LEFT_BY_LIBRARIES = ("torchelastic_*", "torchinductor_*", "pymp-*", "gradio*", "image-scores-*", "playwright*")

BEFORE, LEFT = pytest.StashKey[set[Path]](), pytest.StashKey[list[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="run the long versions of the tests marked torture")


def pytest_configure(config: pytest.Config) -> None:
    """What holds for all tests, before any is imported.

    Hypothesis tries the same every time, and more and other cases with --torture; tests may say how many. Tests, and
    the processes that they start, have a temporary folder of their own.
    """
    # No deadline: a busy machine may stop for a while at any place.
    settings.register_profile("short", derandomize=True, deadline=None)
    settings.register_profile("torture", max_examples=10_000, deadline=None)
    settings.load_profile("torture" if config.getoption("--torture") else "short")
    temporary = tempfile.TemporaryDirectory(prefix="tests-")  # now, as importing a library may leave something there
    config.add_cleanup(temporary.cleanup)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(TEMPORARY))  # where pytest keeps what the last tests wrote
    os.environ["TMPDIR"] = temporary.name
    tempfile.tempdir = None  # so that it is looked up again


@pytest.fixture
def is_torture(request: pytest.FixtureRequest) -> bool:
    """Whether the long version of a test is asked for."""
    return request.config.getoption("--torture")


@pytest.fixture
def figure(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[str, str], None]:
    """A function that takes down what was measured of a promise, for the table at the end: (promise, figure)."""
    return lambda promise, measured: record_property("figure", [promise, request.node.nodeid, measured])


def left_behind() -> set[Path]:
    """What libraries have left in the system's temporary folder, by whomever it was."""
    return {path for pattern in LEFT_BY_LIBRARIES for path in TEMPORARY.glob(pattern)}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember what lies in the system's temporary folder already."""
    session.config.stash[BEFORE] = left_behind()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that has left something in the system's temporary folder."""
    new = left_behind() - session.config.stash[BEFORE]
    is_worker = hasattr(session.config, "workerinput")  # of pytest-xdist, whose main process looks when all have ended
    if new and not is_worker:
        session.config.stash[LEFT] = sorted(new)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the tests have measured of what is promised (docs/reliability.md), and what they have left behind."""
    for path in terminalreporter.config.stash.get(LEFT, []):
        terminalreporter.write_line(f"ERROR: the tests have left {path}", red=True)
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    rows = sorted(value for report in reports for name, value in report.user_properties if name == "figure")
    if rows:
        terminalreporter.section("promises")
        for promise, test, measured in rows:
            terminalreporter.write_line(f"{promise:<34}{measured}  ({test.rpartition('/')[2]})")


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and the processes that they start, leave nothing in the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """CSV file and image folder of a demo set with 8 prompts, 64 images. Read it, do not change it."""
    return demo.write_demo_set(tmp_path_factory.mktemp("demo") / "set", num_prompts=8)


def data_folder(name: str, variable: str, file: str, skipping: str) -> Path:
    """The folder of data that are not part of the project, beside it or where a variable says; skips without them."""
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / "data" / name)
    if not (folder / file).is_file():
        pytest.skip(f"{skipping} here: set {variable} to a folder with its files")
    return folder


@pytest.fixture(scope="session")
def agiqa_dir() -> Path:
    """The folder of AGIQA-3K: data.csv and images/."""
    return data_folder("agiqa-3k", "AGIQA3K_DIR", "data.csv", "AGIQA-3K (data.csv, images/) is not")


@pytest.fixture(scope="session")
def wild_dir() -> Path:
    """Files as people have them: label files, tables, images."""
    return data_folder("wild", "WILD_DIR", "AIGC_MOS_Zscore.xlsx", "files as they are in the wild are not")


@pytest.fixture(scope="session")
def vqa_dir() -> Path:
    """Real questions, answers, scene graphs and features in the official formats: vqa-v2/, gqa/ and more."""
    return data_folder("vqa", "VQA_DIR", "gqa/sceneGraphs.json", "VQA data (vqa-v2/, vqa-v2-60k/, gqa/) are not")


def needed(package: str, found: str | None) -> str:
    """The path of a program that a package of Debian's brings; a test that needs one that is not there is skipped."""
    if found is None and os.environ.get("REQUIRE_DEBIAN"):
        pytest.fail(f"REQUIRE_DEBIAN is set, but Debian's {package} is not installed")
    if found is None:
        pytest.skip(f"needs Debian's {package}")
    return found


@pytest.fixture
def ends_in_time() -> Iterator[None]:
    """Ends the process of a test that hangs: a thread that waits for a pipe hears nothing else."""
    signal.alarm(120)
    yield
    signal.alarm(0)


@dataclass(frozen=True)
class DataFiles:
    """A CSV file and its image folder."""

    csv: Path
    images: Path

    @property
    def flags(self) -> list[str]:
        """The options of baseline.py that name them."""
        return ["--data_csv_path", str(self.csv), "--image_base_dir", str(self.images)]


def scored_rows(num_prompts: int = 8, per_prompt: int = 3) -> list[dict[str, Any]]:
    """Rows of a data set without any fault: enough prompts for three folds, all scores different."""
    rows = []
    for number in range(num_prompts * per_prompt):
        prompt, maker = divmod(number, per_prompt)
        quality, consistency = round(1 + 0.01 * number, 2), round(5 - 0.02 * number, 2)
        cells = (f"gen{maker}_{prompt}.png", f"thing {prompt}", quality, consistency)
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, newline: str = "\n") -> str:
    """Rows as CSV text; the columns are those of the first row unless given, a missing cell is empty."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator=newline, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., DataFiles]:
    """A function that writes a CSV and a small noisy PNG for each name that stays in the image folder."""

    def make(
        rows: Sequence[Mapping[str, Any]] = (),
        *,
        columns: Sequence[str] | None = None,
        text: str | None = None,  # the whole CSV, instead of `rows`, which then only name the images
        encoding: str = "utf-8",
        newline: str = "\n",
        without: Sequence[str] = (),  # names that get no image
        size: tuple[int, int] = (24, 16),
    ) -> DataFiles:
        files = DataFiles(tmp_path / "set" / "data.csv", tmp_path / "set" / "images")
        files.images.mkdir(parents=True)
        content = csv_text(rows, columns, newline) if text is None else text
        files.csv.write_bytes(content.encode(encoding))
        rng = np.random.default_rng(0)
        for name in dict.fromkeys(str(row.get("name", "")).strip() for row in rows):
            if name and name not in without and not Path(name).is_absolute() and ".." not in Path(name).parts:
                path = files.images / name
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(noise).save(path, "PNG", compress_level=1)
        return files

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, as playwright's sync API drives it."""
    chromium = needed("chromium", shutil.which("chromium"))
    from playwright.sync_api import sync_playwright

    quiet = ("background-networking", "component-update", "sync", "gpu", "quic")
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield running
        running.close()


@pytest.fixture(scope="module")
def trained_weights_are_kept() -> Iterator[None]:
    """Whatever validation says of the untrained model, so that weights and predictions tell of training."""
    from training import resuming  # torch, which most tests of the command line do without

    begin, worst = resuming.Progress.begin, -1.0  # of any correlation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resuming.Progress, "begin", lambda self, score, scores: begin(self, worst, scores))
        yield
