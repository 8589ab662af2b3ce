"""Storage of files that clients upload, in a private folder while the server runs."""

from __future__ import annotations

import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finesight.serve.api_errors import ApiError
from finesight.serve.server_limits import ServerLimits

FILE_PURPOSE = "vision"
CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """File that a client has uploaded.

    Attributes:
        id: ID of the file.
        owner: Owner name of the API key.
        filename: Name from the client. It is never used as a path.
        num_bytes: Size of the file.
        created_at: Unix time of the upload.
        path: Path in the file store.
    """

    id: str
    owner: str
    filename: str
    num_bytes: int
    created_at: int
    path: Path

    def as_json(self) -> dict[str, Any]:
        """Return the file object of the OpenAI API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": FILE_PURPOSE,
            "status": "processed",
        }


class FileStore:
    """Stores uploaded files by ID. An API key has access to its own files only."""

    def __init__(self, folder: Path, limits: ServerLimits) -> None:
        self._folder, self._limits = folder, limits
        self._uploads: dict[str, UploadedFile] = {}
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700)

    def add(self, owner: str, filename: str, source: BinaryIO) -> UploadedFile:
        """Store a file that a client uploads.

        Args:
            owner: Owner name of the API key.
            filename: Name from the client.
            source: Content of the file.

        Raises:
            ApiError: The file or the store exceeds a limit.
        """
        file_id = f"file-{secrets.token_hex(16)}"
        path = self._folder / file_id
        try:
            num_bytes = self._copy_file(source, path)
            upload = UploadedFile(file_id, owner, filename[:255], num_bytes, int(time.time()), path)
            with self._lock:
                total_bytes = sum(other.num_bytes for other in self._uploads.values())
                if len(self._uploads) >= self._limits.max_files or (
                    total_bytes + num_bytes > self._limits.max_total_file_bytes
                ):
                    raise ApiError(
                        413,
                        f"file storage is full: {len(self._uploads)} files, {total_bytes} bytes."
                        f" Expected at most {self._limits.max_files} files with"
                        f" {self._limits.max_total_file_bytes} bytes. Delete files.",
                        "file",
                    )
                self._uploads[file_id] = upload
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return upload

    def list_files(self, owner: str) -> list[UploadedFile]:
        """Return the files of an owner, newest first."""
        with self._lock:
            owned = [upload for upload in self._uploads.values() if upload.owner == owner]
        return owned[::-1]

    def get(self, owner: str, file_id: str) -> UploadedFile:
        """Return an uploaded file by its ID.

        Raises:
            ApiError: The file does not exist or has another owner.
        """
        with self._lock:
            upload = self._uploads.get(file_id)
        if upload is None or upload.owner != owner:
            raise ApiError(404, f"no file {file_id[:64]!r}", "file_id")
        return upload

    def link(self, owner: str, file_id: str, target: Path) -> None:
        """Create a hard link to an uploaded file at `target`.

        The link remains valid if the client deletes the file during its request.

        Raises:
            ApiError: The file does not exist or has another owner.
        """
        upload = self.get(owner, file_id)
        try:
            os.link(upload.path, target)
        except FileNotFoundError as error:
            raise ApiError(404, f"file {file_id[:64]!r} was deleted", "file_id") from error

    def delete(self, owner: str, file_id: str) -> None:
        """Delete an uploaded file.

        Raises:
            ApiError: The file does not exist or has another owner.
        """
        upload = self.get(owner, file_id)
        with self._lock:
            self._uploads.pop(file_id, None)
        upload.path.unlink(missing_ok=True)

    def _copy_file(self, source: BinaryIO, path: Path) -> int:
        num_bytes = 0
        with open(path, "xb") as file:
            while chunk := source.read(CHUNK_BYTES):
                num_bytes += len(chunk)
                if num_bytes > self._limits.max_image_bytes:
                    raise ApiError(
                        413,
                        f"file is too large: expected at most {self._limits.max_image_bytes} bytes",
                        "file",
                    )
                file.write(chunk)
        return num_bytes
