"""Memory that is given up and taken again without new pages."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from finesight.train.training_run import retain_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc alone")

SIZE = 40 << 20
"""Bytes beyond what glibc keeps by itself, however often they come."""


def count_page_faults() -> int:
    """Pages that the system had to bring for a tensor that is filled and given up, ten times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_reused_within_the_block() -> None:
    with retain_freed_memory(torch.device("cpu")):
        count_page_faults()
        assert count_page_faults() < SIZE / resource.getpagesize()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_allocator_setting_is_restored(device: str) -> None:
    with pytest.raises(ValueError, match="within"), retain_freed_memory(torch.device(device)):
        raise ValueError("within")
