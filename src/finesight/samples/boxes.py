"""Geometry of boxes in pixels or as fractions of their images, and boxes in texts.

Qwen2.5-VL answers contain boxes as JSON objects with the key `bbox_2d`. Other texts contain boxes
or points as plain numbers, which no model family scales. An import converts them if their notation
defines the units, or the user gives them. Others are counted and reported.
"""

from __future__ import annotations

import bisect
import cmath
import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from finesight.errors import UserError
from finesight.samples.frames import FRAME_1000, Box, BoxFrame, Floats, rescale, to_corners


class InvalidBoxError(UserError):
    """Raised when box coordinates are invalid or lie outside the image."""


class StrayBoxError(InvalidBoxError):
    """Raised for a box without area in its image, such as a stray click: it marks no object."""


MAX_OVERHANG_PX = 1.0
"""Maximum overhang of a box beyond its image due to rounding, in pixels."""


def parse_coordinates(value: object) -> list[float]:
    """Parse four box coordinates, or the two of a point, from a list of numbers or their texts.

    Raises:
        InvalidBoxError: The value is not a list of four or two numbers.
    """
    coordinates: list[float] = []
    if isinstance(value, list | tuple):
        # `suppress` would take longer than the conversion.
        try:  # noqa: SIM105
            coordinates = list(map(float, value))
        except (TypeError, ValueError, OverflowError):
            pass
    if len(coordinates) not in (2, 4):
        raise InvalidBoxError(
            f"the box {str(value)[:80]!r}",
            expected="a list of four coordinates, or the two of a point",
            remedy="correct the row, or remove it",
        )
    return coordinates


@contextlib.contextmanager
def translate_shape_errors(
    shape: object, expected: str = "a label and numeric coordinates", kind: str = "shape"
) -> Iterator[None]:
    """Raise InvalidBoxError for errors while a shape is parsed."""
    try:
        yield
    except (TypeError, ValueError, LookupError, ArithmeticError, OSError) as error:
        raise InvalidBoxError(
            f"the {kind} {str(shape)[:80]}",
            expected=expected,
            remedy="correct the shape, or remove it",
        ) from error


def find_bounds(points: Iterable[Sequence[Any]], shape: object) -> list[float]:
    """Return the enclosing box [x1, y1, x2, y2] of the points of a shape.

    Raises:
        InvalidBoxError: The points are not two or more pairs of numbers.
    """
    with translate_shape_errors(shape, "points of two numbers"):
        xs = []
        ys = []
        for x, y in points:
            xs.append(float(x))
            ys.append(float(y))
        return [min(xs), min(ys), max(xs), max(ys)]


def rotate_rectangle(
    box: Box, degrees: float, pivot: tuple[float, float]
) -> list[tuple[float, float]]:
    """Return the corners of a rectangle after a clockwise rotation around a pivot, in order."""
    x1, y1, x2, y2 = box
    # A rotation is a multiplication of complex numbers.
    turn = cmath.rect(1, math.radians(degrees))
    center = complex(*pivot)
    corners = []
    for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2)):
        rotated = (complex(x, y) - center) * turn + center
        corners.append((rotated.real, rotated.imag))
    return corners


def clip_box(box: Box, image_size: tuple[int, int], *, is_point: bool = False) -> Box | None:
    """Clip a box to its image; return None if no area remains, or for a point outside of it."""
    height, width = map(float, image_size)
    x1 = min(max(box[0], 0.0), width)
    y1 = min(max(box[1], 0.0), height)
    x2 = min(max(box[2], 0.0), width)
    y2 = min(max(box[3], 0.0), height)
    is_inside = x1 < x2 and y1 < y2
    if is_point:
        is_inside = is_inside_image(box, image_size, is_point=True)
    if is_inside and all(map(math.isfinite, box)):
        return x1, y1, x2, y2
    return None


def is_inside_image(
    box: Box,
    image_size: tuple[float, float],
    overhang: float = MAX_OVERHANG_PX,
    *,
    is_point: bool = False,
) -> bool:
    """Return whether a box with area, or a point, is in its image up to `overhang`."""
    height, width = image_size
    x1, y1, x2, y2 = box
    is_in_width = -overhang <= x1 <= x2 <= width + overhang
    is_in_height = -overhang <= y1 <= y2 <= height + overhang
    has_area = x1 < x2 and y1 < y2
    return is_in_width and is_in_height and (is_point or has_area)


def clip_to_image(
    box: Box,
    image_size: tuple[int, int],
    frame: BoxFrame,
    *,
    is_point: bool = False,
    is_corner: bool = False,
) -> Box:
    """Clip a box or a point that exceeds its image by no more than a rounding error.

    Args:
        frame: Frame of the coordinates from which the box was converted, for the error.
        is_corner: The point is a corner of a polygon, which alone may be within the first pixel.

    Raises:
        StrayBoxError: The box has no area in the image.
        InvalidBoxError: The box is inverted, or exceeds the image by more than `MAX_OVERHANG_PX`.
    """
    height, width = image_size
    x1, y1, x2, y2 = box
    is_finite = all(map(math.isfinite, box))
    is_valid = is_finite and (is_point or (x1 < x2 and y1 < y2))
    # In pixels, such a box is smaller than one and not on the pixel grid.
    is_fraction = max(box) <= 1 and any(value % 1 for value in box)
    is_fraction = is_fraction and frame.base == "image" and not is_corner
    clipped = clip_box(box, image_size, is_point=is_point)
    is_inside = is_inside_image(box, image_size, is_point=is_point)
    if clipped is not None and is_inside and not is_fraction:
        return clipped
    if is_valid and is_fraction:
        problem = "is smaller than a pixel"
        remedy = "if the boxes are fractions of the image size, give --box-units 1"
    else:
        problem = "is outside its image" if is_valid else "has inverted corners or no area"
        other = "xywh" if frame.order == "xyxy" else "xyxy"
        remedy = (
            f"if the boxes are {other}, give --box-format {other}; if they are not in units of "
            f"{frame.unit}, give --box-units pixel, 1, 100, 1000 or resized"
        )
    error_class: type[InvalidBoxError] = InvalidBoxError
    if is_point:
        shape = f"point [{x1:g}, {y1:g}]"
    else:
        shape = f"box [{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
        if is_finite and clip_box(sort_corners(box), image_size) is None:
            error_class = StrayBoxError
    raise error_class(
        f"the {shape} in pixels (read as {frame.order} in units of {frame.unit}) {problem}",
        expected=f"x1 < x2 up to {width} and y1 < y2 up to {height}, after EXIF rotation",
        remedy=remedy,
    )


def sort_corners(box: Box) -> Box:
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def iou(a: Box, b: Box) -> float:
    """Compute the intersection over union of two boxes, in [0, 1].

    A box with inverted corners is treated as empty, so a malformed prediction scores 0.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0 or box_area(a) == 0 or box_area(b) == 0:
        return 0.0
    intersection = width * height
    return intersection / (box_area(a) + box_area(b) - intersection)


MAX_DISTANCE = 0.05
"""Fraction of the image diagonal between a point and its reference from which it is wrong."""


def contains_center(outer: Box, box: Box) -> bool:
    """Return whether the center of a box, or a point, lies in another box."""
    x = (box[0] + box[2]) / 2
    y = (box[1] + box[3]) / 2
    return outer[0] <= x <= outer[2] and outer[1] <= y <= outer[3]


def measure_distance(box: Box, reference: Box, image_size: tuple[float, float]) -> float:
    """Return the distance of two centers in diagonals; 0 inside a reference."""
    corner_sum = (box[0] + box[2], box[1] + box[3])  # twice the center
    reference_sum = (reference[0] + reference[2], reference[1] + reference[3])
    distance = math.dist(corner_sum, reference_sum) / 2 / math.hypot(*image_size)
    if contains_center(reference, box):
        return 0.0
    return distance


def measure_overlap(
    box: Box, reference: Box, image_size: tuple[float, float] = (1.0, 1.0)
) -> float:
    """Return the IoU, or the closeness to a reference point within `MAX_DISTANCE`."""
    if box_area(reference):
        return iou(box, reference)
    return max(0.0, 1 - measure_distance(box, reference, image_size) / MAX_DISTANCE)


def box_area(box: Box) -> float:
    """Return the area of a box in square pixels, 0 for inverted corners."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def pairwise_iou(boxes: Floats, other_boxes: Floats) -> Floats:
    """Compute the intersection over union [N] of corresponding boxes in two arrays [N, 4]."""
    top_left = np.maximum(boxes[:, :2], other_boxes[:, :2])
    bottom_right = np.minimum(boxes[:, 2:], other_boxes[:, 2:])
    intersection = np.clip(bottom_right - top_left, 0, None).prod(axis=1)
    areas = [np.clip(box[:, 2:] - box[:, :2], 0, None).prod(axis=1) for box in (boxes, other_boxes)]
    ious: Floats = intersection / np.maximum(areas[0] + areas[1] - intersection, 1e-12)
    return ious


def pairwise_overlap(boxes: Floats, references: Floats) -> Floats:
    """Compute the IoU [N] of normalized boxes; a point has the size of `MAX_DISTANCE`."""
    is_point = (references[:, :2] == references[:, 2:]).all(axis=1, keepdims=True)
    margins = is_point * np.array([-MAX_DISTANCE, -MAX_DISTANCE, MAX_DISTANCE, MAX_DISTANCE])
    return pairwise_iou(boxes + margins, references + margins)


BOX_KEY = "bbox_2d"
POINT_KEY = "point_2d"
POLYGON_KEY = "polygon_2d"
COORDINATE_KEYS = (BOX_KEY, POINT_KEY, POLYGON_KEY)
LABEL_KEYS = ("label", "text_content")
_BOX_KEYS = re.compile(rf'"(?:{"|".join((BOX_KEY, POINT_KEY, *LABEL_KEYS))})"\s*:')
_CODE_FENCE = re.compile(r"```(?:json)?\s*([\[{][^`]*[\]}])\s*```")

MAX_JSON_DEPTH = 200
"""Maximum nesting depth of a JSON value in a text. Deeper values are ignored."""

_DECODER = json.JSONDecoder()

MAX_SCAN_RATIO = 4
"""Maximum work for failed JSON parses, as a multiple of the text length.

Without a limit, a text of unclosed brackets would need quadratic time.
"""


class JsonMatch(NamedTuple):
    """A JSON value found in a text between the offsets `start` and `stop` (exclusive)."""

    start: int
    stop: int
    value: Any


def iter_json_values(text: str, openings: str = "[{") -> Iterator[JsonMatch]:
    """Yield the outermost JSON values in a text that start with one of `openings`.

    Invalid JSON and values nested deeper than `MAX_JSON_DEPTH` are skipped. The search ends early
    if a text contains too much invalid JSON (`MAX_SCAN_RATIO`).
    """
    opening = re.compile(f"[{re.escape(openings)}]")
    offset = 0
    left = MAX_SCAN_RATIO * len(text) + 100_000
    while left > 0 and (match := opening.search(text, offset)):
        try:
            value, offset = _DECODER.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            offset = match.end()
            left -= error.pos - offset + error.pos // 16 + 10  # JSONDecodeError counts newlines
        except (ValueError, RecursionError):  # number too long, or too deep
            return
        else:
            if not _is_too_deep(value):
                yield JsonMatch(match.start(), offset, value)


def _is_too_deep(value: object) -> bool:
    """Return whether a value is nested too deeply to be printed without RecursionError."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        containers = [one for one in level if isinstance(one, list | dict)]
        if not containers:
            return False
        level = []
        for container in containers:
            level.extend(container.values() if isinstance(container, dict) else container)
    return True


def strip_code_fences(text: str) -> str:
    """Remove Markdown code fences around JSON that contains boxes."""
    if "```" not in text:
        return text
    return _CODE_FENCE.sub(_strip_fence, text)


def _strip_fence(match: re.Match[str]) -> str:
    if has_json_boxes(match[1]):
        return match[1]
    return match[0]


def has_json_boxes(text: str) -> bool:
    """Return whether a text has a box key, or a JSON value with points."""
    if BOX_KEY in text:
        return True
    if not any(key in text for key in COORDINATE_KEYS):
        return False
    return any(isinstance(piece, list) for piece in split_at_boxes(text))


class TextBox(NamedTuple):
    """A box or a point in a text, not validated.

    Without a label in JSON, the label is the key of the object. Tagged coordinates, such as in the
    special tokens of Qwen2-VL, are in thousandths of the image. The coordinates are a text if that
    between the tags is no box.
    """

    coordinates: Any
    label: str | None
    is_tagged: bool = False


def split_at_boxes(text: str, *, keeps_json: bool = False) -> Iterator[str | list[str | TextBox]]:
    """Split a text into plain text and JSON values with boxes, alternately.

    A value is a list of boxes, or the texts of a structure and boxes instead of their coordinates.
    With `keeps_json`, a list of boxes is a structure, too. Plain texts may be empty. A plain text
    that contains `bbox_2d` has it outside of valid JSON.
    """
    end = 0
    for match in iter_json_values(text):
        part = text[match.start : match.stop]
        if not any(key in part for key in COORDINATE_KEYS):
            continue
        pieces: Sequence[str | TextBox] | None = None
        if not keeps_json:
            pieces = _parse_box_list(part, match.value)
        if pieces is None:
            pieces = _split_structure(part, match.value)
        if pieces:
            yield text[end : match.start]
            yield list(pieces)
            end = match.stop
    yield text[end:]


def _parse_box_list(text: str, value: object) -> Sequence[TextBox] | None:
    """Return the boxes of a JSON value that contains nothing else, or None."""
    items = value if isinstance(value, list) else [value]
    boxes: list[TextBox] = []
    for item in items:
        box = parse_json_box(item)
        if box is None:
            return None
        boxes.append(box)
    # A key that occurs twice would be lost, but a structure keeps its text.
    if len(_BOX_KEYS.findall(text)) != sum(map(len, items)):
        return None
    return boxes


def parse_json_box(value: object) -> TextBox | None:
    """Return a JSON object of `bbox_2d` or `point_2d` and an optional label, else None."""
    if not isinstance(value, dict):
        return None
    keys = value.keys() - set(LABEL_KEYS)
    if len(keys) != 1 or not keys <= {BOX_KEY, POINT_KEY}:
        return None
    labels = [str(value[key]) for key in LABEL_KEYS if value.get(key) is not None]
    coordinates = value[next(iter(keys))]
    is_point = isinstance(coordinates, list) and len(coordinates) == 2
    if (POINT_KEY in keys) != is_point or isinstance(coordinates, str) or len(labels) > 1:
        return None
    return TextBox(coordinates, labels[0] if labels else None)


def _split_structure(text: str, value: object) -> list[str | TextBox]:
    """Split the text of a JSON value at its coordinates; return nothing without any."""
    pieces: list[str | TextBox] = [*split_at_coordinates(text)]
    boxes = list(iter_json_boxes(value))
    if not boxes or len(boxes) != len(pieces) // 2:  # equal keys in an object, or another value
        return []
    pieces[1::2] = boxes
    return pieces


def split_at_coordinates(text: str) -> Iterator[str]:
    """Split a text at the coordinates in JSON: texts and coordinates, alternately."""
    end = 0
    for match in COORDINATES.finditer(text):
        for found in _INNERMOST.finditer(match[1]):
            yield text[end : match.start(1) + found.start()]
            yield found[0]
            end = match.start(1) + found.end()
    yield text[end:]


def find_offsets(text: str) -> set[int]:
    """Return the offsets of the coordinates in JSON."""
    ends = itertools.accumulate(map(len, split_at_coordinates(text)))
    return {*itertools.islice(ends, 0, None, 2)}


def iter_json_boxes(value: object, name: str | None = None) -> Iterator[TextBox]:
    """Yield the boxes and points of a JSON value whose key is `name`."""
    if isinstance(value, list):
        for item in value:
            yield from iter_json_boxes(item, name)
    elif isinstance(value, dict):
        labels = map(value.get, LABEL_KEYS)
        label = next((str(one) for one in labels if isinstance(one, str | int | float)), name)
        # JSON may contain an unpaired surrogate, which UTF-8 cannot encode.
        label = label and label.encode("utf-8", "replace").decode()
        for key, item in value.items():
            if key in COORDINATE_KEYS:
                yield from _iter_coordinates(item, label)
            else:
                yield from iter_json_boxes(item, key)


def _iter_coordinates(value: object, label: str | None) -> Iterator[TextBox]:
    """Yield the boxes of a value: a list of numbers, a string, or a list of these."""
    if isinstance(value, list) and any(isinstance(v, list) or _is_tagged(v) for v in value):
        for item in value:
            yield from _iter_coordinates(item, label)
    elif _is_tagged(value):
        yield TextBox(_find_numbers(str(value)), label, is_tagged=True)
    elif value:
        yield TextBox(value, label)


def _is_tagged(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(_STRING_BOX, f'"{value}"') is not None


def find_coordinates(pieces: Sequence[object]) -> set[int]:
    """Return the indices of boxes that are the value of a coordinate key in JSON."""
    texts = [piece if isinstance(piece, str) else "[0]" for piece in pieces]
    offsets = find_offsets("".join(texts))
    indices: set[int] = set()
    start = 0
    for index, (piece, text) in enumerate(zip(pieces, texts, strict=True)):
        if start in offsets and not isinstance(piece, str):
            indices.add(index)
        start += len(text)
    return indices


_DIGIT = re.compile("[0-9]")
_NUMBER = r"-?\d+(?:\.\d+)?"
_FOUR = rf"{_NUMBER}(?:[\s,;]+{_NUMBER}){{3}}"
_PAIR = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_KEY = rf"[\"'](?:{'|'.join(COORDINATE_KEYS)})[\"']\s*:\s*"
_STRING_BOX = rf'"(?:<[^<>"]*>)?\s*{_PAIR}(?:[\s,]*{_PAIR})?\s*(?:<[^<>"]*>)?"'
_INNERMOST = re.compile(rf"\[[^\[\]\"]+\]|{_STRING_BOX}")
COORDINATES = re.compile(rf"{_KEY}(\[(?:[\s\d.,+\-eE\[\]]|{_STRING_BOX})*\]|{_STRING_BOX})")
"""Coordinates of boxes or points in JSON: a list of numbers, a string, or a list of these."""

_SQUARE_LIST = rf"\[\s*{_FOUR}\s*\]"
_NESTED_LISTS = rf"\[\s*{_SQUARE_LIST}(?:\s*,\s*{_SQUARE_LIST})*+\s*\]"
_LIST = rf"{_SQUARE_LIST}|\(\s*{_FOUR}\s*\)|{_PAIR}\s*,?\s*{_PAIR}"
_LABEL = (
    r"(?:<ref>|<\|object_ref_start\|>)(?P<label>(?:(?!</?ref>|<\|object_ref_).)*)"
    r"(?:</ref>|<\|object_ref_end\|>)"
)
_TEXT_BOX = re.compile(
    rf"(?s:(?:{_LABEL}\s*)?(?:<box>|(?P<token><\|box_start\|>))"
    r"(?P<tagged>(?:(?!</?box>|<\|box_).)*)(?:</box>|<\|box_end\|>))"
    rf"|(?P<location>(?:<loc_?\d{{1,4}}>){{4}})"
    rf"|(?<!\"box_2d\":)(?<!\"box_2d\": )(?:(?P<nested>{_NESTED_LISTS})|{_LIST})"
)
"""Box in a text: in the tags of Qwen-VL or Qwen2-VL, as location tokens, or lists of numbers."""

_LOCATION_TOKENS = r"(?P<tokens>(?:<loc\d{4}>){4})"
_LOCATED_OBJECT = re.compile(rf"\s*{_LOCATION_TOKENS}(?P<label>[^<>;\r\n]*+)(?:;|\Z)")
"""Object of an answer of PaliGemma: location tokens, and its label."""

_SENTENCE_END = (".", "!", "?", "。", "！", "？")

_BEFORE_POINTS = re.compile(
    r"(?i)(?:[\[({【（]|<\w*points?\b[^<>]*>|(?:\b|_)(?:(?:key)?points?|vertices)[\"']?\s*[:：=])"
    r"\s*\Z"
)
"""Text before pairs of coordinates that are points: a bracket, or a tag or key of points."""

_BEFORE_BOX = re.compile(
    r"(?i)(?:bbox|box|boxes|bounding[ _]box)(?:_2d)?\W{0,12}(?:(?:is|are)\W{1,12})?\Z"
)
"""Text before the corners of a box, which names it."""

_TAGGED = re.compile(r"[\s\d.,;()\[\]-]*")
_INNER_LIST = re.compile(r"\[[^\[\]()]*\]")
_LISTS = {
    "boxes": re.compile(_LIST),
    "points": re.compile(rf"[(\[]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*[)\]]"),
}
_NAMED_COORDINATES = {
    "points": re.compile(
        r"point_2d(?!\"\s*:[\s,\[\]]*[}\"])|<points?\b[^<>]{0,80}\d|\bclick\w*\s*\([^()]{0,20}\d"
        r"|[\"'](?:point|keypoints?|center|click)[\"']\s*:\s*[\[{][^a-z]{0,20}\d"
        r"|[\"']points[\"']\s*:\s*\[\s*[\[(]\s*-?\d",
        re.IGNORECASE,
    ),
    "boxes": re.compile(
        r"<(?:box|bbox)>[\s\[{]*\d|<(?:loc|bin)_?\d+>|<patch_index_\d+>|\{(?:<\d+>){4}"
        r"|[\"'](?:bbox(?!_2d)\w*|box\w*|bounding_?box|xyxy|xywh|rect\w*)[\"']\s*:"
        r"\s*[\[{][^a-z]{0,20}\d"
        r"|[\"'](?:x_?1|x_?min|xtl|left)[\"']\s*:[^{}]{0,40}[\"'](?:y|top)",
        re.IGNORECASE,
    ),
}
_LOCATION_WORD = re.compile(
    r"(?i)box|coordinat|locat|where|find|detect|point|click|segment|polygon|outline|contour|\btap\b"
    r"|坐标|位置|框|哪|分割|轮廓|点击"
)

_RUN_NUMBER = r"-?(?:[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)"
_AXIS = (
    r"(?:[xy]_?(?:[0-9](?![0-9])|min|max|center)|[xywh]|[cxy][xy]"
    r"|left|top|right|bottom|width|height)"
    r"(?![^\W\d])"
)
_BREAK = rf"(?:(?i:{_AXIS})[:：]?|[\s,;，；、=()（）\[\]【】{{}}<>|\"']|(?<![0-9])[:：])"
_RUN = re.compile(
    rf"(?<![\w./+-])(?<![0-9][:：]){_RUN_NUMBER}(?:px|[%％])?"
    rf"(?:{_BREAK}++{_RUN_NUMBER}(?:px|[%％])?)+(?![\w:：/-])"
)
"""Two or more numbers with at most brackets, tags, units and names of axes between them."""

_CLOSING_OR_KEY = re.compile(rf"</\w+>|\\(?=\")|\n[ \t-]*+(?={_AXIS}\s*[:=]|<{_AXIS}>)")
_SIZE = re.compile(r"(?i)\bwidth\W*\d[\d.]*+\W*height\W*\d[\d.]*+\Z")
_BEFORE_RUN = re.compile(
    rf"(?i)(?:\b(?:{_AXIS})|box\w*|rect\w*|quad\w*|poly\w*|segment\w*|points?|coord\w*"
    r"|坐标|框)\W*$"
)
_OTHER_LIST = re.compile(
    r"(?i)(?:scores?|years?|prices?|dates?|times?|counts?|grades?|ratings?|rgb|colou?rs?|sizes?"
    r"|values?|numbers?|分数|年份|价格|数量|日期)[\s:：=\"']*$"
)
_WORD_BEFORE = re.compile(r"([^\W\d]+)\s*[:：=]?\s*$")
_PLACE_WORD = re.compile(
    r"(?i)at|in|is|are|and|the|here|to|from|of|on|by|\w*box(?:es)?|\w*rect\w*|loc\w*|position|area"
    r"|region|coord\w*|\w*[在于为是框标置]"
)
_QUANTITY = re.compile(
    r"(?i)how (?:many|much)|number of|\b(?:count|prices?|totals?|dates?|time|year|phone)\b"
    r"|多少|几个|价格|日期"
)

MIN_FITTING_FRACTION = 0.8
"""Minimum fraction of the samples with lists of numbers that fit into their image."""

MIN_EXTENT = 0.1
"""Minimum of the largest coordinate, as a fraction of the shorter image side."""

COORDINATE_REMEDIES = {
    "boxes": "give --box-units pixel, 1000, 100, 1 or resized at import, which converts"
    " [x1, y1, x2, y2] and (x1, y1), (x2, y2) in answers, or write other notations as bbox_2d; in"
    " questions, write them as box parts of samples; in calls of tools, they stay: the definition"
    " of a tool states its units",
    "points": "write them as point_2d in JSON, or as point parts of samples, which are converted",
}


def split_at_text_boxes(
    text: str, list_limits: tuple[float, float] | None, *, is_tagged: bool = False
) -> Iterator[str | TextBox]:
    """Split an answer into non-empty texts, and boxes whose notation defines the units.

    A box that is a value in a JSON object gets quotes, so that the renderer can write it in any
    notation. A list of boxes elsewhere is replaced by the boxes, including its brackets. Adjacent
    tags have the label before the first of them. A text of location tokens with labels, as
    PaliGemma writes it, is split into its boxes only.

    Args:
        list_limits: Maximum x and y in the units that the user gives for lists of four numbers.
            None leaves lists in the text.
        is_tagged: All tags are boxes in thousandths, as in Qwen-VL.
    """
    located = _parse_located_objects(text)
    if located:
        yield from located
        return
    matches = []
    if re.search("[<0-9]", text):
        for match in _iter_text_boxes(text):
            has_units = _has_units(match, is_tagged=is_tagged)
            if has_units or (list_limits is not None and _is_box(match, list_limits)):
                matches.append(match)
    if not matches:
        if text:
            yield text
        return
    json_values = _find_object_values(text, matches)
    offsets = find_offsets(text)
    end = 0
    quote = ""
    label = None
    for match in matches:
        # A tag in quotes after the key of a box is a value.
        is_string = match.start() - 1 in offsets
        before = quote + text[end : match.start() - is_string]
        quote = '"' if match.start() in json_values else ""
        if before or quote:
            yield before + quote
        if match["label"] is not None or before:
            label = match["label"]
        has_units = _has_units(match, is_tagged=is_tagged)
        found: list[Any] = _list_boxes(match) or [match["tagged"] or match[0]]
        for coordinates in found:
            yield TextBox(coordinates, label, has_units)
        end = match.end() + is_string
    rest = quote + text[end:]
    if rest:
        yield rest


def _parse_located_objects(text: str) -> list[TextBox]:
    """Return the boxes of a text in the grammar of PaliGemma, else nothing.

    The text is `<locY><locX><locY><locX> label ; ...`, on a grid of 1024. A label is no sentence.
    """
    boxes: list[TextBox] = []
    end = 0
    stripped = text.strip()
    while end < len(stripped):
        match = _LOCATED_OBJECT.match(stripped, end)
        if match is None:
            return []
        label = match["label"].strip()
        if label.endswith(_SENTENCE_END):
            return []
        coordinates = _scale_location(match["tokens"])
        boxes.append(TextBox(coordinates, label or None, is_tagged=True))
        end = match.end()
    return boxes


def _scale_location(tokens: str) -> list[float]:
    """Return the corners in thousandths of four tokens, y first, on a grid of 1024."""
    corners = to_corners("yxyx", _find_numbers(tokens))
    return [*rescale(corners, (1024, 1024), FRAME_1000)]


def _list_boxes(match: re.Match[str]) -> list[list[float]]:
    """Return the coordinates of a box or point, or of several in brackets each, else nothing."""
    text = match[0] if match["tagged"] is None else match["tagged"]
    numbers = _find_numbers(text)
    if match["location"] and "_" not in text:
        return [_scale_location(text)]
    if len(numbers) in (2, 4):
        boxes = [numbers]
    else:
        boxes = [_find_numbers(inner) for inner in _INNER_LIST.findall(text)]
    is_valid = match["tagged"] is None or _TAGGED.fullmatch(text)
    if is_valid and set(map(len, boxes)) <= {2, 4}:
        return boxes
    return []


def _is_box(match: re.Match[str], limits: tuple[float, float]) -> bool:
    """Return whether a list of four numbers may be a box, rather than points or other values."""
    if match["tagged"] is not None:
        return bool(_list_boxes(match))
    before = match.string[: match.start()][-80:]
    numbers = _find_numbers(match[0])
    is_outside = min(numbers[::2]) > limits[0] + 1 and min(numbers[1::2]) > limits[1] + 1
    word = _WORD_BEFORE.search(before)
    is_small = max(numbers) < MIN_EXTENT * min(limits)
    is_other = is_small and word is not None and not _PLACE_WORD.fullmatch(word[1])
    is_excluded = is_outside or is_other or _OTHER_LIST.search(before) is not None
    return not (is_excluded or _is_point_list(match))


def _is_point_list(match: re.Match[str]) -> bool:
    """Return whether two pairs of coordinates are points of a list, rather than two corners.

    The pairs are in brackets, named points, on a line each, or next to a further pair.
    """
    if match[0].count("(") != 2:
        return False
    before = match.string[: match.start()][-80:]
    after = match.string[match.end() :][:80]
    is_longer = re.search(rf"{_PAIR}[\s,;]*$", before) or re.match(rf"[\s,;]*{_PAIR}", after)
    is_on_lines = "\n" in match[0]
    if is_longer is None and not is_on_lines and _BEFORE_BOX.search(before):
        return False
    return is_on_lines or is_longer is not None or _BEFORE_POINTS.search(before) is not None


def _has_point_list(text: str) -> bool:
    return any(map(_is_point_list, _LISTS["boxes"].finditer(text)))


def _has_units(match: re.Match[str], *, is_tagged: bool) -> bool:
    """Return whether a notation implies a grid: special tokens, or corners in a box tag."""
    if match["tagged"] is None:
        return match["location"] is not None
    is_grid = match["tagged"].lstrip().startswith(("(", "[[")) and bool(_list_boxes(match))
    return is_grid or is_tagged or match["token"] is not None


def _iter_text_boxes(text: str) -> Iterator[re.Match[str]]:
    """Yield the boxes of a text.

    A list of lists is a single match, unless it is in a JSON object.
    """
    matches = list(_TEXT_BOX.finditer(text))
    objects: list[JsonMatch] = []
    if any(match["nested"] for match in matches):
        objects = list(iter_json_values(text, "{"))
    starts = [found.start for found in objects]
    for match in matches:
        index = bisect.bisect_left(starts, match.start())
        is_in_object = index > 0 and match.start() < objects[index - 1].stop
        if match["nested"] and is_in_object:
            # The object needs its brackets, so that only the inner lists are boxes.
            yield from _TEXT_BOX.finditer(text, match.start() + 1, match.end())
        else:
            yield match


def _find_object_values(text: str, matches: Sequence[re.Match[str]]) -> set[int]:
    """Return the offsets of the matches that are values in a JSON object.

    Matches within a string are no values.
    """
    offsets: set[int] = set()
    match_starts = [match.start() for match in matches]
    for region in iter_json_values(text, "{"):
        first = bisect.bisect_right(match_starts, region.start)
        stop = bisect.bisect_left(match_starts, region.stop)
        pieces = []
        end = region.start
        for match in matches[first:stop]:
            pieces.append(text[end : match.start()])
            end = match.end()
        pieces.append(text[end : region.stop])
        # An empty text instead of a value is valid JSON, but its quotes would end a string.
        try:
            json.loads('""'.join(pieces))
        except ValueError:
            continue
        offsets.update(match_starts[first:stop])
    return offsets


def _find_numbers(text: str, pattern: str = _NUMBER) -> list[float]:
    return list(map(float, re.findall(pattern, text)))


def find_number_lists(text: str, kind: str = "boxes") -> list[list[float]]:
    """Return the coordinates of all lists in a text that may be boxes, or points."""
    if not _DIGIT.search(text):
        return []
    matches = _iter_lists(text, kind)
    return [_find_numbers(match[0]) for match in matches]


def _iter_lists(text: str, kind: str) -> Iterator[re.Match[str]]:
    """Yield all lists in a text that may be boxes, or points."""
    for match in _LISTS[kind].finditer(text):
        if kind == "points" or not _is_point_list(match):
            yield match


def _find_runs(text: str, kind: str, *, has_word: bool) -> Iterator[tuple[str, list[float]]]:
    """Yield numbers of an axis, a tag or a bracket, or that are most of a line of a location."""
    has_word = has_word and _QUANTITY.search(text) is None
    for line in _CLOSING_OR_KEY.sub(" ", text).splitlines():
        for match in _RUN.finditer(line):
            plain = re.sub(rf"(?i){_AXIS}", " ", match[0])
            numbers = _find_numbers(plain, _RUN_NUMBER)
            if len(numbers) == 5 and max(numbers[1:]) <= 1:  # a class and its box
                numbers = numbers[1:]
            before = line[: match.start()]
            is_named = _BEFORE_RUN.search(before[-40:]) is not None
            is_in_brackets = before.rstrip().endswith(("[", "(", "<", "{", ">", "【", "（"))
            is_most = len(match[0]) > len(line.strip()) / 2
            if kind == "boxes":
                is_of_kind = len(numbers) % 2 == 0 and len(numbers) > 2
            elif has_word and len(numbers) == 2:
                # The search reads the line from its start: for each run, it would be quadratic.
                is_of_kind = not _SIZE.search(line[: match.end()])
            else:
                is_of_kind = False
            is_unnamed = has_word and (is_in_brackets or is_most) and _is_ordered(numbers)
            if (is_named or is_unnamed) and is_of_kind:
                yield line[max(0, match.start() - 10) :][:40], numbers


def _is_ordered(numbers: Sequence[float]) -> bool:
    """Return whether numbers are a point, a polygon, fractions or two corners."""
    if len(numbers) != 4 or max(numbers) <= 1:
        return True
    return numbers[0] < numbers[2] and numbers[1] < numbers[3]


@dataclass(slots=True)
class TextCoordinates:
    """Samples of a source whose texts contain boxes or points as numbers.

    Attributes:
        named: Number of samples with a named notation, by kind.
        lists: Number of samples with lists of numbers.
        fitting_lists: How many of them have numbers that fit into their image.
        certain_kinds: Kinds with lists that are not just sorted, or next to a word of location.
        examples: Location and text of the first sample by kind.
    """

    named: Counter[str] = field(default_factory=Counter)
    lists: Counter[str] = field(default_factory=Counter)
    fitting_lists: Counter[str] = field(default_factory=Counter)
    certain_kinds: set[str] = field(default_factory=set)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(
        self,
        text: str,
        image_paths: Sequence[str],
        get_size: Callable[[str], tuple[int, int]],
        location: str = "",
    ) -> None:
        """Count a sample with all its texts; `get_size` returns height and width of an image."""
        if not _DIGIT.search(text):
            return
        for kind, pattern in _NAMED_COORDINATES.items():
            if match := pattern.search(text):
                self.named[kind] += 1
                self.examples.setdefault(kind, (location, text[match.start() :][:40]))
                return
        has_word = _LOCATION_WORD.search(text) is not None
        has_point_list = _has_point_list(text)
        for kind in _LISTS:
            lists: list[re.Match[str]] = []
            if has_word or has_point_list or kind == "boxes":
                lists = list(_iter_lists(text, kind))
            numbers = [_find_numbers(match[0]) for match in lists]
            if numbers:
                example = lists[0][0][:40]
            elif has_point_list and kind == "boxes":
                continue  # their numbers are also a run of numbers
            else:
                runs = list(_find_runs(text, kind, has_word=has_word))
                if not runs:
                    continue
                numbers = [run for _, run in runs]
                example = runs[0][0]
                has_word = True
            self.lists[kind] += bool(image_paths)
            sizes = map(get_size, image_paths)
            if any(all(_fits(one, size, has_word) for one in numbers) for size in sizes):
                self.fitting_lists[kind] += 1
                if has_word or any(one != sorted(one) for one in numbers):
                    self.certain_kinds.add(kind)
                self.examples.setdefault(kind, (location, example))
            return

    def describe(self) -> Iterator[tuple[str, int, str, str]]:
        """Yield kind, number of samples, location and text of the first, of each kind found."""
        for kind in _NAMED_COORDINATES:
            count = self.named[kind]
            num_lists = self.fitting_lists[kind]
            is_found = num_lists >= MIN_FITTING_FRACTION * self.lists[kind]
            if is_found and kind in self.certain_kinds:
                count += num_lists
            if count:
                yield (kind, count, *self.examples[kind])


def _fits(numbers: Sequence[float], image_size: tuple[int, int], has_word: bool) -> bool:
    """Return whether numbers are a point, or a box of two corners, in any units of an image."""
    height, width = image_size
    is_inside = max(numbers[::2]) <= width + 1 and max(numbers[1::2]) <= height + 1
    is_fraction = max(numbers) <= 1 and any(value % 1 for value in numbers)
    return (
        (_is_ordered(numbers) or has_word)
        and min(numbers) >= 0
        and (is_inside or max(numbers) <= 1000)
        and (is_fraction or max(numbers) >= MIN_EXTENT * min(image_size))
    )
