"""Conversations of the chat page, each with a private folder, and their limits.

A conversation belongs to one browser, which a cookie identifies, and is kept until it is deleted,
replaced or the server stops. Without cookies, it ends with its tab.
"""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from finesight.data.image_header import ImageSize
from finesight.data.sample import write_samples
from finesight.errors import UserError
from finesight.infer.chat_session import ChatSession
from finesight.infer.inference_service import InferenceService
from finesight.vision.image_reader import ImageReader
from finesight.web.chat_html import ENGLISH, UiText

MAX_IMAGE_BYTES = 20 << 20

MAX_STORED_BYTES = 2 << 30
"""Maximum size of the stored files of all users in bytes, including reserved space."""

UPLOAD_TTL_S, MIN_UPLOAD_TTL_S = 3600, 300
"""Seconds after which an uploaded file is deleted, with enough space and if space is short.

Chats contain copies of the images that they use.
"""

MAX_IMAGES_PER_MESSAGE = 8
MAX_IMAGES_PER_CHAT = 64
MAX_MESSAGE_CHARS = 20_000
MAX_SESSIONS, MAX_SESSIONS_PER_BROWSER = 256, 30
"""Maximum numbers of conversations. A new one replaces the least recently used one."""

MAX_TABS = 1024
"""Maximum number of tabs whose conversation is known."""

MAX_TITLE_CHARS = 80

MAX_NEW_TOKENS = 4096

MAX_TEMPERATURE, MAX_TOP_K, MAX_REPETITION_PENALTY = 2.0, 1000, 2.0
MAX_SEED = 2**53 - 1
"""Largest integer that browsers represent exactly."""

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
        self._copied: dict[Path, float] = {}
        self.free_space: Callable[[int], bool] = lambda num_bytes: False
        """Deletes unused files of a number of bytes, or returns False without deleting any."""
        self._lock = threading.Lock()

    def reserve(self, num_bytes: int, needed: Sequence[Path] = ()) -> DiskReservation:
        """Reserve disk space before writing files.

        Args:
            needed: Uploads that must not be deleted.

        Raises:
            DiskFullError: The stored and reserved bytes would exceed the limit.
        """
        with self._lock:
            limit, max_age_s = MAX_STORED_BYTES - num_bytes, UPLOAD_TTL_S
            while (
                excess := self._count_stored_bytes(max_age_s, needed) + self._reserved - limit
            ) > 0:
                if max_age_s == UPLOAD_TTL_S:
                    max_age_s = MIN_UPLOAD_TTL_S
                    self._delete_copied(needed)
                elif not self.free_space(excess):
                    raise DiskFullError
            self._reserved += num_bytes
        return DiskReservation(self, num_bytes)

    def mark_copied(self, uploads: Iterable[Path]) -> None:
        """Note that other folders have copies of uploads, which are deleted if space is short."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            self._copied.update((upload, upload.stat().st_mtime) for upload in uploads)

    def _delete_copied(self, needed: Sequence[Path]) -> None:
        for upload in self._copied.keys() - {*needed}:
            with contextlib.suppress(FileNotFoundError):
                # The same file may have been uploaded again.
                if self._copied.pop(upload) == upload.stat().st_mtime:
                    upload.unlink()

    def free(self, num_bytes: int) -> None:
        """Release reserved bytes."""
        with self._lock:
            self._reserved -= num_bytes

    def _count_stored_bytes(self, max_age_s: float, needed: Sequence[Path]) -> int:
        """Delete uploads beyond an age, then count the bytes of all stored files."""
        min_mtime, total = time.time() - max_age_s, 0
        for root in (self._uploads, self._conversations):
            for file, state in _iter_files(root):
                is_expired = root == self._uploads and state.st_mtime < min_mtime
                if is_expired and file not in needed:
                    file.unlink(missing_ok=True)
                else:
                    total += state.st_size
        return total


def _iter_files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, _, names in os.walk(root):
        for file in (Path(folder, name) for name in names):
            # Files of a closed session may disappear in the meantime.
            with contextlib.suppress(FileNotFoundError):
                yield file, file.stat()


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


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Settings of the chat page for the next answers.

    Attributes:
        seed: Random seed; -1 for another one in each answer.
        system_prompt: System prompt; empty for that of the model or run.
    """

    compare: bool
    thinking: bool
    max_new_tokens: float
    temperature: float
    top_p: float
    top_k: float
    repetition_penalty: float
    seed: int
    system_prompt: str


@dataclass(slots=True)
class WebSession:
    """Conversation of a browser, with a private folder.

    Attributes:
        token: Secret part of the URLs of its images and its export.
        tabs: IDs of the tabs that display the conversation.
        settings: Settings of the last answer; None before the first one.
    """

    chat: ChatSession
    folder: Path
    budget: DiskBudget
    reader: ImageReader
    browser_id: str
    ui_text: UiText = ENGLISH
    title: str = ""
    settings: ChatSettings | None = None
    is_generating: bool = False
    tabs: set[str] = field(default_factory=set)
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    images: dict[Path, ChatImage] = field(default_factory=dict)
    _upload_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def display_title(self) -> str:
        """Title given by the user, or the start of the first question."""
        first_turn = self.chat.turns[0] if self.chat.turns else None
        names = [self.images[path].name for path in first_turn.image_paths] if first_turn else []
        texts = (self.title, first_turn.text if first_turn else "", *names)
        title = next((text for text in texts if text.strip()), self.ui_text.new_chat)
        return " ".join(title.split())[:MAX_TITLE_CHARS]

    def get_image_size(self, path: Path) -> ImageSize:
        """Return height and width of an image of the conversation."""
        return self.images[path].height, self.images[path].width

    def check_text(self, text: str) -> None:
        """Raise UserError if a message is too long."""
        if len(text) > MAX_MESSAGE_CHARS:
            raise UserError(self.ui_text.message_too_long.format(len(text), MAX_MESSAGE_CHARS))

    def add_uploads(self, text: str, uploads: Sequence[Path]) -> list[Path]:
        """Validate a message and copy its uploaded images into the session. Return the copies."""
        num_images = len(self.images) + len(uploads)
        if len(uploads) > MAX_IMAGES_PER_MESSAGE or num_images > MAX_IMAGES_PER_CHAT:
            message = self.ui_text.too_many_images.format(
                len(uploads), MAX_IMAGES_PER_MESSAGE, MAX_IMAGES_PER_CHAT
            )
            raise UserError(message)
        self.check_text(text)
        size = sum(path.stat().st_size for path in uploads if path.exists())
        try:
            num_bytes = size + MAX_DISPLAY_BYTES * len(uploads)
            reservation = self.budget.reserve(num_bytes, uploads)
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
        self.budget.mark_copied(uploads)
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
        (height, width), display_copy = self.reader.encode(upload, MAX_DISPLAY_SIDE)
        display_path = self.folder / f"display-{number}.webp"
        display_path.write_bytes(display_copy)
        image_path = self.folder / f"{number}-{upload.name[-80:]}"
        shutil.copyfile(upload, image_path)
        self.images[image_path] = ChatImage(upload.name, number, width, height, display_path)
        return image_path


class WebSessionStore:
    """Stores conversations by browser, and the conversation that each tab displays."""

    def __init__(
        self, service: InferenceService, folder: Path, budget: DiskBudget, reader: ImageReader
    ) -> None:
        self.service, self._folder, self.budget, self._reader = service, folder, budget, reader
        budget.free_space = self._free_space
        # Both from the least to the most recently used.
        self._sessions: dict[str, WebSession] = {}
        self._tokens_by_tab: dict[tuple[str, str], str] = {}
        # Events of one tab may run in several threads.
        self._lock = threading.RLock()

    def get_or_create(self, tab_id: str, browser_id: str | None = None) -> WebSession:
        """Return the conversation of a tab. It is created on first use.

        Args:
            tab_id: Gradio session ID of the tab.
            browser_id: Secret ID of the browser; None without cookies.
        """
        browser_id = tab_id if browser_id is None else browser_id
        with self._lock:
            token = self._tokens_by_tab.get((browser_id, tab_id), "")
            return self._show(tab_id, browser_id, self._sessions.get(token))

    def open(self, tab_id: str, browser_id: str | None, token: str) -> WebSession:
        """Show a conversation of the browser in a tab, or a new one for an unknown token."""
        browser_id = tab_id if browser_id is None else browser_id
        with self._lock:
            previous = self._sessions.get(self._tokens_by_tab.get((browser_id, tab_id), ""))
            session = self._sessions.get(token)
            if session is None or session.browser_id != browser_id:
                is_unused = (
                    previous is not None and not previous.chat.turns and not previous.is_generating
                )
                session = previous if is_unused else None
            session = self._show(tab_id, browser_id, session)
            if previous is not None and previous is not session:
                session.ui_text = previous.ui_text
                previous.tabs.discard(tab_id)
                if not previous.chat.turns and not previous.is_generating:
                    self.delete(previous)
            return session

    def restore(self, tab_id: str, browser_id: str | None, token: str) -> WebSession:
        """Show a conversation in a tab that has been loaded.

        It is the conversation that the tab displayed before, else the latest one of the browser if
        no other tab is open, else a new one.
        """
        sessions = [] if browser_id is None else self.list_chats(browser_id)
        if not any(session.token == token for session in sessions):
            is_open = any(session.tabs for session in sessions)
            token = "" if is_open or not sessions else sessions[0].token
        return self.open(tab_id, browser_id, token)

    def list_chats(self, browser_id: str) -> list[WebSession]:
        """Return the conversations of a browser that have turns, latest first."""
        sessions = reversed(self.list_sessions())
        return [one for one in sessions if one.browser_id == browser_id and one.chat.turns]

    def close(self, tab_id: str, browser_id: str | None = None) -> None:
        """Close a tab, and stop the answer of its conversation if no other tab shows it.

        Without a browser ID, the conversation is deleted.
        """
        with self._lock:
            key = tab_id if browser_id is None else browser_id, tab_id
            session = self._sessions.get(self._tokens_by_tab.get(key, ""))
            if session is not None:
                session.tabs.discard(tab_id)
                is_unused = not session.chat.turns and not session.is_generating
                if browser_id is None or is_unused:
                    self.delete(session)
                elif session.is_generating and not session.tabs:
                    for turn in session.chat.turns[-1:]:
                        for reply in turn.replies:
                            reply.cancel()

    def delete(self, session: WebSession) -> None:
        """Delete a conversation: cancel its generations and delete its files."""
        with self._lock:
            self._sessions.pop(session.token, None)
        while session.chat.undo():
            pass
        shutil.rmtree(session.folder, ignore_errors=True)

    def list_sessions(self) -> list[WebSession]:
        """Return all conversations, least recently used first."""
        with self._lock:
            return [*self._sessions.values()]

    def find_by_token(self, token: str) -> WebSession | None:
        """Return the conversation with a secret token, or None if there is none.

        Tokens are compared in constant time.
        """
        given = token.encode()
        matching = (
            session
            for session in self.list_sessions()
            if secrets.compare_digest(session.token.encode(), given)
        )
        return next(matching, None)

    def _show(self, tab_id: str, browser_id: str, session: WebSession | None) -> WebSession:
        """Show a conversation, or a new one, in a tab, and mark it as most recently used."""
        if session is None:
            self._evict([one for one in self._sessions.values() if one.browser_id == browser_id])
            folder = self._folder / secrets.token_hex(16)
            folder.mkdir()
            chat = ChatSession(self.service)
            session = WebSession(chat, folder, self.budget, self._reader, browser_id)
            chat.read_size = session.get_image_size
        self._sessions.pop(session.token, None)
        self._sessions[session.token] = session
        session.tabs.add(tab_id)
        self._tokens_by_tab.pop((browser_id, tab_id), None)
        self._tokens_by_tab[browser_id, tab_id] = session.token
        if len(self._tokens_by_tab) > MAX_TABS:
            oldest = next(iter(self._tokens_by_tab))
            token = self._tokens_by_tab.pop(oldest)
            if token in self._sessions:
                self._sessions[token].tabs.discard(oldest[1])
        return session

    def _evict(self, sessions_of_browser: Sequence[WebSession]) -> None:
        if len(sessions_of_browser) >= MAX_SESSIONS_PER_BROWSER:
            self.delete(sessions_of_browser[0])
        while len(self._sessions) >= MAX_SESSIONS:
            # The least recently used one; first those without messages, and displayed ones last.
            sessions = self._sessions.values()
            self.delete(min(sessions, key=lambda one: (bool(one.chat.turns), bool(one.tabs))))

    def _free_space(self, num_bytes: int) -> bool:
        """Delete conversations that no tab displays, least recently used first.

        Nothing is deleted if they have fewer than `num_bytes` bytes in total.
        """
        sessions = [one for one in self.list_sessions() if not one.tabs and not one.is_generating]
        sizes = [sum(state.st_size for _, state in _iter_files(one.folder)) for one in sessions]
        surplus = sum(sizes) - num_bytes
        if surplus < 0:
            return False
        # The most recently used ones are kept as far as possible.
        for session, size in zip(reversed(sessions), reversed(sizes), strict=True):
            if size <= surplus:
                surplus -= size
            else:
                self.delete(session)
        return True
