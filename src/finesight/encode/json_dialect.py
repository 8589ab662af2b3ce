"""Boxes as JSON, `{"bbox_2d": [x1, y1, x2, y2], "label": ...}`, in the frame that a family says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finesight.data.json_boxes import BOX_KEY, LABEL_KEYS, json_values
from finesight.encode.dialect import Box, Corners, Piece, PlacedBox, in_whole_numbers, scaled
from finesight.encode.encoded import Size

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_NUMBERS_ALONE = re.compile(r"(?:```(?:json)?)?[\s\d\[\],.-]*(?:```)?\s*")


def write(boxes: Sequence[PlacedBox], frame_of: Callable[[PlacedBox], Size]) -> list[Piece]:
    """One box as an object with `bbox_2d` and, when it has one, `label`; several as a list. Corners
    are whole numbers in the frame (height, width) of each box."""
    items = [_as_item(box, frame_of(box)) for box in boxes]
    return [json.dumps(items[0] if len(items) == 1 else items, ensure_ascii=False)]


def read(text: str, frame: Size, original: Size) -> list[Box]:
    """Every box of an answer, carried over from `frame` to the original picture.

    Lenient: text and code fences around the JSON, a list that breaks off, a missing label and
    fractions are taken. Without any JSON object that holds a box, four numbers in brackets count as
    one where the answer is nothing else or speaks of a bbox.
    """
    found = list(_items(text))
    if not found and ("bbox" in text or _NUMBERS_ALONE.fullmatch(text)):
        found = [(None, _corners(match.groups())) for match in _FOUR.finditer(text)]
    return [
        Box(label, scaled(corners, frame, original))
        for label, corners in found
        if corners is not None
    ]


def _as_item(box: PlacedBox, frame: Size) -> dict[str, Any]:
    corners = in_whole_numbers(scaled(box.xyxy, box.original, frame), frame)
    item: dict[str, Any] = {BOX_KEY: list(corners)}
    return item if box.label is None else {**item, "label": box.label}


def _items(text: str) -> Iterator[tuple[str | None, Corners | None]]:
    """Label and corners of every JSON object in `text` that has a `bbox_2d`."""
    # Objects alone: the list around them may break off.
    for found in json_values(text, "{"):
        yield from _boxes_within(found.value)


def _boxes_within(value: object) -> Iterator[tuple[str | None, Corners | None]]:
    if isinstance(value, list):
        for item in value:
            yield from _boxes_within(item)
    elif isinstance(value, dict) and BOX_KEY in value:
        # JSON may escape half of a surrogate pair, which no file in UTF-8 can hold.
        labels = [
            value[key].encode("utf-8", "replace").decode()
            for key in LABEL_KEYS
            if isinstance(value.get(key), str)
        ]
        yield (labels[0] if labels else None), _corners(value[BOX_KEY])
    elif isinstance(value, dict):
        for item in value.values():
            yield from _boxes_within(item)


def _corners(values: object) -> Corners | None:
    """Four finite numbers, or None for anything else that an answer may hold in their place."""
    if not isinstance(values, list | tuple) or len(values) != 4:
        return None
    try:
        x1, y1, x2, y2 = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        return None
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None
