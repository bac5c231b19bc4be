"""Signals that ask a run to stop: schedulers' SIGTERM and SIGUSR1, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal has asked the run to stop, and it has."""


class Signals:
    """Listens as long as the block lasts: the first signal stops the run, the second one stops it at once.

    Where nothing would be lost the run stops by `Stopped` wherever it is; in a block of `held_back` it only learns that
    `asked` is true, and has to raise `Stopped` itself when what it is doing is done. It hears nothing in a thread:
    signals come to the main one.
    """

    def __init__(self) -> None:
        self.asked = ""  # name of the signal that came
        self.is_held_back = False
        self.before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.take) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if not self.is_held_back:
            raise Stopped(
                f"stopped by {self.asked} outside of training: the same command goes on, with --resume auto if needed"
            )
        # Not by print, which a signal may have come in the middle of.
        os.write(2, f"{self.asked}: saving after this step; once more stops at once, without\n".encode())

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let the run stop only where it chooses to."""
        self.is_held_back = True
        try:
            yield
        finally:
            self.is_held_back = False


NONE = Signals()  # listens to nothing
