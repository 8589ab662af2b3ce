"""Chat page: HTML, uploads, conversations and their answers.

The server keeps the conversations of each browser with their images until they are deleted, or the
server stops. The page shows what the server has, also while an answer is being generated.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

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
    UploadStore,
    create_app,
    describe_error,
    find_studio,
    parse_body,
    render_page,
)
from finesight.app.request_jobs import RequestJobs
from finesight.app.server import Access, AccessMiddleware
from finesight.encode.family import DEFAULT_THINKING, ThinkingOptions
from finesight.errors import UserError
from finesight.evaluate.mathml import convert_formula, render_mathml
from finesight.files.bounded_files import parse_json
from finesight.files.worker_pool import WorkerPool
from finesight.infer.chat_session import ChatReply, ChatSession, ChatTurn
from finesight.infer.inference_service import InferenceService
from finesight.infer.prediction import BOX_COLORS
from finesight.infer.request import GenerationOptions, SamplingParams
from finesight.metric_components import get_metric
from finesight.report.i18n import translate
from finesight.samples.image_file import get_file
from finesight.samples.sample import BoxPart, encode_json_line, is_video_path, sample_to_dict
from finesight.vision.image_reader import NUM_IMAGE_WORKERS, ImageReader

MAX_FILE_BYTES = 100 << 20
"""Maximum size of an uploaded image or video in bytes."""

MAX_IMAGES_PER_MESSAGE = 8
MAX_IMAGES_PER_CHAT = 64
MAX_MESSAGE_CHARS = 20_000
MAX_CHATS, MAX_CHATS_OF_ALL, MAX_TURNS = 30, 200, 100
"""Maximum number of conversations of a browser and of all, and of turns of a conversation."""

COOKIE_AGE_S = 30 * 24 * 3600
"""Time after which a browser forgets its conversations, in seconds."""

MAX_TITLE_CHARS = 80
MAX_NEW_TOKENS = 4096
MAX_TEMPERATURE, MAX_TOP_K, MAX_REPETITION_PENALTY = 2, 1000, 2
MAX_SEED = 2**53 - 1
"""Largest integer that browsers represent exactly."""

MAX_DISPLAY_SIDE = 1600
"""Maximum width and height of an image that the browser receives, in pixels."""

MAX_IMAGE_JOBS = 2 * NUM_IMAGE_WORKERS
"""Maximum number of requests that read images at the same time."""

MAX_TEXT_JOBS = 4
"""Maximum number of questions without images that are sent at the same time."""

BASE_MODEL_NAME = "base"
DEFAULT_MAX_NEW_TOKENS = 512

Name = Annotated[str, Field(max_length=64)]
IMAGE_ID = re.compile(r"([\w-]{32})(#page=[0-9]{1,4})?")


class ChatSettings(BaseModel, frozen=True, extra="forbid"):
    """Settings of the chat page for the next answers.

    Attributes:
        compare: Name of another model that answers, too; empty for none.
        ask_alone: Ask without the earlier turns, about their last images if the question has none.
        seed: Random seed; -1 for another one in each answer.
        system_prompt: System prompt; empty for that of the model or run.
    """

    compare: Annotated[str, Field(max_length=1000)] = ""
    ask_alone: bool = False
    thinking: bool = False
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = DEFAULT_MAX_NEW_TOKENS
    temperature: Annotated[FiniteFloat, Field(ge=0, le=MAX_TEMPERATURE)] = 0
    top_p: Annotated[FiniteFloat, Field(ge=0.01, le=1)] = 1
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] = 0
    repetition_penalty: Annotated[FiniteFloat, Field(ge=1, le=MAX_REPETITION_PENALTY)] = 1
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = -1
    system_prompt: Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)] = ""


class ChatRequest(BaseModel, frozen=True):
    """Request about a conversation, such as a question to answer.

    Attributes:
        chat: ID of the conversation; empty for a new one.
        index: Number of turns before the question. It replaces later ones; None for none.
        num_turns: Number of turns that the page shows; None to allow any.
        images: IDs of images; None for those of the replaced turn.
    """

    chat: Annotated[str, Field(max_length=64)] = ""
    index: Annotated[int | None, Field(ge=0)] = None
    num_turns: int | None = None
    text: Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)] = ""
    images: Annotated[list[Name], Field(max_length=1000)] | None = []
    settings: ChatSettings = ChatSettings()


@dataclass(frozen=True, slots=True)
class ChatImage:
    """Image, page of a document, or video of a conversation.

    Attributes:
        id: ID of the upload, and the fragment of a page.
        path: File, or page of a document.
    """

    id: str
    path: Path
    width: int
    height: int

    @property
    def is_video(self) -> bool:
        """Return whether the file is a video, by its name."""
        return is_video_path(self.path)


@dataclass(slots=True, eq=False)
class Chat:
    """Conversation of a browser.

    Attributes:
        owner: Secret name of the browser.
        settings: Settings of the last answer.
        is_busy: Whether an answer is being generated.
        error: Message of the failure of the last answer; empty without one.
    """

    owner: str
    id: str = field(default_factory=partial(secrets.token_hex, 16))
    turns: list[ChatTurn] = field(default_factory=list)
    settings: ChatSettings = field(default_factory=ChatSettings)
    is_busy: bool = False
    error: str = ""

    @property
    def paths(self) -> dict[Path, None]:
        """Images of all turns, in their order."""
        return dict.fromkeys(path for turn in self.turns for path in turn.image_paths)

    @property
    def title(self) -> str:
        """First question, or else the name of its first image."""
        turn = self.turns[0]
        names = (turn.text, *(path.name for path in turn.image_paths))
        return " ".join(next(filter(str.strip, names), "").split())[:MAX_TITLE_CHARS]


BOXED_IMAGE_WIDTHS = (320, 640)
"""Minimum and maximum display width of images with bounding boxes, in pixels.

The maximum also limits the height.
"""

MAX_FORMULAS, MAX_JSON_CHARS = 200, 100_000
"""Maximum number of converted formulas, and length of indented JSON, of an answer."""

MIN_WORDS = 4
"""Number of words from which an answer is prose, for example that of the base model."""

_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{4,}")
_MARKED_NUMBER = re.compile(r'"\\u0000([^"]*)"')
_CODE_FENCE = re.compile(r"\A```(?:json)?\n(.*)\n```\Z", re.DOTALL)
_NUMBER_LIST = re.compile(r"\[\n[-+\d.eE,\s]+\]")
_FORMULA = re.compile(
    # A formula ends before the next one opens, so that the search takes linear time.
    r"\$\$.+?\$\$|(?<!\\)\\\[(?:[^\\]|\\[^\[\]])++\\\]"
    r"|(?P<inline>(?<!\\)\\\((?:[^\\]|\\[^()])++\\\))"
    # As in Pandoc, so that prices such as $5 and $6 are no formula.
    r"|(?<![\\\w$])(?P<dollar>\$(?![\s$])(?:\\.|[^\\$\n])+(?<!\s)\$)(?![\d$])",
    re.DOTALL,
)
"""Formula with delimiters."""


def render_turns(
    turns: Sequence[ChatTurn],
    images: Mapping[Path, ChatImage],
    first_index: int = 0,
    *,
    error: str = "",
    is_formula: bool = False,
) -> Markup:
    """Render turns of a conversation, the first of which has an index in the conversation.

    Args:
        images: Images of the conversation by path.
        error: Message below the last turn.
        is_formula: See `render_answer`.
    """
    page = render_page(
        "chat_turns.html",
        turns=turns,
        images=images,
        first_index=first_index,
        error=error,
        is_formula=is_formula,
        colors=BOX_COLORS,
        format_facts=_format_facts,
        get_boxed_width=_get_boxed_width,
        get_box_areas=_get_box_areas,
        render_answer=render_answer,
        max_chars=MAX_MESSAGE_CHARS,
    )
    return Markup(page)  # The template escapes all texts.


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
    end = 0
    for match in islice(_FORMULA.finditer(answer), MAX_FORMULAS):
        if (formula := _render_formula(match[0])) is not None:
            tag = "div" if match["inline"] is None and match["dollar"] is None else "span"
            markup = Markup('<{} class="formula">{}</{}>').format(tag, formula, tag)
            pieces += [answer[end : match.start()], markup]
            end = match.end()
    if not pieces:
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
    num_tokens = reply.prediction.num_tokens if reply.prediction else 0
    facts = [translate("tokens: {}", num_tokens)]
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
    """Requests of the chat page.

    Args:
        folder: Private folder of the uploaded files.
        pool: Worker processes that read images.
        ask_alone: Whether the page asks each question alone by default.
    """

    def __init__(
        self, service: InferenceService, folder: Path, pool: WorkerPool, ask_alone: bool = False
    ) -> None:
        self._service, self._model_names, self._ask_alone = service, service.model_names, ask_alone
        self._reader = ImageReader(pool)
        self._uploads = UploadStore(folder, MAX_FILE_BYTES, math.inf)
        self._images: dict[Path, ChatImage] = {}
        # By ID. The last changed one is at the end, because the oldest ones are deleted first.
        self._chats: dict[str, Chat] = {}
        self._tasks = set[asyncio.Task[None]]()
        # Slow images wait for each other. Questions without images do not wait for them.
        self._image_jobs = RequestJobs(MAX_IMAGE_JOBS)
        self._text_jobs = RequestJobs(MAX_TEXT_JOBS)
        self._render_limiter = CapacityLimiter(2)
        # Cookies do not distinguish ports and paths, so each server has its own.
        self._cookie = f"finesight-chats-{secrets.token_hex(8)}"
        self._default_system_prompt = service.system_prompt or ""
        self._max_new_tokens = min(MAX_NEW_TOKENS, service.max_model_len)

    def list_routes(self) -> list[Route]:
        """Return the routes of the page."""
        posts: dict[str, Callable[..., Any]] = {
            UPLOADS_PATH: self.add_file,
            "/forget": self.forget_images,
            "/answers": self.start_answer,
            "/stop": self.stop_answer,
            "/delete": self.delete_turns,
            "/chat.zip": self.export_chat,
        }
        return [
            Route("/", self.get_page),
            Route("/turns/{id}", self.get_last_turn),
            Route("/images/{id}", self.get_image),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
        ]

    async def get_page(self, request: Request) -> Response:
        """Return the page with a conversation, by default the last one of the browser."""
        owner, name = request.cookies.get(self._cookie, ""), request.query_params.get("chat")
        # Copies: while turns are rendered, an answer may end, or a conversation be deleted.
        chats = [replace(one) for one in reversed(self._chats.values()) if one.owner == owner]
        chat = next((one for one in chats if name in (None, one.id)), None)
        turns = await self._render_turns(chat, 0) if chat else ""
        response = HTMLResponse(self.render(find_studio(request), chats, chat, turns))
        if not owner:
            secret = secrets.token_urlsafe(32)
            # Links from other sites send it, too. Other requests have their origin checked.
            response.set_cookie(
                self._cookie,
                secret,
                max_age=COOKIE_AGE_S,
                httponly=True,
                samesite="lax",
                secure=request.url.scheme == "https",
            )
        return response

    def render(
        self,
        studio: str = "",
        chats: Sequence[Chat] = (),
        chat: Chat | None = None,
        turns: str = "",
    ) -> str:
        """Render the page with one of several conversations, and its rendered turns.

        It links to its studio, if there is one.
        """
        manifest, default_thinking = self._service.manifest, self._service.default_thinking
        max_new_tokens = manifest.max_new_tokens if manifest else None
        defaults = ChatSettings(
            max_new_tokens=min(max_new_tokens or DEFAULT_MAX_NEW_TOKENS, self._max_new_tokens),
            thinking=bool(default_thinking),
            ask_alone=self._ask_alone,
            system_prompt=self._default_system_prompt,
        )
        return render_page(
            "chat.html",
            settings={"expects_images": bool(manifest and manifest.has_images)},
            studio=studio,
            chats=chats,
            chat=chat,
            turns=turns,
            defaults=defaults.model_dump(),
            bounds=_read_bounds() | {"max_new_tokens": (1, self._max_new_tokens, 1)},
            max_chars=MAX_MESSAGE_CHARS,
            max_chats=MAX_CHATS,
            model=self._model_names[0],
            prompts=manifest.prompts if manifest else (),
            format_notes=self._service.get_prompt_format().describe_forms(),
            others=self._model_names[1:],
            base_name=BASE_MODEL_NAME,
            has_thinking=default_thinking is not None,
        )

    async def add_file(self, request: Request) -> Response:
        """Store an image, document or video, and return the IDs of its images."""
        path = await self._uploads.store(request)
        try:
            images = await self._image_jobs.run(request, partial(self._read_images, path))
        except BaseException:
            self._uploads.remove([path.parent.name])
            raise
        self._images |= {image.path: image for image in images}
        return JSONResponse([image.id for image in images])

    def _read_images(self, path: Path) -> list[ChatImage]:
        """Return the image in a file, or the pages of a document."""
        images = []
        pages = self._reader.list_pages(path)
        _check_count(len(pages), len(pages))
        for page in pages:
            height, width = self._reader.read_size(page)
            page_id = path.parent.name + page.name.removeprefix(path.name)
            images.append(ChatImage(page_id, page, width, height))
        return images

    def _find_image(self, image_id: str) -> Path:
        """Return an uploaded image. Raises UserError for an unknown or deleted one."""
        match = IMAGE_ID.fullmatch(image_id)
        path = self._uploads.find(match[1] if match else "")
        path = path.with_name(path.name + ((match and match[2]) or ""))
        if path not in self._images:
            raise UserError(translate("The image is no longer on the server."))
        return path

    async def get_image(self, request: Request) -> Response:
        """Return an image as WebP without metadata, reduced to a side, or a video."""
        try:
            path = self._find_image(request.path_params["id"])
        except UserError as error:
            raise HTTPException(404, "no such image") from error
        headers = {"cache-control": "private, max-age=3600", **FILE_HEADERS}
        if "video" in request.query_params and is_video_path(path):
            return FileResponse(path, headers=headers)
        encode = partial(self._reader.encode, path, MAX_DISPLAY_SIDE)
        _, content, _ = await self._image_jobs.run(request, encode)
        return Response(content, media_type="image/webp", headers=headers)

    async def forget_images(self, request: Request) -> Response:
        """Delete uploaded images that no conversation has, with all pages of their documents."""
        body = await parse_body(request, ChatRequest)
        for image_id in body.images or ():
            with suppress(UserError):
                self._remove_images([self._find_image(image_id)])
        return JSONResponse({})

    def _remove_images(self, paths: Iterable[Path]) -> None:
        """Delete images unless a conversation has them or other pages of their documents."""
        used = {get_file(path) for chat in self._chats.values() for path in chat.paths}
        unused = {get_file(path) for path in paths} - used
        self._uploads.remove([file.parent.name for file in unused])
        self._images = {p: one for p, one in self._images.items() if get_file(p) not in unused}

    def _find_chat(
        self, request: Request, chat_id: str, *, is_idle: bool = True, num_turns: int | None = None
    ) -> Chat:
        """Return a conversation of the browser. Raises UserError for another one.

        Args:
            is_idle: Raise UserError, too, if an answer is being generated.
            num_turns: Raise UserError, too, if the conversation has another number of turns.
        """
        chat, owner = self._chats.get(chat_id), request.cookies.get(self._cookie)
        if chat is None or chat.owner != owner or (is_idle and chat.is_busy):
            is_own = chat is not None and chat.owner == owner
            what = "An answer is being generated." if is_own else "The chat was deleted."
            raise UserError(translate(what))
        if num_turns not in (None, len(chat.turns)):
            raise UserError(translate("The chat has changed in another tab. Reload the page."))
        return chat

    async def get_last_turn(self, request: Request) -> Response:
        """Return the last turn of a conversation as HTML."""
        chat = self._find_chat(request, request.path_params["id"], is_idle=False)
        return HTMLResponse(await self._render_turns(chat, len(chat.turns) - 1))

    async def _render_turns(self, chat: Chat, first_index: int) -> str:
        manifest = self._service.manifest
        is_formula = False
        if manifest is not None:
            is_formula = get_metric(manifest.metric).answer_content == "formula"
        arguments = chat.turns[first_index:], self._images, first_index
        render = partial(render_turns, *arguments, error=chat.error, is_formula=is_formula)
        return await to_thread.run_sync(render, limiter=self._render_limiter)

    async def start_answer(self, request: Request) -> Response:
        """Start the answer to a question, and return the ID of its conversation.

        It is generated, too, while no page of the browser shows it. If the client disconnects while
        its images are read, the conversation is unchanged.
        """
        body = await parse_body(request, ChatRequest)
        chat = Chat(request.cookies.get(self._cookie, ""))
        if body.chat:
            chat = self._find_chat(request, body.chat, num_turns=body.num_turns)
        elif not chat.owner:
            raise UserError(translate("The page needs cookies. Allow them, and reload the page."))
        jobs = self._text_jobs
        if body.images or chat.paths:
            jobs = self._image_jobs
        chat.is_busy = True
        try:
            turns = await jobs.run(request, partial(self._send, chat, body))
        except BaseException:
            chat.is_busy = False
            raise
        removed = [path for turn in chat.turns for path in turn.image_paths]
        chat.turns, chat.settings, chat.error = turns, body.settings, ""
        self._chats.pop(chat.id, None)
        self._chats[chat.id] = chat
        self._delete_old(MAX_CHATS, chat.owner)
        self._delete_old(MAX_CHATS_OF_ALL)
        self._remove_images(removed)
        self._tasks.add(task := asyncio.create_task(_generate(chat)))
        task.add_done_callback(self._tasks.discard)
        return JSONResponse({"chat": chat.id})

    def _send(self, chat: Chat, body: ChatRequest) -> list[ChatTurn]:
        """Start the answer to a question, and return the turns of its conversation."""
        turns = chat.turns[: body.index]
        replaced = chat.turns[len(turns) :]
        images = [*replaced[0].image_paths] if body.images is None and replaced else []
        images += dict.fromkeys(map(self._find_image, body.images or ()))
        earlier = [turn.image_paths for turn in turns if turn.image_paths]
        _check_count(len(images), len(images) + sum(map(len, earlier)))
        if len(turns) >= MAX_TURNS:
            raise UserError(translate("The chat has {} questions. Start a new one.", MAX_TURNS))
        own, is_alone = tuple(images), body.settings.ask_alone
        if is_alone and earlier and not images:
            images = [*earlier[-1]]
        session = self._open_session([] if is_alone else turns, body.settings)
        for path in {*images, *(path for turn in session.turns for path in turn.image_paths)}:
            self._uploads.find(path.parent.name)  # Raises UserError for a deleted one.
        turn = session.send(body.text, images, self._build_options(body.settings))
        return [*turns, replace(turn, image_paths=own)]

    def _open_session(self, turns: Sequence[ChatTurn], settings: ChatSettings) -> ChatSession:
        prompt = settings.system_prompt
        is_default = not prompt.strip() or prompt == self._default_system_prompt
        return ChatSession(
            self._service, [*turns], None if is_default else prompt, self._reader.read_size
        )

    def _delete_old(self, limit: int, owner: str | None = None) -> None:
        """Delete the oldest conversations of a browser, or of all, beyond a limit."""
        chats = [one for one in self._chats.values() if owner in (None, one.owner)]
        for chat in chats[: max(0, len(chats) - limit)]:
            if not chat.is_busy:
                self._remove(chat)

    def _remove(self, chat: Chat, num_kept: int = 0) -> Sequence[ChatTurn]:
        """Delete the last turns of a conversation with their images, and return them."""
        removed, chat.turns = chat.turns[num_kept:], chat.turns[:num_kept]
        if not chat.turns:
            del self._chats[chat.id]
        self._remove_images(path for turn in removed for path in turn.image_paths)
        return removed

    def _build_options(self, settings: ChatSettings) -> list[GenerationOptions]:
        """Return the options of each model."""
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
            if self._service.default_thinking is None
            else ThinkingOptions(enable_thinking=settings.thinking),
        )
        others = [name for name in self._model_names[1:] if name == settings.compare]
        return [replace(options, model=name) for name in (None, *others)]

    async def stop_answer(self, request: Request) -> Response:
        """Stop the answer of a conversation that is being generated."""
        body = await parse_body(request, ChatRequest)
        for reply in self._find_chat(request, body.chat, is_idle=False).turns[-1].replies:
            reply.cancel()
        return JSONResponse({})

    async def delete_turns(self, request: Request) -> Response:
        """Delete the turns of a conversation from an index on, and return the first question."""
        body = await parse_body(request, ChatRequest)
        chat = self._find_chat(request, body.chat, num_turns=body.num_turns)
        removed, chat.error = self._remove(chat, body.index or 0), ""
        return JSONResponse({"text": removed[0].text if removed else ""})

    async def export_chat(self, request: Request) -> Response:
        """Return a conversation in the sample format, and its images, as a zip archive."""
        body = await parse_body(request, ChatRequest)
        chat = self._find_chat(request, body.chat)
        session = self._open_session(chat.turns, chat.settings)
        files = dict.fromkeys(self._uploads.find(path.parent.name) for path in chat.paths)
        names = {file: f"{index}-" for index, file in enumerate(files, 1)}
        samples = session.to_samples(lambda path: f"images/{names[get_file(path)]}{path.name}")
        if not samples:
            raise UserError(f"chat is empty: {len(session.turns)} turns, none with an answer")
        lines = [f"{encode_json_line(sample_to_dict(sample))}\n" for sample in samples]
        entries = {f"chat/images/{names[file]}{file.name}": file for file in files}
        chunks = _iter_archive("".join(lines), entries)
        return StreamingResponse(chunks, headers=FILE_HEADERS, media_type="application/zip")


def _iter_archive(jsonl: str, files: Mapping[str, Path]) -> Iterator[bytes]:
    """Yield a zip archive of a conversation and its images by name."""
    with TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("chat/chat.jsonl", jsonl)
            for name, image in files.items():
                archive.write(image, name)
        file.seek(0)
        yield from iter(partial(file.read, 1 << 16), b"")


def _check_count(num_sent: int, num_images: int) -> None:
    """Raise UserError for too many images of a question or conversation."""
    if num_sent > MAX_IMAGES_PER_MESSAGE or num_images > MAX_IMAGES_PER_CHAT:
        what = "{} images; at most {} per question and {} per chat."
        raise UserError(translate(what, num_sent, MAX_IMAGES_PER_MESSAGE, MAX_IMAGES_PER_CHAT))


async def _generate(chat: Chat) -> None:
    """Generate the replies of the last turn of a conversation."""
    replies = chat.turns[-1].replies
    try:
        errors = await asyncio.gather(*map(_drain, replies), return_exceptions=True)
        chat.error = next(map(_describe_failure, filter(None, errors)), "")
    finally:
        chat.is_busy = False


async def _drain(reply: ChatReply) -> None:
    try:
        async for _ in reply:
            pass
    finally:
        reply.finish_reason = reply.finish_reason or "cancelled"
        reply.stream = None  # frees its memory


def _describe_failure(error: BaseException) -> str:
    if isinstance(error, UserError):
        return describe_error(error)
    traceback.print_exception(error)
    return translate("The answer ended with a server error. See the terminal of the server.")


def make_chat_app(
    service: InferenceService,
    folder: Path,
    pool: WorkerPool,
    access: Access,
    *,
    ask_alone: bool = False,
) -> AccessMiddleware:
    """Build the chat page as an ASGI application with access control; see `ChatPage`."""
    access = replace(access, max_upload_bytes=MAX_FILE_BYTES)
    routes = ChatPage(service, folder, pool, ask_alone).list_routes()
    return AccessMiddleware(create_app(routes), access)
