"""What torch allocates on a CPU while something runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass
class Allocated:
    """`most` bytes at once, beside what was there before, and those that are `left`; known at the
    end."""

    most: int = 0
    left: int = 0


@contextmanager
def allocated() -> Iterator[Allocated]:
    """Counts while it is open."""
    found = Allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield found
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        found.left += event.nbytes()
        found.most = max(found.most, found.left)
