"""Conversion of data files from the box format of one model family to another.

qwen_vl      <ref>dog</ref><box>(88,99),(500,700)</box>, thousandths of the image, below 1000
qwen2_vl     the same with <|object_ref_start|>, <|box_start|> and their end tokens, 0 to 1000
qwen2_5_vl   {"bbox_2d": [56, 40, 320, 280], "label": "dog"}, pixels of the resized image
qwen3_vl     the same JSON in thousandths of the image, 0 to 1000

The input is a JSON array of records, a single JSON record, or JSONL. Boxes are converted in
answers: assistant turns (`from` or `role`), values of `response`, `output` and similar keys, and
answers in `history`. All other text is copied byte for byte.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.config import ImageRule
from finesight.data.boxes import (
    BOX_KEY,
    COORDINATE_KEYS,
    COORDINATES,
    POINT_KEY,
    Box,
    TextBox,
    is_inside_image,
    split_at_boxes,
    split_at_coordinates,
    strip_code_fences,
)
from finesight.data.formats.conversation_rows import ROLE_KEYS, ROLES
from finesight.data.image_header import ImageSize
from finesight.data.image_resolver import ImageResolver
from finesight.data.sample import Role, read_text_file
from finesight.encode.family import (
    FRAME_1000,
    ImageBox,
    ModelFamily,
    SpecialToken,
)
from finesight.encode.qwen2_vl import Qwen2VL, Qwen25VL
from finesight.encode.qwen_vl import BOX_TOKENS, QwenVL
from finesight.errors import UserError
from finesight.storage import raise_if_exists, write_file
from finesight.vision.image_processing import compute_resized_size

PIXEL_BOX_FORMAT = "qwen2_5_vl"

_JSON_FORMATS = ("qwen2_5_vl", "qwen3_vl")

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_POINT = rf"\({_NUMBER},{_NUMBER}\)"
_JSON_BOX = re.compile(rf'{BOX_KEY}(?!"\s*:\s*(?:\[?\s*"[<(]|\[\s*\]|null))')
"""Key of a box, unless a string with special tokens or no box follows."""

_FORMAT_PATTERNS = {
    "qwen_vl": re.compile(r"</?(?:box|quad)>"),
    "qwen2_vl": re.compile(r"<\|(?:box|quad)_(?:start|end)\|>"),
    "qwen2_5_vl": _JSON_BOX,
    "qwen3_vl": _JSON_BOX,
}


_Piece = str | list[TextBox]
"""Part of an answer: a text, or adjacent boxes and points with their labels."""

FrameSizes = Callable[[], tuple[ImageSize, ImageSize]]
"""Function that returns the source and the target coordinate frame (height, width)."""


def convert_boxes(
    text: str, source_format: str, target_format: str, get_frames: FrameSizes
) -> tuple[str, int]:
    """Convert the boxes of an answer from one format to another.

    Between two JSON formats, only the coordinates change. Other conversions remove a code fence
    around the JSON. In a JSON structure, boxes with special tokens are strings.

    Args:
        get_frames: Returns source and target frame; called only if there are boxes.
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
        pieces = [*_split_json(text, source_format)]
    elif source_format in _JSON_FORMATS or any(key in text for key in COORDINATE_KEYS):
        pieces = [*_parse_json(text, source_format)]
    else:
        pieces = [*_parse_token_boxes(text, source_format, target_format)]
    num_boxes = sum(len(piece) for piece in pieces if isinstance(piece, list))
    families: dict[str, ModelFamily] = {"qwen_vl": QwenVL(), "qwen2_vl": Qwen2VL()}
    written = families.get(target_format, Qwen25VL()).write_segments(
        [_to_segment(piece, source_format, target_format, get_frames) for piece in pieces]
    )
    return "".join(
        one.token if isinstance(one, SpecialToken) else one for one in written
    ), num_boxes


def has_boxes(text: str) -> bool:
    """Return whether a text contains box markup of any format."""
    return any(pattern.search(text) for pattern in _FORMAT_PATTERNS.values())


def _split_json(text: str, source_format: str) -> Iterator[_Piece]:
    """Yield coordinates in JSON and the texts between them."""
    keys = re.sub(r'"\w+"\s*:\s*null', "", text)  # an object without a box
    if len(COORDINATES.findall(text)) != sum(map(keys.count, COORDINATE_KEYS)):
        raise _build_unreadable_error(text, source_format)
    for index, piece in enumerate(split_at_coordinates(text)):
        yield [TextBox(piece.strip("[]").split(","), None)] if index % 2 else piece


def _to_corners(coordinates: Any, text: str, source_format: str) -> Box:
    """Return the corners of a box, or a point twice."""
    try:
        numbers = [float(number) for number in coordinates]
        x1, y1, x2, y2 = numbers * 2 if len(numbers) == 2 else numbers
    except (TypeError, ValueError) as error:
        raise _build_unreadable_error(text, source_format) from error
    return x1, y1, x2, y2


def _parse_json(text: str, source_format: str) -> Iterator[_Piece]:
    for piece in split_at_boxes(strip_code_fences(text)):
        if isinstance(piece, str) and any(key in piece for key in COORDINATE_KEYS):
            raise _build_unreadable_error(piece, source_format)
        if isinstance(piece, str) or isinstance(piece[0], str):
            # In a structure, boxes are not adjacent.
            pieces = [piece] if isinstance(piece, str) else piece
            yield from (one if isinstance(one, str) else [one] for one in pieces)
        else:
            yield [box for box in piece if isinstance(box, TextBox)]


def _parse_token_boxes(text: str, source_format: str, target_format: str) -> Iterator[_Piece]:
    markers = BOX_TOKENS.values() if source_format == "qwen_vl" else BOX_TOKENS
    ref, ref_end, box, box_end = map(re.escape, markers)
    label_pattern = rf"{ref}((?:(?!{ref_end}).)*){ref_end}"
    box_pattern = rf"(?:{label_pattern}\s*)?{box}\s*{_POINT}(?:\s*,\s*{_POINT})?\s*{box_end}"
    is_json = target_format in _JSON_FORMATS
    start, stop, *_ = BOX_TOKENS.values() if target_format == "qwen_vl" else BOX_TOKENS
    adjacent_boxes: list[TextBox] = []
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
            yield reference if is_json else f"{start}{reference}{stop}"
            continue
        # A label shared by several boxes is written once, except in JSON.
        if label is None and adjacent_boxes and is_json:
            label = adjacent_boxes[-1].label
        adjacent_boxes.append(TextBox([*filter(None, coordinates)], label))
    yield from ([adjacent_boxes] if adjacent_boxes else [])
    yield _require_no_boxes(text[end:], source_format)


def _require_no_boxes(text: str, source_format: str) -> str:
    if _FORMAT_PATTERNS[source_format].search(text):
        raise _build_unreadable_error(text, source_format)
    return text


def _to_segment(
    piece: _Piece,
    source_format: str,
    target_format: str,
    get_frames: FrameSizes,
) -> str | list[ImageBox]:
    if isinstance(piece, str):
        return piece
    source_frame, target_frame = get_frames()
    boxes = []
    for coordinates, label, _ in piece:
        xyxy = _to_corners(coordinates, str(coordinates), source_format)
        _check_in_frame(xyxy, source_frame, source_format)
        if label and target_format not in _JSON_FORMATS:
            _check_label(label, target_format)
        boxes.append(ImageBox(label, xyxy, source_frame, target_frame, len(coordinates) == 2))
    return boxes


def _check_label(label: str, target_format: str) -> None:
    markers = [marker for pair in BOX_TOKENS.items() for marker in pair if marker in label]
    if markers:
        raise UserError(
            f"the label {label[:60]!r} contains {markers[0]}",
            expected=f"a label without markup of {target_format}",
            remedy="correct the label",
        )


def _check_in_frame(xyxy: Box, frame: ImageSize, source_format: str) -> None:
    """Raise UserError for an inverted box or a box outside its frame."""
    height, width = frame
    x1, y1, x2, y2 = xyxy
    if is_inside_image(xyxy, frame, is_point=True):
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
        expected=f"boxes and points in the {source_format} format, without other keys for tokens",
        remedy="correct the answer, convert to a JSON format, or remove the record",
    )


ROLE_BY_KEY: dict[str, Role] = {
    **dict.fromkeys(("query", "instruction", "input", "human", "user", "prompt"), "user"),
    **dict.fromkeys(("response", "rejected_response", "output", "assistant"), "assistant"),
    **dict.fromkeys(("chosen", "rejected", "answer"), "assistant"),
    "system": "system",
}
"""Message role of the texts below a JSON key of a record."""

IMAGE_KEYS = ("image", "images", "image_url")
NON_PATH_KEYS = ("type", "detail")
MAX_LISTED_ERRORS = 5

_IMAGE_TAG = re.compile(
    r"<img>([^<]*)</img>|<\|vision_start\|>((?:(?!<\|vision_).)*)<\|vision_end\|>", re.DOTALL
)
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_STRING_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BOX_FORMAT_REQUEST = re.compile(
    r"bbox|<box>|<\|box_start\|>|\bjson\b|coordinate|\bx_?min\b|\bx1\b|\b1000\b|坐标", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class ResizeSpec:
    """Image resizing of a Qwen2.5-VL model, which determines the pixels of its boxes."""

    image_rule: ImageRule
    factor: int


@dataclass(slots=True)
class MigrationResult:
    """Result of converting the boxes of a file with `migrate_box_file`.

    Attributes:
        unconverted: Locations of records with unchanged text that may contradict the converted
            answers: questions that mention a box format, and other texts with boxes or points.
    """

    file: Path
    num_records: int = 0
    num_boxes: int = 0
    answers_with_boxes: int = 0
    answers_without_boxes: int = 0
    unconverted: tuple[str, ...] = ()


class _JsonObject(list[tuple[str, Any]]):
    """A JSON object as a list of (key, value) pairs, which retains duplicate keys."""


@dataclass(frozen=True, slots=True)
class _TextNode:
    """A string value of a JSON record.

    Attributes:
        role: Role of the message that contains the text; None if it is not part of a message.
    """

    literal_index: int
    text: str
    role: Role | None
    is_image: bool


def migrate_box_file(
    file: Path,
    out: Path,
    source_format: str,
    target_format: str,
    resize_spec: ResizeSpec | None = None,
) -> MigrationResult:
    """Convert the boxes of a dataset file from one box format to another.

    Args:
        resize_spec: Required if and only if one format is qwen2_5_vl, whose boxes are in pixels of
            the resized image of the record.
    """
    _check_arguments(out, source_format, target_format, resize_spec)
    images = ImageResolver(file.parent, out.parent)

    def convert(text: str, image_names: list[object]) -> tuple[str, int]:
        def get_frames() -> tuple[ImageSize, ImageSize]:
            resized_size = (
                _get_resized_size(image_names, images, resize_spec) if resize_spec else FRAME_1000
            )
            source_frame, target_frame = (
                resized_size if name == PIXEL_BOX_FORMAT else FRAME_1000
                for name in (source_format, target_format)
            )
            return source_frame, target_frame

        return convert_boxes(text, source_format, target_format, get_frames)

    result, errors = MigrationResult(out), list[tuple[str, UserError]]()
    chunks = list(_split_records(read_text_file(file), file))
    converted = "".join(_convert_chunk(*chunk, convert, result, errors) for chunk in chunks)
    if errors:
        raise _build_migration_error(errors, file)
    write_file(out, converted.encode())
    return result


def _check_arguments(
    out: Path, source_format: str, target_format: str, resize_spec: ResizeSpec | None
) -> None:
    if source_format == target_format:
        raise UserError(
            f"both families are {source_format}",
            where="--to",
            expected="another family",
            remedy="set it to the family of the model to fine-tune",
        )
    if (PIXEL_BOX_FORMAT in (source_format, target_format)) != (resize_spec is not None):
        is_missing = resize_spec is None
        raise UserError(
            f"{'not given' if is_missing else 'given'} for {source_format} to {target_format}",
            where="--model or --image",
            expected=f"the resize rule: {PIXEL_BOX_FORMAT} boxes are pixels of resized images"
            if is_missing
            else f"no resize rule, because only {PIXEL_BOX_FORMAT} boxes are pixels",
            remedy="set --model to the model folder, or --image to the rule of the recipe"
            if is_missing
            else "remove the option",
        )
    raise_if_exists(out)


def _get_resized_size(
    image_names: list[object], images: ImageResolver, resize_spec: ResizeSpec
) -> ImageSize:
    """Return the resized size of the only image of a record."""
    if len(image_names) != 1:
        raise UserError(
            f"a box in a record of {len(image_names)} images",
            expected="exactly one image, whose size defines the box coordinates",
            remedy="remove the record, or import the file",
        )
    path = images.resolve(image_names[0])
    return compute_resized_size(
        images.image_size(path), resize_spec.image_rule, resize_spec.factor, str(path)
    )


def _split_records(text: str, file: Path) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Yield the JSON chunks of a file, with the location and content of their records.

    A chunk is one line of JSONL, or the complete text of a JSON file.
    """
    try:
        document = json.loads(text, object_pairs_hook=_JsonObject)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, _JsonObject):
        yield text, [("the record", document)]
        return
    if isinstance(document, list):
        yield text, [(f"row {number}", record) for number, record in enumerate(document, start=1)]
        return
    for line_number, line in enumerate(_LINE.findall(text), start=1):
        if not line.strip():
            yield line, []
            continue
        try:
            record = json.loads(line, object_pairs_hook=_JsonObject)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"invalid JSON: {error}",
                where=f"{file}:{line_number}",
                expected="a JSON array of records, or one record per line",
                remedy="correct this line",
            ) from error
        yield line, [(f"line {line_number}", record)]


def _convert_chunk(
    text: str,
    records: list[tuple[str, Any]],
    convert: Callable[[str, list[object]], tuple[str, int]],
    result: MigrationResult,
    errors: list[tuple[str, UserError]],
) -> str:
    """Return the converted text of a chunk, and add its counts and errors to the result."""
    literal_indices = itertools.count()
    result.num_records += len(records)
    changes: dict[int, str] = {}
    for location, record in records:
        nodes = list(_iter_texts(record, literal_indices))
        image_names = _collect_image_names(nodes)
        is_unconverted = False
        for node in nodes:
            if node.role != "assistant" or node.is_image:
                is_request = node.role == "user" and _BOX_FORMAT_REQUEST.search(node.text)
                is_box = node.role != "user" and has_boxes(node.text)
                is_unconverted |= not node.is_image and bool(is_request or is_box)
                continue
            try:
                converted, num_boxes = convert(node.text, image_names)
            except UserError as error:
                errors.append((location, error))
                continue
            result.num_boxes += num_boxes
            result.answers_with_boxes += num_boxes > 0
            result.answers_without_boxes += num_boxes == 0
            is_unconverted |= POINT_KEY in converted and num_boxes == 0
            if converted != node.text:
                changes[node.literal_index] = converted
        result.unconverted += (location,) * is_unconverted
    return _replace_literals(text, changes) if changes else text


def _replace_literals(text: str, changes: dict[int, str]) -> str:
    """Replace string literals of a JSON text by index, with the escaping of the original."""
    literals = itertools.count()

    def replace_literal(match: re.Match[str]) -> str:
        index = next(literals)
        if index not in changes:
            return match[0]
        return json.dumps(changes[index], ensure_ascii="\\u" in match[0])

    return _STRING_LITERAL.sub(replace_literal, text)


def _iter_texts(
    value: Any,
    literal_indices: Iterator[int],
    role: Role | None = None,
    is_image: bool = False,
) -> Iterator[_TextNode]:
    """Yield all string values of parsed JSON data in file order.

    Object keys are not yielded, but advance `literal_indices`, because they are string literals,
    too.
    """
    if isinstance(value, str):
        yield _TextNode(next(literal_indices), value, role, is_image)
    elif isinstance(value, _JsonObject):
        values_by_key = dict(value)
        role_value = next((values_by_key[key] for key in ROLE_KEYS if key in values_by_key), None)
        role = ROLES.get(role_value) if isinstance(role_value, str) else role
        for key, child in value:
            next(literal_indices)
            if key == "history":
                yield from _iter_history(child, literal_indices)
                continue
            is_child_image = (is_image or key in IMAGE_KEYS) and key not in NON_PATH_KEYS
            child_role = None if key in (*ROLE_KEYS, "type") else ROLE_BY_KEY.get(key, role)
            yield from _iter_texts(child, literal_indices, child_role, is_child_image)
    elif isinstance(value, list):
        for child in value:
            yield from _iter_texts(child, literal_indices, role, is_image)


def _iter_history(value: Any, literal_indices: Iterator[int]) -> Iterator[_TextNode]:
    """Yield the texts of the key `history`: [question, answer] pairs or objects."""
    rounds = value if isinstance(value, list) else [value]
    for pair in rounds:
        if isinstance(pair, _JsonObject) or not isinstance(pair, list):
            yield from _iter_texts(pair, literal_indices)
            continue
        for position, text in enumerate(pair):
            yield from _iter_texts(text, literal_indices, "assistant" if position % 2 else "user")


def _collect_image_names(texts: list[_TextNode]) -> list[object]:
    """Return the unique image names of a record, from JSON keys and image tags."""
    image_names: dict[str, None] = {}
    for node in texts:
        if node.is_image:
            image_names[node.text] = None
        elif node.role == "user":
            image_names |= {
                (first or second): None for first, second in _IMAGE_TAG.findall(node.text)
            }
    return list(image_names)


def _build_migration_error(errors: list[tuple[str, UserError]], file: Path) -> UserError:
    lines = [f"{len(errors)} answers cannot be converted; no file was written"]
    for location, error in errors[:MAX_LISTED_ERRORS]:
        lines.append(f"  {location}: {f'{error.where}: ' if error.where else ''}{error.what}")
    if len(errors) > MAX_LISTED_ERRORS:
        lines.append(f"  and {len(errors) - MAX_LISTED_ERRORS} more")
    first_error = errors[0][1]
    return UserError(
        "\n".join(lines), where=str(file), expected=first_error.expected, remedy=first_error.remedy
    )
