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
from collections.abc import Callable, Iterator, Mapping, Sequence

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
from finesight.data.jsonl import LocatedSample, to_json_data
from finesight.data.row_reader import Record, SourceRow
from finesight.data.sample import (
    MAX_BOXES,
    MAX_MESSAGES,
    MAX_PARTS,
    BoxPart,
    ContentPart,
    ImagePart,
    Role,
    TextPart,
    check_limit,
    format_number,
)
from finesight.errors import UserError

THOUSANDTHS = BoxConvention(units="1000")
_COORDINATE = r"-?\d+(?:\.\d+)?"
_POINT = rf"\(\s*{_COORDINATE}\s*,\s*{_COORDINATE}\s*\)"
_CORNERS = re.compile(rf"<\|box_start\|>\s*({_POINT}\s*,\s*{_POINT})\s*<\|box_end\|>")
_TOKEN_BOXES = re.compile(
    r"(?:<\|object_ref_start\|>(?P<label>(?s:(?:(?!<\|object_ref_).)*))<\|object_ref_end\|>\s*)?"
    rf"(?P<boxes>(?:{_CORNERS.pattern})+)"
)
JsonBoxes = list[JsonBox]


def parse_answer(answer: str, images: RowImages) -> Iterator[ContentPart]:
    """Parse an answer text into text parts and box parts.

    Raises:
        UserError: `bbox_2d` occurs outside of valid JSON, a box token remains in the text, or a
            text with boxes belongs to a row that does not have exactly one image.
    """
    marked = (
        split_at_pattern(answer, _TOKEN_BOXES)
        if "<|box_start|>" in answer
        else filter(None, (answer,))
    )
    for piece in marked:
        if isinstance(piece, str):
            yield from _parse_json_answer(piece, images)
            continue
        images.require_single_image()
        for box in _CORNERS.findall(piece["boxes"]):
            yield images.create_box(re.findall(_COORDINATE, box), piece["label"], THOUSANDTHS)


def _parse_json_answer(answer: str, images: RowImages) -> Iterator[ContentPart]:
    if BOX_KEY not in answer:
        yield strip_object_refs(answer)
        return
    for piece in _iter_boxes(strip_code_fences(answer)):
        if isinstance(piece, str):
            yield strip_object_refs(piece)
            continue
        images.require_single_image()
        for coordinates, label in piece:
            yield images.create_box(coordinates, label, BoxConvention())


def format_answer(content: Sequence[ContentPart], num_images: int) -> str:
    """Format text and box parts as text, with boxes as JSON in original pixels.

    `parse_answer` restores the same parts from the result.

    Raises:
        UserError: `parse_answer` would not restore the parts, for example because a text contains
            `bbox_2d`.
    """
    segments: list[str | JsonBoxes] = []
    for part in content:
        if isinstance(part, BoxPart):
            label = None if part.label is None else make_text_part(part.label).text
            box = JsonBox([format_number(value) for value in part.xyxy], label)
            segments = (
                [*segments[:-1], [*_trailing_boxes(segments), box]]
                if _trailing_boxes(segments)
                else [*segments, [box]]
            )
        elif isinstance(part, TextPart):
            previous = segments.pop() if segments and isinstance(segments[-1], str) else ""
            segments.append(f"{previous}{make_text_part(part.text).text}")
        else:
            raise UserError(
                f"a part of type {part.type} in an answer",
                expected="text and boxes",
                remedy="remove the sample",
            )
    text = "".join(piece if isinstance(piece, str) else _format_boxes(piece) for piece in segments)
    segments = [piece for piece in segments if piece]
    if BOX_KEY in text and (num_images != 1 or list(_iter_boxes(text)) != segments):
        raise UserError(
            f"boxes that are ambiguous with the surrounding text or their image: {text[:80]!r}",
            expected=f"boxes in one image, and no {BOX_KEY} or bracket in the adjacent text",
            remedy="export to samples or to ms-swift, or remove the sample",
        )
    return text


def _trailing_boxes(segments: list[str | JsonBoxes]) -> JsonBoxes:
    """Return the boxes at the end of the segments; empty after text.

    A following box is added to the same JSON list.
    """
    return segments[-1] if segments and not isinstance(segments[-1], str) else []


def _format_boxes(boxes: JsonBoxes) -> str:
    items = [
        {BOX_KEY: coordinates} if label is None else {BOX_KEY: coordinates, "label": label}
        for coordinates, label in boxes
    ]
    return json.dumps(items[0] if len(items) == 1 else items, ensure_ascii=False)


def _iter_boxes(text: str) -> Iterator[str | JsonBoxes]:
    for piece in split_at_boxes(text):
        if not isinstance(piece, str):
            check_limit(len(piece), MAX_BOXES, "boxes")
            yield [_parse_box(value) for value in piece]
            continue
        if BOX_KEY in piece:
            raise UserError(
                f"{BOX_KEY} outside of JSON in the answer {piece[:80]!r}",
                expected=f'{{"{BOX_KEY}": [x1, y1, x2, y2]}}',
                remedy="correct the row",
            )
        if piece:
            yield piece


def _parse_box(value: object) -> JsonBox:
    item = parse_json_box(value)
    if item is None:
        raise UserError(
            f"the box {str(value)[:80]}",
            expected=f'{{"{BOX_KEY}": [four values], "label": text}}',
            remedy="correct the row",
        )
    return item


Turn = tuple[Role, str]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
ROLE_KEYS = ("from", "role")
UNSUPPORTED_TURN_KEYS = (
    "loss",
    "loss_scale",
    "weight",
    "tool_calls",
    "function_call",
    "audio",
    "refusal",
)
"""Keys of a turn with unsupported content: tool calls, other media, and loss weights."""

_UNNOTED = frozenset({"id", *UNSUPPORTED_KEYS})
_UNREAD = frozenset(UNSUPPORTED_KEYS)
_MORE = frozenset(UNSUPPORTED_TURN_KEYS)


def build_turns_example(
    row: SourceRow,
    context: ImportContext,
    turns: Sequence[Turn],
    parse_text: Callable[[Role, str], Iterator[ContentPart]],
    *handled_keys: str,
) -> ImportExample:
    """Build a training example from the turns of a row.

    Keys of the row that are neither handled nor unsupported become metadata.

    Args:
        row: Dataset row.
        context: State of the import.
        turns: Role and text of each turn.
        parse_text: Function that parses a text into content parts, given its role.
        *handled_keys: Keys of the row that the format has parsed.
    """
    if not _UNREAD.isdisjoint(row.record):
        reject_unsupported_keys(row.record, _UNREAD.difference(handled_keys))
    check_limit(len(turns), MAX_MESSAGES, "messages")
    messages: list[tuple[Role, tuple[ContentPart, ...]]] = []
    has_prompt = False
    for role, text in turns:
        parts = merge_text_parts(parse_text(role, text))
        if role == "user" and not has_prompt:
            parts, has_prompt = context.add_prompt(parts), True
        messages.append((role, parts))
    return build_example(row.id, messages, collect_meta(row.record, *handled_keys))


def parse_turns(record: Record, key: str = "conversations") -> list[Turn]:
    """Return role and text of each turn under a key of a record.

    The system prompt of the record comes first.

    Raises:
        UserError: The value is not a list of turns.
        UnsupportedKeyError: A turn has content other than text.
    """
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{key} is {str(turns)[:60]!r}",
            expected="a list of turns",
            remedy="correct the row",
        )
    system = record.get("system")
    system_turns: list[Turn] = [("system", str(system))] if system else []
    return system_turns + [_parse_turn(turn) for turn in turns]


def _parse_turn(turn: object) -> Turn:
    if isinstance(turn, dict):
        role, text = get_role(turn), turn["value"] if "value" in turn else turn.get("content")
        if role is not None and isinstance(text, str):
            reject_unsupported_turn_keys(turn)
            return role, text
    raise UserError(
        f"the turn {str(turn)[:80]}",
        expected=f"{{from: ..., value: text}} from one of {', '.join(ROLES)}",
        remedy="correct the row",
    )


def reject_unsupported_turn_keys(turn: Record) -> None:
    """Raise UnsupportedKeyError if a turn has tool calls, other media, or a loss weight.

    A loss weight of 1 is accepted.
    """
    if not _MORE.isdisjoint(turn):
        reject_unsupported_keys(
            {key: turn[key] for key in _MORE & turn.keys() if turn[key] != 1}, UNSUPPORTED_TURN_KEYS
        )


def get_role(turn: Record) -> Role | None:
    """Return the role of a turn, or None if it is missing or unknown."""
    speaker = turn["from"] if "from" in turn else turn.get("role")
    return ROLES.get(speaker) if isinstance(speaker, str) else None


def list_turn_texts(record: Record) -> list[tuple[Role | None, str]]:
    """Return role and text of each turn of a record, for format detection.

    Turns without text are omitted here and rejected when the row is parsed.
    """
    turns = record.get("conversations")
    return [
        (get_role(turn), turn["value"])
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
    ]


def list_images(record: Record) -> list[object]:
    """Return the images under the keys `image` and `images` of a record, in order."""
    named: list[object] = []
    for key in IMAGE_KEYS:
        if key in record and has_value(record[key]):
            named += as_list(record[key])
    return named


def list_checked_images(record: Record) -> list[object]:
    """Return the images under the keys `image` and `images` of a record, in order.

    Raises:
        LimitExceededError: There are too many images.
    """
    named = list_images(record)
    check_limit(len(named), MAX_PARTS, "images")
    return named


def parse_history(record: Record) -> list[Turn]:
    """Return the earlier turns of a record, question-answer pairs under `history`."""
    turns: list[Turn] = []
    for pair in as_list(record.get("history")):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise UserError(
                f"history with {str(pair)[:60]!r}",
                expected="pairs of texts, [question, answer]",
                remedy="correct the row",
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def collect_meta(record: Record, *handled_keys: str) -> Record:
    """Return the keys of a record that are not parsed, as sample metadata.

    The ID, handled keys and unsupported keys are excluded. NaN, which tables use for missing
    values, becomes null.
    """
    notes = record.keys() - _UNNOTED
    notes.difference_update(handled_keys)
    if not notes:
        return {}
    return {str(key): to_json_data(value) for key, value in record.items() if key in notes}


JSONL_FILE = "data.jsonl"

RESERVED_KEYS = frozenset(
    {
        *("messages", "conversations", "conversation", "query", "response", "system"),
        *("instruction", "input", "output", "label"),
    }
)
"""Metadata keys that are not exported, because a dataset format would read them as content."""

Files = Iterator[tuple[str, bytes]]
"""Relative file names with content. A repeated name appends to the file."""


def write_rows(
    samples: Sequence[LocatedSample], make_record: Callable[[LocatedSample], Record]
) -> Files:
    """Yield one JSON line per sample for the file data.jsonl.

    Raises:
        UserError: The format cannot represent a sample.
    """
    for located_sample in samples:
        yield JSONL_FILE, f"{format_record(make_record, located_sample)}\n".encode()


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
            " original"
            f" images{suffix}"
        )


def format_record(
    make_record: Callable[[LocatedSample], Record], located_sample: LocatedSample
) -> str:
    """Build the record of a sample and encode it as JSON.

    Raises:
        UserError: The format cannot represent the sample. The error names the sample ID.
    """
    try:
        return json.dumps(make_record(located_sample), ensure_ascii=False)
    except UserError as error:
        raise UserError(
            f"the sample {located_sample.sample.id!r} cannot be written: {error.what}",
            where=error.where,
            expected=error.expected,
            remedy=error.remedy,
        ) from error


def build_record(
    located_sample: LocatedSample, context: ExportContext, fields: Mapping[str, object]
) -> Record:
    """Build the exported row of a sample from its content, ID and metadata.

    References and metadata under reserved keys are not written; they are counted as lost content.
    """
    sample = located_sample.sample
    reserved = {"id", *fields, *RESERVED_KEYS, *IMAGE_KEYS, *UNSUPPORTED_KEYS}
    context.lost_counts["references"] += len(sample.references)
    context.lost_counts["metadata with a key that the format uses"] += len(
        reserved & sample.meta.keys()
    )
    notes = {key: value for key, value in sample.meta.items() if key not in reserved}
    return {"id": sample.id, **fields, **notes}


def render_turns(
    located_sample: LocatedSample, make_placeholder: Callable[[ImagePart], str]
) -> list[Turn]:
    """Render the turns of a sample as texts, with image placeholders and boxes as JSON.

    See `conversation_rows` for the JSON of boxes.

    Raises:
        UserError: The sample contains videos, boxes in questions, or texts that an import would
            parse differently.
    """
    sample = located_sample.sample
    num_images = sum(isinstance(part, ImagePart) for part in sample.iter_parts())
    return [
        (
            message.role,
            format_answer(message.content, num_images)
            if message.role == "assistant"
            else "".join(render_part(part, make_placeholder) for part in message.content),
        )
        for message in sample.messages
    ]


def render_part(part: ContentPart, make_placeholder: Callable[[ImagePart], str]) -> str:
    """Render a text or image part of a question as text.

    Raises:
        UserError: The part is a video or a box.
    """
    if isinstance(part, TextPart):
        return make_text_part(part.text).text
    if isinstance(part, ImagePart):
        return make_placeholder(part)
    raise UserError(
        f"a {part.type} in a question",
        expected="text and images, the only content that the format supports",
        remedy="export to samples or, for boxes, to ms-swift; or remove the sample",
    )


class ImagePlaceholder:
    """Renderer of image parts as placeholders, which collects the image names in order."""

    def __init__(
        self, located_sample: LocatedSample, context: ExportContext, placeholder: str = "<image>"
    ) -> None:
        self._located, self._context, self._placeholder = located_sample, context, placeholder
        self.image_names: list[str] = []

    def __call__(self, part: ImagePart) -> str:
        self.image_names.append(self._context.image_name(self._located.resolve_path(part.image)))
        return self._placeholder
