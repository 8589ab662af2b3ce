"""The sample format: a conversation about images, with boxes as coordinates.

A JSONL file contains one sample per line, and paths are relative to its folder. Boxes are `[x1, y1,
x2, y2]` in pixels of the original image after EXIF rotation, with the origin at the top left.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
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
"""Role of the author of a message."""


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(FrozenModel):
    role: Role
    content: Annotated[tuple[ContentPart, ...], BeforeValidator(_as_parts)]


class Sample(FrozenModel):
    """A conversation about images for training or evaluation.

    Attributes:
        references: Further correct answers to the last user turn, used only for scoring.
        meta: Arbitrary metadata.
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
