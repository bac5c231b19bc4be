"""Run one command with and without some flags over several seeds, and print the paired differences.

    python tools/compare_options.py --with_flags="--no_calibration" --seeds 1 2 3 -- --demo

Given several times, each --with_flags is compared with the plain command. Everything behind `--` goes to baseline.py.
Split and weights change with the seed, alike on both sides; each seed's difference is one observation, and the
interval allows for training folds that overlap (`metrics.resampled_interval`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import baseline  # noqa: E402
from evaluation import metrics  # noqa: E402

MEASURES = ("srocc_q", "plcc_q", "srocc_c", "plcc_c", "main")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--with_flags", required=True, action="append", help="what the other side adds, as one string")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_dir", default="runs/compare", help="folder for the runs (default: runs/compare)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="flags of baseline.py, behind --")
    args = parser.parse_args(argv)
    common = args.command[1:] if args.command[:1] == ["--"] else args.command
    sides: dict[str, list[dict]] = {flags: [] for flags in ("", *args.with_flags)}
    for seed in args.seeds:
        for number, (extra, results) in enumerate(sides.items()):
            folder = Path(args.output_dir) / f"{number}-{seed}"
            flags = [*common, *shlex.split(extra), "--seed", str(seed), "--output_dir", str(folder), "--overwrite"]
            results.append(baseline.main(flags))
    for extra in args.with_flags:
        print(table(sides[""], sides[extra], extra), end="\n\n")


def table(without: list[dict], with_: list[dict], flags: str) -> str:
    """Markdown: mean test score of both sides, mean difference and its 95 % interval (paired by seed)."""
    share = without[0]["images"]["test"] / without[0]["images"]["train"]
    lines = [f"| test fold | without | with `{flags}` | difference | 95 % interval |", "|---|---|---|---|---|"]
    for name in (name for name in MEASURES if name in without[0]["test"]):
        left, right = (np.array([run["test"][name] for run in side]) for side in (without, with_))
        low, high = metrics.resampled_interval(right - left, share) or (np.nan, np.nan)
        lines.append(
            f"| {name} | {left.mean():.3f} | {right.mean():.3f} | {(right - left).mean():+.3f} | "
            f"{low:+.3f} .. {high:+.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
