"""Pickles that somebody else has written: plain containers, texts and numbers, and nothing that could run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from storage.messages import one_line, quoted
from storage.plain_files import check_plain_file

MOST_BYTES = 2**30


class PlainUnpickler(pickle.Unpickler):
    """Knows no class and no function at all."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse whatever is asked for."""
        raise pickle.UnpicklingError(f"holds {quoted(f'{module}.{name}')}, which is neither text, number nor container")


def read_plain_pickle(path: Path) -> Any:
    """What a pickle holds, of Python 3 or 2, if it is made of dicts, lists, tuples, sets, texts and numbers alone.

    Raises:
        ValueError: it holds anything else, is damaged or missing; one line that names the file.
    """
    try:
        check_plain_file(path, MOST_BYTES)
        with path.open("rb") as file:
            return PlainUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except Exception as error:  # noqa: BLE001 - damaged bytes lead to errors of any kind
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None
