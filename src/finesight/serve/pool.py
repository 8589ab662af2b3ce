"""Threads that do what would keep the event loop from serving others, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Made = TypeVar("Made")


class Pool:
    """`readers` threads; what they cannot do yet waits."""

    def __init__(self, readers: int) -> None:
        self._threads = ThreadPoolExecutor(readers, thread_name_prefix="finesight-serve")

    async def run(
        self, work: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs
    ) -> Made:
        """What `work` gives, done in one of the threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))
