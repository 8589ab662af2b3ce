"""JSON in running text, and the boxes that two families write in it under `bbox_2d`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

BOX_KEY = "bbox_2d"
LABEL_KEYS = ("label", "text_content")
_FENCE = re.compile(r"```(?:json)?\s*([\[{][^`]*[\]}])\s*```")

LEVELS = 200
"""Levels of a JSON value that is found in a text."""

_DECODER = json.JSONDecoder()

WASTED = 4
"""Times the length of a text that JSON is looked for in it in vain: brackets that open and never
close would take the square of it."""


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
    another; what begins so and is no JSON of at most `LEVELS` levels is passed over. Ends early in
    a text that is made of such."""
    opening = re.compile(f"[{re.escape(openings)}]")
    at, left = 0, WASTED * len(text) + 100_000
    while left > 0 and (found := opening.search(text, at)):
        try:
            value, at = _DECODER.raw_decode(text, found.start())
        except json.JSONDecodeError as error:
            at = found.end()
            left -= error.pos - at + error.pos // 16 + 10  # it counts the lines before it
        except (ValueError, RecursionError):  # a number of thousands of digits; as many levels
            return
        else:
            if not _is_too_deep(value):
                yield Found(found.start(), at, value)


def _is_too_deep(value: object) -> bool:
    """Return whether a value nests over `LEVELS` deep: printing it would exceed Python's limit."""
    level = [value]
    for _ in range(LEVELS):
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


def unfenced(text: str) -> str:
    """The text without code fences around JSON with boxes."""
    if "```" not in text:
        return text
    return _FENCE.sub(lambda found: found[1] if f'"{BOX_KEY}"' in found[1] else found[0], text)


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
