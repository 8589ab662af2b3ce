"""Samples as rows of a foreign format: their turns as texts, their pictures as marks in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from finesight.data.formats.boxed_text import answer_text
from finesight.data.formats.format import PICTURE_KEYS, UNREAD_KEYS, Writing, plain
from finesight.data.formats.turns import Turn
from finesight.data.jsonl import Located
from finesight.data.rows import Record
from finesight.data.sample import BoxPart, ImagePart, Part, TextPart
from finesight.errors import UserError

FILE = "data.jsonl"

READ_KEYS = frozenset(
    {
        *("messages", "conversations", "conversation", "query", "response", "system"),
        *("instruction", "input", "output", "label"),
    }
)
"""What a note of the user must not be called: some format would read it as something said."""

Files = Iterator[tuple[str, bytes]]
"""Relative names and content; a name that comes again goes on with its file."""


def rows(samples: Sequence[Located], record_of: Callable[[Located], Record]) -> Files:
    """One line a sample in data.jsonl. Raises UserError naming a sample that has no place there."""
    for located in samples:
        yield FILE, f"{as_json(record_of, located)}\n".encode()


def note_boxes(samples: Sequence[Located], writing: Writing, what_follows: str = "") -> None:
    """Tell the user, where there are boxes, what they have become in the texts."""
    boxed = sum(any(isinstance(part, BoxPart) for part in one.sample.parts()) for one in samples)
    if boxed:
        writing.notes.append(
            f"the boxes of {boxed} samples are JSON in the answers, in pixels of the original"
            f" pictures{what_follows}"
        )


def as_json(record_of: Callable[[Located], Record], located: Located) -> str:
    """The record of a sample; what is wrong with it is told with the sample's id."""
    try:
        return json.dumps(record_of(located), ensure_ascii=False)
    except UserError as error:
        raise UserError(
            f"the sample {located.sample.id!r} cannot be written: {error.what}",
            where=error.where,
            expected=error.expected,
            remedy=error.remedy,
        ) from error


def record(located: Located, writing: Writing, said: Mapping[str, object]) -> Record:
    """A row of `said` with the sample's id and its notes; what is lost is counted."""
    sample = located.sample
    taken = {"id", *said, *READ_KEYS, *PICTURE_KEYS, *UNREAD_KEYS}
    writing.lost["references"] += len(sample.references)
    writing.lost["notes under a name that the format uses"] += len(taken & sample.meta.keys())
    notes = {key: value for key, value in sample.meta.items() if key not in taken}
    return {"id": sample.id, **said, **notes}


def turns(located: Located, mark: Callable[[ImagePart], str]) -> list[Turn]:
    """Who says what, a picture as its mark, boxes in answers as JSON (see `boxed_text`).

    Raises UserError for videos, boxes in questions, and texts that would be read as something else.
    """
    sample = located.sample
    pictures = sum(isinstance(part, ImagePart) for part in sample.parts())
    return [
        (
            message.role,
            answer_text(message.content, pictures)
            if message.role == "assistant"
            else "".join(asked(part, mark) for part in message.content),
        )
        for message in sample.messages
    ]


def asked(part: Part, mark: Callable[[ImagePart], str]) -> str:
    """A part of a question as text."""
    if isinstance(part, TextPart):
        return plain(part.text).text
    if isinstance(part, ImagePart):
        return mark(part)
    raise UserError(
        f"a {part.type} in a question",
        expected="text and pictures, which are all that the format has",
        remedy="export to samples or, for boxes, to ms-swift; or leave the sample out",
    )


class Shown:
    """The pictures of a sample in the order in which its texts mark them."""

    def __init__(self, located: Located, writing: Writing, mark: str = "<image>") -> None:
        self._located, self._writing, self._mark = located, writing, mark
        self.names: list[str] = []

    def __call__(self, part: ImagePart) -> str:
        self.names.append(self._writing.name(self._located.path(part.image)))
        return self._mark
