"""The sample format and its JSON Lines files: conversations about images, boxes and tool calls.

A JSONL file contains one sample per line, and paths are relative to its folder. Boxes are `[x1, y1,
x2, y2]` in pixels of the original image after EXIF rotation, with the origin at the top left. Size
limits protect the loader from corrupt and malicious files.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    StrictBool,
    ValidationError,
    model_validator,
)

from finesight.errors import Remedy, Step, UserError, describe_indices, suggest_name
from finesight.files import storage
from finesight.files.bounded_files import (
    is_utf8,
    parse_json,
    parse_unique_json,
    translate_os_errors,
)
from finesight.samples.boxes import InvalidBoxError, find_coordinates, is_inside_image
from finesight.samples.frames import Box
from finesight.samples.line_index import UTF8_BOM, IndexedLines, open_data_file, read_lines

MAX_BOXES = 10_000
"""Maximum number of boxes in a sample, which are about 300,000 tokens as text."""

MAX_PARTS = 30_000
"""Maximum number of content parts (texts, images, videos and boxes) in a sample."""

MAX_MESSAGES = 10_000

MAX_ANSWERS = 10_000
"""Maximum number of answers to a question. Each becomes a training sample or a reference."""

MAX_LABEL_FILE_BYTES = 2**24

MAX_DESCRIPTION_BYTES = 2**19
"""Maximum number of bytes of a YAML dataset description, parsed in up to 5 s."""


MAX_CONTAINERS = 1_000_000
"""Maximum number of lists and objects in the JSON of a row.

An empty list takes 2 to 3 bytes of text but 72 bytes of memory.
"""


class InvalidRowError(UserError):
    """Raised for content of a dataset row that its format does not allow."""

    def __init__(
        self, what: str, expected: str = "", remedy: str = "correct the row", *, where: str = ""
    ) -> None:
        super().__init__(what, where=where, expected=expected, remedy=remedy)


class LimitExceededError(UserError):
    """Raised when a sample has too many boxes, parts, messages, answers or bytes."""


def check_json(content: bytes, where: str) -> None:
    """Reject JSON with too many lists and objects before it is parsed.

    Brackets are counted without parsing, so brackets inside strings count as well.

    Raises:
        LimitExceededError: There are more than `MAX_CONTAINERS` brackets. `where` is the location
            in the error message.
    """
    if len(content) > MAX_CONTAINERS:
        found = content.count(b"[") + content.count(b"{")
        check_limit(found, MAX_CONTAINERS, "lists and objects", where)


def check_limit(count: int, limit: int, what: str, where: str = "") -> None:
    """Raise LimitExceededError if a count exceeds its limit."""
    if count > limit:
        raise LimitExceededError(
            f"{count:,} {what}",
            where=where,
            expected=f"at most {limit:,} {what} in a sample",
            remedy="split the sample, or remove it",
        )


@contextmanager
def translate_errors(
    what: str,
    expected: str,
    remedy: str,
    where: str = "",
    kinds: tuple[type[Exception], ...] = (ValueError,),
) -> Iterator[None]:
    """Convert an error of parsing untrusted content to a UserError, which contains its text."""
    try:
        yield
    except kinds as error:
        what = f"{what}: {error}"
        raise UserError(what, where=where, expected=expected, remedy=remedy) from error


class FrozenModel(BaseModel):
    """Base class of samples and their parts: immutable, unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(FrozenModel):
    type: Literal["text"] = "text"
    text: str


class ImagePart(FrozenModel):
    type: Literal["image"] = "image"
    image: str


DEFAULT_FPS = 2.0
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv")


def is_video_path(path: Path | str) -> bool:
    """Return whether a path has the suffix of a video file."""
    return str(path).lower().endswith(VIDEO_SUFFIXES)


class VideoPart(FrozenModel):
    """A video: the images of its frames, or a video file of which frames are sampled.

    Attributes:
        fps: Frame rate of `frames`, or the number of frames to sample per second of the file.
    """

    type: Literal["video"] = "video"
    frames: tuple[str, ...] = ()
    video: str | None = None
    fps: float = Field(default=DEFAULT_FPS, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_source(self) -> VideoPart:
        if (self.video is None) == (not self.frames):
            raise ValueError("a video with either `video`, a file, or `frames`, a list of images")
        return self


def format_number(value: float) -> int | float:
    """Convert a number without a fractional part to an integer, for compact JSON."""
    if value.is_integer():
        return int(value)
    return value


PixelCoordinate = Annotated[float, PlainSerializer(format_number, when_used="json")]
"""A coordinate in pixels; a whole number is written to JSON as an integer."""


Corners = tuple[PixelCoordinate, PixelCoordinate, PixelCoordinate, PixelCoordinate]


class BoxPart(FrozenModel):
    """A bounding box in one image of the sample.

    Attributes:
        image: 0-based index among the image parts of the sample.
        label: Name of the object, None without a label.
        xyxy: Two corners, `[x1, y1, x2, y2]`, in pixels of the original image.
    """

    is_point: ClassVar[bool] = False

    type: Literal["box"] = "box"
    image: int = Field(default=0, ge=0)
    label: str | None = None
    xyxy: Corners


def _repeat_point(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"[x, y] in pixels instead of {value!r:.60}")
    x, y = value
    return x, y, x, y


class PointPart(BoxPart):
    """A point in one image: a box without an area.

    Attributes:
        xyxy: The point twice. JSON data has it once, `[x, y]` under the key `xy`.
    """

    is_point = True

    type: Literal["point"] = "point"  # type: ignore[assignment]
    xyxy: Annotated[
        Corners, BeforeValidator(_repeat_point), PlainSerializer(lambda xyxy: xyxy[:2])
    ] = Field(alias="xy")


def create_region(xyxy: Box, label: str | None, *, is_point: bool, image: int = 0) -> BoxPart:
    """Create a box part, or the point part of two equal corners."""
    if not is_point:
        return BoxPart(image=image, label=label, xyxy=xyxy)
    return PointPart.model_validate({"image": image, "label": label, "xy": xyxy[:2]})


def _restore_point(box: BoxPart) -> BoxPart:
    is_point = box.xyxy[:2] == box.xyxy[2:]
    return create_region(box.xyxy, box.label, is_point=is_point, image=box.image)


Regions = tuple[Annotated[BoxPart, AfterValidator(_restore_point)], ...]
"""Boxes of predictions in files, where points have equal corners."""


def list_coordinates(part: BoxPart) -> list[int | float]:
    """Return the corners of a box, or the two coordinates of a point, as JSON data."""
    if part.is_point:
        return list(map(format_number, part.xyxy[:2]))
    return list(map(format_number, part.xyxy))


TOOL_CALL_START = "<tool_call>"
TOOL_CALL_END = "</tool_call>"


class ToolCallPart(FrozenModel):
    """A call of a tool by the assistant, with its arguments as JSON data."""

    type: Literal["tool_call"] = "tool_call"
    name: str = Field(pattern=r'^[^"\\<>\x00-\x1f]{1,256}$')
    arguments: dict[str, Any] = Field(default_factory=dict)

    def to_text(self) -> str:
        """Return name and arguments as JSON in tags, as Qwen2.5 and Qwen3-VL write a call."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        call = f'{{"name": "{self.name}", "arguments": {arguments}}}'
        return f"{TOOL_CALL_START}\n{call}\n{TOOL_CALL_END}"

    @classmethod
    def from_json(cls, value: object) -> ToolCallPart | None:
        """Build a call from JSON data with name and arguments, or return None if it is invalid.

        The data may be under `function`, and the arguments may be JSON text, as in the OpenAI API.
        """
        if not isinstance(value, dict):
            return None
        call = value.get("function", value)
        if not isinstance(call, dict):
            return None
        arguments = call.get("arguments") or {}
        try:
            if isinstance(arguments, str):
                arguments = parse_unique_json(arguments)
            json.dumps(arguments, allow_nan=False)
            return cls.model_validate({"name": call.get("name"), "arguments": arguments})
        except (ValueError, TypeError):
            return None


ContentPart = Annotated[
    TextPart | ImagePart | VideoPart | BoxPart | PointPart | ToolCallPart, Discriminator("type")
]


Role = Literal["system", "user", "assistant", "tool"]


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    return value


class Message(FrozenModel):
    """A turn of a conversation; a turn of the role `tool` is the result of a tool call.

    Attributes:
        loss: Whether training uses the answer, if the turn is one.
    """

    role: Role
    content: Annotated[tuple[ContentPart, ...], BeforeValidator(_as_parts)]
    loss: bool = True


TOOL_CALL_TEXT = re.compile(rf"(?s)(?<!\s)\s*+{TOOL_CALL_START}(?P<call>.*?){TOOL_CALL_END}")
_XML_CALL = re.compile(r"<function=(?P<name>[^>\n]+)>(?P<arguments>.*)</function>", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_XML_ARGUMENT_END = "</parameter>"
_XML_CONSTANTS = {"True": True, "False": False, "None": None}


def find_tool_calls(text: str) -> list[str]:
    """Return the texts between the tags of the complete tool calls of an answer."""
    # Start tags after the last end tag would each be searched up to the end of the text.
    end = text.rfind(TOOL_CALL_END) + len(TOOL_CALL_END)
    return [match["call"] for match in TOOL_CALL_TEXT.finditer(text, 0, end)]


def parse_tool_call(text: str, tools: Sequence[dict[str, Any]] = ()) -> ToolCallPart | None:
    """Parse the text between the tags of a tool call, or return None if it is invalid.

    The text is JSON, or XML as in Qwen3.5. An argument in XML is a text if the definition of the
    tool says so, else JSON if it can be parsed.
    """
    match = _XML_CALL.fullmatch(text.strip())
    if match is None:
        try:
            return ToolCallPart.from_json(parse_json(text))
        except ValueError:
            return None
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    function = functions.get(match["name"], {})
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    arguments: dict[str, Any] = {}
    content = match["arguments"]
    end = content.rfind(_XML_ARGUMENT_END) + len(_XML_ARGUMENT_END)
    for name, value in _XML_ARGUMENT.findall(content, 0, end):
        definition = properties.get(name)
        if isinstance(definition, dict) and definition.get("type") == "string":
            arguments[name] = value
        else:
            arguments[name] = _parse_xml_value(value)
    return ToolCallPart.from_json({"name": match["name"], "arguments": arguments})


def _parse_xml_value(text: str) -> Any:
    """Parse an argument as JSON or a constant of Python, or return the text."""
    try:
        return parse_json(text)
    except ValueError:
        return _XML_CONSTANTS.get(text, text)


def check_tool(tool: Any) -> dict[str, Any]:
    """Return the definition of a tool unchanged, or raise ValueError if it is invalid."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if (
        function is not None
        and tool.get("type") == "function"
        and isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("parameters") or {}, dict)
        and to_json_data(tool) == tool
    ):
        return dict(tool)
    raise ValueError('{"type": "function", "function": {"name": ..., "parameters": {...}}}')


ToolDefinition = Annotated[dict[str, Any], AfterValidator(check_tool)]
"""Definition of a tool as in the OpenAI API: a function with the JSON schema of its parameters."""


class Sample(FrozenModel):
    """A conversation about images for training or evaluation.

    Attributes:
        rejected: Worse answer than the last message, in a preference pair; empty without a pair.
        label: Whether the last message is a desirable answer; None without a verdict.
        references: Further correct answers to the last user turn, used only for scoring.
        tools: Definitions of the tools that the assistant may call.
    """

    id: str
    tools: tuple[ToolDefinition, ...] = ()
    messages: tuple[Message, ...] = Field(min_length=1)
    rejected: Annotated[tuple[ContentPart, ...], BeforeValidator(_as_parts)] = ()
    label: StrictBool | None = None
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = Field(default_factory=dict)

    @property
    def rejected_messages(self) -> tuple[Message, ...]:
        """Messages with the rejected answer instead of the last one."""
        return *self.messages[:-1], self.messages[-1].model_copy(update={"content": self.rejected})

    def iter_parts(self) -> Iterator[ContentPart]:
        """Yield the content parts of all messages in order, without the rejected answer."""
        for message in self.messages:
            yield from message.content

    def map_paths(self, rename: Callable[[str], str]) -> Sample:
        """Return a copy with each image, frame and video path replaced by `rename(path)`."""
        return self.with_parts(lambda part: _map_part_paths(part, rename))

    def with_parts(self, changed: Callable[[ContentPart], ContentPart]) -> Sample:
        """Return a copy with each content part replaced by `changed(part)`."""
        messages = []
        for message in self.messages:
            parts = tuple(map(changed, message.content))
            if all(map(operator.is_, parts, message.content)):
                messages.append(message)
            else:
                messages.append(message.model_copy(update={"content": parts}))
        rejected = tuple(map(changed, self.rejected))
        return self.model_copy(update={"messages": tuple(messages), "rejected": rejected})


def find_box_slots(content: Sequence[ContentPart]) -> set[int]:
    """Return the indices of the boxes that are coordinates in JSON, written in the texts."""
    pieces = [part.text if isinstance(part, TextPart) else part for part in content]
    return {n for n in find_coordinates(pieces) if isinstance(content[n], BoxPart)}


def join_text(content: Iterable[ContentPart], separator: str = "") -> str:
    """Return the concatenated texts and tool calls of a message, without images and boxes.

    Without a separator, JSON in the text has the coordinates of its boxes, in pixels.
    """
    parts = list(content)
    slots = set() if separator else find_box_slots(parts)
    pieces = []
    for index, part in enumerate(parts):
        if isinstance(part, BoxPart):
            if index in slots:
                pieces.append(json.dumps(list_coordinates(part)))
        elif isinstance(part, TextPart):
            pieces.append(part.text)
        elif isinstance(part, ToolCallPart):
            pieces.append(part.to_text())
    return separator.join(pieces)


def list_media_paths(part: ContentPart) -> tuple[str, ...]:
    """Return the paths of images, video frames and video files of a content part."""
    if isinstance(part, ImagePart):
        return (part.image,)
    if isinstance(part, VideoPart):
        if part.video is None:
            return part.frames
        return (part.video,)
    return ()


def expand_images(
    content: Iterable[ContentPart], list_pages: Callable[[str], Iterable[str]]
) -> tuple[ContentPart, ...]:
    """Replace each image of a message by images of its pages."""
    parts: list[ContentPart] = []
    for part in content:
        if isinstance(part, ImagePart):
            parts += (ImagePart(image=page) for page in list_pages(part.image))
        else:
            parts.append(part)
    return tuple(parts)


def _map_part_paths(part: ContentPart, rename: Callable[[str], str]) -> ContentPart:
    if isinstance(part, ImagePart):
        return ImagePart(image=rename(part.image))
    if isinstance(part, VideoPart):
        video = part.video
        if video is not None:
            video = rename(video)
        return VideoPart(frames=tuple(map(rename, part.frames)), video=video, fps=part.fps)
    return part


MAX_LISTED_ROLES = 10
"""Maximum number of roles listed in an error message; further roles are counted."""


class InvalidTurnsError(UserError):
    """Raised when a sample has an invalid role order, no answer, or an empty turn."""


class EmptyAnswerError(InvalidTurnsError):
    """Raised when a dataset row has no answer."""


def validate_sample(sample: Sample, where: str, *, require_answer: bool = True) -> None:
    """Raise UserError if a sample is invalid for training or evaluation.

    Messages are an optional system message, followed by alternating user and assistant messages
    that start with the user. The results of tool calls may follow an assistant message, before the
    next user message or instead of it. Images are in user turns and tool results. Boxes have a
    positive area and a valid image index. Whether a box is inside its image is checked by imports
    and the renderer, which read the image header.
    """
    check_messages(sample.messages, sample.references, where, answered=require_answer)
    validate_rejected(sample, where)
    if sample.rejected:
        check_messages(sample.rejected_messages, (), f"{where}, rejected")


def validate_rejected(sample: Sample, where: str) -> None:
    """Raise UserError if a rejected answer has a label, or no different chosen answer."""
    if not sample.rejected and sample.label is None:
        return
    validate_roles(sample.messages, where)
    remedy = "correct the rejected answer, or remove the sample"
    if sample.rejected and sample.label is not None:
        what = f"a rejected answer and the label {str(sample.label).lower()}"
        remedy = "remove one of the two"
    elif not sample.messages[-1].loss:
        what = f"`loss` is false in the chosen answer of {len(sample.messages)} turns"
    elif sample.rejected == sample.messages[-1].content:
        what = "a rejected answer equal to the chosen one"
    else:
        return
    expected = "two different answers, or one with a label, with loss for the chosen one"
    raise InvalidRowError(what, expected, remedy, where=where)


def check_messages(
    messages: Sequence[Message], references: Sequence[str], where: str, *, answered: bool = True
) -> None:
    """Validate the messages and references of a sample; see `validate_sample`."""
    check_limits(messages, references, where)
    validate_roles(messages, where, require_answer=answered)
    num_images = 0
    boxes: list[BoxPart] = []
    for number, message in enumerate(messages):
        kinds = {part.type for part in message.content if part.type != "text" or part.text.strip()}
        images = [part.image for part in message.content if part.type == "image"]
        if video := next(filter(is_video_path, images), None):
            raise build_video_as_image_error(video, f"{where}, message {number}")
        num_images += len(images)
        boxes += (part for part in message.content if isinstance(part, BoxPart))
        if kinds & {"image", "video"} and message.role not in ("user", "tool"):
            what = "an image in a turn"
            expected = "images in user turns and tool results only"
            remedy = "move the image to a user turn"
        elif "tool_call" in kinds and message.role != "assistant":
            what = "a tool call in a turn"
            expected = "tool calls in assistant turns"
            remedy = "move the call to an assistant turn"
        elif kinds or message.role == "tool":
            continue
        else:
            what = "an empty turn"
            expected = "text, an image or a box"
            remedy = "add it, or remove the sample"
        raise InvalidTurnsError(
            f"{what} of the {message.role}",
            where=f"{where}, message {number}",
            expected=expected,
            remedy=remedy,
        )
    losses = [turn.loss for turn in messages if turn.role == "assistant"]
    if answered and not any(losses):
        raise InvalidTurnsError(
            f"`loss` is false in all {len(losses)} answers",
            where=where,
            expected="at least one answer to train on",
            remedy="remove the sample, or `loss` from an answer",
        )
    for box in boxes:
        _validate_box(box, num_images, where)


def build_video_as_image_error(path: str, where: str = "") -> InvalidRowError:
    """Return the error for an image part that refers to a video file."""
    return InvalidRowError(
        f"the video file {path} in an image part",
        'a part of the type "video"',
        'replace it by {"type": "video", "video": PATH}',
        where=where,
    )


def check_limits(messages: Sequence[Message], references: Sequence[str], where: str) -> None:
    """Reject a sample with too many messages, references, parts or boxes.

    Raises:
        LimitExceededError: A limit is exceeded. `where` is the location in the error message.
    """
    check_limit(len(messages), MAX_MESSAGES, "messages", where)
    check_limit(len(references), MAX_ANSWERS, "references", where)
    num_parts = sum(len(message.content) for message in messages)
    if num_parts > MAX_BOXES:
        num_boxes = 0
        for message in messages:
            num_boxes += sum(part.type in ("box", "point") for part in message.content)
        check_limit(num_boxes, MAX_BOXES, "boxes", where)
        check_limit(num_parts, MAX_PARTS, "parts", where)


_TURN_ORDER = re.compile("s?u(?:a(?:u|t+u?))*a?")
"""Valid order of turns, by the first letters of their roles."""


def validate_roles(messages: Sequence[Message], where: str, *, require_answer: bool = True) -> None:
    """Raise InvalidTurnsError if the messages have an invalid role order; see `validate_sample`."""
    roles = [message.role for message in messages]
    if not _TURN_ORDER.fullmatch("".join(role[0] for role in roles)):
        raise InvalidTurnsError(
            f"the message roles are {_format_roles(roles)}",
            where=where,
            expected="an optional system, then user and assistant in turn, starting with user;"
            " tool results follow the assistant",
            remedy="reorder the messages; merge consecutive turns of the same role",
        )
    if require_answer and roles[-1] != "assistant":
        raise InvalidTurnsError(
            f"the message roles are {_format_roles(roles)}: no answer at the end",
            where=where,
            expected="an assistant message at the end",
            remedy="add the answer, or remove the sample (only prediction needs no answer)",
        )


def _format_roles(roles: Sequence[str]) -> str:
    listed = ", ".join(roles[:MAX_LISTED_ROLES])
    num_more = len(roles) - MAX_LISTED_ROLES
    if num_more > 0:
        return f"{listed} and {num_more} more"
    return listed


def _validate_box(box: BoxPart, num_images: int, where: str) -> None:
    if box.image >= num_images:
        raise InvalidBoxError(
            f"a box in image {box.image} (0-based)",
            where=where,
            expected=describe_indices(num_images, "image"),
            remedy="correct the box's `image`, or add the image",
        )
    if not is_inside_image(box.xyxy, (math.inf, math.inf), is_point=box.is_point):
        if box.is_point:
            expected = "[x, y] in pixels, at least 0"
        else:
            expected = "[x1, y1, x2, y2] in pixels with 0 <= x1 < x2 and 0 <= y1 < y2"
        raise InvalidBoxError(
            f"the {box.type} {list(box.xyxy)}",
            where=where,
            expected=expected,
            remedy=f"correct or remove the {box.type}; an import converts those of other formats",
        )


PART_TYPES: tuple[type[FrozenModel], ...] = (
    TextPart,
    ImagePart,
    VideoPart,
    BoxPart,
    PointPart,
    ToolCallPart,
)


def _list_keys(model: type[FrozenModel]) -> tuple[str, ...]:
    return tuple(field.alias or name for name, field in model.model_fields.items())


_MODELS: tuple[type[FrozenModel], ...] = (Sample, Message, *PART_TYPES)
SAMPLE_KEYS = tuple(dict.fromkeys(name for model in _MODELS for name in _list_keys(model)))

FOREIGN_KEYS = frozenset(
    ("image", "images", "conversations", "conversation", "query", "response", "objects")
)
"""Keys that identify a row of another dataset format rather than a sample."""


@dataclass(frozen=True, slots=True)
class LocatedSample:
    """A sample with the folder of its image paths, and for a baseline the answer to another one."""

    sample: Sample
    folder: Path
    mismatched: Message | None = None

    def resolve_path(self, name: str) -> Path:
        """Return the file path of an image or video frame of the sample."""
        return self.folder / name


def read_samples(path: Path, *, require_answer: bool = True) -> list[Sample]:
    """Read and validate all samples of a JSONL file. Blank lines are skipped.

    Image paths are returned as stored in the file.
    """
    samples = []
    for line, where in read_lines(path):
        samples.append(parse_sample(line, where))
        validate_sample(samples[-1], where, require_answer=require_answer)
    if not samples:
        raise build_no_samples_error(path)
    return samples


class JsonlSamples(IndexedLines):
    """Random access to the samples of an indexed JSONL file."""

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample by index and check its types."""
        return LocatedSample(parse_sample(self[index], self.location(index)), self.path.parent)


def open_jsonl_samples(path: Path) -> JsonlSamples:
    """Open and index a JSONL file without parsing its samples."""
    if path.suffix.lower() in (".csv", ".tsv", ".xlsx") and path.is_file():
        raise UserError(
            "is a table, not a file of samples",
            where=str(path),
            expected="a .jsonl, .parquet or .tar file of samples",
            remedy=Step("init", {"data": str(path)}, "import it"),
        )
    return JsonlSamples.open(path)


_IMPORT = Step("import", {"source": "SOURCE", "out": "OUT"}, "import the file first")


def build_no_samples_error(path: Path | str) -> UserError:
    """Return the error for a data file that contains no samples."""
    return UserError(
        "contains no samples",
        where=str(path),
        expected="one sample per line",
        remedy=replace(_IMPORT, purpose="create the file by an import"),
    )


def write_samples(path: Path, samples: Iterable[Sample], *, replace: bool = True) -> None:
    """Write samples to a JSONL file atomically, in the format of `read_samples`.

    Args:
        replace: Whether an existing file is replaced; otherwise, it raises UserError.
    """
    storage.write_chunks(path, encode_samples(samples), replace=replace)


def encode_samples(samples: Iterable[Sample]) -> Iterator[bytes]:
    """Encode samples as lines of a JSONL file."""
    for sample in samples:
        yield f"{encode_json_line(sample_to_dict(sample))}\n".encode()


encode_json_line = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
"""Encode JSON data as one line of text.

The text may contain lone surrogates, which cannot be encoded as UTF-8.
"""


def sample_to_dict(sample: Sample, renamed: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Convert a sample to JSON data without empty keys.

    Args:
        renamed: Function that maps each image and frame path to the path to write. None keeps them.
    """
    return {"id": sample.id, **sample_fields(sample, renamed or str)}


def sample_fields(sample: Sample, renamed: Callable[[str], str]) -> dict[str, Any]:
    """Build the JSON data of a sample without its ID; see `sample_to_dict`."""
    record: dict[str, Any] = {}
    if sample.tools:
        record["tools"] = list(sample.tools)
    record["messages"] = [_message_record(message, renamed) for message in sample.messages]
    if sample.rejected:
        record["rejected"] = [_part_record(part, renamed) for part in sample.rejected]
    if sample.label is not None:
        record["label"] = sample.label
    if sample.references:
        record["references"] = list(sample.references)
    if sample.meta:
        record["meta"] = to_json_data(sample.meta)
    return record


def _message_record(message: Message, renamed: Callable[[str], str]) -> dict[str, Any]:
    parts = [_part_record(part, renamed) for part in message.content]
    record: dict[str, Any] = {"role": message.role, "content": parts}
    if not message.loss:
        record["loss"] = False
    return record


def _part_record(part: ContentPart, renamed: Callable[[str], str]) -> dict[str, Any]:
    # Comparing the tag is faster than isinstance: the metaclass of pydantic models is ABCMeta.
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "image":
        return {"type": "image", "image": renamed(part.image)}
    if part.type == "video":
        if part.video is not None:
            return {"type": "video", "video": renamed(part.video), "fps": part.fps}
        return {"type": "video", "frames": list(map(renamed, part.frames)), "fps": part.fps}
    if part.type == "tool_call":
        return {"type": "tool_call", "name": part.name, "arguments": part.arguments}
    record: dict[str, Any] = {"type": part.type, "image": part.image}
    if part.label is not None:
        record["label"] = part.label
    key = "xy" if part.is_point else "xyxy"
    record[key] = list_coordinates(part)
    return record


def to_json_data(value: Any) -> Any:
    """Convert a value to JSON data: NaN and infinity become null, unsupported types become text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_json_data(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_data(one) for one in value]
    return str(value)


def remove_nulls(value: Any, kept: Collection[str] = ()) -> Any:
    """Remove keys whose value is null at any depth, as Parquet adds them to each object.

    Values under the keys `kept` are unchanged.
    """
    if isinstance(value, dict):
        cleaned = {}
        for key, item in value.items():
            if item is None:
                continue
            cleaned[key] = item if key in kept else remove_nulls(item, kept)
        return cleaned
    if isinstance(value, list):
        return [remove_nulls(item, kept) for item in value]
    return value


JSON_DATA_KEYS = ("arguments", "tools")
"""Keys of a sample whose values are arbitrary JSON data."""


def sample_from_dict(record: dict[str, Any], where: str) -> Sample:
    """Build a sample from parsed JSON data and check its types."""
    try:
        return Sample.model_validate(record)
    except ValidationError as error:
        raise _to_user_error(error, where) from error


def read_data_file(path: Path, max_bytes: int | None = None) -> bytes:
    """Read the content of a data file without its byte order mark."""
    with open_data_file(path) as file:
        content = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        raise UserError(
            f"a file of more than {max_bytes:,} bytes",
            where=str(path),
            expected="the labels of one image, or the description of a dataset",
            remedy="split the file, or remove it from the folder",
        )
    return content.removeprefix(UTF8_BOM)


def read_text_file(path: Path, max_bytes: int | None = None) -> str:
    """Read the text of a data file in UTF-8; see `read_data_file`."""
    with translate_os_errors(path, expected="a file in UTF-8", remedy="save the file as UTF-8"):
        return read_data_file(path, max_bytes).decode()


def parse_sample(line: bytes, where: str) -> Sample:
    """Parse a JSON line as a sample and check its types."""
    check_json(line, where)
    try:
        return Sample.model_validate_json(line)
    except ValidationError as error:
        raise _to_user_error(error, where) from error


def _to_user_error(error: ValidationError, where: str) -> UserError:
    """Convert a pydantic validation error of a sample to a UserError.

    If there are several errors, an unknown key is reported first: it is often the misspelled name
    of a missing key.
    """
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda details: details["type"] != "extra_forbidden")
    error_type = first["type"]
    value = first["input"]
    error_location = first["loc"]
    # The location in pydantic includes the union member after messages.0.content.1; omit it.
    key = ".".join(map(str, (*error_location[:4], *error_location[5:])))
    value_repr = repr(value)
    if len(value_repr) > 60:
        value_repr = f"{value_repr[:57]}..."
    remedy: Remedy = replace(_IMPORT, purpose="correct the line, or create the file again")
    what = f"{key or 'the line'} is {value_repr}"
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if error_type == "json_invalid":
        problem = str(first["ctx"]["error"]).replace("line 1 ", "")
        what = f"broken JSON: {problem}"
        expected = "one complete JSON object per line"
    elif error_type == "extra_forbidden":
        kinds = {kind.model_fields["type"].default: kind for kind in PART_TYPES}
        levels: dict[int, type[FrozenModel]] = {1: Sample, 3: Message}
        level = levels.get(len(error_location)) or kinds[str(error_location[4])]
        name = str(error_location[-1])
        names = _list_keys(level)
        what = f"unknown key {key} with the value {value_repr}"
        expected = f"the keys {', '.join(names)}"
        otherwise = "move it into `meta` of the sample, which accepts any key, or remove it"
        if level is Sample and name in FOREIGN_KEYS:
            what = f"the key {key}: a row of another dataset format, not a sample"
            remedy = _IMPORT
        elif name.endswith(names):
            remedy = otherwise
        else:
            remedy = suggest_name(name, names, otherwise)
    elif error_type == "union_tag_invalid":
        expected = f"a part with a type of {first['ctx']['expected_tags']}"
    elif error_type == "missing":
        what = f"the key {key} is missing"
        expected = f"the keys {', '.join(SAMPLE_KEYS)}, each at its level"
    elif not key and isinstance(value, list):  # a JSON array, such as a LLaVA file
        remedy = _IMPORT
    return UserError(what, where=where, expected=expected, remedy=remedy)


def count_ids(kind: str, names: Iterable[object], source: object) -> Counter[str]:
    """Count the IDs of items such as images. Raises UserError if two are equal."""
    ids = Counter(map(str, names))
    duplicate, count = next(iter(ids.most_common(1)), ("", 0))
    if count > 1:
        raise UserError(
            f"{count} {kind} have the id {duplicate}",
            where=str(source),
            expected=f"unique IDs of {kind}",
            remedy=f"assign new IDs to the {kind} and their annotations",
        )
    return ids


def check_utf8(path: str) -> str:
    """Return a path that samples can store; raise UserError for others."""
    if not is_utf8(path):
        raise UserError(
            "the path is not UTF-8 text",
            where=path,
            expected="file and folder names in UTF-8, because samples store them as JSON",
            remedy="rename the file or folder",
        )
    return path


def relocate_sample(located: LocatedSample, folder: Path) -> Sample:
    """Return a sample with paths relative to another folder."""
    start = os.path.realpath(folder)

    def rename(name: str) -> str:
        return check_utf8(os.path.relpath(os.path.abspath(located.resolve_path(name)), start))

    return located.sample.map_paths(rename)
