"""How fast predict.py scores a table of images beside a plain open_clip loop, both as whole processes, as a table.

    python bench/predict_speed.py
    python bench/predict_speed.py --data_csv_path data/data.csv --image_base_dir data/images

Both look at the same images and prompts with a CLIP of the same size. The loop is what open_clip's README shows: its
transform in a DataLoader, batches of 64, both towers, cosines; it writes a CSV, too. Each side runs in turn, --repeats
times, and the fastest of each counts. Images are pictures of noise, 512 x 512, without --data_csv_path.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from scipy.stats import spearmanr
from speed import ROOT, select_images

PRECISIONS = ("off", "bf16")  # of --amp


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_csv_path", type=Path, help="with columns as baseline.py expects them")
    parser.add_argument("--image_base_dir", type=Path)
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip, with random weights (default: ViT-B-32)")
    parser.add_argument("--num_images", type=int, default=500, help="(default: 500)")
    parser.add_argument("--repeats", type=int, default=2, help="(default: 2)")
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plain:
        plain_loop(args.model, *map(Path, args.plain))
        return
    with tempfile.TemporaryDirectory() as place:
        compare(args, Path(place))


def compare(args: argparse.Namespace, place: Path) -> None:
    """Run every side, and print the table."""
    csv, images = select_images(args, place)
    clip = ["--clip_model", args.model, "--clip_pretrained", "none", "--freeze_clip"]
    data = ["--data_csv_path", str(csv), "--image_base_dir", str(images), "--cache_dir", str(place / "cache")]
    short = ["--epochs", "1", "--no_report", "--output_dir", str(place / "run")]
    subprocess.run([sys.executable, "baseline.py", *data, *clip, *short], cwd=ROOT, check=True, capture_output=True)
    table = ["--csv", str(csv), "--image_dir", str(images)]
    score = [sys.executable, "predict.py", "--checkpoint", str(place / "run" / "best"), *table]
    sides = {f"predict.py --amp {amp}": [*score, "--amp", amp, "--out", f"{place}/{amp}.csv"] for amp in PRECISIONS}
    plain = [sys.executable, __file__, "--model", args.model, "--plain", str(csv), str(images), f"{place}/plain.csv"]
    seconds: dict[str, list[float]] = {name: [] for name in (*sides, "plain loop")}
    for _ in range(args.repeats):
        for name, command in {**sides, "plain loop": plain}.items():
            started = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    print("| side | s | images/s | plain / this |", "|---|---|---|---|", sep="\n")
    for name, found in seconds.items():
        best, yardstick = min(found), min(seconds["plain loop"])
        print(f"| {name} | {best:.1f} | {args.num_images / best:.1f} | {yardstick / best:.2f} |")
    whole, half = (pd.read_csv(place / f"{amp}.csv") for amp in PRECISIONS)
    for column in ("pred_quality", "pred_align"):
        same, change = spearmanr(whole[column], half[column])[0], (whole[column] - half[column]).abs().max()
        print(f"\n{column}: bf16 changes a score by up to {change:.4f}; SROCC to float32 {same:.5f}")


def plain_loop(model: str, csv: Path, images: Path, out: Path) -> None:
    """Cosines of images and prompts by open_clip alone."""
    import open_clip
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    table = pd.read_csv(csv)
    clip, _, preprocess = open_clip.create_model_and_transforms(model)
    tokenizer = open_clip.get_tokenizer(model)

    class Images(Dataset):
        def __len__(self) -> int:
            return len(table)

        def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
            line = table.iloc[row]
            return preprocess(Image.open(images / line["name"]).convert("RGB")), tokenizer([line["prompt"]])[0]

    clip.eval()
    found = []
    with torch.inference_mode():
        for pixels, tokens in DataLoader(Images(), batch_size=64, num_workers=2):
            image, text = clip.encode_image(pixels, normalize=True), clip.encode_text(tokens, normalize=True)
            found.append((image * text).sum(dim=1))
    table[["name"]].assign(cosine=torch.cat(found).numpy()).to_csv(out, index=False)


if __name__ == "__main__":
    main()
