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
from itertools import groupby
from operator import itemgetter

from finesight.data.formats.conversation_rows import (
    Files,
    PartRenderer,
    add_box_note,
    build_turns_example,
    get_role,
    list_checked_images,
    parse_text,
    reject_unsupported_turn_keys,
    render_turns,
    write_rows,
)
from finesight.data.formats.dataset_format import (
    IMAGE_KEYS,
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
    PlaceholderCountError,
    RowImages,
    has_value,
)
from finesight.data.image_resolver import encode_data_url
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import (
    MAX_MESSAGES,
    ContentPart,
    ImagePart,
    InvalidRowError,
    LocatedSample,
    Role,
    TextPart,
    check_limit,
)
from finesight.errors import UserError

_IMAGE_VALUE_KEYS = ("image_url", "image", "url", "path")


def detect(records: Sequence[Record]) -> str | None:
    """Detect messages of which at least one has an image part, and return the reason or None."""
    num_image_parts = 0
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            return None
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            num_image_parts += sum(map(_is_image, content)) if isinstance(content, list) else 0
    reason = f"messages with {num_image_parts} parts of type image_url or image in the first"
    return f"{reason} {len(records)}" if num_image_parts else None


def _is_image(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") in ("image_url", "image")


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a row of OpenAI chat messages."""
    messages, row_images = row.record.get("messages"), RowImages(context)
    if not isinstance(messages, list) or not messages:
        raise InvalidRowError(f"messages is {str(messages)[:60]!r}", "a list of messages")
    check_limit(len(messages), MAX_MESSAGES, "messages")
    system = row.record.get("system")
    messages = [{"role": "system", "content": system}, *messages] if has_value(system) else messages
    remaining_images = iter(list_checked_images(row.record))

    def parse_turn(role: Role, contents: Sequence[list[object]]) -> list[ContentPart]:
        parts: list[ContentPart] = []
        for content in contents:
            added = [
                part
                for item in content
                for part in _parse_part(item, role, row_images, remaining_images)
            ]
            if parts and added and parts[-1].type == "text" and added[0].type == "text":
                parts.append(TextPart(text="\n"))
            parts += added
        return parts

    turns = [
        (role, [content for _, content in group])
        for role, group in groupby(map(_parse_message, messages), key=itemgetter(0))
    ]
    keys = ("messages", "system", *IMAGE_KEYS)
    example = build_turns_example(row, context, turns, parse_turn, *keys)
    num_remaining = len(list(remaining_images))
    if num_remaining:
        raise PlaceholderCountError(
            f"{num_remaining} of the images under `images` are in no message",
            expected='a part {"type": "image"} per image',
            remedy="correct the row",
        )
    return example


def _parse_message(message: object) -> tuple[Role, list[object]]:
    """Return the role and the list of content parts of a message; developer means system."""
    if isinstance(message, dict):
        role = "system" if message.get("role") == "developer" else get_role(message)
        if role is not None:
            reject_unsupported_turn_keys(message)
            content = message.get("content")
            return role, content if isinstance(content, list) else [
                {"type": "text", "text": content}
            ]
    raise InvalidRowError(
        f"the message {str(message)[:80]}",
        '{"role": "system", "user" or "assistant", "content": text or a list}',
    )


def _parse_part(
    item: object, role: Role, row_images: RowImages, remaining_images: Iterator[object]
) -> Iterator[ContentPart]:
    if isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str):
        yield from parse_text(role, item["text"], row_images)
    elif isinstance(item, dict) and _is_image(item):
        value = next((item[key] for key in _IMAGE_VALUE_KEYS if has_value(item.get(key))), None)
        value = value.get("url") if isinstance(value, dict) and "url" in value else value
        yield row_images.add_image(next(remaining_images, None) if value is None else value)
    else:
        raise UserError(
            f"the part {str(item)[:80]}",
            expected='{"type": "text", "text": ...} or {"type": "image_url", "image_url": {...}}',
            remedy="correct the row, or remove it",
        )


def write_files(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write OpenAI chat messages with images as data URLs, and boxes in answers as JSON."""

    def make_fields(located_sample: LocatedSample) -> Record:
        renderer = PartRenderer(located_sample, context, "")

        def build_part(part: ContentPart) -> Record:
            if isinstance(part, ImagePart):
                url = encode_data_url(located_sample.resolve_path(part.image))
                return {"type": "image_url", "image_url": {"url": url}}
            return {"type": "text", "text": renderer.render(part)}

        turns, _ = render_turns(located_sample, context, "")
        messages = [
            {
                "role": role,
                "content": list(map(build_part, message.content))
                if any(isinstance(part, ImagePart) for part in message.content)
                else text,
            }
            for (role, text), message in zip(turns, located_sample.sample.messages, strict=True)
        ]
        return {"messages": messages}

    yield from write_rows(samples, context, make_fields)
    add_box_note(samples, context)


FORMAT = DatasetFormat(
    name="openai",
    description='"messages": [{"role": "user", "content": [{"type": "image_url", ...}, ...]}]',
    typical_keys=frozenset({"messages", "role", "content"}),
    detect=detect,
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes"}),
    write_files=write_files,
)
