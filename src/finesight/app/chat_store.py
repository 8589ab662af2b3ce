"""Conversations of the chat page, each with a private folder, and their limits.

A conversation belongs to one browser, which a cookie identifies, and is kept until it is deleted,
replaced or the server stops. Without cookies, its secret token gives access.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shutil
import tempfile
import threading
import time
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated

from pydantic import BaseModel, Field, FiniteFloat
from starlette.requests import Request

from finesight.app.pages import Utf8Text
from finesight.app.uploads import DiskBudget, DiskFullError, DiskReservation, UploadStore
from finesight.data.image_header import get_file, split_page
from finesight.data.sample import write_samples
from finesight.errors import UserError
from finesight.infer.chat_session import ChatSession, ChatTurn
from finesight.infer.inference_service import InferenceService
from finesight.report.i18n import translate
from finesight.vision.image_reader import ImageReader
from finesight.worker_pool import WorkerPool

MAX_FILE_BYTES = 100 << 20
"""Maximum size of an uploaded image or video in bytes."""

MAX_IMAGES_PER_MESSAGE = 8
MAX_IMAGES_PER_CHAT = 64
MAX_MESSAGE_CHARS = 20_000
MAX_CHATS, MAX_CHATS_PER_BROWSER = 256, 30
"""Maximum numbers of conversations. A new one replaces the least recently used one."""

SHOWN_S = 150
"""Seconds since the last request for a conversation, in which a tab is assumed to show it.

Tabs request their conversation every minute.
"""

MAX_TITLE_CHARS = 80

MAX_NEW_TOKENS = 4096

MAX_TEMPERATURE, MAX_TOP_K, MAX_REPETITION_PENALTY = 2, 1000, 2
MAX_SEED = 2**53 - 1
"""Largest integer that browsers represent exactly."""

MAX_DISPLAY_SIDE = 1600
"""Maximum width and height of an image that the browser receives, in pixels."""

MAX_DISPLAY_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ChatImage:
    """Image or video of a conversation.

    Attributes:
        number: Number of the image in the conversation, from 1.
        display_path: Copy without metadata that the browser receives. It may be smaller. That of a
            video is its first frame.
    """

    name: str
    number: int
    width: int
    height: int
    display_path: Path


class ChatSettings(BaseModel, frozen=True, extra="forbid"):
    """Settings of the chat page for the next answers.

    Attributes:
        compare: Name of another model that answers, too; empty for none.
        seed: Random seed; -1 for another one in each answer.
        system_prompt: System prompt; empty for that of the model or run.
    """

    compare: Annotated[Utf8Text, Field(max_length=1000)] = ""
    thinking: bool = False
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]
    temperature: Annotated[FiniteFloat, Field(ge=0, le=MAX_TEMPERATURE)] = 0
    top_p: Annotated[FiniteFloat, Field(ge=0.01, le=1)] = 1
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] = 0
    repetition_penalty: Annotated[FiniteFloat, Field(ge=1, le=MAX_REPETITION_PENALTY)] = 1
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = -1
    system_prompt: Annotated[Utf8Text, Field(max_length=MAX_MESSAGE_CHARS)] = ""


@dataclass(slots=True, eq=False)
class StoredChat:
    """Conversation of a browser, with a private folder.

    Attributes:
        browser_id: Secret ID of the browser; None without cookies.
        token: Secret part of its URLs.
        settings: Settings of the last answer; None before the first one.
        error: Error of the last answer, or an empty text.
        num_streams: Number of tabs that receive the answer that is being generated.
        revision: Number of changes of the conversation.
        changed_at: Time of the last change on the monotonic clock.
        used_at: Time of the last request on the monotonic clock.
    """

    session: ChatSession
    folder: Path
    browser_id: str | None
    budget: DiskBudget
    reader: ImageReader
    uploads: UploadStore
    settings: ChatSettings | None = None
    is_generating: bool = False
    error: str = ""
    num_streams: int = 0
    revision: int = 0
    changed_at: float = 0
    used_at: float = field(default_factory=time.monotonic)
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    images: dict[Path, ChatImage] = field(default_factory=dict)

    @property
    def display_title(self) -> str:
        """Start of the first question, or else the name of its first image."""
        first_turn = self.session.turns[0] if self.session.turns else None
        names = [self.images[path].name for path in first_turn.image_paths] if first_turn else []
        texts = (first_turn.text if first_turn else "", *names)
        title = next((text for text in texts if text.strip()), "")
        return " ".join(title.split())[:MAX_TITLE_CHARS]

    def mark_changed(self) -> None:
        """Note a change, which tabs with an older revision request."""
        self.revision += 1
        self.changed_at = time.monotonic()

    def stop(self) -> None:
        """Stop the answer that is being generated."""
        for turn in self.session.turns[-1:]:
            for reply in turn.replies:
                reply.cancel()

    def stop_unfollowed(self, turn: ChatTurn) -> None:
        """Stop the answer to the last turn, if it is still this one and no tab receives it."""
        if self.is_generating and not self.num_streams and self.session.turns[-1:] == [turn]:
            self.stop()

    def check_text(self, text: str) -> None:
        """Raise UserError if a message is too long."""
        if len(text) > MAX_MESSAGE_CHARS:
            what = "{} characters; at most {} per question."
            raise UserError(translate(what, len(text), MAX_MESSAGE_CHARS))

    @contextlib.contextmanager
    def take_uploads(self, text: str, upload_ids: Sequence[str]) -> Iterator[list[Path]]:
        """Validate a message, and move its uploaded images into the conversation.

        If the message is refused, or the `with` block raises, the uploads stay in place.
        """
        self._check_count(len(upload_ids))
        self.check_text(text)
        uploads = [self.uploads.find(upload_id) for upload_id in dict.fromkeys(upload_ids)]
        taken: dict[Path, Path] = {}
        images: list[Path] = []
        try:
            for upload in uploads:
                upload.touch()  # expired uploads are deleted
            uploaded = {upload: self.reader.list_pages(upload) for upload in uploads}
            num_images = sum(map(len, uploaded.values()))
            self._check_count(num_images)
            with self._reserve(MAX_DISPLAY_BYTES * num_images):
                for upload, pages in uploaded.items():
                    path = self.folder / f"{self._next_number()}-{upload.name[-80:]}"
                    taken[path] = upload
                    for page in pages:
                        images.append(self._add_image(page, path))
            # All images are accepted.
            for path, upload in taken.items():
                upload.rename(path)
            yield images
        except BaseException as error:
            for path, upload in taken.items():
                if path.exists():
                    path.rename(upload)
            self.remove_images(images)
            if isinstance(error, FileNotFoundError):
                raise UserError(translate("The images have expired. Add them again.")) from error
            raise
        for upload in uploads:
            upload.parent.rmdir()

    def _check_count(self, count: int) -> None:
        if count > MAX_IMAGES_PER_MESSAGE or len(self.images) + count > MAX_IMAGES_PER_CHAT:
            what = "{} images; at most {} per question and {} per chat."
            numbers = count, MAX_IMAGES_PER_MESSAGE, MAX_IMAGES_PER_CHAT
            raise UserError(translate(what, *numbers))

    def _add_image(self, page: Path, stored_path: Path) -> Path:
        """Write the display copy of an uploaded page, and return its later path."""
        number = self._next_number()
        (height, width), display_copy = self.reader.encode(page, MAX_DISPLAY_SIDE)
        display_path = self.folder / f"display-{number}.webp"
        display_path.write_bytes(display_copy)
        path = Path(f"{stored_path}{split_page(page.name)[1]}")
        self.images[path] = ChatImage(page.name, number, width, height, display_path)
        return path

    def _next_number(self) -> int:
        return 1 + max((image.number for image in self.images.values()), default=0)

    def _reserve(self, num_bytes: int) -> DiskReservation:
        try:
            return self.budget.reserve(num_bytes, _make_owner(self.browser_id))
        except DiskFullError as error:
            what = "The server has no disk space for more images. Delete chats, or try again later."
            raise UserError(translate(what)) from error

    def remove_images(self, image_paths: Sequence[Path]) -> None:
        """Delete those of the given images that no turn of the conversation uses."""
        in_use = {path for turn in self.session.turns for path in turn.image_paths}
        for path in set(image_paths) - in_use:
            self.images.pop(path).display_path.unlink(missing_ok=True)
            get_file(path).unlink(missing_ok=True)

    def export_archive(self) -> IO[bytes]:
        """Export the conversation and its images as a zip archive in the sample format.

        The archive is an anonymous temporary file, which is deleted when it is closed.
        """
        files = set(map(get_file, self.images))
        samples = self.session.to_samples(lambda path: f"images/{path.name}")
        if not samples:
            raise UserError(f"chat is empty: {len(self.session.turns)} turns, none with an answer")
        jsonl_path = self.folder / "chat.jsonl"
        write_samples(jsonl_path, samples)
        size = sum(path.stat().st_size for path in (jsonl_path, *files))
        archive = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (it is returned)
        # The budget cannot count an anonymous file, so its reservation lasts as long as the file.
        weakref.finalize(archive, self._reserve(size).release)
        with zipfile.ZipFile(archive, "w") as file:
            file.write(jsonl_path, "chat/chat.jsonl")
            for path in sorted(files):
                file.write(path, f"chat/images/{path.name}")
        archive.seek(0)
        return archive


BROWSER_COOKIE = "finesight-browser"
"""Name of the cookie with the secret ID of a browser, which owns conversations."""

BROWSER_ID = re.compile(r"[A-Za-z0-9_-]{43}")


def get_browser_id(request: Request) -> str | None:
    """Return the secret ID in the cookie of a browser; None without a valid one."""
    value = request.cookies.get(BROWSER_COOKIE, "")
    return value if BROWSER_ID.fullmatch(value) else None


def find_owner(request: Request) -> str:
    """Return the start of the names of the folders of a browser."""
    return _make_owner(get_browser_id(request))


def _make_owner(browser_id: str | None) -> str:
    return hashlib.sha256((browser_id or "").encode()).hexdigest()[:8]


class ChatStore:
    """Stores the conversations of all browsers.

    Args:
        folder: Private folder of uploads and conversations.
        pool: Worker processes that read images.
    """

    def __init__(self, service: InferenceService, folder: Path, pool: WorkerPool) -> None:
        self.service, self._reader = service, ImageReader(pool)
        uploads, self._folder = folder / "uploads", folder / "chats"
        for subfolder in (uploads, self._folder):
            subfolder.mkdir(parents=True)
        self.budget = DiskBudget(uploads, self._folder)
        self.budget.free_space = self._free_space
        self.uploads = UploadStore(uploads, self.budget, MAX_FILE_BYTES, find_owner)
        self._chats: dict[str, StoredChat] = {}
        self._lock = threading.Lock()

    def create(self, browser_id: str | None) -> StoredChat:
        """Create a conversation of a browser. It may replace the least recently used one.

        Args:
            browser_id: Secret ID of the browser; None without cookies.

        Raises:
            UserError: An answer is being generated in each conversation that it might replace.
        """
        if browser_id is not None:
            own_chats = [chat for chat in self.list_all() if chat.browser_id == browser_id]
            self._evict(own_chats, MAX_CHATS_PER_BROWSER)
        self._evict(self.list_all(), MAX_CHATS)
        folder = self._folder / (_make_owner(browser_id) + secrets.token_hex(16))
        folder.mkdir()
        session = ChatSession(self.service)
        chat = StoredChat(session, folder, browser_id, self.budget, self._reader, self.uploads)
        session.read_size = lambda path: (chat.images[path].height, chat.images[path].width)
        with self._lock:
            self._chats[chat.token] = chat
        return chat

    def find(self, token: str, browser_id: str | None) -> StoredChat | None:
        """Return a conversation of a browser, and note its use; None if there is none.

        Tokens are compared in constant time.
        """
        for chat in self.list_all():
            is_owner = chat.browser_id in (None, browser_id)
            if secrets.compare_digest(chat.token.encode(), token.encode()) and is_owner:
                chat.used_at = time.monotonic()
                return chat
        return None

    def list_chats(self, browser_id: str | None) -> list[StoredChat]:
        """Return the conversations of a browser that have turns, latest change first."""
        if browser_id is None:
            return []
        chats = (chat for chat in self.list_all() if chat.browser_id == browser_id)
        answered = [chat for chat in chats if chat.session.turns]
        return sorted(answered, key=lambda chat: chat.changed_at, reverse=True)

    def list_all(self) -> list[StoredChat]:
        """Return all conversations, least recently used first."""
        with self._lock:
            return sorted(self._chats.values(), key=lambda chat: chat.used_at)

    def delete(self, chat: StoredChat) -> None:
        """Delete a conversation: cancel its generations and delete its files."""
        with self._lock:
            self._chats.pop(chat.token, None)
        while chat.session.undo():
            pass
        shutil.rmtree(chat.folder, ignore_errors=True)

    def _evict(self, chats: Sequence[StoredChat], limit: int) -> None:
        """Delete conversations that generate no answer until there is one fewer than a limit.

        Those without messages are deleted first.
        """
        num_deleted = max(0, len(chats) + 1 - limit)
        idle = [chat for chat in chats if not chat.is_generating]
        if num_deleted > len(idle):
            raise UserError("All chats are generating answers. Wait for the end of one.")
        for chat in sorted(idle, key=lambda chat: bool(chat.session.turns))[:num_deleted]:
            self.delete(chat)

    def _free_space(self, num_bytes: int) -> bool:
        """Delete conversations that no tab displays, least recently used first.

        Nothing is deleted if they have fewer than `num_bytes` bytes in total.
        """
        shown_since = time.monotonic() - SHOWN_S
        chats = [
            chat
            for chat in self.list_all()
            if chat.used_at < shown_since and not chat.is_generating
        ]
        sizes = [sum(file.stat().st_size for file in chat.folder.iterdir()) for chat in chats]
        surplus = sum(sizes) - num_bytes
        if surplus < 0:
            return False
        # The most recently used ones are kept as far as possible.
        for chat, size in zip(reversed(chats), reversed(sizes), strict=True):
            if size <= surplus:
                surplus -= size
            else:
                self.delete(chat)
        return True
