r"""Conversations: seven formats of texts with placeholders, and two of messages with parts.

`DatasetFormat.description` shows a row of each format. A conversation may have any number of turns
and images. See `conversation_rows` for the keys of its turns and the boxes in its answers.

- conversations: image paths between `<|vision_start|>` and `<|vision_end|>`, at any position.
- qwen-vl: images in `<img>`, and boxes in `<box>` on a grid of 1000, after their label in `<ref>`.
  `Picture 1:` and the line break after an image are removed, because each model family adds its
  own. A box belongs to the last image before it, in any turn.
- image-path: the first user message is only an image path; `--prompt` sets the question. Later user
  messages are text unless they are image paths as well.
- llava: the guide "Finetune LLaVA on Custom Datasets" documents it. The line break after `<image>`
  is removed, because each model family adds its own.
- llama-factory: sharegpt (turns with a list of images) and alpaca, with the default names of the
  README of its `data` folder. In alpaca, the question is the instruction followed by the input on
  a new line. Messages with `role` and `content` are read as `ms-swift`.
- ms-swift: messages with boxes under `objects`, as on its page "Custom Dataset".
- query-response: `query`, `response` and `history` without `objects`.

If a record lists its images under `image` or `images`, each `<image>` in the text stands for the
next of them, and each `<video>` for the next of `video` or `videos`, which are video files. In
ms-swift and query-response, listed files without any placeholder precede the first question.

{"messages": [{"role": "user", "content": "<image>Find the <ref-object>"},
              {"role": "assistant", "content": "<bbox><bbox>"}], "images": ["a.jpg"],
 "objects": {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]}}

In ms-swift, `<ref-object>` is replaced by the next of `ref`, and `<bbox>` by the next of `bbox`. A
box is two corners. With `bbox_type` "real", the default, they are in pixels of the image with the
0-based index `image_id`; with "norm1" they are normalized. A reference directly before boxes is
their label; elsewhere it is text.

Messages with typed parts are of two formats:

- samples: the native format, imported with validation of its images and boxes.
- openai: messages whose content is text or a list of texts, images and videos.

The OpenAI guide "Vision fine-tuning" documents the latter. An image is a data URL or a path;
`detail`, the resolution used by the OpenAI service, is ignored and counted. Adjacent messages of
the same role, as in the guide, are merged into one turn.

An image may also be a part of type `image` with its path under `image`, `url` or `path`, as in
qwen-vl-utils, or without a path, which stands for an image of the list `images`: that of its
`index`, else the next one, as in TRL. The same applies to videos. Rows of TRL have their messages
under `prompt` and `completion`; both may be text. If no part or `<image>` in the text stands for
the listed images, they precede the first question.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from finesight.data.boxes import BOX_KEY, BoxConvention, split_at_text_boxes
from finesight.data.formats.conversation_rows import (
    CALL_KEYS,
    JSONL_FILE,
    ObjectQueue,
    PartRenderer,
    RowMedia,
    TextTurn,
    Turn,
    build_turns_example,
    format_answer,
    format_tools,
    list_calls,
    list_images,
    list_turn_texts,
    merge_loss,
    parse_text,
    parse_turns,
    render_turns,
    without_calls,
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
    RowImages,
    as_list,
    build_example,
    make_text_part,
    split_at_pattern,
)
from finesight.data.formats.row_keys import PARTS, has_value, iter_nested, sort_keys
from finesight.data.image_resolver import encode_data_url
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import (
    JSON_DATA_KEYS,
    SAMPLE_KEYS,
    BoxPart,
    ContentPart,
    ImagePart,
    InvalidRowError,
    LocatedSample,
    Message,
    Role,
    Sample,
    TextPart,
    VideoPart,
    check_limits,
    find_box_slots,
    is_video_path,
    list_coordinates,
    remove_nulls,
    sample_from_dict,
    sample_to_dict,
    validate_roles,
    validate_sample,
)
from finesight.errors import UserError

_KINDS = ("image", "video")
_TAGS = re.compile("(<image>|<video>)")
_VIDEO_FIRST = re.compile(r"(?:<image>\s*)*<video>")
_FOREIGN_TAGS = re.compile("<(?:image|video|tool_call|tool_response)>")
IMAGE_PLACEHOLDER = re.compile(
    r"<\|vision_start\|>(?P<path>(?:(?!<\|vision_).)*)<\|vision_end\|>|<image>", re.DOTALL
)
_IMAGE_PATH = re.compile(
    r"[^\n<>|]+\.(?:jpe?g|png|webp|bmp|gif|tiff?|ppm|jp2|avif|pdf)(?:#page=[0-9]+)?", re.IGNORECASE
)
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
"""Names of the roles in LLaVA and sharegpt."""

_QWEN_VL_TAGS = re.compile(
    r"(?:Picture \d+:\s*)?<img>(?P<path>[^<]*)</img>\n?"
    r"|<ref>(?P<words>(?s:(?:(?!</?ref>).)*))</ref>(?!\s*<box>)"
)

LLAVA_FILE = "data.json"
BOX_NOTE = (
    ". LLaMA-Factory trains on these coordinates unchanged, even if it resizes images to"
    " image_max_pixels (768 x 768 unless set): set that above your largest image"
)
_OBJECT_PLACEHOLDER = re.compile(
    r"<image>|(?P<ref><ref-object>)?(?P<boxes>(?:<bbox>)+)|<ref-object>"
)
_ObjectLists = dict[str, list[Any]]


def is_image_path(text: str) -> bool:
    """Return whether a text consists of a single image path."""
    return _IMAGE_PATH.fullmatch(text.strip()) is not None


def _detect_conversations(records: Sequence[Record]) -> str | None:
    """Detect conversations of any kind; formats with their own placeholders are tested earlier."""
    turns_per_record = [list_turn_texts(record) for record in records]
    if not all(turns_per_record):
        return None
    num_placeholders = sum(
        len(IMAGE_PLACEHOLDER.findall(text)) for turns in turns_per_record for _, text in turns
    )
    return (
        f"turns with text under `value`, {num_placeholders} image placeholders in the first"
        f" {len(records)}"
    )


def _detect_image_path(records: Sequence[Record]) -> str | None:
    for record in records:
        question = next((text for role, text in list_turn_texts(record) if role == "user"), "")
        if not is_image_path(question):
            return None
    return f"the user text is an image path in all of the first {len(records)}"


def _detect_llava(records: Sequence[Record]) -> str | None:
    """Detect LLaVA: at least one record has an `image` and `<image>`, others may be text only.

    A `video` with `<video>` or `<image>` counts as well.
    """
    num_with_images = 0
    for record in records:
        turns, image = list_turn_texts(record), record.get("image", record.get("video"))
        if not turns or not isinstance(image, str | list | None):
            return None
        tags = ("<image>",) if "image" in record else ("<image>", "<video>")
        num_with_images += image is not None and any(t in text for _, text in turns for t in tags)
    reason = f"turns with `<image>`, and image in {num_with_images} of the first {len(records)}"
    return reason if num_with_images else None


def _detect_llama_factory(records: Sequence[Record]) -> str | None:
    """Detect alpaca, or sharegpt in which at least one record lists images."""
    if all({"instruction", "output"} <= record.keys() for record in records):
        return f"keys instruction and output in all of the first {len(records)} (alpaca)"
    if not all(list_turn_texts(record) for record in records):
        return None
    num_with_images = sum(
        any(isinstance(record.get(key), list) for key in ("images", "videos")) for record in records
    )
    reason = f"turns, and a list of images in {num_with_images} of the first {len(records)}"
    return f"{reason} (sharegpt)" if num_with_images else None


def _parse_conversation(row: SourceRow, context: ImportContext) -> ImportExample:
    return _build_example(row, context, parse_turns(row.record, context))


def _build_example(
    row: SourceRow,
    context: ImportContext,
    turns: Sequence[Turn],
    placeholder: re.Pattern[str] = IMAGE_PLACEHOLDER,
    objects: ObjectQueue | None = None,
) -> ImportExample:
    """Build a training example from turns whose placeholders stand for images and objects.

    Args:
        objects: References and boxes. With them, listed images without any placeholder precede the
            first question, and a question may be an image path.
    """
    videos = list_images(row.record, VIDEO_KEYS)
    is_marked = any(_VIDEO_FIRST.match(turn.content) for turn in turns if turn.role == "user")
    if videos or is_marked:
        placeholder = re.compile(f"{placeholder.pattern}|<video>", re.DOTALL)
    tags = ("image", "video") if videos else ("image",)
    num_marked = {tag: sum(turn.content.count(f"<{tag}>") for turn in turns) for tag in tags}
    media = RowMedia(row.record, context, num_marked if objects else None)
    # Rows of LLaVA-Video mark their video by `<image>`.
    is_llava_video = objects is None and bool(videos) and not media.listed["image"]

    def parse_turn(role: Role, text: str) -> Iterator[ContentPart]:
        if objects is None and role == "user" and is_image_path(text):
            raise UserError(
                f"the user turn contains only a path, {text.strip()[:60]!r}",
                expected="a question, with the path in a placeholder if it is an image",
                remedy="choose --format image-path if this applies to all rows, or correct the row",
            )
        for piece in split_at_pattern(text, placeholder):
            if isinstance(piece, str):
                yield from parse_text(role, piece, media)
            elif path := piece.groupdict().get("path"):
                yield media.add("video" if is_video_path(path) else "image", path)
            elif objects is not None and piece[0] not in ("<image>", "<video>"):
                yield from objects.iter_parts(piece, media)
            else:
                yield media.add("video" if is_llava_video or piece[0] == "<video>" else "image")

    handled_keys = () if objects is None else ("objects",)
    return build_turns_example(row, context, turns, parse_turn, media, *handled_keys)


def _parse_image_path(row: SourceRow, context: ImportContext) -> ImportExample:
    row_images = RowImages(context)

    def parse_turn(role: Role, text: str) -> Iterable[ContentPart]:
        if role == "user" and (not row_images.paths or is_image_path(text)):
            return [row_images.add_image(text)]
        return parse_text(role, text, row_images)

    turns = parse_turns(row.record, context)
    return build_turns_example(row, context, turns, parse_turn, None)


def _parse_llava(row: SourceRow, context: ImportContext) -> ImportExample:
    pattern = r"(<image>|<video>)\n" if list_images(row.record, VIDEO_KEYS) else r"(<image>)\n"
    turns = [
        turn._replace(content=re.sub(pattern, r"\1", turn.content))
        for turn in parse_turns(row.record, context)
    ]
    return _build_example(row, context, turns)


def _detect_qwen_vl(records: Sequence[Record]) -> str | None:
    """Detect Qwen-VL tags of images, boxes or references, and return the reason or None.

    Boxes next to `<image>` belong to formats with that placeholder.
    """
    texts = [text for record in records for _, text in list_turn_texts(record)]
    if any("<image>" in text for text in texts) and not any("<img>" in text for text in texts):
        return None
    marks = re.compile(rf"{_QWEN_VL_TAGS.pattern}|<box>[^<]*</box>")
    first = next((match[0] for text in texts for match in marks.finditer(text)), None)
    return f"a turn contains {first.strip()[:60]!r}" if first else None


def _parse_qwen_vl(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a Qwen-VL conversation."""
    images = RowImages(context)

    def parse_turn(role: Role, text: str) -> Iterator[ContentPart]:
        for piece in split_at_pattern(text, _QWEN_VL_TAGS):
            if not isinstance(piece, str):
                is_text = piece["path"] is None
                yield make_text_part(piece["words"]) if is_text else images.add_image(piece["path"])
                continue
            for text_or_box in split_at_text_boxes(piece, None, is_tagged=True):
                if isinstance(text_or_box, str):
                    yield make_text_part(text_or_box)
                else:
                    yield images.create_text_box(text_or_box)

    turns = parse_turns(row.record, context)
    return build_turns_example(row, context, turns, parse_turn, None)


def _render_checked(
    located_sample: LocatedSample, context: ExportContext, placeholder: str
) -> tuple[list[TextTurn], list[str]]:
    """Render turns, and reject a question that an import would read as an image path."""
    turns, image_names = render_turns(located_sample, context, placeholder)
    paths = [text for role, text in turns if role == "user" and is_image_path(text)]
    if paths:
        raise UserError(
            f"a question that is an image file name, {paths[0]!r}",
            expected="text that is not an image file name",
            remedy="export to ms-swift or samples, or remove the sample",
        )
    return turns, image_names


def _make_conversation(located_sample: LocatedSample, context: ExportContext) -> Record:
    turns, _ = _render_checked(located_sample, context, "<|vision_start|>{}<|vision_end|>")
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def _write_llava(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write a JSON array of conversations about at most one image, without system prompt."""

    def make_fields(located_sample: LocatedSample, context: ExportContext) -> Record:
        turns, image_names = _render_checked(located_sample, context, "<image>\n")
        if len(image_names) > 1 or turns[0][0] == "system":
            raise UserError(
                f"{len(image_names)} images, and turns of {', '.join(role for role, _ in turns)}",
                expected="at most one image, and only user and assistant turns",
                remedy="export to llama-factory or ms-swift, or remove the sample",
            )
        image = {"image": image_names[0]} if image_names else {}
        rows = [{"from": _SPEAKERS[role], "value": text} for role, text in turns]
        return {**image, "conversations": rows}

    for index, (_, row) in enumerate(write_rows(samples, context, make_fields, box_note="")):
        yield LLAVA_FILE, (b",\n" if index else b"[\n") + row.removesuffix(b"\n")
    yield LLAVA_FILE, b"\n]\n"


def _write_llama_factory(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write sharegpt rows, and a dataset_info.json that registers them as `finesight`."""

    def make_fields(located_sample: LocatedSample, context: ExportContext) -> Record:
        sample = located_sample.sample
        turns, image_names = _render_checked(located_sample, context, "<image>")
        rows = [{"from": _SPEAKERS[role], "value": text} for role, text in turns]
        for message, row, (before, _) in zip(
            sample.messages, rows, [("", ""), *turns], strict=False
        ):
            calls = list_calls(message)
            if (calls and row["value"]) or before == message.role == "tool":
                raise UserError(
                    f"a tool call next to {row['value'][:40]!r}, or several tool results in a row",
                    expected="a turn of either text or tool calls, and one result",
                    remedy="export to openai or ms-swift, or remove the sample",
                )
            if calls:
                value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
                row |= {"from": "function_call", "value": value}
        return {**format_tools(sample), "conversations": rows, "images": image_names}

    yield from write_rows(samples, context, make_fields, ("tools",), BOX_NOTE)
    info: Record = {"file_name": JSONL_FILE, "formatting": "sharegpt"}
    info["columns"] = {"messages": "conversations", "images": "images"}
    if all(located_sample.sample.rejected for located_sample in samples):
        info["ranking"] = True
        info["columns"] |= {"chosen": "chosen", "rejected": "rejected"}
    if any(located_sample.sample.label is not None for located_sample in samples):
        info["columns"]["kto_tag"] = "label"
    yield "dataset_info.json", f"{json.dumps({'finesight': info}, indent=2)}\n".encode()


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


def _parse_ms_swift(row: SourceRow, context: ImportContext) -> ImportExample:
    objects = ObjectQueue.from_value(row.record.get("objects"), context)
    turns = parse_turns(row.record, context)
    example = _build_example(row, context, turns, _OBJECT_PLACEHOLDER, objects)
    if num_refs_left := len(list(objects.refs)):  # ms-swift ignores them as well
        context.other_keys["references without `<ref-object>`, not imported"] += num_refs_left
    if num_boxes_left := len(list(objects.boxes)):
        raise InvalidRowError(
            f"{num_boxes_left} boxes under objects.bbox have no `<bbox>` in the text",
            "a `<bbox>` for each box",
        )
    return example


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
    return ({"tools": [*sample.tools]} if sample.tools else {}) | {"messages": messages}


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
    is_marked |= any(isinstance(p, dict) and p.keys() & {"xyxy", "xy", "frames"} for p in parts)
    reason = f"messages with role and content in all of the first {len(records)}"
    return reason if is_marked or all(map(_is_sample, cleaned)) else None


def _is_sample(record: Record) -> bool:
    """Return whether a record is a sample whose texts have no tags of other formats."""
    turns: list[Any] = as_list(record.get("messages"))
    texts = [one.get("content") for one in turns]
    if any(isinstance(text, str) and _FOREIGN_TAGS.search(text) for text in texts):
        return False
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
    record = remove_nulls(record, JSON_DATA_KEYS)
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
        xyxy = context.read_box(list_coordinates(part), images[part.image], BoxConvention())
        return part.model_copy(update={"xyxy": xyxy})

    sample = sample.with_parts(fitted)
    example = build_example(sample.id, sample.messages, sample.meta, sample.tools)
    references, rejected, label = sample.references, sample.rejected, sample.label
    return replace(example, references=references, rejected=rejected, label=label)


def _write_samples(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write samples with image paths relative to the output folder."""
    for located_sample in samples:
        names = partial(context.name_image, located_sample)
        record = sample_to_dict(located_sample.sample, names)
        yield JSONL_FILE, f"{json.dumps(record, ensure_ascii=False)}\n".encode()


CONVERSATIONS = DatasetFormat(
    name="conversations",
    description=(
        '"conversations": [{"from": "user", "value": "...<|vision_start|>path<|vision_end|>"}]'
    ),
    detect=_detect_conversations,
    parse_row=_parse_conversation,
    write_files=partial(write_rows, make_fields=_make_conversation, box_note=""),
)
IMAGE_PATH = DatasetFormat(
    name="image-path",
    description='"conversations": [{"role": "user", "value": "path"}, ...], question by --prompt',
    detect=_detect_image_path,
    parse_row=_parse_image_path,
)
LLAVA = DatasetFormat(
    name="llava",
    description='"image": "path", "conversations": [{"from": "human", "value": "<image>\\n..."}]',
    detect=_detect_llava,
    parse_row=_parse_llava,
    write_files=_write_llava,
)
LLAMA_FACTORY = DatasetFormat(
    name="llama-factory",
    description='"conversations": [{"from": "human", "value": "<image>..."}], "images": ["path"]'
    '; "instruction": "...", "output": "..."',
    detect=_detect_llama_factory,
    parse_row=_parse_conversation,
    write_files=_write_llama_factory,
)
QWEN_VL = DatasetFormat(
    name="qwen-vl",
    description='"conversations": [{"from": "user", "value": "Picture 1: <img>path</img>\\n..."}]',
    detect=_detect_qwen_vl,
    parse_row=_parse_qwen_vl,
)
MS_SWIFT = DatasetFormat(
    name="ms-swift",
    description='"messages": [{"role": "user", "content": "<image>..."}], "images": ["path"]',
    detect=_detect_ms_swift,
    parse_row=_parse_ms_swift,
    write_files=_write_ms_swift,
)
QUERY_RESPONSE = DatasetFormat(
    name="query-response",
    description='"image": ["path"], "query": "...", "response": "..."',
    detect=_detect_query_response,
    parse_row=_parse_ms_swift,
)
OPENAI = DatasetFormat(
    name="openai",
    description='"messages": [{"role": "user", "content": [{"type": "image_url", ...}, ...]}]',
    detect=_detect_openai,
    parse_row=_parse_openai,
    write_files=partial(
        write_rows, make_fields=_make_openai_row, keeps=("tools", "loss"), box_note=""
    ),
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
