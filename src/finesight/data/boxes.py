"""Boxes in any of the usual forms become `[x1, y1, x2, y2]` in pixels of the original picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finesight.errors import UserError

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
"""Two corners; top left corner and size; centre and size."""

BoxUnits = Literal["pixel", "1", "1000"]
"""Pixels of the original picture, or shares of its width and height, the whole being 1 or 1000."""

Box = tuple[float, float, float, float]


class BadBox(UserError):
    """Numbers that are no box, or one that does not lie in its picture."""


DECIMALS = 6
"""To which corners are rounded that are computed from another form: a millionth of a pixel."""

ROUNDING = 1.0
"""Pixels that a box may stand out of its picture: as much as rounding its corners explains."""


@dataclass(frozen=True, slots=True)
class BoxForm:
    """How the four numbers of a box are meant."""

    format: BoxFormat = "xyxy"
    units: BoxUnits = "pixel"

    def to_pixels(self, numbers: Sequence[float], size: tuple[int, int]) -> Box:
        """Two corners in pixels of a picture of `size` (height, width)."""
        a, b, c, d = (float(number) for number in numbers)
        if self.format == "xywh":
            corners = (a, b, a + c, b + d)
        elif self.format == "cxcywh":
            corners = (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
        else:
            corners = (a, b, c, d)
        if self == BoxForm():
            return corners
        x1, y1, x2, y2 = corners
        if self.units != "pixel":
            across, down = (side / float(self.units) for side in reversed(size))
            x1, y1, x2, y2 = x1 * across, y1 * down, x2 * across, y2 * down
        # So that sums and shares in binary give the number that was meant, there and back.
        return (round(x1, DECIMALS), round(y1, DECIMALS), round(x2, DECIMALS), round(y2, DECIMALS))


def four_numbers(value: object) -> list[float]:
    """A list of four numbers, whole, broken or as text. Raises BadBox for anything else."""
    try:
        numbers = [float(item) for item in value] if isinstance(value, list | tuple) else []
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != 4:
        raise BadBox(
            f"the box {str(value)[:80]!r}",
            expected="a list of four numbers",
            remedy="correct the row, or leave it out",
        )
    return numbers


def fitted(box: Box, size: tuple[int, int], form: BoxForm) -> Box:
    """The box, clipped where it stands out of its picture by no more than rounding explains.

    Raises BadBox for one that is reversed, has no area or lies further outside of `size`
    (height, width); `form` is what the box was read as, for the message.
    """
    height, width = size
    x1, y1, x2, y2 = box
    sound = all(map(math.isfinite, box)) and x1 < x2 and y1 < y2
    inside = min(x1, y1) >= -ROUNDING and x2 <= width + ROUNDING and y2 <= height + ROUNDING
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if sound and inside and clipped[0] < clipped[2] and clipped[1] < clipped[3]:
        return clipped
    numbers = ", ".join(f"{number:g}" for number in box)
    raise BadBox(
        f"the box [{numbers}] in pixels (read as {form.format} in units of {form.units}) "
        + ("lies outside of its picture" if sound else "is reversed or has no area"),
        expected=f"x1 < x2 up to {width} and y1 < y2 up to {height}, after the EXIF turn",
        remedy=_guess(form),
    )


def _guess(form: BoxForm) -> str:
    other = "xywh" if form.format == "xyxy" else "xyxy"
    return (
        f"are the boxes {other}? then give --box-format {other}; are they not in units of "
        f"{form.units}? then give --box-units pixel, 1 or 1000; else correct the row"
    )


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]. Corners in the wrong order make an empty
    box: who answered or drew it so is mistaken, and it is not put right here."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0 or area(a) == 0 or area(b) == 0:
        return 0.0
    common = width * height
    return common / (area(a) + area(b) - common)


def area(box: Box) -> float:
    """Square pixels of a box; 0 where its corners are in the wrong order."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
