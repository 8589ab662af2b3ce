"""JSON box format of Qwen2.5-VL and Qwen3-VL: `{"bbox_2d": [x1, y1, x2, y2], "label": ...}`.

The coordinate frame depends on the family.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finesight.data.boxes import BOX_KEY, LABEL_KEYS, iter_json_values
from finesight.encode.family_base import (
    BoxCorners,
    ImageBox,
    PredictedBox,
    PromptPiece,
    round_to_frame,
    scale_box,
)
from finesight.encode.tokenized_sample import ImageSize

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR_VALUES = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_ONLY_VALUES = re.compile(r"(?:```(?:json)?)?[\s\d\[\],.-]*(?:```)?\s*")


def write_json_boxes(
    boxes: Sequence[ImageBox], get_frame: Callable[[ImageBox], ImageSize]
) -> list[PromptPiece]:
    """Format one box as a JSON object, or several boxes as a list.

    Corners are rounded to integers.

    Args:
        boxes: Boxes in pixels of their original images.
        get_frame: Returns the coordinate frame (height, width) of a box.
    """
    items = [_to_json_item(box, get_frame(box)) for box in boxes]
    return [json.dumps(items[0] if len(items) == 1 else items, ensure_ascii=False)]


def read_json_boxes(text: str, frame: ImageSize, original_size: ImageSize) -> list[PredictedBox]:
    """Parse the boxes of an answer and scale them from `frame` to the original image.

    Accepts text and code fences around the JSON, truncated lists, missing labels and fractions.
    Without any JSON box, four values in brackets count as a box if the answer contains only digits
    or mentions a bbox.
    """
    parsed = list(_iter_json_boxes(text))
    if not parsed and ("bbox" in text or _ONLY_VALUES.fullmatch(text)):
        parsed = [(None, _parse_corners(match.groups())) for match in _FOUR_VALUES.finditer(text)]
    return [
        PredictedBox(label, scale_box(corners, frame, original_size))
        for label, corners in parsed
        if corners is not None
    ]


def _to_json_item(box: ImageBox, frame: ImageSize) -> dict[str, Any]:
    corners = round_to_frame(scale_box(box.xyxy, box.original_size, frame), frame)
    item: dict[str, Any] = {BOX_KEY: list(corners)}
    return item if box.label is None else {**item, "label": box.label}


def _iter_json_boxes(text: str) -> Iterator[tuple[str | None, BoxCorners | None]]:
    """Yield the label and corners of every JSON object with the key `bbox_2d`.

    Corners are None if they are invalid.
    """
    # Parse single objects: the surrounding list may be truncated.
    for found in iter_json_values(text, "{"):
        yield from _iter_nested_boxes(found.value)


def _iter_nested_boxes(value: object) -> Iterator[tuple[str | None, BoxCorners | None]]:
    if isinstance(value, list):
        for item in value:
            yield from _iter_nested_boxes(item)
    elif isinstance(value, dict) and BOX_KEY in value:
        # JSON may contain an unpaired surrogate, which UTF-8 cannot encode.
        labels = [
            value[key].encode("utf-8", "replace").decode()
            for key in LABEL_KEYS
            if isinstance(value.get(key), str)
        ]
        yield (labels[0] if labels else None), _parse_corners(value[BOX_KEY])
    elif isinstance(value, dict):
        for item in value.values():
            yield from _iter_nested_boxes(item)


def _parse_corners(values: object) -> BoxCorners | None:
    """Convert a JSON list of four finite values to box corners; None for other input."""
    if not isinstance(values, list | tuple) or len(values) != 4:
        return None
    try:
        x1, y1, x2, y2 = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        return None
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None
