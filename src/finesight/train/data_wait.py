"""Measurement of the time in which the device waits for the data loader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from finesight.train.dataloader import StepBatch
from finesight.train.step import record_event


@dataclass(frozen=True, slots=True)
class DataWait:
    """Timing of the request for the data of one step.

    Attributes:
        blocked_s: Seconds in which the host waited for the data loader.
        request_event: CUDA event recorded when the data were requested; None on a CPU.
        ready_event: CUDA event recorded when the data arrived; None on a CPU.
    """

    blocked_s: float
    request_event: torch.cuda.Event | None
    ready_event: torch.cuda.Event | None

    @property
    def seconds(self) -> float:
        """Seconds in which the device was idle.

        On a GPU, read it after the step has finished.
        """
        if self.request_event is None or self.ready_event is None:
            return self.blocked_s
        # A GPU with an empty queue is idle for other reasons as well.
        idle: float = self.request_event.elapsed_time(self.ready_event) / 1000
        return min(self.blocked_s, idle)


def time_data_waits(
    steps: Iterator[StepBatch], device: torch.device
) -> Iterator[tuple[StepBatch, DataWait]]:
    """Yield each step of a data loader with the timing of its data wait."""
    while True:
        request_event, start = record_event(device), time.perf_counter()
        step_batch = next(steps, None)
        if step_batch is None:
            return
        yield step_batch, DataWait(time.perf_counter() - start, request_event, record_event(device))
