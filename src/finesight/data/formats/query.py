"""Rows of `query`, `response` and `image`, boxes as JSON under `bbox_2d` in the response.

{"image": ["a.jpg"], "query": "what is written on the ghost?",
 "response": "{\\"bbox_2d\\": [467, 628, 521, 661]}"}

Boxes are corners in pixels of the original picture unless --box-format or --box-units say other;
one or a list of them, text around the JSON kept, a ```json fence dropped, as each family writes its
own. Pictures come before the query unless it marks their places with `<image>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from finesight.data.boxes import BoxForm
from finesight.data.case import Case, case_of
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

BOX_KEY = "bbox_2d"
_LABELS = ("label", "text_content")
_TAG = re.compile("<image>")
_FENCE = re.compile(r"```(?:json)?\s*([\[{][^`]*?\"bbox_2d\"[^`]*[\]}])\s*```")
_OPENING = re.compile(r"[\[{]")
Boxes = list[tuple[object, str | None]]


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
    answer = tuple(_answer(response, scene))
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


def _answer(response: str, scene: Scene) -> Iterator[Part]:
    for piece in _boxes_in(_FENCE.sub(r"\1", response)):
        if isinstance(piece, str):
            yield plain(piece)
            continue
        scene.need_one_picture()
        for numbers, label in piece:
            yield scene.box(numbers, label, BoxForm())


def _boxes_in(text: str) -> Iterator[str | Boxes]:
    """Text and JSON of boxes in turn. Raises UserError where `bbox_2d` remains as text."""
    decoder, start, at = json.JSONDecoder(), 0, 0
    while found := _OPENING.search(text, at):
        try:
            value, at = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            at = found.end()
            continue
        if BOX_KEY in text[found.start() : at]:
            yield from filter(None, [text[start : found.start()]])
            yield _boxes(value)
            start = at
    if BOX_KEY in text[start:]:
        raise UserError(
            f"{BOX_KEY} outside of JSON in the response {text[start:][:80]!r}",
            expected=f'{{"{BOX_KEY}": [x1, y1, x2, y2]}}',
            remedy="correct the row",
        )
    yield from filter(None, [text[start:]])


def _boxes(value: object) -> Boxes:
    boxes: Boxes = []
    for item in listed(value):
        if not isinstance(item, dict) or not {BOX_KEY} <= item.keys() <= {BOX_KEY, *_LABELS}:
            raise UserError(
                f"the box {str(item)[:80]}",
                expected=f'{{"{BOX_KEY}": [four numbers], "label": text}}',
                remedy="correct the row",
            )
        labels = [str(item[key]) for key in _LABELS if item.get(key) is not None]
        boxes.append((item[BOX_KEY], labels[0] if labels else None))
    return boxes


FORMAT = Format(
    name="query",
    looks='"image": ["path"], "query": "...", "response": "..."',
    keys=frozenset({"query", "response"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
)
