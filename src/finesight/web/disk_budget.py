"""Limit on the disk space that all users of the chat page share."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from finesight.web.web_limits import MAX_STORED_BYTES, UPLOAD_TTL_S


class DiskFullError(Exception):
    """Raised when stored files would exceed the limit `MAX_STORED_BYTES`."""


class DiskBudget:
    """Limits the disk space of uploads and chats.

    Space is reserved before each write, so that concurrent writers respect the limit. Expired
    uploads are deleted.
    """

    def __init__(self, uploads: Path, conversations: Path) -> None:
        self._uploads, self._conversations = uploads, conversations
        self._reserved = 0
        self._lock = threading.Lock()

    def reserve(self, num_bytes: int) -> DiskReservation:
        """Reserve disk space before writing files.

        Raises:
            DiskFullError: The stored and reserved bytes would exceed the limit.
        """
        with self._lock:
            if self._count_stored_bytes() + self._reserved + num_bytes > MAX_STORED_BYTES:
                raise DiskFullError
            self._reserved += num_bytes
        return DiskReservation(self, num_bytes)

    def _free(self, num_bytes: int) -> None:
        with self._lock:
            self._reserved -= num_bytes

    def _count_stored_bytes(self) -> int:
        """Delete expired uploads, then count the bytes of all stored files."""
        min_mtime, total = time.time() - UPLOAD_TTL_S, 0
        for root in (self._uploads, self._conversations):
            for folder, _, names in os.walk(root):
                for file in (Path(folder, name) for name in names):
                    # Files of a closed session may disappear in the meantime.
                    with contextlib.suppress(FileNotFoundError):
                        state = file.stat()
                        if root == self._uploads and state.st_mtime < min_mtime:
                            file.unlink()
                        else:
                            total += state.st_size
        return total


class DiskReservation:
    """Reserved disk space. It is released at the end of a `with` block."""

    def __init__(self, budget: DiskBudget, num_bytes: int) -> None:
        self._budget, self._remaining = budget, num_bytes

    def write(self, num_bytes: int) -> None:
        """Reduce the reservation by bytes that have been written to files.

        Written files are counted by their size.
        """
        num_bytes = min(num_bytes, self._remaining)
        self._remaining -= num_bytes
        self._budget._free(num_bytes)

    def release(self) -> None:
        """Release the rest of the reservation."""
        self.write(self._remaining)

    def __enter__(self) -> DiskReservation:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()
