"""What several runs in one process have in common: computed by the first, kept for the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

T = TypeVar("T")


class Kept:
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


class NothingKept(Kept):
    """For a run by itself: computes everything and holds on to nothing."""

    def value(self, kind: str, key: Hashable, compute: Callable[[], T], *, most: int = 1) -> T:
        """What `compute` gives."""
        return compute()


NOTHING = NothingKept()
