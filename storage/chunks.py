"""Tables of scores that are too large for memory or for one sitting: written piece by piece, joined at the end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from storage import json_files, locks, tables
from storage.atomic import atomic_write
from storage.json_files import read_json


class Chunks:
    """The finished pieces of a table of scores: files in a hidden folder beside it, and the command they belong to.

    Args:
        out: where the whole table goes.
        job: everything that decides the scores and where each piece begins, as JSON values.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        self.out = out
        self.job = job
        self.folder = out.with_name(f".{out.name}.parts")
        self.job_file = self.folder / "job.json"

    def path(self, number: int) -> Path:
        """The file of a piece."""
        return self.folder / f"{number:06d}.csv"

    def finished(self) -> list[int]:
        """Numbers of the pieces that are there."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.csv"))

    def check(self) -> None:
        """Raise ValueError if there are pieces of another command."""
        before = read_json(self.job_file) if self.job_file.exists() else {}
        changed = [key for key, value in self.job.items() if before.get(key) != value]
        if changed and self.finished():
            raise ValueError(
                f"--out {self.out}: {self.folder} holds scores of another command (other {', '.join(changed)}): "
                "delete that folder or choose another --out"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the folder for this command, whose first process calls this, as long as the block lasts.

        Raises:
            ValueError: another command is writing the same file now, or has left its pieces.
        """
        with locks.exclusive_folder(self.folder, f"--out {self.out}"):
            try:
                self.check()
                self.clear()
                yield
            finally:
                with suppress(OSError):  # pieces are left
                    self.folder.rmdir()

    def clear(self) -> None:
        """Empty the folder if it holds no pieces."""
        if not self.finished():
            for path in self.folder.iterdir():
                path.unlink()

    def count_rows(self) -> int:
        """Rows in all pieces that are there."""
        return sum(len(pd.read_csv(self.path(number), usecols=["name"])) for number in self.finished())

    def begin(self) -> None:
        """Make the folder and say in it what command it belongs to, unless that was done before."""
        if not self.job_file.exists():
            self.folder.mkdir(exist_ok=True)
            json_files.write_json(self.job_file, self.job)

    def write(self, number: int, scores: pd.DataFrame) -> None:
        """Write a piece, whole or not at all."""
        self.begin()
        tables.write_csv(self.path(number), scores)

    def wait_for(self, num_pieces: int) -> None:
        """Wait until other processes have written theirs. Not a barrier: those give up after some minutes."""
        while len(self.finished()) < num_pieces:
            time.sleep(0.1)

    def join(self, num_pieces: int) -> None:
        """Write the whole table, piece by piece, and empty the folder."""

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as whole:
                for number in range(num_pieces):
                    with self.path(number).open("rb") as part:
                        if number > 0:
                            part.readline()  # the header
                        shutil.copyfileobj(part, whole)

        atomic_write(self.out, fill)
        for number in range(num_pieces):  # the job goes last, so that pieces never lie there without it
            self.path(number).unlink()
        self.clear()
