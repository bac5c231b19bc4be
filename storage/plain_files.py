"""Files that somebody else may have written: refused in one line if they are none, or too large to be read."""

from __future__ import annotations

import csv
import io
import stat
from pathlib import Path

MOST_COLUMNS, LONGEST_HEADER = 1000, 2**20  # of a CSV; characters


class RefusedFile(ValueError):
    """Says in one line, without the file's name, why it is not read at all."""


def check_plain_file(path: Path, most_bytes: int | None = None) -> None:
    """Raise RefusedFile unless a path is a plain file of at most so many bytes; a pipe or device would never end.

    Raises:
        FileNotFoundError: there is none.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise RefusedFile("is not a plain file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise RefusedFile(f"has {found.st_size} bytes, at most {most_bytes} are read")


def check_csv_header(path: str | Path) -> None:
    """Raise RefusedFile for a CSV that pandas would take for ever to read: a pipe, or one with very many columns.

    Raises:
        FileNotFoundError: there is none.
        UnicodeDecodeError: its beginning is not UTF-8.
    """
    check_plain_file(Path(path))
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        lines = io.StringIO(file.read(LONGEST_HEADER), newline="")
    try:
        header = next(csv.reader(lines), [])
    except csv.Error as error:
        raise RefusedFile(str(error)) from None
    if len(header) > MOST_COLUMNS:
        raise RefusedFile(f"has more than {MOST_COLUMNS} columns")
    if not lines.read(1) and lines.tell() == LONGEST_HEADER:
        raise RefusedFile(f"the header has more than {LONGEST_HEADER} characters")
