"""From the command line of baseline.py to a TrainingConfig: flags, presets, saved and interrupted runs.

No torch here: `--help` and every usage error answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli import parser
from cli.parser import OneLineParser
from configs import FREE, GROUPS, NOT_SAVED, OPTIONS, TrainingConfig
from guidance.presets import DEMO_SETTINGS, overlay, preset_table, with_preset
from storage.messages import one_line


def build_parser() -> OneLineParser:
    """The command line of baseline.py."""
    return parser.build_parser(
        TrainingConfig,
        GROUPS,
        prog="baseline.py",
        usage="python baseline.py [flags]",
        description="Fine-tune CLIP to predict how people score AI-generated images: perceptual quality and "
        "consistency with the prompt.",
        epilog="Try it now: python baseline.py --demo",
    )


def load_options(path: str | Path, flag: str = "--config") -> dict[str, Any]:
    """The options in a saved config.json, see `parser.load_options`. Raises ValueError."""
    return parser.load_options(path, OPTIONS, not_saved=NOT_SAVED, flag=flag)


def parse_args(
    argv: Sequence[str] | None = None,
    *,
    num_images: Callable[[TrainingConfig], int] | None = None,
    num_blocks: Callable[[TrainingConfig], int | None] | None = None,
) -> TrainingConfig:
    """Command line -> config. Precedence: flags, then --preset, then --config, then --demo, then defaults.

    Args:
        num_images: counts the training images, for --preset auto; without it, auto stays unresolved.
        num_blocks: tells the depth of the CLIP, for the presets' --freeze_layers; without it, that of ViT-L.

    Raises:
        ValueError: an unknown flag, or a value that breaks its rule.
        SystemExit: --help and --preset list have printed what was asked for.
    """
    flags = parser.parse_flags(build_parser(), argv)
    for name in ("config", "resume", "preset"):  # used before all are checked; argparse makes () of "--config=--"
        if name in flags:
            OPTIONS[name].check(flags[name])
    if flags.get("preset") == "list":
        print(preset_table())
        raise SystemExit(0)
    if flags.get("resume", "auto") != "auto":
        return resumed_config(flags)
    saved = load_options(flags["config"]) if "config" in flags else {}
    demo = flags.get("demo", saved.get("demo"))
    for name in ("data_csv_path", "image_base_dir", "dataset"):
        if demo and name in flags:
            ways = "drop it" if "demo" in flags else "add --no_demo (--config has it on)"
            raise ValueError(f"--demo has its own data: {ways} or drop --{name}")
    below = DEMO_SETTINGS.get(str(demo), {})
    preset, own = flags.pop("preset", None), saved.pop("preset", None)
    if preset is None:  # a file may name one, which comes below what else the file says
        below = with_preset(below, overlay(saved, flags), own, num_images, num_blocks)
    below = overlay(below, saved)
    return TrainingConfig(**overlay(with_preset(below, flags, preset, num_images, num_blocks), flags))


def resumed_config(flags: Mapping[str, Any]) -> TrainingConfig:
    """The options of the run that is to be gone on with; flags may change those in FREE. Raises ValueError."""
    folder = Path(flags["resume"])
    files = [folder / name for name in ("config.json", "protocol.json") if (folder / name).is_file()]
    if not files:
        raise ValueError(one_line(f"--resume {folder}: there is no run in it"))
    saved = load_options(files[0], "--resume")
    parser.refuse_another_run(folder, flags, saved, OPTIONS, free=FREE, instead=f"start one with --config {files[0]}")
    return TrainingConfig(**{**saved, **flags, "output_dir": str(folder)})
