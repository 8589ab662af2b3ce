"""Side bar of the studio: states of the steps, and running commands with their progress."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from finesight.app.jobs import Job
from finesight.progress import find_progress
from finesight.report.i18n import translate
from finesight.report.summary import RunStatus

StepState = Literal["done", "current", "next", "open"]


def find_step_states(
    steps: Sequence[str], current: str, done: Collection[str], next_step: str
) -> dict[str, StepState]:
    """Return the state of each step.

    Args:
        next_step: Step to which the page leads, which is not marked if it is done; empty for none.
    """
    states: dict[str, StepState] = {}
    for step in steps:
        states[step] = "open"
        if step in done:
            states[step] = "done"
        elif step == next_step:
            states[step] = "next"
    states[current] = "current"
    return states


@dataclass(frozen=True, slots=True)
class RunningJob:
    """Running command with its progress.

    Attributes:
        num_done: Number of processed steps, samples or images.
        total: Total number of them; 0 if it is unknown.
        remaining_s: Estimated remaining seconds; None if unknown.
    """

    job: Job
    num_done: int = 0
    total: int = 0
    remaining_s: float | None = None

    @property
    def item(self) -> str:
        """Item of the command: that of its page, or for labelling the new data set."""
        return self.job.target or self.job.out

    @property
    def remaining_text(self) -> str:
        """Translated remaining time; empty if unknown."""
        if self.remaining_s is None:
            return ""
        hours, minutes = divmod(max(1, round(self.remaining_s / 60)), 60)
        if hours:
            return translate("about {} h {:02d} min left", hours, minutes)
        return translate("about {} min left", minutes)


def describe_running(job: Job, status: RunStatus | None) -> RunningJob:
    """Return the progress of a running command.

    Args:
        status: Status of the run of a training; None for other commands, whose log has lines about
            their progress.
    """
    if status is not None and status.step and status.total_steps:
        return RunningJob(job, status.step, status.total_steps, status.remaining_s)
    if job.is_server:
        return RunningJob(job)
    progress = find_progress(job.read_log())
    if progress is None:
        return RunningJob(job)
    return RunningJob(job, progress.num_done, progress.total, progress.remaining_s)
