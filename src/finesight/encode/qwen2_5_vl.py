"""Qwen2.5-VL: boxes as JSON in pixels of the resized picture; time in shares of a second."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesight.data.json_boxes import BOX_KEY, LABEL_KEYS, json_values
from finesight.encode.dialect import Box, Corners, Piece, PlacedBox, in_whole_numbers, scaled
from finesight.encode.encoded import Size

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_NUMBERS_ALONE = re.compile(r"(?:```(?:json)?)?[\s\d\[\],.-]*(?:```)?\s*")


@dataclass(frozen=True, slots=True)
class Qwen25VL:
    """Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): dialect of boxes and rule of time.

    `tokens_per_second` is how many temporal positions pass in a second of video.
    """

    tokens_per_second: float = 2
    name: str = "qwen2_5_vl"
    system_prompt: str = "You are a helpful assistant."

    def write_boxes(self, boxes: Sequence[PlacedBox]) -> list[Piece]:
        """One box as a JSON object with `bbox_2d` and, when it has one, `label`; several as a
        list. Corners are whole pixels of the picture as the model sees it, after resizing."""
        items = [_as_item(box) for box in boxes]
        return [json.dumps(items[0] if len(items) == 1 else items, ensure_ascii=False)]

    def read_boxes(self, text: str, original: Size, resized: Size) -> list[Box]:
        """Every box of an answer, in pixels of the original picture.

        Lenient: text and code fences around the JSON, a list that breaks off, a missing label
        and fractions are taken. Without any JSON object that holds a box, four numbers in
        brackets count as one where the answer is nothing else or speaks of a bbox.
        """
        found = list(_items(text))
        if not found and ("bbox" in text or _NUMBERS_ALONE.fullmatch(text)):
            found = [(None, _corners(match.groups())) for match in _FOUR.finditer(text)]
        return [
            Box(label, scaled(corners, resized, original))
            for label, corners in found
            if corners is not None
        ]

    def time_steps(self, groups: int, seconds: float) -> NDArray[np.int64]:
        """The temporal position of each group of frames, `seconds` apart, rounded down.

        In single precision and in the published order of the products: a step of a third of a
        second lands on the same side of a whole number as in the original.
        """
        at = np.arange(groups, dtype=np.float32) * np.float32(seconds)
        return (at * np.float32(self.tokens_per_second)).astype(np.int64)


def _as_item(box: PlacedBox) -> dict[str, Any]:
    corners = in_whole_numbers(scaled(box.xyxy, box.original, box.resized), box.resized)
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
