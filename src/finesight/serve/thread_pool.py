"""Thread pool for functions that would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

ArgsP = ParamSpec("ArgsP")
ResultT = TypeVar("ResultT")


class ThreadPool:
    """Runs blocking functions in a fixed number of threads. Further calls are queued."""

    def __init__(self, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="finesight-serve")

    async def run(
        self, function: Callable[ArgsP, ResultT], *args: ArgsP.args, **kwargs: ArgsP.kwargs
    ) -> ResultT:
        """Run a function in one of the threads and return its result."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))
