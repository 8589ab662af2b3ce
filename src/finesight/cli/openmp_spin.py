"""Set the OpenMP spin count (GOMP_SPINCOUNT) of CPU threads before torch loads libgomp.

Idle threads spin before they sleep. A long spin shortens training steps on an idle machine, and
slows down concurrent processes on a busy one.
"""

from __future__ import annotations

import os
from pathlib import Path

from finesight.host_memory import num_allowed_cpus

LONG_SPIN_COUNT, SHORT_SPIN_COUNT = 20_000, 2_000
"""Spin counts (GOMP_SPINCOUNT). On two cores of a Xeon, LONG_SPIN_COUNT shortens a LoRA step by 20
%. Two concurrent runs on the same cores take twice as long with LONG_SPIN_COUNT as with
SHORT_SPIN_COUNT, and many times as long with the default of 300,000."""

LOADAVG_PATH = Path("/proc/loadavg")


def configure_openmp_spin() -> None:
    """Set GOMP_SPINCOUNT for this process and its children, unless it is set.

    The count is short if other threads use the CPUs, or if this process is one of several ranks.
    Unrelated processes that start at the same moment are not detected.
    """
    is_single_process = os.environ.get("WORLD_SIZE", "1") == "1"
    spin_count = (
        choose_spin_count(_count_running_threads(), num_allowed_cpus())
        if is_single_process
        else SHORT_SPIN_COUNT
    )
    os.environ.setdefault("GOMP_SPINCOUNT", str(spin_count))


def choose_spin_count(num_running: int | None, num_cpus: int) -> int:
    """Return LONG_SPIN_COUNT if fewer than half of the CPUs are busy, else SHORT_SPIN_COUNT.

    Args:
        num_running: Number of runnable threads on the machine; None (unknown) counts as busy.
        num_cpus: Number of CPUs that this process may use.
    """
    return (
        LONG_SPIN_COUNT
        if num_running is not None and 2 * num_running < num_cpus
        else SHORT_SPIN_COUNT
    )


def _count_running_threads() -> int | None:
    """Count the other runnable threads of the machine with /proc/loadavg (proc_loadavg(5)).

    Returns None if the file cannot be read, as on macOS.
    """
    try:
        num_running, _, _ = LOADAVG_PATH.read_text().split()[3].partition("/")
        return max(0, int(num_running) - 1)
    except (OSError, ValueError, IndexError):
        return None
