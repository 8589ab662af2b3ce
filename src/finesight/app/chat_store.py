"""Conversations of the chat page, each with a private folder, and their limits.

A conversation belongs to one browser, which a cookie identifies, and is kept until it is deleted,
replaced or the server stops. Without cookies, its secret token gives access.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated

from pydantic import BaseModel, Field, FiniteFloat
from starlette.requests import Request

from finesight.app.pages import Utf8Text
from finesight.app.uploads import DiskBudget, receive_file
from finesight.data.sample import write_samples
from finesight.errors import UserError
from finesight.infer.chat_session import ChatSession
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
        last_number: Number of the newest image.
        changed_at: Time of the last change on the monotonic clock.
        used_at: Time of the last request on the monotonic clock.
    """

    session: ChatSession
    folder: Path
    browser_id: str | None
    budget: DiskBudget
    reader: ImageReader
    settings: ChatSettings | None = None
    is_generating: bool = False
    error: str = ""
    num_streams: int = 0
    last_number: int = 0
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

    def stop(self) -> None:
        """Stop the answer that is being generated."""
        for turn in self.session.turns[-1:]:
            for reply in turn.replies:
                reply.cancel()

    def check_text(self, text: str) -> None:
        """Raise UserError if a message is too long."""
        if len(text) > MAX_MESSAGE_CHARS:
            what = "{} characters; at most {} per question."
            raise UserError(translate(what, len(text), MAX_MESSAGE_CHARS))

    async def receive_image(self, request: Request) -> Path:
        """Store the image or video in the body of a request. `add_image` makes it usable."""
        if len(self.images) >= MAX_IMAGES_PER_CHAT:
            self.remove_images([*self.images])
        if len(self.images) >= MAX_IMAGES_PER_CHAT:
            what = "{} images; at most {} per question and {} per chat."
            numbers = len(self.images) + 1, MAX_IMAGES_PER_MESSAGE, MAX_IMAGES_PER_CHAT
            raise UserError(translate(what, *numbers))
        self.last_number += 1
        return await receive_file(
            request,
            self.folder,
            self.budget,
            MAX_FILE_BYTES,
            prefix=f"{self.last_number}-",
            owner=_make_owner(self.browser_id),
        )

    def add_image(self, path: Path) -> int:
        """Add a received image with its display copy, and return its number.

        An unreadable one is deleted.
        """
        number, _, name = path.name.partition("-")
        display_path = self.folder / f"display-{number}.webp"
        try:
            (height, width), content = self.reader.encode(path, MAX_DISPLAY_SIDE)
            owner = _make_owner(self.browser_id)
            with self.budget.allocate(len(content), lambda: display_path.open("xb"), owner) as file:
                file.write(content)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self.images[path] = ChatImage(name, int(number), width, height, display_path)
        return int(number)

    def find_images(self, numbers: Sequence[int]) -> list[Path]:
        """Return the images of a message. Raises UserError for too many or unknown numbers."""
        if len(numbers) > MAX_IMAGES_PER_MESSAGE:
            what = "{} images; at most {} per question and {} per chat."
            limits = MAX_IMAGES_PER_MESSAGE, MAX_IMAGES_PER_CHAT
            raise UserError(translate(what, len(numbers), *limits))
        paths = {image.number: path for path, image in self.images.items()}
        if not paths.keys() >= {*numbers}:
            raise UserError(translate("The images have expired. Add them again."))
        return [paths[number] for number in dict.fromkeys(numbers)]

    def remove_images(self, image_paths: Sequence[Path]) -> None:
        """Delete those of the given images that no turn of the conversation uses."""
        in_use = {path for turn in self.session.turns for path in turn.image_paths}
        for path in set(image_paths) - in_use:
            self.images.pop(path).display_path.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def export_archive(self) -> IO[bytes]:
        """Export the conversation and its images as a zip archive in the sample format.

        The archive is a temporary file, which is deleted when it is closed.
        """
        archive_names = {
            path: f"images/{image.number}-{path.name.partition('-')[2]}"
            for path, image in self.images.items()
        }
        samples = self.session.to_samples(lambda path: archive_names[path])
        if not samples:
            raise UserError(f"chat is empty: {len(self.session.turns)} turns, none with an answer")
        jsonl_path = self.folder / "chat.jsonl"
        write_samples(jsonl_path, samples)
        size = sum(path.stat().st_size for path in (jsonl_path, *archive_names))

        def open_file() -> IO[bytes]:
            return tempfile.NamedTemporaryFile(dir=self.folder)

        archive = self.budget.allocate(size, open_file, _make_owner(self.browser_id))
        with zipfile.ZipFile(archive, "w") as file:
            file.write(jsonl_path, "chat/chat.jsonl")
            for path, name in archive_names.items():
                file.write(path, f"chat/{name}")
        archive.truncate()
        archive.seek(0)
        return archive


BROWSER_COOKIE = "finesight-browser"
"""Name of the cookie with the secret ID of a browser, which owns conversations."""

BROWSER_ID = re.compile(r"[A-Za-z0-9_-]{43}")


def get_browser_id(request: Request) -> str | None:
    """Return the secret ID in the cookie of a browser; None without a valid one."""
    value = request.cookies.get(BROWSER_COOKIE, "")
    return value if BROWSER_ID.fullmatch(value) else None


def _make_owner(browser_id: str | None) -> str:
    return hashlib.sha256((browser_id or "").encode()).hexdigest()[:8]


class ChatStore:
    """Stores the conversations of all browsers.

    Args:
        folder: Private folder of the conversations.
        pool: Worker processes that read images.
    """

    def __init__(self, service: InferenceService, folder: Path, pool: WorkerPool) -> None:
        self.service, self._reader = service, ImageReader(pool)
        self._folder = folder / "chats"
        self._folder.mkdir(parents=True)
        self.budget = DiskBudget(self._folder, self._free_space)
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
        chat = StoredChat(session, folder, browser_id, self.budget, self._reader)
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

    def _free_space(self) -> bool:
        """Delete the least recently used conversation that no tab displays.

        Returns False if there is none with images.
        """
        shown_since = time.monotonic() - SHOWN_S
        for chat in self.list_all():
            if chat.used_at < shown_since and not chat.is_generating and chat.images:
                self.delete(chat)
                return True
        return False
