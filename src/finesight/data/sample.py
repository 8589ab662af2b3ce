"""The sample format: a conversation about images, with boxes as coordinates.

A JSONL file contains one sample per line, and paths are relative to its folder. Boxes are `[x1, y1,
x2, y2]` in pixels of the original image after EXIF rotation, with the origin at the top left. Size
limits protect the loader from corrupt and malicious files.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PlainSerializer

from finesight.data.boxes import MAX_OVERHANG_PX, InvalidBoxError
from finesight.errors import UserError

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


class FrozenModel(BaseModel):
    """Base class of samples and their parts: immutable, unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(FrozenModel):
    type: Literal["text"] = "text"
    text: str


class ImagePart(FrozenModel):
    type: Literal["image"] = "image"
    image: str


class VideoPart(FrozenModel):
    """A video, given as the images of its frames at `fps` frames per second."""

    type: Literal["video"] = "video"
    frames: tuple[str, ...] = Field(min_length=1)
    fps: float = Field(default=2.0, gt=0, allow_inf_nan=False)


def format_number(value: float) -> int | float:
    """Convert a number without a fractional part to an integer, for compact JSON."""
    return int(value) if value.is_integer() else value


PixelCoordinate = Annotated[float, PlainSerializer(format_number, when_used="json")]
"""A coordinate in pixels; a whole number is written to JSON as an integer."""


class BoxPart(FrozenModel):
    """A bounding box in one image of the sample.

    Attributes:
        image: 0-based index among the image parts of the sample.
        label: Name of the object, None without a label.
        xyxy: Two corners, `[x1, y1, x2, y2]`, in pixels of the original image.
    """

    type: Literal["box"] = "box"
    image: int = Field(default=0, ge=0)
    label: str | None = None
    xyxy: tuple[PixelCoordinate, PixelCoordinate, PixelCoordinate, PixelCoordinate]


ContentPart = Annotated[TextPart | ImagePart | VideoPart | BoxPart, Discriminator("type")]


Role = Literal["system", "user", "assistant"]


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(FrozenModel):
    role: Role
    content: Annotated[tuple[ContentPart, ...], BeforeValidator(_as_parts)]


class Sample(FrozenModel):
    """A conversation about images for training or evaluation.

    Attributes:
        references: Further correct answers to the last user turn, used only for scoring.
    """

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = Field(default_factory=dict)

    def iter_parts(self) -> Iterator[ContentPart]:
        """Yield the content parts of all messages in order."""
        return (part for message in self.messages for part in message.content)

    def map_paths(self, rename: Callable[[str], str]) -> Sample:
        """Return a copy with each image and video frame path replaced by `rename(path)`."""
        return self.with_parts(lambda part: _map_part_paths(part, rename))

    def with_parts(self, changed: Callable[[ContentPart], ContentPart]) -> Sample:
        """Return a copy with each content part replaced by `changed(part)`."""
        messages = []
        for message in self.messages:
            parts = tuple(map(changed, message.content))
            same = all(map(operator.is_, parts, message.content))
            messages.append(message if same else Message(role=message.role, content=parts))
        return Sample(
            id=self.id, messages=tuple(messages), references=self.references, meta=self.meta
        )


def list_media_paths(part: ContentPart) -> tuple[str, ...]:
    """Return the image or video frame paths of a content part; empty for others."""
    if isinstance(part, ImagePart):
        return (part.image,)
    return part.frames if isinstance(part, VideoPart) else ()


def _map_part_paths(part: ContentPart, rename: Callable[[str], str]) -> ContentPart:
    if isinstance(part, ImagePart):
        return ImagePart(image=rename(part.image))
    if isinstance(part, VideoPart):
        return VideoPart(frames=tuple(rename(path) for path in part.frames), fps=part.fps)
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
    that start with the user. Images are in user turns. Boxes have a positive area and a valid image
    index. Whether a box is inside its image is checked by `finesight data import` and the renderer,
    which read the image header.
    """
    check_messages(sample.messages, sample.references, where, answered=require_answer)


def check_messages(
    messages: Sequence[Message], references: Sequence[str], where: str, *, answered: bool = True
) -> None:
    """Validate the messages and references of a sample; see `validate_sample`."""
    check_limits(messages, references, where)
    validate_roles(messages, where, require_answer=answered)
    num_images, boxes = 0, list[BoxPart]()
    for number, message in enumerate(messages):
        has_text = has_visual = False
        for part in message.content:
            if part.type == "text":
                has_text = has_text or (part.text != "" and not part.text.isspace())
            elif part.type == "box":
                boxes.append(part)
            else:
                has_visual = True
                num_images += part.type == "image"
        if has_visual and message.role != "user":
            raise _shown_by_another(message, f"{where}, message {number}")
        if not (has_text or has_visual or any(part.type == "box" for part in message.content)):
            raise _empty(message, f"{where}, message {number}")
    for box in boxes:
        _validate_box(box, num_images, where)


def check_limits(messages: Sequence[Message], references: Sequence[str], where: str) -> None:
    """Reject a sample with too many messages, references, parts or boxes.

    Raises:
        LimitExceededError: A limit is exceeded. `where` is the location in the error message.
    """
    check_limit(len(messages), MAX_MESSAGES, "messages", where)
    check_limit(len(references), MAX_ANSWERS, "references", where)
    parts = 0
    for message in messages:
        parts += len(message.content)
    if parts > MAX_BOXES:
        boxes = sum(part.type == "box" for message in messages for part in message.content)
        check_limit(boxes, MAX_BOXES, "boxes", where)
        check_limit(parts, MAX_PARTS, "parts", where)


def validate_roles(messages: Sequence[Message], where: str, *, require_answer: bool = True) -> None:
    """Raise InvalidTurnsError if the messages have an invalid role order; see `validate_sample`."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    is_alternating = turns[::2].count("user") + turns[1::2].count("assistant")
    if not turns or is_alternating < len(turns):
        raise InvalidTurnsError(
            f"the message roles are {_format_roles(roles)}",
            where=where,
            expected="an optional system, then user and assistant in turn, starting with user",
            remedy="reorder the messages; merge consecutive turns of the same role",
        )
    if require_answer and turns[-1] != "assistant":
        raise InvalidTurnsError(
            f"the message roles are {_format_roles(roles)}: no answer at the end",
            where=where,
            expected="an assistant message at the end",
            remedy="add the answer, or remove the sample (only prediction needs no answer)",
        )


def _format_roles(roles: Sequence[str]) -> str:
    more = len(roles) - MAX_LISTED_ROLES
    return ", ".join(roles[:MAX_LISTED_ROLES]) + (f" and {more} more" if more > 0 else "")


def _shown_by_another(message: Message, where: str) -> InvalidTurnsError:
    return InvalidTurnsError(
        f"an image in a turn of the {message.role}",
        where=where,
        expected="images in user turns: answers contain text and boxes only",
        remedy="move the image to a user turn",
    )


def _empty(message: Message, where: str) -> InvalidTurnsError:
    return InvalidTurnsError(
        f"an empty turn of the {message.role}",
        where=where,
        expected="text, an image or a box",
        remedy="add it, or remove the sample",
    )


def _validate_box(box: BoxPart, num_images: int, where: str) -> None:
    if box.image >= num_images:
        raise InvalidBoxError(
            f"a box in image {box.image} (0-based)",
            where=where,
            expected=f"an index below {num_images}, the images of the sample",
            remedy="correct the box's `image`, or add the image",
        )
    x1, y1, x2, y2 = box.xyxy
    if not all(map(math.isfinite, box.xyxy)) or not (
        -MAX_OVERHANG_PX <= x1 < x2 and -MAX_OVERHANG_PX <= y1 < y2
    ):
        raise InvalidBoxError(
            f"the box {list(box.xyxy)}",
            where=where,
            expected="[x1, y1, x2, y2] in pixels with 0 <= x1 < x2 and 0 <= y1 < y2",
            remedy="convert other box formats with `finesight data import`",
        )
