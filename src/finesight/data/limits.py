"""Limits of samples. Larger samples are corrupt or malicious and would exhaust the memory."""

from __future__ import annotations

from finesight.errors import UserError

MAX_BOXES = 10_000
"""Maximum number of boxes of a sample: as text about 300,000 tokens."""

MAX_PARTS = 30_000
"""Maximum number of texts, images, videos and boxes of a sample."""

MAX_MESSAGES = 10_000
"""Maximum number of messages of a sample."""

MAX_ANSWERS = 10_000
"""Maximum number of answers to a question: each becomes a sample or a reference."""

MAX_LABEL_FILE_BYTES = 2**24
"""Maximum number of bytes of a label file of one image."""

MAX_DESCRIPTION_BYTES = 2**19
"""Maximum number of bytes of a dataset description in YAML, which takes up to 5 s to parse."""


MAX_CONTAINERS = 1_000_000
"""Maximum number of lists and objects in the JSON of a row: empty ones take 72 bytes each for 3
bytes of text."""


class LimitExceededError(UserError):
    """A sample exceeds the limits of boxes, parts, messages or answers."""


def check_json(content: bytes, where: str) -> None:
    """Reject JSON with too many brackets, also inside texts.

    Raises LimitExceededError at `where`.
    """
    if len(content) > MAX_CONTAINERS:
        found = content.count(b"[") + content.count(b"{")
        check_limit(found, MAX_CONTAINERS, "lists and objects", where)


def check_limit(count: int, limit: int, what: str, where: str = "") -> None:
    """Raise LimitExceededError if `count` exceeds the limit."""
    if count > limit:
        raise LimitExceededError(
            f"{count:,} {what}",
            where=where,
            expected=f"at most {limit:,} {what} in a sample",
            remedy="split the sample, or remove it",
        )
