"""Exceptions with messages for the user, and escaping of untrusted text in messages."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that would move the cursor, change colors or reorder text, or cannot be encoded."""

MAX_PART_CHARS = 10_000
"""Maximum number of characters per part of a message.

A message may contain values of untrusted files.
"""

LABEL_TRAIN_FRACTION = 0.8
"""Fraction of the labels for training, if others are required for validation."""


def escape_unprintable(text: str) -> str:
    """Escape characters of untrusted text that could manipulate the terminal."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def escape_unprintable_json(text: str) -> str:
    """Escape such characters in JSON text, which keeps its value."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shorten(text: str, max_chars: int) -> str:
    """Truncate a text to a number of characters, with an ellipsis."""
    if len(text) <= max_chars:
        return text
    return f"{text[: max_chars - 3]}..."


def escape_surrogates(text: str) -> str:
    """Escape lone surrogates in JSON text, so that it can be encoded as UTF-8.

    Python represents bytes of file names that are not UTF-8 as lone surrogates.
    """
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class Step:
    """An operation with its arguments, proposed as the next one.

    As a text, it has the format that the operations have set, because only they know options.

    Attributes:
        purpose: Reason or condition, such as `label images first`.
        alternative: Another step with the same effect.
    """

    operation: str
    arguments: Mapping[str, object]
    purpose: str = ""
    alternative: Step | None = None

    def __str__(self) -> str:
        return self.format(_format_step)

    def format(self, format_step: Callable[[Step], str]) -> str:
        """Return purpose and text of the step and its alternative."""
        steps = [self]
        if self.alternative is not None:
            steps.append(self.alternative)
        texts = []
        for step in steps:
            parts = filter(None, [step.purpose, format_step(step)])
            texts.append(": ".join(parts))
        return "; ".join(texts)


Remedy = str | Step
"""How to fix a problem."""

_format_step: Callable[[Step], str] = attrgetter("operation")


console_format: ContextVar[Callable[[Step], str]] = ContextVar(
    "console_format", default=lambda step: _format_step(step)
)
"""Format of steps in messages on the console of a training: calls, if a Python program trains."""


def set_step_format(format_step: Callable[[Step], str]) -> None:
    """Set the function that formats operation and arguments of a step in messages."""
    global _format_step
    _format_step = format_step


class StopTraining(Exception):
    """Raised by a callback to end the training after the finished step.

    The run then ends as after its last step: with a checkpoint, an evaluation, the trained weights
    and a report.
    """


class UserError(Exception):
    """Raised for a problem that the user can fix; commands then exit with code 2.

    The message states location, problem, expected value and remedy. It needs no traceback and is
    safe to print.
    """

    def __init__(
        self, what: str, *, where: str = "", expected: str = "", remedy: Remedy = ""
    ) -> None:
        self.what, self.where, self.expected = map(_escape_part, (what, where, expected))
        self.remedy = remedy if isinstance(remedy, Step) else _escape_part(remedy)
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines = [f"{self.where}: {self.what}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.remedy:
            lines.append(f"  remedy: {_escape_part(str(self.remedy))}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments cannot be unpickled by default.
        build = partial(type(self), where=self.where, expected=self.expected, remedy=self.remedy)
        return build, (self.what,)


def _escape_part(text: str) -> str:
    return escape_unprintable(shorten(text, MAX_PART_CHARS))


def format_count(count: int, noun: str) -> str:
    """Format a number with a regular noun."""
    if count == 1:
        return f"{count} {noun}"
    ending = "es" if noun.endswith(("s", "x")) else "s"
    return f"{count} {noun}{ending}"


def describe_choices(names: Iterable[object], kind: str) -> str:
    """Describe the valid names of a kind, of which there may be none."""
    listed = ", ".join(map(str, names))
    if not listed:
        return f"no {kind}: there is none"
    return f"one of {listed}"


def describe_indices(count: int, noun: str) -> str:
    """Describe the valid indices of a number of things, of which there may be none."""
    if not count:
        return f"no {noun}: there is none"
    if count == 1:
        return f"index 0: there is one {noun}"
    return f"an index below {count}, the number of {noun}s"


def suggest_name(name: str, names: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """Return a remedy for an unknown name: the most similar valid name, or `otherwise`."""
    import difflib

    similar = difflib.get_close_matches(name, [n for n in names if n != name], n=1)
    if not similar:
        return otherwise
    return f"did you mean {prefix}{similar[0]}?"


def suggest_similar_path(path: Path, otherwise: Remedy = "check the path") -> Remedy:
    """Return a remedy for a missing file: the most similar name in its folder, or `otherwise`.

    Paths in recipes start at the working directory of their creation, often the parent folder.
    """
    if not path.is_absolute() and os.path.exists(os.path.join("..", path)):
        return "run the command in the parent folder (cd ..), in which it exists"
    if path.name in {"labels.jsonl", "labels_eval.jsonl"}:
        # Existing labels are all for training: there is no fraction, or only one label.
        is_new = not (path.parent / "labels.jsonl").exists()
        purpose = "label at least 2 images, some for validation"
        prompt = None
        if is_new:
            purpose = "label images first"
            prompt = "TEXT"
        arguments: dict[str, object] = {
            "run_or_model": "MODEL",
            "sources": ["IMAGES"],
            "out": str(path.parent),
            "train_fraction": LABEL_TRAIN_FRACTION,
            "prompt": prompt,
        }
        return Step("label", arguments, purpose)
    if not path.parent.is_dir():
        return otherwise
    siblings = [sibling.name for sibling in path.parent.iterdir() if sibling != path]
    return suggest_name(path.name, siblings, "", f"{path.parent}/") or otherwise


def build_bind_error(host: str, port: int, error: Exception) -> UserError:
    """Build the error for an address on which a server cannot listen."""
    reason: object = error
    if isinstance(error, OSError):
        reason = error.strerror or error
        if error.errno and not isinstance(error, socket.gaierror):
            # Python appends the address to the text of system errors.
            reason = os.strerror(error.errno)
    return UserError(
        f"cannot listen on {host}:{port} ({reason})",
        expected="a local address and a free port",
        remedy="add --port 0 for any free port, or stop the other program",
    )


class UnavailableError(UserError):
    """Raised for files of a hub that cannot be downloaded now."""


EXIT_CHECKPOINTED = 75
"""Exit code of a run that was stopped and saved a checkpoint."""

EXIT_CODES_VARIABLE = "FINESIGHT_EXIT_CODES"
"""Environment variable with the folder in which each rank writes its exit code, for a launcher."""


class TrainingInterrupted(Exception):
    """Raised when a run was interrupted and saved a checkpoint; commands exit with code 75."""


class TrainingStopped(TrainingInterrupted):
    """Raised when a run has reached the step of `--stop-after` and saved a checkpoint."""
