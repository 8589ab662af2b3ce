"""Convert bounding boxes of common conventions to `[x1, y1, x2, y2]` in original pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finesight.errors import UserError

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
"""Order of box coordinates: two corners, corner and size, or center and size."""

BoxUnits = Literal["pixel", "1", "1000"]
"""Coordinate units: pixels of the original image, or image sides scaled to 1 or 1000."""

Box = tuple[float, float, float, float]


class InvalidBoxError(UserError):
    """Raised when box coordinates are invalid or lie outside the image."""


BOX_DECIMALS = 6
"""Number of decimals to which converted pixel coordinates are rounded."""

MAX_OVERHANG_PX = 1.0
"""Maximum overhang of a box beyond its image due to rounding, in pixels."""


@dataclass(frozen=True, slots=True)
class BoxConvention:
    """Format and units of bounding box coordinates."""

    format: BoxFormat = "xyxy"
    units: BoxUnits = "pixel"

    def to_pixels(self, coordinates: Sequence[float], image_size: tuple[int, int]) -> Box:
        """Convert four coordinates of this convention to two corners in pixels.

        Args:
            coordinates: Four numbers in the format and units of this convention.
            image_size: Height and width of the image in pixels.
        """
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

    Args:
        box: Two corners in pixels.
        image_size: Height and width of the image in pixels.
        convention: Convention that the box was converted from, named in the error message.

    Raises:
        InvalidBoxError: The box is inverted, has no area, or exceeds the image by more than
            `MAX_OVERHANG_PX`.
    """
    height, width = image_size
    x1, y1, x2, y2 = box
    is_valid = all(map(math.isfinite, box)) and x1 < x2 and y1 < y2
    is_inside = (
        min(x1, y1) >= -MAX_OVERHANG_PX
        and x2 <= width + MAX_OVERHANG_PX
        and y2 <= height + MAX_OVERHANG_PX
    )
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if is_valid and is_inside and clipped[0] < clipped[2] and clipped[1] < clipped[3]:
        return clipped
    coordinates = ", ".join(f"{value:g}" for value in box)
    raise InvalidBoxError(
        f"the box [{coordinates}] in pixels (read as {convention.format} in units of"
        f" {convention.units}) "
        + ("is outside its image" if is_valid else "has inverted corners or no area"),
        expected=f"x1 < x2 up to {width} and y1 < y2 up to {height}, after EXIF rotation",
        remedy=_suggest_convention(convention),
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
