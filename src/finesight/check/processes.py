"""Processes that look at pictures beside the one that reads samples, and work ahead of it."""

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
from finesight.memory import allowed_cores

Item = TypeVar("Item")
Begun = TypeVar("Begun")
Done = TypeVar("Done")
Given = ParamSpec("Given")

AHEAD = 4
"""Items that are begun before the first of them is waited for."""

WORTH_IT = 400
"""Samples below which starting processes takes longer than they save."""


@contextmanager
def processes(samples: int) -> Iterator[Executor]:
    """One process for each core; for a few samples this process does the work itself.

    The processes are started afresh, not forked, so that nothing of this one is copied. One that
    dies, mostly for want of memory, becomes a UserError here.
    """
    pool = _pool() if samples >= WORTH_IT else None
    if pool is None:
        yield _Here()
        return
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that looks at pictures died ({error})",
            where="data check",
            expected="enough memory to decode a picture on each core",
            remedy="free some memory and start again",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _pool() -> ProcessPoolExecutor | None:
    """None where processes cannot speak to each other, as without a /dev/shm to write to."""
    context = multiprocessing.get_context("spawn")
    try:
        return ProcessPoolExecutor(allowed_cores(), context, initializer=_start_worker)
    except OSError:
        return None


def ahead(
    items: Iterable[Item],
    begin: Callable[[Item], Begun],
    finish: Callable[[Item, Begun], Done],
    most: int = AHEAD,
) -> Iterator[Done]:
    """`finish` of every item and of what `begin` gave for it, in order, with up to `most` further
    items begun by then."""
    waiting: deque[tuple[Item, Begun]] = deque()
    for item in items:
        waiting.append((item, begin(item)))
        if len(waiting) > most:
            yield finish(*waiting.popleft())
    while waiting:
        yield finish(*waiting.popleft())


class _Here(Executor):
    """Does at once, in this process, what it is given."""

    def submit(
        self, work: Callable[Given, Done], /, *args: Given.args, **kwargs: Given.kwargs
    ) -> Future[Done]:
        future: Future[Done] = Future()
        future.set_result(work(*args, **kwargs))
        return future


def _start_worker() -> None:
    exit_with_parent()
    # Ctrl-C goes to every process of the group; the one that started the others ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
