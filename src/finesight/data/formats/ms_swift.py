r"""The dataset formats of ms-swift: messages with boxes under `objects`, and query-response.

{"messages": [{"role": "user", "content": "<image>Find the <ref-object>"},
              {"role": "assistant", "content": "<bbox><bbox>"}], "images": ["a.jpg"],
 "objects": {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]}}

The page "Custom Dataset" of ms-swift documents both. Placeholders in the text are replaced in
order: `<image>` by the next of `images`, `<ref-object>` by the next of `ref`, and `<bbox>` by the
next of `bbox`. Without `<image>` placeholders, the images precede the first question. The same
applies to `<video>` and the video files under `videos`.

A box is two corners. With `bbox_type` "real", the default, they are in pixels of the image with the
0-based index `image_id`; with "norm1" they are normalized. A reference directly before boxes is
their label; elsewhere it is text. References without a placeholder are counted, and ignored as in
ms-swift.

Messages may also be given under `conversation`, as pairs of human and assistant, or under `query`,
`response` and `history`, the earlier turns as pairs of texts. LLaMA-Factory messages with images
have the same format. Rows of `query` and `response` without `objects` are the format
query-response, whose boxes are JSON under `bbox_2d` in the response; see `conversation_rows`.

{"image": ["a.jpg"], "query": "what is written on the ghost?",
 "response": "{\"bbox_2d\": [467, 628, 521, 661]}"}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finesight.data.boxes import BOX_KEY, BoxConvention
from finesight.data.formats.conversation_rows import (
    Files,
    PartRenderer,
    RowMedia,
    Turn,
    add_box_note,
    build_turns_example,
    format_answer,
    list_images,
    parse_history,
    parse_system,
    parse_text,
    parse_turns,
    render_turns,
    write_rows,
)
from finesight.data.formats.dataset_format import (
    VIDEO_KEYS,
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    RowImages,
    as_list,
    make_text_part,
    split_at_pattern,
)
from finesight.data.formats.row_keys import TURNS, has_value, sort_keys
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import (
    BoxPart,
    ContentPart,
    InvalidRowError,
    LocatedSample,
    Message,
    Role,
    TextPart,
    format_number,
)
from finesight.errors import UserError

IMAGE_PLACEHOLDER = re.compile("<image>")
PLACEHOLDER = re.compile(r"<image>|(?P<ref><ref-object>)?(?P<boxes>(?:<bbox>)+)|<ref-object>")
CONVENTIONS = {"real": BoxConvention(), "norm1": BoxConvention(units="1")}
QUERY_KEYS = ("query", "response", "history", "system")
_ObjectLists = dict[str, list[Any]]
_OBJECT_KEYS = ("ref", "bbox", "bbox_type", "image_id")
SWIFT_KEYS = ("messages", "conversation", "objects", *QUERY_KEYS)


def _detect_query_response(records: Sequence[Record]) -> str | None:
    if not all({"query", "response"} <= record.keys() for record in records):
        return None
    boxes = sum(BOX_KEY in str(record["response"]) for record in records)
    return f"keys query and response, {BOX_KEY} in {boxes} of the first {len(records)}"


def _detect_ms_swift(records: Sequence[Record]) -> str | None:
    """Detect messages of text, pairs under `conversation`, or a query with `objects`."""
    if all(isinstance(record.get("conversation"), list) for record in records):
        return f"pairs of turns under `conversation` in all of the first {len(records)}"
    num_with_boxes = sum(has_value(record.get("objects")) for record in records)
    if all({"query", "response"} <= record.keys() for record in records):
        reason = f"a query with objects in {num_with_boxes} of the first {len(records)}"
        return reason if num_with_boxes else None
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            return None
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
            return None
    num_with_images = sum(bool(list_images(record)) for record in records)
    return (
        f"messages of text, images in {num_with_images} and objects in {num_with_boxes} of the"
        f" first {len(records)}; LLaMA-Factory's messages with images are the same"
    )


def _parse_query_response(row: SourceRow, context: ImportContext) -> ImportExample:
    turns, no_objects = _parse_query(row.record), _ObjectQueue.from_value(None, context)
    return _build_example(row, context, turns, IMAGE_PLACEHOLDER, no_objects, QUERY_KEYS)


def _parse_ms_swift(row: SourceRow, context: ImportContext) -> ImportExample:
    objects = _ObjectQueue.from_value(row.record.get("objects"), context)
    turns = _parse_turns(row.record, context)
    example = _build_example(row, context, turns, PLACEHOLDER, objects, SWIFT_KEYS)
    if num_refs_left := len(list(objects.refs)):  # ms-swift ignores them as well
        context.other_keys["references without `<ref-object>`, not imported"] += num_refs_left
    num_boxes_left = len(list(objects.boxes))
    if num_boxes_left:
        raise InvalidRowError(
            f"{num_boxes_left} boxes under objects.bbox have no `<bbox>` in the text",
            "a `<bbox>` for each box",
        )
    return example


def _build_example(
    row: SourceRow,
    context: ImportContext,
    turns: list[Turn],
    placeholder: re.Pattern[str],
    objects: _ObjectQueue,
    keys: Sequence[str],
) -> ImportExample:
    """Build a training example from turns whose placeholders stand for images and objects."""
    has_videos = bool(list_images(row.record, VIDEO_KEYS))
    if has_videos:
        placeholder = re.compile(f"<video>|{placeholder.pattern}")
    tags = ("image", "video") if has_videos else ("image",)
    num_marked = {tag: sum(text.count(f"<{tag}>") for _, text in turns) for tag in tags}
    media = RowMedia(row.record, context, num_marked)

    def parse_turn(role: Role, text: str) -> Iterator[ContentPart]:
        for piece in split_at_pattern(text, placeholder):
            if isinstance(piece, str):
                yield from parse_text(role, piece, media)
            elif piece[0] in ("<image>", "<video>"):
                yield media.add(piece[0][1:-1])
            elif piece["boxes"] is None:
                yield make_text_part(objects.next_ref())
            else:
                label = objects.next_ref() if piece["ref"] else None
                for _ in range(piece["boxes"].count("<bbox>")):
                    yield objects.next_box(media, label)

    return build_turns_example(row, context, turns, parse_turn, media, *keys)


def _parse_turns(record: Record, context: ImportContext) -> list[Turn]:
    if "messages" in record:
        return parse_turns(record, context, "messages")
    if "conversation" not in record:
        return _parse_query(record)
    turns = parse_system(record)
    for pair in as_list(record["conversation"]):
        texts = pair if isinstance(pair, dict) else {}
        question, answer = texts.get("human"), texts.get("assistant")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise InvalidRowError(
                f"the turn {str(pair)[:80]}", '{"human": text, "assistant": text}'
            )
        sort_keys(texts, ("human", "assistant"), TURNS, context.other_keys)
        turns += [("user", question), ("assistant", answer)]
    return turns


def _parse_query(record: Record) -> list[Turn]:
    if not {"query", "response"} <= record.keys():
        raise UserError(
            f"a row with the keys {', '.join(map(str, record))}",
            expected="messages, conversation, or query and response",
            remedy="correct the row, or choose another --format",
        )
    query, response = record["query"], record["response"]
    if not isinstance(query, str) or not isinstance(response, str):
        key = "response" if isinstance(query, str) else "query"
        raise InvalidRowError(f"{key} is {record[key]!r}", "text")
    history = parse_history(record)
    return [*parse_system(record), *history, ("user", query), ("assistant", response)]


@dataclass(slots=True)
class _ObjectQueue:
    """References and boxes of a row in the order of their placeholders in the text."""

    refs: Iterator[object]
    boxes: Iterator[tuple[object, int]]
    convention: BoxConvention

    @classmethod
    def from_value(cls, value: object, context: ImportContext) -> _ObjectQueue:
        """Build the queue from the value of the key `objects` of a row."""
        objects: dict[str, Any] = value if isinstance(value, dict) else {}
        bbox_type = objects.get("bbox_type") or "real"
        unknown = objects.keys() - {*_OBJECT_KEYS, "width", "height"}
        is_known = isinstance(bbox_type, str) and bbox_type in CONVENTIONS
        if unknown or not is_known or (has_value(value) and not objects):
            raise InvalidRowError(
                f"objects {str(value)[:80]}",
                "{ref: texts, bbox: boxes, bbox_type: real or norm1, image_id: indices}",
            )
        sort_keys(objects, _OBJECT_KEYS, "objects", context.other_keys)
        boxes, image_ids = as_list(objects.get("bbox")), as_list(objects.get("image_id"))
        if any(isinstance(box, list) and len(box) == 2 for box in boxes):
            raise InvalidRowError(
                f"objects.bbox {str(boxes)[:60]} with points, which are not supported yet",
                "boxes of two corners, [x1, y1, x2, y2]",
                "leave out the rows with points",
            )
        image_ids += [0] * (len(boxes) - len(image_ids))
        valid_ids = [
            image_id for image_id in image_ids if isinstance(image_id, int) and image_id >= 0
        ]
        if not len(valid_ids) == len(image_ids) == len(boxes):
            raise InvalidRowError(
                f"image_id {str(objects.get('image_id'))[:60]} for {len(boxes)} boxes",
                "a 0-based image index for each box",
            )
        located_boxes = zip(boxes, valid_ids, strict=True)
        return cls(iter(as_list(objects.get("ref"))), located_boxes, CONVENTIONS[bbox_type])

    def next_ref(self) -> str:
        ref = next(self.refs, None)
        if isinstance(ref, str):
            return ref
        raise InvalidRowError(
            f"a `<ref-object>` for the reference {ref!r}",
            "a text under objects.ref for each `<ref-object>`",
        )

    def next_box(self, images: RowImages, label: str | None) -> BoxPart:
        box = next(self.boxes, None)
        if box is not None:
            return images.create_box(box[0], label, self.convention, image_index=box[1])
        raise InvalidRowError(
            "a `<bbox>` without a box", "a box under objects.bbox for each `<bbox>`"
        )


def _write_ms_swift(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write messages with `<image>` placeholders, and boxes in pixels under `objects`."""

    def make_fields(located_sample: LocatedSample) -> Record:
        renderer = PartRenderer(located_sample, context)
        objects: _ObjectLists = {"ref": [], "bbox": [], "image_id": []}
        messages = [
            {"role": message.role, "content": "".join(_iter_texts(message, renderer, objects))}
            for message in located_sample.sample.messages
        ]
        images = {"images": renderer.image_names} if renderer.image_names else {}
        boxes = {"objects": objects} if objects["bbox"] else {}
        return {"messages": messages, **images, **boxes}

    yield from write_rows(samples, context, make_fields)
    context.notes.append(
        "ms-swift starts relative paths at the current folder: run it in the output folder, or set"
        " ROOT_IMAGE_DIR to it"
    )


def _iter_texts(message: Message, renderer: PartRenderer, objects: _ObjectLists) -> Iterator[str]:
    has_label = False
    for part in message.content:
        if not isinstance(part, BoxPart):
            has_label = False
            is_answer = message.role == "assistant" and isinstance(part, TextPart)
            yield format_answer((part,), 1) if is_answer else renderer.render(part)
            continue
        if has_label and part.label is None:
            raise UserError(
                "a box without a label right after one that has a label",
                expected="text between the two, or a label for both",
                remedy="export to samples, or remove the sample",
            )
        if part.label is not None:
            has_label = True
            objects["ref"].append(make_text_part(part.label).text)
            yield "<ref-object>"
        objects["bbox"].append([format_number(value) for value in part.xyxy])
        objects["image_id"].append(part.image)
        yield "<bbox>"


def _write_query_response(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write rows with earlier turns under `history`, and boxes as JSON."""

    def make_fields(located_sample: LocatedSample) -> Record:
        turns, image_names = render_turns(located_sample, context)
        system = turns[0][1] if turns[0][0] == "system" else ""
        texts = [text for role, text in turns if role != "system"]
        *history, last = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
        optional = {"history": history, "system": system, "images": image_names}
        present = {key: value for key, value in optional.items() if value}
        return {"query": last[0], "response": last[1], **present}

    yield from write_rows(samples, context, make_fields)
    add_box_note(samples, context)


MS_SWIFT = DatasetFormat(
    name="ms-swift",
    description='"messages": [{"role": "user", "content": "<image>..."}], "images": ["path"]',
    typical_keys=frozenset({"messages", "images", "objects", "role", "content"}),
    detect=_detect_ms_swift,
    parse_row=_parse_ms_swift,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=_write_ms_swift,
)
QUERY_RESPONSE = DatasetFormat(
    name="query-response",
    description='"image": ["path"], "query": "...", "response": "..."',
    typical_keys=frozenset({"query", "response"}),
    detect=_detect_query_response,
    parse_row=_parse_query_response,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=_write_query_response,
)
