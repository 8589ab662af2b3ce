"""Report of a run: written while it trains, and at its end."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING

from finesight.errors import Step
from finesight.progress import ProgressConsole
from finesight.train.run_dir import RunDir

if TYPE_CHECKING:
    from finesight.report.run_page import LiveReportState

REPORT_INTERVAL_S = 60.0
"""Minimum number of seconds between two updates of the report in the training loop."""

MIN_IDLE_RATIO = 300
"""Minimum ratio of the update interval to the duration of an update."""


class RunReport:
    """Writer of the report of a run, in the training loop, on demand and at the end.

    Errors are logged, because a report must not fail a run.
    """

    def __init__(
        self, run_dir: RunDir, console: ProgressConsole, interval_s: float = REPORT_INTERVAL_S
    ) -> None:
        self._run_dir = run_dir
        self._console = console
        self._min_interval_s = interval_s
        self._due_s = time.perf_counter() + interval_s

    @cached_property
    def _live(self) -> LiveReportState:
        from finesight.report.run_page import LiveReportState

        return LiveReportState(interval_s=self._min_interval_s)

    def write(self, *, is_live: bool = False) -> None:
        """Write `report.html` now, with more examples if the run is finished.

        Args:
            is_live: Whether the run is in progress.
        """
        # Only the main process needs the report.
        from finesight.report.run_page import MAX_EXAMPLES, MAX_LIVE_EXAMPLES, write_report

        run_dir = self._run_dir
        live_state = self._live if is_live else None
        max_examples = MAX_EXAMPLES if run_dir.is_finished else MAX_LIVE_EXAMPLES
        try:
            page = write_report(run_dir.path, max_examples=max_examples, live_state=live_state)
        except Exception as error:
            self._console.log(
                f"writing the report failed ({type(error).__name__}: {error});"
                f" {Step('report', {'run': run_dir.path}, 'to create it later')}"
            )
        else:
            if run_dir.is_finished:
                self._console.log(f"Report:  {page}")

    def write_if_due(self) -> bool:
        """Write the report once per interval, in at most 1/300 of the time; return if it did."""
        if time.perf_counter() < self._due_s:
            return False
        start = time.perf_counter()
        self.write(is_live=True)
        end = time.perf_counter()
        self._live.interval_s = max(self._min_interval_s, MIN_IDLE_RATIO * (end - start))
        self._due_s = end + self._live.interval_s
        return True
