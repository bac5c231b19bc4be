"""Files that somebody else may have written: refused in one line if they are none, or too large to be read."""

from __future__ import annotations

import csv
import io
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

MOST_COLUMNS, LONGEST_HEADER = 1000, 2**20  # of a CSV; characters
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # between the columns of a CSV
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how .xlsx and .xls begin
UNICODE = {  # how files of these encodings begin
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


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


@dataclass(frozen=True)
class CsvForm:
    """How a CSV is written."""

    header: tuple[str, ...]  # without blanks around
    delimiter: str = ","
    encoding: str = "utf-8-sig"
    num_before: int = 0  # lines before the header

    @property
    def is_usual(self) -> bool:
        """Whether it is UTF-8 with commas."""
        return self.delimiter == "," and self.encoding == "utf-8-sig"

    def __str__(self) -> str:
        encoding = "" if self.encoding == "utf-8-sig" else f"{self.encoding[:6].upper()}, "
        return f"{encoding}{DELIMITERS[self.delimiter]} between columns"


def check_csv_header(path: str | Path) -> None:
    """Raise RefusedFile for a CSV that pandas would take for ever to read: a pipe, or one with very many columns.

    Raises:
        FileNotFoundError: there is none.
        UnicodeDecodeError: its beginning is not UTF-8.
    """
    check_plain_file(Path(path))
    bounded_header(beginning(Path(path), "utf-8-sig"), ",")


def csv_form(path: str | Path, columns: Collection[str] = ()) -> CsvForm:
    """How a CSV is written: the encoding as its first bytes tell, the delimiter as its header does.

    Args:
        columns: names that the header should have; the delimiter that shows most of them is the one.

    Raises:
        RefusedFile: it is no CSV, has very many columns, or can be read in two ways.
        FileNotFoundError: there is none.
        UnicodeError: its beginning is not in its encoding.
    """
    check_plain_file(Path(path))
    encoding = encoding_of(Path(path))
    num_before, text = without_blank_lines(beginning(Path(path), encoding))
    named = re.match(r'"?sep=(.)"?\r?\n', text)  # a line by which spreadsheets tell their delimiter
    if named and named[1] in DELIMITERS:
        num_blank, text = without_blank_lines(text[named.end() :])
        return CsvForm(bounded_header(text, named[1]), named[1], encoding, num_before + 1 + num_blank)
    headers = {delimiter: bounded_header(text, delimiter) for delimiter in DELIMITERS}
    hits = {delimiter: len(set(header) & set(columns)) for delimiter, header in headers.items()}
    most = max(hits.values())
    best = [delimiter for delimiter, number in hits.items() if number == most]
    if most == 0:  # whatever divides it, where commas do not
        wide = [delimiter for delimiter, header in headers.items() if len(header) > 1]
        best = wide if len(wide) == 1 else [","]
    if len({headers[delimiter] for delimiter in best}) > 1:
        ways = " or ".join(DELIMITERS[delimiter] for delimiter in best)
        raise RefusedFile(f"its header can be read with {ways} between columns; write it with one of them")
    return CsvForm(headers[best[0]], best[0], encoding, num_before)


def without_blank_lines(text: str) -> tuple[int, str]:
    """How many blank lines a text begins with, and what follows. Raises RefusedFile if nothing does."""
    blank = re.match(r"(?: *\r?\n)*", text)
    assert blank is not None
    rest = text[blank.end() :]
    if not rest.strip():
        raise RefusedFile("is empty, must have a header and a row for each image")
    if rest[0] == "\r":  # pandas miscounts these
        raise RefusedFile("begins with a blank line; remove it")
    return blank[0].count("\n"), rest


def encoding_of(path: Path) -> str:
    """The encoding of a text file as its first bytes tell it. Raises RefusedFile for a workbook."""
    with path.open("rb") as file:
        first = file.read(4)
    if first.startswith(WORKBOOKS):
        raise RefusedFile("is a workbook, no CSV; save it as 'CSV UTF-8'")
    for mark, encoding in UNICODE.items():
        if first.startswith(mark):
            return encoding
    if len(first) == 4:  # plain letters without a mark
        zeros = [byte == 0 for byte in first]
        if zeros == [False, True, False, True]:
            return "utf-16-le"
        if zeros == [True, False, True, False]:
            return "utf-16-be"
    return "utf-8-sig"


def beginning(path: Path, encoding: str) -> str:
    """The first LONGEST_HEADER characters of a text file. Raises UnicodeError."""
    with path.open(encoding=encoding, newline="") as file:
        return file.read(LONGEST_HEADER)


def bounded_header(text: str, delimiter: str) -> tuple[str, ...]:
    """The cells of the first row of a CSV's beginning. Raises RefusedFile if they are very many."""
    lines = io.StringIO(text, newline="")
    try:
        header = next(csv.reader(lines, delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error as error:
        raise RefusedFile(str(error)) from None
    if len(header) > MOST_COLUMNS:
        raise RefusedFile(f"has more than {MOST_COLUMNS} columns")
    if not lines.read(1) and lines.tell() == LONGEST_HEADER:
        raise RefusedFile(f"the header has more than {LONGEST_HEADER} characters")
    return tuple(cell.strip() for cell in header)
