"""Pieces that a renderer lays end to end, boxes on their way in and out of them, and videos."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finesight.encode.encoded import Size

Corners = tuple[float, float, float, float]
"""A box as left, top, right, bottom."""

THOUSANDTHS: Size = (1000, 1000)
"""The frame in which some families speak of boxes, whatever the picture's size."""


@dataclass(frozen=True, slots=True)
class Special:
    """One special token by its name; any other piece is text, whatever it spells."""

    token: str


Piece = str | Special


@dataclass(frozen=True, slots=True)
class Shot:
    """Frames of a video that stand together among the tokens, `caption` in front of them; their
    groups begin `seconds` apart."""

    caption: str
    frames: slice
    seconds: float


def whole_video(frames: int, fps: float, depth: int) -> list[Shot]:
    """All frames together; `depth` of them make a group."""
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
