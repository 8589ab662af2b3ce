"""What torch allocates on a CPU while something runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass
class MemoryProfile:
    """`most` bytes at once, beside what was there before, and those that are `left`; known at the
    end."""

    peak_bytes: int = 0
    live_bytes: int = 0


@contextmanager
def profile_memory() -> Iterator[MemoryProfile]:
    """Counts while it is open."""
    memory = MemoryProfile()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield memory
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        memory.live_bytes += event.nbytes()
        memory.peak_bytes = max(memory.peak_bytes, memory.live_bytes)
