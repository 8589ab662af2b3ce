"""Whether a pack is computed by a recording sooner than its kernels are launched: what the host
takes for the one, and the card for the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Pace:
    """Of one run on one machine. Nothing waits for the card."""

    def __init__(self) -> None:
        self._launch_s = math.inf
        self._token_s = math.inf
        self._under_way: tuple[int, torch.cuda.Event, torch.cuda.Event] | None = None

    def launched(self, seconds: float) -> None:
        """What the host took for a pack. The shortest counts: the first ones compile kernels, and
        where the card is slower than the host, the host waits in launches."""
        self._launch_s = min(self._launch_s, seconds)

    @contextmanager
    def replaying(self, tokens: int) -> Iterator[None]:
        """A block that replays a recording of so many tokens, without a tower in it. Here, too, the
        shortest counts, of each token: a card may have other work."""
        self._look()
        if self._under_way is not None:
            yield
            return
        start, end = _event(), _event()
        start.record()
        yield
        end.record()
        self._under_way = tokens, start, end

    def _look(self) -> None:
        if self._under_way is None:
            return
        tokens, start, end = self._under_way
        if end.query():  # type: ignore[no-untyped-call]
            self._token_s = min(self._token_s, start.elapsed_time(end) / 1000 / tokens)
            self._under_way = None

    def replays_sooner(self, tokens: int) -> bool | None:
        """Whether a recording of so many tokens is through before the kernels of a pack would be
        launched; None until both were measured."""
        self._look()
        known = math.isfinite(self._token_s) and math.isfinite(self._launch_s)
        return tokens * self._token_s < self._launch_s if known else None


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
