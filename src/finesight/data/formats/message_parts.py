"""Messages with typed parts: native samples, and OpenAI chat messages.

samples: the native format, imported with validation of its images and boxes.

openai: messages whose content is text or a list of texts, images and videos.

The OpenAI guide "Vision fine-tuning" documents it. An image is a data URL or a path; `detail`, the
resolution used by the OpenAI service, is ignored and counted. Adjacent messages of the same role,
as in the guide, are merged into one turn.

An image may also be a part of type `image` with its path under `image`, `url` or `path`, as in
qwen-vl-utils, or without a path, which stands for an image of the list `images`: that of its
`index`, else the next one, as in TRL. The same applies to videos. Rows of TRL have their messages
under `prompt` and `completion`; both may be text. If no part or `<image>` in the text stands for
the listed images, they precede the first question. See `conversation_rows` for boxes in answers.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from finesight.data.boxes import BoxConvention
from finesight.data.formats.conversation_rows import (
    JSONL_FILE,
    PartRenderer,
    RowMedia,
    add_box_note,
    build_tool_error,
    build_turns_example,
    list_images,
    parse_text,
    parse_turns,
    render_turns,
    write_rows,
)
from finesight.data.formats.dataset_format import (
    IMAGE_KEYS,
    VIDEO_KEYS,
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    as_list,
)
from finesight.data.formats.row_keys import PARTS, has_value, iter_nested, sort_keys
from finesight.data.image_resolver import encode_data_url
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import (
    SAMPLE_KEYS,
    BoxPart,
    ContentPart,
    ImagePart,
    InvalidRowError,
    LocatedSample,
    Role,
    Sample,
    TextPart,
    VideoPart,
    check_limits,
    remove_nulls,
    sample_from_dict,
    sample_to_dict,
    validate_roles,
    validate_sample,
)
from finesight.errors import UserError

_KINDS = ("image", "video")
_TAGS = re.compile("(<image>|<video>)")
_Turn = tuple[Role, list[object]]


def _detect_openai(records: Sequence[Record]) -> str | None:
    """Detect messages of which at least one has typed parts, and return the reason or None.

    Prompts with completions match as well.
    """
    if all({"prompt", "completion"} <= record.keys() for record in records):
        return f"completions or chosen answers in all of the first {len(records)}, as in TRL"
    num_parts = 0
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            return None
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            typed = map(_get_kind, content if isinstance(content, list) else ())
            num_parts += sum(kind is not None for kind in typed)
    reason = f"messages with {num_parts} parts of type image_url, image, video or text in the first"
    return f"{reason} {len(records)}" if num_parts else None


def _parse_openai(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a row of chat messages, or of prompt and completion."""
    has_files = bool(list_images(row.record, (*IMAGE_KEYS, *VIDEO_KEYS)))
    turns: list[_Turn] = [
        (role, content if isinstance(content, list) else _split_text(content, has_files=has_files))
        for role, content in parse_turns(row.record, context, with_parts=True)
    ]
    kinds = Counter(_get_kind(item) for _, content in turns for item in content)
    media = RowMedia(row.record, context, {kind: kinds[kind] for kind in _KINDS})

    def parse_turn(role: Role, contents: Sequence[list[object]]) -> list[ContentPart]:
        parts: list[ContentPart] = []
        for content in contents:
            added = [p for item in content for p in _parse_part(item, role, media, context)]
            if parts and added and parts[-1].type == "text" and added[0].type == "text":
                parts.append(TextPart(text="\n"))
            parts += added
        return parts

    merged = [
        (role, [content for _, content in group])
        for role, group in groupby(turns, key=itemgetter(0))
    ]
    return build_turns_example(row, context, merged, parse_turn, media)


def _split_text(content: object, *, has_files: bool) -> list[object]:
    """Return the parts of a content that is no list, split at placeholders of listed files."""
    texts = _TAGS.split(content) if has_files and isinstance(content, str) else [content]
    return [
        {"type": text[1:-1]} if text in ("<image>", "<video>") else {"type": "text", "text": text}
        for text in texts
        if text != "" or len(texts) == 1
    ]


def _parse_part(
    item: object, role: Role, media: RowMedia, context: ImportContext
) -> Iterator[ContentPart]:
    kind = _get_kind(item)
    if kind == "text" and isinstance(item, dict) and isinstance(item.get("text"), str):
        sort_keys(item, ("type", "text"), PARTS, context.other_keys)
        yield from parse_text(role, item["text"], media)
    elif kind in _KINDS and isinstance(item, dict):
        names = (f"{kind}_url", kind, "url", "path")
        key = next((name for name in names if has_value(item.get(name))), "index")
        used = ("type", key, "fps") if kind == "video" else ("type", key)
        sort_keys(item, used, PARTS, context.other_keys)
        value = item.get(key)
        part = media.add(kind, index=value) if key == "index" else media.add(kind, value)
        fps = item.get("fps")
        if isinstance(part, VideoPart) and fps is not None:
            if not isinstance(fps, int | float) or not 0 < fps < math.inf:
                raise InvalidRowError(f"fps is {fps!r}", "frames per second above 0")
            part = part.model_copy(update={"fps": float(fps)})
        yield part
    elif kind is not None and "tool" in kind:
        raise build_tool_error(f"a part of the type {kind}")
    else:
        raise UserError(
            f"the part {str(item)[:80]}",
            expected='{"type": "text", "text": ...}, {"type": "image_url", "image_url": {...}} or'
            ' {"type": "video", "video": ...}',
            remedy="correct the row, or remove it",
        )


def _get_kind(item: object) -> str | None:
    """Return the type of a content part: text, image, video or another name."""
    kind = item.get("type") if isinstance(item, dict) else None
    return kind.removesuffix("_url") if isinstance(kind, str) else None


def _write_openai(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
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


def detect_samples(records: Sequence[Record]) -> str | None:
    """Detect native samples, and return the reason for the match or None.

    Chat messages of other formats look alike. Therefore any key that samples do not have excludes a
    match, unless a record has a box, a list of frames or references.
    """
    cleaned = list(map(remove_nulls, records))
    messages: list[list[Any]] = [as_list(record.get("messages")) for record in cleaned]
    if not all(isinstance(one, dict) and "role" in one for turns in messages for one in turns):
        return None
    parts = [part for turns in messages for one in turns for part in as_list(one.get("content"))]
    is_marked = all(messages) and any("references" in record for record in cleaned)
    is_marked |= any(p.get("type") == "box" or "frames" in p for p in parts if isinstance(p, dict))
    reason = f"messages with role and content in all of the first {len(records)}"
    return reason if is_marked or all(map(_is_sample, cleaned)) else None


def _is_sample(record: Record) -> bool:
    try:
        sample_from_dict({**record, "id": ""}, "")
    except UserError:
        return False
    return True


def _parse_sample(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a native sample, with absolute paths and validated boxes.

    A lenient import keeps invalid content. Boxes whose image index is invalid are not recorded in
    `raw_boxes`.
    """
    meta = row.record.get("meta")
    record = {key: value for key, value in row.record.items() if key != "meta"}
    context.other_keys.update(
        f"{path} of samples, not imported"
        for path, key, value in iter_nested(record)
        if value is None and key not in SAMPLE_KEYS
    )
    if row.has_own_id or record.get("id") is None:
        record["id"] = row.id
    record = remove_nulls(record)
    sample = sample_from_dict(record if meta is None else {**record, "meta": meta}, "")
    if context.lenient:
        check_limits(sample.messages, sample.references, "")
        validate_roles(sample.messages, "")  # an example requires this order
    else:
        validate_sample(sample, "")
    return example_from_sample(
        sample.map_paths(lambda name: str(context.images.resolve(name))), context
    )


def example_from_sample(sample: Sample, context: ImportContext) -> ImportExample:
    """Build a training example from a native sample with absolute image paths.

    Its boxes are validated and clipped to their images, unless the import is lenient.
    """
    images = [Path(part.image) for part in sample.iter_parts() if isinstance(part, ImagePart)]

    def fitted(part: ContentPart) -> ContentPart:
        if not isinstance(part, BoxPart) or part.image >= len(images):
            return part
        xyxy = context.read_box(part.xyxy, images[part.image], BoxConvention(), part.label)
        return part.model_copy(update={"xyxy": xyxy})

    if any(part.type == "box" for part in (*sample.iter_parts(), *sample.rejected)):
        sample = sample.with_parts(fitted)
    *turns, answer = sample.messages
    texts = sample.references, sample.meta, sample.rejected, sample.label
    return ImportExample(sample.id, tuple(turns), (answer.content,), *texts)


def _write_samples(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write samples with image paths relative to the output folder."""

    def build_record(located_sample: LocatedSample) -> Record:
        return sample_to_dict(
            located_sample.sample,
            lambda name: context.image_name(located_sample.resolve_path(name)),
        )

    for record in map(build_record, samples):
        yield JSONL_FILE, f"{json.dumps(record, ensure_ascii=False)}\n".encode()


OPENAI = DatasetFormat(
    name="openai",
    description='"messages": [{"role": "user", "content": [{"type": "image_url", ...}, ...]}]',
    detect=_detect_openai,
    parse_row=_parse_openai,
    write_files=_write_openai,
)
SAMPLES = DatasetFormat(
    name="samples",
    description=(
        '"messages": [{"role": "user", "content": [{"type": "image", "image": "path"}, ...]}]'
    ),
    detect=detect_samples,
    parse_row=_parse_sample,
    supported_options=frozenset(),
    write_files=_write_samples,
)
