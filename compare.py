"""Tell whether runs differ: paired, on the test images or questions that they share, by bootstrap.

    python compare.py runs/a runs/b [runs/c ...]

Every run is compared with the first. Folders of repeated runs (--repeats, --kfold) are compared split by split. Runs of
baseline.py are resampled by prompts; those of main.py by images, and compared by kinds of questions too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cli.errors import one_line_errors
from cli.parser import OneLineParser
from multirun.comparison import compare_protocols, compare_runs, table_lines
from multirun.summaries import PROTOCOL_FILE


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Compare what the command line names; print the table and return it."""
    with one_line_errors():
        parser = OneLineParser(
            prog="python compare.py",
            description="Tell whether runs differ, on the test images or questions that they share: paired bootstrap "
            "over prompts (baseline.py) or images (main.py, by kinds of questions too). "
            "Folders of repeated runs (--repeats, --kfold) are compared split by split.",
            allow_abbrev=False,
        )
        parser.add_argument(
            "runs", nargs="+", metavar="RUN", help="run folders; the first is what others are compared with"
        )
        parser.add_argument("--out", metavar="FILE", help="also write the table there, as CSV")
        args: argparse.Namespace = parser.parse_args(argv)
        folders = [Path(run) for run in args.runs]
        if len(folders) < 2:
            raise ValueError("name at least two run folders; see --help")
        repeated = [(folder / PROTOCOL_FILE).exists() for folder in folders]
        if any(repeated) and not all(repeated):
            raise ValueError("single runs and folders of repeated runs cannot be compared with each other")
        found = compare_protocols(folders) if all(repeated) else compare_runs(folders)
        print("\n".join(table_lines(found)))
        if args.out:
            found.to_csv(args.out, index=False, float_format="%.6g")
        return found


if __name__ == "__main__":
    main(sys.argv[1:])
