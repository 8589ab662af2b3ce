"""The data set format of ms-swift, its boxes as numbers under `objects`.

{"messages": [{"role": "user", "content": "<image>Find the <ref-object>"},
              {"role": "assistant", "content": "<bbox><bbox>"}], "images": ["a.jpg"],
 "objects": {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]}}

As "Custom Dataset" in its documentation has it. Each `<image>` stands for the next of `images`
(where none is marked, they come before the first question), each `<ref-object>` for the next of
`ref` and each `<bbox>` for the next of `bbox`: two corners, with `bbox_type` "real" (which it is
unless given) in pixels of the picture whose number, from 0, stands in `image_id`, with "norm1" as
shares of its sides. A reference right before boxes is their label, elsewhere it is text; those
without a mark are passed over, as there. Messages are also read from `conversation`, pairs of human
and assistant, and from `query`, `response` and `history`. LLaMA-Factory's messages with images are
the same. Answers may hold boxes in their text as well, see `boxed_text`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finesight.data.boxes import BoxForm
from finesight.data.case import Case
from finesight.data.formats import texts
from finesight.data.formats.boxed_text import answer_parts, answer_text
from finesight.data.formats.format import (
    PICTURE_KEYS,
    Format,
    Reading,
    Scene,
    Writing,
    holds,
    listed,
    pieces,
    plain,
    refuse_unread,
    worded,
)
from finesight.data.formats.query import placed
from finesight.data.formats.turns import (
    Turn,
    history_of,
    images_of,
    pictures_named,
    read_turns,
    turns_of,
)
from finesight.data.jsonl import Located
from finesight.data.rows import Record, Row
from finesight.data.sample import BoxPart, Message, Part, Role, TextPart, shortest
from finesight.errors import UserError

MARK = re.compile(r"<image>|(?P<ref><ref-object>)?(?P<boxes>(?:<bbox>)+)|<ref-object>")
FORMS = {"real": BoxForm(), "norm1": BoxForm(units="1")}
KEYS = ("messages", "conversation", "query", "response", "history", "system", "objects")


def detect(records: Sequence[Record]) -> str | None:
    """Messages of plain text in all records, or pairs, or boxes beside a query."""
    if all(isinstance(record.get("conversation"), list) for record in records):
        return f"pairs of turns under `conversation` in all of the first {len(records)}"
    boxed = sum(holds(record.get("objects")) for record in records)
    if all({"query", "response"} <= record.keys() for record in records):
        return f"a query with objects in {boxed} of the first {len(records)}" if boxed else None
    if not all(_plain_messages(record) for record in records):
        return None
    shown = sum(bool(pictures_named(record)) for record in records)
    return (
        f"messages of text, images in {shown} and objects in {boxed} of the first {len(records)};"
        " LLaMA-Factory's messages with images are the same"
    )


def _plain_messages(record: Record) -> bool:
    messages = record.get("messages")
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
    )


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    refuse_unread(row.record, ("label",))
    scene, objects = Scene(reading), _Objects.of(row.record.get("objects"))
    named = images_of(row.record)
    pictures = iter(named)

    def parts_of(role: Role, text: str) -> Iterator[Part]:
        for piece in pieces(text, MARK):
            if isinstance(piece, str):
                yield from answer_parts(piece, scene) if role == "assistant" else [worded(piece)]
            elif piece[0] == "<image>":
                yield scene.picture(next(pictures))
            elif piece["boxes"] is None:
                yield plain(objects.next_ref())
            else:
                label = objects.next_ref() if piece["ref"] else None
                for _ in range(piece["boxes"].count("<bbox>")):
                    yield objects.next_box(scene, label)

    turns = placed(_turns(row.record), len(named))
    case = read_turns(row, reading, turns, parts_of, *KEYS, *PICTURE_KEYS)
    objects.finish()
    return case


def _turns(record: Record) -> list[Turn]:
    system = record.get("system")
    start: list[Turn] = [("system", str(system))] if system else []
    if "messages" in record:
        return turns_of(record, "messages")
    if "conversation" in record:
        return start + _pairs(record["conversation"])
    query, response = record.get("query"), record.get("response")
    if not isinstance(query, str) or not isinstance(response, str):
        raise UserError(
            f"a row with the keys {', '.join(map(str, record))}",
            expected="messages, conversation, or query and response",
            remedy="correct the row, or choose another --format",
        )
    return [*start, *history_of(record), ("user", query), ("assistant", response)]


def _pairs(value: object) -> list[Turn]:
    turns: list[Turn] = []
    for pair in listed(value):
        said = [pair.get(key) for key in ("human", "assistant")] if isinstance(pair, dict) else []
        if [type(text) for text in said] != [str, str]:
            raise UserError(
                f"the turn {str(pair)[:80]}",
                expected='{"human": text, "assistant": text}',
                remedy="correct the row",
            )
        turns += [("user", str(said[0])), ("assistant", str(said[1]))]
    return turns


@dataclass(slots=True)
class _Objects:
    """What `<ref-object>` and `<bbox>` stand for, in the order in which they come up."""

    refs: Iterator[object]
    boxes: Iterator[tuple[object, int]]
    form: BoxForm

    @classmethod
    def of(cls, value: object) -> _Objects:
        """From the `objects` of a row. Raises UserError unless they are as documented."""
        objects: dict[str, Any] = value if isinstance(value, dict) else {}
        kind = objects.get("bbox_type") or "real"
        unknown = objects.keys() - {"ref", "bbox", "bbox_type", "image_id", "width", "height"}
        is_known = isinstance(kind, str) and kind in FORMS
        if unknown or not is_known or (holds(value) and not objects):
            raise UserError(
                f"objects {str(value)[:80]}",
                expected="{ref: texts, bbox: boxes, bbox_type: real or norm1, image_id: numbers}",
                remedy="correct the row",
            )
        boxes, numbers = listed(objects.get("bbox")), listed(objects.get("image_id"))
        numbers += [0] * (len(boxes) - len(numbers))
        places = [number for number in numbers if isinstance(number, int) and number >= 0]
        if not len(places) == len(numbers) == len(boxes):
            raise UserError(
                f"image_id {str(objects.get('image_id'))[:60]} for {len(boxes)} boxes",
                expected="the number of a picture for each box, the first being 0",
                remedy="correct the row",
            )
        return cls(iter(listed(objects.get("ref"))), zip(boxes, places, strict=True), FORMS[kind])

    def next_ref(self) -> str:
        ref = next(self.refs, None)
        if isinstance(ref, str):
            return ref
        raise UserError(
            f"a `<ref-object>` for the reference {ref!r}",
            expected="a text under objects.ref for each `<ref-object>`",
            remedy="correct the row",
        )

    def next_box(self, scene: Scene, label: str | None) -> BoxPart:
        box = next(self.boxes, None)
        if box is not None:
            return scene.box(box[0], label, self.form, image=box[1])
        raise UserError(
            "a `<bbox>` without a box",
            expected="a box under objects.bbox for each `<bbox>`",
            remedy="correct the row",
        )

    def finish(self) -> None:
        """Refuse boxes that no text speaks of; references without a mark are passed over."""
        left = len(list(self.boxes))
        if left:
            raise UserError(
                f"{left} boxes under objects.bbox have no `<bbox>` in the text",
                expected="a `<bbox>` for each box",
                remedy="correct the row",
            )


def write(samples: Sequence[Located], writing: Writing) -> texts.Files:
    """Messages with `<image>`, and every box as numbers under `objects`, "real" pixels."""

    def record_of(located: Located) -> Record:
        shown, objects = texts.Shown(located, writing), _Written([], [], [])
        messages = [
            {"role": message.role, "content": "".join(_texts(message, shown, objects))}
            for message in located.sample.messages
        ]
        row: Record = {"messages": messages}
        if shown.names:
            row["images"] = shown.names
        if objects.bbox:
            row["objects"] = asdict(objects)
        return texts.record(located, writing, row)

    yield from texts.rows(samples, record_of)
    writing.notes.append(
        "ms-swift starts relative paths at the current folder: run it in the output folder, or set"
        " ROOT_IMAGE_DIR to it"
    )


@dataclass(slots=True)
class _Written:
    """The `objects` of a row to write."""

    ref: list[str]
    bbox: list[list[int | float]]
    image_id: list[int]


def _texts(message: Message, shown: texts.Shown, objects: _Written) -> Iterator[str]:
    labelled = False
    for part in message.content:
        if not isinstance(part, BoxPart):
            labelled = False
            is_text = message.role == "assistant" and isinstance(part, TextPart)
            yield answer_text((part,), 1) if is_text else texts.asked(part, shown)
            continue
        if labelled and part.label is None:
            raise UserError(
                "a box without a label right after one that has a label",
                expected="text between the two, or a label for both",
                remedy="export to samples, or leave the sample out",
            )
        if part.label is not None:
            labelled = True
            objects.ref.append(plain(part.label).text)
            yield "<ref-object>"
        objects.bbox.append([shortest(number) for number in part.xyxy])
        objects.image_id.append(part.image)
        yield "<bbox>"


FORMAT = Format(
    name="ms-swift",
    looks='"messages": [{"role": "user", "content": "<image>..."}], "images": ["path"]',
    keys=frozenset({"messages", "images", "objects", "role", "content"}),
    detect=detect,
    read=read,
    takes=frozenset({"prompt", "boxes"}),
    write=write,
)
