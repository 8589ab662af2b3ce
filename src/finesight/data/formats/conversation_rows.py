"""Parse and write conversation rows: turns, boxes in answers, and metadata.

Boxes in answers have the syntax of Qwen2.5-VL or Qwen2-VL. Qwen2.5-VL writes JSON with `bbox_2d`,
one object or a list, with corners in pixels of the original image. Text around the JSON is
preserved. A ```json fence is removed, because each model family adds its own. Qwen2-VL writes
<|object_ref_start|>dog<|object_ref_end|><|box_start|>(88,99),(500,700)<|box_end|> on a grid of
1000. The options --box-format and --box-units override both conventions. Boxes are parsed rather
than left as text, because coordinates in text would be wrong after the image is resized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from finesight.data.boxes import (
    BOX_KEY,
    BoxConvention,
    JsonBox,
    parse_json_box,
    split_at_boxes,
    strip_code_fences,
)
from finesight.data.formats.dataset_format import (
    IMAGE_KEYS,
    UNSUPPORTED_KEYS,
    VIDEO_KEYS,
    ExportContext,
    ImportContext,
    ImportExample,
    RowImages,
    as_list,
    build_example,
    has_value,
    make_text_part,
    merge_text_parts,
    reject_unsupported_keys,
    split_at_pattern,
    strip_object_refs,
)
from finesight.data.image_header import is_image_value
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import (
    MAX_BOXES,
    MAX_MESSAGES,
    MAX_PARTS,
    BoxPart,
    ContentPart,
    ImagePart,
    InvalidRowError,
    LocatedSample,
    Role,
    TextPart,
    check_limit,
    format_number,
    to_json_data,
)
from finesight.errors import UserError

ContentT = TypeVar("ContentT")
Turn = tuple[Role, str]
JsonBoxes = list[JsonBox]
Files = Iterator[tuple[str, bytes]]
"""Relative file names with content. A repeated name appends to the file."""

JSONL_FILE = "data.jsonl"
ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
ROLE_KEYS = ("from", "role")
UNSUPPORTED_TURN_KEYS = frozenset(
    ("loss", "loss_scale", "weight", "tool_calls", "function_call", "audio", "refusal")
)
"""Keys of a turn with unsupported content: tool calls, other media, and loss weights."""

RESERVED_KEYS = frozenset(
    {
        *("id", "messages", "conversations", "conversation", "query", "response", "system"),
        *("instruction", "input", "output", "label", *IMAGE_KEYS, *UNSUPPORTED_KEYS),
    }
)
"""Metadata keys that are not exported, because a dataset format would read them as content."""

_COORDINATE = r"-?\d+(?:\.\d+)?"
_POINT = rf"\(\s*{_COORDINATE}\s*,\s*{_COORDINATE}\s*\)"
_CORNERS = re.compile(rf"<\|box_start\|>\s*({_POINT}\s*,\s*{_POINT})\s*<\|box_end\|>")
_TOKEN_BOXES = re.compile(
    r"(?:<\|object_ref_start\|>(?P<label>(?s:(?:(?!<\|object_ref_).)*))<\|object_ref_end\|>\s*)?"
    rf"(?P<boxes>(?:{_CORNERS.pattern})+)"
)


def parse_text(role: Role, text: str, images: RowImages) -> Iterable[ContentPart]:
    """Parse a text without image placeholders; only answers may contain boxes."""
    return parse_answer(text, images) if role == "assistant" else [strip_object_refs(text)]


def parse_answer(answer: str, images: RowImages) -> Iterator[ContentPart]:
    """Parse an answer text into text parts and box parts."""
    for piece in split_at_pattern(answer, _TOKEN_BOXES) if "<|box_start|>" in answer else [answer]:
        if not isinstance(piece, str):
            images.require_single_image()
            for corners in _CORNERS.findall(piece["boxes"]):
                coordinates = re.findall(_COORDINATE, corners)
                yield images.create_box(coordinates, piece["label"], BoxConvention(units="1000"))
        elif BOX_KEY not in piece:
            yield from [strip_object_refs(piece)] if piece else []
        else:
            for text_or_boxes in _iter_json_boxes(strip_code_fences(piece)):
                if isinstance(text_or_boxes, str):
                    yield strip_object_refs(text_or_boxes)
                    continue
                images.require_single_image()
                for coordinates, label in text_or_boxes:
                    yield images.create_box(coordinates, label, BoxConvention())


def format_answer(content: Sequence[ContentPart], num_images: int) -> str:
    """Format text and box parts as text, with boxes as JSON in original pixels.

    `parse_answer` restores the same parts from the result.
    """
    segments: list[str | JsonBoxes] = []
    for part in content:
        last = segments[-1] if segments else None
        if isinstance(part, BoxPart):
            label = None if part.label is None else make_text_part(part.label).text
            box = JsonBox([format_number(value) for value in part.xyxy], label)
            if isinstance(last, list):
                last.append(box)
            else:
                segments.append([box])
        elif isinstance(part, TextPart):
            text = make_text_part(part.text).text
            if isinstance(last, str):
                segments[-1] = last + text
            else:
                segments.append(text)
        else:
            raise UserError(
                f"a part of type {part.type} in an answer",
                expected="text and boxes",
                remedy="remove the sample",
            )
    text = "".join(piece if isinstance(piece, str) else _format_boxes(piece) for piece in segments)
    segments = [piece for piece in segments if piece]
    if BOX_KEY in text and (num_images != 1 or list(_iter_json_boxes(text)) != segments):
        raise UserError(
            f"boxes that are ambiguous with the surrounding text or their image: {text[:80]!r}",
            expected=f"boxes in one image, and no {BOX_KEY} or bracket in the adjacent text",
            remedy="export to samples or to ms-swift, or remove the sample",
        )
    return text


def _format_boxes(boxes: JsonBoxes) -> str:
    items = [
        {BOX_KEY: coordinates} if label is None else {BOX_KEY: coordinates, "label": label}
        for coordinates, label in boxes
    ]
    return json.dumps(items[0] if len(items) == 1 else items, ensure_ascii=False)


def _iter_json_boxes(text: str) -> Iterator[str | JsonBoxes]:
    """Yield non-empty texts and lists of boxes, and reject malformed boxes."""
    for piece in split_at_boxes(text):
        if not isinstance(piece, str):
            check_limit(len(piece), MAX_BOXES, "boxes")
            boxes = [parse_json_box(value) for value in piece]
            if None in boxes:
                raise InvalidRowError(
                    f"the box {str(piece[boxes.index(None)])[:80]}",
                    f'{{"{BOX_KEY}": [four values], "label": text}}',
                )
            yield [box for box in boxes if box is not None]
        elif BOX_KEY in piece:
            raise InvalidRowError(
                f"{BOX_KEY} outside of JSON in the answer {piece[:80]!r}",
                f'{{"{BOX_KEY}": [x1, y1, x2, y2]}}',
            )
        elif piece:
            yield piece


def build_turns_example(
    row: SourceRow,
    context: ImportContext,
    turns: Sequence[tuple[Role, ContentT]],
    parse_turn: Callable[[Role, ContentT], Iterable[ContentPart]],
    *handled_keys: str,
) -> ImportExample:
    """Build a training example from the turns of a row.

    Args:
        *handled_keys: Keys of the row that the format has parsed. Other keys become metadata or,
            with unsupported content, are rejected.
    """
    reject_unsupported_keys(row.record, UNSUPPORTED_KEYS - {*handled_keys})
    check_limit(len(turns), MAX_MESSAGES, "messages")
    messages: list[tuple[Role, tuple[ContentPart, ...]]] = []
    has_prompt = False
    for role, content in turns:
        parts = merge_text_parts(parse_turn(role, content))
        if role == "user" and not has_prompt:
            parts, has_prompt = context.add_prompt(parts), True
        messages.append((role, parts))
    return build_example(row.id, messages, collect_meta(row.record, *handled_keys))


def parse_turns(record: Record, key: str = "conversations") -> list[Turn]:
    """Return role and text of each turn under a key of a record, after its system prompt.

    Raises:
        UserError: The value is not a list of turns.
        UnsupportedKeyError: A turn has content other than text.
    """
    values = record.get(key)
    if not isinstance(values, list) or not values:
        raise InvalidRowError(f"{key} is {str(values)[:60]!r}", "a list of turns")
    turns = parse_system(record)
    for turn in values:
        role = get_role(turn) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if role is not None else None
        if role is None or not isinstance(text, str):
            raise InvalidRowError(
                f"the turn {str(turn)[:80]}",
                f"{{from: ..., value: text}} from one of {', '.join(ROLES)}",
            )
        reject_unsupported_turn_keys(turn)
        turns.append((role, text))
    return turns


def parse_system(record: Record) -> list[Turn]:
    """Return the turn of the system prompt of a record, if it has one."""
    system = record.get("system")
    return [("system", str(system))] if system else []


def parse_history(record: Record) -> list[Turn]:
    """Return the earlier turns of a record, question-answer pairs under `history`."""
    turns: list[Turn] = []
    for pair in as_list(record.get("history")):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise InvalidRowError(
                f"history with {str(pair)[:60]!r}", "pairs of texts, [question, answer]"
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def reject_unsupported_turn_keys(turn: Record) -> None:
    """Raise UnsupportedKeyError if a turn has tool calls, other media, or a loss weight."""
    keys = [key for key in UNSUPPORTED_TURN_KEYS & turn.keys() if turn[key] != 1]
    reject_unsupported_keys(turn, keys)


def get_role(turn: Record) -> Role | None:
    """Return the role of a turn, or None if it is missing or unknown."""
    speaker = turn["from"] if "from" in turn else turn.get("role")
    return ROLES.get(speaker) if isinstance(speaker, str) else None


def list_turn_texts(record: Record) -> list[tuple[Role | None, str]]:
    """Return role and text of each turn with text, for format detection."""
    turns = record.get("conversations")
    return [
        (get_role(turn), turn["value"])
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
    ]


def list_images(record: Record, keys: Sequence[str] = IMAGE_KEYS) -> list[object]:
    """Return the images under the keys `image` and `images` of a record, in order."""
    return [
        image
        for key in keys
        if key in record and has_value(record[key])
        for image in as_list(record[key])
    ]


def list_checked_images(record: Record) -> list[object]:
    """Return the images of a record like `list_images`, limited to `MAX_PARTS`."""
    images = list_images(record)
    check_limit(len(images), MAX_PARTS, "images")
    return images


def list_videos(record: Record) -> list[object]:
    """Return the videos under the keys `video` and `videos` of a record, in order.

    A video is a file, a folder of frames or a list of them; a plain list of images is one video.
    """
    videos: list[object] = []
    for values in (as_list(record[key]) for key in VIDEO_KEYS if has_value(record.get(key))):
        is_frame_list = all(is_image_value(v) and not isinstance(v, list) for v in values)
        videos += [values] if is_frame_list else values
    check_limit(len(videos), MAX_PARTS, "videos")
    return videos


def collect_meta(record: Record, *handled_keys: str) -> Record:
    """Return the keys of a record that are neither parsed nor unsupported, as sample metadata.

    NaN, which tables use for missing values, becomes null.
    """
    keys = record.keys() - UNSUPPORTED_KEYS - {"id", *handled_keys}
    return {str(key): to_json_data(value) for key, value in record.items() if key in keys}


def write_rows(
    samples: Sequence[LocatedSample],
    context: ExportContext,
    make_fields: Callable[[LocatedSample], Record],
) -> Files:
    """Yield one JSON line per sample for the file data.jsonl; see `encode_row`."""
    for located_sample in samples:
        yield JSONL_FILE, f"{encode_row(located_sample, context, make_fields)}\n".encode()


def encode_row(
    located_sample: LocatedSample,
    context: ExportContext,
    make_fields: Callable[[LocatedSample], Record],
) -> str:
    """Encode the row of a sample as JSON: ID, content from `make_fields`, and metadata.

    References and metadata under reserved keys are not written; they are counted as lost content.
    """
    sample = located_sample.sample
    try:
        fields = make_fields(located_sample)
    except UserError as error:
        raise UserError(
            f"the sample {sample.id!r} cannot be written: {error.what}",
            where=error.where,
            expected=error.expected,
            remedy=error.remedy,
        ) from error
    reserved = {*RESERVED_KEYS, *fields} & sample.meta.keys()
    context.lost_counts["references"] += len(sample.references)
    context.lost_counts["metadata with a key that the format uses"] += len(reserved)
    meta = {key: value for key, value in sample.meta.items() if key not in reserved}
    return json.dumps({"id": sample.id, **fields, **meta}, ensure_ascii=False)


def add_box_note(
    samples: Sequence[LocatedSample], context: ExportContext, suffix: str = ""
) -> None:
    """Add a note for the user that boxes in answers are written as JSON text."""
    num_with_boxes = sum(
        any(isinstance(part, BoxPart) for part in located_sample.sample.iter_parts())
        for located_sample in samples
    )
    if num_with_boxes:
        context.notes.append(
            f"the boxes of {num_with_boxes} samples are JSON in the answers, in pixels of the"
            f" original images{suffix}"
        )


def render_turns(
    located_sample: LocatedSample, context: ExportContext, placeholder: str = "<image>"
) -> tuple[list[Turn], list[str]]:
    """Render the turns of a sample as texts, with boxes in answers as JSON."""
    sample = located_sample.sample
    num_images = sum(isinstance(part, ImagePart) for part in sample.iter_parts())
    renderer = PartRenderer(located_sample, context, placeholder)
    turns: list[Turn] = [
        (
            message.role,
            format_answer(message.content, num_images)
            if message.role == "assistant"
            else "".join(map(renderer.render, message.content)),
        )
        for message in sample.messages
    ]
    return turns, renderer.image_names


class PartRenderer:
    """Render text and image parts of a sample, and collect its image names in order."""

    def __init__(
        self, located_sample: LocatedSample, context: ExportContext, placeholder: str = "<image>"
    ) -> None:
        self._located_sample, self._context = located_sample, context
        self._placeholder = placeholder
        self.image_paths: list[Path] = []
        self.image_names: list[str] = []

    def render(self, part: ContentPart) -> str:
        """Render a text or image part of a question as text."""
        if isinstance(part, TextPart):
            return make_text_part(part.text).text
        if isinstance(part, ImagePart):
            self.image_paths.append(self._located_sample.resolve_path(part.image))
            self.image_names.append(self._context.image_name(self.image_paths[-1]))
            return self._placeholder.replace("{}", self.image_names[-1])
        raise UserError(
            f"a {part.type} in a question",
            expected="text and images, the only content that the format supports",
            remedy="export to samples or, for boxes, to ms-swift; or remove the sample",
        )
