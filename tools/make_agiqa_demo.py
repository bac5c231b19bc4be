"""Make assets/agiqa-demo: whole prompts of AGIQA-3K with the images whose generators its licence surely covers.

python tools/make_agiqa_demo.py AGIQA-3K      # a folder with data.csv and images/
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "agiqa-demo"
GENERATORS = ("AttnGAN", "glide", "sd1.5", "xl2.2")  # not Midjourney and DALL-E, whose terms it does not speak of
NUM_PROMPTS = 46  # of seven images each


def main(argv: Sequence[str]) -> None:
    """Copy images and rows as they are."""
    source = Path(argv[0])
    table = pd.read_csv(source / "data.csv", dtype=str, keep_default_na=False)
    prompts = np.random.default_rng(0).permutation(table["prompt"].unique())[:NUM_PROMPTS]
    kept = table[table["prompt"].isin(prompts) & table["name"].str.startswith(GENERATORS)]
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    for name in kept["name"]:
        shutil.copyfile(source / "images" / name, FOLDER / "images" / name)
    kept.to_csv(FOLDER / "data.csv", index=False)
    print(f"{len(kept)} images of {kept['prompt'].nunique()} prompts in {FOLDER}")


if __name__ == "__main__":
    main(sys.argv[1:])
