"""Turns with a picture's path between `<|vision_start|>` and `<|vision_end|>` in the text.

{"conversations": [{"from": "user", "value": "COCO Yes: <|vision_start|>a.jpg<|vision_end|>"},
                   {"from": "assistant", "value": "A dog on a lawn."}]}

Any number of turns, several pictures anywhere in the text. Where a record names its pictures under
`image` or `images`, each `<image>` in the text is the next of them. See `boxed_text` for what is
read of boxes in the answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from finesight.data.case import Case
from finesight.data.formats import texts
from finesight.data.formats.boxed_text import answer_parts
from finesight.data.formats.format import (
    PICTURE_KEYS,
    Format,
    MarksDiffer,
    Reading,
    Scene,
    Writing,
    pieces,
    worded,
)
from finesight.data.formats.picture_path import is_path
from finesight.data.formats.turns import Turn, images_of, read_turns, said_in, turns_of
from finesight.data.jsonl import Located
from finesight.data.rows import Record, Row
from finesight.data.sample import ImagePart, Part, Role
from finesight.errors import UserError

MARK = re.compile(
    r"<\|vision_start\|>(?P<path>(?:(?!<\|vision_).)*)<\|vision_end\|>|<image>", re.DOTALL
)


KEYS = ("conversations", "system", *PICTURE_KEYS)
"""Keys of a record that are read."""


def detect(records: Sequence[Record]) -> str | None:
    """Turns whatever they hold: formats with marks of their own are asked first."""
    said = [said_in(record) for record in records]
    if not all(said):
        return None
    marks = sum(len(MARK.findall(text)) for turns in said for _, text in turns)
    return f"turns with text under `value`, {marks} pictures marked in the first {len(records)}"


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    return read_conversation(row, reading, turns_of(row.record))


def read_conversation(row: Row, reading: Reading, turns: Sequence[Turn]) -> Case:
    """Build the case of a row from the role and text of each turn."""
    scene = Scene(reading)
    named = images_of(row.record)
    unplaced = iter(named)

    def parts_of(role: Role, text: str) -> Iterator[Part]:
        if role == "user" and is_path(text):
            raise UserError(
                f"the user says nothing but a path, {text.strip()[:60]!r}",
                expected="a question, with the path in a mark if it is a picture",
                remedy="choose --format picture-path if all rows are so, or correct the row",
            )
        for piece in pieces(text, MARK):
            if not isinstance(piece, str):
                yield scene.picture(piece["path"] or _next(unplaced, text))
            elif role == "assistant":
                yield from answer_parts(piece, scene)
            else:
                yield worded(piece)

    case = read_turns(row, reading, turns, parts_of, *KEYS)
    left = len(list(unplaced))
    if left:
        raise MarksDiffer(
            f"{len(named)} pictures are named, {left} of them have no `<image>` in the text",
            expected="an `<image>` for each picture",
            remedy="correct the row",
        )
    return case


def _next(unplaced: Iterator[object], text: str) -> object:
    for value in unplaced:
        return value
    raise MarksDiffer(
        f"a mark without a picture in the text {text[:60]!r}",
        expected="a path inside of the mark, or a picture under `image` or `images`",
        remedy="name the picture, or take the mark out of the text",
    )


def write(samples: Sequence[Located], writing: Writing) -> texts.Files:
    """Each picture as its path in a mark, and boxes as JSON in pixels of the original picture."""

    def record_of(located: Located) -> Record:
        def mark(part: ImagePart) -> str:
            return f"<|vision_start|>{writing.name(located.path(part.image))}<|vision_end|>"

        said = spoken(located, mark)
        turns = [{"from": role, "value": text} for role, text in said]
        return texts.record(located, writing, {"conversations": turns})

    yield from texts.rows(samples, record_of)
    texts.note_boxes(samples, writing)


def spoken(located: Located, mark: Callable[[ImagePart], str]) -> list[Turn]:
    """The turns of a sample. Raises UserError for a question that would be read as a path."""
    said = texts.turns(located, mark)
    paths = [text for role, text in said if role == "user" and is_path(text)]
    if paths:
        raise UserError(
            f"a question that is the name of a picture, {paths[0]!r}",
            expected="text that is not taken for a picture",
            remedy="export to ms-swift or samples, or leave the sample out",
        )
    return said


FORMAT = Format(
    name="conversations",
    looks='"conversations": [{"from": "user", "value": "...<|vision_start|>path<|vision_end|>"}]',
    keys=frozenset({"conversations", "from", "value"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
    write=write,
)
