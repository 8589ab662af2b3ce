"""Memory and CPU count of the machine, within the limits of its container, and memory of forks."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import weakref
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")

MIN_FORK_BLOCK_BYTES = 1 << 26
"""Size from which a block of memory is kept out of forks."""


def num_allowed_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def total_memory(cgroup: Path = _CGROUP) -> int:
    """Return the memory in bytes of the machine, or of the container if lower."""
    physical, limit = _physical_memory(), _read_number(cgroup / "memory.max")
    return physical if limit is None else min(limit, physical)


def available_memory(proc: Path = Path("/proc"), cgroup: Path = _CGROUP) -> int:
    """Return the free and reclaimable memory in bytes, within the limit of the container."""
    free_kib = _read_number(proc / "meminfo", "MemAvailable:")
    # Systems without /proc: assume that half of the memory is available.
    free = _physical_memory() // 2 if free_kib is None else 1024 * free_kib
    limit, used = _read_number(cgroup / "memory.max"), _read_number(cgroup / "memory.current")
    if limit is not None and used is not None:
        # The kernel can reclaim the inactive page cache of the container.
        cached = _read_number(cgroup / "memory.stat", "inactive_file") or 0
        free = min(free, limit - used + cached)
    return max(0, free)


def keep_out_of_forks(owner: object, address: int, num_bytes: int) -> None:
    """Keep a block of memory out of processes that this process forks, and that never use it.

    This ends with its owner, because an allocator gives freed memory to other objects.

    While a forked process lives, the first write of this process to a page copies the page. Memory
    that each training step writes, such as optimizer states, would exist twice. Blocks of less than
    `MIN_FORK_BLOCK_BYTES` are left unchanged, as are all blocks on systems besides Linux.
    """
    if sys.platform != "linux" or num_bytes < MIN_FORK_BLOCK_BYTES:
        return
    # Other data may lie on the first and the last page.
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, end - start, mmap.MADV_DONTFORK)
    finalizer = weakref.finalize(owner, _advise, start, end - start, mmap.MADV_DOFORK)
    finalizer.atexit = False


def _advise(start: int, num_bytes: int, advice: int) -> None:
    """Tell the kernel how to treat pages. A failure, as for memory of a driver, is ignored."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), advice)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_number(file: Path, key: str = "") -> int | None:
    """Read the number that starts a line of a kernel file, after a key; None without one."""
    with suppress(OSError):
        match = re.search(rf"^{key}\s*(\d+)", file.read_text(), re.MULTILINE)
        return int(match[1]) if match else None
    return None
