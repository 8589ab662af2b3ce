"""Suggested labels of a teacher: a model behind an OpenAI-compatible server.

The teacher answers each question several times, in the JSON schema of the task. The suggestion is
the answer that agrees most with the others. An invalid answer agrees with none.

| part | confidence |
|---|---|
| field of a JSON answer | share of the other answers with an equal value |
| box or point | mean overlap with the matching one in the other answers |
| answer | mean agreement with the others: equality of classes, else 1 - `measure_disagreement` |

`teacher.jsonl` keeps all answers, so that none is requested twice. Redirects are errors: images and
key are sent to the given server only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import TimeoutError as NoResultYetError
from multiprocessing.pool import IMapIterator, ThreadPool
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx2

from finesight.encode.family import read_json_boxes
from finesight.errors import UserError
from finesight.evaluate.box_metrics import match_boxes
from finesight.evaluate.text_metrics import fold_text, normalize_text
from finesight.files.bounded_files import parse_json
from finesight.files.storage import append_line, flush_file
from finesight.hub import download
from finesight.hub.bounded_request import ResponseLimitError, send_request
from finesight.label.label_session import LabelSession, LabelTask
from finesight.label.label_store import (
    AnswerContent,
    SuggestedPart,
    Suggestion,
    get_text,
    list_boxes,
    read_complete_lines,
    remove_incomplete_line,
)
from finesight.label.suggestion import iter_json_leaves, measure_disagreement
from finesight.samples.boxes import (
    BOX_KEY,
    POINT_KEY,
    clip_box,
    contains_center,
    is_inside_image,
    iter_json_values,
)
from finesight.samples.default_prompts import NO_OBJECTS_ANSWER
from finesight.samples.frames import FRAME_1000, Box, ImageSize, Order
from finesight.samples.image_file import DEFAULT_SIZE, CorruptImageError
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    TextPart,
    create_region,
)
from finesight.vision.drawing import draw_red_rectangle

TEACHER_FILE = "teacher.jsonl"

ANSWER_START = b'{"key":'
"""Start of each line of the file of answers."""

MAX_REQUEST_SECONDS = 300.0
"""Maximum time of a request with its complete response."""

MAX_LISTING_SECONDS = 15.0
"""Maximum time of a request for the list of models."""

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
MAX_RESPONSE_BYTES = 16 << 20
MAX_LISTING_BYTES = 1 << 20
MAX_MESSAGE_CHARS = 300

# The comparison of two answers takes quadratic time.
MAX_TOKEN_CHARS = 16
"""Maximum number of characters of an answer per token."""

MAX_ANSWER_CHARS = 20_000
MAX_REGIONS = 300
"""Maximum number of boxes or points of an answer."""

TEMPERATURE = 0.7
"""Temperature of the answers, whose agreement is the confidence."""

TeacherFrame = Literal["auto", "pixels", "thousandths", "thousandths-yx"]
FRAMES: tuple[TeacherFrame, ...] = ("pixels", "thousandths", "thousandths-yx")
"""Frame of the coordinates: pixels of the sent image, or thousandths of its sides, x or y first.

The frame `auto` is that in which the teacher finds a drawn rectangle.
"""

PROBE_SIZE, PROBE_BOX = (480, 640), (320.0, 60.0, 560.0, 180.0)
"""Height and width of the drawn image, and its rectangle in pixels. In another frame, the center of
the rectangle is outside of it."""

MAX_OVERHANG, COORDINATE_DECIMALS = 0.05, 2
"""Largest overhang of a box, as a fraction of the longer side of its image, and its digits."""

OPTIONAL_SETTINGS = ("response_format", "temperature", "n", "max_tokens")
"""Settings that some servers reject by name, or by a word of their value, and receive no more."""

_REASONING = re.compile(r"^.*</think>", re.DOTALL)


class NoAnswerError(Exception):
    """Raised with the reason if an answer is no label, or cannot be requested."""


class TeacherAnswer(NamedTuple):
    """Answer of a teacher, or the problem if it was refused or cut off."""

    text: str
    problem: str = ""

    def truncate(self, max_chars: int) -> TeacherAnswer:
        """Return the answer, or the start of a longer one with this problem."""
        if len(self.text) <= max_chars:
            return self
        problem = f"the answer has {len(self.text)} characters instead of at most {max_chars}"
        return TeacherAnswer(self.text[:max_chars], problem)


class SentImage(NamedTuple):
    """Image in a request, with its height and width, and those of the original."""

    part: dict[str, Any]
    size: ImageSize
    original_size: ImageSize

    @classmethod
    def build(
        cls, content: bytes, image_format: str, size: ImageSize, original_size: ImageSize
    ) -> SentImage:
        """Build the part of a message from an encoded copy of an image."""
        encoded = base64.b64encode(content).decode()
        url = f"data:image/{image_format.lower()};base64,{encoded}"
        part = {"type": "image_url", "image_url": {"url": url}}
        return cls(part, size, original_size)


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """Server and model of a teacher, and the limits of a command.

    Attributes:
        key: Environment variable with the API key, which may be unset.
        answers: Number of answers to each question.
        pixels: Maximum number of pixels of a sent image.
        budget: Maximum number of requests, including retries. None: any.
        concurrency: Number of simultaneous questions.
        max_new_tokens: Maximum number of tokens per answer.
    """

    url: str
    model: str | None
    key: str = "FINESIGHT_TEACHER_KEY"
    boxes: TeacherFrame = "auto"
    answers: int = 3
    pixels: int = 2_000_000
    budget: int | None = None
    concurrency: int = 4
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        """Raise UserError without the address of a server and the name of its model."""
        try:
            parts = urlsplit(self.url)
            is_server = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_server = is_server and not (parts.query or parts.fragment or parts.username)
            is_server = is_server and parts.port != 0
        except ValueError:  # an invalid port or IPv6 address
            is_server = False
        if not is_server or not self.model:
            address = self.url.rpartition("@")[2]  # without a password
            raise UserError(
                f"{address!r:.200} with the model {self.model!r:.200} is no teacher",
                where="--teacher, --teacher-model",
                expected="the address of a server without a user name, such as"
                " http://localhost:8000/v1, and its model",
                remedy="correct the address, or add --teacher-model NAME",
            )

    @property
    def name(self) -> str:
        """Name of the suggestions; samples without one of this name are open."""
        return f"{self.model} ({self.url}, {self.answers} answers, boxes in {self.boxes})"


class Teacher:
    """Asks a teacher for the answers of a session, in threads.

    Attributes:
        num_requests: Number of requests of this command.
        usage: Number of tokens by kind, as the server reports them.
    """

    def __init__(
        self, settings: TeacherSettings, session: LabelSession, log: Callable[[str], None]
    ) -> None:
        """Read the earlier answers of the folder of the session.

        Args:
            log: Receives the number of requests and tokens.
        """
        session.complete_task()
        self._settings, self._log, self._review = settings, log, session.review
        self._images, self._file = session.store.images, session.store.folder / TEACHER_FILE
        frame = settings.boxes if session.task.has_regions else FRAMES[0]
        self._format = AnswerFormat(session.task, frame)
        self._url = settings.url.rstrip("/")
        self._key = os.environ.get(settings.key, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(
                f"the value of {settings.key} contains characters that no HTTP header may have",
                where="--teacher-key",
                expected="an API key of printable ASCII characters",
                remedy=f"set it again: export {settings.key}=KEY",
            )
        self._headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._max_chars = min(MAX_TOKEN_CHARS * settings.max_new_tokens, MAX_ANSWER_CHARS)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._rejected: set[str] = set()
        self.num_requests, self.usage = 0, Counter[str]()
        self._answers: dict[str, list[TeacherAnswer]] = {}
        lines = read_complete_lines(self._file, ANSWER_START)
        remove_incomplete_line(self._file, lines)
        for line in lines:
            with suppress(ValueError, LookupError, TypeError):  # A damaged line is requested again.
                entry = parse_json(line)
                answers = [self._clean(TeacherAnswer(*answer)) for answer in entry["answers"]]
                self._answers.setdefault(entry["key"], []).extend(answers)

    def suggest(
        self, samples: Sequence[LocatedSample], *, on_progress: Callable[[int], None]
    ) -> tuple[list[Suggestion], dict[str, str]]:
        """Ask the teacher about samples whose images are readable.

        Returns:
            The suggestions, and the reason for each sample without one by ID.

        Raises:
            UserError: The server does not answer, or rejects the key, the model or the request.
        """
        suggestions, reasons = list[Suggestion](), dict[str, str]()
        with ThreadPool(self._settings.concurrency) as pool:
            try:
                if self._format.frame == "auto":
                    self._format = replace(self._format, frame=self._find_frame())
                results = _iter_results(pool.imap(self._suggest, samples))
                for sample, found in zip(samples, results, strict=True):
                    if isinstance(found, str):
                        reasons[sample.sample.id] = found
                    else:
                        suggestions.append(found)
                        on_progress(1)
            except NoAnswerError as error:
                return [], {one.sample.id: str(error) for one in samples}
            except BaseException:
                self._stopped.set()  # Its threads send nothing, and the pool waits for none.
                raise
        tokens = ", ".join(f"{count:,} {kind}" for kind, count in self.usage.items())
        self._log(f"teacher: {self.num_requests:,} requests ({tokens or 'no tokens'})")
        return suggestions, reasons

    def _suggest(self, located: LocatedSample) -> Suggestion | str:
        """Return the suggestion for a sample, or the reason why it has none."""
        sample, contents, reason = located.sample, list[AnswerContent](), ""
        try:
            messages, images = self._build_messages(located)
            for answer in self.ask(messages, self._settings.answers, self._format):
                try:
                    contents.append(self._format.parse(answer, images))
                except NoAnswerError as error:
                    reason = str(error)
        except (CorruptImageError, NoAnswerError) as error:
            contents, reason = [], str(error).splitlines()[0]
        if not contents:
            return f"{sample.id}: {reason}"
        size = images[0].original_size if images else DEFAULT_SIZE
        found = self._format.select_answer(sample.id, contents, self._settings.answers, size)
        if self._review:
            agreement = self._format.compare(sample.messages[-1].content, found.content, size)
            found = replace(found, score=(1 - agreement) * found.confidence)
        return found

    def _build_messages(self, located: LocatedSample) -> tuple[list[Any], list[SentImage]]:
        """Return the conversation before the answer as the server reads it, and its images."""
        messages, images = list[Any](), list[SentImage]()
        for turn in located.sample.messages[: -1 if self._review else None]:
            content = list[Any]()
            for part in turn.content:
                if isinstance(part, ImagePart):
                    file = Path(os.path.realpath(located.resolve_path(part.image)))
                    images.append(self._encode(file))
                    content.append(images[-1].part)
                elif isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                else:
                    raise NoAnswerError(f"the teacher receives no part of type {part.type}")
            messages.append({"role": turn.role, "content": content})
        return messages, images

    def _encode(self, path: Path) -> SentImage:
        """Return a copy of an image without metadata, within the limit of pixels."""
        size = self._images.read_size(path)
        scale = min(1.0, math.sqrt(self._settings.pixels / math.prod(size)))
        is_lossless = scale == 1 and path.suffix.lower() == ".png"
        side, image_format = max(1, int(max(size) * scale)), "PNG" if is_lossless else "JPEG"
        _, content, copy_size = self._images.encode(path, side, image_format)
        return SentImage.build(content, image_format, copy_size, size)

    def ask(self, messages: Sequence[Any], count: int, form: AnswerFormat) -> list[TeacherAnswer]:
        """Return answers to a conversation in a form: the known ones, and requested ones.

        Raises:
            NoAnswerError: The known answers are too few, and the budget is used up.
            UserError: See `suggest`.
        """
        body: dict[str, Any] = {"model": self._settings.model, "messages": messages}
        body |= {"temperature": TEMPERATURE, "max_tokens": self._settings.max_new_tokens}
        if schema := form.build_schema():
            text = f"Answer with JSON of this schema only: {json.dumps(schema, ensure_ascii=False)}"
            content = [*messages[-1]["content"], {"type": "text", "text": text}]
            body["messages"] = [*messages[:-1], {**messages[-1], "content": content}]
            strict = {"name": "answer", "strict": "properties" in schema, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": strict}
        key = hashlib.sha256(json.dumps([self._url, body]).encode()).hexdigest()
        known = self._answers.setdefault(key, [])
        while len(known) < count:
            new = self._request({**body, "n": count - len(known)})
            with self._lock:
                append_line(self._file, json.dumps({"key": key, "answers": new}))
                flush_file(self._file)
            known += new
        return known[:count]

    def _request(self, body: Mapping[str, Any]) -> list[TeacherAnswer]:
        """Send a request, again after temporary failures, and return its answers."""
        delays = iter(RETRY_DELAYS_S)
        while True:
            sent = {name: value for name, value in body.items() if name not in self._rejected}
            if "max_tokens" in self._rejected:
                sent["max_completion_tokens"] = body["max_tokens"]
            status, content, requested_s = self._send(sent)
            if status == 200:
                return self._read_answers(content)[: body["n"]]
            message = self._read_message(content)
            named = re.sub("json_(schema|object)", "response_format", message)
            rejected = {*re.findall(r"\w+", named)} & sent.keys() & {*OPTIONAL_SETTINGS}
            if status in (400, 422) and rejected:
                self._rejected |= rejected
                continue
            is_spent = "insufficient_quota" in content
            is_temporary = status in (0, *download.RETRY_STATUSES) and not is_spent
            delay_s = max(next(delays, math.inf), requested_s) if is_temporary else math.inf
            if delay_s > download.MAX_RETRY_DELAY_S:
                raise self._build_error(status, message)
            self._log(f"teacher: next attempt in {delay_s:g} s: {message}")
            if self._stopped.wait(delay_s):
                raise self._build_error(status, message)

    def _send(self, body: Mapping[str, Any]) -> tuple[int, str, int]:
        """Return status, content and requested delay in seconds of a response.

        Without a response, the status is 0, and the content is the reason.

        Raises:
            UserError: The response exceeds a limit.
        """
        with self._lock:
            if self._stopped.is_set():
                raise NoAnswerError("the command is being stopped")
            if self.num_requests == self._settings.budget:
                raise NoAnswerError(f"the budget of {self.num_requests} requests is used up")
            self.num_requests += 1
        try:
            response = send_request(
                "POST",
                f"{self._url}/chat/completions",
                headers=self._headers,
                json=body,
                max_bytes=MAX_RESPONSE_BYTES,
                max_seconds=MAX_REQUEST_SECONDS,
            )
        except ResponseLimitError as error:
            what = f"the server sends {error}"
            raise self._build_error(0, what, is_limit=True) from error
        except httpx2.RequestError as error:
            return 0, f"{type(error).__name__}: {error}", 0
        delay_s = download.parse_int(response.headers.get("retry-after", ""))
        return response.status, response.text, delay_s or 0

    def _read_answers(self, content: str) -> list[TeacherAnswer]:
        """Return the answers of a chat completion, and count its tokens."""
        try:
            completion = parse_json(content)
            answers = [self._clean(_read_choice(one)) for one in completion["choices"]]
            counts = {k: n for k, n in (completion.get("usage") or {}).items() if type(n) is int}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = f"not a chat completion: {self._read_message(content)}"
            raise self._build_error(200, text) from error
        if not answers:
            raise self._build_error(200, "a chat completion without choices")
        with self._lock:
            for kind in ("prompt_tokens", "completion_tokens"):
                self.usage[kind.replace("_", " ")] += counts.get(kind, 0)
        return answers

    def _clean(self, answer: TeacherAnswer) -> TeacherAnswer:
        """Return an answer within the limit of characters, without reasoning and the key."""
        text = self._redact(_REASONING.sub("", answer.text).strip())
        return answer._replace(text=text).truncate(self._max_chars)

    def _redact(self, text: str) -> str:
        """Remove the key from a text, because servers may repeat it."""
        return text.replace(self._key, "***") if self._key else text

    def _read_message(self, content: str) -> str:
        """Return the message of an error without the key."""
        message: Any = content
        with suppress(ValueError):
            message = parse_json(content)
        for name in ("error", "message", "detail"):
            message = message.get(name, message) if isinstance(message, dict) else message
        return self._redact(" ".join(str(message).split()))[:MAX_MESSAGE_CHARS]

    def _list_models(self) -> str | None:
        """Return the names of the models of the server; None if it does not list them."""
        try:
            response = send_request(
                "GET",
                f"{self._url}/models",
                headers=self._headers,
                max_bytes=MAX_LISTING_BYTES,
                max_seconds=MAX_LISTING_SECONDS,
            )
            models = parse_json(response.text)["data"]
            names = ", ".join(str(model["id"]) for model in models)
        except (httpx2.RequestError, ResponseLimitError, ValueError, LookupError, TypeError):
            return None
        return self._redact(names)[:500]

    def _build_error(self, status: int, message: str, *, is_limit: bool = False) -> UserError:
        variable, expected = self._settings.key, "a chat completion"
        remedy = f"run the command again: it requests no answer in {self._file} twice"
        if is_limit:
            limit = f"{MAX_RESPONSE_BYTES} bytes and {MAX_REQUEST_SECONDS:g} s"
            expected = f"a complete response within {limit}"
            remedy = (
                f"reduce --teacher-answers or --max-new-tokens, or use another server; {remedy}"
            )
        elif status in (401, 403):
            expected = f"a valid API key in the environment variable {variable}"
            remedy = f"set it: export {variable}=KEY, or name another one: --teacher-key VARIABLE"
        elif status == 404:
            expected = "the name of a model of the server"
            names = self._list_models()
            if names:
                expected += f": {names}"
            elif names is not None:
                expected += ", which has none"
            remedy = "correct --teacher-model, or the address, which precedes /chat/completions"
        elif status == 413:
            remedy = f"reduce --teacher-pixels, which is {self._settings.pixels}"
        what = f"{f'status {status}: ' if status else ''}{message}"
        return UserError(what, where=f"--teacher {self._url}", expected=expected, remedy=remedy)

    def _find_frame(self) -> TeacherFrame:
        """Return the frame of the coordinates in which the teacher finds a drawn rectangle."""
        content = draw_red_rectangle(PROBE_SIZE, PROBE_BOX)
        image = SentImage.build(content, "PNG", PROBE_SIZE, PROBE_SIZE)
        question = {"type": "text", "text": "Find the red rectangle."}
        form = replace(self._format, task=replace(self._format.task, choices=()))
        (answer,) = self.ask([{"role": "user", "content": [image.part, question]}], 1, form)
        for frame in FRAMES:
            with suppress(NoAnswerError):
                boxes = read_boxes(answer.text, frame, image)
                if boxes and contains_center(PROBE_BOX, boxes[0].xyxy):
                    return frame
        raise UserError(
            f"the frame of the coordinates is unknown: a rectangle at {PROBE_BOX} in an image of"
            f" {PROBE_SIZE[1]} x {PROBE_SIZE[0]} pixels is not at {answer.text!r:.200}",
            where="--teacher-boxes",
            expected=f"a teacher that finds objects in the frame {', '.join(FRAMES)}",
            remedy="name the frame, such as --teacher-boxes thousandths, or another model",
        )


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Form in which a teacher answers the questions of a task: schema, parser and agreement.

    Attributes:
        frame: Frame of the coordinates; `auto` is thousandths with x first.
    """

    task: LabelTask
    frame: TeacherFrame

    def build_schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of the answers; None for a text."""
        choices, is_box = self.task.choices, self.task.kind == "boxes"
        name: dict[str, Any] = {"type": "string"} | ({"enum": [*choices]} if choices else {})
        if self.task.has_regions:
            unit = "pixels" if self.frame == "pixels" else "thousandths of width and height"
            orders = ("x1, y1, x2, y2", "y1, x1, y2, x2") if is_box else ("x, y", "y, x")
            order = orders[self.frame == "thousandths-yx"]
            corners: dict[str, Any] = {"type": "array", "items": {"type": "number"}}
            corners["description"] = f"{order} in {unit} of the image"
            item = _describe_object({"label": name, BOX_KEY if is_box else POINT_KEY: corners})
            return _describe_object({"objects": {"type": "array", "items": item}})
        if self.task.kind == "fields":
            return _describe_value(json.loads(self.task.template or "{}"))
        return _describe_object({"answer": name}) if choices else None

    def parse(self, answer: TeacherAnswer, images: Sequence[SentImage]) -> AnswerContent:
        """Return the label of an answer. Raises NoAnswerError with the reason."""
        text = answer.text
        value = next((found.value for found in iter_json_values(text)), None)
        if answer.problem:
            raise NoAnswerError(f"{answer.problem}: {text!r:.200}")
        if self.task.has_regions:
            boxes = [box for image in images[:1] for box in read_boxes(text, self.frame, image)]
            if len(boxes) > MAX_REGIONS:
                raise NoAnswerError(f"the teacher answers {len(boxes)} {self.task.kind}")
            expects_point = self.task.kind == "points"
            if any(box.is_point != expects_point for box in boxes) or (
                not boxes and value not in ([], {"objects": []})
            ):
                raise NoAnswerError(f"the teacher answers no {self.task.kind}: {text!r:.200}")
            return (*boxes,) or (TextPart(text=NO_OBJECTS_ANSWER),)
        if self.task.kind == "fields":
            if not isinstance(value, dict):
                raise NoAnswerError(f"the teacher answers no JSON object: {text!r:.200}")
            names = json.loads(self.task.template or "{}") or value
            text = json.dumps({name: value.get(name) for name in names}, ensure_ascii=False)
        elif self.task.choices:
            name = fold_text(str(value.get("answer") if isinstance(value, dict) else text))
            text = next((one for one in self.task.choices if fold_text(one) == name), "")
        if not text:
            raise NoAnswerError(f"the teacher answers no text or class: {answer.text!r:.200}")
        return (TextPart(text=text),)

    def compare(
        self, label: Sequence[ContentPart], other: Sequence[ContentPart], size: ImageSize
    ) -> float:
        """Return the agreement of two answers in [0, 1]; see the table of this module."""
        if self.task.kind == "classes":
            return float(normalize_text(get_text(label)) == normalize_text(get_text(other)))
        return 1 - measure_disagreement(label, other, size)

    def select_answer(
        self, sample_id: str, contents: Sequence[AnswerContent], num_answers: int, size: ImageSize
    ) -> Suggestion:
        """Return the answer that agrees most with the others, with confidences."""
        agreements: list[float] = []
        for index, one in enumerate(contents):
            others = [*contents[:index], *contents[index + 1 :]]
            agreements.append(sum(self.compare(one, other, size) for other in others))
        best, num_others = agreements.index(max(agreements)), num_answers - 1
        content, *others = contents[best], *contents[:best], *contents[best + 1 :]
        confidence = agreements[best] / num_others
        totals: dict[tuple[str | int, ...], float] = defaultdict(float)
        boxes = list_boxes(content)
        leaves = [*iter_json_leaves(get_text(content))] if self.task.kind == "fields" else []
        for other in others:
            for index, _, overlap in match_boxes(boxes, list_boxes(other), size):
                totals[index,] += overlap
            values = {leaf.path: leaf.value for leaf in iter_json_leaves(get_text(other))}
            for leaf in leaves:
                totals[leaf.path] += values.get(leaf.path, ()) == leaf.value
        paths = [leaf.path for leaf in leaves] or [(index,) for index in range(len(boxes))]
        parts = tuple(SuggestedPart(path, totals[path] / num_others) for path in paths)
        parts = parts or (SuggestedPart((), confidence),)
        return Suggestion(sample_id, content, confidence, parts)


def read_boxes(text: str, frame: TeacherFrame, image: SentImage) -> list[BoxPart]:
    """Return the boxes or points of an answer in pixels of the original image.

    Raises NoAnswerError for one that exceeds the image by more than a rounding error.
    """
    size = image.original_size
    sent_size = image.size if frame == "pixels" else FRAME_1000
    order: Order = "yxyx" if frame == "thousandths-yx" else "xyxy"
    overhang = MAX_OVERHANG * max(size)
    boxes: list[BoxPart] = []
    for box in read_json_boxes(text, sent_size, size, order):
        x1, y1, x2, y2 = (round(number, COORDINATE_DECIMALS) for number in box.xyxy)
        corners: Box = (x1, y1, x2, y2)
        is_point = box.is_point
        is_inside = is_inside_image(corners, size, overhang, is_point=is_point)
        clipped = clip_box(corners, size, is_point=is_point)
        if clipped is None or not is_inside:
            raise NoAnswerError(f"{corners} is not in the image: check --teacher-boxes")
        boxes.append(create_region(clipped, box.label, is_point=is_point))
    return boxes


def _iter_results(results: IMapIterator[Suggestion | str]) -> Iterator[Suggestion | str]:
    """Yield results in their order, and wait so that Ctrl-C ends the wait.

    A signal that arrives in another thread does not wake a main thread that waits without limit.
    """
    while True:
        try:
            yield results.next(timeout=0.5)
        except NoResultYetError:
            continue
        except StopIteration:
            return


def _read_choice(choice: Mapping[str, Any]) -> TeacherAnswer:
    """Read a choice of a chat completion. Raises LookupError or AttributeError for another."""
    message, reason = choice["message"], choice.get("finish_reason")
    text, refusal = str(message.get("content") or ""), message.get("refusal")
    if refusal or reason == "content_filter":
        return TeacherAnswer(str(refusal or text), "the teacher refuses")
    is_cut_off = reason == "length"
    return TeacherAnswer(text, "cut off by --max-new-tokens" if is_cut_off else "")


def _describe_object(properties: Mapping[str, Any]) -> dict[str, Any]:
    closed = {"required": [*properties], "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}


def _describe_value(value: Any) -> dict[str, Any]:
    """Return the JSON schema of a value of a template, which may be null."""
    if isinstance(value, dict):
        object_schema = _describe_object({k: _describe_value(one) for k, one in value.items()})
        return object_schema if value else {"type": "object"}
    if isinstance(value, list):
        return {"type": "array", "items": _describe_value(value[0] if value else None)}
    kinds = {str: ["string"], bool: ["boolean"], int: ["number"], float: ["number"]}
    return {"type": [*kinds.get(type(value), ["string", "number", "boolean"]), "null"]}
