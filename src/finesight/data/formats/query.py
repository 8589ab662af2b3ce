"""Rows of `query`, `response` and `image`, boxes as JSON under `bbox_2d` in the response.

{"image": ["a.jpg"], "query": "what is written on the ghost?",
 "response": "{\\"bbox_2d\\": [467, 628, 521, 661]}"}

See `boxed_text` for what is read of boxes. `history` holds earlier rounds as pairs of texts and
`system` the system prompt. Pictures come before the first question unless `<image>` marks their
places. This is the query-response format of ms-swift ("Custom Dataset" in its documentation).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

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
from finesight.data.formats.turns import Turn, history_of, images_of, read_turns
from finesight.data.json_boxes import BOX_KEY
from finesight.data.jsonl import Located
from finesight.data.rows import Record, Row
from finesight.data.sample import Part, Role
from finesight.errors import UserError

TAG = re.compile("<image>")
KEYS = ("query", "response", "history", "system", *PICTURE_KEYS)


def detect(records: Sequence[Record]) -> str | None:
    """Every record has a query and a response."""
    if not all({"query", "response"} <= record.keys() for record in records):
        return None
    boxes = sum(BOX_KEY in str(record["response"]) for record in records)
    return f"keys query and response, {BOX_KEY} in {boxes} of the first {len(records)}"


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    scene = Scene(reading)
    record = row.record
    system = record.get("system")
    turns: list[Turn] = [("system", str(system))] if system else []
    turns += history_of(record)
    turns += [("user", _text(record, "query")), ("assistant", _text(record, "response"))]
    named = images_of(record)
    pictures = iter(named)

    def parts_of(role: Role, text: str) -> Iterator[Part]:
        for piece in pieces(text, TAG):
            if not isinstance(piece, str):
                yield scene.picture(next(pictures))
            elif role == "assistant":
                yield from answer_parts(piece, scene)
            else:
                yield worded(piece)

    return read_turns(row, reading, placed(turns, len(named)), parts_of, *KEYS)


def placed(turns: list[Turn], pictures: int) -> list[Turn]:
    """The turns with an `<image>` for every picture: where none has one, the first question.

    Raises UserError where some pictures have a place and others have not.
    """
    tags = sum(len(TAG.findall(text)) for _, text in turns)
    if tags == pictures:
        return turns
    if tags:
        raise MarksDiffer(
            f"{tags} `<image>` in the texts for {pictures} pictures",
            expected="one for each picture, or none",
            remedy="correct the row",
        )
    first = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise UserError(
            f"{pictures} images but no user message",
            expected="a user message that the images belong to",
            remedy="correct the row",
        )
    role, text = turns[first]
    return [*turns[:first], (role, "<image>" * pictures + text), *turns[first + 1 :]]


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{key} is {value!r}", expected="text", remedy="correct the row")
    return value


def write(samples: Sequence[Located], writing: Writing) -> texts.Files:
    """Earlier rounds under `history`, `<image>` where a picture stands, boxes as JSON."""

    def record_of(located: Located) -> Record:
        shown = texts.Shown(located, writing)
        said = texts.turns(located, shown)
        system, said = (said[0][1], said[1:]) if said[0][0] == "system" else ("", said)
        spoken = [text for _, text in said]
        rounds = [list(pair) for pair in zip(spoken[::2], spoken[1::2], strict=True)]
        row: Record = {"query": rounds[-1][0], "response": rounds[-1][1]}
        if len(rounds) > 1:
            row["history"] = rounds[:-1]
        if system:
            row["system"] = system
        if shown.names:
            row["images"] = shown.names
        return texts.record(located, writing, row)

    yield from texts.rows(samples, record_of)
    texts.note_boxes(samples, writing)


FORMAT = Format(
    name="query",
    looks='"image": ["path"], "query": "...", "response": "..."',
    keys=frozenset({"query", "response"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
    write=write,
)
