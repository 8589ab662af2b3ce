"""Suggested labels of a teacher: a model behind an OpenAI-compatible server.

The teacher answers each question several times, in the JSON schema of the task. The suggestion is
the answer that agrees most with the others. An answer that cannot be used agrees with none.

| part | confidence |
|---|---|
| field of a JSON answer | share of the other answers with an equal value |
| box or point | mean overlap with the nearest one of its label in the other answers |
| answer | mean agreement with the others: equality of classes, else 1 - `measure_disagreement` |

`teacher.jsonl` keeps all answers, so that none is requested twice. Redirects are errors: images and
key are sent to the given server only.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx2
from PIL import Image, ImageDraw

from finesight.bounded_files import parse_json
from finesight.data.boxes import (
    BOX_KEY,
    POINT_KEY,
    Box,
    clip_box,
    is_inside_image,
    iter_json_values,
    measure_overlap,
    parse_json_box,
)
from finesight.data.formats.image_annotations import NO_OBJECTS_ANSWER
from finesight.data.image_header import DEFAULT_SIZE, ImageSize
from finesight.data.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    TextPart,
    create_region,
)
from finesight.errors import UserError
from finesight.evaluate.box_metrics import match_boxes
from finesight.evaluate.text_metrics import fold_text, normalize_text
from finesight.hub.download import (
    HTTP_TIMEOUT,
    MAX_RETRY_DELAY_S,
    RETRY_STATUSES,
    parse_int,
)
from finesight.label.label_session import LabelSession, LabelTask
from finesight.label.label_store import (
    AnswerContent,
    SuggestedPart,
    Suggestion,
    get_text,
    read_complete_lines,
)
from finesight.label.suggestion import iter_json_leaves, measure_disagreement
from finesight.storage import append_line, flush_file

TEACHER_FILE = "teacher.jsonl"

TIMEOUT = httpx2.Timeout(300.0, connect=15.0)
"""Timeouts of connecting and of reading the start of an answer, in seconds."""

TOKEN_KINDS = ("prompt", "completion")
COORDINATE_DECIMALS = 2

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
MAX_RESPONSE_BYTES = 16 << 20
MAX_MESSAGE_CHARS = 300

TEMPERATURE = 0.7
"""Temperature of the answers, whose agreement is the confidence."""

BoxFrame = Literal["auto", "pixels", "thousandths", "thousandths-yx"]
FRAMES: tuple[BoxFrame, ...] = ("pixels", "thousandths", "thousandths-yx")
"""Frame of the coordinates: pixels of the sent image, or thousandths of its sides, x or y first.

The frame `auto` is that in which the teacher finds a drawn rectangle.
"""

PROBE_SIZE, PROBE_BOX = (480, 640), (320.0, 60.0, 560.0, 180.0)
"""Height and width of the drawn image, and its rectangle in pixels."""

MIN_PROBE_OVERLAP, MAX_OVERHANG = 0.5, 0.05
"""Least IoU with the drawn rectangle, and largest overhang of a box in sides of its image."""

OPTIONAL_SETTINGS = {
    "response_format": re.compile(r"response_format|json_schema|json_object"),
    "temperature": re.compile(r"\btemperature\b"),
    "n": re.compile(r"\bn\b"),
    "max_tokens": re.compile(r"\bmax_tokens\b"),
}
"""Settings that some servers reject with a message of this kind, and do not receive again."""

_REASONING = re.compile(r"^.*</think>", re.DOTALL)


class UnusableAnswerError(Exception):
    """Raised for an answer that is no label: the reason is its text."""


class BudgetReachedError(Exception):
    """Raised when the command has sent as many requests as the user allows."""


class TeacherAnswer(NamedTuple):
    """Answer of a teacher as text, or the problem that it was refused or cut off."""

    text: str
    problem: str = ""

    @classmethod
    def from_choice(cls, choice: Mapping[str, Any]) -> TeacherAnswer:
        """Read a choice of a chat completion."""
        message = choice["message"]
        text, reason = str(message.get("content") or ""), choice.get("finish_reason")
        if message.get("refusal") or reason == "content_filter":
            return cls(
                text, f"the teacher refuses: {message.get('refusal') or text or reason!r:.200}"
            )
        if reason == "length":
            return cls(text, "the answer is cut off: increase --max-new-tokens")
        return cls(text)


class SentImage(NamedTuple):
    """Image in a request: a data URL, its height and width, and those of the original."""

    url: str
    size: ImageSize
    original_size: ImageSize

    @classmethod
    def build(cls, content: bytes, original_size: ImageSize) -> SentImage:
        """Build the image of the own encoder, which is safe to decode."""
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            media_type = Image.MIME[image.format or ""]
        url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
        return cls(url, (height, width), original_size)

    def to_part(self) -> dict[str, Any]:
        """Return the part of a message."""
        return {"type": "image_url", "image_url": {"url": self.url}}


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
    boxes: BoxFrame = "auto"
    answers: int = 3
    pixels: int = 2_000_000
    budget: int | None = None
    concurrency: int = 4
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        """Raise UserError for an address that is not that of a server."""
        parts = urlsplit(self.url)
        is_plain = not (parts.query or parts.fragment or parts.username)
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
            raise UserError(
                f"{self.url!r:.200} is not the address of a server",
                where="--teacher",
                expected="http:// or https://, host and path, such as http://localhost:8000/v1",
                remedy="correct the address",
            )
        if not self.model:
            raise UserError(
                "the model of the teacher is not given",
                where="--teacher-model",
                expected=f"the name of a model of {self.url}",
                remedy="add --teacher-model NAME",
            )

    @property
    def name(self) -> str:
        """Name of the suggestions; those of other settings are requested again."""
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
        self._settings, self._images = settings, session.store.images
        self._format, self._review = AnswerFormat(session.task), session.review
        self._frame: BoxFrame = settings.boxes if session.task.has_regions else FRAMES[0]
        self._url, self._key = settings.url.rstrip("/"), os.environ.get(settings.key, "")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client, self._log = httpx2.Client(headers=headers, timeout=TIMEOUT), log
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._rejected: set[str] = set()
        self.num_requests, self.usage = 0, Counter[str]()
        self._file = session.store.folder / TEACHER_FILE
        self._answers: dict[str, list[TeacherAnswer]] = {}
        for entry in map(parse_json, read_complete_lines(self._file)):
            known = self._answers.setdefault(entry["key"], [])
            known += [TeacherAnswer(*answer) for answer in entry["answers"]]

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
        with ThreadPoolExecutor(self._settings.concurrency) as threads:
            try:
                if self._frame == "auto":
                    self._frame = threads.submit(self._find_frame).result()
                for sample, found in zip(samples, threads.map(self._suggest, samples), strict=True):
                    if isinstance(found, str):
                        reasons[sample.sample.id] = found
                    else:
                        suggestions.append(found)
                        on_progress(1)
            except BudgetReachedError as error:
                return [], {one.sample.id: str(error) for one in samples}
            except BaseException:
                self._stopped.set()  # Threads do not wait for their next attempt.
                raise
        tokens = " and ".join(f"{count:,} {kind} tokens" for kind, count in self.usage.items())
        self._log(f"teacher: {self.num_requests:,} requests{tokens and f' with {tokens}'}")
        return suggestions, reasons

    def _suggest(self, located: LocatedSample) -> Suggestion | str:
        """Return the suggestion for a sample, or the reason why it has none."""
        sample, contents, reason = located.sample, list[AnswerContent](), ""
        try:
            messages, images = self._build_messages(located)
            for answer in self.ask(messages, self._settings.answers):
                try:
                    contents.append(self._format.parse(answer, self._frame, images))
                except UnusableAnswerError as error:
                    reason = str(error)
            if not contents:
                raise UnusableAnswerError(reason)
        except (BudgetReachedError, UnusableAnswerError) as error:
            return f"{sample.id}: {error}"
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
                    images.append(self._encode(located.resolve_path(part.image)))
                    content.append(images[-1].to_part())
                elif isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                else:
                    raise UnusableAnswerError(f"the teacher receives no part of type {part.type}")
            messages.append({"role": turn.role, "content": content})
        if instruction := self._format.instruct(self._frame):
            messages[-1]["content"].append({"type": "text", "text": instruction})
        return messages, images

    def _encode(self, path: Path) -> SentImage:
        """Return a copy of an image without metadata, within the limit of pixels."""
        size = self._images.read_size(path)
        scale = min(1.0, math.sqrt(self._settings.pixels / math.prod(size)))
        is_lossless = scale == 1 and path.suffix.lower() == ".png"
        side, image_format = max(1, int(max(size) * scale)), "PNG" if is_lossless else "JPEG"
        return SentImage.build(self._images.encode(path, side, image_format)[1], size)

    def ask(self, messages: Sequence[Any], count: int) -> list[TeacherAnswer]:
        """Return answers to a conversation: the known ones, and requested ones.

        Raises:
            BudgetReachedError: The known answers are too few, and the budget is used up.
            UserError: See `suggest`.
        """
        body = {"model": self._settings.model, "messages": messages, "temperature": TEMPERATURE}
        body |= {"max_tokens": self._settings.max_new_tokens, **self._format.build_schema()}
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
                return self._read_answers(content)
            message = self._read_message(content)
            if status in (400, 422) and self._reject_setting(sent, message):
                continue
            is_temporary = status in (0, *RETRY_STATUSES) and "insufficient_quota" not in content
            delay_s = next(delays, None) if is_temporary else None
            if delay_s is None or requested_s > MAX_RETRY_DELAY_S:
                raise self._build_error(status, message)
            if self._stopped.wait(max(delay_s, requested_s)):
                raise self._build_error(status, message)

    def _send(self, body: Mapping[str, Any]) -> tuple[int, str, int]:
        """Return status, content and requested delay in seconds of a response.

        Without a response, the status is 0, and the content is the reason.
        """
        with self._lock:
            if self.num_requests == self._settings.budget:
                raise BudgetReachedError(f"the budget of {self.num_requests} requests is used up")
            self.num_requests += 1
        content, url = bytearray(), f"{self._url}/chat/completions"
        try:
            with self._client.stream("POST", url, json=body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > MAX_RESPONSE_BYTES:
                        return 413, f"a response of over {MAX_RESPONSE_BYTES} bytes", 0
        except httpx2.RequestError as error:
            return 0, f"{type(error).__name__}: {error}", 0
        delay_s = parse_int(response.headers.get("retry-after", ""))
        return response.status_code, content.decode(errors="replace"), delay_s or 0

    def _reject_setting(self, body: Mapping[str, Any], message: str) -> bool:
        """Return whether a message rejects an optional setting, which later requests lack."""
        named = [name for name, words in OPTIONAL_SETTINGS.items() if words.search(message)]
        rejected = [name for name in named if name in body][:1]
        self._rejected.update(rejected)
        return bool(rejected)

    def _read_answers(self, content: str) -> list[TeacherAnswer]:
        """Return the answers of a chat completion, and count its tokens."""
        try:
            completion = parse_json(content)
            answers = [*map(TeacherAnswer.from_choice, completion["choices"])]
            usage = completion.get("usage") or {}
            counts = {name: int(usage.get(f"{name}_tokens") or 0) for name in TOKEN_KINDS}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = f"not a chat completion: {self._read_message(content)}"
            raise self._build_error(200, text) from error
        if not answers:
            raise self._build_error(200, "a chat completion without choices")
        with self._lock:
            self.usage.update(counts)
        return answers

    def _read_message(self, content: str) -> str:
        """Return the message of an error without the key, which servers may repeat."""
        message: Any = content
        with suppress(ValueError):
            message = parse_json(content)
        for name in ("error", "message", "detail"):
            message = message.get(name, message) if isinstance(message, dict) else message
        text = " ".join(str(message).split())
        return (text.replace(self._key, "***") if self._key else text)[:MAX_MESSAGE_CHARS]

    def _build_error(self, status: int, message: str) -> UserError:
        variable, expected = self._settings.key, "a chat completion"
        remedy = f"run the command again: it requests no answer in {self._file} twice"
        if status in (401, 403):
            expected = f"a valid API key in the environment variable {variable}"
            remedy = f"set it: export {variable}=KEY, or name another one: --teacher-key VARIABLE"
        elif status == 404:
            expected = f"the name of a model of the server{self._list_models()}"
            remedy = "correct --teacher-model, or the address, which precedes /chat/completions"
        elif status == 413:
            remedy = f"reduce --teacher-pixels, which is {self._settings.pixels}"
        what = f"{f'status {status}: ' if status else ''}{message}"
        return UserError(what, where=f"--teacher {self._url}", expected=expected, remedy=remedy)

    def _list_models(self) -> str:
        """Return the names of the models of the server; empty if it does not list them."""
        with suppress(httpx2.RequestError, ValueError, LookupError, TypeError):
            models = self._client.get(f"{self._url}/models", timeout=HTTP_TIMEOUT).json()["data"]
            return f": {', '.join(str(model['id']) for model in models):.500}"
        return ""

    def _find_frame(self) -> BoxFrame:
        """Return the frame of the coordinates in which the teacher finds a drawn rectangle."""
        height, width = PROBE_SIZE
        drawing, buffer = Image.new("RGB", (width, height), "white"), io.BytesIO()
        ImageDraw.Draw(drawing).rectangle(PROBE_BOX, fill="red")
        drawing.save(buffer, format="PNG")
        image = SentImage.build(buffer.getvalue(), PROBE_SIZE)
        task = replace(self._format.task, choices=())
        question = f"Find the red rectangle. {AnswerFormat(task).instruct('auto')}"
        content = [image.to_part(), {"type": "text", "text": question}]
        (answer,) = self.ask([{"role": "user", "content": content}], 1)
        reference = self._format.convert(PROBE_BOX)
        overlaps = dict.fromkeys(FRAMES, 0.0)
        for frame in FRAMES:
            with suppress(UnusableAnswerError):
                found = self._format.parse(answer, frame, [image])[0]
                assert isinstance(found, BoxPart), f"{found} is not a box"
                overlaps[frame] = measure_overlap(found.xyxy, reference, PROBE_SIZE)
        best = max(FRAMES, key=lambda frame: overlaps[frame])
        if overlaps[best] < MIN_PROBE_OVERLAP:
            raise UserError(
                f"the frame of the coordinates is unknown: the teacher finds a rectangle at"
                f" {PROBE_BOX} in an image of {width} x {height} pixels at {answer.text!r:.200}",
                where="--teacher-boxes",
                expected=f"a teacher that finds objects in the frame {', '.join(FRAMES)}",
                remedy="name the frame, such as --teacher-boxes thousandths, or another model",
            )
        return best


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Form in which a teacher answers the questions of a task: instruction, schema and parser."""

    task: LabelTask

    @property
    def _template(self) -> Any:
        return json.loads(self.task.template or "{}")

    def instruct(self, frame: BoxFrame) -> str:
        """Return the instruction after a question; empty for the kind text."""
        names = ", ".join(self.task.choices)
        if self.task.has_regions:
            numbers = "x1, y1, x2, y2" if self.task.kind == "boxes" else "x, y"
            if frame == "thousandths-yx":
                numbers = "y1, x1, y2, x2" if self.task.kind == "boxes" else "y, x"
            item = f'{{"label": "NAME", "{self._key}": [{numbers}]}}'
            unit = "pixels" if frame == "pixels" else "thousandths of the width and height"
            labels = f" The labels are: {names}." if names else ""
            return (
                f'Answer with JSON only: {{"objects": [{item}, ...]}}. The coordinates are'
                f" {unit} of the image. Without objects, the list is empty.{labels}"
            )
        if self.task.kind == "fields":
            form = f" in the form {self.task.template}, with null for missing values"
            return f"Answer with a JSON object only{form if self._template else ''}."
        if not names:
            return ""
        return f'Answer with JSON only: {{"answer": CLASS}}. The classes are: {names}.'

    @property
    def _key(self) -> str:
        return BOX_KEY if self.task.kind == "boxes" else POINT_KEY

    def build_schema(self) -> dict[str, Any]:
        """Return the setting `response_format` of a request; empty for a text."""
        if self.task.has_regions:
            item = {"label": _describe_name(self.task.choices), self._key: NUMBERS}
            objects = {"type": "array", "items": _describe_object(item)}
            schema = _describe_object({"objects": objects})
        elif self.task.kind == "fields" and not self._template:
            return {"response_format": {"type": "json_object"}}
        elif self.task.kind == "fields":
            schema = _describe_value(self._template)
        elif self.task.choices:
            schema = _describe_object({"answer": _describe_name(self.task.choices)})
        else:
            return {}
        form = {"name": "answer", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": form}}

    def parse(
        self, answer: TeacherAnswer, frame: BoxFrame, images: Sequence[SentImage]
    ) -> AnswerContent:
        """Return the label of an answer. Raises UnusableAnswerError with the reason."""
        if answer.problem:
            raise UnusableAnswerError(answer.problem)
        text = _REASONING.sub("", answer.text).strip()
        value = next((found.value for found in iter_json_values(text)), None)
        if self.task.has_regions:
            items = value.get("objects", [value]) if isinstance(value, dict) else value
            if not isinstance(items, list):
                raise UnusableAnswerError(f"the teacher answers no JSON of objects: {text!r:.200}")
            boxes = tuple(self._parse_box(item, frame, images) for item in items)
            return boxes or (TextPart(text=NO_OBJECTS_ANSWER),)
        if self.task.kind == "fields":
            if not isinstance(value, dict):
                raise UnusableAnswerError(f"the teacher answers no JSON object: {text!r:.200}")
            names = self._template or value
            text = json.dumps({name: value.get(name) for name in names}, ensure_ascii=False)
        elif self.task.choices:
            name = fold_text(str(value.get("answer") if isinstance(value, dict) else text))
            text = next((one for one in self.task.choices if fold_text(one) == name), "")
        if not text:
            raise UnusableAnswerError(f"the teacher answers no class or text: {answer.text!r:.200}")
        return (TextPart(text=text),)

    def _parse_box(self, item: object, frame: BoxFrame, images: Sequence[SentImage]) -> BoxPart:
        """Return a box or point in pixels of the original image."""
        numbers, label = parse_json_box(item) or ((), None)
        expected = 4 if self.task.kind == "boxes" else 2
        kinds = {type(number) for number in numbers} if isinstance(numbers, list) else {str}
        if not kinds <= {int, float} or len(numbers) != expected or not images:
            raise UnusableAnswerError(f"no object with {self._key} and label: {item!s:.200}")
        if frame == "thousandths-yx":
            numbers = [numbers[index ^ 1] for index in range(expected)]
        height, width = images[0].original_size
        rows, columns = images[0].size if frame == "pixels" else (1000, 1000)
        scales = (width / columns, height / rows) * 2
        scaled = zip(numbers * (4 // expected), scales, strict=True)
        x1, y1, x2, y2 = (round(number * scale, COORDINATE_DECIMALS) for number, scale in scaled)
        size, overhang = (height, width), MAX_OVERHANG * max(height, width)
        is_point = expected == 2
        is_inside = is_inside_image((x1, y1, x2, y2), size, overhang, is_point=is_point)
        clipped = clip_box((x1, y1, x2, y2), size, is_point=is_point) if is_inside else None
        if clipped is None:
            raise UnusableAnswerError(f"{numbers} is not in the image: check --teacher-boxes")
        return create_region(clipped, label, is_point=is_point)

    def convert(self, box: Box) -> Box:
        """Return a box, or the point in its center if the answers are points."""
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        return (x, y, x, y) if self.task.kind == "points" else box

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
        agreements = [sum(self.compare(one, two, size) for two in contents) - 1 for one in contents]
        best, num_others = agreements.index(max(agreements)), max(1, num_answers - 1)
        content, confidence = contents[best], agreements[best] / num_others
        others = [*contents[:best], *contents[best + 1 :]]
        totals: dict[tuple[str | int, ...], float] = {}
        if boxes := _list_boxes(content):
            totals = {(index,): 0.0 for index in range(len(boxes))}
            for other in others:
                for index, _, overlap in match_boxes(boxes, _list_boxes(other), size):
                    totals[index,] += overlap
        elif self.task.kind == "fields":
            values, *other_values = [
                {leaf.path: leaf.value for leaf in iter_json_leaves(get_text(one))}
                for one in (content, *others)
            ]
            totals = {
                path: sum(path in one and one[path] == value for one in other_values)
                for path, value in values.items()
            }
        parts = [SuggestedPart(path, total / num_others) for path, total in totals.items()]
        parts = parts or [SuggestedPart((), confidence)]
        return Suggestion(sample_id, content, confidence, tuple(parts))


NUMBERS = {"type": "array", "items": {"type": "number"}}


def _list_boxes(content: AnswerContent) -> list[BoxPart]:
    return [part for part in content if isinstance(part, BoxPart)]


def _describe_name(choices: Sequence[str]) -> dict[str, Any]:
    return {"type": "string", "enum": [*choices]} if choices else {"type": "string"}


def _describe_object(properties: Mapping[str, Any]) -> dict[str, Any]:
    closed = {"required": [*properties], "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}


def _describe_value(value: Any) -> dict[str, Any]:
    """Return the JSON schema of a value of a template, which may be missing."""
    if isinstance(value, dict):
        return _describe_object({name: _describe_value(one) for name, one in value.items()})
    if isinstance(value, list):
        return {"type": "array", "items": _describe_value(value[0] if value else None)}
    kinds = {str: ["string"], bool: ["boolean"], int: ["number"], float: ["number"]}
    return {"type": [*kinds.get(type(value), ["string", "number", "boolean"]), "null"]}
