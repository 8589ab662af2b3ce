"""Files that clients upload, kept in a private folder while the server runs."""

from __future__ import annotations

import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finesight.serve.errors import Refused
from finesight.serve.limits import Limits

PURPOSE = "vision"
PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Upload:
    """An uploaded file: its name is what the client said and no path here."""

    id: str
    owner: str
    name: str
    size: int
    made: int
    path: Path

    def as_json(self) -> dict[str, Any]:
        """The file as OpenAI's interface has it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.made,
            "filename": self.name,
            "purpose": PURPOSE,
            "status": "processed",
        }


class Store:
    """Files by their ids; each key sees its own alone."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder, self._limits = folder, limits
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700)

    def add(self, owner: str, name: str, source: BinaryIO) -> Upload:
        """Keep what `source` holds. Raises Refused for too much."""
        made = f"file-{secrets.token_hex(16)}"
        path = self._folder / made
        try:
            size = self._copy(source, path)
            upload = Upload(made, owner, name[:255], size, int(time.time()), path)
            with self._lock:
                held = sum(other.size for other in self._uploads.values())
                if len(self._uploads) >= self._limits.files or (
                    held + size > self._limits.files_bytes
                ):
                    raise Refused(
                        413,
                        f"{len(self._uploads)} files of {held} bytes are kept, and"
                        f" {self._limits.files} of {self._limits.files_bytes} may be: delete some",
                        "file",
                    )
                self._uploads[made] = upload
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return upload

    def listed(self, owner: str) -> list[Upload]:
        """The files of one key, the newest first."""
        with self._lock:
            mine = [upload for upload in self._uploads.values() if upload.owner == owner]
        return mine[::-1]

    def get(self, owner: str, name: str) -> Upload:
        """A file by its id. Raises Refused for one that is not there, or another key's."""
        with self._lock:
            upload = self._uploads.get(name)
        if upload is None or upload.owner != owner:
            raise Refused(404, f"no file {name[:64]!r}", "file_id")
        return upload

    def link(self, owner: str, name: str, target: Path) -> None:
        """Give a file a further name, which stays when it is deleted."""
        upload = self.get(owner, name)
        try:
            os.link(upload.path, target)
        except FileNotFoundError as error:
            raise Refused(404, f"no file {name[:64]!r} any more", "file_id") from error

    def delete(self, owner: str, name: str) -> None:
        """Forget a file. Raises Refused as `get` does."""
        upload = self.get(owner, name)
        with self._lock:
            self._uploads.pop(name, None)
        upload.path.unlink(missing_ok=True)

    def _copy(self, source: BinaryIO, path: Path) -> int:
        size = 0
        with open(path, "xb") as file:
            while piece := source.read(PIECE):
                size += len(piece)
                if size > self._limits.picture_bytes:
                    raise Refused(
                        413,
                        f"a file of more than {self._limits.picture_bytes} bytes",
                        "file",
                    )
                file.write(piece)
        return size
