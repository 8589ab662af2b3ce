"""Data loader worker processes."""

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

MAX_WORKERS = 12
"""Maximum default number of workers; more did not increase throughput."""


def default_num_workers(device: torch.device, local_world_size: int = 1) -> int:
    """Return the default number of workers for a device.

    On a GPU, all but two of the cores, up to `MAX_WORKERS`. On a CPU, at most one, and none with
    two
    cores. The local ranks share the cores.
    """
    cores = max(1, (os.cpu_count() or 1) // local_world_size)
    if device.type == "cuda":
        return max(1, min(MAX_WORKERS, cores - 2))
    return 1 if cores > 2 else 0


def prefetch_items(
    dataset: Dataset[Item | UserError], indices: Iterable[int], num_workers: int, pin_memory: bool
) -> Iterator[Item]:
    """Iterate over dataset items in the given order, loaded by workers.

    The workers start immediately. A worker that dies is restarted with the next pending item.

    Args:
        dataset: Dataset; an item may be a UserError, which is raised.
        indices: Indices of the items.
        num_workers: Number of workers; 0 loads in this process.
        pin_memory: Whether to copy items to pinned memory.

    Raises:
        UserError: An item is an error.
        DataWorkerError: Workers died repeatedly at the same item.
    """
    # A range of any length takes no memory.
    index_list = indices if isinstance(indices, range) else list(indices)

    def iter_from(start: int) -> Iterator[Item | UserError]:
        return _start_workers(dataset, index_list[start:], num_workers, pin_memory)

    return _iter_items(iter_from, iter_from(0), num_workers)


def _start_workers(
    dataset: Dataset[Item | UserError], indices: Sequence[int], num_workers: int, pin_memory: bool
) -> Iterator[Item | UserError]:
    loader: DataLoader[Item | UserError] = DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=_identity_collate,
        pin_memory=pin_memory,
        prefetch_factor=2 if num_workers else None,
        # A fork starts in milliseconds without pickling; the workers never use CUDA.
        multiprocessing_context=("fork" if sys.platform == "linux" else "spawn")
        if num_workers
        else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    previous_handler = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # The handler of torch raises at any point of the training step when a worker dies. Without
        # it, the loader detects the death at the next item.
        signal.signal(signal.SIGCHLD, previous_handler or signal.SIG_DFL)
    return items


MAX_RESTARTS = 2
"""Restarts for one item, because the item may cause the crash."""


class DataWorkerError(UserError):
    """A data loader worker was killed or cannot continue, usually because of low memory."""


def _iter_items(
    iter_from: Callable[[int], Iterator[Item | UserError]],
    source: Iterator[Item | UserError],
    num_workers: int,
) -> Iterator[Item]:
    num_done = num_deaths = 0
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                return
            except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                if not num_workers or not _is_worker_death(error):
                    raise
                first = (str(error) or type(error).__name__).splitlines()[0]
                num_deaths += 1
                if num_deaths > MAX_RESTARTS:
                    raise DataWorkerError(
                        f"a data loader worker died {num_deaths} times at the same item: {first}",
                        where="train.num_workers",
                        expected="sufficient memory and shared memory (/dev/shm)",
                        remedy="lower train.num_workers, or set it to 0, and use --resume",
                    ) from error
                logging.getLogger(__name__).warning(
                    "a data loader worker died and is restarted: %s", first
                )
                item = None
            if item is None:
                # Outside the except block, which holds the last reference to the old workers.
                source = iter(())
                source = iter_from(num_done)
                continue
            num_done, num_deaths = num_done + 1, 0
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        # Drop the last reference, so that the workers end now.
        del source


def _is_worker_death(error: Exception) -> bool:
    """Check if the loader lost a worker; exceptions raised by a worker do not count."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid")
    return "in DataLoader worker process" not in text


def _identity_collate(item: Item) -> Item:
    return item


def _start_worker(worker: int) -> None:
    exit_with_parent()
    # Ctrl-C and SIGTERM of a shell reach the complete process group. The training process decides
    # when to stop, and then ends its workers.
    os.setsid()


def catch_user_error(fn: Callable[[], Item]) -> Item | UserError:
    """Return the result of a function, or the UserError that it raised.

    The loader would wrap an exception of a worker in its traceback; a value is transferred
    unchanged.
    """
    try:
        return fn()
    except UserError as error:
        return error
