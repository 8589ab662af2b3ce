"""LabelMe: a folder of JSON files, one for a picture, with `shapes`.

{"imagePath": "a.jpg", "imageHeight": 480, "imageWidth": 640, "imageData": null, "shapes":
 [{"label": "dog", "shape_type": "rectangle", "points": [[10.5, 20.0], [110.0, 220.5]]}]}

A rectangle is any two opposite corners (some tools write all four), a polygon becomes the box
around it, counted; points, lines, circles and masks are left out and counted. Pixels are counted
from 0, after the EXIF turn. The path starts at the JSON file; a picture that is not there is
saved from `imageData`. Pictures without a JSON file are not labelled and not read.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from finesight.bounded_files import parse_json
from finesight.data.boxes import BadBox, BoxForm
from finesight.data.case import Case
from finesight.data.formats.box_sets import Marked, Pictured, Size, questions
from finesight.data.formats.by_picture import Gathered, boxes_by_picture, distinct
from finesight.data.formats.format import Format, Reading, Writing, never
from finesight.data.formats.inventory import (
    START,
    inventory,
    is_json_object,
    open_described,
)
from finesight.data.jsonl import Located, read_bytes
from finesight.data.limits import MAX_BOXES, check_count, check_json
from finesight.data.lines import LARGEST_LINE, opened
from finesight.data.rows import Record, Row, Rows
from finesight.errors import UserError
from finesight.file_names import existing

VERSION = "5.5.0"
"""The version of LabelMe whose files these are written like."""

OUTLINED = "polygons, read as the boxes around them"


def open_folder(source: Path) -> tuple[Rows, str] | None:
    """A row for each JSON file of a folder, or of one JSON file."""
    files = [source] if is_json_object(source) else []
    if source.is_dir():
        files = inventory(source).ending(".json")
    kind = "JSON files with shapes and imagePath: LabelMe"
    return open_described(files, source.stem, kind, _is_labelme, _classes_in)


def read(row: Row, reading: Reading) -> list[Case]:
    """See the head of this file for what is read."""
    file = Path(row.record["file"])
    record = _record(file)
    noted: Counter[str] = Counter()
    check_count(len(record["shapes"]), MAX_BOXES, "shapes")
    objects = [mark for shape in record["shapes"] for mark in _marked(shape, noted)]
    picture = _picture(file, record)
    pictured = Pictured(picture, objects, row.record["classes"], _size(record), noted=noted)
    return questions(row, pictured, reading, BoxForm())


def write(samples: Sequence[Located], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """A JSON file for each picture, its boxes as rectangles."""
    taken: set[str] = set()
    for one in boxes_by_picture(samples, writing, set()):
        content = json.dumps(_as_record(one, writing), ensure_ascii=False, indent=2)
        yield f"{distinct(one.path.stem, taken)}.json", f"{content}\n".encode()


def _record(file: Path) -> Record:
    """The content of a file. Raises UserError when it is not LabelMe's."""
    content = read_bytes(file, LARGEST_LINE)
    check_json(content, str(file))
    try:
        record = parse_json(content)
    except ValueError as error:
        raise UserError(
            f"broken JSON: {error}",
            expected="a file as LabelMe saves it",
            remedy="save it again, or take it out of the folder",
        ) from error
    shapes = record.get("shapes") if isinstance(record, dict) else None
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise UserError(
            f"no list of shapes in {str(record)[:60]}",
            expected='{"shapes": [...], "imagePath": ...} as LabelMe saves it',
            remedy="take the file out of the folder",
        )
    return dict(record)


def _is_labelme(file: Path) -> bool:
    try:
        return "imagePath" in _record(file)
    except UserError:  # told, with its file, when it is its turn
        with opened(file) as content:
            return b'"shapes"' in content.read(START)


def _classes_in(file: Path) -> set[str]:
    """The labels of a file's boxes; a file that cannot be read is refused when it is its turn."""
    try:
        shapes = _record(file)["shapes"]
    except UserError:
        return set()
    boxed = [shape for shape in shapes if _kind(shape) in ("rectangle", "polygon")]
    return {shape["label"] for shape in boxed if isinstance(shape.get("label"), str)}


def _kind(shape: Record) -> str:
    # The first versions knew polygons only, and named no type.
    return str(shape.get("shape_type") or "polygon")


def _marked(shape: Record, noted: Counter[str]) -> Iterator[Marked]:
    kind, points = _kind(shape), shape.get("points")
    if kind not in ("rectangle", "polygon"):
        noted[f"shapes of type {kind}, left out"] += 1
        return
    try:
        corners = [(float(x), float(y)) for x, y in points or ()]
    except (TypeError, ValueError, OverflowError):
        corners = []
    if len(corners) < 2 or not isinstance(shape.get("label"), str) or not shape["label"].strip():
        raise BadBox(
            f"the {kind} {str(shape)[:80]}",
            expected="a label and two or more points [x, y]",
            remedy="correct the shape, or take it out",
        )
    noted.update([OUTLINED] if kind == "polygon" else [])
    across, down = zip(*corners, strict=True)
    yield Marked(shape["label"], [min(across), min(down), max(across), max(down)])


def _picture(file: Path, record: Record) -> str | bytes:
    """Its path, also one as Windows writes it, or its bytes where no file is there."""
    name = str(record.get("imagePath") or "")
    named = file.parent / name
    found = existing(file.parent, name)
    if found is not None and os.path.isfile(found):
        return str(found)
    data = record.get("imageData")
    if not isinstance(data, str) or not data:
        return str(named)  # refused with its path by whoever takes the picture
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"imageData is no base64: {error}",
            expected="a picture's bytes in base64, or null",
            remedy=f"put the picture to {named}",
        ) from error


def _size(record: Record) -> Size | None:
    height, width = record.get("imageHeight"), record.get("imageWidth")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _as_record(one: Gathered, writing: Writing) -> Record:
    height, width = writing.size(one.path)
    shapes: list[Record] = [
        {
            "label": box.label,
            "points": [_corner(box.xyxy[:2]), _corner(box.xyxy[2:])],
            "group_id": None,
            "description": "",
            "shape_type": "rectangle",
            "flags": {},
        }
        for box in one.boxes
    ]
    return {
        "version": VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": writing.name(one.path),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _corner(point: Sequence[float]) -> list[float]:
    return [float(number) for number in point]


FORMAT = Format(
    name="labelme",
    looks='a folder of JSON files, {"imagePath": "a.jpg", "shapes": [...]}',
    keys=frozenset({"imagePath", "shapes"}),
    detect=never,
    read=read,
    takes=frozenset({"prompt", "boxes", "ask"}),
    open=open_folder,
    write=write,
)
