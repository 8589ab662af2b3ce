"""Conversion of boxes in answers between the box formats of four model families.

qwen_vl      <ref>dog</ref><box>(88,99),(500,700)</box>, thousandths of the image, below 1000
qwen2_vl     the same with <|object_ref_start|>, <|box_start|> and their end tokens, 0 to 1000
qwen2_5_vl   {"bbox_2d": [56, 40, 320, 280], "label": "dog"}, pixels of the resized image
qwen3_vl     the same JSON in thousandths of the image, 0 to 1000
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from finesight.data.boxes import BOX_KEY, parse_json_box, split_at_boxes, strip_code_fences
from finesight.encode.family_base import (
    FRAME_1000,
    QWEN_VL_MAX_COORDINATE,
    BoxCorners,
    ImageBox,
    PromptPiece,
    SpecialToken,
    round_to_frame,
    scale_box,
)
from finesight.encode.qwen2_5_vl import Qwen25VL
from finesight.encode.qwen2_vl import Qwen2VL
from finesight.encode.qwen_vl import BOX_TOKENS
from finesight.encode.tokenized_sample import ImageSize
from finesight.errors import UserError

BOX_FORMATS = ("qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PIXEL_BOX_FORMAT = "qwen2_5_vl"
"""Box format with coordinates in pixels of the resized image."""

_JSON_FORMATS = ("qwen2_5_vl", "qwen3_vl")

FRAME_TOLERANCE = 1.0
"""Distance by which a box may exceed its coordinate frame because of rounding."""

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_POINT = rf"\({_NUMBER},{_NUMBER}\)"
_JSON_BOX = re.compile(
    rf"([\"']{BOX_KEY}[\"']\s*:\s*\[){_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}(\])"
)
_FORMAT_PATTERNS = {
    "qwen_vl": re.compile(r"</?(?:box|quad)>"),
    "qwen2_vl": re.compile(r"<\|(?:box|quad)_(?:start|end)\|>"),
    "qwen2_5_vl": re.compile(BOX_KEY),
    "qwen3_vl": re.compile(BOX_KEY),
}


@dataclass(frozen=True, slots=True)
class ParsedBox:
    """A box parsed from an answer, in the coordinates of the source format.

    `shares_label` is True if the label is written only once, before an earlier adjacent box.
    """

    label: str | None
    xyxy: BoxCorners
    shares_label: bool = False


@dataclass(frozen=True, slots=True)
class LabelReference:
    """A label in reference tokens that is not followed by a box."""

    text: str


FrameSizes = Callable[[], tuple[ImageSize, ImageSize]]
"""Function that returns the source and the target coordinate frame (height, width)."""


def convert_boxes(
    text: str, source_format: str, target_format: str, get_frames: FrameSizes
) -> tuple[str, int]:
    """Convert the boxes of an answer from one format to another.

    Between two JSON formats, only the coordinates change. Other conversions remove a code fence
    around the JSON.

    Args:
        text: Answer.
        source_format: Current box format, one of `BOX_FORMATS`.
        target_format: New box format.
        get_frames: Returns source and target frame; called only if there are boxes.

    Returns:
        The converted text and the number of boxes.

    Raises:
        UserError: A box is invalid, exceeds its frame, has another format, or cannot be
            represented.
    """
    for name, pattern in _FORMAT_PATTERNS.items():
        foreign_box = (
            pattern.search(text)
            if pattern.pattern != _FORMAT_PATTERNS[source_format].pattern
            else None
        )
        if foreign_box:
            raise UserError(
                f"{foreign_box[0]!r} in the answer {text[:60]!r}",
                expected=f"boxes in the {source_format} format",
                remedy=f"use --from {name} if the boxes have that format, or correct the answer",
            )
    if source_format in _JSON_FORMATS and target_format in _JSON_FORMATS:
        return _rescale_json_boxes(text, source_format, get_frames)
    pieces = list(
        (_parse_json if source_format in _JSON_FORMATS else _parse_token_boxes)(text, source_format)
    )
    num_boxes = sum(len(piece) for piece in pieces if isinstance(piece, list))
    return "".join(
        _format_piece(piece, source_format, target_format, get_frames) for piece in pieces
    ), num_boxes


def has_boxes(text: str) -> bool:
    """Return whether a text contains box markup of any format."""
    return any(pattern.search(text) for pattern in _FORMAT_PATTERNS.values())


def _rescale_json_boxes(text: str, source_format: str, get_frames: FrameSizes) -> tuple[str, int]:
    def replace_box(match: re.Match[str]) -> str:
        x1, y1, x2, y2 = (float(number) for number in match.groups()[1:5])
        source_frame, target_frame = get_frames()
        _check_in_frame((x1, y1, x2, y2), source_frame, source_format)
        corners = round_to_frame(
            scale_box((x1, y1, x2, y2), source_frame, target_frame), target_frame
        )
        return f"{match[1]}{', '.join(map(str, corners))}{match[6]}"

    converted, num_boxes = _JSON_BOX.subn(replace_box, text)
    if num_boxes != text.count(BOX_KEY):
        raise _build_unreadable_error(text, source_format)
    return converted, num_boxes


def _parse_json(text: str, source_format: str) -> Iterator[str | LabelReference | list[ParsedBox]]:
    for piece in split_at_boxes(strip_code_fences(text)):
        if not isinstance(piece, str):
            yield [_parse_json_box(value, source_format) for value in piece]
        elif BOX_KEY in piece:
            raise _build_unreadable_error(piece, source_format)
        else:
            yield piece


def _parse_json_box(value: object, source_format: str) -> ParsedBox:
    item = parse_json_box(value)
    if item is None:
        raise UserError(
            f"the box {str(value)[:80]}",
            expected=f'{{"{BOX_KEY}": [four coordinates], "label": text}} without other keys',
            remedy="remove the other keys, or convert to a JSON format",
        )
    try:
        x1, y1, x2, y2 = (float(number) for number in item.coordinates)
    except (TypeError, ValueError) as error:
        raise _build_unreadable_error(str(value), source_format) from error
    return ParsedBox(item.label, (x1, y1, x2, y2))


def _parse_token_boxes(
    text: str, source_format: str
) -> Iterator[str | LabelReference | list[ParsedBox]]:
    markers = BOX_TOKENS.values() if source_format == "qwen_vl" else BOX_TOKENS
    ref, ref_end, box, box_end = map(re.escape, markers)
    label_pattern = rf"{ref}((?:(?!{ref_end}).)*){ref_end}"
    box_pattern = rf"(?:{label_pattern}\s*)?{box}\s*{_POINT}\s*,\s*{_POINT}\s*{box_end}"
    adjacent_boxes: list[ParsedBox] = []
    end = 0
    for match in re.finditer(rf"{box_pattern}|{label_pattern}", text, re.DOTALL):
        label, *coordinates, reference = match.groups()
        between = text[end : match.start()]
        end = match.end()
        if adjacent_boxes and (between or reference is not None):
            yield adjacent_boxes
            adjacent_boxes = []
        yield _require_no_boxes(between, source_format)
        if reference is not None:
            yield LabelReference(reference)
            continue
        shares_label = label is None and bool(adjacent_boxes)
        x1, y1, x2, y2 = (float(number) for number in coordinates)
        adjacent_boxes.append(
            ParsedBox(
                adjacent_boxes[-1].label if shares_label else label, (x1, y1, x2, y2), shares_label
            )
        )
    yield from ([adjacent_boxes] if adjacent_boxes else [])
    yield _require_no_boxes(text[end:], source_format)


def _require_no_boxes(text: str, source_format: str) -> str:
    if _FORMAT_PATTERNS[source_format].search(text):
        raise _build_unreadable_error(text, source_format)
    return text


def _format_piece(
    piece: str | LabelReference | list[ParsedBox],
    source_format: str,
    target_format: str,
    get_frames: FrameSizes,
) -> str:
    if isinstance(piece, str):
        return piece
    if isinstance(piece, LabelReference):
        reference_pieces: list[PromptPiece] = [
            SpecialToken("<|object_ref_start|>"),
            piece.text,
            SpecialToken("<|object_ref_end|>"),
        ]
        return (
            piece.text
            if target_format in _JSON_FORMATS
            else _join_pieces(reference_pieces, target_format)
        )
    source_frame, target_frame = get_frames()
    for box in piece:
        _check_in_frame(box.xyxy, source_frame, source_format)
    if target_format in _JSON_FORMATS:
        return _join_pieces(
            Qwen25VL().write_boxes(
                [_to_image_box(b, b.label, source_frame, target_frame) for b in piece]
            ),
            target_format,
        )
    # A label shared by several boxes is written once.
    labels = [None if box.shares_label else box.label for box in piece]
    for label in filter(None, labels):
        _check_label(label, target_format)
    image_boxes = [
        _to_image_box(box, label, source_frame, target_frame)
        for box, label in zip(piece, labels, strict=True)
    ]
    if target_format == "qwen_vl":
        image_boxes = [_clamp_below_1000(box) for box in image_boxes]
    return _join_pieces(Qwen2VL().write_boxes(image_boxes), target_format)


def _to_image_box(
    box: ParsedBox, label: str | None, source_frame: ImageSize, target_frame: ImageSize
) -> ImageBox:
    return ImageBox(label, box.xyxy, original_size=source_frame, resized_size=target_frame)


def _clamp_below_1000(box: ImageBox) -> ImageBox:
    x1, y1, x2, y2 = scale_box(box.xyxy, box.original_size, FRAME_1000)
    clamped = (
        min(x1, QWEN_VL_MAX_COORDINATE),
        min(y1, QWEN_VL_MAX_COORDINATE),
        min(x2, QWEN_VL_MAX_COORDINATE),
        min(y2, QWEN_VL_MAX_COORDINATE),
    )
    return ImageBox(box.label, clamped, original_size=FRAME_1000, resized_size=box.resized_size)


def _join_pieces(pieces: Sequence[PromptPiece], target_format: str) -> str:
    """Join prompt pieces to text, with the special tokens of the target format."""
    token_names = BOX_TOKENS if target_format == "qwen_vl" else {}
    return "".join(
        token_names.get(piece.token, piece.token) if isinstance(piece, SpecialToken) else piece
        for piece in pieces
    )


def _check_label(label: str, target_format: str) -> None:
    markers = [marker for pair in BOX_TOKENS.items() for marker in pair if marker in label]
    if markers:
        raise UserError(
            f"the label {label[:60]!r} contains {markers[0]}",
            expected=f"a label without markup of {target_format}",
            remedy="correct the label",
        )


def _check_in_frame(xyxy: BoxCorners, frame: ImageSize, source_format: str) -> None:
    """Raise UserError for an inverted box or a box outside its frame."""
    height, width = frame
    x1, y1, x2, y2 = xyxy
    inside = (
        min(x1, y1) >= -FRAME_TOLERANCE
        and x2 <= width + FRAME_TOLERANCE
        and y2 <= height + FRAME_TOLERANCE
    )
    if inside and x1 <= x2 and y1 <= y2:
        return
    is_pixel_format = source_format == PIXEL_BOX_FORMAT
    raise UserError(
        f"the box [{', '.join(f'{number:g}' for number in xyxy)}] "
        + ("exceeds its frame" if x1 <= x2 and y1 <= y2 else "is inverted"),
        expected=f"x1 <= x2 up to {width} and y1 <= y2 up to {height}"
        + (", pixels of the resized image" if is_pixel_format else ", thousandths of the image"),
        remedy="set --image or --model to the values used to create the boxes, or correct them"
        if is_pixel_format
        else "use --from qwen2_5_vl if the coordinates are pixels, or correct the box",
    )


def _build_unreadable_error(text: str, source_format: str) -> UserError:
    return UserError(
        f"invalid box in {text.strip()[:80]!r}",
        expected=f"boxes in the {source_format} format with four coordinates each",
        remedy="correct the answer, or remove the record",
    )
