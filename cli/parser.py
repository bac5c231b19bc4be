"""Command lines made from options, read back from saved files, and written out again."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cli.options import Config, Option, options_of
from storage.json_files import read_json
from storage.messages import one_line, quoted


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors of one line, with the nearest flag for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        message = one_line(message)  # it quotes what was given
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        raise ValueError(message + (f" (did you mean {near[0]}?)" if near else "; see --help"))


def build_parser(config_class: type[Config], groups: Mapping[str, str], **about: Any) -> OneLineParser:
    """The command line of a program.

    Args:
        groups: name of each group of options -> what it is about.
        about: `prog`, `usage`, `description` and `epilog`, as argparse takes them.
    """
    parser = OneLineParser(allow_abbrev=False, **about)
    places = {name: parser.add_argument_group(name, description) for name, description in groups.items()}
    for spec in options_of(config_class).values():  # type: ignore[arg-type]  # see Config
        spec.add_to(places[spec.metadata["group"]])
    return parser


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The options that a command line names, not yet checked. Raises ValueError for an unknown flag."""
    flags = vars(parser.parse_args(argv))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items()}


def load_options(
    path: str | Path, options: Mapping[str, Option], *, not_saved: Collection[str] = (), flag: str = "--config"
) -> dict[str, Any]:
    """Read options from a saved config.json, or a hand-written one with any of its keys; null says nothing.

    Args:
        not_saved: options that are passed over.
        flag: what the user has named the file by.

    Raises:
        ValueError: the file is missing, is not a JSON object, or has a key that is no option.
    """
    try:
        saved = read_json(Path(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(one_line(f"{flag} {path}: no such file")) from None
    except ValueError as error:
        raise ValueError(one_line(f"{flag} {error}")) from None
    saved.pop("provenance", None)
    for key in saved:
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(one_line(f"{flag} {path}: unknown option {quoted(key)}{hint}"))
    return {
        key: tuple(value) if options[key].pair and isinstance(value, list) else value
        for key, value in saved.items()
        if key not in not_saved and not (value is None and options[key].optional)
    }


def refuse_another_run(
    folder: Path,
    flags: Mapping[str, Any],
    saved: Mapping[str, Any],
    options: Mapping[str, Option],
    *,
    free: Collection[str],
    instead: str,
) -> None:
    """Raise ValueError if flags would change more of the run in a folder, whose options are saved, than is `free`.

    Args:
        instead: what to do where that is wished for.
    """
    for name, value in flags.items():
        if name not in (*free, "resume") and value != saved.get(name, options[name].default):
            raise ValueError(
                f"--resume {folder}: {options[name].flag} would make it another run; drop it, or {instead}"
            )


def flag_words(values: Mapping[str, Any], options: Mapping[str, Option], base: Mapping[str, Any]) -> list[str]:
    """Flags and values of the options that differ from `base` or, where that has none, from the default."""
    words: list[str] = []
    for name, spec in options.items():
        if name in values and values[name] != base.get(name, spec.default):
            words += spec.words(values[name])
    return words
