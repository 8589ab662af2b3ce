"""The first signal is noted, the second one acts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from finesight.errors import Interrupted
from finesight.train.stop import SIGNALS, SOON_OVER, Stop


@pytest.fixture(autouse=True)
def python_hears() -> Iterator[None]:
    """Of a process in the background, the system may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_noted(number: signal.Signals) -> None:
    stop = Stop()
    with stop.listening():
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.signal == number
        with pytest.raises(Interrupted):
            stop.check()


def test_second_signal_acts_as_before() -> None:
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGTERM


def test_a_signal_that_another_process_told_of_may_still_come() -> None:
    """As where a scheduler signals all processes, one after the other."""
    stop = Stop()
    with stop.listening():
        stop.heed(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", SOON_OVER)
def test_that_time_is_short_may_be_said_twice(number: signal.Signals) -> None:
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert stop.signal == number


def test_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop().listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_nothing_is_touched() -> None:
    seen = []

    def listen() -> None:
        with Stop().listening():
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(number) for number in SIGNALS]]
