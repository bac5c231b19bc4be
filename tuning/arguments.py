"""What search.py is asked for: its flags beside those of the program whose options it searches. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.parser import OneLineParser
from tuning.programs import EXPERIMENTS, PROGRAMS, Program
from tuning.space import Space


@dataclass(frozen=True)
class Request:
    """What a command line of search.py asks for."""

    program: Program
    config: Any  # its options, of every trial, but for what is searched
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
    """Add the flags of search.py, in front of those of the program in its help."""
    group = parser.add_argument_group("search", "what is searched, and how long")
    group.add_argument(
        "--program",
        choices=tuple(PROGRAMS),
        default="scorer",
        help="whose options: scorer, baseline.py; vqa, main.py, which has flags of its own (default: scorer)",
    )
    group.add_argument("--trials", type=int, default=50, metavar="N", help="finished trials in all (default: 50)")
    group.add_argument(
        "--space",
        metavar="FILE",
        help='JSON of options and their values: {"lr": {"low": 1e-6, "high": 1e-3, "log": true}, "freeze_layers": '
        '{"low": 16, "high": 22, "step": 2}, "loss": {"choices": ["mse", "mse+plcc"]}} (default: of scorer lr, '
        "residual_scale_q, residual_scale_c, freeze_layers, w_q with w_c = 1 - w_q, batch_size; of vqa lr, dropout, "
        "and what its branches have of num_hid, AOA_layers, omega_q, mgat_layers, sample_k, xvlm_lr, fusion_ratio; a "
        f"flag given here fixes its option); of vqa also an experiment of the tuning guide: {', '.join(EXPERIMENTS)}",
    )
    group.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="run the best so often in the end; 0 = not (default: 3)"
    )
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    group.add_argument(
        "--storage",
        metavar="URL",
        help="where the study is kept: a database URL, or journal:PATH for a file that several machines share "
        "(default: study.db in --output_dir, or --output of vqa)",
    )
    group.add_argument("--study_name", default="search", metavar="NAME", help="within the storage (default: search)")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="begin no trial after so long")
    group.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser._action_groups.insert(0, parser._action_groups.pop())


def parse_search_args(argv: Sequence[str] | None = None, **late: Any) -> Request:
    """Command line -> what is asked for.

    Args:
        late: num_images and num_blocks, see `guidance.arguments.parse_args`.

    Raises:
        ValueError: an unknown flag, a value that breaks its rule, or a space that cannot be searched.
        SystemExit: --help has been printed.
    """
    args, rest = build_search_parser().parse_known_args(argv)
    program = PROGRAMS[args.program]
    whole = program.parser()
    flag = f"--{program.folder}"
    whole.prog, whole.usage = "search.py", f"python search.py {flag} DIR [--trials N] [--space FILE] [flags]"
    whole.description = f"Search the options of {program.script} for the best validation score, with Optuna."
    named = "" if program is PROGRAMS["scorer"] else f"--program {args.program} "
    whole.epilog = f"Try it now: python search.py {named}--demo --trials 20 {flag} runs/search"
    add_flags(whole)
    own = vars(build_search_parser().parse_args([]))
    given = frozenset(vars(whole.parse_args(argv))) - set(own)
    config = program.parse_args(rest, **late)
    check_numbers(args, program, config)
    folder = Path(getattr(config, program.folder))
    config = program.of_trials(config, given)
    space = named_space(args.space, program, config, given) if args.space else None
    if space:
        program.check_space(space, config, given)
    return Request(
        program=program,
        config=config,
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


def named_space(name: str, program: Program, config: Any, given: frozenset[str]) -> Space:
    """The space of --space: one that is ready, or a file. Raises ValueError."""
    ready = program.ready_spaces(config)
    if name not in ready:
        return program.read_space(Path(name), given)
    space = {option: dimension for option, dimension in ready[name].items() if option not in given}
    if not space:
        raise ValueError(
            f"--space {name}: nothing is left to search: flags fix its options, or no branch that is trained has them"
        )
    return space


def check_numbers(args: argparse.Namespace, program: Program, config: Any) -> None:
    """Rules of search.py's own flags, and of the program's beside them. Raises ValueError."""
    for name, least in (("trials", 1), ("seeds", 0), ("workers", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.timeout is not None and not args.timeout > 0:
        raise ValueError(f"--timeout {args.timeout:g}: must be above 0")
    if not getattr(config, program.folder):
        raise ValueError(
            f"--{program.folder} DIR: say where the search is to be kept; the same command goes on from there"
        )
    program.check(config)
    if not config.test:
        raise ValueError("--no_test: no trial reads the test fold anyway; --seeds 0 leaves it unread in the end, too")
    for name in ("dry_run", "overwrite", "resume"):
        if getattr(config, name):
            raise ValueError(
                f"--{name}: is of {program.script} alone; drop it, and choose a new --{program.folder} to start anew"
            )
