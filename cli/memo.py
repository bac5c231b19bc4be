"""What several runs in one process have in common: computed by the first, kept for the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from cli.options import Config, options_of

T = TypeVar("T")


class Memo:
    """Values by kind and key. Of each kind those that were asked for last stay; the others make room.

    A value must not be changed by who asks for it.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, dict[Hashable, object]] = {}

    def value(self, kind: str, key: Hashable, compute: Callable[[], T], *, most: int = 1) -> T:
        """The value of this kind and key, computed only if it is not here.

        Args:
            key: all that the value depends on.
            most: how many values of this kind may stay.
        """
        values = self.kinds.setdefault(kind, {})
        if key not in values:
            while len(values) >= most:  # before the new one takes memory, too
                del values[next(iter(values))]
            values[key] = compute()
        values[key] = values.pop(key)  # now the last to go
        return cast(T, values[key])


class NoMemo(Memo):
    """For a run by itself: computes everything and holds on to nothing."""

    def value(self, kind: str, key: Hashable, compute: Callable[[], T], *, most: int = 1) -> T:
        """What `compute` gives."""
        return compute()


NO_MEMO = NoMemo()


@dataclass(frozen=True)
class DecidedBy:
    """The options that decide a value which runs may share: all of some groups but a few, and a few others."""

    groups: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def names(self, config_class: type[Config]) -> list[str]:
        """The options, in a fixed order."""
        options = options_of(config_class)  # type: ignore[arg-type]  # see Config
        of_groups = [name for name, spec in options.items() if spec.metadata["group"] in self.groups]
        return [*(name for name in of_groups if name not in self.without), *self.others]

    def values(self, config: Config) -> tuple[Any, ...]:
        """Their values, to be a key."""
        return tuple(getattr(config, name) for name in self.names(type(config)))
