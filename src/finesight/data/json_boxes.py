"""Find JSON values in text, and parse boxes under the key `bbox_2d` of Qwen2.5-VL answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

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
