"""Turns with a picture's path between `<|vision_start|>` and `<|vision_end|>` in the text.

{"conversations": [{"from": "user", "value": "COCO Yes: <|vision_start|>a.jpg<|vision_end|>"},
                   {"from": "assistant", "value": "A dog on a lawn."}]}

Any number of turns, several pictures anywhere in the text. Where a record names its pictures under
`image` or `images`, each `<image>` in the text is the next of them. See `boxed_text` for what is
read of boxes in the answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finesight.data.case import Case
from finesight.data.formats.boxed_text import answer_parts
from finesight.data.formats.format import (
    PICTURE_KEYS,
    Format,
    Reading,
    Scene,
    listed,
    pieces,
    plain,
)
from finesight.data.formats.picture_path import is_path
from finesight.data.formats.turns import Role, read_turns, said_in
from finesight.data.rows import Record, Row
from finesight.data.sample import Part
from finesight.errors import UserError

MARK = re.compile(r"<\|vision_start\|>(?P<path>.*?)<\|vision_end\|>|<image>", re.DOTALL)


def detect(records: Sequence[Record]) -> str | None:
    """Turns whatever they hold: formats with marks of their own are asked first."""
    said = [said_in(record) for record in records]
    if not all(said):
        return None
    marks = sum(len(MARK.findall(text)) for turns in said for _, text in turns)
    return f"turns with text under `value`, {marks} pictures marked in the first {len(records)}"


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    scene = Scene(reading)
    named = [value for key in PICTURE_KEYS for value in listed(row.record.get(key))]
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
                yield plain(piece)

    case = read_turns(row, reading, parts_of, *PICTURE_KEYS)
    left = len(list(unplaced))
    if left:
        raise UserError(
            f"{len(named)} pictures are named, {left} of them have no `<image>` in the text",
            expected="an `<image>` for each picture",
            remedy="correct the row",
        )
    return case


def _next(unplaced: Iterator[object], text: str) -> object:
    for value in unplaced:
        return value
    raise UserError(
        f"a mark without a picture in the text {text[:60]!r}",
        expected="a path inside of the mark, or a picture under `image` or `images`",
        remedy="name the picture, or take the mark out of the text",
    )


FORMAT = Format(
    name="conversations",
    looks='"conversations": [{"from": "user", "value": "...<|vision_start|>path<|vision_end|>"}]',
    keys=frozenset({"conversations", "from", "value"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
)
