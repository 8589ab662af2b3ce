"""Graceful stop of a run when the process receives a signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finesight.errors import TrainingInterrupted

PREEMPTION_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that job schedulers send before the time limit (`sbatch --signal=USR1@300`)."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, *PREEMPTION_SIGNALS)


class StopRequest:
    """Request to stop the run gracefully, set by a signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """Received signal, possibly of another rank."""
        self._has_arrived = False

    @contextmanager
    def install_handlers(self) -> Iterator[None]:
        """Install signal handlers within the context, which set the stop request.

        A second signal has its previous effect, except for preemption signals, which are then
        ignored. In other threads than the main thread, no handlers are installed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous_handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}

        def handle_signal(signal_number: int, frame: FrameType | None) -> None:
            # A signal relayed by another rank does not count as the first one.
            if not self._has_arrived:
                self._has_arrived = True
                self.request(signal_number)
                return
            if signal_number in PREEMPTION_SIGNALS:
                return
            signal.signal(
                signal_number, previous_handlers[signal.Signals(signal_number)] or signal.SIG_DFL
            )
            os.kill(os.getpid(), signal_number)

        for signum in SIGNALS:
            signal.signal(signum, handle_signal)
        try:
            yield
        finally:
            for signum, handler in previous_handlers.items():
                signal.signal(signum, handler or signal.SIG_DFL)

    def request(self, signal_number: int) -> None:
        """Set the stop request for a signal, possibly of another rank; ignore 0."""
        if signal_number and self.signal is None:
            self.signal = signal.Signals(signal_number)

    def raise_if_requested(self) -> None:
        """Raise if a stop was requested.

        Raises:
            TrainingInterrupted: A signal has arrived.
        """
        if self.signal is not None:
            raise TrainingInterrupted(f"{self.signal.name} has arrived")
