"""Parse and format boxes in answer texts, in the syntax of Qwen2.5-VL or Qwen2-VL.

Qwen2.5-VL writes JSON with `bbox_2d`, one object or a list, with corners in pixels of the original
image. Text around the JSON is preserved. A ```json fence is removed, because each model family adds
its own. Qwen2-VL writes
<|object_ref_start|>dog<|object_ref_end|><|box_start|>(88,99),(500,700)<|box_end|> on a grid of
1000. The options --box-format and --box-units override both conventions.

Boxes are parsed rather than left as text, because coordinates in text would be wrong after the
image is resized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from finesight.data.boxes import BoxConvention
from finesight.data.formats.dataset_format import (
    RowImages,
    make_text_part,
    split_at_pattern,
    strip_object_refs,
)
from finesight.data.json_boxes import (
    BOX_KEY,
    JsonBox,
    parse_json_box,
    split_at_boxes,
    strip_code_fences,
)
from finesight.data.limits import MAX_BOXES, check_limit
from finesight.data.sample import BoxPart, ContentPart, TextPart, format_number
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
