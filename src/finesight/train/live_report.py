"""Live report of a run: `report.html`, updated by a background thread during training."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from finesight.errors import TrainingInterrupted, UserError
from finesight.report.run_page import MAX_LIVE_EXAMPLES, LiveReportState
from finesight.train.checkpoint import TrainProgress
from finesight.train.console import TrainingConsole
from finesight.train.finalize import write_run_report
from finesight.train.run_dir import RunDir

REPORT_INTERVAL_S = 60.0
"""Minimum number of seconds between two periodic updates."""

MIN_IDLE_RATIO = 300
"""Minimum ratio of the update interval to the CPU time of an update.

The thread shares the Python interpreter with the training step, and takes at most 1/300 of its
time.
"""


class LiveReport:
    """Writer of the report of a run in progress, on demand and periodically."""

    def __init__(
        self, run_dir: RunDir, console: TrainingConsole, interval_s: float = REPORT_INTERVAL_S
    ) -> None:
        self._run_dir, self._console, self._min_interval_s = run_dir, console, interval_s
        self._live = LiveReportState(interval_s=interval_s)
        self._write_lock = threading.Lock()
        self._stop_event = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def interval_s(self) -> float:
        """Current number of seconds between two periodic updates."""
        return self._live.interval_s

    def write(self) -> None:
        """Write the report now; errors are logged."""
        with self._write_lock:
            write_run_report(self._run_dir, self._console, MAX_LIVE_EXAMPLES, self._live)

    def stop(self) -> None:
        """Stop the background thread after its current update."""
        self._stop_event.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @contextmanager
    def run_in_background(self, progress: TrainProgress) -> Iterator[None]:
        """Update the report periodically within the context.

        An exception in the context is recorded in `metrics.jsonl` with the current step, shown in a
        final report, and raised again.
        """
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=[self._write_loop], daemon=True)
        self._thread.start()
        try:
            yield
        except Exception as error:
            self.stop()
            self._record_end(error, progress.step)
            write_run_report(self._run_dir, self._console, MAX_LIVE_EXAMPLES)
            raise
        finally:
            self.stop()

    def _write_loop(self) -> None:
        while not self._stop_event.wait(self._live.interval_s):
            start = time.thread_time()
            self.write()
            self._live.interval_s = max(
                self._min_interval_s, MIN_IDLE_RATIO * (time.thread_time() - start)
            )

    def _record_end(self, error: Exception, step: int) -> None:
        status = "interrupted" if isinstance(error, TrainingInterrupted) else "failed"
        ended_at = datetime.now(UTC).isoformat(timespec="seconds")
        # A full disk must not hide the original error.
        with suppress(UserError, OSError):
            self._run_dir.append_metrics(
                {
                    "step": step,
                    "ended_at": ended_at,
                    "status": status,
                    "reason": _describe_error(error),
                }
            )


def _describe_error(error: Exception) -> str:
    """Format the error that ended a run as one line."""
    if isinstance(error, UserError):
        return f"{error.where}: {error.what}" if error.where else error.what
    return (
        str(error) if isinstance(error, TrainingInterrupted) else f"{type(error).__name__}: {error}"
    )
