"""The folder of a run: one process at a time, every file whole or not at all."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from storage.atomic import is_empty_folder, remove_if_empty, remove_temporaries
from storage.json_files import read_json, write_json
from storage.locks import exclusive_folder
from storage.tables import write_csv
from training.checkpoints import BEST_DIR, STATE_DIR, save_weights
from training.devices import Runtime

RESULTS_FILE = "results.json"
METRICS_FILE = "metrics.csv"
CONFIG_FILE = "config.json"
SPLITS_FILE = "splits.csv"
FAILURE_FILE = "failure.json"
SKIPPED_FILE = "skipped.csv"
RUN_FILES = (
    *(CONFIG_FILE, SPLITS_FILE, SKIPPED_FILE, METRICS_FILE, FAILURE_FILE, RESULTS_FILE),
    *("predictions.csv", "examples.json", "report.html"),
)
RUN_FOLDERS = (STATE_DIR, BEST_DIR, "figures", "tensorboard", "wandb")
PACKAGES = (
    *("torch", "torchvision", "open_clip_torch", "timm", "transformers", "pillow"),
    *("numpy", "scipy", "pandas", "scikit-learn"),
)


def refuse_foreign(folder: Path, what: str, is_ours: Callable[[Path], bool], flag: str = "--output_dir") -> None:
    """Raise ValueError unless a folder is absent, empty, or holds what `is_ours` knows: `what`."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder}: is a file, must be a folder")
    # Looked at in this order, since the same command may be writing its first file right now.
    if folder.exists() and not is_empty_folder(folder) and not is_ours(folder):
        raise ValueError(f"{flag} {folder}: holds other things than {what}; choose a new or empty folder")


def refuse_occupied(folder: Path, *, overwrite: bool, flag: str = "--output_dir") -> None:
    """Raise ValueError unless a new run may use the folder: absent, empty, or an older run that may be replaced.

    `flag` is what the user has named the folder by.
    """
    refuse_foreign(folder, "a run", is_run, flag)
    if is_run(folder) and not overwrite:
        is_finished = (folder / RESULTS_FILE).exists()
        kind = "a finished" if is_finished else "an unfinished"
        ways = "choose another" if is_finished else f"go on with --resume {folder}, choose another"
        raise ValueError(f"{flag} {folder}: holds {kind} run; {ways} or pass --overwrite")


def free_folder(name: str) -> Path:
    """runs/NAME or, as long as that is taken, runs/NAME-2, -3, ..."""
    taken = 1
    while (folder := Path("runs") / (name if taken == 1 else f"{name}-{taken}")).exists():
        taken += 1
    return folder


@contextmanager
def new_folder(name: str, runtime: Runtime) -> Iterator[Path]:
    """A folder for a run, made now, lest two that start together take one; it goes if it is left empty.

    Raises:
        OSError: it cannot be made.
    """

    def make() -> Path:
        while True:
            folder = free_folder(name)
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:  # another run has just taken it; the next name, then, unless there is a file
                if not folder.is_dir():
                    raise

    folder = runtime.of_main(make)
    try:
        yield folder
    finally:
        for made in (folder, folder.parent) if runtime.is_main else ():
            remove_if_empty(made)


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run, finished or not; other programs' folders may have a config.json too."""
    try:
        return "provenance" in read_json(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return False


def prepare_run_folder(folder: Path) -> None:
    """Make the folder of a new run, without what an older run left in it. See `refuse_occupied`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).unlink(missing_ok=True)  # first what tells that it is finished
    for name in RUN_FOLDERS:  # and the states before the weights that they belong to
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in reversed(RUN_FILES):  # what tells that this is a run goes last
        (folder / name).unlink(missing_ok=True)


class RunFolder:
    """The run folder of one process; where another process writes, `active` is False and nothing happens here.

    As long as the block lasts no other run can have the folder.

    Args:
        overwrite, resume: whether an older run may be replaced, or gone on with.
        flag: what the user has named the folder by.
    """

    def __init__(
        self,
        path: Path,
        *,
        active: bool = True,
        overwrite: bool = False,
        resume: bool = False,
        flag: str = "--output_dir",
    ) -> None:
        self.flag = flag
        self.path = path
        self.active = active
        self.overwrite = overwrite
        self.resume = resume
        self.leaving = ExitStack()

    def __enter__(self) -> RunFolder:
        """Make the folder, without what an older run left in it. Raises ValueError if another run has it."""
        if self.active:
            with ExitStack() as leaving:
                leaving.enter_context(exclusive_folder(self.path, f"{self.flag} {self.path}"))
                if not self.resume:
                    # once more: another run may just have ended here
                    refuse_occupied(self.path, overwrite=self.overwrite, flag=self.flag)
                    prepare_run_folder(self.path)
                remove_temporaries(self.path)
                self.leaving = leaving.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.leaving.close()

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, see `write_json`."""
        if self.active:
            write_json(self.path / name, value)

    def csv(self, name: str, table: pd.DataFrame) -> None:
        """Write a CSV file, see `write_csv`."""
        if self.active:
            write_csv(self.path / name, table)

    def forget_states(self) -> None:
        """Remove what only an interrupted run needs: this one is finished."""
        if self.active:
            (self.path / FAILURE_FILE).unlink(missing_ok=True)
            shutil.rmtree(self.path / STATE_DIR, ignore_errors=True)

    def weights(
        self, name: str, state: Mapping[str, Tensor], description: Mapping[str, Any], extra: Callable[[Path], None]
    ) -> None:
        """Write a checkpoint, see `save_weights`."""
        if self.active:
            save_weights(self.path / name, state, description, extra)


def environment() -> dict[str, Any]:
    """Versions of Python, the packages that matter and, installed, this one; the git revision of a checkout, or ""."""
    versions = {"python": platform.python_version()}
    installed = (__package__.partition(".")[0],) if "." in __package__ else ()  # in a checkout the code has no version
    for package in (*PACKAGES, *installed):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"versions": versions, "git_revision": git_revision()}


def changes_since(before: Mapping[str, Any], folder: Path, fingerprint: str) -> str:
    """What is another than when a run began, in words. Raises ValueError if the data is.

    Args:
        before: the provenance in the run's config.json.
        fingerprint: of the data as it is now.
    """
    if before.get("data_fingerprint") != fingerprint:
        raise ValueError(
            f"--resume {folder}: the data has changed since the run began; restore it, or start another run"
        )
    now = environment()
    versions = before.get("versions", {})
    other = [
        f"{name} {now['versions'][name]}" for name in now["versions"] if versions.get(name) != now["versions"][name]
    ]
    other += ["the code"] if before.get("git_revision") != now["git_revision"] else []
    return f"resume    {folder}" + (f"; since it began has changed: {', '.join(other)}" if other else "")


def git_revision() -> str:
    """The commit this code is at, with "+changes" if it was edited since; "" if that cannot be told."""
    here = Path(__file__)
    commands = (
        f"git ls-files --error-unmatch {here.name}",  # installed, it may lie within somebody else's repository
        "git rev-parse HEAD",
        # The lock that status would take can fail a commit that somebody makes at the same moment.
        "git --no-optional-locks status --porcelain --untracked-files=no",
    )
    try:
        _, revision, changes = (
            subprocess.run(
                command.split(), cwd=here.parent, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision + ("+changes" if changes else "")
