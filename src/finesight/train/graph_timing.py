"""Timing of CUDA graph replays and of eager kernel launches, to decide which is faster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class GraphTimer:
    """Timer of eager launches and graph replays, without synchronizing with the device."""

    def __init__(self) -> None:
        self._launch_s = math.inf
        self._replay_s_per_token = math.inf
        self._pending: tuple[int, torch.cuda.Event, torch.cuda.Event] | None = None

    def record_launch(self, seconds: float) -> None:
        """Record the host time for launching the kernels of an eager pack.

        The timer stores the minimum of all packs: the first packs include kernel compilation, and
        launches block when the queue of the device is full.
        """
        self._launch_s = min(self._launch_s, seconds)

    @contextmanager
    def time_replay(self, num_tokens: int) -> Iterator[None]:
        """Measure the device time of a graph replay in the context.

        The timer stores the minimum per token, because the device may also run other kernels. The
        graph must not contain the vision encoder.
        """
        self._poll()
        if self._pending is not None:
            yield
            return
        start, end = _create_event(), _create_event()
        start.record()
        yield
        end.record()
        self._pending = num_tokens, start, end

    def _poll(self) -> None:
        if self._pending is None:
            return
        num_tokens, start, end = self._pending
        if end.query():  # type: ignore[no-untyped-call]
            self._replay_s_per_token = min(
                self._replay_s_per_token, start.elapsed_time(end) / 1000 / num_tokens
            )
            self._pending = None

    def is_replay_faster(self, num_tokens: int) -> bool | None:
        """Return whether a replay takes less device time than eager launches take host time.

        The result is None until both have been measured.

        Args:
            num_tokens: Number of tokens of the graph.
        """
        self._poll()
        is_measured = math.isfinite(self._replay_s_per_token) and math.isfinite(self._launch_s)
        return num_tokens * self._replay_s_per_token < self._launch_s if is_measured else None


def _create_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
