"""Worker processes that decode images ahead of the process that reads samples."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from finesight.child_processes import exit_with_parent
from finesight.errors import UserError
from finesight.host_memory import num_allowed_cpus

ItemT = TypeVar("ItemT")
StartedT = TypeVar("StartedT")
ResultT = TypeVar("ResultT")
ArgsP = ParamSpec("ArgsP")

PREFETCH_ITEMS = 4
"""Number of items whose work is started ahead of the current item."""

MIN_PARALLEL_SAMPLES = 400
"""Minimum number of samples from which worker processes save time."""


@contextmanager
def open_executor(num_samples: int) -> Iterator[Executor]:
    """Open a process pool, or an inline executor for few samples.

    The pool has one worker per core. Workers are spawned rather than forked, so that they inherit
    no state.

    Raises:
        UserError: A worker died, most likely from lack of memory.
    """
    pool = _create_pool() if num_samples >= MIN_PARALLEL_SAMPLES else None
    if pool is None:
        yield _InlineExecutor()
        return
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"an image worker process died ({error})",
            where="data check",
            expected="enough memory to decode one image per core",
            remedy="free memory and start again",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _create_pool() -> ProcessPoolExecutor | None:
    """Create a process pool.

    Returns None if inter-process communication is unavailable, such as with a read-only /dev/shm.
    """
    context = multiprocessing.get_context("spawn")
    try:
        return ProcessPoolExecutor(num_allowed_cpus(), context, initializer=_start_worker)
    except OSError:
        return None


def prefetch_map(
    items: Iterable[ItemT],
    start: Callable[[ItemT], StartedT],
    finish: Callable[[ItemT, StartedT], ResultT],
    max_pending: int = PREFETCH_ITEMS,
) -> Iterator[ResultT]:
    """Yield `finish(item, start(item))` for each item in order, starting items ahead.

    At most `max_pending` items are started ahead of the current one.
    """
    pending: deque[tuple[ItemT, StartedT]] = deque()
    for item in items:
        pending.append((item, start(item)))
        if len(pending) > max_pending:
            yield finish(*pending.popleft())
    while pending:
        yield finish(*pending.popleft())


class _InlineExecutor(Executor):
    """Executor that runs each task immediately in the calling process."""

    def submit(
        self, fn: Callable[ArgsP, ResultT], /, *args: ArgsP.args, **kwargs: ArgsP.kwargs
    ) -> Future[ResultT]:
        future: Future[ResultT] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _start_worker() -> None:
    exit_with_parent()
    # Ctrl-C reaches every process of the group; the parent process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
