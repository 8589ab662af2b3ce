"""The dataset format of ms-swift, with boxes under `objects`.

{"messages": [{"role": "user", "content": "<image>Find the <ref-object>"},
              {"role": "assistant", "content": "<bbox><bbox>"}], "images": ["a.jpg"],
 "objects": {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]}}

The page "Custom Dataset" of ms-swift documents it. Placeholders in the text are replaced in order:
`<image>` by the next of `images`, `<ref-object>` by the next of `ref`, and `<bbox>` by the next of
`bbox`. Without `<image>` placeholders, the images precede the first question.

A box is two corners. With `bbox_type` "real", the default, they are in pixels of the image with the
0-based index `image_id`; with "norm1" they are normalized. A reference directly before boxes is
their label; elsewhere it is text. References without a placeholder are ignored, as in ms-swift.

Messages may also be given under `conversation`, as pairs of human and assistant, or under `query`,
`response` and `history`. LLaMA-Factory messages with images have the same format. See
`conversation_rows` for boxes in answer texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finesight.data.boxes import BoxConvention
from finesight.data.formats import conversation_rows
from finesight.data.formats.conversation_rows import (
    Turn,
    build_turns_example,
    format_answer,
    list_checked_images,
    list_images,
    parse_answer,
    parse_history,
    parse_turns,
)
from finesight.data.formats.dataset_format import (
    IMAGE_KEYS,
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    RowImages,
    as_list,
    has_value,
    make_text_part,
    reject_unsupported_keys,
    split_at_pattern,
    strip_object_refs,
)
from finesight.data.formats.query_response import add_image_placeholders
from finesight.data.jsonl import LocatedSample
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import BoxPart, ContentPart, Message, Role, TextPart, format_number
from finesight.errors import UserError

PLACEHOLDER = re.compile(r"<image>|(?P<ref><ref-object>)?(?P<boxes>(?:<bbox>)+)|<ref-object>")
CONVENTIONS = {"real": BoxConvention(), "norm1": BoxConvention(units="1")}
MESSAGE_KEYS = ("messages", "conversation", "query", "response", "history", "system", "objects")


def detect(records: Sequence[Record]) -> str | None:
    """Detect ms-swift rows, and return the reason for the match or None.

    All records have messages of text, or pairs under `conversation`, or a query with `objects` in
    at least one record.
    """
    if all(isinstance(record.get("conversation"), list) for record in records):
        return f"pairs of turns under `conversation` in all of the first {len(records)}"
    num_with_boxes = sum(has_value(record.get("objects")) for record in records)
    if all({"query", "response"} <= record.keys() for record in records):
        return (
            f"a query with objects in {num_with_boxes} of the first {len(records)}"
            if num_with_boxes
            else None
        )
    if not all(_has_text_messages(record) for record in records):
        return None
    num_with_images = sum(bool(list_images(record)) for record in records)
    return (
        f"messages of text, images in {num_with_images} and objects in {num_with_boxes} of the"
        f" first {len(records)};"
        " LLaMA-Factory's messages with images are the same"
    )


def _has_text_messages(record: Record) -> bool:
    messages = record.get("messages")
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
    )


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from an ms-swift row."""
    reject_unsupported_keys(row.record, ("label",))
    images, objects = RowImages(context), _ObjectQueue.from_value(row.record.get("objects"))
    listed_images = list_checked_images(row.record)
    remaining_images = iter(listed_images)

    def parse_text(role: Role, text: str) -> Iterator[ContentPart]:
        for piece in split_at_pattern(text, PLACEHOLDER):
            if isinstance(piece, str):
                yield from (
                    parse_answer(piece, images)
                    if role == "assistant"
                    else [strip_object_refs(piece)]
                )
            elif piece[0] == "<image>":
                yield images.add_image(next(remaining_images))
            elif piece["boxes"] is None:
                yield make_text_part(objects.next_ref())
            else:
                label = objects.next_ref() if piece["ref"] else None
                for _ in range(piece["boxes"].count("<bbox>")):
                    yield objects.next_box(images, label)

    turns = add_image_placeholders(_parse_turns(row.record), len(listed_images))
    case = build_turns_example(row, context, turns, parse_text, *MESSAGE_KEYS, *IMAGE_KEYS)
    objects.check_consumed()
    return case


def _parse_turns(record: Record) -> list[Turn]:
    system = record.get("system")
    start: list[Turn] = [("system", str(system))] if system else []
    if "messages" in record:
        return parse_turns(record, "messages")
    if "conversation" in record:
        return start + _parse_pairs(record["conversation"])
    query, response = record.get("query"), record.get("response")
    if not isinstance(query, str) or not isinstance(response, str):
        raise UserError(
            f"a row with the keys {', '.join(map(str, record))}",
            expected="messages, conversation, or query and response",
            remedy="correct the row, or choose another --format",
        )
    return [*start, *parse_history(record), ("user", query), ("assistant", response)]


def _parse_pairs(value: object) -> list[Turn]:
    turns: list[Turn] = []
    for pair in as_list(value):
        texts = [pair.get(key) for key in ("human", "assistant")] if isinstance(pair, dict) else []
        if [type(text) for text in texts] != [str, str]:
            raise UserError(
                f"the turn {str(pair)[:80]}",
                expected='{"human": text, "assistant": text}',
                remedy="correct the row",
            )
        turns += [("user", str(texts[0])), ("assistant", str(texts[1]))]
    return turns


@dataclass(slots=True)
class _ObjectQueue:
    """References and boxes of a row in the order of their placeholders in the text."""

    refs: Iterator[object]
    boxes: Iterator[tuple[object, int]]
    convention: BoxConvention

    @classmethod
    def from_value(cls, value: object) -> _ObjectQueue:
        """Build the queue from the value of the key `objects` of a row.

        Raises:
            UserError: The value does not have the documented structure.
        """
        objects: dict[str, Any] = value if isinstance(value, dict) else {}
        bbox_type = objects.get("bbox_type") or "real"
        unknown = objects.keys() - {"ref", "bbox", "bbox_type", "image_id", "width", "height"}
        is_known = isinstance(bbox_type, str) and bbox_type in CONVENTIONS
        if unknown or not is_known or (has_value(value) and not objects):
            raise UserError(
                f"objects {str(value)[:80]}",
                expected="{ref: texts, bbox: boxes, bbox_type: real or norm1, image_id: indices}",
                remedy="correct the row",
            )
        boxes, image_ids = as_list(objects.get("bbox")), as_list(objects.get("image_id"))
        image_ids += [0] * (len(boxes) - len(image_ids))
        valid_ids = [
            image_id for image_id in image_ids if isinstance(image_id, int) and image_id >= 0
        ]
        if not len(valid_ids) == len(image_ids) == len(boxes):
            raise UserError(
                f"image_id {str(objects.get('image_id'))[:60]} for {len(boxes)} boxes",
                expected="a 0-based image index for each box",
                remedy="correct the row",
            )
        return cls(
            iter(as_list(objects.get("ref"))),
            zip(boxes, valid_ids, strict=True),
            CONVENTIONS[bbox_type],
        )

    def next_ref(self) -> str:
        ref = next(self.refs, None)
        if isinstance(ref, str):
            return ref
        raise UserError(
            f"a `<ref-object>` for the reference {ref!r}",
            expected="a text under objects.ref for each `<ref-object>`",
            remedy="correct the row",
        )

    def next_box(self, images: RowImages, label: str | None) -> BoxPart:
        box = next(self.boxes, None)
        if box is not None:
            return images.create_box(box[0], label, self.convention, image_index=box[1])
        raise UserError(
            "a `<bbox>` without a box",
            expected="a box under objects.bbox for each `<bbox>`",
            remedy="correct the row",
        )

    def check_consumed(self) -> None:
        """Raise UserError if boxes remain for which the text has no placeholder.

        Remaining references are ignored, as in ms-swift.
        """
        num_left = len(list(self.boxes))
        if num_left:
            raise UserError(
                f"{num_left} boxes under objects.bbox have no `<bbox>` in the text",
                expected="a `<bbox>` for each box",
                remedy="correct the row",
            )


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> conversation_rows.Files:
    """Write ms-swift rows with `<image>` placeholders, and boxes in pixels under `objects`."""

    def make_record(located_sample: LocatedSample) -> Record:
        placeholder, objects = (
            conversation_rows.ImagePlaceholder(located_sample, context),
            _ObjectColumns([], [], []),
        )
        messages = [
            {"role": message.role, "content": "".join(_iter_texts(message, placeholder, objects))}
            for message in located_sample.sample.messages
        ]
        row: Record = {"messages": messages}
        if placeholder.image_names:
            row["images"] = placeholder.image_names
        if objects.bbox:
            row["objects"] = asdict(objects)
        return conversation_rows.build_record(located_sample, context, row)

    yield from conversation_rows.write_rows(samples, make_record)
    context.notes.append(
        "ms-swift starts relative paths at the current folder: run it in the output folder, or set"
        " ROOT_IMAGE_DIR to it"
    )


@dataclass(slots=True)
class _ObjectColumns:
    """Columns of the key `objects` of an exported row, filled while its texts are rendered."""

    ref: list[str]
    bbox: list[list[int | float]]
    image_id: list[int]


def _iter_texts(
    message: Message, placeholder: conversation_rows.ImagePlaceholder, objects: _ObjectColumns
) -> Iterator[str]:
    has_label = False
    for part in message.content:
        if not isinstance(part, BoxPart):
            has_label = False
            is_text = message.role == "assistant" and isinstance(part, TextPart)
            yield (
                format_answer((part,), 1)
                if is_text
                else conversation_rows.render_part(part, placeholder)
            )
            continue
        if has_label and part.label is None:
            raise UserError(
                "a box without a label right after one that has a label",
                expected="text between the two, or a label for both",
                remedy="export to samples, or remove the sample",
            )
        if part.label is not None:
            has_label = True
            objects.ref.append(make_text_part(part.label).text)
            yield "<ref-object>"
        objects.bbox.append([format_number(value) for value in part.xyxy])
        objects.image_id.append(part.image)
        yield "<bbox>"


FORMAT = DatasetFormat(
    name="ms-swift",
    description='"messages": [{"role": "user", "content": "<image>..."}], "images": ["path"]',
    typical_keys=frozenset({"messages", "images", "objects", "role", "content"}),
    detect=detect,
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=write_files,
)
