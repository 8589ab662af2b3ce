"""Find JSON values in text, and boxes under `bbox_2d` as two model families write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

BOX_KEY = "bbox_2d"
LABEL_KEYS = ("label", "text_content")
_CODE_FENCE = re.compile(r"```(?:json)?\s*([\[{][^`]*[\]}])\s*```")

MAX_JSON_DEPTH = 200
"""Maximum nesting of a JSON value in a text."""

_DECODER = json.JSONDecoder()

MAX_SCAN_RATIO = 4
"""Limit of failed JSON searches as a multiple of the text length: unclosed brackets would need
quadratic time."""


class JsonMatch(NamedTuple):
    """A JSON value in a text at [start, stop)."""

    start: int
    stop: int
    value: Any


class JsonBox(NamedTuple):
    """Unvalidated coordinates and label of a box."""

    coordinates: Any
    label: str | None


def iter_json_values(text: str, openings: str = "[{") -> Iterator[JsonMatch]:
    """Yield the outermost JSON values that start with one of `openings`, left to right.

    Invalid JSON and values with more than `MAX_JSON_DEPTH` levels are skipped. The search ends
    early in a text that consists of such values.
    """
    opening = re.compile(f"[{re.escape(openings)}]")
    offset, left = 0, MAX_SCAN_RATIO * len(text) + 100_000
    while left > 0 and (match := opening.search(text, offset)):
        try:
            value, offset = _DECODER.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            offset = match.end()
            left -= error.pos - offset + error.pos // 16 + 10  # it counts the lines before it
        except (ValueError, RecursionError):  # a number of thousands of digits; as many levels
            return
        else:
            if not _is_too_deep(value):
                yield JsonMatch(match.start(), offset, value)


def _is_too_deep(value: object) -> bool:
    """Return whether a value is too deep to print without a recursion error."""
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
    """Remove code fences around JSON with boxes."""
    if "```" not in text:
        return text
    return _CODE_FENCE.sub(lambda found: found[1] if f'"{BOX_KEY}"' in found[1] else found[0], text)


def split_at_boxes(text: str) -> Iterator[str | list[object]]:
    """Split a text into texts and boxes alternately.

    A JSON value with boxes is the list of its items. Texts may be empty. A text that contains
    `bbox_2d` has it outside of JSON.
    """
    end = 0
    for match in iter_json_values(text):
        if BOX_KEY in text[match.start : match.stop]:
            yield text[end : match.start]
            yield match.value if isinstance(match.value, list) else [match.value]
            end = match.stop
    yield text[end:]


def parse_json_box(value: object) -> JsonBox | None:
    """Parse an object with `bbox_2d` and an optional label; return None for anything else."""
    if not isinstance(value, dict) or not {BOX_KEY} <= value.keys() <= {BOX_KEY, *LABEL_KEYS}:
        return None
    labels = [str(value[key]) for key in LABEL_KEYS if value.get(key) is not None]
    return JsonBox(value[BOX_KEY], labels[0] if labels else None)
