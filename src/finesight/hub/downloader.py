"""Parallel download of several files with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from finesight.hub.http_client import HttpClient
from finesight.hub.safe_path import safe_join
from finesight.hub.transfer import (
    DownloadCancelled,
    ProgressCallback,
    RemoteFile,
    download_file,
    require_free_space,
)

MAX_PARALLEL_DOWNLOADS = 4
"""Number of files that are downloaded in parallel.

Data sets may consist of many small files.
"""


def download_files(
    files: Sequence[RemoteFile], folder: Path, http_client: HttpClient, source: str
) -> None:
    """Download files in parallel, except those that exist in the target folder.

    After an error, the other downloads are stopped. Partial files remain, so that the next attempt
    resumes them.

    Args:
        files: Files to download.
        folder: Target folder.
        http_client: HTTP client of the site.
        source: Address as the user wrote it, for messages.

    Raises:
        UserError: A download fails, or the disk has too little free space.
    """
    targets = [(file, safe_join(folder, file.path, source)) for file in files]
    missing = [(file, target) for file, target in targets if not target.exists()]
    if not missing:
        return
    total_bytes = sum(file.size or 0 for file, _ in missing)
    require_free_space(folder, total_bytes)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(
            f"{source}: downloading {len(missing)} files, {total_bytes:,} bytes",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    with _build_progress_bar(console) as progress:
        has_sizes = all(file.size is not None for file, _ in missing)
        task_id = progress.add_task(source, total=total_bytes if has_sizes else None)
        _download_all(missing, http_client, lambda num_bytes: progress.advance(task_id, num_bytes))


def _download_all(
    missing: Sequence[tuple[RemoteFile, Path]],
    http_client: HttpClient,
    on_progress: ProgressCallback,
) -> None:
    stop_event = Event()
    with ThreadPoolExecutor(MAX_PARALLEL_DOWNLOADS, thread_name_prefix="download") as executor:
        futures = [
            executor.submit(download_file, file, target, http_client, on_progress, stop_event)
            for file, target in missing
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop_event.set()
            executor.shutdown(wait=True, cancel_futures=True)
    for error in filter(None, map(_get_exception, futures)):
        if not isinstance(error, DownloadCancelled):
            raise error


def _get_exception(future: Future[None]) -> BaseException | None:
    return None if future.cancelled() else future.exception()


def _build_progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
