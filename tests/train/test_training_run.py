"""Signals and host settings of a run: the first signal is recorded, the second one acts."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from finesight.errors import TrainingInterrupted
from finesight.train.state import PREEMPTION_SIGNALS, SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def default_sigint() -> Iterator[None]:
    """The system may ignore SIGINT for a background process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_second_signal_uses_the_default_handler(number):
    """A scheduler may signal all processes: a first signal after a remote stop is recorded."""
    before = [signal.getsignal(one) for one in SIGNALS]
    stop = StopRequest()
    with stop.install_handlers():
        stop.raise_if_requested()
        if number == signal.SIGINT:
            stop.request(number)
        os.kill(os.getpid(), number)
        with pytest.raises(TrainingInterrupted):
            stop.raise_if_requested()
        if number in PREEMPTION_SIGNALS:
            os.kill(os.getpid(), number)  # the warning may repeat
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == number
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_other_threads_install_no_handlers():
    seen = []

    def listen() -> None:
        with StopRequest().install_handlers():
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(number) for number in SIGNALS]]
