"""What runs of one process share (`cli.memo`), and which options decide it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cli.memo import DecidedBy
from configs import OPTIONS, TrainingConfig
from finetune.feed import READ_BY
from finetune.frozen_clip import KNOWN_BY
from finetune.initial_model import LOADED_BY

# Options that change nothing of what the untrained CLIP makes of the images ...
NOT_FOR_KNOWN = (
    "use_residual_learning calibration residual_scale_q residual_scale_c hidden_dim_q hidden_dim_c "
    "dropout use_refinement refinement_layers refinement_heads refinement_dim w_q w_c w_extra "
    "task_gradients w_exp label_smoothing loss epochs lr head_lr layer_decay weight_decay warmup_ratio "
    "scheduler max_grad_norm gradient_accumulation_steps early_stopping_patience early_stopping_min_delta "
    "select_by ema_decay preset output_dir overwrite config dry_run advice report tensorboard tracker "
    "resume save_every_minutes keep_states"
)


# ... nor, with these, of what is read of the data before it becomes batches ...
NOT_FOR_DATA = (
    "prompt_levels stage_features base use_explanations batch_size amp test device freeze_clip "
    "partial_freeze freeze_layers unfreeze_schedule lora_rank init_from cache cache_views cache_dtype "
    "cache_max_gb image_memory_gb num_workers compile gradient_checkpointing dynamic_batch_size "
    "deterministic max_memory_usage crop_scale_min crops test_crops global_view horizontal_flip"
)


# ... (and these, which name the CLIP) ...
OF_CLIP = "clip_model clip_pretrained image_size"


# ... nor, with NOT_FOR_DATA and these, of the CLIP that is loaded.
NOT_FOR_CLIP = (
    "dataset data_root extra_scores data_csv_path image_base_dir test_size val_size split_by split_file "
    "kfold fold repeats strict_splits mos_range_q mos_range_c name_column prompt_column quality_column "
    "consistency_column explanation_column quality_std_column consistency_std_column group_column "
    "cache_dir demo bad_images duplicates follow_links"
)


@pytest.mark.parametrize(
    ("decided", "free"),
    [
        (KNOWN_BY, NOT_FOR_KNOWN),
        (READ_BY, f"{NOT_FOR_KNOWN} {NOT_FOR_DATA} {OF_CLIP}"),
        (LOADED_BY, f"{NOT_FOR_KNOWN} {NOT_FOR_DATA} {NOT_FOR_CLIP}"),
    ],
)
def test_of_every_option_it_is_settled_whether_what_is_kept_depends_on_it(decided, free):
    """A new option is on no list: decide whether it changes what runs share, lest they share a stale value."""
    names = decided.names(TrainingConfig)
    assert sorted([*names, *free.split()]) == sorted(OPTIONS)


def test_what_is_kept_is_told_apart_by_the_values_that_decide_it():
    decided = DecidedBy(groups=("backbone",), without=("init_from",), others=("seed",))
    plain = TrainingConfig()
    assert decided.values(plain) == decided.values(replace(plain, init_from="a", lr=0.1))
    for name, value in {"freeze_layers": 9, "clip_model": "tiny", "seed": 1}.items():
        assert decided.values(replace(plain, **{name: value})) != decided.values(plain), name
