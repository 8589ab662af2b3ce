"""Worker processes of rewards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from finesight.files.pattern_matcher import PatternMatcher
from finesight.files.worker_pool import WorkerPool

MAX_MEMORY_BYTES = 2 << 30
"""Memory of a function in addition to its loaded file, and of a schema."""


class RewardWorkers(contextlib.ExitStack):
    """Worker processes of the rewards of a recipe. Close it to end them.

    Attributes:
        matcher: Matcher of patterns. The first match starts its process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matcher = self.enter_context(PatternMatcher("rewards, pattern", ""))

    def open_pool(self, setup: Callable[..., Any], *args: object) -> WorkerPool:
        """Return a pool of processes with limited memory; the first job starts them."""
        pool = WorkerPool(setup, *args, num_idle=1, memory_bytes=MAX_MEMORY_BYTES)
        return self.enter_context(contextlib.closing(pool))
