"""`training.signals`: what asks a run to stop, and how it is told."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from backbones import download
from training import signals


def test_a_signal_before_training_stops_at_once_and_a_second_one_always(capfd):
    with (
        signals.Signals() as stop_signals,
        pytest.raises(signals.Stopped, match=r"SIGTERM outside of training: the same command goes on"),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert stop_signals.asked == "SIGTERM"
    with signals.Signals() as stop_signals, stop_signals.deferred():
        signal.raise_signal(signal.SIGUSR1)
        assert stop_signals.asked == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "SIGUSR1: saving after this step; once more stops at once, without\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: signals.Signals().__enter__().before).result() == {}


def test_what_is_ignored_stays_so():
    """As Ctrl-C is for what a script has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.Signals() as stop_signals:
            signal.raise_signal(signal.SIGINT)
            assert stop_signals.asked == ""
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_that_expects_errors_takes_a_signal_for_one():
    with signals.Signals(), pytest.raises(signals.Stopped):
        download.download("weights", lambda: signal.raise_signal(signal.SIGTERM))


STOPPING = """
import signal
from cli.errors import one_line_errors
from training import signals

with one_line_errors(retry=signals.Stopped), signals.Signals() as stop_signals, stop_signals.deferred():
    input()
    signal.raise_signal(signal.SIGINT)
    raise signals.Stopped("saved")
"""


@pytest.mark.parametrize("is_read", [True, False])
def test_a_signal_that_has_ended_the_reader_of_stderr_too_stops_the_run_as_any_other(is_read):
    """Ctrl-C in a terminal with `2>&1 | tee log`: it must not break the step, nor change the exit code."""
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", STOPPING], cwd=ROOT, text=True, **pipes)
    assert process.stdin is not None and process.stderr is not None
    if not is_read:
        process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    said = process.stderr.read() if is_read else ""
    assert process.wait(60) == 75
    assert (
        said.splitlines()
        == ["SIGINT: saving after this step; once more stops at once, without", "saved"][: 2 * is_read]
    )
