"""Signals that ask a run to stop: schedulers' SIGTERM and SIGUSR1, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_TRY_AGAIN = 75  # the exit code that asks to be run again, as in sysexits.h
BEFORE: dict[signal.Signals, object] = {}  # what `end_quietly` has taken the place of


class Stopped(BaseException):  # as KeyboardInterrupt is one: nothing that expects errors may take it for its own
    """A signal has asked the run to stop, and it has."""


def end_quietly(*, interrupted: int = 130, silently: bool = False) -> None:
    """Let a signal end the process in a line, not in the traceback of an import: nothing can be lost as yet.

    Ctrl-C ends it with the exit code `interrupted`, the others ask to be run again. What is ignored stays so.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if not silently:
            tell(f"stopped by {signal.Signals(number).name}")
        os._exit(interrupted if number == signal.SIGINT else EXIT_TRY_AGAIN)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            BEFORE[number] = signal.signal(number, end)


def end_as_usual() -> None:
    """Undo `end_quietly`, for programs that do not listen by `Signals`."""
    for number, handler in BEFORE.items():
        signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned


def tell(text: str) -> None:
    """Say it on stderr; not by print, which a signal may have come in the middle of."""
    with suppress(OSError):  # who read it may have ended by the same signal
        os.write(2, f"{text}\n".encode())


class Signals:
    """Listens as long as the block lasts: the first signal stops the run, the second one stops it at once.

    Where nothing would be lost the run stops by `Stopped` wherever it is; in a block of `deferred` it only learns that
    `asked` is true, and has to raise `Stopped` itself when what it is doing is done. It hears nothing in a thread:
    signals come to the main one.
    """

    def __init__(self) -> None:
        self.asked = ""  # name of the signal that came
        self.is_deferred = False
        self.before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self.take) for number in heard}
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
        if not self.is_deferred:
            raise Stopped(
                f"stopped by {self.asked} outside of training: the same command goes on, with --resume if needed"
            )
        tell(f"{self.asked}: saving after this step; once more stops at once, without")

    @contextmanager
    def deferred(self, holds: bool = True) -> Iterator[None]:
        """Let the run stop only where it chooses to; within such a block, `holds=False` lets it stop anywhere."""
        before, self.is_deferred = self.is_deferred, holds
        try:
            if not holds and self.asked:
                raise Stopped(f"stopped by {self.asked}")
            yield
        finally:
            self.is_deferred = before


NONE = Signals()  # listens to nothing
