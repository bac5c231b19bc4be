"""What a command line says when something goes wrong: one line, an exit code, and nothing that disturbs a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO, cast

# What moves a terminal's cursor, changes its colours or the order of letters, and halves of characters; not \n and \t.
UNPRINTABLE = {
    number: ascii(chr(number))[1:-1]
    for number in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
} | {number: f"\\u{number:x}" for number in range(0xD800, 0xE000)}


def printable(text: str) -> str:
    """A text whose control characters are spelt out, so that names and prompts do nothing to a terminal."""
    return text.translate(UNPRINTABLE)


class Printable:
    """A stream of text through which everything passes as `printable`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write it; returns its length, as streams do."""
        self.stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def error_text(error: Exception) -> str:
    """What an error says; of one that the system gave, the file first, without number and quotes."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_error(text: str) -> None:
    """Say it on stderr, if anybody still reads that: the exit code tells it too."""
    try:
        print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece, where processes share it
    except OSError:  # or Python would try once more at its end, and end by another exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextmanager
def one_line_errors(*failures: type[Exception], retry: type[BaseException] | tuple[()] = ()) -> Iterator[None]:
    """For command lines: a user's mistake (or the file system's) becomes one line and exit code 2, `failures` 1.

    `retry` is what asks to be run again: exit code 75, as in sysexits.h. What is printed meanwhile is `printable`.
    """
    try:
        with redirect_stdout(cast(TextIO, Printable(sys.stdout))):
            yield
    except (ValueError, OSError) as error:
        print_error(f"error: {printable(error_text(error))}")
        raise SystemExit(2) from error
    except failures as error:
        print_error(f"failed: {printable(str(error))}")
        raise SystemExit(1) from error
    except retry as error:
        print_error(printable(str(error)))
        raise SystemExit(75) from error
    except KeyboardInterrupt:
        print_error("interrupted")
        raise SystemExit(130) from None
