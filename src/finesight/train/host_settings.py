"""CPU thread and memory allocator settings of the training process."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt` in glibc's malloc.h."""

_DEFAULT_THRESHOLD = 128 << 10
"""Default value of both `mallopt` thresholds, in bytes."""

_LARGE_THRESHOLD = 1 << 30


@contextmanager
def configure_host(device: torch.device) -> Iterator[None]:
    """Apply the CPU thread and allocator settings for a device within the context."""
    with _limit_cpu_threads(device), retain_freed_memory(device):
        yield


@contextmanager
def _limit_cpu_threads(device: torch.device) -> Iterator[None]:
    """Use one CPU thread of PyTorch within the context if the device is a GPU.

    More threads would compete with the data loader workers.
    """
    if device.type != "cuda":
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def retain_freed_memory(device: torch.device) -> Iterator[None]:
    """Keep freed CPU memory in the process within the context, for training on a CPU.

    By default, glibc returns large blocks to the system. Page faults of new blocks then take a
    tenth of the step time of a small model. Blocks above 1 GiB are still returned.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.malloc_trim(0)
