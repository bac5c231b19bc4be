"""baseline.py against bench/plain_loop.py: the same images, backbone, weights and crops, in turn, as a table.

    python bench/speed.py --data_csv_path data/data.csv --image_base_dir data/images
    python bench/speed.py --amp off bf16
    python bench/speed.py --model ViT-L-14 --freeze_layers 18 --num_images 2982 --epochs 20

Each run is a process of its own. Times go from the first batch to the last prediction: caching, calibration,
validation after every epoch and the test fold are in them, loading the program and the weights is not. The loop has
the first precision of --amp. Without a data set, pictures of noise stand in, which take longer to decode than
photographs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import plain_loop  # noqa: E402

import baseline  # noqa: E402
from guidance.arguments import parse_args  # noqa: E402
from training import devices  # noqa: E402

CASES = {
    "freeze_clip": "--freeze_clip --lr 1e-3",
    "warm": "--freeze_clip --lr 1e-3",  # again, with the cache that the case before left
    "partial": "--partial_freeze --freeze_layers {freeze_layers} --cache_views 1 --lr 1e-4",
    "full": "--lr 1e-5",
}
LOSS_TOLERANCE = 0.01  # relative; resizing differs by a grey level between Pillow and torch


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_csv_path", type=Path, help="with --image_base_dir; without them: pictures of noise")
    parser.add_argument("--image_base_dir", type=Path)
    parser.add_argument("--num_images", type=int, default=256, help="evenly spaced rows of the table (default: 256)")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip name, random weights (default: ViT-B-32)")
    parser.add_argument("--freeze_layers", type=int, default=10, help="of the case 'partial' (default: 10)")
    parser.add_argument("--amp", nargs="+", default=["auto"], help="precisions of baseline.py (default: auto)")
    parser.add_argument("--epochs", type=int, default=10, help="(default: 10)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ours_only", action="store_true", help="leave the plain loop out")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--count", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run is not None:
        print(json.dumps(ours(args.run)))
        return
    if args.count is not None:
        print(json.dumps(counted_operations(args.count)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Run all cases and print the table."""
    csv_path, image_dir = select_images(args, folder)
    common = ["--data_csv_path", str(csv_path), "--image_base_dir", str(image_dir), "--clip_model", args.model]
    common += ["--clip_pretrained", "none", "--epochs", str(args.epochs), "--dropout", "0", "--loss", "mse"]
    common += ["--stage_features", "off", "--base", "cosine"]  # which the plain loop has not
    common += ["--cache_dir", str(folder / "cache"), "--output_dir", str(folder / "run"), "--overwrite"]
    yardstick: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for amp in args.amp:
        before = ""
        for case in args.cases:
            flags = [*common, *CASES[case].format(freeze_layers=args.freeze_layers).split(), "--amp", amp]
            if case != "warm" or before != "freeze_clip":
                shutil.rmtree(folder / "cache", ignore_errors=True)
            if case == "warm" and before != "freeze_clip":
                call("speed.py", "--run", *flags)  # fills the cache
            before = case
            if CASES[case] not in yardstick and not args.ours_only:
                yardstick[CASES[case]] = call("plain_loop.py", *flags)
            found = call("speed.py", "--run", *flags)
            rows.append({"case": case, "amp": amp, **row(yardstick.get(CASES[case]), found, args)})
            apart = rows[-1].get("losses differ by", 0)
            if amp == args.amp[0] and apart > LOSS_TOLERANCE:
                raise SystemExit(f"{case}: losses differ by {apart:.1%}")
            if found["on_gpu"] and case != "warm":
                rows[-1] |= flop_columns(call("speed.py", "--count", *flags), found, args.epochs)
            print(pd.DataFrame(rows[-1:]).to_string(index=False), file=sys.stderr)
    setting = f"{args.model}, random weights, {args.num_images} images, {args.epochs} epochs"
    print(f"\n{found['device']}, torch {torch.__version__}; {setting}\n")
    print(markdown(pd.DataFrame(rows)))


def row(plain: dict[str, Any] | None, ours: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one line of the table."""
    images = args.epochs * ours["num_train"]
    line = {"ours s": ours["seconds"], "start to end s": ours["process_seconds"]}
    line |= {"ours img/s": images / ours["seconds"], "ours peak GB": ours["peak_gb"], "ours waits": ours["data_wait"]}
    if plain:
        line |= {"plain s": plain["seconds"], "plain / ours": plain["seconds"] / ours["seconds"]}
        line |= {"plain img/s": images / plain["seconds"], "plain peak GB": plain["peak_gb"]}
        apart = np.max(np.abs(np.array(plain["losses"]) / np.array(ours["losses"]) - 1))
        line |= {"plain waits": plain["data_wait"], "losses differ by": float(apart)}
    return line


def call(script: str, *flags: str) -> dict[str, Any]:
    """Run a script of this folder in a new process; the JSON that it prints last, and the seconds it took."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "bench" / script), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "process_seconds": time.perf_counter() - started}


def ours(flags: list[str]) -> dict[str, Any]:
    """Train with baseline.py."""
    config = parse_args(flags)
    results = baseline.run(config)
    resolved = json.loads(Path(str(config.output_dir), "config.json").read_text())["provenance"]["resolved"]
    runtime = devices.start_runtime(config.device, resolved["amp"])
    history = pd.read_csv(Path(str(config.output_dir)) / "metrics.csv")
    return {
        "losses": history["loss"].tolist(),
        "test_main": results["test"]["main"],
        "seconds": results["seconds_from_first_batch"],
        "data_wait": float(history["data_wait"].mean()),
        "peak_gb": plain_loop.peak_gb(runtime),
        "num_train": int((pd.read_csv(Path(str(config.output_dir)) / "splits.csv")["split"] == "train").sum()),
        "device": runtime.describe(),
        "on_gpu": runtime.device.type != "cpu",
    }


def counted_operations(flags: list[str]) -> dict[str, Any]:
    """Floating-point operations with a cold cache: of a run of one epoch, and of each further epoch."""
    counts = []
    for epochs in (1, 2):
        config = parse_args([*flags, "--epochs", str(epochs)])
        shutil.rmtree(config.cache_dir, ignore_errors=True)
        with FlopCounterMode(display=False) as counter:
            baseline.run(config)
        counts.append(counter.get_total_flops())
    return {"first": counts[0], "further": counts[1] - counts[0], "rate": matmul_rate(config)}


def matmul_rate(config: Any, size: int = 8192, repeats: int = 20) -> float:
    """Operations per second of a large matrix product in the precision of the run."""
    runtime = devices.start_runtime(config.device, config.amp)
    a, b = (torch.randn(size, size, device=runtime.device, dtype=runtime.compute_dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    float((a @ b)[0, 0])  # waits
    started = time.perf_counter()
    for _ in range(repeats):
        product = a @ b
    float(product[0, 0])
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def flop_columns(counted: dict[str, Any], ours: dict[str, Any], epochs: int) -> dict[str, float]:
    """The time that the counted operations would take at the measured matmul rate, and the ratio to it."""
    bound = (counted["first"] + (epochs - 1) * counted["further"]) / counted["rate"]
    return {"matmul TFLOP/s": counted["rate"] / 1e12, "FLOP-bound s": bound, "ours / bound": ours["seconds"] / bound}


def select_images(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """A CSV of `num_images` evenly spaced rows, or as many pictures of noise, 512 x 512."""
    csv_path = folder / "bench.csv"
    if args.data_csv_path:
        table = pd.read_csv(args.data_csv_path)
        table.iloc[np.linspace(0, len(table) - 1, args.num_images).astype(int)].to_csv(csv_path, index=False)
        return csv_path, args.image_base_dir
    rng = np.random.default_rng(0)
    lines = []
    for number in range(args.num_images):
        name = f"noise_{number}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        coarse.resize((512, 512), Image.Resampling.BICUBIC).save(folder / name, quality=90)
        lines.append({"name": name, "prompt": f"a picture of number {number // 8}", "mos_quality": rng.uniform(1, 5)})
        lines[-1]["mos_align"] = rng.uniform(1, 5)
    pd.DataFrame(lines).to_csv(csv_path, index=False)
    return csv_path, folder


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; shares of time as percentages, the rest with three digits."""

    def cell(column: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        return f"{value:.2%}" if "wait" in column or "differ" in column else f"{value:.3g}"

    head = f"| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}\n"
    return head + "\n".join(
        f"| {' | '.join(cell(str(column), value) for column, value in line.items())} |" for _, line in table.iterrows()
    )


if __name__ == "__main__":
    main()
