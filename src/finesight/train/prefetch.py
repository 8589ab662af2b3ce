"""Load items in worker processes, in order, ahead of their use.

Worker processes are restarted when they are killed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from finesight.errors import UserError
from finesight.files.worker_pool import exit_with_parent

Item = TypeVar("Item")

MAX_WORKERS = 12
"""Maximum default number of workers per rank; more workers did not increase the throughput."""


def default_num_workers(device: torch.device, local_world_size: int = 1) -> int:
    """Return the default number of data loader workers of a rank.

    The local ranks share the CPU cores equally. With a GPU, the default is all but two of the
    rank's cores, between 1 and `MAX_WORKERS`. On a CPU, it is 1, or 0 with at most two cores.
    """
    cores = max(1, (os.cpu_count() or 1) // local_world_size)
    if device.type == "cuda":
        return max(1, min(MAX_WORKERS, cores - 2))
    return 1 if cores > 2 else 0


def prefetch_items(
    load_item: Callable[[int], Item], indices: Sequence[int], num_workers: int, pin_memory: bool
) -> Generator[Item, None, None]:
    """Iterate over items in the given order, loaded by worker processes.

    The workers start immediately. If a worker is killed, all workers are restarted at the next
    pending item.

    Args:
        load_item: Function from an index to an item; must be picklable.
        num_workers: Number of worker processes; 0 loads in this process.
        pin_memory: Whether to copy items to pinned memory.

    Raises:
        UserError: An item cannot be loaded.
        DataWorkerError: Workers were killed repeatedly at the same item.
    """

    start_method = None
    if num_workers:
        # A fork starts in milliseconds without pickling; the workers never use CUDA.
        start_method = "fork" if sys.platform == "linux" else "spawn"

    def start_workers(start: int) -> Iterator[Item | UserError]:
        dataset: Any = indices[start:]  # PyTorch requires only __getitem__ and __len__
        loader: DataLoader[Item | UserError] = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=partial(catch_user_error, load_item),
            pin_memory=pin_memory,
            prefetch_factor=2 if num_workers else None,
            multiprocessing_context=start_method,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),
        )
        previous_handler = signal.getsignal(signal.SIGCHLD)
        items = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # The handler of torch raises at any point of the training step when a worker dies.
            # Without it, the loader detects the death at the next item.
            signal.signal(signal.SIGCHLD, previous_handler or signal.SIG_DFL)
        return items

    return _iter_items(start_workers, start_workers(0), num_workers)


MAX_RESTARTS = 2
"""Maximum number of worker restarts at one item, which may itself cause the crash."""


class DataWorkerError(UserError):
    """Raised when a data loader worker was killed or lacks memory, usually shared memory."""


def _iter_items(
    iter_from: Callable[[int], Iterator[Item | UserError]],
    source: Iterator[Item | UserError],
    num_workers: int,
) -> Generator[Item, None, None]:
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
                # Outside the except block, because the error keeps the old workers alive.
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
    """Return whether a worker process was killed, as opposed to an exception raised in it."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid")
    return "in DataLoader worker process" not in text


def _start_worker(worker: int) -> None:
    exit_with_parent()
    # Ctrl-C and SIGTERM of a shell reach the complete process group. The training process decides
    # when to stop, and then ends its workers.
    os.setsid()


def catch_user_error(load_item: Callable[[int], Item], index: int) -> Item | UserError:
    """Load an item, and return it or the `UserError` that was raised.

    PyTorch's data loader wraps an exception of a worker in its traceback. Returned as a value, the
    error reaches the main process unchanged.
    """
    try:
        return load_item(index)
    except UserError as error:
        return error
