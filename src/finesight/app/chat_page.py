"""Chat page: HTML, JSON requests for conversations, and event streams of answers.

A conversation has a private folder. It belongs to one browser, which a cookie identifies, and is
kept until it is deleted, replaced or the server stops. Without cookies, its secret token gives
access.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Annotated, Any

from anyio import CapacityLimiter, to_thread
from markupsafe import Markup
from pydantic import BaseModel, Field, FiniteFloat
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from finesight.app.pages import (
    FILE_HEADERS,
    UPLOADS_PATH,
    DiskBudget,
    Utf8Text,
    create_app,
    describe_error,
    find_studio,
    parse_body,
    receive_file,
    render_page,
)
from finesight.app.server import Access, AccessMiddleware
from finesight.bounded_files import parse_json
from finesight.data.image_header import get_file, split_page
from finesight.data.sample import BoxPart, is_video_path, write_samples
from finesight.encode.family import DEFAULT_THINKING, ThinkingOptions
from finesight.errors import UserError
from finesight.evaluate.mathml import convert_formula, render_mathml
from finesight.infer.chat_session import ChatReply, ChatSession, ChatTurn
from finesight.infer.inference_service import InferenceService
from finesight.infer.prediction import BOX_COLORS
from finesight.infer.request import GenerationOptions, SamplingParams
from finesight.report.i18n import translate
from finesight.vision.image_reader import NUM_IMAGE_WORKERS, ImageReader
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
        last_number: Number of the newest image, changed under the lock.
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
    lock: threading.Lock = field(default_factory=threading.Lock)

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

    async def receive_image(self, request: Request) -> Path:
        """Store the image or video in the body of a request. `add_image` makes it usable."""
        if len(self.images) >= MAX_IMAGES_PER_CHAT:
            self.remove_images([*self.images])
        _check_count(1, len(self.images) + 1)
        with self.lock:
            self.last_number += 1
            prefix = f"{self.last_number}-"
        return await receive_file(
            request,
            self.folder,
            self.budget,
            MAX_FILE_BYTES,
            prefix=prefix,
            owner=_make_owner(self.browser_id),
        )

    def add_image(self, path: Path) -> list[int]:
        """Add a received image, or the pages of a document, with display copies.

        An unreadable file is deleted.

        Returns:
            The numbers of the images.
        """
        number, _, name = path.name.partition("-")
        added: dict[Path, ChatImage] = {}
        try:
            pages = self.reader.list_pages(path)
            with self.lock:  # Files are added concurrently.
                _check_count(len(pages), len(self.images) + len(pages))
                numbers = [int(number), *range(self.last_number + 1, self.last_number + len(pages))]
                self.last_number += len(pages) - 1
            for index, page in zip(numbers, pages, strict=True):
                display_path = self.folder / f"display-{index}.webp"
                (height, width), content, _ = self.reader.encode(page, MAX_DISPLAY_SIDE)
                page_name = f"{name}{split_page(page.name)[1]}"
                added[page] = ChatImage(page_name, index, width, height, display_path)
                self._write_display_copy(display_path, content)
        except BaseException:
            for image in added.values():
                image.display_path.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise
        self.images.update(added)
        return [image.number for image in added.values()]

    def _write_display_copy(self, path: Path, content: bytes) -> None:
        owner = _make_owner(self.browser_id)
        with self.budget.allocate(len(content), lambda: path.open("xb"), owner) as file:
            file.write(content)

    def find_images(self, numbers: Sequence[int]) -> list[Path]:
        """Return the images of a message. Raises UserError for too many or unknown numbers."""
        _check_count(len(numbers), len(self.images))
        # Another request may add an image.
        paths = {image.number: path for path, image in [*self.images.items()]}
        if not paths.keys() >= {*numbers}:
            raise UserError(translate("The images have expired. Add them again."))
        return [paths[number] for number in dict.fromkeys(numbers)]

    def remove_images(self, image_paths: Sequence[Path]) -> None:
        """Delete those of the given images that no turn of the conversation uses."""
        in_use = {path for turn in self.session.turns for path in turn.image_paths}
        for path in set(image_paths) - in_use:
            self.images.pop(path).display_path.unlink(missing_ok=True)
        for file in set(map(get_file, image_paths)) - set(map(get_file, self.images)):
            file.unlink(missing_ok=True)

    def export_archive(self) -> IO[bytes]:
        """Export the conversation and its images as a zip archive in the sample format.

        The archive is a temporary file, which is deleted when it is closed.
        """
        files = sorted(set(map(get_file, self.images)))
        samples = self.session.to_samples(lambda path: f"images/{path.name}")
        if not samples:
            raise UserError(f"chat is empty: {len(self.session.turns)} turns, none with an answer")
        jsonl_path = self.folder / "chat.jsonl"
        write_samples(jsonl_path, samples)
        size = sum(path.stat().st_size for path in (jsonl_path, *files))

        def open_file() -> IO[bytes]:
            return tempfile.NamedTemporaryFile(dir=self.folder)

        archive = self.budget.allocate(size, open_file, _make_owner(self.browser_id))
        with zipfile.ZipFile(archive, "w") as file:
            file.write(jsonl_path, "chat/chat.jsonl")
            for path in files:
                file.write(path, f"chat/images/{path.name}")
        archive.truncate()
        archive.seek(0)
        return archive


def _check_count(num_sent: int, num_images: int) -> None:
    """Raise UserError for too many images of a question or conversation."""
    if num_sent > MAX_IMAGES_PER_MESSAGE or num_images > MAX_IMAGES_PER_CHAT:
        what = "{} images; at most {} per question and {} per chat."
        raise UserError(translate(what, num_sent, MAX_IMAGES_PER_MESSAGE, MAX_IMAGES_PER_CHAT))


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


BOXED_IMAGE_WIDTHS = (320, 640)
"""Minimum and maximum display width of images with bounding boxes, in pixels.

The maximum also limits the height.
"""

MAX_FORMULAS, MAX_JSON_CHARS = 200, 100_000
"""Maximum number of rendered formulas, and length of indented JSON, of an answer."""

MIN_WORDS = 4
"""Number of words from which an answer is prose, for example that of the base model."""

_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{4,}")
_MARKED_NUMBER = re.compile(r'"\\u0000([^"]*)"')
_CODE_FENCE = re.compile(r"\A```(?:json)?\n(.*)\n```\Z", re.DOTALL)
_NUMBER_LIST = re.compile(r"\[\n[-+\d.eE,\s]+\]")
_FORMULA = re.compile(
    r"\$\$.+?\$\$|\\\[.+?\\\]|(?P<inline>\\\(.+?\\\))"
    # As in Pandoc, so that prices such as $5 and $6 are no formula.
    r"|(?<![\\\w$])(?P<dollar>\$(?![\s$])(?:\\.|[^\\$\n])+(?<!\s)\$)(?![\d$])",
    re.DOTALL,
)
"""Formula with delimiters."""


def render_turns(chat: StoredChat, turns: Sequence[ChatTurn], first_index: int = 0) -> str:
    """Render turns of a conversation, the first of which has an index in the conversation."""
    manifest = chat.session.service.manifest
    return render_page(
        "chat_turns.html",
        chat=chat,
        turns=turns,
        first_index=first_index,
        is_formula=manifest is not None and manifest.metric == "latex",
        colors=BOX_COLORS,
        format_facts=_format_facts,
        get_boxed_width=_get_boxed_width,
        get_box_areas=_get_box_areas,
        render_answer=render_answer,
        is_video=is_video_path,
    )


@lru_cache(maxsize=256)
def render_answer(answer: str, is_formula: bool) -> Markup | None:
    """Render the formulas or the JSON of an answer; None if it has neither.

    Formulas become MathML of known elements, and all other text is escaped.

    Args:
        answer: Complete answer of a model.
        is_formula: Whether answers are LaTeX without delimiters, as in formula recognition.
    """
    is_bare = is_formula and not _FORMULA.search(answer) and len(_WORD.findall(answer)) < MIN_WORDS
    if is_bare and (formula := _render_formula(answer)) is not None:
        return Markup('<div class="formula" tabindex="0">{}</div>').format(formula)
    text = _CODE_FENCE.sub(r"\1", answer.strip())
    if text.startswith(("{", "[")) and (formatted := _format_json(text)) is not None:
        return Markup('<pre class="json" tabindex="0">{}</pre>').format(formatted)
    pieces: list[str | Markup] = []
    end = num_formulas = 0
    for match in _FORMULA.finditer(answer):
        formula = _render_formula(match[0]) if num_formulas < MAX_FORMULAS else None
        if formula is not None:
            tag = "div" if match["inline"] is None and match["dollar"] is None else "span"
            markup = Markup('<{} class="formula">{}</{}>').format(tag, formula, tag)
            pieces += [answer[end : match.start()], markup]
            end, num_formulas = match.end(), num_formulas + 1
    if not num_formulas:
        return None
    return Markup('<div class="message-body">{}</div>').format(
        Markup("").join([*pieces, answer[end:]])
    )


@lru_cache(maxsize=1024)
def _render_formula(source: str) -> Markup | None:
    tree = convert_formula(source)
    return None if tree is None else render_mathml(tree)


def _format_json(text: str) -> str | None:
    """Indent a JSON object, or a list of objects; None for other texts."""
    # ValueError also if an integer has too many digits.
    with suppress(ValueError):
        value = parse_json(text)
        items = value if isinstance(value, list) else [value]
        if items and "\\u0000" not in text and all(isinstance(item, dict) for item in items):
            # Numbers are marked texts meanwhile: the parser would drop digits, as of 12.50.
            mark = "\0{}".format
            value = json.loads(text, parse_float=mark, parse_int=mark)
            formatted = json.dumps(value, ensure_ascii=False, indent=2)
            formatted = _MARKED_NUMBER.sub(r"\1", formatted)
            # Lists of numbers, such as box corners, on one line. Strings contain no line breaks.
            formatted = _NUMBER_LIST.sub(lambda match: " ".join(match[0].split()), formatted)
            return formatted if len(formatted) <= MAX_JSON_CHARS else None
    return None


def _format_facts(reply: ChatReply) -> str:
    assert reply.prediction is not None, f"the reply of {reply.model} has not ended"
    facts = [translate("tokens: {}", reply.prediction.num_tokens)]
    if reply.boxes:
        facts.append(translate("boxes: {}", len(reply.boxes)))
    if reply.finish_reason == "length":
        facts.append(translate("truncated at the maximum length"))
    elif reply.finish_reason == "cancelled":
        facts.append(translate("stopped"))
    if not reply.content:
        facts.append(translate("no answer; following prompts omit this turn"))
    return " · ".join(facts)


def _get_boxed_width(image: ChatImage) -> int:
    """Return a display width that enlarges small images and shrinks large ones."""
    min_width, max_width = BOXED_IMAGE_WIDTHS
    width = min(max(image.width, min_width), max_width, max_width * image.width // image.height)
    return max(width, 1)


def _get_box_areas(
    image: ChatImage, boxes: Sequence[BoxPart]
) -> Iterator[tuple[float, float, float, float, str | None]]:
    """Yield the left, top, width and height of bounding boxes in percent, and their labels.

    The corners of a box may be in any order.
    """
    for box in boxes:
        left, right = sorted(100 * min(max(x / image.width, 0.0), 1.0) for x in box.xyxy[::2])
        top, bottom = sorted(100 * min(max(y / image.height, 0.0), 1.0) for y in box.xyxy[1::2])
        yield left, top, right - left, bottom - top, box.label


BROWSER_COOKIE_AGE_S = 30 * 24 * 3600
"""Lifetime of the cookie with the secret ID of a browser."""

BASE_MODEL_NAME = "base"
DEFAULT_MAX_NEW_TOKENS = 512

UPDATE_INTERVAL_S = 0.08
"""Seconds between updates of a streamed completion in the browser."""

UNFOLLOWED_S = 5.0
"""Seconds after which an answer that no tab receives is stopped. A tab may load the page again."""


class Question(BaseModel, frozen=True):
    """Question of a turn.

    Attributes:
        text: Text; None for that of the turn, which gets another answer.
        files: Numbers of the images of a new turn.
        index: Index of an earlier turn, which is replaced; None for a new one.
    """

    settings: ChatSettings
    text: Annotated[Utf8Text, Field(max_length=MAX_MESSAGE_CHARS)] | None = None
    files: Annotated[list[int], Field(max_length=1000)] = []
    index: Annotated[int, Field(ge=0)] | None = None


def _read_bounds() -> dict[str, tuple[float, float, str | int]]:
    """Return minimum, maximum and step of the numbers of `ChatSettings`."""
    fields = ChatSettings.model_json_schema()["properties"].items()
    numbers = {name: field for name, field in fields if "maximum" in field}
    steps: dict[str, str | int] = {"number": "any", "integer": 1}
    return {
        name: (field["minimum"], field["maximum"], steps[field["type"]])
        for name, field in numbers.items()
    }


class ChatPage:
    """Requests of the chat page for several users, each with a cookie of the browser."""

    def __init__(self, store: ChatStore) -> None:
        service = store.service
        self._store, self._model_names = store, service.model_names
        self._tasks: set[asyncio.Task[None]] = set()
        # Slow images wait for each other, and leave threads for the other requests.
        self._limiter = CapacityLimiter(2 * NUM_IMAGE_WORKERS)
        self._default_thinking = service.default_thinking
        self._default_system_prompt = service.system_prompt or ""
        self._max_new_tokens = min(MAX_NEW_TOKENS, service.max_model_len)

    def render(self, studio: str = "") -> str:
        """Render the page without a conversation. It links to its studio, if there is one."""
        manifest = self._store.service.manifest
        max_new_tokens = manifest.max_new_tokens if manifest else None
        defaults = ChatSettings(
            max_new_tokens=min(max_new_tokens or DEFAULT_MAX_NEW_TOKENS, self._max_new_tokens),
            thinking=bool(self._default_thinking),
            system_prompt=self._default_system_prompt,
        )
        return render_page(
            "chat.html",
            settings={"expects_images": bool(manifest and manifest.has_images)},
            studio=studio,
            defaults=defaults.model_dump(),
            bounds=_read_bounds() | {"max_new_tokens": (1, self._max_new_tokens, 1)},
            max_chars=MAX_MESSAGE_CHARS,
            model=self._model_names[0],
            prompts=manifest.prompts if manifest else (),
            others=self._model_names[1:],
            base_name=BASE_MODEL_NAME,
            has_thinking=self._default_thinking is not None,
        )

    def render_chats(self, browser_id: str | None, current: str = "") -> str:
        """Render the list of the conversations of a browser.

        Args:
            current: Token of the conversation that the page shows.
        """
        chats, limit = self._store.list_chats(browser_id), MAX_CHATS_PER_BROWSER
        return render_page("chat_list.html", current=current, chats=chats, limit=limit)

    def describe(self, chat: StoredChat) -> dict[str, Any]:
        """Return the state of a conversation."""
        return {
            "token": chat.token,
            "turns": render_turns(chat, chat.session.turns),
            "is_generating": chat.is_generating,
            "error": chat.error,
            "settings": None if chat.settings is None else chat.settings.model_dump(),
            "chats": self.render_chats(chat.browser_id, chat.token),
        }

    async def start_answer(self, chat: StoredChat, question: Question) -> None:
        """Start the answer to a question. It is generated until its end, or no tab follows it."""
        if chat.is_generating:
            text = "An answer of this chat is being generated. Stop it, or wait for its end."
            raise UserError(translate(text))
        options = self._apply_settings(chat, question.settings)
        chat.is_generating, chat.error = True, ""
        try:
            start = partial(start_turn, chat, question, options)
            turn = await to_thread.run_sync(start, limiter=self._limiter)
        except BaseException:
            chat.is_generating = False
            raise
        chat.changed_at = time.monotonic()
        task = asyncio.create_task(_receive_replies(chat, turn))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stream(self, chat: StoredChat) -> AsyncIterator[str]:
        """Yield events with the last turn during its generation, and the state at its end."""
        sent = ""
        chat.num_streams += 1
        try:
            while chat.is_generating:
                index = len(chat.session.turns) - 1
                turn = render_turns(chat, chat.session.turns[-1:], index)
                if turn != sent:
                    yield _format_event({"index": index, "turn": turn})
                sent = turn
                await asyncio.sleep(UPDATE_INTERVAL_S)
            yield _format_event({"state": await to_thread.run_sync(self.describe, chat)})
        finally:
            chat.num_streams -= 1

    def _apply_settings(self, chat: StoredChat, settings: ChatSettings) -> list[GenerationOptions]:
        """Store the settings in the conversation, and return the options of each model."""
        prompt = settings.system_prompt
        is_default = not prompt.strip() or prompt == self._default_system_prompt
        chat.settings = settings
        chat.session.system_prompt = None if is_default else prompt
        options = GenerationOptions(
            max_new_tokens=min(settings.max_new_tokens, self._max_new_tokens),
            sampling_params=SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                repetition_penalty=settings.repetition_penalty,
                seed=settings.seed if settings.seed >= 0 else None,
            ),
            thinking=DEFAULT_THINKING
            if self._default_thinking is None
            else ThinkingOptions(enable_thinking=settings.thinking),
        )
        others = [name for name in self._model_names[1:] if name == settings.compare]
        return [replace(options, model=name) for name in (None, *others)]

    def list_routes(self) -> list[Route]:
        """Return the routes of the page."""
        posts: dict[str, Callable[..., Any]] = {
            "/chats": self.create_chat,
            "/chats/{token}/ask": self.ask,
            "/chats/{token}/undo": self.undo,
            "/chats/{token}/stop": self.stop,
            "/chats/{token}/delete": self.delete,
            f"/chats/{{token}}{UPLOADS_PATH}": self.add_image,
        }
        return [
            Route("/", self.get_page),
            Route("/chats", self.get_chats),
            Route("/chats/{token}", self.get_chat),
            Route("/chats/{token}/stream", self.stream_answer),
            Route("/chats/{token}/chat.zip", self.export_chat),
            Route("/images/{token}/{number:int}", self.get_image),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
        ]

    def _find_chat(self, request: Request) -> StoredChat:
        chat = self._store.find(request.path_params["token"], get_browser_id(request))
        if chat is None:
            raise HTTPException(404, "no such chat")
        return chat

    def get_page(self, request: Request) -> Response:
        """Return the page, with a cookie for a new browser."""
        response = HTMLResponse(self.render(find_studio(request)))
        if get_browser_id(request) is None:
            response.set_cookie(
                BROWSER_COOKIE,
                secrets.token_urlsafe(32),
                max_age=BROWSER_COOKIE_AGE_S,
                httponly=True,
                # Lax: a link from another site must not lead to a new ID.
                samesite="lax",
                # The sign-in redirects to the page.
                secure=request.headers.get("referer", "").startswith("https://"),
            )
        return response

    def get_chats(self, request: Request) -> Response:
        """Return the list of the conversations of the browser."""
        return JSONResponse({"chats": self.render_chats(get_browser_id(request))})

    def get_chat(self, request: Request) -> Response:
        """Return a conversation."""
        return JSONResponse(self.describe(self._find_chat(request)))

    def create_chat(self, request: Request) -> Response:
        """Create a conversation."""
        return JSONResponse({"token": self._store.create(get_browser_id(request)).token})

    async def stream_answer(self, request: Request) -> Response:
        """Stream the answer that is being generated."""
        chat = self._find_chat(request)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        events = self.stream(chat)
        return StreamingResponse(events, headers=headers, media_type="text/event-stream")

    async def ask(self, request: Request) -> Response:
        """Start the answer to a question, and return the conversation."""
        chat, question = self._find_chat(request), await parse_body(request, Question)
        await self.start_answer(chat, question)
        return JSONResponse(await to_thread.run_sync(self.describe, chat))

    def undo(self, request: Request) -> Response:
        """Remove the last turn, unless it is being generated, and return its question."""
        chat = self._find_chat(request)
        turn = None if chat.is_generating else chat.session.undo()
        if turn is not None:
            chat.remove_images(turn.image_paths)
            chat.changed_at = time.monotonic()
        return JSONResponse({"text": turn.text if turn else "", **self.describe(chat)})

    def stop(self, request: Request) -> Response:
        """Stop the answer that is being generated."""
        self._find_chat(request).stop()
        return JSONResponse({})

    def delete(self, request: Request) -> Response:
        """Delete a conversation."""
        self._store.delete(self._find_chat(request))
        return JSONResponse({})

    async def add_image(self, request: Request) -> Response:
        """Store an image, document or video for the next question, and return its numbers."""
        chat = self._find_chat(request)
        path = await chat.receive_image(request)
        numbers = await to_thread.run_sync(chat.add_image, path, limiter=self._limiter)
        return JSONResponse({"numbers": numbers})

    def get_image(self, request: Request) -> Response:
        """Return an image or video of a conversation."""
        number = request.path_params["number"]
        for path, image in [*self._find_chat(request).images.items()]:
            if image.number == number and image.display_path.is_file():
                headers = {"cache-control": "private, max-age=3600", **FILE_HEADERS}
                if "video" in request.query_params and is_video_path(path):
                    return FileResponse(path, headers=headers)
                return FileResponse(image.display_path, media_type="image/webp", headers=headers)
        raise HTTPException(404, "no such image")

    def export_chat(self, request: Request) -> Response:
        """Return a conversation as a zip archive."""
        archive = self._find_chat(request).export_archive()
        length = str(os.fstat(archive.fileno()).st_size)
        headers = {"content-disposition": 'attachment; filename="chat.zip"', **FILE_HEADERS}
        headers["content-length"] = length
        chunks = iter(partial(archive.read, 1 << 16), b"")
        return StreamingResponse(chunks, headers=headers, media_type="application/zip")


def start_turn(
    chat: StoredChat, question: Question, options: Sequence[GenerationOptions]
) -> ChatTurn:
    """Start the answer to a question. Turns after an earlier one are removed."""
    if question.index is None:
        image_paths = chat.find_images(question.files)
        return chat.session.send(question.text or "", image_paths, options)
    removed_turns = chat.session.turns[question.index :]
    text = removed_turns[0].text if question.text is None and removed_turns else question.text or ""
    turn = chat.session.edit(question.index, text, options)
    chat.remove_images([path for one in removed_turns for path in one.image_paths])
    return turn


async def _receive_replies(chat: StoredChat, turn: ChatTurn) -> None:
    """Receive the completions of a turn, as long as a tab follows them."""
    results = asyncio.gather(*map(_drain, turn.replies), return_exceptions=True)
    followed_at = time.monotonic()
    try:
        while not results.done():
            await asyncio.wait([results], timeout=UNFOLLOWED_S / 10)
            followed_at = time.monotonic() if chat.num_streams else followed_at
            if time.monotonic() - followed_at > UNFOLLOWED_S:
                chat.stop()
        for error in filter(None, results.result()):
            chat.error = _describe_failure(error)
    finally:
        for reply in turn.replies:
            reply.cancel()
        chat.is_generating = False
        chat.changed_at = time.monotonic()


async def _drain(reply: ChatReply) -> None:
    async for _ in reply:
        pass


def _describe_failure(error: BaseException) -> str:
    if isinstance(error, UserError):
        return describe_error(error)
    traceback.print_exception(error)
    return translate("The answer ended with a server error. See the terminal of the server.")


def _format_event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def make_chat_app(store: ChatStore, access: Access) -> AccessMiddleware:
    """Build the chat page as an ASGI application with access control."""
    access = replace(access, max_upload_bytes=MAX_FILE_BYTES)
    return AccessMiddleware(create_app(ChatPage(store).list_routes()), access)
