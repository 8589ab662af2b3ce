"""Many files at once, with a bar: all of them, or an error and a part to go on from."""

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

from finesight.remote.inside import inside
from finesight.remote.transfer import Advance, RemoteFile, Stopped, bring, refuse_full
from finesight.remote.web import Web

AT_ONCE = 4
"""Files on their way at the same time: data sets of many small ones would take hours otherwise."""


def download(files: Sequence[RemoteFile], folder: Path, web: Web, source: str) -> None:
    """Bring every file to its path below `folder`; those that are there are not asked for.

    `source` is what the user called it. Raises the first file's error, after the others on their
    way have stopped; what they received stays for the next attempt.
    """
    targets = [(file, inside(folder, file.path, source)) for file in files]
    missing = [(file, target) for file, target in targets if not target.exists()]
    if not missing:
        return
    needed = sum(file.size or 0 for file, _ in missing)
    refuse_full(folder, needed)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(
            f"{source}: {len(missing)} files to fetch, {needed:,} bytes",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    with _bar(console) as bar:
        known = all(file.size is not None for file, _ in missing)
        task = bar.add_task(source, total=needed if known else None)
        _all(missing, web, lambda count: bar.advance(task, count))


def _all(missing: Sequence[tuple[RemoteFile, Path]], web: Web, advance: Advance) -> None:
    stop = Event()
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="download") as threads:
        tasks = [threads.submit(bring, file, to, web, advance, stop) for file, to in missing]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            threads.shutdown(wait=True, cancel_futures=True)
    for problem in filter(None, map(_problem, tasks)):
        if not isinstance(problem, Stopped):
            raise problem


def _problem(task: Future[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()


def _bar(console: Console) -> Progress:
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
