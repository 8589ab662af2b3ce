"""The report of a run while it goes on: written anew about once a minute, beside the steps."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from finesight.errors import Interrupted, UserError
from finesight.report.run_page import MOST_ON_THE_WAY, Live
from finesight.train.checkpoint import Progress
from finesight.train.finish import report
from finesight.train.progress import Screen
from finesight.train.run import Run

EVERY = 60.0
"""Seconds from one page to the next."""

LEAST_REST = 300
"""Times as long as a page computed nothing is written after it: what shares the interpreter with
the steps must not take more than a three-hundredth of their time."""


class LivePage:
    """Writes the page of a run that goes on: when it is asked to, and by itself in a thread."""

    def __init__(self, run: Run, screen: Screen, every: float = EVERY) -> None:
        self._run, self._screen, self._every = run, screen, every
        self._live = Live(again=every)
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def again(self) -> float:
        """Seconds from a page to the next one that comes by itself."""
        return self._live.again

    def write(self) -> None:
        """Write it now. Whatever goes wrong is said and not raised."""
        with self._writing:
            report(self._run, self._screen, MOST_ON_THE_WAY, self._live)

    def rest(self) -> None:
        """Write no more of them; one that is being written is waited for."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @contextmanager
    def going(self, progress: Progress) -> Iterator[None]:
        """Within the block pages come by themselves. What ends it early is noted in the run, as of
        the last finished step, and told by a last page."""
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=[self._go], daemon=True)
        self._thread.start()
        try:
            yield
        except Exception as error:
            self.rest()
            self._note(error, progress.step)
            report(self._run, self._screen, MOST_ON_THE_WAY)
            raise
        finally:
            self.rest()

    def _go(self) -> None:
        while not self._over.wait(self._live.again):
            start = time.thread_time()
            self.write()
            self._live.again = max(self._every, LEAST_REST * (time.thread_time() - start))

    def _note(self, error: Exception, step: int) -> None:
        how = "interrupted" if isinstance(error, Interrupted) else "failed"
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        # On a full disk there is no room for it, and the error has to be heard.
        with suppress(UserError, OSError):
            self._run.note({"step": step, "ended": ended, "how": how, "why": _why(error)})


def _why(error: Exception) -> str:
    """What ended a run, in a line."""
    if isinstance(error, UserError):
        return f"{error.where}: {error.what}" if error.where else error.what
    return str(error) if isinstance(error, Interrupted) else f"{type(error).__name__}: {error}"
