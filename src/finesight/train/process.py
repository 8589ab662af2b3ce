"""What a process is set to while it learns: its threads, and what it keeps of its memory."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRIM, _MAP = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""

_USUAL = 128 << 10
"""Bytes that both are in a new process."""

_LARGE = 1 << 30


@contextmanager
def set_to_learn(device: torch.device) -> Iterator[None]:
    """Within the block, the process is as it learns best on this device."""
    with _one_thread(device), freed_kept(device):
        yield


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """One thread for what little the CPU computes beside a GPU: more of them mostly wait for each
    other, and do so on the cores of the processes that read."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def freed_kept(device: torch.device) -> Iterator[None]:
    """Within the block, memory that tensors on a CPU give up is kept for the next ones, blocks of a
    GiB excepted. Left to itself, glibc hands large blocks back, and the system brings every page of
    the next ones anew: twenty thousand in a step of a small model, a tenth of its time."""
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MAP, _LARGE)
    libc.mallopt(_TRIM, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MAP, _USUAL)
        libc.mallopt(_TRIM, _USUAL)
        libc.malloc_trim(0)
