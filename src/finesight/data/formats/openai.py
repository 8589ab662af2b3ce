"""Messages whose content is text or a list of texts and pictures, as chat services take them.

{"messages": [{"role": "user", "content": [{"type": "text", "text": "What cheese is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]},
              {"role": "assistant", "content": "Danbo"}]}

The training files of OpenAI's guide "Vision fine-tuning". A picture is a data URL or, for servers
of one's own, a path; `detail` says how finely the service looks and is not kept. Neighbouring
messages of one role, which the guide shows, are one turn. A picture may also be a part of type
`image` with its path under `image`, `url` or `path`, or the next one of the record's `images`, as
TRL has it. See `boxed_text` for what is read of boxes in the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finesight.data.case import Case, case_of
from finesight.data.formats import texts
from finesight.data.formats.boxed_text import answer_parts
from finesight.data.formats.format import (
    PICTURE_KEYS,
    Format,
    MarksDiffer,
    Reading,
    Scene,
    Writing,
    holds,
    merged,
    refuse_unread,
    worded,
)
from finesight.data.formats.turns import images_of, notes_of, refuse_more, role_of
from finesight.data.jsonl import Located
from finesight.data.limits import MAX_MESSAGES, check_count
from finesight.data.pictures import data_url
from finesight.data.rows import Record, Row
from finesight.data.sample import ImagePart, Part, Role, TextPart
from finesight.errors import UserError


def detect(records: Sequence[Record]) -> str | None:
    """Messages in all records, with a part that is a picture in at least one."""
    parts = 0
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            return None
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            parts += sum(map(_is_picture, content)) if isinstance(content, list) else 0
    if not parts:
        return None
    return f"messages with {parts} parts of type image_url or image in the first {len(records)}"


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    refuse_unread(row.record)
    messages, scene = row.record.get("messages"), Scene(reading)
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"messages is {str(messages)[:60]!r}",
            expected="a list of messages",
            remedy="correct the row",
        )
    check_count(len(messages), MAX_MESSAGES, "messages")
    system = row.record.get("system")
    messages = [{"role": "system", "content": system}, *messages] if holds(system) else messages
    unplaced = iter(images_of(row.record))
    turns: list[tuple[Role, list[Part]]] = []
    for message in messages:
        role, content = _said(message)
        parts = [part for item in content for part in _parts(item, role, scene, unplaced)]
        if turns and turns[-1][0] == role:
            _join(turns[-1][1], parts)
        else:
            turns.append((role, parts))
    left = len(list(unplaced))
    if left:
        raise MarksDiffer(
            f"{left} of the pictures under `images` stand in no message",
            expected='a part {"type": "image"} for each picture',
            remedy="correct the row",
        )
    first = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
    made = [
        (role, reading.asked(parts) if place == first else parts)
        for place, (role, parts) in enumerate((role, merged(parts)) for role, parts in turns)
    ]
    return case_of(row.id, made, notes_of(row.record, "messages", "system", *PICTURE_KEYS))


def _said(message: object) -> tuple[Role, list[object]]:
    """Who says what: the role and the parts of the content."""
    role = role_of({**message, **_as_system(message)}) if isinstance(message, dict) else None
    if role is None or not isinstance(message, dict):
        raise UserError(
            f"the message {str(message)[:80]}",
            expected='{"role": "system", "user" or "assistant", "content": text or a list}',
            remedy="correct the row",
        )
    refuse_more(message)
    content = message.get("content")
    return role, content if isinstance(content, list) else [{"type": "text", "text": content}]


def _as_system(message: Record) -> Record:
    return {"role": "system"} if message.get("role") == "developer" else {}


def _parts(item: object, role: Role, scene: Scene, unplaced: Iterator[object]) -> Iterator[Part]:
    if isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str):
        text = item["text"]
        yield from answer_parts(text, scene) if role == "assistant" else [worded(text)]
        return
    if isinstance(item, dict) and _is_picture(item):
        value = next((item[key] for key in _PICTURE if holds(item.get(key))), None)
        value = value.get("url") if isinstance(value, dict) and "url" in value else value
        yield scene.picture(next(unplaced, None) if value is None else value)
        return
    raise UserError(
        f"the part {str(item)[:80]}",
        expected='{"type": "text", "text": ...} or {"type": "image_url", "image_url": {...}}',
        remedy="correct the row, or leave it out",
    )


_PICTURE = ("image_url", "image", "url", "path")


def _is_picture(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") in ("image_url", "image")


def _join(before: list[Part], after: list[Part]) -> None:
    """Add a message to one of the same role before it; text after text starts a new line."""
    if before and after and isinstance(before[-1], TextPart) and isinstance(after[0], TextPart):
        before.append(TextPart(text="\n"))
    before += after


def write(samples: Sequence[Located], writing: Writing) -> texts.Files:
    """Pictures as data URLs, the one form that needs no server; boxes in answers as JSON."""

    def record_of(located: Located) -> Record:
        said = texts.turns(located, lambda part: "")
        messages = [
            {
                "role": role,
                "content": [_item(part, located) for part in message.content]
                if any(isinstance(part, ImagePart) for part in message.content)
                else text,
            }
            for (role, text), message in zip(said, located.sample.messages, strict=True)
        ]
        return texts.record(located, writing, {"messages": messages})

    yield from texts.rows(samples, record_of)
    texts.note_boxes(samples, writing)


def _item(part: Part, located: Located) -> Record:
    if isinstance(part, ImagePart):
        return {"type": "image_url", "image_url": {"url": data_url(located.path(part.image))}}
    return {"type": "text", "text": texts.asked(part, lambda picture: "")}


FORMAT = Format(
    name="openai",
    looks='"messages": [{"role": "user", "content": [{"type": "image_url", ...}, ...]}]',
    keys=frozenset({"messages", "role", "content"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
    write=write,
)
