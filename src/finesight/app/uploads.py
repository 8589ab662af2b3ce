"""Uploaded files, and the disk space of all files of the pages."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from finesight.errors import UserError

MAX_STORED_BYTES = 2 << 30
"""Maximum size of the stored files of all users in bytes, including reserved space."""

UPLOAD_TTL_S, MIN_UPLOAD_TTL_S = 3600, 300
"""Seconds after which an uploaded file is deleted, with enough space and if space is short.

Chats and data sets take over the files that they use.
"""

MAX_OWNER_BYTES = MAX_STORED_BYTES // 4
"""Maximum size of the stored files of an owner, who so leaves space to others."""

MAX_NAME_BYTES = 200
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class DiskFullError(Exception):
    """Raised when stored files would exceed the limit `MAX_STORED_BYTES`."""


class DiskBudget:
    """Limits the disk space of uploads and of the folders that take them over.

    Space is reserved before each write, so that concurrent writers respect the limit. Expired
    uploads are deleted.
    """

    def __init__(self, uploads: Path, *others: Path) -> None:
        self._uploads, self._others = uploads, others
        self._reserved = Counter[str]()
        self.free_space: Callable[[int], bool] = lambda num_bytes: False
        """Deletes unused files of a number of bytes, or returns False without deleting any."""
        self._lock = threading.Lock()

    def reserve(self, num_bytes: int, owner: str = "") -> DiskReservation:
        """Reserve disk space before writing files.

        Args:
            owner: Start of the names of the folders of a user, with a limit of its own.

        Raises:
            DiskFullError: The stored and reserved bytes would exceed a limit.
        """
        with self._lock:
            limit, max_age_s = MAX_STORED_BYTES - num_bytes, UPLOAD_TTL_S
            while (excess := self._count_bytes(max_age_s) + self._reserved.total() - limit) > 0:
                if max_age_s == UPLOAD_TTL_S:
                    max_age_s = MIN_UPLOAD_TTL_S
                elif not self.free_space(excess):
                    raise DiskFullError
            own = self._count_bytes(max_age_s, owner) + self._reserved[owner]
            if owner and own + num_bytes > MAX_OWNER_BYTES:
                raise DiskFullError
            self._reserved[owner] += num_bytes
        return DiskReservation(self, num_bytes, owner)

    def free(self, num_bytes: int, owner: str) -> None:
        """Release reserved bytes of an owner."""
        with self._lock:
            self._reserved[owner] -= num_bytes

    def _count_bytes(self, max_age_s: float, owner: str = "") -> int:
        """Delete uploads beyond an age, then count the bytes of all stored files of an owner."""
        min_mtime, total = time.time() - max_age_s, 0
        for root in (self._uploads, *self._others):
            for file, state in _iter_files(root):
                if root == self._uploads and state.st_mtime < min_mtime:
                    shutil.rmtree(file.parent, ignore_errors=True)
                elif file.relative_to(root).parts[0].startswith(owner):
                    total += state.st_size
        return total


def _iter_files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, _, names in os.walk(root):
        for file in (Path(folder, name) for name in names):
            # Files of a closed chat may disappear in the meantime.
            with contextlib.suppress(FileNotFoundError):
                yield file, file.stat()


@dataclass(slots=True)
class DiskReservation(contextlib.AbstractContextManager["DiskReservation"]):
    """Reserved disk space. It is released at the end of a `with` block."""

    budget: DiskBudget
    remaining: int
    owner: str = ""

    def write(self, num_bytes: int) -> None:
        """Reduce the reservation by bytes of files, which are counted by their size."""
        num_bytes = min(num_bytes, self.remaining)
        self.remaining -= num_bytes
        self.budget.free(num_bytes, self.owner)

    def release(self) -> None:
        """Release the rest of the reservation."""
        self.write(self.remaining)

    def __exit__(self, *raised: object) -> None:
        self.release()


class UploadStore:
    """Uploaded files, each in a folder with a secret name, which is its ID.

    Args:
        max_bytes: Maximum size of a file. The access middleware checks it first.
        find_owner: Returns the owner of the uploads of a request; empty for one without a limit.
    """

    def __init__(
        self,
        folder: Path,
        budget: DiskBudget,
        max_bytes: int,
        find_owner: Callable[[Request], str] = lambda request: "",
    ) -> None:
        self._folder, self._budget, self._max_bytes = folder, budget, max_bytes
        self._find_owner = find_owner

    async def receive(self, request: Request) -> Response:
        """Store the body of a request, whose query has the name of the file. Return its ID."""
        size = int(request.headers.get("content-length", self._max_bytes))
        name = _CONTROL_CHARACTERS.sub("", request.query_params.get("name", ""))
        name = name.replace("\\", "/").rpartition("/")[2].strip(". ")
        suffix = Path(name).suffix[:20]
        stem = name.removesuffix(suffix).encode()[: MAX_NAME_BYTES - len(suffix.encode())]
        owner, name = self._find_owner(request), (stem.decode(errors="ignore") + suffix) or "file"
        upload_id = owner + secrets.token_urlsafe(24)
        folder = self._folder / upload_id
        try:
            folder.mkdir(mode=0o700)
            # In a thread, because all files are counted.
            reservation = await to_thread.run_sync(self._budget.reserve, size, owner)
            with reservation, (folder / name).open("wb") as file:
                async for chunk in request.stream():
                    await to_thread.run_sync(file.write, chunk)
                    reservation.write(len(chunk))
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            is_full = isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT)
            if not is_full and not isinstance(error, DiskFullError):
                raise
            raise HTTPException(507, "no disk space for more files") from error
        return JSONResponse({"id": upload_id, "name": name})

    def find(self, upload_id: str) -> Path:
        """Return the file of an upload. Raises UserError for an unknown or expired ID."""
        with contextlib.suppress(OSError, StopIteration):
            if re.fullmatch(r"[\w-]{32,40}", upload_id):
                return next((self._folder / upload_id).iterdir())
        raise UserError(
            "an uploaded file has expired",
            where="files",
            expected=f"files uploaded within {UPLOAD_TTL_S // 60} minutes",
            remedy="add the file again",
        )

    def remove(self, upload_ids: Iterable[str]) -> None:
        """Delete the files of uploads that `find` has returned."""
        for upload_id in upload_ids:
            shutil.rmtree(self._folder / upload_id, ignore_errors=True)
