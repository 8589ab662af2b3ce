"""OpenAI chat messages whose content is text or a list of texts and images.

{"messages": [{"role": "user", "content": [{"type": "text", "text": "What cheese is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]},
              {"role": "assistant", "content": "Danbo"}]}

The OpenAI guide "Vision fine-tuning" documents it. An image is a data URL or a path; `detail`, the
resolution used by the OpenAI service, is ignored. Adjacent messages of the same role, as in the
guide, are merged into one turn.

An image may also be a part of type `image` with its path under `image`, `url` or `path`, or without
a path, which stands for the next of the `images` of the record, as in TRL. See `conversation_rows`
for boxes in answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finesight.data.formats import conversation_rows
from finesight.data.formats.conversation_rows import (
    collect_meta,
    get_role,
    list_checked_images,
    parse_answer,
    reject_unsupported_turn_keys,
)
from finesight.data.formats.dataset_format import (
    IMAGE_KEYS,
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    PlaceholderCountError,
    RowImages,
    build_example,
    has_value,
    merge_text_parts,
    reject_unsupported_keys,
    strip_object_refs,
)
from finesight.data.image_resolver import encode_data_url
from finesight.data.jsonl import LocatedSample
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import MAX_MESSAGES, ContentPart, ImagePart, Role, TextPart, check_limit
from finesight.errors import UserError


def detect(records: Sequence[Record]) -> str | None:
    """Detect OpenAI chat messages, and return the reason for the match or None.

    All records have messages, and at least one message has an image part.
    """
    num_image_parts = 0
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            return None
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            num_image_parts += sum(map(_is_image, content)) if isinstance(content, list) else 0
    if not num_image_parts:
        return None
    return (
        f"messages with {num_image_parts} parts of type image_url or image in the first"
        f" {len(records)}"
    )


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a row of OpenAI chat messages."""
    reject_unsupported_keys(row.record)
    messages, images = row.record.get("messages"), RowImages(context)
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"messages is {str(messages)[:60]!r}",
            expected="a list of messages",
            remedy="correct the row",
        )
    check_limit(len(messages), MAX_MESSAGES, "messages")
    system = row.record.get("system")
    messages = [{"role": "system", "content": system}, *messages] if has_value(system) else messages
    remaining_images = iter(list_checked_images(row.record))
    turns: list[tuple[Role, list[ContentPart]]] = []
    for message in messages:
        role, content = _parse_message(message)
        parts = [
            part for item in content for part in _parse_part(item, role, images, remaining_images)
        ]
        if turns and turns[-1][0] == role:
            _join(turns[-1][1], parts)
        else:
            turns.append((role, parts))
    num_remaining = len(list(remaining_images))
    if num_remaining:
        raise PlaceholderCountError(
            f"{num_remaining} of the images under `images` are in no message",
            expected='a part {"type": "image"} per image',
            remedy="correct the row",
        )
    first_user = next(
        (turn_index for turn_index, (role, _) in enumerate(turns) if role == "user"), None
    )
    parsed_messages = [
        (role, context.add_prompt(parts) if turn_index == first_user else parts)
        for turn_index, (role, parts) in enumerate(
            (role, merge_text_parts(parts)) for role, parts in turns
        )
    ]
    return build_example(
        row.id, parsed_messages, collect_meta(row.record, "messages", "system", *IMAGE_KEYS)
    )


def _parse_message(message: object) -> tuple[Role, list[object]]:
    """Return the role and the list of content parts of an OpenAI chat message."""
    role = (
        get_role({**message, **_developer_as_system(message)})
        if isinstance(message, dict)
        else None
    )
    if role is None or not isinstance(message, dict):
        raise UserError(
            f"the message {str(message)[:80]}",
            expected='{"role": "system", "user" or "assistant", "content": text or a list}',
            remedy="correct the row",
        )
    reject_unsupported_turn_keys(message)
    content = message.get("content")
    return role, content if isinstance(content, list) else [{"type": "text", "text": content}]


def _developer_as_system(message: Record) -> Record:
    return {"role": "system"} if message.get("role") == "developer" else {}


def _parse_part(
    item: object, role: Role, images: RowImages, remaining_images: Iterator[object]
) -> Iterator[ContentPart]:
    if isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str):
        text = item["text"]
        yield from parse_answer(text, images) if role == "assistant" else [strip_object_refs(text)]
        return
    if isinstance(item, dict) and _is_image(item):
        value = next((item[key] for key in _IMAGE_KEYS if has_value(item.get(key))), None)
        value = value.get("url") if isinstance(value, dict) and "url" in value else value
        yield images.add_image(next(remaining_images, None) if value is None else value)
        return
    raise UserError(
        f"the part {str(item)[:80]}",
        expected='{"type": "text", "text": ...} or {"type": "image_url", "image_url": {...}}',
        remedy="correct the row, or remove it",
    )


_IMAGE_KEYS = ("image_url", "image", "url", "path")


def _is_image(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") in ("image_url", "image")


def _join(before: list[ContentPart], after: list[ContentPart]) -> None:
    """Append message content to the previous message of the same role.

    Adjacent texts are separated by a line break.
    """
    if before and after and isinstance(before[-1], TextPart) and isinstance(after[0], TextPart):
        before.append(TextPart(text="\n"))
    before += after


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> conversation_rows.Files:
    """Write OpenAI chat messages with images as data URLs, and boxes in answers as JSON."""

    def make_record(located_sample: LocatedSample) -> Record:
        text_turns = conversation_rows.render_turns(located_sample, lambda part: "")
        messages = [
            {
                "role": role,
                "content": [_build_part(part, located_sample) for part in message.content]
                if any(isinstance(part, ImagePart) for part in message.content)
                else text,
            }
            for (role, text), message in zip(
                text_turns, located_sample.sample.messages, strict=True
            )
        ]
        return conversation_rows.build_record(located_sample, context, {"messages": messages})

    yield from conversation_rows.write_rows(samples, make_record)
    conversation_rows.add_box_note(samples, context)


def _build_part(part: ContentPart, located_sample: LocatedSample) -> Record:
    if isinstance(part, ImagePart):
        return {
            "type": "image_url",
            "image_url": {"url": encode_data_url(located_sample.resolve_path(part.image))},
        }
    return {"type": "text", "text": conversation_rows.render_part(part, lambda image: "")}


FORMAT = DatasetFormat(
    name="openai",
    description='"messages": [{"role": "user", "content": [{"type": "image_url", ...}, ...]}]',
    typical_keys=frozenset({"messages", "role", "content"}),
    detect=detect,
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=write_files,
)
