"""Stands for `python` in the shell scripts: checks the flags of each run and calls it finished; a program of its own.

    PYTHONPATH=. python tests/finished_at_once.py PROGRAM.py FLAGS...

A run leaves its config.json and results.json; programs that show runs name them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from answering import configs as answering_configs
from cli.errors import one_line_errors
from guidance import arguments

PROGRAMS = {
    "baseline.py": (arguments.parse_args, "output_dir"),
    "main.py": (answering_configs.parse_args, "output"),
}


def main(program: str, *words: str) -> None:
    """See above."""
    if Path(program).name not in PROGRAMS:
        print("run folder:", *words)
        return
    parse_args, option = PROGRAMS[Path(program).name]
    with one_line_errors():
        config = parse_args(words)
    folder = Path(str(getattr(config, option)))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "results.json"):
        (folder / name).write_text(json.dumps(config.to_json()))


if __name__ == "__main__":
    main(*sys.argv[1:])
