"""JSON in running text, and the boxes that two families write in it under `bbox_2d`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

BOX_KEY = "bbox_2d"
LABEL_KEYS = ("label", "text_content")
_FENCE = re.compile(rf"```(?:json)?\s*([\[{{][^`]*?\"{BOX_KEY}\"[^`]*[\]}}])\s*```")


class Found(NamedTuple):
    """A JSON value that stands in a text at [start, stop)."""

    start: int
    stop: int
    value: Any


class Item(NamedTuple):
    """What is written of one box: its numbers, whatever they are, and its label."""

    numbers: Any
    label: str | None


def json_values(text: str, openings: str = "[{") -> Iterator[Found]:
    """The JSON values in a text that begin with one of `openings`, from left to right, none within
    another; what begins so and is no JSON is passed over."""
    decoder, at = json.JSONDecoder(), 0
    opening = re.compile(f"[{re.escape(openings)}]")
    while found := opening.search(text, at):
        try:
            value, at = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            at = found.end()
        else:
            yield Found(found.start(), at, value)


def unfenced(text: str) -> str:
    """The text without code fences around JSON with boxes."""
    return _FENCE.sub(r"\1", text)


def around_boxes(text: str) -> Iterator[str | list[object]]:
    """A text and the boxes in it in turn: a JSON value with boxes as the list of its items.

    Texts may be empty; one that still speaks of `bbox_2d` does so outside of JSON.
    """
    end = 0
    for found in json_values(text):
        if BOX_KEY in text[found.start : found.stop]:
            yield text[end : found.start]
            yield found.value if isinstance(found.value, list) else [found.value]
            end = found.stop
    yield text[end:]


def box_item(value: object) -> Item | None:
    """Numbers and label of an object with `bbox_2d` and at most a label; None for anything else."""
    if not isinstance(value, dict) or not {BOX_KEY} <= value.keys() <= {BOX_KEY, *LABEL_KEYS}:
        return None
    labels = [str(value[key]) for key in LABEL_KEYS if value.get(key) is not None]
    return Item(value[BOX_KEY], labels[0] if labels else None)
