"""Chat sessions of the chat page, each with a private folder, and their limits."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from finesight.data.sample import write_samples
from finesight.errors import UserError
from finesight.infer.chat_session import ChatSession
from finesight.infer.inference_service import InferenceService
from finesight.vision.image_processing import load_image
from finesight.web.chat_html import ENGLISH, UiText

MAX_IMAGE_BYTES = 20 << 20

MAX_STORED_BYTES = 2 << 30
"""Maximum size of the stored files of all users in bytes, including reserved space."""

UPLOAD_TTL_S = 3600
"""Seconds after which an uploaded file is deleted.

Chats contain copies of the images that they use.
"""

MAX_IMAGES_PER_MESSAGE = 8
MAX_IMAGES_PER_CHAT = 64
MAX_MESSAGE_CHARS = 20_000
MAX_SESSIONS = 64
"""Maximum number of chat sessions. A new session replaces the least recently used one."""

MAX_NEW_TOKENS = 4096

MAX_TEMPERATURE = 2.0

MAX_DISPLAY_SIDE = 1600
"""Maximum width and height of an image that the browser receives, in pixels."""

MAX_DISPLAY_BYTES = 4 << 20


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

    def free(self, num_bytes: int) -> None:
        """Release reserved bytes."""
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


@dataclass(slots=True)
class DiskReservation(contextlib.AbstractContextManager["DiskReservation"]):
    """Reserved disk space. It is released at the end of a `with` block."""

    budget: DiskBudget
    remaining: int

    def write(self, num_bytes: int) -> None:
        """Reduce the reservation by bytes of files, which are counted by their size."""
        num_bytes = min(num_bytes, self.remaining)
        self.remaining -= num_bytes
        self.budget.free(num_bytes)

    def release(self) -> None:
        """Release the rest of the reservation."""
        self.write(self.remaining)

    def __exit__(self, *raised: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class ChatImage:
    """Image of a chat session.

    Attributes:
        number: Number of the image in the session, from 1.
        display_path: Copy without metadata that the browser receives. It may be smaller.
    """

    name: str
    number: int
    width: int
    height: int
    display_path: Path


@dataclass(slots=True)
class WebSession:
    """Chat session of one browser tab, with a private folder.

    Attributes:
        token: Secret part of the URLs of its images and its export.
    """

    chat: ChatSession
    folder: Path
    budget: DiskBudget
    ui_text: UiText = ENGLISH
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    images: dict[Path, ChatImage] = field(default_factory=dict)
    _upload_lock: threading.Lock = field(default_factory=threading.Lock)

    def add_uploads(self, text: str, uploads: Sequence[Path]) -> list[Path]:
        """Validate a message and copy its uploaded images into the session. Return the copies."""
        num_images = len(self.images) + len(uploads)
        if len(uploads) > MAX_IMAGES_PER_MESSAGE or num_images > MAX_IMAGES_PER_CHAT:
            message = self.ui_text.too_many_images.format(
                len(uploads), MAX_IMAGES_PER_MESSAGE, MAX_IMAGES_PER_CHAT
            )
            raise UserError(message)
        if len(text) > MAX_MESSAGE_CHARS:
            raise UserError(self.ui_text.message_too_long.format(len(text), MAX_MESSAGE_CHARS))
        size = sum(path.stat().st_size for path in uploads if path.exists())
        try:
            reservation = self.budget.reserve(size + MAX_DISPLAY_BYTES * len(uploads))
        except DiskFullError as error:
            raise UserError(self.ui_text.disk_full) from error
        image_paths: list[Path] = []
        try:
            # The lock prevents duplicate image IDs.
            with reservation, self._upload_lock:
                for upload in uploads:
                    image_paths.append(self._save_upload(upload))
        except BaseException:
            self.remove_images(image_paths)
            raise
        return image_paths

    def remove_images(self, image_paths: Sequence[Path]) -> None:
        """Delete those of the given images that no turn of the conversation uses."""
        in_use = {path for turn in self.chat.turns for path in turn.image_paths}
        for path in set(image_paths) - in_use:
            self.images.pop(path).display_path.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def export_archive(self) -> IO[bytes]:
        """Export the conversation and its images as a zip archive in the sample format.

        The archive is an anonymous temporary file, which is deleted when it is closed.
        """
        archive_names = {
            path: f"images/{image.number}-{path.name.partition('-')[2]}"
            for path, image in self.images.items()
        }
        samples = self.chat.to_samples(lambda path: archive_names[path])
        if not samples:
            raise UserError(f"chat is empty: {len(self.chat.turns)} turns, none with an answer")
        jsonl_path = self.folder / "chat.jsonl"
        write_samples(jsonl_path, samples)
        try:
            size = sum(path.stat().st_size for path in (jsonl_path, *archive_names))
            reservation = self.budget.reserve(size)
        except DiskFullError as error:
            raise UserError(self.ui_text.disk_full) from error
        with contextlib.ExitStack() as on_failure:
            on_failure.enter_context(reservation)
            archive = on_failure.enter_context(tempfile.TemporaryFile(dir=self.folder))
            with zipfile.ZipFile(archive, "w") as file:
                file.write(jsonl_path, "chat/chat.jsonl")
                for path, name in archive_names.items():
                    file.write(path, f"chat/{name}")
            archive.seek(0)
            on_failure.pop_all()
        # The budget cannot count an anonymous file, so its reservation lasts until it is closed.
        weakref.finalize(archive, reservation.release)
        return archive

    def _save_upload(self, upload: Path) -> Path:
        number = 1 + max((existing.number for existing in self.images.values()), default=0)
        image = load_image(upload)
        width, height = image.size
        image.thumbnail((MAX_DISPLAY_SIDE, MAX_DISPLAY_SIDE))
        display_path = self.folder / f"display-{number}.webp"
        image.save(display_path, format="WEBP", quality=90)
        image_path = self.folder / f"{number}-{upload.name[-80:]}"
        shutil.copyfile(upload, image_path)
        self.images[image_path] = ChatImage(upload.name, number, width, height, display_path)
        return image_path


class WebSessionStore:
    """Stores chat sessions by Gradio session ID.

    If there are too many sessions, the least recently used one is closed.
    """

    def __init__(self, service: InferenceService, folder: Path, budget: DiskBudget) -> None:
        self.service, self._folder, self.budget = service, folder, budget
        self._sessions: dict[str, WebSession] = {}
        # Events of one session may run in several threads.
        self._lock = threading.RLock()

    def get_or_create(self, session_id: str) -> WebSession:
        """Return the chat session of a Gradio session ID. It is created on first use."""
        with self._lock:
            web_session = self._sessions.pop(session_id, None)
            if web_session is None:
                while len(self._sessions) >= MAX_SESSIONS:
                    self.close(next(iter(self._sessions)))
                folder = self._folder / secrets.token_hex(16)
                folder.mkdir()
                web_session = WebSession(ChatSession(self.service), folder, self.budget)
            self._sessions[session_id] = web_session
        return web_session

    def close(self, session_id: str) -> None:
        """Close a chat session: cancel its generations and delete its files."""
        with self._lock:
            web_session = self._sessions.pop(session_id, None)
        if web_session is not None:
            while web_session.chat.undo():
                pass
            shutil.rmtree(web_session.folder, ignore_errors=True)

    def list_sessions(self) -> list[WebSession]:
        """Return all chat sessions, least recently used first."""
        with self._lock:
            return [*self._sessions.values()]

    def find_by_token(self, token: str) -> WebSession | None:
        """Return the chat session with a secret token, or None if there is none.

        Tokens are compared in constant time.
        """
        given = token.encode()
        matching = (
            session
            for session in self.list_sessions()
            if secrets.compare_digest(session.token.encode(), given)
        )
        return next(matching, None)
