"""How long threads of a CPU run that wait for each other spin before they sleep: a choice that the
library of threads wants to know when it is loaded, with torch."""

from __future__ import annotations

import os
from pathlib import Path

from finesight.memory import allowed_cores

LONG, SHORT = 20_000, 2_000
"""Turns. On two cores of a Xeon a step of LoRA takes a fifth less time with LONG. Two such runs on
the same cores take twice as long with it as with SHORT, and by the library's default, 300,000, many
times as long."""

RUNNING = Path("/proc/loadavg")


def set_spinning() -> None:
    """Choose for this process and those that it starts, unless somebody has chosen. Whoever starts
    in the same moment on the same cores is not seen, but for the processes of one run."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    chosen = spins(_running(), allowed_cores()) if alone else SHORT
    os.environ.setdefault("GOMP_SPINCOUNT", str(chosen))


def spins(running: int | None, cores: int) -> int:
    """LONG where the `running` others leave most cores free; SHORT where not, or where nobody
    knows."""
    return LONG if running is not None and 2 * running < cores else SHORT


def _running() -> int | None:
    """Threads that run or could run now, without this one (proc_loadavg(5))."""
    try:
        now, _, _ = RUNNING.read_text().split()[3].partition("/")
        return max(0, int(now) - 1)
    except (OSError, ValueError, IndexError):
        return None
