"""OpenAI: messages whose content is text or a list of texts, images and videos.

The OpenAI guide "Vision fine-tuning" documents the format. An image is a data URL or a path;
`detail`, the resolution used by the OpenAI service, is ignored and counted. Adjacent messages of
the same role, as in the guide, are merged into one turn.

An image may also be a part of type `image` with its path under `image`, `url` or `path`, as in
qwen-vl-utils, with its bytes under `base64`, as in Axolotl, or without a path, which stands for an
image of the list `images`: that of its `index`, else the next one, as in TRL. The same applies to
videos, except for bytes. Rows of TRL have their messages under `prompt` and `completion`; both may
be text. If no part or `<image>` in the text stands for the listed images, they precede the first
question.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from operator import attrgetter

from finesight.errors import UserError
from finesight.ingest.formats.clip_bounds import check_clip_bounds
from finesight.ingest.formats.conversation_rows import (
    PartRenderer,
    RowMedia,
    Turn,
    build_turns_example,
    list_calls,
    list_images,
    merge_loss,
    parse_text,
    parse_turns,
    render_turns,
    write_rows,
)
from finesight.ingest.formats.dataset_format import (
    IMAGE_KEYS,
    VIDEO_KEYS,
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
)
from finesight.ingest.formats.row_keys import PARTS, has_value, sort_keys
from finesight.ingest.image_resolver import encode_data_url
from finesight.ingest.row_reader import Record, SourceRow
from finesight.samples.sample import (
    ContentPart,
    ImagePart,
    InvalidRowError,
    LocatedSample,
    Role,
    TextPart,
    VideoPart,
)

_KINDS = ("image", "video")
_TAGS = re.compile("(<image>|<video>)")


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
    if not num_parts:
        return None
    reason = f"messages with {num_parts} parts of type image_url, image, video or text in the first"
    return f"{reason} {len(records)}"


def _parse_openai(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a row of chat messages, or of prompt and completion."""
    has_files = bool(list_images(row.record, (*IMAGE_KEYS, *VIDEO_KEYS)))
    turns = [
        turn
        if isinstance(turn.content, list)
        else turn._replace(content=_split_text(turn.content, has_files=has_files))
        for turn in parse_turns(row.record, context, with_parts=True)
    ]
    kinds = Counter(_get_kind(item) for turn in turns for item in turn.content)
    media = RowMedia(row.record, context, {kind: kinds[kind] for kind in _KINDS})

    def parse_turn(role: Role, contents: Sequence[list[object]]) -> list[ContentPart]:
        parts: list[ContentPart] = []
        for content in contents:
            added = [p for item in content for p in _parse_part(item, role, media, context)]
            if parts and added and parts[-1].type == "text" and added[0].type == "text":
                parts.append(TextPart(text="\n"))
            parts += added
        return parts

    merged: list[Turn] = []
    for role, group in groupby(turns, key=attrgetter("role")):
        # Tool results are not merged: chat templates write the tags around each of them.
        for members in ([one] for one in group) if role == "tool" else [list(group)]:
            calls = tuple(chain.from_iterable(one.calls for one in members))
            loss = merge_loss(members)
            contents = [one.content for one in members if one.content]
            merged.append(Turn(role, contents, calls, loss, members[0].tools))
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
        names = [f"{kind}_url", kind, "url", "path"]
        if kind == "image":
            names.append("base64")
        key = next((name for name in names if has_value(item.get(name))), "index")
        value = item.get(key)
        if key == "base64" and isinstance(value, str) and not value.startswith("data:"):
            value = f"data:;base64,{value}"
        part = media.add(kind, index=value) if key == "index" else media.add(kind, value)
        used = ["type", key]
        if isinstance(part, VideoPart):
            bounds = check_clip_bounds(item, [part], PARTS)
            context.other_keys.update(f"{name} of {PARTS}, not imported" for name in bounds)
            used += ["fps", *bounds]
        sort_keys(item, used, PARTS, context.other_keys)
        fps = item.get("fps")
        if isinstance(part, VideoPart) and fps is not None:
            if not isinstance(fps, int | float) or not 0 < fps < math.inf:
                raise InvalidRowError(f"fps is {fps!r}", "frames per second above 0")
            part = part.model_copy(update={"fps": float(fps)})
        yield part
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


def _make_openai_row(located_sample: LocatedSample, context: ExportContext) -> Record:
    """Build OpenAI chat messages with images as data URLs, and boxes in answers as JSON."""
    renderer = PartRenderer(located_sample, context, "")

    def build_part(part: ContentPart) -> Record:
        if isinstance(part, ImagePart):
            url = encode_data_url(located_sample.resolve_path(part.image))
            return {"type": "image_url", "image_url": {"url": url}}
        return {"type": "text", "text": renderer.render(part)}

    sample = located_sample.sample
    turns, _ = render_turns(located_sample, context, "")
    messages: list[Record] = []
    pending: list[str] = []
    for (role, text), message in zip(turns, sample.messages, strict=True):
        has_image = any(isinstance(part, ImagePart) for part in message.content)
        content = list(map(build_part, message.content)) if has_image else text
        turn: Record = {"role": role, "content": content}
        turn |= {} if message.loss else {"weight": 0}
        if role == "tool" and pending:
            turn["tool_call_id"] = pending.pop(0)
        if calls := list_calls(message):
            pending = [f"call_{len(messages)}_{number}" for number in range(len(calls))]
            for call in calls:
                call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
            turn["content"] = text or None
            turn["tool_calls"] = [
                {"id": call_id, "type": "function", "function": call}
                for call_id, call in zip(pending, calls, strict=True)
            ]
        messages.append(turn)
    if sample.tools:
        return {"tools": [*sample.tools], "messages": messages}
    return {"messages": messages}


COMPONENT = DatasetFormat(
    name="openai",
    description='"messages": [{"role": "user", "content": [{"type": "image_url", ...}, ...]}]',
    detect=_detect_openai,
    parse_row=_parse_openai,
    write_files=partial(
        write_rows, make_fields=_make_openai_row, keeps=("tools", "loss"), box_note=""
    ),
    keeps_pages=True,  # as data URLs
    # Before `ms-swift`: single messages may be only text.
    position=130,
)
