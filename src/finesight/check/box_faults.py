"""Faults of the boxes of a sample, each against the size of its picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from finesight.check.findings import Finding, Place, Shown
from finesight.check.pictures import Album
from finesight.data.boxes import ROUNDING, Box
from finesight.data.sample import BoxPart, ImagePart, Sample

TINY = 2.0
"""Pixels of a side below which a box hardly shows anything."""

WHOLE = 0.98
"""Share of a picture that a box around all of it covers, at least."""

_FRAME = (
    "boxes are in pixels of the original picture after its EXIF turn; where most of them are not, "
    "import them again with --box-format and --box-units"
)

_ORDER = "write [x1, y1, x2, y2] with x1 < x2 and y1 < y2: left, top, right, bottom"


def box_findings(sample: Sample, place: Place, album: Album) -> Iterator[Finding]:
    """At most one finding for each box. Boxes of pictures that cannot be used are passed over, as
    nothing is known of these."""
    pictures = [part.image for part in sample.parts() if isinstance(part, ImagePart)]
    for box in sample.parts():
        if not isinstance(box, BoxPart):
            continue
        if box.image >= len(pictures):
            yield place.finding(
                "box-of-no-picture",
                f"a box in picture number {box.image}, counted from 0, of {len(pictures)}",
                "correct the box's `image`, or add the picture",
            )
            continue
        content = album[pictures[box.image]]
        if content.fault is None:
            shown = Shown(Path(pictures[box.image]), box.image, (box.xyxy,), (box.label or "",))
            yield from _of_box(box.xyxy, content.size, place, shown)


def in_order(xyxy: Box, size: tuple[int, int]) -> Box | None:
    """The box with its corners in order, where that is certain: both corners lie in the picture,
    and the four numbers cannot be a corner or a centre with a width and a height."""
    height, width = size
    a, b, c, d = xyxy
    turned = (min(a, c), min(b, d), max(a, c), max(b, d))
    if turned[0] == turned[2] or turned[1] == turned[3] or not _within(turned, size, 0):
        return None
    from_corner = a + c <= width + ROUNDING and b + d <= height + ROUNDING
    from_centre = _within((a - c / 2, b - d / 2, a + c / 2, b + d / 2), size, ROUNDING)
    return None if from_corner or from_centre else turned


def clipped(xyxy: Box, size: tuple[int, int]) -> Box | None:
    """The part of the box within the picture, None where there is none."""
    height, width = size
    x1, y1, x2, y2 = xyxy
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None


def _of_box(xyxy: Box, size: tuple[int, int], place: Place, shown: Shown) -> Iterator[Finding]:
    height, width = size
    x1, y1, x2, y2 = xyxy
    numbers = ", ".join(f"{number:g}" for number in xyxy)
    said = f"[{numbers}] in a picture of {width} x {height}"
    pictures = (shown,)
    if not all(map(math.isfinite, xyxy)):
        yield place.finding("box-empty", f"{said}: not four numbers", _ORDER, pictures)
    elif x2 < x1 or y2 < y1:
        sure = in_order(xyxy, size) is not None
        yield place.finding(
            "box-reversed", said, _ORDER, pictures, "put in order" if sure else None
        )
    elif x1 == x2 or y1 == y2:
        yield place.finding("box-empty", f"{said}: a line or a point", _ORDER, pictures)
    elif not _within(xyxy, size, ROUNDING) or clipped(xyxy, size) is None:
        yield place.finding("box-outside", said, _FRAME, pictures)
    elif not _within(xyxy, size, 0):
        yield place.finding("box-at-edge", said, "clip it to the picture", pictures, "clipped")
    elif min(x2 - x1, y2 - y1) < TINY:
        yield place.finding("box-tiny", said, "is it meant to be so small?", pictures)
    elif (x2 - x1) * (y2 - y1) >= WHOLE * width * height:
        yield place.finding("box-of-everything", said, "does it show where anything is?", pictures)


def _within(xyxy: Box, size: tuple[int, int], slack: float) -> bool:
    x1, y1, x2, y2 = xyxy
    return min(x1, y1) >= -slack and x2 <= size[1] + slack and y2 <= size[0] + slack
