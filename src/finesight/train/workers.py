"""Processes that read data beside the training process."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from finesight.child_processes import exit_with_parent
from finesight.errors import UserError

Item = TypeVar("Item")

MOST = 12
"""More processes than this have not been seen to read faster."""


def default_workers(device: torch.device, beside: int = 1) -> int:
    """On a GPU all but two of the cores, up to `MOST`; on a CPU, which computes itself, at most
    one, and none where there are only two cores. So many training processes share them."""
    cores = max(1, (os.cpu_count() or 1) // beside)
    if device.type == "cuda":
        return max(1, min(MOST, cores - 2))
    return 1 if cores > 2 else 0


def read_ahead(
    data: Dataset[Item | UserError], numbers: Iterable[int], workers: int, pin: bool
) -> Iterator[Item]:
    """The items of `data` with these numbers, in this order, whatever the number of workers.

    A UserError that an item turned out to be is raised here, as it is. With `pin`, items are
    brought into page-locked memory. The workers start at once, not at the first item. Where one
    dies, they are started again with the item that is due; raises WorkerDied where that is in vain.
    """
    # A range of any length takes no memory.
    todo = numbers if isinstance(numbers, range) else list(numbers)

    def from_item(place: int) -> Iterator[Item | UserError]:
        return _started(data, todo[place:], workers, pin)

    return _items(from_item, from_item(0), workers)


def _started(
    data: Dataset[Item | UserError], numbers: Sequence[int], workers: int, pin: bool
) -> Iterator[Item | UserError]:
    loader: DataLoader[Item | UserError] = DataLoader(
        data,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
        # A fork starts in milliseconds and needs nothing pickled; the workers never touch CUDA.
        multiprocessing_context=("fork" if sys.platform == "linux" else "spawn")
        if workers
        else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    before = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's own handler raises in the middle of whatever runs when a worker dies, be it half
        # an optimiser step; without it the loader notices when the next item is due.
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return items


RESTARTS = 2
"""Times that workers are started again for one item: it may be the item that ends them."""


class WorkerDied(UserError):
    """A process that reads data was killed or cannot go on, most often for want of memory."""


def _items(
    from_item: Callable[[int], Iterator[Item | UserError]],
    source: Iterator[Item | UserError],
    workers: int,
) -> Iterator[Item]:
    done = deaths = 0
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                return
            except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                if not workers or not _tells_of_death(error):
                    raise
                first = (str(error) or type(error).__name__).splitlines()[0]
                deaths += 1
                if deaths > RESTARTS:
                    raise WorkerDied(
                        f"a process that reads data died, {deaths} times for one item: {first}",
                        where="train.workers",
                        expected="enough memory, and enough of it shared (/dev/shm)",
                        remedy="set train.workers lower, or to 0; then start again with --resume",
                    ) from error
                logging.getLogger(__name__).warning(
                    "a process that reads data died, and is started again: %s", first
                )
                item = None
            if item is None:
                # Here, where the error is gone and with it the last reference to the old workers.
                source = iter(())
                source = from_item(done)
                continue
            done, deaths = done + 1, 0
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        # The last reference: the workers end now, and not when a traceback is forgotten.
        del source


def _tells_of_death(error: Exception) -> bool:
    """Whether the loader misses a worker, or cannot fetch the tensors of one that is gone; not
    what a worker raised itself."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid")
    return "in DataLoader worker process" not in text


def _as_it_is(item: Item) -> Item:
    return item


def _start_worker(worker: int) -> None:
    exit_with_parent()
    # Ctrl-C and a shell's SIGTERM go to the whole process group. The training process decides
    # when to stop and then ends its workers.
    os.setsid()


def guarded(make: Callable[[], Item]) -> Item | UserError:
    """What `make` gives, or the UserError it raised: as a value it survives the way from a worker
    unchanged, where the loader would wrap a raised one in its own traceback."""
    try:
        return make()
    except UserError as error:
        return error
