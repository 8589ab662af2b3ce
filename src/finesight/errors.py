"""What a user may see: an error that says where, what, what was expected and what to do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that move the cursor, colour or reorder what follows, or cannot be written at all."""


MOST_CHARACTERS = 10_000
"""Of each part of a message: values of others, with millions of characters, may stand in it."""


def printable(text: str) -> str:
    """The text with such characters as escapes: names and messages of others reach the terminal."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escaped_json(text: str) -> str:
    """Return JSON text with lone surrogates as escapes, so that it can be written as UTF-8.

    Python has them in the names of files that are not UTF-8.
    """
    return text.encode("utf-8", "backslashreplace").decode()


class UserError(Exception):
    """Something in the user's input or machine is wrong; the command ends with exit code 2.

    The message is complete without a traceback: `where` names the file and line, setting or
    argument, `what` the offending value, `expected` what would have been right, and `remedy`
    the next thing to type or change. What others wrote may stand in each: all are `printable`.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", remedy: str = "") -> None:
        self.what, self.where = printable(_cut(what)), printable(_cut(where))
        self.expected, self.remedy = printable(_cut(expected)), printable(_cut(remedy))
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not survive the way back from a worker process.
        return _rebuild, (type(self), self.what, self.where, self.expected, self.remedy)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def _rebuild(kind: type[UserError], what: str, where: str, expected: str, remedy: str) -> UserError:
    return kind(what, where=where, expected=expected, remedy=remedy)


def look_beside(path: Path) -> str:
    """The remedy where a file is missing: the most similar name in its folder, if there is one."""
    import difflib

    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {path.parent / similar[0]}?" if similar else "check the path"


class Interrupted(Exception):
    """A run was asked to stop and has written a checkpoint; the command ends with exit code 75."""
