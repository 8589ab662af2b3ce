"""Where a run stands: it goes on, has come to its end, or was ended before; and how long it will
still take."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from finesight import run_folder as names
from finesight.report import facts
from finesight.report.language import say
from finesight.report.record import Line, Record

Kind = Literal["finished", "going", "interrupted", "failed", "silent"]
"""`silent`: its process ended without a word, killed or with its machine."""

RECENT = 50
"""Steps by whose time that of the coming ones is judged."""

FRESH = 900.0
"""Seconds since a run last noted something within which it is taken to go on, where the file
system knows no locks."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands. `left` are the seconds that it will still take, `why` what ended it; both
    None where they are not known."""

    kind: Kind
    step: int
    total: int | None
    left: float | None
    why: str | None

    @property
    def words(self) -> str:
        """In a sentence."""
        steps = say("step {:,}", self.step)
        if self.total:
            steps = say("step {:,} of {:,}", self.step, self.total)
        if self.kind == "going" and not self.step:
            return say("The run goes on, and is before its first step.")
        if self.kind == "going" and self.left is not None:
            return say("The run goes on: {}, about {} to go.", steps, _roughly(self.left))
        return say(
            {
                "finished": "The run has come to its end: {}.",
                "going": "The run goes on: {}.",
                "interrupted": "The run was interrupted after {}.",
                "failed": "The run failed after {}.",
                "silent": "The run ended without a word after {}: its process was killed, or its"
                " machine went down.",
            }[self.kind],
            steps,
        )


def standing(record: Record, going: bool = False) -> Standing:
    """Where the run of a record stands; `going` is known to the process that trains."""
    kind = _kind(record, going)
    return Standing(
        kind=kind,
        step=facts.done(record),
        total=facts.total_steps(record),
        left=_left(record) if kind == "going" else None,
        why=str(record.end["why"]) if record.end and record.end.get("why") else None,
    )


def _kind(record: Record, going: bool) -> Kind:
    if record.result is not None:
        return "finished"
    if record.end is not None:
        return "interrupted" if record.end.get("how") == "interrupted" else "failed"
    return "going" if going or _written_to(record.folder) else "silent"


def _written_to(folder: Path) -> bool:
    """Whether a process trains in the folder: it holds a lock on it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        noted = folder / names.METRICS
        return noted.is_file() and time.time() - noted.stat().st_mtime < FRESH
    finally:
        os.close(handle)
    return False


def _left(record: Record) -> float | None:
    """Seconds of the steps and measurements that are to come, by those that were."""
    total, now = facts.total_steps(record), facts.done(record)
    recent = record.steps[-RECENT:]
    if not total or not recent:
        return None
    between = [line for line in record.measured if line.get("step")]
    seconds = (total - now) * mean(float(line["seconds"]) for line in recent)
    # As often as so far, and once at the end.
    ahead = len(between) * (total - now) / now + 1
    return seconds + ahead * _measuring(between or record.measured)


def _measuring(measured: list[Line]) -> float:
    known = [float(line["seconds"]) for line in measured if line.get("seconds") is not None]
    return mean(known) if known else 0.0


def _roughly(seconds: float) -> str:
    """Time for people, without digits that nobody can know."""
    if seconds < 60:
        return say("a minute")
    minutes = round(seconds / 60)
    if minutes < 60:
        return say("{} min", minutes)
    return say("{} h {:02d} min", *divmod(minutes, 60))
