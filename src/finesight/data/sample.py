"""The one form that all data takes: a conversation about pictures, boxes as numbers.

A JSONL file holds one sample a line. Paths are relative to the file's folder; boxes are
`[x1, y1, x2, y2]` in pixels of the original picture, after its EXIF turn, origin top left.
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


class Record(BaseModel):
    """A frozen piece of a sample; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(Record):
    type: Literal["text"] = "text"
    text: str


class ImagePart(Record):
    type: Literal["image"] = "image"
    image: str


class VideoPart(Record):
    """A video as the pictures of its frames, `fps` of them a second."""

    type: Literal["video"] = "video"
    frames: tuple[str, ...] = Field(min_length=1)
    fps: float = Field(default=2.0, gt=0, allow_inf_nan=False)


def shortest(number: float) -> int | float:
    """The number, without a point where it is whole."""
    return int(number) if number.is_integer() else number


Pixels = Annotated[float, PlainSerializer(shortest, when_used="json")]
"""A coordinate; whole numbers are written without a point."""


class BoxPart(Record):
    """A box in picture number `image` of the sample (from 0, counting image parts only)."""

    type: Literal["box"] = "box"
    image: int = Field(default=0, ge=0)
    label: str | None = None
    xyxy: tuple[Pixels, Pixels, Pixels, Pixels]


Part = Annotated[TextPart | ImagePart | VideoPart | BoxPart, Discriminator("type")]


Role = Literal["system", "user", "assistant"]
"""Who says a message."""


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Record):
    role: Role
    content: Annotated[tuple[Part, ...], BeforeValidator(_as_parts)]


class Sample(Record):
    """One conversation. `references` are further right answers to its last turn, for scoring."""

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = Field(default_factory=dict)

    def parts(self) -> Iterator[Part]:
        """The parts of all messages, in order."""
        return (part for message in self.messages for part in message.content)

    def with_files(self, renamed: Callable[[str], str]) -> Sample:
        """The same sample with every path of a picture or frame replaced by `renamed(path)`."""
        return self.with_parts(lambda part: _renamed(part, renamed))

    def with_parts(self, changed: Callable[[Part], Part]) -> Sample:
        """Return the same sample with every part replaced by `changed(part)`."""
        messages = []
        for message in self.messages:
            parts = tuple(map(changed, message.content))
            same = all(map(operator.is_, parts, message.content))
            messages.append(message if same else Message(role=message.role, content=parts))
        return Sample(
            id=self.id, messages=tuple(messages), references=self.references, meta=self.meta
        )


def files_of(part: Part) -> tuple[str, ...]:
    """The paths of the picture or of the video's frames; none for text and boxes."""
    if isinstance(part, ImagePart):
        return (part.image,)
    return part.frames if isinstance(part, VideoPart) else ()


def _renamed(part: Part, renamed: Callable[[str], str]) -> Part:
    if isinstance(part, ImagePart):
        return ImagePart(image=renamed(part.image))
    if isinstance(part, VideoPart):
        return VideoPart(frames=tuple(renamed(path) for path in part.frames), fps=part.fps)
    return part
