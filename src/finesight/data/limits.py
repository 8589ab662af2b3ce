"""Limits of a sample: what exceeds them is damage or an attack, and would fill the memory."""

from __future__ import annotations

from finesight.errors import UserError

MAX_BOXES = 10_000
"""Boxes of a sample: as text they take some 300,000 tokens."""

MAX_PARTS = 30_000
"""Texts, images, videos and boxes of a sample together."""

MAX_MESSAGES = 10_000
"""Messages of a sample."""

MAX_ANSWERS = 10_000
"""Answers to one question: each becomes a sample, or a reference."""

LARGEST_LABELS = 2**24
"""Bytes of a file with the labels of one image."""

LARGEST_DESCRIPTION = 2**19
"""Bytes of a data set's description in YAML: so many take up to 5 s to parse."""


MAX_CONTAINERS = 1_000_000
"""Lists and objects in the JSON of a row: empty ones take 72 bytes each for 3 bytes of text."""


class TooMany(UserError):
    """A sample with more boxes, parts, messages or answers than it may have."""


def check_json(content: bytes, where: str) -> None:
    """Refuse the JSON of a row with too many brackets, in texts too. Raises TooMany at `where`."""
    if len(content) > MAX_CONTAINERS:
        found = content.count(b"[") + content.count(b"{")
        check_count(found, MAX_CONTAINERS, "lists and objects", where)


def check_count(count: int, most: int, what: str, where: str = "") -> None:
    """Refuse a sample of more than `most` things of a kind. Raises TooMany."""
    if count > most:
        raise TooMany(
            f"{count:,} {what}",
            where=where,
            expected=f"at most {most:,} {what} in a sample",
            remedy="split the sample, or leave it out",
        )
