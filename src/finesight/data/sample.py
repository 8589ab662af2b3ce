"""The one form that all data takes: a conversation about pictures, boxes as numbers.

A JSONL file holds one sample a line. Paths are relative to the file's folder; boxes are
`[x1, y1, x2, y2]` in pixels of the original picture, after its EXIF turn, origin top left.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field


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
    fps: float = Field(default=2.0, gt=0)


class BoxPart(Record):
    """A box in picture number `image` of the sample (from 0, counting image parts only)."""

    type: Literal["box"] = "box"
    image: int = Field(default=0, ge=0)
    label: str | None = None
    xyxy: tuple[float, float, float, float]


Part = Annotated[TextPart | ImagePart | VideoPart | BoxPart, Discriminator("type")]


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Record):
    role: Literal["system", "user", "assistant"]
    content: Annotated[tuple[Part, ...], BeforeValidator(_as_parts)]


class Sample(Record):
    """One conversation. `references` are further right answers to its last turn, for scoring."""

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = {}
