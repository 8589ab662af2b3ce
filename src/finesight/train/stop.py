"""Being asked to stop: once politely, then at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finesight.errors import Interrupted

SOON_OVER = (signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler sends some time before a job has to end (sbatch --signal=USR1@300)."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, *SOON_OVER)


class Stop:
    """Whether one of these signals has arrived."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._arrived = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the first signal is noted, and a second one acts as it did before, but
        for one that only says again that time is short.

        Only the main thread can listen; in another one signals act as ever.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def note(number: int, frame: FrameType | None) -> None:
            # What was heeded is often the same signal, which comes to each process in its time.
            if not self._arrived:
                self._arrived = True
                self.heed(number)
                return
            if number in SOON_OVER:
                return
            signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)
            os.kill(os.getpid(), number)

        for number in SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    @property
    def asked(self) -> bool:
        return self.signal is not None

    @property
    def number(self) -> int:
        """That of the signal, or 0."""
        return 0 if self.signal is None else int(self.signal)

    def heed(self, number: int) -> None:
        """Take a signal that came to another process for one's own; 0 is none."""
        if number and self.signal is None:
            self.signal = signal.Signals(number)

    def check(self) -> None:
        """Raises Interrupted once a signal has arrived."""
        if self.signal is not None:
            raise Interrupted(f"{self.signal.name} has arrived")
