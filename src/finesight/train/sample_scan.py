"""Scan all samples of a corpus in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial

from finesight.errors import UserError
from finesight.progress import ProgressCallback
from finesight.train.prefetch import Item, catch_user_error, prefetch_items

SCAN_CHUNK_SIZE = 32
"""Number of samples per item of a scan, loaded by one data loader worker."""

MIN_WORKER_CHUNKS = 2
"""Minimum number of items per worker. Starting a worker takes as long as reading one."""


def scan_samples(
    scan_sample: Callable[[int], Item],
    indices: Sequence[int],
    num_workers: int,
    on_progress: ProgressCallback | None = None,
) -> Generator[Item | UserError, None, None]:
    """Iterate over the results of a function for samples, in order; errors are results as well.

    Args:
        scan_sample: Function from a corpus index to a result; must be picklable.
        num_workers: Maximum number of worker processes.
        on_progress: Callback for the number of newly scanned samples.
    """
    starts = range(0, len(indices), SCAN_CHUNK_SIZE)
    scan_chunk = partial(_scan_chunk, scan_sample, indices)
    num_workers = min(num_workers, len(starts) // MIN_WORKER_CHUNKS)
    for chunk in prefetch_items(scan_chunk, starts, num_workers, pin_memory=False):
        yield from chunk
        if on_progress is not None:
            on_progress(len(chunk))


def _scan_chunk(
    scan_sample: Callable[[int], Item], indices: Sequence[int], start: int
) -> list[Item | UserError]:
    chunk = indices[start : start + SCAN_CHUNK_SIZE]
    return [catch_user_error(scan_sample, index) for index in chunk]
