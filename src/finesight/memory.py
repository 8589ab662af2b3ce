"""The memory that this machine has and has left, within a container's limit, and its cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def allowed_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def whole_memory(group: Path = _CGROUP) -> int:
    """Bytes of memory, free or not."""
    limit = _number(group / "memory.max")
    return _of_machine() if limit is None else min(limit, _of_machine())


def free_memory(system: Path = Path("/proc"), group: Path = _CGROUP) -> int:
    """Bytes of memory that are free or can be freed at once, within the limit of a container."""
    free = _available(system / "meminfo")
    limit = _number(group / "memory.max")
    used = _number(group / "memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used + _files_in_memory(group / "memory.stat"))
    return max(0, free)


def _available(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        # Not on every system: then half of all.
        return _of_machine() // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit in it (`max`)."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _files_in_memory(file: Path) -> int:
    """Bytes of files that the container's processes have read and nobody needs."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
