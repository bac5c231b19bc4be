"""What search.py is asked for: its flags, and the space of options that it searches. No torch here, nor Optuna."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cli.parser import OneLineParser
from configs import OPTIONS, VIEWS, TrainingConfig, parse_loss, parse_unfreeze_schedule
from guidance.arguments import build_parser, load_options, parse_args
from storage.json_files import read_json

# Of these groups an option says what is compared (images, scores, folds), or is the search's own to set.
COMPARED = ("data", "meta")
KEYS = {"low", "high", "log", "step", "choices"}
DEEP = 20  # blocks, from which freeze_layers goes in steps of two


@dataclass(frozen=True)
class Dimension:
    """The values that one option may take: `choices`, or from `low` to `high`."""

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are whole."""
        return OPTIONS[self.name].kind is int

    def to_json(self) -> dict[str, Any]:
        """As in a space file, with every key that says something."""
        if self.choices is not None:
            return {"choices": list(self.choices)}
        found: dict[str, Any] = {"low": self.low, "high": self.high}
        return found | ({"log": True} if self.log else {}) | ({"step": self.step} if self.step else {})

    def describe(self) -> str:
        """In words: "lr 1e-06..0.001 log"."""
        if self.choices is not None:
            return f"{self.name} {' | '.join(map(str, self.choices))}"
        how = " log" if self.log else f" step {self.step:g}" if self.step else ""
        return f"{self.name} {self.low:g}..{self.high:g}{how}"


Space = dict[str, Dimension]


def may_be_searched(name: str) -> bool:
    """Whether trials with other values of this option can be compared with each other."""
    return name in VIEWS or (OPTIONS[name].metadata["group"] not in COMPARED and name != "select_by")


@dataclass(frozen=True)
class Request:
    """What a command line of search.py asks for."""

    config: TrainingConfig  # of every trial, but for what is searched
    folder: Path
    trials: int
    seeds: int
    workers: int
    storage: str  # a database URL, or journal:PATH
    study_name: str
    timeout: float | None  # seconds
    space: Space | None  # of --space; None asks for the default one
    given: frozenset[str]  # options that flags fix
    parent: int | None  # process that started this one as one of its workers


def build_search_parser() -> argparse.ArgumentParser:
    """The flags of search.py alone."""
    parser = OneLineParser(prog="search.py", add_help=False, allow_abbrev=False)
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of search.py, in front of those of baseline.py in its help."""
    group = parser.add_argument_group("search", "what is searched, and how long")
    group.add_argument("--trials", type=int, default=50, metavar="N", help="finished trials in all (default: 50)")
    group.add_argument(
        "--space",
        metavar="FILE",
        help='JSON of options and their values: {"lr": {"low": 1e-6, "high": 1e-3, "log": true}, "freeze_layers": '
        '{"low": 16, "high": 22, "step": 2}, "loss": {"choices": ["mse", "mse+plcc"]}} (default: lr, residual_scale_q, '
        "residual_scale_c, freeze_layers, w_q with w_c = 1 - w_q, batch_size; a flag given here fixes its option)",
    )
    group.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="run the best so often in the end; 0 = not (default: 3)"
    )
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    group.add_argument(
        "--storage",
        metavar="URL",
        help="where the study is kept: a database URL, or journal:PATH for a file that several machines share "
        "(default: study.db in --output_dir)",
    )
    group.add_argument("--study_name", default="search", metavar="NAME", help="within the storage (default: search)")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="begin no trial after so long")
    group.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser._action_groups.insert(0, parser._action_groups.pop())


def parse_search_args(
    argv: Sequence[str] | None = None, *, num_blocks: Callable[[TrainingConfig], int | None] | None = None, **late: Any
) -> Request:
    """Command line -> what is asked for.

    Args:
        num_blocks, late: see `arguments.parse_args`.

    Raises:
        ValueError: an unknown flag, a value that breaks its rule, or a space that cannot be searched.
        SystemExit: --help has been printed.
    """
    whole = build_parser()
    whole.prog, whole.usage = "search.py", "python search.py --output_dir DIR [--trials N] [--space FILE] [flags]"
    whole.description = "Search the options of baseline.py for the best validation score, with Optuna."
    whole.epilog = "Try it now: python search.py --demo --trials 20 --output_dir runs/search"
    add_flags(whole)
    own = vars(build_search_parser().parse_args([]))
    given = frozenset(vars(whole.parse_args(argv))) - set(own)
    args, rest = build_search_parser().parse_known_args(argv)
    config = parse_args(rest, num_blocks=num_blocks, **late)
    check_numbers(args, config)
    config = with_freezing(config, given)
    assert config.output_dir
    space = read_space(Path(args.space), given) if args.space else None
    if space:
        check_used(space, config)
    folder = Path(config.output_dir)
    return Request(
        config=replace(config, output_dir=None, config=None, preset=None),
        folder=folder,
        trials=args.trials,
        seeds=args.seeds,
        workers=args.workers,
        storage=args.storage or f"sqlite:///{folder / 'study.db'}",
        study_name=args.study_name,
        timeout=args.timeout,
        space=space,
        given=given,
        parent=args.parent,
    )


def check_numbers(args: argparse.Namespace, config: TrainingConfig) -> None:
    """Rules of search.py's own flags, and of baseline.py's beside them. Raises ValueError."""
    for name, least in (("trials", 1), ("seeds", 0), ("workers", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.timeout is not None and not args.timeout > 0:
        raise ValueError(f"--timeout {args.timeout:g}: must be above 0")
    if not config.output_dir:
        raise ValueError("--output_dir DIR: say where the search is to be kept; the same command goes on from there")
    if config.repeats > 1 or (config.kfold and not config.fold):
        raise ValueError("--repeats, --kfold: every trial is one run; --seeds repeats the best one in the end")
    if not config.test:
        raise ValueError("--no_test: no trial reads the test fold anyway; --seeds 0 leaves it unread in the end, too")
    for name in ("dry_run", "overwrite", "resume"):
        if getattr(config, name):
            raise ValueError(f"--{name}: is of baseline.py alone; drop it, and choose a new --output_dir to start anew")


def with_freezing(config: TrainingConfig, given: frozenset[str]) -> TrainingConfig:
    """The config, partly frozen unless anything was said about what is trained of CLIP."""
    said = set(given) | (set(load_options(config.config)) if config.config else set())
    other = config.freeze_clip or config.unfreeze_schedule or config.lora_rank or config.preset
    return config if "partial_freeze" in said or other else replace(config, partial_freeze=True)


def default_space(config: TrainingConfig, depth: int | None, given: frozenset[str]) -> Space:
    """The usual options to search, without those that flags fix.

    Args:
        depth: blocks of CLIP's image tower; None if it has none to count.
    """
    low, high = (1e-4, 1e-2) if config.freeze_clip else (1e-6, 1e-3)
    dimensions = [
        Dimension("lr", low=low, high=high, log=True),
        Dimension("residual_scale_q", low=0.1, high=0.5),
        Dimension("residual_scale_c", low=0.1, high=0.5),
    ]
    if not config.use_residual_learning:
        del dimensions[1:]
    if config.partial_freeze and not config.unfreeze_schedule and depth:
        step = 2 if depth >= DEEP else 1
        first, last = round(depth * 16 / 24), round(depth * 22 / 24)
        dimensions.append(Dimension("freeze_layers", low=first, high=last, step=step if last > first else None))
    if not given & {"w_q", "w_c"}:
        dimensions.append(Dimension("w_q", low=0.3, high=0.7))
    dimensions.append(Dimension("batch_size", choices=(16, 32, 64)))
    space = {dimension.name: dimension for dimension in dimensions if dimension.name not in given}
    if not space:
        raise ValueError("nothing is left to search: flags fix every option of the space; drop some, or give --space")
    return space


def read_space(path: Path, given: frozenset[str]) -> Space:
    """A space file. Raises ValueError with the file, the option and the rule."""
    try:
        raw = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"--space {path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"--space {error}") from None
    if not raw:
        raise ValueError(f"--space {path}: must be a JSON object with an option or more")
    space = {}
    for name, text in raw.items():
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--space {path}: unknown option {name!r}{hint}")
        try:
            space[name] = read_dimension(name, text)
        except ValueError as error:
            raise ValueError(f"--space {path}: {name}: {error}") from None
        if name in given:
            raise ValueError(f"--space {path}: {name} is also given as {OPTIONS[name].flag}; drop one of the two")
    if "w_q" in space and "w_c" not in space and "w_c" not in given:
        largest = max(space["w_q"].choices or (space["w_q"].high,))
        if largest > 1:
            raise ValueError(f"--space {path}: w_q: {largest:g} must be at most 1, since w_c is 1 - w_q; or add w_c")
    return space


def read_dimension(name: str, raw: Any) -> Dimension:
    """One entry of a space file. Raises ValueError."""
    spec = OPTIONS[name]
    if not may_be_searched(name):
        raise ValueError("cannot be searched: the search sets it, or it decides which scores are compared")
    if not isinstance(raw, Mapping):
        raise ValueError('must be {"low": ..., "high": ...} or {"choices": [...]}')
    if unknown := sorted(set(raw) - KEYS):
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}")
    if "choices" in raw:
        return read_choices(name, raw)
    if spec.kind not in (int, float):
        raise ValueError('is no number: give {"choices": [...]}')
    if not {"low", "high"} <= set(raw):
        raise ValueError('needs "low" and "high", or "choices"')
    low, high, log, step = raw["low"], raw["high"], raw.get("log", False), raw.get("step")
    for value in (low, high, *([step] if step is not None else [])):
        if isinstance(value, bool) or not isinstance(value, (int, float) if spec.kind is float else int):
            raise ValueError(f"{value!r} must be a {'whole ' if spec.kind is int else ''}number")
    if not isinstance(log, bool):
        raise ValueError(f"log {log!r} must be true or false")
    for value in (low, high):
        spec.check(value)
    if low >= high:
        raise ValueError(f"low {low:g} must be below high {high:g}")
    if log and (low <= 0 or step is not None):
        raise ValueError("log works above 0 only, and without step")
    if step is not None and not (
        0 < step <= high - low and abs((high - low) / step - round((high - low) / step)) < 1e-6
    ):
        raise ValueError(f"step {step:g} must lead from low {low:g} to high {high:g}")
    return Dimension(name, low=low, high=high, log=log, step=step)


def read_choices(name: str, raw: Mapping[str, Any]) -> Dimension:
    """One entry that lists its values. Raises ValueError."""
    values = raw["choices"]
    if set(raw) != {"choices"}:
        raise ValueError('"choices" stand alone, without low, high, log and step')
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError("choices must be a list of two values or more")
    for value in values:
        OPTIONS[name].check(value)
        if name == "loss":
            parse_loss(str(value))
        if name == "unfreeze_schedule" and value is not None:
            parse_unfreeze_schedule(str(value))
    if len({repr(value) for value in values}) < len(values):
        raise ValueError("choices has a value twice")
    return Dimension(name, choices=tuple(values))


def check_used(space: Space, config: TrainingConfig) -> None:
    """Raise ValueError for an option that could not change anything, and so would only waste trials."""
    freezing = {"freeze_clip", "partial_freeze", "unfreeze_schedule"} & set(space)
    if "freeze_layers" in space and not freezing and (not config.partial_freeze or config.unfreeze_schedule):
        raise ValueError(f"--space: freeze_layers does nothing here, where CLIP is {config.freezing}; drop it")
    if "head_lr" not in space and "lr" in space and config.freeze_clip and config.head_lr:
        raise ValueError(
            "--space: lr does nothing here, where only heads are trained, with --head_lr; drop one of them"
        )


def options_of(
    config: TrainingConfig, space: Space, values: Mapping[str, Any], given: frozenset[str]
) -> TrainingConfig:
    """The options of a trial with these values, as a study keeps them. Raises ValueError where some exclude others."""
    values = dict(values)
    if "w_q" in space and "w_c" not in space and "w_c" not in given:
        values["w_c"] = round(1 - values["w_q"], 12)  # 0.7, not 0.7000000000000001
    return replace(config, **values)
