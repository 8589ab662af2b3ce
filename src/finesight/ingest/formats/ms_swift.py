"""ms-swift: messages with boxes under `objects`, as on its page "Custom Dataset".

{"messages": [{"role": "user", "content": "<image>Find the <ref-object>"},
              {"role": "assistant", "content": "<bbox><bbox>"}], "images": ["a.jpg"],
 "objects": {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]}}

`<ref-object>` is replaced by the next of `ref`, and `<bbox>` by the next of `bbox`. A box is two
corners. With `bbox_type` "real", the default, they are in pixels of the image with the 0-based
index `image_id`; with "norm1" they are normalized. A reference directly before boxes is their
label; elsewhere it is text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from finesight.errors import UserError
from finesight.ingest.formats.conversation_placeholders import parse_with_objects
from finesight.ingest.formats.conversation_rows import (
    CALL_KEYS,
    PartRenderer,
    format_answer,
    format_tools,
    list_calls,
    list_images,
    without_calls,
    write_rows,
)
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    Files,
    make_text_part,
)
from finesight.ingest.formats.row_keys import has_value
from finesight.ingest.row_reader import Record
from finesight.samples.sample import (
    BoxPart,
    LocatedSample,
    Message,
    TextPart,
    find_box_slots,
    list_coordinates,
)

_ObjectLists = dict[str, list[Any]]


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
        if not all(
            isinstance(turn, dict)
            and (isinstance(turn.get("content"), str) or any(map(turn.get, CALL_KEYS)))
            for turn in messages
        ):
            return None
    num_with_images = sum(bool(list_images(record)) for record in records)
    return (
        f"messages of text, images in {num_with_images} and objects in {num_with_boxes} of the"
        f" first {len(records)}; LLaMA-Factory's messages with images are the same"
    )


def _write_ms_swift(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write messages with `<image>` placeholders, and boxes in pixels under `objects`."""

    def make_fields(located_sample: LocatedSample, context: ExportContext) -> Record:
        renderer = PartRenderer(located_sample, context)
        objects: _ObjectLists = {"ref": [], "bbox": [], "image_id": []}
        messages: list[Record] = []
        for message in located_sample.sample.messages:
            loss = {} if message.loss else {"loss": False}
            role = "tool_response" if message.role == "tool" else message.role
            text = "".join(_iter_texts(message, renderer, objects))
            calls = list_calls(message)
            messages += [{"role": role, "content": text, **loss}] if text or not calls else []
            for call in calls:
                content = json.dumps(call, ensure_ascii=False)
                messages.append({"role": "tool_call", "content": content, **loss})
        images = {"images": renderer.image_names} if renderer.image_names else {}
        boxes = {"objects": objects} if objects["bbox"] else {}
        tools = format_tools(located_sample.sample)
        return {**tools, "messages": messages, **images, **boxes}

    yield from write_rows(samples, context, make_fields, ("tools", "loss"))
    context.notes.append(
        "ms-swift starts relative paths at the current folder: run it in the output folder, or set"
        " ROOT_IMAGE_DIR to it"
    )


def _iter_texts(message: Message, renderer: PartRenderer, objects: _ObjectLists) -> Iterator[str]:
    has_label, content = False, without_calls(message)
    slots = find_box_slots(content)
    for index, part in enumerate(content):
        if not isinstance(part, BoxPart):
            has_label = False
            is_answer = message.role == "assistant" and isinstance(part, TextPart)
            yield format_answer((part,), 1) if is_answer else renderer.render(part)
            continue
        label = None if index in slots else part.label
        if has_label and label is None:
            raise UserError(
                "a box without a label right after one that has a label",
                expected="text between the two, or a label for both",
                remedy="export to samples, or remove the sample",
            )
        if label is not None:
            has_label = True
            objects["ref"].append(make_text_part(label).text)
            yield "<ref-object>"
        objects["bbox"].append(list_coordinates(part))
        objects["image_id"].append(part.image)
        yield "<bbox>"


COMPONENT = DatasetFormat(
    name="ms-swift",
    description='"messages": [{"role": "user", "content": "<image>..."}], "images": ["path"]',
    detect=_detect_ms_swift,
    parse_row=parse_with_objects,
    write_files=_write_ms_swift,
    # Before `query-response`: it has objects, too.
    position=140,
)
