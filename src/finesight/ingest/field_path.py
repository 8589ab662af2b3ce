"""Strict paths to values in a record: `images.*.file_name`.

Keys are separated by dots. `*` stands for each item of a list or each value of an object, and a
number for one item of a list. A key with other characters is quoted: `"key.with.dots"`. A `?` after
a key states that the key may be missing; any other missing key is an error. `$.` at the start
refers to the record, inside of a list that the mapping iterates over; `.` alone is the item itself.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

ROOT = "$"
EACH = "*"
ITSELF = "."

MAX_PATH_STEPS = 32

_STEP = re.compile(r'(?P<quoted>"(?:[^"\\]|\\.)*")(?P<quoted_optional>\?)?|(?P<plain>[^."]+)')


class PathStep(NamedTuple):
    """A step of a path: a key, an index as text, or `*`.

    Attributes:
        is_each: Whether the step is `*` without quotes.
    """

    key: str
    is_optional: bool = False
    is_each: bool = False


@dataclass(frozen=True)
class FieldPath:
    """A parsed path.

    Attributes:
        from_root: Whether the path starts at the record instead of the current list item.
    """

    text: str
    steps: tuple[PathStep, ...]
    from_root: bool = False

    @property
    def is_optional(self) -> bool:
        """Return whether the record may lack the value."""
        return any(step.is_optional for step in self.steps)

    @functools.cached_property
    def optional_steps(self) -> tuple[PathStep, ...]:
        """Return the steps of the path if none of its keys is required."""
        return tuple(step._replace(is_optional=True) for step in self.steps)

    @property
    def last_key(self) -> str:
        """Return the last key of the path that is not `*`."""
        keys = [step.key for step in self.steps if not step.is_each]
        return keys[-1] if keys else self.text


def parse_path(text: str) -> FieldPath:
    """Parse a path. Raises ValueError with the reason if it is malformed."""
    if text == ITSELF:
        return FieldPath(text, ())
    steps: list[PathStep] = []
    position = 0
    while True:
        match = _STEP.match(text, position)
        if match is None:
            raise ValueError(f"{text!r} has an empty key at character {position + 1}")
        steps.append(_parse_step(match))
        position = match.end()
        if position == len(text):
            break
        if text[position] != ".":
            raise ValueError(f"{text!r} has no dot at character {position + 1}")
        position += 1
    if len(steps) > MAX_PATH_STEPS:
        raise ValueError(f"{text[:40]!r} has more than {MAX_PATH_STEPS} keys")
    from_root = steps[0].key == ROOT and not text.startswith('"')
    if from_root:
        del steps[0]
        if not steps:
            raise ValueError("'$' names the complete record; name a key of it")
    return FieldPath(text, tuple(steps), from_root)


def _parse_step(match: re.Match[str]) -> PathStep:
    if match["quoted"] is not None:
        return PathStep(json.loads(match["quoted"]), match["quoted_optional"] is not None)
    key = match["plain"].strip()
    if key == EACH:
        return PathStep(key, is_each=True)
    is_optional = key.endswith("?")
    if is_optional:
        key = key[:-1]
    if not key:
        raise ValueError(f"{match.string!r} has an empty key")
    return PathStep(key, is_optional)


@functools.lru_cache(maxsize=1000, typed=True)  # 1 and True are equal keys of the cache
def format_key(key: Hashable) -> str:
    """Write a key of a record as a step of a path, in quotes where required."""
    text = str(key)
    # In a template, a format begins with a colon.
    needs_no_quotes = re.fullmatch(r'[^."?*$:\s][^."?*:]*', text) and text == text.strip()
    if needs_no_quotes and text.isprintable():
        return text
    quoted: list[str] = []
    for character in json.dumps(text, ensure_ascii=False):
        if not character.isprintable():  # such as a line separator, which ends the line of a draft
            character = json.dumps(character)[1:-1]
        quoted.append(character)
    return "".join(quoted)


def quote_text(value: object) -> str:
    """Write a value as YAML in one line."""
    quoted: list[str] = []
    for character in json.dumps(value, ensure_ascii=False):
        if not character.isprintable():  # YAML has no pairs of surrogates, unlike JSON
            character = f"\\U{ord(character):08x}"
        quoted.append(character)
    return "".join(quoted)


def join_location(location: str, key: Hashable) -> str:
    """Append a key to the location of a value."""
    step = str(key) if isinstance(key, int) else format_key(key)
    return f"{location}.{step}" if location else step
