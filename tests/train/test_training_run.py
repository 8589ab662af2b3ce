"""The first signal is noted, the second one acts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from finesight.errors import TrainingInterrupted
from finesight.train.training_run import PREEMPTION_SIGNALS, SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def default_sigint() -> Iterator[None]:
    """Of a process in the background, the system may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_recorded(number: signal.Signals) -> None:
    stop = StopRequest()
    with stop.install_handlers():
        stop.raise_if_requested()
        os.kill(os.getpid(), number)
        assert stop.signal == number
        with pytest.raises(TrainingInterrupted):
            stop.raise_if_requested()


def test_second_signal_uses_the_default_handler() -> None:
    stop = StopRequest()
    with stop.install_handlers():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGTERM


def test_signal_after_remote_stop_is_recorded() -> None:
    """As where a scheduler signals all processes, one after the other."""
    stop = StopRequest()
    with stop.install_handlers():
        stop.request(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS)
def test_preemption_warning_may_repeat(number: signal.Signals) -> None:
    stop = StopRequest()
    with stop.install_handlers():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert stop.signal == number


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest().install_handlers():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_threads_install_no_handlers() -> None:
    seen = []

    def listen() -> None:
        with StopRequest().install_handlers():
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(number) for number in SIGNALS]]
