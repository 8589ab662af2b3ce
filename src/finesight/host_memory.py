"""Read memory and CPU count of the machine, within the limits of its container."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def num_allowed_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def total_memory(cgroup: Path = _CGROUP) -> int:
    """Return the memory in bytes of the machine, or of the container if lower."""
    limit = _read_limit(cgroup / "memory.max")
    return _physical_memory() if limit is None else min(limit, _physical_memory())


def available_memory(proc: Path = Path("/proc"), cgroup: Path = _CGROUP) -> int:
    """Return the free and reclaimable memory in bytes, within the limit of the container."""
    free = _read_mem_available(proc / "meminfo")
    limit = _read_limit(cgroup / "memory.max")
    used = _read_limit(cgroup / "memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used + _read_inactive_file_bytes(cgroup / "memory.stat"))
    return max(0, free)


def _read_mem_available(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        # Systems without /proc: assume that half of the memory is available.
        return _physical_memory() // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_limit(file: Path) -> int | None:
    """Read a number of bytes from a cgroup file, such as memory.max."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _read_inactive_file_bytes(file: Path) -> int:
    """Read the reclaimable page cache of a container in bytes, from its memory.stat file."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
