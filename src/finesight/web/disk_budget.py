"""Limit the disk space that all visitors of the page take together."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from finesight.web.limits import FOLDER_BYTES, UPLOAD_SECONDS


class DiskFull(Exception):
    """The files of all visitors would take more than `FOLDER_BYTES`."""


class DiskBudget:
    """Reserve disk space before it is written, so that concurrent writers keep the limit.

    Counts the files of uploads and conversations, and what is reserved and not written yet.
    Uploads that nobody has asked about for `UPLOAD_SECONDS` are removed.
    """

    def __init__(self, uploads: Path, conversations: Path) -> None:
        self._uploads, self._conversations = uploads, conversations
        self._reserved = 0
        self._lock = threading.Lock()

    def reserve(self, size: int) -> Reservation:
        """Reserve `size` bytes. Raises DiskFull."""
        with self._lock:
            if self._written() + self._reserved + size > FOLDER_BYTES:
                raise DiskFull
            self._reserved += size
        return Reservation(self, size)

    def _free(self, size: int) -> None:
        with self._lock:
            self._reserved -= size

    def _written(self) -> int:
        """Count the bytes of all files, after old uploads are removed."""
        oldest, total = time.time() - UPLOAD_SECONDS, 0
        for root in (self._uploads, self._conversations):
            for folder, _, names in os.walk(root):
                for file in (Path(folder, name) for name in names):
                    # A visitor who leaves takes files along meanwhile.
                    with contextlib.suppress(FileNotFoundError):
                        state = file.stat()
                        if root == self._uploads and state.st_mtime < oldest:
                            file.unlink()
                        else:
                            total += state.st_size
        return total


class Reservation:
    """Disk space that is about to be written. Release it when the files are there."""

    def __init__(self, budget: DiskBudget, size: int) -> None:
        self._budget, self._left = budget, size

    def write(self, size: int) -> None:
        """Count bytes that are on the disk from now on, as part of a file."""
        size = min(size, self._left)
        self._left -= size
        self._budget._free(size)

    def release(self) -> None:
        """Give up what is left."""
        self.write(self._left)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()
