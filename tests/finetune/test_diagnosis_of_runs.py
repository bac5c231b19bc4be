"""Real runs that were made to fail in each way are read as what they are, and usual ones as fine."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

import baseline
from sources import demo

FROZEN = "--freeze_clip --no_calibration"
REAL = {
    "over-fitting": "--freeze_clip --lr 5e-3 --epochs 20 --residual_scale_q 1 --residual_scale_c 1 --dropout 0 "
    "--loss mse --quality_column shuffled_mos_quality --consistency_column shuffled_mos_align",
    "under-fitting": f"{FROZEN} --stage_features off --residual_scale_q 0.01 --residual_scale_c 0.01 --lr 1e-3 "
    "--epochs 6 --scheduler step",
    "no gain from training": "--freeze_clip --lr 1e-3 --epochs 5",  # a kernel leaves heads nothing
    "slow": f"{FROZEN} --lr 1e-7 --epochs 5",
    "unstable": "--freeze_clip --lr 0.1 --epochs 20 --residual_scale_q 0.5 --residual_scale_c 0.5 --scheduler constant "
    "--warmup_ratio 0 --max_grad_norm 0",
    "worse than before training": "--partial_freeze --freeze_layers 20 --lr 2e-2 --epochs 4",
    "best epoch at the very end": f"{FROZEN} --lr 1e-3 --epochs 6",
    "best epoch at the very start": f"{FROZEN} --lr 0.1 --epochs 8 --warmup_ratio 0.4 --residual_scale_q 0.5 "
    "--residual_scale_c 0.5",
    "one score starves the other": "--partial_freeze --freeze_layers 22 --cache_views 0 --no_calibration --lr 1e-3 "
    "--epochs 4 --w_q 0.001 --w_c 0.999",
}
FINE = {
    "heads": "--freeze_clip --base probe --lr 1e-3 --epochs 15",
    "another split": "--freeze_clip --base probe --lr 1e-3 --epochs 15 --seed 7",
    "blocks": "--partial_freeze --freeze_layers 22 --cache_views 0 --lr 1e-4 --epochs 5",
}


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Callable[..., list[str]]:
    """A function that trains a tiny CLIP with the given flags, and names what the curves show."""
    folder = tmp_path_factory.mktemp("diagnosed")
    table, pictures = demo.write_demo_set(folder / "set", num_prompts=28)
    content = pd.read_csv(table)
    for column in ("mos_quality", "mos_align"):
        content[f"shuffled_{column}"] = np.random.default_rng(0).permutation(content[column])
    content.to_csv(table, index=False)

    def run(flags: str, name: str) -> list[str]:
        paths = {"data_csv_path": table, "image_base_dir": pictures, "output_dir": folder / name}
        words = [word for key, value in paths.items() for word in (f"--{key}", str(value))]
        fixed = f"--clip_model tiny --clip_pretrained assets --val_size 0.25 --no_test --cache_dir {folder}/cache"
        results = baseline.main([*words, *shlex.split(fixed), "--no_report", *shlex.split(flags)])
        return [found["finding"] for found in results["diagnosis"]]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_run_that_fails_is_read_as_what_it_is(train, name):
    assert train(REAL[name], name)[:1] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("name", FINE)
def test_a_real_run_with_usual_settings_looks_fine(train, name):
    assert train(FINE[name], name) == []
