"""Print the tables of repeated runs (--repeats or --kfold) again.

python protocol.py FOLDER...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cli.errors import one_line_errors
from multirun.summaries import read_summary
from multirun.summary_text import summary_lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of finished protocols."""
    with one_line_errors():
        folders = sys.argv[1:] if argv is None else argv
        if not folders or folders[0].startswith("-"):
            raise ValueError("usage: python protocol.py FOLDER... (made with --repeats or --kfold)")
        for folder in folders:
            print("\n".join(summary_lines(read_summary(Path(folder)))))


if __name__ == "__main__":
    main()
