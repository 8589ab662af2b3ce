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
"""Kind of status of a run.

A run is `killed` if its process ended without a message, for example because its machine did.
"""

NUM_RECENT_STEPS = 50
"""Number of recent steps whose mean time determines the remaining time."""

LIVENESS_TIMEOUT_S = 900.0
"""Seconds after its last metric for which a run counts as active without file locks.

This applies to file systems that do not support locks.
"""


@dataclass(frozen=True)
class RunStatus:
    """Status and progress of a run.

    Attributes:
        kind: Kind of status.
        step: Number of finished steps.
        total_steps: Total number of steps. None if unknown.
        remaining_s: Estimated remaining seconds of an active run. None if unknown.
        reason: Recorded reason of an interruption or failure. None if unknown.
    """

    kind: StatusKind
    step: int
    total_steps: int | None
    remaining_s: float | None
    reason: str | None

    @property
    def description(self) -> str:
        """Status of the run as a translated sentence."""
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
    """Return the status of a run.

    Args:
        run_record: Content of the run directory.
        is_training: True if the calling process is training this run.
    """
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
    """Return whether a training process holds the lock of a run directory."""
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
    """Estimate the seconds of the remaining steps and evaluations; None if unknown."""
    total_steps, current_step = (
        summary.get_total_steps(run_record),
        summary.get_last_step(run_record),
    )
    recent = run_record.steps[-NUM_RECENT_STEPS:]
    if not total_steps or not current_step or not recent:
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
    if seconds < 60:
        return translate("a minute")
    minutes = round(seconds / 60)
    if minutes < 60:
        return translate("{} min", minutes)
    return translate("{} h {:02d} min", *divmod(minutes, 60))
