"""Timing of the device: CUDA events, and its waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from finesight.train.step_batch import StepBatch

DataWait = Callable[[], float]
"""Seconds in which the device waited for data; on a GPU, call it after the step has finished."""


def time_data_waits(
    steps: Iterator[StepBatch], device: torch.device
) -> Iterator[tuple[StepBatch, DataWait]]:
    """Yield each step of a data loader with the timing of its data wait."""
    while True:
        request_event = record_event(device, enable_timing=True)
        start = time.perf_counter()
        step_batch = next(steps, None)
        if step_batch is None:
            return
        blocked_s = time.perf_counter() - start
        ready_event = record_event(device, enable_timing=True)
        yield step_batch, partial(compute_idle_seconds, blocked_s, request_event, ready_event)


def compute_idle_seconds(
    blocked_s: float, request: torch.cuda.Event | None, ready: torch.cuda.Event | None
) -> float:
    """Return the seconds in which the device was idle while the host waited for `blocked_s`."""
    if request is None or ready is None:
        return blocked_s
    idle_s: float = request.elapsed_time(ready) / 1000
    # A GPU with an empty queue is idle for other reasons as well.
    return min(blocked_s, idle_s)


def record_event(device: torch.device, *, enable_timing: bool = False) -> torch.cuda.Event | None:
    """Record a CUDA event after all queued kernels; return None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing)  # type: ignore[no-untyped-call]
    event.record()
    return event
