"""LabelMe: a folder of JSON files, one per image, with `shapes`.

{"imagePath": "a.jpg", "imageHeight": 480, "imageWidth": 640, "imageData": null, "shapes":
 [{"label": "dog", "shape_type": "rectangle", "points": [[10.5, 20.0], [110.0, 220.5]]}]}

A rectangle is given by two opposite corners in any order; some tools write all four. A polygon,
circle, line or mask is converted to its bounding box; points have none. Coordinates are in pixels,
0-based, after EXIF rotation.

The image path is relative to the JSON file. If the image is missing, it is saved from `imageData`.
Images without a JSON file are considered unlabeled and ignored.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from finesight.bounded_files import find_existing, parse_unique_json
from finesight.data.boxes import BoxConvention, InvalidBoxError, find_bounds
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ExportContext,
    ImportContext,
    ImportExample,
)
from finesight.data.formats.image_annotations import (
    ImageAnnotation,
    ImageRecord,
    ObjectAnnotation,
    build_detection_examples,
    enclose_shape,
    group_boxes_by_image,
    list_image_names,
    make_unique_stem,
    parse_declared_size,
)
from finesight.data.formats.row_keys import count_keys
from finesight.data.line_index import MAX_LINE_BYTES
from finesight.data.row_reader import Record, RowReader, SourceRow, open_annotation_files
from finesight.data.sample import LocatedSample, check_json, read_data_file
from finesight.errors import UserError

_DOCUMENT_KEYS = ("version", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth")
_SHAPE_KEYS = ("label", "points", "shape_type")
LABELME_VERSION = "5.5.0"
"""LabelMe version that exported files declare."""

POINT_TYPES = ("point", "points")


def open_folder(source: Path) -> tuple[RowReader, str] | None:
    """Open the LabelMe JSON files of a folder, or a single one, as rows.

    Returns:
        The rows and the reason for the match, or None if the first files are not from LabelMe.
    """
    description = "JSON files with shapes and imagePath: LabelMe"
    return open_annotation_files(source, ".json", description, b'"shapes"', _read_classes)


def parse_row(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of a LabelMe file."""
    file = Path(row.record["file"])
    record = _read_record(file)
    source_notes: Counter[str] = Counter()
    objects = [_parse_shape(shape, source_notes) for shape in record["shapes"]]
    count_keys([record], _DOCUMENT_KEYS, "files", context.other_keys)
    count_keys(record["shapes"], _SHAPE_KEYS, "shapes", context.other_keys)
    image = _find_image(file, record)
    annotation = ImageAnnotation(
        image,
        objects,
        row.record["classes"],
        parse_declared_size(record.get("imageHeight"), record.get("imageWidth")),
        source_notes=source_notes,
    )
    return build_detection_examples(row, annotation, context, BoxConvention())


def write_files(
    samples: Sequence[LocatedSample], context: ExportContext
) -> Iterator[tuple[str, bytes]]:
    """Write a LabelMe file per image, with its boxes as rectangles."""
    used_stems: set[str] = set()
    for record in group_boxes_by_image(samples, context, set()):
        content = json.dumps(_build_record(record, context), ensure_ascii=False, indent=2)
        yield (
            f"{make_unique_stem(record.image_path.stem, used_stems)}.json",
            f"{content}\n".encode(),
        )


def _read_record(file: Path) -> Record:
    """Read and validate a LabelMe file."""
    content = read_data_file(file, MAX_LINE_BYTES)
    check_json(content, str(file))
    try:
        record = parse_unique_json(content)
    except ValueError as error:
        raise UserError(
            f"broken JSON: {error}",
            expected="a file as LabelMe saves it",
            remedy="save it again, or remove it from the folder",
        ) from error
    shapes = record.get("shapes") if isinstance(record, dict) else None
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise UserError(
            f"no list of shapes in {str(record)[:60]}",
            expected='{"shapes": [...], "imagePath": ...} as LabelMe saves it',
            remedy="remove the file from the folder",
        )
    return dict(record)


def _read_classes(file: Path) -> tuple[bool, set[str]]:
    record = _read_record(file)
    shapes = [s for s in record["shapes"] if _get_shape_type(s) not in POINT_TYPES]
    labels = {shape["label"] for shape in shapes if isinstance(shape.get("label"), str)}
    return "imagePath" in record, labels


def _get_shape_type(shape: Record) -> str:
    # The first versions of LabelMe supported only polygons and wrote no type.
    return str(shape.get("shape_type") or "polygon")


def _parse_shape(shape: Record, source_notes: Counter[str]) -> ObjectAnnotation:
    shape_type, points = _get_shape_type(shape), shape.get("points")
    bounds = None if shape_type in POINT_TYPES else find_bounds(points or (), shape)
    if not isinstance(shape.get("label"), str) or not shape["label"].strip():
        raise InvalidBoxError(
            f"the {shape_type} {str(shape)[:80]}",
            expected="a label",
            remedy="correct the shape, or remove it",
        )
    if shape_type == "circle" and isinstance(points, list) and len(points) > 1:
        (x, y), edge, *_ = ((float(x), float(y)) for x, y in points)
        radius = math.dist((x, y), edge)
        bounds = [x - radius, y - radius, x + radius, y + radius]
    if shape_type != "rectangle":
        kind = "polygons" if shape_type == "polygon" else f"shapes of type {shape_type}"
        bounds = enclose_shape(kind, bounds, source_notes)
    return ObjectAnnotation(shape["label"], bounds)


def _find_image(file: Path, record: Record) -> str | bytes:
    """Return the image path, or the bytes of `imageData` if the image is missing.

    The image path in the record may have Windows separators. Without one, the image has the name of
    the JSON file.
    """
    names = [str(record["imagePath"])] if record.get("imagePath") else list_image_names(file)
    path = file.parent / names[0]
    for found in (find_existing(file.parent, name) for name in names):
        if found is not None and os.path.isfile(found):
            return str(found)
    data = record.get("imageData")
    if not isinstance(data, str) or not data:
        return str(path)  # the image resolver reports the path
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"imageData is not base64: {error}",
            expected="image bytes in base64, or null",
            remedy=f"move the image to {path}",
        ) from error


def _build_record(image_record: ImageRecord, context: ExportContext) -> Record:
    height, width = context.image_size(image_record.image_path)
    shapes: list[Record] = [
        {
            "label": box.label,
            "points": [_format_point(box.xyxy[:2]), _format_point(box.xyxy[2:])],
            "group_id": None,
            "description": "",
            "shape_type": "rectangle",
            "flags": {},
        }
        for box in image_record.boxes
    ]
    return {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": context.image_name(image_record.image_path),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _format_point(point: Sequence[float]) -> list[float]:
    return [float(value) for value in point]


FORMAT = DatasetFormat(
    name="labelme",
    description='a folder of JSON files, {"imagePath": "a.jpg", "shapes": [...]}',
    typical_keys=frozenset({"imagePath", "shapes"}),
    parse_row=parse_row,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=open_folder,
    write_files=write_files,
)
