"""Chat page: HTML, uploads, and streams of answers.

The browser keeps the conversations, and sends one with each question. The server keeps the images
until the conversation is deleted, or the server stops.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import traceback
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from markupsafe import Markup
from pydantic import BaseModel, Discriminator, Field, FiniteFloat
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
from finesight.app.server import Access, AccessMiddleware
from finesight.bounded_files import parse_json
from finesight.data.image_header import get_file
from finesight.data.sample import (
    BoxPart,
    PointPart,
    TextPart,
    encode_json_line,
    is_video_path,
    sample_to_dict,
)
from finesight.encode.family import DEFAULT_THINKING, ThinkingOptions
from finesight.errors import UserError
from finesight.evaluate.mathml import convert_formula, render_mathml
from finesight.infer.chat_session import ChatReply, ChatSession, ChatTurn
from finesight.infer.inference_service import InferenceService
from finesight.infer.prediction import BOX_COLORS
from finesight.infer.request import FinishReason, GenerationOptions, SamplingParams
from finesight.report.i18n import translate
from finesight.vision.image_reader import NUM_IMAGE_WORKERS, ImageReader
from finesight.worker_pool import WorkerPool

MAX_FILE_BYTES = 100 << 20
"""Maximum size of an uploaded image or video in bytes."""

MAX_IMAGES_PER_MESSAGE = 8
MAX_IMAGES_PER_CHAT = 64
MAX_MESSAGE_CHARS = 20_000
MAX_CHATS = 30
"""Maximum number of conversations that a browser keeps."""

MAX_NEW_TOKENS = 4096
MAX_ANSWER_CHARS, MAX_ANSWER_PARTS = 64 * MAX_NEW_TOKENS, 2 * MAX_NEW_TOKENS

MAX_TEMPERATURE, MAX_TOP_K, MAX_REPETITION_PENALTY = 2, 1000, 2
MAX_SEED = 2**53 - 1
"""Largest integer that browsers represent exactly."""

MAX_DISPLAY_SIDE = 1600
"""Maximum width and height of an image that the browser receives, in pixels."""

BASE_MODEL_NAME = "base"
DEFAULT_MAX_NEW_TOKENS = 512

UPDATE_INTERVAL_S = 0.08
"""Seconds between updates of a streamed completion in the browser."""

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


class ChatImage(BaseModel, frozen=True):
    """Image, page of a document, or video of a conversation.

    Attributes:
        id: ID of the upload, and the fragment of a page.
    """

    id: str
    name: str
    width: Annotated[int, Field(ge=1, le=1 << 30)]
    height: Annotated[int, Field(ge=1, le=1 << 30)]

    @property
    def is_video(self) -> bool:
        """Return whether the file is a video, by its name."""
        return is_video_path(Path(self.name))


AnswerBox = Annotated[BoxPart | PointPart, Discriminator("type")]
AnswerPart = Annotated[TextPart | BoxPart | PointPart, Discriminator("type")]


class StoredReply(BaseModel, frozen=True):
    """Reply of a model, which the browser keeps.

    Attributes:
        image: ID of the image that boxes refer to; None without an image.
        content: Parts of the answer in following prompts; empty to leave out the turn.
        finish_reason: None during the generation.
    """

    model: str
    image: str | None = None
    answer: Annotated[str, Field(max_length=MAX_ANSWER_CHARS)]
    reasoning: Annotated[str | None, Field(max_length=MAX_ANSWER_CHARS)] = None
    boxes: Annotated[tuple[AnswerBox, ...], Field(max_length=MAX_ANSWER_PARTS)] = ()
    content: Annotated[tuple[AnswerPart, ...], Field(max_length=MAX_ANSWER_PARTS)] = ()
    num_tokens: int = 0
    finish_reason: FinishReason | None = None

    @classmethod
    def from_reply(cls, reply: ChatReply, image: str | None) -> StoredReply:
        """Describe a reply, also during its generation."""
        prediction = reply.prediction
        reasoning = (prediction.reasoning if prediction else reply.reasoning) or ""
        return cls(
            model=reply.model,
            image=image,
            answer=(prediction.answer if prediction else reply.text)[:MAX_ANSWER_CHARS],
            reasoning=reasoning[:MAX_ANSWER_CHARS] or None,
            boxes=prediction.boxes if prediction else (),
            content=tuple(one for one in reply.content if isinstance(one, TextPart | BoxPart)),
            num_tokens=prediction.num_tokens if prediction else 0,
            finish_reason=reply.finish_reason,
        )


class Question(BaseModel, frozen=True):
    """Question of a turn."""

    text: Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)] = ""
    images: Annotated[list[ChatImage], Field(max_length=1000)] = []


class StoredTurn(Question, frozen=True):
    """Question and its answers, which the browser keeps."""

    replies: Annotated[list[StoredReply], Field(min_length=1, max_length=2)]


class Conversation(BaseModel, frozen=True):
    """Conversation that the browser sends, with a question to answer."""

    turns: Annotated[list[StoredTurn], Field(max_length=1000)] = []
    question: Question = Question()
    settings: ChatSettings = ChatSettings()

    @property
    def images(self) -> list[ChatImage]:
        """Images of all turns and of the question."""
        return [one for turn in (*self.turns, self.question) for one in turn.images]


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
    turns: Sequence[StoredTurn],
    images: Sequence[ChatImage],
    first_index: int = 0,
    *,
    is_formula: bool = False,
) -> str:
    """Render turns of a conversation, the first of which has an index in the conversation.

    Args:
        images: Images of the conversation.
        is_formula: See `render_answer`.
    """
    return render_page(
        "chat_turns.html",
        turns=turns,
        images={image.id: image for image in images},
        first_index=first_index,
        is_formula=is_formula,
        colors=BOX_COLORS,
        format_facts=_format_facts,
        get_boxed_width=_get_boxed_width,
        get_box_areas=_get_box_areas,
        render_answer=render_answer,
        max_chars=MAX_MESSAGE_CHARS,
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


def _format_facts(reply: StoredReply) -> str:
    facts = [translate("tokens: {}", reply.num_tokens)]
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
        # Answers that are being generated, by ID.
        self._running: dict[str, ChatTurn] = {}
        # Slow images wait for each other, and leave threads for the other requests.
        self._limiter = CapacityLimiter(2 * NUM_IMAGE_WORKERS)
        self._render_limiter = CapacityLimiter(2)
        # The browser forgets the conversations of a server that has stopped.
        self._id = secrets.token_hex(8)
        self._default_system_prompt = service.system_prompt or ""
        self._max_new_tokens = min(MAX_NEW_TOKENS, service.max_model_len)

    def list_routes(self) -> list[Route]:
        """Return the routes of the page."""
        posts: dict[str, Callable[..., Any]] = {
            UPLOADS_PATH: self.add_file,
            "/forget": self.forget_images,
            "/turns": self.get_turns,
            "/answers": self.start_answer,
            "/answers/{id}/stop": self.stop_answer,
            "/chat.zip": self.export_chat,
        }
        return [
            Route("/", self.get_page),
            Route("/images/{id}", self.get_image),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
        ]

    def get_page(self, request: Request) -> Response:
        """Return the page, without a conversation."""
        return HTMLResponse(self.render(find_studio(request)))

    def render(self, studio: str = "") -> str:
        """Render the page. It links to its studio, if there is one."""
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
            settings={
                "expects_images": bool(manifest and manifest.has_images),
                "max_chats": MAX_CHATS,
                "server": self._id,
            },
            studio=studio,
            defaults=defaults.model_dump(),
            bounds=_read_bounds() | {"max_new_tokens": (1, self._max_new_tokens, 1)},
            max_chars=MAX_MESSAGE_CHARS,
            max_chats=MAX_CHATS,
            model=self._model_names[0],
            prompts=manifest.prompts if manifest else (),
            others=self._model_names[1:],
            base_name=BASE_MODEL_NAME,
            has_thinking=default_thinking is not None,
        )

    async def add_file(self, request: Request) -> Response:
        """Store an image, document or video, and return its images."""
        path = await self._uploads.store(request)
        try:
            images = await to_thread.run_sync(self._read_images, path, limiter=self._limiter)
        except BaseException:
            self._uploads.remove([path.parent.name])
            raise
        return JSONResponse([image.model_dump() for image in images])

    def _read_images(self, path: Path) -> list[ChatImage]:
        """Return the image in a file, or the pages of a document."""
        images = []
        pages = self._reader.list_pages(path)
        _check_count(len(pages), len(pages))
        for page in pages:
            height, width = self._reader.read_size(page)
            page_id = path.parent.name + page.name.removeprefix(path.name)
            images.append(ChatImage(id=page_id, name=page.name, width=width, height=height))
        return images

    def _find_image(self, image_id: str) -> Path:
        """Return an uploaded image. Raises UserError for an unknown or deleted one."""
        match = IMAGE_ID.fullmatch(image_id)
        path = self._uploads.find(match[1] if match else "")
        return path.with_name(path.name + ((match and match[2]) or ""))

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
        content = (await to_thread.run_sync(encode, limiter=self._limiter))[1]
        return Response(content, media_type="image/webp", headers=headers)

    async def forget_images(self, request: Request) -> Response:
        """Delete uploaded images, with all pages of their documents."""
        conversation = await parse_body(request, Question)
        for image in conversation.images:
            with suppress(UserError):
                self._uploads.remove([self._find_image(image.id).parent.name])
        return JSONResponse({})

    async def get_turns(self, request: Request) -> Response:
        """Return the turns of a conversation as HTML."""
        conversation = await parse_body(request, Conversation)
        return HTMLResponse(await self._render_turns(conversation.turns, conversation))

    async def _render_turns(
        self, turns: Sequence[StoredTurn], conversation: Conversation, first_index: int = 0
    ) -> str:
        manifest = self._service.manifest
        is_formula = manifest is not None and manifest.metric == "latex"
        images = conversation.images
        render = partial(render_turns, turns, images, first_index, is_formula=is_formula)
        return await to_thread.run_sync(render, limiter=self._render_limiter)

    def _restore(self, conversation: Conversation) -> tuple[ChatSession, dict[str, Path]]:
        """Return a chat session with the turns of a conversation, and its images by ID.

        A note replaces each image of a turn that was deleted.
        """
        paths = {image.id: self._find_image(image.id) for image in conversation.question.images}
        for image in conversation.images:
            with suppress(UserError):
                paths[image.id] = self._find_image(image.id)
        note = translate("The image is no longer on the server.")
        session = ChatSession(self._service, read_size=self._reader.read_size)
        prompt = conversation.settings.system_prompt
        is_default = not prompt.strip() or prompt == self._default_system_prompt
        session.system_prompt = None if is_default else prompt
        for turn in conversation.turns:
            replies = []
            for one in turn.replies:
                path = paths.get(one.image or "")
                # Boxes need their image.
                is_text = bool(one.image and one.content and path is None)
                content = (TextPart(text=one.answer),) if is_text else one.content
                replies.append(ChatReply(one.model, path, None, None, content, one.finish_reason))
            images = tuple(paths[image.id] for image in turn.images if image.id in paths)
            notes = [f"[{image.name}: {note}]" for image in turn.images if image.id not in paths]
            session.turns.append(ChatTurn("\n".join([*notes, turn.text]), images, tuple(replies)))
        return session, paths

    async def start_answer(self, request: Request) -> Response:
        """Stream the answer to a question. It is generated as long as the browser receives it."""
        conversation = await parse_body(request, Conversation)
        start = partial(self._send, conversation)
        turn, ids = await to_thread.run_sync(start, limiter=self._limiter)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        lines = self._stream(conversation, turn, ids)
        return StreamingResponse(lines, headers=headers, media_type="application/x-ndjson")

    def _send(self, conversation: Conversation) -> tuple[ChatTurn, dict[Path, str]]:
        """Start the answer to a question, and return it with the IDs of its images."""
        _check_count(len(conversation.question.images), len(conversation.images))
        session, paths = self._restore(conversation)
        images = dict.fromkeys(paths[image.id] for image in conversation.question.images)
        if conversation.settings.ask_alone:
            earlier = (turn.images for turn in reversed(conversation.turns) if turn.images)
            images = images or dict.fromkeys(self._find_image(one.id) for one in next(earlier, ()))
            session.turns.clear()
        options = self._build_options(conversation.settings)
        turn = session.send(conversation.question.text, [*images], options)
        return turn, {path: image_id for image_id, path in paths.items()}

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

    async def _stream(
        self, conversation: Conversation, turn: ChatTurn, ids: Mapping[Path, str]
    ) -> AsyncIterator[str]:
        """Yield the state of an answer as lines of JSON: its ID, replies, HTML and error."""
        answer_id, index, sent = secrets.token_hex(16), len(conversation.turns), ""
        self._running[answer_id], is_done = turn, False
        results = asyncio.gather(*map(_drain, turn.replies), return_exceptions=True)
        try:
            while not is_done:
                await asyncio.wait([results], timeout=UPDATE_INTERVAL_S if sent else 0)
                is_done = results.done()
                errors = filter(None, results.result() if is_done else ())
                replies = [
                    StoredReply.from_reply(one, ids[one.image_path] if one.image_path else None)
                    for one in turn.replies
                ]
                stored = StoredTurn(**dict(conversation.question), replies=replies)
                content = {
                    "id": answer_id,
                    "replies": [one.model_dump(mode="json", by_alias=True) for one in replies],
                    "html": await self._render_turns([stored], conversation, index),
                    "error": next(map(_describe_failure, errors), ""),
                }
                if (line := f"{json.dumps(content)}\n") != sent:
                    yield line
                sent = line
        finally:
            for reply in turn.replies:
                reply.cancel()
            del self._running[answer_id]

    def stop_answer(self, request: Request) -> Response:
        """Stop an answer that is being generated."""
        turn = self._running.get(request.path_params["id"])
        for reply in turn.replies if turn else ():
            reply.cancel()
        return JSONResponse({})

    async def export_chat(self, request: Request) -> Response:
        """Return a conversation in the sample format, and its images, as a zip archive."""
        conversation = await parse_body(request, Conversation)
        session, paths = await to_thread.run_sync(self._restore, conversation)
        files = dict.fromkeys(map(get_file, paths.values()))
        names = {file: f"{index}-" for index, file in enumerate(files, 1)}
        samples = session.to_samples(lambda path: f"images/{names[get_file(path)]}{path.name}")
        if not samples:
            raise UserError(f"chat is empty: {len(session.turns)} turns, none with an answer")
        lines = [f"{encode_json_line(sample_to_dict(sample))}\n" for sample in samples]
        entries = {f"chat/images/{names[file]}{file.name}": file for file in files}
        chunks = _iter_archive("".join(lines).encode(), entries)
        return StreamingResponse(chunks, headers=FILE_HEADERS, media_type="application/zip")


class ChunkBuffer(bytearray):
    """Written bytes that were not taken yet. An archive is so sent while it is written."""

    def write(self, data: bytes) -> int:
        """Append bytes, and return their number."""
        self.extend(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing, as `zipfile` expects of a stream."""

    def take(self) -> bytes:
        """Remove and return the bytes."""
        content = bytes(self)
        self.clear()
        return content


def _iter_archive(jsonl: bytes, files: Mapping[str, Path]) -> Iterator[bytes]:
    """Yield a zip archive of a conversation and its images by name."""
    buffer: Any = ChunkBuffer()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("chat/chat.jsonl", jsonl)
        for name, file in files.items():
            with archive.open(name, "w", force_zip64=True) as target, file.open("rb") as source:
                for chunk in iter(partial(source.read, 1 << 16), b""):
                    target.write(chunk)
                    yield buffer.take()
    yield buffer.take()


def _check_count(num_sent: int, num_images: int) -> None:
    """Raise UserError for too many images of a question or conversation."""
    if num_sent > MAX_IMAGES_PER_MESSAGE or num_images > MAX_IMAGES_PER_CHAT:
        what = "{} images; at most {} per question and {} per chat."
        raise UserError(translate(what, num_sent, MAX_IMAGES_PER_MESSAGE, MAX_IMAGES_PER_CHAT))


async def _drain(reply: ChatReply) -> None:
    async for _ in reply:
        pass


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
