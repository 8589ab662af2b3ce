"""Pieces that a renderer lays end to end, boxes on their way in and out of them, and videos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finesight.encode.encoded import Size

Corners = tuple[float, float, float, float]
"""A box as left, top, right, bottom."""

THOUSANDTHS: Size = (1000, 1000)
"""The frame in which some families speak of boxes, whatever the picture's size."""

BELOW_1000 = 999
"""The largest number of the first Qwen-VL."""


@dataclass(frozen=True, slots=True)
class Special:
    """One special token by its name; any other piece is text, whatever it spells."""

    token: str


Piece = str | Special


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands around the places of a picture, and the token in each of them."""

    before: tuple[Piece, ...]
    place: str
    after: tuple[Piece, ...]


VISION_IDS: Mapping[str, str] = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
"""Tokens whose ids config.json says again, and under which key, since Qwen2-VL."""


@dataclass(frozen=True, slots=True)
class Shot:
    """Frames of a video that stand together among the tokens, `caption` in front of them; their
    groups begin `seconds` apart."""

    caption: str
    frames: slice
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SinceQwen2VL:
    """What a `Family` since Qwen2-VL says, but for its boxes and times; see `encode.family`."""

    name: str
    system_prompt: str | None = "You are a helpful assistant."
    thinks: bool = False
    flat: bool = False
    apart: bool = False

    @property
    def id_keys(self) -> Mapping[str, str]:
        """The places of pictures and videos."""
        return VISION_IDS

    def marks(self, kind: Literal["image", "video"], number: int) -> Marks:
        """Around each picture or video alike."""
        start, end = Special("<|vision_start|>"), Special("<|vision_end|>")
        return Marks((start,), f"<|{kind}_pad|>", (end,))

    def shots(self, frames: int, fps: float, depth: int) -> list[Shot]:
        """One for the whole video."""
        return [Shot("", slice(0, frames), depth / fps)]


@dataclass(frozen=True, slots=True)
class Box:
    """A box read from an answer, in pixels of the original picture."""

    label: str | None
    xyxy: Corners


@dataclass(frozen=True, slots=True)
class PlacedBox:
    """A box to write, with its picture's sizes: `xyxy` is in pixels of the original."""

    label: str | None
    xyxy: Corners
    original: Size
    resized: Size


def scaled(xyxy: Corners, source: Size, target: Size) -> Corners:
    """Corners in a frame of `source` height and width, carried over to one of `target`."""
    across, down = target[1] / source[1], target[0] / source[0]
    x1, y1, x2, y2 = xyxy
    return x1 * across, y1 * down, x2 * across, y2 * down


def in_whole_numbers(xyxy: Corners, frame: Size) -> tuple[int, int, int, int]:
    """The nearest whole corners inside a frame of that height and width, halves upwards."""
    height, width = frame
    x1, y1, x2, y2 = (math.floor(value + 0.5) for value in xyxy)
    return (
        min(max(x1, 0), width),
        min(max(y1, 0), height),
        min(max(x2, 0), width),
        min(max(y2, 0), height),
    )
