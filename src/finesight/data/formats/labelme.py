"""LabelMe: a folder of JSON files, one per image, with `shapes`.

A rectangle is given by two opposite corners in any order; some tools write all four. Coordinates
are in pixels, 0-based, after EXIF rotation. The image path is relative to the JSON file. If the
image is missing, it is saved from `imageData`. Images without a JSON file are ignored.
"""

from __future__ import annotations

import base64
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from finesight.bounded_files import find_existing, parse_unique_json
from finesight.data.boxes import BoxConvention, find_bounds, translate_shape_errors
from finesight.data.folder_listing import open_annotation_files
from finesight.data.formats.dataset_format import (
    DatasetFormat,
    ImportContext,
    ImportExample,
    as_list,
)
from finesight.data.formats.image_annotations import (
    NO_OUTLINES,
    BoolMask,
    ObjectAnnotation,
    Outlines,
    build_detection_examples,
    enclose_shape,
    list_image_names,
    trace_mask,
)
from finesight.data.formats.row_keys import count_keys
from finesight.data.image_file import MAX_IMAGE_PIXELS
from finesight.data.line_index import MAX_LINE_BYTES
from finesight.data.row_reader import Record, RowReader, SourceRow
from finesight.data.sample import check_json, read_data_file, translate_errors
from finesight.errors import UserError

_DOCUMENT_KEYS = ("version", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth")
_SHAPE_KEYS = ("label", "points", "shape_type", "mask")

POINT_TYPES = ("point", "points")


def _open_labelme(source: Path) -> tuple[RowReader, str] | None:
    """Open the LabelMe JSON files of a folder, or a single one, as rows."""
    description = "JSON files with shapes: LabelMe"
    return open_annotation_files(source, ".json", description, b'"shapes"', _read_classes)


def _parse_labelme(row: SourceRow, context: ImportContext) -> list[ImportExample]:
    """Build the training examples of a LabelMe file."""
    file = Path(row.record["file"])
    record = _read_record(file)
    objects = [_parse_shape(shape, context) for shape in record["shapes"]]
    count_keys([record], _DOCUMENT_KEYS, "files", context.other_keys)
    count_keys(record["shapes"], _SHAPE_KEYS, "shapes", context.other_keys)
    image = _find_image(file, record)
    size = record.get("imageHeight"), record.get("imageWidth")
    return build_detection_examples(
        row, context, BoxConvention(), image, objects, declared_size=size
    )


def _read_record(file: Path) -> Record:
    """Read and validate a LabelMe file."""
    content = read_data_file(file, MAX_LINE_BYTES)
    check_json(content, str(file))
    remedy = "save it again, or remove it from the folder"
    with translate_errors("broken JSON", "a file as LabelMe saves it", remedy):
        record = parse_unique_json(content)
    shapes = record.get("shapes") if isinstance(record, dict) else None
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise UserError(
            f"no list of shapes in {str(record)[:60]}",
            expected='{"shapes": [...], "imagePath": ...} as LabelMe saves it',
            remedy="remove the file from the folder",
        )
    return dict(record)


def _read_classes(file: Path) -> tuple[bool, set[str], set[str]]:
    record = _read_record(file)
    labels: tuple[set[str], set[str]] = (set(), set())
    for shape in record["shapes"]:
        if isinstance(shape.get("label"), str):
            labels[_get_shape_type(shape) in POINT_TYPES].add(shape["label"])
    is_labelme = not {"imagePath", "imageData"}.isdisjoint(record)
    return is_labelme or any("points" in shape for shape in record["shapes"]), *labels


def _get_shape_type(shape: Record) -> str:
    # The first versions of LabelMe supported only polygons and wrote no type.
    return str(shape.get("shape_type") or "polygon")


def _parse_shape(shape: Record, context: ImportContext) -> ObjectAnnotation:
    shape_type, points = _get_shape_type(shape), shape.get("points", ())
    bounds = None if shape_type in POINT_TYPES else find_bounds(points or (), shape)
    with translate_shape_errors(shape, "a label", shape_type):
        if not str.strip(shape["label"]):
            raise ValueError(f"the label {shape['label']!r}")
    if shape_type == "circle" and isinstance(points, list) and len(points) > 1:
        (x, y), edge, *_ = ((float(x), float(y)) for x, y in points)
        radius = math.dist((x, y), edge)
        bounds = [x - radius, y - radius, x + radius, y + radius]
    is_point = shape_type in POINT_TYPES
    named = [(shape["label"], as_list(point)) for point in as_list(points) if is_point]
    outlines = NO_OUTLINES
    if shape_type in ("polygon", "oriented_rectangle"):
        outlines = Outlines([points])
    elif shape_type == "mask" and context.box_task == "polygons":
        with translate_shape_errors(shape, "two points, and `mask`, a PNG file in base64"):
            (left, top), _ = points
            outlines = trace_mask(_decode_mask(shape["mask"]), left, top)
    if shape_type != "rectangle":
        kind = "polygons" if shape_type == "polygon" else f"shapes of type {shape_type}"
        bounds = enclose_shape(kind, bounds, context, outlines)
    return ObjectAnnotation(shape["label"], bounds, outlines, points=named)


def _decode_mask(text: str) -> BoolMask:
    """Decode a PNG file in base64. Raises ValueError if it is invalid or too large."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)) as image:
            if math.prod(image.size) > MAX_IMAGE_PIXELS:
                raise ValueError(f"a mask of {image.size}")
            return np.asarray(image.convert("L")) > 0
    except Exception as error:  # Pillow raises many error types
        raise ValueError(f"a mask that cannot be decoded ({error})") from error


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
    expected, remedy = "image bytes in base64, or null", f"move the image to {path}"
    with translate_errors("imageData is not base64", expected, remedy):
        return base64.b64decode(data, validate=True)


COMPONENT = DatasetFormat(
    name="labelme",
    description='a folder of JSON files, {"imagePath": "a.jpg", "shapes": [...]}',
    parse_row=_parse_labelme,
    supported_options=frozenset({"prompt", "boxes", "box_task"}),
    open_dataset=_open_labelme,
    position=40,
)
