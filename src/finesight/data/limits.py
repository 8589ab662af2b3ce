"""Size limits of samples, which protect the loader from corrupt and malicious files."""

from __future__ import annotations

from finesight.errors import UserError

MAX_BOXES = 10_000
"""Maximum number of boxes in a sample, which are about 300,000 tokens as text."""

MAX_PARTS = 30_000
"""Maximum number of content parts (texts, images, videos and boxes) in a sample."""

MAX_MESSAGES = 10_000
"""Maximum number of messages in a sample."""

MAX_ANSWERS = 10_000
"""Maximum number of answers to a question. Each becomes a training sample or a reference."""

MAX_LABEL_FILE_BYTES = 2**24
"""Maximum number of bytes of a label file, which annotates a single image."""

MAX_DESCRIPTION_BYTES = 2**19
"""Maximum number of bytes of a YAML dataset description, parsed in up to 5 s."""


MAX_CONTAINERS = 1_000_000
"""Maximum number of lists and objects in the JSON of a row.

An empty list takes 2 to 3 bytes of text but 72 bytes of memory.
"""


class LimitExceededError(UserError):
    """Raised when a sample has too many boxes, parts, messages, answers or bytes."""


def check_json(content: bytes, where: str) -> None:
    """Reject JSON with too many lists and objects before it is parsed.

    Brackets are counted without parsing, so brackets inside strings count as well.

    Raises:
        LimitExceededError: There are more than `MAX_CONTAINERS` brackets. `where` is the location
            in the error message.
    """
    if len(content) > MAX_CONTAINERS:
        found = content.count(b"[") + content.count(b"{")
        check_limit(found, MAX_CONTAINERS, "lists and objects", where)


def check_limit(count: int, limit: int, what: str, where: str = "") -> None:
    """Raise LimitExceededError if a count exceeds its limit.

    Args:
        count: Counted number.
        limit: Largest valid number.
        what: Name of the counted items in the error message.
        where: Location in the error message.
    """
    if count > limit:
        raise LimitExceededError(
            f"{count:,} {what}",
            where=where,
            expected=f"at most {limit:,} {what} in a sample",
            remedy="split the sample, or remove it",
        )
