"""Convert box conventions to `[x1, y1, x2, y2]` in pixels, and find boxes in the JSON of answers.

Qwen2.5-VL answers contain boxes as JSON objects with the key `bbox_2d`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from finesight.errors import UserError

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
"""Order of box coordinates: two corners, corner and size, or center and size."""

BoxUnits = Literal["pixel", "1", "1000"]
"""Coordinate units: pixels of the original image, or image sides scaled to 1 or 1000."""

Box = tuple[float, float, float, float]


class InvalidBoxError(UserError):
    """Raised when box coordinates are invalid or lie outside the image."""


BOX_DECIMALS = 6

MAX_OVERHANG_PX = 1.0
"""Maximum overhang of a box beyond its image due to rounding, in pixels."""


@dataclass(frozen=True, slots=True)
class BoxConvention:
    """Format and units of bounding box coordinates."""

    format: BoxFormat = "xyxy"
    units: BoxUnits = "pixel"

    def to_pixels(self, coordinates: Sequence[float], image_size: tuple[int, int]) -> Box:
        """Convert four coordinates of this convention to two corners in pixels."""
        a, b, c, d = (float(value) for value in coordinates)
        if self.format == "xywh":
            corners = (a, b, a + c, b + d)
        elif self.format == "cxcywh":
            corners = (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
        else:
            corners = (a, b, c, d)
        if self == BoxConvention():
            return corners
        x1, y1, x2, y2 = corners
        if self.units != "pixel":
            scale_x, scale_y = (side / float(self.units) for side in reversed(image_size))
            x1, y1, x2, y2 = x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y
        # Remove floating-point noise, so that a box survives conversion in both directions.
        return (
            round(x1, BOX_DECIMALS),
            round(y1, BOX_DECIMALS),
            round(x2, BOX_DECIMALS),
            round(y2, BOX_DECIMALS),
        )


def parse_coordinates(value: object) -> list[float]:
    """Parse four box coordinates from a list of integers, floats or numeric strings.

    Raises:
        InvalidBoxError: The value is not a list of four numbers.
    """
    try:
        coordinates = [float(item) for item in value] if isinstance(value, list | tuple) else []
    except (TypeError, ValueError, OverflowError):
        coordinates = []
    if len(coordinates) != 4:
        raise InvalidBoxError(
            f"the box {str(value)[:80]!r}",
            expected="a list of four coordinates",
            remedy="correct the row, or remove it",
        )
    return coordinates


def clip_to_image(box: Box, image_size: tuple[int, int], convention: BoxConvention) -> Box:
    """Clip a box that exceeds its image by no more than a rounding error.

    Raises:
        InvalidBoxError: The box is inverted, has no area, or exceeds the image by more than
            `MAX_OVERHANG_PX`.
    """
    height, width = image_size
    x1, y1, x2, y2 = box
    is_valid = all(map(math.isfinite, box)) and x1 < x2 and y1 < y2
    # In pixels, such a box is smaller than one and not on the pixel grid.
    is_fraction = convention.units == "pixel" and max(box) <= 1 and any(n % 1 for n in box)
    is_inside = (
        min(x1, y1) >= -MAX_OVERHANG_PX
        and x2 <= width + MAX_OVERHANG_PX
        and y2 <= height + MAX_OVERHANG_PX
    )
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    has_area = clipped[0] < clipped[2] and clipped[1] < clipped[3]
    if is_valid and is_inside and has_area and not is_fraction:
        return clipped
    coordinates = ", ".join(f"{value:g}" for value in box)
    problem = "is outside its image" if is_valid else "has inverted corners or no area"
    remedy = _suggest_convention(convention)
    if is_valid and is_fraction:
        problem = "is smaller than a pixel"
        remedy = "if the boxes are fractions of the image size, give --box-units 1"
    raise InvalidBoxError(
        f"the box [{coordinates}] in pixels (read as {convention.format} in units of"
        f" {convention.units}) {problem}",
        expected=f"x1 < x2 up to {width} and y1 < y2 up to {height}, after EXIF rotation",
        remedy=remedy,
    )


def _suggest_convention(convention: BoxConvention) -> str:
    other = "xywh" if convention.format == "xyxy" else "xyxy"
    return (
        f"if the boxes are {other}, give --box-format {other}; if they are not in units of "
        f"{convention.units}, give --box-units pixel, 1 or 1000; otherwise correct the row"
    )


def iou(a: Box, b: Box) -> float:
    """Compute the intersection over union of two boxes, in [0, 1].

    A box with inverted corners is treated as empty, so a malformed prediction scores 0.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0 or box_area(a) == 0 or box_area(b) == 0:
        return 0.0
    intersection = width * height
    return intersection / (box_area(a) + box_area(b) - intersection)


def box_area(box: Box) -> float:
    """Return the area of a box in square pixels, 0 for inverted corners."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


BOX_KEY = "bbox_2d"
LABEL_KEYS = ("label", "text_content")
_CODE_FENCE = re.compile(r"```(?:json)?\s*([\[{][^`]*[\]}])\s*```")

MAX_JSON_DEPTH = 200
"""Maximum nesting depth of a JSON value in a text. Deeper values are ignored."""

_DECODER = json.JSONDecoder()

MAX_SCAN_RATIO = 4
"""Maximum work for failed JSON parses, as a multiple of the text length.

Without a limit, a text of unclosed brackets would need quadratic time.
"""


class JsonMatch(NamedTuple):
    """A JSON value found in a text between the offsets `start` and `stop` (exclusive)."""

    start: int
    stop: int
    value: Any


class JsonBox(NamedTuple):
    """Coordinates and label of a box as parsed from JSON, not validated."""

    coordinates: Any
    label: str | None


def iter_json_values(text: str, openings: str = "[{") -> Iterator[JsonMatch]:
    """Yield the outermost JSON values in a text that start with one of `openings`.

    Invalid JSON and values nested deeper than `MAX_JSON_DEPTH` are skipped. The search ends early
    if a text contains too much invalid JSON (`MAX_SCAN_RATIO`).
    """
    opening = re.compile(f"[{re.escape(openings)}]")
    offset, left = 0, MAX_SCAN_RATIO * len(text) + 100_000
    while left > 0 and (match := opening.search(text, offset)):
        try:
            value, offset = _DECODER.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            offset = match.end()
            left -= error.pos - offset + error.pos // 16 + 10  # JSONDecodeError counts newlines
        except (ValueError, RecursionError):  # number too long, or too deep
            return
        else:
            if not _is_too_deep(value):
                yield JsonMatch(match.start(), offset, value)


def _is_too_deep(value: object) -> bool:
    """Return whether a value is nested too deeply to be printed without RecursionError."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, list | dict)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True


def strip_code_fences(text: str) -> str:
    """Remove Markdown code fences around JSON that contains boxes."""
    if "```" not in text:
        return text
    return _CODE_FENCE.sub(lambda found: found[1] if f'"{BOX_KEY}"' in found[1] else found[0], text)


def split_at_boxes(text: str) -> Iterator[str | list[object]]:
    """Split a text into plain text and lists of JSON objects with boxes, alternately.

    Plain texts may be empty. A plain text that contains `bbox_2d` has it outside of valid JSON.
    """
    end = 0
    for match in iter_json_values(text):
        if BOX_KEY in text[match.start : match.stop]:
            yield text[end : match.start]
            yield match.value if isinstance(match.value, list) else [match.value]
            end = match.stop
    yield text[end:]


def parse_json_box(value: object) -> JsonBox | None:
    """Parse a JSON object with `bbox_2d` and an optional label; return None for other values."""
    if not isinstance(value, dict) or not {BOX_KEY} <= value.keys() <= {BOX_KEY, *LABEL_KEYS}:
        return None
    labels = [str(value[key]) for key in LABEL_KEYS if value.get(key) is not None]
    return JsonBox(value[BOX_KEY], labels[0] if labels else None)
