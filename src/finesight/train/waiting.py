"""How long the device had nothing to do because the next step's data was not there yet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from finesight.train.loader import Step
from finesight.train.step import recorded


@dataclass(frozen=True, slots=True)
class Wait:
    """Waiting for a step: `blocked` seconds on the host; on a GPU, `asked` happens when it has done
    all that was queued by then, and `came` after that, but not before the data was there."""

    blocked: float
    asked: torch.cuda.Event | None
    came: torch.cuda.Event | None

    @property
    def seconds(self) -> float:
        """Time in which the device was idle for want of data; to be asked for once a GPU has done
        the step. A CPU is idle for as long as its process is blocked."""
        if self.asked is None or self.came is None:
            return self.blocked
        # A GPU that had nothing queued before does not wait for data alone.
        idle: float = self.asked.elapsed_time(self.came) / 1000
        return min(self.blocked, idle)


def awaited(steps: Iterator[Step], device: torch.device) -> Iterator[tuple[Step, Wait]]:
    """Each step with the waiting for it."""
    while True:
        asked, start = recorded(device), time.perf_counter()
        step = next(steps, None)
        if step is None:
            return
        yield step, Wait(time.perf_counter() - start, asked, recorded(device))
