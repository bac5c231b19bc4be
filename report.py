"""Show a run as one HTML file, or several beside each other.

    python report.py runs/a                # runs/a/report.html, and every picture in runs/a/figures
    python report.py runs/a runs/b ...     # a table here, and comparison.html in runs

Runs that do not lie in one folder are compared in comparison.html of the current one.

Run folders are only read, through their files. The pages need nothing but themselves: no network, no script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.errors import one_line_errors
from cli.parser import OneLineParser
from pages.comparison_page import COMPARISON_FILE, compare_folders, default_page
from pages.report import write_report
from pages.run_data import REPORT_FILE


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of what the command line names."""
    with one_line_errors():
        parser = OneLineParser(
            prog="python report.py",
            description="Show a run as one HTML file with pictures, or several runs beside each other.",
            allow_abbrev=False,
        )
        parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of --repeats or --kfold")
        parser.add_argument(
            "--out",
            metavar="FILE",
            help=f"the page that compares several (default: {COMPARISON_FILE} in the folder they lie in, or here if in "
            "several)",
        )
        args: argparse.Namespace = parser.parse_args(argv)
        folders = [Path(run) for run in args.runs]
        if len(folders) == 1:
            if args.out:
                raise ValueError(f"--out {args.out}: is for several runs; the page of one is {REPORT_FILE} in it")
            print(f"page: {write_report(folders[0])}")
            return
        out = Path(args.out) if args.out else default_page(folders)
        if out.is_dir() or not out.parent.is_dir():
            raise ValueError(f"--out {out}: must be a file in a folder that exists")
        print("\n".join(compare_folders(folders, out)))


if __name__ == "__main__":
    main(sys.argv[1:])
