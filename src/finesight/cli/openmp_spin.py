"""Choose the OpenMP spin count of CPU threads before torch loads the OpenMP runtime."""

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

    Unrelated processes that start at the same moment are not detected. Ranks of one run are.
    """
    is_single_process = os.environ.get("WORLD_SIZE", "1") == "1"
    spin_count = (
        choose_spin_count(_count_running_threads(), num_allowed_cpus())
        if is_single_process
        else SHORT_SPIN_COUNT
    )
    os.environ.setdefault("GOMP_SPINCOUNT", str(spin_count))


def choose_spin_count(num_running: int | None, num_cpus: int) -> int:
    """Return the long spin count if other threads leave most CPUs idle."""
    return (
        LONG_SPIN_COUNT
        if num_running is not None and 2 * num_running < num_cpus
        else SHORT_SPIN_COUNT
    )


def _count_running_threads() -> int | None:
    """Count the other runnable threads (proc_loadavg(5)). Returns None if unknown."""
    try:
        num_running, _, _ = LOADAVG_PATH.read_text().split()[3].partition("/")
        return max(0, int(num_running) - 1)
    except (OSError, ValueError, IndexError):
        return None
