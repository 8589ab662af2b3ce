"""Rows of `query`, `response` and `image`, boxes as JSON under `bbox_2d` in the response.

{"image": ["a.jpg"], "query": "what is written on the ghost?",
 "response": "{\\"bbox_2d\\": [467, 628, 521, 661]}"}

See `boxed_text` for what is read of boxes. Pictures come before the query unless it marks their
places with `<image>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finesight.data.case import Case, case_of
from finesight.data.formats.boxed_text import BOX_KEY, answer_parts
from finesight.data.formats.format import (
    PICTURE_KEYS,
    Format,
    Reading,
    Scene,
    listed,
    pieces,
    plain,
    refuse_unread,
)
from finesight.data.formats.turns import notes_of
from finesight.data.rows import Record, Row
from finesight.data.sample import Message, Part
from finesight.errors import UserError

_TAG = re.compile("<image>")


def detect(records: Sequence[Record]) -> str | None:
    """Every record has a query and a response."""
    if not all({"query", "response"} <= record.keys() for record in records):
        return None
    boxes = sum(BOX_KEY in str(record["response"]) for record in records)
    return f"keys query and response, {BOX_KEY} in {boxes} of the first {len(records)}"


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    scene = Scene(reading)
    refuse_unread(row.record)
    messages: list[Message] = []
    if row.record.get("system"):
        messages.append(Message(role="system", content=(plain(str(row.record["system"])),)))
    query, response = _text(row.record, "query"), _text(row.record, "response")
    values = [value for key in PICTURE_KEYS for value in listed(row.record.get(key))]
    asked = reading.asked(list(_question(query, values, scene)))
    answer = tuple(answer_parts(response, scene))
    messages += [Message(role="user", content=asked), Message(role="assistant", content=answer)]
    notes = notes_of(row.record, "query", "response", "system", *PICTURE_KEYS)
    return case_of(row.id, messages, notes)


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{key} is {value!r}", expected="text", remedy="correct the row")
    return value


def _question(query: str, values: list[object], scene: Scene) -> Iterator[Part]:
    tags = len(_TAG.findall(query))
    if tags not in (0, len(values)):
        raise UserError(
            f"{tags} `<image>` in the query for {len(values)} pictures",
            expected="one for each picture, or none",
            remedy="correct the row",
        )
    pictures = iter(values)
    if not tags:
        yield from map(scene.picture, pictures)
    for piece in pieces(query, _TAG):
        yield plain(piece) if isinstance(piece, str) else scene.picture(next(pictures))


FORMAT = Format(
    name="query",
    looks='"image": ["path"], "query": "...", "response": "..."',
    keys=frozenset({"query", "response"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
)
