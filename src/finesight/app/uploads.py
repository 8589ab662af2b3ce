"""Uploaded files, and the disk space of all files of the pages."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from typing import IO

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from finesight.errors import UserError

MAX_STORED_BYTES = 2 << 30
"""Maximum size of the stored files of all users in bytes."""

UPLOAD_TTL_S, MIN_UPLOAD_TTL_S = 3600, 300
"""Seconds after which an uploaded file is deleted, with enough space and if space is short.

Data sets take over the files that they use.
"""

MAX_OWNER_BYTES = MAX_STORED_BYTES // 4
"""Maximum size of the stored files of an owner, who so leaves space to others."""

MAX_NAME_BYTES = 200
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class DiskFullError(HTTPException):
    """Raised when stored files would exceed a limit, or the disk is full."""

    def __init__(self) -> None:
        text = "The server has no disk space for more files. Delete some, or try again later."
        super().__init__(507, text)


class DiskBudget:
    """Limits the disk space of the files in the subfolders of a folder.

    A file has its size before it is written, so that concurrent writers respect the limit.

    Args:
        free_space: Deletes unused files, or returns False if there are none.
    """

    def __init__(self, folder: Path, free_space: Callable[[], bool]) -> None:
        self._folder, self._free_space = folder, free_space
        self._lock = threading.Lock()

    def allocate(
        self, num_bytes: int, open_file: Callable[[], IO[bytes]], owner: str = ""
    ) -> IO[bytes]:
        """Open a new file with a number of bytes, which its writer replaces.

        Args:
            owner: Start of the names of the subfolders of a user, with a limit of its own.

        Raises:
            DiskFullError: The stored bytes would exceed a limit.
        """
        with self._lock:
            while self._count_bytes() + num_bytes > MAX_STORED_BYTES:
                if not self._free_space():
                    raise DiskFullError
            if owner and self._count_bytes(owner) + num_bytes > MAX_OWNER_BYTES:
                raise DiskFullError
            file = open_file()
            file.truncate(num_bytes)
        return file

    def _count_bytes(self, owner: str = "") -> int:
        files = _iter_files(self._folder)
        return sum(state.st_size for file, state in files if file.parent.name.startswith(owner))


def _iter_files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, _, names in os.walk(root):
        for file in (Path(folder, name) for name in names):
            # Files of a closed chat may disappear in the meantime.
            with contextlib.suppress(FileNotFoundError):
                yield file, file.stat()


async def receive_file(
    request: Request,
    folder: Path,
    budget: DiskBudget,
    max_bytes: int,
    *,
    prefix: str = "",
    owner: str = "",
) -> Path:
    """Store the body of a request in a folder. The query has the name of the file.

    Args:
        max_bytes: Maximum size of the file. The access middleware checks it first.
        prefix: Start of the name of the stored file.
        owner: See `DiskBudget.allocate`.
    """
    size = int(request.headers.get("content-length", max_bytes))
    name = _CONTROL_CHARACTERS.sub("", request.query_params.get("name", ""))
    name = name.replace("\\", "/").rpartition("/")[2].strip(". ")
    suffix = Path(name).suffix[:20]
    stem = name.removesuffix(suffix).encode()[: MAX_NAME_BYTES - len(suffix.encode())]
    path = folder / (prefix + ((stem.decode(errors="ignore") + suffix) or "file"))
    try:
        # In a thread, because all files are counted.
        allocate = partial(budget.allocate, size, lambda: path.open("xb"), owner)
        with await to_thread.run_sync(allocate) as file:
            async for chunk in request.stream():
                await to_thread.run_sync(file.write, chunk)
            file.truncate()
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
            raise DiskFullError from error
        raise
    return path


class UploadStore:
    """Uploaded files, each in a folder with a secret name, which is its ID.

    Args:
        max_bytes: See `receive_file`.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._budget = DiskBudget(folder, partial(self._expire, MIN_UPLOAD_TTL_S))

    def _expire(self, max_age_s: float) -> bool:
        """Delete the uploads beyond an age. Returns whether there are any."""
        min_mtime, files = time.time() - max_age_s, _iter_files(self._folder)
        old = [file.parent.name for file, state in files if state.st_mtime < min_mtime]
        self.remove(old)
        return bool(old)

    async def receive(self, request: Request) -> Response:
        """Store the body of a request, whose query has the name of the file. Return its ID."""
        await to_thread.run_sync(self._expire, UPLOAD_TTL_S)
        folder = self._folder / secrets.token_urlsafe(24)
        try:
            folder.mkdir(mode=0o700)
            file = await receive_file(request, folder, self._budget, self._max_bytes)
        except BaseException:
            self.remove([folder.name])
            raise
        return JSONResponse({"id": folder.name, "name": file.name})

    def find(self, upload_id: str) -> Path:
        """Return the file of an upload. Raises UserError for an unknown or expired ID."""
        with contextlib.suppress(OSError, StopIteration):
            if re.fullmatch(r"[\w-]{32}", upload_id):
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
