"""Status of a run: running, finished, interrupted, failed or killed."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from finesight import run_files
from finesight.report import summary
from finesight.report.i18n import translate
from finesight.report.run_reader import JsonObject, RunRecord

StatusKind = Literal["finished", "running", "interrupted", "failed", "killed"]
"""`killed`: the process ended without a message, for example with its machine."""

NUM_RECENT_STEPS = 50
"""Number of recent steps used to estimate the remaining time."""

LIVENESS_TIMEOUT_S = 900.0
"""On a file system without locks, a run is active if it logged an event within this time."""


@dataclass(frozen=True)
class RunStatus:
    """Status of a run.

    Attributes:
        remaining_s: Estimated remaining seconds, None if unknown.
        reason: Reason of an interruption or failure, None if unknown.
    """

    kind: StatusKind
    step: int
    total_steps: int | None
    remaining_s: float | None
    reason: str | None

    @property
    def description(self) -> str:
        """Status as a sentence."""
        steps = translate("step {:,}", self.step)
        if self.total_steps:
            steps = translate("step {:,} of {:,}", self.step, self.total_steps)
        if self.kind == "running" and not self.step:
            return translate("The run is in progress, before its first step.")
        if self.kind == "running" and self.remaining_s is not None:
            return translate(
                "The run is in progress: {}, about {} remaining.",
                steps,
                _format_remaining(self.remaining_s),
            )
        return translate(
            {
                "finished": "The run is finished: {}.",
                "running": "The run is in progress: {}.",
                "interrupted": "The run was interrupted after {}.",
                "failed": "The run failed after {}.",
                "killed": "The run was killed after {}: its process or machine ended without a"
                " message.",
            }[self.kind],
            steps,
        )


def get_run_status(run_record: RunRecord, is_training: bool = False) -> RunStatus:
    """Return the status of a run. `is_training` is set by the training process."""
    kind = _classify_status(run_record, is_training)
    return RunStatus(
        kind=kind,
        step=summary.get_last_step(run_record),
        total_steps=summary.get_total_steps(run_record),
        remaining_s=_estimate_remaining_s(run_record) if kind == "running" else None,
        reason=str(run_record.end_event["reason"])
        if run_record.end_event and run_record.end_event.get("reason")
        else None,
    )


def _classify_status(run_record: RunRecord, is_training: bool) -> StatusKind:
    if run_record.result is not None:
        return "finished"
    if run_record.end_event is not None:
        return "interrupted" if run_record.end_event.get("status") == "interrupted" else "failed"
    return "running" if is_training or _is_training_in(run_record.folder) else "killed"


def _is_training_in(folder: Path) -> bool:
    """Return whether a process holds the lock of the run directory."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        metrics_file = folder / run_files.METRICS_FILE
        return (
            metrics_file.is_file()
            and time.time() - metrics_file.stat().st_mtime < LIVENESS_TIMEOUT_S
        )
    finally:
        os.close(fd)
    return False


def _estimate_remaining_s(run_record: RunRecord) -> float | None:
    """Estimate the seconds of remaining steps and evaluations."""
    total_steps, current_step = (
        summary.get_total_steps(run_record),
        summary.get_last_step(run_record),
    )
    recent = run_record.steps[-NUM_RECENT_STEPS:]
    if not total_steps or not recent:
        return None
    interim_evaluations = [line for line in run_record.evaluations if line.get("step")]
    seconds = (total_steps - current_step) * mean(float(line["step_s"]) for line in recent)
    # At the same frequency as before, and once at the end.
    num_evaluations_left = (
        len(interim_evaluations) * (total_steps - current_step) / current_step + 1
    )
    return seconds + num_evaluations_left * _mean_evaluation_s(
        interim_evaluations or run_record.evaluations
    )


def _mean_evaluation_s(evaluations: list[JsonObject]) -> float:
    durations = [float(line["eval_s"]) for line in evaluations if line.get("eval_s") is not None]
    return mean(durations) if durations else 0.0


def _format_remaining(seconds: float) -> str:
    """Format a remaining time in minutes and hours."""
    if seconds < 60:
        return translate("a minute")
    minutes = round(seconds / 60)
    if minutes < 60:
        return translate("{} min", minutes)
    return translate("{} h {:02d} min", *divmod(minutes, 60))
