"""The sample format: a conversation about images, with boxes as coordinates.

A JSONL file contains one sample per line. Paths are relative to the folder of the file. Boxes are
`[x1, y1, x2, y2]` in pixels of the original image after EXIF rotation, with the origin at the top
left.
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
    """Base of immutable sample parts; unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(FrozenModel):
    type: Literal["text"] = "text"
    text: str


class ImagePart(FrozenModel):
    type: Literal["image"] = "image"
    image: str


class VideoPart(FrozenModel):
    """A video as images of its frames at `fps` frames per second."""

    type: Literal["video"] = "video"
    frames: tuple[str, ...] = Field(min_length=1)
    fps: float = Field(default=2.0, gt=0, allow_inf_nan=False)


def format_number(value: float) -> int | float:
    """Return the number, as an integer if it has no fraction."""
    return int(value) if value.is_integer() else value


PixelCoordinate = Annotated[float, PlainSerializer(format_number, when_used="json")]
"""A coordinate; values without a fraction are written as integers."""


class BoxPart(FrozenModel):
    """A box in image `image` of the sample (0-based, image parts only)."""

    type: Literal["box"] = "box"
    image: int = Field(default=0, ge=0)
    label: str | None = None
    xyxy: tuple[PixelCoordinate, PixelCoordinate, PixelCoordinate, PixelCoordinate]


ContentPart = Annotated[TextPart | ImagePart | VideoPart | BoxPart, Discriminator("type")]


Role = Literal["system", "user", "assistant"]
"""Role of a message."""


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(FrozenModel):
    role: Role
    content: Annotated[tuple[ContentPart, ...], BeforeValidator(_as_parts)]


class Sample(FrozenModel):
    """A conversation. `references` are additional correct answers to the last turn, for scoring."""

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = Field(default_factory=dict)

    def iter_parts(self) -> Iterator[ContentPart]:
        """Yield the parts of all messages in order."""
        return (part for message in self.messages for part in message.content)

    def map_paths(self, rename: Callable[[str], str]) -> Sample:
        """Return the sample with each image and frame path replaced by `rename(path)`."""
        return self.with_parts(lambda part: _map_part_paths(part, rename))

    def with_parts(self, changed: Callable[[ContentPart], ContentPart]) -> Sample:
        """Return the sample with each part replaced by `changed(part)`."""
        messages = []
        for message in self.messages:
            parts = tuple(map(changed, message.content))
            same = all(map(operator.is_, parts, message.content))
            messages.append(message if same else Message(role=message.role, content=parts))
        return Sample(
            id=self.id, messages=tuple(messages), references=self.references, meta=self.meta
        )


def list_media_paths(part: ContentPart) -> tuple[str, ...]:
    """Return the paths of the image or video frames; empty for text and boxes."""
    if isinstance(part, ImagePart):
        return (part.image,)
    return part.frames if isinstance(part, VideoPart) else ()


def _map_part_paths(part: ContentPart, rename: Callable[[str], str]) -> ContentPart:
    if isinstance(part, ImagePart):
        return ImagePart(image=rename(part.image))
    if isinstance(part, VideoPart):
        return VideoPart(frames=tuple(rename(path) for path in part.frames), fps=part.fps)
    return part
