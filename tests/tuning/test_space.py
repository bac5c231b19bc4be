"""`tuning.space`: which options are searched, and where."""

from __future__ import annotations

import json
import shlex

import pytest

from configs import OPTIONS, VIEWS
from tuning import arguments, programs


def default(flags: str, depth: int | None = 24) -> dict[str, str]:
    """The default space after a command line: option -> how it is described."""
    request = arguments.parse_search_args([*shlex.split(flags), "--output_dir", "out"])
    found = programs.SCORER.default_space(request.config, depth, request.given)
    return {name: dimension.describe().removeprefix(f"{name} ") for name, dimension in found.items()}


def test_the_default_space_is_that_of_the_guide():
    assert default("") == {
        "lr": "1e-06..0.001 log",
        "residual_scale_q": "0.1..0.5",
        "residual_scale_c": "0.1..0.5",
        "freeze_layers": "16..22 step 2",
        "w_q": "0.3..0.7",
        "batch_size": "16 | 32 | 64",
    }


@pytest.mark.parametrize(
    ("flags", "depth", "layers"),
    [
        ("", 12, "8..11 step 1"),
        ("", 24, "16..22 step 2"),
        ("", None, None),  # a tower without blocks
        ("--freeze_layers 9", 12, None),
        ("--freeze_clip", 12, None),
        ("--no_partial_freeze", 12, None),
        ("--unfreeze_schedule 8@0,6@2", 12, None),
        ("--preset large", 12, None),
        ("--preset medium", 12, "8..11 step 1"),
        ("--demo drawn", 24, "16..22 step 2"),
    ],
)
def test_freeze_layers_follow_the_depth_and_are_searched_only_where_they_do_something(flags, depth, layers):
    assert default(flags, depth).get("freeze_layers") == layers


@pytest.mark.parametrize(
    ("flags", "freezing"),
    [
        ("", "partial8"),
        ("--freeze_layers 9", "partial9"),
        ("--freeze_clip", "frozen"),
        ("--no_partial_freeze", "full"),
        ("--unfreeze_schedule 8@0,6@2", "partial8"),
        ("--lora_rank 4", "full-lora4"),
        ("--preset large", "full"),
    ],
)
def test_a_search_freezes_in_part_unless_something_else_was_said(flags, freezing):
    assert arguments.parse_search_args([*shlex.split(flags), "--output_dir", "out"]).config.freezing == freezing


def test_a_config_file_decides_about_freezing_but_fixes_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"partial_freeze": False, "lr": 1e-4}))
    found = default(f"--config {path}")
    assert "freeze_layers" not in found and "lr" in found


def test_flags_leave_the_space_and_frozen_heads_get_larger_rates():
    assert default("--freeze_clip --batch_size 8 --w_c 0.4") == {
        "lr": "0.0001..0.01 log",
        "residual_scale_q": "0.1..0.5",
        "residual_scale_c": "0.1..0.5",
    }
    assert "residual_scale_q" not in default("--no_residual_learning")


def test_w_c_is_what_w_q_leaves():
    request = arguments.parse_search_args(["--output_dir", "out"])
    found = programs.SCORER.default_space(request.config, 24, request.given)
    config = programs.SCORER.options_of(request.config, found, {"w_q": 0.3}, request.given)
    assert (config.w_q, config.w_c) == (0.3, 0.7)
    both = {**found, "w_c": found["w_q"]}
    assert programs.SCORER.options_of(request.config, both, {"w_q": 0.3, "w_c": 0.4}, request.given).w_c == 0.4


def test_of_the_data_only_the_views_may_be_searched():
    """What is compared is the same in all trials: images, scores, their ranges, folds."""
    searched = {name for name in OPTIONS if programs.SCORER.may_be_searched(name)}
    for name, option in OPTIONS.items():
        if option.metadata["group"] in ("data", "meta"):
            assert (name in searched) == (name in VIEWS), name
        else:
            assert (name in searched) == (name != "select_by"), name
    assert not any(name.endswith("_column") or name.startswith("mos_range") for name in searched)
    assert set(VIEWS) <= set(OPTIONS) and not searched & {"seed", "fold", "dataset", "demo", "test", "output_dir"}
    assert not any(OPTIONS[name].pair for name in searched)  # which a study could not keep as they are
